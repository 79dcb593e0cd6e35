"""The frontier of the optimal policies, and best of N, estimated from samples of the reference and
their rewards.

Where completions cannot be enumerated (`exact.py`), M of them for each prompt stand for all: the
optimum for a beta, reference exp(reward / beta) / Z (eq. 4), gives each sample the weight
exp(reward / beta) / sum.

Letters: P prompts, M samples of the reference for each, in any order; B betas.
"""

import math

import numpy as np

BETAS = np.geomspace(1e3, 1e-3, 400)
UNTRUSTED = 2.0  # nats below log M; e^2, about 7 samples, carry the weight there


def frontier(rewards_PM) -> tuple[np.ndarray, np.ndarray]:
    """KLs and expected rewards of the optima, from KL 0 on: the highest reward at each KL, as far
    as M samples tell.

    M samples hide what is rarer than 1 in M: no KL above log M can be found, and log Z and the
    curve come out too low (Jensen). So it ends where the mean KL passes log M - 2; there it is low
    by 0.1 deviations of a normal reward. Raises ValueError for less than 8 samples, of which
    nothing would be left.
    """
    samples = rewards_PM.shape[1]
    trusted = math.log(samples) - UNTRUSTED
    if trusted < 0:
        raise ValueError(
            f"{samples} samples for each prompt are too few to estimate a frontier from: it needs 8 at "
            f"least, and reaches KL log(samples) - {UNTRUSTED:g}."
        )
    kls_B, rewards_B = np.array([_optimum(rewards_PM, beta) for beta in BETAS]).T
    return kls_B[kls_B <= trusted], rewards_B[kls_B <= trusted]


def _optimum(rewards_PM, beta: float) -> tuple[float, float]:
    """KL and reward of the optimum for a beta, means over prompts."""
    log_weights_PM = rewards_PM / beta
    log_weights_PM = log_weights_PM - np.logaddexp.reduce(log_weights_PM, axis=-1, keepdims=True)
    weights_PM = np.exp(log_weights_PM)
    kl_P = (weights_PM * log_weights_PM).sum(axis=-1) + math.log(rewards_PM.shape[1])
    return kl_P.mean(), (weights_PM * rewards_PM).sum(axis=-1).mean()


def best_of_n(rewards_PM, ranking_PM, n: int) -> dict[str, float]:
    """Mean true reward of the best of n samples by a ranking reward, its standard error, and an
    upper bound of its KL.

    The reward is the mean over all subsets of n of the M samples, so unbiased: the m-th sample from
    below is the best of C(m - 1, n - 1) of the C(M, n). The KL, log n - (n - 1) / n, is exact where
    no two samples tie. Raises ValueError where n is not 1 to M.
    """
    samples = rewards_PM.shape[1]
    if not 1 <= n <= samples:
        raise ValueError(
            f"best of {n}: there are {samples} samples for each prompt; take 1 to {samples}, "
            "or draw more."
        )
    share_M = np.array([math.comb(m, n - 1) / math.comb(samples, n) for m in range(samples)])
    ordered_PM = np.take_along_axis(rewards_PM, ranking_PM.argsort(axis=-1, kind="stable"), axis=-1)
    reward_P = np.einsum("PM,M->P", ordered_PM, share_M)
    return dict(
        reward=float(reward_P.mean()),
        reward_se=float(reward_P.std(ddof=1) / math.sqrt(len(reward_P))),
        kl=math.log(n) - (n - 1) / n,
    )
