"""Captions of the notebooks' figures, computed from what the figures show. Each is Markdown in one line."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esm2kit.benchmarking.report import Report, metric_name
from esm2kit.benchmarking.report import format_value as format_metric
from esm2kit.benchmarking.uncertainty_page import get_shown_uncertainty
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


def residue_shares(shares: Mapping[str, float], num_proteins: int) -> str:
    """Describe the bars of residue frequencies.

    Args:
        shares: residue -> frequency, 0 to 1.
        num_proteins: number of proteins.

    Returns:
        Markdown.
    """
    common, rare = max(shares, key=shares.get), min(shares, key=shares.get)
    ratio = f"is {shares[common] / shares[rare]:.0f} times as frequent as {rare}" if shares[rare] else (
        f"is the most frequent, and {rare} does not occur"
    )  # fmt: skip
    return (
        f"*Frequency of each residue in {num_proteins:,} training proteins.* At the dashed line, 5%, all twenty would "
        f"be equally common; {common} {ratio}."
    )


def training_lengths(num_residues_P: np.ndarray, max_residues: int) -> str:
    """Describe the lengths of a training set.

    Args:
        num_residues_P: (P,) residues per record.
        max_residues: length of a model's window.

    Returns:
        Markdown.
    """
    longer = int((num_residues_P > max_residues).sum())
    fit = (
        f"{longer:,} are longer than the window and are cropped, at another position each time they are sampled."
        if longer
        else f"The longest has {num_residues_P.max():,} residues, so all fit into the window."
    )
    return f"*Lengths of the {len(num_residues_P):,} training records.* {fit}"


def cluster_sizes(num_members_C: np.ndarray) -> str:
    """Describe the sizes of clusters.

    Args:
        num_members_C: (C,) members per cluster.

    Returns:
        Markdown.
    """
    single = num_members_C == 1
    return (
        f"*Sizes of the {len(num_members_C):,} training clusters.* {single.mean():.0%} of them have one member, but "
        f"only {single.sum() / num_members_C.sum():.0%} of the records are in these."
    )


def sampled_members(num_members: int, num_epochs: int) -> str:
    """Describe which members of a cluster are sampled.

    Args:
        num_members: members of the cluster.
        num_epochs: number of epochs.

    Returns:
        Markdown.
    """
    return (
        f"*One of the {num_members:,} members of the largest cluster is sampled in each of {num_epochs} epochs "
        "(blue).* The same seed gives the same picture on any machine."
    )


def story() -> str:
    """Describe the picture of the walkthrough.

    Returns:
        Markdown.
    """
    return (
        "*The walkthrough.* Boxes are files and arrows are notebooks; fine-tuning branches off at the checkpoint and "
        "ends in the same kind of report."
    )


def scores(report: Report, model: str = "") -> str:
    """Describe a chart of scores with the verdict of its report.

    Args:
        report: a benchmark or fine-tuning report.
        model: name of the model, if several are shown.

    Returns:
        Markdown.
    """
    task = report.task
    proteins = f"{metric_name(task.metric)} on {task.sizes['test']:,} test proteins"
    return f"*{task.name}, {proteins}{f', model {model}' if model else ''}.* {report.verdict}"


def models(reports: Mapping[str, Report]) -> str:
    """Describe a chart of the same probe on several models.

    Args:
        reports: name of the model -> its report on the same test proteins.

    Returns:
        Markdown.
    """
    task = next(iter(reports.values())).task
    return (
        f"*{task.name}: the same probe on the vectors of {len(reports)} models,* scored on the same "
        f"{task.sizes['test']:,} test proteins."
    )


def layers(report: Report) -> str:
    """Describe the choice of a layer.

    Args:
        report: a benchmark report whose layer was chosen on validation.

    Returns:
        Markdown.
    """
    metric, score = report.task.metric, report.headline(report.first)
    value, low, high = (format_metric(metric, end, score.value) for end in (score.value, score.low, score.high))
    between = "" if score.low is None else f" [{low}, {high}]"
    return (
        f"*{report.task.name}: scores by layer on validation.* {report.layer_sweep.sentence} Its test score, the only "
        f"one that was computed (diamond): {value}{between}."
    )


def held_out(report: Report) -> str:
    """Describe the test predictions of a report's first row.

    Args:
        report: a benchmark or fine-tuning report.

    Returns:
        Markdown.
    """
    task, first = report.task, report.first
    start = f"*Test predictions on {task.name}* (first seed)."
    if task.target == "value":
        return f"{start} {' '.join(report.warnings) or 'On the dashed line, predicted and measured values are equal.'}"
    present = {name: found["recall"] for name, found in first.per_class.items() if found["support"]}
    if not present:
        return start
    best, worst = max(present, key=present.get), min(present, key=present.get)
    kind = "label" if task.is_multilabel else "class"
    return (
        f"{start} Of the {kind} {best}, {present[best]:.0%} are predicted correctly, of the {kind} {worst} "
        f"{present[worst]:.0%}."
    )


def uncertainty(report: Report) -> str:
    """Describe the chart of how sure the first row of a report is.

    Args:
        report: a benchmark or fine-tuning report.

    Returns:
        Markdown.
    """
    found = get_shown_uncertainty(report)
    where = "out of fold" if found.get("out_of_fold") else "on test"
    if report.task.is_multilabel:
        what = f"*Share of the labels that are present against the probability that the model gives,* {where}."
    elif report.task.target == "class":
        what = f"*Share of right predictions against the probability that the model gives,* {where}."
    elif found["quantile"] is None:
        what = f"*Predictions without intervals,* {where}."
    else:
        of_first = f" of {report.task.columns[0]}" if report.task.columns else ""
        what = f"*Predictions{of_first} with their {found['coverage']:.0%} intervals,* {where} (at most 150 of them)."
    return f"{what} {report.first.uncertainty['sentence']}"


def finetuning_loss(updates: int, best: int, validation_losses: Sequence[float]) -> str:
    """Describe the loss curves of fine-tuning.

    Args:
        updates: number of updates.
        best: update with the lowest validation loss.
        validation_losses: losses of the validations.

    Returns:
        Markdown.
    """
    rise = validation_losses[-1] / min(validation_losses) - 1
    after = f"After that it rises by {rise:.1%}." if rise >= 0.0005 else "After that it hardly changes."
    if best >= updates:
        after = "That is the last validation."
    return (
        f"*Loss over {updates:,} updates.* The model of update {best:,} is saved, where the validation loss is lowest "
        f"(dotted line). {after}"
    )


def new_predictions(predicted: Mapping[str, Any]) -> str:
    """Describe the predictions for new proteins.

    Args:
        predicted: the result of `predict`.

    Returns:
        Markdown.
    """
    warnings = " ".join(predicted["warnings"])
    return f"*Predictions for {predicted['num_proteins']:,} proteins.* {predicted['verdict']} {warnings}".rstrip()


def strip(report: Report) -> str:
    """Describe the measured and predicted classes along a test protein.

    Args:
        report: a benchmark or fine-tuning report.

    Returns:
        Markdown.
    """
    return (
        f"*Measured and predicted classes along one test protein of {report.task.name},* that with the median accuracy."
    )


def divisors(error: Mapping[str, Sequence[float]], numbers: Sequence[int], global_batch_size: int) -> str:
    """Describe the error of the gradient with two divisors.

    Args:
        error: name of the mean -> relative errors; the mean of means is first.
        numbers: micro-batches per update.
        global_batch_size: sequences per update.

    Returns:
        Markdown.
    """
    wrong, right = (errors[-1] for errors in error.values())
    return (
        f"*Error of the gradient of {global_batch_size} sequences, split into micro-batches.* With {numbers[-1]} "
        f"micro-batches, dividing by each one's own count is wrong by {wrong:.0%}; dividing by the global count agrees "
        f"to {right:.0e}, which is float32 rounding."
    )


def layouts(apart: float, global_batch_size: int) -> str:
    """Describe the loss curves of two layouts of a batch, and of twice the batch.

    Args:
        apart: largest relative difference of the two layouts.
        global_batch_size: sequences per update.

    Returns:
        Markdown.
    """
    difference = f"differ by at most {apart:.0e} of the loss" if apart else "have equal losses, to the last bit"
    return (
        f"*Two layouts of the same {global_batch_size} sequences, and twice the batch.* The two layouts {difference}; "
        "twice the batch is another experiment with another curve."
    )


def parallel() -> str:
    """Describe the picture of DDP, FSDP2 and tensor parallelism.

    Returns:
        Markdown.
    """
    return "*What two devices store and exchange.* Filled boxes are stored weights; equal colours are equal sequences."


def epoch_shares(num_members_C: np.ndarray) -> str:
    """Describe what an epoch consists of.

    Args:
        num_members_C: (C,) members per cluster.

    Returns:
        Markdown.
    """
    tenth = np.sort(num_members_C)[::-1][: len(num_members_C) // 10].sum() / num_members_C.sum()
    return (
        f"*What an epoch consists of.* Record by record, the largest tenth of the {len(num_members_C):,} clusters "
        f"would be {tenth:.0%} of what training sees; cluster by cluster it is a tenth."
    )


def member_counts(counts_K: np.ndarray, low: float, high: float, epochs: int) -> str:
    """Describe how often the members of a cluster are sampled.

    Args:
        counts_K: (K,) samples of each member.
        low: lower end of the expected interval.
        high: its upper end.
        epochs: number of epochs.

    Returns:
        Markdown.
    """
    inside = int(((counts_K >= low) & (counts_K <= high)).sum())
    return (
        f"*How often the {len(counts_K)} members of the largest cluster are sampled in {epochs:,} epochs.* {inside} of "
        f"{len(counts_K)} are inside the grey band; with equal probabilities, in 99 of 100 repetitions all are."
    )
