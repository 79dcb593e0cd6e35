"""The toy's exact results: reward and KL during training, the final table, and the picture."""

import pathlib

import numpy as np

from dpo_jax.console import say
from dpo_jax.data import toy
from dpo_jax.evaluation import exact, plots
from dpo_jax.models.loading import Model
from dpo_jax.training import metrics
from dpo_jax.workdir import write_json

CURVE_POINTS = 200  # at which the picture shows the bound


def probe(reference: Model, reward: str):
    """Return a function from params to exact "frontier/reward" and "frontier/kl".

    The training loop calls it at each evaluation. The KL is to the reference.
    """
    reference_PC, rewards_PC = exact_reference(reference, reward)

    def measure(params) -> dict[str, float]:
        policy_PC = exact.enumerate_log_probs(reference.config, params, toy.PROMPTS)
        reward, kl = exact.reward_and_kl(policy_PC, reference_PC, rewards_PC)
        return {"frontier/reward": float(reward), "frontier/kl": float(kl)}

    return measure


def write(
    folder: pathlib.Path,
    trained: list[pathlib.Path],
    reference: Model,
    reward: str,
    beta: float | None,
    *,
    is_moved: bool = False,
) -> dict:
    """Write toy.json and toy.png from a stage's metrics, print the table, return the values.

    trained: the stage's folder in each round so far. reference: where that stage started in round
    1. reward: a name in toy.REWARDS. beta: of a loss whose optimum is known; None for others.
    is_moved: each round's reference is the policy of the round before.
    """
    reference_PC, rewards_PC = exact_reference(reference, reward)
    start, _ = exact.reward_and_kl(reference_PC, reference_PC, rewards_PC)
    trajectories = [_trajectory(stage) for stage in trained]
    _, reward, kl = trajectories[-1][-1]
    rounds = len(trained)
    # The optimum of a round is its reference times exp(reward / beta), so k rounds whose reference
    # moves end at the optimum of beta / k (eq. 4, k times).
    strength = beta / rounds if beta and is_moved else beta
    optimum = exact.optimum(reference_PC, rewards_PC, strength) if beta else None
    reached = [kl for trajectory in trajectories for _, _, kl in trajectory]
    if optimum:
        reached.append(optimum[1])
    largest = 1.15 * max(reached)
    kls = largest * np.linspace(0, 1, CURVE_POINTS) ** 2  # denser near 0, where the bound is steep
    bound = float(exact.bound(reference_PC, rewards_PC, [kl])[0])
    result = dict(reward=reward, kl=kl, bound_reward=bound, gap=bound - reward)
    if optimum:
        analytic = dict(analytic_reward=float(optimum[0]), analytic_kl=float(optimum[1]))
        result = dict(beta=beta) | analytic | result
    title = f"DPO on the toy, β = {beta:g}" if beta else f"{trained[-1].name} on the toy"
    plots.frontier(
        folder / "toy.png",
        curve=(kls, exact.bound(reference_PC, rewards_PC, kls)),
        reference=start,
        trajectories=trajectories,
        optimum=optimum,
        title=title if rounds == 1 else f"{title}, {rounds} rounds",
    )
    write_json(folder / "toy.json", result)
    ends = [trajectory[-1] for trajectory in trajectories]
    say(_table(result, float(start), ends))
    say(f"evaluate: {folder / 'toy.json'}, {folder / 'toy.png'}")
    return result


def _trajectory(trained: pathlib.Path) -> list[tuple[int, float, float]]:
    """Return (step, reward, KL) of each evaluation in a stage's folder."""
    return [
        (row["step"], row["frontier/reward"], row["frontier/kl"])
        for row in metrics.read_rows(trained / "metrics.jsonl")
        if "frontier/kl" in row
    ]


def exact_reference(model: Model, reward: str):
    """Return the reference's log-probs of all completions and their rewards, each [P, C]."""
    log_probs_PC = exact.enumerate_log_probs(model.config, model.params, toy.PROMPTS)
    rewards_PC = toy.REWARDS[reward](toy.PROMPTS, toy.completions())
    return log_probs_PC, rewards_PC


def _table(result: dict, start: float, ends: list[tuple[int, float, float]]) -> str:
    """Return the results as a table; ends: (step, reward, KL) at the end of each round so far."""
    rows = [("reference", start, 0.0)]
    for number, (_, reward, kl) in enumerate(ends[:-1], 1):
        rows.append((f"policy after round {number}", reward, kl))
    name = f"policy after round {len(ends)}" if len(ends) > 1 else "policy"
    rows.append((name, result["reward"], result["kl"]))
    rows.append(("best at the policy's KL", result["bound_reward"], result["kl"]))
    if "beta" in result:
        name = f"optimum at beta {result['beta']:g}"
        if len(ends) > 1:
            name += f", round {len(ends)}"
        rows.append((name, result["analytic_reward"], result["analytic_kl"]))
    lines = [f"{'exact, over all completions':<30}{'reward':>9}{'KL, nats':>10}"]
    for name, reward, kl in rows:
        lines.append(f"{name:<30}{reward:>9.4f}{kl:>10.4f}")
    return "\n".join(lines)
