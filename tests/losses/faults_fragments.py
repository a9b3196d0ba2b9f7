from planting import Fault

CPP = "csrc/late_interaction.cpp"
OP = "gssf_kernels/ops/late_interaction.py"
POOLING = "gssf_kernels/ops/attention_pooling.py"
TRITON = "gssf_kernels/triton/late_interaction.py"
PUBLIC = "gssf_kernels/fragments.py"
TESTS = "ops/test_late_interaction"

FAULTS = [
    Fault(
        "late: the last best region wins",
        "csrc/vector_fragments.h",
        "best_rows",
        "displaces(score, maximum[v])",
        "!(score < maximum[v])",
        TESTS,
    ),
    Fault(
        "late: masked regions take part",
        "csrc/vector_fragments.h",
        "best_rows",
        "of.mask && !of.mask[r]",
        "false",
        TESTS,
    ),
    Fault(
        "late: a region gets the next word",
        "csrc/vector_fragments.h",
        "add_fragments",
        "(kRegions ? t : region)",
        "(kRegions ? 0 : region)",
        TESTS,
    ),
    Fault(
        "late: masked words are added",
        CPP,
        "fold_rows",
        "if (!mask || mask[j])",
        "if (!mask || mask[j] || true)",
        TESTS,
    ),
    Fault(
        "late: a mean over all words",
        CPP,
        "late_interaction",
        "const int64_t count = of.words[k % of.m]",
        "const int64_t count = of.t",
        TESTS,
    ),
    Fault(
        "late: best regions again are those of the first picture",
        CPP,
        "fill",
        "n * of_.r * of_.dim",
        "0 * of_.r * of_.dim",
        TESTS,
    ),
    Fault(
        "late: the composite's gradient is a sum",
        OP,
        "_late_interaction_backward",
        "grad_out.to(dtype) / count",
        "grad_out.to(dtype)",
        TESTS,
    ),
    Fault(
        "late: the composite scores masked pictures",
        OP,
        "_late_interaction",
        "torch.where(mask.any(1)[:, None], total, 0)",
        "total",
        TESTS,
    ),
    Fault(
        "late: Triton's words of a tile are those of one caption",
        TRITON,
        "late_interaction_kernel",
        "caption = first + word // BT",
        "caption = first + word // BT * 0",
        TESTS,
    ),
    Fault(
        "late: Triton divides by all words",
        TRITON,
        "words_of",
        "mask=t < T, other=0",
        "mask=t < T, other=0) * 0 + (t < T",
        TESTS,
    ),
    Fault(
        "late: Triton's regions take every word",
        TRITON,
        "regions_gradient_kernel",
        "& inside[None, :]  # [BR",
        "| inside[None, :]  # [BR",
        TESTS,
    ),
    Fault(
        "late: Triton's later regions win ties",
        TRITON,
        "best_regions",
        "take_larger(score, place, new_score, new_place)",
        "take_larger(new_score, new_place, score, place)",
        TESTS,
    ),
    Fault(
        "late: masked fragments are read",
        PUBLIC,
        "_inputs",
        "t if mask is None else torch.where(mask[:, :, None], t, 0)",
        "t",
    ),
    Fault(
        "pooling: W is applied the wrong way",
        PUBLIC,
        "attention_pooling",
        "blocks.mT.contiguous()",
        "blocks.contiguous()",
    ),
    Fault(
        "pooling: the norm's gradient points inwards",
        POOLING,
        "_attention_pooling_backward",
        "dpooled - radial",
        "dpooled + radial",
    ),
    Fault(
        "pooling: the softmax has no mean",
        POOLING,
        "_attention_pooling_backward",
        "dattention - (attention * dattention)",
        "dattention - 0 * (attention * dattention)",
    ),
    Fault(
        "pooling: masked regions attract",
        POOLING,
        "_block",
        "~mask & mask.any(1, keepdim=True)",
        "mask & ~mask.any(1, keepdim=True)",
    ),
]
