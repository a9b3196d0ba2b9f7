"""What is minimised, each once by the package's functions and once, for --naive and for checks, by their definitions.

The hardest negative of an untrained model is noise, and pushing it away alone collapses all embeddings into
one point. So `triplet` warms up on semi-hard negatives, the hardest among those already scored below the
positive (FaceNet, arXiv 1503.03832), for the first WARM_UP of the run, and then takes the hardest (VSE++,
arXiv 1707.05612). `goal` (arXiv 2210.13188) weighs the same hardest negatives, and warms up alike.

`triplet-all`, `infonce` (arXiv 2103.00020) and `siglip` (arXiv 2303.15343) take every score and need no warm-up.
`distill` is `infonce` and, with weight 1, structure-aware distillation (arXiv 2412.10761) from two teachers of one
modality each (teachers.py). Whose relations the student's are is our choice: one row a picture, see :func:`fused`.

A picture and each of its captions are a pair, by id: pictures [B, D] meet captions [5B, D], and none is repeated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gssf_kernels as gk

NAMES = ("triplet", "triplet-hardest", "triplet-semihard", "triplet-all", "goal", "infonce", "siglip", "distill")
APART = ("graph", "fragments")  # whose models have losses of their own: graph.py, fragments.py
SIGLIP = {"scale": 10.0, "bias": -10.0}  # at the start, as in the paper
MARGIN = 0.2
WARM_UP = 0.25  # of the run


def choice(name: str, progress: float) -> str:
    """What loss `name` takes at `progress` in [0, 1] of the run: a choice of negatives, or a loss's own name."""
    if name in APART:
        name = "triplet"
    if name in ("triplet", "goal"):
        return "semihard" if progress < WARM_UP else {"triplet": "hardest", "goal": "goal"}[name]
    return name.removeprefix("triplet-")


def fused(pictures: Tensor, captions: Tensor) -> Tensor:
    """One unit row a picture, from pictures [B, D] and captions [B·K, D], K a picture in order.

    The mean of the picture's direction and of its captions' common direction, both sides weighing alike.
    """
    text = mean_caption(captions, len(pictures))
    return F.normalize(F.normalize(pictures, dim=1) + text, dim=1)


def mean_caption(captions: Tensor, count: int) -> Tensor:
    """captions [count·K, D] -> [count, D], unit rows: the mean direction of each K in order."""
    return F.normalize(F.normalize(captions, dim=1).unflatten(0, (count, -1)).mean(1), dim=1)


class Criterion(nn.Module):
    """The loss of one run, with what it learns besides the model: scales, a bias, a mixture.

    Args:
        name: one of NAMES.
        naive: take the definitions, which store the scores.
        goal: GOAL's ``triplet=`` and ``pair=``.
        siglip: the scale and bias that "siglip" starts from; SIGLIP by default.
        teachers: for "distill", the unit rows (u [P, D], t [P, D]) that the teachers give the P training pictures.
    """

    def __init__(self, name: str, *, naive: bool = False, goal: dict | None = None, siglip=None, teachers=None):
        super().__init__()
        if (name == "distill") != (teachers is not None):
            raise ValueError(f"teachers: expected them with 'distill' and with no other loss, got {name!r}")
        self.name, self.kernels, self.goal, self.teachers = name, gk.reference if naive else gk, goal or {}, teachers
        # The swap: the same call, once storing the scores, once not. For the learned ones, a module or its definition.
        self.info_nce = gk.InfoNCELoss() if name in ("infonce", "distill") else None
        self.sigmoid = gk.SigmoidLoss(**(siglip or SIGLIP)) if name == "siglip" else None
        self.relations = gk.RelationalDistillationLoss(lam=0.5, tau=0.07) if name == "distill" else None

    def forward(self, a: Tensor, b: Tensor, owner: Tensor, picked: Tensor, progress: float) -> Tensor:
        """The loss of pictures a [B, D] (weighted) and captions b [N, D] of a batch.

        owner: [N], the row of a of each caption. picked: [B], the pictures' places in the training set.
        """
        return self.value(self.kernels, choice(self.name, progress), a, b, owner, picked)

    def value(self, kernels, kind: str, a: Tensor, b: Tensor, owner: Tensor, picked: Tensor) -> Tensor:
        """The same by ``kernels``, gk or gk.reference, where :func:`choice` is `kind`."""
        pairs = {"pairs": "ids", "x_ids": torch.arange(len(a)), "y_ids": owner}
        if kind in ("infonce", "distill"):
            loss = self.match(kernels, a, b, pairs)
            return loss + self.distance(kernels, a, b, picked) if kind == "distill" else loss
        if kind == "siglip":
            if kernels is gk:
                return self.sigmoid(a, b, **pairs)
            return kernels.sigmoid_loss(a, b, scale=self.sigmoid.log_scale.exp(), bias=self.sigmoid.bias, **pairs)
        # A mean over pairs, for the log: Adam does not care.
        if kind == "goal":
            return kernels.goal_loss(a, b, **self.goal, reduction="mean", **pairs)
        return kernels.triplet_loss(a, b, margin=MARGIN, negatives=kind, reduction="mean", **pairs)

    def match(self, kernels, a: Tensor, b: Tensor, pairs: dict) -> Tensor:
        """InfoNCE, the captions of a picture sharing its target."""
        if kernels is gk:
            return self.info_nce(a, b, **pairs)
        return kernels.info_nce_loss(a, b, scale=self.info_nce.log_scale.exp(), **pairs)

    def distance(self, kernels, a: Tensor, b: Tensor, picked: Tensor) -> Tensor:
        """Of the batch's relations from those of the teachers."""
        sides = (fused(a, b), *(rows[picked] for rows in self.teachers))
        if kernels is gk:
            return self.relations(*sides)
        found = self.relations
        return kernels.relational_distillation_loss(*sides, lam=found.lam, tau=found.tau, weights=found.weights)

    @torch.no_grad()
    def gaps(self, a: Tensor, b: Tensor, picked: Tensor) -> Tensor:
        """τ times the student's relations less the mixture [B, B]: the sign of each is its gradient."""
        student, image, text = (h @ h.T for h in (fused(a, b), *(rows[picked] for rows in self.teachers)))
        return student - torch.lerp(image, text, self.relations.lam)

    def learned(self) -> dict[str, float]:
        """The scalars as they stand."""
        return {name.split(".")[-1]: float(value.detach()) for name, value in self.named_parameters()}
