"""README's pictures, from the folder of a run of the quickstart: python docs/gallery.py output/quickstart

Its newest picture of the PCA and its curves are made small enough for a page and written to docs/images.
"""

import io
import sys
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parent / "images"
WIDTH = 1200  # pixels, at most
LIMIT = 150_000  # bytes, at most


def small_png(path: Path, limit: int = LIMIT) -> bytes:
    """The picture as a PNG file of at most `limit` bytes: first with fewer colours, then with fewer pixels."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    width = min(WIDTH, image.width)
    content = b""
    while width >= 16:
        resized = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
        for picture in (resized, resized.quantize(256), resized.quantize(64)):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG", optimize=True)
            content = buffer.getvalue()
            if len(content) <= limit:
                return content
        width = width * 4 // 5
    return content


def main(run: Path, images: Path = IMAGES) -> None:
    """Writes `quickstart-pca.png` and `quickstart-curves.png`."""
    found = {"pca": sorted(run.glob("pictures/iteration-*/pca.png"))[-1:], "curves": [run / "pictures" / "curves.png"]}
    for name, paths in found.items():
        if not paths or not paths[0].is_file():
            sys.exit(f"{run} has no picture `{name}`; first type: composer dinocomp/train.py yamls/quickstart.yaml")
    images.mkdir(exist_ok=True)
    for name, (path,) in found.items():
        target = images / f"quickstart-{name}.png"
        target.write_bytes(small_png(path))
        print(f"{target}: {target.stat().st_size / 1e3:.0f} kB, from {path}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
