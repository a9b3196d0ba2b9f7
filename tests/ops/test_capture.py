"""Nothing waits for the GPU: every function, forward and backward, can be captured in a CUDA graph.

Without a card this is proved on tensors that have no values (`device_path.py`). With one, steps run under PyTorch's own
alarm for waiting, and graphs are captured and replayed on new inputs.
"""

import pytest
import torch
from cases import CASES
from representative import REPRESENTATIVE, SINGLE, leaves, step

import gssf_kernels as gk
from gssf_kernels import plan

pytest.importorskip("triton")

from gssf_kernels.device_path import DEVICE, Waits, device_path

DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # fp16 differs from bf16 in no choice made on the host
# What a replay may be off, relative to the largest number: the library may choose another product while capturing.
REPLAYED = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.int64: 0}


def test_every_function_is_represented():
    assert len(REPRESENTATIVE) == len(SINGLE)
    assert {case.function for case in REPRESENTATIVE} == {case.function for case in CASES}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_waits_and_nothing_leaves_the_device(case, dtype):
    tensors, options = case.inputs(dtype, device=DEVICE)
    tensors = leaves(tensors)
    with device_path() as path:
        results, gradients = step(case, tensors, options)
    plain, expected = step(case, *_on_cpu(case, dtype))
    assert [(t.shape, t.dtype) for t in results] == [(t.shape, t.dtype) for t in plain]
    for got, expected_gradient in zip(gradients, expected, strict=True):
        assert (got is None) == (expected_gradient is None)
        assert got is None or (got.shape, got.dtype) == (expected_gradient.shape, expected_gradient.dtype)
    triton = [name for name in path.launches if not name.startswith("aten::")]
    plain_pytorch = dtype == torch.float64
    assert bool(triton) != plain_pytorch or not any(t.numel() for t in tensors.values())


@pytest.mark.parametrize("case", [c for c in CASES if c.function in ("hardest_negatives", "triplet_loss")], ids=str)
def test_certified_mining_does_not_wait(case, monkeypatch):
    """Which takes more scores than the table's cases have."""
    monkeypatch.setattr(plan, "CERTIFIED", 1)
    tensors, options = case.inputs(torch.float32, device=DEVICE)
    with device_path() as path:
        step(case, leaves(tensors), options)
    if case.name in SINGLE and "all" not in case.name and "semihard" not in case.name:
        assert "rescore_kernel" in path.launches


def _on_cpu(case, dtype):
    tensors, options = case.inputs(dtype)
    return leaves(tensors), options


MODULES = {
    "warm-up": lambda: gk.TripletLoss(warmup=3, diagnostics=True),
    "diagnostics": lambda: gk.GoalLoss("cir", "sig_ms", diagnostics=True),
    "info_nce": lambda: gk.InfoNCELoss(metric=gk.StructuredSimilarity(16, 4, permutation=torch.arange(16))),
    "sigmoid": lambda: gk.SigmoidLoss(reduction="none"),
}


@pytest.mark.parametrize("name", MODULES)
def test_no_module_waits(name):
    module = MODULES[name]().to(DEVICE)
    x, y = (torch.empty(12, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    ids = torch.empty(12, dtype=torch.int64, device=DEVICE)
    with device_path():
        for _ in range(5):
            results = module(x, y, ids, ids)
            loss = results[0] if isinstance(results, tuple) else results
            torch.autograd.grad(loss.sum(), [x, y, *module.parameters()])


def test_weights_of_given_scores_wait():
    """`goal_weights` says so: how many entries its sparse result has hangs on values."""
    with device_path(), pytest.raises(Waits):
        gk.goal_weights(torch.empty(4, 6, device=DEVICE))


PLANTED = {
    "a number": lambda t: float(t.sum()),
    "a condition": lambda t: 1 if t.any() else 0,
    "a list": lambda t: t.tolist(),
    "a mask": lambda t: t[t > 0],
    "a mask written": lambda t: t.clone().index_put_((t > 0,), t.new_zeros(())),
    "places": lambda t: t.nonzero(),
    "distinct values": lambda t: t.unique(),
    "a comparison": lambda t: torch.equal(t, t),
    "a copy to the host": lambda t: t.cpu(),
    "a copy from the host": lambda t: torch.tensor([1.0, 2.0]).to(t.device),
    "an index on the host": lambda t: t[torch.arange(2)],
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_waits_is_caught(name):
    t = torch.empty(4, device=DEVICE)
    with device_path(), pytest.raises((Waits, RuntimeError, NotImplementedError)):
        PLANTED[name](t)


on_card = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
on_representatives = pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)


def upstream_of(case, tensors, options):
    """Gradients of the outputs, made before the step is watched: finite ones alone."""
    return [torch.where(t.isfinite(), torch.rand_like(t) + 0.5, 0) for t in case.ours(tensors, options)]


@pytest.mark.gpu
@on_card
@on_representatives
def test_no_step_waits_on_a_card(case, dtype):
    tensors, options = case.inputs(dtype, device="cuda")
    tensors = leaves(tensors)
    upstream = upstream_of(case, tensors, options)
    step(case, tensors, options, upstream)  # what is compiled and loaded once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case, tensors, options, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_card
@on_representatives
def test_a_captured_step_gives_what_an_eager_one_does(case, dtype):
    tensors, options = case.inputs(dtype, device="cuda")
    static = leaves(tensors)
    upstream = upstream_of(case, static, options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(case, static, options, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case, static, options, upstream)
    fresh, fresh_options = case.inputs(dtype, seed=1, device="cuda")
    with torch.no_grad():
        for name, t in fresh.items():
            static[name].copy_(t)
    for name, value in fresh_options.items():
        if isinstance(value, torch.Tensor):
            options[name].copy_(value)
        elif isinstance(value, torch.nn.Module):  # its permutation
            options[name].load_state_dict(value.state_dict())
    graph.replay()
    torch.cuda.synchronize()
    expected = step(case, leaves(fresh), fresh_options, upstream)
    for got, truth in zip((*captured[0], *captured[1]), (*expected[0], *expected[1]), strict=True):
        if truth is not None:
            allowed = REPLAYED[truth.dtype]
            size = float(truth.nan_to_num(0, 0, 0).abs().max()) if truth.numel() else 0.0
            torch.testing.assert_close(got, truth, rtol=allowed, atol=allowed * size, equal_nan=True)
