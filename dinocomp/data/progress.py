"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

_PERIOD = 30.0  # seconds between lines where there is no terminal


class Progress:
    """Counts images, or what `unit` says. `with Progress("converting train", 100) as bar: bar.advance(1)`."""

    def __init__(self, what: str, total: int, *, enabled: bool = True, unit: str = "images") -> None:
        self.what = what
        self.unit = unit
        self.total = total
        self.done = 0
        self.enabled = enabled
        self.begin = self.last = time.monotonic()
        self.bar = None

    def __enter__(self) -> "Progress":
        if self.enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, desc=self.what, unit=f" {self.unit}")
        return self

    def advance(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.enabled and self.done and time.monotonic() - self.last >= _PERIOD:
            self.last = time.monotonic()
            rate = self.done / (self.last - self.begin)
            left = (self.total - self.done) / rate
            print(
                f"{self.what}: {self.done} of {self.total} {self.unit}, {rate:.3g} a second, {left:.0f} s to go",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
