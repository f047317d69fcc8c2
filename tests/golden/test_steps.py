"""Whole training steps against the reference's, through the code that trains: config, model, callbacks, Trainer."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from composer import Callback, Logger, State
from composer.utils import dist, get_device
from torch import Tensor
from torch.utils.data import DataLoader

from dinocomp.build import build_model, build_training, check_start
from dinocomp.config import load_config
from dinocomp.data import Batch
from dinocomp.interop.names import published_name
from dinocomp.method import DINOv2
from dinocomp.method.losses import koleo

from .conftest import Recording, read


def overrides(recording: Recording, folder: Path, device: str) -> list[str]:
    """The recording's settings as `key=value` words."""

    def flatten(tree: dict, prefix: str = "") -> list[str]:
        words = []
        for key, value in tree.items():
            nested = isinstance(value, dict)
            words += flatten(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}={_text(value)}"]
        return words

    config = {section: dict(keys) for section, keys in recording.meta["config"].items()}
    config["student"] = {**config.get("student", {}), "arch": "custom", **recording.meta["backbone"]}
    config["crops"] = {**config.get("crops", {}), "mean": [0.5] * 3, "std": [0.5] * 3}  # u8 / 127.5 - 1
    config["train"] = {**config.get("train", {}), "output_dir": str(folder), "device": device, "num_workers": 0}
    config["train"]["dataset_path"] = "digits"  # never read: batches are the recording's
    config["loggers"] = {"period_iterations": 1}
    config["performance"] = {"precision": "fp32"}
    return flatten(config)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool | None) else str(value).replace("'", "")


def batch(recording: Recording, step: int) -> Batch:
    """A recorded crop-major batch as ours."""
    inputs = recording.under(f"{step:02d}.in.")
    size = len(inputs["global_u8"]) // 2

    def by_image(crops: Tensor) -> Tensor:
        return crops.unflatten(0, (-1, size)).transpose(0, 1).contiguous()

    no_crops = torch.zeros(0, *inputs["global_u8"].shape[1:], dtype=torch.uint8)  # of a recording without local ones
    return Batch(
        global_crops=by_image(inputs["global_u8"]),
        local_crops=by_image(inputs.get("local_u8", no_crops)),
        masks=by_image(inputs["masks"]),
        index=torch.arange(size),
    )


class Recorder(Callback):
    """The terms and the gradient norms of every step."""

    def __init__(self, model: DINOv2, clip: Callback) -> None:
        self.model, self.clip = model, clip
        self.steps: list[tuple[dict[str, float], dict[str, float]]] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        terms = {name: float(term) for name, term in self.model.terms.items()}
        norms = {name: float(norm) for name, norm in self.clip.norms.items()}
        self.steps.append((terms, norms))


def distance(model: DINOv2, recording: Recording) -> float:
    """|ours - final| / |final - init|, over all weights of student and teacher together."""
    off = moved = 0.0
    for role in ("student", "teacher"):
        for network, net in model.networks(role).items():
            ours = {name: weight.double() for name, weight in net.state_dict().items()}
            prefix = f"final.{role}.{network}."
            final = {published_name(name): w.double() for name, w in recording.under(prefix).items()}
            init = {published_name(name): w.double() for name, w in recording.under(f"init.{network}.").items()}
            assert ours.keys() == final.keys()
            off += sum(float((ours[name] - final[name]).square().sum()) for name in final)
            moved += sum(float((final[name] - init[name]).square().sum()) for name in final)
    return (off / moved) ** 0.5


def take_of_ties(monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    """KoLeo's nearest rows that only rounding tells apart (fp32 has steps of 6e-8 below 1): the first or the last."""

    def neighbours(x: Tensor, rows: Tensor, first: int) -> Tensor:
        similarity = F.normalize(x, dim=-1, eps=1e-8) @ F.normalize(rows, dim=-1, eps=1e-8).T  # [n, N]
        similarity.diagonal(first).fill_(-1)
        tied = similarity > similarity.amax(dim=1, keepdim=True) - 2e-7
        place = torch.arange(1, len(rows) + 1, device=x.device)
        return (tied * (place if last else place.flip(0))).argmax(dim=1)

    monkeypatch.setattr(koleo, "_neighbours", torch.no_grad()(neighbours))


def mismatch(recording: Recording, folder: Path, device: str) -> str:
    """What differs from the recording first; nothing where all agrees."""
    config = load_config(None, overrides(recording, folder, device)).config
    model = build_model(config)
    for role in ("student", "teacher"):
        for network, net in model.networks(role).items():
            init = {published_name(name): w for name, w in recording.under(f"init.{network}.").items()}
            net.load_state_dict(init)

    steps = recording.meta["steps"]
    loader = DataLoader([batch(recording, step) for step in range(steps)], batch_size=None)
    run = build_training(config, check_start(config), model, loader)
    recorder = Recorder(model, run.callbacks.clip)
    run.trainer.state.callbacks.append(recorder)
    run.trainer.fit(duration=f"{steps}ba")
    run.trainer.close()

    # The reference logs DINO and iBOT without their weights, and iBOT and KoLeo halved.
    logged = {
        "dino_global_crops_loss": ("dino_global", config.dino.loss_weight),
        "dino_local_crops_loss": ("dino_local", config.dino.loss_weight),
        "koleo_loss": ("koleo", 2),
        "ibot_loss": ("ibot", 2 * config.ibot.loss_weight),
    }
    assert len(recorder.steps) == steps
    for step, (terms, norms) in enumerate(recorder.steps):
        expected = recording.under(f"{step:02d}.out.")
        for name, value in expected.items():
            if name.startswith("grad_norm."):
                ours = norms[name.removeprefix("grad_norm.")]
            else:
                term, factor = logged[name]
                ours = terms[term] / factor
            if ours != pytest.approx(float(value), rel=1e-5):
                return f"step {step}: {name} is {ours}, recorded {float(value)}"
    off = distance(model, recording)
    return "" if off < 1e-3 else f"final weights are off by {off:.2g} of their way"


def test_steps(steps_file: Path, tmp_path: Path, golden_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All terms, gradient norms and weights. One recording has two neighbours that are equally near but for rounding,
    which differs from one processor to another: then the run with one of them has to agree."""
    recording = read(steps_file)
    dist.initialize_dist(get_device(golden_device))
    found = []
    for last in (False, True):
        take_of_ties(monkeypatch, last)
        found.append(mismatch(recording, tmp_path / str(last), golden_device))
        if not found[-1]:
            return
    pytest.fail("; ".join(found))


def test_a_wrong_momentum_would_be_seen(golden_dir: Path, tmp_path: Path) -> None:
    """The bound on the final weights is tight enough: a small error of the teacher's momentum breaks it."""
    files = sorted(golden_dir.glob("steps_*.safetensors"))
    if not files:
        pytest.skip(f"no steps_* in {golden_dir}")
    recording = read(files[0])
    model = build_model(load_config(None, overrides(recording, tmp_path, "cpu")).config)
    for role in ("student", "teacher"):
        for network, net in model.networks(role).items():
            final = recording.under(f"final.{role}.{network}.")
            net.load_state_dict({published_name(name): w for name, w in final.items()})
    assert distance(model, recording) == pytest.approx(0, abs=1e-12)
    teacher = model.networks("teacher")["backbone"]
    init = recording.under("init.backbone.")
    with torch.no_grad():
        for name, weight in teacher.named_parameters():
            weight.lerp_(init[name], 0.05)
    assert distance(model, recording) > 1e-3
