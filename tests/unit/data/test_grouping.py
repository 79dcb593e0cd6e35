"""Numbers of groups, against plain loops."""

import numpy as np

from dpo_jax.data import grouping


def test_numbered_by_first_example():
    keys = np.random.default_rng(0).integers(0, 6, (2, 60))
    for given in (keys[0], keys):
        columns = [tuple(np.atleast_2d(given)[:, i]) for i in range(60)]
        numbers = {column: number for number, column in enumerate(dict.fromkeys(columns))}
        assert grouping.numbered(given).tolist() == [numbers[column] for column in columns]


def test_places_count_those_before():
    groups = np.random.default_rng(1).integers(0, 5, 60)
    expected = [int((groups[:i] == groups[i]).sum()) for i in range(60)]
    assert grouping.places(groups).tolist() == expected
