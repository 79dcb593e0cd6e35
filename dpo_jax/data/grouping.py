"""Groups of examples as numbers: which group each is in, its place there, and errors of means."""

import numpy as np


def numbered(keys: np.ndarray) -> np.ndarray:
    """Return the number of each key's group, [P]: equal keys are one group.

    keys: [P], or [fields, P] where a key is a column. Groups are numbered from 0 by their first
    example, in the order of the data.
    """
    _, first, number_P = np.unique(keys, axis=-1, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number_P]


def places(group_P: np.ndarray) -> np.ndarray:
    """Return how many examples of the same group stand before each, [P]."""
    order = np.argsort(group_P, kind="stable")
    sorted_groups = group_P[order]
    starts = np.searchsorted(sorted_groups, sorted_groups)
    place_P = np.empty(len(group_P), int)
    place_P[order] = np.arange(len(group_P)) - starts
    return place_P


def clustered_error(
    values_N: np.ndarray, clusters_N: np.ndarray, weights_N: np.ndarray | None = None
) -> float | None:
    """Return the standard error of a mean whose values may be alike within a cluster.

    It is sqrt(C / (C - 1) * sum over C clusters of (sum of deviations from the mean)²) / N (Liang
    and Zeger 1986), of a weighted mean with deviations times weights, and the sum of the weights
    for N. Clusters of one value each give the usual one. None where there is one cluster.
    """
    if weights_N is None:
        weights_N = np.ones(len(values_N))
    _, number_N = np.unique(clusters_N, return_inverse=True)
    mean = np.average(values_N, weights=weights_N)
    deviations_C = np.bincount(number_N, weights_N * (values_N - mean))
    clusters = len(deviations_C)
    if clusters < 2:
        return None
    variance = clusters / (clusters - 1) * (deviations_C**2).sum()
    return float(np.sqrt(variance) / weights_N.sum())
