"""Opening a frozen backbone, whoever trained it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinocomp.checkpoints.folder import STATE, TEACHER
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
            `save_pretrained`, timm or `dinocomp export` wrote, or, for other networks of those libraries,
            ``timm:NAME``, ``timm:NAME=FILE`` and ``hf:FOLDER_OR_NAME``.

    Raises:
        WeightsError: there is none at `source`, or it is no backbone that is known.
    """
    text = str(source)
    for prefix, opened in (("timm:", open_timm), ("hf:", open_hugging_face)):
        if text.startswith(prefix):
            return opened(text.removeprefix(prefix))
    path = Path(source).expanduser()
    if not path.exists():
        raise WeightsError(
            f"no weights at {path}: {missing(path)} Give a run's folder, a file of weights, timm:NAME or hf:NAME"
        )
    if teacher := teacher_of(path):
        return load_teacher(teacher)
    if path.is_dir() and (path / "config.json").is_file():
        return _from_folder(path)
    return _described(path) or _ready(_rebuild(published(read_tensors(path)), str(path)), {})


def teacher_of(path: Path) -> Path | None:
    """The teacher's file that `path` stands for: itself, one in this folder, or one beside a checkpoint's file."""
    beside = path.parent / TEACHER if path.name == STATE else path
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


def _from_folder(path: Path) -> Backbone:
    """DINOv2 becomes our own network, without the other library; everything else is left to transformers."""
    config = _read_json(path / "config.json")
    if "interpolate_offset" in config:  # of `dinocomp export --to hub`
        net = VisionTransformer(**config)
        load_strictly(net, read_tensors(path / "backbone.pth"), str(path))
        return _ready(net, _read_json(path / "preprocessing.json"))
    if str(config.get("architecture")).endswith("dinov2"):  # timm's
        net = _rebuild(published(read_tensors(path)), str(path), config.get("model_args", {}).get("num_heads"))
        return _ready(net, _of_timm(config.get("pretrained_cfg", {})))
    kind = config.get("model_type")
    if kind not in ("dinov2", "dinov2_with_registers"):
        return open_hugging_face(str(path))
    net = _rebuild(published(read_tensors(path)), str(path), config.get("num_attention_heads"))
    if kind == "dinov2_with_registers":  # it may have none of them, and filters then, too
        net.interpolate_offset, net.interpolate_antialias = 0.0, True
    preparation = path / "preprocessor_config.json"
    return _ready(net, _of_hugging_face(_read_json(preparation)) if preparation.is_file() else {})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); copy the folder again, or export it again") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds no settings; copy the folder again, or export it again")
    return found


def _of_hugging_face(about: dict[str, Any]) -> dict[str, Any]:
    size, crop = about.get("size") or {}, about.get("crop_size") or {}
    found = {"mean": about.get("image_mean"), "std": about.get("image_std")}
    return found | {"resize": size.get("shortest_edge"), "crop": crop.get("height")}


def _of_timm(about: dict[str, Any]) -> dict[str, Any]:
    crop = about.get("input_size", [3, None])[-1]
    resize = crop and math.floor(crop / about.get("crop_pct", 1.0))
    return {"mean": about.get("mean"), "std": about.get("std"), "resize": resize, "crop": crop}


def _rebuild(tensors: dict[str, Tensor], source: str, num_heads: int | None = None) -> VisionTransformer:
    net = VisionTransformer(**infer_architecture(tensors, source, num_heads))
    load_strictly(net, adapt(tensors, net).tensors, source)
    return net


def _ready(net: VisionTransformer, about: Mapping[str, Any]) -> Backbone:
    """Frozen, with the preprocessing that is said (mean, std, resize, crop), or as published networks have it."""
    net.mean, net.std = (about.get(name) or _IMAGENET[name] for name in ("mean", "std"))
    crop = max(net.patch_size, 224 // net.patch_size * net.patch_size)
    fits = about.get("resize") and about.get("crop") and not about["crop"] % net.patch_size
    net.view = (about["resize"], about["crop"]) if fits else (round(crop * 256 / 224), crop)
    return net.eval().requires_grad_(False)
