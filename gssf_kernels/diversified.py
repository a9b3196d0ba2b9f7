"""Several representations of an instance from its local features, and a classifier of their modality.

    A = softmax_L(W₂ tanh(W₁ F)) [K, L],   r_k = LayerNorm(P g + W_o A_k F),   penalty = ‖A Aᵀ − I‖²_F / K²

F [L, D_in] are the local features of an instance (regions, words), g its global one. The penalty keeps the K maps
apart: of maps that each look at one place, no two at the same, it is 0.

After GPLDAN (arXiv 2106.13552, ICIP 2020), of which we could read abstract and introduction alone: its diversified
attention and its modality classifier. The formulas are ours, shaped by them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gssf_kernels import _checks


class DiversifiedRepresentations(NamedTuple):
    """K representations of each of B instances."""

    representations: Tensor  # [K, B, D], the nodes of a graph: see `graph_pattern_loss`
    attention: Tensor  # [B, K, L], the weights of the local features; 0 where they are masked
    penalty: Tensor  # scalar: the mean of ‖A Aᵀ − I‖²_F / K² over the instances that have a local feature


class DiversifiedAttention(nn.Module):
    """K representations of an instance: its global feature plus, for each, an attention over its local ones.

    Args:
        in_dim: D_in, channels of the local and of the global features.
        dim: D, channels of the representations.
        representations: K.
        hidden_dim: channels of ``tanh(W₁ F)``; None: in_dim // 2.
        device, dtype: of the parameters.

    Attributes:
        hidden: W₁, a linear layer without bias.
        queries: W₂ [K, hidden_dim].
        local: W_o, a linear layer.
        whole: P, a linear layer.
        norm: the LayerNorm.

    Raises:
        TypeError, ValueError: the setting that is wrong, what was expected and what came.

    Source: after GPLDAN, arXiv 2106.13552; the docstring of this file says what is ours.
    """

    def __init__(
        self, in_dim: int, dim: int, representations: int = 4, hidden_dim: int | None = None, device=None, dtype=None
    ):
        super().__init__()
        for value, name in ((in_dim, "in_dim"), (dim, "dim"), (representations, "representations")):
            _checks.positive_int(value, name)
        hidden_dim = max(in_dim // 2, 1) if hidden_dim is None else hidden_dim
        _checks.positive_int(hidden_dim, "hidden_dim")
        self.in_dim, self.count = in_dim, representations
        options = {"device": device, "dtype": dtype}
        self.hidden = nn.Linear(in_dim, hidden_dim, bias=False, **options)
        self.queries = nn.Parameter(torch.empty(representations, hidden_dim, **options))
        self.local = nn.Linear(in_dim, dim, **options)
        self.whole = nn.Linear(in_dim, dim, **options)
        self.norm = nn.LayerNorm(dim, **options)
        nn.init.xavier_uniform_(self.queries)

    def forward(self, local: Tensor, whole: Tensor, mask: Tensor | None = None) -> DiversifiedRepresentations:
        """The representations of B instances.

        Args:
            local: F [B, L, D_in] float.
            whole: g [B, D_in].
            mask: [B, L] bool, True for the features that take part; None: all. For an instance without any, A_k F is
                0, and it has no penalty.

        Raises:
            TypeError, ValueError: the argument that is wrong, what was expected and what came.
        """
        _checks.floating(local, "local", "[B, L, D_in]")
        _checks.floating(whole, "whole", "[B, D_in]")
        if local.shape[-1] != self.in_dim:
            raise ValueError(f"local: expected {self.in_dim} channels, got {list(local.shape)}")
        if whole.shape != (local.shape[0], self.in_dim):
            raise ValueError(f"whole: expected shape [{local.shape[0]}, {self.in_dim}], got {list(whole.shape)}")
        if mask is None:
            mask = torch.ones(local.shape[:2], dtype=torch.bool, device=local.device)
        _checks.mask(mask, "mask", local.shape[:2], local.device)
        local = torch.where(mask[:, :, None], local, 0)  # what is masked, NaN even, reaches no gradient
        logits = torch.tanh(self.hidden(local)) @ self.queries.mT  # [B, L, K]
        attention = _masked_softmax(logits.mT, mask[:, None, :])  # [B, K, L]
        features = attention.to(local.dtype) @ local  # [B, K, D_in]
        combined = self.norm(self.whole(whole)[:, None] + self.local(features))
        return DiversifiedRepresentations(combined.transpose(0, 1), attention, self._penalty(attention, mask.any(1)))

    def _penalty(self, attention: Tensor, present: Tensor) -> Tensor:
        gram = attention @ attention.mT  # [B, K, K]
        identity = torch.eye(self.count, device=gram.device, dtype=gram.dtype)
        each = (gram - identity).square().sum((1, 2)) / self.count**2
        return torch.where(present, each, 0).sum() / present.sum().clamp_min(1)

    def extra_repr(self) -> str:
        return f"representations={self.count}"


def _masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """softmax over the last dimension of those that mask [...] says, 0 elsewhere; all 0 where it says none. In fp32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lowest = torch.finfo(logits.dtype).min
    return torch.where(mask, torch.softmax(torch.where(mask, logits, lowest), -1), 0)


class ModalityClassifier(nn.Module):
    """A linear layer that tells the modality of a representation, and its cross-entropy.

    Args:
        dim: D, channels of the representations.
        modalities: how many there are.
        device, dtype: of the parameters.

    Attributes:
        linear: the layer, D to modalities.

    Source: after GPLDAN, arXiv 2106.13552; the docstring of this file says what is ours.
    """

    def __init__(self, dim: int, modalities: int = 2, device=None, dtype=None):
        super().__init__()
        _checks.positive_int(dim, "dim")
        _checks.positive_int(modalities, "modalities")
        self.linear = nn.Linear(dim, modalities, device=device, dtype=dtype)

    def forward(self, *representations: Tensor) -> Tensor:
        """The mean cross-entropy of all representations, a scalar.

        Args:
            representations: a tensor [..., D] for each modality, for example xs [K_x, N, D] and ys [K_y, N, D].

        Raises:
            TypeError, ValueError: the argument that is wrong, what was expected and what came.
        """
        modalities = self.linear.out_features
        if len(representations) != modalities:
            raise ValueError(f"representations: expected {modalities} tensors, got {len(representations)}")
        dim = self.linear.in_features
        for k, t in enumerate(representations):
            if not isinstance(t, Tensor):
                raise TypeError(f"representations[{k}]: expected a tensor [..., {dim}], got {type(t).__name__}")
            if not t.is_floating_point() or t.dim() == 0 or t.shape[-1] != dim:
                raise ValueError(f"representations[{k}]: expected [..., {dim}] float, got {t.dtype} {list(t.shape)}")
        rows = [t.reshape(-1, dim) for t in representations]
        modality = [torch.full(r.shape[:1], k, dtype=torch.int64, device=r.device) for k, r in enumerate(rows)]
        logits = self.linear(torch.cat(rows))
        total = F.cross_entropy(logits, torch.cat(modality), reduction="sum")
        return total / max(logits.shape[0], 1)

    def logits(self, representations: Tensor) -> Tensor:
        """[..., modalities] of representations [..., D]."""
        return self.linear(representations)


__all__ = ["DiversifiedAttention", "DiversifiedRepresentations", "ModalityClassifier"]
