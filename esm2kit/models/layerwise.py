"""Run a model that does not fit in memory: one layer at a time, over many sequences, with the next layer read ahead.

The hidden states of a group of batches stay in host memory. Each layer is read from the checkpoint, moved to the device
and applied to all batches of the group, while a thread reads the next layer. The kernels and the batches are those of
`Encoder`, so the numbers are the same.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esm2kit.core.hardware import read_free_memory
from esm2kit.core.processes import count_cores, read_launch
from esm2kit.models.config import ESM2Config
from esm2kit.models.encoder import TOKENS_PER_BATCH, Encoder, Precision, _Layer, _rearrange_weights, resolve_precision
from esm2kit.models.esm2 import Packed, TransformerLayer, rotary_tables
from esm2kit.models.load import ModelFile
from esm2kit.models.lora import weights_sha256
from esm2kit.models.memory import USABLE_SHARE, InferenceSettings, estimate_inference, format_gib
from esm2kit.models.sharded import ShardedEncoder
from esm2kit.models.weights import ChangeLayer, Weights
from esm2kit.sequences.batching import split_within_budget

logger = logging.getLogger(__name__)
# Tokens whose hidden states are in host memory at a time: so many that a layer computes for as long as the next one is
# read from a disk. An estimate: at 15B a layer has 1.3 GB and takes 0.6 GFLOP per token.
GROUP_TOKENS = {"cpu": 16_384, "cuda": 262_144, "mps": 65_536}
SECONDS_BETWEEN_LINES = 10.0


class SelectedRows(NamedTuple):
    """A batch of packed sequences, and the rows of it that are needed.

    Args:
        tokens_N: concatenated token ids of the sequences, each with BOS and EOS.
        num_tokens: tokens per sequence.
        rows_M: indices of the rows, ascending.
    """

    tokens_N: Tensor
    num_tokens: Sequence[int]
    rows_M: Tensor


class LayerwiseEncoder(Encoder):
    """Computes representations with two layers in memory at a time: one computes, the next is read.

    A call runs over all its sequences layer by layer, so pass many of them: `group_tokens` tokens.

    Args:
        weights: the model.
        precision: as for `Encoder`.
        device: the device that computes. The hidden states and the results are on the CPU.
        batch_tokens: tokens that are computed together. Default: as for `embed`.
        workers: single-threaded workers on the CPU. Default: one per core.
        change: changes the tensors of a layer after they are read, for example to merge adapters.
        fused: whether a CPU runs the fused layers of `Encoder`. Otherwise it runs the modules of the model, as other
            devices do, for `run_layers`.
    """

    def __init__(
        self,
        weights: Weights,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
        batch_tokens: int | None = None,
        workers: int | None = None,
        change: ChangeLayer | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__(weights.load_ends(), precision, device)
        self.weights, self.change = weights, change
        self.compute_device, self.device = self.device, torch.device("cpu")
        kind = self.compute_device.type
        self.inv_freq_P = self.model.layers[0].self_attn.rot_emb.inv_freq.float()
        self.layers, self.model.layers = [], torch.nn.ModuleList()
        self.batch_tokens = batch_tokens or TOKENS_PER_BATCH[kind]
        self.group_tokens = max(self.batch_tokens, GROUP_TOKENS[kind])
        self.is_fused = fused and kind == "cpu"
        if not self.is_fused:
            self.model.to(dtype=getattr(torch, self.precision))
        self.workers = (workers or count_cores()) if kind == "cpu" else 1
        self.dtype = self.model.embed_tokens.weight.dtype
        self._reader = ThreadPoolExecutor(1, "read_layer", torch.set_num_threads, (1,))
        self._ahead: tuple[int, Future] | None = None
        self._lock = threading.Lock()
        self._logged = time.monotonic()
        self._closed = False

    @torch.inference_mode()
    def encode(
        self, tokens_N: Tensor, num_tokens: Sequence[int], repr_layers: Sequence[int], on_device: bool = False
    ) -> dict[int, Tensor]:
        """Compute representations of packed sequences, as `Encoder.encode`.

        Args:
            tokens_N: concatenated token ids of all sequences, each with BOS and EOS.
            num_tokens: tokens per sequence. Consecutive sequences form batches of at most `batch_tokens`.
            repr_layers: layers to return, 0 to num_layers. The last one includes the final LayerNorm.
            on_device: has no effect.

        Returns:
            {layer: (N, D)} in float32 on the CPU, not overwritten by later calls.

        Raises:
            InputError: the model's files have changed or are damaged.
        """
        keep, top, last = set(repr_layers), max(repr_layers), self.config.num_layers
        with self._lock, self._start_workers() as run:
            batches = self._split(num_tokens)
            x_ND = torch.empty(len(tokens_N), self.config.embed_dim, dtype=self.dtype)
            run(lambda batch: self._embed_batch(tokens_N, x_ND, batch), batches)
            found = {0: x_ND.to(torch.float32, copy=True)} if 0 in keep else {}
            for number in range(1, top + 1):
                self._apply_layer(run, number, top, x_ND, batches)
                if number in keep and number < last:
                    found[number] = x_ND.to(torch.float32, copy=True)
            if last in keep:
                run(lambda batch: self._normalise(x_ND, batch), batches)
                found[last] = x_ND.float()
        return found

    @torch.inference_mode()
    def encode_rows_together(self, inputs: Sequence[SelectedRows]) -> list[Tensor]:
        """Compute the representations of the final layer at some rows of batches, as `Encoder.encode_rows` for each.

        Args:
            inputs: the batches.

        Returns:
            (M, D) of each batch, with the final LayerNorm, in float32 on the CPU.

        Raises:
            InputError: the model's files have changed or are damaged.
        """
        tokens_N, last = torch.cat([each.tokens_N for each in inputs]), self.config.num_layers
        ends = np.cumsum([0, *(len(each.tokens_N) for each in inputs)]).tolist()
        batches = [
            self._lay_out(Packed(list(each.num_tokens), self.compute_device), start)
            for each, start in zip(inputs, ends, strict=False)
        ]
        rows_at = {batch.rows.start: each.rows_M for batch, each in zip(batches, inputs, strict=True)}
        found: dict[int, Tensor] = {}
        with self._lock, self._start_workers() as run:
            x_ND = torch.empty(len(tokens_N), self.config.embed_dim, dtype=self.dtype)
            run(lambda batch: self._embed_batch(tokens_N, x_ND, batch), batches)
            for number in range(1, last):
                self._apply_layer(run, number, last, x_ND, batches)
            layer = self._take_layer(last - 1, last)

            def finish(batch: _Batch) -> None:
                rows_M = rows_at[batch.rows.start]
                found[batch.rows.start] = self._run_last_layer(layer, x_ND, batch, rows_M).float().cpu()

            run(finish, batches)
        return [found[batch.rows.start] for batch in batches]

    @torch.inference_mode()
    def run_layers(self, tokens_N: Tensor, layouts: Sequence[Packed]) -> None:
        """Run all layers with layouts that record what they need of the attention.

        Args:
            tokens_N: concatenated token ids of all sequences, each with BOS and EOS.
            layouts: of consecutive batches, on the device that computes. Each attends once per layer, in order.

        Raises:
            InputError: the model's files have changed or are damaged.
        """
        batches, start, top = [], 0, self.config.num_layers
        for layout in layouts:
            batches.append(self._lay_out(layout, start))
            start += layout.num_rows
        with self._lock, self._start_workers() as run:
            x_ND = torch.empty(len(tokens_N), self.config.embed_dim, dtype=self.dtype)
            run(lambda batch: self._embed_batch(tokens_N, x_ND, batch), batches)
            for number in range(1, top + 1):
                self._apply_layer(run, number, top, x_ND, batches)

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor, on_device: bool = False) -> Tensor:
        """Compute the LM head's logits, as `Encoder.logits`, in batches."""
        return torch.cat([super(LayerwiseEncoder, self).logits(rows) for rows in hidden_ND.split(self.batch_tokens)])

    def close(self) -> None:
        """Stop the call that runs in another thread, and release the layer that was read ahead."""
        self._closed, self._ahead = True, None
        self._reader.shutdown(cancel_futures=True)

    def _split(self, num_tokens: Sequence[int]) -> list["_Batch"]:
        sizes = np.asarray(num_tokens, dtype=np.int64)
        starts = sizes.cumsum() - sizes
        parts = split_within_budget(sizes, self.batch_tokens)
        return [
            self._lay_out(Packed(sizes[part].tolist(), self.compute_device), int(starts[part.start])) for part in parts
        ]

    def _lay_out(self, packed: Packed, start: int) -> "_Batch":
        """Prepare a batch whose first row in the group is `start`."""
        if self.is_fused:
            turns: Any = self._rotations(packed)
        else:
            turns = tuple(x[packed.position_N] for x in rotary_tables(self.inv_freq_P, packed.max_tokens))
        return _Batch(slice(start, start + sum(packed.num_tokens)), packed, turns)

    @contextmanager
    def _start_workers(self) -> Iterator["_Run"]:
        """Yield a function that applies another one to every batch, on the CPU with one batch per worker."""
        threads, is_gpu = torch.get_num_threads(), self.compute_device.type != "cpu"
        pool = ThreadPoolExecutor(self.workers, "layer", *(() if is_gpu else (torch.set_num_threads, (1,))))

        def run(function: Callable[["_Batch"], None], batches: list["_Batch"]) -> None:
            @torch.inference_mode()
            def apply(batch: "_Batch") -> None:
                if self._closed:
                    raise CancelledError
                function(batch)

            list(pool.map(apply, batches))

        try:
            yield run
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def _apply_layer(self, run: "_Run", number: int, top: int, x_ND: Tensor, batches: list["_Batch"]) -> None:
        """Apply the layer of a number, from 1, to all batches."""
        layer = self._take_layer(number - 1, top)
        run(lambda batch: self._run_layer(layer, x_ND, batch), batches)
        self._log(number, top, len(x_ND))

    def _embed_batch(self, tokens_N: Tensor, x_ND: Tensor, batch: "_Batch") -> None:
        tokens_N = tokens_N[batch.rows].to(self.compute_device, torch.long)
        if self.is_fused:
            self._embed(tokens_N, batch.packed, x_ND[batch.rows])
        else:
            x_ND[batch.rows] = self.model.embed(tokens_N, batch.packed).cpu()

    def _run_layer(self, layer: "_Layer | TransformerLayer", x_ND: Tensor, batch: "_Batch") -> None:
        if self.is_fused:
            layer.run(x_ND[batch.rows], batch.turns, batch.packed, self._buffers(batch.packed))
        else:
            x_ND[batch.rows] = layer(x_ND[batch.rows].to(self.compute_device), *batch.turns, batch.packed).cpu()

    def _run_last_layer(
        self, layer: "_Layer | TransformerLayer", x_ND: Tensor, batch: "_Batch", rows_M: Tensor
    ) -> Tensor:
        """Compute the rows of the last layer that are needed, (M, D), with the final LayerNorm."""
        norm = self.model.emb_layer_norm_after
        if self.is_fused:
            return norm(
                layer.run_rows(x_ND[batch.rows], batch.turns, batch.packed, self._buffers(batch.packed), rows_M)
            )
        hidden_ND = norm(layer(x_ND[batch.rows].to(self.compute_device), *batch.turns, batch.packed))
        return hidden_ND[rows_M.to(self.compute_device)]

    def _normalise(self, x_ND: Tensor, batch: "_Batch") -> None:
        x_ND[batch.rows] = self.model.emb_layer_norm_after(x_ND[batch.rows].to(self.compute_device)).cpu()

    def _take_layer(self, index: int, top: int) -> "_Layer | TransformerLayer":
        """Return a layer, and start to read the next one; after the last, the first one of the next group."""
        if self._ahead is None or self._ahead[0] != index:
            self._ahead = index, self._reader.submit(self._read_layer, index)
        future, self._ahead = self._ahead[1], None
        layer = future.result()
        following = (index + 1) % top
        self._ahead = following, self._reader.submit(self._read_layer, following)
        return layer

    @torch.inference_mode()
    def _read_layer(self, index: int) -> "_Layer | TransformerLayer":
        if index == 0:
            self.weights.check()
        layer = self.weights.read_layer(index, self.change)
        if self.is_fused:
            return _rearrange_weights(layer, self.config.head_dim, self.precision)
        layer = layer.to(self.compute_device, self.dtype)
        if self.compute_device.type == "cuda":
            torch.cuda.synchronize(self.compute_device)  # another thread uses the weights on its own stream
        return layer

    def _log(self, number: int, top: int, tokens: int) -> None:
        if time.monotonic() - self._logged >= SECONDS_BETWEEN_LINES:
            self._logged = time.monotonic()
            logger.info("layer %d of %d, for a group of %s tokens", number, top, f"{tokens:,}")


class _Batch(NamedTuple):
    """A batch of a group.

    Args:
        rows: its rows.
        packed: its layout on the device that computes.
        turns: the rotations of its positions, in the form that the layers take on the device.
    """

    rows: slice
    packed: Packed
    turns: Any


_Run = Callable[[Callable[[_Batch], None], list[_Batch]], None]


def load_encoder(
    model: ModelFile,
    precision: Precision = "float32",
    device: torch.device | str = "cpu",
    layer_by_layer: bool | None = None,
    batch_tokens: int | None = None,
    workers: int | None = None,
    check_digest: Callable[[str], None] | None = None,
    shard: bool = False,
) -> Encoder:
    """Load an encoder, completely, layer by layer, or divided over the devices of the node.

    Args:
        model: the model's file.
        precision: as for `Encoder`.
        device: the device that computes.
        layer_by_layer: whether to read each layer when it is used. Default: if the model does not fit in memory.
        batch_tokens: tokens per batch, for `LayerwiseEncoder`.
        workers: workers on the CPU, for `LayerwiseEncoder`.
        check_digest: called with `weights_sha256` of the model; may raise an InputError.
        shard: divide the model, see `choose_sharding`; all processes load it together.

    Returns:
        The encoder.

    Raises:
        InputError: the model's files are damaged or have changed, or the device does not support the precision.
    """
    if shard:
        weights = model.open()
        if check_digest is not None:
            check_digest(weights.sha256())
        return ShardedEncoder(weights, precision, device)
    if layer_by_layer is None:
        layer_by_layer = not fits_in_memory(model.config, model.name, precision, torch.device(device), batch_tokens)
    if layer_by_layer:
        weights = model.open()
        if check_digest is not None:
            check_digest(weights.sha256())
        return LayerwiseEncoder(weights, precision, device, batch_tokens, workers)
    esm2 = model.load()
    if check_digest is not None:
        check_digest(weights_sha256(esm2))
    return Encoder(esm2, precision, device)


def fits_in_memory(
    config: ESM2Config, name: str, precision: Precision, device: torch.device, batch_tokens: int | None = None
) -> bool:
    """Check whether a complete model fits in the free memory of a device; log a line if it does not.

    Args:
        config: the architecture.
        name: of the model, for the line.
        precision: of the encoder.
        device: the device that computes.
        batch_tokens: tokens per batch. Default: as for `embed`.

    Returns:
        Whether it fits, or the system does not report its free memory.
    """
    free = read_free_memory(device)
    if free is None:
        return True
    if device.type == "cpu":
        free //= read_launch().local_world_size  # each process of the node loads the model
    settings = InferenceSettings(
        tokens=batch_tokens or TOKENS_PER_BATCH[device.type],
        precision=resolve_precision(precision, device),
        device=device.type,
    )
    needed = estimate_inference(config, settings).total
    if needed <= USABLE_SHARE * free:
        return True
    logger.info(
        "%s takes about %s, and %s of memory are free on %s: it runs layer by layer. This is slower; "
        "--layer_by_layer false loads the whole model",
        *(name, format_gib(needed), format_gib(free), device.type),
    )
    return False
