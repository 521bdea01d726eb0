"""Published layouts: whole or refused by name, and never another split than was asked for."""

import hashlib
import http.server
import io
import json
import os
import re
import socket
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import published
from arrays import Documents
from data import Collection, Corpus
from published import (
    BENCHMARKS,
    manifest,
    paper_split,
    read_authors,
    read_docids,
    read_json,
    read_msmarco,
    read_nq320k,
)
from queries import ListedPseudoQueries, store_pseudo_queries

SHARED = Path(os.environ.get("MIXLORA_DATA") or Path(__file__).parents[1] / "../shared/data")
SAMPLE = SHARED / "nq320k_sample"
needs_sample = pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no folder {SAMPLE}; set MIXLORA_DATA")


def content(collection: Collection) -> list:
    """All that a collection holds, to compare two; its pseudo-queries are used up."""
    documents = collection.documents
    pseudo = [(doc_id, query) for _, doc_id, query in collection.pseudo or ()]
    collection.problems.check()
    return [list(documents.ids), list(documents.titles), list(documents.texts), collection.train, collection.test,
            collection.qrels, collection.order, pseudo, collection.notes]  # fmt: skip


def write(folder: Path, files: dict[str, object]) -> Path:
    """Files from bytes, from text, or from what becomes JSON; None stands for no file."""
    for name, value in files.items():
        if value is not None:
            raw = value if isinstance(value, (bytes, str)) else json.dumps(value)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return folder


# -------------------------------------------------------------------------------------------------- JSON files


def refused_json(tmp_path: Path, raw: bytes, kind: type, message: str) -> None:
    (tmp_path / "file.json").write_bytes(raw)
    with pytest.raises(ValueError, match=message) as error:
        read_json(tmp_path / "file.json", kind, "what is wanted")
    assert type(error.value) is ValueError and str(error.value).startswith(f"{tmp_path / 'file.json'}:")
    assert "wanted what is wanted" in str(error.value) or "not UTF-8" in str(error.value)


def test_json_with_a_byte_order_mark_reads_as_without(tmp_path):
    for raw in (b'["caf\xc3\xa9", 1, "\\ud83d\\ude00"]', b'\xef\xbb\xbf["caf\xc3\xa9", 1, "\\ud83d\\ude00"]'):
        (tmp_path / "file.json").write_bytes(raw)
        assert read_json(tmp_path / "file.json", list, "a list") == ["café", 1, "😀"]


@pytest.mark.parametrize("top", [["é€😀", [1, {"k": [2.5]}], "", True], {"a é": [1, 2], "b": {"c": "d"}}])
def test_json_cut_at_any_byte_is_refused(tmp_path, top):
    raw = json.dumps(top, ensure_ascii=False).encode()
    for at in range(len(raw)):
        refused_json(tmp_path, raw[:at], type(top), "malformed or cut JSON|not UTF-8")


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"[1] x", "malformed or cut JSON .*Extra data"),
        (b'["a", "\xff"]', "not UTF-8"),
        (b'[0, "\\ud800"]', "malformed or cut JSON .*surrogates"),
        (b"[0, " + b"[" * 100_000, "malformed or cut JSON .*recursion"),
        (b"[0, " + b"9" * 5000 + b"]", "malformed or cut JSON .*digits"),
        (b'[{"a": 1, "b": 2, "a": 1}]', "malformed or cut JSON .*key 'a' is listed twice"),
        (b'"text"', ": found text"),
        (b'{"a": 1}', ": found {'a': 1}"),
    ],
)  # fmt: skip
def test_json_that_is_malformed_or_of_another_kind_is_refused(tmp_path, raw, message):
    refused_json(tmp_path, raw, list, message)


def test_json_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"found no file {tmp_path / 'file.json'}"):
        read_json(tmp_path / "file.json", list, "a list")


def test_texts_are_numbered_in_their_order(tmp_path):
    (tmp_path / "a.json").write_text('[" one ", "", "three"]')
    assert list(published.read_texts(tmp_path / "a.json")) == [
        (f"{tmp_path / 'a.json'}: item {i}", str(i), text) for i, text in enumerate(("one", "", "three"))
    ]


# ---------------------------------------------------------------------------------------------- NQ320k, GenRet

GENRET = {
    "corpus_lite.json": ["Rome is old .", " Paris lies on the Seine . \n", "Bern", "Oslo"],
    "train.json": [["age of rome", 0], [["seine city", "another"], [1, 0]]],
    "dev.json": [[["how old is rome"], [0]], [[["norway"]], [[[3]]]]],
    "train.json.qg.json": [["rome old", 0], ["", 2], [["oslo"], 3]],
}


def genret(folder: Path, **files) -> Path:
    """GenRet's files; `corpus_lite=..` and so on replaces one."""
    short = {
        "corpus_lite": "corpus_lite.json",
        "train": "train.json",
        "dev": "dev.json",
        "pseudo": "train.json.qg.json",
    }
    return write(folder, GENRET | {short[name]: value for name, value in files.items()})


def pack(folder: Path, archive: Path, leave_out: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    """The zip of a folder's files, under dataset/ as it is published."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", method) as zipped:
        for file in sorted(folder.iterdir()):
            if file.name != leave_out:
                zipped.write(file, f"dataset/{file.name}")
    return archive


def test_genret_files_by_hand(tmp_path):
    assert content(read_nq320k(genret(tmp_path))) == [
        ["0", "1", "2", "3"],
        [""] * 4,
        ["Rome is old .", "Paris lies on the Seine .", "Bern", "Oslo"],
        [("0", "age of rome", "train0"), ("1", "seine city", "train1")],
        {"dev0": "how old is rome", "dev1": "norway"},
        {"dev0": {"0": 1}, "dev1": {"3": 1}},
        None,
        [("0", "rome old"), ("2", ""), ("3", "oslo")],  # data.py leaves the empty one out and counts it
        {"layout": "GenRet"},
    ]


@needs_sample
def test_sample_of_nq320k_is_read_as_it_is_published():
    found = read_nq320k(SAMPLE)
    corpus, train, dev, pseudo = (
        json.loads((SAMPLE / file).read_text()) for file in BENCHMARKS["nq320k"].files
    )
    assert len(found.documents) == len(corpus) == 597
    assert list(found.documents.ids) == list(map(str, range(597)))
    assert list(found.documents.texts) == [text.strip() for text in corpus]
    assert len(found.test) == len(dev) == 300 and len(found.train) == len(train) == 300
    assert all(
        isinstance(query, list) and isinstance(row, list) for query, row in dev
    )  # nested, as GenRet has it
    assert found.test == {f"dev{i}": query for i, ((query,), _) in enumerate(dev)}
    assert found.qrels == {f"dev{i}": {str(row): 1} for i, (_, (row,)) in enumerate(dev)}
    assert found.train == [(str(row), query, f"train{i}") for i, (query, row) in enumerate(train)]
    assert [(query, int(doc_id)) for _, doc_id, query in found.pseudo] == [tuple(pair) for pair in pseudo]


@needs_sample
def test_sample_inside_the_zip_is_the_same_collection(tmp_path, monkeypatch):
    archive = pack(SAMPLE, tmp_path / "nq320k.zip")
    archives = {"nq320k.zip": ("https://nowhere.invalid/", dict(git_blob=git_blob(archive.read_bytes())))}
    monkeypatch.setitem(BENCHMARKS, "nq320k", replace(BENCHMARKS["nq320k"], archives=archives))
    assert content(published.read("nq320k", tmp_path, silent)) == content(read_nq320k(SAMPLE))


@pytest.mark.parametrize("name", GENRET)
def test_missing_file_of_genret_is_named(tmp_path, name):
    (genret(tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=f"found no file .*{re.escape(name)}"):
        content(read_nq320k(tmp_path))


@pytest.mark.parametrize("item", [7, None, True, ["Oslo"], {"text": "Oslo"}])
def test_document_that_is_no_string_is_refused(tmp_path, item):
    with pytest.raises(ValueError, match=r"/corpus_lite.json: item 1: wanted a document's text"):
        read_nq320k(genret(tmp_path, corpus_lite=["Rome", item]))


@pytest.mark.parametrize("name", ["train", "dev", "pseudo"])
@pytest.mark.parametrize("row", [4, 10**30, -1, True, False, "1", 1.0, None, [], [[]], {"row": 1}])
def test_label_that_points_to_no_document_is_refused(tmp_path, name, row):
    genret(tmp_path, **{name: [["q", 3], ["a query", row]]})
    file = {"pseudo": "train.json.qg"}.get(name, name)
    with pytest.raises(
        ValueError, match=rf"/{file}.json: item 1: (wanted \[query, doc_id\]|label of a missing document) \("
    ):
        content(read_nq320k(tmp_path))


@pytest.mark.parametrize("name", ["train", "dev"])
@pytest.mark.parametrize("query", ["", " \n", [""], None, 7, [], [[]], {"q": "a"}])
def test_empty_query_is_refused(tmp_path, name, query):
    with pytest.raises(
        ValueError, match=rf"/{name}.json: item 1: (wanted \[query, doc_id\]|query without a word) \("
    ):
        read_nq320k(genret(tmp_path, **{name: [["q", 3], [query, 0]]}))


@pytest.mark.parametrize("name", ["train", "dev", "pseudo"])
@pytest.mark.parametrize("item", ["query", ["query"], ["query", 1, 2], {"query": 1}, None, []])
def test_row_of_another_form_is_refused(tmp_path, name, item):
    genret(tmp_path, **{name: [["q", 3], item]})
    with pytest.raises(ValueError, match=r"\.json: item 1: wanted \[query, doc_id\] \(found"):
        content(read_nq320k(tmp_path))


@pytest.mark.parametrize(
    "corpus, message",
    [
        ({"Rome": "old"}, "found {'Rome': 'old'}, wanted a JSON list of documents' texts"),
        (b'["Rome", "cut o', "malformed or cut JSON"),
        (b'["Rome", "\\udc00"]', "malformed or cut JSON .*surrogates"),
        (b"", "malformed or cut JSON"),
    ],
)
def test_corpus_that_is_no_list_of_strings_is_refused(tmp_path, corpus, message):
    with pytest.raises(ValueError, match=f"corpus_lite.json: {message}"):
        read_nq320k(genret(tmp_path, corpus_lite=corpus))


# ---------------------------------------------------------------------------------------------------- MS MARCO

MSMARCO = {
    "collection.tsv": "0\tThe Manhattan Project .\n1\tIts success\twith a tab \n7\tOslo\n",
    "queries.train.tsv": "10\twho built it\n11\tnever labelled\n12\toslo fjord\n",
    "qrels.train.tsv": "10\t0\t0\t1\n12\t0\t7\t1\n12\t0\t1\t0\n",
    "queries.dev.small.tsv": "20\tmanhattan\n21\tsuccess of it\n22\tnothing\n",
    "qrels.dev.small.tsv": "20 0 0 1\n20 0 7 2\n21 0 1 1\n22 0 1 0\n22 0 7 -1\n",
}


def msmarco(
    folder: Path, name: str = "collection.tsv", value: str | bytes | None = MSMARCO["collection.tsv"]
) -> Path:
    """MS MARCO's files, of which one may be replaced."""
    return write(folder, MSMARCO | {name: value})


def test_msmarco_files_by_hand(tmp_path):
    assert content(read_msmarco(msmarco(tmp_path))) == [
        ["0", "1", "7"],
        [""] * 3,
        ["The Manhattan Project .", "Its success\twith a tab", "Oslo"],
        [("0", "who built it", "10"), ("7", "oslo fjord", "12")],  # the label 0 is no pair
        {"20": "manhattan", "21": "success of it"},
        {"20": {"0": 1, "7": 2}, "21": {"1": 1}},
        None,
        [],
        {"layout": "MS MARCO"},
    ]


def test_msmarco_with_windows_line_ends_reads_the_same(tmp_path):
    plain = content(read_msmarco(msmarco(tmp_path / "plain")))
    windows = {name: "\ufeff" + text.replace("\n", "\r\n\r\n") for name, text in MSMARCO.items()}
    assert content(read_msmarco(write(tmp_path / "windows", windows))) == plain


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("collection.tsv", "0\ta\n1\tb\n0\tc\n", r"collection.tsv:3: duplicate document id \('0'\)"),
        ("collection.tsv", "0\ta\nno tab\n", r"collection.tsv:2: wanted an id, a tab and a text"),
        ("collection.tsv", b"0\ta\n1\t\xff\n", r"collection.tsv:2: not UTF-8"),
        ("queries.train.tsv", "10\tq\n11\n", r"queries.train.tsv:2: wanted an id, a tab"),
        (
            "queries.train.tsv",
            "10\tq\n",
            r"qrels.train.tsv:2: label of a missing query \('12'\)",
        ),
        (
            "queries.dev.small.tsv",
            "20\tq\n21\t  \n",
            r"queries.dev.small.tsv:2: query without a word \('21'\)",
        ),
        (
            "qrels.train.tsv",
            "10\t0\t0\t1\n10\t0\t9\t1\n",
            r"qrels.train.tsv:2: label of a missing document \('9'\)",
        ),
        ("qrels.dev.small.tsv", "20 0 8 0\n", r"qrels.dev.small.tsv:1: label of a missing document \('8'\)"),
        ("qrels.train.tsv", "10\t0\t1\n", r"qrels.train.tsv:1: wanted qid 0 docid label"),
        ("qrels.train.tsv", "10 0 0 1 extra\n", r"qrels.train.tsv:1: wanted qid 0 docid label"),
        ("qrels.train.tsv", "10 0 0 1.0\n", r"qrels.train.tsv:1: wanted qid 0 docid label"),
        ("qrels.train.tsv", "10 0 0 --1\n", r"qrels.train.tsv:1: wanted qid 0 docid label"),
        ("qrels.train.tsv", "10 0 0 -\n", r"qrels.train.tsv:1: wanted qid 0 docid label"),
        ("qrels.train.tsv", "10 0 0 12345678901\n", r"qrels.train.tsv:1: wanted qid 0 docid label"),
    ],
)
def test_bad_line_of_msmarco_is_refused_with_its_place(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message) as error:
        read_msmarco(msmarco(tmp_path, name, value))
    assert type(error.value) is ValueError and str(error.value).startswith(str(tmp_path))


@pytest.mark.parametrize("name", MSMARCO)
def test_missing_file_of_msmarco_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"found no file .*{re.escape(name)}"):
        read_msmarco(msmarco(tmp_path, name, None))


# ------------------------------------------------------------------------------------------- fetch and unpack


def tar(members: dict[str, bytes], folder: str = "") -> bytes:
    """A .tar.gz with a directory, a link and files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        other = tarfile.TarInfo("directory/collection.tsv/")
        other.type = tarfile.DIRTYPE
        archive.addfile(other)
        for name, value in {**members, "notes.txt": b"x"}.items():
            item = tarfile.TarInfo(folder + name)
            item.size = len(value)
            archive.addfile(item, io.BytesIO(value))
    return packed.getvalue()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def web(monkeypatch):
    """A server on this machine: `files` to serve, paths `seen`, its `url`; `stop()` takes it off the network."""
    monkeypatch.setenv("no_proxy", "*")
    files, seen = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path[1:])
            found = files.get(self.path[1:])
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(found or b"")))
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop():
        server.shutdown()
        server.server_close()

    yield SimpleNamespace(files=files, seen=seen, url=f"http://127.0.0.1:{server.server_port}", stop=stop)
    stop()


@pytest.fixture
def genret_web(web, tmp_path, monkeypatch):
    """NQ320k's zip on that server, and a benchmark that knows its git blob id."""
    archive = pack(genret(tmp_path / "source"), tmp_path / "source.zip").read_bytes()
    web.files["nq320k.zip"] = archive
    archives = {"nq320k.zip": (f"{web.url}/", dict(git_blob=git_blob(archive)))}
    monkeypatch.setitem(BENCHMARKS, "nq320k", replace(BENCHMARKS["nq320k"], archives=archives))
    return web


@pytest.fixture
def msmarco_web(web, monkeypatch):
    """MS MARCO's archive and training labels there; `put(archive)` serves another."""

    def put(archive: bytes):
        web.files["collectionandqueries.tar.gz"] = archive
        checks = dict(md5=hashlib.md5(archive).hexdigest(), size=len(archive))
        labels = web.files["qrels.train.tsv"] = MSMARCO["qrels.train.tsv"].encode()
        archives = {
            "collectionandqueries.tar.gz": (f"{web.url}/", checks),
            "qrels.train.tsv": (f"{web.url}/", dict(md5=hashlib.md5(labels).hexdigest())),
        }
        monkeypatch.setitem(BENCHMARKS, "msmarco", replace(BENCHMARKS["msmarco"], archives=archives))

    web.put = put
    put(tar({name: text.encode() for name, text in MSMARCO.items()}))
    return web


def silent(line: str) -> None:
    pass


def test_nq320k_is_downloaded_once(genret_web, tmp_path):
    folder, lines = tmp_path / "new" / "folder", []
    first = content(published.read("nq320k", folder, lines.append))
    assert first == content(read_nq320k(tmp_path / "source"))
    assert genret_web.seen == ["nq320k.zip"] and any(f"{genret_web.url}/nq320k.zip" in line for line in lines)
    genret_web.stop()
    assert content(published.read("nq320k", folder, silent)) == first


def test_files_that_are_there_need_no_network_and_no_archive(genret_web, tmp_path):
    content(published.read("nq320k", tmp_path / "source", silent))
    assert genret_web.seen == [] and not (tmp_path / "source" / "nq320k.zip").exists()


def test_download_of_another_hash_is_refused_and_nothing_of_it_stays(genret_web, tmp_path):
    wanted = genret_web.files["nq320k.zip"]
    genret_web.files["nq320k.zip"] = pack(
        genret(tmp_path / "b", dev=[["other", 1]]), tmp_path / "b.zip"
    ).read_bytes()
    for _ in range(2):
        with pytest.raises(ValueError, match="git_blob .* wanted"):
            published.read("nq320k", tmp_path / "data", silent)
        assert list((tmp_path / "data").iterdir()) == []
    genret_web.files["nq320k.zip"] = wanted
    assert "dev1" in published.read("nq320k", tmp_path / "data", silent).test


def test_archive_that_lies_there_with_another_hash_is_not_read(genret_web, tmp_path):
    pack(genret(tmp_path / "b", dev=[["other", 1]]), tmp_path / "data" / "nq320k.zip")
    with pytest.raises(ValueError, match=r"data/nq320k.zip: git_blob .* once it is gone"):
        published.read("nq320k", tmp_path / "data", silent)
    assert genret_web.seen == []


@pytest.mark.parametrize("name, file", [("nq320k", "nq320k.zip"), ("msmarco", "collectionandqueries.tar.gz")])
def test_without_network_the_message_names_address_and_place(tmp_path, monkeypatch, name, file):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        monkeypatch.setitem(
            BENCHMARKS, name, replace(BENCHMARKS[name], archives={file: (url, dict(md5="0" * 32))})
        )
        with pytest.raises(ValueError) as error:
            published.read(name, tmp_path / "data", silent)
    assert url + file in str(error.value) and f"place the file at {tmp_path / 'data' / file}" in str(
        error.value
    )


def test_archives_have_addresses_and_whole_hashes():
    for benchmark in BENCHMARKS.values():
        for file, (address, checks) in benchmark.archives.items():
            assert address.startswith("https://") and address.endswith("/") and "/" not in file
            assert len(checks.get("git_blob", "0" * 40)) == 40 and len(checks.get("md5", "0" * 32)) == 32
            assert {"git_blob", "md5"} & set(checks)


def test_file_in_place_of_the_data_folder_is_refused(tmp_path):
    (tmp_path / "nq320k.zip").write_bytes(b"x")
    with pytest.raises(ValueError, match=f"wanted a folder, found a file; pass {tmp_path}"):
        published.read("nq320k", tmp_path / "nq320k.zip", silent)


def test_msmarco_is_downloaded_and_unpacked_once(msmarco_web, tmp_path):
    first = content(published.read("msmarco", tmp_path / "data", silent))
    assert first == content(read_msmarco(msmarco(tmp_path / "plain")))
    assert msmarco_web.seen == ["collectionandqueries.tar.gz"]  # which held the training labels too
    assert {file.name for file in (tmp_path / "data").iterdir()} == {*MSMARCO, "collectionandqueries.tar.gz"}
    msmarco_web.stop()
    (tmp_path / "data" / "collectionandqueries.tar.gz").unlink()
    assert content(published.read("msmarco", tmp_path / "data", silent)) == first


def test_archive_without_the_training_labels_is_enough_as_they_are_fetched_too(msmarco_web, tmp_path):
    members = {f"folder/{name}": MSMARCO[name].encode() for name in MSMARCO if name != "qrels.train.tsv"}
    msmarco_web.put(tar(members))
    read = published.read("msmarco", tmp_path / "data", silent)
    assert len(read.train) == 2 and msmarco_web.seen == ["collectionandqueries.tar.gz", "qrels.train.tsv"]


def test_large_archive_is_not_fetched_for_what_is_published_by_itself(msmarco_web, tmp_path):
    read = published.read("msmarco", msmarco(tmp_path, "qrels.train.tsv", None), silent)
    assert len(read.train) == 2 and msmarco_web.seen == ["qrels.train.tsv"]


def test_files_that_are_there_are_kept(msmarco_web, tmp_path):
    (tmp_path / "collection.tsv").write_text("0\tmine\n1\tmine\n7\tmine\n")
    read = published.read("msmarco", tmp_path, silent)
    assert list(read.documents.texts) == ["mine"] * 3 and len(read.test) == 2


def test_archive_without_a_member_is_refused_and_nothing_but_its_files_stays(msmarco_web, tmp_path):
    members = {f"./{name}": text.encode() for name, text in MSMARCO.items() if not name.startswith("queries")}
    msmarco_web.put(tar(members))
    with pytest.raises(ValueError, match="found no file .*queries.train.tsv"):
        published.read("msmarco", tmp_path / "data", silent)
    held = {path.name for path in (tmp_path / "data").iterdir()}
    assert held == {"collectionandqueries.tar.gz", *(name.removeprefix("./") for name in members)}


# ------------------------------------------------------------------------------------------ the authors' folders

PARTS = [{"3": "three\tand more", "1": "one", "8": "eight"}, {"5": "five", "0": "nought"}, {"4": "four"}]


def authors(folder: Path, parts=PARTS, cumulative: bool = False) -> Path:
    """The released code's folders; each document has a test query, D_0's an annotated one, all a generated one."""
    held = {}
    for t, own in enumerate(parts):
        held = held | own if cumulative else own
        pseudo = [{"doc_id": int(doc_id), "query": f"generated {doc_id}"} for doc_id in own]
        files = {
            "full_collection/raw.tsv": "".join(f"{doc_id}\t{text}\n" for doc_id, text in held.items()),
            "eval_queries/raw.tsv": "".join(f"{i}\ttest {doc_id}\n" for i, doc_id in enumerate(own)),
            "eval_queries/eval_qrel.json": {str(i): {doc_id: 1} for i, doc_id in enumerate(own)},
            "doc2query/query_to_docid.train.json": "".join(json.dumps(row) + "\n" for row in pseudo),
        }
        if t == 0:
            files["train_queries/raw.tsv"] = "".join(f"7{doc_id}\tannotated {doc_id}\n" for doc_id in own)
            files["train_queries/train_qrel.json"] = {f"7{doc_id}": {doc_id: 1} for doc_id in own}
        write(folder / f"d{t}", files)
    return folder


@pytest.mark.parametrize("cumulative", [False, True])
def test_authors_folders_give_the_corpora_in_their_order(tmp_path, cumulative):
    found = published.read("nq320k", authors(tmp_path, cumulative=cumulative), silent)
    assert found.notes == {"layout": "authors", "sizes": [3, 2, 1]}
    assert content(found)[:-2] == [
        ["3", "1", "8", "5", "0", "4"],
        [""] * 6,
        ["three and more", "one", "eight", "five", "nought", "four"],
        [("3", "annotated 3", "73"), ("1", "annotated 1", "71"), ("8", "annotated 8", "78")],
        {"d0.0": "test 3", "d0.1": "test 1", "d0.2": "test 8", "d1.0": "test 5", "d1.1": "test 0", "d2.0": "test 4"},
        {"d0.0": {"3": 1}, "d0.1": {"1": 1}, "d0.2": {"8": 1}, "d1.0": {"5": 1}, "d1.1": {"0": 1}, "d2.0": {"4": 1}},
        ["3", "1", "8", "5", "0", "4"],
    ]  # fmt: skip
    splits, spare = paper_split("nq320k", found)
    assert (splits, spare) == ("3,2,1", 0)
    corpora, left_out = data.split(found, splits, "auto", 5, spare)
    assert [list(corpus.ids) for corpus in corpora] == [list(part) for part in PARTS] and left_out == {}
    assert [sorted(corpus.test) for corpus in corpora] == [
        ["d0.0", "d0.1", "d0.2"],
        ["d1.0", "d1.1"],
        ["d2.0"],
    ]
    assert len(corpora[0].train) == 3


def test_generated_queries_of_the_authors_have_numbers_as_ids(tmp_path):
    found = read_authors(authors(tmp_path))
    pseudo = list(found.pseudo)
    assert [(doc_id, query) for _, doc_id, query in pseudo] == [
        (i, f"generated {i}") for part in PARTS for i in part
    ]
    assert pseudo[3][0] == f"{tmp_path / 'd1/doc2query/query_to_docid.train.json'}:1"


def test_generated_queries_must_be_there_for_every_part(tmp_path):
    (authors(tmp_path) / "d1" / "doc2query" / "query_to_docid.train.json").unlink()
    assert read_authors(tmp_path).pseudo is None


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "7", '"text"', "null", '{"doc_id": 1}', '{"query": "q"}', '{"doc_id": true, "query": "q"}',
     '{"doc_id": 1.0, "query": "q"}', '{"doc_id": 1, "query": ["q"]}', '{"doc_id": 1, "query": "\\ud800"}',
     '{"doc_id": ' + "9" * 5000 + ', "query": "q"}', "[" * 100_000],
)  # fmt: skip
def test_bad_line_of_generated_queries_is_refused_with_its_place(tmp_path, line):
    path = authors(tmp_path) / "d1" / "doc2query" / "query_to_docid.train.json"
    path.write_text('{"doc_id": "5", "query": "fine"}\n' + line + "\n")
    with pytest.raises(
        ValueError, match=r"malformed JSON|wanted \{doc_id, query\}|wanted the string fields query"
    ) as error:
        found = read_authors(tmp_path)
        assert len(list(found.pseudo)) == 5  # of 3, 1 and 1 lines that are well-formed
        found.problems.check()
    assert type(error.value) is ValueError and str(error.value).startswith(f"{path}:2: ")


def test_first_part_of_the_authors_alone_is_one_collection_that_we_split(tmp_path):
    found = read_authors(authors(tmp_path, PARTS[:1]))
    assert list(found.documents.ids) == ["3", "1", "8"] and found.order is None and len(found.train) == 3
    assert found.test == {"d0.0": "test 3", "d0.1": "test 1", "d0.2": "test 8"}
    assert paper_split("nq320k", found) == ("90,2.5,2.5,2.5,2.5", 0)


def test_part_that_adds_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"d2: adds no document to the 5 of the parts before it"):
        read_authors(authors(tmp_path, [*PARTS[:2], {"1": "one again"}]))


@pytest.mark.parametrize("t", [0, 1])
def test_part_that_is_lacking_is_named(tmp_path, t):
    (authors(tmp_path) / f"d{t}").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"found no file .*d{t}/full_collection/raw.tsv"):
        published.read("nq320k", tmp_path, silent)


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "d1/eval_queries/eval_qrel.json",
            {"0": {"99": 1}},
            r"query '0': label of a missing document \('99'\)",
        ),
        (
            "d0/train_queries/train_qrel.json",
            {"71": {"99": 0}},
            r"query '71': label of a missing document \('99'\)",
        ),
        (
            "d1/eval_queries/eval_qrel.json",
            {"9": {"5": 1}},
            r"query '9': label of a missing query \('9'\)",
        ),
        ("d1/eval_queries/eval_qrel.json", {"0": ["5"]}, r"query '0': wanted .*\{docid: label\}"),
        ("d1/eval_queries/eval_qrel.json", {"0": {"5": "1"}}, r"query '0': wanted .*\{docid: label\}"),
        ("d1/eval_queries/eval_qrel.json", [["0", {"5": 1}]], r"wanted a JSON object \{qid"),
        ("d1/eval_queries/eval_qrel.json", b'{"0": {"5": 1}', r"eval_qrel.json: malformed or cut JSON"),
        ("d1/full_collection/raw.tsv", "5 five\n", r"raw.tsv:1: wanted an id, a tab"),
    ],
)
def test_bad_file_of_the_authors_is_refused_by_name(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message) as error:
        read_authors(write(authors(tmp_path), {name: value}))
    assert str(tmp_path / name.split("/")[0]) in str(error.value)


@pytest.mark.parametrize("name", ["eval_queries/raw.tsv", "eval_queries/eval_qrel.json"])
def test_missing_test_file_of_the_authors_is_named(tmp_path, name):
    (authors(tmp_path) / "d1" / name).unlink()
    with pytest.raises(ValueError, match=f"found no .*d1/{re.escape(name)}"):
        read_authors(tmp_path)


def test_label_0_of_the_authors_is_not_relevant(tmp_path):
    labels = {"0": {"5": 0}, "1": {"0": 2, "5": 0}}
    found = read_authors(write(authors(tmp_path), {"d1/eval_queries/eval_qrel.json": labels}))
    assert {qid: labels for qid, labels in found.qrels.items() if qid[1] == "1"} == {"d1.1": {"0": 2}}


# --------------------------------------------------------------------------------------------- docids from a file


def test_docids_are_read_in_the_order_asked_for_without_a_leading_minus_one(tmp_path):
    write(tmp_path, {"docids.json": {"b": [-1, 0, 255], "a": [3, 4], "unasked": [5, 6]}})
    assert read_docids(tmp_path / "docids.json", ["a", "b"], 2, 256) == [[3, 4], [0, 255]]


@pytest.mark.parametrize(
    "codes",
    [[1], [1, 2, 3], [-1, 1], [-1, -1, 1], [1, -1], [1, 256], [1.0, 2], ["1", "2"], [None, 1], [[1], [2]], [], "12", 12,
     None, {"0": 1, "1": 2}],
)  # fmt: skip
def test_docid_of_another_length_or_range_is_refused(tmp_path, codes):
    path = write(tmp_path, {"docids.json": {"a": [1, 2], "b": codes}}) / "docids.json"
    with pytest.raises(ValueError, match=r"docids.json: document 'b': wanted M=2 codes below K=256, found"):
        read_docids(path, ["a", "b"], 2, 256)


def test_document_without_a_docid_is_named(tmp_path):
    path = write(tmp_path, {"docids.json": {"a": [1, 2]}}) / "docids.json"
    with pytest.raises(ValueError, match="document 'x': wanted M=2 codes below K=256, found None"):
        read_docids(path, ["a", "x", "y"], 2, 256)


@pytest.mark.parametrize("value", [[[1, 2]], [7], "text", b'{"a": [1, 2]'])
def test_docid_file_of_another_form_is_refused(tmp_path, value):
    path = write(tmp_path, {"docids.json": value}) / "docids.json"
    with pytest.raises(
        ValueError, match=r"docids.json: (found|malformed).* wanted a JSON object \{docid"
    ) as error:
        read_docids(path, ["a"], 2, 256)
    assert type(error.value) is ValueError


# ---------------------------------------------------------------------------------------------------- the split


def test_sizes_of_the_paper_add_up_to_what_it_states():
    nq, marco = BENCHMARKS["nq320k"], BENCHMARKS["msmarco"]
    assert (sum(nq.documents), sum(nq.test_queries)) == (109_715, 7_830)
    assert (sum(marco.documents), sum(marco.test_queries)) == (8_841_823, 6_955)
    for paper in (nq, marco):
        assert len(paper.documents) == len(paper.pseudo_queries) == len(paper.test_queries) == 5
        d0 = paper.documents[0] / sum(paper.documents)
        assert d0 == pytest.approx(0.9, abs=1e-4) and paper.documents[4] / sum(paper.documents) > 0.0249


def collection_of(n: int, **notes) -> Collection:
    """n documents, each with a test query and an annotated one."""
    documents = Documents()
    for i in range(n):
        documents.add(f"x{i}", "", f"text {i}")
    train = [(f"x{i}", f"annotated {i}", f"t{i}") for i in range(n)]
    qrels = {f"q{i}": {f"x{i}": 1} for i in range(n)}
    return Collection(documents.close(), train, {qid: f"test {qid}" for qid in qrels}, qrels, notes=notes)


@pytest.fixture
def tiny(monkeypatch):
    """A benchmark of 14 documents."""
    benchmark = replace(
        BENCHMARKS["nq320k"], documents=(6, 2, 2, 2, 2), test_queries=(3, 1, 1, 1, 1), note="copies differ"
    )
    monkeypatch.setitem(BENCHMARKS, "tiny", benchmark)


def cut(collection: Collection, seed: int = 0) -> tuple[list[Corpus], dict]:
    splits, spare = paper_split("tiny", collection)
    return data.split(collection, splits, "auto", seed, spare)


@pytest.mark.parametrize("n", [14, 15, 100])
def test_enough_documents_are_split_into_the_paper_s_sizes_and_the_rest_is_counted(tiny, n):
    collection = collection_of(n)
    assert paper_split("tiny", collection) == ("6,2,2,2,2", n - 14)
    corpora, left_out = cut(collection)
    assert [len(corpus.ids) for corpus in corpora] == [6, 2, 2, 2, 2]
    spare = {
        "documents beyond the sizes of the split": n - 14,
        "test queries of documents left out": n - 14,
        "annotated queries of documents outside D0": n - 6,
    }
    assert left_out == {reason: count for reason, count in spare.items() if count}


def test_seed_draws_the_split():
    one, same, other = (
        [list(c.ids) for c in data.split(collection_of(40), "30,10", "auto", s)[0]] for s in (1, 1, 2)
    )
    assert one == same != other


@pytest.mark.parametrize("n", [1, 13])
def test_too_few_documents_are_split_in_the_paper_s_proportions(tiny, n):
    assert paper_split("tiny", collection_of(n)) == ("90,2.5,2.5,2.5,2.5", 0)


def test_authors_sizes_come_before_the_paper_s(tiny):
    assert paper_split("tiny", collection_of(20, sizes=[11, 5, 4])) == ("11,5,4", 0)
    assert paper_split("my/folder", collection_of(20, sizes=[11, 5, 4])) == ("11,5,4", 0)


def test_paper_split_of_other_data_is_refused():
    with pytest.raises(
        ValueError, match="--splits paper: wanted --data nq320k or msmarco.*, found --data my/folder"
    ):
        paper_split("my/folder", collection_of(20))


def test_manifest_puts_what_was_found_beside_the_paper(tiny):
    collection = collection_of(17, layout="GenRet")
    found = manifest("tiny", collection, cut(collection)[0])
    assert found["found"] == {
        "documents": [6, 2, 2, 2, 2],
        "documents in the files": 17,
        "test queries": [6, 2, 2, 2, 2],
        "annotated queries of D0": 6,
        "layout": "GenRet",
    }
    assert found["paper"]["documents"] == [6, 2, 2, 2, 2] and found["paper"]["test queries"] == [
        3,
        1,
        1,
        1,
        1,
    ]
    assert found["paper"]["annotated queries of D0"] == 276_493
    assert found["paper"]["pseudo-queries"] == list(BENCHMARKS["nq320k"].pseudo_queries)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    "n, splits, notes, why",
    [
        (14, "6,2,2,2,2", {}, "^documents as in the paper .*drawn with a seed"),
        (14, "6,2,2,2,2", {"sizes": [6, 2, 2, 2, 2]}, "^documents as in the paper, split as the authors"),
        (14, "5,3,2,2,2", {}, "^another copy: copies differ"),
        (13, "5,2,2,2,2", {}, "^another copy: copies differ"),
        (12, "4,2,2,2,2", {}, "^a sample"),
    ],
)
def test_manifest_says_why_numbers_differ(tiny, n, splits, notes, why):
    collection = collection_of(n, **notes)
    assert re.search(
        why, manifest("tiny", collection, data.split(collection, splits, "auto", 0)[0])["difference"]
    )


def test_manifest_of_other_data_has_no_paper_beside_it():
    collection = collection_of(10)
    assert list(manifest("my/folder", collection, data.split(collection, "5,5", "auto", 0)[0])) == ["found"]


@needs_sample
def test_sample_splits_into_five_corpora_without_a_leak(tmp_path):
    collection = read_nq320k(SAMPLE)
    splits, spare = paper_split("nq320k", collection)
    corpora, left_out = data.split(collection, splits, "auto", 42, spare)
    assert [len(corpus.ids) for corpus in corpora] == [537, 15, 15, 15, 15]
    assert all(corpus.test for corpus in corpora) and sum(len(corpus.test) for corpus in corpora) == 300
    assert 0 < len(corpora[0].train) == 300 - sum(left_out.values())
    documents = [(corpus.ids, corpus.titles, corpus.texts) for corpus in corpora]
    excluded = data.excluded_queries(corpora)
    counts = store_pseudo_queries(collection.pseudo, tmp_path, documents, excluded)
    for t, corpus in enumerate(corpora):
        data.check_no_leak(t, corpus.rows, corpus.train, excluded)
        stored = ListedPseudoQueries(tmp_path / f"D{t}", corpus.first_row)
        data.check_no_leak(t, corpus.rows, stored.pairs(), excluded)
    assert counts["kept"] + counts["left out as test queries"] == 4647
    assert manifest("nq320k", collection, corpora)["difference"].startswith("a sample")
