"""Structured similarity: ``s = x̂ (diag(w) + blockdiag(B)) ŷᵀ``.

Source: the structural sparse form of GSSF, arXiv 2410.15266 (IEEE TIP 2024). Its general form is ``xᵀ (W ∘ U) y`` with
a 0/1 adjacency U between channels. Here U connects each channel with the channels of its block. The initialisation
(w = 1, B = 0: training starts at cosine similarity) is ours.
"""

import torch
from torch import Tensor, nn

from gssf_kernels import _checks
from gssf_kernels._library import Function, last_derivative
from gssf_kernels._modules import Fp32Module
from gssf_kernels.project import project, project_both


def similarity(
    x: Tensor,
    y: Tensor,
    diag: Tensor | None = None,
    blocks: Tensor | None = None,
    *,
    permutation: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """All structured similarities ``s = x̂ W ŷᵀ`` as a matrix, for small problems.

    Args:
        x: [N, D] float.
        y: [M, D] of x's dtype and device; any M.
        diag, blocks, permutation: as in :func:`~gssf_kernels.project`. The weights are applied only to x.
        normalize: divide the rows of x and of y by their L2 norms.

    Returns:
        [N, M] in x's dtype, differentiable.

    Raises:
        TypeError, ValueError: the argument that is wrong, what was expected and what came.
    """
    x, y = _checks.autocast(x, y)
    _checks.embeddings(x, y, "x", "y", paired=False)
    return project(x, diag, blocks, permutation=permutation, normalize=normalize) @ project(y, normalize=normalize).mT


class StructuredSimilarity(Fp32Module):
    """Learnable ``s = x̂ (diag(w) + blockdiag(B)) ŷᵀ`` with ``dim·(1 + block_size)`` weights.

    Args:
        dim: D, channels of the embeddings.
        block_size: b, channels of a block; divides dim. None leaves the block term out.
        diagonal: learn the weight w of each channel. Without it and without blocks, W = 1 (cosine).
        normalize: L2-normalise x and y.
        permutation: [D] int64, the channels in the order of the blocks, for strided or learned groupings; a buffer.
        symmetric: keep W symmetric, by (B + Bᵀ) / 2 in the place of B, for rows of one modality: s(x, y) = s(y, x).
            Losses by label then compute half of the scores of x with itself (certified mining on a GPU: all).
        device, dtype: of the parameters.

    The parameters stay fp32 when a model is cast to bf16 or fp16, and compare rows of either dtype.

    Training starts at cosine similarity: w = 1, B = 0. Without ``diagonal``, B starts at the identity instead.

    Attributes:
        diag: [D] parameter or None.
        blocks: [dim / block_size, block_size, block_size] parameter B or None.
        weights: (diag, blocks) as they are applied: with ``symmetric`` the second is (B + Bᵀ) / 2.
        is_symmetric: whether W is symmetric: with ``symmetric``, and always without blocks.

    Raises:
        TypeError, ValueError: dim or block_size is not a positive whole number, block_size does not divide dim, or
            permutation does not contain each channel once.
    """

    symmetric = False  # of a module that was pickled before there was this setting

    def __init__(
        self,
        dim: int,
        block_size: int | None = 16,
        diagonal: bool = True,
        normalize: bool = True,
        *,
        permutation: Tensor | None = None,
        symmetric: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _checks.positive_int(dim, "dim")
        _checks.flag(symmetric, "symmetric")
        _checks.flag(diagonal, "diagonal")
        _checks.flag(normalize, "normalize")
        _checks.parameter_dtype(dtype)
        self.dim, self.block_size, self.normalize, self.symmetric = dim, block_size, normalize, symmetric
        self.diag = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if diagonal else None
        self.blocks = None
        if block_size is not None:
            _checks.positive_int(block_size, "block_size")
            if dim % block_size:
                raise ValueError(f"block_size: expected a divisor of dim={dim}, got {block_size}")
            shape = (dim // block_size, block_size, block_size)
            self.blocks = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if permutation is not None:
            if block_size is None:
                raise ValueError("permutation: expected a block_size too, got block_size=None")
            _checks.index(permutation, "permutation", dim)
            if _checks.readable(permutation):
                _checks.true_permutation(permutation)
            permutation = permutation.detach().clone()  # a later write to the argument must not change the buffer
            permutation = permutation.to(device) if device is not None else permutation
        self.permutation: Tensor | None
        self.register_buffer("permutation", permutation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights to those of cosine similarity."""
        with torch.no_grad():
            if self.diag is not None:
                self.diag.fill_(1)
            if self.blocks is not None:
                self.blocks.zero_()
                if self.diag is None:
                    self.blocks.diagonal(dim1=1, dim2=2).fill_(1)

    @property
    def weights(self) -> tuple[Tensor | None, Tensor | None]:
        """(diag, blocks) as they are applied."""
        blocks = self.blocks
        return self.diag, (blocks + blocks.mT) / 2 if self.symmetric and blocks is not None else blocks

    @property
    def is_symmetric(self) -> bool:
        """Whether W is symmetric by construction; without blocks it always is."""
        return self.symmetric or self.blocks is None

    def project(self, x: Tensor) -> Tensor:
        """``x̂ W`` [..., D], the factor of x: :func:`gssf_kernels.project` with these weights."""
        return project(x, *self.weights, permutation=self.permutation, normalize=self.normalize)

    def factors(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """``(a, b)`` with ``a bᵀ = self(x, y)``, for losses and retrieval. Without ``normalize``, b is y itself."""
        return paired_factors(self, x, y, False)[:2]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """All similarities of x [N, D] and y [M, D] as a matrix [N, M]; see :func:`similarity`."""
        return similarity(x, y, *self.weights, permutation=self.permutation, normalize=self.normalize)

    def extra_repr(self) -> str:
        parts = [f"dim={self.dim}", f"block_size={self.block_size}", f"diagonal={self.diag is not None}"]
        parts += [f"normalize={self.normalize}"] + ["symmetric=True"] * self.symmetric
        return ", ".join(parts + (["permutation=True"] if self.permutation is not None else []))


def paired_factors(
    metric: StructuredSimilarity, x: Tensor, y: Tensor, pairs: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(a, b, positive_score)``: the metric's factors of x and y, and s_ii [N], detached.

    positive_score is None without ``pairs``, which requires M >= N.
    """
    x, y = _checks.autocast(x, y)
    _checks.embeddings(x, y, "x", "y", paired=pairs)
    weights = *metric.weights, metric.permutation
    _checks.metric_weights(x, *weights)
    return project_both(x, y, *weights, metric.normalize, pairs)


def factors_with_itself(metric: StructuredSimilarity, x: Tensor) -> tuple[Tensor, Tensor]:
    """``(a, b)`` of x [N, D] compared with itself; one tensor for both if the metric has no weights."""
    if metric.diag is None and metric.blocks is None:
        (a,) = _checks.autocast(metric.project(x))
        return a, a
    a, b = _checks.autocast(*metric.factors(x, x))
    return a, b


def folded_factor(metric: StructuredSimilarity, a: Tensor, b: Tensor) -> Tensor | None:
    """a = x̂ W, to which an op may give the whole gradient of a symmetric s = a bᵀ, b = x̂; None if s is not symmetric.

    With E = dL/ds + (dL/ds)ᵀ such an op returns E b and nothing for b. Here half of it goes on to a and, times W, half
    to b: dL/dx̂ = ½ E b Wᵀ + ½ E b W = E b W, and dL/dW = ½ x̂ᵀ E x̂, as they must be.
    """
    if b is a or not metric.is_symmetric:
        return None
    return _Folded.apply(a, b, *metric.weights, metric.permutation)


class _Folded(Function):
    @staticmethod
    def forward(a, b, diag, blocks, permutation):
        return a.view_as(a)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, *weights = inputs
        ctx.save_for_backward(*weights)

    @staticmethod
    def backward(ctx, grad_out):
        half = grad_out / 2
        diag, blocks, permutation = ctx.saved_tensors
        arguments = (half, None, diag, blocks, permutation, False)
        return half, last_derivative(torch.ops.gssf.project, *arguments)[0], None, None, None


_COSINE = StructuredSimilarity(1, block_size=None, diagonal=False)  # without weights, it compares rows of any width


def metric_of(metric, normalize, loss: str, *sides: Tensor | None) -> StructuredSimilarity | None:
    """The arguments ``metric`` and ``normalize`` of ``loss``, checked: what to compare by, None for plain products.

    sides: the rows that are compared. At the loss's first call, their norms are looked at if nothing normalises them.
    """
    check_metric(metric)
    _checks.flag(normalize, "normalize")
    if normalize and metric is not None:
        raise ValueError("normalize: expected False with a metric, which has its own, got True")
    if not normalize and (metric is None or not metric.normalize):
        _checks.norms(loss, *sides)
    return _COSINE if normalize else metric


def check_metric(metric) -> None:
    """The argument ``metric`` is a StructuredSimilarity or None."""
    if metric is not None and not isinstance(metric, StructuredSimilarity):
        raise TypeError(f"metric: expected a StructuredSimilarity or None, got {type(metric).__name__}")
