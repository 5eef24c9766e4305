"""An export is complete or absent."""

from pathlib import Path

import pytest
from support.finetune_fixtures import write_tiny_model

from esm2kit.models import export as export_module
from esm2kit.models.config import ExportConfig
from esm2kit.models.export import export
from esm2kit.models.formats import huggingface


def test_a_failed_export_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = write_tiny_model(tmp_path / "tiny.safetensors"), tmp_path / "new" / "hf"

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "save_tensors", fail)
        with pytest.raises(OSError, match="No space left"):
            export(ExportConfig(model=str(model), out=out))
    assert not list(out.parent.iterdir())

    export(ExportConfig(model=str(model), out=out))
    assert [path.name for path in out.parent.iterdir()] == ["hf"]
    assert (out / "config.json").is_file()
    assert (out / "model.safetensors").is_file()
    assert export_module.load_model(str(out))[0].config.num_layers == 2
