from planting import Fault

LOSS = "gssf_kernels/losses/distillation.py"
DISTILLATION = "losses/test_distillation"

FAULTS = [
    Fault(
        "relations by a metric: the teachers' shares are exchanged",
        LOSS,
        "_by_metric",
        "-lam * text, (lam - 1) * image",
        "(lam - 1) * text, -lam * image",
        DISTILLATION,
    ),
    Fault("relations by a metric: the diagonal counts", LOSS, "_by_metric", '"exclude"', '"include"', DISTILLATION),
    Fault(
        "relations by a metric: τ is not squared for squares",
        LOSS,
        "_by_metric",
        "phi(1 / tau)",
        "(1 / tau)",
        DISTILLATION,
    ),
]
