"""What training leaves on disk and goes on from: the model, the optimizer and one number, the updates made.

States are kept whole and by parameter name, so a run may go on under another layout. A signal to stop is answered after
the update in hand, with a checkpoint.
"""

import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
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
from esm2kit.core.files import atomic_path, hold_lock, to_json
from esm2kit.core.process_group import gather_strings
from esm2kit.core.processes import STOP_SIGNALS, rank
from esm2kit.models.checkpoint import gather, read_checkpoint, read_metadata, write_checkpoint
from esm2kit.training.config import TrainingConfig

logger = logging.getLogger(__name__)


class ResumePoint(NamedTuple):
    """A checkpoint to go on from: its metadata, and its tensors by the part before the first dot."""

    path: Path
    metadata: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]

    @property
    def step(self) -> int:
        return self.metadata["step"]

    @property
    def model(self) -> dict[str, Tensor]:
        return self.parts["model"]

    @property
    def optimizer(self) -> dict[str, Tensor]:
        return self.parts["optimizer"]


def find_resume_point(out_dir: Path, config: TrainingConfig, manifest: dict[str, Any]) -> ResumePoint | None:
    """The last checkpoint in out_dir, or None where there is none or the run does not resume.

    Args:
        out_dir: the run's folder.
        config: the run to continue.
        manifest: its provenance; `inputs.data.sha256` must be the checkpoint's.
    Raises: InputError if the checkpoint belongs to another run, naming what differs.
    """
    path = out_dir / "checkpoints" / "last.safetensors"
    if not (config.resume_if_exists and path.exists()):
        return None
    tensors, metadata = read_checkpoint(path)
    # a parameter that this esm2kit has and the one that wrote the checkpoint had not: as it was without it
    before, now = _defaults(config) | metadata["provenance"]["config"], to_json(config)
    free = {each.name for each in fields(config) if each.metadata.get("resume") == "free"}
    differing = {name: (before.get(name), now[name]) for name in now.keys() - free}
    differing["global_batch_size"] = metadata["global_batch_size"], config.layout.global_batch_size
    # the same path may hold another dataset by now, or the weights of another training
    for name in ("data", "model"):
        inputs = [each["inputs"].get(name, {}).get("sha256") for each in (metadata["provenance"], manifest)]
        differing[f"the {name}'s sha256"] = tuple(digest and digest[:12] for digest in inputs)
    differing = {name: values for name, values in sorted(differing.items()) if values[0] != values[1]}
    if differing:
        listed = ", ".join(f"{name} was {before} and is now {now}" for name, (before, now) in differing.items())
        raise InputError(
            f"{path} is of another run: {listed}; give another --out_dir, or --resume_if_exists false to overwrite",
            code="resume.another-run",
            path=str(path),
            changed=listed,
        )
    return ResumePoint(path, metadata, group_by_prefix(tensors))


def _defaults(config: TrainingConfig) -> dict[str, Any]:
    """A dataclass's fields as they are where nobody says otherwise; those that must be given left out."""
    given = {field.name: field.default for field in fields(config) if field.default is not MISSING}
    made = {field.name: field.default_factory() for field in fields(config) if field.default_factory is not MISSING}
    return to_json(given | made)


def group_by_prefix(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's tensors by the part before the first dot (model, optimizer, head ...), and then by the rest."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Give an optimizer back what it held, cut to the shards its parameters have now.

    Args:
        model: whose parameters the optimizer steps.
        state: `<parameter name>.<exp_avg | exp_avg_sq | step>` -> whole tensor.
    """
    for name, parameter in _trained_parameters(model, optimizer):
        held = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.rpartition(".")[0] == name}
        for key, value in held.items():
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                value = value.to(parameter.device)
                shards = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
                optimizer.state[parameter][key] = shards
            else:  # the step too: a GPU's fused kernel counts there, and Lightning leaves it where it is
                optimizer.state[parameter][key] = value.to(parameter.device, copy=True)


def collect_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Model and optimizer tensors by name, as and where they lie.

    Args:
        model: whose parameters the optimizer steps.
        optimizer: of these parameters.
        keep: which of the model's tensors, by name.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if keep(name)}
    for name, parameter in _trained_parameters(model, optimizer):
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def _trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter in stepped)


def set_start_step(trainer: Trainer, step: int) -> None:
    """Have Lightning count from `step`, so that validations and logged steps fall where they would have fallen."""
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = step
    for progress in (loop.batch_progress.total, loop.manual_optimization.optim_step_progress.total):
        progress.ready = progress.completed = step


@contextmanager
def lock_run_folder(out_dir: Path) -> Iterator[None]:
    """Hold a run's folder while training: two runs that write the same checkpoints would end as neither.

    Only the first rank holds it. Raises: InputError if another run does.
    """
    if rank():
        yield
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    refusal = f"{out_dir}: another run is training there; stop it, or give another --out_dir"
    with hold_lock(out_dir / ".lock", refusal):
        yield


def stop_after_update(trainer: Trainer, step: int) -> None:
    """End the run once update `step` is made. Lightning would validate first: only where a validation is due anyway."""
    trainer.should_stop = True
    if step % int(trainer.val_check_interval):
        trainer.limit_val_batches = 0


class CheckpointWriter(Callback):
    """Writes `checkpoints/last.safetensors` at every validation, at the end, when told to stop; keeps the best by name.

    Args:
        out_dir: the run's folder.
        save_top_k: how many of the best by val_loss to keep.
        manifest: the run's provenance.
        global_batch_size: sequences of an update, to turn updates into consumed samples.
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
        self.handlers: dict[int, Any] = {}

    def best(self) -> Path:
        """The kept checkpoint of lowest val_loss; the last one where none was validated."""
        return min(self._list_retained(), default=(0.0, self.last))[1]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        begun = gather_strings([str(module.step)])
        if len(set(begun)) > 1:
            raise InputError(
                f"{self.folder}: ranks disagree on the checkpoint's update ({', '.join(begun)}); give an out_dir that "
                "every node sees",
                code="resume.ranks-differ",
                path=self.folder,
                updates=begun,
            )
        if trainer.is_global_zero:
            self._clean_up(module.step)

        def stop(number: int, frame: FrameType | None) -> None:
            logger.info(
                "%s: finishing this update, then saving; once more to stop at once", signal.Signals(number).name
            )
            module.stop_requested = True
            signal.signal(number, self.handlers[number])

        for number in STOP_SIGNALS:  # which Lightning gives back their meaning however the run ends
            self.handlers[number] = signal.signal(number, stop)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer, module, module.last_validation)
        if trainer.is_global_zero:
            self._retain(module.step, module.last_validation["val_loss"])

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.saved_step != module.step:
            self._save(trainer, module, {})

    def _save(self, trainer: Trainer, module: LightningModule, figures: dict[str, float]) -> None:
        tensors = module.checkpoint_tensors()
        if trainer.is_global_zero:
            metadata = {
                "model": module.esm2.config,
                "step": module.step,
                "consumed_samples": module.step * self.global_batch_size,
                "global_batch_size": self.global_batch_size,
                **figures,
                **module.checkpoint_details(),
                "provenance": self.manifest,
            }
            try:
                write_checkpoint(self.last, tensors, metadata)
            except OSError as error:
                kept = (
                    f"{self.last} still holds an earlier update" if self.last.exists() else "there is no checkpoint yet"
                )
                raise InputError(
                    f"cannot write {self.last} at update {module.step}: {error}; {kept}",
                    code="checkpoint.write",
                    path=self.last,
                    update=module.step,
                ) from error
        else:
            gather(tensors)
        self.saved_step = module.step
        trainer.strategy.barrier()

    def _retain(self, step: int, val_loss: float) -> None:
        if self.save_top_k:
            _link(self.last, self.folder / f"step={step:07d}-val_loss={val_loss:.4f}.safetensors")
            for _, path in sorted(self._list_retained())[self.save_top_k :]:
                path.unlink()

    def _clean_up(self, step: int) -> None:
        """A fresh run drops what an earlier one kept; a resumed one keeps what a kill came in the way of."""
        for half in self.folder.glob("*.part"):
            half.unlink()
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
    """A second name for a file, or a copy where the file system has no links; whole or not at all."""
    with atomic_path(target) as part:
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
