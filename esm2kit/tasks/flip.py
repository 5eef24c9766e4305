"""The eight FLIP tasks: their labels, files, metrics, splits and citations.

Source: https://github.com/J-SNACKKB/FLIP, the readme of each task. The set sizes were counted in the files.
"""

from esm2kit.core.errors import InputError
from esm2kit.tasks.task import Split, Task

FLIP_CITATION = (
    "Dallago et al. 2021, FLIP: Benchmark tasks in fitness landscape inference for proteins, NeurIPS Datasets"
)


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
            note="FLIP's test set before 2022-12, 648 proteins; the server now has 364 (secondary_structure)",
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
            note="1 is most variable, 9 most conserved; 41 sequences have no labels and are omitted",
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
            note="a class encodes three bits (small 4, nucleic 2, metal 1); 90% of residues bind nothing: use macro-F1",
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


def find_split(task: Task, split: str | None) -> str:
    """Check the name of a split.

    Args:
        task: a FLIP task.
        split: name of the split. None selects the task's default.

    Returns:
        The name of the split.

    Raises:
        InputError: the task has no such split.
    """
    if split is None:
        return task.default_split
    if split not in task.splits:
        raise InputError(
            f"task {task.name} has no split {split!r}. Choose one of {', '.join(task.splits)}.",
            code="task.no-split",
            task=task.name,
            split=split,
            allowed=tuple(task.splits),
        )
    return split
