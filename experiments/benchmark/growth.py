"""Measure how a step's cost grows with its pairs and with the length of its rows.

    python -m experiments.benchmark.growth --out=DIR

Each point is a run of our trainer on the benchmark's model, with positions for the longest row. All
rows of a point have one length, three quarters of it prompt. Along one line the length stays and
pairs are added. Along the other the tokens of a step stay, so rows grow longer and fewer: what is
linear in tokens is flat there.

Writes DIR/growth.json, with a row per point, and DIR/growth.png, and prints a table.
"""

import json
import pathlib
import statistics
import tempfile

import numpy as np

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)  # tokens of prompt + response
PAIRS = (1, 2, 4, 8, 16)
LENGTH = 512  # of every row where pairs are added
STEPS = 3  # timed at each point


def points() -> list[tuple[str, int, int]]:
    """Return (line, pairs per step, tokens per row) of each point."""
    by_length = [("length", max(LENGTHS) // length, length) for length in LENGTHS]
    by_pairs = [("pairs", pairs, LENGTH) for pairs in PAIRS]
    return by_length + by_pairs


def measure(model: dict, pairs: int, length: int, dtype: str) -> dict:
    """Return a step's median, least and most seconds, and the tokens and FLOPs its rows need."""
    from experiments.benchmark import ours, work

    told = work.Work(pairs=pairs, steps=STEPS, cached=False, dtype=dtype)
    prompt_G = np.full(pairs * STEPS, length * 3 // 4)
    response_G2 = np.full((pairs * STEPS, 2), length // 4)
    longest = model | dict(n_positions=max(LENGTHS))
    with tempfile.TemporaryDirectory(prefix="dpo_jax_growth_") as folder:
        folder = pathlib.Path(folder)
        work.write(folder, told, longest, prompt_G, response_G2)
        trainer = ours.Trainer(folder, told)
        found = [trainer.steps(1) for _ in range(STEPS)]
    seconds = [step["seconds"] for step in found]
    return dict(
        pairs=pairs,
        length=length,
        tokens=found[0]["tokens"],
        flops=found[0]["flops"],
        seconds=statistics.median(seconds),
        least=min(seconds),
        most=max(seconds),
    )


def table(rows: list[dict]) -> str:
    """Return the points as a table."""
    heads = f"{'':<8}{'pairs':>6}{'row':>7}{'tokens':>8}"
    heads += f"{'s a step':>10}{'ms/pair':>11}{'ms/token':>12}{'GFLOP/s':>9}"
    lines = [heads]
    for row in rows:
        milliseconds = 1e3 * row["seconds"]
        gflops_per_second = row["flops"] / row["seconds"] / 1e9
        line = f"{row['line']:<8}{row['pairs']:>6}{row['length']:>7}{row['tokens']:>8}"
        line += f"{row['seconds']:>10.3f}{milliseconds / row['pairs']:>11.1f}"
        line += f"{milliseconds / row['tokens']:>12.3f}{gflops_per_second:>9.0f}"
        lines.append(line)
    return "\n".join(lines)


def draw(path: pathlib.Path, rows: list[dict], title: str) -> None:
    """Draw the seconds of a step against its pairs, and the milliseconds of a token against length.

    Dashed lines show the growth by FLOPs alone.
    """
    from matplotlib.figure import Figure

    from dpo_jax.evaluation import plots

    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    figure.suptitle(title)
    by_pairs = [row for row in rows if row["line"] == "pairs"]
    axes = figure.add_subplot(
        1, 2, 1, xlabel="pairs a step", ylabel=f"seconds a step, rows of {LENGTH} tokens"
    )
    _draw_line(axes, [row["pairs"] for row in by_pairs], by_pairs, np.ones(len(by_pairs)))
    axes.set_yscale("log", base=2)

    by_length = [row for row in rows if row["line"] == "length"]
    axes = figure.add_subplot(1, 2, 2, xlabel="tokens of a row", ylabel="milliseconds a token")
    ms_per_token = np.array([1e3 / row["tokens"] for row in by_length])
    _draw_line(axes, [row["length"] for row in by_length], by_length, ms_per_token)
    axes.set_ylim(0, 1.3 * axes.dataLim.ymax)
    plots.save(figure, path)


def _draw_line(axes, xs: list[int], rows: list[dict], scale: np.ndarray) -> None:
    """Draw the rows' seconds times `scale`, and dashed, those that their FLOPs predict."""
    seconds = scale * [row["seconds"] for row in rows]
    least = scale * [row["least"] for row in rows]
    most = scale * [row["most"] for row in rows]
    flops = scale * [row["flops"] for row in rows]
    middle = len(rows) // 2
    axes.fill_between(xs, least, most, alpha=0.2)
    axes.plot(xs, seconds, marker="o", label="measured (median; band: least to most)")
    axes.plot(
        xs,
        flops * seconds[middle] / flops[middle],
        "--",
        color="black",
        linewidth=1,
        label=f"its FLOPs, at the rate of {xs[middle]}",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [str(value) for value in xs])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def main():
    from absl import flags

    from experiments.benchmark import work

    options = flags.FLAGS
    out = pathlib.Path(options.out)
    if (out / "growth.json").exists():
        raise ValueError(f"{out / 'growth.json'} exists; give a new --out.")
    out.mkdir(parents=True, exist_ok=True)
    model, todo = work.MODELS[options.model], points()
    rows = []
    for number, (line, pairs, length) in enumerate(todo, 1):
        row = dict(line=line) | measure(model, pairs, length, options.dtype)
        rows.append(row)
        print(
            f"{number}/{len(todo)}  {pairs} pairs of {length}-token rows: {row['seconds']:.3f} s",
            flush=True,
        )
    (out / "growth.json").write_text(json.dumps(rows, indent=1) + "\n")
    title = f"a DPO step of {options.model}, {options.dtype}, live reference"
    draw(out / "growth.png", rows, title)
    print(table(rows))


if __name__ == "__main__":
    from absl import flags

    from dpo_jax import command_line
    from dpo_jax.parallel import processes

    flags.DEFINE_string("out", None, "Folder for growth.json and growth.png.", required=True)
    flags.DEFINE_enum(
        "model",
        "gpt2-tiny",
        ["smoke", "gpt2-tiny", "gpt2"],
        "The model's sizes; its weights are random.",
    )
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "The dtype to compute in.")
    processes.start()
    command_line.run(main, __doc__)
