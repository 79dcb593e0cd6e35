"""Losses and their gradients against TRL's own, or the same formulas written with torch."""

import collections
import copy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import loss_table
from dpo_jax.data.batches import Batches
from dpo_jax.data.examples import Example
from dpo_jax.loss_table import LOSSES
from dpo_jax.models import families, hf
from dpo_jax.training import losses, objectives
from tests.helpers import tiny_models

torch = pytest.importorskip("torch", reason="the independent reference is torch autograd")
trl = pytest.importorskip("trl", reason="the independent reference is TRL's trainers")

RNG = np.random.default_rng(0)
# Log-probs, below 0 as the odds of ORPO need; log-ratios too, as the reference's are 0.
CHOSEN, REJECTED = -np.abs(RNG.normal(0, 3, (2, 20)))
COUNTS = RNG.integers(1, 20, (2, 20))
BETA = 0.3
EPS = 0.25  # label smoothing, the same in float32 and float64: TRL's exo has it in float32


NUMBERS = dict(
    beta=BETA,
    label_smoothing=EPS,
    discopop_tau=0.4,
    dpop_lambda=3.0,
    simpo_gamma=0.7,
    orpo_lambda=0.4,
    cpo_alpha=0.6,
    divergence_alpha=0.3,
)
THEIR_NAMES = dict(
    exo="exo_pair", nca="nca_pair", nll="sft"
)  # where TRL has another name for a loss
THEIR_DIVERGENCES = dict(jensen_shannon="js_divergence", alpha="alpha_divergence")
NOT_IN_TRL = ("ipo_sum", "dpop")  # closed forms are in the unit tests
OF_LOG_PROBS = ("simpo", "orpo", "cpo")
OF_LOG_RATIOS = [name for name in LOSSES if name not in (*NOT_IN_TRL, *OF_LOG_PROBS)]


def weights_of(name) -> list[float]:
    return list(loss_table.weights(name).values())


def ours(name, divergence="reverse_kl", eps=EPS):
    """Losses, and their gradients by both responses' log-probs, where the reference's are 0."""
    of_pairs = losses.preference(name, losses.Choices(divergence))
    hyper = NUMBERS | dict(label_smoothing=eps, loss_weights=weights_of(name))

    def loss(chosen, rejected):
        scores = [of_pairs.scores(side, hyper) for side in (chosen, rejected)]
        return of_pairs(losses.Pairs(*scores, chosen, rejected, *COUNTS), hyper)

    with jax.enable_x64(True):
        grads = jax.grad(lambda *sides: loss(*sides).sum(), argnums=(0, 1))(CHOSEN, REJECTED)
        return loss(CHOSEN, REJECTED), *grads


def assert_equal_to_torch(found, values, chosen, rejected, tolerance=1e-9):
    """Compare with torch's losses and the gradients that it left in two tensors."""
    for mine, theirs in zip(found, (values.detach(), chosen.grad, rejected.grad), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance / 10)


def sides(dtype=torch.float64):
    """Log-probs of both responses as torch's tensors."""
    return (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (CHOSEN, REJECTED))


class Stand:
    """All that TRL's loss asks of its trainer, beside numbers: what it logs goes nowhere."""

    device = "cpu"
    training = True
    aux_loss_enabled = use_weighting = False
    precompute_ref_logps = True
    ld_alpha = None
    _total_train_tokens, _tp_size = 0, 1

    def __init__(self, name, divergence="reverse_kl", eps=0.0):
        self.loss_types = [THEIR_NAMES.get(each, each) for each in loss_table.names(name)]
        self.loss_weights = weights_of(name)
        self.loss_type = "sigmoid" if name == "cpo" else name
        self.beta = NUMBERS["orpo_lambda"] if name == "orpo" else BETA
        self.label_smoothing = eps
        self.f_divergence_type = THEIR_DIVERGENCES.get(divergence, divergence)
        # Theirs counts from the other end: 0 is forward KL.
        self.f_alpha_divergence_coef = 1 - NUMBERS["divergence_alpha"]
        self.discopop_tau = NUMBERS["discopop_tau"]
        self.simpo_gamma = NUMBERS["simpo_gamma"]
        self.alpha = 0.0  # of AlphaPO
        self.args = self.accelerator = self.model = self
        self._metrics = collections.defaultdict(lambda: collections.defaultdict(list))

    def gather(self, value):
        return value

    gather_for_metrics = gather


def trl_loss(stand, pair, chosen, rejected):
    """The loss of one pair by TRL's DPOTrainer, of a model with these sums of log-probs."""
    counts = torch.tensor(COUNTS[:, pair])
    mask = torch.arange(1 + int(counts.max()))[None] <= counts[:, None]
    mask[:, 0] = False  # the prompt
    sums = torch.stack((chosen[pair], rejected[pair]))
    log_probs = (sums / counts)[:, None] * mask[:, 1:]
    rest = torch.zeros_like(log_probs)
    outputs = types.SimpleNamespace(
        log_probs=log_probs, entropy=rest, mean_logits=rest, is_top1=rest.bool()
    )
    nothing = torch.zeros(1)
    inputs = dict(
        input_ids=torch.zeros_like(mask, dtype=torch.long),
        attention_mask=torch.ones_like(mask),
        completion_mask=mask.long(),
        ref_chosen_logps=nothing,
        ref_rejected_logps=nothing,
    )
    return trl.DPOTrainer._compute_loss(stand, lambda **_: outputs, inputs, False)


def assert_equal_to_trl(name, divergence="reverse_kl", eps=0.0):
    # TRL has no alpha-divergence in float64.
    is_single = divergence == "alpha"
    chosen, rejected = sides(torch.float32 if is_single else torch.float64)
    stand = Stand(name, divergence, eps)
    values = torch.stack([trl_loss(stand, pair, chosen, rejected) for pair in range(len(CHOSEN))])
    values.sum().backward()
    found = ours(name, divergence, eps)
    # The logarithms of exo's label smoothing are in float32 there, too.
    tolerance = 1e-5 if is_single or "exo" in name else 1e-9
    assert_equal_to_torch(found, values, chosen, rejected, tolerance)


@pytest.mark.parametrize("name", OF_LOG_RATIOS)
def test_preference_equals_trl(name):
    # TRL ignores label smoothing in others, and its gradient of exo needs some.
    assert_equal_to_trl(name, eps=EPS if name in ("robust", "exo") else 0.0)


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "alpha"])
@pytest.mark.parametrize("name", [x for x in OF_LOG_RATIOS if LOSSES[x].takes_divergence])
def test_divergences_equal_trl(name, divergence):
    assert_equal_to_trl(name, divergence, eps=EPS if name in ("robust", "exo") else 0.0)


@pytest.mark.parametrize(
    "mixture, divergence",
    [
        ("sigmoid=1,nll=0.2", "reverse_kl"),  # RPO
        ("sigmoid=0.8,bco_pair=0.2,nll", "reverse_kl"),  # MPO
        ("hinge=0,exo=0.5,nca=3,apo_zero=0.1", "reverse_kl"),
        ("ipo=2,nll=0.5", "forward_kl"),
    ],
)
def test_mixtures_equal_trl(mixture, divergence):
    """Of each pair alone: TRL means the likelihood over all tokens of a batch."""
    assert_equal_to_trl(mixture, divergence, eps=EPS if "exo" in mixture else 0.0)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
def test_label_smoothing_equals_torch(name):
    """Conservative DPO, written with torch: TRL ignores label smoothing here."""
    log_sigmoid = torch.nn.functional.logsigmoid
    chosen, rejected = sides()
    counts = torch.tensor(COUNTS) if name == "sigmoid_norm" else (1, 1)
    scaled = BETA * (chosen / counts[0] - rejected / counts[1])
    values = -log_sigmoid(scaled) * (1 - EPS) - log_sigmoid(-scaled) * EPS
    values.sum().backward()
    assert_equal_to_torch(ours(name), values, chosen, rejected)


@pytest.mark.parametrize("name", OF_LOG_PROBS)
def test_losses_without_reference_equal_trl(name):
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = sides()
    counts = torch.tensor(COUNTS)
    per_token = chosen / counts[0], rejected / counts[1]
    if name == "orpo":
        # Its trainer adds this term to the negative log-likelihood, and means over the batch.
        values = -ORPOTrainer.odds_ratio_loss(Stand(name), *per_token)[0] - per_token[0]
    else:
        given = per_token if name == "simpo" else (chosen, rejected)
        values = CPOTrainer.cpo_loss(Stand(name), *given)[0]
    if name == "cpo":
        values = values - NUMBERS["cpo_alpha"] * per_token[0]
    values.sum().backward()
    # ORPO is in float32 there.
    tolerance = 1e-5 if name == "orpo" else 1e-9
    assert_equal_to_torch(ours(name), values, chosen, rejected, tolerance)


def torch_outputs(model):
    """What TRL's patched model returns, as far as its loss reads it, from a model's logits."""

    def outputs(input_ids, labels, **_):
        log_probs = model(input_ids).logits[:, :-1].log_softmax(-1)
        mask = labels[:, 1:] != -100
        at = log_probs.gather(-1, input_ids[:, 1:, None])[..., 0] * mask
        rest = torch.zeros_like(at).detach()
        squares = (2 * log_probs).logsumexp(-1).detach()
        return types.SimpleNamespace(
            log_probs=at,
            log_sum_sq_probs=squares,
            entropy=rest,
            mean_logits=rest,
            is_top1=rest.bool(),
        )

    return outputs


def trl_inputs(pairs):
    """A batch of pairs as TRL has them: the chosen ones first, padded on the right."""
    rows = [(pair.prompt, pair.responses[side]) for side in (0, 1) for pair in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids, completion_mask = torch.zeros((2, len(rows), longest), dtype=torch.long)
    for row, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        input_ids[row, :length] = torch.tensor(np.concatenate([prompt, response]))
        completion_mask[row, len(prompt) : length] = 1
    return dict(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        completion_mask=completion_mask,
    )


def as_ours(model, folder):
    """The weights of a torch model, in our tree."""
    model.save_pretrained(folder)
    config = families.from_hf(hf.read_config(folder))
    return config, hf.load(folder, config, tiny_models.placed(config))


@pytest.mark.parametrize(
    "loss, weighting, ld_alpha",
    [
        ("sigmoid", "wpo", 1.0),
        ("sigmoid=1,nll=0.5", "none", 0.4),
        ("ipo=1,nca=0.5,apo_zero=2", "wpo", 0.4),
    ],
)
def test_weighting_and_desensitizing_equal_trl(loss, weighting, ld_alpha, tmp_path):
    """Loss of a batch and gradients of all weights, by TRL's code on a model of transformers."""
    rng = np.random.default_rng(0)
    # Chosen responses of one length, as TRL means their likelihood over tokens.
    pairs = []
    for length in (2, 9, 4, 7, 6, 5):
        prompt, chosen, rejected = (rng.integers(0, 96, n).astype(np.int32) for n in (5, 5, length))
        pairs.append(Example(prompt, (chosen, rejected)))
    # Less steep, so that the weights of WPO are not all about 0.
    policy, reference = (copy.deepcopy(tiny_models.torch_model("gpt2")) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.5)
        for parameter in reference.parameters():
            parameter.mul_(0.45)
    stand = Stand(loss)
    stand.precompute_ref_logps, stand.gradient_checkpointing_kwargs = False, None
    stand.model = policy
    stand.use_weighting = weighting == "wpo"
    stand.ld_alpha = ld_alpha
    stand.ref_model = torch_outputs(reference)
    value = trl.DPOTrainer._compute_loss(stand, torch_outputs(policy), trl_inputs(pairs), False)
    value.backward()

    config, params = as_ours(policy, tmp_path / "policy")
    _, reference_params = as_ours(reference, tmp_path / "reference")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(parameter.grad)
    _, expected = as_ours(policy, tmp_path / "gradient")
    batch = jax.tree.map(lambda x: x[0], Batches(pairs, np.arange(len(pairs))[None])[0])
    choices = losses.Choices(weighting=weighting, is_length_desensitized=ld_alpha < 1)
    objective = objectives.make("dpo", config, loss, choices)
    hyper = NUMBERS | dict(ld_alpha=ld_alpha, label_smoothing=0.0, loss_weights=weights_of(loss))

    def mean(params):
        (total, count), _ = objective(params, reference_params, hyper, batch)
        return total / count

    found, gradient = jax.jit(jax.value_and_grad(mean))(params)
    np.testing.assert_allclose(found, value.item(), rtol=1e-5)
    largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * largest)


def torch_gradient(function, *inputs):
    """Values of a loss written in torch, and their gradient with respect to the first input."""
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    value = function(torch, *tensors)
    value.sum().backward()
    return value.detach().numpy(), tensors[0].grad.numpy()


@pytest.mark.parametrize(
    "ours, theirs, inputs",
    [
        (
            lambda a, b: losses.unlikelihood(a, b, 0.3),
            lambda torch, a, b: -a + 0.3 * b,
            (CHOSEN, REJECTED),
        ),
        (
            losses.bradley_terry,
            lambda torch, a, b: -torch.log(torch.sigmoid(a - b)),
            (CHOSEN, REJECTED),
        ),
        (
            lambda a, b: losses.ppo_policy(a, b, 0.2),
            lambda torch, a, b: torch.max(-b * a.exp(), -b * a.exp().clamp(0.8, 1.2)),
            (CHOSEN / 10, REJECTED),
        ),
        (
            lambda a, b, c: losses.ppo_value(a, b, c, 0.5),
            lambda torch, a, b, c: (
                0.5 * torch.max((a - c) ** 2, (b + (a - b).clamp(-0.5, 0.5) - c) ** 2)
            ),
            (CHOSEN, REJECTED, CHOSEN[::-1].copy()),
        ),
    ],
)
def test_other_losses_equal_torch(ours, theirs, inputs):
    value, gradient = torch_gradient(theirs, *inputs)
    np.testing.assert_allclose(ours(*map(jnp.asarray, inputs)), value, rtol=2e-5, atol=1e-6)
    found = jax.grad(lambda first: ours(first, *map(jnp.asarray, inputs[1:])).sum())(
        jnp.asarray(inputs[0])
    )
    np.testing.assert_allclose(found, gradient, rtol=2e-4, atol=1e-5)


def test_reward_margin_equals_trl():
    """The loss and its gradient by TRL's RewardTrainer, of rows that have a margin."""
    chosen, rejected = sides()
    margins = RNG.normal(0, 1, len(CHOSEN))
    stand = Stand("sigmoid")
    stand.center_rewards_coefficient = None
    outputs = types.SimpleNamespace(logits=torch.cat((chosen, rejected))[:, None])
    inputs = dict(attention_mask=torch.ones(40, 1), margin=torch.tensor(margins))
    loss = trl.RewardTrainer.compute_loss(stand, lambda **_: outputs, inputs)
    loss.backward()
    with jax.enable_x64(True):
        grads = jax.grad(
            lambda *rewards: losses.bradley_terry(*rewards, margins).mean(), argnums=(0, 1)
        )(CHOSEN, REJECTED)
        mean = losses.bradley_terry(CHOSEN, REJECTED, margins).mean()
    np.testing.assert_allclose(mean, loss.detach(), rtol=1e-9)
    for mine, theirs in zip(grads, (chosen.grad, rejected.grad), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)
