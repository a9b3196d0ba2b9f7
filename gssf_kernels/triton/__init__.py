"""The Triton kernels behind the ops on CUDA, one module per primitive.

    tiles                the table of tile configs
    sweep                the loop over tiles of s = a bᵀ; gradients of dscores by row panels
    epilogues            what the sweep's epilogues share
    reductions           argmax, log-sum-exp and sum, and their merges
    score_functions      value and slope of each loss, as a function of scores or of statistics
    gradients            da, db and the gradient of κ from stored dscores
    hardest, relative, certified, positives, batch_hard, hardest_terms        hardest negatives and positives
    logsumexp, info_nce, sums, relations                                      dense losses
    pairs, project, terms                                                     scores of pairs, projection, loss terms
    hopper               what csrc/cuda computes instead, on sm_90
    operands             contiguous inputs

They import torch, triton and, from this package, `plan` and `_library`, and are imported at an op's first call.
"""
