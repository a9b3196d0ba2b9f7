"""The emoji5 set as tensors: 3,624 pictures, five captions each (en, de, fr, es, it), split by picture.

A caption becomes a bag of hashed n-grams: its words and the 3-, 4- and 5-grams of their letters, each hashed
into one of `BUCKETS` rows of an embedding table (after fastText, arXiv 1607.04606). One table serves all five
languages, which share many stems. N-grams are weighted by how rare they are in the training captions, so that
a long tail of keywords or "medium-light skin tone" does not drown the name.
"""

import csv
import gzip
import math
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HERE = Path(__file__).parent / "data"
SIDE = 32  # pixels
BUCKETS = 1 << 15
CAPTIONS = 5  # of a picture, one a language
GRAM_DROPOUT = 0.2
WORDS = 8  # of a caption that stand for themselves, see fragments.py
LANGUAGES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian"}


@dataclass
class Bags:
    """Bags of n-grams, packed: bag k holds grams[starts[k]:starts[k + 1]]; its weights sum to 1."""

    grams: Tensor  # [T] int64, rows of the embedding table
    weights: Tensor  # [T] float32
    starts: Tensor  # [K + 1] int64

    def take(self, picks: Tensor) -> "Bags":
        """The bags at `picks` [K'], packed anew."""
        lengths = (self.starts[1:] - self.starts[:-1])[picks]
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        shift = torch.repeat_interleave(self.starts[picks] - starts[:-1], lengths)
        where = torch.arange(int(starts[-1])) + shift
        return Bags(self.grams[where], self.weights[where], starts)


@dataclass
class Emoji:
    """One split. Caption c describes picture `owner[c]`; captions 5p .. 5p + 4 describe picture p."""

    pictures: Tensor  # [P, 3, 32, 32] uint8
    bags: Bags  # of C = 5P captions
    owner: Tensor  # [C] int64
    captions: list[str]
    languages: list[str]
    words: Bags  # of all words, those of a caption together: at most WORDS of each
    spans: Tensor  # [C + 1] int64, words[spans[c]:spans[c + 1]] are those of caption c


class Batches:
    """Pictures in shuffled passes, without repeats inside a batch."""

    def __init__(self, emoji: Emoji, size: int, generator: torch.Generator):
        self.emoji, self.size, self.generator = emoji, min(size, len(emoji.pictures)), generator
        self.order = torch.empty(0, dtype=torch.int64)

    def pick(self) -> Tensor:
        """[B], the next pictures."""
        if len(self.order) < self.size:
            self.order = torch.randperm(len(self.emoji.pictures), generator=self.generator)
        picked, self.order = self.order[: self.size], self.order[self.size :]
        return picked

    def pictures(self, picked: Tensor) -> Tensor:
        """[B, 3, 32, 32], augmented."""
        pictures = jitter(self.emoji.pictures[picked].float() / 255, self.generator)
        return pictures.contiguous(memory_format=torch.channels_last)

    def bags(self, captions: Tensor) -> Bags:
        """The bags of captions [K], some of their n-grams dropped."""
        return self.thinned(self.emoji.bags.take(captions))

    def thinned(self, bags: Bags) -> Bags:
        """The bags with some of their n-grams dropped."""
        kept = torch.rand(len(bags.weights), generator=self.generator) >= GRAM_DROPOUT
        return Bags(bags.grams, bags.weights * kept, bags.starts)

    def next(self) -> tuple[Tensor, Bags, Tensor, Tensor]:
        """pictures [B, 3, 32, 32], bags of all N = 5B captions, [N] the row of each one's picture, [B] picked."""
        picked = self.pick()
        pictures = self.pictures(picked)
        bags = self.bags((CAPTIONS * picked[:, None] + torch.arange(CAPTIONS)).flatten())
        return pictures, bags, torch.arange(len(picked)).repeat_interleave(CAPTIONS), picked


def ngrams(caption: str) -> list[list[str]]:
    """'<cat>' and its 3-, 4-, 5-grams, for each word."""
    grams = []
    for word in caption.lower().replace(":", " ").replace(",", " ").split():
        word = f"<{word}>"
        grams.append([word, *(word[i : i + n] for n in (3, 4, 5) for i in range(len(word) - n + 1) if n < len(word))])
    return grams


def load() -> dict[str, Emoji]:
    """{'train', 'val', 'test'} -> Emoji."""
    sheet = np.asarray(Image.open(HERE / "pictures.png").convert("RGB"))
    down, across = sheet.shape[0] // SIDE, sheet.shape[1] // SIDE
    pictures = sheet.reshape(down, SIDE, across, SIDE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIDE, SIDE)
    with gzip.open(HERE / "captions.tsv.gz", "rt", encoding="utf8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))

    by_word = [
        [[zlib.crc32(gram.encode()) % BUCKETS for gram in word] for word in ngrams(row["caption"])] for row in rows
    ]
    hashed = [[gram for word in words for gram in word] for words in by_word]
    seen = Counter(g for row, bag in zip(rows, hashed, strict=True) if row["split"] == "train" for g in set(bag))
    rarity = [1 / math.sqrt(1 + seen[g]) for g in range(BUCKETS)]

    splits = {}
    for split in ("train", "val", "test"):
        chosen = [k for k, row in enumerate(rows) if row["split"] == split]
        index = [int(rows[k]["picture"]) for k in chosen]
        kept = sorted(set(index))
        place = {picture: p for p, picture in enumerate(kept)}
        splits[split] = Emoji(
            pictures=torch.from_numpy(np.ascontiguousarray(pictures[kept])),
            bags=pack([hashed[k] for k in chosen], rarity),
            owner=torch.tensor([place[picture] for picture in index]),
            captions=[rows[k]["caption"] for k in chosen],
            languages=[rows[k]["lang"] for k in chosen],
            words=pack([word for k in chosen for word in by_word[k][:WORDS]], rarity),
            spans=torch.tensor([0, *(min(len(by_word[k]), WORDS) for k in chosen)]).cumsum(0),
        )
    return splits


def pack(hashed: list[list[int]], rarity: list[float]) -> Bags:
    lengths = torch.tensor([len(bag) for bag in hashed])
    grams = torch.tensor([g for bag in hashed for g in bag])
    weights = torch.tensor(rarity)[grams]
    bag = torch.repeat_interleave(torch.arange(len(hashed)), lengths)
    totals = torch.zeros(len(hashed)).index_add_(0, bag, weights)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Bags(grams, weights / totals[bag], starts)


def jitter(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, 32, 32] in [0, 1], each shifted, turned and scaled a little, white around the edge.

    Neither flips nor colours are touched: they carry meaning here (arrows, flags, skin tones).
    """
    count = len(pictures)
    turn = (torch.rand(count, generator=generator) - 0.5) * 0.3  # radians
    scale = 1 + (torch.rand(count, generator=generator) - 0.5) * 0.25
    shift = (torch.rand(count, 2, generator=generator) - 0.5) * 0.3  # of half a side
    cos, sin = scale * turn.cos(), scale * turn.sin()
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(count, 2, 3)
    grid = torch.nn.functional.affine_grid(affine, list(pictures.shape), align_corners=False)
    return 1 - torch.nn.functional.grid_sample(1 - pictures, grid, align_corners=False)
