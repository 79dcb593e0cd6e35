"""How an error names what differs between two processes."""

import pytest

from dpo_jax.parallel import agreement


@pytest.mark.parametrize(
    "values, expected",
    [
        (dict(lr=0.2, steps=3), "lr: 0.2 in process 4 on b, but 0.1 in process 0 on a."),
        (dict(lr=0.1), "steps: '(absent)' in process 4 on b, but 3 in process 0 on a."),
        (
            dict(lr=0.1, steps=3, seed=0),
            "seed: 0 in process 4 on b, but '(absent)' in process 0 on a.",
        ),
        (dict(lr=0.2, steps=4), "process 0 on a. Also different: steps."),
    ],
)
def test_difference_names_the_value_and_both_hosts(values, expected):
    first = dict(host="a", values=dict(lr=0.1, steps=3))
    assert agreement.difference(first, dict(host="b", values=values), 4).endswith(expected)


def test_many_differences_are_counted_out():
    first, other = ({f"f{i}": value for i in range(12)} for value in (0, 1))
    found = agreement.difference(dict(host="a", values=first), dict(host="b", values=other), 1)
    assert found.endswith("Also different: f1, f2, f3, f4, f5, f6, f7, f8 and more.")


def test_alone_nothing_is_computed(tmp_path):
    agreement.check_same(lambda: 1 / 0, agreement.SAME_COMMAND)
    agreement.check_same_files({"missing": tmp_path / "missing"})
