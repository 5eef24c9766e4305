"""The stream of a GPU, raced on the CPU: copies arrive as late as a GPU may deliver them, and buffers are reused."""

import dataclasses
import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.embedding_fixtures import CONFIG, assert_same_files, random_proteins, values_of, write_fasta, write_model
from support.errors import refused
from torch import Tensor

from esm2kit.embedding import run as embed_run
from esm2kit.embedding import stream as embed_stream
from esm2kit.embedding.batch import Output, embed_on_device, pack_batch
from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.embed import embed
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2
from esm2kit.sequences.windows import Windowing

# some are longer than max_residues and need windows
LENGTHS = [5, 300, 1, 40, 40, 17, 90, 120, 33, 60, 61, 62, 8, 250, 70, 71, 72, 73, 74, 20] * 2
OPTIONS = {"repr_layers": [-1, 0], "per_residue": True, "bos": True, "logits": True, "batch_tokens": 150}
OPTIONS |= {"long_proteins": "window", "max_residues": 110, "window_overlap": 30}


class LateCopies:
    """As a GPU: the content of a buffer is undefined from the start of a copy until its event was waited for."""

    def __init__(self) -> None:
        self.allocated: list[int] = []
        self.used_again = threading.Event()  # when more copies were started than there are buffers
        self._started = 0

    def allocate(self, num_bytes: int) -> Tensor:
        self.allocated.append(num_bytes)
        return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)

    def start(self, pairs: list[tuple[Tensor, Tensor]]) -> "LateEvent":
        for _, target in pairs:
            target.view(torch.uint8).fill_(0xFF)  # NaN in every floating-point type
        self._started += 1
        if self._started > embed_stream.NUM_BUFFERS:
            self.used_again.set()
        return LateEvent(pairs)


class LateEvent:
    """The copies run when it is waited for."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs

    def synchronize(self) -> None:
        with torch.inference_mode():
            for source, target in self.pairs:
                target.copy_(source)
        self.pairs = []


class NoWait(LateCopies):
    """The mistake of a host that does not wait for its copies."""

    def start(self, pairs: list[tuple[Tensor, Tensor]]) -> embed_stream.Event:
        super().start(pairs)
        return embed_stream.DirectCopies()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    """Runs on the CPU use the stream, with late copies and a slow disk."""
    late, write = LateCopies(), embed_run._write_all

    def write_slowly(*arguments: object) -> None:
        time.sleep(0.0005)  # time for the other stages to use a buffer that is not theirs
        write(*arguments)

    monkeypatch.setattr(embed_run, "choose_copies", lambda device: late)
    monkeypatch.setattr(embed_run, "_write_all", write_slowly)
    return late


def embed_both(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int] = LENGTHS, **options: object
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Embed by the stream, then as on a CPU; the files of both."""
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins(lengths))
    config = EmbedConfig(fasta, tmp_path / "stream", model=str(model), **options)
    found = embed(config).files
    monkeypatch.setattr(embed_run, "choose_copies", lambda device: None)
    return found, embed(dataclasses.replace(config, out_dir=tmp_path / "plain")).files


@pytest.mark.parametrize("layout", ["datasets", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_stream_writes_what_the_cpu_writes(
    dtype: str, layout: str, model: Path, tmp_path: Path, copies: LateCopies, monkeypatch
) -> None:
    found, expected = embed_both(model, tmp_path, monkeypatch, dtype=dtype, layout=layout, **OPTIONS)
    assert len(found) == 7
    assert_same_files(found, expected, atol=1e-5 if dtype == "float32" else 2e-3)
    assert copies.allocated[:3] == [0, 0, 0]
    assert copies.allocated[3:], "buffers grow"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("embed-")]


def test_buffers_are_reused(model: Path, tmp_path: Path, copies: LateCopies, monkeypatch) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20] * 200))
    embed(EmbedConfig(fasta, tmp_path / "out", model=str(model), batch_tokens=44))
    assert len(copies.allocated) == 2 * embed_stream.NUM_BUFFERS, "100 batches of one size need three buffers"


def test_a_host_that_does_not_wait_is_detected(model: Path, tmp_path: Path, copies: LateCopies, monkeypatch) -> None:
    monkeypatch.setattr(embed_run, "choose_copies", lambda device: NoWait())
    found, expected = embed_both(model, tmp_path, monkeypatch, batch_tokens=150)
    with pytest.raises(AssertionError):
        assert_same_files(found, expected, atol=1e-5)


def test_a_buffer_that_is_reused_too_early_is_detected(
    model: Path, tmp_path: Path, copies: LateCopies, monkeypatch
) -> None:
    """The first batch is written after its buffer was used again, which no buffer is before it is written."""
    check, write = embed_stream.DeviceStream.check, embed_run._write_all

    def write_late(*arguments: object) -> None:
        assert copies.used_again.wait(60)
        write(*arguments)

    def check_and_release(self: embed_stream.DeviceStream, computed: object) -> embed_stream.EmbeddedBatch | None:
        embedded = check(self, computed)
        if embedded is not None:
            self.free.put(embedded.buffer)
        return embedded

    with monkeypatch.context() as patch:
        patch.setattr(embed_stream.DeviceStream, "check", check_and_release)
        patch.setattr(embed_stream.DeviceStream, "release", lambda self, buffer: None)
        patch.setattr(embed_run, "_write_all", write_late)
        found, expected = embed_both(model, tmp_path, patch, [20] * 40, per_residue=True, batch_tokens=44)
    with pytest.raises(AssertionError):
        assert_same_files(found, expected, atol=1e-5)


def test_reading_ahead_is_bounded(model: Path, tmp_path: Path, copies: LateCopies, monkeypatch) -> None:
    done = {"read": 0, "written": 0}
    ahead: list[int] = []
    read, write_batch = embed_stream.DeviceStream.read, embed_run.EmbeddingRun._write_batch

    def count_read(self: embed_stream.DeviceStream, batches: object) -> object:
        done["read"] += 1
        ahead.append(done["read"] - done["written"])
        return read(self, batches)

    def count_written(self: embed_run.EmbeddingRun, *arguments: object) -> None:
        time.sleep(0.02)
        write_batch(self, *arguments)
        done["written"] += 1

    monkeypatch.setattr(embed_stream.DeviceStream, "read", count_read)
    monkeypatch.setattr(embed_run.EmbeddingRun, "_write_batch", count_written)
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20] * 60))
    embed(EmbedConfig(fasta, tmp_path / "out", model=str(model), batch_tokens=44))
    assert done["written"] == 30
    assert 1 < max(ahead) <= embed_stream.BATCHES_AHEAD + 1


@pytest.mark.parametrize("failure", ["interrupt", "disk full", "input changed"])
def test_a_stream_that_fails_ends_its_threads_and_the_run_resumes(
    failure: str, model: Path, tmp_path: Path, copies: LateCopies, monkeypatch
) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins(LENGTHS))
    config = EmbedConfig(fasta, tmp_path / "out", model=str(model), batch_tokens=150, per_residue=True)
    whole = embed(dataclasses.replace(config, out_dir=tmp_path / "whole"))
    written: list[int] = []

    def fail(handle: int, data: memoryview, start: int) -> int:
        written.append(start)
        if len(written) > 40:
            if failure == "interrupt":
                raise KeyboardInterrupt
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(handle, data, start)

    with monkeypatch.context() as patch:
        if failure == "input changed":
            changed = write_fasta(tmp_path / "b.fasta", random_proteins(LENGTHS[:-1]))
            patch.setattr(embed_run, "read_records", lambda files, read=embed_run.read_records: read([changed]))
            with refused("embed.input-changed"):
                embed(config)
        else:
            patch.setattr(embed_run, "write_at", fail)
            with refused("disk.full") if failure == "disk full" else pytest.raises(KeyboardInterrupt):
                embed(config)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("embed-")]
    embedded: list[int] = []
    compute = embed_stream.embed_on_device
    monkeypatch.setattr(
        embed_stream,
        "embed_on_device",
        lambda encoder, packed, *rest: embedded.append(len(packed.places)) or compute(encoder, packed, *rest),
    )
    assert_same_files(embed(config).files, whole.files)
    assert 0 < sum(embedded) <= len(LENGTHS)
    if failure != "input changed":
        assert sum(embedded) < len(LENGTHS), "finished batches are not embedded again"


def test_a_value_beyond_float16_is_refused_by_the_stream(
    model: Path, tmp_path: Path, copies: LateCopies, monkeypatch
) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20] * 10))
    config = EmbedConfig(fasta, tmp_path / "out", model=str(model), batch_tokens=44, dtype="float16")
    compute = embed_stream.embed_on_device

    def overflow(encoder: object, packed: object, outputs: object, dtype: str) -> list[list[Tensor]]:
        return [[rows.mul(1e6) for rows in parts] for parts in compute(encoder, packed, outputs, dtype)]

    with monkeypatch.context() as patch:
        patch.setattr(embed_stream, "embed_on_device", overflow)
        with refused("embed.float16", layer=2):
            embed(config)
    assert all(np.isfinite(value).all() for value in values_of(embed(config).embeddings).values())


def test_the_compute_stage_reads_no_value_of_the_device() -> None:
    """On the device meta, which has shapes and no values, an operation that waits for the device is an error."""
    with pytest.raises(RuntimeError):
        torch.ones(3, device="meta").nonzero()
    encoder = Encoder(ESM2.initialised(CONFIG, 0).eval(), "float32", "meta")
    outputs = [Output("a", 2, "mean", 32), Output("b", 1, "bos", 32), Output("c", 2, "none", 32)]
    outputs.append(Output("d", 2, "logits", 33))
    packed = pack_batch(["MKT", "ACDEFGHIKLMNPQRSTVWY" * 10, "GGG"], Windowing(50, 10, 100))
    assert packed.places == [0, 2, 1], "proteins with windows come last"
    found = embed_on_device(encoder, packed, outputs, "float16")
    shapes = [[tuple(rows.shape) for rows in parts] for parts in found]
    assert shapes == [[(2, 32), (1, 32)]] * 2 + [[(6, 32), (200, 32)], [(6, 33), (200, 33)]]
    assert {(rows.device.type, rows.dtype) for parts in found for rows in parts} == {("meta", torch.float16)}


def test_threads_use_the_gpu_of_the_encoder(monkeypatch) -> None:
    """torch refuses to make a device without a number the current one."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cuda:1", "cuda", "cpu", "mps"):
        embed_stream._use_device(torch.device(name))
    assert chosen == [torch.device("cuda:1")]
