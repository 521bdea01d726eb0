"""Lines, JSON, documents and labels of files that others wrote, and all that may be wrong in them.

Paper    none
In       files in the layouts of BEIR, BoolQ, GenRet, MS MARCO and the released code
Out      (place, content) of what is well-formed; Problems, which hold what is not until everything is read
Next     data.py and published.py make collections of it
Differs  the released code reads files as they come

A reader hands one Problems to everything that it calls, so that a user sees all of a folder's problems in one message.
"""

import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from arrays import Documents
from queries import has_word

NO_ID = re.compile(r"^$|[\s\x00-\x1f\x7f-\x9f]")  # empty, or would break a line or a column of a TREC file


TO_DO = ". Repair the files, or pass --skip_invalid to leave all of this out"


class Problems:
    """What is wrong in the files of a source: all of it in one error at the end, or left out and counted.

    `skip` leaves out; `at_once` raises at the first, for readers of which nobody asks at the end.
    """

    def __init__(self, skip: bool = False, at_once: bool = False):
        self.skip, self.at_once, self.listed, self.counts = skip, at_once, [], Counter()

    def add(self, place: str | Path, reason: str, shown) -> None:
        """`reason` is the kind that is counted, `shown` the id or whatever else tells this one from others."""
        said = f"{place}: {reason} ({shown!s:.200})"
        if self.at_once:
            raise ValueError(said)
        self.counts[reason] += 1
        if len(self.listed) < 10:
            self.listed.append(said)

    def check(self) -> None:
        """Raises ValueError with the first ten, and counts of all where there are more, unless they are left out."""
        if self.counts and not self.skip:
            kinds = ", ".join(f"{count} x {reason}" for reason, count in self.counts.items())
            more = self.counts.total() - len(self.listed)
            rest = f"; and {more} more (in all {kinds})" if more else ""
            raise ValueError(f"{'; '.join(self.listed)}{rest}{TO_DO}")


AT_ONCE = Problems(at_once=True)


def read_lines(path: Path, problems: Problems = AT_ONCE) -> Iterator[tuple[str, str]]:
    """(place, line) of every non-blank line in UTF-8; place is `path:number`. Raises ValueError without the file."""
    if not path.is_file():
        raise ValueError(f"found no file {path}; docs/data.md lists the files of each layout")
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            except UnicodeDecodeError as error:
                problems.add(f"{path}:{number}", "not UTF-8", error.reason)
                continue
            if line.strip():
                yield f"{path}:{number}", line


def parse_json(text: str, **how):
    """A JSON value. Raises ValueError where it is malformed, or holds half surrogates or numbers of 4,300 digits."""
    try:
        value = json.loads(text, **how)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError(str(error)) from None
    return value


def read_jsonl(path: Path, keys: tuple[str, ...], problems: Problems = AT_ONCE) -> Iterator[tuple[str, dict]]:
    """(place, object) of every line; `keys` are strings in each."""
    for place, line in read_lines(path, problems):
        try:
            row = parse_json(line)
        except ValueError as error:
            problems.add(place, "malformed JSON", error)
            continue
        if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys):
            yield place, row
        else:
            problems.add(place, f"wanted the string fields {', '.join(keys)}", f"found {line[:80]!r}")


def read_documents(path: Path, problems: Problems = AT_ONCE) -> Iterator[tuple[str, str, str, str]]:
    """(place, id, title, text) of BEIR lines. Title and text may be null or NaN, which is empty; a title may be absent."""
    for place, row in read_jsonl(path, ("_id",), problems):
        fields = {"title": row.get("title"), "text": row.get("text", False)}
        fields = {name: "" if value is None or value != value else value for name, value in fields.items()}
        wrong = [name for name, value in fields.items() if not isinstance(value, str)]
        for name in wrong:
            problems.add(place, f"{name} that is no string", f"of document {row['_id']!r}")
        if not wrong:
            yield place, row["_id"], " ".join(fields["title"].split()), fields["text"].strip()


def read_pseudo_queries(path: Path, problems: Problems = AT_ONCE) -> Iterator[tuple[str, str, str]]:
    """(place, document id, query) of JSON lines {"doc_id", "query"}, as tools/doc2query.py writes them."""
    for place, row in read_jsonl(path, ("doc_id", "query"), problems):
        yield place, row["doc_id"], row["query"]


def read_qrels(path: Path, problems: Problems = AT_ONCE) -> Iterator[tuple[str, str, str, int]]:
    """(place, query id, document id, relevance) of a BEIR tab-separated file; its header line is optional."""
    for place, line in read_lines(path, problems):
        cells = line.split("\t")
        if len(cells) == 3 and re.fullmatch(r"-?\d{1,9}", cells[2].strip()):
            yield place, cells[0], cells[1], int(cells[2])
        elif cells[0] != "query-id":
            problems.add(place, "wanted query-id<TAB>corpus-id<TAB>integer score", f"found {line[:80]!r}")


def add_document(documents: Documents, problems: Problems, place, doc_id: str, title: str, text: str) -> bool:
    """Adds a document that can be indexed and told from the others; False, and a problem, otherwise."""
    if NO_ID.search(doc_id):
        problems.add(place, "document id that is empty or has white space", repr(doc_id))
    elif not has_word(f"{title} {text}"):
        problems.add(place, "document without a word", repr(doc_id))
    elif documents.add(doc_id, title, text):
        return True
    else:
        problems.add(place, "duplicate document id", repr(doc_id))
    return False


def read_labelled(sets: list, queries: Iterable, documents: Documents, problems: Problems) -> list[list]:
    """Of each set of labels (place, query id, document id, relevance), (document id, query, query id, relevance) of those
    above 0, with the texts of `queries` (place, id, text). A pair that stands twice in a set counts once; another label
    of it is a problem.
    """
    sets, texts = [list(rows) for rows in sets], {}
    asked, answered = {query_id for rows in sets for _, query_id, _, _ in rows}, [[] for _ in sets]
    for place, query_id, text in queries:
        if NO_ID.search(query_id):
            problems.add(place, "query id that is empty or has white space", repr(query_id))
        elif query_id in texts:
            problems.add(place, "duplicate query id", repr(query_id))
        elif query_id in asked and not has_word(text):
            problems.add(place, "query without a word", repr(query_id))
        else:
            texts[query_id] = text.strip() if query_id in asked else ""
    for kept, rows in zip(answered, sets):
        labels: dict[tuple[str, str], int] = {}
        for place, query_id, doc_id, relevance in rows:
            if (pair := (query_id, doc_id)) in labels:  # once more, which changes nothing
                if relevance != labels[pair]:
                    problems.add(place, "another label of a pair", repr(pair))
                continue
            labels[pair] = relevance
            if doc_id not in documents.row_of:
                problems.add(place, "label of a missing document", repr(doc_id))
            elif query_id not in texts:
                problems.add(place, "label of a missing query", repr(query_id))
            elif relevance > 0:
                kept.append((doc_id, texts[query_id], query_id, relevance))
    return answered


def settled(collection, source: Path, tested: bool = True):
    """What a reader returns: a data.Collection whose files had no problems, or from which they are left out; with test
    queries where it is to be `tested`.
    """
    collection.documents.close()
    if collection.problems.counts and not collection.problems.skip:
        deque(collection.pseudo or (), maxlen=0)  # whose problems belong into the same message
    collection.problems.check()
    if not len(collection.documents):
        raise ValueError(f"{source}: found no document")
    if tested and not collection.test:
        raise ValueError(f"{source}: found no relevant pair of a test query; wanted one or more")
    return collection
