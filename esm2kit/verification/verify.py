"""`esm2kit verify`: whether this installation computes what was published for an official model."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from esm2kit.core.checksums import write_sealed_json
from esm2kit.core.errors import InputError, check_type
from esm2kit.core.hardware import resolve_device
from esm2kit.core.paths import find_packaged_file
from esm2kit.core.provenance import build_provenance
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2
from esm2kit.models.load import ModelFile, find_model
from esm2kit.sequences.fasta import find_fasta_files, read_fasta
from esm2kit.verification.config import VerifyConfig
from esm2kit.verification.evaluations import (
    CONTACTS,
    FINETUNED,
    PERPLEXITY,
    PROBE,
    check_contacts,
    check_finetuning,
    check_perplexity,
    check_probe,
)
from esm2kit.verification.golden import Golden, read_golden
from esm2kit.verification.outputs import (
    GOLDEN,
    MAX_RESIDUES,
    REFERENCES,
    check_golden,
    check_reference,
    check_tokens,
    choose_masked,
    compute_outputs,
)
from esm2kit.verification.result import EXIT_CODES, Check, Verdict, conclude, format_table
from esm2kit.verification.weights import WEIGHTS, check_digests, check_shape, check_tensors

logger = logging.getLogger(__name__)
SCHEMA = "esm2kit.verify/1"
FILE = "verify.json"
SAMPLE = "data/sample/uniref50_valid.fasta"
COMPARED = 2  # proteins that are compared with other implementations


class VerifyResult(NamedTuple):
    """The result of a verification.

    Args:
        verdict: "passed", "failed" or "could not check", and the checks that it is about.
        status: the first of these words.
        exit_code: 0, 3 or 4.
        checks: the lines of the table.
        report: the sealed JSON file.
        files: all files.
    """

    verdict: str
    status: str
    exit_code: int
    checks: tuple[Check, ...]
    report: Path
    files: tuple[Path, ...]

    @property
    def table(self) -> str:
        """The table as text."""
        return format_table(self.checks)


def verify(config: VerifyConfig) -> VerifyResult:
    """Check the weights and the outputs of an official model against published values.

    Args:
        config: the model and what is checked.

    Returns:
        The checks with their verdicts; "passed" only if at least one output was compared with another program's.

    Raises:
        InputError: a file that was given cannot be read.
    """
    check_type(config, VerifyConfig, "config")
    config.check_inputs()
    golden = read_golden(config.model, config.golden)
    sequences = _read_proteins(config)
    checks = check_tokens(golden)
    digests: dict[str, Path | str] = {}
    try:
        source = find_model(str(config.weights or config.model))
        checks += check_digests(config.model, source)
        digests["model"] = source.sha256
        checks.append(check_shape(config.model, source.config))
        model = source.load()
        checks += check_tensors(config.model, model)
    except InputError as error:
        checks = [*_explain_weights(checks, error), *_list_unchecked(config)]
    else:
        for check in _list_checks(config, golden, source, model, sequences):
            checks += check()
    status, verdict = conclude(checks)
    for line in format_table(checks).splitlines():
        logger.info("%s", line)
    logger.info("%s", verdict)
    report = Path(config.out_dir) / FILE
    provenance = build_provenance("verify", config, digests)
    content = {"schema": SCHEMA, "model": config.model, "status": status, "verdict": verdict}
    write_sealed_json(report, content | {"checks": [each._asdict() for each in checks], "provenance": provenance})
    return VerifyResult(verdict, status, EXIT_CODES[status], tuple(checks), report, (report,))


def _read_proteins(config: VerifyConfig) -> list[str]:
    """Read the first proteins of the FASTA."""
    files = find_fasta_files(config.fasta or find_packaged_file(SAMPLE))
    records = (record for file in files for record in read_fasta(file))
    return [record.sequence for record in islice(records, config.proteins)]


def _explain_weights(checks: list[Check], error: InputError) -> list[Check]:
    """Add the reason why the weights cannot be read."""
    if error.code == "hub.digest":  # the comparison of the digests is among the checks
        return [check._replace(note=str(error)) if check.verdict == "failed" else check for check in checks]
    verdict: Verdict = "could not check" if error.code.startswith("hub.") else "failed"
    return [*checks, Check(WEIGHTS, verdict, note=str(error))]


def _list_unchecked(config: VerifyConfig) -> list[Check]:
    """List the checks that need the weights, for weights that cannot be used."""
    references = [f"equal to {reference.name}" for reference in REFERENCES]
    names = [GOLDEN, *references, PERPLEXITY, *([CONTACTS] if config.structures else [])]
    names += [PROBE, FINETUNED] if config.full else []
    return [Check(name, "could not check", note="without the weights") for name in names]


def _list_checks(
    config: VerifyConfig, golden: Golden, source: ModelFile, model: ESM2, sequences: Sequence[str]
) -> Iterator[Callable[[], list[Check]]]:
    """List the checks of the outputs; each is computed when it is called."""
    name = str(config.weights or config.model)
    encoder = Encoder(model, "float32", resolve_device(config.device))
    if golden.outputs:
        yield partial(check_golden, golden, encoder)
    else:
        note = f"data/golden has no reference outputs of {config.model}"
        yield lambda: [Check(GOLDEN, "not checked", "not available for this model", note=note)]
    compared = [sequence[:MAX_RESIDUES] for sequence in sequences[:COMPARED]]
    own: list[Any] = []
    for reference in REFERENCES:
        is_folder = reference.name == "transformers" and source.format == "huggingface"

        def check(reference: Any = reference, weights: Path | None = source.path if is_folder else None) -> list[Check]:
            if not own:
                own.extend(compute_outputs(model, encoder, compared, choose_masked(compared)))
            return check_reference(reference, model, weights, own, compared)

        yield check
    yield lambda: [check_perplexity(golden, encoder, sequences)]
    for evaluate in (partial(check_contacts, config, golden, name), partial(check_probe, config, name),
                     partial(check_finetuning, config, name)):  # fmt: skip
        yield partial(_try, evaluate, config)


def _try(evaluate: Callable[[], Check], config: VerifyConfig) -> list[Check]:
    """Run a check that reads other files than the weights; an error is a check that could not be made."""
    names = {"check_contacts": CONTACTS, "check_probe": PROBE, "check_finetuning": FINETUNED}
    try:
        return [evaluate()]
    except InputError as error:
        return [Check(names[evaluate.func.__name__], "could not check", note=str(error))]
