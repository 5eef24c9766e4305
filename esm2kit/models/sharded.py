"""Run a model whose layers are divided over the devices of a node: FSDP2 gathers one layer at a time.

Each process computes its own batches. A forward pass gathers the layers of all processes, so all make the same number
of passes: before each one they agree whether any of them has a batch, and a process without one runs an idle pass.
"""

import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from esm2kit.core.errors import InputError
from esm2kit.core.hardware import is_out_of_memory, read_free_memory
from esm2kit.core.processes import read_launch
from esm2kit.models.config import ESM2Config
from esm2kit.models.encoder import (
    TOKENS_PER_BATCH,
    Encoder,
    Precision,
    _rearrange_weights,
    log_precision,
    resolve_precision,
)
from esm2kit.models.esm2 import ESM2
from esm2kit.models.initialise import build_meta_model, materialise
from esm2kit.models.memory import USABLE_SHARE, InferenceSettings, estimate_inference, format_gib
from esm2kit.models.packing import Packed, activate_flash_attention_4, to_device
from esm2kit.models.weights import ChangeLayer, Weights
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX

logger = logging.getLogger(__name__)

Shard = bool | Literal["auto"]
# how long a process waits for torchrun to stop it, after another one has stopped
SECONDS_TO_BE_STOPPED = 60.0


class _Turn(IntEnum):
    """What a process does next; the largest of all processes decides."""

    IDLE = 0
    WORK = 1
    STOP = 2


class PeerStopped(Exception):
    """Another process of a sharded model has stopped or was killed, so this one cannot continue."""


@contextmanager
def stop_with_peers() -> Iterator[None]:
    """Convert the end of another process to an interrupt of this one, which torchrun stops too."""
    try:
        yield
    except PeerStopped:
        time.sleep(SECONDS_TO_BE_STOPPED)  # its error is reported first; torchrun's signal ends this
        raise KeyboardInterrupt from None


def shard_layers(
    model: ESM2, mesh: DeviceMesh, policy: MixedPrecisionPolicy, whole: Iterable[nn.Parameter] = ()
) -> None:
    """Shard each layer of a model, and what is outside of its layers, over a mesh of one dimension, in place.

    Args:
        model: On the meta device, or identical on all ranks.
        mesh: The devices.
        policy: The types to compute and reduce in.
        whole: Parameters that stay complete on every rank.
    """
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=set(whole))
    register_fsdp_forward_method(model, "masked_logits")
    register_fsdp_forward_method(model, "encode")


class ShardedEncoder(Encoder):
    """Computes representations with the layers of the model divided over the processes of the node.

    All processes build it together. Each calls `encode` as often as it needs, then `finish`; both wait for the others.

    Args:
        weights: the model; every process reads one tensor at a time and keeps its part.
        precision: as for `Encoder`.
        device: the device of this process.
        change: changes the tensors of a layer after they are read, for example to merge adapters.
        fused: whether a CPU runs the fused layers of `Encoder`, with its numbers. Otherwise it runs the modules of the
            model, as other devices do.

    Raises:
        InputError: the device does not support the precision.
    """

    def __init__(
        self,
        weights: Weights,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
        change: ChangeLayer | None = None,
        fused: bool = True,
    ) -> None:
        self.config, self.device = weights.config, torch.device(device)
        self.compute_device = self.device
        self.precision = resolve_precision(precision, self.device)
        log_precision(precision, self.precision, self.device)
        self._local, self._lock = threading.local(), threading.Lock()
        self._stopping, self._ended, self._all_idle = False, False, True
        self._agreement, self._layers_group = _make_groups(self.device.type)
        mesh = DeviceMesh.from_group(self._layers_group, self.device.type)
        self.shards = mesh.size()
        self.is_fused = fused and self.device.type == "cpu"
        model = build_meta_model(self.config).requires_grad_(False).eval()
        if self.is_fused:
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
        else:
            model.to(dtype=getattr(torch, self.precision))
            # embedding and LM head, used outside of a forward pass, have less than a hundredth of the weights
            ends = (parameter for name, parameter in model.named_parameters() if not name.startswith("layers."))
            shard_layers(model, mesh, MixedPrecisionPolicy(cast_forward_inputs=False), ends)
        materialise(model, _read_changed(weights, change), self.device)
        weights.check()
        self.model = model.requires_grad_(False)
        self.inv_freq_P = model.layers[0].self_attn.rot_emb.inv_freq.float()
        self.layers = [_GatheredLayer(layer, self.config.head_dim, self.precision) for layer in model.layers]
        if self.device.type == "cuda":
            activate_flash_attention_4()
            torch.cuda.synchronize(self.device)  # other threads read the weights on other streams

    def encode(
        self, tokens_N: Tensor, num_tokens: Sequence[int], repr_layers: Sequence[int], on_device: bool = False
    ) -> dict[int, Tensor]:
        """Compute representations of packed sequences, as `Encoder.encode`; all processes make a pass together.

        Args:
            tokens_N: concatenated token ids of all sequences, each with BOS and EOS.
            num_tokens: tokens per sequence.
            repr_layers: layers to return, 0 to num_layers. The last one includes the final LayerNorm.
            on_device: leave the result on the device in the model's precision.

        Returns:
            {layer: (N, D)} in float32 on the CPU unless `on_device`.

        Raises:
            PeerStopped: another process has stopped.
        """
        with self._lock:
            if self._agree(_Turn.WORK) is _Turn.STOP:
                raise PeerStopped
            found = self._pass(tokens_N, num_tokens, repr_layers)
        return found if on_device else {layer: hidden_ND.float().cpu() for layer, hidden_ND in found.items()}

    def encode_rows(self, tokens_N: Tensor, num_tokens: Sequence[int], rows_M: Tensor) -> Tensor:
        """Compute the representations of the final layer at some rows, as `Encoder.encode_rows`."""
        last = self.config.num_layers
        return self.encode(tokens_N, num_tokens, [last], on_device=True)[last][rows_M.to(self.device)]

    def finish(self) -> None:
        """Make idle passes until no process has a batch; afterwards all can encode again.

        Raises:
            PeerStopped: another process has stopped.
        """
        with self._lock:
            while (turn := self._agree(_Turn.IDLE)) is _Turn.WORK:
                self._pass(torch.tensor([BOS_IDX, EOS_IDX]), [2], [self.config.num_layers])
            if turn is _Turn.STOP:
                raise PeerStopped

    def close(self) -> None:
        """Stop all processes before their next pass, unless all have finished; the encoder is not used any more."""
        self._stopping = True
        with self._lock:  # the pass that runs needs this process
            if not self._ended and not self._all_idle:
                try:
                    self._agree(_Turn.STOP)
                except PeerStopped:
                    if self.device.type == "cuda":
                        self._layers_group.abort()  # kernels that wait for a process that was killed
            self._ended = True

    def _agree(self, turn: _Turn) -> _Turn:
        """Exchange what each process does next; STOP is final."""
        if self._ended:
            raise PeerStopped
        largest = torch.tensor(int(_Turn.STOP if self._stopping else turn))
        try:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._agreement)
        except RuntimeError:  # a process has ended, and its connections with it
            self._ended = True
            raise PeerStopped from None
        found = _Turn(largest.item())
        self._ended, self._all_idle = found is _Turn.STOP, found is _Turn.IDLE
        return found

    @torch.no_grad()
    def _pass(self, tokens_N: Tensor, num_tokens: Sequence[int], repr_layers: Sequence[int]) -> dict[int, Tensor]:
        """Make a pass through all layers, whichever are returned, because the others gather all of them."""
        try:
            if not self.is_fused:
                packed = Packed(num_tokens, self.device)
                return self.model.encode(to_device(tokens_N.long(), self.device), packed, tuple(repr_layers))
            found = super().encode(tokens_N, num_tokens, [*repr_layers, self.config.num_layers])
            return {layer: found[layer] for layer in repr_layers}
        except Exception as error:
            self._ended = True  # the others wait in the middle of this pass, until this process ends
            if isinstance(error, RuntimeError) and not is_out_of_memory(error) and "gloo" in str(error):
                raise PeerStopped from None
            raise


class _GatheredLayer(NamedTuple):
    """A layer for `Encoder.encode` on a CPU, which is complete while it runs."""

    layer: nn.Module
    head_dim: int
    precision: Precision

    def run(self, *inputs: Any) -> None:
        """Apply the layer, as `_Layer.run`."""
        self.layer.unshard()
        _rearrange_weights(self.layer, self.head_dim, self.precision).run(*inputs)
        self.layer.reshard()


def _read_changed(weights: Weights, change: ChangeLayer | None) -> Iterator[tuple[str, Tensor]]:
    """Read all tensors, one at a time, and apply the changes of its layer to each."""
    for name in weights.names:
        if change is None or not name.startswith("layers."):
            yield name, weights.read([name])[name]
            continue
        _, index, own = name.split(".", 2)
        state = {own: weights.read([name])[name]}
        change(int(index), state)
        yield name, state.pop(own)


def _make_groups(kind: str) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Create two groups of the processes of this node: one for agreements, on the CPU, and one for the layers."""
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    own = []
    for node in dict.fromkeys(names):  # every process takes part in the creation of every group
        ranks = [rank for rank, name in enumerate(names) if name == node]
        agreement = dist.new_group(ranks, timedelta(days=30), "gloo")
        layers = dist.new_group(ranks, backend="nccl" if kind == "cuda" else "gloo")
        if dist.get_rank() in ranks:
            own = [agreement, layers]
    agreement, layers = own
    return agreement, layers


def choose_sharding(
    shard: Shard,
    config: ESM2Config,
    name: str,
    precision: Precision,
    device: torch.device,
    batch_tokens: int | None = None,
    layer_by_layer: bool | None = None,
) -> bool:
    """Choose whether a model is divided over the devices of the node, and log a line if it is.

    All processes call it, and choose the same.

    Args:
        shard: True or False, or auto for a model that does not fit on one GPU but does on all of the node.
        config: the architecture.
        name: of the model, for the line.
        precision: of the encoder.
        device: the device of this process.
        batch_tokens: tokens per batch. Default: as for `embed`.
        layer_by_layer: a choice of another way, which auto respects.

    Returns:
        Whether the model is divided.

    Raises:
        InputError: the model is to be divided, but there is one process.
    """
    ranks = read_launch().local_world_size
    if shard is True and ranks == 1:
        raise InputError(
            "--shard true divides a model over several devices, but this run has one. Set --devices, or use "
            "--layer_by_layer true.",
            code="shard.one-device",
        )
    if shard is True:
        logger.info("%s is divided over %d devices", name, ranks)
        return True
    # the processes of a CPU share its memory: a model that does not fit there does not fit in parts
    if shard is False or ranks == 1 or device.type != "cuda" or layer_by_layer is not None:
        return False
    smallest = torch.tensor(read_free_memory(device))
    if dist.is_initialized():
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
    tokens = batch_tokens or TOKENS_PER_BATCH[device.type]
    exact, free = resolve_precision(precision, device), smallest.item()
    whole, part = (
        estimate_inference(config, InferenceSettings(tokens=tokens, precision=exact, device="cuda", shards=count)).total
        for count in (1, ranks)
    )
    if whole <= USABLE_SHARE * free or part > USABLE_SHARE * free:
        return False
    logger.info(
        "%s takes about %s, and %s are free on a GPU: it is divided over %d GPUs, about %s each. --shard false reads "
        "it layer by layer",
        *(name, format_gib(whole), format_gib(free), ranks, format_gib(part)),
    )
    return True
