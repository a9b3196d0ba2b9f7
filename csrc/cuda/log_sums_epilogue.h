// The epilogue for log-sums: with t = κ s, max t and Σ e^(t - max) of each row and column of a tile. With a NaN among
// the t max is inf and the sum NaN; an infinite max is not subtracted.
#pragma once

#include "log_sums_layout.h"
#include "sweep_tile.h"

namespace gssf::hopper {

// A team's shared memory. Two neighbouring columns are read and written at once.
template <class Tile>
struct alignas(16) LogBoard {
  float best[Tile::TEAM_WARPS][Tile::BM];   // max t over each warp's rows
  float total[Tile::TEAM_WARPS][Tile::BM];  // Σ of them
  float shift[Tile::BM];                    // what is subtracted from a column
};

struct LogSums : Area {
  template <class Tile>
  using Board = LogBoard<Tile>;

  const float* scale;  // κ, or null: constant
  float constant;
  float* pair;             // [min(N, M)], t_ii
  LogPartials rows, cols;  // [columns, blocks * BN], [blocks, M]
};

// (max, what is subtracted): NaN counts as inf.
GSSF_DEVICE Two shift_of(float top) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  top = top == top ? top : inf;
  return {top, top == inf || top == -inf ? 0.0f : top};
}

template <class Tile>
GSSF_DEVICE void sum_rows(const float (&t)[kScores], const Seat<Tile>& seat, Place place, const LogSums& p) {
  const Fragment<Tile>& at = seat.fragment;
#pragma unroll
  for (int m = 0; m < Tile::HEIGHT; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Two top = shift_of(row_top(t, at, m, h));
      float sum[2] = {};
#pragma unroll
      for (int g = 0; g < Tile::BM / 8; ++g)
#pragma unroll
        for (int e = 0; e < 2; ++e) sum[e] += chip::exponential(t[at.at(m, g, h, e)] - top.y);
      const float total = over_quad(sum[0] + sum[1], Sum());
      if (seat.lane % 4 == 0) {
        const int64_t to = row_entry(at, place, p, m, h);
        p.rows.top[to] = top.x;
        p.rows.sum[to] = total;
      }
    }
}

// The sums of each column over the warp's rows.
template <class Tile>
GSSF_DEVICE void sum_columns(const float (&t)[kScores], const Seat<Tile>& seat, LogBoard<Tile>& board) {
  const Fragment<Tile>& at = seat.fragment;
  over_warp(
      seat, board.total[seat.warp],
      [&](int g, int e) {
        const float shift = board.shift[at.column(g, e)];
        float sum = 0;
#pragma unroll
        for (int m = 0; m < Tile::HEIGHT; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) sum += chip::exponential(t[at.at(m, g, h, e)] - shift);
        return sum;
      },
      Sum());
}

// Reduces a team's tile of scores to its row and column partials.
template <class Tile>
GSSF_DEVICE void reduce_tile(float (&s)[kScores], const Seat<Tile>& seat, Place place, const LogSums& p,
                             LogBoard<Tile>& board) {
  const float scale = p.scale ? *p.scale : p.constant;
#pragma unroll
  for (int k = 0; k < kScores; ++k) chip::scale(s[k], scale);
  on_diagonal(s, seat, place, p, [&](float t, int i) {
    if (i < p.N && i < p.M) p.pair[i] = t;
  });
  none_outside(s, seat, place, p);
  column_tops(s, seat, board.best[seat.warp]);
  sum_rows(s, seat, place, p);
  chip::sync(seat.barrier(), Tile::TEAM_THREADS);  // 1: every warp's maxima are written

  const int j = place.j * Tile::BM + seat.member;
  const int64_t to = int64_t(place.i) * p.M + j;
  const Two top = shift_of(over_team(seat, board.best, Larger()));
  board.shift[seat.member] = top.y;
  chip::sync(seat.barrier(), Tile::TEAM_THREADS);  // 2: every column's shift is written

  sum_columns(s, seat, board);
  chip::sync(seat.barrier(), Tile::TEAM_THREADS);  // 3: every warp's sums are there
  // Until barrier 1 of the next tile only `best` is written, which was last read before barrier 2; `shift` was last
  // read before 3, and `total` is written again after the next tile's 2.
  if (j >= p.M) return;
  p.cols.top[to] = top.x;
  p.cols.sum[to] = over_team(seat, board.total, Sum());
}

}  // namespace gssf::hopper
