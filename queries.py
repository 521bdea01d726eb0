"""Words, their IDF, and pseudo-queries: what a document may be asked, made from its own text or listed in a file.

Paper    section 4: later corpora have no annotated queries, so docT5query writes some for each document
In       titles and texts of documents; triples (place, document id, query) of a file; digests of the test queries
Out      samplers whose draw(row, rng) gives a query of a document; lists of (row, query); fragments of documents
Next     dense.py and train.py train on them; bm25.py and topics.py count the words
Differs  in place of docT5query the default draws from the document's own words; fragments are ours

It takes texts, not corpora: what a stage may see is what it is handed.
"""

import hashlib
import random
import re
import shutil
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from math import log1p
from pathlib import Path
from unicodedata import category, normalize

import numpy as np

import arrays
from arrays import Chain, ItemsWriter, Strings

QUESTION_WORDS = (
    "is are was were do does did can could has have will would should who what when where which how".split()
)


# A combining mark belongs to the letter before it, and joiners stand inside words (Unicode's UAX 29, in spirit). Only the
# blocks that hold marks are looked at: all below U+1F000.
MARKS = "".join(c for c in map(chr, range(0x300, 0x1F000)) if category(c)[0] == "M") + "\u200c\u200d"
WORD = re.compile(rf"[\w{MARKS}]+(?:['’.-][\w{MARKS}]+)*(?:\+\+|#)?")
# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana and Chinese characters
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
RUN = re.compile(rf"[{UNSPACED}{MARKS}]+|[^{UNSPACED}]+")
UNSPACED_LETTER = re.compile(f"[{UNSPACED}]")
LETTER = re.compile(rf".[{MARKS}]*", re.S)  # with its marks
SENTENCE_MARKS = "?!.,;:\"'`“”‘’«»()[]{}…¿¡،؛؟۔।॥、。，．！？；：「」『』（）"


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits; of a script without spaces a whole clause, which `terms` and `units` cut."""
    return WORD.findall(text)


def terms(text: str) -> Iterator[str]:
    """What BM25, IDF and topics count: words, folded (NFKC, case), and overlapping pairs of letters of scripts without
    spaces.
    """
    for word in words(fold(text)):
        for run in RUN.findall(word):
            letters = LETTER.findall(run) if is_unspaced(run[0]) else [run]
            yield from map("".join, zip(letters, letters[1:])) if len(letters) > 1 else letters


def units(text: str) -> list[str]:
    """What a pseudo-query is put together from: words, and two letters at a time of scripts without spaces."""
    pieces = []
    for word in words(text):
        runs = RUN.findall(word) if UNSPACED_LETTER.search(word) else [word]
        for run in runs:
            letters = LETTER.findall(run) if is_unspaced(run[0]) else [run]
            pieces += ["".join(letters[i : i + 2]) for i in range(0, len(letters), 2)]
    return pieces


def is_unspaced(letter: str) -> bool:
    return UNSPACED_LETTER.match(letter) is not None


def joined(pieces: list[str]) -> str:
    """Neighbouring units as text: with a space between them, but within scripts without spaces."""
    text = pieces[0] if pieces else ""
    for before, piece in zip(pieces, pieces[1:]):
        text += piece if is_unspaced(before[0]) and is_unspaced(piece[0]) else f" {piece}"
    return text


def fold(text: str) -> str:
    """In one width and one case (NFKC, case folding)."""
    return text.lower() if text.isascii() else normalize("NFKC", text).casefold()


def normalise(query: str) -> str:
    """The form in which two queries count as the same: folded, single spaces, without the marks of a sentence."""
    stripped = (word.strip(SENTENCE_MARKS) for word in fold(query).split())
    return " ".join(word for word in stripped if word)


def query_digest(query: str) -> int:
    """64 bits that two queries share where they count as the same."""
    return int.from_bytes(hashlib.blake2b(normalise(query).encode(), digest_size=8).digest())


def passages(titles: Iterable[str], texts: Iterable[str]) -> Iterator[str]:
    """Title and text in one string, one per document: what is embedded and indexed."""
    for title, text in zip(titles, texts):
        yield f"{title}. {text}" if title else text


def count_terms(texts: Iterable[str]) -> tuple[int, dict[str, int], np.ndarray, np.ndarray, np.ndarray]:
    """How many texts; a number for each term; and of each term of each text: the text's row, number and count."""
    vocabulary: dict[str, int] = {}
    distinct, numbers, counts = array("i"), array("i"), array("i")
    for text in texts:
        times = Counter(terms(text))
        numbers.extend(vocabulary.setdefault(term, len(vocabulary)) for term in times)
        counts.extend(times.values())
        distinct.append(len(times))
    rows = np.repeat(np.arange(len(distinct), dtype=np.int32), distinct)
    return len(distinct), vocabulary, rows, np.array(numbers, np.int32), np.array(counts, np.int32)


class Idf:
    """Inverse document frequency, ln(1 + N / n), over some passages; an unseen term counts as n = 1/2."""

    def __init__(self, passages: Iterable[str] = ()):
        self.n_documents, vocabulary, _, numbers, _ = count_terms(passages)
        documents = np.bincount(numbers, minlength=len(vocabulary)).tolist()
        self.counts = dict(zip(vocabulary, documents))

    def __call__(self, word: str) -> float:
        """That of the word's rarest term."""
        rarest = min((self.counts.get(term, 0) for term in terms(word)), default=0)
        return log1p(self.n_documents / (rarest or 0.5))

    def save(self, path: Path) -> None:
        arrays.write_json(path, {"documents": self.n_documents, "counts": self.counts})

    @classmethod
    def load(cls, path: Path) -> "Idf":
        """What `save` wrote. Raises ValueError where the file is missing or holds something else."""
        value, idf = arrays.read_json(path), cls()
        with arrays.reading(path):
            idf.n_documents, idf.counts = value["documents"], dict(value["counts"])
            if not all(type(n) is int and 0 < n < 2**63 for n in (idf.n_documents, *idf.counts.values())):
                raise ValueError("a count is no number from 1 to 2^63")
        return idf


# ---------------------------------------------------------------------------------------------- drawn from a text


class PseudoQuerySampler:
    """Draws pseudo-queries from a document's own words, anew at every call.

    One in four is a crop of 5 to 14 words of a sentence. The others are up to 7 words of a window of 40, drawn
    by inverse document frequency and kept in text order, mostly with words of the title somewhere between and,
    where the words are in ASCII, sometimes led by an English question word. In scripts without spaces two letters
    stand for a word. A query whose digest is `excluded`, as those of test queries are, is never returned.
    """

    def __init__(self, titles: Sequence, texts: Sequence, idf: Idf, excluded=frozenset(), first_row: int = 0):
        self.titles, self.texts, self.idf, self.excluded = titles, texts, idf, excluded
        self.rows = range(first_row, first_row + len(titles))
        self._document = lru_cache(maxsize=32_768)(self._document)

    def _document(self, row: int) -> tuple[list[str], list[str], list[float], list[list[str]]]:
        """A document's title words, words, their weights, and its sentences as words."""
        i = row - self.rows.start
        title, text = units(self.titles[i]), self.texts[i]
        document = units(text) or title
        parts = re.split(r"(?<=[.!?।॥])\s+|(?<=[。！？])", text)
        sentences = [s for s in map(units, parts) if len(s) >= 5] or [document]
        return title, document, [self.idf(word) for word in document], sentences

    def draw(self, row: int, rng: random.Random) -> str:
        """One pseudo-query of the document in this row of the stream, which has a word.

        A document whose words are no more than an excluded query is asked for by these words twice.
        """
        assert row in self.rows, f"row {row} is of another corpus than {self.rows}"
        title, document, weights, sentences = self._document(row)
        assert document, f"row {row} has no word, which reading refuses"
        for _ in range(20):
            if rng.random() < 0.25:
                query = joined(self._crop(sentences, rng))
            else:
                query = " ".join(self._keywords(title, document, weights, rng))
            if query_digest(query) not in self.excluded:
                return query
        return f"{query} {query}"

    @staticmethod
    def _crop(sentences: list[list[str]], rng: random.Random) -> list[str]:
        sentence = rng.choice(sentences)
        length = rng.randint(5, 14)
        start = rng.randint(0, max(0, len(sentence) - length))
        return sentence[start : start + length]

    @staticmethod
    def _keywords(title: list[str], document: list[str], weights: list[float], rng) -> list[str]:
        start = rng.randint(0, max(0, len(document) - 20))
        window = range(start, min(start + 40, len(document)))
        chosen = sorted(set(rng.choices(window, weights[window.start : window.stop], k=rng.randint(2, 7))))
        query = [document[j] for j in chosen]
        if title and rng.random() < 0.7:
            keep = rng.choice((0.5, 0.8, 1.0))
            kept = [word for word in title if rng.random() < keep]
            place = rng.randint(0, len(query))
            query = query[:place] + kept + query[place:]
        if rng.random() < 0.5 and all(map(str.isascii, query)):
            query = [rng.choice(QUESTION_WORDS), *query]
        return query


def draw_pseudo_queries(sampler, rows: Iterable[int], per_document: int, seed: str) -> list[tuple[int, str]]:
    """A fixed list of (row, query), `per_document` for each row; the same seed gives the same list."""
    rng = random.Random(seed)
    return [(row, sampler.draw(row, rng)) for row in rows for _ in range(per_document)]


def has_word(text: str) -> bool:
    """Is there a letter or a digit, without which nothing can be drawn, indexed or asked?"""
    return re.search(r"[^\W_]", text) is not None


def fragments(titles: Iterable, texts: Iterable, per_document: int, rng: random.Random) -> tuple[list, list]:
    """Titles and texts of spans of 25 to 100 words of the documents; half of them keep the title. Ours."""
    kept, spans = [], []
    for title, text in zip(titles, texts):
        unspaced = 3 * len(UNSPACED_LETTER.findall(text)) > len(text)  # not for a foreign name in a page
        document = units(text) if unspaced else text.split() or title.split()
        for _ in range(per_document):
            length = rng.randint(25, 100)
            start = rng.randint(0, max(0, len(document) - length))
            kept.append(title if rng.random() < 0.5 else "")
            part = document[start : start + length]
            span = joined(part) if unspaced else " ".join(part)
            spans.append(span if has_word(span) else f"{title} {text}")  # not a row of dots
    return kept, spans


# ------------------------------------------------------------------------------------------------ listed in a file


class ListedPseudoQueries:
    """A corpus's pseudo-queries that came from a file, on disk, sorted by document."""

    def __init__(self, folder: Path, first_row: int = 0):
        self.queries, self.first_row = Strings.open(folder / "queries.bin"), first_row
        self.starts = arrays.read_array(folder / "starts.npy", np.int64, 1)  # (N + 1,)

    def _span(self, row: int) -> range:
        i = row - self.first_row
        return range(int(self.starts[i]), int(self.starts[i + 1]))

    def draw(self, row: int, rng: random.Random) -> str:
        """One of the document's pseudo-queries."""
        return self.queries[rng.choice(self._span(row))]

    def pairs(self) -> list[tuple[int, str]]:
        """All (row, query), by row."""
        rows = range(self.first_row, self.first_row + len(self.starts) - 1)
        return [(row, self.queries[i]) for row in rows for i in self._span(row)]


def store_pseudo_queries(
    queries, folder: Path, documents: list, excluded: frozenset, problems=None
) -> Counter:
    """Keeps (place, document id, query) triples for ListedPseudoQueries, in a folder D0, D1, .. for each corpus.

    `documents` are ids, titles and texts of each corpus; queries whose digest is `excluded` are left out. Returns counts
    of what was kept, left out and made up.

    Raises ValueError with all queries without a word or of an unknown document, and all documents without a query, by
    the reading.Problems of the file. Published files, which come without, have some: as with --skip_invalid these are
    left out, and such a document gets its own first words.
    """
    shutil.rmtree(folder, ignore_errors=True)
    ids, titles, texts = map(Chain, zip(*documents))
    writers = [ItemsWriter(folder / f"D{t}" / "queries.bin") for t in range(len(documents))]
    rows, counts = [array("q") for _ in documents], Counter()
    row_of = {doc_id: row for row, doc_id in enumerate(ids)}
    asked = np.zeros(len(ids), bool)

    def keep(row: int, query: str, reason: str) -> None:
        t = bisect_right(ids.ends, row)
        writers[t].add(query.encode())
        rows[t].append(row)
        asked[row] = True
        counts[reason] += 1

    place = "pseudo-queries"
    for place, doc_id, query in queries:
        row = row_of.get(doc_id)
        if row is None or not has_word(query):
            counts["left out: without a word, or of documents left out"] += 1
            if problems:
                wrong = "of a missing document" if row is None else "without a word"
                problems.add(place, f"pseudo-query {wrong}", repr(doc_id))
        elif query_digest(query) in excluded:
            counts["left out as test queries"] += 1
        else:
            keep(row, query, "kept")
    missing = np.flatnonzero(~asked).tolist()
    if problems and not problems.skip:
        for row in missing:
            problems.add(place.rpartition(":")[0] or place, "document without a pseudo-query", repr(ids[row]))
        problems.check()
    for row in missing:
        first = words(f"{titles[row]} {texts[row]}")[:12]
        shorter = (" ".join(first[:n]) for n in range(len(first), 0, -1))
        free = (query for query in shorter if query_digest(query) not in excluded)
        keep(row, next(free, " ".join(2 * first)), "made of a document's first words, where it had none")
    for t, end in enumerate(ids.ends):
        by_row = np.array(rows[t], np.int64)
        order = np.argsort(by_row, kind="stable")
        writers[t].close(order)
        first_rows = np.arange(end - len(ids.parts[t]), end + 1)
        starts = np.searchsorted(by_row[order], first_rows)
        arrays.write_array(writers[t].path.with_name("starts.npy"), starts)
    return counts
