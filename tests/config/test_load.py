"""Merging: the order of layers, where values came from, and every way a value can be wrong."""

from pathlib import Path

import pytest

from dinocomp.config import Config, all_keys, load_config
from dinocomp.errors import ConfigError


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(*overrides: str, yaml: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(yaml, overrides)
    return str(caught.value)


def test_no_yaml_gives_the_defaults() -> None:
    loaded = load_config(None)
    assert loaded.config == Config()
    assert loaded.origin == {} and loaded.notices == [] and loaded.recipes == []


def test_layers_lie_over_each_other_in_order(tmp_path: Path) -> None:
    first = write(tmp_path, "first.yaml", "optim: {epochs: 51, base_lr: 0.2, clip_grad: 2.0}\n")
    second = write(tmp_path, "second.yaml", "optim: {epochs: 52, base_lr: 0.3}\n")
    third = write(tmp_path, "third.yaml", "optim: {epochs: 53}\n")
    run = write(tmp_path, "run.yaml", f"recipes: [{first}]\noptim: {{epochs: 50, min_lr: 0.5, clip_grad: 1.0}}\n")
    loaded = load_config(run, [f"recipes=[{second},{third}]", "optim.weight_decay=0.7", "optim.weight_decay=0.6"])
    optim = loaded.config.optim
    assert (optim.epochs, optim.base_lr, optim.clip_grad, optim.min_lr, optim.weight_decay) == (53, 0.3, 2.0, 0.5, 0.6)
    assert loaded.recipes == [first, second, third]
    assert loaded.config.recipes == ()
    assert loaded.origin["optim.epochs"] == f"recipe third ({third})"
    assert loaded.origin["optim.clip_grad"] == f"recipe first ({first})"
    assert loaded.origin["optim.min_lr"] == run
    assert loaded.origin["optim.weight_decay"] == "command line"
    assert "optim.lr" not in loaded.origin
    assert load_config(run, [f"recipes=[{second},{third}]", "optim.epochs=54"]).config.optim.epochs == 54


def test_a_shipped_run_and_recipe_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("vits16", "vits16.yaml", "yamls/vits16.yaml"):
        loaded = load_config(name, ["recipes=registers"])
        assert loaded.config.student.arch == "vit_small"
        assert loaded.origin["student.arch"] == "yamls/vits16.yaml"
        assert loaded.origin["student.num_register_tokens"] == "recipe registers (recipes/registers.yaml)"
    write(tmp_path, "vits16.yaml", "student: {arch: vit_base}\n")
    assert load_config("vits16.yaml").config.student.arch == "vit_base", "a file at that path comes first"


def test_an_unknown_yaml_or_recipe_names_the_nearest_and_all() -> None:
    message = refused(yaml="vits61")
    assert "vits61" in message and "vits16?" in message and "vitl16_short" in message
    message = refused("recipes=[regsters]")
    assert "Did you mean registers" in message and "sinkhorn" in message


def test_values_are_read_by_yaml_grammar() -> None:
    words = [
        "optim.base_lr=1e-5",
        "optim.clip_grad=3",
        "student.layerscale=null",
        "ibot.separate_head=true",
        "crops.mean=[0,0.5,1]",
        "evaluation.knn_k=[5]",
        "train.dataset_path=ImageNet:split=TRAIN:root=/data/root:extra=/data/extra",
        "train.output_dir=2024",
        "loggers.wandb=",
        "student={arch: vit_base, patch_size: 32}",
    ]
    config = load_config(None, words).config
    assert config.optim.base_lr == 1e-5 and isinstance(config.optim.clip_grad, float)
    assert config.student.layerscale is None and config.ibot.separate_head is True
    assert config.crops.mean == (0.0, 0.5, 1.0) and config.evaluation.knn_k == (5,)
    assert config.train.dataset_path == "ImageNet:split=TRAIN:root=/data/root:extra=/data/extra"
    assert config.train.output_dir == "2024" and config.loggers.wandb == ""
    assert (config.student.arch, config.student.patch_size) == ("vit_base", 32)


def test_interpolations_see_defaults_and_overrides(tmp_path: Path) -> None:
    run = write(tmp_path, "run.yaml", "data: {cache_dir: '${train.output_dir}/cache'}\nstudent:\n")
    assert load_config(run).config.data.cache_dir == "./cache"
    assert load_config(run, ["train.output_dir=out"]).config.data.cache_dir == "out/cache"
    message = refused("data.cache_dir=${train.nothing}")
    assert "data.cache_dir" in message and "train.nothing" in message
    assert "data.cache_dir" in refused("data.cache_dir=${train.output")
    assert "train.output_dir" in refused("train.output_dir=???")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("train.seed=1.5", "whole number"),
        ("train.seed=1250.0", "write 1250"),
        ("train.seed=true", "whole number"),
        ("train.seed=null", "null is not a value"),
        ("train.seed=-1", "at least 0"),
        ("train.batch_size_per_gpu=0", "at least 1"),
        ("train.batch_size_per_gpu={a: 1}", "whole number"),
        ("optim.base_lr=abc", "number"),
        ("optim.base_lr=true", "number"),
        ("optim.base_lr=.nan", "finite"),
        ("optim.base_lr=.inf", "finite"),
        ("optim.adamw_beta1=1.0", "below 1"),
        ("teacher.teacher_temp=0", "above 0"),
        ("ibot.separate_head=1", "true or false"),
        ("ibot.separate_head='true'", "without quotes"),
        ("loggers.wandb=null", "''"),
        ("loggers.wandb=false", "text"),
        ("crops.mean=[1,2]", "list of 3 numbers"),
        ("crops.mean=0.5", "list of 3 numbers"),
        ("crops.std=[1,1,0]", "above 0"),
        ("evaluation.knn_k=[10,0]", "at least 1"),
        ("evaluation.knn_k=[1.5]", "list of whole numbers"),
        ("train.centering=sinkhorn", "Did you mean sinkhorn_knopp"),
        ("checkpoint.resume=always", "auto, never, must"),
        ("train=3", "section"),
        ("train.seed", "key=value"),
        ("=3", "key=value"),
        ("train.seed=[1", "YAML"),
        ("recipes={a: 1}", "list of names"),
        ("studnet.arch=vit_small", "Did you mean student.arch"),
        ("batch_size_per_gpu=3", "Did you mean train.batch_size_per_gpu"),
        ("student.num_registers=4", "student.num_register_tokens"),
        ("+train.seed=3", "Write train.seed"),
        ("train.seed.deep=3", "no such key"),
    ],
)
def test_a_wrong_word_is_refused_with_its_key_and_a_remedy(word: str, expected: str) -> None:
    message = refused(word)
    assert word.partition("=")[0] in message
    assert expected in message
    assert "command line" in message


def test_all_mistakes_are_shown_together_with_their_files(tmp_path: Path) -> None:
    recipe = write(tmp_path, "mine.yaml", "crops: {mean: [0, 0]}\nrecipes: [bf16]\n")
    run = write(tmp_path, "run.yaml", "train: {sead: 3}\noptim: {epochs: many}\n")
    message = refused(f"recipes=[{recipe},nowhere]", "dino.loss_weight=-1", yaml=run)
    lines = message.splitlines()
    assert len(lines) == 7 and lines[0].startswith("6 problems")
    assert f"train.sead = 3 ({run})" in message
    assert f"optim.epochs = 'many' ({run})" in message
    assert f"crops.mean = [0, 0] (recipe mine ({recipe}))" in message
    assert "a recipe cannot ask for recipes" in message
    assert "nowhere" in message
    assert "dino.loss_weight = -1 (command line)" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "says nothing"),
        ("# only a comment\n", "says nothing"),
        ("- a\n- b\n", "is a list"),
        ("plain words\n", "plain text"),
        ("train:\n  seed: 1\n  seed: 2\n", "line 3"),
        ("train:\n  seed: [1\n", "line 3"),
        ("train:\n\tseed: 1\n", "line 2"),
        ("train.seed: 1\n", "without dots"),
        ("1: 2\n", "no such key"),
        ("data: {cache_dir: '${oops'}\n", "${oops"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, text: str, expected: str) -> None:
    run = write(tmp_path, "run.yaml", text)
    message = refused(yaml=run)
    assert run in message and expected in message


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "cannot be read as text" in refused(yaml=str(path))


def test_keys_that_changed_nothing_are_told_only_when_set_otherwise(tmp_path: Path) -> None:
    words = ["student.block_chunks=4", "train.saveckp_freq=20", "train.cache_dataset=false"]
    words += ["compute_precision.teacher.backbone.sharding_strategy=NO_SHARD"]
    words += ["compute_precision.student.dino_head.mixed_precision.reduce_dtype=bf16"]
    words += ["compute_precision.grad_scaler=false", "optim.lr=0.001"]
    notices = load_config(None, words).notices
    assert [line.partition("=")[0] for line in notices] == [
        "compute_precision.grad_scaler",
        "compute_precision.teacher.backbone.sharding_strategy",
        "compute_precision.student.dino_head.mixed_precision.reduce_dtype",
        "train.cache_dataset",
        "student.block_chunks",
        "optim.lr",
    ]
    name = "compute_precision.student.backbone.mixed_precision.param_dtype"
    assert "is for the whole model" in load_config(None, [f"{name}=fp32"]).notices[0]
    assert "changes nothing" in load_config(None, [f"{name}=fp32", "performance.precision=bf16"]).notices[0]
    word = "compute_precision.student.backbone.sharding_strategy=FULL_SHARD"
    assert "is for the whole model" in load_config(None, [word]).notices[0]
    assert "parallelism.strategy=ddp is set" in load_config(None, [word, "parallelism.strategy=ddp"]).notices[0]


def test_every_key_has_one_line_of_meaning() -> None:
    for spec in all_keys().values():
        assert spec.meaning and "\n" not in spec.meaning and not spec.meaning.endswith("."), spec.name
