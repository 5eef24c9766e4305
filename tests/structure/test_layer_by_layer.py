"""Contacts of a model that is read layer by layer are those of the whole model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from structure.test_contacts import SEQUENCES, fasta, model, run

from esm2kit import ContactReader
from esm2kit.models import layerwise
from esm2kit.models.layerwise import LayerwiseEncoder
from esm2kit.models.load import ModelFile

__all__ = ["fasta", "model"]


@pytest.fixture(autouse=True)
def one_thread():
    """Products of several threads can differ in the last digit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fail(*arguments) -> None:
    raise AssertionError("the whole model is loaded")


@pytest.mark.parametrize("values", ["contacts", "coupling"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_contacts_are_those_of_the_whole_model(
    values: str, precision: str, fasta: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(layerwise.GROUP_TOKENS, "cpu", 100)
    options = {"values": values, "precision": precision, "batch_tokens": 50, "pictures": 0, "device": "cpu"}
    whole = run(fasta, model, name="whole", **options)
    read, layers = LayerwiseEncoder._take_layer, []

    def count(encoder: LayerwiseEncoder, index: int, top: int):
        layers.append(index)
        return read(encoder, index, top)

    monkeypatch.setattr(LayerwiseEncoder, "_take_layer", count)
    monkeypatch.setattr(ModelFile, "load", fail)
    found = run(fasta, model, name="parts", layer_by_layer=True, **options)
    assert layers == [0, 1, 2] * 2, "three batches, of which the last two are a group"
    with ContactReader(whole.contacts) as expected, ContactReader(found.contacts) as reader:
        for name in SEQUENCES:
            assert np.ptp(expected[name]) > 0.1
            np.testing.assert_array_equal(reader[name], expected[name])
    again = run(fasta, model, name="whole", layer_by_layer=True, **options)
    assert again.contacts == whole.contacts, "the setting changes no file"


def test_an_interrupted_run_resumes(fasta: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layerwise.GROUP_TOKENS, "cpu", 1)
    options = {"batch_tokens": 50, "pictures": 0, "device": "cpu"}
    whole = run(fasta, model, name="whole", **options)
    run_layers, calls = LayerwiseEncoder.run_layers, []

    def stop(encoder: LayerwiseEncoder, tokens_N: torch.Tensor, layouts) -> None:
        calls.append(len(tokens_N))
        if len(calls) == 2:
            raise KeyboardInterrupt
        run_layers(encoder, tokens_N, layouts)

    monkeypatch.setattr(LayerwiseEncoder, "run_layers", stop)
    with pytest.raises(KeyboardInterrupt):
        run(fasta, model, layer_by_layer=True, **options)
    found = run(fasta, model, layer_by_layer=True, **options)
    assert calls == [calls[0], calls[1], calls[1], calls[3]], "the first batch is not computed again"
    with ContactReader(whole.contacts) as expected, ContactReader(found.contacts) as reader:
        for name in SEQUENCES:
            np.testing.assert_array_equal(reader[name], expected[name])


def test_a_model_that_does_not_fit_is_read_layer_by_layer(
    fasta: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    caplog.set_level("INFO", logger="esm2kit")
    monkeypatch.setattr(layerwise, "read_free_memory", lambda device: 1000)
    monkeypatch.setattr(ModelFile, "load", fail)
    run(fasta, model, pictures=0, device="cpu")
    assert caplog.text.count("it runs layer by layer") == 1
