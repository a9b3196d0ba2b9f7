"""``python -m gssf_kernels``: versions, devices and backends of this installation, for bug reports.

``python -m gssf_kernels COMMAND``: :mod:`gssf_kernels.retrieval.commands`.
"""

import platform
import sys
from pathlib import Path

import torch

import gssf_kernels as gk
from gssf_kernels import _library, plan

_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "asimd", "sve")


def cpu_description() -> str:
    """The CPU's model and those of its features that the package uses, if the system names them."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpuinfo)}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    features = [name for name in _CPU_FEATURES if name in flags]
    return f"{fields.get('model name', platform.machine())}; {', '.join(features) or 'no vector features known'}"


def gpu_description() -> str:
    if not torch.cuda.is_available():
        return f"none (PyTorch built for CUDA: {torch.version.cuda or 'no'})"
    names = []
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        names.append(f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})")
    return f"{', '.join(names)}; CUDA {torch.version.cuda}"


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def report() -> str:
    """The environment report, as text."""
    hopper = plan.hopper_built()
    extension = "loaded" if _library.EXTENSION_ERROR is None else f"not loaded ({_library.EXTENSION_ERROR})"
    table = gk.backends()
    width = max(map(len, table)) + 2
    text = [
        f"gssf_kernels {gk.__version__}",
        f"python       {platform.python_version()} on {platform.platform()}",
        f"torch        {torch.__version__}",
        f"triton       {triton_version()}",
        f"cpu          {cpu_description()}",
        f"threads      {torch.get_num_threads()}",
        f"gpu          {gpu_description()}",
        f"extension    {extension}",
        f"csrc/cuda    {'built' if hopper else 'not built'}",
        f"certified    {table['hardest_negatives']['certified']} (mining of fp32 on the CPU's bf16 unit)",
        "",
        f"{'op':{width}}{'cpu':12}cuda",
    ]
    for op, active in table.items():
        text.append(f"{op:{width}}{active['cpu']:12}{active['cuda']}")
    if _library.EXTENSION_ERROR is not None:
        text += ["", "Without the extension everything works, on the slower reference. To build it (needs a C++"]
        text += ["compiler): pip install --no-build-isolation --force-reinstall --no-deps gssf_kernels"]
    return "\n".join(text)


if __name__ == "__main__":
    if sys.argv[1:]:
        from gssf_kernels.retrieval.commands import main

        sys.exit(main(sys.argv[1:]))
    print(report())
