"""What modules share: parameters that stay fp32, and a scale that is learned through its logarithm."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from gssf_kernels import _checks
from gssf_kernels._library import Function

_HALF = (torch.float16, torch.bfloat16)


class Fp32Module(nn.Module):
    """A module whose parameters and buffers keep their dtype when a model is cast to bf16 or fp16.

    A step of a scale, a bias or a metric's weight is often smaller than the distance between 16-bit numbers, and would
    be lost. Moves to another device, and casts to fp32 and fp64, work as usual.
    """

    def _apply(self, fn, recurse=True):
        def cast(t):
            result = fn(t)
            narrower = result.dtype in _HALF and t.is_floating_point() and t.dtype not in _HALF
            return t.to(result.device) if narrower else result

        return super()._apply(cast, recurse)


class ScaledLoss(Fp32Module):
    """A loss with a scale κ that is learned through its logarithm, as in CLIP.

    Attributes:
        log_scale: scalar parameter, or buffer if not learnable.
    """

    log_scale: Tensor

    def _learn(self, name: str, value: float, learnable: bool, device, dtype) -> None:
        tensor = torch.tensor(value, device=device, dtype=dtype)
        if learnable:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)

    def _learn_scale(self, scale: float, learnable: bool, max_scale: float | None, device, dtype) -> None:
        _checks.flag(learnable, "learnable")
        _checks.parameter_dtype(dtype)
        self.max_scale = None if max_scale is None else _checks.positive(max_scale, "max_scale")
        scale = _checks.positive(scale, "scale")
        if self.max_scale is not None and scale > self.max_scale:
            raise ValueError(f"scale: expected at most max_scale={self.max_scale}, got {scale}")
        self._learn("log_scale", math.log(scale), learnable, device, dtype)

    def _kappa(self, scale: float | Tensor | None) -> Any:
        """κ for the loss function: ``scale``, or the module's own, at most max_scale."""
        if scale is not None:
            return scale
        if self.max_scale is None:
            return _checks.Logarithm(self.log_scale)
        return _checks.Logarithm(_Ceiling.apply(self.log_scale, math.log(self.max_scale)))


class _Ceiling(Function):
    """``min(t, ceiling)``, whose gradient is zero only where a step of descent would raise t further."""

    @staticmethod
    def forward(t, ceiling):
        return t.clamp(max=ceiling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        t, ctx.ceiling = inputs
        ctx.save_for_backward(t)

    @staticmethod
    def backward(ctx, grad_out):
        (t,) = ctx.saved_tensors
        return torch.where((t >= ctx.ceiling) & (grad_out <= 0), 0, grad_out), None
