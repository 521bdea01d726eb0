"""The paper's benchmarks in the layouts in which they are published.

Paper    section 4.1 and tables 6-7
In       --data-dir: GenRet's NQ320k archive or its files, MS MARCO's passage files, or the authors' own folders
Out      a Collection whose documents lie on disk, and a manifest: what was read beside what the paper counts
Next     data.split cuts it into D_0..D_T; prepare.py stores it in the run folder
Differs  the authors' split is not public: without their folders ours is drawn with a seed at the paper's exact sizes
"""

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import weights
from arrays import Documents
from data import Collection, Corpus
from queries import has_word
from reading import (
    AT_ONCE,
    Problems,
    add_document,
    parse_json,
    read_jsonl,
    read_labelled,
    read_lines,
    settled,
)


@dataclass(frozen=True)
class Benchmark:
    """What the paper counts (tables 6-7), per corpus D_0..D_4, and where the files come from."""

    documents: tuple[int, ...]
    pseudo_queries: tuple[int, ...]
    test_queries: tuple[int, ...]
    annotated: int  # queries of D_0
    files: tuple[str, ...]  # that a data folder must hold
    archives: dict[str, tuple]  # file to fetch -> (folder on a server, what `weights.fetch` checks it with)
    note: str  # why another number of documents may be found


# fmt: off
GENRET = "https://raw.githubusercontent.com/sunnweiwei/GenRet/main/dataset/"
MSMARCO = "https://msmarco.z22.web.core.windows.net/msmarcoranking/"
BENCHMARKS = {
    "nq320k": Benchmark(
        documents=(98_743, 2_743, 2_743, 2_743, 2_743), pseudo_queries=(1_480_538, 41_132, 41_136, 41_138, 41_141),
        test_queries=(6_998, 357, 136, 62, 277), annotated=276_493,
        files=("corpus_lite.json", "train.json", "dev.json", "train.json.qg.json"),
        archives={"nq320k.zip": (GENRET, dict(git_blob="5130467c49376bb37e58756be3c1997bdd1c78fb"))},
        note="copies of 108,015 to 109,739 documents circulate under the name NQ320k; GenRet's archive holds 109,739, "
             "of which the paper's corpora take 109,715",
    ),
    "msmarco": Benchmark(
        documents=(7_957_640, 221_045, 221_045, 221_045, 221_048),
        pseudo_queries=(79_576_202, 2_210_445, 2_210_445, 2_210_447, 2_210_471),
        test_queries=(6_247, 184, 196, 174, 154), annotated=452_746,
        files=("collection.tsv", "queries.train.tsv", "qrels.train.tsv", "queries.dev.small.tsv", "qrels.dev.small.tsv"),
        archives={
            "collectionandqueries.tar.gz": (MSMARCO, dict(md5="31644046b18952c1386cd4564ba2ae69", size=1_057_717_952)),
            "qrels.train.tsv": (MSMARCO, dict(md5="733fb9fe12d93e497f7289409316eccf")),
        },
        note="the published collection holds 8,841,823 passages and its small development set 6,980 queries, of which "
             "the paper's corpora count 6,955",
    ),
}
# fmt: on


def read(
    name: str, folder: Path, log: Callable[[str], None], store: Path | None = None, skip_invalid: bool = False
) -> Collection:
    """A benchmark from its folder, what is missing fetched first; ValueError names file and place of what is wrong."""
    if folder.is_file():
        raise ValueError(f"--data_dir {folder}: wanted a folder, found a file; pass {folder.parent}")
    if authors_parts(folder):
        return read_authors(folder, store, skip_invalid)
    fetch(name, folder, log)
    return (read_nq320k if name == "nq320k" else read_msmarco)(folder, store, skip_invalid)


def fetch(name: str, folder: Path, log: Callable[[str], None]) -> None:
    """Downloads what `folder` lacks of a benchmark, checks it, and takes the files out of archives."""
    benchmark = BENCHMARKS[name]
    for file, (server, checks) in benchmark.archives.items():
        lacking = {name for name in benchmark.files if not (folder / name).is_file()}
        if file in lacking or lacking - set(benchmark.archives):  # else what is lacking is fetched by itself
            archive = weights.fetch(server + file, folder / file, log, **checks)
            if file not in benchmark.files:
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    shutil.unpack_archive(archive, scratch)
                    os.sync()
                    for member in Path(scratch).rglob("*"):
                        if member.is_file() and member.name in lacking:
                            member.replace(folder / member.name)


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    if len(value := dict(pairs)) < len(pairs):
        raise ValueError(f"key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} is listed twice")
    return value


def read_json(path: Path, kind: type, wanted: str):
    """A JSON file's value of a kind (list, dict), which `wanted` describes; ValueError names the file otherwise."""
    text = "\n".join(line for _, line in read_lines(path))
    try:
        value = parse_json(text, object_pairs_hook=unique_keys)
    except ValueError as error:
        raise ValueError(f"{path}: malformed or cut JSON ({error}); wanted {wanted}; repair it") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: found {str(value)[:80]}, wanted {wanted}")
    return value


def read_texts(path: Path, problems: Problems = AT_ONCE) -> Iterator[tuple[str, str, str]]:
    """(place, id, text) of a JSON list of documents' texts, as GenRet's; the id is the number in the list."""
    for number, text in enumerate(read_json(path, list, "a JSON list of documents' texts")):
        if isinstance(text, str):
            yield f"{path}: item {number}", str(number), text.strip()
        else:
            problems.add(f"{path}: item {number}", "wanted a document's text", f"found {text!r:.80}")


# ---------------------------------------------------------------------------------------------- NQ320k, GenRet


def innermost(value):
    while isinstance(value, list) and value:
        value = value[0]
    return value


def genret_pairs(path: Path, documents: Documents, problems: Problems) -> Iterator[tuple[str, str, str]]:
    """(place, document id, query) of rows [query, doc_id], either in nested lists; generated queries may be empty."""
    for number, pair in enumerate(read_json(path, list, "a JSON list of [query, doc_id]")):
        place = f"{path}: item {number}"
        query, row = map(innermost, pair) if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if not isinstance(query, str) or type(row) is not int:
            problems.add(place, "wanted [query, doc_id]", f"found {str(pair)[:80]}")
        elif str(row) not in documents.row_of:
            problems.add(place, "label of a missing document", f"doc_id {row}")
        elif not (has_word(query) or path.name.endswith(".qg.json")):
            problems.add(place, "query without a word", repr(query))
        else:
            yield place, str(row), query


def read_nq320k(folder: Path, store: Path | None = None, skip_invalid: bool = False) -> Collection:
    """GenRet's NQ320k: a document's id is its row in corpus_lite.json; dev.json is the test set."""
    documents, problems = Documents(store), Problems(skip_invalid)
    for place, doc_id, text in read_texts(folder / "corpus_lite.json", problems):
        add_document(documents, problems, place, doc_id, "", text)
    annotated = enumerate(genret_pairs(folder / "train.json", documents, problems))
    train = [(doc_id, query, f"train{i}") for i, (_, doc_id, query) in annotated]
    test, qrels = {}, {}
    for i, (_, doc_id, query) in enumerate(genret_pairs(folder / "dev.json", documents, problems)):
        test[f"dev{i}"], qrels[f"dev{i}"] = query, {doc_id: 1}
    pseudo = genret_pairs(folder / "train.json.qg.json", documents, problems)
    collection = Collection(
        documents, train, test, qrels, pseudo=pseudo, notes={"layout": "GenRet"}, problems=problems
    )
    return settled(collection, folder)


# ------------------------------------------------------------------------- MS MARCO and the authors' folders


def read_tsv(path: Path, problems: Problems = AT_ONCE) -> Iterator[tuple[str, str, str]]:
    """(place, id, text) of every line; the text may hold further tabs."""
    for place, line in read_lines(path, problems):
        name, tab, text = line.partition("\t")
        if tab:
            yield place, name, text.strip()
        else:
            problems.add(place, "wanted an id, a tab and a text", f"found {line[:80]!r}")


def read_label_file(path: Path, problems: Problems) -> Iterator[tuple[str, str, str, int]]:
    """(place, qid, docid, label) of lines `qid 0 docid label`, or of a JSON object {qid: {docid: label}}."""
    if path.suffix != ".json":
        rows = ((place, line.split()) for place, line in read_lines(path, problems))
    else:
        listed = read_json(path, dict, "a JSON object {qid: {docid: label}}").items()
        rows = (
            (f"{path}: query {qid!r}", [qid, "0", doc_id, json.dumps(label)])
            for qid, labels in listed
            for doc_id, label in (labels.items() if isinstance(labels, dict) else [("", labels)])
        )
    for place, cells in rows:
        if len(cells) == 4 and re.fullmatch(r"-?\d{1,9}", cells[3]):
            yield place, cells[0], cells[2], int(cells[3])
        else:
            problems.add(place, "wanted qid 0 docid label, or {docid: label}", f"found {cells}")


def read_queries(
    documents: Documents, problems: Problems, folder: Path, qrels: str, queries: str = "raw.tsv"
) -> list:
    """(document id, query, query id, label) of labels above 0."""
    labels = read_label_file(folder / qrels, problems)
    return read_labelled([labels], read_tsv(folder / queries, problems), documents, problems)[0]


def read_msmarco(folder: Path, store: Path | None = None, skip_invalid: bool = False) -> Collection:
    """MS MARCO passages; the small development set is the test set, the training labels annotate D_0."""
    documents, problems = Documents(store), Problems(skip_invalid)
    for place, pid, passage in read_tsv(folder / "collection.tsv", problems):
        add_document(documents, problems, place, pid, "", passage)
    train = read_queries(documents, problems, folder, "qrels.train.tsv", "queries.train.tsv")
    test = read_queries(documents, problems, folder, "qrels.dev.small.tsv", "queries.dev.small.tsv")
    annotated, notes = [row[:3] for row in train], {"layout": "MS MARCO"}
    collection = Collection(documents, annotated, {}, {}, notes=notes, problems=problems)
    collection.add_tests(test)
    return settled(collection, folder)


def authors_parts(folder: Path) -> list[Path]:
    """d0, d1, .., as many as have a collection."""
    return [folder / f"d{t}" for t, _ in enumerate(folder.glob("d[0-9]*/full_collection/raw.tsv"))]


def read_authors(folder: Path, store: Path | None = None, skip_invalid: bool = False) -> Collection:
    """The released code's d0, d1, ..; a later part may repeat the documents of those before it, or hold its own alone."""
    documents, problems = Documents(store), Problems(skip_invalid)
    parts, ends = authors_parts(folder) or [folder / "d0"], [0]
    for part in parts:
        for place, doc_id, text in read_tsv(part / "full_collection" / "raw.tsv", problems):
            if documents.row_of.get(doc_id, ends[-1]) >= ends[-1]:  # of no part before this one
                add_document(documents, problems, place, doc_id, "", text.replace("\t", " "))
        ends.append(len(documents))
    sizes = [end - start for start, end in zip(ends, ends[1:])]
    notes = {"layout": "authors", "sizes": sizes}
    collection = Collection(documents, [], {}, {}, notes=notes, problems=problems)
    if len(parts) > 1:
        collection.order = list(documents.row_of)
    for t, part in enumerate(parts):
        tests = read_queries(documents, problems, part / "eval_queries", "eval_qrel.json")
        collection.add_tests(tests, f"d{t}.")
    annotations = parts[0] / "train_queries"
    if annotations.is_dir():
        labelled = read_queries(documents, problems, annotations, "train_qrel.json")
        collection.train = [row[:3] for row in labelled]
    files = [part / "doc2query" / "query_to_docid.train.json" for part in parts]
    if all(file.is_file() for file in files):
        collection.pseudo = (line for file in files for line in read_numbered_pseudo_queries(file, problems))
    settled(collection, folder)
    if 0 in sizes:
        t = sizes.index(0)
        raise ValueError(f"{parts[t]}: adds no document to the {ends[t]} of the parts before it")
    return collection


def read_numbered_pseudo_queries(path: Path, problems: Problems) -> Iterator[tuple[str, str, str]]:
    """(place, document id, query) of JSON lines {doc_id, query} in which doc_id may be a number or a string."""
    for place, row in read_jsonl(path, ("query",), problems):
        if type(row.get("doc_id")) in (int, str):
            yield place, str(row["doc_id"]), row["query"]
        else:
            problems.add(place, "wanted {doc_id, query}", f"found {str(row)[:80]}")


def read_docids(path: Path, ids, codebooks: int, centroids: int) -> list[list[int]]:
    """Docids made elsewhere, one per id: a JSON object {docid: [M codes]}, a leading -1 being dropped."""
    docids, codes_of = [], read_json(path, dict, "a JSON object {docid: [codes]}")
    for doc_id in ids:
        codes = codes_of.get(doc_id)
        if isinstance(codes, list) and codes[:1] == [-1]:
            codes = codes[1:]
        valid = isinstance(codes, list) and all(type(code) is int and 0 <= code < centroids for code in codes)
        if not valid or len(codes) != codebooks:
            wanted = f"wanted M={codebooks} codes below K={centroids}"
            raise ValueError(f"{path}: document {doc_id!r}: {wanted}, found {str(codes)[:80]}")
        docids.append(codes)
    return docids


# ---------------------------------------------------------------------------------------------------- the split


def paper_split(name: str, collection: Collection) -> tuple[str, int]:
    """--splits paper: sizes of the paper or the authors' folders and what they leave over; of a sample, proportions."""
    n, sizes = len(collection.documents), collection.notes.get("sizes", [])
    if len(sizes) < 2:
        if name not in BENCHMARKS:
            raise ValueError(f"--splits paper: wanted --data {' or '.join(BENCHMARKS)}, found --data {name}")
        sizes = BENCHMARKS[name].documents
        if n < sum(sizes):
            return "90,2.5,2.5,2.5,2.5", 0
    return ",".join(map(str, sizes)), n - sum(sizes)


def manifest(name: str, collection: Collection, corpora: list[Corpus]) -> dict:
    """What was found, beside what the paper counts, and why they may differ."""
    documents, files = [len(corpus.ids) for corpus in corpora], len(collection.documents)
    tests, annotated = [len(corpus.test) for corpus in corpora], len(corpora[0].train)
    found = {"documents": documents, "documents in the files": files, "test queries": tests}
    found |= {"annotated queries of D0": annotated, **collection.notes}
    if not (paper := BENCHMARKS.get(name)):
        return {"found": found}
    counts = {"documents": list(paper.documents), "test queries": list(paper.test_queries)}
    counts |= {"annotated queries of D0": paper.annotated, "pseudo-queries": list(paper.pseudo_queries)}
    if sum(documents) < 0.9 * sum(paper.documents):
        why = "a sample: its corpora have the paper's proportions"
    elif documents != list(paper.documents):
        why = f"another copy: {paper.note}"
    elif len(collection.notes.get("sizes", [])) > 1:
        why = "documents as in the paper, split as the authors' folders are"
    else:
        why = f"documents as in the paper ({paper.note}); queries follow their documents, which are drawn with a seed"
    return {"found": found, "paper": counts, "difference": why}
