"""Estimate the peak memory of inference and training from the shape of a model and the settings of a run.

The formulas count the tensors that are in memory together at the peak: weights, gradients, AdamW's averages, and per
token what the layers keep and what the operation at the peak allocates. `benchmarks/memory.py` compares them with
measured peaks. They do not count Python and the libraries (about 0.4 GiB on a CPU, and the context of CUDA on a GPU),
nor memory that an allocator reserves and does not use. Does not import torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from esm2kit.models.config import ESM2Config

GIB = 2**30
DeviceType = Literal["cpu", "cuda", "mps"]
# Bytes of a number in the residual stream and in the matrix products.
TRAINING_BYTES = {"32-true": (4, 4), "bf16-mixed": (4, 2), "bf16-true": (2, 2)}
# Layers that FSDP2 holds unsharded at a time: the one that is computed and the next one.
GATHERED_LAYERS = 2
# Share of the free memory that a complete model may take; the rest is for what the estimate does not count.
USABLE_SHARE = 0.9


class Memory(NamedTuple):
    """Bytes on one device at the peak, by purpose.

    Args:
        weights: Parameters, with the rearranged ones of the CPU's encoder.
        copies: bf16 copies of the matrices, and the layers that FSDP2 has gathered.
        gradients: Gradients that exist at the peak.
        optimizer: AdamW's two averages.
        activations: Everything that grows with the number of tokens.
    """

    weights: float
    copies: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return float(sum(self))


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """Settings of inference that decide its memory.

    Args:
        tokens: Tokens per batch, with BOS and EOS.
        precision: float32, bfloat16 or int8, see `Encoder`.
        device: Type of the device. A CPU runs the fused `Encoder`, other devices run the model.
        workers: Batches that are computed at a time.
        layers: Layers whose representations are returned.
        shards: Devices that share the layers of one copy of the model.
    """

    tokens: int
    precision: str = "float32"
    device: DeviceType = "cpu"
    workers: int = 1
    layers: int = 1
    shards: int = 1


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of a training run that decide its memory.

    Args:
        tokens: Tokens per micro-batch and device, with BOS and EOS.
        precision: 32-true, bf16-mixed or bf16-true.
        device: Type of the device. Attention in bf16 keeps float32 numbers on a CPU and bf16 numbers on a GPU.
        mode: Weights that are trained: full, last_n, lora or frozen (only a head).
        last_n: Trained layers in mode last_n.
        lora_rank: Rank of the adapters in mode lora, on all six matrices of a layer.
        activation_checkpointing: Whether layers are recomputed in the backward pass.
        accumulates: Whether an update has more than one micro-batch, so that gradients exist in the forward pass.
        data_parallel: Ranks that process different sequences.
        tensor_parallel: Devices that share one copy of the model.
        fsdp: Whether the data-parallel ranks share weights, gradients and averages (FSDP2).
    """

    tokens: int
    precision: str = "32-true"
    device: DeviceType = "cpu"
    mode: str = "full"
    last_n: int = 1
    lora_rank: int = 8
    activation_checkpointing: bool = False
    accumulates: bool = False
    data_parallel: int = 1
    tensor_parallel: int = 1
    fsdp: bool = False


def count_layer_parameters(shape: ESM2Config) -> int:
    """Count the parameters of one transformer layer."""
    return 12 * shape.embed_dim**2 + 13 * shape.embed_dim


def estimate_inference(shape: ESM2Config, settings: InferenceSettings) -> Memory:
    """Estimate the peak memory of computing representations.

    On a GPU the model has 4 bytes per parameter in float32 and 2 in bfloat16. At the peak, which is the GELU, a token
    of width D has 10 D numbers: the layer's input twice and both sides of the GELU. Each further returned layer adds D.
    Devices that share the layers hold a part of each, and two complete ones.

    On a CPU the loaded model stays in memory in float32. The encoder adds its rearranged query, key and value matrices,
    or in bfloat16 and int8 a copy of all matrices. A token has 9 D numbers of reused buffers in float32 and the
    temporaries of the largest product: 8 D bytes in float32, 18 D in bfloat16 and 29 D in int8 (calculated).

    Args:
        shape: Architecture of the model.
        settings: Settings of the run.

    Returns:
        The bytes by purpose. Files, tables and results that wait to be written are not included.
    """
    width, layers, total = shape.embed_dim, shape.num_layers, shape.num_parameters
    rotary = 4 * shape.head_dim
    if settings.device != "cpu" or settings.shards > 1:
        number = 4 if settings.precision == "float32" or settings.device == "cpu" else 2
        per_token = (10 + settings.layers - 1) * number * width + rotary
        layer = count_layer_parameters(shape)
        held = total - layers * layer * (1 - 1 / settings.shards)
        gathered = number * GATHERED_LAYERS * layer if settings.shards > 1 else 0.0
        return Memory(number * held, gathered, activations=settings.workers * settings.tokens * per_token)
    rearranged = {"float32": 12 * width**2, "bfloat16": 24 * width**2, "int8": 12 * width**2}[settings.precision]
    temporary = {"float32": 8, "bfloat16": 18, "int8": 29}[settings.precision] * width
    per_token = 36 * width + temporary + 4 * (settings.layers - 1) * width + rotary
    activations = settings.workers * (settings.tokens * per_token + 4 * 2**18)
    return Memory(4 * total, layers * rearranged, activations=activations)


def estimate_training(shape: ESM2Config, settings: TrainingSettings) -> Memory:
    """Estimate the peak memory of one update on one device.

    Weights, gradients and AdamW's two averages are float32: 4 + 4 + 8 bytes per trained parameter and 4 per frozen one.
    FSDP2 divides all of them by its ranks, tensor parallelism those of the layers. bf16 adds a 2-byte copy of every
    matrix (with FSDP2 of the gathered layers only). DDP adds 4 bytes per trained parameter for its buckets.

    A layer of width D keeps per token: its input and the sum after attention in the residual's type (r bytes per
    number), the results of both norms, query, key, value, the attention's result, and both sides of the GELU (4 D each)
    in the type of the products (m bytes). bf16-mixed keeps the first norm three times, because autocast casts it for
    each of three products. On a GPU this is 68 D bytes in float32, 40 D in bf16-mixed and 32 D in bf16-true. Attention
    keeps no T x T matrix, because its kernels recompute it. With activation checkpointing a layer keeps only its input,
    and one layer at a time is recomputed.

    The peak is in the backward pass of a feed-forward network, with the gradient of its output and of the GELU: either
    of the last layer, where all activations exist, or of the first layer, where all gradients exist.

    Args:
        shape: Architecture of the encoder.
        settings: Settings of the run.

    Returns:
        The bytes by purpose. The fine-tuning head and the logits of masked rows exist before and after the peak and
        need less than what is counted there.
    """
    residual, product = TRAINING_BYTES[settings.precision]
    width, tensor = shape.embed_dim, settings.tensor_parallel
    layer, ranks = count_layer_parameters(shape), settings.data_parallel if settings.fsdp else 1
    others = shape.num_parameters - shape.num_layers * layer

    def held(layers: float, rest: float) -> float:
        """Parameters per device of layers and of the rest of the model."""
        return (layers * layer / tensor + rest) / ranks

    adapters = shape.num_layers * 18 * settings.lora_rank * width if settings.mode == "lora" else 0
    trained_layers = {"full": shape.num_layers, "last_n": settings.last_n}.get(settings.mode, 0)
    trained = held(trained_layers, others if settings.mode == "full" else 0) + adapters / ranks
    gradients = trained * (ranks if settings.fsdp and settings.accumulates else 1)
    kept = {"lora": shape.num_layers}.get(settings.mode, trained_layers)  # layers that keep activations
    recomputes = settings.activation_checkpointing and kept > 0
    if settings.fsdp:
        copies = GATHERED_LAYERS * layer / tensor * product
    elif settings.precision == "bf16-true":
        copies = 2.0 * held(shape.num_layers, others)
    elif settings.precision == "bf16-mixed":
        # autocast keeps its copies of trained matrices; those of frozen ones exist while the backward pass needs them
        keeps_all = settings.mode == "full" or (settings.mode == "lora" and not recomputes)
        copies = 2.0 * held(shape.num_layers if keeps_all else max(trained_layers, 1), 0)
    else:
        copies = 0.0
    saved = _saved_per_token(shape, settings)
    temporary = _backward_per_token(shape, settings)
    if settings.mode == "frozen":  # no backward pass through the encoder
        first = last = (2 * residual + 8 * product / tensor) * width
    elif recomputes:
        first, last = saved + temporary, (kept - 1) * residual * width + saved + temporary
    else:
        first, last = saved + temporary, kept * saved + temporary
    tokens = settings.tokens
    rotary = 4 * shape.head_dim * tokens
    # gradient of the largest matrix, in bf16 and in float32
    newest = (4 if product == 4 else 6) * 4 * width**2 / tensor if trained_layers else 0.0
    # the bf16 gradients of bf16-true's copies are added to the float32 gradients when the backward pass ends
    waiting = 2.0 if settings.precision == "bf16-true" and not settings.fsdp else 0.0
    earlier = 4.0 if settings.accumulates or not waiting else 0.0
    at_last = ((4.0 * gradients if settings.accumulates else 0.0) + newest, last * tokens)
    # of the first trained layer, the gradients of fc1 and of attention come after the peak
    existing = gradients - (8 * width**2 / tensor if trained_layers and not settings.accumulates else 0.0) / ranks
    at_first = ((earlier + waiting) * existing, first * tokens)
    after = (4.0 * gradients, 0.0)
    grown, activations = max(at_last, at_first, after, key=sum)
    if settings.data_parallel > 1 and not settings.fsdp:
        grown += 4.0 * gradients
    return Memory(
        weights=4.0 * (held(shape.num_layers, others) + adapters / ranks),
        copies=copies,
        gradients=grown,
        optimizer=8.0 * trained,
        activations=activations + rotary,
    )


def _saved_per_token(shape: ESM2Config, settings: TrainingSettings) -> float:
    """Bytes per token that one layer keeps for its backward pass."""
    residual, product = TRAINING_BYTES[settings.precision]
    width, tensor = shape.embed_dim, settings.tensor_parallel
    attention = 4 if settings.device == "cpu" else product
    norms = 4 if settings.precision == "bf16-mixed" else 2
    # without the variable-length kernel, the results of the sequences are joined in a new tensor
    joined = product if settings.device == "cpu" or product == 4 else 0
    divided = 4 * attention + joined + 8 * product
    adapters = 6 * settings.lora_rank * product if settings.mode == "lora" else 0
    statistics = 4 * shape.attention_heads / tensor + 4 * residual
    return (2 * residual + norms * product + divided / tensor) * width + adapters + statistics


def _backward_per_token(shape: ESM2Config, settings: TrainingSettings) -> float:
    """Bytes per token that the backward pass of a feed-forward network allocates."""
    residual, product = TRAINING_BYTES[settings.precision]
    width, tensor = shape.embed_dim, settings.tensor_parallel
    output = residual + (product if settings.precision == "bf16-mixed" else 0)
    copies = 2 if settings.mode == "lora" else 1  # LoRA adds the gradients of the matrix and of the adapter
    return (output + 4 * product * copies / tensor) * width


def format_gib(size: float) -> str:
    """Format bytes as GiB: whole numbers from 10, one decimal below, and at least 0.1."""
    gib = size / GIB
    return f"{gib:,.0f} GiB" if gib >= 10 else f"{max(gib, 0.1):.1f} GiB"


def describe_inference(shape: ESM2Config, settings: InferenceSettings) -> str:
    """Describe batches and their estimate, for a message."""
    size = format_gib(estimate_inference(shape, settings).total)
    return f"computing batches of {settings.tokens:,} tokens (about {size})"


def list_inference_remedies(
    shape: ESM2Config,
    settings: InferenceSettings,
    options: Sequence[str],
    note: str = "",
    names: Mapping[str, str] | None = None,
) -> list[str]:
    """List up to three settings of a stage that need less memory, each with its estimate.

    Args:
        shape: Architecture of the model.
        settings: Settings with which the memory was exhausted.
        options: Names of the stage's options, of batch_tokens, workers, precision, layer_by_layer and device.
        note: Further options that a smaller batch requires.
        names: How the stage calls an option, if otherwise.

    Returns:
        Texts such as "--batch_tokens 16384 (about 2.1 GiB)".
    """
    changes: dict[str, tuple[str, dict[str, object]]] = {
        "batch_tokens": (f"{max(1, settings.tokens // 2)}{note}", {"tokens": max(1, settings.tokens // 2)}),
        "workers": ("1", {"workers": 1}),
        "precision": ("bfloat16", {"precision": "bfloat16"}),
        "layer_by_layer": ("true", {}),
        "device": ("cpu", {}),
    }
    now, found = estimate_inference(shape, settings).total, []
    for name in (name for name in changes if name in options):
        value, changed = changes[name]
        option = (names or {}).get(name, name)
        size = estimate_inference(shape, replace(settings, **changed)).total
        if name == "layer_by_layer" or (name == "device" and settings.device != "cpu"):
            found.append(f"--{option} {value}")
        elif size < now:
            found.append(f"--{option} {value} (about {format_gib(size)})")
    return [*found[:2], found[2] if len(found) > 2 else "a smaller --model"]


def largest_budget(shape: ESM2Config, settings: TrainingSettings, limit: float) -> int:
    """Find the most tokens per micro-batch, a power of two, that fit in `limit` bytes; 0 if none does."""
    tokens = 1 << 20
    while tokens and estimate_training(shape, replace(settings, tokens=tokens)).total > limit:
        tokens //= 2
    return tokens
