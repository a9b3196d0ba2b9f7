// The sweep over s = a bᵀ, which is never stored: one warpgroup loads, two multiply and reduce, and each block computes
// its share of the tiles one after another. The epilogue is the Task's: an Area with a Board<Tile> in shared memory and
// a reduce_tile(s, seat, place, task, board).
//
//     copy engine ──full[stage]──▶ wgmma, sums in registers ──▶ reduce_tile (*_epilogue.h) ──▶ partials
//          ▲───────empty[stage]──────────┘
//
// full[stage]: one arrival (the loader's) and STAGE_BYTES per phase. empty[stage]: one arrival per warp of a team.
// turn[team], with two teams: one arrival per thread of the other team, once the products of its tile are issued.
#pragma once

#include "sweep_tile.h"

namespace gssf::hopper {

template <class Tile, class Task>
struct Shared {
  uint16_t a[Tile::STAGES][Tile::BN * kDepth];  // every stage starts on 1024 bytes
  uint16_t b[Tile::STAGES][Tile::BM * kDepth];
  typename Task::template Board<Tile> board[Tile::TEAMS];
  chip::Barrier full[Tile::STAGES], empty[Tile::STAGES], turn[2];
};

// Registers of a thread that loads and of one that multiplies; they start with what launch bounds leave, 168.
constexpr int kLoaderRegisters = 40, kConsumerRegisters = 232;
static_assert(kLoaderRegisters + 2 * kConsumerRegisters <= 3 * 168, "warpgroups exchange registers, and get no others");

// The tiles of this block, in order: f(tile's number in the block, its place).
template <class F>
GSSF_DEVICE void each_tile(const Area& p, int first, int step, F f) {
  for (int k = first;; k += step) {
    const int64_t number = chip::block() + int64_t(k) * chip::blocks();
    if (number >= int64_t(p.blocks) * p.columns) return;
    f(k, tile_place(static_cast<int>(number), p.blocks, p.columns));
  }
}

// One thread keeps the ring full.
template <class Tile, class Task>
GSSF_DEVICE void load_tiles(const chip::TensorMap& a, const chip::TensorMap& b, const Area& p,
                            Shared<Tile, Task>& shared) {
  Ring<Tile::STAGES> ring(0);
  each_tile(p, 0, 1, [&](int, Place place) {
    for (int channel = 0; channel < p.D; channel += kDepth, ring.next()) {
      chip::wait(&shared.empty[ring.stage], ring.parity ^ 1);  // passes at once the first time round
      chip::arrive_expecting(&shared.full[ring.stage], Tile::STAGE_BYTES);
      chip::load(shared.a[ring.stage], a, (p.first + place.i) * Tile::BN, channel, &shared.full[ring.stage]);
      chip::load(shared.b[ring.stage], b, place.j * Tile::BM, channel, &shared.full[ring.stage]);
    }
  });
}

// The products of one stage. s holds HEIGHT accumulators of 64 x BM.
template <Number NUMBER, class Tile, int M = 0>
GSSF_DEVICE void multiply_stage(float (&s)[kScores], uint64_t a, uint64_t b, bool add) {
  if constexpr (M < Tile::HEIGHT) {
#pragma unroll
    for (int k = 0; k < kDepth / kInstruction; ++k)
      chip::multiply<NUMBER, Tile::BM, M * Tile::BM / 2>(s, a + k * kOperandStep, b + k * kOperandStep, add || k > 0);
    multiply_stage<NUMBER, Tile, M + 1>(s, a + 64 * kRowBytes / 16, b, add);
  }
}

// The sums over all channels of this warpgroup's rows of a tile, whose first stage is step `step` of the block.
// `issued` is called once nothing is left to issue.
template <Number NUMBER, class Tile, class Task, class F>
GSSF_DEVICE void multiply_tile(float (&s)[kScores], Shared<Tile, Task>& shared, const Seat<Tile>& seat, uint32_t step,
                               int steps, F issued) {
  const auto release = [&](int stage) {
    if (seat.lane == 0) chip::arrive(&shared.empty[stage]);
  };
  Ring<Tile::STAGES> ring(step);
  int before = 0;  // the stage whose products are still running
  for (int k = 0; k < steps; ++k) {
    chip::wait(&shared.full[ring.stage], ring.parity);
    chip::begin_products();
    multiply_stage<NUMBER, Tile>(s, operand(chip::address(&shared.a[ring.stage][seat.first_row() * kDepth])),
                                 operand(chip::address(shared.b[ring.stage])), k > 0);
    chip::commit_products();
    chip::all_but_one_over();
    if (k > 0) release(before);
    before = ring.stage;
    ring.next();
  }
  issued();
  chip::finish_products(s);
  release(before);
}

template <Number NUMBER, class Tile, class Task>
GSSF_DEVICE void reduce_tiles(const Task& p, Shared<Tile, Task>& shared) {
  const Seat<Tile> seat(chip::thread() - kWarpgroup);
  const int steps = static_cast<int>(ceil_div(p.D, kDepth));
  each_tile(p, seat.team, Tile::TEAMS, [&](int k, Place place) {
    // Teams multiply in turn: the tensor cores have one tile's products at a time, and no team waits for a stage that
    // is farther than one phase away (a parity cannot tell those apart). The first turn is team 0's.
    const uint32_t parity = k / Tile::TEAMS & 1;
    if (Tile::TEAMS == 2) chip::wait(&shared.turn[seat.team], seat.team == 0 ? parity ^ 1 : parity);
    float s[kScores];
    multiply_tile<NUMBER>(s, shared, seat, static_cast<uint32_t>(k) * steps, steps, [&] {
      if (Tile::TEAMS == 2) chip::arrive(&shared.turn[1 - seat.team]);
    });
    reduce_tile(s, seat, place, p, shared.board[seat.team]);
  });
}

// Grid: at most as many blocks as the card has processors. a and b: boxes of 64 channels by BN rows, and by BM.
template <Number NUMBER, class Tile, class Task>
GSSF_KERNEL(Tile::THREADS)
sweep_kernel(GSSF_GRID chip::TensorMap a, GSSF_GRID chip::TensorMap b, GSSF_GRID Task p) {
  Shared<Tile, Task>& shared = chip::shared_memory<Shared<Tile, Task>>();
  if (chip::thread() == 0) {
    chip::prefetch(a);
    chip::prefetch(b);
    for (int stage = 0; stage < Tile::STAGES; ++stage) {
      chip::init(&shared.full[stage], 1);
      chip::init(&shared.empty[stage], Tile::TEAM_WARPS);
    }
    for (int team = 0; team < 2; ++team) chip::init(&shared.turn[team], Tile::TEAM_THREADS);
    chip::publish_barriers();
  }
  chip::sync_block();

  if (chip::thread() < kWarpgroup) {
    chip::keep_registers<kLoaderRegisters>();
    if (chip::thread() == 0) load_tiles(a, b, p, shared);
  } else {
    chip::take_registers<kConsumerRegisters>();
    reduce_tiles<NUMBER>(p, shared);
  }
}

}  // namespace gssf::hopper
