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
    trained: pathlib.Path,
    reference: Model,
    reward: str,
    beta: float | None,
) -> dict:
    """Write toy.json and toy.png from a stage's metrics, print the table, return the values.

    trained: the stage's folder. reference: where that stage started.
    reward: a name in toy.REWARDS. beta: of DPO, whose optimum is known; None for other methods.
    """
    reference_PC, rewards_PC = exact_reference(reference, reward)
    start, _ = exact.reward_and_kl(reference_PC, reference_PC, rewards_PC)
    trajectory = [
        (row["step"], row["frontier/reward"], row["frontier/kl"])
        for row in metrics.read_rows(trained / "metrics.jsonl")
        if "frontier/kl" in row
    ]
    _, reward, kl = trajectory[-1]
    optimum = exact.optimum(reference_PC, rewards_PC, beta) if beta else None
    reached = [kl for _, _, kl in trajectory]
    if optimum:
        reached.append(optimum[1])
    largest = 1.15 * max(reached)
    kls = largest * np.linspace(0, 1, CURVE_POINTS) ** 2  # denser near 0, where the bound is steep
    bound = float(exact.bound(reference_PC, rewards_PC, [kl])[0])
    result = dict(reward=reward, kl=kl, bound_reward=bound, gap=bound - reward)
    if optimum:
        analytic = dict(analytic_reward=float(optimum[0]), analytic_kl=float(optimum[1]))
        result = dict(beta=beta) | analytic | result
    plots.frontier(
        folder / "toy.png",
        curve=(kls, exact.bound(reference_PC, rewards_PC, kls)),
        reference=start,
        trajectory=trajectory,
        optimum=optimum,
        title=f"DPO on the toy, β = {beta:g}" if beta else f"{trained.name} on the toy",
    )
    write_json(folder / "toy.json", result)
    say(_table(result, float(start)))
    say(f"evaluate: {folder / 'toy.json'}, {folder / 'toy.png'}")
    return result


def exact_reference(model: Model, reward: str):
    """Return the reference's log-probs of all completions and their rewards, each [P, C]."""
    log_probs_PC = exact.enumerate_log_probs(model.config, model.params, toy.PROMPTS)
    rewards_PC = toy.REWARDS[reward](toy.PROMPTS, toy.completions())
    return log_probs_PC, rewards_PC


def _table(result: dict, start: float) -> str:
    rows = [
        ("reference", start, 0.0),
        ("policy", result["reward"], result["kl"]),
        ("best at the policy's KL", result["bound_reward"], result["kl"]),
    ]
    if "beta" in result:
        name = f"optimum at beta {result['beta']:g}"
        rows.append((name, result["analytic_reward"], result["analytic_kl"]))
    lines = [f"{'exact, over all completions':<30}{'reward':>9}{'KL, nats':>10}"]
    for name, reward, kl in rows:
        lines.append(f"{name:<30}{reward:>9.4f}{kl:>10.4f}")
    return "\n".join(lines)
