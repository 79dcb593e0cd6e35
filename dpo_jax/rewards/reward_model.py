"""Reward models trained with dpo_jax: the reward of a completion, read at its last token."""

import datetime
import functools
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

# Sequences are padded to a multiple of this many tokens, so that few programs are compiled.
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
    batch_size = sharding.whole_shards(batch_size, mesh)

    def reward_tokens(tokens: list[tuple]) -> np.ndarray:
        rewards = np.zeros(len(tokens))
        if not tokens:
            return rewards
        examples = Examples()
        for number, (prompt, completion) in enumerate(tokens, start=1):
            examples.append(prompt, (completion,), f"completion {number} of those to score")
        checkpoint.check(examples)
        # Room for sequences of the longest length, so that other texts need no other program.
        longest = max(len(prompt) + len(completion) for prompt, completion in tokens)
        padded = -(-longest // LENGTHS) * LENGTHS
        widest = Example(np.zeros(0, np.int32), (np.zeros(padded, np.int32),))
        count = batch_size // sharding.batch_shards(mesh)
        shape = packing.shape_of([widest] * count, share=False)
        found = map_responses(function, examples, mesh, batch_size=batch_size, shape=shape)
        for indices, rewards_PQ in found:
            rewards[indices] = rewards_PQ[:, 0]
        return rewards

    return reward_tokens


@functools.partial(jax.jit, static_argnums=0)
def _rewards(config, params, batch):
    return sharding.constrain(by_example(response_rewards(config, params, batch), batch))
