"""How the teacher's DINO head uses its prototypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dinocomp.pictures.canvas import INK, LETTERS, PALE, PALETTE, WIDTH, drawn, figure, page, points, tidy


@dataclass(frozen=True)
class Usage:
    """Sums over images, which can be added up over batches."""

    picked: Tensor  # [K] int64, images whose largest logit it is
    probability: Tensor  # [K] fp64, summed over images
    images: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.picked + other.picked, self.probability + other.probability, self.images + other.images)

    @property
    def effective(self) -> float:
        """exp of the entropy of the mean probability: K where all are used alike, 1 for a single one."""
        return float(torch.special.entr(self.probability / self.images).sum().exp())

    @property
    def unpicked(self) -> int:
        """Prototypes that are the first of no image."""
        return int((self.picked == 0).sum())


def prototype_usage(logits: Tensor, temperature: float) -> Usage:
    """What images make of the prototypes.

    Args:
        logits: [n, K] of a teacher's head, less the centre where there is one.
        temperature: of the teacher.
    """
    logits = logits.detach().float().cpu()
    picked = torch.bincount(logits.argmax(dim=1), minlength=logits.shape[1])  # [K]
    return Usage(picked, (logits / temperature).softmax(dim=1).double().sum(dim=0), len(logits))


def prototypes_picture(usage: Usage, *, note: str = "", width: int = WIDTH) -> Image.Image:
    """Shares of the prototypes, the most used first, on logarithmic axes, beside equal shares.

    Args:
        note: a sentence to add to the text.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    number = len(usage.picked)
    rank = torch.arange(1, number + 1)
    mean = (usage.probability / usage.images).sort(descending=True).values * number  # [K], 1 is an equal share
    picked = usage.picked.sort(descending=True).values / usage.images * number  # [K]
    used = picked > 0
    plot = figure(520, width)
    axes = plot.add_subplot()
    axes.axhline(1, color=PALE, linewidth=2, linestyle="--", label="equal shares")
    axes.plot(rank, mean, color=PALETTE[0], linewidth=3.5, label="probability, on average")
    axes.plot(
        rank[used], picked[used], color=PALETTE[1], linewidth=3, linestyle=":", label="images whose first choice it is"
    )
    axes.set(xscale="log", yscale="log", xlabel="prototypes, the most used first", ylabel="times an equal share")
    # What nothing is given to, at 1e-30 say, would leave no room for the rest.
    axes.set_ylim(bottom=min(0.5, max(float(mean.min()), 1e-3)) / 1.5)
    tidy(axes, "")
    decades = float(axes.get_ylim()[1] / axes.get_ylim()[0])
    for axis, subs in ((axes.xaxis, (1,)), (axes.yaxis, (1, 2, 5) if decades < 300 else (1,))):
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_locator(NullLocator())
    axes.legend(fontsize=points(LETTERS), frameon=False, labelcolor=INK, loc="lower left")
    text = (
        f"{usage.effective:,.1f} of {number:,} in effect (exp of the entropy of the mean probability); "
        f"{usage.unpicked:,} are the first choice of none of {usage.images:,} images. {note}"
    )
    return page("How prototypes are used", text, drawn(plot))
