"""The run folder: everything that is needed to search, evaluate or continue, written so that nothing
half-done counts.

Paper    none
In       tensors, arrays, JSON values and lines
Out      runs/NAME/: config.json, tokenizer.model, corpus.json, documents/, dense.pt, embeddings.npy, rq.pt,
         docids.npy, D0.pt .. DT.pt, ood.json, results.json, metrics.jsonl, log.txt
Next     search.py and eval.py load a model from it; train.py skips the stages whose files exist
Differs  every file is written under a temporary name, flushed and renamed; every checkpoint says what it was made
         for; tensors are read with `weights_only=True`. The released code pickles tries and rewrites JSON in place
"""

import fcntl
import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from baselines import adapters, add_adapters, add_prompts
from data import Corpus, load_tokenizer
from mapped import Chain, Documents, StreamedFile, read_tensors, write_tensors
from mixlora import MixConfig, add_mixture, mixed_layers
from ood import Stats
from rq import Trie
from t5 import T5, T5Config


def write(path: Path, content: bytes) -> None:
    """Writes a file so that it is either whole or absent, also after a power cut."""
    with StreamedFile(path) as file:
        file.write(content)


def write_json(path: Path, value) -> None:
    write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path):
    if not path.is_file():
        raise ValueError(f"found no {path}; is {path.parent} the folder of a finished run?")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); remove the file to make it anew") from None


def read_array(path: Path) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise ValueError("an archive of arrays")
        return found
    except Exception as error:  # damaged headers raise almost anything
        raise ValueError(
            f"{path}: cannot be read ({error}); go on with train.py --resume to make it anew"
        ) from None


def write_array(path: Path, array: np.ndarray) -> None:
    with StreamedFile(path) as file:
        np.save(file, array, allow_pickle=False)


# ---------------------------------------------------------------------------------------------------- corpora


def ids_sha256(corpus: Corpus) -> str:
    """Names the split: sha256 of the corpus's document ids, each followed by a line feed."""
    found = hashlib.sha256()
    for doc_id in corpus.ids:
        found.update(f"{doc_id}\n".encode())
    return found.hexdigest()


def save_corpora(folder: Path, source: str, corpora: list[Corpus], left_out: dict, manifest: dict) -> None:
    """Documents into stores, in stream order; queries, labels, counts and hashes into corpus.json, written last."""
    documents = Documents(folder / "documents")
    with StreamedFile(folder / "doc_ids.txt") as file:
        for corpus in corpora:
            for doc_id, title, text in zip(corpus.ids, corpus.titles, corpus.texts):
                documents.add(doc_id, title, text)
                file.write(f"{doc_id}\n".encode())
    documents.close()
    listed = [
        {
            "first_row": c.first_row, "documents": len(c.ids), "ids_sha256": ids_sha256(c), "train": c.train,
            "train_ids": c.train_ids, "test": c.test, "qrels": c.qrels,
        }
        for c in corpora
    ]  # fmt: skip
    value = {"source": source, "manifest": manifest, "left_out": left_out, "corpora": listed}
    write_json(folder / "corpus.json", value)


def load_corpora(folder: Path) -> list[Corpus]:
    corpora, listed, saved = [], 0, read_json(folder / "corpus.json")
    documents = Documents.open(folder / "documents")
    try:
        for item in saved["corpora"]:
            first, n = item["first_row"], item.pop("documents")
            item.pop("ids_sha256")
            item["train"] = [tuple(pair) for pair in item["train"]]
            if first != listed or not 0 <= n <= len(documents) - listed:
                raise ValueError(f"{folder}: documents and corpus.json are of different runs; start it anew")
            rows = slice(first, first + n)
            texts = dict(ids=documents.ids[rows], titles=documents.titles[rows], texts=documents.texts[rows])
            corpora.append(Corpus(**item, **texts))
            listed += n
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'corpus.json'}: not the corpora of a run ({error!r})") from None
    if listed != len(documents):
        raise ValueError(f"{folder}: documents and corpus.json are of different runs; start it anew")
    return corpora


# ------------------------------------------------------------------------------------------------ checkpoints


FORMAT = 1  # of checkpoints


def made_for(folder: Path, docids: bool) -> str:
    """Names what a checkpoint belongs to: sha256 over the split, the tokenizer and, from D_0 on, the docids of a run
    folder.
    """
    found = hashlib.sha256()
    if (folder / "corpus.json").exists():
        for item in read_json(folder / "corpus.json")["corpora"]:
            found.update(item["ids_sha256"].encode())
    for name in ("tokenizer.model", "docids.npy") if docids else ("tokenizer.model",):
        if (folder / name).exists():
            found.update((folder / name).read_bytes())
    return found.hexdigest()


def stamp(folder: Path) -> dict:
    """What every checkpoint says of itself, for `check_stamp`."""
    docids = (folder / "docids.npy").exists()
    return {"format": FORMAT, "docids": docids, "made_for": made_for(folder, docids)}


def check_stamp(path: Path, value: dict) -> None:
    """Raises ValueError where a checkpoint is of another format, or of a run with other documents, tokenizer or
    docids.
    """
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise ValueError(
            f"{path}: found a checkpoint of format {found}, wanted {FORMAT}; another version wrote it"
        )
    if value["made_for"] != made_for(path.parent, value["docids"]):
        raise ValueError(
            f"{path}: made for other documents, another tokenizer or other docids than {path.parent} holds; it is of "
            "another run: remove the file to make it anew"
        )


def save_model(path: Path, model: T5, stats: list[Stats], **extra) -> None:
    """A model with its shape, its experts, adapters or prompts, and the OOD statistics of its layers."""
    layers, bottlenecks, prompts = mixed_layers(model), adapters(model), model.prefix
    value = stamp(path.parent) | {
        "t5": asdict(model.config),
        "mix": asdict(layers[0].config) if layers else None,
        "frozen": [len(layer.old) for layer in layers],
        "trainable": [len(layer.new) for layer in layers],
        "adapters": len(bottlenecks[0].down) if bottlenecks else None,
        "prompts": [len(prompts.topics), prompts.length] if prompts is not None else None,
        "model": model.state_dict(),
        "stats": [stat.state() for stat in stats],
    }
    write_tensors(path, value | extra)


def load_model(path: Path, device: str = "cpu") -> tuple[T5, list[Stats]]:
    """The model and OOD statistics of a checkpoint, in evaluation mode."""
    value = read_tensors(path)
    check_stamp(path, value)
    try:
        model = T5(T5Config(**value["t5"]))
        if value["mix"]:
            add_mixture(model, MixConfig(**value["mix"]), value["frozen"], value["trainable"])
        if value.get("adapters"):
            add_adapters(model, value["adapters"])
        if value.get("prompts"):
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
            raise ValueError(
                f"found no finished corpus (D0.pt ..) in {folder}; go on with train.py --resume {folder}"
            )
        self.docids = torch.from_numpy(read_array(folder / "docids.npy").astype(np.int64))
        self.ids = Chain([corpus.ids for corpus in self.corpora])

    def headline(self, row: int) -> str:
        """What to show of a document: its title or, without one, its first words."""
        corpus = next(corpus for corpus in self.corpora if row in corpus.rows)
        i = row - corpus.first_row
        return corpus.titles[i] or " ".join(corpus.texts[i][:400].split()[:12])

    def at(self, t: int) -> tuple[T5, Trie]:
        """The model after D_t, and the trie of the documents of D_0..D_t."""
        return load_model(self.folder / f"D{t}.pt", self.device)[0], Trie(
            self.docids[: self.corpora[t].rows.stop]
        )


def lock(folder: Path):
    """Keeps other processes from training in this folder while the returned file is open.

    Raises ValueError where one does already.
    """
    file = (folder / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(
            f"{folder}: another process trains here; wait for it, or pass another --run"
        ) from None
    return file


# -------------------------------------------------------------------------------------------------------- log


class Log:
    """Lines for people in log.txt and on the terminal, and for programs in metrics.jsonl.

    `progress` rewrites one line of a terminal; elsewhere, and in log.txt, it prints a plain line now and
    then. Of several processes only the first `writes`.
    """

    def __init__(self, folder: Path, quiet: bool = False, writes: bool = True):
        import sys

        self.folder, self.out, self.quiet, self.writes = folder, sys.stdout, quiet, writes
        self.open_line, self.next_plain = False, 0.0

    def line(self, text: str = "") -> None:
        """One line, for good."""
        if not self.writes:
            return
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        if not self.quiet:
            clear = "\r\x1b[K" if self.open_line else ""
            print(clear + text, file=self.out, flush=True)
        self.open_line = False

    def progress(self, text: str, last: bool = False) -> None:
        """A line that the next one replaces; every ten seconds, and at the last, it is kept."""
        if not self.writes:
            return
        if last or time.monotonic() >= self.next_plain:
            self.next_plain = time.monotonic() + 10
            self.line(text)
        elif not self.quiet and self.out.isatty():
            print(f"\r\x1b[K{text}", end="", file=self.out, flush=True)
            self.open_line = True

    def forget(self, stage: str, step: int) -> None:
        """Drops what metrics.jsonl says of a stage after `step`, which is done again, and a line that was cut."""
        path = self.folder / "metrics.jsonl"
        if not (self.writes and path.exists()):
            return

        def stays(line: bytes) -> bool:
            try:
                found = json.loads(line)
                return found["stage"] != stage or found["step"] <= step
            except (ValueError, KeyError, TypeError):
                return False

        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and stays(line)]
        if kept != lines:
            write(path, b"".join(kept))

    def metrics(self, **values) -> None:
        """One JSON object on a line of metrics.jsonl; tensors become numbers."""
        if not self.writes:
            return
        plain = {key: value.item() if isinstance(value, Tensor) else value for key, value in values.items()}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")
