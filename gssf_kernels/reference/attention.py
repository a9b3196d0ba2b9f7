"""The definition of structured attention, on its stored matrix of scores.

Formula and source: :mod:`gssf_kernels.attention`.
"""

import torch
from torch import Tensor


def structured_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    diag: Tensor | None,
    blocks: Tensor | None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(c · q W kᵀ + mask) v``; see :func:`gssf_kernels.structured_attention`."""
    heads, dim = q.shape[-3], q.shape[-1]
    w = torch.zeros(heads, dim, dim, dtype=q.dtype, device=q.device)
    if diag is not None:
        w = w + torch.diag_embed(diag.to(q.dtype))
    if blocks is not None:
        each = blocks if blocks.dim() == 4 else blocks[None]
        w = w + torch.stack([torch.block_diag(*head) for head in each.to(q.dtype)])
    if diag is None and blocks is None:
        w = w + torch.eye(dim, dtype=q.dtype, device=q.device)
    if enable_gqa:
        k, v = (t.repeat_interleave(heads // t.shape[-3], -3) for t in (k, v))
    scores = (dim**-0.5 if scale is None else scale) * (q @ w @ k.mT)  # [..., H, L, S]
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
    return torch.dropout(scores.softmax(-1), dropout_p, dropout_p > 0) @ v
