"""What D_t takes does not grow with the number of corpora before it, but for what docs/speed.md says of it."""

import shutil
import time
from pathlib import Path

import pytest
from conftest import link_tree
from test_train import loaded
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from toy import TOY, toy_folder

import ood
import train
from config import parse

# Every query is cut to 4 tokens and every dream holds 2 words, so that the products of two corpora are equal
# fmt: off
EQUAL = [*TOY, "--query_length", "4", "--dream_words", "2", "--dream_noise", "0", "--attention_rank", "4",
         "--no-baselines"]
# fmt: on
READ = ("documents/D{}", "queries/D{}.json", "embeddings/D{}.npy", "cache")


def stream(folder: Path, documents: int, splits: str, *flags: str) -> Path:
    """A run on a toy that is split so."""
    data = toy_folder(folder / "toy", documents)
    asked = parse(["--data", str(data), "--splits", splits, *EQUAL, *flags, "--run", str(folder / "run")])
    train.execute(asked, quiet=True)
    return folder / "run"


def products(folder: Path, t: int) -> int:
    """FLOPs of D_t from the checkpoint before it: scan, growth, training and what is measured afterwards."""
    run, made = loaded(folder)
    previous = train.State(*run.after(t - 1))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train.learn(run, t, made, previous)
    return counter.get_total_flops()


def peak(folder: Path, t: int) -> int:
    """The most bytes that tensors hold at a time while D_t is learnt, beyond what is there before."""
    run, made = loaded(folder)
    previous = train.State(*run.after(t - 1))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train.learn(run, t, made, previous)
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda change: change.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


def test_d6_makes_the_products_of_d2_in_its_memory_without_the_files_of_earlier_corpora(tmp_path):
    """Layers do not grow. Memory: the sketches of four corpora more, twice at a time, and as many rows of documents."""
    run = stream(tmp_path, 100, "44,8,8,8,8,8,8,8", "--expand", "never")
    taken = {}
    for t in (2, 6):
        bare = link_tree(run, tmp_path / f"before D{t}")
        for name in {name.format(i) for name in READ for i in range(t)}:
            path = bare / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        taken[t] = products(bare, t), peak(bare, t)
    assert taken[6][0] == taken[2][0] > 0
    sketches = 2 * ood.SKETCH * 4  # of two layers, in bytes
    rows = 8 * 8 * (1 + 3)  # eight documents' row and docid, int64
    assert taken[6][1] - taken[2][1] <= 4 * 2 * (sketches + rows) < 0.03 * taken[2][1]


@pytest.mark.soak
@pytest.mark.parametrize("expand", ["never", "always"])
def test_products_time_and_memory_of_d1_to_d8_of_a_larger_stream(tmp_path, capsys, expand):
    """Prints them. With an expert more at every corpus, each corpus makes as many products more as the one before."""
    larger = (
        "--M 4 --width 128 --feed_forward 512 --steps 50 --batch 64 --dream_batch 128 --dreams 2000".split()
    )
    run = stream(tmp_path, 450, "50,50,50,50,50,50,50,50,50", *larger, "--expand", expand)
    flops = {}
    with capsys.disabled():
        print(f"\n--expand {expand:8}{'seconds':>10}{'MiB of tensors':>16}{'GFLOP':>10}")
        for t in range(1, 9):
            opened, made = loaded(run)
            previous, begin = train.State(*opened.after(t - 1)), time.monotonic()
            train.learn(opened, t, made, previous)
            seconds, flops[t] = time.monotonic() - begin, products(run, t)
            print(f"D{t:<16}{seconds:10.2f}{peak(run, t) / 2**20:16.2f}{flops[t] / 1e9:10.3f}")
    growth = [flops[t] - flops[t - 1] for t in range(3, 9)]  # D_1 scans a model without LoRA on attention
    few = 1e-4 * flops[2]  # some pseudo-queries have fewer than 4 tokens
    assert max(growth) - min(growth) < few and (max(growth) < few) == (expand == "never")
