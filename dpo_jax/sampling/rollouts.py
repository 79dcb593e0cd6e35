"""Completions of prompts with their rewards, kept as they are made.

Pairs, best of N and win rates begin with `complete`, PPO with `with_rewards`.
"""

import pathlib
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax.console import Progress, say
from dpo_jax.costs import Work
from dpo_jax.data.packing import Contents
from dpo_jax.models import flops
from dpo_jax.models.loading import Model
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import processes
from dpo_jax.sampling import prompts as prompts_lib
from dpo_jax.sampling import sampler
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.workdir import SealedRows, StageChanged, completions, is_of_other_rows

CHUNKS = 4  # sampling batches between two writes of completions.jsonl


def complete(
    model: Model,
    prompts: Prompts,
    reward: Callable | None,
    sampling: Sampling,
    folder: pathlib.Path,
) -> list[dict]:
    """Sample completions of all prompts and give each its reward, in rows as `with_rewards` makes.

    reward: None gives none.
    Rows are kept in the folder's completions.jsonl as they are made: a killed run resumes there.
    The model's weights are not read where all rows are there already.
    """
    # All prompts are checked before the first of them costs anything.
    sampler.check(model.config, prompts.ids, sampling)
    size = _prompts_at_once(sampling)
    kept, rows = so_far(prompts, sampling, folder)
    if len(rows) >= len(prompts):
        return rows[: len(prompts)]
    if rows:
        say(f"{folder.name}: resuming after {len(rows)} of {len(prompts)} prompts")
    progress = Progress(folder.name, len(rows), len(prompts), unit="prompt")
    for start in range(len(rows), len(prompts), size):
        chunk = prompts.take(range(start, min(start + size, len(prompts))))
        drawn = sampler.sample(model, chunk.ids, sampling, first=start)
        made = with_rewards(chunk, drawn, model.tokenizer, reward)
        if jax.process_index() == 0:
            kept.append(made)
        rows += made
        progress.update(len(rows), {})
    progress.close()
    return rows


def so_far(
    prompts: Prompts, sampling: Sampling, folder: pathlib.Path
) -> tuple[SealedRows, list[dict]]:
    """Return completions.jsonl and its rows; StageChanged where they are of other prompts."""
    kept = completions(folder, at_once=_prompts_at_once(sampling))
    # One process reads: it may cut the file.
    rows = processes.from_first(kept.read)
    for row, ids in zip(rows, prompts.ids, strict=False):
        if row.get("tokens") != ids.tolist():
            if is_of_other_rows(folder):
                raise StageChanged.with_other_rows(folder)
            raise StageChanged(
                f"the prompts of {folder} have changed since its first completions were sampled. "
                "Put the old data back, or give another --workdir."
            )
    return kept, rows


def _prompts_at_once(sampling: Sampling) -> int:
    """Return the prompts between two writes: whole batches, with all completions of a prompt."""
    return CHUNKS * max(1, sampling.batch_size // sampling.n)


def work_of(config: TransformerConfig, rows: list[dict]) -> Work:
    """Return what sampling the completions of some rows took; a reward's own work is left out.

    A prompt is read once for all its completions.
    """
    prompts = []
    contexts = []
    responses = []
    for row in rows:
        prompts.append(len(row["tokens"]))
        for completion in row["completions"]:
            contexts.append(len(row["tokens"]))
            responses.append(len(completion["tokens"]))
    sampled = sum(responses)
    contents = Contents(
        tokens=sum(prompts) + sampled,
        completion_tokens=sampled,
        prompt=np.array(prompts),
        context=np.array(contexts),
        response=np.array(responses),
    )
    needed = sum(flops.forward(config, contents).values())
    return Work(samples=len(responses), sampled_tokens=sampled, flops=needed)


def with_rewards(
    prompts: Prompts, drawn: list[list[sampler.Completion]], tokenizer, reward: Callable | None
) -> list[dict]:
    """Return a row for each prompt: prompt, tokens and completions (text, tokens, reward).

    drawn: n completions of each prompt. reward: None leaves the rewards out.
    """
    n = len(drawn[0])
    sampled = [completion.tokens for completions in drawn for completion in completions]
    repeated = prompts.take(np.repeat(np.arange(len(prompts)), n))
    texts = prompts_lib.completion_texts(repeated, sampled, tokenizer)
    tokens = list(zip(repeated.ids, sampled, strict=True))
    made = []
    for text, ids in zip(texts, sampled, strict=True):
        made.append(dict(text=text, tokens=ids.tolist()))
    if reward is not None:
        rewards = reward(repeated.texts, texts, tokens, repeated.conversations)
        for completion, value in zip(made, rewards, strict=True):
            completion["reward"] = float(value)
    rows = []
    for index, (prompt, ids) in enumerate(zip(prompts.texts, prompts.ids, strict=True)):
        of_prompt = made[index * n : (index + 1) * n]
        rows.append(dict(prompt=prompt, tokens=ids.tolist(), completions=of_prompt))
    return rows
