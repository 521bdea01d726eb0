"""What README says of the code exists."""

import importlib
import re
from pathlib import Path

import pytest

import train

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
    known = set(train.Config.__dataclass_fields__) | {"resume", "overwrite", "help", "trec", "run"}
    assert flags <= known, flags - known


@pytest.mark.parametrize(
    "name", ["data", "t5", "dense", "rq", "mixlora", "ood", "scan", "losses", "search", "eval", "train"]
)
def test_every_module_opens_by_saying_where_it_stands(name):
    head = (ROOT / f"{name}.py").read_text().split('"""')[1]
    assert all(f"\n{part} " in head for part in ("In", "Out", "Next", "Differs", "Paper"))
