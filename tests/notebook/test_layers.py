"""The layers of notebook 04: the control, the curve and its caption."""

from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
from support.errors import refused
from support.reports import report, row, score

from esm2kit.benchmarking.sweep_summary import LayerSweep, SweepPoint
from esm2kit.notebook import captions
from esm2kit.notebook.display import layer_chart
from esm2kit.notebook.pickers.layers import layer_picker

POINTS = [SweepPoint(layer, "mean", "ridge", 0.1 * layer, 0.05, 0.6, layer < 2) for layer in (0, 1, 2, 3)]


def test_all_or_at_least_two_layers_are_chosen() -> None:
    view = layer_picker("all")
    assert (view.value, view.parameters) == ("all", {"layers": "all"})
    assert "all layers of the model" in view.card.value
    view.controls["layers"].value = " 0,3,-1 "
    assert view.value == "0,3,-1"
    assert "0, 3, -1" in view.card.value
    for text in ("3", "", "first", "0;3"):
        view.controls["layers"].value = text
        assert 'role="alert"' in view.card.value
        with refused("option.layers"):
            _ = view.value


@pytest.mark.parametrize(("low", "between"), [(0.2, " [0.200, 0.400]"), (None, "")])
def test_the_caption_states_the_choice_and_its_test_score(low: float | None, between: str) -> None:
    sweep = LayerSweep("spearman", 20, POINTS, 3, "Layer 3 was chosen on validation among 4 layers.")
    found = report("spearman", [row("probe", "m, ridge", {"spearman": score(0.3, low, low and 0.4)})])
    found = replace(found, layer_sweep=sweep)
    ax = layer_chart(found)
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["validation"].get_ydata().tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert lines["test score of the chosen one"].get_ydata().tolist() == [0.3]
    plt.close(ax.figure)
    assert captions.layers(found) == (
        "*t: scores by layer on validation.* Layer 3 was chosen on validation among 4 layers. Its test score, the only "
        f"one that was computed (diamond): 0.300{between}."
    )
