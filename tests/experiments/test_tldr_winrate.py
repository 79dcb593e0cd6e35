"""The TL;DR experiment on a tiny model and made-up posts, with a judge on the loopback."""

import csv
import functools
import json
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import flags

from dpo_jax import config as configs
from dpo_jax import config_checks
from dpo_jax.evaluation import statistics
from dpo_jax.evaluation.judge import BudgetExhausted, Judge
from dpo_jax.models import hf
from dpo_jax.parallel import sharding
from dpo_jax.pipeline.run import Run
from dpo_jax.rewards import make
from dpo_jax.workdir import StageChanged, read_lines
from experiments import commands, judge_agreement, tiny_tldr, tldr_winrate, winrate, winrate_report
from experiments.winrate import Options
from tests.helpers import bucket_folders
from tests.helpers.judge_server import JudgeServer, answer, prefers, texts
from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import environment, experiment_configs, free_port, plant

JUDGE = Judge(model="loopback", template="summary_concise")
SMALL = Options(("dpo", "sft", "base", "best_of_n"), (0.0, 1.0), JUDGE, counts=(1, 3), prompts=8)
MAKE_MESH = sharding.make_mesh


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sharding, "make_mesh", functools.partial(MAKE_MESH, devices=jax.devices()[:1])
        )
        yield


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """What makes configs/tldr.py:tiny read the rows in a folder of the test's."""
    folder = tiny_tldr.write(tmp_path_factory.mktemp("tldr") / "rows")
    return [
        f"--config.{field}={folder / name}"
        for field, name in (
            ("data.path", "comparisons"),
            ("data.sft_path", "posts"),
            ("model.tokenizer", "tokenizer"),
        )
    ]


@pytest.fixture(scope="module")
def make_config(arguments):
    return experiment_configs("configs/tldr.py:tiny", arguments)


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory):
    """A run to the end, from supervised and reward models that are there: workdir, rows, what the
    judge was asked.
    """
    workdir = tmp_path_factory.mktemp("run")
    ranker = Run(winrate.config_of(make_config, "rm"), workdir, sharding.make_mesh())
    plant(ranker, "sft")
    plant(ranker, "rm", head="reward")
    with JudgeServer(prefers(len)) as server, server.environment():
        rows = tldr_winrate.run(make_config, str(workdir), SMALL)
    return workdir, rows, server.prompts


def results(workdir):
    return workdir / "winrate" / "tldr" / "loopback-summary_concise"


def test_win_rates_equal_judge(finished):
    """The judge takes the longer summary, so each verdict can be told from the texts."""
    workdir, rows, _ = finished
    assert [(winrate_report.label(row), row["temperature"]) for row in rows] == [
        ("dpo", 0),
        ("dpo", 1),
        ("sft", 0),
        ("sft", 1),
        ("base", 0),
        ("base", 1),
        ("best of 1", 0),
        ("best of 3", 0),
        ("best of 1", 1),
        ("best of 3", 1),
    ]
    references = {row["prompt"]: row["label"].strip() for row in tiny_tldr.posts(30, 2)}
    for row, folder in zip(
        rows,
        [
            "dpo-0-1",
            "dpo-1-1",
            "sft-0-1",
            "sft-1-1",
            "base-0-1",
            "base-1-1",
            "sft-0-1",
            "sft-0-1",
            "sft-1-3",
            "sft-1-3",
        ],
        strict=True,
    ):
        sampled = read_lines(
            workdir / "winrate" / "tldr" / "samples" / folder / "completions.jsonl"
        )
        assert len(sampled) == 8
        for verdict, found in zip(row["verdicts"], sampled, strict=True):
            best = sorted(found["completions"][: row["best_of"]], key=lambda one: one["reward"])[
                -1
            ]["text"].strip()
            reference = next(
                label for prompt, label in references.items() if prompt.endswith(found["prompt"])
            )
            gap = len(best) - len(reference) if best != reference else 0
            assert gap == 0 or verdict == ("win" if gap > 0 else "loss")
        assert (
            row["rate"] == (row["wins"] + row["ties"] / 2) / 8
            and row["low"] <= row["rate"] <= row["high"]
        )
    assert rows[3]["verdicts"] == rows[8]["verdicts"]  # the best of 1 is the model's own answer


def test_judge_sees_whole_post(finished):
    _, _, asked = finished
    whole = {row["prompt"].removesuffix("TL;DR:").strip() for row in tiny_tldr.posts(30, 2)}
    assert asked
    for prompt in asked:
        post = prompt.split("Forum post:\n")[1].split("\n\nSummary A:")[0]
        assert post in whole
        assert not any(text.startswith("TL;DR") for text in texts(prompt))


def test_best_of_n_by_reward_model(finished):
    """What is kept beside each of several completions is the reward model's score of its very
    tokens.
    """
    workdir, _, _ = finished
    samples = workdir / "winrate" / "tldr" / "samples"
    rows = read_lines(samples / "sft-1-3" / "completions.jsonl")
    pairs = [
        (np.array(row["tokens"]), np.array(one["tokens"]))
        for row in rows
        for one in row["completions"]
    ]
    found = [one["reward"] for row in rows for one in row["completions"]]
    score = make.make_reward("rm", str(workdir / "rm" / "hf"), 8, sharding.make_mesh())
    np.testing.assert_allclose(found, score(None, None, pairs), atol=1e-5)
    assert len(set(found)) == 24
    assert all(
        one["reward"] == 0
        for row in read_lines(samples / "dpo-1-1" / "completions.jsonl")
        for one in row["completions"]
    )


def test_report_table_figure_json(finished):
    workdir, rows, _ = finished
    folder = results(workdir)
    assert (folder / "winrate.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((folder / "winrate.json").read_text())
    assert (written["task"], written["prompts"], written["judged"]["judge"]) == (
        "tldr",
        8,
        "loopback",
    )
    assert (
        written["complete"]
        and written["judged"]["template_sha256"]
        and written["judged"]["asked_from"]
    )
    assert [row["rate"] for row in written["rows"]] == [row["rate"] for row in rows]
    pair = next(
        row for row in written["paired"] if (row["second"], row["temperature"]) == ("sft", 1.0)
    )
    assert pair["difference"] == pytest.approx(rows[1]["rate"] - rows[3]["rate"]) and pair["n"] == 8
    table = (folder / "winrate.md").read_text()
    assert (
        "| win rate | T=0 | T=1 |" in table
        and f"| dpo | {winrate_report.cell(rows[0])} | " in table
    )
    assert (
        f"| dpo - sft | 1 | {pair['difference']:.3f} [{pair['low']:.3f}, {pair['high']:.3f}] | "
        in table
    )
    adjusted = statistics.holm([row["p"] for row in written["paired"]])
    assert [row["p_holm"] for row in written["paired"]] == adjusted
    with (folder / "winrate.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["name"], float(line["rate"])) for line in lines] == [
        (winrate_report.label(row), row["rate"]) for row in rows
    ]
    assert r"\toprule" in (folder / "winrate.tex").read_text()
    assert "| answers | T | words | rouge1 | rouge2 | rougeL | unparsable |" in table


def test_votes_and_examples(finished):
    """Each vote has a row, which says who it is for; each win rate has a page of examples."""
    workdir, rows, asked = finished
    votes = read_lines(results(workdir) / "votes.jsonl")
    assert len(votes) == 8 * len(rows)
    for number, vote in enumerate(votes):
        row = rows[number // 8]
        assert vote["matchup"] == f"{winrate_report.full_name(row)}; the data's response"
        assert vote["verdict"] == row["verdicts"][number % 8]
        if vote["calls"]:
            a, b = vote["ours"], vote["other"]
            if vote["order"] == "other, ours":
                a, b = b, a
            assert any(vote["prompt"] in prompt and (a, b) == texts(prompt) for prompt in asked)
            assert vote["answer"].startswith("Comparison: ") and vote["cost"] == 0
    # They can go to people, who add their votes.
    path = workdir / "votes.jsonl"
    path.write_text("".join(json.dumps(vote | dict(votes=["win"])) + "\n" for vote in votes))
    assert len(judge_agreement.read_votes(str(path))) == len(votes)
    page = (results(workdir) / "examples" / "dpo-1.md").read_text()
    assert page.startswith(
        f"# dpo, T=1 against the data's response\n\nWin rate {rows[1]['rate']:.3f}"
    )
    assert page.count("## ") == 8
    assert page.count("> Comparison: they differ.\\\n> Better: ") == sum(
        bool(vote["calls"]) for vote in votes[8:16]
    )


def test_finished_experiment_replays(finished, make_config, monkeypatch):
    workdir, rows, _ = finished
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hf, "save", None)  # nothing is trained
    monkeypatch.setattr(make, "make_reward", None)  # or scored
    assert (
        tldr_winrate.run(make_config, str(workdir), SMALL)[-1]["verdicts"] == rows[-1]["verdicts"]
    )


def test_experiment_in_a_bucket(finished, make_config, tmp_path, monkeypatch):
    """One that another machine finished, but for a row of samples and the judge's last answer."""
    workdir, rows, _ = finished
    bucket = tmp_path / "buckets" / "bucket" / "run"
    shutil.copytree(workdir, bucket)
    (sampled,) = bucket.glob("winrate/tldr/samples/dpo-1-1/completions.jsonl")
    whole = sampled.read_bytes()
    sampled.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    calls = results(bucket) / "judgements.jsonl"
    answers = calls.read_bytes().splitlines(keepends=True)
    calls.write_bytes(b"".join(answers[:-1]))
    bucket_folders.use(monkeypatch, tmp_path / "buckets", tmp_path / "copies")
    with (
        JudgeServer(prefers(len)) as server,
        server.environment(),
        commands.in_workdir("s3://bucket/run") as folder,
    ):
        again = tldr_winrate.run(make_config, folder, SMALL)
    assert [row["verdicts"] for row in again] == [row["verdicts"] for row in rows]
    assert len(server.prompts) == 1
    assert sampled.read_bytes() == whole
    assert len(calls.read_bytes().splitlines()) == len(answers)


def test_both_orders_share_calls(finished, make_config):
    """Each question of the other order is new; a table of their own stands beside the first."""
    workdir, _, asked = finished
    both = Judge(model="loopback", template="summary_concise", orders=2)
    with JudgeServer(prefers(len)) as server, server.environment():
        tldr_winrate.run(make_config, str(workdir), Options(("sft",), (0.0,), both, prompts=8))
    assert 0 < len(server.prompts) <= 8 and not set(server.prompts) & set(asked)
    folder = results(workdir).with_name("loopback-summary_concise-both_orders")
    assert (folder / "winrate.json").exists() and not (folder / "judgements.jsonl").exists()


def test_samples_of_other_weights_are_refused(finished, arguments):
    """As after a stage's folder was removed, and trained again otherwise."""
    workdir, _, _ = finished
    other = experiment_configs("configs/tldr.py:tiny", [*arguments, "--config.dpo.beta=0.1"])
    runs = {"dpo": Run(other("dpo"), workdir, sharding.make_mesh())}
    point = tldr_winrate.points(runs, SMALL)[0]
    settings = workdir / "winrate" / "tldr" / "samples" / point.folder / "settings.json"
    with pytest.raises(StageChanged, match="dpo.beta: 0.5 in the folder, 0.1 now"):
        winrate._claim(settings, json.loads(settings.read_text()) | point.policy.made_by)


def test_budget_ends_and_another_resumes(finished, make_config, tmp_path):
    """What was judged within the first is drawn; nothing is judged twice."""
    workdir, rows, asked = finished
    for name in ("sft", "rm", "dpo"):
        (tmp_path / name).symlink_to(workdir / name)
    (tmp_path / "winrate" / "tldr").mkdir(parents=True)
    (tmp_path / "winrate" / "tldr" / "samples").symlink_to(workdir / "winrate" / "tldr" / "samples")
    with JudgeServer(prefers(len)) as server, server.environment():
        capped = Options(
            **vars(SMALL)
            | dict(judge=Judge(model="loopback", template="summary_concise", max_calls=20))
        )
        with pytest.raises(BudgetExhausted, match="max_calls=20 is reached"):
            tldr_winrate.run(make_config, str(tmp_path), capped)
        first = json.loads((results(tmp_path) / "winrate.json").read_text())
        assert (
            0 < len(first["rows"]) < len(rows)
            and len(server.prompts) == 20
            and not first["complete"]
        )
        assert [row["verdicts"] for row in tldr_winrate.run(make_config, str(tmp_path), SMALL)] == [
            row["verdicts"] for row in rows
        ]
    assert sorted(server.prompts) == sorted(asked) and len(set(asked)) == len(asked)


@pytest.mark.slow
def test_kill_while_judging(finished, arguments, make_config, tmp_path):
    """By the command, with -9: the command goes on to the same verdicts, and no answer that was
    kept is asked again.
    """
    workdir, rows, asked = finished

    def slow(prompt, times):
        time.sleep(0.05)
        return prefers(len)(prompt, times)

    path = results(tmp_path) / "judgements.jsonl"
    for name in ("sft", "rm", "dpo"):
        (tmp_path / name).symlink_to(workdir / name)
    (tmp_path / "winrate" / "tldr").mkdir(parents=True)
    (tmp_path / "winrate" / "tldr" / "samples").symlink_to(workdir / "winrate" / "tldr" / "samples")
    with JudgeServer(slow) as server, server.environment():
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "experiments.tldr_winrate",
                "--config=configs/tldr.py:tiny",
                *arguments,
                f"--workdir={tmp_path}",
                "--judge_model=loopback",
                "--temperatures=0,1",
                "--best_of=1,3",
                "--prompts=8",
                *(f"--method={name}" for name in SMALL.methods),
                "--concurrency=2",
            ],
            cwd=ROOT,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        while not path.exists() or len(path.read_text().splitlines()) < 12:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        process.kill()
        process.communicate()
        kept = {
            json.loads(line)["prompt"]
            for line in path.read_text().splitlines()
            if line.endswith("}")
        }
        before = len(server.prompts)
        assert 12 <= len(kept) < len(asked)
        found = tldr_winrate.run(make_config, str(tmp_path), SMALL)
    assert [row["verdicts"] for row in found] == [row["verdicts"] for row in rows]
    after = server.prompts[before:]
    assert (
        not kept & set(after) and kept | set(after) == set(asked) and len(after) == len(set(after))
    )


@pytest.mark.slow
def test_two_processes_sample_and_one_asks(finished, arguments, tmp_path):
    """The same verdicts as of one process, each asked for once."""
    workdir, rows, asked = finished
    for name in ("sft", "rm", "dpo"):
        (tmp_path / name).symlink_to(workdir / name)
    command = [
        *(sys.executable, "-m", "experiments.tldr_winrate", "--config=configs/tldr.py:tiny"),
        *(*arguments, f"--workdir={tmp_path}", "--judge_model=loopback", "--temperatures=0,1"),
        *("--best_of=1,3", "--prompts=8", *(f"--method={name}" for name in SMALL.methods)),
        *(f"--coordinator=localhost:{free_port()}", "--num_processes=2"),
    ]
    with JudgeServer(prefers(len)) as server, server.environment():
        both = [
            subprocess.Popen(
                [*command, f"--process_id={number}"],
                cwd=ROOT,
                env=environment(),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for number in range(2)
        ]
        said = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(server.prompts) == sorted(asked)
    found = json.loads((results(tmp_path) / "winrate.json").read_text())["rows"]
    for name in ("wins", "ties", "losses"):
        assert [row[name] for row in found] == [row[name] for row in rows]


def test_against_another_policy(finished, make_config):
    """As in table 2; the samples and the judge's answers are those of the other win rates."""
    workdir, _, _ = finished
    options = Options(("dpo", "sft"), (0.0, 1.0), JUDGE, prompts=8, against=("sft", 0.0))
    with JudgeServer(prefers(len)) as server, server.environment():
        rows = tldr_winrate.run(make_config, str(workdir), options)
    # Not the opponent beside itself.
    names = [winrate_report.full_name(row) for row in rows]
    assert names == ["dpo, T=0", "dpo, T=1", "sft, T=1"]
    samples = workdir / "winrate" / "tldr" / "samples"
    first, other = (
        read_lines(samples / name / "completions.jsonl") for name in ("dpo-1-1", "sft-0-1")
    )
    for number, verdict in enumerate(rows[1]["verdicts"]):
        pair = [sampled[number]["completions"][0]["text"].strip() for sampled in (first, other)]
        gap = len(pair[0]) - len(pair[1])
        expected = "win" if gap > 0 else "loss" if gap < 0 else None
        assert verdict == expected or expected is None
    folder = results(workdir).with_name("loopback-summary_concise-against_sft_0")
    assert json.loads((folder / "winrate.json").read_text())["against"] == "sft, T=0"
    assert len(server.prompts) <= 24 and not (folder / "judgements.jsonl").exists()
    with pytest.raises(ValueError, match="--against=sft:0: no other answers are judged"):
        alone = Options(("sft",), (0.0,), JUDGE, prompts=8, against=("sft", 0.0))
        tldr_winrate.run(make_config, str(workdir), alone)


def test_seeds_and_draws(finished, make_config):
    """Another training of DPO alone, and another draw of each answer."""
    workdir, first_rows, _ = finished
    again = Run(winrate.of_seed(make_config("dpo"), 1), workdir, sharding.make_mesh())
    assert (again.folder("sft").name, again.folder("dpo").name) == ("sft", "dpo_seed1")
    assert again.config.dpo.seed == 1 and again.config.seed == 0
    plant(again, "dpo")
    options = Options(("dpo", "sft"), (0.0, 1.0), JUDGE, prompts=8, seeds=2, draws=2)
    with JudgeServer(prefers(len)) as server, server.environment():
        rows = tldr_winrate.run(make_config, str(workdir), options)
    assert [(row["method"], row["temperature"], row["seed"], row["draw"]) for row in rows] == [
        ("dpo", 0, 0, 0),
        ("dpo", 1, 0, 0),
        ("dpo", 1, 0, 1),
        ("sft", 0, 0, 0),
        ("sft", 1, 0, 0),
        ("sft", 1, 0, 1),
        ("dpo", 0, 1, 0),
        ("dpo", 1, 1, 0),
        ("dpo", 1, 1, 1),
    ]
    assert rows[1]["verdicts"] == first_rows[1]["verdicts"]
    samples = workdir / "winrate" / "tldr" / "samples"
    drawn = [
        read_lines(samples / f"sft-1-1{draw}" / "completions.jsonl") for draw in ("", "-draw_1")
    ]
    assert drawn[0] != drawn[1]
    groups = json.loads((results(workdir) / "winrate.json").read_text())["groups"]
    (dpo,) = [row for row in groups if (row["method"], row["temperature"]) == ("dpo", 1)]
    rates = [np.mean([rows[number]["rate"] for number in pair]) for pair in ((1, 2), (7, 8))]
    assert (dpo["seeds"], dpo["draws"], dpo["n"]) == (2, 2, 32)
    assert dpo["rate"] == pytest.approx(np.mean(rates))
    (sft,) = [row for row in groups if (row["method"], row["temperature"]) == ("sft", 1)]
    assert (sft["seeds"], sft["draws"], sft["n"]) == (1, 2, 16) and sft["low"] < sft["rate"]


def test_dry_run_counts(make_config, tmp_path, capsys):
    options = Options(tldr_winrate.METHODS, (0.0, 0.25, 0.5, 0.75, 1.0), JUDGE, dry_run=True)
    assert tldr_winrate.run(make_config, str(tmp_path), options) == []
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("train")] == [
        "rm",
        "dpo",
        "ppo",
        "preferred_ft",
    ]
    assert any("sft-0.25-128" in line and "32,768 completions" in line for line in lines)
    # 5 methods at 5 temperatures, and 4 N that are not 1 at 4 that are not 0
    assert (
        lines[-1].split(maxsplit=4)[4]
        == f"{(25 + 16) * 256:,} questions, up to 3 calls each; 0 calls are kept"
    )
    for methods, trained in (
        (("sft",), ["sft"]),
        (("base",), []),
        (("best_of_n",), ["rm"]),
        (("ppo",), ["ppo"]),
    ):
        tldr_winrate.run(make_config, str(tmp_path), Options(methods, (0.0,), JUDGE, dry_run=True))
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[1] for line in lines if line.startswith("train")] == trained
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, argument, message",
    [
        (dict(prompts=99), "", "--prompts=99, but the data has only 30 suitable held-out"),
        (dict(), "", "OPENAI_API_KEY is not set"),
        (dict(), "--config.run=x", "--config.run=x: it would rename"),
        (dict(counts=(1, 0)), "", "--best_of=1,0: expected"),
        (dict(counts=(4, 4)), "", "each once"),
        (dict(temperatures=(-1.0,)), "", "--temperatures=-1.0: expected"),
        (dict(against=("training", 0.0)), "", "--against=training:0: expected METHOD:TEMPERATURE"),
        (dict(methods=("sft",), seeds=2), "", "--seeds would do nothing without a method"),
        (dict(temperatures=(1.0, 1.0)), "", "--temperatures=1.0,1.0: expected .* each once"),
    ],
)
def test_errors_come_before_training(changes, argument, message, arguments, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    make_config = experiment_configs(
        "configs/tldr.py:tiny", [*arguments, *filter(None, [argument])]
    )
    with pytest.raises(ValueError, match=message):
        tldr_winrate.run(make_config, str(tmp_path), Options(**vars(SMALL) | changes))
    assert not list(tmp_path.iterdir())


def test_configs_are_valid_and_share():
    for size in ("gptj", "pythia1b", "pythia2.8b", "tiny"):
        make, shared = experiment_configs(f"configs/tldr.py:{size}", []), {}
        for method in ("dpo", "preferred_ft", "unlikelihood", "ppo", "best_of_n", "rm"):
            config = winrate.config_of(make, method)
            config_checks.validate(config)
            for stage in {"sft", "rm"} & set(config.stages):
                fields = configs.dependencies(config, stage)
                assert shared.setdefault(stage, fields) == fields
        assert shared.keys() == {"rm"} if size == "gptj" else {"sft", "rm"}
    assert make("dpo").dpo.beta == 0.5
    with pytest.raises(ValueError, match="expected a size .gptj, .*a method .dpo, "):
        experiment_configs("configs/tldr.py:huge", [])("dpo")


def test_prompts_and_pairs_of_tldr(make_config, tmp_path):
    """PPO samples from the posts of data.sft_path, which sft learns too; the reward model reads
    data.path.
    """
    run = Run(make_config("ppo"), tmp_path, sharding.make_mesh())
    words = run.initial("sft").tokenizer
    found = run.load_prompts(words)
    assert [len(found[split]) for split in ("train", "eval")] == [120, 8]
    assert found["train"].texts == [row["prompt"] for row in tiny_tldr.posts(120, 0)]
    for stage, count, responses in (("sft", 120, 1), ("rm", 80, 2)):
        run.folder(stage).mkdir()
        data = run.load_data(stage, words)
        assert len(data.train) == count
        assert {len(example.responses) for example in data.train} == {responses}
        assert all(words.decode(prompt).endswith("TL;DR:") for prompt in data.train.prompts)


def test_arguments_reach_every_run():
    make = experiment_configs(
        "configs/tldr.py:tiny", ["--config.ppo.lr=1e-5", "--config.model.dtype=bfloat16"]
    )
    assert (
        make("ppo").ppo.lr == 1e-5
        and make("ppo").model.dtype == make("dpo").model.dtype == "bfloat16"
    )
    with pytest.raises(ValueError, match="config.ppo.learning_rate: there is no such field"):
        experiment_configs("configs/tldr.py", ["--config.ppo.learning_rate=1"])


def test_unknown_base_is_refused(arguments, make_config, tmp_path):
    path = "--config.model.path=other/supervised"
    other, gptj = (experiment_configs("configs/tldr.py:gptj", given) for given in ([path], []))
    options = Options(("base",), (0.0,), JUDGE)
    with pytest.raises(
        ValueError, match="base: what other/supervised was .* Pass --base=NAME_OR_FOLDER"
    ):
        tldr_winrate.run(other, str(tmp_path), options)
    for unknown in (other, make_config):
        with pytest.raises(FileNotFoundError, match="./no_model does not exist"):
            tldr_winrate.run(unknown, str(tmp_path), options, base="./no_model")
    assert tldr_winrate.find_base(gptj("dpo"), "") == "EleutherAI/gpt-j-6b"
    assert tldr_winrate.find_base(make_config("dpo"), "") == ""


def test_useless_flags_are_refused(monkeypatch):
    values = flags.FlagValues()
    for name in ("path", "base"):
        flags.DEFINE_string(name, "", "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    values(["program", "--path=x"])
    commands.refuse_flags("here", "base")
    with pytest.raises(ValueError, match="--path would do nothing here"):
        commands.refuse_flags("here", "base", "path")


def test_method_in_config_is_refused():
    for path in ("configs/hh.py:dpo", "configs/tldr.py:pythia1b,ppo"):
        with pytest.raises(
            ValueError, match=f"{path}: the experiment itself chooses the methods; leave out"
        ):
            experiment_configs(path, [])


def test_rouge_by_hand():
    found = winrate_report.rouge(["the cat sat", "no"], ["the cat ran off", "yes"])
    # 2 of 3 and 2 of 4 words; 1 of 2 and 1 of 3 pairs; the longest common sequence has 2
    assert found == {
        name: pytest.approx(f / 2)
        for name, f in (("rouge1", 4 / 7), ("rouge2", 2 / 5), ("rougeL", 4 / 7))
    }


@pytest.mark.slow
def test_tldr_winrate_command(arguments, tmp_path):
    """Every method; then news, which shares the runs, by the run's own reward model too."""

    def command(*flags):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "experiments.tldr_winrate",
                "--config=configs/tldr.py:tiny",
                *arguments,
                f"--workdir={tmp_path}",
                "--prompts=8",
                *flags,
            ],
            cwd=ROOT,
            env=environment(),
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with JudgeServer(lambda prompt, times: answer("A")) as server, server.environment():
        out = command("--judge_model=loopback", "--best_of=1,4,8")
        assert "| preferred_ft |" in out and "| ppo |" in out and "| best of 8 |" in out
        path = arguments[0].partition("=")[2].replace("comparisons", "cnn_dailymail")
        out = command("--judge_model=loopback", "--dataset=cnn_dailymail", f"--path={path}")
        assert "| dpo |" in out and "stages done" in out
    out = command("--judge=reward", "--dataset=cnn_dailymail", f"--path={path}")
    assert (tmp_path / "winrate" / "cnn_dailymail" / "reward_model" / "winrate.png").exists()
