"""Inputs for losses with `pairs`: shapes, kinds of pairs, and which of them go together."""

import torch
import torch.nn.functional as F

KINDS = ["none", "rows", "ids", "listed", "listed with ids"]
SHAPES = {"wide": (9, 14), "square": (12, 12), "tall": (21, 13), "one": (1, 3), "tiles": (70, 530)}


def normal(n, d, seed, dtype=torch.float64):
    return F.normalize(torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed)), dim=1)


def problem(shape, kind, dtype=torch.float64, d=6):
    """(x, y, options): rows with ids, of which some have no partner; listed pairs with repetition, ids or neither."""
    n, m = SHAPES[shape]
    random = torch.Generator().manual_seed(n * m)
    x, y = normal(n, d, n, dtype), normal(m, d, m + 1, dtype)
    x_ids, y_ids = (torch.randint(0, max(k // 3, 2), (k,), generator=random) for k in (n, m))
    if kind == "none":
        return x, y, {}
    if kind == "rows":
        return x, y, {"x_ids": x_ids, "y_ids": y_ids}
    if kind == "ids":
        x_ids[0] = 99  # without a partner
        return x, y, {"pairs": "ids", "x_ids": x_ids, "y_ids": y_ids}
    count = n + m
    pairs = torch.stack([torch.randint(0, k, (count,), generator=random) for k in (n, m)], 1)
    pairs = torch.cat((pairs, pairs[:3]))  # listed again
    ids = {"x_ids": x_ids, "y_ids": y_ids} if kind == "listed with ids" else {}
    return x, y, {"pairs": pairs, **ids}


def allowed(shape, kind, reduction="sum", symmetric=True):
    n, m = SHAPES[shape]
    if kind in ("none", "rows") and m < n:
        return False
    return not (kind == "ids" and reduction == "none" and symmetric)
