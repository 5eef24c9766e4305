"""Check a model that is divided over two processes; tests/models/test_sharded.py starts it with torchrun."""

import copy
import sys
import threading
import time
import weakref
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from esm2kit.core.process_group import join_process_group
from esm2kit.core.processes import exit_process
from esm2kit.models.encoder import Encoder
from esm2kit.models.load import ModelFile, find_model
from esm2kit.models.packing import Packed
from esm2kit.models.sharded import PeerStopped, ShardedEncoder
from esm2kit.models.weights import Weights

load = ModelFile.load
BATCHES = {0: 5, 1: 2}  # per rank
alive: "weakref.WeakSet[torch.Tensor]" = weakref.WeakSet()
most = 0


def count_tensors() -> None:
    """Let every read of weights record how many tensors that were read are still in memory."""
    read = Weights.read

    def read_and_count(weights: Weights, names) -> dict[str, torch.Tensor]:
        global most
        found = read(weights, names)
        for tensor in found.values():
            alive.add(tensor)
        most = max(most, len(alive))
        return found

    Weights.read = read_and_count


def fail(*arguments) -> None:
    raise AssertionError("the whole model is loaded")


def make_batch(seed: int) -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 40, (4,), generator=generator).tolist()
    return torch.randint(4, 24, (sum(sizes),), generator=generator), sizes


def check(path: Path) -> str:
    rank = join_process_group().rank
    # products can differ in the last digit with the alignment of mapped memory
    whole = Encoder(copy.deepcopy(find_model(path).load()))
    ModelFile.load = fail
    count_tensors()
    encoder = ShardedEncoder(find_model(path).open())
    assert len(alive) == 0
    assert most == 1, f"{most} tensors in memory"
    parameters = dict(encoder.model.named_parameters())
    sharded = {name for name, parameter in parameters.items() if isinstance(parameter, DTensor)}
    assert sharded == {name for name in parameters if name.startswith("layers.")}
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters.values())
    layers = sum(parameters[name].numel() for name in sharded)
    assert held == sum(p.numel() for p in parameters.values()) - layers / 2, "half of the layers"
    for turn in range(2):  # after all have finished, they can begin again
        for number in range(BATCHES[rank if turn == 0 else 1 - rank]):
            tokens_N, sizes = make_batch(10 * turn + 100 * rank + number)
            found, expected = (each.encode(tokens_N, sizes, [0, 1, 3]) for each in (encoder, whole))
            for layer, rows_ND in expected.items():
                assert torch.equal(found[layer], rows_ND), layer
            assert torch.equal(encoder.logits(found[3]), whole.logits(expected[3]))
            assert encoder.encode(tokens_N, sizes, [1]).keys() == {1}
            rows_M = torch.tensor([1, 4])
            torch.testing.assert_close(encoder.encode_rows(tokens_N, sizes, rows_M), expected[3][rows_M])
        encoder.finish()
    encoder.close()
    check_other_ways(path)
    # one process stops, and the other one notices in its next pass or while it waits
    for waits in (False, True):
        encoder = ShardedEncoder(find_model(path).open())
        encoder.encode(*make_batch(rank), [3])
        if rank == 1:
            time.sleep(0.2)
            closing = threading.Thread(target=encoder.close)
            closing.start()
            closing.join()
            continue
        try:
            encoder.finish() if waits else [encoder.encode(*make_batch(number), [3]) for number in range(3)]
        except PeerStopped:
            encoder.close()  # does not wait for anyone
        else:
            raise AssertionError("the end of the other process was not noticed")
    return "equal"


def check_other_ways(path: Path) -> None:
    """Other precisions, and the code that runs on a GPU, here on a CPU."""
    rank = join_process_group().rank
    tokens_N, sizes = make_batch(rank)
    for precision in ("bfloat16", "int8"):
        found = ShardedEncoder(find_model(path).open(), precision).encode(tokens_N, sizes, [3])[3]
        whole = Encoder(copy.deepcopy(load(find_model(path))), precision)
        assert torch.equal(found, whole.encode(tokens_N, sizes, [3])[3])
    for precision in ("float32", "bfloat16"):
        encoder = ShardedEncoder(find_model(path).open(), precision, fused=False)
        assert encoder.model.layers[0].fc1.weight.dtype == getattr(torch, precision)
        esm2 = copy.deepcopy(load(find_model(path))).to(getattr(torch, precision))
        for number in range(BATCHES[rank]):
            tokens_N, sizes = make_batch(10 * rank + number)
            found = encoder.encode(tokens_N, sizes, [0, 2, 3], on_device=True)
            with torch.no_grad():
                expected = esm2.encode(tokens_N, Packed(sizes), (0, 2, 3))
                for layer, rows_ND in expected.items():
                    assert torch.equal(found[layer], rows_ND), (precision, layer)
                assert torch.equal(encoder.logits(found[3], on_device=True), esm2.lm_head(expected[3]))
        encoder.finish()


if __name__ == "__main__":
    torch.set_num_threads(1)
    text = check(Path(sys.argv[1]))
    Path(f"{sys.argv[2]}.{join_process_group().rank}").write_text(text, encoding="utf-8")
    exit_process(0)
