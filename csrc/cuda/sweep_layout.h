// The layout of the Hopper sweep: tiles, stages, fragments, descriptors. Plain arithmetic, compiled for the card and
// for the CPU, where tests/native/test_hopper_layout.py compares it with brute force.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GSSF_BOTH __host__ __device__ __forceinline__
#else
#define GSSF_BOTH inline
#endif

namespace gssf::hopper {

enum class Number { bf16, fp16 };

constexpr int kWarp = 32, kWarpgroup = 128;
constexpr int kDepth = 64;        // channels in a stage: 128 bytes, as wide as the swizzle
constexpr int kRowBytes = 128;    // of a row of a stage
constexpr int kInstruction = 16;  // channels that one wgmma sums over
constexpr int kScores = 128;      // scores of a tile in the registers of each thread

GSSF_BOTH constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// A team of warpgroups computes a tile of scores [BN, BM]; teams take the tiles of a block in turn. With one team, both
// warpgroups multiply together, each for half of the rows. With two, one multiplies while the other reduces.
template <int COLUMNS, int STAGES_, int TEAMS_>
struct Shape {
  static constexpr int BN = 128, BM = COLUMNS, STAGES = STAGES_, TEAMS = TEAMS_;
  static constexpr int CONSUMERS = 2;               // warpgroups that multiply; another one loads
  static constexpr int GROUPS = CONSUMERS / TEAMS;  // warpgroups in a team
  static constexpr int HEIGHT = BN / 64 / GROUPS;   // wgmma tiles of 64 rows that a warpgroup holds
  static constexpr int ROWS = 64 * HEIGHT;          // rows of a warpgroup
  static constexpr int TEAM_THREADS = GROUPS * kWarpgroup, TEAM_WARPS = TEAM_THREADS / kWarp;
  static constexpr int THREADS = (CONSUMERS + 1) * kWarpgroup;
  static constexpr int STAGE_BYTES = (BN + BM) * kRowBytes;
  static_assert(HEIGHT * BM / 2 == kScores && TEAM_THREADS == BM, "128 scores a thread, one thread a column");
};

using Cooperative = Shape<256, 4, 1>;  // many channels: the largest tile, fewest bytes a product
using Pingpong = Shape<128, 6, 2>;     // few channels: reducing takes as long as multiplying, so both go on at once

constexpr int kCooperativeDepth = 512;  // channels from which on the tile is the cooperative one

// Row block (within the slab) and column block of a tile. Groups of 8 row blocks are visited column by column, so that
// what the card works on at one time stays in L2.
struct Place {
  int i, j;
};

constexpr int kRaster = 8;

GSSF_BOTH Place tile_place(int number, int blocks, int columns) {
  const int group = number / (kRaster * columns), within = number % (kRaster * columns);
  const int left = blocks - group * kRaster, height = left < kRaster ? left : kRaster;
  return {group * kRaster + within % height, within / height};
}

// The ring of stages. Step n, counted over all tiles of a block, uses stage n % STAGES for the (n / STAGES)-th time,
// and an mbarrier's phase has the parity of that count.
template <int STAGES>
struct Ring {
  int stage;
  uint32_t parity;

  GSSF_BOTH explicit Ring(uint32_t step) : stage(step % STAGES), parity(step / STAGES & 1) {}

  GSSF_BOTH void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// The places of a thread's scores in its tile. `warp` counts within the team. Register k holds the score at (row(k),
// column(k)): that is how wgmma leaves an accumulator of 64 x BM to a warpgroup (PTX ISA, register fragments of wgmma
// m64nNk16), one such accumulator after another.
template <class Tile>
struct Fragment {
  int row0, column0;

  GSSF_BOTH Fragment(int warp, int lane) : row0(16 * warp + lane / 4), column0(2 * (lane % 4)) {}

  // Register of accumulator m, column group g of 8, row half h, and column e of the two next to each other.
  GSSF_BOTH static constexpr int at(int m, int g, int h, int e) { return m * (Tile::BM / 2) + 4 * g + 2 * h + e; }

  GSSF_BOTH int row(int m, int h) const { return row0 + 64 * m + 8 * h; }
  GSSF_BOTH int column(int g, int e) const { return column0 + 8 * g + e; }

  GSSF_BOTH int row_of(uint32_t k) const { return row(k / (Tile::BM / 2), k / 2 % 2); }
  GSSF_BOTH int column_of(uint32_t k) const { return column(k / 4 % (Tile::BM / 8), k % 2); }
};

// The descriptor by which wgmma finds an operand in shared memory: rows of 128 bytes, channels adjacent, swizzled by
// 128 bytes as the tensor map says. Bits 0-13: address; 32-45: distance of groups of 8 rows, 1024 bytes; 62-63: the
// swizzle, 1 for 128 bytes; addresses and distances in units of 16 bytes. The leading distance (16-29) is not read with
// this swizzle, and the base offset (49-51) is 0 because stages start on 1024 bytes.
GSSF_BOTH uint64_t operand(uint32_t shared_address) {
  constexpr uint64_t distance = 8 * kRowBytes / 16, swizzle = 1;
  return (shared_address & 0x3FFFF) >> 4 | distance << 32 | swizzle << 62;
}

// What to add to a descriptor for 16 channels further on: 32 bytes, inside the 128 that are swizzled. The hardware
// swizzles the address it has computed, so the step is taken in plain addresses.
constexpr uint64_t kOperandStep = kInstruction * 2 / 16;

}  // namespace gssf::hopper
