"""The reference's `.npy` metadata: `extra/entries-SPLIT.npy` and the names of the classes beside it."""

import re
from pathlib import Path

import numpy as np

from dinocomp.data.listing import NO_LABEL, ClassName, Entry, Item, Source, list_images, read_labels, some
from dinocomp.errors import DataError

_SPLITS = {"TRAIN": "train", "VAL": "val", "TEST": "test"}
_TRAILING_NUMBER = re.compile(r"(\d+)$")


def metadata_sources(root: Path, extra: Path) -> dict[str, Source]:
    """Sources of every `entries-*.npy` in `extra`, with images in `root`.

    An entry names a file by class id and number: the reference writes train/ID/ID_NUMBER.JPEG and
    val/ID/ILSVRC2012_val_NUMBER.JPEG. Here any image in that class folder whose name ends in the number will do.
    Labels are the entries' `class_index`. Metadata of a split other than train without a folder are passed over.

    Raises:
        DataError: damaged metadata, or entries none of whose files exist.
    """
    sources = {}
    for upper, split in _SPLITS.items():
        path = extra / f"entries-{upper}.npy"
        if path.is_file() and (split == "train" or (root / split).is_dir()):
            sources[split] = _source(root, extra, upper, split, _load(path))
    return sources


def _source(root: Path, extra: Path, upper: str, split: str, entries: np.ndarray) -> Source:
    for name in ("actual_index", "class_index", "class_id"):
        if entries.dtype.names is None or name not in entries.dtype.names:
            found = ", ".join(entries.dtype.names or ["none"])
            raise DataError(f"{extra}/entries-{upper}.npy has no field `{name}` (fields: {found}); write it again")
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"{extra}/entries-{upper}.npy belongs to images in {folder}, which does not exist; check root=")
    files, skipped = list_images(folder)
    by_number: dict[tuple[str, int], Entry] = {}
    clashes = 0
    for entry in files:
        class_id, _, name = entry[0].rpartition("/")
        number = _TRAILING_NUMBER.search(Path(name).stem)
        if number:
            clashes += (class_id, int(number[1])) in by_number
            by_number.setdefault((class_id, int(number[1])), entry)
    items, missing = [], []
    columns = [entries[name].tolist() for name in ("actual_index", "class_index", "class_id")]
    for number, label, class_id in zip(*columns, strict=True):
        # ImageNet's test set has neither classes nor class folders; its entries carry an empty id.
        entry = by_number.get((class_id, number))
        if entry is None:
            missing.append(f"{class_id}/…{number}")
        else:
            items.append(Item(entry[0], int(label) if class_id else NO_LABEL, *entry[1:]))
    notes = []
    if missing:
        notes.append(f"{len(missing)} of {len(entries)} entries have no file in {folder}: {some(missing)}")
    if len(files) > len(items):
        notes.append(f"{len(files) - len(items)} files in {folder} are in no entry and were left out")
    if clashes:
        notes.append(f"{clashes} files in {folder} end in the number of another file in their folder")
    if not items:
        raise DataError(
            f"none of the {len(entries)} entries of {extra}/entries-{upper}.npy has a file in {folder}, which holds "
            f"{len(files)} images; expected names such as CLASS_ID/CLASS_ID_NUMBER.JPEG, check root="
        )
    labelled = any(item.label != NO_LABEL for item in items)
    classes = _classes(root, extra, upper, entries) if labelled else ()
    return Source(split, "reference metadata", str(root), items, classes, skipped, tuple(notes))


def _classes(root: Path, extra: Path, upper: str, entries: np.ndarray) -> tuple[ClassName, ...]:
    """Classes by index: what the entries say, else class-ids/class-names (TRAIN's know classes this split has not)."""
    known = _listed_classes(extra, "TRAIN") | _listed_classes(extra, upper)
    has_names = "class_name" in entries.dtype.names
    _, first = np.unique(entries["class_index"], return_index=True)
    for entry in entries[first]:
        index, class_id = int(entry["class_index"]), str(entry["class_id"])
        name = str(entry["class_name"]) if has_names else ""
        listed = known.get(index)
        known[index] = ClassName(class_id, name or (listed.name if listed and listed.id == class_id else class_id))
    names, _ = read_labels(root / "labels.txt", [entry.id for entry in known.values()])
    unknown = {index: ClassName(f"class-{index}", f"class-{index}") for index in range(max(known) + 1)}
    every = sorted((unknown | known).items())
    return tuple(ClassName(c.id, names.get(c.id, c.name) if c.name == c.id else c.name) for _, c in every)


def _listed_classes(extra: Path, upper: str) -> dict[int, ClassName]:
    """class-ids-SPLIT.npy and class-names-SPLIT.npy, whose n-th entries belong to class_index n; empty if missing."""
    ids, names = (extra / f"class-{kind}-{upper}.npy" for kind in ("ids", "names"))
    if not ids.is_file():
        return {}
    listed = [str(value) for value in _load(ids)]
    titles = [str(value) for value in _load(names)] if names.is_file() else listed
    if len(titles) != len(listed):
        raise DataError(f"{ids} has {len(listed)} entries, {names} has {len(titles)}; write both again")
    return dict(enumerate(map(ClassName, listed, titles)))


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read as a NumPy array: {error}; write the metadata again") from None
