"""Every row of benchmarks/run.py runs at a small shape: its two sides agree before anything is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "run.py"


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True)


def names() -> list[str]:
    return [line.split()[0] for line in run("--list").stdout.splitlines()]


def test_every_row_runs_and_its_sides_agree(tmp_path):
    pytest.importorskip("transformers")
    done = run("--small", "--repeats", "1", "--threads", "1", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())
    rows = found["rows"]
    assert {"torch", "transformers", "faiss", "threads", "date"} <= set(found)
    assert all(any(row["name"].startswith(name) for row in rows) for name in names())
    for row in rows:
        assert row["ours"] > 0 and row["low"] <= row["ratio"] <= row["high"]
        assert row["reached"] is None  # the figures are for the whole shapes
        if row["peer"]:
            less = row["reach"].startswith("<=")
            wanted = row["ours"] / row["peer"] if less else row["peer"] / row["ours"]
            assert row["ratio"] == pytest.approx(wanted)  # of one repetition


def test_an_unknown_row_is_named():
    pytest.importorskip("transformers")
    done = run("--rows", "train_small,nonsense")
    assert done.returncode and "nonsense" in done.stderr and "train_small" in done.stderr


def test_the_page_on_speed_shows_the_results_that_were_measured():
    shown = run("--show").stdout
    assert shown.count("|") > 50 and shown in (SCRIPT.parents[1] / "docs" / "speed.md").read_text()
