"""How many files of the package a call reaches: what somebody has to read who wants to know what it does."""

import sys
from pathlib import Path

import pytest
import torch

import gssf_kernels as gk
from gssf_kernels import device_path

pytest.importorskip("triton")

MOST_FILES = 9  # of the package that InfoNCE of many bf16 rows crosses


def crossed(call):
    """({file}, {(file, line, function)}) of the package in which Python is run by call, without what explains it."""
    package = Path(gk.__file__).parent
    besides = {package / name for name in ("device_path.py", "explain.py", "work.py")}
    functions = set()

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and package in path.parents and path not in besides:
            functions.add((str(path.relative_to(package)), frame.f_code.co_firstlineno, frame.f_code.co_name))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return {path for path, *_ in functions}, functions


def test_info_nce_crosses_few_files():
    """Forward and backward of 16,384 bf16 rows on CUDA, once all is imported."""
    x, y = (torch.empty(16384, 1024, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(2))

    def step():
        with device_path.device_path():
            loss = gk.info_nce_loss(x, y, scale=10.0)
            torch.autograd.grad(loss, [x, y], torch.empty((), device="meta"))

    step()
    files, functions = crossed(step)
    print(f"{len(files)} files, {len(functions)} functions:", *sorted(files), sep="\n  ")
    assert {"losses/info_nce.py", "plan.py"} <= files
    assert len(files) <= MOST_FILES, sorted(files)
