"""`esm2kit contacts`: contact maps of all proteins in one file, their pictures, and their precision.

The folder `<out_dir>/<name>_contacts.part/` of an unfinished run contains the file with space for all values, and a
journal of the batches that were written, each with its checksum. An interrupted run resumes from there.
"""

import errno
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from esm2kit.core.checksums import FileChecksums, read_sealed_json, write_sealed_json
from esm2kit.core.errors import InputError, check_type
from esm2kit.core.files import BINARY, check_output_folder, fsync, hold_lock, read_at, write_at
from esm2kit.core.hardware import explain_out_of_memory, resolve_device
from esm2kit.core.paths import portable_name
from esm2kit.core.progress import Progress
from esm2kit.core.provenance import build_provenance
from esm2kit.models.contacts import has_fitted_head
from esm2kit.models.encoder import TOKENS_PER_BATCH, log_precision, resolve_precision
from esm2kit.models.esm2 import ESM2
from esm2kit.models.initialise import build_meta_model
from esm2kit.models.layerwise import LayerwiseEncoder, fits_in_memory
from esm2kit.models.load import find_model
from esm2kit.sequences.batching import group_batches, split_by_tokens
from esm2kit.sequences.fasta import find_fasta_files, strip_fasta_suffix
from esm2kit.sequences.pipes import copy_pipes
from esm2kit.sequences.structures import find_structures, is_structure_name, strip_structure_suffix
from esm2kit.structure.attention import ContactModel
from esm2kit.structure.config import ContactsConfig
from esm2kit.structure.contact_file import (
    REMEDY,
    ContactReader,
    create_contact_file,
    pack,
    seal_contact_file,
)
from esm2kit.structure.evaluate import (
    describe_summary,
    find_truths,
    score_proteins,
    summarise,
    write_summary,
    write_table,
)
from esm2kit.structure.inputs import Protein, read_proteins
from esm2kit.structure.pictures import draw_pictures

logger = logging.getLogger(__name__)
SYNC_SECONDS = 10.0  # work that a power failure can lose
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# a finished batch: its index, the CRC-32 of its values, and the CRC-32 of these two
ENTRY = np.dtype([("number", "<i8"), ("values", "<u4"), ("entry", "<u4")])
FILE, JOURNAL, PLAN = "contacts.h5", "done.bin", "plan.json"


class ContactsResult(NamedTuple):
    """Files of a run.

    Args:
        contacts: contact maps of all proteins; read them with `ContactReader`.
        precision: table of the precision of each protein with a structure. None without structures.
        summary: means with intervals, JSON. None without structures.
        num_proteins: number of proteins.
        num_structures: number of proteins with a structure.
        verdict: the long-range precision in one sentence. None without structures.
        files: all files.
    """

    contacts: Path
    precision: Path | None
    summary: Path | None
    num_proteins: int
    num_structures: int
    verdict: str | None
    files: tuple[Path, ...]


def predict_contacts(config: ContactsConfig) -> ContactsResult:
    """Predict the contacts of all proteins of a FASTA, and compare them with structures.

    A file that exists from the same input, model and settings is not computed again. An interrupted run resumes when
    the function is called again.

    Args:
        config: input, model, structures and settings.

    Returns:
        The files.

    Raises:
        InputError: the input or a structure is invalid, the model's contact head was never fitted, a file or an
            unfinished run with other settings exists, or the disk is full.
    """
    check_type(config, ContactsConfig, "config")
    out_dir = Path(config.out_dir)
    check_output_folder(out_dir)
    files = find_fasta_files(config.fasta)
    first = files[0]
    stem = strip_structure_suffix(first) if is_structure_name(first.name) else strip_fasta_suffix(first)
    name = config.name or portable_name(stem)
    with copy_pipes(files, out_dir, f"{name}_input.fasta") as files:
        proteins = read_proteins(files, config.linker, config.max_residues)
        paths = [] if config.structures is None else find_structures(config.structures)
        truths = find_truths(proteins, paths)
        run = ContactRun(config, name, files, proteins)
        busy = f"{run.folder}: another process works on it. Wait for it, or use another --name."
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(run.folder.with_name(f".{run.folder.name}.lock"), busy):
            run.compute()
    made: list[Path] = []
    verdict = None
    with ContactReader(run.target) as reader:
        scored = score_proteins(proteins, truths, reader) if truths else []
        if scored:
            made = list_precision_files(run.target)
            summary = summarise(scored)
            verdict = describe_summary(summary)
            made[1].unlink(missing_ok=True)  # of the comparison that this one replaces
            write_table(made[0], scored)
            used = {truth.structure.path.name: truth.structure.path for truth in truths.values()}
            about = {"model_name": run.model.name, "values": config.values, "verdict": verdict}
            about |= {"proteins": len(proteins), "with_structure": len(truths)}
            about |= {"checksums": {made[0].name: FileChecksums.compute(made[0])}}
            provenance = build_provenance("contacts", config, run.inputs | used)
            write_summary(made[1], summary, about | {"provenance": provenance})
            logger.info("%s: %s", run.model.name, verdict)
        folder = out_dir / f"{name}_contacts"
        pictures = draw_pictures(folder, config.pictures, config.format, proteins, truths, scored, reader)
    table, report = made or (None, None)
    written = (*made, *pictures, run.target)
    return ContactsResult(run.target, table, report, len(proteins), len(truths), verdict, written)


def list_precision_files(contacts: Path) -> list[Path]:
    """List the paths of the table and the summary of the precision of a file of contacts.

    Args:
        contacts: its path.

    Returns:
        The two paths; the files need not exist.
    """
    stem = contacts.name.removesuffix("_contacts.h5")
    return [contacts.with_name(f"{stem}_precision.{suffix}") for suffix in ("tsv", "json")]


class ContactRun:
    """One call of `predict_contacts`: its model, its settings and its working folder.

    Args:
        config: options of the call.
        name: prefix of the files.
        files: the input.
        proteins: the proteins of the input.
    """

    def __init__(self, config: ContactsConfig, name: str, files: Sequence[Path], proteins: Sequence[Protein]) -> None:
        self.config, self.proteins = config, proteins
        self.device = torch.device(resolve_device(config.device))
        self.model = find_model(config.model)
        self.folder = Path(config.out_dir) / f"{name}_contacts.part"
        self.target = Path(config.out_dir) / f"{name}_contacts.h5"
        names = ["fasta"] if len(files) == 1 else [f"fasta_{number}" for number in range(len(files))]
        self.inputs: dict[str, Path | str] = dict(zip(names, files, strict=True)) | {"model": self.model.sha256}
        self.precision = resolve_precision(config.precision, self.device)
        self.batch_tokens = config.batch_tokens or TOKENS_PER_BATCH[self.device.type]
        num_tokens = [len(protein.join(config.linker)) + 2 for protein in proteins]
        self.batches = split_by_tokens(num_tokens, self.batch_tokens)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that determines the values; a run resumes only if they are equal."""
        ignored = {"fasta", "out_dir", "name", "model", "structures", "pictures", "format", "device", "restart"}
        ignored |= {"layer_by_layer"}
        settings = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        settings = {name: value for name, value in settings.items() if name not in ignored}
        provenance = build_provenance("contacts", self.config, self.inputs)
        digests = {name: entry["sha256"] for name, entry in provenance["inputs"].items()}
        resolved = {"batch_tokens": self.batch_tokens, "precision": self.precision}
        return json.loads(json.dumps(settings | digests | resolved, sort_keys=True))

    def compute(self) -> None:
        """Compute the maps that do not exist yet, and write the file.

        Raises:
            InputError: as `predict_contacts`.
            OSError: a failure of the file system other than a full disk.
        """
        if self._exists():
            logger.info("%s already exists, from the same input, model and settings", self.target)
            return
        plan = self._read_plan()
        model, layers = self._load()
        if self.config.values == "contacts" and not has_fitted_head(model):
            raise InputError(
                f"the contact head of {self.model.name} was never fitted to structures, so it has no contact "
                "probabilities. Use --values coupling for its attention, or an official model such as --model 8M.",
                code="contacts.unfitted",
                model=self.model.name,
            )
        log_precision(self.config.precision, self.precision, self.device)
        contact_model = ContactModel(model, self.config.values, self.precision, self.device, layers)
        try:
            starts_P = self._create() if plan is None else np.array(plan["starts"], dtype=np.int64)
            self._work(contact_model, starts_P)
            seal_contact_file(self.folder / FILE)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise InputError(
                f"{self.folder}: the disk is full. Free some space and rerun the command to resume.",
                code="disk.full",
                path=self.folder,
            ) from None
        finally:
            if layers:
                layers.close()
        for path in list_precision_files(self.target):
            path.unlink(missing_ok=True)  # of the contacts that this file replaces
        os.replace(self.folder / FILE, self.target)
        fsync(self.target.parent)
        shutil.rmtree(self.folder)

    def _load(self) -> tuple[ESM2, LayerwiseEncoder | None]:
        """Load the model; if it does not fit, only its contact head in float32, and what reads the layers."""
        chosen, where = self.config.layer_by_layer, (self.precision, self.device)
        if chosen is None:
            chosen = not fits_in_memory(self.model.config, self.model.name, *where, self.batch_tokens)
        if not chosen:
            return self.model.load(), None
        weights = self.model.open()
        model = build_meta_model(weights.config)
        head = weights.read(name for name in weights.names if name.startswith("contact_head."))
        model.load_state_dict(head, strict=False, assign=True)
        return model, LayerwiseEncoder(weights, *where, self.batch_tokens, fused=False)

    def _exists(self) -> bool:
        """Return whether the file exists from the same settings; it is an error if it has others."""
        if self.config.restart or not self.target.exists():
            return False
        with ContactReader(self.target) as reader:
            differing = _find_differences(self.settings, reader.attributes["settings"])
            if not differing:
                reader.check()
        if differing:
            raise InputError(
                f"{self.target} already exists with different settings ({', '.join(differing)}). Use --restart to "
                "replace it, or another --name to keep both.",
                code="contacts.file-exists",
                path=self.target,
                differing=differing,
            )
        return True

    def _read_plan(self) -> dict[str, Any] | None:
        """Read the plan of an unfinished run; None if there is none to resume."""
        path = self.folder / PLAN
        if self.config.restart or not path.is_file():
            return None
        plan = read_sealed_json(path, REMEDY)
        if differing := _find_differences(self.settings, plan["settings"]):
            raise InputError(
                f"{self.folder} contains an unfinished run with different settings ({', '.join(differing)}). Use "
                "--restart to delete it, or another --name to keep both.",
                code="contacts.run-exists",
                path=self.folder,
                differing=differing,
            )
        logger.info("resuming the unfinished run in %s", self.folder)
        return plan

    def _create(self) -> np.ndarray:
        """Create the file and the plan; returns the byte at which each protein's values start."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        num_bytes = sum(each.num_residues * (each.num_residues + 1) // 2 for each in self.proteins)
        num_bytes *= np.dtype(self.config.dtype).itemsize
        free = shutil.disk_usage(self.folder).free
        if num_bytes > free:
            shutil.rmtree(self.folder)
            raise InputError(
                f"{self.folder.parent} has {free / 1e6:,.0f} MB free, but the contacts need {num_bytes / 1e6:,.0f} MB. "
                "Free some space, or use --dtype float16.",
                code="disk.full",
                path=self.folder.parent,
                needed=num_bytes,
                free=free,
            )
        provenance = build_provenance("contacts", self.config, self.inputs) | {"model": self.model.record()}
        attributes = {
            "model_name": self.model.name,
            "values": self.config.values,
            "precision": self.precision,
            "linker": self.config.linker,
            "settings": json.dumps(self.settings, sort_keys=True),
            "provenance": json.dumps(provenance),
        }
        starts_P = create_contact_file(self.folder / FILE, self.proteins, self.config.dtype, attributes)
        fsync(self.folder / FILE)
        write_sealed_json(self.folder / PLAN, {"settings": self.settings, "starts": starts_P.tolist()})
        return starts_P

    def _work(self, model: ContactModel, starts_P: np.ndarray) -> None:
        """Compute the batches that are not in the journal."""
        handle = os.open(self.folder / FILE, os.O_RDWR | BINARY)
        journal = os.open(self.folder / JOURNAL, os.O_RDWR | os.O_CREAT | BINARY, 0o644)
        pending: list[tuple[int, int]] = []
        position = 0
        try:
            done = self._read_done(handle, journal, starts_P)
            position = len(done) * ENTRY.itemsize
            _rewrite(journal, done)
            left = [number for number in range(len(self.batches)) if number not in done]
            total = sum(self.proteins[row].num_residues for batch in self.batches for row in batch)
            start = total - sum(self.proteins[row].num_residues for number in left for row in self.batches[number])
            progress = Progress(logger, f"{self.model.name}: contacts computed for", "residues", total, start)
            synced = time.monotonic()
            with progress:
                for number, maps in self._predict(model, left):
                    pending.append((number, self._write_batch(maps, self.batches[number], handle, starts_P)))
                    residues = sum(self.proteins[row].num_residues for row in self.batches[number])
                    progress.update(progress.done + residues)
                    if time.monotonic() - synced > SYNC_SECONDS:
                        position = _record(handle, journal, position, pending)
                        synced = time.monotonic()
            if left:
                progress.log()
        except KeyboardInterrupt:
            logger.warning("stopped; rerun the command to resume")
            raise
        finally:
            try:
                _record(handle, journal, position, pending)
            finally:
                os.close(handle)
                os.close(journal)

    def _predict(self, model: ContactModel, numbers: list[int]) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Compute the maps of batches: one at a time, or as many as the layers are read for."""

        def join(number: int) -> list[str]:
            return [self.proteins[row].join(self.config.linker) for row in self.batches[number]]

        def count_tokens(number: int) -> int:
            return sum(len(sequence) + 2 for sequence in join(number))

        if not model.layers:
            for number in numbers:
                with self._explain_memory([number]):
                    maps = model.predict(join(number))
                yield number, maps
            return
        for group in group_batches(numbers, count_tokens, model.layers.group_tokens):
            with self._explain_memory(group):
                found = model.predict_batches([join(number) for number in group])
            yield from zip(group, found, strict=True)

    def _write_batch(self, maps: list[np.ndarray], batch: np.ndarray, handle: int, starts_P: np.ndarray) -> int:
        """Write the maps of a batch; returns the CRC-32 of its values."""
        crc, linker = 0, self.config.linker
        for row, map_TT in zip(batch.tolist(), maps, strict=True):
            kept_T = self.proteins[row].locate_residues(linker)
            values = pack(map_TT[np.ix_(kept_T, kept_T)], self.config.dtype)
            crc = zlib.crc32(values, crc)
            _write_all(handle, values, int(starts_P[row]))
        return crc

    def _explain_memory(self, numbers: Sequence[int]) -> AbstractContextManager[None]:
        """Return the context in which exhausted memory names what needs less than these batches.

        Most remedies change the settings of the unfinished run, so it starts anew.
        """
        rows = np.concatenate([self.batches[number] for number in numbers])
        longest = max((self.proteins[row] for row in rows), key=lambda protein: protein.num_residues)
        action = f"computing the contacts of {len(rows):,} proteins of up to {longest.num_residues:,} residues together"

        def list_remedies() -> list[str]:
            found = []
            if len(rows) > 1:
                found.append(f"--batch_tokens {max(1, self.batch_tokens // 2)} --restart")
            if self.device.type != "cpu":
                found.append("--device cpu --restart")
            if len(rows) == 1:
                found.append(f"a FASTA without protein {longest.id!r}")
            return [*found, "a smaller --model with --restart"]

        return explain_out_of_memory(action, list_remedies)

    def _read_done(self, handle: int, journal: int, starts_P: np.ndarray) -> dict[int, int]:
        """Read the finished batches whose values are still as they were written; others are computed again."""
        data = read_at(journal, os.fstat(journal).st_size, 0)
        entries = np.frombuffer(data[: len(data) // ENTRY.itemsize * ENTRY.itemsize], ENTRY)
        done = {
            int(entry["number"]): int(entry["values"])
            for entry in entries
            if zlib.crc32(entry.tobytes()[:12]) == entry["entry"] and 0 <= entry["number"] < len(self.batches)
        }
        itemsize = np.dtype(self.config.dtype).itemsize
        for number in list(done):
            crc = 0
            for row in self.batches[number].tolist():
                size = self.proteins[row].num_residues
                crc = zlib.crc32(read_at(handle, size * (size + 1) // 2 * itemsize, int(starts_P[row])), crc)
            if crc != done[number]:
                del done[number]
        return done


def _find_differences(settings: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(name for name in settings.keys() | other.keys() if settings.get(name) != other.get(name))


def _write_all(handle: int, values: np.ndarray, start: int) -> None:
    """Write values at a byte offset; a partial write is possible on an almost full disk."""
    data = memoryview(values).cast("B")
    while data:
        written = write_at(handle, data, start)
        data, start = data[written:], start + written


def _encode(finished: Sequence[tuple[int, int]]) -> np.ndarray:
    entries = np.array([(number, values, 0) for number, values in finished], dtype=ENTRY)
    entries["entry"] = [zlib.crc32(entry.tobytes()[:12]) for entry in entries]
    return entries.view(np.uint8)


def _rewrite(journal: int, done: dict[int, int]) -> None:
    """Leave only the entries of correct batches in the journal."""
    os.ftruncate(journal, 0)
    if done:
        _write_all(journal, _encode(list(done.items())), 0)


def _record(handle: int, journal: int, position: int, pending: list[tuple[int, int]]) -> int:
    """Sync the values to the disk, then append their batches to the journal; returns the journal's new end."""
    if not pending:
        return position
    os.fsync(handle)
    entries = _encode(pending)
    _write_all(journal, entries, position)
    os.fsync(journal)
    pending.clear()
    return position + entries.size
