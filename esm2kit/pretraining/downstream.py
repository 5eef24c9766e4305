"""How a model in training does on a labelled task: a linear probe on its vectors, at validations, in bounded memory.

The proteins go through the model where and as it is laid out, one batch at a time; of a batch only the rows that the
probe reads are kept, and of these at most MAX_FEATURE_BYTES a set. After the figure nothing stays. Nothing is drawn
from a random generator and no gradient is made, so training goes on as if nobody had looked.
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
from esm2kit.tasks.data import TaskData
from esm2kit.tasks.packing import EvaluationBatches, LabelledProteins, build_labels

logger = logging.getLogger(__name__)

MAX_FEATURE_BYTES = 1 << 26
SETS = ("train", "validation")


class DownstreamProbe:
    """A task's train and validation proteins, ready to be embedded again and again; its test set is left out.

    Ridge for values, logistic regression for classes, on the mean over a protein's residues or on each residue. The
    penalty is the best of a grid on validation, where the figure is read too: good for a curve, not for a result.

    Args:
        data: the task.
        cache: folder for its tokens.
        width: of the model's vectors.
        max_residues: longest window the model is given.
        tokens_per_batch: token budget of a forward pass.
    """

    def __init__(self, data: TaskData, cache: Path, width: int, max_residues: int, tokens_per_batch: int) -> None:
        data = data.subset(np.flatnonzero(data.sets != "test"))
        self.proteins = LabelledProteins(data, build_labels(data, False, False), cache, max_residues)
        self.width, self.tokens_per_batch, self.metric = width, tokens_per_batch, data.task.metric
        self.fit = fit_ridge if data.task.target == "value" else fit_logistic
        max_rows = MAX_FEATURE_BYTES // (4 * width)
        # of every target of a set, in the order of its proteins: its row in the features, or -1
        self.row_of_slot: dict[str, Tensor] = {}
        chosen = {}
        for name in SETS:
            targets = np.flatnonzero((data.sets == name)[data.protein_of_target])
            kept = np.flatnonzero(data.scored[targets])
            kept = kept[:: -(-len(kept) // max_rows)]
            rows = np.full(len(targets), -1)
            rows[kept] = np.arange(len(kept))
            self.row_of_slot[name], chosen[name] = torch.from_numpy(rows), targets[kept]
        packed = data.targets[np.concatenate(list(chosen.values()))]
        # a linear probe reads every target by itself: each is a protein of one
        places = np.split(np.arange(len(packed)), [len(chosen["train"])])
        self.targets = ProbeTargets(
            packed,
            scored=np.ones(len(packed), dtype=bool),
            offsets=np.arange(len(packed) + 1),
            proteins=dict(zip(SETS, places, strict=True)),
            task=data.task,
        )
        logger.info(
            "downstream: %s, split %s, %s on %s; %s of train, read on %s of validation",
            *(data.task.name, data.split, "ridge" if self.fit is fit_ridge else "logistic regression"),
            *("residues" if self.proteins.per_residue else "proteins", *(f"{len(rows):,}" for rows in chosen.values())),
        )

    def evaluate(
        self,
        encode: Callable[[Tensor, list[int]], Tensor],
        device: torch.device,
        group: dist.ProcessGroup | None,
        rank: int,
        ranks: int,
        first: bool,
    ) -> dict[str, float]:
        """Embed, fit, score; every rank must call.

        Args:
            encode: (tokens_N, tokens of each sequence) -> (N, D), the model's final rows.
            device: where the model is.
            group: the data-parallel ranks; they share the proteins.
            rank: of this process among them.
            ranks: how many they are.
            first: whether this process is the one that fits and tells.
        Returns: {"downstream_<metric>", "downstream_peak_gib"}: the score on validation, 0 where it is undefined, and
            the most memory held meanwhile (of the GPU, or resident in this process); {} on the other ranks.
        """
        peak = _MemoryPeak(device)
        values = [self._embed_set(name, encode, device, group, rank, ranks, peak) for name in SETS]
        if not first:
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
        """(K, D) float32 on the CPU: the rows that the probe reads, where windows overlap their mean."""
        row_of_slot = self.row_of_slot[set_name]
        sums_KX = torch.zeros(int(row_of_slot.max()) + 1, self.width + 1, device=device)
        reads = "residues" if self.proteins.per_residue else "mean"
        for batch in EvaluationBatches(self.proteins, set_name, self.tokens_per_batch, rank, ranks):
            hidden_ND = encode(batch.tokens_N.to(device), batch.num_tokens).float()
            if len(batch.slots_M):  # none: this rank only keeps the others company
                rows_M = row_of_slot[batch.slots_M]
                wanted = rows_M >= 0
                read_MD = pool_rows(hidden_ND, batch.num_tokens, reads)[0][wanted.to(device)]
                counted = torch.cat([read_MD, read_MD.new_ones(len(read_MD), 1)], dim=1)
                sums_KX.index_add_(0, rows_M[wanted].to(device), counted)
            peak.update()
        sums_KX = sum_over_group(group, sums_KX).cpu()
        return sums_KX[:, :-1] / sums_KX[:, -1:]


class _MemoryPeak:
    """The most memory held since this began: bytes of the GPU, or resident in this process, looked at now and then."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        if device.type == "cuda":
            # what training held at most is held again by its next update
            torch.cuda.reset_peak_memory_stats(device)

    def update(self) -> None:
        self.bytes = max(self.bytes, read_memory_use(self.device))


@contextmanager
def _quiet_logger(name: str) -> Iterator[None]:
    """The probe's own progress belongs to a benchmark, not between the lines of a training."""
    of_module = logging.getLogger(name)
    level = of_module.level
    of_module.setLevel(logging.WARNING)
    try:
        yield
    finally:
        of_module.setLevel(level)
