"""Damage every kind of file that esm2kit reads, and count what happens.

Each trial copies a set of small files, damages one of them (a flipped bit, a zeroed block, bytes cut off the end), and
reads the copy in a process of its own. The outcome is one of

    refused     a one-line InputError
    harmless    the same result as from the undamaged files
    traceback   any other exception, a crash of the process, or no end within SECONDS
    different   another result without an error; acceptable only for other programs' files without a checksum

`python tests/support/damage.py --trials 2500 --seed 0` runs the campaign and prints a table; `--kinds report store`
restricts it, `--show 5` prints examples.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

SECONDS = 60  # that one trial may take
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [f"esm2kit.{name}" for name in ("pretraining.pretrain", "embedding.embed", "finetuning.finetune",
                                    "benchmarking.benchmark", "structure.contacts", "models.export")]
)  # fmt: skip
OUTCOMES = ("refused", "harmless", "traceback", "different")
SEQUENCES = ("MKVLAAGGWTEKRLLSADHQNPFYC", "MSTNPKPQRKTKRNTNRRPQDVKF", "GGWLKHERNDAQSTVVYFPCMI", "MAHHHHHHWKLESTGRQ")


class Kind(NamedTuple):
    """One kind of file.

    Args:
        name: what it is.
        checked: whether esm2kit writes it with a checksum, so that no damage may pass unnoticed.
        files: patterns of the files to damage, relative to the folder.
        build: writes the undamaged files into an empty folder.
        use: reads them as a stage does; returns something that JSON can express.
    """

    name: str
    checked: bool
    files: tuple[str, ...]
    build: Callable[[Path], None]
    use: Callable[[Path], Any]


class Trial(NamedTuple):
    """What was damaged, and the outcome with its message."""

    kind: str
    damage: str
    outcome: str
    message: str


def fasta_text(num_proteins: int = 24) -> str:
    generator = random.Random(1)
    names = [f"p{number}" for number in range(num_proteins)]
    bodies = [SEQUENCES[number % 4] + "".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=12)) for number in range(24)]
    return "".join(f">{name} protein\n{body}\n" for name, body in zip(names, bodies, strict=True))


def digest(*arrays: Any) -> str:
    """One text for any number of arrays and texts."""
    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(array.encode() if isinstance(array, str) else np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()


def write_model(path: Path, seed: int = 0) -> Path:
    from support.finetune_fixtures import write_tiny_model

    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tiny_model(path, seed)


def model_digest(path: Path) -> str:
    from esm2kit import load_model

    state = load_model(path)[0].state_dict()
    return digest(*(part for name in sorted(state) for part in (name, state[name].numpy())))


# --- what other programs write ------------------------------------------------------------------------------------


def build_fasta(folder: Path) -> None:
    import gzip

    import zstandard

    (folder / "plain.fasta").write_text(fasta_text())
    (folder / "packed.fasta.gz").write_bytes(gzip.compress(fasta_text().encode()))
    (folder / "packed.fasta.zst").write_bytes(zstandard.compress(fasta_text().encode()))


def use_fasta(folder: Path) -> Any:
    from esm2kit import read_fasta

    return [[list(record) for record in read_fasta(path)] for path in sorted(folder.iterdir())]


def build_clusters(folder: Path) -> None:
    (folder / "all.fasta").write_text(fasta_text())
    rows = [f"p{number // 4 * 4}\tp{number}\n" for number in range(24)]
    (folder / "clusters.tsv").write_text("".join(rows))


def use_clusters(folder: Path) -> Any:
    from esm2kit import PreprocessConfig, preprocess

    config = PreprocessConfig(
        train_fasta=folder / "all.fasta", cluster_tsv=[folder / "clusters.tsv"], out_dir=folder / "out",
        val_size=0.2, leakage_identity=0.0,
    )  # fmt: skip
    preprocess(config)
    return use_dataset(folder / "out")


def build_tasks(folder: Path) -> None:
    import zipfile

    from support.finetune_fixtures import write_tasks

    write_tasks(folder, 24)
    with zipfile.ZipFile(folder / "zipped.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "protein_value" / "own.fasta", "split.fasta")
    (folder / "zipped").mkdir()
    (folder / "zipped.zip").rename(folder / "zipped" / "zipped.zip")
    (folder / "table").mkdir()
    rows = [
        f"p{number},{SEQUENCES[number % 4]},{number / 7:.3f},{'test' if number % 4 == 0 else 'train'},{number % 4 == 1}"
        for number in range(24)
    ]
    (folder / "table" / "random.csv").write_text("\n".join(["id,sequence,target,set,validation", *rows]) + "\n")


def use_tasks(folder: Path) -> Any:
    from esm2kit import load_task

    found = []
    for name in ("protein_class", "protein_value", "residue_class", "residue_value", "zipped", "table"):
        data = load_task(name, None, folder)
        found.append([name, data.ids, data.sequences, list(data.sets), digest(data.targets, data.scored)])
    return found


def build_huggingface(folder: Path) -> None:
    from esm2kit import ExportConfig, export

    export(ExportConfig(str(write_model(folder.parent / "hf_source" / "small.safetensors")), folder / "hf"))


def use_huggingface(folder: Path) -> Any:
    return model_digest(folder / "hf")


def build_fair_esm(folder: Path) -> None:
    from esm2kit import ExportConfig, export

    source = write_model(folder.parent / "fair_source" / "small.safetensors")
    export(ExportConfig(str(source), folder / "esm2_small.pt", format="fair-esm"))


def use_fair_esm(folder: Path) -> Any:
    return model_digest(folder / "esm2_small.pt")


def build_config(folder: Path) -> None:
    settings = "fasta: in.fasta\nmodel: esm2_t6_8M_UR50D\nrepr_layers: [-1]\nper_residue: true\nmax_residues: 1022\n"
    (folder / "config.yaml").write_text(settings)


def use_config(folder: Path) -> Any:
    from esm2kit.cli.arguments import parse
    from esm2kit.core.files import to_json
    from esm2kit.embedding.config import EmbedConfig

    config = parse(EmbedConfig, "esm2kit embed", ["--config", str(folder / "config.yaml")], "fasta", "")
    return str(to_json(config)).replace(str(folder), "")


# --- what esm2kit writes ------------------------------------------------------------------------------------------


def build_dataset(folder: Path) -> None:
    from esm2kit import PreprocessConfig, preprocess

    build_clusters(folder)
    config = PreprocessConfig(
        train_fasta=folder / "all.fasta", cluster_tsv=[folder / "clusters.tsv"], out_dir=folder / "data",
        val_size=0.2, leakage_identity=0.0,
    )  # fmt: skip
    preprocess(config)


def use_dataset(folder: Path) -> Any:
    from esm2kit import TrainingSet

    data = TrainingSet.open(folder)
    members = [data.clusters.members(cluster).tolist() for cluster in range(data.clusters.num_clusters)]
    return [
        [[store.id(row), digest(store.residues(row))] for row in range(len(store))]
        for store in (data.train, data.valid)
    ] + [members, data.fingerprint, data.unigram.perplexity]


def use_built_dataset(folder: Path) -> Any:
    return use_dataset(folder / "data")


def build_checkpoint(folder: Path) -> None:
    write_model(folder / "small.safetensors")


def use_checkpoint(folder: Path) -> Any:
    return model_digest(folder / "small.safetensors")


def train(folder: Path, max_steps: int) -> Any:
    from esm2kit import PretrainConfig, pretrain

    return pretrain(
        PretrainConfig(
            data=folder / "data", out_dir=folder / "run", model="custom", num_layers=1, embed_dim=16, attention_heads=2,
            accelerator="cpu", max_steps=max_steps, global_batch_size=4, val_check_interval=2, warmup_steps=1,
            num_workers=0,
        )
    )  # fmt: skip


def build_training(folder: Path) -> None:
    build_dataset(folder)
    train(folder, 2)


def use_training(folder: Path) -> Any:
    import csv

    train(folder, 4)
    with open(folder / "run" / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept = [{name: row[name] for name in row if "loss" in name or name == "step"} for row in rows]
    return [model_digest(folder / "run" / "checkpoints" / "last.safetensors"), kept]


def embed_small(folder: Path, layout: str = "datasets") -> Any:
    from esm2kit import EmbedConfig, EmbeddingReader, embed

    config = EmbedConfig(
        folder / "in.fasta", folder / "out", model=str(folder / "small.safetensors"), per_residue=True, layout=layout,
        device="cpu", workers=1, batch_tokens=64,
    )  # fmt: skip
    result = embed(config)
    found = []
    for path in (result.embeddings, result.hiddens):
        with EmbeddingReader(path) as reader:
            found.append([reader.ids, digest(*(reader[name] for name in reader.ids))])
    return found


def build_embeddings(folder: Path) -> None:
    (folder / "in.fasta").write_text(fasta_text())
    write_model(folder / "small.safetensors")
    embed_small(folder)


def build_packed_embeddings(folder: Path) -> None:
    (folder / "in.fasta").write_text(fasta_text())
    write_model(folder / "small.safetensors")
    embed_small(folder, "packed")


def use_packed_embeddings(folder: Path) -> Any:
    return embed_small(folder, "packed")


def build_unfinished_embeddings(folder: Path) -> None:
    """Half a run: the process ends without warning after some batches."""
    (folder / "in.fasta").write_text(fasta_text())
    write_model(folder / "small.safetensors")
    pid = os.fork()
    if pid == 0:
        from esm2kit.embedding import run

        done, finish = [], run.EmbeddingRun._write_batch

        def finish_some(self: Any, *arguments: Any) -> None:
            finish(self, *arguments)
            done.append(1)
            if len(done) == 6:
                self._close()
                os._exit(0)

        run.EmbeddingRun._write_batch = finish_some
        embed_small(folder)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def use_embeddings_file(folder: Path) -> Any:
    """As `benchmark --embeddings` reads a file."""
    from esm2kit import EmbeddingReader

    with EmbeddingReader(folder / "out" / "in_embeddings.h5") as reader:
        matrix = reader.matrix()
        return [reader.ids, digest(matrix), str(sorted(map(str, reader.attributes.items())))]


def predict_small_contacts(folder: Path) -> Any:
    from esm2kit import ContactReader, ContactsConfig, predict_contacts

    options = {"model": str(folder / "small.safetensors"), "values": "coupling", "pictures": 0}
    made = predict_contacts(ContactsConfig(folder / "in.fasta", folder / "out", **options))
    with ContactReader(made.contacts) as reader:
        return [reader.ids, digest(*(reader[name] for name in reader)), str(reader.attributes["settings"])]


def search_small_neighbours(folder: Path) -> Any:
    from esm2kit import NeighboursConfig, find_neighbours

    options = {"model": str(folder / "small.safetensors"), "out_dir": folder / "out", "candidates": 2}
    made = find_neighbours(NeighboursConfig(folder / "in.fasta", folder / "in.fasta", **options))
    return [made.num_reference, made.neighbours.read_text(), made.nearest.read_text()]


def build_neighbours(folder: Path) -> None:
    (folder / "in.fasta").write_text(fasta_text())
    write_model(folder / "small.safetensors")
    search_small_neighbours(folder)


def build_contacts(folder: Path) -> None:
    (folder / "in.fasta").write_text(fasta_text())
    write_model(folder / "small.safetensors")
    predict_small_contacts(folder)


def build_structures(folder: Path) -> None:
    from support.structure_files import build_chain, write_structure

    for suffix in ("pdb", "cif"):
        write_structure(folder / f"a.{suffix}", build_chain(SEQUENCES[0]) + build_chain(SEQUENCES[1], "B"))


def use_structures(folder: Path) -> Any:
    from esm2kit import read_structure

    found = [chain for suffix in ("pdb", "cif") for chain in read_structure(folder / f"a.{suffix}").chains]
    return [[chain.name, chain.sequence, digest(chain.cb_C3)] for chain in found]


def build_reports(folder: Path) -> None:
    from esm2kit import BenchmarkConfig, benchmark
    from support.finetune_fixtures import write_tasks

    write_tasks(folder / "tasks", 48)
    for seed, name in enumerate("ab"):
        model = write_model(folder / f"{name}.safetensors", seed)
        benchmark(
            BenchmarkConfig(
                task="protein_value", data_dir=folder / "tasks", model=str(model), out_dir=folder / name, seeds=[0],
                resamples=100, untrained=False, baselines=[], device="cpu", epochs=2,
            )
        )  # fmt: skip


def use_reports(folder: Path) -> Any:
    from esm2kit import CompareConfig, compare
    from esm2kit.core.files import to_json

    found = compare(CompareConfig([folder / "a", folder / "b"], out_dir=folder / "compared"))
    return str(to_json(found)).replace(str(folder), "")


def build_finetuned(folder: Path) -> None:
    from esm2kit import FinetuneConfig, finetune
    from support.finetune_fixtures import write_tasks

    write_tasks(folder.parent / "finetune_tasks", 24)
    model = write_model(folder.parent / "finetune_source" / "small.safetensors")
    (folder / "new.fasta").write_text(fasta_text())
    finetune(
        FinetuneConfig(
            task="protein_value", data_dir=folder.parent / "finetune_tasks", model=str(model), out_dir=folder / "tuned",
            max_steps=2, benchmark=False, accelerator="cpu", seeds=[0],
        )
    )  # fmt: skip


def use_finetuned(folder: Path) -> Any:
    from esm2kit import PredictConfig, predict

    predict(PredictConfig(fasta=folder / "new.fasta", model=folder / "tuned", out=folder / "out.tsv", device="cpu"))
    return (folder / "out.tsv").read_text(encoding="utf-8")


def build_probes(folder: Path) -> None:
    from esm2kit import BenchmarkConfig, benchmark
    from support.finetune_fixtures import write_tasks

    write_tasks(folder.parent / "probe_tasks", 48)
    model = write_model(folder.parent / "probe_source" / "small.safetensors")
    benchmark(
        BenchmarkConfig(
            task="protein_value", data_dir=folder.parent / "probe_tasks", model=str(model), out_dir=folder / "bench",
            seeds=[0], resamples=100, untrained=False, baselines=["mean", "composition"], device="cpu",
        )
    )  # fmt: skip


def use_probes(folder: Path) -> Any:
    """As `predict --model` reads each of the saved probes."""
    from esm2kit.finetuning.predictor import load_predictor

    paths = sorted((folder / "bench" / "probes").iterdir())
    return [[path.name, digest(*load_predictor(path).outputs(SEQUENCES))] for path in paths]


def build_run_manifest(folder: Path) -> None:
    from esm2kit.notebook.runs.manifest import NotebookRun, RunManifest

    notebook = NotebookRun({"seed": 1}, "done", "ab", seconds=3.0, figures={"perplexity": 17.1}, result="A result.")
    for name in ("sample-20260101-090000", "sample-20260102-090000"):
        (folder / name).mkdir()
        RunManifest("sample", "2026-01-01T00:00:00+00:00", notebooks={"00_start_here": notebook}).write(folder / name)


def use_run_manifest(folder: Path) -> Any:
    from esm2kit.core.files import to_json
    from esm2kit.notebook.runs.manifest import read_manifest

    return [to_json(read_manifest(path)) for path in sorted(folder.iterdir())]


KINDS = [
    Kind("FASTA, plain and compressed", False, ("*",), build_fasta, use_fasta),
    Kind("cluster TSV", False, ("clusters.tsv",), build_clusters, use_clusters),
    Kind("task FASTA, CSV, zip", False, ("*/*",), build_tasks, use_tasks),
    Kind("Hugging Face folder", False, ("hf/*",), build_huggingface, use_huggingface),
    Kind("fair-esm .pt", False, ("*.pt",), build_fair_esm, use_fair_esm),
    Kind("PDB and mmCIF", False, ("a.*",), build_structures, use_structures),
    Kind("YAML configuration", False, ("config.yaml",), build_config, use_config),
    Kind("dataset", True, ("data/*",), build_dataset, use_built_dataset),
    Kind("checkpoint", True, ("*.safetensors",), build_checkpoint, use_checkpoint),
    Kind("training run, resumed", True, ("run/*", "run/checkpoints/*"), build_training, use_training),
    Kind("embeddings, complete", True, ("out/*",), build_embeddings, embed_small),
    Kind("embeddings, packed", True, ("out/*",), build_packed_embeddings, use_packed_embeddings),
    Kind(
        "embeddings, unfinished run", True, ("out/*", "out/*/*", "out/.*/*"), build_unfinished_embeddings, embed_small
    ),
    Kind("embeddings, given as a file", True, ("out/in_embeddings.h5",), build_embeddings, use_embeddings_file),
    Kind("contacts, complete", True, ("out/*",), build_contacts, predict_small_contacts),
    Kind("neighbours, complete", True, ("out/*",), build_neighbours, search_small_neighbours),
    Kind("report and predictions", True, ("a/report.json", "a/predictions.npz"), build_reports, use_reports),
    Kind("fine-tuned model", True, ("tuned/*.safetensors",), build_finetuned, use_finetuned),
    Kind("saved probes", True, ("bench/probes/*.safetensors",), build_probes, use_probes),
    Kind("notebook run manifest", True, ("*/manifest.json",), build_run_manifest, use_run_manifest),
]


def damage(path: Path, generator: random.Random) -> str:
    """Damage a file in place; returns what was done."""
    size = path.stat().st_size
    how = generator.choice(("flip", "flip", "flip", "zero", "cut"))
    if not size:
        path.write_bytes(b"\x07")
        return "a byte added to an empty file"
    place = generator.randrange(size)
    if how == "cut":
        with open(path, "r+b") as file:
            file.truncate(place)
        return f"cut from {size} to {place} bytes"
    length = 1 if how == "flip" else min(generator.choice((4, 64, 4096)), size - place)
    with open(path, "r+b") as file:
        file.seek(place)
        before = file.read(length)
        after = bytes([before[0] ^ 1 << generator.randrange(8)]) if how == "flip" else bytes(length)
        file.seek(place)
        file.write(after)
    if before == after:
        return "nothing changed"
    return f"byte {place} of {size} flipped" if how == "flip" else f"{length} bytes at {place} of {size} zeroed"


def in_clean_process(function: Callable[[Path], Any], folder: Path) -> tuple[str, str]:
    """Call a function in a process of its own; returns (outcome without comparison, result or message).

    The process is forked from a server that has imported modules and done nothing else. A fork of a process that runs
    threads, such as one that has run other tests, can wait for ever for a lock that no thread will release.
    """
    reader, writer = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_send, args=(function, folder, writer))
    process.start()
    writer.close()
    try:
        outcome, message = reader.recv()
    except EOFError:
        process.join()
        return "traceback", f"the process ended with exit code {process.exitcode}"
    process.join()
    return outcome, message


def _send(function: Callable[[Path], Any], folder: Path, writer: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(SECONDS)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from esm2kit import InputError

    try:
        found = ("result", json.dumps(function(folder), default=str))
    except InputError as error:
        found = ("refused" if "\n" not in str(error) else "traceback", str(error))
    except BaseException:
        found = ("traceback", traceback.format_exc())
    writer.send(found)
    writer.close()
    os._exit(0)


def campaign(kinds: list[Kind], trials: int, seed: int, seconds: float = 1e9) -> Iterator[Trial]:
    """Run the trials, one kind after the other in turns.

    Args:
        kinds: which kinds.
        trials: trials of all kinds together.
        seed: of the damage.
        seconds: after this time no trial starts.
    """
    generator, began = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="damage_") as root:
        base, undamaged = {}, {}
        for kind in kinds:
            base[kind.name] = Path(root) / "base" / str(len(base))
            base[kind.name].mkdir(parents=True)
            built = in_clean_process(kind.build, base[kind.name])
            assert built[0] == "result", built[1]
        for number in range(trials):
            kind = kinds[number % len(kinds)]
            work = Path(root) / "work"
            if kind.name not in undamaged:
                shutil.copytree(base[kind.name], work)
                undamaged[kind.name] = in_clean_process(kind.use, work)
                shutil.rmtree(work)
                assert undamaged[kind.name][0] == "result", undamaged[kind.name][1]
            if time.monotonic() - began > seconds:
                return
            shutil.copytree(base[kind.name], work)
            files = sorted({path for pattern in kind.files for path in work.glob(pattern) if path.is_file()})
            path = generator.choice(files)
            done = damage(path, generator)
            outcome, message = in_clean_process(kind.use, work)
            if outcome == "result":
                outcome = "harmless" if message == undamaged[kind.name][1] else "different"
            yield Trial(kind.name, f"{path.relative_to(work)}: {done}", outcome, message)
            shutil.rmtree(work, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--kinds", nargs="*", help="parts of the kinds' names")
    parser.add_argument("--show", type=int, default=0, help="examples of tracebacks and different results per kind")
    arguments = parser.parse_args()
    kinds = [kind for kind in KINDS if not arguments.kinds or any(part in kind.name for part in arguments.kinds)]
    counts: Counter = Counter()
    bad: dict[str, list[Trial]] = {}
    for trial in campaign(kinds, arguments.trials, arguments.seed, arguments.seconds):
        counts[trial.kind, trial.outcome] += 1
        if trial.outcome in ("traceback", "different"):
            bad.setdefault(trial.kind, []).append(trial)
    print("| kind | " + " | ".join(OUTCOMES) + " |\n| --- | " + "--- | " * len(OUTCOMES))
    for kind in kinds:
        mark = "" if kind.checked else " (no checksum)"
        print(f"| {kind.name}{mark} | " + " | ".join(str(counts[kind.name, outcome]) for outcome in OUTCOMES) + " |")
    for name, trials in bad.items():
        for trial in trials[: arguments.show]:
            print(f"\n{name}: {trial.damage}: {trial.outcome}\n{trial.message[-700:]}")
    checked = {kind.name for kind in kinds if kind.checked}
    return int(any(trial.outcome == "traceback" or name in checked for name, found in bad.items() for trial in found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
