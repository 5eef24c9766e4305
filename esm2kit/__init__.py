"""Train, use and evaluate ESM-2 protein language models.

The names in `__all__` are the public API. Everything else is internal and may change. Each public name is imported when
it is first used, so `import esm2kit` does not load torch.
"""

import os

from esm2kit.core.lazy import attach

# By default OpenMP threads spin while they wait for each other. On a busy machine this slowed training down by 80% or
# more; with PASSIVE they sleep, which had no measurable cost. torch reads this variable when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# module -> its public names; a module without names is itself public
_PUBLIC = {
    "core.errors": ("InputError",),
    "core.hardware": ("matmul_rate",),
    "core.provenance": ("versions",),
    "core.rng": ("permutation",),
    "sequences.alphabet": ("STANDARD_RESIDUES",),
    "sequences.fasta": ("read_fasta",),
    "sequences.store": ("SequenceStore",),
    "sequences.clusters": ("ClusterIndex", "draw_sample"),
    "models.config": ("ESM2Config", "ExportConfig", "SIZES"),
    "models.esm2": ("ESM2", "Packed"),
    "models.encoder": ("Encoder",),
    "models.load": ("load_model",),
    "models.contacts": ("pair_map",),
    "models.masked_scores": ("guess_residues", "residue_odds"),
    "models.export": ("export",),
    "training.layout": ("BatchLayout",),
    "tasks.data": ("load_labels", "load_task"),
    "tasks.task_data": ("TaskData",),
    "tasks.columns": ("read_columns",),
    "preprocessing.config": ("PreprocessConfig",),
    "preprocessing.preprocess": ("preprocess",),
    "pretraining.config": ("PretrainConfig", "lr_at"),
    "pretraining.data": ("GlobalBatches", "Masking"),
    "pretraining.pretrain": ("pretrain",),
    "pretraining.training_set": ("TrainingSet",),
    "embedding.config": ("ConvertConfig", "EmbedConfig", "MapConfig", "NeighboursConfig"),
    "embedding.convert": ("convert",),
    "embedding.embed": ("embed",),
    "embedding.hdf5": ("EmbeddingReader",),
    "embedding.maps": (),
    "embedding.draw_map": ("describe_map", "draw_map", "plot_map"),
    "embedding.neighbours": ("Neighbours", "find_neighbours"),
    "structure.config": ("ContactsConfig",),
    "structure.contacts": ("predict_contacts",),
    "structure.contact_file": ("ContactReader",),
    "sequences.structures": ("read_structure", "write_b_factors"),
    "scoring.config": ("ScoreConfig",),
    "scoring.score": ("score",),
    "scoring.scores": ("Scores",),
    "splitting.config": ("SplitConfig",),
    "splitting.split": ("ProteinSplit", "split_proteins"),
    "benchmarking.config": ("BenchmarkConfig", "CompareConfig"),
    "benchmarking.benchmark": ("benchmark",),
    "benchmarking.compare": ("compare",),
    "benchmarking.report": ("Report",),
    "benchmarking.probes.features": ("Features", "ProbeTargets"),
    "benchmarking.probes.config": ("ProbeConfig",),
    "benchmarking.probes.fit": ("fit_probe",),
    "finetuning.config": ("FinetuneConfig", "PredictConfig"),
    "finetuning.finetune": ("finetune",),
    "finetuning.model_file": ("load_finetuned",),
    "finetuning.predict": ("predict",),
    "verification.config": ("VerifyConfig",),
    "verification.verify": ("verify",),
    "plots": (),
}
__getattr__, __dir__, __all__ = attach(__name__, _PUBLIC)
