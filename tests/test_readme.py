"""The README: every command in it runs, its links exist, and it fits on a screen and a half."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.finetune_fixtures import write_tiny_model

from esm2kit.cli.main import main
from esm2kit.embedding.hdf5 import EmbeddingReader

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
# what keeps a command short on a test's small data; the other settings are the README's
SHORT = {
    "embed": ["--device", "cpu"],
    "benchmark": ["--device", "cpu", "--seeds", "0", "--resamples", "100"],
    "contacts": ["--device", "cpu", "--values", "coupling"],  # random weights have no fitted contact head
    "predict": ["--device", "cpu"],
    "finetune": ["--accelerator", "cpu", "--max_steps", "2", "--resamples", "100"],
    "pretrain": ["--accelerator", "cpu", "--max_steps", "2", "--num_layers", "1", "--embed_dim", "16",
                 "--attention_heads", "2"],
}  # fmt: skip


def list_commands() -> Iterator[str]:
    """Every line of a shell block, then every command of the table."""
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.M | re.S):
        yield from block.splitlines()
    yield from re.findall(r"^\|.*\| `(esm2kit [^`]*)` \|$", TEXT, flags=re.M)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 proteins, measurements that follow their share of leucine, new proteins, and a small gb1."""
    folder = tmp_path_factory.mktemp("readme")
    generator = np.random.default_rng(0)
    proteins = [
        "".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), int(generator.integers(20, 40)))) for _ in range(60)
    ]
    records = [f">p{number}\n{protein}\n" for number, protein in enumerate(proteins)]
    (folder / "my.fasta").write_text("".join(records))
    (folder / "new.fasta").write_text("".join(records[:5]))
    rows = [f"p{number},{40 + 100 * protein.count('L') / len(protein):.2f}" for number, protein in enumerate(proteins)]
    (folder / "measurements.csv").write_text("Protein,Tm (C)\n" + "\n".join(rows) + "\n")
    (folder / "flip" / "gb1").mkdir(parents=True)
    split = [f">g{number} TARGET={protein.count('L')}.0 SET={('train', 'train', 'test')[number % 3]} "
             f"VALIDATION={number % 9 == 0}\n{protein}\n" for number, protein in enumerate(proteins)]  # fmt: skip
    (folder / "flip" / "gb1" / "two_vs_rest.fasta").write_text("".join(split))
    write_tiny_model(folder / "tiny.safetensors")
    return folder


def test_every_command_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    stages = []
    for line in list_commands():
        words = shlex.split(line, comments=True)
        if words[0] != "esm2kit":
            assert words[0] in ("pip", "git", "make"), line
            continue
        stage, *rest = words[1:]
        stages.append(stage)
        if stage == "verify":  # it requires official weights; tests/verification runs it with a local hub
            continue
        if stage != "pretrain":  # its model is a shape
            rest = ["tiny.safetensors" if before == "--model" and word in ("8M", "35M", "650M") else word
                    for before, word in zip(["", *rest], rest, strict=False)]  # fmt: skip
        else:
            rest[rest.index("8M")] = "custom"
        assert main([stage, *rest, *SHORT.get(stage, [])]) == 0, line
    assert stages[0] == "embed"
    assert {"embed", "map", "benchmark", "predict", "finetune", "preprocess", "pretrain", "check", "notebooks"} <= set(
        stages
    )
    assert EmbeddingReader("embeddings/my_embeddings.h5").matrix().shape[0] == 60
    assert len(Path("predictions.tsv").read_text(encoding="utf-8").splitlines()) == 6


def test_the_python_example_gives_one_row_per_protein(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (example,) = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.M | re.S)
    assert main(["embed", "my.fasta", "--model", "tiny.safetensors", "--device", "cpu"]) == 0
    names: dict = {}
    exec(example, names)
    assert names["vectors"].shape == (60, EmbeddingReader("embeddings/my_embeddings.h5").matrix().shape[1])


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        if not path.startswith("https://"):
            assert (ROOT / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target


def test_it_is_short_and_starts_with_a_sentence_and_a_captioned_picture() -> None:
    title, sentence, picture, caption, *rest = TEXT.split("\n\n")
    assert title == "# esm2kit"
    assert "\n" not in sentence
    assert picture.startswith("![")
    assert caption.startswith("*From the walkthrough")
    prose = re.sub(r"\]\([^)]*\)|`[^`\n]*`|\|", "", re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S))
    assert len(prose.split()) < 460, "without commands"
    assert [part.splitlines()[0] for part in rest if part.startswith("## ")] == [
        "## Start", "## I want to", "## Results", "## Licence, citation, questions",
    ]  # fmt: skip
