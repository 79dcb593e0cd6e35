"""Measure what the order of the data does to learning: whole prompts or single pairs shuffled.

    python -m experiments.data_order --workdir=DIR --model=STORIES260K --hh=HH

Trains DPO on the same pairs, from the same model, in three orders: config.data.order "pairs"; the
same with another shuffle, which shows what chance alone does; and "prompts", which keeps all pairs
of a prompt together. Within a seed nothing else differs. Two parts:

    toy   configs/toy.py at four betas: exact reward and KL. 6 pairs of each sampled set.
    hh    --model on --hh. Nearly every prompt has one pair, so "prompts" is just another shuffle.

--part picks parts; runs that are done are not made again. Writes DIR/PART.jsonl, with a row per run
and evaluation, then DIR/data_order.json, which has mean, spread and paired differences of each
measure, and DIR/data_order.png. On one CPU core, toy takes about 12 minutes.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable

import numpy as np

from dpo_jax.evaluation import statistics
from experiments.commands import in_workdir, refuse_flags

PARTS = ("toy", "hh")
# Arm -> (config.data.order, what is added to the seed of the order).
ARMS = {"pairs": ("pairs", 0), "pairs, shuffled anew": ("pairs", 1000), "prompts": ("prompts", 0)}
CONTROL = "pairs, shuffled anew"
CONTROL_SEEDS = 3  # chance is measured with the first seeds alone
BASE = "pairs"  # the arm that the others are compared with
START = "start"  # stands for the arm in rows of the initial policy

TOY_BETAS = (2.0, 1.0, 0.5, 0.25)
TOY_KLS = (0.25, 1.0, 2.5, 5.0)  # at which rewards are compared
HH_HELD_OUT = 256


@dataclasses.dataclass(frozen=True)
class Task:
    """What the orders of one seed and beta are tried on."""

    part: str
    seed: int
    model: object  # dpo_jax.Model: the initial policy and the reference
    train: object  # Examples
    held_out: object
    settings: dict  # of Trainer
    batch_size: int
    steps: int
    evaluate_at: tuple[int, ...]
    measure: Callable | None = None  # trained model -> {name: value}


def run_task(task: Task, rows: list[dict], path: pathlib.Path) -> None:
    """Train in each order that has no rows yet; append its rows to `rows` and to the file."""
    import dpo_jax

    start = dict(part=task.part, seed=task.seed, arm=START, step=0)
    if task.measure and not any(start.items() <= row.items() for row in rows):
        add_rows([start | task.measure(task.model)], rows, path)
    for arm, (order, shift) in ARMS.items():
        if arm == CONTROL and (task.seed >= CONTROL_SEEDS or task.part == "hh"):
            continue
        about = dict(part=task.part, seed=task.seed, beta=task.settings["beta"], arm=arm)
        if any(about.items() <= row.items() and row["step"] == task.steps for row in rows):
            continue
        began = time.monotonic()
        trainer = dpo_jax.Trainer(task.model, "dpo", steps=task.steps, **task.settings)
        plan = dpo_jax.batches(
            task.train,
            batch_size=task.batch_size,
            steps=task.steps,
            seed=task.seed + shift,
            order=order,
        )
        losses = []
        found = []
        for batch in plan:
            losses.append(trainer.step(batch)["loss/train"])
            if trainer.steps_done not in task.evaluate_at:
                continue
            measured = trainer.evaluate(task.held_out, batch_size=task.batch_size)
            row = about | dict(
                step=trainer.steps_done,
                train_loss=float(np.mean(losses[-20:])),
                loss=measured["loss/eval"],
                accuracy=measured["rewards_eval/accuracies"],
            )
            if task.measure:
                row |= task.measure(trainer.model)
            found.append(row)
        add_rows(found, rows, path)
        shown = {name: round(value, 4) for name, value in found[-1].items() if name not in about}
        print(f"{about} {shown} {time.monotonic() - began:.0f} s", flush=True)


def add_rows(new: list[dict], rows: list[dict], path: pathlib.Path) -> None:
    """Append rows to those that are there, in memory and in the file."""
    rows += new
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in new)


def run_toy(folder: pathlib.Path, seed: int, rows: list[dict], path: pathlib.Path) -> None:
    """Run the toy's betas: its ordinary sft and pairs stages, then DPO in each order."""
    import dpo_jax
    from configs import toy as toy_config
    from dpo_jax.data import toy
    from dpo_jax.evaluation import exact
    from dpo_jax.evaluation.toy_report import exact_reference
    from dpo_jax.pipeline import preference_pairs

    config = toy_config.get_config()
    config.seed = seed
    config.stages = ("sft", "pairs")
    workdir = folder / f"toy-{seed}"
    dpo_jax.run(config, workdir)
    data = preference_pairs.load(workdir / "pairs", "pairs")
    model = dpo_jax.load(workdir / "sft" / "hf")
    loaded = model.checkpoint.model(model.params, model.mesh)
    reference_PC, rewards_PC = exact_reference(loaded, config.reward.kind)

    block = config.dpo
    for beta in TOY_BETAS:
        best_reward, best_kl = exact.optimum(reference_PC, rewards_PC, beta)

        def measure(trained, best_reward=best_reward, best_kl=best_kl):
            policy_PC = exact.enumerate_log_probs(trained.config, trained.params, toy.PROMPTS)
            reward, kl = exact.reward_and_kl(policy_PC, reference_PC, rewards_PC)
            bound = float(exact.bound(reference_PC, rewards_PC, [kl])[0])
            return dict(
                reward=reward,
                kl=kl,
                gap=bound - reward,
                reward_distance=abs(reward - best_reward),
                kl_distance=abs(kl - best_kl),
            )

        settings = dict(
            beta=beta, lr=block.lr, schedule=block.schedule, warmup_steps=block.warmup_steps
        )
        steps = block.steps
        task = Task(
            part="toy",
            seed=seed,
            model=model,
            train=data.train,
            held_out=data.eval,
            settings=settings,
            batch_size=block.batch_size,
            steps=steps,
            evaluate_at=(steps // 3, 2 * steps // 3, steps),
            measure=measure,
        )
        run_task(task, rows, path)


def run_hh(model_path: str, file: str, seed: int, rows: list[dict], path: pathlib.Path) -> None:
    """Run HH: an epoch over the rows that are not held out, cut to 128 tokens."""
    import dpo_jax
    from dpo_jax.config import default
    from dpo_jax.data import dataset

    model = dpo_jax.load(model_path)
    data = default(("dpo",)).data
    data.update(
        source="hh",
        path=file,
        eval_fraction=0.15,  # of a single file
        max_eval_rows=HH_HELD_OUT,
        max_length=128,
        max_prompt_length=64,
    )
    loaded = dataset.load(data, model.tokenizer, "pairs")
    task = Task(
        part="hh",
        seed=seed,
        model=model,
        train=loaded.train,
        held_out=loaded.eval,
        settings=dict(beta=0.1, lr=1e-4, warmup_steps=10),
        batch_size=32,
        steps=60,
        evaluate_at=(30, 60),
    )
    run_task(task, rows, path)


def at_kl(rows: list[dict], kl: float) -> float:
    """Return the reward of a frontier at a KL, interpolated between its runs; nan beyond them."""
    ordered = sorted(rows, key=_kl)
    rewards = [row["reward"] for row in ordered]
    return statistics.reward_at_kl([row["kl"] for row in ordered], rewards, kl)


def _kl(row: dict) -> float:
    return row["kl"]


def measures(rows: list[dict]) -> dict[str, dict]:
    """Return the measures of each part: name -> {arm: {seed: value}}, of the last evaluations."""
    found: dict[str, dict] = {}

    def add(name, row, value):
        found.setdefault(name, {}).setdefault(row["arm"], {})[row["seed"]] = value

    for part in PARTS:
        starts = [row for row in rows if row["part"] == part and row["arm"] == START]
        of_part = [row for row in rows if row["part"] == part and row["arm"] != START]
        if not of_part:
            continue
        last = max(row["step"] for row in of_part)
        ends = [row for row in of_part if row["step"] == last]
        names = [name for name in ("loss", "accuracy", "reward", "kl", "gap") if name in ends[0]]
        if part == "toy":
            names += ["reward_distance", "kl_distance"]
        for row in ends:
            beta = f" beta {row['beta']:g}" if part == "toy" else ""
            for name in names:
                add(f"{part}{beta}: {name}", row, row[name])
        # The toy's frontier: the initial policy, then one policy for each beta.
        for kl in TOY_KLS if part == "toy" else ():
            for row in ends:
                alike = []
                for other in (*ends, *starts):
                    if other["seed"] == row["seed"] and other["arm"] in (row["arm"], START):
                        alike.append(other)
                add(f"{part}: reward at KL {kl:g}", row, at_kl(alike, kl))
    return found


def summary(found: dict[str, dict]) -> dict[str, dict]:
    """Return mean and standard deviation over seeds of each arm, and differences from BASE."""
    result = {}
    for name, by_arm in found.items():
        result[name] = {}
        for arm, by_seed in by_arm.items():
            shared = sorted(by_seed.keys() & by_arm[BASE].keys())
            values = np.array([by_seed[seed] for seed in shared])
            change = values - np.array([by_arm[BASE][seed] for seed in shared])
            count = max(len(shared) - 1, 1)
            result[name][arm] = dict(
                seeds=len(shared),
                mean=float(values.mean()),
                sd=float(values.std() * np.sqrt(len(shared) / count)),
                difference=float(change.mean()),
                difference_se=float(change.std() / np.sqrt(count)),
            )
    return result


def table(result: dict[str, dict]) -> str:
    """Return the summary as a table for a person."""
    lines = [f"{'mean ± sd over seeds; difference ± se':<38}" + "".join(f"{a:<42}" for a in ARMS)]
    for name, by_arm in result.items():
        line = f"{name:<38}"
        for arm in ARMS:
            if arm not in by_arm:
                continue
            values = by_arm[arm]
            text = f"{values['mean']:.4f} ± {values['sd']:.4f}"
            if arm != BASE:
                text += f" ({values['difference']:+.4f} ± {values['difference_se']:.4f})"
            line += f"{text:<42}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def draw(path: pathlib.Path, found: dict[str, dict]) -> None:
    """Draw each seed's difference from BASE in reward at equal KL, and in held-out accuracy."""
    from matplotlib.figure import Figure

    from dpo_jax.evaluation import plots

    groups = {
        "toy: reward at equal KL": [name for name in found if name.startswith("toy: reward at")],
        "held-out accuracy": [name for name in found if name.endswith(": accuracy")],
    }
    groups = {title: names for title, names in groups.items() if names}
    figure = Figure(figsize=(5.2 * len(groups), 4.2), layout="constrained")
    axes_of_groups = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (title, names) in zip(axes_of_groups, groups.items(), strict=True):
        axes.axhline(0, color="black", linewidth=0.8)
        arms = [arm for arm in ARMS if arm != BASE]
        for place, (arm, color) in enumerate(zip(arms, ("0.6", "tab:blue"), strict=True)):
            for x, name in enumerate(names):
                by_arm = found[name]
                seeds = by_arm.get(arm, {}).keys() & by_arm[BASE].keys()
                changes = [by_arm[arm][seed] - by_arm[BASE][seed] for seed in sorted(seeds)]
                if not changes:
                    continue
                at = x + 0.24 * (place - 0.5)
                label = arm if x == 0 else None
                axes.plot([at] * len(changes), changes, "o", color=color, alpha=0.7, label=label)
                axes.plot([at - 0.08, at + 0.08], [np.mean(changes)] * 2, color=color, linewidth=2)
        shown = [name.replace(": accuracy", "").replace(": reward at", "\n") for name in names]
        axes.set_xticks(range(len(names)), shown, fontsize=8)
        axes.set(title=title, ylabel=f"difference from “{BASE}”, same seed")
        axes.grid(alpha=0.3, axis="y")
        axes.legend(frameon=False)
    plots.save(figure, path, dpi=130)


def run(folder: pathlib.Path, parts: list[str], seeds: int, model: str, hh: str):
    """Make the runs that are not done, then write the summary and the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        path = folder / f"{part}.jsonl"
        rows = read(path)
        for seed in range(seeds):
            if part == "toy":
                run_toy(folder, seed, rows, path)
            else:
                run_hh(model, hh, seed, rows, path)
    rows = [row for part in PARTS for row in read(folder / f"{part}.jsonl")]
    found = measures(rows)
    result = summary(found)
    (folder / "data_order.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(folder / "data_order.png", found)
    print(table(result))


def read(path: pathlib.Path) -> list[dict]:
    """Return the rows of a file of results; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def main():
    from absl import flags

    from dpo_jax import command_line

    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs and the results.")
    parts = flags.DEFINE_multi_enum("part", list(PARTS), PARTS, "A part to run. Default: all.")
    seeds = flags.DEFINE_integer("seeds", 5, "How many seeds.")
    model = flags.DEFINE_string("model", "", "stories260k in Hugging Face format: hh.")
    hh = flags.DEFINE_string("hh", "Anthropic/hh-rlhf", "The pairs: hh.")
    flags.mark_flags_as_required(["workdir"])
    # One thread: the steps are too small to share between cores, and seeds can run beside others.
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} --xla_cpu_multi_thread_eigen=false"

    def measure():
        if "hh" not in parts.value:
            refuse_flags("without --part=hh", "model", "hh")
        with in_workdir(workdir.value) as folder:
            run(pathlib.Path(folder), parts.value, seeds.value, model.value, hh.value)

    command_line.run(measure, __doc__)


if __name__ == "__main__":
    main()
