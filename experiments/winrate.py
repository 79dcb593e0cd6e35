"""Judge win rates: shared by tldr_winrate and hh_winrate.

    WORKDIR/METHOD_seedN/  what --seeds trains beside WORKDIR/METHOD
    WORKDIR/winrate/TASK/samples/POLICY-TEMPERATURE-N/  settings.json  completions.jsonl
    WORKDIR/winrate/TASK/JUDGE/  judgements.jsonl  verdicts/  votes.jsonl  examples/
        winrate.json  winrate.csv  winrate.md  winrate.tex  winrate.png  winrate.pdf
    WORKDIR/winrate/TASK/JUDGE-against_METHOD_TEMPERATURE/  the same with --against
    WORKDIR/winrate/TASK/JUDGE-both_orders/  the same with --orders=2

All policies answer the same prompts, and a judge compares each answer with the data's own response,
or with --against with that of another policy. What was trained, sampled or judged is kept, so an
interrupted command resumes and no question is asked twice. All comparisons by a judge share its
answers in JUDGE/judgements.jsonl.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax import command_line, config_checks, device_command
from dpo_jax import config as configs
from dpo_jax.console import say
from dpo_jax.data import dataset, splits
from dpo_jax.data.conversations import as_messages, reply, transcript
from dpo_jax.data.examples import Examples
from dpo_jax.data.rows import TextExample
from dpo_jax.data.tokenizer import encode_example_prompts
from dpo_jax.evaluation import chat_api, winrate_stats
from dpo_jax.evaluation import judge as judges
from dpo_jax.evaluation.judge import Comparison
from dpo_jax.models import loading, transformer
from dpo_jax.parallel import agreement, processes, sharding
from dpo_jax.pipeline.run import Run
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.rewards import reward_model
from dpo_jax.sampling import rollouts
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.training import checkpoint
from dpo_jax.whole_file import read_record
from dpo_jax.workdir import (
    COMPLETIONS,
    StageChanged,
    differences,
    lock_folder,
    read_config,
    start_date,
    write_json,
    write_record,
)
from experiments import commands, unseen, winrate_report

# What all seeds of training have in common: the methods learn from them.
SHARED = ("sft", "rm")
# Methods that no others are compared with: they have no one answer to a prompt at a temperature.
NO_OPPONENTS = ("training", "best_of_n")


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model whose answers are judged."""

    name: str  # begins the names of its completions' folders
    made_by: dict  # all that its weights depend on; completions of other weights are refused
    open: Callable[[], loading.Checkpoint]
    shots: Callable[[], str] = str  # returns the text to put before each prompt; by default none


@dataclasses.dataclass(frozen=True)
class Point:
    """A win rate to find, of a policy's answers at a temperature.

    Each answer is the best of n completions by the reward model.
    """

    method: str
    policy: Policy
    temperature: float
    n: int = 1
    samples: int = 1  # completions of each prompt; the first n of them count
    step: int | None = None  # of training, if that is what varies
    seed: int = 0  # of training: 0 is the run's own
    draw: int = 0  # of the answers: 0 is drawn by the run's own seed

    @property
    def folder(self) -> str:
        """The name of its completions' folder, which points may share."""
        return f"{self.policy.name}-{self.temperature:g}-{self.samples}{self._suffix}"

    @property
    def name(self) -> str:
        """The name of its file of verdicts."""
        best = f"-best_of_{self.n}" if self.method == "best_of_n" else ""
        return f"{self.policy.name}-{self.temperature:g}{best}{self._suffix}"

    @property
    def _suffix(self) -> str:
        return f"-draw_{self.draw}" if self.draw else ""

    @property
    def answers(self) -> tuple:
        """A key that is equal for points with the same answers."""
        n = self.n if self.samples > 1 else 1
        return self.policy.name, self.temperature, n, self.draw


@dataclasses.dataclass(frozen=True)
class Task:
    """The prompts to answer, and how the judge reads prompts and completions."""

    examples: list[TextExample]  # prompts, and the responses that answers are compared with
    data: object  # a config's data block, which says how prompts are tokenised
    shown: Callable[[str], str]  # prompt -> the prompt as the judge reads it
    read: Callable[[str], str]  # completion -> the answer as the judge reads it
    date: datetime.date  # what chat templates take for today
    rouge: bool = False  # whether ROUGE against the responses is measured too


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    methods: tuple[str, ...]
    temperatures: tuple[float, ...]
    judge: judges.Judge | None  # None: the run's reward model
    counts: tuple[int, ...] = (1, 4, 16, 64, 128)  # the N of best of N
    prompts: int = 256
    dry_run: bool = False
    # Of the points over training; None: the same as of all others.
    training_temperatures: tuple[float, ...] | None = None
    # Method and temperature of the answers to compare with; None: the data's own responses.
    against: tuple[str, float] | None = None
    seeds: int = 1  # of training: so often each method is trained
    draws: int = 1  # so often each prompt is answered at a temperature above 0
    show: int = 8  # prompts on a page of examples; 0: no pages

    @property
    def answering(self) -> tuple[str, ...]:
        """All methods whose answers are needed."""
        methods = self.methods
        if self.against and self.against[0] not in methods:
            methods = (*methods, self.against[0])
        return methods

    @property
    def opponent(self) -> str:
        """The name of what answers are compared with."""
        if self.against is None:
            return "the data's response"
        method, temperature = self.against
        return f"{method}, T={temperature:g}"

    def __post_init__(self):
        if self.against is not None:
            method, temperature = self.against
            if method in NO_OPPONENTS or not 0 <= temperature < math.inf:
                raise ValueError(
                    f"--against={method}:{temperature:g}: expected METHOD:TEMPERATURE, such as "
                    "dpo:0, of a method that has one answer to a prompt."
                )
        if min(self.counts, default=0) < 1 or len(set(self.counts)) < len(self.counts):
            given = ",".join(map(str, self.counts))
            raise ValueError(f"--best_of={given}: expected numbers of 1 or more, each once.")
        in_range = [0 <= temperature < math.inf for temperature in self.temperatures]
        is_each_once = len(set(self.temperatures)) == len(self.temperatures)
        if not in_range or not all(in_range) or not is_each_once:
            given = ",".join(map(str, self.temperatures))
            raise ValueError(f"--temperatures={given}: expected numbers of 0 or more, each once.")


def run(
    name: str,
    make_config: Callable,
    workdir: str,
    options: Options,
    *,
    trains: tuple[str, ...],
    make_task: Callable,
    make_points: Callable,
) -> list[dict]:
    """Train, sample and judge what is missing, report, and return a row for each point.

    With dry_run, only say what would be done. make_config: method -> config. trains: the methods
    whose results are needed; the reward model and the supervised model are added if options ask for
    them. make_task, make_points: (runs, options) -> Task and list[Point], where runs are method ->
    Run and always include "dpo", trained or not.

    Raises BudgetExhausted or ChatError, after reporting what was judged until then.
    """
    if options.judge is None or "best_of_n" in options.methods:
        trains = ("rm", *trains)
    if not trains and set(options.answering) != {"base"}:
        trains = ("sft",)
    if options.seeds > 1 and not set(trains) - set(SHARED):
        raise ValueError(
            "--seeds would do nothing without a method that is trained on preferences."
        )
    runs_by_seed = _runs_by_seed(make_config, workdir, trains, options.seeds)
    runs = runs_by_seed[0]
    trained_runs = _trained_runs(runs_by_seed, trains)

    folder = pathlib.Path(workdir) / "winrate" / name
    sampled_in = folder / "samples"
    calls_in = folder / judge_name(options.judge)
    judged_in = calls_in.with_name(calls_in.name + _variant(options))
    contest = _contest(runs_by_seed, options, make_points)
    left = Left(trained_runs, contest, options, sampled_in)
    if options.dry_run:
        say(plan(left, options, calls_in))
        return []

    processes.check_shared(workdir)
    # Before training, as the data may have too few prompts and the key may be missing.
    task = unseen.task(make_task, runs, options)
    if options.judge and left.any() and jax.process_index() == 0:
        chat_api.api_key()
    for run in trained_runs.values():
        run_stages(run.config, workdir)
    contest = _contest(runs_by_seed, options, make_points)  # training has left checkpoints
    sampling = make_config("best_of_n").sampling
    samples = sample_all(task, contest.sampled, sampled_in, runs, sampling)
    judge = _make_judge(options.judge, task, runs, calls_in)
    rows, stopped = judge_all(task, contest, samples, judge, judged_in)
    about = dict(
        task=name,
        against=options.opponent,
        prompts=len(task.examples),
        warning=winrate_report.of_optimised_judge(
            options.judge, {point.method for point in contest.sampled}
        ),
    )
    winrate_report.write(about, rows, judged_in, complete=not stopped)
    if stopped:
        raise stopped
    return rows


@dataclasses.dataclass(frozen=True)
class Contest:
    """What is judged: the answers of points, each beside an opponent's."""

    points: list[Point]
    opponent: Point | None  # None: the data's own responses
    opponent_name: str
    show: int  # prompts on a page of examples

    @property
    def sampled(self) -> list[Point]:
        """All points whose answers are needed."""
        return [*self.points, *([self.opponent] if self.opponent else [])]


def _contest(runs_by_seed: list[dict], options: Options, make_points: Callable) -> Contest:
    """Return what is to be judged, as far as training has come."""
    found = {}
    for seed, runs in enumerate(runs_by_seed):
        for point in make_points(runs, options):
            # At temperature 0 all draws would be the same.
            for draw in range(options.draws if point.temperature else 1):
                drawn = dataclasses.replace(point, seed=seed, draw=draw)
                # Policies that another seed does not train again count once.
                found.setdefault((drawn.method, drawn.name, drawn.step), drawn)
    points = list(found.values())
    opponent = None
    if options.against is not None:
        method, temperature = options.against
        alone = dataclasses.replace(
            options, methods=(method,), temperatures=(temperature,), against=None
        )
        (opponent,) = make_points(runs_by_seed[0], alone)
        # Beside itself it would tie everywhere.
        points = [point for point in points if point.answers != opponent.answers]
        if not points:
            raise ValueError(f"--against={method}:{temperature:g}: no other answers are judged.")
    return Contest(points, opponent, options.opponent, options.show)


def _variant(options: Options) -> str:
    """Return what tells the folder of these results from others of the same judge."""
    against = ""
    if options.against is not None:
        method, temperature = options.against
        against = f"-against_{method}_{temperature:g}"
    both = options.judge is not None and options.judge.orders == 2
    return against + ("-both_orders" if both else "")


def _runs_by_seed(
    make_config: Callable, workdir: str, trains: tuple[str, ...], seeds: int
) -> list[dict]:
    """Return method -> Run for each seed of training, "dpo" included; methods may share a run."""
    configs_by_method = {method: config_of(make_config, method) for method in ("dpo", *trains)}
    for config in configs_by_method.values():
        if config.stages:
            _check(config)
    mesh = sharding.make_mesh(**configs_by_method["dpo"].mesh)
    place = pathlib.Path(workdir)
    first = {method: Run(config, place, mesh) for method, config in configs_by_method.items()}
    found = [first]
    for seed in range(1, seeds):
        runs = dict(first)
        for method in trains:
            if method not in SHARED:
                runs[method] = Run(of_seed(make_config(method), seed), place, mesh)
        found.append(runs)
    return found


def of_seed(config, seed: int):
    """Return a method's config with another seed of its own stage, which gets its own folder.

    The stages before it are shared.
    """
    stage = config.stages[-1]
    config[stage].seed += seed
    config.run = f"{stage}_seed{seed}"
    return config


def _trained_runs(runs_by_seed: list[dict], trains: tuple[str, ...]) -> dict:
    """Return a name for people -> Run, for all that are trained, in order."""
    found = {}
    for seed, runs in enumerate(runs_by_seed):
        for method in trains:
            # A config without the stage sft leaves nothing to train for "sft".
            if not runs[method].config.stages or (seed and method in SHARED):
                continue
            found[f"{method}, seed {seed}" if seed else method] = runs[method]
    return found


def _check(config) -> None:
    """Raise ValueError if a config has mistakes, or a name for its run."""
    config_checks.validate(config)
    if config.run:
        raise ValueError(
            f"--config.run={config.run}: it would rename a folder of every method, but the "
            "methods share their first stages. Give another --workdir instead."
        )


def config_of(make_config: Callable, method: str):
    """Return the config of a method, or of the stages that end with "rm" or "sft".

    "rm" is best_of_n's config without its last stage, which samples at one temperature only; "sft"
    is dpo's without the stage dpo, which may leave none.
    """
    if method == "rm":
        config = make_config("best_of_n")
        config.stages = config.stages[:-1]
    elif method == "sft":
        config = make_config("dpo")
        config.stages = config.stages[:-1]
    else:
        config = make_config(method)
    return config


def trained(run: Run, stage: str) -> Policy:
    """Return the policy that a training stage results in."""

    def open_result():
        folder = run.folder(stage) / "hf"
        return loading.open_checkpoint(str(folder), dtype=run.config.model.dtype)

    return Policy(run.folder(stage).name, configs.dependencies(run.config, stage), open_result)


def start(run: Run, stage: str, name: str, shots: Callable[[], str] = str) -> Policy:
    """Return the policy that a training stage starts from."""
    model = run.config.model
    if "sft" in run.config.stages and stage != "sft":
        made_by = configs.dependencies(run.config, "sft")
    else:
        made_by = dict(
            path=model.path,
            scratch=model.scratch.to_dict(),
            dtype=model.dtype,
            seed=run.config.seed,
        )
    return Policy(name, made_by, functools.partial(run.initial, stage), shots)


def at_checkpoints(run: Run, stage: str) -> dict[int, Policy]:
    """Return step -> policy for the checkpoints that training has kept.

    Checkpoints that only an interruption left are not among them.
    """
    name = run.folder(stage).name
    folder = run.folder(stage) / "checkpoints"
    steps = checkpoint.saved_steps(folder)
    if not steps:
        return {}
    written = read_config(run.folder(stage))
    save_every = written["config"][stage]["save_every"]
    made_by = configs.dependencies(run.config, stage)

    def open_at(step):
        initial = run.initial(stage)

        def load_params(mesh, dtype="float32"):
            placed = sharding.param_shardings(mesh, initial.shapes)
            params = checkpoint.load_params(folder, step, initial.shapes, placed)
            return transformer.held(params, dtype)

        return dataclasses.replace(initial, load_params=load_params)

    policies = {}
    for step in steps:
        if step % save_every == 0 or step == steps[-1]:
            opened = functools.partial(open_at, step)
            policies[step] = Policy(f"{name}_at_{step}", made_by | dict(checkpoint=step), opened)
    return policies


def date_of(run: Run) -> datetime.date:
    """Return the day that chat templates take for today: that of the run's first stage, if begun.

    So prompts stay the same when a command goes on on another day.
    """
    for stage in run.config.stages:
        if (run.folder(stage) / "config.json").exists():
            return start_date(run.folder(stage))
    return run.date


def best_of_n(policy: Policy, temperature: float, counts: tuple[int, ...]) -> list[Point]:
    """Return a point for each N; they share their completions."""
    # At temperature 0 all completions of a prompt are the same, so one will do.
    samples = max(counts) if temperature else 1
    return [Point("best_of_n", policy, temperature, n, samples) for n in counts]


def test_examples(data) -> list[TextExample]:
    """Return the examples to test on; where too few are held out, those of validation too."""
    texts, _ = splits.read(data, "sft", wanted=("eval", "test"))
    return texts["test"] or texts["eval"]


def held_out(
    examples: list[TextExample], count: int, keep: Callable = lambda example: True
) -> list[TextExample]:
    """Return `count` of the examples to keep, with different prompts, ordered by the prompts' hash.

    The order is random but always the same, so that more prompts include fewer.
    """
    found = {}
    for example in examples:
        if keep(example):
            is_text = isinstance(example.prompt, str)
            found[example.prompt if is_text else json.dumps(example.prompt)] = example
    if len(found) < count:
        raise ValueError(
            f"--prompts={count}, but the data has only {len(found)} suitable held-out prompts. "
            "Lower it."
        )
    prompts = sorted(found, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    return [found[prompt] for prompt in prompts[:count]]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A policy that is open, with the task's prompts in its tokens."""

    checkpoint: loading.Checkpoint
    prompts: Prompts
    load_params: Callable  # mesh -> params, read from disk once


def sample_all(
    task: Task, points: list[Point], folder: pathlib.Path, runs: dict, sampling
) -> dict[str, list[dict]]:
    """Return Point.folder -> a row for each prompt, as rollouts.complete makes them.

    The weights of a policy are read at most once.
    """
    policies = {point.policy.name: point.policy for point in points}
    samples = {}
    for policy in policies.values():
        opened = _open(policy, task)
        for point in points:
            if point.policy.name == policy.name and point.folder not in samples:
                samples[point.folder] = _sample(
                    point, opened, runs, sampling, folder / point.folder
                )
    return samples


def _open(policy: Policy, task: Task) -> Opened:
    """Open a policy and encode the prompts, cut as in training, after the policy's shots."""
    opened = policy.open()
    tokenizer = opened.tokenizer
    truncate = dataset.truncation(task.data)
    ids = encode_example_prompts(task.examples, tokenizer, task.data, truncate, date=task.date)
    prompts = Examples()
    for prompt, example in zip(ids, task.examples, strict=True):
        prompts.append(prompt, (), example.where)
    dataset.check_cue(task.data, prompts, tokenizer)
    shots = policy.shots()
    if shots:
        shot_ids = tokenizer(shots, add_special_tokens=False).input_ids
        for number, prompt in enumerate(ids):
            # A BOS stays in front of all.
            place = 1 if prompt[0] == tokenizer.bos_token_id else 0
            ids[number] = np.insert(prompt, place, shot_ids)
    answered = Prompts(ids, tokenizer.batch_decode(ids, skip_special_tokens=True))

    def tokens():
        return {f"the prompts of {policy.name}": f"tokens of sha256 {answered.fingerprint[:16]}"}

    agreement.check_same(tokens, agreement.SAME_ROWS)
    return Opened(opened, answered, functools.cache(opened.load_params))


def _sample(point: Point, opened: Opened, runs: dict, sampling, folder) -> list[dict]:
    """Sample a point's completions, or what a killed run left of them; return a row per prompt.

    Where the best of several will be taken, the reward model gives them their rewards.
    """
    run = runs["dpo"]
    prompts, ranked = opened.prompts, point.samples > 1
    seed = run.config.seed + point.draw
    settings = point.policy.made_by | dict(
        temperature=point.temperature,
        samples=point.samples,
        max_new_tokens=sampling.max_new_tokens,
        seed=seed,
    )
    if ranked:
        reward_model = configs.dependencies(runs["rm"].config, "rm")
        settings |= {f"reward model's {name}": value for name, value in reward_model.items()}
    with lock_folder(folder):
        # Through JSON, so that they compare equal to what is read from the file.
        _claim(folder / "settings.json", json.loads(json.dumps(settings)))
        reward, params = _no_reward, None
        if lines_in(folder / COMPLETIONS) < len(prompts):
            params = opened.load_params(run.mesh)
            if ranked:
                reward = runs["rm"].reward("rm")
        append_eos = run.config.data.append_eos
        model = opened.checkpoint.model(params, run.mesh, append_eos=append_eos)
        settings = Sampling(
            sampling.max_new_tokens,
            point.temperature,
            n=point.samples,
            seed=seed,
            batch_size=sampling.batch_size,
        )
        return rollouts.complete(model, prompts, reward, settings, folder)


def _no_reward(prompts, _completions, _tokens, _conversations=None) -> np.ndarray:
    """Return a reward of 0 for each completion, where there is only one to choose from."""
    return np.zeros(len(prompts))


def _claim(path: pathlib.Path, settings: dict) -> None:
    """Write the settings of completions; raise StageChanged if they were made with others.

    Raises ValueError where they are damaged.
    """
    if path.exists():
        remedy = f"Put it back from a copy, or remove {path.parent} to sample again."
        changed = differences(read_record(path, remedy), settings)
        if changed:
            raise StageChanged(
                f"{path.parent} holds completions made with other settings:\n{changed}\n"
                "Use the old values, or remove the folder to sample again."
            )
    write_record(path, settings)


def judge_name(judge: judges.Judge | None) -> str:
    """Return the name of the folder that keeps a judge's answers, in one order or both."""
    if judge is None:
        return "reward_model"
    template = pathlib.Path(judge.template).stem
    warm = f"-{judge.temperature:g}" if judge.temperature else ""
    return re.sub(r"[^\w.-]", "_", f"{judge.model}-{template}{warm}")


def _make_judge(
    judge: judges.Judge | None, task: Task, runs: dict, calls: pathlib.Path
) -> Callable[[list[Comparison], pathlib.Path], dict]:
    """Return (comparisons, file) -> result: who judged, verdicts, win rate, and votes.

    The result is also written to the file, without the votes. calls: the folder that keeps the
    judge's answers.
    """

    def by_chat(comparisons, path):
        shown = []
        for comparison in comparisons:
            prompt = task.shown(comparison.prompt)
            shown.append(dataclasses.replace(comparison, prompt=prompt))

        def ask():
            votes = judges.vote(judge, shown, calls, say)
            verdicts = [judges.combined(of_prompt) for of_prompt in votes]
            result = judges.write_verdicts(path, judge, verdicts, calls)
            return result | dict(votes=winrate_report.as_records(votes))

        return processes.from_first(ask)

    @functools.cache
    def reward():
        run = runs["rm"]
        folder = run.folder("rm") / "hf"
        size = run.config.reward.batch_size
        return reward_model.of_examples(str(folder), size, run.mesh, task.data, task.date)

    def reward_of_answers(_prompts, answers, _tokens):
        # The examples' own prompts, which may be messages with tools. All of our answers come
        # first, then all others.
        texts = []
        for example, answer in zip(task.examples * 2, answers, strict=True):
            is_chat = isinstance(example.prompt, list)
            response = as_messages("assistant", answer) if is_chat else answer
            texts.append(dataclasses.replace(example, responses=(response,)))
        return reward()(texts)

    def by_reward(comparisons, path):
        verdicts = judges.compare_by_reward(reward_of_answers, comparisons)
        result = dict(judge="reward model", **winrate_stats.win_rate(verdicts), verdicts=verdicts)
        write_json(path, result)
        votes = [(judges.Vote("", verdict),) for verdict in verdicts]
        return result | dict(votes=winrate_report.as_records(votes))

    return by_chat if judge else by_reward


def judge_all(
    task: Task, contest: Contest, samples: dict, judge: Callable, folder: pathlib.Path
) -> tuple[list[dict], Exception | None]:
    """Return a row for each point, and the error that ended the judging early, or None.

    A row has the point, its win rate, verdicts and votes, and what else was measured of its
    answers. The error is that of a spent budget or a failing endpoint. Writes each point's page of
    examples.
    """
    (folder / "verdicts").mkdir(parents=True, exist_ok=True)
    references = [reply(example.responses[0]) for example in task.examples]
    others = references
    if contest.opponent is not None:
        others = _spaced(task, _answers(task, contest.opponent, samples[contest.opponent.folder]))
    rows = []
    points = contest.points
    for number, point in enumerate(points, 1):
        answers = _answers(task, point, samples[point.folder])
        comparisons = []
        pairs = zip(task.examples, _spaced(task, answers), others, strict=True)
        for example, answer, other in pairs:
            comparisons.append(Comparison(transcript(example.prompt), answer, other))
        try:
            result = judge(comparisons, folder / "verdicts" / f"{point.name}.json")
        except (judges.BudgetExhausted, judges.ChatError) as error:
            say(f"stopped after {number - 1} of {len(points)} win rates")
            return rows, error
        say(f"{number}/{len(points)} {point.name}: {winrate_report.cell(result)}")
        row = dict(
            method=point.method,
            temperature=point.temperature,
            best_of=point.n,
            step=point.step,
            seed=point.seed,
            draw=point.draw,
            **{name: result.pop(name) for name in winrate_report.RATES},
            verdicts=result.pop("verdicts"),
            votes=result.pop("votes"),
            judged=result,  # what is left says who judged
            words=float(np.mean([len(answer.split()) for answer in answers])),
        )
        shown = [task.shown(comparison.prompt).strip() for comparison in comparisons]
        subsets = [example.subset for example in task.examples]
        row["compared"] = winrate_report.compared(shown, answers, others, subsets)
        if contest.show:
            page = folder / "examples" / f"{point.name}.md"
            name = winrate_report.full_name(row)
            winrate_report.write_examples(page, name, contest.opponent_name, row, contest.show)
        if task.rouge:
            row |= winrate_report.rouge(answers, references)
        rows.append(row)
    return rows, None


def _spaced(task: Task, answers: list[str]) -> list[str]:
    """Return answers as they follow prompts in text, after the space that Task.read strips."""
    spaced = []
    for example, answer in zip(task.examples, answers, strict=True):
        spaced.append(f" {answer}" if isinstance(example.prompt, str) else answer)
    return spaced


def _answers(task: Task, point: Point, samples: list[dict]) -> list[str]:
    """Return a point's answers: of the first n completions, the one with the highest reward."""
    answers = []
    for sampled in samples:
        best = max(sampled["completions"][: point.n], key=lambda one: one["reward"])
        answers.append(task.read(best["text"]))
    return answers


class Left:
    """What is left to do before the judge is asked.

    stages: name of a run -> stages to train. completions: folder -> how many to sample.
    """

    def __init__(self, runs: dict, contest: Contest, options: Options, sampled: pathlib.Path):
        self.points = contest.points
        self.stages = {}
        for method, run in runs.items():
            unfinished = []
            for stage in run.config.stages:
                if not (run.folder(stage) / "done.json").exists():
                    unfinished.append(stage)
            self.stages[method] = unfinished
        self.completions = {}
        for point in contest.sampled:
            missing = options.prompts - lines_in(sampled / point.folder / COMPLETIONS)
            self.completions[point.folder] = max(missing, 0) * point.samples

    def any(self) -> bool:
        """Return whether there is anything to train or to sample."""
        return any(self.stages.values()) or any(self.completions.values())


def plan(left: Left, options: Options, calls: pathlib.Path) -> str:
    """Return what is left to do as text, with the number of the judge's calls."""
    lines = []
    for method, names in left.stages.items():
        todo = f"stages {', '.join(names)}" if names else "done"
        lines.append(f"{'train ' + method:<32}{todo}")
    for folder, count in left.completions.items():
        todo = f"{count:,} completions" if count else "done"
        lines.append(f"{'sample ' + folder:<32}{todo}")
    if "training" in options.methods and not any(point.step for point in left.points):
        lines.append("over training: not counted, as there are no checkpoints yet")
    if options.judge:
        title = f"judge {len(left.points)} win rates"
        different = {point.answers for point in left.points}
        questions = len(different) * options.prompts * options.judge.orders
        kept = lines_in(calls / judges.JUDGEMENTS)
        lines.append(
            f"{title:<32}{questions:,} questions, up to {judges.ATTEMPTS} calls each; "
            f"{kept:,} calls are kept"
        )
    return "\n".join(lines)


def lines_in(path: pathlib.Path) -> int:
    """Return how many whole lines a file has; another process may be writing the next."""
    if not path.exists():
        return 0
    return path.read_bytes().count(b"\n")


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What an experiment judges where no flag says otherwise."""

    methods: tuple[str, ...]
    temperatures: tuple[float, ...]
    template: str
    training_temperatures: tuple[float, ...] | None = None  # as Options has it


def _numbers(flag, kind: type) -> tuple:
    """Return the value of a flag that lists numbers; ValueError for what is none."""
    try:
        return tuple(map(kind, flag.value))
    except ValueError:
        given = ",".join(flag.value)
        raise ValueError(f"--{flag.name}={given}: expected numbers, separated by commas.") from None


def opponents(methods: tuple[str, ...]) -> list[str]:
    """Return the methods that --against may name."""
    return [method for method in methods if method not in NO_OPPONENTS]


def _example(methods: tuple[str, ...]) -> str:
    """Return a value of --against, of the second method: the first is what most are after."""
    return f"{opponents(methods)[1]}:0"


def opponent_of(text: str, methods: tuple[str, ...]) -> tuple[str, float]:
    """Return the method and the temperature that --against names; ValueError for no such."""
    method, _, temperature = text.partition(":")
    try:
        number = float(temperature)
    except ValueError:
        number = -1.0
    if method not in opponents(methods) or not 0 <= number < math.inf:
        raise ValueError(
            f"--against={text}: expected METHOD:TEMPERATURE, such as {_example(methods)}; the "
            f"methods are {', '.join(opponents(methods))}."
        )
    return method, number


def main(
    description: str,
    default_config: str,
    methods: tuple[str, ...],
    defaults: Callable[[], Defaults],
    run: Callable,
) -> None:
    """Run the command of an experiment.

    methods: those that --method may name. defaults: called once the flags are parsed. run:
    (make_config, workdir, options) -> None.
    """
    from absl import flags

    config = command_line.define_config(default_config)
    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs and the results.")
    method = flags.DEFINE_multi_enum(
        "method", None, methods, "A method to judge; may be repeated. Default: the paper's."
    )
    temperatures = flags.DEFINE_list(
        "temperatures", None, "Sampling temperatures of the policies. Default: the paper's."
    )
    counts = flags.DEFINE_list("best_of", list(map(str, Options.counts)), "The N of best of N.")
    against = flags.DEFINE_string(
        "against",
        None,
        f"METHOD:TEMPERATURE whose answers to compare with, such as {_example(methods)}; METHOD is "
        f"one of {', '.join(opponents(methods))}. Default: the data's own responses.",
    )
    seeds = flags.DEFINE_integer(
        "seeds",
        Options.seeds,
        "How often each method is trained, with seeds 0, 1, ... of its stage.",
        lower_bound=1,
        upper_bound=100,
    )
    draws = flags.DEFINE_integer(
        "draws",
        Options.draws,
        "How often each prompt is answered at a temperature above 0.",
        lower_bound=1,
        upper_bound=1000,
    )
    show = flags.DEFINE_integer(
        "show", Options.show, "Prompts on each page of examples; 0: no pages.", lower_bound=0
    )
    prompts = flags.DEFINE_integer(
        "prompts", Options.prompts, "How many held-out prompts to answer.", lower_bound=1
    )
    judge = flags.DEFINE_enum(
        "judge", "chat", ["chat", "reward"], "The judge: a chat model, or the run's reward model."
    )
    judge_model = flags.DEFINE_string("judge_model", None, "The chat model's name at its endpoint.")
    template = flags.DEFINE_string(
        "template", None, f"The judge's prompt: a file, or one of {', '.join(judges.TEMPLATES)}."
    )
    dry_run = flags.DEFINE_bool("dry_run", False, "Only list what would be done, and its cost.")
    flags.mark_flags_as_required(["workdir"])
    known = set(flags.FLAGS)
    make_judge = judges.define_flags()
    judge_flags = ["judge_model", "template", *sorted(set(flags.FLAGS) - known)]

    def judge_asked_for(default_template: str) -> judges.Judge | None:
        if judge.value == "reward":
            commands.refuse_flags("with --judge=reward", *judge_flags)
            return None
        if not (judge_model.value or dry_run.value):
            raise ValueError(
                "--judge_model is missing: give the name of a chat model behind OPENAI_BASE_URL "
                "(the paper's was gpt-4-0314), or use --judge=reward."
            )
        return make_judge(
            model=judge_model.value or "JUDGE", template=template.value or default_template
        )

    def start():
        default = defaults()
        chosen = dict(
            temperatures=default.temperatures, training_temperatures=default.training_temperatures
        )
        if temperatures.present:
            chosen = dict(temperatures=_numbers(temperatures, float))
        options = Options(
            methods=tuple(method.value or default.methods),
            judge=judge_asked_for(default.template),
            **chosen,
            counts=_numbers(counts, int),
            prompts=prompts.value,
            dry_run=dry_run.value,
            against=opponent_of(against.value, methods) if against.value else None,
            seeds=seeds.value,
            draws=draws.value,
            show=show.value,
        )
        if not any((*options.temperatures, *(options.training_temperatures or ()))):
            commands.refuse_flags("at temperature 0, where all answers are the same", "draws")
        if "best_of_n" not in options.methods:
            commands.refuse_flags("without --method=best_of_n", "best_of")
        make_config = commands.config_maker(config.choice, config.overrides)
        with commands.in_workdir(workdir.value, dry_run=dry_run.value) as folder:
            run(make_config, folder, options)

    device_command.run(start, description, config=config)
