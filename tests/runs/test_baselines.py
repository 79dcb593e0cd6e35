"""The paper's other methods, end to end: on the toy, and on a Llama with EOS."""

import json
import shutil
import signal
import time

import numpy as np
import pytest

from configs import toy
from dpo_jax import config_files
from dpo_jax.models import loading
from dpo_jax.parallel import sharding
from dpo_jax.pipeline.run import Run
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.rewards import make
from dpo_jax.training.loop import Interrupted
from dpo_jax.training.metrics import read_rows
from dpo_jax.workdir import StageChanged, read_ledger, read_lines
from tests.helpers.documented import documented_metrics
from tests.helpers.rows import change_record, write_jsonl
from tests.helpers.tiny_runs import dpo_config, on_devices, rows_without_timings, run, weights

STEPS = dict(sft=30, rm=40, preferred_ft=6, unlikelihood=6, ppo=4)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """The toy's tests run on one device, which compiles faster; the Llama's on four."""
    with on_devices(1):
        yield


def toy_config(method, **changes):
    config = toy.get_config(method)
    config.sampling.batch_size = 256
    for stage in set(config.stages) & STEPS.keys():
        config[stage].update(steps=STEPS[stage], eval_every=2, save_every=2)
    for name, fields in (
        dict(
            pairs=dict(prompts=200),
            ppo=dict(batch_size=64, minibatch_size=32),
            best_of_n=dict(n=(1, 4), prompts=64),
        )
        | changes
    ).items():
        if name in config:
            config[name].update(fields)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The stages that all methods share: sft, pairs, rm; and best of N after them."""
    folder = tmp_path_factory.mktemp("toy")
    run_stages(toy_config("best_of_n"), str(folder))
    return folder


def result(workdir, name):
    return json.loads((workdir / name).read_text())


@pytest.mark.parametrize("method", ["preferred_ft", "unlikelihood"])
def test_losses_without_reference_move_policy(workdir, method):
    folder = run(toy_config(method), workdir)
    rows = rows_without_timings(folder)
    assert rows[-1]["frontier/kl"] > 1e-3
    if method == "unlikelihood":  # α as the config has it, on the rejected side
        first, alpha = rows[0], toy_config(method).unlikelihood.alpha
        assert first["loss/eval"] == pytest.approx(
            alpha * first["logps_eval/rejected"] - first["logps_eval/chosen"], rel=1e-5
        )
    assert result(workdir, "evaluate/toy.json").keys() == {"reward", "kl", "bound_reward", "gap"}
    for name in ("evaluate", folder.name):  # the next method has them to itself
        (workdir / name).rename(workdir / f"{method}_{name}")


def assert_explained(*folders):
    """Assert that docs/metrics.md has every metric of some stages."""
    explained = documented_metrics()
    for folder in folders:
        rows = read_rows(folder / "metrics.jsonl")
        assert rows
        for row in rows:
            assert not row.keys() - explained, folder


def test_rm_starts_at_log_2_and_learns(workdir):
    assert_explained(workdir / "sft", workdir / "rm")
    rows = rows_without_timings(workdir / "rm")
    assert abs(rows[0]["loss/eval"] - np.log(2)) < 1e-6
    assert rows[-1]["loss/eval"] < 0.6 and rows[-1]["rewards_eval/accuracies"] > 0.65


def test_reward_model_is_no_policy(workdir):
    model = loading.open_checkpoint(str(workdir / "rm" / "hf"))
    with pytest.raises(ValueError, match="unknown: score.weight"):
        model.load_params(sharding.make_mesh())


def test_best_of_n_of_more_is_better(workdir):
    one, four = result(workdir, "best_of_n/best_of_n.json")
    assert four["reward"] > one["reward"] + 2 * one["reward_se"]
    assert (one["kl"], four["kl"]) == (0, pytest.approx(np.log(4) - 3 / 4))
    rows = read_lines(workdir / "best_of_n" / "completions.jsonl")
    assert len(rows) == 64 and all(len(row["completions"]) == 4 for row in rows)


def test_other_order_trains_on_same_pairs(workdir, tmp_path, capsys):
    """The stages that read no pairs are reused; what trains on them is refused, or made anew."""
    for name in ("sft", "pairs"):
        shutil.copytree(workdir / name, tmp_path / name)
    # As in a folder from before the field was left out of these stages.
    before = change_record(
        tmp_path / "sft" / "config.json",
        lambda record: record["depends_on"].update({"data.order": "pairs"}),
    )
    assert "data.order" not in before["depends_on"]

    config = toy_config("dpo", dpo=dict(steps=4, eval_every=4, save_every=4))
    config.stages = ("sft", "pairs", "dpo")
    config.data.order = "pairs"
    pairs_alone = run(config, tmp_path)
    for field, value in (("order", "prompts"), ("group_pairs", 8)):
        changed = config.copy_and_resolve_references()
        changed.data[field] = value
        with pytest.raises(
            StageChanged, match=f"the dpo stage.*\n.*config.data.{field}: .*{value}"
        ):
            run(changed, tmp_path)
    capsys.readouterr()
    config.data.order = "prompts"
    config.run = "in_groups"
    in_groups = run(config, tmp_path)
    printed = capsys.readouterr().out
    for name in ("sft", "pairs"):
        assert f"{name}: already done" in printed
    assert in_groups.name == "in_groups"
    assert rows_without_timings(in_groups) != rows_without_timings(pairs_alone)
    assert_explained(pairs_alone)


def test_pairs_resume_after_kill(workdir, tmp_path, monkeypatch):
    """A kill in the middle of a line, too; the pairs are those of a run that was never stopped."""
    config = toy_config("best_of_n", pairs=dict(prompts=600))
    config.stages = ("sft", "pairs")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sft").symlink_to(workdir / "sft")
    run_stages(config, str(tmp_path / "whole"))

    def killed(*_):
        with (tmp_path / "killed" / "pairs" / "completions.jsonl").open("a") as file:
            file.write('{"prompt": "cut sho')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        reward = make.make_reward("toy", "", config.reward.batch_size, sharding.make_mesh())
        calls = []
        patch.setattr(
            make,
            "make_reward",
            lambda *_: (
                lambda *args: calls.append(0) or (reward(*args) if len(calls) < 3 else killed())
            ),
        )
        run_stages(config, str(tmp_path / "killed"))
    assert (
        0
        < len((tmp_path / "killed" / "pairs" / "completions.jsonl").read_text().splitlines())
        < 700
    )
    changed = config.copy_and_resolve_references()
    changed.pairs.completions = 3
    with pytest.raises(StageChanged, match="config.pairs.completions: 4 in the folder, 3 now"):
        run_stages(changed, str(tmp_path / "killed"))  # what was sampled is neither mixed nor lost
    other = config.copy_and_resolve_references()
    with (
        monkeypatch.context() as patch,
        pytest.raises(StageChanged, match="the prompts of .* have changed"),
    ):
        load = Run.load_prompts
        patch.setattr(
            Run,
            "load_prompts",
            lambda *args: {
                split: prompts.take(range(1, len(prompts)))
                for split, prompts in load(*args).items()
            },
        )
        run_stages(other, str(tmp_path / "killed"))
    run_stages(config, str(tmp_path / "killed"))
    for file in ("completions.jsonl", "pairs.jsonl", "pairs_eval.jsonl", "ledger.json"):
        assert (tmp_path / "killed" / "pairs" / file).read_text() == (
            tmp_path / "whole" / "pairs" / file
        ).read_text()


def ppo_config(method, steps):
    config = toy_config(method, ppo=dict(batch_size=64, minibatch_size=32, steps=steps))
    config.stages = [stage for stage in config.stages if stage != "evaluate"]
    return config


def test_ppo_on_the_true_reward_learns(workdir):
    config = ppo_config("ppo_gt", steps=12)
    config.run = "ppo_gt"
    rows = rows_without_timings(run(config, workdir))
    assert rows[-1]["ppo_train/reward"] > rows[1]["ppo_train/reward"] + 0.5


def test_ppo_resumes_exactly(workdir, monkeypatch):
    """Rows, weights and the adapted penalty, bit for bit; the value head is not exported."""
    config = ppo_config("ppo", steps=4)
    config.run = "whole"
    whole = run(config, workdir)
    rows = rows_without_timings(whole)
    assert [row["step"] for row in rows] == list(range(config.ppo.steps + 1))
    assert_explained(whole)
    updates = config.ppo.inner_epochs * config.ppo.batch_size // config.ppo.minibatch_size
    assert [row["counters/updates"] for row in rows[1:]] == [
        updates * row["step"] for row in rows[1:]
    ]
    assert all(
        row["tokens_per_second"] * row["step_time"] == pytest.approx(row["ppo_train/length"] * 64)
        for row in read_rows(whole / "metrics.jsonl")[1:]
    )
    coefficients = [row["ppo_train/kl_coef"] for row in rows[1:]]
    assert len(set(coefficients)) == config.ppo.steps and abs(rows[1]["ppo_train/kl"]) < 1e-4
    config.run = "stopped"
    calls = []

    def stop(*args):
        calls.append(0)
        if len(calls) == 4:  # the self-check's, and those of three steps
            signal.raise_signal(signal.SIGTERM)
        return rewarded(*args)

    rewarded = make.make_reward("rm", str(workdir / "rm" / "hf"), 64, sharding.make_mesh())
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(make, "make_reward", lambda *_: stop)
        run(config, workdir)
    with (
        monkeypatch.context() as patch,
        pytest.raises(StageChanged, match="data of .* has changed since"),
    ):
        load = Run.load_prompts
        patch.setattr(
            Run,
            "load_prompts",
            lambda *args: {
                split: prompts.take(range(1, len(prompts)))
                for split, prompts in load(*args).items()
            },
        )
        run(config, workdir)
    stopped = run(config, workdir)
    assert rows_without_timings(stopped) == rows
    for name, values in weights(whole).items():
        np.testing.assert_array_equal(weights(stopped)[name], values)
    assert weights(whole).keys() == weights(workdir / "sft").keys()


def test_ppo_takes_rewards_as_they_are(workdir):
    """Without a KL penalty too; its warm-up counts steps, and each step's time has its samples."""

    def three(prompts, completions):
        time.sleep(0.05)
        return [3.0] * len(completions)

    config = toy_config(
        "ppo_gt",
        ppo=dict(
            batch_size=64,
            minibatch_size=32,
            inner_epochs=1,
            steps=3,
            lr=1e-9,
            schedule="constant",
            warmup_steps=2,
            init_kl_coef=0.0,
            gae_lambda=1.0,
            normalize_rewards=False,
        ),
    )
    config.stages = ("sft", "ppo")
    config.run = "as_they_are"
    run_stages(config, str(workdir), reward=three)
    rows = read_rows(workdir / "as_they_are" / "metrics.jsonl")[1:]
    assert [row["ppo_train/kl_coef"] for row in rows] == [0, 0, 0]
    # Half the square of 3 - 0, as the value head starts from zero, and the policy hardly moves.
    for row in rows:
        assert row["ppo_train/value_loss"] == pytest.approx(4.5, rel=1e-3)
    # Two updates a step, so 1/5 and 2/5 of the rate in step 1, 3/5 and 4/5 in step 2.
    assert [row["lr"] / 1e-9 for row in rows] == pytest.approx([0.3, 0.7, 1.0])
    assert min(row["step_time"] for row in rows) > 0.05


def test_ppo_of_llama_with_reward_model(model, pairs, tmp_path, capsys):
    """rm on pairs of text, then ppo on its own completions, evaluated while it trains, on a mesh of
    four devices.

    Both by adapters, beside which the reward's and the value's heads are trained whole. Then ppo
    again, on the path of that reward model.
    """
    config = config_files.load("ppo")
    base = dpo_config(model, pairs)
    config.model, config.data = base.model, base.data
    config.model.lora.rank = 2
    config.mesh.update(data=1, fsdp=2, tensor=2)
    config.rm.update(
        batch_size=8, steps=6, epochs=1.0, optimizer="adamw", lr=3e-3, warmup_steps=0, eval_every=3
    )
    config.ppo.update(
        batch_size=16, minibatch_size=16, steps=3, lr=1e-3, eval_every=3, save_every=3
    )
    config.reward.batch_size = 16
    config.sampling.update(max_new_tokens=6, batch_size=16)
    config.evaluate.update(prompts=12, show=2)
    with on_devices(4):
        folder = run(config, tmp_path)
    rows = rows_without_timings(folder)
    assert rows[0]["frontier/kl"] == pytest.approx(0, abs=1e-4)
    found = result(tmp_path, "evaluate/evaluate.json")
    assert found["policy"] == "ppo" and found["frontier/kl"] > 1e-4
    # The same samples of the same policy.
    assert abs(found["frontier/kl"] - rows[-1]["frontier/kl"]) < 1e-3
    completions = read_lines(tmp_path / "evaluate" / "completions.jsonl")
    references = read_lines(tmp_path / "evaluate" / "reference_completions.jsonl")
    assert len(completions) == len(references) == 12
    # Two of them are shown at each evaluation in training: before it, of the reference itself.
    shown = capsys.readouterr().out
    for step, sampled in ((0, references), (3, completions)):
        lines = shown.partition(f"ppo: completions at step {step}\n")[2].splitlines()
        assert lines[0] == f"--- {sampled[0]['prompt']!r}"
        assert lines[1].endswith(f") {sampled[0]['completion']!r}")
        assert lines[2].startswith("--- ") and not lines[4].startswith("--- ")

    of_path = config.copy_and_resolve_references()
    of_path.stages, of_path.run = ("ppo",), "path"
    of_path.reward.update(kind="model", path=str(tmp_path / "rm" / "hf"))
    of_path.ppo.update(reward="true", steps=1)
    with on_devices(4):
        step = rows_without_timings(run(of_path, tmp_path))[1]
    # The same samples. Rewards are of texts where this model draws tokens that no text has.
    for name in ("ppo_train/kl", "ppo_train/length", "ppo_train/eos_rate"):
        assert step[name] == rows[1][name]
    assert np.isfinite(step["ppo_train/reward"])


def many_words(prompts, completions):
    return [len(completion.split()) for completion in completions]


def test_ppo_on_prompts_alone(model, tmp_path):
    """configs/ppo.py:model, on rows without an answer, and with a reward of one's own."""
    rows = [dict(prompt=f"w{3 + n % 30} w{3 + n // 30}") for n in range(90)]
    config = config_files.load("ppo:model")
    config.model.path = str(model)
    config.data.path = str(write_jsonl(tmp_path / "prompts.jsonl", rows))
    config.data.eval_fraction = 0.4
    config.reward.path = "unread"  # the function takes its place
    config.ppo.update(batch_size=8, minibatch_size=8, steps=1, lr=1e-3, eval_every=1, save_every=1)
    config.sampling.update(max_new_tokens=4, batch_size=16)
    config.evaluate.update(prompts=8, show=2)
    with on_devices(1):
        folder = run(config, tmp_path, reward=many_words)
    assert rows_without_timings(folder)[-1]["frontier/kl"] > 0
    assert read_ledger(folder)["prompts"] == 54
    assert read_ledger(folder)["leaks"]["held_out"] == {}
    evaluated = tmp_path / "evaluate"
    assert read_ledger(evaluated)["prompts"] == 8
    assert read_ledger(evaluated)["leaks"]["held_out"]["evaluate"]["normalised"] == 0
    asked = {row["prompt"] for row in rows}
    completions = read_lines(evaluated / "completions.jsonl")
    assert len(completions) == 8 and {row["prompt"] for row in completions} <= asked
