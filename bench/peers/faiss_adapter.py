"""Faiss: similarity search over large collections of vectors, in C++.

``IndexFlatIP``, exact search by inner product, on the CPU with as many threads as PyTorch has. The collection is new
at every training step, so that building the index (a copy of y) is part of the time. Tensors and arrays share memory.
fp32 only.
"""

import torch

PACKAGE = "faiss-cpu"
DEVICES = ("cpu",)


def top(k: int):
    """The builder of a search for the k best."""

    def build():
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())

        def variant(problem):
            if problem.x.dtype != torch.float32:
                raise TypeError(f"faiss searches float32 vectors, got {problem.x.dtype}")
            index = faiss.IndexFlatIP(problem.y.shape[1])
            index.add(problem.y.numpy())
            scores, indices = index.search(problem.x.numpy(), k)
            return torch.from_numpy(scores), torch.from_numpy(indices)

        return variant

    return build


VARIANTS = {"nearest": top(1), "top_scores": top(10)}
