"""Parameters of `esm2kit benchmark` and `esm2kit compare`. This module does not import torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from esm2kit.benchmarking.probes.config import PresetName, ProbeName
from esm2kit.core.errors import InputError, check_choices, check_range
from esm2kit.core.files import check_output_folder
from esm2kit.core.options import OptionGroups
from esm2kit.core.paths import expand_paths
from esm2kit.embedding.config import POOLINGS, check_poolings
from esm2kit.models.config import check_model_name, complete_model_names
from esm2kit.tasks.config import TaskConfig, check_task
from esm2kit.tasks.task import CLUSTER, PairFeatures

ATTENTION = "attention"  # the pooling that is trained with the probe


def parse_layers(found: int | str) -> list[int] | None:
    """Parse the layers of a benchmark.

    Args:
        found: a number, numbers that are separated by commas, or all.

    Returns:
        The numbers; None for all layers of the model.

    Raises:
        InputError: it is none of them.
    """
    if isinstance(found, str) and found.strip() == "all":
        return None
    try:
        return [int(part) for part in str(found).split(",")]
    except ValueError:
        raise InputError(
            f"repr_layer cannot be {found!r}. Use a number, numbers that are separated by commas, or all.",
            code="option.layers",
            found=found,
        ) from None


@dataclass(frozen=True)
class BenchmarkConfig(TaskConfig):
    """Score embeddings on a labelled task with a probe, an untrained model and simple baselines.

    Args:
        tasks: Several tasks separated by commas, or "all" for every available FLIP task. Replaces task. Each task
            gets a folder in out_dir, and a comparison page covers all of them.
        model: Model that computes the embeddings: an official name or its short form such as 8M, a fair-esm .pt file, a
            Hugging Face folder or an esm2kit checkpoint.
        embeddings: Existing _embeddings.h5 file (one vector per protein) to use instead of embedding. Set model to
            the model that computed it, so that the untrained baseline has the same architecture.
        hiddens: Existing _hiddens.h5 file (one vector per residue), for residue tasks and light attention.
        repr_layer: Layer whose representations are used; -1 is the last. Of several (0,3,6) or all, the one with the
            best score on validation is used.
        pooling: How the residue vectors of a protein become one: mean, max, bos, mean+max, or attention, whose weights
            are trained with the probe. Of several, the one with the best score on validation is used. Default: mean.
        probe: Model trained on the embeddings: ridge, logistic, fnn, cnn, light_attention or attention. Default: the
            preset's probe for the task.
        preset: Probing protocol: esm2kit's, or a published one (bionemo, biotrainer-flip, schmirler, flip2021).
        epochs: Training epochs of a neural probe. Default: the preset's.
        joint: Train one probe on all columns of target, and score them together. Default: one benchmark per column.
        pair_features: For pairs of proteins, how the vectors of both become one: symmetric (sum, absolute difference
            and product, the same for both orders) or concat, for ordered pairs.
        seeds: Seeds of the neural probes. One probe is trained per seed, all in one pass.
        untrained: Also probe the same architecture with random weights.
        baselines: Baselines to compute, or none. Default: all that apply to the task.
        limit: Maximum number of proteins per set, in a stratified sample. Default: all proteins.
        folds: Number of folds for cross-validation, for tasks with few proteins: each protein is predicted by a probe
            that was trained without its fold. Or the column with the folds. Default: the sets of the task.
        repeats: How often the proteins are divided into folds; the scores are means over repeats.
        group_by: What is never divided between folds: cluster (similar sequences, at least identity), or a column with
            groups. Default: clusters, unless split_by is random or there are too few of them.
        resamples: Bootstrap replicates for the confidence intervals.
        coverage: Share of new values that the prediction intervals of the report should contain.
        seed: Seed of the sample that limit takes.
        allow_missing: Skip proteins that have no embedding instead of stopping.
        device: Device for the model and the neural probes. auto uses a GPU if one is available.
        out_dir: Folder for report.json, report.html, predictions.npz and intermediate results. Default:
            benchmark/<model>/<task>, with a short name of the model. An existing report with other settings is moved to
            the subfolder earlier.
    """

    tasks: str | None = None
    model: str | None = "esm2_t6_8M_UR50D"
    embeddings: Path | None = None
    hiddens: Path | None = None
    repr_layer: int | str = -1
    pooling: list[str] | None = None
    probe: ProbeName | None = None
    preset: PresetName = "esm2kit"
    epochs: int | None = None
    joint: bool = False
    pair_features: PairFeatures = "symmetric"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    untrained: bool = True
    baselines: list[str] | None = None
    limit: int | None = None
    folds: int | str | None = None
    repeats: int = 1
    group_by: str | None = None
    resamples: int = 1000
    coverage: float = 0.9
    seed: int = 0
    allow_missing: bool = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    out_dir: Path | None = None

    option_groups = OptionGroups(
        usual="task model out_dir probe baselines untrained limit",
        data="tasks joint pair_features embeddings hiddens allow_missing seed",
        probing="preset repr_layer pooling epochs seeds",
        evaluation="folds repeats group_by resamples coverage",
        hardware="device",
    )

    def __post_init__(self) -> None:
        expand_paths(self)
        complete_model_names(self, "model")
        check_choices(self)
        check_task(self)
        self._check_layers_and_pooling()
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(
                f"seeds must be one or more different integers, found {self.seeds}",
                code="option.seeds",
                found=self.seeds,
            )
        check_range(self, "limit", "epochs", at_least=1, hint="omit it for no limit")
        check_range(self, "resamples", at_least=100, hint="fewer replicates give no 95% interval")
        check_range(self, "coverage", above=0, below=1)
        self._check_folds()

    def _check_folds(self) -> None:
        """Check the options of cross-validation."""
        check_range(self, "repeats", at_least=1)
        if isinstance(self.folds, int):
            check_range(self, "folds", at_least=2)
        given = [name for name in ("repeats", "group_by") if getattr(self, name) not in (1, None)]
        if self.folds is None and given:
            raise InputError(
                f"{given[0]} {getattr(self, given[0])} is given without folds. Set folds to a number or to a column, "
                f"or omit {given[0]}.",
                code="option.folds",
                option=given[0],
            )
        if isinstance(self.folds, str) and self.repeats > 1:
            raise InputError(
                f"the folds of column {self.folds!r} cannot be repeated {self.repeats} times. Omit repeats, or set "
                "folds to a number.",
                code="option.folds",
                option="repeats",
            )

    @property
    def fold_columns(self) -> list[str]:
        """Columns that are read as folds or groups."""
        found = [self.folds, self.group_by]
        return [name for name in found if isinstance(name, str) and name != CLUSTER]

    @property
    def sweeps(self) -> bool:
        """Whether validation chooses among several layers or poolings."""
        layers = parse_layers(self.repr_layer)
        return layers is None or len(layers) > 1 or len(self.pooling or ()) > 1

    def _check_layers_and_pooling(self) -> None:
        """Check the layers, and that the pooling fits the probe and the existing vectors."""
        parse_layers(self.repr_layer)
        given = self.embeddings or self.hiddens
        if given is not None and (self.sweeps or self.pooling not in (None, [ATTENTION])):
            option = "pooling" if self.pooling else "repr_layer"
            raise InputError(
                f"{given} has one layer and one pooling, so {option} {getattr(self, option)} cannot be chosen. Omit "
                f"the file, or omit {option}.",
                code="sweep.embedded",
                path=given,
                option=option,
            )
        if self.model is None and self.sweeps:
            raise InputError(
                "several layers or poolings are requested without a model. Specify model.", code="benchmark.no-source"
            )
        if self.pooling is None:
            return
        check_poolings(self.pooling, (*POOLINGS, ATTENTION))
        own = self.probe in ("cnn", "light_attention") or (self.probe == ATTENTION and self.pooling != [ATTENTION])
        if own or (ATTENTION in self.pooling and self.probe in ("ridge", "logistic")):
            fix = "Omit pooling." if own else "Omit probe, or choose fnn."
            reads = "reads the vectors of all residues" if own else "cannot train the weights of attention"
            raise InputError(
                f"probe {self.probe} {reads}, so pooling {', '.join(self.pooling)} does not fit it. {fix}",
                code="pooling.probe",
                probe=self.probe,
                pooling=self.pooling,
            )

    def check_inputs(self) -> None:
        """Check what can be checked before torch is imported: the name of the model.

        Raises:
            InputError: The model does not exist.
        """
        embedded = self.embeddings is not None or self.hiddens is not None
        if self.model is not None and (self.untrained or not embedded):
            check_model_name(self.model)


@dataclass(frozen=True)
class CompareConfig:
    """Compare reports on one page, with a confidence interval for each pair scored on the same proteins.

    Args:
        reports: Two or more report.json files, or their folders, of any tasks and models.
        out_dir: Folder for comparison.json and comparison.html.
    """

    reports: list[Path]
    out_dir: Path = Path("comparison")

    option_groups = OptionGroups(usual="reports out_dir")

    def __post_init__(self) -> None:
        expand_paths(self)

    def check_inputs(self) -> None:
        """Check what can be checked before torch is imported: the output folder, and that the reports can be read.

        Raises:
            InputError: The folder cannot be written to, or a report does not exist or is damaged.
        """
        check_output_folder(self.out_dir)
        from esm2kit.benchmarking.report import Report

        for path in self.reports:
            Report.read(path)
