"""Weights to start from: a teacher file, a checkpoint of a run, or a published backbone."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dinocomp.checkpoints.folder import STATE, has_state
from dinocomp.checkpoints.manifest import iteration_of
from dinocomp.checkpoints.plain import load_plain
from dinocomp.checkpoints.shapes import read_shares
from dinocomp.errors import WeightsError
from dinocomp.interop.formats import published
from dinocomp.interop.names import published_name
from dinocomp.interop.teacher import read_about
from dinocomp.models import VisionTransformer
from dinocomp.models.embeddings import interpolate_pos_embed

log = logging.getLogger(__name__)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt or .pth file or a checkpoint's folder, by the names they have there. Nothing
    in a file is executed.

    Of a Composer checkpoint it is the model's tensors; of a file that nests them under ``teacher``, ``model`` or
    ``state_dict``, what is under it.

    Raises:
        WeightsError: the file is missing, damaged, holds objects other than tensors, or no tensors.
    """
    path = check_file(path)
    if path.is_dir():
        return read_shares(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} is damaged or cut short ({path.stat().st_size} bytes); copy it again ({error})"
            ) from error
    content = load_plain(path)
    for key in ("state", "model", "teacher", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {name: t for name, t in content.items() if isinstance(t, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise WeightsError(f"{path} holds no named tensors")
    return tensors


def read_iteration(path: str | Path) -> int:
    """Finished iterations of the run that a file of weights comes from.

    Raises:
        WeightsError: as `read_tensors`, or the file does not say.
    """
    path = check_file(path)
    if path.is_dir():
        iteration = iteration_of(path)
    elif path.suffix == ".safetensors":
        iteration = read_about(path).get("iteration")
    else:
        content = load_plain(path, mmap=True)
        iteration = None
        if isinstance(content, Mapping) and "iteration" in content:
            iteration = int(content["iteration"]) + 1  # the reference counts from 0, and names the last one
        elif isinstance(content, Mapping) and "state" in content:
            iteration = content["state"]["timestamp"]["Timestamp"]["batch"]
    if iteration is None:
        raise WeightsError(f"{path} does not say of which iteration it is; type MODEL.KEEP_ITERATION=false")
    return int(iteration)


def check_file(path: str | Path) -> Path:
    """`path` with ~ expanded; of a checkpoint's folder, the file in it that holds the weights, or itself if each rank
    has written a share of them.

    Raises:
        WeightsError: there is no file.
    """
    path = Path(path).expanduser()
    if (path / STATE).is_file():
        return path / STATE
    if has_state(path):
        return path
    if not path.is_file():
        raise WeightsError(f"no file of weights at {path}")
    return path


def load_strictly(net: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies `tensors` into `net`. Names and shapes must be exactly those of the network.

    Raises:
        WeightsError: naming the first tensors that are missing, unknown or of another shape.
    """
    own = net.state_dict()
    problems = [f"missing: {name}" for name in own if name not in tensors]
    problems += [f"not in the network: {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {list(tensors[name].shape)}, the network's is {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        more = f"\n  … and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WeightsError(
            f"the weights in {source} do not fit the configured network:\n  "
            + "\n  ".join(problems[:8])
            + more
            + "\nSet student.arch, patch_size, num_register_tokens, ffn_layer and crops.global_crops_size to those of "
            "the file."
        )
    net.load_state_dict(tensors)


def load_backbone(net: VisionTransformer, path: str | Path) -> None:
    """Weights of a backbone, published or of a run (then its teacher's), into `net`.

    Position embeddings of another square grid (published weights have 37 x 37) are resampled to the network's, and a
    message says so.

    Raises:
        WeightsError: as `read_tensors` and `load_strictly`.
    """
    tensors = published(read_tensors(path))
    if "pos_embed" in tensors:
        tensors["pos_embed"] = _fit_pos_embed(tensors["pos_embed"], net.pos_embed.shape[1], path)
    load_strictly(net, tensors, str(path))


def _fit_pos_embed(pos_embed: Tensor, length: int, path: str | Path) -> Tensor:
    """[1, 1 + M * M, D] -> [1, length, D], where both are a class token and a square grid; else as it is."""
    have, want = math.isqrt(pos_embed.shape[1] - 1), math.isqrt(length - 1)
    if have == want or have * have != pos_embed.shape[1] - 1 or want * want != length - 1:
        return pos_embed
    log.info("position embeddings of %s: %d x %d patches resampled to %d x %d", path, have, have, want, want)
    patches = interpolate_pos_embed(pos_embed[:, 1:], (want, want), offset=0.0, antialias=True)
    return torch.cat([pos_embed[:, :1], patches], dim=1)


def load_run(
    student: Mapping[str, nn.Module],
    teacher: Mapping[str, nn.Module],
    targets: Mapping[str, nn.Module],
    path: str | Path,
) -> None:
    """Starts student and teacher from a run's weights.

    A checkpoint of a run gives both, and its centres; a teacher file, dinocomp's or the reference's
    ``teacher_checkpoint.pth``, gives the teacher, of which the student becomes a copy.

    Args:
        student, teacher: networks by name (backbone, dino_head, ibot_head).
        targets: what makes targets of the teacher's logits, by name (dino_targets, ibot_targets).

    Raises:
        WeightsError: as `read_tensors` and `load_strictly`, or a network is not in the file.
    """
    tensors = read_tensors(path)
    is_checkpoint = any(name.startswith("teacher_backbone.") for name in tensors)
    for role, networks in (("student", student), ("teacher", teacher)):
        for name, net in networks.items():
            prefix = f"{role}_{name}.net." if is_checkpoint else f"{name}."
            part = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            if not part:
                raise WeightsError(
                    f"{path} has no weights of {name} (names beginning with '{prefix}'). "
                    "To start from a backbone alone, pass it as student.pretrained_weights."
                )
            load_strictly(net, {published_name(n): t for n, t in part.items()}, str(path))
    for name, target in targets.items():
        own = target.state_dict()
        saved = {n: tensors.get(f"{name}.{n}") for n in own}
        # Centring may be new in this run, or have other prototypes: then its centre starts at 0.
        if all(t is not None and t.shape == own[n].shape for n, t in saved.items()):
            target.load_state_dict(saved)
