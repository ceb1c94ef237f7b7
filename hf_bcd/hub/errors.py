"""What goes wrong with repositories on the Hub, said in one line without access tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from ..utils.messages import UserError
from ..utils.text import redacted, shortened


class HubError(UserError):
    """A repository on the Hub could not be read or written; the message says what happened and what to do."""


@contextmanager
def explained(kind: str, name: str, *, revision: str | None = None) -> Iterator[None]:
    """Turns errors about one repository into a `HubError` of one line without tokens; others pass.

    Args:
        kind: `model` or `data set`.
        name: Hub id.
        revision: branch, tag or commit that was asked for.

    Raises:
        HubError: instead of what huggingface_hub, transformers or datasets raise about the repository.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # three libraries wrap each other's; what is not about the repository passes on
        cause = cause_of(error, kind, name, revision)
        if cause is None:
            raise
        raise HubError(cause) from None  # the errors behind it may quote request headers


def cause_of(error: BaseException, kind: str, name: str, revision: str | None = None) -> str | None:
    """One line about an error that concerns a repository, whatever library wraps it; None for any other error."""
    # an HFValidationError is the only ValueError about a repository; others merely arose while one was handled
    if isinstance(error, TypeError | LookupError | ArithmeticError):
        return None
    if isinstance(error, ValueError) and not isinstance(error, HFValidationError | HfHubHTTPError):
        return None
    chain = list(_chain(error))
    subject, page = f"{kind} {name}", f"{constants.ENDPOINT}/{'' if kind == 'model' else 'datasets/'}{name}"
    log_in = "log in with `hf auth login` or set HF_TOKEN"

    def first(*types: type[BaseException]) -> Any:
        return next((link for link in chain if isinstance(link, types)), None)

    # `datasets` keeps only its own words, because it raises `from None`
    words = next((str(link) for link in chain if type(link).__name__ == "DatasetNotFoundError"), "")
    if first(GatedRepoError) or "is a gated dataset" in words:
        return f"{subject} is gated: accept its terms on {page}, then {log_in}."
    if first(RevisionNotFoundError) or words.startswith("Revision"):
        return f"{subject} has no revision {revision!r}; its branches and tags are on {page}."
    if first(RepositoryNotFoundError) or "doesn't exist on the Hub or cannot be accessed" in words:
        status = getattr(getattr(first(RepositoryNotFoundError), "response", None), "status_code", None)
        answer = f" (HTTP {status})" if status else ""
        return (
            f"{subject} does not exist on {constants.ENDPOINT}, or is private and your token has no access to it"
            f"{answer}; check the name, or {log_in}."
        )
    if found := first(HFValidationError):
        return redacted(f"{name!r} is neither a folder nor a Hub id 'user/name': {shortened(found)}")
    if first(OfflineModeIsEnabled) or (
        constants.is_offline_mode() and first(LocalEntryNotFoundError, ConnectionError)
    ):
        return f"{subject} is not in the cache, and HF_HUB_OFFLINE is set; run once online, or unset HF_HUB_OFFLINE."
    if found := next(
        (e for e in chain if isinstance(e, HfHubHTTPError) and not isinstance(e, EntryNotFoundError)), None
    ):
        return f"{subject}: {_status_line(found)}"
    if found := first(httpx.TransportError):
        return redacted(f"{subject}: {_network_line(found)}")
    if found := first(LocalEntryNotFoundError, ConnectionError):
        return redacted(f"{subject}: {_no_connection(found)}")
    if found := first(EntryNotFoundError):
        return redacted(f"{subject} lacks a file: {shortened(found)}")
    if "does not appear to have" in str(error):  # transformers
        return redacted(f"{subject} lacks a file: {shortened(error)}")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # `datasets` hides what happened behind `from None`
        hidden = error.__suppress_context__ and "on the Hugging Face Hub either" not in str(error)
        error = error.__cause__ or (None if hidden else error.__context__)


def _status_line(error: HfHubHTTPError) -> str:
    """What a status of the Hub means to its user."""
    status, said = error.response.status_code, shortened(error.server_message or "")
    answer = f"HTTP {status}" + (f", {said}" if said else "")
    wait = error.response.headers.get("Retry-After")
    if status == 401:
        meaning = f"the Hub wants a valid access token ({answer}); log in with `hf auth login` or set HF_TOKEN."
    elif status == 403:
        meaning = f"your access token has no permission for this ({answer}); pushing needs one with write access."
    elif status == 409:
        meaning = f"it was being changed by somebody else at the same moment ({answer}); try again."
    elif status == 413:
        meaning = f"the upload is larger than the Hub takes ({answer})."
    elif status == 429:
        meaning = f"too many requests ({answer}); try again in {f'{wait} seconds' if wait else 'a few minutes'}."
    elif status >= 500:
        meaning = f"the Hub has a problem ({answer}); try again in a few minutes, see https://status.huggingface.co."
    else:
        meaning = f"the Hub answered {answer}."
    return redacted(meaning)


def _network_line(error: Exception) -> str:
    host, said = constants.ENDPOINT, shortened(error) or type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        return f"{host} did not answer in time ({said}); try again."
    if isinstance(error, httpx.ConnectError):
        return _no_connection(error)
    return f"the connection to {host} broke off ({said}); try again."


def _no_connection(error: Exception) -> str:
    return (
        f"no connection to {constants.ENDPOINT} ({shortened(error)}); check the network, or set HF_HUB_OFFLINE=1 once "
        "all is in the cache."
    )
