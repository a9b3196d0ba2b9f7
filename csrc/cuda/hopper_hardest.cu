// gssf::hardest_negatives_hopper on CUDA: the sweep for hardest negatives on Hopper's own instructions (wgmma, the
// tensor copy engine), for bf16 and fp16. docs/gpu.md has the picture.
//
//     hardest_layout.h    where everything lies           hopper_wgmma.h, hopper_ptx.h   the instructions
//     hardest_sweep.h     load, multiply                  hopper_host.h                  tensor maps, launches
//     hardest_epilogue.h  reduce a tile                   hardest_launch.h               the op
//     hardest_merge.h     merge partial results
//
// Only PyTorch's stable ABI is used, as it is in PyTorch 2.10.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#include "hopper_host.h"
#include "hardest_launch.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(gssf, CUDA, library) {
  library.impl("hardest_negatives_hopper", TORCH_BOX(&gssf::hopper::hardest_negatives_hopper));
}
