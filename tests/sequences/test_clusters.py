"""Draws and orders: uniform, reachable to the last window, and the same from whoever asks."""

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
def test_an_order_visits_everything_once(seed, epoch, n):
    order = permutation(seed, epoch, np.arange(n), n)
    assert sorted(order.tolist()) == list(range(n))
    assert [permutation(seed, epoch, position, n) for position in range(n)] == order.tolist()


def test_a_large_order_is_a_bijection_too():
    n = 1_000_003
    assert np.array_equal(np.sort(permutation(3, 5, np.arange(n), n)), np.arange(n))
    shape = permutation(3, 5, np.arange(6).reshape(2, 3), n)
    assert shape.shape == (2, 3)
    assert shape.ravel().tolist() == permutation(3, 5, np.arange(6), n).tolist()


@pytest.mark.parametrize("n", [2, 3, 4, 5, 9, 16, 17])
def test_small_orders_put_each_at_each_place_alike(n):
    orders = np.stack([permutation(0, epoch, np.arange(n), n) for epoch in range(3000)])
    for place in range(n):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=n)).pvalue > 1e-4


def test_neighbours_and_epochs_are_unrelated():
    n = 50_000
    first, second = (permutation(1, epoch, np.arange(n), n) for epoch in (0, 1))
    for pair in ((first[:-1], first[1:]), (first, second), (first, np.arange(n))):
        assert abs(stats.pearsonr(*pair).statistic) < 4 / np.sqrt(n)


@pytest.mark.parametrize("position", [-1, 10])
def test_a_position_outside_is_refused(position):
    with pytest.raises(IndexError):
        permutation(0, 0, position, 10)
    with pytest.raises(IndexError):
        permutation(0, 0, np.array([3, position]), 10)


def test_members_come_up_alike():
    """10,000 epochs: each of k members within the 99.9% binomial interval of 1/k (Bonferroni over the members)."""
    epochs = 10_000
    for cluster, size in enumerate(SIZES):
        rows = [draw_sample(0, epoch, cluster, INDEX, NUM_RESIDUES).row for epoch in range(epochs)]
        counts = np.bincount(np.array(rows) - INDEX.members(cluster)[0], minlength=size)
        assert counts.size == size, "no draw outside the cluster"
        low, high = stats.binom.interval(1 - 0.001 / SIZES.sum(), epochs, 1 / size)
        assert counts.min() >= low
        assert counts.max() <= high


def test_every_window_can_be_drawn_and_alike():
    num_residues = np.full(200, 30)
    draws = [draw_sample(0, epoch, 0, INDEX, num_residues, max_residues=20) for epoch in range(11_000)]
    starts = np.bincount([drawn.start for drawn in draws])
    assert starts.size == 11, "the last of T - max + 1 windows is one of them"
    assert stats.chisquare(starts).pvalue > 1e-3
    assert {drawn.stop - drawn.start for drawn in draws} == {20}


@pytest.mark.parametrize("residues", [1, 1021, 1022])
def test_what_fits_is_not_cropped(residues):
    drawn = draw_sample(0, 0, 2, INDEX, np.full(200, residues))
    assert (drawn.start, drawn.stop) == (0, residues)


def test_member_window_and_mask_do_not_follow_one_another():
    draws = [draw_sample(0, epoch, 4, INDEX, np.full(200, 2000)) for epoch in range(5000)]
    columns = np.array([(drawn.row, drawn.start, drawn.mask_key / 2**64) for drawn in draws])
    correlation = np.corrcoef(columns.T) - np.eye(3)
    assert np.abs(correlation).max() < 4 / np.sqrt(5000)
    assert len({drawn.mask_key for drawn in draws}) == 5000


def _samples(epochs: list[int]) -> list[tuple]:
    n = INDEX.num_clusters
    return [
        tuple(draw_sample(7, epoch, permutation(7, epoch, position, n), INDEX, NUM_RESIDUES, 50))
        for epoch in epochs
        for position in range(n)
    ]


def test_the_same_samples_from_any_process_and_any_start():
    whole = _samples([0, 1, 2, 3])
    assert _samples([2, 3]) == whole[2 * INDEX.num_clusters :]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(_samples, [[0], [1], [2], [3]]))
    assert [sample for part in parts for sample in part] == whole


def test_numpy_integers_draw_what_ints_do():
    assert draw_sample(*np.array([3, 1, 2]), INDEX, NUM_RESIDUES) == draw_sample(3, 1, 2, INDEX, NUM_RESIDUES)


def test_a_data_worker_maps_the_clusters_and_is_not_sent_them(tmp_path):
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


def test_an_unfinished_folder_is_refused(tmp_path):
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
