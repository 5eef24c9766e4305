"""Files of other projects go through benchmark and finetune as they are, and the report has their hashes and sets."""

import hashlib
import json

import numpy as np
import pytest
from support.finetune_fixtures import write_tiny_model

from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.compare import compare
from esm2kit.benchmarking.config import BenchmarkConfig, CompareConfig
from esm2kit.cli.main import main

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
SETS = ["train"] * 24 + ["valid"] * 6 + ["test"] * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors"))


@pytest.fixture
def proteins():
    generator = np.random.default_rng(5)
    return ["".join(generator.choice(list(LETTERS), 30)) for _ in SETS]


def write_tdc(folder, proteins):
    folder.mkdir(parents=True)
    for name in dict.fromkeys(SETS):
        lines = [
            f"a{place},{sequence},{sequence.count('L') / 3}\n"
            for place, (sequence, chosen) in enumerate(zip(proteins, SETS, strict=True))
            if chosen == name
        ]
        (folder / f"{name}.csv").write_text("".join(["Antibody_ID,Antibody,Y\n", *lines]))
    return folder


def test_a_folder_with_a_file_per_set_is_benchmarked(model, proteins, tmp_path):
    folder = write_tdc(tmp_path / "sabdab", proteins)
    report = benchmark(
        BenchmarkConfig(task=str(folder), model=model, out_dir=tmp_path / "out", seeds=[0], resamples=100,
                        untrained=False, baselines=["mean"])
    )  # fmt: skip
    assert report.task.sizes == {"train": 24, "validation": 6, "test": 6}
    hashes = {entry["sha256"] for entry in report.provenance["inputs"].values()}
    assert {hashlib.sha256((folder / f"{name}.csv").read_bytes()).hexdigest() for name in dict.fromkeys(SETS)} <= hashes
    assert "sabdab: read as a TDC table: sequences from Antibody, targets from Y" in report.notes
    stored = np.load(tmp_path / "out" / "predictions.npz")
    expected = sorted(proteins[place].count("L") / 3 for place, name in enumerate(SETS) if name == "test")
    assert sorted(stored["truth"].tolist()) == expected


def test_a_test_set_of_several_is_finetuned(model, proteins, tmp_path, capsys):
    names = [
        {"valid": "val", "test": ("casp12", "casp13")[place % 2]}.get(name, name) for place, name in enumerate(SETS)
    ]
    path = tmp_path / "structure.fasta"
    lines = (f">p{place} SET={name} TARGET={sequence.count('L') / 3}\n{sequence}\n"
             for place, (name, sequence) in enumerate(zip(names, proteins, strict=True)))  # fmt: skip
    path.write_text("".join(lines))
    argv = ["finetune", str(path), "--split", "casp13", "--model", model, "--max_steps", "2", "--benchmark", "false"]
    assert main([*argv, "--out_dir", str(tmp_path / "tuned")]) == 0
    assert json.loads(capsys.readouterr().out)["finished"]
    stored = np.load(tmp_path / "tuned" / "predictions.npz")
    expected = [sequence.count("L") / 3 for sequence, name in zip(proteins, names, strict=True) if name == "casp13"]
    assert sorted(stored["truth"].tolist()) == pytest.approx(sorted(expected))


def test_folds_of_different_columns_are_different_splits(model, proteins, tmp_path):
    """ProteinGym's random and contiguous folds are tests of different difficulty."""
    rows = [f"A{place + 1}C,{sequence},{sequence.count('L') / 3},{place % 4},{place // 9}"
            for place, sequence in enumerate(proteins)]  # fmt: skip
    path = tmp_path / "ASSAY.csv"
    path.write_text("\n".join(["mutant,mutated_sequence,DMS_score,fold_random_4,fold_contiguous_4", *rows]) + "\n")
    reports = [
        benchmark(
            BenchmarkConfig(task=str(path), model=model, out_dir=tmp_path / column, folds=column, seeds=[0],
                            resamples=100, untrained=False, baselines=[])
        )
        for column in ("fold_random_4", "fold_contiguous_4")
    ]  # fmt: skip
    assert [report.task.split for report in reports] == ["fold_random_4", "fold_contiguous_4"]
    assert [report.folds.method.partition(";")[0] for report in reports] == [
        "folds of column fold_random_4", "folds of column fold_contiguous_4",
    ]  # fmt: skip
    folders = [tmp_path / report.task.split for report in reports]
    found = compare(CompareConfig(folders, tmp_path / "compared"))
    assert found.pairs == []
    assert found.unpaired == ["no two reports are on the same task and split, so no scores were compared"]
    same = tmp_path / "same"
    benchmark(
        BenchmarkConfig(task=str(path), model=model, out_dir=same, folds="fold_random_4", seeds=[0], resamples=100,
                        untrained=False, baselines=["mean"])
    )  # fmt: skip
    assert len(compare(CompareConfig([folders[0], same], tmp_path / "again")).pairs) == 1
