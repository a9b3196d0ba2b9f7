"""Certified search: the k best of the exact scores of fp32 and fp16 inputs, on a processor with a bf16 unit."""

import pytest
import torch
from certified_cases import INF, MAKERS, UNIT

import gssf_kernels as gk

pytestmark = pytest.mark.skipif(UNIT == "none", reason="no bf16 unit on this processor, or no extension")


def certified(a, b, k, **options):
    arguments = {"a_ids": None, "b_ids": None, "exclude_self": False, "row_limit": None, "columns": True, **options}
    return torch.ops.gssf.top_scores(a, b, k, *arguments.values(), "certified")


def check(values, indices, s, size, depth):
    """The scores of the places are the k largest in fp64, but for its own rounding; the values are these, rounded."""
    k = values.shape[1]
    best = (
        torch.nn.functional.pad(s, (0, max(k - s.shape[1], 0)), value=-INF).sort(dim=1, descending=True).values[:, :k]
    )
    assert torch.equal(indices < 0, best == -INF)
    chosen = torch.where(indices < 0, -INF, s.gather(1, indices.clamp_min(0)))
    slack = 2.0**-50 * max(depth, 8) * size.amax(1, keepdim=True)
    off = torch.where(indices < 0, 0, chosen - best)
    assert (off.abs() <= slack).all()
    wrong = torch.where(indices < 0, 0, values.double() - chosen)
    assert (wrong.abs() <= 2.0**-24 * chosen.abs().nan_to_num(posinf=0, neginf=0) + slack + 1e-45).all()
    assert all(len(set(row)) == len(row) for row in (r[r >= 0].tolist() for r in indices))


@pytest.mark.parametrize("k", [1, 7, 100])
@pytest.mark.parametrize("name", [name for name in MAKERS if name != "beyond"])
def test_the_best_of_exact_scores(name, k):
    for seed, (n, m, d) in enumerate([(40, 60, 33), (130, 131, 100), (520, 1100, 16)]):
        torch.manual_seed(seed)
        a, b = MAKERS[name](n, m, d)
        s, size = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
        for options in ({}, {"exclude_self": True}, {"a_ids": torch.arange(n) % 5, "b_ids": torch.arange(m) % 7}):
            t = s.clone()
            if "exclude_self" in options:
                t.diagonal().fill_(-INF)
            elif options:
                t[options["a_ids"][:, None] == options["b_ids"]] = -INF
            values, indices, col_values, col_indices, _ = certified(a, b, k, **options)
            check(values, indices, t, size, d)
            check(col_values, col_indices, t.T, size.T, d)


@pytest.mark.parametrize("name", ["unit", "duplicates", "hubs"])
def test_wide_rows(name):
    """b is packed in several chunks."""
    torch.manual_seed(4)
    a, b = MAKERS[name](40, 1300, 8192)
    s, size = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
    s.diagonal().fill_(-INF)
    values, indices, col_values, col_indices, _ = certified(a, b, 9, exclude_self=True)
    check(values, indices, s, size, 8192)
    check(col_values, col_indices, s.T, size.T, 8192)


@pytest.mark.parametrize("name", ["unit", "normal", "duplicates", "hubs"])
def test_limits(name):
    torch.manual_seed(3)
    a, b = MAKERS[name](130, 700, 64)
    s, size = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
    limit = s.quantile(0.9, dim=1).float() + 1e-5
    t = s.masked_fill(s.float() > limit[:, None], -INF)
    values, indices, col_values, col_indices, _ = certified(a, b, 9, row_limit=limit)
    check(values, indices, t, size, 64)
    check(col_values, col_indices, t.T, size.T, 64)


def test_ties_and_how_many_were_computed_again():
    torch.manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(count, 256), dim=1) for count in (600, 3000))
    b[1500:] = b[:1500]
    values, indices, *_, rescored = certified(a, b, 10, columns=False)
    assert (indices[:, 1::2] == indices[:, ::2] + 1500).all()
    assert torch.equal(values[:, 1::2], values[:, ::2])
    assert 600 * 10 <= int(rescored) <= 600 * 40
    whole = gk.top_scores(a, b, 10)  # which takes this route by itself
    assert torch.equal(whole.values, values)
    assert torch.equal(whole.indices, indices)
