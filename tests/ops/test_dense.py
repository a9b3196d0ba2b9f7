"""What every loss of the gradient sweep promises: accuracy, one derivative, the same bits, and no matrix stored."""

import pytest
import torch
from dense_cases import LOSSES, SCALARS, X, Y, assert_same, leaves, sample, value_and_gradients

import gssf_kernels as gk
from gssf_kernels import dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_scalar_gradients_as_exact_as_plain(name, dtype):
    """Single numbers, whose error is a matter of luck: root mean squares over sixteen inputs."""
    squares = {"ours": 0.0, "plain": 0.0}
    for _ in range(16):
        tensors = sample(name, 60, 90, 24, dtype)
        truth = value_and_gradients(lambda *t: LOSSES[name](*t, module=gk.reference), [t.double() for t in tensors])
        for who, module in (("ours", gk), ("plain", gk.reference)):
            results = value_and_gradients(lambda *t, module=module: LOSSES[name](*t, module=module), tensors)
            pairs = zip((results[0], *results[3:]), (truth[0], *truth[3:]), strict=True)
            errors = torch.stack([(f.double() - t) / t for f, t in pairs])
            squares[who] = squares[who] + errors.square()
    floor = 6e-8  # half a unit in the last place
    assert (squares["ours"].div(16).sqrt() <= 2 * squares["plain"].div(16).sqrt() + floor).all(), squares


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_with_scalars(name):
    torch.autograd.gradcheck(LOSSES[name], leaves(*sample(name, 6, 9, 5)), nondet_tol=0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_bits_every_time(name, chunked):
    tensors = sample(name, 150, 310, 40, torch.float32)
    first = value_and_gradients(LOSSES[name], tensors)
    for _ in range(3):
        for again, before in zip(value_and_gradients(LOSSES[name], tensors), first, strict=True):
            assert torch.equal(again, before)


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_with_shapes_that_change(name):
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, dynamic=True)
    for n, m in ((20, 30), (33, 33), (41, 90)):
        tensors = sample(name, n, m, 8)
        assert_same(value_and_gradients(compiled, tensors), value_and_gradients(LOSSES[name], tensors))


@pytest.mark.parametrize("name", LOSSES)
def test_func_grad_and_one_derivative_only(name):
    x, *rest = tensors = sample(name, 20, 24, 8)
    got = torch.func.grad(LOSSES[name], argnums=tuple(range(len(tensors))))(*tensors)
    assert_same(got, value_and_gradients(LOSSES[name], tensors)[1:])
    # In each, mixed with something twice differentiable. Teachers get no gradient, and what tau gets is plain PyTorch.
    exempt = {1, 3} if name == "distillation" else set()
    for k in set(range(len(tensors))) - exempt:
        leaf = tensors[k].clone().requires_grad_()
        value = LOSSES[name](*tensors[:k], leaf, *tensors[k + 1 :])
        (grad,) = torch.autograd.grad(value + leaf.pow(3).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.square().sum().backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(lambda x: torch.func.grad(LOSSES[name])(x, *rest).square().sum())(x)


_PEAK = """
import resource, sys, torch, gssf_kernels as gk
n, name = int(sys.argv[1]), sys.argv[2]
from dense_cases import LOSSES, leaves, sample
torch.set_num_threads(2)
loss, tensors = LOSSES[name], leaves(*sample(name, n, n, 64, torch.float32))
loss(*leaves(*sample(name, 64, 64, 64, torch.float32))).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss(*tensors).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(gk.backends()["logsumexp_scores"]["cpu"] != "cpp", reason="the reference pass copies its chunk")
@pytest.mark.parametrize("name", LOSSES)
def test_no_matrix_is_stored(name, run_fresh):
    """Forward and backward at N = M = 8192 take less than 64 MiB besides the gradients; one matrix is 256 MiB."""
    n = 8192
    done = run_fresh(_PEAK, n, name)
    assert done.returncode == 0, done.stderr
    peak_mib, gradients_mib = int(done.stdout) / 1024, 2 * n * 64 * 4 / 2**20
    assert peak_mib > 0
    assert peak_mib - gradients_mib < 64, f"{peak_mib:.0f} MiB"


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"distillation"}))
def test_sides_are_checked(name):
    which = "ab" if "sum" in name else "xy"
    with pytest.raises(ValueError, match=rf"^{which[1]}: expected 8 columns"):
        LOSSES[name](X, torch.randn(6, 9), *SCALARS[name])
    with pytest.raises(TypeError, match=rf"^{which[1]}: expected .*torch.float32"):
        LOSSES[name](X, Y.double(), *SCALARS[name])


@pytest.mark.parametrize(("n", "limit", "max_rows"), [(700, 1 << 22, 256), (1000, 40_000, 256), (33, 1, 1), (0, 9, 9)])
def test_a_triangles_chunks_are_all_rows_once(n, limit, max_rows):
    chunks = list(dense.halves(n, limit, 32, max_rows))
    assert [first for first, _ in chunks] == [sum(count for _, count in chunks[:k]) for k in range(len(chunks))]
    assert sum(count for _, count in chunks) == n
    for first, count in chunks:
        assert first % 32 == 0  # as `Right.part` needs
        assert count <= max(max_rows, 32)
        assert count * (n - first) <= limit or count <= 32


def test_no_square_of_a_symmetric_matrix_is_large():
    """Its half is computed twice: of 1,024 rows, a quarter of half the matrix at most, not all of it."""
    scores = 0

    def visit(parts, first):
        nonlocal scores
        scores += parts[0].numel()

    dense.triangle((torch.randn(1024, 8),), visit, False)
    assert scores <= 1.25 * 1024 * 1025 / 2
