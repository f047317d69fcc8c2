"""What a conversion tells when it is done."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "dinocomp.json"


@dataclass(frozen=True)
class SplitReport:
    """What became of one split."""

    split: str
    path: str
    kind: str
    samples: int
    classes: int
    size: int  # bytes of the shards
    unreadable: list[list[str]]  # [key, reason]
    skipped: int  # files that are no images
    notes: list[str]
    reused: bool  # it had been converted before


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    splits: list[SplitReport]
    seconds: float

    def summary(self) -> str:
        """The report as text for the terminal."""
        lines = []
        for split in self.splits:
            state = "already converted" if split.reused else f"from {split.kind}"
            labels = f"{split.classes} classes" if split.classes else "no labels"
            lines.append(f"{split.path}: {split.samples} images, {labels}, {split.size / 1e6:.1f} MB ({state})")
            if split.skipped:
                lines.append(f"  {split.skipped} other files (not images, or hidden) were left aside")
            lines += [f"  note: {note}" for note in split.notes]
            if split.unreadable:
                lines.append(f"  {len(split.unreadable)} unreadable images were left out (all in {MANIFEST}):")
                lines += [f"    {key}: {reason}" for key, reason in split.unreadable[:20]]
        return "\n".join([*lines, f"done in {self.seconds:.1f} s"])


def split_report(manifest: dict[str, Any], path: Path, *, reused: bool) -> SplitReport:
    """The report of one split from its manifest."""
    return SplitReport(
        split=manifest["split"],
        path=str(path),
        kind=manifest["kind"],
        samples=manifest["samples"],
        classes=len(manifest["classes"]),
        size=manifest["bytes"],
        unreadable=manifest["unreadable"],
        skipped=manifest["skipped"],
        notes=manifest["notes"],
        reused=reused,
    )
