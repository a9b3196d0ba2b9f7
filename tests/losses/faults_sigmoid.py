from planting import Fault

FAULTS = [
    Fault(
        "dense: SigLIP's positives have the sign of negatives",
        "gssf_kernels/losses/sigmoid.py",
        "sigmoid_loss",
        '"softplus", "negate",',
        '"softplus", "include",',
    ),
]
