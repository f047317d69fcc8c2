"""`dinocomp evaluate` from end to end, on digits and a tiny network."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinocomp.cli import main
from dinocomp.commands import evaluate_plan
from dinocomp.commands.evaluate import output_folder
from dinocomp.errors import ConfigError
from dinocomp.evaluate import run
from dinocomp.interop import save_teacher
from tests.evaluate.test_linear import backbone
from tests.evaluate.test_segmentation import write
from tests.processes import finish, start_command

pytestmark = pytest.mark.usefixtures("one_cache")

QUICK = [
    "--device=cpu",
    "--workers=0",
    "--batch-size=16",
    "--k=5,10",
    "--shots=2",
    "--tries=2",
    "--c-values=3",
    "--linear-iterations=5",
    "--linear-batch=15",
    "--linear-rates=0.1,1",
    "--linear-blocks=1,2",
    "--segmentation-iterations=5",
    "--segmentation-batch=5",
]


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    net = backbone()
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "init_values": None}
    path = tmp_path / "weights/teacher.safetensors"
    save_teacher(
        path,
        {"backbone": net.state_dict()},
        architecture=sizes,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        view=(18, 16),
        iteration=7,
        config="",
    )
    return str(path)


def evaluate(*words: str) -> int:
    return main(["evaluate", *QUICK, *words])


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def same(one: object, other: object, place: str = "") -> None:
    """All numbers of two results are the same up to rounding, and all else is."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            if key != "seconds":
                same(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for i, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{place}/{i}")
    else:
        assert one == (pytest.approx(other, abs=1e-5) if isinstance(one, float) else other), place


def everything(teacher: str, folder: Path) -> list[str]:
    """Sizes divide neither by two ranks nor by the batches, and of the last batch one of two ranks has no image."""
    masks = [write(folder / name, number) for name, number in (("one", 7), ("two", 3))]
    words = [teacher, "--train=digits", "--val=digits", "--limit-train=131", "--limit-val=65"]
    return [*words, f"--segmentation-train={masks[0]}", f"--segmentation-val={masks[1]}"]


@pytest.mark.slow
def test_two_processes_find_what_one_does(teacher: str, tmp_path: Path, free_port: int) -> None:
    words = [*everything(teacher, tmp_path), "--keep-features"]
    ranks = start_command(["evaluate", *words, *QUICK, f"--output={tmp_path / 'two-ranks'}"], 2, free_port)
    assert evaluate(*words, f"--output={tmp_path / 'one-rank'}") == 0
    assert [finish(rank) for rank in ranks] == [0, 0]
    same(results(tmp_path / "one-rank"), results(tmp_path / "two-ranks"))


def test_all_protocols(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate(*everything(teacher, tmp_path), f"--output={tmp_path / 'one-rank'}") == 0
    shown = capsys.readouterr().out
    one = results(tmp_path / "one-rank")
    assert one["features"]["images"] == 131 + 65 and one["features"]["seconds"] > 0
    assert list(one["protocols"]) == ["knn", "linear", "logreg", "retrieval", "segmentation"]
    assert (one["iteration"], one["train_images"], one["val_images"]) == (7, 131, 65)
    assert one["protocols"]["retrieval"]["queries"] == 65
    assert ["retrieval", "mAP (val searches train)", f"{one['protocols']['retrieval']['map']:.1%}"] in one["table"]
    for name in ("knn", "linear", "logreg"):
        labels, predicted = np.load(tmp_path / f"one-rank/predictions/{name}.npy")
        assert len(labels) == 65
        assert one["protocols"][name]["headline"]["value"] == pytest.approx((labels == predicted).mean())
    confusion = (tmp_path / "one-rank/confusion.csv").read_text().splitlines()
    assert confusion[0] == "class,taken_for,images" and sum(int(row.split(",")[2]) for row in confusion[1:]) == 65
    best = one["confusion"]["protocol"]
    right = sum(int(n) for a, b, n in (row.split(",") for row in confusion[1:]) if a == b)
    assert right / 65 == pytest.approx(one["protocols"][best]["headline"]["value"])
    assert "top-1, top-5 (k=5)" in shown and "mIoU (3 classes)" in shown and "images held out of train" in shown
    assert (tmp_path / "one-rank/linear_head.safetensors").is_file()


def test_what_is_done_is_not_done_again(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = [teacher, "--train=digits", "--val=digits", "--limit-train=80", "--limit-val=30", "--keep-features"]
    folder = Path(teacher).parent / "evaluate-teacher"
    calls, original = [], run.knn
    monkeypatch.setattr(run, "knn", lambda *a, **s: (calls.append(s["ks"]), original(*a, **s))[1])
    assert evaluate(*words, "--protocols=knn,retrieval") == 0
    first = results(folder)
    assert evaluate(*words, "--protocols=knn,retrieval") == 0
    assert results(folder) == first and calls == [(5, 10)]
    assert "done before, with the same settings: knn, retrieval" in capsys.readouterr().out
    monkeypatch.setattr(run, "extract_features", None)  # the features are on the disk
    assert evaluate(*words, "--protocols=knn,retrieval", "--k=7") == 0
    assert calls == [(5, 10), (7,)], "other settings"
    assert results(folder)["protocols"]["retrieval"] == first["protocols"]["retrieval"]
    masks = write(tmp_path / "masks", 3)
    assert main(["evaluate", teacher, *QUICK, f"--segmentation-train={masks}", f"--segmentation-val={masks}"]) == 0
    assert list(results(folder)["protocols"]) == ["knn", "retrieval", "segmentation"], (
        "what is of the same weights stays"
    )
    assert results(folder)["train_images"] == 80
    monkeypatch.undo()
    monkeypatch.setattr(run, "knn", lambda *a, **s: (calls.append(s["ks"]), original(*a, **s))[1])
    Path(teacher).touch()
    assert evaluate(*words, "--protocols=knn") == 0
    assert len(calls) == 3, "perhaps other weights"
    assert list(results(folder)["protocols"]) == ["knn"]


def class_folders(folder: Path, classes: str, number: int = 6) -> str:
    for n, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            rng = np.random.default_rng(100 * n + i)
            Image.fromarray(rng.integers(0, 255, (20, 20, 3)).astype(np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


def test_folders_with_other_classes(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same class has another number where one before it is missing."""
    train, val = class_folders(tmp_path / "train", "abc"), class_folders(tmp_path / "val", "bc")
    words = [f"--cache-dir={tmp_path / 'cache'}", f"--output={tmp_path / 'out'}", "--protocols=knn", "--k=1"]
    for name in "bc":  # the same pictures: nearest is the same one
        for path in (tmp_path / "val" / name).iterdir():
            path.write_bytes((tmp_path / "train" / name / path.name).read_bytes())
    assert evaluate(teacher, f"--train={train}", f"--val={val}", *words) == 0
    assert results(tmp_path / "out")["protocols"]["knn"]["top1"] == {"1": 1.0}
    assert evaluate(teacher, f"--train={val}", f"--val={train}", *words) == 2
    assert "1 of the 3 classes" in (error := capsys.readouterr().err) and ": a." in error


def test_one_labelled_set(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [teacher, f"--train={class_folders(tmp_path / 'images', 'ab')}", f"--output={tmp_path / 'out'}"]
    words.append(f"--cache-dir={tmp_path / 'cache'}")
    assert evaluate(*words) == 0
    content = results(tmp_path / "out")
    assert list(content["protocols"]) == ["retrieval"] and content["protocols"]["retrieval"]["queries"] == 12
    assert evaluate(*words, "--protocols=knn") == 2
    assert "one labelled set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no labelled images to evaluate with: give --train PATH and --val PATH"),
        (["--train=digits", "--k=2000"], "--k 2000 is more than the 1438 images of train"),
        (["--train=digits", "--crop=15"], "--crop 15 is no whole number of patches of 4 pixels; type --crop 12 or 16"),
        (
            ["--train=digits", "--resize=8"],
            "the crop of 16 pixels; type --resize 16 or more",
        ),
        (["--train=nodir"], "nodir does not exist. Give a folder of"),
        (["--train=digits", "--linear-blocks=3"], "--linear-blocks 3: the backbone has 2 blocks"),
        (["--train=digits", "--protocols=segmentation"], "segmentation needs masks"),
        (["--segmentation-train=a:b"], "--segmentation-val is missing"),
        (["--protocols=knn", "--segmentation-train=a:b", "--segmentation-val=a:b"], "there are no labelled images"),
    ],
)
def test_what_is_refused(teacher: str, words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", teacher, *QUICK, *words]) == 2
    assert said in capsys.readouterr().err


def test_images_without_labels(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "plain").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "plain/1.png")
    words = [f"--train={tmp_path / 'plain'}", "--val=digits", f"--cache-dir={tmp_path / 'cache'}"]
    assert evaluate(teacher, *words) == 2
    assert "has no labels" in capsys.readouterr().err


def test_a_misspelt_protocol(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "x", "--protocols=kn"])
    assert "'kn' is none of knn, linear, logreg, retrieval, segmentation. Did you mean knn?" in capsys.readouterr().err


def test_where_results_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("run/config.yaml", "run/train.log", "run/teacher.safetensors", "run/best_teacher.safetensors"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
    for path in (
        "run/evaluation/iteration-7/teacher.safetensors",
        "run/checkpoints/iteration-9/checkpoint.pt",
        "other/dino.pth",
    ):
        Path(path).parent.mkdir(parents=True)
        Path(path).touch()
    found = {
        weights: str(output_folder(Namespace(weights=weights, output=None)))
        for weights in (
            *("run", "run/teacher.safetensors", "run/best_teacher.safetensors", "run/checkpoints/iteration-9"),
            *("run/evaluation/iteration-7/teacher.safetensors", "other/dino.pth", "other", "timm:a/b=c"),
            "run/checkpoints/iteration-9/checkpoint.pt",
        )
    }
    assert [path.replace(str(tmp_path) + "/", "") for path in found.values()] == [
        *("run/evaluate", "run/evaluate", "run/evaluate-best_teacher", "run/evaluate-iteration-9"),
        *("run/evaluate-iteration-7", "other/evaluate-dino", "evaluate-other", "evaluate-timm-a-b-c"),
        "run/evaluate-iteration-9",
    ]
    assert output_folder(Namespace(weights="run", output="x")) == Path("x")


def test_other_weights_at_the_same_place_are_told_apart(tmp_path: Path) -> None:
    """Whichever way the place is named, and whatever its files are called."""
    (tmp_path / "net.bin").write_bytes(b"1")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded/__0_0.distcp").write_bytes(b"1")
    names = [f"timm:vit={tmp_path}/net.bin", f"hf:{tmp_path}/sharded", str(tmp_path / "sharded"), f"{tmp_path}/net.bin"]
    before = [evaluate_plan._identity(name) for name in names]
    assert before == [evaluate_plan._identity(name) for name in names]
    assert len({json.dumps(identity) for identity in before}) == 4
    (tmp_path / "net.bin").write_bytes(b"22")
    (tmp_path / "sharded/__0_0.distcp").write_bytes(b"22")
    assert all(evaluate_plan._identity(name) != old for name, old in zip(names, before, strict=True))
    assert evaluate_plan._identity("timm:vit") == ["timm:vit"], "published"


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        ("linear", "or choose a head with --select-on val"),
        ("logreg", "or leave it out: --protocols knn"),
        ("retrieval", "which has none to find; give more images of each class"),
    ],
)
def test_one_image_of_each_class(
    teacher: str, tmp_path: Path, protocol: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    words = [f"--cache-dir={tmp_path / 'cache'}", "--k=1", f"--output={tmp_path / 'out'}"]
    words.append(f"--train={class_folders(tmp_path / 'train', 'abc', 1)}")
    if protocol != "retrieval":
        words.append(f"--val={class_folders(tmp_path / 'val', 'abc', 2)}")
    assert evaluate(teacher, *words, f"--protocols={protocol}") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out/results.json").exists()
    if protocol == "linear":
        assert evaluate(teacher, *words, "--protocols=linear", "--select-on=val") == 0


def test_labelled_images_are_not_opened_for_masks(teacher: str, tmp_path: Path) -> None:
    masks = write(tmp_path / "masks", 3)
    words = ["--protocols=segmentation", f"--segmentation-train={masks}", f"--segmentation-val={masks}"]
    assert evaluate(teacher, "--train=nowhere", *words) == 0


def test_k_that_is_too_large(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One that was asked for is refused; of those that were not it is said."""
    words = [teacher, "--train=digits", "--val=digits", "--limit-train=15", "--limit-val=9", "--protocols=knn"]
    words += ["--device=cpu", "--workers=0", f"--output={tmp_path / 'out'}"]
    assert main(["evaluate", *words]) == 0
    assert "note: 15 images of train can vote, so k is 10; left out: 20, 100, 200" in capsys.readouterr().out
    found = results(tmp_path / "out")["protocols"]["knn"]
    assert list(found["top1"]) == ["10"] and found["settings"]["ks"] == [10]
    assert main(["evaluate", *words, "--k=10,20"]) == 2
    assert "--k 20 is more than the 15 images" in capsys.readouterr().err


def test_features_that_another_rank_cannot_read_are_computed(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [teacher, "--train=digits", "--val=digits", "--limit-train=20", "--limit-val=9", "--protocols=knn"]
    words += ["--keep-features", f"--output={tmp_path / 'out'}"]
    calls, original = [], run.extract_features
    monkeypatch.setattr(run, "extract_features", lambda *a, **s: (calls.append(1), original(*a, **s))[1])
    assert evaluate(*words) == 0 and len(calls) == 2
    seconds = results(tmp_path / "out")["features"]
    assert evaluate(*words, "--k=3") == 0 and len(calls) == 2
    assert results(tmp_path / "out")["features"] == seconds, "what they took when they were computed"
    monkeypatch.setattr(run, "any_rank", lambda flag: True)
    assert evaluate(*words, "--k=4") == 0 and len(calls) == 4


def test_out_of_memory_is_no_wrong_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> None:
        def forward(*_: object) -> None:
            raise error

        monkeypatch.setattr(evaluate_plan, "_forward", forward)
        evaluate_plan._check_size(Namespace(view=(16, 16)), 16)

    with pytest.raises(torch.OutOfMemoryError):
        fails(torch.OutOfMemoryError("full"))
    with pytest.raises(ConfigError, match="takes no images of 16 x 16"):
        fails(RuntimeError("shapes"))
