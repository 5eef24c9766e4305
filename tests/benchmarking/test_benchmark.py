"""The benchmark stage from FASTA to report: correct scores, resuming, and one-line errors."""

import dataclasses
import json
import re
import zipfile
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.errors import refused

from esm2kit.benchmarking import benchmark as stage
from esm2kit.benchmarking import hold_out
from esm2kit.benchmarking.baselines.fit import fit_baseline
from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.compare import compare
from esm2kit.benchmarking.config import BenchmarkConfig, CompareConfig
from esm2kit.benchmarking.output import format_folder_name, move_earlier_report, write_report
from esm2kit.benchmarking.report import SCHEMA, Metric, Report, format_comparison
from esm2kit.benchmarking.scores import ScoredModel, build_interval_notes, score_fitted
from esm2kit.cli.main import main
from esm2kit.core.checksums import read_sealed_json, write_sealed_json
from esm2kit.core.errors import InputError
from esm2kit.core.files import to_json
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.embed import embed
from esm2kit.models.checkpoint import write_checkpoint
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.tasks.data import load_task
from esm2kit.tasks.flip import TASKS
from esm2kit.tasks.metrics import Interval, sample_counts
from esm2kit.tasks.task import Split

LETTERS = np.array(list("ACDEFGHIKLMNPQRSTVWY"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Write an esm2kit checkpoint of a small model with random weights."""
    config = ESM2Config(2, 32, 4)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    state = ESM2.initialised(config, 3).state_dict()
    write_checkpoint(
        path, {f"model.{k}": v for k, v in state.items()}, {"model": dataclasses.asdict(config), "step": 0}
    )
    return str(path)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Write three tasks: a value (fraction of W), a class (the enriched residue) and a residue class."""
    folder, generator = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    sets = ["SET=train VALIDATION=False"] * 60 + ["SET=train VALIDATION=True"] * 20 + ["SET=test VALIDATION=False"] * 40
    value, classes, labels, sequences = [], [], [], []
    for i, chosen in enumerate(sets):
        letters = generator.choice(LETTERS, generator.integers(20, 40))
        share = generator.random() / 2
        letters[generator.random(len(letters)) < share] = "W"
        text = "".join(letters)
        value.append(f">v{i} TARGET={text.count('W') / len(text):.4f} {chosen}\n{text}\n")
        rich = generator.choice(["W", "K"])
        other = generator.choice(LETTERS, 30)
        other[:12] = rich
        classes.append(f">c{i} TARGET={'aromatic' if rich == 'W' else 'basic'} {chosen}\n{''.join(other)}\n")
        sequences.append(f">r{i}\n{text}\n")
        labels.append(f">r{i} {chosen}\n{''.join('H' if c in 'AEKLMQR' else 'C' for c in text)}\n")
    (folder / "share.fasta").write_text("".join(value))
    (folder / "rich.fasta").write_text("".join(classes))
    (folder / "letters").mkdir()
    (folder / "letters" / "sampled.fasta").write_text("".join(labels))
    (folder / "letters" / "sequences.fasta").write_text("".join(sequences))
    return folder


def run(folder, model, out, **keywords):
    keywords = {"seeds": [0, 1], "resamples": 200, "device": "cpu", "epochs": 40} | keywords
    return benchmark(BenchmarkConfig(data_dir=folder, model=model, out_dir=out, **keywords))


@pytest.fixture(scope="module")
def value_report(tasks, model, tmp_path_factory):
    return run(tasks, model, tmp_path_factory.mktemp("value"), task="share")


def test_a_baseline_that_is_trained_on_validation_has_no_score_there(value_report):
    scored = {row.name: row.validation for row in value_report.rows}
    assert scored["onehot_ridge"] is None
    assert scored["composition"] is not None
    assert scored["small, ridge"] is not None


@pytest.mark.parametrize(
    ("task", "probe", "metric"), [("rich", "logistic", "accuracy"), ("letters", "cnn", "accuracy")]
)
def test_classes_are_learned_and_beat_the_majority_class(tasks, model, tmp_path, task, probe, metric):
    report = run(tasks, model, tmp_path, task=task, epochs=150)  # the CNN learns slowly from narrow random features
    first, rows = report.first, {row.name: row for row in report.rows}
    assert first.name == f"small, {probe}"
    assert rows["majority"].metrics[metric].value < first.metrics[metric].low
    beaten = {pair.theirs: pair.low for pair in report.comparisons}
    assert beaten["majority"] > 0
    assert np.sum(first.confusion) == report.task.scored_test
    assert set(first.per_class) == set(report.task.labels)


def test_a_report_is_complete(value_report):
    report = json.loads(value_report.json.read_text())
    assert report["schema"] == SCHEMA == "esm2kit.report/3"
    assert list(report) == [
        "schema", "task", "model", "settings", "rows", "comparisons", "published", "notes", "files", "provenance",
        "verdict", "warnings", "layer_sweep", "folds", "sha256",
    ]  # fmt: skip
    assert to_json(Report.read(value_report.json)) == to_json(value_report), "reading returns what was written"
    assert report["task"]["sizes"] == {"train": 60, "validation": 20, "test": 40}
    kinds = [(row["name"], row["kind"]) for row in report["rows"]]
    assert kinds == [
        ("small, ridge", "probe"), ("untrained small, ridge", "untrained"), ("mean", "baseline"),
        ("composition", "baseline"), ("onehot_ridge", "baseline"), ("onehot_cnn", "baseline"),
    ]  # fmt: skip
    for row in report["rows"]:
        assert set(row["metrics"]) == {"spearman", "pearson", "rmse", "r2", "ndcg"}
        assert row["metrics"]["rmse"]["low"] < row["metrics"]["rmse"]["value"] < row["metrics"]["rmse"]["high"]
    assert report["rows"][2]["metrics"]["spearman"]["value"] is None  # a constant has no rank correlation
    mean = next(item for item in report["comparisons"] if item["theirs"] == "mean")
    assert mean["metric"] == "rmse"
    assert mean["low"] > 0
    assert report["provenance"]["inputs"]["task/split"]["sha256"]
    assert report["provenance"]["inputs"]["embeddings"]["sha256"]
    assert report["rows"][0]["metrics"]["spearman"]["low"] > 0.5


class Page(HTMLParser):
    """Collects what a browser would fetch and what a screen reader would read."""

    def __init__(self):
        super().__init__()
        self.fetched, self.images, self.headings, self.ids = [], [], 0, []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.fetched += [
            v for k, v in attributes.items() if k in ("src", "href", "xlink:href") and v[:1] != "#" and v[:5] != "data:"
        ]
        if attributes.get("role") == "img":
            self.images.append(attributes.get("aria-label"))
        self.headings += tag in ("h1", "h2")
        if "id" in attributes:
            self.ids.append(attributes["id"])


def test_the_page_loads_nothing(value_report):
    html = value_report.html.read_text()
    page = Page()
    page.feed(html)
    assert page.fetched == []
    assert "<script" not in html
    assert "@import" not in html
    assert not re.search(r"url\(['\"]?http", html)
    assert len(page.images) == 4  # scores, predictions, intervals, coverage
    assert all(page.images)
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme: dark" in html
    assert html.count("currentColor") > 10
    for name in (
        "ridge probe on the frozen encoder",
        "ridge probe on an untrained encoder",
        "training-set mean",
        "composition",
        "one-hot, linear",
    ):
        assert f"<td>{name} <small>" in html


def test_the_page_names_the_model_once_and_rows_by_what_they_are(value_report):
    html = value_report.html.read_text()
    shown = html[: html.index("<h2>How each row was computed")]
    assert len(re.findall(r"\bsmall, ridge", shown)) == 2, "below the names of two rows"
    assert '<p class="faint">Model: small.</p>' in shown
    assert "<li>Ridge probe on the frozen encoder" in html
    assert "No significant difference between ridge probe on the frozen encoder and " in html or " beats " in html


def test_the_unit_of_the_target_stands_at_every_error(value_report, tmp_path, tasks):
    report = dataclasses.replace(value_report, task=dataclasses.replace(value_report.task, unit="deg C"))
    with np.load(value_report.json.with_name("predictions.npz")) as stored:
        predicted = {name.removeprefix("predicted/"): stored[name] for name in stored if name.startswith("predicted/")}
    html = write_report(report, load_task("share", None, tasks), predicted, tmp_path).html.read_text()
    assert '<th scope="col" class="n">RMSE (deg C)</th>' in html
    assert '<th scope="col" class="n">Spearman</th>' in html, "a correlation has no unit"
    assert re.search(r"training-set mean by [\d.]+ \[[^]]*\] deg C in RMSE", html)


@pytest.mark.parametrize(
    ("task", "header"), [("share", "id,measured,predicted"), ("letters", "id,residue,measured,predicted")]
)
def test_the_predictions_can_be_downloaded_from_the_page(tasks, model, tmp_path, task, header):
    few = {"baselines": [], "untrained": False, "seeds": [0], "epochs": 2}
    report = run(tasks, model, tmp_path, task=task, **few)
    name, encoded = re.search(
        r'<a download="([^"]+)" href="data:text/csv;base64,([^"]+)"', report.html.read_text()
    ).groups()
    assert name == f"{task}_{report.task.split}_predictions.csv"
    lines = b64decode(encoded).decode().splitlines()
    assert lines[0] == header
    data = load_task(task, None, tasks)
    rows = data.target_rows("test")
    assert len(lines) == len(rows) + 1
    with np.load(report.json.with_name("predictions.npz")) as stored:
        predicted = stored[f"predicted/{report.first.name}"][0]
    fields = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    assert fields["id"] == data.ids[data.protein_of_target[rows[-1]]]
    if task == "share":
        assert float(fields["measured"]) == pytest.approx(data.targets[rows[-1]], rel=1e-5)
        assert float(fields["predicted"]) == pytest.approx(predicted[-1], rel=1e-5)
    else:
        assert fields["measured"] == data.task.labels[data.targets[rows[-1]]]
        assert fields["predicted"] == data.task.labels[predicted[-1]]
        sequence = data.sequences[data.protein_of_target[rows[-1]]]
        assert 1 <= int(fields["residue"]) <= len(sequence)
        first = lines[1].split(",")
        assert int(first[1]) == rows[0] - data.offsets[data.protein_of_target[rows[0]]] + 1


def test_headline_names_all_comparisons_and_the_spread_of_predictions(tasks, value_report, tmp_path):
    with np.load(value_report.json.with_name("predictions.npz")) as stored:
        truth, predicted_SM = stored["truth"], stored["predicted/small, ridge"]
    write_report(value_report, load_task("share", None, tasks), {"small, ridge": predicted_SM * 0.01}, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(r'<p class="lead">(.*?)</p>', page)[1] == value_report.verdict
    lead = re.search(r'<p class="faint">(.*?)</p>', page)[1]
    untrained = value_report.rows[1].metrics["spearman"].value
    assert f", compared with {untrained:.3f} for the same probe on an untrained encoder and " in lead
    assert " for the best baseline (" in lead
    assert lead.endswith(f" is {predicted_SM[0].std() / truth.std() / 100:.0%} of that of the measured values.")


def test_a_second_run_reuses_finished_rows(tasks, model, tmp_path, monkeypatch):
    first = run(tasks, model, tmp_path, task="share")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").iterdir()}
    monkeypatch.setattr(hold_out, "fit_probe", lambda *a, **k: pytest.fail("fitted again"))
    monkeypatch.setattr(hold_out, "fit_baseline", lambda *a, **k: pytest.fail("fitted again"))
    second = run(tasks, model, tmp_path, task="share")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").iterdir()} == before
    assert second.rows == first.rows


def test_other_settings_are_fitted_again(tasks, model, tmp_path):
    first = run(tasks, model, tmp_path, task="share", baselines=[], untrained=False)
    second = run(tasks, model, tmp_path, task="share", baselines=[], untrained=False, probe="fnn")
    assert [row.name for row in second.rows] == ["small, fnn"]
    assert second.first.seeds == [0, 1]
    assert second.first.history["train_loss"]
    assert first.first.history == {}


def test_the_log_has_the_best_penalty_once_and_no_nan(tasks, model, tmp_path, caplog):
    caplog.set_level("DEBUG", logger="esm2kit")
    run(tasks, model, tmp_path / "a", task="share", baselines=["mean"], untrained=False)
    run(tasks, model, tmp_path / "b", task="rich", baselines=[], untrained=False, probe="logistic")
    lines = caplog.messages
    details = [record.getMessage() for record in caplog.records if record.levelname == "DEBUG"]
    assert [line for line in lines if "penalt" in line] == [line for line in details if "penalt" in line]
    assert [line.split(" is best")[0].split()[:2] for line in lines if "penalt" in line] == [
        ["ridge:", "penalty"], ["logistic:", "penalty"],
    ]  # fmt: skip
    assert "mean: spearman is undefined: the predictions or the targets are constant" in lines
    assert not [line for line in lines if re.search(r"\bnan\b", line)]


def test_a_report_of_other_settings_is_kept_and_an_equal_one_is_replaced(tasks, model, tmp_path, caplog):
    caplog.set_level("INFO", logger="esm2kit")
    few = {"baselines": [], "untrained": False}
    files = ("report.json", "report.html", "predictions.npz")
    run(tasks, model, tmp_path, task="share", **few)
    first = {name: (tmp_path / name).read_bytes() for name in files}
    run(tasks, model, tmp_path, task="share", **few)
    assert not (tmp_path / "earlier").exists(), "a report with the same settings is replaced"
    run(tasks, model, tmp_path, task="rich", **few)
    assert json.loads((tmp_path / "report.json").read_text())["task"]["name"] == "rich"
    kept = tmp_path / "earlier" / "1"
    assert json.loads((kept / "report.json").read_text())["rows"] == json.loads(first["report.json"])["rows"]
    assert sorted(path.name for path in kept.iterdir()) == sorted(files)
    assert f"moved the earlier report (share small) to {kept / 'report.html'}" in caplog.messages
    run(tasks, model, tmp_path, task="rich", seeds=[7], **few)
    assert (tmp_path / "earlier" / "2" / "predictions.npz").is_file()
    assert compare(CompareConfig([kept, tmp_path], tmp_path / "joined")).reports, "an earlier report can be compared"


def test_an_unreadable_report_is_kept(value_report, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    move_earlier_report(tmp_path, value_report)
    assert (tmp_path / "earlier" / "1" / "report.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({"task": "gb1", "model": "esm2_t6_8M_UR50D"}, "benchmark/esm2_t6_8M_UR50D/gb1"),
        ({"task": "gb1", "split": "sampled", "model": "some/run"}, "benchmark/some--run/gb1_sampled"),
        (
            {"task": "mine/stability.csv", "embeddings": Path("my_embeddings.h5")},
            "benchmark/my_embeddings.h5/stability",
        ),
        ({"task": "gb1", "out_dir": Path("here")}, "here"),
        ({"tasks": "gb1", "model": "some/last.safetensors"}, "benchmark/last-63e571/gb1"),
        ({"tasks": "gb1", "out_dir": Path("here")}, "here/gb1"),
    ],
)
def test_every_model_and_task_has_a_separate_folder(given, folder, monkeypatch):
    folders = []
    monkeypatch.setattr(stage, "_run_task", lambda config: folders.append(config.out_dir))
    benchmark(BenchmarkConfig(**given))
    assert folders == [Path(folder)]


def test_folder_names_of_model_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/pretrain", "b/pretrain", "run/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    kept = {"lab/model@main": "lab--model@main", "esm2_t6_8M_UR50D": "esm2_t6_8M_UR50D", ".": tmp_path.name}
    assert [*map(format_folder_name, kept)] == [*kept.values()]
    assert format_folder_name("tiny.safetensors") == "tiny.safetensors"
    hashed = {
        "a/pretrain": "pretrain",
        tmp_path / "b" / "pretrain": "pretrain",
        "../pretrain": "pretrain",
        "run/checkpoints/step=0000700-val_loss=2.8757.safetensors": "run_step700",
        "run/checkpoints/last.safetensors": "run_last",
        "models/mine.pt": "mine.pt",
        "models/yours.safetensors": "yours",
    }
    names = [*map(format_folder_name, hashed)]
    assert [name.rpartition("-")[0] for name in names] == [*hashed.values()]
    assert all(re.fullmatch(r"[0-9a-f]{6}", name.rpartition("-")[2]) for name in names)
    assert len(set(names)) == len(names)
    assert format_folder_name(tmp_path / "a" / "pretrain") == names[0], "the path may be absolute or relative"


SCHMIRLER_ROWS = {
    "esm2_t6_8M_UR50D": 0.818, "esm2_t12_35M_UR50D": 0.827, "esm2_t30_150M_UR50D": 0.833, "esm2_t33_650M_UR50D": 0.857,
    "esm2_t36_3B_UR50D": 0.866,
    "esm2_t6_8M_UR50D, fine-tuned": 0.883, "esm2_t12_35M_UR50D, fine-tuned": 0.879,
    "esm2_t30_150M_UR50D, fine-tuned": 0.879, "esm2_t33_650M_UR50D, fine-tuned": 0.879,
    "esm2_t36_3B_UR50D, fine-tuned with LoRA": 0.893, "8M from random weights, fine-tuned": 0.857,
    "150M from random weights, fine-tuned": 0.870, "one-hot ridge": 0.755,
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "split", "metric", "expected"),
    [
        ("gb1", "three_vs_rest", "spearman", SCHMIRLER_ROWS),
        ("gb1", "two_vs_rest", "rmse", {"esm2_t33_650M_UR50D": 1.29, "esm2_t36_3B_UR50D": 1.28}),
        ("meltome", "mixed_split", "rmse", {"esm2_t33_650M_UR50D": 7.19, "esm2_t36_3B_UR50D": 6.68}),
    ],
)
def test_a_report_shows_the_published_scores_of_its_task_and_split(
    task, split, metric, expected, tasks, model, tmp_path, monkeypatch
):
    (tmp_path / "flip" / task).mkdir(parents=True)
    (tmp_path / "flip" / task / f"{split}.fasta").write_text((tasks / "share.fasta").read_text())
    for sizes, shown in ((Split(60, 20, 40), expected), (Split(61, 20, 40), {})):
        monkeypatch.setitem(TASKS[task].splits, split, sizes)
        folders = {"data_dir": tmp_path / "flip", "out_dir": tmp_path / f"out_{sizes.train}"}
        settings = {"probe": "ridge", "untrained": False, "baselines": [], "resamples": 100}
        report = benchmark(BenchmarkConfig(task=task, split=split, model=model, **settings, **folders))
        published = {entry.model: entry.value for entry in report.published if entry.metric == metric}
        assert published == shown, "only for FLIP's own sets"
        html = report.html.read_text()
        cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall("<td[^>]*>(.*?)</td>", html, re.S)]
        for name, value in shown.items():
            places = [place for place, cell in enumerate(cells) if cell.strip() == name]
            assert any(f"{value:.3f}" in cells[place + 2] for place in places), name
        assert [*Report.read(report.json).published] == [*report.published]


def test_limit_does_not_change_the_files_and_is_noted(tasks, model, tmp_path):
    before = (tasks / "share.fasta").read_bytes()
    report = run(tasks, model, tmp_path, task="share", limit=15, baselines=[], untrained=False)
    assert report.task.sizes == {"train": 15, "validation": 15, "test": 15}
    assert (tasks / "share.fasta").read_bytes() == before
    assert any("subset" in note for note in report.notes)
    assert report.published == []


@pytest.fixture(scope="module")
def hiddens(tasks, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("given")
    config = EmbedConfig(tasks / "letters" / "sequences.fasta", out, model=model, per_residue=True, device="cpu")
    return embed(config)


def test_existing_files_give_the_same_scores_as_embedding(tasks, model, hiddens, tmp_path):
    embedded = run(tasks, model, tmp_path / "embedded", task="letters", baselines=[], untrained=False, epochs=3)
    given = run(tasks, None, tmp_path / "given", task="letters", baselines=[], hiddens=hiddens.hiddens, epochs=3)
    wide = tmp_path / "wide.safetensors"
    state = {f"model.{name}": tensor for name, tensor in ESM2.initialised(ESM2Config(1, 40, 2), 0).state_dict().items()}
    write_checkpoint(wide, state, {"model": {"num_layers": 1, "embed_dim": 40, "attention_heads": 2}, "step": 0})
    other = run(tasks, wide, tmp_path / "other", task="letters", baselines=[], hiddens=hiddens.hiddens, epochs=1)
    assert any(
        "untrained wide has vectors of 40 dimensions, but the embeddings have 32" in note for note in other.notes
    )
    a, b = (report.first.metrics["accuracy"].value for report in (embedded, given))
    assert a == pytest.approx(b, abs=0.01)  # float16 and float32
    assert any("No untrained model was probed" in note for note in given.notes)


def test_missing_embeddings_are_refused_unless_allowed(tasks, model, tmp_path):
    fasta = tmp_path / "some.fasta"
    records = (tasks / "letters" / "sequences.fasta").read_text().split(">")[1:]
    fasta.write_text("".join(f">{record}" for record in records[2:]))
    some = embed(EmbedConfig(fasta, tmp_path, model=model, per_residue=True, device="cpu")).hiddens
    keywords = {"task": "letters", "hiddens": some, "baselines": [], "untrained": False, "epochs": 1}
    with refused("embeddings.missing", path=some, missing=["r0", "r1"], proteins=120):
        run(tasks, None, tmp_path / "out", **keywords)
    report = run(tasks, None, tmp_path / "out", allow_missing=True, **keywords)
    assert report.task.sizes["train"] == 58
    assert any("2 of 120 proteins have no embedding" in note for note in report.notes)


def test_a_set_without_embeddings_is_refused(tasks, model, tmp_path):
    data = load_task("letters", None, tasks)
    fasta = tmp_path / "some.fasta"
    fasta.write_text(
        "".join(f">{data.ids[row]}\n{data.sequences[row]}\n" for row in np.flatnonzero(data.sets != "test"))
    )
    some = embed(EmbedConfig(fasta, tmp_path, model=model, per_residue=True, device="cpu")).hiddens
    with refused("embeddings.empty-set", path=some, set="test"):
        run(tasks, None, tmp_path / "out", task="letters", hiddens=some, untrained=False, allow_missing=True)
    assert not (tmp_path / "out" / "report.json").exists()


def test_embeddings_of_other_sequences_are_refused(tasks, model, tmp_path):
    text = (tasks / "letters" / "sequences.fasta").read_text()
    (tmp_path / "longer.fasta").write_text(text.replace(">r7\n", ">r7\nMM"))
    other = embed(EmbedConfig(tmp_path / "longer.fasta", tmp_path, model=model, per_residue=True, device="cpu")).hiddens
    with refused("embeddings.sequence", protein="r7", differ=1):
        run(tasks, None, tmp_path / "out", task="letters", hiddens=other, baselines=[], untrained=False)
    (tmp_path / "same.fasta").write_text(text)
    cut = {"long_proteins": "truncate", "max_residues": 20, "window_overlap": 0}
    config = EmbedConfig(tmp_path / "same.fasta", tmp_path, model=model, per_residue=True, device="cpu", **cut)
    with refused("features.rows", found=20):
        run(tasks, None, tmp_path / "out", task="letters", hiddens=embed(config).hiddens, baselines=[], untrained=False)


@pytest.mark.parametrize(
    ("keywords", "code", "values"),
    [
        ({"task": "nothing"}, "task.unknown", {}),
        ({"task": "shard"}, "task.unknown", {"nearest": "share"}),
        ({"task": "share", "split": "other"}, "task.one-split", {}),
        ({"task": "share", "probe": "cnn"}, "probe.task", {"probe": "cnn"}),
        ({"tasks": "share,rich", "split": "s"}, "benchmark.split", {"split": "s"}),
        ({"task": "share", "baselines": ["magic"]}, "baseline.unknown", {"name": "magic"}),
        ({"task": "share", "seeds": [1, 1]}, "option.seeds", {"found": [1, 1]}),
        ({"task": "share", "limit": 0}, "option.range", {"name": "limit", "found": 0}),
        ({"task": "share", "probe": "rigde"}, "config.choice", {"name": "probe", "found": "rigde"}),
        ({"task": "share", "preset": "flip"}, "config.choice", {"name": "preset", "found": "flip"}),
        ({"task": "share", "device": "cuda"}, "device.absent", {}),
        ({"task": "share", "resamples": 5}, "option.range", {"name": "resamples", "at_least": 100}),
        ({"task": "letters", "wrong_kind": True}, "embeddings.level", {"expected": "residue"}),
        ({"task": "share", "no_model": True}, "benchmark.no-source", {}),
    ],
)
def test_bad_input_is_refused_without_a_report(tasks, model, hiddens, tmp_path, monkeypatch, keywords, code, values):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    keywords = dict(keywords)
    if keywords.pop("wrong_kind", False):
        keywords["embeddings"] = hiddens.embeddings
    used = None if keywords.pop("no_model", False) else model
    with refused(code, **values):
        run(tasks, used, tmp_path / "out", **keywords)
    assert not (tmp_path / "out" / "report.json").exists()


def split_of(*rows):
    """Write a FASTA with one protein for each (label, set, held)."""
    return "".join(
        f">p{i} TARGET={label} SET={chosen} VALIDATION={held}\nMKV{'AG'[i % 2]}\n"
        for i, (label, chosen, held) in enumerate(rows)
    )


ERRORS = {
    "labels outside the alphabet": (
        {"scl/mixed_soft.fasta": split_of(("Moon", "train", False), ("Nucleus", "test", False))},
        "scl", "task.label",
    ),
    "more labels than residues": (
        {"own/s.fasta": ">a TARGET=HHH SET=train\nMKV\n>b TARGET=HC SET=val\nMK\n>c TARGET=CCH SET=test\nMK\n"},
        "own", "task.label-count",
    ),
    "a mask of other residues": (
        {"own/s.fasta": ">a TARGET=HHH SET=train\nMKV\n>b TARGET=CC SET=test MASK=1\nMK\n"},
        "own", "task.mask",
    ),
    "an empty split": (
        {"own/s.fasta": split_of(("1.5", "train", False), ("2.5", "train", True), ("3.5", "nan", False))},
        "own", "task.empty-set",
    ),
    "a class absent from train": (
        {"own/s.fasta": split_of(("a", "train", False), ("b", "train", True), ("b", "test", False))},
        "own", "task.unseen-class",
    ),
    "NaN for a class": (
        {"own/s.fasta": split_of(("a", "train", False), ("nan", "train", True), ("b", "test", False))},
        "own", "task.target",
    ),
    "NaN targets": (
        {"own/s.csv": "sequence,target,set,validation\nMKV,1.5,train,\nMKA,nan,train,True\nMKL,2.0,test,\n"},
        "own", "task.target",
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", [*ERRORS, "a zip with ../", "missing embeddings", "rows of other sequences"])
def test_each_problem_is_one_line_and_nothing_is_written(tasks, hiddens, tmp_path, capsys, problem):
    arguments = ["--download", "false", "--untrained", "false", "--device", "cpu"]
    files, name, code = ERRORS.get(problem, ({}, "letters", ""))
    given = {"download": False, "untrained": False, "device": "cpu"}
    for path, text in files.items():
        (tmp_path / "data" / path).parent.mkdir(parents=True)
        (tmp_path / "data" / path).write_text(text)
    if problem == "a zip with ../":
        (tmp_path / "data" / "gb1").mkdir(parents=True)
        with zipfile.ZipFile(tmp_path / "data" / "gb1" / "splits.zip", "w") as archive:
            archive.writestr("../two_vs_rest.csv", "sequence,target,set\n")
        name, code = "gb1", "zip.path"
    elif problem not in ERRORS:
        sequences = (tasks / "letters" / "sequences.fasta").read_text()
        split = (tasks / "letters" / "sampled.fasta").read_text()
        if problem == "missing embeddings":
            sequences = re.sub(r">r7\n(.*)\n", lambda found: f">new\n{found[1][::-1]}\n", sequences)
            split = split.replace(">r7 ", ">new ")
            code = "embeddings.missing"
        else:
            labels = re.search(r">r7 .*\n", split).group()
            sequences, split = sequences.replace(">r7\n", ">r7\nMM"), split.replace(labels, labels + "CC")
            code = "embeddings.sequence"
        arguments += ["--hiddens", str(hiddens.hiddens), "--model", "null"]
        given |= {"hiddens": hiddens.hiddens, "model": None}
        (tmp_path / "data" / "letters").mkdir(parents=True)
        (tmp_path / "data" / "letters" / "sequences.fasta").write_text(sequences)
        (tmp_path / "data" / "letters" / "sampled.fasta").write_text(split)
    before = sorted(tmp_path.rglob("*"))
    data_dir, out = str(tmp_path / "data"), str(tmp_path / "out")
    with refused(code):
        benchmark(BenchmarkConfig(name, data_dir=tmp_path / "data", out_dir=tmp_path / "out", **given))
    assert main(["benchmark", "--task", name, "--data_dir", data_dir, "--out_dir", out, *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("esm2kit: ")]
    assert len(lines) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_several_tasks_give_a_comparison(tasks, model, tmp_path):
    joined = run(tasks, model, tmp_path, tasks="share,rich", baselines=[], untrained=False)
    assert [entry.report.task.name for entry in joined.reports] == ["share", "rich"]
    assert joined.pairs == []  # different test sets have no paired difference
    written = {path for path in tmp_path.rglob("*") if path.name.startswith(("report.", "predictions.", "comparison."))}
    assert written | set(tmp_path.glob("*/probes/*")) <= set(joined.paths)
    assert len(set(joined.paths)) == len(joined.paths)
    assert (tmp_path / "comparison.html").is_file()


def test_all_tasks_are_the_available_ones(tmp_path, monkeypatch):
    tried = []

    def refuse(config):
        tried.append(config.task)
        raise InputError("no network")

    monkeypatch.setattr(stage, "_run_task", refuse)
    with refused("benchmark.some-failed", done=0):
        benchmark(BenchmarkConfig(tasks="all", data_dir=tmp_path, out_dir=tmp_path / "out"))
    assert tried == [task for task in stage.TASKS if task != "secondary_structure_648"]


def test_a_task_that_fails_does_not_stop_the_others(tasks, model, tmp_path):
    with refused("benchmark.some-failed", done=2) as caught:
        run(tasks, model, tmp_path, tasks="share,nothing,rich", baselines=[], untrained=False)
    assert {name: error.code for name, error in caught.value.values["failed"].items()} == {"nothing": "task.unknown"}
    assert (tmp_path / "rich" / "report.json").is_file()


def test_reports_on_one_test_set_are_compared_in_pairs(tasks, model, value_report, tmp_path, caplog):
    out = run(tasks, model, tmp_path / "fnn", task="share", probe="fnn", epochs=1, baselines=[], untrained=False)
    found = compare(CompareConfig([value_report.json, out.json], tmp_path))
    pair = found.pairs[0].comparison
    assert pair.metric == "spearman"
    a, b = (report.first.metrics["spearman"].value for report in (value_report, out))
    assert pair.difference == pytest.approx(a - b)
    assert pair.low < pair.difference < pair.high
    assert "beats" in pair.sentence or "No significant difference" in pair.sentence
    (written,) = json.loads((tmp_path / "comparison.json").read_text())["pairs"]
    assert written == {"task": "share", "split": "share"} | to_json(pair)
    html = (tmp_path / "comparison.html").read_text()
    assert pair.sentence.split(" by ")[0] in html
    caplog.set_level("INFO", "esm2kit")
    assert main(["compare", str(value_report.json), str(out.json), "--out_dir", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "comparison.html").read_text() == html
    assert f"share, share: {pair.sentence}" in caplog.messages


def test_each_pair_of_a_comparison_is_in_the_section_of_its_task(value_report, tmp_path):
    """Both tasks have models of the same names; one report has another limit and number of replicates."""
    folder, reports = value_report.json.parent, []
    with np.load(folder / "predictions.npz") as stored:
        arrays = dict(stored)
    for place, task in enumerate(("one", "one", "two", "two")):
        copy, report = tmp_path / str(place), read_sealed_json(folder / "report.json", "")
        report["task"]["name"] = task
        if place == 3:
            report["settings"]["resamples"] = 100
            next(row for row in report["rows"] if row["name"] == "mean")["metrics"]["rmse"]["value"] += 1
        copy.mkdir()
        write_sealed_json(copy / "report.json", report)
        other = {"fingerprint": task, "sequence": arrays["sequence"] ^ (task == "two")}
        np.savez(copy / "predictions.npz", **arrays | other)
        reports.append(copy)
    found = compare(CompareConfig(reports, tmp_path))
    assert [(pair.task, pair.comparison.ours[-2:], pair.comparison.theirs[-2:]) for pair in found.pairs] == [
        ("one", "#1", "#2"), ("two", "#1", "#2")
    ]  # fmt: skip
    one, two = (tmp_path / "comparison.html").read_text().split("<h2>")[1:]
    for section, pair in zip((one, two), found.pairs, strict=True):
        assert section.count(f"<li>{pair.comparison.sentence}</li>") == section.count("<li>") == 1
    assert "<td>training-set mean</td>" in one
    assert f"<td>training-set mean ({found.reports[3].name})</td>" in two
    assert "training-set mean (" not in one


def test_unreadable_reports_are_refused(tmp_path, value_report):
    with refused("compare.too-few", found=1):
        compare(CompareConfig([value_report.json], tmp_path))
    (tmp_path / "report.json").write_text('{"schema": "other/9"}')
    with refused("report.schema", found="other/9"):
        Report.read(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with refused("report.not-json", path=tmp_path / "report.json"):
        Report.read(tmp_path)
    write_sealed_json(tmp_path / "report.json", {"schema": SCHEMA})
    with refused("report.incomplete", path=tmp_path / "report.json"):
        Report.read(tmp_path)
    with refused("report.absent", path=tmp_path / "nowhere.json"):
        Report.read(tmp_path / "nowhere.json")


def test_sentences_contain_beats_only_if_the_interval_excludes_zero():
    assert (
        format_comparison("B", "A", "accuracy", Interval(0.012, 0.004, 0.020))
        == "B beats A by 0.012 [0.004, 0.020] in accuracy"
    )
    assert format_comparison("B", "A", "rmse", Interval(-0.3, -0.5, -0.1)).startswith(
        "A beats B by 0.300 [0.100, 0.500] in RMSE"
    )
    assert format_comparison("B", "A", "mcc", Interval(0.01, -0.1, 0.12)).startswith("No significant difference")
    level = format_comparison("B", "A", "rmse", Interval(0.746, -0.1, 1.2))
    assert level.endswith("+0.746 [-0.100, +1.200] in RMSE (positive means a lower RMSE, which is better)")
    same = format_comparison("B", "A", "mcc", Interval(1.0, float("nan"), float("nan")))
    assert same == "B and A: MCC differs by +1.000 in every bootstrap replicate, so there is no interval"


def test_a_perfect_score_on_a_small_test_set_has_a_note(tmp_path):
    """Five proteins per class that are easy to separate: the bootstrap alone would give [1.000, 1.000]."""
    sets = ["train VALIDATION=False"] * 12 + ["train VALIDATION=True"] * 4 + ["test VALIDATION=False"] * 10
    rows = [(f"p{i}", "WK"[i % 2], chosen) for i, chosen in enumerate(sets)]
    text = "".join(f">{name} TARGET=rich_{letter} SET={chosen}\nM{letter * 9}V\n" for name, letter, chosen in rows)
    (tmp_path / "easy.fasta").write_text(text)
    data = load_task("easy", None, tmp_path)
    counts_RP = sample_counts(10)
    scores = {
        name: score_fitted(fit_baseline(name, data).fitted, data, counts_RP) for name in ("composition", "majority")
    }
    (note,) = build_interval_notes(scores)
    assert note.startswith("Every bootstrap replicate of the 10 test proteins gives the same accuracy (composition).")
    assert build_interval_notes(scores, "test pairs") == [note.replace("10 test proteins", "10 test pairs")]
    fitted = fit_baseline("composition", data).fitted
    row = ScoredModel("composition", "baseline", "", {}, fitted, scores["composition"]).to_row(data, ())
    accuracy = row.metrics["accuracy"]
    assert accuracy == Metric(1.0, accuracy.low, 1.0, [1.0], 0.0)
    assert accuracy.low == pytest.approx(0.05 ** (1 / 10))
    assert (row.metrics["mcc"].value, row.metrics["mcc"].low) == (1.0, None)
    assert build_interval_notes({"majority": scores["majority"]}) == []


def test_packed_residues_are_not_copied(tasks, model, tmp_path):
    run(tasks, model, tmp_path, task="letters", baselines=[], untrained=False, epochs=1)
    (path,) = tmp_path.glob("embeddings/*/trained_hiddens.h5")
    with h5py.File(path) as file:
        assert file["values"].dtype == np.float16
    assert not (tmp_path / "cache").exists()
