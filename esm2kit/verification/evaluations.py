"""Checks of what the model is used for: masked scores, contacts, and the scores of a FLIP task."""

import logging
from collections.abc import Sequence

import numpy as np

from esm2kit.benchmarking.benchmark import benchmark
from esm2kit.benchmarking.config import BenchmarkConfig
from esm2kit.core.checksums import read_sealed_json
from esm2kit.core.numbers import format_count
from esm2kit.finetuning.config import FinetuneConfig
from esm2kit.finetuning.finetune import finetune
from esm2kit.models.encoder import TOKENS_PER_BATCH, Encoder
from esm2kit.scoring.masked_passes import compute_batches, split_passes
from esm2kit.scoring.strategies import Likelihood, count_values, likelihood_passes
from esm2kit.sequences.structures import find_structures
from esm2kit.structure.config import ContactsConfig
from esm2kit.structure.contacts import predict_contacts
from esm2kit.tasks.data import load_task
from esm2kit.tasks.download import download_flip
from esm2kit.tasks.published import PUBLISHED, SCHMIRLER, SCHMIRLER_FINETUNED, PublishedScore
from esm2kit.verification.config import VerifyConfig
from esm2kit.verification.entries import download_entries
from esm2kit.verification.golden import Golden, describe_published_precision
from esm2kit.verification.result import Check, check_number

logger = logging.getLogger(__name__)
PERPLEXITY = "pseudo-perplexity"
CONTACTS = "contact precision"
PROBE = "probe on a FLIP task"
FINETUNED = "fine-tuning on a FLIP task"
MAX_TOKENS = 1024
NO_VALUE = "no published value"


def check_perplexity(golden: Golden, encoder: Encoder, sequences: Sequence[str]) -> Check:
    """Compute the pseudo-perplexity of proteins: every residue is predicted while it alone is hidden."""
    steps = [likelihood_passes(sequence, MAX_TOKENS) for sequence in sequences]
    # single passes share batches; the values are in the order of the passes
    passes = [[each] for step in steps for each in step]
    batches = split_passes(passes, TOKENS_PER_BATCH[encoder.device.type])
    values = np.concatenate(list(compute_batches(encoder, batches, None)))
    found = Likelihood(float(values.sum(dtype=np.float64)), sum(map(count_values, steps))).pseudo_perplexity
    about = f"{format_count(len(sequences), 'protein')}, {format_count(len(values), 'residue')}"
    if (expected := golden.numbers.get("pseudo_perplexity")) is None:
        note = f"{about}; 1 is a certain model, 20 one that guesses. Published perplexities are of other proteins"
        return Check(PERPLEXITY, "reported", NO_VALUE, f"{found:.4g}", note=note)
    return check_number(PERPLEXITY, found, expected.value, expected.atol, f"{about}; {expected.source}")


def check_contacts(config: VerifyConfig, golden: Golden, model: str) -> Check:
    """Compute the precision of the L most probable long-range contacts of structures."""
    if config.structures is None:
        note = "no structures: pass a folder of PDB or mmCIF files as --structures, or pdb to download eight entries"
        return Check(CONTACTS, "not checked", note=note)
    if config.downloads_structures:
        entries = download_entries(config.out_dir / "structures")
        files, structures, missing = entries.fasta, entries.folder, entries.missing
    else:
        files, structures, missing = find_structures(config.structures), None, []
    result = predict_contacts(
        ContactsConfig(
            files, config.out_dir / "contacts", "verify", model, structures,
            pictures=0, precision="float32", device=config.device, restart=True,
        )
    )  # fmt: skip
    rows = read_sealed_json(result.summary, "verify again")["summary"] if result.summary else []
    row = next((row for row in rows if (row["range"], row["top"]) == ("long", "L")), None)
    if row is None:
        return Check(CONTACTS, "could not check", note="no structure has residues that are 24 or more apart")
    found, baseline = row["precision"]["value"], row["baseline"]["value"]
    note = (
        f"precision at L, long range, over {format_count(row['proteins'], 'protein')}; by the separation along the "
        f"chain alone {baseline:.3f}"
    )
    if missing:
        note += f"; {format_count(len(missing), 'entry', 'entries')} not downloaded"
    if published := describe_published_precision(config.model):
        note += f"; {published}"
    if (expected := golden.numbers.get("contact_precision")) is None:
        return Check(CONTACTS, "reported", NO_VALUE, f"{found:.3f}", note=note)
    return check_number(CONTACTS, found, expected.value, expected.atol, f"{note}; {expected.source}")


def check_probe(config: VerifyConfig, model: str) -> Check:
    """Compare a probe of the published protocol with its published score."""
    name, published = _find_published(config, PROBE, config.model, SCHMIRLER[0])
    if published is None:
        return _explain_missing(config, name)
    if notes := _find_differences(config):
        return Check(name, "could not check", note=notes)
    report = benchmark(
        BenchmarkConfig(
            task=config.task, split=config.split, data_dir=config.data_dir, model=model, preset="schmirler",
            untrained=False, baselines=[], resamples=config.resamples, device=config.device,
            out_dir=config.out_dir / "probe",
        )
    )  # fmt: skip
    metric = report.rows[0].metrics[published.metric]
    return _compare_score(config, name, published, metric.value, metric.low, metric.high)


def check_finetuning(config: VerifyConfig, model: str) -> Check:
    """Compare a fine-tuned model of the published recipe, one seed, with its published score."""
    name, published = _find_published(config, FINETUNED, f"{config.model}, fine-tuned", SCHMIRLER_FINETUNED[0])
    if published is None:
        return _explain_missing(config, name)
    if notes := _find_differences(config):
        return Check(name, "could not check", note=notes)
    result = finetune(
        FinetuneConfig(
            task=config.task, split=config.split, data_dir=config.data_dir, model=model, preset="schmirler",
            benchmark=False, resamples=config.resamples, accelerator=config.device,
            out_dir=config.out_dir / "finetuned",
        )
    )  # fmt: skip
    if not result["finished"]:
        return Check(name, "could not check", note="stopped; run the command again to resume")
    metric = result["test"][published.metric]
    return _compare_score(config, name, published, metric["value"], metric["low"], metric["high"])


def _find_published(config: VerifyConfig, check: str, model: str, source: str) -> tuple[str, PublishedScore | None]:
    """Return the name of the check, and the published score of a model; None without one or without --full."""
    fits = ((config.task, config.split, model, source) == _key(entry) for entry in PUBLISHED)
    found = next((entry for entry, is_it in zip(PUBLISHED, fits, strict=True) if is_it), None)
    return f"{check}: {config.task} {config.split}", found if config.full else None


def _key(entry: PublishedScore) -> tuple[str, str, str, str]:
    return entry.task, entry.split, entry.model, entry.source


def _find_differences(config: VerifyConfig) -> str:
    """Download the task; returns the notes on it if its sets are not those of FLIP, else an empty text."""
    download_flip(config.task, config.data_dir, config.split)
    data = load_task(config.task, config.split, config.data_dir)
    return "" if data.official else "; ".join(data.notes)


def _explain_missing(config: VerifyConfig, name: str) -> Check:
    if not config.full:
        return Check(name, "not checked", note="takes long: --full compares with published scores")
    return Check(name, "not checked", note=f"no published value for {config.model}")


def _compare_score(
    config: VerifyConfig,
    name: str,
    published: PublishedScore,
    value: float | None,
    low: float | None,
    high: float | None,
) -> Check:
    shown = "undefined" if value is None else f"{value:.3f}"
    shown += "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    note = f"{published.metric} on test; {published.source}: {published.difference}"
    found = float("nan") if value is None else value
    return check_number(name, found, published.value, config.margin, note, shown)
