"""What follows from a configuration, which combinations are refused, and what is warned about."""

from dataclasses import replace

import pytest

from dinocomp.config import Config, load_config
from dinocomp.config import derive as d
from dinocomp.config.advice import warnings, when_features_do_not_improve
from dinocomp.config.auto import Facts
from dinocomp.config.derive import HeadSize
from dinocomp.errors import ConfigError


def made(*words: str) -> Config:
    return load_config(None, words).config


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, words)
    return str(caught.value)


def test_lengths_and_learning_rate() -> None:
    config = made("optim.epochs=70", "train.OFFICIAL_EPOCH_LENGTH=11", "train.batch_size_per_gpu=16")
    assert d.total_iterations(config) == 770
    assert d.checkpoint_interval(config) == 33
    assert d.images_per_iteration(config, 16) == 256
    assert d.peak_learning_rate(config, 16) == pytest.approx(0.002)
    assert d.passes(config, 16, 770 * 128) == 2
    assert d.peak_learning_rate(made("optim.lr=0.5"), 16) == 0.5


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (["student.arch=vit_small"], (384, 12, 6, 4.0)),
        (["student.arch=vit_base_memeff"], (768, 12, 12, 4.0)),
        ([], (1024, 24, 16, 4.0)),
        (["student.arch=vit_giant2"], (1536, 40, 24, 4.0)),
        (["student.arch=vit_small", "student.depth=2", "student.mlp_ratio=2"], (384, 2, 6, 2.0)),
        (
            ["student.arch=custom", "student.embed_dim=96", "student.depth=3", "student.num_heads=3"],
            (96, 3, 3, 4.0),
        ),
    ],
)
def test_architecture(words: list[str], size: tuple[int, int, int, float]) -> None:
    found = d.architecture(made(*words).student)
    assert tuple(found) == size
    assert (found.embed_dim, found.depth, found.num_heads, found.mlp_ratio) == size


def test_heads() -> None:
    shared = HeadSize(prototypes=65536, bottleneck=256, layers=3, hidden=2048)
    assert d.head_sizes(made()) == {"dino_head": shared}
    assert d.head_sizes(made("dino.loss_weight=0")) == {"dino_head": shared}, "iBOT uses it"
    own = made("ibot.separate_head=true", "ibot.head_n_prototypes=8", "ibot.head_bottleneck_dim=4")
    assert d.head_sizes(own) == {"dino_head": shared, "ibot_head": HeadSize(8, 4, 3, 2048)}
    assert list(d.head_sizes(made("ibot.separate_head=true", "dino.loss_weight=0"))) == ["ibot_head"]
    assert list(d.head_sizes(made("ibot.separate_head=true", "ibot.loss_weight=0"))) == ["dino_head"]
    assert d.head_sizes(made("dino.loss_weight=0", "ibot.loss_weight=0")) == {}


def test_precision() -> None:
    asked = "compute_precision.student.backbone.mixed_precision.param_dtype"
    assert (d.precision(made(), True), d.precision(made(), False)) == ("bf16", "fp32")
    assert d.precision(made(f"{asked}=fp32"), True) == "fp32"
    assert d.precision(made(f"{asked}=bf16"), True) == "bf16"
    assert d.precision(made(f"{asked}=bf16"), False) == "fp32"
    for wanted in ("fp32", "bf16", "fp16"):
        assert d.precision(made(f"performance.precision={wanted}", f"{asked}=bf16"), True) == wanted
    for wanted in ("bf16", "fp16"):
        with pytest.raises(ConfigError, match=r"performance\.precision=fp32"):
            d.precision(made(f"performance.precision={wanted}"), False)


def test_the_first_phase_of_a_curriculum() -> None:
    """Half the sides, up to whole patches, unless they are given; the rest of the run is as it was."""
    assert d.first_phase(made()) is None and d.first_phase(made("curriculum.fraction=1e-9")) is None
    words = ["curriculum.fraction=0.75", "optim.epochs=100", "train.OFFICIAL_EPOCH_LENGTH=10"]
    for more, sizes in [
        ([], (112, 48)),
        (["student.patch_size=14", "crops.local_crops_size=98"], (112, 56)),
        (["curriculum.global_crops_size=160"], (160, 48)),
    ]:
        config = made(*words, *more)
        iterations, smaller = d.first_phase(config)
        assert iterations == 750
        assert (smaller.crops.global_crops_size, smaller.crops.local_crops_size) == sizes
        assert replace(smaller, crops=config.crops) == config
    assert d.global_patches(smaller) == 100 and d.evaluation_crop(config) == (256, 224)


def test_evaluation_crop() -> None:
    assert d.evaluation_crop(made()) == (256, 224)
    assert d.evaluation_crop(load_config("quickstart").config)[1] == 16
    assert d.evaluation_crop(load_config("vits14", ["recipes=high_resolution"]).config) == (592, 518)
    assert d.global_patches(made()) == 196


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["student.patch_size=14"], "crops.local_crops_size=98"),
        (["crops.global_crops_size=225"], "crops.global_crops_size=224"),
        (["student.num_heads=7"], "does not divide"),
        (["student.arch=custom", "student.depth=2"], "student.embed_dim, student.num_heads"),
        (["student.arch=vit_huge"], "vit_large, vit_giant2, custom"),
        (["optim.epochs=5"], "optim.warmup_epochs=0"),
        (["optim.freeze_last_layer_epochs=101"], "optim.freeze_last_layer_epochs"),
        (["ibot.mask_ratio_min_max=[0.5,0.1]"], "ibot.mask_ratio_min_max=[0.1,0.5]"),
        (["ibot.mask_ratio_min_max=[0.0,0.001]"], "196 patches"),
        (["ibot.mask_sample_probability=0"], "ibot.loss_weight=0"),
        (["crops.global_crops_scale=[1.0,0.32]"], "crops.global_crops_scale=[0.32,1]"),
        (["crops.blur_sigma=[2,1]"], "crops.blur_sigma=[1,2]"),
        (["crops.blur_kernel_size=8"], "crops.blur_kernel_size=9"),
        (["evaluation.knn_k=[]"], "evaluation.knn_k=[20]"),
        (["dino.loss_weight=0", "ibot.loss_weight=0", "dino.koleo_loss_weight=0"], "nothing is left"),
        (["dino.loss_weight=0", "ibot.loss_weight=0", "optim.freeze_backbone_epochs=1"], "freeze_backbone_epochs=0"),
        (["train.device=cpu", "performance.precision=fp16"], "performance.precision=fp32"),
        (["train.device=cpu", "performance.attention=xformers"], "performance.attention=sdpa"),
        (["curriculum.global_crops_size=240", "curriculum.fraction=0.5"], "type curriculum.global_crops_size=224"),
        (["curriculum.local_crops_size=50", "curriculum.fraction=0.5"], "type curriculum.local_crops_size=48 or"),
        (["crops.blur_kernel_size=99", "curriculum.fraction=0.5"], "type curriculum.local_crops_size=64 or more"),
        (["ibot.mask_ratio_min_max=[0,0.02]", "curriculum.fraction=0.5"], "of 49 patches none is ever masked"),
    ],
)
def test_impossible_combinations_are_refused_with_a_remedy(words: list[str], expected: str) -> None:
    message = refused(*words)
    assert expected in message
    assert words[0].partition("=")[0] in message and "(command line)" in message


@pytest.mark.parametrize(
    "words",
    [
        ["crops.local_crops_number=0", "crops.local_crops_size=97"],
        ["ibot.loss_weight=0", "ibot.mask_sample_probability=0"],
        ["dino.loss_weight=0"],
        ["dino.loss_weight=0", "ibot.loss_weight=0"],
        ["optim.epochs=10"],
        ["optim.freeze_last_layer_epochs=100", "optim.warmup_epochs=100"],
        ["student.layerscale=0"],
        ["optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=0", "teacher.warmup_teacher_temp_epochs=0"],
    ],
)
def test_switches_that_the_reference_stumbles_over_are_taken(words: list[str]) -> None:
    made(*words)


def test_a_sound_run_is_not_warned_about() -> None:
    assert warnings(load_config("vitl16_short").config, 32, 1_281_167) == []
    assert warnings(load_config("vitl14").config, 96, 14_197_087) == []
    assert warnings(load_config("imagenet100").config, 1, 126_689) == []
    going_on = load_config("quickstart", ["recipes=[from_pretrained]", "student.pretrained_weights=a"]).config
    assert not any("start" in advice.what for advice in warnings(going_on, 1, 100_000))
    assert warnings(load_config("quickstart").config, 1, 1437) == []
    words = ["recipes=[small_data]", "train.batch_size_per_gpu=64", "optim.epochs=10"]
    few = load_config("vits16", words, Facts(5_679, 64)).config
    assert warnings(few, 1, 5_679) == []
    of_32 = load_config("vits16", [words[0], "train.batch_size_per_gpu=32", words[2]], Facts(5_679, 64)).config
    assert warnings(of_32, 1, 5_679) == []


@pytest.mark.parametrize(
    ("words", "size", "what", "remedy"),
    [
        (["train.batch_size_per_gpu=32"], None, "32 images an iteration", "64 images or more"),
        (
            ["train.batch_size_per_gpu=31", "train.centering=sinkhorn_knopp"],
            None,
            "31 images an iteration",
            "32 images or more",
        ),
        (["train.batch_size_per_gpu=1"], None, "KoLeo has no second image", "no_koleo"),
        (["train.microbatch_size=1"], None, "drop path of 0.3 is 0.5 of 2 global crops", "raise train.microbatch_size"),
        (["ibot.mask_sample_probability=0.001"], None, "no patch is ever masked", "0.0078"),
        (["performance.precision=fp16"], None, "fp16 with KoLeo", "bf16"),
        (["dino.loss_weight=0"], None, "unstable", "dino.loss_weight=1"),
        (["teacher.teacher_temp=0.1"], None, "collapse", "teacher.teacher_temp=0.07"),
        (["MODEL.WEIGHTS=a", "student.pretrained_weights=b"], None, "both given", "one of them"),
        (["optim.epochs=10"], None, "only rises", "optim.warmup_epochs=1"),
        (["optim.freeze_last_layer_epochs=100"], None, "never learns", "freeze_last_layer_epochs=0"),
        (["optim.epochs=20"], None, "is never reached", "teacher.warmup_teacher_temp_epochs=6"),
        (["train.OFFICIAL_EPOCH_LENGTH=1"], None, "random start", "teacher.momentum_teacher=0.8"),
        (["optim.freeze_backbone_epochs=1"], None, "at its random start", "student.pretrained_weights"),
        (["optim.freeze_backbone_epochs=99", "MODEL.WEIGHTS=a", "optim.epochs=99"], None, "never learns", "epochs=1,"),
        (["teacher.momentum_teacher=1"], None, "never leaves", "teacher.momentum_teacher=0.992"),
        (["teacher.final_momentum_teacher=0.9"], None, "ever more closely", "final_momentum_teacher=1.0"),
        (["optim.lr=1e-7"], None, "above the peak", "optim.min_lr=1e-10"),
        (["checkpoint.save_frequency=101"], None, "starts over", "checkpoint.save_frequency=1"),
        ([], 1437, "1,437 images are few", "add recipes=[small_data]"),
        ([], 1437, "65,536 prototypes in dino_head", "dino.head_n_prototypes=128"),
        ([], 12_000, "65,536 prototypes in dino_head", "dino.head_n_prototypes=512"),
        (["ibot.separate_head=true"], 50_000, "prototypes in ibot_head", "ibot.head_n_prototypes=2048"),
        ([], 40, "several times", "train.batch_size_per_gpu=20"),
        ([], 1437, "passes over the data", "optim.epochs=5"),
        ([], 10**9, "sees only 1%", "optim.epochs=12500"),
    ],
)
def test_settings_known_to_fail_are_warned_about(words: list[str], size: int | None, what: str, remedy: str) -> None:
    found = [advice for advice in warnings(made(*words), 1, size) if what in advice.what]
    assert len(found) == 1, [advice.what for advice in warnings(made(*words), 1, size)]
    assert remedy in found[0].remedy
    sound = load_config("vitl16_short").config
    assert not any(what in advice.what for advice in warnings(sound, 32, 1_281_167))


SMALL = ("train.centering=sinkhorn_knopp", "student.layerscale=null", "student.pos_embed_std=0.5")
SMALL += ("student.linear_init=lecun_normal",)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ((), "recipes=[small_data], LONGER, optim.base_lr=0.002 (half of it)"),
        (SMALL, "LONGER, dino.koleo_loss_weight=0.3, optim.base_lr=0.002 (half of it)"),
        (
            (*SMALL, "dino.koleo_loss_weight=0.3"),
            "LONGER, dino.koleo_loss_weight=0.1, optim.base_lr=0.002 (half of it)",
        ),
        ((*SMALL, "optim.lr=0.001"), "LONGER, dino.koleo_loss_weight=0.3, optim.lr=0.0005 (half of it)"),
        ((*SMALL, "train.centering=centering"), "recipes=[small_data], LONGER, optim.base_lr=0.002 (half of it)"),
        ((*SMALL, "student.layerscale=1e-5"), "recipes=[small_data], LONGER, optim.base_lr=0.002 (half of it)"),
        ((*SMALL, "student.layerscale=0.1"), "LONGER, dino.koleo_loss_weight=0.3, optim.base_lr=0.002 (half of it)"),
        ((*SMALL, "student.layerscale=0"), "LONGER, dino.koleo_loss_weight=0.3, optim.base_lr=0.002 (half of it)"),
        ((*SMALL, "student.pos_embed_std=0.02"), "recipes=[small_data], LONGER, optim.base_lr=0.002 (half of it)"),
        (
            (*SMALL, "student.pos_embed_std=100"),
            "student.pos_embed_std=2, LONGER, dino.koleo_loss_weight=0.3, optim.base_lr=0.002 (half of it)",
        ),
        (
            (*SMALL, "student.linear_init=normal_0.02"),
            "student.linear_init=lecun_normal, LONGER, dino.koleo_loss_weight=0.3, optim.base_lr=0.002 (half of it)",
        ),
        (
            (*SMALL, "dino.koleo_loss_weight=0"),
            "dino.koleo_loss_weight=0.1, LONGER, optim.base_lr=0.002 (half of it)",
        ),
        (
            (*SMALL, "dino.koleo_loss_weight=0", "performance.precision=fp16"),
            "LONGER, optim.base_lr=0.002 (half of it)",
        ),
        ((*SMALL, "performance.precision=fp16"), "LONGER, optim.base_lr=0.002 (half of it)"),
        (("student.pretrained_weights=a",), "recipes=[sinkhorn], LONGER, optim.base_lr=0.002 (half of it)"),
        (("MODEL.WEIGHTS=a", SMALL[0]), "LONGER, optim.base_lr=0.002 (half of it)"),
    ],
)
def test_what_to_change_where_features_do_not_improve(words: tuple[str, ...], advice: str) -> None:
    """Only what is not so already."""
    given = {word.partition("=")[0]: word for word in words}  # the last one counts
    found = when_features_do_not_improve(made(*given.values()))
    longer = "optim.epochs=200 (twice as long, where it still rises)"
    assert found == f"try in a new train.output_dir, one after the other: {advice.replace('LONGER', longer)}"
    assert when_features_do_not_improve(made(*given.values()), 30_000) == found
    for few, processes in ((5_679, 1), (30_000, 8)):
        enough = when_features_do_not_improve(made(*given.values()), few, processes)
        assert enough == found.replace(f"{longer}, ", ""), "they see each image a thousand times"
    assert "small_data" not in when_features_do_not_improve(made(*given.values()), 1_281_167), "made for few images"


def test_koleo_is_no_help_where_an_image_has_no_second_one() -> None:
    for weight in (0, 0.1):
        words = [*SMALL, "train.batch_size_per_gpu=1", f"dino.koleo_loss_weight={weight}"]
        assert "koleo" not in when_features_do_not_improve(made(*words), 5_679, 2)
        across = made(*words, "dino.koleo_distributed=true")
        assert "koleo" in when_features_do_not_improve(across, 5_679, 2)
        assert not any("second image" in advice.what for advice in warnings(across, 2, 5_679))
