"""How much a library's own way of resampling positions changes tokens at other sizes than that of training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dinocomp.interop.export.parts import Resampling, Subject
from dinocomp.models import VisionTransformer


@dataclass(frozen=True)
class Difference:
    """Of one image size.

    Attributes:
        pixels: side of the images.
        cls, patches: |theirs - ours| / |ours| over all numbers of these tokens (Euclidean norms).
    """

    pixels: int
    cls: float
    patches: float


@torch.no_grad()
def differences(subject: Subject, there: Resampling) -> list[Difference]:
    """At about 2/3 and 3/2 of the side that positions are laid out for, of two images of normal noise.

    The same network computes both, once with the library's resampling.
    """
    net, found = subject.net, []
    side = subject.architecture["img_size"] // net.patch_size
    generator = torch.Generator().manual_seed(0)
    for patches in (max(1, round(side * 2 / 3)), max(side + 1, round(side * 3 / 2))):
        pixels = patches * net.patch_size
        images = torch.randn(2, subject.architecture["in_chans"], pixels, pixels, generator=generator)
        ours = net(images)
        with _resampling(net, there):
            theirs = net(images)
        found.append(Difference(pixels, _relative(theirs.cls, ours.cls), _relative(theirs.patches, ours.patches)))
    return found


@contextmanager
def _resampling(net: VisionTransformer, there: Resampling) -> Iterator[None]:
    before = net.interpolate_offset, net.interpolate_antialias
    net.interpolate_offset, net.interpolate_antialias = there.offset, there.antialias
    try:
        yield
    finally:
        net.interpolate_offset, net.interpolate_antialias = before


def _relative(theirs: Tensor, ours: Tensor) -> float:
    return ((theirs - ours).norm() / ours.norm()).item()


def in_words(there: Resampling, found: list[Difference]) -> str:
    """A sentence or two, for the card and the terminal."""
    if not any(item.cls or item.patches for item in found):
        return f"{there.library}: tokens are the same at every image size, for positions are resampled as in training."
    numbers = "; ".join(
        f"at {item.pixels} x {item.pixels} by {item.cls:.2g} (class token) and {item.patches:.2g} (patches)"
        for item in found
    )
    return (
        f"{there.library}: at other image sizes than that of training, positions are resampled otherwise than the "
        f"network was trained with. Tokens of noise then differ, relatively, {numbers}. At the training size nothing "
        "does. `recipes=[portable]` trains networks that are the same everywhere."
    )
