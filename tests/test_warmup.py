"""TripletLoss(warmup=...): the schedule, its step, and what it costs when over."""

import copy
import pickle

import pytest
import torch

import gssf_kernels as gk

SEEDED = torch.Generator().manual_seed(0)  # whatever was imported, and drew numbers, before
X, Y = (torch.randn(n, 6, dtype=torch.float64, generator=SEEDED) for n in (9, 12))


def blend(share, **options):
    every, hardest = (gk.reference.triplet_loss(X, Y, negatives=which, **options) for which in ("all", "hardest"))
    return (1 - share) * every + share * hardest


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_the_loss_goes_over_by_degrees(reduction):
    criterion = gk.TripletLoss(margin=0.7, reduction=reduction, warmup=4)
    for share in (0, 0.25, 0.5, 0.75, 1, 1, 1):
        torch.testing.assert_close(
            criterion(X, Y), blend(share, margin=0.7, reduction=reduction), rtol=1e-12, atol=1e-13
        )


def test_ids_metric_and_gradients_go_through_both_parts():
    metric = gk.StructuredSimilarity(6, 3, dtype=torch.float64)
    criterion = gk.TripletLoss(metric=metric, warmup=2)
    ids = torch.arange(9) // 2, torch.arange(12) // 2
    criterion(X, Y, *ids)
    x = X.clone().requires_grad_()
    leaves = [x, metric.diag, metric.blocks]
    got = torch.autograd.grad(criterion(x, Y, *ids), leaves)
    parts = [
        torch.autograd.grad(gk.triplet_loss(x, Y, x_ids=ids[0], y_ids=ids[1], metric=metric, negatives=which), leaves)
        for which in ("all", "hardest")
    ]
    for g, every, hardest in zip(got, *parts, strict=True):
        torch.testing.assert_close(g, (every + hardest) / 2)


def test_evaluation_looks_without_stepping():
    criterion = gk.TripletLoss(warmup=4)
    criterion(X, Y)
    criterion.eval()
    for _ in range(3):
        torch.testing.assert_close(criterion(X, Y), blend(0.25))
    assert int(criterion.step) == 1
    criterion.train()
    torch.testing.assert_close(criterion(X, Y), blend(0.25))
    torch.testing.assert_close(criterion(X, Y), blend(0.5))


def test_a_checkpoint_goes_on_where_it_stood():
    criterion, other = gk.TripletLoss(warmup=4), gk.TripletLoss(warmup=4)
    for _ in range(3):
        criterion(X, Y)
    state = criterion.state_dict()
    assert {name: int(t) for name, t in state.items()} == {"step": 3}
    other.load_state_dict(state)
    for copied in (other, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        torch.testing.assert_close(copied(X, Y), blend(0.75))
        torch.testing.assert_close(copied(X, Y), blend(1))
    inside = torch.nn.ModuleDict({"loss": gk.TripletLoss(warmup=3)})  # and as a part of a model
    inside.load_state_dict({"loss.step": torch.tensor(3)})
    assert inside["loss"]._warm
    back = torch.nn.ModuleDict({"loss": copy.deepcopy(inside["loss"])})
    back.load_state_dict({"loss.step": torch.tensor(0)})
    torch.testing.assert_close(back["loss"](X, Y), blend(0))


def test_without_warmup_there_is_no_state():
    assert not gk.TripletLoss().state_dict()
    assert "warmup" not in repr(gk.TripletLoss())
    assert "warmup=7" in repr(gk.TripletLoss(warmup=7))


def test_nothing_is_left_of_all_negatives_afterwards():
    """Warm-up keeps more tensors for the backward than the hardest alone do; no step keeps a matrix [N, M]."""
    x, y = torch.randn(200, 8, requires_grad=True), torch.randn(200, 8)
    criterion = gk.TripletLoss(warmup=2)

    def kept(loss):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss(x, y)
        assert max(sizes) < 200 * 200
        return len(sizes)

    hardest = kept(gk.TripletLoss())
    assert [kept(criterion) > hardest for _ in range(4)] == [True, True, False, False]


def test_compiled_warmup_has_the_same_schedule():
    """One graph for all steps; train() ends the warm-up for it."""
    torch._dynamo.reset()
    criterion = gk.TripletLoss(warmup=12)
    compiled = torch.compile(criterion, fullgraph=True)
    for step in range(14):
        torch.testing.assert_close(compiled(X, Y), blend(min(step / 12, 1)))
    assert not criterion._warm
    criterion.train()
    assert criterion._warm
    torch.testing.assert_close(compiled(X, Y), blend(1))


def test_the_step_moves_with_the_module():
    with torch.device("meta"):
        criterion = gk.TripletLoss(warmup=3)
        assert criterion.train()(torch.randn(4, 8), torch.randn(5, 8)).shape == ()
    assert criterion.step.is_meta
    assert int(gk.TripletLoss(warmup=3).double().step) == 0  # stays a whole number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_negatives_sum_in_fp32_under_autocast(dtype):
    x, y = X.float(), Y.float()
    for which in ("all", "semihard"):
        with torch.autocast("cpu", dtype):
            loss = gk.triplet_loss(x, y, negatives=which)
        rounded = x.to(dtype).double(), y.to(dtype).double()
        assert loss.dtype == torch.float32
        step = torch.finfo(torch.float32).eps * float((rounded[0] @ rounded[1].T).abs().max())  # of a score
        torch.testing.assert_close(
            loss.double(), gk.reference.triplet_loss(*rounded, negatives=which), rtol=1e-6, atol=step
        )
