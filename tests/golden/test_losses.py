"""The loss terms and teacher targets against the reference's numbers."""

from pathlib import Path

import torch

from dinocomp.method.losses import Centering, SinkhornKnopp, dino_loss, ibot_loss, koleo_loss

from .conftest import assert_close, read


def test_dino_loss(dino_loss_file: Path) -> None:
    recording = read(dino_loss_file)
    meta, tensors = recording.meta, recording.tensors
    centering = Centering(meta["out_dim"], meta["center_momentum"])
    for i, temperature in enumerate(meta["teacher_temps"]):
        target = centering(tensors[f"centering.{i}.teacher"], temperature)
        centering.step()
        assert_close(target.dense(), tensors[f"centering.{i}.target"], 1e-5, f"target {i}")
        student = tensors[f"centering.{i}.student"].requires_grad_()
        views = student.unflatten(0, (2, -1))  # [2, B, K]
        # Recorded as the sum over every (student crop, teacher crop) pair: what our local part does for 2 local crops,
        # where it divides by the 2 + 2 * 2 pairs.
        _, local_part = dino_loss(target, views, views, meta["student_temp"])
        loss = 6 * local_part
        (gradient,) = torch.autograd.grad(loss, student)
        assert_close(loss, tensors[f"centering.{i}.loss"], 1e-5, f"loss {i}")
        assert_close(gradient, tensors[f"centering.{i}.grad"], 1e-4, f"gradient {i}")
    assert_close(centering.center, tensors["centering.center"], 1e-5, "centre")
    target = SinkhornKnopp(3)(tensors["sinkhorn.teacher"], meta["sinkhorn_temp"])
    assert_close(target.dense(), tensors["sinkhorn.target"], 1e-5, "sinkhorn target")


def test_ibot_loss(ibot_loss_file: Path) -> None:
    recording = read(ibot_loss_file)
    meta, tensors = recording.meta, recording.tensors
    centering = Centering(meta["patch_out_dim"], meta["center_momentum"])
    batches = sorted(int(name.split(".")[0]) for name in tensors if name.endswith(".loss"))
    for i in batches:
        masks, teacher = tensors[f"{i}.masks"], tensors[f"{i}.teacher"]
        target = centering(teacher, meta["teacher_temp"])
        centering.step()
        assert_close(target.dense(), tensors[f"{i}.target"], 1e-5, f"target {i}")
        sinkhorn = SinkhornKnopp(3)(teacher, meta["teacher_temp"])
        assert_close(sinkhorn.dense(), tensors[f"{i}.sinkhorn_target"], 1e-5, f"sinkhorn target {i}")
        weight = (1 / masks.sum(dim=1, keepdim=True).clamp_min(1)).expand_as(masks)[masks]  # [rows]
        student = tensors[f"{i}.student"].requires_grad_()
        loss = ibot_loss(target, student, weight, len(masks), meta["student_temp"])
        (gradient,) = torch.autograd.grad(loss, student)
        # Recorded as the loss function returns it, before any weight.
        assert_close(loss, tensors[f"{i}.loss"], 1e-5, f"loss {i}")
        assert_close(gradient, tensors[f"{i}.grad"], 1e-4, f"gradient {i}")
    assert_close(centering.center, tensors["center"].flatten(0, 1), 1e-5, "centre")


def test_koleo_loss(koleo_loss_file: Path) -> None:
    tensors = read(koleo_loss_file).tensors
    x = tensors["in.x"].requires_grad_()
    loss = koleo_loss(x)
    (gradient,) = torch.autograd.grad(loss, x)
    assert_close(loss, tensors["out.loss"], 1e-5, "loss")
    assert_close(gradient, tensors["out.grad"], 1e-4, "gradient")
