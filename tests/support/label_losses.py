"""What tests of losses of labelled embeddings share: inputs, and the scores of each anchor one by one."""

import torch
import torch.nn.functional as F

MIXED = [4, 4, 4, 7, 7, -3, -3, 2**40, 4, 7, 11, 11]  # 2**40 stands alone: an anchor without a positive


def sides(n, m, d, between, dtype=torch.float64):
    """({"x": …} or x and y of unit length, options with their labels)."""
    labels = torch.tensor([MIXED[k % len(MIXED)] + 100 * (k // 40) for k in range(n)])
    tensors = {"x": F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1).to(dtype)}
    options = {"labels": labels}
    if between:
        tensors["y"] = F.normalize(torch.randn(m, d, dtype=torch.float64), dim=1).to(dtype)
        options["y_labels"] = torch.tensor([MIXED[(5 * k) % len(MIXED)] for k in range(m)])
    return tensors, options


def of_each_anchor(tensors, options):
    """(scores of its positives, of its negatives) of every anchor, each a list of scalars."""
    x, y = tensors["x"], tensors.get("y")
    others = x if y is None else y
    labels = options["labels"].tolist()
    other_labels = labels if y is None else options["y_labels"].tolist()
    for i in range(len(x)):
        candidates = [j for j in range(len(others)) if y is not None or i != j]
        positives = [x[i] @ others[j] for j in candidates if other_labels[j] == labels[i]]
        negatives = [x[i] @ others[j] for j in candidates if other_labels[j] != labels[i]]
        yield positives, negatives


def value_and_gradients(loss, tensors, options):
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    value = loss(**leaves, **options)
    value.sum().backward()
    return [value.detach(), *(leaf.grad for leaf in leaves.values())]


def assert_equal(got, expected, rtol):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double(), e.double(), rtol=rtol, atol=rtol * float(e.abs().max()))
