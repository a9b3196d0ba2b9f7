"""One of two processes that evaluate together: python retrieval_ranks.py RANK STORE. Prints its results as JSON."""

import json
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

import gssf_kernels as gk

TIMEOUT = timedelta(seconds=100)


def rows(dtype=torch.float32):
    """x [7, 4], y [11, 4], x_ids, y_ids: small whole numbers, exact in every dtype."""
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randint(-3, 4, (n, 4), generator=g).to(dtype) for n in (7, 11))
    return x, y, torch.arange(7), torch.arange(11) * 7 // 11


def cases(rank):
    """(name, settings, batches of this rank). Rank 0 has 5 rows of x and 3 of y, in two batches."""
    x, y, x_ids, y_ids = rows()
    parts = [(x[:2], y[:3], x_ids[:2], y_ids[:3]), (x[2:5], y[:0], x_ids[2:5], y_ids[:0])]
    parts = parts if rank == 0 else [(x[5:], y[3:], x_ids[5:], y_ids[3:])]
    yield "uneven", {}, parts
    yield "bf16", {"normalize": True}, [(u.bfloat16(), v.bfloat16(), *ids) for u, v, *ids in parts]
    yield "of rank 1 alone", {}, parts if rank else []
    yield "pairs by row", {}, [(x[:4], y[:4])] if rank == 0 else [(x[4:], y[4:7])]
    yield "one modality", {}, [(t[0], None, t[2] // 2) for t in parts]
    yield "not synchronised", {"sync_on_compute": False}, parts if rank else [(x, y, x_ids, y_ids)]
    yield "no rows", {}, []
    yield "other dtype", {}, parts if rank else [(u.double(), v.double(), *ids) for u, v, *ids in parts]
    yield "fp64", {}, [(u.double(), v.double(), *ids) for u, v, *ids in parts]


def results(rank, store):
    """What each case computes on this rank, or the error that it raises."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=TIMEOUT)
    try:
        return {name: computed(settings, batches) for name, settings, batches in cases(rank)}
    finally:
        dist.destroy_process_group()


def computed(settings, batches):
    metric = gk.RetrievalMetric((1, 3), **settings)
    for batch in batches:
        metric.update(*batch)
    try:
        return metric.compute()
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(results(int(sys.argv[1]), sys.argv[2])))
