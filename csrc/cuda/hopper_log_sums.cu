// The log-sums of gssf::hopper_sweep: log-sum-exp of every row and column, by the sweep that hopper_hardest.cu
// describes.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#include "hopper_host.h"
#include "log_sums_launch.h"

namespace gssf::hopper {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> log_sums_on_hopper(const Tensor& a, const Tensor& b,
                                                                      const std::optional<Tensor>& scale,
                                                                      double constant) {
  return logsumexp_scores_hopper(a, b, scale, constant);
}

}  // namespace gssf::hopper
