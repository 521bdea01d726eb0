"""RESULTS.md says what the experiments' files say."""

from pathlib import Path

import pytest

import run as store
from tools import experiments

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "RESULTS.md").read_text()
FOUND = {path.stem: path for path in sorted((ROOT / "docs" / "results").glob("*.json"))}


@pytest.mark.parametrize("name", FOUND)
def test_every_table_is_the_one_that_its_json_gives(name):
    assert experiments.figures(name, store.read_json(FOUND[name])).strip() in TEXT


@pytest.mark.parametrize("name", FOUND)
def test_every_row_of_a_file_is_a_row_of_the_experiment_today(name):
    summary, (labels, reference) = store.read_json(FOUND[name]), experiments.EXPERIMENTS[name]
    assert [row["label"] for row in summary["rows"]] == labels and summary["reference"] == reference


def test_every_experiment_is_reported_or_said_to_be_missing():
    for name in experiments.EXPERIMENTS:
        assert name in FOUND or f"`{name}` was not run" in TEXT, name


def test_the_short_table_of_readme_has_the_figures_of_table1():
    lines = (ROOT / "README.md").read_text().splitlines()
    for row in store.read_json(FOUND["table1"])["rows"]:
        cells = [row["metrics"]["recall@10"][key] for key in ("AP", "BWT", "FWT")] + [
            row["metrics"]["mrr@10"]["AP"]
        ]
        p = "" if row["p_value"] is None else f"{row['p_value']:.3f}"
        wanted = " | ".join([row["label"], *map(experiments.mean_and_error, cells), p])
        assert f"| {wanted} |" in lines, row["label"]
