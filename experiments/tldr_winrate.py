"""The paper's figure 2, right, and its table 1: python -m experiments.tldr_winrate --config=FILE
--workdir=DIR \\
    --judge_model=MODEL [--base=NAME_OR_FOLDER]

Summaries of the same test posts by DPO, PPO, Preferred-FT, the supervised model, its base and the
best of N, at several temperatures, against the ones that people wrote; --dataset=cnn_dailymail: DPO
and PPO on news, which none was trained on. MODEL is behind OPENAI_BASE_URL and OPENAI_API_KEY;
--judge=reward takes the run's reward model. What is not trained yet is trained;
--config.FIELD=VALUE changes a field of every run that has it. --dry_run lists what would be done
and the calls. Files: experiments/winrate.py.
"""

from dpo_jax.data import sources
from dpo_jax.models import families, hf
from dpo_jax.models.loading import open_checkpoint
from experiments import winrate
from experiments.winrate import Options, Point, Policy, Task

BASES = {
    "CarperAI/openai_summarize_tldr_sft": "EleutherAI/gpt-j-6b"
}  # a supervised model -> what it was made of
TRAINED = ("dpo", "ppo", "preferred_ft")
METHODS = (*TRAINED, "sft", "base", "best_of_n")
DATASETS = {  # name -> methods, temperatures and template where the command line names none
    "tldr": (METHODS, (0.0, 0.25, 0.5, 0.75, 1.0), "summary_concise"),
    "cnn_dailymail": (("dpo", "ppo"), (0.0, 0.25), "news_concise"),
}


def run(
    make_config,
    workdir: str,
    options: Options,
    dataset: str = "tldr",
    path: str = "",
    base: str = "",
) -> list[dict]:
    """The experiment on a data set, from `path` if that is not the config's posts; a row for each
    win rate.

    base: a model by hub name or folder, for the method base, where it is not what the config's
    stage sft starts from.
    """
    if "base" in options.methods:
        base = find_base(make_config("dpo"), base)
        if base and not options.dry_run:  # before training, as it may not be there
            families.from_hf(hf.read_config(hf.fetch(base, weights=False)))
    trains = tuple(method for method in TRAINED if method in options.methods)
    return winrate.run(
        dataset,
        make_config,
        workdir,
        options,
        trains=trains,
        make_task=lambda runs, options: task(runs, options, dataset, path),
        make_points=lambda runs, options: points(runs, options, base),
    )


def find_base(config, base: str) -> str:
    """The model that the method base is, "" for what the stage sft starts from."""
    if base or "sft" in config.stages:
        return base
    if config.model.path not in BASES:
        raise ValueError(
            f"--method=base: what {config.model.path or 'the model of config.model.scratch'} was "
            "supervised from is not known: pass --base=NAME_OR_FOLDER, or --method for the others."
        )
    return BASES[config.model.path]


def task(runs: dict, options: Options, dataset: str, path: str) -> Task:
    """The first held-out posts, or news articles, and their summaries."""
    data = runs["dpo"].sft_data()
    data.max_eval_rows = 0
    if dataset != "tldr":
        data.update(source=dataset, path=path, max_rows=1, train_split="train", eval_split="")
    splits, _ = sources.read(data, "sft")
    rows = winrate.held_out(splits["eval"], options.prompts)
    return Task(rows, data, shown=text, read=str.strip, rouge=True)


def text(prompt: str) -> str:
    """A post or an article, without what is there for the model."""
    return prompt.removeprefix("Article:").removesuffix(sources.CUE).strip()


def points(runs: dict, options: Options, base: str = "") -> list[Point]:
    """Every method at every temperature."""
    dpo = runs["dpo"]
    policies = {
        method: winrate.trained(runs[method], method) for method in TRAINED if method in runs
    }
    policies["sft"] = policies["best_of_n"] = winrate.start(dpo, "dpo", "sft")
    if base:
        policies["base"] = Policy(
            "base",
            dict(path=base, dtype=dpo.config.model.dtype),
            lambda: open_checkpoint(base, dtype=dpo.config.model.dtype),
        )
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

    dataset = flags.DEFINE_enum("dataset", "tldr", list(DATASETS), "What is summarised.")
    path = flags.DEFINE_string(
        "path", "abisee/cnn_dailymail:3.0.0", "Where cnn_dailymail is: hub name or folder."
    )
    base = flags.DEFINE_string(
        "base", "", "Of the method base: hub name or folder. Default: what sft starts from."
    )

    def start(make_config, workdir, options):
        if dataset.value == "tldr":
            winrate.refuse_flags("with --dataset=tldr, which is at config.data.sft_path", "path")
        if "base" not in options.methods:
            winrate.refuse_flags("without --method=base", "base")
        run(make_config, workdir, options, dataset.value, path.value, base.value)

    winrate.main(__doc__, "tldr", METHODS, lambda: DATASETS[dataset.value], start)


if __name__ == "__main__":
    main()
