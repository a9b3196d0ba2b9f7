"""OpenCLIP: the reference training code of CLIP models, in plain PyTorch.

``ClipLoss`` and ``SigLipLoss`` of ``open_clip.loss``, in one process. That file needs PyTorch alone and is loaded by
itself, because importing the package needs torchvision.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

PACKAGE = "open_clip_torch"
DEVICES = ("cpu", "cuda")


def _losses() -> ModuleType:
    """``open_clip/loss.py``, without the package around it."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("open_clip is not installed")
    file = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", file)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"open_clip has no {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def info_nce():
    loss = _losses().ClipLoss()
    return lambda problem: loss(problem.x, problem.y, problem.scale)


def sigmoid():
    loss = _losses().SigLipLoss()
    return lambda problem: loss(problem.x, problem.y, problem.scale, problem.bias)


VARIANTS = {"info_nce": info_nce, "sigmoid": sigmoid}
