"""Chooses the route of an op, and says why. Nothing else chooses.

    choose(op, plans, call) → Plan(route, why, tile)

All size thresholds are in this file, all tile sizes in `triton/tiles.py`. A route is one of

    reference     the definition in plain PyTorch, which stores the matrix
    composite     a formula over other ops, each with its plan
    chunks        dense losses: PyTorch's product of a chunk of scores, a pass over it, two products for the gradients
    triton        the op's Triton kernel, the same for every size
    sweep         a sweep that stores no score, and the merge of its partials
    small         small problems, in the fewest launches; dense losses store all dscores [N, M]
    row panels    large bf16 problems of dense losses: dscores are stored one row panel at a time
    certified     hardest negatives of fp32 from bf16 products; scores that these cannot tell apart are computed again
    hopper        csrc/cuda, compute capability 9.0

Ops choose when they run, below torch.compile, so no graph depends on a size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from gssf_kernels.triton import operands, tiles

# The most scores of a small problem: it has small tiles, and dense losses store all dscores (4 MiB).
SMALL = 1 << 20
CERTIFIED = 1 << 22  # the fewest fp32 scores for certified mining on a GPU
LONGEST_ROW = 1 << 13  # the most scores of a row, or of a column, that one program reads
# The most rows of a, and of b, for which each row of a gradient searches for its pairs. Up to there a sort costs more.
SCAN_ROWS = 2048
ROW_PANEL_DTYPES = frozenset({torch.bfloat16})  # for other dtypes PyTorch's product returns fp32 scores anyway
# Scores of a chunk, by device type. On the CPU they are 16 MiB of fp32. With N = 8192 and D = 1024, half of that took
# 3 % longer, and twice as much was not faster. A GPU needs larger chunks to be busy.
CHUNK_SCORES = {"cpu": 1 << 22, "cuda": 1 << 26}
SEGMENT_ROWS = 64  # rows of a tile of the scores of equal id, where ids may be read
SEGMENT_SCORES = 1 << 18  # the most scores of such a tile: 1 MiB of fp32
LISTED_PAIRS = 4  # pairs of equal id for each anchor, up to which they are listed, where ids may be read
LIMITS = 16  # the most limits of an anchor that a sweep for hardest negatives compares each score with
MIN_CHUNK_ROWS = 16  # the fewest rows of a chunk, even if they exceed CHUNK_SCORES
SQUARE_ROWS = {"cpu": 256}  # see `square_rows`
# The scores above which a forward keeps the softmax's means. Up to there a GPU takes fewer launches without them.
KEPT_MEANS = {"cuda": SMALL}
KEPT_SCORES = {"cpu": 1 << 18}  # the most scores that are kept for the backward, which saves a product: 1 MiB of fp32


def fp32_products(device_type: str) -> str:
    """The precision that PyTorch's settings allow for fp32 products on this type of device: "ieee", "tf32" or "bf16".

    PyTorch has two settings: ``torch.backends.cuda.matmul.fp32_precision`` with its parents, whose value holds if it is
    "none", and ``torch.set_float32_matmul_precision``. Both change the value that is read here. The getter of the
    second is not used: it raises once both settings have been used.

    Call this only below the dispatcher: a traced graph would keep the value of the time of tracing.
    """
    backend: Any = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    precision = backend.matmul.fp32_precision
    return "ieee" if precision == "none" else precision


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums for inputs of ``dtype``: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kind(dtype: torch.dtype) -> str:
    """The kind of product for inputs of ``dtype`` on CUDA: "half", or for fp32 the precision that PyTorch allows."""
    return fp32_products("cuda") if dtype == torch.float32 else "half"


def architecture(device: torch.device) -> int:
    """The architecture in the tile tables: 90 for sm_90 (wgmma, TMA, 227 KiB), else 80, which every card runs."""
    return 90 if torch.cuda.get_device_capability(device)[0] == 9 else 80


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors ``device`` has. Cached; never synchronises."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def sweep_tile(device: torch.device, dtype: torch.dtype, size: str, exact: bool = False) -> tiles.Sweep:
    """The tile config of a sweep; size: as `tiles.SWEEP` names it; exact: fp32 products are never TF32."""
    product = "ieee" if exact and dtype == torch.float32 else kind(dtype)
    return tiles.SWEEP[architecture(device), product, size]


def most_registers(D: int, mixed: bool = False) -> dict[str, int]:
    """Launch options that let a thread use all 255 registers, where it needs almost that many.

    Masks need registers if D is no multiple of 16, and so does a gradient of another dtype (mixed). Without the option
    ptxas would spill a value rather than run one block fewer on a multiprocessor.
    """
    return {"maxnreg": 255} if D % 16 or mixed else {}


def project_tile(dtype: torch.dtype) -> tiles.Project:
    """The tile config of a projection of x in ``dtype``."""
    return tiles.PROJECT[kind(dtype)]


def fragments_tile(dtype: torch.dtype, D: int) -> tiles.Sweep:
    """The tile config of late interaction's scores. Masks of channels take registers if D is no multiple of 16."""
    return tiles.FRAGMENTS[kind(dtype), "ragged" if D % 16 else "aligned"]


def fragment_gradients_tile(dtype: torch.dtype, D: int) -> tiles.FragmentGradients:
    """The tile config of late interaction's gradients."""
    return tiles.FRAGMENT_GRADIENTS[kind(dtype), "ragged" if D % 16 else "aligned"]


def top_tile(dtype: torch.dtype, k: int) -> tiles.Top:
    """The tile config of a search for the k best."""
    lists = sorted(length for product, length in tiles.TOP if product == kind(dtype))
    return tiles.TOP[kind(dtype), next((length for length in lists if length >= k), lists[-1])]


def top_splits(blocks: int, M: int, tile: tiles.Top) -> tuple[int, int]:
    """(splits, columns of each) of a search in M columns, so that ``blocks`` of rows keep a card busy.

    A split has at least as many columns as lists have places, eight times over, else merging would be most of it.
    """
    wanted = -(-tiles.TARGET_PROGRAMS // max(blocks, 1))
    splits = max(min(wanted, M // max(8 * tile.LIST, tile.BM)), 1)
    columns = -(-M // (splits * tile.BM)) * tile.BM
    return -(-M // columns), columns


def gradients_tile(dtype: torch.dtype) -> tiles.Gradients:
    """The tile config of the products ds b and dsᵀ a, for inputs of ``dtype``."""
    return tiles.GRADIENTS[kind(dtype)]


def starts(length: int, step: int) -> Iterable[int]:
    """The first row of each chunk, or row panel, of a loop.

    All but the last have the same size. `explain` replaces this function and runs only a few of them.
    """
    return range(0, length, step)


def chunk_scores(device_type: str) -> int:
    """The most scores of a chunk on this type of device; of a type without a line, as on the CPU."""
    return CHUNK_SCORES.get(device_type, CHUNK_SCORES["cpu"])


def lists_pairs(pairs: int, anchors: int) -> bool:
    """Whether pairs of equal id are listed, one by one, rather than compared in tiles."""
    return pairs <= LISTED_PAIRS * anchors


def square_rows(device_type: str, n: int) -> int:
    """The most rows of a chunk of a symmetric s [n, n], which begins with a square on the diagonal.

    Half of the square is computed twice. On a GPU nothing bounds it: fewer, larger products are taken.
    """
    return max(SQUARE_ROWS.get(device_type, n), n // 16)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The choice made for one call of an op."""

    route: str
    why: str
    tile: tiles.Sweep | None = None  # for routes that sweep
    upper_triangle: bool = False  # s is symmetric, with the same ids: only the tiles of the upper triangle are computed

    @property
    def composite(self) -> bool:
        """Whether the op's composite runs: plain PyTorch, by itself or over other ops."""
        return self.route in COMPOSITE

    def __str__(self) -> str:
        return f"{self.route}: {self.why}"


COMPOSITE = frozenset({"reference", "composite", "chunks"})
_FORCED: dict[str, str] = {}  # op: the route that a test forces


def choose(name: str, plans: Callable[[Any], Iterator[Plan]], call: Any) -> Plan:
    """The plan of an op on CUDA.

    Args:
        name: the op.
        plans: one of the functions of this file: yields the plans that can compute the call, the preferred one first.
        call: the op's bundle of arguments.
    """
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
    """For tests: force the routes of ops, as in ``forced(score_sums="chunks")``. An op without the route raises."""
    outer = dict(_FORCED)
    _FORCED.update(routes)
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(outer)


class Scores:
    """The size of the scores ``s = a bᵀ`` of an op: a [N, D], b [M, D], or None if b is a."""

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
        """The tile config of a sweep over them; epilogue as in `sweep_size`, exact as in `sweep_tile`."""
        return sweep_tile(self.a.device, self.a.dtype, sweep_size(self.N, self.M, self.D, epilogue), exact)


def sweep_size(N: int, M: int, D: int, epilogue: str = "") -> str:
    """The size of a sweep over [N, M] scores of D channels, as `tiles.SWEEP` names it.

    epilogue: for the epilogues with a tile config of their own, the name of its size.
    """
    return "small" if N * M <= SMALL else epilogue or ("narrow" if D < 512 else "wide")


_FP64 = "fp64: no matrix unit gains by it"
_NONE = "no scores"


def composite_only(call: Any) -> Iterator[Plan]:
    """Plans of an op without a kernel."""
    yield Plan("composite", "a formula over other ops")


def kernel(call: Any) -> Iterator[Plan]:
    """Plans of an op with the same kernels for every size."""
    tensors = (t for value in call for t in (value if isinstance(value, list) else [value]))
    if any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tensors):
        yield Plan("composite", _FP64)
    else:
        yield Plan("triton", "its kernel serves every size")
        yield Plan("composite", "forced")


def hardest_sweeps(scores: Scores, twice: bool = False, symmetric: bool = False) -> Iterator[Plan]:
    """Plans of a sweep for hardest negatives, where columns and rows may be the same anchors of the same ids.

    twice: b is a; symmetric: b is another factor of a symmetric s, of which certified mining makes no use.
    """
    a, b = scores.a, scores.b
    if hopper("hardest_negatives", a, b):
        yield Plan("hopper", "tiles.HOPPER_CUDA names this dtype and size")
    exact = a.dtype == torch.float32 and kind(a.dtype) == "ieee"
    if exact and scores.count >= CERTIFIED:
        yield _certified(scores, f"at least {CERTIFIED:,}: exact winners at the speed of bf16", twice)
    # For a small problem, merging the row and column statistics of the triangle takes longer than the skipped tiles.
    upper = (twice or symmetric) and scores.count > SMALL
    why = f"{scores}: one sweep that stores none{', of the upper triangle' if upper else ''}"
    yield Plan("sweep", why, scores.tile(), upper_triangle=upper)
    if exact and 0 < scores.count < CERTIFIED:
        yield _certified(scores, f"fewer than {CERTIFIED:,}: forced", twice)


def _certified(scores: Scores, why: str, symmetric: bool) -> Plan:
    size = sweep_size(scores.N, scores.M, scores.D, "sums")
    tile = sweep_tile(scores.a.device, torch.bfloat16, size, False)  # what is swept is rounded
    return Plan("certified", f"{scores} of fp32, {why}", tile, upper_triangle=symmetric)


def hardest(call: Any) -> Iterator[Plan]:
    """Plans of ``hardest_negatives``. call.route: the route that the caller wants; "" is any."""
    if call.a.dtype == torch.float64:
        yield Plan("reference", _FP64)
        return
    if call.edges is not None:
        a, b = (t[0] if t.shape[0] else t.new_empty(t.shape[1:]) for t in (call.a, call.b))
        scores = Scores(a, b)
        size = sweep_size(call.edges.shape[0] * scores.N, scores.M, scores.D, "sums")  # registers, as listed pairs
        tile = sweep_tile(a.device, a.dtype, size)
        option = Plan("sweep", f"{scores} for each of {call.edges.shape[0]} edges: one sweep that stores none", tile)
        yield one_tile_each(option)
        yield Plan("reference", "forced")
        return
    plain = call.negatives.plain
    same_ids = call.a_ids is None or call.b_ids is None or operands.same(call.a_ids, call.b_ids)
    mirrored = plain and same_ids
    twice, symmetric = mirrored and operands.same(call.a, call.b), mirrored and call.symmetric
    routes = []
    for option in hardest_sweeps(Scores(call.a, call.b), twice, symmetric):
        if option.route == "certified" and not plain:  # its bounds know neither listed pairs nor limits
            continue
        if option.route == "hopper" and not (plain and call.paired and call.columns):
            continue
        if option.route == "sweep" and not plain:  # listed pairs and limits need registers, as sums do
            option = dataclasses.replace(option, tile=Scores(call.a, call.b).tile("sums"))
        option = one_tile_each(option) if call.pair_starts is not None else option
        routes.append(option.route)
        if call.route in ("", option.route):
            yield option
    if call.route and call.route not in routes:
        raise ValueError(f"route: expected one of {routes} for {call.a.dtype}, got {call.route!r}")
    yield Plan("reference", "forced")


def one_tile_each(option: Plan) -> Plan:
    """The same with one tile for each program: a loop over listed pairs does not join that over tiles."""
    return option if option.tile is None else dataclasses.replace(option, tile=option.tile._replace(persistent=0))


def hardest_backward(call: Any) -> Iterator[Plan]:
    """Plans of ``hardest_negatives_backward``: up to SCAN_ROWS rows each row searches for its pairs, else a sort."""
    rows = len(call.y)
    if call.x.dtype == torch.float64:
        yield Plan("composite", _FP64)
        return
    if too_many_weights(call):
        yield Plan("composite", _WEIGHTS)
        return
    metric = call.diag is not None or call.blocks is not None or call.normalize
    if rows <= SCAN_ROWS and (len(call.x) > 0 or not metric):
        yield Plan("small", f"{rows:,} rows, at most {SCAN_ROWS:,}: each searches for its pairs")
    yield Plan("triton", f"{rows:,} rows, none or over {SCAN_ROWS:,}: pairs are sorted by row")
    yield Plan("composite", "forced")


def hardest_terms(call: Any) -> Iterator[Plan]:
    """Plans of ``hardest_terms``. For a small problem the merge computes the loss.

    With GOAL's relative terms a small problem stores its scores, and reads them again for the weights.
    """
    scores = Scores(call.a, call.b)
    if call.a.dtype == torch.float64:
        yield Plan("composite", _FP64)
    elif call.formula.endswith("_ms"):
        if scores.small and scores.M <= LONGEST_ROW:
            why = f"{scores}, at most {SMALL:,}: stored, and read again for the weights"
            yield Plan("small", why, scores.tile())
        yield Plan("composite", f"{scores}: relative terms by a sweep that stores none, then the weights")
    else:
        if scores.small and next(hardest_sweeps(scores)).route == "sweep":
            why = f"{scores}, at most {SMALL:,}: the merge of the sweep makes the terms"
            yield Plan("small", why, scores.tile())
        yield Plan("composite", f"{scores}: hardest negatives, then the terms")


def batch_hard(call: Any) -> Iterator[Plan]:
    """Plans of ``batch_hard``."""
    scores = Scores(call.x, call.x)
    if call.x.dtype == torch.float64:
        yield Plan("composite", _FP64)
        return
    if scores.small and next(hardest_sweeps(scores)).route == "sweep":
        why = f"{scores}, at most {SMALL:,}: one sweep for both, and the merge makes the terms"
        yield Plan("small", why, scores.tile(exact=True))
    yield Plan("composite", f"{scores}: hardest negatives, hardest positives by label, then the terms")


def relative_terms(call: Any) -> Iterator[Plan]:
    """Plans of ``relative_negatives``: GOAL's relative terms, in the sweep for hardest negatives."""
    scores = Scores(call.a, call.b)
    if call.a.dtype == torch.float64:
        yield Plan("reference", _FP64)
        return
    sweep = Plan("sweep", f"{scores}: one sweep that stores none", scores.tile("sums"))
    yield one_tile_each(sweep) if call.pair_starts is not None else sweep
    yield Plan("reference", "forced")


def top_scores(call: Any) -> Iterator[Plan]:
    """Plans of ``top_scores``."""
    scores = Scores(call.a, call.b)
    if call.a.dtype == torch.float64:
        yield Plan("composite", _FP64)
        return
    tile = top_tile(call.a.dtype, call.k)
    yield Plan("sweep", f"{scores}: one sweep that keeps {min(call.k, tile.LIST)} of each row in registers")
    yield Plan("composite", "forced")


def score_counts(call: Any) -> Iterator[Plan]:
    """Plans of ``score_counts``. A loop over several levels of each column takes registers, so that tiles are small."""
    scores = Scores(call.a, call.b)
    if call.a.dtype == torch.float64:
        yield Plan("composite", _FP64)
        return
    several = call.row_starts is not None or call.col_starts is not None
    tile = sweep_tile(call.a.device, call.a.dtype, "small") if several else scores.tile("sums")
    yield one_tile_each(Plan("sweep", f"{scores}: one sweep that counts", tile))
    yield Plan("composite", "forced")


_WEIGHTS = "blocks of at least 2^31 numbers, whose indices in a tile are 32-bit"


def too_many_weights(call: Any) -> bool:
    """Whether the index of a weight needs 64 bits."""
    return call.blocks is not None and call.blocks.numel() >= 1 << 31


def project(call: Any) -> Iterator[Plan]:
    """Plans of ``project``."""
    if call.x.dtype == torch.float64 or too_many_weights(call):
        yield Plan("composite", _FP64 if call.x.dtype == torch.float64 else _WEIGHTS)
        return
    if call.pairs and len(call.x) * len(call.y) <= SMALL:
        yield Plan("small", f"at most {SMALL:,} scores: those of the positives in the same launch")
    yield Plan("triton", "its kernel serves every size")
    yield Plan("composite", "forced")


def project_backward(call: Any) -> Iterator[Plan]:
    """Plans of ``project_backward``: up to SCAN_ROWS rows one launch, else a launch for each gradient.

    The larger problems split the sums of the weights' gradients. So do those with only one factor.
    """
    N = len(call.x)
    if call.x.dtype == torch.float64 or too_many_weights(call):
        yield Plan("composite", _FP64 if call.x.dtype == torch.float64 else _WEIGHTS)
        return
    one_factor = call.y is None and (call.dp is None or call.dunit is None)
    if 0 < N <= SCAN_ROWS and not one_factor:
        yield Plan("small", f"{N:,} rows, at most {SCAN_ROWS:,}: one launch")
    why = "one factor" if one_factor else f"{N:,} rows, none or over {SCAN_ROWS:,}"
    yield Plan("triton", f"{why}: a launch for each gradient")
    yield Plan("composite", "forced")


def dense(row_panels: Callable[[Any], bool] = lambda call: True, epilogue: str = "") -> Any:
    """The function of plans for losses in which every score carries gradient.

    row_panels: whether the op has that route for a call.
    epilogue: as in `sweep_size`.
    """

    def plans(call: Any) -> Iterator[Plan]:
        a = call.a
        scores = Scores(a, call.b)
        if a.dtype == torch.float64:
            yield Plan("chunks", _FP64)
            return
        if getattr(call, "general", False):
            yield Plan("chunks", f"{scores} with listed pairs, left-out scores or limits: masked in chunks")
            return
        if getattr(call, "keep", "") == "means" and scores.count > KEPT_MEANS["cuda"]:
            yield Plan("chunks", f"{scores}, of which only a has a gradient: the forward computes it from its softmax")
            return
        if scores.small:
            why = f"{scores}, at most {SMALL:,}: the fewest launches; a backward stores dscores of all"
            yield Plan("small", why, scores.tile(epilogue))
        panel_inputs = a.dtype in ROW_PANEL_DTYPES and not scores.symmetric
        if panel_inputs and scores.count > SMALL and row_panels(call):
            why = f"{scores} of bf16, of two inputs: dscores of one panel of rows are stored at a time"
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
    """Plans of a pass over a chunk."""
    if call.s.dtype == torch.float64:
        yield Plan("composite", _FP64)
    else:
        yield Plan("triton", "a pass over a chunk of scores")
        yield Plan("composite", "forced")


score_sums = dense(lambda call: call.reduction == "sum" and not call.relative)


def score_sums_backward(call: Any) -> Iterator[Plan]:
    """Plans of ``score_sums_backward``: a sum multiplies the gradients of its forward, row sums compute s again."""
    if call.reduction == "none":
        yield from dense(lambda call: False)(call)
    else:
        yield from kernel(call)


def info_nce(call: Any) -> Iterator[Plan]:
    """Plans of ``info_nce``. For a small problem the merge computes the loss; else log-sums, then the terms."""
    for option in dense(lambda call: False)(call):
        if option.route != "small":
            why = _FP64 if call.a.dtype == torch.float64 else f"{Scores(call.a, call.b)}: log-sums, then the terms"
            option = Plan("composite", why)
        yield option


def logsumexp(call: Any) -> Iterator[Plan]:
    """Plans of ``logsumexp_scores`` and its backward. The forward is a reduction, with the tile config "sums"."""
    forward = not hasattr(call, "needs")
    if forward and call.score == "scaled" and call.a.dtype != torch.float64 and call.columns and not call.general:
        b = call.a if call.b is None else call.b
        if hopper("logsumexp_scores", call.a, b):
            yield Plan("hopper", "tiles.HOPPER_CUDA names this dtype and size")
    yield from dense(epilogue="sums" if forward else "")(call)


def relation_loss(call: Any) -> Iterator[Plan]:
    """Plans of ``relation_loss``."""
    scores = Scores(call.student, None)
    if call.student.dtype == torch.float64:
        yield Plan("chunks", _FP64)
        return
    if scores.small:
        yield Plan("small", f"{scores}, at most {SMALL:,}: the slope of each is stored")
    yield Plan("chunks", _NONE if scores.count == 0 else f"{scores}: chunks make only the upper triangle")


def few_rows(tensor: Callable[[Any], torch.Tensor], other: Callable[[Any], Any] = lambda call: None) -> Any:
    """The function of plans for gradients in which each row searches for its pairs, up to SCAN_ROWS rows.

    tensor: call -> the tensor whose rows are counted.
    other: call -> a reason against that route, or None.
    """

    def plans(call: Any) -> Iterator[Plan]:
        x = tensor(call)
        if x.dtype == torch.float64:
            yield Plan("composite", _FP64)
            return
        reason = other(call) or (None if 0 < len(x) <= SCAN_ROWS else f"{len(x):,} rows, none or over {SCAN_ROWS:,}")
        if reason is None:
            yield Plan("small", f"{len(x):,} rows, at most {SCAN_ROWS:,}: each searches for its pairs")
        yield Plan("composite", reason or "forced")

    return plans


def hopper(name: str, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `tiles.HOPPER_CUDA` sends ``name`` of a [N, D] and b [M, D] to csrc/cuda, and it is built."""
    key = name, kind(a.dtype), sweep_size(len(a), len(b), a.shape[1])
    return key in tiles.HOPPER_CUDA and architecture(a.device) == 90 and hopper_built()


def hopper_built() -> bool:
    """Whether the extension was built with csrc/cuda; setup.py says when it is."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("gssf::hopper_sweep", "CUDA")
