"""Checkpoints of a run and how it resumes from them.

A checkpoint holds the model, the optimizer state and the number of updates. Tensors are stored unsharded under their
parameter names, so a run can resume with another layout. After a stop signal, the run finishes the current update and
writes a checkpoint.
"""

import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path, check_output_folder, hold_lock, to_json
from esm2kit.core.hardware import read_free_memory
from esm2kit.core.numbers import format_decimals
from esm2kit.core.process_group import gather_strings
from esm2kit.core.processes import STOP_SIGNALS, rank
from esm2kit.models.checkpoint import copy_to_host, gather, read_checkpoint, read_metadata, write_checkpoint
from esm2kit.training.config import TrainingConfig
from esm2kit.training.metrics_log import check_metrics, checksum_metrics

logger = logging.getLogger(__name__)


class ResumePoint(NamedTuple):
    """A checkpoint to resume from.

    Args:
        path: The checkpoint file.
        metadata: Its metadata.
        parts: Its tensors by the prefix before the first dot of their names, then by the rest of the name.
    """

    path: Path
    metadata: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]

    @property
    def step(self) -> int:
        """Number of updates made."""
        return self.metadata["step"]

    @property
    def model(self) -> dict[str, Tensor]:
        """Tensors of the model by parameter name."""
        return self.parts["model"]

    @property
    def optimizer(self) -> dict[str, Tensor]:
        """Tensors of the optimizer by `<parameter name>.<state name>`."""
        return self.parts["optimizer"]


def find_resume_point(out_dir: Path, config: TrainingConfig, manifest: dict[str, Any]) -> ResumePoint | None:
    """Read the last checkpoint in out_dir and check that it belongs to this run.

    Args:
        out_dir: The folder of the run.
        config: The run to continue.
        manifest: The provenance of the run; its input hashes must be those of the checkpoint.

    Returns:
        The checkpoint; None if there is none or if the configuration turns resuming off.

    Raises:
        InputError: The checkpoint belongs to another run; the message lists the differences. Or metrics.csv is damaged.
    """
    path = out_dir / "checkpoints" / "last.safetensors"
    if not (config.resume_if_exists and path.exists()):
        return None
    tensors, metadata = read_checkpoint(path)
    # a field that did not exist when the checkpoint was written has its default value
    before, now = _defaults(config) | metadata["provenance"]["config"], to_json(config)
    free = {each.name for each in fields(config) if each.metadata.get("resume") == "free"}
    differing = {name: (before.get(name), now[name]) for name in now.keys() - free}
    differing["global_batch_size"] = metadata["global_batch_size"], config.layout.global_batch_size
    # the dataset or the weights at the same path may have changed since
    for name in ("data", "model"):
        inputs = [each["inputs"].get(name, {}).get("sha256") for each in (metadata["provenance"], manifest)]
        differing[f"the {name}'s sha256"] = tuple(digest and digest[:12] for digest in inputs)
    differing = {name: values for name, values in sorted(differing.items()) if values[0] != values[1]}
    if differing:
        listed = ", ".join(f"{name} was {before} and is now {now}" for name, (before, now) in differing.items())
        raise InputError(
            f"{path} belongs to another run: {listed}. Choose another --out_dir, or pass --resume_if_exists false to "
            "overwrite it.",
            code="resume.another-run",
            path=str(path),
            changed=listed,
        )
    if "metrics_csv" in metadata:
        check_metrics(out_dir / "metrics.csv", metadata["metrics_csv"])
    return ResumePoint(path, metadata, group_by_prefix(tensors))


def _defaults(config: TrainingConfig) -> dict[str, Any]:
    """Return the default values of a dataclass's fields; fields without a default are omitted."""
    values = {field.name: field.default for field in fields(config) if field.default is not MISSING}
    built = {field.name: field.default_factory() for field in fields(config) if field.default_factory is not MISSING}
    return to_json(values | built)


def group_by_prefix(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group a checkpoint's tensors by the prefix before the first dot (model, optimizer, head ...)."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Load an optimizer's state, sharded as its parameters are now.

    Args:
        model: The model whose parameters the optimizer trains.
        optimizer: The optimizer, changed in place.
        state: `<parameter name>.<exp_avg | exp_avg_sq | step>` -> unsharded tensor.
    """
    for name, parameter in _trained_parameters(model, optimizer):
        held = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.rpartition(".")[0] == name}
        for key, value in held.items():
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                value = value.to(parameter.device)
                shards = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
                optimizer.state[parameter][key] = shards
            else:  # also the step, which a fused kernel counts on the GPU and Lightning does not move
                optimizer.state[parameter][key] = value.to(parameter.device, copy=True)


def collect_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Collect the tensors of model and optimizer by name, without moving or gathering them.

    Args:
        model: The model whose parameters the optimizer trains.
        optimizer: The optimizer.
        keep: Predicate on the names of the model's tensors.

    Returns:
        `model.<name>` and `optimizer.<parameter name>.<state name>` -> tensor.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if keep(name)}
    for name, parameter in _trained_parameters(model, optimizer):
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def _trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter in stepped)


def set_start_step(trainer: Trainer, step: int) -> None:
    """Set Lightning's counters to `step`, so that validations and logged steps match an uninterrupted run."""
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = step
    for progress in (loop.batch_progress.total, loop.manual_optimization.optim_step_progress.total):
        progress.ready = progress.completed = step


@contextmanager
def lock_run_folder(out_dir: Path) -> Iterator[None]:
    """Lock a run's folder on the first rank, so that two runs cannot write the same checkpoints.

    Args:
        out_dir: The folder, created if needed.

    Yields:
        None.

    Raises:
        InputError: Another run holds the lock.
    """
    if rank():
        yield
        return
    check_output_folder(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    message = f"{out_dir}: another run is training here; stop it, or choose another --out_dir"
    with hold_lock(out_dir / ".lock", message):
        yield


def stop_after_update(trainer: Trainer, step: int) -> None:
    """End the run after update `step`; Lightning validates only if a validation is due at this step."""
    trainer.should_stop = True
    if step % int(trainer.val_check_interval):
        trainer.limit_val_batches = 0


class CheckpointWriter(Callback):
    """Writes `checkpoints/last.safetensors` at each validation, at the end of the run and after a stop signal.

    The best checkpoints by val_loss stay under names that hold their step and val_loss. While training continues, a
    checkpoint is a copy in host memory that a thread writes, one at a time: the next save waits for it, and so does the
    end of the run. If the copy would take more than half of the free memory, training waits for each save instead.

    Args:
        out_dir: The folder of the run.
        save_top_k: Number of best checkpoints to keep.
        manifest: The provenance of the run.
        global_batch_size: Sequences per update, to convert updates to consumed samples.
    """

    def __init__(
        self,
        out_dir: Path,
        save_top_k: int,
        manifest: dict[str, Any],
        global_batch_size: int,
    ) -> None:
        self.folder = Path(out_dir) / "checkpoints"
        self.last = self.folder / "last.safetensors"
        self.save_top_k, self.manifest, self.global_batch_size = save_top_k, manifest, global_batch_size
        self.saved_step: int | None = None
        self.pending: Future | None = None  # the checkpoint that is being written
        self.buffers: dict[str, Tensor] = {}
        self.handlers: dict[int, Any] = {}

    def best(self) -> Path:
        """Return the path of the checkpoint with the lowest val_loss; of the last one if none was validated."""
        self._finish_writing()
        return min(self._list_retained(), default=(0.0, self.last))[1]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Check that all ranks start at the same update with the same data, and install the stop signals' handlers.

        Args:
            trainer: The trainer.
            module: The module that trains.

        Raises:
            InputError: The ranks found different checkpoints, or read different data.
        """
        updates = gather_strings([str(module.step)])
        if len(set(updates)) > 1:
            raise InputError(
                f"{self.folder}: ranks disagree on the checkpoint step ({', '.join(updates)}). Choose an --out_dir on "
                "a file system that all nodes share.",
                code="resume.ranks-differ",
                path=self.folder,
                updates=updates,
            )
        # sets that are chosen by sequence identity may differ where only some nodes have MMseqs2
        digests = gather_strings([self.manifest["inputs"].get("data", {}).get("sha256", "")])
        if len(set(digests)) > 1:
            raise InputError(
                f"ranks disagree on the data (SHA-256 {', '.join(digest[:12] for digest in digests)}). Use the same "
                "files and programs on all nodes; for a table of labels, pass its split.csv as the task.",
                code="resume.data-differ",
                digests=digests,
            )
        if trainer.is_global_zero:
            self._clean_up(module.step)

        def stop(number: int, frame: FrameType | None) -> None:
            logger.info(
                "%s: finishing this update, then saving; send the signal again to stop immediately",
                signal.Signals(number).name,
            )
            module.stop_requested = True
            signal.signal(number, self.handlers[number])

        for number in STOP_SIGNALS:  # Lightning restores the old handlers when the run ends
            self.handlers[number] = signal.signal(number, stop)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Raise the error of the thread, if it could not write the last checkpoint."""
        if self.pending is not None and self.pending.done():
            self._finish_writing()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the last checkpoint and update the best ones, while training continues unless it ends here."""
        self._save(trainer, module, module.last_validation, at_end=module.finished or trainer.should_stop)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the last checkpoint, unless a validation has just written it, and wait until it is complete."""
        if self.saved_step != module.step:
            self._save(trainer, module, {}, at_end=True)
        self._finish_writing()
        self.buffers.clear()
        trainer.strategy.barrier()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Wait until the checkpoint that is being written is complete; its error is only logged."""
        try:
            self._finish_writing()
        except (InputError, OSError) as error:
            logger.error("%s", error)

    def _finish_writing(self) -> None:
        """Wait for the checkpoint that is being written, and raise the error of the thread."""
        if self.pending is not None:
            wait([self.pending])  # interruptible, and then still pending
            pending, self.pending = self.pending, None
            pending.result()

    def _save(self, trainer: Trainer, module: LightningModule, metrics: dict[str, float], at_end: bool) -> None:
        """Write the last checkpoint in a thread, or at the end of the run before it returns."""
        self._finish_writing()
        tensors = module.checkpoint_tensors()
        if trainer.is_global_zero:
            metadata = {
                "model": module.esm2.config,
                "step": module.step,
                "consumed_samples": module.step * self.global_batch_size,
                "global_batch_size": self.global_batch_size,
                **metrics,
                **module.checkpoint_details(),
                "provenance": self.manifest,
                "metrics_csv": checksum_metrics(self.folder.parent / "metrics.csv"),
            }
            if at_end or not self._can_copy(tensors):
                self._write(tensors, metadata)
            else:
                copies = copy_to_host(tensors, self.buffers)
                executor = ThreadPoolExecutor(1, "checkpoint")
                self.pending = executor.submit(self._write, copies, metadata)
                executor.shutdown(wait=False)  # the thread ends after its work
        else:
            gather(tensors)
        self.saved_step = module.step

    def _can_copy(self, tensors: dict[str, Tensor]) -> bool:
        """Check whether a copy of the tensors takes at most half of the free memory."""
        if self.buffers:
            return True
        size, free = (
            sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()),
            read_free_memory(torch.device("cpu")),
        )
        fits = free is None or 2 * size <= free
        if not fits and self.saved_step is None:
            logger.info(
                "training waits for each checkpoint: a copy would take %.1f of %.1f GiB of free memory",
                size / 2**30, free / 2**30,
            )  # fmt: skip
        return fits

    def _write(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write the last checkpoint and, after a validation, update the best ones."""
        step = metadata["step"]
        try:
            write_checkpoint(self.last, tensors, metadata)
        except OSError as error:
            state = "it still holds an earlier update" if self.last.exists() else "there is no checkpoint yet"
            raise InputError(
                f"{self.last}: cannot write update {step} ({error}); {state}",
                code="checkpoint.write",
                path=self.last,
                update=step,
            ) from error
        if "val_loss" in metadata:
            self._retain(step, metadata["val_loss"])

    def _retain(self, step: int, val_loss: float) -> None:
        if self.save_top_k:
            _link(self.last, self.folder / f"step={step:07d}-val_loss={format_decimals(val_loss)}.safetensors")
            for _, path in sorted(self._list_retained())[self.save_top_k :]:
                path.unlink()

    def _clean_up(self, step: int) -> None:
        """Delete incomplete files and, for a new run, old checkpoints; retain the last one if a kill prevented it."""
        for partial in self.folder.glob("*.part"):
            partial.unlink()
        if step == 0:
            for path in self.folder.glob("step=*.safetensors"):
                path.unlink()
        elif self.last.exists():
            metadata = read_metadata(self.last)
            if "val_loss" in metadata:
                self._retain(metadata["step"], metadata["val_loss"])

    def _list_retained(self) -> list[tuple[float, Path]]:
        return [(read_metadata(path)["val_loss"], path) for path in self.folder.glob("step=*.safetensors")]


def _link(source: Path, target: Path) -> None:
    """Link a file under a second name, or copy it if the file system has no hard links; atomic in both cases."""
    with atomic_path(target) as part:
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
