"""What adding and deleting documents of a finished run takes, and what it does to the others.

    python benchmarks/living.py RUN [--adds 1,10,100,258] [--in_a_row 100] [--folder FOLDER] [--json FILE]

From a copy of the run without its last corpus, whose documents are then added: so they are unseen, and have human
queries. Each size is added to a copy of its own, and then one document after another to a last copy. Recall is of those
human queries: old, of the documents that were there; new, of those that were added. "title": the share of added
documents that their own title finds among ten, right after the add.
"""

import argparse
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as scoring
import ood
import prepare
import queries
import scan
import serve
import store
from benchmarks.measure import new_folder, seconds_of
from benchmarks.sizes import share_found
from config import saved_config as config_of
from index import Index
from mixlora import mixed_layers

CHECKPOINTS = (1, 10, 20, 50, 100)  # of the adds in a row


def without_last(run: Path, target: Path) -> store.StoredCorpus:
    """A copy of a finished run as if its last corpus had not come, which is returned from the run."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("latest*", "cache"))
    about, corpora = store.read_json(run / "corpus.json"), store.load_corpora(run)
    last = corpora[-1]
    about["corpora"] = about["corpora"][:-1]
    store.write_json(target / "corpus.json", about)
    store.arrays.write_array(target / "docids.npy", np.load(run / "docids.npy")[: last.first_row])
    (target / f"{last.name}.pt").unlink()
    for path in (*target.glob("D*.pt"), target / "dense.pt"):  # which name the corpora they were made for
        value = store.read_tensors(path)
        store.write_tensors(path, value | store.stamp(target, value["docids"]))
    stages = store.read_json(target / "stages.json")
    store.write_json(target / "stages.json", {k: v for k, v in stages.items() if k != last.name})
    config = store.read_json(target / "config.json")
    store.write_json(target / "config.json", config | {"run": str(target), "baselines": False})
    return last


def recall(index: Index, corpora: list) -> float:
    """Mean Recall@10 of these corpora's test queries."""
    ids = [[hit.id for hit in hits] for c in corpora for hits in index.search(list(c.test.values()))]
    relevant = [labels for corpus in corpora for labels in corpus.qrels.values()]
    return float(np.mean([scoring.score_ranking(*pair)["recall@10"] for pair in zip(ids, relevant)]))


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def add_and_measure(index: Index, documents: list, old: list, corpus) -> dict:
    """Adds documents of `corpus` in one go; `old`: the corpora that were there."""
    before, seconds = recall(index, old), seconds_of(lambda: index.add(documents))
    figures = {"documents": len(documents), "seconds": seconds, "old_before": before}
    return figures | {"old": recall(index, old), **found(index, documents, corpus)}


def found(index: Index, documents: list, corpus) -> dict[str, float]:
    """Shares of these documents that their human query ("new") and their title find."""
    asked = {doc: corpus.test[query] for query, labels in corpus.qrels.items() for doc in labels}
    ids, titles, _ = zip(*documents)
    new = share_found(index, [asked[doc_id] for doc_id in ids], ids)
    return {"new": new, "title": share_found(index, titles, ids)}


def in_a_row(index: Index, documents: list, old: list, corpus) -> list[dict]:
    """Adds one document after another; figures after some of them."""
    rows, seconds, titles = [], [], []
    for n, document in enumerate(documents, 1):
        seconds.append(seconds_of(partial(index.add, [document])))
        titles.append(share_found(index, [document[1]], [document[0]]))
        if n in CHECKPOINTS:
            shares = found(index, documents[:n], corpus)
            rows.append({
                "adds": n, "seconds_median": float(np.median(seconds)), "seconds_max": max(seconds),
                "old": recall(index, old), "new": shares["new"],
                "title_at_once": float(np.mean(titles)), "title_still": shares["title"],
                "experts": [len(layer) for layer in mixed_layers(index.model)], "MiB": megabytes(index.folder),
                "peak_GiB": scoring.peak_memory() / 2**30,
                "sketches": [len(stat.arrivals) for stat in index.stats], "pool": [len(stat.pool) for stat in index.stats],
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def alarms(start: Index, last: store.StoredCorpus, draws: int = 2000) -> dict:
    """How often would arrivals of so many documents grow a layer, by chance? Percent, drawn from the documents of the last
    corpus, of which as a whole no layer took notice; as many of their queries as the pool takes.
    """
    config = config_of(start.folder)
    run = prepare.Run(config, start.folder, store.Log(start.folder, quiet=True, writes=False))
    sampler = queries.PseudoQuerySampler(last.titles, last.texts, run.idf, run.excluded, last.first_row)
    pairs = queries.draw_pseudo_queries(sampler, last.rows, config.pseudo_per_document, "alarms")
    docids = store.load_docids(last.folder)[[row for row, _ in pairs]]
    scores = scan.scan(
        start.model, scan.SourceCache(start.model, run.tokens(pairs)), docids, hidden=False
    ).scores
    flags = [
        torch.cat([f[None] for f in ood.tails(s, stat, config.epsilon)]).any(0)
        for s, stat in zip(scores, start.stats)
    ]
    flags = torch.stack(flags).view(len(flags), len(last.rows), -1)  # (layers, documents, queries)
    rng, shares = np.random.default_rng(0), {}
    for n in (16, 32, 64, 96, 128, 192):
        if n > flags.shape[1]:
            break
        grown, each = 0, min(ood.SKETCH // n, flags.shape[2])
        for _ in range(draws):
            documents = rng.choice(flags.shape[1], n, replace=False)
            chosen = flags[:, documents][:, :, rng.choice(flags.shape[2], each, replace=False)]
            grown += bool((100 * chosen.float().mean((1, 2)) - 100 * config.epsilon > config.delta).any())
        shares[n] = 100 * grown / draws
    return {"whole": [float(f) for f in 100 * flags.float().mean((1, 2))]} | shares


def page_rate(index: Index, texts: list[str]) -> float:
    """Requests a second that serve.py's page answers, each with a query's whole way, to ten clients at once."""
    with serve.Server(index, 0) as server, ThreadPoolExecutor(10) as clients:
        Thread(target=server.serve_forever, daemon=True).start()
        place, begin = f"http://127.0.0.1:{server.server_port}/api/search?", time.monotonic()
        for answer in clients.map(lambda text: urlopen(place + urlencode({"q": text})).read(), texts):
            assert json.loads(answer)
        seconds = time.monotonic() - begin
        server.shutdown()
    return len(texts) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--adds", default="1,10,100,258")
    parser.add_argument("--in_a_row", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("runs/living"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    new_folder(args.folder)
    corpus = without_last(args.run, args.folder / "before")
    documents = list(zip(corpus.ids, corpus.titles, corpus.texts))
    old = store.load_corpora(args.folder / "before")
    begin = time.monotonic()
    start = Index.open(args.folder / "before")
    print(
        f"{len(start)} documents, opened in {time.monotonic() - begin:.2f} s, {torch.get_num_threads()} threads"
    )
    print(f"Recall@10 of old queries {recall(start, old):.4f}", flush=True)
    results = {"adds": [], "in_a_row": [], "alarms": alarms(start, corpus) if start.stats else {}}
    print(json.dumps(results["alarms"]), flush=True)
    results["requests_per_second"] = page_rate(start, list(corpus.test.values())[:100])
    print(f"{results['requests_per_second']:.1f} requests/s of the page", flush=True)
    for size in map(int, filter(None, args.adds.split(","))):
        copy = args.folder / f"add{size}"
        shutil.copytree(start.folder, copy)
        results["adds"].append(add_and_measure(Index.open(copy), documents[:size], old, corpus))
        print(json.dumps(results["adds"][-1]), flush=True)
    if args.in_a_row:
        copy = args.folder / "row"
        shutil.copytree(start.folder, copy)
        index = Index.open(copy)
        results["in_a_row"] = in_a_row(index, documents[: args.in_a_row], old, corpus)
        results["delete_seconds"] = seconds_of(lambda: index.delete([documents[0][0]]))
        begin = time.monotonic()
        reopened = Index.open(copy)
        results["open_seconds"] = time.monotonic() - begin
        left = len(start) + len(documents[: args.in_a_row]) - 1
        assert documents[0][0] not in reopened and len(reopened) == left
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
