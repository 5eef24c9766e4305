"""`esm2kit split`: read proteins, divide them or take the sets that they have, and write the table and the report."""

import csv
import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2kit.core.checksums import FileChecksums, read_sealed_manifest, write_sealed_json
from esm2kit.core.errors import InputError, check_type
from esm2kit.core.files import atomic_path, check_output_folder, hold_lock, sha256_file, to_json
from esm2kit.core.numbers import format_count
from esm2kit.core.provenance import build_provenance
from esm2kit.pages import format_sentence
from esm2kit.sequences.fasta import find_fasta_files
from esm2kit.sequences.pipes import is_pipe
from esm2kit.sequences.similarity import SetCheck, group_by_identity
from esm2kit.splitting.config import PAIR_FRACTIONS, SplitConfig
from esm2kit.splitting.leakage import (
    MAX_MEASURED,
    MAX_RANDOM,
    describe_duplicates,
    describe_groups,
    describe_labels,
    describe_sets,
    find_nearest,
    name_sets,
    summarise_nearest,
)
from esm2kit.splitting.page import render_leakage_page
from esm2kit.splitting.pairs import describe_pairs, find_pair_file, read_pair_table, write_pair_table
from esm2kit.tasks.folds import assign_folds, name_groups
from esm2kit.tasks.kinds import find_set_files
from esm2kit.tasks.proteins import Proteins, Strata, choose_strata, read_divided_proteins, read_proteins
from esm2kit.tasks.split import SMALLEST, assign_sets, compute_quotas, find_unique, separate_groups
from esm2kit.tasks.split_file import SPLIT_FILE

logger = logging.getLogger(__name__)

PAGE, REPORT = "leakage.html", "leakage.json"
SCHEMA = "esm2kit.leakage/1"
REMEDY = "run `esm2kit split` again with --restart true"
MAX_CELLS = 20_000_000_000  # of the pairs of different sets that are compared
MAX_NAMED = 5  # folds; of more, the smallest and the largest number of proteins are given
RELATED = 0.05  # further than this share of the proteins, a set is not as large as requested


class ProteinSplit(NamedTuple):
    """The result of `split_proteins`.

    Args:
        table: the proteins with their sets or folds; None for a check.
        page: the leakage report.
        report: the same as JSON.
        sizes: name of the set or fold -> number of proteins.
        num_groups: groups of similar proteins.
        similar: held-out proteins with a training protein of the identity or more.
        highest_identity: of a held-out protein and a training protein.
        verdict: the result in a sentence.
        files: paths of all files.
    """

    table: Path | None
    page: Path
    report: Path
    sizes: dict[str, int]
    num_groups: int
    similar: int
    highest_identity: float
    verdict: str
    files: tuple[Path, ...]


class Division(NamedTuple):
    """Proteins in sets or folds.

    Args:
        sets: (P,) name of the set, or number of the fold from 1 as text.
        groups: (P,) number of the group of each protein.
        method: how they were divided, as words of a sentence.
        tool: MMseqs2 or k-mers.
        check: the comparison of the sets; None if they were not made by identity.
    """

    sets: np.ndarray
    groups: np.ndarray
    method: str
    tool: str
    check: SetCheck | None


def split_proteins(config: SplitConfig) -> ProteinSplit:
    """Divide proteins into sets or folds without similar proteins in different ones, or check sets that exist.

    Of pairs of proteins, the proteins are divided, and the pairs whose proteins are in different sets are left out.

    Args:
        config: proteins, labels and settings.

    Returns:
        The files, and the result in numbers.

    Raises:
        InputError: an input is invalid, the proteins are too similar to be divided, or files with other settings exist.
    """
    check_type(config, SplitConfig, "config")
    out_dir = Path(config.out_dir)
    check_output_folder(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    pair_file = find_pair_file(config)
    if pair_file is not None and config.fractions is None:
        config = dataclasses.replace(config, fractions=PAIR_FRACTIONS)
    inputs = _list_inputs(config)
    settings = _list_settings(config, inputs)
    with hold_lock(out_dir / ".split.lock", f"{out_dir}: another process writes a split there. Wait for it."):
        if (finished := _find_finished(out_dir, config, settings)) is not None:
            return finished
        pairs = None
        if pair_file is not None:
            pairs = read_pair_table(pair_file, None if pair_file == config.fasta else config.fasta)
            proteins = pairs.proteins
        elif config.check is not None:
            fasta = config.fasta
            proteins = read_divided_proteins(config.check, fasta, config.id, config.set)
        else:
            proteins = read_proteins(config.fasta, config.labels, config.id)
        for note in proteins.notes:
            logger.info("%s", note)
        strata = choose_strata(proteins, config.target)
        strata = strata if pairs is None else strata._replace(note="the sets of pairs follow from their proteins")
        if config.check is None and not strata.column:
            logger.info("not divided by labels: %s", strata.note)
        divided = _take_sets(proteins, config) if config.check is not None else _divide(proteins, strata, config)
        logger.info("%s of %s", divided.method, format_count(len(proteins.ids), "protein"))
        report = _build_report(proteins, strata, divided, config, settings)
        write_table = partial(_write_table, proteins=proteins, sets=divided.sets, is_folds=report["is_folds"])
        if pairs is not None:
            report["pairs"], sentence = describe_pairs(pairs, divided.sets)
            report["summary"]["verdict"] += f" {sentence}"
            write_table = partial(write_pair_table, pairs=pairs, sets=divided.sets)
        return _write(config, report, write_table, build_provenance("split", config, inputs))


def _list_inputs(config: SplitConfig) -> dict[str, Path | str]:
    """Return the input files by name; a sheet of a workbook is the digest of its file."""
    files = [] if config.fasta is None else find_fasta_files(config.fasta)
    inputs: dict[str, Path | str] = {f"fasta_{place}": path for place, path in enumerate(files)}
    for name in ("labels", "check"):
        path = getattr(config, name)
        if path is not None and path.is_dir():  # files per set; another folder is refused when it is read
            set_files = (file for files in find_set_files(path).values() for file in files)
            inputs |= {f"{name}_{file.name}": file for file in set_files}
        elif path is not None:
            inputs[name] = path if path.exists() else sha256_file(Path(str(path).rpartition(":")[0]))
    for path in inputs.values():
        if isinstance(path, Path) and is_pipe(path):
            raise InputError(
                f"'{path}' is a pipe, but the inputs of a split are read twice. Save it to a file.",
                code="split.pipe",
                path=path,
            )
    return inputs


def _list_settings(config: SplitConfig, inputs: Mapping[str, Path | str]) -> dict[str, Any]:
    """List what determines the files: the settings, and the digests of the inputs."""
    others = ("fasta", "labels", "check", "out_dir", "restart")  # files count by their digests, wherever they are
    names = [field.name for field in dataclasses.fields(config) if field.name not in others]
    digests = {name: path if isinstance(path, str) else sha256_file(path) for name, path in inputs.items()}
    found = {name: getattr(config, name) for name in names} | {"inputs": digests}
    return to_json(found | {"fractions": config.parse_fractions() if config.folds is None else None})


def _find_finished(out_dir: Path, config: SplitConfig, settings: dict[str, Any]) -> ProteinSplit | None:
    """Return the files of the same settings, or refuse to replace those of others."""
    existing = [out_dir / name for name in (REPORT, PAGE, SPLIT_FILE) if (out_dir / name).exists()]
    if not existing or config.restart:
        return None
    if existing[0].name == REPORT:
        found = read_sealed_manifest(existing[0], REMEDY)
        if found.get("settings") == settings:
            logger.info("%s already exists, from the same proteins and settings", existing[0])
            return _finish(out_dir, found)
    raise InputError(
        f"{existing[0]} already exists, from other proteins or settings. Use --restart to replace it, or another "
        "--out_dir to keep both.",
        code="split.file-exists",
        path=existing[0],
    )


def _divide(proteins: Proteins, strata: Strata, config: SplitConfig) -> Division:
    """Divide proteins into sets, or into folds."""
    if config.folds is None:
        split_by = "random" if config.method == "random" else "identity"
        method = "auto" if config.method == "random" else config.method
        shares = config.parse_fractions()
        found = assign_sets(
            proteins.sequences, strata.numbers, shares, split_by, config.identity, config.seed, config.coverage,
            method, MAX_CELLS,
        )  # fmt: skip
        tool = "" if found.check is None else "MMseqs2" if "MMseqs2" in found.method else "k-mers"
        return Division(found.sets, found.groups, found.method, tool, found.check)
    unique, rows = find_unique(proteins.sequences)

    def assign(group_P: np.ndarray) -> np.ndarray:
        return assign_folds(name_groups(group_P, proteins.sequences), config.folds or 0, config.seed, strata.numbers)

    if config.method == "random":
        group_P, check, method, tool = rows, None, "random, equal sequences in one fold", ""
        fold_P = assign(rows)
    else:
        groups = group_by_identity(unique, config.identity, config.coverage, config.method)
        fold_P, check = separate_groups(groups, rows, assign, MAX_CELLS)
        group_P, method, tool = groups.numbers[rows], groups.method, groups.tool
    return Division(np.array([str(fold + 1) for fold in fold_P.tolist()]), group_P, method, tool, check)


def _take_sets(proteins: Proteins, config: SplitConfig) -> Division:
    """Group proteins whose sets are known."""
    if len(name_sets(proteins.sets)) < 2:
        raise InputError(
            f"{config.check}: all proteins are in one set, {proteins.sets[0] if proteins.sets else ''!r}. A leakage "
            "report compares sets.",
            code="split.one-set",
            path=config.check,
        )
    unique, rows = find_unique(proteins.sequences)
    method = "auto" if config.method == "random" else config.method
    groups = group_by_identity(unique, config.identity, config.coverage, method)
    return Division(np.array(proteins.sets), groups.numbers[rows], groups.method, groups.tool, None)


def _build_report(
    proteins: Proteins, strata: Strata, divided: Division, config: SplitConfig, settings: dict[str, Any]
) -> dict[str, Any]:
    """Build the content of the report, without the digests of the files."""
    sequences, sets = proteins.sequences, divided.sets
    generator = np.random.default_rng(config.seed)
    nearest = find_nearest(sequences, sets, config.coverage, MAX_MEASURED, config.seed, "compared")
    shuffled = generator.permutation(sets)
    random = find_nearest(sequences, shuffled, config.coverage, MAX_RANDOM, config.seed, "compared for a random split")
    summaries = {
        "split": summarise_nearest(nearest, config.identity),
        "random": summarise_nearest(random, config.identity),
    }
    described = describe_sets(sets, sequences, divided.groups)
    cells = proteins.columns.get(strata.column, [])
    is_folds = config.folds is not None or "train" not in sets
    report = {
        "schema": SCHEMA,
        "stage": "split",
        "name": Path(config.check).name if config.check is not None else SPLIT_FILE,
        "is_folds": is_folds,
        "settings": settings,
        "method": divided.method,
        "tool": divided.tool,
        "sets": described,
        "labels": describe_labels(sets, strata, cells),
        "label_column": strata.column,
        "groups": describe_groups(divided.groups, sets),
        "duplicates": describe_duplicates(sequences, sets),
        "compared": None if divided.check is None else divided.check._asdict() | {"pairs": len(divided.check.pairs)},
        "nearest_summary": summaries,
        "nearest": [
            {
                "id": proteins.ids[row],
                "set": str(sets[row]),
                "nearest": proteins.ids[other] if other >= 0 else None,
                "identity": round(identity, 6),
                "coverage": round(coverage, 6),
            }
            for row, other, identity, coverage in zip(*(values.tolist() for values in nearest), strict=True)
        ],
    }
    report["summary"] = {"verdict": _describe_result(report, config)}
    report["notes"] = _describe_method(report, strata, proteins, config)
    report["warnings"] = _find_warnings(report, config)
    return report


def _describe_result(report: Mapping[str, Any], config: SplitConfig) -> str:
    """Describe the sizes and the leakage in one or two sentences."""
    word = "fold" if report["is_folds"] else "set"
    similar, total = (report["nearest_summary"]["split"][name] for name in ("similar", "held_out"))
    random = report["nearest_summary"]["random"]
    where = f"a protein of another {word}" if report["is_folds"] else "a training protein"
    share = f"{random['similar'] / max(random['held_out'], 1):.0%}"
    have = f"{similar:,} of {total:,} held-out proteins {'has' if similar == 1 else 'have'}"
    if not similar:
        have = f"no held-out protein of {total:,} has"
    similar = f"{have} {where} with an identity of {config.identity:.0%} or more; in a random split {share} have one."
    return f"{_describe_sizes(report)}: {similar}"


def _describe_sizes(report: Mapping[str, Any]) -> str:
    """Describe the numbers of proteins, such as `Train has 80 proteins, validation 10 and test 10`."""
    sizes = [each["proteins"] for each in report["sets"]]
    if report["is_folds"] and len(sizes) > MAX_NAMED:
        between = "" if min(sizes) == max(sizes) else f"{min(sizes):,} to "
        return f"Each of {len(sizes)} folds has {between}{format_count(max(sizes), 'protein')}"
    names = [f"{'fold ' if report['is_folds'] else ''}{each['name']}" for each in report["sets"]]
    first = f"{names[0]} has {format_count(sizes[0], 'protein')}"
    rest = [f"{name} {size:,}" for name, size in zip(names[1:], sizes[1:], strict=True)]
    text = " and ".join(filter(None, [", ".join([first, *rest[:-1]]), *rest[-1:]]))
    return f"{text[0].upper()}{text[1:]}"


def _describe_method(report: Mapping[str, Any], strata: Strata, proteins: Proteins, config: SplitConfig) -> list[str]:
    """Describe how the sets were made and compared."""
    made = "The sets are those of the file" if config.check is not None else f"Divided by {report['method']}"
    notes = [f"{made}; seed {config.seed}." if config.check is None else f"{made}; {report['method']}."]
    if report["compared"]:
        compared = report["compared"]
        counts = f"{compared['num_aligned']:,} of {compared['num_pairs']:,} pairs of proteins of different sets"
        if compared["complete"]:
            notes.append(
                f"All pairs of proteins of different sets were compared ({counts} by an alignment, the others have too "
                "few residues in common): none is similar."
            )
        else:
            notes.append(f"{counts} were aligned, first those that share most 4-mers: none is similar.")
    total, held_out = len(proteins.ids), sum(each["proteins"] for each in report["sets"] if each["name"] != "train")
    measured = report["nearest_summary"]["split"]["held_out"]
    if measured < held_out:
        notes.append(f"The nearest training proteins are those of a random sample of {measured:,} held-out proteins.")
    if strata.column:
        notes.append(f"Divided evenly by {'values' if strata.numeric else 'classes'} of {strata.column!r}.")
    elif config.check is None:
        notes.append(f"Not divided by labels: {strata.note}.")
    if config.check is None and config.folds is None and min(config.parse_fractions().values()) * total < SMALLEST:
        notes.append(f"Each set gets at least {SMALLEST} proteins, or a fifth of fewer than {5 * SMALLEST}.")
    return [*notes, *map(format_sentence, proteins.notes)]


def _find_warnings(report: Mapping[str, Any], config: SplitConfig) -> list[str]:
    """Find what makes the sets less useful than they seem."""
    warnings = []
    repeated = report["duplicates"]["in_several_sets"]
    if repeated:
        warnings.append(
            f"{format_count(repeated, 'sequence')} in several sets: equal proteins are in training and test."
        )
    if config.check is not None:
        similar, held_out = (report["nearest_summary"]["split"][name] for name in ("similar", "held_out"))
        if similar:
            warnings.append(
                f"{similar / held_out:.0%} of the held-out proteins have a training protein of {config.identity:.0%} "
                "identity or more: scores on them show how well a model recognises relatives."
            )
        return warnings
    shares = config.parse_fractions() if config.folds is None else {}
    total = sum(each["proteins"] for each in report["sets"])
    quotas = dict(zip(shares, compute_quotas(total, shares), strict=True)) if shares else {}
    for each in report["sets"]:
        wanted = quotas[each["name"]] / total if shares else 1 / len(report["sets"])
        if abs(each["share"] - wanted) > max(RELATED, 0.3 * wanted):
            name = f"fold {each['name']}" if report["is_folds"] else each["name"]
            start = f"{name[0].upper()}{name[1:]}"
            warnings.append(
                f"{start} has {each['share']:.0%} of the proteins instead of {wanted:.0%}, because similar "
                "proteins are not separated. A higher identity makes smaller groups."
            )
    return warnings


def _write(
    config: SplitConfig, report: dict[str, Any], write_table: Callable[[Path], None], provenance: dict[str, Any]
) -> ProteinSplit:
    """Write the table, the page and the report."""
    out_dir = Path(config.out_dir)
    (out_dir / REPORT).unlink(missing_ok=True)  # it describes the files that are replaced
    made = []
    if config.check is None:
        write_table(out_dir / SPLIT_FILE)
        made.append(SPLIT_FILE)
    with atomic_path(out_dir / PAGE) as part:
        part.write_text(render_leakage_page(report), encoding="utf-8")
    made.append(PAGE)
    report["checksums"] = {name: FileChecksums.compute(out_dir / name) for name in made}
    report["provenance"] = provenance
    write_sealed_json(out_dir / REPORT, report)
    for warning in report["warnings"]:
        logger.warning("%s", warning)
    return _finish(out_dir, report)


def _write_table(path: Path, proteins: Proteins, sets: np.ndarray, is_folds: bool) -> None:
    """Write the proteins with their columns and their sets, as FLIP does, or folds."""
    header = ["id", "sequence", *proteins.columns, *(["fold"] if is_folds else ["set", "validation"])]
    with atomic_path(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        rows = zip(proteins.ids, proteins.sequences, *proteins.columns.values(), strict=True)
        for row, name in zip(rows, sets.tolist(), strict=True):
            mark = {"validation": ["train", "True"]}.get(name, [name, ""])
            table.writerow([*row, *([name] if is_folds else mark)])


def _finish(out_dir: Path, report: Mapping[str, Any]) -> ProteinSplit:
    """Log the result and return it."""
    verdict = report["summary"]["verdict"]
    logger.info("%s", verdict)
    table = out_dir / SPLIT_FILE if SPLIT_FILE in report["checksums"] else None
    nearest = report["nearest_summary"]["split"]
    return ProteinSplit(
        table,
        out_dir / PAGE,
        out_dir / REPORT,
        {each["name"]: each["proteins"] for each in report["sets"]},
        report["groups"]["groups"],
        nearest["similar"],
        nearest["highest"],
        verdict,
        tuple(out_dir / name for name in (*report["checksums"], REPORT)),
    )
