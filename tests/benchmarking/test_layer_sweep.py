"""The layer and the pooling are chosen on validation: planted signals are found, test has no part, runs resume."""

import json
from dataclasses import replace
from pathlib import Path

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
from esm2kit.benchmarking.probes.features import Features
from esm2kit.benchmarking.report import Report
from esm2kit.benchmarking.saved_probe import load_probe
from esm2kit.cli.check import CheckConfig, check
from esm2kit.core.checksums import write_sealed_json
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.models.encoder import Encoder
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
