"""The table of preference losses: what each one takes and needs.

The config's checks, planning and training all ask this table. A new loss is a line here, and a
function of the same name in `training/losses.py`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Loss:
    """The properties of a preference loss that no setting changes."""

    # The fields of config.dpo that its function takes after the pairs, in this order.
    numbers: tuple[str, ...] = ("beta",)
    needs_reference: bool = True  # otherwise none is loaded
    # The two log-ratios enter by their difference alone, so that what another divergence adds to
    # both of them cancels.
    takes_divergence: bool = False


# config.dpo.loss -> its properties
LOSSES = {
    "sigmoid": Loss(("beta", "label_smoothing"), takes_divergence=True),
    "sigmoid_norm": Loss(("beta", "label_smoothing"), takes_divergence=True),
    "ipo": Loss(takes_divergence=True),
    "ipo_sum": Loss(takes_divergence=True),
    "hinge": Loss(takes_divergence=True),
    "robust": Loss(("beta", "label_smoothing"), takes_divergence=True),
    "exo": Loss(("beta", "label_smoothing"), takes_divergence=True),
    "discopop": Loss(("beta", "discopop_tau"), takes_divergence=True),
    "dpop": Loss(("beta", "dpop_lambda")),
    "apo_zero": Loss(),
    "apo_down": Loss(),
    "nca": Loss(),
    "bco_pair": Loss(),
    "sppo_hard": Loss(),
    "simpo": Loss(("beta", "simpo_gamma"), needs_reference=False),
    "orpo": Loss(("orpo_lambda",), needs_reference=False),
    "cpo": Loss(("beta", "cpo_alpha"), needs_reference=False),
}
OWN_NUMBERS = ("beta", "label_smoothing")  # what a function of the caller's takes after the pairs

# config.dpo.divergence -> the fields of config.dpo that it takes
DIVERGENCES = {
    "reverse_kl": (),
    "forward_kl": (),
    "jensen_shannon": (),
    "alpha": ("divergence_alpha",),
}


def numbers() -> tuple[str, ...]:
    """Return every number that some loss or divergence takes, each once."""
    found = {}
    for loss in LOSSES.values():
        found |= dict.fromkeys(loss.numbers)
    for taken in DIVERGENCES.values():
        found |= dict.fromkeys(taken)
    return tuple(found)


def takers(number: str) -> list[str]:
    """Return the losses that take a number, or the divergences where no loss does."""
    losses = [name for name, loss in LOSSES.items() if number in loss.numbers]
    divergences = [name for name, taken in DIVERGENCES.items() if number in taken]
    return losses or divergences


def needs_reference(loss: str) -> bool:
    """Return whether a loss needs a reference, as one by another name than the table's does."""
    return loss not in LOSSES or LOSSES[loss].needs_reference
