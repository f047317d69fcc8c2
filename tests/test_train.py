"""Whole runs, as one types them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import dinocomp
from dinocomp.train import main

from . import processes
from .helpers import CURRICULUM, launch, load_checkpoint, metrics, words, yaml_of_nothing

pytestmark = pytest.mark.usefixtures("one_cache")


def test_a_run_from_the_command_line(tmp_path: Path) -> None:
    """What lies in the output folder, that the same command again finds it finished, and that more epochs go on."""
    output = tmp_path / "run"
    changes = {"evaluation__at_start": "true", "evaluation__eval_period_iterations": 6, "loggers__report": "true"}
    done = launch("quickstart", *words(output, **changes))
    assert done.returncode == 0, done.stderr
    assert "[12/12] eta 0:00:00" in done.stdout and "images/s" in done.stdout and "data wait" in done.stdout
    assert f"teacher: {output / 'teacher.safetensors'}" in done.stdout
    assert "before training" in done.stdout

    lines = metrics(output)
    assert [line["iteration"] for line in lines] == list(range(1, 13))
    names = {"loss/dino_local", "loss/dino_global", "loss/koleo", "loss/ibot", "grad_norm/backbone", "lr", "momentum"}
    assert names | {"weight_decay", "teacher_temp", "images_per_second", "data_wait"} <= lines[0].keys()
    terms = sum(lines[3][f"loss/{term}"] for term in ("dino_global", "dino_local", "koleo", "ibot"))
    assert lines[3]["loss/total"] == pytest.approx(terms)
    assert "iteration-00000012" in {path.name for path in (output / "checkpoints").iterdir()}
    assert (output / "evaluation" / "iteration-00000006" / "teacher.safetensors").exists()
    evaluated = [json.loads(line)["iteration"] for line in (output / "evaluation.jsonl").read_text().splitlines()]
    assert evaluated == [0, 6, 12]
    assert "[7/12]" in (output / "train.log").read_text()
    facts = json.loads((output / "run.json").read_text())
    assert (facts["status"], facts["iteration"], facts["iterations"]) == ("finished", 12, 12)
    assert facts["data"] | {"path": ""} == {"path": "", "images": 1438, "classes": 10, "labelled": True}
    assert facts["evaluation"]["val_images"] == 359 and facts["command"].startswith("composer dinocomp/train.py quick")
    page = (output / "report.html").read_text()
    assert "finished</span>" in page and "best k-NN accuracy" in page and 'data-chart="loss"' in page
    assert Image.open(output / "pictures" / "first_batch.png").width == 780
    assert dinocomp.load(output)(torch.zeros(1, 3, 16, 16)).shape == (1, 24)

    again = launch("quickstart", *words(output, **changes))
    assert again.returncode == 0 and "this run is finished" in again.stdout and "before training" in again.stdout
    more = launch("quickstart", *words(output, **changes, optim__epochs=4))
    assert more.returncode == 0 and "resuming from" in more.stdout
    assert [line["iteration"] for line in metrics(output)] == list(range(1, 17))


def test_auto_is_settled_when_a_run_begins(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By its images, counted; a run that goes on for longer keeps what it began with, and a new one does not."""
    auto = {"dino__head_n_prototypes": "auto", "teacher__warmup_teacher_temp_epochs": "auto"}
    auto["teacher__teacher_temp"] = 0.07
    output = tmp_path / "run"
    assert main(["quickstart", *words(output, **auto)]) == 0
    chosen = "auto: dino.head_n_prototypes=128: a power of two from 128 to 65,536, one for 16 of 1,438 images"
    assert chosen in capsys.readouterr().out
    text = (output / "config.yaml").read_text()
    assert f"# {chosen}" in text
    begun = yaml.safe_load(text)
    assert begun["dino"]["head_n_prototypes"] == 128 and begun["teacher"]["warmup_teacher_temp_epochs"] == 1
    assert load_checkpoint(output, 12)["state"]["model"]["student_dino_head.net.last_layer.weight_v"].shape[0] == 128

    assert main(["quickstart", *words(output, **auto, optim__epochs=7)]) == 0
    assert yaml.safe_load((output / "config.yaml").read_text())["teacher"]["warmup_teacher_temp_epochs"] == 1
    kept = "auto: teacher.warmup_teacher_temp_epochs=1: three tenths of the run's 3 official epochs"
    assert kept in capsys.readouterr().out
    assert main(["quickstart", *words(tmp_path / "new", **auto, optim__epochs=7)]) == 0
    assert yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())["teacher"]["warmup_teacher_temp_epochs"] == 3


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"performance__device_augment": "true", **CURRICULUM}, marks=pytest.mark.slow)],
    ids=["plain", "device-curriculum"],
)
def test_two_processes_are_one(tmp_path: Path, free_port: int, changes: dict) -> None:
    """Two ranks of 4 images train as one of 8: the same crops and masks, and the same terms but for rounding."""
    same = {"train__centering": "sinkhorn_knopp", "student__drop_path_rate": 0, "dino__koleo_loss_weight": 0, **changes}
    same |= {"student__layerscale": "null"}  # its start of 1e-5 leaves features so alike that neighbours are rounding
    same |= {"evaluation__label_free": "always", "evaluation__label_free_images": 21, "evaluation__label_free_views": 2}
    for number in (1, 2):
        # The learning rate follows the global batch, which is the same.
        settings = words(tmp_path / str(number), **same, train__batch_size_per_gpu=8 // number)
        ranks = processes.start_ranks([yaml_of_nothing(tmp_path), *settings], number, free_port)
        assert [processes.finish(rank) for rank in ranks] == [0] * number
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for a, b in zip(one, two, strict=True):
        for name in ("loss/dino_local", "loss/dino_global", "loss/ibot", "lr"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["iteration"], name)
    last = [(tmp_path / n / "evaluation.jsonl").read_text().splitlines()[-1] for n in "12"]
    accuracies = [json.loads(line)["knn_top1"]["5"] for line in last]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01), "rounding may turn an image or two"
    one, two = (json.loads(line)["label_free"] for line in last)
    assert one.pop("neighbour_consistency") == pytest.approx(two.pop("neighbour_consistency"), abs=0.05), "near ties"
    assert one == pytest.approx(two, rel=1e-3)


def test_colours_on_the_device(tmp_path: Path) -> None:
    """The run's losses and its first picture are those of a run whose workers change the colours."""
    for name, recipes in (("workers", "[]"), ("device", "[device_augment]")):
        assert main([yaml_of_nothing(tmp_path), *words(tmp_path / name, optim__epochs=1), f"recipes={recipes}"]) == 0
    workers, device = (metrics(tmp_path / name) for name in ("workers", "device"))
    for a, b in zip(workers, device, strict=True):
        assert a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-3)
    pictures = [np.asarray(Image.open(tmp_path / n / "pictures/first_batch.png"), int) for n in ("workers", "device")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_written_config_reproduces_the_run(tmp_path: Path) -> None:
    assert main([yaml_of_nothing(tmp_path), *words(tmp_path / "a", optim__epochs=1), "recipes=[registers]"]) == 0
    assert main([str(tmp_path / "a" / "config.yaml"), f"train.output_dir={tmp_path / 'b'}"]) == 0
    a, b = (load_checkpoint(tmp_path / n, 4) for n in "ab")
    for name, weight in a["state"]["model"].items():
        assert torch.equal(weight, b["state"]["model"][name]), name
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["student"]["num_register_tokens"] == 4


@pytest.mark.parametrize(
    "off",
    [
        {"dino__loss_weight": 0},
        {"dino__loss_weight": 0, "ibot__separate_head": "true"},
        {"ibot__loss_weight": 0},
        {"crops__local_crops_number": 0},
        {"dino__koleo_loss_weight": 0, "ibot__mask_sample_probability": 0.01},
        {"dino__loss_weight": 0, "ibot__loss_weight": 0},
    ],
    ids=lambda off: "+".join(off),
)
def test_every_switch_works(tmp_path: Path, off: dict) -> None:
    """The reference crashes without DINO or without local crops."""
    assert main([yaml_of_nothing(tmp_path), *words(tmp_path / "run", **off, optim__epochs=1)]) == 0
    last = metrics(tmp_path / "run")[-1]
    assert all(torch.isfinite(torch.tensor(value)) for value in last.values())
    for key, terms in (("dino__loss_weight", ("dino_local", "dino_global")), ("ibot__loss_weight", ("ibot",))):
        for term in terms:
            if key in off:
                assert f"loss/{term}" not in last


def test_mistakes_are_messages(tmp_path: Path) -> None:
    done = launch("quickstart", "train.batchsize=3", f"train.output_dir={tmp_path / 'run'}")
    assert done.returncode != 0
    assert "train.batchsize" in done.stderr and "train.batch_size_per_gpu" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_unlabelled_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A folder of images without classes trains; unless it is told not to, the run says what can be known without."""
    folder = tmp_path / "photos" / "2024"
    folder.mkdir(parents=True)
    for i in range(20):
        Image.new("RGB", (30 + i, 40), (12 * i, 100, 50)).save(folder / f"{i}.jpg")
    path = {"train__dataset_path": tmp_path / "photos", "optim__epochs": 1, "evaluation__label_free": "never"}
    assert main([yaml_of_nothing(tmp_path), *words(tmp_path / "run", **path)]) == 0
    assert "not evaluated" in capsys.readouterr().out
    assert len(metrics(tmp_path / "run")) == 4
