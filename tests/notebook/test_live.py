"""The Stop button at every moment: while training starts, before the first validation, and after it."""

import sys
from pathlib import Path
from typing import Any

import pytest
from support.errors import refused

from esm2kit.core.checksums import write_sealed_json
from esm2kit.notebook import live
from esm2kit.pretraining.config import PretrainConfig

NO_HANDLER = "import time; print('starting', flush=True); time.sleep(60)"


class Shown:
    """What `display` returns."""

    def update(self, shown: Any) -> None:
        self.shown = shown


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> list[live.TrainingView]:
    """The views of the cells that run, as with a front end."""
    made: list[live.TrainingView] = []
    original = live.TrainingView

    def make(*given: Any) -> live.TrainingView:
        made.append(original(*given))
        return made[-1]

    monkeypatch.setattr(live, "TrainingView", make)
    monkeypatch.setattr(live, "has_front_end", lambda: True)
    monkeypatch.setattr(live, "keep_responsive", lambda widget: None)
    monkeypatch.setattr(live, "display", lambda *given, **more: Shown())
    return made


def config(folder: Path) -> PretrainConfig:
    return PretrainConfig(folder, out_dir=folder / "run", max_steps=100, global_batch_size=1)


@pytest.mark.parametrize("early", [False, True])
def test_stop_while_training_starts_is_one_plain_line(
    early: bool, views: list[live.TrainingView], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker does not handle SIGTERM yet, and dies of it; `early`: pressed before there is a worker."""
    monkeypatch.setattr(live.launch, "worker_command", lambda *given: [sys.executable, "-c", NO_HANDLER])
    write_config = live.launch.write_config

    def press_early(*given: Any) -> Path:
        views[0].button.click()
        return write_config(*given)

    train = live.launch.train

    def press_at_the_first_line(stage: str, given: Any, on_line: Any, on_start: Any) -> Any:
        return train(stage, given, lambda line: views[0].button.click(), on_start)

    if early:
        monkeypatch.setattr(live.launch, "write_config", press_early)
    else:
        monkeypatch.setattr(live.launch, "train", press_at_the_first_line)
    with refused("training.stopped", stage="pretrain") as caught:
        live.train("pretrain", config(tmp_path))
    assert str(caught.value) == (
        "training was stopped before its first update or after its last one. What was saved earlier is kept: run this "
        "cell again to continue."
    )
    assert views[0].worker.returncode == -15


def test_a_worker_that_dies_without_the_button_is_still_a_failure(
    views: list[live.TrainingView], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    monkeypatch.setattr(live.launch, "worker_command", lambda *given: [sys.executable, "-c", dies])
    with refused("worker.failed", exit_code=-15):
        live.train("pretrain", config(tmp_path))
    assert not views[0].stopping


PRETRAINED = {"step": 12, "val_loss": None}
FINETUNED = {"finished": False, "runs": [{"step": 12, "max_steps": 40, "val_loss": None}]}


@pytest.mark.parametrize(("result", "last"), [(PRETRAINED, 100), (FINETUNED, 40)], ids=["pretrain", "finetune"])
def test_stop_before_the_first_validation_says_what_to_do(
    result: dict[str, Any], last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live.launch, "train", lambda *given: result)
    with refused("training.no-score", step=12) as caught:
        live.train("pretrain", config(tmp_path))
    assert str(caught.value) == (
        f"training stopped at update 12 of {last}, before its first validation, so there is no score to show yet. The "
        "checkpoint was saved: run this cell again to resume."
    )


def test_after_a_validation_a_stopped_pretraining_has_a_score_and_a_stopped_finetuning_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test set is scored at the end of fine-tuning only."""
    pretrained = PRETRAINED | {"val_loss": 2.5}
    finetuned = {"finished": False, "runs": [FINETUNED["runs"][0] | {"val_loss": 2.5}]}
    monkeypatch.setattr(live.launch, "train", lambda *given: pretrained)
    assert live.train("pretrain", config(tmp_path)) is pretrained
    monkeypatch.setattr(live.launch, "train", lambda *given: finetuned)
    with refused("training.no-score", step=12) as caught:
        live.train("pretrain", config(tmp_path))
    assert "stopped at update 12 of 40, so there is no score" in str(caught.value)


def test_a_run_that_ended_without_any_validation_is_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"step": 100, "val_loss": None}
    monkeypatch.setattr(live.launch, "train", lambda *given: result)
    assert live.train("pretrain", config(tmp_path)) is result


def test_a_finished_worker_returns_its_result(
    views: list[live.TrainingView], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop pressed so late that the worker ends by itself."""
    monkeypatch.setattr(live.launch, "worker_command", lambda *given: [sys.executable, "-c", "print('done')"])
    write_config = live.launch.write_config

    def finish(*given: Any) -> Path:
        write_sealed_json(tmp_path / "run" / "pretrain.json", {"step": 100, "val_loss": 2.0})
        return write_config(*given)

    monkeypatch.setattr(live.launch, "write_config", finish)
    (tmp_path / "run").mkdir()
    assert live.train("pretrain", config(tmp_path))["step"] == 100
    assert "ended at update 100, saved in run" in views[0].line
