"""Inf-CL: contrastive loss that stores no N x N matrix, in Triton, with a ring over GPUs.

``cal_flash_loss``, the kernel of one GPU, gives one direction's loss per row, so that it is called twice.
``cal_inf_loss``, the distributed form around the same kernel, reduces the gradient of a learnable scale over all
processes even in a run of one, and so needs a process group. The channels are taken in heads: powers of two up to 256
that divide D.

It casts to fp32 whatever it is given and multiplies in TF32: fp32 results are not exact.
"""

import math

PACKAGE = "inf-cl"
DEVICES = ("cuda",)


def info_nce():
    from inf_cl import cal_flash_loss

    def variant(problem):
        x, y, scale = problem.x, problem.y, problem.scale
        head = math.gcd(x.shape[1], 256)
        row_loss = cal_flash_loss(x, y, scale=scale, head_dim=head)  # [N]
        column_loss = cal_flash_loss(y, x, scale=scale, head_dim=head)
        return (row_loss.mean() + column_loss.mean()) / 2

    return variant


VARIANTS = {"info_nce": info_nce}
