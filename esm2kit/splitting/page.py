"""The page of a leakage report."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from esm2kit import plots
from esm2kit.core.numbers import format_count
from esm2kit.pages import build_figure, build_headers, render_page

MAX_ROWS = 20  # of the nearest proteins
MAX_CLASSES = 15
QUANTILES = ("median", "quantile_90", "highest")


def render_leakage_page(report: Mapping[str, Any]) -> str:
    """Render the page of a leakage report.

    Args:
        report: its content, as in `leakage.json`.

    Returns:
        The HTML text.
    """
    settings = report["settings"]
    sections = [
        _show_nearest(report),
        _show_sets(report),
        *([_show_labels(report)] if report["labels"] else []),
        _show_groups(report),
        _list_nearest(report),
        {
            "title": "Settings",
            "code": json.dumps(settings, indent=1),
            "summary": "All settings",
        },
    ]
    return render_page(
        f"Leakage of {report['name']}", report["summary"]["verdict"], report["notes"], sections, report["warnings"]
    )


def _show_nearest(report: Mapping[str, Any]) -> dict[str, Any]:
    identity, nearest = report["settings"]["identity"], report["nearest_summary"]
    shares = {
        {"split": "this split", "random": "a random split of the same sizes"}[name]: [
            count / max(each["held_out"], 1) for count in each["histogram"]
        ]
        for name, each in nearest.items()
    }
    figure = build_figure(
        lambda: plots.identity_histogram(shares, identity),
        f"Histogram of the identity of held-out proteins to their nearest training protein; {identity:.0%} or more: "
        + "; ".join(
            f"{each['similar']:,} of {each['held_out']:,} in the {name} split" for name, each in nearest.items()
        ),
        "Identity of each held-out protein to its nearest training protein. Proteins at 0% have none that is similar "
        "beyond chance.",
    )
    rows = [
        {
            "cells": [
                {"text": {"split": "this split", "random": "random split of the same sizes"}[name]},
                *(
                    {"text": text, "number": True}
                    for text in (
                        f"{each['held_out']:,}", f"{each['similar']:,}", f"{each['full_identity']:,}",
                        f"{each['without_nearest']:,}",
                        *(f"{each[name]:.0%}" if each[name] else "none" for name in QUANTILES),
                    )
                ),
            ],
            "marked": name == "split",
        }
        for name, each in nearest.items()
    ]  # fmt: skip
    names = ["", "held-out proteins", f"identity of {identity:.0%} or more", "identity of 100%", "none nearby"]
    names += ["median identity", "90% quantile", "highest"]
    return {
        "title": "Identity to the nearest training protein",
        "figures": [figure],
        "table": {"headers": build_headers(names), "rows": rows},
    }


def _show_sets(report: Mapping[str, Any]) -> dict[str, Any]:
    word = "fold" if report["is_folds"] else "set"
    rows = [
        [each["name"], f"{each['proteins']:,}", f"{each['share']:.1%}", f"{each['sequences']:,}", f"{each['groups']:,}"]
        for each in report["sets"]
    ]
    repeated = report["duplicates"]
    text = "No sequence occurs twice."
    if repeated["sequences"]:
        where = f"{format_count(repeated['in_several_sets'], 'sequence')} of them in several {word}s"
        verb = "occurs" if repeated["sequences"] == 1 else "occur"
        text = f"{format_count(repeated['sequences'], 'sequence')} {verb} more than once, {where}."
    return {
        "title": f"{word.capitalize()}s",
        "text": text,
        "table": _build_table([word, "proteins", "share", "different sequences", "groups"], rows),
    }


def _show_labels(report: Mapping[str, Any]) -> dict[str, Any]:
    labels, column = report["labels"], report["label_column"]
    if "classes" in labels[0]:
        total: dict[str, int] = {}
        for each in labels:
            for name, count in each["classes"].items():
                total[name] = total.get(name, 0) + count
        names = sorted(total, key=lambda name: (-total[name], name))
        rows = [
            [name, *(f"{each['classes'].get(name, 0) / max(each['labelled'], 1):.1%}" for each in labels)]
            for name in names[:MAX_CLASSES]
        ]
        more = f"The {MAX_CLASSES} most frequent of {len(names)} classes." if len(names) > MAX_CLASSES else ""
        text = f"Share of each class of {column}. {more}".strip()
        return {
            "title": "Labels",
            "text": text,
            "table": _build_table(["class", *(each["name"] for each in labels)], rows),
        }
    rows = []
    for each in labels:
        numbers = [*each.get("quantiles", ()), each["mean"]] if "mean" in each else []
        rows.append([each["name"], f"{each['labelled']:,}", *(f"{number:.4g}" for number in numbers)])
    names = ["", "with a value", "10% quantile", "median", "90% quantile", "mean"]
    return {"title": "Labels", "text": f"Values of {column}.", "table": _build_table(names, rows)}


def _show_groups(report: Mapping[str, Any]) -> dict[str, Any]:
    groups = report["groups"]
    rows = [
        [
            f"{each['least']:,}" if each["least"] == each["most"] else f"{each['least']:,} to {each['most']:,}",
            f"{each['groups']:,}",
            f"{each['proteins']:,}",
        ]
        for each in groups["sizes"]
    ]
    text = f"{format_count(groups['groups'], 'group')} of similar proteins; the largest has "
    text += f"{format_count(groups['largest'], 'protein')}."
    if groups["in_several_sets"]:
        text += f" {format_count(groups['in_several_sets'], 'group')} in several sets."
    return {"title": "Groups", "text": text, "table": _build_table(["proteins of a group", "groups", "proteins"], rows)}


def _list_nearest(report: Mapping[str, Any]) -> dict[str, Any]:
    found = sorted(report["nearest"], key=lambda each: -each["identity"])[:MAX_ROWS]
    rows = [
        [each["id"], each["set"], each["nearest"] or "none", f"{each['identity']:.1%}", f"{each['coverage']:.0%}"]
        for each in found
        if each["nearest"]
    ]
    text = "No held-out protein has a training protein that is similar beyond chance."
    if rows:
        text = f"The {format_count(len(rows), 'held-out protein')} closest to a training protein. leakage.json has all."
    table = _build_table(["held-out protein", "set", "nearest training protein", "identity", "coverage"], rows, 3)
    return {
        "title": "Nearest pairs",
        "text": text,
        **({"table": table} if rows else {}),
    }


def _build_table(names: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 1) -> dict[str, Any]:
    cells = [
        {"cells": [{"text": text, "number": place >= numbers_from} for place, text in enumerate(row)]} for row in rows
    ]
    return {"headers": build_headers(names, numbers_from), "rows": cells}
