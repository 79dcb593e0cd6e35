"""Configs and flags of every type with values that nobody means."""

import math

import pytest

from dpo_jax import config as configs
from dpo_jax import config_checks, config_files, data_report, sample, score, sweep, train
from dpo_jax.data import batches
from dpo_jax.models.lora import Lora
from tests.helpers.tiny import tiny_config
from tests.hostile.judging import check_words, refusal_of, status_of

NUMBERS = ("nan", "inf", "-inf", "1e400", "-1e400")
HUGE = ("1" + "0" * 40, "9" * 6_000, "-" + "9" * 40)
TEXTS = ("", " ", "x" * 10_000, "\x00", "../..", "None", "🦆", "(" * 10_000, "{[]: 1}", "a=b=c")
STAGES = {  # a config of all fields would run no stages: each of these runs some of them
    "toy": ("sft", "pairs", "dpo", "evaluate", "reward", "sampling", "model", "data", "mesh"),
    "toy:ppo": ("rm", "ppo"),
    "toy:best_of_n": ("best_of_n",),
    "toy:preferred_ft": ("preferred_ft",),
    "toy:unlikelihood": ("unlikelihood",),
}


def config_with(field: str) -> str:
    """Return the name of a config that has a field."""
    block = field.partition(".")[0]
    return next((name for name, blocks in STAGES.items() if block in blocks), "toy")


def set_field(field: str, text: str) -> None:
    config = config_files.load(config_with(field))
    config_files.override(config, {field: text})
    config_checks.validate(config.lock())


FIELDS = [(field, default) for field, default, _ in configs.field_docs()]
NUMERIC = [field for field, default in FIELDS if type(default) in (int, float)]


@pytest.mark.parametrize("field", NUMERIC)
def test_numbers_that_are_none_are_refused_by_field(field):
    for text in (*NUMBERS, *HUGE):
        refusal = refusal_of(lambda text=text: set_field(field, text))
        assert refusal.startswith((f"config.{field} = ", f"--config.{field}=")), (text, refusal)


@pytest.mark.parametrize(("field", "default"), FIELDS)
def test_any_text_is_taken_or_refused(field, default):
    for text in TEXTS:
        refusal_of(lambda text=text: set_field(field, text))


def test_every_number_has_a_range():
    for field, default in FIELDS:
        known = configs.field_of(field)
        numbers = default if isinstance(default, tuple) else (default,)
        if not numbers or type(numbers[0]) not in (int, float):
            continue
        assert math.isfinite(known.least) and math.isfinite(known.most), field
        for number in numbers:
            assert known.least <= number <= known.most, field


HEAD = "from dpo_jax import config\ndef get_config():\n    c = config.default(('sft',))\n"
CONFIG_FILES = {
    "no get_config": "x = 1",
    "raises": "1 / 0",
    "ends the program": "import sys\nsys.exit(0)",
    "get_config raises": "def get_config():\n    raise KeyError",
    "get_config ends the program": "def get_config():\n    exit(0)",
    "get_config is no function": "get_config = 3",
    "get_config wants a method": "def get_config(method):\n    return 3",
    "get_config returns nothing": "def get_config(): pass",
    "get_config never ends": "def get_config():\n    return get_config()",
    "an empty config": "import ml_collections\ndef get_config():\n"
    "    return ml_collections.ConfigDict()",
    "a text for a number": HEAD + "    c.sft.lr = 'x'\n    return c",
    "None for a number": HEAD + "    c.seed = None\n    return c",
    "nan for a number": HEAD + "    c.sft.lr = float('nan')\n    return c",
    "an unknown field": HEAD + "    c.sft.learning_rate = 1.0\n    return c",
    "a field less": HEAD + "    del c.sft.lr\n    return c",
    "a number for a block": HEAD + "    c.sft = 3\n    return c",
    "numbers for stages": HEAD + "    c.stages = (1,)\n    return c",
    "a number for options": HEAD + "    c.data.template = 3\n    return c",
    "a raw ValueError": "def get_config():\n    return int('x')",
    "a NUL": "\0",
    "no Python": "def(",
    "other bytes": b"\xff\xfe\x00",
    "nothing": "",
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_config_files_are_refused_by_name(name, tmp_path):
    source = CONFIG_FILES[name]
    path = tmp_path / "hostile.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())

    def load():
        config_checks.validate(config_files.load(str(path)))

    refusal = refusal_of(load)
    assert "hostile.py" in refusal or refusal.startswith(("config.", "--config.")), refusal


@pytest.fixture
def idle(monkeypatch):
    """Commands that parse what is typed, and then do nothing."""

    def nothing(*_, **__):
        return None

    monkeypatch.setattr(train, "run_stages", nothing)
    monkeypatch.setattr(sweep, "run", nothing)
    monkeypatch.setattr(sample, "sample_file", nothing)
    monkeypatch.setattr(score, "score_file", nothing)


COMMANDS = {
    train: ("--config=toy",),
    sweep: ("--config=toy", "--sweep=dpo.beta=1,2"),
    sample: ("--model=m", "--prompts=p", "--out=o"),
    score: ("--model=m", "--data=d", "--out=o"),
    data_report: ("d.jsonl",),
}
REFUSED = [  # command, arguments, words
    (train, ("config.dpo.beta=0.5",), "Write --config.dpo.beta=0.5"),
    (train, ("workdir=x", "--debug=false"), "Write --workdir=x"),
    (train, ("wrkdir=x",), "Did you mean --workdir=x?"),
    (train, ("run2",), "run2: expected only flags"),
    (train, ("run2", "run3"), "run2: expected only flags"),
    (train, ("--workdir=",), "--workdir=: expected a value"),
    (train, ("--workdir=  ",), "--workdir=: expected a value"),
    (train, ("--push=",), "--push=: expected a value"),
    (train, ("--config=",), "--config=: expected a value"),
    (train, ("--config=toy:dpoo",), "toy has no method 'dpoo'"),
    (train, ("--config.seed=-1",), "config.seed = -1: expected at least 0"),
    (train, ("--config.seed=4294967296",), "config.seed = 4294967296: expected at most"),
    (train, ("--config.dpo.steps=10000000000",), "config.dpo.steps = 10000000000: expected at"),
    (train, ("--config.dpo.epochs=inf",), "config.dpo.epochs = inf: expected a finite"),
    (train, ("--config.model.lora.rank=100000",), "config.model.lora.rank = 100000: expected"),
    (train, ("--config.dpo=beta=0.2",), "--config.dpo=beta=0.2: expected one of its fields"),
    (train, ("--process_id=-1",), "--process_id=-1: expected"),
    (sweep, ("--workdir=",), "--workdir=: expected a value"),
    (sweep, ("config.dpo.lr=1",), "Write --config.dpo.lr=1"),
    (sample, ("seed=3",), "Write --seed=3"),
    (sample, ("--seed=-1",), "--seed=-1: expected"),
    (sample, ("--temperature=nan",), "--temperature=nan: expected"),
    (sample, ("--temperature=inf",), "--temperature=inf: expected"),
    (sample, ("--top_p=nan",), "--top_p=nan: expected"),
    (sample, ("--top_k=-1",), "--top_k=-1: expected"),
    (sample, ("--n=0",), "--n=0: expected"),
    (sample, ("--max_new_tokens=10000000000",), "--max_new_tokens=10000000000: expected"),
    (sample, ("--batch_size=0",), "--batch_size=0: expected"),
    (sample, ("--fsdp=x",), "--fsdp=x: expected"),
    (sample, ("--out=",), "--out=: expected a value"),
    (score, ("data=x",), "Write --data=x"),
    (score, ("--batch_size=0",), "--batch_size=0: expected"),
    (score, ("--batch_size=-4",), "--batch_size=-4: expected"),
    (score, ("--batch_size=nan",), "--batch_size=nan: expected"),
    (score, ("--batch_size=10000000000",), "--batch_size=10000000000: expected"),
    (score, ("--max_length=-1",), "--max_length=-1: expected"),
    (score, ("--max_length=1e9",), "--max_length=1e9: expected"),
    (score, ("--model=",), "--model=: expected a value"),
    (score, ("--truncate=middle",), "--truncate=middle: expected one of"),
    (score, ("--date=yesterday",), "--date=yesterday: expected a day"),
    (data_report, ("source=hh",), "Write --source=hh"),
    (data_report, ("config.data.source=hh",), "Write --config.data.source=hh"),
    (data_report, ("second.jsonl",), "second.jsonl: expected only flags"),
    (data_report, ("--max_length=nan",), "expected a whole number"),
    (data_report, ("--show=-1",), "--show=-1: expected"),
    (data_report, ("--model=",), "--model=: expected a value"),
]


@pytest.mark.parametrize(("command", "arguments", "words"), REFUSED)
def test_what_is_typed_is_refused_with_the_flag_that_was_meant(
    command, arguments, words, idle, capsys
):
    assert status_of(command.main, *COMMANDS[command], *arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and words in text
    check_words(text)


def test_usual_commands_are_taken(idle, capsys):
    for command, arguments in COMMANDS.items():
        if command is not data_report:
            assert status_of(command.main, *arguments) == 0, capsys.readouterr().err


def test_a_rank_above_the_models_width_is_refused():
    with pytest.raises(ValueError, match="model.lora.rank = 17: expected at most 16, the width"):
        Lora(17).kernels(tiny_config())
    assert Lora(16).kernels(tiny_config())


@pytest.mark.parametrize(
    ("size", "steps", "epochs"), [(12, 10**6, 0.0), (10**7, 10**7, 0.0), (12, 0, 1e6)]
)
def test_steps_beyond_what_could_be_meant_are_refused(size, steps, epochs):
    with pytest.raises(ValueError, match="steps of 64 examples, .* Lower steps"):
        batches.steps_of(size, 64, steps=steps, epochs=epochs)
    assert batches.steps_of(10**6, 64, steps=10**6, epochs=0.0) == 10**6
