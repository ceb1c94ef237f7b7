"""Problems with repositories on the Hub, said in one line without access tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants, errors
from huggingface_hub.utils import httpx

from ..utils.messages import UserError
from ..utils.text import redacted, shortened


LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
MEANINGS = {
    401: f"the Hub wants a valid access token ({{answer}}); {LOG_IN}.",
    403: "your access token has no permission for this ({answer}); pushing needs one with write access.",
    409: "it was being changed by somebody else at the same moment ({answer}); try again.",
    413: "the upload is larger than the Hub takes ({answer}).",
    429: "too many requests ({answer}); try again in {wait}.",
    500: "the Hub has a problem ({answer}); try again in a few minutes, see https://status.huggingface.co.",
}


class HubError(UserError):
    """A repository on the Hub could not be read or written; the message says what happened and what to do."""


@contextmanager
def explained(kind: str, name: str, *, revision: str | None = None) -> Iterator[None]:
    """Turns errors about one repository, a `model` or `data set`, into a `HubError` of one line; others pass.

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
    if isinstance(error, ValueError) and not isinstance(error, errors.HFValidationError | errors.HfHubHTTPError):
        return None
    chain, host = list(_chain(error)), constants.ENDPOINT
    subject, page = f"{kind} {name}", f"{host}/{'' if kind == 'model' else 'datasets/'}{name}"

    def first(*types: type[BaseException]) -> Any:
        return next((link for link in chain if isinstance(link, types)), None)

    # `datasets` keeps only its own words, because it raises `from None`; transformers too has words of its own
    words = next((str(link) for link in chain if type(link).__name__ == "DatasetNotFoundError"), "")
    lacking = first(errors.EntryNotFoundError) or (error if "does not appear to have" in str(error) else None)
    answers = [link for link in chain if isinstance(link, errors.HfHubHTTPError)]
    answered = next((link for link in answers if not isinstance(link, errors.EntryNotFoundError)), None)
    if first(errors.GatedRepoError) or "is a gated dataset" in words:
        text = f"{subject} is gated: accept its terms on {page}, then {LOG_IN}."
    elif first(errors.RevisionNotFoundError) or words.startswith("Revision"):
        text = f"{subject} has no revision {revision!r}; its branches and tags are on {page}."
    elif first(errors.RepositoryNotFoundError) or "doesn't exist on the Hub or cannot be accessed" in words:
        status = getattr(getattr(first(errors.RepositoryNotFoundError), "response", None), "status_code", None)
        text = f"{subject} does not exist on {host}, or is private and your token has no access to it"
        text += f"{f' (HTTP {status})' if status else ''}; check the name, or {LOG_IN}."
    elif found := first(errors.HFValidationError):
        text = f"{name!r} is neither a folder nor a Hub id 'user/name': {shortened(found)}"
    elif first(errors.OfflineModeIsEnabled) or (
        constants.is_offline_mode() and first(errors.LocalEntryNotFoundError, ConnectionError)
    ):
        text = f"{subject} is not in the cache, and HF_HUB_OFFLINE is set; run once online, or unset HF_HUB_OFFLINE."
    elif answered is not None:
        text = f"{subject}: {_meaning(answered)}"
    elif found := first(httpx.TimeoutException):
        text = f"{subject}: {host} did not answer in time ({shortened(found) or type(found).__name__}); try again."
    elif (found := first(httpx.TransportError)) and not isinstance(found, httpx.ConnectError):
        said = shortened(found) or type(found).__name__
        text = f"{subject}: the connection to {host} broke off ({said}); try again."
    elif found := found or first(errors.LocalEntryNotFoundError, ConnectionError):
        text = f"{subject}: no connection to {host} ({shortened(found)}); check the network, or set HF_HUB_OFFLINE=1 once "
        text += "all is in the cache."
    elif lacking is not None:
        text = f"{subject} lacks a file: {shortened(lacking)}"
    else:
        return None
    return redacted(text)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # `datasets` hides what happened behind `from None`
        hidden = error.__suppress_context__ and "on the Hugging Face Hub either" not in str(error)
        error = error.__cause__ or (None if hidden else error.__context__)


def _meaning(error: errors.HfHubHTTPError) -> str:
    """A status of the Hub, for its user."""
    status, said = error.response.status_code, shortened(error.server_message or "")
    wait = error.response.headers.get("Retry-After")
    text = MEANINGS.get(min(status, 500), "the Hub answered {answer}.")
    answer = f"HTTP {status}" + (f", {said}" if said else "")
    return text.format(answer=answer, wait=f"{wait} seconds" if wait else "a few minutes")
