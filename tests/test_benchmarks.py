"""Rows of benchmarks/run.py run at a small shape: their two sides agree before anything is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_one_query_is_timed_against_its_products(finished, tmp_path):
    flags = [str(finished), "--queries", "5", "--starts", "1", "--json", str(tmp_path / "out.json")]
    script = SCRIPT.with_name("query.py")
    done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["queries"] >= 5 and results["open_to_products"] > 1 and results["cold_to_floor"] > 0
    assert 0 < sum(results["shares"].values()) < 1


def test_products_are_recorded_and_done_again():
    from benchmarks.query import Recorded, replay

    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with Recorded() as recorded:
        x @ w.T
        torch.addmm(torch.randn(5), x, w.T)
        x.expand(2, 3, 4) @ torch.randn(2, 4, 6)
    assert [name for name, _ in recorded.calls] == ["mm", "addmm", "bmm"]
    assert recorded.calls[0][1] == (((3, 4), (4, 1), torch.float32), ((4, 5), (1, 4), torch.float32))
    assert replay(recorded.calls) > 0


def test_adds_are_measured_on_a_copy_without_the_last_corpus(finished, tmp_path):
    before = (finished / "corpus.json").read_bytes(), (finished / "D4.pt").read_bytes()
    flags = [
        str(finished),
        "--adds",
        "2",
        "--in_a_row",
        "1",
        "--folder",
        str(tmp_path),
        "--json",
        str(tmp_path / "out.json"),
    ]
    script = SCRIPT.with_name("living.py")
    done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["adds"][0]["documents"] == 2 and 0 <= results["adds"][0]["old"] <= 1
    assert results["in_a_row"][0]["adds"] == 1 and results["requests_per_second"] > 0
    assert before == ((finished / "corpus.json").read_bytes(), (finished / "D4.pt").read_bytes())
