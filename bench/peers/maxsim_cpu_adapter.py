"""maxsim-cpu: late interaction of one query with many documents, in Rust on libxsmm; no gradient, fp32 only.

``maxsim_scores(query [T, D], documents [N, R, D])`` is a sum over the query's words, called once for each caption.
Tensors and arrays share memory. It has its own threads, as many as there are cores.
"""

import torch

PACKAGE = "maxsim-cpu"
DEVICES = ("cpu",)


def scores():
    import maxsim_cpu

    def variant(problem):
        if problem.x.dtype != torch.float32:
            raise TypeError(f"maxsim-cpu takes float32, got {problem.x.dtype}")
        documents, words = problem.x.numpy(), problem.y.shape[1]
        rows = [torch.from_numpy(maxsim_cpu.maxsim_scores(query.numpy(), documents)) for query in problem.y]
        return (torch.stack(rows, 1) / words,)

    return variant


VARIANTS = {"late_interaction_scores": scores}
