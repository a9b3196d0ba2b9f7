"""What the tests of `gk.explain` share: inputs without values, and its numbers in one unit."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gssf_kernels as gk
from gssf_kernels import _library

KIB = 1 << 10
D = 1024
needs_triton = pytest.mark.skipif(not _library._HAS_TRITON, reason="Triton is not installed")
needs_extension = pytest.mark.skipif(_library.EXTENSION_ERROR is not None, reason="the extension is not loaded")


def sides(n, dtype=torch.float32, device="meta", d=D, count=2):
    return [torch.empty(n, d, dtype=dtype, device=device) for _ in range(count)]


def absent(n, device, **options):
    """Fake tensors: of no memory, on a device that need not be there."""
    with FakeTensorMode():
        return sides(n, device=device, **options)


def routes(ops):
    """[(op, route)] as they come, with those that they call."""
    return [pair for op in ops for pair in ((op.name, op.route), *routes(op.ops))]


def extra(explanation):
    """KiB of (forward, kept, backward)."""
    passes = (explanation.forward.extra_mib, explanation.kept_mib, explanation.backward.extra_mib)
    return tuple(mib * 1024 for mib in passes)


def kib(**parts):
    """The sum of (count, bytes each), in KiB."""
    return sum(count * size for count, size in parts.values()) / KIB


CALLS = {  # of x and y; launches (forward, backward) of small ones as tests of launches have them
    "triplet": (gk.triplet_loss, {}, (3, 2)),
    "all negatives": (gk.triplet_loss, {"negatives": "all"}, (3, 1)),
    "info_nce": (gk.info_nce_loss, {"scale": 10.0}, (2, 2)),
    "sigmoid": (gk.sigmoid_loss, {"scale": 10.0, "bias": -1.0}, (2, 1)),
    "goal": (gk.goal_loss, {}, (3, 2)),
    "goal with relative terms": (gk.goal_loss, {"pair": "sig_ms"}, (2, 2)),
}
