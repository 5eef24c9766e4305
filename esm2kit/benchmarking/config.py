"""Parameters of `esm2kit benchmark` and `esm2kit compare`; without torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from esm2kit.benchmarking.probes.config import PresetName, ProbeName
from esm2kit.core.errors import InputError, check_choices, check_range
from esm2kit.tasks.task import Target


@dataclass(frozen=True)
class BenchmarkConfig:
    """Which embeddings to score, on which task, by which probe.

    Args:
        task: a FLIP task, or the name or path of a folder or file of your own in the same forms.
        tasks: several at once, separated by commas, or "all" of FLIP's to be had; each gets its folder in out_dir, by
            default benchmark/<model>, and a comparison page joins them. Replaces task.
        split: of the task; FLIP's default if not given.
        data_dir: folder of task folders: <data_dir>/<task>/<file>.
        download: fetch a FLIP task that data_dir lacks.
        target: class or value, for a task of your own whose targets could be both.
        model: what makes the embeddings: an official name, fair-esm .pt, Hugging Face folder or our checkpoint.
        embeddings: an existing _embeddings.h5 (one vector a protein) instead; model then names the untrained baseline.
        hiddens: an existing _hiddens.h5 (one vector a residue), for residue tasks and light attention.
        repr_layer: the layer that is embedded; -1 is the last.
        probe: ridge, logistic, fnn, cnn or light_attention; the preset's if not given.
        preset: a protocol: esm2kit, or bionemo, biotrainer-flip, schmirler, flip2021 to do as others did.
        epochs: of a network, instead of the preset's.
        seeds: of the networks, trained together.
        untrained: also probe the same architecture with random weights.
        baselines: names to compute instead of all that apply; an empty list for none.
        limit: proteins of each set at most, a stratified draw; null for all.
        resamples: bootstrap draws.
        seed: of the draw of `limit`.
        allow_missing: leave out proteins without embeddings instead of refusing.
        device: auto takes a GPU if there is one.
        out_dir: folder for report.json, report.html, predictions.npz and what a second run reuses;
            benchmark/<model>/<task> if not given, with -- for each / of a model's path. A report of other settings
            that is there moves to its `earlier`.
    """

    task: str = "secondary_structure"
    tasks: str | None = None
    split: str | None = None
    data_dir: Path = Path("flip")
    download: bool = True
    target: Target | None = None
    model: str | None = "esm2_t6_8M_UR50D"
    embeddings: Path | None = None
    hiddens: Path | None = None
    repr_layer: int = -1
    probe: ProbeName | None = None
    preset: PresetName = "esm2kit"
    epochs: int | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    untrained: bool = True
    baselines: list[str] | None = None
    limit: int | None = None
    resamples: int = 1000
    seed: int = 0
    allow_missing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out_dir: Path | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(
                f"seeds must be different numbers, at least one; found {self.seeds}",
                code="option.seeds",
                found=self.seeds,
            )
        check_range(self, "limit", "epochs", at_least=1, hint="leave it out for no limit")
        check_range(self, "resamples", at_least=100, hint="fewer give no 95% interval")


@dataclass(frozen=True)
class CompareConfig:
    """Reports side by side on one page, with an interval for the difference of any two scored on the same proteins.

    Args:
        reports: two report.json files or their folders, or more, of any tasks and models.
        out_dir: folder for comparison.json and comparison.html.
    """

    reports: list[Path]
    out_dir: Path = Path("comparison")
