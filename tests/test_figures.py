"""Figures as SVG: no label of any plot leaves its canvas, and colours follow the page."""

import inspect
import io
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

from esm2kit import plots
from esm2kit.embedding.draw_map import plot_map
from esm2kit.embedding.maps import Projection
from esm2kit.figures import render_figure, render_svg
from esm2kit.models.contacts import PairMap
from esm2kit.notebook import diagrams
from esm2kit.pages import build_figure, render_page
from esm2kit.scoring import pictures
from esm2kit.sequences.fasta import Record
from esm2kit.tasks.metrics import Interval

mpl.use("Agg")
LONG = "the average of a measurement with an unusually long name (in units of its own)"
NAMES = [f"{number} Sulfolobus islandicus strain M.14.25, Kamchatka" for number in range(4)]
GENERATOR = np.random.default_rng(0)
PROJECTION = Projection(GENERATOR.normal(size=(40, 2)), (LONG, LONG), 0.5)
PAIRS = PairMap(np.eye(30), np.eye(30), {"distance": 0.1, "residues": 0.1, "both": 0.2}, True, (0.0, 1.0))
CURVES = {NAMES[0]: ([1, 2], [3.0, 2.9]), NAMES[1]: ([1, 2], [2.8, 2.5])}
XY_P2 = GENERATOR.normal(size=(40, 2))
SQUARE = GENERATOR.random(size=(30, 30))
SCORES = ([0.6, np.nan, 0.4, 0.3], [0.5, np.nan, 0.3, 0.2], [0.7, np.nan, 0.5, 0.4])
# name -> the figure with the longest labels that its arguments allow
FIGURES: dict[str, Callable[[], Axes]] = {
    "length_histogram": lambda: plots.length_histogram(np.array([30, 90_000, 123_456_789]), max_residues=123_456_000),
    "cluster_size_histogram": lambda: plots.cluster_size_histogram(2 ** np.arange(24)),
    "loss_curves": lambda: plots.loss_curves(CURVES, unigram_baseline=2.89),
    "perplexity_curves": lambda: plots.perplexity_curves(CURVES, unigram_baseline=18.16),
    "embedding_scatter": lambda: plots.embedding_scatter(XY_P2, NAMES * 10, LONG, LONG, axes=(LONG, LONG)),
    "neighbours_on_map": lambda: plots.neighbours_on_map(XY_P2, 3, [5, 7, 9, 11], NAMES, (LONG, LONG)),
    "scores_with_baselines": lambda: plots.scores_with_baselines(
        NAMES, *SCORES, LONG, NAMES[:1], {"a published model with a long name": 0.5}
    ),
    "heat_map": lambda: plots.heat_map(GENERATOR.normal(size=(4, 4)), LONG, LONG, LONG, NAMES, NAMES, 0.0),
    "confusion_matrix": lambda: plots.confusion_matrix(np.full((4, 4), 123_456_789), NAMES),
    "identity_histogram": lambda: plots.identity_histogram({LONG: [0.5, 0.5], NAMES[0]: [0.1, 0.9]}, 0.3),
    "confused_pairs": lambda: plots.confused_pairs([(NAMES[0], NAMES[1], 12), (NAMES[2], NAMES[3], 9)]),
    "predicted_vs_true": lambda: plots.predicted_vs_true(*GENERATOR.normal(1e6, 1e3, size=(2, 90)), unit=LONG),
    "reliability_diagram": lambda: plots.reliability_diagram(
        {"probabilities of the model": [(0.3, 0.2, 1.0)], "with the temperature 0.123 (not used)": [(0.4, 0.3, 1.0)]}
    ),
    "predicted_with_intervals": lambda: plots.predicted_with_intervals(
        *GENERATOR.normal(1e6, 1e3, size=(2, 90)), np.full(90, 900.0), unit=LONG
    ),
    "coverage_curve": lambda: plots.coverage_curve([0.05, 0.95], [0.0, 1.0], 0.9),
    "layer_curves": lambda: plots.layer_curves(
        {name: np.array([[0, 0.1, 0.0, 0.2], [6, 0.5, 0.4, 0.6]]) for name in NAMES},
        LONG,
        (NAMES[0], 6),
        (0.5, 0.3, 0.7),
    ),
    "fold_scores": lambda: plots.fold_scores(np.array([[0.1, np.nan, 0.3, 0.4]]), NAMES, (0.3, 0.1, 0.5), LONG),
    "label_scores": lambda: plots.label_scores(
        dict(zip(NAMES, [1.0, 0.9, 0.5, 0.0], strict=True)), dict.fromkeys(NAMES, 123_456_789)
    ),
    "prediction_histograms": lambda: plots.prediction_histograms(
        {LONG: GENERATOR.normal(size=90)}, {LONG: {"mean": 0.0, "deviation": 1.0, "quantiles": [-1.0, 0.0, 1.0]}}
    ),
    "learning_curves": lambda: plots.learning_curves(
        np.geomspace(1e5, 1e-5, 9)[:, None], np.geomspace(1e5, 1e-2, 9)[:, None], [3]
    ),
    "contact_map": lambda: plots.contact_map(SQUARE, SQUARE.round(), LONG, boundaries=[12], title=LONG),
    "draw_substitutions": lambda: pictures.draw_substitutions(
        GENERATOR.normal(size=(120, 20)), "W" * 120, -9_999, LONG * 2
    ).axes[0],
    "draw_entropy": lambda: pictures.draw_entropy(GENERATOR.random(30), 100_000),
    "draw_measured": lambda: pictures.draw_measured(
        *GENERATOR.normal(1e6, 1e3, size=(2, 90)), Interval(-0.5, -0.55, -0.45)
    ),
    "pair_map": lambda: plots.pair_map(SQUARE, SQUARE.T, LONG, LONG, LONG),
    "by_separation": lambda: plots.by_separation(dict(zip(NAMES, GENERATOR.random((2, 90)), strict=False)), LONG),
    "prediction_histogram": lambda: plots.prediction_histogram(
        GENERATOR.normal(1e6, 1e3, 90), {"mean": 1e6, "deviation": 1e3, "quantiles": [9.9e5, 1e6, 1.1e6]}, LONG
    ),
    "class_counts": lambda: plots.class_counts(dict(zip(NAMES, [123_456_789, 3, 2, 1], strict=True)), what=LONG),
    "residue_track": lambda: plots.residue_track(
        {name: np.array([0, 1, 2, 3, 0]) for name in NAMES}, [f"a class with a long name, {name}" for name in NAMES]
    ),
    "story_diagram": diagrams.story_diagram,
    "residue_shares": lambda: diagrams.residue_shares({"M": 0.5, "A": 0.5}),
    "times_likelier": lambda: diagrams.times_likelier({"M": 12.5, "A": 0.5}),
    "guess_map": lambda: diagrams.guess_map(GENERATOR.normal(size=(60, 20)), "ACDEFGHIKLMNPQRSTVWY", "ACDEFG" * 10),
    "sampled_members": lambda: diagrams.sampled_members(np.arange(30), [3, 7, 29]),
    "schedule": lambda: diagrams.schedule([1e-9, 2e-9, 1e-9]),
    "layouts_compared": lambda: diagrams.layouts_compared(CURVES, (NAMES[0], NAMES[1])),
    "divisor_bias": lambda: diagrams.divisor_bias({name: [1e-7, 1e-2] for name in NAMES[:2]}, [1, 128]),
    "parallel_pictures": diagrams.parallel_pictures,
    "epoch_shares": lambda: diagrams.epoch_shares(np.array([900, 30, 1])),
    "protein_map": lambda: plot_map(PROJECTION, np.array(NAMES * 10), LONG),
    "neighbours": lambda: diagrams.neighbours(PROJECTION, 3, [5, 7], [Record(LONG, f"{LONG} {LONG}", "MKT")] * 40),
    "agreement": lambda: diagrams.agreement({NAMES[0]: (0.6, 0.5, 0.7), "chance": (0.3, np.nan, np.nan)}, LONG, True),
    "residue_vectors": lambda: diagrams.residue_vectors(GENERATOR.normal(size=(90, 50)), "ACDEFGHIKL" * 9),
    "residue_pairs": lambda: diagrams.residue_pairs(PAIRS, PAIRS, LONG),
    "member_counts": lambda: diagrams.member_counts([1_234_567, 1_300_000], 1e6, 1.5e6),
}


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def corners(element: ET.Element, style: str, transforms: list[Affine2D]) -> np.ndarray:
    """The four corners of a text in the coordinates of the picture, by the metrics of matplotlib's font."""
    text = "".join(element.itertext()).strip()
    (size,) = re.findall(r"font(?:-size)?:[^;]*?([\d.]+)px", style)
    box = TextPath((0, 0), text, size=float(size), prop=FontProperties("DejaVu Sans")).get_extents()
    # a formula has a position for each letter
    x, y = (float(element.get(name, "0").split()[0]) for name in ("x", "y"))
    shift = {"middle": box.width / 2, "end": box.width}.get((re.findall(r"text-anchor: (\w+)", style) or [""])[0], 0)
    points = np.array([[x - shift + dx, y - dy] for dx in (0, box.width) for dy in (box.y0, box.y1)])
    for transform in reversed(transforms):
        points = transform.transform(points)
    return points


def parse_transform(text: str) -> Affine2D:
    """The transform attribute of an SVG element."""
    found = Affine2D()
    for name, numbers in reversed(re.findall(r"(\w+)\(([^)]*)\)", text)):
        values = [float(number) for number in re.split(r"[ ,]+", numbers.strip())]
        if name == "rotate":
            found = found.rotate_deg_around(*(values[1:] or (0, 0)), values[0])
        elif name == "matrix":
            found = found + Affine2D.from_values(*values)
        elif name == "translate":
            found = found.translate(*values)
        else:
            assert name == "scale"
            found = found.scale(*values)
    return found


def texts_outside(svg: str) -> list[str]:
    """The texts of a picture that leave its viewBox by more than a third of a point."""
    root = ET.fromstring(svg.replace("xlink:href", "href"))
    left, top, width, height = map(float, root.get("viewBox", "").split())
    outside, count = [], 0

    def visit(element: ET.Element, style: str, transforms: list[Affine2D]) -> None:
        nonlocal count
        style += f"; {element.get('style', '')}"
        if element.get("transform"):
            transforms = [*transforms, parse_transform(element.get("transform", ""))]
        is_formula = element.tag.endswith("}text") and element.find("{*}tspan") is not None
        if element.tag.endswith(("}text", "}tspan")) and not is_formula and "".join(element.itertext()).strip():
            count += 1
            points = corners(element, style, transforms)
            low, high = np.array([left, top]) - 0.3, np.array([left + width, top + height]) + 0.3
            if (points < low).any() or (points > high).any():
                outside.append("".join(element.itertext()).strip())
        for child in element:
            visit(child, style, transforms)

    visit(root, "", [])
    assert count, "a picture without texts"
    return outside


def test_every_plot_is_tested() -> None:
    functions = {
        name
        for module in (plots, diagrams, pictures)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name[0] != "_"
        and function.__module__ == module.__name__
        and inspect.signature(function).return_annotation is Axes
    }
    assert functions <= set(FIGURES), "add the figure with its longest labels"


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_leaves_its_canvas(name: str) -> None:
    assert texts_outside(render_svg(FIGURES[name]().figure)) == []


def save_cropped(figure: Figure) -> str:
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def test_a_label_that_is_cut_off_is_found() -> None:
    """Counter-example: without the wider box, the labels of reports were cut off."""
    assert LONG + " on test (bar: 95% interval)" in texts_outside(
        save_cropped(FIGURES["scores_with_baselines"]().figure)
    )
    figure, ax = plt.subplots(figsize=(2, 2))
    ax.set_yticks([0], ["Eukaryota and Archaea"])
    assert texts_outside(save_cropped(figure)) == ["Eukaryota and Archaea"]


def test_dollars_are_text_and_powers_of_ten_are_formulas() -> None:
    svg = render_svg(plots.scores_with_baselines(["cost ($) of $5"], [1.0], [0.5], [2.0], "US$").figure)
    assert "cost ($) of $5" in svg
    svg = render_svg(FIGURES["learning_curves"]().figure)
    assert "mathdefault" not in svg
    assert "10−5" in re.sub(r"<[^>]+>|\s", "", svg), "the letters of a formula are single"


def test_colours_follow_the_page() -> None:
    svg = render_svg(plots.scores_with_baselines(["a", "b"], [1, 2], [0, 1], [2, 3], "accuracy", ["a"]).figure)
    assert "fill: currentColor" in svg.partition(">")[0], "text inherits the page's colour"
    assert "stroke: currentColor" in svg
    assert "#000000" not in svg
    assert f"var(--primary, {to_hex(plots.PRIMARY)})" in svg
    assert to_hex(plots.PRIMARY) not in svg.replace(f"var(--primary, {to_hex(plots.PRIMARY)})", "")
    assert "fill: #ffffff" not in svg, "no white paper"
    assert "--primary" in render_svg(plots.embedding_scatter(XY_P2, ["a"] * 40).figure)
    points = render_svg(plots.embedding_scatter(GENERATOR.normal(size=(2_001, 2)), ["a"] * 2_001).figure)
    assert "<image" in points
    assert "--primary" not in points, "the legend has the colour of the points, which are pixels"
    assert "<style" not in svg, "a style would change the page"


def test_a_figure_is_the_same_each_time_and_shares_no_id_with_another() -> None:
    ids = []
    for name in ("scores_with_baselines", "pair_map", "scores_with_baselines"):
        svg = render_svg(FIGURES[name]().figure)
        ids.append(set(re.findall(r'\bid="([^"]+)"', svg)))
        used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
        assert used
        assert used <= ids[-1]
    assert ids[0] == ids[2]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("name", ["scores_with_baselines", "draw_entropy", "residue_shares"])
def test_the_smallest_text_is_readable_at_the_least_width(name: str) -> None:
    svg = render_svg(FIGURES[name]().figure)
    points = float(re.search(r'width="([\d.]+)pt"', svg)[1])
    least = float(re.search(r"--least-width: (\d+)px", svg)[1])
    smallest = min(float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg))  # in the units of the view box
    assert smallest * least / points == pytest.approx(min(9.0, smallest * 4 / 3), abs=0.05)
    assert least <= points * 4 / 3 + 1, "no picture is enlarged"


def test_the_alternative_text_is_escaped_and_the_figure_closed() -> None:
    figure: Any = FIGURES["residue_shares"]().figure
    html = render_figure(figure, 'a "quoted" <text>')
    start = r'<div class="figure" id="figure-[0-9a-f]{10}" role="img" '
    assert re.match(start + 'aria-label="a &quot;quoted&quot; &lt;text&gt;" style="[^"]*"><svg', html)
    assert "var(--jp-content-font-color1, inherit)" in html, "JupyterLab's theme, or the page's"
    assert not plt.fignum_exists(figure.number)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
def test_a_narrow_page_scrolls_a_wide_picture_instead_of_shrinking_its_text(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    draw = FIGURES["scores_with_baselines"]
    sections = [{"title": "Scores", "figures": [build_figure(draw, "the scores", "A caption.")]}]
    (tmp_path / "page.html").write_text(render_page("Title", "Lead.", [], sections), encoding="utf-8")
    measure = """() => {
        const svg = document.querySelector("figure svg"), region = document.querySelector("figure .wide");
        const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
        const sizes = [...svg.querySelectorAll("text")].map((text) => parseFloat(getComputedStyle(text).fontSize));
        return {text: scale * Math.min(...sizes), page: document.documentElement.scrollWidth,
                inside: region.scrollWidth, shown: region.clientWidth, left: region.scrollLeft};
    }"""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        narrow = browser.new_page(viewport={"width": 420, "height": 700})
        narrow.goto((tmp_path / "page.html").as_uri())
        found = narrow.evaluate(measure)
        assert found["text"] == pytest.approx(9, abs=0.1)
        assert found["page"] <= 420, "only the picture scrolls"
        assert found["inside"] > found["shown"]
        narrow.keyboard.press("Tab")
        assert narrow.evaluate("document.activeElement.getAttribute('aria-label')") == "Figure: Scores"
        narrow.keyboard.press("ArrowRight")
        narrow.wait_for_function("document.activeElement.scrollLeft > 0")
        wide = browser.new_page(viewport={"width": 1200, "height": 700})
        wide.goto((tmp_path / "page.html").as_uri())
        found = wide.evaluate(measure)
        assert found["text"] > 13
        assert found["inside"] == found["shown"], "a wide page does not scroll it"
        browser.close()
