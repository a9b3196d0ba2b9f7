"""Every loss compiles once for one size, once more for all sizes, and is exported with a dynamic batch."""

import io

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch._dynamo.testing import CompileCounterWithBackend

import gssf_kernels as gk

D = 16
SIZES = [24, 40, 96, 7, 33, 50, 70, 11, 300]


class Loss(torch.nn.Module):
    """A loss of two sides with ids; something stands between inputs and loss, as a tower would."""

    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options
        self.log_scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x, y, ids):
        x, y = x * 1.0, y * 1.0
        options = dict(self.options)
        if "scale" in options:
            options["scale"] = self.log_scale.exp()
        if self.function in (gk.batch_hard_loss, gk.circle_loss, gk.multi_similarity_loss, gk.nt_xent_loss):
            return self.function(x + y, ids, **options)
        if self.function is gk.relational_distillation_loss:
            return self.function(x, y.detach(), x.detach() + y.detach(), lam=0.4, tau=0.3) + 0 * y.sum()
        return self.function(x, y, x_ids=ids, y_ids=ids, **options)


LOSSES = {
    "triplet": (gk.triplet_loss, {"normalize": True}),
    "triplet, all": (gk.triplet_loss, {"negatives": "all", "reduction": "mean"}),
    "triplet, semihard": (gk.triplet_loss, {"negatives": "semihard"}),
    "triplet, rows": (gk.triplet_loss, {"symmetric": False, "reduction": "mean"}),
    "triplet, pairs": (gk.triplet_loss, {"pairs": "ids", "reduction": "mean"}),
    "triplet, margin": (gk.triplet_loss, {"false_negative_margin": 0.1}),
    "goal": (gk.goal_loss, {"reduction": "mean"}),
    "goal, relative": (gk.goal_loss, {"pair": "sig_ms"}),
    "info_nce": (gk.info_nce_loss, {"scale": None, "normalize": True}),
    "info_nce, pairs": (gk.info_nce_loss, {"scale": None, "pairs": "ids"}),
    "info_nce, ignore": (gk.info_nce_loss, {"scale": None, "same_id": "ignore", "false_negative_margin": 0.1}),
    "sigmoid": (gk.sigmoid_loss, {"scale": None, "bias": -2.0}),
    "sigmoid, pairs": (gk.sigmoid_loss, {"scale": None, "bias": -2.0, "pairs": "ids"}),
    "nt_xent": (gk.nt_xent_loss, {"scale": None}),
    "batch_hard": (gk.batch_hard_loss, {}),
    "circle": (gk.circle_loss, {}),
    "multi_similarity": (gk.multi_similarity_loss, {"epsilon": 0.1}),
    "distillation": (gk.relational_distillation_loss, {}),
}


def batch(n):
    x, y = (F.normalize(torch.randn(n, D), dim=1) for _ in range(2))
    return x, y, torch.randint(0, max(n // 3, 1), (n,))


def step(module, x, y, ids):
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    loss = module(*leaves, ids)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_compilations(name):
    torch._dynamo.reset()
    function, options = LOSSES[name]
    eager, counter = Loss(function, **options), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, backend=counter, fullgraph=True)
    for sizes, most in (([40] * 4, 1), (SIZES, 2)):
        for n in sizes:
            inputs = batch(n)
            for ours, right in zip(step(compiled, *inputs), step(eager, *inputs), strict=True):
                torch.testing.assert_close(ours, right)
        assert counter.frame_count <= most


@pytest.mark.parametrize("name", LOSSES)
def test_exported_with_a_dynamic_batch(name):
    function, options = LOSSES[name]
    module = Loss(function, **options)
    row = torch.export.Dim("row", min=2, max=4096)
    program = torch.export.export(module, batch(64), dynamic_shapes=({0: row}, {0: row}, {0: row}))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (2, 64, 700):
        inputs = batch(n)
        torch.testing.assert_close(loaded(*inputs), module(*inputs))


CHECKPOINTED = {
    "triplet, all": lambda x, y: gk.triplet_loss(x, y, negatives="all"),
    "info_nce": lambda x, y: gk.info_nce_loss(x, y, scale=4.0),
    "sigmoid": lambda x, y: gk.sigmoid_loss(x, y, scale=4.0, bias=-1.0),
    "multi-similarity": lambda x, y: gk.multi_similarity_loss(x, torch.arange(6) // 2, epsilon=0.1),
    "graph": lambda x, y: gk.graph_pattern_loss(x[None], y[None], negatives="all"),
    "distillation": lambda x, y: gk.relational_distillation_loss(
        x, y, y, lam=0.5, tau=1.0, metric=gk.StructuredSimilarity(8, 4)
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointed_without_reentrance(name):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 8, generator=generator, requires_grad=True) for _ in range(2))
    right = torch.autograd.grad(CHECKPOINTED[name](x, y), x)
    loss = torch.utils.checkpoint.checkpoint(CHECKPOINTED[name], x, y, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, x), right)
