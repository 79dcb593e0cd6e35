"""What a careful friend would say of a run, by its metrics: one line each, with the page to read.

Each check looks at one thing. It returns None where the run has not measured it, an empty list
where nothing is wrong, and else its remarks. The thresholds are below, each with its reason.
"""

import math
import statistics
import typing
from collections.abc import Callable

from dpo_jax import loss_table
from dpo_jax.reporting.records import Record
from dpo_jax.stage_table import STAGES

# The end of a run is the mean of its last tenth, so that no single batch decides.
END = 0.1
# A gradient of this norm changes no float32 weight of size 1 at a learning rate below 0.1.
ZERO_GRADIENT = 1e-6
# Gradients shrink or stay as a model learns. A batch may double the norm, not all of a quarter of a
# run ten times.
EXPLODING = 10.0
# And what people cut gradients to is 1 to 10: far below it, no gradient is large.
LARGE_GRADIENT = 0.1
# Cutting spikes is what max_grad_norm is for. If nearly every step is cut, it sets the step's size,
# and lr no longer does.
ALWAYS_CUT = 0.9
# Fine-tuning moves weights by a few percent. Half as much again is no longer the model it was.
GROWN_WEIGHTS = 1.5
# Noise of a batch or an evaluation moves a loss by a few percent.
WORSE_THAN_START = 1.05
# At this margin a pair's gradient has sigmoid(-5) / sigmoid(0) = 1.3 % of the weight it began with.
SATURATED_MARGIN = 5.0
# Below this fall of the chosen log-probs, in nats a response, there is nothing to explain.
FALLEN_NATS = 0.5
# "Tens of nats": by then a response is exp(10), 22,000 times, less likely.
DRIFTING_NATS = 10.0
# And long responses lose more than short ones: at 0.2 nats a token, perplexity is 22 % higher.
DRIFTING_NATS_PER_TOKEN = 0.2
# Standard errors of a coin's accuracy within which a model's cannot be told from it.
CHANCE_ERRORS = 2.0
# People like longer answers, so models write somewhat longer ones. Half as long again is not style.
LONGER = 1.5
# At this ratio of the data's chosen to rejected tokens, length alone tells most pairs apart.
LONGER_CHOSEN = 1.3
# The share of repeated 3-grams is 0.0 to 0.1 in good text.
REPEATING = 0.1
# Policy and reference answer the same prompts with the same seed. Preferences narrow a policy's
# answers; half as many different ones as the reference has is a few answers for many prompts.
FEWER_DISTINCT = 0.5
# Of fewer completions, a few that are equal decide.
LEAST_COMPLETIONS = 20
# Of what an evaluation loss had fallen in all: a tenth is beyond the noise of a few hundred pairs.
TURNED_UP = 0.1
# Accuracy on the training batches over that on held-out pairs. 0.15 is 5 standard errors of 256
# pairs.
ACCURACY_GAP = 0.15
# A cut answer has no end: from one in a hundred on, a model learns to write on.
CUT_ANSWERS = 0.01
# Fewer completions end by EOS than at the start, by this share of them: one in five.
FEWER_ENDS = 0.2
# PPO adapts kl_coef to the target; twice the target says that it does not get there.
ABOVE_TARGET = 2.0
# PPO's updates are to stay near the policy that sampled. Most tokens outside of the clip did not.
MOSTLY_CLIPPED = 0.5

HEALTHY = "metrics.md#a-healthy-dpo-run"
OPTIMISER = "metrics.md#loss-and-optimiser"
PAIRS = "metrics.md#preference-pairs"
SAMPLES = "metrics.md#reward-and-kl"
PPO = "metrics.md#ppo"
TRUNCATION = "data.md#truncation"


class Remark(typing.NamedTuple):
    """A remark on a stage, with the page that explains it."""

    level: str  # "warning": something is wrong; "note": good to know
    text: str
    page: str  # of docs/, with the heading


Found = list[Remark] | None


def remarks(record: Record) -> dict[str, Found]:
    """Return what each check says of a stage, by the check's name."""
    return {name: check(record) for name, check in CHECKS.items()}


def _warning(text: str, page: str) -> list[Remark]:
    return [Remark("warning", text, page)]


def _note(text: str, page: str) -> list[Remark]:
    return [Remark("note", text, page)]


def end_of(values: list[float]) -> float:
    """Return the mean over the end of a run."""
    count = max(1, round(END * len(values)))
    return statistics.fmean(values[-count:])


def _ends(record: Record, name: str) -> tuple[float, float] | None:
    """Return the first and last value of an evaluation's metric; None unless there are two."""
    values = record.values(name)
    return (values[0], values[-1]) if len(values) > 1 else None


def _ends_of_samples(record: Record, measured: str, sampled: str) -> tuple[float, float] | None:
    """Return first and last value of a metric of completions: of evaluations, or of PPO's own."""
    found = _ends(record, measured)
    drawn = record.values(sampled)
    if not found and len(drawn) > 1:
        found = drawn[0], end_of(drawn)
    return found


def _finite(record: Record) -> Found:
    if record.stopped:
        return _warning(record.stopped, OPTIMISER)
    return [] if record.values("loss/train") else None


def _gradient(record: Record) -> Found:
    norms = record.values("grad_norm")
    if len(norms) < 4:
        return None
    quarter = len(norms) // 4
    early = statistics.median(norms[:quarter])
    late = statistics.median(norms[-quarter:])
    if late <= ZERO_GRADIENT:
        return _warning(
            f"The gradient is zero: its norm is {late:.2g} over the last quarter of the steps, and "
            "nothing is learned any more. Are all pairs won (see the margins), or is a weight "
            "infinite in the loss?",
            OPTIMISER,
        )
    if late >= max(EXPLODING * early, LARGE_GRADIENT):
        return _warning(
            f"The gradient explodes: its norm is {late:.3g} over the last quarter of the steps, "
            f"{late / max(early, ZERO_GRADIENT):.3g} times that of the first. Lower lr.",
            OPTIMISER,
        )
    limit = record.number("max_grad_norm") or math.inf
    cut = statistics.fmean(norm > limit for norm in norms)
    if cut >= ALWAYS_CUT:
        return _note(
            f"The gradient was cut to max_grad_norm = {limit:g} in {cut:.0%} of the steps, so that "
            "this limit sets the size of a step.",
            OPTIMISER,
        )
    return []


def _weights(record: Record) -> Found:
    norms = record.values("param_norm")
    # Adapters, heads and models from scratch begin near zero and are meant to grow.
    is_new = record.has_adapters or record.is_from_scratch
    if len(norms) < 2 or is_new or not _is_policy(record):
        return None
    if norms[-1] >= GROWN_WEIGHTS * norms[0]:
        return _warning(
            f"The weights' norm went from {norms[0]:.3g} to {norms[-1]:.3g}: this is no longer the "
            "model that training began with. The learning rate is too high.",
            OPTIMISER,
        )
    return []


def _loss(record: Record) -> Found:
    """Look whether the loss is above that of the start; PPO's says nothing."""
    if record.stage == "ppo":
        return None
    held_out = None if _moves_reference(record) else _ends(record, "loss/eval")
    training = record.values("loss/train")
    if held_out:
        where, (start, end) = "on held-out examples", held_out
    elif len(training) > 1:
        where, start, end = "on training batches", training[0], end_of(training)
    else:
        return None
    if end - start > (WORSE_THAN_START - 1) * abs(start):
        return _warning(
            f"The loss {where} is {end:.4g} at the end and was {start:.4g} at the start: training "
            "made the model worse. The learning rate is too high, or the labels are swapped.",
            OPTIMISER,
        )
    return []


def _margins(record: Record) -> Found:
    margins = record.values("rewards_train/margins")
    if not margins or not _compares_with_start(record):
        return None
    end = end_of(margins)
    if end >= SATURATED_MARGIN:
        return _note(
            f"Margins are saturated: {end:.3g} on training batches at the end. From "
            f"{SATURATED_MARGIN:g} on, a pair has next to no gradient. Fewer steps would do, or "
            "the pairs are too easy.",
            HEALTHY,
        )
    return []


def _chosen(record: Record) -> Found:
    # Those of other stages are all that is trained, and are in the loss.
    if record.stage != "dpo":
        return None
    found = _ends(record, "logps_eval/chosen")
    if not found:
        return None
    fallen = found[0] - found[1]
    if fallen < FALLEN_NATS:
        return []
    tokens = (record.values("lengths_eval/chosen") or [1.0])[-1]
    per_token = fallen / max(tokens, 1.0)
    amount = f"{fallen:.3g} nats a response, {per_token:.2g} a token"
    if fallen >= DRIFTING_NATS and per_token >= DRIFTING_NATS_PER_TOKEN:
        return _warning(
            f"Chosen responses became far less likely (by {amount}): the policy drifts away from "
            "the text it was to prefer. Raise beta, or lower lr, or train less.",
            HEALTHY,
        )
    return _note(
        f"Chosen responses became less likely (by {amount}). This is normal: the difference to the "
        "rejected ones is what is trained.",
        HEALTHY,
    )


def _accuracy(record: Record) -> Found:
    # A run that is still warming up has learned next to nothing yet.
    is_warming_up = (record.last_step or 0) < (record.number("warmup_steps") or 0)
    if not _compares_with_start(record) or (is_warming_up and not record.is_finished):
        return None
    accuracies = record.values("rewards_eval/accuracies")
    errors = record.values("rewards_eval/accuracies_se")
    count = record.count("eval", "kept")
    where = "held-out pairs"
    if len(accuracies) < 2 or not count:
        training = record.values("rewards_train/accuracies")
        if len(training) < 2:
            return None
        batches = max(1, round(END * len(training)))
        accuracies = [*training[:-1], end_of(training)]
        errors = []
        count = batches * max(record.number("batch_size") or 1, 1)
        where = "training pairs"
    # Pairs of one prompt are alike, so that they say less than as many of other prompts.
    error = max([math.sqrt(0.25 / count), *errors[-1:]])
    distance = accuracies[-1] - 0.5
    if distance < -CHANCE_ERRORS * error:
        return _warning(
            f"The accuracy on {where} is {accuracies[-1]:.3g}, below chance. Are chosen and "
            "rejected swapped, or is lr too high?",
            PAIRS,
        )
    if distance <= CHANCE_ERRORS * error:
        return _warning(
            f"The accuracy on {where} is {accuracies[-1]:.3g}, which {count:,} pairs cannot tell "
            "from chance. The learning rate is too low, training too short, or labels are noise.",
            PAIRS,
        )
    return []


def _lengths(record: Record) -> Found:
    found = []
    measured = False
    sampled = _ends_of_samples(record, "frontier/length", "ppo_train/length")
    if sampled:
        measured = True
        start, end = sampled
        if end >= LONGER * start:
            found += _warning(
                f"Completions grew from {start:.3g} to {end:.3g} tokens. Is the reward, or what "
                "people chose, a matter of length?",
                SAMPLES,
            )
    chosen = record.values("lengths_train/chosen")
    rejected = record.values("lengths_train/rejected")
    if chosen and rejected:
        measured = True
        ratio = statistics.fmean(chosen) / max(statistics.fmean(rejected), 1.0)
        if ratio >= LONGER_CHOSEN:
            # Other losses are means over tokens already, or have no kin that is.
            is_of_sums = record.stage == "dpo" and record.block.get("loss") == "sigmoid"
            advice = " Compare with dpo.loss=sigmoid_norm." if is_of_sums else ""
            found += _note(
                f"Chosen responses are {ratio:.2g} times as long as rejected ones, so that longer "
                f"answers are learned too.{advice}",
                PAIRS,
            )
    return found if measured else None


def _repetition(record: Record) -> Found:
    found = _ends(record, "frontier/repetition")
    if not found:
        return None
    start, end = found
    if end - start >= REPEATING:
        return _warning(
            f"Completions repeat themselves: {end:.0%} of their 3-grams stood there before, and "
            f"{start:.0%} at the start. The policy collapses.",
            SAMPLES,
        )
    return []


def _distinct(record: Record) -> Found:
    """Look whether the policy gives many prompts the same answer, as after a collapse to one."""
    both = [sample for sample in record.samples if sample.reference]
    if len(both) < LEAST_COMPLETIONS:
        return None
    policy = len({sample.policy.text for sample in both}) / len(both)
    reference = len({sample.reference.text for sample in both}) / len(both)
    if policy <= FEWER_DISTINCT * reference:
        return _warning(
            f"{policy:.0%} of the policy's completions are distinct, and {reference:.0%} of the "
            f"reference's, to the same {len(both):,} prompts: the policy gives many prompts the "
            "same answer. It collapses.",
            SAMPLES,
        )
    return []


def _evaluation(record: Record) -> Found:
    """Look whether what is held out falls behind what is trained on."""
    held_out = record.values("loss/eval")
    training = record.values("loss/train")
    if len(held_out) < 3 or not training or _moves_reference(record):
        return None
    found = []
    start, lowest, end = held_out[0], min(held_out), held_out[-1]
    has_turned = end - lowest > TURNED_UP * (start - lowest) and lowest < start
    if has_turned and end_of(training) < lowest:
        steps = {value: step for step, value in record.points("loss/eval")}
        found += _warning(
            f"The loss on held-out examples is {end:.4g} and was {lowest:.4g} at step "
            f"{steps[lowest]}, while that on training batches is {end_of(training):.4g}: the model "
            "overfits. Stop earlier, or use keep_best.",
            HEALTHY,
        )
    accuracies = record.values("rewards_eval/accuracies")
    trained = record.values("rewards_train/accuracies")
    if accuracies and trained and end_of(trained) - accuracies[-1] >= ACCURACY_GAP:
        found += _warning(
            f"The accuracy is {end_of(trained):.3g} on training batches and {accuracies[-1]:.3g} "
            "on held-out pairs: the model learns the pairs by heart.",
            HEALTHY,
        )
    return found


def _warm_up(record: Record) -> Found:
    warm_up = record.number("warmup_steps")
    if warm_up is None or not record.total or not record.values("lr"):
        return None
    if warm_up >= record.total:
        return _warning(
            f"The warm-up of {warm_up} steps is not over at the last of {record.total}: the "
            f"learning rate never reached {record.number('lr') or 0:g}. Lower warmup_steps.",
            OPTIMISER,
        )
    return []


def _answers(record: Record) -> Found:
    """Look for answers without an end: in the data, and in what the policy writes."""
    found = []
    measured = False
    kept = record.count("train", "kept")
    if kept:
        measured = True
        cut = record.count("train", "responses_truncated")
        is_of_pairs = record.stage in STAGES and STAGES[record.stage].responses == 2
        share = cut / (2 * kept if is_of_pairs else kept)
        if share >= CUT_ANSWERS:
            found += _warning(
                f"{cut:,} responses ({share:.1%}) were cut at data.max_length and have no end: the "
                "model learns not to stop. Raise max_length, or drop the longest rows.",
                TRUNCATION,
            )
    ends = _ends_of_samples(record, "frontier/eos_rate", "ppo_train/eos_rate")
    if ends:
        measured = True
        start, end = ends
        if start - end >= FEWER_ENDS:
            found += _warning(
                f"{end:.0%} of the completions end by EOS, and {start:.0%} did at the start: the "
                "policy no longer knows when to stop.",
                SAMPLES,
            )
    return found if measured else None


def _ppo(record: Record) -> Found:
    kl = record.values("ppo_train/kl")
    clipped = record.values("ppo_train/clipped")
    if not kl:
        return None
    found = []
    target = record.number("target_kl") or math.inf
    if end_of(kl) >= ABOVE_TARGET * target:
        remedy = "Lower lr, or kl_horizon."
        if record.number("init_kl_coef") == 0:
            remedy = "As init_kl_coef is 0, there is no KL penalty to hold it; set another."
        found += _warning(
            f"The KL is {end_of(kl):.3g} nats at the end, and target_kl is {target:g}. {remedy}",
            PPO,
        )
    if clipped and end_of(clipped) >= MOSTLY_CLIPPED:
        found += _warning(
            f"{end_of(clipped):.0%} of the tokens are clipped: updates leave the policy that "
            "sampled behind. Lower lr or inner_epochs.",
            PPO,
        )
    return found


def _moves_reference(record: Record) -> bool:
    """Return whether rewards and losses begin anew as the reference moves to the policy.

    A move comes before the evaluation of the same step, which may then see no difference at all.
    """
    return (record.number("reference_every") or 0) > 0


def _compares_with_start(record: Record) -> bool:
    """Return whether rewards are 0 at the start: log-ratios to a reference that stays.

    Without a reference they are log-probs, whose accuracy and margin are not 0.5 and 0 there.
    """
    loss = record.block.get("loss")
    if _moves_reference(record) or record.block.get("reference") == "none":
        return False
    if not isinstance(loss, str) or not set(loss_table.names(loss)) <= loss_table.LOSSES.keys():
        return True  # of another stage
    return loss_table.properties(loss).needs_reference


def _is_policy(record: Record) -> bool:
    return record.stage in STAGES and STAGES[record.stage].is_policy


CHECKS: dict[str, Callable[[Record], Found]] = {
    "finite numbers": _finite,
    "gradient": _gradient,
    "size of the weights": _weights,
    "loss against the start": _loss,
    "margins": _margins,
    "chosen log-probs": _chosen,
    "accuracy against chance": _accuracy,
    "lengths": _lengths,
    "repetition": _repetition,
    "distinct completions": _distinct,
    "evaluation against training": _evaluation,
    "warm-up": _warm_up,
    "ends of answers": _answers,
    "PPO's KL and clipping": _ppo,
}
