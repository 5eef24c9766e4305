"""Figures from arrays: every function draws into Axes and returns them; colours hold for colour-blind eyes."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

PALETTE = sns.color_palette("colorblind")
PRIMARY, SECONDARY, ACCENT = PALETTE[0], PALETTE[7], PALETTE[1]
VALIDATION = PALETTE[1]  # in every figure of a training, alone or beside its training curve
MUTED = "#c8c8c8"
MAX_POINTS = 20_000
MAX_BINS = 40
MAX_NAME = 36  # letters of a name in a legend


def _get_axes(ax: Axes | None, width: float = 6.0, height: float = 3.6) -> Axes:
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def _label_axes(ax: Axes, x_label: str, y_label: str, title: str = "") -> Axes:
    ax.set(xlabel=x_label, ylabel=y_label, title=title)
    sns.despine(ax=ax)
    return ax


def length_histogram(num_residues_P: np.ndarray, max_residues: int | None = None, ax: Axes | None = None) -> Axes:
    """How long proteins are.

    Args:
        num_residues_P: residues of every protein.
        max_residues: where training crops; drawn as a line where proteins come near it.
    """
    ax = _get_axes(ax)
    counts = np.asarray(num_residues_P)
    # bins of whole residues, all equally wide: a fraction of one would draw gaps and double bars where there are none
    width = max(1, -(-int(counts.max() - counts.min() + 1) // MAX_BINS))
    edges = np.arange(counts.min(), counts.max() + width + 1, width)
    ax.hist(counts, bins=edges, color=PRIMARY, edgecolor="white", linewidth=0.4)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.0f}"))
    if max_residues is not None and max_residues < 1.2 * counts.max():  # a line far off would empty half the axis
        ax.axvline(max_residues, color=ACCENT, linestyle="--", label=f"crop at {max_residues:,} residues")
        ax.legend(frameon=False)
    return _label_axes(ax, "residues per protein", "proteins")


def cluster_size_histogram(num_members_C: np.ndarray, ax: Axes | None = None) -> Axes:
    """How many members clusters have: a bar for one, two, up to four, up to eight and so on; counts logarithmic."""
    ax = _get_axes(ax)
    edges = [0, 1]
    while edges[-1] < np.max(num_members_C):
        edges.append(2 * edges[-1])
    names = [f"{low + 1:,}" if high - low == 1 else f"{low + 1:,} to {high:,}" for low, high in pairwise(edges)]
    # at places, not names: their order is the axis's
    ax.bar(range(len(names)), np.histogram(num_members_C, np.array(edges) + 0.5)[0], width=0.9, color=PRIMARY)
    ax.set_xticks(range(len(names)), names, rotation=30 if len(names) > 7 else 0)
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.7)  # a bar of one cluster is to be seen
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.0f}" if value >= 1 else ""))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, place: ""))
    return _label_axes(ax, "members per cluster", "clusters")


def loss_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    unigram_baseline: float | None = None,
    uniform: float | None = float(np.log(20)),
    ax: Axes | None = None,
) -> Axes:
    """Masked-LM loss over training steps, beside what a guess without context costs.

    Args:
        curves: name -> (steps, losses in nats a masked residue).
        unigram_baseline: loss of guessing by residue frequencies, on the same split.
        uniform: loss of guessing evenly among 20 residues; None leaves it out.
    """
    ax = _get_axes(ax)
    for colour, (name, (steps, losses)) in zip(PALETTE, curves.items(), strict=False):
        ax.plot(steps, losses, color=colour, label=name, marker="o" if len(steps) < 20 else None, markersize=3)
    _guide_lines(ax, {"uniform guess": uniform, "unigram guess": unigram_baseline})
    return _label_axes(ax, "update", "loss (nats per masked residue)")


def perplexity_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    unigram_baseline: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Validation perplexity over training steps; 20 is a uniform guess.

    Args:
        curves: name -> (steps, perplexities).
        unigram_baseline: perplexity of guessing by residue frequencies, on the same split.
    """
    ax = _get_axes(ax)
    for colour, (name, (steps, values)) in zip([VALIDATION, *PALETTE[2:]], curves.items(), strict=False):
        ax.plot(steps, values, color=colour, label=name, marker="o" if len(steps) < 20 else None, markersize=3)
    _guide_lines(ax, {"uniform guess": None, "unigram guess": unigram_baseline})
    return _label_axes(ax, "update", "perplexity")


def _guide_lines(ax: Axes, lines: Mapping[str, float | None]) -> None:
    for style, (name, height) in zip((":", "--"), lines.items(), strict=False):
        if height is not None:
            ax.axhline(height, color=SECONDARY, linestyle=style, label=f"{name} {height:.2f}")
    ax.legend(frameon=False)


def embedding_scatter(
    xy_P2: np.ndarray,
    labels_P: Sequence[str] | np.ndarray,
    title: str = "",
    label_name: str = "",
    ax: Axes | None = None,
    axes: tuple[str, str] = ("component 1", "component 2"),
    rest: str | None = None,
) -> Axes:
    """A two-dimensional map of embeddings, coloured by a label (a legend) or a number (a colour bar).

    Args:
        xy_P2: coordinates, from PCA, UMAP or t-SNE.
        labels_P: a word or a number for every point.
        title: of the figure.
        label_name: what the label is, with its unit.
        axes: what the two coordinates are.
        rest: the word that stands for all others, drawn in grey below them.
    """
    labels = np.asarray(labels_P)
    numbers = np.issubdtype(labels.dtype, np.number)
    longest = 0 if numbers else min(MAX_NAME, max(map(len, labels.tolist())))
    ax = _get_axes(ax, 4.9 + 0.09 * longest, 4.6)  # a long name widens the figure, it does not narrow the map
    if numbers:
        drawn = ax.scatter(*xy_P2.T, c=labels, s=9, cmap="viridis", linewidths=0, rasterized=True)
        ax.figure.colorbar(drawn, ax=ax, label=label_name)
    else:
        names = sorted(set(labels.tolist()) - {rest})
        colours = [PALETTE[index % len(PALETTE)] for index in range(len(names))]
        if rest in labels:
            names, colours = [*names, rest], [*colours, MUTED]
        for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
            chosen = xy_P2[labels == name]
            marker = "osD^vP*X"[index // len(PALETTE) % 8]
            ax.scatter(*chosen.T, s=14, color=colour, marker=marker, linewidths=0, zorder=1 if name == rest else 2,
                       label=f"{_shorten(name)} ({len(chosen):,})", rasterized=True)  # fmt: skip
        ax.legend(title=label_name or None, frameon=False, markerscale=1.8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _label_axes(ax, *axes, title)


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 2]} …"


def neighbours_on_map(
    xy_P2: np.ndarray,
    chosen: int,
    nearest: Sequence[int],
    names: Sequence[str],
    axes: tuple[str, str] = ("component 1", "component 2"),
    ax: Axes | None = None,
) -> Axes:
    """Where a protein's neighbours, found in all dimensions, lie on a map of two.

    Args:
        xy_P2: the map.
        chosen: the protein, a star.
        nearest: its neighbours, the nearest first; numbered in that order.
        names: of the neighbours, for the legend.
        axes: what the two coordinates are.
    """
    ax = _get_axes(ax, 5.2 + 0.09 * min(MAX_NAME, max(map(len, names), default=0)), 4.6)
    ax.scatter(*xy_P2.T, s=10, color=MUTED, linewidths=0, rasterized=True)
    for rank, (place, name) in enumerate(zip(nearest, names, strict=True), 1):
        ax.plot(*xy_P2[[chosen, place]].T, color=SECONDARY, linewidth=0.8, alpha=0.7, zorder=2)
        ax.scatter(*xy_P2[place], s=110, color=PRIMARY, linewidths=0, zorder=3, label=f"{rank}  {_shorten(name)}")
        ax.annotate(str(rank), xy_P2[place], color="white", ha="center", va="center", fontsize=8, zorder=4)
    ax.scatter(*xy_P2[chosen], s=190, color=ACCENT, marker="*", edgecolors="black", linewidths=0.6, zorder=5)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1)
    return _label_axes(ax, *axes)


def scores_with_baselines(
    names: Sequence[str],
    values: Sequence[float],
    lows: Sequence[float],
    highs: Sequence[float],
    metric: str,
    highlighted: Sequence[str] = (),
    published: Mapping[str, float] | None = None,
    ax: Axes | None = None,
    on: str = " on test",
) -> Axes:
    """Scores with their 95% intervals, one line a model; undefined scores are named and left empty.

    Args:
        names: of the models, top to bottom.
        values: their scores.
        lows: lower ends of the intervals.
        highs: upper ends.
        metric: for the axis, with its unit.
        highlighted: names drawn in the first colour.
        published: name -> figure printed by others, drawn as a hollow mark in a line of its own.
        on: what was scored, behind the metric.
    """
    printed = dict(published or {})
    ax = _get_axes(ax, 6.4, 0.8 + 0.34 * (len(names) + len(printed)))
    for place, (name, value, low, high) in enumerate(zip(names, values, lows, highs, strict=True)):
        if value is None or not np.isfinite(value):
            ax.text(0.01, place, "undefined", transform=ax.get_yaxis_transform(), va="center", style="italic")
            continue
        colour = PRIMARY if name in highlighted else SECONDARY
        if low is not None and np.isfinite(low):
            ax.plot([low, high], [place, place], color=colour, linewidth=2)
        ax.plot(value, place, marker="o", color=colour)
    for place, value in enumerate(printed.values(), len(names)):
        ax.plot(value, place, marker="D", color=ACCENT, markerfacecolor="none")
    ax.set_yticks(range(len(names) + len(printed)), [*names, *printed])
    ax.set_ylim(len(names) + len(printed) - 0.5, -0.5)
    ax.grid(axis="x", alpha=0.3)
    return _label_axes(ax, f"{metric}{on} (bar: 95% interval)", "")


def heat_map(
    matrix_RC: np.ndarray,
    x_label: str,
    y_label: str,
    value_label: str,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    centre: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A matrix in colour; with a centre, a diverging scale around it (a mutation scan, say).

    Args:
        matrix_RC: the values.
        x_label: what the columns are.
        y_label: what the rows are.
        value_label: what the values are, with their unit.
        rows: a name each; without them the rows are numbered from 1.
        columns: a name each; without them the columns are numbered from 1.
        centre: of a diverging scale.
    """
    ax = _get_axes(ax, 8.0, 4.2)
    scale = {"cmap": "viridis"} if centre is None else {"cmap": "PuOr", "center": centre}
    sns.heatmap(
        matrix_RC, ax=ax, cbar_kws={"label": value_label}, rasterized=True,
        xticklabels=list(columns) or False, yticklabels=list(rows) or False, **scale,
    )  # fmt: skip
    for axis, names in ((ax.xaxis, columns), (ax.yaxis, rows)):
        if not names:
            _number_from_one(axis, matrix_RC.shape[0 if axis is ax.yaxis else 1])
    ax.tick_params(axis="y", rotation=0)
    if columns and max(map(len, columns)) == 1:  # letters stand upright, a chain's worth of them in small
        ax.tick_params(axis="x", rotation=0, labelsize=min(10, 420 / len(columns)))
    ax.set(xlabel=x_label, ylabel=y_label)
    return ax


def _number_from_one(axis: Axis, count: int) -> None:
    """Round numbers at the middles of seaborn's cells, which begin at 0."""
    places = MaxNLocator(8, integer=True).tick_values(1, count)
    numbers = [1, *(int(place) for place in places if 1 < place <= count)]
    axis.set_ticks([number - 0.5 for number in numbers], [str(number) for number in numbers])


def confusion_matrix(confusion_KK: np.ndarray, labels: Sequence[str], ax: Axes | None = None) -> Axes:
    """Shares of every true class, by predicted class; the counts stand in the cells while there is room."""
    longest = max(map(len, labels), default=0)  # its letters need room to the left and below
    size = max(3.4, 1.6 + 0.5 * len(labels)) + 0.085 * max(0, longest - 10)
    ax = _get_axes(ax, size + 1, size)
    counts = np.asarray(confusion_KK, dtype=float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    written = np.array([[f"{value:,.0f}" for value in row] for row in counts]) if len(labels) <= 10 else False
    sns.heatmap(
        shares, annot=written, fmt="", cmap="Blues", vmin=0, vmax=1, square=True, ax=ax, annot_kws={"size": 8},
        cbar_kws={"label": "share of the true class"}, xticklabels=list(labels), yticklabels=list(labels),
    )  # fmt: skip
    ax.tick_params(axis="y", rotation=0)
    ax.set(xlabel="predicted class", ylabel="true class")
    return ax


def predicted_vs_true(truth_P: np.ndarray, predicted_P: np.ndarray, unit: str = "", ax: Axes | None = None) -> Axes:
    """Predictions against measurements with the line of equality; a seeded sample beyond 20,000 points."""
    ax = _get_axes(ax, 4.4, 4.2)
    truth, predicted = np.asarray(truth_P), np.asarray(predicted_P)
    if len(truth) > MAX_POINTS:
        chosen = np.random.default_rng(0).choice(len(truth), MAX_POINTS, replace=False)
        truth, predicted = truth[chosen], predicted[chosen]
    size, alpha = (14, 0.8) if len(truth) < 500 else (7, 0.35)
    ax.scatter(truth, predicted, s=size, alpha=alpha, color=PRIMARY, linewidths=0, rasterized=True)
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    ax.plot(ends, ends, color=SECONDARY, linestyle="--", label="equality")
    ax.legend(frameon=False)
    named = f" ({unit})" if unit else ""
    return _label_axes(ax, f"measured{named}", f"predicted{named}")


def learning_curves(
    train_loss_ES: np.ndarray, validation_loss_ES: np.ndarray, kept_epochs: Sequence[int] = (), ax: Axes | None = None
) -> Axes:
    """A probe's losses over epochs: a thin line a seed, a mark where its weights were kept."""
    ax = _get_axes(ax)
    train, validation = (np.asarray(losses, dtype=float) for losses in (train_loss_ES, validation_loss_ES))
    epochs = np.arange(1, len(train) + 1)
    for values, colour, name in ((train, SECONDARY, "train"), (validation, VALIDATION, "validation")):
        for seed in range(values.shape[1]):
            ax.plot(epochs, values[:, seed], color=colour, linewidth=1, alpha=0.8, label=name if seed == 0 else None)
    for seed, epoch in enumerate(kept_epochs):
        ax.plot(epoch, validation[epoch - 1, seed], marker="o", markersize=4, color=VALIDATION)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if np.nanmin(train) > 0 and np.nanmax(train) / np.nanmin(train) > 30:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator())
    ax.legend(frameon=False)
    return _label_axes(ax, "epoch", "loss")


def pair_map(
    upper_TT: np.ndarray,
    lower_TT: np.ndarray,
    upper: str,
    lower: str,
    value_label: str,
    probability: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Two maps of a protein's residue pairs on one scale, a triangle each.

    Args:
        upper_TT: symmetric; drawn above the diagonal.
        lower_TT: symmetric; drawn below it.
        upper: what stands above.
        lower: what stands below.
        value_label: with the unit.
        probability: the scale goes from 0 to 1; else it diverges around 0 and ends at the upper map's 99.5th
            percentile, whatever lies beyond.
    """
    shown = np.triu(upper_TT, 1) + np.tril(lower_TT, -1)
    np.fill_diagonal(shown, np.nan)
    scale = {"cmap": "Blues", "vmin": 0, "vmax": 1}
    if not probability:
        end = float(np.quantile(np.abs(upper_TT[np.triu_indices_from(shown, 1)]), 0.995)) or 1.0
        scale = {"cmap": "PuOr", "vmin": -end, "vmax": end}
    title = f"above the diagonal: {upper}\nbelow: {lower}"
    ax = _get_axes(ax, 5.2, 4.6)
    ends = (0.5, len(shown) + 0.5)
    drawn = ax.imshow(shown, interpolation="nearest", extent=(*ends, *ends[::-1]), **scale)
    ax.figure.colorbar(drawn, ax=ax, label=value_label)
    ax.set_title(title, fontsize=10)
    ax.set(xlabel="residue", ylabel="residue")
    return ax


def by_separation(
    curves: Mapping[str, np.ndarray], value_label: str, guide: float | None = None, ax: Axes | None = None
) -> Axes:
    """Means over the residue pairs of one protein, by how far apart they are along the chain.

    Args:
        curves: name -> (T,) means of the pairs 0, 1, 2 ... apart; bins widen with the distance.
        value_label: what is averaged, with its unit.
        guide: a level to draw as a line.
    """
    ax = _get_axes(ax, 6.0, 3.6)
    for colour, style, (name, means_T) in zip(
        (PRIMARY, SECONDARY, ACCENT), ("-", "--", ":"), curves.items(), strict=False
    ):
        edges = np.unique(np.rint(np.geomspace(1, len(means_T), 18)).astype(int))
        pairs_T = len(means_T) - np.arange(len(means_T))  # fewer pairs are far apart
        middles, values = [], []
        for start, stop in pairwise(edges):
            middles.append(np.sqrt(start * (stop - 1)))
            values.append(np.average(means_T[start:stop], weights=pairs_T[start:stop]))
        ax.plot(middles, values, color=colour, linestyle=style, marker="o", markersize=3, label=name)
    if guide is not None:
        ax.axhline(guide, color=MUTED, linewidth=1, zorder=0)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend(frameon=False)
    ax.set(xlabel="residues apart along the chain", ylabel=value_label)
    sns.despine(ax=ax)
    return ax
