"""What the callback of bad steps keeps in checkpoints."""

from types import SimpleNamespace

import pytest
import torch

from dinocomp.callbacks import ClipGradients, SkipBadSteps


def callback(scaler: object) -> tuple[SkipBadSteps, SimpleNamespace]:
    model = torch.nn.Linear(1, 1)
    made = SkipBadSteps(model, ClipGradients(model, 1.0), 20)
    state = SimpleNamespace(scaler=scaler, serialized_attributes=["model", "scaler", "callbacks"])
    made.init(state, None)
    return made, state


class AnotherScaler(torch.amp.GradScaler):
    """Of another strategy: Composer would save it under another name."""


@pytest.mark.parametrize("kind", [torch.amp.GradScaler, AnotherScaler])
def test_the_gradient_scale_goes_from_one_scaler_to_another(kind: type) -> None:
    first, state = callback(torch.amp.GradScaler("cpu"))
    first.fit_start(state, None)
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 512.0, "_growth_tracker": 7})
    assert state.serialized_attributes == ["model", "callbacks"], "Composer saves none"
    saved = first.state_dict()

    second, state = callback(kind("cpu"))
    second.load_state_dict(saved)
    second.fit_start(state, None)
    assert state.scaler.state_dict()["scale"] == 512.0 and state.scaler.state_dict()["_growth_tracker"] == 7
    assert second.state_dict() == saved


def test_without_a_scale_the_same_numbers_are_saved() -> None:
    """So that a state in shares that was saved in bf16 can be loaded in fp16, and the other way round."""
    off, state = callback(torch.amp.GradScaler("cpu", enabled=False))
    off.fit_start(state, None)
    on, state = callback(torch.amp.GradScaler("cpu"))
    on.load_state_dict(off.state_dict())
    on.fit_start(state, None)
    assert on.state_dict().keys() == off.state_dict().keys()
    assert on.state_dict()["scale"] == 65536.0, "its own start"
    off.load_state_dict({"count": 3, "in_a_row": 0})  # of an earlier dinocomp
    assert off.state_dict()["count"] == 3
