"""The layer and the pooling are chosen on validation: planted signals are found, test has no part, runs resume."""

import html
import json
from dataclasses import replace
from pathlib import Path

import h5py
import matplotlib.pyplot as plt
import numpy as np
import pytest
from support.errors import refused
from support.finetune_fixtures import write_tasks, write_tiny_model
from support.planted import KINDS, make_planted_task

from esm2kit.benchmarking import layer_sweep
from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.compare import compare
from esm2kit.benchmarking.config import BenchmarkConfig, CompareConfig, parse_layers
from esm2kit.benchmarking.layer_sweep import Candidate, choose_features
from esm2kit.benchmarking.model_features import ModelFeatures
from esm2kit.benchmarking.probes.config import ProbeConfig, default_probe
from esm2kit.benchmarking.probes.features import Features, ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_fnns, fit_probe
from esm2kit.benchmarking.report import Report
from esm2kit.benchmarking.saved_probe import load_probe
from esm2kit.benchmarking.sweep_page import _build_table, plot_sweep
from esm2kit.cli.check import CheckConfig, check
from esm2kit.core.checksums import write_sealed_json
from esm2kit.embedding import cost
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.models.config import ESM2Config
from esm2kit.models.encoder import Encoder
from esm2kit.sequences.windows import Windowing
from esm2kit.tasks.data import load_task

QUIET = {"seeds": [0], "resamples": 100, "untrained": False, "baselines": [], "device": "cpu"}


def build_candidate(values_ND, offsets, layer: int, pooling: str, probe: ProbeConfig) -> Candidate:
    return Candidate(layer, pooling, ModelFeatures("m", Path("m"), {}, Features(values_ND, offsets, "m")), probe)


def build_layers(signals: dict[int, np.ndarray], num_layers: int, shape, offsets, probe, pooling="mean"):
    """Layers of noise, and some with a signal."""
    generator = np.random.default_rng(7)
    return [
        build_candidate(signals.get(layer, np.float16(generator.normal(size=shape))), offsets, layer, pooling, probe)
        for layer in range(num_layers)
    ]


@pytest.mark.parametrize(("level", "target"), KINDS)
@pytest.mark.parametrize("planted", [0, 2, 4])
def test_the_layer_with_the_signal_is_chosen(level: str, target: str, planted: int) -> None:
    features, data = make_planted_task(level, target, num_proteins=120)
    probe = ProbeConfig(default_probe(data.task), epochs=30)
    signals = {planted: features.values_ND}
    candidates = build_layers(signals, 5, features.values_ND.shape, data.offsets, probe, "none")
    choice = choose_features(candidates, data, resamples=200)
    assert (choice.index, choice.summary.best.layer) == (planted, planted)
    others = [point for place, point in enumerate(choice.summary.points) if place != planted]
    assert all(point.is_distinct for point in others), "a signal is distinguished from noise"
    assert all(point.low <= point.value <= point.high for point in choice.summary.points)
    assert f"Layer {planted} was chosen on validation among 5 layers" in choice.summary.sentence


@pytest.mark.parametrize("probe", ["ridge", "fnn"])
def test_the_validation_choice_stands_where_test_prefers_another_layer(probe: str) -> None:
    features, data = make_planted_task("protein", "value", num_proteins=200)
    noise_ND = np.random.default_rng(1).normal(size=features.values_ND.shape).astype(np.float16)
    in_test, in_validation = features.values_ND.copy(), features.values_ND.copy()
    in_test[data.rows("validation")] = noise_ND[data.rows("validation")]
    in_validation[data.rows("test")] = noise_ND[data.rows("test")]
    settings = ProbeConfig(probe, epochs=40)
    signals = {1: in_validation, 3: in_test}
    candidates = build_layers(signals, 4, noise_ND.shape, data.offsets, settings)
    choice = choose_features(candidates, data, resamples=100)
    assert choice.index == 1
    swapped = replace(
        data, sets=np.where(data.sets == "validation", "test", np.where(data.sets == "test", "validation", data.sets))
    )
    assert choose_features(candidates, swapped, resamples=100).index == 3, "the other sets, the other choice"


def make_pooled_task(planted: str):
    """Residue rows and BOS rows, and values that are one pooling of a channel of them, of a few noisy channels."""
    generator = np.random.default_rng(11)
    num_residues = generator.integers(10, 60, 240)
    offsets = np.concatenate([[0], np.cumsum(num_residues)])
    rows_ND = generator.normal(size=(offsets[-1], 6)).astype(np.float32)
    bos_PD = generator.normal(size=(240, 6)).astype(np.float32)
    parts = np.split(rows_ND, offsets[1:-1])
    pooled = {
        "mean": np.stack([part.mean(0) for part in parts]),
        "max": np.stack([part.max(0) for part in parts]),
        "bos": bos_PD,
    }
    pooled["mean+max"] = np.concatenate([pooled["mean"], pooled["max"]], axis=1)
    channel = 0 if planted != "mean+max" else [0, 6]  # one channel of the mean and one of the maximum
    values = pooled[planted][:, channel]
    values = values if values.ndim == 1 else (values / values.std(0)).sum(1)
    _, data = make_planted_task("protein", "value", num_proteins=240)
    sequences = ["A" * count for count in num_residues]
    return pooled, (rows_ND, offsets), replace(data, targets=values.astype(float), sequences=sequences)


@pytest.mark.parametrize("planted", ["mean", "max", "bos", "mean+max"])
def test_the_pooling_with_the_signal_is_chosen(planted: str) -> None:
    pooled, _, data = make_pooled_task(planted)
    probe, one_each = ProbeConfig("ridge"), np.arange(241)
    candidates = [build_candidate(values, one_each, 1, name, probe) for name, values in pooled.items()]
    choice = choose_features(candidates, data, resamples=200)
    best, found = choice.summary.best, {point.pooling: point for point in choice.summary.points}
    if planted in ("mean", "max"):  # mean+max has both, and more noise
        assert best.pooling in (planted, "mean+max")
        other = {"mean": "max", "max": "mean"}[planted]
        assert found[planted].value > 0.97 > found[other].value
        assert found[other].is_distinct
    else:
        assert best.pooling == planted
        assert all(point.is_distinct for name, point in found.items() if name != planted)


def test_attention_finds_the_residues_that_matter() -> None:
    """The value is the mean over the residues with a mark, a fifth of them."""
    _, (rows_ND, offsets), data = make_pooled_task("mean")
    rows_ND, generator = rows_ND[:, :4].copy(), np.random.default_rng(5)
    marked_N = generator.random(len(rows_ND)) < 0.2
    marked_N[offsets[:-1]] = True
    rows_ND[:, 1] = marked_N + 0.1 * rows_ND[:, 1]
    parts, marks = (np.split(values, offsets[1:-1]) for values in (rows_ND, marked_N))
    values = [part[marked, 0].mean() for part, marked in zip(parts, marks, strict=True)]
    data = replace(data, targets=np.array(values, dtype=float))
    settings = ProbeConfig("fnn", epochs=100, patience=None, learning_rate=1e-2, batch_size=16, dropout=0.0)
    one_each = np.arange(241)
    candidates = [
        build_candidate(np.stack([part.mean(0) for part in parts]), one_each, 1, "mean", settings),
        build_candidate(np.stack([part.max(0) for part in parts]), one_each, 1, "max", settings),
        build_candidate(rows_ND, offsets, 1, "attention", replace(settings, probe="attention")),
    ]
    summary = choose_features(candidates, data, (0, 1, 2), resamples=200).summary
    mean, largest, attention = summary.points
    assert summary.best.pooling == "attention"
    assert attention.value > 0.85 > 0.5 > max(mean.value, largest.value)
    assert mean.is_distinct
    assert largest.is_distinct


def test_a_score_that_is_undefined_is_never_chosen() -> None:
    """The features of layer 0 are constant, so that its predictions have no rank correlation."""
    features, data = make_planted_task("protein", "value", num_proteins=80)
    constant = np.ones_like(features.values_ND)
    candidates = build_layers({0: constant, 1: features.values_ND}, 2, (), data.offsets, ProbeConfig("ridge"))
    choice = choose_features(candidates, data, resamples=100)
    assert (choice.index, choice.summary.points[0].value, choice.summary.metric) == (1, None, "spearman")
    alone = choose_features(candidates[:1], data, resamples=100)
    assert (alone.index, alone.summary.metric) == (0, "rmse"), "a constant has an error"


@pytest.mark.parametrize("target", ["class", "value"])
@pytest.mark.parametrize("patience", [None, 3])
def test_the_fnns_of_all_layers_in_one_pass_equal_each_alone(monkeypatch, target: str, patience: int | None) -> None:
    """Each layer stops when it would alone; a small budget of memory divides the layers."""
    features, data = make_planted_task("protein", target, num_proteins=150, noise=1.0)
    settings = ProbeConfig("fnn", epochs=25, batch_size=16, learning_rate=5e-3, patience=patience)
    shape = features.values_ND.shape
    candidates = build_layers({2: features.values_ND}, 5, shape, data.offsets, settings)
    targets = ProbeTargets.from_task(data)
    together = fit_fnns([each.source.features for each in candidates], targets, settings, (0, 3), "cpu")
    for candidate, found in zip(candidates, together, strict=True):
        alone = fit_probe(candidate.source.features, targets, settings, (0, 3))
        np.testing.assert_allclose(found.validation_SM, alone.validation_SM, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.test_SM, alone.test_SM, rtol=1e-4, atol=1e-4)
    passes, fit = [], layer_sweep.fit_fnns
    monkeypatch.setattr(layer_sweep, "fit_fnns", lambda group, *more: passes.append(len(group)) or fit(group, *more))
    one_pass = choose_features(candidates, data, (0, 3), resamples=100)
    assert passes == [5]
    passes.clear()
    monkeypatch.setattr(layer_sweep, "BYTES_TOGETHER", 3 * 4 * shape[0] * shape[1])
    divided = choose_features(candidates, data, (0, 3), resamples=100)
    assert passes == [3, 2]
    assert one_pass.index == divided.index == 2
    np.testing.assert_allclose(
        [point.value for point in one_pass.summary.points], [point.value for point in divided.summary.points], atol=1e-4
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_tiny_model(folder / "tiny.safetensors")
    write_tasks(folder / "tasks")
    return folder


def run(folder: Path, task: str, name: str, **options) -> Report:
    model = str(folder / "tiny.safetensors")
    return benchmark(
        BenchmarkConfig(task, data_dir=folder / "tasks", model=model, out_dir=folder / name, **QUIET | options)
    )


@pytest.fixture(scope="module")
def swept(folder):
    return run(folder, "protein_value", "swept", repr_layer="all", pooling=["mean", "max", "mean+max"], untrained=True)


def test_the_row_is_that_of_a_run_with_the_chosen_layer(folder, swept) -> None:
    sweep = swept.layer_sweep
    places = [(point.layer, point.pooling) for point in sweep.points]
    assert places == [(layer, pooling) for layer in (0, 1, 2) for pooling in ("mean", "max", "mean+max")]
    assert sweep.best.value == max(point.value for point in sweep.points)
    assert sweep.best.value == pytest.approx(swept.first.validation)
    assert sweep.proteins == 16
    place = {"repr_layer": sweep.best.layer, "pooling": [sweep.best.pooling]}
    single = run(folder, "protein_value", "single", untrained=True, **place)
    assert single.layer_sweep is None
    assert (
        [row.name for row in single.rows]
        == [row.name for row in swept.rows]
        == ["tiny, ridge", "untrained tiny, ridge"]
    )
    for ours, theirs in zip(swept.rows, single.rows, strict=True):
        assert ours.metrics == theirs.metrics
        assert ours.selected == theirs.selected
    assert swept.provenance["config"]["repr_layer"] == "all"
    assert f"layer {sweep.best.layer}" in swept.first.note


def test_the_report_says_how_it_was_chosen(swept) -> None:
    again = Report.read(swept.json)
    assert again.layer_sweep == replace(swept.layer_sweep, points=list(swept.layer_sweep.points))
    stored = json.loads(swept.json.read_text())["layer_sweep"]
    assert set(stored) == {"metric", "proteins", "points", "chosen", "sentence"}
    assert not any("test" in name for name in stored["points"][0]), "test scores of other layers are in no file"
    sizes = [np.load(path)["test"].shape[1] for path in (swept.json.parent / "rows").iterdir()]
    assert sorted(sizes) == [0] * 9 + [16] * 2, "the predictions of test are kept for the rows only"


def test_no_prediction_of_test_is_stored_for_classes(folder) -> None:
    """Rows of classes also have logits, from which the scores of the other layers could be computed."""
    report = run(folder, "protein_class", "logits", repr_layer="all")
    stored = [np.load(path) for path in (report.json.parent / "rows").iterdir()]
    assert sorted(row["test"].shape[1] for row in stored) == [0, 0, 0, 16]
    assert [len(row["test_logits_MC"]) for row in stored if "test_logits_MC" in row] == [16]


@pytest.fixture(scope="module")
def several(folder):
    """A table with classes (multi-label) and values that follow from the shares of two residues."""
    generator = np.random.default_rng(2)
    lines = ["id,sequence,place,first,second,set"]
    for number in range(100):
        sequence = "".join(generator.choice(list("ACDEFGHIKL"), 20)) + "W" * generator.integers(0, 9)
        sequence += "Y" * generator.integers(0, 9)
        count_W, count_Y = sequence.count("W"), sequence.count("Y")
        place = ";".join(name for name, count in (("w", count_W), ("y", count_Y)) if count > 4) or "[]"
        kind = ("train", "train", "train", "val", "test")[number % 5]
        lines.append(f"p{number},{sequence},{place},{count_W + 0.5},{100 * count_Y + 0.5},{kind}")
    (folder / "several.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "several.csv")


@pytest.mark.parametrize(("target", "joint"), [("place", False), ("first,second", True)])
@pytest.mark.parametrize(("pooling", "probe"), [(["mean", "max"], None), (["mean", "attention"], "fnn")])
def test_several_targets_per_protein_are_swept(folder, several, target: str, joint: bool, pooling, probe) -> None:
    name = f"several-{target}-{'-'.join(pooling)}"
    options = {"joint": joint, "repr_layer": "all", "pooling": pooling, "probe": probe, "epochs": 20, "target": target}
    report = run(folder, several, name, **options)
    sweep = report.layer_sweep
    assert len(sweep.points) == 6
    assert sweep.metric == report.task.metric
    assert sweep.best.value == pytest.approx(report.first.validation, abs=0.02)
    assert sweep.best.value == max(point.value for point in sweep.points)
    assert Report.read(report.json).layer_sweep.best == sweep.best
    assert "Choice of the layer and the pooling" in report.html.read_text()


def test_an_old_report_has_no_sweep(folder, swept, tmp_path) -> None:
    found = json.loads(swept.json.read_text())
    old = {name: part for name, part in found.items() if name not in ("layer_sweep", "sha256")}
    write_sealed_json(tmp_path / "report.json", old)
    (tmp_path / "predictions.npz").write_bytes((swept.json.parent / "predictions.npz").read_bytes())
    assert Report.read(tmp_path).layer_sweep is None
    assert compare(CompareConfig([swept.json.parent, tmp_path], tmp_path / "compared")).html.is_file()
    assert "agree with their checksums" in check(CheckConfig(swept.json.parent))


@pytest.mark.parametrize(
    ("task", "pooling", "probe"),
    [
        ("protein_value", ["mean+max"], "ridge"),
        ("protein_class", ["max"], "logistic"),
        ("protein_value", ["attention"], "attention"),
        ("protein_class", ["bos", "attention"], None),
        ("residue_class", None, "cnn"),
    ],
)
def test_a_saved_probe_predicts_with_the_chosen_layer_and_pooling(folder, task, pooling, probe) -> None:
    name = f"predict-{task}-{'-'.join(pooling or ())}"
    report = run(folder, task, name, repr_layer="1,-1", pooling=pooling, epochs=5)
    best = report.layer_sweep.best
    assert best.probe == probe or probe is None
    saved = load_probe(folder / name / report.first.probe_file)
    inputs = saved.facts["inputs"]
    assert (inputs["layer"], inputs["pooling"]) == (best.layer, "none" if best.pooling == "attention" else best.pooling)
    data = load_task(task, None, folder / "tasks")
    rows = data.rows("test")
    outputs = saved.outputs([data.sequences[row] for row in rows])
    scored = [data.scored[data.offsets[row] : data.offsets[row + 1]] for row in rows]
    outputs = [part if data.task.level == "protein" else part[keep] for part, keep in zip(outputs, scored, strict=True)]
    found = saved.decide(np.stack(outputs) if data.task.level == "protein" else np.concatenate(outputs))
    with np.load(folder / name / "predictions.npz") as stored:
        np.testing.assert_allclose(found, stored[f"predicted/{report.first.name}"][0], rtol=1e-4, atol=1e-5)


def test_the_model_runs_once_for_all_layers_and_poolings(folder, monkeypatch) -> None:
    tokens, encode = [], Encoder.encode

    def count(encoder, tokens_N, num_tokens, repr_layers, on_device=True):
        tokens.append((len(tokens_N), tuple(repr_layers)))
        return encode(encoder, tokens_N, num_tokens, repr_layers, on_device)

    monkeypatch.setattr(Encoder, "encode", count)
    report = run(folder, "protein_class", "passes", repr_layer="all", pooling=["mean", "max", "bos", "mean+max"])
    data = load_task("protein_class", None, folder / "tasks")
    assert sum(count for count, _ in tokens) == sum(data.num_residues + 2)
    assert {layers for _, layers in tokens} == {(0, 1, 2)}
    assert len(report.layer_sweep.points) == 12
    with EmbeddingReader(Path(report.model.embeddings["path"])) as reader:
        assert reader.attributes["layer"] == report.layer_sweep.best.layer


@pytest.mark.parametrize("pooling", [["mean"], ["max", "bos", "mean+max"], ["mean", "attention"], ["attention"]])
def test_the_cost_is_logged_before(folder, caplog, monkeypatch, pooling) -> None:
    """The bytes are those of the vectors in the files; the time is that of matrix products at the measured rate."""
    monkeypatch.setattr(cost, "measure_products", lambda width, device, precision: 1e6)
    name = f"cost-{'-'.join(pooling)}"
    with caplog.at_level("INFO", logger="esm2kit"):
        run(folder, "protein_class", name, repr_layer="0,2", pooling=pooling, epochs=1)
    (line,) = [message for message in caplog.messages if "one pass of the model" in message]
    data = load_task("protein_class", None, folder / "tasks")
    stored = 0
    for path in (folder / name / "embeddings").rglob("*.h5"):
        with h5py.File(path) as file:
            stored += file["values"].nbytes
    several = f" and {len(pooling)} poolings" if len(pooling) > 1 else ""
    assert line.startswith(f"2 layers{several} of 96 proteins ({data.num_residues.sum():,} residues): ")
    assert f"{stored / 1e6:,.1f} MB of vectors, then {2 * len(pooling)} probes" in line
    flops = ESM2Config(2, 32, 4).forward_flops((data.num_residues + 2).tolist(), 0)
    minutes = flops / 0.64e6 / 60
    assert f"about {minutes:.0f} min and" in line
    logged = caplog.messages.index(line)
    assert not any("embedded" in message for message in caplog.messages[:logged]), "before the pass"
    exact = cost.estimate_cost(
        ESM2Config(2, 32, 4),
        data.num_residues.tolist(),
        2,
        [*(p for p in pooling if p != "attention"), *(["none"] if "attention" in pooling else [])],
        "float16" if pooling == ["attention"] else "float32",
        "cpu",
        Windowing(1022, 256, 0),
    )
    assert exact.num_bytes == stored


def test_the_rate_of_products_is_measured() -> None:
    """The rate of this machine; a busy one may be slow, but a product of this width takes less than a second."""
    rate = cost.measure_products(64, "cpu", "float32")
    assert 1e7 < rate < 1e15


def test_the_page_shows_the_choice(swept) -> None:
    page, sweep = swept.html.read_text(), swept.layer_sweep
    assert "Choice of the layer and the pooling" in page
    assert html.escape(sweep.sentence) in page
    best = sweep.best
    assert f"Model: tiny, layer {best.layer}, {best.pooling} (chosen on validation among 9)." in page
    table = _build_table(sweep, "proteins")
    assert [header["text"] for header in table["headers"]] == ["layer", "mean", "max", "mean+max"]
    assert [row["cells"][0]["text"] for row in table["rows"]] == ["0", "1", "2"]
    chosen = [cell for row in table["rows"] for cell in row["cells"] if "chosen" in cell.get("small", "")]
    assert [cell["text"] for cell in chosen] == [f"{best.value:.3f}"]


def test_the_curve_shows_validation_and_the_test_score_of_the_chosen_one(swept) -> None:
    ax = plot_sweep(swept)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer (0: token embedding)", "Spearman on validation")
    lines = {line.get_label(): line for line in ax.lines}
    assert set(lines) == {"mean", "max", "mean+max", "chosen", "test score of the chosen one"}
    for pooling in ("mean", "max", "mean+max"):
        expected = [point.value for point in swept.layer_sweep.points if point.pooling == pooling]
        assert lines[pooling].get_ydata().tolist() == expected
    assert lines["chosen"].get_ydata().tolist() == [swept.layer_sweep.best.value]
    assert lines["test score of the chosen one"].get_ydata()[0] == swept.first.metrics["spearman"].value
    bars = [segment for bars in ax.collections for segment in bars.get_segments()]
    ends = {(round(segment[0][1], 9), round(segment[1][1], 9)) for segment in bars}
    assert ends == {(round(point.low, 9), round(point.high, 9)) for point in swept.layer_sweep.points} | {
        tuple(round(getattr(swept.first.metrics["spearman"], end), 9) for end in ("low", "high"))
    }
    plt.close(ax.figure)


def test_an_interrupted_sweep_resumes(folder, monkeypatch) -> None:
    options = {"repr_layer": "all", "pooling": ["mean", "max"]}
    whole = run(folder, "protein_class", "whole", **options)
    fit, fitted = layer_sweep.fit_probe, []

    def interrupt(*arguments):
        if len(fitted) == 4:
            raise KeyboardInterrupt
        fitted.append(arguments)
        return fit(*arguments)

    monkeypatch.setattr(layer_sweep, "fit_probe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(folder, "protein_class", "stopped", **options)
    fitted.clear()
    resumed = run(folder, "protein_class", "stopped", **options)
    assert len(fitted) == 2, "four of six probes were finished"
    assert resumed.layer_sweep == whole.layer_sweep
    assert resumed.first.metrics == whole.first.metrics
    fitted.clear()
    assert run(folder, "protein_class", "stopped", **options).layer_sweep == whole.layer_sweep
    assert not fitted, "a finished sweep is not repeated"


@pytest.mark.parametrize(("layer", "pooling"), [(1, "max"), (2, "mean+max"), (-1, "mean")])
def test_the_untrained_model_has_the_layer_and_the_pooling_of_existing_vectors(
    folder, layer: int, pooling: str
) -> None:
    """It was the last layer and the mean, whatever the file."""
    name, place = f"made-{layer}-{pooling}", {"repr_layer": layer, "pooling": [pooling]}
    made = run(folder, "protein_value", name, **place, untrained=True)
    existing = Path(made.model.embeddings["path"])
    found = run(folder, "protein_value", f"{name}-existing", embeddings=existing, untrained=True)
    assert [row.metrics for row in found.rows] == [row.metrics for row in made.rows]
    assert [row.kind for row in found.rows] == ["probe", "untrained"]
    assert all(f"layer {layer % 3}" in row.note for row in found.rows)


def test_layers_and_poolings_that_cannot_be_are_refused(folder, tmp_path) -> None:
    assert [parse_layers(found) for found in ("all", -1, "3", "0,-1")] == [None, [-1], [3], [0, -1]]
    with refused("option.layers", found="first"):
        BenchmarkConfig(repr_layer="first")
    with refused("option.pooling", found=["largest"]):
        BenchmarkConfig(pooling=["largest"])
    for probe, pooling in (("ridge", ["attention"]), ("light_attention", ["mean"]), ("attention", ["max"])):
        with refused("pooling.probe", probe=probe, pooling=pooling):
            BenchmarkConfig(probe=probe, pooling=pooling)
    with refused("sweep.embedded", option="repr_layer"):
        BenchmarkConfig(embeddings=tmp_path / "x.h5", repr_layer="all")
    with refused("sweep.embedded", option="pooling"):
        BenchmarkConfig(embeddings=tmp_path / "x.h5", pooling=["max"])
    with refused("benchmark.no-source"):
        BenchmarkConfig(model=None, repr_layer="0,1")
    with refused("pooling.residue-task", task="residue_class"):
        run(folder, "residue_class", "refused", pooling=["max"])
    with refused("embed.layer-twice", found="2,-1"):
        run(folder, "protein_class", "refused", repr_layer="2,-1")
    with refused("model.layer", found=7, allowed=2):
        run(folder, "protein_class", "refused", repr_layer="0,7")
