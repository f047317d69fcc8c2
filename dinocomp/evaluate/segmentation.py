"""Semantic segmentation by one linear layer on frozen patch tokens."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from composer.utils import dist
from torch import Tensor

from dinocomp.data import PlainLoader
from dinocomp.data.listing import some
from dinocomp.data.order import uniform_permutation
from dinocomp.distributed import all_reduce
from dinocomp.errors import DataError
from dinocomp.evaluate.confusion import intersection_over_union
from dinocomp.evaluate.features import autocasting
from dinocomp.evaluate.linear import Meter, Seen
from dinocomp.evaluate.mask_pairs import IGNORED, MaskPairs, MaskViews, classes_of
from dinocomp.interop import Backbone

_KEPT_BYTES = 1 << 31  # of patch tokens that are kept in memory and not computed again in each pass


@dataclass(frozen=True)
class SegmentationSettings:
    """How the layer is trained: AdamW, a cosine to 0, no augmentation.

    Attributes:
        batch_size: images of all ranks together.
    """

    iterations: int = 2000
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    seed: int = 0


def segmentation_probe(
    backbone: Backbone,
    train: MaskPairs,
    val: MaskPairs,
    *,
    seen: Seen,
    settings: SegmentationSettings,
    meter: Meter,
) -> dict:
    """Trains a linear layer on the last block's patch tokens (after its norm), and measures it on `val`.

    Its logits, one for each patch and class, are upsampled bilinearly to the view's pixels (Oquab et al. 2024, section
    7.4, "linear"); the loss is the mean cross-entropy of the pixels that are not ignored. Ranks share each batch's
    images, and add up gradients.

    Returns:
        ``{"pixel_accuracy", "miou", "iou": {class: IoU or None}, "classes", "train_images", "val_images", ...}``; a
        class that is neither in the masks of `val` nor predicted has no IoU and is not in the mean.

    Raises:
        DataError: masks of `val` have classes that no mask of `train` has, or masks of `train` fewer than two.
    """
    with meter("segmentation probe, reading masks", len(train) + len(val)) as bar:
        counts = [classes_of(pairs, bar.advance) for pairs in (train, val)]
    present = [of_values[:IGNORED].nonzero().flatten().tolist() for of_values in counts]
    if len(present[0]) < 2:
        raise DataError(f"the masks of {train.name} have {len(present[0])} class(es); at least two are needed")
    if missing := sorted(set(present[1]) - set(present[0])):
        raise DataError(f"no mask of {train.name} has these classes of {val.name}: {some(list(map(str, missing)))}")
    num_classes = max(present[0]) + 1
    device = next(backbone.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)
    weight = torch.empty(num_classes, backbone.embed_dim).normal_(0, 0.01, generator=generator).to(device)
    weight.requires_grad_(True)  # [classes, D]
    bias = torch.zeros(num_classes, device=device, requires_grad=True)  # [classes]
    optimizer = torch.optim.AdamW([weight, bias], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    batches = _batches(len(train), settings)
    views = MaskViews(train, seen.resize, seen.crop)
    with meter("segmentation probe", len(batches) * settings.batch_size) as bar:
        for i, (tokens, masks) in enumerate(patch_tokens(backbone, seen, views, batches)):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * (1 + math.cos(math.pi * i / len(batches))) / 2
            counted = all_reduce((masks != IGNORED).sum()).clamp(min=1)  # pixels of all ranks
            optimizer.zero_grad(set_to_none=True)
            (_cross_entropy(tokens, masks, weight, bias) / counted).backward()
            for parameter in (weight, bias):
                all_reduce(parameter.grad)
            optimizer.step()
            bar.advance(len(batches[i]))
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    order = list(range(len(val)))
    step = seen.batch_size * dist.get_world_size()
    batches = [order[start : start + step] for start in range(0, len(val), step)]
    views = MaskViews(val, seen.resize, seen.crop)
    with meter("segmentation probe, scoring", len(val)) as bar, torch.no_grad():
        for batch, (tokens, masks) in zip(batches, patch_tokens(backbone, seen, views, batches), strict=True):
            for token, mask in zip(tokens, masks, strict=True):  # one at a time: maps of classes are large
                predicted = _upsampled(token[None], weight, bias, mask.shape[-1]).argmax(dim=1)[0]  # [S, S]
                known = mask != IGNORED
                pairs = mask[known].long() * num_classes + predicted[known]
                matrix += torch.bincount(pairs, minlength=num_classes**2).view_as(matrix)
            bar.advance(len(batch))
    matrix = all_reduce(matrix).cpu()  # [classes, classes], pixels
    iou = intersection_over_union(matrix)
    return {
        "pixel_accuracy": float(matrix.diagonal().sum() / matrix.sum()),
        "miou": float(iou.nanmean()),
        "iou": {str(c): None if math.isnan(value) else value for c, value in enumerate(iou.tolist())},
        "classes": num_classes,
        "train_images": len(train),
        "val_images": len(val),
        "iterations": settings.iterations,
        "resolution": seen.crop,
    }


def patch_tokens(
    backbone: Backbone, seen: Seen, views: MaskViews, batches: Sequence[Sequence[int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Patch tokens and masks of this rank's share of each batch; those of few images are kept for the next passes.

    Yields:
        tokens fp32 [b, N, D] and masks uint8 [b, S, S], on the backbone's device; b may be 0.
    """
    device = next(backbone.parameters()).device
    number, side = (seen.crop // backbone.patch_size) ** 2, seen.crop
    shares = [list(batch[dist.get_global_rank() :: dist.get_world_size()]) for batch in batches]
    different = len({i for share in shares for i in share})
    keep = different * (number * backbone.embed_dim * 4 + side**2) <= _KEPT_BYTES
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    needed, known = [], set()
    for share in shares:
        needed.append([i for i in share if not keep or i not in known])
        known.update(share)
    loader = iter(
        PlainLoader(
            views,
            batch_sampler=[share for share in needed if share],
            num_workers=seen.num_workers,
            generator=torch.Generator(),  # else the loader draws a seed from the global one
        )
    )
    for share, new in zip(shares, needed, strict=True):
        found = {}
        if new:
            pixels, masks = next(loader)
            found = dict(zip(new, zip(_forward(backbone, seen, pixels.to(device)), masks, strict=True), strict=True))
            if keep:
                kept |= {i: (token.cpu(), mask) for i, (token, mask) in found.items()}
        rows = [found[i] if i in found else kept[i] for i in share]
        tokens = [token.to(device) for token, _ in rows] or [torch.zeros(number, backbone.embed_dim, device=device)]
        masks = [mask for _, mask in rows] or [torch.zeros(side, side, dtype=torch.uint8)]
        yield torch.stack(tokens)[: len(rows)], torch.stack(masks)[: len(rows)].to(device)


@torch.no_grad()
def _forward(backbone: Backbone, seen: Seen, pixels: Tensor) -> Tensor:
    """uint8 [b, 3, S, S] -> fp32 [b, N, D]."""
    parts = []
    for part in pixels.split(seen.batch_size):
        with autocasting(pixels.device, seen.autocast):
            parts.append(backbone.get_intermediate_layers(seen.normalize(part), 1)[0][0].float())
    return torch.cat(parts)


def _upsampled(tokens: Tensor, weight: Tensor, bias: Tensor, side: int) -> Tensor:
    """[b, N, D] -> logits [b, classes, side, side]."""
    logits = F.linear(tokens, weight, bias).transpose(1, 2)  # [b, classes, N]
    across = math.isqrt(logits.shape[2])
    return F.interpolate(logits.unflatten(2, (across, across)), (side, side), mode="bilinear", align_corners=False)


def _cross_entropy(tokens: Tensor, masks: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Sum over the pixels that are not ignored."""
    if not len(tokens):
        return (weight.sum() + bias.sum()) * 0.0  # a rank without an image adds nothing
    logits = _upsampled(tokens, weight, bias, masks.shape[-1])
    return F.cross_entropy(logits, masks.long(), ignore_index=IGNORED, reduction="sum")


def _batches(images: int, settings: SegmentationSettings) -> list[list[int]]:
    """Places of each iteration's images: endless passes, each in an order of its own."""
    needed = settings.iterations * settings.batch_size
    passes = [uniform_permutation(images, settings.seed, p).tolist() for p in range(math.ceil(needed / images))]
    order = [i for one in passes for i in one][:needed]
    return [order[start : start + settings.batch_size] for start in range(0, needed, settings.batch_size)]
