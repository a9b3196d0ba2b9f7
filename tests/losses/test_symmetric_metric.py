"""A metric whose W is symmetric: losses by label compute half of the scores, with the values and gradients of all."""

import copy

import pytest
import torch
import torch.nn.functional as F

import gssf_kernels as gk

LOSSES = {
    "batch_hard_loss": {"margin": 0.3},
    "circle_loss": {"scale": 5.0},
    "multi_similarity_loss": {"beta": 5.0},
    "multi_similarity_loss, mined": {"beta": 5.0, "epsilon": 0.1},
    "nt_xent_loss": {"scale": 3.0},
}
METRICS = {
    "symmetric": {"block_size": 8, "symmetric": True},
    "blocks alone": {"block_size": 8, "symmetric": True, "diagonal": False},
    "permuted, no norms": {"block_size": 8, "symmetric": True, "normalize": False, "permutation": True},
    "diagonal": {"block_size": None},
    "no weights": {"block_size": None, "diagonal": False},
}
every_loss = pytest.mark.parametrize("loss", LOSSES)
every_metric = pytest.mark.parametrize("name", METRICS)


def rows(n=300, d=24, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=random, dtype=torch.float64) / d**0.5
    return x.to(dtype), torch.randint(0, n // 8, (n,), generator=random)


def metric(name, d=24, dtype=torch.float64):
    random = torch.Generator().manual_seed(1)
    settings = dict(METRICS[name])
    if settings.pop("permutation", False):
        settings["permutation"] = torch.randperm(d, generator=random)
    made = gk.StructuredSimilarity(d, dtype=dtype, **settings)
    with torch.no_grad():
        for weight in made.parameters():
            weight += (0.3 * torch.randn(weight.shape, generator=random, dtype=torch.float64)).to(dtype)
    return made


def step(module, loss, x, labels, of, **options):
    """(the loss, its gradients with respect to x and the metric's parameters)."""
    x = x.clone().requires_grad_()
    value = getattr(module, loss.partition(",")[0])(x, labels, metric=of, **LOSSES[loss], **options)
    return [value, *torch.autograd.grad(value, (x, *of.parameters()))]


@every_loss
@every_metric
def test_values_and_gradients(loss, name):
    x, labels = rows()
    of = metric(name)
    for ours, right in zip(step(gk, loss, x, labels, of), step(gk.reference, loss, x, labels, of), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-12)


@every_loss
def test_several_chunks_and_fp32(loss, monkeypatch):
    from gssf_kernels import plan

    monkeypatch.setattr(plan, "CHUNK_SCORES", {"cpu": 1 << 14, "cuda": 1 << 14})
    x, labels = rows(900)
    of = metric("symmetric")
    narrow = copy.deepcopy(of).float()
    truth = step(gk.reference, loss, x.float().double(), labels, of)
    for ours, right in zip(step(gk, loss, x.float(), labels, narrow), truth, strict=True):
        assert (ours.double() - right).norm() <= 3e-6 * right.norm()


@every_loss
def test_gradcheck(loss):
    x, labels = rows(14, 8)
    of = metric("symmetric", 8)
    leaves = (x.requires_grad_(), *of.parameters())
    function = getattr(gk, loss.partition(",")[0])
    assert torch.autograd.gradcheck(lambda x, *_: function(x, labels, metric=of, **LOSSES[loss]), leaves)


def products(loss, explained):
    """FLOPs; of batch-hard those of its sweep, because the products of positives depend on labels."""
    if loss != "batch_hard_loss":
        return explained.forward.flops + (explained.backward.flops if explained.backward else 0)

    def of(ops):
        return sum(op.flops if op.name == "hardest_negatives" else of(op.ops) for op in ops)

    return of(explained.forward.ops)


@every_loss
def test_half_of_the_scores(loss):
    """By the FLOPs of the products, forward and backward, beside those of the same metric without symmetry."""
    x, labels = torch.empty(4096, 64, requires_grad=True), torch.arange(4096) % 512
    flops = []
    for symmetric in (True, False):
        of = gk.StructuredSimilarity(64, 8, symmetric=symmetric)
        function = getattr(gk, loss.partition(",")[0])
        explained = gk.explain(function, x, labels, metric=of, **LOSSES[loss])
        flops.append(products(loss, explained))
    if loss == "multi_similarity_loss, mined":  # without symmetry it takes one product forward, on the CPU, not two
        assert flops[0] < 0.75 * flops[1]
    else:
        assert flops[0] < 0.6 * flops[1]


def test_w_is_symmetric():
    x, _ = rows()
    y = F.normalize(torch.randn(50, 24, dtype=torch.float64))
    for name in METRICS:
        of = metric(name)
        torch.testing.assert_close(of(x, y), of(y, x).mT)
        torch.testing.assert_close(of(x, y), gk.reference.triplet.scores(*of.factors(x, y)))
    plain = gk.StructuredSimilarity(24, 8, dtype=torch.float64)
    plain.load_state_dict(metric("symmetric").state_dict(), strict=True)
    assert not torch.allclose(plain(x, y), plain(y, x).mT)
    assert "symmetric=True" in repr(metric("symmetric"))
    assert not plain.is_symmetric


def test_two_modalities_and_fragments_take_it():
    of = metric("symmetric")
    x, y = (F.normalize(t, dim=1) for t in (rows()[0], rows(seed=3)[0]))
    for function in ("triplet_loss", "goal_loss", "sigmoid_loss"):
        options = {"sigmoid_loss": {"scale": 3.0, "bias": -1.0}}.get(function, {})
        results = []
        for module in (gk, gk.reference):
            value = getattr(module, function)(x, y, metric=of, **options)
            results.append([value, *torch.autograd.grad(value, list(of.parameters()))])
        for ours, right in zip(*results, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)
    fragments = x.view(30, 10, 24), y.view(30, 10, 24)
    for function in ("late_interaction", "attention_pooling"):
        ours, right = (getattr(module, function)(*fragments, metric=of) for module in (gk, gk.reference))
        torch.testing.assert_close(ours, right)


@every_loss
def test_normalize_computes_half_too(loss):
    x, labels = rows()
    function = loss.partition(",")[0]
    ours = getattr(gk, function)(x, labels, normalize=True, **LOSSES[loss])
    torch.testing.assert_close(ours, getattr(gk.reference, function)(x, labels, normalize=True, **LOSSES[loss]))
    inputs = torch.empty(2048, 64), torch.arange(2048) % 256
    explained = gk.explain(getattr(gk, function), *inputs, normalize=True, **LOSSES[loss])
    assert products(loss, explained) < (7.5 if "mined" in loss else 5) * 2048**2 * 64  # of at least 8 and 10


def test_bf16_with_fp32_weights():
    x, labels = rows(200, dtype=torch.bfloat16)
    of = metric("symmetric", dtype=torch.float32)
    for loss in LOSSES:
        ours = step(gk, loss, x, labels, of)
        truth = step(gk.reference, loss, x.double(), labels, copy.deepcopy(of).double())
        assert (ours[0].double() - truth[0]).abs() <= 0.05 * truth[0].abs()
        if not loss.startswith("batch"):
            assert (ours[1].double() - truth[1]).norm() <= 0.1 * truth[1].norm()


@every_loss
def test_compiles_and_a_second_derivative(loss):
    x, labels = rows(40, 8, torch.float32)
    of = metric("symmetric", 8, torch.float32)
    function = getattr(gk, loss.partition(",")[0])
    compiled = torch.compile(
        lambda x: function(x, labels, metric=of, **LOSSES[loss]), fullgraph=loss[-5:] != "mined", backend="aot_eager"
    )
    leaf = x.clone().requires_grad_()
    value = compiled(leaf)
    eager = step(gk, loss, x, labels, of)
    torch.testing.assert_close(value, eager[0])
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], eager[1])
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf, labels, metric=of, **LOSSES[loss]), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


def test_mirrored_scores_of_the_op():
    """The op with symmetric=True: the winners of the upper triangle, mirrored."""
    x, _ = rows(700, dtype=torch.float32)
    of = metric("symmetric", dtype=torch.float32)
    a, b = (t.detach() for t in of.factors(x, x))
    s = (a @ b.T).triu()
    s = s + s.triu(1).T
    ids = torch.arange(700) // 3
    expected = s.masked_fill(ids[:, None] == ids[None, :], -torch.inf).max(1)
    for columns in (True, False):
        options = "sweep", True, columns, None, None, None, None, None, True
        _, score, index, col_score, col_index, _ = torch.ops.gssf.hardest_negatives(a, b, ids, ids, *options)
        torch.testing.assert_close(score, expected.values)
        assert (index == expected.indices).all()
        if columns:
            assert torch.equal(score, col_score)
            assert torch.equal(index, col_index)
    with pytest.raises(ValueError, match="symmetric: expected as many rows"):
        torch.ops.gssf.hardest_negatives(a[:9], b, None, None, *options)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_a_bad_setting(value):
    with pytest.raises(TypeError, match=r"^symmetric: expected True or False"):
        gk.StructuredSimilarity(8, 4, symmetric=value)


@pytest.mark.parametrize("name", ["symmetric", "diagonal"])
def test_mirrored_scores_in_16_bits(name):
    """In bf16, a_i · b_j and a_j · b_i differ: one of them counts for both, forward and backward, mined or not."""
    of = metric(name, 16, torch.float32) if name == "diagonal" else gk.StructuredSimilarity(16, 4, symmetric=True)
    plain = gk.StructuredSimilarity(16, 4)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in of.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=random)
        diag, blocks = of.weights
        plain.diag.copy_(diag)
        plain.blocks.copy_(torch.zeros(4, 4, 4) if blocks is None else blocks)
    labels = torch.arange(24) // 4
    for seed in range(60):
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(6, 16, generator=random)[labels] + 0.7 * torch.randn(24, 16, generator=random)
        x = x.bfloat16().requires_grad_()
        loss = gk.multi_similarity_loss(x, labels, metric=of, epsilon=0.1)
        assert torch.autograd.grad(loss, x)[0].isfinite().all()
        if seed >= 10:
            continue
        truth = x.detach().double().requires_grad_()
        wide = copy.deepcopy(of).double()
        loss = gk.reference.nt_xent_loss(truth, labels, scale=100.0, metric=wide)
        right = torch.autograd.grad(loss, truth)[0]
        errors = []
        for one in (of, plain):
            loss = gk.nt_xent_loss(x, labels, scale=100.0, metric=one)
            errors.append(float((torch.autograd.grad(loss, x)[0].double() - right).norm() / right.norm()))
        assert errors[0] <= 2.5 * errors[1] + 0.01
