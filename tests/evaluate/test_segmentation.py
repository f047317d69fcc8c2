"""The segmentation probe: masks, batches, the layer."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dinocomp.errors import DataError
from dinocomp.evaluate import segmentation
from dinocomp.evaluate.mask_pairs import MaskViews, find_pairs, read_mask
from dinocomp.evaluate.segmentation import SegmentationSettings, segmentation_probe
from tests.evaluate.test_linear import SEEN, backbone


def write(folder: Path, number: int, *, first: int = 0) -> str:
    """Pictures of two halves, dark and bright, with the bright half's mask 2, and a line between them ignored."""
    (folder / "images/a").mkdir(parents=True)
    (folder / "masks/a").mkdir(parents=True)
    for i in range(first, first + number):
        rng = np.random.default_rng(i)
        pixels = rng.integers(0, 60, (24, 20, 3)).astype(np.uint8)
        at = int(rng.integers(6, 18))
        pixels[at:] += 180
        mask = np.zeros((24, 20), np.uint8)
        mask[at:] = 2
        mask[at - 1] = 255
        Image.fromarray(pixels).save(folder / f"images/a/{i}.png")
        picture = Image.fromarray(mask)  # grey
        if i % 2:
            picture.putpalette([value for n in range(256) for value in (n, 255 - n, 0)])
        picture.save(folder / f"masks/a/{i}.png")
    return f"{folder}/images:{folder}/masks"


def meter(*_: object) -> object:
    return nullcontext(SimpleNamespace(advance=lambda count: None))


def test_it_learns_and_is_the_same_whether_tokens_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = find_pairs(write(tmp_path / "train", 12)), find_pairs(write(tmp_path / "val", 5, first=100))
    settings = SegmentationSettings(iterations=60, batch_size=5, learning_rate=0.03)
    results = []
    for kept in (1 << 31, 0):
        monkeypatch.setattr(segmentation, "_KEPT_BYTES", kept)
        results.append(segmentation_probe(backbone(), train, val, seen=SEEN, settings=settings, meter=meter))
    assert results[0]["miou"] > 0.6 and results[0]["pixel_accuracy"] > 0.8
    assert results[0]["iou"]["1"] is None and results[0]["classes"] == 3
    assert results[0]["miou"] == pytest.approx(np.mean([results[0]["iou"][c] for c in "02"]))
    assert results[1]["miou"] == pytest.approx(results[0]["miou"], abs=1e-3)


def test_loss_by_hand() -> None:
    tokens, weight, bias = torch.randn(2, 4, 3), torch.randn(5, 3), torch.randn(5)
    masks = torch.randint(5, (2, 6, 6)).to(torch.uint8)
    masks[0, :2] = 255
    logits = torch.einsum("bnd,cd->bcn", tokens, weight) + bias[:, None]
    large = F.interpolate(logits.view(2, 5, 2, 2), scale_factor=3, mode="bilinear").log_softmax(1)
    expected = sum(
        -large[b, int(masks[b, y, x]), y, x] for b in range(2) for y in range(6) for x in range(6) if b or y > 1
    )
    torch.testing.assert_close(segmentation._cross_entropy(tokens, masks, weight, bias), expected)


def test_image_and_mask_are_cropped_alike(tmp_path: Path) -> None:
    views = MaskViews(find_pairs(write(tmp_path, 6)), 20, 16)
    for i in range(6):
        pixels, mask = views[i]
        assert pixels.shape == (3, 16, 16) and mask.shape == (16, 16) and mask.dtype == torch.uint8
        assert set(mask.unique().tolist()) <= {0, 2, 255}
        known = mask != 255
        assert torch.equal((pixels.float().mean(0) > 120)[known], (mask == 2)[known])
    outside = MaskViews(find_pairs(write(tmp_path / "more", 1)), 8, 12)[0][1]  # [9.6 x 8] in the middle of [12 x 12]
    assert (outside[:, :2] == 255).all() and (outside[:, -2:] == 255).all()


def test_every_batch_is_full_and_every_image_comes() -> None:
    batches = segmentation._batches(7, SegmentationSettings(iterations=6, batch_size=4))
    assert [len(batch) for batch in batches] == [4] * 6
    order = [i for batch in batches for i in batch]
    assert all(sorted(order[start : start + 7]) == list(range(7)) for start in (0, 7, 14))


def test_what_is_refused(tmp_path: Path) -> None:
    pairs = write(tmp_path, 3)
    with pytest.raises(DataError, match="expected IMAGES:MASKS"):
        find_pairs(str(tmp_path))
    (tmp_path / "masks/a/1.png").unlink()
    with pytest.raises(DataError, match=r"1 of the 3 images .* have no mask .*: a/1\. A mask"):
        find_pairs(pairs)
    Image.new("RGB", (20, 24)).save(tmp_path / "masks/a/1.png")
    with pytest.raises(DataError, match="is RGB; expected one number a pixel"):
        read_mask(tmp_path / "masks/a/1.png")
    Image.new("L", (20, 20)).save(tmp_path / "masks/a/1.png")
    with pytest.raises(DataError, match=r"is 20x24 pixels and its mask .* 20x20"):
        MaskViews(find_pairs(pairs), 16, 16)[1]
    Image.fromarray(np.full((24, 20), 300, np.uint16)).save(tmp_path / "masks/a/1.png")
    with pytest.raises(DataError, match="has the value 300"):
        read_mask(tmp_path / "masks/a/1.png")
    (tmp_path / "masks/a/1.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        read_mask(tmp_path / "masks/a/1.png")
    for name in "012":
        Image.new("L", (20, 24), 7).save(tmp_path / f"masks/a/{name}.png")
    good = find_pairs(write(tmp_path / "good", 3))
    with pytest.raises(DataError, match=r"no mask of .* has these classes of .*: 7"):
        segmentation_probe(backbone(), good, find_pairs(pairs), seen=SEEN, settings=SegmentationSettings(), meter=meter)
    with pytest.raises(DataError, match=r"have 1 class\(es\)"):
        segmentation_probe(backbone(), find_pairs(pairs), good, seen=SEEN, settings=SegmentationSettings(), meter=meter)
