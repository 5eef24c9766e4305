"""Files of every kind, damaged at random: one line or no difference, and never a traceback.

`python tests/support/damage.py` runs a campaign of any size; here a short one runs.
"""

from collections import Counter

import pytest
from support.damage import KINDS, Kind, campaign


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_damage_is_refused_or_harmless(kind: Kind) -> None:
    trials = list(campaign([kind], trials=14, seed=4, seconds=40))
    wrong = [trial for trial in trials if trial.outcome == "traceback"]
    wrong += [trial for trial in trials if trial.outcome == "different" and kind.checked]
    assert not wrong, "\n".join(f"{trial.damage}: {trial.outcome}\n{trial.message}" for trial in wrong)
    assert Counter(trial.outcome for trial in trials)["refused"] > 0, "some damage of this kind is found"
