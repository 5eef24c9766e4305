"""A fair-esm model and esm2kit's model with the same random weights."""

import esm
import torch

from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2


def build_pair(config: ESM2Config, std: float = 0.03) -> tuple[ESM2, esm.ESM2]:
    """Build both models with the same random parameters, and with rotary frequencies rounded as in Meta's files."""
    reference = esm.ESM2(config.num_layers, config.embed_dim, config.attention_heads, "ESM-1b", config.token_dropout)
    torch.manual_seed(0)
    for name, parameter in reference.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=std)
    for name, buffer in reference.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.half().float())
    model = ESM2(config)
    model.load_state_dict(reference.state_dict())
    return model.eval(), reference.eval()
