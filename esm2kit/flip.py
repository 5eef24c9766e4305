"""The eight FLIP tasks: what is predicted, from which files, how it is scored, and what others have published.

Source: https://github.com/J-SNACKKB/FLIP, the readme of every task; sizes counted in the files themselves.
"""

from dataclasses import dataclass
from typing import Literal

from esm2kit.errors import InputError

Level = Literal["residue", "protein"]
Target = Literal["class", "value"]

LICENCE = "AFL-3.0 (FLIP's splits)"
FLIP_CITATION = (
    "Dallago et al. 2021, FLIP: Benchmark tasks in fitness landscape inference for proteins, NeurIPS Datasets"
)
# FLIP's semaphore: green compares models; orange overestimates or repeats another split; red is obsolete.
TrafficLight = Literal["green", "orange", "red"]


@dataclass(frozen=True)
class Split:
    """One way to divide a task's proteins.

    Args:
        train: proteins to fit on, validation ones not counted; None where this project has not counted them.
        validation: proteins to select and stop on.
        test: proteins that are scored once.
        light: FLIP's traffic light for the split.
        note: what a reader of a score must know.
    """

    train: int | None = None
    validation: int | None = None
    test: int | None = None
    light: TrafficLight = "green"
    note: str = ""


@dataclass(frozen=True)
class Task:
    """One benchmark task.

    Args:
        name: FLIP's name, or the user's folder.
        level: one target a residue, or one a protein.
        target: a class or a value.
        metric: the headline metric; every other one is reported too.
        labels: the classes in order, empty for a value.
        splits: name -> Split.
        default_split: the one the esm2nv readme uses.
        files: beside `<split>.fasta`, what a residue task needs.
        folder: FLIP's folder on the server, where it is not the task's name.
        unit: of a value.
        binary_labels: names of the bits of an integer class, lowest first; each is scored as a label of its own.
        aliases: other spellings of a label -> label.
        variants: every protein is a variant of one wild type, so that nearest neighbours make sense.
        citation: of the data.
        licence: of the split files.
        note: what a reader of a score must know.
    """

    name: str
    level: Level
    target: Target
    metric: str
    splits: dict[str, Split]
    default_split: str
    labels: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    folder: str = ""
    unit: str = ""
    binary_labels: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    variants: bool = False
    citation: str = ""
    licence: str = LICENCE
    note: str = ""

    @property
    def num_outputs(self) -> int:
        """Numbers a probe puts out per protein or residue."""
        if self.target == "value":
            return 1
        return len(self.binary_labels) or len(self.labels)

    def label_index(self) -> dict[str, int]:
        """Every accepted spelling of a label -> its class."""
        index = {label: place for place, label in enumerate(self.labels)}
        return index | {alias: index[label] for alias, label in self.aliases}


SECONDARY_STRUCTURE = (
    "Klausen et al. 2019 (NetSurfP-2.0), 10.1002/prot.25674; "
    "Elnaggar et al. 2021 (ProtTrans), 10.1109/TPAMI.2021.3095381"
)
VARIANT_EFFECT = "Marquet et al. 2021, 10.1007/s00439-021-02411-y"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="secondary_structure",
            level="residue",
            target="class",
            metric="accuracy",
            labels=("H", "E", "C"),
            splits={"sampled": Split(9712, 1080, 364)},
            default_split="sampled",
            files=("sequences.fasta", "mask.fasta"),
            citation=SECONDARY_STRUCTURE,
            note="FLIP's current test set, 364 proteins; papers before 2022-12 used 648 (secondary_structure_648)",
        ),
        Task(
            name="secondary_structure_648",
            level="residue",
            target="class",
            metric="accuracy",
            labels=("H", "E", "C"),
            splits={"sampled": Split(9712, 1080, 648)},
            default_split="sampled",
            files=("sequences.fasta", "resolved.fasta"),
            folder="secondary_structure",
            citation=SECONDARY_STRUCTURE,
            note="FLIP's test set before 2022-12, 648 proteins; the server now ships 364 (secondary_structure)",
        ),
        Task(
            name="conservation",
            level="residue",
            target="class",
            metric="accuracy",
            labels=tuple("123456789"),
            splits={"sampled": Split(9392, 555, 519)},
            default_split="sampled",
            files=("sequences.fasta",),
            citation=VARIANT_EFFECT,
            note="1 is very variable, 9 very conserved; 41 sequences carry no labels and are left out",
        ),
        Task(
            name="bind",
            level="residue",
            target="class",
            metric="macro_f1",
            labels=tuple("01234567"),
            binary_labels=("metal", "nucleic", "small"),
            splits={
                "from_publication": Split(954, 106, 300),
                "one_vs_many": Split(996, 114, 250),
                "two_vs_many": Split(1201, 140, 19, note="19 test proteins: read the interval"),
                "one_vs_sm": Split(999, 111, 134),
                "one_vs_mn": Split(254, 31, 32, note="32 test proteins: read the interval"),
                "one_vs_sn": Split(254, 31, 53, note="53 test proteins: read the interval"),
            },
            default_split="from_publication",
            files=("sequences.fasta",),
            citation="Littmann et al. 2021, 10.1038/s41598-021-03431-4",
            note="a class is three bits (small 4, nucleic 2, metal 1); nine of ten residues bind nothing: see macro-F1",
        ),
        Task(
            name="scl",
            level="protein",
            target="class",
            metric="accuracy",
            labels=(
                "Cell_membrane", "Cytoplasm", "Endoplasmic_reticulum", "Extracellular", "Golgi_apparatus",
                "Lysosome/Vacuole", "Mitochondrion", "Nucleus", "Peroxisome", "Plastid",
            ),
            aliases=(("Lysosome", "Lysosome/Vacuole"), ("Lysosome_Vacuole", "Lysosome/Vacuole")),
            splits={
                "mixed_soft": Split(9503, 1678, 2768),
                "mixed_hard": Split(9503, 1678, 490),
                "human_soft": Split(test=577),
                "human_hard": Split(test=119, note="119 test proteins: read the interval"),
                "balanced": Split(test=385),
            },
            default_split="mixed_soft",
            citation="Staerk et al. 2021, 10.1093/bioadv/vbab035; DeepLoc, 10.1093/bioinformatics/btx431",
        ),
        Task(
            name="sav",
            level="protein",
            target="class",
            metric="macro_f1",
            labels=("neutral", "effect"),
            splits={
                "mixed": Split(note="wild types of test proteins are in train"),
                "human": Split(note="wild types of test proteins are in train"),
                "only_savs": Split(),
            },
            default_split="mixed",
            citation=f"{VARIANT_EFFECT}; Hecht et al. 2015, 10.1186/1471-2164-16-S8-S1",
            note="109,449 rows in mixed; a protein's variants share almost all of their sequence",
        ),
        Task(
            name="meltome",
            level="protein",
            target="value",
            metric="spearman",
            unit="deg C",
            splits={
                "mixed_split": Split(22335, 2482, 3134),
                "human": Split(test=1945),
                "human_cell": Split(test=1366),
            },
            default_split="mixed_split",
            citation="Jarzab et al. 2020 (Meltome atlas), 10.1038/s41592-020-0801-4",
        ),
        Task(
            name="gb1",
            level="protein",
            target="value",
            metric="spearman",
            unit="fitness relative to the wild type",
            variants=True,
            splits={
                "one_vs_rest": Split(25, 3, 8705, note="3 validation proteins: selection is close to chance"),
                "two_vs_rest": Split(381, 43, 8309),
                "three_vs_rest": Split(2691, 299, 5743),
                "low_vs_high": Split(4580, 509, 3644),
                "sampled": Split(6289, 699, 1745, light="orange", note="random split: overestimates"),
            },
            default_split="two_vs_rest",
            citation="Wu et al. 2016, 10.7554/eLife.16965",
        ),
        Task(
            name="aav",
            level="protein",
            target="value",
            metric="spearman",
            unit="selection score GAS1_virus_S",
            variants=True,
            splits={
                "des_mut": Split(181283, 20143, 82583),
                "mut_des": Split(74324, 8259, 201426),
                "one_vs_many": Split(1053, 117, 81413),
                "two_vs_many": Split(28626, 3181, 50776),
                "seven_vs_many": Split(63001, 7001, 12581),
                "low_vs_high": Split(42791, 4755, 35037),
                "sampled": Split(59459, 6607, 16517, light="orange", note="random split: overestimates"),
            },
            default_split="seven_vs_many",
            citation="Bryant et al. 2021, 10.1038/s41587-020-00793-4",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A figure somebody else printed, and why ours may differ from it.

    Args:
        task: FLIP's name.
        split: of that task.
        metric: as esm2kit names it.
        value: the figure.
        model: the embeddings or the recipe.
        source: where it was printed.
        difference: what they did that this report may not have done.
    """

    task: str
    split: str
    metric: str
    value: float
    model: str
    source: str
    difference: str


MODELS = {size: f"esm2_t{layers}_{size}_UR50D" for layers, size in ((6, "8M"), (12, "35M"), (30, "150M"), (33, "650M"))}
MODELS["3B"] = "esm2_t36_3B_UR50D"
NVIDIA = (
    "NVIDIA's model card of esm2nv",
    "one run of one head on checkpoints NVIDIA converted; no interval, no baseline",
)
SCHMIRLER = (
    "Schmirler et al. 2024, 10.1038/s41467-024-51844-2",
    "mean of five runs of a 32-wide dense head on the frozen model (preset `schmirler`)",
)
FLIP2021 = (FLIP_CITATION, "one-hot recipe, no language model (preset `flip2021`)")
SCHMIRLER_FINETUNED = (SCHMIRLER[0], "the encoder was fine-tuned, not only probed")


def _published() -> tuple[Published, ...]:
    figures: list[Published] = []
    for size, ss3, conservation, meltome, gb1 in (("650M", 0.852, 0.332, 7.19, 1.29), ("3B", 0.857, 0.345, 6.68, 1.28)):
        figures += [
            Published("secondary_structure_648", "sampled", "accuracy", ss3, MODELS[size], *NVIDIA),
            Published("conservation", "sampled", "accuracy", conservation, MODELS[size], *NVIDIA),
            Published("meltome", "mixed_split", "rmse", meltome, MODELS[size], *NVIDIA),
            Published(
                "gb1", "two_vs_rest", "rmse", gb1, MODELS[size], NVIDIA[0],
                f"{NVIDIA[1]}; predicting the training mean gives 1.252, so this figure shows no information",
            ),
        ]  # fmt: skip
    columns = (
        ("gb1", "three_vs_rest", "spearman"),
        ("aav", "two_vs_many", "spearman"),
        ("meltome", "mixed_split", "spearman"),
        ("scl", "mixed_hard", "accuracy"),
        ("secondary_structure", "sampled", "accuracy"),
    )
    table = (
        (MODELS["8M"], SCHMIRLER, (0.818, 0.669, 0.564, 0.520, 0.753)),
        (MODELS["35M"], SCHMIRLER, (0.827, 0.590, 0.586, 0.549, 0.782)),
        (MODELS["150M"], SCHMIRLER, (0.833, 0.657, 0.617, 0.594, 0.822)),
        (MODELS["650M"], SCHMIRLER, (0.857, 0.471, 0.656, 0.629, 0.847)),
        (f"{MODELS['8M']}, fine-tuned", SCHMIRLER_FINETUNED, (0.883, 0.827, 0.584, 0.559, 0.761)),
        (f"{MODELS['650M']}, fine-tuned", SCHMIRLER_FINETUNED, (0.879, 0.783, 0.664, 0.638, 0.855)),
        ("8M from random weights, fine-tuned", SCHMIRLER_FINETUNED, (0.857, 0.708, 0.527, 0.470, 0.708)),
    )
    for model, source, values in table:
        figures += [Published(*column, value, model, *source) for column, value in zip(columns, values, strict=True)]
    for split, spearman in (("one_vs_rest", 0.279), ("two_vs_rest", 0.594), ("three_vs_rest", 0.755)):
        figures.append(Published("gb1", split, "spearman", spearman, "one-hot ridge", *FLIP2021))
    return tuple(figures)


PUBLISHED = _published()


def find_split(task: Task, split: str | None) -> str:
    """The split's name, the task's default for None.

    Raises: InputError listing the splits there are.
    """
    if split is None:
        return task.default_split
    if split not in task.splits:
        raise InputError(f"task {task.name} has no split {split!r}: choose one of {', '.join(task.splits)}")
    return split
