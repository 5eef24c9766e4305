"""Embedding with a model that is divided over two processes gives the files of one, also after an end by force."""

import dataclasses
import os
import signal
from pathlib import Path

import pytest
from embedding.test_devices import assert_resumes, command, model, start, wait_for_both
from support.embedding_fixtures import assert_same_files, every_output, random_proteins, write_fasta
from support.errors import refused

from esm2kit.embedding.config import EmbedConfig
from esm2kit.embedding.embed import embed
from esm2kit.models.sharded import PeerStopped, stop_with_peers

__all__ = ["model"]


@pytest.mark.parametrize("lengths", [[5, 300, 1, 40, 40, 700, 17] + [30] * 40, [20]], ids=["many", "one"])
def test_two_devices_with_half_of_the_model_give_the_files_of_one(
    lengths: list[int], model: Path, tmp_path: Path, caplog
) -> None:
    """With a single protein the second process has no batch, and makes idle passes only."""
    caplog.set_level("INFO", logger="esm2kit")
    config = every_output(write_fasta(tmp_path / "a.fasta", random_proteins(lengths)), tmp_path / "one", model)
    one = embed(config)
    two = embed(dataclasses.replace(config, out_dir=tmp_path / "two", devices=2, shard=True))
    assert "tiny is divided over 2 devices" in caplog.text
    assert_same_files(two.files, one.files, atol=1e-6)
    assert embed(dataclasses.replace(config, out_dir=tmp_path / "two")).files == two.files, "it changes no setting"


def sharded(fasta: Path, out: Path, model: Path) -> list[str]:
    return [*command(fasta, out, model), "--shard", "true"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers in /proc")
@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_a_run_that_is_ended_resumes_in_either_way(how: str, model: Path, tmp_path: Path) -> None:
    # some seconds: each pass gathers the layers
    fasta, folder = write_fasta(tmp_path / "a.fasta", random_proteins([30] * 1200)), tmp_path / "out" / "a_embed.part"
    process = start(sharded(fasta, tmp_path / "out", model))
    workers = wait_for_both(folder, process)
    if how == "interrupt":
        process.send_signal(signal.SIGINT)
    else:
        os.kill(workers[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    lines = {
        "interrupt": "interrupted. Run the same command again to resume.\n",
        "kill": "esm2kit: worker 1 was ended by SIGKILL. Run the same command again to resume.\n",
    }
    assert process.returncode == {"interrupt": 130, "kill": 2}[how], errors
    assert errors.endswith(lines[how]), errors
    assert "Traceback" not in errors, errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())
    assert_resumes(sharded(fasta, tmp_path / "out", model), fasta, folder, model, atol=1e-6)


def test_what_contradicts_is_refused(model: Path, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "a.fasta", random_proteins([20]))
    with refused("shard.layer-by-layer"):
        EmbedConfig(fasta, shard=True, layer_by_layer=True)
    config = EmbedConfig(fasta, tmp_path / "out", model=str(model), device="cpu", shard=True)
    with refused("shard.one-device"):
        embed(config)


def test_the_end_of_another_process_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = []
    monkeypatch.setattr("esm2kit.models.sharded.time.sleep", slept.append)
    with pytest.raises(KeyboardInterrupt), stop_with_peers():
        raise PeerStopped
    assert slept == [60.0]
