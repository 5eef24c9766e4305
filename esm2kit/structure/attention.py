"""Contact probabilities of packed sequences, with the attention maps of a few heads in memory at a time.

The contact head is a logistic regression on the attention maps of all layers and heads, symmetrised and corrected by
the average product. Its sum is accumulated while the layers run: a 1,022-residue protein has 2.8 GB of maps at 650M,
and the sum has 4 MB.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from esm2kit.models.esm2 import ESM2
from esm2kit.models.layerwise import LayerwiseEncoder
from esm2kit.models.packing import Packed
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, encode

# attention weights in memory at a time, unless a single map has more
WEIGHTS_PER_BLOCK = {"cpu": 1 << 22, "cuda": 1 << 27, "mps": 1 << 25}


class AccumulatedMaps(Packed):
    """A packed layout whose attention also sums the corrected maps of all layers and heads.

    Args:
        num_tokens: tokens per sequence, with BOS and EOS.
        factors_LH: (L, H) factor of each map in the sum.
        device: the device of the rows.

    Attributes:
        sums: (count, T, T) sums of the sequences of each run, residues only.
    """

    def __init__(self, num_tokens: list[int], factors_LH: Tensor, device: torch.device) -> None:
        super().__init__(num_tokens, device)
        self.factors_LH, self.layer = factors_LH.to(device, torch.float32), 0
        self.sums = [torch.zeros(count, tokens - 2, tokens - 2, device=device) for count, tokens in self.runs]

    def attend(self, query_NHK: Tensor, key_NHK: Tensor, value_NHK: Tensor) -> Tensor:
        """Compute softmax attention within each sequence, and add the maps of this layer to the sums."""
        out_NHK = torch.empty_like(value_NHK)
        start = 0
        for run, sums_BTT in zip(self.runs, self.sums, strict=True):
            stop = start + run[0] * run[1]
            query, key, value, out = (
                x[start:stop].unflatten(0, run).transpose(1, 2) for x in (query_NHK, key_NHK, value_NHK, out_NHK)
            )
            self._attend_run(query, key, value, out, sums_BTT)
            start = stop
        self.layer += 1
        return out_NHK

    def _attend_run(
        self, query_BHTK: Tensor, key_BHTK: Tensor, value_BHTK: Tensor, out_BHTK: Tensor, sums_BTT: Tensor
    ) -> None:
        count, heads, tokens, width = query_BHTK.shape
        maps = max(1, WEIGHTS_PER_BLOCK[query_BHTK.device.type] // tokens**2)
        num_heads = min(heads, maps)
        num_sequences = max(1, maps // heads)
        for first in range(0, count, num_sequences):
            rows = slice(first, first + num_sequences)
            for head in range(0, heads, num_heads):
                part = (rows, slice(head, head + num_heads))
                scores = query_BHTK[part] @ key_BHTK[part].transpose(-1, -2) / math.sqrt(width)
                weights = scores.softmax(-1, dtype=torch.float32)
                out_BHTK[part] = weights.to(value_BHTK.dtype) @ value_BHTK[part]
                factors_H = self.factors_LH[self.layer, part[1]]
                add_corrected_maps(sums_BTT[rows], weights[..., 1:-1, 1:-1], factors_H)


def add_corrected_maps(sums_BTT: Tensor, maps_BHTT: Tensor, factors_H: Tensor) -> None:
    """Add the weighted sum over heads of the maps as `symmetrise_with_apc` corrects them, without copies of the maps.

    Args:
        sums_BTT: sums to add to, in place.
        maps_BHTT: attention maps of the residues.
        factors_H: factor of each head.
    """
    mixed_BTT = torch.einsum("h,bhij->bij", factors_H, maps_BHTT)
    totals_BHT = maps_BHTT.sum(-1) + maps_BHTT.sum(-2)  # sums of the rows of the symmetrised maps
    scaled_BHT = totals_BHT * (factors_H[:, None] / totals_BHT.sum(-1, keepdim=True))
    sums_BTT += mixed_BTT
    sums_BTT += mixed_BTT.transpose(-1, -2)
    sums_BTT -= scaled_BHT.transpose(-1, -2) @ totals_BHT


class ContactModel:
    """Computes contact probabilities or couplings of batches of proteins.

    Args:
        model: in evaluation mode; it is moved to the device. With `layers` only its contact head is used.
        values: "contacts" or "coupling".
        precision: "float32" or "bfloat16".
        device: of the model.
        layers: reads and runs the layers, instead of those of `model`.
    """

    def __init__(
        self, model: ESM2, values: str, precision: str, device: torch.device, layers: LayerwiseEncoder | None = None
    ) -> None:
        self.values, self.device, self.layers = values, device, layers
        config, regression = model.config, model.contact_head.regression
        shape = (config.num_layers, config.attention_heads)
        self.bias = float(regression.bias.detach())
        # the mean over layers and heads of the maps, each of which is symmetrised by the mean of its two halves
        uniform = torch.full(shape, 1 / (2 * math.prod(shape)))
        self.factors_LH = regression.weight.detach().float().reshape(shape) if values == "contacts" else uniform
        self.model = model if layers else model.to(device, dtype=getattr(torch, precision))

    @torch.inference_mode()
    def predict(self, sequences: list[str]) -> list[np.ndarray]:
        """Compute the maps of some proteins.

        Args:
            sequences: residues, ordered by length, so that proteins of equal length are computed together.

        Returns:
            (T, T) float32 per protein: contact probabilities, or couplings in multiples of uniform attention.

        Source:
            Rao et al. 2021, 10.1101/2020.12.15.422761; equal to fair-esm's `predict_contacts`.
        """
        return self.predict_batches([sequences])[0]

    @torch.inference_mode()
    def predict_batches(self, batches: Sequence[list[str]]) -> list[list[np.ndarray]]:
        """Compute the maps of several batches as `predict`; a model that is read layer by layer is read once."""
        tokens = [np.concatenate([[BOS_IDX, *encode(each), EOS_IDX] for each in batch]) for batch in batches]
        layouts = [
            AccumulatedMaps([len(each) + 2 for each in batch], self.factors_LH, self.device) for batch in batches
        ]
        if self.layers:
            self.layers.run_layers(torch.from_numpy(np.concatenate(tokens).astype(np.int64)), layouts)
        else:
            for tokens_N, layout in zip(tokens, layouts, strict=True):
                self.model.encode(torch.from_numpy(tokens_N.astype(np.int64)).to(self.device), layout)
        return [self._finish(layout) for layout in layouts]

    def _finish(self, layout: AccumulatedMaps) -> list[np.ndarray]:
        maps = [map_TT.cpu() for sums_BTT in layout.sums for map_TT in sums_BTT]
        if self.values == "coupling":
            return [(map_TT * len(map_TT)).numpy() for map_TT in maps]
        return [(map_TT + self.bias).sigmoid().numpy() for map_TT in maps]
