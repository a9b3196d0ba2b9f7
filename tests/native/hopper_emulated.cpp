// The ops of csrc/cuda, their sources on the card of hopper_emulator.h, on CPU tensors: torch.ops.gssf_emulated, as of
// the module's import.
#pragma GCC optimize("O3")  // it computes for longer than it compiles
#include "hopper_emulator.h"

#include "cuda/hardest_launch.h"
#include "cuda/log_sums_launch.h"

#include <torch/csrc/stable/library.h>

#include "bindings.h"

namespace gssf::hopper {

// As in hopper_hardest.cu, which the two sources compile apart.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hopper_sweep(const Tensor& a, const Tensor& b,
                                                                const std::optional<Tensor>& a_ids,
                                                                const std::optional<Tensor>& b_ids, bool log_sums,
                                                                const std::optional<Tensor>& scale, double constant) {
  return log_sums ? logsumexp_scores_hopper(a, b, scale, constant) : hardest_negatives_hopper(a, b, a_ids, b_ids);
}

// The same in slabs of two row blocks.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> in_slabs(const Tensor& a, const Tensor& b,
                                                            const std::optional<Tensor>& a_ids,
                                                            const std::optional<Tensor>& b_ids) {
  return hardest_negatives(a, b, a_ids, b_ids, Limits{0, 2});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> log_sums_in_slabs(const Tensor& a, const Tensor& b,
                                                                     const std::optional<Tensor>& scale,
                                                                     double constant) {
  return logsumexp_scores(a, b, scale, constant, Limits{0, 2});
}

}  // namespace gssf::hopper

STABLE_TORCH_LIBRARY(gssf_emulated, library) {
  for (const char* schema :
       {"hardest_negatives_hopper(Tensor a, Tensor b, Tensor? a_ids, Tensor? b_ids) -> (Tensor, Tensor, Tensor, "
        "Tensor, Tensor)",
        "hopper_sweep(Tensor a, Tensor b, Tensor? a_ids, Tensor? b_ids, bool log_sums, Tensor? scale, float constant) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        "in_slabs(Tensor a, Tensor b, Tensor? a_ids, Tensor? b_ids) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        "logsumexp_scores_hopper(Tensor a, Tensor b, Tensor? scale, float constant) -> (Tensor, Tensor, Tensor, "
        "Tensor, Tensor)",
        "log_sums_in_slabs(Tensor a, Tensor b, Tensor? scale, float constant) -> (Tensor, Tensor, Tensor, Tensor, "
        "Tensor)"})
    library.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(gssf_emulated, CPU, library) {
  library.impl("hardest_negatives_hopper", TORCH_BOX(&gssf::hopper::hardest_negatives_hopper));
  library.impl("hopper_sweep", TORCH_BOX(&gssf::hopper::hopper_sweep));
  library.impl("in_slabs", TORCH_BOX(&gssf::hopper::in_slabs));
  library.impl("logsumexp_scores_hopper", TORCH_BOX(&gssf::hopper::logsumexp_scores_hopper));
  library.impl("log_sums_in_slabs", TORCH_BOX(&gssf::hopper::log_sums_in_slabs));
}

void bind_emulator(py::module_& internals) {
  using namespace gssf::chip;
  py::module_ emulator = internals.def_submodule("emulator");
  emulator.attr("AT_ONCE") = int(at_once);
  emulator.attr("LATE") = int(late);
  emulator.attr("AT_RANDOM") = int(at_random);
  // Blocks that run at once, and when copies and products happen; seed 0: threads go on as they come.
  emulator.def(
      "settings",
      [](int processors, int copies, int products, uint32_t seed) {
        settings = {processors, static_cast<When>(copies), static_cast<When>(products), seed};
      },
      py::arg("processors") = 3, py::arg("copies") = int(at_once), py::arg("products") = int(at_once),
      py::arg("seed") = 0);
}
