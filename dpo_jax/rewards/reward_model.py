"""Reward models of ours: their score of completions, read at the last token."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax import config as configs
from dpo_jax.console import say
from dpo_jax.data import packing
from dpo_jax.data.batches import Batches, evaluation_order
from dpo_jax.data.tokenizer import Examples, encode_prompts
from dpo_jax.models import loading
from dpo_jax.models.values import response_rewards
from dpo_jax.parallel import sharding
from dpo_jax.sampling.prompts import Prompts, completion_texts

LENGTHS = (
    32  # sequences are padded to a multiple of this many tokens, so that few programs are compiled
)


def any_policy(path, batch_size, mesh) -> Callable:
    """A reward model of ours: on the very tokens that the policy sampled, where they are its own
    tokenizer's, and else on the texts, tokenised as for training, each completion with an EOS;
    special tokens are not in them.
    """
    model = loading.open_checkpoint(path, head="reward")
    score = _scorer(model, batch_size, mesh)
    told = []

    def reward(prompts, completions, tokens):
        if tokens is not None and _is_spelled(model.tokenizer, prompts, completions, tokens):
            return score(tokens)
        if tokens is not None and not told:
            told.append(
                say(
                    f"reward: {path} has another tokenizer than the policy: the texts are tokenised anew, "
                    "without what special tokens they had (a chat's), each with an EOS"
                )
            )
        return score(_tokenised(model.tokenizer, prompts, completions))

    return reward


def _is_spelled(words, prompts: list[str], completions: list[str], tokens: list[tuple]) -> bool:
    """Whether (prompt, completion) ids have these texts in a tokenizer, and completions end, if
    they do, in its EOS.
    """
    ids = [prompt for prompt, _ in tokens]
    read = Prompts(ids, words.batch_decode(ids, skip_special_tokens=True))
    ends = {int(completion[-1]) for _, completion in tokens if len(completion)} & set(
        words.all_special_ids
    )
    return (
        ends <= {words.eos_token_id}
        and read.texts == list(prompts)
        and completion_texts(read, [completion for _, completion in tokens], words)
        == list(completions)
    )


def _tokenised(words, prompts: list[str], completions: list[str]) -> list[tuple]:
    """(prompt, completion) ids of texts, which are not cut."""
    if not prompts:
        return []
    data = configs.default(()).data
    data.update(append_eos=True, max_length=2**30, max_prompt_length=2**29)
    endings = words(completions, add_special_tokens=False).input_ids
    return [
        (prompt, np.array([*ids, words.eos_token_id], np.int32))
        for prompt, ids in zip(
            encode_prompts(prompts, words, data, "keep_start"), endings, strict=True
        )
    ]


def same_policy(path, batch_size, mesh) -> Callable:
    """The reward model of this run, on the very tokens that the policy sampled."""
    score = _scorer(loading.open_checkpoint(path, head="reward"), batch_size, mesh)
    return lambda _prompts, _completions, tokens: score(tokens)


def _scorer(model: loading.Checkpoint, batch_size: int, mesh) -> Callable:
    """(prompt, completion) ids -> a reward model's scores."""
    params = model.load_params(mesh)
    shards = sharding.batch_shards(mesh)
    batch_size = sharding.whole_shards(batch_size, mesh)

    def score(tokens) -> np.ndarray:
        if not tokens:
            return np.zeros(0)
        model.check(
            Examples(
                *zip(
                    *[
                        (prompt, (completion,), f"completion {number} of those to score")
                        for number, (prompt, completion) in enumerate(tokens, 1)
                    ],
                    strict=True,
                )
            )
        )
        longest = (
            -(-max(len(prompt) + len(completion) for prompt, completion in tokens) // LENGTHS)
            * LENGTHS
        )
        widest = (np.zeros(0, np.int32), (np.zeros(longest, np.int32),))
        shape = packing.shape_of([widest] * (batch_size // shards))
        batches = Batches(
            [(prompt, (completion,)) for prompt, completion in tokens],
            evaluation_order(len(tokens), batch_size),
            shards=shards,
            shape=shape,
        )
        found = np.zeros(len(tokens))
        with jax.set_mesh(mesh):
            for step in range(len(batches)):
                batch = sharding.shard_batch(
                    mesh, jax.tree.map(lambda x: x[0], batches[step]), axis=0
                )
                rows = batches.indices(step)
                found[rows[rows >= 0]] = np.asarray(_scores(model.config, params, batch)).ravel()[
                    rows >= 0
                ]
        return found

    return score


@functools.partial(jax.jit, static_argnums=0)
def _scores(model, params, batch):
    return sharding.constrain(response_rewards(model, params, batch))
