import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read by torch: threads that wait leave a busy machine to others

import torch

from gssf_kernels import dense

pytest.register_assert_rewrite("dense_cases", "triton_checks")  # their asserts too say what they compared


@pytest.fixture(autouse=True)
def _fixed_surroundings():
    """Every test starts from the same random state, and leaves the thread count as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[1, 700, 1 << 22], ids=["chunks of 16 rows", "ragged chunks", "one chunk"])
def chunked(request, monkeypatch):
    """Every number of rows to a chunk gives the same results."""
    monkeypatch.setitem(dense.CHUNK_SCORES, "cpu", request.param)
    monkeypatch.setattr(dense, "MIN_ROWS", 16)
