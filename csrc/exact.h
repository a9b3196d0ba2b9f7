// Scores in fp64, in which products of fp32 numbers are exact, where hardest_negatives has them too. See certified.h.
#pragma once

#include <ATen/ATen.h>

namespace gssf {

// Whether the hardest negatives of a [N, D] and b [M, D] are those of the exact scores, as they are for fp32 and fp16
// on a processor with a bf16 unit, unless scores are few.
bool certifies(const at::Tensor& a, const at::Tensor& b);

// a_i · b_j, computed in fp64 and rounded once, for the pairs (rows, cols); -inf where an index is -1.
at::Tensor exact_pair_scores(const at::Tensor& a, const at::Tensor& b, const at::Tensor& rows, const at::Tensor& cols);

}  // namespace gssf
