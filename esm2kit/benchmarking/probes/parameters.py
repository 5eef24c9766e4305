"""Parameters of fitted probes, and the outputs that they compute from feature rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esm2kit.benchmarking.probes.heads import HEADS, FeatureBatch
from esm2kit.core.errors import InputError
from esm2kit.tasks.scaling import UNSCALED, TargetScale
from esm2kit.tasks.task import Task

CONSTANT = "constant"
LINEAR = ("ridge", "logistic")
# Tensors of a linear probe; a constant has only the bias. A neural probe has those of its head.
_LINEAR_TENSORS = ("shift_D", "scale_D", "weight_DC", "bias_C")


@dataclass(frozen=True)
class ProbeParameters:
    """A fitted probe.

    Args:
        probe: ridge, logistic, fnn, cnn, light_attention, attention, or constant (the mean or majority baseline).
        tensors: Name -> tensor. Linear: shift_D, scale_D, weight_DC and bias_C; constant: bias_C; neural: the
            parameters of the head with a leading axis of seeds, and shift_D and scale_D if the inputs are z-scored.
        scale: Scale of the values during training.
        hidden: Hidden units of a neural probe.
        seeds: Seeds of a neural probe; one entry otherwise.
    """

    probe: str
    tensors: dict[str, Tensor]
    scale: TargetScale = UNSCALED
    hidden: int = 0
    seeds: tuple[int, ...] = (0,)

    @property
    def per_protein(self) -> bool:
        """Whether the probe pools residue vectors to one output per protein."""
        return self.probe in HEADS and HEADS[self.probe].per_protein

    @property
    def width(self) -> int:
        """Numbers per feature row; 0 for a constant, which reads none."""
        if self.probe in LINEAR:
            return len(self.tensors["weight_DC"])
        if self.probe == CONSTANT:
            return 0
        first = self.tensors.get("weight_in" if self.probe != "light_attention" else "weight_value")
        return first.shape[-2]

    @torch.inference_mode()
    def outputs(self, rows_ND: Tensor, sizes: Sequence[int], task: Task) -> Tensor:
        """Compute the outputs of each seed, values in the unit of the target.

        Args:
            rows_ND: Feature rows of some proteins, protein after protein.
            sizes: Rows of each protein.
            task: The task of the probe.

        Returns:
            (S, N, C), or (S, P, C) for a probe that pools residues. Values are float64.
        """
        if self.probe == CONSTANT:
            outputs_SNC = self.tensors["bias_C"].expand(1, len(rows_ND), -1)
        elif self.probe in LINEAR:
            weight_DC = self.tensors["weight_DC"]
            scaled_ND = (rows_ND.to(weight_DC.dtype) - self.tensors["shift_D"]) / self.tensors["scale_D"]
            outputs_SNC = torch.addmm(self.tensors["bias_C"], scaled_ND, weight_DC)[None]
        else:
            outputs_SNC = self._run_head(rows_ND, sizes, task)
        if task.target == "class":
            return outputs_SNC
        return torch.from_numpy(self.scale.restore(outputs_SNC.numpy()))

    def _run_head(self, rows_ND: Tensor, sizes: Sequence[int], task: Task) -> Tensor:
        """Compute the outputs of a neural probe, without the rows of gaps."""
        kind = HEADS[self.probe]
        head = kind(self.seeds, self.width, task.num_outputs, self.hidden, 0.0, torch.device("cpu")).eval()
        head.load_state_dict({name: self.tensors[name] for name in head.state_dict()})
        if "shift_D" in self.tensors:
            rows_ND = (rows_ND - self.tensors["shift_D"]) / self.tensors["scale_D"]
        if not kind.radius:
            spans = [span for size in sizes for span in (0, size)] + [0]
            return head(FeatureBatch(rows_ND, None, spans if kind.per_protein else []))
        gap_ND = rows_ND.new_zeros(kind.radius, rows_ND.shape[1])
        parts, spans = [gap_ND], [kind.radius]
        for part_ND in rows_ND.split(list(sizes)):
            parts += [part_ND, gap_ND]
            spans += [len(part_ND), kind.radius]
        is_real_N = torch.arange(len(spans)).repeat_interleave(torch.tensor(spans)) % 2 == 1
        outputs_SNC = head(FeatureBatch(torch.cat(parts), is_real_N, spans))
        return outputs_SNC if kind.per_protein else outputs_SNC[:, is_real_N]

    def check(self, task: Task, source: object) -> None:
        """Check that the tensors fit the probe and the task.

        Args:
            task: The task of the probe.
            source: The file, for the message.

        Raises:
            InputError: A tensor is missing or has another shape.
        """
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if self.probe in HEADS and "weight_in" in found:
            head = HEADS[self.probe](self.seeds, self.width, task.num_outputs, self.hidden, 0.0, torch.device("cpu"))
            expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
            if "shift_D" in found:
                expected |= {"shift_D": (self.width,), "scale_D": (self.width,)}
        elif self.probe in LINEAR and "weight_DC" in found:
            width = self.width
            shapes = ((width,), (width,), (width, task.num_outputs), (task.num_outputs,))
            expected = dict(zip(_LINEAR_TENSORS, shapes, strict=True))
        else:
            expected = {"bias_C": (task.num_outputs,)}
        if found != expected:
            name = min(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
            raise InputError(
                f"{source}: tensor '{name}' of probe {self.probe} has the shape {found.get(name)}, expected "
                f"{expected.get(name)}. Run the benchmark again.",
                code="probe.tensor",
                name=name,
                found=found.get(name),
                expected=expected.get(name),
            )
