"""Attention pooling of fragments, block by block: no tensor [N, M, R, T] or [N, M, T, D] is stored.

    A = softmax_r(λ u_r · q_t),   c_t = Σ_r A_rt p_r,   score[n, m] = mean_t c_t · q_t / ‖c_t‖

p [N, R, D] are pooled, u are p or its unit rows, q [M, T, D] ask. The division is left out without `cosine`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gssf_kernels import _checks, plan
from gssf_kernels._library import Function, distinct, last_derivative, register
from gssf_kernels.plan import accumulation_dtype
from gssf_kernels.reference import EPS, accumulate


class AttentionPoolingCall(NamedTuple):
    """The scores [N, M]."""

    p: Tensor  # [N, R, D]
    unit: Tensor  # [N, R, D]
    q: Tensor  # [M, T, D]
    p_mask: Tensor | None  # [N, R] bool: those of p that take part
    q_mask: Tensor | None  # [M, T] bool
    scale: float  # λ
    cosine: bool  # divide by ‖c_t‖


class AttentionPoolingBackwardCall(NamedTuple):
    """The gradients of p, unit and q."""

    grad_out: Tensor  # [N, M]
    p: Tensor
    unit: Tensor
    q: Tensor
    p_mask: Tensor | None
    q_mask: Tensor | None
    scale: float
    cosine: bool


def attention_pooling_of_factors(
    p: Tensor, unit: Tensor, q: Tensor, p_mask: Tensor | None, q_mask: Tensor | None, scale: float, cosine: bool
) -> Tensor:
    """The scores [N, M], differentiable once in p, unit and q."""
    p, unit, q = distinct(p, unit, q)
    p_mask, q_mask = distinct(p_mask, q_mask)
    return _AttentionPooling.apply(p, unit, q, p_mask, q_mask, scale, cosine)


class _AttentionPooling(Function):
    call = AttentionPoolingCall

    @staticmethod
    def forward(*arguments):
        return torch.ops.gssf.attention_pooling(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:5])
        ctx.scale, ctx.cosine = inputs[5:]

    @staticmethod
    def backward(ctx, grad_out):
        arguments = (grad_out, *ctx.saved_tensors, ctx.scale, ctx.cosine)
        return (*last_derivative(torch.ops.gssf.attention_pooling_backward, *arguments), None, None, None, None)


class Block(NamedTuple):
    """n of the N and m of the M."""

    rows: slice
    cols: slice
    p: Tensor  # [n, R, D]
    unit: Tensor  # [n, R, D]
    q: Tensor  # [m T, D]
    attention: Tensor  # [n, R, m T]
    pooled: Tensor  # [n, m T, D]
    product: Tensor  # c · q [n, m T]
    norm: Tensor  # [n, m T], what is divided by

    def shares(self, call) -> tuple[Tensor, Tensor]:
        """(whether any p takes part [n, 1], the weight of each q in its mean [m, T])."""
        present = torch.ones(self.p.shape[0], 1, dtype=torch.bool, device=self.p.device)
        if call.p_mask is not None:
            present = call.p_mask[self.rows].any(1, keepdim=True)
        mask = self.q.new_ones(call.q[self.cols].shape[:2])
        if call.q_mask is not None:
            mask = call.q_mask[self.cols].to(self.q.dtype)
        return present, mask / mask.sum(1, keepdim=True).clamp_min(1)


def _blocks(call) -> Iterator[Block]:
    p, unit, q = (accumulate(t) for t in (call.p, call.unit, call.q))
    (N, R, D), (M, T, _) = p.shape, q.shape
    # Of a row of p and one of q. Each has R logits and D channels, and copies of both.
    pairs = plan.chunk_scores(_checks.device_type(p)) // (3 * (R + D))
    cols = min(max(pairs // T, 1), M)
    rows = min(max(pairs // (cols * T), 1), N)
    for i in plan.starts(N, rows):
        for j in plan.starts(M, cols):
            yield _block(call, p, unit, q, slice(i, min(i + rows, N)), slice(j, min(j + cols, M)))


def _block(call, p: Tensor, unit: Tensor, q: Tensor, rows: slice, cols: slice) -> Block:
    p, unit, q = p[rows], unit[rows], q[cols].flatten(0, 1)
    logits = call.scale * (unit @ q.mT)  # [n, R, m T]
    if call.p_mask is not None:
        mask = call.p_mask[rows]
        masked = ~mask & mask.any(1, keepdim=True)  # without any, all are kept: a softmax of nothing is NaN
        logits = logits.masked_fill(masked[:, :, None], -torch.inf)
    attention = logits.softmax(1)
    pooled = attention.mT @ p
    product = (pooled * q).sum(2)
    norm = pooled.norm(dim=2).clamp_min(EPS) if call.cosine else torch.ones_like(product)
    return Block(rows, cols, p, unit, q, attention, pooled, product, norm)


def _empty(call) -> bool:
    return 0 in (*call.p.shape, *call.q.shape)


def _attention_pooling(call):
    N, (M, T, _) = call.p.shape[0], call.q.shape
    scores = call.p.new_zeros(N, M, dtype=accumulation_dtype(call.p.dtype))
    for block in () if _empty(call) else _blocks(call):
        present, weights = block.shares(call)
        each = (block.product / block.norm).unflatten(1, (-1, T))
        each = torch.where(weights != 0, each, 0)
        scores[block.rows, block.cols] = torch.where(present, (each * weights).sum(2), 0)
    return scores


def _attention_pooling_backward(call):
    p, unit, q = call[1:4]
    dtype = accumulation_dtype(p.dtype)
    dp, dunit, dq = (torch.zeros_like(t, dtype=dtype) for t in (p, unit, q))
    grad_out = call.grad_out.to(dtype)
    for block in () if _empty(call) else _blocks(call):
        rows, cols, p, unit, q, attention, pooled, product, norm = block
        present, weights = block.shares(call)
        g = torch.where(present, grad_out[rows, cols], 0)  # [n, m]
        g = (g[:, :, None] * weights).flatten(1) / norm  # [n, m T], of c · q
        dq_of_block = (g[:, :, None] * pooled).sum(0)
        dpooled = g[:, :, None] * q
        if call.cosine:
            radial = torch.where(norm > EPS, g * product / norm**2, 0)
            dpooled = dpooled - radial[:, :, None] * pooled
        dattention = p @ dpooled.mT  # [n, R, m T]
        dlogits = call.scale * attention * (dattention - (attention * dattention).sum(1, keepdim=True))
        dp[rows] += attention @ dpooled
        dunit[rows] += dlogits @ q
        dq_of_block = dq_of_block + dlogits.flatten(0, 1).reshape(-1, q.shape[0]).mT @ unit.flatten(0, 1)
        dq[cols] += dq_of_block.view(-1, *call.q.shape[1:])
    return dp.to(call.p.dtype), dunit.to(call.unit.dtype), dq.to(call.q.dtype)


def _fake(call):
    return call.p.new_empty(call.p.shape[0], call.q.shape[0], dtype=accumulation_dtype(call.p.dtype))


def _fake_backward(call):
    return tuple(t.new_empty(t.shape) for t in (call.p, call.unit, call.q))


register("attention_pooling", AttentionPoolingCall, "Tensor", composite=_attention_pooling, fake=_fake)
register(
    "attention_pooling_backward",
    AttentionPoolingBackwardCall,
    "(Tensor, Tensor, Tensor)",
    composite=_attention_pooling_backward,
    fake=_fake_backward,
)
