"""The paper's benchmarks in the layouts in which they are published.

Paper    section 4.1 and tables 6-7
In       --data-dir: GenRet's NQ320k archive or its files, MS MARCO's passage files, or the authors' own folders
Out      a Collection whose documents lie on disk, and a manifest: what was read beside what the paper counts
Next     data.split cuts it into D_0..D_T; train.py stores it in the run folder
Differs  the authors' split of documents is not public: ours is drawn with a seed at the paper's exact sizes, and the
         ids of each corpus are hashed. Where their folders are there (d0 .. d4), their split is used. A JSON file is
         read whole; the lines of MS MARCO are not.
"""

import json
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import weights
from arrays import Documents
from data import Collection, Corpus, read_lines


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


def read(name: str, folder: Path, log: Callable[[str], None], store: Path | None = None) -> Collection:
    """A benchmark from its folder, what is missing fetched first; its documents go to `store`, or a temporary folder.

    Raises ValueError that names file and place of what is missing, cut, malformed or of another hash.
    """
    if folder.is_file():
        raise ValueError(f"--data_dir {folder}: wanted a folder, found a file; pass {folder.parent}")
    if authors_parts(folder):
        return read_authors(folder, store)
    fetch(name, folder, log)
    return (read_nq320k if name == "nq320k" else read_msmarco)(folder, store)


def fetch(name: str, folder: Path, log: Callable[[str], None]) -> None:
    """Downloads what `folder` lacks of a benchmark, checks it, and unpacks archives."""
    wanted = BENCHMARKS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for file, (server, checks) in wanted.archives.items():
        lacking = {name for name in wanted.files if not (folder / name).is_file()}
        if file not in lacking and lacking <= set(wanted.archives):
            continue  # what is lacking is fetched by itself
        weights.fetch(server + file, folder / file, **checks, log=log)
        if file not in wanted.files:
            absent = unpack(folder / file, lacking, folder) - set(wanted.archives)
            if absent:
                raise ValueError(f"{folder / file}: found no member {', '.join(sorted(absent))}; delete it")


def unpack(archive: Path, members: set[str], folder: Path) -> set[str]:
    """Takes members out of a .tar.gz or .zip, each whole or not at all; returns those that it does not hold."""
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            shutil.unpack_archive(archive, scratch)
            os.sync()
            files = {path.name: path for path in Path(scratch).rglob("*") if path.is_file()}
            for name in members & set(files):
                files[name].replace(folder / name)
    except (shutil.ReadError, tarfile.ReadError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: not a whole archive ({error}); delete it to fetch it again") from None
    return members - set(files)


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    value = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"key {key!r} is listed twice")
        value[key] = item
    return value


def read_json(path: Path, kind: type[list] | type[dict], wanted: str) -> list | dict:
    """A JSON file that is a list or an object; `wanted` describes it for messages.

    Raises ValueError where it is missing, cut, malformed, of another kind, not UTF-8, or has a key twice in an object or
    half a surrogate pair.
    """
    if not path.is_file():
        raise ValueError(f"found no {path}; wanted {wanted}")
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=unique_keys)
        json.dumps(value, ensure_ascii=False).encode()  # raises for half surrogates
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: malformed or cut JSON ({error}); wanted {wanted}; repair it") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: found {str(value)[:80]}, wanted {wanted}")
    return value


def read_texts(path: Path) -> Iterator[tuple[str, str]]:
    """(id, text) of a JSON list of documents' texts, as GenRet's; the id is the number in the list."""
    for number, text in enumerate(read_json(path, list, "a JSON list of documents' texts")):
        if not isinstance(text, str):
            raise ValueError(f"{path}: item {number}: wanted a document's text, found {text!r:.80}")
        yield str(number), text.strip()


# ---------------------------------------------------------------------------------------------- NQ320k, GenRet


def innermost(value):
    """The first value of lists in lists, as GenRet's rows have them."""
    while isinstance(value, list) and value:
        value = value[0]
    return value


def genret_pairs(folder: Path, name: str, documents: int) -> Iterator[tuple[str, str, str]]:
    """(place, document id, query) of rows [query, doc_id] in which either may be a nested list.

    Generated queries may be empty, for data.py to leave out; others may not.
    """
    path = folder / name
    for number, item in enumerate(read_json(path, list, "a JSON list of [query, doc_id]")):
        place = f"{path}: item {number}"
        if not isinstance(item, list) or len(item) != 2:
            raise ValueError(f"{place}: wanted [query, doc_id], found {str(item)[:80]}")
        query, row = map(innermost, item)
        if not isinstance(query, str) or not (query.strip() or name.endswith(".qg.json")):
            raise ValueError(f"{place}: wanted a query, found {str(item[0])[:80]}")
        if type(row) is not int or not 0 <= row < documents:
            raise ValueError(f"{place}: points to document {row!r}, of {documents} in corpus_lite.json")
        yield place, str(row), query


def read_nq320k(folder: Path, store: Path | None = None) -> Collection:
    """GenRet's NQ320k: a document's id is its row in corpus_lite.json; dev.json is the test set."""
    documents, empty = Documents(store), 0
    for doc_id, text in read_texts(folder / "corpus_lite.json"):
        empty += not text
        documents.add(doc_id, "", text)
    n = len(documents.close())
    if not n:
        raise ValueError(f"{folder / 'corpus_lite.json'}: found no document")
    annotated = enumerate(genret_pairs(folder, "train.json", n))
    train = [(doc_id, query, f"train{i}") for i, (_, doc_id, query) in annotated]
    test, qrels = {}, {}
    for i, (_, doc_id, query) in enumerate(genret_pairs(folder, "dev.json", n)):
        test[f"dev{i}"], qrels[f"dev{i}"] = query, {doc_id: 1}
    notes = {"layout": "GenRet", "documents without text": empty}
    pseudo = genret_pairs(folder, "train.json.qg.json", n)
    return Collection(documents, train, test, qrels, pseudo=pseudo, notes=notes)


# ---------------------------------------------------------------------------------------------------- MS MARCO


def read_tsv(path: Path) -> Iterator[tuple[str, str, str]]:
    """(place, id, text) of every line; the text may hold further tabs."""
    for place, line in read_lines(path):
        name, tab, text = line.partition("\t")
        if not tab or not name.strip():
            raise ValueError(f"{place}: wanted an id, a tab and a text, found {line[:80]!r}")
        yield place, name, text


def read_labels(path: Path, documents: Documents) -> Iterator[tuple[str, str, int]]:
    """(query id, document id, label > 0) of lines `qid 0 docid label`, or of a JSON object {qid: {docid: label}}."""
    for place, qid, doc_id, label in (json_labels if path.suffix == ".json" else tsv_labels)(path):
        if doc_id not in documents.row_of:
            raise ValueError(f"{place}: points to document {doc_id!r}, which the collection does not hold")
        if label > 0:
            yield qid, doc_id, label


def tsv_labels(path: Path) -> Iterator[tuple[str, str, str, int]]:
    for place, line in read_lines(path):
        cells = line.split()
        if len(cells) != 4 or not re.fullmatch(r"-?\d{1,9}", cells[3]):
            raise ValueError(f"{place}: wanted qid 0 pid label, found {line[:80]!r}")
        yield place, cells[0], cells[2], int(cells[3])


def json_labels(path: Path) -> Iterator[tuple[str, str, str, int]]:
    for qid, labels in read_json(path, dict, "a JSON object {qid: {docid: label}}").items():
        place = f"{path}: query {qid!r}"
        if not isinstance(labels, dict) or not all(type(label) is int for label in labels.values()):
            raise ValueError(f"{place}: wanted {{docid: label}}, found {str(labels)[:80]}")
        yield from ((place, qid, doc_id, label) for doc_id, label in labels.items())


def read_queries(path: Path, wanted: set[str]) -> dict[str, str]:
    """Texts of the wanted query ids. Raises ValueError where one has none, or two that differ."""
    texts: dict[str, str] = {}
    for place, qid, text in read_tsv(path):
        if qid in wanted and texts.setdefault(qid, text.strip()) != text.strip():
            raise ValueError(f"{place}: query {qid!r} has another text above; ids must be unique")
    if missing := sorted(qid for qid in wanted if not texts.get(qid)):
        raise ValueError(f"{path}: {len(missing)} labelled queries have no text here, first {missing[0]!r}")
    return texts


def read_msmarco(folder: Path, store: Path | None = None) -> Collection:
    """MS MARCO passages; the small development set is the test set, the training labels annotate D_0."""
    documents = Documents(store)
    for place, pid, passage in read_tsv(folder / "collection.tsv"):
        if not documents.add(pid, "", passage.strip()):
            raise ValueError(f"{place}: duplicate passage id {pid!r}; ids must be unique")
    documents.close()
    labels = list(read_labels(folder / "qrels.train.tsv", documents))
    texts = read_queries(folder / "queries.train.tsv", {qid for qid, _, _ in labels})
    train = [(pid, texts[qid], qid) for qid, pid, _ in labels]
    qrels: dict[str, dict[str, int]] = {}
    for qid, pid, label in read_labels(folder / "qrels.dev.small.tsv", documents):
        qrels.setdefault(qid, {})[pid] = label
    test = read_queries(folder / "queries.dev.small.tsv", set(qrels))
    return Collection(documents, train, test, qrels, notes={"layout": "MS MARCO"})


# ------------------------------------------------------------------------------------------ the authors' folders


def authors_parts(folder: Path) -> list[Path]:
    """d0, d1, .. where each has a collection, or the folder itself."""
    collections = folder.glob("d*/full_collection/raw.tsv")
    count = sum(path.parents[1].name[1:].isdecimal() for path in collections)
    numbered = [folder / f"d{t}" for t in range(count)]  # where one is lacking, read_authors names it
    return numbered or [folder] * (folder / "full_collection" / "raw.tsv").is_file()


def read_authors(folder: Path, store: Path | None = None) -> Collection:
    """The layout of the released code: full_collection/raw.tsv, train_queries/, eval_queries/, doc2query/.

    A later part may repeat the documents of those before it, or hold its own alone.
    """
    parts, sizes = authors_parts(folder), []
    if not parts:
        raise ValueError(f"found no file {folder / 'full_collection/raw.tsv'}, nor one below {folder / 'd0'}")
    documents = Documents(store)
    for part in parts:
        sizes.append(0)
        for _, doc_id, text in read_tsv(part / "full_collection" / "raw.tsv"):
            sizes[-1] += documents.add(doc_id, "", text.replace("\t", " ").strip())
        if not sizes[-1]:
            raise ValueError(f"{part}: adds no document to the {sum(sizes)} of the parts before it")
    documents.close()
    collection = Collection(documents, [], {}, {}, notes={"layout": "authors", "sizes": sizes})
    if len(parts) > 1:
        collection.order = list(documents.ids)
    for t, part in enumerate(parts):
        tests = part / "eval_queries" if (part / "eval_queries").is_dir() else part
        labels = list(read_labels(tests / "eval_qrel.json", documents))
        texts = read_queries(queries_file(part, "eval"), {qid for qid, _, _ in labels})
        for qid, doc_id, label in labels:
            collection.test[f"d{t}.{qid}"] = texts[qid]
            collection.qrels.setdefault(f"d{t}.{qid}", {})[doc_id] = label
    annotations = parts[0] / "train_queries" / "train_qrel.json"
    if annotations.is_file():
        labels = list(read_labels(annotations, documents))
        texts = read_queries(queries_file(parts[0], "train"), {qid for qid, _, _ in labels})
        collection.train = [(doc_id, texts[qid], qid) for qid, doc_id, _ in labels]
    files = [part / "doc2query" / "query_to_docid.train.json" for part in parts]
    if all(file.is_file() for file in files):
        collection.pseudo = (line for file in files for line in read_numbered_pseudo_queries(file))
    return collection


def queries_file(part: Path, kind: str) -> Path:
    """eval_queries/raw.tsv, or another *_queries/raw.tsv whose name begins with `kind`."""
    files = sorted(part.glob(f"{kind}*queries/raw.tsv")) or sorted(part.glob("*_queries/raw.tsv"))
    if not files:
        raise ValueError(f"found no {part / f'{kind}_queries' / 'raw.tsv'}")
    return files[0]


def read_numbered_pseudo_queries(path: Path) -> Iterator[tuple[str, str, str]]:
    """(place, document id, query) of JSON lines {doc_id, query} in which doc_id may be a number or a string."""
    for place, line in read_lines(path):
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # raises for half surrogates
            doc_id, query = row["doc_id"], row["query"]
            if type(doc_id) not in (int, str) or not isinstance(query, str):
                raise TypeError(f"found {line[:80]}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{place}: wanted {{doc_id, query}} ({error})") from None
        yield place, str(doc_id), query


def read_docids(path: Path, ids, codebooks: int, centroids: int) -> list[list[int]]:
    """Docids made elsewhere, one per id: a JSON object {docid: [M codes]}, a leading -1 being dropped."""
    docids = read_json(path, dict, "a JSON object {docid: [codes]}")
    for doc_id, codes in docids.items():
        if isinstance(codes, list) and codes[:1] == [-1]:
            docids[doc_id] = codes = codes[1:]
        whole = isinstance(codes, list) and len(codes) == codebooks
        if not whole or not all(type(code) is int and 0 <= code < centroids for code in codes):
            wanted = f"wanted M={codebooks} codes below K={centroids}"
            raise ValueError(f"{path}: document {doc_id!r}: {wanted}, found {str(codes)[:80]}")
    if missing := [doc_id for doc_id in ids if doc_id not in docids]:
        raise ValueError(f"{path}: {len(missing)} documents have no docid, first {missing[0]!r}")
    return [docids[doc_id] for doc_id in ids]


# ---------------------------------------------------------------------------------------------------- the split


def paper_split(name: str, collection: Collection) -> tuple[str, int]:
    """--splits paper: the sizes of the paper (or of the authors' folders) and how many documents they leave over.

    Where there are too few documents, as in a sample, the paper's proportions.
    """
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
    if name not in BENCHMARKS:
        return {"found": found}
    paper = BENCHMARKS[name]
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
