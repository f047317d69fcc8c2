"""How networks lie on processes, from a configuration: Composer's DDP, FSDP and FSDP2."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed.fsdp as fsdp
from composer.devices import Device, DeviceGPU
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, FSDPConfig, ParallelismConfig
from torch.distributed.device_mesh import init_device_mesh

from dinocomp.build.model import count_parameters
from dinocomp.config import Config, derive
from dinocomp.config.distil import frozen_teacher
from dinocomp.distributed import on_rank_0
from dinocomp.errors import ConfigError
from dinocomp.method import DINOv2
from dinocomp.models.block import Block

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_strategy(config: Config, gpu: bool) -> str:
    """`single`, `ddp`, `fsdp` or `fsdp2`; the same on all ranks.

    Raises:
        ConfigError: the configuration wants what this machine or number of processes cannot give.
    """
    world_size, wanted = dist.get_world_size(), config.parallelism.strategy
    if wanted == "single" and world_size > 1:
        raise ConfigError(
            f"parallelism.strategy=single, but {world_size} processes were started. Type composer -n 1, or "
            "parallelism.strategy=ddp."
        )
    if config.train.microbatch_size == "auto" and not gpu:
        raise ConfigError(
            "train.microbatch_size=auto finds out what fits on a GPU, and this run has none. Type a number of images, "
            "such as train.microbatch_size=8."
        )
    if config.train.microbatch_size == "auto" and world_size > 1:
        _check_search(config)
    if wanted in derive.SHARDED and world_size > 1:
        check_sharding(wanted, gpu)
    frozen = frozen_teacher(config)
    whole = derive.whole_bytes(count_parameters(config), sum(frozen.parameters.values()) if frozen else 0)
    return on_rank_0(lambda: derive.strategy(config, world_size, _gpu_bytes() if gpu else None, whole))


def _check_search(config: Config) -> None:
    """Refuses losses that ask other ranks in the middle of a pass: there, Composer has a rank whose memory is full ask
    whether the others go on, and one would take the other's question for its own.

    Raises:
        ConfigError: naming the key.
    """
    asking = {
        "train.centering=sinkhorn_knopp": config.train.centering == "sinkhorn_knopp",
        "dino.koleo_distributed=true": config.dino.koleo_distributed,
    }
    for words, on in asking.items():
        if on:
            raise ConfigError(
                f"train.microbatch_size=auto cannot search on several processes with {words}, for which they exchange "
                "numbers in every pass. Type a number of images, such as train.microbatch_size=8 (`dinocomp plan "
                "--gpu-memory GB` names one that fits)."
            )


def check_sharding(strategy: str, gpu: bool) -> None:
    """Refuses sharding on CPUs: FSDP asks for a GPU, and FSDP2's gradients would be sums there, not means.

    (gloo has no mean to scatter and silently takes the sum; pytorch issue 162338.)

    Raises:
        ConfigError: there is no GPU.
    """
    if not gpu:
        raise ConfigError(
            f"parallelism.strategy={strategy} needs GPUs: on CPUs torch would train with wrong gradients. "
            "Type parallelism.strategy=ddp."
        )


def _gpu_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def parallelism(strategy: str, precision: str) -> ParallelismConfig | None:
    """What Composer is told: units of sharding are transformer blocks, backbones and heads (see `Shell`).

    Weights, their averages and the optimizer's are fp32, networks compute in `precision`, gradients are summed in fp32.
    Checkpoints are written in shares, which load for any number of processes.
    """
    if strategy not in derive.SHARDED:
        return None
    numbers = {"param_dtype": precision, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    if strategy == "fsdp":
        fsdp = FSDPConfig(
            sharding_strategy="FULL_SHARD",
            mixed_precision=numbers,
            state_dict_type="sharded",
            sync_module_states=True,  # rank 0 alone has weights so far
            backward_prefetch="BACKWARD_PRE",
        )
        return ParallelismConfig(fsdp=fsdp)
    return ParallelismConfig(fsdp2=FSDP2Config(mixed_precision=numbers, state_dict_type="sharded"))


# What Composer always says of sharded runs; the last of callbacks without state, of which shares hold no entry.
_EXPECTED = (
    "FSDP2 Config/APIs are experimental",
    "The _fsdp_wrap attribute will be removed",
    "is not in the state_dict. Its state will not be restored",
)


@contextmanager
def expected_warnings(sharded: bool) -> Iterator[None]:
    """Keeps from users what they can do nothing about."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_others(message: Warning | str, *rest: Any) -> None:
            if not (sharded and any(text in str(message) for text in _EXPECTED)):
                show(message, *rest)

        warnings.showwarning = show_others  # no filter, of which Composer sets one itself
        yield


def prepare_for_sharding(config: Config, strategy: str, model: DINOv2, device: Device) -> None:
    """What Composer leaves to the model: which units stay gathered, and modules that are not sharded."""
    if strategy not in derive.SHARDED:
        return
    if not config.parallelism.reshard_after_forward:
        # The teacher's are always freed after use, or it would go on with weights from before its last update.
        kept = {"fsdp": {"sharding_strategy": "SHARD_GRAD_OP"}, "fsdp2": {"reshard_after_forward": False}}
        for shell in model.shells("student").values():
            shell.unit = kept[strategy]
    for module in model.unsharded():
        device.module_to_device(module)
        for buffer in module.buffers():  # rank 0's, which has read the weights to start from
            dist.broadcast(buffer, src=0)


def place_target(strategy: str, precision: str, model: DINOv2, device: Device) -> None:
    """Brings a frozen teacher to the device, which Composer does not know of: whole, or this rank's share of it.

    With either of Composer's ways to shard it is sharded by torch's newer one, which does not mind weights that are
    never trained. They are gathered in the compute type, block by block, and freed again.
    """
    if not model.distils:
        return
    for shell in model.shells("target").values():
        if strategy not in derive.SHARDED:
            device.module_to_device(shell)
            continue
        settings = {
            "mesh": init_device_mesh("cuda" if isinstance(device, DeviceGPU) else "cpu", (dist.get_world_size(),)),
            "mp_policy": fsdp.MixedPrecisionPolicy(param_dtype=_DTYPES[precision]),
        }
        for module in [*(m for m in shell.net.modules() if isinstance(m, Block)), shell.net, shell]:
            fsdp.fully_shard(module, **settings)
