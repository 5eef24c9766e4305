"""Neural probes on frozen features: FNN, CNN, attention and light attention. All seeds are trained in one pass.

Each parameter has a leading axis S with one slice per seed. Batches are packed: the rows of all proteins follow each
other, separated by zero rows so that a convolution does not mix two proteins. There is no padding. A seed gives the
same result as when it is trained alone, up to rounding.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeatureBatch(NamedTuple):
    """The feature rows of some proteins.

    Args:
        x_ND: Features in float32; gap rows are zero.
        is_real_N: False for gap rows; None without gaps.
        sizes: Rows of each segment: gap, protein, gap, ..., protein, gap. May be empty without gaps.
    """

    x_ND: Tensor
    is_real_N: Tensor | None
    sizes: list[int]


# Rows per matrix product: they stay in the cache for all taps, and memory does not grow with the batch.
ROWS_PER_PRODUCT = 1024


def _windows(x_ND: Tensor, num_taps: int, start: int, stop: int) -> Tensor:
    """Return a view (stop - start, K * D) of a contiguous x: each row with the K - 1 rows that follow it."""
    _, width = x_ND.shape
    return x_ND.as_strided((stop - start, num_taps * width), (width, 1), x_ND.storage_offset() + start * width)


def _convolve(x_ND: Tensor, weight_KDE: Tensor) -> Tensor:
    """Convolve rows: row i of the output is the sum over taps k of x[i + k] @ weight[k].

    Narrow rows (D < E) use one product of all windows. Wide rows use one product per tap, added to the output.

    Args:
        x_ND: Rows.
        weight_KDE: K taps.

    Returns:
        (N - K + 1, E)
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
    """Convolution over packed rows, without transposes and without padding."""

    @staticmethod
    def forward(ctx, x_GND: Tensor, weight_GKDE: Tensor) -> Tensor:
        """Convolve x (G, N, D) with weight (G, K, D, E), K odd; in the output (G, N, E) K // 2 end rows are zero."""
        radius = weight_GKDE.shape[1] // 2
        ctx.save_for_backward(x_GND, weight_GKDE)
        out_GNE = x_GND.new_zeros(*x_GND.shape[:2], weight_GKDE.shape[3])
        for x_ND, weight_KDE, out_NE in zip(x_GND, weight_GKDE, out_GNE, strict=True):
            out_NE[radius : len(out_NE) - radius] = _convolve(x_ND, weight_KDE)
        return out_GNE

    @staticmethod
    def backward(ctx, grad_GNE: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the gradients of x and weight."""
        x_GND, weight_GKDE = ctx.saved_tensors
        num_taps, width, outputs = weight_GKDE.shape[1:]
        radius, rows = num_taps // 2, x_GND.shape[1]
        grad_x = torch.empty_like(x_GND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight_GKDE)
        for group, x_ND in enumerate(x_GND):
            inner_NE = grad_GNE[group, radius : rows - radius].contiguous()
            # The gradient of x is a convolution with reversed taps, which needs K - 1 zero rows on either side.
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
    """Base class of the heads: parameters and dropout are sampled per seed, with the distributions of torch's layers.

    Args:
        seeds: One seed per slice. A slice depends only on its own seed.
        dropout: Dropout rate of the hidden units.
        device: Device of the parameters.
    """

    radius = 0  # gap rows that a convolution requires between proteins
    per_protein = False  # whether the head pools residues to one output per protein

    def __init__(self, seeds: Sequence[int], dropout: float, device: torch.device) -> None:
        super().__init__()
        self.seeds, self.dropout, self.device = tuple(seeds), dropout, device
        # A seed has the same initial weights on every device; dropout is sampled where it is applied.
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.dropout_generators = self.generators
        if torch.device(device).type != "cpu":
            self.dropout_generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def init_uniform(self, *shape: int, fan_in: int) -> nn.Parameter:
        """Sample a parameter (S, *shape) uniformly in +-1/sqrt(fan_in), the default of torch's layers."""
        bound = 1 / math.sqrt(fan_in)
        sampled = [torch.rand(shape, generator=generator, device="cpu") for generator in self.generators]
        return nn.Parameter(torch.stack(sampled).mul_(2 * bound).sub_(bound).to(self.device))

    def apply_dropout(self, hidden_SNH: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Apply inverted dropout, with one random stream per seed.

        Args:
            hidden_SNH: Hidden units.
            sizes: Rows of each seed that are not padding, for which random numbers are sampled. None: all rows.

        Returns:
            (S, N, H), 0 in padding.
        """
        if not (self.training and self.dropout):
            return hidden_SNH
        kept_SNH = torch.zeros_like(hidden_SNH)
        rows = sizes or [hidden_SNH.shape[1]] * len(self.seeds)
        for kept_NH, size, generator in zip(kept_SNH, rows, self.dropout_generators, strict=True):
            shape = (size, hidden_SNH.shape[2])
            kept_NH[:size] = torch.rand(shape, generator=generator, device=hidden_SNH.device)
        return hidden_SNH * (kept_SNH >= self.dropout) / (1 - self.dropout)


class Fnn(SeededHead):
    """Feed-forward network on each row: linear D-H, ReLU, dropout, linear H-C.

    Rows of G * D numbers are those of G sources side by side, such as layers; the seeds are then G groups, one per
    source.
    """

    def __init__(
        self, seeds: Sequence[int], width: int, outputs: int, hidden: int, dropout: float, device: torch.device
    ) -> None:
        super().__init__(seeds, dropout, device)
        self.weight_in = self.init_uniform(width, hidden, fan_in=width)
        self.bias_in = self.init_uniform(1, hidden, fan_in=width)
        self.weight_out = self.init_uniform(hidden, outputs, fan_in=hidden)
        self.bias_out = self.init_uniform(1, outputs, fan_in=hidden)

    def forward(self, batch: FeatureBatch) -> Tensor:
        """Return the outputs (S, N, C)."""
        num_seeds, width, hidden = self.weight_in.shape
        num_sources = batch.x_ND.shape[1] // width
        if num_sources == 1:
            # one product for all seeds: (N, D) x (D, S * H)
            fused = self.weight_in.transpose(0, 1).reshape(width, num_seeds * hidden)
            hidden_SNH = (batch.x_ND @ fused).view(-1, num_seeds, hidden).transpose(0, 1) + self.bias_in
        else:
            x_GND = batch.x_ND.view(-1, num_sources, width).transpose(0, 1)
            fused = self.weight_in.view(num_sources, -1, width, hidden).transpose(1, 2).flatten(2)  # (G, D, S * H)
            hidden_GSNH = torch.bmm(x_GND, fused).unflatten(2, (-1, hidden)).transpose(1, 2)
            hidden_SNH = hidden_GSNH.flatten(0, 1) + self.bias_in
        return torch.baddbmm(self.bias_out, self.apply_dropout(F.relu(hidden_SNH)), self.weight_out)


class Cnn(SeededHead):
    """Convolutional network on residues: convolution of width 7 D-H, ReLU, dropout, convolution of width 7 H-C."""

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
        """Return the outputs (S, N, C), gap rows included."""
        num_seeds, taps, width, hidden = self.weight_in.shape
        fused = self.weight_in.permute(1, 2, 0, 3).reshape(1, taps, width, num_seeds * hidden)
        hidden_1NX = PackedConvolution.apply(batch.x_ND[None], fused)
        hidden_SNH = hidden_1NX[0].view(-1, num_seeds, hidden).transpose(0, 1) + self.bias_in
        # zero the gap rows, which separate proteins in the second convolution
        hidden_SNH = self.apply_dropout(F.relu(hidden_SNH)) * batch.is_real_N[:, None]
        return PackedConvolution.apply(hidden_SNH, self.weight_out) + self.bias_out


class LightAttention(SeededHead):
    """Light attention: convolutions of width 9 for values and attention, then attention-weighted mean and maximum.

    Source: Staerk et al. 2021, 10.1093/bioadv/vbab035. Layer norm replaces batch norm, as in biotrainer, so that seeds
    can share a pass.
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
        """Return the outputs (S, P, C), one per protein."""
        num_seeds, taps, width, _ = self.weight_value.shape
        both = torch.cat([self.weight_value, self.weight_attend])  # (2S, K, D, D), one product per tap
        fused = both.permute(1, 2, 0, 3).reshape(1, taps, width, 2 * num_seeds * width)
        out_NX = PackedConvolution.apply(batch.x_ND[None], fused)[0].view(-1, 2 * num_seeds, width)
        out_XND = out_NX.transpose(0, 1) + torch.cat([self.bias_value, self.bias_attend])
        values_SND, attend_SND = self.apply_dropout(out_XND[:num_seeds]), out_XND[num_seeds:]
        pooled = []
        # split and not slices: its backward pass is one concatenation, not a full-size tensor per protein
        stretches = zip(values_SND.split(batch.sizes, dim=1), attend_SND.split(batch.sizes, dim=1), strict=True)
        for value_STD, weight_STD in list(stretches)[1::2]:
            pooled.append(torch.cat([(value_STD * weight_STD.softmax(1)).sum(1), value_STD.amax(1)], dim=-1))
        hidden_SBH = torch.baddbmm(self.bias_in, torch.stack(pooled, dim=1), self.weight_in)
        hidden_SBH = F.layer_norm(F.relu(self.apply_dropout(hidden_SBH)), hidden_SBH.shape[-1:])
        return torch.baddbmm(self.bias_out, hidden_SBH * self.norm_scale + self.norm_shift, self.weight_out)


class Attention(SeededHead):
    """The FNN on a weighted mean of the residue vectors, whose weights are trained with it.

    A residue's weight is the softmax over the protein of its product with one vector of D numbers: one distribution
    over the residues. `LightAttention` has a distribution for each of the D dimensions, from convolutions of the
    neighbourhood, and adds the maxima; it has 18 D^2 parameters before the FNN instead of D.
    """

    per_protein = True

    def __init__(
        self, seeds: Sequence[int], width: int, outputs: int, hidden: int, dropout: float, device: torch.device
    ) -> None:
        super().__init__(seeds, dropout, device)
        self.weight_attend = self.init_uniform(width, fan_in=width)
        self.weight_in = self.init_uniform(width, hidden, fan_in=width)
        self.bias_in = self.init_uniform(1, hidden, fan_in=width)
        self.weight_out = self.init_uniform(hidden, outputs, fan_in=hidden)
        self.bias_out = self.init_uniform(1, outputs, fan_in=hidden)

    def forward(self, batch: FeatureBatch) -> Tensor:
        """Return the outputs (S, P, C), one per protein."""
        scores_NS = batch.x_ND @ self.weight_attend.T
        pairs = list(zip(batch.x_ND.split(batch.sizes), scores_NS.split(batch.sizes), strict=True))[1::2]
        pooled_SPD = torch.stack([scores_TS.softmax(0).T @ x_TD for x_TD, scores_TS in pairs], dim=1)
        hidden_SPH = self.apply_dropout(F.relu(torch.baddbmm(self.bias_in, pooled_SPD, self.weight_in)))
        return torch.baddbmm(self.bias_out, hidden_SPH, self.weight_out)


HEADS: dict[str, type[SeededHead]] = {
    "fnn": Fnn,
    "cnn": Cnn,
    "light_attention": LightAttention,
    "attention": Attention,
}


def reads_residues(probe: str) -> bool:
    """Return whether a probe of a protein task reads one vector per residue."""
    return probe in HEADS and HEADS[probe].per_protein
