"""Seconds that actions take, on a CPU or a GPU."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Action = Callable[[], object]


def synchronize(device: str = "cpu") -> None:
    """Waits until a GPU has done all that it was given; on a CPU nothing is outstanding."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    actions: Mapping[str, Callable[[], object]], *, device: str = "cpu", rounds: int
) -> dict[str, float]:
    """The median time of each action, with all the work that it gives to the device, after one call that does not count
    (caches, lazy initialisation).

    Each round calls each action once, so that a machine that is busy for a while slows all of them.
    """
    for action in actions.values():
        action()
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            synchronize(device)
            start = time.perf_counter()
            action()
            synchronize(device)
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in found.items()}
