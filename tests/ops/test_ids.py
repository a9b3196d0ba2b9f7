"""Ids and labels: every integer dtype and bool means the same as int64."""

import pytest
import torch
import torch.nn.functional as F

import gssf_kernels as gk

NARROW = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32)


def rows(n, d=8):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(n)), dim=1)


TWO_SIDED = {
    "triplet": gk.triplet_loss,
    "goal": gk.goal_loss,
    "info_nce": lambda x, y, **ids: gk.info_nce_loss(x, y, scale=10.0, **ids),
    "sigmoid": lambda x, y, **ids: gk.sigmoid_loss(x, y, scale=10.0, bias=-5.0, **ids),
}
ONE_SIDED = {"batch_hard": gk.batch_hard_loss, "circle": gk.circle_loss, "multi_similarity": gk.multi_similarity_loss}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("loss", TWO_SIDED)
def test_ids_of_every_integer_dtype(loss, dtype):
    x, y = rows(24), rows(40)
    x_ids, y_ids = torch.arange(24) % 2, torch.arange(40) % 2
    expected = TWO_SIDED[loss](x, y, x_ids=x_ids, y_ids=y_ids)
    assert expected != TWO_SIDED[loss](x, y)  # ids matter
    for ids in ((x_ids.to(dtype), y_ids.to(dtype)), (x_ids.to(dtype), y_ids)):
        assert torch.equal(TWO_SIDED[loss](x, y, x_ids=ids[0], y_ids=ids[1]), expected)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("loss", ONE_SIDED)
def test_labels_of_every_integer_dtype(loss, dtype):
    x, labels = rows(24), torch.arange(24) % 2
    assert torch.equal(ONE_SIDED[loss](x, labels.to(dtype)), ONE_SIDED[loss](x, labels))


def test_the_largest_uint32_is_not_minus_one():
    x, y = rows(3), rows(4)
    y_ids = torch.tensor([7, 8, 9, 2**32 - 1], dtype=torch.int64).to(torch.uint32)
    hardest = gk.hardest_negatives(x, y, a_ids=torch.tensor([7, 8, -1]), b_ids=y_ids)
    assert torch.equal(hardest.row_score, gk.hardest_negatives(x, y).row_score)
