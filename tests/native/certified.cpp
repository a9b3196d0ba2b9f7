// What certifies mining: rounded sides, the bound of a score's error, candidates, and the choice among exact scores.
//
// The two sources are compiled in here, as they need the same headers of ATen, most of the time that this file takes.
#define GSSF_KERNELS "vector_epilogues.h"
#include "bf16.cpp"
#include "factors.cpp"

#include "best.h"

#include "bindings.h"

using namespace gssf;

namespace {

at::Tensor tensor(const py::array& x) {
  expect(x.ndim() == 2 && (x.flags() & py::array::c_style), "expected a contiguous matrix");
  const bool bf16 = is_of<c10::BFloat16>(x);
  expect(is_of<float>(x) || is_of<c10::Half>(x) || bf16, "expected float32, float16 or the bits of bfloat16");
  const auto type = is_of<float>(x) ? at::kFloat : bf16 ? at::kBFloat16 : at::kHalf;
  return at::from_blob(const_cast<void*>(x.data()), {x.shape(0), x.shape(1)}, type);
}

// (bits of bf16 [N, padded] flat, ‖x‖ of every row, ‖x - rounded‖ of every row, the last two never too small)
py::object rounded_rows(const py::array& x) {
  const Bf16Panels factors(tensor(x), tensor(x));
  const Rounded& side = factors.a();
  return py::make_tuple(
      array(reinterpret_cast<const uint16_t*>(side.values.const_data_ptr<at::BFloat16>()), side.values.numel()),
      array(side.norm), array(side.residue));
}

Rounded norms(const py::array& norm, const py::array& residue) {
  const int64_t count = norm.size();
  const float *of = read<float>("norm", norm, count), *lost = read<float>("residue", residue, count);
  return {at::Tensor(), {of, of + count}, {lost, lost + count}};
}

// Bounds [lines, blocks] flat, and whether no sum leaves fp32's range.
py::object error_bounds(const py::array& norm, const py::array& residue, const py::array& other_norm,
                        const py::array& other_residue, int64_t block_most, int64_t depth) {
  const Rounded lines = norms(norm, residue), others = norms(other_norm, other_residue);
  const Blocks blocks(other_norm.size(), block_most);
  const ErrorBound error(lines, others, blocks, depth);
  std::vector<double> bounds;
  for (int64_t line = 0; line < norm.size(); ++line)
    for (int64_t block = 0; block < blocks.count; ++block) bounds.push_back(error.of(line, block));
  return py::make_tuple(array(bounds), blocks.size, error.sums_are_finite());
}

// What certified mining sees, flat: ŝ [N, M] of the processor's bf16 unit, its bounds of |s - ŝ| for rows, for columns.
py::object rounded_scores(const py::array& a, const py::array& b) {
  const Blocks rows(a.shape(0), kTileMost), cols(b.shape(0), tile_cols(b.shape(0)));
  const Bf16Panels factors(tensor(a), tensor(b));
  const ErrorBound row_error(factors.a(), factors.b(), cols, factors.depth());
  const ErrorBound col_error(factors.b(), factors.a(), rows, factors.depth());
  const at::Tensor tile = at::empty({kTileMost, kTileMost}, at::kFloat);
  const float* s = tile.const_data_ptr<float>();
  std::vector<float> score(rows.total * cols.total);
  std::vector<double> row_bound(score.size()), col_bound(score.size());
  for (int64_t block_i = 0; block_i < rows.count; ++block_i)
    for (int64_t block_j = 0; block_j < cols.count; ++block_j) {
      const Tile at{rows.begin(block_i), rows.length(block_i), cols.begin(block_j), cols.length(block_j)};
      factors.tile(at, tile.mutable_data_ptr<float>());
      for (int64_t i = 0; i < at.n; ++i)
        for (int64_t j = 0; j < at.m; ++j) {
          const int64_t place = (at.i0 + i) * cols.total + at.j0 + j;
          score[place] = s[i * kTileMost + j];
          row_bound[place] = row_error.of(at.i0 + i, block_j);
          col_bound[place] = col_error.of(at.j0 + j, block_i);
        }
    }
  factors.leave_thread();
  return py::make_tuple(array(score), array(row_bound), array(col_bound));
}

// The tiles of a sweep over `total_rows` by `total_cols` scores: each (i0, n, j0, m).
std::vector<Tile> tiles_of(const Blocks& rows, const Blocks& cols) {
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t j = 0; j < cols.count; ++j)
      tiles.push_back({rows.begin(i), rows.length(i), cols.begin(j), cols.length(j)});
  return tiles;
}

int64_t tile_count(int64_t n, int64_t m) {
  return int64_t(tiles_of(Blocks(n, kTileMost), Blocks(m, tile_cols(m))).size());
}

// What is left of `scores` [N, M], which stand for the bf16 unit's, once the tiles went through in `order`; ids: of
// rows, and of columns with a vector's worth of -1 behind them, or none; limits of rows, and of columns, or none.
// (given up, i, j, score) of the candidates.
py::object candidates(const py::array& a, const py::array& b, const py::array& scores,
                      const std::vector<int32_t>& row_id, const std::vector<int32_t>& col_id,
                      const std::vector<int64_t>& order, const std::optional<py::array>& row_limit,
                      const std::optional<py::array>& col_limit) {
  const int64_t n = a.shape(0), m = b.shape(0);
  const Blocks rows(n, kTileMost), cols(m, tile_cols(m));
  const std::vector<Tile> tiles = tiles_of(rows, cols);
  const float* from = read<float>("scores", scores, n * m);
  expect(row_id.empty() == col_id.empty() &&
             (row_id.empty() || (int64_t(row_id.size()) == n && int64_t(col_id.size()) >= m + 16)),
         "row_id, col_id: expected ids of all rows and columns, and 16 behind those");
  const Bf16Panels factors(tensor(a), tensor(b));
  const Limits<float> limits{read<float>("row_limit", row_limit, n), read<float>("col_limit", col_limit, m)};
  Candidates kept(factors, rows, cols, row_id, col_id, true, true, limits);
  std::vector<float> s(kTileMost * kTileMost);
  for (const int64_t number : order) {
    const Tile tile = tiles.at(number);
    for (int64_t i = 0; i < tile.n; ++i)
      std::copy_n(from + (tile.i0 + i) * m + tile.j0, tile.m, s.data() + i * kTileMost);
    Candidates::Slot slot;
    kept.tile(s.data(), tile, slot);
  }
  std::vector<int32_t> i, j;
  std::vector<float> score;
  for (const auto& candidate : kept.left())
    i.push_back(candidate.i), j.push_back(candidate.j), score.push_back(candidate.score);
  return py::make_tuple(kept.given_up(), array(i), array(j), array(score));
}

// The same for the k best: (given up, (anchors, candidates) of rows, of columns). Rows and columns of equal place are
// left out with `self`.
py::object best_candidates(const py::array& a, const py::array& b, const py::array& scores, int64_t k, bool self,
                           const std::vector<int64_t>& order, const std::optional<py::array>& row_limit) {
  const int64_t n = a.shape(0), m = b.shape(0);
  const Blocks rows(n, kTileMost), cols(m, tile_cols(m));
  const std::vector<Tile> tiles = tiles_of(rows, cols);
  const float* from = read<float>("scores", scores, n * m);
  const Bf16Panels factors(tensor(a), tensor(b));
  const std::vector<int32_t> no_ids;
  CandidatesOfAnchors of_rows(n, k), of_cols(m, k);
  BestCandidates kept(factors, rows, cols, {no_ids, no_ids, self}, read<float>("row_limit", row_limit, n), of_rows,
                      &of_cols);
  std::vector<float> s(kTileMost * kTileMost);
  for (const int64_t number : order) {
    const Tile tile = tiles.at(number);
    for (int64_t i = 0; i < tile.n; ++i)
      std::copy_n(from + (tile.i0 + i) * m + tile.j0, tile.m, s.data() + i * kTileMost);
    BestCandidates::Slot slot;
    kept.tile(s.data(), tile, slot);
  }
  const auto left = [](CandidatesOfAnchors& candidates) {
    std::vector<int32_t> anchors, others;
    for (int64_t anchor = 0; anchor < candidates.anchors(); ++anchor)
      for (const auto& candidate : candidates.left(anchor))
        anchors.push_back(static_cast<int32_t>(anchor)), others.push_back(candidate.index);
    return py::make_tuple(array(anchors), array(others));
  };
  return py::make_tuple(kept.given_up(), left(of_rows), left(of_cols));
}

std::pair<double, int64_t> exact_best(const std::vector<double>& scores, const std::vector<int64_t>& indices) {
  ExactMaximum best;
  for (size_t k = 0; k < scores.size(); ++k) best.add(scores[k], indices.at(k));
  return {best.score, best.index};
}

}  // namespace

void bind_certified(py::module_& internals) {
  py::module_ certified = internals.def_submodule("certified");
  certified.def("rounded_rows", rounded_rows);
  certified.def("error_bounds", error_bounds, py::arg("norm"), py::arg("residue"), py::arg("other_norm"),
                py::arg("other_residue"), py::kw_only(), py::arg("block_most"), py::arg("depth"));
  certified.def("rounded_scores", rounded_scores);
  certified.def("tile_count", tile_count);
  certified.def("candidates", candidates, py::arg("a"), py::arg("b"), py::arg("scores"), py::arg("row_id"),
                py::arg("col_id"), py::arg("order"), py::arg("row_limit") = py::none(),
                py::arg("col_limit") = py::none());
  certified.def("best_candidates", best_candidates, py::arg("a"), py::arg("b"), py::arg("scores"), py::arg("k"),
                py::arg("self"), py::arg("order"), py::arg("row_limit") = py::none());
  certified.def("exact_best", exact_best);
}
