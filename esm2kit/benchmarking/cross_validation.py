"""Cross-validation of a task: fit a model once per fold, and collect the out-of-fold predictions.

In each fold everything that is chosen (penalties, epochs, layers) is chosen on validation proteins from the other
folds. The predictions of all folds together are scored like those of a test set.
"""

import csv
import hashlib
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit.benchmarking.baselines.fit import Baseline, describe_baseline_probe, fit_baseline, repeat_constant
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.benchmarking.fold_scores import FoldArrays, score_folds, spread_thresholds
from esm2kit.benchmarking.fold_summary import Fold, FoldSummary
from esm2kit.benchmarking.fold_uncertainty import describe_fold_uncertainty
from esm2kit.benchmarking.layer_sweep import Candidate
from esm2kit.benchmarking.output import load_or_fit, read_file_key
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features, Fitted, ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_probe, fit_probe_folds
from esm2kit.benchmarking.probes.parameters import ProbeParameters
from esm2kit.benchmarking.scores import SeveralTargets, build_task_scorers, compute_headline, score_validation
from esm2kit.benchmarking.sweep_summary import describe_place
from esm2kit.benchmarking.verdict import choose_constant
from esm2kit.core.errors import InputError
from esm2kit.core.hardware import explain_out_of_memory
from esm2kit.core.numbers import format_count
from esm2kit.tasks.grouping import FoldPlan, hold_out, plan_folds
from esm2kit.tasks.label_metrics import build_binary_scorer
from esm2kit.tasks.metrics import LOWER_IS_BETTER, Score, nan_to_none, sample_counts
from esm2kit.tasks.task_data import TaskData

logger = logging.getLogger(__name__)

TABLE_FILE = "predictions.csv"


@dataclass(frozen=True)
class CrossValidation:
    """The folds of a task, and what is computed with them.

    Args:
        data: The task with all proteins in test, because each is predicted by a model that was trained without it.
        plan: The folds.
        tasks: The task of each fold, repeat by repeat, with the sets of the fold.
        swept: Predictions of the probes of the chosen layers and poolings, if there is a choice.
        candidates: Descriptions of the layers and poolings that can be chosen.
        candidate_keys: Everything that determines the predictions of each of them, as JSON-compatible data.
    """

    data: TaskData
    plan: FoldPlan
    tasks: tuple[TaskData, ...]
    swept: Fitted | None = None
    candidates: tuple[str, ...] = ()
    candidate_keys: tuple[Any, ...] = ()

    @classmethod
    def from_plan(cls, data: TaskData, plan: FoldPlan, seed: int = 0) -> "CrossValidation":
        """Build the tasks of all folds.

        Args:
            data: The task; its sets do not matter.
            plan: The folds.
            seed: Of the validation sets.

        Returns:
            The cross-validation.

        Raises:
            InputError: The other folds of a fold leave no proteins for validation.
        """
        repeats = len(plan.fold_RP)
        # folds of different columns are different splits, also if there are as many
        split = plan.column or f"{plan.num_folds}_folds{f'_{repeats}_repeats' if repeats > 1 else ''}"
        notes = (*data.notes, *plan.notes)
        pooled = replace(data, sets=np.full(len(data.ids), "test"), split=split, notes=notes, official=False)
        tasks = [hold_out(pooled, plan, r, fold, seed) for r in range(repeats) for fold in range(plan.num_folds)]
        return cls(pooled, plan, tuple(tasks))

    @classmethod
    def from_config(cls, config: BenchmarkConfig, data: TaskData) -> "CrossValidation":
        """Choose the folds that a configuration requests.

        Args:
            config: folds, repeats, group_by, split_by, identity, split_seed and the file of the columns.
            data: The task.

        Returns:
            The cross-validation.

        Raises:
            InputError: The proteins cannot be divided as requested.
        """
        options = (config.labels, config.id, config.split_by, config.identity, config.split_seed)
        plan = plan_folds(data, config.folds, config.repeats, config.group_by, *options)
        found = cls.from_plan(data, plan, config.split_seed)
        repeats = f", {format_count(config.repeats, 'repeat')}" if config.repeats > 1 else ""
        logger.info("%s: %s%s", data.task.name, plan.method, repeats)
        for note in plan.notes:
            logger.warning("%s", note)
        return found

    @property
    def repeats(self) -> int:
        """Number of repeats."""
        return len(self.plan.fold_RP)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the sets of all folds."""
        digest = hashlib.sha256()
        for task in self.tasks:
            digest.update("\n".join(task.sets).encode())
        return digest.hexdigest()

    @cached_property
    def arrays(self) -> FoldArrays:
        """Groups and folds of the targets."""
        protein_M = self.data.protein_of_target[self.data.target_rows("test")]
        # groups are numbered again, because one without a scored target is not resampled
        group_M = np.unique(self.plan.group_P[protein_M], return_inverse=True)[1]
        return FoldArrays(group_M, self.plan.fold_RP[:, protein_M])

    def sample_counts(self, resamples: int) -> np.ndarray:
        """Sample bootstrap replicates of the groups: (resamples, G) counts."""
        return sample_counts(self.arrays.num_groups, resamples)

    def merge(self, fitted_F: Sequence[Fitted]) -> Fitted:
        """Merge the fits of all folds.

        Args:
            fitted_F: One per fold and repeat.

        Returns:
            Out-of-fold predictions (R x S, M): the seeds of the first repeat, then those of the second one. Validation
            predictions follow each other fold by fold; `selected` has one entry per fold, or per fold and seed.
        """
        rows_M = self.data.target_rows("test")
        num_seeds, num_folds = len(fitted_F[0].test_SM), self.plan.num_folds
        shape = (self.repeats * num_seeds, len(rows_M), *fitted_F[0].test_SM.shape[2:])
        merged_SM = np.zeros(shape, dtype=fitted_F[0].test_SM.dtype)
        logits_MC = None
        if fitted_F[0].test_logits_MC is not None:  # of the first repeat
            logits_MC = np.zeros((len(rows_M), fitted_F[0].test_logits_MC.shape[1]), dtype=np.float32)
        for number, (task, fitted) in enumerate(zip(self.tasks, fitted_F, strict=True)):
            first = number // num_folds * num_seeds
            places = np.searchsorted(rows_M, task.target_rows("test"))
            merged_SM[first : first + num_seeds, places] = fitted.test_SM
            if logits_MC is not None and number < num_folds:
                logits_MC[places] = fitted.test_logits_MC
        names = fitted_F[0].selected
        selected = {name: _flatten([fitted.selected[name] for fitted in fitted_F]) for name in names}
        validation_SM = np.concatenate([fitted.validation_SM for fitted in fitted_F], axis=1)
        seconds = sum(fitted.seconds for fitted in fitted_F)
        return self.complete(Fitted(merged_SM, validation_SM, {}, selected, seconds, test_logits_MC=logits_MC))

    def complete(self, fitted: Fitted) -> Fitted:
        """Add the threshold of each prediction of a multi-label task, those that the folds selected."""
        thresholds = fitted.selected.get("threshold")
        if thresholds is None:
            return fitted
        threshold_SM = spread_thresholds(thresholds, len(fitted.test_SM), self.arrays.fold_RM)
        return fitted._replace(fold_thresholds_SM=threshold_SM)

    def get_held_out(self, fitted: Fitted) -> tuple[Fitted, TaskData, bool]:
        """Return the out-of-fold predictions of the first repeat as those of validation, their task, and True."""
        num_seeds = len(fitted.test_SM) // self.repeats
        held = fitted._replace(validation_SM=fitted.test_SM[:num_seeds], validation_logits_MC=fitted.test_logits_MC)
        return held, replace(self.data, sets=np.full(len(self.data.ids), "validation")), True

    def describe_uncertainty(self, fitted: Fitted, counts_RG: np.ndarray, coverage: float) -> dict[str, Any]:
        """Check each fold of the first repeat with what the others promise, see `describe_fold_uncertainty`."""
        held, data, _ = self.get_held_out(fitted)
        return describe_fold_uncertainty(held, data, self.arrays, counts_RG, coverage)

    def score(self, fitted: Fitted, counts_RG: np.ndarray) -> dict[str, Score]:
        """Score out-of-fold predictions, with bootstrap counts of the groups."""
        truth_M = self.data.targets[self.data.target_rows("test")]
        several = self.several._replace(thresholds=fitted.thresholds)
        scorers = build_task_scorers(self.data.task, truth_M, fitted.test_SM, self.arrays.group_M, several)
        scores = score_folds(scorers, truth_M, fitted.test_SM, self.arrays, counts_RG, several)
        if self.data.pairs is not None and len(self.data.task.labels) == 2 and fitted.test_logits_MC is not None:
            score_M = np.diff(fitted.test_logits_MC, axis=1)[:, 0]  # of the first repeat
            ranked = [build_binary_scorer(truth_M, score_M, self.arrays.group_M)]
            scores |= score_folds(ranked, truth_M, fitted.test_SM[:1], self.arrays, counts_RG)
        return scores

    def score_each_fold(self, fitted: Fitted) -> list[float | None]:
        """Compute the headline metric of each fold and repeat, the mean over seeds; None where it is undefined."""
        num_seeds, num_folds = len(fitted.test_SM) // self.repeats, self.plan.num_folds
        rows_M, values = self.data.target_rows("test"), []
        for number, task in enumerate(self.tasks):
            rows, first = task.target_rows("test"), number // num_folds * num_seeds
            places, found = np.searchsorted(rows_M, rows), []
            for row in range(first, first + num_seeds):
                several = self.several
                if fitted.fold_thresholds_SM is not None:
                    several = several._replace(thresholds=[fitted.thresholds[row][places]])
                found.append(compute_headline(task.task, task.targets[rows], fitted.test_SM[row, places], several))
            values.append(nan_to_none(float(np.mean(found))))
        return values

    def score_validation(self, fitted: Fitted) -> float | None:
        """Compute the mean over folds of the headline metric on validation; None if it was not predicted."""
        sizes = [len(task.target_rows("validation")) for task in self.tasks]
        if fitted.validation_SM.shape[1] != sum(sizes):
            return None
        scores = [score_validation(own, task) for own, task in zip(self.divide(fitted), self.tasks, strict=True)]
        defined = [score for score in scores if score is not None]
        return float(np.mean(defined)) if defined else None

    def score_constant(self, counts_RG: np.ndarray) -> dict[str, Score]:
        """Score the mean, or the majority class, of each fold's training set."""
        constants = [repeat_constant(choose_constant(task), len(task.target_rows("test"))) for task in self.tasks]
        return self.score(self.merge([Fitted(constant, np.empty((1, 0))) for constant in constants]), counts_RG)

    def sweep(
        self, candidates: Sequence[Candidate], seeds: tuple[int, ...], device: str, rows: Path | None = None
    ) -> "CrossValidation":
        """Choose the layer and the pooling of each fold on its validation set.

        Args:
            candidates: Layers and poolings.
            seeds: Seeds of neural probes.
            device: Device of neural probes.
            rows: Folder of finished candidates, from which an interrupted call resumes. None keeps none.

        Returns:
            The cross-validation with the predictions of the chosen ones.

        Raises:
            InputError: No candidate of a fold has a defined score on validation.
        """
        places = tuple(describe_place(candidate.layer, candidate.pooling) for candidate in candidates)
        fits, scores_CF = [], []
        for place, candidate in zip(places, candidates, strict=True):
            with explain_out_of_memory(f"fitting the probe on {place}", lambda: ["--device cpu", "--seeds 0"]):
                fitted_F = self._fit_candidate(candidate, place, seeds, device, rows)
            fits.append(fitted_F)
            scores_CF.append([score_validation(each, task) for each, task in zip(fitted_F, self.tasks, strict=True)])
            logger.info("%s: fitted in %s", place, format_count(len(self.tasks), "fold"))
        sign = -1 if self.data.task.metric in LOWER_IS_BETTER else 1
        chosen_F = []
        for number in range(len(self.tasks)):
            values = [math.nan if scores[number] is None else sign * scores[number] for scores in scores_CF]
            if not any(map(math.isfinite, values)):
                raise InputError(
                    f"task {self.data.task.name}: no layer has a defined score on the validation set of a fold. Choose "
                    "one layer with --repr_layer, or fewer folds.",
                    code="sweep.undefined",
                    metric=self.data.task.metric,
                )
            chosen_F.append(int(np.nanargmax(values)))
        merged = self.merge([fits[index][number] for number, index in enumerate(chosen_F)])
        swept = merged._replace(selected=merged.selected | {"candidate": chosen_F})
        keys = (
            ()
            if rows is None
            else tuple(
                {"place": place, "settings": asdict(candidate.probe), "key": read_file_key(candidate.source.path)}
                for place, candidate in zip(places, candidates, strict=True)
            )
        )
        return replace(self, swept=swept, candidates=places, candidate_keys=keys)

    def _fit_candidate(
        self, candidate: Candidate, place: str, seeds: tuple[int, ...], device: str, rows: Path | None
    ) -> list[Fitted]:
        """Fit the probe of a candidate in each fold, or load its predictions."""
        targets = [ProbeTargets.from_task(task) for task in self.tasks]

        def fit() -> tuple[Fitted, str]:
            features = candidate.source.features.load()
            return self.merge(fit_probe_folds(features, targets, candidate.probe, seeds, device)), ""

        if rows is None:
            return self.divide(fit()[0])
        name = f"{candidate.source.name}, {place}, {candidate.probe.probe}"
        key = {"data": self.data.sha256, "folds": self.fingerprint, "row": name, "seeds": list(seeds)}
        key |= {"settings": asdict(candidate.probe), "key": read_file_key(candidate.source.path)}
        return self.divide(load_or_fit(rows, f"folds of {name}", key, fit)[0])

    @property
    def most_chosen(self) -> int:
        """The candidate that most folds choose; of equally many, the first one."""
        return int(np.bincount(self.swept.selected["candidate"]).argmax())

    def divide(self, merged: Fitted) -> list[Fitted]:
        """Divide merged fits into those of the folds, the inverse of `merge`."""
        rows_M, num_folds = self.data.target_rows("test"), self.plan.num_folds
        num_seeds = len(merged.test_SM) // self.repeats
        ends = np.cumsum([len(task.target_rows("validation")) for task in self.tasks])[:-1]
        validations = np.split(merged.validation_SM, ends, axis=1)
        fitted = []
        for number, (task, validation_SM) in enumerate(zip(self.tasks, validations, strict=True)):
            first = number // num_folds * num_seeds
            places = np.searchsorted(rows_M, task.target_rows("test"))
            selected = {}
            for name, entries in merged.selected.items():
                share = len(entries) // len(self.tasks)
                own = entries[number * share : (number + 1) * share]
                is_list = share > 1 or num_seeds > 1 or name == "threshold"
                selected[name] = own if is_list else own[0]
            test_SM, logits_MC = merged.test_SM[first : first + num_seeds, places], merged.test_logits_MC
            part = Fitted(test_SM, validation_SM, {}, selected, merged.seconds / len(self.tasks))
            fitted.append(part._replace(test_logits_MC=None if logits_MC is None else logits_MC[places]))
        return fitted

    def fit_source(
        self, kind: str, features: Features, config: ProbeConfig, seeds: tuple[int, ...], device: str, is_saved: bool
    ) -> Fitted:
        """Fit the probe of a model in each fold.

        Args:
            kind: "probe" for the model that is benchmarked, whose layer may have been chosen in each fold.
            features: Rows of the task's proteins.
            config: The probe.
            seeds: Seeds of a neural probe.
            device: Device of a neural probe.
            is_saved: Whether to fit the final probe too.

        Returns:
            The merged fits, with the parameters of the final probe.
        """
        if kind != "probe" or self.swept is None:
            return self.fit_probe(features, config, seeds, device, is_saved)
        merged, best = self.swept, self.most_chosen
        if is_saved:
            own = [fold for fold, index in enumerate(merged.selected["candidate"]) if index == best]
            parts = [self.divide(merged)[fold].selected for fold in own]
            selected = {name: _flatten([part[name] for part in parts]) for name in parts[0] if name != "candidate"}
            merged = merged._replace(parameters=self.fit_final_probe(features, config, selected, seeds, device))
        return merged

    def fit_probe(
        self, features: Features, config: ProbeConfig, seeds: tuple[int, ...], device: str, is_saved: bool = False
    ) -> Fitted:
        """Fit a probe in each fold.

        Args:
            features: Rows of the task's proteins.
            config: The probe.
            seeds: Seeds of a neural probe.
            device: Device of a neural probe.
            is_saved: Whether to fit the final probe too, see `fit_final_probe`.

        Returns:
            The merged fits, with the parameters of the final probe.
        """
        targets = [ProbeTargets.from_task(task) for task in self.tasks]
        merged = self.merge(fit_probe_folds(features, targets, config, seeds, device))
        if is_saved:
            final = self.fit_final_probe(features, config, merged.selected, seeds, device)
            merged = merged._replace(parameters=final)
        return merged

    def fit_final_probe(
        self, features: Features, config: ProbeConfig, selected: dict[str, Any], seeds: tuple[int, ...], device: str
    ) -> ProbeParameters:
        """Fit a probe on all proteins, for the prediction of others.

        Args:
            features: Rows of the task's proteins.
            config: The probe.
            selected: What was chosen in each fold. The final probe uses the median: of the penalties, of several
                values those of each, or of the epochs.
            seeds: Seeds of a neural probe.
            device: Device of a neural probe.

        Returns:
            The fitted probe.
        """
        every = np.arange(len(self.data.ids))
        proteins = {"train": every, "validation": every, "test": every}
        targets = replace(ProbeTargets.from_task(self.data), proteins=proteins)
        if "epoch" in selected:
            config = replace(config, epochs=max(1, _choose_median(selected["epoch"])), patience=None, keep="last")
            return fit_probe(features, targets, config, seeds, device).parameters
        (penalties,) = (entries for name, entries in selected.items() if name != "threshold")
        count = len(self.data.task.columns)
        chosen = [_choose_median(penalties[column::count]) for column in range(count)] or _choose_median(penalties)
        return fit_probe(features, targets, config, seeds, device, penalty=chosen).parameters

    def fit_baseline(self, name: str, seeds: tuple[int, ...], wide_cnn: bool, is_saved: bool = False) -> Baseline:
        """Fit a baseline in each fold, and with `is_saved` on all proteins too.

        Args:
            name: Name of the baseline.
            seeds: Seeds of the one-hot CNN.
            wide_cnn: See `fit_baseline`.
            is_saved: Whether the probe of the baseline is saved.

        Returns:
            The merged fits.
        """
        found = [fit_baseline(name, task, seeds, wide_cnn) for task in self.tasks]
        merged = self.merge([each.fitted for each in found])
        if is_saved:
            described = describe_baseline_probe(name, self.data)
            if described is None:  # a constant
                final = fit_baseline(name, self.labelled).fitted.parameters
            else:
                final = self.fit_final_probe(*described, merged.selected, seeds, "cpu")
            merged = merged._replace(parameters=final)
        return Baseline(name, merged, found[0].note)

    @cached_property
    def several(self) -> SeveralTargets:
        """What the scores of several targets require: the standard deviations are those of all values."""
        return SeveralTargets.from_task(self.labelled)

    @property
    def labelled(self) -> TaskData:
        """The task with all proteins in train, on which the final probes are fitted."""
        return replace(self.data, sets=np.full(len(self.data.ids), "train"))

    def summarise(self, table: str) -> FoldSummary:
        """Describe the cross-validation for a report.

        Args:
            table: Text of predictions.csv.

        Returns:
            The summary.
        """
        num_folds, folds = self.plan.num_folds, []
        selected = [self.candidates[index] for index in self.swept.selected["candidate"]] if self.swept else []
        for number, task in enumerate(self.tasks):
            repeat, fold = divmod(number, num_folds)
            sizes = task.sizes
            chosen = selected[number] if selected else ""
            folds.append(
                Fold(repeat + 1, self.plan.names[fold], sizes["test"], sizes["train"], sizes["validation"], chosen)
            )
        return FoldSummary(
            num_folds,
            self.repeats,
            self.plan.method,
            self.plan.num_groups,
            folds,
            self.arrays.compute_widening(),
            hashlib.sha256(table.encode()).hexdigest(),
            self.arrays.compute_expansion(),
        )

    def format_table(self, predictions: dict[str, np.ndarray]) -> str:
        """Format the out-of-fold predictions as CSV.

        Args:
            predictions: Row name -> predictions (R x S, M).

        Returns:
            One line per target and repeat: id, for residue tasks the number of the residue, group, repeat, fold,
            measured, and the prediction of each row: the mean over seeds of values, the most frequent class. Of several
            targets, one column each, and of labels the mean probability; empty where no value was measured.
        """
        data, rows_M = self.data, self.data.target_rows("test")
        protein_M = data.protein_of_target[rows_M]
        per_residue = data.task.level == "residue"
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        names = data.task.columns or (data.task.is_multilabel and data.task.binary_labels) or ()
        measured_names = [f"measured {name}" for name in names] or ["measured"]
        of_rows = [f"{row}: {name}" for row in predictions for name in names] or list(predictions)
        table.writerow(
            ["id", *(["residue"] if per_residue else []), "group", "repeat", "fold", *measured_names, *of_rows]
        )
        for repeat in range(self.repeats):
            columns = [
                _summarise_seeds(data, np.split(predicted_SM, self.repeats)[repeat])
                for predicted_SM in predictions.values()
            ]
            measured = _format_targets(data, data.targets[rows_M])
            for place, protein in enumerate(protein_M.tolist()):
                residue = [int(rows_M[place] - data.offsets[protein] + 1)] if per_residue else []
                where = [int(self.plan.group_P[protein]) + 1, repeat + 1]
                fold = self.plan.names[self.plan.fold_RP[repeat, protein]]
                cells = [cell for column in (measured, *columns) for cell in column[place]]
                table.writerow([data.ids[protein], *residue, *where, fold, *cells])
        return text.getvalue()


def _flatten(entries: Sequence[Any]) -> list[Any]:
    """Join what was selected in several folds: one entry per fold, or a list with one per seed."""
    return [one for entry in entries for one in (entry if isinstance(entry, list) else [entry])]


def _choose_median(entries: Sequence[Any]) -> Any:
    """Return the median, of an even number the lower one of both."""
    return sorted(entries)[(len(entries) - 1) // 2]


def _summarise_seeds(data: TaskData, predicted_SM: np.ndarray) -> list[list[str]]:
    """Format the mean over seeds of values, or the class that most seeds predict; of equally many, the first one."""
    if data.task.target == "value" or data.task.is_multilabel:
        return _format_targets(data, predicted_SM.mean(axis=0))
    counts_KM = np.stack([(predicted_SM == label).sum(axis=0) for label in range(len(data.task.labels))])
    return _format_targets(data, counts_KM.argmax(axis=0))


def _format_targets(data: TaskData, targets_M: np.ndarray) -> list[list[str]]:
    """Format the cells of each protein or residue: one, or one for each of several targets."""
    if data.task.target == "class" and not data.task.is_multilabel:
        return [[data.task.labels[target]] for target in targets_M]
    rows = targets_M.reshape(len(targets_M), -1)
    return [["" if np.isnan(target) else f"{target:.6g}" for target in row] for row in rows]
