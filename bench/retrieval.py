"""Search and evaluation beside what they replace, for `bench.options`: functions that return numbers, no gradients.

python -m bench.options --only retrieval --out bench/results/cpu-retrieval.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import gssf_kernels as gk

CHUNK_SCORES = 1 << 26  # that plain PyTorch stores at a time: 256 MiB of fp32


def unit(n: int, d: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def search(n: int = 16_384, m: int = 262_144, d: int = 256, k: int = 10) -> dict[str, Callable[[], Any]]:
    """The k best of m candidates for n queries."""
    x, y = unit(n, d, 0), unit(m, d, 1)

    def torch_chunks():
        return [torch.topk(rows @ y.T, k) for rows in x.split(max(CHUNK_SCORES // m, 1))]

    ways: dict[str, Callable[[], Any]] = {"top_scores": lambda: gk.top_scores(x, y, k), "mm + topk": torch_chunks}
    try:
        import faiss
    except ImportError:
        return ways
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(d)  # filled before
    index.add(y.numpy())
    return {**ways, "faiss IndexFlatIP": lambda: index.search(x.numpy(), k)}


def coco(pictures: int = 5_000, captions: int = 5, d: int = 1024) -> dict[str, Callable[[], Any]]:
    """COCO 5K: 5,000 pictures with five captions each."""
    x = unit(pictures, d, 0)
    y = F.normalize(x.repeat_interleave(captions, 0) + 1.2 * unit(pictures * captions, d, 1), dim=1)
    owner = torch.arange(pictures).repeat_interleave(captions)
    ids = torch.arange(pictures)
    a, b = x.numpy(), y.numpy()

    def numpy_loop():
        """The field's: VSE++'s i2t and t2i, an argsort for every picture and caption."""
        of_pictures, of_captions = np.zeros(pictures), np.zeros(pictures * captions)
        for i in range(pictures):
            order = np.argsort(np.dot(a[i : i + 1], b.T).flatten())[::-1]
            of_pictures[i] = min(np.where(order == c)[0][0] for c in range(captions * i, captions * i + captions))
        for i in range(pictures):
            scores = np.dot(b[captions * i : captions * i + captions], a.T)
            for c in range(captions):
                of_captions[captions * i + c] = np.where(np.argsort(scores[c])[::-1] == i)[0][0]
        return [np.mean(ranks < k) for ranks in (of_pictures, of_captions) for k in (1, 5, 10)]

    def plain():
        """All scores in fp32, and an argsort of them both ways."""
        scores = x @ y.T
        order = scores.argsort(1, descending=True)
        of_pictures = (owner[order] == ids[:, None]).int().argmax(1)
        of_captions = (scores.argsort(0, descending=True) == owner).int().argmax(0)
        return [float((ranks < k).float().mean()) for ranks in (of_pictures, of_captions) for k in (1, 5, 10)]

    return {
        "evaluate": lambda: gk.evaluate(x, y, x_ids=ids, y_ids=owner),
        "recall_at_k": lambda: gk.recall_at_k(x, y, 10, x_ids=ids, y_ids=owner),
        "NumPy, argsort each": numpy_loop,
        "PyTorch, argsort": plain,
    }


COMPARISONS: dict[str, Callable[[], dict[str, Callable[[], Any]]]] = {
    "retrieval, top 10 of 262,144": search,
    "retrieval, COCO 5K": coco,
}
