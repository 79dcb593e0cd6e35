"""Uploading a run's last policy to the hub: --push=OWNER/NAME."""

import os
import pathlib
import re

import huggingface_hub
from huggingface_hub.errors import LocalTokenNotFoundError
from ml_collections import ConfigDict

from dpo_jax import config as configs
from dpo_jax import stage_table
from dpo_jax.console import say, warn

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
UNAUTHORISED, FORBIDDEN, NOT_FOUND = 401, 403, 404  # of HTTP


def check(repository: str, config: ConfigDict) -> None:
    """Check before a run what can be known of an upload after it.

    Raises ValueError where the name is no OWNER/NAME, or the run trains nothing. Warns where nobody
    is logged in.
    """
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(
            f"--push={repository}: expected OWNER/NAME, a model's name on the hub, such as "
            "YOUR_NAME/llama-dpo."
        )
    if not stage_table.training_stages(config):
        raise ValueError(
            f"--push={repository}: no stage of this run trains a model that could be uploaded; its "
            f"stages are {', '.join(config.stages)}."
        )
    if huggingface_hub.get_token() is None:
        warn(
            f"--push={repository}: nobody is logged in to the hub on this machine. Before the run "
            "ends, run: hf auth login"
        )


def push(repository: str, workdir: str | os.PathLike, config: ConfigDict) -> None:
    """Upload hf/ of the last policy, or of the last stage that trains where none is a policy.

    A repository that is not there yet is made, private. Call it on process 0 alone. Raises
    RuntimeError that says what to do where the hub refuses, or is not reached.
    """
    trained = stage_table.policy_stages(config) or stage_table.training_stages(config)
    folder = pathlib.Path(workdir) / configs.folder_names(config)[trained[-1]] / "hf"
    say(f"uploading {folder} to {repository}")
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Upload the result of {folder.parent.name}, trained with dpo_jax",
            # Those of an earlier upload, which may have been cut in other places.
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    except Exception as error:  # noqa: BLE001 - the hub's client, and what it stands on, have many
        raise RuntimeError(
            f"--push={repository}: {_reason(repository, error)} The run is finished and kept in "
            f"{workdir}: the same command uploads it again and trains nothing."
        ) from error
    say(f"uploaded: {getattr(done, 'commit_url', None) or repository}")


def _reason(repository: str, error: Exception) -> str:
    """Say why an upload failed, and what to do about it."""
    owner = repository.partition("/")[0]
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status == UNAUTHORISED:
        return (
            f"nobody is logged in to the hub, or the token is no longer valid ({first_line}). Log "
            "in with a token that may write (hf auth login, or HF_TOKEN)."
        )
    if status in (FORBIDDEN, NOT_FOUND):
        return (
            f"the hub has no {owner} that you may write to ({first_line}). Give your own name or "
            "an organisation of yours (hf auth whoami lists them), and a token that may write."
        )
    if status is not None:
        return f"the hub refused the upload ({first_line})."
    if isinstance(error, FileNotFoundError):
        return f"there is nothing to upload ({first_line})."
    return (
        f"the hub could not be reached ({first_line}). Check the network, and that HF_HUB_OFFLINE "
        "is not 1."
    )
