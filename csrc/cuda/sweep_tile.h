// What every epilogue does with the scores of a tile, which stay in the registers that wgmma left them in: masks at the
// edges, scores on the diagonal, and reductions over rows and columns.
//
// The four threads of a quad hold a row. Eight lanes of every warp of the team hold a column: the lanes halve the
// columns among themselves (each round a thread gives away one half and keeps the other), the warps meet in shared
// memory.
#pragma once

#include <limits>

#include "sweep_layout.h"

namespace gssf::hopper {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// The scores of a launch of the sweep: row blocks [first, first + blocks) of a [N, D] against all of b [M, D].
struct Area {
  int N, M, D;
  int first, blocks, columns;  // columns: column blocks
};

struct alignas(8) Two {
  float x, y;
};

// The team of this thread, and its position in the team.
template <class Tile>
struct Seat {
  int team, member, warp, lane;  // member: thread of the team, and the column it stands for; warp: of the team
  Fragment<Tile> fragment;

  GSSF_DEVICE explicit Seat(int consumer)
      : team(consumer / Tile::TEAM_THREADS),
        member(consumer % Tile::TEAM_THREADS),
        warp(member / kWarp),
        lane(member % kWarp),
        fragment(warp, lane) {}

  GSSF_DEVICE int barrier() const { return 1 + team; }

  // The first row of the tile that this thread's warpgroup holds.
  GSSF_DEVICE int first_row() const { return Tile::HEIGHT == 1 ? warp / 4 * 64 : 0; }
};

// f(score, row, column) for every score of the thread. The column counts from the thread's first, so that it is a
// constant in the unrolled code.
template <class Tile, class F>
GSSF_DEVICE void each_score(float (&s)[kScores], const Fragment<Tile>& at, F f) {
#pragma unroll
  for (int m = 0; m < Tile::HEIGHT; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int g = 0; g < Tile::BM / 8; ++g)
#pragma unroll
        for (int e = 0; e < 2; ++e) f(s[at.at(m, g, h, e)], at.row(m, h), 8 * g + e);
}

// f(score, i) for every s_ii of the thread, also where i is past an edge; costs only the warpgroups that have any.
template <class Tile, class F>
GSSF_DEVICE void on_diagonal(float (&s)[kScores], const Seat<Tile>& seat, Place place, const Area& p, F f) {
  const int i0 = (p.first + place.i) * Tile::BN, j0 = place.j * Tile::BM, own = i0 + seat.first_row();
  if (own >= j0 + Tile::BM || j0 >= own + Tile::ROWS) return;
  const int apart = i0 - j0 - seat.fragment.column0;  // of the tile's row 0 and the thread's first column
  each_score(s, seat.fragment, [&](float& score, int row, int column) {
    if (row + apart == column) f(score, i0 + row);
  });
}

// -inf past the edges; warpgroups that contain none skip this.
template <class Tile>
GSSF_DEVICE void none_outside(float (&s)[kScores], const Seat<Tile>& seat, Place place, const Area& p) {
  const int i0 = (p.first + place.i) * Tile::BN, j0 = place.j * Tile::BM;
  if (i0 + seat.first_row() + Tile::ROWS <= p.N && j0 + Tile::BM <= p.M) return;
  const int rows = p.N - i0, columns = p.M - j0 - seat.fragment.column0;
  each_score(s, seat.fragment, [&](float& score, int row, int column) {
    if (row >= rows || column >= columns) score = kNone;
  });
}

// The merge of two values. NaN stays NaN.
struct Larger {
  GSSF_DEVICE float operator()(float x, float y) const { return chip::larger(x, y); }
};

struct Sum {
  GSSF_DEVICE float operator()(float x, float y) const { return x + y; }
};

// value merged over the four threads of a quad, which hold a row.
template <class T, class Join>
GSSF_DEVICE T over_quad(T value, Join join) {
  value = join(value, chip::shuffle_xor(value, 1));
  return join(value, chip::shuffle_xor(value, 2));
}

// The largest score of row (m, h), NaN if any is.
template <class Tile>
GSSF_DEVICE float row_top(const float (&s)[kScores], const Fragment<Tile>& at, int m, int h) {
  float top = s[at.at(m, 0, h, 0)];
#pragma unroll
  for (int g = 0; g < Tile::BM / 8; ++g)
#pragma unroll
    for (int e = 0; e < 2; ++e) top = chip::larger(top, s[at.at(m, g, h, e)]);
  return over_quad(top, Larger());
}

// The offset of the partial of row (m, h): [column block, row of the slab].
template <class Tile>
GSSF_DEVICE int64_t row_entry(const Fragment<Tile>& at, Place place, const Area& p, int m, int h) {
  return (int64_t(place.j) * p.blocks + place.i) * Tile::BN + at.row(m, h);
}

// to[column] = what the warp's rows come to: value(g, e) is the thread's own of column (g, e), and join joins two.
template <class Tile, class Value, class Join>
GSSF_DEVICE void over_warp(const Seat<Tile>& seat, float (&to)[Tile::BM], Value value, Join join) {
#pragma unroll
  for (int chunk = 0; chunk < Tile::BM / 64; ++chunk) {  // eight column groups, one of which each lane ends up with
    float of[8][2];
#pragma unroll
    for (int g = 0; g < 8; ++g)
#pragma unroll
      for (int e = 0; e < 2; ++e) of[g][e] = value(8 * chunk + g, e);
#pragma unroll
    for (int half = 4; half >= 1; half /= 2) {
      const bool upper = seat.lane & 4 * half;
#pragma unroll
      for (int g = 0; g < half; ++g)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float keep = upper ? of[g + half][e] : of[g][e], give = upper ? of[g][e] : of[g + half][e];
          of[g][e] = join(keep, chip::shuffle_xor(give, 4 * half));
        }
    }
    const int column = seat.fragment.column(8 * chunk + seat.lane / 4, 0);
    *reinterpret_cast<Two*>(&to[column]) = {of[0][0], of[0][1]};
  }
}

// The largest score of each column in the warp's rows.
template <class Tile>
GSSF_DEVICE void column_tops(const float (&s)[kScores], const Seat<Tile>& seat, float (&to)[Tile::BM]) {
  const Fragment<Tile>& at = seat.fragment;
  over_warp(
      seat, to,
      [&](int g, int e) {
        float top = chip::larger(s[at.at(0, g, 0, e)], s[at.at(0, g, 1, e)]);
#pragma unroll
        for (int m = 1; m < Tile::HEIGHT; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) top = chip::larger(top, s[at.at(m, g, h, e)]);
        return top;
      },
      Larger());
}

// The warps' values of column `member`, merged.
template <class Tile, class Join>
GSSF_DEVICE float over_team(const Seat<Tile>& seat, const float (&of)[Tile::TEAM_WARPS][Tile::BM], Join join) {
  float value = of[0][seat.member];
#pragma unroll
  for (int warp = 1; warp < Tile::TEAM_WARPS; ++warp) value = join(value, of[warp][seat.member]);
  return value;
}

}  // namespace gssf::hopper
