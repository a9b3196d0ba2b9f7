"""Graph patterns: several representations of a picture, and its captions, as the nodes of one graph.

A picture has REPRESENTATIONS, each an attention over the 8x8 places of a feature map plus the picture's embedding
(`gk.DiversifiedAttention`, whose penalty keeps the attentions apart). Its five captions, one a language, are five
representations of the other modality. All pairs of these seven are edges of `gk.graph_pattern_loss`. A picture is found
by the sum of its representations.
"""

import torch
import torch.nn.functional as F
from data import CAPTIONS, Batches, Emoji
from losses import MARGIN, choice
from model import DIM, Model, embed_captions
from torch import Tensor

import gssf_kernels as gk

REPRESENTATIONS, PENALTY = 2, 0.1
MAP_STAGES, MAP_CHANNELS = 2, 64  # of the picture tower: 8x8 places


class GraphModel(Model):
    """The towers, and the attentions of pictures."""

    def __init__(self, metric: str = "both"):
        super().__init__(metric)
        self.attention = gk.DiversifiedAttention(MAP_CHANNELS, DIM, REPRESENTATIONS)
        self.of_map = torch.nn.Linear(DIM, MAP_CHANNELS)  # the global feature, as wide as the local ones

    def represent(self, pictures: Tensor) -> gk.DiversifiedRepresentations:
        """[K, B, D], with their attention [B, K, 64]."""
        stages = self.pictures.stages
        places = stages[:MAP_STAGES]((pictures - 0.7) / 0.3)  # [B, C, 8, 8]
        whole = self.pictures.head(stages[MAP_STAGES:](places))
        local = self.attention(places.flatten(2).mT, self.of_map(whole))
        return local._replace(representations=F.normalize(local.representations + whole, dim=2))

    def loss(self, batches: Batches, criterion, progress: float) -> tuple[Tensor, None]:
        pictures, bags, _, _ = batches.next()
        local = self.represent(pictures)
        xs = local.representations
        flat, texts = self.metric.factors(xs.flatten(0, 1), self.captions(bags))
        ys = texts.unflatten(0, (-1, CAPTIONS)).transpose(0, 1).contiguous()  # [5, B, D]
        negatives = choice("triplet", progress)
        graph = gk.graph_pattern_loss(flat.view(xs.shape), ys, margin=MARGIN, negatives=negatives, reduction="mean")
        edges = (len(xs) + len(ys)) * (len(xs) + len(ys) - 1) / 2
        return graph / edges + PENALTY * local.penalty, None

    @torch.no_grad()
    def embed(self, emoji: Emoji) -> tuple[Tensor, Tensor]:
        self.eval()
        parts = [self.represent(part.float() / 255).representations for part in emoji.pictures.split(512)]
        rows = torch.cat(parts, 1)  # [K, P, D]
        self.train()
        a, b = self.metric.factors(rows.flatten(0, 1), embed_captions(self.captions, emoji))
        return a.view(rows.shape).sum(0), b

    @torch.no_grad()
    def attentions(self, pictures: Tensor) -> Tensor:
        """[B, K, 8, 8] of pictures [B, 3, 32, 32] in [0, 1]."""
        self.eval()
        maps = self.represent(pictures).attention.unflatten(2, (8, 8))
        self.train()
        return maps
