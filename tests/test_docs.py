"""README and docs name what exists, and their figures stand in the files that they were taken from."""

import functools
import importlib
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from toy import TOY, toy_folder

ROOT = Path(__file__).parent.parent
PATHS = {path.name: path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
PAGES = {name: path.read_text() for name, path in PATHS.items()}
WRITTEN = [name for name in PAGES if name != "walkthrough.md"]  # the walkthrough has tests of its own
FILES = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")) if path.stem != "__init__"]
PYTHON = [path.relative_to(ROOT).as_posix() for path in FILES]
EXPERIMENTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs/results").glob("*.json")}


@pytest.mark.parametrize("name", PAGES)
def test_every_relative_link_leads_to_a_file(name):
    for link in re.findall(r"\]\(([^)#]+)", PAGES[name]):
        assert "://" in link or (PATHS[name].parent / link).is_file(), link


@pytest.mark.parametrize("name", WRITTEN)
def test_every_python_file_and_function_named_exists(name):
    assert all((ROOT / file).is_file() for file in re.findall(r"`([\w/]+\.py)`", PAGES[name]))
    for module, path in re.findall(r"`([a-z]\w*)\.([A-Za-z]\w*(?:\.\w+)*)`", PAGES[name]):
        if f"{module}.py" in PYTHON and path.rpartition(".")[2] not in "json jsonl npy pt py tsv".split():
            assert functools.reduce(getattr, path.split("."), importlib.import_module(module)).__doc__, path


def test_readme_is_one_page_with_every_file_and_every_equation():
    assert len(PAGES["README.md"].splitlines()) <= 120
    cells = re.findall(r"^\| (`[\w/]+\.py`(?:, `[\w/]+\.py`)*) \|", PAGES["README.md"], re.M)
    assert sorted(re.findall(r"`([\w/]+\.py)`", " ".join(cells))) == sorted(PYTHON)
    rows = re.findall(r"^\| (?:Eq\.|section).*$", PAGES["README.md"], re.M)
    assert len(rows) == 10 and all(re.search(r"`\w+\.\w", row) for row in rows)


def flags_in(text: str) -> set[str]:
    flags = re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", text)
    return {flag.replace("-", "_").removeprefix("no_") for flag in flags}


def flags_of(path: Path) -> set[str]:
    """Flags that a command defines; those of train.py, which others take too, are the fields of Config."""
    flags = flags_in(" ".join(re.findall(r'"(--[\w-]+)"', path.read_text())))
    flags |= set(re.findall(r'\bflag\(\s*"(\w+)"', path.read_text()))
    if path.stem in ("train", "cost"):
        settings = importlib.import_module("config" if "config.py" in PYTHON else "train")
        flags |= set(settings.Config.__dataclass_fields__) | {"help", "resume", "overwrite"}
        flags |= {"extend", "replace", "keep", "consolidate"}
    return flags


def code(text: str) -> list[str]:
    """Code spans, and lines of code blocks."""
    blocks, others = "".join(text.split("```")[1::2]), "".join(text.split("```")[::2])
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", others)]
    return blocks.replace("\\\n", " ").splitlines() + spans


@pytest.mark.parametrize("name", WRITTEN)
def test_every_command_and_every_flag_named_exists(name):
    known = set().union(*map(flags_of, [*FILES, *ROOT.glob("benchmarks/*.py")]))
    for line in code(PAGES[name].replace("torchrun --nproc_per_node=8 -- ", "python ")):
        assert flags_in(line) <= known, line
        for tool, rest in re.findall(r"\bpython (?:-m )?(tools\.\w+|[\w/]+\.py)([^&]*)", line):
            path = ROOT / (tool.removesuffix(".py").replace(".", "/") + ".py")
            own, _, of_train = rest.partition(" -- ")
            assert flags_in(own) <= flags_of(path) and flags_in(of_train) <= flags_of(ROOT / "train.py"), line


def tables_in(text: str) -> list[dict[str, list[str]]]:
    """Each table of a page: its rows' cells by the first one."""
    tables = [table.splitlines()[2:] for table in re.findall(r"(?:^\|.*\n)+", text, re.M)]
    rows = [[line.strip("| ").split(" | ") for line in table] for table in tables]
    return [{label: [cell.strip() for cell in cells] for label, *cells in table} for table in rows]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_tables_of_an_experiment_have_the_rows_and_figures_of_its_json(name):
    experiments, summary = importlib.import_module("tools.experiments"), EXPERIMENTS[name]
    page = PAGES["results.md"] + "\n"
    wanted = tables_in(experiments.figures(name, summary))
    assert (
        tables_in(page[page.index(f"**{name}, recall@10**") :])[: len(wanted)] == wanted and len(wanted) >= 3
    )
    assert experiments.EXPERIMENTS[name] == (list(wanted[0]), summary["reference"])


def test_every_experiment_is_reported_or_listed_as_not_run_again():
    listed = re.findall(
        r"`(\w+)`", re.search(r"## Not run again.*?\n\n(.*?)\n\n", PAGES["results.md"], re.S)[1]
    )
    experiments = importlib.import_module("tools.experiments").EXPERIMENTS
    assert sorted([*EXPERIMENTS, *listed]) == sorted(set(experiments) - {"trial"})  # `trial` is a test's


def test_the_table_of_readme_has_figures_of_the_methods_table():
    rows = dict(re.findall(r"^\| [^|]*\(`([\w-]+)`\) \| (.*) \|$", PAGES["README.md"], re.M))
    summary, experiments = EXPERIMENTS.get("methods"), importlib.import_module("tools.experiments")
    wanted = tables_in(experiments.figures("methods", summary))[0] if summary else {}
    assert set(rows) == set(wanted)  # no figures before there are any
    for label, cells in rows.items():  # AP, BWT, FWT behind D0 .. D4, then p, then the paper's three
        paper = wanted[label][9].split(", ") if wanted[label][9:] else [""] * 3
        assert [cell.strip() for cell in cells.split(" | ")] == wanted[label][5:8] + paper, label


@pytest.mark.parametrize("path", FILES, ids=PYTHON)
def test_every_module_opens_by_saying_where_it_stands(path):
    parts = re.findall(r"^([A-Z]\w+) {2,}\S", path.read_text().split('"""')[1], re.M)
    assert parts[:5] == ["Paper", "In", "Out", "Next", "Differs"]


def test_the_teacher_example_writes_what_the_next_run_reads(tmp_path, monkeypatch):
    dense, store, train = map(importlib.import_module, ("dense", "store", "train"))

    def predict(encoder, pairs):  # a stand-in: counts the words that query and text share
        return torch.tensor([len(set(query.split()) & set(text.split())) for query, text in pairs])

    def run(name, *flags):
        shared = "--data beir --splits 60,40 --save_negatives --dense_rounds 2 --dense_pseudo 0 --d0_steps 1 --steps 1"
        train.main([*TOY, *shared.split(), "--run", name, *flags])

    toy_folder(tmp_path / "beir")
    monkeypatch.chdir(tmp_path)
    encoder = type("CrossEncoder", (), {"__init__": lambda *_, **__: None, "predict": predict})
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(CrossEncoder=encoder))
    script = re.search(r"```python\n(.*?)```", PAGES["data.md"], re.S)[1]
    run("runs/first")
    exec(script, {})
    run("runs/second", "--teacher", "teacher_1.jsonl,")
    assert 'Path("runs/first"), 1\n' in script
    exec(script.replace('Path("runs/first"), 1\n', 'Path("runs/second"), 2\n'), {})
    d0 = store.load_corpora(Path("runs/second"))[0]
    query, text = dict(zip(d0.train_ids, d0.train)), dict(zip(d0.ids, d0.passages()))
    for path in map(Path, ("teacher_1.jsonl", "teacher_2.jsonl")):
        assert len(dense.read_teacher(path, d0).queries) == len(d0.train) == 30
        for line in map(json.loads, path.read_text().splitlines()):
            pairs = [(query[line["qid"]][1], text[doc_id]) for doc_id in line["docids"]]
            assert line["scores"] == predict(None, pairs).tolist() and max(line["scores"]) > 0
