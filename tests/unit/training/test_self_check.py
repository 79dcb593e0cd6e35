"""The self-check before the first step fails when it should."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dpo_jax.data.examples import Examples
from dpo_jax.models import transformer
from dpo_jax.parallel import sharding
from dpo_jax.training import self_check
from tests.helpers.tiny import random_pairs

EOS = 1


def examples(count=6, responses_of=lambda number, responses: responses):
    """Return random pairs; responses_of: (row, responses with EOS) -> those to take instead."""
    made = Examples()
    for number, pair in enumerate(random_pairs(count, longest=8), 1):
        responses = [np.r_[response, EOS] for response in pair.responses]
        made.append(
            np.r_[0, pair.prompt], responses_of(number, responses), f"rows.jsonl row {number}"
        )
    return made


LOG_2 = {"loss/train": math.log(2), "rewards_train/margins": 0.0}


def check(
    tiny,
    data,
    reference="same",
    loss="sigmoid",
    eos_id=EOS,
    exact=True,
    measured=LOG_2,
    held="float32",
):
    config, params = tiny
    block = ConfigDict(dict(loss=loss, beta=0.1, weighting="none"))
    reference = params if isinstance(reference, str) else reference
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    first_batch = self_check.FirstBatch(
        examples=data,
        indices=np.arange(len(data)),
        metrics=measured,
        eos_id=eos_id,
        reference_is_init=exact,
        reference_log_probs=None,
        show=lambda index: f"tokens of {index}",
        reference_dtype=held,
    )
    return self_check.self_check(config, block, mesh, params, reference, first_batch)


def test_self_check_passes_good_batch(tiny):
    line = check(tiny, examples())
    assert "\n" not in line and "log-ratios 0, loss 0.6931 = log 2" in line
    assert "EOS ends 12 of 12 responses" in line and "packed batch matches separate rows" in line


def test_self_check_of_other_losses(tiny):
    assert "loss 25.0000," in check(
        tiny, examples(), loss="ipo", measured=LOG_2 | {"loss/train": 25.0}
    )


@pytest.mark.parametrize("wrong", [{"loss/train": 0.7}, {"rewards_train/margins": 1e-3}])
def test_self_check_stops_wrong_start(tiny, wrong):
    with pytest.raises(self_check.SelfCheckFailed, match="expected 0.693147 and 0"):
        check(tiny, examples(), measured=LOG_2 | wrong)


def test_self_check_shows_other_reference(tiny):
    other = jax.tree.map(lambda x: x * 1.01, tiny[1])
    with pytest.raises(
        self_check.SelfCheckFailed,
        match=r"row \d has a log-ratio of .* nats, not 0.*\ntokens of \d",
    ):
        check(tiny, examples(), reference=other)
    check(tiny, examples(), reference=other, exact=False)


def test_self_check_of_rounded_reference(tiny):
    """It is compared with the policy rounded as it is, and must be that exactly."""
    rounded = transformer.held(tiny[1], "bfloat16")
    line = check(tiny, examples(), reference=rounded, held="bfloat16")
    found = re.search(
        r"log-ratios 0 but for a reference in bfloat16 \(up to ([\d.e-]+) nats\), loss 0.6931, ",
        line,
    )
    gap = float(found[1])
    assert 0.1 < gap < 3  # of weights that are far larger than trained ones
    # Its rounding moves the loss, and no more than that is let pass.
    moved = {"loss/train": math.log(2) + 0.1 * gap, "rewards_train/margins": 0.1 * gap}
    check(tiny, examples(), reference=rounded, held="bfloat16", measured=moved)
    moved["rewards_train/margins"] = gap
    with pytest.raises(self_check.SelfCheckFailed, match="expected 0.693147 and 0"):
        check(tiny, examples(), reference=rounded, held="bfloat16", measured=moved)
    other = jax.tree.map(lambda x: x * 1.01, rounded)
    with pytest.raises(self_check.SelfCheckFailed, match="has a log-ratio of .* nats, not 0"):
        check(tiny, examples(), reference=other, held="bfloat16")


def test_self_check_names_empty_response(tiny):
    def responses_of(number, responses):
        return (responses[0], []) if number == 4 else responses

    data = examples(responses_of=responses_of)
    with pytest.raises(
        self_check.SelfCheckFailed, match="rows.jsonl row 4 has .* a response without a token"
    ):
        check(tiny, data)


def test_self_check_refuses_missing_eos(tiny):
    def responses_of(number, responses):
        return [np.where(response == EOS, 2, response) for response in responses]

    data = examples(responses_of=responses_of)
    with pytest.raises(self_check.SelfCheckFailed, match="no response that ends in EOS"):
        check(tiny, data)
    assert "no EOS" in check(tiny, data, eos_id=None)


def test_self_check_stops_nan(tiny):
    config, params = tiny
    broken = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(
        self_check.SelfCheckFailed, match="rows.jsonl row 1 has a log-prob that is not finite"
    ):
        check((config, broken), examples())


def test_self_check_finds_wrong_packing(tiny, monkeypatch):
    """Positions that run on instead of restarting for the rejected response: the classical packing
    bug.
    """
    pack = self_check.packing.pack

    def wrong(pairs, shape, *, share=True):
        batch = pack(pairs, shape, share=share)
        return (
            dataclasses.replace(batch, positions=np.arange(len(batch.positions), dtype=np.int32))
            if share
            else batch
        )

    monkeypatch.setattr(self_check.packing, "pack", wrong)
    with pytest.raises(self_check.SelfCheckFailed, match="the attention layout is wrong"):
        check(tiny, examples())
