"""Progress lines: the amount done, the rate and the time left."""

import logging

from esm2kit.core import progress

logger = logging.getLogger("esm2kit.test")


def test_a_line_every_few_seconds(caplog, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level("INFO", "esm2kit.test")
    lines = progress.Progress(logger, "embedded", "residues", 5000, start=1000)
    now[0] = 104.0
    lines.update(1500)
    assert not caplog.messages
    now[0] = 110.0
    lines.update(2000, "2 files")
    assert caplog.messages == ["embedded 2,000 of 5,000 residues, 100 residues/s, 0:00:30 left, 2 files"]
    slow = progress.Progress(logger, "mlp:", "epochs")
    now[0] = 114.0
    slow.done = 1
    slow.log()
    assert caplog.messages[1] == "mlp: 1 epochs, 0.25 epochs/s"
