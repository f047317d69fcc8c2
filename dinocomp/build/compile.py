"""Compiled networks: `performance.compile` and `performance.cuda_graphs`, from a configuration."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import nn

from dinocomp.config import Config, derive
from dinocomp.errors import ConfigError
from dinocomp.method import DINOv2
from dinocomp.models import DINOHead
from dinocomp.models.block import Block
from dinocomp.models.embeddings import PatchEmbed


def check_compiler(config: Config, gpu: bool, strategy: str = "single") -> None:
    """Refuses to compile where there is nothing to compile with, and CUDA graphs of weights that move.

    Raises:
        ConfigError: naming what is missing.
    """
    if not config.performance.compile:
        return
    if config.performance.cuda_graphs and strategy in derive.SHARDED:
        raise ConfigError(
            f"performance.cuda_graphs=true: networks will be sharded (parallelism.strategy={strategy}), and graphs "
            "need weights that stay where they are. Type performance.cuda_graphs=false, or parallelism.strategy=ddp."
        )
    missing = None
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "c++")  # what torch looks for on a CPU
    if gpu:
        compilers = (os.environ.get("CC", ""), "gcc", "clang")  # and Triton
        if importlib.util.find_spec("triton") is None:
            missing = "the package triton, which comes with torch's CUDA builds for Linux"
        elif not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            missing = "Python's headers (the system's package python3-dev)"
    if not any(shutil.which(name) for name in compilers):
        missing = "a compiler, such as gcc and g++"
    if missing:
        raise ConfigError(
            f"performance.compile=true needs {missing}. Install it, or type performance.compile=false "
            "performance.cuda_graphs=false."
        )


def compile_networks(config: Config, model: DINOv2) -> None:
    """Compiles each transformer block and each head, of all roles, and what makes pixels of crops and patches
    of pixels, for the shapes that they meet.

    Not whole networks: blocks are alike, so one is compiled and all use its code, which takes a minute instead of many,
    and sharding goes on to gather and free them one by one. What is compiled is `forward` alone, inside of what
    sharding hooks on to a module.
    """
    if not config.performance.compile:
        return
    how = {"mode": "reduce-overhead"} if config.performance.cuda_graphs else {}
    roles = ("student", "teacher", "target") if model.distils else ("student", "teacher")
    nets = [net for role in roles for net in model.networks(role).values()]
    pixels = [model.normalize] if model.colours is None else [model.colours, model.normalize]
    units = [*pixels, *(unit for net in nets for unit in _units(net))]
    sizes = 4 if derive.first_phase(config) else 2  # of crops
    _allow_variants(sizes * len(units))
    for unit in units:
        unit.forward = torch.compile(unit.forward, dynamic=False, fullgraph=True, **how)


def _units(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, (Block, DINOHead, PatchEmbed))]


def _allow_variants(number: int) -> None:
    """Blocks that differ (a drop path rate that rises) are as many variants of one function, of which torch would run
    the ninth uncompiled."""
    settings = torch._dynamo.config
    for name in ("recompile_limit", "cache_size_limit"):  # its name in newer and in older versions
        if hasattr(settings, name):
            setattr(settings, name, max(getattr(settings, name), number))
            return
