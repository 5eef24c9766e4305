"""Random keys and masks: the published hash, the shares of the recipe, and no state."""

import numpy as np
import pytest
from scipy import stats

from esm2kit.core.rng import GOLDEN, mix, random_below, random_uniforms, stream_key
from esm2kit.pretraining.masking import mask_tokens
from esm2kit.sequences.alphabet import BOS_IDX, EOS_IDX, FIRST_STANDARD_IDX, MASK_IDX, NUM_STANDARD, PAD_IDX, encode

SEQUENCE = np.concatenate([[BOS_IDX], encode("MKVLAGGSTEXW" * 80), [EOS_IDX, PAD_IDX]]).astype(np.uint8)


def test_mix_is_splitmix64():
    # the first outputs of Vigna's splitmix64.c from state 1234567, as Rosetta Code lists them
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [mix((1234567 + step * GOLDEN) % 2**64) for step in range(1, 6)] == expected
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * np.uint64(GOLDEN)
    assert mix(states).tolist() == expected


def test_a_key_depends_on_each_of_its_parts_and_their_order():
    parts = [
        (seed, epoch, index, stream)
        for seed in range(8)
        for epoch in range(8)
        for index in range(8)
        for stream in range(8)
    ]
    assert len({stream_key(*part) for part in parts}) == len(parts)
    assert stream_key(1, 2, 3, 4) == stream_key(*np.array([1, 2, 3, 4]))
    # half of the bits change when one bit of one part does
    flips = [
        (stream_key(*part) ^ stream_key(*(value ^ (place == which) for place, value in enumerate(part)))).bit_count()
        for part in parts[:500]
        for which in range(4)
    ]
    assert abs(np.mean(flips) - 32) < 4 * 4 / np.sqrt(len(flips)), "32 of 64 bits, standard deviation 4"


def test_uniforms_are_uniform_and_shorter_streams_are_prefixes():
    numbers = random_uniforms(stream_key(0, 0, 0, 0), 100_000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / np.sqrt(numbers.size)
    assert np.array_equal(random_uniforms(7, 10), random_uniforms(7, 1000)[:10])


def test_below_gives_all_integers_equally_often():
    counts = np.bincount([random_below(mix(key * GOLDEN), 7) for key in range(1, 70_001)], minlength=7)
    assert counts.size == 7
    assert stats.chisquare(counts).pvalue > 1e-3


def test_mask_is_a_pure_function_and_does_not_change_its_input():
    before = SEQUENCE.copy()
    first, second = mask_tokens(SEQUENCE, 99), mask_tokens(SEQUENCE, 99)
    assert np.array_equal(SEQUENCE, before)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
    assert not np.array_equal(first[1], mask_tokens(SEQUENCE, 100)[1])


def test_the_shares_are_those_of_the_recipe():
    masked = [mask_tokens(SEQUENCE, stream_key(0, 0, index, 3)) for index in range(300)]
    inputs_BT, selected_BT = (np.stack(part) for part in zip(*masked, strict=True))
    residues = slice(1, -2)
    assert not selected_BT[:, 0].any()
    assert not selected_BT[:, -2:].any()
    assert np.array_equal(inputs_BT[~selected_BT], np.tile(SEQUENCE, (300, 1))[~selected_BT])

    def within(count, total, share):
        return stats.binomtest(int(count), int(total), share).pvalue > 1e-3

    num_selected = selected_BT.sum()
    assert within(num_selected, selected_BT[:, residues].size, 0.15)
    assert within((inputs_BT == MASK_IDX).sum(), num_selected, 0.8)
    # one in 20 random residues is the same as before; the X's and the unchanged selected residues are the rest
    is_standard = SEQUENCE >= FIRST_STANDARD_IDX
    is_standard &= SEQUENCE < FIRST_STANDARD_IDX + NUM_STANDARD
    changed_BT = selected_BT & (inputs_BT != MASK_IDX) & (inputs_BT != SEQUENCE) & is_standard
    assert within(changed_BT.sum(), selected_BT[:, is_standard].sum(), 0.1 * 19 / 20)


def test_random_residues_are_uniform_at_all_positions():
    swapped = [mask_tokens(SEQUENCE, stream_key(1, 0, index, 3), mask_share=0, random_share=1) for index in range(100)]
    inputs_BT, selected_BT = (np.stack(part) for part in zip(*swapped, strict=True))
    counts = np.bincount(inputs_BT[selected_BT] - FIRST_STANDARD_IDX, minlength=NUM_STANDARD)
    assert counts.size == NUM_STANDARD
    assert stats.chisquare(counts).pvalue > 1e-3
    per_position = selected_BT[:, 1:-2].sum(0)
    assert stats.chisquare(per_position).pvalue > 1e-3


@pytest.mark.parametrize(("mask_prob", "expected"), [(0.0, 0), (1.0, SEQUENCE.size - 3)])
def test_mask_shares_of_zero_and_one(mask_prob, expected):
    inputs_T, selected_T = mask_tokens(SEQUENCE, 5, mask_prob=mask_prob, mask_share=1, random_share=0)
    assert selected_T.sum() == expected
    assert (inputs_T == MASK_IDX).sum() == expected
