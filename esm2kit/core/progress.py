"""Progress as log lines: the amount done, the rate, and the time left."""

import logging
import time
from datetime import timedelta

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Logs the progress of a long computation every few seconds.

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
        self.started = self.logged = time.monotonic()

    def update(self, done: float, note: str = "") -> None:
        """Set the amount done, and log a line if the last one is older than SECONDS_BETWEEN_LINES.

        Args:
            done: The amount done so far, including `start`.
            note: Text to append to the line.
        """
        self.done = done
        if time.monotonic() - self.logged > SECONDS_BETWEEN_LINES:
            self.log(note)

    def log(self, note: str = "") -> None:
        """Log a line now, with an optional note at its end."""
        self.logged = time.monotonic()
        rate = (self.done - self.start) / max(self.logged - self.started, 1e-9)
        parts = [
            f"{self.what} {self.done:,.0f} {self.unit}",
            f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s",
        ]
        if self.total is not None:
            parts[0] = f"{self.what} {self.done:,.0f} of {self.total:,.0f} {self.unit}"
            if rate > 0:
                parts.append(f"{timedelta(seconds=round((self.total - self.done) / rate))} left")
        self.logger.info("%s", ", ".join([*parts, note] if note else parts))
