"""Reproduce the paper's figure 2, right, and table 1: win rates of TL;DR summaries.

    python -m experiments.tldr_winrate --config=FILE --workdir=DIR \\
        --judge_model=MODEL [--base=NAME_OR_FOLDER]

DPO, PPO, Preferred-FT, the supervised model, its base and the best of N summarise the same test
posts, at several temperatures. A judge compares each summary with the one that people wrote.
--dataset=cnn_dailymail does the same with DPO and PPO on news, which neither was trained on.
--method=unlikelihood adds a method of which the paper shows samples (table 3), but no win rates.

MODEL is behind OPENAI_BASE_URL and OPENAI_API_KEY; --judge=reward takes the run's reward model
instead. What is not trained yet is trained first. --config.FIELD=VALUE changes a field of every run
that has it. --dry_run lists what would be done, and how often the judge would be asked. The files
are listed in experiments/winrate.py.
"""

import functools

from dpo_jax.data.sources import CUE
from dpo_jax.models import families, hf
from dpo_jax.models.loading import open_checkpoint
from experiments import commands, winrate
from experiments.winrate import Defaults, Options, Point, Policy, Task

# A supervised model -> the model that it was made of.
BASES = {"CarperAI/openai_summarize_tldr_sft": "EleutherAI/gpt-j-6b"}
TRAINED = ("dpo", "ppo", "preferred_ft", "unlikelihood")
# The paper has samples of unlikelihood here (table 3), but no win rates.
METHODS = ("dpo", "ppo", "preferred_ft", "sft", "base", "best_of_n")
CHOICES = (*METHODS, "unlikelihood")
DATASETS = {
    "tldr": Defaults(METHODS, (0.0, 0.25, 0.5, 0.75, 1.0), "summary_concise"),
    "cnn_dailymail": Defaults(("dpo", "ppo"), (0.0, 0.25), "news_concise"),
}


def run(
    make_config,
    workdir: str,
    options: Options,
    dataset: str = "tldr",
    path: str = "",
    base: str = "",
) -> list[dict]:
    """Run the experiment on a data set; return a row for each win rate.

    path: where the data set is, unless it is the config's posts. base: hub name or folder of the
    model for the method base, unless it is what the config's stage sft starts from.
    """
    if "base" in options.answering:
        base = find_base(make_config("dpo"), base)
        if base and not options.dry_run:
            # Before training, as it may not be there.
            families.from_hf(hf.read_config(hf.fetch(base, weights=False)))
    trains = tuple(method for method in TRAINED if method in options.answering)

    def make_task(runs, options):
        return task(runs, options, dataset, path)

    def make_points(runs, options):
        return points(runs, options, base)

    return winrate.run(
        dataset,
        make_config,
        workdir,
        options,
        trains=trains,
        make_task=make_task,
        make_points=make_points,
    )


def find_base(config, base: str) -> str:
    """Return the model for the method base, "" for what the stage sft starts from."""
    if base or "sft" in config.stages:
        return base
    if config.model.path not in BASES:
        model = config.model.path or "the model of config.model.scratch"
        raise ValueError(
            f"--method=base: what {model} was fine-tuned from is not known. "
            "Pass --base=NAME_OR_FOLDER, or choose other methods by --method."
        )
    return BASES[config.model.path]


def task(runs: dict, options: Options, dataset: str, path: str) -> Task:
    """Return the task: held-out posts, or news articles, and their summaries."""
    data = runs["dpo"].sft_data()
    data.max_eval_rows = 0
    if dataset != "tldr":
        data.update(source=dataset, path=path, train_split="train", eval_split="")
    examples = winrate.held_out(winrate.test_examples(data), options.prompts)
    date = winrate.date_of(runs["dpo"])
    return Task(examples, data, shown=text, read=str.strip, date=date, rouge=True)


def text(prompt: str) -> str:
    """Return a post or an article without the words that are there for the model."""
    return prompt.removeprefix("Article:").removesuffix(CUE).strip()


def points(runs: dict, options: Options, base: str = "") -> list[Point]:
    """Return a point for each method and temperature, and for best of N for each N."""
    dpo = runs["dpo"]
    policies = {}
    for method in TRAINED:
        if method in runs:
            policies[method] = winrate.trained(runs[method], method)
    policies["sft"] = policies["best_of_n"] = winrate.start(dpo, "dpo", "sft")
    if base:
        dtype = dpo.config.model.dtype
        open_base = functools.partial(open_checkpoint, base, dtype=dtype)
        policies["base"] = Policy("base", dict(path=base, dtype=dtype), open_base)
    elif "base" in options.methods:
        policies["base"] = winrate.start(dpo, "sft", "base")
    found = []
    for method in options.methods:
        for temperature in options.temperatures:
            if method == "best_of_n":
                found += winrate.best_of_n(policies[method], temperature, options.counts)
            else:
                found.append(Point(method, policies[method], temperature))
    return found


def main():
    from absl import flags

    dataset = flags.DEFINE_enum("dataset", "tldr", list(DATASETS), "The texts to summarise.")
    path = flags.DEFINE_string(
        "path", "abisee/cnn_dailymail:3.0.0", "cnn_dailymail's hub name or folder."
    )
    base = flags.DEFINE_string(
        "base",
        "",
        "Hub name or folder of the model for the method base. Default: what sft starts from.",
    )

    def start(make_config, workdir, options):
        if dataset.value == "tldr":
            commands.refuse_flags("with --dataset=tldr, which is at config.data.sft_path", "path")
        if "base" not in options.answering:
            commands.refuse_flags("without --method=base", "base")
        run(make_config, workdir, options, dataset.value, path.value, base.value)

    def defaults():
        return DATASETS[dataset.value]

    winrate.main(__doc__, "tldr", CHOICES, defaults, start)


if __name__ == "__main__":
    main()
