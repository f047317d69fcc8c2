"""A last phase with larger crops, from the weights of a run."""

import logging
from pathlib import Path

import pytest
import torch
from composer.utils import dist, get_device

from dinocomp.build import build_run, check_start
from dinocomp.build.optim import build_schedules
from dinocomp.config import load_config
from dinocomp.interop.adapt import resample_patch_embed, resample_pos_embed
from dinocomp.train import main

from .helpers import load_checkpoint, metrics, words, yaml_of_nothing

pytestmark = pytest.mark.usefixtures("one_cache")


def test_student_and_teacher_are_resampled_and_all_else_is_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From a checkpoint, at 24 px instead of 16, and with patches of 6 px instead of 4; then it trains."""
    nothing = yaml_of_nothing(tmp_path)
    assert main([nothing, *words(tmp_path / "first", optim__epochs=1)]) == 0
    saved = load_checkpoint(tmp_path / "first", 4)["state"]["model"]
    assert not torch.equal(saved["student_backbone.net.pos_embed"], saved["teacher_backbone.net.pos_embed"])
    dist.initialize_dist(get_device("cpu"))
    larger = {"crops__global_crops_size": 24, "MODEL__WEIGHTS": tmp_path / "first/checkpoints/iteration-00000004"}
    for name, patch in (("same", {}), ("other", {"student__patch_size": 6, "crops__local_crops_size": 12})):
        config = load_config(None, words(tmp_path / name, **larger | patch)).config
        with caplog.at_level(logging.INFO, "dinocomp"):
            caplog.clear()
            run = build_run(config, check_start(config))
        said = [record.getMessage() for record in caplog.records if "are resampled" in record.getMessage()]
        what = "patch projection from 4 to 6 px" if patch else "position embeddings from 4 x 4 to 6 x 6 patches"
        assert len(said) == 1 and what in said[0] and "student's and teacher's" in said[0]
        for tensor, found in run.model.state_dict().items():
            expected = saved[tensor]
            if tensor.endswith("pos_embed") and not patch:
                expected = resample_pos_embed(expected, 6)
            elif tensor.endswith("patch_embed.proj.weight") and patch:
                expected = resample_patch_embed(expected, 6)
            assert torch.equal(found, expected), tensor
        assert run.model.dino_targets.center.any()
        run.trainer.close()
    assert main([nothing, *words(tmp_path / "same", **larger, optim__epochs=1)]) == 0
    assert len(metrics(tmp_path / "same")) == 4


def test_heads_of_another_size_are_still_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nothing = yaml_of_nothing(tmp_path)
    assert main([nothing, *words(tmp_path / "first", optim__epochs=1)]) == 0
    teacher = tmp_path / "first" / "teacher.safetensors"
    for key, value in (("dino__head_n_prototypes", 40), ("student__num_register_tokens", 2)):
        changes = {"MODEL__WEIGHTS": teacher, "crops__global_crops_size": 24, key: value}
        assert main([nothing, *words(tmp_path / "second", **changes)]) == 2
        assert "do not fit the configured network" in capsys.readouterr().err


@pytest.mark.parametrize("run", ["vitl14", "vits16"])
def test_the_recipe_is_the_long_schedule_in_10_000_iterations(run: str) -> None:
    before, after = load_config("vitl14").config, load_config(run, ["recipes=high_resolution"]).config
    assert (after.crops.global_crops_size, after.student.patch_size) == (518, 14)
    long, short = build_schedules(before, 96), build_schedules(after, 96)
    assert (long.total, short.total) == (625_000, 10_000)
    for name in ("warmup", "teacher_temp_warmup", "freeze_last_layer"):
        assert getattr(short, name) / short.total == getattr(long, name) / long.total, name
    assert short.lr == pytest.approx(1e-4 * (8 * 96 / 1024) ** 0.5)
    own = load_config(run).config
    assert (
        after.dino == own.dino
        and after.ibot == own.ibot
        and after.teacher.momentum_teacher == (own.teacher.momentum_teacher)
    )
