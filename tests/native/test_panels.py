"""Operands as the products take them: panels of columns, and pairs of bf16, by every instruction set."""

import numpy as np
import pytest
import torch

KINDS = {
    "fp32": (torch.float32, "float32"),
    "fp64": (torch.float64, "float64"),
    "fp16": (torch.float16, "float32"),
    "bf16": (torch.bfloat16, "float32"),
}


def strided(x, how):
    """x, its rows or its columns adjacent in memory, or neither."""
    if how == "rows":
        return np.ascontiguousarray(x)
    if how == "columns":
        return np.asfortranarray(x)
    return np.repeat(x, 2, 1)[:, ::2]


def as_numpy(x):
    """A tensor; bf16 by its bits."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


@pytest.mark.parametrize("layout", ["rows", "columns", "neither"])
@pytest.mark.parametrize("kind", KINDS)
def test_panels_hold_every_number_and_zeros_behind(kernels, internals, kind, layout):
    narrow, wide = KINDS[kind]
    panel = internals.kPanel[wide]
    for k in (1, internals.kChain + 1, internals.kDepth + 9):
        for width in (1, panel // 2 - 1, panel // 2, panel - 1, panel):
            y = torch.randn(k, width, dtype=torch.float64).to(narrow)
            packed = kernels.pack(strided(as_numpy(y), layout)).reshape(k, panel)
            np.testing.assert_array_equal(packed[:, :width], y.to(getattr(torch, wide)).numpy())
            assert (packed[:, width:] == 0).all()


PAIRED = {kind: KINDS[kind][0] for kind in ("fp32", "fp16", "bf16")}


@pytest.mark.parametrize("panel", [False, True], ids=["rows", "panel"])
@pytest.mark.parametrize("layout", ["rows", "columns", "neither"])
@pytest.mark.parametrize("kind", PAIRED)
def test_pairs_are_rounded_to_bf16(kernels, internals, kind, layout, panel):
    fill = 7
    for lines in (1, 16, 45):
        for channels in (1, 32, 71):
            x = torch.randn(lines, channels).to(PAIRED[kind])
            pairs = kernels.pairs(strided(as_numpy(x), layout), panel, fill)
            length = -(-channels // internals.kPairStep) * internals.kPairStep // 2
            if panel:
                pairs = pairs.reshape(length, internals.kPairPanel).T
            pairs = np.ascontiguousarray(pairs.reshape(internals.kPairPanel, length))
            rounded = np.zeros((lines, 2 * length), np.uint16)
            rounded[:, :channels] = as_numpy(x.float().bfloat16())
            np.testing.assert_array_equal(pairs[:lines].view(np.uint16), rounded)
            if panel:  # zeros up to its last column
                assert (pairs[lines:] == 0).all()
            else:  # up to 15 lines beyond may be written, not more
                assert (pairs[-(-lines // 16) * 16 :] == fill).all()


def test_rounding_of_ties_overflow_and_nan(kernels):
    bits = np.arange(0x3F808000, 0x3F908000, 0x10000, dtype=np.int64)  # half way between two bf16 numbers
    special = [0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0x3F80FFFF, 0x80000000]
    bits = np.concatenate((bits, bits + 1, bits - 1, special, [0] * 8)).astype(np.uint32)
    x = torch.from_numpy(bits.view(np.float32))[None]
    rounded = torch.from_numpy(kernels.pairs(x.numpy(), False, 0)[: len(bits) // 2].view(np.uint16))
    torch.testing.assert_close(rounded.view(torch.bfloat16), x.bfloat16()[0], rtol=0, atol=0, equal_nan=True)
