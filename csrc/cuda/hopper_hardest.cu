// gssf::hardest_negatives_hopper on CUDA: the sweep for hardest negatives on Hopper's own instructions (wgmma, the
// tensor copy engine), for bf16 and fp16. docs/gpu-kernels.md has the picture.
//
//     sweep_layout.h    where everything lies       hopper_wgmma.h, hopper_ptx.h   the instructions
//     sweep.h           load, multiply              hopper_host.h                  tensor maps, launches
//     sweep_tile.h      what epilogues share        sweep_launch.h                 what ops share
//     sweep_merge.h     merge partial results
//     hardest_*.h       this op's own: the rule, the epilogue, the merge, the launches; log_sums_*.h: the other's
//
// Only PyTorch's stable ABI is used, as it is in PyTorch 2.10.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#include "hopper_host.h"
#include "hardest_launch.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(gssf, CUDA, library) {
  library.impl("hardest_negatives_hopper", TORCH_BOX(&gssf::hopper::hardest_negatives_hopper));
}
