"""Upload a run to the Hugging Face hub, or to any server that speaks its protocol (HF_ENDPOINT)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from povid.fault import Fault
from povid.files import files_in
from povid.model.loading import Dtype
from povid.publish.folder import publishable, write

AGAIN = "run the same command again; what is uploaded already is not sent twice"
KEPT = (".gitattributes",)  # files that the hub itself puts into a repository


def push(
    run: Path,
    repo: str,
    *,
    public: bool = False,
    base: str | None = None,
    license: str | None = None,
    dtype: Dtype | None = None,
) -> str:
    """Publish a run (``folder.write``) in a repository of the hub, which is made if it does not exist.

    The folder is the same each time it is made, so that an upload that broke off is resumed by running it again.

    Args:
        run: its folder.
        repo: OWNER/NAME, or NAME in the account of whoever is logged in.
        public: whether everybody may see a new repository.
        base, license: see ``folder.publishable``.
        dtype: of the weights of a merged checkpoint; None for an adapter.

    Returns:
        Where it is, for a person to read.

    Raises:
        Fault: nobody is logged in, the run cannot be published, the repository is public and ``public`` is not set or
            it holds other files, or the hub refused or could not be reached.
    """
    if get_token() is None:
        raise Fault("nobody is logged in to the hub; run hf auth login, or set HF_TOKEN to a token that may write")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise Fault(f"--repo {repo}: {str(error).splitlines()[0].rstrip('.')}; name it OWNER/NAME") from None
    found = publishable(run, base=base, license=license)
    api = HfApi()
    with answered(repo):
        repo = repo if "/" in repo else f"{api.whoami()['name']}/{repo}"
    with tempfile.TemporaryDirectory(prefix="povid-") as place:
        folder = Path(place) / "upload"
        write(found, folder, repo=repo, dtype=dtype)
        ours = [str(file.relative_to(folder)) for file in files_in(folder)]
        with answered(repo):
            private = _open(api, repo, public, ours)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"{found.run.row}, seed {found.run.results.get('seed')}: run "
                f"{found.run.results['identity']['digest']}",
            )
    stays = "; it existed and stays private: its settings there make it public" if private and public else ""
    return f"{api.endpoint}/{repo} ({'private' if private else 'public'}; {', '.join(ours)}){stays}"


def _open(api: HfApi, repo: str, public: bool, ours: list[str]) -> bool:
    """Make the repository, or check that an existing one may be written to. Returns whether it is private."""
    try:
        there: Any = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=not public)
        return not public
    if not there.private and not public:
        raise Fault(f"{repo} exists and is public; say --public to publish the run there, or name another --repo")
    others = sorted({file.rfilename for file in there.siblings or ()} - {*ours, *KEPT})
    if others:
        raise Fault(
            f"{repo} holds other files ({', '.join(others[:3])}{', ...' * (len(others) > 3)}), which would mix with "
            "the run's; name a new --repo, or delete them there"
        )
    return bool(there.private)


@contextmanager
def answered(repo: str) -> Iterator[None]:
    """Turn every refusal of the hub, and a network that is not there, into one sentence with the cure."""
    try:
        yield
    except (OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise Fault(_sentence(repo, error)) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: of hf_xet, which sends the files
        raise Fault(f"{repo}: the upload broke off ({_first(error)}); {AGAIN}") from error
    except ValueError as error:  # the hub has looked at the card
        said = "; ".join(line.strip(" -.") for line in str(error).splitlines() if line.strip(" -."))
        raise Fault(f"the hub does not take the model card ({said}); a license is named with --license") from error
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):
            raise
        raise Fault(f"{HfApi().endpoint} cannot be reached ({_first(error)}); go online and {AGAIN}") from error


def _sentence(repo: str, error: OfflineModeIsEnabled | HfHubHTTPError) -> str:
    if not isinstance(error, HfHubHTTPError):
        return "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing can be uploaded; unset it"
    owner, status = repo.rpartition("/")[0] or "your account", error.response.status_code
    said = "; ".join(line.strip().rstrip(".") for line in (error.server_message or "").splitlines() if line.strip())
    said = f": {said}" if said else ""
    sentences = {
        400: f"the hub finds the upload invalid (400{said}); mend what it names",
        401: f"the hub does not know the token (401{said}); log in again with hf auth login, or renew HF_TOKEN",
        402: f"the hub wants a payment (402{said}); free storage of {owner}, or publish with --public",
        403: f"the token may not write to {repo} (403{said}); use one with write access to what {owner} owns",
        404: f"the hub knows no {repo}, or hides it from this token (404{said}); check the spelling of --repo",
        409: f"{repo} is being changed by somebody else (409{said}); wait until that is done, then {AGAIN}",
        412: f"{repo} was changed meanwhile (412{said}); {AGAIN}",
        413: f"the hub does not take files of this size (413{said}); publish an adapter instead of --merged",
        429: f"the hub got too many requests (429{said}){_wait(error)}; {AGAIN}",
    }
    if status >= 500:
        return f"the hub has a problem of its own ({status}{said}); {AGAIN} later"
    return sentences.get(status, f"the hub refused the upload of {repo} ({status}{said}); {AGAIN}")


def _wait(error: HfHubHTTPError) -> str:
    seconds = error.response.headers.get("Retry-After", "")
    return f"; wait {seconds} seconds" if seconds.isdigit() else "; wait a few minutes"


def _first(error: BaseException) -> str:
    """The first line of an error's text, or its kind."""
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
