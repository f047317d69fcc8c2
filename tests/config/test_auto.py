"""What `auto` stands for."""

import re
from pathlib import Path

import pytest

from dinocomp.config import load_config
from dinocomp.config.advice import warnings
from dinocomp.config.auto import ASSUMED_IMAGES, RULES, Facts, choose, prototypes_for
from dinocomp.config.keys import walk
from dinocomp.config.load import LoadedConfig, all_keys
from dinocomp.config.plan import describe
from dinocomp.config.schema import Config
from dinocomp.errors import ConfigError

SMALL = ["recipes=[small_data]", "train.batch_size_per_gpu=64", "student.patch_size=8"]


def chosen(loaded: LoadedConfig) -> dict[str, object]:
    return {choice.key: choice.value for choice in loaded.chosen}


def test_every_key_that_takes_auto_has_a_rule_whose_values_it_takes() -> None:
    assert {spec.name for spec in all_keys().values() if spec.auto} == set(RULES)
    words = [f"{name}=auto" for name in RULES]
    for facts in (Facts(), Facts(40, 8, 1), Facts(5_679, 64, 1), Facts(200_000, 500, 8), Facts(14_000_000, 300, 96)):
        loaded = load_config("quickstart", words, facts)  # which refuses what is out of range
        assert set(chosen(loaded)) == set(RULES)
        values = {spec.name: spec.default for spec in walk(loaded.config)}
        assert all(values[name] == value for name, value in chosen(loaded).items())
        assert all(choice.reason and "\n" not in str(choice) for choice in loaded.chosen)


def test_with_data_as_large_as_the_references_the_rules_come_to_its_values() -> None:
    words = ["train.batch_size_per_gpu=64", "student.patch_size=16", *(f"{name}=auto" for name in RULES)]
    found, defaults = chosen(load_config(None, words, Facts(1_281_167, 400, 32))), all_keys()
    assert {name: value for name, value in found.items() if value != defaults[name].default} == {}


def test_prototypes_follow_the_data() -> None:
    assert [prototypes_for(n) for n in (0, 1, 1437, 5_679, 20_000, 126_689, 1_281_167, 10**9)] == [
        *(128, 128, 128, 256, 1024, 4096, 65536, 65536)
    ]


def test_a_word_of_the_command_line_stands_against_the_recipe() -> None:
    loaded = load_config("vits16", [*SMALL, "dino.head_n_prototypes=77"], Facts(5_679, 64))
    assert loaded.config.dino.head_n_prototypes == 77 and "dino.head_n_prototypes" not in chosen(loaded)
    assert loaded.config.ibot.head_n_prototypes == 256
    assert load_config("vits16", SMALL).config.dino.head_n_prototypes == prototypes_for(ASSUMED_IMAGES)


def test_the_quickstart_is_what_the_recipe_makes_of_it() -> None:
    written_out = load_config("quickstart").config
    words = ["recipes=[small_data]", "ibot.head_n_prototypes=65536"]  # of a head that it has not
    words += ["crops.global_crops_scale=[0.6,1.0]", "crops.local_crops_scale=[0.3,0.6]"]  # more of a digit, and its
    words += ["crops.color_jitter_probability=0"]  # colours as they are
    words += ["dino.koleo_loss_weight=0.1"]  # with which digits ended higher
    assert load_config("quickstart", words, Facts(1_438, 8)).config == written_out
    assert load_config("quickstart", words, Facts(5_679, 64)).config != written_out


def test_crops_are_as_large_as_images() -> None:
    def sizes(side: int | None, patch: int) -> tuple[int, int, int]:
        words = ["crops.global_crops_size=auto", "crops.local_crops_size=auto", "crops.local_crops_number=auto"]
        crops = load_config("vits16", [*words, f"student.patch_size={patch}"], Facts(5_679, side)).config.crops
        return crops.global_crops_size, crops.local_crops_size, crops.local_crops_number

    assert sizes(400, 16) == sizes(None, 16) == (224, 96, 8)
    assert sizes(400, 14) == (224, 98, 8)
    assert sizes(64, 8) == (64, 24, 2)
    assert sizes(60, 8) == (64, 24, 2), "whole patches"
    assert sizes(8, 4) == (16, 8, 2), "some patches, however small the image"


def test_a_run_that_goes_on_keeps_what_it_began_with() -> None:
    loaded = load_config("vits16", SMALL, Facts(5_679, 64, settled={"dino.head_n_prototypes": 4096}))
    assert loaded.config.dino.head_n_prototypes == 4096
    assert loaded.config.ibot.head_n_prototypes == 256
    (choice,) = (choice for choice in loaded.chosen if choice.key == "dino.head_n_prototypes")
    assert "as this run began" in str(choice)


def test_rules_see_what_was_chosen_before_them() -> None:
    keys = ["crops.local_crops_number", "crops.local_crops_size", "crops.global_crops_size"]
    config, found = choose(Config(), keys, Facts(5_679, 64))
    assert [choice.key for choice in found] == keys[::-1]
    assert (config.crops.global_crops_size, config.crops.local_crops_size, config.crops.local_crops_number) == (
        64,
        32,
        2,
    )


def test_learning_rate_falls_smoothly_to_half() -> None:
    def rate(images: int, gpus: int = 1) -> float:
        words = ["optim.base_lr=auto", f"train.batch_size_per_gpu={images}"]
        return load_config("vits16", words, Facts(world_size=gpus)).config.optim.base_lr

    assert [rate(64), rate(256), rate(64, 16), rate(1024, 8)] == [0.002, 0.002, 0.004, 0.004]
    assert 0.002 < rate(511) < rate(512) == rate(64, 8) < rate(513) < 0.004
    assert rate(512) - rate(511) < 1e-5


def test_positions_begin_alike_where_patches_are_many_and_images_few() -> None:
    def blur(side: int, patch: int, images: int) -> float:
        words = ["recipes=[small_data]", f"student.patch_size={patch}"]
        return load_config("vits16", words, Facts(images, side)).config.student.pos_embed_blur

    assert [blur(64, 16, 5_679), blur(40, 8, 5_679), blur(48, 8, 5_679), blur(64, 8, 5_679)] == [0, 0, 0.125, 0.125]
    assert blur(224, 16, 999_999) == 0.125 and blur(224, 16, 1_000_000) == Config().student.pos_embed_blur


def test_reasons_say_which_bound_holds() -> None:
    def momentum(iterations: int) -> tuple[float, str]:
        words = ["teacher.momentum_teacher=auto", f"train.OFFICIAL_EPOCH_LENGTH={iterations}", "optim.epochs=1"]
        (choice,) = load_config("vits16", [*words, "optim.warmup_epochs=0"]).chosen
        return choice.value, choice.reason

    assert momentum(1000) == (0.98, "averages over 50 iterations: a twentieth of 1,000")
    most = "averages over 125 iterations, as the reference's and the most; a twentieth of 250,000 is 12,500"
    assert momentum(250_000) == (0.992, most)
    assert momentum(30) == (0.5, "averages over 2 iterations, the fewest; a twentieth of 30 is 1.5")


def test_nothing_is_said_against_what_auto_chooses() -> None:
    for epochs, length, batch in ((1, 5000, 64), (1, 10, 64), (3, 10, 64), (10, 50, 64), (400, 250, 1024)):
        words = [f"optim.epochs={epochs}", f"train.OFFICIAL_EPOCH_LENGTH={length}", f"train.batch_size_per_gpu={batch}"]
        words += ["recipes=[small_data]", "student.patch_size=8", "optim.freeze_last_layer_epochs=0"]
        loaded = load_config("vits16", words, Facts(20_000, 64))
        told = " ".join(advice.remedy for advice in warnings(loaded.config, 1, 20_000))
        assert not [choice.key for choice in loaded.chosen if choice.key in told]


def test_short_runs_warm_up_too() -> None:
    words = ["optim.warmup_epochs=auto", "teacher.warmup_teacher_temp_epochs=auto", "optim.epochs=5"]
    found = chosen(load_config("vits16", words, Facts(5_679, 64)))
    assert found == {"teacher.warmup_teacher_temp_epochs": 2, "optim.warmup_epochs": 1}
    words = ["teacher.teacher_temp=auto", "teacher.warmup_teacher_temp=0.06"]
    assert chosen(load_config("vits16", words, Facts(5_679, 64))) == {"teacher.teacher_temp": 0.06}, "it does not fall"


def test_nothing_is_said_against_values_that_are_not_chosen_yet() -> None:
    words = ["crops.global_crops_size=auto", "curriculum.fraction=0.5", "curriculum.global_crops_size=128"]
    with pytest.raises(ConfigError, match="crops would shrink from 128 to 64 px"):
        load_config("vits16", words, Facts(5_679, 64))
    assert load_config("vits16", [*words[:2], "curriculum.global_crops_size=320"]).chosen


def test_what_refers_to_an_auto_is_refused() -> None:
    words = ["crops.global_crops_size=auto", "crops.local_crops_size=${crops.global_crops_size}"]
    with pytest.raises(ConfigError, match=r"crops.local_crops_size.*that is auto; type a value"):
        load_config("vits16", words)
    with pytest.raises(ConfigError, match="expected whole number, or auto"):
        load_config("vits16", ["dino.head_n_prototypes=Auto"])


@pytest.mark.parametrize("word", ["student.depth=auto", "dino.head_n_prototypes=automatic", "crops.aspect_ratio=auto"])
def test_other_words_and_other_keys_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=word.partition("=")[0]):
        load_config("quickstart", [word])


def test_a_plan_gives_the_reasons() -> None:
    text = describe(load_config("vits16", SMALL, Facts(5_679, 64)), 1, 5_679, {})
    assert "Chosen where it says auto" in text
    reason = "a power of two from 128 to 65,536, one for 16 of 5,679 images"
    assert re.search(rf"dino.head_n_prototypes +256 +{reason}\n", text)
    assert re.search(r"ibot.head_n_prototypes +256 +of no use: ibot.separate_head=false\n", text)
    assert "assumed: they are not counted yet" in describe(load_config("vits16", SMALL), 1, None, {})
    assert "auto" not in describe(load_config("vits16"), 1, 5_679, {})


def test_chosen_values_are_checked_like_others(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not tile"):
        load_config("quickstart", ["crops.global_crops_size=30", "crops.local_crops_size=auto"])
