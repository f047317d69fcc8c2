"""What the networks are shown: crops and masks of a batch."""

import torch
import torch.nn.functional as F
from PIL import Image

from dinocomp.data import Batch
from dinocomp.method.pixels import Colours
from dinocomp.pictures.canvas import WIDTH, blocks, page, to_picture

ROWS = 8  # images in the picture, at most


def coloured(batch: Batch, colours: Colours) -> Batch:
    """A batch whose crops' colours are left to the device, with the crops that the networks see."""
    found = dict(batch)
    for kind in ("global", "local"):
        crops = batch[f"{kind}_crops"]  # uint8 [B, crops, 3, side, side]
        changed = colours(crops.flatten(0, 1), batch[f"{kind}_colours"].flatten(0, 1))
        found[f"{kind}_crops"] = changed.view_as(crops)
    return found


def batch_picture(batch: Batch, images: int = ROWS, *, width: int = WIDTH) -> Image.Image:
    """One row an image: its two global crops, each plain and with its masked patches greyed, then its local crops.

    Args:
        batch: on the CPU.
        images: rows at most.
        width: of the picture, in pixels.
    """
    rows = []
    for globals_, locals_, mask in zip(
        batch["global_crops"][:images], batch["local_crops"][:images], batch["masks"][:images], strict=True
    ):
        large = []
        for crop, crop_mask in zip(globals_, mask, strict=True):  # [3, G, G], [N]
            side = round(len(crop_mask) ** 0.5)
            hidden = F.interpolate(crop_mask.view(1, 1, side, side).float(), size=crop.shape[-2:])[0]  # [1, G, G]
            large += [to_picture(crop), to_picture(torch.where(hidden > 0, torch.full_like(crop, 128), crop))]
        rows.append((large, [to_picture(crop) for crop in locals_]))
    masked = batch["masks"].float().mean()
    text = (
        "A row an image: its two global crops, each as the teacher sees it and as the student does, with masked "
        f"patches grey ({masked:.0%} of all)"
    )
    text += f"; then its {len(rows[0][1])} local crops, for the student alone." if rows[0][1] else "."
    return page("What the networks are shown", text, blocks(rows, width=width))
