"""Best of N: the completion that a reward ranks highest among N of a policy, for each N."""

import json
import pathlib
from collections.abc import Callable

import numpy as np

from dpo_jax import pairs, sampler, stages
from dpo_jax.metrics import Progress, say
from dpo_jax.prompts import Prompts


def write(folder: pathlib.Path, model, mesh, params, prompts: Prompts, tokenizer, true: Callable, ranking: Callable, *,
          counts, sampling, seed: int, eos_id: int | None) -> dict:
    """Samples as many as the largest N for each prompt; writes best_of_n.json and completions.jsonl.

    true, ranking: rewards; the true one of the best by the ranking one is reported. counts: the values of N.
    """
    progress = Progress("best_of_n", 0, len(prompts), unit="prompt")
    drawn = sampler.sample(
        model, mesh, params, prompts.ids, sampler.Sampling(sampling.max_new_tokens), seed=seed, eos_id=eos_id,
        n=max(counts), batch_size=sampling.batch_size, progress=lambda done, _total: progress.update(done, {}))
    progress.close()
    rows = pairs.score(prompts, drawn, tokenizer, true)
    stages.write_lines(folder / "completions.jsonl", rows)
    true_PN = np.array([[completion["reward"] for completion in row["completions"]] for row in rows])
    ranked_PN = true_PN
    if ranking is not true:
        ranked_PN = np.array([[completion["reward"] for completion in row["completions"]]
                              for row in pairs.score(prompts, drawn, tokenizer, ranking)])
    result = [dict(n=n) | best(true_PN[:, :n], ranked_PN[:, :n]) for n in counts]
    stages.write_json(folder / "best_of_n.json", result)
    for row in result:
        say("best_of_n: " + json.dumps(row))
    return dict(best_of_n=result)


def best(true_PN, ranked_PN) -> dict:
    """Mean true reward of each prompt's best by rank, its standard error, and the KL of best-of-N to its policy.

    The KL is log N - (N - 1) / N, exact where no two completions tie and an upper bound otherwise.
    """
    n = true_PN.shape[1]
    reward_P = np.take_along_axis(true_PN, ranked_PN.argmax(axis=1)[:, None], axis=1)[:, 0]
    return dict(reward=float(reward_P.mean()), reward_se=float(reward_P.std(ddof=1) / np.sqrt(len(reward_P))),
                kl=float(np.log(n) - (n - 1) / n))
