"""The labelled proteins of one split of a task, and samples of them."""

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from esm2kit.tasks.label_sets import stratify_columns
from esm2kit.tasks.pairs import Pairs, build_keys
from esm2kit.tasks.split import build_strata
from esm2kit.tasks.task import Task

SET_NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class TaskData:
    """One split of one task.

    Args:
        task: what is predicted and how it is scored.
        split: name of the split.
        ids: (P) protein ids; FLIP repeats a few.
        sequences: (P) amino-acid sequences.
        sets: (P,) "train", "validation" or "test".
        targets: (P,) one target per protein, or (N,) one per residue, concatenated over proteins. Classes are int64,
            values are float64. A task with several targets per protein has (P, C): labels that are 0 or 1 (int64), or
            values with nan where one is missing.
        scored: (P,) or (N,), False for targets that are ignored, such as unresolved residues.
        files: files that the task was read from.
        notes: what a reader needs to know to interpret a score.
        official: True if the set sizes are FLIP's, so that scores can be compared with published ones.
        split_method: how the sets were chosen; empty if they are those of the files.
        pairs: the second proteins of a task of pairs, whose records are pairs; None for single proteins.
    """

    task: Task
    split: str
    ids: list[str]
    sequences: list[str]
    sets: np.ndarray
    targets: np.ndarray
    scored: np.ndarray
    files: dict[str, Path]
    notes: tuple[str, ...] = ()
    official: bool = False
    split_method: str = ""
    pairs: Pairs | None = None

    @cached_property
    def num_residues(self) -> np.ndarray:
        """(P,) number of residues per protein."""
        return np.array([len(sequence) for sequence in self.sequences], dtype=np.int64)

    @cached_property
    def offsets(self) -> np.ndarray:
        """(P + 1,) the targets of protein i are targets[offsets[i]:offsets[i + 1]]."""
        counts = np.ones(len(self.ids), np.int64) if self.task.level == "protein" else self.num_residues
        return np.concatenate([[0], np.cumsum(counts)])

    @cached_property
    def protein_of_target(self) -> np.ndarray:
        """Index into `ids` of the protein that each target belongs to."""
        return np.repeat(np.arange(len(self.ids)), np.diff(self.offsets))

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of the task: ids, sequences, sets, targets and the mask of scored targets."""
        names = self.task.labels or self.task.columns or (self.task.is_multilabel and self.task.binary_labels) or ()
        digest = hashlib.sha256(f"{self.task.name} {self.split} {names}".encode())
        for lines in (self.ids, self.sequences, self.sets):
            digest.update("\n".join(lines).encode())
        digest.update(self.targets.tobytes() + self.scored.tobytes())
        if self.pairs is not None:
            digest.update("\n".join([self.pairs.features, *self.pairs.second]).encode())
        return digest.hexdigest()

    @property
    def keys(self) -> list[str]:
        """One text per record, equal for equal proteins, or for equal pairs of proteins in either order."""
        if self.pairs is None:
            return self.sequences
        return build_keys(self.sequences, self.pairs.second, ordered=self.pairs.features == "concat")

    def rows(self, set_name: str) -> np.ndarray:
        """Indices of the proteins of a set."""
        return np.flatnonzero(self.sets == set_name)

    def target_rows(self, set_name: str) -> np.ndarray:
        """Indices of the scored targets of a set."""
        return np.flatnonzero((self.sets == set_name)[self.protein_of_target] & self.scored)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of proteins per set."""
        return {name: int((self.sets == name).sum()) for name in SET_NAMES}

    def subset(self, rows: np.ndarray) -> "TaskData":
        """Return the task restricted to the proteins with these indices."""
        indices = np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows])
        return dataclasses.replace(
            self,
            ids=[self.ids[row] for row in rows],
            sequences=[self.sequences[row] for row in rows],
            sets=self.sets[rows],
            targets=self.targets[indices],
            scored=self.scored[indices],
            pairs=self.pairs and self.pairs.subset(rows),
        )

    def limit_proteins(self, limit: int, seed: int = 0) -> "TaskData":
        """Return at most `limit` proteins per set, by a stratified sample.

        The strata are the classes, ten quantiles of the values, or, for residue tasks, ten quantiles of the sequence
        length. Each class keeps at least one protein, even if that exceeds the limit.

        Args:
            limit: proteins per set.
            seed: of the sample.

        Returns:
            The smaller task, with a note that its scores are not comparable with published ones.
        """
        generator = np.random.default_rng(seed)
        strata = self._assign_strata(limit)
        sampled = []
        for name in SET_NAMES:
            rows = self.rows(name)
            sampled.append(rows if len(rows) <= limit else _sample_strata(rows, strata[rows], limit, generator))
        chosen = self.subset(np.sort(np.concatenate(sampled)))
        more = ", at least one per class" if max(chosen.sizes.values()) > limit else ""
        note = f"subset of at most {limit} proteins per set{more} (seed {seed}): not comparable with published scores"
        return dataclasses.replace(chosen, official=False, notes=(*self.notes, note))

    def _assign_strata(self, limit: int) -> np.ndarray:
        if self.task.is_multilabel:
            return stratify_columns(self.targets, multilabel=True)
        if self.task.level == "protein" and self.task.target == "class":
            return self.targets
        values = _sort_key(self)
        edges = np.quantile(values, np.linspace(0.1, 0.9, 9))
        return np.searchsorted(edges, values) * min(limit, 10) // 10  # at most one stratum per sampled protein


def _sort_key(data: TaskData) -> np.ndarray:
    """Return a number per protein by which proteins are similar: the value, or the number of residues."""
    if data.task.columns:
        return stratify_columns(data.targets, multilabel=False)
    return (data.targets if data.task.level == "protein" else data.num_residues).astype(np.float64)


def _sample_strata(rows: np.ndarray, strata: np.ndarray, limit: int, generator: np.random.Generator) -> np.ndarray:
    """Sample `limit` rows in proportion to the strata, by largest remainder, at least one per stratum if possible."""
    names, counts = np.unique(strata, return_counts=True)
    share = counts * limit / counts.sum()
    quota = np.minimum(np.maximum(np.floor(share).astype(int), 1), counts)
    while quota.sum() > limit and quota.max() > 1:
        quota[quota.argmax()] -= 1
    for place in np.argsort(quota - share, kind="stable"):
        if quota.sum() >= limit:
            break
        quota[place] += quota[place] < counts[place]
    return np.concatenate(
        [generator.choice(rows[strata == name], size, replace=False) for name, size in zip(names, quota, strict=True)]
    )


def stratify(data: TaskData) -> np.ndarray:
    """Return (P,) integers of similar proteins: by class, or by quantiles of the value or of the number of residues."""
    if data.task.is_multilabel:
        return stratify_columns(data.targets, multilabel=True)
    if data.task.level == "protein" and data.task.target == "class":
        return data.targets
    return build_strata(_sort_key(data))
