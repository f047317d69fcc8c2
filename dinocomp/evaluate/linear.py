"""Linear classification of frozen tokens: a grid of heads, of which one is chosen on images that are not scored."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from composer.utils import dist
from torch import Tensor

from dinocomp.data.order import uniform_permutation
from dinocomp.evaluate.choose import Chosen, hold_out
from dinocomp.evaluate.heads import LEARNING_RATES, LinearHeads, grid
from dinocomp.evaluate.neighbours import TOP, share_right
from dinocomp.evaluate.saved import SavedHeads
from dinocomp.evaluate.tokens import token_batches
from dinocomp.evaluate.views import CentreViews, RandomViews
from dinocomp.interop import Backbone

OPTIMISTIC = "the validation set: optimistic"
MIN_ITERATIONS = 1250  # an official epoch of the reference
MAX_BATCH = 1024  # of the reference on 8 GPUs
_MIN_BATCH = 32


@dataclass(frozen=True)
class LinearSettings:
    """How heads are trained and chosen; the defaults are the reference's, but for `select_on`.

    Attributes:
        epochs: passes over the training images; a training has at least 1250 iterations, however many passes that is.
        iterations: instead of that; 0 for that.
        batch_size: images of all ranks together; 0 for 1024, or fewer for few images (see `length`).
        blocks: a head sees the class tokens of the last so many blocks.
        select_on: `train` chooses a head on `fraction` of the training images, which are not trained on; `val` on the
            images that are scored, as the reference does, which makes the result optimistic.
        views: `random` trains on random crops, as the reference does; `centre` on the view that is scored, whose tokens
            are then computed once and kept in memory (images x (blocks + 1) x D numbers).
        crop_scale: smallest share of an image's area that a training crop shows.
        flip: probability that it is mirrored.
        save_iterations: between two saved states.
    """

    epochs: int = 10
    iterations: int = 0
    batch_size: int = 0
    learning_rates: tuple[float, ...] = LEARNING_RATES
    blocks: tuple[int, ...] = (1, 4)
    select_on: str = "train"
    fraction: float = 0.1
    views: str = "random"
    crop_scale: float = 0.08
    flip: float = 0.5
    seed: int = 0
    save_iterations: int = 250


def length(settings: LinearSettings, images: int) -> tuple[int, int]:
    """(iterations, images of a batch) of a training.

    The batch is 1024, halved (down to 32) while `epochs` passes in such batches would be less than 1250 iterations.
    """
    batch = settings.batch_size
    if not batch:
        batch = MAX_BATCH
        while batch > _MIN_BATCH and settings.epochs * images < MIN_ITERATIONS * batch:
            batch //= 2
    return settings.iterations or max(MIN_ITERATIONS, math.ceil(settings.epochs * images / batch)), batch


class TrainingBatches(Sequence):
    """(pass, image) of each image of a batch: the endless order of all passes over `index`, cut into batches.

    A function of the seed and the iteration, whoever computes it. Batches are made when they are asked for.

    Args:
        index: numbers of the images, int64 [n].
        first: the iteration to begin with.
        iterations: the one to end before.
        batch: images of a batch.
    """

    def __init__(self, index: Tensor, *, first: int, iterations: int, batch: int, seed: int) -> None:
        self.index, self.first, self.iterations, self.batch = index.numpy(), first, iterations, batch
        # Two, for near the end of a pass the loader is ahead of who counts the batches.
        self._order = lru_cache(maxsize=2)(lambda p: self.index[uniform_permutation(len(index), seed, p)])

    def __len__(self) -> int:
        return self.iterations - self.first

    def __getitem__(self, i: int) -> list[tuple[int, int]]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        begin = (self.first + i) * self.batch
        places = (divmod(position, len(self.index)) for position in range(begin, begin + self.batch))
        return [(passes, int(self._order(passes)[place])) for passes, place in places]


@dataclass(frozen=True)
class Seen:
    """How the backbone is shown images: `crop`, and `resize` before it, in pixels, and arguments of `token_batches`."""

    resize: int
    crop: int
    normalize: torch.nn.Module
    batch_size: int
    num_workers: int = 0
    autocast: torch.dtype | None = None

    def loading(self) -> dict:
        names = ("normalize", "batch_size", "num_workers", "autocast")
        return {name: getattr(self, name) for name in names}


def _training_tokens(
    backbone: Backbone,
    train: Chosen,
    fitted: Tensor,
    batches: TrainingBatches,
    blocks: int,
    seen: Seen,
    settings: LinearSettings,
    meter: "Meter",
) -> Iterator[tuple[Tensor, Tensor]]:
    """What heads are trained on, batch by batch: tokens fp32 [B, L + 1, D] and labels int64 [B]."""
    if settings.views == "random":
        views = RandomViews(train, seen.crop, settings.crop_scale, settings.flip, settings.seed)
        yield from token_batches(backbone, views, batches, blocks=blocks, **seen.loading())
        return
    places = [part.tolist() for part in fitted.split(seen.batch_size * dist.get_world_size())] if len(batches) else []
    centre, parts = CentreViews(train, seen.resize, seen.crop), []
    with meter("linear probe, tokens", len(fitted)) as bar:
        for some, known in token_batches(
            backbone, centre, places, blocks=blocks, advance=bar.advance, **seen.loading()
        ):
            parts.append((some.cpu(), known.cpu()))
    tokens, labels = (torch.cat(field) for field in zip(*parts, strict=True)) if parts else (None, None)
    place = {image: row for row, image in enumerate(fitted.tolist())}
    device = next(backbone.parameters()).device
    for batch in batches:
        rows = torch.tensor([place[image] for _, image in batch])
        yield tokens[rows].to(device), labels[rows].to(device)


Meter = Callable[[str, int], AbstractContextManager]  # what is done, of how many images -> has `advance(images)`


def linear_probe(
    backbone: Backbone,
    train: Chosen,
    train_labels: Tensor,
    val: Chosen,
    val_labels: Tensor,
    *,
    seen: Seen,
    num_classes: int,
    settings: LinearSettings,
    saved: SavedHeads | None = None,
    meter: Meter,
) -> tuple[dict, Tensor, dict[str, Tensor]]:
    """Trains the grid, chooses a head, and scores it on `val`.

    The backbone is frozen and sees live crops, each a function of (seed, pass, image), or what `views` says. Ranks
    share the images of a batch in the backbone, and the heads behind it: every rank has all tokens, and trains heads of
    its own. So weights and predictions are those of one process, up to rounding in the backbone.

    Args:
        train_labels, val_labels: [n], [m]; -1 for those that cannot be decoded.
        saved: where states are kept; None for nowhere.

    Returns:
        results; the predictions of the chosen head, int64 [m]; and its ``weight`` [classes, F] and ``bias`` [classes].
    """
    device = next(backbone.parameters()).device
    heads, blocks = grid(settings.learning_rates, settings.blocks), max(settings.blocks)
    on_val = settings.select_on == "val"
    held = hold_out(train_labels, 0.0 if on_val else settings.fraction, settings.seed)  # [n]
    fitted = ((train_labels >= 0) & ~held).nonzero().flatten()
    iterations, batch = length(settings, len(fitted))
    mine = dict(list(enumerate(heads))[dist.get_global_rank() :: dist.get_world_size()])
    probe = LinearHeads(
        mine,
        embed_dim=backbone.embed_dim,
        num_classes=num_classes,
        batch_size=batch,
        iterations=iterations,
        seed=settings.seed,
        device=device,
    )
    first = saved.load(probe) if saved else 0
    batches = TrainingBatches(fitted, first=first, iterations=iterations, batch=batch, seed=settings.seed)
    with meter(f"linear probe, {len(heads)} heads", len(batches) * batch) as bar:
        source = _training_tokens(backbone, train, fitted, batches, blocks, seen, settings, meter)
        for i, (tokens, labels) in enumerate(source, first):
            probe.step(i, tokens, labels)
            bar.advance(len(labels))
            if saved and ((i + 1) % settings.save_iterations == 0 or i + 1 == iterations):
                saved.save(probe, i + 1)

    def score(images: Chosen, index: Tensor, what: str) -> dict[int, Tensor]:
        """Number of a head -> its likeliest classes, [m, 5], of all heads on every rank."""
        parts: dict[int, list[Tensor]] = {number: [] for number in mine}
        places = [part.tolist() for part in index.split(seen.batch_size * dist.get_world_size())]
        centre = CentreViews(images, seen.resize, seen.crop)
        with meter(what, len(index)) as bar:
            for tokens, _ in token_batches(
                backbone, centre, places, blocks=blocks, advance=bar.advance, **seen.loading()
            ):
                for number, classes in probe.top(tokens, min(TOP, num_classes)).items():
                    parts[number].append(classes)
        ours = {number: torch.cat(some) for number, some in parts.items()}
        return {number: classes for part in dist.all_gather_object(ours) for number, classes in part.items()}

    on_scored = score(val, torch.arange(len(val)), "linear probe, scoring")
    if on_val:
        selection, selection_labels = on_scored, val_labels
    else:
        selection = score(train, held.nonzero().flatten(), "linear probe, choosing")
        selection_labels = train_labels[held]
    accuracy = [share_right(selection[number][:, :1], selection_labels) for number in range(len(heads))]
    best = max(range(len(heads)), key=lambda number: accuracy[number])  # the first of those that are equal
    weights = [{name.split(".")[1]: t for name, t in probe.state([best]).items() if "momentum" not in name}]
    (weights,) = [part for part in dist.all_gather_object(weights[0]) if part]
    chosen = heads[best]
    result = {
        "top1": share_right(on_scored[best][:, :1], val_labels),
        "top5": share_right(on_scored[best], val_labels),
        "chosen": asdict(chosen),
        "selected_on": OPTIMISTIC if on_val else f"{len(selection_labels)} images held out of train",
        "selection_images": len(selection_labels),
        "iterations": iterations,
        "batch_size": batch,
        "grid": [asdict(head) | {"selection_top1": right} for head, right in zip(heads, accuracy, strict=True)],
    }
    return result, on_scored[best][:, 0].long(), weights
