import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_surroundings():
    """Every test starts from the same random state, and leaves the thread count as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
