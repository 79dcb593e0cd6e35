"""Judged win rates against the responses of a data set: what tldr_winrate and hh_winrate share.

    WORKDIR/winrate/TASK/samples/POLICY-TEMPERATURE-N/  settings.json  completions.jsonl
    WORKDIR/winrate/TASK/JUDGE/  judgements.jsonl  verdicts/  winrate.json  winrate.md
    winrate.png WORKDIR/winrate/TASK/JUDGE-both_orders/  the same of --orders=2, but for
    judgements.jsonl, which both share

Each policy answers the same prompts, and a judge compares each answer with the data's own. What was
trained, sampled or judged is kept: the same command goes on where it was stopped, and asks nothing
twice.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax import command_line, config_checks
from dpo_jax import config as configs
from dpo_jax.console import say
from dpo_jax.data import dataset
from dpo_jax.data.tokenizer import Examples, encode_example_prompts
from dpo_jax.evaluation import chat_api, winrate_stats
from dpo_jax.evaluation import judge as judges
from dpo_jax.evaluation.judge import Comparison
from dpo_jax.models import loading
from dpo_jax.parallel import processes, sharding
from dpo_jax.pipeline.run import Run
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.rewards import make
from dpo_jax.sampling import rollouts
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.training import checkpoint
from dpo_jax.workdir import COMPLETIONS, StageChanged, differences, lock_folder, write_json
from experiments import commands, winrate_report


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model whose answers are judged."""

    name: str  # of the folders of its completions
    made_by: dict  # all that its weights depend on: completions of other weights are refused
    open: Callable  # () -> loading.Checkpoint
    shots: Callable[[], str] = str  # the text before each prompt, none


@dataclasses.dataclass(frozen=True)
class Point:
    """A win rate to find: of a policy's answers at a temperature, each the best of n by the reward
    model.
    """

    method: str
    policy: Policy
    temperature: float
    n: int = 1
    samples: int = 1  # completions of each prompt; the best is taken of the first n
    step: int | None = None  # of training, where that is what varies

    @property
    def folder(self) -> str:
        """Where its completions are, which it may share with others."""
        return f"{self.policy.name}-{self.temperature:g}-{self.samples}"

    @property
    def name(self) -> str:
        best = f"-best_of_{self.n}" if self.method == "best_of_n" else ""
        return f"{self.policy.name}-{self.temperature:g}{best}"

    @property
    def answers(self) -> tuple:
        """What decides its answers: points that share it share them."""
        return self.policy.name, self.temperature, self.n if self.samples > 1 else 1


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked, and how prompts and completions are read."""

    rows: list  # sources.TextExample: a prompt, and the response that answers are compared with
    data: object  # a config's data block, by which prompts are tokenised
    shown: Callable[[str], str]  # a prompt as the judge reads it
    read: Callable[[str], str]  # a completion as the judge reads it
    rouge: bool = False  # measured beside


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    methods: tuple[str, ...]
    temperatures: tuple[float, ...]
    judge: judges.Judge | None  # None: the run's reward model
    counts: tuple[int, ...] = (1, 4, 16, 64, 128)  # the N of best of N
    prompts: int = 256
    dry_run: bool = False

    def __post_init__(self):
        if min(self.counts, default=0) < 1 or len(set(self.counts)) < len(self.counts):
            raise ValueError(
                f"--best_of={','.join(map(str, self.counts))}: expected numbers of 1 or more, each once."
            )
        if not self.temperatures or not all(
            0 <= temperature < math.inf for temperature in self.temperatures
        ):
            raise ValueError(
                f"--temperatures={','.join(map(str, self.temperatures))}: expected numbers of 0 or more."
            )


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
    """Trains, samples and judges what is not there yet, and reports; with dry_run, says what it
    would do.

    make_config: method -> config. trains: the methods whose results are needed; the reward model
    and the supervised model besides, where options ask for them. Runs have that of "dpo" always, by
    which the rest goes, trained or not. make_task, make_points: (runs, options) -> Task,
    list[Point], of method -> Run. Returns a row for each point; raises BudgetExhausted or ChatError
    after the report of what was judged until then.
    """
    if options.judge is None or "best_of_n" in options.methods:
        trains = ("rm", *trains)
    if not trains and set(options.methods) != {"base"}:
        trains = ("sft",)
    found = {method: config_of(make_config, method) for method in ("dpo", *trains)}
    trains = [method for method in trains if found[method].stages]
    for config in [found["dpo"], *(found[method] for method in trains)]:
        config_checks.validate(config)
        if config.run:
            raise ValueError(
                f"--config.run={config.run}: it would rename a folder of every method, which share the "
                "stages before: give another --workdir instead."
            )
    mesh = sharding.make_mesh(**found["dpo"].mesh)
    runs = {method: Run(config, pathlib.Path(workdir), mesh) for method, config in found.items()}
    folder = pathlib.Path(workdir) / "winrate" / name
    calls_in = folder / judge_name(options.judge)
    both = options.judge is not None and options.judge.orders == 2
    judged_in = calls_in.with_name(calls_in.name + "-both_orders" * both)
    left = Left(
        {method: runs[method] for method in trains},
        make_points(runs, options),
        options,
        folder / "samples",
    )
    if options.dry_run:
        say(plan(left, options, calls_in))
        return []
    processes.check_shared(workdir)
    task = make_task(runs, options)  # before training, as it may find too few prompts
    if options.judge and left.any() and jax.process_index() == 0:
        chat_api.api_key()  # asked for before training, as it may be missing
    for method in trains:
        run_stages(found[method], workdir)
    points = make_points(runs, options)
    samples = sample_all(task, points, folder / "samples", runs, make_config("best_of_n").sampling)
    rows, stopped = judge_all(
        task, points, samples, _judge(options.judge, task, runs, calls_in), judged_in
    )
    winrate_report.write(name, len(task.rows), rows, judged_in, complete=not stopped)
    if stopped:
        raise stopped
    return rows


def config_of(make_config: Callable, method: str):
    """The config of a method; of "rm", best_of_n's without its last stage, which samples at one
    temperature only; of "sft", the stage sft alone, if any.
    """
    config = make_config({"rm": "best_of_n", "sft": "dpo"}.get(method, method))
    if method in ("rm", "sft"):
        config.stages = config.stages[:-1]
    return config


def trained(run: Run, stage: str) -> Policy:
    """The result of a training stage."""
    return Policy(
        stage,
        configs.dependencies(run.config, stage),
        lambda: loading.open_checkpoint(
            str(run.folder(stage) / "hf"), dtype=run.config.model.dtype
        ),
    )


def start(run: Run, stage: str, name: str, shots: Callable[[], str] = str) -> Policy:
    """What a training stage starts from."""
    model = run.config.model
    after_sft = "sft" in run.config.stages and stage != "sft"
    made_by = (
        configs.dependencies(run.config, "sft")
        if after_sft
        else dict(
            path=model.path,
            scratch=model.scratch.to_dict(),
            dtype=model.dtype,
            seed=run.config.seed,
        )
    )
    return Policy(name, made_by, lambda: run.initial(stage), shots)


def at_checkpoints(run: Run, stage: str) -> dict[int, Policy]:
    """The policy at each checkpoint that training has kept, by step; without those that an
    interruption left.
    """
    folder = run.folder(stage) / "checkpoints"
    if not (steps := checkpoint.saved_steps(folder)):
        return {}
    every = json.loads((run.folder(stage) / "config.json").read_text())["config"][stage][
        "save_every"
    ]

    def opened(step):
        initial = run.initial(stage)

        def load_params(mesh):
            placed = sharding.param_shardings(mesh, initial.shapes)
            return checkpoint.load_params(folder, step, initial.shapes, placed)

        return dataclasses.replace(initial, load_params=load_params)

    made_by = configs.dependencies(run.config, stage)
    return {
        step: Policy(
            f"{stage}_at_{step}", made_by | dict(checkpoint=step), functools.partial(opened, step)
        )
        for step in steps
        if step % every == 0 or step == steps[-1]
    }


def best_of_n(policy: Policy, temperature: float, counts: tuple[int, ...]) -> list[Point]:
    """A point for each N; without randomness all completions are one."""
    return [
        Point("best_of_n", policy, temperature, n, max(counts) if temperature else 1)
        for n in counts
    ]


def held_out(rows: list, count: int, keep: Callable = lambda row: True) -> list:
    """`count` of the rows to keep, each with a prompt of its own, in the order of the prompts'
    hashes.
    """
    found = {row.prompt: row for row in rows if keep(row)}
    if len(found) < count:
        raise ValueError(
            f"--prompts={count}, but the data has {len(found)} held-out prompts that will do: lower it."
        )
    return [
        found[prompt]
        for prompt in sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())[:count]
    ]


def sample_all(
    task: Task, points: list[Point], folder: pathlib.Path, runs: dict, sampling
) -> dict[str, list[dict]]:
    """Point.folder -> a row for each prompt, as rollouts.complete makes them. A policy is loaded
    once, if at all.
    """
    found = {}
    for policy in {point.policy.name: point.policy for point in points}.values():
        opened = policy.open()
        prompts = _encode(task, policy, opened.tokenizer)
        load = functools.cache(opened.load_params)
        for point in points:
            if point.policy.name == policy.name and point.folder not in found:
                found[point.folder] = _sample(
                    point, folder / point.folder, runs, sampling, opened, prompts, load
                )
    return found


def _encode(task: Task, policy: Policy, tokenizer) -> Prompts:
    """The prompts as tokens, cut as in training, then behind the policy's shots."""
    ids = encode_example_prompts(
        task.rows, tokenizer, task.data, dataset.truncation(task.data, task.rows)
    )
    dataset.check_cue(task.data, Examples(ids, [], [row.where for row in task.rows]), tokenizer)
    if shots := policy.shots():
        shown = tokenizer(shots, add_special_tokens=False).input_ids
        ids = [np.insert(prompt, int(prompt[0] == tokenizer.bos_token_id), shown) for prompt in ids]
    return Prompts(ids, tokenizer.batch_decode(ids, skip_special_tokens=True))


def _sample(point: Point, folder, runs, sampling, opened, prompts, load) -> list[dict]:
    """The completions of a point, from where a killed run goes on; scored where the best is to be
    taken.
    """
    run = runs["dpo"]
    settings = point.policy.made_by | dict(
        temperature=point.temperature,
        samples=point.samples,
        max_new_tokens=sampling.max_new_tokens,
        seed=run.config.seed,
    )
    reward = _no_reward
    if point.samples > 1:
        ranker = configs.dependencies(runs["rm"].config, "rm")
        settings |= {f"reward model's {name}": value for name, value in ranker.items()}
    with lock_folder(folder):
        _claim(folder / "settings.json", json.loads(json.dumps(settings)))
        missing = _lines(folder / COMPLETIONS) < len(prompts)
        if missing and point.samples > 1:
            reward = runs["rm"].reward("rm")
        params = load(run.mesh) if missing else None
        model = opened.model(params, run.mesh, append_eos=run.config.data.append_eos)
        settings = Sampling(
            sampling.max_new_tokens,
            point.temperature,
            n=point.samples,
            seed=run.config.seed,
            batch_size=sampling.batch_size,
        )
        return rollouts.complete(model, prompts, reward, settings, folder)


def _no_reward(prompts, _completions, _tokens) -> np.ndarray:
    return np.zeros(len(prompts))


def _claim(path: pathlib.Path, settings: dict) -> None:
    """Writes the settings of completions; StageChanged where there are some that were made with
    others.
    """
    if path.exists() and (changed := differences(json.loads(path.read_text()), settings)):
        raise StageChanged(
            f"{path.parent} holds completions made with other settings:\n{changed}\n"
            "Take the old values, or remove the folder to lose it."
        )
    write_json(path, settings)


def judge_name(judge: judges.Judge | None) -> str:
    """The folder of a judge's calls, of either order: those of one are among those of both."""
    if judge is None:
        return "reward_model"
    warm = f"-{judge.temperature:g}" if judge.temperature else ""
    return re.sub(r"[^\w.-]", "_", f"{judge.model}-{pathlib.Path(judge.template).stem}{warm}")


def _judge(judge: judges.Judge | None, task: Task, runs: dict, calls: pathlib.Path) -> Callable:
    """(comparisons, file) -> who judged, verdicts and win rate, which are written to the file."""

    def by_chat(comparisons, path):
        shown = [dataclasses.replace(one, prompt=task.shown(one.prompt)) for one in comparisons]
        return processes.from_first(
            lambda: judges.write_verdicts(
                path, judge, judges.compare(judge, shown, calls, say), calls
            )
        )

    @functools.cache
    def reward():
        run = runs["rm"]
        return make.make_reward(
            "model", str(run.folder("rm") / "hf"), run.config.reward.batch_size, run.mesh
        )

    def by_reward(comparisons, path):
        verdicts = judges.compare_by_reward(reward(), comparisons)
        result = dict(judge="reward model", **winrate_stats.win_rate(verdicts), verdicts=verdicts)
        write_json(path, result)
        return result

    return by_chat if judge else by_reward


def judge_all(
    task: Task, points: list[Point], samples: dict, judge: Callable, folder: pathlib.Path
) -> tuple:
    """A row for each point: the point, what was judged, what else was measured; and the error that
    ended them early, a budget that is spent or an endpoint that fails, or None.
    """
    (folder / "verdicts").mkdir(parents=True, exist_ok=True)
    references, rows = [row.responses[0] for row in task.rows], []
    for number, point in enumerate(points, 1):
        answers = [
            task.read(
                max(row["completions"][: point.n], key=lambda completion: completion["reward"])[
                    "text"
                ]
            )
            for row in samples[point.folder]
        ]
        comparisons = [
            Comparison(row.prompt, " " + answer, reference)
            for row, answer, reference in zip(task.rows, answers, references, strict=True)
        ]
        try:
            result = judge(comparisons, folder / "verdicts" / f"{point.name}.json")
        except (judges.BudgetExhausted, judges.ChatError) as error:
            say(f"stopped after {number - 1} of {len(points)} win rates")
            return rows, error
        say(f"{number}/{len(points)} {point.name}: {winrate_report.cell(result)}")
        rows.append(
            dict(
                method=point.method,
                temperature=point.temperature,
                best_of=point.n,
                step=point.step,
                **{name: result.pop(name) for name in winrate_report.RATES},
                verdicts=result.pop("verdicts"),
                judged=result,
                words=float(np.mean([len(answer.split()) for answer in answers])),
                **(winrate_report.rouge(answers, references) if task.rouge else {}),
            )
        )
    return rows, None


class Left:
    """What there is to do before the judge is asked: stages by method, and completions by
    folder.
    """

    def __init__(self, runs: dict, points: list[Point], options: Options, sampled: pathlib.Path):
        self.points = points
        self.stages = {
            method: [
                stage
                for stage in run.config.stages
                if not (run.folder(stage) / "done.json").exists()
            ]
            for method, run in runs.items()
        }
        self.completions = {
            point.folder: max(options.prompts - _lines(sampled / point.folder / COMPLETIONS), 0)
            * point.samples
            for point in points
        }

    def any(self) -> bool:
        return any(self.stages.values()) or any(self.completions.values())


def plan(left: Left, options: Options, calls: pathlib.Path) -> str:
    """What there is to do, for a person."""
    lines = [
        f"{'train ' + method:<32}{'stages ' + ', '.join(names) if names else 'done'}"
        for method, names in left.stages.items()
    ]
    lines += [
        f"{'sample ' + folder:<32}{f'{count:,} completions' if count else 'done'}"
        for folder, count in left.completions.items()
    ]
    if "training" in options.methods and not any(point.step for point in left.points):
        lines.append("over training: not counted, as there are no checkpoints yet")
    if options.judge:
        questions = (
            len({point.answers for point in left.points}) * options.prompts * options.judge.orders
        )
        lines.append(
            f"{'judge ' + str(len(left.points)) + ' win rates':<32}{questions:,} questions, up to "
            f"{judges.ATTEMPTS} calls each; {_lines(calls / judges.JUDGEMENTS):,} calls are kept"
        )
    return "\n".join(lines)


def _lines(path: pathlib.Path) -> int:
    """How many whole lines a file has, which another process may be writing."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def refuse_flags(where: str, *names: str) -> None:
    """Raise ValueError if one of the flags is on the command line, though it would do nothing."""
    from absl import flags

    given = [f"--{name}" for name in names if flags.FLAGS[name].present]
    if given:
        raise ValueError(f"{', '.join(given)} would do nothing {where}.")


def main(
    description: str,
    default_config: str,
    methods: tuple[str, ...],
    defaults: Callable,
    run: Callable,
) -> None:
    """Run the command of an experiment.

    defaults: () -> methods, temperatures and template where the flags name none; run: (make_config,
    workdir, options).
    """
    from absl import flags

    config = command_line.define_config(default_config)
    workdir = flags.DEFINE_string("workdir", None, "Where the runs and the results are.")
    method = flags.DEFINE_multi_enum(
        "method", None, methods, "Which methods; may be repeated. Default: all."
    )
    temperatures = flags.DEFINE_list("temperatures", None, "Of the policies. Default: the paper's.")
    counts = flags.DEFINE_list("best_of", list(map(str, Options.counts)), "The N of best of N.")
    prompts = flags.DEFINE_integer(
        "prompts", Options.prompts, "How many held-out prompts.", lower_bound=1
    )
    judge = flags.DEFINE_enum(
        "judge", "chat", ["chat", "reward"], "A chat model, or the run's reward model."
    )
    judge_model = flags.DEFINE_string("judge_model", None, "The chat model's name at its endpoint.")
    template = flags.DEFINE_string(
        "template", None, f"A file, or one of {', '.join(judges.TEMPLATES)}."
    )
    dry_run = flags.DEFINE_bool("dry_run", False, "Only list what would be done, and its cost.")
    flags.mark_flags_as_required(["workdir"])
    known = set(flags.FLAGS)
    make_judge = judges.define_flags()
    judge_flags = ["judge_model", "template", *sorted(set(flags.FLAGS) - known)]

    def start():
        own_methods, own_temperatures, own_template = defaults()
        asked_methods = tuple(method.value or own_methods)
        if judge.value == "reward":
            refuse_flags("with --judge=reward", *judge_flags)
        if "best_of_n" not in asked_methods:
            refuse_flags("without --method=best_of_n", "best_of")
        if judge.value == "chat" and not (judge_model.value or dry_run.value):
            raise ValueError(
                "--judge_model: the name of a chat model behind OPENAI_BASE_URL; the paper's was "
                "gpt-4-0314. Or --judge=reward."
            )
        asked = (
            None
            if judge.value == "reward"
            else make_judge(
                model=judge_model.value or "JUDGE", template=template.value or own_template
            )
        )
        options = Options(
            asked_methods,
            tuple(map(float, temperatures.value or own_temperatures)),
            asked,
            tuple(map(int, counts.value)),
            prompts.value,
            dry_run.value,
        )
        make_config = commands.config_maker(config.choice, config.overrides)
        run(make_config, workdir.value, options)

    processes.run(start, description, config=config)
