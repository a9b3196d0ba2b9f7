from planting import Fault

FAULTS = [
    Fault(
        "precision: CUDA's products follow the CPU's setting",
        "gssf_kernels/plan.py",
        "fp32_products",
        'torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn',
        "torch.backends.mkldnn",
    ),
]
