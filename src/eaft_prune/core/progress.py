"""Progress bars with rates and ETA for whatever takes longer than a second."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Bars:
    """Draws bars on stderr, or none."""

    enabled: bool = True

    @contextmanager
    def bar(self, label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        """A bar over `total` units (None: not known).

        Call what it yields with the units done since the last call.
        """
        from tqdm import tqdm

        with tqdm(
            desc=label,
            total=total,
            unit=unit,
            unit_scale=True,
            delay=1.0,
            mininterval=0.2 if sys.stderr.isatty() else 5.0,
            disable=not self.enabled,
            leave=False,
            dynamic_ncols=True,
        ) as bar:
            lock = threading.Lock()  # several threads may report

            def advance(done: int) -> None:
                with lock:
                    bar.update(done)

            yield advance
