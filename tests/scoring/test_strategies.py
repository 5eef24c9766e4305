"""Every strategy equals fair-esm run by hand, one pass after the other, with the same random weights."""

import esm
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fair_esm import build_pair

from esm2kit.models.config import ESM2Config
from esm2kit.models.encoder import Encoder
from esm2kit.scoring.masked_passes import compute_batch, compute_batches, find_window, split_passes
from esm2kit.scoring.mutations import Substitution
from esm2kit.scoring.output import compute_entropy
from esm2kit.scoring.strategies import ProteinScorer, ProteinScores, likelihood_passes
from esm2kit.scoring.variants import Variant, list_substitutions
from esm2kit.sequences.alphabet import STANDARD_RESIDUES

TOLERANCE = 1e-5  # of log-odds
SHAPES = [ESM2Config(2, 32, 4), ESM2Config(2, 40, 2, token_dropout=False)]
ALPHABET = esm.Alphabet.from_architecture("ESM-1b")
STRATEGIES = ("masked-marginals", "wt-marginals", "mutant-marginals", "pseudo-ppl")


def random_protein(num_residues: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).choice(list(STANDARD_RESIDUES), num_residues))


def make_variant(sequence: str, *places: tuple[int, str]) -> Variant:
    found = tuple(Substitution(place % len(sequence), sequence[place], mutant) for place, mutant in places)
    return Variant(0, found, None, ":".join(f"{each.wild}{each.position + 1}{each.mutant}" for each in found))


def pick_variants(sequence: str) -> list[Variant]:
    """Variants at the ends and inside, of one, two and three substitutions."""
    other = {residue: STANDARD_RESIDUES[index - 1] for index, residue in enumerate(STANDARD_RESIDUES)}
    middle, last = len(sequence) // 2, len(sequence) - 1
    places = [(0,), (1,), (middle,), (last,), (0, last), (middle, middle + 1), (0, middle, last)]
    return [make_variant(sequence, *((place, other[sequence[place]]) for place in group)) for group in places]


class ByHand:
    """The strategies as fair-esm's users write them: a model, the tokens of one sequence, and a loop."""

    def __init__(self, model: esm.ESM2, max_tokens: int = 1024) -> None:
        self.model, self.max_tokens = model, max_tokens
        self.convert = ALPHABET.get_batch_converter()

    def predict(self, sequence: str, read: int, masked: tuple[int, ...]) -> torch.Tensor:
        """Log-probabilities at a residue, in ProteinGym's window around it."""
        _, _, tokens_1T = self.convert([("protein", sequence)])
        for place in masked:
            tokens_1T[0, 1 + place] = ALPHABET.mask_idx
        start, stop = 0, tokens_1T.shape[1]
        if stop > self.max_tokens:
            half, token = self.max_tokens // 2, 1 + read
            if token < half:
                start, stop = 0, self.max_tokens
            elif token >= stop - half:
                start = stop - self.max_tokens
            else:
                start, stop = token - half, token + half
        with torch.no_grad():
            logits = self.model(tokens_1T[:, start:stop])["logits"]
        return logits.log_softmax(-1)[0, 1 + read - start].double()

    def likelihood(self, sequence: str) -> float:
        return sum(
            self.predict(sequence, place, (place,))[ALPHABET.get_idx(residue)].item()
            for place, residue in enumerate(sequence)
        )

    def score(self, sequence: str, variant: Variant, strategy: str, together: bool = False) -> float:
        letters = list(sequence)
        for each in variant.substitutions:
            letters[each.position] = each.mutant
        mutant = variant.sequence or "".join(letters)
        if strategy == "pseudo-ppl" or variant.sequence is not None:
            return self.likelihood(mutant) - self.likelihood(sequence)
        total = 0.0
        for each in variant.substitutions:
            masked = {"masked-marginals": (each.position,)}.get(strategy, ())
            if together:
                masked = tuple(other.position for other in variant.substitutions)
            context = mutant if strategy == "mutant-marginals" else sequence
            found_V = self.predict(context, each.position, masked)
            total += (found_V[ALPHABET.get_idx(each.mutant)] - found_V[ALPHABET.get_idx(each.wild)]).item()
        return total


def run(encoder: Encoder, scorer: ProteinScorer, batch_tokens: int = 1024) -> ProteinScores:
    values = list(compute_batches(encoder, split_passes(scorer.steps(), batch_tokens), workers=2))
    rest = np.concatenate(values)

    def read(count: int) -> np.ndarray:
        nonlocal rest
        found, rest = rest[:count], rest[count:]
        assert len(found) == count
        return found

    found = scorer.collect(read)
    assert not len(rest), "every value is read"
    return found


@pytest.mark.parametrize("config", SHAPES, ids=["token dropout", "without token dropout"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_residues", [3, 33, 90])
def test_equals_fair_esm_by_hand(strategy: str, config: ESM2Config, num_residues: int) -> None:
    model, reference = build_pair(config, std=0.2)
    sequence = random_protein(num_residues)
    variants = pick_variants(sequence)
    by_hand = ByHand(reference)
    expected = [by_hand.score(sequence, variant, strategy) for variant in variants]
    found = run(Encoder(model), ProteinScorer(sequence, variants, strategy, 1024))
    scores = [each.score for each in found.variants]
    assert np.ptp(expected) > 0.1, "the weights are large enough for scores that differ"
    # a pseudo-log-likelihood is a sum of up to 90 terms, each exact to 1e-6
    tolerance = 3 * TOLERANCE if strategy == "pseudo-ppl" else TOLERANCE
    np.testing.assert_allclose(scores, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_long_proteins_are_read_in_the_windows_of_proteingym(strategy: str) -> None:
    model, reference = build_pair(SHAPES[0], std=0.2)
    sequence, max_tokens = random_protein(50), 20
    variants = [*pick_variants(sequence), make_variant(sequence, (9, "A"), (40, "A"))]
    by_hand = ByHand(reference, max_tokens)
    expected = [by_hand.score(sequence, variant, strategy) for variant in variants]
    found = run(Encoder(model), ProteinScorer(sequence, variants, strategy, max_tokens))
    np.testing.assert_allclose([each.score for each in found.variants], expected, atol=3e-5, rtol=1e-5)
    if strategy != "pseudo-ppl":
        # 20 tokens: at the ends BOS or EOS and 19 residues, inside 20 residues
        assert [each.windows for each in found.variants][:5] == [
            ((1, 19),), ((1, 19),), ((16, 35),), ((32, 50),), ((1, 19), (32, 50)),
        ]  # fmt: skip
    whole = run(Encoder(model), ProteinScorer(sequence, variants, strategy, 1024))
    assert abs(whole.variants[2].score - expected[2]) > 1e-3, "the window makes a difference"


def test_all_masks_at_once_differ_from_one_at_a_time_and_equal_fair_esm() -> None:
    model, reference = build_pair(SHAPES[0], std=0.2)
    sequence, by_hand = random_protein(40), ByHand(reference)
    variants = pick_variants(sequence)
    found = run(Encoder(model), ProteinScorer(sequence, variants, "masked-marginals", 1024, mask_together=True))
    expected = [by_hand.score(sequence, variant, "masked-marginals", together=True) for variant in variants]
    np.testing.assert_allclose([each.score for each in found.variants], expected, atol=TOLERANCE)
    additive = run(Encoder(model), ProteinScorer(sequence, variants, "masked-marginals", 1024))
    singles = {each.text: score.score for each, score in zip(variants, additive.variants, strict=True)}
    first, last, both = singles[variants[0].text], singles[variants[3].text], additive.variants[4].score
    assert both == pytest.approx(first + last, abs=1e-12), "one mask at a time is additive"
    assert found.variants[4].score != pytest.approx(both, abs=1e-4)
    assert [each.score for each in found.variants[:4]] == [each.score for each in additive.variants[:4]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_insertions_and_deletions_are_likelihood_ratios(strategy: str) -> None:
    model, reference = build_pair(SHAPES[0], std=0.2)
    sequence, by_hand = random_protein(30), ByHand(reference)
    variants = [
        Variant(0, (), sequence[:10] + sequence[12:], "deletion"),
        Variant(0, (), sequence[:10] + "WW" + sequence[10:], "insertion"),
        make_variant(sequence, (3, "W" if sequence[3] != "W" else "A")),
    ]
    found = run(Encoder(model), ProteinScorer(sequence, variants, strategy, 1024)).variants
    expected = [by_hand.score(sequence, variant, strategy) for variant in variants]
    np.testing.assert_allclose([each.score for each in found], expected, atol=3e-5)
    assert [bool(each.note) for each in found] == [strategy != "pseudo-ppl"] * 2 + [False]


@pytest.mark.parametrize("strategy", ["masked-marginals", "wt-marginals", "mutant-marginals"])
def test_the_table_has_the_score_of_every_single_substitution(strategy: str) -> None:
    model, reference = build_pair(SHAPES[0], std=0.2)
    sequence, by_hand = random_protein(12), ByHand(reference)
    variants = list_substitutions(0, sequence)
    found = run(Encoder(model), ProteinScorer(sequence, variants, strategy, 1024))
    assert len(variants) == 12 * 19
    for variant, scored in zip(variants, found.variants, strict=True):
        position, wild, mutant = variant.substitutions[0]
        assert found.log_odds_TA[position, STANDARD_RESIDUES.index(mutant)] == pytest.approx(scored.score, abs=1e-6)
        assert found.log_odds_TA[position, STANDARD_RESIDUES.index(wild)] == 0
        ratio = np.log(scored.mutant_probabilities[0] / scored.wild_probabilities[0])
        assert ratio == pytest.approx(scored.score, abs=1e-6)
    for variant in variants[::41]:
        position, _, mutant = variant.substitutions[0]
        expected = by_hand.score(sequence, variant, strategy)
        assert found.log_odds_TA[position, STANDARD_RESIDUES.index(mutant)] == pytest.approx(expected, abs=TOLERANCE)
    assert (found.log_prob_TA is None) == (strategy == "mutant-marginals")


def test_residues_that_are_not_standard_are_context_and_not_scored() -> None:
    model, reference = build_pair(SHAPES[0], std=0.2)
    sequence = random_protein(9) + "X" + random_protein(5, seed=1)
    variants = list_substitutions(0, sequence)
    assert {variant.substitutions[0].position for variant in variants} == set(range(15)) - {9}
    found = run(Encoder(model), ProteinScorer(sequence, variants, "masked-marginals", 1024))
    assert np.isnan(found.log_odds_TA).all(1).tolist() == [place == 9 for place in range(15)]
    expected = ByHand(reference).score(sequence, variants[-1], "masked-marginals")
    assert found.variants[-1].score == pytest.approx(expected, abs=TOLERANCE)
    assert sum(len(each.read) for each in likelihood_passes(sequence, 1024)) == 14


def test_a_protein_scores_the_same_alone_and_among_others() -> None:
    model, _ = build_pair(SHAPES[0], std=0.2)
    encoder = Encoder(model)
    scorers = [
        ProteinScorer(sequence, pick_variants(sequence), strategy, 1024)
        for sequence in (random_protein(20), random_protein(77, seed=1), random_protein(41, seed=2))
        for strategy in ("masked-marginals", "wt-marginals")
    ]
    steps = [step for scorer in scorers for step in scorer.steps()]
    values = np.concatenate(list(compute_batches(encoder, split_passes(steps, 200), workers=2)))
    sizes = [each.num_values for step in steps for each in step]
    parts = iter(np.split(values, np.cumsum(sizes)[:-1]))
    for scorer in scorers:
        among_others = [each.score for each in scorer.collect(lambda _: next(parts)).variants]
        alone, other_batches = (
            [each.score for each in run(encoder, scorer, budget).variants] for budget in (200, 1024)
        )
        if scorer.strategy == "masked-marginals":  # many passes, which have batches of their own
            assert among_others == alone
        np.testing.assert_allclose(among_others, alone, atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(among_others, other_batches, atol=TOLERANCE, rtol=0)
    assert next(parts, None) is None


@settings(max_examples=25, deadline=None)
@given(
    residues=st.text(st.sampled_from(STANDARD_RESIDUES), min_size=2, max_size=40),
    max_tokens=st.integers(4, 60),
    strategy=st.sampled_from(("masked-marginals", "wt-marginals")),
)
def test_probabilities_of_all_tokens_sum_to_one(residues: str, max_tokens: int, strategy: str) -> None:
    encoder = Encoder(build_pair(SHAPES[0], std=0.2)[0])
    scorer = ProteinScorer(residues, list_substitutions(0, residues), strategy, max_tokens)
    batches = [[each for step in scorer.steps() for each in step]]
    values_NV = compute_batch(encoder, batches[0]).reshape(-1, 33)
    assert len(values_NV) == len(residues), "every residue is read once"
    np.testing.assert_allclose(np.exp(values_NV.astype(float)).sum(1), 1, atol=1e-5)
    found = run(encoder, scorer)
    assert (np.exp(found.log_prob_TA.astype(float)).sum(1) < 1 + 1e-5).all()
    entropy_T = compute_entropy(found.log_prob_TA)
    assert (entropy_T > 0).all()
    assert (entropy_T <= np.log(20) + 1e-6).all()
    wild = [STANDARD_RESIDUES.index(residue) for residue in residues]
    assert (found.log_odds_TA[range(len(residues)), wild] == 0).all()


@settings(max_examples=200, deadline=None)
@given(num_tokens=st.integers(3, 3000), max_tokens=st.integers(2, 512).map(lambda half: 2 * half), data=st.data())
def test_a_window_has_the_token_and_the_size_of_the_model(num_tokens: int, max_tokens: int, data) -> None:
    token = data.draw(st.integers(0, num_tokens - 1))
    start, stop = find_window(token, num_tokens, max_tokens)
    assert 0 <= start <= token < stop <= num_tokens
    assert stop - start == min(num_tokens, max_tokens)


def test_entropy_is_that_of_the_twenty_residues() -> None:
    log_prob_TA = np.log(np.full((3, 20), 0.04, np.float32))  # 0.8 in all; the rest is on other tokens
    log_prob_TA[1] = -60
    log_prob_TA[1, 4] = 0
    log_prob_TA[2] = np.nan
    np.testing.assert_allclose(compute_entropy(log_prob_TA), [np.log(20), 0, np.nan], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    residues=st.text(st.sampled_from(STANDARD_RESIDUES + "X"), min_size=1, max_size=80),
    max_tokens=st.integers(3, 50),
    num_passes=st.none() | st.integers(1, 12),
)
def test_a_likelihood_reads_every_standard_residue_once_while_it_is_hidden(
    residues: str, max_tokens: int, num_passes: int | None
) -> None:
    passes = likelihood_passes(residues, max_tokens, num_passes)
    places = sorted(place for each in passes for place in each.read)
    assert places == [place for place, residue in enumerate(residues, 1) if residue != "X"]
    for each in passes:
        assert set(each.read) <= set(each.masked)
        assert each.num_tokens <= max_tokens
        assert all(each.window[0] <= place < each.window[1] for place in each.masked)
        assert num_passes or len(each.read) == 1
    if num_passes and len(residues) + 2 <= max_tokens:
        assert len(passes) <= num_passes
