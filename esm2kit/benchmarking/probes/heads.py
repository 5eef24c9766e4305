"""Small networks on frozen features, every seed in one pass: FNN, the 7-32-7 CNN, light attention.

A parameter carries a leading axis S, one slice a seed. Batches are packed: the rows of their proteins end to end, with
a few zero rows between proteins so that a convolution never reaches from one into the next. Nothing is padded, and a
seed's result is the one it has when trained alone, to float rounding.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeatureBatch(NamedTuple):
    """Rows of some proteins.

    Args:
        x_ND: features, float32; gap rows are zero.
        is_real_N: False for gap rows; None if there are none.
        sizes: rows of each stretch in turn: gap, protein, gap, ..., protein, gap (proteins alone if there are no gaps).
    """

    x_ND: Tensor
    is_real_N: Tensor | None
    sizes: list[int]


# Rows in one product: they stay in cache for all taps, and memory does not grow with the batch.
ROWS_PER_PRODUCT = 1024


def _windows(x_ND: Tensor, num_taps: int, start: int, stop: int) -> Tensor:
    """(stop - start, K * D): each row with the K - 1 that follow it, of a contiguous x."""
    _, width = x_ND.shape
    return x_ND.as_strided((stop - start, num_taps * width), (width, 1), x_ND.storage_offset() + start * width)


def _convolve(x_ND: Tensor, weight_KDE: Tensor) -> Tensor:
    """(N - K + 1, E): row i is the sum over taps k of x[i + k] @ weight[k], a thousand rows at a time.

    A product a tap, straight into the output; one product of every row's window where rows are so narrow that writing
    the output K times would cost more.
    """
    num_taps, width, outputs = weight_KDE.shape
    inner = len(x_ND) - num_taps + 1
    if width < outputs:
        x_ND, wide = x_ND.contiguous(), weight_KDE.reshape(num_taps * width, outputs)
    out_NE = x_ND.new_zeros(inner, outputs)
    for start in range(0, inner, ROWS_PER_PRODUCT):
        stop = min(start + ROWS_PER_PRODUCT, inner)
        if width < outputs:
            torch.mm(_windows(x_ND, num_taps, start, stop).contiguous(), wide, out=out_NE[start:stop])
            continue
        for tap in range(num_taps):
            out_NE[start:stop].addmm_(x_ND[start + tap : stop + tap], weight_KDE[tap])
    return out_NE


class PackedConvolution(torch.autograd.Function):
    """Convolution over rows end to end, no transposes and no padding."""

    @staticmethod
    def forward(ctx, x_GND: Tensor, weight_GKDE: Tensor) -> Tensor:
        """x (G, N, D), weight (G, K, D, E), K odd -> (G, N, E); the first and last K // 2 rows are zero."""
        radius = weight_GKDE.shape[1] // 2
        ctx.save_for_backward(x_GND, weight_GKDE)
        out_GNE = x_GND.new_zeros(*x_GND.shape[:2], weight_GKDE.shape[3])
        for x_ND, weight_KDE, out_NE in zip(x_GND, weight_GKDE, out_GNE, strict=True):
            out_NE[radius : len(out_NE) - radius] = _convolve(x_ND, weight_KDE)
        return out_GNE

    @staticmethod
    def backward(ctx, grad_GNE: Tensor) -> tuple[Tensor | None, Tensor]:
        x_GND, weight_GKDE = ctx.saved_tensors
        num_taps, width, outputs = weight_GKDE.shape[1:]
        radius, rows = num_taps // 2, x_GND.shape[1]
        grad_x = torch.empty_like(x_GND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight_GKDE)
        for group, x_ND in enumerate(x_GND):
            inner_NE = grad_GNE[group, radius : rows - radius].contiguous()
            # K - 1 rows of zeros on either side: the gradient by x is a convolution of it with the taps reversed.
            padded_NE = F.pad(inner_NE, (0, 0, num_taps - 1, num_taps - 1))
            if grad_x is not None:
                grad_x[group] = _convolve(padded_NE, weight_GKDE[group].flip(0).transpose(1, 2))
            if width < outputs:
                x_ND, wide = x_ND.contiguous(), x_ND.new_zeros(num_taps * width, outputs)
                for start in range(0, len(inner_NE), ROWS_PER_PRODUCT):
                    stop = min(start + ROWS_PER_PRODUCT, len(inner_NE))
                    wide.addmm_(_windows(x_ND, num_taps, start, stop).contiguous().T, inner_NE[start:stop])
                grad_weight[group] = wide.view(num_taps, width, outputs)
            else:
                wide = x_ND.new_zeros(width, num_taps * outputs)
                for start in range(0, rows, ROWS_PER_PRODUCT):
                    stop = min(start + ROWS_PER_PRODUCT, rows)
                    wide.addmm_(x_ND[start:stop].T, _windows(padded_NE, num_taps, start, stop).contiguous())
                grad_weight[group] = wide.view(width, num_taps, outputs).transpose(0, 1).flip(0)
        return grad_x, grad_weight


class SeededHead(nn.Module):
    """What the heads share: parameters drawn seed by seed as torch's layers draw them, dropout likewise.

    Args:
        seeds: one a slice; a slice depends on its own seed alone.
        dropout: share of hidden units set to zero while training.
    """

    radius = 0  # gap rows a convolution needs between proteins
    per_protein = False  # puts out one row a protein from many rows

    def __init__(self, seeds: Sequence[int], dropout: float, device: torch.device) -> None:
        super().__init__()
        self.seeds, self.dropout, self.device = tuple(seeds), dropout, device
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def init_uniform(self, *shape: int, fan_in: int) -> nn.Parameter:
        """(S, *shape) uniform in +-1/sqrt(fan_in), torch's default for linear layers and convolutions."""
        bound = 1 / math.sqrt(fan_in)
        drawn = [torch.rand(shape, generator=generator, device=self.device) for generator in self.generators]
        return nn.Parameter(torch.stack(drawn).mul_(2 * bound).sub_(bound))

    def apply_dropout(self, hidden_SNH: Tensor) -> Tensor:
        """Inverted dropout with each seed's own stream."""
        if not (self.training and self.dropout):
            return hidden_SNH
        kept = torch.stack(
            [torch.rand(hidden_SNH.shape[1:], generator=g, device=hidden_SNH.device) for g in self.generators]
        )
        return hidden_SNH * (kept >= self.dropout) / (1 - self.dropout)


class Fnn(SeededHead):
    """Linear D-H, ReLU, dropout, linear H-C on every row."""

    def __init__(
        self, seeds: Sequence[int], width: int, outputs: int, hidden: int, dropout: float, device: torch.device
    ) -> None:
        super().__init__(seeds, dropout, device)
        self.weight_in = self.init_uniform(width, hidden, fan_in=width)
        self.bias_in = self.init_uniform(1, hidden, fan_in=width)
        self.weight_out = self.init_uniform(hidden, outputs, fan_in=hidden)
        self.bias_out = self.init_uniform(1, outputs, fan_in=hidden)

    def forward(self, batch: FeatureBatch) -> Tensor:
        num_seeds, width, hidden = self.weight_in.shape
        # One product for all seeds: (N, D) x (D, S * H).
        fused = self.weight_in.transpose(0, 1).reshape(width, num_seeds * hidden)
        hidden_SNH = (batch.x_ND @ fused).view(-1, num_seeds, hidden).transpose(0, 1) + self.bias_in
        return torch.baddbmm(self.bias_out, self.apply_dropout(F.relu(hidden_SNH)), self.weight_out)


class Cnn(SeededHead):
    """Convolution of 7 rows D-H, ReLU, dropout, convolution of 7 rows H-C: a class or value for every residue."""

    taps = 7
    radius = 3

    def __init__(
        self, seeds: Sequence[int], width: int, outputs: int, hidden: int, dropout: float, device: torch.device
    ) -> None:
        super().__init__(seeds, dropout, device)
        self.weight_in = self.init_uniform(self.taps, width, hidden, fan_in=self.taps * width)
        self.bias_in = self.init_uniform(1, hidden, fan_in=self.taps * width)
        self.weight_out = self.init_uniform(self.taps, hidden, outputs, fan_in=self.taps * hidden)
        self.bias_out = self.init_uniform(1, outputs, fan_in=self.taps * hidden)

    def forward(self, batch: FeatureBatch) -> Tensor:
        num_seeds, taps, width, hidden = self.weight_in.shape
        fused = self.weight_in.permute(1, 2, 0, 3).reshape(1, taps, width, num_seeds * hidden)
        hidden_1NX = PackedConvolution.apply(batch.x_ND[None], fused)
        hidden_SNH = hidden_1NX[0].view(-1, num_seeds, hidden).transpose(0, 1) + self.bias_in
        # Gap rows back to zero, as the second convolution's padding.
        hidden_SNH = self.apply_dropout(F.relu(hidden_SNH)) * batch.is_real_N[:, None]
        return PackedConvolution.apply(hidden_SNH, self.weight_out) + self.bias_out


class LightAttention(SeededHead):
    """One convolution of 9 rows for values, one for attention; softmax-weighted mean and maximum over the residues.

    Source: Staerk et al. 2021, 10.1093/bioadv/vbab035; the layer norm in place of batch norm is biotrainer's, and lets
    seeds share a pass.
    """

    taps = 9
    radius = 4
    per_protein = True

    def __init__(
        self, seeds: Sequence[int], width: int, outputs: int, hidden: int, dropout: float, device: torch.device
    ) -> None:
        super().__init__(seeds, dropout, device)
        fan_in = self.taps * width
        self.weight_value = self.init_uniform(self.taps, width, width, fan_in=fan_in)
        self.bias_value = self.init_uniform(1, width, fan_in=fan_in)
        self.weight_attend = self.init_uniform(self.taps, width, width, fan_in=fan_in)
        self.bias_attend = self.init_uniform(1, width, fan_in=fan_in)
        self.weight_in = self.init_uniform(2 * width, hidden, fan_in=2 * width)
        self.bias_in = self.init_uniform(1, hidden, fan_in=2 * width)
        self.norm_scale = nn.Parameter(torch.ones(len(self.seeds), 1, hidden, device=device))
        self.norm_shift = nn.Parameter(torch.zeros(len(self.seeds), 1, hidden, device=device))
        self.weight_out = self.init_uniform(hidden, outputs, fan_in=hidden)
        self.bias_out = self.init_uniform(1, outputs, fan_in=hidden)

    def forward(self, batch: FeatureBatch) -> Tensor:
        num_seeds, taps, width, _ = self.weight_value.shape
        both = torch.cat([self.weight_value, self.weight_attend])  # (2S, K, D, D): one product a tap for all
        fused = both.permute(1, 2, 0, 3).reshape(1, taps, width, 2 * num_seeds * width)
        out_NX = PackedConvolution.apply(batch.x_ND[None], fused)[0].view(-1, 2 * num_seeds, width)
        out_XND = out_NX.transpose(0, 1) + torch.cat([self.bias_value, self.bias_attend])
        values_SND, attend_SND = self.apply_dropout(out_XND[:num_seeds]), out_XND[num_seeds:]
        pooled = []
        # split, not slices: its backward is one concatenation instead of a full-size tensor a protein
        stretches = zip(values_SND.split(batch.sizes, dim=1), attend_SND.split(batch.sizes, dim=1), strict=True)
        for value_STD, weight_STD in list(stretches)[1::2]:
            pooled.append(torch.cat([(value_STD * weight_STD.softmax(1)).sum(1), value_STD.amax(1)], dim=-1))
        hidden_SBH = torch.baddbmm(self.bias_in, torch.stack(pooled, dim=1), self.weight_in)
        hidden_SBH = F.layer_norm(F.relu(self.apply_dropout(hidden_SBH)), hidden_SBH.shape[-1:])
        return torch.baddbmm(self.bias_out, hidden_SBH * self.norm_scale + self.norm_shift, self.weight_out)


HEADS: dict[str, type[SeededHead]] = {"fnn": Fnn, "cnn": Cnn, "light_attention": LightAttention}
