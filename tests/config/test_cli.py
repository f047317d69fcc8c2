"""The `dinocomp` command, the training command's words, and the text of a plan."""

import re
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest

from dinocomp import cli
from dinocomp.config import load_config, split_arguments
from dinocomp.config.auto import Facts
from dinocomp.config.memory import Memory
from dinocomp.config.plan import describe
from dinocomp.errors import ConfigError, DataError


@pytest.fixture
def other_rooms(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Stand-ins for the rooms that the commands call; returns what they were called with, and `count` to answer."""
    seen: dict[str, object] = {"count": 50_000}

    class Report:
        def summary(self) -> str:
            return "12 images written"

    def convert(src: str, dst: str, **settings: object) -> Report:
        seen["convert"] = (src, dst, settings)
        if settings["strict"]:
            raise DataError("1 unreadable image: a.png")
        return Report()

    class Survey(NamedTuple):
        images: int | None
        side: int | None

    def survey_images(dataset_path: str, *, fetch: bool, cache_dir: str) -> Survey:
        assert not fetch
        seen["counted"] = (dataset_path, cache_dir)
        if isinstance(seen["count"], Exception):
            raise seen["count"]
        return Survey(seen["count"], 64)  # type: ignore[arg-type]

    def plan_memory(config: object, world_size: int, limit: float | None) -> types.SimpleNamespace:
        seen["memory"] = (world_size, limit)
        fits = limit is None or limit > 12e9
        memory = Memory(weights=2e9, activations=10e9, heads=1e6)
        return types.SimpleNamespace(memory=memory, strategy="ddp", limit=limit, fits=fits, remedy="type less")

    rooms = {
        "dinocomp.data": {"Survey": Survey, "survey_images": survey_images},
        "dinocomp.data.convert": {"convert": convert},
        "dinocomp.build": {
            "count_parameters": lambda config: {"backbone": 21_678_336, "dino_head": 23_655_680},
            "facts_of_the_run_here": lambda config, world_size: seen.get("begun"),
            "plan_memory": plan_memory,
        },
    }
    for name, members in rooms.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_convert_passes_its_settings_on(other_rooms: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "in", "out", "--workers", "3", "--max-size", "256", "--compression", "zstd"]
    assert cli.main([*words, "--val-fraction", "0.1"]) == 0
    settings = {"workers": 3, "max_size": 256, "compression": "zstd", "strict": False, "val_fraction": 0.1}
    assert other_rooms["convert"] == ("in", "out", settings)
    assert capsys.readouterr().out == "12 images written\n"


def test_a_mistake_is_one_line_and_an_exit_code(
    other_rooms: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", "in", "out", "--strict"]) == 1
    assert capsys.readouterr().err == "error: 1 unreadable image: a.png\n"
    assert cli.main(["plan", "vits16", "train.sead=3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: train.sead = 3 (command line)") and "Traceback" not in error
    for words in (["--debug", "plan", "nowhere"], ["plan", "nowhere", "--debug"]):
        with pytest.raises(ConfigError):
            cli.main(words)


@pytest.mark.parametrize(
    "words", [["convert", "a", "b", "--workers", "0"], ["convert", "a", "b", "--val-fraction", "1"]]
)
def test_settings_out_of_range_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2 and repr(words[-1]) in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["convert", "a", "b", "--wrkers", "2"], ["recipes", "a", "b"]])
def test_words_that_mean_nothing_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2 and "usage: dinocomp" in capsys.readouterr().err


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    listing = capsys.readouterr().out
    assert re.search(r"registers +four register tokens", listing) and len(listing.splitlines()) >= 12
    assert cli.main(["recipes", "registers"]) == 0
    assert "num_register_tokens: 4" in capsys.readouterr().out
    assert cli.main(["recipes", "regster"]) == 2
    assert "Did you mean registers" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out.startswith("dinocomp ")


def test_plan_says_what_the_guide_works_out_by_hand(
    other_rooms: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "plan",
        "vits16",
        "--world-size",
        "4",
        "train.output_dir=out",
        "recipes=[registers]",
        "optim.base_lr=0.002",
    ]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    lines = {line.strip() for line in text.splitlines()}
    flat = {" ".join(line.split()) for line in lines}
    assert other_rooms["counted"] == ("ImageNet:split=TRAIN", "")
    for expected in (
        "recipes [registers] applied in this order",
        "student.arch vit_small yamls/vits16.yaml",
        "student.num_register_tokens 4 recipe registers (recipes/registers.yaml)",
        "optim.base_lr 0.002 command line",
        "iterations 250,000 (200 official epochs of 1,250)",
        "images an iteration 40 (10 on each of 4 processes)",
        "images an official epoch 50,000",
        "images in the run 10,000,000",
        "dataset 50,000 images; an official epoch takes 100 % of them",
        "passes over the dataset 200.0",
        "peak learning rate 0.0003953 (0.002 * sqrt(40 / 1024)), after 12,500 iterations",
        "precision bf16 on a GPU, fp32 on a CPU",
        "parameters, backbone 21,678,336",
        "parameters, together 45,334,016 trained; the teacher holds as many",
        "checkpoints every 3,750 iterations, 0.907 GB each; the newest 3 are kept",
        "k-NN evaluation every 6,250 iterations",
        "output out",
        "! 65,536 prototypes in dino_head are more than the 50,000 images",
        "-> type dino.head_n_prototypes=2048",
    ):
        assert expected in flat, expected
    assert "student.patch_size" not in text, "a key at its default is left out"


def test_plan_says_what_memory_is_needed(other_rooms: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*words: str) -> str:
        assert cli.main(["plan", "vits16", *words]) == 0
        return " ".join(capsys.readouterr().out.split())

    line = "memory on each GPU about 12.0 GB with ddp: weights 2.0, activations 10.0"
    text = plan()
    assert line in text and "a GPU of" not in text
    assert other_rooms["memory"] == (1, None)
    assert line + "; a GPU of 16 GB is enough" in plan("--gpu-memory", "16", "--world-size", "2")
    assert other_rooms["memory"] == (2, 16e9)
    text = plan("--gpu-memory", "11.5")
    assert line + "; a GPU of 11.5 GB is too small" in text
    assert "! a step needs about 12.0 GB of each GPU, which has 11.5 GB -> type less" in text
    assert "train.microbatch_size=auto" in plan("train.microbatch_size=auto")
    assert "memory on each GPU" not in plan("train.device=cpu")
    for wrong in ("0", "80gb", "inf"):
        with pytest.raises(SystemExit):
            plan("--gpu-memory", wrong)
        assert "is not a number of gigabytes above 0" in capsys.readouterr().err


def test_plan_in_full_lists_every_key_and_notices(
    other_rooms: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "vits16", "student.block_chunks=4", "--full"]) == 0
    text = capsys.readouterr().out
    assert "student.patch_size" in text and "teacher.warmup_teacher_temp_epochs" in text
    assert "student.block_chunks=4 (command line) changes nothing" in text


def test_plan_works_before_the_images_are_there(
    other_rooms: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    other_rooms["count"] = DataError("no folder x")
    assert cli.main(["plan", "quickstart"]) == 0
    assert "not counted: no folder x" in capsys.readouterr().out
    assert "not counted\n" in describe(load_config("quickstart"), 1, None, {})


def test_plan_chooses_by_the_images_or_by_a_number_of_them(
    other_rooms: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "vits16", "recipes=[small_data]"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "one for 16 of 50,000 images" in text and "images of 64 px" in text
    other_rooms["count"] = DataError("no folder x")
    assert cli.main([*words, "--images", "20000"]) == 0
    text = capsys.readouterr().out
    assert "one for 16 of 20,000 images" in text and "assumed: none has been seen yet" in text
    assert cli.main(words) == 0
    assert "one for 16 of 100,000 images, assumed: they are not counted yet (--images N)" in capsys.readouterr().out
    other_rooms["begun"] = Facts(settled={"dino.head_n_prototypes": 4096}, reasons={"dino.head_n_prototypes": "of old"})
    assert cli.main(words) == 0
    assert re.search(r"dino.head_n_prototypes +4096 +of old", capsys.readouterr().out), "the run in that folder goes on"


def test_shipped_quickstart_and_small_numbers_read_well() -> None:
    text = describe(load_config("quickstart", ["checkpoint.max_to_keep=0", "optim.lr=0.1"]), 1, 1437, {"backbone": 1})
    assert "all are kept" in text and "optim.lr as it stands" in text


def test_training_words_are_split() -> None:
    assert split_arguments(["vits16", "a=1", "recipes=[x]"]) == ("vits16", ["a=1", "recipes=[x]"])
    for words in ([], ["a=1"], ["vits16", "a"]):
        with pytest.raises(ConfigError, match="Usage: composer"):
            split_arguments(words)


def test_the_references_flags_are_answered_with_what_to_type() -> None:
    words = ["--config-file", "vits16.yaml", "--output-dir", "out", "--save_frequency", "10", "--max_to_keep=5"]
    words += ["--no-resume", "train.seed=1", "--eval-only", "--train.seed=2", "--frobnicate"]
    for call in (lambda: split_arguments(words), lambda: load_config("vits16", words)):
        with pytest.raises(ConfigError) as caught:
            call()
        message = str(caught.value)
        for expected in (
            "composer dinocomp/train.py vits16.yaml",
            "--output-dir out: type train.output_dir=out",
            "--save_frequency 10: type checkpoint.save_frequency=10",
            "--max_to_keep=5: type checkpoint.max_to_keep=5",
            "--no-resume: type train.output_dir=A_NEW_FOLDER",
            "--eval-only: there is nothing to dump",
            "--train.seed=2: type train.seed=2",
            "--frobnicate: there are no flags here",
        ):
            assert expected in message


def test_the_config_room_imports_nothing_slow(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys, dinocomp.config, dinocomp.cli, dinocomp.config.plan;"
        "print(sorted({'torch', 'composer', 'streaming'} & set(sys.modules)))"
    )
    root = Path(cli.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
