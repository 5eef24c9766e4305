"""LoRA: train a low-rank correction to each chosen matrix of a frozen ESM-2; merge it, or keep it in a file of its own.

W becomes W + (alpha / rank) B A, with A (rank, inputs) drawn from the seed and B (outputs, rank) zero, so that training
begins at the base model. Source: Hu et al. 2021, arXiv 2106.09685.
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
from esm2kit.models.config import LORA_TARGETS
from esm2kit.models.esm2 import ESM2

_LORA_STREAM = 301


class LoraLinear(nn.Linear):
    """A frozen linear layer and its trainable correction; `weight` and `bias` keep their names in a state dict.

    Args:
        linear: the layer whose parameters are taken over, not copied.
        rank: of the correction.
        alpha: the correction is scaled by alpha / rank.
        generator: draws A.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        bound = 1 / math.sqrt(linear.in_features)
        drawn = torch.rand(rank, linear.in_features, generator=generator) * (2 * bound) - bound
        self.lora_a = nn.Parameter(drawn.to(linear.weight))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale

    def merge(self) -> nn.Linear:
        """A plain layer with the correction added to its matrix."""
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
    """Freeze an ESM-2 and put adapters into it, in place.

    Args:
        esm2: the base model.
        rank: of each correction; at least 1.
        alpha: corrections are scaled by alpha / rank.
        targets: which matrices of every layer, from LORA_TARGETS.
        biases: also train every bias of the layers, as PEFT's bias="all".
        seed: draws the A matrices.
    Returns: the same model.
    Raises: InputError for a rank below 1, no target or one that is not in LORA_TARGETS.
    """
    unknown = sorted(set(targets) - set(LORA_TARGETS))
    if rank < 1 or not targets or unknown:
        found = f"unknown {unknown[0]!r}" if unknown else f"rank {rank}, targets {list(targets)}"
        raise InputError(
            f"lora: {found}; give a rank of 1 or more and targets from {', '.join(LORA_TARGETS)}",
            code="lora.settings",
            rank=rank,
            targets=list(targets),
        )
    esm2.requires_grad_(False)
    # a stream of its own: the head draws from the seed itself, and its matrix would begin as the first A does
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


def list_adapters(esm2: ESM2) -> Iterator[str]:
    """Names of what is trained in an ESM-2 with adapters."""
    return (name for name, parameter in esm2.named_parameters() if parameter.requires_grad)


def load_adapters(esm2: ESM2, state: dict[str, Tensor], source: str) -> None:
    """Put trained adapters in the place of fresh ones.

    Args:
        esm2: what `add_lora` made, with the same settings.
        state: `list_adapters(esm2)` -> tensor.
        source: for the message.
    Raises: InputError naming the first tensor that is missing, unknown or of another shape.
    """
    own = dict(esm2.named_parameters())
    expected = {name: own[name] for name in list_adapters(esm2)}
    remedy = "Use the LoRA settings that the adapters were trained with."
    check_tensor_shapes(expected, state, source, "this model with these LoRA settings", remedy)
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def merge_lora(esm2: ESM2) -> ESM2:
    """Add every correction to its matrix, in place: a plain ESM-2 that gives the same numbers within 1e-5.

    Returns: the same model, which then saves, embeds and exports as any other.
    """
    for layer in esm2.layers:
        for parent in (layer.self_attn, layer):
            for name, module in list(parent.named_children()):
                if isinstance(module, LoraLinear):
                    setattr(parent, name, module.merge())
    return esm2


def weights_sha256(esm2: ESM2) -> str:
    """SHA-256 over an encoder's weights, adapters aside: the same for the same weights from whatever file they came.

    The LM head and the contact head stay out: no label is computed from them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(esm2.state_dict().items()):
        if not name.startswith(("lm_head.", "contact_head.")) and not name.endswith(("inv_freq", "lora_a", "lora_b")):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
