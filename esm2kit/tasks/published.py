"""Published scores on FLIP's tasks, with their sources and differences from esm2kit's protocol."""

from dataclasses import dataclass

from esm2kit.tasks.flip import FLIP_CITATION


@dataclass(frozen=True)
class PublishedScore:
    """A published score.

    Args:
        task: FLIP task.
        split: of the task.
        metric: esm2kit's name of the metric.
        value: the score.
        model: model or method.
        source: publication.
        difference: how the protocol may differ from esm2kit's.
    """

    task: str
    split: str
    metric: str
    value: float
    model: str
    source: str
    difference: str


MODELS = {size: f"esm2_t{layers}_{size}_UR50D" for layers, size in ((6, "8M"), (12, "35M"), (30, "150M"), (33, "650M"))}
MODELS["3B"] = "esm2_t36_3B_UR50D"
NVIDIA = (
    "NVIDIA's model card of esm2nv",
    "one run of one head on checkpoints converted by NVIDIA; no interval, no baseline",
)
SCHMIRLER = (
    "Schmirler et al. 2024, 10.1038/s41467-024-51844-2",
    "mean of five runs of a 32-wide dense head on the frozen model (preset `schmirler`)",
)
FLIP2021 = (FLIP_CITATION, "one-hot recipe, no language model (preset `flip2021`)")
SCHMIRLER_FINETUNED = (SCHMIRLER[0], "the encoder was fine-tuned, not only probed; mean of three runs")

SCHMIRLER_RANDOM = (
    SCHMIRLER[0],
    "the encoder was trained from random weights; three runs on gb1, with 200 validations instead of the 100 of "
    "pretrained weights",
)


def _list_published() -> tuple[PublishedScore, ...]:
    scores: list[PublishedScore] = []
    for size, ss3, conservation, meltome, gb1 in (("650M", 0.852, 0.332, 7.19, 1.29), ("3B", 0.857, 0.345, 6.68, 1.28)):
        scores += [
            PublishedScore("secondary_structure_648", "sampled", "accuracy", ss3, MODELS[size], *NVIDIA),
            PublishedScore("conservation", "sampled", "accuracy", conservation, MODELS[size], *NVIDIA),
            PublishedScore("meltome", "mixed_split", "rmse", meltome, MODELS[size], *NVIDIA),
            PublishedScore(
                "gb1", "two_vs_rest", "rmse", gb1, MODELS[size], NVIDIA[0],
                f"{NVIDIA[1]}; predicting the training mean gives 1.252, so this score shows no information",
            ),
        ]  # fmt: skip
    columns = (
        ("gb1", "three_vs_rest", "spearman"),
        ("aav", "two_vs_many", "spearman"),
        ("meltome", "mixed_split", "spearman"),
        ("scl", "mixed_hard", "accuracy"),
        ("secondary_structure", "sampled", "accuracy"),
    )
    table = (
        (MODELS["8M"], SCHMIRLER, (0.818, 0.669, 0.564, 0.520, 0.753)),
        (MODELS["35M"], SCHMIRLER, (0.827, 0.590, 0.586, 0.549, 0.782)),
        (MODELS["150M"], SCHMIRLER, (0.833, 0.657, 0.617, 0.594, 0.822)),
        (MODELS["650M"], SCHMIRLER, (0.857, 0.471, 0.656, 0.629, 0.847)),
        (MODELS["3B"], SCHMIRLER, (0.866, 0.776, 0.677, 0.642, 0.856)),
        (f"{MODELS['8M']}, fine-tuned", SCHMIRLER_FINETUNED, (0.883, 0.827, 0.584, 0.559, 0.761)),
        (f"{MODELS['35M']}, fine-tuned", SCHMIRLER_FINETUNED, (0.879, 0.808, 0.598, 0.581, 0.791)),
        (f"{MODELS['150M']}, fine-tuned", SCHMIRLER_FINETUNED, (0.879, 0.846, 0.626, 0.616, 0.828)),
        (f"{MODELS['650M']}, fine-tuned", SCHMIRLER_FINETUNED, (0.879, 0.783, 0.664, 0.638, 0.855)),
        (f"{MODELS['3B']}, fine-tuned with LoRA", SCHMIRLER_FINETUNED, (0.893, 0.857, 0.699, 0.678, 0.864)),
        ("8M from random weights, fine-tuned", SCHMIRLER_RANDOM, (0.857, 0.708, 0.527, 0.470, 0.708)),
        ("150M from random weights, fine-tuned", SCHMIRLER_RANDOM, (0.870, 0.704, 0.513, 0.459, 0.708)),
    )
    for model, source, values in table:
        scores += [
            PublishedScore(*column, value, model, *source) for column, value in zip(columns, values, strict=True)
        ]
    for split, spearman in (("one_vs_rest", 0.279), ("two_vs_rest", 0.594), ("three_vs_rest", 0.755)):
        scores.append(PublishedScore("gb1", split, "spearman", spearman, "one-hot ridge", *FLIP2021))
    return tuple(scores)


PUBLISHED = _list_published()
