"""What ranks agree on, with real processes."""

import torch.distributed as dist
import torch.multiprocessing as mp

from dinocomp.distributed import any_rank


def ask(rank: int, port: int) -> None:
    for address in (port, port + 1):  # the second time with a default group made anew
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{address}", rank=rank, world_size=2)
        answers = [any_rank(flag) for flag in (False, rank == 0, rank == 1, True)]
        assert answers == [False, True, True, True], answers
        dist.destroy_process_group()


def test_any_rank(free_port: int) -> None:
    assert any_rank(True) and not any_rank(False)
    mp.spawn(ask, (free_port,), nprocs=2)
