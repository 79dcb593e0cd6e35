"""Reward models trained with dpo_jax: the reward of a completion, read at its last token."""

import dataclasses
import datetime
import functools
import itertools
import math
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax import config as configs
from dpo_jax.console import warn
from dpo_jax.data import packing
from dpo_jax.data.examples import Example, Examples
from dpo_jax.data.rows import TextExample
from dpo_jax.data.tokenizer import encode
from dpo_jax.models import loading
from dpo_jax.models.inference import map_responses
from dpo_jax.models.log_probs import by_example
from dpo_jax.models.values import response_rewards
from dpo_jax.parallel import sharding
from dpo_jax.sampling.prompts import Prompts, completion_texts

# Lengths are rounded up to a multiple of this many tokens, so that few programs are compiled.
LENGTHS = 32


def any_policy(path: str, batch_size: int, mesh) -> Callable:
    """Return the reward of a model trained with dpo_jax, for completions of any policy.

    It reads the very tokens that the policy sampled where they are its own tokenizer's. Otherwise
    it reads the texts, tokenised as for training: without special tokens, and each completion with
    an EOS.
    """
    checkpoint = loading.open_checkpoint(path, head="reward")
    reward_tokens = _token_reward(checkpoint, batch_size, mesh)
    has_warned = False

    def reward(prompts, completions, tokens) -> np.ndarray:
        nonlocal has_warned
        if tokens is None:  # texts that are not a policy's samples
            return reward_tokens(_tokenised(checkpoint.tokenizer, _of_texts(prompts, completions)))
        if _is_spelled(checkpoint.tokenizer, prompts, completions, tokens):
            return reward_tokens(tokens)
        if not has_warned:
            has_warned = True
            warn(
                f"the reward model {path} has another tokenizer than the policy. It reads the "
                "texts, tokenised again: without special tokens (a chat's), each with an EOS."
            )
        return reward_tokens(_tokenised(checkpoint.tokenizer, _of_texts(prompts, completions)))

    return reward


def of_examples(path: str, batch_size: int, mesh, data, date: datetime.date) -> Callable:
    """Return the reward of a model trained with dpo_jax, of examples with one response each.

    Chat messages go through the model's own template. data: the data block of the config that the
    examples were read by. date: what templates take for today.
    """
    checkpoint = loading.open_checkpoint(path, head="reward")
    reward_tokens = _token_reward(checkpoint, batch_size, mesh)

    def reward(texts: list[TextExample]) -> np.ndarray:
        return reward_tokens(_tokenised(checkpoint.tokenizer, texts, data, date))

    return reward


def same_policy(path: str, batch_size: int, mesh) -> Callable:
    """Return the reward of this run's reward model, on the very tokens that the policy sampled."""
    checkpoint = loading.open_checkpoint(path, head="reward")
    reward_tokens = _token_reward(checkpoint, batch_size, mesh)

    def reward(_prompts, _completions, tokens) -> np.ndarray:
        return reward_tokens(tokens)

    return reward


def _is_spelled(tokenizer, prompts: list[str], completions: list[str], tokens: list[tuple]) -> bool:
    """Return whether (prompt, completion) ids are a tokenizer's own for these texts.

    They are where it decodes them to the texts, and a completion that ends in a special token ends
    in its EOS.
    """
    ids = [prompt for prompt, _ in tokens]
    decoded = Prompts(ids, tokenizer.batch_decode(ids, skip_special_tokens=True))
    if decoded.texts != list(prompts):
        return False
    sampled = [completion for _, completion in tokens]
    last = {int(completion[-1]) for completion in sampled if len(completion)}
    if not last & set(tokenizer.all_special_ids) <= {tokenizer.eos_token_id}:
        return False
    return completion_texts(decoded, sampled, tokenizer) == list(completions)


def _of_texts(prompts: list[str], completions: list[str]) -> list[TextExample]:
    """Return an example for each prompt and completion."""
    texts = []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
        texts.append(TextExample(prompt, (completion,), f"completion {number}"))
    return texts


def _tokenised(
    tokenizer, texts: list[TextExample], data=None, date: datetime.date | None = None
) -> list[tuple]:
    """Return (prompt, completion) ids of examples, encoded as for training, and not cut.

    data: a config's data block; without one its defaults. date: what chat templates take for today.
    """
    if not texts:
        return []
    settings = (data or configs.default(()).data).copy_and_resolve_references()
    # An example that is dropped would have no reward.
    settings.update(append_eos=True, max_length=2**30, max_prompt_length=2**29, on_bad_row="error")
    examples, _ = encode(texts, tokenizer, settings, "keep_start", date=date, keep_all=True)
    return [(example.prompt, example.responses[0]) for example in examples]


def _token_reward(checkpoint: loading.Checkpoint, batch_size: int, mesh) -> Callable:
    """Return a function from (prompt, completion) ids to a reward model's rewards, float64 [n]."""
    params = checkpoint.load_params(mesh)
    function = functools.partial(_rewards, checkpoint.config, params)
    shards = sharding.batch_shards(mesh)
    in_shard = sharding.whole_shards(batch_size, mesh) // shards

    def reward_tokens(tokens: list[tuple]) -> np.ndarray:
        if not tokens:
            return np.zeros(0)
        # Completions of a prompt that stand together are one example, which reads it once.
        n = _completions_per_prompt(tokens, in_shard)
        examples = Examples()
        for first in range(0, len(tokens), n):
            prompt, _ = tokens[first]
            completions = [completion for _, completion in tokens[first : first + n]]
            examples.append(prompt, completions, f"completion {first + 1} of those to score")
        checkpoint.check(examples)
        shape = _shape_of_any(examples, in_shard // n, checkpoint.config.window)
        found = map_responses(
            function, examples, mesh, batch_size=in_shard // n * shards, shape=shape
        )
        rewards_PK = np.zeros((len(examples), n))
        for indices, values_PK in found:
            rewards_PK[indices] = values_PK
        return rewards_PK.ravel()

    return reward_tokens


def _completions_per_prompt(tokens: list[tuple], most: int) -> int:
    """Return how many completions of a prompt make an example: a divisor of all that there are.

    tokens: (prompt, completion) ids. Only completions that follow one another count. most: of them.
    """
    prompts = [prompt.tobytes() for prompt, _ in tokens]
    n = math.gcd(*[len(list(equal)) for _, equal in itertools.groupby(prompts)])
    return max(divisor for divisor in range(1, min(n, most) + 1) if n % divisor == 0)


def _shape_of_any(examples: Examples, count: int, window: int | None) -> packing.Shape:
    """Return a shape for any batch of `count` examples with prompts and completions like these.

    It has room for the longest, rounded up, so that other texts need no other program.
    """

    def round_up(length):
        return -(-int(length) // LENGTHS) * LENGTHS

    prompt_P, response_PK, _ = examples.lengths()
    responses = response_PK.shape[1]
    if responses == 1:
        # Nothing is shared, so only the whole length counts.
        longest = (0, round_up((prompt_P + response_PK[:, 0]).max()))
    else:
        longest = (round_up(prompt_P.max()), round_up(response_PK.max()))
    made_up = []
    for number in range(count):
        # All differ, as in the batch that needs the most.
        prompt, *completions = [
            np.full(longest[min(part, 1)], number * responses + part, np.int32)
            for part in range(1 + responses)
        ]
        made_up.append(Example(prompt, tuple(completions)))
    # In one bucket all rows are as long as the longest.
    shape = packing.shape_of(made_up, buckets=1, window=window)
    # Several examples may be of one prompt, which is then in as many rows as they take.
    rows_of_prompt = -(-count * responses // max(shape.responses_per_row, 1))
    return dataclasses.replace(shape, slots_per_token=rows_of_prompt)


@functools.partial(jax.jit, static_argnums=0)
def _rewards(config, params, batch):
    return sharding.constrain(by_example(response_rewards(config, params, batch), batch))
