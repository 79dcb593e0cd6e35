"""Groups of examples as numbers: which group each is in, and its place there."""

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
