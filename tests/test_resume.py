"""A run that is killed at any moment and resumed ends with the same bits as one that never stopped."""

import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy import TOY, toy_folder

import arrays
import store
import train

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("MIXLORA_KILLS", 25))  # a soak asks for more
FLAGS = [
    *TOY, "--splits", "60,20,20", "--save_seconds", "0", "--expand", "always", "--ood_mode", "paper_code", "--dropout",
    "0.1", "--d0_steps", "20",
]  # fmt: skip
STAGE_BEGINS = ("corpus.json", "dense.pt", "rq.pt", "D0.pt", "D1.pt")  # the file written before each stage


def tensors_of(path: Path) -> dict[str, str]:
    """Hash of every tensor, number and string of a checkpoint, by its place."""
    found = {}

    def walk(value, place: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{place}.{key}")
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                walk(item, f"{place}.{i}")
        elif isinstance(value, torch.Tensor):
            found[place] = hashlib.sha256(
                value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            ).hexdigest()
        else:
            found[place] = repr(value)

    walk(store.read_tensors(path), "")
    return found


def outcome(folder: Path) -> dict:
    """All that a finished run holds, but for times, memory and the folder's name."""
    results = store.read_json(folder / "results.json")
    for name in ("seconds", "peak_memory_bytes"):
        del results[name]
    del results["config"]["run"]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {path.name: tensors_of(path) for path in sorted(folder.glob("*.pt")) if "latest" not in path.name}
    for name in ("docids.npy", "embeddings.npy", "doc_ids.txt", "tokenizer.model", "ood.json"):
        found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    steps = [[m["stage"], m["step"], m["loss"], m["gradient_norm"]] for m in metrics]
    return found | {"results": results, "metrics": steps}


# Imports once, then runs each command line in a fork of itself: no thread has started, and a run begins at once.
SERVER = """
import json, os, sys
sys.path.insert(0, {root!r})
import train
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            train.main(json.loads(line))
            code = 0
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Runner:
    """Real training processes that can be killed."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER.format(root=str(ROOT))], env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, flags: list[str], limit: float | None = None, after: Path | None = None) -> bool:
        """Runs to the end, or kills it `limit` seconds after the file appeared; says whether it came to its end."""
        print(json.dumps(flags), file=self.server.stdin, flush=True)
        pid = int(self.server.stdout.readline())
        ended = False
        while after and not after.exists() and not ended:
            ended = bool(select.select([self.server.stdout], [], [], 0.002)[0])
        if not ended and not select.select([self.server.stdout], [], [], limit)[0]:
            os.kill(pid, signal.SIGKILL)
        status = int(self.server.stdout.readline())
        assert status in (0, signal.SIGKILL)
        return status == 0


@pytest.fixture(scope="module")
def runner():
    runner = Runner()
    yield runner
    runner.server.stdin.close()
    runner.server.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, runner) -> tuple[Path, float]:
    """An uninterrupted run by a process of its own, and its seconds."""
    folder = tmp_path_factory.mktemp("whole")
    toy_folder(folder / "beir")
    begin = time.monotonic()
    assert runner.run(["--data", str(folder / "beir"), "--run", str(folder / "run"), *FLAGS])
    return folder, time.monotonic() - begin


def test_killed_at_random_moments_and_resumed_a_run_ends_with_the_same_bits(whole, runner, tmp_path):
    """SIGKILL five times in each run, at seeded random moments; the first falls into each stage in turn."""
    folder, seconds = whole
    wanted, rng, kills, runs = outcome(folder / "run"), random.Random(0), 0, 0
    while kills < KILLS:
        run = tmp_path / f"run{runs}"
        flags = ["--data", str(folder / "beir"), "--run", str(run), *FLAGS]
        moments = [(rng.uniform(0, 0.2) * seconds, run / STAGE_BEGINS[runs % len(STAGE_BEGINS)])]
        moments += [(rng.uniform(0, 0.8) * seconds, None) for _ in range(4)]
        for limit, after in [*moments, (None, None)]:
            if runner.run(flags, limit, after):
                break
            kills += 1
            if (run / "corpus.json").exists():
                flags = ["--resume", str(run)]
        assert outcome(run) == wanted
        shutil.rmtree(run)
        runs += 1


def stop_after(steps: int, monkeypatch) -> None:
    """Makes the process stop, as if killed, right after latest.pt was saved for the given time."""
    saved, save = [], train.Resume.save

    def counting(resume, *args):
        save(resume, *args)
        saved.append(args[0])
        if len(saved) == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Resume, "save", counting)


def interrupted(whole, run: Path, monkeypatch, steps: int) -> list[str]:
    with monkeypatch.context() as patch:
        stop_after(steps, patch)
        with pytest.raises(KeyboardInterrupt):
            train.main(["--data", str(whole[0] / "beir"), "--run", str(run), *FLAGS])
    return ["--resume", str(run)]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_stopped_after_every_file_that_it_names_a_run_ends_with_the_same_bits(
    whole, tmp_path, monkeypatch, one_thread
):
    """Between any two files that belong together: once after each file, in each state of stages.json."""
    run, rename, stopped = tmp_path / "run", os.replace, set()

    def rename_and_stop(source, target):
        rename(source, target)
        done = store.read_json(run / "stages.json") if (run / "stages.json").exists() else {}
        moment = (Path(target).name, *done)
        if not moment[0].startswith("latest") and moment not in stopped:
            stopped.add(moment)
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", rename_and_stop)
    while True:
        flags = ["--data", str(whole[0] / "beir"), "--run", str(run), *FLAGS]
        if (run / "corpus.json").exists():
            flags = ["--resume", str(run)]
        try:
            train.main(flags)
            break
        except KeyboardInterrupt:
            pass
    assert outcome(run) == outcome(whole[0] / "run")
    names = {moment[0] for moment in stopped}
    assert {
        "D0.pt",
        "D2.pt",
        "evaluation_D1.json",
        "ood.json",
        "stages.json",
        "rq.pt",
        "results.json",
    } <= names


@pytest.mark.parametrize(
    "method, saves",
    [
        ("promptdsi", (33, 3)),
        ("clever", (33, 6)),
        ("joint", (35, 30)),
        ("corpusbrain++", (38,)),
        ("incdsi", (20,)),
    ],
)
def test_a_baseline_stopped_in_its_stages_ends_with_the_same_bits(
    tmp_path, monkeypatch, one_thread, method, saves
):
    """Stopped after so many saves of latest.pt, 31 of which come before D_1, and again after so many more."""
    beir, run = toy_folder(tmp_path / "beir"), tmp_path / "run"
    flags = [
        *FLAGS,
        "--method",
        method,
        "--d0_fragments",
        "0",
        "--prompts",
        "3" if method == "promptdsi" else "0",
    ]
    train.main(["--data", str(beir), "--run", str(tmp_path / "whole"), *flags])
    command = ["--data", str(beir), "--run", str(run), *flags]
    for count in saves:
        with monkeypatch.context() as patch:
            stop_after(count, patch)
            with pytest.raises(KeyboardInterrupt):
                train.main(command)
        command = ["--resume", str(run)]
    train.main(command)
    assert outcome(run) == outcome(tmp_path / "whole")


def test_of_several_missing_checkpoints_each_is_made_from_the_one_before_it(whole, tmp_path, one_thread):
    shutil.copytree(whole[0] / "run", tmp_path / "run")
    for name in ("D0.pt", "D2.pt", "results.json"):
        (tmp_path / "run" / name).unlink()
    train.main(["--resume", str(tmp_path / "run")])
    assert outcome(tmp_path / "run")["D2.pt"] == outcome(whole[0] / "run")["D2.pt"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "of another run", "of another format"])
def test_a_latest_that_cannot_be_trusted_is_named_and_the_one_before_it_is_used(
    whole, tmp_path, monkeypatch, capsys, damage, one_thread
):
    resume = interrupted(whole, tmp_path / "run", monkeypatch, 25)
    latest = tmp_path / "run" / "latest.pt"
    content, value = latest.read_bytes(), store.read_tensors(latest)
    if damage == "cut":
        latest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        at = len(content) // 2
        latest.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
    else:
        value |= {"made_for": "x"} if damage == "of another run" else {"format": 99}
        store.write_tensors(latest, value)
    before = store.read_tensors(tmp_path / "run" / "latest.previous.pt")
    capsys.readouterr()
    train.main(resume)
    printed = capsys.readouterr().out
    assert str(latest) in printed and "going on without it" in printed
    assert f"{before['stage']}: going on after step {before['step']}" in printed
    assert outcome(tmp_path / "run") == outcome(whole[0] / "run")


def test_a_checkpoint_of_another_run_is_refused_by_name(whole, tmp_path):
    shutil.copytree(whole[0] / "run", tmp_path / "run")
    docids = store.load_docids(tmp_path / "run")
    docids[0] = (docids[0] + 1) % 16
    arrays.write_array(tmp_path / "run" / "docids.npy", docids.numpy().astype("int16"))
    with pytest.raises(
        ValueError, match=r"D2\.pt: made for other documents, another tokenizer or other docids"
    ):
        store.LoadedRun(tmp_path / "run").at(2)


def test_two_processes_do_not_train_in_one_folder(whole, tmp_path):
    (tmp_path / "run").mkdir()
    lock = store.lock(tmp_path / "run")
    with pytest.raises(ValueError, match="another process trains here"):
        train.main(["--data", str(whole[0] / "beir"), "--run", str(tmp_path / "run"), *FLAGS])
    lock.close()
    store.lock(tmp_path / "run").close()


def test_the_same_seed_gives_the_same_bits(whole, runner, tmp_path):
    assert runner.run(["--data", str(whole[0] / "beir"), "--run", str(tmp_path / "again"), *FLAGS])
    assert outcome(tmp_path / "again") == outcome(whole[0] / "run")


@pytest.mark.parametrize("size", ["60k", "400k", "700k", "900k"])
def test_a_full_disk_ends_a_run_with_a_message_and_more_room_lets_it_go_on(whole, tmp_path, size, one_thread):
    """A real one: a small tmpfs, which then grows."""
    disk, run = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(OSError, match="No space left"):
            train.main(["--data", str(whole[0] / "beir"), "--run", str(run), *FLAGS])
        for path in run.glob("*.pt"):  # what has its name is whole
            store.read_tensors(path)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = ["--resume", str(run)]
        if not (run / "corpus.json").exists():
            again = ["--data", str(whole[0] / "beir"), "--run", str(run), *FLAGS]
        train.main(again)
        assert outcome(run) == outcome(whole[0] / "run")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_run_folder_that_cannot_be_written_is_named(whole, tmp_path):
    (tmp_path / "run").symlink_to("/proc/self")
    with pytest.raises(OSError, match="run/"):
        train.main(["--data", str(whole[0] / "beir"), "--run", str(tmp_path / "run"), *FLAGS])


@pytest.mark.parametrize(
    "name", ["rq.pt", "docids.npy", "D0.pt", "dense.pt", "embeddings.npy", "tokenizer.model"]
)
def test_a_removed_file_is_made_anew_with_the_same_bits_or_named(whole, tmp_path, capsys, name, one_thread):
    shutil.copytree(whole[0] / "run", tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "results.json").unlink()
    try:
        train.main(["--resume", str(tmp_path / "run")])
    except ValueError as error:
        assert name in str(error)
    else:
        assert outcome(tmp_path / "run")["results"] == outcome(whole[0] / "run")["results"]
