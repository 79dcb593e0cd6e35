"""Experiments on beta and on the gradient's weight: what they train, and what they make of rows."""

from experiments import beta, gradient_weight


def test_ablation_differs_from_dpo_by_the_weight_alone():
    """RMSprop takes away the factor beta, once gradients are clipped at the same point."""
    weighted = gradient_weight.config_of("weighted", 1)
    unweighted = gradient_weight.config_of("unweighted", 1)
    assert weighted.stages[:2] == unweighted.stages[:2]
    for name in ("data", "sft", "pairs", "model", "sampling"):
        assert weighted[name] == unweighted[name]
    assert weighted.seed == unweighted.seed == 1
    dpo, unlikelihood = weighted.dpo, unweighted.unlikelihood
    shared = set(dpo) & set(unlikelihood) - {"max_grad_norm"}
    assert {name for name in shared if dpo[name] != unlikelihood[name]} == set()
    assert dpo.optimizer == "rmsprop" and unlikelihood.alpha == 1
    assert unlikelihood.max_grad_norm == dpo.max_grad_norm / dpo.beta
    assert (dpo.loss, dpo.label_smoothing, dpo.weighting) == ("sigmoid", 0, "none")


def rows_of_weights(seeds=(0, 1)):
    rows = []
    for method, reward in (("weighted", 2.0), ("unweighted", -3.0)):
        for seed in seeds:
            for step, share in ((0, 0.0), (10, 1.5), (20, 1.0)):
                row = dict(method=method, seed=seed, step=step, gradient_weight=0.4)
                row |= dict(reward=share * (reward + seed), kl=share, chosen=-share, rejected=-2.0)
                rows.append(row)
            rows[-1]["gap"] = 0.25
    return rows


def test_summary_of_weights(tmp_path):
    rows = rows_of_weights()
    weighted, unweighted = gradient_weight.summary(rows)
    assert weighted["reward"]["mean"] == 2.5 and weighted["step"] == 20
    assert weighted["gap"]["mean"] == 0.25 and unweighted["reward"]["mean"] == -2.5
    assert gradient_weight.summary(rows_of_weights([0]))[0]["kl"]["high"] is None
    lines = gradient_weight.table([weighted, unweighted]).splitlines()
    assert lines[2].startswith("| DPO | 2.50 ± ") and lines[2].endswith(" | −2.00 ± 0.00 |")
    curve = dict(seed=0, kl=[0, 1], reward=[0, 3])
    gradient_weight.draw(tmp_path / "figure.png", rows, curve)
    assert (tmp_path / "figure.png").stat().st_size and (tmp_path / "figure.pdf").stat().st_size


def test_summary_of_betas(tmp_path):
    rows = []
    for optimizer in beta.LEARNING_RATES:
        for strength in beta.BETAS:
            for seed in range(2):
                for step in (0, beta.EVERY, 300):
                    row = dict(optimizer=optimizer, beta=strength, seed=seed, step=step)
                    kl = strength + seed if step == beta.EVERY else step / 100 / strength
                    rows.append(row | dict(kl=kl, optimum_kl=2 / strength, reward=0.0))
    found = beta.summary(rows)
    first = found[0]
    assert (first["optimizer"], first["beta"]) == ("sgd", beta.BETAS[0])
    assert first["first"]["mean"] == 1.5 and first["last"]["mean"] == 3.0
    assert first["optimum"]["mean"] == 2.0 and len(found) == 6
    assert beta.table(found).splitlines()[2].startswith("| SGD | 1 | 1.500 ± ")
    beta.draw(tmp_path / "figure.png", rows)
    assert (tmp_path / "figure.png").stat().st_size
