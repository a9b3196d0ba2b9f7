"""The Triton kernels behind the ops on CUDA, one module per primitive.

    sweep ◀── hardest ◀── relative, positives        pairs ◀── project        dense        terms
    sweep, dense, gradients ◀── logsumexp, sums, contrast, relations: small problems in few launches
    sweep ◀── slabs ◀── logsumexp, sums: many scores of bf16
    tiles: every tile size        operands: what launchers ask        hopper: what csrc/cuda has instead of some

Modules here import torch and triton, slabs the products of `gssf_kernels.dense` too. They are imported at an op's
first call.
"""
