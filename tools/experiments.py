"""The paper's comparisons and ablations, over seeds: `python -m tools.experiments table1 --seeds 3 -- FLAGS OF TRAIN.PY`.

Paper    tables 1-2 (baselines), 4 (ladder), 5 (delta), 9 (docids), 11-12 (alpha), 13 (router losses), figures 1 and 3
In       the name of an experiment; flags of train.py that hold for all of its runs, after --
Out      OUT/SEED/RUN, a run folder each; ROWS/SEED/RUN.json, what the tables need of it; OUT/NAME.json, which
         tools/plot.py draws, and OUT/NAME.md, the tables
Next     docs/results.md reports them
Differs  the paper prints one run of each system; here seeds vary the split, all draws and all weights, and every row
         is tested against a reference by a paired bootstrap. Runs share what does not differ: a run starts from the
         dense, RQ and D_0 stages of its `start`, as hard links, so that its own flags hold from D_1 on. Rows about
         the paper's parts vary `paper`, its recipe alone; rows about ours vary `mixlora-dsi`. Rows about router losses
         expand always. Flags that are numbers are meant for the small presets
"""

import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import command
import eval as scoring
import ood
import prepare
import store
import train
from config import OF_MACHINE, Config, parse, saved_config
from search import retrieve
from tools.plot import mean_and_error

METRICS = ("recall@10", "mrr@10")
BEAMS = (10, 20, 40, 100)
OWN = {"growth": "mock", "beams": "beams"}  # what the tables of an experiment show beside the results
NOT_RUN = ("bm25", "dense", "quantised")  # rows that the run mixlora-dsi evaluates beside itself
# of results.json
KEPT = "trainable_parameters seconds peak_memory_bytes experts ood_percent first_choice".split()


@dataclass(frozen=True)
class Start:
    """The stages up to D_0, which runs share."""

    flags: str = ""
    stages: str = ""  # "dense" or "rq": the last that is taken from the start `mixture` in turn


@dataclass(frozen=True)
class Run:
    """A run: the start that it goes on from, its flags of train.py, the paper's AP, BWT, FWT on NQ320k."""

    start: str
    flags: str
    paper: tuple[str, str, str] | None = None  # each Recall@10/MRR@10


# fmt: off
STARTS = {
    "mixture": Start(),
    "paper": Start("--method paper", "rq"),
    "plain": Start("--method paper --no-d0_mixture", "rq"),
    "no-general": Start("--method paper --general none --beam 10"),
    "topic": Start("--split_by topic"),
    "rank-96": Start("--lora_rank 96 --lora_alpha 192", "rq"),
    "pq": Start("--method paper --no-d0_mixture --docid_kind pq --M 8", "dense"),
    "8-words": Start("--dream_words 8", "rq"),
    "no-noise": Start("--dream_noise 0", "rq"),
    "atomic": Start("--method paper --no-d0_mixture --d0_fragments 0 --docid_kind atomic", "dense"),
    "m4-k256": Start("--M 4", "dense"),
    "m8-k256": Start("--M 8", "dense"),
    "m6-k128": Start("--K 128", "dense"),
    "half-width": Start("--width 64 --feed_forward 256"),
    "twice-width": Start("--width 256 --feed_forward 1024"),
}
ENERGIES = "--method paper --ood_mode pooled --router_row ood_mean --evolve"
RUNS = {
    "bm25": Run("mixture", "", ("64.2/42.3", "1.2/0.4", "66.1/42.7")),
    "dense": Run("mixture", "", ("68.5/49.7", "0.9/0.9", "68.7/50.1")),
    "quantised": Run("mixture", ""),
    "base": Run("plain", "--method base", ("51.1/28.8", "47.7/66.3", "91.0/84.9")),
    "dsi++": Run("plain", "--method dsi++", ("50.3/35.9", "45.6/55.2", "87.9/82.7")),
    "clever-512": Run("plain", "--method clever", ("61.0/38.9", "35.0/53.6", "90.6/84.8")),
    "clever-1024": Run("plain", "--method clever --ewc_samples 1024", ("66.1/47.4", "28.2/42.5", "90.2/84.4")),
    "clever-512-d0": Run("plain", "--method clever --ewc_protect_d0"),
    "promptdsi": Run("plain", "--method promptdsi", ("42.8/27.9", "17.7/14.6", "50.6/32.1")),
    "corpusbrain++": Run("plain", "--method corpusbrain++", ("13.9/9.1", "9.9/5.6", "29.6/23.1")),
    "incdsi": Run("atomic", "--method incdsi --d0_fragments 0"),
    "naive-expansion": Run("plain", "--method naive-expansion", ("44.2/25.2", "38.0/50.0", "72.5/64.0")),
    "mixlora-dsi-pt": Run("plain", "--method mixlora-dsi-pt", ("53.9/35.3", "14.1/19.3", "60.8/45.8")),
    "never-expand": Run("paper", "--method never-expand", ("66.5/53.0", "13.8/17.2", "76.7/66.3")),
    "always-expand": Run("paper", "--method always-expand", ("68.8/56.2", "12.4/18.3", "78.3/71.6")),
    "paper": Run("paper", "--method paper", ("68.1/55.2", "13.0/18.1", "78.0/70.0")),
    "mixlora-dsi": Run("mixture", ""),
    "dream": Run("plain", "--method dream"),
    "joint": Run("plain", "--method joint"),
    "ours, rehearsal": Run("mixture", "--rehearsal"),
    "dream, rehearsal": Run("plain", "--method dream --rehearsal"),

    "no general text, 10 beams": Run("no-general", "--method paper --general none --beam 10"),
    "no general text": Run("no-general", "--method paper --general none"),
    "+ energies": Run("mixture", ENERGIES),
    "+ dreams": Run("mixture", f"{ENERGIES} --dreams 20000 --dream_general 0"),
    "+ general text on D_t": Run("mixture", f"{ENERGIES} --dreams 20000"),
    "- KL, slow learner": Run("mixture", "--attention_rank 0"),

    "ours, never expand": Run("mixture", "--expand never"),
    "ours, always expand": Run("mixture", "--expand always"),
    "ours, frozen where none grows": Run("mixture", "--no-evolve"),
    "topic/mixlora-dsi": Run("topic", "--split_by topic"),
    "topic/never expand": Run("topic", "--split_by topic --expand never"),
    "topic/always expand": Run("topic", "--split_by topic --expand always"),

    "5,000 dreams": Run("mixture", "--dreams 5000"),
    "80,000 dreams": Run("mixture", "--dreams 80000"),
    "256 a step": Run("mixture", "--dream_batch 256"),
    "1,024 a step": Run("mixture", "--dream_batch 1024"),
    "weight 1": Run("mixture", "--dream_kl 1"),
    "weight 4": Run("mixture", "--dream_kl 4"),
    "dreams alone": Run("mixture", "--dream_general 0 --dream_kl 2.25 --dream_style 0"),
    "dreams alone, style 0.5": Run("mixture", "--dream_general 0 --dream_kl 2.25 --dream_style 0.5"),
    "style 0.5": Run("mixture", "--dream_style 0.5"),
    "8 words": Run("8-words", "--dream_words 8"),
    "no noise": Run("no-noise", "--dream_noise 0"),

    "naive, no mask": Run("plain", "--method naive-expansion --mask full_vocab --d0_mask segment", ("36.2/20.7", "33.1/38.7", "")),
    "naive + slow learner + KL": Run("plain", "--method naive-expansion --slow grad --kl_coef 0.25", ("52.5/32.8", "15.8/21.1", "")),
    "+ cosine router + router losses": Run("plain", "--method mixlora-dsi-pt --expand always",
                                           ("53.2/34.6", "12.6/15.5", "")),
    "no mask": Run("paper", "--method paper --mask full_vocab --d0_mask segment"),
    "no align": Run("paper", "--method always-expand --align_coef 0"),
    "no repel": Run("paper", "--method always-expand --repel_coef 0"),
    "no KL": Run("paper", "--method always-expand --kl_coef 0"),

    "slow none": Run("paper", "--method paper --slow none"),
    "slow lr": Run("paper", "--method paper --slow lr"),
    "router row ood_mean": Run("paper", "--method always-expand --router_row ood_mean"),

    "pt, rq": Run("plain", "--method mixlora-dsi-pt", ("53.2/34.6", "12.6/15.5", "")),
    "pt, pq": Run("pq", "--method mixlora-dsi-pt --docid_kind pq --M 8", ("3.4/1.6", "1.0/1.5", "")),
    "pt, atomic": Run("atomic", "--method mixlora-dsi-pt --d0_fragments 0 --docid_kind atomic",
                      ("44.4/24.1", "0.0/0.0", "")),
    "M 4": Run("m4-k256", "--M 4"),
    "M 8": Run("m8-k256", "--M 8"),
    "K 128": Run("m6-k128", "--K 128"),
    "fixed set, rank 96": Run("rank-96", "--lora_rank 96 --lora_alpha 192 --expand fixed"),
    "fixed set, rank 32": Run("mixture", "--expand fixed"),
    "width 64": Run("half-width", "--width 64 --feed_forward 256"),
    "width 256": Run("twice-width", "--width 256 --feed_forward 1024"),
}
RUNS |= {
    f"delta {delta}": Run("paper", f"--method paper --delta {delta}")
    for delta in ("0.1", "5", "10")
}
PAPER_ALPHAS = {  # tables 11-12, whose labels of alpha_1 are off by one row
    ("0.1", "0.05"): ("65.2/50.8", "15.3/21.0", ""), ("0.1", "0.1"): ("66.7/52.3", "13.3/20.6", ""),
    ("0.1", "0.5"): ("59.5/40.6", "12.9/15.2", ""), ("0.5", "0.05"): ("64.9/50.2", "18.3/26.2", ""),
    ("0.5", "0.1"): ("67.0/52.3", "12.8/17.7", ""), ("0.5", "0.5"): ("59.7/40.8", "8.0/5.0", ""),
    ("1.0", "0.05"): ("66.4/51.8", "17.6/28.0", ""), ("1.0", "0.1"): ("68.1/55.2", "13.0/18.1", ""),
    ("1.0", "0.5"): ("61.9/45.3", "9.9/7.2", ""),
}
RUNS |= {
    f"alpha {align}, {kl}": Run("paper", f"--method always-expand --align_coef {align} --kl_coef {kl}", paper)
    for (align, kl), paper in PAPER_ALPHAS.items()
}

# Experiment: its rows, and the one that the others are tested against.
EXPERIMENTS = {
    "methods": (["bm25", "dense", "quantised", "paper", "mixlora-dsi", "dream"], "mixlora-dsi"),
    "references": (["base", "paper", "mixlora-dsi", "ours, rehearsal", "dream", "dream, rehearsal", "joint", "incdsi"],
                   "mixlora-dsi"),
    "ladder": (["no general text, 10 beams", "no general text", "paper", "+ energies", "+ dreams",
                "+ general text on D_t", "- KL, slow learner", "mixlora-dsi"],
               "mixlora-dsi"),
    "table1": (["bm25", "dense", "base", "dsi++", "clever-512", "clever-1024", "clever-512-d0", "promptdsi",
                "corpusbrain++", "incdsi", "naive-expansion", "mixlora-dsi-pt", "never-expand", "always-expand",
                "paper", "mixlora-dsi", "dream"], "paper"),
    "dreams": (["5,000 dreams", "mixlora-dsi", "80,000 dreams", "256 a step", "1,024 a step", "weight 1", "weight 4",
                "style 0.5", "dreams alone", "dreams alone, style 0.5", "8 words", "no noise"], "mixlora-dsi"),
    "growth": (["mixlora-dsi", "ours, never expand", "ours, always expand", "ours, frozen where none grows",
                "topic/mixlora-dsi", "topic/never expand", "topic/always expand"], "mixlora-dsi"),
    "beams": (["paper", "mixlora-dsi", "dream"], "mixlora-dsi"),
    "table4": (["naive, no mask", "naive-expansion", "naive + slow learner + KL", "+ cosine router + router losses",
                "always-expand", "paper", "no mask"], "paper"),
    "losses": (["no align", "no repel", "no KL", "always-expand"], "always-expand"),
    "alpha": ([f"alpha {align}, {kl}" for align, kl in PAPER_ALPHAS], "alpha 1.0, 0.1"),
    "delta": (["delta 0.1", "paper", "delta 5", "delta 10"], "paper"),
    "slow": (["slow none", "paper", "slow lr"], "paper"),
    "routing": (["naive-expansion", "router row ood_mean", "always-expand"], "always-expand"),
    "docids": (["pt, rq", "pt, pq", "pt, atomic"], "pt, rq"),
    "codebooks": (["M 4", "mixlora-dsi", "M 8", "K 128"], "mixlora-dsi"),
    "budget": (["ours, never expand", "fixed set, rank 32", "fixed set, rank 96", "ours, always expand"],
               "ours, always expand"),
    "width": (["width 64", "mixlora-dsi", "width 256"], "mixlora-dsi"),
}
# fmt: on

FILES = {  # of a run folder, by the last stage that they are needed for
    "dense": (
        "corpus.json", "documents", "queries", "doc_ids.txt", "tokenizer.model", "pseudo_queries", "idf.json",
        "excluded.npy", "dense.pt", "embeddings",
    ),
    "rq": ("rq.pt", "docids.npy"),
    "D0": ("D0.pt", "evaluation_D0.json"),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- runs


def inherit(source: Path, target: Path, last: str, config: Config) -> None:
    """A new run folder that has every stage of `source` up to `last`, as links to the same files."""
    unfinished = target.with_name(target.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    stages = list(FILES)[: list(FILES).index(last) + 1]
    same_beam = store.read_json(source / "config.json")["beam"] == config.beam  # else D_0 is evaluated again
    for path in (source / name for stage in stages for name in FILES[stage]):
        if path.is_dir():
            shutil.copytree(path, unfinished / path.name, copy_function=os.link)
        elif path.exists() and (path.name != "evaluation_D0.json" or same_beam):
            os.link(path, unfinished / path.name)
    done = store.read_json(source / "stages.json")
    store.write_json(unfinished / "stages.json", {stage: done[stage] for stage in ("data", *stages)})
    store.write_json(unfinished / "config.json", asdict(config))
    unfinished.rename(target)


@dataclass(frozen=True)
class Task:
    """One run folder to be made or finished, and where its first stages come from."""

    folder: Path
    flags: tuple[str, ...]
    source: Path | None  # folder of the run that it starts from
    last: str  # stage up to which it starts from there
    ends: int | None  # the last corpus, None: all
    row: Path  # file of what the tables need of a whole run

    def is_done(self) -> bool:
        """Whether the folder holds all that it is to hold, by the file that is written last."""
        if self.ends is None:
            return (self.folder / "results.json").exists()
        return f"D{self.ends}" in store.Stages(self.folder)


def differing(was: dict, task: Task) -> str:
    """Names of settings in which a run is not the one that is asked for."""
    wanted = asdict(parse(list(task.flags)).config)
    return ", ".join(
        n for n in wanted if was.get(n) != wanted[n] and n not in ("run", "data_dir", *OF_MACHINE)
    )


def beside(task: Task) -> dict:
    """What the row holds beside the run's results, by the experiments that it is of: name -> what measures it on the folder."""
    rows = {name: [run_name(label) for label in EXPERIMENTS[name][0]] for name in ("growth", "beams")}
    measures = {"beams": by_beam} if task.folder.name in rows["beams"] else {}
    if task.folder.name in rows["growth"] and parse(list(task.flags)).config.expand == "ood":
        measures["mock"] = mock_growth
    return measures


def is_kept(task: Task) -> bool:
    """Whether the row's file is there, of this machine or another. Raises ValueError where its run had other settings."""
    if task.ends is not None or not task.row.exists():
        return False
    row = store.read_json(task.row)
    if names := differing(row["config"], task):
        raise ValueError(f"{task.row} is of a run with other settings ({names}); pass other --rows")
    return beside(task).keys() <= row.keys()


def write_row(task: Task) -> None:
    """The row's file: settings, figures and, for each query, its recall and the place of the first right document."""
    results = store.read_json(task.folder / "results.json")
    files = {"run": f"D{len(results['experts']) - 1}"} | {name: name for name in results["baselines"]}
    metrics, values = {"run": results["metrics"]} | results["baselines"], {}
    for name, file in files.items():
        corpora = store.read_json(task.folder / f"evaluation_{file}.json")["values"]
        values[name] = [[of["recall@10"], [round(1 / v) if v else 0 for v in of["mrr@10"]]] for of in corpora]
    row = {"config": results["config"]} | {key: results[key] for key in KEPT}
    row |= {name: measure(task.folder) for name, measure in beside(task).items()}
    row |= {"metrics": {name: {m: of[m] for m in METRICS} for name, of in metrics.items()}, "values": values}
    store.write(task.row, json.dumps(row, separators=(",", ":")).encode())


def run_name(label: str) -> str:
    """The folder of a row's run."""
    return "mixlora-dsi" if label in NOT_RUN else label.replace("/", "-").replace(" ", "_")


def tasks_of(labels: list[str], seed: int, out: Path, flags: list[str], rows: Path) -> list[list[Task]]:
    """What has to be run for these rows: whole starts, starts that take from `mixture`, then the runs themselves. Nothing
    for a row that is kept.
    """
    folder = out / str(seed)

    def task(name: str, own: str, source: str, last: str, ends: int | None = None) -> Task:
        path, baselines = folder / name, "--baselines" if name == "mixlora-dsi" else "--no-baselines"
        every = (*flags, *own.split(), "--seed", str(seed), "--run", str(path), baselines)
        row = rows / str(seed) / f"{name}.json"
        return Task(path, every, folder / f"start-{source}" if source else None, last, ends, row)

    labels = dict.fromkeys("mixlora-dsi" if label in NOT_RUN else label for label in labels)
    runs = {label: task(run_name(label), RUNS[label].flags, RUNS[label].start, "D0") for label in labels}
    runs = {label: run for label, run in runs.items() if not is_kept(run)}
    starts = dict.fromkeys(RUNS[label].start for label in runs)
    if any(STARTS[name].stages for name in starts):
        starts["mixture"] = None
    groups = [[], [], list(runs.values())]
    for name, start in [(name, STARTS[name]) for name in starts]:
        source = "mixture" if start.stages else ""
        groups[bool(source)].append(task(f"start-{name}", start.flags, source, start.stages, 0))
    return groups


def perform(task: Task, threads: int) -> str:
    """Makes or finishes one run folder, in a process of its own. Raises ValueError where it holds another run."""
    torch.set_num_threads(threads)
    asked, folder, said = parse(list(task.flags)), task.folder, "done"
    if task.source and not (folder / "corpus.json").exists():
        inherit(task.source, folder, task.last, asked.config)
    if (folder / "corpus.json").exists():
        if names := differing(store.read_json(folder / "config.json"), task):
            raise ValueError(f"{folder} holds a run with other settings ({names}); pass another --out")
        asked.resume = True
    if asked.resume and task.is_done():
        said = "done already"
    else:
        train.execute(asked, task.ends, quiet=True)
    if task.ends is None:
        write_row(task)
    return f"{folder}: {said}"


def run_all(tasks: list[Task], jobs: int) -> None:
    """Runs the tasks, `jobs` at a time."""
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool:
        for done in pool.map(perform, tasks, [threads] * len(tasks)):
            print(done, flush=True)


# ------------------------------------------------------------------------------------------------- statistics


def values_of(label: str, seed: int, rows: Path) -> tuple[dict, list[dict[str, list[float]]]]:
    """What is kept of a row, and per corpus each metric's value for every query after the last one."""
    row = store.read_json(rows / str(seed) / f"{run_name(label)}.json")
    name = label if label in NOT_RUN else "run"
    kept = row["values"][name]
    values = [dict(zip(METRICS, (hits, [1 / n if n else 0.0 for n in first]))) for hits, first in kept]
    at_1 = float(np.mean([np.mean([n == 1 for n in first]) for _, first in kept]))
    return row | {"metrics": row["metrics"][name], "recall@1": at_1}, values


def paired_p(differences: list[list[np.ndarray]], draws: int = 2000, seed: int = 0) -> float:
    """Two-sided p-value of a difference in AP, by bootstrap over seeds and, within each corpus, over queries.

    Args:
        differences: [seed][corpus] (queries,) of a metric, row minus reference, query by query.

    Each draw takes as many seeds as there are, with replacement, and queries within each corpus of each. Drawn from
    n seeds, their variance would come out (n - 1) / n of its size, so deviations of seeds are stretched before. One
    seed tells of queries alone, and of a few the p-value is still somewhat too small.
    """
    rng, seeds = np.random.default_rng(seed), len(differences)
    of_seeds = np.array([np.mean([d.mean() for d in corpora]) for corpora in differences])
    stretch = (seeds / (seeds - 1)) ** 0.5 - 1 if seeds > 1 else 0.0
    moved = stretch * (of_seeds - of_seeds.mean())
    differences = [[d + move for d in corpora] for corpora, move in zip(differences, moved)]
    drawn = np.zeros(draws)
    for chosen in rng.integers(seeds, size=(seeds, draws)):
        for s, corpora in enumerate(differences):
            at = np.flatnonzero(chosen == s)
            for d in corpora:
                for part in np.array_split(at, max(1, len(at) * len(d) // 2_000_000)):
                    means = d[rng.integers(len(d), size=(len(part), len(d)))].mean(1)
                    drawn[part] += means / len(corpora) / seeds
    smaller = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return min(1.0, 2 * (smaller + 1) / (draws + 1))


def summarise(name: str, seeds: list[int], folder: Path) -> dict:
    """What NAME.json holds, of the rows in `folder`: of each system every seed's figures, mean costs, and the p-value
    against the reference.
    """
    labels, reference = EXPERIMENTS[name]
    evaluated, rows = {label: [values_of(label, seed, folder) for seed in seeds] for label in labels}, []
    for label in labels:
        results, metrics = [r for r, _ in evaluated[label]], {}
        by_topic = [RUNS[one].start == "topic" for one in (label, reference)]
        paired = label != reference and by_topic[0] == by_topic[1]  # by test query
        for m in METRICS:
            metrics[m] = {key: [r["metrics"][m][key] for r in results] for key in ("AP", "BWT", "FWT")}
            metrics[m]["P"] = [r["metrics"][m]["P"][-1] for r in results]
            both = zip(evaluated[label], evaluated[reference]) if paired else ()
            differences = [[np.subtract(a[m], b[m]) for a, b in zip(x, y)] for (_, x), (_, y) in both]
            metrics[m]["p_value"] = paired_p(differences) if paired else None
        row = {"label": label, "metrics": metrics, "paper": RUNS[label].paper}
        row["recall@1"] = [r["recall@1"] for r in results]
        if label not in NOT_RUN:
            trained = [r["trainable_parameters"] for r in results]  # by corpus, from D_1 on
            seconds = [[r["seconds"][stage] for stage in corpora] for r, corpora in zip(results, trained)]
            row["trainable_parameters"] = float(np.mean([list(corpora.values()) for corpora in trained]))
            row["seconds_per_corpus"] = float(np.mean(seconds))
            row["peak_memory_bytes"] = int(np.mean([r["peak_memory_bytes"] for r in results]))
            of_seeds = ["experts", "ood_percent", "first_choice"]
            of_seeds += [key for key in (OWN.get(name),) if key in results[0]]
            row |= {key: [r[key] for r in results] for key in of_seeds}
        rows.append(row)
    return {"name": name, "seeds": seeds, "reference": reference, "rows": rows}


def mock_growth(folder: Path) -> list[list[list[float]]]:
    """Would a layer grow where nothing is new? Percent of OOD queries by t, i < t and layer: fresh queries of D_i, which
    the model knows, in place of D_t. Reads text of earlier corpora, which no run does.
    """
    config = saved_config(folder)
    run = prepare.Run(config, folder, store.Log(folder, quiet=True, writes=False))
    bi_encoder = prepare.dense_stage(run)
    books, codes = prepare.docid_stage(run, bi_encoder)
    made = prepare.Prepared(
        bi_encoder, books, codes, prepare.find_dreams(run, bi_encoder, books, wanted=False)
    )
    percent = []
    for t in range(1, len(run.corpora)):
        model, stats = run.after(t - 1)
        train.measure_dreams(run, model, made, stats, t - 1)
        percent.append([])
        for i in range(t):
            scores = train.fresh_scores(run, model, made, i, f"mock {t}")
            decided = [ood.decide(s, stat, config.delta, config.epsilon) for s, stat in zip(scores, stats)]
            percent[-1].append([decision.ood_percent for decision in decided])
    return percent


def by_beam(folder: Path) -> list[dict[str, float]]:
    """Recall@10 of the last model, mean over corpora, and queries per second, at several widths of the beam."""
    run, rows = store.LoadedRun(folder), []
    model, trie = run.at(run.finished[-1])
    for beam in BEAMS:
        length = run.config["query_length"]
        search = partial(retrieve, model, trie, run.tokenizer, doc_ids=run.ids, beam=beam, max_length=length)
        begin = time.monotonic()
        evaluation = scoring.evaluate(run.corpora, search)
        seconds = time.monotonic() - begin
        queries = sum(len(corpus.test) for corpus in run.corpora)
        ap = float(np.mean(evaluation.means("recall@10")))
        rows.append({"beam": beam, "AP": ap, "queries_per_second": queries / seconds})
    return rows


# --------------------------------------------------------------------------------------------------- tables


def figures(name: str, summary: dict) -> str:
    """The experiment's tables in Markdown: one for each metric, then what grew and what it cost."""
    reference, seeds, rows = summary["reference"], summary["seeds"], summary["rows"]
    corpora, tables = [f"D{i}" for i in range(len(rows[0]["metrics"]["recall@10"]["P"][0]))], []
    for place, m in enumerate(METRICS):
        about = (
            f"**{name}, {m}** in percent, {'mean ± standard error over seeds' if seeds[1:] else 'seed'} "
            f"{', '.join(map(str, seeds))}; p: paired "
            f"bootstrap of AP against {reference} over queries{' and seeds' * (len(seeds) > 1)}; last column: the "
            "paper's AP, BWT, FWT on NQ320k"
        )
        cells = {row["label"]: accuracy(row, m, place) for row in rows}
        names = [*corpora, "AP", "BWT", "FWT", *["AP of Recall@1"] * place, "p", "paper"]
        tables.append(table(about, names, cells))
    about = (
        f"**{name}, growth and cost**: mean over corpora D_1.. and seeds, seconds with evaluation (of a resumed corpus, "
        "since it was resumed); layers are separated by slashes; experts and newest of the first seed; newest: share of "
        "tokens whose first choice is the newest expert, after the last corpus"
    )
    names = "trained parameters|s per corpus|peak MiB|OOD queries, percent per layer|experts per layer at the end|newest"
    cells = {row["label"]: growth(row) for row in rows if "experts" in row}
    tables.append(table(about, names.split("|"), cells))
    for row in rows:
        if "mock" in row:
            about = f"**{row['label']}**: percent of OOD queries per layer, mean over seeds, and where nothing is new"
            tables.append(table(about, ["D_t", *(f"{name} again" for name in corpora[:-1])], mocks(row)))
        if "beams" in row:
            about = f"**{row['label']}**: beams kept, Recall@10 (AP) and queries per second"
            cells = {}
            for same in zip(*row["beams"]):
                ap, rate = (np.mean([one[key] for one in same]) for key in ("AP", "queries_per_second"))
                cells[str(same[0]["beam"])] = [f"{100 * ap:.1f}", f"{rate:.0f}"]
            tables.append(table(about, ["AP", "queries/s"], cells))
    return "\n".join(tables)


def mocks(row: dict) -> dict[str, list[str]]:
    """Rows of the table that sets D_t beside fresh queries of what is known."""
    cells, corpora = {}, list(row["ood_percent"][0])
    for k, name in enumerate(corpora):
        arrived = [seed[name] for seed in row["ood_percent"]]
        known = zip(*(seed[k] for seed in row["mock"]))  # by corpus i < t, [seed][layer]
        shares = ["/".join(f"{v:.1f}" for v in np.mean(layers, axis=0)) for layers in (arrived, *known)]
        cells[name] = shares + [""] * (len(corpora) - k - 1)
    return cells


def table(about: str, names: list[str], cells: dict[str, list[str]]) -> str:
    lines = [["", *names], ["---"] * (len(names) + 1), *([label, *row] for label, row in cells.items())]
    return "\n".join([about, "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def accuracy(row: dict, metric: str, place: int) -> list[str]:
    """Cells of one row of a metric's table, which is the first or second of the paper's pairs."""
    of, cells = row["metrics"][metric], []
    for values in (*zip(*of["P"]), of["AP"], of["BWT"], of["FWT"], *[row["recall@1"]] * place):
        mean, error = mean_and_error(values)
        cells.append(f"{100 * mean:.1f}" + f" ± {100 * error:.1f}" * (len(values) > 1))
    cells.append("" if of["p_value"] is None else f"{of['p_value']:.3f}")
    return [*cells, ", ".join(pair.split("/")[place] for pair in row["paper"] or () if pair)]


def growth(row: dict) -> list[str]:
    """Cells of one row of the table of growth and cost."""
    shares = [list(r.values()) for r in row["ood_percent"]]  # [seed][corpus][layer]
    shares = ["/".join(f"{v:.1f}" for v in np.mean(layers, axis=0)) or "–" for layers in zip(*shares)]
    experts, choices = (list(row[key][0].values())[-1] for key in ("experts", "first_choice"))
    return [
        f"{row['trainable_parameters']:,.0f}", f"{row['seconds_per_corpus']:.0f}",
        f"{row['peak_memory_bytes'] / 2**20:.0f}", ", ".join(shares), "/".join(map(str, experts)),
        "/".join(f"{100 * layer[-1]:.0f} %" for layer in choices),
    ]  # fmt: skip


def main(argv: list[str]) -> None:
    argv, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = command.Parser(description="Run one of the paper's experiments and print its tables.")
    parser.add_argument("name", choices=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 42 on [1]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores [1]")
    parser.add_argument("--only", default="", help="labels of the rows to run, with semicolons [all]")
    parser.add_argument("--out", type=Path, default=Path("experiments"), help="folder [experiments]")
    text = "folder of finished rows, which are not run again, so that they may come from several machines [OUT/rows]"
    parser.add_argument("--rows", type=Path, help=text)
    args = parser.parse_args(argv)
    rows = args.rows or args.out / "rows"
    if args.seeds < 1 or args.jobs < 1:
        raise ValueError(f"--seeds {args.seeds} and --jobs {args.jobs}: wanted positive numbers")
    labels = EXPERIMENTS[args.name][0]
    chosen = args.only.split(";") if args.only else labels
    if unknown := [label for label in chosen if label not in labels]:
        raise ValueError(f"--only {'; '.join(unknown)}: wanted some of {'; '.join(labels)}")
    seeds = [42 + i for i in range(args.seeds)]
    for groups in zip(*(tasks_of(chosen, seed, args.out, flags, rows) for seed in seeds)):
        run_all(sum(groups, []), args.jobs)
    if chosen == labels:
        summary = summarise(args.name, seeds, rows)
        store.write_json(args.out / f"{args.name}.json", summary)
        text = figures(args.name, summary)
        store.write(args.out / f"{args.name}.md", text.encode())
        print(text)


if __name__ == "__main__":
    command.run(main, "tools.experiments", "stopped; finished runs are kept, the same command goes on")
