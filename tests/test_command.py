"""What every command shares: one line for what is wrong, and output that survives any encoding, pipe and shell."""

import importlib
import io
import os
import shlex
import sys

import pytest

import command


def ended(monkeypatch, main, encoding: str = "utf-8") -> tuple[str, object]:
    """What a command prints on a terminal of this encoding, and with what it ends."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["x.py"])
    code = None
    try:
        command.run(main, "x.py", "stopped; go on with --resume")
    except SystemExit as end:
        code = end.code
    out.flush()
    return out.buffer.getvalue().decode(encoding), code


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_text_is_printed_whatever_the_terminal_can_show(monkeypatch, encoding):
    printed, code = ended(monkeypatch, lambda argv: print("Zürich 北京 किताब 🦆"), encoding)
    assert code is None and printed.encode(encoding).decode(encoding) == printed
    assert "Z" in printed and ("北京" in printed or "\\u5317\\u4eac" in printed)


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("two\nlines of it"), "x.py: two lines of it"),
        (
            OSError(28, "No space left on device", "latest.pt"),
            "x.py: [Errno 28] No space left on device: 'latest.pt'",
        ),
        (
            MemoryError(),
            "x.py: out of memory; pass smaller batches or, to train, --micro_batch or --recompute",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "x.py: out of memory"),
        (KeyboardInterrupt(), "\nx.py: stopped; go on with --resume"),
    ],
)
def test_what_goes_wrong_ends_a_command_with_one_line(monkeypatch, error, line):
    def main(argv):
        raise error

    assert str(ended(monkeypatch, main)[1]).startswith(line)


def test_a_mistake_in_the_program_keeps_its_traceback(monkeypatch):
    def main(argv):
        raise RuntimeError("sizes 3 and 4 differ")

    with pytest.raises(RuntimeError, match="sizes 3 and 4"):
        ended(monkeypatch, main)


def test_the_status_of_a_command_is_that_of_its_main(monkeypatch):
    assert [ended(monkeypatch, lambda argv, c=code: c)[1] for code in (None, 0, 1, 3)] == [None, None, 1, 3]


def test_a_command_line_refuses_in_one_line_and_does_not_guess():
    parser = command.Parser()
    parser.add_argument("--device")
    for argv in (["--dev", "cpu"], ["x"], ["--device"]):
        with pytest.raises(ValueError, match="--help lists what there is$") as error:
            parser.parse_args(argv)
        assert "\n" not in str(error.value)


def test_printed_commands_are_read_by_a_shell_as_they_were():
    words = ["python", "search.py", "runs/my run's", "what's $HOME; `ls`?"]
    assert shlex.split(command.quoted(*words)) == words


def test_devices_that_are_not_there_are_refused_with_those_that_are():
    assert command.check_device("cpu") == "cpu" and command.default_device() in ("cpu", "cuda")
    for name in ("foo", "cuda:99", "", "cpu0", "meta"):
        with pytest.raises(ValueError, match="this machine has cpu"):
            command.check_device(name)


def test_other_systems_are_told_what_it_runs_on(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(SystemExit, match="Linux and macOS"):
        importlib.reload(command)
    monkeypatch.undo()
    importlib.reload(command)
