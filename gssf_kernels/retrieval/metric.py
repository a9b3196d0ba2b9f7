"""Evaluation over batches, as an epoch gives them, and over ranks: the interface of torchmetrics, without it."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gssf_kernels import _checks
from gssf_kernels.retrieval.evaluate import evaluate
from gssf_kernels.similarity import StructuredSimilarity, check_metric

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATES = ("x", "y", "x_ids", "y_ids")


class RetrievalMetric(nn.Module):
    """:func:`~gssf_kernels.evaluate` of rows that come in batches, with the methods of a torchmetrics ``Metric``.

    ::

        metric.update(images, captions, image_ids, caption_ids)  # every step
        self.log_dict(metric.compute())                           # at the end of the epoch
        metric.reset()

    Rows are kept, detached, on the device that they come on: N x D and M x D numbers. ``.to(device)`` moves them, and
    changes no dtype. They are compared in the dtype that they come in, also within ``torch.autocast``.

    In a group of processes (``torch.distributed``), ``compute`` evaluates the rows of all ranks, in the order of the
    ranks, on each of them. All ranks must call it; ranks may have different numbers of rows, and none. Rows that a
    sampler repeats to make the ranks even are rows like others.

    Args:
        ks, folds, normalize: as in :func:`~gssf_kernels.evaluate`.
        metric: a :class:`~gssf_kernels.StructuredSimilarity`, whose scores are taken. It stays the model's: its weights
            are not among this module's parameters, and it is moved with the model.
        sync_on_compute: evaluate the rows of all ranks; without it, those of this rank.
        process_group: whose ranks; None: all.

    Raises:
        TypeError, ValueError: the setting that is wrong, what was expected and what came.
    """

    # What torchmetrics' users and PyTorch Lightning ask a metric for.
    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    x: list[Tensor]
    y: list[Tensor]
    x_ids: list[Tensor]
    y_ids: list[Tensor]
    _where: Tensor

    def __init__(
        self,
        ks: Iterable[int] = (1, 5, 10),
        metric: StructuredSimilarity | None = None,
        normalize: bool = False,
        *,
        folds: int = 1,
        sync_on_compute: bool = True,
        process_group: Any = None,
    ):
        super().__init__()
        self.ks = _checks.cutoffs(ks, "ks")
        check_metric(metric)
        _checks.flag(normalize, "normalize")
        if normalize and metric is not None:
            raise ValueError("normalize: expected False with a metric, which has its own, got True")
        _checks.positive_int(folds, "folds")
        _checks.flag(sync_on_compute, "sync_on_compute")
        self.normalize, self.folds = normalize, folds
        self.sync_on_compute, self.process_group = sync_on_compute, process_group
        self._metric = (metric,)  # in a tuple, so that it is no part of this module
        self.register_buffer("_where", torch.empty(0), persistent=False)  # where `.to` has moved the module
        self.reset()

    @property
    def metric(self) -> StructuredSimilarity | None:
        return self._metric[0]

    @property
    def device(self) -> torch.device:
        """That of the rows, or else the one that the module was moved to."""
        return self.x[0].device if self.x else self._where.device

    def reset(self) -> None:
        """Forget all rows."""
        for name in STATES:
            setattr(self, name, [])
        self._computed: dict[str, float | int] | None = None

    def update(
        self, x: Tensor, y: Tensor | None = None, x_ids: Tensor | None = None, y_ids: Tensor | None = None
    ) -> None:
        """Add the rows of a batch.

        Args:
            x: [N, D] float.
            y: [M, D] of x's dtype and device. None in every batch: x is compared with itself.
            x_ids, y_ids: [N], [M] integers. Rows of equal id are positives, also of different batches. None in every
                batch, with N = M: row i of x and row i of y are a pair.

        Raises:
            TypeError, ValueError: the argument that is wrong, also if it does not fit earlier batches.
        """
        _checks.embeddings(x, x if y is None else y, "x", "y", paired=False)
        if x_ids is None and y_ids is None:
            if y is None:
                raise ValueError("x_ids: expected the labels of x where y is None, got None")
            if x.shape[0] != y.shape[0]:
                raise ValueError(f"x_ids, y_ids: expected ids of {x.shape[0]} and {y.shape[0]} rows, got None")
        elif y is None and y_ids is not None:
            raise ValueError(f"y_ids: expected None where y is None, got {type(y_ids).__name__}")
        x_ids, y_ids = _checks.ids(x_ids, y_ids, x, x if y is None else y, "x_ids", "y_ids")
        batch = {"x": x.detach(), "y": None if y is None else y.detach(), "x_ids": x_ids}
        batch["y_ids"] = None if y is None else y_ids
        if self.x:
            self._check_like_earlier(batch)
        for name, t in batch.items():
            if t is not None:
                getattr(self, name).append(t)
        self._computed = None

    def _check_like_earlier(self, batch: dict[str, Tensor | None]) -> None:
        for name, t in batch.items():
            if (t is not None) != bool(getattr(self, name)):
                got = "None" if t is None else "a tensor"
                raise ValueError(f"{name}: expected it in every batch or in none, got {got} in batch {len(self.x)}")
        x, earlier = batch["x"], self.x[0]
        assert x is not None
        _checks.alike(x, "x", earlier, "the first batch")
        if x.shape[1] != earlier.shape[1]:
            raise ValueError(f"x: expected {earlier.shape[1]} columns as in the first batch, got {list(x.shape)}")

    def compute(self) -> dict[str, float | int]:
        """The measures of all rows, by the names of :class:`~gssf_kernels.RetrievalResult`.

        Raises:
            ValueError: there are no rows, none has a positive, or the ranks' rows do not fit one another.
        """
        if self._computed is None:
            states = {name: torch.cat(getattr(self, name)) for name in STATES if getattr(self, name)}
            if self._ranks() > 1:
                states = self._of_all_ranks(states)
            if not states:
                raise ValueError("update: expected rows before compute, got none")
            self._computed = self._evaluate(states)
        return dict(self._computed)

    def forward(
        self, x: Tensor, y: Tensor | None = None, x_ids: Tensor | None = None, y_ids: Tensor | None = None
    ) -> dict[str, float | int]:
        """`update`, and the measures of this batch alone, on this rank."""
        self.update(x, y, x_ids, y_ids)
        return self._evaluate({name: getattr(self, name)[-1] for name in STATES if getattr(self, name)})

    def _evaluate(self, states: dict[str, Tensor]) -> dict[str, float | int]:
        x, y, x_ids, y_ids = (states.get(name) for name in STATES)
        assert x is not None
        settings: dict[str, Any] = {
            "metric": self.metric,
            "normalize": self.normalize,
            "ks": self.ks,
            "folds": self.folds,
        }
        with torch.autocast(x.device.type, enabled=False):
            return evaluate(x, y, x_ids=x_ids, y_ids=y_ids, **settings).to_dict()

    def _ranks(self) -> int:
        """How many processes there are to ask."""
        if not (self.sync_on_compute and dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.process_group)

    def _of_all_ranks(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows of all ranks, in their order.

        First every rank tells what it has, so that all of them raise the same error. Then rows travel as bytes, which
        every backend can gather in every dtype, padded to the most rows of a rank.
        """
        device = self.device
        backend = dist.get_backend(self.process_group)
        if backend in ("nccl", "gloo"):  # the devices whose tensors they gather
            device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", torch.cuda.current_device())
        x = states.get("x")
        described = [0, 0, -1] if x is None else [1, x.shape[1], _DTYPES.index(x.dtype)]
        counts = [states[name].shape[0] if name in states else -1 for name in STATES]
        told = self._gather(torch.tensor(described + counts, device=device))
        ranks = [t.tolist() for t in told]
        kinds = {tuple([*rank[1:3], *(count >= 0 for count in rank[3:])]) for rank in ranks if rank[0]}
        if not kinds:
            return {}
        if len(kinds) > 1:
            raise ValueError(f"compute: expected rows of one kind on all ranks, got (columns, dtype, states) {kinds}")
        ((columns, dtype, *present),) = kinds
        result = {}
        for place, (name, there) in enumerate(zip(STATES, present, strict=True)):
            if not there:
                continue
            shape = (columns,) if name in ("x", "y") else ()
            like = torch.empty((0, *shape), dtype=_DTYPES[dtype] if shape else torch.int64, device=self.device)
            rows = [max(rank[3 + place], 0) for rank in ranks]
            if max(rows) == 0:
                result[name] = like
                continue
            padded = states.get(name, like)
            padded = torch.cat((padded, like.new_zeros((max(rows) - padded.shape[0], *shape)))).to(device).contiguous()
            parts = self._gather(padded.view(-1).view(torch.uint8))
            parts = [part.view(like.dtype).view(padded.shape)[:count] for part, count in zip(parts, rows, strict=True)]
            result[name] = torch.cat(parts).to(self.device)
        return result

    def _gather(self, t: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(t) for _ in range(dist.get_world_size(self.process_group))]
        dist.all_gather(parts, t, group=self.process_group)
        return parts

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name in STATES:
            setattr(self, name, [t.to(fn(t[:0]).device) for t in getattr(self, name)])
        return self

    def extra_repr(self) -> str:
        parts = [f"ks={self.ks}", f"normalize={self.normalize}"] + [f"folds={self.folds}"] * (self.folds != 1)
        return ", ".join([*parts, f"rows={sum(map(len, self.x))}"])


__all__ = ["RetrievalMetric"]
