"""In which precision products and sums are made."""

from typing import Any

import torch


def fp32_products(device_type: str) -> str:
    """How products of fp32 sides may be made on such a device, by PyTorch's settings: "ieee", "tf32" or "bf16".

    Both of PyTorch's ways to say so set what is read here: ``torch.backends.cuda.matmul.fp32_precision`` with its
    parents, whose place it takes where it is "none", and ``torch.set_float32_matmul_precision``, which cannot be asked
    back once both ways have been used: its getter raises. It is for code below the dispatcher: a traced graph would
    keep the answer of the day.
    """
    backend: Any = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    precision = backend.matmul.fp32_precision
    return "ieee" if precision == "none" else precision


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums for inputs of ``dtype``: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
