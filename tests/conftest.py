"""What tests share: one thread a worker, a made-up corpus, and a run on it that is trained once for all of them."""

import fcntl
import json
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before torch is imported
    os.environ[name] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what tests compare is of one processor

import shutil  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from toy import TOY, toy_folder  # noqa: E402

import train  # noqa: E402
from config import METHOD_RECIPES, parse  # noqa: E402

train.FRESH_QUERIES, train.YARDSTICK = 200, 200  # enough for made-up corpora, whose preset is beir
for method in ("mixlora-dsi", "dream"):
    METHOD_RECIPES["beir", method] = METHOD_RECIPES.get(("beir", method), {}) | dict(dreams=200)


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, make): a folder that the first test which asks for it makes, in whichever worker."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers of this session

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / name
        with (shared / f"{name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "whole").exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                (folder / "whole").touch()
        return folder

    return made


@pytest.fixture(scope="session")
def toy(once) -> Path:
    """A BEIR folder of 50 made-up documents."""
    return once("toy", toy_folder)


@pytest.fixture(scope="session")
def general(once, toy) -> Path:
    """A folder of 21 documents in BEIR layout, one of which has the text of an indexed document."""
    rows = [json.loads(line) for line in (toy / "corpus.jsonl").read_text().splitlines()[:21]]
    for row in rows[1:]:
        row["text"] = " ".join(word[::-1] for word in row["text"].split())

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))

    return once("general", make)


@pytest.fixture(scope="session")
def finished(once, toy) -> Path:
    """A run through every stage on the toy; every layer grows at every corpus. Not to be changed: see `copied`."""
    flags = ["--data", str(toy), "--expand", "always", "--save_negatives", *TOY]
    return once("finished", lambda folder: train.main([*flags, "--run", str(folder)]))


@pytest.fixture(scope="session")
def begun(once, toy) -> Callable[[bool], Path]:
    """begun(mixture): a run of three corpora that ended after D_0, with experts or without. `begun.flags`: its flags."""
    flags = ["--data", str(toy), "--splits", "60,20,20", *TOY, "--no-baselines"]

    def begun(mixture: bool) -> Path:
        start = "--d0_mixture" if mixture else "--no-d0_mixture"
        mode = ["--method", "base"] if not mixture else []

        def make(folder: Path) -> None:
            train.execute(parse([*flags, *mode, "--run", str(folder)]), last=0, quiet=True)

        return once(f"begun{start}", make)

    begun.flags = flags
    return begun


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of `finished` that a test may change: hard links, but for the files that a run appends to."""
    return link_tree(finished, tmp_path / "copied")


def link_tree(source: Path, target: Path) -> Path:
    def copy(one: str, other: str) -> None:
        appended = Path(one).name in ("log.txt", "metrics.jsonl", "lock")
        shutil.copy(one, other) if appended else os.link(one, other)

    return Path(shutil.copytree(source, target, copy_function=copy))
