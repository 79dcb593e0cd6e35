"""The `best_of_n` stage: the completion that a reward ranks highest among N of a policy, for each
N.

Letters: P prompts, M samples of each, as many as the largest N.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

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
    """Samples as many as the largest N for each prompt; writes best_of_n.json and
    completions.jsonl.

    true, ranking: rewards; the true one of the best by the ranking one is reported. counts: the
    values of N, each estimated from all samples.
    """
    sampling = dataclasses.replace(sampling, n=max(counts))
    rows = rollouts.complete(model, prompts, true, sampling, folder)
    asked = [row["prompt"] for row in rows for _ in row["completions"]]
    texts = [completion["text"] for row in rows for completion in row["completions"]]
    tokens = [
        (np.array(row["tokens"], np.int32), np.array(completion["tokens"], np.int32))
        for row in rows
        for completion in row["completions"]
    ]
    true_PM = np.array(
        [[completion["reward"] for completion in row["completions"]] for row in rows]
    )
    ranked_PM = true_PM if ranking is true else ranking(asked, texts, tokens).reshape(true_PM.shape)
    result = [dict(n=n) | frontier.best_of_n(true_PM, ranked_PM, n) for n in counts]
    write_json(folder / "best_of_n.json", result)
    for row in result:
        say("best_of_n: " + json.dumps(row))
    return dict(best_of_n=result)
