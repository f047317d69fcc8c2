"""What all pictures share: their width, letters, colours, and putting tiles on a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 780  # pixels: twice those of a phone, where letters of 20 pixels are then as large as 10 are here
LETTERS = 20  # pixels
MARGIN = 18
INK, PALE, PAPER = "#1b1f2a", "#667085", "#ffffff"
# Okabe and Ito's, which people tell apart who do not see all colours, less their yellow, which is pale on white, and
# with three more.
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C6D31",
    "#5D3A9B",
    "#9AA0AC",
)
RIGHT, WRONG = PALETTE[2], PALETTE[1]
_DPI = 100


@dataclass(frozen=True)
class Tile:
    """A square of a wall.

    Attributes:
        picture: of any size.
        caption: a line below it, cut where it is too long.
        frame: colour around it, None for none.
    """

    picture: Image.Image
    caption: str = ""
    frame: str | None = None


@lru_cache(maxsize=16)
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along, and knows the letters of most alphabets."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def to_picture(pixels: Tensor | np.ndarray) -> Image.Image:
    """uint8 [3, H, W], as images are here, to Pillow's."""
    return Image.fromarray(np.ascontiguousarray(np.asarray(pixels).transpose(1, 2, 0)))


def resized(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Small pictures keep their pixels as squares, so that nothing is seen that is not there."""
    blocky = 2 * picture.width <= width and 2 * picture.height <= height
    return picture.resize((width, height), Image.Resampling.NEAREST if blocky else Image.Resampling.LANCZOS)


def enlarged(patches: Image.Image, least: int = 780) -> Image.Image:
    """A patch is a square of one colour, also where a tile is no multiple of the grid."""
    factor = -(-least // max(patches.size))
    return patches.resize((patches.width * factor, patches.height * factor), Image.Resampling.NEAREST)


def cut(text: str, letters: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of a line as fits."""
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def folded(text: str, letters: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The lines of a paragraph."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if letters.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line]


def page(title: str, text: str, body: Image.Image) -> Image.Image:
    """A body under a title and a paragraph that says what is seen; as wide as the body and two margins."""
    width = body.width + 2 * MARGIN
    big, small = font(26, bold=True), font(LETTERS)
    head, lines = folded(title, big, body.width), folded(text, small, body.width)
    top = MARGIN + 34 * len(head) + 27 * len(lines) + 14
    sheet = Image.new("RGB", (width, top + body.height + MARGIN), PAPER)
    draw, y = ImageDraw.Draw(sheet), MARGIN - 4
    for line in head:
        draw.text((MARGIN, y), line, font=big, fill=INK)
        y += 34
    for line in lines:
        draw.text((MARGIN, y), line, font=small, fill=PALE)
        y += 27
    sheet.paste(body, (MARGIN, top))
    return sheet


def wall(rows: Sequence[Sequence[Tile]], gaps: Sequence[int], *, width: int = WIDTH) -> Image.Image:
    """Rows of square tiles, as a body for a page of that width.

    Args:
        rows: the tiles; a row may be shorter than others.
        gaps: pixels behind each column but the last.
    """
    columns = len(gaps) + 1
    side = (width - 2 * MARGIN - sum(gaps)) // columns
    letters = font(LETTERS if side >= 100 else LETTERS - 3)
    captions = any(tile.caption for row in rows for tile in row)
    height = side + (30 if captions else 0)
    space = 14 if captions else min(gaps, default=8)
    sheet = Image.new("RGB", (width - 2 * MARGIN, len(rows) * (height + space) - space), PAPER)
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        x, y = 0, r * (height + space)
        for tile, gap in zip(row, [*gaps, 0], strict=False):
            sheet.paste(resized(tile.picture, side, side), (x, y))
            if tile.frame:
                draw.rectangle((x, y, x + side - 1, y + side - 1), outline=tile.frame, width=5)
            caption = cut(tile.caption, letters, side)
            draw.text((x + side / 2, y + side + 4), caption, font=letters, fill=INK, anchor="ma")
            x += side + gap
    return sheet


def blocks(rows: Sequence[tuple[Sequence[Image.Image], Sequence[Image.Image]]], *, width: int = WIDTH) -> Image.Image:
    """Rows of large squares, and behind them small ones in up to three lines, as a body for a page of that width.

    Args:
        rows: large and small pictures; of each the same number in every row.
    """
    gap, between = 5, 14
    large_count, small_count = (len(pictures) for pictures in rows[0])
    lines = 1 if small_count < 6 else 2 if small_count <= 16 else 3
    columns = -(-small_count // lines)
    # A large square is as high as `lines` small ones.
    gaps = gap * (large_count + columns - 1 + large_count * (lines - 1))
    small = (width - 2 * MARGIN - gaps) // (large_count * lines + columns)
    large = small * lines + gap * (lines - 1)
    sheet = Image.new("RGB", (width - 2 * MARGIN, len(rows) * (large + between) - between), PAPER)
    for r, (of_large, of_small) in enumerate(rows):
        y = r * (large + between)
        for i, picture in enumerate(of_large):
            sheet.paste(resized(picture, large, large), (i * (large + gap), y))
        for i, picture in enumerate(of_small):
            x = large_count * (large + gap) + i // lines * (small + gap)
            sheet.paste(resized(picture, small, small), (x, y + i % lines * (small + gap)))
    return sheet


def figure(height: float, width: int = WIDTH) -> Figure:
    """An empty matplotlib figure, as a body for a page of that width; without pyplot, which would keep it."""
    from matplotlib.figure import Figure

    return Figure(figsize=((width - 2 * MARGIN) / _DPI, height / _DPI), dpi=_DPI, facecolor=PAPER, layout="constrained")


def points(pixels: float) -> float:
    """The size of letters in points, in which matplotlib counts."""
    return pixels * 72 / _DPI


def tidy(axes: Axes, title: str) -> None:
    """Letters that can be read on a phone, and no more lines than are needed."""
    if title:
        axes.set_title(title, loc="left", fontsize=points(22), color=INK, fontweight="bold")
    axes.tick_params(labelsize=points(LETTERS), colors=PALE, length=4)
    axes.grid(True, color="#e6e8ee", linewidth=1)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c3c8d4")
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(fontsize=points(LETTERS), color=PALE)


def drawn(plot: Figure) -> Image.Image:
    """A matplotlib figure as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(plot)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def png(picture: Image.Image, limit: int = 600_000) -> bytes:
    """A picture as a PNG of at most `limit` bytes.

    One that needs more gets 256 colours of its own, which is hard to see at this size and keeps letters sharp; one that
    needs more still is shrunk, as far as it takes.
    """
    data = _encoded(picture)
    while len(data) > limit:
        data = _encoded(picture.quantize(256))
        if len(data) <= limit:
            break
        shrink = 0.97 * (limit / len(data)) ** 0.5
        picture = picture.resize([max(1, round(side * shrink)) for side in picture.size], Image.Resampling.LANCZOS)
        if max(picture.size) == 1:
            break
    return data


def _encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_png(path: Path, picture: Image.Image, limit: int = 600_000) -> None:
    """Writes a picture, whole or not at all; see `png`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(png(picture, limit))
    partial.replace(path)
