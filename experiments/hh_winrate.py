"""The paper's figure 3: python -m experiments.hh_winrate --config=FILE --workdir=DIR
--judge_model=MODEL

Answers to the same test dialogues of one turn by DPO, Preferred-FT, the base model behind two
examples and the best of N, against the response that people chose, by temperature; and DPO's at
each checkpoint that its training kept (config.dpo.save_every, config.dpo.keep), at temperature 1.
Flags: as of experiments/tldr_winrate.py.
"""

from dpo_jax.data import sources
from experiments import winrate
from experiments.winrate import Options, Point, Task

HUMAN = "\n\nHuman:"
METHODS = (
    "dpo",
    "preferred_ft",
    "base",
    "best_of_n",
    "training",
)  # training: DPO at its checkpoints
TEMPERATURES = (0.25, 0.7, 1.0)
SHOTS, LONGEST_SHOT = (
    2,
    400,
)  # examples before the base model's prompts, and their length in characters


def run(make_config, workdir: str, options: Options) -> list[dict]:
    """The whole experiment; a row for each win rate."""
    trains = ("dpo",) if {"dpo", "training"} & set(options.methods) else ()
    return winrate.run(
        "hh", make_config, workdir, options, trains=trains, make_task=task, make_points=points
    )


def task(runs: dict, options: Options) -> Task:
    """Held-out prompts of one turn."""
    data = _all_rows(runs["dpo"])
    splits, _ = sources.read(data, "sft")
    rows = winrate.held_out(splits["eval"], options.prompts, _one_turn)
    return Task(rows, data, shown=str.strip, read=answer)


def points(runs: dict, options: Options) -> list[Point]:
    """Every method at every temperature; then DPO over its training, from its start."""
    dpo = runs["dpo"]
    supervised = winrate.start(dpo, "dpo", "preferred_ft")
    policies = {
        "dpo": winrate.trained(dpo, "dpo"),
        "preferred_ft": supervised,
        "best_of_n": supervised,
        "base": winrate.start(dpo, "sft", "base", lambda: shots(_all_rows(dpo))),
    }
    found = []
    for method in options.methods:
        if method == "training":
            at_steps = {0: supervised} | winrate.at_checkpoints(dpo, "dpo")
            found += [
                Point("dpo", policy, temperature=1.0, step=step)
                for step, policy in at_steps.items()
            ]
            continue
        for temperature in options.temperatures:
            if method == "best_of_n":
                found += winrate.best_of_n(supervised, temperature, options.counts)
            else:
                found.append(Point(method, policies[method], temperature))
    return found


def answer(completion: str) -> str:
    """The assistant's turn alone; a base model goes on with the human's."""
    return completion.partition(HUMAN)[0].strip()


def shots(data) -> str:
    """Short dialogues of one turn from the training rows."""
    splits, _ = sources.read(data, "sft")
    short = {
        row.prompt: row
        for row in splits["train"]
        if _one_turn(row) and len(row.prompt + row.responses[0]) <= LONGEST_SHOT
    }
    if len(short) < SHOTS:
        raise ValueError(
            f"the base model is shown {SHOTS} training dialogues of one turn and up to {LONGEST_SHOT} "
            f"characters, and the data has {len(short)}: read more rows (config.data.max_rows), or take "
            "--method for the methods without base."
        )
    return "".join(
        row.prompt + row.responses[0] for row in winrate.held_out(list(short.values()), SHOTS)
    )


def _all_rows(run):
    data = run.sft_data()
    data.max_eval_rows = 0
    return data


def _one_turn(row) -> bool:
    return row.prompt.count(HUMAN) == 1 and HUMAN not in row.responses[0]


def main():
    winrate.main(__doc__, "hh", METHODS, lambda: (METHODS, TEMPERATURES, "dialogue"), run)


if __name__ == "__main__":
    main()
