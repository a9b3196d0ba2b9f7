"""Attention whose scores are a structured similarity: ``softmax(c · q W kᵀ) v``.

Each head has its own W = diag(w) + blockdiag(B). q W is one projection of O(L · D · b); what follows is PyTorch's fused
attention, with its flash kernels. Training starts at ordinary attention: w = 1, B = 0.

Source: GSSF (arXiv 2410.15266, IEEE TIP 2024) names attention scores ``q W kᵀ`` among the uses of its structured
similarity. The layout of blocks and the start are ours.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gssf_kernels import _checks
from gssf_kernels._modules import Fp32Module
from gssf_kernels.project import project


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
    """``softmax(c · q (diag(w) + blockdiag(B)) kᵀ + mask) v``, by PyTorch's fused attention.

    Args:
        q: [..., H, L, D] float, the queries of H heads.
        k: [..., H, S, D] of q's dtype and device; with ``enable_gqa`` of fewer heads, a divisor of H.
        v: [..., H, S, any], with as many heads as k.
        diag: w, [D] for all heads or [H, D] for each head of q; of q's dtype, or fp32 with fp16 or bf16. None: without
            this term.
        blocks: B, [G, b, b] with G·b = D or [H, G, b, b], of such a dtype. None: without this term. Without both terms
            W = 1.
        attn_mask, is_causal, dropout_p, enable_gqa: as in
            :func:`torch.nn.functional.scaled_dot_product_attention`, which also checks them.
        scale: c; None: 1 / √D.

    Returns:
        [..., H, L, any] in q's dtype; differentiable in q, k, v, diag and blocks.

    Raises:
        TypeError, ValueError: q, k, diag or blocks, what was expected and what came.

    Source: GSSF, arXiv 2410.15266; the docstring of this file says what is ours.
    """
    for t, name in ((q, "q"), (k, "k"), (v, "v")):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor [..., H, L, D], got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {t.dtype}")
        if t.dim() < 3:
            raise ValueError(f"{name}: expected shape [..., H, L, D], got {list(t.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected the {q.shape[-1]} channels of q, got {list(k.shape)}")
    _checks.flag(is_causal, "is_causal")
    _checks.flag(enable_gqa, "enable_gqa")
    (q,) = _checks.autocast(q)
    diag, blocks = _of_every_head(q, diag, blocks)
    scale = None if scale is None else _checks.finite(scale, "scale")
    if diag is not None or blocks is not None:
        q = _projected(q, diag, blocks)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _of_every_head(q: Tensor, diag, blocks) -> tuple[Tensor | None, Tensor | None]:
    """The weights, checked, as [H · D] and [H · G, b, b]: those of the heads, which stand side by side."""
    heads, dim = q.shape[-3], q.shape[-1]
    for t, name in ((diag, "diag"), (blocks, "blocks")):
        if t is not None:
            _checks.weight_of(t, name, q, "q")
    if diag is not None:
        if diag.shape not in ((dim,), (heads, dim)):
            raise ValueError(f"diag: expected shape [{dim}] or [{heads}, {dim}], got {list(diag.shape)}")
        diag = diag.expand(heads, dim).reshape(-1)
    if blocks is not None:
        b = blocks.shape[-1] if blocks.dim() else 0
        fits = b > 0 and dim % b == 0 and blocks.shape in ((dim // b, b, b), (heads, dim // b, b, b))
        if not fits:
            shapes = f"[G, b, b] or [{heads}, G, b, b] with G·b = {dim}"
            raise ValueError(f"blocks: expected shape {shapes}, got {list(blocks.shape)}")
        blocks = blocks.expand(heads, dim // b, b, b).reshape(-1, b, b)
    return diag, blocks


def _projected(q: Tensor, diag: Tensor | None, blocks: Tensor | None) -> Tensor:
    """q W of every head, which are channels of one projection; q often is a view of such rows already."""
    rows = q.transpose(-3, -2)  # [..., L, H, D]
    return project(rows.flatten(-2), diag, blocks).view(rows.shape).transpose(-3, -2)


class HeadWeights(Fp32Module):
    """The weights W of attention heads, which stay fp32 when a model is cast to bf16 or fp16.

    Attributes:
        diag: [H, D] parameter or None.
        blocks: [H, D / block_size, block_size, block_size] parameter or None.
    """

    def __init__(self, heads: int, dim: int, block_size: int | None, diagonal: bool, device=None, dtype=None):
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.diag = nn.Parameter(torch.empty(heads, dim, **options)) if diagonal else None
        self.blocks = None
        if block_size is not None:
            self.blocks = nn.Parameter(torch.empty(heads, dim // block_size, block_size, block_size, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights to W = 1."""
        with torch.no_grad():
            for name, value in self._start().items():
                getattr(self, name).copy_(value)

    def _start(self) -> dict[str, Tensor]:
        start = {}
        if self.diag is not None:
            start["diag"] = torch.ones_like(self.diag)
        if self.blocks is not None:
            start["blocks"] = torch.zeros_like(self.blocks)
            if self.diag is None:
                start["blocks"].diagonal(dim1=-2, dim2=-1).fill_(1)
        return start

    def forward(self, rows: Tensor) -> Tensor:
        """rows [..., H · D] times W of each head."""
        if self.diag is None and self.blocks is None:
            return rows
        diag = None if self.diag is None else self.diag.flatten()
        return project(rows, diag, None if self.blocks is None else self.blocks.flatten(0, 1))

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        """A state without any of these weights is that of an ordinary layer, which has W = 1."""
        start = self._start()
        if not any(prefix + name in state_dict for name in start):
            state_dict.update({prefix + name: value for name, value in start.items()})
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class StructuredMultiheadAttention(nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` with scores ``q W kᵀ``, W = diag(w) + blockdiag(B) of each head.

    A drop-in: all arguments, results and parameters are those of PyTorch's layer, whose state_dict loads strictly and
    gives the same results: without ``structure.diag`` and ``structure.blocks`` it sets w = 1, B = 0.

    W is applied to the weights that make q, ``(x A + c) W = x (A W) + c W``, at O(E² b) whatever the batch; PyTorch's
    own function does the rest, by its fused attention where ``need_weights=False``. Not for ``torch.jit.script``.
    :class:`torch.nn.Transformer` sets the parameters of a custom encoder anew: call ``structure.reset_parameters()``
    afterwards.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            PyTorch's layer.
        block_size: b, channels of a block; divides the ``embed_dim / num_heads`` channels of a head. "auto": the
            largest such divisor up to 16. None leaves the block term out.
        diagonal: learn the weight w of each channel. Without it, B starts at the identity.

    Attributes:
        structure.diag: [H, D] fp32 parameter or None.
        structure.blocks: [H, D / b, b, b] fp32 parameter or None.

    Raises:
        TypeError, ValueError: block_size or diagonal, what was expected and what came; the rest as PyTorch's layer.

    Source: GSSF, arXiv 2410.15266; the docstring of this file says what is ours.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        block_size: int | str | None = "auto",
        diagonal: bool = True,
    ):
        _checks.flag(diagonal, "diagonal")
        arguments = (bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        super().__init__(embed_dim, num_heads, dropout, *arguments)
        if isinstance(block_size, str):
            _checks.choice(block_size, "block_size", ("auto",))
            block_size = max(b for b in range(1, 17) if self.head_dim % b == 0)
        if block_size is not None:
            _checks.positive_int(block_size, "block_size")
            if self.head_dim % block_size:
                raise ValueError(f"block_size: expected a divisor of {self.head_dim} channels, got {block_size}")
        weight_dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        self.structure = HeadWeights(num_heads, self.head_dim, block_size, diagonal, device, weight_dtype)
        # nn.TransformerEncoderLayer and the like run fused kernels of the parameters alone, which know no W, unless
        # this says that there are three weights.
        self._qkv_same_embed_dim = False

    def _reset_parameters(self):
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False
        if hasattr(self, "structure"):
            self.structure.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, attention weights or None); arguments and shapes as in PyTorch's layer."""
        if query.is_nested:
            if not (key is query and value is query) or key_padding_mask is not None or need_weights:
                raise ValueError("query: expected a nested tensor only as query, key and value in one, without weights")
            return self._nested(query, attn_mask, is_causal), None
        transposed = self.batch_first and query.dim() == 3
        if transposed:
            query, key, value = _transposed(query, key, value)
        options: dict[str, Any] = {
            "training": self.training,
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        size = self.embed_dim
        bias: Tensor | None = self.in_proj_bias
        weight: Tensor | None = self.in_proj_weight
        if bias is not None:
            bias = torch.cat((self.structure(bias[:size]), bias[size:]))
        if weight is None:
            q_weight = self.structure(self.q_proj_weight.mT).mT
            options |= {"q_proj_weight": q_weight, "k_proj_weight": self.k_proj_weight}
            options |= {"v_proj_weight": self.v_proj_weight, "use_separate_proj_weight": True}
        else:
            weight = torch.cat((self.structure(weight[:size].mT).mT, weight[size:]))
        output, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            size,
            self.num_heads,
            weight,
            bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            **options,
        )
        return output.transpose(1, 0) if transposed else output, weights

    def _nested(self, query: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """Self-attention of a nested tensor, which nn.TransformerEncoder makes of padded ones for inference."""
        if not self.batch_first:
            raise ValueError("query: expected batch_first=True for a nested tensor")
        lengths = [t.shape[0] for t in query.unbind()]
        padded = torch.nested.to_padded_tensor(query, 0.0)
        places = torch.arange(padded.shape[1], device=padded.device)
        mask = places >= torch.tensor(lengths, device=padded.device)[:, None]
        output, _ = self.forward(padded, padded, padded, mask, False, attn_mask, is_causal=is_causal)
        return torch.nested.as_nested_tensor([t[:n] for t, n in zip(output, lengths, strict=True)])


def _transposed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Batch and length exchanged; what was one tensor stays one, which PyTorch's function makes use of."""
    new_query = query.transpose(1, 0)
    new_key = new_query if key is query else key.transpose(1, 0)
    new_value = new_query if value is query else new_key if value is key else value.transpose(1, 0)
    return new_query, new_key, new_value


__all__ = ["StructuredMultiheadAttention", "structured_attention"]
