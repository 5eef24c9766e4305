"""Embedding: values, order, long proteins, and runs that are killed, distributed or fill the disk."""

import dataclasses
import errno
import gzip
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.embedding_fixtures import CONFIG, assert_same_files, random_proteins, values_of, write_fasta, write_model
from support.errors import refused

from esm2kit.embedding import plan as embed_plan
from esm2kit.embedding import run as embed_run
from esm2kit.embedding.batch import Output, embed_batch, embed_on_device, pack_batch, split_by_protein
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.embed import _choose_device, embed
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2, tokenize
from esm2kit.models.load import ModelFile, load_model
from esm2kit.sequences.windows import Windowing


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small.safetensors")


def expected(model: Path, sequence: str, layer: int = 2) -> np.ndarray:
    """Compute (T, D) for a single sequence with the plain model, including BOS and EOS."""
    with torch.no_grad():
        return load_model(model)[0](tokenize([sequence]), repr_layers=[layer])["representations"][layer][0].numpy()


def test_all_outputs_match_the_model(model: Path, tmp_path: Path) -> None:
    proteins = random_proteins([5, 300, 1, 40, 40, 1022, 17])
    fasta = write_fasta(tmp_path / "seven.fasta", proteins)
    config = EmbedConfig(
        fasta,
        tmp_path,
        model=str(model),
        repr_layers=[-1, 0],
        per_residue=True,
        bos=True,
        logits=True,
        batch_tokens=128,
    )
    result = embed(config)
    assert result.num_proteins == 7
    assert result.embeddings == tmp_path / "seven_layer2_embeddings.h5"
    assert result.hiddens == tmp_path / "seven_layer2_hiddens.h5"
    names = ["layer2_embeddings", "layer2_bos_embeddings", "layer2_hiddens", "layer0_embeddings"]
    names += ["layer0_bos_embeddings", "layer0_hiddens", "logits"]
    assert [path.name for path in result.files] == [f"seven_{name}.h5" for name in names]
    readers = {name: EmbeddingReader(tmp_path / f"seven_{name}.h5") for name in names}
    plain = load_model(model)[0]
    for name, sequence in proteins.items():
        for layer in (0, 2):
            rows_TD = expected(model, sequence, layer)
            np.testing.assert_allclose(readers[f"layer{layer}_hiddens"][name], rows_TD[1:-1], atol=1e-5)
            np.testing.assert_allclose(readers[f"layer{layer}_embeddings"][name], rows_TD[1:-1].mean(0), atol=1e-5)
            np.testing.assert_allclose(readers[f"layer{layer}_bos_embeddings"][name], rows_TD[0], atol=1e-5)
        with torch.no_grad():
            logits = plain(tokenize([sequence]))["logits"][0, 1:-1].numpy()
        np.testing.assert_allclose(readers["logits"][name], logits, atol=1e-5)
    attributes = readers["layer0_hiddens"].attributes
    assert (attributes["layer"], attributes["pooling"], attributes["model_name"]) == (0, "none", "small")
    assert attributes["provenance"]["config"]["repr_layers"] == [-1, 0]
    assert attributes["provenance"]["inputs"]["fasta"]["sha256"] == attributes["input_sha256"]
    assert {"torch", "h5py", "esm2kit"} <= attributes["versions"].keys()
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*")), "the run leaves no temporary files"


@settings(max_examples=12, deadline=None)
@given(
    num_residues=st.lists(st.integers(1, 60), min_size=1, max_size=25),
    batch_tokens=st.sampled_from([1, 64, 1000]),
    workers=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
)
def test_a_vector_does_not_depend_on_order_budget_or_workers(
    model, tmp_path_factory, num_residues, batch_tokens, workers, order
):
    folder = tmp_path_factory.mktemp("invariance")
    proteins = list(random_proteins(num_residues).items())
    plain = embed(EmbedConfig(write_fasta(folder / "a.fasta", proteins), folder, model=str(model), workers=1))
    order.shuffle(proteins)
    fasta = write_fasta(folder / "b.fasta", proteins)
    mixed = embed(EmbedConfig(fasta, folder, model=str(model), workers=workers, batch_tokens=batch_tokens))
    first, second = EmbeddingReader(plain.embeddings), EmbeddingReader(mixed.embeddings)
    assert second.ids == tuple(name for name, _ in proteins)
    np.testing.assert_allclose(second.matrix(first.ids), first.matrix(), atol=1e-5, rtol=0)


def test_duplicate_records_are_embedded_and_equal_ids_need_equal_sequences(model: Path, tmp_path: Path) -> None:
    pairs = [("a", "MKT"), ("b", "MKTAYL"), ("a", "MKT"), ("c", "MKT")]
    result = embed(EmbedConfig(write_fasta(tmp_path / "x.fasta", pairs), tmp_path, model=str(model)))
    assert EmbeddingReader(result.embeddings).ids == ("a", "b", "a", "c")
    assert sorted(values_of(result.embeddings)) == ["0", "1", "2", "3"]
    for key, names in (("hash", [embed_plan.hash_sequence(s) for s in ("MKT", "MKTAYL")]), ("id", ["a", "b", "c"])):
        keyed = embed(EmbedConfig(tmp_path / "x.fasta", tmp_path, name=key, model=str(model), key=key))
        assert sorted(values_of(keyed.embeddings)) == sorted(names)
        np.testing.assert_allclose(
            EmbeddingReader(keyed.embeddings).matrix(), EmbeddingReader(result.embeddings).matrix()
        )
    write_fasta(tmp_path / "y.fasta", [*pairs, ("b", "MKTAYV")])
    with refused("embed.ambiguous-id", id="b"):
        embed(EmbedConfig(tmp_path / "y.fasta", tmp_path, model=str(model)))
    assert not list(tmp_path.glob("y_*"))


def test_nucleic_acids_give_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = [("dna", "ACGTACGTAC"), ("rna", "AUGGCUNNNN"), ("protein", "MKTAYIAKQR"), ("short", "GAGAGA")]
    embed_plan.Table.build([write_fasta(tmp_path / "a.fasta", pairs)], tmp_path)
    (message,) = caplog.messages
    assert f"{tmp_path / 'a.fasta'}: 2 of 4 sequences contain only A, C, G, T, U and N. Is this DNA" in message
    caplog.clear()
    embed_plan.Table.build([write_fasta(tmp_path / "a.fasta", pairs[2:])], tmp_path)
    assert not caplog.messages


def test_ambiguous_ids_are_found_in_all_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_plan, "ROWS_PER_BLOCK", 7)
    monkeypatch.setattr(embed_plan, "PROTEINS_PER_BUCKET", 5)
    pairs = list(random_proteins([3] * 40).items())
    embed_plan.Table.build([write_fasta(tmp_path / "a.fasta", pairs + pairs)], tmp_path)
    with refused("embed.ambiguous-id", id="p17"):
        embed_plan.Table.build([write_fasta(tmp_path / "a.fasta", [*pairs, ("p17", "MMMM")])], tmp_path)


def test_each_option_for_long_proteins(model: Path, tmp_path: Path) -> None:
    proteins = random_proteins([10, 30, 57])
    fasta = write_fasta(tmp_path / "long.fasta", proteins)
    config = EmbedConfig(
        fasta, tmp_path, model=str(model), per_residue=True, bos=True, max_residues=20, window_overlap=8
    )
    with refused("embed.too-long", found=2, allowed=20) as caught:
        embed(config)
    both = "--long_proteins window (overlapping windows, averaged) or --long_proteins truncate (first residues only)."
    assert str(caught.value).endswith(both)
    assert [path.name for path in tmp_path.iterdir()] == ["long.fasta"]

    cut = embed(dataclasses.replace(config, long_proteins="truncate", name="cut"))
    for name, sequence in proteins.items():
        rows_TD = expected(model, sequence[:20])[1:-1]
        np.testing.assert_allclose(EmbeddingReader(cut.hiddens)[name], rows_TD, atol=1e-5)

    for batch_tokens in (22, 50, 1024):
        windowed = embed(
            dataclasses.replace(config, long_proteins="window", batch_tokens=batch_tokens, name=f"w{batch_tokens}")
        )
        bos = EmbeddingReader(tmp_path / f"w{batch_tokens}_bos_embeddings.h5")
        for name, spans in {
            "p0": [(0, 10)],
            "p1": [(0, 20), (10, 30)],
            "p2": [(0, 20), (12, 32), (24, 44), (36, 56), (37, 57)],
        }.items():
            total, count = np.zeros((len(proteins[name]), 32)), np.zeros((len(proteins[name]), 1))
            firsts = []
            for start, stop in spans:
                rows_TD = expected(model, proteins[name][start:stop])
                firsts.append(rows_TD[0])
                total[start:stop] += rows_TD[1:-1]
                count[start:stop] += 1
            np.testing.assert_allclose(EmbeddingReader(windowed.hiddens)[name], total / count, atol=1e-5)
            np.testing.assert_allclose(EmbeddingReader(windowed.embeddings)[name], (total / count).mean(0), atol=1e-5)
            np.testing.assert_allclose(bos[name], np.mean(firsts, 0), atol=1e-5)


@given(num_residues=st.integers(1, 5000), max_residues=st.integers(1, 1022), overlap=st.integers(0, 1021))
def test_windows_cover_a_protein_with_at_least_the_overlap(num_residues: int, max_residues: int, overlap: int) -> None:
    overlap = min(overlap, max_residues - 1)
    if (num_residues - max_residues) / (max_residues - overlap) > 500:
        return
    spans = Windowing(max_residues, overlap, 1024).split(num_residues)
    assert spans[0][0] == 0
    assert spans[-1][1] == num_residues
    assert all(stop - start == min(max_residues, num_residues) for start, stop in spans)
    assert all(before[1] - after[0] >= overlap and after[0] > before[0] for before, after in pairwise(spans))


@given(num_residues=st.lists(st.integers(1, 300), min_size=1, max_size=60), batch_tokens=st.integers(1, 700))
def test_batches_contain_each_protein_once_within_the_budget(num_residues: list[int], batch_tokens: int) -> None:
    num_tokens = np.array(num_residues) + 2
    batches = embed_plan.plan_window(num_tokens, 100, 7, batch_tokens)
    assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(100, 100 + len(num_residues)))
    assert [batch.number for batch in batches] == list(range(7, 7 + len(batches)))
    assert all(len(batch.rows) == 1 or num_tokens[batch.rows - 100].sum() <= batch_tokens for batch in batches)


def test_windows_of_proteins_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_plan, "PROTEINS_PER_WINDOW", 5)
    monkeypatch.setattr(embed_plan, "RESIDUES_PER_WINDOW", 100)
    num_residues_P = np.array([10] * 12 + [300] + [60, 60, 30] + [1] * 9)
    spans = list(embed_plan.split_into_windows(num_residues_P))
    assert spans == [(0, 5), (5, 10), (10, 12), (12, 13), (13, 14), (14, 19), (19, 24), (24, 25)]


def test_half_precision_packed_layout_and_gzip(model: Path, tmp_path: Path) -> None:
    proteins = random_proteins([30, 4, 90])
    fasta = write_fasta(tmp_path / "a.fasta", proteins)
    (tmp_path / "b.fasta.gz").write_bytes(gzip.compress(fasta.read_bytes()))
    full = embed(EmbedConfig(fasta, tmp_path, model=str(model), per_residue=True))
    half = embed(
        EmbedConfig(
            tmp_path / "b.fasta.gz", tmp_path, model=str(model), per_residue=True, dtype="float16", layout="packed"
        )
    )
    assert half.embeddings.name == "b_embeddings.h5"
    with h5py.File(half.hiddens) as file:
        assert (file["values"].dtype, file["values"].shape) == (np.float16, (124, 32))
        assert file["offsets"][()].tolist() == [0, 30, 34, 124]
        assert [name.decode() for name in file["ids"]] == list(proteins)
    for name in proteins:
        exact = EmbeddingReader(full.hiddens)[name]
        np.testing.assert_allclose(EmbeddingReader(half.hiddens)[name], exact, rtol=1e-3, atol=1e-6)


def test_several_files_are_one_input_and_a_finished_run_is_not_repeated(model: Path, tmp_path: Path, caplog) -> None:
    first = write_fasta(tmp_path / "1.fasta", random_proteins([9, 8]))
    second = write_fasta(tmp_path / "2.fasta", {"other": "MKTAY"})
    config = EmbedConfig([first, second], tmp_path, name="both", model=str(model))
    result = embed(config)
    assert EmbeddingReader(result.embeddings).ids == ("p0", "p1", "other")
    made = result.embeddings.stat().st_mtime_ns
    with caplog.at_level("INFO", logger="esm2kit"):
        assert embed(config) == result
    assert result.embeddings.stat().st_mtime_ns == made
    assert "already exists, from the same input, model and settings" in caplog.text
    other = dataclasses.replace(config, untrained_seed=3)
    with refused("embed.file-exists", path=result.embeddings, differing=["model", "untrained_seed"]):
        embed(other)
    assert result.embeddings.stat().st_mtime_ns == made
    embed(dataclasses.replace(other, restart=True))
    assert EmbeddingReader(result.embeddings).attributes["model_name"] == "small_untrained"
    embed(config, replace=True)
    assert EmbeddingReader(result.embeddings).attributes["model_name"] == "small"
    made = result.embeddings.stat().st_mtime_ns
    embed(config, replace=True)
    assert result.embeddings.stat().st_mtime_ns == made, "a file with the same settings is not replaced"


def test_existing_files_are_returned_without_loading_the_model(model: Path, tmp_path: Path, monkeypatch) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([9, 8]))
    config = EmbedConfig(fasta, tmp_path / "out", model=str(model))
    result, loaded, load = embed(config), [], ModelFile.load
    monkeypatch.setattr(ModelFile, "load", lambda found: loaded.append(found.name) or load(found))
    assert embed(config) == result
    with refused("embed.file-exists", differing=["dtype"]):
        embed(dataclasses.replace(config, dtype="float16"))
    fresh = dataclasses.replace(config, name="fresh", untrained_seed=3)
    assert not loaded
    assert embed(fresh) == embed(fresh)
    assert loaded == ["small_untrained"], "the weights are loaded once, when a file is missing"


def interrupt_run(config: EmbedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a run and interrupt it before its first batch is written."""

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embed_run, "_write_all", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(config)


def test_only_missing_outputs_are_computed(model: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20, 3, 7]))
    config = EmbedConfig(fasta, tmp_path / "out", model=str(model))
    means = embed(config).embeddings
    made = means.stat()
    more = dataclasses.replace(config, per_residue=True)
    interrupt_run(more, monkeypatch)
    assert sorted(path.name for path in means.parent.glob("*.h5")) == [means.name], (
        "incomplete files are not in out_dir"
    )
    with caplog.at_level("INFO", logger="esm2kit"):
        both = embed(more)
    assert "resuming the unfinished run" in caplog.text
    assert both.files == (means, both.hiddens)
    assert (means.stat().st_ino, means.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns), "not written again"
    assert_same_files(both.files, embed(dataclasses.replace(more, out_dir=tmp_path / "single run")).files)
    assert embed(config).files == (means,)
    assert embed(dataclasses.replace(more, per_protein=False)).files == (both.hiddens,)
    with refused("embed.file-exists", path=means, differing=["dtype"]):
        embed(dataclasses.replace(more, dtype="float16"))
    with refused("embed.file-exists", path=means, differing=["repr_layers"]):
        embed(dataclasses.replace(more, repr_layers=[0]))


def test_a_deleted_file_is_created_again(model: Path, tmp_path: Path, monkeypatch) -> None:
    """The interrupted run does not create this file, because the file existed when the run started."""
    config = EmbedConfig(
        write_fasta(tmp_path / "a.fasta", random_proteins([20, 3])), tmp_path / "out", model=str(model)
    )
    means = embed(config).embeddings
    more = dataclasses.replace(config, per_residue=True)
    with monkeypatch.context() as patch:
        patch.setattr(embed_run, "_write_all", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed(more)
    means.unlink()
    assert all(path.is_file() for path in embed(more).files)


def test_file_names_do_not_collide_and_foreign_files_are_not_replaced(model: Path, tmp_path: Path) -> None:
    for name in ("liver", "heart"):
        made = embed(EmbedConfig(write_fasta(tmp_path / f"my.{name}.fa", {name: "MKT"}), tmp_path, model=str(model)))
        assert made.embeddings == tmp_path / f"my.{name}_embeddings.h5"
    (tmp_path / "mine_embeddings.h5").write_text("other content")
    with refused("embed.file-exists", differing=[]):
        embed(EmbedConfig(tmp_path / "my.liver.fa", tmp_path, name="mine", model=str(model)))
    assert (tmp_path / "mine_embeddings.h5").read_text() == "other content"


def test_a_run_resumes_after_a_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20] * 30))
    whole = embed(EmbedConfig(fasta, tmp_path / "whole", model=str(model), per_residue=True, batch_tokens=44))
    config = EmbedConfig(fasta, tmp_path / "full", model=str(model), per_residue=True, batch_tokens=44)
    write, written = os.pwrite, []

    def fail_when_full(handle: int, data: memoryview, start: int) -> int:
        written.append(start)
        if len(written) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        # a partial write, as on an almost full disk
        return write(handle, data[: len(data) // 2] if len(written) % 2 else data, start)

    monkeypatch.setattr(embed_run.os, "pwrite", fail_when_full)
    with refused("disk.full", total=600):
        embed(config)
    assert not list((tmp_path / "full").glob("*.h5"))
    monkeypatch.setattr(embed_run.os, "pwrite", write)
    starts = []
    monkeypatch.setattr(embed_run, "embed_batch", lambda *a: starts.append(len(a[1])) or embed_run_batch(*a))
    embed_run_batch = sys.modules["esm2kit.embedding.batch"].embed_batch
    assert_same_files(embed(config).files, whole.files)
    assert 0 < sum(starts) < 30, "finished batches are not embedded again"


@pytest.mark.parametrize("failing", [1, 3, "the last"])
def test_batches_that_failed_to_sync_are_neither_recorded_nor_published(
    model: Path, tmp_path: Path, monkeypatch, caplog, failing: int | str
) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20] * 30))
    whole = embed(EmbedConfig(fasta, tmp_path / "whole", model=str(model), batch_tokens=44))
    config = EmbedConfig(fasta, tmp_path / "full", model=str(model), batch_tokens=44, workers=1)
    sync, synced = embed_run.sync, []

    def refuse(handle: int) -> None:
        synced.append(handle)
        if failing in (len(synced), "the last"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(embed_run, "SYNC_SECONDS", 60.0 if failing == "the last" else 0.0)
    monkeypatch.setattr(embed_run, "sync", refuse)
    with refused("disk.full", total=600):
        embed(config)
    assert not list((tmp_path / "full").glob("*.h5"))
    assert len(synced) == (1 if failing == "the last" else failing), "there is no further attempt"
    assert "(No space left on device); they will be embedded again" in caplog.text
    monkeypatch.setattr(embed_run, "sync", sync)
    assert_same_files(embed(config).files, whole.files)


def test_all_lost_batches_are_counted_and_the_error_is_logged(model: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    """All batches are lost if the first sync is still running, and fails, when the last batch is finished."""
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20] * 30))
    closing, close = threading.Event(), embed_run.EmbeddingRun._close

    def fail(handle: int) -> None:
        closing.wait(60)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(embed_run, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(embed_run, "sync", fail)
    monkeypatch.setattr(embed_run.EmbeddingRun, "_close", lambda run: (closing.set(), close(run)))
    with pytest.raises(OSError, match="Input/output error"):
        embed(EmbedConfig(fasta, tmp_path / "out", model=str(model), batch_tokens=44, workers=1))
    assert "could not record the last 15 batches (Input/output error); they will be embedded again" in caplog.text


def test_a_journal_written_in_parts_is_complete(model: Path, tmp_path: Path, monkeypatch) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20] * 30))
    config = EmbedConfig(fasta, tmp_path / "out", model=str(model), batch_tokens=44, workers=1)
    write, written_batches = os.write, []

    def write_part(handle: int, data: bytes) -> int:
        return write(handle, data[: max(1, len(data) // 3)])

    def interrupt_run(*arguments: object) -> None:
        written_batches.append(arguments)
        if len(written_batches) > 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embed_run, "SYNC_SECONDS", 0.0)
        patch.setattr(embed_run.os, "write", write_part)
        patch.setattr(embed_run, "_write_all", interrupt_run)
        with pytest.raises(KeyboardInterrupt):
            embed(config)
    done = embed_plan.Journal(tmp_path / "out" / "a_embed.part").read_done()
    assert set(done) == set(range(10)), "two proteins per batch"


def test_an_unfinished_run_with_other_settings_is_not_deleted(model: Path, tmp_path: Path, monkeypatch) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20] * 30))
    config = EmbedConfig(fasta, tmp_path / "out", model=str(model))
    interrupt_run(config, monkeypatch)
    other = dataclasses.replace(config, dtype="float16")
    with refused("embed.run-exists", differing=["dtype"]):
        embed(other)
    write_fasta(fasta, random_proteins([20] * 29))
    with refused("embed.run-exists", differing=["fasta"]):
        embed(config)
    assert embed(dataclasses.replace(other, restart=True)).num_proteins == 29


def test_a_run_killed_while_moving_its_files_is_completed(model: Path, tmp_path: Path, monkeypatch) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20] * 5))
    config = EmbedConfig(fasta, tmp_path / "out", model=str(model), per_residue=True)
    replace, moved = os.replace, []

    def killed(source: Path, target: Path) -> None:
        if str(source).endswith(".h5"):
            moved.append(target)
            if len(moved) == 2:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            embed(config)
    assert len(list((tmp_path / "out").glob("*.h5"))) == 1
    result = embed(config)
    assert result.num_proteins == 5
    assert_same_files(result.files, embed(dataclasses.replace(config, out_dir=tmp_path / "again")).files)
    assert not list((tmp_path / "out").glob("*.part"))


# a shell ignores SIGINT in background processes, which includes the tests
SCRIPT = """
import logging, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from esm2kit.embedding import run as embed_run
from esm2kit.embedding.batch import Output, embed_batch, embed_on_device, pack_batch, split_by_protein
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.embed import embed
logging.basicConfig(level=logging.INFO, format="%(message)s")
embed_run.SYNC_SECONDS = 0.0
fasta, out, model, wait = sys.argv[1:]
write_all = embed_run._write_all
def write_slowly(*arguments):
    time.sleep(float(wait))
    write_all(*arguments)
embed_run._write_all = write_slowly
result = embed(EmbedConfig(fasta, out, model=model, per_residue=True, batch_tokens=128, workers=1, device="cpu"))
"""


LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start(command: list[str], arguments: list[object], more: dict[str, str] | None = None) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    environment |= more or {}
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def srun_task(number: int, port: int) -> dict[str, str]:
    """Return the environment that srun sets for one of two tasks on a node."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "localhost"}
    task = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_CPUS_ON_NODE": "2"}
    return step | task | {"MASTER_PORT": str(port)}


def test_a_run_that_was_killed_and_interrupted_gives_the_same_files(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins(np.random.default_rng(0).integers(5, 60, 90).tolist()))
    arguments, journal = [fasta, tmp_path / "killed", model], tmp_path / "killed" / "a_embed.part" / "done.0.bin"
    recorded = 0
    for stop in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT):  # one second per batch: no run finishes
        process = start([sys.executable, str(script)], [*arguments, 1.0])
        deadline = time.monotonic() + 60
        while not (journal.is_file() and journal.stat().st_size >= recorded + 16):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, "no batch was recorded within a minute"
            time.sleep(0.01)
        process.send_signal(stop)
        output = process.communicate(timeout=60)[0]
        assert process.returncode != 0
        recorded = journal.stat().st_size
    assert "rerun the command to resume" in output
    assert not list((tmp_path / "killed").glob("*.h5")), "incomplete files are not in out_dir"
    with open(journal, "ab") as file:
        file.write(b"\x01\x02\x03")  # an incomplete entry, as after a power failure
    config = EmbedConfig(fasta, tmp_path / "whole", model=str(model), per_residue=True, batch_tokens=128)
    finished = embed(dataclasses.replace(config, out_dir=tmp_path / "killed", workers=2))
    assert_same_files(finished.files, embed(config).files)


def test_two_processes_write_one_file(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins(np.random.default_rng(0).integers(5, 60, 60).tolist()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    process = start(torchrun, [fasta, tmp_path / "two", model, 0])
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    config = EmbedConfig(fasta, tmp_path / "one", model=str(model), per_residue=True, batch_tokens=128)
    one = embed(config)
    two = tuple(tmp_path / "two" / path.name for path in one.files)
    assert_same_files(two, one.files)
    assert output.count("embedded ") == 2, "each process embeds a share"

    write_fasta(fasta, {"bad": "MK1T"})
    process = start(torchrun, [fasta, tmp_path / "bad", model, 0])
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert output.count("InputError:") >= 2, "invalid input ends every process with one message"


def test_two_tasks_of_srun_write_one_file_and_a_missing_task_is_reported(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20] * 40))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(script)]
    tasks = [start(command, [fasta, tmp_path / "two", model, 0], srun_task(number, port)) for number in range(2)]
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert all("embedded 400 of 400 residues" in output for output in outputs), "each task embeds a share"
    one = embed(EmbedConfig(fasta, tmp_path / "one", model=str(model), per_residue=True, batch_tokens=128))
    assert_same_files(tuple(tmp_path / "two" / path.name for path in one.files), one.files)

    script.write_text("from esm2kit.core import process_group\nprocess_group.RENDEZVOUS_SECONDS = 0.5\n" + SCRIPT)
    alone = start(command, [fasta, tmp_path / "alone", model, 0], srun_task(0, port))
    output = alone.communicate(timeout=120)[0]
    assert "InputError: not all of the 2 srun tasks connected to localhost" in output
    assert alone.returncode != 0


def test_all_files_are_synced_before_the_plan_is_written(model: Path, tmp_path: Path, monkeypatch) -> None:
    synced, plans = set(), []

    def plan(folder: Path, content: dict) -> None:
        plans.append({path.name for path in folder.iterdir()} - synced - {"plan.json"})
        embed_plan.write_plan(folder, content)

    monkeypatch.setattr("esm2kit.embedding.embed.fsync", lambda path: synced.add(Path(path).name))
    monkeypatch.setattr("esm2kit.embedding.embed.write_plan", plan)
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([5]))
    embed(EmbedConfig(fasta, tmp_path / "out", model=str(model), per_residue=True))
    assert {"a_embeddings.h5", "a_hiddens.h5"} == {path.name for path in (tmp_path / "out").glob("*.h5")}
    assert plans[0] == set()
    assert {"embeddings.h5", "hiddens.starts.npy", "proteins.bin", "ids.txt"} <= synced


def test_a_task_with_one_visible_gpu_uses_it(tmp_path: Path, monkeypatch) -> None:
    config = EmbedConfig(tmp_path, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for seen, rank, index in ((4, 3, 3), (1, 3, 0)):  # all GPUs of the node, or one per task with --gpus-per-task
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        assert _choose_device(config, embed_run.Process(rank, 4, rank)) == torch.device("cuda", index)


def test_invalid_settings_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", {"a/b": "MKT"})
    cases = [
        ({"per_protein": False}, "embed.nothing", {}),
        ({"repr_layers": []}, "embed.no-layers", {}),
        ({"repr_layers": [3]}, "model.layer", {"found": 3, "allowed": 2}),
        ({"repr_layers": [2, -1]}, "embed.layer-twice", {"found": [2, -1]}),
        ({"window_overlap": 1022, "long_proteins": "window"}, "option.range", {"name": "window_overlap"}),
        ({"workers": 0}, "option.range", {"name": "workers", "found": 0}),
        ({"key": "id"}, "embed.id", {"id": "a/b"}),
        ({"key": "hash", "layout": "packed"}, "embed.key", {"key": "hash", "layout": "packed"}),
        ({"model": "esm2_t6_9M"}, "model.unknown", {"name": "esm2_t6_9M"}),
    ]
    for changes, code, values in cases:
        with refused(code, **values):
            embed(EmbedConfig(**({"fasta": fasta, "out_dir": tmp_path / "out", "model": str(model)} | changes)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused("device.absent", found="cpu", requested="cuda"):
        embed(EmbedConfig(fasta, tmp_path / "out", model=str(model), device="cuda"))
    assert not list((tmp_path / "out").glob("*")), "no partial files remain"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pooling_on_the_device_gives_the_same_values(dtype: str) -> None:
    encoder = Encoder(ESM2.initialised(CONFIG, 3).eval())
    sequences = ["MKTAYIAK", "G", "ACDEFGHIKLMNPQRSTVWY" * 3]
    width = CONFIG.embed_dim
    outputs = [Output("a", 2, "mean", width), Output("b", 1, "bos", width), Output("c", 2, "none", width)]
    outputs.append(Output("d", 2, "logits", 33))
    usual = embed_batch(encoder, sequences, outputs, Windowing(100, 10, 1000), dtype)

    def embed_parts(sequences: list[str], dtype: str) -> list[list[np.ndarray]]:
        packed = pack_batch(sequences, Windowing(100, 10, 1000))
        found = embed_on_device(encoder, packed, outputs, dtype)
        return [
            split_by_protein(torch.cat(rows).numpy(), packed, output)
            for rows, output in zip(found, outputs, strict=True)
        ]

    packed = embed_parts(sequences, dtype)
    for first, second in zip(packed, usual, strict=True):
        for one, other in zip(first, second, strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype == dtype
            np.testing.assert_allclose(one, other, atol=1e-6 if dtype == "float32" else 2e-3)
    alone = [embed_parts([sequence], "float32")[0][0] for sequence in sequences]
    together = embed_parts(sequences, "float32")[0]
    np.testing.assert_allclose(alone, together, atol=1e-6)


@pytest.mark.parametrize("long_proteins", ["error", "truncate"])
def test_the_overlap_of_windows_matters_only_for_windows(long_proteins: str, model: Path, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", {"a": "MKVLAAGG"})
    common = {"model": str(model), "max_residues": 100}
    short = embed(EmbedConfig(fasta, tmp_path / "short", long_proteins=long_proteins, **common))
    full = embed(EmbedConfig(fasta, tmp_path / "full", model=str(model)))
    np.testing.assert_array_equal(EmbeddingReader(short.embeddings)["a"], EmbeddingReader(full.embeddings)["a"])
    with refused("option.range", name="window_overlap"):
        EmbedConfig(fasta, tmp_path, long_proteins="window", **common)
    with refused("option.range", name="max_residues"):
        EmbedConfig(fasta, tmp_path, long_proteins=long_proteins, max_residues=0)


def test_the_resolved_precision_is_recorded_and_a_float32_file_stays_recognised(
    model: Path, tmp_path: Path, monkeypatch
) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([5, 9, 30]))
    plain = EmbedConfig(fasta, tmp_path / "plain", model=str(model))
    assert plain.precision == "auto"
    found = embed(plain).embeddings
    assert EmbeddingReader(found).attributes["precision"] == "float32"
    values = values_of(found)

    # a machine whose GPU computes in bfloat16
    monkeypatch.setattr(
        "esm2kit.embedding.embed.resolve_precision",
        lambda requested, device: "bfloat16" if requested == "auto" else requested,
    )
    written = found.stat().st_mtime_ns
    assert embed(plain).embeddings.stat().st_mtime_ns == written, "the exact file answers the same command"
    assert embed(dataclasses.replace(plain, precision="float32")).embeddings.stat().st_mtime_ns == written
    with refused("embed.file-exists", differing=["precision"]):
        embed(dataclasses.replace(plain, precision="bfloat16"))

    more = embed(dataclasses.replace(plain, per_residue=True))
    assert EmbeddingReader(more.hiddens).attributes["precision"] == "float32", "files of one run have one precision"

    config = dataclasses.replace(plain, out_dir=tmp_path / "fast")
    fast = embed(config).embeddings
    attributes = EmbeddingReader(fast).attributes
    assert attributes["precision"] == attributes["provenance"]["config"]["precision"] == "bfloat16"
    assert 1e-5 < max(abs(value - values[key]).max() for key, value in values_of(fast).items()) < 0.1
    assert values_of(embed(dataclasses.replace(config, precision="bfloat16")).embeddings).keys() == values.keys()
    with refused("embed.file-exists", differing=["precision"]):
        embed(dataclasses.replace(config, precision="float32"))
    monkeypatch.undo()
    with refused("embed.file-exists", differing=["precision"]):  # where auto is float32, a bfloat16 file is another
        embed(config)
    assert EmbeddingReader(embed(config, replace=True).embeddings).attributes["precision"] == "float32"


def test_an_unfinished_float32_run_resumes_in_float32(model: Path, tmp_path: Path, monkeypatch) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([5, 9, 30, 31, 40]))
    expected = embed(EmbedConfig(fasta, tmp_path / "plain", model=str(model), batch_tokens=32))
    config = EmbedConfig(fasta, tmp_path / "out", model=str(model), batch_tokens=32)
    interrupt_run(config, monkeypatch)
    monkeypatch.setattr(
        "esm2kit.embedding.embed.resolve_precision",
        lambda requested, device: "bfloat16" if requested == "auto" else requested,
    )
    with refused("embed.run-exists", differing=["precision"]):
        embed(dataclasses.replace(config, precision="bfloat16"))
    assert_same_files(embed(config).files, expected.files)
