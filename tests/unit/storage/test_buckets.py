"""What a bucket's refusal is told as."""

import errno

import aiohttp
import pytest
from botocore.exceptions import EndpointConnectionError
from gcsfs.retry import HttpError
from google.auth.exceptions import RefreshError

from dpo_jax.storage import buckets


class Refusing:
    """A file system that refuses everything with an error."""

    def __init__(self, error: Exception):
        self._error = error

    def pipe_file(self, *args, **options):
        raise self._error


@pytest.mark.parametrize(
    "error, expected",
    [
        (
            OSError(f"Forbidden: {'x' * 300} does not have storage.objects.create access"),
            "The permission that is missing is storage.objects.create.",
        ),
        (PermissionError("AccessDenied: not authorized to perform: s3:PutObject"), "s3:PutObject."),
        (FileNotFoundError("b"), "there is no bucket gs://bucket, or you may not see it"),
        (RuntimeError("no credentials"), "gcloud auth application-default login"),
    ],
)
def test_refusal_says_what_is_missing(error, expected, monkeypatch):
    monkeypatch.setattr(buckets, "_files", lambda scheme: Refusing(error))
    with pytest.raises(OSError) as raised:
        buckets.check("gs://bucket/run")
    assert str(raised.value).startswith("gs://bucket/run cannot be written")
    assert expected in str(raised.value)


def test_unreachable_server_is_no_missing_permission(monkeypatch):
    error = OSError("Cannot connect to host storage.googleapis.com:443")
    monkeypatch.setattr(buckets, "_files", lambda scheme: Refusing(error))
    with pytest.raises(OSError) as raised:
        buckets.check("gs://bucket/run")
    assert "permission" not in str(raised.value)


@pytest.mark.parametrize(
    "address, error",
    [
        ("gs://bucket/run", HttpError({"code": 503, "message": "busy"})),
        ("gs://bucket/run", aiohttp.ClientConnectionError("reset")),
        ("gs://bucket/run", TimeoutError()),
        ("s3://bucket/run", OSError(errno.EBUSY, "SlowDown")),
        ("s3://bucket/run", EndpointConnectionError(endpoint_url="http://host")),
    ],
)
def test_what_may_pass_asks_to_be_tried_again(address, error, monkeypatch):
    """A TimeoutError ends with status 75, at which launchers start the command again."""
    monkeypatch.setattr(buckets, "_files", lambda scheme: Refusing(error))
    with pytest.raises(TimeoutError, match="Run the same command again later") as raised:
        buckets.write(f"{address}/file", b"")
    assert str(raised.value).startswith(f"{address}/file cannot be written at present")


@pytest.mark.parametrize(
    "error", [HttpError({"code": 403, "message": "no"}), RefreshError("expired")]
)
def test_what_waiting_does_not_mend_is_a_mistake(error, monkeypatch):
    monkeypatch.setattr(buckets, "_files", lambda scheme: Refusing(error))
    with pytest.raises(OSError, match="See that the bucket exists") as raised:
        buckets.write("gs://bucket/run", b"")
    assert not isinstance(raised.value, TimeoutError)
