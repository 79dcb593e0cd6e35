"""Trains: python -m dpo_jax.train --config=FILE [--config.FIELD=VALUE ...] --workdir=DIR

Runs the stages of the config in order, each in its own folder under WORKDIR. The same command goes on where an
interrupted run stopped, and does nothing where all is done.
"""

import dataclasses
import json
import pathlib

import jax
from ml_collections import ConfigDict

from dpo_jax import config as configs
from dpo_jax import pretrained, runtime, sharding, stages
from dpo_jax.data import dataset
from dpo_jax.evaluation import toy_report
from dpo_jax.fit import Job, fit
from dpo_jax.metrics import say
from dpo_jax.models import hf
from dpo_jax.pairs import make_toy_pairs


@dataclasses.dataclass
class Run:
    """What the stages of a run share."""
    config: ConfigDict
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh

    def folder(self, stage: str) -> pathlib.Path:
        return self.workdir / configs.folder_names(self.config)[stage]

    def initial(self, stage: str) -> pretrained.Pretrained:
        """What a stage starts from: the result of the sft stage before it, or the config's model."""
        before = self.config.stages[:self.config.stages.index(stage)]
        model = self.config.model
        options = dict(tokenizer=model.tokenizer, dtype=model.dtype, remat=model.remat)
        if "sft" in before:
            return pretrained.open_model(str(self.folder("sft") / "hf"), **(options | dict(tokenizer="")))
        if model.path:
            return pretrained.open_model(model.path, **options)
        return pretrained.from_scratch(model.scratch.to_dict(), self.config.seed, **options)

    def load_data(self, stage: str, tokenizer) -> dataset.Dataset:
        """The stage's rows, tokenised; the ledger is shown, and written to the stage's folder."""
        before = self.config.stages[:self.config.stages.index(stage)]
        data = self.config.data.copy_and_resolve_references()
        if stage == "dpo" and "pairs" in before:
            data.update(source="local", path=str(self.folder("pairs")), train_split="pairs", eval_split="test")
        loaded = dataset.load(data, tokenizer, "pairs" if stage == "dpo" else "sft")
        say(loaded.ledger.table())
        if data.show:
            say(dataset.show(loaded.train, tokenizer, range(min(data.show, len(loaded.train)))))
        self._record(stage, loaded)
        return loaded

    def _record(self, stage, loaded):
        """Writes ledger.json; an unfinished stage whose data has changed since it began is refused."""
        path = self.folder(stage) / "ledger.json"
        ledger = loaded.ledger.to_dict() | dict(fingerprint=[loaded.train.fingerprint(), loaded.eval.fingerprint()])
        if path.exists() and json.loads(path.read_text())["fingerprint"] != ledger["fingerprint"]:
            raise stages.StageChanged(
                f"the data of {self.folder(stage)} has changed since the stage began: its tokens are not those that "
                "the checkpoint was trained on. Put the old data back, or give another --workdir.")
        stages.write_json(path, ledger)


def train_stage(run: Run, stage: str) -> dict:
    """sft or dpo: trains, and exports the result to hf/."""
    block, folder = run.config[stage], run.folder(stage)
    initial = run.initial(stage)
    data = run.load_data(stage, initial.tokenizer)
    initial.check(data.train)
    initial.check(data.eval)
    reference = _reference(run, stage, initial)
    job = Job(
        name=stage, folder=folder, block=block, seed=run.config.seed if run.config.data.shuffle else None,
        model=initial.config, mesh=run.mesh, shapes=initial.shapes, load_init=lambda: initial.load(run.mesh),
        load_reference=lambda: reference.load(run.mesh) if reference else None,
        reference_is_init=reference is initial, data=data,
        show_row=lambda row: dataset.show(data.train, initial.tokenizer, [row]),
        eos_id=initial.tokenizer.eos_token_id if run.config.data.append_eos else None,
        log=run.config.log, config=json.loads(run.config.to_json()),
        probe=toy_report.probe(initial, initial.load(run.mesh)) if _is_toy(run, stage) else None)
    params, evaluated = fit(job)
    hf.save(folder / "hf", initial.config, initial.hf_config, params, initial.tokenizer)
    say(f"{stage}: exported to {folder / 'hf'}")
    return dict(evaluation=evaluated)


def _reference(run: Run, stage: str, initial):
    """The reference model of dpo: the initial weights, none, or those at a path."""
    if stage != "dpo" or run.config.dpo.reference == "none":
        return None
    if run.config.dpo.reference == "init":
        return initial
    model = run.config.model
    other = pretrained.open_model(run.config.dpo.reference, dtype=model.dtype, remat=model.remat,
                                  words=initial.tokenizer)
    if other.config.vocab != initial.config.vocab:
        raise ValueError(f"config.dpo.reference = {run.config.dpo.reference!r} has a vocabulary of "
                         f"{other.config.vocab}, the policy one of {initial.config.vocab}: they cannot be compared.")
    return other


def _is_toy(run: Run, stage: str) -> bool:
    return run.config.data.source == "toy" and stage == "dpo"


def pairs_stage(run: Run, stage: str) -> dict:
    """Preference pairs sampled from the model that the stages before made."""
    model = run.initial(stage)
    return make_toy_pairs(model, model.load(run.mesh), run.config[stage], run.config.seed, run.folder(stage))


def evaluate_stage(run: Run, stage: str) -> dict:
    """The trained policy's reward and KL, beside the best that any policy can do."""
    start = run.initial("dpo")
    return toy_report.write(run.folder(stage), run.folder("dpo"), start, start.load(run.mesh), run.config.dpo.beta)


STAGES = {"sft": train_stage, "pairs": pairs_stage, "dpo": train_stage, "evaluate": evaluate_stage}


def run_stages(config: ConfigDict, workdir: str) -> None:
    """Runs every stage that is not done yet; ValueError for a wrong config, StageChanged for a changed one."""
    configs.validate(config)
    run = Run(config, pathlib.Path(workdir), sharding.make_mesh(**config.mesh))
    for stage in config.stages:
        folder = run.folder(stage)
        with stages.lock(folder):
            _, status = stages.start(run.workdir, config, stage)
            if status == "done":
                say(f"{stage}: done before, in {folder}")
            else:
                stages.finish(folder, **STAGES[stage](run, stage))
    say(f"all stages done, in {workdir}")


def main():
    # Flags are made here, not on import, so that the module can be imported by others.
    from absl import app, flags
    from ml_collections import config_flags
    config = config_flags.DEFINE_config_file("config", None, "The config file; see configs/.")
    workdir = flags.DEFINE_string("workdir", None, "Where the run's folders are.")
    flags.mark_flags_as_required(["config", "workdir"])
    runtime.start()
    app.run(lambda _: run_stages(config.value, workdir.value))


if __name__ == "__main__":
    main()
