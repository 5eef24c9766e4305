"""Progress of a long computation: a bar on a terminal, and elsewhere a line in the log every few seconds."""

import logging
import shutil
import time
from datetime import timedelta
from typing import Any, Self

# The interval between lines grows as a share of the time so far, which keeps the log of a long run short.
SECONDS_BETWEEN_LINES, SHARE_BETWEEN_LINES, MOST_SECONDS_BETWEEN_LINES = 5.0, 0.1, 20.0
SECONDS_BETWEEN_REDRAWS = 0.2
BAR_WIDTH = 20


class LogHandler(logging.StreamHandler):
    """Writes log lines to a stream, above the bar that is shown on it; there is at most one."""

    shown: "Progress | None" = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        if self.shown is None:
            super().emit(record)
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(self.stream):
            super().emit(record)

    def close_bar(self) -> None:
        """Remove the bar, if there is one."""
        if self.shown is not None:
            self.shown.close()

    def can_show_bars(self) -> bool:
        """Return whether the stream is a terminal."""
        return hasattr(self.stream, "isatty") and self.stream.isatty()


class Progress:
    """Shows the progress of a long computation.

    On a terminal to which a LogHandler writes, the progress is a bar, until `close` or the next bar. Elsewhere it is a
    log line every few seconds. If the logger does not log at level INFO, nothing is shown.

    Args:
        logger: Logger of the calling module.
        what: Start of the line, such as "embedded".
        unit: The unit that is counted, such as "residues".
        total: The total amount, if known.
        start: The amount done earlier, which does not count in the rate.
    """

    def __init__(
        self, logger: logging.Logger, what: str, unit: str, total: float | None = None, start: float = 0
    ) -> None:
        self.logger, self.what, self.unit, self.total = logger, what, unit, total
        self.done = self.start = start
        self.started = self.shown = time.monotonic()
        handlers = (handler for handler in logging.getLogger().handlers if isinstance(handler, LogHandler))
        handler = next(handlers, None)
        can_show_bar = handler is not None and handler.can_show_bars() and logger.isEnabledFor(logging.INFO)
        self.handler = handler if can_show_bar else None
        self.bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def is_due(self) -> bool:
        """Return whether `update` and `show` have to be called: the last time was long enough ago."""
        now = time.monotonic()
        if self.handler:
            return now - self.shown > SECONDS_BETWEEN_REDRAWS
        pause = min(MOST_SECONDS_BETWEEN_LINES, SHARE_BETWEEN_LINES * (now - self.started))
        return now - self.shown > max(SECONDS_BETWEEN_LINES, pause)

    def update(self, done: float, note: str = "") -> None:
        """Set the amount done, and show it if that is due.

        Args:
            done: The amount done so far, including `start`.
            note: Text to append to the line.
        """
        self.done = done
        if self.is_due():
            self.show(self._describe(note))

    def show(self, line: str) -> None:
        """Show a line now: in the log, or next to the bar.

        Args:
            line: The progress in words.
        """
        self.shown = time.monotonic()
        if self.handler is None:
            self.logger.info("%s", line)
            return
        done = self.done if self.total is None else min(self.done, self.total)
        width = shutil.get_terminal_size().columns - (BAR_WIDTH + 6 if self.total else 0) - 1
        line = line if len(line) <= width else f"{line[: max(width - 2, 1)]} …"
        if self.bar is None:
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no thread of its own
            self.handler.close_bar()
            self.handler.shown = self
            shape = f"{{bar:{BAR_WIDTH}}} {{percentage:3.0f}}% {{desc}}" if self.total else "{desc}"
            stream = self.handler.stream
            self.bar = tqdm(
                desc=line,
                total=self.total,
                initial=done,
                file=stream,
                leave=False,
                bar_format=shape,
                dynamic_ncols=True,
            )
            return
        self.bar.n = done
        self.bar.set_description_str(line)

    def log(self, note: str = "") -> None:
        """Remove the bar and log the amount done, the rate and a note."""
        self.close()
        self.shown = time.monotonic()
        self.logger.info("%s", self._describe(note, ended=True))

    def close(self) -> None:
        """Remove the bar, if there is one."""
        if self.bar is not None:
            self.bar.close()
            self.bar = self.handler.shown = None

    def _describe(self, note: str, ended: bool = False) -> str:
        """Describe the amount done, the rate and, before the end, the time left."""
        rate = (self.done - self.start) / max(time.monotonic() - self.started, 1e-9)
        parts = [
            f"{self.what} {self.done:,.0f} {self.unit}",
            f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s",
        ]
        if self.total is not None:
            parts[0] = f"{self.what} {self.done:,.0f} of {self.total:,.0f} {self.unit}"
            if rate > 0 and not ended:
                parts.append(f"{timedelta(seconds=round((self.total - self.done) / rate))} left")
        return ", ".join([*parts, note] if note else parts)
