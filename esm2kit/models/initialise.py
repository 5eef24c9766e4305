"""Weights for a model that is laid out already: a tensor at a time, so that no rank need hold the whole model.

They are drawn, or mapped from a file: what no rank changes lies in a node's memory once.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, RotaryEmbedding
from esm2kit.sequences.alphabet import PAD_IDX


def build_meta_model(config: ESM2Config) -> ESM2:
    """An ESM-2 of shapes alone, which takes no memory: to be laid out, and then filled."""
    with torch.device("meta"):
        return ESM2(config)


def sample_weights(config: ESM2Config, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The state dict of `ESM2.initialised(config, seed)`, bit for bit, one tensor after the other."""
    skeleton = build_meta_model(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in skeleton.modules():  # the constructors draw first, each of its layers in turn
            if isinstance(module, nn.Linear):
                nn.Linear(module.in_features, module.out_features, device="cpu")
            elif isinstance(module, nn.Embedding):
                nn.Embedding(module.num_embeddings, module.embedding_dim, device="cpu")
        for path, module in skeleton.named_modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if f"{path}.{name}" != "lm_head.weight":  # the embedding's own
                    with torch.device("cpu"):  # whatever a Trainer has made the default
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
    """Give a model that was laid out on the meta device its memory and its weights, in place.

    Args:
        model: sharded or not; every parameter and buffer is named by `tensors`, the tied LM head aside.
        tensors: whole ones, the same on every rank; each is cut to this rank's shard and let go.
        device: where the shards live.
    """
    model.to_empty(device=device)
    model.lm_head.weight = model.embed_tokens.weight  # each had got memory of its own
    missing = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, whole in tensors:
        held = missing.pop(name, None)
        if isinstance(held, DTensor):
            shard = distribute_tensor(whole.to(device), held.device_mesh, held.placements, src_data_rank=None)
            held.to_local().copy_(shard.to_local())
        elif held is not None:
            held.copy_(whole)
    assert not missing, f"no weights for {sorted(missing)}"
