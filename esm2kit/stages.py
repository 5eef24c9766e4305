"""The commands: each is a dataclass of parameters and a function from it to a result."""

from typing import NamedTuple


class Stage(NamedTuple):
    """Where a command lives; imported when it is asked for, so that help is instant."""

    module: str
    config: str
    function: str
    help: str
    trains: bool = False
    positional: str = ""


STAGES = {
    "preprocess": Stage(
        "preprocess", "PreprocessConfig", "preprocess", "FASTA and clusters -> a memory-mapped dataset"
    ),
    "pretrain": Stage("pretrain", "PretrainConfig", "pretrain", "dataset -> an ESM-2 checkpoint", trains=True),
    "embed": Stage("embed", "EmbedConfig", "embed", "FASTA and a model -> embeddings in HDF5"),
    "benchmark": Stage("benchmark", "BenchmarkConfig", "benchmark", "embeddings and a labelled task -> a report"),
    "finetune": Stage("finetune", "FinetuneConfig", "finetune", "a model and a task -> a model of labels", trains=True),
    "predict": Stage("predict", "PredictConfig", "predict", "a fine-tuned model and any FASTA -> labels"),
    "download": Stage("catalogue", "CatalogueConfig", "catalogue", "list, fetch weights and tasks", positional="what"),
    "export": Stage("export", "ExportConfig", "export", "a model -> Hugging Face or fair-esm files"),
    "run": Stage("runs", "RunConfig", "run", "the notebooks, headless, with one tier's parameters"),
    "runs": Stage("runs", "RunsConfig", "runs", "the runs there are; or two of them compared", positional="compare"),
    "rerun": Stage("runs", "RerunConfig", "rerun", "repeat a run and say which figures differ", positional="run"),
}
