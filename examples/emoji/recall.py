"""Recall at k of a dual encoder, both ways, from the whole similarity matrix."""

import torch
from torch import Tensor

KS = (1, 5, 10)
WAYS = ("picture_to_caption", "caption_to_picture")


def recall(s: Tensor, owner: Tensor) -> dict[str, float]:
    """R@1/5/10 in per cent, from s [P, C] and owner [C], the picture of each caption.

    Picture to caption: any of the picture's captions counts. A query's rank is 1 + the wrong answers scored
    at least as high as its best right one: a tie counts as wrong, so a collapsed model scores 0, not 100.
    """
    right = owner[None, :] == torch.arange(len(s))[:, None]  # [P, C]
    wrong = s.masked_fill(right, -torch.inf)
    best = s.masked_fill(~right, -torch.inf)
    ranks = [1 + (wrong >= best.amax(dim, keepdim=True)).sum(dim) for dim in (1, 0)]
    return {
        f"{way}_r{k}": 100 * float((rank <= k).float().mean())
        for way, rank in zip(WAYS, ranks, strict=True)
        for k in KS
    }
