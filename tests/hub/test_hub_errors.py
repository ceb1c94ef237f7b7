"""What users read when a repository on the Hub cannot be read or written; answers of the server are real responses."""

from collections.abc import Callable

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import hf_raise_for_status, httpx, validate_repo_id

from hf_bcd.hub.errors import HubError, explained
from hf_bcd.utils.text import redacted


TOKEN = "hf_" + "A1b2C3d4" * 4


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)


def answer(status: int, code: str | None = None, url: str = "https://huggingface.co/api/models/me/x", **headers: str):
    """Raises what the client makes of an answer of the Hub."""
    headers |= {"X-Error-Code": code} if code else {}
    hf_raise_for_status(httpx.Response(status, headers=headers, request=httpx.Request("GET", url)))


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "RepoNotFound", "model me/x does not exist on .*, or is private .*HTTP 404.*hf auth login"),
        (401, None, "model me/x does not exist on .*, or is private .*HTTP 401"),
        (403, "GatedRepo", "model me/x is gated: accept its terms on .*/me/x, then log in with `hf auth login`"),
        (404, "RevisionNotFound", "model me/x has no revision 'v9'"),
        (404, "EntryNotFound", "model me/x lacks a file"),
        (403, None, "no permission .*write access"),
        (409, None, "changed by somebody else"),
        (413, None, "larger than the Hub takes"),
        (429, None, "too many requests .* try again in a few minutes"),
        (503, None, "the Hub has a problem .*HTTP 503"),
        (418, None, "the Hub answered HTTP 418"),
    ],
)
def test_every_answer_of_the_hub_is_one_line_with_a_remedy(status: int, code: str | None, expected: str) -> None:
    with pytest.raises(HubError, match=expected) as caught, explained("model", "me/x", revision="v9"):
        answer(status, code)
    assert "\n" not in str(caught.value)


def test_an_invalid_token_and_the_wait_that_the_hub_asks_for_are_named() -> None:
    with pytest.raises(HubError, match="wants a valid access token"), explained("model", "me/x"):
        answer(401, **{"X-Error-Message": "Invalid credentials in Authorization header"})
    with pytest.raises(HubError, match="try again in 77 seconds"), explained("model", "me/x"):
        answer(429, **{"Retry-After": "77"})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (httpx.ConnectError("[Errno 111] Connection refused"), "no connection to https?://.*Connection refused"),
        (httpx.ReadTimeout("timed out"), "did not answer in time"),
        (httpx.ReadError("[Errno 104] Connection reset by peer"), "broke off"),
        (OfflineModeIsEnabled("offline"), "is not in the cache, and HF_HUB_OFFLINE is set"),
        (ConnectionError("Couldn't reach 'me/x'"), "no connection to .*Couldn't reach"),
    ],
)
def test_the_network_is_named(error: Exception, expected: str) -> None:
    with pytest.raises(HubError, match=f"data set me/x.*{expected}"), explained("data set", "me/x"):
        raise error


def wrapped_like_transformers() -> None:
    try:
        answer(404, "RepoNotFound")
    except OSError as error:
        raise OSError("me/x is not a local folder and is not a valid model identifier") from error


def wrapped_like_the_client() -> None:
    try:
        answer(500)
    except OSError as error:
        raise LocalEntryNotFoundError("An error happened while trying to locate the file") from error


class DatasetNotFoundError(FileNotFoundError):
    """As `datasets` names it; hub.py knows it by this name."""


def wrapped_like_datasets() -> None:
    try:
        answer(403, "GatedRepo")
    except OSError:
        raise DatasetNotFoundError("Dataset 'me/x' is a gated dataset on the Hub. Visit the page.") from None


def hidden_like_datasets() -> None:
    try:
        wrapped_like_the_client()
    except OSError:
        raise FileNotFoundError(
            "Couldn't find any data file. Couldn't find 'me/x' on the Hugging Face Hub either"
        ) from None


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        (wrapped_like_transformers, "does not exist on"),
        (wrapped_like_the_client, "HTTP 500"),
        (wrapped_like_datasets, "is gated"),
        (hidden_like_datasets, "HTTP 500"),
        (lambda: validate_repo_id("not/an/id"), "'me/x' is neither a folder nor a Hub id"),
    ],
)
def test_libraries_that_wrap_an_error_do_not_hide_it(failing: Callable[[], None], expected: str) -> None:
    with pytest.raises(HubError, match=expected), explained("data set", "me/x"):
        failing()


def while_a_missing_file_is_handled() -> None:
    try:
        answer(404, "EntryNotFound")
    except OSError:
        raise ValueError("the learning rate is negative")  # noqa: B904


@pytest.mark.parametrize(
    "failing", [while_a_missing_file_is_handled, lambda: {}["key"], lambda: open("/missing/file"), lambda: int("x")]
)
def test_errors_about_something_else_pass(failing: Callable[[], object]) -> None:
    with pytest.raises(Exception) as caught, explained("model", "me/x"):
        failing()
    assert not isinstance(caught.value, HubError)


def test_no_message_holds_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    with pytest.raises(HubError) as caught, explained("model", "me/x"):
        try:
            raise httpx.LocalProtocolError(f"Illegal header value b'Bearer {TOKEN}'")
        except httpx.LocalProtocolError as error:
            raise OSError("cannot load a-token-of-another-form") from error
    assert TOKEN not in str(caught.value) and "<token>" in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__, "a traceback would show the header"
    assert redacted(f"x {TOKEN} a-token-of-another-form secret", token="secret") == "x <token> <token> <token>"
    assert redacted("import hf_bcd; hf_hub_download") == "import hf_bcd; hf_hub_download"
