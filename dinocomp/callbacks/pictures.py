"""At the first batch: a picture of what the networks are shown."""

from pathlib import Path

import torch
import torch.nn.functional as F
from composer import Callback, Logger, State
from composer.utils import dist
from PIL import Image
from torch import Tensor

from dinocomp.data import Batch, split_batch
from dinocomp.method.pixels import Colours

_ROWS = 8  # images in the picture, at most


def coloured(batch: Batch, colours: Colours) -> Batch:
    """A batch whose crops' colours are left to the device, with the crops that the networks see."""
    found = dict(batch)
    for kind in ("global", "local"):
        crops = batch[f"{kind}_crops"]  # uint8 [B, crops, 3, side, side]
        changed = colours(crops.flatten(0, 1), batch[f"{kind}_colours"].flatten(0, 1))
        found[f"{kind}_crops"] = changed.view_as(crops)
    return found


def batch_picture(batch: Batch, images: int = _ROWS, tile: int = 112) -> Image.Image:
    """One row an image: its two global crops, each plain and with its masked patches greyed, then its local crops.

    Args:
        batch: on the CPU.
        images: rows at most.
        tile: side of each crop in the picture, in pixels.
    """
    gap = 4
    global_crops, local_crops, masks = batch["global_crops"], batch["local_crops"], batch["masks"]
    rows = []
    for globals_, locals_, mask in zip(global_crops[:images], local_crops[:images], masks[:images], strict=True):
        tiles: list[Tensor] = []
        for crop, crop_mask in zip(globals_, mask, strict=True):  # [3, G, G], [N]
            side = round(len(crop_mask) ** 0.5)
            hidden = F.interpolate(crop_mask.view(1, 1, side, side).float(), size=crop.shape[-2:])[0]  # [1, G, G]
            tiles += [crop, torch.where(hidden > 0, torch.full_like(crop, 128), crop)]
        tiles += list(locals_)
        row = torch.full((3, tile + gap, len(tiles) * (tile + gap)), 255, dtype=torch.uint8)
        for i, crop in enumerate(tiles):
            resized = F.interpolate(crop[None].float(), size=(tile, tile), mode="nearest")[0]  # [3, tile, tile]
            row[:, :tile, i * (tile + gap) : i * (tile + gap) + tile] = resized.to(torch.uint8)
        rows.append(row)
    return Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy())


class FirstBatchPicture(Callback):
    """Writes `path` from the first batch that rank 0 sees, unless it is there.

    Args:
        colours: what changes the crops' colours on the device, where the workers do not; not compiled, as it sees fewer
            crops than a step has.
    """

    def __init__(self, path: Path, colours: Colours | None = None) -> None:
        self.path = path
        self.colours = colours
        self.done = False

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.done or dist.get_global_rank() != 0:
            return
        self.done = True
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            batch = split_batch(state.batch, _ROWS)[0]
            if self.colours is not None:
                batch = coloured(batch, self.colours)
            batch_picture({name: field.cpu() for name, field in batch.items()}).save(self.path)
