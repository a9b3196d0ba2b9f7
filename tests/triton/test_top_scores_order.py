"""The order of scores that `top_scores` sorts by in Triton, on numbers that products seldom give."""

import pytest
import torch
from interpreted import DEVICE
from triton_checks import INF, NAN, few

pytest.importorskip("triton")

import triton
import triton.language as tl

from gssf_kernels.triton.top_scores import ordered

LOWEST, TINY = torch.finfo(torch.float32).min, 1e-45
ASCENDING = [(-INF,), (LOWEST,), (-1.5,), (-TINY,), (-0.0, 0.0), (TINY,), (1.5,), (-LOWEST,), (INF,), (NAN, -NAN)]


@triton.jit
def ordered_kernel(scores, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, ordered(tl.load(scores + i)))


@few
def test_scores_keep_their_order_as_whole_numbers():
    """-0 equals 0, NaN is the largest whatever its sign, and -inf, which is no candidate, comes last."""
    for descending in (False, True):
        classes = ASCENDING[::-1] if descending else ASCENDING
        scores = torch.tensor([score for equal in classes for score in equal] + [0.0] * 4, device=DEVICE)
        out = torch.empty(len(scores), dtype=torch.int32, device=DEVICE)
        ordered_kernel[(1,)](scores, out, BLOCK=16)
        orders, place = [], 0
        for equal in classes:
            orders.append(set(out[place : place + len(equal)].tolist()))
            place += len(equal)
        assert all(len(order) == 1 for order in orders)
        numbers = [order.pop() for order in orders]
        assert numbers == sorted(set(numbers), reverse=descending)
        assert min(numbers) == -(2**31)
