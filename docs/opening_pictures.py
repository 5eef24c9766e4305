"""Write the picture at the top of the notebooks, from the artefacts of a finished run of all notebooks.

`python docs/opening_pictures.py papermill_runs/RUN` draws the pictures of 00, 01 and 04 to 07. Each becomes an
attachment of the notebook's first cell, so that it travels with the file.
"""

import base64
import json
import sys
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from esm2kit import ClusterIndex, Report, Scores, SequenceStore, draw_sample, plots
from esm2kit.benchmarking.report import display_name, metric_name
from esm2kit.notebook import diagrams
from esm2kit.notebook.display import score_chart
from esm2kit.notebook.predictions import strip_chart
from esm2kit.notebook.records import FIGURE_WIDTH
from esm2kit.scoring.pictures import draw_substitutions

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
COLOURS, DPI = 64, 150
NAMES = {"probe": "the model's vectors", "untrained": "an untrained model"}
TASK = "secondary_structure_pdb"


def draw_members(artefacts: Path) -> Figure:
    """The members of the largest cluster that its first 12 epochs sample, as notebook 01 draws them."""
    dataset = artefacts / "dataset"
    train, index = SequenceStore.open(dataset / "train.arrow"), ClusterIndex.open(dataset)
    largest = int(index.num_members().argmax())
    rows = [draw_sample(0, epoch, largest, index, train.num_residues, 1022).row for epoch in range(12)]
    members = index.members(largest)
    return diagrams.sampled_members(members, rows, [train.id(row) for row in members]).figure


def draw_scores(artefacts: Path) -> Figure:
    """The score chart of notebook 04."""
    return score_chart(Report.read(artefacts / "benchmark" / TASK / "report.json")).figure


def draw_strip(artefacts: Path) -> Figure:
    """The strip of notebook 05."""
    return strip_chart(Report.read(artefacts / "finetune" / TASK / "report.json")).figure


def draw_layouts(artefacts: Path) -> Figure:
    """The curves of notebook 06."""
    names = {"one_device": "1 device, 2 micro-batches", "2_devices": "2 devices, DDP", "larger": "twice the batch: 16"}
    curves = {}
    for folder, name in names.items():
        (path,) = (artefacts / "know_how").glob(f"*_{folder}/metrics.csv")
        rows = pd.read_csv(path).dropna(subset="train_loss")
        curves[name] = (rows.step, rows.train_loss)
    return diagrams.layouts_compared(curves, tuple(curves)[:2]).figure


def draw_story(artefacts: Path) -> Figure:
    """What the notebooks make: the perplexity of 02, the scores of 04 and the predictions of 05."""
    figure = plt.figure(figsize=(FIGURE_WIDTH, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[2.4, 1])
    left, right, below = (figure.add_subplot(place) for place in (grid[0, 0], grid[0, 1], grid[1, :]))
    pretrained = json.loads((artefacts / "pretrain" / "pretrain.json").read_text(encoding="utf-8"))
    validation = pd.read_csv(artefacts / "pretrain" / "metrics.csv").dropna(subset="val_perplexity")
    curve = {"validation": (validation.step, validation.val_perplexity)}
    plots.perplexity_curves(curve, pretrained["unigram_perplexity"], left, references={"uniform guess": 20})
    report = Report.read(artefacts / "benchmark" / TASK / "report.json")
    scored = [report.headline(row) for row in report.rows]
    columns = ([getattr(score, end) for score in scored] for end in ("value", "low", "high"))
    names = [NAMES.get(row.kind, display_name(row.name)) for row in report.rows]
    plots.scores_with_baselines(names, *columns, metric_name(report.task.metric), names[:1], ax=right)
    strip_chart(Report.read(artefacts / "finetune" / TASK / "report.json"), below)
    titles = {left: "02  train a model", right: "04  test what it knows", below: "05  predict: secondary structure"}
    for ax, title in titles.items():
        ax.set_title(title, loc="left", fontweight="bold", fontsize=11)
    return figure


def draw_scan(artefacts: Path) -> Figure:
    """The scores of all mutations of the protein of 07."""
    manifest = next(path for path in (artefacts / "scores").glob("*_scores.json") if path.stem != "structures_scores")
    scores = Scores.read(manifest)
    return draw_substitutions(scores.table(), scores.sequence())


PICTURES = {
    "00_start_here": ("story", draw_story),
    "01_preprocess": ("members", draw_members),
    "04_benchmark": ("scores", draw_scores),
    "05_finetune": ("strip", draw_strip),
    "06_know_how": ("layouts", draw_layouts),
    "07_score": ("scan", draw_scan),
}


def encode(figure: Figure) -> str:
    """The figure as PNG with few colours, in base64."""
    picture, small = BytesIO(), BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, facecolor="white", bbox_inches="tight", pad_inches=0.08)
    plt.close(figure)
    Image.open(picture).convert("RGB").quantize(COLOURS).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main(run: Path) -> None:
    """Replace the pictures of the notebooks."""
    plots.widen_figures(FIGURE_WIDTH)
    for notebook, (name, draw) in PICTURES.items():
        path = NOTEBOOKS / f"{notebook}.ipynb"
        content = json.loads(path.read_text(encoding="utf-8"))
        content["cells"][0]["attachments"] = {f"{name}.png": {"image/png": encode(draw(run / "artefacts"))}}
        text = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True)
        path.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
