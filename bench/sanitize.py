"""Every GPU kernel once, on ragged sizes, for compute-sanitizer: ``compute-sanitizer python -m bench.sanitize``."""

import torch

from bench import measure
from bench.measure import Case
from bench.ops import OPS


def main() -> None:
    for dtype in ("float32", "bfloat16"):
        for name, op in OPS.items():
            for way in ("ours", "hopper"):
                variant = op.variants[way]() if way in op.variants else None
                if variant is not None and (way, dtype) != ("hopper", "float32"):
                    case = Case(name, 333, 96, 16, dtype, "cuda")
                    problem = op.inputs(case.shape, case.torch_dtype, torch.device("cuda"), 0)
                    measure.turn(op, case, variant, problem)
                    print(f"{case} {way}: done", flush=True)


if __name__ == "__main__":
    main()
