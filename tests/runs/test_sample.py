"""The sample command: what it adds to each row, and how it resumes."""

import csv
import datetime
import fcntl
import json
import re
import shutil
import subprocess
import sys
import time

import pytest

from dpo_jax import config as configs
from dpo_jax import sample
from dpo_jax.data import every_row
from dpo_jax.sampling import generation
from tests.helpers.clock import set_today
from tests.helpers.paths import ROOT
from tests.helpers.rows import write_jsonl, write_parquet
from tests.helpers.tiny_runs import environment, sample_file, write_pairs

COUNT = 600


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """So many that a command can be killed on the way."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", count=COUNT)


@pytest.fixture(scope="module")
def finished(model, pairs, tmp_path_factory):
    """A run in this process."""
    out = tmp_path_factory.mktemp("sample") / "out.jsonl"
    sample_file(model, pairs, out)
    return out


@pytest.fixture
def unfinished(finished, tmp_path):
    """The same, as a kill leaves it: four rows, and a half of one."""
    out = tmp_path / "out.jsonl"
    for path in finished.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = finished.read_text().splitlines(keepends=True)
    out.write_text("".join(whole[:4]) + whole[4][:20])
    sums = out.with_name("out.jsonl.sums")
    # The first write was of three rows.
    sums.write_text(sums.read_text().splitlines(keepends=True)[0])
    assert sums.read_text().startswith("3 ")
    return out


def test_sample_rows_in_order(finished, pairs):
    added = {"completions", "logp", "tokens"}
    rows = lines(finished)
    assert [
        {name: value for name, value in row.items() if name not in added} for row in rows
    ] == lines(pairs)
    for row in rows:
        assert all(len(row[name]) == 2 for name in added)
        for text, logp, tokens in zip(row["completions"], row["logp"], row["tokens"], strict=True):
            assert 1 <= tokens <= 6 and logp < 0
            # Special tokens are counted, not written.
            assert len(text.split()) <= tokens and "<" not in text
    assert len({text for row in rows for text in row["completions"]}) > COUNT


def test_sample_one_completion_is_text(model, pairs, tmp_path):
    sample_file(model, pairs, tmp_path / "one.jsonl", n=1)
    row = lines(tmp_path / "one.jsonl")[0]
    assert (
        isinstance(row["completion"], str)
        and isinstance(row["logp"], float)
        and isinstance(row["tokens"], int)
    )


# going on


def test_sample_resumes_after_kill(model, pairs, finished, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    flags = [
        f"--model={model}",
        f"--prompts={pairs}",
        f"--out={out}",
        "--max_new_tokens=6",
        "--n=2",
        "--batch_size=6",
        "--max_prompt_length=64",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_jax.sample", *flags],
        cwd=ROOT,
        env=environment(8),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while not out.exists() or out.read_text().count("\n") < 20:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert 20 <= out.read_text().count("\n") < COUNT
    sample_file(model, pairs, out)
    told = capsys.readouterr().out
    assert re.search(rf"continuing after \d+ of {COUNT} prompts", told)
    assert f"finished: {out} holds {COUNT} prompts with 2 sampled for each" in told
    assert out.read_bytes() == finished.read_bytes()


def test_sample_redoes_half_written(unfinished, finished, model, pairs, capsys):
    sample_file(model, pairs, unfinished)
    assert unfinished.read_bytes() == finished.read_bytes()
    assert f"continuing after 3 of {COUNT} prompts" in capsys.readouterr().out


def test_sample_leaves_finished_file(finished, model, pairs, capsys, monkeypatch):
    before = finished.read_bytes()
    monkeypatch.delattr(sample.loading, "open_checkpoint")  # not even the model is needed
    sample_file(model, pairs, finished)
    assert finished.read_bytes() == before
    assert "finished:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(top_p=0.9), r"  top_p: 1.0 in the file, 0.9 now"),
        (dict(seed=1), r"  seed: 0 in the file, 1 now"),
        (
            dict(settings=dict(max_prompt_length=8)),
            r"  max_prompt_length: 64 in the file, 8 now",
        ),
    ],
)
def test_sample_refuses_other_settings(unfinished, model, pairs, changes, message):
    before = unfinished.read_bytes()
    with pytest.raises(
        ValueError, match=r"was made with other settings:\n" + message + r"\nUse the old values"
    ):
        sample_file(model, pairs, unfinished, **changes)
    assert unfinished.read_bytes() == before


def test_sample_refuses_other_prompts(unfinished, model, tmp_path):
    others = write_pairs(tmp_path / "others.jsonl", count=COUNT, seed=1)
    with pytest.raises(
        ValueError, match=rf"  prompts: '{COUNT} rows, sha256 \w+' in the file, '{COUNT} rows, sha"
    ):
        sample_file(model, others, unfinished)


def test_sample_refuses_other_file(model, pairs, tmp_path):
    (tmp_path / "notes.jsonl").write_text("mine\n")
    with pytest.raises(FileExistsError, match="exists, but not notes.jsonl.settings.json"):
        sample_file(model, pairs, tmp_path / "notes.jsonl")
    assert (tmp_path / "notes.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("damage", ["", "[]", "{", "cut", "edited"])
def test_sample_refuses_damaged_settings(unfinished, model, pairs, damage):
    """By the file's name, with what to do; the rows stay as they were."""
    settings = unfinished.with_name("out.jsonl.settings.json")
    whole = settings.read_text()
    damaged = dict(cut=whole[: len(whole) // 2], edited=whole.replace("float32", "float16"))
    settings.write_text(damaged.get(damage, damage))
    before = unfinished.read_bytes()
    with pytest.raises(ValueError, match=r"out.jsonl.settings.json is not .* Put it back"):
        sample_file(model, pairs, unfinished)
    assert unfinished.read_bytes() == before


@pytest.mark.parametrize(
    "change, number",
    [
        (lambda rows: [rows[0], *rows[2:]], 2),
        (lambda rows: [*rows[:3], rows[3].replace('"prompt": "', '"prompt": "x')], 4),
    ],
)
def test_sample_refuses_rows_of_other_prompts(unfinished, model, pairs, change, number):
    """A line that was removed would leave out a prompt, and sample another one twice.

    So it is in a file of an earlier version, which has no sums.
    """
    unfinished.with_name("out.jsonl.sums").unlink()
    rows = unfinished.read_text().splitlines(keepends=True)[:4]
    unfinished.write_text("".join(change(rows)))
    before = unfinished.read_bytes()
    with pytest.raises(ValueError, match=f"out.jsonl row {number} is not made of row {number}"):
        sample_file(model, pairs, unfinished)
    assert unfinished.read_bytes() == before


@pytest.mark.parametrize("is_finished", [True, False])
def test_sample_makes_changed_rows_again(unfinished, finished, model, pairs, capsys, is_finished):
    """A completion that another one took the place of would pass for the model's own."""
    if is_finished:
        for path in finished.parent.iterdir():
            unfinished.with_name(path.name).write_bytes(path.read_bytes())
    rows = unfinished.read_text().splitlines(keepends=True)
    changed = rows[1].replace('"completions": ["', '"completions": ["w1 ')
    unfinished.write_text("".join([rows[0], changed, *rows[2:]]))
    before = unfinished.read_bytes()

    sample_file(model, pairs, unfinished)
    assert unfinished.read_bytes() == finished.read_bytes()
    told = capsys.readouterr().out
    assert (
        f"{unfinished} is not what was written there from row 1 on, and is now out.jsonl." in told
    )
    assert unfinished.with_name("out.jsonl.damaged").read_bytes() == before


def test_sample_begins_anew_once_its_file_is_removed(unfinished, finished, model, pairs, capsys):
    unfinished.unlink()
    sample_file(model, pairs, unfinished)
    assert unfinished.read_bytes() == finished.read_bytes()
    assert "not what was written" not in capsys.readouterr().out
    sample_file(model, pairs, unfinished)
    assert unfinished.read_bytes() == finished.read_bytes()


# prompts


def test_sample_chat_prompts(model, tmp_path, capsys):
    """Rendered by the model's template; and cut at the start, where the cue is not."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(model)
    words.chat_template = (
        "{{ '<s>' }}{% for m in messages %}{{ ' ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' w36' }}{% endif %}"
    )
    chatty = tmp_path / "chatty"
    chatty.mkdir()
    for path in model.iterdir():
        (chatty / path.name).write_bytes(path.read_bytes())
    words.save_pretrained(chatty)
    chats = [dict(prompt=[dict(role="user", content=text)]) for text in ("w1 w2 w3 w4", "w5")]
    texts = [dict(prompt=text) for text in ("w3 w4 w36", "w5 w36")]  # what is left of them
    found = {}
    for name, rows in (("chats", chats), ("texts", texts)):
        prompts, out = tmp_path / f"{name}.jsonl", tmp_path / f"{name}_out.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sample_file(
            chatty,
            prompts,
            out,
            settings=dict(max_prompt_length=4, truncate="auto"),
        )
        found[name] = [row["completions"] for row in lines(out)]
    assert found["chats"] == found["texts"]
    told = capsys.readouterr().out
    assert "warning: 1 of 2 prompts are cut to max_prompt_length=4 (keep_end); chat prompts" in told
    # The texts are as long as that, and not cut.
    assert told.count("are cut to") == 1


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"prompt": "w1"}\n{"text": "w2", "id": 7}\n',
            r"row 2: none of the fields 'prompt', 'messages', .* is there; found text, id",
        ),
        ('{"prompt": 3}\n', "row 1: field 'prompt'"),
        ("\n", "has no rows; expected rows such as"),
    ],
)
def test_sample_names_bad_row(model, tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        sample_file(model, tmp_path / "bad.jsonl", tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out*"))


def test_sample_names_missing_folder(model, pairs, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*missing. Make it first"):
        sample_file(model, pairs, tmp_path / "missing" / "out.jsonl")


def test_sample_twice_at_once_is_refused(model, pairs, tmp_path):
    """The second one would add the rows once more."""
    with (tmp_path / ".out.jsonl.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match=r"at work in .*out\.jsonl: .* give another --out"):
            sample_file(model, pairs, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_sample_tells_long_prompts(model, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps(dict(prompt=" ".join(["w1"] * 62))) + "\n")
    sample_file(model, tmp_path / "long.jsonl", tmp_path / "out.jsonl", n=1)
    assert "warning: up to 63 + 6 tokens, but the model was made for 64" in capsys.readouterr().out


def test_sample_cuts_only_what_the_model_cannot_read(model, tmp_path, capsys, monkeypatch):
    """By default: training too cuts no prompt that fits."""
    texts = (" ".join(["w1"] * 40), " ".join(["w1"] * 70))
    write_jsonl(tmp_path / "long.jsonl", [dict(prompt=text) for text in texts])
    path, out = tmp_path / "long.jsonl", tmp_path / "out.jsonl"
    seen = sampled_prompt(monkeypatch, model, path, out, settings=dict(max_prompt_length=0))
    fits, cut = (ids.split() for ids in seen)
    assert fits == ["<s>", *["w1"] * 40]
    assert len(cut) == 64 - 6 and cut[0] == "<s>"  # 64 positions, 6 of them for the completion
    assert "1 of 2 prompts are cut to max_prompt_length=58" in capsys.readouterr().out


def test_sample_names_its_own_flags(model, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [dict(prompt="w1", images=["a"])])
    with pytest.raises(ValueError, match="with --ignore=images") as told:
        sample_file(model, tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    assert "data." not in str(told.value)
    with pytest.raises(FileNotFoundError, match="^--prompts='.*missing"):
        sample_file(model, tmp_path / "missing", tmp_path / "out.jsonl")


# rows of any format and shape


@pytest.fixture(scope="module")
def chat_model(model, tmp_path_factory):
    """The model with a template that writes tools, roles and the day of the month as words."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(model, folder)
    words = AutoTokenizer.from_pretrained(folder)
    words.chat_template = (
        "{{ '<s> w' + strftime_now('%d') }}{% if not quiet %}{{ ' w1' }}{% endif %}"
        "{% for tool in tools or [] %}{{ ' ' + tool.function.name }}{% endfor %}"
        "{% for m in messages %}{{ (' w10 ' if m.role == 'system' else ' w11 ') + m.content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ ' w12' }}{% endif %}"
    )
    words.save_pretrained(folder)
    return folder


def sampled_prompt(monkeypatch, model, path, out, **asked):
    """The ids of the prompts that a file is sampled from, as words."""
    from transformers import AutoTokenizer

    seen = []
    generate = generation.generate

    def watched(loaded, prompts, *args, **kwargs):
        seen.extend(prompts.ids)
        return generate(loaded, prompts, *args, **kwargs)

    monkeypatch.setattr(generation, "generate", watched)
    sample_file(model, path, out, n=1, **asked)
    return AutoTokenizer.from_pretrained(model).batch_decode(seen)


TOOLS = [{"type": "function", "function": {"name": "w7", "parameters": {"type": "object"}}}]
ASKED = {"prompt": [dict(role="user", content="w3")], "system": "w2", "tools": TOOLS, "id": 7}


def test_sample_rows_of_every_shape(chat_model, tmp_path, monkeypatch):
    said = dict(role="user", content="w3"), dict(role="assistant", content="w4")
    rows = [
        ASKED,
        dict(prompt="w3", system="w2"),
        dict(messages=list(said)),
        dict(messages=[*said, dict(role="user", content="w5")]),
        dict(instruction="w3", output="w4", dataset="helpful_base"),
        dict(prompt=said[:1], chosen=said[1:], rejected=said[1:]),
        dict(prompt="w3", chosen="", rejected=None),
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    asked = dict(options=dict(date=datetime.date(2026, 11, 26)))
    found = sampled_prompt(monkeypatch, chat_model, path, tmp_path / "out.jsonl", **asked)
    assert found == [
        "<s> w26 w1 w7 w10 w2 w11 w3 w12",
        "<s> w26 w1 w10 w2 w11 w3 w12",
        "<s> w26 w1 w11 w3 w12",
        "<s> w26 w1 w11 w3 w11 w4 w11 w5 w12",
        "<s> w26 w1 w11 w3 w12",
        "<s> w26 w1 w11 w3 w12",
        "<s> w3",
    ]
    for row, kept in zip(rows, lines(tmp_path / "out.jsonl"), strict=True):
        assert kept.items() >= json.loads(json.dumps(row)).items()


@pytest.mark.parametrize(
    "row, asked",
    [
        (dict(messages=[dict(role="user", content="w3")], prompt="w3"), "chat"),
        (dict(context=[dict(role="user", content="w3")], response1="w1", response2="w2"), "chat"),
        (dict(prompt="w3", answers=[dict(answer="w1", rank=1), dict(answer="w2", rank=1)]), "text"),
        (dict(prompt="w3", chosen=[dict(role="narrator", content="w1")], rejected="w2"), "text"),
    ],
)
def test_prompt_of_rows_whose_answers_are_no_use(row, asked):
    if "context" in row:
        row["overall_preference"] = 0  # a tie
    found = every_row.prompt(row, configs.default(()).data, "row 1")
    assert found.prompt == ([dict(role="user", content="w3")] if asked == "chat" else "w3")


def test_prompt_leaves_nothing_out_silently():
    """What an answer may depend on is refused by its name, with the flag that leaves it out."""
    data = configs.default(()).data
    row = dict(prompt="w3", context="w1 w2 w4", completion="w5")
    with pytest.raises(
        ValueError, match="^row 1: field 'context' has content .* --config.data.ignore=context"
    ):
        every_row.prompt(row, data, "row 1")
    data.ignore = ("context",)
    assert every_row.prompt(row, data, "row 1").prompt == "w3"


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: v if isinstance(v, str | int) else json.dumps(v) for k, v in row.items()}
            )


@pytest.mark.parametrize("form", ["parquet", "json", "csv"])
def test_sample_files_of_every_format(chat_model, tmp_path, monkeypatch, form):
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        write_parquet(path, [ASKED])
    elif form == "json":
        path.write_text(json.dumps([ASKED]))
    else:
        write_csv(path, [ASKED])
    asked = dict(options=dict(date=datetime.date(2026, 11, 26)))
    found = sampled_prompt(monkeypatch, chat_model, path, tmp_path / "out.jsonl", **asked)
    assert found == ["<s> w26 w1 w7 w10 w2 w11 w3 w12"]
    (row,) = lines(tmp_path / "out.jsonl")
    assert row["prompt"] == ASKED["prompt"] and isinstance(row["completion"], str)


def test_sample_with_columns_and_template(chat_model, tmp_path, monkeypatch):
    asked = dict(role="user", content="w3")
    path = write_jsonl(tmp_path / "rows.jsonl", [dict(query=[asked], tools=TOOLS)])
    found = sampled_prompt(
        monkeypatch,
        chat_model,
        path,
        tmp_path / "out.jsonl",
        settings=dict(columns="prompt=query", template=dict(quiet=True), ignore=("tools",)),
        options=dict(date=datetime.date(2026, 11, 26)),
    )
    assert found == ["<s> w26 w11 w3 w12"]
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert settings["template"] == dict(quiet=True) and settings["ignore"] == ["tools"]


def test_sample_continues_with_its_date(chat_model, tmp_path, monkeypatch):
    """A file that is continued on another day has the prompts with which it was begun."""
    path = write_jsonl(tmp_path / "rows.jsonl", [ASKED] * 12)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    set_today(monkeypatch, "2026-11-26")
    sample_file(chat_model, path, whole)
    out.write_text("".join(whole.read_text().splitlines(keepends=True)[:6]))
    for name in ("whole", "out"):
        settings = (tmp_path / "whole.jsonl.settings.json").read_text()
        (tmp_path / f"{name}.jsonl.settings.json").write_text(settings)
    set_today(monkeypatch, "2026-11-27")
    sample_file(chat_model, path, out)
    assert out.read_bytes() == whole.read_bytes()
    sample_file(chat_model, path, tmp_path / "tomorrow.jsonl")
    assert (tmp_path / "tomorrow.jsonl").read_bytes() != whole.read_bytes()
    other = dict(date=datetime.date(2026, 11, 27))
    with pytest.raises(ValueError, match="  date: '2026-11-26' in the file, '2026-11-27' now"):
        sample_file(chat_model, path, out, options=other)
