// Merges the partials of a slab's sweep: a row's over all column blocks, a column's over all row blocks and the results
// of earlier slabs.
#pragma once

#include "sweep_tile.h"

namespace gssf::hopper {

constexpr int kSections = 8;  // of an anchor's partials, merged by one warp each

// The 32 anchors of a block: rows of the slab or, from block row_grid on, columns.
struct Lines {
  Area area;
  int BN, BM, row_grid, grid;

  template <class Tile>
  static Lines of(Tile, const Area& area) {
    const int64_t rows = ceil_div(int64_t(area.blocks) * Tile::BN, kWarp);
    return {area, Tile::BN, Tile::BM, static_cast<int>(rows), static_cast<int>(rows + ceil_div(area.M, kWarp))};
  }
};

template <class Result>
struct Sections {
  Result of[kSections][kWarp];
};

// Merge: Lines with a Result that starts as nothing(), fold(of_rows, line, lines, begin, end) of partials,
// join(earlier, later), before(j) of earlier slabs, and write_row(i, result), write_column(j, result).
template <class Merge>
GSSF_KERNEL(kWarp* kSections)
merge_kernel(GSSF_GRID Merge p) {
  using Result = typename Merge::Result;
  Sections<Result>& shared = chip::shared_memory<Sections<Result>>();
  const Area& area = p.area;
  const bool of_rows = chip::block() < p.row_grid;
  const int lane = chip::thread() % kWarp, section = chip::thread() / kWarp;
  const int64_t line = int64_t(of_rows ? chip::block() : chip::block() - p.row_grid) * kWarp + lane;
  const int64_t lines = of_rows ? int64_t(area.blocks) * p.BN : area.M;
  const int parts = of_rows ? area.columns : area.blocks;

  const int each = static_cast<int>(ceil_div(parts, kSections));
  const int begin = section * each, end = begin + each < parts ? begin + each : parts;
  shared.of[section][lane] = line < lines ? p.fold(of_rows, line, lines, begin, end) : p.nothing();
  chip::sync_block();
  if (section > 0 || line >= lines) return;

  Result result = !of_rows && area.first > 0 ? p.before(line) : p.nothing();
#pragma unroll
  for (int k = 0; k < kSections; ++k) result = p.join(result, shared.of[k][lane]);
  const int64_t i = int64_t(area.first) * p.BN + line;
  if (!of_rows) p.write_column(line, result);
  else if (i < area.N) p.write_row(i, result);
}

}  // namespace gssf::hopper
