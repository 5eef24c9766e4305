"""The weights of a model that are read from its files when they are used, so that no process holds all of them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from esm2kit.core.errors import InputError
from esm2kit.models.checkpoint import check_tensor_shapes
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, TransformerLayer
from esm2kit.models.initialise import build_meta_model

ChangeLayer = Callable[[int, dict[str, Tensor]], None]
TIED = "lm_head.weight"  # the token embedding


class Weights:
    """Reads the tensors of an ESM-2 by name, and checks each as `build_model` does.

    Args:
        config: the architecture.
        read: reads tensors by fair-esm's names; it omits names that the file does not have.
        source: the file, for messages.
        check: raises an InputError if the file has changed.
    """

    def __init__(
        self,
        config: ESM2Config,
        read: Callable[[Iterable[str]], dict[str, Tensor]],
        source: Path | str,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.source, self.check = config, source, check
        self._read = read
        self.meta = build_meta_model(config)
        self._expected = self.meta.state_dict()

    @property
    def names(self) -> list[str]:
        """Names of all tensors, without the matrix of the LM head, which is the token embedding."""
        return [name for name in self._expected if name != TIED]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors.

        Args:
            names: fair-esm's names.

        Returns:
            Name -> tensor in float32, a copy that does not keep the file mapped.

        Raises:
            InputError: a tensor is missing, has another shape, or has numbers that are not finite.
        """
        names = list(names)
        found = self._read(names)
        what = f"this model ({self.config.num_layers} layers, embed_dim {self.config.embed_dim})"
        expected = {name: self._expected[name] for name in names}
        check_tensor_shapes(expected, found, self.source, what, "Choose the model size of the checkpoint.")
        copies = {}
        for name in names:
            copies[name] = found.pop(name).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            check_finite(name, copies[name], self.source)
        return copies

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Read all tensors, one at a time; the matrix of the LM head is omitted."""
        for name in self.names:
            yield name, self.read([name])[name]

    def sha256(self) -> str:
        """Compute `lora.weights_sha256` of the model, with one tensor in memory at a time."""
        digest = hashlib.sha256()
        for name in sorted(name for name in self.names if is_hashed(name)):
            update_digest(digest, name, self.read([name])[name])
        return digest.hexdigest()

    def read_layer(self, index: int, change: ChangeLayer | None = None) -> TransformerLayer:
        """Read one layer.

        Args:
            index: its number, from 0.
            change: changes its tensors, by their names within the layer, for example to merge adapters.

        Returns:
            The layer in evaluation mode, on the CPU, in float32.
        """
        prefix = f"layers.{index}."
        read = self.read(name for name in self.names if name.startswith(prefix))
        state = {name.removeprefix(prefix): tensor for name, tensor in read.items()}
        if change is not None:
            change(index, state)
        with torch.device("meta"):
            layer = TransformerLayer(self.config)
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(False).eval()

    def load_ends(self) -> ESM2:
        """Build a model with the embedding, the final LayerNorm and the heads, and of the layers only the first.

        Returns:
            The model in evaluation mode, on the CPU, in float32.
        """
        model = build_meta_model(self.config)
        model.layers = nn.ModuleList([self.read_layer(0)])
        names = [name for name in self.names if not name.startswith("layers.")]
        model.load_state_dict(self.read(names), strict=False, assign=True)
        if model.lm_head is not None:
            model.lm_head.weight = model.embed_tokens.weight
        return model.requires_grad_(False).eval()


def is_hashed(name: str) -> bool:
    """Return whether a tensor counts in the digest of an encoder: not the heads, the rotary frequencies or adapters."""
    return not name.startswith(("lm_head.", "contact_head.")) and not name.endswith(("inv_freq", "lora_a", "lora_b"))


def update_digest(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Add a tensor to the digest of an encoder's weights."""
    digest.update(f"{name} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().float().contiguous().reshape(-1).view(torch.uint8).numpy())


def check_finite(name: str, tensor: Tensor, source: Path | str) -> None:
    """Check that a tensor has finite numbers only.

    Args:
        name: of the tensor.
        tensor: in a floating-point type.
        source: the file, for the message.

    Raises:
        InputError: a number is infinite or not a number.
    """
    # the sum is finite for almost every finite tensor, and costs no memory
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise InputError(
            f"{source}: tensor '{name}' has numbers that are not finite. Use another checkpoint: this one is damaged, "
            "or its training diverged.",
            code="checkpoint.not-finite",
            path=str(source),
            name=name,
        )
