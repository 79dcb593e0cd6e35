"""Two models or two files of samples, judged head to head."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dpo_jax.evaluation.judge import BudgetExhausted, Judge
from dpo_jax.parallel import sharding
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.workdir import read_lines
from experiments import commands, head_to_head, judge_agreement
from experiments.head_to_head import Options, Side
from tests.helpers.judge_server import JudgeServer, always, longer, prefers
from tests.helpers.paths import ROOT
from tests.helpers.rows import user, write_jsonl
from tests.helpers.tiny_runs import write_model

JUDGE = Judge(model="loopback", template="dialogue", orders=2)


def files(folder, count=6):
    """Two files of samples: two answers to each of three prompts, A's of the last the shorter."""
    rows_a, rows_b = [], []
    for number in range(count // 2):
        prompt = [user(f"question {number}")]
        words = "one" if number == count // 2 - 1 else "one two three"
        rows_a.append(dict(prompt=prompt, completions=[f"{words} a{number}", f"{words} b{number}"]))
        rows_b += [dict(prompt=prompt, completion=f"four five {i}{number}") for i in range(2)]
    return (
        Side(str(write_jsonl(folder / "a.jsonl", rows_a)), None),
        Side(str(write_jsonl(folder / "b.jsonl", rows_b[::-1])), None),
    )


def test_files_are_compared_answer_by_answer(tmp_path):
    a, b = files(tmp_path)
    out = tmp_path / "out"
    priced = Judge(model="loopback", template="dialogue", orders=2, input_price=1e6)
    with JudgeServer(prefers(longer)) as server, server.environment():
        result = head_to_head.run(Options(a, b, priced, show=2), out, sharding.make_mesh())
    assert [result[name] for name in ("wins", "ties", "losses", "n", "prompts")] == [4, 0, 2, 6, 3]
    assert result["contradicted"] == 0 and len(server.prompts) == 12
    assert result["cost"] == sum(len(prompt.split()) for prompt in server.prompts)
    # The judge goes by length alone, so no rate at equal length can be told.
    assert result["equal_length_rate"] is None
    assert json.loads((out / "head_to_head.json").read_text()) == result
    votes = read_lines(out / "votes.jsonl")
    assert [vote["order"] for vote in votes[:2]] == ["ours, other", "other, ours"]
    assert [vote["ours"] for vote in votes[::2]][:2] == ["one two three a0", "one two three b0"]
    assert {vote["prompt"] for vote in votes} == {f"User: question {i}" for i in range(3)}
    assert sum(vote["cost"] for vote in votes) == result["cost"]
    write_jsonl(tmp_path / "votes.jsonl", [vote | dict(votes=["win"]) for vote in votes])
    assert len(judge_agreement.read_votes(str(tmp_path / "votes.jsonl"))) == 12
    assert (out / "examples.md").read_text().count("## ") == 2
    for suffix in (".csv", ".md", ".tex"):
        assert "0.667" in (out / f"head_to_head{suffix}").read_text() or suffix == ".csv"


def test_contradictions_are_ties(tmp_path):
    a, b = files(tmp_path)
    with JudgeServer(always("A")) as server, server.environment():
        result = head_to_head.run(Options(a, b, JUDGE), tmp_path / "out", sharding.make_mesh())
    assert (result["ties"], result["contradicted"], result["rate"]) == (6, 6, 0.5)


def test_budget_ends_and_another_resumes(tmp_path):
    a, b = files(tmp_path)
    capped = Judge(model="loopback", template="dialogue", orders=2, max_calls=5)
    with JudgeServer(prefers(longer)) as server, server.environment():
        with pytest.raises(BudgetExhausted, match="max_calls=5 is reached"):
            head_to_head.run(Options(a, b, capped), tmp_path / "out", None)
        head_to_head.run(Options(a, b, JUDGE), tmp_path / "out", None)
    assert len(server.prompts) == len(set(server.prompts)) == 12


def test_models_answer_the_prompts(tmp_path):
    """At temperature 0 a model ties with itself, which needs no call; at 1 it differs."""
    model = str(write_model(tmp_path / "model"))
    rows = [dict(prompt=f"w{number} w{number + 1}") for number in range(4)]
    prompts = str(write_jsonl(tmp_path / "prompts.jsonl", rows))
    sampling = Sampling(6, n=2, batch_size=8)
    asked = dict(judge=JUDGE, prompts=prompts, sampling=sampling)
    mesh = sharding.make_mesh()
    with JudgeServer(prefers(len)) as server, server.environment():
        same = Options(Side(model, 0.0), Side(model, 0.0), **asked)
        assert head_to_head.run(same, tmp_path / "same", mesh)["ties"] == 8
        assert not server.prompts
        other = Options(Side(model, 1.0), Side(model, 0.0), **asked)
        result = head_to_head.run(other, tmp_path / "other", mesh)
    assert result["a"] == f"{model}, T=1" and result["n"] == 8 and result["prompts"] == 4
    sampled = read_lines(tmp_path / "other" / "a.jsonl")
    for vote, row in zip(read_lines(tmp_path / "other" / "votes.jsonl")[::4], sampled, strict=True):
        assert (vote["prompt"], vote["ours"]) == (row["prompt"], row["completions"][0].strip())


@pytest.mark.parametrize(
    "rows_a, rows_b, message",
    [
        ([dict(prompt="p")], [], "a.jsonl line 1: expected a field 'completion', text"),
        ([dict(prompt="p", completions=["x", 3])], [], "a.jsonl line 1: expected a field"),
        ([dict(completion="x")], [], "line 1"),
        ([], [], "a.jsonl has no rows"),
        ([dict(prompt="p", completion="x")], [dict(prompt="q", completion="x")], 'such as "q"'),
        (
            [dict(prompt="p", completion="x")],
            [dict(prompt="p", completions=["x", "y"])],
            "has 1 answers to the prompt .* has 2",
        ),
    ],
)
def test_files_that_do_not_match(rows_a, rows_b, message, tmp_path):
    a = Side(str(write_jsonl(tmp_path / "a.jsonl", rows_a)), None)
    b = Side(str(write_jsonl(tmp_path / "b.jsonl", rows_b)), None)
    with pytest.raises(ValueError, match=message):
        head_to_head.run(Options(a, b, JUDGE), tmp_path / "out", None)
    # Nor does a dry run pass.
    with pytest.raises(ValueError, match=message):
        head_to_head.plan(Options(a, b, JUDGE), 1, tmp_path / "out")


def test_reward_model_reads_what_it_was_trained_on(tmp_path, monkeypatch, capsys):
    """Text keeps the space between prompt and answer; messages stay messages, for its template."""
    rows_a = [dict(prompt="POST: x\nTL;DR:", completion=" good one a")]
    rows_a.append(dict(prompt=[user("hi")], completion="yo a"))
    rows_b = [row | dict(completion=row["completion"].replace(" a", " longer b")) for row in rows_a]
    a = Side(str(write_jsonl(tmp_path / "a.jsonl", rows_a)), None)
    b = Side(str(write_jsonl(tmp_path / "b.jsonl", rows_b)), None)
    read = []

    def reward(examples):
        read.extend((example.prompt, *example.responses) for example in examples)
        return np.arange(len(examples), dtype=float)

    monkeypatch.setattr(head_to_head, "open_reward", lambda path, mesh: reward)
    for task in ("text", "tldr"):
        read.clear()
        asked = Options(a, b, None, reward_model="rm", task=task)
        result = head_to_head.run(asked, tmp_path / task, None)
        assert read == [
            ("POST: x\nTL;DR:", " good one a"),
            ([user("hi")], [dict(role="assistant", content="yo a")]),
            ("POST: x\nTL;DR:", " good one longer b"),
            ([user("hi")], [dict(role="assistant", content="yo longer b")]),
        ]
    assert result["losses"] == 2 and "If one of the two was optimised for it" in result["warning"]
    assert result["warning"] in (tmp_path / "tldr" / "head_to_head.md").read_text()
    assert "a reward model judged" in capsys.readouterr().out


def test_sides_draw_by_seeds_of_their_own():
    model = Side("m", 1.0)
    drawn = [head_to_head.drawn_by(Sampling(8, seed=3), letter, model) for letter in "ab"]
    assert [sampling.seed for sampling in drawn] == [3, 4]
    head_to_head.check_differ(model, model)
    with pytest.raises(ValueError, match="are one model at temperature 0: all answers would be"):
        head_to_head.check_differ(Side("m", 0.0), Side("m", 0.0))
    with pytest.raises(ValueError, match="are one file: all answers would be the same"):
        head_to_head.check_differ(Side("a.jsonl", None), Side("a.jsonl", None))


def test_prompts_of_a_config(tmp_path):
    """They are those of hh_winrate: single questions, in the order of their hash."""
    dialogue = "\n\nHuman: {} ok?\n\nAssistant:"
    rows = []
    for number in range(12):
        prompt = dialogue.format(number)
        if number % 3 == 0:
            prompt = dialogue.format("Hi") + " Hello." + prompt
        rows.append(dict(chosen=f"{prompt} Yes.", rejected=f"{prompt} No."))
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    overrides = {"data.path": str(path), "data.eval_fraction": "0.9"}
    config = commands.config_maker("hh", overrides)("dpo")
    path = head_to_head.write_prompts(config, 4, tmp_path / "out", None)
    found = read_lines(pathlib.Path(path))
    assert len(found) == 4 and all(row["prompt"].count("Human:") == 1 for row in found)


def test_plan_counts(tmp_path):
    a, b = files(tmp_path)
    lines = "judge: 12 questions, up to 3 calls each; 0 calls are kept"
    assert head_to_head.plan(Options(a, b, JUDGE), 99, tmp_path) == lines
    asked = [dict(prompt=[user(f"question {number}")]) for number in range(3)]
    prompts = str(write_jsonl(tmp_path / "prompts.jsonl", asked))
    model = Side("m", 0.25)
    options = Options(model, b, JUDGE, prompts=prompts, sampling=Sampling(8, n=2))
    assert head_to_head.plan(options, 3, tmp_path) == f"sample m, T=0.25: 6 answers\n{lines}"


def test_a_file_that_a_model_will_not_match(tmp_path):
    """It is refused before the model samples, whose folder is not there."""
    _, b = files(tmp_path)
    asked = [dict(prompt=[user(f"question {number}")]) for number in range(2)]
    prompts = str(write_jsonl(tmp_path / "prompts.jsonl", asked))
    options = Options(Side("m", 1.0), b, JUDGE, prompts=prompts, sampling=Sampling(8, n=2))
    with pytest.raises(ValueError, match="m, T=1 has no answer to 1 of the other's prompts"):
        head_to_head.run(options, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
    # Those of a config are not drawn in a dry run.
    drawn = dataclasses.replace(options, prompts="config")
    assert "sample m, T=1" in head_to_head.plan(drawn, 2, tmp_path)


@pytest.mark.slow
def test_head_to_head_command(tmp_path):
    """A dry run of two files; then flags that would do nothing."""
    a, b = files(tmp_path)
    command = [sys.executable, "-m", "experiments.head_to_head", f"--a={a.source}"]
    command += [f"--b={b.source}", f"--workdir={tmp_path / 'out'}", "--judge_model=x"]
    command += ["--template=dialogue"]

    def said(*flags):
        done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, text = said("--dry_run")
    assert code == 0 and "judge: 12 questions, up to 3 calls each; 0 calls are kept" in text
    code, text = said("--seed=1")
    assert code == 2 and "--seed would do nothing as both sides are files" in text
    assert not os.path.exists(tmp_path / "out")
