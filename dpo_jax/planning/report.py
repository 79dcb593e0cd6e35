"""Plans as tables for a person."""

from dpo_jax.planning import roofline


def table(report: dict) -> str:
    """The report for a person."""
    mesh, hbm = report["mesh"], report["hbm_gib_per_chip"]
    room = report["capacity_gib"] - hbm
    lines = [
        f"{report['stage']} of {report['parameters'] / 1e9:.2f} billion parameters in {report['dtype']} on "
        f"{report['topology']}, {report['chips']} chips: data {mesh['data']} x fsdp {mesh['fsdp']} x tensor "
        f"{mesh['tensor']}",
        f"{report['batch_size']} rows a step in {report['microbatches']} microbatches, each a prompt of "
        f"{report['prompt_tokens']} tokens and responses of {report['response_tokens']} (assumed)",
        "",
        "memory of a chip, GiB" + ("" if report["compiled"] else " (estimated: not compiled)"),
        *(f"  {kind:<24}{size:10.2f}" for kind, size in report["hbm_gib"].items()),
        f"  {'together':<24}{hbm:10.2f}  of {report['capacity_gib']:.2f}: "
        + (
            f"fits, {room:.2f} to spare"
            if report["fits"]
            else f"does NOT fit, {-room:.2f} too much"
        ),
        "",
        f"a step: {report['flops_per_step']:.3g} FLOPs, of which the model needs "
        f"{report['needed_flops_per_step'] / report['flops_per_step']:.0%}",
    ]
    for kind, found in (report["collectives"] or {}).items():
        lines.append(
            f"  {kind:<24}{found['gib']:10.2f} GiB to a chip"
            + (f", in {found['count']}" if found["count"] else "")
        )
    if advice := report.get("advice"):
        lines += [
            "",
            "to make it fit, add:"
            if advice["fits"]
            else "even this does not make it fit, take more chips:",
            f"  {advice['flags']}",
            f"  ({advice['tries'][-1]['hbm_gib_per_chip']:.2f} GiB a chip)"
            if advice["tries"]
            else "  (nothing is left to try)",
        ]
    if not report["seconds"]:
        return "\n".join(lines)
    lines += ["", "least time, seconds a step"]
    lines += [
        f"  {roofline.PARTS[part]:<24}{value:10.4f}"
        + ("  <- bottleneck" if part == report["bottleneck"] else "")
        for part, value in report["seconds"].items()
    ]
    lines.append(
        f"  {'together':<24}{report['step_seconds']:10.4f}  overlapped perfectly; "
        f"{report['step_seconds_without_overlap']:.4f} not at all"
    )
    if report["steps"]:
        lines.append(
            f"{report['steps']} steps: {report['hours']:.2f} hours, {report['chip_hours']:.1f} chip-hours at "
            "least; evaluations and checkpoints come besides"
        )
    else:
        lines.append(
            "hours: say how many rows there are, --rows=N, or how many steps, as the config does not"
        )
    return "\n".join(lines)


def sweep_table(reports: list[dict]) -> str:
    """Mesh shapes side by side, those that fit first, the fastest on top."""
    lines = ["data fsdp tensor      GiB a chip  fits    s a step  bottleneck"]
    for report in sorted(reports, key=lambda r: (not r["fits"], r["step_seconds"] or 0)):
        mesh, fits = report["mesh"], "yes" if report["fits"] else "no"
        time = (
            f"{report['step_seconds']:>12.4f}  {report['bottleneck']}" if report["seconds"] else ""
        )
        lines.append(
            f"{mesh['data']:>4} {mesh['fsdp']:>4} {mesh['tensor']:>6}  {report['hbm_gib_per_chip']:>14.2f}  "
            f"{fits:<4}{time}"
        )
    return "\n".join(lines)
