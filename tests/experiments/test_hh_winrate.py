"""The dialogue experiment: stories260k answers and is judged; slow: it is trained too."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dpo_jax import workdir
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data.rows import TextExample
from dpo_jax.evaluation.judge import Judge
from dpo_jax.models import hf
from dpo_jax.parallel import sharding
from dpo_jax.pipeline.run import Run
from dpo_jax.rewards import reward_model
from dpo_jax.training.checkpoint import Checkpoints
from dpo_jax.training.step import TrainState
from dpo_jax.workdir import finish_stage, read_lines
from experiments import hh_winrate, winrate
from experiments.winrate import Options
from tests.helpers.clock import set_today
from tests.helpers.judge_server import JudgeServer, prefers
from tests.helpers.paths import ROOT, SHARED, STORIES, needs_shared
from tests.helpers.rows import assistant, user, write_jsonl
from tests.helpers.tiny_hh import write_dialogues
from tests.helpers.tiny_runs import (
    environment,
    experiment_configs,
    plant,
    tokenizer,
    write_model,
)

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
JUDGE = Judge(model="loopback", template="dialogue")
STAGE = dict(
    batch_size=4, microbatch_size=0, steps=2, eval_every=2, save_every=1, lr=1e-2, warmup_steps=0
)
FIELDS = {
    "model.path": STORIES,
    "model.remat": "none",
    "data.max_length": 96,
    "data.max_prompt_length": 64,
    "data.max_rows": 100,
    "data.max_eval_rows": 4,
    "data.eval_fraction": 0.3,
    "sampling.max_new_tokens": 8,
    "sampling.batch_size": 4,
} | {f"{stage}.{name}": value for stage in ("sft", "rm", "dpo") for name, value in STAGE.items()}


@pytest.fixture(params=["made_up", pytest.param("real", marks=needs_shared)])
def arguments(request, tmp_path):
    """Flags of a tiny run; on real dialogues too where they are there."""
    data = SHARED / "hh-rlhf"
    if request.param == "made_up":
        data = write_dialogues(tmp_path / "dialogues")
    fields = FIELDS | {"data.path": data}
    return [f"--config.{name}={value}" for name, value in fields.items()]


def check(workdir, rows, judged):
    """What holds of any run of the methods below."""
    assert [(row["method"], row["step"]) for row in rows] == [
        ("dpo", None),
        ("preferred_ft", None),
        ("base", None),
        ("dpo", 0),
        ("dpo", 1),
        ("dpo", 2),
    ]
    folders = (workdir / "winrate" / "hh" / "samples").iterdir()
    samples = {folder.name: read_lines(folder / "completions.jsonl") for folder in folders}
    assert samples.keys() >= {
        "dpo-1-1",
        "preferred_ft-1-1",
        "base-1-1",
        "dpo_at_1-1-1",
        "dpo_at_2-1-1",
    }
    for name, found in samples.items():
        assert [row["prompt"].count(HUMAN) for row in found] == [
            3 if name.startswith("base") else 1
        ] * 4
        assert all(row["prompt"].endswith(ASSISTANT) for row in found)
    # The last checkpoint is the export.
    assert samples["dpo_at_2-1-1"] == samples["dpo-1-1"] != samples["dpo_at_1-1-1"]
    assert samples["dpo-1-1"] != samples["preferred_ft-1-1"]
    assert (judged / "winrate.png").read_bytes().startswith(b"\x89PNG")
    assert "| step | T=1 |\n|---|---|\n| 0 | " in (judged / "winrate.md").read_text()


def test_hh_policies_and_checkpoints_are_judged(arguments, tmp_path, monkeypatch):
    """A policy that is there, with checkpoints on its way, answers dialogues."""
    monkeypatch.setattr(
        sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    )
    make_config = experiment_configs("configs/hh.py", arguments)
    run = Run(make_config("dpo"), tmp_path, sharding.make_mesh())
    plant(run, "sft", STORIES)
    start = run.initial("sft")
    params = [
        jax.tree.map(lambda x, scale=scale: x * scale, start.load_params(run.mesh))
        for scale in (0.9, 0.7)
    ]
    hf.save(tmp_path / "policy", start.config, start.hf_config, params[1], start.tokenizer)
    plant(run, "dpo", tmp_path / "policy")
    with Checkpoints(tmp_path / "dpo" / "checkpoints", keep=9) as saved:
        for step, weights in enumerate(params, 1):
            saved.save(step, TrainState(jnp.int32(step), weights, dict(nu=jnp.zeros(3))))
    assert list(winrate.at_checkpoints(run, "dpo")) == [1, 2]
    began = tmp_path / "dpo" / "config.json"
    text = began.read_text()
    record = workdir.read_config(tmp_path / "dpo")
    record["config"]["dpo"]["save_every"] = 2
    workdir.write_record(began, record)
    # The other is of a run that was interrupted.
    assert list(winrate.at_checkpoints(run, "dpo")) == [2]
    began.write_text(text)
    options = Options(("dpo", "preferred_ft", "base", "training"), (1.0,), JUDGE, prompts=4)
    with JudgeServer(prefers(len)) as server, server.environment():
        rows = hh_winrate.run(make_config, str(tmp_path), options)
    check(tmp_path, rows, tmp_path / "winrate" / "hh" / "loopback-dialogue")
    for prompt in server.prompts:
        assert (
            prompt.split("Conversation:\n")[1].count("Human:") == 1 and "\n\nReply A:\n" in prompt
        )


# Special tokens are words of the tiny tokenizer, so that prompts can be read off their ids.
CHAT = (
    "{{ '<s> w' + strftime_now('%d') }}{% if not quiet %}{{ ' w1' }}{% endif %}"
    "{% for tool in tools or [] %}{{ ' ' + tool.function.name }}{% endfor %}"
    "{% for m in messages %}{{ ' w11 ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ ' </s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' w11' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "w7", "parameters": {"type": "object"}}}]


def chat_rows(count):
    """Dialogues of one turn with tools, and some of two turns, which are left out."""
    rows = []
    for number in range(count):
        asked = [user(f"w{number % 30} w{number % 7}")]
        if number % 4 == 0:
            asked = [*asked, assistant("w2"), user("w3")]
        chosen, rejected = assistant("w4 w5"), assistant("w6")
        rows.append(dict(prompt=asked, chosen=[chosen], rejected=[rejected], tools=TOOLS))
    return rows


@pytest.mark.parametrize("judge", [JUDGE, None])
def test_hh_chat_rows_are_judged_as_text(tmp_path, monkeypatch, judge):
    """The policy reads them through its template, a judge as a transcript; on two days."""
    monkeypatch.setattr(
        sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    )
    model = write_model(tmp_path / "model")
    words = tokenizer()
    words.chat_template = CHAT
    words.save_pretrained(model)
    fields = FIELDS | {
        "model.path": model,
        "data.source": "local",
        "data.path": write_jsonl(tmp_path / "chats.jsonl", chat_rows(60)),
        "data.template": "quiet=True",
        "data.max_eval_rows": 40,
        "data.max_length": 48,
        "data.max_prompt_length": 32,
    }
    make_config = experiment_configs(
        "configs/hh.py", [f"--config.{name}={value}" for name, value in fields.items()]
    )
    set_today(monkeypatch, "2026-11-26")
    run = Run(make_config("dpo"), tmp_path, sharding.make_mesh())
    plant(run, "sft", model)
    plant(run, "dpo", model)
    if judge is None:
        ranker = Run(winrate.config_of(make_config, "rm"), tmp_path, sharding.make_mesh())
        plant(ranker, "rm", head="reward")
        saved = tokenizers.load(model)
        saved.save_pretrained(tmp_path / "rm" / "hf")
        finish_stage(tmp_path / "rm")  # with the files that are there now
    ranked = []
    tokenised = reward_model._tokenised

    def watched(*args):
        ranked.extend(tokenised(*args))
        return tokenised(*args)

    monkeypatch.setattr(reward_model, "_tokenised", watched)
    with JudgeServer(prefers(len)) as server, server.environment():
        for day, methods in (("2026-11-26", ("dpo",)), ("2026-11-27", ("dpo", "preferred_ft"))):
            set_today(monkeypatch, day)
            options = Options(methods, (1.0,), judge, prompts=4)
            rows = hh_winrate.run(make_config, str(tmp_path), options)
    assert [row["method"] for row in rows] == ["dpo", "preferred_ft"]
    for name in ("dpo-1-1", "preferred_ft-1-1"):
        sampled = read_lines(tmp_path / "winrate" / "hh" / "samples" / name / "completions.jsonl")
        for row in sampled:
            spelled = words.decode(row["tokens"])
            assert re.fullmatch(r"<s> w26 w7 w11 w\d+ w\d+ w11", spelled)
    for prompt in server.prompts:
        asked = prompt.split("Conversation:\n")[1]
        assert re.match(r"User: w\d+ w\d+\n\nReply A:\n", asked)
    # A reward model reads the messages, through its own template.
    for prompt, answer in ranked:
        assert re.fullmatch(r"<s> w26 w7 w11 w\d+ w\d+ w11", words.decode(prompt))
        assert words.decode(answer).endswith("</s>")
    assert bool(server.prompts) == (judge is not None) == (not ranked)


def test_hh_base_needs_text(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", chat_rows(20))
    data = experiment_configs("configs/hh.py", [f"--config.data.path={path}"])("dpo").data
    data.source = "local"
    with pytest.raises(ValueError, match="as text, and the data has chat messages"):
        hh_winrate.shots(data)


@pytest.mark.slow
def test_hh_winrate_command(arguments, tmp_path):
    """SFT, DPO and a reward model are trained on dialogues, judged by a chat model and by the
    reward model.
    """
    for flags in (["--judge_model=loopback"], ["--judge=reward"]):
        with JudgeServer(prefers(len)) as server, server.environment():
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "experiments.hh_winrate",
                    f"--workdir={tmp_path}",
                    "--prompts=4",
                    *arguments,
                    "--temperatures=0,1",
                    "--best_of=1,4",
                    *flags,
                ],
                cwd=ROOT,
                env=environment(),
                text=True,
                capture_output=True,
            )
        assert done.returncode == 0, done.stderr
        assert "| best of 4 | " in done.stdout and "| step | T=0 | T=1 |" in done.stdout
        assert bool(server.prompts) == (flags[0] != "--judge=reward")


def test_answer_is_one_turn():
    assert hh_winrate.answer(" Yes. \n\nHuman: And?\n\nAssistant: No.") == "Yes."
    assert hh_winrate.answer(" Yes.\n\nTwice.") == "Yes.\n\nTwice."


def test_shots_have_one_turn(monkeypatch):
    prompt = f"{HUMAN} Hello?{ASSISTANT}"
    one, more, long = (
        TextExample(prompt, (response,), "")
        for response in (" Hi.", f" Hi.{HUMAN} And?{ASSISTANT} Bye.", " Hi." * 100)
    )
    assert hh_winrate.one_turn(one) and not hh_winrate.one_turn(more)
    monkeypatch.setattr(
        hh_winrate.splits, "read", lambda *_, **__: (dict(train=[one, one, more, long]), None)
    )
    with pytest.raises(
        ValueError, match="shown 2 training dialogues of one turn and up to 400 .* the data has 1: "
    ):
        hh_winrate.shots(None)


def test_held_out_prompts_once_each():
    rows = [TextExample(f"{number % 7}", (f"{number}",), "") for number in range(20)]
    found = winrate.held_out(rows, 5)
    assert len({row.prompt for row in found}) == 5
    assert found[:3] == winrate.held_out(rows, 3)
    with pytest.raises(
        ValueError, match="--prompts=8, but the data has only 7 suitable held-out prompts"
    ):
        winrate.held_out(rows, 8)


def test_hh_winrate_dry_run(tmp_path, capsys):
    make_config = experiment_configs("configs/hh.py", [])
    options = Options(
        hh_winrate.METHODS,
        hh_winrate.TEMPERATURES,
        Judge(model="JUDGE", template="dialogue"),
        dry_run=True,
    )
    hh_winrate.run(make_config, str(tmp_path), options)
    lines = capsys.readouterr().out.splitlines()
    # 3 methods and 4 N at 3 temperatures; the start of training is preferred_ft's at temperature 1
    assert lines[-1].endswith(
        f"{(3 + 4) * 3 * 256:,} questions, up to 3 calls each; 0 calls are kept"
    )
    assert lines[-2].startswith("over training: not counted")
    assert not list(tmp_path.iterdir())


def test_hh_training_temperatures(tmp_path, monkeypatch):
    """Figure 3, right: the curve over training at 0.7 and 1, or at what is asked for."""
    run = Run(experiment_configs("configs/hh.py", [])("dpo"), tmp_path, None)
    later = winrate.Policy("dpo_at_300", {}, None)
    monkeypatch.setattr(winrate, "at_checkpoints", lambda *_: {300: later})

    def drawn(**chosen):
        found = hh_winrate.points(dict(dpo=run), Options(("training",), judge=JUDGE, **chosen))
        return [(point.step, point.temperature) for point in found]

    temperatures = hh_winrate.TRAINING_TEMPERATURES
    both = drawn(temperatures=(0.25,), training_temperatures=temperatures)
    assert both == [(0, 0.7), (300, 0.7), (0, 1.0), (300, 1.0)]
    assert drawn(temperatures=(0.7,)) == [(0, 0.7), (300, 0.7)]


def test_against_names_methods_that_have_one_answer():
    assert winrate.opponent_of("preferred_ft:0.7", hh_winrate.CHOICES) == ("preferred_ft", 0.7)
    expected = "such as preferred_ft:0; the methods are dpo, preferred_ft, base, unlikelihood.$"
    for text in ("ppo:0", "training:0", "best_of_n:1", "dpo", "dpo:-1"):
        with pytest.raises(ValueError, match=f"^--against={text}: .* {expected}"):
            winrate.opponent_of(text, hh_winrate.CHOICES)
