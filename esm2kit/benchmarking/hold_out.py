"""How models are fitted and scored on the sets of a task. `CrossValidation` has the same methods for folds."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from esm2kit.benchmarking.baselines.fit import Baseline, fit_baseline
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features, Fitted, ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_probe
from esm2kit.benchmarking.scores import SeveralTargets, sample_test_counts, score_fitted, score_validation
from esm2kit.benchmarking.uncertainty import describe_test_uncertainty
from esm2kit.benchmarking.verdict import score_constant
from esm2kit.tasks.metrics import Score
from esm2kit.tasks.task_data import TaskData


@dataclass(frozen=True)
class HoldOut:
    """One test set.

    Args:
        data: The task with its sets.
    """

    data: TaskData
    repeats = 1
    fingerprint = ""

    @property
    def labelled(self) -> TaskData:
        """The task whose train set the saved probes know."""
        return self.data

    @property
    def several(self) -> SeveralTargets:
        """What the scores of several targets require."""
        return SeveralTargets.from_task(self.data)

    def complete(self, fitted: Fitted) -> Fitted:
        """Return a fit that was loaded with what follows from its fields: nothing."""
        return fitted

    def sample_counts(self, resamples: int) -> np.ndarray:
        """Sample bootstrap replicates of the test proteins: (resamples, P) counts."""
        return sample_test_counts(self.data, resamples)

    def fit_source(
        self, kind: str, features: Features, config: ProbeConfig, seeds: tuple[int, ...], device: str, is_saved: bool
    ) -> Fitted:
        """Fit the probe of a model."""
        return fit_probe(features, ProbeTargets.from_task(self.data), config, seeds, device)

    def fit_baseline(self, name: str, seeds: tuple[int, ...], wide_cnn: bool, is_saved: bool) -> Baseline:
        """Fit a baseline."""
        return fit_baseline(name, self.data, seeds, wide_cnn)

    def get_held_out(self, fitted: Fitted) -> tuple[Fitted, TaskData, bool]:
        """Return the predictions from which the uncertainty is estimated, their task, and that they have no folds."""
        return fitted, self.data, False

    def describe_uncertainty(self, fitted: Fitted, counts_RP: np.ndarray, coverage: float) -> dict[str, Any]:
        """Measure on test what validation promised, see `describe_test_uncertainty`."""
        return describe_test_uncertainty(fitted, self.data, counts_RP, coverage)

    def score(self, fitted: Fitted, counts_RP: np.ndarray) -> dict[str, Score]:
        """Score predictions, with bootstrap counts."""
        return score_fitted(fitted, self.data, counts_RP)

    def score_constant(self, counts_RP: np.ndarray) -> dict[str, Score]:
        """Score the constant prediction, with bootstrap counts."""
        return score_constant(self.data, counts_RP)

    def score_validation(self, fitted: Fitted) -> float | None:
        """Compute the headline metric on validation; None if it is undefined or not predicted."""
        return score_validation(fitted, self.data)

    def score_each_fold(self, fitted: Fitted) -> list[float | None]:
        """Return no scores, because there are no folds."""
        return []
