"""What the feed says of a batch that devices cannot share evenly."""

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
