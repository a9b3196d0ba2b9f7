// What becomes of a tile of scores: the best negative of each of its rows and columns, with its place in the tile.
//
// Scores stay in the registers that wgmma left them in. A row lies in the four threads of a quad, so its maximum takes
// two shuffles. A column lies in eight lanes of every warp of the team: the lanes halve the columns among themselves
// (each round a thread gives away one half and keeps the other), the warps meet in shared memory. Places are looked up
// after: the lowest position whose score equals the maximum.
#pragma once

#include <limits>

#include "hardest_layout.h"

namespace gssf::hopper {

// What a launch of the sweep works on: row blocks [first, first + blocks) of a [N, D] against all of b [M, D].
struct Sweep {
  int N, M, D;
  int first, blocks, columns;          // columns: column blocks
  const int64_t *a_ids, *b_ids;        // [N], [M], or both null
  const IdRange *a_ranges, *b_ranges;  // of every Tile::ROWS rows and Tile::BM columns
  float* pair_score;                   // [N]
  Partials rows, cols;                 // [columns, blocks * BN], [blocks, M]
};

constexpr int16_t kNowhere = 0x7FFF;  // the place of a column that has no score above -inf
constexpr float kNone = -std::numeric_limits<float>::infinity();

// A team's room in shared memory. Two neighbouring columns are read and written at once.
template <class Tile>
struct alignas(16) Board {
  float best[Tile::TEAM_WARPS][Tile::BM];  // maxima of each warp's rows
  float top[Tile::BM];                     // of all rows; NaN, which equals nothing, where that is -inf
  int place[Tile::BM];
};

struct alignas(8) Two {
  float x, y;
};

// Which team, and where in it this thread stands.
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

// s with -inf at all that is no negative; each mask costs only the warpgroups whose part of the tile it meets.
template <class Tile>
GSSF_DEVICE void only_negatives(float (&s)[kScores], const Seat<Tile>& seat, Place place, const Sweep& p) {
  const Fragment<Tile>& at = seat.fragment;
  const int i0 = (p.first + place.i) * Tile::BN, j0 = place.j * Tile::BM;
  const int own = i0 + seat.first_row();

  if (own < j0 + Tile::BM && j0 < own + Tile::ROWS) {
    const int apart = i0 - j0 - at.column0;  // of the tile's row 0 and the thread's first column
    each_score(s, at, [&](float& score, int row, int column) {
      if (row + apart == column) {
        if (i0 + row < p.N) p.pair_score[i0 + row] = score;
        score = kNone;
      }
    });
  }

  if (own + Tile::ROWS > p.N || j0 + Tile::BM > p.M) {
    const int rows = p.N - i0, columns = p.M - j0 - at.column0;
    each_score(s, at, [&](float& score, int row, int column) {
      if (row >= rows || column >= columns) score = kNone;
    });
  }

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

// The best of each of this thread's rows, into the row partials. Returns whether any is NaN.
template <class Tile>
GSSF_DEVICE bool reduce_rows(const float (&s)[kScores], const Seat<Tile>& seat, Place place, const Sweep& p) {
  const Fragment<Tile>& at = seat.fragment;
  bool nan = false;
#pragma unroll
  for (int m = 0; m < Tile::HEIGHT; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = s[at.at(m, 0, h, 0)];
#pragma unroll
      for (int g = 0; g < Tile::BM / 8; ++g)
#pragma unroll
        for (int e = 0; e < 2; ++e) top = chip::larger(top, s[at.at(m, g, h, e)]);
      top = chip::larger(top, chip::shuffle_xor(top, 1));
      top = chip::larger(top, chip::shuffle_xor(top, 2));

      int column = kNowhere;  // the lowest that holds top: from the last to the first
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
#pragma unroll
      for (int lanes = 1; lanes <= 2; lanes *= 2) {
        const int other = chip::shuffle_xor(column, lanes);
        column = other < column ? other : column;
      }

      if (seat.lane % 4 == 0) {
        const int64_t line = int64_t(place.i) * Tile::BN + at.row(m, h);
        const int64_t to = int64_t(place.j) * p.blocks * Tile::BN + line;
        p.rows.score[to] = top;
        p.rows.place[to] = static_cast<int16_t>(column);
      }
      nan |= top != top;
    }
  return nan;
}

// The maxima of the warp's rows, of every column, onto the board.
template <class Tile>
GSSF_DEVICE void columns_of_warp(const float (&s)[kScores], const Seat<Tile>& seat, Board<Tile>& board) {
  const Fragment<Tile>& at = seat.fragment;
#pragma unroll
  for (int chunk = 0; chunk < Tile::BM / 64; ++chunk) {  // eight column groups, one of which each lane ends up with
    float top[8][2];
#pragma unroll
    for (int g = 0; g < 8; ++g)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        top[g][e] = chip::larger(s[at.at(0, 8 * chunk + g, 0, e)], s[at.at(0, 8 * chunk + g, 1, e)]);
#pragma unroll
        for (int m = 1; m < Tile::HEIGHT; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) top[g][e] = chip::larger(top[g][e], s[at.at(m, 8 * chunk + g, h, e)]);
      }
#pragma unroll
    for (int half = 4; half >= 1; half /= 2) {
      const bool upper = seat.lane & 4 * half;
#pragma unroll
      for (int g = 0; g < half; ++g)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float keep = upper ? top[g + half][e] : top[g][e], give = upper ? top[g][e] : top[g + half][e];
          top[g][e] = chip::larger(keep, chip::shuffle_xor(give, 4 * half));
        }
    }
    const int column = at.column(8 * chunk + seat.lane / 4, 0);
    *reinterpret_cast<Two*>(&board.best[seat.warp][column]) = {top[0][0], top[0][1]};
  }
}

// The lowest rows that hold the columns' maxima, onto the board. Every thread marks which of its scores hit(score,
// its column's maximum), without a branch; a tile has about one hit a thread, so what follows is short.
template <class Tile, class Hit>
GSSF_DEVICE void look_for_rows(const float (&s)[kScores], const Seat<Tile>& seat, Board<Tile>& board, Hit hit) {
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

// A team's tile of scores, to its row and column partials.
template <class Tile>
GSSF_DEVICE void reduce_tile(float (&s)[kScores], const Seat<Tile>& seat, Place place, const Sweep& p,
                             Board<Tile>& board) {
  only_negatives(s, seat, place, p);
  const bool nan = reduce_rows(s, seat, place, p);
  columns_of_warp(s, seat, board);
  chip::sync(seat.barrier(), Tile::TEAM_THREADS);  // 1: every warp's maxima are there

  const int j = place.j * Tile::BM + seat.member;
  const int64_t to = int64_t(place.i) * p.M + j;
  float top = board.best[0][seat.member];
#pragma unroll
  for (int warp = 1; warp < Tile::TEAM_WARPS; ++warp) top = chip::larger(top, board.best[warp][seat.member]);
  if (j < p.M) p.cols.score[to] = top;
  board.top[seat.member] = top == kNone ? std::numeric_limits<float>::quiet_NaN() : top;
  board.place[seat.member] = kNowhere;
  const bool any_nan = chip::sync_any(seat.barrier(), Tile::TEAM_THREADS, nan);  // 2: every column's maximum is there

  if (any_nan) look_for_rows(s, seat, board, [](float score, float top) { return score == top || score != score; });
  else look_for_rows(s, seat, board, [](float score, float top) { return score == top; });
  chip::sync(seat.barrier(), Tile::TEAM_THREADS);  // 3: all have looked
  // Until barrier 1 of the next tile only `best` is written, which was last read before barrier 2; and each thread
  // reads and resets a place of its own.
  if (j < p.M) p.cols.place[to] = static_cast<int16_t>(board.place[seat.member]);
}

}  // namespace gssf::hopper
