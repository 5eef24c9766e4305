"""The commands: each is a dataclass of parameters and a function from it to a result."""

from importlib import import_module
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """A command; what it names is imported when it is needed, and only `function` may import torch.

    Args:
        config: its dataclass of parameters, as `package.module.Name` of esm2kit.
        function: from that dataclass to a result, named in the same way.
        help: one line.
        bare: the parameter that may be given without its name.
        example: a whole call.
        trains: on several devices it is started once on each.
    """

    config: str
    function: str
    help: str
    bare: str
    example: str
    trains: bool = False


def import_object(name: str) -> Any:
    """What a stage names, such as `embedding.config.EmbedConfig`."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(f"esm2kit.{module}"), attribute)


STAGES = {
    "preprocess": Stage(
        "preprocessing.preprocess.PreprocessConfig", "preprocessing.preprocess.preprocess",
        "FASTA and clusters -> a memory-mapped dataset",
        "train_fasta", "esm2kit preprocess my.fasta --out_dir dataset --val_size 0.05",
    ),
    "pretrain": Stage(
        "pretraining.config.PretrainConfig", "pretraining.pretrain.pretrain",
        "dataset -> an ESM-2 checkpoint",
        "data", "esm2kit pretrain dataset --out_dir run --global_batch_size 32 --max_steps 1000", trains=True,
    ),
    "embed": Stage(
        "embedding.config.EmbedConfig", "embedding.embed.embed",
        "FASTA and a model -> embeddings in HDF5",
        "fasta", "esm2kit embed my.fasta --out_dir vectors --model esm2_t33_650M_UR50D --per_residue",
    ),
    "benchmark": Stage(
        "benchmarking.config.BenchmarkConfig", "benchmarking.benchmark.benchmark",
        "embeddings and a labelled task -> a report",
        "task", "esm2kit benchmark gb1 --model esm2_t12_35M_UR50D",
    ),
    "compare": Stage(
        "benchmarking.config.CompareConfig", "benchmarking.compare.compare",
        "two reports or more -> one page, with their differences",
        "reports", "esm2kit compare benchmark/esm2_t6_8M_UR50D/gb1 benchmark/esm2_t12_35M_UR50D/gb1",
    ),
    "finetune": Stage(
        "finetuning.config.FinetuneConfig", "finetuning.finetune.finetune",
        "a model and a task -> a model of labels",
        "task", "esm2kit finetune gb1 --model esm2_t12_35M_UR50D --mode lora --out_dir run", trains=True,
    ),
    "predict": Stage(
        "finetuning.config.PredictConfig", "finetuning.predict.predict",
        "a fine-tuned model and any FASTA -> labels",
        "fasta", "esm2kit predict my.fasta --model run --out predictions.tsv",
    ),
    "download": Stage(
        "cli.download.CatalogueConfig", "cli.download.catalogue",
        "list, fetch weights and tasks",
        "what", "esm2kit download esm2_t33_650M_UR50D",
    ),
    "export": Stage(
        "models.config.ExportConfig", "models.export.export",
        "a model -> Hugging Face or fair-esm files",
        "model", "esm2kit export run/checkpoints/last.safetensors --out my_esm2",
    ),
    "run": Stage(
        "notebook.runs.run.RunConfig", "notebook.runs.run.run",
        "the notebooks, headless, with one tier's parameters",
        "tier", "esm2kit run sample -p seed=1",
    ),
    "runs": Stage(
        "notebook.runs.run.RunsConfig", "notebook.runs.run.runs",
        "the runs there are; or two of them compared",
        "compare", "esm2kit runs sample-20260101-090000 sample-20260102-090000",
    ),
    "rerun": Stage(
        "notebook.runs.run.RerunConfig", "notebook.runs.run.rerun",
        "repeat a run and say which figures differ",
        "run", "esm2kit rerun sample-20260101-090000",
    ),
}  # fmt: skip
