"""Rows of benchmarks/run.py run at a small shape: their two sides agree before anything is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import run  # noqa: E402

SCRIPT = Path(run.__file__)


def check(lines: list[dict]) -> None:
    for line in lines:
        assert line["ours"] > 0 and line["low"] <= line["ratio"] <= line["high"]
        if line["peer"]:
            less = line["reach"].startswith("<=")
            wanted = line["ours"] / line["peer"] if less else line["peer"] / line["ours"]
            assert line["ratio"] == pytest.approx(wanted)  # of one repetition


@pytest.mark.parametrize("name", ["train_base", "search_default", "ood_scan", "rq_encode"])
def test_a_row_runs_and_its_sides_agree(name):
    lines = [vars(line) for line in run.ROWS[name](run.Settings(repeats=1, threads=1, small=True))]
    assert lines[0]["name"] == name
    check(lines)


@pytest.mark.soak
def test_every_row_runs_and_its_sides_agree(tmp_path):
    flags = ["--small", "--repeats", "1", "--threads", "1", "--json", str(tmp_path / "out.json")]
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out.json").read_text())
    assert {"torch", "transformers", "faiss", "threads", "date"} <= set(results)
    assert all(any(line["name"].startswith(name) for line in results["rows"]) for name in run.ROWS)
    assert all(line["reached"] is None for line in results["rows"])  # the figures are for the whole shapes
    check(results["rows"])


def test_an_unknown_row_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--rows", "train_small,nonsense"])
    with pytest.raises(SystemExit, match="--rows nonsense: wanted some of train_small"):
        run.main()


def test_the_page_on_speed_shows_the_results_that_were_measured(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--show"])
    run.main()
    shown = capsys.readouterr().out
    assert shown.count("|") > 50 and shown in (SCRIPT.parents[1] / "docs" / "speed.md").read_text()
