"""Exact reward, KL, optimum and bound against brute force and random policies."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from dpo_jax.data import toy
from dpo_jax.evaluation import exact, plots
from dpo_jax.evaluation.frontier import Curve
from dpo_jax.models import transformer
from dpo_jax.models.transformer import LayerKind
from dpo_jax.parallel import sharding
from tests.helpers.tiny import tiny_config

CONFIG = tiny_config(
    vocab=3,
    norm="layer",
    activation="gelu_new",
    gated=False,
    learned_positions=True,
    pattern=(LayerKind(),),
)
PROMPTS = np.array([0, 2])
LENGTH = 4
COUNT = CONFIG.vocab**LENGTH
LOGITS = jax.jit(transformer.logits, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    """Weights so large that the log-probs are far from uniform."""
    small = jax.jit(transformer.init, static_argnums=0)(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda x: 8 * x, small)


@pytest.fixture(scope="module")
def reference(params) -> np.ndarray:
    return exact.enumerate_log_probs(CONFIG, params, PROMPTS, LENGTH)


def random_policy(rng, scale: float) -> np.ndarray:
    logits = scale * rng.normal(size=(len(PROMPTS), COUNT))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


RNG = np.random.default_rng(0)
REWARDS = RNG.normal(size=(len(PROMPTS), COUNT))  # all distinct
# Few distinct.
WORD_REWARDS = np.broadcast_to(np.indices((3,) * LENGTH).sum(0).ravel() - 4.0, REWARDS.shape)
BETAS = (0.01, 0.1, 0.3, 1.0, 3.0, 30.0, 1000.0)


def test_enumerate_equals_each_sequence(params, reference):
    for prompt, log_probs_C in zip(PROMPTS, reference, strict=True):
        tokens_CT = np.array(
            [[prompt, *words] for words in itertools.product(range(3), repeat=LENGTH)]
        )
        log_probs_CTV = np.asarray(jax.nn.log_softmax(LOGITS(CONFIG, params, tokens_CT)))
        for words, log_probs_TV, found in zip(
            tokens_CT[:, 1:], log_probs_CTV, log_probs_C, strict=True
        ):
            # Float32, at 15 nats.
            assert found == pytest.approx(sum(log_probs_TV[np.arange(LENGTH), words]), abs=1e-4)


def test_enumerate_sums_to_1(reference):
    assert reference.dtype == np.float64
    np.testing.assert_allclose(np.exp(reference).sum(-1), 1, atol=1e-6)
    assert np.ptp(reference) > 2  # not about uniform


def test_enumerate_default_length():
    config = dataclasses.replace(CONFIG, vocab=8, layers=1)
    params = jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0))
    log_probs = exact.enumerate_log_probs(config, params, toy.PROMPTS)
    assert log_probs.shape == toy.rewards(toy.PROMPTS, toy.completions()).shape
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, atol=1e-6)


def test_enumerate_on_mesh(params, reference):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.device_put(params, sharding.param_shardings(mesh, params))
    with jax.set_mesh(mesh):
        found = exact.enumerate_log_probs(CONFIG, params, PROMPTS, LENGTH)
    # Float32 log-probs down to -21.
    np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-5)


def test_enumerate_finds_noncausal_logits(params, monkeypatch):
    def leak(config, params, tokens_BT):
        return LOGITS(config, params, tokens_BT[:, ::-1])

    monkeypatch.setattr(exact, "_logits", leak)
    with pytest.raises(ArithmeticError, match="later words"):
        exact.enumerate_log_probs(CONFIG, params, PROMPTS, LENGTH)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_enumerate_finds_nan(params):
    with pytest.raises(ArithmeticError, match="not finite"):
        exact.enumerate_log_probs(
            CONFIG, jax.tree.map(lambda x: x * np.nan, params), PROMPTS, LENGTH
        )


def test_reward_and_kl_by_hand():
    policy, reference = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.5, 0.5], [0.5, 0.5]])
    reward, kl = exact.reward_and_kl(policy, reference, np.array([[1.0, 3.0], [0.0, 10.0]]))
    assert reward == pytest.approx((2 + 1) / 2)
    assert kl == pytest.approx((0.9 * np.log(1.8) + 0.1 * np.log(0.2)) / 2)


def test_optimum_by_hand():
    """Two completions, alike under the reference, with rewards 0 and r: p = sigmoid(r / beta)."""
    for r, beta in ((1.0, 0.5), (-2.0, 3.0)):
        p = 1 / (1 + np.exp(-r / beta))
        reward, kl = exact.optimum(np.log([[0.5, 0.5]]), np.array([[0.0, r]]), beta)
        assert reward == pytest.approx(p * r)
        assert kl == pytest.approx(np.log(2) + p * np.log(p) + (1 - p) * np.log(1 - p))


@pytest.mark.parametrize("beta", BETAS)
def test_optimum_kl_identity(reference, beta):
    reward, kl = exact.optimum(reference, REWARDS, beta)
    log_z_P = np.log((np.exp(reference) * np.exp(REWARDS / beta)).sum(-1))
    assert kl == pytest.approx(reward / beta - log_z_P.mean(), abs=1e-9 * max(1, 1 / beta))


@pytest.mark.parametrize("beta", (0.1, 0.3, 1.0, 3.0))
def test_optimum_is_best_nearby(reference, beta):
    """max E r - beta KL (eq. 3) is attained by the optimum."""
    reward, kl = exact.optimum(reference, REWARDS, beta)
    tilted = reference + REWARDS / beta
    rng = np.random.default_rng(1)
    for scale in (0.01, 0.1, 1.0):
        logits = tilted + scale * rng.normal(size=tilted.shape)
        other = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        other_reward, other_kl = exact.reward_and_kl(other, reference, REWARDS)
        assert other_reward - beta * other_kl < reward - beta * kl


@pytest.mark.parametrize("rewards", [REWARDS, WORD_REWARDS], ids=["all distinct", "few distinct"])
@pytest.mark.parametrize("beta", BETAS)
def test_bound_is_tight_at_optimum(reference, rewards, beta):
    reward, kl = exact.optimum(reference, rewards, beta)
    gap = exact.bound(reference, rewards, kl) - reward
    assert -1e-9 < gap < 1e-5


@pytest.mark.parametrize("rewards", [REWARDS, WORD_REWARDS], ids=["all distinct", "few distinct"])
def test_bound_is_above_policies(reference, rewards):
    rng = np.random.default_rng(2)
    policies = [random_policy(rng, scale) for scale in (0.1, 1, 3, 10) for _ in range(20)]
    policies += [
        np.logaddexp(np.log(1 - mix) + reference, np.log(mix) + policy)  # near the reference
        for mix in (1e-4, 1e-2, 0.3)
        for policy in policies[::4]
    ]
    points = np.array([exact.reward_and_kl(policy, reference, rewards) for policy in policies])
    assert (exact.bound(reference, rewards, points[:, 1]) - points[:, 0] >= -1e-6).all()


def test_bound_ends(reference):
    """At no KL it is the reference's reward; where KL is plenty, the best completion's."""
    nothing, plenty = exact.bound(reference, REWARDS, [0, 50])
    assert nothing == pytest.approx(exact.reward_and_kl(reference, reference, REWARDS)[0], abs=1e-5)
    assert plenty == pytest.approx(REWARDS.max(-1).mean(), abs=1e-4)


def test_bound_rises_and_is_concave(reference):
    rewards = exact.bound(reference, REWARDS, np.linspace(0, 6, 200))
    assert (np.diff(rewards) > 0).sum() > 100
    assert (np.diff(rewards) > -1e-9).all()
    assert (np.diff(rewards, 2) < 1e-5).all()


# A language of six completions, some with equal rewards; the second prompt never gets the reward 3.
FEW = np.log(RNG.dirichlet(np.ones(6), size=2))
FEW_REWARDS = np.array([[0.0, 1.0, 1.0, 3.0, 3.0, -1.0], [1.0, 0.0, 0.0, -1.0, 1.0, 0.0]])


def reward_and_kl_of(share_PC) -> tuple[float, float]:
    """By eq. 3's definitions, of a distribution that may leave completions out."""
    with np.errstate(divide="ignore", invalid="ignore"):
        kl_PC = np.where(share_PC > 0, share_PC * (np.log(share_PC) - FEW), 0)
    return (share_PC * FEW_REWARDS).sum(-1).mean(), kl_PC.sum(-1).mean()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_equals_all_draws(n):
    """The first of the best is taken, which is as good as a coin where all draws are gone
    through.
    """
    share_PC = np.zeros(FEW.shape)
    for share_C, log_probs_C, rewards_C in zip(share_PC, FEW, FEW_REWARDS, strict=True):
        for draws in itertools.product(range(6), repeat=n):
            share_C[max(draws, key=lambda c: rewards_C[c])] += np.exp(
                log_probs_C[list(draws)].sum()
            )
    assert exact.best_of_n(FEW, FEW_REWARDS, n) == pytest.approx(reward_and_kl_of(share_PC))


def test_best_of_n_ends(reference):
    """One is the reference, very many the best completion; without ties KL is at most log n - (n -
    1) / n.
    """
    reward, kl = exact.best_of_n(reference, REWARDS, 1)
    assert (
        reward == pytest.approx(exact.reward_and_kl(reference, reference, REWARDS)[0])
        and abs(kl) < 1e-9
    )
    best_P = REWARDS.argmax(-1)
    reward, kl = exact.best_of_n(reference, REWARDS, 10**9)
    assert reward == pytest.approx(REWARDS.max(-1).mean(), abs=1e-6)
    assert kl == pytest.approx(-reference[np.arange(2), best_P].mean(), abs=1e-6)
    kls = [exact.best_of_n(reference, REWARDS, n)[1] for n in (2, 4, 8)]
    assert all(
        0.5 * limit < kl < limit for kl, limit in zip(kls, (0.1932, 0.6363, 1.2045), strict=True)
    )


@pytest.mark.parametrize("labels", ["bradley_terry", "deterministic"])
def test_preferred_ft_equals_all_pairs(labels):
    """Draw two, leave out equal ones (and with deterministic labels equal rewards), label, keep the
    chosen.
    """
    share_PC = np.zeros(FEW.shape)
    for share_C, log_probs_C, rewards_C in zip(share_PC, FEW, FEW_REWARDS, strict=True):
        for a, b in itertools.permutations(range(6), 2):
            margin = rewards_C[a] - rewards_C[b]
            wins = 1 / (1 + np.exp(-margin)) if labels == "bradley_terry" else float(margin > 0)
            share_C[a] += np.exp(log_probs_C[a] + log_probs_C[b]) * wins
    share_PC /= share_PC.sum(-1, keepdims=True)
    assert exact.preferred_ft(FEW, FEW_REWARDS, labels) == pytest.approx(reward_and_kl_of(share_PC))


def test_optimum_of_learned_reward(reference):
    learned = REWARDS + np.random.default_rng(3).normal(size=REWARDS.shape)
    share_PC = np.exp(reference + learned / 0.5)
    share_PC /= share_PC.sum(-1, keepdims=True)
    reward, kl = exact.optimum(reference, REWARDS, 0.5, learned)
    assert reward == pytest.approx((share_PC * REWARDS).sum(-1).mean())
    assert kl == pytest.approx((share_PC * (np.log(share_PC) - reference)).sum(-1).mean())
    # It is another policy than the true optimum.
    assert exact.bound(reference, REWARDS, kl) - reward > 0.1
    # A constant for each prompt, which no preference shows.
    shifted = exact.optimum(reference, REWARDS, 0.5, REWARDS + [[3.0], [-2.0]])
    assert shifted == pytest.approx(exact.optimum(reference, REWARDS, 0.5))


@pytest.mark.parametrize("rewards", [REWARDS, WORD_REWARDS], ids=["all distinct", "few distinct"])
def test_bound_is_above_methods(reference, rewards):
    points = [exact.best_of_n(reference, rewards, n) for n in (1, 2, 16, 1000)]
    points += [
        exact.preferred_ft(reference, rewards, labels)
        for labels in ("bradley_terry", "deterministic")
    ]
    learned = rewards + np.random.default_rng(4).normal(size=rewards.shape)
    points += [exact.optimum(reference, rewards, beta, learned) for beta in (0.1, 1)]
    for reward, kl in points:
        assert exact.bound(reference, rewards, kl) - reward > -1e-6


def test_plot_toy_frontier(reference, tmp_path):
    kls = np.linspace(0, 2, 50)
    plots.frontier(
        tmp_path / "toy.png",
        curve=(kls, exact.bound(reference, REWARDS, kls)),
        reference=0.0,
        trajectories=[[(0, 0.0, 0.0), (10, 0.3, 0.1), (20, 0.5, 0.3)]],
        optimum=exact.optimum(reference, REWARDS, 1.0),
        title="beta 1",
    )
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")


def frontier_rows(panel: str) -> list[dict]:
    """Runs of all methods with three seeds and three steps, many of them near each other."""
    rng = np.random.default_rng(0)
    parameters = {
        "dpo": ("β=1", "β=0.1", "β=0.05"),
        "ppo": ("target 1", "target 3"),
        "ppo_gt": ("target 1", "target 3"),
        "unlikelihood": ("α=0.1", "α=0.5"),
        "preferred_ft": ("",),
        "unknown": ("not drawn",),
    }
    rows = []
    for (method, values), seed in itertools.product(parameters.items(), (0, 1, 2)):
        for number, value in enumerate(values):
            end = np.array([1.0, 1.5]) * (number + 0.1 * rng.random(2) + 0.2)
            rows += [
                dict(
                    panel=panel,
                    method=method,
                    parameter=value,
                    seed=seed,
                    step=step,
                    kl=end[0] * step / 300,
                    reward=end[1] * step / 300,
                    gap=0.1,
                )
                for step in (100, 200, 300)
            ]
    start = dict(method="reference", parameter="", seed=None, step=0, kl=0.0, reward=0.0, gap=0.0)
    return [start | dict(panel=panel), *rows] + [
        dict(
            panel=panel,
            method="best_of_n",
            parameter=f"N={n}",
            seed=0,
            step=0,
            kl=np.log(n) - (n - 1) / n,
            reward=np.log(n) / 2,
            gap=0.1,
        )
        for n in (1, 4, 16)
    ]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The picture of two panels, as it was when it was saved, and its rows."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    rows = frontier_rows("a") + [
        row | dict(panel="b", kl=2 * row["kl"]) for row in frontier_rows("a")[::2]
    ]
    kls = np.linspace(0, 5, 50)
    bound = 2 * np.sqrt(kls)
    path = tmp_path_factory.mktemp("plots") / "frontier.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Figure,
            "savefig",
            lambda figure, *args, **options: (
                figures.append(figure),
                save(figure, *args, **options),
            ),
        )
        plots.panels(
            path,
            rows,
            {"a": Curve(kls, bound), "b": Curve(kls, bound, bound - 0.1, bound + 0.1)},
            {"a": "first", "b": "second"},
            curve_name="the bound",
        )
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    return figures[0], rows


def test_plot_panels_have_points(drawn):
    """The means of the seeds' ends, with bars along both axes where there are seeds."""
    figure, rows = drawn
    assert [axes.get_title() for axes in figure.axes] == ["first", "second"]
    for axes, panel in zip(figure.axes, "ab", strict=True):
        ends = {}
        for row in rows:
            if row["panel"] == panel and row["method"] in plots.STYLES:
                seeds = ends.setdefault((row["method"], row["parameter"]), {})
                seeds[row["seed"]] = row["kl"], row["reward"]
        names = {name: method for method, (_, _, name) in plots.STYLES.items()}
        found = sorted(
            (names[line.get_label()], float(kl), float(reward))
            for line in axes.lines
            if line.get_label() in names
            for kl, reward in zip(*line.get_data(), strict=True)
        )
        expected = sorted(
            (method, *np.mean(list(seeds.values()), axis=0)) for (method, _), seeds in ends.items()
        )
        assert [point[0] for point in found] == [point[0] for point in expected]
        np.testing.assert_allclose(
            [point[1:] for point in found], [point[1:] for point in expected], rtol=1e-12
        )
        bars = [bar.get_segments()[0] for bar in axes.containers for bar in bar.lines[2]]
        widths = sorted(float(np.ptp(bar[:, 0])) for bar in bars if np.ptp(bar[:, 0]))
        expected_widths = sorted(
            2 * 4.302653 * np.std([kl for kl, _ in seeds.values()], ddof=1) / np.sqrt(3)
            for seeds in ends.values()
            if len(seeds) == 3
        )
        np.testing.assert_allclose(widths, expected_widths, rtol=1e-5)
        heights = [np.ptp(bar[:, 1]) for bar in bars if np.ptp(bar[:, 1])]
        assert len(heights) == len(widths)
        # Whole bars are to be seen.
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        for bar in bars:
            assert left <= bar[:, 0].min() and bar[:, 0].max() <= right
            assert bottom <= bar[:, 1].min() and bar[:, 1].max() <= top
        assert {text.get_text() for text in axes.texts} == {parameter for _, parameter in ends} - {
            ""
        }
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "the bound",
        "reference",
        "DPO",
        "PPO, reward model",
        "PPO, true reward",
        "unlikelihood",
        "Preferred-FT",
        "best of N",
        "95 % interval over seeds",
    ]


def test_plot_panels_draws_the_error_of_sampled_prompts(tmp_path):
    """Rows with errors of their own have bars of 1.96 of them, whatever their seeds; exact rows of
    one seed, and of two, have none. The reference is where its own row says, not the curve.
    """
    from matplotlib.axes import Axes

    errors = dict(reward_se=0.1, kl_se=0.05)
    start = dict(panel="a", method="reference", parameter="", seed=None, step=0, kl=0.0)
    rows = [start | dict(reward=0.4, reward_se=0.2)]
    for parameter, seed, measured in (
        ("β=1", 0, dict(reward=1.5) | errors),
        ("β=1", 1, dict(reward=2.5) | errors),
        ("β=2", 0, dict(reward=2.0)),
        ("β=4", 0, dict(reward=1.0)),
        ("β=4", 1, dict(reward=3.0)),
    ):
        about = dict(panel="a", method="dpo", parameter=parameter, seed=seed, step=9, kl=1.0)
        rows.append(about | measured)
    drawn, errorbar = [], Axes.errorbar
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Axes,
            "errorbar",
            lambda axes, *args, **options: (
                drawn.append((args, options)),
                errorbar(axes, *args, **options),
            )[1],
        )
        curve = Curve(np.array([0.0, 2.0]), np.array([0.0, 3.0]))
        plots.panels(tmp_path / "one.png", rows, {"a": curve}, {"a": ""}, curve_name="")
    (place, of_start), (_, of_kl), (_, of_reward) = drawn
    assert place == (0.0, 0.4)
    np.testing.assert_allclose(np.ravel(of_start["yerr"]), 2 * [0.391993], rtol=1e-5)
    np.testing.assert_allclose(np.ravel(of_reward["yerr"]), 2 * [0.195996], rtol=1e-5)
    np.testing.assert_allclose(np.ravel(of_kl["xerr"]), 2 * [0.097998], rtol=1e-5)
    assert {bars["label"] for _, bars in drawn} == {"95 % interval over prompts"}


def test_plot_has_hollow_points_for_runs_that_have_not_finished(tmp_path, monkeypatch):
    """Of two runs, the one that was measured on validation prompts is still going."""
    about = dict(panel="a", method="dpo", seed=0, step=9, reward=1.0)
    rows = [
        about | dict(parameter="β=1", kl=1.0, prompts="test"),
        about | dict(parameter="β=2", kl=0.5, prompts="validation"),
    ]
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    curve = Curve(np.array([0.0, 2.0]), np.array([0.0, 3.0]))
    plots.panels(tmp_path / "one.png", rows, {"a": curve}, {"a": ""}, curve_name="")
    points = {}
    for line in figures[0].axes[0].lines:
        if line.get_label().startswith("DPO"):
            points[line.get_xdata()[0]] = line.get_label(), line.get_fillstyle()
    assert points == {1.0: ("DPO", "full"), 0.5: ("DPO, not finished", "none")}


def test_plot_labels_hide_nothing(drawn):
    from matplotlib.text import Text

    figure, _ = drawn
    for axes in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts]
        assert len(boxes) > 9
        for first, second in itertools.combinations(boxes, 2):
            assert not first.overlaps(second)
        for line in axes.lines:
            if line.get_markersize() == 7:
                marks = axes.transData.transform(np.transpose(line.get_data()))
                assert not any(box.contains(*mark) for box in boxes for mark in marks)
        assert all(
            axes.bbox.containsx(x) and axes.bbox.containsy(y)
            for box in boxes
            for x, y in box.get_points()
        )
