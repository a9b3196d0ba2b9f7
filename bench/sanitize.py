"""Every GPU kernel once, on ragged sizes, for compute-sanitizer: ``compute-sanitizer python -m bench.sanitize``."""

import torch

from bench import measure
from bench.measure import Case
from bench.ops import OPS


def main() -> None:
    for dtype in ("float32", "bfloat16"):
        for name, op in OPS.items():
            variant = op.variants["ours"]()
            if variant is not None:
                case = Case(name, 333, 96, 16, dtype, "cuda")
                problem = op.inputs(case.shape, case.torch_dtype, torch.device("cuda"), 0)
                measure.turn(op, case, variant, problem)
                print(f"{case}: done", flush=True)


if __name__ == "__main__":
    main()
