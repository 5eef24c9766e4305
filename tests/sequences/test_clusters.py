"""Cluster sampling and epoch orders: uniform, with every window possible, and the same in every process."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.errors import refused

from esm2kit.core.checksums import write_sealed_json
from esm2kit.core.rng import permutation
from esm2kit.sequences.clusters import MEMBERS, OFFSETS, REPRESENTATIVES, ClusterIndex, draw_sample
from esm2kit.sequences.dataset import MANIFEST

SIZES = np.array([1, 2, 3, 7, 26])
INDEX = ClusterIndex(
    np.concatenate([[0], np.cumsum(SIZES)]), 100 + np.arange(SIZES.sum()), 100 + np.cumsum(SIZES) - SIZES
)
NUM_RESIDUES = np.full(100 + SIZES.sum(), 300)


def test_index():
    assert INDEX.num_clusters == 5
    assert INDEX.members(3).tolist() == list(range(106, 113))
    assert INDEX.num_members().tolist() == SIZES.tolist()


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6), n=st.integers(1, 300))
def test_an_order_is_a_permutation(seed, epoch, n):
    order = permutation(seed, epoch, np.arange(n), n)
    assert sorted(order.tolist()) == list(range(n))
    assert [permutation(seed, epoch, position, n) for position in range(n)] == order.tolist()


def test_a_large_order_is_a_permutation():
    n = 1_000_003
    assert np.array_equal(np.sort(permutation(3, 5, np.arange(n), n)), np.arange(n))
    shape = permutation(3, 5, np.arange(6).reshape(2, 3), n)
    assert shape.shape == (2, 3)
    assert shape.ravel().tolist() == permutation(3, 5, np.arange(6), n).tolist()


@pytest.mark.parametrize("n", [2, 3, 4, 5, 9, 16, 17])
def test_small_orders_are_uniform(n):
    orders = np.stack([permutation(0, epoch, np.arange(n), n) for epoch in range(3000)])
    for position in range(n):
        assert stats.chisquare(np.bincount(orders[:, position], minlength=n)).pvalue > 1e-4


def test_neighbours_and_epochs_are_uncorrelated():
    n = 50_000
    first, second = (permutation(1, epoch, np.arange(n), n) for epoch in (0, 1))
    for pair in ((first[:-1], first[1:]), (first, second), (first, np.arange(n))):
        assert abs(stats.pearsonr(*pair).statistic) < 4 / np.sqrt(n)


@pytest.mark.parametrize("position", [-1, 10])
def test_a_position_out_of_range_is_an_error(position):
    with pytest.raises(IndexError):
        permutation(0, 0, position, 10)
    with pytest.raises(IndexError):
        permutation(0, 0, np.array([3, position]), 10)


def test_members_are_sampled_uniformly():
    """10,000 epochs: each of k members within the 99.9% binomial interval of 1/k (Bonferroni over the members)."""
    epochs = 10_000
    for cluster, size in enumerate(SIZES):
        rows = [draw_sample(0, epoch, cluster, INDEX, NUM_RESIDUES).row for epoch in range(epochs)]
        counts = np.bincount(np.array(rows) - INDEX.members(cluster)[0], minlength=size)
        assert counts.size == size, "a sample from outside the cluster"
        low, high = stats.binom.interval(1 - 0.001 / SIZES.sum(), epochs, 1 / size)
        assert counts.min() >= low
        assert counts.max() <= high


def test_windows_are_sampled_uniformly():
    num_residues = np.full(200, 30)
    samples = [draw_sample(0, epoch, 0, INDEX, num_residues, max_residues=20) for epoch in range(11_000)]
    starts = np.bincount([sample.start for sample in samples])
    assert starts.size == 11, "T - max_residues + 1 windows, including the last"
    assert stats.chisquare(starts).pvalue > 1e-3
    assert {sample.stop - sample.start for sample in samples} == {20}


@pytest.mark.parametrize("residues", [1, 1021, 1022])
def test_a_sequence_that_fits_is_not_cropped(residues):
    sample = draw_sample(0, 0, 2, INDEX, np.full(200, residues))
    assert (sample.start, sample.stop) == (0, residues)


def test_member_window_and_mask_are_independent():
    samples = [draw_sample(0, epoch, 4, INDEX, np.full(200, 2000)) for epoch in range(5000)]
    columns = np.array([(sample.row, sample.start, sample.mask_key / 2**64) for sample in samples])
    correlation = np.corrcoef(columns.T) - np.eye(3)
    assert np.abs(correlation).max() < 4 / np.sqrt(5000)
    assert len({sample.mask_key for sample in samples}) == 5000


def _sample_epochs(epochs: list[int]) -> list[tuple]:
    n = INDEX.num_clusters
    return [
        tuple(draw_sample(7, epoch, permutation(7, epoch, position, n), INDEX, NUM_RESIDUES, 50))
        for epoch in epochs
        for position in range(n)
    ]


def test_samples_are_the_same_in_any_process_and_from_any_start():
    expected = _sample_epochs([0, 1, 2, 3])
    assert _sample_epochs([2, 3]) == expected[2 * INDEX.num_clusters :]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(_sample_epochs, [[0], [1], [2], [3]]))
    assert [sample for part in parts for sample in part] == expected


def test_numpy_integers_give_the_same_sample_as_ints():
    assert draw_sample(*np.array([3, 1, 2]), INDEX, NUM_RESIDUES) == draw_sample(3, 1, 2, INDEX, NUM_RESIDUES)


def test_pickling_sends_the_folder_not_the_arrays(tmp_path):
    for name, array in (
        (OFFSETS, np.arange(100_001)),
        (MEMBERS, np.arange(100_000)),
        (REPRESENTATIVES, np.arange(100_000)),
    ):
        np.save(tmp_path / name, array)
    write_sealed_json(tmp_path / MANIFEST, {"stage": "preprocess", "files": {}})
    sent = pickle.dumps(ClusterIndex.open(tmp_path))
    assert len(sent) < 1000
    assert pickle.loads(sent).members(99_999).tolist() == [99_999]
    assert pickle.loads(pickle.dumps(INDEX)).members(0).tolist() == INDEX.members(0).tolist()


def test_an_unfinished_or_damaged_dataset_is_an_error(tmp_path):
    with refused("dataset.unfinished"):
        ClusterIndex.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with refused("file.damaged"):
        ClusterIndex.open(tmp_path)
    write_sealed_json(tmp_path / "manifest.json", {"stage": "preprocess", "files": {}})
    with refused("dataset.damaged"):
        ClusterIndex.open(tmp_path)
    for name, values in (("offsets", [0, 1]), ("members", [0, 1]), ("representatives", [0])):
        np.save(tmp_path / f"cluster_{name}.npy", np.array(values))
    with refused("dataset.damaged"):
        ClusterIndex.open(tmp_path)
