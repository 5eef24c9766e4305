"""Captions of the notebooks' figures, computed from what the figures show. Each is Markdown in one line."""

from collections.abc import Mapping, Sequence

import numpy as np

from esm2kit.embedding.maps import explained_variance, queries
from esm2kit.models.contacts import PairMap
from esm2kit.models.masked_scores import MaskedPredictions
from esm2kit.notebook.diagrams import CHANNELS
from esm2kit.sequences.alphabet import STANDARD_RESIDUES
from esm2kit.sequences.fasta import Record

Share = tuple[float, float, float]  # a share and the ends of its interval


def lengths(records: Sequence[Record], file: str) -> str:
    """Describe a histogram of lengths.

    Args:
        records: the proteins.
        file: name of their file.

    Returns:
        Markdown.
    """
    longest = max(records, key=lambda record: len(record.sequence))
    return (
        f"*Lengths of the {len(records):,} proteins of {file}.* The longest, {longest.id}, has "
        f"{len(longest.sequence):,} residues. A model sees up to 1,022 at a time."
    )


def neighbours(record: Record, colour: str, value: object, cosine_K: np.ndarray, width: int) -> str:
    """Describe the neighbours of a protein on a map.

    Args:
        record: the protein.
        colour: name of what colours the map.
        value: its value for this protein.
        cosine_K: cosine similarities of the neighbours, the nearest first.
        width: number of dimensions of the vectors.

    Returns:
        Markdown.
    """
    return (
        f"*The {len(cosine_K)} nearest neighbours of {record.id} (the star; {colour}: {format_value(value)}).* They "
        f"were found in all {width} dimensions, with cosine similarities of {cosine_K[0]:.2f} to {cosine_K[-1]:.2f}."
    )


def format_value(value: object) -> str:
    """Format a word or a number of a map's colour.

    Args:
        value: a word or a number; NaN for a missing one.

    Returns:
        The text.
    """
    if not isinstance(value, float | np.floating):
        return str(value)
    return "not given" if np.isnan(value) else f"{value:,g}"


def agreement(shares: Mapping[str, Share], colour: str, numeric: bool, num_proteins: int) -> str:
    """Describe how often the nearest neighbour agrees, for models, composition and chance.

    Args:
        shares: name -> share and interval; `composition` and `chance` are among the names, the chosen model is first.
        colour: name of what colours the map.
        numeric: whether its values are numbers.
        num_proteins: number of proteins with a value.

    Returns:
        Markdown.
    """
    if not shares:
        return ""
    model, composition = next(iter(shares.values())), shares["composition"]
    apart = model[1] > composition[2] or model[2] < composition[1]
    beyond = "not clearly more" if not apart else "more" if model[0] > composition[0] else "less"
    listed = ", ".join(f"{name} {share:.0%}" for name, (share, _, _) in shares.items())
    return (
        f"*Proteins whose nearest neighbour {_describe_agreement(colour, numeric)}:* {listed}, over "
        f"{len(queries(num_proteins)):,} proteins. By this measure the vectors know {beyond} than the amino-acid "
        f"composition.{_compare_models(shares)}"
    )


def _describe_agreement(colour: str, numeric: bool) -> str:
    return f"is on the same side of the median {colour}" if numeric else f"has the same {colour}"


def _compare_models(shares: Mapping[str, Share]) -> str:
    """What training on 65 million clusters adds, if both an official model and one trained here are scored."""
    official = next((name for name in shares if name.startswith("official")), None)
    if official is None or "trained here" not in shares:
        return ""
    more = shares[official][0] - shares["trained here"][0]
    size = official.removeprefix("official ")
    return (
        f" The official {size} was trained on the 65 million clusters of UniRef50, the model trained here on the "
        f"dataset of notebook 01: a difference of {100 * more:+.0f} percentage points."
    )


def residue_vectors(record: Record, hidden_TD: np.ndarray) -> str:
    """Describe the heat map of a protein's residue vectors.

    Args:
        record: the protein.
        hidden_TD: (T, D) vectors of its first T residues.

    Returns:
        Markdown.
    """
    by_residue, by_chance = explained_variance(list(record.sequence[: len(hidden_TD)]), hidden_TD)
    return (
        f"*The {min(CHANNELS, hidden_TD.shape[1])} channels that vary most along {record.id}.* Context adds "
        f"{1 - by_residue:.0%} of the variance over all channels. The type of the residue explains the other "
        f"{by_residue:.0%}; random types would explain {by_chance:.0%}."
    )


def pairs(protein: str, trained: PairMap, untrained: PairMap | None = None) -> str:
    """Describe the map of a protein's residue pairs.

    Args:
        protein: its id.
        trained: the map.
        untrained: that of an untrained model of the same architecture.

    Returns:
        Markdown.
    """
    return f"*Residue pairs of {protein}, {len(trained.values_TT)} residues.* {trained.describe(untrained)}"


def learning_rate(rates: Sequence[float], warmup_steps: int) -> str:
    """Describe a schedule of learning rates.

    Args:
        rates: learning rate of each update.
        warmup_steps: updates of warm-up.

    Returns:
        Markdown.
    """
    peak = f"{warmup_steps} updates of warm-up, then a peak of {max(rates):g}."
    return f"*Learning rate over {len(rates):,} updates:* {peak}"


def pretraining_loss(steps: Sequence[float], losses: Sequence[float], unigram_loss: float) -> str:
    """Describe the loss curves of pretraining.

    Args:
        steps: updates of the validations.
        losses: their losses.
        unigram_loss: loss of the unigram guess.

    Returns:
        Markdown.
    """
    below = [step for step, loss in zip(steps, losses, strict=True) if loss < unigram_loss]
    first = f"It is first below the unigram guess at update {below[0]:,.0f}." if below else (
        "It is not yet below the unigram guess."
    )  # fmt: skip
    return (
        "*Loss during training.* The validation loss is measured on proteins from clusters that training never sees, "
        f"and every scored residue is hidden. {first} The training loss is lower, because a fifth of its scored "
        "residues stay visible or are replaced (the 80/10/10 scheme of BERT): compare it only with itself."
    )


def perplexity(final: float, unigram: float) -> str:
    """Describe the curve of the validation perplexity.

    Args:
        final: perplexity of the best checkpoint.
        unigram: perplexity of the unigram guess.

    Returns:
        Markdown.
    """
    return (
        "*Validation perplexity:* how many sides a fair die would need to be equally unpredictable. A uniform guess "
        f"has 20, the unigram guess {unigram:.2f}, this model {final:.2f} at its best checkpoint. NVIDIA's 8M model "
        "has 10.26 after 500,000 updates on all of UniRef50, on another validation set and with the easier masking."
    )


def context_gain(found: MaskedPredictions, num_proteins: int) -> str:
    """Describe how much likelier a model makes each hidden residue than its frequency does.

    Args:
        found: the predictions.
        num_proteins: number of proteins.

    Returns:
        Markdown.
    """
    times = found.mean_ratios()
    most, less = next(iter(times)), [letter for letter in times if times[letter] < 1]
    first = found.log_ratio_M[found.is_first_M].sum() / found.log_ratio_M.sum()
    start = f" It is nearly always M and alone provides {first:.0%} of the total gain." if 0 < first < 1 else ""
    return (
        f"*What context adds,* residue by residue (geometric means over {len(found.log_ratio_M):,} residues of "
        f"{num_proteins} proteins). {most} gains most: the model makes it {times[most]:.2f} times as likely as its "
        f"frequency. Less likely than by frequency: {', '.join(less) or 'none'}. The first residue of each chain is "
        f"excluded.{start}"
    )


def guesses(protein: str, odds_TL: np.ndarray, shown: str, model: str) -> str:
    """Describe the map of a model's guesses along a protein.

    Args:
        model: name of the model.
        protein: its id.
        odds_TL: log2 of probability / frequency of each residue, from the second residue on.
        shown: the true residues.

    Returns:
        Markdown.
    """
    true = [
        odds_TL[place, STANDARD_RESIDUES.index(letter)]
        for place, letter in enumerate(shown)
        if letter in STANDARD_RESIDUES
    ]
    flat_L = odds_TL.mean(0)
    constant = (flat_L**2).mean() / (odds_TL**2).mean()
    return (
        f"*Guesses of a model ({model}) for residues 2 to {len(shown) + 1} of {protein}.* Blue is more "
        "likely than by frequency, orange less likely. A dot marks the true residue, which is more likely than by "
        f"frequency at {sum(value > 0 for value in true)} of {len(true)} positions. {constant:.0%} of the pattern is "
        f"the same along the chain: the model knows that this protein is rich in {STANDARD_RESIDUES[flat_L.argmax()]}. "
        "The rest depends on the position."
    )
