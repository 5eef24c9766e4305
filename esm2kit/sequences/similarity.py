"""Group similar proteins, so that a split can keep close relatives in one set.

MMseqs2 finds the similar pairs if it is installed. Otherwise candidates are found by the k-mers that they share, and
aligned. In both cases groups are connected components: every pair that is found similar is in one group. Neither method
compares all pairs, so `SimilarityGroups.find_pairs_across` aligns proteins of different sets afterwards.
"""

import logging
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from esm2kit.core.errors import InputError
from esm2kit.core.processes import count_cores
from esm2kit.core.progress import Progress
from esm2kit.sequences.alignment import CHANCE, COVERAGE, Criterion, align_ungapped, are_similar, can_align
from esm2kit.sequences.alignment import MAX_CELLS as MAX_ALIGNED_CELLS
from esm2kit.sequences.screening import PairScreen

logger = logging.getLogger(__name__)

Method = Literal["auto", "mmseqs", "kmers"]

K = 4  # residues per k-mer: 160,000 possible ones, so that unrelated proteins share few
CHANCE_OF_KMER = CHANCE**K  # probability that two random k-mers are equal
# At an identity of p a share p^K of the k-mers survives independent substitutions. Pairs with this part of it are
# aligned to find groups, and pairs with the smaller part if they are in different sets: of 1,268 pairs of UniProt
# proteins between 0.5 and 0.75 of it, 3 are similar.
GROUPING_PART, CHECKING_PART = 0.7, 0.35
FEW_KMERS = 40  # sequences with fewer are candidates by one shared k-mer, others by two
MAX_SEQUENCES = 200_000  # whose k-mers are in memory
# Below this identity relatives share hardly more k-mers than unrelated proteins, so that all pairs have to be aligned.
MIN_IDENTITY, MAX_ALL_ALIGNED = 0.4, 2_000
MIN_ALIGNED = 30  # residues; MMseqs2's prefilter finds few hits between shorter sequences
SENSITIVE_BELOW = 0.5  # identity below which MMseqs2 searches with its highest sensitivity
MAX_HITS = 2000  # per protein in MMseqs2's prefilter, whose default of 20 divides large families
# Longest common subsequences are computed as bits of words: cells per cell of an alignment that takes the same time.
CELLS_OF_SUBSEQUENCE = 400
MAX_CANDIDATES = 2_000_000  # pairs that are kept to be aligned if they are in different sets
MAX_LISTED = 5_000_000  # pairs of different sets with a long common subsequence
# Cells of the pairs of different sets that are compared, by default; that takes about 4 seconds (docs/measured.md).
MAX_CELLS = 3_000_000_000
PER_ROUND = 8  # candidates of a protein that are screened at once
CELLS_PER_CALL = 5_000  # of an alignment that takes as long as the call itself
_CELLS_PER_BLOCK = 6_000_000


class Candidates(NamedTuple):
    """Pairs of proteins that may be similar.

    Args:
        first_N: (N,) rows of the proteins that come first.
        second_N: (N,) rows of the others; each is greater than the first one of its pair.
        excess_N: (N,) shared k-mers without those by chance, as a share of what similar proteins share.
    """

    first_N: np.ndarray
    second_N: np.ndarray
    excess_N: np.ndarray

    def select(self, chosen: np.ndarray) -> "Candidates":
        """Return the pairs at these places, or with True."""
        return Candidates(*(values[chosen] for values in self))

    def sort(self) -> "Candidates":
        """Return the pairs in falling order of the excess."""
        return self.select(np.lexsort((self.second_N, self.first_N, -self.excess_N)))


class SetCheck(NamedTuple):
    """The comparison of proteins of different sets.

    Args:
        pairs: similar proteins in different sets.
        num_pairs: pairs of proteins of different sets.
        num_aligned: of them, those that were aligned, in this check or an earlier one.
        complete: whether every pair was aligned, or excluded because it has too few equal residues in any alignment.
    """

    pairs: list[tuple[int, int]]
    num_pairs: int
    num_aligned: int
    complete: bool


def describe_limit(check: SetCheck | None) -> list[str]:
    """Return a note on how many pairs were aligned, if they are not all pairs; for a random split none."""
    if check is None or check.complete:
        return []
    return [
        f"{check.num_aligned:,} of {check.num_pairs:,} pairs of proteins of different sets were aligned, first those "
        "that share most 4-mers: none is similar"
    ]


class SimilarityGroups:
    """Groups of similar sequences; every similar pair that is found later merges two groups.

    Args:
        sequences: S different sequences in upper case.
        identity: least share of equal residues in the columns of the alignment.
        coverage: least share of the shorter sequence that is aligned.
    """

    def __init__(self, sequences: Sequence[str], identity: float, coverage: float = COVERAGE) -> None:
        self.sequences = sequences
        self.criterion = Criterion(identity, coverage, len(sequences))
        self.method = ""  # how the groups were found, as words of a sentence
        self.tool: Literal["MMseqs2", "k-mers"] = "k-mers"
        self._parent_S = np.arange(len(sequences))
        self._length_S = np.array([len(sequence) for sequence in sequences])
        self._candidates: Candidates | None = None
        self._rejected: set[tuple[int, int]] = set()
        self._cells = 0

    @property
    def numbers(self) -> np.ndarray:
        """(S,) number of the group of each sequence, from 0."""
        return np.unique(self._find_roots(), return_inverse=True)[1]

    @cached_property
    def _screen(self) -> PairScreen:
        return PairScreen(self.sequences, self.criterion)

    def merge(self, first: int, second: int) -> None:
        """Merge the groups of two sequences."""
        roots = sorted((self._find_root(first), self._find_root(second)))
        self._parent_S[roots[1]] = roots[0]

    def _find_root(self, row: int) -> int:
        while (parent := int(self._parent_S[row])) != row:
            self._parent_S[row] = row = int(self._parent_S[parent])
        return row

    def _find_roots(self) -> np.ndarray:
        while (self._parent_S[self._parent_S] != self._parent_S).any():
            self._parent_S = self._parent_S[self._parent_S]
        return self._parent_S

    def group_by_mmseqs(self, program: str) -> None:
        """Group the sequences by MMseqs2's alignments.

        Args:
            program: path of MMseqs2.

        Raises:
            OSError: it cannot be started.
            subprocess.CalledProcessError: it failed.
            ValueError: its result is incomplete.
        """
        self._parent_S = _run_mmseqs(program, self.sequences, self.criterion)
        self.tool = "MMseqs2"
        self.method = f"groups of at least {self.criterion.identity:.0%} identity by MMseqs2"

    def group_by_kmers(self) -> None:
        """Align the pairs that share many k-mers, unless they are in one group already."""
        self._candidates = self._compare_kmers(GROUPING_PART)
        self.method = f"groups of at least {self.criterion.identity:.0%} identity by shared {K}-mers and alignments"

    def _compare_kmers(self, align_from: float) -> Candidates:
        """Align the pairs whose excess of k-mers is high; return the best of the others if they are in two groups."""
        kept = [Candidates(*(np.empty(0, dtype) for dtype in (np.int64, np.int64, np.float64)))]
        for candidates in self._list_candidates():
            likely = candidates.excess_N >= align_from
            self._align_candidates(candidates.select(likely))
            kept.append(self._select_apart(candidates.select(~likely)))
            if sum(len(each.first_N) for each in kept) > 2 * MAX_CANDIDATES:
                kept = [self._merge_candidates(kept)]
        return self._merge_candidates(kept)

    def _select_apart(self, candidates: Candidates) -> Candidates:
        """Return the pairs of sequences of different groups."""
        roots_S = self._find_roots()
        return candidates.select(roots_S[candidates.first_N] != roots_S[candidates.second_N])

    def _align_candidates(self, candidates: Candidates) -> None:
        """Align the pairs of some rows with others, the best candidates of each row first."""
        candidates = candidates.select(np.lexsort((candidates.second_N, -candidates.excess_N, candidates.first_N)))
        while len(candidates.first_N):
            candidates = self._select_apart(candidates)
            starts_N = np.searchsorted(candidates.first_N, candidates.first_N)
            rank_N = np.arange(len(starts_N)) - starts_N
            chosen = candidates.select(np.argsort(rank_N, kind="stable")[: int((rank_N < PER_ROUND).sum())])
            candidates = candidates.select(rank_N >= PER_ROUND)
            for first, second in zip(chosen.first_N.tolist(), chosen.second_N.tolist(), strict=True):
                if self._length_S[first] == self._length_S[second] and self._find_root(first) != self._find_root(
                    second
                ):
                    self._compare_ungapped(first, second)
            chosen = self._select_apart(chosen)
            possible_N = self._find_possible(chosen.first_N, chosen.second_N)
            pairs = zip(*(values.tolist() for values in chosen), possible_N.tolist(), strict=True)
            for first, second, excess, is_possible in pairs:
                if self._find_root(first) == self._find_root(second):
                    continue
                if is_possible:
                    self._align(first, second, excess)
                else:
                    self._rejected.add((first, second))

    def _compare_ungapped(self, first: int, second: int) -> bool:
        """Compare two sequences of equal length residue by residue, and merge their groups if they are similar."""
        texts = self.sequences[first], self.sequences[second]
        similar = self.criterion.is_met(align_ungapped(*texts), *map(len, texts))
        if similar:
            self.merge(first, second)
        return similar

    def _find_possible(
        self, first_N: np.ndarray, second_N: np.ndarray, note_done: Callable[[int], None] = lambda done: None
    ) -> np.ndarray:
        """Return which pairs may be similar by a local alignment, or are too long for one."""
        short_N = self._length_S[first_N] * self._length_S[second_N] <= MAX_ALIGNED_CELLS
        possible_N = np.ones(len(first_N), dtype=bool)
        if not short_N.any():
            return possible_N
        possible_N[short_N] = self._screen.find_possible(first_N[short_N], second_N[short_N], note_done)
        return possible_N

    def _align(self, first: int, second: int, excess: float) -> bool:
        """Align two sequences, merge their groups if they are similar, and return whether they are."""
        texts = self.sequences[first], self.sequences[second]
        # the k-mers decide on sequences that are too long for an alignment
        similar = are_similar(*texts, self.criterion, is_likely=True) if can_align(*texts) else excess >= 1
        if similar:
            self.merge(first, second)
        else:
            self._rejected.add((first, second))
        return similar

    def _list_candidates(self) -> Iterator[Candidates]:
        """Yield the pairs that share k-mers in blocks of rows, with the excess from CHECKING_PART on."""
        criterion, num_sequences = self.criterion, len(self.sequences)
        if num_sequences > MAX_SEQUENCES:  # MMseqs2 has grouped them
            return
        has_kmer_SK = count_kmers(self.sequences)
        by_kmer_KS = has_kmer_SK.T.tocsr()
        sizes_S = np.diff(has_kmer_SK.indptr)
        block = int(np.clip(_CELLS_PER_BLOCK // num_sequences, 16, 256))
        with Progress(logger, "compared", "proteins", num_sequences) as progress:
            for start in range(0, num_sequences, block):
                shared = (has_kmer_SK[start : start + block] @ by_kmer_KS).tocoo()
                first, second = shared.row + start, shared.col
                later = first < second
                first, second, count = first[later], second[later], shared.data[later]
                fewer = np.minimum(sizes_S[first], sizes_S[second])
                by_chance = CHANCE_OF_KMER * sizes_S[first] * sizes_S[second]
                excess = (count - by_chance) / (criterion.identity**K * fewer)
                chosen = (excess >= CHECKING_PART) & (count >= np.where(fewer < FEW_KMERS, 1, 2))
                yield Candidates(first[chosen].astype(np.int64), second[chosen].astype(np.int64), excess[chosen])
                progress.update(min(start + block, num_sequences))

    def _merge_candidates(self, kept: Sequence[Candidates]) -> Candidates:
        """Merge the candidates of different groups that were not aligned, at most MAX_CANDIDATES of them."""
        merged = Candidates(*(np.concatenate(values) for values in zip(*kept, strict=True)))
        merged = self._select_apart(merged).sort()
        return merged.select(np.arange(min(len(merged.first_N), MAX_CANDIDATES)))

    def find_pairs_across(self, set_S: np.ndarray, max_cells: int = MAX_CELLS) -> SetCheck:
        """Find similar proteins in different sets, and merge their groups.

        Pairs that share many k-mers are aligned first. Then, if there are few enough, all other pairs are, those with
        the longest common subsequences first. Without an alignment, a pair is excluded if its longest common
        subsequence is shorter than the number of equal residues that it would need.

        Args:
            set_S: (S,) name or number of the set of each sequence.
            max_cells: cells of all alignments of this object; further ones are left out.

        Returns:
            The comparison.
        """
        if self._candidates is None:  # MMseqs2 found the groups
            self._candidates = self._compare_kmers(align_from=np.inf)
        set_S = np.unique(set_S, return_inverse=True)[1]
        num_pairs = int(len(set_S) ** 2 - (np.bincount(set_S) ** 2).sum()) // 2
        likely = self._candidates.select(set_S[self._candidates.first_N] != set_S[self._candidates.second_N])
        to_align = dict.fromkeys(zip(likely.first_N.tolist(), likely.second_N.tolist(), strict=True), 0.0)
        to_align |= dict(zip(to_align, likely.excess_N.tolist(), strict=True))
        lengths_S = self._length_S
        residues_K = np.bincount(set_S, lengths_S)
        cells = (residues_K.sum() ** 2 - (residues_K**2).sum()) / 2
        complete = cells <= max_cells * CELLS_OF_SUBSEQUENCE / 4
        if complete:
            others_N2, complete = self._list_by_subsequence(set_S, lengths_S, max_cells)
            for first, second in others_N2.tolist():
                to_align.setdefault((first, second), 0.0)
        chosen, num_known = [], 0
        for (first, second), excess in to_align.items():
            if (first, second) in self._rejected:
                num_known += 1
                continue
            cells = int(lengths_S[first] * lengths_S[second]) + CELLS_PER_CALL
            if self._cells + cells > max_cells:
                complete = False
                continue
            self._cells += cells
            chosen.append((first, second, excess))
        pairs = self._align_all(chosen)
        return SetCheck(pairs, num_pairs, num_known + len(chosen), complete)

    def _align_all(self, chosen: Sequence[tuple[int, int, float]]) -> list[tuple[int, int]]:
        """Align all of some pairs with their excess, merge the groups of those that are similar, and return these."""
        first_N, second_N = np.array([pair[:2] for pair in chosen], dtype=np.int64).reshape(-1, 2).T
        with Progress(logger, "compared", "pairs of different sets", len(chosen)) as progress:
            possible_N = self._find_possible(first_N, second_N, progress.update)
        ungapped_N = ~possible_N & (self._length_S[first_N] == self._length_S[second_N])
        excluded_N = ~(possible_N | ungapped_N)
        self._rejected.update(zip(first_N[excluded_N].tolist(), second_N[excluded_N].tolist(), strict=True))
        pairs, places = [], np.flatnonzero(~excluded_N).tolist()
        with Progress(logger, "aligned", "pairs of different sets", len(places)) as progress:
            for number, place in enumerate(places):
                first, second, excess = chosen[place]
                if ungapped_N[place]:
                    similar = self._compare_ungapped(first, second)
                else:
                    similar = self._align(first, second, excess)
                if similar:
                    pairs.append((first, second))
                else:
                    self._rejected.add((first, second))
                progress.update(number + 1)
        return pairs

    def _list_by_subsequence(self, set_S: np.ndarray, lengths_S: np.ndarray, max_cells: int) -> tuple[np.ndarray, bool]:
        """List the pairs of different sets that may have enough equal residues, the most promising first.

        Args:
            set_S: (S,) number of the set.
            lengths_S: (S,) residues.
            max_cells: of the alignments; the list ends where there are more.

        Returns:
            (N, 2) pairs, and whether these are all.
        """
        required_L = np.array([self.criterion.count_required(length) for length in range(lengths_S.max() + 1)])
        found = Candidates(*(np.empty(0, dtype) for dtype in (np.int64, np.int64, np.float64)))
        complete = True
        sizes_K = np.bincount(set_S)
        num_pairs = int(len(set_S) ** 2 - (sizes_K**2).sum()) // 2
        done = 0
        with Progress(logger, "searched", "pairs of different sets", num_pairs) as progress:
            for number in range(int(set_S.max())):
                rows, others = np.flatnonzero(set_S == number), np.flatnonzero(set_S > number)
                block = max(1, _CELLS_PER_BLOCK // len(others))
                for start in range(0, len(rows), block):
                    part = rows[start : start + block]
                    texts = [[self.sequences[row] for row in each] for each in (part, others)]
                    common_BO = cdist(*texts, scorer=LCSseq.similarity, dtype=np.int32, workers=count_cores())
                    shorter_BO = np.minimum.outer(lengths_S[part], lengths_S[others])
                    longer_BO = np.maximum.outer(lengths_S[part], lengths_S[others])
                    excess_BO = _compare_with_others(common_BO / shorter_BO, longer_BO / shorter_BO)
                    places = np.nonzero(common_BO >= required_L[shorter_BO])
                    pairs_2N = np.sort([part[places[0]], others[places[1]]], axis=0)
                    both = (found, Candidates(*pairs_2N, excess_BO[places]))
                    found = Candidates(*(np.concatenate(values) for values in zip(*both, strict=True)))
                    if len(found.first_N) > 2 * MAX_LISTED:
                        found, complete = found.sort().select(np.arange(MAX_LISTED)), False
                    done += len(part) * len(others)
                    progress.update(done)
        found = found.sort()
        cells_N = lengths_S[found.first_N] * lengths_S[found.second_N] + CELLS_PER_CALL
        fits_N = np.cumsum(cells_N) <= max_cells
        found = found.select(fits_N)
        return np.stack([found.first_N, found.second_N], axis=1), complete and bool(fits_N.all())


def _compare_with_others(share_BO: np.ndarray, ratio_BO: np.ndarray) -> np.ndarray:
    """Subtract from each value the mean of the pairs with about the same ratio of their lengths."""
    bins_BO = np.minimum((4 * np.log2(ratio_BO)).astype(np.int64), 31)
    counts, sums = np.bincount(bins_BO.ravel()), np.bincount(bins_BO.ravel(), share_BO.ravel())
    return share_BO - (sums / np.maximum(counts, 1))[bins_BO]


def group_by_identity(
    sequences: Sequence[str], identity: float, coverage: float = COVERAGE, method: Method = "auto"
) -> SimilarityGroups:
    """Group sequences so that similar ones are in one group.

    The groups do not depend on the order of the sequences.

    Args:
        sequences: S different sequences in upper case.
        identity: least share of equal residues in the columns of the alignment.
        coverage: least share of the shorter sequence that is aligned.
        method: auto is mmseqs if it is installed, works, and the sequences are no peptides.

    Returns:
        The groups.

    Raises:
        InputError: MMseqs2 cannot be used, or there are too many sequences for k-mers or the identity is below their
            range.
    """
    groups = SimilarityGroups(sequences, identity, coverage)
    program = None if method == "kmers" else shutil.which("mmseqs")
    peptides = np.median([len(sequence) for sequence in sequences]) < MIN_ALIGNED
    if method == "mmseqs" and program is None:
        raise InputError(
            "MMseqs2 is not installed. Install it (conda install -c bioconda mmseqs2), or use method kmers.",
            code="identity.no-mmseqs",
        )
    if program and (method == "mmseqs" or not peptides):
        try:
            groups.group_by_mmseqs(program)
            return groups
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            outputs = [getattr(error, "stderr", None), getattr(error, "output", None), str(error)]
            output = next(text.strip() for text in outputs if text and text.strip())
            if method == "mmseqs":
                raise InputError(
                    f"MMseqs2 failed ({output.splitlines()[-1]}). Check its installation, or use method kmers.",
                    code="identity.mmseqs-failed",
                    output=output.splitlines()[-1],
                ) from None
            logger.warning("MMseqs2 failed (%s): comparing k-mers instead", output.splitlines()[-1])
    _check_limits(len(sequences), identity, installed=program is not None)
    groups.group_by_kmers()
    return groups


def _check_limits(num_sequences: int, identity: float, installed: bool) -> None:
    """Raise InputError if k-mers cannot group so many sequences, or so different ones."""
    limit = MAX_ALL_ALIGNED if identity < MIN_IDENTITY else MAX_SEQUENCES
    if num_sequences > limit:
        fix = "Split" if installed else "Install MMseqs2 (conda install -c bioconda mmseqs2), or split"
        raise InputError(
            f"{num_sequences:,} sequences: without MMseqs2, at most {limit:,} can be grouped at an identity of "
            f"{identity:g}. {fix} at random.",
            code="identity.limit",
            sequences=num_sequences,
            identity=identity,
            limit=limit,
        )


def count_kmers(sequences: Sequence[str]) -> sparse.csr_matrix:
    """List the k-mers of each sequence.

    Args:
        sequences: S sequences.

    Returns:
        (S, 26**K) int32: 1 for each k-mer that a sequence has.
    """
    columns = []
    for sequence in sequences:
        codes = np.frombuffer(sequence.encode(), np.uint8).astype(np.int64) - ord("A")
        number = sum(codes[place : len(codes) - K + 1 + place] * 26**place for place in range(K))
        columns.append(np.unique(number) if len(codes) >= K else np.empty(0, dtype=np.int64))
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in columns])])
    kmers = np.concatenate(columns) if columns else np.empty(0, dtype=np.int64)
    return sparse.csr_matrix(
        (np.ones(len(kmers), np.int32), kmers.astype(np.int32), offsets.astype(np.int64)),
        shape=(len(sequences), 26**K),
    )


def _run_mmseqs(program: str, sequences: Sequence[str], criterion: Criterion) -> np.ndarray:
    """Group sequences by MMseqs2's alignments; its input is sorted, so that their order does not matter.

    Args:
        program: path of MMseqs2.
        sequences: S sequences.
        criterion: identity and coverage.

    Returns:
        (S,) first row of the group of each sequence.

    Raises:
        ValueError: a sequence is in no group.
    """
    order = sorted(range(len(sequences)), key=lambda row: (-len(sequences[row]), sequences[row]))
    with tempfile.TemporaryDirectory(prefix="esm2kit-") as folder:
        fasta, result = Path(folder) / "in.fasta", Path(folder) / "out"
        fasta.write_text("".join(f">{row}\n{sequences[row]}\n" for row in order), encoding="ascii")
        command = [program, "easy-cluster", fasta, result, Path(folder) / "tmp", "--min-seq-id", criterion.identity]
        # mode 1: connected components; coverage of the target, which each of two sequences is in turn
        command += ["--cluster-mode", 1, "--single-step-clustering", "-c", criterion.coverage, "--cov-mode", 1]
        command += ["--alignment-mode", 3, "--max-seqs", MAX_HITS, "--threads", count_cores(), "-v", 1]
        if criterion.identity < SENSITIVE_BELOW:
            command += ["-s", 7.5]
        subprocess.run(
            list(map(str, command)), capture_output=True, check=True, text=True, encoding="utf-8", errors="replace"
        )
        lines = (Path(folder) / "out_cluster.tsv").read_text(encoding="utf-8").splitlines()
    places = np.array([line.split("\t") for line in lines], dtype=np.int64).reshape(-1, 2)
    if missing := len(sequences) - len(np.unique(places[:, 1])):
        raise ValueError(f"no cluster for {missing} sequences")
    graph = sparse.coo_matrix((np.ones(len(places), dtype=bool), places.T), shape=(len(sequences),) * 2)
    numbers = connected_components(graph, directed=False)[1]
    return np.unique(numbers, return_index=True)[1][numbers]
