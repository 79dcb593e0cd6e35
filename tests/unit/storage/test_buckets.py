"""What a bucket's refusal is told as."""

import pytest

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
