"""README's pictures are made from a run, and small."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..helpers import ROOT

spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "gallery.py")
gallery = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gallery)


def test_pictures_of_the_readme(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no picture `pca`"):
        gallery.main(tmp_path / "run")
    noise = np.random.default_rng(0).integers(0, 255, (300, 500, 3), dtype=np.uint8)
    for iteration, pixels in ((10, noise * 0), (1000, noise)):
        place = tmp_path / "run" / "pictures" / f"iteration-{iteration:08d}"
        place.mkdir(parents=True)
        Image.fromarray(pixels).save(place / "pca.png")
    Image.fromarray(noise).save(tmp_path / "run" / "pictures" / "curves.png")
    gallery.main(tmp_path / "run", tmp_path / "images")
    for name in ("pca", "curves"):
        path = tmp_path / "images" / f"quickstart-{name}.png"
        picture = Image.open(path)
        assert path.stat().st_size <= gallery.LIMIT and picture.width / picture.height == pytest.approx(5 / 3, abs=0.02)
        assert np.asarray(picture.convert("L")).std() > 10, "the newest one"
    readme = (ROOT / "README.md").read_text()
    assert all(f"docs/images/quickstart-{name}.png" in readme for name in ("pca", "curves"))
