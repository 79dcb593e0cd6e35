"""Agreement of judges with people's votes: tables by hand, and the command."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpo_jax.evaluation import judge
from experiments import judge_agreement as agreement
from tests.helpers.judge_server import JudgeServer, always, longer, prefers
from tests.helpers.paths import ROOT
from tests.helpers.tiny import tiny_config


def row(votes, **fields):
    return dict(prompt="post", ours="one two", other="three", votes=votes) | fields


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [row(["win", "win"]), row(["win", "loss"]), row(["loss", "loss"]), row(["loss", "tie"])]


def test_tables_by_hand():
    """Two votes on each of four comparisons; ties, of people or judges, tell nothing of
    agreement.
    """
    rows = [dict(one, matchup="m") for one in ROWS] + [row(["win"], matchup="single")]
    verdicts = dict(
        first=["win", "win", "loss", "tie", None], second=["loss", "win", "loss", "loss", "win"]
    )
    found = agreement.tables(rows, verdicts)
    assert list(found) == ["m", "single"]
    rates = {one["rater"]: one for one in found["m"]["win_rates"]}
    assert [rates[name]["rate"] for name in ("people", "first", "second")] == [0.4375, 0.625, 0.25]
    assert rates["people"]["ties"] == rates["first"]["ties"] == 1 and rates["people"]["n"] == 4
    pairs = {(one["first"], one["second"]): one for one in found["m"]["agreement"]}
    assert list(pairs) == [
        ("people", "people"),
        ("people", "first"),
        ("people", "second"),
        ("first", "second"),
    ]
    assert [(one["rate"], one["n"]) for one in pairs.values()] == [
        (pytest.approx(2 / 3), 3),
        (pytest.approx(5 / 6), 3),
        (pytest.approx(4 / 7), 4),
        (pytest.approx(2 / 3), 3),
    ]
    # Chance is 1/2, in whichever order people stand.
    assert pairs["people", "people"]["kappa"] == pytest.approx(1 / 3)
    single = found["single"]
    assert single["win_rates"][1] == dict(
        rater="first", rate=None, low=0.0, high=1.0, n=0, ties=0, unparsable=1
    )
    assert [(one["first"], one["second"]) for one in single["agreement"]] == [("people", "second")]
    shown = agreement.show(found)
    # Columns stand in line.
    assert len({len(line) for line in shown.split("\n\n")[0].splitlines()[1:]}) == 1
    assert "66.7" in shown and "0.33" in shown and "--- single" in shown


@pytest.mark.parametrize(
    "line, message",
    [
        (
            dict(prompt="a", ours="b", votes=["win"]),
            "line 2: expected a field 'other', text; found None",
        ),
        (row([]), "line 2: expected a field 'votes', a list of win, tie, loss; found []"),
        (row("win"), "'votes'"),
        (row(["draw"]), "'votes'"),
        (row([["win"]]), "'votes'"),
        (row(["win"], matchup=3), "'matchup'"),
    ],
)
def test_read_votes_checks(line, message, tmp_path):
    with pytest.raises(ValueError) as error:
        agreement.read_votes(write(tmp_path / "votes.jsonl", [ROWS[0], line]))
    assert message in str(error.value) and "votes.jsonl line 2" in str(error.value)


def test_read_votes_of_chat_messages(tmp_path):
    """Judges read them as text."""
    call = dict(name="find", arguments=dict(city="Rome"))
    prompt = [dict(role="system", content="Be short."), dict(role="user", content="Where?")]
    ours = [dict(role="assistant", content="Here.")]
    other = [dict(role="assistant", content="", tool_calls=[dict(function=call)])]
    line = dict(prompt=prompt, ours=ours, other=other, votes=["win"])
    (row,) = agreement.read_votes(write(tmp_path / "votes.jsonl", [line]))
    assert row["prompt"] == "System: Be short.\n\nUser: Where?"
    assert row["ours"] == "Here." and json.loads(row["other"]) == call


def test_read_votes_of_empty_file(tmp_path):
    with pytest.raises(ValueError, match="has no rows"):
        agreement.read_votes(write(tmp_path / "votes.jsonl", []))


def numbered(count):
    """Comparisons that differ, ours the longer in two of three."""
    return [
        row(
            ["win", "win"] if number % 2 else ["win", "loss"],
            prompt=f"post {number}",
            ours="one two" if number % 3 else "one",
            other="three" if number % 3 else "three four",
        )
        for number in range(count)
    ]


def test_command_stops_at_cap_and_resumes(tmp_path, capsys):
    votes = write(tmp_path / "votes.jsonl", numbered(12))
    # A model's name may hold a colon.
    names = ["judge:8b:summary_simple", "judge:8b:summary_concise"]
    with JudgeServer(prefers(longer)) as server:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "experiments.judge_agreement",
                f"--votes={votes}",
                f"--workdir={tmp_path / 'out'}",
                *(f"--judge={name}" for name in names),
                "--max_calls=15",
                "--concurrency=2",
            ],
            cwd=ROOT,
            text=True,
            capture_output=True,
            env=os.environ | server.variables(),
        )
        assert (
            done.returncode == 2
            and "max_calls=15 is reached" in done.stderr
            and "Traceback" not in done.stderr
        )
        assert len(server.requests) == 15 and "judge 12/12" in done.stdout
        judges = {
            name: judge.Judge(model="judge:8b", template=name.rpartition(":")[2]) for name in names
        }
        with server.environment():
            agreement.run(votes, str(tmp_path / "out"), judges, [])
        assert len(server.requests) == len(set(server.prompts)) == 24
    # And now without the server.
    found = json.loads((tmp_path / "out" / "agreement.json").read_text())["all"]
    assert agreement.run(votes, str(tmp_path / "out"), judges, [])["all"] == found
    assert [one["rate"] for one in found["win_rates"]] == pytest.approx([0.75, 8 / 12, 8 / 12])
    assert [one["rate"] for one in found["agreement"]] == pytest.approx([0.5, 14 / 24, 14 / 24, 1])
    record = json.loads((tmp_path / "out" / "judge_8b_summary_simple.json").read_text())
    assert (record["wins"], record["losses"], record["judge"]) == (8, 4, "judge:8b")
    assert "people, judge:8b:summary_simple" in capsys.readouterr().out


def test_judge_of_positions_agrees_with_nobody(tmp_path):
    with JudgeServer(always("A")) as server, server.environment():
        found = agreement.run(
            write(tmp_path / "votes.jsonl", numbered(6)),
            str(tmp_path / "out"),
            dict(position=judge.Judge(model="m", template="summary_simple", orders=2)),
            [],
        )
    assert found["all"]["win_rates"][1]["rate"] == 0.5 and found["all"]["win_rates"][1]["ties"] == 6
    assert [one["second"] for one in found["all"]["agreement"]] == ["people"]


def test_reward_model_as_judge(tmp_path):
    """Its verdicts are those of the scores that transformers gives to prompt + answer + EOS."""
    torch = pytest.importorskip(
        "torch", reason="the independent reference is transformers with torch"
    )
    import transformers

    from dpo_jax.models import hf, transformer
    from tests.helpers.tiny_runs import tiny_hf_config, tokenizer

    hf_config = tiny_hf_config()
    config = tiny_config(head="reward")
    params = jax.jit(lambda key: jax.tree.map(lambda x: x * 8, transformer.init(config, key)))(
        jax.random.key(3)
    )
    params["head"]["scalar"] = jax.random.normal(jax.random.key(4), (16,))
    hf.save(tmp_path / "rm", config, hf_config, params, tokenizer())
    rng = np.random.default_rng(0)

    def words(count):
        return " ".join(f"w{i}" for i in rng.integers(0, 37, count))

    rows = [judge.Comparison(words(4), words(4), words(4)) for _ in range(12)] + [
        judge.Comparison("w1", "w2", "w2 ")
    ]
    found = agreement.by_reward_model(str(tmp_path / "rm"), rows)
    reference = transformers.LlamaForSequenceClassification.from_pretrained(
        tmp_path / "rm", num_labels=1
    ).eval()

    def score(prompt, text):
        ids = tokenizer()(f"{prompt} {text}").input_ids + [1]
        with torch.no_grad():
            hidden = reference.model(torch.tensor([ids])).last_hidden_state[0, -1]
            return float(reference.score(hidden))

    scores = np.array(
        [[score(one.prompt, one.ours), score(one.prompt, one.other)] for one in rows[:12]]
    )
    assert found == [*("win" if ours > other else "loss" for ours, other in scores), "tie"]
    assert {"win", "loss"} <= set(found) and np.abs(scores[:, 0] - scores[:, 1]).min() > 1e-3
