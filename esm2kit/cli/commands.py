"""The stages of the command line: each has a dataclass of parameters and a function that runs it."""

from importlib import import_module
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """A command. Its objects are imported when they are used; only `function` may import torch.

    Args:
        config: Path of the dataclass of parameters within esm2kit, as `package.module.Name`.
        function: Path of the function that takes the dataclass and returns a result.
        help: One line for `esm2kit --help`.
        positional: The parameter that can be given without its name.
        example: A complete command.
        trains: Whether torchrun starts the command once per device.
    """

    config: str
    function: str
    help: str
    positional: str
    example: str
    trains: bool = False


def import_object(name: str) -> Any:
    """Import an object of esm2kit by its path, such as `embedding.config.EmbedConfig`."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(f"esm2kit.{module}"), attribute)


STAGES = {
    "preprocess": Stage(
        "preprocessing.config.PreprocessConfig", "preprocessing.preprocess.preprocess",
        "Build a training dataset from FASTA files and clusters.",
        "train_fasta", "esm2kit preprocess my.fasta --out_dir dataset --val_size 0.05",
    ),
    "pretrain": Stage(
        "pretraining.config.PretrainConfig", "pretraining.pretrain.pretrain",
        "Pretrain an ESM-2 model on a dataset.",
        "data", "esm2kit pretrain dataset --out_dir run --global_batch_size 32 --max_steps 1000", trains=True,
    ),
    "embed": Stage(
        "embedding.config.EmbedConfig", "embedding.embed.embed",
        "Embed proteins with a model and write HDF5 files.",
        "fasta", "esm2kit embed my.fasta --out_dir vectors --model esm2_t33_650M_UR50D --per_residue",
    ),
    "map": Stage(
        "embedding.config.MapConfig", "embedding.draw_map.draw_map",
        "Draw proteins as a map of their embeddings, coloured by a measurement.",
        "fasta", "esm2kit map my.fasta --labels measurements.csv --model 35M",
    ),
    "neighbours": Stage(
        "embedding.config.NeighboursConfig", "embedding.neighbours.find_neighbours",
        "Find the most similar reference proteins, and transfer their labels.",
        "fasta", "esm2kit neighbours my.fasta --reference known.fasta --labels classes.csv --model 35M",
    ),
    "contacts": Stage(
        "structure.config.ContactsConfig", "structure.contacts.predict_contacts",
        "Predict which residues are in contact, and compare with structures.",
        "fasta", "esm2kit contacts my.fasta --model 35M --structures pdb",
    ),
    "score": Stage(
        "scoring.config.ScoreConfig", "scoring.score.score",
        "Score mutations or whole proteins with a model, without labels.",
        "fasta", "esm2kit score my.fasta --mutations A42G,A42G:K50R --model 35M",
    ),
    "convert": Stage(
        "embedding.config.ConvertConfig", "embedding.convert.convert",
        "Write embeddings as NPY, CSV, Parquet or AnnData.",
        "embeddings", "esm2kit convert vectors/my_embeddings.h5 --format parquet",
    ),
    "split": Stage(
        "splitting.config.SplitConfig", "splitting.split.split_proteins",
        "Divide proteins into sets or folds by sequence identity, with a leakage report.",
        "fasta", "esm2kit split my.fasta --labels measurements.csv",
    ),
    "benchmark": Stage(
        "benchmarking.config.BenchmarkConfig", "benchmarking.benchmark.benchmark",
        "Evaluate a model's embeddings on a labelled task.",
        "task", "esm2kit benchmark gb1 --model esm2_t12_35M_UR50D",
    ),
    "compare": Stage(
        "benchmarking.config.CompareConfig", "benchmarking.compare.compare",
        "Compare two or more benchmark reports on one page.",
        "reports", "esm2kit compare benchmark/esm2_t6_8M_UR50D/gb1 benchmark/esm2_t12_35M_UR50D/gb1",
    ),
    "finetune": Stage(
        "finetuning.config.FinetuneConfig", "finetuning.finetune.finetune",
        "Fine-tune a model on a labelled task.",
        "task", "esm2kit finetune gb1 --model esm2_t12_35M_UR50D --mode lora --out_dir run", trains=True,
    ),
    "predict": Stage(
        "finetuning.config.PredictConfig", "finetuning.predict.predict",
        "Predict labels with a fine-tuned model or a probe.",
        "fasta", "esm2kit predict my.fasta --model run --out predictions.tsv",
    ),
    "download": Stage(
        "cli.download.CatalogueConfig", "cli.download.list_or_download",
        "List or download model weights and FLIP tasks.",
        "what", "esm2kit download esm2_t33_650M_UR50D",
    ),
    "verify": Stage(
        "verification.config.VerifyConfig", "verification.verify.verify",
        "Check the official weights and their outputs against published values.",
        "model", "esm2kit verify esm2_t33_650M_UR50D",
    ),
    "export": Stage(
        "models.config.ExportConfig", "models.export.export",
        "Convert a model to Hugging Face or fair-esm files.",
        "model", "esm2kit export run/checkpoints/last.safetensors --out my_esm2",
    ),
    "check": Stage(
        "cli.check.CheckConfig", "cli.check.check",
        "Check datasets, checkpoints, embeddings and reports for damage.",
        "path", "esm2kit check vectors",
    ),
    "notebooks": Stage(
        "cli.notebooks.NotebooksConfig", "cli.notebooks.copy_notebooks",
        "Copy the notebooks, the sample data and the tiers to a folder.",
        "out_dir", "esm2kit notebooks my_esm2",
    ),
    "completion": Stage(
        "cli.completion.CompletionConfig", "cli.completion.print_completion",
        "Print a script that completes commands in bash or zsh.",
        "shell", "esm2kit completion bash",
    ),
    "run": Stage(
        "notebook.runs.run.RunConfig", "notebook.runs.run.run",
        "Execute the notebooks with the parameters of a tier.",
        "tier", "esm2kit run sample -p seed=1",
    ),
    "runs": Stage(
        "notebook.runs.run.RunsConfig", "notebook.runs.run.runs",
        "List notebook runs, or compare two of them.",
        "compare", "esm2kit runs sample-20260101-090000 sample-20260102-090000",
    ),
    "rerun": Stage(
        "notebook.runs.run.RerunConfig", "notebook.runs.run.rerun",
        "Repeat a notebook run and report which numbers differ.",
        "run", "esm2kit rerun sample-20260101-090000",
    ),
}  # fmt: skip
