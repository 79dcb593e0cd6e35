"""The table of stages: what each one reads, trains and compares with.

The config, its checks, planning and the pipeline all ask this table, so that a new stage is a line
here, a block of fields in `config.py`, and a function in `pipeline/` or an objective in
`training/objectives.py`.
"""

import dataclasses

from ml_collections import ConfigDict

from dpo_jax import loss_table


@dataclasses.dataclass(frozen=True)
class Stage:
    """The properties of a stage that no setting changes."""

    # sft: texts and completions; pairs: preferences; unpaired: completions with a label, or pairs,
    # each as two of them; prompts: what it samples from
    data: str
    responses: int = 0  # per example: 1, or 2 (chosen and rejected); 0: it does not train
    head: str = ""  # of the model that it trains: lm, reward or lm_value
    reference: str = "none"  # of its loss, unless its block has a field `reference`: none or init
    is_policy: bool = False  # what it trains is a policy that `evaluate` can measure

    @property
    def trains(self) -> bool:
        return bool(self.head)

    @property
    def has_preference_loss(self) -> bool:
        """True if the loss compares two responses under policy and reference."""
        return self.responses == 2 and self.reference != "none"

    @property
    def kind(self) -> str:
        """The kind of examples that it trains on: "pairs", "unpaired" or "sft"."""
        if self.data == "unpaired":
            return "unpaired"
        return "pairs" if self.responses == 2 else "sft"

    @property
    def samples(self) -> bool:
        """True if the stage samples completions."""
        return self.data == "prompts"


# In the order in which a run has them.
STAGES = {
    "sft": Stage(data="sft", responses=1, head="lm"),
    "pairs": Stage(data="prompts"),
    "preferred_ft": Stage(data="pairs", responses=1, head="lm", is_policy=True),
    "unlikelihood": Stage(data="pairs", responses=2, head="lm", is_policy=True),
    "rm": Stage(data="pairs", responses=2, head="reward"),
    "dpo": Stage(data="pairs", responses=2, head="lm", reference="init", is_policy=True),
    "kto": Stage(data="unpaired", responses=1, head="lm", reference="init", is_policy=True),
    "ppo": Stage(data="prompts", responses=1, head="lm_value", reference="init", is_policy=True),
    "best_of_n": Stage(data="prompts"),
    "evaluate": Stage(data="prompts"),
}

JUDGING = ("best_of_n", "evaluate")  # they report on held-out prompts


def training_stages(config: ConfigDict) -> list[str]:
    """Return the stages of a run that train, in order."""
    return [stage for stage in config.stages if STAGES[stage].trains]


def policy_stages(config: ConfigDict) -> list[str]:
    """Return the stages of a run that train a policy: one, in a valid config, or none."""
    return [stage for stage in config.stages if STAGES[stage].is_policy]


def repeats(config: ConfigDict, stage: str) -> bool:
    """Return whether each round of a run has a stage anew: those from `pairs` on."""
    return "pairs" in config.stages and config.stages.index(stage) >= config.stages.index("pairs")


def samples(config: ConfigDict) -> bool:
    """Return whether any stage of a run samples, and so has a reward."""
    return any(STAGES[stage].samples for stage in config.stages)


def asks_reward(config: ConfigDict, stage: str) -> bool:
    """Return whether a stage samples and asks the reward, as all do but pairs of a judge."""
    is_judged = stage == "pairs" and config.pairs.labels == "judge"
    return STAGES[stage].samples and not is_judged


def completions_in_pairs(config: ConfigDict) -> int:
    """Return how many of a prompt's completions make pairs, every two of them."""
    return config.pairs.completions if config.pairs.choose == "all" else 2


def trains_on_samples(config: ConfigDict, stage: str) -> bool:
    """Return whether a stage trains on pairs that the run's own `pairs` stage made."""
    return STAGES[stage].data in ("pairs", "unpaired") and "pairs" in config.stages


def reads_pairs(config: ConfigDict, stage: str) -> bool:
    """Return whether a stage trains on pairs of the data, or on their chosen responses."""
    return STAGES[stage].data == "pairs" and not trains_on_samples(config, stage)


def reads_unpaired(config: ConfigDict, stage: str) -> bool:
    """Return whether a stage trains on single completions of the data, each with its label."""
    return STAGES[stage].data == "unpaired" and not trains_on_samples(config, stage)


def trains_in_groups(config: ConfigDict, stage: str) -> bool:
    """Return whether a stage trains on examples of which several may belong together.

    Single completions do only where they were sampled together: see `Examples.groups`.
    """
    return STAGES[stage].responses == 2 or trains_on_samples(config, stage)


def reference_of(config: ConfigDict, stage: str) -> str:
    """Return the reference of a stage's loss: "none", "init", "first" or a path.

    init: what the stage starts from. first: what it started from in round 1, in later rounds.
    """
    if not loss_table.properties(config[stage].get("loss", "")).needs_reference:
        return "none"
    reference = config[stage].get("reference", STAGES[stage].reference)
    return "init" if reference == "first" and config.rounds == 1 else reference


def moves_reference(block: ConfigDict) -> bool:
    """Return whether the reference of a stage, by its config block, moves to the policy."""
    return block.get("reference_every", 0) > 0


def aims_at_optimum(config: ConfigDict, stage: str) -> bool:
    """Return whether a stage's loss is least at its reference times exp(reward / beta) (eq. 4).

    It is so for DPO's own loss, as the paper has it, on sampled pairs with labels that follow
    Bradley-Terry. Other losses have other optima, and so has a mixture.
    """
    if stage != "dpo" or not trains_on_samples(config, stage):
        return False
    if reference_of(config, stage) == "none" or moves_reference(config.dpo):
        return False
    expected = dict(
        loss="sigmoid", label_smoothing=0, divergence="reverse_kl", weighting="none", ld_alpha=1
    )
    has_own_loss = all(config.dpo[name] == value for name, value in expected.items())
    return has_own_loss and config.pairs.labels == "bradley_terry"


def keeps_reference(config: ConfigDict, stage: str) -> bool:
    """Return whether the reference's log-probs are computed before training, and kept."""
    return config[stage].get("cache_reference", False)


def holds_frozen(config: ConfigDict, stage: str) -> bool:
    """Return whether a stage trains beside weights of a policy that it does not train.

    They are LoRA's base, a reference that stays where it is, and the initial policy that the KL of
    evaluations is to.
    """
    if not STAGES[stage].trains:
        return False
    reads_reference = reference_of(config, stage) != "none" and not moves_reference(config[stage])
    measures_kl = STAGES[stage].is_policy and "evaluate" in config.stages
    return bool(config.model.lora.rank) or reads_reference or measures_kl


def can_keep_reference(config: ConfigDict, stage: str) -> bool:
    """Return whether a stage could read kept log-probs in place of its reference's weights.

    Not of a reference that moves, nor in LD-DPO, which needs log-probs of parts of responses.
    """
    block = config[stage]
    if "cache_reference" not in block or reference_of(config, stage) == "none":
        return False
    return not moves_reference(block) and block.get("ld_alpha", 1.0) == 1.0
