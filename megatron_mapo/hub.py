"""Upload a folder to the Hugging Face hub. The token comes from the environment or ``hf auth login``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError

from megatron_mapo.errors import ConfigError, HubError


def create_repository(name: str, private: bool) -> None:
    """Make sure that a model repository exists that this token may write to.

    Args:
        name: ``owner/name``.
        private: whether a new repository is private. One that is there already stays as it is.

    Raises:
        ConfigError: there is no token.
        HubError: the hub refuses, or cannot be reached.
    """
    if get_token() is None:
        raise ConfigError("--push-to-hub needs a token: set HF_TOKEN, or run `hf auth login`")
    with _hub_errors(f"could not create {name}"):
        HfApi().create_repo(name, private=private, exist_ok=True)


def push_folder(folder: Path, name: str, message: str) -> str:
    """Upload all files of ``folder`` as one commit and return the repository's address.

    Raises:
        HubError: the hub refuses, or cannot be reached; the folder stays.
    """
    with _hub_errors(f"could not upload {folder} to {name} (`hf upload {name} {folder}` tries again)"):
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    return f"{HfApi().endpoint}/{name}"


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(f"--push-to-hub: {what}: {' '.join(str(error).split())}") from error
