"""docs/migrating.md: what it says to write gives the value and the gradients of what it replaces."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gssf_kernels as gk

PAGE = Path(__file__).parents[2] / "docs" / "migrating.md"


def sections():
    """{heading: (the source of `original`, the source of `ours`)}"""
    functions = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        heading, *_ = section.partition("\n")
        functions[heading.split(":")[0]] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return functions


SECTIONS = sections()


def rows(n, seed, unit=True):
    x = torch.randn(n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=1) if unit else 3 * x


def inputs():
    """{heading: the arguments of both functions}"""
    images, texts = rows(8, 1), rows(8, 2)
    ids = torch.tensor([0, 1, 2, 2, 3, 4, 4, 4])
    return {
        "VSE++, VSE∞, SGRAF": (rows(8, 3, unit=False), rows(40, 4, unit=False), torch.randperm(40) % 8),
        "open_clip": (
            images,
            texts,
            torch.cat((images, rows(24, 5))),
            torch.cat((texts, rows(24, 6))),
            torch.tensor(9.0),
        ),
        "sentence-transformers": (rows(8, 7, unit=False), rows(8, 8, unit=False), ids),
        "ALBEF": (images, texts, ids, rows(30, 9), torch.arange(30) % 9, 0.07),
        "SimCLR, SupCon": (rows(24, 10), torch.arange(24) % 8, 0.1),
    }


def test_every_section_is_tried():
    assert set(SECTIONS) == set(inputs())
    assert all(len(functions) == 2 for functions in SECTIONS.values())


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_replacement_is_the_original(heading):
    results = []
    for source, name in zip(SECTIONS[heading], ("original", "ours"), strict=True):
        space = {"torch": torch, "F": F, "gk": gk}
        exec(source, space)
        arguments = [t.clone() if isinstance(t, torch.Tensor) else t for t in inputs_of(heading)]
        leaves = [t.requires_grad_() for t in arguments if isinstance(t, torch.Tensor) and t.is_floating_point()]
        value = space[name](*arguments)
        results.append((value, *torch.autograd.grad(value, leaves, allow_unused=True)))
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, check_dtype=False)


def inputs_of(heading):
    torch.manual_seed(0)
    return inputs()[heading]
