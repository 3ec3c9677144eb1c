"""The local cache of the Hugging Face hub, and the one download that a user can ask for ("hf:org/name")."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ...errors import BadWeights, ClipworksError

# by preference; safetensors before pickles
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)  # fmt: skip
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
SIDE_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def weights_in(folder: Path) -> Path:
    """The weights file of a folder: one of the published names, else the only file that could be one.

    Raises
    ------
    BadWeights
        If there is none, or more than one to choose from; the message lists what is there.
    """
    names = sorted(p.name for p in folder.iterdir())
    chosen = choose(names)
    if chosen is not None:
        return folder / chosen
    shown = ", ".join(names[:12]) or "nothing"
    if any(n.endswith(SUFFIXES) for n in names):
        raise BadWeights(f"{folder} holds several weights files; name one of them. It holds {shown}.")
    raise BadWeights(f"{folder} holds no weights ({', '.join(SUFFIXES)}). It holds {shown}.")


def choose(names: Iterable[str]) -> str | None:
    """The published name that comes first in `WEIGHTS`, else the only weights file; None if that does not decide."""
    names = list(names)
    for name in WEIGHTS:
        if name in names:
            return name
    single = [n for n in names if n.endswith(SUFFIXES)]
    return single[0] if len(single) == 1 else None


def split(repository: str) -> tuple[str, str | None]:
    """ "org/name@revision" to its parts, checked."""
    if not REPOSITORY.fullmatch(repository):
        raise ClipworksError(f"name_or_path must be 'hf:org/name' or 'hf:org/name@revision'. Got 'hf:{repository}'.")
    name, _, revision = repository.partition("@")
    return name, revision or None


def cached(repository: str) -> Path | None:
    """The snapshot of a repository in the local cache, if its weights are there; never uses the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, revision = split(repository)
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None
    found = choose(p.name for p in folder.iterdir() if p.exists())
    if found is None or (found.endswith(".index.json") and not _complete(folder / found)):
        return None
    return folder


def _complete(index: Path) -> bool:
    from .files import read_json

    shards = read_json(index).get("weight_map")
    return isinstance(shards, dict) and all((index.parent / str(n)).exists() for n in shards.values())


def download(repository: str) -> Path:
    """The snapshot of a repository: from the local cache, else weights and side files fetched from the hub.

    Raises
    ------
    ClipworksError
        If the hub cannot be reached or has no such repository.
    """
    folder = cached(repository)
    if folder is not None:
        return folder
    from huggingface_hub import HfApi, snapshot_download

    name, revision = split(repository)
    try:
        listed = HfApi().list_repo_files(name, revision=revision)
        chosen = choose(listed)
        if chosen is None:
            raise BadWeights(f"hf:{repository} holds no weights that can be told apart: {', '.join(listed[:12])}.")
        wanted = [chosen, *SIDE_FILES]
        if chosen.endswith(".index.json"):
            wanted.append(chosen.removesuffix(".index.json").replace(".", "-*."))
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except BadWeights:
        raise
    except Exception as error:  # the client raises many kinds, from the network's to its own
        reason = str(error).strip().split("\n")[0][:200]
        raise ClipworksError(
            f"hf:{repository} is not in the local cache and could not be fetched from the hub ({reason}). "
            "Without a network, give the path of a folder that holds the model's files."
        ) from error
