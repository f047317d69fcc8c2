"""Opening a frozen backbone, whoever trained it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dinocomp.interop.teacher import load_teacher


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
    """A frozen backbone from a run's folder or a teacher's file.

    Raises:
        WeightsError: there is none at `source`.
    """
    path = Path(source).expanduser()
    return load_teacher(path / "teacher.safetensors" if path.is_dir() else path)
