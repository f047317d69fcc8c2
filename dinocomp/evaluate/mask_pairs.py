"""Images with a mask each: a class for each pixel."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dinocomp.data import decode_rgb, evaluation_view
from dinocomp.data.listing import list_images, some
from dinocomp.errors import DataError
from dinocomp.hints import missing

IGNORED = 255
_INDEXED = ("P", "L", "1", "I", "I;16")  # Pillow's modes of one number a pixel


@dataclass(frozen=True)
class MaskPairs:
    """Images and masks, by the same place in both.

    Attributes:
        name: what they were given as.
    """

    name: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.images)


def find_pairs(text: str) -> MaskPairs:
    """The images below IMAGES with those masks below MASKS that have the same path up to the ending.

    Args:
        text: ``IMAGES:MASKS``, two folders.

    Raises:
        DataError: not two folders, no images, or an image without a mask.
    """
    first, colon, second = text.rpartition(":")
    if not colon or not first or not second:
        raise DataError(f"{text}: expected IMAGES:MASKS, two folders, such as data/images/train:data/masks/train")
    folders = [Path(part).expanduser() for part in (first, second)]
    listed = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"{missing(folder) if not folder.exists() else f'{folder} is no folder.'} Give IMAGES:MASKS"
            )
        entries, _ = list_images(folder)
        listed.append({str(Path(key).with_suffix("")): Path(path) for key, path, *_ in entries})
    images, masks = listed
    if not images:
        raise DataError(f"there are no images in {folders[0]}")
    if absent := sorted(set(images) - set(masks)):
        raise DataError(
            f"{len(absent)} of the {len(images)} images in {folders[0]} have no mask in {folders[1]}: {some(absent)}. "
            "A mask has its image's name, with any ending"
        )
    names = sorted(images)
    return MaskPairs(text, tuple(images[name] for name in names), tuple(masks[name] for name in names))


def read_mask(path: Path) -> Tensor:
    """Class of each pixel, uint8 [H, W]: the index of a palette image, or the value of a grey one; 255 is ignored.

    Raises:
        DataError: not such an image, or a number above 255.
    """
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.array(image)  # [H, W], if it has one number a pixel
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise DataError(f"the mask {path} cannot be read: {error}") from error
    if mode not in _INDEXED:
        raise DataError(
            f"the mask {path} is {mode}; expected one number a pixel, its class: a palette or grey PNG (255 is ignored)"
        )
    if values.max(initial=0) > IGNORED or values.min(initial=0) < 0:
        raise DataError(f"the mask {path} has the value {values.max()}; classes are 0 to 254, and 255 is ignored")
    return torch.from_numpy(values.astype(np.uint8))


def classes_of(pairs: MaskPairs, advance: Callable[[int], object] = lambda count: None) -> Tensor:
    """How many pixels of each value there are in all masks: int64 [256]. `advance` is told of each mask."""
    counts = torch.zeros(IGNORED + 1, dtype=torch.int64)
    for path in pairs.masks:
        counts += torch.bincount(read_mask(path).flatten().long(), minlength=IGNORED + 1)
        advance(1)
    return counts


class MaskViews(Dataset):
    """Place -> (uint8 [3, crop, crop], mask uint8 [crop, crop]): both resized and cropped alike, see `evaluation_view`.

    Masks are resized to the nearest pixel; what lies outside an image (longer crops than it) is ignored.
    """

    def __init__(self, pairs: MaskPairs, resize: int, crop: int) -> None:
        self.pairs, self.resize, self.crop = pairs, resize, crop

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        path = self.pairs.images[i]
        try:
            pixels = decode_rgb(path.read_bytes())  # uint8 [3, H, W]
        except (DataError, OSError) as error:
            raise DataError(f"the image {path} cannot be read: {error}") from error
        mask = read_mask(self.pairs.masks[i])  # [H, W]
        if pixels.shape[1:] != mask.shape:
            sizes = ["x".join(map(str, reversed(x.shape[-2:]))) for x in (pixels, mask)]
            raise DataError(f"{path} is {sizes[0]} pixels and its mask {self.pairs.masks[i]} {sizes[1]}")
        small = F.resize(mask[None], [self.resize], interpolation=InterpolationMode.NEAREST_EXACT)  # [1, H', W']
        shifted = (small.int() - IGNORED).to(torch.int32)  # 0, with which the crop is filled up, is then "ignored"
        cropped = (F.center_crop(shifted, [self.crop, self.crop]) + IGNORED).to(torch.uint8)
        return evaluation_view(pixels, self.resize, self.crop), cropped[0]
