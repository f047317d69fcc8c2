"""Pictures of a run: what the networks are shown, at the first batch; what the teacher makes of it, at evaluations."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from composer import Callback, Logger, State
from composer.utils import dist
from PIL import Image
from torch import Tensor

from dinocomp.data import Images, evaluation_view, split_batch
from dinocomp.data.listing import NO_LABEL
from dinocomp.evaluate.features import autocasting
from dinocomp.method import DINOv2
from dinocomp.method.losses import Centering
from dinocomp.method.pixels import Colours
from dinocomp.pictures.attention import watch_attention
from dinocomp.pictures.batch import ROWS, batch_picture, coloured
from dinocomp.pictures.canvas import WIDTH, write_png
from dinocomp.pictures.curves import curves_picture, read_lines
from dinocomp.pictures.looks import Looks, makers, thumbnails
from dinocomp.pictures.prototypes import Usage, prototype_usage

log = logging.getLogger(__name__)


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
            batch = split_batch(state.batch, ROWS)[0]
            if self.colours is not None:
                batch = coloured(batch, self.colours)
            picture = batch_picture({name: field.cpu() for name, field in batch.items()})
            try:
                write_png(self.path, picture)
            except OSError as error:  # as for all files but checkpoints: it costs this one, not the run
                log.warning("%s cannot be written: %s", self.path, error)


class Pictures:
    """Draws what the teacher makes of some images, always the same ones: PCA of patch tokens, attention, neighbours, a
    map, prototypes; and the run's curves.

    Rank 0 looks at the images and draws. The others only take part in its forward passes, for which they may hold a
    share of the weights. Nothing is drawn at random but the choice of images, from a generator of its own.

    Args:
        images: to choose from; of the evaluation's held-out images, or those trained on.
        folder: the run's; gets `pictures/iteration-N/NAME.png` and `pictures/curves.png`.
        resize, crop: see `evaluation_view`, in pixels.
        temperature: of the teacher's softmax over prototypes.
        autocast: number type to compute in; None for that of the weights.
        number: images at most, for neighbours, map and prototypes.
        closely: how many of these are looked at patch by patch.
        batch_size: images a forward pass.
        seed: of the choice.
    """

    def __init__(
        self,
        images: Images,
        *,
        folder: Path,
        resize: int,
        crop: int,
        temperature: float,
        autocast: torch.dtype | None = None,
        number: int = 500,
        closely: int = 12,
        batch_size: int = 50,
        seed: int = 0,
    ) -> None:
        self.images = images
        self.folder = folder
        self.resize, self.crop = resize, crop
        self.temperature = temperature
        self.autocast = autocast
        self.batch_size = batch_size
        rng = np.random.default_rng(seed)
        self.chosen = rng.choice(len(images), min(number, len(images)), replace=False).tolist()
        self.closely = min(closely, len(self.chosen))

    def __call__(self, model: DINOv2, iteration: int, logger: Logger) -> None:
        """Draws, writes and logs all pictures of one iteration. All ranks must call it."""
        looks = self._look(model)
        if dist.get_global_rank() != 0:
            return
        if looks is None:
            log.warning(
                "no pictures at iteration %d: none of the first %d images chosen can be decoded",
                *(iteration, self.closely),
            )
        elif not looks.finite:
            log.warning("no pictures at iteration %d: the teacher's features are not finite", iteration)
        else:
            for name, make in makers(looks, width=WIDTH).items():
                picture = self._draw(f"iteration-{iteration:08d}/{name}.png", make)
                if picture is not None:
                    # As a channels-last array all of Composer's loggers take it; W&B makes tables unless told not to.
                    logger.log_images(
                        np.asarray(picture),
                        name=f"pictures/{name}",
                        channels_last=True,
                        step=iteration,
                        use_table=False,
                    )
        self.draw_curves()

    def draw_curves(self) -> None:
        """Draws `pictures/curves.png` anew, of what metrics.jsonl and evaluation.jsonl hold by now. On rank 0."""
        self._draw(
            "curves.png",
            lambda: curves_picture(
                read_lines(self.folder / "metrics.jsonl"), read_lines(self.folder / "evaluation.jsonl")
            ),
        )

    def _draw(self, name: str, make) -> Image.Image | None:
        """One picture, drawn and written; None where it failed. No picture is worth a run, whatever went wrong."""
        path = self.folder / "pictures" / name
        try:
            picture = make()
            write_png(path, picture)
        except Exception as error:
            log.warning("%s cannot be drawn: %s: %s", path, type(error).__name__, error)
            log.debug("that picture", exc_info=True)
            return None
        return picture

    def _views(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What the network is shown of some images, uint8 [b, 3, crop, crop], their labels [b], and which are good [b].

        On other ranks than 0, and in place of an image that cannot be read, black.
        """
        views = torch.zeros(len(numbers), 3, self.crop, self.crop, dtype=torch.uint8)
        labels, good = torch.full((len(numbers),), NO_LABEL), torch.zeros(len(numbers), dtype=torch.bool)
        for i, number in enumerate(numbers if dist.get_global_rank() == 0 else ()):
            try:
                sample, pixels = self.images.decode(number)
            except Exception as error:  # other ranks wait in the forward pass, and no picture is worth a run
                log.debug("image %d is left out of the pictures: %s", number, error)
                continue
            views[i], labels[i], good[i] = evaluation_view(pixels, self.resize, self.crop), sample.label, True
        return views, labels, good

    @torch.no_grad()
    def _look(self, model: DINOv2) -> Looks | None:
        """What the teacher says; None on other ranks than 0, or where no image can be read."""
        shells = model.shells("teacher")
        backbone, head = shells["backbone"], shells.get("dino_head")
        net = model.networks("teacher")["backbone"]
        device = next(backbone.parameters()).device
        # A frozen teacher's centre is none of the student's: it learns logits that have been centred already.
        centred = isinstance(model.dino_targets, Centering) and not model.distils
        centre = model.dino_targets.center if centred else 0.0  # [1, K]
        close, rest = self.chosen[: self.closely], self.chosen[self.closely :]
        batches = [close, *(rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size))]
        found: list[tuple[Tensor, Tensor, Tensor]] = []  # thumbnails, class tokens, labels of each batch
        usage: Usage | None = None
        closely: tuple[Tensor, Tensor, Tensor] | None = None  # views, patch tokens, attention
        with (
            torch.compiler.set_stance("force_eager"),  # these shapes are not those that blocks are compiled for
            autocasting(device, self.autocast),
            watch_attention(net) as attention,
        ):
            for batch in batches:
                views, labels, good = self._views(batch)
                tokens = backbone(model.normalize(views.to(device)))
                logits = None if head is None else head(tokens.cls) - centre  # [b, K]
                if closely is None:
                    patches, of_class = tokens.patches.float().cpu(), attention.read(len(batch)).cpu()
                    closely = views[good], patches[good], of_class[good]
                if good.any():
                    found.append((thumbnails(views[good]), tokens.cls.float().cpu()[good], labels[good]))
                    if logits is not None:
                        used = prototype_usage(logits[good.to(device)], self.temperature)
                        usage = used if usage is None else usage + used
        if not found or not len(closely[0]):
            return None
        side = self.crop // net.patch_size
        thumbs, vectors, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Looks(
            thumbs,
            vectors,
            labels,
            [name for _, name in self.images.classes],
            closely[0],
            closely[1],
            (side, side),
            closely[2],
            net.num_prefix_tokens,
            usage,
        )
