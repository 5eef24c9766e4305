"""Plot figures from arrays. All functions return the Axes; the colours are suitable for colour-blind readers."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from esm2kit.core.numbers import format_decimals

PALETTE = sns.color_palette("colorblind")
PRIMARY, SECONDARY, ACCENT = PALETTE[0], PALETTE[7], PALETTE[1]
VALIDATION = PALETTE[1]  # the colour of validation in all training figures
MUTED = "#c8c8c8"
INK = "black"  # of the page's text, also on a dark page
# Colours of matrices: shares from pale to blue, and differences from orange over pale to blue.
SHARES = LinearSegmentedColormap.from_list("shares", ["#eef4f9", PRIMARY, "#00395c"])
DIFFERENCES = LinearSegmentedColormap.from_list("differences", ["#8a4b00", ACCENT, "#f4f4f4", PRIMARY, "#00395c"])
MAX_CELL_TEXTS = 10  # classes of a confusion matrix whose cells have texts
WIDTH = 8.6  # of a figure in inches, about the text of a report
MAX_POINTS = 20_000
MAX_VECTOR_POINTS = 2_000  # more points are pixels, so that pages stay small
MAX_BINS = 40
MAX_NAME = 36  # characters of a name in a legend


_min_width = 0.0  # of new figures, in inches


def widen_figures(inches: float) -> None:
    """Make new figures at least as wide as the text of a page, for the notebooks; square ones keep their shape.

    Args:
        inches: the least width of a figure.
    """
    global _min_width
    _min_width = inches


def _get_axes(ax: Axes | None, width: float = WIDTH, height: float = 3.6, square: bool = False) -> Axes:
    if ax is not None:
        return ax
    width = width if square else max(width, _min_width)
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _label_axes(ax: Axes, x_label: str, y_label: str, title: str = "") -> Axes:
    ax.set(xlabel=x_label, ylabel=y_label, title=title)
    sns.despine(ax=ax)
    return ax


def length_histogram(num_residues_P: np.ndarray, max_residues: int | None = None, ax: Axes | None = None) -> Axes:
    """Plot a histogram of sequence lengths.

    Args:
        num_residues_P: (P,) number of residues per protein.
        max_residues: length of a model's window; plotted as a line. None omits it.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    ax = _get_axes(ax)
    counts = np.asarray(num_residues_P)
    # bins have an equal, integer width, because a fractional width would cause artificial gaps and peaks
    width = max(1, -(-int(counts.max() - counts.min() + 1) // MAX_BINS))
    edges = np.arange(counts.min(), counts.max() + width + 1, width)
    ax.hist(counts, bins=edges, color=PRIMARY, edgecolor="white", linewidth=0.4)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.0f}"))
    if max_residues is not None:
        ax.axvline(max_residues, color=ACCENT, linestyle="--", label=f"window of a model: {max_residues:,} residues")
        ax.legend(frameon=False)
    return _label_axes(ax, "residues per protein", "proteins")


def cluster_size_histogram(num_members_C: np.ndarray, ax: Axes | None = None) -> Axes:
    """Plot a histogram of cluster sizes (C,), with bins of doubling width and a logarithmic axis of counts."""
    ax = _get_axes(ax)
    edges = [0, 1]
    while edges[-1] < np.max(num_members_C):
        edges.append(2 * edges[-1])
    names = [f"{low + 1:,}" if high - low == 1 else f"{low + 1:,} to {high:,}" for low, high in pairwise(edges)]
    # at numbers, not names, which would change the order of the bars
    ax.bar(range(len(names)), np.histogram(num_members_C, np.array(edges) + 0.5)[0], width=0.9, color=PRIMARY)
    ax.set_xticks(range(len(names)), names, rotation=30 if len(names) > 7 else 0)
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.7)  # so that a bar of one cluster is visible
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
    """Plot the masked-LM loss over training steps, with baselines that do not use the context.

    Args:
        curves: name -> (steps, losses in nats per masked residue).
        unigram_baseline: loss of a guess by residue frequencies on the same split. None omits it.
        uniform: loss of a uniform guess among 20 residues. None omits it.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
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
    references: Mapping[str, float] | None = None,
) -> Axes:
    """Plot the validation perplexity over training steps; a uniform guess has 20.

    Args:
        curves: name -> (steps, perplexities).
        unigram_baseline: perplexity of a guess by residue frequencies on the same split. None omits it.
        ax: axes to plot into. None creates a figure.
        references: name -> perplexity to mark with a labelled line; the axis then shows all of them.

    Returns:
        The axes.
    """
    ax = _get_axes(ax)
    for colour, (name, (steps, values)) in zip([VALIDATION, *PALETTE[2:]], curves.items(), strict=False):
        ax.plot(steps, values, color=colour, label=name, marker="o" if len(steps) < 20 else None, markersize=3)
    _guide_lines(ax, {"uniform guess": None, "unigram guess": None if references else unigram_baseline})
    lines = dict(references or {})
    if references and unigram_baseline is not None:
        lines["unigram guess"] = unigram_baseline
    for name, height in lines.items():
        ax.axhline(height, color=SECONDARY, linestyle="--", linewidth=1)
        ax.annotate(f"{name} {height:.4g}", (1, height), xytext=(-2, 3), xycoords=ax.get_yaxis_transform(),
                    textcoords="offset points", ha="right", color=SECONDARY)  # fmt: skip
    return _label_axes(ax, "update", "perplexity")


def _guide_lines(ax: Axes, lines: Mapping[str, float | None]) -> None:
    for style, (name, height) in zip((":", "--"), lines.items(), strict=False):
        if height is not None:
            ax.axhline(height, color=SECONDARY, linestyle=style, label=f"{name} {format_decimals(height, 2)}")
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
    """Plot a two-dimensional map of embeddings, coloured by a label (with a legend) or a number (with a colour bar).

    Args:
        xy_P2: (P, 2) coordinates from PCA, UMAP or t-SNE.
        labels_P: (P,) a string or a number per protein.
        title: of the figure.
        label_name: name of the label, with its unit.
        ax: axes to plot into. None creates a figure.
        axes: labels of the two axes.
        rest: label of the merged group, plotted in grey below the others.

    Returns:
        The axes.
    """
    labels = np.asarray(labels_P)
    numbers = np.issubdtype(labels.dtype, np.number)
    longest = 0 if numbers else min(MAX_NAME, max(map(len, labels.tolist())))
    ax = _get_axes(ax, 4.9 + 0.09 * longest, 4.6)  # a long name widens the figure instead of narrowing the map
    points = {
        "s": _point_size(len(labels)),
        "alpha": 0.75,
        "linewidths": 0,
        "rasterized": len(labels) > MAX_VECTOR_POINTS,
    }
    if numbers:
        known = np.isfinite(labels.astype(float))
        if not known.all():
            ax.scatter(*xy_P2[~known].T, color=MUTED, label=f"not given ({(~known).sum():,})", zorder=1, **points)
            ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12))
        shown = ax.scatter(*xy_P2[known].T, c=labels[known], cmap="viridis", zorder=2, **points)
        bar = ax.figure.colorbar(shown, ax=ax, label=label_name)
        bar.solids.set_alpha(1)
    else:
        names = sorted(set(labels.tolist()) - {rest})
        colours = [PALETTE[index % len(PALETTE)] for index in range(len(names))]
        if rest in labels:
            names, colours = [*names, rest], [*colours, MUTED]
        for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
            chosen = xy_P2[labels == name]
            marker = "osD^vP*X"[index // len(PALETTE) % 8]
            ax.scatter(*chosen.T, color=colour, marker=marker, zorder=1 if name == rest else 2,
                       label=f"{_shorten(name)} ({len(chosen):,})", **points)  # fmt: skip
        legend = ax.legend(title=label_name or None, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        for handle in legend.legend_handles:
            handle.set(sizes=[50], alpha=1)
    return _label_axes(ax, *axes, title)


def _point_size(num_points: int) -> float:
    """Area of a point in square points: large for few points, small for many."""
    return float(np.clip(16_000 / max(num_points, 1), 6, 46))


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
    """Plot the nearest neighbours of a protein, as found in all dimensions, on a two-dimensional map.

    Args:
        xy_P2: (P, 2) coordinates of the map.
        chosen: index of the protein, plotted as a star.
        nearest: indices of its neighbours, nearest first, numbered in this order.
        names: of the neighbours, for the legend.
        axes: labels of the two axes.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    ax = _get_axes(ax, 5.2 + 0.09 * min(MAX_NAME, max(map(len, names), default=0)), 4.6)
    ax.scatter(*xy_P2.T, s=_point_size(len(xy_P2)), color=MUTED, alpha=0.75, linewidths=0,
               rasterized=len(xy_P2) > MAX_VECTOR_POINTS)  # fmt: skip
    for rank, (place, name) in enumerate(zip(nearest, names, strict=True), 1):
        ax.plot(*xy_P2[[chosen, place]].T, color=SECONDARY, linewidth=0.8, alpha=0.7, zorder=2)
        ax.scatter(*xy_P2[place], s=60, color=PRIMARY, edgecolors="white", linewidths=0.8, zorder=3,
                   label=f"{rank}  {_shorten(name)}")  # fmt: skip
    ax.scatter(*xy_P2[chosen], s=230, color=ACCENT, marker="*", edgecolors="black", linewidths=0.6, zorder=5)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1)
    _label_axes(ax, *axes)
    place_labels(ax, xy_P2[list(nearest)], [str(rank) for rank in range(1, len(nearest) + 1)], xy_P2[[chosen]])
    return ax


def place_labels(ax: Axes, xy_N2: np.ndarray, texts: Sequence[str], others_N2: np.ndarray | None = None) -> None:
    """Write labels next to points so that they overlap neither each other nor the points.

    Each label takes the nearest free place of several around its point; a thin line connects it if it is far away.

    Args:
        ax: axes with the points; its size and limits must be final.
        xy_N2: (N, 2) points to label.
        texts: N labels.
        others_N2: (M, 2) further points to leave free.
    """
    ax.figure.canvas.draw()  # computes the layout, on which the places depend
    points_N2 = ax.transData.transform(xy_N2)
    pixels = ax.figure.dpi / 72
    blocked = list(points_N2) + ([] if others_N2 is None else list(ax.transData.transform(others_N2)))
    for point, xy, text in zip(points_N2, xy_N2, texts, strict=True):
        angles = np.linspace(0, 2 * np.pi, 12, endpoint=False) + np.pi / 4
        places = [point + radius * pixels * np.array([np.cos(angle), np.sin(angle)])
                  for radius in (13, 24, 36, 50) for angle in angles]  # fmt: skip
        gap = (9 + 3 * len(text)) * pixels
        free = [place for place in places if all(np.hypot(*(place - other)) >= gap for other in blocked)]
        best = (free or places)[0]
        blocked.append(best)
        shift = (best - point) / pixels
        line = {"arrowstyle": "-", "color": SECONDARY, "linewidth": 0.6, "shrinkB": 4} if len(free) else None
        ax.annotate(text, xy, xytext=shift, textcoords="offset points", ha="center", va="center", fontsize=9,
                    fontweight="bold", zorder=6, arrowprops=line if np.hypot(*shift) > 20 else None)  # fmt: skip


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
    """Plot scores with their 95% intervals, one row per model; an undefined score is marked as undefined.

    Args:
        names: of the models, from top to bottom.
        values: scores of the models.
        lows: lower ends of the intervals.
        highs: upper ends of the intervals.
        metric: label of the axis, with its unit.
        highlighted: names that are plotted in the first colour.
        published: name -> published score, plotted as a hollow mark in a separate row.
        ax: axes to plot into. None creates a figure.
        on: data that were scored, appended to the metric.

    Returns:
        The axes.
    """
    printed = dict(published or {})
    ax = _get_axes(ax, WIDTH, 0.8 + 0.34 * (len(names) + len(printed)))
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


def layer_curves(
    curves: Mapping[str, np.ndarray],
    metric: str,
    chosen: tuple[str, int],
    test: Sequence[float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot validation scores over the layers with their 95% intervals, one line per pooling, and the chosen one.

    Args:
        curves: name of the pooling -> (L, 4) number of the layer, score, and lower and upper end of its interval.
        metric: label of the axis, with its unit.
        chosen: pooling and layer that were chosen.
        test: test score of the chosen one and the ends of its interval. None omits it.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes. Points of one layer are side by side, so that their intervals can be read.
    """
    ax = _get_axes(ax, min(WIDTH, 5.2 + 0.1 * max(map(len, curves.values()))), 3.8)
    shift = 0.5 / max(len(curves), 4)
    best = 0.0
    for place, (name, points_L4) in enumerate(curves.items()):
        points_L4 = points_L4[np.argsort(points_L4[:, 0])]
        layers, values, lows, highs = points_L4.T
        x = layers + (place - (len(curves) - 1) / 2) * shift
        colour = PALETTE[place % len(PALETTE)]
        ax.plot(x, values, color=colour, marker="osv^P"[place % 5], markersize=5, linewidth=1, label=name)
        ax.vlines(x, lows, highs, color=colour, linewidth=1.4, alpha=0.7)
        if name == chosen[0]:
            where = list(layers).index(chosen[1])
            best = float(x[where])
            ax.plot(best, values[where], marker="o", markersize=13, markerfacecolor="none", markeredgecolor=INK,
                    linestyle="", label="chosen")  # fmt: skip
    if test is not None:
        value, low, high = test
        layers = np.concatenate([points_L4[:, 0] for points_L4 in curves.values()])
        x = best + 0.025 * max(1.0, np.ptp(layers))  # to the right of the circle
        ax.plot(x, value, marker="D", color=INK, markersize=5, linestyle="", label="test score of the chosen one")
        ax.vlines(x, low, high, color=INK, linewidth=1.4)
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=9)
    return _label_axes(ax, "layer (0: token embedding)", f"{metric} on validation")


def fold_scores(
    scores_RK: np.ndarray,
    names: Sequence[str],
    overall: tuple[float, float, float],
    metric: str,
    ax: Axes | None = None,
) -> Axes:
    """Plot the score of each fold, with that of all folds together: one column per repeat, or per fold of a single one.

    Args:
        scores_RK: (R, K) score of each fold in each repeat; nan is undefined and not plotted.
        names: of the folds.
        overall: score of all folds, with the lower and the upper end of its interval, nan if there is none.
        metric: label of the axis, with its unit.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    ax = _get_axes(ax, WIDTH, 3.0)
    value, low, high = overall
    if np.isfinite(low):
        ax.axhspan(low, high, color=PRIMARY, alpha=0.15, linewidth=0, label="95% interval of all folds")
    if np.isfinite(value):
        ax.axhline(value, color=PRIMARY, label="all folds")
    repeated = len(scores_RK) > 1
    columns = scores_RK if repeated else scores_RK.T
    names = [str(number + 1) for number in range(len(scores_RK))] if repeated else names
    for place, column in enumerate(columns):
        shifts = np.linspace(-0.3, 0.3, len(column)) if len(column) > 1 else np.zeros(1)
        ax.plot(place + shifts, column, "o", color=SECONDARY, label=None if place else "one fold")
    shown = range(0, len(names), -(-len(names) // 20))
    ax.set_xticks(shown, [names[place] for place in shown])
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.grid(axis="y", alpha=0.3)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return _label_axes(ax, "repeat" if repeated else "fold", metric)


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
    """Plot a matrix in colour.

    Args:
        matrix_RC: (R, C) values.
        x_label: label of the columns.
        y_label: label of the rows.
        value_label: label of the values, with their unit.
        rows: names of the rows. Without them the rows are numbered from 1.
        columns: names of the columns. Without them the columns are numbered from 1.
        centre: centre of a diverging colour scale, such as 0 for a mutation scan. None uses a sequential scale.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    ax = _get_axes(ax, 8.0, 4.2)
    scale = {"cmap": SHARES} if centre is None else {"cmap": DIFFERENCES, "center": centre}
    sns.heatmap(
        matrix_RC, ax=ax, cbar_kws={"label": value_label}, rasterized=True,
        xticklabels=list(columns) or False, yticklabels=list(rows) or False, **scale,
    )  # fmt: skip
    for axis, names in ((ax.xaxis, columns), (ax.yaxis, rows)):
        if not names:
            _number_from_one(axis, matrix_RC.shape[0 if axis is ax.yaxis else 1])
    ax.tick_params(axis="y", rotation=0)
    if columns and max(map(len, columns)) == 1:  # single letters are upright, and small if there are many
        ax.tick_params(axis="x", rotation=0, labelsize=min(10, 420 / len(columns)))
    ax.set(xlabel=x_label, ylabel=y_label)
    return ax


def _number_from_one(axis: Axis, count: int) -> None:
    """Place round numbers at the centres of seaborn's cells, which start at 0."""
    places = MaxNLocator(8, integer=True).tick_values(1, count)
    numbers = [1, *(int(place) for place in places if 1 < place <= count)]
    axis.set_ticks([number - 0.5 for number in numbers], [str(number) for number in numbers])


def confusion_matrix(confusion_KK: np.ndarray, labels: Sequence[str], ax: Axes | None = None) -> Axes:
    """Plot a confusion matrix as shares of the true class; the cells of up to 10 classes have percent and count.

    Args:
        confusion_KK: (K, K) counts, rows are true classes.
        labels: K names of the classes.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    written = len(labels) <= MAX_CELL_TEXTS
    longest = max(map(len, labels), default=0)  # needs space on the left and below
    size = max(3.4, 1.4 + (0.72 if written else 0.4) * len(labels)) + 0.085 * max(0, longest - 10)
    ax = _get_axes(ax, size + (0 if written else 1), size, square=True)
    counts = np.asarray(confusion_KK, dtype=float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    texts = [
        [f"{share:.0%}\n{count:,.0f}" for share, count in zip(*rows, strict=True)]
        for rows in zip(shares, counts, strict=True)
    ]
    sns.heatmap(
        shares, annot=np.array(texts) if written else False, fmt="", cmap=SHARES, vmin=0, vmax=1, square=True, ax=ax,
        annot_kws={"size": 10}, cbar=not written, cbar_kws={"label": "share of the true class"},
        xticklabels=list(labels), yticklabels=list(labels),
    )  # fmt: skip
    ax.tick_params(axis="y", rotation=0)
    ax.set(xlabel="predicted class", ylabel="true class")
    return ax


def confused_pairs(pairs: Sequence[tuple[str, str, int]], most: int = 20, ax: Axes | None = None) -> Axes:
    """Plot the most frequent confusions of a task with too many classes for a matrix, one bar per pair of classes.

    Args:
        pairs: (true class, predicted class, number of targets), the most frequent first.
        most: maximum number of bars.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    shown = pairs[:most]
    ax = _get_axes(ax, WIDTH, 0.9 + 0.26 * len(shown))
    ax.barh(range(len(shown)), [count for _, _, count in shown], color=PRIMARY)
    ax.set_yticks(range(len(shown)), [f"{_shorten(true)} → {_shorten(predicted)}" for true, predicted, _ in shown])
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return _label_axes(ax, "test targets", "true → predicted")


def predicted_vs_true(truth_P: np.ndarray, predicted_P: np.ndarray, unit: str = "", ax: Axes | None = None) -> Axes:
    """Plot predictions (P,) against measurements (P,), with the line of equality; at most 20,000 sampled points."""
    ax = _get_axes(ax, 4.4, 4.2, square=True)
    truth, predicted = np.asarray(truth_P), np.asarray(predicted_P)
    if len(truth) > MAX_POINTS:
        chosen = np.random.default_rng(0).choice(len(truth), MAX_POINTS, replace=False)
        truth, predicted = truth[chosen], predicted[chosen]
    size, alpha = (14, 0.8) if len(truth) < 500 else (7, 0.35)
    ax.scatter(truth, predicted, s=size, alpha=alpha, color=PRIMARY, linewidths=0,
               rasterized=len(truth) > MAX_VECTOR_POINTS)  # fmt: skip
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    ax.plot(ends, ends, color=SECONDARY, linestyle="--", label="equality")
    ax.legend(frameon=False)
    named = f" ({unit})" if unit else ""
    return _label_axes(ax, f"measured{named}", f"predicted{named}")


def learning_curves(
    train_loss_ES: np.ndarray, validation_loss_ES: np.ndarray, kept_epochs: Sequence[int] = (), ax: Axes | None = None
) -> Axes:
    """Plot a probe's losses (epochs, seeds), one line per seed, with marks at the epochs whose weights are used."""
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
    """Plot two maps of a protein's residue pairs in one matrix, with a common scale.

    Args:
        upper_TT: (T, T) symmetric map, plotted above the diagonal.
        lower_TT: (T, T) symmetric map, plotted below the diagonal.
        upper: name of the upper map.
        lower: name of the lower map.
        value_label: label of the values, with their unit.
        probability: scale from 0 to 1. Otherwise the scale diverges around 0 and ends at the 99.5th percentile of the
            upper map.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    shown = np.triu(upper_TT, 1) + np.tril(lower_TT, -1)
    np.fill_diagonal(shown, np.nan)
    scale = {"cmap": SHARES, "vmin": 0, "vmax": 1}
    if not probability:
        end = float(np.quantile(np.abs(upper_TT[np.triu_indices_from(shown, 1)]), 0.995)) or 1.0
        scale = {"cmap": DIFFERENCES, "vmin": -end, "vmax": end}
    title = f"above the diagonal: {upper}\nbelow: {lower}"
    ax = _get_axes(ax, 5.2, 4.6, square=True)
    ends = (0.5, len(shown) + 0.5)
    image = ax.imshow(shown, interpolation="nearest", extent=(*ends, *ends[::-1]), **scale)
    ax.figure.colorbar(image, ax=ax, label=value_label)
    ax.set_title(title, fontsize=10)
    ax.set(xlabel="residue", ylabel="residue")
    return ax


def contact_map(
    values_TT: np.ndarray,
    contacts_TT: np.ndarray | None = None,
    value_label: str = "contact probability",
    probability: bool = True,
    boundaries: Sequence[int] = (),
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Plot predicted contacts, with the contacts of a structure below the diagonal.

    Args:
        values_TT: (T, T) predictions, plotted above the diagonal, and below it if there is no structure.
        contacts_TT: (T, T) 1 for a contact, 0 for none, NaN for residues that were not observed.
        value_label: label of the predictions.
        probability: scale from 0 to 1. Otherwise the scale diverges around 0 and ends at the 99.9th percentile.
        boundaries: number of residues before each further chain, where a line is drawn.
        title: of the figure.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    size = len(values_TT)
    side = 5.4 + max(0, size - 300) / 180  # so that single contacts of a long protein can be seen
    ax = _get_axes(ax, side + 1, side, square=True)
    extent = (0.5, size + 0.5, size + 0.5, 0.5)
    below = np.tril(np.ones((size, size), dtype=bool))
    shown = np.ma.array(values_TT, mask=below if contacts_TT is not None else np.eye(size, dtype=bool))
    scale = {"cmap": SHARES, "vmin": 0, "vmax": 1}
    if not probability:
        end = (float(np.quantile(np.abs(values_TT[~below]), 0.999)) if size > 1 else 0) or 1.0
        scale = {"cmap": DIFFERENCES, "vmin": -end, "vmax": end}
    image = ax.imshow(shown, interpolation="nearest", extent=extent, **scale)
    ax.figure.colorbar(image, ax=ax, label=value_label, shrink=0.8)
    if contacts_TT is not None:
        missing = np.isnan(contacts_TT)
        kinds = np.where(missing, 2, np.where(missing, 0, contacts_TT)).astype(int)
        colours = ["#ffffff", ACCENT, MUTED]
        ax.imshow(np.ma.array(kinds, mask=~below | np.eye(size, dtype=bool)), interpolation="nearest", extent=extent,
                  cmap=ListedColormap(colours), vmin=0, vmax=2)  # fmt: skip
        ax.plot([0.5, size + 0.5], [0.5, size + 0.5], color=SECONDARY, linewidth=0.6)
        names = ["contact in the structure (below the diagonal)", "not observed in the structure"]
        for colour, name in list(zip(colours[1:], names, strict=True))[: 1 + bool(missing.any())]:
            ax.plot([], [], marker="s", linestyle="", color=colour, label=name)
        ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9)
    for place in boundaries:
        ax.axhline(place + 0.5, color="black", linewidth=0.8)
        ax.axvline(place + 0.5, color="black", linewidth=0.8)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    label = "residue, chains in order" if len(boundaries) else "residue"
    ax.set(xlim=extent[:2], ylim=extent[2:], xlabel=label, ylabel=label)
    ax.set_title(title, fontsize=10)
    return ax


def by_separation(
    curves: Mapping[str, np.ndarray], value_label: str, guide: float | None = None, ax: Axes | None = None
) -> Axes:
    """Plot means over the residue pairs of a protein by sequence separation, in bins that widen with the separation.

    Args:
        curves: name -> (T,) means over the pairs with separation 0, 1, 2, ...
        value_label: label of the values, with their unit.
        guide: value to mark with a horizontal line. None omits it.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    ax = _get_axes(ax, WIDTH, 3.6)
    for colour, style, (name, means_T) in zip(
        (PRIMARY, SECONDARY, ACCENT), ("-", "--", ":"), curves.items(), strict=False
    ):
        edges = np.unique(np.rint(np.geomspace(1, len(means_T), 18)).astype(int))
        pairs_T = len(means_T) - np.arange(len(means_T))  # number of pairs per separation
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


def prediction_histogram(
    predicted_P: np.ndarray, labels: Mapping[str, object] | None = None, unit: str = "", ax: Axes | None = None
) -> Axes:
    """Plot a histogram of predicted values, with the training labels that the model learned from.

    Args:
        predicted_P: (P,) predictions.
        labels: "mean", "deviation" and "quantiles" (from the minimum to the maximum) of the training labels, drawn as a
            band of one standard deviation around the mean, and a line for the range. None omits them.
        unit: of the values.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    ax = _get_axes(ax)
    predicted = np.asarray(predicted_P, dtype=float)
    labels = labels or {}
    ends = [predicted.min(), predicted.max()]
    if quantiles := labels.get("quantiles"):
        ends = [min(ends[0], quantiles[0]), max(ends[1], quantiles[-1])]
    if ends[0] == ends[1]:
        ends = [ends[0] - 0.5, ends[1] + 0.5]
    ax.hist(predicted, bins=np.linspace(*ends, MAX_BINS // 2 + 1), color=PRIMARY, edgecolor="white", linewidth=0.4,
            label="predictions")  # fmt: skip
    if labels.get("deviation"):
        mean, spread = labels["mean"], labels["deviation"]
        ax.axvspan(mean - spread, mean + spread, color=MUTED, alpha=0.45, zorder=0, linewidth=0,
                   label="training labels: mean ± standard deviation")  # fmt: skip
        ax.axvline(mean, color=SECONDARY, linestyle="--", linewidth=1)
    if quantiles:
        ax.plot([quantiles[0], quantiles[-1]], [0, 0], color=ACCENT, linewidth=4, solid_capstyle="butt", clip_on=False,
                label="training labels: range")  # fmt: skip
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)
    return _label_axes(ax, f"predicted value{f' ({unit})' if unit else ''}", "proteins")


def label_scores(f1: Mapping[str, float], support: Mapping[str, float], most: int = 20, ax: Axes | None = None) -> Axes:
    """Plot the F1 of each label of a multi-label task, one bar per label, the most frequent first.

    Args:
        f1: label -> F1.
        support: label -> number of test proteins with it.
        most: maximum number of bars.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    shown = sorted(f1, key=lambda label: -support[label])[:most]
    ax = _get_axes(ax, 6.4, 0.9 + 0.3 * len(shown))
    bars = ax.barh(range(len(shown)), [f1[label] for label in shown], color=PRIMARY)
    ax.bar_label(bars, [f"{f1[label]:.2f}, {support[label]:,.0f} proteins" for label in shown], padding=3, fontsize=8)
    ax.set_yticks(range(len(shown)), [_shorten(label) for label in shown])
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.set_xlim(0, 1.35)
    ax.set_xticks(np.linspace(0, 1, 6))
    return _label_axes(ax, "F1", "label")


def prediction_histograms(
    predicted: Mapping[str, np.ndarray], labels: Mapping[str, Mapping[str, object]], most: int = 6
) -> Axes:
    """Plot one histogram of predicted values per target, below each other.

    Args:
        predicted: target -> predictions.
        labels: target -> training labels, as for `prediction_histogram`.
        most: maximum number of histograms, of the first targets.

    Returns:
        The axes of the first.
    """
    shown = list(predicted.items())[:most]
    axes = plt.subplots(len(shown), 1, figsize=(6.4, 2.9 * len(shown)), squeeze=False, layout="constrained")[1]
    for place, (ax, (name, values)) in enumerate(zip(axes[:, 0], shown, strict=True)):
        prediction_histogram(values, labels.get(name), ax=ax)
        ax.set_xlabel(f"predicted {name}")
        if place:
            ax.get_legend().remove()
    return axes[0, 0]


def class_counts(
    counts: Mapping[str, int],
    most: int = 20,
    ax: Axes | None = None,
    what: str = "proteins",
    class_name: str = "class",
) -> Axes:
    """Plot how often each class was predicted, one bar per class, the most frequent first.

    Args:
        counts: class -> number of predictions. Classes that were never predicted may be included.
        most: maximum number of bars; the rest is one bar.
        ax: axes to plot into. None creates a figure.
        what: what was counted.
        class_name: what a bar is.

    Returns:
        The axes.
    """
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    if len(ordered) > most:
        rest = ordered[most - 1 :]
        ordered = [*ordered[: most - 1], (f"{len(rest)} other classes", sum(count for _, count in rest))]
    ax = _get_axes(ax, 6.4, 0.9 + 0.3 * len(ordered))
    bars = ax.barh(range(len(ordered)), [count for _, count in ordered], color=PRIMARY)
    ax.bar_label(bars, [f"{count:,}" for _, count in ordered], padding=3, fontsize=8)
    ax.set_yticks(range(len(ordered)), [_shorten(name) for name, _ in ordered])
    ax.set_ylim(len(ordered) - 0.5, -0.5)
    ax.margins(x=0.12)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return _label_axes(ax, f"predicted {what}", class_name)


def residue_track(
    tracks: Mapping[str, np.ndarray], classes: Sequence[str] = (), unit: str = "", ax: Axes | None = None
) -> Axes:
    """Plot predictions along the sequence, one row per protein for classes, one line per protein for values.

    Args:
        tracks: name of a protein -> (residues,) classes (int) or values.
        classes: names of the classes in order; empty for values.
        unit: of the values.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    longest = max(map(len, tracks.values()))
    if not classes:
        ax = _get_axes(ax, 8.0, 3.4)
        for colour, (name, values) in zip(PALETTE, tracks.items(), strict=False):
            ax.plot(np.arange(1, len(values) + 1), values, color=colour, linewidth=1, label=_shorten(name))
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return _label_axes(ax, "residue", f"predicted value{f' ({unit})' if unit else ''}")
    ax = _get_axes(ax, 8.0, 1.2 + 0.36 * len(tracks))
    present = sorted({int(label) for values in tracks.values() for label in values})
    colours = sns.color_palette("colorblind" if len(present) <= 10 else "husl", len(present))
    image = np.zeros((len(tracks), longest, 4))  # transparent after the last residue
    for row, values in enumerate(tracks.values()):
        image[row, : len(values)] = [(*colours[present.index(int(label))], 1) for label in values]
    ends = (0.5, longest + 0.5, len(tracks) - 0.5, -0.5)
    ax.imshow(image, aspect="auto", interpolation="nearest", extent=ends, rasterized=True)
    ax.set_yticks(range(len(tracks)), [_shorten(name) for name in tracks])
    ax.hlines(np.arange(len(tracks) - 1) + 0.5, *ends[:2], color="white", linewidth=4)
    for place, colour in zip(present, colours, strict=True):
        ax.plot([], [], marker="s", linestyle="", color=colour, label=_shorten(classes[place]))
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="predicted class")
    return _label_axes(ax, "residue", "protein")


def reliability_diagram(
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    what: str = "proteins",
    happens: str = "share that is right",
    ax: Axes | None = None,
) -> Axes:
    """Plot how often predictions are right against how sure the model is, with the share of the targets per bin.

    Args:
        curves: name -> (mean probability, share that is right, share of the targets) per bin that is not empty; one
            or two curves. The area of a mark grows with the share. The last curve has the first colour and the bars
            above.
        what: the targets, in plural.
        happens: label of the share.
        ax: axes to plot into, without the bars. None creates a figure with both.

    Returns:
        The axes of the diagram.
    """
    above = None
    if ax is None:
        ratios = {"height_ratios": [1, 3.4], "layout": "constrained"}
        _, (above, ax) = plt.subplots(2, 1, figsize=(4.6, 5.2), sharex=True, **ratios)
    ax.plot([0, 1], [0, 1], color=SECONDARY, linestyle="--", linewidth=1, label="perfect calibration")
    colours = [ACCENT, PRIMARY][-len(curves) :]
    for colour, marker, (name, bins) in zip(colours, "os"[-len(curves) :], curves.items(), strict=True):
        confidence, accuracy, share = map(np.array, zip(*bins, strict=True))
        ax.plot(confidence, accuracy, color=colour, linewidth=0.8, alpha=0.6)
        ax.scatter(confidence, accuracy, s=8 + 160 * share / share.max(), color=colour, marker=marker, alpha=0.85,
                   linewidths=0, clip_on=False, zorder=3)  # fmt: skip
        ax.plot([], [], color=colour, linewidth=0.8, marker=marker, markersize=6, label=name)
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02))
    ax.legend(frameon=False, loc="upper left", fontsize=9)
    if above is not None:
        confidence, _, share = zip(*list(curves.values())[-1], strict=True)
        above.bar(confidence, share, width=0.045, color=PRIMARY)
        above.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:.0%}"))
        above.yaxis.set_major_locator(MaxNLocator(3))
        above.set_ylabel(f"share of\n{what}")
        sns.despine(ax=above)
    return _label_axes(ax, "probability that the model gives", happens)


def predicted_with_intervals(
    truth_P: np.ndarray,
    predicted_P: np.ndarray,
    half_P: np.ndarray,
    unit: str = "",
    most: int = 150,
    ax: Axes | None = None,
) -> Axes:
    """Plot predictions with their intervals against measurements; an interval is right if it crosses the line.

    Args:
        truth_P: (P,) measured values.
        predicted_P: (P,) predictions.
        half_P: (P,) half widths of the intervals, finite.
        unit: of the values.
        most: maximum number of sampled points.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    ax = _get_axes(ax, 4.8, 4.6, square=True)
    truth, predicted, half = (np.asarray(values, dtype=float) for values in (truth_P, predicted_P, half_P))
    inside = np.abs(truth - predicted) <= half
    if len(truth) > most:
        chosen = np.sort(np.random.default_rng(0).choice(len(truth), most, replace=False))
        truth, predicted, half, inside = truth[chosen], predicted[chosen], half[chosen], inside[chosen]
    kinds = ((inside, PRIMARY, "interval contains the measured value"), (~inside, ACCENT, "interval does not"))
    for where, colour, name in kinds:
        if where.any():
            bars = ax.errorbar(truth[where], predicted[where], half[where], fmt="o", color=colour, markersize=3,
                               elinewidth=0.9, alpha=0.75, label=f"{name} ({where.sum():,})")  # fmt: skip
            bars.lines[0].set_zorder(3)
    ends = [min(truth.min(), (predicted - half).min()), max(truth.max(), (predicted + half).max())]
    ax.plot([truth.min(), truth.max()], [truth.min(), truth.max()], color=SECONDARY, linestyle="--", label="equality")
    ax.set_ylim(ends[0] - 0.03 * (ends[1] - ends[0]), ends[1] + 0.03 * (ends[1] - ends[0]))
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)
    named = f" ({unit})" if unit else ""
    return _label_axes(ax, f"measured{named}", f"predicted{named}, with interval")


def coverage_curve(
    nominal_C: Sequence[float],
    found_C: Sequence[float],
    marked: float | None = None,
    ax: Axes | None = None,
    on: str = "on test",
) -> Axes:
    """Plot the share of values that intervals contain against the share that they promise.

    Args:
        nominal_C: (C,) promised coverages.
        found_C: (C,) coverages that were found.
        marked: promised coverage to mark with a line. None omits it.
        ax: axes to plot into. None creates a figure.
        on: where they were found.

    Returns:
        The axes.
    """
    ax = _get_axes(ax, 4.4, 4.0, square=True)
    ax.plot([0, 1], [0, 1], color=SECONDARY, linestyle="--", linewidth=1, label="as promised")
    ax.plot(nominal_C, found_C, color=PRIMARY, marker="o", markersize=4, label=f"found {on}")
    if marked is not None:
        ax.axvline(marked, color=MUTED, linewidth=1, zorder=0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:.0%}"))
    ax.set(xlim=(0, 1), ylim=(0, 1.02))
    ax.legend(frameon=False, loc="upper left")
    return _label_axes(ax, "promised share of values inside", "share of values inside")


def identity_histogram(
    shares: Mapping[str, Sequence[float]], threshold: float | None = None, ax: Axes | None = None
) -> Axes:
    """Plot histograms of the identity of held-out proteins to their nearest training protein.

    Args:
        shares: name of a split -> shares of its held-out proteins in bins of equal width from 0 to 1; at most two.
        threshold: identity from which proteins are similar, as a line. None omits it.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    ax = _get_axes(ax)
    for number, (name, heights) in enumerate(shares.items()):
        width = 100 / len(heights)
        part = width / len(shares)
        places = np.arange(len(heights)) * width + (number + 0.5) * part
        ax.bar(places, 100 * np.asarray(heights), 0.9 * part, color=(PRIMARY, MUTED)[number], label=name)
    if threshold is not None:
        ax.axvline(100 * threshold, color=ACCENT, linestyle="--", label=f"similar from {100 * threshold:g}%")
    ax.set_xlim(0, 100)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}%"))
    ax.legend(frameon=False)
    return _label_axes(ax, "identity to the nearest training protein", "held-out proteins")
