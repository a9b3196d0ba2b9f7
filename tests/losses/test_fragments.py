"""Late interaction, attention pooling and their triplet loss: against their definitions in fp64, and the contracts."""

import pytest
import torch
import torch.nn.functional as F

import gssf_kernels as gk

FUNCTIONS = {
    "late_interaction": {},
    "late_interaction, sum": {"reduce": "sum"},
    "attention_pooling": {"scale": 5.0},
    "attention_pooling, words": {"over": "words", "scale": 5.0},
    "late_interaction_triplet_loss": {"margin": 0.5},
    "late_interaction_triplet_loss, none": {"margin": 0.5, "reduction": "none", "reduce": "sum"},
}


def fragments(n=6, r=5, m=8, t=4, d=8, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    sides = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((n, r, d), (m, t, d)))
    return [F.normalize(side, dim=2).to(dtype) for side in sides]


def masks(n=6, r=5, m=8, t=4, seed=1):
    """Some of everything; a picture without regions, a caption without words, one of each with a single one."""
    random = torch.Generator().manual_seed(seed)
    regions, words = (torch.rand(shape, generator=random) > 0.3 for shape in ((n, r), (m, t)))
    regions[1], words[2] = False, False
    regions[3], words[4] = torch.arange(r) == r - 1, torch.arange(t) == t - 1
    return {"regions_mask": regions, "words_mask": words}


def metric(seed=0, dim=8, **settings):
    random = torch.Generator().manual_seed(seed)
    made = gk.StructuredSimilarity(dim, block_size=4, dtype=torch.float64, **settings)
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=random, dtype=torch.float64)
    return made


def check(function, sides, tolerance=1e-11, wrt=(), **options):
    """The value and the gradients of ours and of the definition, in the dtype of each."""
    results = []
    for module in (gk, gk.reference):
        leaves = [t.detach().to(torch.float64 if module is gk.reference else t.dtype) for t in sides]
        leaves = [t.clone().requires_grad_() for t in leaves]
        value = getattr(module, function)(*leaves, **options)
        weight = torch.cos(torch.arange(value.numel(), dtype=torch.float64)).to(value.dtype).view(value.shape)
        results.append((value, *torch.autograd.grad((value * weight).sum(), (*leaves, *wrt))))
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), right.double(), rtol=tolerance, atol=tolerance)


every_function = pytest.mark.parametrize("name", FUNCTIONS)


@every_function
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("similarity", ["plain", "metric", "metric without norms", "permuted"])
def test_against_the_definition(name, masked, similarity):
    options = dict(FUNCTIONS[name]) | (masks() if masked else {})
    wrt = ()
    if similarity != "plain":
        settings = {"normalize": similarity != "metric without norms"}
        if similarity == "permuted":
            settings["permutation"] = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
        options["metric"] = metric(**settings)
        wrt = tuple(options["metric"].parameters())
    check(name.partition(",")[0], fragments(), wrt=wrt, **options)


@every_function
def test_fp32_and_halves(name):
    function, options = name.partition(",")[0], FUNCTIONS[name] | masks(40, 36, 50, 11)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        sides = fragments(40, 36, 50, 11, 32, dtype)
        result = getattr(gk, function)(*sides, **options)
        assert result.dtype == torch.float32
        if "triplet" in function and dtype != torch.float32:
            continue  # which negative is hardest is rounding's choice
        check(function, sides, tolerance, **options)


@every_function
def test_gradcheck(name):
    function, options = getattr(gk, name.partition(",")[0]), FUNCTIONS[name] | masks(5, 3, 6, 4)
    of = metric()
    sides = [t.requires_grad_() for t in fragments(5, 3, 6, 4)]
    assert torch.autograd.gradcheck(lambda v, w, *_: function(v, w, metric=of, **options), (*sides, *of.parameters()))


@every_function
def test_what_is_masked_is_not_read(name):
    function, options = getattr(gk, name.partition(",")[0]), FUNCTIONS[name] | masks()
    of = metric()
    for similarity, wrt in (({}, ()), ({"metric": of}, tuple(of.parameters()))):
        results = []
        for filler in (0.0, torch.nan, torch.inf):
            sides = [
                torch.where(mask[:, :, None], t, filler).requires_grad_()
                for t, mask in zip(fragments(), (options["regions_mask"], options["words_mask"]), strict=True)
            ]
            value = function(*sides, **similarity, **options).sum()
            results.append((value, *torch.autograd.grad(value, (*sides, *wrt))))
        for result in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@every_function
def test_no_fragment_is_a_score_of_zero(name):
    function = name.partition(",")[0]
    if function.endswith("loss"):
        return
    scores = getattr(gk, function)(*fragments(), **FUNCTIONS[name], **masks())
    assert not scores[1].any()
    assert not scores[:, 2].any()
    assert scores[0, 0] != 0


@pytest.mark.parametrize("negatives", ["hardest", "semihard", "all"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_loss_is_that_of_the_scores(negatives, symmetric):
    """And its gradient, though best regions are computed again."""
    options = {"margin": 0.4, "negatives": negatives, "symmetric": symmetric}
    options |= {"x_ids": torch.arange(30) // 2, "y_ids": torch.arange(40) // 2}
    of_scores = masks(30, 9, 40, 13)
    results = []
    for joined in (True, False):
        sides = [t.requires_grad_() for t in fragments(30, 9, 40, 13, 16, torch.float32)]
        if joined:
            loss = gk.late_interaction_triplet_loss(*sides, **options, **of_scores)
        else:
            loss = gk.triplet_from_scores(gk.late_interaction(*sides, **of_scores), **options)
        results.append((loss, *torch.autograd.grad(loss, sides)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_the_module_is_the_function():
    settings = {"margin": 0.4, "negatives": "semihard", "reduce": "sum", "reduction": "mean", "symmetric": False}
    of = metric()
    module = gk.LateInteractionTripletLoss(**settings, metric=of)
    assert len(list(module.parameters())) == 2
    sides, options = fragments(), masks()
    ids = torch.arange(6) // 2, torch.arange(8) // 2
    expected = gk.late_interaction_triplet_loss(*sides, **settings, metric=of, **options, x_ids=ids[0], y_ids=ids[1])
    assert module(*sides, *options.values(), *ids) == expected
    assert "reduce='sum'" in repr(module)


@every_function
def test_compiles_whole_and_for_all_sizes(name):
    function = getattr(gk, name.partition(",")[0])
    compiled = torch.compile(
        lambda v, w: function(v, w, **FUNCTIONS[name]).sum(), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for n in (6, 9, 40):
        sides = [t.requires_grad_() for t in fragments(n, n, n, n, 8, torch.float32)]
        value = compiled(*sides)
        right = function(*sides, **FUNCTIONS[name]).sum()
        torch.testing.assert_close(value, right)
        for ours, expected in zip(torch.autograd.grad(value, sides), torch.autograd.grad(right, sides), strict=True):
            torch.testing.assert_close(ours, expected)


@every_function
def test_transforms_and_a_second_derivative(name):
    function = getattr(gk, name.partition(",")[0])
    v, w = fragments()
    value = lambda x: function(x, w, **FUNCTIONS[name]).sum()  # noqa: E731
    leaf = v.clone().requires_grad_()
    right = torch.autograd.grad(value(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(value)(v), right)
    (first,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


@every_function
def test_autocast_and_any_layout(name):
    function = getattr(gk, name.partition(",")[0])
    v, w = fragments(dtype=torch.float32)
    right = function(v.bfloat16(), w.bfloat16(), **FUNCTIONS[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(v, w, **FUNCTIONS[name]), right)
    turned = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (v, w)]
    assert torch.equal(function(*turned, **FUNCTIONS[name]), function(v, w, **FUNCTIONS[name]))


def test_attention_pooling_in_blocks(monkeypatch):
    """Several blocks of either side give what one gives."""
    from gssf_kernels import plan

    for over in ("regions", "words"):
        right = gk.attention_pooling(*fragments(), over=over, **masks())
        with monkeypatch.context() as patch:
            patch.setattr(plan, "CHUNK_SCORES", {"cpu": 150, "cuda": 150})
            torch.testing.assert_close(gk.attention_pooling(*fragments(), over=over, **masks()), right)
            check("attention_pooling", fragments(), over=over, **masks())


def test_opposite_regions_that_pool_to_nothing():
    """‖c‖ = 0: the score is 0, and the gradient is finite."""
    regions = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], requires_grad=True)
    words = torch.tensor([[[0.0, 1.0]]], requires_grad=True)
    score = gk.attention_pooling(regions, words)
    assert score == 0
    score.backward()
    assert regions.grad.isfinite().all()


def test_a_call_explained():
    v, w = torch.empty(64, 36, 32, device="meta"), torch.empty(64, 20, 32, device="meta")
    forward = gk.explain(gk.late_interaction, v, w).forward
    (op,) = [op for op in forward.ops if op.name == "late_interaction"]
    assert op.launches == {"late_interaction_kernel": 1}
    assert op.flops == 2 * 64 * 36 * 64 * 20 * 32
    small = torch.ones(24, 36, 32), torch.ones(24, 20, 32)
    assert gk.explain(gk.attention_pooling, *small).forward.extra_mib < 30
    on_cpu = gk.explain(gk.late_interaction_triplet_loss, torch.ones(4, 3, 8), torch.ones(4, 5, 8))
    assert {op.name for op in on_cpu.forward.ops} >= {"late_interaction"}
    assert gk.explain(gk.attention_pooling, v, w).forward.flops >= 2 * 2 * 64 * 36 * 64 * 20 * 32


@every_function
def test_nothing_to_compare_still_reaches_the_metric(name):
    function = getattr(gk, name.partition(",")[0])
    of = metric()
    for n, r, m, t in ((0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 2, 0), (0, 3, 0, 4)):
        sides = torch.randn(n, r, 8, dtype=torch.float64), torch.randn(m, t, 8, dtype=torch.float64)
        function(*sides, metric=of, **FUNCTIONS[name]).sum().backward()
        assert not of.diag.grad.any()


V, W = torch.ones(4, 3, 2), torch.ones(4, 5, 2)
NESTED = torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(5, 2)])
BAD = [
    ({"words": NESTED}, TypeError, r"words: expected a dense \(strided\) tensor, got a nested one"),
    ({"regions": torch.ones(4, 3)}, ValueError, r"regions: expected shape \[N, R, D\], got \[4, 3\]"),
    ({"regions": [V]}, TypeError, "regions: .*got list"),
    ({"words": W.double()}, TypeError, "words: .*got torch.float64"),
    ({"words": torch.ones(4, 5, 3)}, ValueError, r"words: expected the 2 channels of regions, got \[4, 5, 3\]"),
    ({"regions": torch.ones(4, 3, 0), "words": torch.ones(4, 5, 0)}, ValueError, "regions: expected at least one ch"),
    ({"regions_mask": torch.ones(4, 3)}, TypeError, "regions_mask: .*got torch.float32"),
    ({"regions_mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError, r"regions_mask: .*\[4, 3\], got \[3, 4\]"),
    ({"words_mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"words_mask: .*\[4, 5\], got \[4\]"),
    ({"metric": "cosine"}, TypeError, "metric: .*got str"),
    ({"metric": gk.StructuredSimilarity(3, None)}, ValueError, "diag: "),
]
OF_ONE = {
    "late_interaction": [
        ({"reduce": "max"}, ValueError, "reduce: .*got 'max'"),
        ({"normalize": 1}, TypeError, "normalize: .*got int"),
        ({"regions": torch.ones(1, 32768, 2)}, ValueError, "regions: expected at most 32,767 regions"),
    ],
    "attention_pooling": [
        ({"over": "both"}, ValueError, "over: .*got 'both'"),
        ({"scale": 0.0}, ValueError, "scale: .*got 0.0"),
        ({"scale": torch.ones(())}, TypeError, "scale: .*got Tensor"),
    ],
    "late_interaction_triplet_loss": [
        ({"words": torch.ones(3, 5, 2)}, ValueError, r"words: expected at least 4 captions .*got \[3, 5, 2\]"),
        ({"margin": -1.0}, ValueError, "margin: .*got -1.0"),
        ({"negatives": "soft"}, ValueError, "negatives: .*got 'soft'"),
        ({"reduction": "max"}, ValueError, "reduction: .*got 'max'"),
        ({"symmetric": 1}, TypeError, "symmetric: .*got int"),
        ({"x_ids": torch.ones(3, dtype=torch.int64)}, ValueError, r"x_ids: .*got \[3\]"),
        ({"words": torch.ones(5, 5, 2), "y_ids": torch.arange(5)}, ValueError, "x_ids: expected ids too"),
    ],
}
CASES = [(function, *case) for function, extra in OF_ONE.items() for case in BAD + extra]


@pytest.mark.parametrize(("function", "change", "kind", "message"), CASES)
def test_bad_arguments(function, change, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        getattr(gk, function)(**{"regions": V, "words": W, **change})


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"margin": -1.0}, ValueError, "margin: "),
        ({"negatives": "soft"}, ValueError, "negatives: "),
        ({"reduce": "max"}, ValueError, "reduce: "),
        ({"reduction": "max"}, ValueError, "reduction: "),
        ({"metric": "cosine"}, TypeError, "metric: "),
        ({"metric": metric(), "normalize": True}, ValueError, "normalize: .*got True"),
        ({"symmetric": 1}, TypeError, "symmetric: "),
    ],
)
def test_bad_settings(settings, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        gk.LateInteractionTripletLoss(**settings)
