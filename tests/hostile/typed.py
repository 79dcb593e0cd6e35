"""Configs and flags of every type with values that nobody means."""

import contextlib
import dataclasses
import io
import pathlib
import types
from collections.abc import Iterator
from unittest import mock

from dpo_jax import config as configs
from dpo_jax import config_checks, config_files, data_report, sample, score, sweep, train
from tests.hostile.judging import REFUSED, TAKEN, Verdict, is_paragraph, judge, status_of

NUMBERS = ("nan", "inf", "-inf", "1e400", "-1e400")
HUGE = ("1" + "0" * 40, "9" * 6_000, "-" + "9" * 40)
TEXTS = ("", " ", "x" * 10_000, "\x00", "../..", "None", "🦆", "(" * 10_000, "{[]: 1}", "a=b=c")
STAGES = {  # a config of all fields would run no stages: each of these runs some of them
    "toy": ("sft", "pairs", "dpo", "evaluate", "reward", "sampling", "model", "data", "mesh"),
    "toy:ppo": ("rm", "ppo"),
    "toy:best_of_n": ("best_of_n",),
    "toy:preferred_ft": ("preferred_ft",),
    "toy:unlikelihood": ("unlikelihood",),
    "toy:kto": ("kto",),
}

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

COMMANDS = {
    train: ("--config=toy",),
    sweep: ("--config=toy", "--sweep=dpo.beta=1,2"),
    sample: ("--model=m", "--prompts=p", "--out=o"),
    score: ("--model=m", "--data=d", "--out=o"),
    data_report: ("d.jsonl",),
}
FLAGS = [  # command, arguments, words
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
    (score, ("--top=-1",), "--top=-1: expected"),
    (score, ("--top=1e9",), "--top=1e9: expected"),
    (score, ("--beta=nan",), "--beta=nan: expected"),
    (score, ("--beta=-1",), "--beta=-1: expected"),
    (score, ("--per_token=maybe",), "--per_token=maybe: expected"),
    (score, ("--prompts=p", "--top=3"), "found both"),
    (score, ("--beta=0.5",), "--beta=0.5 is the factor of implicit rewards"),
    (data_report, ("source=hh",), "Write --source=hh"),
    (data_report, ("config.data.source=hh",), "Write --config.data.source=hh"),
    (data_report, ("second.jsonl",), "second.jsonl: expected only flags"),
    (data_report, ("--max_length=nan",), "expected a whole number"),
    (data_report, ("--show=-1",), "--show=-1: expected"),
    (data_report, ("--model=",), "--model=: expected a value"),
]

FIELDS = [(field, default) for field, default, _ in configs.field_docs()]
NUMERIC = [field for field, default in FIELDS if type(default) in (int, float)]


@dataclasses.dataclass(frozen=True)
class Case:
    """Something typed: what is judged is whether it is refused, and by which name."""

    kind: str
    name: str


def verdicts(folder: pathlib.Path) -> Iterator[tuple[Case, Verdict]]:
    """Yield each case with its verdict."""
    for field in NUMERIC:
        for text in (*NUMBERS, *HUGE):
            name = f"{field}={text[:40]}"
            yield Case("config numbers", name), judge_number(field, text)
    for field, _ in FIELDS:
        for text in TEXTS:
            verdict = judge(lambda field=field, text=text: set_field(field, text))
            yield Case("config texts", f"{field}={text[:40]!r}"), verdict
    for name in CONFIG_FILES:
        yield Case("config files", name), judge_config_file(name, folder)
    for command, arguments, words in FLAGS:
        name = f"{command.__name__} {' '.join(arguments)}"
        yield Case("flags", name), judge_flags(command, arguments, words)
    for command in COMMANDS:
        if command is not data_report:
            yield Case("flags", f"{command.__name__}, usual ones"), judge_flags(command, ())


def judge_number(field: str, text: str) -> Verdict:
    """Give a number that is none, or larger than any that is meant, to a field."""
    verdict = judge(lambda: set_field(field, text), REFUSED)
    is_named = verdict.words.startswith((f"config.{field} = ", f"--config.{field}="))
    if verdict.verdict == REFUSED and not is_named:
        return Verdict("unclear", verdict.words)
    return verdict


def judge_config_file(name: str, folder: pathlib.Path) -> Verdict:
    """Load a config file that is none."""
    source = CONFIG_FILES[name]
    path = folder / "hostile.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())

    def load():
        config_checks.validate(config_files.load(str(path)))

    return judge(load, REFUSED, ("hostile.py", "config."))


def judge_flags(command: types.ModuleType, arguments: tuple[str, ...], words: str = "") -> Verdict:
    """Give flags to a command that parses them and then does nothing; words: of its refusal.

    Without words the command is to take them.
    """
    said = io.StringIO()

    def run() -> int:
        with idle(), contextlib.redirect_stderr(said):
            return status_of(command.main, *COMMANDS[command], *arguments)

    statuses = []
    verdict = judge(lambda: statuses.append(run()))
    text = said.getvalue()
    if verdict.verdict != TAKEN:
        return verdict
    if statuses == [0]:
        return Verdict("silent", "it was taken") if words else Verdict(TAKEN, text)
    is_clear = statuses == [2] and text.startswith("error: ") and is_paragraph(text)
    is_right = bool(words) and is_clear and words in text
    return Verdict(REFUSED if is_right else "unclear", text)


@contextlib.contextmanager
def idle():
    """Let the commands parse what is typed, and then do nothing."""
    with (
        mock.patch.object(train, "run_stages"),
        mock.patch.object(sweep, "run"),
        mock.patch.object(sample, "sample_file"),
        mock.patch.object(score, "score_file"),
    ):
        yield


def config_with(field: str) -> str:
    """Return the name of a config that has a field."""
    block = field.partition(".")[0]
    return next((name for name, blocks in STAGES.items() if block in blocks), "toy")


def set_field(field: str, text: str) -> None:
    """Set a field as the command line does."""
    config = config_files.load(config_with(field))
    config_files.override(config, {field: text})
    config_checks.validate(config.lock())
