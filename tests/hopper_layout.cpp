// The arithmetic of csrc/cuda/*_layout.h against brute force. Prints what is wrong; exit status 1 if anything is.
#include "../csrc/cuda/hardest_layout.h"
#include "../csrc/cuda/log_sums_layout.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <set>
#include <utility>
#include <vector>

using namespace gssf::hopper;

namespace {

int wrong = 0;

void check(bool right, const char* what) {
  if (!right && ++wrong < 20) std::printf("wrong: %s\n", what);
}

void every_tile_once() {
  for (int blocks : {1, 2, 7, 8, 9, 16, 29})
    for (int columns : {1, 2, 5, 33}) {
      std::set<std::pair<int, int>> seen;
      for (int number = 0; number < blocks * columns; ++number) {
        const Place place = tile_place(number, blocks, columns);
        check(place.i >= 0 && place.i < blocks && place.j >= 0 && place.j < columns, "a tile outside the slab");
        seen.insert({place.i, place.j});
      }
      check(int(seen.size()) == blocks * columns, "a tile that is left out");
    }
}

template <int STAGES>
void ring() {
  std::vector<uint32_t> uses(STAGES);
  Ring<STAGES> walking(0);
  for (uint32_t step = 0; step < 100; ++step, walking.next()) {
    const Ring<STAGES> jumped(step);
    check(jumped.stage == walking.stage && jumped.parity == walking.parity,
          "a ring that jumps elsewhere than it walks");
    check(walking.parity == uses[walking.stage]++ % 2, "the parity of a stage's use");
  }
}

template <class Tile>
void every_score_once() {
  std::vector<int> holders(Tile::BN * Tile::BM);
  for (int warp = 0; warp < Tile::TEAM_WARPS; ++warp)
    for (int lane = 0; lane < kWarp; ++lane) {
      const Fragment<Tile> at(warp, lane);
      for (int m = 0; m < Tile::HEIGHT; ++m)
        for (int g = 0; g < Tile::BM / 8; ++g)
          for (int h = 0; h < 2; ++h)
            for (int e = 0; e < 2; ++e) {
              const int k = at.at(m, g, h, e);
              check(k >= 0 && k < kScores, "a register that is none");
              check(at.row_of(k) == at.row(m, h) && at.column_of(k) == at.column(g, e), "a register's way back");
              ++holders[at.row(m, h) * Tile::BM + at.column(g, e)];
              // A warpgroup's rows are those its wgmma sums: 64 from a multiple of 64, 16 of them to each warp.
              const int group = warp / 4, first = Tile::HEIGHT == 1 ? 64 * group : 64 * m;
              check(at.row(m, h) / 16 == first / 16 + warp % 4, "a row of another warp");
            }
    }
  for (int count : holders) check(count == 1, "a score that not exactly one thread holds");
}

// Where a copy with 128-byte swizzle puts byte `byte` of row r: 16-byte pieces of a row change places by the row's
// number modulo 8 (CUDA driver API, CU_TENSOR_MAP_SWIZZLE_128B).
uint32_t copied_to(uint32_t stage, int r, int byte) {
  return stage + r * 128 + ((byte / 16) ^ (r % 8)) * 16 + byte % 16;
}

// Where wgmma reads row r, channel k of an operand (PTX ISA, matrix descriptor): plain address, then the swizzle.
uint32_t read_from(uint64_t descriptor, int r, int k) {
  const uint32_t start = (descriptor & 0x3FFF) * 16, distance = (descriptor >> 32 & 0x3FFF) * 16;
  const uint32_t plain = start + r / 8 * distance + r % 8 * 128 + k * 2;
  return plain ^ (plain >> 7 & 7) << 4;
}

void operands() {
  for (uint32_t stage : {0u, 1024u, 16384u, 196608u})
    for (int first_row : {0, 64}) {
      const uint64_t base = operand(stage + first_row * kRowBytes);
      check(base >> 62 == 1 && (base & ~(0x3FFFull | 0x3FFFull << 32 | 3ull << 62)) == 0, "the descriptor's fields");
      for (int step = 0; step < kDepth / kInstruction; ++step)
        for (int r = 0; r < 64; ++r)
          for (int k = 0; k < kInstruction; ++k)
            check(read_from(base + step * kOperandStep, r, k) ==
                      copied_to(stage, first_row + r, (step * kInstruction + k) * 2),
                  "an operand read from elsewhere than it was copied to");
    }
}

void merging() {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  const float values[] = {-inf, -1, 0, 1, inf, nan};
  std::srand(1);
  for (int round = 0; round < 20000; ++round) {
    const int parts = 1 + std::rand() % 11, width = 4, lines = 3, line = std::rand() % lines, start = 100;
    std::vector<float> score(parts * lines);
    std::vector<int16_t> place(parts * lines);
    const int kinds = round % 2 ? 6 : 3;
    for (auto& s : score) s = values[std::rand() % kinds];
    for (auto& at : place) at = std::rand() % width;
    Best truth{-inf, -1};  // the first of the largest, a NaN above all, nothing where all is -inf
    for (int p = 0; p < parts; ++p) {
      const float s = score[p * lines + line];
      const bool better = std::isnan(truth.score) ? false : std::isnan(s) || s > truth.score;
      if (better) truth = {s, start + p * width + place[p * lines + line]};
    }
    const int cut = std::rand() % (parts + 1);  // folding two sections apart, then both, is the same
    const Partials partials{score.data(), place.data()};
    Best found = fold({-inf, -1}, partials, line, lines, 0, cut, width, start);
    const Best later = fold({-inf, -1}, partials, line, lines, cut, parts, width, start);
    if (beats(later.score, found.score)) found = later;
    const bool same = found.score == truth.score || (std::isnan(found.score) && std::isnan(truth.score));
    check(same && found.index == truth.index, "a merge");
  }
}

// Of numbers in any grouping; what float rounds is left open by a part in 10⁵.
void log_sums() {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  const float values[] = {-inf, -1e30f, -90, -1, 0, 2.5f, 300, inf, nan};
  const auto exponential = [](float x) { return std::exp(x); };
  std::srand(1);
  for (int round = 0; round < 20000; ++round) {
    const int count = std::rand() % 9, kinds = round % 3 == 0 ? 9 : 7;
    std::vector<LogSum> parts;
    float top = -inf;
    double sum = 0;
    bool any_nan = false;
    std::vector<float> numbers(count);
    for (float& t : numbers) {
      t = values[std::rand() % kinds];
      any_nan |= std::isnan(t);
      const float own = std::isnan(t) ? inf : t;  // as the epilogue has it of one number
      top = own > top ? own : top;
      parts.push_back({own, own == -inf ? 0 : std::isinf(own) ? std::exp(t) : 1});
    }
    for (float t : numbers) sum += std::exp(std::isinf(top) ? double(t) : double(t) - top);
    while (parts.size() > 1) {  // two neighbours at a time
      const size_t at = std::rand() % (parts.size() - 1);
      parts[at] = join_logs(parts[at], parts[at + 1], exponential);
      parts.erase(parts.begin() + at + 1);
    }
    const LogSum found = parts.empty() ? LogSum{-inf, 0} : parts[0];
    check(found.top == top, "the largest of merged log-sums");
    if (any_nan) check(std::isnan(found.sum), "a NaN that a merge of log-sums loses");
    else if (top == inf) check(found.sum == inf, "an infinity that a merge of log-sums loses");
    else check(std::abs(found.sum - sum) <= 1e-5 * sum, "a merge of log-sums");
  }
}

void ranges() {
  for (int64_t a = 0; a < 4; ++a)
    for (int64_t b = a; b < 4; ++b)
      for (int64_t c = 0; c < 4; ++c)
        for (int64_t d = c; d < 4; ++d) {
          bool share = false;
          for (int64_t x = a; x <= b; ++x) share |= c <= x && x <= d;
          check(overlap({a, b}, {c, d}) == share && overlap({c, d}, {a, b}) == share, "an overlap of ranges");
        }
}

}  // namespace

int main() {
  every_tile_once();
  ring<Cooperative::STAGES>();
  ring<Pingpong::STAGES>();
  every_score_once<Cooperative>();
  every_score_once<Pingpong>();
  operands();
  merging();
  log_sums();
  ranges();
  if (!wrong) std::printf("tiles, ring, fragments, operands, merging, log-sums and ranges agree with brute force\n");
  return wrong ? 1 : 0;
}
