"""Two towers into one space: a small CNN for 32x32 pictures, a bag of n-grams and an MLP for captions."""

from itertools import pairwise

import torch
from data import BUCKETS, Bags, Batches, Emoji
from torch import Tensor, nn

import gssf_kernels as gk

DIM = 256  # channels of the shared space


class PictureTower(nn.Module):
    """pictures [B, 3, 32, 32] in [0, 1] -> [B, dim]."""

    def __init__(self, dim: int, width: int = 32):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                )
                for before, after in pairwise(widths)
            )
        )
        # Emojis are centred and drawn alike: where a part sits tells what it is, so 2x2 is kept.
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * widths[-1], dim))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.stages((pictures - 0.7) / 0.3))


class CaptionTower(nn.Module):
    """K bags of n-grams -> [K, dim]."""

    def __init__(self, dim: int, width: int = 256):
        super().__init__()
        self.table = nn.EmbeddingBag(BUCKETS, width, mode="sum", include_last_offset=True)
        nn.init.normal_(self.table.weight, std=0.1)
        self.head = nn.Sequential(
            nn.LayerNorm(width),
            nn.Dropout(0.2),
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, dim),
        )

    def forward(self, bags: Bags) -> Tensor:
        return self.head(self.table(bags.grams, bags.starts, per_sample_weights=bags.weights))


@torch.no_grad()
def embed_pictures(tower: PictureTower, emoji: Emoji) -> Tensor:
    """[P, dim] of all pictures as they are, in evaluation mode."""
    tower.eval()
    rows = torch.cat([tower(part.float() / 255) for part in emoji.pictures.split(512)])
    tower.train()
    return rows


@torch.no_grad()
def embed_captions(tower: CaptionTower, emoji: Emoji) -> Tensor:
    """[C, dim] of all captions, in evaluation mode."""
    tower.eval()
    rows = tower(emoji.bags)
    tower.train()
    return rows


# The parts of W = diag(w) + blockdiag(B) that are learned: (block_size, diagonal).
METRICS = {"cosine": (None, False), "diag": (None, True), "blocks": (16, False), "both": (16, True)}


class Model(nn.Module):
    """Both towers and the structured similarity between them."""

    def __init__(self, metric: str = "both"):
        super().__init__()
        self.pictures = PictureTower(DIM).to(memory_format=torch.channels_last)
        self.captions = CaptionTower(DIM)
        block_size, diagonal = METRICS[metric]
        self.metric = gk.StructuredSimilarity(DIM, block_size=block_size, diagonal=diagonal)

    def loss(self, batches: Batches, criterion, progress: float) -> tuple[Tensor, tuple | None]:
        """The loss of the next batch, and what it is made of: (a [B, D], b [N, D], owner [N], picked [B]) or None."""
        pictures, bags, owner, picked = batches.next()
        a, b = self.metric.factors(self.pictures(pictures), self.captions(bags))
        return criterion(a, b, owner, picked, progress), (a, b, owner, picked)

    @torch.no_grad()
    def embed(self, emoji: Emoji) -> tuple[Tensor, Tensor]:
        """a [P, D] of the pictures (weighted), b [C, D] of the captions: scores are a bᵀ."""
        return self.metric.factors(embed_pictures(self.pictures, emoji), embed_captions(self.captions, emoji))

    def scores(self, emoji: Emoji) -> Tensor:
        """[P, C] of all pictures and captions."""
        a, b = self.embed(emoji)
        return a @ b.T

    def evaluate(self, emoji: Emoji) -> gk.RetrievalResult:
        a, b = self.embed(emoji)
        return gk.evaluate(a, b, x_ids=torch.arange(len(a)), y_ids=emoji.owner)
