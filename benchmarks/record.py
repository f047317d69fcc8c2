"""What was measured, where and with what: a JSON file that a figure in the documents can be traced to."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "torchvision", "pillow", "numpy", "xformers", "mosaicml", "mosaicml-streaming")


def environment() -> dict[str, Any]:
    """The command, the machine, and the versions of what decides speed; None for a package that is not installed."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "command": command(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "device": gpu.name if gpu else "cpu",
        "device_bytes": gpu.total_memory if gpu else None,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # above `cores` the machine was busy with something else
    }


def write(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write {"environment": ..., "rows": [...]} as JSON; an existing file is replaced."""
    found = {"environment": environment(), "rows": [dict(row) for row in rows]}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def command() -> str:
    """How this program was started, as it would be typed from the checkout: `python -m benchmarks.data --json F`."""
    spec = sys.modules["__main__"].__spec__  # None where a file was given instead of -m
    program = ["-m", spec.name] if spec else [Path(sys.argv[0]).name]
    return shlex.join(["python", *program, *sys.argv[1:]])


def cpu_model() -> str:
    """What the system calls the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
