"""An item's results against fp64 truth: how far off, how far off they may be, and where they are wrong.

Truth is the definition in fp64 on the same inputs. A result may be twice as far off as the same definition in the
inputs' own dtype, and a rounding more: the norm of the whole, and the worst row of it, so that one wrong row of
thousands is seen. Of scores that are exact every index must be the true one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import gssf_kernels as gk
from bench.light.items import Item

# An ulp of the result itself.
FLOOR = {torch.float32: 1.2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-14}
TF32_FLOOR = 4e-3  # of ten bits, four roundings: two operands, which may be rounded or cut off
# Times plain PyTorch's own error. A single number's is one draw, and may be near 0 by chance.
ALLOWED, ALLOWED_OF_NUMBER = 2, 8

Results = dict[str, Tensor]


def results(item: Item, module: Any, tensors: Results, options: dict[str, Any]) -> Results:
    """Outputs, and as "d name" the gradient of every input."""
    outputs = item.run(module, tensors, options)
    floating = {name: t for name, t in outputs.items() if t.is_floating_point() and t.requires_grad}
    gradients = {}
    if floating:  # ranks have none
        upstream = [_upstream(t) for t in floating.values()]
        grads = torch.autograd.grad(list(floating.values()), list(tensors.values()), upstream, allow_unused=True)
        gradients = {f"d {name}": g for name, g in zip(tensors, grads, strict=True) if g is not None}
    return {**{name: t.detach() for name, t in outputs.items()}, **gradients}


def _upstream(output: Tensor) -> Tensor:
    """A gradient of an output: few bits, other at every place; none where the output is -inf."""
    places = torch.arange(output.numel(), device=output.device).view(output.shape)
    weights = (((places * 7) % 5 - 2) / 4 if output.dim() else torch.ones_like(places)).to(output.dtype)
    return torch.where(output.detach().isinf(), 0, weights)


def truth(item: Item, tensors: Results, options: dict[str, Any]) -> tuple[Results, Results]:
    """(the definition in fp64, the definition in the inputs' dtype)."""
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    wide_options = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    exact = results(item, gk.reference, wide, wide_options)
    return exact, results(item, gk.reference, tensors, options)


class Gap(NamedTuple):
    """How far a result is from the truth, in shares of the truth: of the whole, and of its worst row."""

    whole: float
    row: float


def gap(result: Tensor, exact: Tensor, size: float = 0.0) -> Gap:
    """Infinite where one of them is no number at another place than the other; size: the least that counts as 1."""
    if result.shape != exact.shape:
        return Gap(float("inf"), float("inf"))
    rows = row_gaps(result, exact)
    finite = exact.isfinite()
    difference = torch.where(finite, result.double() - exact.double(), 0)
    whole = float(difference.norm() / torch.where(finite, exact.double(), 0).norm().clamp_min(max(size, 1e-300)))
    worst = float(rows.max()) if rows.numel() else 0.0
    if worst == float("inf") or whole != whole:
        return Gap(float("inf"), float("inf"))
    return Gap(whole, worst if exact.dim() else whole)


def size_of_number(name: str, tensors: Results, exact: Results) -> float:
    """What the gradient of a number (κ, β, τ, λ) is measured by: it is a sum of terms that cancel.

    By s = x yᵀ the terms of κ's are those of ⟨x, dx⟩ / κ, whose sizes add up to no more than ‖x‖ ‖dx‖ / κ.
    """
    rows = [(t.detach(), exact[f"d {k}"]) for k, t in tensors.items() if t.dim() and f"d {k}" in exact]
    size = max((float(t.norm() * gradient.norm()) for t, gradient in rows), default=0.0)
    return size / abs(float(tensors[name.removeprefix("d ")].detach()))


def row_gaps(result: Tensor, exact: Tensor) -> Tensor:
    """[rows] of the distance of each row, in shares of its size or of the usual row's, whichever is larger."""
    result, exact = (t.double().reshape(t.shape[0] if t.dim() else 1, -1) for t in (result, exact))
    same = (result == exact) | (result.isnan() & exact.isnan())
    difference = torch.where(same, 0, result - exact).norm(dim=1)
    size = torch.where(exact.isfinite(), exact, 0).norm(dim=1)
    usual = size.square().mean().sqrt()
    gaps = difference / torch.maximum(size, usual).clamp_min(1e-300)
    return torch.where(gaps.isnan(), float("inf"), gaps)


class Verdict(NamedTuple):
    """A result by name: its error over the allowed one, and which of its rows are wrong."""

    name: str
    share: float  # 1: just allowed
    wrong: list[int]


def judge(item: Item, tensors: Results, ours: Results, exact: Results, plain: Results) -> list[Verdict]:
    """A verdict on every result; tensors: the item's inputs."""
    verdicts = []
    if set(ours) != set(exact):
        return [Verdict(f"results {sorted(ours)} where {sorted(exact)} are due", float("inf"), [])]
    for name, right in exact.items():
        result = ours[name]
        if not right.is_floating_point():
            wrong = (result != right).nonzero().flatten().tolist()
            verdicts.append(Verdict(name, float("inf") if wrong else 0.0, wrong))
            continue
        floor = TF32_FLOOR if item.product == "tf32" and not item.exact else FLOOR[result.dtype]
        size = size_of_number(name, tensors, exact) if name.startswith("d ") and not right.dim() else 0.0
        off, usual = gap(result, right, size), gap(plain[name], right, size)
        times = ALLOWED if right.dim() else ALLOWED_OF_NUMBER
        allowed = Gap(times * usual.whole + floor, times * usual.row + 2 * floor)
        share = max(off.whole / allowed.whole, off.row / allowed.row)
        wrong = []
        if not share <= 1:
            wrong = (row_gaps(result, right) > allowed.row).nonzero().flatten().tolist()
        verdicts.append(Verdict(name, share, wrong))
    return verdicts


def equal_bits(first: Results, second: Results) -> bool:
    """Whether two runs gave the same bits, NaN for NaN."""
    return all(
        first[name].shape == second[name].shape and bool(torch.equal(_bits(first[name]), _bits(second[name])))
        for name in first
    )


def _bits(t: Tensor) -> Tensor:
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.contiguous().view(whole)


def describe(verdict: Verdict, ours: Results, exact: Results, tile: tuple[int, int]) -> dict[str, Any]:
    """Where a result is wrong: the first place with value and truth, and what the wrong places share.

    tile: BN, BM of the sweep; a result of columns ("col…", "d y", "d b") lies in column blocks of BM.
    """
    if verdict.name not in exact:
        return {"result": verdict.name}
    result, right = ours[verdict.name], exact[verdict.name]
    if result.shape != right.shape:
        return {"result": verdict.name, "shape": list(result.shape), "expected": list(right.shape)}
    count = result.shape[0] if result.dim() else 1
    about: dict[str, Any] = {"result": verdict.name, "wrong rows": len(verdict.wrong), "of": count}
    differs = (result.double() - right.double()).abs()
    differs = torch.where(differs.isnan() & ~(result.isnan() & right.isnan()), float("inf"), differs)
    rows = verdict.wrong or ([int(differs.reshape(len(differs), -1).amax(1).argmax())] if result.dim() else [])
    place: tuple[int, ...] = ()
    if result.dim():
        place = (rows[0],)
        if result.dim() > 1:
            channel = int(differs[rows[0]].flatten().argmax())
            place += (channel,)
    flat = result[place[0]].flatten()[place[1]] if len(place) > 1 else result[place]
    true = right[place[0]].flatten()[place[1]] if len(place) > 1 else right[place]
    about |= {"first": list(place), "value": float(flat), "truth": float(true)}
    about["nan"] = bool(result.isnan().any()) if result.is_floating_point() else False
    if not result.dim() or not verdict.wrong:
        return about
    by_column = verdict.name.startswith(("col", "d y", "d b"))
    width = tile[1] if by_column else tile[0]
    blocks = sorted({i // width for i in verdict.wrong})
    kind = "tile column" if by_column else "tile row"
    about["share"] = f"{kind} {blocks[0]}" if len(blocks) == 1 else f"{len(blocks)} {kind}s: {blocks[:8]}"
    if result.dtype == torch.int64:
        places = result[verdict.wrong]
        named_width = tile[0] if by_column else tile[1]
        theirs = sorted({int(p) // named_width for p in places[:1000]})
        if len(theirs) == 1:
            about["share"] += f", and all name one {'tile row' if by_column else 'tile column'}: {theirs[0]}"
        about["diagonal"] = bool((places.cpu() == torch.tensor(verdict.wrong)).all())
    elif result.dim() > 1:
        channels = (row_gaps(result.mT.contiguous(), right.mT.contiguous()) > 1e-2).nonzero().flatten()
        about["channels"] = [int(channels.min()), int(channels.max())] if channels.numel() else []
    return about
