"""A finished run takes in documents as D_{T+1}, gives documents up, or is trained anew on all that it holds.

Paper    section 2: a corpus D_t is all that its stage sees; a finished run of the paper's experiments takes none
In       a run folder; a folder in BEIR layout, whose queries and labels are optional; ids of documents to delete
Out      documents, embeddings and docids of D_{T+1} in the run folder, on which train.py then trains as on any D_t;
         `deleted.npy`, and files without the text of what is deleted
Next     train.py (--extend, --consolidate) and index.py call it
Differs  ours throughout. A document is a row of the stream: an id that is replaced or deleted and added again is a
         new row. Nothing counts before corpus.json (taking in) or deleted.npy (deleting) is renamed into place. Few
         documents (fewer than ood.FEW) take docids that the model answers with already, and not those of the quantiser,
         so that little is left to learn
"""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import arrays
import command
import data
import distributed
import ood
import prepare
import queries
import rq
import store
from config import Command, Config
from data import Corpus
from queries import has_word, query_digest
from t5 import T5, segment_logits

TRAINED_ON = 1551  # documents of D_0 for which the small presets' steps are made
FEWEST_STEPS = 0.15  # of these steps, for an index of a few documents
STEPS = ("dense_warmup_steps", "dense_steps", "d0_steps")
METHODS = ("mixlora-dsi", "paper", "dream")
ASKED = 63  # pseudo-queries by which a docid is chosen, beside the title, which weighs as much as all of them
BEAM = 16  # partial docids kept then


def growth_of_steps(share: float) -> float:
    """How many times as many steps so many times as many documents take (ours): each of few is seen more often."""
    return share**0.5 if share < 1 else share**0.75


def steps_scale(documents: int) -> float:
    """Steps of an index whose D_0 has so many documents, in those of the small presets (ours)."""
    return max(FEWEST_STEPS, growth_of_steps(documents / TRAINED_ON))


# -------------------------------------------------------------------------------------------------- taking in


def require_finished(folder: Path, source: Path | None = None) -> bool:
    """Raises ValueError where the run cannot take documents in. True where those of `source` came last and are all there,
    whether the run has learnt them or was stopped before.
    """
    config, corpora = store.read_json(folder / "config.json"), store.load_corpora(folder)
    done = store.Stages(folder)
    to_do = command.quoted("python", "train.py", "--resume", folder)
    newest = corpora[-1]
    added = newest.added or {}
    same = source is not None and data.describe_files(source) == added.get("files")
    if config["method"] not in METHODS:
        raise ValueError(
            f"{folder}: a run of {config['method']} takes no documents in and gives none up, only of {', '.join(METHODS)}"
        )
    if config["docid_kind"] == "atomic":
        raise ValueError(
            f"{folder}: a run of atomic docids takes no documents in and gives none up, only one of rq or pq"
        )
    results = folder / "results.json"
    reported = store.read_json(results)["experts"] if results.exists() else ()
    missing = [corpus.name for corpus in corpora if corpus.name not in done]
    if missing or newest.name not in reported:
        if not added or missing not in ([], [newest.name]):
            names = ", ".join(missing) or "its table"
            raise ValueError(f"{folder}: the run is not finished ({names}); go on with {to_do}")
        gone = source is not None and str(source) == added["source"] and not source.exists()
        if not (same or gone):
            raise ValueError(
                f"{folder}: it is taking other documents in, which was stopped; go on with {to_do} first"
            )
        return True
    if source is not None and not (folder / f"{newest.name}.pt").exists():
        if corpora[1:] and not (folder / f"{corpora[-2].name}.pt").exists():
            to_do = command.quoted("python", "train.py", "--consolidate", folder, "--run", "NEW")
        raise ValueError(f"{folder}: {newest.name}.pt, its newest model, is gone; make one anew with {to_do}")
    return same and not np.isin(newest.rows, store.load_deleted(folder)).any()


def take_in(run: prepare.Run, made: prepare.Prepared, asked: Command) -> None:
    """The documents of the BEIR folder `asked.data` become the run's next corpus, with embeddings and docids; nothing has
    trained on it yet.

    Raises ValueError where the folder holds what cannot be indexed or, without `asked.replace`, ids that the run holds.
    What is replaced goes once the new versions are learnt.
    """
    source = asked.data
    if distributed.is_main_process() and not require_finished(run.folder, source):
        erase(run.folder)  # what a stop within `delete` left
        files = data.describe_files(source)  # before it is read: what changes meanwhile is not in the run
        collection = data.read_beir(source, asked.skip_invalid, tested=False)
        prepare.merge_or_count(run.config, collection, run.log)
        documents, first_row, t = collection.documents, run.corpora[-1].rows.stop, len(run.corpora)
        ids = run.ids
        held = {ids[row]: row for row in run.live.tolist()}
        replaced = [held[doc_id] for doc_id in documents.ids if doc_id in held]
        if replaced and not asked.replace:
            names = ", ".join(ids[row] for row in replaced[:10]) + ", .." * (len(replaced) > 10)
            raise ValueError(
                f"{run.folder}: holds {names} already; pass --replace (in Python replace=True) to put the new versions in their place"
            )
        listed = documents.ids, documents.titles, documents.texts
        corpus = Corpus(first_row, *listed, test=collection.test, qrels=collection.qrels)
        store.save_corpus(run.folder, t, corpus)
        excluded = run.excluded | data.excluded_queries([corpus])
        arrays.write_array(run.folder / "excluded.npy", np.array(sorted(excluded), np.uint64))
        stored = store.StoredCorpus(run.folder, f"D{t}", corpus.rows)
        forget_tokens(run.folder, t)  # of an attempt that was stopped
        vectors = prepare.embed_documents(run, made.bi_encoder, stored)
        if len(vectors) < ood.FEW:
            staying = np.setdiff1d(run.live, replaced)
            taken = {tuple(docid) for docid in made.codes[staying].tolist()}
            codes = chosen_docids(run, corpus, excluded, taken)
        else:
            codes = rq.encode(vectors, made.books, device=run.device)
        every = torch.cat([made.codes[:first_row], codes])
        arrays.write_array(run.folder / "docids.npy", every.numpy().astype(np.int16))
        store.write_ids(run.folder, [*run.corpora, corpus])
        about = store.read_json(run.folder / "corpus.json")
        added = {"source": str(source), "files": files, "replaced": sorted(replaced), "keep": asked.keep}
        about["corpora"].append(store.described(corpus) | {"added": added})
        arrays.write_json(run.folder / "corpus.json", about)
        n = len(collection.train)
        left_out = f"; {n} annotated queries left out, which only D_0 has" if n else ""
        gone = f", {len(replaced)} of them in place of earlier versions" if replaced else ""
        run.log.line(f"D{t}: {len(documents)} documents{gone}, {len(corpus.test)} test queries{left_out}")
    distributed.wait()
    run.load_corpora()
    made.codes = store.load_docids(run.folder)


def chosen_docids(run: prepare.Run, corpus: Corpus, excluded: frozenset, taken: set[tuple]) -> Tensor:
    """Docids (n, M) of few new documents, by which the newest model finds most of them before it has learnt anything: each
    is its answer to the document's title and pseudo-queries. None of those `taken`, which it adds to.
    """
    model = run.after(len(run.corpora) - 1)[0].to(run.device)
    sampler = queries.PseudoQuerySampler(corpus.titles, corpus.texts, run.idf, excluded, corpus.first_row)
    docids = []
    for row, title in zip(corpus.rows, corpus.titles):
        rng = random.Random(f"{run.config.seed} docid {row}")
        asked = [(row, sampler.draw(row, rng)) for _ in range(ASKED)]
        weights = torch.full((ASKED,), 1 / ASKED)
        if has_word(title) and query_digest(title) not in excluded:
            asked, weights = [(row, title), *asked], torch.cat([torch.ones(1), weights]) / 2
        docids.append(likeliest(model, run.tokens(asked).to(run.device), weights.to(run.device), taken))
        taken.add(docids[-1])
    return torch.tensor(docids)


@torch.inference_mode()
def likeliest(model: T5, ids: Tensor, weights: Tensor, taken: set[tuple[int, ...]]) -> tuple[int, ...]:
    """The docid with the largest weighted mean log-probability for all of these queries (Q, S), weights (Q,), that is not
    taken: by a beam search over docids. Where all that it ends with are taken, the best of them.
    """
    source, padding = model.encode(ids)
    cross, n, centroids = model.cross_keys_values(source), len(ids), model.config.centroids
    codes, scores = ids.new_zeros(1, 0), weights.new_zeros(1)
    for m in range(model.config.codebooks):
        ahead = F.pad(codes, (0, 1)).repeat(n, 1)  # its last code is not looked at
        hidden, _ = model.docid_hidden(cross, padding, ahead)
        log_p = F.log_softmax(segment_logits(hidden[:, -1:], model.rq[m : m + 1])[:, 0].float(), dim=-1)
        total = scores[:, None] + torch.einsum("q,qrk->rk", weights, log_p.view(n, -1, centroids))
        ends = m + 1 == model.config.codebooks  # then all stay, since some are taken
        scores, best = total.flatten().topk(total.numel() if ends else min(BEAM, total.numel()))
        codes = torch.cat([codes[best // centroids], best[:, None] % centroids], dim=1)
    docids = [tuple(docid) for docid in codes.tolist()]
    return next((docid for docid in docids if docid not in taken), docids[0])


def drop_checkpoints(run: prepare.Run, done: store.Stages) -> None:
    """Removes the run's checkpoints but D_0's and the newest, as many as the corpus that came last says; of 0, none."""
    keep = run.corpora[-1].added["keep"]
    for corpus in run.corpora[1:-keep] if keep else ():
        path = run.folder / f"{corpus.name}.pt"
        if path.exists():
            done.records[corpus.name]["dropped"] = True
            done.write()
            path.unlink()


# --------------------------------------------------------------------------------------------------- giving up


def rows_of(folder: Path, ids: list[str]) -> list[int]:
    """The rows of these documents. Raises ValueError with those that the run does not hold, or that are named twice."""
    corpora = store.load_corpora(folder)
    every = arrays.Chain([corpus.ids for corpus in corpora])
    row_of = {every[row]: row for row in store.live_rows(folder, corpora).tolist()}
    if unknown := [doc_id for doc_id in ids if doc_id not in row_of]:
        raise ValueError(
            f"{folder}: holds no document {', '.join(map(str, unknown[:10]))}; doc_ids.txt lists its own"
        )
    if len(set(ids)) < len(ids):
        raise ValueError("an id stands twice among those to delete; name each once")
    return [row_of[doc_id] for doc_id in ids]


def delete(folder: Path, rows: list[int]) -> str:
    """Deletes the documents in these rows: from now on no search finds them and nothing is dreamt of them. Then erases
    their titles, texts, embeddings and queries from the folder's files. Returns a line that says what left.

    The weights stay as they are, and their docids stay in docids.npy, so that other rows keep their numbers.
    """
    gone = np.union1d(store.load_deleted(folder), np.array(rows, np.int64))
    if len(gone) == store.load_corpora(folder)[-1].rows.stop:
        raise ValueError(f"{folder}: these are all of its documents; remove the folder instead")
    arrays.write_array(folder / "deleted.npy", gone)
    return erase(folder)


def erase(folder: Path) -> str:
    """Blanks what the folder's files still hold of deleted documents, as after a stop within `delete`. Says what left."""
    deleted, gone, count, left = set(store.load_deleted(folder).tolist()), set(), 0, np.zeros(2, int)
    for t, corpus in enumerate(store.load_corpora(folder)):
        # An id may be taken in again after its first version went
        for row, doc_id in zip(corpus.rows, corpus.ids):
            (gone.add if row in deleted else gone.discard)(doc_id)
        left += forget_queries(folder, corpus, deleted, gone)
        rows = [row - corpus.first_row for row in corpus.rows if row in deleted]
        rows = [row for row in rows if corpus.titles[row].strip() or corpus.texts[row].strip()]
        if not rows:
            continue
        count += len(rows)
        forget_tokens(folder, t)
        listed = folder / "pseudo_queries" / f"D{t}"
        if listed.exists():
            starts = arrays.read_array(listed / "starts.npy", np.int64, 1)
            spans = [np.arange(starts[row], starts[row + 1]) for row in rows]
            blank(listed / "queries.bin", np.concatenate(spans))
        embeddings = np.array(arrays.read_array(folder / "embeddings" / f"D{t}.npy", np.float32, 2))
        embeddings[rows] = 0
        arrays.write_array(folder / "embeddings" / f"D{t}.npy", embeddings)
        for name in ("titles", "texts"):  # last: they tell that the rest is done
            blank(folder / "documents" / f"D{t}" / f"{name}.bin", rows)
    return f"deleted {count} documents; {left[0]} labels and {left[1]} test queries left evaluation with them"


def forget_queries(
    folder: Path, corpus: store.StoredCorpus, deleted: set[int], gone: set[str]
) -> tuple[int, int]:
    """Drops annotated queries and labels of deleted documents, and test queries that have no label then. Counts the last
    two.
    """
    train = [(pair, q) for pair, q in zip(corpus.train, corpus.train_ids) if pair[0] not in deleted]
    qrels = {q: {d: label for d, label in docs.items() if d not in gone} for q, docs in corpus.qrels.items()}
    labels = sum(map(len, corpus.qrels.values())) - sum(map(len, qrels.values()))
    qrels = {q: docs for q, docs in qrels.items() if docs}
    dropped = len(corpus.qrels) - len(qrels)
    if labels or len(train) < len(corpus.train):
        held = {"train": [pair for pair, _ in train], "train_ids": [query_id for _, query_id in train]}
        held |= {"test": {q: corpus.test[q] for q in qrels}, "qrels": qrels}
        arrays.write_json(folder / "queries" / f"{corpus.name}.json", held)
    return labels, dropped


def blank(path: Path, rows: list[int] | np.ndarray) -> None:
    """Puts spaces in place of these strings of an arrays.Strings file, whose spans stay."""
    content, spans = bytearray(path.read_bytes()), arrays.read_array(path.with_suffix(".npy"), np.int64, 2)
    for start, end in spans[rows].tolist():
        content[start:end] = b" " * (end - start)
    arrays.write(path, bytes(content))


def forget_tokens(folder: Path, t: int) -> None:
    """Removes the cached token ids of D_t's documents; what needs them makes them anew."""
    for path in (folder / "cache").glob(f"documents_*_D{t}.*"):
        path.unlink()


# ---------------------------------------------------------------------------------------------- training anew


def export(folder: Path, target: Path) -> int:
    """Writes a run's documents that are not deleted, with their annotated and test queries, as a folder in BEIR layout, and
    its general text below `general`; pseudo-queries of a file stay behind. Returns the number of documents.
    """
    corpora, excluded = store.load_corpora(folder), store.load_excluded(folder)
    live, ids = set(store.live_rows(folder, corpora).tolist()), set()
    texts, labels = {}, {"train": [], "test": []}

    with arrays.writing(target / "corpus.jsonl") as file:
        for corpus in corpora:
            for row, document in zip(corpus.rows, zip(corpus.ids, corpus.titles, corpus.texts)):
                if row in live:
                    file.write(beir_line(document))
                    ids.add(document[0])
            train = (
                (query_id, text, corpus.ids[row - corpus.first_row], 1)
                for query_id, (row, text) in zip(corpus.train_ids, corpus.train)
                if row in live and query_digest(text) not in excluded  # a test query may have come later
            )
            test = (
                (query_id, corpus.test[query_id], doc_id, label)
                for query_id, docs in corpus.qrels.items()
                for doc_id, label in docs.items()
                if doc_id in ids
            )
            for split, labelled in (("train", train), ("test", test)):
                for query_id, text, doc_id, label in labelled:
                    while texts.setdefault(query_id, text) != text:  # a later folder may use an id again
                        query_id = f"{corpus.name}.{query_id}"
                    labels[split].append(f"{query_id}\t{doc_id}\t{label}\n")
    lines = (json.dumps({"_id": query_id, "text": text}) + "\n" for query_id, text in texts.items())
    arrays.write(target / "queries.jsonl", "".join(lines).encode())
    for name, rows in labels.items():
        if rows:
            arrays.write(target / "qrels" / f"{name}.tsv", "".join(rows).encode())
    if general := store.load_general(folder):
        with arrays.writing(target / "general" / "corpus.jsonl") as file:
            for document in zip(general.ids, general.titles, general.texts):
                file.write(beir_line(document))
    return len(ids)


def beir_line(document: tuple[str, str, str]) -> bytes:
    """A document (id, title, text) as a line of corpus.jsonl."""
    return (json.dumps(dict(zip(("_id", "title", "text"), document))) + "\n").encode()


def anew(config: Config, source: Path, documents: int, before: int) -> Config:
    """The settings of a run that trains D_0 on all of these documents, where it had as many `before`.

    Its pseudo-queries are drawn, its docids fitted, and its tokenizer trained or that of the T5 that it starts from.
    """
    scale = max(1.0, steps_scale(documents) / steps_scale(before))
    steps = {name: math.ceil(scale * getattr(config, name)) for name in STEPS}
    general = str(source / "general") if config.general else ""
    return replace(
        config, data=str(source), data_dir="", splits="100", split_by="random", general=general,
        pseudo_queries="drawn", docids="", teacher="", tokenizer=config.tokenizer if config.t5 else "", **steps,
    )  # fmt: skip
