"""The notebooks' own pictures: the flow of the story, residue shares, draws, schedules and layouts."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from esm2kit.plots import OTHERS, OURS, PALETTE, TRUTH, _axes, _finish

STORY = ("FASTA and\nclusters", "dataset\n.arrow", "checkpoint\n.safetensors", "embeddings\n.h5", "report\n.html")
ARROWS = ("01 preprocess", "02 pretrain", "03 embed", "04 benchmark")


def story_diagram() -> Axes:
    """The walkthrough as boxes (files) and arrows (notebooks); fine-tuning leaves the checkpoint for the report."""
    _, ax = plt.subplots(figsize=(10.5, 2.4), layout="constrained")
    for place, name in enumerate(STORY):
        box = FancyBboxPatch((2.4 * place, 0), 1.35, 0.8, boxstyle="round,pad=0.08", fc="#eef3fb", ec=OURS)
        ax.add_patch(box)
        ax.text(2.4 * place + 0.675, 0.4, name, ha="center", va="center", color="black", fontsize=10)
    for place, name in enumerate(ARROWS):
        start, end = (2.4 * place + 1.45, 0.4), (2.4 * (place + 1) - 0.1, 0.4)
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=OTHERS))
        ax.text((start[0] + end[0]) / 2, 0.62, name, ha="center", fontsize=8)
    bend = FancyArrowPatch(
        (5.5, -0.1), (10.2, -0.1), connectionstyle="arc3,rad=0.22", arrowstyle="-|>", mutation_scale=14, color=TRUTH
    )
    ax.add_patch(bend)
    ax.text(7.85, -0.98, "05 finetune", ha="center", fontsize=8)
    ax.set(xlim=(-0.2, 11.2), ylim=(-1.1, 1))
    ax.axis("off")
    return ax


def residue_shares(share: Mapping[str, float], ax: Axes | None = None) -> Axes:
    """Bars of residue frequencies, most frequent first, with one in twenty as a line."""
    ax = _axes(ax, 7.0, 3.0)
    ordered = sorted(share.items(), key=lambda item: -item[1])
    ax.bar([name for name, _ in ordered], [100 * value for _, value in ordered], color=OURS)
    ax.axhline(5, color=TRUTH, linestyle="--")
    return _finish(ax, "residue", "share (%)")


def draw_strip(member_rows: np.ndarray, drawn_rows: Sequence[int], ax: Axes | None = None) -> Axes:
    """Which of a cluster's members each epoch drew: one column an epoch, one row a member."""
    ax = _axes(ax, 6.4, 0.9 + 0.16 * len(member_rows))
    places = [int(np.flatnonzero(member_rows == row)[0]) + 1 for row in drawn_rows]
    ax.scatter(range(len(places)), places, marker="s", s=70, color=OURS)
    ax.set(ylim=(len(member_rows) + 0.7, 0.3), xticks=range(len(places)))
    ax.grid(axis="y", alpha=0.3)
    return _finish(ax, "epoch", f"member, of {len(member_rows)}")


def schedule(rates: Sequence[float], ax: Axes | None = None) -> Axes:
    """A learning rate over the updates."""
    ax = _axes(ax, 6.0, 2.4)
    ax.plot(np.arange(1, len(rates) + 1), rates, color=OURS)
    ax.set_ylim(bottom=0)
    return _finish(ax, "update", "learning rate")


def batch_layout(micro_batch_size: int, accumulate: int, data_parallel: int, ax: Axes | None = None) -> Axes:
    """A global batch as cells: a row a device, a block a micro-batch, a cell a sequence."""
    ax = _axes(ax, 7.0, 0.8 + 0.5 * data_parallel)
    for device in range(data_parallel):
        for turn in range(accumulate):
            for sequence in range(micro_batch_size):
                left = turn * (micro_batch_size + 0.6) + sequence
                colour = PALETTE[turn % len(PALETTE)]
                ax.add_patch(FancyBboxPatch((left, -device), 0.7, 0.6, boxstyle="round,pad=0.03", fc=colour, ec="none"))
    ax.set(xlim=(-0.4, accumulate * (micro_batch_size + 0.6)), ylim=(-data_parallel + 0.6, 0.9), xticks=[])
    ax.set_yticks(
        [0.3 - device for device in range(data_parallel)], [f"device {device}" for device in range(data_parallel)]
    )
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel(f"{accumulate} micro-batches of {micro_batch_size}, one colour each, one after the other")
    return ax
