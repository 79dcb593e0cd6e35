"""The `best_of_n` stage: of N completions, take the one that a reward ranks highest.

Letters: P prompts, M samples per prompt, as many as the largest N.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from dpo_jax import costs
from dpo_jax.console import say
from dpo_jax.evaluation import frontier
from dpo_jax.models.loading import Model
from dpo_jax.sampling import rollouts
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.workdir import write_json


def write(
    folder: pathlib.Path,
    model: Model,
    prompts: Prompts,
    true: Callable,
    ranking: Callable,
    counts: Sequence[int],
    sampling: Sampling,
) -> dict:
    """Sample as many completions as the largest N; write best_of_n.json and completions.jsonl.

    ranking: the reward that picks the best completion. true: the reward that is reported for it.
    counts: the values of N, each estimated from all samples.
    """
    sampling = dataclasses.replace(sampling, n=max(counts))
    rows = rollouts.complete(model, prompts, true, sampling, folder)
    costs.write_work(folder, rollouts.work_of(model.config, rows))
    prompt_texts = []
    texts = []
    tokens = []
    true_rewards = []
    for row in rows:
        prompt_ids = np.array(row["tokens"], np.int32)
        for completion in row["completions"]:
            prompt_texts.append(row["prompt"])
            texts.append(completion["text"])
            tokens.append((prompt_ids, np.array(completion["tokens"], np.int32)))
            true_rewards.append(completion["reward"])
    true_PM = np.array(true_rewards).reshape(len(rows), -1)
    ranked_PM = true_PM
    if ranking is not true:
        ranked_PM = ranking(prompt_texts, texts, tokens).reshape(true_PM.shape)
    result = []
    for n in counts:
        result.append(dict(n=n) | frontier.best_of_n(true_PM, ranked_PM, n, prompts.clusters))
    write_json(folder / "best_of_n.json", result)
    for row in result:
        say("best_of_n: " + json.dumps(row))
    return dict(best_of_n=result)
