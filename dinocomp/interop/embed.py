"""Class tokens of many images, as an array or a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinocomp.data import PlainLoader
from dinocomp.data.every import EveryImage
from dinocomp.data.progress import Progress
from dinocomp.errors import DataError
from dinocomp.hints import obstacle

if TYPE_CHECKING:
    from dinocomp.interop.model import Model, View

log = logging.getLogger(__name__)
_ENDINGS = (".npy", ".parquet")
_NAMED = 5  # of the images left out


class _Views(Dataset):
    """(view uint8 [3, crop, crop], name, what is wrong with it or "")."""

    def __init__(self, images: EveryImage, view: View) -> None:
        self.images, self.view = images, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, str, str]:
        name, pixels, fault = self.images[i]
        if pixels is None:
            return torch.zeros(3, self.view.crop, self.view.crop, dtype=torch.uint8), name, fault
        return self.view.pixels(pixels), name, ""


@torch.no_grad()
def embed_images(
    model: Model,
    images: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    workers: int = 0,
) -> tuple[list[str], np.ndarray]:
    """Class tokens of all images of a folder (of any depth), of shards, of a list of files, or of ``digits``.

    Images that cannot be decoded are left out, with a warning that names them.

    Args:
        output: a file to write them to, too: NAME.npy with NAME.names.json beside it, or NAME.parquet with the columns
            `name` and `embedding` (which needs pyarrow).
        device: None for where the model is.
        workers: processes that decode.

    Returns:
        The images' names (paths below the folder, or as they are listed) and fp32 [n, D].

    Raises:
        DataError: there are no images, none can be decoded, or `output` cannot be written.
    """
    path = None if output is None else _checked(Path(output).expanduser())
    views = _Views(EveryImage(images), model.transform)
    if device is not None:
        model.to(device)
    place = next(model.parameters()).device
    names: list[str] = []
    faults: list[str] = []
    vectors: list[Tensor] = []
    loader = PlainLoader(
        views,
        batch_size,
        num_workers=workers,
        pin_memory=place.type == "cuda",
        generator=torch.Generator(),  # else the loader draws a seed from the global one
    )
    with Progress("embedding", len(views)) as bar:
        for pixels, found, wrong in loader:  # uint8 [b, 3, crop, crop]
            good = [not fault for fault in wrong]
            if any(good):
                kept = pixels[torch.tensor(good)].to(place, non_blocking=True)
                vectors.append(model(model.transform.normalize(kept)).float().cpu())  # [b, D]
            names += [name for name, is_good in zip(found, good, strict=True) if is_good]
            faults += [f"{name}: {fault}" for name, fault in zip(found, wrong, strict=True) if fault]
            bar.advance(len(wrong))
    if not vectors:
        raise DataError(f"none of the {len(views)} images can be decoded, the first: {faults[0]}")
    if faults:
        more = f", and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        log.warning("%d of %d images left out: %s%s", len(faults), len(views), "; ".join(faults[:_NAMED]), more)
    array = torch.cat(vectors).numpy()  # [n, D]
    if path is not None:
        _write(path, names, array)
    return names, array


def _checked(path: Path) -> Path:
    """Said before the work, not after it."""
    if path.suffix not in _ENDINGS:
        raise DataError(f"{path} ends in neither of {', '.join(_ENDINGS)}; give a name that does")
    if reason := obstacle(path.parent):
        raise DataError(f"{path} cannot be written: {reason}; give another place")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise DataError(
                f"{path} needs pyarrow ({error}); type pip install pyarrow, or give {path.with_suffix('.npy')}"
            ) from error
    return path


def _write(path: Path, names: list[str], vectors: np.ndarray) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            with partial.open("wb") as file:
                np.save(file, vectors)
            path.with_suffix(".names.json").write_text(json.dumps(names, indent=0) + "\n", encoding="utf-8")
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
            pq.write_table(pa.table({"name": pa.array(names, pa.string()), "embedding": column}), partial)
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}; make room, or give another place") from error
    finally:
        partial.unlink(missing_ok=True)
