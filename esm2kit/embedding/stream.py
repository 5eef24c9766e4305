"""Embed batches on a GPU while the next ones are read and the previous ones are copied, checked and written.

Each stage has one thread and works on one batch at a time, in order:

1. read: take the next batch from the FASTA, tokenise and pack it;
2. compute: launch the kernels, pool on the device, and start the copies to the host. No call waits for the GPU;
3. check: wait for the copies, look for values beyond float16, and compute the checksum.

The caller writes. Copies run beside the kernels of the next batch, on a stream of their own, into pinned buffers that
are used again after the caller has written their content.
"""

import queue
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from esm2kit.embedding.batch import (
    Output,
    PackedBatch,
    embed_on_device,
    float16_error,
    pack_batch,
    split_by_protein,
)
from esm2kit.embedding.plan import ProteinBatch
from esm2kit.models.encoder import Encoder
from esm2kit.sequences.windows import Windowing

# One buffer is filled by the GPU while another is checked and a third is written.
NUM_BUFFERS = 3
# Batches between the reader and the caller.
BATCHES_AHEAD = 6
ALIGNMENT = 64  # bytes


class Event(Protocol):
    """The moment at which the copies of a batch are complete."""

    def synchronize(self) -> None:
        """Wait for it."""


class Copies(Protocol):
    """Starts copies from a device to the host."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Allocate a buffer on the host that copies can be made to, (num_bytes,) uint8."""

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Event:
        """Start copies (from, to) of what the device computes, and return when they are complete."""


class CudaCopies:
    """Copies on a CUDA stream of their own, which run while the next kernels do."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def allocate(self, num_bytes: int) -> Tensor:
        """Allocate pinned memory."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Event:
        """Start copies after the kernels launched so far."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
                source.record_stream(self.stream)  # its memory must not be used again before it is copied
            copied = torch.cuda.Event(blocking=True)
            copied.record(self.stream)
        return copied


class DirectCopies:
    """Copies that are complete when they return: for mps, whose memory is that of the CPU, and for the CPU."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Allocate memory."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Event:
        """Copy, after the kernels launched so far."""
        for source, target in pairs:
            target.copy_(source)
        return self

    def synchronize(self) -> None:
        """Do nothing."""


def choose_copies(device: torch.device) -> Copies | None:
    """Choose how a device's results are copied to the host; None for the CPU, whose threads embed a batch each."""
    if device.type == "cpu":
        return None
    return CudaCopies(device) if device.type == "cuda" else DirectCopies()


class EmbeddedBatch(NamedTuple):
    """A batch in host memory.

    Args:
        batch: its proteins.
        arrays: per output, one array per protein; views of the buffer.
        checksum: CRC-32 of the values of proteins that are owned.
        buffer: the buffer, for `DeviceStream.release`.
    """

    batch: ProteinBatch
    arrays: list[list[np.ndarray]]
    checksum: int
    buffer: Tensor


class _Computed(NamedTuple):
    """A batch whose copies have been started: rows (R, width) per output, and per output whether all are finite."""

    batch: ProteinBatch
    packed: PackedBatch
    rows: list[Tensor]
    finite: Tensor
    buffer: Tensor
    copied: Event


class DeviceStream:
    """Iterates over embedded batches, in the order in which they are read.

    Args:
        encoder: the model.
        copies: how results are copied to the host.
        outputs: requested outputs.
        windowing: how long sequences are split.
        dtype: "float32" or "float16".
        owned_P: (P,) whether a protein's values are its own, see `find_owned_rows`.
    """

    def __init__(
        self,
        encoder: Encoder,
        copies: Copies,
        outputs: Sequence[Output],
        windowing: Windowing,
        dtype: str,
        owned_P: np.ndarray,
    ) -> None:
        self.encoder, self.copies, self.outputs, self.windowing = encoder, copies, outputs, windowing
        self.dtype, self.owned_P = dtype, owned_P
        self.free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        for _ in range(NUM_BUFFERS):
            self.free.put(copies.allocate(0))
        start = {"initializer": _use_device, "initargs": (encoder.device,)}
        self.stages = [ThreadPoolExecutor(1, f"embed-{name}", **start) for name in ("read", "compute", "check")]

    def run(self, batches: Iterator[tuple[ProteinBatch, list[str]]]) -> Iterator[EmbeddedBatch]:
        """Embed batches.

        Args:
            batches: batches with their sequences; another thread iterates.

        Yields:
            The batches in order. The caller calls `release` with each one's buffer after its use.

        Raises:
            InputError: a value exceeds the range of float16; or what `batches` raises.
        """
        read, compute, check = self.stages
        waiting: deque[Future] = deque()
        while True:
            while len(waiting) < BATCHES_AHEAD:
                packed = read.submit(self.read, batches)
                waiting.append(check.submit(self.check, compute.submit(self.compute, packed)))
            embedded = waiting.popleft().result()
            if embedded is None:
                return
            yield embedded

    def release(self, buffer: Tensor) -> None:
        """Return a buffer whose content is no longer needed."""
        self.free.put(buffer)

    def close(self) -> None:
        """End the threads."""
        self.free.put(None)  # ends a thread that waits for a buffer
        for stage in self.stages:
            stage.shutdown(wait=False, cancel_futures=True)
        for stage in self.stages:
            stage.shutdown()

    def read(self, batches: Iterator[tuple[ProteinBatch, list[str]]]) -> tuple[ProteinBatch, PackedBatch] | None:
        """Take and pack the next batch; None at the end."""
        batch, sequences = next(batches, (None, []))
        return None if batch is None else (batch, pack_batch(sequences, self.windowing))

    @torch.inference_mode()
    def compute(self, packed: Future) -> _Computed | None:
        """Launch the kernels of a batch and start the copies of its results."""
        if (found := packed.result()) is None:
            return None
        batch, sequences = found
        parts = embed_on_device(self.encoder, sequences, self.outputs, self.dtype)
        finite = torch.stack([torch.stack([rows.isfinite().all() for rows in each]).all() for each in parts])
        sizes = [finite.numel(), *(sum(rows.nbytes for rows in each) for each in parts)]
        starts = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]).tolist()
        if (buffer := self.free.get()) is None:
            raise CancelledError
        if buffer.numel() < starts[-1]:
            buffer = self.copies.allocate(starts[-1])
        blocks = [buffer[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        on_host = [blocks[0].view(torch.bool)]
        on_host += [
            block.view(each[0].dtype).view(-1, output.width)
            for block, each, output in zip(blocks[1:], parts, self.outputs, strict=True)
        ]
        pairs = [(finite, on_host[0])]
        for target, each in zip(on_host[1:], parts, strict=True):
            pairs += zip(each, target.split([len(rows) for rows in each]), strict=True)
        return _Computed(batch, sequences, on_host[1:], on_host[0], buffer, self.copies.start(pairs))

    def check(self, computed: Future) -> EmbeddedBatch | None:
        """Wait for the copies of a batch, check its values and compute its checksum."""
        if (found := computed.result()) is None:
            return None
        found.copied.synchronize()
        for output, is_finite in zip(self.outputs, found.finite.tolist(), strict=True):
            if self.dtype == "float16" and not is_finite:
                raise float16_error(output)
        arrays = [
            split_by_protein(rows.numpy(), found.packed, output)
            for rows, output in zip(found.rows, self.outputs, strict=True)
        ]
        owned = self.owned_P[found.batch.rows].tolist()
        return EmbeddedBatch(found.batch, arrays, checksum_arrays(arrays, owned), found.buffer)


def _use_device(device: torch.device) -> None:
    """Make a GPU the current one of this thread, so that pinned memory belongs to it and not to the first GPU."""
    if device.type == "cuda" and device.index is not None:  # torch.device("cuda") is the current one of every thread
        torch.cuda.set_device(device)


def checksum_arrays(arrays: Sequence[Sequence[np.ndarray]], owned: Sequence[bool]) -> int:
    """Compute the CRC-32 of the arrays of the proteins that are owned, output by output."""
    crc = 0
    for vectors in arrays:
        for vector, is_owned in zip(vectors, owned, strict=True):
            if is_owned:
                crc = zlib.crc32(np.ascontiguousarray(vector), crc)
    return crc
