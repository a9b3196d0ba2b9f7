"""fp32 products follow PyTorch's setting for them, whichever of its two ways made it, and mixtures of both.

Once both ways have been used, `torch.get_float32_matmul_precision()` raises; nothing of ours may.
"""

import pytest
import torch
import torch.nn.functional as F

import gssf_kernels as gk
from gssf_kernels import _library
from gssf_kernels.plan import fp32_products


def cuda(precision):
    torch.backends.cuda.matmul.fp32_precision = precision


def every_cuda(precision):
    torch.backends.cudnn.fp32_precision = precision


def cpu(precision):
    torch.backends.mkldnn.matmul.fp32_precision = precision


def every_cpu(precision):
    torch.backends.mkldnn.set_flags(_fp32_precision=precision)


def everywhere(precision):
    torch.backends.fp32_precision = precision


def allow_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = allowed


old = torch.set_float32_matmul_precision

SETTINGS = {  # the calls in order, then what they leave for products on CUDA and on the CPU
    "untouched": ([], "ieee", "ieee"),
    "old highest": ([(old, "highest")], "ieee", "ieee"),
    "old high": ([(old, "high")], "tf32", "tf32"),
    "old medium": ([(old, "medium")], "tf32", "bf16"),
    "old allow_tf32": ([(allow_tf32, True)], "tf32", "ieee"),
    "new cuda": ([(cuda, "tf32")], "tf32", "ieee"),
    "new cuda taken back": ([(cuda, "tf32"), (cuda, "none")], "ieee", "ieee"),
    "new cpu": ([(cpu, "bf16")], "ieee", "bf16"),
    "new parents": ([(every_cuda, "tf32"), (every_cpu, "bf16")], "tf32", "bf16"),
    "new everywhere": ([(everywhere, "tf32")], "tf32", "tf32"),
    "new everywhere bf16": ([(everywhere, "bf16")], "ieee", "bf16"),
    "new child over parent": ([(everywhere, "tf32"), (cuda, "ieee"), (cpu, "bf16")], "ieee", "bf16"),
    "new after old highest": ([(old, "highest"), (cuda, "tf32"), (cpu, "bf16")], "tf32", "bf16"),
    "new after old high": ([(old, "high"), (cuda, "ieee")], "ieee", "tf32"),
    "new after old medium": ([(old, "medium"), (cpu, "ieee")], "tf32", "ieee"),
    "old after new": ([(cuda, "tf32"), (cpu, "bf16"), (old, "highest")], "ieee", "ieee"),
}


@pytest.fixture
def setting():
    """Makes a setting, and afterwards leaves PyTorch as it starts."""

    def start():
        old("highest")
        for call in (cuda, every_cuda, cpu, every_cpu, everywhere):
            call("none")

    def make(name):
        start()
        for call, value in SETTINGS[name][0]:
            call(value)
        return SETTINGS[name][1:]

    yield make
    start()
    assert (fp32_products("cuda"), fp32_products("cpu")) == ("ieee", "ieee")


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_set_is_what_is_read(name, setting):
    on_cuda, on_cpu = setting(name)
    assert fp32_products("cuda") == on_cuda
    assert fp32_products("cpu") == on_cpu


def test_some_of_them_cannot_be_asked_the_old_way(setting):
    """Else this file would prove nothing."""
    raising = 0
    for name in SETTINGS:
        setting(name)
        try:
            torch.get_float32_matmul_precision()
        except RuntimeError:
            raising += 1
    assert raising >= 5


def every_loss(x, y, labels):
    """Each loss by name, of x [N, D], y [N, D] and labels [N]."""
    return {
        "triplet": gk.TripletLoss()(x, y),
        "triplet all": gk.TripletLoss(negatives="all")(x, y),
        "triplet semi-hard": gk.TripletLoss(negatives="semihard")(x, y),
        "goal": gk.GoalLoss()(x, y),
        "goal relative": gk.GoalLoss("cir", "sig_ms")(x, y),
        "info_nce": gk.InfoNCELoss()(x, y),
        "sigmoid": gk.SigmoidLoss()(x, y),
        "distillation": gk.relational_distillation_loss(x, y, y[:, :8], lam=0.5, tau=0.07),
        "batch-hard": gk.batch_hard_loss(x, labels),
        "by a metric": gk.TripletLoss(metric=gk.StructuredSimilarity(x.shape[1], 8, dtype=x.dtype))(x, y),
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_every_loss_under_every_setting(name, setting):
    """The value within what the setting allows products to lose, and a gradient."""
    x, y = (F.normalize(torch.randn(40, 16), dim=1) for _ in range(2))
    labels = torch.arange(40) // 4
    truth = every_loss(x.double(), y.double(), labels)
    _, on_cpu = setting(name)
    allowed = 2.0**-7 if on_cpu == "bf16" else 1e-5
    leaf = x.clone().requires_grad_()
    for loss, value in every_loss(leaf, y, labels).items():
        torch.testing.assert_close(value.double(), truth[loss].double(), rtol=allowed, atol=0, msg=loss)
        (gradient,) = torch.autograd.grad(value, leaf)
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.mark.parametrize("name", SETTINGS)
def test_hardest_negatives_are_as_rough_as_the_setting_allows(name, setting):
    """As good as PyTorch's product under it, and on a CPU whose products it makes rougher as rough."""
    a, b = torch.randn(300, 256), torch.randn(400, 256)
    truth = gk.reference.hardest_negatives(a.double(), b.double())
    setting(name)
    ours, plain = gk.hardest_negatives(a, b), gk.reference.hardest_negatives(a, b)
    for k in (0, 2):
        lost, lost_by_pytorch = (float((results[k] - truth[k]).norm()) for results in (ours, plain))
        assert lost <= 2 * lost_by_pytorch + 1e-6
        if gk.backends()["hardest_negatives"]["cpu"] == "cpp" and _library.bf16_unit() == "amx":
            assert (lost > 1e-2) == (fp32_products("cpu") == "bf16")


@pytest.mark.parametrize("name", SETTINGS)
def test_kernels_are_compiled_for_what_cuda_allows(name, setting, monkeypatch):
    """On the path of a card, without one: each product's precision, but for those that never are TF32."""
    pytest.importorskip("triton")
    from gssf_kernels.device_path import DEVICE, DevicePath, device_path

    results = {}

    def note(path, kernel, *arguments, grid, warmup, **options):
        if "PRECISION" in options:
            results.setdefault(kernel.__name__, set()).add(options["PRECISION"])

    monkeypatch.setattr(DevicePath, "note", note)
    on_cuda, _ = setting(name)
    x, y = (torch.empty(40, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    by_a_metric = gk.InfoNCELoss(metric=gk.StructuredSimilarity(16, 8)).to(DEVICE)
    with device_path():
        torch.autograd.grad(gk.TripletLoss()(x, y), [x, y])
        assert results == {"sweep_kernel": {on_cuda}}
        torch.autograd.grad(by_a_metric(x, y), [x, y])
        assert results == {kernel: {on_cuda} for kernel in ("sweep_kernel", "sides_kernel", "gradients_kernel")}
        results.clear()
        gk.batch_hard_loss(x, torch.empty(40, dtype=torch.int64, device=DEVICE))
        assert results == {"sweep_kernel": {"ieee"}}
