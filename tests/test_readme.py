"""What README says of the code exists."""

import ast
import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from toy import TOY, toy_folder

import dense
import run
import train
from tools import doc2query

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_function_of_the_map_from_the_paper_exists():
    rows = re.findall(r"^\| (?:Eq\.|section).*$", README, re.M)
    names = [name for row in rows for name in re.findall(r"`([a-z0-9]+\.[\w.]+)`", row)]
    assert len(rows) >= 9 and len(names) >= 15
    for name in names:
        module, *path = name.split(".")
        value = importlib.import_module(module)
        for part in path:
            value = getattr(value, part)
        assert value.__doc__, name


def test_every_flag_that_readme_names_is_a_field_of_config():
    flags = {flag.removeprefix("no-") for flag in re.findall(r"--([a-z0-9][a-z0-9_-]*)", README)}
    assert len(flags) > 6
    known = set(train.Config.__dataclass_fields__) | {"resume", "overwrite", "help", "trec", "run", "dry-run"}
    known |= {"nproc_per_node", "queries", "seeds", "jobs"} | set(
        vars(doc2query.parse(["--t5", ".", "--documents", "d", "--out", "o"]))
    )
    assert flags <= {*known, "data-dir", "pseudo-queries"}, flags - known


def test_the_teacher_example_writes_what_the_next_run_reads(tmp_path, monkeypatch):
    """A stand-in scores by shared words; what counts is that the ten lines run on a run's own files."""

    class CrossEncoder:
        def __init__(self, name, max_length):
            pass

        def predict(self, pairs):
            shared = [len(set(query.split()) & set(text.split())) for query, text in pairs]
            return torch.tensor(shared, dtype=torch.float32)

    toy_folder(tmp_path / "beir")
    folder = tmp_path / "runs" / "nq320k"
    flags = ["--data", str(tmp_path / "beir"), "--run", str(folder), "--splits", "60,40", *TOY]
    train.main([*flags, "--save_negatives", "--dense_pseudo", "0", "--d0_steps", "1", "--steps", "1"])
    monkeypatch.setitem(
        sys.modules, "sentence_transformers", types.SimpleNamespace(CrossEncoder=CrossEncoder)
    )
    monkeypatch.chdir(tmp_path)
    example = next(
        block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "CrossEncoder" in block
    )
    exec(example, {})
    d0 = run.load_corpora(folder)[0]
    found = dense.read_teacher(tmp_path / "teacher_1.jsonl", d0)
    assert len(found.queries) == len(d0.train) == 30 and found.negatives.shape == (30, 5)
    for query, row, score in zip(found.queries, found.positives.tolist(), found.positive_scores.tolist()):
        assert score == len(set(query.split()) & set(list(d0.passages())[row].split()))


def test_the_table_of_files_lists_each_with_the_modules_that_it_imports():
    rows = dict(re.findall(r"^\| `(\w+)\.py` \|[^|]*\| ([^|]*) \|$", README, re.M))
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert set(rows) == modules
    for name, listed in rows.items():
        imported = set()
        for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        if name != "train":  # "all"
            assert set(listed.split(", ")) - {"–"} == imported & modules, name


def test_every_file_and_test_command_that_readme_names_exists():
    for name in re.findall(r"`([\w/]+\.py)`", README):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize(
    "name",
    [path.stem for path in sorted(ROOT.glob("*.py"))],
)
def test_every_module_opens_by_saying_where_it_stands(name):
    head = (ROOT / f"{name}.py").read_text().split('"""')[1]
    assert all(f"\n{part} " in head for part in ("In", "Out", "Next", "Differs", "Paper"))
