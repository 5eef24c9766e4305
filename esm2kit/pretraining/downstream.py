"""A linear probe on a labelled task, fitted at validations to follow a model in training.

The model embeds the proteins batch by batch on its own devices, sharded or not. Only the rows that the probe reads are
kept, at most MAX_FEATURE_BYTES per set, and they are deleted after each evaluation. The probe uses no random generator
and computes no gradients, so it does not change the training.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from esm2kit.benchmarking.probes.features import Features, ProbeTargets
from esm2kit.benchmarking.probes.linear import fit_logistic, fit_ridge
from esm2kit.benchmarking.scores import compute_headline
from esm2kit.core.hardware import read_memory_use
from esm2kit.core.process_group import sum_over_group
from esm2kit.models.pooling import pool_rows
from esm2kit.tasks.packing import EvaluationBatches, LabelledProteins, build_labels
from esm2kit.tasks.task_data import TaskData

logger = logging.getLogger(__name__)

MAX_FEATURE_BYTES = 1 << 26
SETS = ("train", "validation")


class DownstreamProbe:
    """Evaluates embeddings of a task's train and validation proteins; the test set is not used.

    The probe is ridge regression for values or logistic regression for classes. It reads the mean over a protein's
    residues or each residue. Its penalty is selected on the validation set, which also gives the score: use the score
    to follow a training, not as a result.

    Args:
        data: The task.
        cache: Folder for the tokenised proteins.
        width: Dimension of the model's embeddings.
        max_residues: Longest window in residues.
        tokens_per_batch: Token budget per forward pass.
    """

    def __init__(self, data: TaskData, cache: Path, width: int, max_residues: int, tokens_per_batch: int) -> None:
        data = data.subset(np.flatnonzero(data.sets != "test"))
        self.proteins = LabelledProteins(data, build_labels(data, False, False), cache, max_residues)
        self.width, self.tokens_per_batch, self.metric = width, tokens_per_batch, data.task.metric
        self.fit = fit_ridge if data.task.target == "value" else fit_logistic
        max_rows = MAX_FEATURE_BYTES // (4 * width)
        # per target of a set, in the order of its proteins: its row in the features, or -1 if it is not used
        self.row_of_slot: dict[str, Tensor] = {}
        used = {}
        for name in SETS:
            targets = np.flatnonzero((data.sets == name)[data.protein_of_target])
            kept = np.flatnonzero(data.scored[targets])
            kept = kept[:: -(-len(kept) // max_rows)]
            rows = np.full(len(targets), -1)
            rows[kept] = np.arange(len(kept))
            self.row_of_slot[name], used[name] = torch.from_numpy(rows), targets[kept]
        packed = data.targets[np.concatenate(list(used.values()))]
        # a linear probe reads each target separately, so each is passed as a protein with one target
        places = np.split(np.arange(len(packed)), [len(used["train"])])
        self.targets = ProbeTargets(
            packed,
            scored=np.ones(len(packed), dtype=bool),
            offsets=np.arange(len(packed) + 1),
            proteins=dict(zip(SETS, places, strict=True)),
            task=data.task,
        )
        logger.info(
            "downstream probe: task %s, split %s, %s on %s; %s in train, %s in validation",
            *(data.task.name, data.split, "ridge" if self.fit is fit_ridge else "logistic regression"),
            *("residues" if self.proteins.per_residue else "proteins", *(f"{len(rows):,}" for rows in used.values())),
        )

    def evaluate(
        self,
        encode: Callable[[Tensor, list[int]], Tensor],
        device: torch.device,
        group: dist.ProcessGroup | None,
        rank: int,
        ranks: int,
        is_first: bool,
    ) -> dict[str, float]:
        """Embed the proteins, fit the probe and score it; all ranks must call this method.

        Args:
            encode: Function of the tokens (N,) and the number of tokens per sequence; returns the model's final
                representations (N, D).
            device: Device of the model.
            group: Process group of the data-parallel ranks, which share the proteins.
            rank: Rank of this process in the group.
            ranks: Size of the group.
            is_first: Whether this process fits the probe and returns the metrics.

        Returns:
            `downstream_<metric>`, the score on the validation set (0 if it is undefined), and `downstream_peak_gib`,
            the peak memory of the GPU or of this process in GiB. Empty on the other ranks.
        """
        peak = _MemoryPeak(device)
        values = [self._embed_set(name, encode, device, group, rank, ranks, peak) for name in SETS]
        if not is_first:
            return {}
        features = Features(torch.cat(values).numpy(), self.targets.offsets)
        with _quiet_logger("esm2kit.benchmarking.probes.linear"):
            fitted = self.fit(features, self.targets)
        peak.update()
        truth = self.targets.packed[self.targets.rows("validation")]
        value = compute_headline(self.targets.task, truth, fitted.validation_SM[0])
        return {
            f"downstream_{self.metric}": value if np.isfinite(value) else 0.0,
            "downstream_peak_gib": round(peak.bytes / 2**30, 3),
        }

    def _embed_set(
        self,
        set_name: str,
        encode: Callable[[Tensor, list[int]], Tensor],
        device: torch.device,
        group: dist.ProcessGroup | None,
        rank: int,
        ranks: int,
        peak: "_MemoryPeak",
    ) -> Tensor:
        """Embed a set: (K, D) float32 on the CPU, averaged where windows overlap."""
        row_of_slot = self.row_of_slot[set_name]
        sums_KX = torch.zeros(int(row_of_slot.max()) + 1, self.width + 1, device=device)
        reads = "residues" if self.proteins.per_residue else "mean"
        for batch in EvaluationBatches(self.proteins, set_name, self.tokens_per_batch, rank, ranks):
            hidden_ND = encode(batch.tokens_N.to(device), batch.num_tokens).float()
            if len(batch.slots_M):  # empty if this rank only runs the forward passes that the others need
                rows_M = row_of_slot[batch.slots_M]
                is_used = rows_M >= 0
                read_MD = pool_rows(hidden_ND, batch.num_tokens, reads)[0][is_used.to(device)]
                counted = torch.cat([read_MD, read_MD.new_ones(len(read_MD), 1)], dim=1)
                sums_KX.index_add_(0, rows_M[is_used].to(device), counted)
            peak.update()
        sums_KX = sum_over_group(group, sums_KX).cpu()
        return sums_KX[:, :-1] / sums_KX[:, -1:]


class _MemoryPeak:
    """Peak memory in bytes, of the GPU or of this process, over the calls of `update`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        if device.type == "cuda":
            # training reaches its own peak again in the next update
            torch.cuda.reset_peak_memory_stats(device)

    def update(self) -> None:
        """Measure the memory now."""
        self.bytes = max(self.bytes, read_memory_use(self.device))


@contextmanager
def _quiet_logger(name: str) -> Iterator[None]:
    """Suppress the probe's progress lines, which would interrupt the log of a training."""
    quiet = logging.getLogger(name)
    level = quiet.level
    quiet.setLevel(logging.WARNING)
    try:
        yield
    finally:
        quiet.setLevel(level)
