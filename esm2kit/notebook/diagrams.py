"""Figures that only the notebooks use: the walkthrough, frequencies, samples, schedules, layouts, maps, proteins."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from scipy.stats import binom

from esm2kit.core.errors import InputError
from esm2kit.embedding.maps import MIN_PROTEINS, Projection, protein_name
from esm2kit.models.contacts import PairMap
from esm2kit.plots import (
    ACCENT,
    MUTED,
    PALETTE,
    PRIMARY,
    SECONDARY,
    WIDTH,
    _get_axes,
    _label_axes,
    by_separation,
    heat_map,
    neighbours_on_map,
    pair_map,
    scores_with_baselines,
)
from esm2kit.sequences.fasta import Record

CHANNELS = 40  # of a heat map of residue vectors
MAX_MEMBERS = 24  # of a cluster, one row each
UNSAMPLED = "#e4e7ec"
STORY = ("FASTA and\nclusters", "dataset\n.arrow", "checkpoint\n.safetensors", "embeddings\n.h5", "report\n.html")
ARROWS = ("01 preprocess", "02 pretrain", "03 embed", "04 benchmark")
MAX_MEMBERS = 24  # of a cluster, one row each
UNSAMPLED = "#e4e7ec"


def story_diagram() -> Axes:
    """Plot the walkthrough: files as boxes, notebooks as arrows; fine-tuning leads from checkpoint to report.

    Returns:
        The axes.
    """
    _, ax = plt.subplots(figsize=(10.5, 2.4), layout="constrained")
    for place, name in enumerate(STORY):
        box = FancyBboxPatch((2.4 * place, 0), 1.35, 0.8, boxstyle="round,pad=0.08", fc="#eef3fb", ec=PRIMARY)
        ax.add_patch(box)
        ax.text(2.4 * place + 0.675, 0.4, name, ha="center", va="center", color="#1a1a1a", fontsize=10)
    for place, name in enumerate(ARROWS):
        start, end = (2.4 * place + 1.45, 0.4), (2.4 * (place + 1) - 0.1, 0.4)
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=SECONDARY))
        ax.text((start[0] + end[0]) / 2, 0.54, name.replace(" ", "\n", 1), ha="center", fontsize=8)
    bend = FancyArrowPatch(
        (5.5, -0.1), (10.2, -0.1), connectionstyle="arc3,rad=0.22", arrowstyle="-|>", mutation_scale=14, color=ACCENT
    )
    ax.add_patch(bend)
    ax.text(7.85, -0.68, "05 finetune", ha="center", va="top", fontsize=8)
    ax.set(xlim=(-0.2, 11.2), ylim=(-0.95, 1))
    ax.axis("off")
    return ax


def residue_shares(share: Mapping[str, float], ax: Axes | None = None) -> Axes:
    """Plot residue frequencies as bars, most frequent first, with a line at 5% (1 in 20).

    Args:
        share: residue -> frequency, 0 to 1.
        ax: axes to plot on. Default: new ones.

    Returns:
        The axes.
    """
    ax = _get_axes(ax, WIDTH, 3.0)
    ordered = sorted(share.items(), key=lambda item: -item[1])
    ax.bar([name for name, _ in ordered], [100 * value for _, value in ordered], color=PRIMARY)
    ax.axhline(5, color=ACCENT, linestyle="--")
    return _label_axes(ax, "residue", "share (%)")


def times_likelier(times: Mapping[str, float], ax: Axes | None = None) -> Axes:
    """Plot the model's probability of each residue relative to its frequency, as bars up or down from 1.

    Args:
        times: residue -> geometric mean of probability / frequency, in the order of the bars.
        ax: axes to plot on. Default: new ones.

    Returns:
        The axes.
    """
    ax = _get_axes(ax, WIDTH, 3.0)
    values = np.array(list(times.values()))
    ax.bar(list(times), values - 1, bottom=1, color=[PRIMARY if value >= 1 else MUTED for value in values])
    ax.axhline(1, color="black", linewidth=0.8)
    return _label_axes(ax, "hidden residue", "probability /\nfrequency")


def guess_map(odds_TL: np.ndarray, letters: str, sequence: str, ax: Axes | None = None) -> Axes:
    """Plot a model's prediction at each position as a heat map; a dot marks the true residue.

    Args:
        odds_TL: (T, L), log2 of probability / frequency for each position and amino acid.
        letters: L amino-acid letters, the columns of odds_TL.
        sequence: T residues, the rows of odds_TL.
        ax: axes to plot on. Default: new ones.

    Returns:
        The axes.
    """
    ax = heat_map(
        odds_TL.T, "hidden residue", "predicted residue", "log2 (probability /\nfrequency)", letters, sequence, 0.0, ax
    )
    true = [(place + 0.5, letters.index(letter) + 0.5) for place, letter in enumerate(sequence) if letter in letters]
    ax.scatter(*np.array(true).T, s=14, color="#1a1a1a", edgecolors="#fefefe", linewidths=0.8)
    return ax


def sampled_members(
    member_rows: np.ndarray, sampled_rows: Sequence[int], names: Sequence[str] = (), ax: Axes | None = None
) -> Axes:
    """Plot which member of a cluster each epoch samples: one column per epoch, one row per member.

    Args:
        member_rows: rows of the cluster's members in the sequence store.
        sampled_rows: row sampled in each epoch, in order.
        names: of the members, in their order. Default: their numbers, from 1.
        ax: axes to plot on. Default: new ones.

    Returns:
        The axes. Of a cluster with more than MAX_MEMBERS members, only those that were sampled have a row.
    """
    members = list(member_rows)
    names = [str(name) for name in names] or [str(number) for number in range(1, len(members) + 1)]
    shown = members if len(members) <= MAX_MEMBERS else [row for row in members if row in set(sampled_rows)]
    ax = _get_axes(ax, WIDTH, 0.9 + 0.24 * len(shown))
    for row in range(len(shown)):
        for epoch, sampled in enumerate(sampled_rows):
            colour = PRIMARY if sampled == shown[row] else UNSAMPLED
            ax.add_patch(plt.Rectangle((epoch - 0.45, row - 0.42), 0.9, 0.84, color=colour, linewidth=0))
    ax.set(xlim=(-0.6, len(sampled_rows) - 0.4), ylim=(len(shown) - 0.5, -0.6), xticks=range(len(sampled_rows)))
    ax.set_yticks(range(len(shown)), [names[members.index(row)] for row in shown], fontsize=8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    some = f"{len(shown)} of " if len(shown) < len(members) else ""
    return _label_axes(ax, "epoch", f"members of the cluster ({some}{len(members):,})")


def schedule(rates: Sequence[float], ax: Axes | None = None) -> Axes:
    """Plot the learning rate over the updates.

    Args:
        rates: learning rate of each update, from the first.
        ax: axes to plot on. Default: new ones.

    Returns:
        The axes.
    """
    ax = _get_axes(ax, WIDTH, 2.4)
    ax.plot(np.arange(1, len(rates) + 1), rates, color=PRIMARY)
    ax.set_ylim(bottom=0)
    return _label_axes(ax, "update", "learning rate")


def layouts_compared(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], same: tuple[str, str], ax: Axes | None = None
) -> Axes:
    """Plot the loss curves of up to three layouts and, below them, the relative difference of two of them.

    Args:
        curves: name -> (updates, losses).
        same: names of the two curves to compare.
        ax: axes for the curves; the difference is then omitted. Default: new axes for both.

    Returns:
        The axes of the loss curves.
    """
    lower = None
    if ax is None:
        _, (ax, lower) = plt.subplots(
            2, figsize=(WIDTH, 4.6), height_ratios=(3, 1.2), sharex=True, layout="constrained"
        )
    # the first curve is wide and pale, so that it stays visible below the second
    styles = ({"linewidth": 6, "alpha": 0.35}, {"linewidth": 1.5, "linestyle": "--"}, {"linewidth": 1.5})
    for place, (name, (steps, losses)) in enumerate(curves.items()):
        ax.plot(steps, losses, color=(PRIMARY, "black", ACCENT)[place % 3], label=name, **styles[place % 3])
    ax.legend(frameon=False, fontsize=8)
    if lower is not None:
        (steps, one), (_, other) = (curves[name] for name in same)
        difference = np.abs(np.asarray(one) - np.asarray(other)) / np.abs(np.asarray(one))
        # a difference of zero has no logarithm: plot half a float32 step instead
        lower.plot(steps, np.maximum(difference, 3e-8), color="black", marker="o", markersize=3, linewidth=1)
        lower.axhline(1e-5, color=SECONDARY, linestyle=":", label="1e-5, the limit in the tests")
        lower.set(yscale="log", ylim=(1e-8, 1e-4))
        lower.legend(frameon=False, fontsize=8)
        _label_axes(lower, "update", "relative\ndifference")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _label_axes(ax, "update" if lower is None else "", "loss (nats per masked residue)")


def divisor_bias(
    relative_error: Mapping[str, Sequence[float]], num_micro_batches: Sequence[int], ax: Axes | None = None
) -> Axes:
    """Plot the error of the gradient of a split batch, relative to one batch, over the number of micro-batches.

    Args:
        relative_error: name of the average -> two series of errors, one value per entry of num_micro_batches.
        num_micro_batches: micro-batches per update.
        ax: axes to plot on. Default: new ones.

    Returns:
        The axes.
    """
    ax = _get_axes(ax, WIDTH, 3.0)
    for (name, errors), colour, marker in zip(relative_error.items(), (ACCENT, PRIMARY), "sD", strict=True):
        ax.plot(num_micro_batches, errors, color=colour, marker=marker, label=name)
    ax.set(yscale="log", xscale="log")
    ax.set_xticks(list(num_micro_batches), [str(number) for number in num_micro_batches])
    ax.minorticks_off()
    ax.legend(frameon=False)
    return _label_axes(ax, "micro-batches per update", "relative error\nof the gradient")


def parallel_pictures() -> Axes:
    """Plot what two devices store and exchange under DDP, FSDP2 and tensor parallelism.

    Returns:
        The axes of the first panel.
    """
    _, axes = plt.subplots(1, 3, figsize=(10.5, 3.6), layout="constrained")
    panels = (
        ("DDP", "the complete model on each", (1.0, 1.0), "gradients, once per update", (0, 1)),
        ("FSDP2", "half of every matrix on each", (0.5, 0.5), "weights, layer by layer; gradients", (0, 1)),
        (
            "tensor parallel",
            "half of the heads and columns on each",
            (0.5, 0.5),
            "activations, twice per layer",
            (0, 0),
        ),
    )
    for ax, (name, stored, shares, exchanged, batches) in zip(axes, panels, strict=True):
        for device, (share, batch) in enumerate(zip(shares, batches, strict=True)):
            left = 2.6 * device
            ax.add_patch(FancyBboxPatch((left, 0), 1.8, 3.1, boxstyle="round,pad=0.1", fc="none", ec=SECONDARY))
            ax.text(left + 0.9, 3.35, f"device {device}", ha="center", fontsize=9)
            ax.text(left + 0.9, 2.78, "weights", ha="center", va="center", fontsize=8)
            for layer in range(3):
                height = 1.5 + 0.4 * layer
                ax.add_patch(plt.Rectangle((left + 0.2, height), 1.4, 0.3, fc="none", ec=PRIMARY, linewidth=0.8))
                shift = 0 if share == 1 or device == 0 else 0.7
                ax.add_patch(plt.Rectangle((left + 0.2 + shift, height), 1.4 * share, 0.3, fc=PRIMARY, ec="none"))
            ax.text(left + 0.9, 1.05, "sequences", ha="center", va="center", fontsize=8)
            for place in range(4):
                spot = (left + 0.22 + 0.36 * place, 0.3)
                ax.add_patch(plt.Rectangle(spot, 0.28, 0.4, fc=PALETTE[1 + 2 * batch], ec="none"))
        ax.add_patch(FancyArrowPatch((1.95, 1.6), (2.45, 1.6), arrowstyle="<|-|>", mutation_scale=12, color="black"))
        ax.text(2.2, -0.5, f"{stored}\nexchanged: {exchanged}", ha="center", va="top", fontsize=8.5)
        ax.set_title(name, fontsize=11)
        ax.set(xlim=(-0.3, 4.7), ylim=(-1.3, 3.7))
        ax.axis("off")
    return axes[0]


def epoch_shares(num_members_C: np.ndarray, ax: Axes | None = None) -> Axes:
    """Plot the share of an epoch that the largest clusters take, with sampling by record and by cluster.

    Args:
        num_members_C: (C,), number of members of each cluster.
        ax: axes to plot on. Default: new ones.

    Returns:
        The axes.
    """
    ax = _get_axes(ax, WIDTH, 3.2)
    sizes = np.sort(np.asarray(num_members_C))[::-1]
    share = np.arange(1, len(sizes) + 1) / len(sizes)
    ax.plot(100 * share, 100 * np.cumsum(sizes) / sizes.sum(), color=ACCENT, linestyle="--", label="record by record")
    ax.plot(100 * share, 100 * share, color=PRIMARY, label="cluster by cluster")
    ax.legend(frameon=False)
    return _label_axes(ax, "clusters, largest first (%)", "share of what training sees (%)")


def expected_counts(num_members: int, epochs: int) -> tuple[float, float]:
    """Compute the interval that all counts of a cluster's members lie in, in 99 of 100 repetitions.

    Args:
        num_members: members of the cluster, each sampled with the same probability.
        epochs: number of epochs, one sample each.

    Returns:
        The ends of the interval of one member; together the members are outside in at most 1 of 100 repetitions.
    """
    low, high = binom.interval(1 - 0.01 / num_members, epochs, 1 / num_members)
    return float(low), float(high)


def member_counts(counts_K: Sequence[int], low: float, high: float, ax: Axes | None = None) -> Axes:
    """Plot how often each member of a cluster was sampled, with the interval expected of uniform sampling.

    Args:
        counts_K: (K,), samples of each member.
        low: lower end of the expected interval.
        high: upper end of the expected interval.
        ax: axes to plot on. Default: new ones.

    Returns:
        The axes.
    """
    ax = _get_axes(ax, WIDTH, 2.8)
    ax.bar(range(1, len(counts_K) + 1), counts_K, color=PRIMARY)
    ax.axhspan(low, high, color=SECONDARY, alpha=0.25, linewidth=0, label="expected of uniform sampling")
    ax.set_ylim(0, 1.35 * max(high, *counts_K))
    ax.set_xlim(0.3, len(counts_K) + 0.7)
    ax.xaxis.set_major_locator(MaxNLocator(16, integer=True, prune="lower"))
    ax.legend(frameon=False, loc="upper right")
    return _label_axes(ax, "member of the cluster", "times sampled")


def neighbours(projected: Projection, chosen: int, nearest_K: Sequence[int], records: Sequence[Record]) -> Axes:
    """Plot the nearest neighbours of a protein on a map, with their names in the legend.

    Args:
        projected: the map.
        chosen: index of the protein.
        nearest_K: indices of its neighbours, the nearest first.
        records: the proteins.

    Returns:
        The axes.
    """
    names = [f"{records[place].id} {protein_name(records[place].description)}".strip() for place in nearest_K]
    return neighbours_on_map(projected.xy_P2, chosen, nearest_K, names, projected.axes)


def agreement(shares: Mapping[str, tuple[float, float, float]], colour: str, numeric: bool) -> Axes:
    """Plot how often the nearest neighbour agrees, for models, composition and chance.

    Args:
        shares: the result of `maps.agreements`.
        colour: name of the values.
        numeric: whether the values are numbers.

    Returns:
        The axes.

    Raises:
        InputError: too few proteins have a value.
    """
    if not shares:
        raise InputError(
            f"fewer than {MIN_PROTEINS} proteins have a value of {colour}: colour by another field",
            code="map.too-few",
            found=0,
        )
    agrees = f"is on the same side of the median {colour}" if numeric else f"has the same {colour}"
    models = [name for name in shares if name not in ("composition", "chance")]
    columns = zip(*shares.values(), strict=True)
    return scores_with_baselines(list(shares), *columns, f"nearest neighbour {agrees}", models, on="")


def residue_vectors(hidden_TD: np.ndarray, sequence: str) -> Axes:
    """Plot the channels that vary most along a protein, with its residues sorted by amino acid.

    Args:
        hidden_TD: (T, D) vectors of the first T residues.
        sequence: all residues.

    Returns:
        The axes.
    """
    varying = np.argsort(-hidden_TD.std(0))[:CHANNELS]
    profile_TC = hidden_TD[:, varying] - hidden_TD[:, varying].mean(0)
    letters_T = np.array(list(sequence[: len(hidden_TD)]))
    order, (names, counts) = np.argsort(letters_T, kind="stable"), np.unique(letters_T, return_counts=True)
    ax = heat_map(
        profile_TC[order].T, "residues, sorted by amino acid", "channel", "value minus\nchannel mean", centre=0.0
    )
    ax.set_xticks(np.cumsum(counts) - counts / 2, names)
    return ax


def residue_pairs(trained: PairMap, untrained: PairMap | None, model: str) -> Axes:
    """Plot a map of a protein's residue pairs, and next to it the means by separation along the chain.

    Args:
        trained: the map.
        untrained: that of an untrained model of the same architecture.
        model: name of the model.

    Returns:
        The axes of the map.
    """
    what = "contact probability" if trained.fitted else "coupling (multiples of uniform attention)"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.8, 4.6), layout="constrained", width_ratios=[1.25, 1])
    figure.get_layout_engine().set(wspace=0.12)
    pair_map(
        trained.values_TT, trained.expected_TT, model, "distance and residue types alone", what, trained.fitted, left
    )
    curves = {model: trained.by_separation}
    if untrained:
        curves["the same shape, untrained"] = untrained.by_separation
    by_separation(curves, f"mean {what}", 0.0, right)
    return left
