"""The work of one process of an embedding run: read batches from the FASTA, embed them, and write the vectors.

On a CPU, worker threads embed one batch each, and the main thread reads the batches and writes the vectors. On a GPU,
`DeviceStream` reads, computes and copies, and the main thread writes. One more thread syncs the files to the disk.
"""

import errno
import logging
import os
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esm2kit.core.errors import InputError
from esm2kit.core.files import BINARY, hold_lock, read_at, write_at
from esm2kit.core.process_group import Process
from esm2kit.core.processes import count_cores
from esm2kit.core.progress import Progress
from esm2kit.embedding.batch import Output, embed_batch
from esm2kit.embedding.plan import (
    JOURNAL_ENTRY,
    Journal,
    ProteinBatch,
    Table,
    plan_window,
    read_records,
    split_into_windows,
)
from esm2kit.embedding.stream import Copies, DeviceStream, checksum_arrays, choose_copies
from esm2kit.models.encoder import Encoder
from esm2kit.models.sharded import stop_with_peers
from esm2kit.sequences.batching import group_batches
from esm2kit.sequences.windows import Windowing

logger = logging.getLogger(__name__)
SYNC_SECONDS = 10.0  # work that a power failure can lose
sync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def lock_run(folder: Path, process: Process) -> Iterator[None]:
    """Lock a run's folder for the duration of the context, so that no other process embeds into it."""
    if process.rank:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    with hold_lock(lock, f"{folder}: another process is embedding into it. Wait for it, or use another --name."):
        yield


class EmbeddingRun:
    """The batches of one process.

    Args:
        folder: the run's folder, with its table and files.
        files: FASTA files from which the table was built.
        num_embedded_P: (P,) number of residues per protein that are embedded.
        encoder: the model.
        outputs: requested outputs.
        windowing: how long sequences are split.
        dtype: "float32" or "float16".
        process: rank and number of processes.
        workers: worker threads on the CPU. None uses one per core.
    """

    def __init__(
        self,
        folder: Path,
        files: list[Path],
        num_embedded_P: np.ndarray,
        encoder: Encoder,
        outputs: list[Output],
        windowing: Windowing,
        dtype: str,
        process: Process,
        workers: int | None,
    ) -> None:
        self.table, self.num_embedded_P = Table(folder), num_embedded_P
        self.files, self.encoder, self.outputs, self.windowing, self.dtype = files, encoder, outputs, windowing, dtype
        self.folder, self.process = folder, process
        self.journal = Journal(folder, process.rank)
        self.done = self.journal.read_done()
        # an encoder that forms its own batches has workers of its own, and a sharded one makes one pass at a time
        self.workers = 1 if encoder.group_tokens or encoder.shards > 1 else workers or count_cores()

    def work(self, name: str) -> None:
        """Embed all batches of this process that are not finished.

        Args:
            name: Name of the model, for the progress.

        Raises:
            InputError: the disk is full; the run can be resumed.
            OSError: any other failure of the file system.
            KeyboardInterrupt: the run was interrupted; it can be resumed.
        """
        self.handles = [os.open(self.folder / f"{output.file}.h5", os.O_RDWR | BINARY) for output in self.outputs]
        self.starts = [np.load(self.folder / f"{output.file}.starts.npy", mmap_mode="r") for output in self.outputs]
        self.owned_P = find_owned_rows(self.starts[0])
        self._check_done()
        self.journal_handle = self.journal.open()
        self.journal_end = os.lseek(self.journal_handle, 0, os.SEEK_END)
        self.pending: list[tuple[int, int]] = []  # index and checksum of finished batches
        self.num_lost = 0  # batches that may not be on the disk, and the error
        self.sync_error = ""
        self.sync_thread = ThreadPoolExecutor(1)
        self.syncing: Future | None = None
        self.synced = time.monotonic()
        residues = sum(self._residues(batch) for batches in self._plan() for batch in batches)
        progress = Progress(logger, f"{name}: embedded", "residues", residues)
        copies = None if self.encoder.group_tokens else choose_copies(self.encoder.device)
        try:
            with stop_with_peers():
                if copies is None:
                    self._embed_in_workers(progress)
                else:
                    self._embed_on_device(copies, progress)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise self._disk_full(progress) from None
        except KeyboardInterrupt:
            message = "stopped after %s of %s residues; rerun the command to resume"
            if not self.process.rank:
                logger.warning(message, progress.done, progress.total)
            raise
        finally:
            progress.close()
            self._close()
        if self.num_lost:
            raise self._disk_full(progress)
        progress.log()

    def _embed_in_workers(self, progress: Progress) -> None:
        """Embed and write all batches; each worker thread makes a call of the encoder at a time."""
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))
        waiting: deque[tuple[ProteinBatch, Future, int]] = deque()  # a batch, and its place in the task's result
        try:
            for group in self._group(self._read()):
                owned = [self.owned_P[batch.rows] for batch, _ in group]
                sequences = [sequences for _, sequences in group]
                task = pool.submit(
                    _embed_batches, owned, sequences, self.encoder, self.outputs, self.windowing, self.dtype
                )
                waiting += [(batch, task, place) for place, (batch, _) in enumerate(group)]
                while len(waiting) > (len(group) if self.encoder.group_tokens else 3 * self.workers):
                    self._await_batch(*waiting.popleft(), progress)
            while waiting:
                self._await_batch(*waiting.popleft(), progress)
            self.encoder.finish()
        finally:
            self.encoder.close()
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def _await_batch(self, batch: ProteinBatch, task: Future, place: int, progress: Progress) -> None:
        self._write_batch(batch, *task.result()[place], progress)

    def _embed_on_device(self, copies: Copies, progress: Progress) -> None:
        """Embed and write all batches; the GPU computes while threads read, copy and check other batches."""
        stream = DeviceStream(self.encoder, copies, self.outputs, self.windowing, self.dtype, self.owned_P)
        try:
            for embedded in stream.run(self._read()):
                self._write_batch(embedded.batch, embedded.arrays, embedded.checksum, progress)
                stream.release(embedded.buffer)
            self.encoder.finish()
        finally:
            self.encoder.close()
            stream.close()

    def _disk_full(self, progress: Progress) -> InputError:
        return InputError(
            f"{self.folder}: the disk is full after {progress.done:,} of {progress.total:,} residues. "
            "Free some space and rerun the command to resume.",
            code="disk.full",
            path=self.folder,
            done=progress.done,
            total=progress.total,
        )

    def _plan(self) -> Iterator[list[ProteinBatch]]:
        """Iterate over the windows of the table and plan the batches of this process that are not finished."""
        for batches in self._own_batches():
            yield [batch for batch in batches if batch.number not in self.done]

    def _own_batches(self) -> Iterator[list[ProteinBatch]]:
        """Iterate over the windows of the table and plan all batches of this process."""
        number = 0
        for start, stop in split_into_windows(self.num_embedded_P):
            num_tokens = np.asarray(self.num_embedded_P[start:stop]) + 2
            batches = plan_window(num_tokens, start, number, self.windowing.batch_tokens)
            number += len(batches)
            yield [batch for batch in batches if batch.number % self.process.world_size == self.process.rank]

    def _check_done(self) -> None:
        """Compare the values of an earlier process with the checksums in its journal; embed damaged batches again."""
        if not self.done:
            return
        checked = [batch for batches in self._own_batches() for batch in batches if batch.number in self.done]
        wrong = [batch.number for batch in checked if self._checksum_batch(batch) != self.done[batch.number]]
        if wrong:
            logger.warning("%s: %d damaged batches of the earlier run are embedded again", self.folder, len(wrong))
            for number in wrong:
                del self.done[number]

    def _checksum_batch(self, batch: ProteinBatch) -> int:
        """Compute the CRC-32 of a batch's values in the files."""
        crc, itemsize = 0, np.dtype(self.dtype).itemsize
        for output, handle, starts in zip(self.outputs, self.handles, self.starts, strict=True):
            for row in batch.rows[self.owned_P[batch.rows]].tolist():
                vectors = int(self.num_embedded_P[row]) if output.reads == "residues" else 1
                crc = zlib.crc32(read_at(handle, vectors * output.width * itemsize, int(starts[row])), crc)
        return crc

    def _read(self) -> Iterator[tuple[ProteinBatch, list[str]]]:
        """Iterate over the batches with their sequences, while reading the FASTA.

        Yields:
            A batch, and the residues of its proteins that are embedded.

        Raises:
            InputError: the FASTA has changed since the table was built.
        """
        stream = read_records(self.files)
        for (start, stop), batches in zip(split_into_windows(self.num_embedded_P), self._plan(), strict=True):
            sequences = [record.sequence for record in islice(stream, stop - start)]
            if [len(sequence) for sequence in sequences] != self.table.rows["num_residues"][start:stop].tolist():
                raise InputError(
                    f"{self.files[0]} has changed since the run started. Start again with --restart.",
                    code="embed.input-changed",
                    path=self.files[0],
                )
            for batch in batches:
                yield batch, [sequences[row - start][: self.num_embedded_P[row]] for row in batch.rows]

    def _group(
        self, batches: Iterable[tuple[ProteinBatch, list[str]]]
    ) -> Iterator[list[tuple[ProteinBatch, list[str]]]]:
        """Iterate over the batches that the encoder takes in one call: one, or as many as it needs to be efficient."""

        def count_tokens(found: tuple[ProteinBatch, list[str]]) -> int:
            return sum(len(sequence) + 2 for sequence in found[1])

        return group_batches(batches, count_tokens, self.encoder.group_tokens)

    def _residues(self, batch: ProteinBatch) -> int:
        return int(self.num_embedded_P[batch.rows].sum())

    def _write_batch(
        self, batch: ProteinBatch, arrays: list[list[np.ndarray]], checksum: int, progress: Progress
    ) -> None:
        """Write the vectors of a batch to the files, and start a sync if one is due."""
        for handle, starts, vectors in zip(self.handles, self.starts, arrays, strict=True):
            for row, vector in zip(batch.rows, vectors, strict=True):
                _write_all(handle, vector, int(starts[row]))
        self.pending.append((batch.number, checksum))
        progress.update(progress.done + self._residues(batch))
        if time.monotonic() - self.synced > SYNC_SECONDS and (self.syncing is None or self.syncing.done()):
            self._await_sync()
            self.syncing = self.sync_thread.submit(self._sync, tuple(self.pending))
            self.pending.clear()
            self.synced = time.monotonic()

    def _sync(self, finished: Sequence[tuple[int, int]]) -> None:
        """Sync the values to the disk, then append the batches to the journal.

        After a failure there is no further attempt, because a second sync can succeed although data were lost.

        Args:
            finished: index and checksum of each batch.

        Raises:
            OSError: a write or a sync failed.
        """
        if self.num_lost:
            self.num_lost += len(finished)
            return
        try:
            for handle in self.handles:
                sync(handle)
            data = Journal.encode(finished)
            os.lseek(self.journal_handle, self.journal_end, os.SEEK_SET)
            while data:  # a partial write is possible on an almost full disk
                data = data[os.write(self.journal_handle, data) :]
            sync(self.journal_handle)
        except OSError as error:
            self.num_lost += len(finished)
            self.sync_error = error.strerror or str(error)
            raise
        self.journal_end += JOURNAL_ENTRY.itemsize * len(finished)

    def _await_sync(self) -> None:
        running, self.syncing = self.syncing, None
        if running is not None:
            running.result()

    def _close(self) -> None:
        try:
            try:
                self._await_sync()
            except OSError:
                self._sync(self.pending)  # counts them as lost
                raise
            self._sync(self.pending)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
        finally:
            if self.num_lost:
                logger.warning(
                    "could not record the last %d batches (%s); they will be embedded again",
                    self.num_lost,
                    self.sync_error,
                )
            self.sync_thread.shutdown()
            for handle in (*self.handles, self.journal_handle):
                os.close(handle)


def _write_all(handle: int, vector: np.ndarray, start: int) -> None:
    """Write a vector at a byte offset; a partial write is possible on an almost full disk."""
    data = memoryview(np.ascontiguousarray(vector)).cast("B")
    while data:
        written = write_at(handle, data, start)
        data, start = data[written:], start + written


def find_owned_rows(starts_P: np.ndarray) -> np.ndarray:
    """(P,) whether a protein's values are its own: proteins of equal key share the last one's, equal up to rounding."""
    _, place_P, counts = np.unique(starts_P, return_inverse=True, return_counts=True)
    return counts[place_P] == 1


def _embed_batches(
    owned: Sequence[np.ndarray], batches: Sequence[list[str]], encoder: Encoder, *arguments: Any
) -> list[tuple[list[list[np.ndarray]], int]]:
    """For each batch the arrays of `embed_batch`, and the CRC-32 of those that are `owned`."""
    arrays = embed_batch(encoder, [sequence for batch in batches for sequence in batch], *arguments)
    found, start = [], 0
    for owned_P, batch in zip(owned, batches, strict=True):
        own = [vectors[start : start + len(batch)] for vectors in arrays]
        start += len(batch)
        found.append((own, checksum_arrays(own, owned_P.tolist())))
    return found
