"""Cut Cross-Entropy: cross-entropy of a linear classifier that stores no matrix of logits, in Triton.

``linear_cross_entropy`` with the other side as classifier, mean over rows, once per direction. The learnable scale
multiplies x. ``filter_eps=None`` turns off its gradient filter, which skips tiles of small softmax values and with
them the gradient of a batch whose softmax is flat. Its backward takes bf16 and fp16 only.
"""

import torch

PACKAGE = "cut-cross-entropy"
DEVICES = ("cuda",)


def info_nce():
    from cut_cross_entropy import linear_cross_entropy

    def variant(problem):
        x, y = problem.scale * problem.x, problem.y
        labels = torch.arange(len(x), device=x.device)
        row_loss = linear_cross_entropy(x, y, labels, filter_eps=None)
        column_loss = linear_cross_entropy(y, x, labels, filter_eps=None)
        return (row_loss + column_loss) / 2

    return variant


VARIANTS = {"info_nce": info_nce}
