"""s = a bᵀ, tile by tile and never stored: the one reducing loop, its epilogue pluggable.

    for each tile [BN, BM]:  s = Σ_k a[rows, k] b[columns, k];  epilogue(s, …)

Nothing of s is stored; each tile leaves its partials. An epilogue is a `@triton.jit` function that computes them:

    epilogue(s, tile_i, tile_j, first, blocks, N, M, state, BN, BM)

    s: [BN, BM] fp32, the tile's scores; those past N or M are arbitrary
    tile_i, tile_j: its row block within the slab and its column block
    first, blocks: the slab's first row block and number of row blocks
    state: the tuple of pointers passed to `Sweep.run`

A partial belongs to one tile, so it needs no initialisation and no atomics; a second small kernel merges the partials,
in the order of the tiles. A slab is the range of row blocks whose partials are held at once; the slabs are swept one
after another, which bounds memory.

Every kernel here takes sizes as `do_not_specialize` or, where a multiple of 16 helps its loads, as `tl.int32`: a plain
argument that equals 1 would be compiled in as a Python number, which has none of a tensor's methods.

A program computes one tile or, where the tile table says `persistent`, one tile after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gssf_kernels import _library
from gssf_kernels import plan as planning
from gssf_kernels.triton import tiles


@triton.jit
def load_tile(x, stride, row, k, R, D, B: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """x[row : row + B, k : k + BK], [B, BK]; channels past D are 0, rows past R arbitrary."""
    if TMA:
        return x.load([row, k])
    else:
        i = tl.minimum(row + tl.arange(0, B), R - 1).to(tl.int64)
        c = k + tl.arange(0, BK)
        return tl.load(x + i[:, None] * stride + c[None, :], mask=c[None, :] < D, other=0.0)


@triton.jit
def tile_of(
    t, first, rows, columns, column_blocks, GROUP: tl.constexpr, UPPER: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr
):
    """(tile_i, tile_j) of tile number t < rows · columns, sizes that `Sweep.numbering` returns.

    GROUP rows are visited together, column by column, so that both operands stay in L2. With UPPER only the tiles of
    the upper triangle have a number: row block i shares its row with row block 2 rows − 1 − i, the longest with the
    shortest and so on inwards. The first is visited from the last column block back to the diagonal, the second from
    the diagonal to the last column block, so that adjacent rows are at the same column block.
    """
    group = t // (GROUP * columns)
    within = t % (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    row, column = group * GROUP + within % height, within // height
    if UPPER:
        length = column_blocks - (first + row) * BN // BM  # tiles of row block `row`
        tile_i = tl.where(column < length, row, 2 * rows - 1 - row)
        tile_j = tl.where(column < length, column_blocks - 1 - column, column_blocks - columns + column)
    else:
        tile_i, tile_j = row, column
    return tile_i, tile_j


@triton.jit
def complete(s):
    """s unchanged, through an operation that makes Triton wait for its products here.

    In a flattened loop Triton 3.6 and 3.7 put the wait before the first use of s in each block of the epilogue, and
    leave it out where a branch passes s on unchanged. ptxas then sees sums that are read too early, and makes every
    product of the loop wait for the one before.
    """
    return s.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)


@triton.jit
def reduce_tile(
    t, a, b, a_stride, b_stride, N, M, D, first, blocks, rows, columns, column_blocks, edges, state,
    EPILOGUE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, UPPER: tl.constexpr,
):  # fmt: skip
    tile_i, tile_j = tile_of(t, first, rows, columns, column_blocks, GROUP, UPPER, BN, BM)
    row, column, a_rows, b_rows = (first + tile_i) * BN, tile_j * BM, N, M
    if edges is not None:
        nodes, edge_blocks, a_rows, b_rows = edges
        edge, block = (first + tile_i) // edge_blocks, (first + tile_i) % edge_blocks
        row = tl.load(nodes + 2 * edge).to(tl.int32) * N + block * BN
        column += tl.load(nodes + 2 * edge + 1).to(tl.int32) * M
    s = tl.zeros([BN, BM], tl.float32)
    for k in range(0, D, BK):
        x = load_tile(a, a_stride, row, k, a_rows, D, BN, BK, TMA)  # [BN, BK]
        y = load_tile(b, b_stride, column, k, b_rows, D, BM, BK, TMA)  # [BM, BK]
        s = tl.dot(x, y.T, s, input_precision=PRECISION)
    if PERSISTENT:
        s = complete(s)
    EPILOGUE(s, tile_i, tile_j, first, blocks, N, M, state, BN, BM)


@triton.jit(do_not_specialize=["N", "M", "first", "blocks", "rows", "columns", "column_blocks"])
def sweep_kernel(
    a, b, a_stride, b_stride, N, M, D: tl.int32, first, blocks, rows, columns, column_blocks, edges, state,
    EPILOGUE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, UPPER: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        # Tiles and channels become one loop, so the next tile's operands are loaded while this one is reduced.
        # Nothing is carried from tile to tile: s starts at zero.
        tl.assume(D > 0)  # else Triton would compile the loop twice, once for D = 0
        for t in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=True):
            reduce_tile(
                t, a, b, a_stride, b_stride, N, M, D, first, blocks, rows, columns, column_blocks, edges, state,
                EPILOGUE, PRECISION, TMA, True, BN, BM, BK, GROUP, UPPER,
            )  # fmt: skip
    else:
        reduce_tile(
            tl.program_id(0), a, b, a_stride, b_stride, N, M, D, first, blocks, rows, columns, column_blocks, edges,
            state, EPILOGUE, PRECISION, TMA, False, BN, BM, BK, GROUP, UPPER,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "M", "first", "blocks"])
def chunk_kernel(
    scores, stride, N, M, first, blocks, state, EPILOGUE: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """An epilogue on stored scores [N, M]: `Chunk`. The grid has one dimension: the second would be too short."""
    tile_i, tile_j = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i, j = tile_i * BN + tl.arange(0, BN), tile_j * BM + tl.arange(0, BM)
    inside = (i < N)[:, None] & (j < M)[None, :]
    s = tl.load(scores + i.to(tl.int64)[:, None] * stride + j[None, :], mask=inside, other=0.0)
    EPILOGUE(s, tile_i, tile_j, first, blocks, N, M, state, BN, BM)


class Merging:
    """A pass over N x M scores whose tiles, BN x BM each, leave partials to merge."""

    N: int
    M: int
    BN: int
    BM: int

    def merge(self, kernel: Any, first: int, blocks: int, *arguments: Any, repeats: int = 1, **constants: Any) -> None:
        """Launch a kernel that merges a slab's partials: programs of BL rows each, then programs of BL columns each.

        repeats: the second dimension of the grid, for several results of each row.
        """
        BL = tiles.MERGE_LANES
        kernel[(triton.cdiv(blocks * self.BN, BL) + triton.cdiv(self.M, BL), repeats)](
            *arguments, self.N, self.M, first, blocks,
            BN=self.BN, BM=self.BM, BP=tiles.MERGE_PARTIALS, BL=BL, num_warps=4, num_stages=2, **constants,
        )  # fmt: skip


class Sweep(Merging):
    """One pass over the scores of a [N, D] and b [M, D]: tile size, slabs and launches.

    N and M stay below 2³¹; addresses are 64-bit. With ``upper_triangle``, for a symmetric s, tiles below the diagonal
    are not computed and their partials not written; a whole tile may lie past N or M. With ``exact`` fp32 products
    never use TF32. results: how many each row and column has, and so how often a tile has partials for them.
    registers: `plan.most_registers`, for an epilogue that needs them.
    """

    def __init__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        tile: tiles.Sweep,
        upper_triangle: bool = False,
        exact: bool = False,
        results: int = 1,
        registers: dict[str, int] | None = None,
    ) -> None:
        self.N, self.M, self.upper_triangle, self.tile = len(a), len(b), upper_triangle, tile
        self.BN, self.BM = tile.BN, tile.BM
        self.results, self.registers = results, registers or {}
        self.edges: tuple | None = None
        self.precision = "ieee" if exact or planning.kind(a.dtype) == "ieee" else "tf32"
        multiple = 16 // a.element_size() if tile.tma else 16
        self.a, self.b = aligned_rows(a, multiple), aligned_rows(b, multiple)
        # For the upper triangle row blocks and column blocks end together, so that every pair of row blocks has the
        # same number of tiles.
        unit = max(tile.BN, tile.BM) if upper_triangle else 1
        self.row_blocks = triton.cdiv(triton.cdiv(self.N, unit) * unit, tile.BN)
        self.column_blocks = triton.cdiv(triton.cdiv(self.M, unit) * unit, tile.BM)

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Yield (first row block, number of row blocks) of each slab, whose partials are O(N + M)."""
        for first in range(0, self.row_blocks, self.slab_blocks):
            yield first, min(self.slab_blocks, self.row_blocks - first)

    @property
    def slab_blocks(self) -> int:
        """Row blocks in a slab, for one partial per row and column block, and one per column and row block."""
        entries = self.results * (self.M + self.tile.BN * self.column_blocks)
        multiple = max(self.tile.BM // self.tile.BN, 2) if self.upper_triangle else 1  # row blocks go in pairs
        blocks = max(triton.cdiv(tiles.MIN_SLAB_BLOCKS, self.results), tiles.SLAB_ENTRIES // entries)
        return min(self.row_blocks, triton.cdiv(blocks, multiple) * multiple)

    def run(self, epilogue: Any, state: tuple, first: int, blocks: int) -> None:
        """Launch one slab."""
        a, b, tile = self.a, self.b, self.tile
        rows, columns = self.numbering(first, blocks)
        programs = rows * columns
        if tile.persistent:
            programs = min(programs, tile.persistent * planning.processors(a.device))
        sweep_kernel[(programs,)](
            TensorDescriptor.from_tensor(a, [tile.BN, tile.BK]) if tile.tma else a,
            TensorDescriptor.from_tensor(b, [tile.BM, tile.BK]) if tile.tma else b,
            a.stride(0), b.stride(0), self.N, self.M, a.shape[1],
            first, blocks, rows, columns, self.column_blocks, self.edges, state,
            EPILOGUE=epilogue, PRECISION=self.precision, TMA=tile.tma, PERSISTENT=tile.persistent > 0,
            BN=tile.BN, BM=tile.BM, BK=tile.BK, GROUP=tiles.GROUP, UPPER=self.upper_triangle,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True, **self.registers,
        )  # fmt: skip

    def numbering(self, first: int, blocks: int) -> tuple[int, int]:
        """(rows, columns) of the grid of a slab's tiles; for the upper triangle two row blocks share a row."""
        if not self.upper_triangle:
            return blocks, self.column_blocks
        rows = triton.cdiv(blocks, 2)
        longest, shortest = (i * self.tile.BN // self.tile.BM for i in (first, first + 2 * rows - 1))
        return rows, 2 * self.column_blocks - longest - shortest

    def empty_partials(
        self, *dtypes: torch.dtype | None, columns: bool = True
    ) -> list[tuple[torch.Tensor | None, ...]]:
        """Empty partials of a slab: of each dtype one value per row of every tile, and one per column; None for None.

        Without ``columns`` those of columns are None.

        Those of rows are [column block, row of the slab], those of columns [row block of the slab, column]. Several
        results for each row are [results, …].
        """
        _, rows, cols = self.partial_counts
        shapes = [(n,) if self.results == 1 else (self.results, n) for n in (rows, cols)]
        return [
            tuple(None if dtype is None or shape is None else self.a.new_empty(shape, dtype=dtype) for dtype in dtypes)
            for shape in (shapes[0], shapes[1] if columns else None)
        ]

    @property
    def partial_counts(self) -> tuple[int, int, int]:
        """How many results each row and column has, and the number of row and of column partials for one result."""
        blocks = self.slab_blocks
        return self.results, blocks * self.tile.BN * self.column_blocks, blocks * self.M


class EdgeSweep(Sweep):
    """One pass over the scores of every edge (p, q) of a graph, those of a[p] and b[q]; a [L, N, D], b [R, M, D].

    The row blocks of the edges stand one below another, and a slab holds whole edges.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, edges: torch.Tensor, tile: tiles.Sweep) -> None:
        super().__init__(a.flatten(0, 1), b.flatten(0, 1), tile)
        (L, self.N, _), (R, self.M, _) = a.shape, b.shape
        self.edge_blocks, self.column_blocks = triton.cdiv(self.N, tile.BN), triton.cdiv(self.M, tile.BM)
        self.row_blocks = len(edges) * self.edge_blocks
        self.edges = (edges.contiguous(), self.edge_blocks, L * self.N, R * self.M)

    @property
    def slab_blocks(self) -> int:
        """Row blocks in a slab: as many edges as have few partials, at least one."""
        entries = self.edge_blocks * (self.M + self.tile.BN * self.column_blocks)
        return min(self.row_blocks, max(tiles.SLAB_ENTRIES // entries, 1) * self.edge_blocks)

    @property
    def edge_partials(self) -> tuple[int, int]:
        """The numbers of row and of column partials of one edge."""
        return self.edge_blocks * self.tile.BN * self.column_blocks, self.edge_blocks * self.M


class Chunk(Merging):
    """A pass over scores s [N, M] that PyTorch's matrix product has stored, with adjacent columns."""

    def __init__(self, s: torch.Tensor) -> None:
        self.s, (self.N, self.M), self.tile = s, s.shape, tiles.PASS
        self.BN, self.BM = self.tile.BR, self.tile.BM
        self.row_blocks = triton.cdiv(self.N, self.tile.BR)
        self.column_blocks = triton.cdiv(self.M, self.tile.BM)

    def run(self, epilogue: Any, state: tuple) -> None:
        """Launch the epilogue, for which the whole chunk is one slab."""
        tile = self.tile
        chunk_kernel[(self.row_blocks * self.column_blocks,)](
            self.s, self.s.stride(0), self.N, self.M, 0, self.row_blocks, state, EPILOGUE=epilogue,
            BN=tile.BR, BM=tile.BM, num_warps=tile.num_warps, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip

    def row_partials(self, *count: int) -> torch.Tensor:
        """Empty fp32 [*count, column blocks, rows of all row blocks]."""
        return self.s.new_empty(*count, self.column_blocks, self.row_blocks * self.tile.BR)

    def column_partials(self, *count: int) -> torch.Tensor:
        """Empty fp32 [*count, row blocks, M]."""
        return self.s.new_empty(*count, self.row_blocks, self.M)


def aligned_rows(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """x [N, D] if its rows start on 16 bytes and hold a multiple of `multiple` channels.

    Otherwise a copy with zero channels added, which change no score.
    """
    N, D = x.shape
    padding = -D % multiple
    if not padding and x.stride(1) == 1 and x.stride(0) >= D and x.stride(0) % multiple == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(N, D + padding)
    padded[:, :D] = x
    return padded


def nothing_kept(like: torch.Tensor, a: torch.Tensor, keep: str) -> torch.Tensor:
    """What a kernel that keeps nothing returns: a tensor like ``like``, of the shape that `dense.kept_shape` gives."""
    return like.new_empty((0, a.shape[1]) if keep == "means" else 0)


def empty_dscores(a: torch.Tensor, M: int) -> torch.Tensor:
    """Empty dscores [N, M], fp32 for fp16 inputs, else in a's dtype; rows start on 16 bytes unless they are short."""
    dtype = a.dtype if a.dtype != torch.float16 else torch.float32
    return a.new_empty(len(a), M + (-M % 16 if M > 64 else 0), dtype=dtype)[:, :M]


def gradients_by_row_panels(
    a: torch.Tensor,
    b: torch.Tensor,
    tile: tiles.Sweep,
    needs: list[bool],
    count: int,
    launch: Callable[[Sweep, int, int, torch.Tensor | None, torch.Tensor], None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of many bf16 scores, of which only the dscores of one row panel are stored at a time, in bf16.

        for each row panel R:   a sweep leaves the sums of its tiles and stores dscores [R, M];
                                da[R] = dscores b,   db += dscoresᵀ a[R]

    Both products are PyTorch's, summed in fp32. In chunks (`gssf_kernels/dense.py`) PyTorch's product stores s, a pass
    turns it into dscores, and a cast rounds those: 22 bytes of memory traffic per score; row panels need 6. Returns
    (Σ_j ds_ij b_j [N, D], Σ_i ds_ij a_i [M, D], sums [count] fp64); gradients are fp32, empty if not needed.

    launch(sweep, first, blocks, dscores, partial) sweeps row blocks [first, first + blocks), stores their
    dscores [·, M] if it is not None, and fills partial [count, blocks times sweep.column_blocks] fp32, by tile.
    """
    sweep, N, M = Sweep(a, b, tile), len(a), len(b)
    BN, step = tile.BN, max(min(sweep.row_blocks, tiles.ROW_PANEL_SCORES // (M * tile.BN)), 1)
    da = a.new_empty(a.shape if needs[0] else 0, dtype=torch.float32)
    db = b.new_empty(b.shape if needs[1] else 0, dtype=torch.float32)
    dscores = empty_dscores(a[: step * BN], M) if any(needs) else None
    sums = a.new_empty(triton.cdiv(sweep.row_blocks, step), count, dtype=torch.float64)
    for first in planning.starts(sweep.row_blocks, step):
        blocks, rows = min(step, sweep.row_blocks - first), slice(first * BN, min((first + step) * BN, N))
        partial = da.new_empty(count, blocks * sweep.column_blocks)
        launch(sweep, first, blocks, dscores, partial)
        torch.sum(partial, 1, dtype=torch.float64, out=sums[first // step])
        if dscores is None:
            continue
        panel = dscores[: rows.stop - rows.start]
        if needs[0]:
            _library.product(panel, b, da[rows])
        if needs[1]:
            _library.product(panel.mT, a[rows], db, add=first > 0)
    return da, db, sums.sum(0)
