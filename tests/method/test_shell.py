"""What sharding leaves to the networks' shells."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from dinocomp.method.shell import Shell, whole_weights
from dinocomp.models import VisionTransformer


def tiny() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3)


def notes(shell: Shell) -> int:
    """What units of sharding have noted of forward passes."""
    groups = [module._get_fsdp_state()._fsdp_param_group for module in shell.modules() if hasattr(module, "unshard")]
    groups = [group for group in groups if group is not None]
    return len(groups[0].comm_ctx.post_forward_order) + sum(len(group._post_forward_indices) for group in groups)


def _rank(rank: int, port: int, path: Path) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    shell = Shell(tiny())
    mesh = dist.init_device_mesh("cpu", (2,))
    for module in (*shell.net.blocks, shell.net, shell):
        assert module is shell or shell.fsdp_wrap_fn(module)
        fully_shard(module, mesh=mesh)
    counts = []
    for _ in range(3):
        with torch.no_grad():
            shell(torch.zeros(2, 3, 16, 16))
        counts.append(notes(shell))
    assert 0 < counts[0] < counts[1] < counts[2], "without a backward they only grow"
    shell.forget_forwards()
    assert notes(shell) == 0
    with torch.no_grad():
        shell(torch.zeros(2, 3, 16, 16))
    weights = whole_weights(shell)
    torch.save(weights, path / f"{rank}.pt")
    dist.destroy_process_group()


def test_sharded_networks(tmp_path: Path, free_port: int) -> None:
    """Notes of a teacher's forward passes are dropped, and rank 0 alone gets its weights, whole."""
    mp.spawn(_rank, (free_port, tmp_path), nprocs=2)
    whole, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected = tiny().state_dict()
    assert whole.keys() == expected.keys() and not other
    assert all(torch.equal(weight, expected[name]) for name, weight in whole.items())


def test_a_network_that_is_not_sharded_is_given_as_it_is() -> None:
    net = tiny()
    weights = whole_weights(Shell(net))
    assert weights.keys() == net.state_dict().keys()
    net.forward(torch.zeros(1, 3, 16, 16))
    Shell(net).forget_forwards()
