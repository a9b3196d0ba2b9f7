"""How far results are from fp64 truth, and gradients of a function's outputs."""

import torch
from cases import weighted


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
