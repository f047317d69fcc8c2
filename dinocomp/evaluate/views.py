"""How images are shown to a frozen backbone: as they are scored, in random crops, or in several augmented views."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinocomp.data import BadImage, CropSettings, Images, evaluation_view
from dinocomp.data.crops import CropParameters, apply_crop, cut, draw_box, draw_crop
from dinocomp.data.listing import NO_LABEL

_CROPS, _AUGMENTED = 304, 305  # streams of random numbers
_RATIO = (3 / 4, 4 / 3)  # width / height of a random crop


class CentreViews(Dataset):
    """Image i as evaluations see it, and its label: uint8 [3, crop, crop], int.

    One that cannot be decoded is black and has the label -1; an error, unless `skip_bad`.
    """

    def __init__(self, images: Images, resize: int, crop: int, skip_bad: bool = True) -> None:
        self.images, self.resize, self.crop, self.skip_bad = images, resize, crop, skip_bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        try:
            sample, pixels = self.images.decode(i)  # pixels: uint8 [3, H, W]
        except BadImage:
            if not self.skip_bad:
                raise
            return torch.zeros(3, self.crop, self.crop, dtype=torch.uint8), NO_LABEL
        return evaluation_view(pixels, self.resize, self.crop), sample.label


class RandomViews(Dataset):
    """A random crop of image i, mirrored or not, in pass p over the images; a function of (seed, p, i).

    Args:
        crop: side of the view in pixels.
        scale: smallest share of the image's area; the largest is all of it.
        flip: probability of mirroring.
    """

    def __init__(self, images: Images, crop: int, scale: float, flip: float, seed: int) -> None:
        self.images, self.crop, self.scale, self.flip, self.seed = images, crop, scale, flip, seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        passes, i = place
        view = torch.zeros(3, self.crop, self.crop, dtype=torch.uint8)
        try:
            sample, pixels = self.images.decode(i)  # pixels: uint8 [3, H, W]
        except BadImage:
            return view, NO_LABEL
        rng = np.random.Generator(np.random.Philox((self.seed, _CROPS, passes, i)))
        box = draw_box(*pixels.shape[-2:], (self.scale, 1.0), _RATIO, rng)
        cut(pixels, CropParameters(box, bool(rng.random() < self.flip), (), False, None, False), view)
        return view, sample.label


class AugmentedViews(Dataset):
    """Of image i the plain view, then `views` augmented ones, as first global crops, and whether it could be decoded:
    uint8 [1 + V, 3, G, G], bool. The augmentation is a function of i alone."""

    def __init__(self, images: Images, settings: CropSettings, views: int, resize: int, skip_bad: bool = True) -> None:
        self.images, self.settings = images, settings
        self.views, self.resize, self.skip_bad = views, resize, skip_bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, bool]:
        size = self.settings.global_crops_size
        views = torch.zeros(1 + self.views, 3, size, size, dtype=torch.uint8)
        try:
            _, pixels = self.images.decode(i)  # [3, H, W]
        except BadImage:
            if not self.skip_bad:
                raise
            return views, False
        views[0] = evaluation_view(pixels, self.resize, size)
        rng = np.random.default_rng((_AUGMENTED, i))
        for view in views[1:]:
            view.copy_(apply_crop(pixels, size, draw_crop(*pixels.shape[-2:], self.settings, 0, rng), self.settings))
        return views, True
