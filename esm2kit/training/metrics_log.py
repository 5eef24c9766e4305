"""Metrics of a running training: rows of metrics.csv, and progress lines in the log."""

import csv
import logging
import time
import zlib
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from esm2kit.core.checksums import raise_damaged
from esm2kit.core.files import atomic_path
from esm2kit.core.hardware import matmul_rate, read_memory_use, return_freed_memory
from esm2kit.core.numbers import format_decimals
from esm2kit.core.progress import Progress
from esm2kit.training.precision import matmul_dtype

logger = logging.getLogger(__name__)

COLUMNS = ("lr", "grad_norm", "tokens", "tokens_per_s", "seconds")
UPDATES_BETWEEN_TRIMS = 10
# Rates and the time left are computed over about the last minute of training: on a shared machine, the mean since the
# start may be out of date.
RATE_SECONDS = 60.0


class TrainingLog(Callback):
    """Appends rows to `<out_dir>/metrics.csv` and logs progress.

    When a run resumes, rows of updates after its checkpoint are removed.

    Args:
        out_dir: The folder of the run.
        every_n_steps: Updates between rows.
        unigram_perplexity: Perplexity of the unigram baseline, logged with each validation; None if there is none.
        first_step: Updates made before this process started.
        validation_metrics: Names of the validation metrics, each of which is a column.
    """

    def __init__(
        self,
        out_dir: Path,
        every_n_steps: int,
        unigram_perplexity: float | None,
        first_step: int,
        validation_metrics: tuple[str, ...] = ("val_loss", "val_perplexity"),
    ) -> None:
        self.path = Path(out_dir) / "metrics.csv"
        self.every_n_steps, self.unigram_perplexity, self.first_step = every_n_steps, unigram_perplexity, first_step
        self.columns = ("step", "train_loss", *validation_metrics, *COLUMNS)
        # since the process started; those of the interval are the tokens at its start
        self.tokens, self.flops, self.started = 0.0, 0.0, 0.0
        self.progress: Progress | None = None
        self.peak_flops = 0.0
        self.interval_tokens, self.interval_started, self.validation_started = 0.0, 0.0, 0.0
        self.validating = 0.0
        # seconds of training, updates, tokens and FLOP at each line of the last minute and the line before
        self.recent_totals: deque[tuple[float, int, float, float]] = deque()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure the peak FLOP rate and prepare metrics.csv."""
        if trainer.is_global_zero:
            dtype = matmul_dtype(module.config.precision)
            self.peak_flops = _measure_peak_flops(module.device.type, dtype) * trainer.world_size
            rows = read_metrics(self.path)
            kept = [row for row in rows if row["step"].isdigit() and int(row["step"]) <= self.first_step]
            # before and after a resumption, a run may have different metrics
            self.columns += tuple(name for name in (kept[0] if kept else ()) if name not in self.columns)
            # written to a temporary file first, so that a kill or a full disk cannot lose the existing rows
            with atomic_path(self.path) as part, open(part, "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(kept)
        self.progress = Progress(logger, "update", "updates", module.config.max_steps, self.first_step)
        self.started = self.interval_started = time.monotonic()
        self.validating, self.recent_totals = 0.0, deque([(0.0, self.first_step, 0.0, 0.0)])

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Write a row and log a line if they are due."""
        end = module.config.max_steps
        if module.device.type == "cpu" and module.step % UPDATES_BETWEEN_TRIMS == 0:
            return_freed_memory()
        self.progress.done = module.step
        adds_row = module.step % self.every_n_steps == 0 or module.step in (1, end)
        shows_line = self.progress.is_due() or module.step in (self.first_step + 1, end)
        if not (adds_row or shows_line):
            return
        update = module.last_update  # only here, because reading it waits for the device
        now = time.monotonic()
        self.tokens, self.flops = update["total_tokens"], update["total_flops"]
        if adds_row:
            rate = (self.tokens - self.interval_tokens) / max(now - self.interval_started, 1e-9)
            names = ("train_loss", "lr", "grad_norm", "tokens")
            self._append(trainer, module.step, {name: update[name] for name in names} | {"tokens_per_s": round(rate)})
            self.interval_tokens, self.interval_started = self.tokens, now
        if shows_line:
            seconds, updates, tokens, flops = self._totals_of_last_minute(now, module.step)
            # assume that validations keep taking the same share of the time
            share = (now - self.started) / max(now - self.started - self.validating, 1e-9)
            left = seconds / updates * (end - module.step) * share
            parts = [
                f"update {module.step}/{end}",
                f"loss {format_decimals(update['train_loss'])}",
                f"lr {update['lr']:.2e}",
                f"{tokens / seconds:,.0f} tokens/s",
                f"MFU {flops / seconds / self.peak_flops:.0%}" if self.flops and self.peak_flops else "",
                f"{read_memory_use(module.device, peak=True) / 2**30:.1f} GiB",
                time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else f"{left / 86400:.1f} days",
            ]
            self.progress.show(f"{'  '.join(filter(None, parts))} left")

    def _totals_of_last_minute(self, now: float, step: int) -> tuple[float, int, float, float]:
        """Return seconds of training, updates, tokens and FLOP since the line of about a minute ago."""
        current = (now - self.started - self.validating, step, self.tokens, self.flops)
        while len(self.recent_totals) > 1 and current[0] - self.recent_totals[1][0] >= RATE_SECONDS:
            self.recent_totals.popleft()
        seconds, updates, tokens, flops = (now - then for now, then in zip(current, self.recent_totals[0], strict=True))
        self.recent_totals.append(current)
        return max(seconds, 1e-9), max(updates, 1), tokens, flops

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Remove the progress bar."""
        self.progress.close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Remove the progress bar, so that the error has a line of its own."""
        if self.progress:
            self.progress.close()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clock of a validation."""
        self.validation_started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write a row with the validation metrics and log them."""
        metrics = module.last_validation
        self._append(trainer, module.step, metrics)
        message = "  ".join(f"{name} {format_decimals(value)}" for name, value in metrics.items())
        baseline = (
            ""
            if self.unigram_perplexity is None
            else f"  (unigram baseline {format_decimals(self.unigram_perplexity)})"
        )
        logger.info("update %d  %s%s", module.step, message, baseline)
        # validation does not count as training time
        seconds = time.monotonic() - self.validation_started
        self.interval_started += seconds
        self.validating += seconds

    def _append(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        if trainer.is_global_zero:
            for external in trainer.loggers:
                external.log_metrics(metrics, step)
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                row = {"step": step, "seconds": round(time.monotonic() - self.started, 3)} | metrics
                csv.DictWriter(file, self.columns).writerow(row)


@cache
def _measure_peak_flops(device: str, dtype: torch.dtype) -> float:
    """Measure the device's FLOP rate, once per process: it takes half a second, and a process may train many seeds."""
    # on Apple's GPU a product returns before it is computed: with 0 no MFU is shown
    return 0.0 if device == "mps" else matmul_rate(device, dtype)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Read the rows of a metrics.csv.

    Args:
        path: The file.

    Returns:
        Per row, the text of each column by name. An incomplete last line, as a kill may leave it, is omitted. The list
        is empty if the file does not exist.
    """
    if not Path(path).exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["seconds"] is not None]


def checksum_metrics(path: Path) -> dict[str, int]:
    """Compute the size and the CRC-32 of a metrics.csv; a file that does not exist is empty."""
    content = Path(path).read_bytes() if Path(path).exists() else b""
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def check_metrics(path: Path, recorded: dict[str, int]) -> None:
    """Check that a metrics.csv still starts with what it contained when a checkpoint was written.

    Args:
        path: The file. If it does not exist, the run continues without its earlier rows.
        recorded: The `checksum_metrics` in the checkpoint.

    Raises:
        InputError: The file was damaged or changed.
    """
    if not Path(path).exists():
        return
    with open(path, "rb") as file:
        content = file.read(recorded["bytes"])
    if len(content) < recorded["bytes"] or zlib.crc32(content) != recorded["crc32"]:
        raise_damaged(path, "its rows differ from those at the checkpoint", "delete it to continue without these rows")
