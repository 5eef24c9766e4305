"""Figures of a protein's residue pairs: contacts, couplings, and how they fall off along the chain."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes

from esm2kit.plots import OTHERS, OURS, QUIET, TRUTH, _axes


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
    ax = _axes(ax, 5.2, 4.6)
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
    ax = _axes(ax, 6.0, 3.6)
    for colour, style, (name, means_T) in zip((OURS, OTHERS, TRUTH), ("-", "--", ":"), curves.items(), strict=False):
        edges = np.unique(np.rint(np.geomspace(1, len(means_T), 18)).astype(int))
        pairs_T = len(means_T) - np.arange(len(means_T))  # fewer pairs are far apart
        middles, values = [], []
        for start, stop in pairwise(edges):
            middles.append(np.sqrt(start * (stop - 1)))
            values.append(np.average(means_T[start:stop], weights=pairs_T[start:stop]))
        ax.plot(middles, values, color=colour, linestyle=style, marker="o", markersize=3, label=name)
    if guide is not None:
        ax.axhline(guide, color=QUIET, linewidth=1, zorder=0)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend(frameon=False)
    ax.set(xlabel="residues apart along the chain", ylabel=value_label)
    sns.despine(ax=ax)
    return ax
