"""`dinocomp.load` of a run that is in an object store alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dinocomp
from dinocomp.checkpoints.remote import RemoteFolder
from dinocomp.checkpoints.store import RemoteError
from dinocomp.errors import WeightsError
from tests.checkpoints.conftest import Bucket
from tests.interop.exported import SIZE, images, make_teacher


def test_the_newest_teacher_is_fetched_and_nothing_else(
    bucket: Bucket, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WeightsError, match="holds no whole checkpoint of a run"):
        dinocomp.load(bucket.address)
    remote = RemoteFolder(bucket.address)
    remote.upload(write(4))
    net = make_teacher(tmp_path / "t")
    remote.upload(write(8, **{"teacher.safetensors": (tmp_path / "t").read_bytes()}))
    asked = []
    get = RemoteFolder._get
    monkeypatch.setattr(
        RemoteFolder, "_get", lambda self, base, file, *rest: (asked.append(file), get(self, base, file, *rest))
    )
    model = dinocomp.load(bucket.address + "/")
    assert torch.equal(model(images(SIZE)), net(images(SIZE)).cls)
    assert asked == ["teacher.safetensors"]

    bucket.put("runs/a/checkpoints/iteration-00000008/teacher.safetensors", b"cut short")
    monkeypatch.setattr("dinocomp.checkpoints.remote.READ_TRIES", 1)
    with pytest.raises(RemoteError, match="9 bytes, its manifest says"):
        dinocomp.load(bucket.address)
