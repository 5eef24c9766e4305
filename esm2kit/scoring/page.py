"""The HTML page of a run: verdict, heat maps, positions, variants, measured values, definitions and files."""

import csv
import json
import os
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from esm2kit import plots
from esm2kit.core.numbers import format_count
from esm2kit.figures import render_figure
from esm2kit.pages import build_figure, build_headers, render_page
from esm2kit.scoring.assay import METRIC_NAMES, MODEL
from esm2kit.scoring.baselines import BASELINE_NAMES
from esm2kit.scoring.config import ENTROPY_STRATEGIES
from esm2kit.scoring.evaluation import SHORT_NAMES
from esm2kit.scoring.pictures import (
    CELLS_ID,
    ORDER,
    Layout,
    average_substitutions,
    draw_entropy,
    draw_measured,
    draw_substitutions,
    drop_wild_type,
)
from esm2kit.scoring.scores import DELIMITERS, Scores
from esm2kit.scoring.structures import COLOUR_NAMES, ColouredStructure
from esm2kit.sequences.alphabet import NUM_STANDARD, STANDARD_RESIDUES
from esm2kit.tasks.metrics import Interval

TEMPLATES = Path(__file__).with_name("templates")
MAX_POSITIONS, MAX_VARIANTS = 10, 10  # at each end of a list
MAX_LISTED = 200  # proteins, or assays
MAX_ASSAYS = 20  # with figures
CELL_SCALE = 100  # the scores of the page have two decimals
NO_CELL = -(1 << 15)
MEIER = "Meier et al. 2021 (10.1101/2021.07.09.450648)"
OF_MUTANT = "the score is the log-probability of the mutant minus that of the wild-type residue"
LIKELIHOOD = (
    "The mean log-likelihood is the mean of the log-probabilities of the residues, and the pseudo-perplexity is exp of "
    "minus that: 1 is certainty, 20 a uniform guess."
)
DEFINITIONS = {
    "masked-marginals": f"Each mutated position is hidden in the wild type, and {OF_MUTANT} there. Several "
    f"substitutions are added up. Source: {MEIER}, as ProteinGym computes it.",
    "wt-marginals": f"The model reads the wild type without hiding anything, and {OF_MUTANT}. Several substitutions "
    f"are added up. Source: {MEIER}.",
    "mutant-marginals": f"The model reads the mutant without hiding anything, and {OF_MUTANT}. Several substitutions "
    f"are added up. Source: {MEIER}.",
    "pseudo-ppl": "The score is the pseudo-log-likelihood of the mutant minus that of the wild type: the sum of the "
    f"log-probabilities of all residues, each hidden once. Source: {MEIER}.",
    "exact": f"Each residue is hidden once. {LIKELIHOOD}",
    "estimate": f"Several residues are hidden at once, which is an estimate. {LIKELIHOOD}",
}


class PageContent(NamedTuple):
    """What a page shows.

    Args:
        scores: the run.
        names: ids of the proteins.
        offset: what is added to the number of a residue.
        shown: indices of the proteins with heat maps.
        structures: coloured structures.
    """

    scores: Scores
    names: Sequence[str]
    offset: int
    shown: Sequence[int]
    structures: Sequence[ColouredStructure]


def render_scores(content: PageContent) -> str:
    """Render the page.

    Args:
        content: what it shows.

    Returns:
        The HTML text. It loads nothing from the network; its links are to files in its folder.
    """
    scores = content.scores
    name = scores.manifest.stem.removesuffix("_scores")
    what = "mutation" if scores.tables else "protein"
    facts = [
        f"Model: {scores.model}. {format_count(scores.num_scores, what)} of "
        f"{format_count(scores.num_proteins, 'protein')} scored, strategy {scores.strategy}."
        if scores.tables
        else f"Model: {scores.model}. {format_count(scores.num_scores, what)} scored, {scores.strategy}."
    ]
    sections: list[dict[str, Any]] = []
    verdict: list[str] = []
    if scores.assay is not None:
        recorded = scores.read_assay()
        summary = recorded["summary"]
        compared = recorded["assays"][0] if summary is None else summary
        verdict = [_judge(recorded)]
        facts[:0] = [" ".join(f"{sentence[:1].upper()}{sentence[1:]}" for sentence in compared["verdict"])]
        sections += _build_assays(scores, recorded)
    if scores.tables is None:
        verdict, sections = _describe_proteins(scores)
    else:
        described = describe_model(scores, content.shown)
        facts[1:1] = [" ".join(described)] if verdict else []
        verdict = verdict or described
        if scores.num_proteins > 1:
            sections.append(_build_index(content))
        rows = _read_variants(scores, [content.names[index] for index in content.shown])
        for index in content.shown:
            sections += _build_protein(content, index, rows)
    if content.structures:
        sections.append(_build_structures(content.structures))
    sections.append({"title": "How the scores are defined", "text": DEFINITIONS[scores.strategy]})
    sections.append(_build_files(scores, content.structures))
    style, script = ((TEMPLATES / file).read_text(encoding="utf-8") for file in ("cells.css", "cells.js.j2"))
    return render_page(f"Scores of {name}", " ".join(verdict), facts, sections, style=style, script=script)


def _judge(recorded: Mapping[str, Any]) -> str:
    """Write in one sentence without numbers whether the scores agree with the measured values."""
    summary = recorded["summary"]
    if summary is not None:
        count = sum(bool(assay["better_baselines"]) for assay in recorded["assays"])
        total = len(recorded["assays"])
        return (
            f"A baseline without a model predicts the measured values better in {count} of {total} assays."
            if count
            else f"No baseline without a model predicts the measured values better in any of the {total} assays."
        )
    (assay,) = recorded["assays"]
    spearman = assay["rows"][MODEL]["spearman"]
    if better := assay["better_baselines"]:
        names = " and ".join(filter(None, [", ".join(_name_row(name) for name in better[:-1]), _name_row(better[-1])]))
        sentence = f"{names} {'predicts' if len(better) == 1 else 'predict'} the measured values better than the model."
        return f"{sentence[:1].upper()}{sentence[1:]}"
    low = spearman["value"] if spearman["low"] is None else spearman["low"]  # a perfect correlation has no interval
    if low is None or low <= 0:
        return "The scores show no positive correlation with the measured values."
    close = [name for name, row in assay["model_minus_baseline"].items() if (row["spearman"]["low"] or 0) <= 0]
    if close:
        return "The scores agree with the measured values, but a baseline without a model may do as well."
    return "The scores agree with the measured values, better than every baseline without a model."


def _name_row(row: str) -> str:
    return "the model" if row == MODEL else BASELINE_NAMES.get(row, row)


def describe_model(scores: Scores, shown: Sequence[int] | None = None) -> list[str]:
    """Write in sentences how well the model knows the proteins, and what it makes of their mutations.

    With masked marginals, the model guesses each residue from its context. That is compared with the frequencies of
    the residues in the same protein, which need no model.

    Args:
        scores: the run.
        shown: indices of the proteins that are read. None: all.

    Returns:
        Sentences.
    """
    chosen = list(range(scores.num_proteins) if shown is None else shown)
    of_proteins = "the protein" if len(chosen) == 1 else f"the first {len(chosen)} proteins"
    if len(chosen) == scores.num_proteins > 1:
        of_proteins = f"the {len(chosen)} proteins"
    below = total = hits = residues = 0
    log_likelihood = by_frequency = common = 0.0
    for index in chosen:
        sequence = scores.sequence(index)
        mutants_TA = drop_wild_type(scores.table(index), sequence)
        below += int((mutants_TA < 0).sum())
        total += int(np.isfinite(mutants_TA).sum())
        if scores.strategy != "masked-marginals":
            continue
        log_prob_TA = scores.log_probabilities(index)
        places = [
            place
            for place, letter in enumerate(sequence)
            if letter in STANDARD_RESIDUES and np.isfinite(log_prob_TA[place]).all()
        ]
        if not places:
            continue
        codes_K = np.array([STANDARD_RESIDUES.index(sequence[place]) for place in places])
        hits += int((log_prob_TA[places].argmax(1) == codes_K).sum())
        log_likelihood += float(log_prob_TA[places, codes_K].sum(dtype=np.float64))
        counts = np.array(list(Counter(codes_K.tolist()).values()))
        by_frequency += float((counts * np.log(counts / counts.sum())).sum())
        common += counts.max()
        residues += len(places)
    sentences = []
    if residues >= NUM_STANDARD:
        own, frequency = (float(np.exp(-value / residues)) for value in (log_likelihood, by_frequency))
        numbers = (
            f"it guesses {hits / residues:.0%} of the hidden residues (always the most frequent one: "
            f"{common / residues:.0%}), with a pseudo-perplexity of {own:.1f} (the protein's own residue frequencies: "
            f"{frequency:.1f})"
        )
        if own < 0.75 * frequency:
            sentences.append(f"The model knows {of_proteins}: {numbers}.")
        elif own < frequency:
            sentences.append(f"The model knows a little about {of_proteins}: {numbers}. Read its scores with care.")
        else:
            sentences.append(
                f"The model does not know {of_proteins} better than residue frequencies do: {numbers}. Its scores say "
                "which residues are rare, and little about this place."
            )
    if total:
        sentences.append(f"It prefers the wild type to {below / total:.0%} of the {total:,} substitutions computed.")
    return sentences


def _number(value: float | None, digits: int = 2) -> dict[str, Any]:
    """Build a cell with a number; a minus is one."""
    missing = value is None or not np.isfinite(value)
    return {"text": "" if missing else f"{value:.{digits}f}".replace("-", "−"), "number": True}


def _build_index(content: PageContent) -> dict[str, Any]:
    """Build the list of proteins, with links to those that have a heat map."""
    scores, shown = content.scores, set(content.shown)
    rows = []
    names = content.names
    for index, name in enumerate(names[:MAX_LISTED]):
        log_odds_TA, sequence = scores.table(index), scores.sequence(index)
        mutants_TA = drop_wild_type(log_odds_TA, sequence)
        mean = float(np.nanmean(mutants_TA)) if np.isfinite(mutants_TA).any() else None
        link = {"link": f"#protein-{index}"} if index in shown else {}
        cells = [{"text": name, **link}, {"text": f"{len(sequence):,}", "number": True}, _number(mean)]
        rows.append({"cells": cells})
    listed = f" The first {MAX_LISTED} are listed." if len(names) > MAX_LISTED else ""
    drawn = f" The first {len(shown)} have a heat map below." if len(shown) < len(names) else ""
    text = f"{format_count(len(names), 'protein')}.{listed}{drawn} The files at the end have all of them."
    headers = build_headers(["protein", "residues", "mean score of its substitutions"])
    return {"title": "Proteins", "text": text, "table": {"headers": headers, "rows": rows}}


def _build_protein(content: PageContent, index: int, rows: Mapping[str, list[dict[str, str]]]) -> list[dict[str, Any]]:
    """Build the sections of a protein: heat map, entropy, positions and variants."""
    scores, offset = content.scores, content.offset
    name, sequence, log_odds_TA = content.names[index], scores.sequence(index), scores.table(index)
    of_name = f"{name}: " if scores.num_proteins > 1 else ""
    size = format_count(len(sequence), "residue")
    map_section = {
        "title": f"{of_name}Heat map" if of_name else f"Heat map of {name}",
        "anchor": f"protein-{index}",
        "text": f"{size}. A dot marks the wild type, grey cells were not scored, and the strip above a row is the mean "
        "of the position. Point at a cell, or tap it, to read its score.",
        "figures": [build_heat_map(log_odds_TA, sequence, offset, f"Heat map of the substitutions of {name}, {size}")],
    }
    entropy_T = scores.entropy(index) if scores.strategy in ENTROPY_STRATEGIES else None
    sections = [map_section]
    if entropy_T is not None and np.isfinite(entropy_T).sum() > 1:
        caption = (
            "Entropy of the model's guess at each position, from 0 (certain) to 3.0 (all residues equally probable)."
        )
        figure = build_figure(lambda: draw_entropy(entropy_T, offset), f"Entropy along {name}", caption)
        sections.append({"title": f"{of_name}How certain the model is", "figures": [figure]})
    positions = _list_positions(log_odds_TA, sequence, entropy_T, offset)
    if positions:
        sections.append({"title": f"{of_name}Most and least tolerated positions", "table": positions})
    if rows.get(name):
        sections.append({"title": f"{of_name}Highest and lowest scores", "table": _list_variants(rows[name])})
    return sections


def build_heat_map(log_odds_TA: np.ndarray, sequence: str, offset: int, alt: str, caption: str = "") -> dict[str, str]:
    """Build the heat map as a figure of a page whose script shows the score of the cell under the pointer.

    Args:
        log_odds_TA: (T, 20) scores.
        sequence: the wild type.
        offset: what is added to the number of a residue.
        alt: alternative text.
        caption: text below the figure.

    Returns:
        The template's variables: html and caption.
    """
    with mpl.rc_context({"text.parse_math": False}):
        html = render_figure(draw_substitutions(log_odds_TA, sequence, offset), alt)
    rows = Layout.fit(log_odds_TA).rows
    start, stop = rows[0].start, rows[-1].stop
    cells_TA = np.round(CELL_SCALE * np.asarray(log_odds_TA[start:stop], dtype=np.float64))
    cells_TA = np.where(np.isfinite(cells_TA), np.clip(cells_TA, NO_CELL + 1, -NO_CELL - 1), NO_CELL)
    data = {
        "sequence": sequence[start:stop],
        "residues": STANDARD_RESIDUES,
        "order": ORDER,
        "first": start + 1 + offset,
        "rows": [[row.start - start, row.stop - start] for row in rows],
        "image": CELLS_ID,
        "scale": CELL_SCALE,
        "missing": NO_CELL,
        "scores": b64encode(cells_TA.astype("<i2").tobytes()).decode(),
    }
    text = json.dumps(data).replace("<", "\\u003c")
    return {
        "html": f'<div class="cells">{html}<script type="application/json">{text}</script></div>',
        "caption": caption,
    }


def _list_positions(
    log_odds_TA: np.ndarray, sequence: str, entropy_T: np.ndarray | None, offset: int
) -> dict[str, Any] | None:
    """Build the table of the positions with the highest and the lowest means; None if too few have all scores."""
    mutants_TA = drop_wild_type(log_odds_TA, sequence)
    complete = np.flatnonzero(np.isfinite(mutants_TA).sum(1) >= NUM_STANDARD - 1)
    if len(complete) < 2:
        return None
    mean_T = average_substitutions(log_odds_TA, sequence)
    order = complete[np.argsort(-mean_T[complete], kind="stable")]
    count = min(MAX_POSITIONS, len(order) // 2)
    rows = []
    for place in [*order[:count], *order[-count:]]:
        best, worst = (int(choose(mutants_TA[place])) for choose in (np.nanargmax, np.nanargmin))
        label = f"{sequence[place]}{place + 1 + offset}"
        cells = [{"text": label}, _number(mean_T[place])]
        cells += [] if entropy_T is None else [_number(entropy_T[place])]
        cells += [
            {"text": f"{label}{STANDARD_RESIDUES[code]} ({_number(mutants_TA[place, code])['text']})"}
            for code in (best, worst)
        ]
        rows.append({"cells": cells, "marked": False})
    names = ["position", "mean score"] + ([] if entropy_T is None else ["entropy"])
    headers = [*build_headers(names), *build_headers(["best substitution", "worst substitution"], 9)]
    caption = f"The {format_count(count, 'position')} with the highest mean score, the highest first, and the {count} "
    caption += "with the lowest, the lowest last."
    return {"headers": headers, "rows": rows, "caption": caption}


def _read_variants(scores: Scores, names: Sequence[str]) -> dict[str, list[dict[str, str]]]:
    """Read the rows of some proteins with the highest and the lowest scores, in one pass over the table."""
    found: dict[str, list[dict[str, str]]] = {name: [] for name in names}
    with open(scores.scores, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter=DELIMITERS[scores.scores.suffix]):
            if row["protein"] in found:
                found[row["protein"]].append(row)
    for name, rows in found.items():
        rows.sort(key=lambda row: -float(row["score"]))
        count = min(MAX_VARIANTS, len(rows) // 2) if len(rows) > 1 else 1
        found[name] = rows if len(rows) <= 2 * count else [*rows[:count], *rows[-count:]]
    return found


def _list_variants(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    has_notes = any(row["note"] for row in rows)
    table = [
        {
            "cells": [
                {"text": row["mutation"]},
                _number(float(row["score"])),
                {"text": row["rank"], "number": True},
                {"text": row["wild_type_probability"].replace(":", " : "), "number": True},
                {"text": row["mutant_probability"].replace(":", " : "), "number": True},
                *([{"text": row["note"]}] if has_notes else []),
            ]
        }
        for row in rows
    ]
    headers = build_headers(["mutation", "score", "rank", "probability of the wild type", "of the mutant"])
    headers += build_headers(["note"], 9) if has_notes else []
    caption = "Of the variants that were asked for; the table of the run has all of them."
    return {"headers": headers, "rows": table, "caption": caption}


def _describe_proteins(scores: Scores) -> tuple[list[str], list[dict[str, Any]]]:
    """Write the verdict and the sections of a run that scored whole proteins."""
    with open(scores.scores, encoding="utf-8", newline="") as file:
        rows = [
            row for row in csv.DictReader(file, delimiter=DELIMITERS[scores.scores.suffix]) if row["pseudo_perplexity"]
        ]
    rows.sort(key=lambda row: float(row["pseudo_perplexity"]))
    if not rows:
        return ["No protein has a residue that can be scored."], []
    values = np.array([float(row["pseudo_perplexity"]) for row in rows])
    most, least = rows[0], rows[-1]
    verdict = [f"{most['protein']} has a pseudo-perplexity of {values[0]:.1f} (1: certain, 20: a uniform guess)."]
    if len(rows) > 1:
        verdict = [
            f"The model finds {most['protein']} the most natural, with a pseudo-perplexity of {values[0]:.1f}, and "
            f"{least['protein']} the least, with {values[-1]:.1f} (1: certain, 20: a uniform guess)."
        ]
    if scores.mean_error is not None:
        verdict.append(
            f"These are estimates: on a sample, the mean log-likelihood differs from the exact one by "
            f"{scores.mean_error:.3f} on average."
        )
    sections = []
    if len(rows) > 2:
        figure = build_figure(
            lambda: _draw_perplexities(values),
            f"Histogram of the pseudo-perplexity of {len(rows)} proteins",
            f"Pseudo-perplexity of {format_count(len(rows), 'protein')}; the median is {np.median(values):.1f}.",
        )
        sections.append({"title": "All proteins", "figures": [figure]})
    table = [
        {
            "cells": [
                {"text": row["protein"]},
                {"text": f"{int(row['residues']):,}", "number": True},
                _number(float(row["mean_log_likelihood"]), 3),
                _number(float(row["pseudo_perplexity"])),
            ]
        }
        for row in rows[:MAX_LISTED]
    ]
    headers = build_headers(["protein", "residues", "mean log-likelihood", "pseudo-perplexity"])
    note = f"The first {MAX_LISTED} of {len(rows):,}. " if len(rows) > MAX_LISTED else ""
    caption = f"{note}The most natural protein first."
    sections.append({"title": "Proteins", "table": {"headers": headers, "rows": table, "caption": caption}})
    return verdict, sections


def _draw_perplexities(values: np.ndarray) -> Axes:
    ax = plots.prediction_histogram(values)
    ax.get_legend().remove()
    ax.set(xlabel="pseudo-perplexity")
    return ax


def _build_assays(scores: Scores, recorded: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Build the sections of the comparison with measured values."""
    sections = []
    if recorded["summary"] is not None:
        summary = recorded["summary"]
        title = f"Averages over {summary['num_assays']} assays of {format_count(summary['num_proteins'], 'protein')}"
        text = "Averaged over the assays of a protein, then over proteins, as in ProteinGym."
        sections.append(_build_comparison(title, summary["averages"], summary.get("published") or {}, text))
    values = read_measured(scores)
    for assay in recorded["assays"][:MAX_ASSAYS]:
        variants = format_count(assay["num_variants"], "variant")
        text = " ".join(assay["verdict"]) if recorded["summary"] is not None else ""
        section = _build_comparison(
            f"Measured values: {assay['assay']}", assay["rows"], assay.get("published_spearman") or {},
            f"{variants} with a measured value. {text}",
        )  # fmt: skip
        measured_N, score_N = values[assay["assay"]]
        spearman = Interval(*(np.nan if end is None else end for end in assay["rows"][MODEL]["spearman"].values()))
        section["figures"].append(
            build_figure(
                lambda measured_N=measured_N, score_N=score_N, spearman=spearman: draw_measured(
                    measured_N, score_N, spearman
                ),
                f"Measured values and scores of {variants}",
                "Measured values against scores. Dashed line: as the wild type.",
            )
        )
        sections.append(section)
    if len(recorded["assays"]) > MAX_ASSAYS:
        names = [assay["assay"] for assay in recorded["assays"][MAX_ASSAYS:]]
        text = f"The page shows the first {MAX_ASSAYS} of {len(recorded['assays'])} assays; {len(names)} more are in "
        sections.append({"title": "Other assays", "text": f"{text}the JSON file of the comparison."})
    return sections


def _build_comparison(title: str, rows: Mapping[str, Any], published: Mapping[str, float], text: str) -> dict[str, Any]:
    """Build a section with the model and the baselines, as a chart of Spearman and as a table of all metrics."""
    outside = {f"ProteinGym: {SHORT_NAMES.get(name, name)}": value for name, value in published.items()}
    spoken = "; ".join(
        f"{_name_row(name)} {_or_nan(row['spearman']['value']):.2f}" for name, row in rows.items() if "spearman" in row
    )
    caption = "Spearman of the model (blue) and of baselines without a model. Bars: 95% intervals from a bootstrap."
    caption += " Diamonds: ProteinGym's published values of ESM-2." if outside else ""
    figure = build_figure(lambda: chart_assay(rows, outside), f"Spearman with the measured values: {spoken}", caption)
    metrics = [metric for metric in METRIC_NAMES if any(metric in row for row in rows.values())]
    table = [
        {
            "marked": row == MODEL,
            "cells": [{"text": _name_row(row)}, *(_format_metric(rows[row].get(metric)) for metric in metrics)],
        }
        for row in rows
    ]
    headers = build_headers(["", *(METRIC_NAMES[metric] for metric in metrics)])
    return {"title": title, "text": text, "table": {"headers": headers, "rows": table}, "figures": [figure]}


def chart_assay(rows: Mapping[str, Any], published: Mapping[str, float] | None = None) -> Axes:
    """Plot the Spearman of the model and the baselines.

    Args:
        rows: model or baseline -> metric -> value, low, high.
        published: name -> published Spearman.

    Returns:
        The axes.
    """
    listed = {_name_row(name): row["spearman"] for name, row in rows.items() if "spearman" in row}
    ends = [[_or_nan(found[end]) for found in listed.values()] for end in Interval._fields]
    return plots.scores_with_baselines(list(listed), *ends, "Spearman", [_name_row(MODEL)], published, on="")


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _format_metric(found: Mapping[str, float | None] | None) -> dict[str, Any]:
    cell = _number(None if found is None else found["value"], 3)
    if found is not None and found.get("low") is not None:
        cell["small"] = f"[{found['low']:.3f}, {found['high']:.3f}]".replace("-", "−")
    return cell


def read_measured(scores: Scores) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read the measured values and the scores of each assay.

    Args:
        scores: a run that was compared with measured values.

    Returns:
        Assay -> (N,) measured values and (N,) scores of the variants that have a value.
    """
    assert scores.assay is not None
    found: dict[str, tuple[list[float], list[float]]] = {}
    path = scores.assay.with_suffix(scores.scores.suffix)
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter=DELIMITERS[path.suffix]):
            if row["measured"]:
                measured, own = found.setdefault(row["assay"], ([], []))
                measured.append(float(row["measured"]))
                own.append(float(row["score"]))
    return {name: (np.array(measured), np.array(own)) for name, (measured, own) in found.items()}


def _build_structures(structures: Sequence[ColouredStructure]) -> dict[str, Any]:
    """Build the section with the coloured structures and the commands that open them."""
    by = structures[0].colour_by
    entropy = by == "entropy"
    colours = "from blue (certain) to orange (uncertain)" if entropy else "from orange (low) over white (0) to blue"
    lines = []
    for each in structures:
        chains = ", ".join(f"chain {chain}: {protein}" for chain, protein in each.chains.items())
        lines += [f"# {each.path.name} ({chains})"]
        lines += [f"{command}    # {program}" for program, command in each.commands.items()]
    return {
        "title": "Structure",
        "text": f"The column of B factors has the {COLOUR_NAMES[by]}, {colours}; atoms without a score have 0.",
        "links": [_link(each.path) for each in structures],
        "code": "\n".join(lines),
        "summary": "How to open it in PyMOL and ChimeraX",
    }


def _link(path: Path) -> dict[str, str]:
    return {"text": path.name, "address": quote(path.name)}


def _build_files(scores: Scores, structures: Sequence[ColouredStructure]) -> dict[str, Any]:
    """Build the section with links to the files of the run, which are in the folder of the page."""
    shown = {each.path for each in structures}
    files = [path for path in scores.files if path not in shown and os.path.exists(path)]
    return {"title": "Files", "links": [_link(path) for path in files]}
