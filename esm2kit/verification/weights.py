"""Checks of the weights themselves: their digest, their shape, and whether the contact head is fitted."""

from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.contacts import has_fitted_head
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats.shards import weight_files
from esm2kit.models.hub import OFFICIAL_MODELS, compute_digest, read_declared_digest
from esm2kit.models.load import ModelFile
from esm2kit.verification.result import Check

WEIGHTS = "reading the weights"
DIGEST = "SHA-256 of the weights"
SHAPE = "architecture"
PARAMETERS = "number of parameters"
HEAD = "contact head"


def check_digests(model: str, source: ModelFile) -> list[Check]:
    """Compare the files of the weights with the digests that are pinned here, or else declared by the hub."""
    pinned = OFFICIAL_MODELS[model].sha256
    if source.format != "huggingface":
        note = f"a digest is known for Hugging Face files, and this is a {source.format} file"
        return [Check(DIGEST, "reported", "no published value", source.sha256, note=note)]
    checks = []
    files = weight_files(source.path)
    for file in files:
        declared = read_declared_digest(file) if source.download else None
        expected = pinned if pinned and file.name == "model.safetensors" else declared
        name = DIGEST if len(files) == 1 else f"{DIGEST}, {file.name}"
        found = compute_digest(file)
        if expected is None:
            note = "no digest of this file is known; the outputs below are compared"
            checks.append(Check(name, "reported", "no published value", found, note=note))
            continue
        note = "pinned in esm2kit/models/hub.py" if expected == pinned else "declared by the Hugging Face hub"
        checks.append(Check(name, "passed" if found == expected else "failed", expected, found, "exact", note))
    return checks


def check_shape(model: str, config: ESM2Config) -> Check:
    """Compare the architecture with the published one, with layer_norm_eps and token dropout."""
    expected = SIZES[model]
    verdict = "passed" if config == expected else "failed"
    return Check(SHAPE, verdict, str(expected), str(config), "exact", "Lin et al. 2023, 10.1126/science.ade2574")


def check_tensors(model: str, loaded: ESM2) -> list[Check]:
    """Count the parameters, and check that the contact head was fitted."""
    found = sum(
        parameter.numel() for name, parameter in loaded.named_parameters() if not name.startswith("contact_head.")
    )
    expected = SIZES[model].num_parameters
    count = Check(
        PARAMETERS, "passed" if found == expected else "failed", f"{expected:,}", f"{found:,}", "exact",
        "without the contact head; the tied embedding counts once",
    )  # fmt: skip
    bias = float(loaded.contact_head.regression.bias.detach())
    head = Check(
        HEAD, "passed" if has_fitted_head(loaded) else "failed", "fitted, bias not 0", f"bias {bias:.4g}", "",
        "a head that was never fitted to structures has the bias 0",
    )  # fmt: skip
    return [count, head]
