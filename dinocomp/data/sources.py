"""What can be converted: finds images, labels and class names. Everything is counted, no length is written down.

A `Source` is one split: a list of items (where the bytes lie, label, key) and the names of its classes.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from dinocomp.data.listing import (
    DIGITS,
    IMAGE_ENDINGS,
    SPLIT_FOLDERS,
    ClassName,
    Item,
    Source,
    list_images,
    make_items,
    read_labels,
)
from dinocomp.data.metadata import metadata_sources
from dinocomp.data.tars import TAR_ENDINGS, tar_sources
from dinocomp.errors import DataError
from dinocomp.hints import missing

SPLITS = ("train", "val", "test")


def parse_reference(text: str) -> tuple[str, Path, Path | None]:
    """(split, root, extra) of `ImageNet:split=TRAIN:root=ROOT:extra=EXTRA`, the reference's way to name a dataset.

    Raises:
        DataError: an unknown part or split, or no such root.
    """
    rest = text.partition(":")[2]
    example = "e.g. ImageNet:split=TRAIN:root=/data/root:extra=/data/extra"
    values = {}
    for pair in filter(None, rest.split(":")):
        key, equals, value = pair.partition("=")
        if not equals or key not in ("split", "root", "extra"):
            raise DataError(f"{text}: {pair!r} is none of split=, root=, extra=; {example}")
        values[key] = value
    if not values.get("root"):
        raise DataError(f"{text} has no root=; add the folder that holds train/, {example}")
    split = values.get("split", "TRAIN").lower()
    if split not in SPLITS:
        raise DataError(f"{text}: split={values['split']} is none of TRAIN, VAL, TEST; {example}")
    root = Path(values["root"]).expanduser()
    if not root.is_dir():
        raise DataError(
            f"{text}: root={root} is not a folder{f': {missing(root)}' if not root.exists() else ';'} {example}"
        )
    extra = Path(values["extra"]).expanduser() if values.get("extra") else None
    return split, root, extra


def find_sources(src: str | Path, extra: str | Path | None = None) -> dict[str, Source]:
    """Find out what `src` is and list its splits.

    In this order: `digits`; the reference's `ImageNet:` string; a tar file; the reference's metadata (`extra`, or
    `SRC/extra`, with `entries-TRAIN.npy`, images in SRC or SRC/root); a folder with `train` (and `val`, `test`) in it;
    a folder of tar files; a folder of images.

    Raises:
        DataError: nothing there, or no images in it.
    """
    if str(src) == DIGITS:
        return digits_sources()
    if str(src).startswith("ImageNet:"):
        _, src, extra = parse_reference(str(src))  # every split that is there, whichever is named
    root = Path(src).expanduser()
    if not root.exists():
        raise DataError(f"{missing(root)} Give a folder of images, a .tar file, or `digits`")
    if any((folder / "index.json").is_file() for folder in (root, root / "train", root / "val")):
        raise DataError(f"{root} holds shards already; give it as train.dataset_path, or convert the images themselves")
    if root.is_file():
        if not root.name.lower().endswith(TAR_ENDINGS):
            raise DataError(f"{root} is a file, but not a tar file ({', '.join(TAR_ENDINGS)}); give a folder of images")
        sources = tar_sources([root], root)
    elif (metadata := Path(extra) if extra else root / "extra").is_dir() and any(metadata.glob("entries-*.npy")):
        sources = metadata_sources(root / "root" if not extra and (root / "root").is_dir() else root, metadata)
    elif (root / "train").is_dir():
        sources = layout_sources(root)
    else:
        tars = sorted(path for path in root.iterdir() if path.name.lower().endswith(TAR_ENDINGS) and path.is_file())
        folder = folder_source(root)
        sources = tar_sources(tars, root) if tars and not folder.items else {"train": folder}
    for source in sources.values():
        _check(source)
    return sources


def folder_source(root: Path, split: str = "train") -> Source:
    """A folder of images at any depth.

    The first folder level gives the labels if every image lies in such a folder and there are at least two of them;
    else there are no labels.
    """
    files, skipped = list_images(root)
    folders = sorted({key.partition("/")[0] if "/" in key else "" for key, *_ in files})
    labelled = len(folders) > 1 and "" not in folders
    classes = tuple(ClassName(name, name) for name in folders) if labelled else ()
    items = make_items(files, classes)
    return Source(split, "folder of images", str(root), items, classes, skipped)


def layout_sources(root: Path) -> dict[str, Source]:
    """ImageNet's layout: root/{train,val,test}/CLASS/files, and optionally root/labels.txt with `class_id,class_name`.

    A label is the class id's place among the sorted ids of all splits. A split with images outside class folders has
    no labels.
    """
    folders = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and path.name in SPLIT_FOLDERS}
    listed = {}
    for name, path in folders.items():
        split = SPLIT_FOLDERS[name]
        if split in listed:
            raise DataError(f"{root} has more than one folder for the split `{split}` ({', '.join(folders)}); keep one")
        listed[split] = (path, *list_images(path))
    # A test set often has no labels: it must not take them from the other splits.
    labelled = {split: bool(files) and all("/" in key for key, *_ in files) for split, (_, files, _) in listed.items()}
    ids = sorted({key.partition("/")[0] for s, (_, files, _) in listed.items() if labelled[s] for key, *_ in files})
    if len(ids) < 2:
        ids, labelled = [], dict.fromkeys(listed, False)
    names, notes = read_labels(root / "labels.txt", ids)
    classes = tuple(ClassName(i, names.get(i, i)) for i in ids)
    others = sorted(p.name for p in root.iterdir() if p.is_dir() and p not in folders.values() and p.name[0] != ".")
    if others:
        notes += (f"folders beside the splits were not read: {', '.join(others)}",)
    sources = {}
    for split, (path, files, skipped) in listed.items():
        own = classes if labelled[split] else ()
        sources[split] = Source(split, "ImageNet layout", str(path), make_items(files, own), own, skipped, notes)
    return {split: source for split, source in sources.items() if source.items or split == "train"}


def digits_sources() -> dict[str, Source]:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey: every fifth is `val`, the rest `train`.

    The order follows the writers, so that both splits are by the same hands.
    """
    from sklearn.datasets import load_digits

    labels = load_digits().target
    classes = tuple(ClassName(str(n), str(n)) for n in range(int(labels.max()) + 1))
    items = [Item(f"{i:04d}.png", int(label), DIGITS, i, 0, 0) for i, label in enumerate(labels)]
    held_out = set(items[4::5])
    parts = {"train": [item for item in items if item not in held_out], "val": items[4::5]}
    return {split: Source(split, "scikit-learn digits", DIGITS, part, classes) for split, part in parts.items()}


def hold_out(source: Source, fraction: float, seed: int = 0) -> dict[str, Source]:
    """Split off a random `val` with this fraction of every class (of all images where there are no labels)."""
    if not 0.0 < fraction < 1.0:
        raise DataError(f"--val-fraction is {fraction}; it must lie between 0 and 1, e.g. 0.1")
    rng = np.random.default_rng(seed)
    labels = np.array([item.label for item in source.items])  # [items]
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: round(fraction * len(members))]] = True
    if not held.any() or held.all():
        raise DataError(f"--val-fraction {fraction} of {len(labels)} images leaves one split empty; choose another")
    pick = {"train": ~held, "val": held}
    return {
        split: replace(source, split=split, items=[source.items[i] for i in np.flatnonzero(chosen)])
        for split, chosen in pick.items()
    }


def _check(source: Source) -> None:
    if not source.items:
        endings = " ".join(sorted(IMAGE_ENDINGS))
        raise DataError(
            f"no images found in {source.origin} (files of other kinds: {source.skipped}); give another folder: "
            f"images end in {endings}, at any depth below the folder, or lie in tar files"
        )
    twice = [key for key, count in Counter(item.key for item in source.items).items() if count > 1]
    if twice:
        raise DataError(f"{source.origin} holds {len(twice)} names twice, e.g. {twice[0]!r}; rename or remove them")
