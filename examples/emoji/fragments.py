"""Fragment matching: the 8x8 patches of a picture against the words of a caption, by late interaction.

A region is one of the 4x4 places of a feature map, each of which covers 8x8 pixels. A word is the bag of its n-grams,
which `gk.StructuredMultiheadAttention` lets look at the other words of its caption. The score of a picture and a
caption is the mean over its words of the best region's similarity (`gk.late_interaction`).
"""

import torch
from data import BUCKETS, CAPTIONS, WORDS, Batches, Emoji
from losses import MARGIN, choice
from model import METRICS, PictureTower
from torch import Tensor, nn

import gssf_kernels as gk

DIM, HEADS = 128, 4
MAP_STAGES, MAP_CHANNELS = 3, 128  # of the picture tower: 4x4 places


class WordTower(nn.Module):
    """Bags of words -> [words, DIM], then each with the others of its caption."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.table = nn.EmbeddingBag(BUCKETS, width, mode="sum", include_last_offset=True)
        nn.init.normal_(self.table.weight, std=0.1)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Dropout(0.2), nn.Linear(width, DIM))
        self.attention = gk.StructuredMultiheadAttention(DIM, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, bags, counts: Tensor) -> tuple[Tensor, Tensor]:
        """(words [C, WORDS, DIM], mask [C, WORDS]) of captions of `counts` [C] words each."""
        rows = self.head(self.table(bags.grams, bags.starts, per_sample_weights=bags.weights))
        mask = torch.arange(WORDS) < counts[:, None]
        words = rows.new_zeros(*mask.shape, DIM).index_put((mask,), rows)
        padding = ~mask
        padding[:, 0] = False  # attention over nothing is not a number
        mixed, _ = self.attention(self.norm(words), self.norm(words), words, padding, need_weights=False)
        return words + mixed, mask


class FragmentModel(nn.Module):
    """Regions of pictures, words of captions, and the structured similarity between them."""

    def __init__(self, metric: str = "both"):
        super().__init__()
        tower = PictureTower(DIM)
        self.pictures = tower.stages[:MAP_STAGES].to(memory_format=torch.channels_last)
        self.regions = nn.Sequential(nn.Dropout(0.2), nn.Linear(MAP_CHANNELS, DIM))
        self.places = nn.Parameter(torch.zeros(16, DIM))  # where a region is
        self.captions = WordTower()
        block_size, diagonal = METRICS[metric]
        self.metric = gk.StructuredSimilarity(DIM, block_size=block_size, diagonal=diagonal)

    def of_pictures(self, pictures: Tensor) -> Tensor:
        """[B, 16, DIM]."""
        places = self.pictures((pictures - 0.7) / 0.3)  # [B, C, 4, 4]
        return self.regions(places.flatten(2).mT) + self.places

    def of_captions(self, emoji: Emoji, captions: Tensor, thinned=lambda bags: bags) -> tuple[Tensor, Tensor]:
        """Words and mask of captions [C]."""
        first, counts = emoji.spans[captions], emoji.spans[captions + 1] - emoji.spans[captions]
        words = torch.cat([torch.arange(count) + start for start, count in zip(first, counts, strict=True)])
        return self.captions(thinned(emoji.words.take(words)), counts)

    def loss(self, batches: Batches, criterion, progress: float) -> tuple[Tensor, None]:
        """The mean of five triplet losses, one a language: every picture against every picture's caption in it."""
        picked = batches.pick()
        regions = self.of_pictures(batches.pictures(picked))
        captions = (CAPTIONS * picked + torch.arange(CAPTIONS)[:, None]).flatten()  # by language
        words, mask = self.of_captions(batches.emoji, captions, batches.thinned)
        scores = gk.late_interaction(regions, words, words_mask=mask, metric=self.metric)  # [B, 5B]
        negatives = choice("triplet", progress)
        terms = [
            gk.triplet_from_scores(part, margin=MARGIN, negatives=negatives, reduction="mean")
            for part in scores.chunk(CAPTIONS, 1)
        ]
        return torch.stack(terms).mean(), None

    @torch.no_grad()
    def scores(self, emoji: Emoji) -> Tensor:
        self.eval()
        regions = torch.cat([self.of_pictures(part.float() / 255) for part in emoji.pictures.split(512)])
        words, mask = self.of_captions(emoji, torch.arange(len(emoji.owner)))
        self.train()
        return gk.late_interaction(regions, words, words_mask=mask, metric=self.metric)

    def evaluate(self, emoji: Emoji) -> gk.RetrievalResult:
        s = self.scores(emoji)  # no product of two embeddings; but s = s Iᵀ
        return gk.evaluate(s, torch.eye(s.shape[1]), x_ids=torch.arange(len(s)), y_ids=emoji.owner)
