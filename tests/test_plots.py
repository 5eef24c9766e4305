"""Figures have labelled axes, show all values, and do not rely on colour alone."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from esm2kit import plots
from esm2kit import plots as pair_plots
from esm2kit.notebook import diagrams

mpl.use("Agg")
GENERATOR = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


FIGURES = {
    "length_histogram": lambda: plots.length_histogram(GENERATOR.integers(30, 900, 500), max_residues=1022),
    "cluster_size_histogram": lambda: plots.cluster_size_histogram(GENERATOR.integers(1, 300, 500)),
    "loss_curves": lambda: plots.loss_curves({"train": ([1, 2], [3.0, 2.9])}, unigram_baseline=2.89),
    "perplexity_curves": lambda: plots.perplexity_curves({"valid": ([1, 2], [19.0, 17.5])}, unigram_baseline=18.16),
    "embedding_scatter": lambda: plots.embedding_scatter(GENERATOR.normal(size=(60, 2)), ["a", "b", "c"] * 20),
    "scatter_by_number": lambda: plots.embedding_scatter(
        GENERATOR.normal(size=(60, 2)), GENERATOR.normal(size=60), label_name="melting point (deg C)"
    ),
    "layer_curves": lambda: plots.layer_curves(
        {name: np.c_[np.arange(7), GENERATOR.random((7, 3))] for name in ("mean", "max")}, "Spearman", ("max", 3),
        (0.5, 0.4, 0.6),
    ),
    "heat_map": lambda: plots.heat_map(GENERATOR.normal(size=(20, 30)), "residue", "mutant", "log odds", centre=0),
    "pair_map": lambda: pair_plots.pair_map(*GENERATOR.normal(size=(2, 30, 30)), "ours", "expected", "coupling"),
    "pair_map_of_probabilities": lambda: pair_plots.pair_map(
        *GENERATOR.random(size=(2, 30, 30)), "ours", "expected", "contact probability", probability=True
    ),
    "contact_map": lambda: plots.contact_map(GENERATOR.random((30, 30)), np.eye(30), boundaries=[12]),
    "contact_map_of_couplings": lambda: plots.contact_map(GENERATOR.normal(size=(30, 30)), probability=False),
    "by_separation": lambda: pair_plots.by_separation({"ours": np.array([np.nan, *GENERATOR.random(90)])}, "coupling"),
    "neighbours_on_map": lambda: plots.neighbours_on_map(GENERATOR.normal(size=(30, 2)), 3, [5, 7], ["five", "seven"]),
    "confusion_matrix": lambda: plots.confusion_matrix(GENERATOR.integers(0, 50, (3, 3)), "HEC"),
    "prediction_histogram": lambda: plots.prediction_histogram(
        GENERATOR.normal(size=90), {"mean": 0.1, "deviation": 1.1, "quantiles": [-3.0, 3.5]}, "deg C"
    ),
    "class_counts": lambda: plots.class_counts({f"class {number}": number for number in range(30)}),
    "residue_track": lambda: plots.residue_track({"p1": np.array([0, 1, 2, 1]), "p2": np.array([2, 2])}, "HEC"),
    "residue_values": lambda: plots.residue_track({"p1": GENERATOR.random(30), "p2": GENERATOR.random(9)}, (), "share"),
    "identity_histogram": lambda: plots.identity_histogram({"this split": [0.5, 0.5], "random": [0.1, 0.9]}, 0.5),
    "predicted_vs_true": lambda: plots.predicted_vs_true(*GENERATOR.normal(size=(2, 90)), unit="deg C"),
    "reliability_diagram": lambda: plots.reliability_diagram({"model": [(0.3, 0.2, 0.6), (0.8, 0.9, 0.4)]}, "residues"),
    "predicted_with_intervals": lambda: plots.predicted_with_intervals(*GENERATOR.random((3, 200)), unit="deg C"),
    "coverage_curve": lambda: plots.coverage_curve([0.5, 0.9], [0.45, 0.93], 0.9),
    "learning_curves": lambda: plots.learning_curves(GENERATOR.random((9, 3)), GENERATOR.random((9, 3)), [3, 5, 9]),
    "scores": lambda: plots.scores_with_baselines(
        ["ours", "mean", "ridge"], [0.6, np.nan, 0.4], [0.5, np.nan, 0.3], [0.7, np.nan, 0.5], "Spearman",
        highlighted=["ours"], published={"someone": 0.55},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_axis_labels_and_can_be_saved(name, tmp_path):
    ax = FIGURES[name]()
    assert ax.get_xlabel()
    assert ax.get_ylabel() or name == "scores"
    ax.figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 3000


def test_existing_axes_are_used():
    _, ax = plt.subplots()
    assert plots.length_histogram(np.array([50, 60]), ax=ax) is ax


def test_baselines_are_plotted_at_their_loss():
    ax = plots.loss_curves({"train": ([1, 2], [3.0, 2.9])}, unigram_baseline=2.89)
    heights = {line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1}
    assert heights == {2.89, np.log(20)}
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["train", "uniform guess 3.00", "unigram guess 2.89"]


def test_an_undefined_score_is_marked_and_not_plotted_as_zero():
    ax = FIGURES["scores"]()
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["ours", "mean", "ridge", "someone"]
    assert "undefined" in {text.get_text() for text in ax.texts}
    assert {tuple(line.get_xdata()) for line in ax.lines} == {(0.5, 0.7), (0.6,), (0.3, 0.5), (0.4,), (0.55,)}


def test_more_classes_than_colours_use_other_markers():
    names = [f"class{i:02d}" for i in range(14)]
    ax = plots.embedding_scatter(GENERATOR.normal(size=(28, 2)), names * 2)
    marks = {(tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes()) for c in ax.collections}
    assert len(marks) == 14


def test_the_merged_group_is_last_and_below_the_others():
    labels = ["a", "9 others", "b", "9 others"]
    ax = plots.embedding_scatter(GENERATOR.normal(size=(4, 2)), labels, rest="9 others", axes=("x", "y"))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a (1)", "b (1)", "9 others (2)"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "y")
    orders = {drawn.get_label(): drawn.get_zorder() for drawn in ax.collections}
    assert orders["9 others (2)"] < min(orders["a (1)"], orders["b (1)"])


def test_long_names_widen_the_figure_and_very_long_ones_are_cut():
    xy_P2 = GENERATOR.normal(size=(4, 2))
    short, long = (plots.embedding_scatter(xy_P2, [name, "b"] * 2) for name in ("a", "Sulfolobus islandicus " * 3))
    assert long.figure.get_figwidth() > short.figure.get_figwidth() + 2
    long.figure.draw_without_rendering()
    assert long.get_window_extent().width > 0.5 * long.get_window_extent().height
    cut = long.get_legend().get_texts()[0].get_text()
    assert cut == "Sulfolobus islandicus Sulfolobus i … (2)"
    assert len(cut) == plots.MAX_NAME + len(" (2)")


def test_neighbours_are_numbered_at_their_positions():
    xy_P2 = GENERATOR.normal(size=(9, 2))
    ax = plots.neighbours_on_map(xy_P2, 4, [8, 0], ["eight", "nought"])
    assert {text.get_text(): tuple(text.xy) for text in ax.texts} == {"1": tuple(xy_P2[8]), "2": tuple(xy_P2[0])}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["1  eight", "2  nought"]


def test_rows_without_names_are_numbered_from_one():
    ax = plots.heat_map(np.zeros((5, 40)), "residue", "channel", "value")
    for axis, count in ((ax.xaxis, 40), (ax.yaxis, 5)):
        numbers = [int(text.get_text()) for text in axis.get_ticklabels()]
        assert numbers[0] == 1
        assert max(numbers) <= count
        assert [number - 0.5 for number in numbers] == axis.get_ticklocs().tolist()


def test_each_triangle_shows_one_map():
    upper, lower = np.full((4, 4), 2.0), np.full((4, 4), -1.0)
    ax = pair_plots.pair_map(upper, lower, "model", "chance", "coupling")
    shown = np.asarray(ax.images[0].get_array().filled(np.nan))
    np.testing.assert_array_equal(shown[np.triu_indices(4, 1)], 2.0)
    np.testing.assert_array_equal(shown[np.tril_indices(4, -1)], -1.0)
    assert ax.images[0].get_clim() == (-2, 2)
    assert ax.get_title() == "above the diagonal: model\nbelow: chance"
    assert ax.get_xlim() == (0.5, 4.5)


def test_separations_are_averaged_over_pairs():
    means_T = np.array([np.nan, 1.0, 2.0, 5.0])
    (line,) = pair_plots.by_separation({"ours": means_T}, "coupling").lines
    np.testing.assert_allclose(line.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(line.get_ydata(), [1, 2, 5])
    means_T = np.zeros(400)
    means_T[-1] = 1.0  # the only pair, of both ends
    (line,) = pair_plots.by_separation({"ours": means_T}, "coupling").lines
    assert len(line.get_xdata()) < 20, "bins widen with the separation"
    start = round(line.get_xdata()[-1] ** 2 / 399)
    np.testing.assert_allclose(line.get_ydata()[-1], 1 / sum(400 - apart for apart in range(start, 400)))


def test_counts_and_residues_have_integer_ticks():
    for ax in (
        plots.cluster_size_histogram(np.array([1] * 400 + [2] * 90 + [15])),
        plots.length_histogram(np.array([50, 51, 52, 53])),
    ):
        ax.figure.draw_without_rendering()
        for axis in (ax.xaxis, ax.yaxis):
            if any(" to " in text.get_text() for text in axis.get_ticklabels()):
                continue  # cluster sizes, such as `5 to 8`
            labels = [text.get_text() for text in axis.get_ticklabels() if text.get_text()]
            assert labels
            assert all(text.replace(",", "").isdigit() for text in labels), labels
            assert len(labels) == len(set(labels)), "a rounded tick label occurs twice"


def test_clusters_are_counted_once_in_bins_of_doubling_width():
    ax = plots.cluster_size_histogram(np.array([1] * 40 + [2] * 9 + [3, 4, 4, 5, 8, 9]))
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "2", "3 to 4", "5 to 8", "9 to 16"]
    assert [bar.get_height() for bar in ax.patches] == [40, 9, 3, 2, 1]


def test_the_window_of_a_model_is_shown_in_the_histogram_of_lengths():
    ax = plots.length_histogram(np.array([50, 400]), max_residues=1022)
    assert list(ax.lines[0].get_xdata()) == [1022, 1022]
    assert ax.get_xlim()[0] < 1022 < ax.get_xlim()[1]
    assert ax.get_legend().get_texts()[0].get_text() == "window of a model: 1,022 residues"
    assert not plots.length_histogram(np.array([50, 400])).lines


def test_each_epoch_has_one_coloured_cell_in_the_row_of_its_member():
    ax = diagrams.sampled_members(np.array([7, 9, 4]), [9, 9, 4, 7], ["P7", "P9", "P4"])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["P7", "P9", "P4"]
    cells = {(round(cell.get_x() + 0.45), round(cell.get_y() + 0.42)): cell.get_facecolor() for cell in ax.patches}
    assert len(cells) == 12
    blue = {place for place, colour in cells.items() if colour[:3] == tuple(plots.PRIMARY)}
    assert blue == {(0, 1), (1, 1), (2, 2), (3, 0)}
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first member is at the top"


def test_of_a_large_cluster_only_the_sampled_members_are_shown():
    ax = diagrams.sampled_members(np.arange(10_000), [5, 9_999, 5])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["6", "10000"]
    assert ax.get_ylabel() == "members of the cluster (2 of 10,000)"
    assert ax.figure.get_size_inches()[1] < 3


def test_length_bins_have_equal_integer_widths():
    lengths = GENERATOR.integers(57, 400, 2384)
    ax = plots.length_histogram(lengths)
    widths = {round(bar.get_width(), 9) for bar in ax.patches}
    assert widths == {9.0}
    assert sum(bar.get_height() for bar in ax.patches) == 2384


def test_a_dot_marks_the_hidden_residue():
    odds_TL = GENERATOR.normal(size=(4, 3))
    ax = diagrams.guess_map(odds_TL, "ACD", "DCXA")
    np.testing.assert_array_equal(ax.collections[-1].get_offsets(), [[0.5, 2.5], [1.5, 1.5], [3.5, 0.5]])
    np.testing.assert_allclose(ax.collections[0].get_array().ravel(), odds_TL.T.ravel())
    assert [text.get_text() for text in ax.get_xticklabels()] == list("DCXA")


def test_bars_start_at_one():
    ax = diagrams.times_likelier({"C": 1.5, "W": 0.75})
    assert [(bar.get_y(), bar.get_height()) for bar in ax.patches] == [(1, 0.5), (1, -0.25)]


def test_a_confusion_matrix_has_space_for_long_labels():
    ax = plots.confusion_matrix(np.eye(3), ["Endoplasmic_reticulum_and_Golgi", "Mitochondrion_inner_membrane", "Other"])
    ax.figure.draw_without_rendering()
    assert ax.get_window_extent().width / ax.figure.dpi > 1.5


def test_a_confusion_matrix_shows_counts_and_shares():
    ax = plots.confusion_matrix(np.array([[8, 2], [1000, 3000]]), ["x", "y"])
    assert [text.get_text() for text in ax.texts] == ["80%\n8", "20%\n2", "25%\n1,000", "75%\n3,000"]
    assert min(text.get_fontsize() for text in ax.texts) >= 10
    np.testing.assert_allclose(ax.collections[0].get_array().ravel(), [0.8, 0.2, 0.25, 0.75])
    assert len(ax.figure.axes) == 1, "the cells have the percent, which a colour bar would repeat"


def test_a_confusion_matrix_of_many_classes_has_a_colour_bar():
    ax = plots.confusion_matrix(np.eye(11), [f"class {number}" for number in range(11)])
    assert not ax.texts
    assert len(ax.figure.axes) == 2


def test_labels_of_near_points_do_not_overlap() -> None:
    xy_P2 = np.array([[0.0, 0.0], [0.01, 0.0], [0.0, 0.01], [0.02, 0.01], [0.01, 0.02], [1.0, 1.0]])
    ax = plots.neighbours_on_map(xy_P2, 0, [1, 2, 3, 4], list("abcd"))
    renderer = ax.figure.canvas.get_renderer()
    boxes = [mpl.text.Text.get_window_extent(text, renderer) for text in ax.texts]  # without the lines to the points
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3", "4"]
    star = ax.transData.transform(xy_P2[0])
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[place + 1 :])
        assert not box.contains(*star)


def test_proteins_without_a_number_are_grey() -> None:
    ax = plots.embedding_scatter(np.arange(8.0).reshape(4, 2), np.array([1.0, np.nan, 3.0, 4.0]), label_name="Tm")
    grey, coloured = ax.collections[:2]
    assert grey.get_offsets().tolist() == [[2.0, 3.0]]
    assert coloured.get_array().tolist() == [1.0, 3.0, 4.0]
    assert ax.get_legend().get_texts()[0].get_text() == "not given (1)"


def test_few_points_are_larger_than_many() -> None:
    sizes = []
    for count in (20, 600, 20_000):
        ax = plots.embedding_scatter(GENERATOR.normal(size=(count, 2)), np.array(["a"] * count))
        sizes.append(ax.collections[0].get_sizes()[0])
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 40


def test_references_of_the_perplexity_are_labelled_and_on_the_axis() -> None:
    ax = plots.perplexity_curves(
        {"validation": ([1, 2], [17.6, 16.8])}, 17.5, references={"uniform guess": 20, "8M": 10}
    )
    assert [text.get_text() for text in ax.texts] == ["uniform guess 20", "8M 10", "unigram guess 17.5"]
    low, high = ax.get_ylim()
    assert low < 10 < 20 < high


def test_figures_of_a_notebook_are_as_wide_as_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "_min_width", 0.0)
    narrow = plots.length_histogram(np.array([3, 4])).figure.get_size_inches()[0]
    plots.widen_figures(9.4)
    assert narrow == plots.WIDTH
    assert plots.length_histogram(np.array([3, 4])).figure.get_size_inches()[0] == 9.4


def test_the_histogram_of_predictions_counts_all_of_them() -> None:
    values = GENERATOR.normal(50, 2, 300)
    ax = plots.prediction_histogram(values, {"mean": 50.0, "deviation": 8.0, "quantiles": [34.0, 50.0, 67.0]}, "deg C")
    bars = ax.containers[0].patches
    assert sum(bar.get_height() for bar in bars) == 300
    assert ax.get_xlim()[0] <= 34 < 67 <= ax.get_xlim()[1], "the range of the training labels is visible"
    assert ax.get_xlabel() == "predicted value (deg C)"
    constant = plots.prediction_histogram(np.full(7, 3.0))
    assert sum(bar.get_height() for bar in constant.containers[0].patches) == 7


def test_the_bars_of_classes_sum_the_rest() -> None:
    ax = plots.class_counts({f"class {number}": number for number in range(30)}, most=5)
    bars = {label.get_text(): bar.get_width() for label, bar in zip(ax.get_yticklabels(), ax.patches, strict=True)}
    assert bars == {"class 29": 29, "class 28": 28, "class 27": 27, "class 26": 26, "26 other classes": sum(range(26))}


def test_the_track_of_residues_shows_each_class_in_its_place() -> None:
    ax = plots.residue_track({"p1": np.array([0, 2, 2, 0]), "p2": np.array([2])}, "HEC")
    image = ax.get_images()[0].get_array()
    assert (image[0, 1] == image[0, 2]).all()
    assert (image[0, 1] == image[1, 0]).all()
    assert not (image[0, 0] == image[0, 1]).all()
    assert (image[1, 1:, 3] == 0).all(), "nothing is drawn behind the end of a protein"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["H", "C"]


def test_a_reliability_diagram_shows_every_bin_and_the_share_of_the_last_curve() -> None:
    curves = {"before": [(0.3, 0.2, 0.6), (0.8, 0.9, 0.4)], "after": [(0.4, 0.3, 0.75), (0.7, 0.8, 0.25)]}
    ax = plots.reliability_diagram(curves, "residues")
    above = ax.figure.axes[0]
    assert [bar.get_height() for bar in above.patches] == [0.75, 0.25]
    assert above.get_ylabel() == "share of\nresidues"
    points = [collection.get_offsets().tolist() for collection in ax.collections]
    assert points == [[[0.3, 0.2], [0.8, 0.9]], [[0.4, 0.3], [0.7, 0.8]]]
    sizes = [collection.get_sizes() for collection in ax.collections]
    assert sizes[0][0] > sizes[0][1]  # a mark grows with the share of its bin
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["perfect calibration", "before", "after"]


def test_intervals_are_counted_and_drawn_to_their_ends() -> None:
    ax = plots.predicted_with_intervals(np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.0, 5.0]), np.array([0.5, 0.2, 1.0]))
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "interval contains the measured value (2)" in names
    assert "interval does not (1)" in names
    bars = [segment.tolist() for container in ax.containers for segment in container.lines[2][0].get_segments()]
    assert bars == [[[1.0, 1.0], [1.0, 2.0]], [[2.0, 1.8], [2.0, 2.2]], [[3.0, 4.0], [3.0, 6.0]]]
    ax = plots.predicted_with_intervals(np.zeros(500), np.zeros(500), np.ones(500), most=40)
    assert sum(len(container.lines[0].get_xdata()) for container in ax.containers) == 40
