"""The training loader: places of the run -> one batch, the same whoever computes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from dinocomp.data.batch import Batch
from dinocomp.data.crops import (
    GLOBAL_CROPS,
    CropParameters,
    CropSettings,
    draw_crops,
    largest_reduction,
    make_crops,
    on_reduced,
)
from dinocomp.data.device import pack
from dinocomp.data.masks import MaskSettings, batch_masks
from dinocomp.data.order import Place, TrainingOrder
from dinocomp.data.reader import BadImage, Images
from dinocomp.data.workers import PlainLoader
from dinocomp.errors import DataError

_CROP_STREAM, _REPLACEMENT_STREAM = 104, 105  # keep these draws apart from those of order and masks
_STACKED = {"global_crops", "local_crops", "global_colours", "local_colours"}
_REPLACEMENTS = 10  # images tried in the place of a bad one


@dataclass(frozen=True)
class FirstPhase:
    """What is shown in the first `iterations` of a run, in the place of what is shown afterwards.

    Both phases draw as many crops from the same boxes of the same images; only sizes and grids may differ.
    """

    iterations: int
    crops: CropSettings
    masks: MaskSettings


class _Crops(TypedDict):
    position: int
    index: int
    replaced: int
    global_crops: torch.Tensor  # uint8 [2, 3, G, G]
    local_crops: torch.Tensor  # uint8 [L, 3, l, l]


class Crops(_Crops, total=False):
    """What one sample contributes to a batch."""

    global_colours: torch.Tensor  # fp32 [2, P]; where the device does them
    local_colours: torch.Tensor  # fp32 [L, P]


class MultiCropDataset(Dataset):
    """Maps a place of the run to its crops, and remembers where a resumed run goes on.

    Crops are a function of (seed, pass, sample): not of the rank, the worker or what was drawn before. So is the image
    that takes the place of a bad one, if `skip_bad`; else a bad one is an error. With `device_augment` crops have their
    own colours, and what was drawn for them goes with them. With `scaled_decode` JPEGs are decoded at a lower
    resolution where that suffices for their crops. Which settings a sample's crops have is a function of the iteration.
    """

    def __init__(
        self,
        images: Images,
        crops: CropSettings,
        *,
        seed: int,
        global_batch: int,
        skip_bad: bool = False,
        device_augment: bool = False,
        scaled_decode: bool = False,
        first_phase: FirstPhase | None = None,
    ) -> None:
        self.images = images
        self.crops = crops
        self.first_phase = first_phase
        self.seed = seed
        self.global_batch = global_batch
        self.skip_bad = skip_bad
        self.device_augment = device_augment
        self.scaled_decode = scaled_decode
        self.position = 0  # images consumed by all ranks when the loader's iteration began
        self.iteration = 0  # iterations done by then

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Place) -> Crops:
        position, passes, sample = place
        phase = self.phase_at(self.step_and_slot(position)[0])
        crops = phase.crops if phase else self.crops
        shown, image, drawn = self._shown(passes, sample, crops)
        large, small = make_crops(image, drawn, crops, colours=not self.device_augment)
        replaced = -1 if shown == sample else sample
        found = Crops(position=position, index=shown, replaced=replaced, global_crops=large, local_crops=small)
        if self.device_augment:
            packed = torch.tensor([pack(parameters) for parameters in drawn])  # [2 + L, P]
            found |= {"global_colours": packed[:GLOBAL_CROPS], "local_colours": packed[GLOBAL_CROPS:]}
        return found

    def phase_at(self, iteration: int) -> FirstPhase | None:
        """The first phase while it lasts, then None."""
        lasts = self.first_phase is not None and iteration < self.first_phase.iterations
        return self.first_phase if lasts else None

    def _shown(self, passes: int, sample: int, crops: CropSettings) -> tuple[int, torch.Tensor, list[CropParameters]]:
        """The sample, or the one that takes its place, its pixels, uint8 [3, H, W], and the crops drawn for them."""
        try:
            return sample, *self._opened(sample, passes, sample, crops)
        except BadImage as error:
            if not self.skip_bad:
                raise
            first = error
        rng = np.random.default_rng((self.seed, _REPLACEMENT_STREAM, passes, sample))
        for other in rng.integers(len(self.images), size=_REPLACEMENTS).tolist():
            try:
                return other, *self._opened(other, passes, sample, crops)
            except BadImage:
                continue
        raise DataError(
            f"{first} {_REPLACEMENTS} others, drawn to take its place, cannot be decoded either: see whether "
            f"{self.images.path} holds images at all"
        )

    def _opened(
        self, index: int, passes: int, sample: int, crops: CropSettings
    ) -> tuple[torch.Tensor, list[CropParameters]]:
        """Pixels of a stored image, uint8 [3, H, W], and the crops drawn for the sample in whose place it is shown."""

        def draw(height: int, width: int) -> list[CropParameters]:
            rng = np.random.default_rng((self.seed, _CROP_STREAM, passes, sample))
            return draw_crops(height, width, crops, rng)

        if not self.scaled_decode:
            image = self.images.decode(index)[1]  # [3, H, W]
            return image, draw(*image.shape[-2:])

        size, drawn = (0, 0), []

        def reduction(height: int, width: int) -> int:
            nonlocal size, drawn
            size, drawn = (height, width), draw(height, width)
            return largest_reduction(drawn, crops)

        image = self.images.decode(index, reduction)[1]  # [3, H, W], perhaps reduced
        reduced = tuple(image.shape[-2:])
        return image, drawn if reduced == size else [on_reduced(p, size, reduced) for p in drawn]

    def step_and_slot(self, position: int) -> tuple[int, int]:
        """Iteration of the run and place in its global batch of a position at or behind the starting point."""
        steps, slot = divmod(position - self.position, self.global_batch)
        return self.iteration + steps, slot

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, int]:
        """Where the run stands; Composer calls this for every checkpoint.

        Args:
            num_samples: images consumed by all ranks, since the run began or (`from_beginning` False) since the
                loader's iteration began.
        """
        position = num_samples if from_beginning else self.position + num_samples
        return {"position": position, "iteration": self.step_and_slot(position)[0]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the last consumed image at the loader's next iteration.

        Iterations are kept beside images so that a run may go on with another global batch.
        """
        self.position, self.iteration = int(state["position"]), int(state["iteration"])


class Collate:
    """Stacks crops and draws the masks, which belong to places of the global batch, not to samples."""

    def __init__(self, dataset: MultiCropDataset, masks: MaskSettings) -> None:
        self.dataset = dataset
        self.masks = masks

    def __call__(self, samples: Sequence[Crops]) -> Batch:
        places = [self.dataset.step_and_slot(sample["position"]) for sample in samples]
        slots = np.array([slot for _, slot in places])  # [B]
        step = places[0][0]
        phase = self.dataset.phase_at(step)
        settings = phase.masks if phase else self.masks
        masks = batch_masks(settings, self.dataset.seed, step, self.dataset.global_batch, slots)  # [B, 2, N]
        # In a worker torch's own collation stacks in the memory that both processes see, which saves one copy.
        stacked = {name: default_collate([sample[name] for sample in samples]) for name in _STACKED & samples[0].keys()}
        return Batch(
            **stacked,
            masks=torch.from_numpy(masks),  # [B, 2, N]
            index=torch.tensor([sample["index"] for sample in samples], dtype=torch.int64),  # [B]
            replaced=torch.tensor([sample["replaced"] for sample in samples], dtype=torch.int64),  # [B]
        )


def training_loader(
    images: Images,
    *,
    crops: CropSettings,
    masks: MaskSettings,
    batch_size: int,
    world_size: int = 1,
    rank: int = 0,
    iterations: int,
    seed: int = 0,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    timeout_seconds: float = 0,
    pin_memory: bool = False,
    skip_bad: bool = False,
    device_augment: bool = False,
    scaled_decode: bool = False,
    first_phase: FirstPhase | None = None,
) -> DataLoader:
    """The loader of one rank; its batches are `Batch`es, the same ones for any number of workers.

    Args:
        masks: `sample_probability=0` gives masks that are all False.
        batch_size: images of this rank in an iteration. May exceed the number of images: passes follow one another.
        iterations: of the whole run.
        prefetch_factor: batches each worker prepares ahead.
        timeout_seconds: fail when a worker takes longer than this for a batch; 0 waits for ever.
        skip_bad: whether another image takes the place of one that cannot be decoded; else that is an error.
        device_augment: whether the device changes the crops' colours; batches then say how.
        scaled_decode: whether JPEGs are decoded at a lower resolution where that suffices for their crops.
        first_phase: what is shown at first instead.

    Raises:
        DataError: there are no images.
    """
    dataset = MultiCropDataset(
        images,
        crops,
        seed=seed,
        global_batch=batch_size * world_size,
        skip_bad=skip_bad,
        device_augment=device_augment,
        scaled_decode=scaled_decode,
        first_phase=first_phase,
    )
    order = TrainingOrder(
        dataset,
        samples=len(images),
        batch_size=batch_size,
        world_size=world_size,
        rank=rank,
        iterations=iterations,
        seed=seed,
        shard_sizes=images.shard_sizes,
        block=images.block,
    )
    workers: dict[str, Any] = {}
    if num_workers:  # torch refuses these without workers; torch itself gives each worker one thread
        workers = {"prefetch_factor": prefetch_factor, "persistent_workers": True, "timeout": timeout_seconds}
    return PlainLoader(
        dataset,
        batch_size=batch_size,
        sampler=order,
        collate_fn=Collate(dataset, masks),
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=True,
        **workers,
    )
