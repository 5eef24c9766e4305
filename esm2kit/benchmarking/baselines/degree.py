"""The baseline of pairs that knows only how often each protein interacts, and not which proteins they are.

Source: Park and Marcotte 2012, 10.1038/nmeth.2259: what predictors of interactions often learn.
"""

import numpy as np

from esm2kit.benchmarking.probes.features import Fitted
from esm2kit.tasks.task_data import TaskData

SMALLEST = 1e-12  # probability whose logarithm is finite
PRIOR = 1.0  # pairs with the mean target that each protein is assumed to have had


def fit_degree(data: TaskData) -> Fitted:
    """Predict a pair from the mean targets of its two proteins in train.

    A class has the probability of two independent proteins, p_A p_B / p, normalised, where p_A is the share of the
    class among the train pairs of protein A and p its share among all; a value is the mean plus the deviations of both
    proteins. A protein that train does not have, or whose relative it does not have, is an average one.

    Args:
        data: A task of pairs with one class or value each.

    Returns:
        The predictions (1, M).
    """
    groups_P2, train = data.pairs.groups_P2, data.rows("train")
    is_class = data.task.target == "class"
    y_PK = np.eye(len(data.task.labels))[data.targets] if is_class else data.targets[:, None]
    mean_K = y_PK[train].mean(0)
    size = int(groups_P2.max()) + 1
    count_G, sum_GK = np.zeros(size), np.zeros((size, y_PK.shape[1]))
    same = groups_P2[train, 0] == groups_P2[train, 1]
    for side, rows in ((0, train), (1, train[~same])):  # a pair of a protein with itself counts once
        np.add.at(count_G, groups_P2[rows, side], 1)
        np.add.at(sum_GK, groups_P2[rows, side], y_PK[rows])
    rate_GK = (sum_GK + PRIOR * mean_K) / (count_G + PRIOR)[:, None]
    first_PK, second_PK = rate_GK[groups_P2[:, 0]], rate_GK[groups_P2[:, 1]]
    if is_class:
        with np.errstate(divide="ignore", invalid="ignore"):
            score_PK = np.where(mean_K > 0, first_PK * second_PK / mean_K, 0.0)
        predicted_P = score_PK.argmax(1)
    else:
        predicted_P = (first_PK + second_PK - mean_K)[:, 0]
    test, validation = data.rows("test"), data.rows("validation")
    fitted = Fitted(predicted_P[test][None], predicted_P[validation][None])
    if not is_class:
        return fitted
    logits_PK = np.log(np.maximum(score_PK, SMALLEST)).astype(np.float32)
    return fitted._replace(test_logits_MC=logits_PK[test], validation_logits_MC=logits_PK[validation])
