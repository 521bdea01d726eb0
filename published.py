"""The paper's benchmarks in the layouts in which they are published, read as streams.

Paper    section 4.1 and tables 6-7
In       --data-dir: GenRet's NQ320k archive or its files, MS MARCO's passage files, or the authors' own folders
Out      a Collection whose documents lie on disk, and a manifest: what was found beside what the paper counts
Next     data.split cuts it into D_0..D_T; train.py stores it in the run folder
Differs  the authors' split of documents is not public: ours is drawn with a seed at the paper's exact sizes, and the
         ids of each corpus are hashed. Where their folders are there (d0 .. d4), their split is used.
"""

import codecs
import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import weights
from data import Collection, Corpus, read_lines
from mapped import Documents, StreamedFile


@dataclass(frozen=True)
class Benchmark:
    """What the paper counts (tables 6-7), per corpus D_0..D_4, and where the files come from."""

    documents: tuple[int, ...]
    pseudo_queries: tuple[int, ...]
    test_queries: tuple[int, ...]
    annotated: int  # queries of D_0
    files: tuple[str, ...]  # that a data folder must hold
    archives: dict[str, tuple[str, dict]]  # file to fetch -> (address, what its content is checked with)
    note: str  # why another number of documents may be found


# fmt: off
BENCHMARKS = {
    "nq320k": Benchmark(
        documents=(98_743, 2_743, 2_743, 2_743, 2_743), pseudo_queries=(1_480_538, 41_132, 41_136, 41_138, 41_141),
        test_queries=(6_998, 357, 136, 62, 277), annotated=276_493,
        files=("corpus_lite.json", "train.json", "dev.json", "train.json.qg.json"),
        archives={"nq320k.zip": (
            "https://raw.githubusercontent.com/sunnweiwei/GenRet/main/dataset/nq320k.zip",
            dict(git_blob="5130467c49376bb37e58756be3c1997bdd1c78fb"),
        )},
        note="copies of 108,015 to 109,739 documents circulate under the name NQ320k; GenRet's archive holds 109,739, "
             "of which the paper's corpora take 109,715",
    ),
    "msmarco": Benchmark(
        documents=(7_957_640, 221_045, 221_045, 221_045, 221_048),
        pseudo_queries=(79_576_202, 2_210_445, 2_210_445, 2_210_447, 2_210_471),
        test_queries=(6_247, 184, 196, 174, 154), annotated=452_746,
        files=("collection.tsv", "queries.train.tsv", "qrels.train.tsv", "queries.dev.small.tsv", "qrels.dev.small.tsv"),
        archives={
            "collectionandqueries.tar.gz": (
                "https://msmarco.z22.web.core.windows.net/msmarcoranking/collectionandqueries.tar.gz",
                dict(md5="31644046b18952c1386cd4564ba2ae69", size=1_057_717_952),
            ),
            "qrels.train.tsv": (
                "https://msmarco.z22.web.core.windows.net/msmarcoranking/qrels.train.tsv",
                dict(md5="733fb9fe12d93e497f7289409316eccf"),
            ),
        },
        note="the published collection holds 8,841,823 passages and its small development set 6,980 queries, of which "
             "the paper's corpora count 6,955",
    ),
}
# fmt: on


def read(name: str, folder: Path, log: Callable[[str], None], store: Path | None = None) -> Collection:
    """A benchmark from its folder; what is missing is fetched first. Its documents are kept in the folder `store`,
    or in a temporary one.

    Raises ValueError that names file and place of what is missing, cut, malformed or of another hash.
    """
    if folder.is_file():
        raise ValueError(f"--data_dir {folder}: wanted a folder, found a file; pass {folder.parent}")
    if authors_parts(folder):
        return read_authors(folder, store)
    fetch(name, folder, log)
    return read_nq320k(folder, store) if name == "nq320k" else read_msmarco(folder, store)


def fetch(name: str, folder: Path, log: Callable[[str], None]) -> None:
    """Downloads what `folder` lacks of a benchmark, checks it, and unpacks MS MARCO's archive."""
    wanted = BENCHMARKS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for file, (address, checks) in wanted.archives.items():
        lacking = {name for name in wanted.files if not (folder / name).is_file()}
        if file not in lacking and lacking <= set(wanted.archives):
            continue  # what is lacking is fetched by itself
        weights.fetch(address, folder / file, **checks, log=log)
        if file.endswith(".tar.gz"):
            absent = unpack(folder / file, lacking, folder) - set(wanted.archives)
            if absent:
                raise ValueError(
                    f"{folder / file}: found no member {', '.join(sorted(absent))}; it is another archive"
                )


def unpack(archive: Path, members: set[str], folder: Path) -> set[str]:
    """Takes members out of a .tar.gz, each whole or not at all; returns those that it does not hold."""
    missing = set(members)
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for item in tar:
                name = Path(item.name).name
                if item.isfile() and name in missing:
                    with StreamedFile(folder / name) as out:
                        source = tar.extractfile(item)
                        while part := source.read(1 << 20):
                            out.write(part)
                    missing.discard(name)
    except (tarfile.ReadError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: not a whole .tar.gz ({error}); delete it to fetch it again") from None
    return missing


# ------------------------------------------------------------------------------------------------ JSON streams


def json_items(stream: BinaryIO, name: str, opens: str = "[{", longest: int = 1 << 26) -> Iterator:
    """The items of one large JSON list, or (key, value) of an object, without reading it whole.

    Raises ValueError with the item's number where the text opens with another character than `opens` has, is cut or
    malformed, or an item's end has not come after `longest` characters.
    """
    decode, scan = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder().raw_decode
    encode = json.JSONEncoder(ensure_ascii=False).encode
    text, at, ended, number = "", 0, False, 0

    def fail(problem) -> ValueError:
        return ValueError(f"{name}: item {number}: {problem}; fetch the file again or repair it")

    def more() -> None:
        nonlocal text, at, ended
        try:
            part = stream.read(max(1 << 20, len(text) - at))
            ended = not part
            text, at = text[at:] + decode.decode(part, final=ended), 0
        except UnicodeDecodeError as error:
            raise fail(f"not UTF-8 ({error.reason})") from None

    def peek() -> str:
        """The next character that is no white space, "" at the end."""
        nonlocal at
        while True:
            while at < len(text) and text[at] in " \t\r\n":
                at += 1
            if at < len(text) or ended:
                return text[at : at + 1]
            more()

    def value():
        """The next JSON value; more text is read until its end is certain."""
        nonlocal at
        peek()
        while True:
            try:
                found, end = scan(text, at)
                if end + 2 < len(text) or ended:  # near the end a number may go on: 1 or 1e+ becomes 1e+5
                    encode(found).encode()  # raises for half surrogates, which no file can hold
                    at = end
                    return found
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)  # a decoder's message without its place in `text`
                if ended or isinstance(error, RecursionError):
                    raise fail(f"malformed or cut JSON ({reason})") from None
                if len(text) - at > longest:
                    raise fail(f"no whole JSON value within {longest:,} characters ({reason})") from None
            more()

    opening = peek()
    if not opening or opening not in opens:
        raise fail(f"wanted JSON that opens with {' or '.join(opens)}, found {opening!r}")
    closing, at = {"[": "]", "{": "}"}[opening], at + 1
    while (character := peek()) != closing:
        if number:
            if character != ",":
                raise fail(f"wanted a comma or {closing!r}, found {character!r}")
            at += 1
        found = value()
        if closing == "}":
            if not isinstance(found, str) or peek() != ":":
                raise fail("wanted a key and a colon")
            at += 1
            found = found, value()
        yield found
        number += 1
    at += 1
    if peek():
        raise fail("text after the end of the list")


# ---------------------------------------------------------------------------------------------- NQ320k, GenRet


@contextmanager
def member(folder: Path, name: str) -> Iterator[BinaryIO]:
    """Opens one of GenRet's files, in the folder or inside its nq320k.zip."""
    if (folder / name).is_file():
        with (folder / name).open("rb") as file:
            yield file
        return
    archive = folder / "nq320k.zip"
    if not archive.is_file():
        raise ValueError(f"found neither {folder / name} nor {archive}; see --data-dir")
    try:
        with zipfile.ZipFile(archive) as zipped:
            inside = [item for item in zipped.namelist() if Path(item).name == name]
            if not inside:
                raise ValueError(
                    f"{archive}: found no member {name}; it holds {', '.join(zipped.namelist())[:200]}"
                )
            with zipped.open(inside[0]) as file:
                yield file
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{archive}: not a whole archive ({error}); delete it to fetch it again") from None


def items(folder: Path, name: str) -> Iterator:
    """The items of one of GenRet's JSON lists."""
    with member(folder, name) as file:
        yield from json_items(file, name)


def innermost(value):
    """The first value of lists in lists, as GenRet's rows have them."""
    while isinstance(value, list) and value:
        value = value[0]
    return value


def genret_pairs(
    folder: Path, name: str, documents: int, blank: bool = False
) -> Iterator[tuple[str, str, str]]:
    """(place, document id, query) of rows [query, doc_id] in which either may be a nested list.

    A `blank` query is refused or, as a generated one may be empty, passed on for data.py to leave out.
    """
    for number, item in enumerate(items(folder, name)):
        place = f"{name}: item {number}"
        if not isinstance(item, list) or len(item) != 2:
            raise ValueError(f"{place}: wanted [query, doc_id], found {str(item)[:80]}")
        query, row = map(innermost, item)
        if not isinstance(query, str) or not (blank or query.strip()):
            raise ValueError(f"{place}: wanted a query, found {str(item[0])[:80]}")
        if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < documents:
            raise ValueError(
                f"{place}: points to document {row!r}; corpus_lite.json holds 0..{documents - 1}"
            )
        yield place, str(row), query


def read_nq320k(folder: Path, store: Path | None = None) -> Collection:
    """GenRet's NQ320k: a document's id is its row in corpus_lite.json; dev.json is the test set."""
    documents, empty = Documents(store), 0
    for row, text in enumerate(items(folder, "corpus_lite.json")):
        if not isinstance(text, str):
            raise ValueError(
                f"corpus_lite.json: item {row}: wanted a document's text, found {str(text)[:80]}"
            )
        empty += not text.strip()
        documents.add(str(row), "", text.strip())
    n = len(documents.close())
    if not n:
        raise ValueError(f"{folder}/corpus_lite.json: found no document")
    train = [
        (doc_id, query, f"train{i}")
        for i, (_, doc_id, query) in enumerate(genret_pairs(folder, "train.json", n))
    ]
    test, qrels = {}, {}
    for i, (_, doc_id, query) in enumerate(genret_pairs(folder, "dev.json", n)):
        test[f"dev{i}"], qrels[f"dev{i}"] = query, {doc_id: 1}
    notes = {"layout": "GenRet", "documents without text": empty}
    pseudo = genret_pairs(folder, "train.json.qg.json", n, blank=True)
    return Collection(documents, train, test, qrels, pseudo=pseudo, notes=notes)


# ---------------------------------------------------------------------------------------------------- MS MARCO


def read_tsv(path: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """(place, cells) of every line; the first cell is an id, the last takes what is left of the line."""
    for place, line in read_lines(path):
        cells = line.split("\t", columns - 1)
        if len(cells) != columns:
            raise ValueError(
                f"{place}: wanted {columns} cells between tabs, found {len(cells)}: {line[:80]!r}"
            )
        if not cells[0].strip():
            raise ValueError(f"{place}: wanted an id before the first tab, found {line[:80]!r}")
        yield place, cells


def read_labels(path: Path, documents: Documents) -> Iterator[tuple[str, str, int]]:
    """(query id, document id, label > 0) of lines `qid 0 pid label`."""
    for place, line in read_lines(path):
        cells = line.split()
        if len(cells) != 4 or not re.fullmatch(r"-?\d{1,9}", cells[3]):
            raise ValueError(f"{place}: wanted qid 0 pid label, found {line[:80]!r}")
        if documents.row(cells[2]) is None:
            raise ValueError(f"{place}: points to passage {cells[2]!r}, which the collection does not hold")
        if int(cells[3]) > 0:
            yield cells[0], cells[2], int(cells[3])


def read_queries(path: Path, wanted: set[str]) -> dict[str, str]:
    """Texts of the wanted query ids. Raises ValueError where one has none, or two that differ."""
    found: dict[str, str] = {}
    for place, (qid, text) in read_tsv(path, 2):
        if qid in wanted and found.setdefault(qid, text.strip()) != text.strip():
            raise ValueError(f"{place}: query {qid!r} has another text above; ids must be unique")
    if missing := sorted(qid for qid in wanted if not found.get(qid)):
        raise ValueError(f"{path}: {len(missing)} labelled queries have no text here, first {missing[0]!r}")
    return found


def read_msmarco(folder: Path, store: Path | None = None) -> Collection:
    """MS MARCO passages; the small development set is the test set, the training labels annotate D_0."""
    documents = Documents(store)
    for place, (pid, passage) in read_tsv(folder / "collection.tsv", 2):
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
    found = folder.glob("d*/full_collection/raw.tsv")
    count = sum(path.parents[1].name[1:].isdecimal() for path in found)
    numbered = [folder / f"d{t}" for t in range(count)]  # where one is lacking, read_authors names it
    return numbered or [folder] * (folder / "full_collection" / "raw.tsv").is_file()


def read_authors(folder: Path, store: Path | None = None) -> Collection:
    """The layout of the released code: full_collection/raw.tsv, train_queries/, eval_queries/, doc2query/.

    A later part may repeat the documents of those before it, or hold its own alone.
    """
    parts, sizes = authors_parts(folder), []
    if not parts:
        raise ValueError(
            f"found no file {folder / 'full_collection' / 'raw.tsv'}, nor one below {folder / 'd0'}"
        )
    documents = Documents(store)
    for part in parts:
        before = sum(sizes)
        added = sum(
            documents.add(doc_id, "", text.replace("\t", " ").strip())
            for _, (doc_id, text) in read_tsv(part / "full_collection" / "raw.tsv", 2)
        )
        sizes.append(added)
        if not added:
            raise ValueError(f"{part}: adds no document to the {before} of the parts before it")
    documents.close()
    collection = Collection(documents, [], {}, {}, notes={"layout": "authors", "sizes": sizes})
    if len(parts) > 1:
        collection.order = list(documents.ids)
    for t, part in enumerate(parts):
        test = part / "eval_queries" if (part / "eval_queries").is_dir() else part
        qrels = {
            f"d{t}.{qid}": found
            for qid, found in read_json_labels(test / "eval_qrel.json", documents).items()
        }
        texts = read_queries(queries_file(part, "eval"), {qid.partition(".")[2] for qid in qrels})
        collection.qrels |= qrels
        collection.test |= {qid: texts[qid.partition(".")[2]] for qid in qrels}
    labels = parts[0] / "train_queries" / "train_qrel.json"
    if labels.is_file():
        annotated = read_json_labels(labels, documents)
        texts = read_queries(queries_file(parts[0], "train"), set(annotated))
        collection.train = [(doc_id, texts[qid], qid) for qid, found in annotated.items() for doc_id in found]
    files = [part / "doc2query" / "query_to_docid.train.json" for part in parts]
    if all(file.is_file() for file in files):
        collection.pseudo = (line for file in files for line in read_numbered_pseudo_queries(file))
    return collection


def queries_file(part: Path, kind: str) -> Path:
    """eval_queries/raw.tsv, or another *_queries/raw.tsv whose name begins with `kind`."""
    found = sorted(part.glob(f"{kind}*queries/raw.tsv")) or sorted(part.glob("*_queries/raw.tsv"))
    if not found:
        raise ValueError(f"found no {part / f'{kind}_queries' / 'raw.tsv'}")
    return found[0]


def read_json_labels(path: Path, documents: Documents) -> dict[str, dict[str, int]]:
    """{qid: {docid: label > 0}} of one JSON object."""
    if not path.is_file():
        raise ValueError(f"found no {path}; wanted a JSON object {{qid: {{docid: label}}}}")
    labels = {}
    with path.open("rb") as file:
        for qid, found in json_items(file, str(path), opens="{"):
            if not isinstance(found, dict) or not all(type(label) is int for label in found.values()):
                raise ValueError(f"{path}: query {qid!r}: wanted {{docid: label}}, found {str(found)[:80]}")
            if qid in labels:
                raise ValueError(f"{path}: query {qid!r} is listed twice; ids must be unique")
            for doc_id in found:
                if documents.row(doc_id) is None:
                    raise ValueError(
                        f"{path}: query {qid!r} points to document {doc_id!r}, which no collection holds"
                    )
            labels[qid] = {doc_id: label for doc_id, label in found.items() if label > 0}
    return {qid: found for qid, found in labels.items() if found}


def read_numbered_pseudo_queries(path: Path) -> Iterator[tuple[str, str, str]]:
    """(place, document id, query) of JSON lines {doc_id, query} in which doc_id may be a number or a string."""
    for place, line in read_lines(path):
        try:
            row = json.loads(line)
            doc_id, query = row["doc_id"], row["query"]
            json.dumps(row, ensure_ascii=False).encode()  # raises for half surrogates
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{place}: wanted {{doc_id, query}} ({error})") from None
        if isinstance(doc_id, bool) or not isinstance(doc_id, (int, str)) or not isinstance(query, str):
            raise ValueError(f"{place}: wanted {{doc_id, query}}, found {line[:80]}")
        yield place, str(doc_id), query


def read_docids(path: Path, ids, codebooks: int, centroids: int) -> list[list[int]]:
    """Docids made elsewhere, one per id: a JSON object {docid: [M codes]}, a leading -1 being dropped."""
    if not path.is_file():
        raise ValueError(f"found no {path}; wanted a JSON object {{docid: [codes]}}")
    found: dict[str, list[int]] = {}
    with path.open("rb") as file:
        for doc_id, codes in json_items(file, str(path), opens="{"):
            codes = codes[1:] if isinstance(codes, list) and codes[:1] == [-1] else codes
            if not (
                isinstance(codes, list) and len(codes) == codebooks
                and all(type(code) is int and 0 <= code < centroids for code in codes)
            ):  # fmt: skip
                raise ValueError(
                    f"{path}: document {doc_id!r}: wanted M={codebooks} codes below K={centroids}, found {str(codes)[:80]}"
                )
            if found.setdefault(doc_id, codes) != codes:
                raise ValueError(f"{path}: document {doc_id!r} has another docid above; ids must be unique")
    if missing := [doc_id for doc_id in ids if doc_id not in found]:
        raise ValueError(f"{path}: {len(missing)} documents have no docid, first {missing[0]!r}")
    return [found[doc_id] for doc_id in ids]


# ---------------------------------------------------------------------------------------------------- the split


def paper_split(name: str, collection: Collection) -> tuple[str, int]:
    """--splits paper: the sizes of the paper (or of the authors' folders) and how many documents they leave over.

    Where there are too few documents, as in a sample, the paper's proportions.
    """
    n, sizes = len(collection.documents), collection.notes.get("sizes", [])
    if len(sizes) > 1:
        return ",".join(map(str, sizes)), 0
    if name not in BENCHMARKS:
        raise ValueError(f"--splits paper: wanted --data {' or '.join(BENCHMARKS)}, found --data {name}")
    sizes = BENCHMARKS[name].documents
    if n >= sum(sizes):
        return ",".join(map(str, sizes)), n - sum(sizes)
    return "90,2.5,2.5,2.5,2.5", 0


def manifest(name: str, collection: Collection, corpora: list[Corpus]) -> dict:
    """What was found, beside what the paper counts, and why they may differ."""
    documents, tests = [len(c.ids) for c in corpora], [len(c.test) for c in corpora]
    found = {
        "documents": documents, "documents in the files": len(collection.documents), "test queries": tests,
        "annotated queries of D0": len(corpora[0].train), **collection.notes,
    }  # fmt: skip
    if name not in BENCHMARKS:
        return {"found": found}
    paper = BENCHMARKS[name]
    counts = {
        "documents": list(paper.documents), "test queries": list(paper.test_queries),
        "annotated queries of D0": paper.annotated, "pseudo-queries": list(paper.pseudo_queries),
    }  # fmt: skip
    if sum(documents) < 0.9 * sum(paper.documents):
        why = "a sample: its corpora have the paper's proportions"
    elif documents != list(paper.documents):
        why = f"another copy: {paper.note}"
    elif len(collection.notes.get("sizes", [])) > 1:
        why = "documents as in the paper, split as the authors' folders are"
    else:
        why = f"documents as in the paper ({paper.note}); queries follow their documents, which are drawn with a seed"
    return {"found": found, "paper": counts, "difference": why}
