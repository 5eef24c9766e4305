"""The work of one embedding process: batches out of the FASTA, through the model, into the files.

Threads embed, one batch each; this one reads ahead of them and writes behind them, and one more has what is written
reach the disk.
"""

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from esm2kit.embed_batch import Output, Segments, embed_batch
from esm2kit.embed_plan import Batch, Journal, Table, plan_window, records, windows
from esm2kit.errors import InputError
from esm2kit.inference import Encoder
from esm2kit.provenance import locked
from esm2kit.ranks import TORCHRUN, cores, leave_group_at_exit, local_rank, rank, world_size

logger = logging.getLogger(__name__)
SYNC_SECONDS = 10.0  # work that a power cut may cost
LOG_SECONDS = 5.0
MEET_SECONDS = 600.0  # that srun's tasks wait for the last of them to start
sync = getattr(os, "fdatasync", os.fsync)  # not every system spares the file's times
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Process(NamedTuple):
    """This process among those of torchrun or srun."""

    rank: int
    world_size: int
    local_rank: int


def join() -> Process:
    """The group of all the job's processes, over gloo: it carries a few words, never vectors.

    Raises: InputError if srun's other tasks do not come.
    """
    process = Process(rank(), world_size(), local_rank())
    if process.world_size > 1 and not dist.is_initialized():
        # torchrun has made a store for its workers, which the environment names; srun's tasks make theirs
        if TORCHRUN in os.environ:
            met = {}
        else:
            met = {"store": _srun_store(process), "rank": process.rank, "world_size": process.world_size}
        dist.init_process_group("gloo", timeout=timedelta(days=30), **met)
        leave_group_at_exit()
    return process


def _srun_store(process: Process) -> dist.Store:
    from lightning.fabric.plugins.environments import SLURMEnvironment  # slow, and only srun's tasks need it

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
    host = os.environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
    # the port is the job's and the step's own, so that two on one node do not meet
    step = int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ.get("SLURM_STEP_ID", "0"))
    port = int(os.environ.get("MASTER_PORT", 15_000 + step % 10_000))
    try:
        return dist.TCPStore(
            host, port, process.world_size, is_master=process.rank == 0, timeout=timedelta(seconds=MEET_SECONDS)
        )
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the {process.world_size} tasks of srun do not meet at {host}:{port} ({reason}); see whether all of them "
            "started, or set MASTER_ADDR and MASTER_PORT"
        ) from None


def on_rank_0(process: Process, function: Callable[[], Any]) -> Any:
    """Rank 0's result, or its InputError, in every process; all wait for it."""
    if process.world_size == 1:
        return function()
    dist.barrier()
    said: list[Any] = [None, None]
    if process.rank == 0:
        try:
            said[0] = function()
        except Exception as error:
            said[1] = (isinstance(error, InputError), str(error))
            dist.broadcast_object_list(said, src=0)
            raise
    dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise (InputError if said[1][0] else RuntimeError)(said[1][1])
    return said[0]


@contextmanager
def only_one(folder: Path, process: Process) -> Iterator[None]:
    """Hold the run's lock: two runs into one folder would undo each other."""
    if process.rank:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    with locked(lock, f"{folder}: another process is embedding into it; wait for it or give another --name"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


class Run:
    """The batches of this process.

    Args:
        folder: the run's folder, its table and files made.
        files: the FASTA files the table was made from.
        kept_P: residues of each protein that are embedded.
        encoder, outputs, segments, dtype: as for `embed_batch`.
        process: this one among how many.
        workers: threads that embed; one a core if None.
    """

    def __init__(
        self,
        folder: Path,
        files: list[Path],
        kept_P: np.ndarray,
        encoder: Encoder,
        outputs: list[Output],
        segments: Segments,
        dtype: str,
        process: Process,
        workers: int | None,
    ) -> None:
        self.table, self.kept_P = Table(folder), kept_P
        self.files, self.encoder, self.outputs, self.segments, self.dtype = files, encoder, outputs, segments, dtype
        self.folder, self.process = folder, process
        self.journal = Journal(folder, process.rank)
        self.done = self.journal.done()
        self.workers = 1 if encoder.device.type == "cuda" else workers or cores()

    def work(self) -> None:
        """Embed every batch that is neither done nor another process's.

        Raises: InputError if the disk fills; what is written by then stays.
        """
        self.handles = [os.open(self.folder / f"{output.file}.h5", os.O_WRONLY) for output in self.outputs]
        self.starts = [np.load(self.folder / f"{output.file}.starts.npy", mmap_mode="r") for output in self.outputs]
        self.log = self.journal.open()
        self.noted = os.lseek(self.log, 0, os.SEEK_END)
        self.pending: list[int] = []
        self.lost = 0  # batches that may not have reached the disk, and what it said
        self.refusal = ""
        self.behind = ThreadPoolExecutor(1)
        self.syncing: Future | None = None
        self.synced = time.monotonic()
        progress = Progress(sum(self._residues(batch) for batches in self._plan() for batch in batches))
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))
        waiting: deque[tuple[Batch, Future]] = deque()
        try:
            for batch, sequences in self._read():
                task = pool.submit(embed_batch, self.encoder, sequences, self.outputs, self.segments, self.dtype)
                waiting.append((batch, task))
                if len(waiting) > 3 * self.workers:
                    self._finish(*waiting.popleft(), progress)
            while waiting:
                self._finish(*waiting.popleft(), progress)
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
        if self.lost:
            raise self._disk_full(progress)
        progress.log()

    def _disk_full(self, progress: "Progress") -> InputError:
        return InputError(
            f"{self.folder}: the disk is full after {progress.done:,} of {progress.total:,} residues; free some space "
            "and run the same command again, it goes on from there"
        )

    def _plan(self) -> Iterator[list[Batch]]:
        """For each window of the table, the batches to do here."""
        number = 0
        for start, stop in windows(self.kept_P):
            batches = plan_window(np.asarray(self.kept_P[start:stop]) + 2, start, number, self.segments.batch_tokens)
            number += len(batches)
            mine = (batch for batch in batches if batch.number % self.process.world_size == self.process.rank)
            yield [batch for batch in mine if batch.number not in self.done]

    def _read(self) -> Iterator[tuple[Batch, list[str]]]:
        """The batches with their sequences, the FASTA read along."""
        stream = records(self.files)
        for (start, stop), batches in zip(windows(self.kept_P), self._plan(), strict=True):
            sequences = [record.sequence for record in islice(stream, stop - start)]
            if [len(sequence) for sequence in sequences] != self.table.rows["num_residues"][start:stop].tolist():
                raise InputError(f"{self.files[0]} changed while it was being embedded: start again with --restart")
            for batch in batches:
                yield batch, [sequences[row - start][: self.kept_P[row]] for row in batch.rows]

    def _residues(self, batch: Batch) -> int:
        return int(self.kept_P[batch.rows].sum())

    def _finish(self, batch: Batch, future: Future, progress: "Progress") -> None:
        """Pour one batch's vectors into the files."""
        for handle, starts, vectors in zip(self.handles, self.starts, future.result(), strict=True):
            for row, vector in zip(batch.rows, vectors, strict=True):
                _pour(handle, vector, int(starts[row]))
        self.pending.append(batch.number)
        progress.add(self._residues(batch))
        if time.monotonic() - self.synced > SYNC_SECONDS and (self.syncing is None or self.syncing.done()):
            self._await_sync()
            self.syncing = self.behind.submit(self._sync, tuple(self.pending))
            self.pending.clear()
            self.synced = time.monotonic()

    def _sync(self, numbers: Sequence[int]) -> None:
        """First the values reach the disk, then the journal says so.

        A failure is final: a disk that once refused what it had taken may call the next attempt a success.
        """
        if self.lost:
            self.lost += len(numbers)
            return
        try:
            for handle in self.handles:
                sync(handle)
            data = np.array(numbers, dtype="<i8").tobytes()
            os.lseek(self.log, self.noted, os.SEEK_SET)
            while data:  # an almost full disk takes a part first
                data = data[os.write(self.log, data) :]
            sync(self.log)
        except OSError as error:
            self.lost += len(numbers)
            self.refusal = error.strerror or str(error)
            raise
        self.noted += 8 * len(numbers)

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
            if self.lost:
                logger.warning(
                    "the last %d batches could not be noted (%s) and will be done again", self.lost, self.refusal
                )
            self.behind.shutdown()
            for handle in (*self.handles, self.log):
                os.close(handle)


def _pour(handle: int, vector: np.ndarray, start: int) -> None:
    """Write all of it; a disk that is almost full takes a part first."""
    data = memoryview(np.ascontiguousarray(vector)).cast("B")
    while data:
        written = os.pwrite(handle, data, start)
        data, start = data[written:], start + written


class Progress:
    """A line every few seconds: residues done, residues/s, time left."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.began = self.logged = time.monotonic()

    def add(self, residues: int) -> None:
        self.done += residues
        if time.monotonic() - self.logged > LOG_SECONDS:
            self.log()

    def log(self) -> None:
        """The line."""
        self.logged = time.monotonic()
        rate = self.done / max(self.logged - self.began, 1e-9)
        left = timedelta(seconds=round((self.total - self.done) / max(rate, 1e-9)))
        logger.info(
            "embedded %s of %s residues, %s residues/s, %s left",
            f"{self.done:,}",
            f"{self.total:,}",
            f"{rate:,.0f}",
            left,
        )
