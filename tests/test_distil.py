"""A smaller student from a frozen larger teacher."""

import json
from pathlib import Path
from signal import SIGTERM

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinocomp.build import build_model, count_parameters, plan_memory
from dinocomp.cli import main as command
from dinocomp.config import Config, load_config
from dinocomp.config.advice import warnings
from dinocomp.config.distil import frozen_teacher, read_frozen_teacher
from dinocomp.data import Batch, split_batch
from dinocomp.errors import WeightsError
from dinocomp.interop import load_teacher, read_about
from dinocomp.interop.head import fingerprint, load_dino_head
from dinocomp.method import DINOv2
from dinocomp.train import main

from . import processes
from .helpers import load_checkpoint, metrics, weights, words, yaml_of_nothing
from .method.test_dinov2 import noise
from .sharding import shard_on_cpu

pytestmark = pytest.mark.usefixtures("one_cache")

LARGER = {"student__embed_dim": 48, "student__num_heads": 4, "student__depth": 3, "dino__head_n_prototypes": 40}
DISTIL = {
    "student__drop_path_rate": 0,
    "student__layerscale": "null",
    "ibot__mask_sample_probability": 0,
    "ibot__all_patches": "true",
    "dino__head_n_prototypes": 40,
    "optim__freeze_last_layer_epochs": 0,
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Teachers of larger runs, with shared and with separate heads, whose weights are far from their start."""
    found = {}
    for name, changes in (("shared", {}), ("separate", {"ibot__separate_head": "true"})):
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
            assert main([yaml_of_nothing(folder), *words(folder / "run", optim__epochs=1, **LARGER, **changes)]) == 0
        path, about = folder / "run" / "teacher.safetensors", read_about(folder / "run" / "teacher.safetensors")
        torch.manual_seed(1)
        tensors = {n: w + 0.1 * torch.randn_like(w) for n, w in load_file(path).items()}
        path.unlink()  # a checkpoint shares it
        save_file(tensors, path, metadata=about)
        found[name] = path
    return found


def configured(teacher: Path, **changes) -> Config:
    changes = DISTIL | {"teacher__distil_from": teacher} | changes
    return load_config(None, words(Path("nowhere"), **changes)).config


def model_and_batch(config: Config) -> tuple[DINOv2, Batch]:
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():  # away from the start, at which all images look alike
        for role in ("student", "teacher"):
            for net in model.networks(role).values():
                for weight in net.parameters():
                    weight.add_(0.1 * torch.randn_like(weight))
    model.teacher_temp, model.momentum = 0.05, 0.9
    return model, noise(config, config.train.batch_size_per_gpu, step=0)


def by_the_paper(model: DINOv2, path: Path, batch: Batch, config: Config) -> dict[str, Tensor]:
    """The three terms, written down plainly: of the file's teacher, one image and one pair of crops after the other.

    Of the model it takes the student's networks alone.
    """
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.crops.mean, config.crops.std))
    backbone, tensors = load_teacher(path).double(), load_file(path)
    student = {name: net.double() for name, net in model.networks("student").items()}

    def tokens(net, crop: Tensor) -> tuple[Tensor, Tensor]:
        found = net(((crop.double() / 255 - mean) / std)[None])
        return found.cls[0], found.patches[0]  # [D], [N, D]

    def teacher_logits(head: str, x: Tensor) -> Tensor:
        layers = {n.removeprefix(f"{head}."): t.double() for n, t in tensors.items() if n.startswith(head)}
        for i in (0, 2, 4):
            x = F.linear(x, layers[f"mlp.{i}.weight"], layers[f"mlp.{i}.bias"])
            x = F.gelu(x) if i < 4 else x
        direction = F.normalize(layers["last_layer.weight_v"], dim=1)
        return F.normalize(x, dim=-1) @ (layers["last_layer.weight_g"] * direction).T

    def cross_entropy(of_teacher: Tensor, of_student: Tensor) -> Tensor:
        target = (of_teacher / model.teacher_temp).softmax(-1)  # the first step: a centre of zeros
        return -(target * (of_student / config.dino.student_temp).log_softmax(-1)).sum(-1)

    separate = config.ibot.separate_head
    patch_head = "ibot_head" if separate else "dino_head"
    images, dino_pairs, ibot_crops = len(batch["index"]), [], []
    features: list[list[Tensor]] = [[], []]
    for i in range(images):
        crops = [*batch["global_crops"][i], *batch["local_crops"][i]]
        with torch.no_grad():
            of_teacher = [tokens(backbone, crop) for crop in crops[:2]]
        of_student = [tokens(student["backbone"], crop) for crop in crops]
        for s, (cls, _) in enumerate(of_student):
            for v in range(2):
                if s != v:
                    dino_pairs.append(
                        cross_entropy(teacher_logits("dino_head", of_teacher[v][0]), student["dino_head"](cls[None])[0])
                    )
        for v in range(2):
            target = teacher_logits(patch_head, of_teacher[v][1])  # [N, K]
            ibot_crops.append(cross_entropy(target, student[patch_head](of_student[v][1])).mean())
            features[v].append(of_student[v][0])
    koleo = torch.zeros(())
    for view in features:
        x = F.normalize(torch.stack(view), dim=-1)  # [B, D]
        for i in range(images):
            nearest = max((j for j in range(images) if j != i), key=lambda j: float(x[i] @ x[j]))
            koleo = koleo - (x[i] - x[nearest]).norm().log() / images
    return {
        "dino": torch.stack(dino_pairs).mean(),
        "ibot": torch.stack(ibot_crops).mean(),
        "koleo": config.dino.koleo_loss_weight * koleo,
    }


@pytest.mark.parametrize("heads", ["shared", "separate"])
def test_a_step_is_what_the_paper_says(heads: str, teachers: dict[str, Path]) -> None:
    """Its terms, in fp32, and the gradient of their sum by every weight of the student."""
    separate = {"ibot__separate_head": "true"} if heads == "separate" else {}
    config = configured(teachers[heads], dino__koleo_loss_weight=0.3, **separate)
    model, batch = model_and_batch(config)
    model.loss(model(batch), batch)["total"].backward()
    ours = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    found = {name: float(term) for name, term in model.terms.items()}
    found["dino"] = found.pop("dino_global") + found.pop("dino_local")
    model.zero_grad()
    expected = by_the_paper(model, teachers[heads], batch, config)
    assert found.keys() == expected.keys()
    for name, term in expected.items():
        assert found[name] == pytest.approx(float(term), rel=1e-6), name
    sum(expected.values()).backward()
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() and "student_backbone.net.mask_token" not in ours
    for name, gradient in theirs.items():
        off = (ours[name] - gradient).norm()
        assert off <= 1e-4 * gradient.norm() + 1e-7, name


def test_roles(teachers: dict[str, Path]) -> None:
    """The target is no child of the model and never changes; the teacher follows the student."""
    model, batch = model_and_batch(configured(teachers["shared"]))
    before = {n: w.clone() for net in model.networks("target").values() for n, w in net.named_parameters()}
    assert model.distils and not any("target_" in n for n in model.state_dict() if "targets" not in n)
    shapes = [net.pos_embed.shape for net in (model.networks(r)["backbone"] for r in ("student", "teacher", "target"))]
    assert [shape[-1] for shape in shapes] == [24, 24, 48]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    old = [p.clone() for net in model.networks("teacher").values() for p in net.parameters()]
    for _ in range(3):
        model.loss(model(batch), batch)["total"].backward()
        optimizer.step()
        model.update_teacher()
    students = [p for net in model.networks("student").values() for p in net.parameters()]
    teacher = [p for net in model.networks("teacher").values() for p in net.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(old, teacher, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(students, teacher, strict=True))
    for net in model.networks("target").values():
        for name, weight in net.named_parameters():
            assert weight.grad is None and not weight.requires_grad and torch.equal(weight, before[name]), name
    plain = build_model(load_config(None, words(Path("nowhere"))).config)
    assert not plain.distils and plain.networks("target") == plain.networks("teacher")


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_micro_batches_are_the_whole_batch(centering: str, teachers: dict[str, Path]) -> None:
    results = []
    for size in (8, 2):
        model, batch = model_and_batch(configured(teachers["shared"], train__centering=centering))
        parts = split_batch(batch, size)
        model.begin_step(parts)
        for part in parts:
            (model.loss(model(part), part)["total"] * len(part["index"]) / 8).backward()
        model.update_teacher()
        results.append((dict(model.terms), [p.grad for p in model.parameters() if p.grad is not None], model))
    (one, whole, a), (other, parts, b) = results
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=1e-7)
    for x, y in zip(parts, whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)
    if centering == "centering":
        assert a.ibot_targets.center.any()
        torch.testing.assert_close(b.ibot_targets.center, a.ibot_targets.center, rtol=1e-5, atol=1e-7)


def test_a_run_its_checkpoint_and_what_it_exports(
    tmp_path: Path, teachers: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    """Stopped and gone on it ends bit for bit as without; it refuses another teacher, and exports the average."""
    nothing, frozen = yaml_of_nothing(tmp_path), tmp_path / "frozen.safetensors"
    frozen.write_bytes(teachers["separate"].read_bytes())
    changes = {name: value for name, value in DISTIL.items() if "prototypes" not in name}
    changes |= {"teacher__distil_from": frozen, "optim__epochs": 2, "dino__head_n_prototypes": 40}

    def arguments(name: str, **more) -> list[str]:
        given = words(tmp_path / name, **changes, **more)
        return [nothing, *(word for word in given if not word.startswith("ibot.head_n_prototypes"))]

    assert main(arguments("whole")) == 0
    stopped = processes.start(arguments("parts"), processes.signal_at_iteration, 5, SIGTERM)
    assert processes.finish(stopped) == 75
    moved = tmp_path / "moved.safetensors"
    frozen.rename(moved)
    assert main(arguments("parts")) == 2
    assert "frozen.safetensors does not exist" in capsys.readouterr().err
    frozen.write_bytes(teachers["separate"].read_bytes()[:-4] + b"abcd")
    assert main(arguments("parts")) == 2
    assert "was trained with the frozen teacher" in capsys.readouterr().err
    heads = ["ibot.separate_head=true", "ibot.head_n_prototypes=24"]
    assert main([*arguments("parts"), "teacher.distil_from=''", *heads]) == 2
    assert "is none" in capsys.readouterr().err
    assert main([*arguments("parts"), f"teacher.distil_from={moved}"]) == 0
    whole, parts = (weights(tmp_path / name, 8) for name in ("whole", "parts"))
    assert not [name for name in whole if not torch.equal(whole[name], parts[name])]

    saved, exported = load_checkpoint(tmp_path / "whole", 8)["state"]["model"], tmp_path / "whole/teacher.safetensors"
    assert {name.partition("_")[0] for name in saved} == {"student", "teacher", "dino", "ibot"}
    for name, weight in load_file(exported).items():
        network, _, rest = name.partition(".")
        assert torch.equal(weight, saved[f"teacher_{network}.net.{rest}"]), name
    assert read_about(exported)["distilled_from"] == fingerprint(moved)
    assert len(load_teacher(exported).blocks) == 2 and load_dino_head(exported)[0].last_layer.weight_v.shape[0] == 40
    config = load_config(str(tmp_path / "whole" / "config.yaml")).config
    assert config.ibot.separate_head and config.ibot.head_n_prototypes == 24, "as the frozen teacher's file has it"


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "fsdp2"))]
)
def test_on_two_processes(strategy: str, tmp_path: Path, teachers: dict[str, Path], free_port: int) -> None:
    """In two micro-batches each, as one process with the whole batch."""
    changes = DISTIL | {"teacher__distil_from": teachers["shared"], "optim__epochs": 1}
    changes |= {"train__centering": "sinkhorn_knopp", "dino__koleo_distributed": "true"}
    nothing = yaml_of_nothing(tmp_path)
    assert main([nothing, *words(tmp_path / "one", **changes)]) == 0
    changes |= {"train__batch_size_per_gpu": 4, "train__microbatch_size": 2, "parallelism__strategy": strategy}
    started = processes.start_ranks([nothing, *words(tmp_path / "two", **changes)], 2, free_port, shard_on_cpu)
    assert [processes.finish(rank) for rank in started] == [0, 0]
    ours, theirs = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        for name in (name for name in a if name.startswith(("loss/", "grad_norm/", "teacher/"))):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-9), (a["iteration"], name)


def test_heads_follow_the_file_or_are_refused(
    tmp_path: Path, teachers: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    loaded = load_config("vits16", ["recipes=[distil]", f"teacher.distil_from={teachers['separate']}"])
    assert loaded.config.dino.head_n_prototypes == 40 and loaded.config.ibot.head_n_prototypes == 24
    assert loaded.config.ibot.separate_head
    assert loaded.origin["dino.head_n_prototypes"] == "the file of teacher.distil_from"
    backbone = tmp_path / "backbone.safetensors"
    save_file({n.partition(".")[2]: w for n, w in load_file(teachers["shared"]).items()}, backbone)
    refused = {
        ("dino__head_n_prototypes", 32): "has 40 prototypes, the student's 32; type dino.head_n_prototypes=40",
        ("student__patch_size", 8): "its patches have 4 px, the student's 8, and iBOT compares them one by one; type",
        ("crops__mean", "[0.5,0.5,0.5]"): "crops.mean=[0.485,0.456,0.406]",
        ("teacher__distil_from", tmp_path / "no"): "no does not exist",
        ("teacher__distil_from", backbone): "Train heads on it first: recipes=[from_pretrained]",
        ("teacher__distil_from", tmp_path): "this is a folder. Give a run's teacher.safetensors",
    }
    for (name, value), message in refused.items():
        changes = DISTIL | {"teacher__distil_from": teachers["shared"], name: value}
        assert main([yaml_of_nothing(tmp_path), *words(tmp_path / "run", **changes)]) == 2, name
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    other = {"student__patch_size": 8, "ibot__loss_weight": 0, "crops__local_crops_size": 8}
    model, batch = model_and_batch(configured(teachers["shared"], **other))
    assert torch.isfinite(model.loss(model(batch), batch)["total"]), "without iBOT patches need not be alike"


def test_who_never_saw_patches_cannot_teach_them(tmp_path: Path, teachers: dict[str, Path]) -> None:
    with safe_open(next(iter(teachers.values())), "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    settings = yaml.safe_load(about["config"])
    settings["ibot"]["loss_weight"] = 0.0
    save_file(tensors, tmp_path / "t.safetensors", metadata=about | {"config": yaml.safe_dump(settings)})
    assert read_frozen_teacher(str(next(iter(teachers.values())))).knows_patches
    config = load_config(None, [f"teacher.distil_from={tmp_path / 't.safetensors'}", "recipes=[distil]"]).config
    with pytest.raises(WeightsError, match=r"never saw a patch; type ibot\.loss_weight=0"):
        frozen_teacher(config)


def test_the_plan_knows_the_frozen_teacher(teachers: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    changes = DISTIL | {"teacher__distil_from": teachers["shared"]}
    command(["plan", "quickstart", *words(Path("nowhere"), **changes)])
    said = capsys.readouterr().out
    assert "3 blocks, 48 wide, 4 heads, mlp; dino_head of 40 prototypes" in said
    numbers = sum(w.numel() for w in load_file(teachers["shared"]).values())
    assert f"{numbers:,}, neither trained nor saved" in said
    with_it, without = configured(teachers["shared"]), configured(teachers["shared"], teacher__distil_from="''")
    more = plan_memory(with_it, 1).memory.weights - plan_memory(without, 1).memory.weights
    assert more == 4 * numbers
    assert plan_memory(without, 1).memory.weights == 8 * sum(count_parameters(without).values())
    assert json.loads(read_about(teachers["shared"])["architecture"])["embed_dim"] == 48


def test_what_is_unlike_the_paper_is_said(teachers: dict[str, Path]) -> None:
    def said(*given: str) -> str:
        config = load_config("quickstart", [*given]).config
        return " ".join(advice.what for advice in warnings(config, 1, 1438))

    frozen = f"teacher.distil_from={teachers['shared']}"
    ours = ["dino.head_n_prototypes=40", frozen]
    assert "a frozen teacher with ibot.mask_sample_probability=0.5, ibot.all_patches=false" in said(*ours)
    assert "a frozen teacher" not in said("recipes=[distil]", *ours)
    assert "ibot.all_patches=true without teacher.distil_from" in said("recipes=[distil]")
