"""Every shipped run with every shipped recipe, the merged file it writes, and the pages made from them."""

from itertools import product
from pathlib import Path

import pytest

from dinocomp.config import Config, load_config, to_yaml
from dinocomp.config.files import first_comment, shipped
from dinocomp.config.tables import table_of_keys, table_of_recipes, write

RUNS = ["quickstart", "vits16", "vits14", "vitb14", "vitl16_short", "vitl14", "vitg14", "imagenet100"]
RECIPES = [
    *("registers", "sinkhorn", "separate_heads", "swiglu", "bf16", "fp16", "fp32"),
    *("paper_blur", "small_data", "save_often", "no_koleo", "high_resolution", "fsdp", "fsdp2"),
    *("activation_checkpointing", "low_memory"),
]
# Pairs that cannot work, with a part of the reason given. All of them work today.
REFUSED: dict[tuple[str, str], str] = {}
DOCS = Path(__file__).parents[2] / "docs"


def test_the_runs_and_recipes_promised_are_shipped() -> None:
    assert set(RUNS) <= set(shipped("yamls"))
    assert set(RECIPES) <= set(shipped("recipes"))


@pytest.mark.parametrize(("run", "recipe"), list(product(shipped("yamls"), [None, *shipped("recipes")])))
def test_every_run_takes_every_recipe_and_its_merged_file_reproduces_it(
    run: str, recipe: str | None, tmp_path: Path
) -> None:
    assert (run, recipe) not in REFUSED
    loaded = load_config(run, [f"recipes={recipe}"] if recipe else [])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(loaded.config, header=f"{run}\nwith {recipe}"))
    again = load_config(str(path))
    assert again.config == loaded.config
    assert again.notices == loaded.notices == []
    if recipe:
        changed = {name for name, where in loaded.origin.items() if where.startswith("recipe ")}
        assert changed, "a recipe says something"


def test_odd_values_survive_the_merged_file(tmp_path: Path) -> None:
    words = ["train.output_dir=1e-5", "loggers.wandb='yes'", "data.cache_dir='a: b'", "student.layerscale=1e-5"]
    words += ["optim.min_lr=1e-20", "student.num_heads=null", "evaluation.knn_k=[1]", "train.dataset_path=ünïcode 'q'"]
    words += ["loggers.mlflow=\\${literal}"]
    loaded = load_config(None, words)
    assert loaded.config.loggers.mlflow == "${literal}"
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(loaded.config), encoding="utf-8")
    assert load_config(str(path)).config == loaded.config


def test_the_merged_file_lists_every_key_and_no_recipes() -> None:
    text = to_yaml(Config(), header="one\ntwo")
    assert text.startswith("# one\n# two\nMODEL:\n")
    assert text.endswith("recipes: []\n")
    assert "layerscale: 1.0e-05\n" in text and "mean: [0.485, 0.456, 0.406]" in text


def test_every_shipped_file_says_what_it_is_for() -> None:
    for folder in ("yamls", "recipes"):
        for name, path in shipped(folder).items():
            assert len(first_comment(path)) > 20, name


def test_the_pages_are_what_the_schema_and_files_say(tmp_path: Path) -> None:
    remedy = "run: python -m dinocomp.config.tables docs"
    assert (DOCS / "config.md").read_text(encoding="utf-8") == table_of_keys(), remedy
    assert (DOCS / "recipes.md").read_text(encoding="utf-8") == table_of_recipes(), remedy
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.md", "recipes.md"]


def test_the_table_has_every_key_once() -> None:
    from dinocomp.config import all_keys

    table = table_of_keys()
    assert all(table.count(f"| `{name}` |") == 1 for name in all_keys())
