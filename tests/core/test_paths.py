"""`~` in paths, in every configuration and every public reader."""

import dataclasses
from pathlib import Path
from typing import get_type_hints

import pytest
from support.errors import refused

import esm2kit
from esm2kit.cli.arguments import parse
from esm2kit.cli.commands import STAGES, import_object
from esm2kit.core.paths import expand_path
from esm2kit.notebook.pickers.tasks import file_picker
from esm2kit.notebook.records import need, work_folder
from esm2kit.notebook.runs.tiers import check_parameters

# what else a stage requires
ALONE = {"split": "check"}  # a path that excludes others
REQUIRED = {"data": "d", "model": "m", "task": "t", "max_steps": 1, "global_batch_size": 8, "run": "r"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_expand_path(home: Path) -> None:
    assert expand_path("~/a/b.fasta") == home / "a/b.fasta"
    assert expand_path("~") == home
    assert expand_path("a/~/b") == Path("a/~/b")
    assert expand_path("a~") == Path("a~")
    with refused("path.home", path=Path("~no-such-user/x")):
        expand_path("~no-such-user/x")
    Path("~backup.fasta").touch()
    assert expand_path("~backup.fasta") == Path("~backup.fasta"), "a file with this name is the one that is meant"


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "completion"])  # which has no path
def test_every_path_of_every_stage_is_expanded(home: Path, stage: str) -> None:
    config_class = import_object(STAGES[stage].config)
    hints = get_type_hints(config_class)
    paths = [field.name for field in dataclasses.fields(config_class) if "Path" in str(hints[field.name])]
    assert paths
    required = {field.name for field in dataclasses.fields(config_class) if field.default is dataclasses.MISSING}
    other = {name: value for name, value in REQUIRED.items() if name in required and name not in paths}
    given = {name: [Path("~/x.tsv")] if "list[" in str(hints[name]) else Path("~/x.tsv") for name in paths}
    alone = ALONE.get(stage)
    groups = [[alone], [name for name in paths if name != alone]] if alone else [paths]
    for group in groups:
        config = config_class(**other | {name: given[name] for name in group})
        for name in group:
            found = getattr(config, name)
            assert found == ([home / "x.tsv"] if isinstance(found, list) else home / "x.tsv"), name


def test_yaml_command_line_and_python_agree(home: Path) -> None:
    Path("cfg.yaml").write_text(
        "fasta: [~/in.fasta, b.fasta]\nout_dir: ~/vectors\nmodel: ~/m.safetensors\n", encoding="utf-8"
    )
    (home / "cfg.yaml").write_text(Path("cfg.yaml").read_text(encoding="utf-8"))
    python = esm2kit.EmbedConfig([Path("~/in.fasta"), Path("b.fasta")], Path("~/vectors"), model="~/m.safetensors")
    assert python.out_dir == home / "vectors"
    assert python.model == str(home / "m.safetensors")
    words = ["~/in.fasta", "b.fasta", "--out_dir=~/vectors", "--model", "~/m.safetensors"]
    for given in (["--config", "cfg.yaml"], ["--config=~/cfg.yaml"], words):
        config = parse(esm2kit.EmbedConfig, "esm2kit embed", given, "fasta")
        assert config == dataclasses.replace(python), given


def test_readers_and_notebooks_expand(home: Path) -> None:
    (home / "x.fasta").write_text(">a\nMKV\n")
    (home / "task").mkdir()
    rows = "".join(f"MKV{'AC'[n % 2] * (n + 1)},{n / 2},{('train', 'test', 'val')[n % 3]}\n" for n in range(12))
    (home / "task" / "own.csv").write_text(f"sequence,target,set\n{rows}")
    assert [record.id for record in esm2kit.read_fasta("~/x.fasta")] == ["a"]
    assert len(esm2kit.load_task("task", None, Path("~")).ids) == 12
    assert len(esm2kit.load_task("~/task", None, Path("elsewhere")).ids) == 12
    assert need("~/x.fasta", "none") == home / "x.fasta"
    assert work_folder("~/work") == home / "work"
    assert file_picker("~/x.fasta").value == home / "x.fasta"
    for reader, code in ((esm2kit.EmbeddingReader, "embeddings.absent"), (esm2kit.Report.read, "report.absent")):
        with refused(code) as caught:
            reader("~/none")
        assert str(caught.value).startswith(str(home))
    assert check_parameters(home, "n", {"work_dir": "~/w", "seed": 1}, {"work_dir": "../work", "seed": 0}) == {
        "work_dir": str(home / "w"),
        "seed": 1,
    }
    assert not Path("~").exists()
