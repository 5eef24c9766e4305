"""YAML with a repeated key is an error; all other documents are read as by PyYAML."""

import pytest
import yaml
from support.errors import refused

from esm2kit.cli.arguments import parse
from esm2kit.core.yaml_text import parse_yaml
from esm2kit.embedding.config import EmbedConfig
from esm2kit.tasks.files import read_description


@pytest.mark.parametrize("text", ["a: 1\na: 2", "x: {b: 1, c: 2, b: 3}", "- {a: 1, 'a': 2}"])
def test_a_repeated_key_is_refused(text):
    with pytest.raises(yaml.YAMLError, match=r"the key '[ab]' occurs twice"):
        parse_yaml(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1\nb: {a: 2}",
        "- {a: 1}\n- {a: 1}",
        "x: &x {a: 1}\ny: {<<: *x, a: 2}\nz: {<<: *x}",
        "x: &x {a: 1, b: 2}\ninner:\n  y: &y {<<: *x, b: 3}\nz: {<<: *y, c: 4}",
        "{1: a, '1': b}",
        "[1, 1e-3, no]",
    ],
)
def test_other_documents_are_read_as_by_pyyaml(text):
    assert parse_yaml(text) == yaml.safe_load(text)


def test_configurations_and_task_descriptions_refuse_repeated_keys(tmp_path):
    (tmp_path / "c.yaml").write_text("fasta: a.fasta\nmodel: m\nfasta: b.fasta\n", encoding="utf-8")
    with refused("config.not-yaml", path=tmp_path / "c.yaml") as caught:
        parse(EmbedConfig, "esm2kit embed", ["--config", str(tmp_path / "c.yaml")], "fasta")
    assert "the key 'fasta' occurs twice" in str(caught.value)
    for content in (b"tasks:\n- {name: t, level: protein, level: residue}\n", "tasks: [] # \u00e9".encode("latin-1")):
        (tmp_path / "tasks.yaml").write_bytes(content)
        with refused("task.description", path=tmp_path / "tasks.yaml"):
            read_description(tmp_path, "t")
