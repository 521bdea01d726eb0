"""The experiments: what runs share, what the tables say, and the paired test."""

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import link_tree
from toy import TOY

import store
import train
from config import Config, parse
from tools import experiments

SHARED = Path(os.environ.get("MIXLORA_DATA", Path(__file__).parents[1] / "../shared/data"))
FLAGS = [*TOY, "--splits", "60,20,20"]
experiments.EXPERIMENTS["trial"] = (["bm25", "slow none", "mixlora-dsi", "slow lr"], "mixlora-dsi")


@pytest.fixture(scope="session")
def trial(once, toy) -> Path:
    """A finished experiment of four rows and two seeds, its runs one after another in this process."""

    def make(out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiments, "run_all", in_this_process)
            experiments.main(["trial", "--seeds", "2", "--out", str(out), "--", "--data", str(toy), *FLAGS])

    return once("experiments", make)


def in_this_process(tasks, jobs):
    for task in tasks:
        print(experiments.perform(task, torch.get_num_threads()))


def test_every_row_of_every_experiment_has_a_run_whose_flags_train_accepts():
    for labels, reference in experiments.EXPERIMENTS.values():
        assert reference in labels and len(set(labels)) == len(labels)
        for label in labels:
            run = experiments.RUNS[label]
            settings = parse([*run.flags.split(), "--run", "x"]).config
            start = parse([*experiments.STARTS[run.start].flags.split(), "--run", "x"]).config
            shared = "docid_kind M K width feed_forward split_by lora_rank ood_mode d0_mixture general dream_words dream_noise"
            for name in shared.split():
                if settings.mixture or name not in ("d0_mixture", "ood_mode", "dream_words", "dream_noise"):
                    assert getattr(settings, name) == getattr(start, name), (label, name)
            assert settings.d0_mask == start.d0_mask == "segment", label
    used = {label for labels, _ in experiments.EXPERIMENTS.values() for label in labels}
    assert used == set(experiments.RUNS)
    assert {experiments.RUNS[label].start for label in used} == set(experiments.STARTS)


def test_the_paper_s_figures_beside_the_rows_are_those_of_its_tables():
    path = SHARED.parent / "golden" / "paper_tables.json"
    if not path.exists():
        pytest.skip("needs ../shared/golden/paper_tables.json")
    rows = json.loads(path.read_text())["rows"]["nq320k"]
    names = {
        "bm25": "BM25", "dense": "DPR", "base": "BASE", "dsi++": "DSI++", "clever-512": "CLEVER-512",
        "clever-1024": "CLEVER-1024", "promptdsi": "PromptDSI", "corpusbrain++": "CorpusBrain++",
        "naive-expansion": "Naive Expansion", "mixlora-dsi-pt": "MixLoRA-DSI-PT",
        "never-expand": "MixLoRA-DSI-Expand", "always-expand": "MixLoRA-DSI-OOD", "paper": "MixLoRA-DSI",
    }  # fmt: skip
    assert set(names.values()) == set(rows)
    for label, name in names.items():
        assert experiments.RUNS[label].paper == tuple(f"{r}/{m}" for r, m in rows[name][-3:]), label


def test_runs_share_their_start_bit_by_bit_and_the_start_is_trained_once(trial):
    for seed in (42, 43):
        whole, start = trial / str(seed) / "start-mixture", trial / str(seed) / "start-paper"
        assert not (start / "D1.pt").exists() and not (start / "results.json").exists()
        for label in ("slow_none", "mixlora-dsi", "slow_lr"):
            for name in ("dense.pt", "rq.pt", "docids.npy", "embeddings/D2.npy"):
                assert os.path.samefile(whole / name, trial / str(seed) / label / name)
        assert os.path.samefile(whole / "D0.pt", trial / str(seed) / "mixlora-dsi" / "D0.pt")
        for label in ("slow_none", "slow_lr"):
            assert os.path.samefile(start / "D0.pt", trial / str(seed) / label / "D0.pt")
        seconds = [
            store.read_json(trial / str(seed) / x / "results.json")["seconds"]["D0"]
            for x in ("slow_none", "slow_lr")
        ]
        assert seconds[0] == seconds[1]
    assert not os.path.samefile(
        trial / "42" / "start-mixture" / "D0.pt", trial / "43" / "start-mixture" / "D0.pt"
    )


def test_a_run_that_started_elsewhere_equals_one_that_was_trained_in_one_go(trial, toy, tmp_path):
    """Same flags, one process, no links."""
    alone = [
        "--data",
        str(toy),
        *FLAGS,
        "--method",
        "paper",
        "--slow",
        "none",
        "--seed",
        "42",
        "--run",
        str(tmp_path / "run"),
    ]
    train.main([*alone, "--no-baselines"])
    one, other = (
        store.read_tensors(path / "D2.pt")["model"] for path in (tmp_path / "run", trial / "42" / "slow_none")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_command_again_runs_nothing_and_a_changed_one_is_refused(trial, toy, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "run_all", in_this_process)
    monkeypatch.setattr(train, "execute", None)
    before = (trial / "trial.md").read_text()
    argv = ["trial", "--seeds", "2", "--out", str(trial), "--", "--data", str(toy), *FLAGS]
    experiments.main(argv)
    assert (trial / "trial.md").read_text() == before
    with pytest.raises(ValueError, match=r"mixlora-dsi.json is of a run with other settings \(lr\)"):
        experiments.main([*argv, "--lr", "2e-3"])


def test_a_start_whose_last_stage_was_not_named_done_is_finished_first(trial, toy, tmp_path):
    """As if killed between evaluation_D0.json and stages.json."""
    out = link_tree(trial, tmp_path / "out")
    start = out / "42" / "start-mixture"
    task = experiments.tasks_of(["mixlora-dsi"], 42, out, ["--data", str(toy), *FLAGS], tmp_path)[0][0]
    assert task.is_done()
    done = store.read_json(start / "stages.json")
    store.write_json(start / "stages.json", {stage: done[stage] for stage in done if stage != "D0"})
    assert not task.is_done()
    with pytest.raises(KeyError, match="D0"):
        experiments.inherit(start, tmp_path / "heir", "D0", Config())


def test_tables_hold_what_the_runs_found(trial):
    summary = store.read_json(trial / "trial.json")
    assert [row["label"] for row in summary["rows"]] == ["bm25", "slow none", "mixlora-dsi", "slow lr"]
    for row in summary["rows"][1:]:
        folders = [trial / str(seed) / row["label"].replace(" ", "_") for seed in (42, 43)]
        results = [store.read_json(folder / "results.json") for folder in folders]
        ap = [r["metrics"]["mrr@10"]["AP"] for r in results]
        assert row["metrics"]["mrr@10"]["AP"] == ap
        mean, error = 100 * sum(ap) / 2, 100 * abs(ap[0] - ap[1]) / 2  # of two: half their distance
        lines = (trial / "trial.md").read_text().split("mrr@10")[1].splitlines()
        line = next(line for line in lines if f"| {row['label']} |" in line)
        assert f"{mean:.1f} ± {error:.1f}" in line
        seconds = [[r["seconds"]["D1"], r["seconds"]["D2"]] for r in results]
        assert row["seconds_per_corpus"] == pytest.approx(np.mean(seconds))
        trained = f"{row['trainable_parameters']:,.0f}"
        assert trained in (trial / "trial.md").read_text() and row["peak_memory_bytes"] > 2**27
        assert all(
            (of["p_value"] is None) == (row["label"] == "mixlora-dsi") for of in row["metrics"].values()
        )


def test_bm25_and_dense_rows_come_from_the_run_of_mixlora_dsi(trial):
    results, values = experiments.values_of("bm25", 42, trial / "rows")
    p = store.read_json(trial / "42" / "mixlora-dsi" / "results.json")["baselines"]["bm25"]["recall@10"]["P"]
    assert results["metrics"]["recall@10"]["P"] == p
    assert [np.mean(corpus["recall@10"]) for corpus in values] == pytest.approx(p[-1])
    groups = experiments.tasks_of(["bm25", "dense"], 44, trial, [], trial)
    assert [task.folder.name for task in sum(groups, [])] == ["start-mixture", "mixlora-dsi"]


def test_the_pool_performs_tasks_and_keeps_their_rows(trial, toy, capsys, tmp_path):
    flags, row = ["--data", str(toy), *FLAGS], tmp_path / "43" / "slow_lr.json"
    tasks = experiments.tasks_of(["slow lr"], 43, trial, flags, tmp_path)[-1]
    experiments.run_all(tasks, 1)
    assert capsys.readouterr().out == f"{trial / '43' / 'slow_lr'}: done already\n"
    assert row.read_bytes() == (trial / "rows" / "43" / "slow_lr.json").read_bytes()


def test_a_row_that_was_kept_on_another_machine_is_not_run_again(trial, toy, tmp_path, monkeypatch):
    """Nor is what it starts from; and the tables are the same without any run folder."""
    monkeypatch.setattr(experiments, "run_all", lambda tasks, jobs: tasks and pytest.fail(f"ran {tasks}"))
    rows, out = link_tree(trial / "rows", tmp_path / "rows"), tmp_path / "out"
    argv = ["trial", "--seeds", "2", "--out", str(out), "--rows", str(rows), "--", "--data", str(toy), *FLAGS]
    experiments.main(argv)
    assert (out / "trial.md").read_text() == (trial / "trial.md").read_text()
    flags = ["--data", str(toy), *FLAGS]
    (rows / "42" / "slow_lr.json").unlink()
    assert [len(group) for group in experiments.tasks_of(["slow none", "slow lr"], 42, out, flags, rows)] == [
        1,
        1,
        1,
    ]
    with pytest.raises(ValueError, match=r"slow_none.json is of a run with other settings \(lr\)"):
        experiments.tasks_of(["slow none"], 42, out, [*flags, "--lr", "2e-3"], rows)


@pytest.mark.soak
def test_one_run_in_a_process_of_its_own(toy, tmp_path, capsys):
    """The real pool: --only runs some rows and prints no table. In its processes conftest.py's dreams do not hold."""
    argv = ["losses", "--only", "no KL", "--out", str(tmp_path), "--jobs", "2", "--", "--data", str(toy)]
    experiments.main([*argv, *FLAGS, "--dreams", "200"])
    assert "no_KL: done" in capsys.readouterr().out and not (tmp_path / "losses.json").exists()
    results = store.read_json(tmp_path / "42" / "no_KL" / "results.json")
    assert results["config"]["kl_coef"] == 0 and results["versions"]["threads"] == max(
        1, torch.get_num_threads() // 2
    )


def test_an_interrupted_copy_of_a_start_is_made_anew(trial, tmp_path):
    source, target = trial / "42" / "start-mixture", tmp_path / "run"
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "D0.pt").write_text("half")
    settings = Config(run=str(target))
    experiments.inherit(source, target, "rq", settings)
    assert not (target / "D0.pt").exists() and os.path.samefile(target / "rq.pt", source / "rq.pt")
    assert set(store.read_json(target / "stages.json")) == {"data", "dense", "rq"}
    assert store.read_json(target / "config.json") == asdict(settings)


def test_growth_is_set_beside_fresh_queries_of_what_is_known_by_corpus_and_layer(trial):
    percent = experiments.mock_growth(trial / "42" / "mixlora-dsi")
    assert [[len(layers) for layers in known] for known in percent] == [[2], [2, 2]]
    assert all(0 <= share <= 100 for known in percent for layers in known for share in layers)
    row = {
        "ood_percent": [{"D1": [5.0, 7.0], "D2": [1.0, 3.0]}],
        "mock": [[[[2.0, 2.5]], [[1.5, 1.0], [0.0, 4.0]]]],
    }
    assert experiments.mocks(row) == {
        "D1": ["5.0/7.0", "2.0/2.5", ""], "D2": ["1.0/3.0", "1.5/1.0", "0.0/4.0"]
    }  # fmt: skip


@pytest.mark.parametrize("name, heading", [("growth", "where nothing is new"), ("beams", "beams kept")])
def test_what_only_growth_and_beams_show_stands_in_their_rows_and_tables(trial, monkeypatch, name, heading):
    monkeypatch.setitem(experiments.EXPERIMENTS, name, (["mixlora-dsi"], "mixlora-dsi"))
    summary = experiments.summarise(name, [42, 43], trial / "rows")
    assert len(summary["rows"][0][experiments.OWN[name]]) == 2
    assert heading in experiments.figures(name, summary)


def test_rows_of_another_split_are_not_paired_with_the_reference(trial, monkeypatch):
    run = experiments.RUNS["slow none"]
    monkeypatch.setitem(experiments.RUNS, "slow none", replace(run, start="topic"))
    summary = experiments.summarise("trial", [42, 43], trial / "rows")
    p_values = {row["label"]: row["metrics"]["mrr@10"]["p_value"] for row in summary["rows"]}
    assert [label for label, p in p_values.items() if p is None] == ["slow none", "mixlora-dsi"]


def test_rows_by_beam_are_the_evaluations_of_that_beam(trial):
    rows = experiments.by_beam(trial / "42" / "mixlora-dsi")
    assert [row["beam"] for row in rows] == [10, 20, 40, 100] and min(
        r["queries_per_second"] for r in rows
    ) > 0
    p = store.read_json(trial / "42" / "mixlora-dsi" / "results.json")["metrics"]["recall@10"]["AP"]
    assert (
        rows[2]["AP"] == rows[3]["AP"] == pytest.approx(p)
    )  # the preset's 40 beams, which are all documents


def normal_p(differences) -> float:
    """Two-sided p-value of the mean over corpora, for one seed, by the normal approximation."""
    mean = np.mean([d.mean() for d in differences])
    error = math.sqrt(sum(d.var() / len(d) for d in differences)) / len(differences)
    return math.erfc(abs(mean) / error / math.sqrt(2))


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.05])
def test_with_one_seed_the_bootstrap_agrees_with_the_normal_approximation(shift):
    rng = np.random.default_rng(1)
    differences = [rng.normal(shift, 0.3, size=n) for n in (300, 200, 250)]
    assert experiments.paired_p([differences], draws=4000) == pytest.approx(normal_p(differences), abs=0.03)


def test_seeds_that_disagree_make_a_difference_less_sure_than_the_same_queries_of_one_seed():
    rng = np.random.default_rng(2)
    agree = [[rng.normal(0.05, 0.3, size=400)] for _ in range(3)]
    apart = [[d - d.mean() + shift] for (d,), shift in zip(agree, (-0.05, 0.05, 0.15))]
    pooled = [[np.concatenate([d for (d,) in apart])]]
    assert experiments.paired_p(agree) < 0.01 and experiments.paired_p(pooled) < 0.01
    assert experiments.paired_p(apart) > 0.05


def test_between_seeds_without_query_noise_the_bootstrap_has_the_variance_of_the_mean():
    """Drawing n of n values at random gives (n - 1) / n of it; p is then as large as the normal one with ddof = 1."""
    shifts = np.array([0.01, 0.02, 0.05, 0.0, 0.03, -0.02, 0.04, 0.01])
    error = shifts.std(ddof=1) / len(shifts) ** 0.5
    wanted = math.erfc(shifts.mean() / error / math.sqrt(2))
    p_value = experiments.paired_p([[np.full(5, shift)] for shift in shifts], draws=20_000)
    assert p_value == pytest.approx(wanted, abs=0.01) and wanted > 0.005


def test_no_difference_has_p_1_and_the_least_p_is_above_0():
    assert experiments.paired_p([[np.zeros(10)]]) == 1.0
    assert 0 < experiments.paired_p([[np.ones(10)]]) == pytest.approx(2 / 2001)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["table1", "--seeds", "0"], "positive"),
        (["table1", "--only", "base;magic"], "--only magic: wanted .*base; dsi"),
    ],
)
def test_bad_input_is_named(argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        experiments.main([*argv, "--out", str(tmp_path)])
