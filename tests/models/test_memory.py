"""The estimates of memory agree with measured peaks, and with what autograd keeps per token and layer."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.memory import count_bytes, measure_peak

from esm2kit.models import packing
from esm2kit.models.config import SIZES, ESM2Config
from esm2kit.models.encoder import Encoder
from esm2kit.models.esm2 import ESM2
from esm2kit.models.lora import add_lora
from esm2kit.models.memory import (
    InferenceSettings,
    TrainingSettings,
    estimate_inference,
    estimate_training,
    format_gib,
    largest_budget,
)
from esm2kit.models.packing import Packed
from esm2kit.training.precision import precision_context

LARGE = SIZES["esm2_t33_650M_UR50D"]
# activations are most of the memory, weights are most of it, and many narrow layers
SHAPES = {
    "activations": (ESM2Config(6, 160, 10), [100] * 5 + [50] * 4),
    "weights": (ESM2Config(3, 320, 20), [64] * 2),
    "layers": (ESM2Config(16, 96, 6), [60] * 6),
}


def measure_training(shape: ESM2Config, num_tokens: list[int], settings: TrainingSettings) -> tuple[int, int]:
    """Measure one update after a first one: bytes before it, and what it allocates at the peak."""
    torch.manual_seed(0)
    esm2 = ESM2.initialised(shape, 0)
    esm2.contact_head.requires_grad_(False)
    esm2.activation_checkpointing = settings.activation_checkpointing
    head = torch.nn.Linear(shape.embed_dim, 1)
    if settings.mode == "lora":
        add_lora(esm2, settings.lora_rank, 16)
    elif settings.mode != "full":
        esm2.requires_grad_(False)
        if settings.mode == "last_n":
            esm2.layers[-settings.last_n :].requires_grad_(True)
    trained = [parameter for parameter in [*esm2.parameters(), *head.parameters()] if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    tokens_N = torch.randint(4, 24, (sum(num_tokens),))
    rows_M = (torch.rand(len(tokens_N)) < 0.15).nonzero()[:, 0]

    def update() -> None:
        for _ in range(2 if settings.accumulates else 1):
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16-mixed"),
                precision_context(esm2, settings.precision),
            ):
                packed = Packed(num_tokens)
                if settings.mode == "full":
                    logits_MV = esm2.masked_logits(tokens_N, packed, rows_M)
                    loss = F.cross_entropy(logits_MV.float(), tokens_N[rows_M])
                else:
                    loss = head(esm2.encode(tokens_N, packed).float()).square().mean()
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    update()
    return sum(count_bytes(esm2, optimizer)), measure_peak(update)


def check_training(name: str, **options: object) -> None:
    """Compare an estimate with the measurement: the total, and what an update allocates."""
    shape, num_tokens = SHAPES[name]
    settings = TrainingSettings(tokens=sum(num_tokens), **options)
    held, peak = measure_training(shape, num_tokens, settings)
    found = estimate_training(shape, settings)
    assert found.weights + found.optimizer == pytest.approx(held, rel=0.02)
    assert found.total - found.weights - found.optimizer == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_within_15_percent_of_the_measured_peak(name: str, precision: str, checkpointing: bool) -> None:
    check_training(name, precision=precision, activation_checkpointing=checkpointing)


@pytest.mark.parametrize("mode", ["lora", "frozen", "last_n"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fine_tuning_is_within_15_percent_of_the_measured_peak(mode: str, precision: str) -> None:
    check_training("activations", mode=mode, precision=precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_is_within_15_percent_of_the_measured_peak(precision: str, checkpointing: bool) -> None:
    check_training("weights", precision=precision, activation_checkpointing=checkpointing, accumulates=True)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", [1, 3])
def test_inference_on_a_cpu_is_within_15_percent(name: str, precision: str, layers: int) -> None:
    shape, num_tokens = SHAPES[name]
    esm2, encoders = ESM2.initialised(shape, 0).eval(), []
    tokens_N = torch.randint(4, 24, (sum(num_tokens),))

    def run() -> None:
        encoders.append(Encoder(esm2, precision))
        encoders[0].encode(tokens_N, num_tokens, range(shape.num_layers + 1 - layers, shape.num_layers + 1))

    found = estimate_inference(
        shape, InferenceSettings(tokens=len(tokens_N), precision=precision, layers=layers, device="cpu")
    )
    assert found.weights == pytest.approx(sum(each.nbytes for each in esm2.parameters()), rel=0.02)
    assert found.total - found.weights == pytest.approx(measure_peak(run), rel=0.15)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", [1, 3])
def test_inference_of_the_model_as_on_a_gpu_is_within_15_percent(
    name: str, precision: str, layers: int, monkeypatch
) -> None:
    """The operations of a GPU, measured on the CPU with attention in the type of the model."""
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(packing, "attention", lambda query, key, value, visible=None: plain(query, key, value))
    shape, num_tokens = SHAPES[name]
    esm2 = ESM2.initialised(shape, 0).to(getattr(torch, precision)).eval()
    tokens_N = torch.randint(4, 24, (sum(num_tokens),))
    kept = range(shape.num_layers + 1 - layers, shape.num_layers + 1)
    with torch.inference_mode():
        peak = measure_peak(lambda: esm2.encode(tokens_N, Packed(num_tokens), kept))
    found = estimate_inference(
        shape, InferenceSettings(tokens=len(tokens_N), precision=precision, layers=layers, device="cuda")
    )
    assert found.weights == pytest.approx(sum(each.nbytes for each in esm2.parameters()), rel=0.02)
    assert found.activations == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    ("precision", "kept", "joined"), [("32-true", 68, 0), ("bf16-mixed", 42, 2), ("bf16-true", 34, 2)]
)
def test_activations_match_what_autograd_keeps(precision: str, kept: int, joined: int, monkeypatch) -> None:
    """Count the bytes per token and layer, with attention in the type of the products as on a GPU.

    In bf16 a GPU computes attention of all sequences in one call. The CPU joins the results, which keeps them twice.
    """
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(packing, "attention", lambda query, key, value, visible=None: plain(query, key, value))
    shape, tokens, sizes = ESM2Config(3, 320, 20), 300, {}
    esm2 = ESM2.initialised(shape, 0)

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        if all(tensor.data_ptr() != weight.data_ptr() for weight in esm2.parameters()):
            sizes[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with (
        precision_context(esm2, precision),
        torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        esm2.encode(torch.randint(4, 24, (tokens,)), Packed([tokens // 3, 2 * tokens // 3]))
    copies = 24 * shape.embed_dim**2 * shape.num_layers if precision == "bf16-mixed" else 0
    numbers = tokens * shape.num_layers * shape.embed_dim
    assert (sum(size for size, _ in sizes.values()) - copies) / numbers == pytest.approx(kept, rel=0.05)
    settings = TrainingSettings(tokens=100_000, precision=precision, device="cuda")
    fewer, more = (estimate_training(replace(shape, num_layers=layers), settings).activations for layers in (3, 4))
    assert (more - fewer) / (100_000 * shape.embed_dim) == pytest.approx(kept - joined, rel=0.02)


def test_650m_on_24_gb() -> None:
    """Weights, gradients and averages are 10.4 GB, the bf16 copies 1.3 GB, and 8,192 tokens keep 14.1 GB or fewer."""
    settings = TrainingSettings(tokens=8192, precision="bf16-mixed", device="cuda")
    plain = estimate_training(LARGE, settings)
    assert plain.weights / 1e9 == pytest.approx(2.61, abs=0.01)
    assert plain.optimizer / 1e9 == pytest.approx(5.21, abs=0.01)
    assert plain.copies / 1e9 == pytest.approx(1.30, abs=0.01)
    assert plain.total > 22e9
    recomputed = replace(settings, activation_checkpointing=True)
    assert 12e9 < estimate_training(LARGE, recomputed).total < 14e9
    assert estimate_training(LARGE, replace(settings, mode="lora", activation_checkpointing=True)).total < 7e9
    assert estimate_training(LARGE, replace(settings, mode="frozen")).total < 4e9


@pytest.mark.parametrize(("fsdp", "accumulates"), [(True, False), (True, True), (False, False)])
def test_ranks_divide_weights_only_with_fsdp(fsdp: bool, accumulates: bool) -> None:
    alone = TrainingSettings(tokens=4096, precision="bf16-mixed", device="cuda", accumulates=accumulates)
    one = estimate_training(LARGE, alone)
    eight = estimate_training(LARGE, replace(alone, fsdp=fsdp, data_parallel=8))
    ranks = 8 if fsdp else 1
    assert (eight.weights, eight.optimizer) == (one.weights / ranks, one.optimizer / ranks)
    assert eight.activations == one.activations
    if accumulates:  # gradients stay unsharded until the last micro-batch
        assert eight.gradients >= 4 * LARGE.num_parameters
    elif fsdp:
        assert eight.gradients < one.gradients + 4 * LARGE.num_parameters / 8
    else:  # DDP's buckets
        assert eight.gradients >= one.gradients + 4 * LARGE.num_parameters


def test_tensor_parallelism_divides_the_layers() -> None:
    alone = TrainingSettings(tokens=4096, precision="bf16-mixed", device="cuda", accumulates=True)
    one, four = (estimate_training(LARGE, replace(alone, tensor_parallel=size)) for size in (1, 4))
    assert four.weights == pytest.approx(one.weights / 4, rel=0.02)
    # the residual stream and the norms (16 D of 40 D bytes) are whole on every device
    assert four.activations == pytest.approx(one.activations * (16 + 24 / 4) / 40, rel=0.05)


def test_budget_is_the_largest_that_fits() -> None:
    settings = TrainingSettings(tokens=1, precision="bf16-mixed", device="cuda")
    tokens = largest_budget(LARGE, settings, 40 * 2**30)
    fitting, above = (estimate_training(LARGE, replace(settings, tokens=count)).total for count in (tokens, 2 * tokens))
    assert fitting <= 40 * 2**30 < above
    assert largest_budget(LARGE, settings, 2**30) == 0


@pytest.mark.parametrize(("size", "text"), [(0, "0.1 GiB"), (3.25 * 2**30, "3.2 GiB"), (1234.4 * 2**30, "1,234 GiB")])
def test_sizes_are_formatted_in_gib(size: float, text: str) -> None:
    assert format_gib(size) == text


def test_the_table_of_the_documentation_is_current() -> None:
    made = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "memory.py"))
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"](), "run `python docs/memory.py`"
    assert made["table"]().count("\n") == 2 + len(SIZES)
