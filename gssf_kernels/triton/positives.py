"""place[i] = argmin_{j ≠ i, label_j = label_i} x_i · y_j, over rows sorted by label: only blocks on the diagonal.

Only place is stored. A program compares BN of the sorted rows with all sorted rows of their labels: from the first row
of its first label to the last row of its last. It reads those bounds itself, so the host never synchronises, and
labels of uneven size cost no padding. The sort is stable: within a label the lowest position is the lowest index. fp32
products are never TF32, whatever PyTorch's setting says: the winner must not depend on it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gssf_kernels.triton import operands, tiles
from gssf_kernels.triton.reductions import argmax, take_larger


@triton.jit(do_not_specialize=["N"])
def positives_kernel(
    x, y, order, firsts, ends, place, stride, y_stride, N, D: tl.int32,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """order [N]: rows by label; firsts, ends [N]: where the label of a sorted row begins and ends."""
    p = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.load(order + p, mask=p < N, other=0)
    first = tl.load(firsts + p, mask=p < N, other=N).to(tl.int32)
    end = tl.load(ends + p, mask=p < N, other=0).to(tl.int32)
    score = tl.full([BN], float("-inf"), tl.float32)  # the smallest s is found as the largest -s
    position = tl.full([BN], -1, tl.int32)
    for q0 in range(tl.min(first, 0), tl.max(end, 0), BM):
        q = q0 + tl.arange(0, BM)
        col = tl.load(order + q, mask=q < N, other=0)
        s = tl.zeros([BN, BM], tl.float32)
        for k in range(0, D, BK):
            c = k + tl.arange(0, BK)
            u = tl.load(x + row[:, None] * stride + c[None, :], mask=c[None, :] < D, other=0.0)  # [BN, BK]
            v = tl.load(y + col[:, None] * y_stride + c[None, :], mask=c[None, :] < D, other=0.0)  # [BM, BK]
            s = tl.dot(u, v.T, s, input_precision="ieee")
        positive = (q[None, :] >= first[:, None]) & (q[None, :] < end[:, None]) & (q[None, :] != p[:, None])
        new_score, new_position = argmax(tl.where(positive, -s, float("-inf")), q[None, :], 1)
        score, position = take_larger(score, position, new_score, new_position)
    winner = tl.load(order + position, mask=position >= 0, other=-1)
    tl.store(place + row, winner, mask=p < N)


def hardest_positives(call: Any, plan: Any) -> torch.Tensor:
    """Return the indices [N] int64: the lowest on ties, the first NaN's if there is one, -1 without a score below +inf.

    Raises TypeError unless x is fp32, bf16 or fp16.
    """
    x, labels = operands.rows(call.x), call.labels
    y = x if call.y is None else operands.rows(call.y)
    N, D = x.shape
    place = labels.new_empty(N)
    if N > 0:
        tile = tiles.POSITIVES["ieee" if x.dtype == torch.float32 else "half"]
        with torch.cuda.device_of(x):
            label, order = labels.sort(stable=True)
            firsts, ends = torch.searchsorted(label, label), torch.searchsorted(label, label, right=True)
            positives_kernel[(triton.cdiv(N, tile.BN),)](
                x, y, order, firsts, ends, place, x.stride(0), y.stride(0), N, D, BN=tile.BN, BM=tile.BM, BK=tile.BK,
                num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
            )  # fmt: skip
    return place
