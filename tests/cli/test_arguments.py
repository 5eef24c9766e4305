"""Command-line arguments: the values they are parsed to, the one-line errors, and --help."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused

from esm2kit.benchmarking.config import BenchmarkConfig, CompareConfig
from esm2kit.cli import main as command
from esm2kit.cli.arguments import MAX_DESCRIBED, describe_type, parse
from esm2kit.cli.commands import STAGES, import_object
from esm2kit.cli.main import main
from esm2kit.core.errors import InputError
from esm2kit.core.options import TITLES, group_fields
from esm2kit.embedding.config import EmbedConfig
from esm2kit.finetuning.config import FinetuneConfig
from esm2kit.notebook.runs.run import RunConfig
from esm2kit.pretraining.config import PretrainConfig


def embedding(line: str) -> EmbedConfig:
    return parse(EmbedConfig, "esm2kit embed", shlex.split(line), "fasta", "esm2kit embed my.fasta")


@pytest.mark.parametrize("name", STAGES)
def test_the_example_of_every_stage_is_valid(name: str) -> None:
    stage = STAGES[name]
    program, called, *words = shlex.split(stage.example)
    assert (program, called) == ("esm2kit", name)
    config_class = import_object(stage.config)
    config = parse(config_class, f"esm2kit {name}", words, stage.positional)
    given = getattr(config, stage.positional)
    assert str(given[0] if isinstance(given, list) else given) == words[0]


def test_a_missing_package_is_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, _: list[str]) -> int:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(command, "_run", run)
    assert main(["yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the package pyyaml is not installed for " in line
    assert "Run `pip install pyyaml`" in line
    assert main(["esm2kit.nothing"]) == 1, "a bug in esm2kit"
    (line,) = capsys.readouterr().err.splitlines()
    assert "unexpected ModuleNotFoundError: No module named 'esm2kit.nothing'. This is a bug" in line


@pytest.mark.parametrize("name", STAGES)
def test_an_invalid_choice_is_an_error_in_python_too(name: str) -> None:
    config_class = import_object(STAGES[name].config)
    needed = {
        field.name: Path("given.tsv")
        for field in dataclasses.fields(config_class)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    for field, hint in get_type_hints(config_class).items():
        if any(get_origin(part) is Literal for part in (hint, *get_args(hint))):
            with refused("config.choice", name=field, found="nonsense"):
                config_class(**needed | {field: "nonsense"})


@pytest.mark.parametrize(
    ("line", "fasta"),
    [
        ("my.fasta", Path("my.fasta")),
        ("--fasta my.fasta", Path("my.fasta")),
        ("--fasta=my.fasta --fasta=b.fasta", Path("b.fasta")),
        ("--per_residue my.fasta", Path("my.fasta")),
        ("--model x my.fasta --workers 2", Path("my.fasta")),
        ("a.fasta b.fasta", [Path("a.fasta"), Path("b.fasta")]),
        ("--fasta a.fasta b.fasta", [Path("a.fasta"), Path("b.fasta")]),
        ("--fasta+ a.fasta --fasta+ b.fasta", [Path("a.fasta"), Path("b.fasta")]),
        ("'with blank, comma.fasta' b.fasta", [Path("with blank, comma.fasta"), Path("b.fasta")]),
    ],
)
def test_a_fasta_with_and_without_its_option(line: str, fasta: Path | list[Path]) -> None:
    assert embedding(line).fasta == fasta


@pytest.mark.parametrize("layers", ["3 -1", "3,-1", "3, -1", "[3,-1]", "[3, -1]"])
def test_list_notations(layers: str) -> None:
    words = f"'{layers}'" if layers.startswith("[") else layers
    assert embedding(f"my.fasta --repr_layers {words} --bos").repr_layers == [3, -1]
    assert embedding("my.fasta --repr_layers -2").repr_layers == [-2]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text("abc.,-_ /", min_size=1).filter(lambda text: text[0] not in "-[ "), min_size=2, max_size=4))
def test_paths_are_not_changed(words: list[str]) -> None:
    assert parse(EmbedConfig, "esm2kit embed", words, "fasta").fasta == [Path(word) for word in words]


def test_switches_with_and_without_a_value() -> None:
    config = embedding("my.fasta --per_residue --logits false --bos true")
    assert (config.per_residue, config.logits, config.bos) == (True, False, True)


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("--out-dir x --long-proteins=window", "--out_dir x --long_proteins window"),
        ("-o x", "--out_dir x"),
        ("-o=x", "--out_dir x"),
        ("--no-per-protein --bos", "--per_protein false --bos true"),
        ("--no-per_protein --bos", "--per_protein false --bos true"),
        ("--no_per_protein --bos", "--per_protein false --bos true"),
        ("--workers none --batch-tokens None", "--workers null --batch_tokens null"),
        ("--workers=none", "--workers null"),
        ("--model 8M", "--model esm2_t6_8M_UR50D"),
        ("--model 650m", "--model esm2_t33_650M_UR50D"),
        ("--repr-layers=3,-1", "--repr_layers 3 -1"),
    ],
)
def test_other_ways_of_writing_an_option(line: str, same: str) -> None:
    assert embedding(f"my.fasta {line}") == embedding(f"my.fasta {same}")
    assert embedding(f"{line} --fasta my.fasta") == embedding(f"my.fasta {same}")


def test_a_switch_that_is_turned_off_takes_no_value() -> None:
    assert embedding("--bos --no-per_protein my.fasta").fasta == Path("my.fasta")


def test_none_keeps_its_meaning_for_names() -> None:
    """`none` is the name of an output folder or of a model, and no choice of a parameter that has choices."""
    assert embedding("my.fasta -o none").out_dir == Path("none")
    assert embedding("none").fasta == Path("none")
    assert embedding("my.fasta --name none").name is None


@pytest.mark.parametrize("name", STAGES)
def test_o_is_the_output_of_every_stage_that_has_one(name: str) -> None:
    stage = STAGES[name]
    config_class = import_object(stage.config)
    fields = [field.name for field in dataclasses.fields(config_class)]
    words = [*shlex.split(stage.example)[2 if stage.positional != "out_dir" else 3 :], "-o", "mine.tsv"]
    if "out_dir" in fields or "out" in fields:
        config = parse(config_class, f"esm2kit {name}", words, stage.positional)
        assert (config.out_dir if "out_dir" in fields else config.out) == Path("mine.tsv")
    else:
        with refused("argument.unknown", name="-o"):
            parse(config_class, f"esm2kit {name}", words, stage.positional)


@pytest.mark.parametrize("name", STAGES)
def test_short_names_of_models_in_every_stage(name: str) -> None:
    """A short name and the official name are the same setting, so that a run is recognised under both."""
    stage = STAGES[name]
    config_class = import_object(stage.config)
    fields = [field.name for field in dataclasses.fields(config_class) if field.name in ("model", "init_from", "base")]
    words = shlex.split(stage.example)[2 if stage.positional not in fields else 3 :]
    words += ["--model", "run"] if name == "predict" else []
    for field in fields:
        given = [
            parse(config_class, f"esm2kit {name}", [*words, f"--{field}", model], stage.positional)
            for model in ("3B", "esm2_t36_3B_UR50D")
        ]
        is_path = isinstance(getattr(given[1], field), Path)  # a fine-tuned model has no official name
        assert is_path or given[0] == given[1]
    assert fields or not name.startswith(("embed", "benchmark", "finetune", "pretrain", "export"))


def test_the_short_forms_of_run() -> None:
    words = ["small", "--from", "03", "-p", "lr=1e-3", "-p", "others=a,b", "--resume"]
    config = parse(RunConfig, "esm2kit run", words, "tier")
    expected = RunConfig("small", "03", resume=True, parameters=["lr=1e-3", "others=a,b"])
    assert config == expected
    words[3:7] = ["--parameters", "lr=1e-3", "others=a,b"]
    assert parse(RunConfig, "esm2kit run", words, "tier") == expected


def test_lists_of_names_empty_lists_and_null() -> None:
    words = ["gb1", "--baselines", "mean", "composition", "--seeds", "1"]
    config = parse(BenchmarkConfig, "esm2kit benchmark", words, "task")
    assert (config.task, config.baselines, config.seeds) == ("gb1", ["mean", "composition"], [1])
    for empty in ("[]", "none"):
        assert parse(BenchmarkConfig, "esm2kit benchmark", ["--baselines", empty]).baselines == []
        assert parse(BenchmarkConfig, "esm2kit benchmark", [f"--baselines={empty}"]).baselines == []
    assert parse(BenchmarkConfig, "esm2kit benchmark", ["--baselines", "null"]).baselines is None


def test_later_values_override_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("fasta: a.fasta\nout_dir: vectors\nrepr_layers: [1, 2]\nprecision: int8\n")
    config = embedding(f"--config {path} --precision float32")
    assert config == EmbedConfig(Path("a.fasta"), Path("vectors"), repr_layers=[1, 2], precision="float32")
    assert embedding(f"--config {path} b.fasta").fasta == Path("b.fasta")
    path.write_text("fasta: a.fasta\nrepr-layers: [1]\nworkers: none\nper-protein: no\nbos: on\n")
    assert embedding(f"--config {path}") == EmbedConfig(Path("a.fasta"), repr_layers=[1], per_protein=False, bos=True)


@pytest.mark.parametrize(
    ("line", "code", "values"),
    [
        ("", "argument.missing", {"names": ("fasta",)}),
        (
            "a.fasta --precision bf61",
            "argument.value",
            {"name": "precision", "found": "bf61", "nearest": "bfloat16"},
        ),
        (
            "a.fasta --device gpu",
            "argument.value",
            {"found": "gpu", "nearest": None},
        ),  # cpu is more similar, but the wrong suggestion
        ("a.fasta --workers two", "argument.value", {"name": "workers", "found": "two"}),
        ("a.fasta --workers 1.5", "argument.value", {"name": "workers", "found": "1.5"}),
        ("a.fasta --workers", "argument.no-value", {"name": "--workers"}),
        ("a.fasta --bos ture", "argument.value", {"name": "bos", "found": "ture"}),
        ("a.fasta --repr_layers 3 last", "argument.value", {"name": "repr_layers", "found": "3, last"}),
        ("a.fasta --outdir x", "argument.unknown", {"name": "--outdir", "nearest": "out_dir"}),
        ("a.fasta --long-protein window", "argument.unknown", {"name": "--long-protein", "nearest": "long_proteins"}),
        ("a.fasta --no-per-residu", "argument.unknown", {"nearest": "no_per_residue"}),
        ("a.fasta --no-workers", "argument.unknown", {"name": "--no-workers", "nearest": "workers"}),
        ("a.fasta --no-bos=true", "argument.unknown", {"name": "--no-bos"}),
        ("a.fasta --precision none", "argument.value", {"name": "precision", "found": "none"}),
        ("a.fasta -fasta b.fasta", "argument.unknown", {"name": "-fasta", "nearest": "fasta"}),
        ("a.fasta -x", "argument.unknown", {"name": "-x", "nearest": None}),
        ("a.fasta --fasta b.fasta", "argument.unexpected", {"found": "a.fasta"}),
        ("--config nowhere.yaml", "config.absent", {"path": Path("nowhere.yaml")}),
    ],
)
def test_error_codes_of_wrong_arguments(line: str, code: str, values: dict[str, object]) -> None:
    with refused(code, **values):
        embedding(line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "--fasta is required, as in `esm2kit embed my.fasta`"),
        (
            "a.fasta --precision bf61",
            "--precision must be auto, float32, bfloat16 or int8, found 'bf61'; did you mean 'bfloat16'?",
        ),
        ("a.fasta --outdir x", "unknown parameter --outdir; did you mean --out_dir?"),
        ("a.fasta -x", "unknown parameter -x; `esm2kit embed --help_all` lists all parameters"),
        ("a.fasta --no-per-residu", "unknown parameter --no-per-residu; did you mean --no-per_residue?"),
    ],
)
def test_messages_state_what_is_allowed(line: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        embedding(line)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("text", "code", "values"),
    [
        ("precison: int8", "argument.unknown", {"name": "precison", "nearest": "precision"}),
        ("precision: int9", "argument.value", {"name": "precision", "found": "int9", "nearest": "int8"}),
        ("workers: [1]", "argument.value", {"name": "workers", "found": "[1]"}),
        ("- fasta", "config.not-a-mapping", {}),
        ("fasta: [a", "config.not-yaml", {}),
    ],
)
def test_error_codes_of_wrong_config_files(text: str, code: str, values: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with refused(code, **values):
        embedding(f"a.fasta --config {path}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict"], "--model, --fasta and --out are required, as in `esm2kit predict my.fasta --model"),
        (["preprocess", "--fasta", "a.fasta"], "unknown parameter --fasta; did you mean --train_fasta?"),
        (["pretrain", "a", "b"], "--data takes one value (a path), found 2: a, b"),
        (["benchmark", "--probe", "rigde"], "or none, found 'rigde'; did you mean 'ridge'?"),
        (["pretrain", "d", "--devices", "3", "--global_batch_size", "32"], "--out_dir is required"),
        (["pretrain", "d", "--devices", "3", "--global_batch_size", "32", "--out_dir", "x"], "data_parallel_size 3 = "),
        (["run", "--only", "05", "--from", "03"], "--from and --only exclude each other: choose one"),
        (
            ["pretrain", "{sample}/mapping.tsv", "--out_dir", "{tmp}/x"],
            "is a file. Run `esm2kit prep",
        ),
        (
            ["embed", "{sample}/uniref50_valid.fasta", "--out_dir", "{tmp}/file", "--untrained_seed", "0"],
            "is a file, not a folder",
        ),
        (["benchmark", "mine", "--data_dir", "{tmp}/no"], "which is not a folder; choose one of secondary_structure"),
        (["run", "-p"], "-p requires a value: text"),
        (["run", "-p", "lr"], "-p lr: expected name=value"),
        (["download", "esm2_t6"], "called owner/name); did you mean 'esm2_t6_8M_UR50D'?"),
    ],
)
def test_every_error_is_one_line(
    words: list[str], message: str, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main([word.format(sample=sample, tmp=tmp_path) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("esm2kit: ")
    assert line.count("esm2kit: ") == 1
    assert message in line


def test_help_of_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["embed", "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: esm2kit embed [FASTA] [--key value ...] [--config file.yaml]")
    assert f"\n  {STAGES['embed'].example}\n" in shown, "the example is one line, to be copied"
    assert "FASTA can also be written as --fasta FASTA." in shown
    assert "class" not in shown.replace("(class", ""), "no Python types"
    assert "--fasta+" not in shown
    assert "\n  -o, --out_dir PATH " in shown
    assert "\n  --[no-]per_protein " in shown
    assert "(default: on)" in shown
    assert "(required)" in shown


def test_help_has_the_short_forms_and_the_usual_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in (
        (["run"], "-p, --parameters TEXT ..."),
        (["finetune"], "usual parameters: --task TEXT"),
    ):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        assert text in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", STAGES)
def test_every_parameter_has_a_group_and_is_described_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config_class = import_object(STAGES[name].config)
    fields = [field.name for field in dataclasses.fields(config_class)]
    grouped = group_fields(config_class)
    assert sorted(field for names in grouped.values() for field in names) == sorted(fields)
    assert next(iter(grouped)) == "usual"
    if len(fields) > MAX_DESCRIBED:
        assert len(grouped["usual"]) <= 12, "the usual parameters fit on a screen"
    with pytest.raises(SystemExit) as left:
        main([name, "--help-all"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    for group, names in grouped.items():
        section = shown.split(f"\n{TITLES[group]}:\n")[1].split("\n\n")[0]
        lines = [line.split() for line in section.splitlines() if line.startswith("  -")]
        assert [next(word for word in line if word.startswith("--")) for line in lines] == [
            _find_shown_name(config_class, each) for each in names
        ]
    assert "null" not in shown
    assert "default: none" not in shown, "the text says what happens without a value"


def _find_shown_name(config_class: type, field: str) -> str:
    hint = get_type_hints(config_class)[field]
    if field == "from_notebook":
        return "--from,"
    return f"--[no-]{field}" if bool in (hint, *get_args(hint)) else f"--{field}"


@pytest.mark.parametrize("name", STAGES)
def test_help_names_every_parameter(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config_class = import_object(STAGES[name].config)
    shown = []
    for words in ([name, "--help"], [name, "-h"], ["help", name]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]
    for field in dataclasses.fields(config_class):
        assert re.search(rf"\b{field.name}\b", shown[0].split("parameters:", 1)[1])


def test_groups_of_inherited_fields() -> None:
    """A stage may make an inherited parameter a usual one; a field without a group is an error."""
    assert "lr" in group_fields(PretrainConfig)["usual"]
    assert "max_steps" in group_fields(PretrainConfig)["usual"]
    assert "max_steps" in group_fields(FinetuneConfig)["training"]
    assert "beta1" in group_fields(FinetuneConfig)["optimizer"]

    @dataclasses.dataclass(frozen=True)
    class Extended(CompareConfig):
        extra: int = 0

    with pytest.raises(KeyError, match="Extended: extra in no group"):
        group_fields(Extended)


def test_help_of_an_unknown_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "finetun"]) == 2
    assert "did you mean 'finetune'?" in capsys.readouterr().err


def test_describe_type() -> None:
    assert describe_type(int | float) == "a number"
    assert describe_type(Path | list[Path] | None) == "a path, paths or none"
    assert describe_type(int | None) == "an integer or none"
    assert describe_type(list[str]) == "one or more names"


@pytest.mark.parametrize("name", ["--version", "-V"])
def test_the_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 0
    assert capsys.readouterr().out.startswith("esm2kit 0.")


@pytest.mark.parametrize(("number", "waits"), [(0, []), (1, [10])])
def test_rank_0_reports_the_error_first(number: int, waits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks wait, as torchrun usually stops them before they report the same error."""
    slept = []
    monkeypatch.setattr(command, "is_worker", lambda: True)
    monkeypatch.setattr(command, "rank", lambda: number)
    monkeypatch.setattr(command.time, "sleep", slept.append)
    assert main(["pretrian"]) == 2
    assert slept == waits


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["check", ""], "path"),
        (["compare", "a", ""], "reports"),
        (["embed", "in.fasta", "--out_dir", ""], "out_dir"),
        (["embed", "in.fasta", "--out_dir="], "out_dir"),
        (["embed", "in.fasta", "--model", ""], "model"),
        (["export", "", "--out", "x"], "model"),
    ],
)
def test_an_empty_value_is_not_the_current_folder(command: list[str], name: str) -> None:
    stage = STAGES[command[0]]
    with refused("argument.empty", name=name):
        parse(import_object(stage.config), f"esm2kit {command[0]}", command[1:], stage.positional)


def test_an_empty_path_in_yaml_is_not_the_current_folder(tmp_path: Path) -> None:
    path, stage = tmp_path / "c.yaml", STAGES["embed"]
    path.write_text("fasta: in.fasta\nout_dir: ''\n", encoding="utf-8")
    with refused("argument.empty", name=f"{path}: out_dir"):
        parse(import_object(stage.config), "esm2kit embed", ["--config", str(path)], stage.positional)
