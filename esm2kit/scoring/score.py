"""Score mutations, or whole proteins, with a model and without labels.

The folder `<out_dir>/<name>_scores.part/` of an unfinished run contains its settings and a journal of the batches that
were computed. A stopped or killed run resumes from there. The files appear in out_dir when all of them are complete.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from esm2kit.core.checksums import FileChecksums, raise_damaged, read_sealed_json, write_sealed_json
from esm2kit.core.errors import InputError, check_type
from esm2kit.core.files import check_output_folder, fsync, hold_lock, to_json
from esm2kit.core.hardware import resolve_device
from esm2kit.core.numbers import format_count
from esm2kit.core.paths import portable_name
from esm2kit.core.processes import count_cores
from esm2kit.core.progress import Progress
from esm2kit.core.provenance import build_provenance
from esm2kit.models.config import check_lm_head
from esm2kit.models.encoder import TOKENS_PER_BATCH, log_precision, resolve_precision
from esm2kit.models.layerwise import load_encoder
from esm2kit.models.load import find_model
from esm2kit.models.memory import InferenceSettings
from esm2kit.models.memory_guard import OPTIONS, explain_inference_memory
from esm2kit.scoring.config import ScoreConfig
from esm2kit.scoring.evaluation import Evaluation
from esm2kit.scoring.journal import Journal, JournalValues
from esm2kit.scoring.masked_passes import compute_batches, split_passes
from esm2kit.scoring.mutations import parse_positions
from esm2kit.scoring.output import Attributes, SequenceScan, SubstitutionScan
from esm2kit.scoring.presentation import Presentation
from esm2kit.scoring.scores import REMEDY, Scores
from esm2kit.scoring.strategies import count_values
from esm2kit.scoring.variants import (
    Variant,
    VariantSet,
    check_no_columns,
    find_path,
    list_substitutions,
    read_variants,
    strip_suffix,
)
from esm2kit.sequences.alphabet import STANDARD_RESIDUES
from esm2kit.sequences.fasta import Record, read_fasta, strip_fasta_suffix
from esm2kit.sequences.letters import LetterCounts
from esm2kit.sequences.pipes import copy_pipes

logger = logging.getLogger(__name__)
# A FASTA of at least this many proteins, of which all differ from the first by at most this share of its residues (two
# mutants differ by the mutations of both), may be one of mutants.
MIN_MUTANTS, MAX_MUTATED = 3, 0.1
VALUES = "values.bin"  # the journal of computed batches
# These do not change a score.
IGNORED_SETTINGS = (
    "fasta", "mutations", "column", "measured", "alignment", "groups", "resamples", "out_dir", "name", "model",
    "device", "workers", "restart", "batch_tokens", "layer_by_layer", "structure", "colour_by", "pictures",
)  # fmt: skip


def score(config: ScoreConfig) -> Scores:
    """Score the variants of the proteins of a FASTA, or with `sequences` the proteins themselves.

    Scores of variants with measured values are compared with them, next to baselines.

    Files that exist from the same input, model and settings are not written again. An interrupted run resumes when
    `score` is called again.

    Args:
        config: input, model, strategy and output.

    Returns:
        The files, and their tables as arrays.

    Raises:
        InputError: the input is invalid, or files or an unfinished run with other settings exist.
    """
    check_type(config, ScoreConfig, "config")
    out_dir = Path(config.out_dir)
    files, source = config.split_inputs()
    check_output_folder(out_dir)
    if not files and find_path(source) is None:
        raise InputError(
            "mutations are given, but not their wild type. Pass its FASTA first: "
            "esm2kit score my.fasta --mutations A42G.",
            code="mutations.no-wild-type",
        )
    name = config.name or portable_name(strip_fasta_suffix(files[0]) if files else strip_suffix(Path(source)))
    out_dir.mkdir(parents=True, exist_ok=True)
    folder = out_dir / f"{name}_scores.part"
    busy = f"{folder}: another process is scoring into it. Wait for it, or use another --name."
    with (
        copy_pipes(files, out_dir, f"{name}_input.fasta") as files,
        hold_lock(folder.with_name(f".{folder.name}.lock"), busy),
    ):
        return ScoreJob(config, files, source, out_dir / f"{name}_scores").run()


class ScoreJob:
    """One call of `score`.

    Args:
        config: options of the call.
        files: FASTA files; none if the variants have their wild type.
        source: of the variants, see `read_variants`.
        prefix: path of the output files without their suffixes.

    Raises:
        InputError: the input or the model is invalid.
    """

    def __init__(self, config: ScoreConfig, files: Sequence[Path], source: str | Path | None, prefix: Path) -> None:
        self.config, self.files, self.source, self.prefix = config, files, source, prefix
        self.folder = prefix.with_name(f"{prefix.name}.part")
        self.device = resolve_device(config.device)
        self.batch_tokens = config.batch_tokens or TOKENS_PER_BATCH[self.device]
        self.precision = resolve_precision(config.precision, self.device)
        self.proteins = read_proteins(files)
        self.sets: list[VariantSet] = []
        variants = self._read_variants()
        self.evaluation = Evaluation(config, self.proteins, self.sets)
        self.presentation = Presentation(config, self.proteins)
        self.variants_sha256 = None if variants is None else _digest_variants(variants)
        self.scan: SubstitutionScan | SequenceScan
        if config.sequences:
            self.scan = SequenceScan(config, self.proteins)
        else:
            self.scan = SubstitutionScan(config, self.proteins, variants)
        if not any(self.scan.steps()):
            raise InputError(
                f"{' and '.join(map(str, files)) or self.source}: no protein has one of the 20 standard residues, so "
                "there is nothing to score. Pass other proteins.",
                code="score.nothing",
            )
        self.model = find_model(config.model, config.untrained_seed)
        check_lm_head(self.model.config, config.model)

    def _read_variants(self) -> list[Variant] | None:
        """Read the variants that are named; None scores every single substitution."""
        config = self.config
        if self.source is not None:
            self.proteins, self.sets = read_variants(
                self.source, self.proteins, offset=config.offset, column=config.column, measured=config.measured
            )
            # several assays may have the same variant
            return list(dict.fromkeys(variant for each in self.sets for variant in each.variants))
        check_no_columns(" and ".join(map(str, self.files)), config.column, config.measured)
        if config.positions is None:
            if not config.sequences:
                note_mutants(self.proteins)
            return None
        return [
            variant
            for index, protein in enumerate(self.proteins)
            for variant in list_substitutions(
                index,
                protein.sequence,
                parse_positions(config.positions, len(protein.sequence), config.offset, f"protein {protein.id!r}"),
                config.offset,
            )
        ]

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Provenance of the files, with the digests of the input and of the model."""
        names = ["fasta"] if len(self.files) == 1 else [f"fasta_{number}" for number in range(len(self.files))]
        names = names if self.files else []
        inputs = dict(zip(names, self.files, strict=True)) | {"model": self.model.sha256}
        if self.source is not None and (path := find_path(self.source)) is not None and path.is_file():
            inputs["variants"] = path
        config = dataclasses.replace(self.config, precision=self.precision)
        return build_provenance("score", config, inputs) | {"model": self.model.record()}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that determines the scores and the batches; a run resumes only if it is equal."""
        settings = {name: value for name, value in to_json(self.config).items() if name not in IGNORED_SETTINGS}
        if not self.config.fast:
            settings = {name: value for name, value in settings.items() if name not in ("passes", "sample")}
        inputs = self.provenance["inputs"].items()
        settings |= {name: entry["sha256"] for name, entry in inputs if name != "variants"}
        if not self.files:
            settings["proteins"] = {protein.id: protein.sequence for protein in self.proteins}
        return settings | {
            "batch_tokens": self.batch_tokens,
            "precision": self.precision,
            "mutations": self.variants_sha256,
        }

    @property
    def targets(self) -> list[Path]:
        """The files of the run, without the manifest."""
        suffixes = {"scores": self.config.format, "h5": "h5"}
        return [self.prefix.with_name(f"{self.prefix.name}.{suffixes[kind]}") for kind in self.scan.files]

    @property
    def manifest(self) -> Path:
        """The JSON file that is written last."""
        return self.prefix.with_name(f"{self.prefix.name}.json")

    def run(self) -> Scores:
        """Compute what is missing and write the files."""
        if not self.config.restart and (finished := self._find_finished()):
            return self._report(finished)
        residues = (residue for each in self.proteins for residue in each.sequence)
        if self.source is None and (unscored := sum(residue not in STANDARD_RESIDUES for residue in residues)):
            verb = "is" if unscored == 1 else "are"
            logger.info(
                "%s %s not among the 20 standard ones and %s not scored", format_count(unscored, "residue"), verb, verb
            )
        self._prepare_folder()
        path = self.folder / VALUES
        self._compute(path)
        self._write(path)
        return self._report(Scores.read(self.manifest))

    def _report(self, scores: Scores) -> Scores:
        """Log what the scores say, and compare them with measured values if there are some, and write the page."""
        if scores.most_tolerated:
            most, least = scores.most_tolerated, scores.least_tolerated
            logger.info("most tolerated positions: %s; least tolerated: %s", most, least)
        if scores.mean_error is not None:
            logger.info("the estimate is off by %.2g per residue on average, on the proteins that were also computed "
                        "exactly", scores.mean_error)  # fmt: skip
        return self.presentation.run(self.evaluation.run(scores))

    def _find_finished(self) -> Scores | None:
        """Return the result of a finished run with the same settings, if there is one.

        Raises:
            InputError: there are files with other settings, or damaged ones.
        """
        if not self.manifest.exists():
            existing = [target for target in self.targets if target.exists()]
            if existing and not (self.folder / "plan.json").is_file():
                self._raise_exists(existing[0], "with other content", [])
            return None
        recorded = read_sealed_json(self.manifest, REMEDY)
        differing = find_differences(self.settings, recorded.get("settings", {}))
        if differing:
            self._raise_exists(self.manifest, f"with different settings ({', '.join(differing)})", differing)
        found = Scores.read(self.manifest)
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was stopped just before its end
        logger.info("%s already exists, from the same input, model and settings", found.scores)
        return found

    def _raise_exists(self, path: Path, origin: str, differing: list[str]) -> None:
        raise InputError(
            f"{path} already exists {origin}. Use --restart to replace it, or another --name to keep both.",
            code="score.file-exists",
            path=path,
            differing=differing,
        )

    def _prepare_folder(self) -> None:
        """Create the folder of the run, or keep that of an unfinished run with the same settings."""
        plan = self.folder / "plan.json"
        if self.config.restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        if plan.is_file():
            differing = find_differences(self.settings, read_sealed_json(plan, REMEDY)["settings"])
            if not differing:
                logger.info("resuming the unfinished run in %s", self.folder)
                return
            # after exhausted memory, a run with smaller batches has nothing to lose
            if differing != ["batch_tokens"] or self._has_finished_batches():
                raise InputError(
                    f"{self.folder} contains an unfinished run with different settings ({', '.join(differing)}). "
                    "Use --restart to delete it, or another --name to keep both.",
                    code="score.run-exists",
                    path=self.folder,
                    differing=differing,
                )
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_sealed_json(plan, {"settings": self.settings})

    def _has_finished_batches(self) -> bool:
        values = self.folder / VALUES
        return values.is_file() and values.stat().st_size > 0

    def _compute(self, path: Path) -> None:
        """Compute the batches that the journal does not have."""
        total = sum(len(step) for step in self.scan.steps())
        journal = Journal(path)
        progress = None
        try:
            batches = split_passes(self.scan.steps(), self.batch_tokens)
            done = 0
            for count in journal.counts:
                batch = next(batches, [])
                if count_values(batch) != count:
                    raise_damaged(path, "its batches are not those of this run", REMEDY)
                done += len(batch)
            if done == total:
                return
            log_precision(self.config.precision, self.precision, self.device)
            workers = (self.config.workers or count_cores()) if self.device == "cpu" else 1
            settings = InferenceSettings(
                tokens=self.batch_tokens, precision=self.precision, device=self.device, workers=workers
            )

            def note() -> str:
                return " --restart" if self._has_finished_batches() else ""

            options = OPTIONS if self.config.layer_by_layer else (*OPTIONS, "layer_by_layer")
            with explain_inference_memory(self.model.config, settings, options, note):
                how = (self.config.layer_by_layer, self.batch_tokens, self.config.workers)
                encoder = load_encoder(self.model, self.precision, self.device, *how)
                progress = Progress(logger, f"{self.model.name}: computed", "forward passes", total, done)
                sizes: list[int] = []
                for values in compute_batches(encoder, _record_sizes(batches, sizes), self.config.workers):
                    journal.append(values)
                    progress.update(progress.done + sizes.pop(0))
            progress.log()
        except KeyboardInterrupt:
            logger.warning("stopped; rerun the command to resume")
            raise
        finally:
            if progress is not None:
                progress.close()
            journal.close()

    def _write(self, path: Path) -> None:
        """Write the files in the run's folder, move them to their places, and write the manifest."""
        parts = [self.folder / target.name for target in self.targets]
        attributes = Attributes(self.model.name, self.config.strategy, self.settings, self.provenance).as_dict()
        summary = self.scan.write(JournalValues(path).read, parts, attributes)
        summary |= {"model": self.model.name, "num_proteins": len(self.proteins)}
        checksums = {part.name: FileChecksums.compute(part) for part in parts}
        self.manifest.unlink(missing_ok=True)  # of the run that this one replaces
        for part, target in zip(parts, self.targets, strict=True):
            fsync(part)
            os.replace(part, target)
        content = {"stage": "score", "settings": self.settings, "summary": summary}
        write_sealed_json(self.manifest, {**content, "checksums": checksums, "provenance": self.provenance})
        shutil.rmtree(self.folder)


def _record_sizes(batches: Iterable[list], sizes: list[int]) -> Iterable[list]:
    """Iterate over batches, and append the number of passes of each to `sizes`."""
    for batch in batches:
        sizes.append(len(batch))
        yield batch


def read_proteins(files: Sequence[Path]) -> list[Record]:
    """Read and check the proteins of FASTA files.

    Args:
        files: FASTA files.

    Returns:
        The records in order.

    Raises:
        InputError: a file is not valid, or different sequences have the same id.
    """
    proteins, letters = [record for path in files for record in read_fasta(path)], LetterCounts()
    first: dict[str, int] = {}
    for index, protein in enumerate(proteins):
        letters.add(protein.sequence)
        other = first.setdefault(protein.id, index)
        if proteins[other].sequence != protein.sequence:
            raise InputError(
                f"{' and '.join(map(str, files))}: records {other + 1} and {index + 1} have the same id "
                f"{protein.id!r} but different sequences. Use a different id for each sequence.",
                code="score.ambiguous-id",
                id=protein.id,
                records=(other + 1, index + 1),
            )
    letters.report(files)
    return proteins


def note_mutants(proteins: Sequence[Record]) -> None:
    """Log a warning if the proteins look like mutants of one protein, each of which is scored as a wild type.

    Args:
        proteins: those whose every single substitution is scored.
    """
    if len(proteins) < MIN_MUTANTS:
        return
    first = proteins[0].sequence
    allowed = max(1, round(MAX_MUTATED * len(first)))
    if any(Levenshtein.distance(first, other.sequence, score_cutoff=allowed) > allowed for other in proteins[1:]):
        return
    logger.warning(
        "the %d proteins differ from the first by at most %s, like mutants. Every substitution of each of them is "
        "scored; to compare them with their wild type, pass its FASTA first and this file with --mutations",
        len(proteins),
        format_count(allowed, "residue"),
    )


def find_differences(settings: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the settings in which two runs differ."""
    return sorted(name for name in settings.keys() | other.keys() if settings.get(name) != other.get(name))


def _digest_variants(variants: Sequence[Variant]) -> str:
    """Compute the SHA-256 of the variants as they are scored and named."""
    text = json.dumps([[each.protein, each.text, each.substitutions, each.sequence] for each in variants])
    return hashlib.sha256(text.encode()).hexdigest()
