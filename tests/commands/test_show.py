"""`dinocomp show`, of a run, of weights, and what it says where it cannot."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dinocomp.build.model import backbone_arguments, build_model
from dinocomp.cli import main
from dinocomp.config import load_config, to_yaml
from dinocomp.interop import save_teacher
from dinocomp.interop.head import load_dino_head
from dinocomp.models import VisionTransformer

from ..helpers import TINY

pytestmark = pytest.mark.usefixtures("one_cache")
SEEN = ["pca", "attention", "neighbours", "embedding", "prototypes"]


@pytest.fixture
def of_a_run(tmp_path: Path) -> Path:
    """What `show` needs of a run's folder."""
    config = load_config(None, [f"{name}={value}" for name, value in TINY.items()]).config
    run = tmp_path / "run"
    model = build_model(config)
    save_teacher(
        run / "teacher.safetensors",
        model.weights_of("teacher"),
        architecture=backbone_arguments(config),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        view=(18, 16),
        iteration=3,
        config=to_yaml(config),
    )
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "metrics.jsonl").write_text('{"iteration": 1, "loss/total": 3.0, "lr": 0.1}\n')
    return run


def drawn(folder: Path) -> set[str]:
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert picture.width == 780
    return {path.stem for path in folder.iterdir()}


def test_of_a_run(of_a_run: Path, capsys: pytest.CaptureFixture) -> None:
    """Its held-out images, all pictures, and the paths of these."""
    assert main(["show", str(of_a_run), "--number", "40"]) == 0
    output = of_a_run / "pictures" / "show"
    assert drawn(output) == {*SEEN, "curves"}
    assert capsys.readouterr().out.split() == [str(output / f"{name}.png") for name in (*SEEN, "curves")]


def test_of_weights_and_two_photographs(of_a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for file in files:
        Image.fromarray(torch.randint(256, (40, 60, 3), dtype=torch.uint8).numpy()).save(file)
    source, output = str(of_a_run / "teacher.safetensors"), tmp_path / "out"
    assert main(["show", source, *files, "--size", "32", "--output", str(output)]) == 0
    assert drawn(output) == set(SEEN) - {"embedding"}
    assert "left out: embedding (a map takes three images)" in capsys.readouterr().out
    assert main(["show", source, files[0], "--pictures", "pca", "--crop", "24", "--output", str(output / "one")]) == 0
    assert drawn(output / "one") == {"pca"}


def test_a_backbone_alone_has_no_prototypes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    backbone = VisionTransformer(img_size=28, patch_size=14, embed_dim=64, depth=1, num_heads=1, init_values=1.0)
    path, output = str(tmp_path / "backbone.safetensors"), tmp_path / "out"
    save_file(backbone.state_dict(), path)
    assert load_dino_head(path) is None
    assert main(["show", path, "digits", "--number", "9", "--output", str(output)]) == 0
    assert drawn(output) == set(SEEN) - {"prototypes"}
    assert "left out: prototypes" in capsys.readouterr().out
    assert main(["show", path, "digits", "--pictures", "prototypes", "--output", str(output)]) == 2
    assert "has no DINO head" in capsys.readouterr().err


class Strange(torch.nn.Module):
    """A network of another library."""

    embed_dim, patch_size, mean, std, view = 8, 4, (0.5,) * 3, (0.5,) * 3, (18, 16)

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 8, 4, 4).requires_grad_(False)

    def get_intermediate_layers(self, images: torch.Tensor, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        patches = self.embed(images).flatten(2).transpose(1, 2)  # [B, N, D]
        return [(patches, patches.mean(dim=1))]


def test_of_other_networks_there_is_no_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("dinocomp.interop.open_backbone", lambda source: Strange())
    assert main(["show", "timm:strange", "digits", "--number", "9", "--output", str(tmp_path / "out")]) == 0
    assert drawn(tmp_path / "out") == set(SEEN) - {"prototypes", "attention"}
    assert main(["show", "timm:strange", "digits", "--pictures", "attention", "--output", str(tmp_path)]) == 2
    assert "this one is a Strange" in capsys.readouterr().err


def test_the_head_is_the_teachers(of_a_run: Path) -> None:
    torch.manual_seed(0)
    config = load_config(None, [f"{name}={value}" for name, value in TINY.items()]).config
    expected = build_model(config).networks("teacher")["dino_head"].state_dict()
    head, _ = load_dino_head(of_a_run / "teacher.safetensors")
    assert head.state_dict().keys() == expected.keys() and not head.training
    assert head(torch.randn(3, 24)).shape == (3, 32)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN/teacher.safetensors"], "no images to show"),
        (["RUN", "--size", "30"], "type --size 28 or 32"),
        (["RUN", "--crop", "3"], "type --crop 4"),
        (["RUN", "--resize", "8"], "type --resize 16 or more"),
        (["RUN", "--device", "nonsense"], "type --device cpu"),
        (["RUN/teacher.safetensors", "digits", "--pictures", "curves"], "is no run's folder"),
        (["RUN", "RUN/none.png"], "does not exist"),
        (["nowhere", "digits"], "nowhere"),
        (["RUN", "--output", "RUN/config.yaml"], "is a file"),
    ],
)
def test_what_is_wrong_is_said(of_a_run: Path, capsys: pytest.CaptureFixture, words: list[str], said: str) -> None:
    assert main(["show", *(word.replace("RUN", str(of_a_run)) for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_unknown_pictures(of_a_run: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["show", str(of_a_run), "--pictures", "pca,atention"])
    assert "no picture 'atention'" in capsys.readouterr().err


def test_before_the_first_checkpoint_there_are_curves(of_a_run: Path, capsys: pytest.CaptureFixture) -> None:
    (of_a_run / "teacher.safetensors").unlink()
    assert main(["show", str(of_a_run)]) == 2 and "--pictures curves" in capsys.readouterr().err
    assert main(["show", str(of_a_run), "--pictures", "curves"]) == 0
