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
from pathlib import Path

import pytest
import torch
from conftest import link_tree
from toy import TOY

import arrays
import store
import train
from config import parse
from mixlora import attention_lora, mixed_layers
from tools.experiments import inherit

TESTS = Path(__file__).parent
FLAGS = [
    *TOY, "--splits", "60,20,20", "--save_seconds", "0", "--ood_mode", "paper_code", "--dropout", "0.1",
    "--lora_dropout", "0.05", "--d0_steps", "20",
]  # fmt: skip
SECONDS = 2.0  # of a run, about
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
    for name in (
        "docids.npy",
        "doc_ids.txt",
        "tokenizer.model",
        "ood.json",
        *(f"embeddings/D{t}.npy" for t in range(3)),
    ):
        found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    steps = [[m["stage"], m["step"], m["loss"], m["gradient_norm"]] for m in metrics]
    return found | {"results": results, "metrics": steps}


# Imports once, then runs each command line in a fork of itself: no thread has started, and a run begins at once.
SERVER = """
import json, os, sys, traceback
sys.path[:0] = {path!r}
import conftest, torch._dynamo, train  # the middle one, which the first optimiser imports, takes a second
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            train.main(json.loads(line))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Runner:
    """Real training processes that can be killed."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER.format(path=[str(TESTS), str(TESTS.parent)])], env=os.environ | {"OMP_NUM_THREADS": "1"},
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


@pytest.fixture(scope="session")
def data_flags(toy, general) -> list[str]:
    return ["--data", str(toy), "--general", str(general)]


@pytest.fixture(scope="session")
def whole(once, data_flags) -> Path:
    """A run that nothing stopped. Not to be changed."""
    flags = [*data_flags, *FLAGS]
    return once("whole", lambda folder: train.main([*flags, "--run", str(folder)]))


def test_the_run_that_is_stopped_below_has_a_part_of_every_kind(whole):
    """Dreams, general text, LoRA, a layer that grows and one whose newest expert evolves, averages moved in training."""
    model, stats = store.load_model(whole / "D2.pt")
    assert sorted((len(layer.old), len(layer.new)) for layer in mixed_layers(model)) == [(1, 1), (2, 1)]
    assert all(lora.o_b.any() for lora in attention_lora(model)) and len(attention_lora(model)) == 4
    assert all(stat.mean.all() and stat.base for stat in stats)
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in metrics if "dream" in line} == {"D1", "D2"}


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.soak)])
def test_killed_at_random_moments_and_resumed_a_run_ends_with_the_same_bits(
    whole, data_flags, runner, tmp_path, kills
):
    """SIGKILL in each stage in turn, at a seeded random moment after it began, and in a soak at any others too."""
    wanted, rng, sent, runs = outcome(whole), random.Random(0), 0, 0
    while sent < kills:
        run = tmp_path / f"run{runs}"
        flags = [*data_flags, "--run", str(run), *FLAGS]
        if runs == 0:
            moments = [(rng.uniform(0, 0.1) * SECONDS, run / name) for name in STAGE_BEGINS]
        else:
            moments = [(rng.uniform(0, 0.2) * SECONDS, run / STAGE_BEGINS[runs % len(STAGE_BEGINS)])]
            moments += [(rng.uniform(0, 0.8) * SECONDS, None) for _ in range(4)]
        for limit, after in [*moments, (None, None)]:
            if runner.run(flags, limit, after):
                break
            sent += 1
            if (run / "corpus.json").exists():
                flags = ["--resume", str(run)]
        assert outcome(run) == wanted
        assert runs or sent >= 3  # on a fast machine a stage may end before its kill
        shutil.rmtree(run)
        runs += 1


def stop_after(steps: int, monkeypatch) -> None:
    """Makes the process stop, as if killed, right after latest.pt was saved for the given time."""
    saved, save = [], store.Resume.save

    def counting(resume, *args):
        save(resume, *args)
        saved.append(args[0])
        if len(saved) == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(store.Resume, "save", counting)


def until_whole(command: list[str], run: Path) -> None:
    """Starts a run, and resumes it whenever it is stopped."""
    while True:
        try:
            train.main(command)
            return
        except KeyboardInterrupt:
            if (run / "corpus.json").exists():
                command = ["--resume", str(run)]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_stopped_after_the_files_that_it_names_a_run_ends_with_the_same_bits(
    whole, data_flags, tmp_path, monkeypatch, every
):
    """Between any two files that belong together: once after each file, in a soak in each state of stages.json."""
    run, rename, stopped = tmp_path / "run", os.replace, set()

    def rename_and_stop(source, target):
        rename(source, target)
        done = store.read_json(run / "stages.json") if every and (run / "stages.json").exists() else {}
        moment = (Path(target).name, *done)
        if not moment[0].startswith("latest") and moment not in stopped:
            stopped.add(moment)
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", rename_and_stop)
    until_whole([*data_flags, "--run", str(run), *FLAGS], run)
    assert outcome(run) == outcome(whole)
    names = {moment[0] for moment in stopped}
    assert {
        "dense.pt",
        "rq.pt",
        "D0.pt",
        "D2.pt",
        "evaluation_D1.json",
        "ood.json",
        "stages.json",
        "results.json",
    } <= names


@pytest.fixture(scope="module")
def plain(data_flags, tmp_path_factory) -> Path:
    """A run of a plain T5 that ended after D_0."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train.execute(parse([*data_flags, "--run", str(folder), *FLAGS, "--method", "base"]), last=0)
    return folder


@pytest.mark.parametrize(
    "method, saves",
    [
        ("mixlora-dsi", (25, 7)),  # in D_1 and D_2, after D_0's 20
        ("dream", (2, 6)),
        ("promptdsi", (2, 3)),
        ("clever", (2, 6)),
        ("corpusbrain++", (7,)),
        pytest.param("joint", (4, 30), marks=pytest.mark.soak),  # each stage of it is D_0's again
    ],
)
def test_a_method_stopped_in_its_stages_ends_with_the_same_bits(
    whole, plain, data_flags, tmp_path, monkeypatch, method, saves
):
    """Stopped after so many saves of latest.pt from D_1 on, of mixlora-dsi from D_0 on, and again after so many more."""
    more = {"promptdsi": ["--prompts", "3"], "mixlora-dsi": ["--ood_mode", "pooled"]}.get(method, [])
    source, after = (whole, "rq") if method == "mixlora-dsi" else (plain, "D0")
    for name, counts in (("whole", ()), ("stopped", saves)):
        asked = parse([*data_flags, "--run", str(tmp_path / name), *FLAGS, "--method", method, *more])
        inherit(source, tmp_path / name, after, asked.config)
        asked.resume = True
        for count in counts:
            with monkeypatch.context() as patch:
                stop_after(count, patch)
                with pytest.raises(KeyboardInterrupt):
                    train.execute(asked)
        train.execute(asked)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    if method == "mixlora-dsi":
        assert all(len(stat.arrivals) == 3 for stat in store.load_model(tmp_path / "stopped" / "D2.pt")[1])


@pytest.mark.soak  # it trains nothing after D_0
def test_incdsi_stopped_on_d0_ends_with_the_same_bits(data_flags, tmp_path, monkeypatch):
    flags = [*data_flags, *FLAGS, "--method", "incdsi", "--d0_fragments", "0"]
    train.main([*flags, "--run", str(tmp_path / "whole")])
    stop_after(20, monkeypatch)
    until_whole([*flags, "--run", str(tmp_path / "run")], tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_of_several_missing_checkpoints_each_is_made_from_the_one_before_it(whole, tmp_path):
    run = link_tree(whole, tmp_path / "run")
    for name in ("D0.pt", "D2.pt", "results.json"):
        (run / name).unlink()
    train.main(["--resume", str(run)])
    found, wanted = outcome(run), outcome(whole)
    assert [found[f"D{t}.pt"] for t in range(3)] == [wanted[f"D{t}.pt"] for t in range(3)]
    assert found["results"] == wanted["results"]


@pytest.fixture(scope="session")
def stopped(once, data_flags) -> Path:
    """A run that was stopped on D_0, after 25 saves. Not to be changed."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(25, patch)
            train.main([*data_flags, "--run", str(folder), *FLAGS])

    return once("stopped", make)


@pytest.mark.parametrize("damage", ["cut", "flipped", "of another run", "of another format"])
def test_a_latest_that_cannot_be_trusted_is_named_and_the_one_before_it_is_used(
    whole, stopped, tmp_path, capsys, damage
):
    run = link_tree(stopped, tmp_path / "run")
    latest = run / "latest.pt"
    content, value = latest.read_bytes(), store.read_tensors(latest)
    latest.unlink()  # a link to the file of the other tests
    if damage == "cut":
        latest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        at = len(content) // 2
        latest.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
    else:
        value |= {"made_for": "x"} if damage == "of another run" else {"format": 99}
        store.write_tensors(latest, value)
    before = store.read_tensors(run / "latest.previous.pt")
    assert (before["stage"], before["step"]) == ("D0", 13)
    train.execute(parse(["--resume", str(run)]), last=0)
    printed = capsys.readouterr().out
    assert str(latest) in printed and "going on without it" in printed
    assert "D0: going on after step 13" in printed
    assert tensors_of(run / "D0.pt") == tensors_of(whole / "D0.pt")


def test_a_checkpoint_of_another_run_is_refused_by_name(whole, tmp_path):
    run = link_tree(whole, tmp_path / "run")
    docids = store.load_docids(run)
    docids[0] = (docids[0] + 1) % 16
    arrays.write_array(run / "docids.npy", docids.numpy().astype("int16"))
    wanted = r"D2\.pt: made for other documents, another tokenizer or other docids"
    with pytest.raises(ValueError, match=wanted):
        store.LoadedRun(run).at(2)


def test_a_lost_evaluation_is_made_again_from_its_checkpoint(whole, tmp_path):
    run = link_tree(whole, tmp_path / "run")
    for name in ("evaluation_D0.json", "results.json"):
        (run / name).unlink()
    train.main(["--resume", str(run)])
    found, wanted = (store.read_json(folder / "evaluation_D0.json")["values"] for folder in (run, whole))
    assert found == wanted and outcome(run)["results"]["metrics"] == outcome(whole)["results"]["metrics"]


def test_two_processes_do_not_train_in_one_folder(data_flags, tmp_path):
    (tmp_path / "run").mkdir()
    lock = store.lock(tmp_path / "run")
    with pytest.raises(ValueError, match="another process trains here"):
        train.main([*data_flags, "--run", str(tmp_path / "run"), *FLAGS])
    lock.close()
    store.lock(tmp_path / "run").close()


def test_the_same_seed_gives_the_same_bits_however_often_the_run_is_saved(whole, data_flags, tmp_path):
    train.main([*data_flags, "--run", str(tmp_path / "again"), *FLAGS, "--save_seconds", "600"])
    found, wanted = outcome(tmp_path / "again"), outcome(whole)
    assert found["results"]["config"].pop("save_seconds") > wanted["results"]["config"].pop("save_seconds")
    assert found == wanted


def test_a_full_disk_ends_a_run_with_a_message_and_more_room_lets_it_go_on(whole, data_flags, tmp_path):
    """Where a file is to be written stands /dev/full, which takes no byte, as a full disk does."""
    run = tmp_path / "run"
    names = "doc_ids.txt corpus.json tokenizer.model latest.new.pt dense.pt docids.npy D0.pt ood.json D2.pt results.json"
    run.mkdir()
    for name in names.split():
        (run / f"{name}.part").symlink_to("/dev/full")
    for name in names.split():
        command = ["--resume", str(run)]
        if not (run / "corpus.json").exists():
            command = [*data_flags, "--run", str(run), *FLAGS]
        with pytest.raises(OSError, match="No space left"):
            train.main(command)
        assert not (run / name).exists()
        (run / f"{name}.part").unlink()
        for path in run.glob("*.pt"):  # what has its name is whole
            store.read_tensors(path)
    train.main(["--resume", str(run)])
    assert outcome(run) == outcome(whole)


def test_a_run_folder_that_cannot_be_written_is_named(data_flags, tmp_path):
    (tmp_path / "full").symlink_to("/proc/self")
    with pytest.raises(OSError, match="full/run"):
        train.main([*data_flags, "--run", str(tmp_path / "full" / "run"), *FLAGS])


@pytest.mark.parametrize("name", ["corpus.json", "tokenizer.model", "dense.pt", "rq.pt", "D1.pt"])
def test_a_removed_file_that_can_be_made_anew_is_with_the_same_bits(whole, tmp_path, name):
    run = link_tree(whole, tmp_path / "run")
    for gone in (name, "results.json"):
        (run / gone).unlink()
    train.main(["--resume", str(run)])
    if name.endswith(".pt"):
        stamp = {".made_for": "", ".docids": ""}  # dense.pt was made before there were docids
        assert tensors_of(run / name) | stamp == tensors_of(whole / name) | stamp
    else:
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert outcome(run)["results"] == outcome(whole)["results"]
    assert list(store.Stages(run).records) == list(store.Stages(whole).records)


@pytest.mark.parametrize(
    "name",
    [
        "excluded.npy",
        "documents/D0/ids.bin",
        "queries/D1.json",
        "embeddings/D1.npy",
        "docids.npy",
    ],
)
def test_a_removed_file_that_later_stages_rest_on_is_named(whole, tmp_path, name):
    run = link_tree(whole, tmp_path / "run")
    for gone in (name, "results.json"):
        (run / gone).unlink()
    with pytest.raises(ValueError, match=str(run / name)):
        train.main(["--resume", str(run)])
