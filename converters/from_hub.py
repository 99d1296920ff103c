"""A model from the Hugging Face hub, through huggingface_hub: its cache and its environment variables count."""

from __future__ import annotations

from pathlib import Path

from edgekit.errors import SourceError
from edgekit.registry import load_attribute
from edgekit.source import Source

from .from_safetensors import open_directory

__all__ = ["fetch", "open_hub"]

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "README.md"]
_IGNORED = ["consolidated*", "*/*"]  # second copies of the weights, as Mistral publishes, and other formats'


def open_hub(location: str) -> Source:
    """Download `org/name[@revision]` (or find it in the cache) and open it.

    Raises:
        SourceError: The repository is missing, gated, or can't be reached.
    """
    directory = fetch(location, _PATTERNS, _IGNORED)
    # A snapshot lies in a folder named after its commit.
    return open_directory(directory, name=location.partition("@")[0], revision=directory.name)


def fetch(location: str, patterns: list[str], ignored: list[str]) -> Path:
    """The folder of a snapshot of `org/name[@revision]` with the files that match, downloaded where the cache lacks them.

    Raises:
        SourceError: The repository is missing, gated, or can't be reached.
    """
    hub = load_attribute("huggingface_hub")
    errors = load_attribute("huggingface_hub.errors")
    repository, _, revision = location.partition("@")
    try:
        found: str = hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=patterns, ignore_patterns=ignored
        )
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{repository} is gated: its publisher asks you to accept a licence first",
            hint=f"accept it on the page of {repository}, then run `hf auth login` or set HF_TOKEN",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"{repository} is not on the hub, or is private", hint="check the spelling; set HF_TOKEN for a private one"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"{repository} has no revision {revision!r}", hint="give a branch, tag or commit") from error
    except errors.HFValidationError as error:
        raise SourceError(f"{repository!r} is not a valid hub id", hint="a hub id looks like org/name") from error
    except Exception as error:  # offline, timeouts, full disks: errors of the hub's HTTP library have no stable home
        raise SourceError(
            f"{repository} can't be downloaded and is not complete in the cache ({type(error).__name__})",
            hint="check the network, or HF_HUB_OFFLINE and HF_HOME; or give a directory",
        ) from error
    return Path(found)
