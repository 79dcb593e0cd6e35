"""What a compiled step of DPO sends between devices."""

import functools

import jax
import pytest

from dpo_jax.models import log_probs
from dpo_jax.parallel import sharding
from dpo_jax.planning import groups, hlo, planner
from dpo_jax.planning.groups import Group
from dpo_jax.planning.program import make_program
from tests.helpers.tiny_runs import scratch_config

DATA, FSDP, TENSOR = (("data", 8),), (("data", 1), ("fsdp", 8)), (("data", 4), ("tensor", 2))
ALL = (("data", 2), ("fsdp", 2), ("tensor", 2))
EXPERT = (("data", 2), ("fsdp", 2), ("expert", 2))
WIDTH = 64
# From 0.11 on, XLA no longer joins two of the sums on the mesh of all axes.
SUMS_OF_ALL = 31 if jax.__version_info__ < (0, 11) else 32


@functools.cache
def collectives(sizes: tuple, response: int = 16, vocab: int = 128) -> dict:
    """Kind -> (number, bytes received by a device) in a step of eight pairs with a live
    reference.
    """
    config = scratch_config()
    config.model.scratch.update(vocab_size=vocab, hidden_size=WIDTH, max_position_embeddings=1024)
    config.data.max_length = 1024
    # As on chips: a CPU unrolls layers, and then XLA sends the sums of several at once.
    config.model.unroll = 1
    return hlo.collectives(compiled(config, sizes, response).as_text())


def compiled(config, sizes: tuple, response: int):
    mesh, model = sharding.make_mesh(**dict(sizes)), planner.model_config(config, "dpo")
    batch = groups.lay_out(config, "dpo", Group(16, response), sharding.batch_shards(mesh))[0]
    with jax.set_mesh(mesh):
        return make_program(config, "dpo", model, mesh, batch).trace().lower().compile()


GPT2 = dict(model_type="gpt2", vocab_size=128, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64)
MIXTRAL = dict(
    model_type="mixtral",
    vocab_size=128,
    hidden_size=WIDTH,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
)


@pytest.mark.parametrize(
    "scratch, sizes", [(GPT2, ALL), (MIXTRAL, EXPERT)], ids=["learned positions", "experts"]
)
def test_no_array_is_copied_to_every_device(capfd, scratch, sizes):
    """XLA warns where it does so to bring an array from one layout to another."""
    config = scratch_config()
    config.model.scratch = scratch
    compiled(config, sizes, response=16)
    assert "rematerialization" not in capfd.readouterr().err


def counts(sizes: tuple, **more) -> dict:
    return {kind: number for kind, (number, _) in collectives(sizes, **more).items()}


@pytest.mark.parametrize(
    "sizes, expected",
    [
        # Gradients, the loss's sums, and the gradient's norm.
        (DATA, {"all-reduce": 3}),
        # A gather of each weight of a layer for each pass and model; embeddings of tokens instead
        # of their table.
        (FSDP, {"all-gather": 45, "all-to-all": 3, "all-reduce": 6}),
        # Two sums of activations a layer and pass, and the softmax's over the vocabulary.
        (TENSOR, {"all-reduce": 21}),
        (ALL, {"all-gather": 46, "all-to-all": 3, "all-reduce": SUMS_OF_ALL}),
    ],
    ids=["data", "fsdp", "tensor", "all"],
)
def test_collectives_of_step(sizes, expected):
    """A count that rises is a weight or an activation that travels more often: find it before
    changing the count.
    """
    assert counts(sizes) == expected


def test_collectives_gather_head_once(monkeypatch):
    whole = counts(FSDP)
    # 800 scored positions of a shard make 7 chunks.
    monkeypatch.setattr(log_probs, "CHUNK_LOGITS", 128 * 128)
    assert counts(FSDP, response=400) == whole


def test_collectives_leave_split_head(monkeypatch):
    monkeypatch.setattr(log_probs, "CHUNK_LOGITS", 128 * 128)
    assert counts(TENSOR, response=400).keys() == {"all-reduce"}  # of each chunk's softmax


def test_collectives_never_of_logits_or_tables():
    """A larger vocabulary costs its weights' gradients, a gather of the head for each model, and
    nothing else.
    """

    def grown(sizes, kind):
        return collectives(sizes, vocab=256)[kind][1] - collectives(sizes)[kind][1]

    table = 128 * WIDTH * 4  # bytes that the embedding, and the head, grow by
    # Over the four of `data`, of half of each.
    assert grown(TENSOR, "all-reduce") == 2 * (3 / 4) * (2 * table / 2)
    assert grown(FSDP, "all-gather") == 2 * (7 / 8) * table
    assert grown(FSDP, "all-to-all") == 0
    # The head's gradient; the table's is where it belongs.
    assert grown(FSDP, "all-reduce") == 2 * (7 / 8) * table
