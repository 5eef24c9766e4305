"""The work of one embedding process: batches out of the FASTA, through the model, into the files.

Threads embed, one batch each; this one reads ahead of them and writes behind them, and one more has what is written
reach the disk.
"""

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from esm2kit.core.errors import InputError
from esm2kit.core.files import hold_lock
from esm2kit.core.process_group import Process
from esm2kit.core.processes import count_cores
from esm2kit.core.progress import Progress
from esm2kit.embedding.batch import Output, embed_batch
from esm2kit.embedding.plan import Journal, ProteinBatch, Table, plan_window, read_records, split_into_windows
from esm2kit.models.encoder import Encoder
from esm2kit.sequences.windows import Windowing

logger = logging.getLogger(__name__)
SYNC_SECONDS = 10.0  # work that a power cut may cost
sync = getattr(os, "fdatasync", os.fsync)  # not every system spares the file's times
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def lock_run(folder: Path, process: Process) -> Iterator[None]:
    """Hold the run's lock: two runs into one folder would undo each other."""
    if process.rank:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    with hold_lock(lock, f"{folder}: another process is embedding into it; wait for it or give another --name"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


class EmbeddingRun:
    """The batches of this process.

    Args:
        folder: the run's folder, its table and files made.
        files: the FASTA files the table was made from.
        num_embedded_P: residues of each protein that are embedded.
        encoder, outputs, segments, dtype: as for `embed_batch`.
        process: this one among how many.
        workers: threads that embed; one a core if None.
    """

    def __init__(
        self,
        folder: Path,
        files: list[Path],
        num_embedded_P: np.ndarray,
        encoder: Encoder,
        outputs: list[Output],
        segments: Windowing,
        dtype: str,
        process: Process,
        workers: int | None,
    ) -> None:
        self.table, self.num_embedded_P = Table(folder), num_embedded_P
        self.files, self.encoder, self.outputs, self.segments, self.dtype = files, encoder, outputs, segments, dtype
        self.folder, self.process = folder, process
        self.journal = Journal(folder, process.rank)
        self.done = self.journal.read_done()
        # two threads on a GPU: one prepares and copies a batch while the other's is computed
        self.workers = 2 if encoder.device.type == "cuda" else workers or count_cores()

    def work(self) -> None:
        """Embed every batch that is neither done nor another process's.

        Raises: InputError if the disk fills; what is written by then stays.
        """
        self.handles = [os.open(self.folder / f"{output.file}.h5", os.O_WRONLY) for output in self.outputs]
        self.starts = [np.load(self.folder / f"{output.file}.starts.npy", mmap_mode="r") for output in self.outputs]
        self.journal_handle = self.journal.open()
        self.journal_end = os.lseek(self.journal_handle, 0, os.SEEK_END)
        self.pending: list[int] = []
        self.num_lost = 0  # batches that may not have reached the disk, and what it said
        self.sync_error = ""
        self.sync_thread = ThreadPoolExecutor(1)
        self.syncing: Future | None = None
        self.synced = time.monotonic()
        residues = sum(self._residues(batch) for batches in self._plan() for batch in batches)
        progress = Progress(logger, "embedded", "residues", residues)
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))
        waiting: deque[tuple[ProteinBatch, Future]] = deque()
        try:
            for batch, sequences in self._read():
                task = pool.submit(embed_batch, self.encoder, sequences, self.outputs, self.segments, self.dtype)
                waiting.append((batch, task))
                if len(waiting) > 3 * self.workers:
                    self._write_batch(*waiting.popleft(), progress)
            while waiting:
                self._write_batch(*waiting.popleft(), progress)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise self._disk_full(progress) from None
        except KeyboardInterrupt:
            logger.warning("stopped after %s of %s residues; the same command goes on", progress.done, progress.total)
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
            self._close()
        if self.num_lost:
            raise self._disk_full(progress)
        progress.log()

    def _disk_full(self, progress: Progress) -> InputError:
        return InputError(
            f"{self.folder}: the disk is full after {progress.done:,} of {progress.total:,} residues; free some space "
            "and run the same command again, it goes on from there",
            code="disk.full",
            path=self.folder,
            done=progress.done,
            total=progress.total,
        )

    def _plan(self) -> Iterator[list[ProteinBatch]]:
        """For each window of the table, the batches to do here."""
        number = 0
        for start, stop in split_into_windows(self.num_embedded_P):
            batches = plan_window(
                np.asarray(self.num_embedded_P[start:stop]) + 2, start, number, self.segments.batch_tokens
            )
            number += len(batches)
            mine = (batch for batch in batches if batch.number % self.process.world_size == self.process.rank)
            yield [batch for batch in mine if batch.number not in self.done]

    def _read(self) -> Iterator[tuple[ProteinBatch, list[str]]]:
        """The batches with their sequences, the FASTA read along."""
        stream = read_records(self.files)
        for (start, stop), batches in zip(split_into_windows(self.num_embedded_P), self._plan(), strict=True):
            sequences = [record.sequence for record in islice(stream, stop - start)]
            if [len(sequence) for sequence in sequences] != self.table.rows["num_residues"][start:stop].tolist():
                raise InputError(
                    f"{self.files[0]} changed while it was being embedded: start again with --restart",
                    code="embed.input-changed",
                    path=self.files[0],
                )
            for batch in batches:
                yield batch, [sequences[row - start][: self.num_embedded_P[row]] for row in batch.rows]

    def _residues(self, batch: ProteinBatch) -> int:
        return int(self.num_embedded_P[batch.rows].sum())

    def _write_batch(self, batch: ProteinBatch, future: Future, progress: Progress) -> None:
        """Pour one batch's vectors into the files."""
        for handle, starts, vectors in zip(self.handles, self.starts, future.result(), strict=True):
            for row, vector in zip(batch.rows, vectors, strict=True):
                _write_all(handle, vector, int(starts[row]))
        self.pending.append(batch.number)
        progress.update(progress.done + self._residues(batch))
        if time.monotonic() - self.synced > SYNC_SECONDS and (self.syncing is None or self.syncing.done()):
            self._await_sync()
            self.syncing = self.sync_thread.submit(self._sync, tuple(self.pending))
            self.pending.clear()
            self.synced = time.monotonic()

    def _sync(self, numbers: Sequence[int]) -> None:
        """First the values reach the disk, then the journal says so.

        A failure is final: a disk that once refused what it had taken may call the next attempt a success.
        """
        if self.num_lost:
            self.num_lost += len(numbers)
            return
        try:
            for handle in self.handles:
                sync(handle)
            data = np.array(numbers, dtype="<i8").tobytes()
            os.lseek(self.journal_handle, self.journal_end, os.SEEK_SET)
            while data:  # an almost full disk takes a part first
                data = data[os.write(self.journal_handle, data) :]
            sync(self.journal_handle)
        except OSError as error:
            self.num_lost += len(numbers)
            self.sync_error = error.strerror or str(error)
            raise
        self.journal_end += 8 * len(numbers)

    def _await_sync(self) -> None:
        running, self.syncing = self.syncing, None
        if running is not None:
            running.result()

    def _close(self) -> None:
        try:
            try:
                self._await_sync()
            except OSError:
                self._sync(self.pending)  # which adds them to what is lost
                raise
            self._sync(self.pending)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
        finally:
            if self.num_lost:
                logger.warning(
                    "the last %d batches could not be noted (%s) and will be done again", self.num_lost, self.sync_error
                )
            self.sync_thread.shutdown()
            for handle in (*self.handles, self.journal_handle):
                os.close(handle)


def _write_all(handle: int, vector: np.ndarray, start: int) -> None:
    """Write all of it; a disk that is almost full takes a part first."""
    data = memoryview(np.ascontiguousarray(vector)).cast("B")
    while data:
        written = os.pwrite(handle, data, start)
        data, start = data[written:], start + written
