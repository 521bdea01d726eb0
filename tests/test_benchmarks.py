"""Rows of benchmarks/run.py run at a small shape: their two sides agree before anything is timed."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from toy import TOY  # noqa: E402

from benchmarks import measure, run, sizes, stages  # noqa: E402
from index import Hit  # noqa: E402

SCRIPT = Path(run.__file__)


def check(lines: list[dict]) -> None:
    for line in lines:
        assert line["ours"] > 0 and line["low"] <= line["ratio"] <= line["high"]
        if line["peer"]:
            less = line["goal"].startswith("<=")
            wanted = line["ours"] / line["peer"] if less else line["peer"] / line["ours"]
            assert line["ratio"] == pytest.approx(wanted)  # of one repetition
        assert (line["share"] is None) == line["name"].endswith(("memory", "error", "bytes", "build"))


@pytest.mark.parametrize(
    "name", ["train_base", "continual_default", "search_default", "ood_scan", "rq_encode"]
)
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


MEASURED = [s for s in (run, stages) if Path(s.__file__).with_name(s.RESULTS).exists()]  # the others not yet


@pytest.mark.parametrize("script", MEASURED)
def test_the_page_on_speed_shows_the_results_that_were_measured(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["name", "--show"])
    script.main()
    shown = capsys.readouterr().out
    assert shown.count("|") > 50 and shown in (SCRIPT.parents[1] / "docs" / "speed.md").read_text()


SMALL = "--documents 3000 --width 32 --M 4 --K 64 --queries 8 --dreams 2000".split()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a step are Linux's")
@pytest.mark.parametrize("flags", [SMALL, pytest.param([], marks=pytest.mark.soak)], ids=["small", "million"])
def test_dreams_of_all_documents_take_the_memory_of_dreams_of_a_tenth(flags, tmp_path, capsys):
    """Within 0.1 GiB: of a million documents 8 MB are their row numbers, twice."""
    command = [sys.executable, str(SCRIPT.with_name("million.py")), *flags, "--folder", str(tmp_path / "job")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if not flags:
        with capsys.disabled():
            print(f"\n{done.stdout}")
    added = [float(line.split()[-1]) for line in done.stdout.splitlines() if " dreams of " in line]
    assert len(added) == 2 and added[1] - added[0] < 0.1


def test_a_folder_that_exists_is_left_as_it_is(tmp_path):
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(SystemExit, match="exists already; remove it, or pass another --folder"):
        measure.new_folder(tmp_path)
    assert (tmp_path / "precious").read_text() == "kept"


def test_one_query_is_timed_against_its_products(finished, tmp_path):
    flags = [str(finished), "--queries", "5", "--starts", "1", "--json", str(tmp_path / "out.json")]
    script = SCRIPT.with_name("query.py")
    done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["queries"] >= 5 and results["open_to_products"] > 1 and results["cold_to_floor"] > 0
    assert 0 < sum(results["shares"].values()) < 1


def test_products_are_recorded_counted_and_done_again():
    x, w = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    with measure.Recorded() as recorded:
        y = x @ w.T
        torch.addmm(torch.randn(5), x, w.T)
        x.expand(2, 3, 4) @ torch.randn(2, 4, 6)
        y.sum().backward()  # the gradient of w: (5, 3) @ (3, 4)
    assert [name for name, _ in recorded.calls] == ["mm", "addmm", "bmm", "mm"]
    assert recorded.calls[0][1] == (((3, 4), (4, 1), torch.float32), ((4, 5), (1, 4), torch.float32))
    assert measure.flop(recorded.calls) == 2 * (3 * 4 * 5 + 3 * 4 * 5 + 2 * 3 * 4 * 6 + 5 * 3 * 4)
    state = torch.get_rng_state()
    with measure.Recorded() as same:
        measure.again(recorded.calls)()
    assert same.calls == recorded.calls and torch.equal(torch.get_rng_state(), state)


def test_a_row_reaches_its_goal_by_both_medians():
    ours, peer = [1.0, 2.0, 4.0], [2.0, 2.0, 2.0]
    slow = run.row("name", "work", ours, peer, [0.6, 1.2, 2.4], run.BOUND)
    assert (slow.low, slow.ratio, slow.high, slow.share) == (0.5, 1.0, 2.0, 0.6) and not slow.reached
    assert run.row("name", "work", ours, peer, [0.7, 1.5, 2.4], run.BOUND).reached
    assert run.row("name", "work", ours, peer, [0.6, 1.2, 2.4], run.NO_SLOWER).reached
    assert not run.row("name", "work", [2.5], peer[:1], [2.4], run.BOUND).reached


def test_a_clock_gives_each_moment_to_the_innermost_part(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))  # a second passes between two looks
    clock = stages.Clock()
    with clock.within("D_0"):
        with clock.within("pseudo-queries"), clock.within("tokenising"):
            pass
        with clock.within("scan"), clock.within("tokenising"):
            pass
    clock.lap()
    assert clock.of("D_0") == 3 and clock.of("tokenising") == 2 and clock.of("scan") == 2
    assert clock.of_steps() == 3 + 3  # D_0, and in it pseudo-queries (2) with their tokens (1)
    assert sum(clock.seconds.values()) == 11


def test_the_stages_of_a_run_add_up_to_its_time(toy, tmp_path):
    flags = [
        "--json",
        str(tmp_path / "out.json"),
        "--data",
        str(toy),
        *TOY,
        "--splits",
        "60,40",
        "--vocab",
        "300",
    ]
    done = subprocess.run([sys.executable, stages.__file__, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out.json").read_text())
    assert stages.markdown(results) in done.stdout
    rows = {line["stage"]: line for line in results["rows"]}
    assert list(rows) == [*stages.PARTS, stages.REST] and all(line["seconds"] > 0 for line in rows.values())
    assert sum(line["seconds"] for line in rows.values()) == pytest.approx(results["seconds"])
    assert {name for name, line in rows.items() if not line["flop"]} == {
        "reading", "tokenising", "pseudo-queries", stages.REST,
    }  # fmt: skip


def test_adds_are_measured_on_a_copy_without_the_last_corpus(finished, tmp_path):
    before = (finished / "corpus.json").read_bytes(), (finished / "D4.pt").read_bytes()
    flags = [
        str(finished),
        "--adds",
        "2",
        "--in_a_row",
        "1",
        "--folder",
        str(tmp_path / "job"),
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


def test_the_share_of_documents_found_counts_each_query_by_its_own_document():
    found = {"moon": ["d1", "d2"], "sun": ["d3"], "mars": ["d3", "d4"], "pluto": []}
    index = SimpleNamespace(search=lambda asked: [[Hit(d, -1.0, "") for d in found[text]] for text in asked])
    assert sizes.share_found(index, list(found), ["d2", "d1", "d3", "d4"]) == 0.5


def test_only_a_whole_run_replaces_the_figures_that_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    monkeypatch.setattr(run, "ROWS", {"one": lambda settings: [], "two": lambda settings: []})
    kept = tmp_path / run.RESULTS
    for flags, written in (["--rows", "one"], False), (["--small"], False), ([], True):
        monkeypatch.setattr(sys, "argv", ["run.py", "--threads", "1", *flags])
        run.main()
        assert kept.exists() == written
    before = kept.read_bytes()
    monkeypatch.setitem(run.ROWS, "two", lambda settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.main()
    assert kept.read_bytes() == before


def test_stages_keep_the_figures_of_a_run_without_flags_and_a_folder_that_is_named(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(stages, "__file__", str(tmp_path / "stages.py"))
    monkeypatch.setattr(stages.train, "main", trained.append)
    monkeypatch.setattr(stages, "UNITS", [])
    monkeypatch.setattr(stages, "PARTS", {})
    monkeypatch.setattr(stages.Watch, "results", lambda watch: {})
    monkeypatch.setattr(stages, "markdown", str)
    for flags, written in (["--run=mine", "--d0_steps", "3"], False), ([], True):
        monkeypatch.setattr(sys, "argv", ["stages.py", *flags])
        stages.main()
        assert (tmp_path / stages.RESULTS).exists() == written
    assert trained[0] == ["--run=mine", "--d0_steps", "3"] and trained[1][0] == "--run"
