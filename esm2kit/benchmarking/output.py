"""The output folder of a benchmark: finished rows for resuming, predictions, and earlier reports."""

import csv
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from esm2kit.benchmarking.fold_scores import FoldArrays
from esm2kit.benchmarking.page import render_report
from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.benchmarking.report import Report
from esm2kit.benchmarking.scores import number_proteins
from esm2kit.core.checksums import read_npz
from esm2kit.core.errors import InputError
from esm2kit.core.files import atomic_path, to_json
from esm2kit.core.paths import portable_name
from esm2kit.core.provenance import versions
from esm2kit.sequences.ids import DIGEST_BYTES, digest_sequence
from esm2kit.tasks.split_file import SPLIT_FILE
from esm2kit.tasks.task_data import TaskData

logger = logging.getLogger(__name__)

LOGITS = ("test_logits_MC", "validation_logits_MC")  # fields of Fitted that a saved row has for classes
FILES = (SPLIT_FILE, "predictions.npz", "predictions.csv", "report.html", "report.json")


def format_folder_name(model: Path | str) -> str:
    """Return a short and unique name of a folder for a model.

    Args:
        model: An official name, a repository, or a path.

    Returns:
        The name, with -- for the / of a repository. A path in another folder is named by the run and the update of a
        checkpoint or by its last part, and by a hash of the path: `pretrain_step700-1a2b3c`.
    """
    path, here = Path(os.path.abspath(model)), Path.cwd()
    parts = path.relative_to(here).parts if path.is_relative_to(here) else path.parts
    if len(parts) <= 1:
        return portable_name(parts[0] if parts else here.name)
    if len(parts) == 2 and not path.exists() and not Path(model).is_absolute() and not path.suffix:
        return portable_name("--".join(parts))
    name = path.name.removesuffix(".safetensors")
    if path.parent.name == "checkpoints":
        step = re.match(r"step=0*(\d+)", name)
        name = f"{path.parent.parent.name}_{f'step{step[1]}' if step else name}"
    digest = hashlib.sha256("/".join(parts).encode()).hexdigest()
    return portable_name(f"{name}-{digest[:6]}")


def move_earlier_report(out_dir: Path, report: Report) -> None:
    """Move an existing report of another model, task or setting to a numbered subfolder of `earlier`.

    Args:
        out_dir: Output folder of the benchmark.
        report: Report that will be written to the folder.
    """
    if not (out_dir / "report.json").is_file():
        return
    try:
        before = Report.read(out_dir)
        if _report_key(before) == _report_key(report):
            return
        name = f"{before.task.name} {before.model.name}"
    except (InputError, KeyError, TypeError):
        name = "unreadable"
    number = 1
    while (folder := out_dir / "earlier" / str(number)).exists():
        number += 1
    folder.mkdir(parents=True)
    for file in FILES:
        if (out_dir / file).exists():
            os.replace(out_dir / file, folder / file)
    logger.info("moved the earlier report (%s) to %s", name, folder / "report.html")


def _report_key(report: Report) -> Any:
    """Return everything that determines the scores of a report."""
    hashes = {name: item["sha256"] for name, item in report.provenance["inputs"].items() if name != "embeddings"}
    embeddings, rows = report.model.embeddings.get("fingerprint"), [row.name for row in report.rows]
    swept = [] if report.layer_sweep is None else [(each.layer, each.pooling) for each in report.layer_sweep.points]
    chosen = [] if report.folds is None else [fold.selected for fold in report.folds.folds]
    return to_json([report.task, report.settings, hashes, report.model.name, embeddings, rows, swept, chosen])


def read_file_key(path: Path) -> list[Any]:
    """Return the path, size and modification time of a file."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def load_or_fit(
    folder: Path,
    name: str,
    key: Any,
    fit: Callable[[], tuple[Fitted, str]],
    is_saved: Callable[[str], bool] = lambda digest: True,
    save: Callable[[str, Fitted], None] = lambda digest, fitted: None,
) -> tuple[Fitted, str]:
    """Load a finished row if this version computed it from the same inputs; otherwise fit the model and save the row.

    Args:
        folder: Folder of the rows.
        name: Name of the row.
        key: Everything that determines the row, as JSON-compatible data.
        fit: Fits the model and returns its predictions and a note.
        is_saved: Whether the file of the row's probe exists, from the digest of the key. If it does not, the row is
            fitted again.
        save: Writes the probe of a fitted row.

    Returns:
        The predictions and the note.
    """
    key = {"inputs": key, "version": versions()["esm2kit"], "content": ("predictions", *LOGITS)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:12]}.npz"
    if path.is_file():
        try:
            stored = read_npz(path, "it is computed again")
        except InputError as error:
            logger.warning("%s", error)
            stored = {}
        if str(stored.get("digest")) == digest and is_saved(digest):
            kept = json.loads(str(stored["details"]))
            logger.debug("%s: loaded from an earlier run", name)
            logits = {name: stored[name] for name in LOGITS if name in stored}
            return Fitted(stored["test"], stored["validation"], **kept["fitted"], **logits), kept["note"]
    logger.debug("%s: fitting", name)
    fitted, note = fit()
    save(digest, fitted)
    kept = {"note": note, "fitted": {key: getattr(fitted, key) for key in ("history", "selected", "seconds")}}
    with atomic_path(path) as part, open(part, "wb") as file:
        logits = {name: getattr(fitted, name) for name in LOGITS if getattr(fitted, name) is not None}
        arrays = {"test": fitted.test_SM, "validation": fitted.validation_SM} | logits
        np.savez_compressed(file, digest=digest, details=json.dumps(kept), **arrays)
    return fitted, note


def write_report(
    report: Report,
    data: TaskData,
    predictions: Mapping[str, np.ndarray],
    out_dir: Path,
    folds: FoldArrays | None = None,
    table: str = "",
) -> Report:
    """Write report.json, report.html, predictions.npz and for folds predictions.csv, each atomically.

    Args:
        report: The results.
        data: The task.
        predictions: Row name -> test predictions (S, M).
        out_dir: Folder for the files.
        folds: Groups and folds of the predictions.
        table: Text of predictions.csv.

    Returns:
        The report with the paths of its files.
    """
    predicted_SM = predictions[report.first.name]
    shown = table or format_predictions(data, predicted_SM[0])
    page = render_report(report, data.targets[data.target_rows("test")], predicted_SM, shown)
    write_predictions(out_dir / report.files["predictions"], data, predictions, folds)
    if table:
        with atomic_path(out_dir / report.files["table"]) as part:
            part.write_text(table, encoding="utf-8", newline="")
    written = report.write(out_dir)
    with atomic_path(written.html) as part:
        part.write_text(page, encoding="utf-8")
    return written


def format_predictions(data: TaskData, predicted_M: np.ndarray) -> str:
    """Format the predictions of the test set as CSV.

    Args:
        data: The task.
        predicted_M: (M,) classes or values; (M, C) several values, or probabilities of labels.

    Returns:
        The table: id, for residue tasks the number of the residue, measured, predicted. For several targets, the last
        two of each.
    """
    rows = data.target_rows("test")
    proteins = data.protein_of_target[rows]
    if data.task.has_columns:
        return _format_several(data, predicted_M)
    columns: dict[str, Any] = {"id": [data.ids[protein] for protein in proteins]}
    if data.task.level == "residue":
        columns["residue"] = rows - data.offsets[proteins] + 1
    for name, targets in (("measured", data.targets[rows]), ("predicted", predicted_M)):
        classes = data.task.target == "class"
        columns[name] = [data.task.labels[target] if classes else f"{target:.6g}" for target in targets]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def _format_several(data: TaskData, predicted_MC: np.ndarray) -> str:
    """Format the predictions of several targets per protein, empty where no value was measured."""
    rows, names = data.target_rows("test"), data.task.columns or data.task.binary_labels
    probability = "probability of " if data.task.is_multilabel else "predicted "
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", *(f"{kind}{name}" for name in names for kind in ("measured ", probability))])
    for row, truth_C, predicted_C in zip(rows, data.targets[rows], predicted_MC, strict=True):
        pairs = zip(truth_C, predicted_C, strict=True)
        cells = ("" if np.isnan(number) else f"{number:.6g}" for pair in pairs for number in pair)
        table.writerow([data.ids[row], *cells])
    return text.getvalue()


def write_predictions(
    path: Path, data: TaskData, predictions: Mapping[str, np.ndarray], folds: FoldArrays | None = None
) -> None:
    """Write the test targets and the predictions of every row, from which `compare` recomputes the scores."""
    arrays = {} if folds is None else {"fold": folds.fold_RM, "group": folds.group_M}
    rows = data.target_rows("test")
    if data.pairs is not None:
        arrays |= {"pair": data.pairs.groups_P2[rows]}
    with atomic_path(path) as part, open(part, "wb") as file:
        np.savez_compressed(
            file,
            fingerprint=_test_fingerprint(data),
            task=data.sha256,
            truth=data.targets[rows],
            protein=number_proteins(data),
            sequence=_digest_sequences(data),
            num_targets=np.bincount(data.protein_of_target[rows], minlength=len(data.ids))[data.rows("test")],
            **arrays,
            **{f"predicted/{name}": predicted for name, predicted in predictions.items()},
        )


def _digest_sequences(data: TaskData) -> np.ndarray:
    """Digest the sequences of the test proteins: (T, DIGEST_BYTES) bytes."""
    keys = data.keys
    digests = b"".join(digest_sequence(keys[row]) for row in data.rows("test"))
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def _test_fingerprint(data: TaskData) -> str:
    """Compute the SHA-256 of the scored test set; reports with the same one can be compared in pairs."""
    rows = data.target_rows("test")
    digest = hashlib.sha256("\n".join(data.ids[row] for row in data.rows("test")).encode())
    digest.update(len(rows).to_bytes(8, "little") + data.targets[rows].tobytes())
    return digest.hexdigest()
