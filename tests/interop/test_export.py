"""Exports, against the libraries that they are for."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

import dinocomp
from dinocomp.build import backbone_arguments
from dinocomp.config import load_config
from dinocomp.errors import WeightsError
from dinocomp.interop.export import export
from dinocomp.interop.export.hub import official_call, write_hub
from dinocomp.interop.export.parts import subject_of
from dinocomp.interop.formats import infer_architecture, published, to_hugging_face, to_timm
from dinocomp.models import VisionTransformer
from tests.interop.exported import (
    ABOUT,
    NO_BIASES,
    OTHER_SIZES,
    PORTABLE,
    SIZE,
    code_of,
    exported,
    images,
    make_teacher,
    photo,
    run_code,
)
from tests.report.folders import write_run

LAYOUTS = json.loads((Path(__file__).parents[1] / "golden/data/pretrained_layouts.json").read_text())
NETWORKS = {
    "plain": {},
    "registers": {"num_register_tokens": 4},
    "swiglu registers": {"num_register_tokens": 2, "ffn_layer": "swiglu"},
    "swiglu": {"ffn_layer": "swiglu"},
    "no biases, no LayerScale": NO_BIASES,
    "portable": PORTABLE,
    "portable, registers": {"num_register_tokens": 4, **PORTABLE},
}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def norm_of(difference: torch.Tensor, of: torch.Tensor) -> float:
    return ((difference - of).norm() / of.norm()).item()


def compare(net: VisionTransformer, theirs, antialias: bool, said: str) -> None:
    """Class tokens and patches at the native size, and at others as the library resamples positions.

    Args:
        theirs: images -> (class token, patches).
        antialias: whether it filters.
    """
    native = net(images(SIZE))
    for found, expected in zip(theirs(images(SIZE)), (native.cls, native.patches), strict=True):
        close(found, expected)
    same = (net.interpolate_offset, net.interpolate_antialias) == (0.0, antialias)
    assert ("the same at every image size" in said) == same
    far = 0.0
    for size in OTHER_SIZES:
        ours = net(images(*size))
        cls, patches = theirs(images(*size))
        far = max(far, norm_of(patches, ours.patches))
        if same:
            close(cls, ours.cls)
            close(patches, ours.patches)
    assert same or far > 1e-3, "else there is nothing to be said of it"
    if not same:
        # What was measured is what the library does: the very number is in the message.
        noise = torch.Generator().manual_seed(0)
        for side in (42, 84):
            pixels = torch.randn(2, 3, side, side, generator=noise)
            ours, (cls, patches) = net(pixels), theirs(pixels)
            words = f"at {side} x {side} by {norm_of(cls, ours.cls):.2g} (class token) and "
            assert words + f"{norm_of(patches, ours.patches):.2g} (patches)" in said


@pytest.mark.parametrize("network", NETWORKS)
def test_hugging_face(network: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    net, folder, said = exported("hf", tmp_path, **NETWORKS[network])
    model, loading = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), "every weight is there, and no other"
    first = net.num_prefix_tokens

    @torch.no_grad()
    def theirs(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = model.eval()(pixels).last_hidden_state
        return tokens[:, 0], tokens[:, first:]

    compare(net, theirs, "WithRegisters" in type(model).__name__, said)


@pytest.mark.parametrize("network", NETWORKS)
def test_timm(network: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    net, folder, said = exported("timm", tmp_path, **NETWORKS[network])
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    @torch.no_grad()
    def theirs(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = model.forward_features(pixels)
        return tokens[:, 0], tokens[:, model.num_prefix_tokens :]

    compare(net, theirs, True, said)
    by_hand = run_code(folder, code_of(folder / "README.md")[1])["model"]
    assert torch.equal(by_hand.forward_features(images(SIZE)), model.forward_features(images(SIZE)))


@pytest.mark.parametrize("network", [*NETWORKS, "no FFN"])
def test_hub(network: str, tmp_path: Path) -> None:
    """Our own hubconf.py, with all that the official networks have."""
    net, folder, said = exported("hub", tmp_path, **NETWORKS.get(network, {"ffn_layer": "identity"}))
    model = torch.hub.load(str(folder), "backbone", source="local", verbose=False)
    assert said == ""
    for size in ((SIZE, SIZE), *OTHER_SIZES):
        pixels = images(*size)
        masks = torch.rand(2, size[0] * size[1] // 14**2) < 0.3
        for masked in (None, masks):
            ours, theirs = net(pixels, masked), model.forward_features(pixels, masked)
            close(theirs["x_norm_clstoken"], ours.cls)
            close(theirs["x_norm_regtokens"], ours.registers)
            close(theirs["x_norm_patchtokens"], ours.patches)
            close(theirs["x_prenorm"], ours.prenorm)
        close(model(pixels), net(pixels).cls)
    for settings in ({"norm": False}, {"reshape": True}):
        found = model.get_intermediate_layers(pixels, [0, 1], return_class_token=True, **settings)
        for theirs, ours in zip(found, net.get_intermediate_layers(pixels, [0, 1], **settings), strict=True):
            close(theirs[0], ours[0])
            close(theirs[1], ours[1])


@pytest.mark.parametrize("name", ["vit_small14", "vit_small14_reg4"])
def test_hub_weights_are_laid_out_like_the_published_ones(name: str, tmp_path: Path) -> None:
    shapes = {n: torch.zeros(shape) for n, shape in LAYOUTS[name].items()}
    net = VisionTransformer(**infer_architecture(published(shapes), name))
    net.mean, net.std, net.view = ABOUT["mean"], ABOUT["std"], (518, 518)
    written = write_hub(subject_of(net, name, None), tmp_path)
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert {n: list(w.shape) for n, w in weights.items()} == LAYOUTS[name]
    assert f'"dinov2_vits14{"_reg" if "reg" in name else ""}", pretrained=False, img_size=518' in written.more


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_entry_points_are_named(name: str) -> None:
    with torch.device("meta"):
        weights = {n: torch.empty(shape) for n, shape in LAYOUTS[name].items()}
        net = VisionTransformer(**infer_architecture(published(weights), name))
    net.mean, net.std, net.view, net.cpu = ABOUT["mean"], ABOUT["std"], (518, 518), lambda: net
    letter = name.removeprefix("vit_")[0]
    registers = "reg4" in name
    for resampling in ((net.interpolate_offset, net.interpolate_antialias), (0.05, False)):
        net.interpolate_offset, net.interpolate_antialias = resampling
        made = {}

        def load(
            repository: str, entry: str, *, pretrained: bool, made: dict = made, **given: object
        ) -> SimpleNamespace:
            fixed = {"interpolate_antialias": True, "interpolate_offset": 0.0} if entry.endswith("_reg") else {}
            assert not pretrained and not fixed.keys() & given.keys(), "the official function would be given them twice"
            made |= {"entry": entry}
            return SimpleNamespace(load_state_dict=lambda weights: None, **fixed | given)

        torch_ = SimpleNamespace(hub=SimpleNamespace(load=load), load=lambda path, weights_only: {})
        found: dict = {"torch": torch_}
        exec(official_call(subject_of(net, name, None)), found)
        assert made["entry"] == f"dinov2_vit{letter}14{'_reg' if registers else ''}"
        assert (found["model"].interpolate_offset, found["model"].interpolate_antialias) == resampling


@pytest.mark.parametrize(("network", "size"), [("swiglu registers", None), ("plain", 84), ("no FFN", 42)])
def test_torch_programs(network: str, size: int | None, tmp_path: Path) -> None:
    net, folder, said = exported("torch", tmp_path, size, **NETWORKS.get(network, {"ffn_layer": "identity"}))
    program = torch.export.load(folder / "model.pt2").module()
    for number in (1, 3):
        pixels = images(size or SIZE, number=number)
        cls, patches = program(pixels)
        close(cls, net(pixels).cls)
        close(patches, net(pixels).patches)
    assert said == "" and f"of {size or SIZE} x {size or SIZE} pixels alone" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("network", "size"), [("swiglu registers", None), ("plain", 84)])
def test_onnx(network: str, size: int | None, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    net, folder, _ = exported("onnx", tmp_path, size, **NETWORKS[network])
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert session.get_inputs()[0].shape == ["batch", 3, size or SIZE, size or SIZE]
    for number in (1, 3):
        pixels = images(size or SIZE, number=number)
        cls, patches = session.run(["cls", "patches"], {"pixels": pixels.numpy()})
        close(torch.from_numpy(cls), net(pixels).cls)
        close(torch.from_numpy(patches), net(pixels).patches)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.onnx", "preprocessing.json"]
    used(folder, run_code(folder, code_of(folder / "README.md")[0]), size)


def used(folder: Path, made: dict, size: int | None = None) -> None:
    """The tokens that a card's code makes of a photo are those of the teacher beside it, up to rounding of pixels."""
    model = dinocomp.load(folder.parent / "teacher.safetensors")
    resize, crop = (round(side * (size or SIZE) / SIZE) for side in model.view)
    view = dinocomp.interop.View(resize, crop, tuple(model.mean), tuple(model.std))
    tokens = model.forward_features(view(folder / "photo.jpg")[None])
    for name, expected in (("cls", tokens["x_norm_clstoken"]), ("patches", tokens["x_norm_patchtokens"])):
        assert norm_of(torch.as_tensor(made[name]), expected) < 0.03, name


@pytest.mark.parametrize("target", ["hf", "timm"])
def test_a_card_s_code_does_what_it_says(target: str, tmp_path: Path) -> None:
    pytest.importorskip({"hf": "transformers", "timm": "timm"}[target])
    _, folder, _ = exported(target, tmp_path, num_register_tokens=4)
    used(folder, run_code(folder, code_of(folder / "README.md")[0]))


@pytest.mark.parametrize("target", ["hub", "torch", "safetensors"])
def test_loading_takes_torch_alone(target: str, tmp_path: Path) -> None:
    """The card's code, in a process that can import none of our packages and of the other libraries'."""
    _, folder, _ = exported(target, tmp_path)
    photo(folder / "photo.jpg")
    blocked = ", ".join(f"{name!r}: None" for name in ("dinocomp", "composer", "streaming", "timm", "transformers"))
    code = f"import sys\nsys.modules.update({{{blocked}}})\n" + code_of(folder / "README.md")[0]
    if target == "safetensors":
        code += 'cls = patches = weights["cls_token"]\n'
    code += 'torch.save({"cls": cls, "patches": patches}, "made.pt")\n'
    command = [sys.executable, "-I", "-c", "import torch\n" + code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if target != "safetensors":
        used(folder, torch.load(folder / "made.pt"))


def test_safetensors_say_what_they_are_of(tmp_path: Path) -> None:
    net, folder, _ = exported("safetensors", tmp_path, num_register_tokens=4, **PORTABLE)
    model = dinocomp.load(folder / "backbone.safetensors")
    assert tuple(model.mean) == ABOUT["mean"] and tuple(model.view) == ABOUT["view"]
    for size in ((SIZE, SIZE), *OTHER_SIZES):
        assert torch.equal(model(images(*size)), net(images(*size)).cls)
    with safe_open(folder / "backbone.safetensors", "pt") as file:
        assert set(file.keys()) == set(net.state_dict())


@pytest.mark.parametrize("target", ["hub", "hf", "timm"])
@pytest.mark.parametrize("network", ["portable, registers", "portable"])
def test_what_was_exported_is_taken_again(target: str, network: str, tmp_path: Path) -> None:
    net, folder, _ = exported(target, tmp_path, **NETWORKS[network])
    model = dinocomp.load(folder)
    assert isinstance(model.net, VisionTransformer)
    assert (tuple(model.mean), tuple(model.std), tuple(model.view)) == (ABOUT["mean"], ABOUT["std"], ABOUT["view"])
    # timm does not say how a network was trained to resample; it is taken to be as the published ones are.
    for size in ((SIZE, SIZE), *(OTHER_SIZES if (target, network) != ("timm", "portable") else ())):
        close(model(images(*size)), net(images(*size)).cls)


def test_names_go_both_ways() -> None:
    for name, shapes in LAYOUTS.items():
        with torch.device("meta"):
            weights = {n: torch.empty(shape) for n, shape in shapes.items()}
            of_hugging_face, of_timm = published(to_hugging_face(weights)), published(to_timm(weights))
        assert {n: list(w.shape) for n, w in of_hugging_face.items()} == shapes, name
        assert {n: list(w.shape) for n, w in of_timm.items()} | {"mask_token": shapes["mask_token"]} == shapes, name


@pytest.mark.parametrize("recipes", ["portable", "registers,portable"])
def test_the_portable_recipe(recipes: str, tmp_path: Path) -> None:
    """A network as it configures one is the same in both libraries at every size."""
    arguments = backbone_arguments(load_config("vits16", [f"recipes=[{recipes}]"]).config)
    names = ("interpolate_offset", "interpolate_antialias", "num_register_tokens")
    said = {}
    for target in ("hf", "timm"):
        (tmp_path / recipes / target).mkdir(parents=True)
        said[target] = exported(target, tmp_path / recipes / target, **{name: arguments[name] for name in names})[2]
    assert all("the same at every image size" in text for text in said.values())
    assert {name: arguments[name] for name in names[:2]} == PORTABLE  # which the libraries agree with, see above


def test_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, a link to the run, and an empty folder that one is in; where the run lay stays private."""
    run = write_run(tmp_path / "output" / "photos")
    make_teacher(run / "teacher.safetensors", config="train:\n  output_dir: /home/me\n  seed: 7\n")
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    for source, target in (("output/photos", "out"), ("link", "linked")):
        export(source, "safetensors", target)
        card = (tmp_path / target / "README.md").read_text()
        assert "photos/teacher.safetensors" in card and "seed: 7" in card and "/home/me" not in card
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    export("../output/photos", "safetensors", ".")
    assert (tmp_path / "empty" / "backbone.safetensors").is_file()


def test_refusals(tmp_path: Path) -> None:
    for target in ("hf", "timm"):
        (tmp_path / target).mkdir()
        with pytest.raises(WeightsError, match=r"ffn_layer=identity.*--to hub"):
            exported(target, tmp_path / target, ffn_layer="identity")
        assert [path.name for path in (tmp_path / target).iterdir()] == ["teacher.safetensors"], "nothing is left"
    source = str(tmp_path / "hf" / "teacher.safetensors")
    with pytest.raises(WeightsError, match="not empty"):
        export(source, "hub", tmp_path)
    with pytest.raises(WeightsError, match="give 42 or 56"):
        export(source, "torch", tmp_path / "x", 50)
    with pytest.raises(WeightsError, match="leave out --size"):
        export(source, "hub", tmp_path / "x", 56)
    with pytest.raises(WeightsError, match="is a file"):
        export(source, "hub", Path(source) / "x")
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="TimmBackbone, a network of another library"):
        export(f"timm:test_vit={tmp_path / 'w.pth'}", "hub", tmp_path / "x")
