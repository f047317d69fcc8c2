"""Weights to start from: a teacher file, a checkpoint of a run, or a published backbone."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dinocomp.checkpoints.folder import STATE, has_state
from dinocomp.checkpoints.manifest import iteration_of
from dinocomp.checkpoints.plain import load_plain
from dinocomp.checkpoints.shapes import read_shares
from dinocomp.errors import WeightsError
from dinocomp.interop.adapt import adapt
from dinocomp.interop.formats import published
from dinocomp.interop.names import published_name
from dinocomp.interop.teacher import read_about
from dinocomp.models import VisionTransformer

log = logging.getLogger(__name__)

_SHARE_OF_REFERENCE = re.compile(r"\.rank_\d+\.pth$")  # model_0003749.rank_0.pth


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt, .pth or .bin file, of a checkpoint's folder or of one that Hugging Face's
    `save_pretrained` wrote, by the names they have there. Nothing in a file is executed.

    Of a Composer checkpoint it is the model's tensors; of a file that nests them under ``teacher``, ``model`` or
    ``state_dict``, what is under it.

    Raises:
        WeightsError: the file is missing, damaged, holds objects other than tensors, or no tensors.
    """
    path = check_file(path)
    if path.is_dir():
        files = _weights_of_folder(path)
        return {n: t for file in files for n, t in read_tensors(file).items()} if files else read_shares(path)
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
    """`path` with ~ expanded; of a checkpoint's folder, the file in it that holds the weights, or itself if they are in
    several.

    Raises:
        WeightsError: there is no file, or it is a share of the reference's.
    """
    path = Path(path).expanduser()
    if _SHARE_OF_REFERENCE.search(path.name):
        raise WeightsError(
            f"{path} is one process's share of a sharded checkpoint of the reference, and of no use without the same "
            "torch, code and number of processes. Give the teacher that the reference writes beside it, "
            "eval/training_N/teacher_checkpoint.pth; if there is none, its train.py writes one from the shares with "
            "--eval-only, on as many processes as trained"
        )
    if (path / STATE).is_file():
        return path / STATE
    if has_state(path) or _weights_of_folder(path):
        return path
    if not path.is_file():
        endings = (".safetensors", ".pth", ".pt", ".bin")
        inside = sorted(file.name for file in path.glob("*") if file.suffix in endings)
        raise WeightsError(
            f"no file of weights at {path}" + (f"; give the file in it, such as {path / inside[0]}" if inside else "")
        )
    return path


def _weights_of_folder(path: Path) -> list[Path]:
    """The files of weights in a folder that Hugging Face's `save_pretrained` wrote; none in others."""
    if not (path / "config.json").is_file():
        return []
    return sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))


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


def known_heads(path: str | Path) -> int | None:
    """How many attention heads the network has whose weights are in a file or folder; None where it does not say.

    Shapes do not tell: weights of another number fit, and compute another function.
    """
    path = Path(path).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("architecture", "{}")
    elif (path / "config.json").is_file():
        about = (path / "config.json").read_text()
    else:
        return None
    try:
        found = json.loads(about)
        found = {**found.get("model_args", {}), **found}  # timm's
        return found.get("num_heads") or found.get("num_attention_heads")
    except (ValueError, AttributeError, TypeError):  # nothing that this reads
        return None


def load_backbone(net: VisionTransformer, path: str | Path) -> None:
    """Weights of a backbone into `net`, whoever wrote them (see `published`); of a run they are its teacher's.

    Position embeddings of another square grid and a projection of other patches are resampled (see `adapt`). A message
    says what was taken, resampled, and left as it starts.

    Raises:
        WeightsError: as `read_tensors` and `load_strictly`.
    """
    heads, ours = known_heads(path), net.blocks[0].attn.num_heads
    if heads not in (None, ours):
        raise WeightsError(
            f"the weights in {path} are of a network with {heads} attention heads, the configured one has {ours}, and "
            f"would compute something else with them. Type student.num_heads={heads} (with student.arch=custom)"
        )
    adapted = adapt(published(read_tensors(path)), net)
    load_strictly(net, adapted.tensors, str(path))
    taken = len(adapted.tensors) - len(adapted.fresh)
    log.info(
        "the backbone of %s: %d tensors%s%s",
        path,
        taken,
        f"; resampled: {', '.join(adapted.changed)}" if adapted.changed else ", all as they are",
        f"; not in the file, and fresh: {', '.join(adapted.fresh)}" if adapted.fresh else "",
    )


def load_run(
    student: Mapping[str, nn.Module],
    teacher: Mapping[str, nn.Module],
    targets: Mapping[str, nn.Module],
    path: str | Path,
) -> None:
    """Starts student and teacher from a run's weights.

    A checkpoint of a run gives both, and its centres; a teacher file, dinocomp's or the reference's
    ``teacher_checkpoint.pth``, gives the teacher, of which the student becomes a copy. Heads must be those of the file.
    Backbones may be for crops or patches of another size: they are resampled as in `load_backbone`, and a message says
    so.

    Args:
        student, teacher: networks by name (backbone, dino_head, ibot_head).
        targets: what makes targets of the teacher's logits, by name (dino_targets, ibot_targets).

    Raises:
        WeightsError: as `read_tensors` and `load_strictly`, or a network is not in the file.
    """
    tensors, changed = read_tensors(path), ()
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
            part = {published_name(n): t for n, t in part.items()}
            if isinstance(net, VisionTransformer):
                adapted = adapt(part, net)
                part = {n: t for n, t in adapted.tensors.items() if n not in adapted.fresh}
                changed = adapted.changed
            load_strictly(net, part, str(path))
    if changed and targets:
        log.info("the backbones of %s, student's and teacher's, are resampled: %s", path, ", ".join(changed))
    for name, target in targets.items():
        own = target.state_dict()
        saved = {n: tensors.get(f"{name}.{n}") for n in own}
        # Centring may be new in this run, or have other prototypes: then its centre starts at 0.
        if all(t is not None and t.shape == own[n].shape for n, t in saved.items()):
            target.load_state_dict(saved)
