"""Fine-tuning and prediction of values of any size and offset."""

import csv
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.errors import refused
from support.finetune_fixtures import write_tiny_model

from esm2kit.finetuning.config import FinetuneConfig, PredictConfig
from esm2kit.finetuning.finetune import finetune
from esm2kit.finetuning.predict import predict

SCALES = {"plain": (1.0, 0.0), "molar": (1e-9, 0.0), "large": (1e9, 0.0), "offset": (1.0, 1e8), "huge": (1e298, 0.0)}
SHORT = {
    "mode": "frozen", "seeds": [0], "epochs": 4, "resamples": 100, "benchmark": False, "accelerator": "cpu",
    "download": False,
}  # fmt: skip


def write_values(folder: Path, scale: float, shift: float) -> Path:
    """Write proteins whose value is about their number of leucines."""
    generator = np.random.default_rng(0)
    lines = ["sequence,target,set,validation"]
    for place in range(90):
        letters = generator.choice(list("ACDEFGHIKNPQRSTVWY"), 24)
        letters[: place % 13] = "L"
        value = float(round(place % 13 + 0.2 * generator.normal(), 2) * scale + shift)
        lines.append(f"{''.join(letters)},{value!r},{'test' if place % 3 == 0 else 'train'},{place % 6 == 1}")
    (folder / "values").mkdir(parents=True)
    (folder / "values" / "random.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = {}
    for name, (scale, shift) in SCALES.items():
        folder = tmp_path_factory.mktemp(name)
        model = write_tiny_model(folder / "tiny.safetensors")
        data = write_values(folder / "data", scale, shift)
        found[name] = (
            folder,
            finetune(FinetuneConfig(task="values", data_dir=data, model=str(model), out_dir=folder / "out", **SHORT)),
        )
    return found


@pytest.mark.parametrize("name", [name for name in SCALES if name != "plain"])
def test_fine_tuned_scores_do_not_depend_on_the_unit_and_the_offset(runs, name):
    """Within 1e-4: the standardised targets differ in the last bits of float32."""
    plain, found = runs["plain"][1], runs[name][1]
    assert found["runs"][0]["val_loss"] == pytest.approx(plain["runs"][0]["val_loss"], rel=1e-4)
    for metric, expected in plain["test"].items():
        unit = SCALES[name][0] if metric == "rmse" else 1.0
        for end in ("value", "low", "high"):
            assert found["test"][metric][end] / unit == pytest.approx(expected[end], rel=1e-4, abs=1e-4), metric


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("suffix", [".tsv", ".h5"])
def test_predictions_keep_the_digits_of_their_spread(runs, name, suffix, tmp_path):
    """An offset of 1e8 left 1e+08 of every prediction in the table, and float32 overflowed at 1e298."""
    scale, shift = SCALES[name]
    read = {}
    for task in ("plain", name):
        _, result = runs[task]
        fasta = tmp_path / "in.fasta"
        fasta.write_text(">a\nLLLLLLACDEFGHIK\n>b\nACDEFGHIKNPQRST\n")
        out = tmp_path / f"{task}{suffix}"
        predict(PredictConfig(model=Path(result["runs"][0]["model"]), fasta=fasta, out=out, device="cpu"))
        if suffix == ".tsv":
            with open(out, encoding="utf-8", newline="") as file:
                read[task] = np.array([float(line["prediction"]) for line in csv.DictReader(file, delimiter="\t")])
        else:
            with h5py.File(out) as file:
                read[task] = np.array([file["0"][0], file["1"][0]])
    np.testing.assert_allclose((read[name] - shift) / scale, read["plain"], rtol=1e-4, atol=1e-5)
    assert read["plain"][0] != read["plain"][1]


@pytest.mark.parametrize(("name", "refuses"), [("molar", False), ("offset", True), ("huge", True)])
def test_an_export_to_float32_that_loses_the_values_is_refused_before_training(runs, name, refuses, tmp_path):
    folder, _ = runs[name]
    config = FinetuneConfig(
        task="values", data_dir=folder / "data", model=str(folder / "tiny.safetensors"), out_dir=tmp_path / "out",
        head="hf", export_hf=True, **SHORT | {"epochs": 1},
    )  # fmt: skip
    if refuses:
        with refused("task.float32"):
            finetune(config)
        assert not list((tmp_path / "out").rglob("*.safetensors"))
    else:
        assert finetune(config)["finished"]


def test_training_on_raw_values_that_float32_cannot_hold_is_refused(runs, tmp_path):
    folder, _ = runs["offset"]
    with refused("task.float32"):
        finetune(
            FinetuneConfig(
                task="values", data_dir=folder / "data", model=str(folder / "tiny.safetensors"),
                out_dir=tmp_path / "out", scale_targets=False, **SHORT,
            )
        )  # fmt: skip
