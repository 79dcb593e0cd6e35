"""Check attention's kernels and a training step on a GPU against the CPU's numbers.

    python -m experiments.benchmark.gpu_checks --out=FILE.json [--tiny]

The CPU's numbers are those of plain attention in float32. Attention is compared by its output and
its gradients, a step by its loss and the gradient of all weights, and one model also by the losses
of three updates. An error is ‖difference‖ / ‖CPU's‖, of a loss the difference in nats.

The sizes are those of real models, with few layers and a small vocabulary. FILE gets a line per
comparison and is written anew after each, so a run that is stopped leaves what it found. --tiny is
for a rehearsal on a CPU, where the "GPU" is the CPU itself and cuDNN is left out.
"""

import concurrent.futures
import dataclasses
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dpo_jax import command_line
from dpo_jax import config as configs
from dpo_jax.data.batches import Batches, training_order
from dpo_jax.data.examples import Example
from dpo_jax.models import attention, families, hf, transformer
from dpo_jax.models.transformer import TransformerConfig
from dpo_jax.parallel import processes, sharding
from dpo_jax.training import objectives
from dpo_jax.training.loop import stage_programs
from dpo_jax.training.step import Frozen, accumulate
from dpo_jax.whole_file import whole_file
from experiments.benchmark import work

# The largest relative error that rounding explains. bfloat16 has 8 bits, so a product of rounded
# numbers is off by about 0.4 %, and a few layers of them by a few per cent.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
WIDTHS = (64, 80, 128, 256)  # of heads: GPT-2's, Pythia-2.8B's, Llama's, Pythia-1B's
UPDATES = 3


@dataclasses.dataclass(frozen=True)
class Rows:
    """The sizes of attention's rows; prompt 0: whole rows."""

    prompt: int
    responses: int
    response: int


# Short rows have odd lengths too: they are rounded up to multiples of more than 1 only from 33 on.
ROWS = {
    "two parts": Rows(prompt=320, responses=3, response=64),
    "two parts, odd": Rows(prompt=45, responses=2, response=31),
    "whole rows": Rows(prompt=0, responses=1, response=384),
    "whole rows, odd": Rows(prompt=0, responses=1, response=31),
}
MODELS = {"gpt2": 3, "pythia-2.8b": 2, "pythia-1b": 2}  # and their layers
SMALL_VOCABULARY = 4096  # the head is checked by its width, not by its size
# Of a step: two prompts with five responses each.
PAIRS, PAIRS_PER_PROMPT, RESPONSES = 8, 4, 5


@dataclasses.dataclass(frozen=True)
class Side:
    """A way to compute the same numbers."""

    device: jax.Device
    dtype: str
    kernel: str


class Report:
    """The comparisons so far, in a file that is always whole."""

    def __init__(self, path: str):
        self._path = path
        self._found = []
        self._began = time.perf_counter()

    def add(self, name: str, side: Side, **found) -> None:
        """Add a comparison: its errors, or `failed`."""
        line = dict(check=name, kernel=side.kernel, dtype=side.dtype, **found)
        if "errors" in found:
            # Comparisons with nan are false.
            line["ok"] = all(error <= TOLERANCE[side.dtype] for error in found["errors"].values())
        else:
            line["ok"] = False
        self._found.append(line)
        with whole_file(self._path) as draft:
            draft.write_text(json.dumps(self._found, indent=1) + "\n")
        errors = [f"{key} {value:.1e}" for key, value in found.get("errors", {}).items()]
        shown = ", ".join(errors) or found["failed"]
        verdict = "ok" if line["ok"] else "DIFFERS" if errors else "FAILED"
        seconds = time.perf_counter() - self._began
        print(
            f"{seconds:4.0f} s  {verdict:<8}{name}, {side.kernel}, {side.dtype}: {shown}",
            flush=True,
        )

    def count(self) -> tuple[int, int]:
        """Return how many comparisons agree, and how many there are."""
        return sum(line["ok"] for line in self._found), len(self._found)


def sides(gpu: jax.Device) -> list[Side]:
    """Return what is compared with the CPU."""
    found = [Side(gpu, "float32", "xla"), Side(gpu, "bfloat16", "xla")]
    if gpu.platform == "gpu":
        found.append(Side(gpu, "bfloat16", "cudnn"))
    return found


def check_kernel(name: str, rows: Rows, width: int, cpu: jax.Device, compared: list[Side], report):
    """Compare attention's output and gradients for heads of a width."""
    rng = np.random.default_rng(width)
    heads, kv_heads, row_count = 4, 2, 4

    def numbers(*shape):
        # Representable in bfloat16, so that all sides get the same numbers.
        return np.asarray(rng.normal(size=shape), jnp.bfloat16).astype(np.float32)

    own = (1, row_count, rows.responses, rows.response)
    arrays = [numbers(*own, heads, width)]
    arrays += [numbers(*own, kv_heads, width) for _ in range(2)]
    lengths = None
    if rows.prompt:
        arrays += [numbers(1, row_count, rows.prompt, kv_heads, width) for _ in range(2)]
        lengths = rng.integers(1, rows.prompt + 1, (1, row_count)).astype(np.int32)
    cotangent = numbers(*own, heads, width)
    names = ("output", "q", "k", "v", "prompt_k", "prompt_v")

    def numbers_of(side: Side):
        def attend(*arrays):
            prompts = attention.Prompts(*arrays[3:], lengths) if rows.prompt else None
            return attention.attend_rows(*arrays[:3], prompts, kernel=side.kernel)

        def value_and_gradients(cotangent, *arrays):
            output, pull_back = jax.vjp(attend, *arrays)
            return output, *pull_back(cotangent)

        with jax.set_mesh(sharding.make_mesh(devices=[side.device])):
            given = [jnp.asarray(x, side.dtype) for x in (cotangent, *arrays)]
            return jax.tree.map(_on_host, jax.jit(value_and_gradients)(*given))

    expected = numbers_of(Side(cpu, "float32", "xla"))
    for side in compared:
        found, failed = attempt(numbers_of, side)
        if failed:
            report.add(name, side, failed=failed)
            continue
        errors = {}
        for key, ours, wanted in zip(names, found, expected, strict=False):
            errors[key] = relative_error([ours], [wanted])
        report.add(name, side, errors=errors)


def check_step(
    name: str, model: TransformerConfig, share: bool, updates: int, cpu, compared, report
):
    """Compare the loss and the gradient of a batch, and the losses of updates, if any."""
    config = configs.default(("dpo",))
    config.dpo.update(batch_size=PAIRS, lr=1e-4, warmup_steps=0)
    examples = make_examples(model.vocab)
    order = training_order(len(examples), PAIRS, 1, None)
    limits = attention.row_limits(model.narrowest_window, compared[0].device.platform)
    batch = Batches(examples, order, share=share, limits=limits)[0]
    # The CPU's random numbers do not depend on the device.
    with jax.default_device(cpu):
        params = jax.tree.map(np.asarray, transformer.init(model, jax.random.key(0)))
        # Another policy than the reference, so that the loss is not log 2 whatever the kernel does.
        noise = jax.tree.map(np.asarray, transformer.init(model, jax.random.key(1)))
        policy = jax.tree.map(lambda x, y: x + 0.3 * y, params, noise)
    hyper = objectives.numbers(config.dpo, 1)
    objective = config.dpo.loss

    def numbers_of(side: Side):
        mesh = sharding.make_mesh(devices=[side.device])
        placed = dataclasses.replace(model, dtype=side.dtype, attention=side.kernel)
        with jax.set_mesh(mesh):
            reference = sharding.shard_params(mesh, params)
            trained = sharding.shard_params(mesh, policy)
            given = sharding.shard_batch(mesh, batch, axis=1)
            numbers = jax.device_put(hyper, sharding.replicated(mesh))
            function = objectives.make("dpo", placed, objective)

            def gradient(params, reference, numbers, batch):
                return accumulate(function, params, reference, numbers, batch)

            grads, metrics = jax.jit(gradient)(trained, reference, numbers, given)
            grads = [_on_host(leaf) for leaf in jax.tree.leaves(grads)]
            losses = [_loss(metrics)]
            programs = stage_programs("dpo", config.dpo, placed, mesh)
            if updates:
                state = programs.init_state(trained)
            for _ in range(updates):
                state, metrics = programs.update(state, Frozen(numbers, reference), given)
                losses.append(_loss(metrics))
        return grads, losses

    expected_grads, expected_losses = numbers_of(Side(cpu, "float32", "xla"))
    for side in compared:
        found, failed = attempt(numbers_of, side)
        if failed:
            report.add(name, side, failed=failed)
            continue
        grads, losses = found
        gaps = [abs(a - b) for a, b in zip(losses, expected_losses, strict=True)]
        errors = dict(gradient=relative_error(grads, expected_grads), loss=max(gaps))
        report.add(name, side, errors=errors, losses=losses, expected_losses=expected_losses)


def make_examples(vocab: int) -> list[Example]:
    """Return pairs of TL;DR's lengths: a few to each prompt, over its responses."""
    prompt_G, response_GR = work.lengths("tldr", PAIRS // PAIRS_PER_PROMPT, RESPONSES)
    rng = np.random.default_rng(0)

    def ids(length):
        return rng.integers(1, vocab, length).astype(np.int32)

    examples = []
    for prompt_length, response_lengths in zip(prompt_G, response_GR, strict=True):
        prompt = ids(prompt_length)
        responses = [ids(length) for length in response_lengths]
        for chosen, rejected in work.pairs_of_prompt(RESPONSES, PAIRS_PER_PROMPT):
            examples.append(Example(prompt, (responses[chosen], responses[rejected])))
    return examples


def small(name: str, layers: int) -> TransformerConfig:
    """Return a model of these sizes with few layers and a small vocabulary."""
    fields = dict(work.MODELS[name])
    depth = "n_layer" if fields["model_type"] == "gpt2" else "num_hidden_layers"
    fields[depth] = layers
    fields["vocab_size"] = min(SMALL_VOCABULARY, fields.get("vocab_size", SMALL_VOCABULARY))
    return families.from_hf(hf.make_config(fields | dict(bos_token_id=0, eos_token_id=0)))


def attempt(function, *arguments):
    """Return a function's result and None, or None and the error that it raised, in a line."""
    try:
        return function(*arguments), None
    except Exception as error:  # whatever jax or cuDNN refuses: the other checks go on
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def relative_error(found: list, expected: list) -> float:
    """Return ‖found - expected‖ / ‖expected‖ over all arrays together, in float64."""
    difference = size = 0.0
    for array, wanted in zip(found, expected, strict=True):
        difference += np.sum(np.square(array - wanted), dtype=np.float64)
        size += np.sum(np.square(wanted), dtype=np.float64)
    return float(np.sqrt(difference / size))


def _on_host(x) -> np.ndarray:
    return np.asarray(x, np.float32)


def _loss(metrics: dict) -> float:
    total, count = metrics["loss"]
    return float(total) / float(count)


def checks(tiny: bool) -> list[tuple]:
    """Return the checks: (function, its arguments before the devices)."""
    if tiny:
        rows = Rows(prompt=5, responses=2, response=4)
        return [
            (check_kernel, "attention, heads of 8, two parts", rows, 8),
            (check_step, "step of smoke, groups", small("smoke", 1), True, 1),
        ]
    found = []
    # The longest first. One model's updates and separate rows will do.
    for name, layers in MODELS.items():
        model = small(name, layers)
        updates = UPDATES if name == "gpt2" else 0
        found.append((check_step, f"step of {name}, groups", model, True, updates))
        if updates:
            found.append((check_step, f"step of {name}, separate rows", model, False, 0))
    for width in WIDTHS:
        for name, rows in ROWS.items():
            found.append((check_kernel, f"attention, heads of {width}, {name}", rows, width))
    return found


def main():
    options = flags.FLAGS
    gpu, cpu = jax.devices()[0], jax.devices("cpu")[0]
    report = Report(options.out)
    compared = sides(gpu)
    began = time.perf_counter()
    # Most of the time goes into compiling, on one core each.
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        running = []
        for function, *arguments in checks(options.tiny):
            running.append(pool.submit(function, *arguments, cpu, compared, report))
        for check in running:
            check.result()
    agree, count = report.count()
    print(f"{agree} of {count} comparisons agree, in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "File for the comparisons.", required=True)
    flags.DEFINE_boolean("tiny", False, "Tiny sizes, and no cuDNN: a rehearsal on a CPU.")
    processes.start()
    command_line.run(main, __doc__)
