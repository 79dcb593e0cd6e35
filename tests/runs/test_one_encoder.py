"""Chat rows with tools and several turns: whoever reads them has the same tokens, and trains well.

Training, `score`, `sample`, win rates and the Python API.
"""

import datetime
import json

import numpy as np
import pytest

import dpo_jax
from dpo_jax import config as configs
from dpo_jax import sample, score
from dpo_jax.data import dataset, splits
from dpo_jax.data.tokenizer import encode_example_prompts
from dpo_jax.models import loading
from dpo_jax.sampling import generation
from dpo_jax.sampling.sampler import Sampling
from tests.helpers.rows import assistant, user, write_jsonl
from tests.helpers.tiny_runs import (
    PROMPT_SETTINGS,
    dpo_config,
    on_devices,
    rows_without_timings,
    run,
    sample_file,
    score_file,
    weights,
    write_model,
)

# Roles, tools and the day of the month are words of the tiny tokenizer.
TEMPLATE = (
    "{{ '<s> w' + strftime_now('%d') }}{% if loud %}{{ ' w35' }}{% endif %}"
    "{% for tool in tools or [] %}{{ ' ' + tool.function.name }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ ' w30 ' + m.content }}"
    "{% elif m.role == 'user' %}{{ ' w31 ' + m.content }}"
    "{% elif m.role == 'tool' %}{{ ' w32 ' + m.content }}"
    "{% else %}{{ ' w33' }}{% if m.content %}{{ ' ' + m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ ' ' + call.function.name }}"
    "{% for value in call.function.arguments.values() %}{{ ' ' + value }}{% endfor %}{% endfor %}"
    "{{ ' </s>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' w33' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "w7", "parameters": {"type": "object"}}}]
DAY = datetime.date(2026, 11, 26)
# As fields of config.data.
ENCODING = dict(template=dict(loud=True), ignore=("name",))


def word(rng, low, high):
    return f"w{rng.integers(low, high)}"


def chat_rows(count=40, seed=0):
    """Rows whose better answer calls a tool, hears its result and says higher words."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        call = dict(function=dict(name="w7", arguments=dict(query=word(rng, 0, 30))))
        turns = [
            dict(role="assistant", content=None, tool_calls=[call | dict(type="function")]),
            dict(role="tool", name="search", content=f"{word(rng, 0, 9)} {word(rng, 0, 9)}"),
            assistant(f"{word(rng, 18, 30)} {word(rng, 18, 30)}"),
        ]
        asked = [user(word(rng, 0, 30)), assistant(word(rng, 0, 30)), user(word(rng, 0, 30))]
        rows.append(
            dict(
                system=word(rng, 0, 9),
                prompt=asked,
                chosen=turns,
                rejected=[assistant(word(rng, 0, 9))],
                tools=TOOLS,
            )
        )
    return rows


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_rows())


def data_of(path):
    data = configs.default(("dpo",)).data
    data.update(path=str(path), eval_fraction=0.0, **ENCODING)
    return data


def ids(arrays):
    return [array.tolist() for array in arrays]


def test_all_readers_have_the_same_tokens(chat_model, chats, tmp_path, monkeypatch):
    checkpoint = loading.open_checkpoint(str(chat_model))
    data = data_of(chats)
    trained_on = dataset.load(data, checkpoint.tokenizer, "pairs", date=DAY).train
    prompts = ids(trained_on.prompts)
    first = checkpoint.tokenizer.decode(prompts[0])
    assert first.startswith("<s> w26 w35 w7 w30 ") and first.endswith(" w33")
    # The call and the last turn are trained on, with the EOS of each; the result is not.
    chosen, rejected = trained_on[0].completion_masks
    assert chosen.tolist() == [True] * 3 + [False] * (len(chosen) - 6) + [True] * 3
    assert rejected.all()

    model = dpo_jax.load(chat_model)
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    assert model.encode(rows, date=DAY, **ENCODING).fingerprint == trained_on.fingerprint

    scored = []
    log_probs = score.inference.log_probs
    monkeypatch.setattr(
        score.inference,
        "log_probs",
        lambda name, model, examples, size: (
            scored.append(examples) or log_probs(name, model, examples, size)
        ),
    )
    score_file(chat_model, chats, tmp_path / "scored.jsonl", date=DAY, settings=ENCODING)
    assert scored[0].fingerprint == trained_on.fingerprint
    line = json.loads((tmp_path / "scored.jsonl").read_text().splitlines()[0])
    assert line["tokens_chosen"] == 6 and line["tokens_rejected"] == rejected.size

    asked = sample.Options(
        str(chat_model), str(chats), "", Sampling(6), settings=PROMPT_SETTINGS | ENCODING
    )
    _, texts = sample._read(asked)
    sampled = generation.encode(
        texts, checkpoint.tokenizer, checkpoint.config, Sampling(6), asked.settings, DAY
    )
    assert ids(sampled.ids) == prompts

    examples, _ = splits.read(data, "sft")
    judged = encode_example_prompts(
        examples["train"], checkpoint.tokenizer, data, dataset.truncation(data), date=DAY
    )
    assert ids(judged) == prompts


def test_generate_as_the_sample_command(chat_model, chats, tmp_path):
    sample_file(
        chat_model, chats, tmp_path / "out.jsonl", settings=ENCODING, options=dict(date=DAY), n=1
    )
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    prompts = [[dict(role="system", content=row["system"]), *row["prompt"]] for row in rows]
    model = dpo_jax.load(chat_model)
    settings = dict(max_new_tokens=6, batch_size=6, tools=TOOLS, date=DAY)
    texts = model.generate(prompts, **settings, **ENCODING)
    assert texts == [row["completion"] for row in rows]
    others = model.generate(prompts, **settings, template={})
    assert others != texts


# training on them


@pytest.fixture(scope="module")
def live(chat_model, chats, tmp_path_factory):
    return run_here(chat_model, chats, tmp_path_factory.mktemp("live"))


def run_here(model, path, workdir, devices=1, **fields):
    config = dpo_config(model, path, **fields)
    config.data.update(**ENCODING)
    with on_devices(devices):
        return run(config, workdir)


def assert_near(folder, expected):
    for mine, its in zip(rows_without_timings(folder), rows_without_timings(expected), strict=True):
        for name, value in its.items():
            # Before the first update the two sides are a tie, and rounding decides.
            if mine["step"] > 1 or not name.endswith("accuracies"):
                assert mine[name] == pytest.approx(value, abs=1e-4, rel=1e-3), name
    for name, value in weights(expected).items():
        np.testing.assert_allclose(weights(folder)[name], value, atol=1e-5)


@pytest.mark.parametrize(
    "devices, fields",
    [(1, dict(cache_reference=True)), (1, dict(microbatch_size=2)), (8, dict())],
    ids=["kept reference", "microbatches", "eight devices"],
)
def test_runs_with_masks_are_equal(chat_model, chats, live, tmp_path, devices, fields):
    assert_near(run_here(chat_model, chats, tmp_path, devices, **fields), live)


def test_run_learns_from_masked_answers(live):
    first, *_, last = rows_without_timings(live)
    assert last["loss/eval"] < first["loss/eval"] < 0.6932
    ledger = json.loads((live / "ledger.json").read_text())
    assert ledger["train"]["other_turns"] == ledger["train"]["kept"] > 0


def test_refusals_name_the_flags_of_the_command(chat_model, tmp_path):
    """The template does not write reasoning."""
    thought = assistant("w3") | dict(reasoning_content="w4")
    rows = [dict(prompt=[user("w1")], chosen=[thought], rejected=[assistant("w5")])] * 2
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    message = r"--ignore=reasoning_content.*\n.*with --on_bad_row=drop"
    with pytest.raises(ValueError, match=message) as told:
        score_file(chat_model, path, tmp_path / "out.jsonl")
    assert "data." not in str(told.value)
    score_file(chat_model, path, tmp_path / "out.jsonl", settings=dict(on_bad_row="drop"))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert "does not write 'reasoning_content'" in line["unscored"]
        assert "--ignore=reasoning_content" in line["unscored"]


def test_prompts_that_training_leaves_whole_are_sampled_whole(chat_model, chats):
    """Longer than max_prompt_length, and yet not cut: with its response each fits."""
    checkpoint = loading.open_checkpoint(str(chat_model))
    data = data_of(chats)
    data.update(max_length=40, max_prompt_length=4)
    trained_on = dataset.load(data, checkpoint.tokenizer, "pairs", date=DAY).train
    settings = dict(max_prompt_length=0, truncate="keep_end", columns="") | ENCODING
    asked = sample.Options(str(chat_model), str(chats), "", Sampling(6), settings=settings)
    _, texts = sample._read(asked)
    sampled = generation.encode(
        texts, checkpoint.tokenizer, checkpoint.config, Sampling(6), settings, DAY
    )
    assert min(map(len, sampled.ids)) > 4 and ids(sampled.ids) == ids(trained_on.prompts)


def test_cut_chat_prompts_are_told(chat_model, chats):
    """They lose their start, and the message has lengths at which they do not."""
    checkpoint = loading.open_checkpoint(str(chat_model))
    data = data_of(chats)
    data.update(max_length=12, max_prompt_length=6)
    found = dataset.load(data, checkpoint.tokenizer, "pairs", date=DAY)
    (warning,) = found.ledger.train.warnings
    assert warning == (
        "40 of 40 chat prompts are cut to 6 tokens, and lose the start: system text and tool "
        "definitions. Pass --config.data.max_length=128 --config.data.max_prompt_length=64."
    )
    data.update(max_length=128, max_prompt_length=64)
    found = dataset.load(data, checkpoint.tokenizer, "pairs", date=DAY)
    assert not found.ledger.train.warnings and not found.ledger.train.prompts_truncated
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    model = dpo_jax.load(chat_model)
    with pytest.warns(UserWarning, match=r"^40 of 40 chat .* Pass max_length=128 max_prompt_len"):
        model.encode(rows, date=DAY, max_length=12, max_prompt_length=6, **ENCODING)
