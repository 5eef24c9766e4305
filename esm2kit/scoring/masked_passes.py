"""Forward passes of a protein with residues hidden: packed into batches, computed by worker threads, in order."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esm2kit.core.processes import count_cores
from esm2kit.models.encoder import Encoder
from esm2kit.models.layerwise import LayerwiseEncoder, SelectedRows
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, MASK_IDX, VOCAB_SIZE, encode
from esm2kit.sequences.batching import group_batches


class Pass(NamedTuple):
    """One forward pass through a window of a sequence.

    Args:
        tokens_T: token ids of the complete sequence, with BOS and EOS.
        window: first token of the window, and the one after its last.
        masked: tokens to hide, as indices into `tokens_T`.
        read: tokens at which predictions are read, as indices into `tokens_T`.
        columns: for each token of `read` the token ids whose log-probabilities are kept. None keeps all.
    """

    tokens_T: np.ndarray
    window: tuple[int, int]
    masked: tuple[int, ...]
    read: tuple[int, ...]
    columns: tuple[tuple[int, ...], ...] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the model input."""
        return self.window[1] - self.window[0]

    @property
    def num_values(self) -> int:
        """Log-probabilities that are kept."""
        return len(self.read) * VOCAB_SIZE if self.columns is None else sum(map(len, self.columns))


def tokenize_protein(sequence: str) -> np.ndarray:
    """Convert a sequence to token ids with BOS and EOS, (residues + 2,) uint8."""
    return np.concatenate([[BOS_IDX], encode(sequence), [EOS_IDX]]).astype(np.uint8)


def find_window(token: int, num_tokens: int, max_tokens: int) -> tuple[int, int]:
    """Find the window of a long protein that has a token in its middle, or at an end of the protein nearer to its edge.

    Args:
        token: index of the token in the protein, where BOS is 0.
        num_tokens: tokens of the protein, with BOS and EOS.
        max_tokens: tokens of the window.

    Returns:
        The first token of the window, and the one after its last. BOS and EOS are tokens of the first and the last
        window only.

    Source:
        ProteinGym, proteingym/utils/scoring_utils.py, get_optimal_window, which counts BOS and EOS too where
        compute_fitness.py calls it.
    """
    half = max_tokens // 2
    if num_tokens <= max_tokens:
        return 0, num_tokens
    if token < half:
        return 0, max_tokens
    if token >= num_tokens - half:
        return num_tokens - max_tokens, num_tokens
    return token - half, token + half


def split_passes(steps: Iterable[Sequence[Pass]], batch_tokens: int) -> Iterator[list[Pass]]:
    """Split passes into batches within a token budget, in order.

    A step of several passes has batches of its own, so that its results are the same alone and among other steps.
    Steps of a single pass share batches.

    Args:
        steps: the passes of each step.
        batch_tokens: maximum tokens per batch of more than one pass.

    Yields:
        The passes of a batch.
    """
    batch: list[Pass] = []
    total, is_shared = 0, True
    for step in steps:
        starts_anew = not (is_shared and len(step) == 1)
        for each in step:
            if batch and (starts_anew or total + each.num_tokens > batch_tokens):
                yield batch
                batch, total = [], 0
            starts_anew = False
            batch.append(each)
            total += each.num_tokens
        is_shared = len(step) == 1
    if batch:
        yield batch


@torch.inference_mode()
def compute_batch(encoder: Encoder, batch: Sequence[Pass]) -> np.ndarray:
    """Compute the log-probabilities of a batch of passes.

    Args:
        encoder: a model with LM head.
        batch: the passes; adjacent ones of equal length share an attention call.

    Returns:
        (values,) float32, natural logarithms over all 33 tokens, pass by pass as `read` and `columns` list them.
    """
    stream = torch.cuda.stream(encoder.stream()) if encoder.device.type == "cuda" else nullcontext()
    with stream:
        return _read_values(encoder, encoder.encode_rows(*_pack(batch)), batch)


@torch.inference_mode()
def compute_group(encoder: LayerwiseEncoder, batches: Sequence[Sequence[Pass]]) -> list[np.ndarray]:
    """Compute several batches as `compute_batch`, while the layers of the model are read once."""
    hidden = encoder.encode_rows_together([_pack(batch) for batch in batches])
    return [_read_values(encoder, hidden_MD, batch) for hidden_MD, batch in zip(hidden, batches, strict=True)]


def _pack(batch: Sequence[Pass]) -> SelectedRows:
    """Concatenate the windows of a batch, hide the masked tokens, and list the rows to read."""
    num_tokens = [each.num_tokens for each in batch]
    tokens_N = np.empty(sum(num_tokens), dtype=np.int64)
    rows: list[int] = []
    start = 0
    for each, tokens in zip(batch, num_tokens, strict=True):
        shift = start - each.window[0]
        tokens_N[start : start + tokens] = each.tokens_T[slice(*each.window)]
        tokens_N[[shift + token for token in each.masked]] = MASK_IDX
        rows += [shift + token for token in each.read]
        start += tokens
    return SelectedRows(torch.from_numpy(tokens_N), num_tokens, torch.tensor(rows))


def _read_values(encoder: Encoder, hidden_MD: Tensor, batch: Sequence[Pass]) -> np.ndarray:
    """Compute the log-probabilities that are kept, from the representations of the rows to read."""
    log_prob_MV = encoder.logits(hidden_MD, on_device=True).float().log_softmax(-1).cpu().numpy()
    kept = [each.columns or [range(VOCAB_SIZE)] * len(each.read) for each in batch]
    columns = [columns for each in kept for columns in each]
    return np.concatenate([row_V[list(tokens)] for row_V, tokens in zip(log_prob_MV, columns, strict=True)])


def compute_batches(encoder: Encoder, batches: Iterable[Sequence[Pass]], workers: int | None) -> Iterator[np.ndarray]:
    """Compute batches with worker threads, each of them with one thread on a CPU.

    Args:
        encoder: a model with LM head. One that is read layer by layer computes many batches together.
        batches: the passes of each batch; read as they are needed.
        workers: worker threads on the CPU. None uses one per core.

    Yields:
        The result of `compute_batch` of each batch, in order.
    """
    if isinstance(encoder, LayerwiseEncoder):
        yield from _compute_groups(encoder, batches)
        return
    # two threads on a GPU: one prepares and copies a batch while the batch of the other is computed
    workers = {"cuda": 2, "mps": 1}.get(encoder.device.type) or workers or count_cores()
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(compute_batch, encoder, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _compute_groups(encoder: LayerwiseEncoder, batches: Iterable[Sequence[Pass]]) -> Iterator[np.ndarray]:
    """Compute batches in groups of `group_tokens`, in a thread, so that an interrupt need not wait for a group."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for group in group_batches(batches, _count_tokens, encoder.group_tokens):
            yield from pool.submit(compute_group, encoder, group).result()
    finally:
        encoder.close()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _count_tokens(batch: Sequence[Pass]) -> int:
    return sum(each.num_tokens for each in batch)
