"""The one table of tile sizes: static, so that every run and every rank does the same arithmetic.

Chosen from ahead-of-time compilation (registers, spills, shared memory) and not yet timed on a GPU.
`tests/triton/test_lowering.py` compiles every line of the table for its architecture; none spills, with Triton 3.6 or
3.7.
"""

from __future__ import annotations

from typing import NamedTuple


class Sweep(NamedTuple):
    """A tile of the sweep: scores [BN, BM], summed over BK channels at a time."""

    BN: int
    BM: int
    BK: int
    num_warps: int
    num_stages: int
    tma: bool = False  # operands come as tensor descriptors (sm_90), else by pointers
    persistent: int = 0  # programs per processor, which go from tile to tile; 0: a program for each tile


class Project(NamedTuple):
    """A tile of the projection: BN rows of BC channels."""

    BN: int
    BC: int
    num_warps: int
    num_stages: int


class Gradients(NamedTuple):
    """A tile of a gradient da or db: BR rows of BC channels, summed over BK columns of dscores at a time."""

    BR: int
    BC: int
    BK: int
    num_warps: int
    num_stages: int


class FragmentGradients(NamedTuple):
    """A tile of late interaction's gradients: BC channels of BR regions or BT words; BK channels of their scores."""

    BR: int
    BT: int
    BC: int
    BK: int
    num_warps: int
    num_stages: int


class Top(NamedTuple):
    """A tile of a search: scores [BN, BM], summed over BK channels at a time, and the best LIST of each row so far."""

    BN: int
    BM: int
    BK: int
    LIST: int
    num_warps: int
    num_stages: int


class Pass(NamedTuple):
    """A tile of a pass over a chunk of scores: BR rows of BM columns."""

    BR: int
    BM: int
    num_warps: int


class Rescore(NamedTuple):
    """A tile of certified mining's fp64 scores: BL anchors, BP partials read and BC scores computed at a time."""

    BL: int
    BP: int
    BC: int
    unroll: int
    num_warps: int


# Key: (architecture, kind of product, size).
# Kind: "half" (bf16, fp16), "tf32" and "ieee" (fp32, by PyTorch's setting).
# Size: "small" has too few scores to fill a card with large tiles, "narrow" few channels, "wide" the rest. "sums" is
# for epilogues that sum terms of every score (`relative`), "row panels" for those that store dscores too (bf16 only):
# larger tiles would spill registers there.
# Of sm_90's tiles those are persistent that do not spill when they are: "half", "wide" spills with Triton 3.6, "sums"
# with 3.6 and 3.7 (docs/gpu-kernels.md).
# The lines for 80 serve all other cards, so they stay below the 99 KiB of shared memory of sm_86, sm_89 and sm_120.
SWEEP = {
    (80, "half", "small"): Sweep(64, 64, 64, 4, 3),
    (80, "half", "narrow"): Sweep(128, 128, 32, 8, 3),
    (80, "half", "wide"): Sweep(128, 128, 64, 8, 3),
    (80, "half", "sums"): Sweep(128, 128, 64, 8, 3),
    (80, "half", "row panels"): Sweep(128, 64, 64, 8, 3),
    (80, "tf32", "small"): Sweep(64, 64, 32, 4, 3),
    (80, "tf32", "narrow"): Sweep(128, 128, 32, 8, 3),
    (80, "tf32", "wide"): Sweep(128, 128, 32, 8, 3),
    (80, "tf32", "sums"): Sweep(128, 128, 32, 8, 3),
    (80, "ieee", "small"): Sweep(64, 64, 16, 4, 3),
    (80, "ieee", "narrow"): Sweep(128, 64, 16, 8, 3),
    (80, "ieee", "wide"): Sweep(128, 128, 16, 8, 3),
    (80, "ieee", "sums"): Sweep(128, 64, 32, 8, 3),
    (90, "half", "small"): Sweep(64, 64, 64, 4, 4, tma=True),
    (90, "half", "narrow"): Sweep(128, 128, 64, 4, 3, tma=True, persistent=2),  # one program multiplies, one reduces
    (90, "half", "wide"): Sweep(128, 256, 64, 8, 3, tma=True),
    (90, "half", "sums"): Sweep(128, 128, 64, 8, 4, tma=True),
    (90, "half", "row panels"): Sweep(128, 64, 64, 8, 4, tma=True),
    (90, "tf32", "small"): Sweep(64, 64, 32, 4, 4, tma=True),
    (90, "tf32", "narrow"): Sweep(128, 128, 32, 4, 3, tma=True, persistent=2),
    (90, "tf32", "wide"): Sweep(128, 128, 32, 8, 4, tma=True, persistent=1),
    (90, "tf32", "sums"): Sweep(128, 128, 32, 8, 4, tma=True),
    (90, "ieee", "small"): Sweep(64, 64, 16, 4, 3),
    (90, "ieee", "narrow"): Sweep(128, 64, 16, 8, 3),
    (90, "ieee", "wide"): Sweep(128, 128, 16, 8, 3),
    (90, "ieee", "sums"): Sweep(128, 64, 32, 8, 3),
}

# What csrc/cuda computes on sm_90 in place of Triton, as (launcher, kind, size); launcher is "hardest_negatives" or
# "logsumexp_scores". Empty: the CUDA kernels have been compiled and emulated, but not run on a card. An entry is added
# once a card has shown its results to be right (tests/native/test_hopper.py) and its time to be shorter (bench:
# hardest_negatives and info_nce, variant "hopper").
HOPPER_CUDA: frozenset[tuple[str, str, str]] = frozenset()

POSITIVES = {  # fp32 is always "ieee" here
    "half": Sweep(64, 64, 64, 4, 3),
    "ieee": Sweep(64, 64, 32, 4, 3),
}

PROJECT = {
    "half": Project(32, 64, 8, 2),
    "tf32": Project(32, 32, 8, 2),
    "ieee": Project(32, 32, 8, 2),
}

GRADIENTS = {
    "half": Gradients(64, 64, 32, 4, 3),
    "tf32": Gradients(64, 64, 32, 4, 3),
    "ieee": Gradients(64, 64, 16, 4, 3),
}

# Late interaction: scores of BN regions and BM words, which are those of one caption or of several. Key: kind of
# product, and "ragged" if D is no multiple of 16.
FRAGMENTS = {
    ("half", "aligned"): Sweep(64, 128, 64, 8, 3),
    ("half", "ragged"): Sweep(64, 128, 32, 8, 3),
    ("tf32", "aligned"): Sweep(64, 128, 32, 8, 3),
    ("tf32", "ragged"): Sweep(64, 128, 32, 8, 3),
    ("ieee", "aligned"): Sweep(64, 64, 16, 8, 3),
    ("ieee", "ragged"): Sweep(64, 64, 16, 8, 3),
}

FRAGMENT_GRADIENTS = {
    ("half", "aligned"): FragmentGradients(64, 32, 64, 64, 8, 2),
    ("half", "ragged"): FragmentGradients(64, 32, 64, 32, 8, 2),
    ("tf32", "aligned"): FragmentGradients(32, 32, 64, 32, 8, 2),
    ("tf32", "ragged"): FragmentGradients(32, 32, 64, 32, 8, 2),
    ("ieee", "aligned"): FragmentGradients(32, 32, 64, 16, 8, 2),
    ("ieee", "ragged"): FragmentGradients(32, 32, 64, 16, 8, 2),
}

RELATIONS = {  # three sums of a tile at once; BN = BM
    "half": Sweep(64, 64, 64, 8, 3),
    "tf32": Sweep(64, 64, 32, 8, 3),
    "ieee": Sweep(64, 64, 16, 8, 3),
}

TOP = {  # (kind of product, LIST): of several the shortest list that holds the k best, else the longest
    ("half", 16): Top(64, 128, 32, 16, 8, 3),
    ("half", 128): Top(64, 64, 32, 128, 8, 3),
    ("tf32", 16): Top(64, 128, 32, 16, 8, 3),
    ("tf32", 128): Top(64, 64, 32, 128, 8, 3),
    ("ieee", 16): Top(64, 32, 16, 16, 8, 3),
    ("ieee", 128): Top(32, 64, 16, 128, 8, 3),
}

PASS = Pass(16, 64, 8)
CLOSE = Pass(16, 128, 4)  # relative terms of a small problem: anchors of a program, and scores of each at a time
ROUND = Pass(4, 256, 4)
# One score of a tile again in fp64, or all of its scores for that anchor; in this order.
RESCORE = {"one": Rescore(4, 32, 1, 4, 4), "all": Rescore(1, 64, 32, 1, 4)}

GROUP = 8  # row blocks whose tiles are visited column by column, so that both operands stay in L2
MERGE_PARTIALS, MERGE_LANES = 16, 64  # partials, and rows or columns, that a merge reads at a time
TERM_LANES = 128  # rows and columns at a time, in a merge that ends in a loss
TERMS = 1024  # terms of a loss that a program computes at a time
PAIR_EDGES, SEGMENT_EDGES, EDGE_CHANNELS = 8, 16, 128  # edges computed side by side, and channels of each

SCAN_EDGES = 32  # edges that a scan for an index compares at a time

# A slab is the range of row blocks whose partials are held at once.
SLAB_ENTRIES = 1 << 24  # partials of a slab (6 bytes each), unless MIN_SLAB_BLOCKS makes it larger
ROW_PANEL_SCORES = 1 << 26  # dscores of a row panel, stored at once: 128 MiB of bf16
MIN_SLAB_BLOCKS = 16  # row blocks in a slab: enough tiles to fill a card
GRID_FIRST, GRID_SECOND = 2**31 - 1, 65_535  # CUDA's limits on the dimensions of a grid
TOP_KEYS = 1 << 24  # keys of a search that are held at once: 128 MiB
TARGET_PROGRAMS = 512  # programs to aim for where the work can be split freely: a few per processor
