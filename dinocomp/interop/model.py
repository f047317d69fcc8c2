"""Using a backbone: `dinocomp.load`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinocomp.checkpoints.folder import TEACHER
from dinocomp.data import decode_rgb, evaluation_view, rgb_of
from dinocomp.errors import WeightsError
from dinocomp.interop.backbone import Backbone, open_backbone

_FILES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class View:
    """An image as the evaluation shows it to a network: fp32 [3, crop, crop], normalised.

    Attributes:
        resize, crop: see `evaluation_view`, in pixels.
        mean, std: by channel, of pixels in [0, 1].
    """

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image | Tensor | str | Path) -> Tensor:
        """
        Args:
            image: a Pillow image, uint8 pixels [3, H, W], or the path of an image file.

        Raises:
            DataError: it cannot be decoded.
            TypeError: a tensor is not uint8 [3, H, W].
        """
        return self.normalize(self.pixels(image))

    def pixels(self, image: Image.Image | Tensor | str | Path) -> Tensor:
        """The same before it is normalised, uint8 [3, crop, crop]."""
        if isinstance(image, (str, Path)):
            image = decode_rgb(Path(image).expanduser().read_bytes())
        elif isinstance(image, Image.Image):
            image = rgb_of(image)
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise TypeError(f"an image is uint8 [3, H, W]; this one is {image.dtype} {list(image.shape)}")
        return evaluation_view(image, self.resize, self.crop)

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] to fp32, on their device."""
        mean, std = (torch.tensor(value, device=pixels.device).view(-1, 1, 1) for value in (self.mean, self.std))
        return (pixels / 255 - mean) / std


class Model(nn.Module):
    """A frozen backbone with its preprocessing: what `dinocomp.load` gives. It is a `Backbone` itself.

    Attributes:
        net: the network; dinocomp's own `VisionTransformer`, or what holds another library's.
        transform: an image to the network's input, see `View`.
        embed_dim, patch_size, mean, std, view: see `Backbone`.
    """

    def __init__(self, net: Backbone) -> None:
        super().__init__()
        self.net = net
        self.embed_dim, self.patch_size = net.embed_dim, net.patch_size
        self.mean, self.std, self.view = net.mean, net.std, net.view
        self.transform = View(*net.view, tuple(net.mean), tuple(net.std))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Class tokens [B, D] of normalised images [B, 3, H, W], whose sides are whole numbers of patches."""
        return self.forward_features(images)["x_norm_clstoken"]

    def forward_features(self, images: Tensor, masks: Tensor | None = None) -> dict[str, Tensor | None]:
        """Tokens of normalised images, by the names of the published models.

        Args:
            images: [B, 3, H, W].
            masks: bool [B, N], patches that the mask token stands for; dinocomp's own networks only.

        Returns:
            x_norm_clstoken [B, D], x_norm_regtokens [B, R, D] and x_norm_patchtokens [B, N, D] after the final norm,
            x_prenorm [B, 1 + R + N, D] before it, and masks. Other libraries' networks give class token and patches.
        """
        if hasattr(self.net, "num_prefix_tokens"):
            tokens = self.net(images, masks)
            return {
                "x_norm_clstoken": tokens.cls,
                "x_norm_regtokens": tokens.registers,
                "x_norm_patchtokens": tokens.patches,
                "x_prenorm": tokens.prenorm,
                "masks": masks,
            }
        if masks is not None:
            raise WeightsError(f"a {type(self.net).__name__} takes no masks; dinocomp's own networks do")
        ((patches, cls),) = self.net.get_intermediate_layers(images, 1)
        return {"x_norm_clstoken": cls, "x_norm_patchtokens": patches, "masks": None}

    def get_intermediate_layers(
        self, images: Tensor, n: int | Sequence[int] = 1, *, reshape: bool = False, norm: bool = True
    ) -> list[tuple[Tensor, Tensor]]:
        """Patch and class tokens after chosen blocks; see `VisionTransformer`."""
        return self.net.get_intermediate_layers(images, n, reshape=reshape, norm=norm)

    def embed(
        self,
        images: str | Path | Sequence[str | Path],
        output: str | Path | None = None,
        *,
        batch_size: int = 64,
        device: str | torch.device | None = None,
        workers: int = 0,
    ) -> tuple[list[str], np.ndarray]:
        """Class tokens of many images; see `embed_images`, which it calls."""
        from dinocomp.interop.embed import embed_images

        return embed_images(self, images, output, batch_size=batch_size, device=device, workers=workers)


def load(source: str | Path) -> Model:
    """A frozen backbone for use, whoever trained it.

    Args:
        source: what `open_backbone` takes: a run's folder, a file of weights, a Hugging Face folder, ``timm:NAME``; or
            a run's folder or a file of weights in an object store, such as ``s3://bucket/run`` (what
            ``checkpoint.remote`` says; its newest checkpoint's teacher) and ``s3://bucket/teacher.safetensors``. Those
            are fetched each time, and no copy stays.

    Raises:
        WeightsError: there is none at `source`, or it is no backbone that is known.
        DataError, RemoteError: the object store does not give it.
    """
    text = str(source)
    if "://" not in text:
        return Model(open_backbone(source))
    with tempfile.TemporaryDirectory() as folder:
        return Model(open_backbone(_fetch(text.rstrip("/"), Path(folder))))


def _fetch(address: str, folder: Path) -> Path:
    if address.startswith("file://"):
        return Path(address.removeprefix("file://"))
    name = address.rpartition("/")[2]
    if name.endswith(_FILES):
        from dinocomp.data.store import Downloads, patiently

        downloads = Downloads(address)
        patiently(lambda: downloads.fetch(address, folder / name), address, patience=30)
        return folder / name
    from dinocomp.checkpoints.remote import RemoteFolder

    remote = RemoteFolder(address)
    whole = remote.list_whole()
    if not whole:
        raise WeightsError(
            f"{address} holds no whole checkpoint of a run; give what checkpoint.remote said, or the address of a file "
            f"of weights, such as {address}/{TEACHER}"
        )
    remote.download_part(whole[-1], TEACHER, folder)
    return folder / TEACHER
