"""The Triton kernels behind the ops on CUDA, one module per primitive.

    sweep ◀── hardest ◀── relative, positives        pairs ◀── project        dense        terms
    sweep, dense, gradients ◀── logsumexp, sums: small problems in few launches
    tiles: every tile size        operands: what launchers ask        hopper: what csrc/cuda has instead of hardest

Modules here import torch and triton only, and are themselves imported at an op's first call.
"""
