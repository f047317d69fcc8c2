"""The linear probe's heads and its training."""

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dinocomp.data import Sample
from dinocomp.data.order import uniform_permutation
from dinocomp.evaluate import heads as heads_module
from dinocomp.evaluate.choose import Chosen, hold_out
from dinocomp.evaluate.heads import LEARNING_RATES, Head, LinearHeads, grid
from dinocomp.evaluate.linear import LinearSettings, Seen, TrainingBatches, length, linear_probe
from dinocomp.evaluate.saved import SavedHeads
from dinocomp.evaluate.tokens import token_batches
from dinocomp.evaluate.views import CentreViews, RandomViews
from dinocomp.method.pixels import Normalize
from dinocomp.models import VisionTransformer

D, CLASSES, STEPS, BATCH = 6, 3, 5, 32


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (STEPS, BATCH), generator=generator)
    labels[1, :3] = -1  # images that could not be decoded
    return list(zip(torch.randn(STEPS, BATCH, 5, D, generator=generator), labels, strict=True))


def trained(numbered: dict[int, Head], steps: int = STEPS) -> LinearHeads:
    probe = LinearHeads(numbered, embed_dim=D, num_classes=CLASSES, batch_size=BATCH, iterations=STEPS, seed=0)
    for i, (tokens, labels) in enumerate(batches()[:steps]):
        probe.step(i, tokens, labels)
    return probe


def test_all_heads_are_there_at_a_small_batch() -> None:
    """The reference writes learning rates with five decimals and loses heads from a batch of 128 images on."""
    heads = grid(LEARNING_RATES, (1, 4))
    assert len(heads) == 52 and len(set(heads)) == 52
    assert len({f"{head.learning_rate * BATCH / 256:.5f}" for head in heads}) == 11, (
        "what the reference would tell apart"
    )
    probe = trained(dict(enumerate(heads)))
    state = probe.state()
    assert sum("weight" in name and "momentum" not in name for name in state) == 52
    assert all(not torch.equal(state["0.weight"], state[f"{i}.weight"]) for i in range(1, 13))


def test_what_a_head_sees() -> None:
    tokens = torch.arange(5.0)[None, :, None].expand(2, 5, 1)  # class tokens of blocks 0 to 3, and the mean
    seen = {(n, avgpool): Head(n, avgpool, 0.1).tokens(tokens)[0].tolist() for n in (1, 4) for avgpool in (False, True)}
    assert seen == {(1, False): [3], (1, True): [3, 4], (4, False): [0, 1, 2, 3], (4, True): [0, 1, 2, 3, 4]}


@pytest.mark.parametrize("number", [3, 50])
def test_a_head_of_the_grid_is_trained_as_if_alone(number: int) -> None:
    heads = dict(enumerate(grid(LEARNING_RATES, (1, 4))))
    together, alone = trained(heads), trained({number: heads[number]})
    for name, tensor in alone.state().items():
        torch.testing.assert_close(together.state([number])[name], tensor, rtol=1e-5, atol=1e-7)


def test_against_torch_sgd() -> None:
    """One head, with torch's optimizer and schedule, as the reference trains it."""
    head = Head(4, True, 0.05)
    probe = LinearHeads({7: head}, embed_dim=D, num_classes=CLASSES, batch_size=BATCH, iterations=STEPS, seed=0)
    layer = torch.nn.Linear(5 * D, CLASSES)
    start = probe.state()
    layer.load_state_dict({"weight": start["7.weight"], "bias": start["7.bias"]})
    assert start["7.weight"].std() == pytest.approx(0.01, rel=0.3) and not start["7.bias"].any()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05 * BATCH / 256, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0)
    for i, (tokens, labels) in enumerate(batches()):
        probe.step(i, tokens, labels)
        loss = F.cross_entropy(layer(tokens.flatten(1)), labels, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(probe.state()["7.weight"], layer.weight.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(probe.state()["7.bias"], layer.bias.detach(), rtol=1e-5, atol=1e-7)


def test_one_head_that_diverges_harms_no_other() -> None:
    good = Head(1, False, 0.1)
    both = trained({0: good, 1: Head(1, False, 1e40)})
    assert not both.state()["1.weight"].isfinite().all()
    torch.testing.assert_close(both.state()["0.weight"], trained({0: good}).state()["0.weight"])


def test_saved_heads_go_on_on_other_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = dict(enumerate(grid((0.01, 0.1), (1, 4))))
    whole, half = trained(heads), trained(heads, steps=3)
    saved = SavedHeads(tmp_path / "linear", "mark")
    saved.save(half, 2)
    saved.save(half, 3)
    assert [folder.name for folder in (tmp_path / "linear").iterdir()] == ["iteration-00000003"]
    (tmp_path / "linear/iteration-00000009.writing").mkdir()  # killed while it wrote
    for mine in ({n: h for n, h in heads.items() if n % 3 == rank} for rank in range(3)):
        probe = LinearHeads(mine, embed_dim=D, num_classes=CLASSES, batch_size=BATCH, iterations=STEPS, seed=5)
        assert saved.load(probe) == 3
        for i, (tokens, labels) in list(enumerate(batches()))[3:]:
            probe.step(i, tokens, labels)
        for name, tensor in whole.state(mine).items():
            torch.testing.assert_close(probe.state()[name], tensor, rtol=1e-5, atol=1e-7)
    assert SavedHeads(tmp_path / "linear", "other").load(half) == 0
    two = SimpleNamespace(get_global_rank=lambda: 0, get_world_size=lambda: 2, barrier=lambda: None)
    monkeypatch.setattr("dinocomp.evaluate.saved.dist", two)  # and the other rank's file is lost
    saved.save(half, 4)
    assert saved.load(half) == 0


def test_length() -> None:
    assert length(LinearSettings(), 1_281_167) == (12512, 1024)  # the reference on 8 GPUs: 12,500
    assert length(LinearSettings(), 1294) == (1250, 32)
    assert length(LinearSettings(), 20_000) == (1563, 128)
    assert length(LinearSettings(iterations=7, batch_size=48), 1294) == (7, 48)


def test_training_order() -> None:
    """Each image once in a pass; where it begins makes no difference."""
    index = torch.tensor([3, 5, 7, 11, 13])
    all_of_them = [place for batch in TrainingBatches(index, first=0, iterations=5, batch=4, seed=1) for place in batch]
    assert [sorted(i for p, i in all_of_them if p == passes) for passes in range(4)] == [index.tolist()] * 4
    assert [i for p, i in all_of_them if p == 1] == index[uniform_permutation(5, 1, 1)].tolist()
    late = list(TrainingBatches(index, first=3, iterations=5, batch=4, seed=1))
    assert [place for batch in late for place in batch] == all_of_them[12:]


class Squares:
    """Squares in memory whose colour tells their class, in the shape of `dinocomp.data.Images`."""

    path, labelled, classes = "squares", True, ()

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def decode(self, i: int) -> tuple[Sample, torch.Tensor]:
        rng = np.random.default_rng(i)
        pixels = torch.from_numpy(rng.integers(0, 90, (3, 20, 20)).astype(np.uint8))
        pixels[i % 3] += 150
        return Sample(b"", i % 3, str(i)), pixels


def backbone() -> VisionTransformer:
    torch.manual_seed(3)
    net = VisionTransformer(img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=2, init_values=None)
    return net.eval().requires_grad_(False)


SEEN = Seen(resize=18, crop=16, normalize=Normalize((0.5,) * 3, (0.25,) * 3), batch_size=8)
SETTINGS = LinearSettings(iterations=8, batch_size=16, learning_rates=(0.1, 1.0), blocks=(1, 2), save_iterations=3)


def meter(*_: object) -> object:
    return nullcontext(SimpleNamespace(advance=lambda count: None))


def probe(settings: LinearSettings = SETTINGS, saved: SavedHeads | None = None) -> tuple:
    train, val = Chosen(Squares(50)), Chosen(Squares(17))
    labels = [torch.arange(len(part)) % 3 for part in (train, val)]
    return linear_probe(
        backbone(),
        train,
        labels[0],
        val,
        labels[1],
        seen=SEEN,
        num_classes=3,
        settings=settings,
        saved=saved,
        meter=meter,
    )


def test_tokens_are_those_of_the_backbone() -> None:
    net, images = backbone(), Chosen(Squares(5))
    views = CentreViews(images, 18, 16)
    (tokens, labels), *rest = token_batches(net, views, [[4, 0, 2], [1]], blocks=2, **SEEN.loading())
    assert tokens.shape == (3, 3, 12) and labels.tolist() == [1, 0, 2] and len(rest) == 1
    pixels = torch.stack([views[i][0] for i in (4, 0, 2)])
    layers = net.get_intermediate_layers(SEEN.normalize(pixels), 2)
    expected = torch.stack([layers[0][1], layers[1][1], layers[1][0].mean(1)], dim=1)
    torch.testing.assert_close(tokens, expected)


def test_random_views_are_a_function_of_seed_pass_and_image() -> None:
    views, images = RandomViews(Chosen(Squares(5)), 16, 0.08, 0.5, 0), Chosen(Squares(5))
    assert torch.equal(views[0, 2][0], views[0, 2][0]) and not torch.equal(views[0, 2][0], views[1, 2][0])
    assert not torch.equal(views[0, 2][0], RandomViews(images, 16, 0.08, 0.5, 1)[0, 2][0])
    whole = RandomViews(images, 20, 1.0, 0.0, 0)  # no crop of another shape has the area of all
    assert torch.equal(whole[3, 2][0], images.decode(2)[1])
    assert torch.equal(RandomViews(images, 20, 1.0, 1.0, 0)[3, 2][0], images.decode(2)[1].flip(-1))


@pytest.mark.parametrize("views", ["random", "centre"])
def test_it_learns_and_chooses_on_images_held_out(views: str) -> None:
    settings = LinearSettings(iterations=60, batch_size=16, learning_rates=(1e-5, 1.0), blocks=(1, 2), views=views)
    result, predicted, weights = probe(settings)
    assert result["top1"] > 0.9 and result["chosen"]["learning_rate"] == 1.0
    assert result["top1"] == float((predicted == torch.arange(17) % 3).double().mean()) and result["top5"] == 1.0
    assert result["selected_on"] == "6 images held out of train" and len(result["grid"]) == 8
    best = max(entry["selection_top1"] for entry in result["grid"])
    chosen = next(e for e in result["grid"] if {k: e[k] for k in result["chosen"]} == result["chosen"])
    assert chosen["selection_top1"] == best
    width = 12 * (result["chosen"]["blocks"] + result["chosen"]["avgpool"])
    assert weights["weight"].shape == (3, width) and weights["bias"].shape == (3,)


def test_held_out_images_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = set(), RandomViews.__getitem__

    def watch(self: RandomViews, place: tuple[int, int]) -> tuple:
        seen.add(place[1])
        return original(self, place)

    monkeypatch.setattr(RandomViews, "__getitem__", watch)
    probe()
    held = set(hold_out(torch.arange(50) % 3, 0.1, 0).nonzero().flatten().tolist())
    assert len(held) == 6 and seen == set(range(50)) - held
    seen.clear()
    result, *_ = probe(LinearSettings(**{**vars(SETTINGS), "select_on": "val"}))
    assert seen == set(range(50)) and result["selected_on"] == "the validation set: optimistic"
    assert result["top1"] == max(entry["selection_top1"] for entry in result["grid"])


def test_a_probe_that_was_killed_ends_with_the_same_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, predicted, _ = probe(saved=SavedHeads(tmp_path / "whole", "m"))
    original = LinearHeads.step

    def step(self: LinearHeads, iteration: int, *arguments: torch.Tensor) -> None:
        if iteration == 7:
            raise KeyboardInterrupt
        original(self, iteration, *arguments)

    saved = SavedHeads(tmp_path / "killed", "m")
    monkeypatch.setattr(heads_module.LinearHeads, "step", step)
    with pytest.raises(KeyboardInterrupt):
        probe(saved=saved)
    steps = []
    monkeypatch.setattr(LinearHeads, "step", lambda self, i, *a: (steps.append(i), original(self, i, *a)))
    result, again, _ = probe(saved=saved)
    assert steps == [6, 7] and result == whole and torch.equal(again, predicted)
    from safetensors.torch import load_file

    states = [load_file(tmp_path / name / "iteration-00000008/0.safetensors") for name in ("whole", "killed")]
    assert set(states[0]) == set(states[1]) and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert math.isfinite(sum(float(t.sum()) for t in states[0].values()))
