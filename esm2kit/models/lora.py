"""LoRA: train low-rank updates of selected matrices of a frozen ESM-2; merge them, or save them in a separate file.

A matrix W is replaced by W + (alpha / rank) B A. A (rank, inputs) is sampled from the seed and B (outputs, rank) is
zero, so that training starts at the base model.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esm2kit.core.errors import InputError
from esm2kit.core.rng import stream_key
from esm2kit.models.checkpoint import check_tensor_shapes
from esm2kit.models.config import LORA_TARGETS, ESM2Config
from esm2kit.models.esm2 import ESM2
from esm2kit.models.initialise import build_meta_model
from esm2kit.models.weights import ChangeLayer, is_hashed, update_digest

_LORA_STREAM = 301


class LoraLinear(nn.Linear):
    """A frozen linear layer with a trainable low-rank update; `weight` and `bias` keep their names in a state dict.

    Args:
        linear: the layer; its parameters are shared, not copied.
        rank: of the update.
        alpha: the update is scaled by alpha / rank.
        generator: samples A.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_a = nn.Parameter(_sample_a(rank, linear.in_features, generator).to(linear.weight))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Map rows (..., inputs) to rows (..., outputs)."""
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale

    def merge(self) -> nn.Linear:
        """Return a plain linear layer with the update added to its matrix."""
        plain = nn.Linear(self.in_features, self.out_features, device="meta")
        plain.weight = nn.Parameter((self.weight + self.scale * self.lora_b @ self.lora_a).detach())
        plain.bias = nn.Parameter(self.bias.detach())
        return plain


def add_lora(
    esm2: ESM2,
    rank: int,
    alpha: float,
    targets: Sequence[str] = LORA_TARGETS,
    biases: bool = False,
    seed: int = 0,
) -> ESM2:
    """Freeze an ESM-2 and add LoRA adapters in place.

    Args:
        esm2: the base model.
        rank: of each update; at least 1.
        alpha: updates are scaled by alpha / rank.
        targets: the matrices to adapt in every layer, from LORA_TARGETS.
        biases: also train all biases of the layers, like bias="all" in PEFT.
        seed: for sampling the A matrices.

    Returns:
        The same model.

    Raises:
        InputError: the rank is below 1, or a target is missing or unknown.
    """
    unknown = sorted(set(targets) - set(LORA_TARGETS))
    if rank < 1 or not targets or unknown:
        found = f"unknown target {unknown[0]!r}" if unknown else f"rank {rank}, targets {list(targets)}"
        raise InputError(
            f"lora: {found}. Choose a rank of at least 1 and one or more targets of {', '.join(LORA_TARGETS)}.",
            code="lora.settings",
            rank=rank,
            targets=list(targets),
        )
    esm2.requires_grad_(False)
    # A separate random stream: the head samples from the seed itself and would start with the same numbers.
    generator = torch.Generator().manual_seed(stream_key(seed, 0, 0, _LORA_STREAM))
    for layer in esm2.layers:
        for parent in (layer.self_attn, layer):
            for name, linear in list(parent.named_children()):
                if name in targets and isinstance(linear, nn.Linear):
                    setattr(parent, name, LoraLinear(linear, rank, alpha, generator))
        if biases:
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or name.endswith("bias"))
    return esm2


def sample_adapters(esm2: ESM2, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Sample the initial adapters of `add_lora` again, for a model on the meta device.

    Args:
        esm2: a model after `add_lora`.
        seed: the seed of `add_lora`.

    Yields:
        Name and tensor of every lora_a and lora_b, on the CPU.
    """
    generator = torch.Generator().manual_seed(stream_key(seed, 0, 0, _LORA_STREAM))
    for number, layer in enumerate(esm2.layers):
        for parent, prefix in ((layer.self_attn, "self_attn."), (layer, "")):
            for name, module in parent.named_children():
                if isinstance(module, LoraLinear):
                    rank, inputs = module.lora_a.shape
                    yield f"layers.{number}.{prefix}{name}.lora_a", _sample_a(rank, inputs, generator)
                    yield f"layers.{number}.{prefix}{name}.lora_b", torch.zeros(module.lora_b.shape, device="cpu")


def _sample_a(rank: int, inputs: int, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(inputs)
    # the default device is the GPU where Lightning builds a model
    return torch.rand(rank, inputs, generator=generator, device="cpu") * (2 * bound) - bound


def list_adapters(esm2: ESM2) -> Iterator[str]:
    """Return the names of the trained parameters of an ESM-2 with adapters."""
    return (name for name, parameter in esm2.named_parameters() if parameter.requires_grad)


def load_adapters(esm2: ESM2, state: dict[str, Tensor], source: str) -> None:
    """Load trained adapters in place.

    Args:
        esm2: a model after `add_lora` with the same settings.
        state: name -> tensor for every name of `list_adapters(esm2)`.
        source: the file, for the message.

    Raises:
        InputError: a tensor is missing, unknown or of another shape.
    """
    check_adapters(esm2, state, source)
    parameters = dict(esm2.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)


def check_adapters(esm2: ESM2, state: dict[str, Tensor], source: str) -> None:
    """Check the names and shapes of trained adapters; arguments and errors as for `load_adapters`."""
    parameters = dict(esm2.named_parameters())
    expected = {name: parameters[name] for name in list_adapters(esm2)}
    remedy = "Use the LoRA settings that the adapters were trained with."
    check_tensor_shapes(expected, state, source, "this model with these LoRA settings", remedy)


def merge_layers(
    config: ESM2Config,
    state: dict[str, Tensor],
    source: str,
    rank: int,
    alpha: float,
    targets: Sequence[str] = LORA_TARGETS,
    biases: bool = False,
) -> ChangeLayer:
    """Return a function that adds trained adapters to the tensors of a layer, for a model that is read layer by layer.

    Args:
        config: architecture of the base model.
        state: as for `load_adapters`.
        source: the file, for the message.
        rank: as for `add_lora`.
        alpha: as for `add_lora`.
        targets: as for `add_lora`.
        biases: as for `add_lora`.

    Returns:
        A function for `Weights.read_layer`.

    Raises:
        InputError: as `load_adapters`.
    """
    check_adapters(add_lora(build_meta_model(config), rank, alpha, targets, biases), state, source)

    def merge(index: int, tensors: dict[str, Tensor]) -> None:
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        for name, tensor in own.items():
            matrix, _, kind = name.rpartition(".")
            if (f"{matrix}.weight" if kind in ("lora_a", "lora_b") else name) not in tensors:
                continue  # the tensors of a layer can be passed in parts
            if kind == "lora_a":
                update = alpha / rank * own[f"{matrix}.lora_b"] @ tensor
                tensors[f"{matrix}.weight"] = tensors[f"{matrix}.weight"] + update
            elif kind != "lora_b":
                tensors[name] = tensor

    return merge


def merge_lora(esm2: ESM2) -> ESM2:
    """Add every low-rank update to its matrix, in place.

    Args:
        esm2: a model after `add_lora`.

    Returns:
        The same model as a plain ESM-2, with equal outputs within 1e-5.
    """
    for layer in esm2.layers:
        for parent in (layer.self_attn, layer):
            for name, module in list(parent.named_children()):
                if isinstance(module, LoraLinear):
                    setattr(parent, name, module.merge())
    return esm2


def weights_sha256(esm2: ESM2) -> str:
    """Compute the SHA-256 of an encoder's weights, which does not depend on the file format.

    Adapters, LM head and contact head are excluded: predictions of labels do not use the two heads.

    Args:
        esm2: with or without adapters.

    Returns:
        The hex digest.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(esm2.state_dict().items()):
        if is_hashed(name):
            update_digest(digest, name, tensor)
    return digest.hexdigest()
