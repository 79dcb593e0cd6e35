"""What a run will cost: python -m dpo_jax.plan --config=FILE [--config.FIELD=VALUE ...]
--topology=v5p:4x4x4

Compiles the run's own train step by the real TPU compiler, on any machine and from shapes alone,
and reports memory, time and cost; where it does not fit, it tries what would make it. For GPUs
(h200:8) all is estimated.
"""

import dataclasses
import functools
import json

import jax

from dpo_jax.parallel import processes
from dpo_jax.planning import advice, planner, topologies
from dpo_jax.planning import report as report_lib


def main():
    from absl import app, flags
    from ml_collections import config_flags

    config = config_flags.DEFINE_config_file("config", None, "The run's config file; see configs/.")
    where = flags.DEFINE_string(
        "topology", None, "Chips to plan for: v5p:4x4x4, v5p-128, v5e-16, h200:8 ..."
    )
    stage = flags.DEFINE_string("stage", "", "Which training stage; the last, if not given.")
    model = flags.DEFINE_string(
        "model_config", "", "A config.json, or a well-known model, instead of the run's."
    )
    prompt = flags.DEFINE_integer(
        "prompt_tokens", 0, "Tokens of each prompt; the longest, if not given."
    )
    response = flags.DEFINE_integer("response_tokens", 0, "Tokens of each response; likewise.")
    rows = flags.DEFINE_integer(
        "rows", 0, "Training rows, where the config gives no steps and they are not known."
    )
    as_json = flags.DEFINE_boolean(
        "json", False, "Print the report as JSON, and nothing else to standard output."
    )
    sweep = flags.DEFINE_boolean("sweep_mesh", False, "Compare all mesh shapes.")
    flags.mark_flags_as_required(["config", "topology"])
    jax.config.update("jax_platforms", "cpu")  # no device is used, and none is taken from who does
    jax.config.update("jax_num_cpu_devices", topologies.MACHINE)
    processes.start()

    def run(_):
        planned = [name for name in config.value.stages if name in planner.STAGES]
        last = planned[-1] if planned else ""
        chosen, topology = stage.value or last, topologies.parse(where.value)
        assumed = planner.Assumptions(prompt.value, response.value, rows.value, model.value)
        replan = functools.partial(planner.plan, topology=topology, stage=chosen, assumed=assumed)
        if sweep.value:
            reports = advice.sweep_mesh(config.value, chosen, topology.chips, replan)
            values = [report.to_dict() for report in reports]
            text = report_lib.sweep_table(reports)
        else:
            report = replan(config.value)
            if not report.fits:
                found = advice.advise(config.value, chosen, report, replan)
                report = dataclasses.replace(report, advice=found)
            values, text = report.to_dict(), report_lib.table(report)
        print(json.dumps(values) if as_json.value else text)

    app.run(run)


if __name__ == "__main__":
    main()
