"""A run: its config and folders, and what stages begin with: models, data, prompts, rewards."""

import dataclasses
import datetime
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from dpo_jax import config as configs
from dpo_jax import stage_table
from dpo_jax.console import say, warn
from dpo_jax.data import batches, dataset, draws, leaks, toy
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data.examples import Examples
from dpo_jax.data.ledger import Counts, Reading
from dpo_jax.data.splits import SPLITS
from dpo_jax.models import loading, log_probs
from dpo_jax.models.lora import Lora
from dpo_jax.parallel import agreement
from dpo_jax.pipeline import exports, leak_checks, preference_pairs
from dpo_jax.rewards import make
from dpo_jax.sampling import prompts
from dpo_jax.sampling.prompts import Conversation, Prompts
from dpo_jax.sampling.sampler import Sampling
from dpo_jax.stage_table import STAGES
from dpo_jax.storage.addresses import shown
from dpo_jax.training.checkpoint import CHECKPOINT_VERSION
from dpo_jax.workdir import StageChanged, read_ledger, read_weights, write_record

# Recorded for functions that were given from Python: as config.reward.kind, and in config.dpo.loss
# before the function's name.
FUNCTION = "function"
# What later rounds draw at random, each with a branch of config.seed: new ones go to the end.
PURPOSES = ("sampling", "data order", "adapters", "judging")


def versions() -> dict[str, int]:
    """Return the versions of the code that an unfinished stage must find as it was."""
    return dict(
        tokenization=tokenizers.TOKENIZATION_VERSION,
        data_order=batches.DATA_ORDER_VERSION,
        forward=log_probs.FORWARD_VERSION,
        checkpoint=CHECKPOINT_VERSION,
    )


@dataclasses.dataclass
class Run:
    """The state that the stages of a round share."""

    config: ConfigDict  # config.rounds is the number of this round
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    rounds: int = 1  # of the whole run
    reward_function: Callable | None = None  # the true reward, where config.reward.kind is FUNCTION
    loss: Callable | None = None  # replaces the loss that config.dpo.loss names
    # What chat templates take for today: the day on which the stage at work was started.
    date: datetime.date = dataclasses.field(default_factory=datetime.date.today)
    _prompts: dict = dataclasses.field(default_factory=dict)  # by date; read once
    _ledgers: dict = dataclasses.field(default_factory=dict)  # of those prompts, by date
    _warned: set = dataclasses.field(default_factory=set)  # stages that few prompts were told of

    def folder(self, stage: str) -> pathlib.Path:
        """Return the stage's folder under WORKDIR."""
        return self.workdir / configs.folder_names(self.config)[stage]

    def of_round(self, number: int) -> "Run":
        """Return the same run in another round, with the prompts that were read already."""
        return dataclasses.replace(self, config=configs.of_round(self.config, number))

    def is_last(self, stage: str) -> bool:
        """Return whether no other stage of the run trains after a stage that trains."""
        return self.config.rounds >= self.rounds and self.is_last_of_round(stage)

    def is_last_of_round(self, stage: str) -> bool:
        """Return whether no other stage of the round trains after a stage that trains."""
        return stage == stage_table.training_stages(self.config)[-1]

    def initial(self, stage: str) -> loading.Checkpoint:
        """Return what a stage starts from.

        It is the policy of the round before; in round 1, and for a reward model in any round, the
        result of sft before it, or the config's model.
        """
        is_later_round = self.config.rounds > 1 and stage_table.repeats(self.config, stage)
        if is_later_round and STAGES[stage].head != "reward":
            (policy,) = stage_table.policy_stages(self.config)
            before = self.of_round(self.config.rounds - 1)
            return self._result(before.folder(policy))
        return self.first(stage)

    def first(self, stage: str) -> loading.Checkpoint:
        """Return what a stage starts from in round 1."""
        model = self.config.model
        options = configs.model_options(self.config)
        options["max_length"] = configs.longest_sequence(self.config)
        if "sft" in self._before(stage):
            return self._result(self.folder("sft"))
        if model.path:
            return loading.open_checkpoint(model.path, tokenizer_path=model.tokenizer, **options)
        return loading.from_scratch(
            model.scratch.to_dict(), self.config.seed, tokenizer_path=model.tokenizer, **options
        )

    def _result(self, folder: pathlib.Path) -> loading.Checkpoint:
        """Return the model that a finished stage has left in its folder."""
        # It carries its tokenizer with it, whatever config.model.tokenizer says.
        options = configs.model_options(self.config)
        checkpoint = loading.open_checkpoint(str(folder / "hf"), **options)
        # It is stored exactly, in float32, whatever the type of its own source.
        dtype = exports.source_dtype(folder) or checkpoint.source.dtype
        source = dataclasses.replace(checkpoint.source, dtype=dtype)
        return dataclasses.replace(checkpoint, source=source)

    def seed(self, stage: str, purpose: str) -> int:
        """Return a stage's seed for one of PURPOSES in this round.

        It is config.seed, or that of a later round, plus the stage's own.
        """
        own = self.config[stage].seed
        if self.config.rounds == 1:
            return self.config.seed + own
        branch = (PURPOSES.index(purpose), self.config.rounds)
        sequence = np.random.SeedSequence(self.config.seed, spawn_key=branch)
        (seed,) = sequence.generate_state(1)
        return int(seed) + own

    def load(self, checkpoint: loading.Checkpoint) -> loading.Model:
        """Load a checkpoint's weights onto the run's mesh."""
        return checkpoint.load(self.mesh, append_eos=self.config.data.append_eos)

    def lora(self) -> Lora | None:
        """Return the adapters that are trained, or None where all weights are."""
        block = self.config.model.lora
        return Lora(**block.to_dict()) if block.rank else None

    def load_data(self, stage: str, tokenizer) -> dataset.Dataset:
        """Read and tokenise the examples that a stage trains on.

        Shows the ledger, writes it to the stage's folder, and refuses a resumed stage whose data
        has changed.
        """
        kind = STAGES[stage].kind
        distinct = self.config[stage].get("distinct", False)
        gathered = leaks.Gathered()
        is_sampled = stage_table.trains_on_samples(self.config, stage)
        if is_sampled:
            source = str(self.folder("pairs"))
            loaded = preference_pairs.load(self.folder("pairs"), kind, distinct)
        else:
            data = self.sft_data() if STAGES[stage].data == "sft" else self.config.data
            source = _source(data)
            loaded = dataset.load(
                data, tokenizer, kind, date=self.date, distinct=distinct, watch=gathered.add
            )
        _check_same_tokens(source, dict(train=loaded.train, eval=loaded.eval))

        say(loaded.ledger.table())
        ledger = loaded.ledger.to_dict()
        fingerprints = [*loaded.train.fingerprints, *loaded.eval.fingerprints]
        # Prompts of sampled pairs are those of the stage pairs.
        if not is_sampled:
            # First, as a stage that is refused keeps what it has written.
            self.check_fingerprint(stage, fingerprints)
            seen = {split: gathered.hashes(split, getattr(loaded, split).where) for split in SPLITS}
            seen["train"] = gathered.trained_on(loaded.train.where)
            ledger["leaks"] = leak_checks.report(self, stage, source, seen)
            leak_checks.check_ahead(self, stage, tokenizer)
        if kind == "unpaired":
            _check_can_be_mismatched(stage, source, loaded)
            _say_of_labels(stage, loaded.ledger.train, self.config[stage])
        shown = min(self.config.data.show, len(loaded.train))
        if shown:
            say(dataset.show(loaded.train, tokenizer, range(shown)))
        self.record(stage, ledger, fingerprints)
        return loaded

    def sft_data(self) -> ConfigDict:
        """Return the data block of sft and of prompts: config.data, at data.sft_path if given."""
        return configs.sft_data(self.config)

    def load_prompts(self, tokenizer) -> dict[str, Prompts]:
        """Return the prompts to sample from, of the splits train, eval (validation) and test."""
        if self.date not in self._prompts:
            data = self.sft_data()
            read = {split: [] for split in SPLITS}
            gathered = leaks.Gathered()

            def watch(split, text):
                # Of a whole conversation, the turns that are sampled from are asked, and no others.
                gathered.add(split, dataclasses.replace(text, is_conversation=False))
                # A reward model or a judge may read conversations in its own way.
                is_chat = isinstance(text.prompt, list)
                conversation = Conversation(text.prompt, text.tools) if is_chat else None
                read[split].append((text.where, conversation))

            loaded = dataset.load(data, tokenizer, "prompts", date=self.date, watch=watch)
            for line in loaded.ledger.test.drops():
                warn(f"test prompts that cannot be read are left out: {line}")
            found = {}
            for split in SPLITS:
                # What is held out is the same under every seed.
                seed = self.config.seed if split == "train" else None
                found[split] = prompts.make(
                    getattr(loaded, split),
                    tokenizer,
                    self.config.sampling,
                    seed,
                    read[split],
                    gathered.hashes(split),
                )
            _check_same_tokens(_source(data), found)
            self._prompts[self.date] = found
            self._ledgers[self.date] = loaded.ledger
        return self._prompts[self.date]

    def training_prompts(self, stage: str, tokenizer) -> Prompts:
        """Return the prompts that a stage learns to complete, and write its ledger."""
        loaded = self.load_prompts(tokenizer)
        prompts = loaded["train"]
        self.check_fingerprint(stage, prompts.fingerprint)
        seen = dict(train=prompts.hashes)
        found = leak_checks.report(self, stage, _source(self.sft_data()), seen)
        found |= leak_checks.prefixes(self, loaded["eval"], prompts)
        leak_checks.check_ahead(self, stage, tokenizer)
        self.record(stage, dict(prompts=len(prompts), leaks=found), prompts.fingerprint)
        return prompts

    def validation_prompts(self, most: int, tokenizer) -> Prompts:
        """Return prompts that training may be evaluated on, `most` where there are as many."""
        found = self.load_prompts(tokenizer)["eval"].spread(most)
        return leak_checks.with_clusters(self, found)

    def test_prompts(
        self, stage: str, tokenizer, later: Callable[[], list[leaks.Seen]] = list
    ) -> leak_checks.Judged:
        """Return prompts that results are reported on, of which the stage takes as many as it asks.

        Training has not been evaluated on them, unless too few are held out to be divided. later:
        as for `leak_checks.judged`. Raises ValueError where there are fewer, or where one is
        trained on and config.data.on_leak is to stop the run.
        """
        loaded = self.load_prompts(tokenizer)
        kind = "test" if len(loaded["test"]) else "held-out"
        held_out = loaded["test"] if len(loaded["test"]) else loaded["eval"]
        prompts = leak_checks.judged(self, stage, held_out, loaded["train"], later)
        found = leak_checks.Judged(prompts, len(held_out), kind)
        wanted = self.config[stage].prompts
        if len(prompts) < wanted:
            told = f"; {found.told()}" if found.told() else ""
            raise ValueError(
                f"config.{stage}.prompts = {wanted}, but there are only {len(prompts)} {kind} "
                f"prompts{told}. Lower it, or hold out more ({self._limit_of_held_out(kind)})."
            )
        return found

    def _limit_of_held_out(self, kind: str) -> str:
        """Return which field limits the held-out prompts, and its value, as a part of an error."""
        data = self.sft_data()
        ledger = self._ledgers[self.date]
        counts = ledger.test if kind == "test" else ledger.eval
        if counts.not_drawn:
            return f"config.data.max_eval_rows = {data.max_eval_rows}"
        if not ledger.train.held_out and ledger.eval.read:
            return "rows of the data's own split to evaluate on"
        half = ", of which about half are tested on" if kind == "test" else ""
        return f"config.data.eval_fraction = {data.eval_fraction:g}{half}"

    def say_of_test_prompts(self, stage: str, tokenizer) -> None:
        """Warn, once, where a stage reports on prompts that training was evaluated on."""
        if len(self.load_prompts(tokenizer)["test"]) or stage in self._warned:
            return
        self._warned.add(stage)
        warn(
            f"{stage}: too few prompts are held out to keep some for testing alone, so it "
            "reports on those that training is evaluated on. Hold out more of them, "
            f"{2 * draws.FEWEST_IN_HALF} or a few more ({self._limit_of_held_out('held-out')})."
        )

    def is_measured_exactly(self) -> bool:
        """Return whether reward and KL are exact, as on the toy under a reward of its own."""
        return self.config.data.source == "toy" and self.config.reward.kind in toy.REWARDS

    def reward(self, name: str) -> Callable:
        """Return a stage's reward: "true" (config.reward) or "rm" (the rm stage's model).

        Where no true reward is known, config.reward.kind is rm, and both are that model.
        """
        kind, path = self._reward_at(name)
        if kind == FUNCTION:
            return self.reward_function
        reward = self.config.reward
        return make.make_reward(kind, path, reward.batch_size, self.mesh, reward.on_long, self.date)

    def reward_model(self, name: str) -> loading.Checkpoint | None:
        """Return the reward model behind a stage's reward, or None where there is none."""
        kind, path = self._reward_at(name)
        if kind in ("rm", "model"):
            return loading.open_checkpoint(path, head="reward")
        return None

    def _reward_at(self, name: str) -> tuple[str, str]:
        """Return the kind and the path of a stage's reward."""
        block = self.config.reward
        # The run's own reward model, trained by an earlier stage.
        if name == "rm" or block.kind == "rm":
            return "rm", str(self.folder("rm") / "hf")
        return block.kind, block.path

    def sampling(self, seed: int, n: int = 1) -> Sampling:
        """Return how the stages of this run sample: n completions of each prompt."""
        block = self.config.sampling
        return Sampling(block.max_new_tokens, n=n, seed=seed, batch_size=block.batch_size)

    def measuring(self, stage: str) -> Sampling:
        """Return how evaluate or best_of_n samples: with the same draws in all rounds."""
        return self.sampling(self.config.seed + self.config[stage].seed)

    def eos_id(self, tokenizer) -> int | None:
        """Return the token that ends a completion, if one does."""
        return tokenizer.eos_token_id if self.config.data.append_eos else None

    def check_fingerprint(self, stage: str, fingerprint) -> None:
        """Raise StageChanged where the data of a resumed stage has changed since it began."""
        folder = self.folder(stage)
        before = read_ledger(folder) if (folder / "ledger.json").exists() else {}
        if not before or before.get("fingerprint") == fingerprint:
            return
        # Ledgers of rows and of prompts, from before rows were drawn by a hash.
        lacks_test = "eval" in before and "test" not in before
        lacks_leaks = "prompts" in before and "leaks" not in before
        if lacks_test or lacks_leaks:
            raise StageChanged.with_other_rows(folder)
        raise StageChanged(
            f"the data of {folder} has changed since the stage began: its tokens are not those "
            "that the checkpoint was trained on. Put the old data back, or give another --workdir."
        )

    def record(self, stage: str, ledger: dict, fingerprint) -> None:
        """Write ledger.json; raise StageChanged where the data of a resumed stage has changed."""
        self.check_fingerprint(stage, fingerprint)
        path = self.folder(stage) / "ledger.json"
        write_record(path, ledger | dict(fingerprint=fingerprint))

    def record_reading(self, stage: str, reading: Reading) -> None:
        """Add to ledger.json how many tokens the stage reads."""
        if jax.process_index():  # process 0 wrote the file
            return
        path = self.folder(stage) / "ledger.json"
        ledger = read_ledger(path.parent)
        write_record(path, ledger | dict(reading=dataclasses.asdict(reading)))

    def record_weights(self, stage: str, **checkpoints: loading.Checkpoint | None) -> None:
        """Write weights.json: path and fingerprint of each model, by its role in the stage.

        They are those that the stage reads again when it is resumed. Raises StageChanged where one
        of them has changed since the stage began.
        """
        path = self.folder(stage) / "weights.json"
        # By fingerprint, not by path: a folder may be overwritten between two attempts.
        now = {}
        for role, checkpoint in checkpoints.items():
            if checkpoint:
                # One in this WORKDIR may be the copy of a bucket's.
                now[role] = dict(path=shown(checkpoint.path), fingerprint=checkpoint.fingerprint())
        before = read_weights(path.parent) if path.exists() else {}
        for role, weights in now.items():
            if role in before and before[role]["fingerprint"] != weights["fingerprint"]:
                raise StageChanged(
                    f"the weights at {weights['path']} have changed since {path.parent} began with "
                    f"them (as its {role}). Put the old ones back, or give another --workdir."
                )
        if now:
            write_record(path, now)

    def _before(self, stage: str) -> tuple[str, ...]:
        """Return the stages before a stage."""
        return self.config.stages[: self.config.stages.index(stage)]


def _check_can_be_mismatched(stage: str, source: str, loaded: dataset.Dataset) -> None:
    """Raise ValueError where a split has one row alone, which has no other row's completion."""
    for split, examples in (("training", loaded.train), ("held-out", loaded.eval)):
        if len(examples) == 1:
            raise ValueError(
                f"{source}: there is 1 {split} row ({examples.where[0]}), and the stage {stage} "
                "needs at least 2, as its KL is of each prompt with the completion of another row. "
                "Give more rows, or change config.data.eval_fraction, which is the share that is "
                "held out (0: none)."
            )


def _say_of_labels(stage: str, counts: Counts, block: ConfigDict) -> None:
    """Say how unpaired rows come of pairs, and warn where their two kinds do not balance."""
    if counts.further_pairs:
        say(
            f"{stage}: each pair counts as two rows, its chosen response as desirable and its "
            "rejected one as undesirable"
        )
    imbalance = counts.imbalance(block.desirable_weight, block.undesirable_weight)
    if imbalance:
        warn(f"{stage}: {imbalance}.")


def _source(data: ConfigDict) -> str:
    """Return how an error calls what a data block reads."""
    return f"config.data: {data.path or data.mix or data.source}"


def _check_same_tokens(source: str, splits: dict) -> None:
    """Check that all processes have read the same; splits: name -> examples or prompts."""

    def tokens():
        found = {}
        for split, rows in splits.items():
            fingerprints = [rows.fingerprint]
            if isinstance(rows, Examples):
                fingerprints = rows.fingerprints
            sums = ", ".join(fingerprint[:16] for fingerprint in fingerprints)
            counted = f"{len(rows):,} rows, tokens of sha256 {sums}"
            found[f"{source}, {split}"] = counted
        return found

    agreement.check_same(tokens, agreement.SAME_ROWS)
