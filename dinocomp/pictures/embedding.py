"""A map of images: those that the network finds alike lie together."""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinocomp.pictures.canvas import (
    INK,
    LETTERS,
    MARGIN,
    PALETTE,
    PAPER,
    WIDTH,
    drawn,
    figure,
    page,
    points,
    resized,
    to_picture,
)

_FEW = 30  # images that t-SNE needs for neighbourhoods to mean something
_FIRST = 50  # principal components that t-SNE is given, as its authors do
_MARKERS = "os^DvPX<>p"
_COLOURED = 20  # classes at most


def map_images(vectors: Tensor, seed: int = 0) -> tuple[np.ndarray, str]:
    """Places [n, 2] of images, and the name of the method.

    t-SNE (van der Maaten and Hinton 2008) of the first 50 principal components of directions, since images are compared
    by cosine; of fewer than 30 images the first two components. A function of its arguments; no generator moves.

    Args:
        vectors: class tokens [n, D].
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    unit = F.normalize(vectors.double(), dim=-1).numpy()  # [n, D]
    if np.ptp(unit, axis=0).max(initial=0.0) < 1e-6:
        return np.zeros((len(unit), 2)), "all features are the same"
    number = min(_FIRST if len(unit) >= _FEW else 2, *unit.shape)
    reduced = PCA(number, svd_solver="full").fit_transform(unit)  # [n, number]
    if len(unit) < _FEW:
        return np.pad(reduced, ((0, 0), (0, 2 - number))), "two principal components"
    perplexity = min(30.0, (len(unit) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
    return tsne.fit_transform(reduced), "t-SNE"


def embedding_picture(
    images: Tensor, vectors: Tensor, labels: Tensor, classes: Sequence[str] = (), *, width: int = WIDTH
) -> Image.Image:
    """The map: points in the colours of up to 20 classes, else the images themselves.

    Args:
        images: uint8 [n, 3, H, W]; thumbnails will do.
        vectors: their class tokens [n, D].
        labels: int64 [n]; -1 where unknown.
        classes: names, by label.
    """
    places, method = map_images(vectors)
    title = "Map of the images"
    what = f"{len(images):,} images by their class tokens ({method}): near means alike."
    present = sorted(set(labels.tolist()) - {-1})
    if not 1 < len(present) <= _COLOURED:
        return page(title, f"{what} Where images would cover others, a dot.", _thumbnails(images, places, width))
    names = {label: classes[label] if label < len(classes) else str(label) for label in present}
    return page(title, f"{what} A colour a class.", _scatter(places, labels.numpy(), names, width))


def _scatter(places: np.ndarray, labels: np.ndarray, names: dict[int, str], width: int) -> Image.Image:
    from matplotlib.patheffects import withStroke

    longest = max(map(len, names.values()))
    columns = max(1, min(5, len(names), 46 // (min(longest, 18) + 4)))
    lines = -(-len(names) // columns)
    plot = figure(width - 2 * MARGIN + 30 * lines, width)
    axes = plot.add_subplot()
    unknown = labels < 0
    axes.scatter(*places[unknown].T, s=12, color="#c3c8d4", linewidths=0)
    for i, (label, name) in enumerate(names.items()):
        mine = labels == label
        marker, colour = _MARKERS[(i + i // len(PALETTE)) % len(_MARKERS)], PALETTE[i % len(PALETTE)]
        short = name if len(name) <= 18 else name[:17] + "…"
        size = 46 if len(labels) < 1000 else 20
        axes.scatter(
            *places[mine].T, s=size, color=colour, marker=marker, linewidths=0.5, edgecolors=PAPER, label=short
        )
        axes.annotate(
            short,
            _densest(places[mine]),
            ha="center",
            va="center",
            fontsize=points(LETTERS + 2),
            fontweight="bold",
            color=INK,
            path_effects=[withStroke(linewidth=5, foreground=PAPER, alpha=0.9)],
        )
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color("#e6e8ee")
    plot.legend(
        loc="outside lower center",
        ncols=columns,
        fontsize=points(LETTERS),
        frameon=False,
        labelcolor=INK,
        handletextpad=0.2,
        columnspacing=1.0,
        markerscale=1.5,
    )
    return drawn(plot)


def _densest(places: np.ndarray) -> np.ndarray:
    """That of the places [n, 2] which has a third of the others nearest: a class may lie in two heaps, and its middle
    in neither."""
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)  # [n, n]
    return places[np.sort(distances, axis=1)[:, len(places) // 3].argmin()]


def _thumbnails(images: Tensor, places: np.ndarray, width: int) -> Image.Image:
    """Images at their places; of those that would cover one another the first is shown."""
    side, canvas = (44 if len(images) > 60 else 64 if len(images) > 15 else 110), width - 2 * MARGIN
    low, spread = places.min(axis=0), np.ptp(places, axis=0)
    spread[spread == 0] = 1.0
    corner = (places - low) / spread * (canvas - side)  # [n, 2]
    corner[:, np.ptp(places, axis=0) == 0] = (canvas - side) / 2
    sheet = Image.new("RGB", (canvas, canvas), "#f4f5f8")
    shown: list[int] = []
    for i, place in enumerate(corner):
        if all(np.abs(place - corner[j]).max() >= 0.8 * side for j in shown):
            shown.append(i)
    dot = Image.new("RGB", (6, 6), "#98a2b3")
    for place in np.delete(corner, shown, axis=0):
        sheet.paste(dot, tuple((place + side / 2 - 3).astype(int)))
    for i in shown:
        sheet.paste(resized(to_picture(images[i]), side, side), tuple(corner[i].astype(int)))
    return sheet
