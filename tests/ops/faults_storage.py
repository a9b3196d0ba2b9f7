from planting import Fault

FAULTS = [
    Fault(
        "storage: two results in one allocation",
        "gssf_kernels/triton/batch_hard.py",
        "batch_hard",
        "positive, negative = (x.new_empty(N, dtype=torch.float32) for _ in range(2))",
        "positive, negative = x.new_empty(2, N, dtype=torch.float32)",
    ),
]
