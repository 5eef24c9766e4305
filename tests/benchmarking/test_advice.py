"""Advice follows from both losses: it asks for lower rates only where the training itself is unstable."""

import numpy as np
import pytest

from esm2kit.benchmarking.advice import advise, advise_seeds

FALLING = np.geomspace(1.0, 0.1, 10)


@pytest.mark.parametrize(
    ("train", "validation", "expected", "absent"),
    [
        # the data set of the report: 30 predictions within 51.9 to 52.3 after ten epochs, both losses flat
        (np.linspace(1.02, 0.99, 10), np.linspace(1.01, 1.0, 10), "little was learned: raise head_lr or lr", "lower"),
        (FALLING, FALLING + 0.05, "still falling at the end", "lower"),
        (FALLING, [0.9, 0.7, 0.6, 0.5, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9], "lowest at validation 4 of 10", "lower lr"),
        ([1, 0.5, 0.3, 0.6, 0.9, 1.4], [1, 0.6, 0.5, 0.8, 1.2, 1.6], "lower lr and head_lr", "Overfitting"),
        ([1, 0.5, 0.3, 0.29, 0.29, 0.29], [1, 0.6, 0.5, 0.49, 0.489, 0.489], "levelled off", "lower"),
        ([1, 0.5], [1, 0.5], "2 validations are too few", "lower"),
        ([1, np.nan, 1], [1, 1, 1], "not finite: lower lr", "raise"),
        ([1.0, 0.99, 0.98], [1.0, 0.9, 0.9], "training loss hardly fell", "lower"),
        (np.linspace(1, 0.97, 6), np.linspace(1, 1.3, 6), "little was learned", "Overfitting"),
    ],
)
def test_advice(train, validation, expected: str, absent: str) -> None:
    found = advise(train, validation)
    assert expected in found
    assert absent not in found
    assert advise(np.multiply(train, 1e3), np.multiply(validation, 1e3)) == found, "the unit of the loss has no effect"


def test_a_report_gives_the_advice_of_its_first_seed() -> None:
    history = {"train_loss": [[1.0, 9.0], [0.5, 9.0], [0.3, None]], "validation_loss": [[1.0, 9], [0.6, 9], [0.4, 9]]}
    assert "still falling" in advise_seeds(history)
    assert advise_seeds({}) == ""
    assert "not finite" in advise_seeds({"train_loss": [[None]] * 3, "validation_loss": [[1.0]] * 3})
