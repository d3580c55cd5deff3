"""How far a run is: a live bar on a terminal, a plain line now and then elsewhere. Everything goes to standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 10.0  # seconds between plain lines

# Steps done, of how many, a note, and how many of them were done before this run (0): they say nothing about the rate.
Update = Callable[..., None]


class Reporter:
    """Says what is being done. ``with reporter.task("student") as update: update(done, total, "loss 0.1")``."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal

    def say(self, text: str) -> None:
        """One line."""
        if self._live:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def task(self, name: str) -> Iterator[Update]:
        """A piece of work with a known number of steps; shows rate and time left."""
        began = time.monotonic()
        if self._live:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            with Progress(*columns, console=self._console, transient=True) as bar:
                task = bar.add_task(name, total=None, rate="", note="")

                def update(done: int, total: int, note: str = "", before: int = 0) -> None:
                    rate = f"{(done - before) / max(time.monotonic() - began, 1e-9):.1f}/s"
                    bar.update(task, completed=done, total=total, rate=rate, note=note)

                yield update
        else:
            last = began

            def update(done: int, total: int, note: str = "", before: int = 0) -> None:
                nonlocal last
                now = time.monotonic()
                if now - last < EVERY or done <= before:
                    return
                last = now
                rate = (done - before) / (now - began)
                self.say(f"  {name}: {done}/{total}, {rate:.1f}/s, {(total - done) / rate:.0f} s left {note}".rstrip())

            yield update
        self.say(f"{name}: {time.monotonic() - began:.1f} s")
