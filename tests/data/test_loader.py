import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import worker as torch_worker

from dinocomp.data import CropSettings, MaskSettings, batch_masks, multi_crop, open_images, training_loader
from dinocomp.data.device import DRAWN, colour_crops
from dinocomp.data.images import Reduction, decode_rgb
from dinocomp.data.loader import Batch, FirstPhase, MultiCropDataset
from dinocomp.data.order import uniform_permutation
from dinocomp.data.reader import Images, Sample
from dinocomp.errors import DataError

from .conftest import image_bytes, process

CROPS = CropSettings(global_crops_size=16, local_crops_size=8, local_crops_number=2)
MASKS = MaskSettings((8, 8))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return open_images("digits", cache_dir=str(tmp_path_factory.mktemp("cache")))


def loader(images: Images, **changes):
    settings = {"crops": CROPS, "masks": MASKS, "batch_size": 4, "iterations": 5, "seed": 3} | changes
    return training_loader(images, **settings)


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def joined(parts: list[Batch]) -> Batch:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def test_batch_fields(images: Images) -> None:
    batch = next(iter(loader(images)))
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in batch.items()}
    assert shapes == {
        "global_crops": ((4, 2, 3, 16, 16), torch.uint8),
        "local_crops": ((4, 2, 3, 8, 8), torch.uint8),
        "masks": ((4, 2, 64), torch.bool),
        "index": ((4,), torch.int64),
        "replaced": ((4,), torch.int64),
    }


def test_batch_is_crops_and_masks_of_its_places(images: Images) -> None:
    step, batch = 2, list(loader(images))[2]
    samples = uniform_permutation(len(images), 3, 0)[8:12]
    assert batch["index"].tolist() == samples.tolist()
    assert np.array_equal(batch["masks"].numpy(), batch_masks(MASKS, 3, step, 4, np.arange(4)))
    rng = np.random.default_rng((3, 104, 0, int(samples[1])))
    large, small = multi_crop(decode_rgb(images[int(samples[1])].image), CROPS, rng)
    assert torch.equal(batch["global_crops"][1], large) and torch.equal(batch["local_crops"][1], small)


def test_the_device_makes_of_a_batch_what_the_workers_do(images: Images) -> None:
    """The same crops and flips, with what was drawn of their colours beside them."""
    batch, ours = next(iter(loader(images))), next(iter(loader(images, device_augment=True)))
    assert ours.keys() - batch.keys() == {"global_colours", "local_colours"}
    for name in ("masks", "index", "replaced"):
        assert torch.equal(ours[name], batch[name])
    for kind in ("global", "local"):
        crops, drawn = ours[f"{kind}_crops"], ours[f"{kind}_colours"]  # [4, 2, 3, side, side], [4, 2, P]
        assert drawn.dtype == torch.float32 and drawn.shape == (4, 2, DRAWN)
        assert not torch.equal(crops, batch[f"{kind}_crops"])
        coloured = colour_crops(crops.flatten(0, 1), drawn.flatten(0, 1), CROPS.blur_kernel_size, 128)
        difference = (coloured.view_as(crops).int() - batch[f"{kind}_crops"].int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.002


@pytest.mark.parametrize("workers", [0, 2])
def test_smaller_crops_in_the_first_iterations(images: Images, workers: int) -> None:
    """Then batches are those of a run without them, whole and resumed within each phase."""
    small = replace(CROPS, global_crops_size=8, local_crops_size=6)
    phase = FirstPhase(3, small, MaskSettings((4, 4)))

    def batches(position: int = 0, iteration: int = 0, **changes) -> list[Batch]:
        some = loader(images, num_workers=workers, timeout_seconds=60, **changes)
        some.dataset.load_state_dict({"position": position, "iteration": iteration})
        return list(some)

    ours = batches(first_phase=phase)
    expected = batches(crops=small, masks=phase.masks)[:3] + batches()[3:]
    assert [batch["global_crops"].shape[-1] for batch in ours] == [8, 8, 8, 16, 16]
    assert [batch["masks"].shape[-1] for batch in ours] == [16, 16, 16, 64, 64]
    for iteration in (0, 2, 4):
        rest = batches(4 * iteration, iteration, first_phase=phase)
        assert all(same(a, b) for a, b in zip(rest, expected[iteration:], strict=True))


@pytest.mark.parametrize("device_augment", [False, True])
def test_workers_do_not_matter(images: Images, device_augment: bool) -> None:
    alone = list(loader(images, device_augment=device_augment))
    assert len(alone) == 5
    for workers in (1, 2):
        again = list(loader(images, num_workers=workers, timeout_seconds=60, device_augment=device_augment))
        assert all(same(a, b) for a, b in zip(alone, again, strict=True))


def test_world_size_does_not_matter(images: Images) -> None:
    single = list(loader(images, batch_size=8))
    for world in (2, 4):
        ranks = [loader(images, batch_size=8 // world, world_size=world, rank=r) for r in range(world)]
        for whole, parts in zip(single, zip(*ranks, strict=True), strict=True):
            assert same(whole, joined(list(parts)))


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_goes_on_at_the_next_sample(images: Images, workers: int) -> None:
    whole = list(loader(images, iterations=6))
    first = loader(images, iterations=6)
    batches: Iterator[Batch] = iter(first)
    for _ in range(2):
        next(batches)
    state = pickle.loads(pickle.dumps(first.dataset.state_dict(8, True)))
    assert state == {"position": 8, "iteration": 2}
    second = loader(images, iterations=6, num_workers=workers)
    second.dataset.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(whole[2:], list(second), strict=True))
    # A second interruption: Composer still counts from the beginning of the run.
    assert second.dataset.state_dict(16, True) == {"position": 16, "iteration": 4}
    assert second.dataset.state_dict(8, False) == {"position": 16, "iteration": 4}


def test_resume_with_another_world_size(images: Images) -> None:
    whole = list(loader(images, batch_size=8))
    parts = []
    for rank in range(2):
        part = loader(images, batch_size=4, world_size=2, rank=rank)
        part.dataset.load_state_dict({"position": 16, "iteration": 2})
        parts.append(part)
    for a, b in zip(whole[2:], zip(*parts, strict=True), strict=True):
        assert same(a, joined(list(b)))


def test_resume_with_another_batch_keeps_images_and_iterations(images: Images) -> None:
    part = loader(images, batch_size=2, iterations=6)
    part.dataset.load_state_dict({"position": 13, "iteration": 4})
    batches = list(part)
    assert len(batches) == 2
    order_of_all = uniform_permutation(len(images), 3, 0)
    assert torch.cat([b["index"] for b in batches]).tolist() == order_of_all[13:17].tolist()
    assert np.array_equal(batches[1]["masks"].numpy(), batch_masks(MASKS, 3, 5, 2, np.arange(2)))
    assert part.dataset.state_dict(15, True) == {"position": 15, "iteration": 5}


def test_passes_draw_new_crops(images: Images) -> None:
    few = FewImages([images[0]])
    first, second = loader(few, batch_size=1, iterations=2)
    assert first["index"].item() == second["index"].item() == 0
    assert not torch.equal(first["global_crops"], second["global_crops"])


def test_no_masks_and_no_local_crops(images: Images) -> None:
    crops = CropSettings(global_crops_size=16, local_crops_number=0)
    batch = next(iter(loader(images, crops=crops, masks=MaskSettings((8, 8), sample_probability=0.0))))
    assert batch["local_crops"].shape == (4, 0, 3, 96, 96) and not batch["masks"].any()
    assert batch["masks"].shape == (4, 2, 64)


def test_large_jpegs_at_a_lower_resolution() -> None:
    """Their crops are those of the whole image, nearly; smaller images and other formats are the same to the bit."""
    samples = [
        Sample(image_bytes(0, "JPEG", (600, 500)), -1, "large"),
        Sample(image_bytes(1, "JPEG", (40, 30)), -1, "small"),
        Sample(image_bytes(2, "PNG", (600, 500)), -1, "png"),
    ]
    settings = {"crops": CROPS, "seed": 0, "global_batch": 3}
    whole, scaled = (MultiCropDataset(FewImages(samples), **settings, scaled_decode=on) for on in (False, True))
    for sample in range(3):
        ours, theirs = scaled[0, 0, sample], whole[0, 0, sample]
        for kind in ("global_crops", "local_crops"):
            difference = (ours[kind].int() - theirs[kind].int()).abs().float()
            assert difference.mean() < 2, "edges of boxes went to the nearest pixels"
            assert bool(difference.any()) == (sample == 0)


class FewImages:
    """Stored images without shards."""

    path, block, shard_sizes = Path("elsewhere"), None, np.array([1])

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def decode(self, index: int, reduction: Reduction | None = None) -> tuple[Sample, torch.Tensor]:
        return self.samples[index], decode_rgb(self.samples[index].image, reduction)


class Stubborn(FewImages):
    """The worker that decodes sample 0 sleeps, or is killed."""

    def __init__(self, samples: list[Sample], act: Callable[[], None]) -> None:
        super().__init__(samples)
        self.act = act

    def decode(self, index: int) -> tuple[Sample, torch.Tensor]:
        self.act()
        return super().decode(index)


def test_a_worker_that_hangs_or_dies_is_a_message(images: Images) -> None:
    for act, words in (
        (lambda: time.sleep(60), r"no batch for data\.timeout_seconds=1.*the run resumes"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"a data worker died.*train\.num_workers"),
    ):
        with pytest.raises(DataError, match=words):
            list(loader(Stubborn([images[0]], act), num_workers=1, timeout_seconds=1))


METHODS = pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])


@pytest.fixture
def fork_server_of_ours() -> Iterator[None]:
    """A fork server that ran before would give workers its own signal mask, and ours is deaf to signals."""
    multiprocessing.forkserver._forkserver._stop()
    yield
    multiprocessing.forkserver._forkserver._stop()


@METHODS
@pytest.mark.usefixtures("fork_server_of_ours")
def test_workers_leave_with_their_parent_only(images: Images, method: str) -> None:
    """Signals of others are no news to them; the training process can still end them."""
    slow = loader(images, num_workers=2, iterations=20)
    slow.multiprocessing_context = method
    batches = iter(slow)
    next(batches)
    workers = multiprocessing.active_children()[-2:]
    numbers = ("TERM", "INT", "USR1")
    for worker in workers:
        for number in numbers:
            subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    assert len([*batches]) == 19
    for worker in workers:
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


class HeldUp(FewImages):
    """Images that hold up the start of the workers until there is a file `go`."""

    def __init__(self, marks: Path, samples: list[Sample]) -> None:
        super().__init__(samples)
        self.marks = marks

    def __reduce__(self) -> tuple:
        return held_up, (self.marks, self.samples)


def held_up(marks: Path, samples: list[Sample]) -> HeldUp:
    """What a spawned worker calls to unpickle them; a forked one is made to call it before torch's loop."""
    (marks / f"started-{os.getpid()}").touch()
    while not (marks / "go").exists():
        time.sleep(0.01)
    return HeldUp(marks, samples)


@pytest.fixture
def early(images: Images, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataLoader:
    """A loader whose two workers start slowly."""
    few = HeldUp(tmp_path, [images[0]])
    if method == "fork":
        loop = torch_worker._worker_loop
        monkeypatch.setattr(torch_worker, "_worker_loop", lambda *arguments: (held_up(tmp_path, []), loop(*arguments)))
    early = loader(few, num_workers=2, iterations=4, timeout_seconds=60)
    early.multiprocessing_context = method
    return early


def started_workers(marks: Path) -> list[BaseProcess]:
    """The two workers of `early`, which have begun and are far from their handlers."""
    begin = time.monotonic()
    while len(names := list(marks.glob("started-*"))) < 2:
        assert time.monotonic() - begin < 60
        time.sleep(0.01)
    pids = {int(path.name.rpartition("-")[2]) for path in names}
    found = [child for child in multiprocessing.active_children() if child.pid in pids]
    assert len(found) == 2
    return found


@METHODS
@pytest.mark.usefixtures("fork_server_of_ours")
def test_signals_while_workers_start(early: DataLoader, method: str, tmp_path: Path) -> None:
    """They, and the fork server, get a job's signals before any handler is there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    batches = iter(early)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    workers = started_workers(tmp_path)
    pids = [worker.pid for worker in workers]
    if method == "forkserver":
        pids.append(multiprocessing.forkserver._forkserver._forkserver_pid)
    for number in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{number}", *map(str, pids)], check=True)
    (tmp_path / "go").touch()
    assert len([*batches]) == 4 and all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_that_ends_while_workers_start(early: DataLoader, method: str, tmp_path: Path) -> None:
    """A job's SIGTERM hides that of the parent, which does not wait for ever."""

    def work() -> None:
        batches = iter(early)
        for worker in started_workers(tmp_path):
            subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        raise SystemExit(7 if batches else 0)

    with process(work) as parent:
        parent.join(30)
        assert parent.exitcode == 7


@pytest.mark.parametrize("method", ["spawn"])
def test_the_mask_is_restored_after_an_error(early: DataLoader, method: str) -> None:
    early.dataset.images.samples = lambda: None  # cannot be pickled
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with pytest.raises((AttributeError, pickle.PicklingError)):
            iter(early)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGINT}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
