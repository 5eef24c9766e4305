"""Early stopping of heads that are trained together: each keeps its best weights on validation, and stops alone."""

import math

import torch
from torch import Tensor

from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.heads import SeededHead
from esm2kit.core.errors import InputError


class BestWeights:
    """The weights that each slice of a model keeps, and the slices that are still trained.

    Args:
        model: The heads, one slice of each parameter per seed.
        config: keep, patience, and the names for messages.

    Attributes:
        running_S: (S,) whether the training of each slice continues.
        kept_epoch_S: (S,) epoch of the weights that each slice keeps, from 1.
    """

    def __init__(self, model: SeededHead, config: ProbeConfig) -> None:
        self.parameters, self.seeds, self.config = list(model.parameters()), model.seeds, config
        device, count = self.parameters[0].device, len(model.seeds)
        self.best_loss_S = torch.full((count,), torch.inf, device=device)
        self.best_epoch_S, self.kept_epoch_S = torch.zeros(2, count, dtype=torch.long, device=device)
        self.kept = [parameter.detach().clone() for parameter in self.parameters]
        self.running_S = torch.ones(count, dtype=torch.bool, device=device)

    def update(self, loss_S: Tensor, epoch: int) -> bool:
        """Keep the weights of slices that have improved, and stop those that have not for too long.

        Args:
            loss_S: (S,) validation loss of each slice.
            epoch: Epochs that are finished.

        Returns:
            Whether the training of a slice continues.

        Raises:
            InputError: A slice never had a finite loss.
        """
        improved_S = self.running_S & (loss_S < self.best_loss_S)
        self.best_loss_S, self.best_epoch_S[improved_S] = torch.where(improved_S, loss_S, self.best_loss_S), epoch
        check_finite_loss(self.best_loss_S, self.config, self.seeds)
        saved_S = improved_S if self.config.keep == "best" else self.running_S
        self.kept_epoch_S[saved_S] = epoch
        for kept, parameter in zip(self.kept, self.parameters, strict=True):
            kept[saved_S] = parameter.detach()[saved_S]
        if self.config.patience is not None:
            self.running_S = self.running_S & (epoch - self.best_epoch_S < self.config.patience)
        return bool(self.running_S.any())

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model the weights that were kept."""
        for kept, parameter in zip(self.kept, self.parameters, strict=True):
            parameter.copy_(kept)


def check_finite_loss(
    loss_S: Tensor, config: ProbeConfig, seeds: tuple[int, ...], set_name: str = "validation"
) -> None:
    """Check the loss of each seed.

    Args:
        loss_S: (S,) losses.
        config: The probe, for the message.
        seeds: Seed of each loss.
        set_name: Set of the losses.

    Raises:
        InputError: A loss is not finite.
    """
    wrong = [seed for seed, loss in zip(seeds, loss_S.tolist(), strict=True) if not math.isfinite(loss)]
    if wrong:
        raise InputError(
            f"probe {config.probe}, seed {', '.join(map(str, wrong))}: the {set_name} loss is not finite. Choose a "
            f"learning_rate below {config.learning_rate}, or another preset.",
            code="probe.diverged",
            probe=config.probe,
            seeds=wrong,
            set=set_name,
        )
