"""Write the memory of every model size into docs/howto/devices.md: `python docs/memory.py`, from the estimates."""

import re
from pathlib import Path

from esm2kit.models.config import SHORT_NAMES, SIZES, ESM2Config
from esm2kit.models.memory import InferenceSettings, TrainingSettings, estimate_inference, estimate_training, format_gib

PAGE = Path(__file__).with_name("howto") / "devices.md"
START, END = "<!-- made by `python docs/memory.py` -->\n", "<!-- end -->\n"
BATCH_TOKENS, MICRO_BATCH_TOKENS, RANKS = 32_768, 16_384, 8


def columns(shape: ESM2Config) -> dict[str, float]:
    """Return the bytes that a size needs for each use, by the heading of the column."""

    def training(**options: object) -> float:
        defaults = {"tokens": MICRO_BATCH_TOKENS, "precision": "bf16-mixed", "device": "cuda"}
        return estimate_training(shape, TrainingSettings(**defaults | options)).total

    def embedding(precision: str) -> float:
        settings = InferenceSettings(tokens=BATCH_TOKENS, precision=precision, device="cuda")
        return estimate_inference(shape, settings).total

    return {
        "embed, float32": embedding("float32"),
        "embed, bfloat16": embedding("bfloat16"),
        "finetune frozen": training(mode="frozen"),
        "finetune lora": training(mode="lora"),
        "lora, recomputed": training(mode="lora", activation_checkpointing=True),
        "pretrain, finetune full": training(),
        "full, recomputed": training(activation_checkpointing=True),
        f"full, recomputed, fsdp2 on {RANKS}": training(activation_checkpointing=True, fsdp=True, data_parallel=RANKS),
    }


def table() -> str:
    """Return the table in Markdown."""
    sizes = {short: columns(SIZES[name]) for short, name in SHORT_NAMES.items()}
    headings = list(sizes["8M"])
    rows = [[short, *(format_gib(size) for size in found.values())] for short, found in sizes.items()]
    lines = [["model", *headings], ["---"] * (len(headings) + 1), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def page() -> str:
    """Return the page with the current table."""
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(f"(?<={re.escape(START)}).*?(?={re.escape(END)})", lambda _: table(), text, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
