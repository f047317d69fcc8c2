"""Images a second that one core prepares, stage by stage: `python -m benchmarks.data [--json FILE]`, about 2 minutes.

Every stage runs alone, in one process with one thread, on photographs of noise in shards of JPEGs. The last stages are
whole loaders with worker processes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.baselines import pillow_pipeline, tensor_pipeline
from benchmarks.photographs import write_shards
from benchmarks.record import write
from benchmarks.timing import median_seconds
from dinocomp.data import CropSettings, Images, MaskSettings, batch_masks, open_images, training_loader
from dinocomp.data.crops import colour, draw_crops, make_crops
from dinocomp.data.device import pack
from dinocomp.data.images import decode_rgb
from dinocomp.data.loader import Collate, MultiCropDataset
from dinocomp.method.pixels import Colours

_PATCH = 16  # pixels, for the masks


@dataclass(frozen=True)
class Setting:
    """What is measured on.

    Attributes:
        batch: images that are stacked, masked, or changed on the device together.
        device: where `Colours` runs.
        rounds: of all stages.
    """

    images: Images
    crops: CropSettings
    batch: int = 32
    device: str = "cpu"
    rounds: int = 9


def stages(setting: Setting) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """(name, images that one call prepares, the call)."""
    images, crops, number = setting.images, setting.crops, len(setting.images)
    data = [images[i].image for i in range(number)]
    pixels = [decode_rgb(one) for one in data]  # uint8 [3, H, W] each
    drawn = [draw_crops(*one.shape[-2:], crops, np.random.default_rng(i)) for i, one in enumerate(pixels)]

    def each(action: Callable[[int], object]) -> tuple[int, Callable[[], object]]:
        return number, lambda: [action(i) for i in range(number)]

    yield "read from the shard", *each(lambda i: images[i])
    yield "decode", *each(lambda i: decode_rgb(data[i]))
    yield "draw", *each(lambda i: draw_crops(*pixels[i].shape[-2:], crops, np.random.default_rng(i)))
    yield "crop, resize, flip", *each(lambda i: make_crops(pixels[i], drawn[i], crops, colours=False))
    plain = [make_crops(pixels[i], drawn[i], crops, colours=False) for i in range(number)]
    yield "colours, in the worker", *each(lambda i: _colour_all(plain[i], drawn[i], crops))

    side, slots = crops.global_crops_size // _PATCH, np.arange(setting.batch)
    masks = MaskSettings((side, side))
    yield "masks", setting.batch, lambda: batch_masks(masks, 0, 0, setting.batch, slots)
    for device_augment in (False, True):
        dataset = _dataset(setting, device_augment=device_augment)
        samples = [dataset[place, 0, place % number] for place in range(setting.batch)]
        words = ", colours left to the device" if device_augment else ""
        yield f"stack and mask{words}", setting.batch, partial(Collate(dataset, masks), samples)
    yield f"colours, on the device ({setting.device})", setting.batch, _on_device(setting, drawn, plain)

    for words, changes in (
        ("whole sample", {}),
        ("whole sample, colours left to the device", {"device_augment": True}),
        ("the same, scaled decoding", {"device_augment": True, "scaled_decode": True}),
    ):
        yield words, *each(partial(_sample, _dataset(setting, **changes)))
    for words, make in (("reference's (Pillow)", pillow_pipeline), ("torchvision's (uint8)", tensor_pipeline)):
        pipeline = make(crops)
        yield f"{words} whole sample", *each(lambda i, pipeline=pipeline: pipeline(data[i]))


def _dataset(setting: Setting, **changes: bool) -> MultiCropDataset:
    return MultiCropDataset(setting.images, setting.crops, seed=0, global_batch=setting.batch, **changes)


def _sample(dataset: MultiCropDataset, place: int) -> Any:
    return dataset[place, 0, place]


def _colour_all(crops: tuple[torch.Tensor, torch.Tensor], drawn: list, settings: CropSettings) -> None:
    for crop, parameters in zip((*crops[0], *crops[1]), drawn, strict=True):
        colour(crop, parameters, settings)


def _on_device(setting: Setting, drawn: list, plain: list) -> Callable[[], object]:
    """A batch's crops, on the device already, through `Colours`."""
    chosen = [i % len(drawn) for i in range(setting.batch)]
    packed = torch.tensor([[pack(parameters) for parameters in drawn[i]] for i in chosen]).to(setting.device)
    large, small = (torch.stack([plain[i][kind] for i in chosen]).to(setting.device) for kind in (0, 1))
    colours = Colours(setting.crops.blur_kernel_size, setting.crops.solarize_threshold)

    def change() -> None:
        colours(large.flatten(0, 1), packed[:, :2].flatten(0, 1))
        colours(small.flatten(0, 1), packed[:, 2:].flatten(0, 1))

    return change


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    """One row a stage: its name, milliseconds an image and images a second."""
    found = list(stages(setting))
    actions = {name: action for name, _, action in found}
    medians = median_seconds(actions, device=setting.device, rounds=setting.rounds)
    for name, count, _ in found:
        yield _row(name, medians[name] / count)


def _row(stage: str, seconds: float) -> dict[str, Any]:
    return {"stage": stage, "ms": 1e3 * seconds, "images_per_second": 1 / seconds}


def measure_loader(setting: Setting, workers: int, batches: int, *, device_augment: bool) -> dict[str, Any]:
    """Images a second of the whole loader, once its workers have filled their queues and the rest was emptied."""
    side, warm_up = setting.crops.global_crops_size // _PATCH, 2 * (workers + 1)
    loader = training_loader(
        setting.images,
        crops=setting.crops,
        masks=MaskSettings((side, side)),
        batch_size=setting.batch,
        iterations=warm_up + batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        device_augment=device_augment,
    )
    arrivals = [time.perf_counter() for _ in loader][warm_up - 1 :]
    seconds = (arrivals[-1] - arrivals[0]) / (batches * setting.batch)
    words = ", colours left to the device" if device_augment else ""
    return _row(f"loader, {workers} worker{'s' * (workers > 1)}{words}", seconds)


def main(words: list[str] | None = None) -> None:
    """Prints a table, and writes it with the machine's description as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=500, help="of the photographs, pixels")
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--crops", type=int, nargs=2, default=(224, 96), help="sides of global and local ones, pixels")
    parser.add_argument("--images", type=int, default=64, help="photographs")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="of the loaders at the end")
    parser.add_argument("--batches", type=int, default=20, help="that count, of each loader")
    parser.add_argument("--rounds", type=int, default=9, help="of all stages, whose medians count")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write")
    chosen = parser.parse_args(words)
    torch.set_num_threads(1)

    print("| stage | ms an image | images/s |\n|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), chosen.images, chosen.width, chosen.height)
        crops = CropSettings(global_crops_size=chosen.crops[0], local_crops_size=chosen.crops[1])
        setting = Setting(open_images(str(shards)), crops, chosen.batch, chosen.device, chosen.rounds)
        loaders = (
            measure_loader(setting, workers, chosen.batches, device_augment=device_augment)
            for workers in chosen.workers
            for device_augment in (False, True)
        )
        for row in chain(measure(setting), loaders):
            print(f"| {row['stage']} | {row['ms']:.2f} | {row['images_per_second']:,.0f} |", flush=True)
            rows.append({**row, "width": chosen.width, "height": chosen.height})
    if chosen.json:
        write(chosen.json, rows)


if __name__ == "__main__":
    main()
