"""What each rank does on its CPU, measured where this runs: rows of tables for `benchmarks/scaling.py`."""

import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dinocomp.data.masks import MaskSettings, batch_masks, mask_targets, max_masked_patches
from dinocomp.data.order import uniform_permutation

_FLAGS = 300  # sent one after the other


def data_rows() -> Iterator[tuple[str, str, str]]:
    """(what, when, time) of what grows with the global batch and the data."""
    masks = MaskSettings((16, 16))
    for images in (3072, 12288, 65536):
        yield (
            f"mask targets of a batch of {images:,}",
            "every batch, a data worker",
            _ms(partial(mask_targets, masks, 0, 0, images)),
        )
    for images in (96, 12288):
        yield (
            f"masks of 12 images of {images:,}",
            "every batch, a data worker",
            _ms(partial(batch_masks, masks, 0, 0, images, np.arange(12))),
        )
    for ranks in (128, 256, 512, 1024):
        yield (
            f"bound of masked patches, {ranks:,} ranks of 12 images",
            "at start, every rank",
            _ms(partial(max_masked_patches, masks, 12 * ranks, ranks), tries=1),
        )
    for samples in (10_000_000, 100_000_000):
        took = _ms(partial(uniform_permutation, samples, 0, 0), tries=1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        yield f"order of {samples:,} samples", "every pass, every rank", f"{took}, peak of the process {peak:.1f} GB"


def _ms(action: Callable[[], object], tries: int = 3) -> str:
    found = []
    for _ in range(tries):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return f"{min(found) * 1e3:,.1f} ms"


def flag_rows() -> Iterator[tuple[int, int, str, str]]:
    """(processes, files that a process opened for a gloo group, time of a flag, time a hop of a ring)."""
    for ranks in (2, 4, 8, 16):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_flags, args=(ranks, port, results), nprocs=ranks)
        files, seconds = results.get()
        yield ranks, files, f"{seconds * 1e6:,.0f} us", f"{seconds * 1e6 / (2 * (ranks - 1)):.0f} us"


def _flags(rank: int, ranks: int, port: int, results: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("gloo")
    before = len(os.listdir("/proc/self/fd"))
    group = dist.new_group(backend="gloo")
    files = len(os.listdir("/proc/self/fd")) - before
    said, found = torch.tensor(0), []
    for _ in range(_FLAGS):
        start = time.perf_counter()
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=group)
        found.append(time.perf_counter() - start)
    if rank == 0:
        results.put((files, float(np.median(found))))
    dist.barrier()
    dist.destroy_process_group()
