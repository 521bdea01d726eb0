"""The run folder: all that is needed to search, evaluate or go on, written so that nothing half-done counts.

Paper    none
In       corpora, models, OOD statistics, lines of a log; what a stage trains and every source of its chance
Out      runs/NAME/, whose files docs/commands.md lists; each corpus has its own, opened when they are asked for
Next     search.py and eval.py load a model from it; train.py skips what is done; optim.py saves a stage by Resume
Differs  every file is whole or absent (arrays.py) and every checkpoint says what it was made for; a stopped
         stage goes on where it was, bit by bit (of several processes with dropout, with other masks), while
         the released code starts it again and pickles tries

What leads up to a stage's first step (scan, growth) is not saved: it follows from the checkpoint
before it and from the seed, and is done again.
"""

import fcntl
import hashlib
import io
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import arrays
import command
import distributed
from arrays import Chain, damaged, read_json, read_tensors, write, write_json, write_tensors
from baselines import adapters, add_adapters, add_prompts
from data import Corpus, excluded_queries, load_tokenizer
from mixlora import ATTENTIONS, MixConfig, add_attention_lora, add_mixture, attention_lora, mixed_layers
from ood import Stats
from queries import Idf, passages
from rq import Trie
from t5 import T5, T5Config

FORMAT = 2  # of the run folder and its checkpoints
QUERIES = ("train", "train_ids", "test", "qrels")  # of a corpus, in one file


def check_format(path: Path, held) -> None:
    if held != FORMAT:
        raise ValueError(f"{path}: found format {held} here, wanted {FORMAT}; commit dfcda6d reads format 1")


# ---------------------------------------------------------------------------------------------------- corpora


def ids_sha256(corpus: Corpus) -> str:
    """Names the split: sha256 of the corpus's document ids, each followed by a line feed."""
    return hashlib.sha256("".join(f"{doc_id}\n" for doc_id in corpus.ids).encode()).hexdigest()


def save_corpora(
    folder: Path, source: str, corpora: list[Corpus], left_out: dict, manifest: dict, general=None
) -> None:
    """The documents and queries of each corpus, IDF of D_0 and the general text, digests of all test queries; corpus.json is
    last. `general` (arrays.Documents) is in its place already.
    """
    for t, corpus in enumerate(corpora):
        save_corpus(folder, t, corpus)
    write_ids(folder, corpora)
    read = chain(corpora[0].passages(), passages(general.titles, general.texts) if general else ())
    Idf(read).save(folder / "idf.json")
    arrays.write_array(folder / "excluded.npy", np.array(sorted(excluded_queries(corpora)), np.uint64))
    listed = [described(corpus) for corpus in corpora]
    about = {"format": FORMAT, "source": source, "manifest": manifest, "left_out": left_out}
    write_json(folder / "corpus.json", about | {"corpora": listed, "general": len(general or ())})


def save_corpus(folder: Path, t: int, corpus: Corpus) -> None:
    """The documents and queries of D_t, which count once corpus.json names them."""
    documents = arrays.Documents(folder / "documents" / f"D{t}")
    for doc_id, title, text in zip(corpus.ids, corpus.titles, corpus.texts):
        documents.add(doc_id, title, text)
    documents.close()
    write_json(folder / "queries" / f"D{t}.json", {name: getattr(corpus, name) for name in QUERIES})


def write_ids(folder: Path, corpora: list[Corpus]) -> None:
    """doc_ids.txt, for people: document ids in the order of docids.npy."""
    with arrays.writing(folder / "doc_ids.txt") as file:
        for doc_id in Chain([corpus.ids for corpus in corpora]):
            file.write(f"{doc_id}\n".encode())


def described(corpus: Corpus) -> dict:
    """What corpus.json says of a corpus."""
    return {
        "first_row": corpus.first_row, "documents": len(corpus.ids), "test_queries": len(corpus.test),
        "ids_sha256": ids_sha256(corpus),
    }  # fmt: skip


class StoredCorpus(Corpus):
    """A corpus of a run folder: its documents and its queries are opened when they are first asked for."""

    rows = range(0)  # in place of Corpus's, which would open the ids
    added: dict | None = None  # what extend.py notes of a corpus that a finished run took in
    replaced: Sequence[int] = ()  # rows of earlier documents that go once this corpus is learnt
    tested = True  # has it test queries, so that there is something to evaluate?

    def __init__(self, folder: Path, name: str, rows: range):
        self.folder, self.name, self.first_row, self.rows = folder, name, rows.start, rows

    def __getattr__(self, name: str):  # of what is not there yet
        if name in ("ids", "titles", "texts"):
            path = self.folder / "documents" / self.name / f"{name}.bin"
            strings = arrays.Strings.open(path)
            n, held = len(self.rows), len(strings)
            if held != n:
                raise ValueError(f"{path}: found {held} {name}, corpus.json says {n}; of different runs")
            vars(self)[name] = strings
        elif name in QUERIES:
            path = self.folder / "queries" / f"{self.name}.json"
            queries = read_json(path)
            with arrays.reading(path):
                queries["train"] = [(row, query) for row, query in queries["train"]]
                vars(self).update({name: queries[name] for name in QUERIES})
        else:
            raise AttributeError(name)
        return vars(self)[name]


def load_corpora(folder: Path) -> list[Corpus]:
    """The corpora of a run; none of their files is opened yet. Raises ValueError where corpus.json is of no such run."""
    path, corpora, row = folder / "corpus.json", [], 0
    about = read_json(path)
    try:
        check_format(path, about.get("format", 1))
        for t, item in enumerate(about["corpora"]):
            rows = range(row, row + item["documents"])
            if item["first_row"] != row or not rows:
                raise TypeError("rows do not follow each other")
            corpora.append(StoredCorpus(folder, f"D{t}", rows))
            corpora[-1].added, corpora[-1].tested = item.get("added"), item.get("test_queries", 1) > 0
            corpora[-1].replaced = item.get("added", {}).get("replaced", [])
            row = rows.stop
        if not corpora:
            raise TypeError("it lists none")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the corpora of a run ({error!r})") from None
    return corpora


def load_general(folder: Path) -> StoredCorpus | None:
    """The general text of a run, whose rows are its own, or None."""
    n = read_json(folder / "corpus.json").get("general", 0)
    return StoredCorpus(folder, "general", range(n)) if n else None


def load_excluded(folder: Path) -> frozenset[int]:
    """Digests of all test queries of a run, for queries.PseudoQuerySampler and data.check_no_leak."""
    return frozenset(arrays.read_array(folder / "excluded.npy", np.uint64, 1).tolist())


def load_docids(folder: Path) -> Tensor:
    """docids.npy: (N, M) int64, of all corpora."""
    return torch.from_numpy(arrays.read_array(folder / "docids.npy", np.integer, 2).astype(np.int64))


def load_deleted(folder: Path) -> np.ndarray:
    """Rows of the documents that were deleted, ascending (n,) int64."""
    path = folder / "deleted.npy"
    return arrays.read_array(path, np.int64, 1) if path.exists() else np.empty(0, np.int64)


def live_rows(folder: Path, corpora: list[Corpus]) -> Tensor:
    """Rows (n,) int64 of the documents of these corpora that are neither deleted nor replaced by a later one of them."""
    replaced = [row for corpus in corpora for row in corpus.replaced]
    gone = np.union1d(load_deleted(folder), np.array(replaced, np.int64))
    return torch.from_numpy(np.setdiff1d(np.arange(corpora[-1].rows.stop), gone, assume_unique=True))


# ------------------------------------------------------------------------------------------------ checkpoints


def stamp(folder: Path, docids: bool | None = None, corpora: int | None = None) -> dict:
    """What a checkpoint says of itself: its format, and sha256 over the run's split, tokenizer and, once made, docids.

    Of the first `corpora` corpora, by default of all: what a finished run takes in later leaves its checkpoints valid.
    """
    docids = (folder / "docids.npy").exists() if docids is None else docids
    digest, listed = hashlib.sha256(), []
    if (folder / "corpus.json").exists():
        listed = read_json(folder / "corpus.json")["corpora"][:corpora]
    for item in listed:
        digest.update(item["ids_sha256"].encode())
    if (folder / "tokenizer.model").exists():
        digest.update((folder / "tokenizer.model").read_bytes())
    if docids and (folder / "docids.npy").exists():
        with io.BytesIO() as file:
            codes = arrays.read_array(folder / "docids.npy", np.integer, 2)
            np.save(file, codes[: sum(item["documents"] for item in listed)])
            digest.update(file.getbuffer())
    return {"format": FORMAT, "docids": docids, "corpora": len(listed), "made_for": digest.hexdigest()}


def check_stamp(path: Path, value: dict) -> None:
    """Raises ValueError where a checkpoint is of another format or belongs to another run."""
    check_format(path, value.get("format") if isinstance(value, dict) else type(value).__name__)
    folder, corpora = path.parent, value.get("corpora")
    # of commit b518eeb and before: of all but added ones
    if corpora is None and (folder / "corpus.json").exists():
        corpora = sum("added" not in item for item in read_json(folder / "corpus.json")["corpora"])
    if value["made_for"] != stamp(folder, value["docids"], corpora)["made_for"]:
        raise damaged(path, "made for other documents, another tokenizer or other docids than lie beside it")


def save_model(path: Path, model: T5, stats: list[Stats]) -> None:
    """A model with its shape, its experts, adapters or prompts, and the OOD statistics of its layers."""
    layers, lora = mixed_layers(model), attention_lora(model)
    bottlenecks, prompts = adapters(model), model.prefix
    value = stamp(path.parent) | {
        "t5": asdict(model.config),
        "mix": asdict(layers[0].config) if layers else None,
        "frozen": [len(layer.old) for layer in layers],
        "trainable": [len(layer.new) for layer in layers],
        "attention_rank": len(lora[0].q_a) if lora else None,
        "adapters": len(bottlenecks[0].down) if bottlenecks else None,
        "prompts": [len(prompts.topics), prompts.length] if prompts is not None else None,
        "model": model.state_dict(),
        "stats": [stat.state() for stat in stats],
    }
    write_tensors(path, value)


def load_model(path: Path, device: str = "cpu") -> tuple[T5, list[Stats]]:
    """The model and OOD statistics of a checkpoint, in evaluation mode."""
    value = read_tensors(path)
    check_stamp(path, value)
    try:
        model = T5(T5Config(**value["t5"]))
        if value["mix"]:
            add_mixture(model, MixConfig(**value["mix"]), value["frozen"], value["trainable"])
        if value["attention_rank"]:
            sites = [site for site in ATTENTIONS if f"decoder.0.{site}.q_a" in value["model"]]
            add_attention_lora(model, value["attention_rank"], sites)
        if value["adapters"]:
            add_adapters(model, value["adapters"])
        if value["prompts"]:
            pool, length = value["prompts"]
            add_prompts(model, torch.zeros(pool, model.config.width), length)
        model.load_state_dict(value["model"])
        return model.to(device).eval(), [Stats(**item) for item in value["stats"]]
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a checkpoint of this program ({error})") from None


class LoadedRun:
    """A run as search and evaluation need it: the tokenizer, the documents, and the model after each corpus."""

    def __init__(self, folder: Path, device: str = "cpu"):
        self.folder, self.device = folder, device
        self.config = read_json(folder / "config.json")
        self.tokenizer = load_tokenizer(folder / "tokenizer.model")
        self.corpora = load_corpora(folder)
        self.finished = [t for t in range(len(self.corpora)) if (folder / f"D{t}.pt").is_file()]
        if not self.finished:
            to_do = command.quoted("python", "train.py", "--resume", folder)
            raise ValueError(f"found no finished corpus in {folder}; go on with {to_do}")
        self.docids, self.live = load_docids(folder), live_rows(folder, self.corpora)
        self.ids = Chain([corpus.ids for corpus in self.corpora])

    def headline(self, row: int) -> str:
        """What to show of a document: its title or, without one, its first words."""
        corpus = next(corpus for corpus in self.corpora if row in corpus.rows)
        i = row - corpus.first_row
        return corpus.titles[i] or " ".join(corpus.texts[i][:400].split()[:12])

    def at(self, t: int) -> tuple[T5, Trie]:
        """The model after D_t, and the trie of the documents of D_0..D_t that are not deleted."""
        model, _ = load_model(self.folder / f"D{t}.pt", self.device)
        live = live_rows(self.folder, self.corpora[: t + 1])
        live = live[live < len(self.docids)]  # tools/doctor.py tells of docids that are missing
        return model, Trie(self.docids[live], live)


class Stages:
    """stages.json: which stages of a run are done, and what each recorded. Written last: what it names is not redone."""

    def __init__(self, folder: Path):
        self.folder, path = folder, folder / "stages.json"
        self.records: dict[str, dict] = read_json(path) if path.exists() else {}

    def __contains__(self, stage: str) -> bool:
        return stage in self.records

    @contextmanager
    def stage(self, name: str, anew: bool = False) -> Iterator[dict]:
        """Times a stage; what is put into the dictionary that it gives is recorded. One that is done keeps its record, unless
        it is done anew, and its place among the others.
        """
        begin, record = time.monotonic(), {}
        yield record
        if anew or name not in self.records:
            self.records[name] = {"seconds": time.monotonic() - begin} | record
            if distributed.is_main_process():
                decisions = {s: r["decisions"] for s, r in self.records.items() if "decisions" in r}
                write_json(self.folder / "ood.json", decisions)
                self.write()
        distributed.wait()

    def write(self) -> None:
        write_json(self.folder / "stages.json", self.records)


def new_folder(folder: Path, config: dict, overwrite: bool):
    """Makes a run's folder with its config, and returns its lock. Nothing is changed before the lock is held.

    Raises ValueError where the name cannot be one, another process trains there, or it holds other runs, files of
    something else or, without `overwrite`, a run; with it, that run is moved aside.
    """
    if not folder.name.strip(". \t\n\r") or not folder.name.isprintable():
        raise ValueError(f"--run {str(folder)!r}: wanted the name of a folder of its own")
    if folder.is_file():
        raise ValueError(f"--run {folder}: wanted a folder, this is a file")
    if other := next(folder.glob("*/corpus.json"), None):
        raise ValueError(f"--run {folder}: holds other runs, as {other.parent}; pass a folder of its own")
    files = [path.name for path in folder.glob("*") if path.name != "lock" and path.suffix != ".part"]
    settings = read_json(folder / "config.json") if "config.json" in files else None
    if files and not (isinstance(settings, dict) and "method" in settings):
        raise ValueError(f"--run {folder}: holds {files[0]}, which is of no run; pass a folder of its own")
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder)
    if (folder / "corpus.json").exists():  # without it there is nothing to keep
        if not overwrite:
            to_do = f"pass {command.quoted('--resume', folder)}, --overwrite or another --run"
            raise ValueError(f"{folder} holds a run: {to_do}")
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        print(f"moved the earlier run to {aside}")
        held.close()
        folder.mkdir()
        held = lock(folder)
    write_json(folder / "config.json", config)
    return held


def lock(folder: Path):
    """Keeps others from training in this folder while the returned file is open. Raises ValueError where one does."""
    file = (folder / "lock").open("a")
    hold(file, f"{folder}: another process trains here; wait, or take another folder")
    return file


def hold(file, refusal: str) -> None:
    """Keeps others from holding this file while it is open. Raises ValueError, with the refusal, where one holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(refusal) from None


# ---------------------------------------------------------------------------------------------- log and resume


class Log:
    """Lines for people in log.txt and on the terminal, and for programs in metrics.jsonl.

    `progress` rewrites one line of a terminal; elsewhere, and in log.txt, it prints a plain line now and then. Of
    several processes only the first `writes`.
    """

    def __init__(self, folder: Path, quiet: bool = False, writes: bool = True):
        self.folder, self.out, self.quiet, self.writes = folder, sys.stdout, quiet or not writes, writes
        self.open_line, self.next_plain = False, 0.0

    def _append(self, name: str, text: str) -> None:
        if self.writes:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def line(self, text: str = "") -> None:
        """One line, for good."""
        self._append("log.txt", text)
        if not self.quiet:
            clear = "\r\x1b[K" if self.open_line else ""
            print(clear + text, file=self.out, flush=True)
        self.open_line = False

    def progress(self, text: str, last: bool = False) -> None:
        """A line that the next one replaces; every ten seconds, and at the last, it is kept."""
        if last or time.monotonic() >= self.next_plain:
            self.next_plain = time.monotonic() + 10
            self.line(text)
        elif not self.quiet and self.out.isatty():
            print(f"\r\x1b[K{text}", end="", file=self.out, flush=True)
            self.open_line = True

    def forget(self, stage: str, step: int) -> None:
        """Drops what metrics.jsonl says of a stage after `step`, which is done again, and a line that was cut."""
        path, kept = self.folder / "metrics.jsonl", []
        if not (self.writes and path.exists()):
            return
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError):  # of a line that was cut
                values = json.loads(line)
                if values["stage"] != stage or values["step"] <= step:
                    kept.append(line + b"\n")
        if (content := b"".join(kept)) != path.read_bytes():
            write(path, content)

    def metrics(self, **values) -> None:
        """One JSON object on a line of metrics.jsonl; tensors become numbers."""
        self._append("metrics.jsonl", arrays.strict_json(values))


class Resume:
    """Saves and restores the stage that is being trained, in latest.pt."""

    def __init__(self, folder: Path, seconds: float, log: Log):
        self.folder, self.seconds, self.log = folder, seconds, log
        self.saved, self.last = self._read(), time.monotonic()
        self.stage = self.saved.get("stage", "")  # that was stopped

    def _read(self) -> dict:
        """latest.pt or, where it cannot be trusted, the one before it."""
        for path in (self.folder / "latest.pt", self.folder / "latest.previous.pt"):
            if path.exists():
                try:
                    saved = read_tensors(path)
                    check_stamp(path, saved)
                    return saved
                except ValueError as error:
                    self.log.line(f"{error}; going on without it")
        return {}

    def restore(self, stage: str, trained: list[Tensor], optimizer, chance: dict) -> int:
        """Puts everything back to where latest.pt left this stage; returns the number of steps done then."""
        saved, self.saved = self.saved, {}
        self.log.forget(stage, saved["step"] if saved.get("stage") == stage else 0)
        if saved.get("stage") != stage:
            return 0
        with torch.no_grad():
            for p, value in zip(trained, saved["trained"], strict=True):
                p.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        for name, source in chance.items():
            put = source.setstate if isinstance(source, random.Random) else source.set_state
            put(saved["chance"][name])
        torch.set_rng_state(saved["torch"])
        if torch.cuda.is_available() and saved["cuda"]:
            torch.cuda.set_rng_state_all(saved["cuda"])
        self.log.line(f"{stage}: going on after step {saved['step']}")
        return saved["step"]

    def due(self) -> bool:
        """Has it been long enough since the last save?"""
        return time.monotonic() - self.last >= self.seconds

    def save(self, stage: str, step: int, trained: list[Tensor], optimizer, chance: dict) -> None:
        """Writes latest.pt after `step` steps of a stage; the one before it stays as latest.previous.pt."""
        if not distributed.is_main_process():
            return
        states = {}
        for name, source in chance.items():
            states[name] = source.getstate() if isinstance(source, random.Random) else source.get_state()
        value = stamp(self.folder) | {
            "stage": stage,
            "step": step,
            "trained": [p.detach() for p in trained],
            "optimizer": optimizer.state_dict(),
            "chance": states,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        path = self.folder / "latest.pt"
        write_tensors(path.with_name("latest.new.pt"), value)
        if path.exists():
            os.replace(path, path.with_name("latest.previous.pt"))
        arrays.rename(path.with_name("latest.new.pt"), path)
        self.last = time.monotonic()
