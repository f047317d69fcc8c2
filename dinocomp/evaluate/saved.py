"""What is kept on the disk: states of a linear probe, so that a killed one goes on; and features."""

import shutil
from pathlib import Path

from composer.utils import dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dinocomp.distributed import on_rank_0
from dinocomp.evaluate.features import Features
from dinocomp.evaluate.heads import LinearHeads

_PREFIX, _WRITING = "iteration-", ".writing"


class SavedHeads:
    """Folders `iteration-N` in `folder`, with a file of each rank. Only the newest is kept.

    Args:
        folder: seen by all ranks.
        made_with: what the training is a function of; a state of another one is not gone on from.
    """

    def __init__(self, folder: Path, made_with: str) -> None:
        self.folder = folder
        self.made_with = made_with

    def save(self, probe: LinearHeads, iteration: int) -> None:
        """Writes a state, whole or not at all. All ranks call it together."""
        final = self.folder / f"{_PREFIX}{iteration:08d}"
        writing = final.with_name(final.name + _WRITING)

        def prepare() -> None:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)

        def publish() -> None:
            shutil.rmtree(final, ignore_errors=True)
            writing.rename(final)
            for other in self.folder.iterdir():
                if other != final:
                    shutil.rmtree(other, ignore_errors=True)

        on_rank_0(prepare)
        rank, world = dist.get_global_rank(), dist.get_world_size()
        about = {"made_with": self.made_with, "ranks": str(world), "iteration": str(iteration)}
        save_file(probe.state(), writing / f"{rank}.safetensors", metadata=about)
        dist.barrier()
        on_rank_0(publish)

    def load(self, probe: LinearHeads) -> int:
        """Takes over the newest whole state of the same training; gives the finished iterations, 0 without one."""
        for iteration in on_rank_0(self._whole):
            tensors = {}
            for path in sorted(self._of(iteration).glob("*.safetensors")):
                with safe_open(path, "pt") as file:
                    names = set(file.keys())
                    for number in (n for heads in probe.groups for n in heads.numbered):
                        ours = (f"{number}.{name}" for name in ("weight", "weight.momentum", "bias", "bias.momentum"))
                        tensors |= {name: file.get_tensor(name) for name in ours if name in names}
            probe.load_state(tensors)
            return iteration
        return 0

    def remove(self) -> None:
        """All states. On one rank."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _of(self, iteration: int) -> Path:
        return self.folder / f"{_PREFIX}{iteration:08d}"

    def _whole(self) -> list[int]:
        """Iterations of the states that can be gone on from, the newest first."""
        found = []
        for folder in self.folder.glob(f"{_PREFIX}*"):
            try:
                number = int(folder.name.removeprefix(_PREFIX))
                abouts = []
                for path in folder.glob("*.safetensors"):
                    with safe_open(path, "pt") as file:
                        abouts.append(file.metadata() or {})
            except (ValueError, SafetensorError, OSError):
                continue  # still being written when it was killed, or damaged
            ours = abouts and all(about.get("made_with") == self.made_with for about in abouts)
            if ours and len(abouts) == int(abouts[0]["ranks"]):
                found.append(number)
        return sorted(found, reverse=True)


def save_features(path: Path, made_with: str, features: Features, seconds: float) -> None:
    """Writes features and how long they took, whole or not at all. On one rank."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"made_with": made_with, "seconds": str(seconds)}
    save_file(features._asdict(), path.with_suffix(".partial"), metadata=about)
    path.with_suffix(".partial").replace(path)


def read_features(path: Path, made_with: str) -> tuple[Features, float] | None:
    """What `save_features` wrote; None where that is not there, not whole, or made otherwise."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("made_with") == made_with:
                features = Features(file.get_tensor("vectors"), file.get_tensor("labels"))
                return features, float(about.get("seconds", 0))
    except (OSError, SafetensorError):  # none yet, or cut short
        pass
    return None
