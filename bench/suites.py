"""The suites: what `python -m bench suite NAME` measures on a device."""

from __future__ import annotations

from bench import peers
from bench.measure import Case
from bench.ops import OPS
from bench.runner import Entry

CURVE = {"cpu": (128, 256, 512, 1024, 2048, 4096, 8192), "cuda": (128, 512, 2048, 8192, 16384, 32768)}


# Where the curve meets torch.compile, the peers and the memory's measure: sizes that are on it.
COMPILED = {"cpu": (1024, 4096), "cuda": (2048, 8192)}
PEERS = {"cpu": 1024, "cuda": 2048}
MEMORY = {"cpu": 4096, "cuda": 8192}


def quick(device: str) -> list[Entry]:
    """A curve over N of the triplet loss, and one point of everything else: under three minutes on two cores."""
    n, dtype, seconds = (2048, "float32", 3.0) if device == "cpu" else (8192, "bfloat16", 2.0)
    entries = []
    for size in CURVE[device]:
        others = ["naive"]
        others += ["compile"] if size in COMPILED[device] else []
        others += peers.serving("triplet", device) if size == PEERS[device] else []
        memory = size == MEMORY[device]
        entries.append(_entry("triplet", size, 512, dtype, device, others, seconds, memory))
    points = ("hardest_negatives", "goal_nca_sig_ms", "info_nce", "sigmoid", "sum_hinge", "distillation")
    by_label = ("circle", "multi_similarity", "multi_similarity_mined")
    fragments = ("late_interaction", "late_interaction_scores")
    for op in (*points, *by_label, *fragments, "nearest", "top_scores"):
        others = ["naive", *peers.serving(op, device)]
        entries.append(_entry(op, n, 512, dtype, device, others, seconds))
    if device == "cuda":
        entries.append(_entry("hardest_negatives", 16384, 1024, "float32", device, ["naive", "swept"], seconds))
    for op in ("project", "pair_scores"):
        entries.append(_entry(op, 4 * n, 512, dtype, device, ["naive", "compile"], seconds))
    return entries


def full(device: str) -> list[Entry]:
    """Every op over N, D and dtype against everything that computes it, with peak memory: an hour on two cores."""
    sizes: tuple[int, ...] = (128, 1024, 4096, 8192, 16384)
    dims: tuple[int, ...] = (256, 1024)
    if device == "cuda":
        sizes, dims = CURVE["cuda"], (256, 512, 1024)
    entries = []
    for op in OPS:
        for dtype in ("float32", "bfloat16"):
            for d in dims:
                for n in sizes:
                    others = ["naive", "compile", *peers.serving(op, device)]
                    entries.append(_entry(op, n, d, dtype, device, others, 8.0, memory=dtype == "float32"))
    return entries


def _entry(op, n, d, dtype, device, others: list[str], seconds, memory=False) -> Entry:
    case = Case(op, n, d, min(32, d), dtype, device)
    return Entry(case, ("ours", *others), ("ours", "naive") if memory else (), seconds, min_turns=5)


SUITES = {"quick": quick, "full": full}
