"""A run: its config, its folders, and what its stages begin with: model, data, prompts, reward."""

import dataclasses
import json
import pathlib

import jax
from ml_collections import ConfigDict

from dpo_jax import config as configs
from dpo_jax import stage_table
from dpo_jax.console import say
from dpo_jax.data import batches, dataset
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.models import loading, log_probs
from dpo_jax.models.lora import Lora
from dpo_jax.pipeline import preference_pairs
from dpo_jax.rewards import make
from dpo_jax.sampling import prompts
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.stage_table import STAGES
from dpo_jax.workdir import StageChanged, write_json


def versions() -> dict[str, int]:
    """Return the versions of the code that an unfinished stage must find as it was."""
    return dict(
        tokenization=tokenizers.TOKENIZATION_VERSION,
        data_order=batches.DATA_ORDER_VERSION,
        forward=log_probs.FORWARD_VERSION,
    )


@dataclasses.dataclass
class Run:
    """What the stages of a run share."""

    config: ConfigDict
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    _prompts: dict = dataclasses.field(default_factory=dict)  # read once

    def folder(self, stage: str) -> pathlib.Path:
        return self.workdir / configs.folder_names(self.config)[stage]

    def initial(self, stage: str) -> loading.Checkpoint:
        """What a stage starts from: the result of the sft stage before it, or the config's
        model.
        """
        model = self.config.model
        options = configs.model_options(self.config)
        if "sft" in self._before(stage):
            return loading.open_checkpoint(str(self.folder("sft") / "hf"), **options)
        if model.path:
            return loading.open_checkpoint(model.path, tokenizer_path=model.tokenizer, **options)
        return loading.from_scratch(
            model.scratch.to_dict(), self.config.seed, tokenizer_path=model.tokenizer, **options
        )

    def lora(self) -> Lora | None:
        """Which adapters are trained; None: all weights are."""
        block = self.config.model.lora
        return Lora(**block.to_dict()) if block.rank else None

    def load_data(self, stage: str, tokenizer) -> dataset.Dataset:
        """The rows that a stage trains on, tokenised; the ledger is shown, and written to the
        stage's folder.
        """
        kind = "pairs" if STAGES[stage].responses == 2 else "sft"
        data = self.config.data
        if stage_table.trains_on_samples(self.config, stage):
            loaded = preference_pairs.load(self.folder("pairs"), kind)
        else:
            block = self.sft_data() if STAGES[stage].data == "sft" else data
            loaded = dataset.load(block, tokenizer, kind)
        say(loaded.ledger.table())
        if data.show:
            say(dataset.show(loaded.train, tokenizer, range(min(data.show, len(loaded.train)))))
        self.record(
            stage, loaded.ledger.to_dict(), [loaded.train.fingerprint, loaded.eval.fingerprint]
        )
        return loaded

    def sft_data(self) -> ConfigDict:
        """The data block of what sft trains on and of the prompts: the pairs', or that of a set of
        its own.
        """
        data = self.config.data.copy_and_resolve_references()
        if data.sft_path:
            data.update(path=data.sft_path, eval_split="")
        return data

    def load_prompts(self, tokenizer) -> dict[str, Prompts]:
        """The prompts to sample from, of the splits train and eval."""
        if not self._prompts:
            loaded = dataset.load(self.sft_data(), tokenizer, "sft")
            self._prompts = {
                split: prompts.make(examples, tokenizer, self.config.sampling, self.config.seed)
                for split, examples in (("train", loaded.train), ("eval", loaded.eval))
            }
        return self._prompts

    def eval_prompts(self, stage: str, tokenizer) -> Prompts:
        """The first held-out prompts, as many as the stage's block says."""
        found, wanted = self.load_prompts(tokenizer)["eval"], self.config[stage].prompts
        if len(found) < wanted:
            raise ValueError(
                f"config.{stage}.prompts = {wanted}, but there are {len(found)} held-out prompts: lower "
                "it, or hold out more rows (config.data.max_eval_rows)."
            )
        return found.take(range(wanted))

    def reward(self, name: str):
        """The reward of a stage: "true" is config.reward, "rm" the rm stage's model, which stands
        for both where no true one is known.
        """
        return make.make_reward(*self._reward_at(name), self.config.reward.batch_size, self.mesh)

    def reward_model(self, name: str) -> loading.Checkpoint | None:
        """The model of ours behind a stage's reward, if one is."""
        kind, path = self._reward_at(name)
        return loading.open_checkpoint(path, head="reward") if kind in ("rm", "model") else None

    def _reward_at(self, name: str) -> tuple[str, str]:
        block = self.config.reward
        return (
            ("rm", str(self.folder("rm") / "hf"))
            if "rm" in (name, block.kind)
            else (block.kind, block.path)
        )

    def load(self, checkpoint: loading.Checkpoint) -> loading.Model:
        """Load a checkpoint's weights onto the run's mesh."""
        return checkpoint.load(self.mesh, append_eos=self.config.data.append_eos)

    def sampling(self, n: int = 1) -> Sampling:
        """Return how the stages of this run sample: n completions of each prompt."""
        block = self.config.sampling
        return Sampling(
            block.max_new_tokens, n=n, seed=self.config.seed, batch_size=block.batch_size
        )

    def eos_id(self, tokenizer) -> int | None:
        """What ends a completion."""
        return tokenizer.eos_token_id if self.config.data.append_eos else None

    def record(self, stage: str, ledger: dict, fingerprint) -> None:
        """Writes ledger.json; an unfinished stage whose data has changed since it began is
        refused.
        """
        path = self.folder(stage) / "ledger.json"
        if path.exists() and json.loads(path.read_text())["fingerprint"] != fingerprint:
            raise StageChanged(
                f"the data of {self.folder(stage)} has changed since the stage began: its tokens are not those that "
                "the checkpoint was trained on. Put the old data back, or give another --workdir."
            )
        write_json(path, ledger | dict(fingerprint=fingerprint))

    def record_weights(self, stage: str, **models: loading.Checkpoint | None) -> None:
        """Writes weights.json: path and fingerprint of the models of ours, by role, that the stage
        reads again when it goes on. A stage of which one has changed since it began is refused.
        """
        path = self.folder(stage) / "weights.json"
        found = {
            role: dict(path=model.path, fingerprint=model.fingerprint())
            for role, model in models.items()
            if model
        }
        before = json.loads(path.read_text()) if path.exists() else {}
        for role, model in found.items():
            if before.get(role, model)["fingerprint"] != model["fingerprint"]:
                raise StageChanged(
                    f"the weights at {model['path']} have changed since {path.parent} began with them (as its {role}): "
                    "put the old ones back, or give another --workdir."
                )
        if found:
            write_json(path, found)

    def _before(self, stage: str) -> tuple[str, ...]:
        return self.config.stages[: self.config.stages.index(stage)]
