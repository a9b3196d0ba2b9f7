"""What is minimised: a triplet loss on one or another choice of negatives, GOAL, or InfoNCE as the yardstick.

The hardest negative of an untrained model is noise, and pushing it away alone collapses all embeddings into
one point. So `triplet` warms up on semi-hard negatives, the hardest among those already scored below the
positive (FaceNet, arXiv 1503.03832), for the first WARM_UP of the run, and then takes the hardest (VSE++,
arXiv 1707.05612). Semi-hard and all negatives store the scores [N, N]; the fused hardest loss does not.
`goal` (arXiv 2210.13188) weighs the same hardest negatives, and warms up alike.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("triplet", "triplet-hardest", "triplet-semihard", "triplet-all", "goal", "infonce")
MARGIN = 0.2
WARM_UP = 0.25  # of the run


def choice(name: str, progress: float) -> str:
    """The negatives of loss `name` at `progress` in [0, 1] of the run; "goal" where GOAL weighs the hardest."""
    if name in ("triplet", "goal"):
        return "semihard" if progress < WARM_UP else {"triplet": "hardest", "goal": "goal"}[name]
    return name.removeprefix("triplet-")


class InfoNCE(nn.Module):
    """CLIP's loss in plain PyTorch, the yardstick: a picture's other captions are left out of its softmax."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
        itself = torch.eye(len(a), dtype=torch.bool)
        same = ids[:, None] == ids[None, :]  # [N, N]
        logits = (self.log_scale.exp() * a @ b.T).masked_fill(same & ~itself, -torch.inf)
        target = torch.arange(len(a))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
