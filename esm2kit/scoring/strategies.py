"""Scoring strategies under their published names: the forward passes that they need, and the scores of variants.

docs/explanation/scoring.md has the formulas and their sources.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from esm2kit.scoring.config import Strategy
from esm2kit.scoring.masked_passes import Pass, find_window, tokenize_protein
from esm2kit.scoring.mutations import Substitution
from esm2kit.scoring.variants import Variant
from esm2kit.sequences.alphabet import FIRST_STANDARD_IDX, NUM_STANDARD, STANDARD_RESIDUES, TOKENS, VOCAB_SIZE

TABLE_STRATEGIES = ("masked-marginals", "wt-marginals")  # one table of log-probabilities scores every variant
STANDARD = slice(FIRST_STANDARD_IDX, FIRST_STANDARD_IDX + NUM_STANDARD)
VARIANTS_PER_STEP = 256
INDEL_NOTE = "insertion or deletion: pseudo-log-likelihood ratio"
ReadValues = Callable[[int], np.ndarray]


class ScoredVariant(NamedTuple):
    """The score of a variant.

    Args:
        score: log-odds of mutant and wild type, natural logarithm; above 0 if the model prefers the mutant.
        wild_probabilities: of the wild type's residue, per substitution; empty for pseudo-log-likelihoods.
        mutant_probabilities: of the mutant's residue, per substitution.
        windows: first and last residue (from 1) of the model input, per substitution; a complete protein once.
        note: what is unusual about the score.
    """

    score: float
    wild_probabilities: tuple[float, ...]
    mutant_probabilities: tuple[float, ...]
    windows: tuple[tuple[int, int], ...]
    note: str = ""


class ProteinScores(NamedTuple):
    """All scores of a protein.

    Args:
        variants: the scores, in the order of the variants.
        log_odds_TA: (T, 20) score of every single substitution, 0 for the wild type, NaN where it was not computed.
        log_prob_TA: (T, 20) log-probabilities of the standard residues, NaN where no prediction was read. None for a
            strategy without such a table.
    """

    variants: list[ScoredVariant]
    log_odds_TA: np.ndarray
    log_prob_TA: np.ndarray | None


class Likelihood(NamedTuple):
    """The pseudo-log-likelihood of a sequence: its sum over the standard residues, and their number."""

    total: float
    num_residues: int

    @property
    def mean(self) -> float:
        """The mean per residue; NaN without standard residues."""
        return self.total / self.num_residues if self.num_residues else float("nan")

    @property
    def pseudo_perplexity(self) -> float:
        """exp(-mean), from 1 for a certain model; 20 for one that guesses among the standard residues."""
        return float(np.exp(-self.mean))


class ProteinScorer:
    """Scores variants of one protein.

    `steps` lists the forward passes, and `collect` reads their values in the same order.

    Args:
        sequence: the wild type.
        variants: what is scored.
        strategy: how.
        max_tokens: tokens per model input, with BOS and EOS.
        mask_together: hide all mutated positions of a variant at once, with masked-marginals.
    """

    def __init__(
        self,
        sequence: str,
        variants: Sequence[Variant],
        strategy: Strategy,
        max_tokens: int,
        mask_together: bool = False,
    ) -> None:
        self.sequence, self.variants, self.strategy, self.max_tokens = sequence, variants, strategy, max_tokens
        self.tokens_T = tokenize_protein(sequence)
        self.is_table = strategy in TABLE_STRATEGIES
        self.by_table, self.by_own_pass, self.by_likelihood = [], [], []
        for index, variant in enumerate(variants):
            if variant.sequence is not None or strategy == "pseudo-ppl":
                self.by_likelihood.append(index)
            elif not self.is_table or (mask_together and len(variant.substitutions) > 1):
                self.by_own_pass.append(index)
            else:
                self.by_table.append(index)

    def steps(self) -> Iterator[list[Pass]]:
        """List the forward passes in steps, whose passes have no order of their own.

        Yields:
            The passes of a step.
        """
        if self.by_table:
            yield self._table_passes()
        for start in range(0, len(self.by_own_pass), VARIANTS_PER_STEP):
            indices = self.by_own_pass[start : start + VARIANTS_PER_STEP]
            yield [each for index in indices for each in self._own_passes(self.variants[index])]
        for sequence in self._likelihood_sequences():
            yield likelihood_passes(sequence, self.max_tokens)

    def collect(self, read: ReadValues) -> ProteinScores:
        """Compute the scores from the values of the passes.

        Args:
            read: returns the next values of the passes of `steps`, given their number.

        Returns:
            The scores.
        """
        scored: dict[int, ScoredVariant] = {}
        log_prob_TV = np.full((len(self.tokens_T), VOCAB_SIZE), np.nan, dtype=np.float32)
        if self.by_table:
            for each in self._table_passes():
                log_prob_TV[list(each.read)] = read(each.num_values).reshape(-1, VOCAB_SIZE)
        for index in self.by_table:
            scored[index] = self._score_by_table(self.variants[index], log_prob_TV)
        for index in self.by_own_pass:
            scored[index] = self._score_by_own_pass(self.variants[index], read)
        for index, score in zip(self.by_likelihood, self._read_likelihood_ratios(read), strict=True):
            scored[index] = self._describe_likelihood(self.variants[index], score)
        variants = [scored[index] for index in range(len(self.variants))]
        log_prob_TA = log_prob_TV[1:-1, STANDARD] if self.is_table else None
        return ProteinScores(variants, self._fill_log_odds(variants, log_prob_TV), log_prob_TA)

    def _window(self, position: int) -> tuple[int, int]:
        return find_window(position + 1, len(self.tokens_T), self.max_tokens)

    def _shown_window(self, position: int) -> tuple[int, int]:
        """Return the first and the last residue, from 1, of the window of a position."""
        start, stop = self._window(position)
        return max(start, 1), min(stop, len(self.tokens_T) - 1) - 1

    def _table_passes(self) -> list[Pass]:
        """List the passes that read the table's rows of all mutated positions."""
        positions = sorted({each.position for index in self.by_table for each in self.variants[index].substitutions})
        if self.strategy == "masked-marginals":
            return [Pass(self.tokens_T, self._window(place), (place + 1,), (place + 1,)) for place in positions]
        read: dict[tuple[int, int], list[int]] = {}
        for place in positions:
            read.setdefault(self._window(place), []).append(place + 1)
        return [Pass(self.tokens_T, window, (), tuple(tokens)) for window, tokens in read.items()]

    def _own_passes(self, variant: Variant) -> list[Pass]:
        """List the passes of one variant: one per window of its positions."""
        tokens_T, masked = self.tokens_T, tuple(each.position + 1 for each in variant.substitutions)
        if self.strategy == "mutant-marginals":
            tokens_T, masked = tokenize_protein(apply_substitutions(self.sequence, variant.substitutions)), ()
        read: dict[tuple[int, int], list[Substitution]] = {}
        for each in variant.substitutions:
            read.setdefault(self._window(each.position), []).append(each)
        return [
            Pass(
                tokens_T,
                window,
                tuple(token for token in masked if window[0] <= token < window[1]),
                tuple(each.position + 1 for each in found),
                tuple((TOKENS.index(each.mutant), TOKENS.index(each.wild)) for each in found),
            )
            for window, found in read.items()
        ]

    def _likelihood_sequences(self) -> Iterator[str]:
        """Iterate over the sequences whose pseudo-log-likelihood is needed: the wild type and then the variants."""
        if self.by_likelihood:
            yield self.sequence
        for index in self.by_likelihood:
            variant = self.variants[index]
            yield variant.sequence or apply_substitutions(self.sequence, variant.substitutions)

    def _score_by_table(self, variant: Variant, log_prob_TV: np.ndarray) -> ScoredVariant:
        rows = [each.position + 1 for each in variant.substitutions]
        mutant = log_prob_TV[rows, [TOKENS.index(each.mutant) for each in variant.substitutions]]
        wild = log_prob_TV[rows, [TOKENS.index(each.wild) for each in variant.substitutions]]
        return self._describe(variant, mutant, wild)

    def _score_by_own_pass(self, variant: Variant, read: ReadValues) -> ScoredVariant:
        # the substitutions are in the order of their positions, and so are the windows
        values_M2 = np.concatenate([read(each.num_values) for each in self._own_passes(variant)]).reshape(-1, 2)
        return self._describe(variant, values_M2[:, 0], values_M2[:, 1])

    def _describe(self, variant: Variant, mutant_M: np.ndarray, wild_M: np.ndarray) -> ScoredVariant:
        score = float((mutant_M.astype(np.float64) - wild_M).sum())
        windows = tuple(dict.fromkeys(self._shown_window(each.position) for each in variant.substitutions))
        return ScoredVariant(
            score, tuple(np.exp(wild_M.astype(float)).tolist()), tuple(np.exp(mutant_M.astype(float)).tolist()), windows
        )

    def _read_likelihood_ratios(self, read: ReadValues) -> list[float]:
        totals = [
            float(read(count_values(likelihood_passes(sequence, self.max_tokens))).sum(dtype=np.float64))
            for sequence in self._likelihood_sequences()
        ]
        return [total - totals[0] for total in totals[1:]]

    def _describe_likelihood(self, variant: Variant, score: float) -> ScoredVariant:
        note = INDEL_NOTE if variant.sequence is not None and self.strategy != "pseudo-ppl" else ""
        return ScoredVariant(score, (), (), ((1, len(variant.sequence or self.sequence)),), note)

    def _fill_log_odds(self, scored: list[ScoredVariant], log_prob_TV: np.ndarray) -> np.ndarray:
        """Fill the (T, 20) table of single substitutions."""
        wild_T = self.tokens_T[1:-1]
        is_standard_T = (wild_T >= STANDARD.start) & (wild_T < STANDARD.stop)
        log_odds_TA = np.full((len(wild_T), NUM_STANDARD), np.nan, dtype=np.float32)
        if self.is_table:
            inner_TV = log_prob_TV[1:-1]
            wild_T1 = np.take_along_axis(inner_TV, wild_T[:, None].astype(np.int64), 1)
            log_odds_TA[is_standard_T] = (inner_TV[:, STANDARD] - wild_T1)[is_standard_T]
            return log_odds_TA
        for variant, found in zip(self.variants, scored, strict=True):
            if len(variant.substitutions) == 1 and variant.sequence is None:
                position, wild, mutant = variant.substitutions[0]
                log_odds_TA[position, STANDARD_RESIDUES.index(mutant)] = found.score
                log_odds_TA[position, STANDARD_RESIDUES.index(wild)] = 0.0
        return log_odds_TA


def apply_substitutions(sequence: str, substitutions: Sequence[Substitution]) -> str:
    """Return the mutated sequence."""
    letters = list(sequence)
    for position, _, mutant in substitutions:
        letters[position] = mutant
    return "".join(letters)


def likelihood_passes(sequence: str, max_tokens: int, num_passes: int | None = None) -> list[Pass]:
    """List the passes of a pseudo-log-likelihood: each standard residue is read while it is hidden.

    Args:
        sequence: the protein.
        max_tokens: tokens per model input, with BOS and EOS.
        num_passes: hide the residues in this many passes, every num_passes-th residue at once, an estimate. Default:
            each residue alone, in the window around it.

    Returns:
        The passes; those of an estimate that have no residue to read are left out.
    """
    tokens_T = tokenize_protein(sequence)
    standard = [place for place, residue in enumerate(sequence, 1) if residue in STANDARD_RESIDUES]
    if num_passes is None:
        groups = [([place], find_window(place, len(tokens_T), max_tokens)) for place in standard]
    else:
        windows = _cover(len(tokens_T), max_tokens)
        owners = [min(windows, key=lambda window: abs(sum(window) - 1 - 2 * place)) for place in standard]
        own = {
            window: [place for place, owner in zip(standard, owners, strict=True) if owner == window]
            for window in windows
        }
        groups = [
            (places[first::num_passes], window)
            for window, places in own.items()
            for first in range(num_passes)
            if places[first:]
        ]
    return [
        Pass(tokens_T, window, tuple(places), tuple(places), tuple((int(tokens_T[place]),) for place in places))
        for places, window in groups
    ]


def _cover(num_tokens: int, max_tokens: int) -> list[tuple[int, int]]:
    """Cover a protein with windows that overlap by at least half."""
    if num_tokens <= max_tokens:
        return [(0, num_tokens)]
    excess = num_tokens - max_tokens
    starts = np.linspace(0, excess, 1 + -(-excess // max(max_tokens // 2, 1))).round().astype(int).tolist()
    return [(start, start + max_tokens) for start in starts]


def count_values(passes: Sequence[Pass]) -> int:
    """Count the values of passes."""
    return sum(each.num_values for each in passes)
