"""Check and measure what needs a GPU, in at most 8 minutes; gpu.sh starts this.

    experiments/benchmark/gpu.sh [--out=DIR] [--wheels=DIR] [--parts=PART,...] [--models=NAME,...]
    JAX_PLATFORMS=cpu experiments/benchmark/gpu.sh --rehearse

It is for a machine without a network that has an H100 or H200, jax with CUDA, torch, transformers,
flax, optax and orbax. What else is needed comes along as wheels: it names what is missing, and
installs DIR's wheels into a folder of their own. Parts:

    tests      the unit tests, on half of the CPU cores, while the GPU works
    checks     attention's kernels and a training step against the CPU's numbers (gpu_checks.py)
    benchmark  our step beside TRL's in bfloat16, and the share of the chip's peak (MFU)

A part is stopped at its limit; one that fails says why, and the others run. DIR gets PART.json and
PART.log of each part, and summary.json, each of them whole or not there. The benchmark's cases come
in order of interest. What does not fit into the time is listed as not run, and --parts=benchmark
--models=NAME,... measures it in another call.

--rehearse runs all parts with tiny sizes. This file runs before packages are installed, so it
imports little more than the standard library.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

from dpo_jax.whole_file import whole_file

ROOT = pathlib.Path(__file__).parents[2]
STOPPING = 10  # seconds that a part has to end by itself, once it is told to
PARTS = ("tests", "checks", "benchmark")
# Below this a case would not get past its compilation.
LEAST_CASE_SECONDS = 30
# What the parts need beside requirements.txt: TRL, the tests, and what `datasets` imports.
ALSO_NEEDED = (
    "torch",
    "trl==1.16.0",
    "accelerate>=1.10",
    "pytest>=9",
    "pytest-xdist>=3.8",
    "scikit-learn>=1.7",
    "dill",
    "multiprocess",
    "xxhash",
    "openai>=3.54,<4",
    "distro",
    "httpcore2",
    "httpx2",
    "jiter",
    "pydantic",
    "truststore",
)
# The versions that were tried together; others that the requirements allow may do as well.
VERSIONS = {
    "datasets": "5.2.0",
    "dill": "0.4.1",
    "flax": "0.12.12",
    "ml_collections": "1.1.0",
    "multiprocess": "0.70.19",
    "openai": "3.57.0",
    "orbax-checkpoint": "0.12.8",
    "trl": "1.16.0",
}
# For a machine with Python 3.12 on x86-64, from a machine with any other.
DOWNLOAD = (
    "python3 -m pip download --no-deps --only-binary=:all: --python-version=3.12 "
    "--implementation=cp --platform=manylinux_2_28_x86_64 --platform=manylinux_2_17_x86_64 "
    "--platform=manylinux2014_x86_64 --dest={wheels} {packages}"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A run of the benchmark beside TRL."""

    model: str
    shape: str
    pairs_per_prompt: int
    pairs: int  # in a step

    @property
    def name(self) -> str:
        return f"{self.model}, {self.shape}, {self.pairs_per_prompt} a prompt"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much there is to run, and for how long."""

    cases: tuple[Case, ...]
    case_seconds: int  # the most for a case
    checks_seconds: int
    tests_seconds: int
    tests: str  # a file or folder
    dtype: str  # of the benchmark
    minutes: float  # for everything, unless asked otherwise
    checks: tuple[str, ...] = ()  # flags


# Pairs a step. TRL lays each sequence down by itself, and the logits and activations of both sides
# must fit into 78 GiB.
PAIRS = {"gpt2": 32, "pythia-410m": 16, "pythia-1b": 8}
CASES = tuple(
    Case(model, shape, pairs_per_prompt, pairs)
    for shape, pairs_per_prompt in (("tldr", 4), ("tldr", 1), ("hh", 4), ("hh", 1))
    for model, pairs in PAIRS.items()
)
ON_A_GPU = Sizes(
    cases=CASES,
    case_seconds=180,
    checks_seconds=180,
    tests_seconds=360,
    tests="tests/unit",
    dtype="bfloat16",
    minutes=8,
)
REHEARSAL = Sizes(
    cases=(Case("smoke", "hh", 4, 8),),
    # A busy machine's two cores may need many times what quiet ones do.
    case_seconds=900,
    checks_seconds=600,
    tests_seconds=600,
    tests="tests/unit/data/test_packing.py",
    dtype="float32",
    minutes=30,
    checks=("--tiny",),
)


# Packages


def missing_packages() -> dict[str, str]:
    """Return the requirements that this Python does not meet -> what was found instead."""
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needed = [line for line in lines if not line.startswith("#")]
    missing = {}
    for line in (*needed, *ALSO_NEEDED):
        requirement = Requirement(line)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing[line] = "nothing"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing[line] = version
    return missing


def how_to_bring(missing: dict[str, str], wheels: pathlib.Path) -> str:
    """Return which packages are missing, and the command that fetches their wheels elsewhere."""
    from packaging.requirements import Requirement

    packages = []
    lines = ["packages that this Python lacks:"]
    for line, found in missing.items():
        lines.append(f"  {line} (found {found})")
        name = Requirement(line).name
        wanted = f"{name}=={VERSIONS[name]}" if name in VERSIONS else line
        packages.append(f"'{wanted}'")
    command = DOWNLOAD.format(wheels=wheels, packages=" ".join(packages))
    lines.append(f"fetch their wheels on a machine with a network and bring them:\n  {command}")
    return "\n".join(lines)


def install(wheels: pathlib.Path, site: str) -> str:
    """Install all wheels of a folder into the folder `site`; return what went wrong, or ""."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        return ""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += [f"--find-links={wheels}", f"--target={site}", "--no-compile", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"pip install failed: {done.stderr.strip()[-500:]}"
    print(f"installed {len(files)} wheels of {wheels}", flush=True)
    return ""


# Processes with a limit


class Process:
    """A command with a limit, which prints into a file."""

    def __init__(self, command: list[str], log: pathlib.Path, seconds: float, **options):
        self._began = time.monotonic()
        self._limit = seconds
        self._log = log
        with log.open("a") as file:
            # A session of its own, so that it ends together with all that it started.
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )

    def finish(self) -> dict:
        """Wait for the end, or stop it at its limit; return how it ended, and the seconds."""
        left = self._limit - (time.monotonic() - self._began)
        try:
            code = self._process.wait(max(left, 0))
            ended = "done" if code == 0 else f"failed with exit status {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped at its limit of {self._limit:.0f} s"
            self._stop()
        seconds = round(time.monotonic() - self._began, 1)
        found = dict(ended=ended, seconds=seconds)
        if ended != "done":
            found["last_lines"] = self._log.read_text(errors="replace").splitlines()[-15:]
        return found

    def close(self) -> None:
        """Stop the command if it still runs."""
        if self._process.poll() is None:
            self._stop()

    def _stop(self):
        # An interrupt first: pytest then says what it has found so far.
        self._signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOPPING)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


# Parts


class Day:
    """One call: its sizes, its deadline, and the folder that it writes to."""

    def __init__(self, options, environment: dict[str, str]):
        self.sizes = REHEARSAL if options.rehearse else ON_A_GPU
        self.out = options.out
        self.parts = options.parts
        cases = self.sizes.cases
        self.cases = [case for case in cases if not options.models or case.model in options.models]
        self._environment = environment
        self._ends = time.monotonic() + 60 * (options.minutes or self.sizes.minutes)
        cores = sorted(os.sched_getaffinity(0))
        # Half each, so that the tests do not slow what is timed; a few cores are shared.
        self._few = len(cores) < 8
        self._half = cores if self._few else cores[: len(cores) // 2]
        self._other_half = cores if self._few else cores[len(cores) // 2 :]

    def left(self) -> float:
        """Return the seconds that are left for work; some are kept back to stop it in."""
        return self._ends - time.monotonic() - STOPPING - 5

    def write(self, name: str, found) -> None:
        """Write what was found as NAME.json."""
        with whole_file(self.out / f"{name}.json") as draft:
            draft.write_text(json.dumps(found, indent=1) + "\n")

    def run(self) -> dict:
        """Run the parts; return a summary of each."""
        summary = {}
        with contextlib.ExitStack() as stack:
            tests = None
            if "tests" in self.parts:
                tests = self._start_tests()
                stack.callback(tests.close)
            if "checks" in self.parts:
                summary["checks"] = self._run_checks()
            if "benchmark" in self.parts:
                summary["benchmark"] = self._run_benchmark()
            if tests:
                summary["tests"] = self._finish_tests(tests)
        return summary

    def _process(self, command: list[str], log: str, seconds: float, cores, **variables) -> Process:
        def keep_to_cores():
            os.sched_setaffinity(0, cores)

        return Process(
            [sys.executable, *command],
            self.out / log,
            min(seconds, self.left()),
            env=self._environment | variables,
            preexec_fn=keep_to_cores,
        )

    def _start_tests(self) -> Process:
        workers = 2 if self._few else len(self._half)
        # Named by files, so that a test that hangs is seen in the log.
        command = ["-m", "pytest", self.sizes.tests, f"-n{workers}", "-q", "-rfE"]
        command += ["-p", "no:cacheprovider", "-p", "no:benchmark"]
        # JAX's own choice would be the GPU, which the other parts measure.
        return self._process(
            command,
            "tests.log",
            self.sizes.tests_seconds,
            self._half,
            JAX_PLATFORMS="cpu",
            CUDA_VISIBLE_DEVICES="",
        )

    def _finish_tests(self, tests: Process) -> dict:
        found = tests.finish()
        log = (self.out / "tests.log").read_text(errors="replace")
        found |= read_pytest(log)
        self.write("tests", found)
        return found

    def _run_checks(self) -> dict:
        path = self.out / "checks.json"
        print("checks: kernels and a training step against the CPU's numbers", flush=True)
        command = ["-m", "experiments.benchmark.gpu_checks", f"--out={path}", *self.sizes.checks]
        # Autotuning changes the speed alone, and most of the time would go into it.
        xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
        # The CPU is needed beside the GPU, whatever jax is told to use.
        platforms = os.environ.get("JAX_PLATFORMS", "")
        if platforms and "cpu" not in platforms.split(","):
            platforms += ",cpu"
        seconds = self.sizes.checks_seconds
        found = self._process(
            command,
            "checks.log",
            seconds,
            self._other_half,
            JAX_PLATFORMS=platforms,
            XLA_FLAGS=xla_flags,
        ).finish()
        lines = json.loads(path.read_text()) if path.exists() else []
        found["agree"] = sum(line["ok"] for line in lines)
        found["compared"] = len(lines)
        found["differ"] = [line for line in lines if not line["ok"]]
        return found

    def _run_benchmark(self) -> dict:
        """Run the cases in turn, as many as fit; benchmark.json is written anew after each."""
        cases = []
        took = 0.0  # the longest so far
        for case in self.cases:
            about = dict(name=case.name, **dataclasses.asdict(case))
            if self.left() < max(took, LEAST_CASE_SECONDS):
                cases.append(about | dict(ended="not run: too little time was left"))
            else:
                cases.append(about | self._run_case(case))
                took = max(took, cases[-1]["seconds"])
            self.write("benchmark", cases)
            print(line_of(cases[-1]), flush=True)
        return dict(ended="done", cases=cases)

    def _run_case(self, case: Case) -> dict:
        responses = 2 if case.pairs_per_prompt == 1 else case.pairs_per_prompt + 1
        with tempfile.TemporaryDirectory(prefix="dpo_jax_gpu_") as folder:
            path = pathlib.Path(folder) / "report.json"
            command = ["-m", "experiments.benchmark", f"--json={path}", "--rounds=3", "--steps=3"]
            command += [f"--model={case.model}", f"--shape={case.shape}", f"--pairs={case.pairs}"]
            command += [f"--pairs_per_prompt={case.pairs_per_prompt}", f"--responses={responses}"]
            command += [f"--dtype={self.sizes.dtype}"]
            # Weights of gigabytes are written, so they go where this case's folder is deleted.
            found = self._process(
                command, "benchmark.log", self.sizes.case_seconds, self._other_half, TMPDIR=folder
            ).finish()
            if path.exists():
                report = json.loads(path.read_text())
                found["report"] = report
                found["mfu"] = mfu(report)
        return found


def mfu(report: dict) -> dict[str, float] | None:
    """Return each side's needed FLOP/s as a share of the chip's peak; None for unknown chips."""
    from types import SimpleNamespace

    from dpo_jax.parallel.hardware import chip_of

    chip = chip_of(SimpleNamespace(device_kind=report["about"]["ours"]["device"]))
    if chip is None:
        return None
    peak = chip.flops if report["asked"]["dtype"] == "bfloat16" else chip.float32_flops
    return {side: report[side]["model_flops_per_second"] / peak for side in report["about"]}


def read_pytest(log: str) -> dict:
    """Return the counts of pytest's last line, and the tests that failed."""
    counts = {}
    for line in log.splitlines():
        # Such as "3 failed, 410 passed, 2 skipped in 63.05s (0:01:03)".
        if re.search(r"\bin \d+\.\d+s\b", line):
            counts = {name: int(count) for count, name in re.findall(r"(\d+) ([a-z]+)", line)}
    failed = re.findall(r"^(?:FAILED|ERROR) .*", log, re.MULTILINE)
    return dict(counts=counts, failed=failed)


# What is printed


def line_of(case: dict) -> str:
    """Return a case's measurements in a line."""
    text = f"{case['name']:<36}"
    if "report" not in case:
        # The last line is the error's own.
        why = case.get("last_lines", [""])[-1:]
        return f"{text}{case['ended']}: {''.join(why)[:200]}"
    report = case["report"]
    for side in report["about"]:
        rates = report[side]
        text += f"{side} {rates['pairs_per_second']:.1f} pairs/s"
        if case["mfu"]:
            text += f", MFU {case['mfu'][side]:.3f}"
        text += f", {rates['peak_bytes'] / 2**30:.1f} GiB; "
    for name, ratio in report["ratios"].items():
        least, most = ratio["spread"]
        text += f"{ratio['pairs_per_second']:.2f} ({least:.2f} to {most:.2f}) times {name}'s"
    return text


def table(summary: dict) -> str:
    """Return the summary as text."""
    lines = []
    if "tests" in summary:
        tests = summary["tests"]
        counts = ", ".join(f"{count} {name}" for name, count in tests["counts"].items())
        lines.append(f"tests: {tests['ended']}: {counts}")
        lines += [f"  {line[:160]}" for line in tests["failed"]]
    if "checks" in summary:
        checks = summary["checks"]
        lines.append(
            f"checks: {checks['ended']}: {checks['agree']} of {checks['compared']} agree with the "
            "CPU"
        )
        for line in checks["differ"]:
            shown = line.get("failed") or line["errors"]
            lines.append(f"  {line['check']}, {line['kernel']}, {line['dtype']}: {shown}")
    if "benchmark" in summary:
        lines.append("benchmark:")
        lines += [f"  {line_of(case)}" for case in summary["benchmark"]["cases"]]
    for name, part in summary.items():
        # pytest's summary is above; without one the log says why.
        if not part.get("counts"):
            lines += [f"  {name}.log: {line[:160]}" for line in part.get("last_lines", [])]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    found = dict(python=sys.version.split()[0])
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options of the command line."""

    def names(text):
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = os.environ.get("OUT", "runs/gpu")
    here = pathlib.Path(__file__).parent
    parser.add_argument("--out", type=pathlib.Path, default=out, help=f"default: {out}")
    parser.add_argument("--wheels", type=pathlib.Path, default=here / "wheels")
    parser.add_argument("--parts", type=names, default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--models", type=names, default=[], help=f"of {','.join(PAIRS)}")
    parser.add_argument("--minutes", type=float, help="default: 8")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes")
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - set(PARTS) | set(options.models) - set(PAIRS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for name in (*PARTS, "summary"):
        # Other files do no harm, such as a log of what is printed here.
        if (options.out / f"{name}.json").exists():
            parser.error(f"--out={options.out} has a {name}.json already; give a new folder.")
    return options


def main():
    options = parse(sys.argv[1:])
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    with tempfile.TemporaryDirectory(prefix="dpo_jax_site_") as site:
        problem = install(options.wheels, site)
        if problem:
            print(problem, flush=True)
        # For this process, which asks for versions, and for those that it starts.
        sys.path.insert(0, site)
        path = os.pathsep.join([site, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = os.environ | dict(PYTHONPATH=path, HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1")
        missing = missing_packages()
        if missing:
            # What does not need them can run all the same.
            print(how_to_bring(missing, options.wheels), flush=True)
        print(f"versions: {versions()}", flush=True)

        day = Day(options, environment)
        summary = day.run()
        day.write("summary", dict(versions=versions(), missing=missing, parts=summary))
        print(table(summary))
    print(f"files are in {options.out}")


if __name__ == "__main__":
    main()
