"""Text in, text out: what the command `sample` and `Model.generate` share."""

import dataclasses
import datetime
from collections.abc import Iterator

import numpy as np

from dpo_jax import config as configs
from dpo_jax.console import warn
from dpo_jax.data import dataset
from dpo_jax.data.ledger import Counts
from dpo_jax.data.rows import TextExample
from dpo_jax.data.tokenizer import CHAT_LOSES, encode_prompts
from dpo_jax.models.loading import Model
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.sampling import beam, sampler
from dpo_jax.sampling.prompts import Prompts, completion_texts
from dpo_jax.sampling.sampler import Sampling


@dataclasses.dataclass(frozen=True)
class Generated:
    """A completion as text."""

    text: str  # what follows the prompt, without EOS
    log_prob: float  # summed over its tokens, EOS included, under the model itself, nats
    tokens: int  # how many, EOS included


def encode(
    texts: list[TextExample],
    tokenizer,
    config: TransformerConfig,
    sampling: Sampling,
    settings: dict,
    date: datetime.date | None = None,
) -> Prompts:
    """Tokenise prompts, and warn where some are cut.

    texts: examples whose responses are ignored. settings: fields of config.data;
    max_prompt_length=0 cuts only what the model has no positions for, as training cuts no prompt
    that fits with its response. date: what chat templates take for today; None: today. Raises
    ValueError for settings or prompts that cannot be sampled from.
    """
    data = configs.default(()).data
    data.update(source="local", append_eos=False, **settings)
    if not data.max_prompt_length:
        data.max_prompt_length = _room(config, sampling)
    data.max_length = data.max_prompt_length + sampling.max_new_tokens
    truncate = dataset.truncation(data)
    counts = Counts()
    ids = encode_prompts(texts, tokenizer, data, truncate, date=date, counts=counts)
    sampler.check(config, ids, sampling)
    if counts.prompts_truncated:
        warn(_cut_warning(texts, counts.prompts_truncated, data.max_prompt_length, truncate))
    longest = max(map(len, ids))
    if longest + sampling.max_new_tokens > config.max_positions:
        warn(
            f"up to {longest} + {sampling.max_new_tokens} tokens, but the model was made for "
            f"{config.max_positions}"
        )
    return Prompts(ids, tokenizer.batch_decode(ids, skip_special_tokens=True))


def _room(config: TransformerConfig, sampling: Sampling) -> int:
    """Return how many tokens a prompt may have, so that a completion fits behind it."""
    room = config.max_positions - sampling.max_new_tokens
    # Where nothing fits, the prompt is not to blame: the sampler says what is wrong.
    return room if room > 0 else config.max_positions


def _cut_warning(texts: list[TextExample], count: int, limit: int, truncate: str) -> str:
    """Return what to say of prompts that were cut."""
    told = f"{count} of {len(texts)} prompts are cut to max_prompt_length={limit} ({truncate})"
    if any(isinstance(text.prompt, list) for text in texts):
        told += f"; chat prompts lose {CHAT_LOSES[truncate]}"
    return told


def prompts_at_a_time(sampling: Sampling) -> int:
    """Return how many prompts one batch of completions takes."""
    return max(1, sampling.batch_size // max(sampling.n, sampling.beams))


def generate(
    model: Model, prompts: Prompts, sampling: Sampling, *, first: int = 0
) -> Iterator[list[list[Generated]]]:
    """Yield the completions of each prompt from `first` on, a batch of prompts at a time.

    A prompt's completions depend on its place among the prompts, not on `first`.
    """
    size = prompts_at_a_time(sampling)
    for start in range(first, len(prompts), size):
        part = prompts.take(range(start, min(start + size, len(prompts))))
        if sampling.beams:
            drawn = beam.search(model, part.ids, sampling)
        else:
            drawn = sampler.sample(model, part.ids, sampling, first=start)
        flat = [completion for completions in drawn for completion in completions]
        # Each completion is decoded after its own prompt.
        repeated = part.take(np.repeat(np.arange(len(part)), sampling.n))
        texts = completion_texts(
            repeated, [completion.tokens for completion in flat], model.tokenizer
        )
        made = [
            Generated(
                text,
                float(completion.log_probs.sum(dtype=np.float64)),
                len(completion.tokens),
            )
            for text, completion in zip(texts, flat, strict=True)
        ]
        yield [made[i : i + sampling.n] for i in range(0, len(made), sampling.n)]
