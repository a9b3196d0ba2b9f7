"""Recall at k of a model, both ways."""

import gssf_kernels as gk

KS = (1, 5, 10)
WAYS = ("picture_to_caption", "caption_to_picture")


def recall(result: gk.RetrievalResult) -> dict[str, float]:
    """R@1/5/10 in per cent, from `evaluate` of pictures and captions.

    Picture to caption: any of the picture's captions counts. A tie counts as wrong, so a collapsed model scores 0, not
    100.
    """
    directions = zip(WAYS, ("x_to_y", "y_to_x"), strict=True)
    return {f"{way}_r{k}": 100 * result[f"{direction}.recall@{k}"] for way, direction in directions for k in KS}
