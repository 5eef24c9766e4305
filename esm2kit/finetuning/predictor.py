"""Find the model that `esm2kit predict` uses: a fine-tuned model, a saved probe, or the best probe of a benchmark."""

import logging
from pathlib import Path

from esm2kit.benchmarking.report import Report, format_value, metric_name
from esm2kit.benchmarking.saved_probe import FOLDER, SavedProbe, is_probe, load_probe
from esm2kit.core.errors import InputError
from esm2kit.core.paths import expand_path
from esm2kit.finetuning.model_file import FILE, FinetunedModel, load_finetuned
from esm2kit.models.encoder import Precision
from esm2kit.models.sharded import Shard

logger = logging.getLogger(__name__)

Predictor = FinetunedModel | SavedProbe


def load_predictor(
    path: Path,
    base: str | None = None,
    device: str = "cpu",
    precision: Precision = "auto",
    layer_by_layer: bool | None = None,
    shard: Shard = False,
) -> Predictor:
    """Load a model that predicts labels.

    Args:
        path: A fine-tuned model or its folder, the folder of a benchmark, or a saved probe. In the folder of a
            benchmark, the row with the best score on validation predicts.
        base: Encoder of adapters or of a probe. Default: its location during training.
        device: auto, cpu, cuda or mps.
        precision: See `Encoder`.
        layer_by_layer: See `load_encoder`.
        shard: See `load_encoder`.

    Returns:
        The model.

    Raises:
        InputError: There is no such model, a file is damaged, or the encoder has other weights.
    """
    path = expand_path(path)
    has_finetuned = path.is_dir() and ((path / FILE).is_file() or any(path.glob(f"seed=*/{FILE}")))
    if path.is_dir() and not has_finetuned:
        folder = path.parent if path.name == FOLDER and not (path / "report.json").exists() else path
        if (folder / "report.json").is_file():
            return load_probe(_choose_probe(folder), base, device, precision, layer_by_layer, shard)
        reports = sorted(report.parent.name for report in folder.glob("*/report.json"))
        if reports:
            raise InputError(
                f"{path} contains the benchmarks of several tasks ({', '.join(reports)}). Choose one of these folders.",
                code="predict.several",
                path=path,
                found=reports,
            )
        raise InputError(
            f"{path} holds neither a fine-tuned model ({FILE}) nor a benchmark's report.json. Pass the out_dir of a "
            "finished `esm2kit finetune` or `esm2kit benchmark`.",
            code="predict.no-model",
            path=path,
        )
    if path.is_file() and path.name != FILE and is_probe(path):
        return load_probe(path, base, device, precision, layer_by_layer, shard)
    return load_finetuned(path, base, device, precision, layer_by_layer, shard)


def _choose_probe(folder: Path) -> Path:
    """Return the file of the probe with the best score on validation in the report of a folder."""
    report = Report.read(folder)
    row = report.best_predictor
    if row is None:
        raise InputError(
            f"{folder}: no row of this report was saved as a probe. Run the benchmark again with --model, then predict "
            f"with the same folder.",
            code="predict.no-probe",
            path=folder,
        )
    path = folder / row.probe_file
    if not path.is_file():
        raise InputError(
            f"{path} is missing: {row.name!r} is the best row of this report. Run the benchmark again.",
            code="predict.probe-missing",
            path=path,
            row=row.name,
        )
    metric = report.task.metric
    logger.info(
        "%s predicts: its %s on validation, %s, is the best of %d rows",
        *(row.name, metric_name(metric), format_value(metric, row.validation)),
        sum(bool(other.probe_file) for other in report.rows),
    )
    return path
