"""Opening a frozen backbone, whoever trained it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dinocomp.checkpoints.folder import TEACHER
from dinocomp.errors import WeightsError
from dinocomp.hints import missing
from dinocomp.interop.adapt import adapt
from dinocomp.interop.foreign import open_hugging_face, open_timm
from dinocomp.interop.formats import infer_architecture, published
from dinocomp.interop.teacher import FORMAT, load_teacher
from dinocomp.interop.weights import load_strictly, read_tensors
from dinocomp.models import VisionTransformer

_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class Backbone(Protocol):
    """What evaluation and pictures ask of a network: a `torch.nn.Module` in eval mode that wants no gradients.

    Attributes:
        embed_dim: width D of its tokens.
        patch_size: side in pixels of a patch.
        mean, std: of the pixels that it expects, by channel, in [0, 1].
        view: pixels that an image's shorter side is resized to, and that its middle is cropped to.
    """

    embed_dim: int
    patch_size: int
    mean: Sequence[float]
    std: Sequence[float]
    view: tuple[int, int]

    def get_intermediate_layers(
        self, images: Tensor, n: int | Sequence[int] = 1, *, reshape: bool = False, norm: bool = True
    ) -> list[tuple[Tensor, Tensor]]:
        """Patch tokens [B, N, D] and class token [B, D] of chosen blocks; see `VisionTransformer`."""


def open_backbone(source: str | Path) -> Backbone:
    """A frozen backbone, in eval mode.

    Args:
        source: a run's folder (its newest teacher), a ``teacher.safetensors``, a checkpoint of a run, a DINOv2 file
            (published, of the reference's training, timm's or Hugging Face's names), a folder that Hugging Face's
            `save_pretrained` wrote, or, for other networks of those libraries, ``timm:NAME``, ``timm:NAME=FILE`` and
            ``hf:FOLDER_OR_NAME``.

    Raises:
        WeightsError: there is none at `source`, or it is no backbone that is known.
    """
    text = str(source)
    for prefix, opened in (("timm:", open_timm), ("hf:", open_hugging_face)):
        if text.startswith(prefix):
            return opened(text.removeprefix(prefix))
    path = Path(source).expanduser()
    if not path.exists():
        raise WeightsError(f"no weights at {path}: {missing(path)}")
    if teacher := teacher_of(path):
        return load_teacher(teacher)
    if path.is_dir() and (path / "config.json").is_file():
        return _from_hugging_face_folder(path)
    return _described(path) or _rebuild(published(read_tensors(path)), str(path))


def teacher_of(path: Path) -> Path | None:
    """The teacher's file that `path` stands for: itself, one in this folder, or one beside a checkpoint's file."""
    beside = path.parent / TEACHER if path.suffix == ".pt" else path
    return next((file for file in (path / TEACHER, beside) if file.is_file() and _is_teacher(file)), None)


def _is_teacher(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except SafetensorError:
        return True  # let it be said why it cannot be read


def _described(path: Path) -> Backbone | None:
    """What `dinocomp export --to safetensors` wrote: metadata say all that shapes do not."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
    except SafetensorError:
        return None  # `read_tensors` says why
    if not {"architecture", "mean", "std", "view"} <= about.keys():
        return None
    net = VisionTransformer(**json.loads(about["architecture"]))
    load_strictly(net, read_tensors(path), str(path))
    net.mean, net.std, net.view = (json.loads(about[name]) for name in ("mean", "std", "view"))
    return net.eval().requires_grad_(False)


def _from_hugging_face_folder(path: Path) -> Backbone:
    """DINOv2 becomes our own network, without the other library; everything else is left to it."""
    config = json.loads((path / "config.json").read_text())
    if config.get("model_type") not in ("dinov2", "dinov2_with_registers"):
        return open_hugging_face(str(path))
    return _rebuild(published(read_tensors(path)), str(path), num_heads=config.get("num_attention_heads"))


def _rebuild(tensors: dict[str, Tensor], source: str, num_heads: int | None = None) -> Backbone:
    net = VisionTransformer(**infer_architecture(tensors, source, num_heads))
    load_strictly(net, adapt(tensors, net).tensors, source)
    return _ready(net)


def _ready(net: VisionTransformer) -> nn.Module:
    net.mean, net.std = _IMAGENET["mean"], _IMAGENET["std"]
    crop = max(net.patch_size, 224 // net.patch_size * net.patch_size)
    net.view = (round(crop * 256 / 224), crop)
    return net.eval().requires_grad_(False)
