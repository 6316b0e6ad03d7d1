"""The hub: a finished checkpoint uploaded by huggingface_hub."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (  # HTTPError: httpx's or httpx2's, whichever the installed client uses
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]: see above
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from fermisvd.errors import FermiSVDError, reason
from fermisvd.files import INDEX_NAME
from fermisvd.format import validate_checkpoint
from fermisvd_convert.card import name_repository
from fermisvd_convert.places import OURS

# Weights of an earlier upload that are in other files than OUT's would be loaded along with them.
EARLIER_WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", INDEX_NAME]


class HubError(FermiSVDError):
    """The hub cannot be used as asked, or did not answer."""


def check_repository(repository: str, private: bool = False) -> None:
    """Refuse what could not be pushed to, before long work. Changes nothing on the hub.

    repository: OWNER/NAME. Raises HubError if it is no such name; if no login is there, or the hub does not take it, or
    it may not write for OWNER (of fine-grained tokens only the push itself tells); if the repository holds anything but
    a FermiSVD checkpoint; or if it is to be private and is public.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise HubError(f"{repository}: not a repository's name: {reason(error)}") from None
    owner, slash, _ = repository.partition("/")
    if not slash:
        raise HubError(f"{repository}: not a repository's name: must be OWNER/NAME")
    api = HfApi(library_name="fermisvd")
    with _clear_errors(repository):
        login = api.whoami()
        try:
            found = api.model_info(repository)
        except RepositoryNotFoundError:
            found = None
    name = login["name"]
    role = ((login.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise HubError(f"{repository}: the token of {name} may only read; make one that may write")
    if role == "write" and owner not in (name, *(each["name"] for each in login.get("orgs", []))):
        raise HubError(f"{repository}: {name} is neither {owner} nor in an organization of that name")
    if found is None:
        return
    files = {file.rfilename for file in found.siblings or []}
    if "fermisvd.json" not in files and files - {".gitattributes", "README.md", "LICENSE"}:
        raise HubError(f"{repository}: holds files and is no FermiSVD checkpoint; choose another name")
    if private and not found.private:
        raise HubError(f"{repository}: exists and is public; make it private on the hub first, or choose another name")


def push(out: Path, repository: str, private: bool = False) -> str:
    """Upload every file of the checkpoint `out` to the hub's model repository OWNER/NAME; returns its address.

    The repository is made if need be. The commands in the card name it from then on. Weight files there that `out` has
    not are deleted. Raises FormatError for a broken checkpoint, and HubError for all that `check_repository`
    refuses and for an upload that fails: `out` stays whole, and the error says how to push it again.
    """
    validate_checkpoint(out)
    check_repository(repository, private)
    name_repository(out, repository)
    api = HfApi(library_name="fermisvd")
    command = ["fermisvd", "push", str(out), repository, *(["--private"] if private else [])]
    with _clear_errors(repository, f"; {out} is complete, push it again: {shlex.join(command)}"):
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=out,
            commit_message="Upload FermiSVD checkpoint",
            ignore_patterns=[f"{OURS}/*"],
            delete_patterns=EARLIER_WEIGHTS,
        )
    return str(address)


@contextmanager
def _clear_errors(repository: str, remedy: str = "") -> Iterator[None]:
    """Whatever the client raises is one line: no answer, a refusal of the hub, an upload that xet gave up."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = {
            401: "the hub does not take the login; run `hf auth login`, or set HF_TOKEN",
            403: "the login may not write there",
        }.get(status, reason(error.server_message or error.response.reason_phrase))
        raise HubError(f"{repository}: {said} (HTTP {status}){remedy}") from None
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"{repository}: the hub cannot be used: {reason(error)}{remedy}") from None
