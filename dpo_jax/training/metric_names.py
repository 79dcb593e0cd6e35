"""Names of metrics: what each one means, and which are of an evaluation. Imports no jax.

Names are those of the paper's reference code: loss/train, rewards_train/margins, logps_eval/chosen.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Metric:
    """The meaning of a metric, and its unit."""

    unit: str  # "" for a number without one
    meaning: str
    lower_is_better: bool = False  # for keep_best


# Every name in a metrics.jsonl; {split} is "train", the step's own batch before the update, or
# "eval", all held-out examples.
METRICS = {
    # The objective.
    "loss/{split}": Metric(
        "",
        "What the stage minimises, mean over examples; over tokens for ppo, and for sft with "
        "loss=token_mean. DPO's sigmoid loss starts at log 2 = 0.6931.",
        lower_is_better=True,
    ),
    "nll_per_token/{split}": Metric(
        "nats",
        "Of sft: negative log-likelihood of the completions, mean over their tokens.",
        lower_is_better=True,
    ),
    # Pairs, and completions: a stage of single completions writes "chosen" alone.
    "rewards_{split}/chosen": Metric(
        "",
        "Of dpo and kto: beta times the log-ratio of policy to reference on the chosen response, "
        "the implicit reward (eq. 5). Of rm: the reward. Mean over pairs, as all of rewards_*; of "
        "kto over the desirable rows, left out where a batch has none.",
    ),
    "rewards_{split}/rejected": Metric("", "The same of the rejected response."),
    "rewards_{split}/margins": Metric(
        "", "Chosen minus rejected reward. Above 0 where the model prefers the chosen response."
    ),
    "rewards_{split}/accuracies": Metric(
        "share",
        "Pairs whose chosen reward is the higher one. A tie is no success, so DPO starts at 0.",
    ),
    "rewards_eval/accuracies_se": Metric(
        "share", "Standard error of the accuracy, clustered by prompt; left out for one prompt."
    ),
    "logps_{split}/chosen": Metric(
        "nats", "Log-probability of the chosen response, summed over its tokens; mean over pairs."
    ),
    "logps_{split}/rejected": Metric("nats", "The same of the rejected response."),
    "lengths_{split}/chosen": Metric(
        "tokens", "Tokens of the chosen response that are trained on."
    ),
    "lengths_{split}/rejected": Metric("tokens", "The same of the rejected response."),
    "dpo_{split}/gradient_weight": Metric(
        "",
        "Of dpo with the loss sigmoid: weight of a pair in the gradient, sigmoid of the rejected "
        "minus the chosen reward, mean over pairs. Starts at 0.5, and falls to 0 for pairs that "
        "the policy orders rightly.",
        lower_is_better=True,
    ),
    # KTO: "chosen" stands for the desirable rows above, and "rejected" for the others, each a mean
    # over the rows of that kind.
    "kto_{split}/kl": Metric(
        "nats",
        "Estimate of KL(policy || reference) that a row's log-ratio is compared with: the mean "
        "log-ratio of mismatched completions, at least 0; over the step's batch, or over all held "
        "out.",
    ),
    "kto_{split}/desirable": Metric("share", "Rows whose label is desirable."),
    # Experts, where a stage has a load-balancing loss.
    "router_{split}/imbalance": Metric(
        "",
        "Load-balancing loss of the routers, before its coefficient; not in loss. The experts of a "
        "token (k) where all get equally many, and up to the number of all experts. Over the "
        "step's batch; of what is held out, the mean over batches.",
        lower_is_better=True,
    ),
    # PPO: the completions of a step, then its updates.
    "ppo_train/reward": Metric("", "Reward of the sampled completions, mean over the step's."),
    "ppo_train/kl": Metric(
        "nats", "Log-ratio of policy to reference, summed over a completion; mean over the step's."
    ),
    "ppo_train/kl_coef": Metric("", "Weight of the KL penalty in this step."),
    "ppo_train/length": Metric("tokens", "Length of the sampled completions, mean."),
    "ppo_train/eos_rate": Metric("share", "Completions that ended by EOS, not by length."),
    "ppo_train/policy_loss": Metric("", "PPO's clipped policy loss, mean over tokens."),
    "ppo_train/value_loss": Metric("", "Half the squared error of the value, mean over tokens."),
    "ppo_train/clipped": Metric("share", "Tokens whose probability ratio is outside the clip."),
    "ppo_train/kl_to_sampler": Metric(
        "nats",
        "KL to the policy that sampled the step's completions, per token (Schulman's k3 estimate).",
    ),
    # The update.
    "grad_norm": Metric("", "Norm of the gradient over all weights, before it is clipped."),
    "param_norm": Metric("", "Norm of what is trained, after the update."),
    "update_norm": Metric("", "Norm of the change that the update makes, learning rate included."),
    "lr": Metric("", "Learning rate of the update, after warm-up and schedule."),
    # Counters and speed.
    "counters/examples": Metric("examples", "Examples read so far."),
    "counters/updates": Metric("updates", "Optimiser updates so far; ppo makes several a step."),
    "step_time": Metric("seconds", "Time of the step, evaluations and checkpoints left out."),
    "examples_per_second": Metric("examples/s", "Batch size over step_time."),
    "tokens_per_second": Metric(
        "tokens/s", "Real tokens read, each prompt once, or sampled (ppo), over step_time."
    ),
    "model_flops_utilization": Metric(
        "share",
        "FLOPs that the batch's real tokens need, over step_time and the peak of all devices: "
        "padding and recomputation count as waste. Not given for ppo.",
    ),
    # Reward and KL of the policy.
    "frontier/reward": Metric(
        "",
        "True reward of the policy: mean over sampled completions of held-out prompts, or exact "
        "(toy). Measured where an evaluate stage follows, as all of frontier/*.",
    ),
    "frontier/reward_se": Metric("", "Its standard error."),
    "frontier/kl": Metric(
        "nats",
        "KL(policy || reference) of whole completions: exact over the vocabulary at each sampled "
        "token and summed over tokens, or exact over all completions (toy).",
    ),
    "frontier/kl_se": Metric("nats", "Its standard error."),
    "frontier/kl_sampled": Metric(
        "nats", "The same KL estimated by log-ratios of the sampled tokens alone: noisier."
    ),
    "frontier/kl_sampled_se": Metric("nats", "Its standard error."),
    "frontier/length": Metric("tokens", "Length of those completions, mean."),
    "frontier/eos_rate": Metric("share", "Those completions that ended by EOS, not by length."),
    "frontier/repetition": Metric(
        "share", "3-grams of a completion's tokens that stood in it before, mean over completions."
    ),
}

# What differs between two equal runs.
TIMINGS = (
    "examples_per_second",
    "tokens_per_second",
    "step_time",
    "model_flops_utilization",
)

# Of several subsets, an evaluation has these for each too: rewards_eval/accuracies/SUBSET.
BY_SUBSET = ("loss", "nll_per_token", "rewards/accuracies", "rewards/margins")
# The same by the names of an evaluation.
WITH_SUBSETS = (
    *("loss/eval", "nll_per_token/eval", "rewards_eval/accuracies", "rewards_eval/accuracies_se"),
    "rewards_eval/margins",
)

# Metrics of an update as a whole, which have no split.
OF_UPDATE = ("grad_norm", "param_norm", "update_norm", "lr")

_SPLIT = re.compile(r"(?<=[_/])(train|eval)(?=/|$)")
_OF_EVALUATION = re.compile(r"_eval/|/eval(/|$)|^frontier/")


def kept_by() -> list[str]:
    """Return the metrics of evaluations that keep_best can name; those of subsets are more.

    Standard errors are left out: the best checkpoint is not that of the largest one, or the least.
    """
    names = [name.replace("{split}", "eval") for name in METRICS]
    return [name for name in names if is_evaluation(name) and not name.endswith("_se")]


def describe(name: str) -> Metric:
    """Return what a metric of metrics.jsonl means; KeyError for a name that is not ours."""
    name, _ = of_subset(name)
    return METRICS.get(name) or METRICS[_SPLIT.sub("{split}", name)]


def of_subset(name: str) -> tuple[str, str]:
    """Return the name of a metric without that of a subset, and the subset, "" for all of them."""
    for whole in WITH_SUBSETS:
        if name.startswith(f"{whole}/"):
            return whole, name[len(whole) + 1 :]
    return name, ""


def is_evaluation(name: str) -> bool:
    """Return whether a metric is measured at an evaluation, rather than of a training step."""
    return _OF_EVALUATION.search(name) is not None


def is_share(name: str) -> bool:
    """Return whether a metric is a share, from 0 to 1; KeyError for a name that is not ours."""
    return describe(name).unit == "share"
