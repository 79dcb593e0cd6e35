"""Judge which of two models answers better, or which of two files of samples.

    python -m experiments.head_to_head --a=MODEL --b=MODEL --prompts=FILE --workdir=DIR \\
        --judge_model=NAME --template=dialogue
    python -m experiments.head_to_head --a=A.jsonl --b=B.jsonl --workdir=DIR \\
        --judge_model=NAME --template=dialogue

MODEL is a folder or a hub name; it answers the rows of FILE as `dpo-jax sample` would. With
--prompts=config it answers held-out prompts of --config's data, as in the win rates of tldr_winrate
and hh_winrate. A.jsonl and B.jsonl have answers to the same prompts, as `dpo-jax sample` writes
them. With several answers to a prompt, the first of A is compared with the first of B, and so on.

Both orders are asked unless --orders=1. --reward_model=FOLDER judges by a reward model instead: it
reads prompts and answers as it was trained to, chat messages through its own template.
--dry_run tells how often the judge would be asked. Writes to DIR:

    a.jsonl, b.jsonl   what was sampled from models
    judgements.jsonl   each answer of the judge, so that an interrupted command resumes
    votes.jsonl        a row for each vote: prompt, ours (A's), other (B's), order, verdict, answer,
                       calls and cost
    head_to_head.json  A's win rate, as it is and at equal length, with intervals over prompts
    head_to_head.md    the same as a table, with .csv and .tex
    examples.md        the first --show prompts with both answers and the judge's words
"""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax import command_line, device_command, sample
from dpo_jax import config as configs
from dpo_jax.console import say, warn
from dpo_jax.data import every_row
from dpo_jax.data.conversations import as_messages, transcript
from dpo_jax.data.readers import read_jsonl
from dpo_jax.data.rows import TextExample
from dpo_jax.evaluation import chat_api, tables, winrate_stats
from dpo_jax.evaluation import judge as judges
from dpo_jax.evaluation.judge import Comparison
from dpo_jax.models import loading
from dpo_jax.parallel import processes, sharding
from dpo_jax.pipeline.run import Run
from dpo_jax.rewards import make, reward_model
from dpo_jax.sampling.prompts import Conversation
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.workdir import write_json, write_lines, write_text
from experiments import commands, hh_winrate, tldr_winrate, unseen, winrate, winrate_report

# Task -> how the judge reads prompts, and answers.
TASKS: dict[str, tuple[Callable, Callable]] = {
    "text": (str.strip, str.strip),
    "tldr": (tldr_winrate.text, str.strip),
    "hh": (str.strip, hh_winrate.answer),
}
SIDES = ("a", "b")
CONFIG = "config"  # --prompts: those of the config's data
REWARD_BATCH = 64
OPTIMISED = (
    "Warning: a reward model judged. If one of the two was optimised for it, as by PPO or best of "
    "N, the win rate says how well it was optimised, and not which answers are better."
)
# Prompts as they stand in a file, cut only where the model could not read them.
WHOLE_PROMPTS = dict(max_prompt_length=0, truncate="keep_end", columns="", template={}, ignore=())
COLUMNS = (
    tables.Column("A", "a"),
    tables.Column("B", "b"),
    tables.Column("A's win rate", "rate", ".3f", interval=("low", "high")),
    winrate_report.EQUAL_LENGTH,
    tables.Column("wins", "wins", "d"),
    tables.Column("ties", "ties", "d"),
    tables.Column("losses", "losses", "d"),
    tables.Column("unparsable", "unparsable", "d"),
    tables.Column("prompts", "prompts", "d"),
    tables.Column("A's words", "words_a", ".1f"),
    tables.Column("B's words", "words_b", ".1f"),
)


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two: a model with its temperature, or a file of samples."""

    source: str
    temperature: float | None  # None: a file

    @property
    def name(self) -> str:
        """The name in tables."""
        if self.temperature is None:
            return self.source
        return f"{self.source}, T={self.temperature:g}"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    a: Side
    b: Side
    judge: judges.Judge | None  # None: the reward model
    reward_model: str = ""
    prompts: str = ""  # what models answer; "": that of the files
    task: str = "text"
    sampling: Sampling = Sampling(128)
    dtype: str = "float32"
    show: int = 8

    @property
    def sides(self) -> dict[str, Side]:
        """The two by their letters."""
        return dict(zip(SIDES, (self.a, self.b), strict=True))


def read_answers(path: str) -> dict[str, tuple[TextExample, list[str]]]:
    """Return key -> (prompt, answers) of a file of samples, in its order.

    The prompt is an example without responses.

    Rows of the same prompt add up. Raises ValueError that names the row without prompt or answer.
    """
    data = configs.default(()).data
    found = {}
    for number, row in read_jsonl(path):
        where = f"{path} line {number}"
        prompt = every_row.prompt(row, data, where)
        answers = row.get("completions", [row.get("completion")])
        if not isinstance(answers, list) or not answers or not all(map(_is_text, answers)):
            raise ValueError(
                f"{where}: expected a field 'completion', text, or 'completions', a list of texts, "
                "as `dpo-jax sample` writes them."
            )
        found.setdefault(_key(prompt), (prompt, []))[1].extend(answers)
    if not found:
        raise ValueError(f"{path} has no rows.")
    return found


def _is_text(value) -> bool:
    return isinstance(value, str)


def matched(a: dict, b: dict, names: tuple[str, str]) -> list[tuple[TextExample, str, str]]:
    """Return (prompt, A's answer, B's answer) for all answers, prompt by prompt.

    a, b: as read_answers returns them. Raises ValueError where they do not have the same prompts,
    and as many answers to each.
    """
    for missing, name in ((b.keys() - a.keys(), names[0]), (a.keys() - b.keys(), names[1])):
        if missing:
            raise ValueError(
                f"{name} has no answer to {len(missing)} of the other's prompts, such as "
                f"{min(missing):.100}: both must have answers to the same prompts."
            )
    found = []
    for key, (prompt, ours) in a.items():
        _, others = b[key]
        if len(ours) != len(others):
            raise ValueError(
                f"{names[0]} has {len(ours)} answers to the prompt {key:.100}, and {names[1]} has "
                f"{len(others)}: both must have as many."
            )
        found += [(prompt, our, other) for our, other in zip(ours, others, strict=True)]
    return found


def run(options: Options, folder: pathlib.Path, mesh) -> dict:
    """Sample what is missing, judge, report, and return the result.

    Raises BudgetExhausted or ChatError after keeping what was judged until then.
    """
    check_matched(options)
    if options.judge is not None and jax.process_index() == 0:
        _check_key(options, folder)
    folder.mkdir(parents=True, exist_ok=True)
    answers = {}
    for letter, side in options.sides.items():
        path = side.source
        if side.temperature is not None:
            path = str(folder / f"{letter}.jsonl")
            asked = sample.Options(
                side.source,
                options.prompts,
                path,
                drawn_by(options.sampling, letter, side),
                dtype=options.dtype,
                settings=WHOLE_PROMPTS,
            )
            sample.sample_file(asked, mesh)
        answers[letter] = read_answers(path)
    names = (options.a.name, options.b.name)
    pairs = matched(answers["a"], answers["b"], names)

    show_prompt, read = TASKS[options.task]
    shown = [show_prompt(transcript(example.prompt)) for example, _, _ in pairs]
    ours = [read(our) for _, our, _ in pairs]
    others = [read(other) for _, _, other in pairs]
    compared = winrate_report.compared(shown, ours, others)
    if options.judge is not None:
        about, votes = _by_chat(options.judge, compared, folder)
    else:
        reward = open_reward(options.reward_model, mesh)
        about, votes = _by_reward(options, reward, pairs)
    result = dict(a=names[0], b=names[1]) | about | measured(compared, votes)
    _write(result, compared, votes, folder, options.show)
    return result


def check_matched(options: Options) -> None:
    """Raise ValueError where a file does not match the other side, before anything is sampled.

    Prompts of a config that are not drawn yet (in a dry run) are not checked.
    """
    sides = options.sides.values()
    are_files = [side.temperature is None for side in sides]
    if not any(are_files) or (not all(are_files) and options.prompts == CONFIG):
        return
    answers = []
    for side in sides:
        if side.temperature is None:
            answers.append(read_answers(side.source))
        else:
            answers.append(_to_come(options))
    matched(*answers, (options.a.name, options.b.name))


def _to_come(options: Options) -> dict[str, tuple[TextExample, list[str]]]:
    """Return what a model will have answered, as read_answers returns it, with empty answers."""
    data = configs.default(()).data
    found = {}
    for where, row in every_row.read(options.prompts):
        example = every_row.prompt(row, data, where)
        _, answers = found.setdefault(_key(example), (example, []))
        answers += [""] * options.sampling.n
    return found


def _key(example: TextExample) -> str:
    """Return text that is equal for equal prompts."""
    return json.dumps(example.prompt, sort_keys=True)


def drawn_by(sampling: Sampling, letter: str, side: Side) -> Sampling:
    """Return how a model's answers are drawn: B's by the next seed.

    By one seed, a model beside itself would give each answer twice.
    """
    seed = sampling.seed + SIDES.index(letter)
    return dataclasses.replace(sampling, temperature=side.temperature, seed=seed)


def check_differ(a: Side, b: Side) -> None:
    """Raise ValueError where all answers of the two are the same."""
    if a == b and not a.temperature:
        what = "one file" if a.temperature is None else "one model at temperature 0"
        raise ValueError(
            f"--a={a.source} and --b={b.source} are {what}: all answers would be the same. Compare "
            "two models or files, or give a temperature above 0."
        )


def _check_key(options: Options, folder: pathlib.Path) -> None:
    """Raise ValueError for a missing key before anything is sampled for it."""
    for letter, side in options.sides.items():
        if side.temperature is not None and not (folder / f"{letter}.jsonl").exists():
            chat_api.api_key()


def _by_chat(judge: judges.Judge, compared: list[dict], folder: pathlib.Path) -> tuple:
    """Return who judged, and the votes on each comparison as records."""
    comparisons = [Comparison(pair["prompt"], pair["ours"], pair["other"]) for pair in compared]

    def ask():
        votes = judges.vote(judge, comparisons, folder, say)
        about = dict(
            judge=judge.model,
            template=judge.template,
            judge_temperature=judge.temperature,
            orders=judge.orders,
            judge_seed=judge.seed if judge.orders == 1 else None,
        )
        return [about, winrate_report.as_records(votes)]

    about, votes = processes.from_first(ask)
    return about, votes


def open_reward(path: str, mesh) -> Callable[[list[TextExample]], np.ndarray]:
    """Return the reward of examples with one response each, by the model in a folder or on the hub.

    The model reads them as it was trained to.
    """
    if loading.is_own(*loading.find(path)):
        data = configs.default(()).data
        return reward_model.of_examples(path, REWARD_BATCH, mesh, data, datetime.date.today())
    of_texts = make.make_reward("model", path, REWARD_BATCH, mesh)

    def reward(examples: list[TextExample]) -> np.ndarray:
        conversations = []
        for example in examples:
            is_chat = isinstance(example.prompt, list)
            conversations.append(Conversation(example.prompt, example.tools) if is_chat else None)
        prompts = [transcript(example.prompt) for example in examples]
        answers = [answer_text(example.responses[0]) for example in examples]
        return of_texts(prompts, answers, None, conversations)

    return reward


def answer_text(response) -> str:
    """Return a response as the text that it says."""
    return response if isinstance(response, str) else response[0]["content"]


def read_by_model(task: str, prompt, answer: str) -> str:
    """Return an answer as a reward model reads it after its prompt.

    After a prompt of plain text, it keeps the space that it begins with. Posts and dialogues end
    without one, so that each of their answers begins with one, as in training.
    """
    _, read = TASKS[task]
    text = read(answer)
    if not isinstance(prompt, str):
        return text
    if task != "text":
        return f" {text}"
    return answer[: len(answer) - len(answer.lstrip())] + text


def _by_reward(
    options: Options, reward: Callable, pairs: list[tuple[TextExample, str, str]]
) -> tuple:
    """Return who judged, and the one vote on each comparison as records."""
    comparisons = []
    for example, *answers in pairs:
        texts = [read_by_model(options.task, example.prompt, answer) for answer in answers]
        comparisons.append(Comparison(transcript(example.prompt), *texts))

    def of_answers(_prompts, answers, _tokens):
        # All of A's come first, then all of B's.
        prompts = [example for example, _, _ in pairs] * 2
        examples = []
        for example, answer in zip(prompts, answers, strict=True):
            is_chat = isinstance(example.prompt, list)
            response = as_messages("assistant", answer) if is_chat else answer
            examples.append(dataclasses.replace(example, responses=(response,)))
        return reward(examples)

    verdicts = judges.compare_by_reward(of_answers, comparisons)
    votes = [(judges.Vote("", verdict),) for verdict in verdicts]
    about = dict(judge=f"reward model {options.reward_model}", warning=OPTIMISED)
    return about, winrate_report.as_records(votes)


def measured(compared: list[dict], votes: list[list[dict]]) -> dict:
    """Return A's win rate, as it is and at equal length, verdicts, lengths and cost.

    Intervals are clustered by prompt.
    """
    verdicts = []
    for of_pair in votes:
        verdicts.append(judges.combined([judges.Vote(**vote) for vote in of_pair]))
    prompts = [pair["prompt"] for pair in compared]
    longer_by = [len(pair["ours"]) - len(pair["other"]) for pair in compared]
    at_equal_length = winrate_stats.length_controlled(verdicts, longer_by, prompts)
    renamed = {f"equal_length_{name}": at_equal_length[name] for name in ("rate", "low", "high")}
    asked_both = [of_pair for of_pair in votes if len(of_pair) == 2]
    contradicted = [first for first, second in asked_both if first["verdict"] != second["verdict"]]
    # Equal comparisons share their votes, which were paid for once.
    paid = {}
    for pair, of_pair in zip(compared, votes, strict=True):
        for vote in of_pair:
            paid[pair["prompt"], pair["ours"], pair["other"], vote["order"]] = vote["cost"]
    return dict(
        **winrate_stats.win_rate(verdicts, prompts),
        **renamed,
        length_effect=at_equal_length["length_effect"],
        prompts=len(set(prompts)),
        # Of those asked in both orders: the judge took the same place twice, say, and not the same
        # answer.
        contradicted=len(contradicted),
        words_a=float(np.mean([len(pair["ours"].split()) for pair in compared])),
        words_b=float(np.mean([len(pair["other"].split()) for pair in compared])),
        cost=sum(paid.values()),
        verdicts=verdicts,
    )


def _write(
    result: dict, compared: list[dict], votes: list[list[dict]], folder: pathlib.Path, show: int
) -> None:
    """Write the files and print the table."""
    names = result["a"], result["b"]
    about = dict(matchup="; ".join(names))
    write_lines(folder / "votes.jsonl", winrate_report.vote_rows(compared, votes, about))
    write_json(folder / "head_to_head.json", result)
    makers = {".csv": tables.to_csv, ".md": tables.to_markdown, ".tex": tables.to_latex}
    for suffix, make_table in makers.items():
        text = make_table([result], COLUMNS)
        if suffix == ".md" and "warning" in result:
            text += f"\n{result['warning']}\n"
        write_text(folder / f"head_to_head{suffix}", text)
    if show:
        row = result | dict(compared=compared, votes=votes)
        winrate_report.write_examples(folder / "examples.md", *names, row, show)
    if "warning" in result:
        warn(result["warning"].removeprefix("Warning: "))
    say(f"{tables.to_markdown([result], COLUMNS)}\n{folder}: head_to_head.json, votes.jsonl")


def write_prompts(config, count: int, folder: pathlib.Path, mesh) -> str:
    """Write held-out prompts of a config's data to a file, as the win rates have them.

    Returns its path. Raises ValueError where the data has fewer, or where a stage of the config
    trains on one and config.data.on_leak does not say otherwise.
    """

    def make_task(runs, options):
        data = runs["dpo"].sft_data()
        data.max_eval_rows = 0
        examples = winrate.test_examples(data)
        if data.source == "hh":
            examples = [example for example in examples if hh_winrate.one_turn(example)]
        found = winrate.held_out(examples, options.prompts)
        return winrate.Task(found, data, str.strip, str.strip, winrate.date_of(runs["dpo"]))

    asked = winrate.Options(("dpo",), (1.0,), None, prompts=count)
    made = unseen.task(make_task, dict(dpo=Run(config, folder, mesh)), asked)
    rows = []
    for example in made.examples:
        row = dict(prompt=example.prompt)
        rows.append(row | (dict(tools=example.tools) if example.tools else {}))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "prompts.jsonl"
    write_lines(path, rows)
    return str(path)


def plan(options: Options, count: int, folder: pathlib.Path) -> str:
    """Return what is to be sampled and judged as text. count: prompts.

    Raises ValueError where a file does not match the other side.
    """
    lines = []
    answers = count * options.sampling.n
    check_matched(options)
    for side in options.sides.values():
        if side.temperature is not None:
            lines.append(f"sample {side.name}: {answers:,} answers")
        else:
            answers = sum(len(texts) for _, texts in read_answers(side.source).values())
    if options.judge is not None:
        kept = winrate.lines_in(folder / judges.JUDGEMENTS)
        lines.append(
            f"judge: {answers * options.judge.orders:,} questions, up to {judges.ATTEMPTS} calls "
            f"each; {kept:,} calls are kept"
        )
    return "\n".join(lines)


def side_of(source: str, temperature: float) -> Side:
    """Return what --a or --b names: a file of samples ends in .jsonl."""
    if not source.endswith(".jsonl"):
        return Side(source, temperature)
    if not pathlib.Path(source).is_file():
        raise FileNotFoundError(f"{source}: there is no such file of samples.")
    return Side(source, None)


def main():
    from absl import flags

    sources = {}
    temperatures = {}
    for letter in SIDES:
        sources[letter] = flags.DEFINE_string(
            letter, None, "A model's folder or hub name, or a file of samples, FILE.jsonl."
        )
        temperatures[letter] = flags.DEFINE_float(
            f"{letter}_temperature",
            1.0,
            f"Sampling temperature of the model --{letter}; 0: always the likeliest token.",
            lower_bound=0,
            upper_bound=1e4,
        )
    workdir = flags.DEFINE_string("workdir", None, "Folder of the samples and the results.")
    prompts = flags.DEFINE_string(
        "prompts",
        None,
        "What models answer: rows with a prompt, in any format that training reads; or `config`: "
        "held-out prompts of --config's data.",
    )
    config = command_line.define_config("tldr")
    count = flags.DEFINE_integer(
        "count", 256, "How many held-out prompts of the config.", lower_bound=1
    )
    task = flags.DEFINE_enum(
        "task",
        "text",
        list(TASKS),
        "How the judge reads: text: as it is; tldr: posts without the cue TL;DR:; hh: answers up "
        "to the human's next turn. With --prompts=config it is the config's.",
    )
    max_new_tokens = flags.DEFINE_integer(
        "max_new_tokens", 128, "Longest answer of a model.", lower_bound=1, upper_bound=1_000_000
    )
    n = flags.DEFINE_integer(
        "n", 1, "Answers of each model to each prompt.", lower_bound=1, upper_bound=100_000
    )
    seed = flags.DEFINE_integer(
        "seed",
        0,
        "Seed of the answers of model A; B's is the next one.",
        lower_bound=0,
        upper_bound=configs.SEEDS - 1,
    )
    batch_size = flags.DEFINE_integer(
        "batch_size", 64, "Answers at a time, over all devices.", lower_bound=1, upper_bound=100_000
    )
    dtype = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
    of_models = ("max_new_tokens", "n", "seed", "batch_size", "dtype", "prompts")
    judge_model = flags.DEFINE_string("judge_model", None, "The chat model's name at its endpoint.")
    template = flags.DEFINE_string(
        "template", None, f"The judge's prompt: a file, or one of {', '.join(judges.TEMPLATES)}."
    )
    reward_model = flags.DEFINE_string(
        "reward_model", None, "A reward model's folder, which judges instead of a chat model."
    )
    show = flags.DEFINE_integer(
        "show", Options.show, "Prompts on the page of examples; 0: no page.", lower_bound=0
    )
    dry_run = flags.DEFINE_bool("dry_run", False, "Only tell what would be done, and its cost.")
    flags.mark_flags_as_required(["a", "b", "workdir"])
    mesh_of_flags = sharding.define_flags()
    known = set(flags.FLAGS)
    make_judge = judges.define_flags(orders=2)
    judge_flags = ["judge_model", "template", *sorted(set(flags.FLAGS) - known)]

    def judge_asked_for() -> judges.Judge | None:
        if reward_model.value:
            commands.refuse_flags("with --reward_model", *judge_flags)
            return None
        if not judge_model.value or not template.value:
            raise ValueError(
                "--judge_model and --template are missing: give the name of a chat model behind "
                "OPENAI_BASE_URL and its question, or use --reward_model."
            )
        return make_judge(model=judge_model.value, template=template.value)

    def check_flags(sides: dict[str, Side]) -> None:
        for letter, side in sides.items():
            if side.temperature is None:
                commands.refuse_flags(f"as --{letter} is a file", f"{letter}_temperature")
        if all(side.temperature is None for side in sides.values()):
            commands.refuse_flags("as both sides are files", *of_models)
        elif not prompts.value:
            raise ValueError("--prompts is missing: say what the models are to answer.")
        if prompts.value != CONFIG:
            commands.refuse_flags("without --prompts=config", "config", "count")
            if config.overrides:
                raise ValueError("--config.FIELD would do nothing without --prompts=config.")
        else:
            commands.refuse_flags("with --prompts=config, which says it", "task")

    def start():
        sides = {}
        for letter in SIDES:
            sides[letter] = side_of(sources[letter].value, temperatures[letter].value)
        check_flags(sides)
        check_differ(**sides)
        sampling = Sampling(
            max_new_tokens.value, n=n.value, seed=seed.value, batch_size=batch_size.value
        )
        options = Options(
            **sides,
            judge=judge_asked_for(),
            reward_model=reward_model.value or "",
            prompts=prompts.value or "",
            task=task.value,
            sampling=sampling,
            dtype=dtype.value,
            show=show.value,
        )
        mesh = mesh_of_flags()
        with commands.in_workdir(workdir.value, dry_run=dry_run.value) as place:
            folder = pathlib.Path(place)
            total = count.value
            if prompts.value == CONFIG:
                made = commands.config_maker(config.choice, config.overrides)("dpo")
                kind = made.data.source if made.data.source in TASKS else "text"
                options = dataclasses.replace(options, task=kind)
                if not dry_run.value:
                    path = write_prompts(made, count.value, folder, mesh)
                    options = dataclasses.replace(options, prompts=path)
            elif prompts.value:
                total = sum(1 for _ in every_row.read(prompts.value))
            if dry_run.value:
                say(plan(options, total, folder))
            else:
                run(options, folder, mesh)

    device_command.run(start, __doc__, config=config)


if __name__ == "__main__":
    main()
