"""Structured attention: against a loop over heads in fp64; the layer against PyTorch's own, with all its arguments."""

import itertools

import pytest
import torch
from torch import nn

import gssf_kernels as gk


def weights(heads, dim, b, shared=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lead = () if shared else (heads,)
    diag = 1 + 0.5 * torch.randn(*lead, dim, generator=generator, dtype=torch.float64)
    blocks = 0.5 * torch.randn(*lead, dim // b, b, b, generator=generator, dtype=torch.float64)
    return diag, blocks


def matrix(diag, blocks, head, dim):
    """W of one head [D, D]."""
    w = torch.zeros(dim, dim, dtype=torch.float64)
    if diag is not None:
        w = w + torch.diag(diag if diag.dim() == 1 else diag[head])
    if blocks is not None:
        w = w + torch.block_diag(*(blocks if blocks.dim() == 3 else blocks[head]))
    return torch.eye(dim, dtype=torch.float64) if diag is None and blocks is None else w


def by_head(q, k, v, diag, blocks, mask=None, scale=None, groups=1):
    """One head at a time, with its whole matrix of scores."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for head in range(q.shape[-3]):
        keys, values = (t[..., head // groups, :, :] for t in (k, v))
        scores = scale * q[..., head, :, :] @ matrix(diag, blocks, head, q.shape[-1]) @ keys.mT
        scores = scores if mask is None else scores + mask
        out.append(scores.softmax(-1) @ values)
    return torch.stack(out, -3)


def inputs(heads=4, key_heads=4, length=7, keys=9, dim=12, lead=(2,), seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, length, dim), (key_heads, keys, dim), (key_heads, keys, 5)
    return [torch.randn(*lead, *s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def assert_same(ours, right, tensors):
    torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-12)
    weight = torch.linspace(-1, 1, right.numel(), dtype=right.dtype).view(right.shape)
    present = [t for t in tensors if t is not None]
    for got, expected in zip(
        *(torch.autograd.grad((out * weight).sum(), present, retain_graph=True) for out in (ours, right)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("terms", ["both", "diag", "blocks", "none"])
def test_by_head(terms, shared, lead):
    q, k, v = inputs(lead=lead)
    diag, blocks = (t.requires_grad_() for t in weights(4, 12, 3, shared))
    diag, blocks = diag if terms in ("both", "diag") else None, blocks if terms in ("both", "blocks") else None
    right = by_head(q, k, v, diag, blocks)
    for function in (gk.structured_attention, gk.reference.structured_attention):
        assert_same(function(q, k, v, diag, blocks), right, (q, k, v, diag, blocks))


def test_masks_scale_and_fewer_keys():
    diag, blocks = (t.requires_grad_() for t in weights(4, 12, 4))
    q, k, v = inputs()
    mask = torch.where(torch.rand(7, 9, generator=torch.Generator().manual_seed(2)) < 0.3, -torch.inf, 0).double()
    mask[:, 0] = 0
    right = by_head(q, k, v, diag, blocks, mask, 0.7)
    for function in (gk.structured_attention, gk.reference.structured_attention):
        assert_same(function(q, k, v, diag, blocks, attn_mask=mask, scale=0.7), right, (q, k, v, diag, blocks))
    causal = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)
    k, v = (t[..., :7, :] for t in (k, v))
    for function in (gk.structured_attention, gk.reference.structured_attention):
        ours = function(q, k, v, diag, blocks, is_causal=True)
        assert_same(ours, by_head(q, k, v, diag, blocks, causal), (q, diag, blocks))
    q, k, v = inputs(4, 2)
    for function in (gk.structured_attention, gk.reference.structured_attention):
        ours = function(q, k, v, diag, blocks, enable_gqa=True)
        assert_same(ours, by_head(q, k, v, diag, blocks, groups=2), (q, k, v, diag, blocks))


def test_gradcheck():
    q, k, v = inputs(2, 2, 3, 4, 6, ())
    diag, blocks = (t.requires_grad_() for t in weights(2, 6, 3))
    assert torch.autograd.gradcheck(gk.structured_attention, (q, k, v, diag, blocks))


def test_half_rows_with_fp32_weights():
    q, k, v = (t.detach().bfloat16() for t in inputs())
    diag, blocks = (t.float() for t in weights(4, 12, 4))
    ours = gk.structured_attention(q, k, v, diag, blocks)
    assert ours.dtype == torch.bfloat16
    right = by_head(*(t.double() for t in (q, k, v, diag, blocks)))
    torch.testing.assert_close(ours.double(), right, rtol=0.05, atol=0.05)


Q = torch.ones(2, 4, 5, 6)
BAD = [
    ({"q": Q[0, 0]}, ValueError, r"q: expected shape \[\.\.\., H, L, D\], got \[5, 6\]"),
    ({"k": Q.long()}, TypeError, "k: expected a floating dtype"),
    ({"v": 3}, TypeError, "v: .*got int"),
    ({"k": Q[..., :5]}, ValueError, "k: expected the 6 channels of q"),
    ({"diag": torch.ones(5)}, ValueError, r"diag: expected shape \[6\] or \[4, 6\], got \[5\]"),
    ({"diag": torch.ones(2, 6)}, ValueError, r"diag: .*got \[2, 6\]"),
    ({"diag": torch.ones(6).double()}, TypeError, "diag: .*got torch.float64"),
    ({"blocks": torch.ones(2, 4, 4)}, ValueError, r"blocks: .*G·b = 6, got \[2, 4, 4\]"),
    ({"blocks": torch.ones(3, 2, 3, 3)}, ValueError, r"blocks: .*got \[3, 2, 3, 3\]"),
    ({"scale": "1"}, TypeError, "scale: .*got str"),
    ({"is_causal": 1}, TypeError, "is_causal: .*got int"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_arguments(change, kind, message):
    arguments = {"q": Q, "k": Q, "v": Q, "diag": torch.ones(6), "blocks": None, **change}
    with pytest.raises(kind, match=f"^{message}"):
        gk.structured_attention(**arguments)


LAYERS = [
    {"bias": bias, "add_bias_kv": bias_kv, "add_zero_attn": zero, **sizes, "batch_first": first}
    for bias, bias_kv, zero, sizes, first in itertools.product(
        (True, False), (True, False), (True, False), ({}, {"kdim": 10, "vdim": 6}), (True, False)
    )
]


def layers(settings, **structure):
    torch.manual_seed(3)
    plain = nn.MultiheadAttention(24, 4, dtype=torch.float64, **settings)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = gk.StructuredMultiheadAttention(24, 4, dtype=torch.float64, block_size=3, **settings, **structure)
    return plain, ours


def sides(settings, batched=True):
    first = settings.get("batch_first", False)
    widths = 24, settings.get("kdim", 24), settings.get("vdim", 24)
    lengths = 5, 7, 7
    shapes = [((3, n, w) if first else (n, 3, w)) if batched else (n, w) for n, w in zip(lengths, widths, strict=True)]
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("settings", LAYERS, ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()))
def test_a_layer_of_pytorch_loads_and_is_the_same(settings):
    plain, ours = layers(settings)
    ours.load_state_dict(plain.state_dict())  # strictly
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(5)) < 0.3
    mask[:, 0] = False
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    for options in (
        {},
        {"need_weights": False},
        {"average_attn_weights": False, "attn_mask": mask},
        {"key_padding_mask": padding, "need_weights": False},
        {"key_padding_mask": padding, "attn_mask": mask},
    ):
        for got, right in zip(ours(*sides(settings), **options), plain(*sides(settings), **options), strict=True):
            assert (got is None) == (right is None)
            if got is not None:
                torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
    got, right = (layer(*sides(settings, batched=False))[0] for layer in (ours, plain))
    torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("separate", [False, True])
def test_the_layer_is_the_function_on_its_projections(separate):
    settings = {"kdim": 10, "vdim": 6} if separate else {}
    _, layer = layers({**settings, "batch_first": True})
    with torch.no_grad():
        layer.structure.diag += 0.5 * torch.randn(4, 6, dtype=torch.float64)
        layer.structure.blocks += 0.5 * torch.randn(4, 2, 3, 3, dtype=torch.float64)
        layer.in_proj_bias.normal_()
    query, key, value = sides({**settings, "batch_first": True})
    parts = (
        (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight) if separate else layer.in_proj_weight.chunk(3)
    )
    heads = [
        nn.functional.linear(x, weight, bias).unflatten(-1, (4, 6)).transpose(1, 2)
        for x, weight, bias in zip((query, key, value), parts, layer.in_proj_bias.chunk(3), strict=True)
    ]
    mixed = by_head(*heads, layer.structure.diag, layer.structure.blocks)
    right = layer.out_proj(mixed.transpose(1, 2).flatten(2))
    ours, _ = layer(query, key, value)
    assert_same(ours, right, tuple(layer.parameters()))


def test_a_transformer_does_not_pass_by_the_weights():
    """nn.TransformerEncoderLayer has a fused path for inference that reads the parameters of its attention."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 24)
    attention = gk.StructuredMultiheadAttention(24, 4, batch_first=True, block_size=3)
    attention.load_state_dict(encoder.self_attn.state_dict())
    with torch.no_grad():
        right = encoder(x)
        encoder.self_attn = attention.eval()
        torch.testing.assert_close(encoder(x), right)
        attention.structure.diag.mul_(3)
        assert not torch.allclose(encoder(x), right, atol=1e-3)


def test_an_encoder_that_makes_nested_tensors():
    """nn.TransformerEncoder decides when it is built that padded batches become nested tensors in inference."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 6, 8), torch.arange(6) > torch.tensor([[3], [4], [5]])
    with torch.no_grad():
        right = encoder(x, src_key_padding_mask=padding)
        for layer in encoder.layers:
            attention = gk.StructuredMultiheadAttention(8, 2, batch_first=True)
            attention.load_state_dict(layer.self_attn.state_dict())
            layer.self_attn = attention.eval()
        ours = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(torch.where(padding[:, :, None], 0, ours), torch.where(padding[:, :, None], 0, right))


def test_parameters_are_set_again():
    layer = gk.StructuredMultiheadAttention(24, 4)
    assert layer.structure.blocks.shape == (4, 1, 6, 6)  # the largest divisor of 6 channels up to 16
    nn.init.normal_(layer.structure.diag)
    layer._reset_parameters()
    assert (layer.structure.diag == 1).all()
    plain = nn.MultiheadAttention(24, 4)
    nn.init.normal_(layer.structure.diag)
    layer.load_state_dict(plain.state_dict())
    assert (layer.structure.diag == 1).all()
    partial = {name: t for name, t in layer.state_dict().items() if not name.endswith("blocks")}
    with pytest.raises(RuntimeError, match=r"structure\.blocks"):
        layer.load_state_dict(partial)


def test_a_cast_layer_keeps_its_structure_in_fp32():
    layer = gk.StructuredMultiheadAttention(32, 2, batch_first=True).bfloat16()
    assert layer.structure.diag.dtype == layer.structure.blocks.dtype == torch.float32
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    output, _ = layer(x, x, x)
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert layer.structure.diag.grad.dtype == torch.float32


def test_its_own_state_comes_back():
    _, layer = layers({})
    nn.init.normal_(layer.structure.diag)
    _, loaded = layers({})
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded.structure.diag, layer.structure.diag)
    for structure in ({"diagonal": False}, {"diagonal": True}):
        plain, ours = layers({}, **structure)
        ours.load_state_dict(plain.state_dict())
        torch.testing.assert_close(ours(*sides({}))[0], plain(*sides({}))[0])
    with pytest.raises(ValueError, match=r"^block_size: expected a divisor of 6 channels, got 4"):
        gk.StructuredMultiheadAttention(24, 4, block_size=4)
    with pytest.raises(TypeError, match=r"^diagonal: "):
        gk.StructuredMultiheadAttention(24, 4, block_size=None, diagonal=1)
