"""What other settings do to a run that goes on with them."""

import pytest

from dinocomp.config import load_config
from dinocomp.config.changes import differences


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.output_dir=elsewhere", []),
        ("optim.epochs=7", ["optim.epochs was 20, is 7 (schedules follow the new value from here on)"]),
        (
            "student.pos_embed_std=0.02",
            ["student.pos_embed_std was 2.0, is 0.02 (not used, the run goes on from its own checkpoint)"],
        ),
        ("crops.hue=0.2", ["crops.hue was 0.1, is 0.2 (the training task is another from here on)"]),
        ("loggers.wandb=x", ["loggers.wandb was '', is x (safe, the numbers stay the same)"]),
    ],
)
def test_differences(word: str, said: list[str]) -> None:
    assert differences(load_config("quickstart").config, load_config("quickstart", [word]).config) == said
