// gssf::logsumexp_scores_hopper on CUDA: log-sum-exp of every row and column, by the sweep that hopper_hardest.cu
// describes.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#include "hopper_host.h"
#include "log_sums_launch.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(gssf, CUDA, library) {
  library.impl("logsumexp_scores_hopper", TORCH_BOX(&gssf::hopper::logsumexp_scores_hopper));
}
