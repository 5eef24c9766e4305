"""Metrics of assays against other implementations, intervals, verdicts, and averages as ProteinGym's."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import spearmanr
from sklearn.metrics import matthews_corrcoef, ndcg_score, roc_auc_score
from support.errors import refused

from esm2kit.scoring.assay import MODEL, AssayReport, build_assay_scorer, evaluate_assay, sample_variants
from esm2kit.scoring.assay_summary import AssayGroup, find_groups, summarise_assays
from esm2kit.scoring.proteingym import AVERAGES, NUM_ASSAYS, find_assay, read_assays
from esm2kit.tasks.metrics import Interval, sample_counts


def compute_like_proteingym(measured: np.ndarray, score: np.ndarray, is_fit: np.ndarray) -> dict[str, float]:
    """ProteinGym's definitions with pandas, scipy and scikit-learn."""
    frame = pd.DataFrame({"measured": measured, "score": score, "fit": is_fit.astype(int)})
    called = (frame.score >= frame.score.median()).astype(int)
    tops = [frame[column] >= np.percentile(frame[column], 90) for column in ("measured", "score")]
    gains = (frame.measured - frame.measured.min()) / (frame.measured.max() - frame.measured.min())
    return {
        "spearman": spearmanr(frame.measured, frame.score)[0],
        "auc": roc_auc_score(frame.fit, frame.score) if frame.fit.nunique() == 2 else np.nan,
        "mcc": matthews_corrcoef(frame.fit, called),
        "ndcg": ndcg_score([gains], [frame.score], k=len(frame) // 10),
        "top_recall": (tops[0] & tops[1]).sum() / tops[0].sum(),
    }


def make_assay(seed: int, num_variants: int, levels: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make measured values, scores that correlate with them, and classes; with `levels`, many are tied."""
    generator = np.random.default_rng(seed)
    measured = generator.normal(size=num_variants) * 7 - 3
    score = measured / 7 + generator.normal(size=num_variants)
    if levels:
        measured, score = (np.round(values * levels) for values in (measured / 7, score))
    return measured, score, measured > np.quantile(measured, 0.6)


@pytest.mark.parametrize("num_variants", [10, 11, 21, 99, 100, 170, 171, 1000])
@pytest.mark.parametrize("levels", [0, 1, 4])
def test_metrics_are_those_of_proteingym(num_variants: int, levels: int) -> None:
    measured, score, is_fit = make_assay(num_variants + levels, num_variants, levels)
    found = build_assay_scorer(measured, score, is_fit)(np.ones((1, num_variants), dtype=np.int32))
    expected = compute_like_proteingym(measured, score, is_fit)
    assert list(found) == list(expected)
    for metric, value in expected.items():
        assert found[metric][0] == pytest.approx(value, abs=1e-12), metric


def test_ndcg_without_ties_is_the_sum_of_discounted_gains() -> None:
    """A direct transcription of the definition: the 2 highest scores of 20 variants."""
    measured, score, _ = make_assay(3, 20)
    gains = (measured - measured.min()) / np.ptp(measured)
    best, ideal = np.argsort(-score)[:2], np.sort(gains)[::-1][:2]
    discounts = 1 / np.log2([2, 3])
    found = build_assay_scorer(measured, score)(np.ones((1, 20), dtype=np.int32))
    assert found["ndcg"][0] == pytest.approx((gains[best] @ discounts) / (ideal @ discounts), abs=1e-12)
    assert "auc" not in found


@pytest.mark.parametrize("levels", [0, 3])
def test_replicates_are_metrics_of_resampled_variants(levels: int) -> None:
    measured, score, is_fit = make_assay(7, 83, levels)
    counts = sample_counts(83, 12, seed=5)
    found = build_assay_scorer(measured, score, is_fit)(counts)
    for replicate, count in enumerate(counts):
        rows = np.repeat(np.arange(83), count)
        expected = compute_like_proteingym(measured[rows], score[rows], is_fit[rows])
        for metric, value in expected.items():
            assert found[metric][replicate] == pytest.approx(value, abs=1e-12), metric


@pytest.mark.parametrize("levels", [0, 3])
def test_replicates_of_positions_and_letters_have_different_sizes(levels: int) -> None:
    measured, score, is_fit = make_assay(8, 9 * 19, levels)
    position, letter = (grid.ravel() for grid in np.mgrid[:9, :19])
    counts = sample_variants(9 * 19, 12, 5, [position, letter]).reshape(12, 9, 19)
    # a variant occurs as often as its position times its letter: all rows are multiples of one
    assert (np.linalg.matrix_rank(counts) == 1).all()
    assert (counts.sum((1, 2)) == 9 * 19).all()
    # of a grid with holes, replicates have different sizes
    kept = np.random.default_rng(0).random(9 * 19) < 0.6
    measured, score, is_fit, position, letter = (each[kept] for each in (measured, score, is_fit, position, letter))
    counts = sample_variants(kept.sum(), 12, 5, [position, letter])
    assert np.unique(counts.sum(1)).size > 6
    found = build_assay_scorer(measured, score, is_fit)(counts)
    for replicate, count in enumerate(counts):
        rows = np.repeat(np.arange(kept.sum()), count)
        expected = compute_like_proteingym(measured[rows], score[rows], is_fit[rows])
        for metric, value in expected.items():
            assert found[metric][replicate] == pytest.approx(value, abs=1e-12), metric


def test_letters_that_a_model_prefers_by_chance_are_no_signal() -> None:
    """Unrelated scores and values that depend on the letter: the interval of positions and letters contains 0 for 95%
    of such models, and that of single variants for few of them."""
    position, letter = (grid.ravel() for grid in np.mgrid[:12, :19])
    hits = {"crossed": 0, "variants": 0}
    for seed in range(60):
        generator = np.random.default_rng(seed)
        measured = generator.normal(size=19)[letter] + 0.3 * generator.normal(size=12 * 19)
        score = generator.normal(size=19)[letter] + 0.3 * generator.normal(size=12 * 19)
        for name, factors in (("crossed", [position, letter]), ("variants", None)):
            report = evaluate_assay("a", "P", measured, None, {MODEL: score}, 200, factors=factors)
            interval = report.rows[MODEL]["spearman"]
            hits[name] += interval.low <= 0 <= interval.high
    assert hits["crossed"] >= 52
    assert hits["variants"] <= 35


def test_undefined_metrics() -> None:
    measured, score, _ = make_assay(1, 40)
    ones = np.ones((1, 40), dtype=np.int32)
    constant = build_assay_scorer(measured, np.zeros(40), measured > 0)(ones)
    assert np.isnan(constant["spearman"][0])
    assert constant["auc"][0] == 0.5
    assert constant["mcc"][0] == 0.0
    one_class = build_assay_scorer(measured, score, np.ones(40, dtype=bool))(ones)
    assert np.isnan(one_class["auc"][0])
    # the 10% of fewer than 10 variants is none
    few = build_assay_scorer(measured[:9], score[:9])(np.ones((1, 9), dtype=np.int32))
    assert np.isnan(few["ndcg"][0])
    # sizes of values do not matter
    large = build_assay_scorer(measured * 1e200, score, measured > 0)(ones)
    for metric, value in build_assay_scorer(measured, score, measured > 0)(ones).items():
        assert large[metric][0] == pytest.approx(value[0], abs=1e-12)


def test_an_interval_holds_the_known_correlation() -> None:
    """Scores with noise of a known size: the interval of 19 of 20 seeds holds the correlation of the population."""
    expected = 6 / np.pi * np.arcsin(np.sqrt(0.5) / 2)  # Spearman of a normal pair with Pearson sqrt(1/2)
    hits = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        score = generator.normal(size=400)
        measured = score + generator.normal(size=400)
        interval = evaluate_assay("planted", "P", measured, None, {MODEL: score}).rows[MODEL]["spearman"]
        hits += interval.low <= expected <= interval.high
    assert hits >= 17


def test_a_better_baseline_is_named_and_noise_is_not() -> None:
    measured, score, is_fit = make_assay(11, 300)
    generator = np.random.default_rng(0)
    scores = {MODEL: generator.normal(size=300), "blosum62": score, "volume": generator.normal(size=300)}
    report = evaluate_assay("assay", "P", measured, is_fit, scores)
    assert report.better_baselines == ["blosum62"]
    assert report.verdict[0].startswith("The model's scores show no correlation with the measured values: Spearman ")
    assert report.verdict[1].startswith("BLOSUM62 does better than the model here: Spearman 0.6")
    assert report.verdict[2] == (
        "The model does as well as volume change within the intervals of the differences, which contain 0."
    )
    # the counter-example
    report = evaluate_assay("assay", "P", measured, is_fit, {**scores, MODEL: score, "blosum62": scores[MODEL]})
    assert report.better_baselines == []
    assert report.verdict[0].startswith("The model does better than every baseline: Spearman 0.6")
    # and its reverse
    report = evaluate_assay("assay", "P", -measured, None, {MODEL: score})
    assert "fall as the measured values rise" in report.verdict[0]
    found = report.to_json()
    assert found["rows"]["model"]["spearman"]["value"] == pytest.approx(spearmanr(-measured, score)[0])
    assert "published_spearman" not in found


def test_differences_are_paired() -> None:
    """Two baselines that are nearly the model differ from it by little, although each interval is wide."""
    measured, score, _ = make_assay(2, 60)
    nearly = score + 1e-3 * np.arange(60)
    report = evaluate_assay("assay", "P", measured, None, {MODEL: score, "volume": nearly})
    difference, own = report.differences["volume"]["spearman"], report.rows[MODEL]["spearman"]
    assert own.high - own.low > 0.2
    assert difference.high - difference.low < (own.high - own.low) / 4
    assert difference.value == pytest.approx(own.value - report.rows["volume"]["spearman"].value)


def test_missing_values_are_left_out_and_too_few_refused() -> None:
    measured, score, is_fit = make_assay(4, 50)
    holes = measured.copy()
    holes[::5] = np.nan
    kept = np.isfinite(holes)
    report = evaluate_assay("assay", "P", holes, is_fit, {MODEL: score})
    assert report.num_variants == 40
    assert report.rows == evaluate_assay("assay", "P", measured[kept], is_fit[kept], {MODEL: score[kept]}).rows
    with refused("assay.values", found=2):
        evaluate_assay("assay", "P", measured[:2], None, {MODEL: score[:2]})
    with refused("assay.values", found=50):
        evaluate_assay("assay", "P", np.ones(50), None, {MODEL: score})


def make_report(name: str, **rows: float) -> AssayReport:
    return AssayReport(
        name, "P", 10, {row: {"spearman": Interval(value, value, value)} for row, value in rows.items()}, {}
    )


def test_averages_of_proteingym_from_its_assays(root: Path) -> None:
    """The published averages follow from the published assays by the averaging of `summarise_assays`."""
    assays = read_assays()
    assert len(assays) == NUM_ASSAYS == 217
    for model, published in AVERAGES.items():
        reports = [make_report(name, model=assay.spearman[model]) for name, assay in assays.items()]
        summary = summarise_assays(reports, find_groups(list(assays)), resamples=100)
        found = summary.averages[MODEL]["spearman"]
        assert round(found.value, 3) == published
        assert found.low < found.value < found.high
        assert 0.01 < found.high - found.low < 0.08  # ProteinGym gives standard errors of 0.010 to 0.015
    assert summary.num_proteins == len({assay.uniprot_id for assay in assays.values()}) == 186
    # of the site-independent model, the last one: ProteinGym's values by function, taxon and depth of the alignment
    expected = {
        "selection type": {
            "Activity": 0.369, "Binding": 0.344, "Expression": 0.343, "OrganismalFitness": 0.383, "Stability": 0.358,
        },
        "alignment depth": {"High": 0.317, "Low": 0.427, "Medium": 0.376},
        "taxon": {"Eukaryote": 0.389, "Human": 0.38, "Prokaryote": 0.318, "Virus": 0.375},
    }  # fmt: skip
    found_groups = {
        kind: {group: row[MODEL] for group, row in groups.items()} for kind, groups in summary.groups.items()
    }
    assert found_groups.keys() == expected.keys()
    for kind, groups in expected.items():  # the assays are rounded to three decimals
        assert found_groups[kind] == pytest.approx(groups, abs=0.0011)
    golden = yaml.safe_load((root / "data" / "golden" / "published.yaml").read_text(encoding="utf-8"))["proteingym"]
    assert golden["average_spearman"] == AVERAGES
    assert golden["assays"] == NUM_ASSAYS


def test_averages_by_protein_and_assays_where_a_baseline_is_better() -> None:
    # two assays of A count as one: (0.2 + 0.4) / 2 = 0.3, then (0.3 + 0.5) / 2
    reports = [
        make_report("a1", model=0.2, blosum62=0.1),
        make_report("a2", model=0.4, blosum62=0.3),
        make_report("b", model=0.5, blosum62=0.9),
    ]
    groups = {"a1": AssayGroup("A", {}), "a2": AssayGroup("A", {}), "b": AssayGroup("B", {})}
    summary = summarise_assays(reports, groups, resamples=200)
    assert summary.averages[MODEL]["spearman"].value == pytest.approx(0.4)
    assert summary.averages["blosum62"]["spearman"].value == pytest.approx(0.55)
    assert summary.differences["blosum62"]["spearman"].value == pytest.approx(-0.15)
    assert (summary.num_assays, summary.num_proteins, summary.groups) == (3, 2, {})
    assert summary.verdict[0] == "In none of the 3 assays does a baseline do better than the model."
    assert "On average BLOSUM62 is better than the model by 0.150 in Spearman, which is within" in summary.verdict[1]


def test_groups_from_a_table(tmp_path: Path) -> None:
    table = tmp_path / "groups.csv"
    table.write_text("assay,protein,fold,year\none,A,all alpha,2001\ntwo,B,all beta,2002\nthree,C,all beta,2003\n")
    groups = find_groups(["one", "two"], table)
    assert groups == {"one": AssayGroup("A", {"fold": "all alpha"}), "two": AssayGroup("B", {"fold": "all beta"})}
    with refused("groups.assay", found=("four",)):
        find_groups(["one", "four"], table)
    table.write_text("study,protein\none,A\n")
    with refused("groups.no-column"):
        find_groups(["one"], table)
    # ProteinGym's reference file
    table.write_text(
        "DMS_id,DMS_filename,UniProt_ID,taxon,coarse_selection_type,seq_len\nx,x.csv,X_Y,Human,Binding,9\n"
    )
    assert find_groups(["x"], table) == {"x": AssayGroup("X_Y", {"selection type": "Binding", "taxon": "Human"})}
    # without a table: the entry name of the file, or the name
    assert find_groups(["ABC1_YEAST_Smith_2020", "mine"]) == {
        "ABC1_YEAST_Smith_2020": AssayGroup("ABC1_YEAST", {}), "mine": AssayGroup("mine", {}),
    }  # fmt: skip


def test_published_values_of_an_assay() -> None:
    assay = find_assay("B2L11_HUMAN_Dutta_2010_binding-Mcl-1")
    assert assay is not None
    assert assay.spearman == {
        "esm2_t6_8M_UR50D": 0.174, "esm2_t12_35M_UR50D": 0.123, "esm2_t30_150M_UR50D": 0.151,
        "esm2_t33_650M_UR50D": 0.27, "esm2_t36_3B_UR50D": 0.367, "esm2_t48_15B_UR50D": 0.315, "site_independent": 0.688,
    }  # fmt: skip
    assert find_assay("mine") is None


def test_a_perfect_correlation_is_the_same_in_every_resample() -> None:
    """It has no interval, and is not taken for the absence of a correlation."""
    measured, noise, _ = make_assay(3, 60)
    report = evaluate_assay("assay", "P", measured, None, {MODEL: measured, "volume": noise * 0 + np.arange(60) % 3})
    assert report.verdict == ("The model does better than every baseline: Spearman 1.000, the same in every resample.",)
    report = evaluate_assay("assay", "P", measured, None, {MODEL: -measured})
    assert report.verdict[0].startswith(
        "The model's scores fall as the measured values rise: Spearman -1.000, the same"
    )
