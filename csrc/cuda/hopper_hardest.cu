// gssf::hopper_sweep on CUDA: the sweep for hardest negatives, or for log-sums, on Hopper's own instructions (wgmma,
// the tensor copy engine), for bf16 and fp16. docs/gpu-kernels.md has the picture.
//
//     sweep_layout.h    tiles and layouts           hopper_wgmma.h, hopper_ptx.h   the instructions
//     sweep.h           load, multiply              hopper_host.h                  tensor maps, launches
//     sweep_tile.h      what epilogues share        sweep_launch.h                 what ops share
//     sweep_merge.h     merge partials
//     hardest_*.h       of hardest negatives: the rule, the epilogue, the merge, the launches; log_sums_*.h: of
//     log-sums,
//                       which hopper_log_sums.cu compiles
//
// Only PyTorch's stable ABI is used, as it is in PyTorch 2.10.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#include "hopper_host.h"
#include "hardest_launch.h"

#include <torch/csrc/stable/library.h>

namespace gssf::hopper {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// In hopper_log_sums.cu, so that both compile at the same time.
Results log_sums_on_hopper(const Tensor& a, const Tensor& b, const std::optional<Tensor>& scale, double constant);

namespace {

Results hopper_sweep(const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_ids,
                     const std::optional<Tensor>& b_ids, bool log_sums, const std::optional<Tensor>& scale,
                     double constant) {
  return log_sums ? log_sums_on_hopper(a, b, scale, constant) : hardest_negatives_hopper(a, b, a_ids, b_ids);
}

}  // namespace
}  // namespace gssf::hopper

STABLE_TORCH_LIBRARY_IMPL(gssf, CUDA, library) { library.impl("hopper_sweep", TORCH_BOX(&gssf::hopper::hopper_sweep)); }
