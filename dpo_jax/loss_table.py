"""The table of preference losses: what each one takes and needs.

The config's checks, planning and training all ask this table. A new loss is a line here, and a
function of the same name in `training/losses.py`.

config.dpo.loss is a name of the table, or a mixture: names with weights, separated by commas, as
sigmoid=1,nll=0.2. A name without a weight counts 1. The loss of a pair is the weighted sum.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Loss:
    """The properties of a preference loss that no setting changes."""

    # The fields of config.dpo that its function takes after the pairs, in this order.
    numbers: tuple[str, ...] = ("beta",)
    needs_reference: bool = True  # otherwise none is loaded
    # The two log-ratios enter by their difference alone, so that what another divergence adds to
    # both of them cancels.
    takes_divergence: bool = False
    # The scaled margin enters as a whole, so that a target margin of each pair (data.margin) can be
    # subtracted from it.
    takes_margin: bool = False


# config.dpo.loss -> its properties
LOSSES = {
    "sigmoid": Loss(("beta", "label_smoothing"), takes_divergence=True, takes_margin=True),
    "sigmoid_norm": Loss(("beta", "label_smoothing"), takes_divergence=True, takes_margin=True),
    "ipo": Loss(takes_divergence=True, takes_margin=True),
    "ipo_sum": Loss(takes_divergence=True, takes_margin=True),
    "hinge": Loss(takes_divergence=True, takes_margin=True),
    "robust": Loss(("beta", "label_smoothing"), takes_divergence=True, takes_margin=True),
    "exo": Loss(("beta", "label_smoothing"), takes_divergence=True, takes_margin=True),
    "discopop": Loss(("beta", "discopop_tau"), takes_divergence=True, takes_margin=True),
    "dpop": Loss(("beta", "dpop_lambda"), takes_margin=True),
    "apo_zero": Loss(),
    "apo_down": Loss(),
    "nca": Loss(),
    "bco_pair": Loss(),
    "sppo_hard": Loss(),
    "simpo": Loss(("beta", "simpo_gamma"), needs_reference=False, takes_margin=True),
    "orpo": Loss(("orpo_lambda",), needs_reference=False),
    "cpo": Loss(("beta", "cpo_alpha"), needs_reference=False, takes_margin=True),
    "nll": Loss((), needs_reference=False),
}
# A weight of a mixture is 0 or between these: float32 holds it, and its products.
LEAST_WEIGHT = 1e-12
LARGEST_WEIGHT = 1e6
OWN_NUMBERS = ("beta", "label_smoothing")  # what a function of the caller's takes after the pairs
OWN = Loss(OWN_NUMBERS)  # a loss by another name than the table's, such as a function's

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


def is_mixture(loss: str) -> bool:
    """Return whether config.dpo.loss is written as a mixture, if only of one loss."""
    return "=" in loss or "," in loss


def names(loss: str) -> list[str]:
    """Return the names in config.dpo.loss: one, or those of a mixture."""
    return [entry.partition("=")[0].strip() for entry in loss.split(",")]


def weights(loss: str) -> dict[str, float]:
    """Return the weight of each loss in a mixture, by name.

    Raises ValueError with what was expected instead.
    """
    if ";" in loss:
        raise ValueError("commas between the losses of a mixture, not semicolons")
    found = {}
    for entry, name in zip(loss.split(","), names(loss), strict=True):
        if not entry.strip():
            raise ValueError("a loss before and after each comma; one of them is missing")
        if name not in LOSSES:
            raise ValueError(
                f"losses of {', '.join(LOSSES)}, each with its weight; {name!r} is not a loss"
            )
        if name in found:
            raise ValueError(f"each loss once in a mixture; {name} is there twice")
        found[name] = _weight(name, entry)
    if not any(found.values()):
        raise ValueError("a mixture in which some weight is more than 0")
    return found


def _weight(name: str, entry: str) -> float:
    _, is_given, text = entry.partition("=")
    if not is_given:
        return 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    # Comparisons with nan are false, too.
    if weight == 0 or LEAST_WEIGHT <= weight <= LARGEST_WEIGHT:
        return weight
    raise ValueError(
        f"weights that are 0, or between {LEAST_WEIGHT:g} and {LARGEST_WEIGHT:,.0f}, as in "
        f"sigmoid=1,nll=0.2; the weight of {name} is {text.strip()!r}"
    )


def properties(loss: str) -> Loss:
    """Return the properties of config.dpo.loss; a mixture takes and needs all that its losses do.

    A divergence changes log-ratios alone. So a mixture takes one if all of its losses that use
    log-ratios do, and some loss uses them. The term nll compares no responses: it does not keep a
    mixture from taking a target margin, and takes none alone. Any other name than the table's has
    the properties of a function of the caller's.
    """
    lines = [LOSSES.get(name, OWN) for name in names(loss)]
    of_log_ratios = [line for line in lines if line.needs_reference]
    comparing = [LOSSES.get(name, OWN) for name in names(loss) if name != "nll"]
    taken = {}
    for line in lines:
        taken |= dict.fromkeys(line.numbers)
    return Loss(
        numbers=tuple(taken),
        needs_reference=bool(of_log_ratios),
        takes_divergence=bool(of_log_ratios) and all(x.takes_divergence for x in of_log_ratios),
        takes_margin=bool(comparing) and all(line.takes_margin for line in comparing),
    )


def takers_of_margin() -> list[str]:
    """Return the losses that take a target margin of each pair."""
    return [name for name, loss in LOSSES.items() if loss.takes_margin]
