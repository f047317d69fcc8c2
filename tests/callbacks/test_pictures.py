"""Pictures at evaluations: of a tiny teacher, on digits."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composer.utils import reproducibility
from PIL import Image

from dinocomp.build.model import build_model
from dinocomp.build.pictures import build_pictures
from dinocomp.callbacks import OnlineEvaluation
from dinocomp.callbacks.pictures import FirstBatchPicture, Pictures
from dinocomp.config import load_config
from dinocomp.data import BadImage, Images, Sample, open_images
from dinocomp.method import DINOv2

from .. import processes
from ..helpers import TINY, metrics, random_states, words, yaml_of_nothing
from ..sharding import shard_on_cpu

pytestmark = pytest.mark.usefixtures("one_cache")
NAMES = {"pca", "attention", "neighbours", "embedding", "prototypes"}


class Seen:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.images: dict[str, tuple] = {}

    def log_images(self, images: np.ndarray, *, name: str, step: int, **settings: object) -> None:
        self.images[name] = images.shape, images.dtype, step, settings


def settings(**changes):
    keys = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(None, [f"{name}={value}" for name, value in keys.items()]).config


def tiny(**changes) -> DINOv2:
    torch.manual_seed(0)
    return build_model(settings(**changes))


@pytest.fixture
def digits() -> Images:
    return open_images("digits", split="val")


def pictures(images: Images, folder: Path, **changes) -> Pictures:
    arguments = {"folder": folder, "resize": 18, "crop": 16, "temperature": 0.07, "number": 40, "closely": 4}
    return Pictures(images, **arguments | changes)


def written(folder: Path, iteration: int = 7) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (folder / "pictures" / f"iteration-{iteration:08d}").iterdir()}


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_drawn_written_and_logged(tmp_path: Path, digits: Images, centering: str) -> None:
    """All of them, without moving any random state; again they are the same."""
    model, seen = tiny(train__centering=centering), Seen()
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss/total": 3.0}\n')
    states = random_states()
    pictures(digits, tmp_path)(model, 7, seen)
    assert random_states() == states
    first = written(tmp_path)
    assert first.keys() == NAMES and not list(tmp_path.rglob("*.partial"))
    for name, data in first.items():
        assert len(data) < 600_000
        with Image.open(tmp_path / "pictures/iteration-00000007" / f"{name}.png") as picture:
            shape = (picture.height, 780, 3)
            assert seen.images[f"pictures/{name}"] == (shape, np.uint8, 7, {"channels_last": True, "use_table": False})
    with Image.open(tmp_path / "pictures" / "curves.png") as curves:
        assert curves.width == 780
    pictures(digits, tmp_path)(model, 8, seen)
    assert written(tmp_path, 8) == first
    pictures(digits, tmp_path, seed=1)(model, 9, seen)
    assert written(tmp_path, 9)["pca"] != first["pca"], "another seed, other images"


class Torn:
    """Images of which some cannot be decoded."""

    def __init__(self, images: Images, bad: set[int]) -> None:
        self.images, self.bad = images, bad
        self.classes, self.path = images.classes, images.path

    def __len__(self) -> int:
        return len(self.images)

    def decode(self, i: int) -> tuple[Sample, torch.Tensor]:
        if i in self.bad:
            raise BadImage("torn")
        return self.images.decode(i)


def test_bad_images_are_left_out(tmp_path: Path, digits: Images, caplog: pytest.LogCaptureFixture) -> None:
    chosen = pictures(digits, tmp_path).chosen
    some = pictures(Torn(digits, {chosen[0], chosen[-1]}), tmp_path)
    looks = some._look(tiny())
    assert len(looks.views) == len(looks.patches) == len(looks.attention) == 3
    assert len(looks.vectors) == len(looks.labels) == looks.usage.images == 38
    whole = pictures(digits, tmp_path)._look(tiny())
    torch.testing.assert_close(looks.vectors, whole.vectors[1:-1], atol=1e-5, rtol=1e-4)
    some(tiny(), 7, Seen())
    assert written(tmp_path).keys() == NAMES
    with caplog.at_level(logging.WARNING, "dinocomp"):
        pictures(Torn(digits, set(range(len(digits)))), tmp_path)(tiny(), 8, Seen())
    assert "none of the first 4 images chosen can be decoded" in caplog.text
    assert not (tmp_path / "pictures/iteration-00000008").exists()


def test_nothing_that_goes_wrong_with_pictures_ends_a_run(
    tmp_path: Path, digits: Images, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    seen = Seen()
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "dinocomp"):
        patched.setattr(Path, "write_bytes", full)
        pictures(digits, tmp_path)(tiny(), 7, seen)
        FirstBatchPicture(tmp_path / "first.png").batch_start(SimpleNamespace(batch=first_batch()), seen)
    assert caplog.text.count("No space left on device") == len(NAMES) + 2 and not seen.images
    diverged = tiny()
    with torch.no_grad():
        diverged.networks("teacher")["backbone"].norm.weight.fill_(torch.nan)
    with caplog.at_level(logging.WARNING, "dinocomp"):
        pictures(digits, tmp_path)(diverged, 8, seen)
    assert "features are not finite" in caplog.text and not seen.images


def first_batch() -> dict[str, torch.Tensor]:
    return {
        "index": torch.arange(9),
        "global_crops": torch.zeros(9, 2, 3, 16, 16, dtype=torch.uint8),
        "local_crops": torch.zeros(9, 2, 3, 8, 8, dtype=torch.uint8),
        "masks": torch.zeros(9, 2, 16, dtype=torch.bool),
    }


def test_the_first_batch_is_drawn_once(tmp_path: Path) -> None:
    callback = FirstBatchPicture(tmp_path / "pictures" / "first_batch.png")
    callback.batch_start(SimpleNamespace(batch=first_batch()), None)
    before = callback.path.stat().st_mtime_ns
    callback.batch_start(SimpleNamespace(batch=None), None)
    FirstBatchPicture(callback.path).batch_start(SimpleNamespace(batch=first_batch()), None)
    assert callback.path.stat().st_mtime_ns == before


def test_without_a_head_there_are_no_prototypes(tmp_path: Path, digits: Images) -> None:
    model = tiny(dino__loss_weight=0, ibot__separate_head="true")
    pictures(digits, tmp_path, number=5, closely=9)(model, 7, Seen())
    assert written(tmp_path).keys() == NAMES - {"prototypes"}


def test_from_a_configuration(tmp_path: Path, digits: Images) -> None:
    start = SimpleNamespace(output=tmp_path, precision="bf16")
    built = build_pictures(settings(evaluation__pictures="true"), start, digits)
    assert (built.resize, built.crop, built.autocast) == (18, 16, torch.bfloat16) and len(built.chosen) == 359
    assert build_pictures(settings(evaluation__pictures="false"), start, digits) is None
    built.chosen = built.chosen[:20]
    built(tiny(), 7, Seen())
    assert written(tmp_path).keys() == NAMES


def test_tensorboard_gets_them(tmp_path: Path, digits: Images) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from composer.loggers import Logger, TensorboardLogger

    destination = TensorboardLogger(log_dir=str(tmp_path / "tb"))
    state = SimpleNamespace(run_name="run", timestamp=SimpleNamespace(batch=SimpleNamespace(value=3)))
    logger = Logger(state, destinations=[destination])
    destination.init(state, logger)
    pictures(digits, tmp_path)(tiny(), 7, logger)
    destination.writer.flush()
    found = accumulator.EventAccumulator(str(tmp_path / "tb" / "run"))
    found.Reload()
    assert set(found.Tags()["images"]) == {f"pictures/{name}" for name in NAMES}
    assert found.Images("pictures/pca")[0].step == 7


def test_other_ranks_take_part_in_every_forward_pass_but_do_not_look(
    tmp_path: Path, digits: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = {0: [], 1: []}
    for rank, seen in passes.items():
        monkeypatch.setattr("dinocomp.callbacks.pictures.dist.get_global_rank", lambda rank=rank: rank)
        model = tiny()
        for shell in model.shells("teacher").values():
            shell.register_forward_hook(lambda module, given, out, seen=seen: seen.append(given[0].shape))
        images = Torn(digits, set())
        if rank:
            images.decode = None
        pictures(images, tmp_path / str(rank), number=70)(model, 7, Seen())
    assert passes[0] == passes[1] and len(passes[0]) == 2 * 3
    assert written(tmp_path / "0").keys() == NAMES and not (tmp_path / "1").exists()


def draw_after(folder: Path) -> None:
    """In a run's process: pictures wherever it evaluates."""
    evaluate = OnlineEvaluation._evaluate

    def and_draw(self: OnlineEvaluation, iteration: int, logger: object) -> None:
        evaluate(self, iteration, logger)
        Pictures(self.measures.pair.val, folder=folder, resize=18, crop=16, temperature=0.07, number=20)(
            self.model, iteration, logger
        )

    OnlineEvaluation._evaluate = and_draw


def shard_and_draw(folder: Path) -> None:
    shard_on_cpu(draw_after, folder)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_of_sharded_weights(tmp_path: Path, digits: Images, free_port: int, strategy: str) -> None:
    """Drawing while training changes nothing in it, and of shares it draws what it draws of whole weights."""
    runs = [("drawn", shard_and_draw, (tmp_path / "pictures",)), ("plain", shard_on_cpu, ())]
    for name, before, details in runs if strategy == "fsdp2" else runs[:1]:
        arguments = words(
            tmp_path / name,
            parallelism__strategy=strategy,
            train__batch_size_per_gpu=4,
            evaluation__pictures="false",
            evaluation__at_start="true",
            optim__epochs=1,
            optim__warmup_epochs=0,
        )
        ranks = processes.start_ranks([yaml_of_nothing(tmp_path), *arguments], 2, free_port, before, *details)
        assert [processes.finish(rank) for rank in ranks] == [0, 0]
    lines = [metrics(tmp_path / name) for name, *_ in runs if (tmp_path / name).exists()]
    for drawn, plain in zip(lines[0], lines[-1], strict=True):
        assert all(drawn[key] == plain[key] for key in drawn if key.startswith(("loss/", "grad_norm/", "teacher/")))
    assert written(tmp_path / "pictures", 4).keys() == NAMES
    reproducibility.seed_all(0)
    pictures(digits, tmp_path / "whole", number=20, closely=12)(build_model(settings()), 0, Seen())
    assert written(tmp_path / "pictures", 0) == written(tmp_path / "whole", 0)
