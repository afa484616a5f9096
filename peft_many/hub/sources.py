"""Where adapters come from: local folders and Hub repositories, revisions included."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # or httpx2, as the version has it
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftWarning
from torch import nn
from typing_extensions import Unpack

from ..files.atomic import writable_place
from ..files.card import CARD_NAME
from ..files.errors import StatisticsError
from ..files.source import AdapterSource
from ..files.statistics import STATISTICS_NAME, AdapterStatistics

# All that merging reads; nothing else is downloaded, pickles least of all.
ADAPTER_FILES = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, STATISTICS_NAME]
# What to say of errors of the Hub; the first that fits, as some are kinds of others.
_WHAT_IS_WRONG: dict[type[Exception], str] = {
    HFValidationError: "There is no folder {entry}, and it is no Hub repository id either.",
    RevisionNotFoundError: "The Hub repository '{repo_id}' has no revision '{revision}'.",
    GatedRepoError: (
        "The Hub repository '{repo_id}' is gated: ask for access on its page, and log in by `hf auth login`, or set "
        "HF_TOKEN."
    ),
    RepositoryNotFoundError: (
        "There is no folder {entry} and no Hub repository '{repo_id}' (or it is private: log in by `hf auth login`, "
        "or set HF_TOKEN)."
    ),
    LocalEntryNotFoundError: (
        "There is no folder {entry}, and the Hub cannot be reached for '{repo_id}', which is not in the cache."
    ),
    HfHubHTTPError: "{entry} cannot be downloaded from the Hub: {error}",
    # A connection that breaks off, or a file that comes short.
    httpx.HTTPError: "The connection to the Hub broke off while {entry} was downloaded ({error}); try again.",
}


class HubArguments(TypedDict, total=False):
    """How to reach the Hub, as in [`~huggingface_hub.snapshot_download`]."""

    token: str | bool | None  # an access token, or whether to use the one that was saved by logging in
    cache_dir: str | Path | None  # where downloads are kept
    local_files_only: bool  # use only what was downloaded before


class AdapterNotFoundError(FileNotFoundError):
    """An adapter is neither a local folder nor a Hub repository that can be reached."""


class RemoteStatistics:
    """The statistics of an adapter on the Hub that was loaded without them: inference downloads none.

    They are downloaded when the adapter is saved again, so that saving and pushing lose nothing. No dataclass: a
    config is printed, logged and pickled, and the token must stay out of that.
    """

    def __init__(self, repo_id: str, filename: str, *, token: str | bool | None = None, **where: Any) -> None:
        self.where = {"repo_id": repo_id, "filename": filename, **where}  # as `hf_hub_download` takes it
        self._token = token

    def __repr__(self) -> str:
        return f"RemoteStatistics({self.where['repo_id']!r}, revision={self.where.get('revision')!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteStatistics:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_token": None}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Download the file and write it into `folder` as it is."""
        try:
            path = hf_hub_download(**self.where, token=self._token)
            AdapterStatistics.load(path).save(folder)
        except (EntryNotFoundError, httpx.HTTPError, StatisticsError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return  # the adapter has none
            # Not an error: the model being saved may have been trained for hours since.
            warnings.warn(
                f"The statistics of '{self.where['repo_id']}' cannot be fetched, so it is saved without them; to "
                f"merge it, put its {STATISTICS_NAME} into '{folder}'. ({first_line(error)})",
                PeftWarning,
                stacklevel=2,
            )


def locate_statistics(
    source: str | os.PathLike[str], subfolder: str | None, *, revision: str | None, cache_dir: Any, token: Any
) -> AdapterStatistics | RemoteStatistics | None:
    """The statistics that lie beside an adapter's config, without downloading anything."""
    folder = Path(source, subfolder or "")
    if folder.is_dir():
        path = folder / STATISTICS_NAME
        return AdapterStatistics.load(path) if path.is_file() else None
    repo_id, prefix = str(source), f"{subfolder}/" if subfolder else ""
    config = try_to_load_from_cache(repo_id, f"{prefix}{CONFIG_NAME}", cache_dir=cache_dir, revision=revision)
    # The commit that the config came from: a branch may move before the statistics are fetched.
    commit = Path(config).parents[prefix.count("/")].name if isinstance(config, str) else revision
    name = f"{prefix}{STATISTICS_NAME}"
    cached = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=commit)
    if isinstance(cached, str):
        return AdapterStatistics.load(cached)
    return RemoteStatistics(repo_id, name, token=token, revision=commit, cache_dir=cache_dir)


def check_entry(entry: Any) -> None:
    """Refuse what can be no adapter's place, a model in memory say, with a `ValueError`."""
    if not isinstance(entry, (str, os.PathLike)) or not os.fspath(entry):
        what = repr(entry) if not entry else f"a {type(entry).__name__}"
        how = "; save it (`save_pretrained(folder)`) and give the folder" if isinstance(entry, nn.Module) else ""
        raise ValueError(f"Adapters must be given as folders or Hub ids, but one is {what}{how}.")


def find_adapter(entry: str | os.PathLike[str], **hub: Unpack[HubArguments]) -> AdapterSource:
    """Find a local folder, or download a Hub repository's adapter files (`"me/adapter"` or `"me/adapter@revision"`).

    What is neither, or cannot be reached, is an `AdapterNotFoundError`.
    """
    check_entry(entry)
    unknown = next((name for name in hub if name not in HubArguments.__annotations__), None)
    if unknown is not None:  # which a local folder would let pass
        raise TypeError(
            f"unexpected keyword argument '{unknown}'; the Hub's are {', '.join(HubArguments.__annotations__)}"
        )
    path = Path(entry).expanduser()
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise PermissionError(f"The folder '{entry}' cannot be read: permission denied.")
        return AdapterSource(folder=path, name=str(entry))
    if path.is_file():
        raise AdapterNotFoundError(f"There is no folder '{entry}', but a file; give its folder, '{path.parent}'.")
    if "://" in str(entry):
        raise AdapterNotFoundError(f"{str(entry)!r} is an address; give a folder, or a Hub id such as 'me/adapter'.")
    repo_id, _, revision = str(entry).partition("@")
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision or None,
            allow_patterns=[*ADAPTER_FILES, CARD_NAME],  # the card for what it was trained on
            **hub,
        )
    except tuple(_WHAT_IS_WRONG) as error:
        reason = next(reason for kind, reason in _WHAT_IS_WRONG.items() if isinstance(error, kind))
        said = reason.format(entry=repr(str(entry)), repo_id=repo_id, revision=revision, error=first_line(error))
        raise AdapterNotFoundError(said) from None
    return AdapterSource(folder=Path(folder), name=repo_id, revision=Path(folder).name)


def replaceable_files(output: Path, overwrite: bool) -> list[str]:
    """The files in the output folder that an adapter or a merge may replace.

    Raises:
        FileExistsError: Something is there that may not be replaced.
    """
    replaced = [*ADAPTER_FILES, CARD_NAME] if overwrite else []
    try:
        writable_place(output, replaced)
    except FileExistsError as error:
        if overwrite or not (output / CONFIG_NAME).is_file():
            raise
        raise FileExistsError(f"{error} To replace the adapter in it: `overwrite=True`, or `--overwrite`.") from None
    return replaced


def first_line(error: Exception) -> str:
    """What an error says, without what is below: the Hub's ids of requests, or advice of torch."""
    return str(error).strip().partition("\n")[0]
