"""Reports of earlier versions are read and compared with those of today.

`tests/data/reports` has what each version wrote for one task of values and one of classes: 32 train, 8 validation and
8 test proteins, whose label follows from the share of leucine, and a network of two layers with random weights.
version_1: esm2kit 0.1.0 (commit f933155), weights of seed 1. version_2: commit 8d2b5cb, weights of seed 0.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score
from support.errors import refused

from esm2kit.benchmarking.compare import check_report, compare
from esm2kit.benchmarking.config import CompareConfig
from esm2kit.benchmarking.report import READ_SCHEMAS, SCHEMA, Report
from esm2kit.core.checksums import write_sealed_json
from esm2kit.tasks.metrics import sample_counts

REPORTS = Path(__file__).parents[1] / "data" / "reports"
VERSIONS = {"version_1": "esm2kit.report/1", "version_2": "esm2kit.report/2"}


def write_today(folder: Path, kind: str, **changed) -> Path:
    """Write the report of version 2 as this version does, with its predictions and with further fields."""
    folder.mkdir(parents=True)
    report = Report.read(REPORTS / "version_2" / kind)
    (folder / "predictions.npz").write_bytes((REPORTS / "version_2" / kind / "predictions.npz").read_bytes())
    report.write(folder)
    path = folder / "report.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    write_sealed_json(path, content | changed)
    return path


def read_scores(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The test targets and the first row's predictions, read without esm2kit."""
    stored = np.load(folder / "predictions.npz")
    name = json.loads((folder / "report.json").read_text())["rows"][0]["name"]
    return stored["truth"], stored[f"predicted/{name}"][0]


@pytest.mark.parametrize("kind", ["value", "class"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_report_of_an_earlier_version_is_read_completely(version, kind):
    folder = REPORTS / version / kind
    stored = json.loads((folder / "report.json").read_text())
    report = check_report(folder / "report.json")
    assert report.schema == stored["schema"] == VERSIONS[version]
    truth, predicted = read_scores(folder)
    expected = spearmanr(truth, predicted).statistic if kind == "value" else accuracy_score(truth, predicted)
    assert report.headline(report.first).value == pytest.approx(expected, abs=1e-12)
    assert report.task.sizes == {"train": 32, "validation": 8, "test": 8}
    rows = {row["name"]: {name: entry["value"] for name, entry in row["metrics"].items()} for row in stored["rows"]}
    assert {row.name: {name: entry.value for name, entry in row.metrics.items()} for row in report.rows} == rows
    if version == "version_1":
        assert (report.verdict, report.warnings, report.first.probe_file) == ("", (), "")


@pytest.mark.parametrize("old", VERSIONS)
def test_an_earlier_report_and_one_of_today_are_compared_side_by_side(old, tmp_path):
    today = write_today(tmp_path / "today", "value")
    folder = REPORTS / old / "value"
    found = compare(CompareConfig([folder, today], tmp_path / "out"))
    truth, ours = read_scores(folder)
    _, theirs = read_scores(today.parent)
    (pair,) = found.pairs
    differences = []
    protein = np.load(folder / "predictions.npz")["protein"]
    for counts in sample_counts(len(truth), 100):  # the same proteins are drawn for both
        drawn = np.repeat(np.arange(len(truth)), counts[protein])
        differences.append(
            spearmanr(truth[drawn], ours[drawn]).statistic - spearmanr(truth[drawn], theirs[drawn]).statistic
        )
    difference = spearmanr(truth, ours).statistic - spearmanr(truth, theirs).statistic
    assert pair.comparison.difference == pytest.approx(difference, abs=1e-12)
    if old == "version_1":
        low, high = np.quantile(differences, [0.025, 0.975])
        assert (pair.comparison.low, pair.comparison.high) == pytest.approx((low, high), abs=1e-9)
        assert low < 0 < high
        assert pair.comparison.ours == "earlier, ridge"
    else:
        assert set(np.round(differences, 12)) == {0.0}
    page = found.html.read_text()
    for entry in found.reports:
        value = entry.report.headline(entry.report.first).value
        assert f"{value:.3f}" in page
        assert entry.name in page


def test_what_an_earlier_report_lacks_is_a_dash(tmp_path):
    today = write_today(tmp_path / "today", "class")
    content = json.loads(today.read_text())
    del content["sha256"]
    content["rows"][0]["metrics"]["further"] = {
        "value": 0.125, "low": 0.0625, "high": 0.25, "seeds": [0.125], "seed_spread": 0.0,
    }  # fmt: skip
    write_sealed_json(today, content)
    for order in ([REPORTS / "version_1" / "class", today], [today, REPORTS / "version_1" / "class"]):
        found = compare(CompareConfig(order, tmp_path / order[0].name))
        assert len(found.pairs) == 1
        rows = re.findall(r"<tr[^>]*>(.*?)</tr>", found.html.read_text(), re.S)
        cells = [[re.sub("<[^>]*>", " ", cell).split() for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S)]
                 for row in rows]  # fmt: skip
        place = next(number for number, cell in enumerate(cells[0]) if cell[:1] == ["further"])
        shown = {cell[0][0]: cell[place] for cell in cells[1:] if cell[0]}
        assert shown["tiny,"][0] == "0.125"
        assert shown["earlier,"] == ["–"]


@pytest.mark.parametrize("version", [4, 12])
def test_a_report_of_a_later_version_is_refused(version, tmp_path):
    later = write_today(tmp_path / "later", "value", schema=f"esm2kit.report/{version}", unknown=[1])
    with refused("report.newer", found=f"esm2kit.report/{version}", expected=SCHEMA):
        Report.read(later)
    with refused("report.newer"):
        compare(CompareConfig([later, REPORTS / "version_1" / "value"], tmp_path / "out"))


@pytest.mark.parametrize(
    "schema", ["esm2kit.report/0", "esm2kit.report/", "esm2kit.report/x", "esm2kit.comparison/9", 4]
)
def test_another_schema_is_not_called_a_later_version(schema, tmp_path):
    other = write_today(tmp_path / "other", "value", schema=schema)
    with refused("report.schema", found=schema):
        Report.read(other)


def test_a_report_of_today_has_a_digest_whatever_version_it_was_read_from(tmp_path):
    report = Report.read(REPORTS / "version_1" / "value").write(tmp_path)
    stored = json.loads(report.json.read_text())
    assert stored["schema"] == SCHEMA == READ_SCHEMAS[-1]
    assert len(stored["sha256"]) == 64
    report.json.write_text(report.json.read_text().replace("0.958", "0.959", 1))
    with refused("file.damaged"):
        Report.read(report.json)
