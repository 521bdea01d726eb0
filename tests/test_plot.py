"""What the pictures draw is what the files say."""

import json
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.patches import StepPatch

import command
import ood
from tools import plot

P = [[0.9], [0.8, 0.6], [0.7, 0.5, 0.4]]
HALF = [[value / 2 for value in row] for row in P]


def results(**changes) -> dict:
    """results.json of a run over three corpora with two mixed layers, of which the second grew on D2."""
    value = {
        "method": "mixlora-dsi", "data": "made-up", "seed": 42,
        "metrics": {"recall@10": {"P": P}, "mrr@10": {"P": HALF}}, "evaluated": [0, 1, 2],
        "baselines": {"bm25": {"recall@10": {"AP": 0.75}, "mrr@10": {"AP": 0.5}}},
        "experts": {"D0": [2, 2], "D1": [2, 2], "D2": [2, 3]},
        "routing": {"D1": [[0.4, 0.6], [0.5, 0.5]], "D2": [[0.3, 0.7], [0.2, 0.3, 0.5]]},
        "first_choice": {"D1": [[0.1, 0.9], [1.0, 0.0]], "D2": [[0.0, 1.0], [0.25, 0.25, 0.5]]},
        "trainable_parameters": {"D1": 65536, "D2": 70000},
    }  # fmt: skip
    return value | changes


def decision(queries: list[int], reference: list[int] | None, *thresholds: float) -> dict:
    shown = {"edges": [0.0, 1.0, 2.0, 4.0], "queries": queries, "thresholds": list(thresholds)}
    shown |= {"reference": reference} if reference else {}
    return {"ood_percent": 12.3, "tails": [11.84, 0.5], "threshold": list(thresholds), "histogram": shown}


def decisions() -> dict:
    return {
        "D1": [decision([5, 3, 2], [1, 1, 0], 0.5, 2.5), decision([10, 0, 0], [4, 0, 0], 0.2, 1.5)],
        "D2": [decision([1, 1, 2], [3, 1, 0], 1.0, 3.0), decision([0, 0, 7], [2, 2, 0], 0.5, 0.7)],
    }


def statistics(arrivals: int, newest: int = 1) -> ood.Stats:
    """Of a layer in mode `pooled` whose corpora lie one unit apart, D_T once learnt at -5."""
    stats = ood.new_stats("pooled", 2, 3)
    stats.arrivals = torch.linspace(0, 0.5, ood.SKETCH) + torch.arange(arrivals)[:, None]
    stats.newest = torch.linspace(-5, -4.5, ood.SKETCH).expand(newest, -1)
    return stats


def row(label: str, ap: list[float], bwt: list[float], parameters: int | None = 65536) -> dict:
    metrics = {"AP": ap, "BWT": bwt, "FWT": ap, "P": [[0.5, 0.5] for _ in ap]}
    half = {name: np.multiply(value, 0.5).tolist() for name, value in metrics.items()}
    return {
        "label": label, "metrics": {"recall@10": metrics, "mrr@10": half}, "trainable_parameters": parameters,
        "seconds_per_corpus": 31.2, "peak_memory_bytes": 123, "experts": None, "ood_percent": None, "paper": None,
    }  # fmt: skip


def crowded() -> list[dict]:
    """Thirteen systems, five of them close to each other."""
    near = [row(f"near {i}", [0.55 + 0.01 * i, 0.56 + 0.01 * i], [0.14, 0.15 - 0.004 * i]) for i in range(5)]
    far = [row(f"far away {i}", [0.2 + 0.09 * i], [0.9 - 0.1 * i], 10 ** (i + 1)) for i in range(7)]
    return [*near, *far, row("bm25", [0.94], [0.01], None)]


def run_folder(path: Path, results: dict, ood: dict) -> Path:
    path.mkdir()
    (path / "results.json").write_text(json.dumps(results))
    (path / "ood.json").write_text(json.dumps(ood))
    return path


def experiment(path: Path, **changes) -> Path:
    rows = [row("ours", [0.5, 0.6], [0.1, 0.2]), row("base", [0.3], [0.8], 10**6)]
    path.write_text(json.dumps({"name": "table1", "rows": rows} | changes))
    return path


def settings() -> dict:
    """matplotlib's, but for the backend, which it chooses when that is read."""
    return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------ a run's pictures


def test_accuracy_draws_each_corpus_from_its_own_stage_on_in_percent():
    for axes, p, baseline in zip(plot.accuracy(results()).axes, (P, HALF), (75, 50)):
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) == {"D0", "D1", "D2", "AP of bm25"}
        for i in range(3):
            assert list(lines[f"D{i}"].get_xdata()) == list(range(i, 3))
            assert lines[f"D{i}"].get_ydata() == pytest.approx([100 * row[i] for row in p[i:]])
        assert list(lines["AP of bm25"].get_ydata()) == [baseline, baseline]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["D0", "D1", "D2"]
        assert axes.get_ylim() == (0, 100)


def test_accuracy_needs_no_baselines():
    figure = plot.accuracy(results(baselines={}))
    assert [len(axes.lines) for axes in figure.axes] == [3, 3]


def test_routing_shows_gates_and_first_choices_of_each_layer_with_blanks_before_growth():
    figure = plot.routing(results())
    shown = {axes.get_title(): axes.collections[0].get_array() for axes in figure.axes if axes.get_title()}
    blank = float("nan")
    wanted = {
        "layer 0, mean gate": [[40, 60, blank], [30, 70, blank]],
        "layer 1, mean gate": [[50, 50, blank], [20, 30, 50]],
        "layer 0, largest gate": [[10, 90, blank], [0, 100, blank]],
        "layer 1, largest gate": [[100, 0, blank], [25, 25, 50]],
    }
    assert set(shown) == set(wanted)
    for title, cells in wanted.items():
        np.testing.assert_allclose(shown[title].filled(blank), cells)
    panel = next(axes for axes in figure.axes if axes.get_title() == "layer 1, mean gate")
    assert panel.yaxis_inverted()
    written = {(text.get_position(), text.get_text()) for text in panel.texts}
    assert written == {
        ((0.5, 0.5), "50"), ((1.5, 0.5), "50"), ((0.5, 1.5), "20"), ((1.5, 1.5), "30"), ((2.5, 1.5), "50")
    }  # fmt: skip


def test_routing_wraps_many_layers_and_leaves_the_rest_of_the_grid_empty():
    many = {"D1": [[0.5, 0.5]] * 6}
    figure = plot.routing(results(routing=many, first_choice=many))
    shown = [axes for axes in figure.axes if axes.collections and axes.get_title()]
    assert len(shown) == 12 and shown[5].get_title() == "layer 5, mean gate"
    assert sum(not axes.axison for axes in figure.axes) == 4


def test_growth_draws_experts_of_every_layer_and_the_trainable_parameters():
    left, right = plot.growth(results()).axes
    layers = [[bar.get_height() for bar in bars] for bars in left.containers]
    assert layers == [[2, 2, 2], [2, 2, 3]]
    for bars, shift in zip(left.containers, (-0.2, 0.2)):
        assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx(
            [shift, 1 + shift, 2 + shift]
        )
    assert [bar.get_height() for bar in right.containers[0]] == [65536, 70000]
    assert [text.get_text() for text in right.texts] == ["65.5k", "70k"]


def test_growth_leaves_a_corpus_before_the_mixture_empty():
    left, _ = plot.growth(results(experts={"D0": [], "D1": [2, 2], "D2": [2, 3]})).axes
    assert [len(bars) for bars in left.containers] == [2, 2]
    assert left.containers[0][0].get_x() == pytest.approx(0.6)


def steps(axes) -> dict[str, tuple[list, list]]:
    """Label -> values and edges of each histogram of a panel."""
    drawn = {patch.get_label(): patch.get_data() for patch in axes.patches if isinstance(patch, StepPatch)}
    return {label: (data.values.tolist(), data.edges.tolist()) for label, data in drawn.items()}


def test_energies_draw_the_histograms_in_percent_and_both_thresholds():
    figure, names = (
        plot.energies(decisions()),
        {"queries": "queries of the corpus", "reference": "what was known"},
    )
    assert len(figure.axes) == 4
    for axes, (stage, layer) in zip(figure.axes, [("D1", 0), ("D1", 1), ("D2", 0), ("D2", 1)]):
        shown = decisions()[stage][layer]["histogram"]
        percent = {
            name: pytest.approx([100 * n / sum(shown[key]) for n in shown[key]])
            for key, name in names.items()
        }
        assert steps(axes) == {name: (values, shown["edges"]) for name, values in percent.items()}
        assert [line.get_xdata()[0] for line in axes.lines] == shown["thresholds"]
        assert axes.get_title() == f"{stage}, layer {layer}\nOOD 11.8 % below, 0.5 % above"
    assert legend(figure) == [*names.values(), "threshold"]


def test_energies_of_paper_code_have_one_threshold_and_no_reference():
    (axes,) = plot.energies({"D1": [decision([1, 2, 3], None, 0.0)]}).axes
    assert list(steps(axes)) == ["queries of the corpus"] and len(axes.lines) == 1


def test_energies_leave_out_a_corpus_without_layers_and_the_rest_of_the_grid():
    figure = plot.energies({"D1": [], "D2": [decision([1, 2, 3], [3, 2, 1], 0.0, 2.0)] * 5})
    assert len(figure.axes) == 8 and sum(axes.axison for axes in figure.axes) == 5


def test_drift_draws_the_first_two_corpora_and_the_last_by_their_sketches():
    stats = [statistics(4), statistics(4)]
    figure = plot.drift(stats, last=3, epsilon=0.02)
    assert len(figure.axes) == 2
    for axes, stat in zip(figure.axes, stats):
        places = {}
        for name, (percent, edges) in steps(axes).items():
            assert sum(percent) == pytest.approx(100)
            held = np.flatnonzero(percent)
            places[name] = edges[held[0]], edges[held[-1] + 1]
        wanted = {"D0 once learnt": 0, "D1 on arrival": 1, "D3 on arrival": 3, "D3 once learnt": -5}
        assert list(places) == list(wanted)
        width = 8.5 / 50  # of a bin: from -5 to 3.5
        for name, (left, right) in places.items():
            assert left == pytest.approx(wanted[name], abs=width) and right - left == pytest.approx(
                0.5, abs=2 * width
            )
        assert [line.get_xdata()[0] for line in axes.lines] == ood.known_range(stat, 0.02).tolist()
        (band,) = [patch for patch in axes.patches if not isinstance(patch, StepPatch)]
        assert (band.get_x(), band.get_width()) == (-0.5, 1)


@pytest.mark.parametrize(
    "arrivals, last, names",
    [
        (1, 1, ["D1 once learnt"]),  # the mixture came with D_1
        (2, 1, ["D0 once learnt", "D1 on arrival", "D1 once learnt"]),
        (3, 3, ["D1 once learnt", "D2 on arrival", "D3 on arrival", "D3 once learnt"]),
    ],
)
def test_drift_names_corpora_from_that_on_which_the_mixture_came(arrivals, last, names):
    (axes,) = plot.drift([statistics(arrivals, newest=int(arrivals > 1))], last, epsilon=0.02).axes
    assert list(steps(axes)) == names


# ------------------------------------------------------------------------------------------ an experiment's picture


def points(axes) -> list[list[float]]:
    return [dots.get_offsets()[0].tolist() for dots in axes.collections if isinstance(dots, PathCollection)]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_tradeoff_draws_means_over_seeds_with_their_standard_errors():
    rows = [row("ours", [0.5, 0.6, 0.7], [0.1, 0.1, 0.4]), row("base", [0.3], [0.8])]
    figure = plot.tradeoff(rows)
    (axes,) = figure.axes
    assert points(axes) == [pytest.approx([20, 60]), pytest.approx([80, 30])]  # x is BWT, y is AP
    bars = [container.lines[2] for container in axes.containers]
    (across,), (up,) = (bar.get_segments() for bar in bars[0])
    assert across.tolist() == [pytest.approx([10, 60]), pytest.approx([30, 60])]  # sd 17.3 over the root of 3
    assert up[:, 1] == pytest.approx([60 - 10 / 3**0.5, 60 + 10 / 3**0.5])
    assert bars[1][0].get_segments()[0][:, 0].tolist() == [80, 80]  # one seed has no error
    assert axes.xaxis_inverted() and not axes.yaxis_inverted()
    assert legend(figure) == ["ours", "base"]
    (half,) = plot.tradeoff(rows, "mrr@10").axes
    assert points(half)[1] == pytest.approx([40, 15])


def test_tradeoff_sizes_grow_with_trainable_parameters_and_a_diamond_has_none():
    rows = [row("a", [0.5], [0.1], 100), row("b", [0.4], [0.2], 10_000), row("c", [0.3], [0.3], 1000)]
    rows += [row("bm25", [0.9], [0.0], None), row("insert", [0.8], [0.0], 0), row("dense", [0.7], [0.0])]
    del rows[-1]["trainable_parameters"]
    (axes,) = plot.tradeoff(rows).axes
    dots = [one for one in axes.collections if isinstance(one, PathCollection)]
    assert [one.get_sizes()[0] for one in dots] == pytest.approx([30, 200, 115, 30, 30, 30])
    shapes = [len(one.get_paths()[0].vertices) for one in dots]
    assert shapes[0] == shapes[1] == shapes[2] != shapes[3] == shapes[4] == shapes[5]


def test_tradeoff_enlarges_a_crowd_and_names_each_system_once():
    rows = crowded()
    figure = plot.tradeoff(rows)
    whole, near = figure.axes
    assert points(whole) == points(near) and len(points(whole)) == 13
    assert legend(figure) == [one["label"] for one in rows]
    looks = {  # colour, fill and form tell all of them apart
        (str(dots.get_edgecolors()), str(dots.get_facecolors()), len(dots.get_paths()[0].vertices))
        for dots in whole.collections
        if isinstance(dots, PathCollection)
    }
    assert len(looks) == 13
    (left, right), (bottom, top) = near.get_xlim(), near.get_ylim()
    assert left > right and all(right < x < left and bottom < y < top for x, y in points(near)[:5])
    frame = next(patch for patch in whole.get_children() if hasattr(patch, "rectangle")).rectangle
    assert frame.get_bbox().extents == pytest.approx([right, bottom, left, top])


def test_a_crowd_is_four_points_within_a_small_part_of_both_ranges():
    corner = [[0, 0], [1, 1], [2, 0], [5, 5]]
    assert plot.crowd(np.array([*corner, [100, 100]])).tolist() == [True] * 4 + [False]
    assert not plot.crowd(np.array([*corner[:3], [0, 8], [100, 100]])).any()  # three, and one too high
    assert not plot.crowd(np.array([[1.0, 1.0]] * 5)).any()  # all: nothing to enlarge them against


# ----------------------------------------------------------------------------------------------------- the command


def test_main_writes_every_picture_of_a_run_as_svg_and_png(tmp_path, capsys):
    folder = run_folder(tmp_path / "run", results(), decisions())
    plot.main([str(folder)])
    names = ("accuracy", "routing", "growth", "energies")
    assert "left out drift: D2.pt tells of no energies" in capsys.readouterr().out
    assert written(folder / "plots") == {f"{name}.{ending}" for name in names for ending in ("svg", "png")}
    for name in names:
        svg, png = ((folder / "plots" / f"{name}.{ending}").read_bytes() for ending in ("svg", "png"))
        assert svg.startswith(b"<?xml") and b"<dc:date>" not in svg
        assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20]) == 1200  # 8 inches of 150 dots


def test_a_trained_run_has_all_pictures_and_paper_code_no_drift(finished, monkeypatch):
    figures, left_out = plot.run_pictures(finished)
    assert list(figures) == ["accuracy", "routing", "growth", "energies", "drift"] and not left_out
    paper_code = [ood.new_stats("paper_code", 2, 3)]
    monkeypatch.setattr(plot, "load_model", lambda _: (None, paper_code))
    figures, left_out = plot.run_pictures(finished)
    assert "drift" not in figures and "tells of no energies on the scale of dreams" in left_out


def test_main_writes_an_experiments_pictures_beside_its_file(tmp_path):
    plot.main([str(experiment(tmp_path / "results.json"))])
    names = ("table1_tradeoff", "table1_tradeoff_mrr")
    assert written(tmp_path / "plots") == {f"{name}.{ending}" for name in names for ending in ("svg", "png")}


def test_a_picture_saved_twice_has_the_same_bytes_and_matplotlib_is_left_as_it_was(tmp_path):
    before, content = settings(), []
    for change in ({}, {"font.size": 20, "svg.hashsalt": "another"}):
        with matplotlib.rc_context(change):
            plot.save(plot.tradeoff([row("ours", [0.5, 0.6], [0.1, 0.2])]), tmp_path / "picture")
        content.append([(tmp_path / f"picture.{ending}").read_bytes() for ending in ("svg", "png")])
    assert content[0] == content[1] and settings() == before


@pytest.mark.soak
def test_two_calls_write_the_same_bytes_of_every_picture(tmp_path):
    folder = run_folder(tmp_path / "run", results(), {"D1": decisions()["D1"]})
    path, content = experiment(tmp_path / "table1.json"), []
    for change in ({}, {"font.size": 20, "svg.hashsalt": "another"}):
        with matplotlib.rc_context(change):
            for one in (folder, path):
                plot.main([str(one)])
        content.append({svg.name: svg.read_bytes() for svg in sorted(tmp_path.rglob("*.svg"))})
    assert len(content[0]) == 6 and content[0] == content[1]


@pytest.mark.soak
@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[1] / "docs" / "results").glob("*.json")),
    ids=lambda path: path.stem,
)
def test_every_published_experiment_can_be_drawn(path):
    for figure in plot.experiment_pictures(path).values():
        assert len(points(figure.axes[0])) == len(json.loads(path.read_text())["rows"])


def test_a_run_without_a_mixture_lacks_what_it_has_not(tmp_path, capsys):
    bare = results(method="base", experts={"D0": []}, routing={"D1": []}, first_choice={"D1": []})
    folder = run_folder(tmp_path / "run", bare, {})
    plot.main([str(folder)])
    assert written(folder / "plots") == {"accuracy.svg", "accuracy.png"}
    assert "left out routing, growth and energies: base routed no corpus" in capsys.readouterr().out


def test_of_a_run_that_took_documents_in_curves_have_the_names_of_the_corpora_with_test_queries(tmp_path):
    figure = plot.accuracy(results(evaluated=[0, 1, 3]))
    for axes in figure.axes:
        assert {"D0", "D1", "D3"} <= {line.get_label() for line in axes.lines}
        assert [label.get_text() for label in axes.get_xticklabels()] == ["D0", "D1", "D3"]
    folder = run_folder(tmp_path / "run", results(evaluated=[], metrics={}), decisions())
    assert list(plot.run_pictures(folder)[0]) == ["routing", "growth", "energies"]


def test_drift_is_left_out_where_sketches_are_not_of_one_corpus_each(finished, tmp_path, monkeypatch):
    shared = [statistics(arrivals=4)] * 2
    monkeypatch.setattr(plot, "load_model", lambda _: (None, shared))
    figures, left_out = plot.run_pictures(finished)
    assert "drift" not in figures and "corpora of few documents share a sketch" in left_out


def test_a_run_without_decisions_says_so(tmp_path):
    folder = run_folder(tmp_path / "run", results(), {"D1": []})
    figures, left_out = plot.run_pictures(folder)
    assert "energies" not in figures and left_out == "left out energies: ood.json holds no decision"


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="found no matplotlib.* pip install -r requirements-dev.txt"):
        plot.accuracy(results())
    folder = run_folder(tmp_path / "run", results(), decisions())
    monkeypatch.setattr(sys, "argv", ["plot.py", str(folder)])
    with pytest.raises(SystemExit, match="^tools.plot: found no matplotlib, which draws the pictures; pip "):
        command.run(plot.main, "tools.plot")
    assert not (folder / "plots").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": {"recall@10": {"P": P}}}, "KeyError: 'mrr@10'"),
        ({"metrics": {"recall@10": {"P": [7]}}}, "TypeError: "),
        ({"routing": [[0.5]]}, "AttributeError: "),
        ({"baselines": {"bm25": {}}}, "KeyError: 'recall@10'"),
    ],
)
def test_results_of_another_form_are_refused_by_name(tmp_path, changes, said):
    folder = run_folder(tmp_path / "run", results(**changes), decisions())
    with pytest.raises(ValueError, match=re.escape(f"{folder}: not of the form") + ".*" + re.escape(said)):
        plot.main([str(folder)])
    assert not (folder / "plots").exists()


def test_a_folder_without_results_and_a_file_that_is_not_json_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"found no .*results\.json; is .* the folder of a finished run"):
        plot.main([str(tmp_path)])
    (tmp_path / "table1.json").write_text("{")
    with pytest.raises(ValueError, match="table1.json: "):
        plot.main([str(tmp_path / "table1.json")])
    (tmp_path / "table1.json").write_text("[]")
    with pytest.raises(ValueError, match=r"table1.json: not of the form"):
        plot.main([str(tmp_path / "table1.json")])


def test_ood_of_another_form_is_refused(tmp_path):
    folder = run_folder(
        tmp_path / "run", results(), {"D1": [{"tails": [1, 2], "histogram": {"edges": [0, 1]}}]}
    )
    with pytest.raises(ValueError, match="not of the form .*KeyError: 'queries'"):
        plot.main([str(folder)])


def test_an_experiment_of_another_form_is_refused(tmp_path):
    path = tmp_path / "table1.json"
    with pytest.raises(ValueError, match="found no rows, wanted one for each system"):
        plot.main([str(experiment(path, rows=[]))])
    with pytest.raises(ValueError, match="found the name '../table1', wanted letters"):
        plot.main([str(experiment(path, name="../table1"))])
    with pytest.raises(ValueError, match="not of the form .*KeyError: 'metrics'"):
        plot.main([str(experiment(path, rows=[{"label": "ours"}]))])
