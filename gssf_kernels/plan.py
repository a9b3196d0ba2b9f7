"""Which route an op takes, and why: the only place that chooses.

    choose(op, plans, call) → Plan(route, why, tile)

Every threshold of size stands here, every tile size in `triton/tiles.py`. A route is one of

    reference     the definition in plain PyTorch, which stores the matrix
    composite     a formula over other ops, which have plans of their own
    chunks        dense losses: a chunk of scores by the library's product, a pass over it, two products
    triton        the op's kernel, which has no other route
    sweep         one sweep that stores no score, and the merge of what its tiles leave
    small         the same of few scores, in the fewest launches; dense losses store dscores [N, M] at once
    row panels    dense losses of many bf16 scores: dscores of a panel of rows stored at a time
    certified     hardest negatives of fp32 by bf16 products, and the few scores made again that these leave undecided
    hopper        csrc/cuda, compute capability 9.0

Asked inside ops, below torch.compile: no graph depends on a size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from gssf_kernels.triton import operands, tiles

# Scores of a small problem: small tiles, and dense losses store dscores of all (4 MiB).
SMALL = 1 << 20
CERTIFIED = 1 << 22  # from how many scores on fp32 is mined by a sweep of bf16
LONGEST_ROW = 1 << 13  # scores of a row, or of a column, that one program reads
SCAN_ROWS = 2048  # of either side, up to which a row of a gradient looks for its pairs itself: cheaper than a sort
ROW_PANEL_DTYPES = frozenset({torch.bfloat16})  # of other dtypes the library's product leaves fp32 scores anyway
# Scores of a chunk, by device type. On the CPU 16 MiB of fp32: half of that cost 3 % more there, twice as much gained
# nothing (N = 8192, D = 1024); a GPU needs more to be filled.
CHUNK_SCORES = {"cpu": 1 << 22, "cuda": 1 << 26}
MIN_CHUNK_ROWS = 16  # of a chunk, however long
KEPT_SCORES = {"cpu": 1 << 18}  # so many are kept for a backward: 1 MiB of fp32, for a product less


def fp32_products(device_type: str) -> str:
    """How products of fp32 sides may be made on such a device, by PyTorch's settings: "ieee", "tf32" or "bf16".

    Both of PyTorch's ways to say so set what is read here: ``torch.backends.cuda.matmul.fp32_precision`` with its
    parents, whose place it takes where it is "none", and ``torch.set_float32_matmul_precision``, which cannot be asked
    back once both ways have been used: its getter raises. It is for code below the dispatcher: a traced graph would
    keep the answer of the day.
    """
    backend: Any = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    precision = backend.matmul.fp32_precision
    return "ieee" if precision == "none" else precision


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums for inputs of ``dtype``: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kind(dtype: torch.dtype) -> str:
    """The product that dtype gets: "half", or for fp32 what PyTorch's setting for products on CUDA allows."""
    return fp32_products("cuda") if dtype == torch.float32 else "half"


def architecture(device: torch.device) -> int:
    """The part of the table for device: 90 for sm_90 (wgmma, TMA, 227 KiB), else 80, which every card runs."""
    return 90 if torch.cuda.get_device_capability(device)[0] == 9 else 80


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors device has. Asked once, and nothing waits for it."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def sweep_tile(device: torch.device, dtype: torch.dtype, size: str, exact: bool = False) -> tiles.Sweep:
    """The tile for a sweep of a size that `tiles.SWEEP` names. exact: fp32 products are never TF32."""
    product = "ieee" if exact and dtype == torch.float32 else kind(dtype)
    return tiles.SWEEP[architecture(device), product, size]


def most_registers(D: int, mixed: bool = False) -> dict[str, int]:
    """Launch options that let a thread have all registers, for rows of D channels where it needs a few more.

    Masks take some where D is no multiple of 16, and so does a gradient of another dtype (mixed). Without these options
    ptxas would rather spill a value than fit one block fewer in a processor.
    """
    return {"maxnreg": 255} if D % 16 or mixed else {}


def project_tile(dtype: torch.dtype) -> tiles.Project:
    """The tile for a projection of x in dtype."""
    return tiles.PROJECT[kind(dtype)]


def gradients_tile(dtype: torch.dtype) -> tiles.Gradients:
    """The tile for the products that end a gradient, of inputs in dtype."""
    return tiles.GRADIENTS[kind(dtype)]


def starts(length: int, step: int) -> Iterable[int]:
    """Where the chunks, or panels, of a loop begin. All but the last are alike, and `explain` runs few of them."""
    return range(0, length, step)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an op does with its arguments."""

    route: str
    why: str
    tile: tiles.Sweep | None = None  # for routes that sweep
    upper_triangle: bool = False  # b is a, with its ids: only tiles on and above the diagonal are computed

    @property
    def composite(self) -> bool:
        """Whether it is plain PyTorch, over other ops or alone."""
        return self.route in COMPOSITE

    def __str__(self) -> str:
        return f"{self.route}: {self.why}"


COMPOSITE = frozenset({"reference", "composite", "chunks"})
_FORCED: dict[str, str] = {}  # op: the route that a test asks for


def choose(name: str, plans: Callable[[Any], Iterator[Plan]], call: Any) -> Plan:
    """The plan of an op on CUDA. plans: one of the functions below; call: the op's bundle of arguments."""
    options = plans(call)
    if name not in _FORCED:
        return next(options)
    for option in options:
        if option.route == _FORCED[name]:
            return option
    routes = [option.route for option in plans(call)]
    raise ValueError(f"{name}: expected a route among {routes}, got {_FORCED[name]!r}")


@contextlib.contextmanager
def forced(**routes: str) -> Iterator[None]:
    """For tests: ops take the given routes, as in ``forced(score_sums="chunks")``, or raise if they cannot."""
    before = dict(_FORCED)
    _FORCED.update(routes)
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)


class Scores:
    """The matrix that an op sweeps: a [N, D], b [M, D] or None for a."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor | None) -> None:
        self.a, self.b = a, a if b is None else b
        self.N, self.M, self.D = len(self.a), len(self.b), a.shape[1]
        self.count = self.N * self.M
        self.symmetric = b is None

    @property
    def small(self) -> bool:
        return 0 < self.count <= SMALL

    def __str__(self) -> str:
        return f"{self.N:,} x {self.M:,} scores"

    def tile(self, epilogue: str = "", exact: bool = False) -> tiles.Sweep:
        """The tile of a sweep over them; epilogue and exact as for `tiles.sweep_tile`."""
        return sweep_tile(self.a.device, self.a.dtype, sweep_size(self.N, self.M, self.D, epilogue), exact)


def sweep_size(N: int, M: int, D: int, epilogue: str = "") -> str:
    """The size of a sweep over [N, M] scores of D channels, as `tiles.SWEEP` names it."""
    return "small" if N * M <= SMALL else epilogue or ("narrow" if D < 512 else "wide")


_FP64 = "fp64: no matrix unit gains by it"
_NONE = "no scores"


def composite_only(call: Any) -> Iterator[Plan]:
    """Of an op without a kernel of its own."""
    yield Plan("composite", "a formula over other ops")


def kernel(call: Any) -> Iterator[Plan]:
    """Of an op with one kernel, or more in a row, for every size."""
    tensors = (t for value in call for t in (value if isinstance(value, list) else [value]))
    if any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tensors):
        yield Plan("composite", _FP64)
    else:
        yield Plan("triton", "its kernel serves every size")
        yield Plan("composite", "forced")


def hardest_sweeps(scores: Scores, symmetric: bool = False) -> Iterator[Plan]:
    """How hardest negatives are found, the best way first. symmetric: b is a, and their ids are the same."""
    a, b = scores.a, scores.b
    if hopper("hardest_negatives", a, b):
        yield Plan("hopper", "tiles.HOPPER_CUDA names this dtype and size")
    exact = a.dtype == torch.float32 and kind(a.dtype) == "ieee"
    if exact and scores.count >= CERTIFIED:
        yield _certified(scores, f"at least {CERTIFIED:,}: exact winners at the speed of bf16", symmetric)
    # of fewer scores, what half of the tiles save costs less than the merge of both halves
    upper = symmetric and scores.count > SMALL
    why = f"{scores}: one sweep that stores none{', of the upper triangle' if upper else ''}"
    yield Plan("sweep", why, scores.tile(), upper_triangle=upper)
    if exact and 0 < scores.count < CERTIFIED:
        yield _certified(scores, f"fewer than {CERTIFIED:,}: forced", symmetric)


def _certified(scores: Scores, why: str, symmetric: bool) -> Plan:
    size = sweep_size(scores.N, scores.M, scores.D, "sums")
    tile = sweep_tile(scores.a.device, torch.bfloat16, size, False)  # what is swept is rounded
    return Plan("certified", f"{scores} of fp32, {why}", tile, upper_triangle=symmetric)


def hardest(call: Any) -> Iterator[Plan]:
    """call.route: "" for the best, or the one that is wanted."""
    if call.a.dtype == torch.float64:
        yield Plan("reference", _FP64)
        return
    symmetric = operands.same(call.a, call.b) and (
        call.a_ids is None or call.b_ids is None or operands.same(call.a_ids, call.b_ids)
    )
    routes = []
    for option in hardest_sweeps(Scores(call.a, call.b), symmetric):
        routes.append(option.route)
        if call.route in ("", option.route):
            yield option
    if call.route and call.route not in routes:
        raise ValueError(f"route: expected one of {routes} for {call.a.dtype}, got {call.route!r}")
    yield Plan("reference", "forced")


def hardest_backward(call: Any) -> Iterator[Plan]:
    """Of few rows each looks for its pairs itself; of more the pairs are sorted."""
    rows = len(call.y)
    if call.x.dtype == torch.float64:
        yield Plan("composite", _FP64)
        return
    if too_many_weights(call):
        yield Plan("composite", _WEIGHTS)
        return
    metric = call.diag is not None or call.blocks is not None or call.normalize
    if rows <= SCAN_ROWS and (len(call.x) > 0 or not metric):
        yield Plan("small", f"{rows:,} rows, at most {SCAN_ROWS:,}: each looks for its pairs itself")
    yield Plan("triton", f"{rows:,} rows, none or above {SCAN_ROWS:,}: pairs are sorted by row")
    yield Plan("composite", "forced")


def hardest_terms(call: Any) -> Iterator[Plan]:
    """Of few scores the merge ends in the loss; GOAL's relative terms read the stored scores once more."""
    scores = Scores(call.a, call.b)
    if call.a.dtype == torch.float64:
        yield Plan("composite", _FP64)
    elif call.formula.endswith("_ms"):
        if scores.small and scores.M <= LONGEST_ROW:
            why = f"{scores}, at most {SMALL:,}: stored, and read once more for the weights"
            yield Plan("small", why, scores.tile())
        yield Plan("composite", f"{scores}: relative terms by a sweep that stores none, then the weights")
    else:
        if scores.small and next(hardest_sweeps(scores)).route == "sweep":
            why = f"{scores}, at most {SMALL:,}: the merge of the sweep makes the terms"
            yield Plan("small", why, scores.tile())
        yield Plan("composite", f"{scores}: hardest negatives, then the terms")


def batch_hard(call: Any) -> Iterator[Plan]:
    scores = Scores(call.x, call.x)
    if call.x.dtype == torch.float64:
        yield Plan("composite", _FP64)
        return
    if scores.small and next(hardest_sweeps(scores)).route == "sweep":
        why = f"{scores}, at most {SMALL:,}: one sweep for both, and the merge makes the terms"
        yield Plan("small", why, scores.tile(exact=True))
    yield Plan("composite", f"{scores}: hardest negatives, hardest positives by label, then the terms")


def relative_terms(call: Any) -> Iterator[Plan]:
    """GOAL's relative terms, in the sweep for hardest negatives."""
    scores = Scores(call.a, call.b)
    if call.a.dtype == torch.float64:
        yield Plan("reference", _FP64)
        return
    yield Plan("sweep", f"{scores}: one sweep that stores none", scores.tile("sums"))
    yield Plan("reference", "forced")


_WEIGHTS = "blocks of 2^31 numbers or more, whose indices in a tile are 32-bit"


def too_many_weights(call: Any) -> bool:
    return call.blocks is not None and call.blocks.numel() >= 1 << 31


def project(call: Any) -> Iterator[Plan]:
    if call.x.dtype == torch.float64 or too_many_weights(call):
        yield Plan("composite", _FP64 if call.x.dtype == torch.float64 else _WEIGHTS)
        return
    if call.pairs and len(call.x) * len(call.y) <= SMALL:
        yield Plan("small", f"at most {SMALL:,} scores: those of the positives in the same launch")
    yield Plan("triton", "its kernel serves every size")
    yield Plan("composite", "forced")


def project_backward(call: Any) -> Iterator[Plan]:
    """Of few rows all in one launch; of more, or of one side, the sums of the weights' gradients are split."""
    N = len(call.x)
    if call.x.dtype == torch.float64 or too_many_weights(call):
        yield Plan("composite", _FP64 if call.x.dtype == torch.float64 else _WEIGHTS)
        return
    one_side = call.y is None and (call.dp is None or call.dunit is None)
    if 0 < N <= SCAN_ROWS and not one_side:
        yield Plan("small", f"{N:,} rows, at most {SCAN_ROWS:,}: one launch")
    why = "one side" if one_side else f"{N:,} rows, none or above {SCAN_ROWS:,}"
    yield Plan("triton", f"{why}: a launch for each gradient")
    yield Plan("composite", "forced")


def dense(row_panels: Callable[[Any], bool] = lambda call: True, epilogue: str = "") -> Any:
    """Of losses in which every score carries gradient. row_panels: whether the op has that route for the call."""

    def plans(call: Any) -> Iterator[Plan]:
        a = call.a
        scores = Scores(a, call.b)
        if a.dtype == torch.float64:
            yield Plan("chunks", _FP64)
            return
        if scores.small:
            why = f"{scores}, at most {SMALL:,}: the fewest launches; a backward stores dscores of all"
            yield Plan("small", why, scores.tile(epilogue))
        two_bf16 = a.dtype in ROW_PANEL_DTYPES and not scores.symmetric
        if two_bf16 and scores.count > SMALL and row_panels(call):
            why = f"{scores} of bf16, of two sides: dscores of one panel of rows are stored at a time"
            yield Plan("row panels", why, scores.tile(epilogue or "row panels"))
        if scores.count == 0:
            why = _NONE
        elif scores.count <= SMALL:
            why = "forced"
        elif scores.symmetric:
            why = f"{scores}, symmetric: chunks make only the upper triangle"
        else:
            why = f"{scores} of {str(a.dtype)[6:]}: products of chunks are the library's"
        yield Plan("chunks", why)

    return plans


def chunk_pass(call: Any) -> Iterator[Plan]:
    if call.s.dtype == torch.float64:
        yield Plan("composite", _FP64)
    else:
        yield Plan("triton", "a pass over a chunk of scores")
        yield Plan("composite", "forced")


score_sums = dense(lambda call: call.reduction == "sum" and not call.relative)


def score_sums_backward(call: Any) -> Iterator[Plan]:
    """Of a sum what its forward left is multiplied; rows' sums make the scores again."""
    if call.reduction == "none":
        yield from dense(lambda call: False)(call)
    else:
        yield from kernel(call)


def info_nce(call: Any) -> Iterator[Plan]:
    """Of few scores the merge ends in the loss; else log-sums, then the terms."""
    for option in dense(lambda call: False)(call):
        if option.route != "small":
            why = _FP64 if call.a.dtype == torch.float64 else f"{Scores(call.a, call.b)}: log-sums, then the terms"
            option = Plan("composite", why)
        yield option


def logsumexp(call: Any) -> Iterator[Plan]:
    """Of log-sums and of their gradients; the first has two tiles of its own, being a reduction."""
    forward = not hasattr(call, "needs")
    if forward and call.score == "scaled" and call.a.dtype != torch.float64:
        b = call.a if call.b is None else call.b
        if hopper("logsumexp_scores", call.a, b):
            yield Plan("hopper", "tiles.HOPPER_CUDA names this dtype and size")
    yield from dense(epilogue="sums" if forward else "")(call)


def relation_loss(call: Any) -> Iterator[Plan]:
    scores = Scores(call.student, None)
    if call.student.dtype == torch.float64:
        yield Plan("chunks", _FP64)
        return
    if scores.small:
        yield Plan("small", f"{scores}, at most {SMALL:,}: the slope of each is stored")
    yield Plan("chunks", _NONE if scores.count == 0 else f"{scores}: chunks make only the upper triangle")


def few_rows(tensor: Callable[[Any], torch.Tensor], other: Callable[[Any], Any] = lambda call: None) -> Any:
    """Gradients of few rows, each of which looks for its pairs itself. other: a further reason against it, or None."""

    def plans(call: Any) -> Iterator[Plan]:
        x = tensor(call)
        if x.dtype == torch.float64:
            yield Plan("composite", _FP64)
            return
        reason = other(call) or (None if 0 < len(x) <= SCAN_ROWS else f"{len(x):,} rows, none or above {SCAN_ROWS:,}")
        if reason is None:
            yield Plan("small", f"{len(x):,} rows, at most {SCAN_ROWS:,}: each looks for its pairs itself")
        yield Plan("composite", reason or "forced")

    return plans


def hopper(name: str, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `tiles.HOPPER_CUDA` sends ``name`` of a [N, D] and b [M, D] to csrc/cuda, and it is built."""
    line = name, kind(a.dtype), sweep_size(len(a), len(b), a.shape[1])
    return line in tiles.HOPPER_CUDA and architecture(a.device) == 90 and hopper_built()


def hopper_built() -> bool:
    """Whether the extension has csrc/cuda (setup.py says when)."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("gssf::hopper_sweep", "CUDA")
