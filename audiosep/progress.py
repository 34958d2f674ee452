"""How a run shows itself: progress and notes on stderr, results on stdout.

Four displays with one interface: a bar with the time left, plain lines for logs, JSON lines for
other programs, nothing. Each may be told about several files at once, from several threads.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import TaskID

Callback = Callable[[int, int | None, str], None]  # done, total, message

PLAIN_SECONDS = 5.0  # between two plain lines about one file
JSON_SECONDS = 0.25


class Display:
    """Shows errors and results, and no progress. The base of the others."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def file(self, name: str) -> Callback:
        """A file begins; returns what its progress is reported to."""
        return lambda done, total, message: None

    def ended(self, name: str) -> None:
        """A file is done, or has failed: its progress need not be seen any longer."""

    def note(self, text: str) -> None:
        """A line on stderr, left out when quiet."""
        if not self._quiet:
            self.error(text)

    def error(self, text: str) -> None:
        """A line on stderr."""
        print(text, file=sys.stderr, flush=True)

    def result(self, text: str) -> None:
        """A line on stdout."""
        print(text, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class _Paced(Display):
    """Calls `show(name, done, total, left, message)` at the end, and now and then before."""

    seconds = PLAIN_SECONDS

    def file(self, name: str) -> Callback:
        start = last = time.monotonic()

        def callback(done: int, total: int | None, message: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < self.seconds and done != total:
                return
            last = now
            left = (now - start) * (total - done) / done if total and done else None
            self.show(name, done, total, left, message)

        return callback

    def show(self, name: str, done: int, total: int | None, left: float | None, message: str) -> None:
        """One line of progress; `left` in seconds."""
        raise NotImplementedError


class PlainDisplay(_Paced):
    """A line every few seconds."""

    def show(self, name: str, done: int, total: int | None, left: float | None, message: str) -> None:
        share = f"{done}/{total} ({done / total:.0%})" if total else f"{done}"
        eta = f", {clock(left)} left" if left else ""
        self.error(f"{name}: {message + ' ' if message else ''}{share}{eta}")


class JsonDisplay(_Paced):
    """One JSON object per line on stderr: {"event": "progress" | "note" | "error", ...}."""

    seconds = JSON_SECONDS

    def show(self, name: str, done: int, total: int | None, left: float | None, message: str) -> None:
        seconds = None if left is None else round(left, 1)
        self._event("progress", file=name, done=done, total=total, left=seconds, message=message)

    def note(self, text: str) -> None:
        if not self._quiet:
            self._event("note", text=text)

    def error(self, text: str) -> None:
        self._event("error", text=text)

    def _event(self, event: str, **fields: Any) -> None:
        super().error(json.dumps({"event": event, **fields}))


class BarDisplay(Display):
    """A bar per running file with the time left, drawn by rich on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__(quiet=quiet)
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        # stdout is left alone: it may be a pipe, and rich would draw it on stderr.
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[message]}", markup=False),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def file(self, name: str) -> Callback:
        task = self._tasks[name] = self._bars.add_task(name, total=None, message="")

        def callback(done: int, total: int | None, message: str) -> None:
            self._bars.update(task, completed=done, total=total, message=message)

        return callback

    def ended(self, name: str) -> None:
        with self._lock:
            self._bars.remove_task(self._tasks.pop(name))

    def error(self, text: str) -> None:
        self._between(lambda: super(BarDisplay, self).error(text))

    def result(self, text: str) -> None:
        self._between(lambda: super(BarDisplay, self).result(text))

    def _between(self, show: Callable[[], None]) -> None:
        """Print while the bars are away."""
        with self._lock:
            running = self._bars.live.is_started
            self._bars.stop()
            show()
            if running:
                self._bars.start()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


def display(mode: str, *, quiet: bool = False) -> Display:
    """The display for "auto", "plain", "json" or "none"; quiet keeps errors and results only.

    "auto" is a bar on a terminal and plain lines elsewhere.
    """
    if mode == "json":
        return JsonDisplay(quiet=quiet)
    if mode == "none" or quiet:
        return Display(quiet=quiet)
    if mode == "auto" and sys.stderr.isatty():
        return BarDisplay()
    return PlainDisplay()


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
