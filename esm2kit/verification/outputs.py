"""Checks of the model's outputs against published values and against other implementations."""

import importlib.metadata
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from esm2kit.core.errors import InputError
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2
from esm2kit.models.formats.fair_esm import save_fair_esm
from esm2kit.models.formats.huggingface import save_hf
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, MASK_IDX, encode
from esm2kit.structure.attention import ContactModel
from esm2kit.verification.golden import Golden, GoldenOutput
from esm2kit.verification.result import Check, check_arrays

TOKENIZER = "tokens of a sequence"
GOLDEN = "published outputs"
# allowed difference between two float32 implementations, which sum in different orders
ATOL = RTOL = 1e-4
MAX_RESIDUES = 200  # of the proteins that are compared; the time of attention grows with the square
# What another program may raise; `esm` of EvolutionaryScale has the name of fair-esm's module and other contents.
FAULTS = (ImportError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)
MASKED = 7  # residue of the second protein that is hidden, which changes the scale of token dropout


class Outputs(NamedTuple):
    """What a program computes for one sequence.

    Args:
        logits_TV: with BOS and EOS.
        hidden_TD: final layer, with BOS and EOS.
        contacts_TT: contact probabilities of the residues.
    """

    logits_TV: np.ndarray
    hidden_TD: np.ndarray
    contacts_TT: np.ndarray


class Reference(NamedTuple):
    """Another implementation of ESM-2.

    Args:
        name: for the table.
        package: its distribution.
        compute: (folder or file of the weights, sequences, masked) -> outputs.
        save: writes the model for it.
        file: name of what `save` writes.
    """

    name: str
    package: str
    compute: Callable[[Path, Sequence[str], Sequence[int | None]], list[Outputs]]
    save: Callable[[ESM2, Path], None]
    file: str


def tokenize(sequence: str, masked: int | None = None) -> np.ndarray:
    """Convert a sequence to token ids with BOS and EOS; the residue `masked`, from 0, is hidden."""
    tokens_T = np.array([BOS_IDX, *encode(sequence), EOS_IDX], dtype=np.int64)
    if masked is not None:
        tokens_T[masked + 1] = MASK_IDX
    return tokens_T


def check_tokens(golden: Golden) -> list[Check]:
    """Compare the token ids of a sequence with published ones."""
    checks = []
    for block in golden.outputs:
        letters = block.tokens.removeprefix("<cls>").removesuffix("<eos>").split()
        if letters and block.tokens.startswith("<cls>") and block.tokens.endswith("<eos>"):
            found = tokenize("".join(letters))
            verdict = "passed" if found.tolist() == list(block.input_ids) else "failed"
            expected = " ".join(map(str, block.input_ids))
            checks.append(Check(TOKENIZER, verdict, expected, " ".join(map(str, found)), "exact", block.tokens))
    return checks


def check_golden(golden: Golden, encoder: Encoder) -> list[Check]:
    """Compare logits and hidden states with published values."""
    return [_check_output(block, encoder) for block in golden.outputs]


def _check_output(block: GoldenOutput, encoder: Encoder) -> Check:
    tokens_T, last = torch.tensor(block.input_ids), encoder.config.num_layers
    found = encoder.encode(tokens_T, [len(tokens_T)], [last])[last]  # packed: no token is padding, as published
    if block.output == "logits":
        found = encoder.logits(found)
    name, note = f"{block.name}: {block.what}", block.source
    if tuple(found.shape) != block.shape:
        shown = (f"shape {block.shape}", f"shape {tuple(found.shape)}")
        return Check(name, "failed", *shown, "exact", note, True)
    rows, columns = block.values.shape
    return check_arrays(name, found[:rows, :columns].numpy(), block.values, block.atol, block.rtol, note)


def compute_outputs(
    model: ESM2, encoder: Encoder, sequences: Sequence[str], masked: Sequence[int | None]
) -> list[Outputs]:
    """Compute the outputs as esm2kit's stages do; contacts are those of the sequences without a hidden residue."""
    last = encoder.config.num_layers
    outputs = []
    # contacts: one sequence at a time, as the batch must be ordered by length
    contact_model = ContactModel(model, "contacts", "float32", encoder.device)
    for sequence, place in zip(sequences, masked, strict=True):
        tokens_T = torch.from_numpy(tokenize(sequence, place))
        hidden_TD = encoder.encode(tokens_T, [len(tokens_T)], [last])[last]
        contacts_TT = contact_model.predict([sequence])[0]
        outputs.append(Outputs(encoder.logits(hidden_TD).numpy(), hidden_TD.numpy(), contacts_TT))
    return outputs


@torch.inference_mode()
def compute_with_transformers(path: Path, sequences: Sequence[str], masked: Sequence[int | None]) -> list[Outputs]:
    """Compute the outputs with transformers' EsmForMaskedLM, with the token ids of esm2kit."""
    from transformers import EsmForMaskedLM
    from transformers.utils import logging as transformers_logging

    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = EsmForMaskedLM.from_pretrained(path, attn_implementation="eager").eval().float()
    finally:
        if shows_bars:
            transformers_logging.enable_progress_bar()
    outputs = []
    for sequence, place in zip(sequences, masked, strict=True):
        tokens_1T = torch.from_numpy(tokenize(sequence, place))[None]
        found = model(tokens_1T, attention_mask=torch.ones_like(tokens_1T), output_hidden_states=True)
        complete_1T = torch.from_numpy(tokenize(sequence))[None]
        contacts_TT = model.predict_contacts(complete_1T, torch.ones_like(complete_1T))[0]
        outputs.append(Outputs(found.logits[0].numpy(), found.hidden_states[-1][0].numpy(), contacts_TT.numpy()))
    return outputs


@torch.inference_mode()
def compute_with_fair_esm(path: Path, sequences: Sequence[str], masked: Sequence[int | None]) -> list[Outputs]:
    """Compute the outputs with fair-esm, with its own tokens."""
    import esm

    model, alphabet = esm.pretrained.load_model_and_alphabet_local(path)
    model = model.eval()
    convert = alphabet.get_batch_converter()
    outputs = []
    for sequence, place in zip(sequences, masked, strict=True):
        text = sequence if place is None else f"{sequence[:place]}<mask>{sequence[place + 1 :]}"
        tokens_1T, complete_1T = (convert([("protein", each)])[2] for each in (text, sequence))
        found = model(tokens_1T, repr_layers=[model.num_layers])
        hidden_TD = found["representations"][model.num_layers][0]
        contacts_TT = model.predict_contacts(complete_1T)[0]
        outputs.append(Outputs(found["logits"][0].numpy(), hidden_TD.numpy(), contacts_TT.numpy()))
    return outputs


REFERENCES = (
    Reference("fair-esm", "fair-esm", compute_with_fair_esm, save_fair_esm, "esm2_official.pt"),
    Reference("transformers", "transformers", compute_with_transformers, save_hf, "esm2_official"),
)


def is_installed(package: str) -> bool:
    """Return whether a distribution is installed; another one may have the same module, as fair-esm's `esm`."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_reference(
    reference: Reference, model: ESM2, weights: Path | None, own: Sequence[Outputs], sequences: Sequence[str]
) -> list[Check]:
    """Compare the outputs with those of another implementation.

    Args:
        reference: the implementation.
        model: the weights, on the CPU, for a file in the format of the implementation.
        weights: the file or folder, if the implementation reads it as it is.
        own: esm2kit's outputs.
        sequences: the proteins.

    Returns:
        One line per output.
    """
    name = f"equal to {reference.name}"
    if not is_installed(reference.package):
        return [Check(name, "not checked", note=f"not installed: pip install {reference.package}")]
    masked = choose_masked(sequences)
    version = importlib.metadata.version(reference.package)
    with tempfile.TemporaryDirectory() as folder:
        path = weights or Path(folder) / reference.file
        try:
            if weights is None:
                reference.save(model, path)
            expected = reference.compute(path, sequences, masked)
        except InputError as error:  # the model cannot be written for it, such as one with another layer_norm_eps
            return [Check(name, "failed", note=str(error))]
        except FAULTS as error:  # of the other program, such as one whose version does not fit that of torch
            note = (
                f"{reference.name} {version} does not run here: {type(error).__name__}: {' '.join(str(error).split())}"
            )
            return [Check(name, "could not check", note=note)]
    note = (
        f"{reference.name} {version}; the largest difference over {len(sequences)} proteins, one with a hidden residue"
    )
    checks = []
    for field, output in zip(Outputs._fields, ("logits", "hidden states", "contacts"), strict=True):
        pairs = [(getattr(a, field), getattr(b, field)) for a, b in zip(own, expected, strict=True)]
        lines = [check_arrays(f"{name}: {output}", *pair, ATOL, RTOL, note) for pair in pairs]
        checks.append(next((line for line in lines if line.verdict == "failed"), lines[-1]))
    return checks


def choose_masked(sequences: Sequence[str]) -> list[int | None]:
    """Choose the hidden residue of each protein: one in the last, none in the others."""
    return [None] * (len(sequences) - 1) + [min(MASKED, len(sequences[-1]) - 1)]
