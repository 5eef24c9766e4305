"""Features read from a file: the same rows for every layout and dtype, with one batch in memory."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from support.errors import refused
from support.planted import make_planted_task

from esm2kit.benchmarking.model_features import read_features
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import Features, FileRows, ProbeTargets, read_blocks
from esm2kit.benchmarking.probes.fit import fit_probe
from esm2kit.embedding.hdf5 import Entry, Skeleton, create_file, seal_file


def write(path, data, values_ND, layout="packed", dtype="float32"):
    """Write a file as `esm2kit embed` does, with the proteins in reverse order."""
    residue = len(values_ND) != len(data.ids)
    counts = data.num_residues if residue else np.ones(len(data.ids), np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    backwards = range(len(data.ids) - 1, -1, -1)
    rows = [Entry(data.ids[p], str(place), int(data.num_residues[p])) for place, p in enumerate(backwards)]
    skeleton = Skeleton("residue" if residue else "protein", layout, values_ND.shape[1], dtype, "index")
    starts = np.zeros(len(rows), np.int64)
    create_file(path, skeleton, rows, len(rows), int(data.num_residues.sum()), {"model_name": "planted"}, starts)
    with open(path, "r+b") as file:
        for start, protein in zip(starts, backwards, strict=True):
            file.seek(start)
            file.write(values_ND[offsets[protein] : offsets[protein + 1]].astype(dtype).tobytes())
    seal_file(path)
    return path


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("layout", ["packed", "datasets"])
@pytest.mark.parametrize("level", ["protein", "residue"])
def test_rows_of_any_file_come_in_the_order_of_the_task(tmp_path, level, layout, dtype):
    features, data = make_planted_task(level, "class", num_proteins=60)
    path = write(tmp_path / "a.h5", data, features.values_ND, layout, dtype)
    read = read_features(path, data, level == "residue").features
    assert (read.offsets == features.offsets).all()
    assert [found.name for found in tmp_path.iterdir()] == ["a.h5"], "nothing is copied"
    expected = torch.from_numpy(features.values_ND.astype(np.float32))
    for rows in (np.arange(len(expected)), np.arange(1, len(expected), 3), data.target_rows("test")):
        found = torch.cat([block for _, block in read_blocks(read, rows, size=37)])
        assert (found == expected[rows]).all()
    targets = ProbeTargets.from_task(data)
    config = ProbeConfig("cnn" if level == "residue" else "fnn", epochs=2)
    assert (fit_probe(read, targets, config, (0,)).test_SM == fit_probe(features, targets, config, (0,)).test_SM).all()


def test_a_truncated_file_is_refused(tmp_path):
    features, data = make_planted_task("residue", "class", num_proteins=20)
    path = write(tmp_path / "a.h5", data, features.values_ND)
    read = read_features(path, data, True).features
    with open(path, "r+b") as file:
        file.truncate(int(read.values_ND.starts_P.min()) + 8)
    with refused("embeddings.short", path=path):
        fit_probe(read, ProbeTargets.from_task(data), ProbeConfig("cnn", epochs=1), (0,))


MEMORY = """
import sys
import numpy as np
from pathlib import Path
from support.planted import make_planted_task
from esm2kit.benchmarking.probes.config import ProbeConfig
from esm2kit.benchmarking.probes.features import ProbeTargets
from esm2kit.benchmarking.probes.fit import fit_probe
from esm2kit.benchmarking.model_features import read_features

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024

data = make_planted_task("residue", "class", num_proteins=4000)[1]
config = ProbeConfig("cnn", hidden=2, epochs=1, row_budget=2048)
fit_probe(read_features(Path(sys.argv[1]), data, True).features, ProbeTargets.from_task(data), config, (0,))
print(peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """With rows of 1,280 numbers the process holds one batch in memory, not the file."""
    data = make_planted_task("residue", "class", num_proteins=4000)[1]
    total = int(data.num_residues.sum())
    sizes = {}
    for width in (16, 1280):
        path = tmp_path / f"{width}.h5"
        write(path, data, np.zeros((total, width), np.float16), dtype="float16")
        command = [sys.executable, "-c", MEMORY, str(path)]
        environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "PATH": ""}
        environment["ESM2KIT_DEVICE"] = "cpu"
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        sizes[width] = float(done.stdout)
    file_mb = total * 1280 * 2 / 2**20  # half precision; float32 needs twice as much
    assert file_mb > 200
    assert sizes[1280] - sizes[16] < file_mb / 2, sizes


def test_shape_of_rows_in_a_file(tmp_path):
    np.arange(12, dtype=np.float32).tofile(tmp_path / "raw")
    rows = FileRows(tmp_path / "raw", np.array([32, 0]), np.array([0, 2, 3]), 2, np.dtype("float32"))
    assert (len(rows), rows.shape) == (3, (3, 2))
    taken = Features(rows, rows.offsets).take(np.array([0, 2]))
    assert taken.tolist() == [[8, 9], [0, 1]]


def open_files():
    """Return the inodes of the open files of this process."""
    found = set()
    for handle in os.listdir("/dev/fd"):
        with suppress(OSError):  # the handle of the listing itself, now closed
            found.add(os.fstat(int(handle)).st_ino)
    return found


def test_a_file_stays_open_until_its_features_are_closed(tmp_path, monkeypatch):
    """Threads can read concurrently, and replacing the file on disk does not change the rows."""
    monkeypatch.setattr("esm2kit.benchmarking.probes.features.BYTES_PER_READ", 7)
    features, data = make_planted_task("residue", "class", num_proteins=20)
    path = write(tmp_path / "a.h5", data, features.values_ND)
    read = read_features(path, data, True).features
    held_file = os.fstat(read.values_ND._file.fileno()).st_ino
    path.unlink()
    write(path, data, np.zeros_like(features.values_ND))
    expected = torch.from_numpy(features.values_ND.astype(np.float32))
    with closing(read), ThreadPoolExecutor(4) as pool:
        for found in pool.map(read.take, [np.arange(start, len(expected)) for start in range(0, len(expected), 40)]):
            assert (found == expected[-len(found) :]).all()
        assert held_file in open_files()
    assert held_file not in open_files()
    with pytest.raises(ValueError, match="closed file"):
        read.take(np.arange(3))


def test_protein_vectors_are_in_memory_and_their_file_is_closed(tmp_path):
    features, data = make_planted_task("protein", "class", num_proteins=20)
    path = write(tmp_path / "a.h5", data, features.values_ND)
    read = read_features(path, data, False)
    assert path.stat().st_ino not in open_files()
    assert (read.features.values_ND == features.values_ND).all()
