"""One form for the lines of long work: what is done, how fast, and how long the rest takes."""

import logging
import time
from datetime import timedelta

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """A log line every few seconds.

    Args:
        logger: of the module that works.
        what: the line's beginning, such as "embedded".
        unit: what is counted, such as "residues".
        total: how many there are, if known.
        start: how many were done before, which do not count in the rate.
    """

    def __init__(
        self, logger: logging.Logger, what: str, unit: str, total: float | None = None, start: float = 0
    ) -> None:
        self.logger, self.what, self.unit, self.total = logger, what, unit, total
        self.done = self.start = start
        self.began = self.logged = time.monotonic()

    def update(self, done: float, note: str = "") -> None:
        """Note how many are done by now, and log a line if the last one is old enough.

        Args:
            done: in all, of `total`.
            note: ends the line.
        """
        self.done = done
        if time.monotonic() - self.logged > SECONDS_BETWEEN_LINES:
            self.log(note)

    def log(self, note: str = "") -> None:
        """Log the line now."""
        self.logged = time.monotonic()
        rate = (self.done - self.start) / max(self.logged - self.began, 1e-9)
        parts = [f"{self.what} {self.done:,.0f} {self.unit}", f"{rate:,.{0 if rate >= 10 else 2}f} {self.unit}/s"]
        if self.total is not None:
            parts[0] = f"{self.what} {self.done:,.0f} of {self.total:,.0f} {self.unit}"
            if rate > 0:
                parts.append(f"{timedelta(seconds=round((self.total - self.done) / rate))} left")
        self.logger.info("%s", ", ".join([*parts, note] if note else parts))
