"""Plants one fault at a time in a copy of the sources and sees that a test catches it.

    make mutate        (python tests/mutate.py [NAME ...], about ten minutes: most faults need a rebuild)

A fault is a file, a piece of its text, what takes its place, and the test files that must fail. A fault
that survives, or whose text is no longer there, makes the run fail.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Fault:
    name: str
    file: str
    text: str
    instead: str
    tests: str = "tests/test_definition.py tests/test_values.py tests/test_contracts.py"


GOAL = "tests/test_goal.py"
HOPPER = "tests/test_hopper.py"
PERSISTENT = "tests/test_persistent.py"
SMALL = "tests/test_small_triton.py"
FEW = "tests/test_few_triton.py"
FAULTS = [
    Fault(
        "sign: the margin is subtracted",
        "csrc/terms.cpp",
        "return margin + row[i]",
        "return -margin + row[i]",
    ),
    Fault(
        "direction: columns give the rows' terms",
        "csrc/terms.cpp",
        "return margin + col[i]",
        "return margin + row[i]",
    ),
    Fault(
        "mask: the diagonal stays a negative",
        "csrc/epilogues.h",
        "pair_score_[i] = score;\n      score = kNone;",
        "pair_score_[i] = score;",
    ),
    Fault(
        "mask: ids are compared with the wrong row",
        "csrc/epilogues.h",
        "has_ids ? row_id_.data() + i0 : nullptr",
        "has_ids ? row_id_.data() : nullptr",
    ),
    Fault(
        "small: a row's log-sum is that of its first parts",
        "gssf_kernels/kernels/logsumexp.py",
        "lane, rows, across, N, BP, BL",
        "lane, rows, 1, N, BP, BL",
        SMALL,
    ),
    Fault(
        "small: scores past M get a share of a row's gradient in κ",
        "gssf_kernels/kernels/logsumexp.py",
        "tl.where((j < M)[None, :], g * s, 0.0)",
        "g * s",
        SMALL,
    ),
    Fault(
        "small: one side given twice gets the rows' half alone",
        "gssf_kernels/kernels/gradients.py",
        "if SAME:",
        "if SAME and N < 0:",
        SMALL,
    ),
    Fault(
        "small: gradients of scores are rounded to halves",
        "gssf_kernels/kernels/gradients.py",
        "dtype = a.dtype if a.dtype != torch.float16 else torch.float32",
        "dtype = a.dtype",
        SMALL,
    ),
    Fault(
        "small: a pair's own score gets what its row's slopes are, not its column's",
        "gssf_kernels/kernels/gradients.py",
        "for p0 in range(0, down, BP):",
        "for p0 in range(0, 0 * down, BP):",
        SMALL,
    ),
    Fault(
        "small: columns past N have a pair of score 0",
        "gssf_kernels/kernels/sums.py",
        "same, inside & (j < N)[None, :], KIND",
        "same, inside, KIND",
        SMALL,
    ),
    Fault(
        "small: the mean's share is forgotten on the way back",
        "gssf_kernels/kernels/sums.py",
        "factor = upstream * share * number",
        "factor = upstream * number",
        SMALL,
    ),
    Fault(
        "small: by a metric, y's gradient goes through W as x's does",
        "gssf_kernels/kernels/project.py",
        "NORMALIZE, True, False,",
        "NORMALIZE, True, True,",
        SMALL,
    ),
    Fault(
        "small: by a metric, rows that are not normalised are gathered",
        "gssf_kernels/kernels/project.py",
        "above, below, normalize, norm)",
        "above, below, False, norm)",
        SMALL,
    ),
    Fault(
        "few: y goes through the diagonal too",
        "gssf_kernels/kernels/project.py",
        "y, None, y_out, None, None, None,",
        "y, None, y_out, diag, None, None,",
        FEW,
    ),
    Fault(
        "few: weights' gradients take the lengths of other rows",
        "gssf_kernels/kernels/pairs.py",
        "i = (p - of_rows) * BE + tl.arange(0, BE)",
        "i = (p - of_rows) + tl.arange(0, BE)",
        SMALL,
    ),
    Fault(
        "few: columns' terms are the rows'",
        "gssf_kernels/kernels/hardest.py",
        "col, over_col = hinge(p, col, margin)",
        "col, over_col = row, over_row",
        FEW,
    ),
    Fault(
        "few: GOAL's columns get the gradient of the rows",
        "gssf_kernels/kernels/goal.py",
        'n = tl.load(col + i, mask=i < N, other=float("-inf"))\n    col_pull',
        'n = tl.load(row + i, mask=i < N, other=float("-inf"))\n    col_pull',
        FEW,
    ),
    Fault(
        "few: GOAL's cir forgets its half",
        "gssf_kernels/kernels/goal.py",
        "- n * n - 0.5)",
        "- n * n)",
        FEW,
    ),
    Fault(
        "few: a row is its own positive",
        "gssf_kernels/kernels/batch_hard.py",
        "met = inside & same & (i[:, None] != j[None, :])",
        "met = inside & same",
        FEW,
    ),
    Fault(
        "few: a row's positive does not hear of it",
        "gssf_kernels/kernels/batch_hard.py",
        "tl.where(far == i, -weight, 0.0)",
        "0.0",
        FEW,
    ),
    Fault(
        "batch-hard: a row's positive is pulled on one side alone",
        "gssf_kernels/statistics/batch_hard.py",
        "torch.cat((weight, -weight)).repeat(2)",
        "torch.cat((weight, -weight, weight, 0 * weight))",
        "tests/test_batch_hard.py",
    ),
    Fault(
        "GOAL: an anchor without a negative is pulled",
        "gssf_kernels/statistics/goal.py",
        "(grad * torch.where(found, w, 0) for w in weights)",
        "(grad * w.nan_to_num(0, 0, 0) for w in weights)",
        GOAL,
    ),
    Fault(
        "dense: db keeps the last chunk alone",
        "gssf_kernels/dense.py",
        "Right(part, dtype).product(ds.mT, db, add=first > 0)",
        "Right(part, dtype).product(ds.mT, db)",
        "tests/test_info_nce.py",
    ),
    Fault(
        "symmetric sums: the gradient of one side alone",
        "gssf_kernels/statistics/sums.py",
        "da = da.mul_(2) if da is not None",
        "da = da.mul_(1) if da is not None",
        "tests/test_products.py",
    ),
    Fault(
        "products: a part of the channels alone",
        "csrc/vector_product.h",
        "add ? load<V>(c + r * c_row + v * L) : V{}",
        "V{}",
        "tests/test_products.py",
    ),
    Fault(
        "bf16 products: a part of the channels alone",
        "csrc/bf16.cpp",
        ".add = add || l > 0",
        ".add = add",
        "tests/test_products.py",
    ),
    Fault(
        "bf16 products: columns behind the last whole panel forget what they are added to",
        "csrc/bf16.cpp",
        "add ? to[r * c_row + at] + sum : sum",
        "sum",
        "tests/test_products.py",
    ),
    Fault(
        "bf16 products: a panel's part begins at a column inside it",
        "gssf_kernels/dense.py",
        "self.width = 64 if unit else 32",
        "self.width = 32",
        "tests/test_products.py",
    ),
    Fault(
        "bf16 products: numbers are cut off, not rounded",
        "csrc/vector_product.h",
        "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16",
        "bits >> 16",
        "tests/test_products.py",
    ),
    Fault(
        "certified: what b's rounding loses is left out of the bound",
        "csrc/certified.h",
        "lost * norm + mine * residue + sum_",
        "lost * norm + sum_",
        "tests/test_certified.py",
    ),
    Fault(
        "certified: a line's bound is its largest rounded score",
        "csrc/certified.h",
        "static_cast<float>(top - error), kNone)",
        "static_cast<float>(top + error), kNone)",
        "tests/test_certified.py",
    ),
    Fault(
        "certified: exact ties to the highest index",
        "csrc/certified.h",
        "(other == score && at < index)",
        "(other == score && at > index)",
        "tests/test_certified.py",
    ),
    Fault(
        "certified on a GPU: what the other side's rounding loses is left out of the bound",
        "gssf_kernels/kernels/certified.py",
        "+ norm * block_lost + gamma",
        "+ gamma",
        "tests/test_certified_triton.py",
    ),
    Fault(
        "certified on a GPU: a line's best is at least its largest rounded score",
        "gssf_kernels/kernels/certified.py",
        "tl.where(bounded, s - bound, float",
        "tl.where(bounded, s + bound, float",
        "tests/test_certified_triton.py",
    ),
    Fault(
        "certified on a GPU: only a tile's best is made again",
        "gssf_kernels/kernels/certified.py",
        "        scan = seconds\n",
        "        scan = seconds\n        part = tl.full([BL], 0, tl.int32) + parts\n",
        "tests/test_certified_triton.py",
    ),
    Fault(
        "certified on a GPU: positives of a tile made whole are not left out",
        "gssf_kernels/kernels/certified.py",
        "counted &= mine != tl.load",
        "counted &= mine != 1 + tl.load",
        "tests/test_certified_triton.py",
    ),
    Fault(
        "certified on a GPU: sums folded by neighbours",
        "gssf_kernels/kernels/certified.py",
        "[j.shape[0], j.shape[1], 2, total.shape[2] // 2]), 2)",
        "[j.shape[0], j.shape[1], total.shape[2] // 2, 2]), 3)",
        "tests/test_certified_triton.py",
    ),
    Fault(
        "certified on a GPU: a slab forgets what columns are at least",
        "gssf_kernels/kernels/certified.py",
        "        tl.store(low + i, least, mask=inside)\n",
        "",
        "tests/test_certified_triton.py",
    ),
    Fault(
        "dense: scores kept for the backward are written over",
        "gssf_kernels/dense.py",
        "            s.copy_(known[first : first + rows])\n",
        "            s = known[first : first + rows]\n",
        "tests/test_autograd.py",
    ),
    Fault(
        "dense: InfoNCE is the sum of its directions",
        "csrc/terms.cpp",
        "+ cl[i])) / 2;",
        "+ cl[i]));",
        "tests/test_info_nce.py",
    ),
    Fault(
        "dense: a pair's two places count once in the student's gradient",
        "gssf_kernels/statistics/relations.py",
        "dh.mul_(2)",
        "dh.mul_(1)",
        "tests/test_distillation.py",
    ),
    Fault(
        "dense: SigLIP's positives have the sign of negatives",
        "gssf_kernels/losses/sigmoid.py",
        '"negate", x_ids',
        '"include", x_ids',
        "tests/test_sums.py",
    ),
    Fault(
        "bench: a wrong variant is timed",
        "bench/measure.py",
        "if not e <= a]",
        "if e != e]",
        "tests/test_bench.py",
    ),
    Fault(
        "bench: ratios of the wrong way round",
        "bench/results.py",
        "theirs / ours for theirs, ours in pairs",
        "ours / theirs for theirs, ours in pairs",
        "tests/test_bench.py",
    ),
    Fault("tie: the later index wins in a tile", "csrc/vector_maxima.h", "(v > m) |", "(v >= m) |"),
    Fault("tie: the later tile wins", "csrc/epilogues.h", "return v > m ||", "return v >= m ||"),
    Fault("NaN: not sticky", "csrc/vector_maxima.h", "((v != v) & (m == m))", "((v != v) & (m != m))"),
    Fault(
        "edge: the last column of a tile is dropped",
        "csrc/factors.h",
        ".m = at.m,",
        ".m = at.m - 1,",
    ),
    Fault(
        "edge: padding behind a tile is not cleared",
        "csrc/epilogues.h",
        "i < n && m % Simd<A>::lanes; ++i",
        "i < 0 && m % Simd<A>::lanes; ++i",
    ),
    Fault(
        "stride: the tile's rows are read too close",
        "csrc/vector_maxima.h",
        "s + i * kTileMost + j",
        "s + i * (kTileMost - 1) + j",
    ),
    Fault(
        "offset: column maxima carry the tile's own row numbers",
        "csrc/epilogues.h",
        "cols_.fold(at.j0, at.m, found.cols, at.i0)",
        "cols_.fold(at.j0, at.m, found.cols, 0)",
    ),
    Fault(
        "sum: a tile's maximum does not join when a greater one comes",
        "csrc/epilogues.h",
        "(loser.sum + 1) * std::exp",
        "loser.sum * std::exp",
        "tests/test_relative.py",
    ),
    Fault(
        "mask: a column's own maximum is one of its terms",
        "csrc/vector_relative.h",
        "close & (col_index != static_cast<Lane>(i))",
        "close",
        "tests/test_relative.py",
    ),
    Fault(
        "tie: maxima of two tiles that are equal count as a distance of 0",
        "csrc/epilogues.h",
        "winner.ties += loser.ties + 1",
        "winner.ties += loser.ties",
        "tests/test_relative.py",
    ),
    Fault(
        "scale: dx is not divided by the norm",
        "csrc/vector_project.h",
        "(row[k] - xhat[k] * along) / divisor",
        "(row[k] - xhat[k] * along)",
    ),
    Fault(
        "transpose: dx goes through B instead of its transpose",
        "csrc/vector_project.h",
        "weights.transposed, g, scratch.out",
        "weights.blocks, g, scratch.out",
    ),
    Fault(
        "chunk: rows past the first chunk use its offset",
        "csrc/project.cpp",
        "p.mutable_data_ptr<scalar_t>() + first * dim",
        "p.mutable_data_ptr<scalar_t>()",
    ),
    Fault(
        "backward: a destination's last edge is dropped",
        "csrc/vector_base.h",
        "g < groups.first[d + 1]; ++g",
        "g + 1 < groups.first[d + 1]; ++g",
    ),
    Fault(
        "backward: grad_output is ignored",
        "csrc/terms.cpp",
        "const A g = above[i * stride] / share;",
        "const A g = A(1) / share;",
    ),
    Fault(
        "transpose: y's gradient goes through Wᵀ too",
        "gssf_kernels/statistics/hardest.py",
        "None if blocks is None else blocks.mT",
        "blocks",
    ),
    Fault(
        "scale: gathered rows are not normalised",
        "csrc/vector_base.h",
        "const A weight = normalize ? grad[e] / norm_divisor(std::sqrt(dot<A>(row, row, dim))) : grad[e];",
        "const A weight = grad[e];",
    ),
    Fault(
        "GOAL: what comes from above is dropped",
        "gssf_kernels/losses/gradient_space.py",
        "return None, -grad * positive_weight, grad * negative_weight, None, None",
        "return None, -positive_weight, negative_weight, None, None",
        GOAL,
    ),
    Fault(
        "GOAL: columns are weighed with the rows' relative negatives",
        "gssf_kernels/losses/gradient_space.py",
        "close[1], weights",
        "close[0], weights",
        GOAL,
    ),
    Fault(
        "GOAL: an anchor is among its own relative positives",
        "gssf_kernels/statistics/relative.py",
        " - inside * torch.exp(decay * (p - least))",
        "",
        GOAL,
    ),
    Fault(
        "GOAL: tied positives stay in the divisor",
        "gssf_kernels/statistics/relative.py",
        "size = below - inside * ties",
        "size = below - inside.long()",
        GOAL,
    ),
    Fault(
        "GOAL: the negative threshold is added",
        "gssf_kernels/statistics/hardest.py",
        ".min() - relative.negative_threshold",
        ".min() + relative.negative_threshold",
        GOAL,
    ),
    Fault(
        "GOAL: cir squares no negative",
        "gssf_kernels/statistics/goal.py",
        "- s.negative.square() - 0.5",
        "- s.negative - 0.5",
        GOAL,
    ),
    Fault(
        "batch-hard: a row is its own positive",
        "gssf_kernels/statistics/positives.py",
        "s.diagonal(i0 - j0)",
        "s.diagonal(j0 - i0)",
        "tests/test_batch_hard.py",
    ),
    Fault(
        "batch-hard: a later tile wins a tie",
        "gssf_kernels/statistics/positives.py",
        "wins = (least < best)",
        "wins = (least <= best) & (least < torch.inf)",
        "tests/test_batch_hard.py",
    ),
    Fault(
        "batch-hard: a later tile of the GPU's kernel wins a tie",
        "gssf_kernels/kernels/positives.py",
        "better = (new_score > score)",
        'better = (new_score >= score) & (new_score > float("-inf"))',
        "tests/test_mining_triton.py",
    ),
    Fault(
        "GPU: a loss looks at a value",
        "gssf_kernels/diagnostics.py",
        "found = negative != -torch.inf  # NaN is found",
        "found = negative != (-torch.inf if float(negative.sum()) else torch.inf)",
        "tests/test_capture.py",
    ),
    Fault(
        "warm-up: it goes from the hardest to all",
        "gssf_kernels/losses/triplet.py",
        '(1 - share) * self._loss(x, y, x_ids, y_ids, "all", False) + share * hardest',
        'share * self._loss(x, y, x_ids, y_ids, "all", False) + (1 - share) * hardest',
        "tests/test_warmup.py",
    ),
    Fault(
        "diagnostics: columns past N count",
        "gssf_kernels/diagnostics.py",
        "hardest.col_score.detach()[:count]",
        "hardest.col_score.detach()[-count:]",
        "tests/test_diagnostics.py",
    ),
    Fault(
        "persistent: a program makes its first tile alone",
        "gssf_kernels/kernels/sweep.py",
        "tl.range(tl.program_id(0), rows * columns, tl.num_programs(0)",
        "tl.range(tl.program_id(0), tl.num_programs(0), tl.num_programs(0)",
        PERSISTENT,
    ),
    Fault(
        "persistent: half of the tiles, and some below the diagonal",
        "gssf_kernels/kernels/sweep.py",
        "column < length, row, 2 * rows - 1 - row",
        "column < length, row, 2 * rows - 2 - row",
        PERSISTENT,
    ),
    Fault(
        "persistent: the epilogue's branches wait for the products, each for itself",
        "gssf_kernels/kernels/sweep.py",
        "        s = complete(s)\n",
        "        pass\n",
        "tests/test_lowering.py",
    ),
    Fault(
        "hopper: a stage is released while its products run",
        "csrc/cuda/hardest_sweep.h",
        "    chip::all_but_one_over();\n    if (k > 0) release(before);",
        "    release(ring.stage);\n    chip::all_but_one_over();",
        HOPPER,
    ),
    Fault(
        "hopper: no wait for a full stage",
        "csrc/cuda/hardest_sweep.h",
        "    chip::wait(&shared.full[ring.stage], ring.parity);\n",
        "",
        HOPPER,
    ),
    Fault(
        "hopper: parity of the first use",
        "csrc/cuda/hardest_layout.h",
        "parity(step / STAGES & 1)",
        "parity(0)",
        HOPPER,
    ),
    Fault(
        "hopper: teams multiply out of turn",
        "csrc/cuda/hardest_sweep.h",
        "if (Tile::TEAMS == 2) chip::wait(&shared.turn",
        "if (false) chip::wait(&shared.turn",
        HOPPER,
    ),
    Fault(
        "hopper: maxima read before all warps wrote them",
        "csrc/cuda/hardest_epilogue.h",
        "  chip::sync(seat.barrier(), Tile::TEAM_THREADS);  // 1",
        "  // 1",
        HOPPER,
    ),
    Fault(
        "hopper: fewer bytes announced than come",
        "csrc/cuda/hardest_sweep.h",
        "Tile::STAGE_BYTES);",
        "Tile::STAGE_BYTES - 128);",
        HOPPER,
    ),
    Fault(
        "hopper: a step of 8 channels",
        "csrc/cuda/hardest_layout.h",
        "kInstruction * 2 / 16",
        "kInstruction / 16",
        HOPPER,
    ),
    Fault(
        "hopper: ids' ranges of the tile, not the warpgroup",
        "csrc/cuda/hardest_epilogue.h",
        "p.a_ranges[own / Tile::ROWS]",
        "p.a_ranges[own / Tile::BN]",
        HOPPER,
    ),
    Fault(
        "hopper: columns past M count",
        "csrc/cuda/hardest_epilogue.h",
        "row >= rows || column >= columns",
        "row >= rows",
        HOPPER,
    ),
]


def run(command, folder, **environment):
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
    )


def build(folder: Path) -> None:
    done = run([sys.executable, "setup.py", "build_ext", "--inplace"], folder)
    if done.returncode:
        raise SystemExit(f"the copy does not build:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def caught(fault: Fault, folder: Path) -> tuple[bool, str]:
    """(whether a test failed, the first that did)."""
    path = folder / fault.file
    original = path.read_text()
    if original.count(fault.text) == 0:
        return False, f"its text is no longer in {fault.file}"
    try:
        path.write_text(original.replace(fault.text, fault.instead))
        build(folder)  # one in Python too: it undoes that of the fault before
        done = run([sys.executable, "-m", "pytest", "-x", "-q", *fault.tests.split()], folder)
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        # 1: tests failed; negative: the process crashed. Anything else (nothing collected, say) catches nothing.
        found = done.returncode < 0 or (done.returncode == 1 and bool(failed))
        return found, failed[0][7:110] if failed else f"pytest exited with {done.returncode}"
    finally:
        path.write_text(original)


def main(names):
    faults = [f for f in FAULTS if not names or any(name in f.name for name in names)]
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "examples", "*.so", "build"))
        build(folder)
        clean = run([sys.executable, "-m", "pytest", "-x", "-q", *FAULTS[0].tests.split()], folder)
        if clean.returncode:
            raise SystemExit(f"the unchanged copy fails its tests:\n{clean.stdout[-3000:]}")
        for fault in faults:
            found, how = caught(fault, folder)
            survivors += not found
            print(f"{'caught  ' if found else 'SURVIVED'}  {fault.name}: {how}", flush=True)
    print(f"{len(faults) - survivors} of {len(faults)} faults caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
