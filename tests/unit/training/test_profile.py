"""When the steps of a profile are not among those of a run."""

import pytest

from dpo_jax.training.profile import Profile


@pytest.mark.parametrize(
    "first, is_told", [(0, False), (3, True), (4, False), (9, False), (10, True)]
)
def test_profile_that_cannot_be_made_is_told(first, is_told, tmp_path, capsys):
    Profile(tmp_path, first).check("dpo", 4, 9)
    assert ("dpo: no profile" in capsys.readouterr().out) == is_told
