"""Train, use and judge ESM-2 protein language models.

The names in `__all__` are the public API; everything else is internal and may change. A name is imported when it is
first used, so `import esm2kit` does not wait for torch.
"""

import os
from importlib import import_module
from typing import Any

# OpenMP's threads spin while they wait for each other. On a machine that is busy otherwise that cost training eight
# tenths of its speed and more; waiting asleep cost nothing that could be measured. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# module -> the public names that live there
_PUBLIC = {
    "core.errors": ("InputError",),
    "core.provenance": ("versions",),
    "sequences.alphabet": ("STANDARD_RESIDUES",),
    "sequences.fasta": ("read_fasta",),
    "sequences.store": ("SequenceStore",),
    "sequences.clusters": ("ClusterIndex",),
    "models.config": ("ESM2Config", "ExportConfig", "SIZES"),
    "models.esm2": ("ESM2", "Packed"),
    "models.encoder": ("Encoder",),
    "models.load": ("load_model",),
    "models.export": ("export",),
    "training.layout": ("BatchLayout",),
    "tasks.data": ("TaskData", "load_task"),
    "preprocessing.preprocess": ("PreprocessConfig", "preprocess"),
    "pretraining.config": ("PretrainConfig",),
    "pretraining.pretrain": ("pretrain",),
    "embedding.config": ("EmbedConfig",),
    "embedding.embed": ("embed",),
    "embedding.hdf5": ("EmbeddingReader",),
    "benchmarking.config": ("BenchmarkConfig", "CompareConfig"),
    "benchmarking.benchmark": ("benchmark",),
    "benchmarking.compare": ("compare",),
    "benchmarking.probes.features": ("Features", "ProbeTargets"),
    "benchmarking.probes.config": ("ProbeConfig",),
    "benchmarking.probes.fit": ("fit_probe",),
    "finetuning.config": ("FinetuneConfig", "PredictConfig"),
    "finetuning.finetune": ("finetune",),
    "finetuning.model_file": ("load_finetuned",),
    "finetuning.predict": ("predict",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'esm2kit' has no attribute {name!r}")
    value = getattr(import_module(f"esm2kit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
