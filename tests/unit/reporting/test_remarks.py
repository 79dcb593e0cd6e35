"""The friend's remarks: made-up metrics on both sides of each threshold."""

import json
import pathlib
import re

import pytest

from dpo_jax.reporting import remarks as friend
from dpo_jax.reporting.records import Completion, Record, Sample
from tests.helpers.documented import anchors
from tests.helpers.paths import ROOT

STEPS = 40


def record(
    stage="dpo", *, ledger=None, model=None, rows=(), is_finished=True, stopped="", **block
) -> Record:
    """Return a run with rows {step: values}."""
    return Record(
        name=stage,
        stage=stage,
        status="",
        is_finished=is_finished,
        config={stage: block, "model": model or {}},
        differs={},
        changes=[],
        rows=list(rows),
        problems=[],
        ledger=ledger or {},
        result={},
        stopped=stopped,
        samples=[],
    )


def training(**curves) -> list[dict]:
    """Return rows 1 to STEPS; curves: a metric with __ for / -> a value, or one for each step."""
    rows = []
    for index in range(STEPS):
        row = {"step": index + 1}
        for name, values in curves.items():
            value = values[index] if isinstance(values, list) else values
            row[name.replace("__", "/")] = value
        rows.append(row)
    return rows


def evaluations(**curves) -> list[dict]:
    """Return rows of evaluations, 10 steps apart."""
    count = max(len(values) for values in curves.values())
    return [
        {"step": 10 * index}
        | {name.replace("__", "/"): values[index] for name, values in curves.items()}
        for index in range(count)
    ]


def merged(*parts: list[dict]) -> list[dict]:
    """Return rows by step."""
    rows = {}
    for row in sum(parts, []):
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def said(check: str, run: Record) -> str:
    """Return the level and the text of what a check says; "" for nothing."""
    found = friend.CHECKS[check](run)
    assert found is not None, "not measured"
    return " ".join(f"{remark.level}: {remark.text}" for remark in found)


def late(early: float, end: float) -> list[float]:
    """Return values of which the last quarter differs."""
    return [early] * (STEPS - STEPS // 4) + [end] * (STEPS // 4)


def test_number_that_is_not_finite():
    rows = training(loss__train=0.5)
    assert said("finite numbers", record(rows=rows)) == ""
    # Also before the first row.
    for found in (rows, ()):
        run = record(rows=found, stopped="dpo stopped at step 41: grad_norm is inf")
        assert said("finite numbers", run).startswith("warning: dpo stopped at step 41: grad_norm")


def test_gradient():
    def of(norms, **block):
        return said("gradient", record(rows=training(grad_norm=norms), **block))

    zero = friend.ZERO_GRADIENT
    assert of(late(1.0, zero)).startswith("warning: The gradient is zero")
    assert of(late(1.0, 2 * zero)) == ""
    assert of(late(1.0, friend.EXPLODING)).startswith("warning: The gradient explodes")
    assert of(late(1.0, 0.9 * friend.EXPLODING)) == ""
    # From nothing, to next to nothing.
    small = friend.LARGE_GRADIENT
    assert of([0.0] * 10 + [0.9 * small] * 30) == "" and "explodes" in of([0.0] * 10 + [small] * 30)
    # One batch is no explosion.
    assert of([1.0] * (STEPS - 1) + [1e6]) == ""


def test_gradient_that_is_always_cut():
    cut = round(friend.ALWAYS_CUT * STEPS)

    def of(count, limit=2.0):
        norms = [3.0] * count + [1.0] * (STEPS - count)
        return said("gradient", record(rows=training(grad_norm=norms), max_grad_norm=limit))

    assert of(cut).startswith("note: The gradient was cut to max_grad_norm = 2 in 90%")
    assert of(cut - 1) == ""
    assert of(STEPS, limit=0) == ""  # never cut


def test_size_of_weights():
    grown = [100.0 * (1 + (friend.GROWN_WEIGHTS - 1) * step / (STEPS - 1)) for step in range(STEPS)]
    assert "from 100 to 150" in said("size of the weights", record(rows=training(param_norm=grown)))
    less = [0.99 * value for value in grown]
    less[0] = 100.0
    assert said("size of the weights", record(rows=training(param_norm=less))) == ""
    # Adapters and models from scratch are meant to grow.
    check = friend.CHECKS["size of the weights"]
    assert check(record(rows=training(param_norm=grown), model={"lora": {"rank": 8}})) is None
    assert check(record("sft", rows=training(param_norm=grown))) is None
    scratch = record(rows=training(param_norm=grown), model={"path": ""})
    assert check(scratch) is None
    scratch.config["stages"] = ["sft", "dpo"]  # what dpo begins with is fine-tuned
    assert check(scratch)


def test_loss_against_start():
    def of(end):
        return said("loss against the start", record(rows=evaluations(loss__eval=[0.7, 0.5, end])))

    assert of(0.7 * friend.WORSE_THAN_START + 0.001).startswith("warning: The loss on held-out")
    assert of(0.7 * friend.WORSE_THAN_START - 0.001) == ""
    losses = late(0.7, 0.75)
    assert "on training batches" in said(
        "loss against the start", record(rows=training(loss__train=losses))
    )
    assert friend.CHECKS["loss against the start"](
        record("ppo", rows=training(loss__train=1.0))
    ) is (None)


def test_loss_below_zero_is_judged_alike():
    assert said("loss against the start", record(rows=evaluations(loss__eval=[-1.0, -2.0]))) == ""
    assert said("loss against the start", record(rows=evaluations(loss__eval=[-1.0, -0.9])))


def test_margins():
    def of(margin):
        return said("margins", record(rows=training(rewards_train__margins=late(0.0, margin))))

    assert of(friend.SATURATED_MARGIN).startswith("note: Margins are saturated: 5 on")
    assert of(0.99 * friend.SATURATED_MARGIN) == ""


def chosen(fallen: float, tokens: float) -> str:
    held_out = evaluations(logps_eval__chosen=[-50.0, -50.0 - fallen])
    for row in held_out:
        row["lengths_eval/chosen"] = tokens
    return said("chosen log-probs", record(rows=held_out))


def test_chosen_log_probs():
    assert chosen(0.9 * friend.FALLEN_NATS, 1) == "" and chosen(-3.0, 1) == ""
    assert chosen(friend.FALLEN_NATS, 10).startswith("note:") and "This is normal" in chosen(5, 100)
    nats, per_token = friend.DRIFTING_NATS, friend.DRIFTING_NATS_PER_TOKEN
    tokens = nats / per_token
    assert chosen(nats, tokens - 1).startswith("warning: Chosen responses became far less")
    assert chosen(0.99 * nats, tokens - 1).startswith("note:")  # not tens of nats
    assert chosen(nats, tokens + 1).startswith("note:")  # long responses lose more


@pytest.mark.parametrize("stage", ["sft", "kto", "unlikelihood"])
def test_chosen_log_probs_of_others_are_their_loss(stage):
    rows = evaluations(logps_eval__chosen=[-50.0, -90.0])
    assert friend.CHECKS["chosen log-probs"](record(stage, rows=rows)) is None


def test_accuracy():
    pairs = 400  # a standard error of 0.025
    limit = 0.5 + friend.CHANCE_ERRORS * 0.025

    def of(accuracy, count=pairs, **errors):
        rows = evaluations(rewards_eval__accuracies=[0.0, accuracy], **errors)
        run = record(rows=rows, ledger={"eval": {"kept": count}})
        return said("accuracy against chance", run)

    assert "cannot tell from chance" in of(limit - 0.001) and of(limit + 0.001) == ""
    assert "below chance" in of(1 - limit - 0.001) and "cannot tell" in of(1 - limit + 0.001)
    # More pairs know better.
    assert of(limit - 0.001, count=4 * pairs) == ""
    # Pairs of few prompts know less than their number says.
    of_few = dict(rewards_eval__accuracies_se=[0.01, 0.05])
    wider = 0.5 + friend.CHANCE_ERRORS * 0.05
    assert "cannot tell" in of(wider - 0.001, **of_few) and of(wider + 0.001, **of_few) == ""


def test_accuracy_of_a_run_that_warms_up():
    rows = evaluations(rewards_eval__accuracies=[0.0, 0.52])

    def of(**more):
        run = record(rows=rows, ledger={"eval": {"kept": 256}}, steps=2000, **more)
        return friend.CHECKS["accuracy against chance"](run)

    assert of(warmup_steps=150, is_finished=False) is None
    assert of(warmup_steps=150) and of(warmup_steps=10, is_finished=False)


def moved() -> list[dict]:
    """Return rows of a healthy run whose reference moves just before each evaluation."""
    held_out = evaluations(
        loss__eval=[0.69, 0.6, 0.69, 0.74], rewards_eval__accuracies=[0.0, 0.7, 0.0, 0.0]
    )
    rows = training(
        loss__train=0.4, rewards_train__margins=9.0, rewards_train__accuracies=0.9, lr=1e-6
    )
    return merged(held_out, rows)


@pytest.mark.parametrize(
    "check", ["accuracy against chance", "margins", "evaluation against training"]
)
def test_reference_that_moves(check):
    ledger = {"eval": {"kept": 256}}
    assert friend.CHECKS[check](record(rows=moved(), ledger=ledger, reference_every=10)) is None
    assert friend.CHECKS[check](record(rows=moved(), ledger=ledger, reference_every=0))


def test_loss_with_a_reference_that_moves_is_that_of_training():
    check = friend.CHECKS["loss against the start"]
    assert check(record(rows=moved(), reference_every=10)) == []
    assert check(record(rows=moved(), reference_every=0))


@pytest.mark.parametrize("check", ["accuracy against chance", "margins"])
def test_rewards_that_are_no_log_ratios(check):
    """The friend does not know what they were at the start."""

    def of(**block):
        return friend.CHECKS[check](record(rows=moved(), ledger={"eval": {"kept": 256}}, **block))

    for loss in ("simpo", "orpo", "cpo", "nll", "cpo=1,nll=0.2"):
        assert of(loss=loss) is None
    assert of(loss="sigmoid", reference="none") is None
    for loss in ("sigmoid", "ipo", "sigmoid=1,nll=0.2", "of another version"):
        assert of(loss=loss, reference="init")


def test_accuracy_of_training_where_nothing_is_held_out():
    def of(accuracy):
        rows = training(rewards_train__accuracies=late(0.5, accuracy))
        return said("accuracy against chance", record(rows=rows, batch_size=100))

    assert "training pairs is 0.54, which 400 pairs" in of(0.54) and of(0.56) == ""


def test_lengths():
    def sampled(end):
        return said("lengths", record(rows=evaluations(frontier__length=[40.0, end])))

    assert "grew from 40 to 60 tokens" in sampled(40 * friend.LONGER)
    assert sampled(40 * friend.LONGER - 1) == ""
    drawn = record("ppo", rows=training(ppo_train__length=late(10.0, 16.0)))
    assert "grew from 10 to 16 tokens" in said("lengths", drawn)

    def of_data(ratio, stage="dpo", loss="sigmoid"):
        rows = training(lengths_train__chosen=100.0 * ratio, lengths_train__rejected=100.0)
        return said("lengths", record(stage, rows=rows, loss=loss))

    assert of_data(friend.LONGER_CHOSEN).startswith("note: Chosen responses are 1.3 times")
    assert of_data(friend.LONGER_CHOSEN - 0.01) == ""
    advice = "Compare with dpo.loss=sigmoid_norm."
    assert of_data(2.0).endswith(advice)
    for run in (dict(loss="sigmoid_norm"), dict(loss="simpo"), dict(stage="rm")):
        found = of_data(2.0, **run)
        assert found.startswith("note: Chosen responses are 2 times") and advice not in found


def test_repetition():
    def of(end):
        return said("repetition", record(rows=evaluations(frontier__repetition=[0.02, end])))

    assert of(0.021 + friend.REPEATING).startswith("warning: Completions repeat themselves")
    assert of(0.019 + friend.REPEATING) == ""


def test_distinct_completions():
    def of(policy, reference=40, count=40):
        """Return what is said of so many distinct completions, of `count`."""
        run = record("evaluate")
        run.samples = [
            Sample(f"p{i}", Completion(f"a{i % policy}"), Completion(f"b{i % reference}"))
            for i in range(count)
        ]
        return friend.CHECKS["distinct completions"](run)

    limit = round(40 * friend.FEWER_DISTINCT)
    assert of(limit + 1) == [] and of(limit)[0].level == "warning"
    assert of(1)[0].text.startswith("2% of the policy's completions are distinct, and 100% of")
    # Short answers, as yes and no, are no collapse if the reference gives them too.
    assert of(2, reference=3) == [] and of(1, reference=2)
    least = friend.LEAST_COMPLETIONS
    assert of(1, count=least - 1) is None and of(1, count=least)


def test_evaluation_that_turns_up():
    def of(end, train=0.1):
        held_out = evaluations(loss__eval=[0.7, 0.5, end])
        return said(
            "evaluation against training",
            record(rows=merged(held_out, training(loss__train=train))),
        )

    up = 0.5 + friend.TURNED_UP * 0.2
    assert "was 0.5 at step 10" in of(up + 0.001) and of(up - 0.001) == ""
    # The training loss turned up as well: this is no overfitting.
    assert of(up + 0.001, train=0.9) == ""


def test_accuracy_gap():
    def of(gap):
        held_out = evaluations(loss__eval=[0.7, 0.6, 0.6], rewards_eval__accuracies=[0.0, 0.7, 0.7])
        rows = training(loss__train=0.5, rewards_train__accuracies=0.7 + gap)
        return said("evaluation against training", record(rows=merged(held_out, rows)))

    assert "learns the pairs by heart" in of(friend.ACCURACY_GAP + 0.001)
    assert of(friend.ACCURACY_GAP - 0.001) == ""


def test_warm_up():
    def of(warm_up, **options):
        run = record(rows=training(lr=1e-7), warmup_steps=warm_up, lr=1e-6, **options)
        return said("warm-up", run)

    assert f"of {STEPS} steps is not over" in of(STEPS) and of(STEPS - 1) == ""
    # A run that goes on is judged by the steps that it will have.
    assert of(STEPS, is_finished=False, steps=STEPS + 1) == ""
    assert of(STEPS + 1, is_finished=False, steps=STEPS + 1)
    unknown = record(rows=training(lr=1e-7), warmup_steps=99, is_finished=False, steps=0)
    assert friend.CHECKS["warm-up"](unknown) is None


def test_cut_answers():
    def of(cut, stage="dpo"):
        ledger = {"train": {"kept": 1000, "responses_truncated": cut}}
        return said("ends of answers", record(stage, ledger=ledger))

    assert "20 responses (1.0%) were cut" in of(20) and of(19) == ""  # of 2,000
    assert of(10, "sft") and of(9, "sft") == ""


def test_fewer_ends():
    def of(end):
        return said("ends of answers", record(rows=evaluations(frontier__eos_rate=[0.9, end])))

    assert "70% of the completions end by EOS, and 90% did" in of(0.9 - friend.FEWER_ENDS)
    assert of(0.91 - friend.FEWER_ENDS) == ""
    # Reviews of more tokens than are sampled never end.
    assert said("ends of answers", record(rows=evaluations(frontier__eos_rate=[0.0, 0.0]))) == ""


def test_ppo():
    def of(kl=1.0, clipped=0.1, **fields):
        rows = training(ppo_train__kl=kl, ppo_train__clipped=clipped)
        return said("PPO's KL and clipping", record("ppo", rows=rows, target_kl=6.0, **fields))

    far = 6 * friend.ABOVE_TARGET
    assert "The KL is 12 nats at the end, and target_kl is 6. Lower lr" in of(kl=far)
    assert "As init_kl_coef is 0, there is no KL penalty" in of(kl=far, init_kl_coef=0.0)
    assert of(kl=5.9 * friend.ABOVE_TARGET) == ""
    assert "50% of the tokens are clipped" in of(clipped=friend.MOSTLY_CLIPPED)
    assert of(clipped=0.49) == ""


@pytest.mark.parametrize("stage", ["dpo", "ppo", "sft", "rm", "evaluate", "of another version"])
def test_a_run_without_rows_is_judged_by_nothing(stage):
    assert set(friend.remarks(record(stage)).values()) == {None}


def test_every_remark_has_a_page_with_its_heading():
    source = pathlib.Path(friend.__file__).read_text()
    pages = set(re.findall(r'"(\w+\.md#[\w-]+)"', source))
    assert len(pages) >= 6
    for page in pages:
        name, _, heading = page.partition("#")
        assert heading in anchors(ROOT / "docs" / name), page
    constants = re.findall(r"^([A-Z]+) = \"\w+\.md", source, re.M)
    assert all(len(re.findall(rf"\b{name}\b", source)) > 1 for name in constants)


def test_every_check_is_described():
    text = (ROOT / "docs" / "reports.md").read_text()
    for name in friend.CHECKS:
        assert f"| {name} |" in text, name


def test_numbers_of_the_page():
    """They are those of two real runs."""
    text = " ".join((ROOT / "docs" / "reports.md").read_text().split())
    results = ROOT / "experiments" / "results" / "reports" / "toy.json"
    runs = json.loads(results.read_text())["runs"]
    for run in runs.values():
        assert run["command"] in text
    # Of each run the first two rows, the one of the highest training loss, and the last.
    start, _, _, end = runs["toy"]["rows"]
    assert f"goes from {start['loss/eval']:.4g} to {end['loss/eval']:.4g}, and training" in text
    assert end["logps_eval/chosen"] == pytest.approx(start["logps_eval/chosen"], abs=0.1)
    assert end["logps_eval/rejected"] < start["logps_eval/rejected"] - 0.5

    rows = runs["broken"]["rows"]
    assert f"with an accuracy of {rows[-1]['rewards_eval/accuracies']:.4g} that" in text
    assert rows[2]["step"] < 50 and rows[2]["loss/train"] > 25
    ledger = {"eval": {"kept": runs["broken"]["held_out_pairs"]}}
    found = friend.remarks(record(rows=rows, ledger=ledger))
    said = [remark for remarks in found.values() for remark in remarks or []]
    assert len(said) == text.count("- **warning**") + text.count("- **note**") == 3
    for remark in said:
        assert f"- **{remark.level}**: {remark.text}" in text
