"""No value of any flag of any command reaches a user as a traceback: what cannot work is refused in one line."""

from dataclasses import fields

import pytest

import config
import eval as scoring
import search
import train
from config import Config

NUMBERS = {item.name: type(item.default) for item in fields(Config) if type(item.default) in (int, float)}
SWITCHES = [item.name for item in fields(Config) if type(item.default) is bool]
CHOICES = [item.name for item in fields(Config) if item.metadata["choices"]]
TEXTS = [item.name for item in fields(Config) if type(item.default) is str and not item.metadata["choices"]]
BAD_TEXTS = ("no/such/file", "x" * 5000, "a\0b", "\n")


def refused(main, argv: list[str]) -> str:
    """What a command says, which must be a line of its own and neither a page of usage nor a traceback."""
    with pytest.raises((ValueError, OSError)) as error:
        main(argv)
    message = str(error.value)
    assert message and len(message) < 1000 + 5000, message[:200]
    return message


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_below_above_or_of_another_kind_is_refused_with_its_flag(name):
    below = ["-1", "-0.5"] if NUMBERS[name] is float else ["-1", "-9999999999"]
    above = ["1e39", "inf", "nan"] if NUMBERS[name] is float else ["2147483648", "1" + "0" * 30]
    for value in [*below, *above, "x", "", "1,5"]:
        message = refused(config.parse, [f"--{name}={value}"])
        assert f"--{name}" in message, message


@pytest.mark.parametrize("name", CHOICES)
def test_a_word_that_is_no_choice_is_refused_with_those_there_are(name):
    for value in ("nonsense", "OOD", "cosine "):
        message = refused(config.parse, [f"--{name}={value}"])
        assert f"--{name}" in message and "wanted one of" in message


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_takes_no_value(name):
    assert f"--{name}" in refused(config.parse, [f"--{name}=maybe"])


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_cannot_be_what_a_flag_wants_is_refused_before_a_run_is_begun(
    name, toy, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for value in BAD_TEXTS:
        if name in ("run", "data_dir") and value == "no/such/file":
            continue  # a new folder
        flags = {"data": str(toy), "run": str(tmp_path / "run"), "d0_steps": "1", "dense_steps": "1"} | {
            name: value
        }
        if name == "data_dir":
            flags |= {"data": "nq320k", "t5": "none"}
        refused(train.main, [f"--{key}={value}" for key, value in flags.items()])
        assert not (tmp_path / "run" / "dense.pt").exists()


@pytest.mark.parametrize("main", [search.main, scoring.main])
@pytest.mark.parametrize("argv", [["--beam=-1"], ["--beam=0"], ["--beam=x"], ["--device=cuda:99"], ["--device=foo"],
                                  ["--device="], ["--no-such-flag"]])  # fmt: skip
def test_search_and_eval_refuse_in_one_line(main, argv, finished):
    query = ["a query"] if main is search.main else []
    message = refused(main, [str(finished), *query, *argv])
    assert argv[0].split("=")[0] in message


def test_search_refuses_other_numbers_of_documents_and_folders_that_are_no_run(finished, tmp_path):
    for k in ("0", "-1", "x"):
        assert "-k" in refused(search.main, [str(finished), "a query", "-k", k])
    for folder in (tmp_path, tmp_path / "absent", "a\0b", ""):
        refused(search.main, [str(folder), "a query"])
        refused(scoring.main, [str(folder)])
