"""Scores of mutations in notebook 07: one protein, one position, and whether structured positions tolerate less."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from scipy.stats import rankdata

from esm2kit import plots
from esm2kit.core.errors import InputError
from esm2kit.core.numbers import format_count
from esm2kit.core.paths import portable_name
from esm2kit.scoring.baselines import build_substitution_tables
from esm2kit.scoring.config import ScoreConfig
from esm2kit.scoring.page import chart_assay, describe_model, read_measured
from esm2kit.scoring.pictures import ORDER, average_substitutions, draw_measured, draw_substitutions
from esm2kit.scoring.score import score
from esm2kit.scoring.scores import Scores
from esm2kit.sequences.alphabet import NUM_STANDARD, STANDARD_RESIDUES
from esm2kit.sequences.fasta import Record
from esm2kit.tasks.metrics import Interval
from esm2kit.tasks.task_data import TaskData

BY_LETTER = "model, averaged by letter"
COIL = "C"  # the class of residues in neither helix nor strand
STRUCTURES = {"H": "helix", "E": "strand", "C": "neither"}
STRUCTURE_COLOURS = {"H": plots.PALETTE[3], "E": plots.PALETTE[2]}
MAX_NAMED = 3  # positions at each end that are named in a figure
REPLICATES = 1000


def score_protein(record: Record, model: str, out_dir: Path, **options: object) -> Scores:
    """Score all substitutions of a protein, or read the files of an earlier call.

    Args:
        record: the protein.
        model: an argument of `load_model`.
        out_dir: folder of the files; other proteins and models have files of their own.
        options: of ScoreConfig.

    Returns:
        The scores.
    """
    digest = hashlib.sha256(f"{record.sequence} {model}".encode()).hexdigest()[:6]
    return score_proteins([record], model, out_dir, f"{portable_name(record.id)[:40]}_{digest}", **options)


def score_proteins(records: Sequence[Record], model: str, out_dir: Path, name: str, **options: object) -> Scores:
    """Score all substitutions of several proteins; files of an earlier call with other settings are replaced.

    Args:
        records: the proteins.
        model: an argument of `load_model`.
        out_dir: folder of the files.
        name: prefix of the files.
        options: of ScoreConfig.

    Returns:
        The scores.

    Raises:
        InputError: an option or the model is invalid.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    fasta = out_dir / f"{name}.fasta"
    fasta.write_text("".join(f">{each.description}\n{each.sequence}\n" for each in records), encoding="utf-8")
    config = ScoreConfig(fasta, model=str(model), out_dir=out_dir, name=name, **options)
    try:
        return score(config)
    except InputError as error:
        if error.code not in ("score.file-exists", "score.run-exists"):
            raise
        return score(replace(config, restart=True))


def score_structures(task: TaskData, count: int, model: str, out_dir: Path) -> Scores:
    """Score the first test proteins of a task, with one forward pass each.

    Args:
        task: secondary structure per residue.
        count: number of proteins.
        model: an argument of `load_model`.
        out_dir: folder of the files.

    Returns:
        The scores.
    """
    chosen = np.flatnonzero(task.sets == "test")[:count]
    records = [Record(task.ids[place], task.ids[place], task.sequences[place]) for place in chosen]
    options = {"strategy": "wt-marginals", "pictures": 0}
    return score_proteins(records, model, out_dir, "structures", **options)


def scan_map(scores: Scores) -> Axes:
    """Draw the heat map of a protein, see `draw_substitutions`.

    Args:
        scores: of one protein.

    Returns:
        The axes of its first row.
    """
    return draw_substitutions(scores.table(), scores.sequence()).axes[0]


def find_structure(task: TaskData, protein: str) -> str:
    """Find the secondary structure of a protein.

    Args:
        task: per-residue classes.
        protein: its id.

    Returns:
        One letter per residue, a blank where it was not observed; empty if the task does not have the protein.
    """
    if protein not in task.ids:
        return ""
    place = task.ids.index(protein)
    span = slice(task.offsets[place], task.offsets[place + 1])
    labels = task.task.labels
    return "".join(
        labels[target] if scored else " "
        for target, scored in zip(task.targets[span], task.scored[span], strict=True)
    )  # fmt: skip


def tolerance_track(scores: Scores, structure: str = "", ax: Axes | None = None) -> Axes:
    """Plot the mean score along a protein, with its secondary structure and the extremes named.

    Args:
        scores: of one protein.
        structure: one letter per residue; empty if it is not known.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    ax = ax or plt.subplots(figsize=(plots.WIDTH, 3.4), layout="constrained")[1]
    sequence = scores.sequence()
    mean_T = average_substitutions(scores.table(), sequence)
    places = np.arange(1, len(sequence) + 1)
    ax.plot(places, mean_T, color=plots.PRIMARY, linewidth=1.2)
    ax.axhline(0, color=plots.SECONDARY, linestyle="--", linewidth=1)
    ends = [(text or "").split()[:MAX_NAMED] for text in (scores.most_tolerated, scores.least_tolerated)]
    named = {name for names in ends for name in names}
    ax.margins(x=0.03, y=0.25)  # room for the names
    chosen = [place for place in places if f"{sequence[place - 1]}{place}" in named]
    others = np.stack([places, mean_T], 1)[np.isfinite(mean_T)]
    if chosen:
        xy_N2 = np.stack([chosen, mean_T[np.array(chosen) - 1]], 1)
        ax.scatter(*xy_N2.T, s=14, color=plots.ACCENT, zorder=3)
        plots.place_labels(ax, xy_N2, [f"{sequence[place - 1]}{place}" for place in chosen], others)
    present = [name for name in STRUCTURE_COLOURS if name in structure]
    low, high = ax.get_ylim()
    for name in present:
        inside = np.array([letter == name for letter in structure])
        ax.fill_between(places, low - 0.06 * (high - low), low, where=inside, step="mid", linewidth=0,
                        color=STRUCTURE_COLOURS[name], label=STRUCTURES[name])  # fmt: skip
    if present:
        ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    ax.set(xlabel="position", ylabel="mean score of the substitutions")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def position_bars(scores: Scores, position: int, ax: Axes | None = None) -> Axes:
    """Plot the scores of the 19 substitutions of a position.

    Args:
        scores: of one protein.
        position: from 1; beyond the end, the last one is used.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    ax = ax or plt.subplots(figsize=(plots.WIDTH, 2.8), layout="constrained")[1]
    place, sequence = min(position, len(scores.sequence())) - 1, scores.sequence()
    values = scores.table()[place, [STANDARD_RESIDUES.index(letter) for letter in ORDER]]
    colours = [plots.PRIMARY if value > 0 else plots.ACCENT for value in values]
    ax.bar(range(NUM_STANDARD), np.nan_to_num(values), color=colours, width=0.8)
    ax.axhline(0, color=plots.SECONDARY, linewidth=1)
    wild = ORDER.find(sequence[place])
    if wild >= 0:
        ax.plot(wild, 0, marker="o", color=plots.SECONDARY)
    ax.set_xticks(range(NUM_STANDARD), list(ORDER))
    ax.set(xlabel=f"residue instead of {sequence[place]}{place + 1}", ylabel="score (log-odds)")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


class StructureComparison(NamedTuple):
    """How often a residue of a helix or strand has a lower mean score than another one of the same protein.

    Args:
        shares: "model"; BY_LETTER, the model's mean score of each wild-type letter, which has no context; and
            "BLOSUM62" -> mean share of the pairs over proteins.
        difference: of the model and BY_LETTER on the same proteins.
        num_proteins: number of proteins.
    """

    shares: dict[str, Interval]
    difference: Interval
    num_proteins: int


def compare_structure(scores: Scores, task: TaskData) -> StructureComparison:
    """Measure whether residues of helices and strands tolerate less than those outside.

    In each protein, every residue of a helix or strand is compared with every other one; 0.5 is chance. The intervals
    are from a bootstrap over proteins.

    Args:
        scores: of proteins of the task.
        task: secondary structure per residue.

    Returns:
        The shares of the pairs.

    Raises:
        InputError: no protein has residues of both kinds.
    """
    blosum_A = build_substitution_tables()["blosum62"]
    blosum_A = (blosum_A.sum(1) - blosum_A.diagonal()) / (NUM_STANDARD - 1)
    found = []
    for index, protein in enumerate(scores.proteins):
        sequence, structure = scores.sequence(index), find_structure(task, protein)
        kept = [
            place for place, letter in enumerate(sequence) if letter in STANDARD_RESIDUES and structure[place] != " "
        ]
        is_coil = np.array([structure[place] == COIL for place in kept])
        if 0 < is_coil.sum() < len(is_coil):
            codes = np.array([STANDARD_RESIDUES.index(sequence[place]) for place in kept])
            found.append((average_substitutions(scores.table(index), sequence)[kept], codes, is_coil))
    if not found:
        raise InputError(
            "no protein has both structured and other residues. Raise num_structures.", code="scan.no-structures"
        )
    values, codes = np.concatenate([each[0] for each in found]), np.concatenate([each[1] for each in found])
    count_A = np.bincount(codes, minlength=NUM_STANDARD)
    letters_A = np.bincount(codes, values, NUM_STANDARD) / np.maximum(count_A, 1)
    shares = {
        "model": [_share_of_pairs(values_K, is_coil) for values_K, _, is_coil in found],
        BY_LETTER: [_share_of_pairs(letters_A[codes_K], is_coil) for _, codes_K, is_coil in found],
        "BLOSUM62": [_share_of_pairs(blosum_A[codes_K], is_coil) for _, codes_K, is_coil in found],
    }
    difference = np.array(shares["model"]) - np.array(shares[BY_LETTER])
    intervals = {name: _average(np.array(values)) for name, values in shares.items()}
    return StructureComparison(intervals, _average(difference), len(found))


def _share_of_pairs(values_K: np.ndarray, is_upper_K: np.ndarray) -> float:
    """Compute the share of pairs in which the upper one has the higher value; ties count half."""
    upper = int(is_upper_K.sum())
    ranks = rankdata(values_K)[is_upper_K].sum() - upper * (upper + 1) / 2
    return float(ranks / (upper * (len(values_K) - upper)))


def _average(values_P: np.ndarray) -> Interval:
    drawn = np.random.default_rng(0).integers(0, len(values_P), (REPLICATES, len(values_P)))
    low, high = np.quantile(values_P[drawn].mean(1), [0.025, 0.975])
    return Interval(float(values_P.mean()), float(low), float(high))


def structure_chart(found: StructureComparison, ax: Axes | None = None) -> Axes:
    """Plot what `compare_structure` found, with chance as a line.

    Args:
        found: the shares of the pairs.
        ax: axes to plot into. None creates a figure.

    Returns:
        The axes.
    """
    columns = [[getattr(interval, end) for interval in found.shares.values()] for end in Interval._fields]
    label = "pairs in which the structured residue tolerates less"
    ax = plots.scores_with_baselines(list(found.shares), *columns, label, ["model"], ax=ax, on="")
    ax.axvline(0.5, color=plots.SECONDARY, linestyle="--", linewidth=1)
    return ax


def describe_knowledge(scores: Scores) -> str:
    """Write how well a model knows a protein, see `scoring.page.describe_model`.

    Args:
        scores: of one protein.

    Returns:
        Lines of text.
    """
    return "\n".join(describe_model(scores))


def describe_map(scores: Scores, record: Record) -> str:
    """Caption of the heat map.

    Args:
        scores: of one protein.
        record: the protein.

    Returns:
        Markdown.
    """
    return (
        f"*All {19 * len(record.sequence):,} substitutions of {record.id}, by {scores.model}.* Orange: the model "
        "prefers the wild type (dot); blue: it prefers the mutant. The strip above each row is the mean of the "
        "position."
    )


def describe_position(scores: Scores, position: int, record: Record) -> str:
    """Caption of the bars of a position.

    Args:
        scores: of one protein.
        position: from 1; beyond the end, the last one is used.
        record: the protein.

    Returns:
        Markdown.
    """
    place = min(position, len(record.sequence)) - 1
    row_A = scores.table()[place]
    codes = [code for code in np.argsort(-row_A) if STANDARD_RESIDUES[code] != record.sequence[place]]
    if not np.isfinite(row_A).all():
        return f"*Position {place + 1} of {record.id}.* The residue is not one of the 20, so nothing was scored."
    best, worst = (f"{STANDARD_RESIDUES[code]} ({row_A[code]:.2f})" for code in (codes[0], codes[-1]))
    return (
        f"*Position {place + 1} of {record.id}.* The best substitution of {record.sequence[place]} is {best}, the "
        f"worst {worst}. The dot is the wild type. Entropy of the model's guess: {scores.entropy()[place]:.2f} of at "
        "most 3.0 nats."
    )


def describe_track(scores: Scores, record: Record, structure: str) -> str:
    """Caption of the mean scores along a protein.

    Args:
        scores: of one protein.
        record: the protein.
        structure: one letter per residue; empty if it is not known.

    Returns:
        Markdown.
    """
    strip = " The strip below is the measured secondary structure." if structure.strip() else ""
    return (
        f"*Mean score of the substitutions along {record.id}.* Most tolerated: {scores.most_tolerated}. Least "
        f"tolerated: {scores.least_tolerated}.{strip}"
    )


def describe_structure(found: StructureComparison) -> str:
    """Caption of the comparison with the secondary structure, with what it shows.

    Args:
        found: the shares of the pairs.

    Returns:
        Markdown.
    """
    own, letters, change = found.shares["model"], found.shares[BY_LETTER], found.difference
    if own.low <= 0.5:
        verdict = "The model is not above chance: it does not know which places are structured."
    elif change.low > 0:
        verdict = "The context adds something to the letter: the model knows more about a place than its residue."
    else:
        verdict = "The model is above chance, but the letter of the residue explains that: the context adds nothing."
    return (
        f"*Residues of helices and strands against the others of the same protein, "
        f"{format_count(found.num_proteins, 'test protein')}.* In {own.value:.0%} of the pairs the structured residue "
        f"has the lower mean score, and in {letters.value:.0%} if the scores are averaged by letter (difference "
        f"{change.value:.1%}, 95% interval {change.low:.1%} to {change.high:.1%}); 50% is chance. {verdict}"
    )


def assay_charts(scores: Scores) -> list[tuple[Axes, str]]:
    """Chart the model and the baselines of each assay, and scores against measured values.

    Args:
        scores: a run that was compared with measured values.

    Returns:
        Pairs of axes and caption.
    """
    shown = []
    values = read_measured(scores)
    for assay in scores.read_assay()["assays"]:
        own = Interval(*(np.nan if end is None else end for end in assay["rows"]["model"]["spearman"].values()))
        size = format_count(assay["num_variants"], "variant")
        verdict = " ".join(assay["verdict"])
        shown.append((chart_assay(assay["rows"]), f"*{assay['assay']}, {size}.* {verdict}"))
        caption = f"*Measured values of {assay['assay']} against scores.* Dashed line: as the wild type."
        shown.append((draw_measured(*values[assay["assay"]], own), caption))
    return shown
