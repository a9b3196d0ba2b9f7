"""Values and gradients of every case against fp64 truth.

Our error may be twice that of plain PyTorch in the same dtype, plus the rounding of the result itself.
"""

import pytest
import torch
from cases import CASES, DEVICES, DTYPES, FLOOR, weighted


def error(got, truth, per_row=False) -> float:
    """‖got − truth‖ / ‖truth‖ (the worst row's, if asked), infinities and NaN having to stand in the same places."""
    got, truth = got.detach().double(), truth.detach().double()
    assert got.shape == truth.shape
    special = ~truth.isfinite()
    assert torch.equal(got[special].nan_to_num(nan=1e300), truth[special].nan_to_num(nan=1e300))
    if per_row and got.dim() > 1:
        rows, scale = (got - truth).norm(dim=-1), truth.norm(dim=-1)
        return float((rows / scale.clamp_min(1e-300)).max())
    distance = (got - truth)[~special].norm()
    scale = truth[~special].norm()
    return float(distance / scale) if scale > 0 else float(distance)


def gradients(run, tensors, options):
    leaves = {k: t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for k, t in tensors.items()}
    results = run(leaves, options)
    return results, torch.autograd.grad(weighted(results), list(leaves.values()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient(case, dtype, device):
    tensors, options = case.inputs(dtype, device=device)
    truth, truth_grad = gradients(case.reference, {k: t.double() for k, t in tensors.items()}, options)
    plain, plain_grad = gradients(case.reference, tensors, options)
    got, got_grad = gradients(case.ours, tensors, options)
    names = [f"output {k}" for k in range(len(got))] + [f"d{name}" for name in tensors]
    for name, g, p, t in zip(names, [*got, *got_grad], [*plain, *plain_grad], [*truth, *truth_grad], strict=True):
        if t.numel() == 0:
            continue
        per_row = case.name == "project-scaled" and t.shape == truth[0].shape  # its rows span ten decades
        allowed = 2 * error(p, t, per_row) + FLOOR[g.dtype]
        assert error(g, t, per_row) <= allowed, f"{name}: error {error(g, t, per_row):.3g}, allowed {allowed:.3g}"
