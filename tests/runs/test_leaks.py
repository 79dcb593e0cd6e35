"""Runs whose held-out prompts are trained on: told in the ledger, refused where they are judged."""

import json

import numpy as np
import pytest

from configs import ppo
from dpo_jax import config as configs
from dpo_jax import data_report
from dpo_jax.data import leaks, toy
from dpo_jax.pipeline import leak_checks
from dpo_jax.pipeline.run import Run
from dpo_jax.pipeline.stages import judged_prompts, run_stages
from dpo_jax.workdir import read_done, read_ledger
from tests.helpers.rows import write_jsonl
from tests.helpers.tiny_runs import dpo_config, on_devices, tokenizer, write_model, write_pairs

LEAKED = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, pairs, and SFT rows whose test split has prompts of training pairs."""
    folder = tmp_path_factory.mktemp("leaks")
    pairs = folder / "pairs"
    pairs.mkdir()
    write_pairs(pairs / "train.jsonl", 40)
    write_pairs(pairs / "test.jsonl", 6, seed=1)
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    posts = folder / "posts"
    posts.mkdir()
    own = [dict(prompt=f"w1 w{number}", completion="w2") for number in range(2, 32)]
    # With a split of its own to validate on, all others are tested on.
    validation = [dict(prompt=f"w2 w{number}", completion="w1") for number in range(2, 5)]
    splits = dict(train=own[:20], validation=validation)
    # Half of them in another spelling.
    splits["test"] = own[20:]
    for number, row in enumerate(rows[:LEAKED]):
        prompt = row["prompt"] if number % 2 else f"{row['prompt']} "
        splits["test"].append(dict(prompt=prompt, completion="w3"))
    for name, of_split in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in of_split)
        (posts / f"{name}.jsonl").write_text(text)
    return write_model(folder / "model"), pairs, posts


def config_of(files, stages, on_leak="error"):
    model, pairs, posts = files
    short = dpo_config(model, pairs)
    config = configs.default(stages)
    config.model.path = str(model)
    config.data.update(path=str(pairs), sft_path=str(posts), on_leak=on_leak)
    for stage in set(stages) & {"sft", "dpo"}:
        config[stage].update(short.dpo)
        config[stage].update(steps=1)
    if "evaluate" in stages:
        config.evaluate.update(prompts=20, show=0)
        config.sampling.update(max_new_tokens=4)
    return config


def test_prompts_of_another_data_set_are_counted(files, tmp_path, capsys):
    """The SFT data's test prompts are training prompts of the pairs: both ledgers said 0."""
    run = Run(config_of(files, ("sft", "dpo")), tmp_path, mesh=None)
    words = tokenizer()
    run.load_data("sft", words)
    ledger = read_ledger(run.folder("sft"))
    assert ledger["leaks"]["held_out"]["sft"]["normalised"] == 0
    run.load_data("dpo", words)
    ledger = read_ledger(run.folder("dpo"))
    found = ledger["leaks"]["held_out"]
    assert ledger["shared_prompts"] == 0 == found["dpo"]["normalised"]
    assert found["sft"] == dict(
        prompts=3 + 10 + LEAKED,
        exact=LEAKED // 2,
        normalised=LEAKED,
        by=dict(dpo=LEAKED),
        selected_on=0,
        selected_by={},
    )
    assert f"(dpo trains on {LEAKED})" in capsys.readouterr().out


def test_data_command_counts_the_same_before_a_run(files):
    """dpo-jax data --config=NAME reads the texts of all data sets."""
    config = config_of(files, ("sft", "dpo"))
    found = leaks.of_run(leaks.read_runs([config]))
    sft, dpo = found
    assert (sft.held_out, sft.prompts, sft.exact) == ("sft", 3 + 10 + LEAKED, LEAKED // 2)
    assert sft.by == dict(dpo=LEAKED) and not dpo.normalised
    setup = data_report.Setup("dpo", config, {})
    survey, advice = data_report.look(setup, "auto", None, shown=0)
    leaked = data_report._leaks(config)
    assert leaked == found
    text = data_report.report(survey, "", advice, data_report.Style(False), leaked)
    assert f"(dpo trains on {LEAKED})" in text
    config.data.sft_path = ""  # one data set, of which Repeats tells
    assert not data_report._leaks(config)


def test_stages_of_an_earlier_version_are_named(files, tmp_path):
    run = Run(config_of(files, ("sft", "dpo")), tmp_path, mesh=None)
    run.folder("sft").mkdir()
    (run.folder("sft") / "done.json").write_text("{}")
    run.load_data("dpo", tokenizer())
    assert read_ledger(run.folder("dpo"))["leaks"]["unknown"] == ["sft"]


@pytest.mark.parametrize("stages", [("sft", "dpo", "evaluate"), ("sft", "rm", "best_of_n")])
def test_run_stops_before_it_trains(files, tmp_path, stages):
    """Before sft, although a later stage trains on the prompts, of pairs that sft does not read."""
    config = config_of(files, stages)
    config.reward.update(kind="rm", path="")
    if "best_of_n" in stages:
        config.best_of_n.prompts = 20
    run = Run(config, tmp_path, mesh=None)
    with pytest.raises(ValueError, match=f"of the 20 prompts that {stages[-1]} is to") as stopped:
        run.load_data("sft", tokenizer())
    assert f"by {stages[1]} (config.data: {files[1]})" in str(stopped.value)
    # Where sft is done, too.
    config.data.on_leak = "allow"
    run.load_data("sft", tokenizer())
    config.data.on_leak = "error"
    with pytest.raises(ValueError, match=f"of the 20 prompts that {stages[-1]} is to") as again:
        run.load_data(stages[1], tokenizer())
    assert str(again.value) == str(stopped.value)


def test_refused_run_goes_on_where_leaks_are_allowed(files, tmp_path, capsys):
    """A whole run: refused before its first step, then in the same folder with a warning."""
    stages = ("dpo", "evaluate")

    def reward(prompts, completions):
        return np.array([len(text) for text in completions], float)

    with on_devices(1):
        with pytest.raises(ValueError, match="so the result would be too good"):
            run_stages(config_of(files, stages), str(tmp_path), reward=reward)
        assert not (tmp_path / "dpo" / "checkpoints").exists()
        run_stages(config_of(files, stages, "allow"), str(tmp_path), reward=reward)
    found = read_ledger(tmp_path / "evaluate")["leaks"]["held_out"]["evaluate"]
    assert found["prompts"] == 20 and found["normalised"] > 0
    assert found["by"] == dict(dpo=found["normalised"])
    told = f"{found['normalised']} of 20 prompts that are judged are trained on"
    assert told in capsys.readouterr().out
    assert "prompts.safetensors" in read_done(tmp_path / "dpo")["files"]


def test_judged_prompts_that_dpo_validates_on_are_told(files, tmp_path, capsys):
    """Of pairs with a split to validate on and none to test on: half of the judged prompts."""
    model, _, _ = files
    pairs, posts = tmp_path / "pairs", tmp_path / "posts"
    questions = [f"w1 w{number}" for number in range(2, 32)]
    rows = dict(train=questions[:10], validation=questions[10:20], test=questions[10:])
    for name, prompts in rows.items():
        answered = [dict(prompt=prompt, chosen="w2", rejected="w3") for prompt in prompts]
        if name != "test":
            write_jsonl(pairs / f"{name}.jsonl", answered)
        if name != "validation":
            write_jsonl(posts / f"{name}.jsonl", answered)
    # Those of sft are other ones.
    posts_of_sft = [dict(prompt=f"w3 w{number}", completion="w2") for number in range(2, 12)]
    write_jsonl(posts / "validation.jsonl", posts_of_sft)
    config = config_of((model, pairs, posts), ("sft", "dpo", "evaluate"))
    run = Run(config, tmp_path / "run", mesh=None)
    words = tokenizer()
    run.load_data("sft", words)
    warning = "10 of the 20 prompts that are judged are validated on, too (dpo validates on 10)"
    assert f"evaluate: {warning}" in capsys.readouterr().out  # before anything is trained
    run.load_data("dpo", words)
    ledger = read_ledger(run.folder("dpo"))["leaks"]["held_out"]
    assert ledger["sft"]["selected_on"] == 10 and ledger["dpo"]["selected_on"] == 0
    assert f"evaluate: {warning}" in capsys.readouterr().out
    run.folder("evaluate").mkdir()
    judged_prompts(run, "evaluate", words)
    assert warning in capsys.readouterr().out
    ledger = read_ledger(run.folder("evaluate"))["leaks"]["held_out"]["evaluate"]
    assert ledger["selected_by"] == dict(dpo=10)


def test_leaked_prompts_can_be_left_out(files, tmp_path, capsys):
    config = config_of(files, ("dpo", "evaluate"), "drop")
    config.evaluate.prompts = 10
    run = Run(config, tmp_path, mesh=None)
    words = tokenizer()
    run.load_data("dpo", words)
    asked = run.test_prompts("evaluate", words)
    own = [f"w1 w{number}" for number in range(22, 32)]
    assert sorted(asked.prompts.texts) == sorted(own)
    run.folder("evaluate").mkdir()
    leak_checks.record_judged(run, "evaluate", asked, run.load_prompts(words)["train"])
    told = (
        f"{LEAKED} of {10 + LEAKED} test prompts are trained on and left out "
        "(config.data.on_leak=drop)"
    )
    assert f"evaluate: {told}" in " ".join(capsys.readouterr().out.split())
    left_out = read_ledger(run.folder("evaluate"))["leaks"]["left_out"]
    assert left_out == dict(prompts=10 + LEAKED, trained_on=LEAKED)
    config.evaluate.prompts = 11
    with pytest.raises(ValueError, match="evaluate.prompts = 11, but there are only 10") as few:
        run.test_prompts("evaluate", words)
    assert told in str(few.value) and "the data's own split" in str(few.value)


def test_toy_is_exempt(tmp_path):
    """Its four prompts are all trained on, by design."""
    config = configs.default(("sft", "rm", "best_of_n"))
    config.data.update(source="toy", max_rows=200, max_eval_rows=20, append_eos=False)
    config.reward.update(kind="rm", path="")
    run = Run(config, tmp_path, mesh=None)
    prompts = run.load_prompts(toy.tokenizer())
    seen = dict(train=prompts["train"].hashes, eval=prompts["eval"].hashes)
    found = leak_checks.report(run, "sft", "toy", seen)
    found = found["held_out"]["sft"]
    assert (found["prompts"], found["normalised"], found["by"]) == (4, 4, dict(sft=4))
    judged = leak_checks.judged(run, "best_of_n", prompts["eval"], prompts["train"])
    assert judged.texts == prompts["eval"].texts
    assert judged.clusters is None  # the prompt of each row is drawn anew


def test_prefixes_of_texts_are_told_and_not_refused(tmp_path, capsys):
    """Of reviews whose first words are the same, and the rest is not."""
    for split, end in (("train", "w9"), ("test", "w8")):
        texts = [dict(text=f"w1 w2 w3 w4 w{number} {end}") for number in range(12, 24)]
        text = "".join(json.dumps(row) + "\n" for row in texts)
        (tmp_path / f"{split}.jsonl").write_text(text)
    config = configs.default(("ppo", "evaluate"))
    config.data.update(source="imdb", path=str(tmp_path))
    config.sampling.update(min_prefix=2, max_prefix=2)
    config.evaluate.prompts = 12
    run = Run(config, tmp_path, mesh=None)
    prompts = run.training_prompts("ppo", tokenizer())
    assert len(prompts) == 12
    ledger = read_ledger(run.folder("ppo"))
    assert ledger["leaks"]["prefixes"] == dict(prompts=12, trained_on=12)
    assert "12 of 12 held-out prefixes of 2 to 2 tokens" in capsys.readouterr().out
    asked = run.test_prompts("evaluate", tokenizer())
    run.folder("evaluate").mkdir()
    leak_checks.record_judged(run, "evaluate", asked, prompts)
    found = read_ledger(run.folder("evaluate"))["leaks"]
    assert found["held_out"]["evaluate"]["normalised"] == 0
    assert found["prefixes"]["trained_on"] == 12


def test_what_limits_the_prompts_to_judge(tmp_path, capsys):
    """configs/ppo.py works on a few hundred pairs; an error names the field that is too low."""
    config = ppo.get_config()
    config.data.path = str(write_pairs(tmp_path / "pairs.jsonl", 200))
    words = tokenizer()
    asked = Run(config, tmp_path, mesh=None).test_prompts("evaluate", words)
    assert 8 <= len(asked.prompts) < 20 and asked.kind == "test"
    config.evaluate.prompts = 64
    for fields, limit in (
        (dict(), "config.data.eval_fraction = 0.1, of which about half are tested on"),
        (dict(max_eval_rows=4), "config.data.max_eval_rows = 4"),
    ):
        config.data.update(fields)
        with pytest.raises(ValueError, match=f"evaluate.prompts = 64, but .*[(]{limit}[)]"):
            Run(config, tmp_path, mesh=None).test_prompts("evaluate", words)
    # So few that none are apart: said once, before training.
    config.data.update(eval_fraction=0.02, max_eval_rows=256)
    config.evaluate.prompts = 2
    run = Run(config, tmp_path, mesh=None)
    capsys.readouterr()
    leak_checks.check_ahead(run, "rm", words)
    told = "evaluate: too few prompts are held out to keep some for testing alone"
    assert told in " ".join(capsys.readouterr().out.split())
    run.folder("evaluate").mkdir()
    judged_prompts(run, "evaluate", words)
    assert told not in " ".join(capsys.readouterr().out.split())
