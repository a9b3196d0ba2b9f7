from planting import Fault

FAULTS = [
    Fault(
        "dense: SigLIP's positives have the sign of negatives",
        "gssf_kernels/losses/sigmoid.py",
        "sigmoid_loss",
        'score_sums(a, b, Term("softplus", "negate",',
        'score_sums(a, b, Term("softplus", "include",',
    ),
]
