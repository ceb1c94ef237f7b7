"""How commands end: a user's mistake is one line, anything else keeps its traceback."""

import pytest

from hf_bcd.cli import COMMANDS, main, run
from hf_bcd.hub.errors import HubError
from hf_bcd.utils.messages import UserError


def failing(error: BaseException):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize("error", [UserError("no student"), HubError("no student"), FloatingPointError("no student")])
def test_mistakes_are_one_line(error: Exception) -> None:
    with pytest.raises(SystemExit, match=r"^error: no student$"):
        run(failing(error))


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), OSError("disk full"), KeyError("x")])
def test_any_other_error_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run(failing(error))


def test_an_interruption_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(failing(KeyboardInterrupt("stopped at step 3")))
    assert ended.value.code == 130
    assert "stopped at step 3. Run the same command with --resume_from_checkpoint true" in capsys.readouterr().err


def test_the_console_script_lists_its_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["hf-bcd"])
    main()
    assert all(command in capsys.readouterr().out for command in list(COMMANDS)[:1])
    monkeypatch.setattr("sys.argv", ["hf-bcd", "distil"])
    with pytest.raises(SystemExit, match="no command 'distil'; choose one of distill"):
        main()
