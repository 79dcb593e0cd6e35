"""What the feed says of uneven batches, and of a reference that moves in vain."""

import pytest
from ml_collections import ConfigDict

from dpo_jax.training import data_feed


@pytest.mark.parametrize(
    "batch_size, microbatch_size, shards, advice",
    [
        (12, 0, 8, "A multiple of 8 as config.dpo.batch_size"),
        (12, 3, 2, "A multiple of 2 as config.dpo.microbatch_size"),
        (6, 2, 8, "A multiple of 8 as config.dpo.batch_size"),
    ],
)
def test_advice_for_uneven_shards_is_even(batch_size, microbatch_size, shards, advice, capsys):
    block = ConfigDict(dict(batch_size=batch_size, microbatch_size=microbatch_size))
    data_feed.say_uneven_shards("dpo", block, shards)
    assert advice in capsys.readouterr().out
    if "microbatch" in advice:
        block.microbatch_size = 2
    else:
        block.update(batch_size=8, microbatch_size=0)
    data_feed.say_uneven_shards("dpo", block, shards)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "every, mix, steps, told",
    [
        (512, 1.0, 3, ["ends before a step sees a moved reference (config.dpo.reference_every = "]),
        (3, 0.6, 3, ["ends before a step sees a moved reference"]),
        (3, 1.0, 3, ["ends before a step sees", "compares the policy with itself"]),
        (3, 1.0, 6, ["compares the policy with itself"]),
        (3, 0.6, 6, []),
        (3, 1.0, 7, []),
    ],
)
def test_reference_that_moves_in_vain(every, mix, steps, told, capsys):
    block = ConfigDict(dict(reference_every=every, reference_mix=mix))
    data_feed.say_moves_in_vain("dpo", block, steps)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(told)
    for line, part in zip(lines, told, strict=True):
        assert part in line
