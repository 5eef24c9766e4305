"""What training says while it runs: metrics.csv for figures, and a line every few seconds for people."""

import csv
import logging
import time
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from esm2kit.core.files import atomic_path
from esm2kit.core.hardware import matmul_rate, read_memory_use, return_freed_memory
from esm2kit.training.precision import matmul_dtype

logger = logging.getLogger(__name__)

COLUMNS = ("lr", "grad_norm", "tokens", "tokens_per_s", "seconds")
# between lines: seconds at first, then a share of the time so far, so that a long run's log stays readable
SECONDS_BETWEEN_LINES, SHARE_BETWEEN_LINES = 5.0, 0.1
# with an update and a validation on top still under the half minute after which a reader begins to wonder
MOST_SECONDS_BETWEEN_LINES = 20.0
UPDATES_BETWEEN_TRIMS = 10
# a line's rates and time left are of about the last minute of training: on a shared machine the mean since the start
# tells of hours that are over
RATE_SECONDS = 60.0


class TrainingLog(Callback):
    """Appends rows to `<out_dir>/metrics.csv` and logs progress; on resuming, rows of later updates are dropped.

    Args:
        out_dir: the run's folder.
        every: updates between rows.
        unigram_perplexity: the floor, said beside each validation; None where there is no such thing.
        first_step: updates made before this process began.
        figures: what a validation gives, columns of their own.
    """

    def __init__(
        self,
        out_dir: Path,
        every: int,
        unigram_perplexity: float | None,
        first_step: int,
        figures: tuple[str, ...] = ("val_loss", "val_perplexity"),
    ) -> None:
        self.path = Path(out_dir) / "metrics.csv"
        self.every_n_steps, self.unigram_perplexity, self.first_step = every, unigram_perplexity, first_step
        self.columns = ("step", "train_loss", *figures, *COLUMNS)
        self.tokens, self.flops, self.started, self.last_line = 0.0, 0.0, 0.0, 0.0
        self.peak_flops = 0.0
        self.interval_tokens, self.interval_started, self.validation_started = 0.0, 0.0, 0.0
        self.validating = 0.0
        # seconds of training, updates, tokens and FLOP at the lines of the last minute and the one before
        self.recent_totals: deque[tuple[float, int, float, float]] = deque()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            dtype = matmul_dtype(module.config.precision)
            self.peak_flops = _measure_peak_flops(module.device.type, dtype) * trainer.world_size
            kept = [row for row in read_metrics(self.path) if int(row["step"]) <= self.first_step]
            # a resumed run may have figures that the one before had not, and the other way round
            self.columns += tuple(name for name in (kept[0] if kept else ()) if name not in self.columns)
            # beside it first: a kill or a full disk between a cut file and its rows would lose the run's history
            with atomic_path(self.path) as part, open(part, "w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(kept)
        self.started = self.interval_started = time.monotonic()
        self.validating, self.recent_totals = 0.0, deque([(0.0, self.first_step, 0.0, 0.0)])

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        now, update = time.monotonic(), module.last_update
        self.tokens += update["tokens"]
        self.interval_tokens += update["tokens"]
        self.flops += update.get("flops", 0.0)
        end = module.config.max_steps
        if module.device.type == "cpu" and module.step % UPDATES_BETWEEN_TRIMS == 0:
            return_freed_memory()
        if module.step % self.every_n_steps == 0 or module.step in (1, end):
            rate = self.interval_tokens / max(now - self.interval_started, 1e-9)
            names = ("train_loss", "lr", "grad_norm", "tokens")
            self._append(trainer, module.step, {name: update[name] for name in names} | {"tokens_per_s": round(rate)})
            self.interval_tokens, self.interval_started = 0.0, now
        pause = min(MOST_SECONDS_BETWEEN_LINES, SHARE_BETWEEN_LINES * (now - self.started))
        pause = max(SECONDS_BETWEEN_LINES, pause)
        if now - self.last_line > pause or module.step in (self.first_step + 1, end):
            self.last_line = now
            seconds, updates, tokens, flops = self._totals_of_last_minute(now, module.step)
            # validations will go on taking the share of the time that they took so far
            share = (now - self.started) / max(now - self.started - self.validating, 1e-9)
            left = seconds / updates * (end - module.step) * share
            logger.info(
                "update %d/%d  loss %.4f  lr %.2e  %s tokens/s%s%s  %s left",
                *(module.step, end, update["train_loss"], update["lr"], f"{tokens / seconds:,.0f}"),
                f"  MFU {flops / seconds / self.peak_flops:.0%}" if self.flops and self.peak_flops else "",
                f"  {read_memory_use(module.device, peak=True) / 2**30:.1f} GiB",
                time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else f"{left / 86400:.1f} days",
            )

    def _totals_of_last_minute(self, now: float, step: int) -> tuple[float, int, float, float]:
        """Seconds of training, updates, tokens and FLOP since the line of about a minute ago."""
        here = (now - self.started - self.validating, step, self.tokens, self.flops)
        while len(self.recent_totals) > 1 and here[0] - self.recent_totals[1][0] >= RATE_SECONDS:
            self.recent_totals.popleft()
        seconds, updates, tokens, flops = (one - other for one, other in zip(here, self.recent_totals[0], strict=True))
        self.recent_totals.append(here)
        return max(seconds, 1e-9), max(updates, 1), tokens, flops

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.validation_started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        figures = module.last_validation
        self._append(trainer, module.step, figures)
        told = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        floor = "" if self.unigram_perplexity is None else f"  (unigram floor {self.unigram_perplexity:.4f})"
        logger.info("update %d  %s%s", module.step, told, floor)
        # a validation is not training time
        took = time.monotonic() - self.validation_started
        self.interval_started += took
        self.validating += took

    def _append(self, trainer: Trainer, step: int, figures: dict[str, float]) -> None:
        if trainer.is_global_zero:
            for other in trainer.loggers:
                other.log_metrics(figures, step)
            with open(self.path, "a", newline="") as file:
                row = {"step": step, "seconds": round(time.monotonic() - self.started, 3)} | figures
                csv.DictWriter(file, self.columns).writerow(row)


@cache
def _measure_peak_flops(device: str, dtype: torch.dtype) -> float:
    """The ceiling, measured once a process: of several seeds each would begin with half a second of it."""
    return matmul_rate(device, dtype)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics.csv as text by column; a last line cut short by a kill is left out, an absent file has none."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if row["seconds"] is not None]
