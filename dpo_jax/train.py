"""Trains: python -m dpo_jax.train --config=FILE [--config.FIELD=VALUE ...] --workdir=DIR

Runs the stages of the config in order, each in its own folder under WORKDIR. The same command goes on where an
interrupted run stopped, and does nothing where all is done.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from dpo_jax import config as configs
from dpo_jax import pairs, pretrained, prompts, rewards, runtime, sharding, stages
from dpo_jax.data import dataset
from dpo_jax.evaluation import best_of_n, policy, toy_report
from dpo_jax.fit import DataFeed, Job, fit
from dpo_jax.metrics import say
from dpo_jax.models import hf, peft, transformer
from dpo_jax.models import lora as adapters
from dpo_jax.models.lora import Lora
from dpo_jax.ppo import RolloutFeed
from dpo_jax.prompts import Prompts
from dpo_jax.reference import ReferenceCache


@dataclasses.dataclass
class Run:
    """What the stages of a run share."""
    config: ConfigDict
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    _prompts: dict = dataclasses.field(default_factory=dict)  # read once

    def folder(self, stage: str) -> pathlib.Path:
        return self.workdir / configs.folder_names(self.config)[stage]

    def initial(self, stage: str) -> pretrained.Pretrained:
        """What a stage starts from: the result of the sft stage before it, or the config's model."""
        model = self.config.model
        options = configs.model_options(self.config)
        if "sft" in self._before(stage):
            return pretrained.open_model(str(self.folder("sft") / "hf"), **options)
        if model.path:
            return pretrained.open_model(model.path, tokenizer=model.tokenizer, **options)
        return pretrained.from_scratch(model.scratch.to_dict(), self.config.seed, tokenizer=model.tokenizer, **options)

    def lora(self) -> Lora | None:
        """Which adapters are trained; None: all weights are."""
        block = self.config.model.lora
        return Lora(**block.to_dict()) if block.rank else None

    def load_data(self, stage: str, tokenizer) -> dataset.Dataset:
        """The rows that a stage trains on, tokenised; the ledger is shown, and written to the stage's folder."""
        kind = "sft" if stage in ("sft", "preferred_ft") else "pairs"
        data = self.config.data
        if stage in configs.PAIR_STAGES and "pairs" in self._before(stage):
            loaded = pairs.load(self.folder("pairs"), kind)
        else:
            loaded = dataset.load(self.sft_data() if stage == "sft" else data, tokenizer, kind)
        say(loaded.ledger.table())
        if data.show:
            say(dataset.show(loaded.train, tokenizer, range(min(data.show, len(loaded.train)))))
        self.record(stage, loaded.ledger.to_dict(), [loaded.train.fingerprint, loaded.eval.fingerprint])
        return loaded

    def sft_data(self) -> ConfigDict:
        """The data block of what sft trains on and of the prompts: the pairs', or that of a set of its own."""
        data = self.config.data.copy_and_resolve_references()
        if data.sft_path:
            data.update(path=data.sft_path, eval_split="")
        return data

    def load_prompts(self, tokenizer) -> dict[str, Prompts]:
        """The prompts to sample from, of the splits train and eval."""
        if not self._prompts:
            loaded = dataset.load(self.sft_data(), tokenizer, "sft")
            self._prompts = {split: prompts.make(examples, tokenizer, self.config.sampling, self.config.seed)
                             for split, examples in (("train", loaded.train), ("eval", loaded.eval))}
        return self._prompts

    def eval_prompts(self, stage: str, tokenizer) -> Prompts:
        """The first held-out prompts, as many as the stage's block says."""
        found, wanted = self.load_prompts(tokenizer)["eval"], self.config[stage].prompts
        if len(found) < wanted:
            raise ValueError(f"config.{stage}.prompts = {wanted}, but there are {len(found)} held-out prompts: lower "
                             "it, or hold out more rows (config.data.max_eval_rows).")
        return found.take(range(wanted))

    def reward(self, name: str):
        """The reward of a stage: "true" is config.reward, "rm" the rm stage's model, which stands for both where no
        true one is known."""
        return rewards.make(*self._reward_at(name), self.config.reward.batch_size, self.mesh)

    def reward_model(self, name: str) -> pretrained.Pretrained | None:
        """The model of ours behind a stage's reward, if one is."""
        kind, path = self._reward_at(name)
        return pretrained.open_model(path, head="score") if kind in ("rm", "model") else None

    def _reward_at(self, name: str) -> tuple[str, str]:
        block = self.config.reward
        return ("rm", str(self.folder("rm") / "hf")) if "rm" in (name, block.kind) else (block.kind, block.path)

    def eos_id(self, tokenizer) -> int | None:
        """What ends a completion."""
        return tokenizer.eos_token_id if self.config.data.append_eos else None

    def record(self, stage: str, ledger: dict, fingerprint) -> None:
        """Writes ledger.json; an unfinished stage whose data has changed since it began is refused."""
        path = self.folder(stage) / "ledger.json"
        if path.exists() and json.loads(path.read_text())["fingerprint"] != fingerprint:
            raise stages.StageChanged(
                f"the data of {self.folder(stage)} has changed since the stage began: its tokens are not those that "
                "the checkpoint was trained on. Put the old data back, or give another --workdir.")
        stages.write_json(path, ledger | dict(fingerprint=fingerprint))

    def record_weights(self, stage: str, **models: pretrained.Pretrained | None) -> None:
        """Writes weights.json: path and fingerprint of the models of ours, by role, that the stage reads again when it
        goes on. A stage of which one has changed since it began is refused."""
        path = self.folder(stage) / "weights.json"
        found = {role: dict(path=model.path, fingerprint=model.fingerprint())
                 for role, model in models.items() if model}
        before = json.loads(path.read_text()) if path.exists() else {}
        for role, model in found.items():
            if before.get(role, model)["fingerprint"] != model["fingerprint"]:
                raise stages.StageChanged(
                    f"the weights at {model['path']} have changed since {path.parent} began with them (as its {role}): "
                    "put the old ones back, or give another --workdir.")
        if found:
            stages.write_json(path, found)

    def _before(self, stage: str) -> tuple[str, ...]:
        return self.config.stages[:self.config.stages.index(stage)]


def train_stage(run: Run, stage: str) -> dict:
    """Trains, and exports the result to hf/, and adapters to adapter/ besides."""
    block, folder, lora = run.config[stage], run.folder(stage), run.lora()
    initial = run.initial(stage)
    model = dataclasses.replace(initial.config, head=HEADS.get(stage, "lm"))
    load = functools.partial(_load, run, model, initial)
    load_initial = functools.cache(load)  # reference, probe and adapters share it; what is trained is another copy
    reference = _reference(run, stage, initial)
    probe = _probe(run, stage, initial, load_initial)
    run.record_weights(stage, base=initial if lora else None, reference=reference, start=initial if probe else None,
                       reward=run.reward_model(block.reward) if stage == "ppo" else None)
    if lora:
        _say_what_is_trained(stage, initial, adapters.abstract(model, lora))
        load = functools.partial(_init_adapters, run, model, lora)
    if reference is initial:  # under adapters, the base through the policy's own program: they start with no effect
        load_reference = load if lora else load_initial
    else:
        load_reference = reference and functools.partial(reference.load, run.mesh)
    cache = None
    if stage == "dpo" and block.cache_reference:
        cache = ReferenceCache(run.workdir, reference, run.mesh, block.microbatch_size or block.batch_size)
    job = Job(
        name=stage, folder=folder, block=block, model=model, mesh=run.mesh, load_init=load,
        load_reference=load_reference if reference and not cache else lambda: None,
        log=run.config.log, config=json.loads(run.config.to_json()),
        probe=probe, lora=lora, load_base=load_initial if lora else lambda: None)
    params, evaluated = fit(job, _feed(run, stage, job, initial, reference, cache))
    if lora:
        peft.save(folder / "adapter", model, initial.hf_config, lora, params, base=initial.path)
        params = adapters.merge(load_initial(), params, lora)
    if model.head == "lm_value":
        model, params = initial.config, _without_value(initial.config, params)
    hf.save(folder / "hf", model, initial.hf_config, params, initial.tokenizer)
    say(f"{stage}: exported to {folder / 'hf'}")
    return dict(evaluation=evaluated)


HEADS = {"rm": "score", "ppo": "lm_value"}  # stage -> the head it trains, where that is not the language model's


def _feed(run: Run, stage: str, job: Job, initial, reference, cache: ReferenceCache | None):
    """Where the stage's steps come from: the policy's own completions for ppo, rows of data for all others."""
    config = run.config
    if stage == "ppo":
        prompts = run.load_prompts(initial.tokenizer)["train"]
        run.record(stage, dict(prompts=len(prompts)), prompts.fingerprint)
        return RolloutFeed(job, prompts, run.reward(job.block.reward),
                           tokenizer=initial.tokenizer, eos_id=run.eos_id(initial.tokenizer),
                           sampling=config.sampling, seed=config.seed)
    data = run.load_data(stage, initial.tokenizer)
    initial.check(data.train)
    initial.check(data.eval)
    sampled = stage in configs.PAIR_STAGES and "pairs" in config.stages  # may end by length, without EOS
    return DataFeed(job, data, seed=config.seed + job.block.get("seed", 0) if config.data.shuffle else None,
                    eos_id=None if sampled else run.eos_id(initial.tokenizer),
                    reference_is_init=reference is initial, reference_logps=cache and cache.logps,
                    show_row=lambda row: dataset.show(data.train, initial.tokenizer, [row]))


def _reference(run: Run, stage: str, initial):
    """The reference model of dpo and ppo: the initial weights, none, or those at a path."""
    name = {"dpo": run.config.get("dpo", {}).get("reference"), "ppo": "init"}.get(stage, "none")
    if name == "none":
        return None
    if name == "init":
        return initial
    other = pretrained.open_model(name, words=initial.tokenizer, **configs.model_options(run.config))
    if other.config.vocab != initial.config.vocab:
        raise ValueError(f"config.dpo.reference = {name!r} has a vocabulary of "
                         f"{other.config.vocab}, the policy one of {initial.config.vocab}: they cannot be compared.")
    return other


def _load(run: Run, model, initial) -> dict:
    """The initial weights, with the stage's own head, which starts from 0."""
    params = initial.load(run.mesh)
    if model.head == "lm":
        return params
    placed = sharding.param_shardings(run.mesh, transformer.abstract(model))["head"]["scalar"]
    head = {"scalar": jax.device_put(np.zeros(model.width, np.float32), placed)}
    return params | {"head": head | (params.get("head", {}) if model.head == "lm_value" else {})}


def _init_adapters(run: Run, model, lora: Lora) -> dict:
    """What is trained instead of the weights: the same numbers on any mesh."""
    values = adapters.init(model, lora, run.config.seed)
    return jax.tree.map(lambda x, placed: jax.make_array_from_callback(x.shape, placed, lambda index: x[index]),
                        values, sharding.param_shardings(run.mesh, values))


def _say_what_is_trained(stage: str, initial, shapes) -> None:
    size, whole = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (shapes, initial.shapes))
    say(f"{stage}: LoRA trains {size:,} numbers over the {whole:,} of {initial.path} "
        f"(sha256 {initial.fingerprint()[:16]})")


def _without_value(model, params):
    """A policy's weights without PPO's value head."""
    shapes = transformer.abstract(model)
    return {name: params[name] if name != "head" else {part: params["head"][part] for part in shapes["head"]}
            for name in shapes}


def _probe(run: Run, stage: str, initial, load_initial):
    """What is measured of a policy at each evaluation where an `evaluate` stage follows, or None."""
    if "evaluate" not in run.config.stages or stage not in configs.POLICY_STAGES:
        return None
    if run.config.data.source == "toy":
        with jax.set_mesh(run.mesh):
            return toy_report.probe(initial, load_initial(), run.config.reward.kind)
    measure = policy_measure(run, initial)
    return lambda params: measure(params, load_initial())[0]


def policy_measure(run: Run, model: pretrained.Pretrained):
    """(policy's weights, reference's) -> (values, rows) on the held-out prompts of the evaluate stage."""
    held_out = run.eval_prompts("evaluate", model.tokenizer)
    reward = run.reward("true")

    def measure(params, reference):
        return policy.evaluate(
            model.config, run.mesh, params, reference, held_out, model.tokenizer, reward,
            max_new_tokens=run.config.sampling.max_new_tokens, batch_size=run.config.sampling.batch_size,
            seed=run.config.seed, eos_id=run.eos_id(model.tokenizer))
    return measure


def pairs_stage(run: Run, stage: str) -> dict:
    """Preference pairs sampled from the model that the stages before made, labelled by the true reward."""
    model, block = run.initial(stage), run.config.pairs
    found = run.load_prompts(model.tokenizer)
    if len(found["train"]) < block.prompts:
        raise ValueError(f"config.pairs.prompts = {block.prompts}, but there are {len(found['train'])} training "
                         "prompts: lower it, or take more rows (config.data.train_split, config.data.max_rows).")
    run.record_weights(stage, policy=model, reward=run.reward_model("true"))
    chosen = np.random.default_rng(run.config.seed).permutation(len(found["train"]))[:block.prompts]
    held_out = found["eval"].take(range(min(pairs.EVAL_PROMPTS, len(found["eval"]))))
    return pairs.make_pairs(
        model.config, run.mesh, model.load(run.mesh), dict(train=found["train"].take(chosen), eval=held_out),
        model.tokenizer, run.reward("true"), block, run.config.sampling, seed=run.config.seed,
        eos_id=run.eos_id(model.tokenizer), folder=run.folder(stage))


def evaluate_stage(run: Run, stage: str) -> dict:
    """The trained policy's reward and KL to where it began."""
    trained = [before for before in run.config.stages if before in configs.POLICY_STAGES][-1]
    start = run.initial(trained)
    if run.config.data.source == "toy":
        beta = run.config.dpo.beta if trained == "dpo" else None
        with jax.set_mesh(run.mesh):
            return toy_report.write(run.folder(stage), run.folder(trained), start, start.load(run.mesh),
                                    run.config.reward.kind, beta)
    end = pretrained.open_model(str(run.folder(trained) / "hf"), dtype=run.config.model.dtype)
    measure, reference = policy_measure(run, start), start.load(run.mesh)
    values, rows = measure(end.load(run.mesh), reference)
    _, before = measure(reference, reference)
    say(policy.side_by_side(rows[:run.config.evaluate.show], before))
    stages.write_lines(run.folder(stage) / "completions.jsonl", rows)
    stages.write_json(run.folder(stage) / "evaluate.json", dict(policy=trained, **values))
    say(policy.table(values))
    return values


def best_of_n_stage(run: Run, stage: str) -> dict:
    """The best of N completions of the model that the stages before made, for each N."""
    model, block = run.initial(stage), run.config.best_of_n
    held_out = run.eval_prompts(stage, model.tokenizer)
    run.record_weights(stage, policy=model, reward=run.reward_model(block.reward), true=run.reward_model("true"))
    return best_of_n.write(
        run.folder(stage), model.config, run.mesh, model.load(run.mesh), held_out, model.tokenizer,
        run.reward("true"), run.reward(block.reward), counts=block.n, sampling=run.config.sampling,
        seed=run.config.seed, eos_id=run.eos_id(model.tokenizer))


STAGES = {**dict.fromkeys(configs.TRAINING_STAGES, train_stage), "pairs": pairs_stage, "best_of_n": best_of_n_stage,
          "evaluate": evaluate_stage}


def run_stages(config: ConfigDict, workdir: str) -> None:
    """Runs every stage that is not done yet; ValueError for a wrong config, StageChanged for a changed one."""
    configs.validate(config)
    runtime.check_shared(workdir)
    run = Run(config, pathlib.Path(workdir), sharding.make_mesh(**config.mesh))
    ahead = {stage for stage in config.stages if not (run.folder(stage) / "done.json").exists()}
    if ahead & set(configs.SAMPLING_STAGES):
        rewards.check(config.reward.kind, config.reward.path)
    for stage in config.stages:
        folder = run.folder(stage)
        with stages.lock(folder):
            _, status = runtime.from_first(functools.partial(stages.start, run.workdir, config, stage))
            if status == "done":
                say(f"{stage}: done before, in {folder}")
            else:
                stages.finish(folder, **STAGES[stage](run, stage))
    runtime.wait_for_all("all stages")  # whose files the others may read
    say(f"all stages done, in {workdir}")


def main():
    # Flags are made here, not on import, so that the module can be imported by others.
    from absl import flags
    from ml_collections import config_flags
    config = config_flags.DEFINE_config_file("config", None, "The config file; see configs/.")
    workdir = flags.DEFINE_string("workdir", None, "Where the run's folders are.")
    flags.mark_flags_as_required(["config", "workdir"])
    runtime.run(lambda _: run_stages(config.value, workdir.value))


if __name__ == "__main__":
    main()
