"""What the experiments on the toy share: their processes, and the exact bound of their runs."""

import contextlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable

import numpy as np

CURVE_POINTS = 200


def one_thread():
    """Give a process one thread: these steps are too small to share between cores.

    Nor does fusion pay for its compilation here, which would take a third of the time.
    """
    given = os.environ.get("XLA_FLAGS", "")
    ours = "--xla_cpu_multi_thread_eigen=false"
    # XLA ends a process whose flags it does not know, and newer versions do not know this one.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        ours += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{given} {ours}"
    from dpo_jax.parallel import processes

    processes.start()


def rows_of_tasks(make_rows: Callable, tasks: list[tuple], jobs: int) -> list[dict]:
    """Return the rows of all tasks, in their order; with several jobs, a process for each task.

    make_rows: takes the values of a task, and returns a list of rows.
    """
    if jobs == 1:
        found = [make_rows(*task) for task in tasks]
    else:
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(jobs, initializer=one_thread, maxtasksperchild=1) as pool:
            found = pool.starmap(make_rows, tasks, chunksize=1)
    return [row for part in found for row in part]


def first_policy(workdir: pathlib.Path, reward: str = "toy") -> tuple:
    """Return the log-probs and rewards of all completions, [P, C], of a run's SFT model."""
    return policy_of(str(workdir / "sft" / "hf"), reward)


def policy_of(model: str, reward: str = "toy") -> tuple:
    """Return the log-probs and rewards of all completions, [P, C], of the model in a folder."""
    from dpo_jax.evaluation.toy_report import exact_reference
    from dpo_jax.models import loading
    from dpo_jax.parallel import sharding

    checkpoint = loading.open_checkpoint(model)
    return exact_reference(checkpoint.load(sharding.make_mesh()), reward)


def learned_rewards(folder: pathlib.Path) -> np.ndarray:
    """Return what the reward model in a folder of runs gives to all completions, [P, C]."""
    from dpo_jax.data import toy
    from dpo_jax.parallel import sharding
    from dpo_jax.rewards import make

    reward = make.make_reward("rm", str(folder / "rm" / "hf"), 4096, sharding.make_mesh())
    completion_ids = toy.completions().astype(np.int32)
    learned = []
    for prompt in toy.PROMPTS:
        prompt_ids = np.array([prompt], np.int32)
        learned.append(reward((), (), [(prompt_ids, ids_T) for ids_T in completion_ids]))
    return np.stack(learned)


def bound_curve(reference_PC, rewards_PC, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Return KLs up to `largest` and the highest reward at each."""
    from dpo_jax.evaluation import exact

    kls = largest * np.linspace(0, 1, CURVE_POINTS) ** 2  # denser near 0, where it is steep
    return kls, exact.bound(reference_PC, rewards_PC, kls)


def evaluations_of(config, folder: pathlib.Path) -> tuple[list[dict], dict]:
    """Run a config of the toy, unless that is done; return its evaluations, and how it ended.

    evaluations: rows of metrics.jsonl that have the exact reward and KL, by metric, each with its
    step. The end is what evaluate/toy.json has: among others the optimum's reward and KL.
    """
    import dpo_jax
    from dpo_jax import stage_table
    from dpo_jax.training.metrics import read_rows

    with contextlib.redirect_stdout(io.StringIO()):
        folders = dpo_jax.run(config, folder)
    (stage,) = stage_table.policy_stages(config)
    rows = read_rows(folders[stage] / "metrics.jsonl")
    end = json.loads((folders["evaluate"] / "toy.json").read_text())
    return [row for row in rows if "frontier/kl" in row], end


def likeliest_reward(pairs: pathlib.Path) -> np.ndarray:
    """Return the reward under which a file's labels are the likeliest, of all completions, [P, C].

    By Bradley-Terry, among rewards that are sums of a number for each word after each other word:
    the toy's additive reward is one of them. Where it differs from the true reward, the labels
    are to blame, of which there are only so many, and no training.
    """
    from dpo_jax.data import toy
    from dpo_jax.workdir import read_lines

    prompts, chosen, rejected = [], [], []
    for row in read_lines(pairs):
        (prompt,), *responses = row["tokens"]
        prompts.append(prompt)
        chosen.append(responses[0])
        rejected.append(responses[1])
    prompts_N = np.array(prompts)
    features_NF = _followings(prompts_N, np.array(chosen)) - _followings(
        prompts_N, np.array(rejected)
    )
    numbers_F = _fit_bradley_terry(features_NF.astype(float))
    ids_CT = toy.completions()
    return np.stack(
        [_followings(np.full(len(ids_CT), prompt), ids_CT) @ numbers_F for prompt in toy.PROMPTS]
    )


def _followings(prompts_N: np.ndarray, ids_NT: np.ndarray) -> np.ndarray:
    """How often each word follows each other one, prompts included: [N, V * V]."""
    from dpo_jax.data import toy

    words = len(toy.WORDS)
    before_NT = np.column_stack([prompts_N, ids_NT[:, :-1]])
    found_NF = np.zeros((len(ids_NT), words**2), np.float32)
    every_row = np.arange(len(ids_NT))
    for following_N in (before_NT * words + ids_NT).T:
        # Within a place, a row has one following: no index comes twice.
        found_NF[every_row, following_N] += 1
    return found_NF


def _fit_bradley_terry(features_NF: np.ndarray) -> np.ndarray:
    """Fit numbers_F so that the first of each pair wins with sigmoid(features @ numbers): Newton's.

    A little of a ridge settles what no pair tells, such as what is added to all completions.
    """
    ridge_FF = 1e-3 * np.eye(features_NF.shape[1])
    numbers_F = np.zeros(features_NF.shape[1])
    for _ in range(50):
        doubt_N = 1 / (1 + np.exp(features_NF @ numbers_F))
        slope_F = features_NF.T @ doubt_N - ridge_FF @ numbers_F
        weights_N1 = (doubt_N * (1 - doubt_N))[:, None]
        step_F = np.linalg.solve((features_NF * weights_N1).T @ features_NF + ridge_FF, slope_F)
        numbers_F += step_F
        if np.abs(step_F).max() < 1e-9:
            return numbers_F
    raise ArithmeticError(
        "the labels have no likeliest reward: Newton's method has not settled in 50 steps. Labels "
        "that always prefer the higher reward have none."
    )
