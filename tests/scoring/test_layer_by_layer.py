"""Scores of a model that is read layer by layer are those of the whole model, also after an interrupt."""

from pathlib import Path

import pytest
import torch
from scoring.test_score import SEQUENCES, configure, read_all
from support.finetune_fixtures import write_tiny_model

from esm2kit import ScoreConfig, score
from esm2kit.models import layerwise
from esm2kit.models.layerwise import LayerwiseEncoder
from esm2kit.models.load import ModelFile, find_model
from esm2kit.scoring import masked_passes
from esm2kit.scoring.journal import Journal
from esm2kit.scoring.masked_passes import Pass, compute_batches, tokenize_protein

OPTIONS = [
    {"strategy": "masked-marginals"},
    {"strategy": "wt-marginals", "max_residues": 12},
    {"strategy": "mutant-marginals", "positions": "2-5"},
    {"strategy": "pseudo-ppl", "mutations": "M1A,K2A:T3W"},
    {"sequences": True, "fast": True, "passes": 3},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of batches of each pass over the layers, in groups of 300 tokens."""
    monkeypatch.setitem(layerwise.GROUP_TOKENS, "cpu", 300)
    encode, sizes = LayerwiseEncoder.encode_rows_together, []

    def count(encoder: LayerwiseEncoder, inputs) -> list[torch.Tensor]:
        sizes.append(len(inputs))
        return encode(encoder, inputs)

    monkeypatch.setattr(LayerwiseEncoder, "encode_rows_together", count)
    return sizes


def fail(*arguments) -> None:
    raise AssertionError("the whole model is loaded")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.get("strategy", "sequences"))
def test_the_scores_are_those_of_the_whole_model(
    options: dict, tmp_path: Path, model: Path, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["one"] if "mutations" in options else []
    whole = score(configure(tmp_path, model, *names, out_dir=tmp_path / "whole", batch_tokens=70, **options))
    assert not groups
    monkeypatch.setattr(ModelFile, "load", fail)
    options = options | {"layer_by_layer": True, "batch_tokens": 70}
    found = score(configure(tmp_path, model, *names, **options))
    assert len(groups) > 1
    assert max(groups) > 1, "batches share a pass over the layers"
    expected = read_all(whole)
    assert found.scores.read_bytes() == expected["in_scores.tsv"], "exactly"
    if found.tables:
        for name in found.proteins:
            torch.testing.assert_close(
                torch.from_numpy(found.table(name)), torch.from_numpy(whole.table(name)), rtol=0, atol=0, equal_nan=True
            )
    again = score(configure(tmp_path, model, *names, **options | {"layer_by_layer": False}))
    assert again == found, "the setting changes no file"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_modules_of_other_devices_give_the_rows_of_the_model(precision: str, model: Path) -> None:
    """On a GPU the layers are the modules of the model; here the same code runs on the CPU."""
    tokens_T = tokenize_protein(SEQUENCES["one"])
    batches = [[Pass(tokens_T, (0, 24), (row, row + 3), (row, row + 3))] * 2 for row in range(1, 9)]
    esm2 = find_model(model).load().to(getattr(torch, precision))
    encoder = LayerwiseEncoder(find_model(model).open(), precision, batch_tokens=60, workers=2, fused=False)
    found = list(compute_batches(encoder, batches, None))
    for batch, values in zip(batches, found, strict=True):
        tokens_N, num_tokens, rows_M = masked_passes._pack(batch)
        with torch.inference_mode():
            expected = esm2.masked_logits(tokens_N, layerwise.Packed(num_tokens), rows_M).float().log_softmax(-1)
        torch.testing.assert_close(torch.from_numpy(values), expected.flatten(), atol=1e-6, rtol=0)
    assert abs(found[0] - found[5]).max() > 1e-3


def test_a_stopped_run_resumes_with_either_way(
    tmp_path: Path, model: Path, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(**changed) -> ScoreConfig:
        return configure(tmp_path, model, batch_tokens=60, workers=1, **changed)

    whole = score(options(out_dir=tmp_path / "whole"))
    compute, computed = masked_passes.compute_group, []

    def stop(encoder: LayerwiseEncoder, batches) -> list:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(len(batches))
        return compute(encoder, batches)

    with monkeypatch.context() as patch:
        patch.setattr(masked_passes, "compute_group", stop)
        with pytest.raises(KeyboardInterrupt):
            score(options(layer_by_layer=True))
    kept = len(Journal(tmp_path / "out" / "in_scores.part" / "values.bin").counts)
    assert kept == sum(computed) > 2
    groups.clear()
    assert score(options(layer_by_layer=True)).scores.read_bytes() == whole.scores.read_bytes()
    total = sum(1 for _ in masked_passes.split_passes(_steps(options()), 60))
    assert sum(groups) == total - kept, "what the journal has is not computed again"


def _steps(config: ScoreConfig):
    from esm2kit.scoring.score import ScoreJob

    return ScoreJob(config, [Path(config.fasta)], config.mutations, Path("unused")).scan.steps()


def test_a_model_that_does_not_fit_is_read_layer_by_layer(
    tmp_path: Path, model: Path, groups: list[int], monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    caplog.set_level("INFO", logger="esm2kit")
    monkeypatch.setattr(layerwise, "read_free_memory", lambda device: 1000)
    score(configure(tmp_path, model, "one", device="cpu"))
    assert groups
    assert caplog.text.count("it runs layer by layer") == 1
