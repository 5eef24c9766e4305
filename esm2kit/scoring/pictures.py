"""Pictures of scores: heat map of all substitutions, entropy along the protein, measured values and scores."""

from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from esm2kit import plots
from esm2kit.sequences.alphabet import NUM_STANDARD, STANDARD_RESIDUES
from esm2kit.tasks.metrics import Interval

# Rows of the heat map from top to bottom, by the chemistry of the side chain.
GROUPS = {"aliphatic": "AVILMC", "aromatic": "FWY", "polar": "STNQ", "positive": "HKR", "negative": "DE", "other": "GP"}
ORDER = "".join(GROUPS.values())
MIN_PER_ROW, MAX_ROWS = 100, 10  # positions in a row of the heat map, and rows up to which this number is kept
MAX_LETTERS = 400  # residues of the longest protein whose letters are written above the heat map
MAX_DOTTED_PER_ROW = 400  # of more positions in a row the dots of the wild type would hide the cells
MAX_TITLE = 100  # characters
# Shares of the scores that the colour scale covers; a few extremes do not make the rest pale.
SCALE_QUANTILE = 0.98
# Lengths in inches.
CELLS_WIDTH, LEFT, RIGHT, TOP, BOTTOM = 8.3, 0.42, 0.78, 0.36, 0.5
STRIP, GAP, BELOW = 0.11, 0.03, 0.36
DOT_COLOUR, MISSING_COLOUR = "#222222", "#c8c8c8"
CELLS_ID = "cells-"  # the scripts of a page find the pictures of the cells by this


class RowSpan(NamedTuple):
    """Positions of a row of the heat map, from 0, without `stop`."""

    start: int
    stop: int


class Layout(NamedTuple):
    """How the positions of a protein are arranged in rows.

    Args:
        rows: positions of each row.
        per_row: positions that fit in a row.
    """

    rows: tuple[RowSpan, ...]
    per_row: int

    @classmethod
    def fit(cls, log_odds_TA: np.ndarray) -> "Layout":
        """Arrange the positions from the first to the last one with a score."""
        scored = np.flatnonzero(np.isfinite(log_odds_TA).sum(1) > 1)
        first, last = (int(scored[0]), int(scored[-1]) + 1) if scored.size else (0, len(log_odds_TA))
        count = last - first
        num_rows = min(-(-count // MIN_PER_ROW), MAX_ROWS)
        per_row = -(-count // num_rows)
        if num_rows > 1:
            per_row = -(-per_row // 10) * 10
        starts = range(first, last, per_row)
        return cls(tuple(RowSpan(start, min(start + per_row, last)) for start in starts), per_row)


def average_substitutions(log_odds_TA: np.ndarray, sequence: str) -> np.ndarray:
    """Average the scores of the substitutions at each position, (T,); the wild type's 0 does not count."""
    mutants_TA = drop_wild_type(log_odds_TA, sequence)
    count_T = np.isfinite(mutants_TA).sum(1)
    return np.where(count_T > 0, np.nansum(mutants_TA, axis=1) / np.maximum(count_T, 1), np.nan)


def drop_wild_type(log_odds_TA: np.ndarray, sequence: str) -> np.ndarray:
    """Return a copy of the table with NaN for the wild type."""
    mutants_TA = np.array(log_odds_TA, dtype=np.float64)
    for place, letter in enumerate(sequence):
        if letter in STANDARD_RESIDUES:
            mutants_TA[place, STANDARD_RESIDUES.index(letter)] = np.nan
    return mutants_TA


def choose_scale(log_odds_TA: np.ndarray, sequence: str) -> float:
    """Choose the end of the colour scale, which is symmetric around 0."""
    values = np.abs(drop_wild_type(log_odds_TA, sequence))
    values = values[np.isfinite(values)]
    return float(np.quantile(values, SCALE_QUANTILE)) or 1.0 if values.size else 1.0


def draw_substitutions(log_odds_TA: np.ndarray, sequence: str, offset: int = 0, title: str = "") -> Figure:
    """Draw the heat map of a protein's substitutions, in rows that are read like lines of text.

    A dot marks the wild type. The strip above each row is the mean of the position. The cells are pixels, so that a
    vector file of a long protein stays small.

    Args:
        log_odds_TA: (T, 20) scores in the order of STANDARD_RESIDUES, 0 for the wild type, NaN where there is none.
        sequence: the wild type.
        offset: what is added to the number of a residue.
        title: of the figure.

    Returns:
        The figure. The cells of row r are an image with the id `cells-r`.
    """
    layout = Layout.fit(log_odds_TA)
    cell = 0.095 if len(layout.rows) <= 4 else 0.08
    block = STRIP + GAP + NUM_STANDARD * cell + BELOW
    # a short protein does not get cells as wide as words
    per_row = max(layout.per_row, 40)
    height = TOP + len(layout.rows) * block + BOTTOM
    width = LEFT + CELLS_WIDTH + RIGHT
    figure = plt.figure(figsize=(width, height))
    end = choose_scale(log_odds_TA, sequence)
    scale = {"cmap": plots.DIFFERENCES.with_extremes(bad=MISSING_COLOUR), "vmin": -end, "vmax": end}
    values_TA = log_odds_TA[:, [STANDARD_RESIDUES.index(letter) for letter in ORDER]]
    mean_T = average_substitutions(log_odds_TA, sequence)
    image = None
    for number, (start, stop) in enumerate(layout.rows):
        left, share = LEFT / width, CELLS_WIDTH / width * (stop - start) / per_row
        bottom = height - TOP - (number + 1) * block + BELOW
        cells = figure.add_axes((left, bottom / height, share, NUM_STANDARD * cell / height))
        strip = figure.add_axes((left, (bottom + NUM_STANDARD * cell + GAP) / height, share, STRIP / height))
        span = (start + 0.5 + offset, stop + 0.5 + offset)
        # not resampled: an SVG contains one pixel per cell
        image = cells.imshow(values_TA[start:stop].T, extent=(*span, NUM_STANDARD - 0.5, -0.5), aspect="auto",
                             interpolation="none", **scale)  # fmt: skip
        image.set_gid(f"{CELLS_ID}{number}")
        strip.imshow(mean_T[None, start:stop], extent=(*span, -0.5, 0.5), aspect="auto", interpolation="none", **scale)
        if layout.per_row <= MAX_DOTTED_PER_ROW:
            _mark_wild_type(cells, sequence, start, stop, offset, per_row)
        _label_rows(cells, strip, cell)
        _label_positions(cells, strip, sequence, RowSpan(start, stop), offset)
    assert image is not None
    axis = figure.add_axes((LEFT / width, 0.36 / height, 2.6 / width, 0.1 / height))
    bar = figure.colorbar(image, cax=axis, orientation="horizontal", extend="both")
    bar.ax.tick_params(labelsize=7, length=2, pad=1)
    bar.outline.set_visible(False)
    words = "score of the mutation (log-odds): below 0 the model prefers the wild type (dot), above 0 the mutant"
    figure.text((LEFT + 2.8) / width, 0.41 / height, words, fontsize=7.5, va="center")
    if title:
        title = title if len(title) <= MAX_TITLE else f"{title[: MAX_TITLE - 1]}…"
        figure.text(LEFT / width, 1 - 0.05 / height, title, fontsize=10, va="top")
    return figure


def _mark_wild_type(ax: Axes, sequence: str, start: int, stop: int, offset: int, per_row: int) -> None:
    """Draw a dot for each residue, all of them as one path of lines without length, which an SVG writes shortly."""
    known = [
        (place, ORDER.index(letter)) for place, letter in enumerate(sequence[start:stop], start) if letter in ORDER
    ]
    if not known:
        return
    x_K, y_K = np.array(known, dtype=float).T
    x_K += 1 + offset
    gap_K = np.full(len(known), np.nan)
    size = min(2.6, 0.45 * CELLS_WIDTH * 72 / per_row)
    (line,) = ax.plot(
        np.stack([x_K, x_K + 1e-3, gap_K], 1).ravel(), np.stack([y_K, y_K, gap_K], 1).ravel(), color=DOT_COLOUR,
        linewidth=size, solid_capstyle="round",
    )  # fmt: skip
    line.set_snap(False)  # to whole pixels the lines have no length, and are not drawn
    ax.set_ylim(NUM_STANDARD - 0.5, -0.5)


def _label_rows(cells: Axes, strip: Axes, cell: float) -> None:
    """Write the letters of the amino acids, and the names of their groups."""
    cells.set_yticks(range(NUM_STANDARD), list(ORDER), fontsize=66 * cell, family="monospace")
    strip.set_yticks([0], ["mean"], fontsize=66 * cell)
    strip.set_xticks([])
    row = 0
    for name, letters in GROUPS.items():
        if row:
            cells.axhline(row - 0.5, color="#ffffff", linewidth=0.9)
        cells.annotate(name, (1, row + (len(letters) - 1) / 2), xycoords=("axes fraction", "data"), xytext=(5, 0),
                       textcoords="offset points", fontsize=66 * cell, va="center")  # fmt: skip
        row += len(letters)
    for ax in (cells, strip):
        ax.tick_params(axis="y", length=0, pad=2)
        for spine in ax.spines.values():
            spine.set_visible(False)


def _label_positions(cells: Axes, strip: Axes, sequence: str, span: RowSpan, offset: int) -> None:
    """Number the positions, and write the letters of a short protein."""
    count = span.stop - span.start
    step = next((step for step in (5, 10, 20, 50, 100, 200, 500) if count / step <= 14), 1000)
    first, last = span.start + 1 + offset, span.stop + offset
    numbers = [number for number in range(first, last + 1) if number % step == 0 and number - first >= step / 3]
    cells.set_xticks([first, *numbers], [f"{number}" for number in (first, *numbers)], fontsize=7)
    cells.tick_params(axis="x", length=2, pad=1)
    cells.set_xlim(first - 0.5, last + 0.5)
    strip.set_xlim(first - 0.5, last + 0.5)
    if len(sequence) <= MAX_LETTERS and count <= MIN_PER_ROW:
        for place in range(span.start, span.stop):
            strip.text(place + 1 + offset, -0.62, sequence[place], fontsize=5.5, ha="center", va="bottom",
                       family="monospace")  # fmt: skip
    strip.set_ylim(0.5, -0.5)


def draw_entropy(entropy_T: np.ndarray, offset: int = 0) -> Axes:
    """Plot the entropy of the model's guess at each position, between certainty and a uniform guess.

    Args:
        entropy_T: (T,) in nats; NaN where it was not computed.
        offset: what is added to the number of a residue.

    Returns:
        The axes.
    """
    _, ax = plt.subplots(figsize=(plots.WIDTH, 2.2), layout="constrained")
    places = np.arange(1, len(entropy_T) + 1) + offset
    ax.fill_between(places, entropy_T, step="mid", color=plots.PRIMARY, linewidth=0, rasterized=len(places) > 5_000)
    ax.axhline(np.log(NUM_STANDARD), color=plots.SECONDARY, linestyle="--", linewidth=1)
    ax.annotate("uniform guess", (1, np.log(NUM_STANDARD)), xycoords=("axes fraction", "data"), fontsize=8,
                ha="right", va="bottom")  # fmt: skip
    shown = places[np.isfinite(entropy_T)]
    shown = shown if shown.size else places
    ax.set(xlim=(shown[0] - 0.5, shown[-1] + 0.5), ylim=(0, 3.3), xlabel="position", ylabel="entropy (nats)")
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def draw_measured(measured_N: np.ndarray, score_N: np.ndarray, spearman: Interval) -> Axes:
    """Plot scores against measured values, with their rank correlation.

    Args:
        measured_N: (N,) measured values; NaN where one is missing.
        score_N: (N,) scores.
        spearman: the correlation with its 95% interval.

    Returns:
        The axes.
    """
    _, ax = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    has_both_N = np.isfinite(measured_N) & np.isfinite(score_N)
    measured, scores = measured_N[has_both_N], score_N[has_both_N]
    if len(measured) > plots.MAX_POINTS:
        chosen = np.random.default_rng(0).choice(len(measured), plots.MAX_POINTS, replace=False)
        measured, scores = measured[chosen], scores[chosen]
    size, alpha = (16, 0.75) if len(measured) < 500 else (7, 0.35)
    ax.scatter(scores, measured, s=size, alpha=alpha, color=plots.PRIMARY, linewidths=0,
               rasterized=len(measured) > plots.MAX_VECTOR_POINTS)  # fmt: skip
    ax.axvline(0, color=plots.SECONDARY, linestyle="--", linewidth=1)
    ends = f", 95% interval {spearman.low:.2f} to {spearman.high:.2f}" if np.isfinite(spearman.low) else ""
    ax.set_title(f"Spearman {spearman.value:.2f}{ends}", fontsize=10)
    ax.set(xlabel="score (log-odds; 0: as the wild type)", ylabel="measured")
    ax.spines[["top", "right"]].set_visible(False)
    return ax
