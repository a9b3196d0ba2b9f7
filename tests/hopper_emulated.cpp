// The ops of csrc/cuda, their sources on the card of hopper_emulator.h, on CPU tensors. Built and called by
// test_hopper.py.
#include "hopper_emulator.h"

#include "../csrc/cuda/hardest_launch.h"
#include "../csrc/cuda/log_sums_launch.h"

#include <torch/csrc/stable/library.h>

namespace gssf::hopper {

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

extern "C" __attribute__((visibility("default"))) void gssf_emulator(int processors, int copies, int products,
                                                                     unsigned seed) {
  using namespace gssf::chip;
  settings = {processors, static_cast<When>(copies), static_cast<When>(products), seed};
}

STABLE_TORCH_LIBRARY(gssf_emulated, library) {
  for (const char* schema :
       {"hardest_negatives_hopper(Tensor a, Tensor b, Tensor? a_ids, Tensor? b_ids) -> (Tensor, Tensor, Tensor, "
        "Tensor, Tensor)",
        "in_slabs(Tensor a, Tensor b, Tensor? a_ids, Tensor? b_ids) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        "logsumexp_scores_hopper(Tensor a, Tensor b, Tensor? scale, float constant) -> (Tensor, Tensor, Tensor, "
        "Tensor, Tensor)",
        "log_sums_in_slabs(Tensor a, Tensor b, Tensor? scale, float constant) -> (Tensor, Tensor, Tensor, Tensor, "
        "Tensor)"})
    library.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(gssf_emulated, CPU, library) {
  library.impl("hardest_negatives_hopper", TORCH_BOX(&gssf::hopper::hardest_negatives_hopper));
  library.impl("in_slabs", TORCH_BOX(&gssf::hopper::in_slabs));
  library.impl("logsumexp_scores_hopper", TORCH_BOX(&gssf::hopper::logsumexp_scores_hopper));
  library.impl("log_sums_in_slabs", TORCH_BOX(&gssf::hopper::log_sums_in_slabs));
}
