"""Two teachers of one modality each, trained here on the training split alone and then frozen.

The image teacher is a picture tower under InfoNCE between two augmentations of the same picture; it sees no caption.
The text teacher is a caption tower under InfoNCE between two captions, of different languages, of the same picture; it
sees no picture, but is told which captions belong together. Towers, optimiser and batches are the student's.
"""

import time

import optimise
import torch
import torch.nn.functional as F
from data import CAPTIONS, Batches, Emoji
from losses import mean_caption
from model import DIM, CaptionTower, PictureTower, embed_captions, embed_pictures
from torch import Tensor

import gssf_kernels as gk

KNOWN_PICTURES, KNOWN_CAPTIONS = "picture_r1", "caption_r1"  # on the validation pictures, see `known`


def two_pictures(tower: PictureTower, batches: Batches) -> tuple[Tensor, Tensor]:
    """Embeddings [B, D], [B, D] of two augmentations of every picture, in one pass for its batch statistics."""
    picked = batches.pick()
    both = torch.cat([batches.pictures(picked), batches.pictures(picked)])
    first, second = tower(both.contiguous(memory_format=torch.channels_last)).chunk(2)
    return first, second


def two_captions(tower: CaptionTower, batches: Batches) -> tuple[Tensor, Tensor]:
    """Embeddings [B, D], [B, D] of two captions of every picture."""
    picked = batches.pick()
    one = torch.randint(CAPTIONS, (len(picked),), generator=batches.generator)
    shift = torch.randint(1, CAPTIONS, (len(picked),), generator=batches.generator)
    other = (one + shift) % CAPTIONS
    return tower(batches.bags(CAPTIONS * picked + one)), tower(batches.bags(CAPTIONS * picked + other))


def fit(tower, views, emoji: Emoji, steps: int, batch: int, seed: int, naive: bool) -> None:
    """Trains the tower in place, for steps of InfoNCE between the two sides of ``views(tower, batches)``."""
    criterion = gk.InfoNCELoss()
    optimiser = optimise.adamw(list(tower.parameters()), list(criterion.parameters()))
    batches = Batches(emoji, batch, torch.Generator().manual_seed(seed))
    for step in range(1, steps + 1):
        optimise.set_learning_rate(optimiser, step / steps)
        x, y = (F.normalize(side, dim=1) for side in views(tower, batches))
        loss = gk.reference.info_nce_loss(x, y, scale=criterion.log_scale.exp()) if naive else criterion(x, y)
        optimise.step(optimiser, loss, f"{type(tower).__name__} as a teacher, step {step}")


def train(splits: dict[str, Emoji], steps: int, batch: int, seed: int, naive: bool = False):
    """Both teachers.

    Returns:
        their unit rows (u [P, D], t [P, D]) for the training pictures, t of a picture's captions together; and what it
        took and gave: steps, seconds and cpu_seconds of both together, and :func:`known` in per cent.
    """
    begun, worked = time.perf_counter(), time.process_time()
    with torch.random.fork_rng():  # so that the student starts and drops out as without teachers
        torch.manual_seed(seed)
        image = PictureTower(DIM).to(memory_format=torch.channels_last)
        text = CaptionTower(DIM)
        fit(image, two_pictures, splits["train"], steps, batch, seed, naive)
        fit(text, two_captions, splits["train"], steps, batch, seed, naive)
        facts = {"steps": steps, "seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - worked}
        facts |= known(image, text, splits["val"])
    pictures = F.normalize(embed_pictures(image, splits["train"]), dim=1)
    captions = embed_captions(text, splits["train"])
    return (pictures, mean_caption(captions, len(pictures))), facts


@torch.no_grad()
def known(image: PictureTower, text: CaptionTower, emoji: Emoji) -> dict[str, float]:
    """How often a picture finds itself augmented, and a caption the same picture's next in language, as R@1 in %."""
    itself = torch.arange(len(emoji.pictures))
    plain = F.normalize(embed_pictures(image, emoji), dim=1)
    image.eval()
    batches = Batches(emoji, len(itself), torch.Generator().manual_seed(0))
    augmented = F.normalize(image(batches.pictures(itself)), dim=1)
    image.train()
    captions = F.normalize(embed_captions(text, emoji), dim=1).unflatten(0, (len(itself), CAPTIONS))
    found = 100 * gk.recall_at_k(augmented, plain)[0]
    pairs = [(k, (k + 1) % CAPTIONS) for k in range(CAPTIONS)]
    across = [100 * gk.recall_at_k(captions[:, k], captions[:, m])[0] for k, m in pairs]
    return {KNOWN_PICTURES: found, KNOWN_CAPTIONS: sum(across) / len(across)}
