"""`benchmarks/gpu.py` on the CPU with small shapes: all sections run, and its report replaces the page's figures."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "measured.md"
SMALL = ["--device", "cpu", "--shapes", "8M=1x32x4", "650M=2x32x4", "3B=2x48x4", "--compile_backend", "eager"]
SMALL += ["--rounds", "1", "--residues", "400", "--program_proteins", "12", "--train_tokens", "150"]
SMALL += ["--pretrain_steps", "4", "--pretrain_sequences", "8"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    module = sys.modules["gpu_benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("gpu") / "proteins.fasta"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(40):
            residues = generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), generator.integers(20, 50))
            file.write(f">p{number}\n{''.join(residues)}\n")
    return path


def test_every_section_runs_and_the_page_is_updated(script: ModuleType, fasta: Path, tmp_path: Path) -> None:
    page, out = tmp_path / "measured.md", tmp_path / "gpu.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    files = ["--fasta", str(fasta), "--out", str(out), "--update_docs", str(page), "--minutes", "60"]
    assert script.main([*files, *SMALL]) == 0
    report = out.read_text(encoding="utf-8")
    assert "failed" not in report.lower()
    table = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
    rows = {(cells[0], cells[1], cells[2]): cells for cells in table if len(cells) > 3}
    measured = {key: float(re.match(r"\*\*([\d.,e+-]+)\*\* ", cells[3])[1].replace(",", "")) for key, cells in
                rows.items() if cells[3].startswith("**")}  # fmt: skip
    assert {section for section, *_ in measured} == set(script.SECTIONS)
    expected = [("train", size, f"esm2kit, {precision}{compiled}") for size in ("8M", "650M", "3B")
                for precision in ("bf16-mixed", "bf16-true") for compiled in ("", ", compiled")]  # fmt: skip
    for size in ("8M", "650M"):
        expected += [("embed", size, name) for name in ("esm2kit", "transformers", "fair-esm")]
        expected += [("train", size, name) for name in ("transformers", "fair-esm")]
        expected += [("program", size, name) for name in ("esm2kit", "transformers", "esm2kit, with loading")]
    assert all(measured[key] > 0 for key in expected)
    # the contestants computed the same: the remark has the largest difference
    for size in ("8M", "650M"):
        for name in ("transformers", "fair-esm"):
            assert float(re.search(r"by (\S+) at most", " ".join(rows["embed", size, name]))[1]) < 1e-4
    assert measured["parity", "8M", "float32, difference from float64 on the CPU"] < 1e-5
    assert "not measured: it needs a CUDA GPU" in rows["embed", "8M", "Transformer Engine"][-1]
    for goal in script.GOALS:
        line = next(cells for cells in table if cells[0] == goal.name)
        assert re.match(r"missed: \d+% of the goal|reached", line[3]), line
    assert "Kernels with the most time in an update of 650M" in report
    assert report.count("`aten::") >= 10
    # only what is between the markers was replaced
    before, after = (text.split(script.BEGIN) for text in (PAGE.read_text("utf-8"), page.read_text("utf-8")))
    assert before[0] == after[0]
    assert before[1].split(script.END)[1] == after[1].split(script.END)[1]
    assert after[1].split(script.END)[0].strip() == report.strip()
    assert "H100" in before[1].split(script.END)[0]


def test_a_section_that_raises_is_reported(
    script: ModuleType, fasta: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def fail(lab: object) -> None:
        raise ValueError("no such kernel")

    def wait(lab: object) -> None:
        while True:
            pass

    monkeypatch.setitem(script.SECTIONS, "write", (fail, 25))
    monkeypatch.setitem(script.SECTIONS, "memory", (wait, 1))
    page = tmp_path / "page.md"
    page.write_text(f"a\n{script.BEGIN}\nold\n{script.END}\nb\n", encoding="utf-8")
    arguments = ["--fasta", str(fasta), "--update_docs", str(page), "--sections", "write", "memory", "parity", *SMALL]
    assert script.main(arguments) == 1
    report = capsys.readouterr().out
    assert "| write |  | the section |  |  |  |  |  | failed: ValueError: no such kernel |" in report
    assert "- write the section: ValueError: no such kernel" in report
    # a section that takes too long is not a failure, and the next one runs
    assert re.search(r"\| memory \|.* not measured: its \d+ s were used up", report)
    assert re.search(r"\| parity \| 8M \| float32, difference from float64 on the CPU \| \*\*[\d.e-]+\*\*", report)
    assert "Not run: embed, program, train, pretrain, checkpoints." in report
    assert "| train 3B | 28,000 tokens/s |  | not measured (the section did not measure it) |" in report
    assert page.read_text(encoding="utf-8").split("\n")[2] == "old"  # not replaced by a report of failures


def test_contestants_that_cannot_run_are_left_out(script: ModuleType, fasta: Path, tmp_path: Path) -> None:
    def raises(error: BaseException) -> object:
        def build() -> None:
            raise error

        return build

    def build_slow(seconds: float = 1.0) -> object:
        return lambda: script.time.sleep(seconds)

    lab = script.Lab(script.parse_options(["--fasta", str(fasta), *SMALL, "--rounds", "3"]), [], tmp_path, {})
    lab.end = script.time.monotonic() + 1.8
    contestants = {
        "fast": lambda: lambda: None,
        "large": raises(script.torch.OutOfMemoryError("CUDA out of memory")),
        "wrong": raises(TypeError("no attribute x")),
        "slow": build_slow,
    }
    lab.measure("embed", "8M", contestants, 10.0, "residues/s")
    found = {row.name: row for row in lab.rows}
    assert len(found["fast"].values) == 3
    assert found["large"].remark == "not measured: out of memory"
    assert found["wrong"].remark == "failed: TypeError: no attribute x"
    assert lab.failures == ["embed 8M wrong: TypeError: no attribute x"]
    assert found["slow"].remark == "not measured: a run of 1.0 s would exceed the time of the section"

    lab.rows.clear()
    lab.end = script.time.monotonic() + 1
    lab.measure("embed", "8M", {"endless": lambda: build_slow(60), "late": build_slow}, 10.0, "residues/s")
    assert lab.rows[0].remark == "not measured: its warm-up took more than 70% of the time left"
    assert lab.rows[1].remark.startswith("not measured: ")

    lab.rows.clear()
    lab.end = script.time.monotonic() + 3.5
    lab.measure("embed", "8M", {"fast": contestants["fast"], "slow": build_slow}, 10.0, "residues/s")
    fast, slow = lab.rows
    assert len(slow.values) < 3  # as many rounds as fit, and a rate that is that of one run
    assert slow.median == pytest.approx(10, rel=0.3)
    assert fast.median > 100


def test_sizes_share_the_time_that_is_left(script: ModuleType, fasta: Path, tmp_path: Path) -> None:
    lab = script.Lab(script.parse_options(["--fasta", str(fasta), *SMALL]), [], tmp_path, {})
    lab.end = script.time.monotonic() + 90
    shares = [lab.left for _ in lab.each_size(["8M", "650M", "3B"])]
    assert shares == pytest.approx([30, 45, 90], abs=1)


def test_a_page_without_markers_is_refused(script: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="once each"):
        script.update_docs(page, "report")
    assert page.read_text(encoding="utf-8") == "no markers\n"
