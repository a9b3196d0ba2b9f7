from planting import Fault

ATTENTION = "gssf_kernels/attention.py"

FAULTS = [
    Fault(
        "attention: heads and channels are exchanged",
        ATTENTION,
        "_projected",
        "q.transpose(-3, -2)",
        "q.transpose(-3, -2).flip(-2)",
    ),
    Fault(
        "attention: weights of all heads are the first one's",
        ATTENTION,
        "_of_every_head",
        "diag.expand(heads, dim)",
        "diag.view(-1, dim)[:1].expand(heads, dim)",
    ),
    Fault(
        "attention: the bias of q has no W",
        ATTENTION,
        "StructuredMultiheadAttention.forward",
        "self.structure(bias[:size])",
        "bias[:size]",
    ),
    Fault(
        "attention: W is transposed in the layer",
        ATTENTION,
        "StructuredMultiheadAttention.forward",
        "self.structure(weight[:size].mT).mT",
        "self.structure(weight[:size])",
    ),
    Fault(
        "attention: a transformer passes by W",
        ATTENTION,
        "StructuredMultiheadAttention.__init__",
        "self._qkv_same_embed_dim = False",
        "pass",
    ),
]
