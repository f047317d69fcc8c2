"""A folder of what people point at by mistake, beside what is right: 24 photos, their shards and a finished run."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dinocomp.data.convert import convert
from dinocomp.train import main

from ..helpers import TINY

YAMLS = {
    "tab": "train:\n\tseed: 1\n",
    "list": "- train\n- seed\n",
    "twice": "train: {seed: 1}\ntrain: {seed: 2}\n",
    "nothing": "",
    "dotted": "train.seed: 1\n",
    "words": "hello there\n",
    "unclosed": "train: {seed: 1\n",
    "two": "train: {seed: 1}\n---\ntrain: {seed: 2}\n",
    "misspelt": "train: {sead: 1}\n",
    "flat": "train:\nseed: 1\n",
    "quoted": "train: {seed: '1'}\n",
    "yes": "ibot: {separate_head: 'yes'}\n",
    "nocolon": "train:\n  seed:1\n",
    "unknown": "data: {cache_dir: '${train.nowhere}'}\n",
    "variable": "data: {cache_dir: '${oc.env:NOT_SET_ANYWHERE}'}\n",
    "circle": "train: {dataset_path: '${data.cache_dir}'}\ndata: {cache_dir: '${train.dataset_path}'}\n",
    "recipes": "recipes: [regsters]\n",
    "code": "train: !!python/object/apply:os.system ['touch ran']\n",
}


class Touch:
    """Unpickled by somebody who trusts the file, it writes one called `ran`."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch ran",)


def photos(folder: Path, count: int, classes: str = "ab") -> None:
    for i in range(count):
        path = folder / (classes[i % 2] if classes else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + i, 40), (10 * i, 100, 50)).save(path)


def _datasets() -> None:
    photos(Path("photos"), 24)
    photos(Path("one"), 1)
    photos(Path("few"), 4, classes="")
    for name in ("empty", "texts", "bad", "half/.train.partial/shards", "mine/thesis"):
        Path(name).mkdir(parents=True)
    Path("texts/notes.txt").write_text("no image")
    Path("bad/a.png").write_bytes(b"")
    Path("movie.mp4").write_bytes(b"x" * 100)
    Path("bad.tar").write_bytes(b"not a tar file")
    np.save("entries.npy", np.zeros(3))
    convert("photos", "shards", workers=1, val_fraction=0.2, progress=False)
    for name in ("noindex", "badindex", "noshard", "cut", "onlyval"):
        shutil.copytree("shards", name)
    Path("noindex/train/index.json").unlink()
    Path("badindex/train/index.json").write_text("{")
    next(Path("noshard/train").rglob("*.mds")).unlink()
    os.truncate(next(Path("cut/train").rglob("*.mds")), 100)
    shutil.rmtree("onlyval/train")


def _weights() -> None:
    torch.save({"state_dict": Touch()}, "evil.pth")
    torch.save({"weight": torch.zeros(2)}, "other.pth")
    Path("text.pth").write_text("hello")
    Path("model_0003749.rank_0.pth").write_bytes(b"share")
    Path("empty.pth").write_bytes(b"")
    shutil.copy("run/teacher.safetensors", "cut.safetensors")
    os.truncate("cut.safetensors", 40_000)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HOME", str(place / "home"))
        patch.setenv("XDG_CACHE_HOME", str(place / "home" / "cache"))
        sections: dict[str, dict] = {}
        for name, value in (TINY | {"train.dataset_path": "photos", "train.output_dir": "out"}).items():
            section, _, leaf = name.partition(".")
            sections.setdefault(section, {})[leaf] = yaml.safe_load(str(value))
        Path("tiny.yaml").write_text(yaml.dump(sections))
        for name, text in YAMLS.items():
            Path(f"{name}.yaml").write_text(text)
        Path("latin1.yaml").write_bytes("train: {output_dir: Müll}\n".encode("latin-1"))
        Path("file").write_text("hello")
        Path("nothing-there").symlink_to("gone")
        _datasets()
        assert main(["tiny.yaml", "optim.epochs=1", "train.output_dir=run"]) == 0
        _weights()
        yield place


@pytest.fixture
def place(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a command, with the user's cache and home in it."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("HOME", str(made / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(made / "home" / "cache"))
    return made
