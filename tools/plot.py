"""The pictures of a run, and of an experiment.

Paper    figures 1 and 3: AP against BWT of each method; which experts the tokens of each corpus choose
In       results.json, ood.json, config.json and the last D{t}.pt of a run folder; or an experiment's JSON {"name", "rows"}
Out      matplotlib Figures; `python -m tools.plot RUN` writes RUN/plots/*.svg and *.png, `python -m tools.plot
         EXPERIMENT.json` writes plots/NAME_*.svg and *.png beside the file
Next     docs/results.md shows them; nothing reads them
Differs  the paper's Figure 3 has one layer and the last model; here every mixed layer, after training on each
         corpus. matplotlib is a development requirement, imported only where something is drawn
"""

import io
import math
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import command
import ood
from store import load_model, read_json, write

TITLES = {"recall@10": "Recall@10", "mrr@10": "MRR@10"}
# Okabe and Ito's colours, which colour-blind readers tell apart, with grey in place of yellow
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888"]
MARKERS = "osD^vPX*"
INK, FAINT = "#333333", "#999999"
RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": INK, "axes.axisbelow": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.7,
    "legend.frameon": False, "figure.facecolor": "white",  # README is also read on a dark page
    "svg.hashsalt": "mixlora-dsi",  # else names inside an SVG are random
}  # fmt: skip
WIDTH = 8.0  # inches; docs/results.md shows them at about 110 pixels an inch


@contextmanager
def style():
    """matplotlib with RC upon its defaults, for the length of a block or a function; nothing stays changed."""
    try:
        import matplotlib
    except ImportError:
        to_do = "pip install -r requirements-dev.txt"
        raise ValueError(f"found no matplotlib, which draws the pictures; {to_do}") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def new_figure(height: float):
    """A Figure of the common width that no window system knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# ------------------------------------------------------------------------------------------------ a run's pictures


@style()
def accuracy(results: dict):
    """P[t, i] in percent against t, a curve for each corpus i; dashed, the last AP of each baseline."""
    figure = new_figure(3.9)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric in zip(panels, TITLES):
        p, names = results["metrics"][metric]["P"], [f"D{t}" for t in results["evaluated"]]
        for i, name in enumerate(names):
            axes.plot(
                range(i, len(p)), [100 * row[i] for row in p[i:]], color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)], markersize=5, linewidth=1.6, label=name, clip_on=False, zorder=3,
            )  # fmt: skip
        for k, (name, summary) in enumerate(results["baselines"].items()):
            dashes = [(0, (5, 3)), (0, (1.5, 1.8)), (0, (6, 2, 1.5, 2))][k % 3]
            value = 100 * summary[metric]["AP"]
            axes.axhline(value, color=INK, linewidth=0.9, linestyle=dashes, label=f"AP of {name}", zorder=2)
        axes.set(title=TITLES[metric], xlabel="after training on", ylim=(0, 100))
        axes.set_xticks(range(len(p)), names)
        axes.margins(x=0.05)
        axes.grid(axis="y")
    panels[0].set_ylabel("test queries of a corpus, percent")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8))
    figure.suptitle(f"What each corpus keeps: {_run_name(results)}")
    return figure


def layer_panels(layers: int, parts: int, height: float, **shared):
    """A Figure, and the panels of each part: one for each layer, four abreast. All are off as yet."""
    across = min(layers, 4)
    down = math.ceil(layers / across)
    figure = new_figure(height * parts * down + 0.9)
    panels = figure.subplots(parts * down, across, squeeze=False, **shared)
    for axes in panels.flat:
        axes.axis("off")
    return figure, panels.reshape(parts, -1)


@style()
def routing(results: dict):
    """Heat-maps in percent, one per mixed layer, corpora down and experts across: the mean gate, and the share of
    tokens whose largest gate it is. Experts that a corpus had not yet are blank.
    """
    kinds = {"routing": "mean gate", "first_choice": "largest gate"}
    stages = [stage for stage, layers in results["routing"].items() if layers]
    layers = max(len(results["routing"][stage]) for stage in stages)
    figure, parts = layer_panels(layers, 2, 0.26 * len(stages) + 0.85)
    experts = max(len(gates) for stage in stages for gates in results["routing"][stage])
    for (key, title), panels in zip(kinds.items(), parts):
        for layer, axes in enumerate(panels[:layers]):
            axes.axis("on")
            table = np.full((len(stages), experts), np.nan)
            for row, stage in enumerate(stages):
                shares = results[key][stage][layer]
                table[row, : len(shares)] = 100 * np.array(shares)
            mesh = axes.pcolormesh(
                np.ma.masked_invalid(table), cmap="Blues", vmin=0, vmax=100, edgecolors="white", linewidth=1.5
            )
            for (row, expert), share in np.ndenumerate(table):
                look = dict(ha="center", va="center", fontsize=8, color="white" if share > 65 else "black")
                if math.isfinite(share):
                    axes.text(expert + 0.5, row + 0.5, f"{share:.0f}", **look)
            axes.invert_yaxis()
            axes.set_title(f"layer {layer}, {title}")
            axes.set_xticks(np.arange(experts) + 0.5, [f"{expert}" for expert in range(experts)])
            axes.set_yticks(np.arange(len(stages)) + 0.5, stages if layer % 4 == 0 else [])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            if key == "first_choice" and layer // 4 == (layers - 1) // 4:
                axes.set_xlabel("expert")
    figure.colorbar(mesh, ax=parts.ravel().tolist(), label="percent", aspect=40, pad=0.02)
    figure.suptitle(f"Which experts the tokens of a corpus use: {_run_name(results)}")
    return figure


@style()
def growth(results: dict):
    """Bars, which unlike lines do not hide each other: experts of each mixed layer after each corpus, and the
    parameters that trained on it.
    """
    stages = list(results["experts"])
    layers = max(map(len, results["experts"].values()))
    figure = new_figure(3.2)
    left, right = figure.subplots(1, 2)
    thick = 0.8 / layers
    for layer in range(layers):
        held = [(k, of[layer]) for k, of in enumerate(results["experts"].values()) if layer < len(of)]
        places, experts = zip(*((k + (layer - (layers - 1) / 2) * thick, number) for k, number in held))
        left.bar(
            places, experts, width=thick, color=COLOURS[layer % len(COLOURS)], edgecolor="white",
            linewidth=0.8, hatch="//" if layer >= len(COLOURS) else None, label=f"layer {layer}",
        )  # fmt: skip
    left.set_xticks(range(len(stages)), stages)
    left.set(xlabel="after training on", ylabel="experts of a mixed layer")
    left.yaxis.get_major_locator().set_params(integer=True)

    trained = results["trainable_parameters"]
    bars = right.bar(list(trained), list(trained.values()), width=0.5, color=COLOURS[0])
    right.bar_label(bars, [_short(value) for value in trained.values()], padding=2)
    right.yaxis.set_major_formatter(lambda value, _: _short(value))
    right.margins(y=0.15)
    right.set(xlabel="while training on", ylabel="trainable parameters")
    for axes in (left, right):
        axes.grid(axis="y")
        axes.tick_params(axis="x", length=0)
    figure.legend(loc="outside lower center", ncols=min(layers, 8), handlelength=1)
    figure.suptitle(f"What grows: {_run_name(results)}")
    return figure


def energies(decisions: dict):
    """Per corpus and mixed layer, the OOD scores of D_t's queries on arrival and, in mode `pooled`, of all that was known."""
    rows, names = {}, {"queries": "queries of the corpus", "reference": "what was known"}
    for stage, layers in decisions.items():
        for layer in layers:
            (below, above), shown = layer["tails"], layer["histogram"]
            said = f"OOD {below:.1f} % below, {above:.1f} % above"
            counts = {names[key]: shown[key] for key in ("queries", *({"reference"} & set(shown)))}
            rows.setdefault(stage, []).append((said, shown["edges"], counts, shown["thresholds"]))
    below = "OOD score of a query (the outermost bins also count what lies beyond)"
    return histograms(rows, "Is a corpus out of distribution for a layer?", below)


def drift(stats: list, last: int, epsilon: float):
    """Per mixed layer, z of the first two corpora's and of D_T's queries by the statistics after D_T. Of dreams, which scale
    z, a band as wide as their interquartile range stands about their median, 0.
    """
    rows = []
    for stat in stats:
        first = last + 1 - len(stat.arrivals)
        arrived = {t: stat.arrivals[t - first] for t in sorted({first, min(first + 1, last), last})}
        z = {f"D{t} {'on arrival' if t > first else 'once learnt'}": row for t, row in arrived.items()}
        z |= {f"D{last} once learnt": row for row in stat.newest}
        ends = ood.known_range(stat, epsilon)
        edges = np.histogram_bin_edges(torch.cat([*z.values(), ends, torch.tensor([-1.0, 1.0])]), 50)
        counts = {name: np.histogram(row, edges)[0] for name, row in z.items()}
        rows.append(("shaded: interquartile range of dreams", edges, counts, ends.tolist()))
    figure = histograms({f"after D{last}": rows}, "Energies on the scale of dreams", "z of a query")
    for axes in figure.axes[: len(rows)]:
        axes.axvspan(-0.5, 0.5, color=FAINT, alpha=0.25, linewidth=0)
    return figure


@style()
def histograms(rows: dict[str, list[tuple]], title: str, below: str):
    """stage -> a panel for each layer, (what to say, edges, {name: counts}, thresholds), counts in percent of their sum.
    The vertical axis is logarithmic: what decides is the percent or so beyond the thresholds.
    """
    rows = {stage: layers for stage, layers in rows.items() if layers}
    figure, parts = layer_panels(max(map(len, rows.values())), len(rows), 1.75, sharey=True)
    lines = [dict(color=colour, linewidth=1.3) for colour in COLOURS[1:]]
    for (stage, layers), panels in zip(rows.items(), parts):
        for layer, (axes, (said, edges, counts, ends)) in enumerate(zip(panels, layers)):
            looks = [dict(fill=True, color=COLOURS[5], linewidth=0), *lines]
            for (name, values), look in zip(counts.items(), looks):
                axes.stairs(100 * np.array(values) / max(sum(values), 1), edges, label=name, **look)
            for end, label in zip(ends, ("threshold", None)):
                axes.axvline(end, color=INK, linewidth=1.1, linestyle="--", label=label)
            axes.axis("on")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.grid(axis="y")
            axes.set_title(f"{stage}, layer {layer}\n{said}", fontsize=9)
    figure.supylabel("percent of queries in a bin (log scale)", fontsize=9)
    handles, labels = parts[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, title=below)  # below the lowest axes
    figure.suptitle(title)
    return figure


def _run_name(results: dict) -> str:
    return f"{results['method']} on {results['data']}, seed {results['seed']}"


def _short(number: float) -> str:
    """65536 as 65.5k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


# ------------------------------------------------------------------------------------------ an experiment's picture


@style()
def tradeoff(rows: list[dict], metric: str = "recall@10", title: str = ""):
    """AP against BWT in percent, means over seeds with standard errors; BWT falls to the right, so that better is
    up and right. A circle's area grows with the logarithm of the trainable parameters; a diamond has none.

    Where systems crowd (see `crowd`), a second panel shows them enlarged.
    """
    values = [[mean_and_error(row["metrics"][metric][key]) for key in ("BWT", "AP")] for row in rows]
    centres, errors = np.moveaxis(100 * np.array(values), 2, 0)  # (rows, BWT and AP) each
    parameters = [row.get("trainable_parameters") for row in rows]
    areas, near = _areas(parameters), crowd(centres)
    figure = new_figure(5.2)
    panels = figure.subplots(1, 2 if near.any() else 1, squeeze=False)[0]
    for axes in panels:
        for k, ((x, y), (dx, dy)) in enumerate(zip(centres, errors)):
            colour = COLOURS[k % len(COLOURS)]
            axes.errorbar(x, y, dy, dx, fmt="none", ecolor=colour, elinewidth=1.1, capsize=2, zorder=2)
            axes.scatter(
                [x], [y], s=areas[k], marker="o" if parameters[k] else "D", edgecolors=colour, linewidths=1.3,
                facecolors=colour if k < len(COLOURS) else "white", zorder=3, label=rows[k]["label"],
            )  # fmt: skip
        axes.margins(0.12)
        axes.invert_xaxis()
        axes.grid()
        axes.set_xlabel(f"BWT in {TITLES[metric]}, percent (forgetting)")
        axes.set_title("better \N{NORTH EAST ARROW}", loc="right", color=FAINT)
    panels[0].set_ylabel(f"AP in {TITLES[metric]}, percent")
    panels[0].set_title(title, loc="left")
    if near.any():
        low, high = (centres - errors)[near].min(0), (centres + errors)[near].max(0)
        pad = np.maximum(0.18 * (high - low), 0.1)
        (right, bottom), (left, top) = low - pad, high + pad
        panels[1].set(xlim=(left, right), ylim=(bottom, top), title="the frame, enlarged")
        panels[0].indicate_inset((right, bottom, left - right, top - bottom), edgecolor=INK)
    known = [number for number in parameters if number]
    sizes = f"area: {_short(min(known))} to {_short(max(known))} trainable parameters, " if known else ""
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8.5,
        title=f"{sizes}diamond: none; bars: standard errors over seeds", title_fontsize=8.5,
    )  # fmt: skip
    return figure


def crowd(centres: np.ndarray, share: float = 0.06, least: int = 4) -> np.ndarray:
    """Which points (N, 2) lie within `share` of both axes' ranges of that point which has most of them, if those
    are at least `least` and not all: (N,) bool.
    """
    near = (abs(centres[:, None] - centres) <= share * np.ptp(centres, axis=0)).all(-1)  # (N, N)
    best = near[near.sum(1).argmax()]
    return best & (least <= best.sum() < len(centres))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error, 0 where there is one seed."""
    n = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else 0.0


def _areas(parameters: list[float | None]) -> list[float]:
    """Areas in square points: 30 to 200 between the logarithms of the fewest and the most parameters."""
    logs = [math.log(number) for number in parameters if number]
    low, width = min(logs, default=0), max(logs, default=0) - min(logs, default=0)
    return [30 + 170 * (math.log(n) - low) / width if n and width else 30.0 for n in parameters]


def run_pictures(folder: Path) -> tuple[dict, str]:
    """{name: Figure} of a run folder, and what is left out."""
    results = read_json(folder / "results.json")
    figures = {"accuracy": accuracy(results)} if results["evaluated"] else {}  # not without test queries
    if not any(results["routing"].values()):
        return figures, f"left out routing, growth and energies: {results['method']} routed no corpus"
    figures |= {"routing": routing(results), "growth": growth(results)}
    decisions, last = read_json(folder / "ood.json"), len(results["experts"]) - 1
    if not any(decisions.values()):
        return figures, "left out energies: ood.json holds no decision"
    figures["energies"] = energies(decisions)
    path = folder / f"D{last}.pt"
    stats = load_model(path)[1] if path.is_file() else []
    if not stats or stats[0].mode != "pooled":
        return figures, f"left out drift: {path.name} tells of no energies on the scale of dreams"
    if len(stats[0].arrivals) != sum(map(bool, results["experts"].values())):
        return figures, "left out drift: corpora of few documents share a sketch"
    return figures | {"drift": drift(stats, last, read_json(folder / "config.json")["epsilon"])}, ""


def experiment_pictures(path: Path) -> dict:
    """{name: Figure} of an experiment's JSON."""
    content = read_json(path)
    name, rows = content["name"], content["rows"]
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{path}: found the name {name!r}, wanted letters, digits, '_', '.' and '-' alone")
    if not rows:
        raise ValueError(f"{path}: found no rows, wanted one for each system")
    metrics = {f"{name}_tradeoff": "recall@10", f"{name}_tradeoff_mrr": "mrr@10"}
    return {key: tradeoff(rows, metric, name) for key, metric in metrics.items()}


@style()
def save(figure, path: Path) -> None:
    """Writes a Figure under each of two endings; equal figures give equal bytes."""
    for ending, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 150})):
        content = io.BytesIO()
        figure.savefig(content, format=ending[1:], **options)
        write(path.with_name(path.name + ending), content.getvalue())


def main(argv: list[str]) -> None:
    parser = command.Parser(description="Draw the pictures of a run, or of an experiment.")
    parser.add_argument("run", type=Path, help="run folder, or an experiment's JSON file")
    path, left_out = parser.parse_args(argv).run, ""
    folder = (path.parent if path.is_file() else path) / "plots"
    try:
        if path.is_file():
            figures = experiment_pictures(path)
        else:
            figures, left_out = run_pictures(path)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        form = f"not of the form that train.py or tools.experiments write ({type(error).__name__}: {error})"
        raise ValueError(f"{path}: {form}") from error
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        save(figure, folder / name)
        print(f"{folder / name}.svg and .png", flush=True)
    if left_out:
        print(left_out)


if __name__ == "__main__":
    command.run(main, "tools.plot")
