"""Tasks with a known signal: three of the feature columns determine the target, or none does."""

import numpy as np

from esm2kit.benchmarking.probes.features import Features
from esm2kit.tasks.task import Split, Task
from esm2kit.tasks.task_data import TaskData

LETTERS = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
KINDS = [(level, target) for level in ("protein", "residue") for target in ("class", "value")]


def make_planted_task(
    level, target, num_proteins=320, width=16, seed=0, shuffled=False, noise=0.1, bits=(), by_residue=False
):
    """Make features (float16) and a task; with `shuffled` the targets carry no signal.

    With `by_residue` a protein has one row per residue: the vector of the protein with different noise.
    """
    generator = np.random.default_rng(seed)
    num_residues = generator.integers(15, 30, num_proteins)
    rows = num_proteins if level == "protein" else int(num_residues.sum())
    x = generator.normal(size=(rows, width)).astype(np.float16)
    signal = x[:, :3].astype(float) + noise * generator.normal(size=(rows, 3))
    if target == "value":
        y, labels = signal @ [1.0, -1.0, 0.5], ()
    elif bits:
        y, labels = ((signal > 0.5) * [1, 2, 4]).sum(1), tuple("01234567")
    else:
        y, labels = signal.argmax(1), ("a", "b", "c")
    if shuffled:
        y = generator.permutation(y)
    part = num_proteins // 5
    sets = np.array(["train"] * (num_proteins - 3 * part) + ["validation"] * part + ["test"] * 2 * part)
    metric = "spearman" if target == "value" else "macro_f1" if bits else "accuracy"
    task = Task("planted", level, target, metric, {"s": Split()}, "s", labels=labels, binary_labels=bits, unit="units")
    sequences = ["".join(generator.choice(LETTERS, size)) for size in num_residues]
    ids = [f"p{i}" for i in range(num_proteins)]
    data = TaskData(task, "s", ids, sequences, sets, y, np.ones(rows, bool), {})
    if not by_residue:
        return Features(x, data.offsets, "planted"), data
    x = np.repeat(x, num_residues, axis=0) + generator.normal(size=(num_residues.sum(), width)).astype(np.float16)
    return Features(x, np.concatenate([[0], np.cumsum(num_residues)]), "planted"), data
