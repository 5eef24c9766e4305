"""Preprocessing of all kinds of input, after kills, with faults, and of the real dataset."""

import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from filelock import FileLock
from scipy import stats
from support.errors import refused

from esm2kit.core.errors import InputError
from esm2kit.preprocessing import leakage
from esm2kit.preprocessing.preprocess import PreprocessConfig, preprocess
from esm2kit.sequences import store
from esm2kit.sequences.clusters import ClusterIndex, draw_sample
from esm2kit.sequences.fasta import read_fasta
from esm2kit.sequences.store import ROWS_PER_BATCH, SequenceStore

RANDOM = random.Random(0)
# eight clusters of 1 to 8 members; the ids of members and clusters sort differently
MEMBERS = {f"UR50_{c}": [f"UR90_{(c * 7 + m) % 100:02d}{c}" for m in range(c + 1)] for c in range(8)}


def protein(name: str, residues: int = 40) -> str:
    return "".join(random.Random(name).choices("LAGVSERTIDPKQNFYMHWC", k=residues))


SEQUENCES = {name: protein(name) for names in MEMBERS.values() for name in names}
SEQUENCES |= {cluster: SEQUENCES[names[0]] for cluster, names in MEMBERS.items()}
ALL_MEMBERS = [name for names in MEMBERS.values() for name in names]


def fasta(names: list[str], sequences: dict[str, str] = SEQUENCES) -> str:
    return "".join(f">{name} what it is\n{sequences[name]}\n" for name in names)


def mapping(members: dict[str, list[str]] = MEMBERS) -> str:
    return "ur50_id\tur90_ids\n" + "".join(f"{name}\t{','.join(ids)}\n" for name, ids in members.items())


TRAIN, SAMPLER = fasta(list(MEMBERS)), fasta([*ALL_MEMBERS, *MEMBERS])
TABLE = mapping()

Trio = Callable[..., PreprocessConfig]


@pytest.fixture
def trio(tmp_path) -> Trio:
    """Return a function that writes the three esm2nv files, with replaced text, and builds their configuration."""

    def make(train=TRAIN, sampler=SAMPLER, table=TABLE, **settings):
        for name, text in (("train.fasta", train), ("sampler.fasta", sampler), ("mapping.tsv", table)):
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return PreprocessConfig(
            train_fasta=tmp_path / "train.fasta",
            sampler_fasta=tmp_path / "sampler.fasta",
            mapping=tmp_path / "mapping.tsv",
            **{"out_dir": tmp_path / "out", "threads": 1, "leakage_identity": 0.0} | settings,
        )

    return make


def one_fasta(folder: Path, text: str, **settings) -> PreprocessConfig:
    (folder / "all.fasta").write_text(text)
    settings = {"out_dir": folder / "out", "threads": 1, "leakage_identity": 0.0} | settings
    return PreprocessConfig(train_fasta=folder / "all.fasta", **settings)


def read_clusters(out_dir: Path) -> dict[str, set[str]]:
    """Read the ids of representatives and their members."""
    index, train = ClusterIndex.open(out_dir), SequenceStore.open(out_dir / "train.arrow")
    return {
        train.id(int(index.representative_rows[cluster])): {train.id(int(row)) for row in index.members(cluster)}
        for cluster in range(index.num_clusters)
    }


def records_of(path: Path) -> dict[str, str]:
    opened = SequenceStore.open(path)
    return {opened.id(row): opened.residues(row).tobytes().decode() for row in range(len(opened))}


def contents(out_dir: Path) -> dict[str, bytes]:
    """Read the bytes of all files, without the time, the commit and so the digest of the manifest."""
    found = {str(path.relative_to(out_dir)): path.read_bytes() for path in out_dir.rglob("*") if path.is_file()}
    manifest = json.loads(found["manifest.json"])
    kept = manifest | {"created": None, "git_commit": None, "sha256": None}
    return found | {"manifest.json": json.dumps(kept).encode()}


EXPECTED = {name: set(ids) for name, ids in MEMBERS.items()}


def test_the_three_esm2nv_files(trio):
    config = trio()
    counts = preprocess(config)["dataset"]
    assert counts["train"] == {"clusters": 8, "records": 44, "residues": 44 * 40}
    assert read_clusters(config.out_dir) == EXPECTED
    assert list(read_clusters(config.out_dir)) == list(MEMBERS), "clusters are in the order of the train FASTA"
    assert records_of(config.out_dir / "train.arrow") == SEQUENCES
    assert sorted(path.name for path in config.out_dir.iterdir()) == [
        "cluster_members.npy",
        "cluster_offsets.npy",
        "cluster_representatives.npy",
        "leakage.json",
        "manifest.json",
        "train.arrow",
    ]


def test_rows_out_of_order_are_sorted(trio, tmp_path):
    expected = contents(preprocess_to(trio(), tmp_path / "straight"))
    shuffled = dict(sorted(MEMBERS.items(), key=lambda item: item[0][::-1], reverse=True))
    table = mapping({name: ids[::-1] for name, ids in shuffled.items()})
    found = contents(preprocess_to(trio(table=table), tmp_path / "shuffled"))
    expected.pop("manifest.json"), found.pop("manifest.json")
    assert found == expected


def preprocess_to(config: PreprocessConfig, out_dir: Path) -> Path:
    preprocess(PreprocessConfig(**vars(config) | {"out_dir": out_dir}))
    return out_dir


@pytest.mark.parametrize(
    "table",
    [
        TABLE.removeprefix("ur50_id\tur90_ids\n"),
        TABLE.replace("\n", "\r\n"),
        TABLE.replace(",", ", ").rstrip("\n"),
        TABLE.replace("\n", "\tanother column,with commas\tand more\n"),
        "\n" + mapping().replace("\n", "\n\n"),
        gzip.compress(TABLE.encode()),
        zstandard.compress(TABLE.encode()),
        TABLE.replace("UR90_000", "UR90_000,UR90_000,"),
    ],
    ids=["no header", "CRLF", "blanks", "columns", "blank lines", "gzip", "zstd", "a member twice"],
)
def test_variants_of_mapping_files(trio, table):
    config = trio(table=table)
    preprocess(config)
    assert read_clusters(config.out_dir) == EXPECTED


def test_mapping_lines_longer_than_a_block(tmp_path, monkeypatch):
    from esm2kit.preprocessing import cluster_tables as table_reader

    monkeypatch.setattr(table_reader, "_BLOCK_BYTES", 37)
    names = [f"m{number}" for number in range(500)]
    (tmp_path / "train.fasta").write_text(">c0\nM\n>c1\nMK\n")
    (tmp_path / "sampler.fasta").write_text(">c0\nM\n>c1\nMK\n" + "".join(f">{name}\nMKV\n" for name in names))
    (tmp_path / "mapping.tsv").write_text(f"h\th\nc0\t{','.join(names[:400])}\nc1\t{','.join(names[400:])}\n")
    config = PreprocessConfig(
        tmp_path / "train.fasta", tmp_path / "out", tmp_path / "sampler.fasta", tmp_path / "mapping.tsv",
        leakage_identity=0,
    )  # fmt: skip
    preprocess(config)
    assert read_clusters(config.out_dir) == {"c0": set(names[:400]), "c1": set(names[400:])}


def test_complete_clusters_are_held_out_with_their_representatives_only(trio, tmp_path):
    config = trio(val_size=2, test_size=0.25, seed=3)
    counts = preprocess(config)["dataset"]
    train = read_clusters(config.out_dir)
    valid, test = (records_of(config.out_dir / f"{split}.arrow") for split in ("valid", "test"))
    assert (len(train), len(valid), len(test)) == (4, 2, 2)
    assert {**train, **dict.fromkeys(valid), **dict.fromkeys(test)}.keys() == MEMBERS.keys()
    assert train == {name: EXPECTED[name] for name in train}
    stored = records_of(config.out_dir / "train.arrow")
    assert stored.keys() == {*train, *(name for ids in train.values() for name in ids)}
    assert all(stored[name] == SEQUENCES[name] for name in stored)
    assert counts["valid"] == {"clusters": 2, "records": 2, "residues": 80}

    again = read_clusters(preprocess_to(config, tmp_path / "again"))
    assert again == train
    others = [read_clusters(preprocess_to(trio(val_size=4, seed=seed), tmp_path / f"s{seed}")) for seed in range(4)]
    assert len({frozenset(other) for other in others}) > 1, "the seed selects the clusters"


def test_held_out_sets_from_fasta(trio, tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "b.fasta").write_text(">v2\nMKVV\n>v1\nMKV\n")
    (tmp_path / "held" / "a.fa.gz").write_bytes(gzip.compress(b">v1\nmkv*\n"))
    (tmp_path / "test.fasta").write_text(f">t1\n{SEQUENCES['UR90_000']}\n>UR50_3\nMKV\n>t2\nMKV\n")
    config = trio(valid_fasta=tmp_path / "held", test_fasta=[tmp_path / "test.fasta"])
    counts = preprocess(config)["dataset"]
    assert list(records_of(config.out_dir / "valid.arrow").items()) == [("v1", "MKV"), ("v2", "MKVV")]
    assert counts["left_out"]["repeated_valid_records"] == 1
    assert counts["train"]["records"] == 44
    report = json.loads((config.out_dir / "leakage.json").read_text())
    found = {(pair["first"], pair["second"]): pair for pair in report["pairs"]}
    assert found["train", "valid"]["equal_sequences"] == found["train", "valid"]["shared_ids"] == 0
    assert found["train", "test"]["equal_sequences_examples"] == ["t1"]
    assert found["train", "test"]["shared_ids_examples"] == ["UR50_3"]
    assert found["valid", "test"]["equal_sequences"] == 2
    assert report["identity"] == {"checked": False, "reason": "turned off by leakage_identity 0"}


def test_a_fasta_without_clusters(tmp_path):
    names = ALL_MEMBERS
    config = one_fasta(tmp_path, fasta(names) + fasta(names[:3]))
    counts = preprocess(config)["dataset"]
    assert read_clusters(config.out_dir) == {name: {name} for name in names}
    assert counts["train"]["records"] == 36
    assert counts["left_out"]["repeated_records"] == 3
    assert not (config.out_dir / "valid.arrow").exists(), "the train file must not be used for validation"


@pytest.mark.parametrize("packed", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"])
def test_one_level_of_mmseqs_clusters(tmp_path, packed):
    (tmp_path / "clusters.tsv").write_bytes(
        packed("".join(f"{ids[0]}\t{name}\n" for ids in MEMBERS.values() for name in ids).encode())
    )
    config = one_fasta(tmp_path, fasta([*ALL_MEMBERS, "UR50_0"]), cluster_tsv=tmp_path / "clusters.tsv", val_size=1)
    counts = preprocess(config)["dataset"]
    expected = {ids[0]: set(ids) for ids in MEMBERS.values()}
    train = read_clusters(config.out_dir)
    assert len(train) == 7
    assert train == {name: expected[name] for name in train}
    assert counts["left_out"]["unclustered_records"] == 1
    assert len(records_of(config.out_dir / "valid.arrow")) == 1


@pytest.mark.parametrize("content", ["", "\n", " \n\n"])
def test_a_cluster_tsv_without_text_is_refused(content, tmp_path):
    (tmp_path / "clusters.tsv").write_text(content)
    config = one_fasta(tmp_path, fasta(list(SEQUENCES)[:3]), cluster_tsv=[tmp_path / "clusters.tsv"])
    with refused("clusters.empty", path=tmp_path / "clusters.tsv"):
        preprocess(config)


def test_two_levels_sample_the_finer_representatives(tmp_path):
    (tmp_path / "fine.tsv").write_text("a\ta\na\tb\nc\tc\nd\td\nd\te\n")
    (tmp_path / "coarse.tsv").write_text("c\ta\nc\tc\nd\td\n")
    text = "".join(f">{name}\n{protein(name)}\n" for name in "abcde")
    config = one_fasta(tmp_path, text, cluster_tsv=[tmp_path / "fine.tsv", tmp_path / "coarse.tsv"])
    preprocess(config)
    assert read_clusters(config.out_dir) == {"c": {"a", "c"}, "d": {"d"}}
    config = one_fasta(
        tmp_path, text, cluster_tsv=[tmp_path / "coarse.tsv", tmp_path / "fine.tsv"], out_dir=tmp_path / "swapped"
    )
    with pytest.raises(InputError, match=r"fine\.tsv: line 1: member 'a' is not the representative of a cluster"):
        preprocess(config)


@pytest.mark.skipif(not shutil.which("mmseqs"), reason="MMseqs2 is not installed")
def test_clusters_and_identity_from_mmseqs(tmp_path):
    families = {number: protein(f"family {number}", 120) for number in range(6)}
    names = {f"sp|P{number}{member}|X_{member} text": number for number in families for member in range(3)}
    text = "".join(f">{name}\n{families[number][member:]}\n" for member, (name, number) in enumerate(names.items()))
    config = one_fasta(tmp_path, text)
    command = (
        f"mmseqs easy-linclust {config.train_fasta} {tmp_path}/mm {tmp_path}/tmp --min-seq-id 0.5 --threads 1 -v 1"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    settings = {"cluster_tsv": tmp_path / "mm_cluster.tsv", "leakage_identity": 0.5}
    settings["valid_fasta"] = tmp_path / "close.fasta"
    changed = "".join("A" if index % 4 == 0 else letter for index, letter in enumerate(families[0]))
    settings["valid_fasta"].write_text(f">close\n{changed}\n>far\n{protein('far', 120)}\n")
    config = one_fasta(tmp_path, text, **settings)
    preprocess(config)
    members = list(read_clusters(config.out_dir).values())
    assert [len(ids) for ids in members] == [3] * 6, "MMseqs2 shortens UniProt ids to accessions"
    found = json.loads((config.out_dir / "leakage.json").read_text())["identity"]
    assert found["splits"] == {"valid": {"records": 2, "close_to_train": 1}}


def test_a_missing_mmseqs_is_reported(trio, monkeypatch, caplog):
    monkeypatch.setattr(leakage.shutil, "which", lambda _: None)
    config = trio(val_size=1, leakage_identity=0.5)
    preprocess(config)
    found = json.loads((config.out_dir / "leakage.json").read_text())["identity"]
    assert not found["checked"]
    assert "MMseqs2 is not installed" in found["reason"]
    assert "MMseqs2 is not installed" in caplog.text


@pytest.mark.skipif(not shutil.which("mmseqs"), reason="MMseqs2 is not installed")
def test_a_failed_mmseqs_is_reported(trio):
    config = trio(val_size=1, leakage_identity=0.5, memory_limit_gb=0.5)
    preprocess(config)
    found = json.loads((config.out_dir / "leakage.json").read_text())["identity"]
    assert not found["checked"]
    assert "a higher memory_limit_gb may help" in found["reason"]


def test_a_second_call_finds_the_finished_dataset(trio, caplog):
    caplog.set_level("INFO")
    config = trio()
    first = preprocess(config)
    stamps = {path: path.stat().st_mtime_ns for path in config.out_dir.iterdir()}
    assert preprocess(config) == first
    assert "already exists" in caplog.text
    (config.out_dir / "preprocess.unfinished").mkdir()  # as left by a call that was killed at its last step
    assert preprocess(config) == first
    assert not (config.out_dir / "preprocess.unfinished").exists()
    os.utime(config.mapping)  # a new modification time alone does not count as a change
    assert preprocess(config) == first
    assert {path: path.stat().st_mtime_ns for path in config.out_dir.iterdir()} == stamps


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"val_size": 1}, "val_size was 0 and is now 1"),
        ({"sampler": SAMPLER + ">more\nMKV\n"}, "sampler_fasta .* has changed"),
        ({"sampler": SAMPLER.replace("what it is", "what it IS")}, "sampler_fasta .* has changed"),
    ],
)
def test_a_dataset_from_other_settings_is_not_changed(trio, change, found):
    config = trio()
    preprocess(config)
    before = contents(config.out_dir)
    changed = trio(**change)
    with refused("output.another-run"):
        preprocess(changed)
    assert contents(config.out_dir) == before
    preprocess(PreprocessConfig(**vars(changed) | {"overwrite": True}))
    assert contents(config.out_dir) != before


def test_a_folder_with_other_files_is_not_changed(trio):
    config = trio()
    config.out_dir.mkdir()
    (config.out_dir / "manifest.json").write_text('{"stage": "embed"}')
    with refused("output.other-files"):
        preprocess(config)
    (config.out_dir / "manifest.json").unlink()
    (config.out_dir / "train.arrow").write_text("other content")
    with refused("output.other-files", name="train.arrow"):
        preprocess(config)
    assert (config.out_dir / "train.arrow").read_text() == "other content"


def test_only_one_process_writes_to_a_folder(trio):
    config = trio()
    config.out_dir.mkdir()
    with FileLock(config.out_dir / ".lock"), refused("file.locked"):
        preprocess(config)
    preprocess(config)


def test_a_file_system_without_locks_is_supported(trio, monkeypatch, caplog):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", unsupported)
    config = trio()
    assert preprocess(config)["dataset"]["train"]["clusters"] == 8
    assert f"{config.out_dir}: the file system has no locks ([Errno {errno.ENOLCK}] No locks available)" in caplog.text


def replaced(old: str, new: str, text: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


FAULTS = {
    "empty": ({"train": ""}, r"train\.fasta: no records"),
    "two sequences": (
        {"sampler": SAMPLER + ">UR90_000\nMKV\n"},
        r"sampler\.fasta: record 45: id 'UR90_000' has another",
    ),
    "two files": (
        {"train": replaced(SEQUENCES["UR50_2"], "MKV", fasta(list(MEMBERS)))},
        r"sampler\.fasta: record 39: id 'UR50_2' has another sequence than in .*train\.fasta: record 3",
    ),
    "absent member": (
        {"table": replaced("UR90_000", "UR90_xx", TABLE)},
        r"line 2: member 'UR90_xx' is not in .*samp",
    ),
    "absent cluster": ({"table": TABLE + "UR50_x\tUR90_000\n"}, r"line 10: cluster 'UR50_x' is not in .*train"),
    "no line": ({"table": mapping(dict(list(MEMBERS.items())[:-1]))}, r"train\.fasta: record 8: 'UR50_7' has no line"),
    "no representative": ({"sampler": fasta(ALL_MEMBERS)}, r"'UR50_0' is not in .*sampler_fasta sampler train"),
    "no members": (
        {"table": replaced("UR50_0\tUR90_000", "UR50_0\t", TABLE)},
        r"line 2: cluster 'UR50_0' has no mem",
    ),
    "no tab": ({"table": replaced("UR50_0\tUR90_000", "UR50_0", TABLE)}, r"line 2: cluster 'UR50_0' has no members"),
    "only commas": ({"table": replaced("\tUR90_000", "\t, ,", TABLE)}, r"line 2: cluster 'UR50_0' has no members"),
    "no cluster": ({"table": replaced("UR50_0\t", "\t", TABLE)}, r"mapping\.tsv: line 2 has no cluster id"),
    "empty table": ({"table": ""}, r"mapping\.tsv: the file has no lines with text"),
    "table of bytes": ({"table": b"a\tb\nUR50_0\t\xff\n"}, r"mapping\.tsv: line 2: byte 0xff is not text"),
    "table with NUL": ({"table": TABLE + "\0\t\0\n"}, r"mapping\.tsv: line 10: byte 0x00 is not text"),
    "twice": ({"table": TABLE + "UR50_0\tUR90_000\n"}, r"line 10: cluster 'UR50_0' is also on line 2"),
    "two clusters": (
        {"table": replaced("UR50_0\tUR90_000", "UR50_0\tUR90_000,UR90_071", TABLE)},
        r"mapping\.tsv: 'UR90_071' is a member of two clusters, 'UR50_0' and 'UR50_1'",
    ),
    "too long": ({"sampler": f">big\n{'A' * 100_001}\n" + SAMPLER}, r"record big \(1\): has 100,001 residues"),
    "not text": (
        {"sampler": SAMPLER.encode() + b">x\nMK\xff\n"},
        r"record x \(45\): byte 0xff at residue 3 is not text",
    ),
    "cut gzip": ({"sampler": gzip.compress(SAMPLER.encode())[:-30]}, r"sampler\.fasta: incomplete gzip data"),
    "cut zstd": ({"sampler": zstandard.compress(SAMPLER.encode())[:-30]}, r"incomplete Zstandard data"),
    "cut table": ({"table": gzip.compress(TABLE.encode())[:-20]}, r"mapping\.tsv: incomplete gzip data"),
    "val_size": ({"val_size": 8}, r"val_size 8 and test_size 0 hold out 8 of 8 clusters, so none is left"),
    "both sizes": ({"val_size": 0.5, "test_size": 4}, r"hold out 8 of 8 clusters"),
    "no share": ({"val_size": 0.01}, r"val_size 0\.01 of 8 clusters is less than one"),
    "val_size -1": ({"val_size": -1}, "val_size must be a number of clusters .* found -1"),
    "val_size 1.0": ({"val_size": 1.0}, "val_size must be a number of clusters .* found 1.0"),
    "no memory": ({"memory_limit_gb": 0.1}, "memory_limit_gb must be at least 0.5, found 0.1"),
    "no threads": ({"threads": -2}, "threads must be at least 1, found -2"),
    "identity": ({"leakage_identity": 50.0}, "leakage_identity must be at least 0 and at most 1, found 50.0"),
    "both tables": ({"cluster_tsv": Path("x.tsv")}, "mapping and cluster_tsv"),
    "sampler_fasta only": ({"mapping": None}, "mapping and sampler_fasta require each other"),
    "size and file": ({"val_size": 1, "valid_fasta": Path("x.fasta")}, "val_size and valid_fasta both"),
    "absent file": ({"valid_fasta": Path("x.fasta")}, "x.fasta"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_raises_a_one_line_error_and_leaves_no_files(trio, fault):
    changes, found = FAULTS[fault]
    texts = {name: changes[name] for name in ("train", "sampler", "table") if name in changes}
    config = trio(**texts)
    config = PreprocessConfig(**vars(config) | {name: changes[name] for name in changes.keys() - texts.keys()})
    with pytest.raises(InputError, match=found) as error:
        preprocess(config)
    assert "\n" not in str(error.value)
    assert not config.out_dir.exists()


def test_a_missing_id_of_a_cluster_tsv(tmp_path):
    for number, (table, found) in enumerate(
        (
            ("a\ta\na\tx\n", "line 2: member 'x' is not in"),
            ("x\ta\n", "line 1: 'x' is not in"),
            ("a\ta\na\n", "line 2: cl"),
        )
    ):
        (tmp_path / "clusters.tsv").write_text(table)
        config = one_fasta(tmp_path, ">a\nMKV\n", cluster_tsv=tmp_path / "clusters.tsv", out_dir=tmp_path / str(number))
        with pytest.raises(InputError, match=found):
            preprocess(config)


RUN = """
import resource, signal, sys
from esm2kit.core.errors import InputError
from esm2kit.preprocessing.preprocess import PreprocessConfig, preprocess
limit = int(sys.argv[2])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
folder = sys.argv[1]
try:
    preprocess(PreprocessConfig(f"{folder}/train.fasta", f"{folder}/out", f"{folder}/sampler.fasta",
                                f"{folder}/mapping.tsv", val_size=0.1, threads=1, leakage_identity=0))
except InputError as error:
    sys.exit(str(error))
"""


def run(folder: Path, file_limit: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(folder), str(file_limit)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.fixture
def larger_trio(trio, tmp_path) -> Path:
    """Enough records for two batches, so that each step is long enough to be killed."""
    names = [f"UR90_{number}" for number in range(ROWS_PER_BATCH + 1000)]
    members = {f"UR50_{number}": names[number::2000] for number in range(2000)}
    sequences = {name: protein(name, 60) for name in names}
    sequences |= {cluster: sequences[ids[0]] for cluster, ids in members.items()}
    trio(fasta(list(members), sequences), fasta([*names, *members], sequences), mapping(members))
    return tmp_path


def test_a_rerun_after_kills_writes_the_same_bytes(larger_trio):
    out_dir = larger_trio / "out"
    started = time.monotonic()
    assert run(larger_trio).wait() == 0
    seconds, expected = time.monotonic() - started, contents(out_dir)
    killed = 0
    for kill in range(3):
        shutil.rmtree(out_dir)
        for _ in range(2):  # the rerun may be killed as well
            process = run(larger_trio)
            time.sleep(seconds * (0.3 + 0.7 * RANDOM.random()))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                killed += 1
            process.wait()
        assert run(larger_trio).wait() == 0
        assert contents(out_dir) == expected, f"after kill {kill}"
    assert killed, "at least one of six kills must come before the end"


@pytest.mark.parametrize("file_limit", [20_000, 400_000, 1_200_000])
def test_a_file_size_limit_is_reported_as_a_full_disk(larger_trio, file_limit):
    process = run(larger_trio, file_limit)
    _, message = process.communicate()
    assert process.returncode == 1
    assert "the disk is full" in message
    assert message.count("\n") == 1
    assert not (larger_trio / "out").exists()


def test_a_full_disk(trio, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root; test_a_file_size_limit_is_reported_as_a_full_disk replaces it")
    try:
        sequences = {name: protein(name, 60) for name in (f"r{number}" for number in range(20_000))}
        config = one_fasta(tmp_path, fasta(list(sequences), sequences), out_dir=disk / "out")
        with refused("disk.full"):
            preprocess(config)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_too_little_memory_for_the_join_raises_an_error(trio, monkeypatch):
    import duckdb

    from esm2kit.preprocessing import preprocess as stage

    def out_of_memory(*_):
        raise duckdb.OutOfMemoryException("could not allocate")

    config = trio(memory_limit_gb=0.5)
    monkeypatch.setattr(stage, "join_mapping", out_of_memory)
    with refused("preprocess.memory", found=0.5):
        preprocess(config)
    assert not config.out_dir.exists()


def test_progress_lines_report_records_rate_and_time_left(caplog, trio, monkeypatch):
    from esm2kit.core import progress

    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress, "SHARE_BETWEEN_LINES", 0.0)
    preprocess(trio())
    line = [message for message in caplog.messages if message.startswith("sampler_fasta: ")][-1]
    assert "44 records" in line
    assert "MB/s" in line
    assert " left" in line


@pytest.mark.shared
def test_the_real_dataset(shared_data, tmp_path):
    folder = shared_data / "uniprot_mini"
    config = PreprocessConfig(
        folder / "uniref50_train_filt.fasta", tmp_path / "out", folder / "ur90_ur50_sampler.fasta",
        folder / "mapping.tsv", valid_fasta=folder / "uniref50_valid.fasta", leakage_identity=0,
    )  # fmt: skip
    counts = preprocess(config)["dataset"]
    assert counts["train"]["clusters"] == 6_626
    assert counts["train"]["records"] == 19_504
    assert counts["valid"]["records"] == 350
    assert records_of(tmp_path / "out" / "train.arrow") == {
        record.id: record.sequence for record in read_fasta(config.sampler_fasta)
    }
    rows = dict(line.split("\t") for line in config.mapping.read_text().splitlines()[1:])
    index, train = ClusterIndex.open(tmp_path / "out"), store.SequenceStore.open(tmp_path / "out" / "train.arrow")
    num_residues = train.num_residues
    names = list(rows)
    for epoch in range(3):
        for cluster in range(index.num_clusters):
            sample = draw_sample(0, epoch, cluster, index, num_residues)
            assert train.id(sample.row) in rows[names[cluster]].split(",")
            assert 0 <= sample.start < sample.stop <= num_residues[sample.row]
    assert [train.id(int(row)) for row in index.representative_rows] == names
    assert np.array_equal(index.num_members(), [row.count(",") + 1 for row in rows.values()])
    # 10,000 epochs of one cluster of each size up to twelve: all counts are within their binomial interval
    sizes, first = np.unique(index.num_members(), return_index=True)
    for size, cluster in zip(sizes[:12], first[:12], strict=True):
        members = index.members(cluster)
        sampled = [draw_sample(1, epoch, int(cluster), index, num_residues).row for epoch in range(10_000)]
        counts = np.bincount(np.searchsorted(members, sampled), minlength=size)
        low, high = stats.binom.interval(1 - 1e-5, 10_000, 1 / size)
        assert low <= counts.min() <= counts.max() <= high
