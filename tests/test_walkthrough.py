"""docs/walkthrough.md runs, and prints what it says it prints.

`OMP_NUM_THREADS=1 python tests/test_walkthrough.py --write`, in tests/, writes the outputs anew. Processors round
differently, and hundreds of steps turn a last bit into another code. So the page says on which arithmetic it was
written, and on others only the number of lines is compared.
"""

import contextlib
import hashlib
import importlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import faiss
import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "walkthrough.md"
BLOCK = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.S)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?: %)?")


@pytest.fixture(scope="session")
def boolq(once):
    """BoolQ's pages, downloaded where they are absent; where that is impossible, the test is skipped."""
    data = importlib.import_module("data")
    present = data.CACHE.exists()

    def fetch(folder: Path) -> None:
        data.fetch_boolq()
        folder.mkdir()

    try:
        once("boolq", fetch)
    except ValueError as error:
        if present:
            raise
        pytest.skip(str(error))
    return data.read_boolq(seed=42)


def outputs(page: str) -> list[str]:
    """What each of the page's python blocks prints, run in order in one namespace and a temporary folder."""
    printed, names = [], {}
    threads, faiss_threads, here = torch.get_num_threads(), faiss.omp_get_max_threads(), Path.cwd()
    train = importlib.import_module("train")
    counts = train.FRESH_QUERIES, train.YARDSTICK
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():  # the page turns it off
        try:
            os.chdir(folder)
            for number, (code, _) in enumerate(BLOCK.findall(page), 1):
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(code, f"{PAGE.name}, block {number}", "exec"), names)
                printed.append("".join(line.rstrip() + "\n" for line in out.getvalue().splitlines()))
        finally:
            os.chdir(here)
            train.FRESH_QUERIES, train.YARDSTICK = counts
            torch.set_num_threads(threads)
            faiss.omp_set_num_threads(faiss_threads)
    return printed


def arithmetic() -> str:
    """Eight digits that tell processors apart whose products, exponentials and sums differ in a bit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 300, generator=generator)
    for _ in range(20):
        x = torch.softmax(x @ x.T / 17, dim=-1).log1p() * 30 - x.tanh()
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()[:8]


def differs(found: str, wanted: str) -> str:
    """The first line that says something else, or "": words must be equal, and numbers near."""
    lines, wanted_lines = found.splitlines(), wanted.splitlines()
    if len(lines) != len(wanted_lines):
        return f"found {len(lines)}, wanted {len(wanted_lines)} lines"
    for line, other in zip(lines, wanted_lines):
        words, other_words = (NUMBER.sub("#", text).split() for text in (line, other))
        if words != other_words or not all(map(near, NUMBER.findall(line), NUMBER.findall(other))):
            return f"found {line!r}, wanted {other!r}"
    return ""


def near(found: str, wanted: str) -> bool:
    """Whole numbers are equal, decimals within 2 % and a unit of their last place, or 3 points of a percentage."""
    if "." not in found or "." not in wanted or ("%" in found) != ("%" in wanted):
        return found == wanted
    number, percent = wanted.removesuffix(" %"), "%" in wanted
    unit = 10.0 ** -len(number.partition(".")[2])
    allowed = 3.0 if percent else 0.02 * abs(float(number)) + unit
    return abs(float(found.removesuffix(" %")) - float(number)) <= allowed + 1e-6


def test_every_block_prints_what_stands_below_it(boolq):
    page = PAGE.read_text()
    blocks = BLOCK.findall(page)
    assert len(blocks) >= 12 and len(blocks) == page.count("```python\n") == page.count("```text\n")
    wrong = {
        number: problem
        for number, (printed, (_, wanted)) in enumerate(zip(outputs(page), blocks), 1)
        if (problem := differs(printed, wanted))
    }
    if f"<!-- arithmetic {arithmetic()} -->" not in page:
        wrong = {number: problem for number, problem in wrong.items() if problem.endswith("lines")}
    assert not wrong, "python tests/test_walkthrough.py --write writes the outputs anew"


@pytest.mark.parametrize(
    "found, wanted, same",
    [
        ("layer 1: 0.50 of x2", "layer 1:  0.51 of x2", True),
        ("score -3.00", "score -3.06", True),
        ("score -3.00", "score -3.10", False),
        ("score -3.00", "score 3.00", False),
        ("0.00", "0.01", True),
        ("0.00", "0.02", False),
        ("70.0 % of queries", "72.8 % of queries", True),
        ("70.0 % of queries", "74.0 % of queries", False),
        ("delta 1 %", "delta 2 %", False),
        ("code 31", "code 30", False),
        ("code 31", "code 31.0", False),
        ("Rhine", "Oxygen", False),
        ("x156", "x157", False),
        ("one\ntwo", "one", False),
    ],
)
def test_outputs_are_compared_as_the_page_says(found, wanted, same):
    assert (differs(found, wanted) == "") == same


def test_every_function_that_the_page_names_exists():
    modules = {path.stem for path in ROOT.glob("*.py")}
    dotted = re.findall(r"`([a-z0-9_]+)\.(\w[\w.]*)`", PAGE.read_text())
    of_files = ("py", "pt", "json", "jsonl")
    names = {(module, rest) for module, rest in dotted if module in modules and rest not in of_files}
    assert len(names) >= 25
    for module, rest in names:
        value = importlib.import_module(module)
        for part in rest.split("."):
            value = getattr(value, part)
        assert value.__doc__ or rest == "main", (module, rest)


def test_the_page_mentions_every_equation_and_section_of_readme():
    """Also "Eq. 4-5" mentions two."""

    def equations(text: str) -> set[int]:
        pairs = re.findall(r"Eq\. (\d+)(?:-(\d+))?", text)
        return {number for first, last in pairs for number in range(int(first), int(last or first) + 1)}

    rows = re.findall(r"^\| ((?:Eq\.|section)[^|]*)", (ROOT / "README.md").read_text(), re.M)
    wanted, page = equations("\n".join(rows)), PAGE.read_text()
    assert wanted == set(range(2, 13)) == equations(page)
    for section in re.findall(r"section \d+\.\d+", "\n".join(rows)):
        assert section in " ".join(page.split()), section


def test_the_page_holds_no_text_of_the_data_set(boolq):
    """No eight words in a row of its 300 pages or of any question; the licence of the text is not this project's."""

    def windows(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    questions = [*boolq.test.values(), *(query for _, query, _ in boolq.train)]
    theirs = set().union(*map(windows, [*boolq.documents.texts[:300], *questions]))
    assert len(theirs) > 50_000
    assert not theirs & windows(PAGE.read_text())


def write() -> None:
    page = PAGE.read_text()
    printed = iter(outputs(page))
    page = BLOCK.sub(lambda block: f"```python\n{block[1]}```\n\n```text\n{next(printed)}```", page)
    PAGE.write_text(re.sub(r"<!-- arithmetic \w+ -->", f"<!-- arithmetic {arithmetic()} -->", page))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_walkthrough.py --write")
    sys.path.insert(0, str(ROOT))
    write()
