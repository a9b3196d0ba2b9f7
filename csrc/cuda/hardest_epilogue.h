// The epilogue for hardest negatives: the maximum over the negatives of each row and column of a tile, and its place in
// the tile. Places come second: the lowest position whose score equals the maximum.
#pragma once

#include "hardest_layout.h"
#include "sweep_tile.h"

namespace gssf::hopper {

// A team's shared memory. Two neighbouring columns are read and written at once.
template <class Tile>
struct alignas(16) HardestBoard {
  float best[Tile::TEAM_WARPS][Tile::BM];  // maxima of each warp's rows
  float top[Tile::BM];                     // of all rows; NaN, which equals nothing, where that is -inf
  int place[Tile::BM];
};

struct Hardest : Area {
  template <class Tile>
  using Board = HardestBoard<Tile>;

  const int64_t *a_ids, *b_ids;        // [N], [M], or both null
  const IdRange *a_ranges, *b_ranges;  // of every Tile::ROWS rows and Tile::BM columns
  float* pair_score;                   // [N]
  Partials rows, cols;                 // [columns, blocks * BN], [blocks, M]
};

constexpr int16_t kNowhere = 0x7FFF;  // the place of a column that has no score above -inf

// Sets scores of no negative to -inf; a warpgroup whose rows have no such score skips the mask.
template <class Tile>
GSSF_DEVICE void only_negatives(float (&s)[kScores], const Seat<Tile>& seat, Place place, const Hardest& p) {
  on_diagonal(s, seat, place, p, [&](float& score, int i) {
    if (i < p.N) p.pair_score[i] = score;
    score = kNone;
  });
  none_outside(s, seat, place, p);

  const Fragment<Tile>& at = seat.fragment;
  const int i0 = (p.first + place.i) * Tile::BN, j0 = place.j * Tile::BM, own = i0 + seat.first_row();

  if (p.a_ids && own < p.N && overlap(p.a_ranges[own / Tile::ROWS], p.b_ranges[place.j])) {
    int64_t id[Tile::HEIGHT][2];
#pragma unroll
    for (int m = 0; m < Tile::HEIGHT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = i0 + at.row(m, h);
        id[m][h] = p.a_ids[i < p.N ? i : p.N - 1];
      }
#pragma unroll
    for (int g = 0; g < Tile::BM / 8; ++g)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = j0 + at.column(g, e);
        const int64_t other = p.b_ids[j < p.M ? j : p.M - 1];
#pragma unroll
        for (int m = 0; m < Tile::HEIGHT; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (id[m][h] == other) s[at.at(m, g, h, e)] = kNone;
      }
  }
}

// Writes the maximum of each of this thread's rows to the row partials. Returns whether any is NaN.
template <class Tile>
GSSF_DEVICE bool reduce_rows(const float (&s)[kScores], const Seat<Tile>& seat, Place place, const Hardest& p) {
  const Fragment<Tile>& at = seat.fragment;
  bool nan = false;
#pragma unroll
  for (int m = 0; m < Tile::HEIGHT; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float top = row_top(s, at, m, h);
      int column = kNowhere;  // the lowest that attains top: from the last to the first
      const auto look = [&](auto hit) {
#pragma unroll
        for (int g = Tile::BM / 8 - 1; g >= 0; --g)
#pragma unroll
          for (int e = 1; e >= 0; --e)
            if (hit(s[at.at(m, g, h, e)])) column = 8 * g + e;
      };
      if (top == top) look([&](float score) { return score == top; });
      else look([](float score) { return score != score; });
      if (column != kNowhere) column += at.column0;
      column = over_quad(column, [](int x, int y) { return x < y ? x : y; });

      if (seat.lane % 4 == 0) {
        const int64_t to = row_entry(at, place, p, m, h);
        p.rows.score[to] = top;
        p.rows.place[to] = static_cast<int16_t>(column);
      }
      nan |= top != top;
    }
  return nan;
}

// Writes the lowest rows that attain the columns' maxima to the board. Every thread marks which of its scores
// hit(score, its column's maximum), without a branch; a tile has about one hit a thread, so what follows is short.
template <class Tile, class Hit>
GSSF_DEVICE void look_for_rows(const float (&s)[kScores], const Seat<Tile>& seat, HardestBoard<Tile>& board, Hit hit) {
  const Fragment<Tile>& at = seat.fragment;
  uint32_t hits[kScores / 32] = {};
#pragma unroll
  for (int g = 0; g < Tile::BM / 8; ++g) {
    const Two top = *reinterpret_cast<const Two*>(&board.top[at.column(g, 0)]);
#pragma unroll
    for (int m = 0; m < Tile::HEIGHT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int k = at.at(m, g, h, e);
          if (hit(s[k], e ? top.y : top.x)) hits[k / 32] |= 1u << k % 32;
        }
  }
#pragma unroll
  for (int word = 0; word < kScores / 32; ++word)
    for (uint32_t left = hits[word]; left; left &= left - 1) {
      const uint32_t k = 32 * word + chip::lowest_bit(left);
      chip::lower(&board.place[at.column_of(k)], at.row_of(k));
    }
}

// Reduces a team's tile of scores to its row and column partials.
template <class Tile>
GSSF_DEVICE void reduce_tile(float (&s)[kScores], const Seat<Tile>& seat, Place place, const Hardest& p,
                             HardestBoard<Tile>& board) {
  only_negatives(s, seat, place, p);
  const bool nan = reduce_rows(s, seat, place, p);
  column_tops(s, seat, board.best[seat.warp]);
  chip::sync(seat.barrier(), Tile::TEAM_THREADS);  // 1: every warp's maxima are there

  const int j = place.j * Tile::BM + seat.member;
  const int64_t to = int64_t(place.i) * p.M + j;
  const float top = over_team(seat, board.best, Larger());
  if (j < p.M) p.cols.score[to] = top;
  board.top[seat.member] = top == kNone ? std::numeric_limits<float>::quiet_NaN() : top;
  board.place[seat.member] = kNowhere;
  const bool any_nan = chip::sync_any(seat.barrier(), Tile::TEAM_THREADS, nan);  // 2: every column's maximum is there

  if (any_nan) look_for_rows(s, seat, board, [](float score, float top) { return score == top || score != score; });
  else look_for_rows(s, seat, board, [](float score, float top) { return score == top; });
  chip::sync(seat.barrier(), Tile::TEAM_THREADS);  // 3: every thread has read the maxima
  // Until barrier 1 of the next tile only `best` is written, which was last read before barrier 2; and each thread
  // reads and resets a separate place.
  if (j < p.M) p.cols.place[to] = static_cast<int16_t>(board.place[seat.member]);
}

}  // namespace gssf::hopper
