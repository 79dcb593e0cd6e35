"""The toy's exact results: reward and KL at each evaluation, the end table, and the picture."""

import pathlib

from dpo_jax import metrics, stages
from dpo_jax.data import toy
from dpo_jax.evaluation import exact


def probe(model, reference_params):
    """params -> {"toy/reward", "toy/kl"}, exact, against the reference; for `fit` to call at each evaluation."""
    reference_PC = exact.enumerate_logps(model.config, reference_params, toy.PROMPTS)
    rewards_PC = toy.rewards(toy.PROMPTS, toy.completions())

    def measure(params) -> dict[str, float]:
        policy_PC = exact.enumerate_logps(model.config, params, toy.PROMPTS)
        reward, kl = exact.reward_and_kl(policy_PC, reference_PC, rewards_PC)
        return {"toy/reward": float(reward), "toy/kl": float(kl)}
    return measure


def write(folder: pathlib.Path, trained: pathlib.Path, model, reference_params, beta: float) -> dict:
    """Writes toy.json and toy.png from a dpo stage's rows, and shows the table; returns what toy.json holds.

    trained: the dpo stage's folder. model, reference_params: what that stage started from.
    """
    reference_PC = exact.enumerate_logps(model.config, reference_params, toy.PROMPTS)
    rewards_PC = toy.rewards(toy.PROMPTS, toy.completions())
    trajectory = [(row["step"], row["toy/reward"], row["toy/kl"])
                  for row in metrics.read_rows(trained / "metrics.jsonl") if "toy/kl" in row]
    _, reward, kl = trajectory[-1]
    best_reward, best_kl = exact.optimum(reference_PC, rewards_PC, beta)
    bound = float(exact.bound(reference_PC, rewards_PC, [kl])[0])
    result = dict(beta=beta, reward=reward, kl=kl, analytic_reward=float(best_reward), analytic_kl=float(best_kl),
                  bound_reward=bound, gap=bound - reward)
    stages.write_json(folder / "toy.json", result)
    return result
