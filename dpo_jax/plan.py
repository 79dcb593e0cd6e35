"""Plan a run: dpo-jax plan --config=NAME [--config.FIELD=VALUE ...] --topology=v5p:4x4x4

Compiles the run's own train step with the real compiler, for TPUs (v5p:4x4x4) or GPUs (h100:8, or
h100:4x8 for 4 machines of 8), on any machine and from shapes alone, and reports memory,
collectives, time and cost. Times follow from the compiled program by a roofline. Where the run does
not fit, it tries changes that make it fit. Where the GPU compiler is not installed, it says what to
install and estimates from sizes.
"""

import dataclasses
import functools
import json

import jax
from absl import flags

from dpo_jax import command_line
from dpo_jax import config as configs
from dpo_jax.parallel import processes
from dpo_jax.planning import advice, planner, topologies
from dpo_jax.planning import report as report_lib


def main():
    config = command_line.define_config()
    where = flags.DEFINE_string(
        "topology", None, "The chips to plan for: v5p:4x4x4, v5p-128, h200:8, h100:4x8 ..."
    )
    stage = flags.DEFINE_string("stage", "", "Which training stage. Default: the last one.")
    model = flags.DEFINE_string(
        "model_config", "", "A config.json, or a well-known model, instead of the run's."
    )
    prompt = flags.DEFINE_integer(
        "prompt_tokens",
        0,
        "Tokens of each prompt. Default: the longest that the config allows.",
        lower_bound=0,
        upper_bound=10_000_000,
    )
    response = flags.DEFINE_integer(
        "response_tokens",
        0,
        "Tokens of each response. Default: the longest that the config allows.",
        lower_bound=0,
        upper_bound=10_000_000,
    )
    pairs = flags.DEFINE_integer(
        "pairs_per_prompt",
        None,
        "Pairs of each prompt. Default: as the run samples them, else 1.",
        lower_bound=1,
        upper_bound=100_000,
    )
    responses = flags.DEFINE_integer(
        "responses_per_prompt",
        None,
        "Distinct responses to each prompt. Default: as few as make its pairs.",
        lower_bound=2,
        upper_bound=100_000,
    )
    rows = flags.DEFINE_integer(
        "rows",
        0,
        "Training rows, if the config gives no steps and the data set is not known.",
        lower_bound=0,
        upper_bound=configs.MANY,
    )
    as_json = flags.DEFINE_boolean(
        "json", False, "Print the report as JSON, and nothing else to standard output."
    )
    sweep = flags.DEFINE_boolean("sweep_mesh", False, "Compare all shapes of the mesh.")
    flags.mark_flags_as_required(["topology"])

    # A plan needs no device, and takes none from others.
    jax.config.update("jax_platforms", "cpu")
    processes.start()
    # Programs for chips that are not here cannot be read back from the cache of compiled programs.
    jax.config.update("jax_enable_compilation_cache", False)

    def plan():
        planned_config = config.load()
        planned = [name for name in planned_config.stages if name in planner.PLANNED_STAGES]
        last = planned[-1] if planned else ""
        chosen = stage.value or last
        topology = topologies.parse(where.value)
        # CPU devices stand in for GPUs whose compiler is not installed.
        jax.config.update("jax_num_cpu_devices", topology.chips if topology.is_gpu else 1)
        assumed = planner.Assumptions(
            prompt_tokens=prompt.value,
            response_tokens=response.value,
            examples=rows.value,
            model=model.value,
            pairs_per_prompt=pairs.value or 0,
            responses_per_prompt=responses.value or 0,
        )
        replan = functools.partial(planner.plan, topology=topology, stage=chosen, assumed=assumed)
        if sweep.value:
            trained = planner.model_config(planned_config, chosen, assumed.model)
            reports = advice.sweep_mesh(planned_config, chosen, topology.chips, replan, trained)
            values = [report.to_dict() for report in reports]
            text = report_lib.sweep_table(reports)
        else:
            report = replan(planned_config)
            if not report.fits:
                trained = planner.model_config(planned_config, chosen, assumed.model)
                found = advice.advise(planned_config, chosen, report, replan, trained)
                report = dataclasses.replace(report, advice=found)
            values = report.to_dict()
            text = report_lib.table(report)
        print(json.dumps(values) if as_json.value else text)

    command_line.run(plan, __doc__, config=config)


if __name__ == "__main__":
    main()
