"""Values and gradients of every case against fp64 truth.

Our error may be twice that of plain PyTorch in the same dtype, plus the rounding of the result itself.
"""

import pytest
import torch
from accuracy import error, gradients
from cases import CASES, DEVICES, DTYPES, FLOOR


@pytest.fixture(autouse=True)
def _two_threads():
    """Other tests run on one: here every case is seen on several."""
    torch.set_num_threads(2)


def draws(case, dtype, device):
    """(names, truth, plain PyTorch's, ours): outputs and gradients, of small inputs over several draws together.

    What four scores are off by is chance: one sum that happens to round well would make of PyTorch's error a bound that
    PyTorch itself, in another order, would not keep.
    """
    tensors, _ = case.inputs(dtype, device=device)
    count = 8 if sum(t.numel() for t in tensors.values()) < 256 else 1
    ours = []
    for seed in range(count):
        tensors, options = case.inputs(dtype, seed=seed, device=device)
        runs = [
            (case.reference, {k: t.double() for k, t in tensors.items()}),
            (case.reference, tensors),
            (case.ours, tensors),
        ]
        ours.append([[*results, *grads] for results, grads in (gradients(f, ts, options) for f, ts in runs)])
    outputs = len(ours[0][0]) - len(tensors)
    names = [f"output {k}" for k in range(outputs)] + [f"d{name}" for name in tensors]
    return names, *(
        [torch.stack(parts).detach() for parts in zip(*run, strict=True)] for run in zip(*ours, strict=True)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient(case, dtype, device):
    for name, t, p, g in zip(*draws(case, dtype, device), strict=True):
        if t.numel() == 0:
            continue
        per_row = case.name == "project-scaled" and t.dim() == 3 and name in ("output 0", "dx")  # spans ten decades
        allowed = 2 * error(p, t, per_row) + FLOOR[g.dtype]
        assert error(g, t, per_row) <= allowed, f"{name}: error {error(g, t, per_row):.3g}, allowed {allowed:.3g}"
