"""No op returns two tensors of one memory, nor an input's: functionalisation and inductor may write into what it gives.

Every op is seen on every route that this machine has: C++ where there is any for the CPU, plain PyTorch, and the
launcher of Triton on tensors without values (`device_path.py`).
"""

import contextlib
import itertools

import pytest
import torch
from cases import CASES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import gssf_kernels as gk
from gssf_kernels import _library, dense, plan

pytest.importorskip("triton")

from gssf_kernels import device_path as path_module
from gssf_kernels.device_path import DEVICE, device_path

ROUTES = ("cpu", "composite", "triton")
# Ops that write what they are given and return nothing.
SILENT = {"logsumexp_pass", "softmax_pass", "score_sums_pass", "relation_pass", "segment_terms"}


def storages(values):
    """The memory of each tensor that has any."""
    tensors = [t for t in tree_flatten(values)[0] if isinstance(t, torch.Tensor) and t.numel()]
    return [t.untyped_storage()._cdata for t in tensors]


def shared(arguments, results):
    """Which of an op's results share memory: ["outputs"], ["an input"], both or none."""
    inputs, made = storages(arguments), storages(results)
    outputs = ["outputs"] if len(set(made)) < len(made) else []
    return outputs + (["an input"] if set(inputs) & set(made) else [])


class Watch(TorchDispatchMode):
    """Runs every op of ours, those inside others too, and notes each and what its results share."""

    def __init__(self, composite):
        super().__init__()
        self.composite = composite
        self.seen: dict[str, set] = {}
        self.outside = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if function.namespace != "gssf":
            return function(*args, **(kwargs or {}))
        native = torch._C._dispatch_has_kernel_for_dispatch_key(f"gssf::{name}", "CPU") and not self.composite
        if native or name not in _library.OPS:
            results = function(*args, **(kwargs or {}))
        else:
            with torch._C._ForceDispatchKeyGuard(*self.outside), self:  # what it calls is seen too
                op = _library.OPS[name]
                results = op.plainly(op.call(*args))
        self.seen.setdefault(name, set()).update(shared(args, results))
        return results


@contextlib.contextmanager
def watched(route, monkeypatch):
    """The ops seen inside, by name: what their results shared."""
    if route != "triton":
        if route == "composite":
            monkeypatch.setattr(dense, "EXTENSION_ERROR", "left aside")
        with Watch(route == "composite") as watch:
            yield watch.seen
        return
    seen: dict[str, set] = {}
    on_cuda = path_module.on_cuda

    def noted(name):
        def call(*arguments):
            results = on_cuda(name)(*arguments)
            seen.setdefault(name, set()).update(shared(arguments, results))
            return results

        return call

    monkeypatch.setattr(path_module, "on_cuda", noted)
    with device_path():
        yield seen


def step(outputs, inputs):
    """A backward through all outputs that have one."""
    outputs = [t for t in outputs if t.requires_grad]
    torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs], allow_unused=True)


def run_the_table(inputs):
    """Every case of the table, forward and backward."""
    for case, (tensors, options) in inputs:
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        step(case.ours(leaves, options), list(leaves.values()))


def run_a_metric(metric, x, y):
    """Losses of both factors, and of one alone, of which the other's gradient is none."""
    weights = list(metric.parameters())
    step([gk.info_nce_loss(x, y, scale=2.0, metric=metric)], [x, y, *weights])
    step([gk.sigmoid_loss(x, x, scale=2.0, bias=0.0, metric=metric)], [x, *weights])
    step([gk.triplet_loss(x, y, negatives="all", metric=metric)], [x, y, *weights])
    for k in (0, 1):
        step([metric.factors(x, y)[k]], [x, y, *weights])


def run_one_side_twice(dtype, device):
    """Of which half of the scores are made, and half of the gradients."""
    for n, ids in itertools.product((9, 40), (False, True)):
        x = torch.ones(n, 8, dtype=dtype, device=device, requires_grad=True)
        labels = torch.zeros(n, dtype=torch.int64, device=device) if ids else None
        step(gk.hardest_negatives(x, x, a_ids=labels), [x])
        step([gk.triplet_loss(x, x, x_ids=labels), gk.goal_loss(x, x, pair="sig_ms", x_ids=labels)], [x])
        for how in ("mean", "none"):
            step([gk.info_nce_loss(x, x, scale=2.0, x_ids=labels, reduction=how)], [x])
            step([gk.sigmoid_loss(x, x, scale=2.0, bias=0.0, x_ids=labels, reduction=how)], [x])
            step([gk.triplet_loss(x, x, negatives="all", x_ids=labels, reduction=how)], [x])
        step(gk.logsumexp_scores(x, x, scale=2.0), [x])
        levels = torch.zeros(n, dtype=torch.float32, device=device)
        torch.ops.gssf.score_counts(x.detach(), x.detach(), levels, None, levels, None, labels, labels, True)


@pytest.fixture(scope="module")
def everywhere():
    """{(route, op): what its results were seen to share}."""
    results: dict[tuple, set] = {}
    for route in ROUTES:
        device = DEVICE if route == "triton" else "cpu"
        for small, dtype in itertools.product((True, False), (torch.float32, torch.bfloat16)):
            if route == "cpu" and _library.EXTENSION_ERROR is not None:
                continue
            if not small and route != "triton":  # sizes choose a way on the launchers alone
                continue
            inputs = [(case, case.inputs(dtype, device=device)) for case in CASES]
            metric = gk.StructuredSimilarity(8, 4, dtype=dtype, device=device)
            sides = [torch.ones(n, 8, dtype=dtype, device=device, requires_grad=True) for n in (20, 27)]
            with pytest.MonkeyPatch.context() as monkeypatch:
                if not small:
                    monkeypatch.setattr(plan, "SMALL", 0)
                    monkeypatch.setattr(plan, "SCAN_ROWS", 0)
                    monkeypatch.setattr(plan, "CERTIFIED", 1)
                with watched(route, monkeypatch) as seen:
                    run_the_table(inputs)
                    run_one_side_twice(dtype, device)
                    run_a_metric(metric, *sides)
            for op, what in seen.items():
                results.setdefault((route, op), set()).update(what)
    return results


def test_no_op_returns_memory_twice(everywhere):
    assert {key: sorted(what) for key, what in everywhere.items() if what} == {}


def test_every_op_was_seen_on_every_route(everywhere):
    ops = set(_library._OPS)
    assert {op for route, op in everywhere if route == "triton"} >= ops - SILENT
    assert {op for route, op in everywhere if route == "composite"} >= ops - SILENT
