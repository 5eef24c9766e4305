"""The training loop gives the device work without waiting for it, and still reports every loss that is not finite."""

import csv
import logging
import math
from collections import Counter

import pytest
import torch
from support.errors import refused
from support.finetune_fixtures import write_tasks, write_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from esm2kit.core.progress import Progress
from esm2kit.finetuning.finetune import FinetuneConfig, finetune
from esm2kit.finetuning.module import LabelTrainer
from esm2kit.pretraining.pretrain import MaskedLM, PretrainConfig, pretrain
from esm2kit.training import loop
from esm2kit.training.updates import HostCopy

TINY = {"model": "custom", "num_layers": 2, "embed_dim": 32, "attention_heads": 4, "accelerator": "cpu"}
RUN = TINY | {"global_batch_size": 6, "accumulate_grad_batches": 3, "lr": 1e-3, "warmup_steps": 2}
# every way in which Python reads the numbers of a tensor, which stops a GPU
READS = ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__index__", "nonzero")


class CountReads(TorchDispatchMode):
    """Counts operations that bring a number of a tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found[str(function)] += 1
        return function(*args, **kwargs or {})


@pytest.fixture(autouse=True)
def no_lines(monkeypatch) -> None:
    """Progress lines are due after seconds, and read the update that they show; these tests do not measure time."""
    monkeypatch.setattr(Progress, "is_due", lambda self: False)


@pytest.fixture
def reads(monkeypatch) -> list[Counter]:
    """Record the reads of each update of pretraining and fine-tuning."""
    mode, per_update = CountReads(), []

    def count(name: str):
        method = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *arguments: object) -> object:
            mode.found[name] += 1
            return method(self, *arguments)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, count(name))
    for module in (MaskedLM, LabelTrainer):
        step = module.training_step

        def counted(self, *arguments: object, step=step) -> None:
            mode.found.clear()
            with mode:
                step(self, *arguments)
            per_update.append(Counter(mode.found))

        monkeypatch.setattr(module, "training_step", counted)
    return per_update


def test_an_update_reads_only_the_numbers_of_the_update_before(dataset, tmp_path, reads) -> None:
    pretrain(PretrainConfig(**RUN, data=dataset, out_dir=tmp_path, max_steps=9, log_every_n_steps=4))
    assert [each["tolist"] for each in reads] == [1, 0, 1, 2, 0, 1, 1, 2, 1], "rows of the log are 1, 4, 8 and 9"
    assert all(each.keys() <= {"tolist"} for each in reads), reads


def test_finetuning_reads_only_the_numbers_of_the_update_before(tmp_path, reads) -> None:
    given = {"task": "protein_class", "data_dir": write_tasks(tmp_path / "tasks"), "accelerator": "cpu"}
    given |= {"model": write_tiny_model(tmp_path / "tiny.safetensors"), "benchmark": False, "resamples": 100}
    given |= {"max_steps": 6, "val_check_interval": 6, "log_every_n_steps": 100, "accumulate_grad_batches": 2}
    finetune(FinetuneConfig(**given, out_dir=tmp_path / "run"))
    assert [each["tolist"] for each in reads] == [1, 0, 1, 1, 1, 2]
    assert all(each.keys() <= {"tolist"} for each in reads), reads


def test_a_loss_that_is_read_in_each_micro_batch_would_be_found(dataset, tmp_path, reads, monkeypatch) -> None:
    """The counter-example: the counter sees a single `float(loss)`."""
    loss_sum = MaskedLM.loss_sum
    monkeypatch.setattr(MaskedLM, "loss_sum", lambda self, batch: loss_sum(self, batch) + 0 * float(batch.tokens_N[0]))
    pretrain(PretrainConfig(**RUN, data=dataset, out_dir=tmp_path, max_steps=2))
    assert [each["__float__"] for each in reads] == [3, 3]


def test_numbers_are_read_after_the_next_update_has_started(dataset, tmp_path, monkeypatch) -> None:
    order: list[tuple[str, int]] = []

    class Recorded(HostCopy):
        def __init__(self, values: torch.Tensor) -> None:
            super().__init__(values)
            self.number = 1 + sum(event == "computed" for event, _ in order)
            order.append(("computed", self.number))

        def __getattribute__(self, name: str) -> object:
            if name == "numbers" and ("read", self.number) not in order:
                order.append(("read", self.number))
            return super().__getattribute__(name)

    monkeypatch.setattr(loop, "HostCopy", Recorded)
    pretrain(PretrainConfig(**RUN, data=dataset, out_dir=tmp_path, max_steps=5, log_every_n_steps=100))
    # the first update has a line in the log, and a checkpoint follows the last one
    computed_and_read = [("computed", 1), ("read", 1), ("computed", 2), ("computed", 3), ("read", 2), ("computed", 4)]
    assert order == [*computed_and_read, ("read", 3), ("computed", 5), ("read", 4), ("read", 5)]


@pytest.mark.parametrize(("interval", "updates"), [(100, 6), (5, 5)])
def test_a_loss_that_is_not_finite_is_reported_with_its_update(
    interval: int, updates: int, dataset, tmp_path, monkeypatch
) -> None:
    """The check is one update late, or at once before a checkpoint; no weights of the update are saved."""
    loss_sum, ids, made = MaskedLM.loss_sum, {}, []

    def diverge(self: MaskedLM, batch) -> torch.Tensor:
        made.append(self.step + 1)
        ids.setdefault(self.step + 1, []).extend(self.sequence_ids(batch))
        return loss_sum(self, batch) * (math.nan if self.step + 1 == 5 and len(ids[5]) > 2 else 1.0)

    monkeypatch.setattr(MaskedLM, "loss_sum", diverge)
    config = PretrainConfig(
        **RUN, data=dataset, out_dir=tmp_path, max_steps=50, log_every_n_steps=100, val_check_interval=interval
    )
    with refused("run.diverged", update=5) as caught:
        pretrain(config)
    assert caught.value.values["sequences"] == list(dict.fromkeys(ids[5]))
    assert max(made) == updates
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_the_log_has_the_totals_of_updates_that_it_did_not_read(dataset, tmp_path, caplog) -> None:
    """Tokens per second count all updates since the last row."""
    runs = {}
    for every in (1, 5):
        with caplog.at_level(logging.INFO):
            pretrain(PretrainConfig(**RUN, data=dataset, out_dir=tmp_path / str(every), max_steps=5,
                                    log_every_n_steps=every))  # fmt: skip
        with open(tmp_path / str(every) / "metrics.csv", encoding="utf-8", newline="") as file:
            runs[every] = [row for row in csv.DictReader(file) if row["train_loss"]]
    assert [row["step"] for row in runs[5]] == ["1", "5"]
    names = ("train_loss", "lr", "grad_norm", "tokens")
    assert [runs[5][-1][name] for name in names] == [runs[1][-1][name] for name in names]


def test_totals_count_the_tokens_of_all_updates(dataset, tmp_path, monkeypatch) -> None:
    seen, totals = [], []
    step = MaskedLM.training_step

    def record(self: MaskedLM, batches, *arguments: object) -> None:
        step(self, batches, *arguments)
        seen.append(sum(len(batch.tokens_N) for batch in batches))
        totals.append(self.last_update)

    monkeypatch.setattr(MaskedLM, "training_step", record)
    pretrain(PretrainConfig(**RUN, data=dataset, out_dir=tmp_path, max_steps=4))
    assert [each["tokens"] for each in totals] == seen
    assert [each["total_tokens"] for each in totals] == torch.tensor(seen).cumsum(0).tolist()


def test_master_weights_are_cast_once_per_update(dataset, tmp_path, monkeypatch) -> None:
    """Both bf16 precisions cast each matrix once per update, not once per micro-batch."""

    class CountCasts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
                casts[args[0].data_ptr()] += kwargs.get("dtype") is torch.bfloat16
            return function(*args, **kwargs or {})

    casts, step = Counter(), MaskedLM.training_step

    def counted(self: MaskedLM, *arguments: object) -> None:
        with CountCasts():
            step(self, *arguments)

    monkeypatch.setattr(MaskedLM, "training_step", counted)
    for precision in ("bf16-mixed", "bf16-true"):
        casts.clear()
        settings = RUN | {"precision": precision, "out_dir": tmp_path / precision}
        pretrain(PretrainConfig(**settings, data=dataset, max_steps=1))
        assert len(casts) >= 2 * 6, "at least the matrices of both layers"
        assert max(casts.values()) == 1, (precision, casts)
