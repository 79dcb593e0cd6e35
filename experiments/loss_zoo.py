"""Train every preference loss on the toy, and draw its reward against KL with the exact bound.

    python -m experiments.loss_zoo --workdir=DIR

All completions are enumerated, so the rewards, the KLs and the highest reward at each KL are exact.
Each line of LINES is a loss with a grid of its strength; every seed trains all of them on the same
pairs, from the same model. --losses=NAME,NAME picks lines, --labels picks how pairs are labelled:
by Bradley-Terry (the default), or always the better completion as chosen.

Every run is an ordinary run of dpo_jax.train in DIR/LABELS-SEED, so finished runs are reused. Runs
of one process share their compiled steps. Writes DIR/loss_zoo.json after each grid, with a row per
run; then DIR/LABELS.png, a panel per loss, and DIR/loss_zoo.md, the tables. Runs whose rows are in
loss_zoo.json are not made again, even where their folders are gone.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import multiprocessing
import pathlib
import time

import numpy as np

from dpo_jax.evaluation import statistics
from experiments.commands import in_workdir
from experiments.toy_runs import bound_curve, one_thread

SEEDS = 3
STEPS = 240
# Name -> title of its figure and table
LABELS = {
    "bradley_terry": "Bradley-Terry labels",
    "deterministic": "deterministic labels",
}
KLS = (0.5, 1.0, 2.0, 4.0)  # nats, at which losses are compared
BASELINE = "sigmoid"
COMPARED_KL = 0.5  # at which each loss is compared with the baseline, seed by seed
LARGEST_KL = 14.0  # of the figure
COLUMNS = 5
MARKS = ("o", "s", "^", "D", "v")  # by seed


@dataclasses.dataclass(frozen=True)
class Line:
    """A loss with the grid of one of its numbers."""

    title: str
    settings: dict  # fields of its stage that all its runs share
    strength: str  # the field of its stage that its runs differ in
    values: tuple[float, ...]  # from the one that stays nearest to the reference
    letter: str = "β"  # how the strength is written
    stage: str = "dpo"


LINES = {
    "sigmoid": Line("sigmoid (DPO)", dict(), "beta", (2, 1.2, 0.8, 0.5, 0.3)),
    "smoothed": Line(
        "sigmoid, label_smoothing 0.1 (cDPO)",
        dict(label_smoothing=0.1),
        "beta",
        (2, 1, 0.6, 0.4, 0.2),
    ),
    "robust": Line(
        "robust, label_smoothing 0.1",
        dict(loss="robust", label_smoothing=0.1),
        "beta",
        (12, 6, 3, 2, 1.2),
    ),
    "ipo_sum": Line("ipo_sum", dict(loss="ipo_sum"), "beta", (0.5, 0.25, 0.12, 0.06, 0.03)),
    "hinge": Line("hinge", dict(loss="hinge"), "beta", (2, 1, 0.5, 0.3, 0.15)),
    "exo": Line(
        "exo, label_smoothing 0.001",
        dict(loss="exo", label_smoothing=0.001),
        "beta",
        (6, 3, 2, 1.2, 0.6),
    ),
    "exo_smoothed": Line(
        "exo, label_smoothing 0.1",
        dict(loss="exo", label_smoothing=0.1),
        "beta",
        (2, 1, 0.6, 0.4, 0.2),
    ),
    "discopop": Line("discopop", dict(loss="discopop"), "beta", (2, 1, 0.6, 0.4)),
    "dpop": Line("dpop, λ 50", dict(loss="dpop"), "beta", (1, 0.01)),
    "dpop_lambda": Line(
        "dpop, β 0.3",
        dict(loss="dpop", beta=0.3),
        "dpop_lambda",
        (1, 0.3, 0.1, 0.03, 0.01),
        "λ ",
    ),
    "apo_zero": Line("apo_zero", dict(loss="apo_zero"), "beta", (4, 2, 1, 0.5, 0.1)),
    "apo_down": Line("apo_down", dict(loss="apo_down"), "beta", (30, 4, 1, 0.25)),
    "nca": Line("nca", dict(loss="nca"), "beta", (1, 0.5, 0.25, 0.12, 0.06)),
    "bco_pair": Line("bco_pair", dict(loss="bco_pair"), "beta", (1, 0.5, 0.25, 0.12, 0.06)),
    "sppo_hard": Line("sppo_hard", dict(loss="sppo_hard"), "beta", (0.25, 0.12, 0.06, 0.03, 0.015)),
    "simpo": Line(
        "simpo, γ 1, lr 2e-3",
        dict(loss="simpo"),
        "beta",
        (40, 10, 5, 2.5),
    ),
    "simpo_lr": Line(
        "simpo, β 2.5, γ 1",
        dict(loss="simpo", beta=2.5),
        "lr",
        (2e-5, 5e-5, 1e-4, 2e-4, 5e-4),
        "lr ",
    ),
    "orpo": Line("orpo", dict(loss="orpo"), "orpo_lambda", (0.3, 1, 3, 10, 30), "λ "),
    "cpo": Line("cpo, α 1", dict(loss="cpo"), "beta", (0.1, 0.3, 1, 2)),
    "cpo_alpha": Line(
        "cpo, β 0.3", dict(loss="cpo", beta=0.3), "cpo_alpha", (3, 0.3, 0.1, 0.03, 0.01), "α "
    ),
    "rpo": Line(
        "sigmoid=1,nll=1 (RPO)", dict(loss="sigmoid=1,nll=1"), "beta", (2, 1, 0.5, 0.25, 0.1)
    ),
    "rpo_weak": Line(
        "sigmoid=1,nll=0.1", dict(loss="sigmoid=1,nll=0.1"), "beta", (2, 1, 0.5, 0.35, 0.2)
    ),
    "wpo": Line(
        "WPO: sigmoid, weighting wpo", dict(weighting="wpo"), "beta", (2, 1.2, 0.8, 0.5, 0.3)
    ),
    "tr_dpo": Line(
        "TR-DPO: sigmoid, reference_every 60",
        dict(reference_every=60),
        "beta",
        (8, 4, 2, 1.2, 0.8),
    ),
    "kto": Line("KTO (stage kto)", {}, "beta", (8, 4, 2, 1, 0.25), stage="kto"),
    "forward_kl": Line(
        "sigmoid, forward KL", dict(divergence="forward_kl"), "beta", (2, 1, 0.5, 0.25, 0.1)
    ),
    "jensen_shannon": Line(
        "sigmoid, Jensen-Shannon",
        dict(divergence="jensen_shannon"),
        "beta",
        (4, 2, 1, 0.5, 0.25),
    ),
    "alpha": Line(
        "sigmoid, α-divergence, α 0.5", dict(divergence="alpha"), "beta", (2, 1, 0.5, 0.25, 0.1)
    ),
}


def config_of(name: str, value: float, seed: int, labels: str, steps: int = STEPS):
    """Return the config of one run, and the stage that trains it."""
    from configs import toy
    from dpo_jax import loss_table
    from dpo_jax.config import default

    line = LINES[name]
    config = toy.get_config(line.stage)
    config.seed = seed
    config.stages = ("sft", "pairs", line.stage)
    config.pairs.labels = labels
    block = config[line.stage]
    # The toy's own beta is refused by losses that take none; the default is not.
    block.beta = default((line.stage,))[line.stage].beta
    block.update(line.settings | {line.strength: float(value)})
    block.update(steps=steps, eval_every=steps, save_every=steps, log_every=steps)
    if line.stage == "dpo":
        # The runs of a seed share the reference's log-probs.
        moves = block.reference_every > 0
        block.cache_reference = loss_table.properties(block.loss).needs_reference and not moves
    config.run = f"{name}_{value:g}"
    return config, line.stage


def prepare(workdir: str, labels: str, seed: int) -> dict:
    """Make the model and the pairs that all runs of a seed share; return the bound's curve."""
    from dpo_jax.pipeline.stages import run_stages

    config, _ = config_of(BASELINE, LINES[BASELINE].values[0], seed, labels)
    config.stages, config.run = ("sft", "pairs"), ""
    with contextlib.redirect_stdout(io.StringIO()):
        run_stages(config, _folder(workdir, labels, seed))
    kls, bound = bound_curve(*_reference(workdir, labels, seed), LARGEST_KL)
    return dict(labels=labels, seed=seed, kl=kls.tolist(), reward=bound.tolist())


def run_line(workdir: str, labels: str, seed: int, name: str, values, steps: int) -> list[dict]:
    """Train a line's runs with one seed; return a row for each.

    chosen: the mean log-ratio of the chosen responses of held-out pairs. A run whose weights are
    not finite in the end has no reward, KL, gap and chosen (None).
    """
    from dpo_jax import config as configs
    from dpo_jax.evaluation import exact
    from dpo_jax.pipeline.stages import run_stages

    reference_PC, rewards_PC = _reference(workdir, labels, seed)
    rows = []
    for value in values:
        began = time.monotonic()
        config, stage = config_of(name, value, seed, labels, steps)
        with contextlib.redirect_stdout(io.StringIO()):
            run_stages(config, _folder(workdir, labels, seed))
        trained = pathlib.Path(_folder(workdir, labels, seed)) / configs.folder_names(config)[stage]
        row = dict(labels=labels, loss=name, value=value, seed=seed, step=steps)
        row |= dict(reward=None, kl=None, gap=None, chosen=None)
        with contextlib.suppress(ArithmeticError):
            policy_PC = _log_probs(trained)
            reward, kl = exact.reward_and_kl(policy_PC, reference_PC, rewards_PC)
            bound = float(exact.bound(reference_PC, rewards_PC, [kl])[0])
            row |= dict(reward=reward, kl=kl, gap=bound - reward, chosen=_chosen(trained))
        rows.append(row)
        print(f"{row} {time.monotonic() - began:.0f} s", flush=True)
    return rows


def _folder(workdir: str, labels: str, seed: int) -> str:
    return f"{workdir}/{labels}-{seed}"


def _chosen(trained: pathlib.Path) -> float:
    """Return how much likelier a stage made the chosen responses of held-out pairs, in nats."""
    from dpo_jax.training.metrics import read_rows

    evaluated = [row for row in read_rows(trained / "metrics.jsonl") if "logps_eval/chosen" in row]
    return evaluated[-1]["logps_eval/chosen"] - evaluated[0]["logps_eval/chosen"]


def _log_probs(trained: pathlib.Path) -> np.ndarray:
    """Return the log-probs of all completions under the model of a stage's folder, [P, C]."""
    from dpo_jax.data import toy
    from dpo_jax.evaluation import exact
    from dpo_jax.models import loading
    from dpo_jax.parallel import sharding

    model = loading.open_checkpoint(str(trained / "hf"))
    params = model.load_params(sharding.make_mesh())
    return exact.enumerate_log_probs(model.config, params, toy.PROMPTS)


@functools.cache
def _reference(workdir: str, labels: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the reference's log-probs of all completions and their rewards, each [P, C]."""
    from dpo_jax.data import toy

    log_probs_PC = _log_probs(pathlib.Path(_folder(workdir, labels, seed)) / "sft")
    return log_probs_PC, toy.rewards(toy.PROMPTS, toy.completions())


# The table


def at_kl(rows: list[dict], kl: float, name: str = "gap") -> float | None:
    """Return a frontier's gap at a KL, interpolated between its runs; None outside of them.

    rows: of one loss and seed. The gap is interpolated rather than the reward, whose curve bends
    between two runs, and along the root of the KL, as near the reference rewards grow with it.
    name: of another value of the rows instead of the gap.
    """
    finite = [row for row in rows if row["kl"] is not None]
    ordered = sorted(finite, key=_kl)
    kls = [row["kl"] for row in ordered]
    found = statistics.reward_at_kl(kls, [row[name] for row in ordered], kl)
    return found if math.isfinite(found) else None


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half width of Student's 95 % interval; 0 of a single value."""
    found = statistics.mean_interval(values)
    if found["n"] == 1:
        return found["mean"], 0.0
    return found["mean"], found["high"] - found["mean"]


def summary(rows: list[dict]) -> list[dict]:
    """Return what the table shows of each line and kind of labels.

    gaps: KL -> [mean, half width] over the seeds, where all of them reach that KL. difference: the
    same of the gap minus the baseline's with the same seed, at COMPARED_KL. chosen: the mean
    log-ratio of chosen responses at COMPARED_KL. kl: the lowest and the highest mean KL of its
    runs. worst: the run with the largest mean gap (value, kl, gap). diverged: how many runs have
    weights that are not finite.
    """
    found = []
    for labels in LABELS:
        of_labels = [row for row in rows if row["labels"] == labels]
        baseline = _by_seed(of_labels, BASELINE)
        for name in LINES:
            by_seed = _by_seed(of_labels, name)
            if not by_seed:
                continue
            one = dict(labels=labels, loss=name, gaps={}, difference=None, chosen=None)
            for kl in KLS:
                gaps = [at_kl(of_seed, kl) for of_seed in by_seed.values()]
                if None not in gaps:
                    one["gaps"][f"{kl:g}"] = interval(gaps)
            if f"{COMPARED_KL:g}" in one["gaps"]:
                one |= _compared(by_seed, baseline)
            of_line = [row for of_seed in by_seed.values() for row in of_seed]
            found.append(one | _extremes(of_line))
    return found


def _by_seed(rows: list[dict], name: str) -> dict[int, list[dict]]:
    found: dict[int, list[dict]] = {}
    for row in rows:
        if row["loss"] == name:
            found.setdefault(row["seed"], []).append(row)
    return found


def _compared(by_seed: dict[int, list[dict]], baseline: dict[int, list[dict]]) -> dict:
    """Return a line's log-ratio of chosen responses, and its gap minus the baseline's."""
    chosen = [at_kl(of_seed, COMPARED_KL, "chosen") for of_seed in by_seed.values()]
    differences = []
    for seed, of_seed in by_seed.items():
        other = at_kl(baseline.get(seed, []), COMPARED_KL)
        if other is not None:
            differences.append(at_kl(of_seed, COMPARED_KL) - other)
    compared = dict(chosen=float(np.mean(chosen)))
    if len(differences) == len(by_seed):
        compared["difference"] = interval(differences)
    return compared


def _extremes(rows: list[dict]) -> dict:
    """Return a line's range of KL, its run with the largest gap, and how many runs diverged."""
    by_value: dict[float, list[dict]] = {}
    for row in rows:
        if row["kl"] is not None:
            by_value.setdefault(row["value"], []).append(row)
    diverged = sum(row["kl"] is None for row in rows)
    means = []
    for value, of_value in by_value.items():
        kl = float(np.mean([row["kl"] for row in of_value]))
        gap = float(np.mean([row["gap"] for row in of_value]))
        means.append(dict(value=value, kl=kl, gap=gap))
    if not means:
        return dict(kl=None, worst=None, diverged=diverged)
    kls = [mean["kl"] for mean in means]
    return dict(kl=[min(kls), max(kls)], worst=max(means, key=_gap), diverged=diverged)


def _kl(row: dict) -> float:
    return row["kl"]


def _gap(row: dict) -> float:
    return row["gap"]


def table(found: list[dict], labels: str) -> str:
    """Return the summary of one kind of labels as a Markdown table."""
    at = f"at KL {COMPARED_KL:g}"
    titles = ["loss", "strength"]
    titles += [f"gap at KL {kl:g}" for kl in KLS]
    titles += [f"minus {BASELINE}'s {at}", f"log-ratio of chosen {at}", "KL reached", "largest gap"]
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "---:|" * (len(titles) - 2)]
    for one in found:
        if one["labels"] != labels:
            continue
        line = LINES[one["loss"]]
        cells = [line.title, f"{line.letter}{line.values[0]:g} to {line.values[-1]:g}"]
        for kl in KLS:
            cells.append(_with_interval(one["gaps"].get(f"{kl:g}"), "{:.3f}"))
        is_baseline = one["loss"] == BASELINE
        cells.append("" if is_baseline else _with_interval(one["difference"], "{:+.3f}"))
        cells.append("–" if one["chosen"] is None else f"{one['chosen']:+.2f}")
        if one["kl"]:
            low, high = one["kl"]
            worst = one["worst"]
            where = f"{line.letter}{worst['value']:g}, KL {worst['kl']:.1f}"
            cells += [f"{low:.2f} to {high:.1f}", f"{worst['gap']:.2f} ({where})"]
        else:
            cells += ["–", "all diverge"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _with_interval(measured: tuple[float, float] | None, form: str) -> str:
    if measured is None:
        return "–"
    mean, half = measured
    return f"{form.format(mean)} ± {half:.3f}"


# The figure


def draw(path: pathlib.Path, rows: list[dict], curve: dict) -> None:
    """Draw reward against KL, a panel per line of LINES that has rows.

    rows: with one kind of labels. curve: the bound of its first seed. Colours are the strengths,
    from the one that stays nearest to the reference (dark); marks are the seeds.
    """
    from matplotlib.figure import Figure

    from dpo_jax.evaluation import plots

    names = [name for name in LINES if any(row["loss"] == name for row in rows)]
    across = min(COLUMNS, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(2.8 * across, 2.5 * down + 0.9), dpi=130, layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(names) :]:
        axes.remove()
    for axes in panels.flat[len(names) - across : len(names)]:
        axes.tick_params(labelbottom=True)  # there may be no panel below
    for name, axes in zip(names, panels.flat, strict=False):
        axes.plot(curve["kl"], curve["reward"], color="black", linewidth=1, zorder=1)
        _draw_runs(axes, name, [row for row in rows if row["loss"] == name])
    first = panels.flat[0]
    first.set_xscale("function", functions=(_signed_root, _signed_square))
    lowest, highest = min(curve["reward"]), max(curve["reward"])
    first.set(
        xlim=(-0.02, LARGEST_KL),
        xticks=(0, 0.5, 2, 4, 8, 12),
        ylim=(lowest - 0.3, highest + 0.3),
    )
    first.xaxis.set_major_formatter("{x:g}")
    figure.supxlabel("KL(policy || reference), nats, square-root scale", fontsize=10)
    figure.supylabel("expected true reward", fontsize=10)
    seeds = sorted({row["seed"] for row in rows})
    handles = {"highest reward at this KL (exact, first seed)": first.get_lines()[0]}
    for seed in seeds:
        handles[f"seed {seed}"] = _mark("0.4", seed)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
    )
    plots.save(figure, path)


def _draw_runs(axes, name: str, rows: list[dict]) -> None:
    """Draw a panel's runs, and say which colour is which strength."""
    import matplotlib

    line = LINES[name]
    axes.set_title(line.title, fontsize=8.5)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=7.5)
    colors = matplotlib.colormaps["plasma"](np.linspace(0, 0.88, len(line.values)))
    handles = {}
    for value, color in zip(line.values, colors, strict=True):
        handles[f"{line.letter}{value:g}"] = _mark(color, 0)
        for row in rows:
            if row["value"] == value and row["kl"] is not None:
                mark = MARKS[row["seed"] % len(MARKS)]
                axes.plot(row["kl"], row["reward"], mark, color=color, markersize=4.5, alpha=0.8)
    axes.legend(
        handles.values(),
        handles.keys(),
        loc="lower right",
        fontsize=6,
        ncols=2,
        handletextpad=0.1,
        columnspacing=0.6,
        borderpad=0.2,
    )


def _mark(color, seed: int):
    """Return a point for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="", color=color, marker=MARKS[seed % len(MARKS)], markersize=4)


def _signed_root(x):
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x):
    return np.sign(x) * x**2


# The command


def run(
    workdir: str, names: list[str], kinds: list[str], *, seeds: int, steps: int, processes: int
) -> dict:
    """Make the runs that have no row yet; write loss_zoo.json, the figures and loss_zoo.md.

    names: of LINES. kinds: of LABELS. Returns what loss_zoo.json holds.
    """
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "loss_zoo.json"
    result = json.loads(path.read_text()) if path.exists() else dict(bounds=[], rows=[])
    result["rows"] = [row for row in result["rows"] if _is_in_grid(row)]
    shared = [(workdir, labels, seed) for labels in kinds for seed in range(seeds)]
    tasks = []
    for of_seed in shared:
        for name in names:
            values = _missing(result["rows"], *of_seed[1:], name, steps)
            if values:
                tasks.append((*of_seed, name, values, steps))
    # Only seeds that have something to train need their model and pairs.
    shared = [of_seed for of_seed in shared if any(task[:3] == of_seed for task in tasks)]
    with _workers(processes) as work:
        for curve in work(_prepare, shared):
            others = [one for one in result["bounds"] if not _is_same_seed(one, curve)]
            result["bounds"] = [*others, curve]
        for rows in work(_run_line, tasks):
            result["rows"] += rows
            _write(folder, result)
    _write(folder, result)
    for labels in LABELS:
        of_labels = [row for row in result["rows"] if row["labels"] == labels]
        if of_labels:
            first = min(row["seed"] for row in of_labels)
            wanted = dict(labels=labels, seed=first)
            curve = [one for one in result["bounds"] if _is_same_seed(one, wanted)][0]
            draw(folder / f"{labels}.png", of_labels, curve)
    print((folder / "loss_zoo.md").read_text())
    return result


def _missing(rows: list[dict], labels: str, seed: int, name: str, steps: int) -> list[float]:
    """Return the values of a line that have no row yet."""
    wanted = dict(labels=labels, loss=name, seed=seed, step=steps)
    done = {row["value"] for row in rows if wanted.items() <= row.items()}
    return [value for value in LINES[name].values if value not in done]


def _is_in_grid(row: dict) -> bool:
    """Return whether a row is still of a run that LINES has."""
    return row["loss"] in LINES and row["value"] in LINES[row["loss"]].values


def _is_same_seed(one: dict, other: dict) -> bool:
    return one["labels"] == other["labels"] and one["seed"] == other["seed"]


def _write(folder: pathlib.Path, result: dict) -> None:
    """Write the rows, and the tables made of them."""
    from dpo_jax.workdir import write_json, write_text

    names = list(LINES)

    def place(row):
        values = LINES[row["loss"]].values
        number = names.index(row["loss"])
        return row["labels"], number, row["seed"], values.index(row["value"])

    result["rows"].sort(key=place)
    result["bounds"].sort(key=_seed_place)
    found = summary(result["rows"])
    result["summary"] = found
    write_json(folder / "loss_zoo.json", result)
    parts = []
    for labels, title in LABELS.items():
        if any(one["labels"] == labels for one in found):
            parts.append(f"{title}:\n\n{table(found, labels)}\n")
    write_text(folder / "loss_zoo.md", "\n".join(parts))


def _seed_place(curve: dict) -> tuple:
    return curve["labels"], curve["seed"]


@contextlib.contextmanager
def _workers(processes: int):
    """Yield a function (function, tasks) -> results as they come, in this or more processes."""
    if processes == 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(processes, initializer=one_thread) as pool:
        yield pool.imap_unordered


def _prepare(task: tuple) -> dict:
    return prepare(*task)


def _run_line(task: tuple) -> list[dict]:
    return run_line(*task)


def main():
    from absl import flags

    from dpo_jax import command_line

    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs and the results.")
    losses = flags.DEFINE_list("losses", list(LINES), "Names of LINES. Default: all.")
    kinds = flags.DEFINE_multi_enum(
        "labels", ["bradley_terry"], list(LABELS), "How pairs are labelled; may be repeated."
    )
    seeds = flags.DEFINE_integer("seeds", SEEDS, "Number of seeds.")
    jobs = flags.DEFINE_integer("processes", 1, "Number of processes.")
    flags.mark_flags_as_required(["workdir"])

    def make_zoo():
        unknown = sorted(set(losses.value) - LINES.keys())
        if unknown:
            raise ValueError(f"--losses={','.join(unknown)}: expected some of {', '.join(LINES)}.")
        one_thread()
        with in_workdir(workdir.value) as folder:
            run(
                folder,
                losses.value,
                kinds.value,
                seeds=seeds.value,
                steps=STEPS,
                processes=jobs.value,
            )

    command_line.run(make_zoo, __doc__)


if __name__ == "__main__":
    main()
