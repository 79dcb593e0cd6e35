"""Reproduce the paper's figure 3: win rates of dialogue on Anthropic-HH.

    python -m experiments.hh_winrate --config=FILE --workdir=DIR --judge_model=MODEL

DPO, Preferred-FT, the base model after two examples and the best of N answer the same test
dialogues of one turn, at several temperatures. A judge compares each answer with the response that
people chose. DPO is also judged at each checkpoint that its training kept (config.dpo.save_every,
config.dpo.keep), at temperatures 0.7 and 1 as in the figure's right half, or at --temperatures. So
is unlikelihood with --method=unlikelihood, which the paper has no win rates of. Flags and files are
those of experiments.tldr_winrate.
"""

from dpo_jax.data import splits
from dpo_jax.data.rows import TextExample
from experiments import winrate
from experiments.winrate import Defaults, Options, Point, Task

HUMAN = "\n\nHuman:"
# "training" is DPO at its checkpoints.
METHODS = ("dpo", "preferred_ft", "base", "best_of_n", "training")
CHOICES = (*METHODS, "unlikelihood")
TEMPERATURES = (0.25, 0.7, 1.0)
TRAINING_TEMPERATURES = (0.7, 1.0)
SHOTS = 2  # examples before the base model's prompts
LONGEST_SHOT = 400  # characters of an example


def run(make_config, workdir: str, options: Options) -> list[dict]:
    """Run the experiment; return a row for each win rate."""
    trains = ("dpo",) if {"dpo", "training"} & set(options.answering) else ()
    if "unlikelihood" in options.answering:
        trains = (*trains, "unlikelihood")
    return winrate.run(
        "hh", make_config, workdir, options, trains=trains, make_task=task, make_points=points
    )


def task(runs: dict, options: Options) -> Task:
    """Return the task: held-out dialogues of one turn."""
    data = _data(runs["dpo"])
    examples = winrate.held_out(winrate.test_examples(data), options.prompts, one_turn)
    return Task(examples, data, shown=str.strip, read=answer, date=winrate.date_of(runs["dpo"]))


def points(runs: dict, options: Options) -> list[Point]:
    """Return a point for each method and temperature, and for DPO over its training."""
    dpo = runs["dpo"]
    supervised = winrate.start(dpo, "dpo", "preferred_ft")
    policies = {
        "dpo": winrate.trained(dpo, "dpo"),
        "preferred_ft": supervised,
        "best_of_n": supervised,
        "base": winrate.start(dpo, "sft", "base", lambda: shots(_data(dpo))),
    }
    if "unlikelihood" in runs:
        policies["unlikelihood"] = winrate.trained(runs["unlikelihood"], "unlikelihood")
    found = []
    for method in options.methods:
        if method == "training":
            at_steps = {0: supervised} | winrate.at_checkpoints(dpo, "dpo")
            for temperature in options.training_temperatures or options.temperatures:
                for step, policy in at_steps.items():
                    found.append(Point("dpo", policy, temperature, step=step))
            continue
        for temperature in options.temperatures:
            if method == "best_of_n":
                found += winrate.best_of_n(supervised, temperature, options.counts)
            else:
                found.append(Point(method, policies[method], temperature))
    return found


def answer(completion: str) -> str:
    """Return the assistant's turn alone: a base model continues with the human's."""
    return completion.partition(HUMAN)[0].strip()


def shots(data) -> str:
    """Return short dialogues of one turn from the training examples, as one text."""
    texts, _ = splits.read(data, "sft", wanted=("train",))
    short = {}
    for example in texts["train"]:
        if isinstance(example.prompt, list):
            raise ValueError(
                "the base model is shown training dialogues as text, and the data has chat "
                "messages: choose methods without base by --method."
            )
        length = len(example.prompt + example.responses[0])
        if one_turn(example) and length <= LONGEST_SHOT:
            short[example.prompt] = example
    if len(short) < SHOTS:
        raise ValueError(
            f"the base model is shown {SHOTS} training dialogues of one turn and up to "
            f"{LONGEST_SHOT} characters, but the data has {len(short)}: read more rows "
            "(config.data.max_rows), or choose methods without base by --method."
        )
    chosen = winrate.held_out(list(short.values()), SHOTS)
    return "".join(example.prompt + example.responses[0] for example in chosen)


def _data(run):
    """Return the config of the SFT data, with all of its eval rows."""
    data = run.sft_data()
    data.max_eval_rows = 0
    return data


def one_turn(example: TextExample) -> bool:
    """Return whether an example is a question and its answer, without turns before them."""
    if isinstance(example.prompt, list):
        asked = [message for message in example.prompt if message["role"] == "user"]
        return len(asked) == 1 and len(example.responses[0]) == 1
    return example.prompt.count(HUMAN) == 1 and HUMAN not in example.responses[0]


def main():
    def defaults():
        return Defaults(METHODS, TEMPERATURES, "dialogue", TRAINING_TEMPERATURES)

    winrate.main(__doc__, "hh", CHOICES, defaults, run)


if __name__ == "__main__":
    main()
