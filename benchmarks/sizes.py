"""How well `Index.train` chooses for collections of several sizes, by its own rules alone.

    python benchmarks/sizes.py [--sizes 10,100,1000,9713] [--folder FOLDER] [--json FILE]

Documents are the first BoolQ pages; no question of theirs is trained on. "human": the share of documents, of at most 2,000,
that a question of theirs finds among ten; "title": that their own title finds; "bi-encoder": the questions, by exact
search of the embeddings that the docids are made of.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import arrays
import data
import dense
import eval as scoring
import store
from benchmarks.measure import new_folder
from index import Index
from reading import Problems

ASKED = 2000


def share_found(index: Index, queries: list[str], ids: list[str]) -> float:
    """The share of these queries whose document is among the ten found."""
    found = index.search(queries)
    return sum(doc_id in [hit.id for hit in hits] for doc_id, hits in zip(ids, found)) / len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="10,100,1000,9713")
    parser.add_argument("--folder", type=Path, default=Path("runs/sizes"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    new_folder(args.folder)
    pages, results = data.boolq_pages(data.CACHE, Problems(False)), []
    for size in map(int, args.sizes.split(",")):
        documents = [(f"p{i}", page.title, page.text) for i, page in enumerate(pages[:size])]
        asked, ids = pages[:size][:ASKED], [doc_id for doc_id, _, _ in documents[:ASKED]]
        folder = args.folder / str(size)
        begin = time.monotonic()
        index = Index.train(documents, folder)
        seconds, config = time.monotonic() - begin, store.read_json(folder / "config.json")
        questions = [page.questions[0] for page in asked]
        tokens = data.tokenize(index.run.tokenizer, questions, config["query_length"])
        embedded = dense.embed(store.load_model(folder / "dense.pt")[0], tokens)
        vectors = arrays.open_array(folder / "embeddings" / "D0.npy")
        rows = [{index.row_of[doc_id]} for doc_id in ids]
        found = {
            "human": 100 * share_found(index, questions, ids),
            "title": 100 * share_found(index, [page.title for page in asked], ids),
            "bi-encoder": 100 * dense.recall(embedded, rows, vectors),
        }
        chosen = {"M": config["M"], "K": index.model.config.centroids, "d0_steps": config["d0_steps"]}
        chosen["vocab"] = index.run.tokenizer.vocab_size()
        about = {"documents": len(documents), "threads": torch.get_num_threads(), "seconds": seconds}
        results.append(about | chosen | found | {"peak_GiB": scoring.peak_memory() / 2**30})
        print(json.dumps(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
