"""Fill a model that is already sharded with weights, one tensor at a time, so that no rank holds the complete model.

The weights are sampled, or memory-mapped from a file. The ranks of a node share the mapped memory.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, RotaryEmbedding
from esm2kit.sequences.alphabet import PAD_IDX


def build_meta_model(config: ESM2Config) -> ESM2:
    """Build an ESM-2 on the meta device, which allocates no memory.

    Args:
        config: the architecture.

    Returns:
        A model without weights, to be sharded and then filled by `materialise`.
    """
    with torch.device("meta"):
        return ESM2(config)


def sample_weights(config: ESM2Config, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Sample the state dict of `ESM2.initialised(config, seed)`, bit for bit, one tensor at a time.

    Args:
        config: the architecture.
        seed: of the random generator.

    Yields:
        Name and tensor, on the CPU; the tied LM head matrix is omitted.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield from _sample_tensors(config)


class SampledTensors:
    """The weights of `sample_weights` by name; torch's random generator is left as it was after each read.

    Args:
        config: the architecture.
        seed: of the random generator.
    """

    def __init__(self, config: ESM2Config, seed: int) -> None:
        self.config, self.seed = config, seed
        self._restart()

    def _restart(self) -> None:
        self.stream = _sample_tensors(self.config)
        self.state = torch.Generator().manual_seed(self.seed).get_state()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors; reading them in the order of the model samples each once.

        Args:
            names: names of tensors. The tied LM head matrix is the token embedding.

        Returns:
            Name -> tensor, without names that the model does not have.
        """
        sources = {name: "embed_tokens.weight" if name == "lm_head.weight" else name for name in names}
        missing, values = set(sources.values()), {}
        restarted = False
        with torch.random.fork_rng(devices=[]):
            while missing:
                torch.set_rng_state(self.state)
                name, tensor = next(self.stream, ("", None))
                self.state = torch.get_rng_state()
                if tensor is None:
                    self._restart()
                    if restarted:
                        break
                    restarted = True
                elif name in missing:
                    missing.remove(name)
                    values[name] = tensor
        return {name: values[source] for name, source in sources.items() if source in values}


def _sample_tensors(config: ESM2Config) -> Iterator[tuple[str, Tensor]]:
    """Sample the tensors from torch's random generator, which was seeded before."""
    skeleton = build_meta_model(config)
    for module in skeleton.modules():  # advance the generator as the constructors do
        if isinstance(module, nn.Linear):
            nn.Linear(module.in_features, module.out_features, device="cpu")
        elif isinstance(module, nn.Embedding):
            nn.Embedding(module.num_embeddings, module.embedding_dim, device="cpu")
    for path, module in skeleton.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if f"{path}.{name}" != "lm_head.weight":  # tied to the embedding
                with torch.device("cpu"):  # a Trainer may have changed the default device
                    value = _sample_tensor(module, name, tensor.shape, config)
                yield f"{path}.{name}", value


def _sample_tensor(module: nn.Module, name: str, shape: torch.Size, config: ESM2Config) -> Tensor:
    if isinstance(module, RotaryEmbedding):
        return RotaryEmbedding(config.head_dim).inv_freq
    if isinstance(module, nn.LayerNorm) and name == "weight":
        return torch.ones(shape)
    if name == "bias":
        return torch.zeros(shape)
    if isinstance(module, nn.Embedding):
        weight = nn.init.normal_(torch.empty(shape), std=0.02)
        weight[PAD_IDX].zero_()
        return weight
    return nn.init.normal_(torch.empty(shape), std=shape[1] ** -0.5)


@torch.no_grad()
def materialise(model: ESM2, tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Allocate a meta-device model's memory and fill it with weights in place.

    Args:
        model: sharded or not.
        tensors: name and full tensor for every parameter and buffer except the tied LM head, the same on every rank.
            Each is reduced to this rank's shard and released.
        device: the device of the shards.
    """
    model.to_empty(device=device)
    if model.lm_head is not None:
        model.lm_head.weight = model.embed_tokens.weight  # to_empty unties them
    missing = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, full in tensors:
        target = missing.pop(name, None)
        if isinstance(target, DTensor):
            shard = distribute_tensor(full.to(device), target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(shard.to_local())
        elif target is not None:
            target.copy_(full)
        del full  # before the next one is read
    assert not missing, f"no weights for {sorted(missing)}"
