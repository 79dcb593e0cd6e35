"""Reward models trained with dpo_jax: the reward of a completion, read at its last token."""

import dataclasses
import datetime
import functools
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax import config as configs
from dpo_jax.console import warn
from dpo_jax.data import packing
from dpo_jax.data.examples import Examples
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
SHOWN_BATCHES = 10  # a reward of more batches at once shows its progress


def any_policy(path: str, batch_size: int, mesh) -> Callable:
    """Return the reward of a model trained with dpo_jax, for completions of any policy.

    It reads the very tokens that the policy sampled where they are its own tokenizer's. Otherwise
    it reads the texts, tokenised as for training: without special tokens, and each completion with
    an EOS.
    """
    checkpoint = loading.open_checkpoint(path, head="reward")
    reward_tokens = token_reward(checkpoint, batch_size, mesh)
    has_warned = False

    def reward(prompts, completions, tokens, _conversations=None) -> np.ndarray:
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
    checkpoint = loading.open_checkpoint(path, head="reward", max_length=data.max_length)
    reward_tokens = token_reward(checkpoint, batch_size, mesh)

    def reward(texts: list[TextExample]) -> np.ndarray:
        return reward_tokens(_tokenised(checkpoint.tokenizer, texts, data, date))

    return reward


def same_policy(path: str, batch_size: int, mesh) -> Callable:
    """Return the reward of this run's reward model, on the very tokens that the policy sampled."""
    checkpoint = loading.open_checkpoint(path, head="reward")
    reward_tokens = token_reward(checkpoint, batch_size, mesh)

    def reward(_prompts, _completions, tokens, _conversations=None) -> np.ndarray:
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


def token_reward(checkpoint: loading.Checkpoint, batch_size: int, mesh) -> Callable:
    """Return a function from (prompt, completion) ids to a reward model's rewards, float64 [n]."""
    params = checkpoint.load_params(mesh)
    function = functools.partial(_rewards, checkpoint.config, params)
    shards = sharding.batch_shards(mesh)
    in_shard = sharding.whole_shards(batch_size, mesh) // shards

    def reward_tokens(tokens: list[tuple]) -> np.ndarray:
        if not tokens:
            return np.zeros(0)
        # Completions of a prompt are in one batch, which reads it once.
        examples = Examples()
        for number, (prompt, completion) in enumerate(tokens, 1):
            examples.append(prompt, (completion,), f"completion {number} of those to score")
        checkpoint.check(examples)
        longest = _Longest.of(examples)

        def shape_for(prompts: int) -> packing.Shape:
            return _shape_of_any(longest, prompts, in_shard, checkpoint.config.narrowest_window)

        in_batch = in_shard * shards
        # Best of N asks for thousands of rewards at once, a step of PPO for few.
        name = "reward model" if len(tokens) > SHOWN_BATCHES * in_batch else ""
        found = map_responses(
            function, examples, mesh, batch_size=in_batch, shape_for=shape_for, name=name
        )
        rewards_P = np.zeros(len(examples))
        for indices, values_P1 in found:
            rewards_P[indices] = values_P1[:, 0]
        return rewards_P

    return reward_tokens


@dataclasses.dataclass(frozen=True)
class _Longest:
    """The longest parts of some examples, in tokens, rounded up to multiples of LENGTHS."""

    prompt: int
    completion: int
    whole: int  # both together

    @classmethod
    def of(cls, examples: Examples) -> "_Longest":
        """Return those of examples of one completion each."""

        def round_up(lengths):
            return max(-(-int(lengths.max()) // LENGTHS), 1) * LENGTHS

        prompt_P, completion_P1, _ = examples.lengths()
        completion_P = completion_P1[:, 0]
        return cls(
            prompt=round_up(prompt_P),
            completion=round_up(completion_P),
            whole=round_up(prompt_P + completion_P),
        )


def _shape_of_any(
    longest: _Longest, prompts: int, completions: int, window: int | None
) -> packing.Shape:
    """Return a shape for any completions of so many prompts at most, however many each has.

    window: of the model's attention. Lengths and prompts are rounded up, so that other texts need
    few other programs.
    """
    # To 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on.
    step = 1 << max(prompts.bit_length() - 2, 0)
    prompts = min(-(-prompts // step) * step, completions)
    tokens = min(
        prompts * longest.prompt + completions * longest.completion, completions * longest.whole
    )
    rows = packing.RowShape(completions, 0, 1, longest.whole)
    responses_per_row = 0
    slots_per_token = completions  # all may be of one prompt

    # As many as there are on average; each prompt may have one row that is not full.
    in_row = min(-(-completions // prompts), packing.MOST_RESPONSES)
    rows_of_prompts = prompts + (completions - prompts) // in_row
    in_parts = packing.RowShape(rows_of_prompts, longest.prompt, in_row, longest.completion)
    is_seen_whole = window is None or longest.prompt + longest.completion <= window
    if in_row > 1 and is_seen_whole and in_parts.scores < packing.WORTH_IT * rows.scores:
        rows = in_parts
        responses_per_row = in_row
        slots_per_token = -(-completions // in_row)
    return packing.Shape(
        tokens=tokens,
        rows=(rows,),
        responses_per_row=responses_per_row,
        completion_tokens=completions * longest.completion,
        examples=completions,
        responses=completions,
        slots_per_token=min(slots_per_token, packing.MOST_SLOTS + 1),
    )


@functools.partial(jax.jit, static_argnums=0)
def _rewards(config, params, batch):
    return sharding.constrain(by_example(response_rewards(config, params, batch), batch))
