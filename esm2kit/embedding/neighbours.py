"""`esm2kit neighbours`: the nearest reference proteins by cosine, their labels, and what simpler methods find."""

import csv
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esm2kit.core.checksums import FileChecksums, read_sealed_manifest, write_sealed_json
from esm2kit.core.errors import InputError, check_type
from esm2kit.core.files import atomic_path, check_output_folder, hold_lock, sha256_file, to_json
from esm2kit.core.numbers import format_count
from esm2kit.core.paths import portable_name
from esm2kit.core.progress import Progress
from esm2kit.core.provenance import build_provenance
from esm2kit.embedding.config import EmbedConfig, NeighboursConfig
from esm2kit.embedding.embed import embed
from esm2kit.embedding.hdf5 import EmbeddingReader
from esm2kit.embedding.search import Vectors, compute_centre, find_nearest, number_groups
from esm2kit.embedding.transfer import (
    VECTORS,
    Evaluation,
    Labels,
    choose_labels,
    compute_reliability,
    evaluate_transfer,
    transfer_labels,
)
from esm2kit.models.load import find_model
from esm2kit.sequences.fasta import Record, find_fasta_files, read_fasta, strip_fasta_suffix
from esm2kit.sequences.homologs import (
    MAX_REFERENCE,
    Hits,
    WordIndex,
    compute_composition,
    compute_identity,
    find_by_alignment,
    find_by_mmseqs,
)
from esm2kit.sequences.ids import digest_sequence
from esm2kit.sequences.pipes import copy_pipes
from esm2kit.tasks.columns import read_columns
from esm2kit.tasks.kinds import find_set_files

logger = logging.getLogger(__name__)
REMEDY = "run `esm2kit neighbours` again with --restart true"
MAX_LEFT_OUT = 1000  # reference proteins that are left out one by one
MIN_LEFT_OUT = 10
COMPOSITION, ALIGNMENT, MMSEQS = "composition", "alignment", "mmseqs"
OFFICIAL = "esm2_t6_8M_UR50D"


class Neighbours(NamedTuple):
    """Files of a search.

    Args:
        neighbours: table of the neighbours, one row per query and rank.
        nearest: table of the queries, with what each method finds first and the transferred labels.
        summary: JSON with settings, scores, verdict and provenance.
        num_proteins: number of queries.
        num_reference: number of proteins that were searched.
        num_identical: number of queries whose sequence is in the reference.
        verdict: how well labels are transferred, next to simpler methods. None without labels.
        files: all files.
    """

    neighbours: Path
    nearest: Path
    summary: Path
    num_proteins: int
    num_reference: int
    num_identical: int
    verdict: str | None
    files: tuple[Path, ...]


class Proteins(NamedTuple):
    """Proteins with vectors.

    Args:
        ids: of the proteins.
        digests: of their sequences.
        vectors: their vectors.
        sequences: their residues. None if they are not known.
    """

    ids: tuple[str, ...]
    digests: tuple[bytes, ...]
    vectors: Vectors
    sequences: tuple[str, ...] | None

    def select(self, rows: np.ndarray) -> "Proteins":
        """Select proteins by their rows, in rising order."""

        def read(start: int, stop: int) -> np.ndarray:
            block = self.vectors.read(int(rows[start]), int(rows[stop - 1]) + 1)
            return block[rows[start:stop] - rows[start]]

        sequences = None if self.sequences is None else tuple(self.sequences[row] for row in rows)
        ids, digests = tuple(self.ids[row] for row in rows), tuple(self.digests[row] for row in rows)
        return Proteins(ids, digests, Vectors(len(rows), read), sequences)


def find_neighbours(config: NeighboursConfig) -> Neighbours:
    """Find the reference proteins with the most similar vectors, and transfer their labels to the queries.

    Vectors that exist from the same input, model and settings are used as they are.

    Args:
        config: queries, reference, labels and settings.

    Returns:
        The files.

    Raises:
        InputError: an input is invalid, the reference was made in another way than the options say, or files with other
            settings exist.
    """
    check_type(config, NeighboursConfig, "config")
    out_dir = Path(config.out_dir)
    check_output_folder(out_dir)
    files = find_fasta_files(config.fasta)
    name = config.name or portable_name(strip_fasta_suffix(files[0]))
    out_dir.mkdir(parents=True, exist_ok=True)
    busy = f"{out_dir / name}_neighbours.tsv: another process works on it. Wait for it, or use another --name."
    with (
        copy_pipes(files, out_dir, f"{name}_input.fasta") as files,
        hold_lock(out_dir / f".{name}_neighbours.lock", busy),
    ):
        return Search(config, name, files).run()


class Search:
    """One call of `find_neighbours`.

    Args:
        config: options of the call.
        name: prefix of the files.
        files: FASTA files of the queries.
    """

    def __init__(self, config: NeighboursConfig, name: str, files: Sequence[Path]) -> None:
        self.config, self.name, self.files = config, name, files
        self.prefix = Path(config.out_dir) / f"{name}_neighbours"
        self.summary = self.prefix.with_name(f"{name}_neighbours.json")
        self.folder = self.prefix.with_name(f"{name}_neighbours.part")  # of a run that is writing its tables
        self.tables = self.prefix.with_name(f"{name}_neighbours.tsv"), self.prefix.with_name(f"{name}_nearest.tsv")

    def run(self) -> Neighbours:
        """Embed what is missing, search, and write the files."""
        with ExitStack() as stack:
            reference_file, records = self._embed_reference()
            reader = stack.enter_context(EmbeddingReader(reference_file))
            about = check_reference(reader, self.config)
            reference = read_reference(reader, self.config, records)
            labels, reference = self._read_labels(reference)
            made = embed(self._embed_config(about), replace=self.config.restart)
            assert made.embeddings is not None
            queries = read_queries(stack.enter_context(EmbeddingReader(made.embeddings)), self.files)
            self.vectors = tuple(dict.fromkeys((made.embeddings, reference_file)))
            settings = self._list_settings(reader)
            if (found := self._find_finished(settings)) is not None:
                return found
            comparison = Comparison(self.config, queries, reference, labels)
            comparison.search()
            self._write(comparison, settings, about)
        return self._finish(comparison.summarise())

    def _embed_reference(self) -> tuple[Path, list[Record] | None]:
        """Return the vectors of the reference, and its records if it is a FASTA."""
        config = self.config
        if config.reference_is_hdf5():
            return config.reference, None
        files = find_fasta_files(config.reference)
        name = portable_name(strip_fasta_suffix(files[0]))
        name = f"{name}_reference" if name == self.name else name
        options: dict[str, Any] = {} if config.batch_tokens is None else {"batch_tokens": config.batch_tokens}
        made = embed(
            EmbedConfig(
                files,
                config.out_dir,
                name,
                config.model or OFFICIAL,
                long_proteins=config.long_proteins or "error",
                precision=config.precision,
                device=config.device,
                devices=config.devices,
                **options,
            ),
            replace=config.restart,
        )
        assert made.embeddings is not None
        return made.embeddings, [record for path in files for record in read_fasta(path)]

    def _embed_config(self, about: Mapping[str, Any]) -> EmbedConfig:
        """Build the configuration that embeds the queries as the reference was embedded."""
        config = self.config
        return EmbedConfig(
            list(self.files),
            config.out_dir,
            self.name,
            device=config.device,
            devices=config.devices,
            batch_tokens=config.batch_tokens,
            **{name: value for name, value in about.items() if name != "sha256"},
        )

    def _read_labels(self, reference: Proteins) -> tuple[Labels | None, Proteins]:
        """Read the labels, and keep the reference proteins that have one."""
        if self.config.labels is None:
            return None, reference
        sequences = reference.sequences or ("",) * len(reference.ids)
        records = [Record(*pair) for pair in zip(reference.ids, reference.ids, sequences, strict=True)]
        columns = read_columns(self.config.labels, records, self.config.id)
        labels = choose_labels(columns, self.config.target, self.config.target_type)
        rows = np.flatnonzero(~np.isnan(labels.values_R))
        if len(rows) < len(reference.ids):
            logger.info(
                "%d of %d reference proteins have a value of '%s'; only these are searched",
                *(len(rows), len(reference.ids), labels.column),
            )
        return labels._replace(values_R=labels.values_R[rows]), reference.select(rows)

    def _list_settings(self, reader: EmbeddingReader) -> dict[str, Any]:
        """All that determines the tables."""
        ignored = {"fasta", "reference", "reference_fasta", "labels", "out_dir", "name", "model", "device", "devices"}
        ignored |= {"restart", "precision", "batch_tokens", "long_proteins"}
        settings = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        settings = {name: value for name, value in settings.items() if name not in ignored}
        with EmbeddingReader(self.vectors[0]) as queries:
            settings["queries"] = queries.attributes["fingerprint"]
        settings["reference"] = reader.attributes["fingerprint"]
        settings["labels"] = None if self.config.labels is None else sha256_labels(self.config.labels)
        return to_json(settings)

    def _find_finished(self, settings: dict[str, Any]) -> Neighbours | None:
        """Return finished files with the same settings; others are refused."""
        existing = [path for path in (self.summary, *self.tables) if path.exists()]
        if self.config.restart or not existing or (self.folder.is_dir() and not self.summary.exists()):
            return None
        differing: list[str] = []
        if self.summary.exists():
            found = read_sealed_manifest(self.summary, REMEDY)
            recorded = found.get("settings", {})
            differing = sorted(
                key for key in settings.keys() | recorded.keys() if settings.get(key) != recorded.get(key)
            )
            if not differing:
                shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was stopped just before its end
                logger.info("%s already exists, from the same input, model and settings", self.tables[0])
                return self._finish(found["summary"])
        origin = f"with different settings ({', '.join(differing)})" if differing else "with other content"
        raise InputError(
            f"{existing[0]} already exists {origin}. Use --restart to replace it, or another --name to keep both.",
            code="neighbours.file-exists",
            path=existing[0],
            differing=differing,
        )

    def _write(self, comparison: "Comparison", settings: dict[str, Any], about: Mapping[str, Any]) -> None:
        config = self.config
        inputs: dict[str, Path | str] = {f"fasta_{place}": path for place, path in enumerate(self.files)}
        inputs |= {"reference": self.vectors[-1], "model": about["sha256"]}
        if config.labels is not None:
            inputs["labels"] = sha256_labels(config.labels)
        self.folder.mkdir(exist_ok=True)
        parts = [self.folder / path.name for path in self.tables]
        for path, rows in zip(parts, (comparison.list_hits(), comparison.list_queries()), strict=True):
            with atomic_path(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
                csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)
        content = {
            "stage": "neighbours",
            "settings": settings,
            "summary": comparison.summarise(),
            "checksums": {path.name: FileChecksums.compute(path) for path in parts},
            "provenance": build_provenance("neighbours", config, inputs),
        }
        self.summary.unlink(missing_ok=True)  # of the tables that these replace
        for part, path in zip(parts, self.tables, strict=True):
            os.replace(part, path)
        write_sealed_json(self.summary, content)
        shutil.rmtree(self.folder)

    def _finish(self, summary: Mapping[str, Any]) -> Neighbours:
        for line in (summary["identical"], summary["verdict"]):
            if line:
                logger.info("%s", line)
        counts = (summary[name] for name in ("num_proteins", "num_reference", "num_identical"))
        return Neighbours(
            *self.tables, self.summary, *counts, summary["verdict"], (*self.vectors, *self.tables, self.summary)
        )


def sha256_labels(path: Path) -> str:
    """Compute the digest of a table, of which a sheet may be chosen as in `file.xlsx:Sheet`, or of a folder of them."""
    if path.is_dir():
        files = [file for files in find_set_files(path).values() for file in files]
        return hashlib.sha256("\n".join(f"{file.name} {sha256_file(file)}" for file in files).encode()).hexdigest()
    if path.exists():
        return sha256_file(path)
    file, _, sheet = str(path).rpartition(":")
    return f"{sha256_file(Path(file))}:{sheet}"


def check_reference(reader: EmbeddingReader, config: NeighboursConfig) -> dict[str, Any]:
    """Check that vectors can be compared with, and that they are those of the options.

    Args:
        reader: vectors of the reference.
        config: options of the call.

    Returns:
        Options of `EmbedConfig` that embed other proteins in the same way, and `sha256` of the model.

    Raises:
        InputError: they are not means over residues, or another model or precision was requested.
    """
    attributes = reader.attributes
    if reader.level != "protein" or attributes["pooling"] != "mean":
        found = "one vector per residue" if reader.level != "protein" else f"pooling '{attributes['pooling']}'"
        raise InputError(
            f"{reader.path} has {found}, but neighbours are compared by the mean over the residues. Pass a file of "
            "`esm2kit embed` with --pooling mean, the default.",
            code="neighbours.pooling",
            path=reader.path,
            found=attributes["pooling"],
        )
    made = attributes["provenance"]
    recorded, used = made["config"], made["model"]
    model = find_model(config.model or recorded["model"], recorded["untrained_seed"])
    if model.sha256 != used["sha256"]:
        raise InputError(
            f"{reader.path} has vectors of the model '{used['name']}' (weights {used['sha256'][:12]}), but "
            f"'{config.model or recorded['model']}' has weights {model.sha256[:12]}. Omit --model to use that of the "
            "file, or embed the reference again.",
            code="neighbours.model",
            path=reader.path,
            found=used["name"],
            expected=model.name,
        )
    if config.precision not in ("auto", attributes["precision"]):
        raise InputError(
            f"{reader.path} was computed in {attributes['precision']}, but --precision is {config.precision}. Omit it, "
            "or embed the reference again.",
            code="neighbours.precision",
            path=reader.path,
            found=attributes["precision"],
            expected=config.precision,
        )
    return {
        "model": config.model or recorded["model"],
        "repr_layers": [int(attributes["layer"])],
        "untrained_seed": recorded["untrained_seed"],
        "long_proteins": config.long_proteins or recorded["long_proteins"],
        "max_residues": recorded["max_residues"],
        "window_overlap": recorded["window_overlap"],
        "precision": attributes["precision"],
        "dtype": attributes["dtype"],
        "sha256": used["sha256"],
    }


def read_reference(reader: EmbeddingReader, config: NeighboursConfig, records: list[Record] | None) -> Proteins:
    """Read the reference, and its sequences if they can be found.

    Args:
        reader: its vectors.
        config: options of the call.
        records: its proteins, if they were just embedded.

    Returns:
        The proteins in the order of the file.

    Raises:
        InputError: the file has no digests of its sequences, or reference_fasta does not have all its proteins.
    """
    digests = reader.digests
    if digests is None:
        raise InputError(
            f"{reader.path} does not record of which sequences its vectors are. Embed the proteins again.",
            code="neighbours.no-digests",
            path=reader.path,
        )
    where = config.reference_fasta
    if where is not None:
        records = [record for path in find_fasta_files(where) for record in read_fasta(path)]
    elif records is None:
        records = _read_recorded(reader)
    by_digest = {digest_sequence(record.sequence): record.sequence for record in records}
    missing = [name for name, digest in zip(reader.ids, digests, strict=True) if digest not in by_digest]
    sequences = None if missing else tuple(by_digest[digest] for digest in digests)
    if missing and where is not None:
        raise InputError(
            f"{where} lacks {len(missing)} of {len(digests)} sequences of {reader.path}, such as that of "
            f"'{missing[0]}'. Pass the FASTA file that was embedded.",
            code="neighbours.reference-fasta",
            path=where,
            missing=missing[0],
        )
    if missing:
        logger.warning(
            "%s: the sequences of the reference are not known, so nothing is aligned and simpler methods are left out; "
            "pass its FASTA file by --reference_fasta",
            reader.path,
        )

    def read(start: int, stop: int) -> np.ndarray:
        return reader.matrix(reader.ids[start:stop])

    return Proteins(reader.ids, digests, Vectors(len(digests), read), sequences)


def _read_recorded(reader: EmbeddingReader) -> list[Record]:
    """Read the FASTA files that were embedded, where they still exist."""
    inputs = reader.attributes["provenance"]["inputs"].items()
    paths = [Path(entry["path"]) for name, entry in inputs if name.startswith("fasta")]
    paths += [reader.path.parent / path.name for path in paths]
    return [record for path in paths if path.is_file() for record in read_fasta(path)]


def read_queries(reader: EmbeddingReader, files: Sequence[Path]) -> Proteins:
    """Read the queries with their vectors."""
    records = [record for path in files for record in read_fasta(path)]
    sequences = tuple(record.sequence for record in records)
    ids = tuple(record.id for record in records)

    def read(start: int, stop: int) -> np.ndarray:
        return reader.matrix(ids[start:stop])

    return Proteins(ids, tuple(map(digest_sequence, sequences)), Vectors(len(ids), read), sequences)


@contextmanager
def count_progress(what: str, unit: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of a loop; yields a function that takes the amount done."""
    with Progress(logger, what, unit, total) as progress:
        yield progress.update


class Comparison:
    """Neighbours of the queries by every method, and their labels.

    Args:
        config: options of the call.
        queries: the queries.
        reference: the proteins that are searched.
        labels: of the reference. None transfers nothing.
    """

    def __init__(self, config: NeighboursConfig, queries: Proteins, reference: Proteins, labels: Labels | None) -> None:
        self.config, self.queries, self.reference, self.labels = config, queries, reference, labels
        self.count = config.k
        self.group_Q, self.group_R = number_groups(queries.digests, reference.digests)
        self.centre_D = compute_centre(reference.vectors) if config.centre else None
        self.rows_of: dict[int, set[int]] = {}
        for row, group in enumerate(self.group_R.tolist()):
            self.rows_of.setdefault(group, set()).add(row)
        self.identical_Q = np.array([group in self.rows_of for group in self.group_Q.tolist()], dtype=bool)
        self.index: WordIndex | None = None
        self.hits: dict[str, Hits] = {}
        self.evaluation: Evaluation | None = None
        self.identity_QK: list[list[float | None]] = []

    def search(self) -> None:
        """Search by every method, compute the identities, and evaluate the labels."""
        known = self.reference.sequences
        if known is not None and self.config.candidates:
            if len(known) <= MAX_REFERENCE:
                self.index = WordIndex(known)
            else:
                logger.info("alignments are left out: the reference has more than %d proteins", MAX_REFERENCE)
        everyone = np.arange(len(self.queries.ids))
        with count_progress("neighbours: compared", "pairs", len(everyone) * len(self.group_R)) as note_done:
            vectors = self._search_vectors(self.queries.vectors, self.group_Q, self.config.exclude_identical, note_done)
        self.hits = {VECTORS: vectors}
        if known is not None and self.queries.sequences is not None:
            self.hits |= self._search_simply(
                self.queries.sequences, self.group_Q, self.config.exclude_identical, "neighbours"
            )
            self.identity_QK = self._compute_identities()
        self._evaluate()

    def _search_vectors(
        self, vectors: Vectors, group_Q: np.ndarray, exclude: bool, note_done: Callable[[int], None] = lambda done: None
    ) -> Hits:
        groups = (group_Q, self.group_R) if exclude else (None, None)
        return find_nearest(vectors, self.reference.vectors, self.count, self.centre_D, *groups, note_done)

    def _search_simply(
        self, sequences: Sequence[str], group_Q: np.ndarray, exclude: bool, what: str
    ) -> dict[str, Hits]:
        """Search by composition, alignments and MMseqs2."""
        known = self.reference.sequences
        assert known is not None
        shares_QA, shares_RA = compute_composition(sequences), compute_composition(known)
        groups = (group_Q, self.group_R) if exclude else (None, None)
        centre_A = shares_RA.mean(0, dtype=np.float64) if np.ptp(shares_RA, axis=0).any() else None
        composed = Vectors.from_array(shares_QA), Vectors.from_array(shares_RA)
        found = {COMPOSITION: find_nearest(*composed, self.count, centre_A, *groups)}
        excluded = [self.rows_of.get(group, set()) if exclude else set() for group in group_Q.tolist()]
        if self.index is not None:
            with count_progress(f"{what}: aligned", "proteins", len(sequences)) as note_done:
                found[ALIGNMENT] = find_by_alignment(
                    sequences, self.index, self.count, self.config.candidates, excluded, note_done
                )
        if (by_mmseqs := find_by_mmseqs(sequences, known, self.count, excluded)) is not None:
            found[MMSEQS] = by_mmseqs
        return found

    def _compute_identities(self) -> list[list[float | None]]:
        queries, known = self.queries.sequences, self.reference.sequences
        assert queries is not None
        assert known is not None
        identities = []
        with count_progress("neighbours: computed identities of", "proteins", len(queries)) as note_done:
            for place, (query, rows) in enumerate(zip(queries, self.hits[VECTORS].rows_QK, strict=True)):
                identities.append([compute_identity(query, known[row]) if row >= 0 else None for row in rows])
                note_done(place + 1)
        return identities

    def _evaluate(self) -> None:
        """Find the labels of reference proteins from the others."""
        if self.labels is None:
            return
        num_reference = len(self.reference.ids)
        if num_reference < MIN_LEFT_OUT:
            return
        rows = np.arange(num_reference)
        if num_reference > MAX_LEFT_OUT:
            generator = np.random.default_rng(self.config.seed)
            rows = np.sort(generator.choice(num_reference, MAX_LEFT_OUT, replace=False))
        group_N, left_out = self.group_R[rows], self.reference.select(rows)
        hits = {VECTORS: self._search_vectors(left_out.vectors, group_N, True)}
        if left_out.sequences is not None:
            hits |= self._search_simply(left_out.sequences, group_N, True, "reference")
        self.evaluation = evaluate_transfer(self.labels, rows, hits, self.config.resamples, self.config.seed)

    def list_hits(self) -> Iterator[list[Any]]:
        """List the rows of the table of neighbours."""
        found, labels = self.hits[VECTORS], self.labels
        column = [] if labels is None else [labels.column]
        yield ["query", "rank", "neighbour", "cosine", "reliability", "identical", "identity", *column]
        reliability_QK = np.maximum(found.scores_QK, 0) if labels is None else compute_reliability(labels, found)
        for query, (name, rows) in enumerate(zip(self.queries.ids, found.rows_QK, strict=True)):
            for place, row in enumerate(rows):
                if row < 0:
                    continue
                same = self.group_Q[query] == self.group_R[row]
                values = [f"{found.scores_QK[query, place]:.6f}", f"{reliability_QK[query, place]:.4f}"]
                values += ["yes" if same else "no", self._format_identity(query, place)]
                label = [] if labels is None else [labels.format(labels.values_R[row])]
                yield [name, place + 1, self.reference.ids[row], *values, *label]

    def list_queries(self) -> Iterator[list[Any]]:
        """List the rows of the table of queries."""
        labels = self.labels
        others = [name for name in self.hits if name != VECTORS]
        header = ["query", "nearest", "cosine", "in_reference", "identity"]
        header += [f"nearest_by_{name}" for name in others]
        if ALIGNMENT in others:
            header.append("identity_by_alignment")
        transferred = {}
        if labels is not None:
            header += [labels.column, "reliability"]
            if self.evaluation is not None:
                header.append("expected_accuracy" if labels.type == "class" else "expected_error")
            header += [f"{labels.column}_by_{name}" for name in others]
            transferred = {name: transfer_labels(labels, found) for name, found in self.hits.items()}
        yield header
        for query, name in enumerate(self.queries.ids):
            first = {method: int(found.rows_QK[query, 0]) for method, found in self.hits.items()}
            row = [name, self._name(first[VECTORS]), f"{self.hits[VECTORS].scores_QK[query, 0]:.6f}"]
            row += ["yes" if self.identical_Q[query] else "no", self._format_identity(query, 0)]
            row += [self._name(first[method]) for method in others]
            if ALIGNMENT in others:
                row.append(_format(self._compute_identity(query, first[ALIGNMENT])))
            if labels is not None:
                reliability = float(transferred[VECTORS].reliability_Q[query])
                row += [labels.format(transferred[VECTORS].values_Q[query]), f"{reliability:.4f}"]
                if self.evaluation is not None:
                    row.append(_format(self.evaluation.find_expected(reliability)))
                row += [labels.format(transferred[method].values_Q[query]) for method in others]
            yield row

    def _name(self, row: int) -> str:
        return self.reference.ids[row] if row >= 0 else ""

    def _compute_identity(self, query: int, row: int) -> float | None:
        queries, known = self.queries.sequences, self.reference.sequences
        if row < 0 or queries is None or known is None:
            return None
        return compute_identity(queries[query], known[row])

    def _format_identity(self, query: int, place: int) -> str:
        return _format(self.identity_QK[query][place]) if self.identity_QK else ""

    def summarise(self) -> dict[str, Any]:
        """Summarise the search for the JSON file."""
        num_identical, num_queries = int(self.identical_Q.sum()), len(self.queries.ids)
        identical, verdict = "", None
        if num_identical:
            fate = "were left out" if self.config.exclude_identical else "count as neighbours"
            identical = (
                f"{num_identical} of {format_count(num_queries, 'query', 'queries')} have the sequence of a reference "
                f"protein; identical proteins {fate}"
            )
        if self.evaluation is not None:
            verdict = self.evaluation.verdict
        elif self.labels is not None:
            verdict = (
                f"{self.labels.column}: {format_count(len(self.reference.ids), 'reference protein')} with a label are "
                f"too few to evaluate the transfer; at least {MIN_LEFT_OUT} are required."
            )
        return {
            "num_proteins": num_queries,
            "num_reference": len(self.reference.ids),
            "num_identical": num_identical,
            "identical": identical,
            "methods": list(self.hits),
            "column": None if self.labels is None else self.labels.column,
            "target_type": None if self.labels is None else self.labels.type,
            "leave_one_out": None if self.evaluation is None else self.evaluation.to_json(),
            "verdict": verdict,
        }


def _format(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
