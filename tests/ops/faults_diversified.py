from planting import Fault

DIVERSIFIED = "gssf_kernels/diversified.py"

FAULTS = [
    Fault(
        "diversified: masked features take part",
        DIVERSIFIED,
        "_masked_softmax",
        "torch.where(mask, logits, lowest)",
        "logits",
    ),
    Fault(
        "diversified: an instance without a feature has a penalty",
        DIVERSIFIED,
        "DiversifiedAttention._penalty",
        "torch.where(present, each, 0)",
        "each",
    ),
    Fault(
        "diversified: the penalty pulls maps together",
        DIVERSIFIED,
        "DiversifiedAttention._penalty",
        "(gram - identity)",
        "(gram + identity)",
    ),
    Fault(
        "diversified: NaN of a masked feature",
        DIVERSIFIED,
        "DiversifiedAttention.forward",
        "torch.where(mask[:, :, None], local, 0)",
        "local",
    ),
    Fault(
        "classifier: every modality is the first",
        DIVERSIFIED,
        "ModalityClassifier.forward",
        "torch.full(r.shape[:1], k,",
        "torch.full(r.shape[:1], 0,",
    ),
]
