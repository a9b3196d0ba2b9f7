"""FlashLib: classical machine learning on GPUs, in Triton and CuTe DSL.

The step of its k-means that finds the centroid nearest to every point: ``cutedsl_assign_euclid`` where
nvidia-cutlass-dsl is installed (its fused kernel takes bf16 and fp16 of up to 512 channels on Hopper, and leaves the
rest to Triton), else ``euclid_assign_triton``. It ranks by ``|y|² - 2 x·y``; rows have unit length, so that ``|y|²``
is given as 1 and the nearest is the one of the highest score. It gives places only: ``triton_knn_gather_sqdist``,
which ends the library's own search, gives ``|x - y|² = 2 - 2 x·y`` of the places found.

The Triton kernels multiply fp32 in TF32: of near-ties in fp32, the wrong one may be named.
"""

import importlib.util

import torch

PACKAGE = "flashlib"
DEVICES = ("cuda",)


def nearest():
    from flashlib.kernels.distance.triton import triton_knn_gather_sqdist
    from flashlib.primitives import kmeans

    fused = importlib.util.find_spec("cutlass") is not None
    assign = kmeans.cutedsl_assign_euclid if fused else kmeans.euclid_assign_triton

    def variant(problem):
        x, y = problem.x[None], problem.y[None]  # [1, N, D]: a batch of one
        squares = torch.ones(y.shape[:2], device=y.device)  # [1, N] fp32
        index = assign(x, y, c_sq=squares)[..., None]  # [1, N, 1] int32
        distance = triton_knn_gather_sqdist(x, y, index)  # [1, N, 1] fp32
        return 1 - distance[0] / 2, index[0]

    return variant


VARIANTS = {"nearest": nearest}
