"""A living index in Python: train it on documents, add, delete and search them, and open it again later.

Paper    section 2: the index is the model, and grows by corpora D_1, D_2, ..
In       documents (id, title, text), queries
Out      an Index over a run folder, whose answers are Hits
Next     serve.py shows it; train.py, extend.py and search.py do the work, on the files that the commands write
Differs  ours: the released code has no interface

>>> index = Index.train([("d1", "Moon", "Can you shine a laser at it? ..."), ...], folder="runs/mine")
>>> index.search("laser moon")
[Hit(id='d1', score=-0.3, title='Moon'), ...]
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import arrays
import command
import extend
import mixlora
import reading
import search
import store
import train
from config import SMALL, parse, saved_config

Document = tuple[str, str, str]  # id, title, text


@dataclass(frozen=True)
class Hit:
    """A document that a search found: its id, sum_m log p_m of its docid (at most 0), and its title or first words."""

    id: str
    score: float
    title: str


class Index:
    """The documents of a run folder and the model that finds them, as they are after its newest finished corpus.

    Of one process. Others may search the same folder while one adds: each call sees what is finished by then.
    """

    def __init__(self, folder: str | Path, device: str = "cpu"):
        self.folder = Path(folder).absolute()  # the caller may change the working directory
        self.device, self.seen = command.check_device(device), None
        self.refresh()

    @classmethod
    def open(cls, folder: str | Path, device: str = "cpu") -> "Index":
        """The index in a run folder, as train.py or Index.train left it. Texts stay on disk.

        Raises ValueError where the folder holds no finished corpus.
        """
        return cls(folder, device)

    @classmethod
    def train(
        cls,
        documents: Iterable[Document],
        folder: str | Path,
        method: str = "mixlora-dsi",
        queries: Iterable[tuple[str, str]] = (),
        device: str = "cpu",
        **settings,
    ) -> "Index":
        """A new index of these documents, which become D_0: two or more.

        Args:
            documents: (id, title, text) each; a title may be empty.
            method: mixlora-dsi, paper or dream; others take no further documents.
            queries: (text, document id) pairs, from which the bi-encoder learns; the docid model trains on what is
                drawn from the texts.
            settings: of config.Config, as d0_steps=2000. Where not given, K, vocabulary and steps follow from the
                number of documents.

        Raises ValueError where a document is empty, an id stands twice, a setting is unknown, or the folder holds a run.
        """
        if method not in extend.METHODS:
            raise ValueError(
                f"method {method!r}: an index takes documents in, so one of {', '.join(extend.METHODS)}"
            )
        if own := settings.keys() & {"data", "run", "splits"}:
            names = ", ".join(sorted(own))
            raise ValueError(f"{names}: follows from the documents and the folder; leave it out")
        with beir_folder(documents, queries) as (place, n):
            steps = {name: round(extend.steps_scale(n) * SMALL[name]) for name in extend.STEPS}
            flags = f"--method {method} --splits 100 --no-baselines".split()
            flags += ["--data", str(place), "--run", str(folder)]
            for name, value in (steps | {"M": SMALL["M"], "device": device} | settings).items():
                flags.append(f"--no-{name}" if value is False else f"--{name}")
                flags += [] if isinstance(value, bool) else [str(value)]
            train.execute(parse(flags), quiet=True)
        return cls(folder, device)

    def refresh(self) -> None:
        """Takes up what another process, `add` or `delete` has finished; whatever searches or reads calls it first."""
        while (state := self.state_on_disk()) != self.seen:
            try:
                self.load()
                self.seen = state
            except ValueError:  # a checkpoint may have made way for a newer one in the meantime
                if state == self.state_on_disk():
                    raise

    def state_on_disk(self) -> list[tuple[int, int] | None]:
        """Changes with each corpus that is finished, and with each deletion."""
        files = [self.folder / name for name in ("stages.json", "deleted.npy")]
        return [(path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None for path in files]

    def load(self) -> None:
        """The documents, and the newest checkpoint, of the folder."""
        run = store.LoadedRun(self.folder, self.device)
        t = run.finished[-1]
        live = store.live_rows(self.folder, run.corpora[: t + 1])
        self.model, self.stats = store.load_model(self.folder / f"D{t}.pt", self.device)
        mixlora.fold(self.model)
        self.run, self.live, self.trie = run, live, store.Trie(run.docids[live], live)
        self.row_of = {run.ids[row]: row for row in live.tolist()}

    def search(self, query: str | Sequence[str], k: int = 10) -> list[Hit] | list[list[Hit]]:
        """The k best documents of a query, best first; of a list of queries, a list for each.

        Raises ValueError where k is below 1 or a query is no string, or an empty one.
        """
        self.refresh()
        several = isinstance(query, Iterable) and not isinstance(query, str)
        queries, config = list(query) if several else [query], self.run.config
        if k < 1:
            raise ValueError(f"k = {k}: wanted a positive number of documents")
        for text in queries:
            if not isinstance(text, str):
                raise ValueError(f"found {text!r}, wanted a query: a string, or a list of strings")
            if not text.strip():
                raise ValueError("the query is empty; type some words")
        beam, length = max(config["beam"], k), config["query_length"]
        found = search.retrieve(
            self.model, self.trie, self.run.tokenizer, queries, self.run.ids, k, beam, length
        )
        hits = [
            [Hit(self.run.ids[row], s, self.run.headline(row)) for row, s in ranking] for ranking in found
        ]
        return hits if several else hits[0]

    def add(
        self, documents: Iterable[Document], queries: Iterable[tuple[str, str]] = (), replace=False, keep=2
    ) -> None:
        """Learns these documents, one or thousands, as the next corpus D_{T+1}. Returns once searches find them.

        Args:
            queries: (text, document id) to evaluate with; nothing trains on them.
            replace: documents whose ids the index holds are new versions; without it they are refused.
            keep: checkpoints that stay on disk beside D_0's, the newest; 0: all.

        Raises ValueError, with the index as it was, where a document is empty, an id stands twice or is held already,
        or another process adds or deletes. The very documents that came last, once more, change nothing.
        """
        with beir_folder(documents, queries, "test") as (place, _):
            flags = ["--extend", str(self.folder), "--data", str(place), "--keep", str(keep)]
            flags += ["--device", self.device]
            train.execute(parse(flags + ["--replace"] * replace), quiet=True)
        self.refresh()

    def delete(self, ids: Iterable[str]) -> str:
        """Deletes these documents: no search finds them from now on, and their texts are erased from disk. The weights stay
        as they are. Returns a line with what else left.

        Raises ValueError, and deletes none, where an id is unknown, or another process adds or deletes.
        """
        ids = list_of(ids)
        with store.lock(self.folder):
            extend.require_finished(self.folder)
            try:
                said = extend.delete(self.folder, extend.rows_of(self.folder, ids))
            except ValueError:
                # An id may be gone since an earlier call, which was stopped before all was erased
                extend.erase(self.folder)
                raise
        self.refresh()
        return said

    def consolidate(self, folder: str | Path) -> "Index":
        """A new index in a new folder, whose D_0 is all documents of this one: for an index that has aged."""
        config = replace(saved_config(self.folder), run=str(folder), device=self.device)
        train.consolidate(self.folder, config, quiet=True)
        return Index(folder, self.device)

    def documents(self, ids: Iterable[str]) -> list[Document]:
        """(id, title, text) of these documents. Raises ValueError with those that the index does not hold."""
        self.refresh()
        ids = list_of(ids)
        if unknown := [doc_id for doc_id in ids if doc_id not in self.row_of]:
            raise ValueError(f"{self.folder}: holds no document {', '.join(map(str, unknown[:10]))}")
        titles = arrays.Chain([corpus.titles for corpus in self.run.corpora])
        texts = arrays.Chain([corpus.texts for corpus in self.run.corpora])
        return [(doc_id, titles[self.row_of[doc_id]], texts[self.row_of[doc_id]]) for doc_id in ids]

    def __len__(self) -> int:
        self.refresh()
        return len(self.live)

    def __contains__(self, doc_id: str) -> bool:
        self.refresh()
        return doc_id in self.row_of


def list_of(ids: Iterable[str]) -> list[str]:
    """As a list. Raises ValueError for a single string, whose letters would be the ids."""
    if isinstance(ids, str):
        raise ValueError(f"found {ids!r}, wanted a list of ids; pass [{ids!r}]")
    return list(ids)


def require_strings(found, names: str) -> None:
    """Raises ValueError where it is no tuple or list of as many strings as there are names."""
    n = len(names.split(", "))
    listed = isinstance(found, (tuple, list)) and len(found) == n
    if not listed or not all(isinstance(part, str) for part in found):
        raise ValueError(f"found {found!r:.200}, wanted ({names}), {n} strings")


@contextmanager
def beir_folder(documents: Iterable[Document], queries: Iterable[tuple[str, str]] = (), split: str = "train"):
    """(folder in BEIR layout, number of documents) of documents and labelled queries, which goes with the block.

    Raises ValueError where there is no document, or one of them or of the queries is not made of strings; and those of
    the block without the folder's name, of which the caller knows nothing.
    """
    with tempfile.TemporaryDirectory(prefix="documents.") as place:
        folder, n, lines, labels = Path(place), 0, [], []
        with (folder / "corpus.jsonl").open("wb") as file:
            for document in documents:
                require_strings(document, "id, title, text")
                file.write(extend.beir_line(document))
                n += 1
        if not n:
            raise ValueError("found no document, wanted one or more")
        for i, query in enumerate(queries):
            require_strings(query, "text, document id")
            text, doc_id = query
            lines.append(json.dumps({"_id": f"q{i}", "text": text}))
            labels.append(f"q{i}\t{doc_id}\t1")
        if lines:
            (folder / "qrels").mkdir()
            (folder / "queries.jsonl").write_text("\n".join(lines), encoding="utf-8")
            (folder / "qrels" / f"{split}.tsv").write_text("\n".join(labels), encoding="utf-8")
        try:
            yield folder, n
        except ValueError as error:
            raise ValueError(str(error).replace(f"{folder}/", "").removesuffix(reading.TO_DO)) from error
