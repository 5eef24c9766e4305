"""Lightning's Trainer as every training stage has it: one layout, one precision, one validation rhythm, its loggers."""

import os
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from esm2kit.core.errors import InputError
from esm2kit.core.processes import TORCHRUN, destroy_group_at_exit, exit_with_parent, is_worker, world_size
from esm2kit.training.config import TrainingConfig
from esm2kit.training.parallel import make_strategy
from esm2kit.training.precision import lightning_precision


def make_trainer(config: TrainingConfig, callbacks: list[Callback]) -> Trainer:
    """The Trainer of a run: batches, order, checkpoints and progress are this library's own, so it does without its.

    Args:
        config: the run, with max_steps and val_check_interval decided.
        callbacks: the stage's.
    Raises: InputError if the logger asked for is not installed, or the devices are not there.
    """
    check_devices(config)
    accelerator = config.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if TORCHRUN in os.environ:
        exit_with_parent()  # the command line has called it already; a script's own worker has not
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
    )


def check_devices(config: TrainingConfig) -> None:
    """Raises: InputError for more GPUs than torch finds, or another number of workers than the configuration is for."""
    workers = config.devices * config.num_nodes
    if is_worker() and world_size() != workers:
        # Lightning would go on: each on its own into the same files, or with gradients scaled for another number
        raise InputError(
            f"{world_size()} workers were started, and devices {config.devices} x num_nodes {config.num_nodes} is "
            f"{workers}: give --devices the workers of a node and --num_nodes the nodes",
            code="devices.workers",
            found=world_size(),
            expected=workers,
        )
    found = torch.cuda.device_count()
    if config.accelerator == "cuda" and not found:
        raise InputError(
            "accelerator cuda was requested and torch finds no GPU: use --accelerator cpu or auto",
            code="devices.missing",
            found=0,
            requested=config.devices,
        )
    if config.accelerator != "cpu" and 0 < found < config.devices:
        raise InputError(
            f"{config.devices} devices were requested and torch finds {found}: lower --devices",
            code="devices.missing",
            found=found,
            requested=config.devices,
        )


def _logger(config: TrainingConfig, out_dir: Path) -> Logger | None:
    """What figures go to besides metrics.csv; imported only here, when it is asked for."""
    try:
        if config.logger == "tensorboard":
            from lightning.pytorch.loggers import TensorBoardLogger

            return TensorBoardLogger(out_dir, name="tensorboard", version="")
        if config.logger == "wandb":
            from lightning.pytorch.loggers import WandbLogger

            # a resumed run is another one of its group; online or offline is for WANDB_MODE to say
            return WandbLogger(project=config.wandb_project, name=out_dir.name, group=out_dir.name, save_dir=out_dir)
    except ModuleNotFoundError as error:
        package = config.logger
        raise InputError(
            f"logger {package!r} requires the {package} package: pip install {package}, or choose csv",
            code="logger.missing",
            name=package,
        ) from error
    return None


class _FinishRun(Callback):
    """Ends the Weights & Biases run with the training, so that the next seed's is another."""

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            import wandb

            wandb.finish()
