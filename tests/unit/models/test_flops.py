"""FLOPs against the program's own products and XLA's count."""

import jax
import numpy as np
import pytest

from dpo_jax.data import packing
from dpo_jax.data.batches import Batches, unpaired
from dpo_jax.data.examples import Example, Examples
from dpo_jax.models import flops, transformer
from dpo_jax.models.log_probs import response_log_probs
from dpo_jax.models.transformer import LayerKind
from tests.helpers.tiny import tiny_config

PAIRS = [
    Example(np.arange(p), (np.arange(c), np.arange(r)))
    for p, c, r in [(5, 7, 3), (9, 2, 6), (4, 4, 4)]
]


PROMPT = np.arange(40)  # long enough for rows of a prompt and all its responses
OF_ONE_PROMPT = [Example(PROMPT, (np.arange(c), np.arange(r))) for c, r in [(7, 3), (5, 7), (3, 4)]]


def forward_jaxpr(config, shape, examples=PAIRS):
    batch = packing.pack(examples, shape)
    batch = jax.tree.map(lambda x: x[None], batch)
    return jax.jit(lambda params: response_log_probs(config, params, batch)).trace(
        transformer.abstract(config)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(gated=False, parallel=True, shared_norm=True),
        dict(tied=True, kv_heads=4),
        dict(learned_positions=True, pattern=(LayerKind(),), qk_norm="head"),
    ],
)
def test_forward_flops_equal_program(fields):
    config = tiny_config(width=32, mlp_width=64, head_width=8, **fields)
    shape = packing.shape_of(PAIRS)
    parts, done = (
        flops.forward(config, shape.contents),
        flops.of_program(forward_jaxpr(config, shape).jaxpr.jaxpr),
    )
    # A row shorter than a block of queries is computed whole; of that square, causal attention
    # needs a half.
    square = sum(
        rows * (prompt**2 + responses * response * (prompt + response))
        for rows, prompt, responses, response in shape.rows
    )
    whole = 4 * config.layers * config.heads * config.head_width * square
    assert done == parts["dense"] + parts["head"] + whole
    assert whole / 2 < parts["attention"] < whole


def test_forward_flops_of_several_responses_in_a_row():
    config = tiny_config(width=32, mlp_width=64, head_width=8)
    shape = packing.shape_of(OF_ONE_PROMPT)
    ((rows, prompt, responses, response),) = shape.rows
    assert (rows, prompt, responses, response) == (1, 40, 4, 7)  # 4 distinct ones of 6
    parts = flops.forward(config, shape.contents)
    done = flops.of_program(forward_jaxpr(config, shape, OF_ONE_PROMPT).jaxpr.jaxpr)
    square = prompt**2 + responses * response * (prompt + response)
    whole = 4 * config.layers * config.heads * config.head_width * square
    assert done == parts["dense"] + parts["head"] + whole
    assert whole / 2 < parts["attention"] < whole


def test_a_step_of_kto_costs_half_as_much_again_as_one_of_dpo():
    """On the same responses, with a live reference: six forward passes for four."""
    config = tiny_config(width=32, mlp_width=64, head_width=8)
    pairs, rows = Examples(), Examples()
    for number in range(4):
        prompt, sides = [number] * 6, ([10 + number] * 5, [20 + number] * 5)
        pairs.append(prompt, sides, "pair")
        for side in sides:
            rows.append(prompt, [side], "row", label=True)
    of_pairs = Batches(pairs, np.arange(4)[None])
    of_rows = unpaired(rows, np.arange(8)[None], max_length=20)
    dpo = flops.of_step(config, of_pairs.contents(0), reference=True)
    mismatched = of_rows.mismatched.contents(0)
    kto = flops.of_step(config, of_rows.contents(0), reference=True, mismatched=mismatched)
    assert kto == 1.5 * dpo


def test_forward_flops_of_window():
    seen = [min(t + 1, 5) for t in range(12)]
    assert (
        flops._seen(12, 5) == sum(seen) and flops._seen(4, 5) == 10 and flops._seen(12, None) == 78
    )


def test_product_flops_equal_xla():
    """XLA counts a loop's body once, so the layers are unrolled; it counts what is not a product
    too.
    """
    config = tiny_config(width=128, mlp_width=256, head_width=32, unroll=2)
    traced = forward_jaxpr(config, packing.shape_of(PAIRS))
    counted = traced.lower().compile().cost_analysis()["flops"]
    assert counted == pytest.approx(flops.of_program(traced.jaxpr.jaxpr), rel=0.06)
