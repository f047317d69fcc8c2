"""Graphs without code: ONNX, and torch's exported programs. Batches of any size, images of one."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from dinocomp.errors import WeightsError
from dinocomp.interop.export.hubconf import VisionTransformer as PlainTransformer
from dinocomp.interop.export.parts import Subject, Written, preprocessing, write_json

_LARGEST_BATCH = 65536  # torch.export wants a bound
_LARGEST_FILE = 1_900_000_000  # bytes; an ONNX file ends at 2 GB, more lies beside it
_PREPARE = """\
import json

import numpy as np
{imports}from PIL import Image

about = json.load(open("preprocessing.json"))
image = Image.open("photo.jpg").convert("RGB")
scale = about["resize"] / min(image.size)
image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
left, top = ((side - about["crop"]) // 2 for side in image.size)
image = image.crop((left, top, left + about["crop"], top + about["crop"]))
pixels = (np.asarray(image) * about["rescale"] - about["mean"]) / about["std"]  # [crop, crop, 3]
pixels = pixels.transpose(2, 0, 1)[None].astype("float32")  # [1, 3, crop, crop]
"""
_ONNX = (
    _PREPARE.format(imports="import onnxruntime\n")
    + """\
session = onnxruntime.InferenceSession("model.onnx")
cls, patches = session.run(["cls", "patches"], {"pixels": pixels})
"""
)
_TORCH = (
    _PREPARE.format(imports="import torch\n")
    + """\
model = torch.export.load("model.pt2").module()
with torch.no_grad():
    cls, patches = model(torch.from_numpy(pixels))
"""
)


class _Tokens(nn.Module):
    def __init__(self, net: PlainTransformer) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.net.forward_features(pixels)
        return tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"]  # [B, D], [B, N, D]


def write_torch(subject: Subject, folder: Path) -> Written:
    """model.pt2, a program of `torch.export`, and preprocessing.json."""
    program = torch.export.export(
        _at_size(subject), (_example(subject),), dynamic_shapes=_dynamic_shapes(), strict=False
    )
    torch.export.save(program, folder / "model.pt2")
    notes = [
        _size_in_words(subject),
        f"Written by torch {torch.__version__}; an older one may not read it. It is `torch.export`'s program, which "
        "took TorchScript's place.",
    ]
    write_json(folder / "preprocessing.json", _prepared(subject))
    return Written("torch", "torch numpy pillow", _TORCH, notes=notes)


def write_onnx(subject: Subject, folder: Path) -> Written:
    """model.onnx and preprocessing.json.

    Raises:
        WeightsError: the packages that write it are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise WeightsError(
            f"--to onnx needs onnx and onnxscript ({error}); type pip install onnx onnxscript"
        ) from error
    size = sum(tensor.numel() * tensor.element_size() for tensor in subject.net.state_dict().values())
    with _quiet("torch.onnx"):
        torch.onnx.export(
            _at_size(subject),
            (_example(subject),),
            str(folder / "model.onnx"),
            dynamo=True,
            input_names=["pixels"],
            output_names=["cls", "patches"],
            dynamic_shapes=_dynamic_shapes(),
            external_data=size > _LARGEST_FILE,
            verbose=False,
        )
    write_json(folder / "preprocessing.json", _prepared(subject))
    notes = [
        _size_in_words(subject),
        "Input `pixels` [B, 3, H, W] is fp32 and normalised: (pixels / 255 - mean) / std. Outputs are `cls` [B, D] and "
        "`patches` [B, N, D], row by row, both after the final norm.",
    ]
    return Written("onnx", "onnxruntime numpy pillow", _ONNX, notes=notes)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without a library's warnings, here of operators of torchvision that no network of ours has."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _at_size(subject: Subject) -> nn.Module:
    """The network with its positions laid out for images of `subject.size`, resampled as it does itself."""
    net = PlainTransformer(**subject.architecture)
    net.load_state_dict(subject.net.state_dict())
    side = subject.size // net.patch_size
    with torch.no_grad():
        net.pos_embed = nn.Parameter(net.positions(side, side).clone())
    return _Tokens(net).eval().requires_grad_(False)


def _example(subject: Subject) -> Tensor:
    # Of two images: one would be taken for a fixed size.
    return torch.zeros(2, subject.architecture["in_chans"], subject.size, subject.size)


def _dynamic_shapes() -> dict[str, dict[int, object]]:
    return {"pixels": {0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)}}


def _prepared(subject: Subject) -> dict[str, object]:
    """The view scaled to the size of the graph's images."""
    resize, crop = subject.view
    return preprocessing(subject) | {"resize": round(resize * subject.size / crop), "crop": subject.size}


def _size_in_words(subject: Subject) -> str:
    side = subject.size
    return (
        f"It takes batches of any number of images, of {side} x {side} pixels alone: positions are laid out for "
        "these, as the network itself resamples them. For another size export it again with `--size`."
    )
