"""The Lightning Trainer of all training stages, and the check of the available devices."""

from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from esm2kit.core.errors import InputError
from esm2kit.core.hardware import resolve_device
from esm2kit.core.processes import (
    check_platform,
    destroy_group_at_exit,
    exit_with_parent,
    is_torchrun_worker,
    is_worker,
    world_size,
)
from esm2kit.training.config import TrainingConfig
from esm2kit.training.environment import make_environment
from esm2kit.training.parallel import make_strategy
from esm2kit.training.precision import lightning_precision


def make_trainer(config: TrainingConfig, callbacks: list[Callback]) -> Trainer:
    """Build the Trainer of a run, with esm2kit's samplers, checkpoints and progress lines instead of Lightning's.

    Args:
        config: The run, with max_steps and val_check_interval resolved.
        callbacks: Callbacks of the stage.

    Returns:
        A Trainer for `fit`.

    Raises:
        InputError: The logger's package is not installed, or the devices are not available.
    """
    check_devices(config)
    accelerator = resolve_accelerator(config)
    if is_torchrun_worker():
        exit_with_parent()  # the command line has called it already, but a script that runs under torchrun has not
    destroy_group_at_exit()
    out_dir = Path(config.out_dir)
    return Trainer(
        accelerator=accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=make_strategy(config.strategy, config.layout, accelerator),
        precision=lightning_precision(config.precision),
        max_epochs=1,
        val_check_interval=min(config.val_check_interval, config.max_steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=_logger(config, out_dir) or False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[*callbacks, *([_FinishRun()] if config.logger == "wandb" else [])],
        default_root_dir=out_dir,
        plugins=[make_environment()],
    )


def resolve_accelerator(config: TrainingConfig) -> str:
    """Resolve the type of device to train on.

    Args:
        config: The run.

    Returns:
        `cpu`, `cuda` or `mps`. An Apple GPU is one device, so `auto` is `cpu` for several devices.

    Raises:
        InputError: As `resolve_device`.
    """
    device = resolve_device(config.accelerator)
    return "cpu" if device == "mps" and config.accelerator == "auto" and config.devices > 1 else device


def check_devices(config: TrainingConfig) -> None:
    """Check that the configured devices exist and that the number of workers matches them.

    Args:
        config: The run.

    Raises:
        InputError: There are fewer GPUs than requested, the number of workers differs from devices x num_nodes, or
            several devices were requested on Windows.
    """
    check_platform(config.devices)
    workers = config.devices * config.num_nodes
    if is_worker() and world_size() != workers:
        # Lightning would continue, with workers that overwrite each other's files or with wrongly scaled gradients
        raise InputError(
            f"{world_size()} workers were started, but devices {config.devices} x num_nodes {config.num_nodes} is "
            f"{workers}. Set --devices to the number of workers per node and --num_nodes to the number of nodes.",
            code="devices.workers",
            found=world_size(),
            expected=workers,
        )
    if config.accelerator == "mps" and workers > 1:
        raise InputError(
            f"accelerator 'mps' is one device, but devices {config.devices} x num_nodes {config.num_nodes} is "
            f"{workers}. Use --devices 1, or --accelerator cpu.",
            code="devices.missing",
            found=1,
            requested=workers,
        )
    found = torch.cuda.device_count()
    if config.accelerator == "cuda" and not found:
        raise InputError(
            "accelerator 'cuda' was requested, but torch finds no GPU. Use --accelerator cpu or auto.",
            code="devices.missing",
            found=0,
            requested=config.devices,
        )
    if resolve_accelerator(config) == "cuda" and found < config.devices:
        raise InputError(
            f"{config.devices} devices were requested, but torch finds {found}. Lower --devices.",
            code="devices.missing",
            found=found,
            requested=config.devices,
        )


def _logger(config: TrainingConfig, out_dir: Path) -> Logger | None:
    """Build the logger in addition to metrics.csv; its package is imported only if it is requested."""
    try:
        if config.logger == "tensorboard":
            from lightning.pytorch.loggers import TensorBoardLogger

            return TensorBoardLogger(out_dir, name="tensorboard", version="")
        if config.logger == "wandb":
            from lightning.pytorch.loggers import WandbLogger

            # a resumed run is a new run of the same group; WANDB_MODE decides between online and offline
            return WandbLogger(project=config.wandb_project, name=out_dir.name, group=out_dir.name, save_dir=out_dir)
    except ModuleNotFoundError as error:
        package = config.logger
        raise InputError(
            f"logger {package!r} requires the {package} package. Run `pip install {package}`, or use --logger csv.",
            code="logger.missing",
            name=package,
        ) from error
    return None


class _FinishRun(Callback):
    """Ends the Weights & Biases run together with the training, so that each seed has its own run."""

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            import wandb

            wandb.finish()
