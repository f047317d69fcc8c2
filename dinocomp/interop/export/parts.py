"""What is exported, and what an export says of itself."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinocomp.errors import WeightsError
from dinocomp.interop.formats import infer_architecture
from dinocomp.models import VisionTransformer


@dataclass(frozen=True)
class Subject:
    """A backbone to export.

    Attributes:
        net: in eval mode, on the CPU, in fp32.
        architecture: arguments of `VisionTransformer` for it.
        mean, std: of the pixels that it expects, by channel, in [0, 1].
        view: pixels that an image's shorter side is resized to, and that its middle is cropped to.
        size: side in pixels of the images, for targets that take one size alone.
    """

    net: VisionTransformer
    architecture: dict[str, Any]
    mean: Sequence[float]
    std: Sequence[float]
    view: tuple[int, int]
    size: int


@dataclass(frozen=True)
class Resampling:
    """How a library resamples positions at other sizes; see `interpolate_pos_embed`."""

    library: str
    offset: float
    antialias: bool


@dataclass(frozen=True)
class Written:
    """What a target's files are.

    Attributes:
        library: as the Hugging Face hub calls what loads them.
        needs: packages that the code below needs.
        code: Python, in the export's folder, from a file photo.jpg to `cls` [1, D] and `patches` [1, N, D]; where the
            library knows no networks, to `weights`.
        more: another way, in words and code.
        resampling: how positions are resampled there; None where they are as here, or there is one size alone.
        notes: what else is to be known, a sentence each.
    """

    library: str
    needs: str
    code: str
    more: str = ""
    resampling: Resampling | None = None
    notes: list[str] = field(default_factory=list)


def subject_of(net: Any, source: str, size: int | None) -> Subject:
    """What `open_backbone` gave, for export.

    Args:
        size: side in pixels of the images; None for that which its positions are laid out for.

    Raises:
        WeightsError: it is another library's network, or `size` is no whole number of its patches.
    """
    if not isinstance(net, VisionTransformer):
        raise WeightsError(
            f"{source} is a {type(net).__name__}, a network of another library, which can save it itself; export takes "
            "DINOv2 networks: a run, its teacher, or published weights"
        )
    net = net.cpu().float()
    architecture = infer_architecture(net.state_dict(), source, net.blocks[0].attn.num_heads) | {
        "interpolate_offset": net.interpolate_offset,
        "interpolate_antialias": net.interpolate_antialias,
    }
    size = size or architecture["img_size"]
    if size % net.patch_size:
        below = size // net.patch_size * net.patch_size
        fitting = " or ".join(str(n) for n in (below, below + net.patch_size) if n)
        raise WeightsError(f"{size} pixels are no whole number of patches of {net.patch_size}; give {fitting}")
    return Subject(net, architecture, net.mean, net.std, tuple(net.view), size)


def refuse_identity(subject: Subject, library: str) -> None:
    """Raises WeightsError where blocks have no FFN, which other libraries cannot say."""
    if subject.architecture["ffn_layer"] == "identity":
        raise WeightsError(
            f"this network's blocks have no FFN (student.ffn_layer=identity), and {library} has no such DINOv2; "
            "export it --to hub, onnx, torch or safetensors"
        )


def preprocessing(subject: Subject) -> dict[str, Any]:
    """How images become the network's input, for targets without a form of their own for that."""
    resize, crop = subject.view
    return {
        "resize": resize,
        "crop": crop,
        "interpolation": "bicubic, antialiased",
        "rescale": 1 / 255,
        "mean": list(subject.mean),
        "std": list(subject.std),
        "steps": "RGB; shorter side to `resize` pixels; middle `crop` x `crop`; (pixels * rescale - mean) / std",
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
