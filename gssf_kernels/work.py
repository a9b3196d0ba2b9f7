"""What runs on the CPU, which `explain` says and streaming asks; and the FLOPs of an op or a launch.

    s = a bᵀ                            2 N M D; half of that if only the upper triangle is computed
    ds b, dsᵀ a                         2 N M D each
    a projection by blocks [G, b, b]    2 N D b

FLOPs are those of matrix products. A product counts once, even if a kernel repeats a part of it. Not counted is what is
linear in the sizes, and what depends on values: scores that certified mining computes again, and products within
segments of equal labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from gssf_kernels import _library, dense
from gssf_kernels.plan import Plan, Scores, fp32_products

# The least number of scores for certified mining on the CPU, by bf16 unit: `certified_least` in csrc/hardest.cpp.
CERTIFIED = {"amx": 1 << 18, "avx512_bf16": 1 << 20}


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether x and y are the same view of the same storage, for tensors without an address."""
    same_start = x.untyped_storage()._cdata == y.untyped_storage()._cdata and x.storage_offset() == y.storage_offset()
    return same_start and x.shape == y.shape and x.stride() == y.stride()


def native(name: str) -> bool:
    """Whether the op ``gssf::<name>`` is C++ on the CPU."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"gssf::{name}", "CPU")


def _packed(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """y [k, m] packed into panels (csrc/types.h), without values."""
    k, m = y.shape
    width = {torch.bfloat16: 64, torch.float64: 16}.get(dtype, 32)
    return y.new_empty(-(-m // width), -(-k // 32) * 32 if dtype == torch.bfloat16 else k, width, dtype=dtype)


# Fakes of the C++ ops that are registered in C++, without a fake.
FAKES: dict[str, Callable] = {"pack": _packed, "multiply": lambda x, panels, out, add: None}


def on_cpu(name: str, arguments: Mapping[str, Any]) -> Plan:
    """The plan of the op ``gssf::<name>`` on the CPU."""
    if not native(name):
        if _library.EXTENSION_ERROR is None:
            return Plan("pytorch", "a formula over other ops")
        return Plan("pytorch", "the compiled extension is not loaded (gk.backends())")
    if name not in ("hardest_negatives", "relative_negatives", "top_scores"):
        return Plan("c++", "the compiled extension")
    edges = arguments.get("edges")
    if edges is not None and len(edges):
        plan = on_cpu(name, {**arguments, "a": arguments["a"][0], "b": arguments["b"][0], "edges": None})
        return Plan(plan.route, f"{len(edges)} edges, {plan.why}")
    a, unit = arguments["a"], dense.bf16_unit()
    scores, dtype = Scores(a, arguments["b"]), str(a.dtype)[6:]
    if unit == "none":
        return Plan("c++", f"{scores}: a sweep that stores none; this processor has no bf16 unit")
    if _rounds(a):
        return Plan("c++", f"{scores}: a sweep that stores none, by the bf16 unit {unit}")
    if name == "relative_negatives" or a.dtype not in (torch.float32, torch.float16):
        return Plan("c++", f"{scores} of {dtype}: a sweep that stores none")
    if arguments.get("pair_starts") is not None:
        return Plan("c++", f"{scores} of {dtype} with listed pairs: a sweep that stores none")
    least = CERTIFIED[unit]
    if scores.count < least:
        return Plan("c++", f"{scores} of {dtype}, fewer than {least:,}: a sweep that stores none")
    return Plan("certified", f"{scores} of {dtype}, at least {least:,}: exact winners by the bf16 unit {unit}")


def _rounds(a: torch.Tensor) -> bool:
    """Whether a sweep multiplies bf16 numbers, a as it is or rounded, as csrc/hardest.cpp decides."""
    by_setting = a.dtype == torch.float32 and dense.bf16_unit() == "amx" and fp32_products("cpu") == "bf16"
    return dense.bf16_unit() != "none" and (a.dtype == torch.bfloat16 or by_setting)


PACKED_CHUNK = 16 << 20  # bytes, kChunkBytes of csrc/best.h


def packed_bytes(name: str, arguments: Mapping[str, Any]) -> int:
    """The bytes of a and b that a C++ sweep packs while it runs. The tile of each thread (1 MiB) is not counted."""
    if name not in ("hardest_negatives", "relative_negatives", "late_interaction", "top_scores", "score_counts"):
        return 0
    a, b = arguments["a"], arguments["b"]
    if name == "late_interaction":
        a, b = a.flatten(0, 1), b.flatten(0, 1)
        arguments = {"a": a, "b": b}
    if a.dim() == 3:  # one edge is packed at a time
        a, b = a[0], b[0]
        arguments = {**arguments, "a": a, "b": b, "edges": None}
    (N, D), M = a.shape, len(b)
    if name in ("top_scores", "score_counts"):  # b in chunks: csrc/best.h
        M = min(M, max(PACKED_CHUNK // (max(D, 1) * a.dtype.itemsize * 512), 1) * 512)
    if on_cpu(name, arguments).route == "certified" or (_rounds(a) and name != "score_counts"):
        row = 2 * -(-max(D, 1) // 32) * 32  # of bf16
        return row * (N + (0 if same(a, b) else M) + -(-M // 64) * 64)
    size, width = (8, 16) if a.dtype == torch.float64 else (4, 32)
    copied = a.dtype in (torch.float16, torch.bfloat16) or not a.is_contiguous()
    return size * D * (-(-M // width) * width + (N if copied else 0))


def native_flops(name: str, arguments: Mapping[str, Any]) -> int:
    """The FLOPs of a C++ op."""
    flops = _NATIVE.get(name)
    return flops(arguments) if flops is not None else 0


def _mined(arguments: Mapping[str, Any]) -> int:
    a, b, a_ids, b_ids = (arguments[name] for name in ("a", "b", "a_ids", "b_ids"))
    if a.dim() == 3:
        return 2 * len(arguments["edges"]) * a.shape[1] * b.shape[1] * a.shape[2]
    symmetric = arguments.get("symmetric") or same(a, b)
    symmetric = symmetric and (a_ids is None or same(a_ids, b_ids))
    return len(a) * len(b) * a.shape[1] * (1 if symmetric else 2)


def _scored(arguments: Mapping[str, Any]) -> int:
    return 2 * len(arguments["a"]) * len(arguments["b"]) * arguments["a"].shape[1]


def _interacted(a: torch.Tensor, b: torch.Tensor) -> int:
    return 2 * a.numel() * b.shape[0] * b.shape[1]


def _multiplied(arguments: Mapping[str, Any]) -> int:
    x, out = arguments["x"], arguments["out"]
    return 2 * len(x) * x.shape[1] * out.shape[1]


def _projected(products: Callable[[Mapping[str, Any]], int]) -> Callable[[Mapping[str, Any]], int]:
    def flops(arguments: Mapping[str, Any]) -> int:
        blocks = arguments["blocks"]
        return 0 if blocks is None else products(arguments) * 2 * arguments["x"].numel() * blocks.shape[1]

    return flops


def _x_and_blocks(arguments: Mapping[str, Any]) -> int:
    needs = arguments["needs"]  # of x, y, diag and blocks
    return 0 if arguments["dp"] is None else needs[0] + needs[3]


def _gathered(arguments: Mapping[str, Any]) -> int:
    needs, blocks = arguments["needs"], arguments["blocks"]
    rows = (needs[0] + needs[3]) * len(arguments["x"]) + needs[1] * len(arguments["y"])
    return 0 if blocks is None else 2 * rows * arguments["x"].shape[1] * blocks.shape[1]


_NATIVE: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "hardest_negatives": _mined,
    "relative_negatives": _scored,
    "top_scores": _scored,
    "score_counts": _scored,
    "late_interaction": lambda arguments: _interacted(arguments["a"], arguments["b"]),
    "multiply": _multiplied,
    "project": _projected(lambda arguments: 1),
    "project_backward": _projected(_x_and_blocks),
    "hardest_negatives_backward": _gathered,
}


def kernel_flops(kernel: Any, arguments: tuple, options: Mapping[str, Any]) -> int:
    """The FLOPs of a launch of a Triton kernel."""
    flops = KERNELS.get(kernel.__name__)
    return flops({**dict(zip(kernel.arg_names, arguments, strict=False)), **options}) if flops is not None else 0


def _swept(v: Mapping[str, Any]) -> int:
    if v["edges"] is not None:  # blocks are those of whole edges
        return v["blocks"] // v["edges"][1] * 2 * v["N"] * v["M"] * v["D"]
    rows = min(v["blocks"] * v["BN"], v["N"] - v["first"] * v["BN"])  # of this slab
    return rows * v["M"] * v["D"] * (1 if v["UPPER"] else 2)


def _gradients(v: Mapping[str, Any]) -> int:
    products = (v["da"] is not None) * (2 if v["SAME"] else 1) + (v["db"] is not None)
    return products * 2 * v["N"] * v["M"] * v["D"]


def _factors(v: Mapping[str, Any]) -> int:
    if v["blocks"] is None and v["dblocks"] is None:
        return 0
    x_products = (v["x_out"] is not None) + (v["dblocks"] is not None)
    y_products = v["WEIGHTED"] and v["y_out"] is not None
    return 2 * v["D"] * v["B"] * (x_products * v["N"] + y_products * v["M"])


# The FLOPs of each kernel with a `tl.dot`, from its arguments by name. `positives_kernel` is not here: its products
# depend on the labels.
KERNELS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "sweep_kernel": _swept,
    "gradients_kernel": _gradients,
    "late_interaction_kernel": lambda v: _interacted(v["a"], v["b"]),
    "regions_gradient_kernel": lambda v: _interacted(v["a"], v["b"]),  # by 0 and 1
    "words_gradient_kernel": lambda v: 0,  # but for best regions that it computes again, as many as gradients are not 0
    "relation_tile_kernel": lambda v: v["N"] * v["N"] * sum(v["channels"]),  # upper triangles
    "relation_loss_kernel": lambda v: 0 if v["dh"] is None else 2 * v["N"] * v["N"] * v["D"],
    "project_kernel": lambda v: 0 if v["blocks"] is None else 2 * v["N"] * v["D"] * v["B"],
    "parameter_kernel": lambda v: 0 if v["dblocks"] is None else 2 * v["N"] * v["D"] * v["B"],
    "sides_kernel": _factors,
    "top_scores_kernel": lambda v: 2 * len(v["keys"]) * v["M"] * v["D"] * (v["last_keys"] is None),  # seldom again
}


def library_flops(function: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> int:
    """The FLOPs of an op of PyTorch, from `torch.utils.flop_counter`."""
    from torch.utils.flop_counter import flop_registry

    flops = flop_registry.get(function.overloadpacket)
    if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):  # the counter does not know out_dtype
        args, kwargs = tuple(t for t in args if isinstance(t, torch.Tensor)), {}
    return int(flops(*args, **kwargs, out_val=result)) if flops is not None else 0
