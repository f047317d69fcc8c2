"""`dinocomp evaluate` from end to end, on digits and a tiny network."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocomp.cli import main
from dinocomp.commands.evaluate import output_folder
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


def test_all_protocols_on_one_process_and_on_two(
    teacher: str, tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture
) -> None:
    """Sizes divide neither by the ranks nor by the batches, and of the last batch one rank has no image."""
    masks = [write(tmp_path / name, number) for name, number in (("one", 7), ("two", 3))]
    words = [teacher, "--train=digits", "--val=digits", "--limit-train=131", "--limit-val=65"]
    words += [f"--segmentation-train={masks[0]}", f"--segmentation-val={masks[1]}"]
    ranks = start_command(["evaluate", *words, *QUICK, f"--output={tmp_path / 'two-ranks'}"], 2, free_port)
    assert evaluate(*words, f"--output={tmp_path / 'one-rank'}") == 0
    shown = capsys.readouterr().out
    assert [finish(rank) for rank in ranks] == [0, 0]
    one, two = results(tmp_path / "one-rank"), results(tmp_path / "two-ranks")
    assert list(one["protocols"]) == ["knn", "linear", "logreg", "retrieval", "segmentation"]
    assert (one["iteration"], one["train_images"], one["val_images"]) == (7, 131, 65)
    assert one["protocols"]["retrieval"]["queries"] == 65
    same(one, two)
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
        (["--train=digits", "--crop=15"], "--crop 15 is not a whole number of patches of 4 pixels; 12 is"),
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
    for path in ("run/evaluation/iteration-7/teacher.safetensors", "run/checkpoints/iteration-9/x", "other/dino.pth"):
        Path(path).parent.mkdir(parents=True)
        Path(path).touch()
    found = {
        weights: str(output_folder(Namespace(weights=weights, output=None)))
        for weights in (
            *("run", "run/teacher.safetensors", "run/best_teacher.safetensors", "run/checkpoints/iteration-9"),
            *("run/evaluation/iteration-7/teacher.safetensors", "other/dino.pth", "other", "timm:a/b=c"),
        )
    }
    assert [path.replace(str(tmp_path) + "/", "") for path in found.values()] == [
        *("run/evaluate", "run/evaluate", "run/evaluate-best_teacher", "run/evaluate-iteration-9"),
        *("run/evaluate-iteration-7", "other/evaluate-dino", "evaluate-other", "evaluate-timm-a-b-c"),
    ]
    assert output_folder(Namespace(weights="run", output="x")) == Path("x")
