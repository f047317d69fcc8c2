"""How the teacher's DINO head uses its prototypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dinocomp.pictures.canvas import INK, LETTERS, PALE, PALETTE, WIDTH, drawn, figure, points, tidy


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
    number = len(usage.picked)
    rank = torch.arange(1, number + 1)
    mean = (usage.probability / usage.images).sort(descending=True).values  # [K]
    picked = usage.picked.sort(descending=True).values / usage.images  # [K]
    used = picked > 0
    plot = figure(560, width)
    axes = plot.add_subplot()
    axes.plot(rank, mean, color=PALETTE[0], linewidth=3, label="mean probability")
    axes.plot(rank[used], picked[used], color=PALETTE[1], linewidth=2.5, linestyle=":", label="share as the first choice")
    axes.axhline(1 / number, color=PALE, linewidth=2, linestyle="--", label=f"all {number:,} alike")
    axes.set(xscale="log", yscale="log", xlabel="prototype, the most used first", ylabel="share")
    # What nothing is given to, at 1e-30 say, would leave no room for the rest.
    axes.set_ylim(bottom=max(float(mean.min()), 1e-3 / number) / 2)
    tidy(axes, "")
    axes.legend(fontsize=points(LETTERS), frameon=False, labelcolor=INK, loc="lower left")
    plot.suptitle("How prototypes are used", fontsize=points(26), color=INK, fontweight="bold", x=0.025, ha="left")
    share = f"{usage.effective:,.1f} of {number:,} in effect (exp of the entropy)"
    text = f"{share}; {usage.unpicked:,} are no image's first choice, of {usage.images:,} images."
    axes.set_title(_folded(f"{text} {note}", 62), loc="left", fontsize=points(LETTERS), color=PALE)
    return drawn(plot)


def _folded(text: str, letters: int) -> str:
    import textwrap

    return textwrap.fill(text.strip(), letters)
