"""Captions are true for words and for numbers, and name what they compare."""

import re

import numpy as np
import pytest

from esm2kit.embedding.draw_map import describe_map
from esm2kit.embedding.maps import Projection
from esm2kit.notebook import captions, diagrams
from esm2kit.notebook.display import neighbour_table
from esm2kit.sequences.fasta import Record

MODEL, COMPOSITION, CHANCE = (0.64, 0.60, 0.68), (0.50, 0.45, 0.55), (0.5, np.nan, np.nan)
SHARES = {"trained here": MODEL, "composition": COMPOSITION, "chance": CHANCE}


def test_numbers_agree_on_the_side_of_the_median_and_words_by_equality() -> None:
    numbers = captions.agreement(SHARES, "length in residues", True, 100)
    assert numbers.startswith(
        "*Proteins whose nearest neighbour is on the same side of the median length in residues:*"
    )
    assert "trained here 64%, composition 50%, chance 50%, over 100 proteins" in numbers
    assert "the vectors know more than the amino-acid composition" in numbers
    words = captions.agreement(SHARES, "domain of life", False, 100)
    assert words.startswith("*Proteins whose nearest neighbour has the same domain of life:*")
    for numeric, text in ((True, "is on the same side of the median length"), (False, "has the same length")):
        ax = diagrams.agreement(SHARES, "length", numeric)
        assert ax.get_xlabel() == f"nearest neighbour {text} (bar: 95% interval)"


@pytest.mark.parametrize(
    ("model", "text"),
    [((0.52, 0.47, 0.57), "know not clearly more"), ((0.3, 0.2, 0.4), "know less"), (MODEL, "know more")],
)
def test_the_comparison_with_composition_follows_the_intervals(model: captions.Share, text: str) -> None:
    assert text in captions.agreement(SHARES | {"trained here": model}, "set", False, 100)


def test_two_models_are_compared_where_both_are_there() -> None:
    both = {"official 8M": (0.75, 0.7, 0.8)} | SHARES
    text = captions.agreement(both, "set", False, 100)
    assert text.endswith(
        " The official 8M was trained on the 65 million clusters of UniRef50, the model trained here on the dataset of "
        "notebook 01: a difference of +11 percentage points."
    )
    assert "65 million" not in captions.agreement(SHARES, "set", False, 100)


def test_a_neighbour_of_a_number_and_of_a_missing_number() -> None:
    record, cosine_K = Record("P1", "P1", "MKT"), np.array([0.9, 0.8])
    text = captions.neighbours(record, "length in residues", np.float64(248.0), cosine_K, 128)
    assert text.startswith("*The 2 nearest neighbours of P1 (the star; length in residues: 248).*")
    assert "cosine similarities of 0.90 to 0.80" in text
    assert "(the star; Tm: not given)" in captions.neighbours(record, "Tm", np.nan, cosine_K, 128)


def test_a_map_and_residue_vectors() -> None:
    text = describe_map(Projection(np.zeros((1234, 2)), ("t-SNE 1", "t-SNE 2"), 0.47), "tsne", "organism")
    assert text.startswith("*1,234 proteins by t-SNE, coloured by organism.*")
    assert "47% are also among its ten nearest" in text
    hidden_TD = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [2.0, 3.0]])  # the type explains the second column only
    text = captions.residue_vectors(Record("P1", "P1", "AAGG"), hidden_TD)
    assert "Context adds 50% of the variance" in text
    assert "type of the residue explains the other 50%; random types would explain 33%" in text


def test_the_loss_and_the_perplexity() -> None:
    assert "first below the unigram guess at update 200." in captions.pretraining_loss([100, 200], [2.9, 2.8], 2.85)
    assert "not yet below the unigram guess." in captions.pretraining_loss([100, 200], [2.9, 2.8], 2.7)
    assert "this model 16.76 at its best checkpoint" in captions.perplexity(16.76, 17.52)


def test_the_guesses_of_a_protein_with_an_unknown_residue() -> None:
    odds_TL = np.zeros((3, 20))
    odds_TL[:, 0] = 2.0
    odds_TL[2, 1] = 1.0  # A is more likely at its place
    text = captions.guesses("P1", odds_TL, "LXA", "trained here")
    assert "at 2 of 2 positions" in text, "X has no probability of its own"
    assert "rich in L" in text


def test_the_table_of_neighbours_has_names_and_no_empty_or_double_column() -> None:
    records = [Record("P1", "P1 Kinase OS=Homo", "MKT"), Record("P2", "P2 Lyase <x> OS=Mus", "MKTA")]
    values_P = np.array(["Homo", "Mus"])
    html = neighbour_table(records, [1], np.array([0.75]), "organism", values_P).data
    assert re.findall(r"<th>([^<]*)</th>", html) == ["", "protein", "name", "organism", "length in residues", "cosine"]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", html)
    assert cells == ["1", "P2", "Lyase &lt;x&gt;", "Mus", "4", "0.750"]
    plain = [Record("P1", "P1", "MKT"), Record("P2", "P2", "MKTA")]
    html = neighbour_table(plain, [1], np.array([0.75]), "length in residues", np.array([3.0, 4.0])).data
    assert re.findall(r"<th>([^<]*)</th>", html) == ["", "protein", "length in residues", "cosine"]
