"""The Hugging Face hub: the files of a data set at one revision, and why something of the hub could not be had.

huggingface_hub says what a revision holds, and knows the login and the endpoint. Large files come through
:mod:`povid.fetching.download`, since huggingface_hub 2 begins an interrupted file again from the start.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import logging
import os
import re
import shutil
import urllib.error
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path, PurePosixPath

from povid.fault import Fault
from povid.fetching.download import Refusal, fetch
from povid.fetching.source import Source

log = logging.getLogger(__name__)

HUB = "https://huggingface.co/"
SHA256 = re.compile("[0-9a-f]{64}")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LOGIN = "`hf auth login`, or HF_TOKEN in the environment"


@dataclass(frozen=True)
class Revision:
    """A data set at one commit: its files, and the license that its card states (None where it states none)."""

    repository: str
    commit: str
    sources: tuple[Source, ...]
    license: str | None


def revision_of(
    repository: str, revision: str | None, files: Sequence[str], unpack: Mapping[str, str] | None = None
) -> Revision:
    """The files of a data set that match the patterns ``files``, at a revision (None: the newest one).

    ``unpack``: archive → folder into which it is unpacked.

    Raises:
        Fault: the hub cannot be reached or refuses, or the revision does not hold a file.
    """
    from huggingface_hub import HfApi, hf_hub_url

    api = HfApi()
    try:
        info = api.dataset_info(repository, revision=revision, files_metadata=True, timeout=60)
    except Exception as error:
        sentence = trouble(error, repository, page(repository))
        if sentence is None and isinstance(error, ValueError | TypeError | KeyError):
            sentence = (
                f"{api.endpoint} does not answer for {repository} as the hub does; open it in a browser, for a login "
                "page or a proxy may stand between, or correct HF_ENDPOINT"
            )
        if sentence is None:
            raise
        raise Fault(sentence) from error
    commit, listed = str(info.sha), {sibling.rfilename: sibling for sibling in info.siblings or ()}
    chosen: dict[str, Source] = {}
    for pattern in files:
        matching = fnmatch.filter(listed, pattern)
        if not matching:
            raise Fault(
                f"{repository} has no file {pattern!r} at revision {commit} (it has {', '.join(sorted(listed)[:8])}); "
                "name another file or revision"
            )
        for name in sorted(matching):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise Fault(f"{repository} has a file {name!r} which leads out of the data; correct HF_ENDPOINT")
            lfs = listed[name].lfs
            chosen[name] = Source(
                hf_hub_url(repository, name, repo_type="dataset", revision=commit, endpoint=api.endpoint),
                name,
                size=listed[name].size,
                sha256=lfs.sha256 if lfs else None,
                unpack=(unpack or {}).get(name),
                origin={"repository": repository, "revision": commit},
            )
    card = info.card_data
    return Revision(repository, commit, tuple(chosen.values()), str(card.license) if card and card.license else None)


def download(revision: Revision, data: Path) -> list[Path]:
    """Download the files of a revision into ``data``, with the user's login if there is one.

    Raises:
        Fault: see :func:`povid.fetching.download.fetch`; or the hub refuses.
    """
    return fetch(
        revision.sources, data, headers=_login(), refusal=_refusal(revision.repository, page(revision.repository))
    )


def download_files(sources: Sequence[Source], data: Path) -> list[Path]:
    """Download files of which some are the hub's: these come from HF_ENDPOINT, with the user's login if there is one.

    Raises:
        Fault: see :func:`povid.fetching.download.fetch`; or the hub refuses.
    """
    from huggingface_hub import constants

    found: list[Path] = []
    for repository, group in groupby(sources, _repository):
        if repository is None:
            found += fetch(list(group), data)
        else:
            mirrored = [replace(each, mirror=f"{constants.ENDPOINT}/{each.url.removeprefix(HUB)}") for each in group]
            found += fetch(mirrored, data, headers=_login(), refusal=_refusal(repository, page(repository)))
    return found


def download_weights(model: str) -> None:
    """Put the weights of a model into the hub's cache, unless they are there; what broke off is resumed.

    The cache keeps a large file under its sha256. Processes that want the same model wait for the first of them.

    Raises:
        Fault: see :func:`povid.fetching.download.fetch`; or the hub refuses a file. :func:`trouble` explains whatever
            else is raised.
    """
    from filelock import FileLock
    from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache

    index = try_to_load_from_cache(model, INDEX)
    names = _shards(index) if isinstance(index, str) else {WEIGHTS}
    if constants.HF_HUB_OFFLINE or all(isinstance(try_to_load_from_cache(model, name), str) for name in names):
        return
    info = HfApi().model_info(model, files_metadata=True, timeout=60)
    listed = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    names = _shards(hf_hub_download(model, INDEX, revision=info.sha)) if INDEX in listed else {WEIGHTS}
    cache, folder = Path(constants.HF_HUB_CACHE), f"models--{model.replace('/', '--')}"
    blobs, unfinished, locks = cache / folder / "blobs", cache / folder / "unfinished", cache / ".locks" / folder
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "weights.lock"):
        sources = [
            Source(hf_hub_url(model, name, revision=info.sha), large.sha256, size=large.size, sha256=large.sha256)
            for name in sorted(names)
            if name in listed
            and (large := listed[name].lfs)
            and SHA256.fullmatch(large.sha256)
            and not (blobs / large.sha256).exists()
        ]
        if not sources:
            return
        size = sum(source.size or 0 for source in sources)
        log.info("%s: %s GB of weights to download into %s (HF_HOME)", model, f"{size / 1e9:,.1f}", cache)
        blobs.mkdir(parents=True, exist_ok=True)
        for file in fetch(sources, unfinished, headers=_login(), refusal=_refusal(model, HUB + model)):
            os.replace(file, blobs / file.name)
        shutil.rmtree(unfinished)


def _shards(index: str) -> set[str]:
    """The files that an index of weights names."""
    return set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())


def _repository(source: Source) -> str | None:
    """The data set of the hub that a file belongs to; None for a file from elsewhere."""
    start = f"{HUB}datasets/"
    return "/".join(source.url.removeprefix(start).split("/")[:2]) if source.url.startswith(start) else None


def _login() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    return {name: value for name, value in build_hf_headers().items() if name.lower() == "authorization"}


def page(repository: str) -> str:
    """Where a person reads about a data set, and accepts its license."""
    return f"{HUB}datasets/{repository}"


def _refusal(name: str, page: str) -> Refusal:
    def said(error: urllib.error.HTTPError) -> str | None:
        code = error.headers.get("X-Error-Code")
        if code or error.code in (401, 403):
            return refused(error.code, code, name, page, error.url)
        return None

    return said


def refused(status: int, code: str | None, name: str, page: str, address: str) -> str:
    """What the hub means by an error status and its header X-Error-Code at an address, as a sentence with the cure."""
    if code == "GatedRepo":
        return (
            f"{name} is gated: accept its license at {page}, log in with the same account ({LOGIN}), and run the same "
            "command again"
        )
    if code == "RepoNotFound" or (status == 404 and not code):
        return (
            f"the hub has no {name}, or it is private; correct the name, or log in with an account that may read it "
            f"({LOGIN})"
        )
    if code == "RevisionNotFound":
        return f"{name} has no such revision; choose one of those that {page} lists"
    if code == "EntryNotFound":
        return f"{name} has no file {address.rpartition('/')[2]}; compare with {page}"
    if status == 401:
        return (
            f"the hub does not accept the login for {name} (401); log in again ({LOGIN}), or log out if {page} is open "
            "to everybody"
        )
    if status == 403:
        return f"the hub does not let this account read {name} (403); ask for access at {page}, or log in with another"
    if status == 429:
        return (
            f"the hub was asked too often for {name} (429); wait some minutes or log in, which allows more ({LOGIN}), "
            "and run the same command again to resume"
        )
    return f"the hub answers {status} for {name}; wait some minutes and run the same command again to resume"


def trouble(error: BaseException, name: str, page: str) -> str | None:
    """Why something of the hub could not be had, as a sentence with the cure; None if ``error`` says nothing of that.

    ``error`` may be of huggingface_hub or of a library that wraps its errors, as transformers does. ``name`` is the
    data set or model, ``page`` its address for people.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    offline = (
        f"{name} is not on this machine, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids downloading it; unset "
        "that, or copy it from a machine that has it"
    )
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for each in chain:
        full = isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(each):
            return (
                f"the disk is full, so {name} could not be downloaded; make room, or set HF_HOME to a folder on "
                "another disk, and run the same command again: files that are complete are kept"
            )
        if isinstance(each, OfflineModeIsEnabled):
            return offline
        if isinstance(each, HfHubHTTPError):
            code = each.response.headers.get("X-Error-Code")
            if isinstance(each, RepositoryNotFoundError) and not isinstance(each, GatedRepoError):
                code = "RepoNotFound"  # which the hub answers with 401 to somebody who is not logged in
            return refused(each.response.status_code, code, name, page, str(each.response.url))
        if isinstance(each, HFValidationError):
            return f"{name!r} is neither a folder nor the name of something on the hub; correct it"
        if _is_of_the_network(each):
            reason = " ".join(str(each).split())[:120] or type(each).__name__
            return (
                f"the hub cannot be reached for {name} ({reason}); check the network, HTTPS_PROXY and HF_ENDPOINT, and "
                "run the same command again: files that are complete are kept"
            )
    if constants.HF_HUB_OFFLINE and any(isinstance(each, LocalEntryNotFoundError) for each in chain):
        return offline
    return None


def _is_of_the_network(error: BaseException) -> bool:
    """Whether an error is a connection's; huggingface_hub has changed its HTTP library, and may again."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or library.startswith(("httpx", "httpcore", "requests"))
