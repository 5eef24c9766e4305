"""Export a fine-tuned model with head hf to transformers' EsmForSequenceClassification or EsmForTokenClassification.

Source: transformers `models/esm/modeling_esm.py`. The heads named `hf` have the same shapes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esm2kit.core.errors import InputError
from esm2kit.core.files import write_json
from esm2kit.finetuning.model_file import FinetunedModel
from esm2kit.models.checkpoint import save_tensors
from esm2kit.models.formats.hf_config import build_hf_config
from esm2kit.models.formats.huggingface import save_hf, to_hf
from esm2kit.tasks.scaling import check_float32

UNSCALED_REMEDY = "Use the model with `esm2kit predict` instead of exporting it, or transform all targets"


def save_hf_classifier(model: FinetunedModel, folder: Path) -> None:
    """Write a folder for AutoModelForSequenceClassification or AutoModelForTokenClassification.

    The exported model predicts values in the unit of the target: the scaling of the targets is merged into the last
    layer, and a z-score of the inputs into the first.

    Args:
        model: Model with head `hf` and merged adapters.
        folder: Folder for the model, its configuration with the labels, and the tokenizer.

    Raises:
        InputError: The model has another head, for which transformers has no class, or float32, in which it is
            exported, cannot represent the values that it predicts.
    """
    if model.labels.spec.name != "hf":
        raise InputError(
            f"{model.source}: transformers has no class for head {model.labels.spec.name}. Fine-tune with --head hf, "
            "or predict with `esm2kit predict`.",
            code="head.no-hf-class",
            head=model.labels.spec.name,
        )
    folder, per_residue = Path(folder), model.task.level == "residue"
    save_hf(model.esm2, folder)
    encoder = to_hf(model.esm2.state_dict(), model.esm2.config)
    encoder = {name: tensor for name, tensor in encoder.items() if name.startswith("esm.")}
    save_tensors(folder / "model.safetensors", encoder | _convert_head(model), {"format": "pt"})
    write_json(folder / "config.json", build_hf_config(model.esm2.config) | _build_label_config(model, per_residue))


def _convert_head(model: FinetunedModel) -> dict[str, Tensor]:
    """Return the matrices of the head in the orientation of nn.Linear, (outputs, inputs)."""
    spec, head = model.labels.spec, {name: tensor.clone() for name, tensor in model.labels.head.state_dict().items()}
    weight_out, bias_out = head["weight_out"][0], head["bias_out"][0, 0]
    if model.task.target == "value":
        centre, spread = (torch.tensor(ends, dtype=torch.float64) for ends in model.scale)
        check_float32(model.scale, UNSCALED_REMEDY)
        weight_out = (weight_out.double() * spread).float()
        bias_out = (bias_out.double() * spread + centre).float()
    if spec.level == "residue":
        if spec.standardize:
            bias_out = bias_out - (head["mean_D"] / head["scale_D"]) @ weight_out
            weight_out = weight_out / head["scale_D"][:, None]
        return {"classifier.weight": weight_out.T.contiguous(), "classifier.bias": bias_out.contiguous()}
    weight_in, bias_in = head["weight_in"][0], head["bias_in"][0, 0]
    if spec.standardize:
        bias_in = bias_in - (head["mean_D"] / head["scale_D"]) @ weight_in
        weight_in = weight_in / head["scale_D"][:, None]
    return {
        "classifier.dense.weight": weight_in.T.contiguous(),
        "classifier.dense.bias": bias_in.contiguous(),
        "classifier.out_proj.weight": weight_out.T.contiguous(),
        "classifier.out_proj.bias": bias_out.contiguous(),
    }


def _build_label_config(model: FinetunedModel, per_residue: bool) -> dict[str, Any]:
    """Return the entries of config.json for the architecture and the labels."""
    task = model.task
    names = task.binary_labels or task.labels or task.columns or (task.name,)
    kind = "regression" if task.target == "value" else "single_label_classification"
    return {
        "architectures": ["EsmForTokenClassification" if per_residue else "EsmForSequenceClassification"],
        "id2label": {str(place): name for place, name in enumerate(names)},
        "label2id": {name: place for place, name in enumerate(names)},
        "problem_type": "multi_label_classification" if task.binary_labels else kind,
    }
