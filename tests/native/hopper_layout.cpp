// The arithmetic of csrc/cuda/*_layout.h: tiles, ring, fragments, descriptors and merging.
#include "cuda/hardest_layout.h"
#include "cuda/log_sums_layout.h"

#include "bindings.h"

#include <cmath>

using namespace gssf::hopper;

namespace {

// Stage and parity of every step, by walking the ring from 0 and by going to each step at once: [steps, 2, 2] flat.
template <class Tile>
py::object ring(uint32_t steps) {
  std::vector<int64_t> places;
  Ring<Tile::STAGES> walking(0);
  for (uint32_t step = 0; step < steps; ++step, walking.next()) {
    const Ring<Tile::STAGES> jumped(step);
    for (const auto& at : {walking, jumped}) places.push_back(at.stage), places.push_back(at.parity);
  }
  return array(places);
}

// Where the registers of a team's threads lie: [warps, lanes, accumulators, groups of 8 columns, 2, 2] times
// (register, row, column, row by the register, column by the register), flat.
template <class Tile>
py::object fragments() {
  std::vector<int64_t> places;
  for (int warp = 0; warp < Tile::TEAM_WARPS; ++warp)
    for (int lane = 0; lane < kWarp; ++lane) {
      const Fragment<Tile> fragment(warp, lane);
      for (int m = 0; m < Tile::HEIGHT; ++m)
        for (int g = 0; g < Tile::BM / 8; ++g)
          for (int h = 0; h < 2; ++h)
            for (int e = 0; e < 2; ++e) {
              const int k = fragment.at(m, g, h, e);
              for (const int place :
                   {k, fragment.row(m, h), fragment.column(g, e), fragment.row_of(k), fragment.column_of(k)})
                places.push_back(place);
            }
    }
  return array(places);
}

template <class Tile>
void bind_shape(py::module_& layout, const char* name) {
  py::module_ shape = layout.def_submodule(name);
  shape.attr("BN") = int(Tile::BN);
  shape.attr("BM") = int(Tile::BM);
  shape.attr("STAGES") = int(Tile::STAGES);
  shape.attr("HEIGHT") = int(Tile::HEIGHT);
  shape.attr("TEAM_WARPS") = int(Tile::TEAM_WARPS);
  shape.def("ring", ring<Tile>);
  shape.def("fragments", fragments<Tile>);
}

using Pair = std::pair<float, int>;

// best, folded with parts [begin, end) of a line of score and place [parts, lines].
Pair fold_parts(Pair best, const py::array& score, const py::array& place, int64_t line, int begin, int end, int width,
                int start) {
  const int64_t lines = score.shape(1);
  expect(0 <= line && line < lines && 0 <= begin && end <= score.shape(0), "line, begin, end: outside of score");
  const Partials partials{const_cast<float*>(read<float>("score", score, score.size())),
                          const_cast<int16_t*>(read<int16_t>("place", place, score.size()))};
  const Best folded = fold({best.first, best.second}, partials, line, lines, begin, end, width, start);
  return {folded.score, folded.index};
}

std::pair<float, float> join(std::pair<float, float> x, std::pair<float, float> y) {
  const LogSum joined =
      join_logs({x.first, x.second}, {y.first, y.second}, [](float exponent) { return std::exp(exponent); });
  return {joined.top, joined.sum};
}

}  // namespace

void bind_hopper_layout(py::module_& internals) {
  py::module_ layout = internals.def_submodule("hopper_layout");
  layout.attr("kDepth") = kDepth;
  layout.attr("kInstruction") = kInstruction;
  layout.attr("kScores") = kScores;
  layout.attr("kOperandStep") = kOperandStep;
  layout.def("tile_place", [](int number, int blocks, int columns) {
    const Place place = tile_place(number, blocks, columns);
    return std::pair(place.i, place.j);
  });
  layout.def("operand", operand);
  layout.def("beats", beats);
  layout.def("fold", fold_parts, py::arg("best"), py::arg("score"), py::arg("place"), py::kw_only(), py::arg("line"),
             py::arg("begin"), py::arg("end"), py::arg("width"), py::arg("start"));
  layout.def("join_logs", join);
  layout.def("overlap", [](std::pair<int64_t, int64_t> x, std::pair<int64_t, int64_t> y) {
    return overlap({x.first, x.second}, {y.first, y.second});
  });
  bind_shape<Cooperative>(layout, "Cooperative");
  bind_shape<Pingpong>(layout, "Pingpong");
}
