"""Pseudo-queries from a doc2query checkpoint: a T5 that reads a passage and writes what one might ask of it.

    python -m tools.doc2query --t5 CHECKPOINT --documents FILE --out FILE

Paper    section 4 and its appendix: docT5query pseudo-queries, 10 per MS MARCO passage, up to 15 per NQ320k
         document
In       a folder with a published T5 that was trained for this, such as castorini/doc2query-t5-base-msmarco;
         documents as BEIR lines, MS MARCO's collection or NQ320k's list
Out      JSON lines {"doc_id", "query"}, in document order, and beside them their settings and how far it got
Next     reading.read_pseudo_queries reads the file; train.py trains on it (--pseudo_queries)
Differs  the paper takes published pseudo-queries and does not state how they were drawn; our defaults are top-k
         sampling with k = 10 at temperature 1, as is usual for this checkpoint. Each document has its own random
         numbers, drawn from the seed and its id, so that its queries do not depend on batch, order or resuming.

One limit of that last claim: a longer neighbour in the batch adds padding, which can move a sum by its last bit;
where that changes which of two words is the likelier, or a probability right at the drawn number, another word
follows. The same command with the same batch size on the same machine gives the same bytes, resumed or not.
"""

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import command
from data import EOS, PAD, UNK, load_tokenizer, tokenize
from prepare import check_vocabulary
from published import read_texts, read_tsv
from queries import passages, words
from reading import read_documents
from store import hold, read_json, write_json
from t5 import T5
from weights import find_t5, read_published

SECONDS_BETWEEN_LINES = 10  # of progress on the terminal

# ------------------------------------------------------------------------------------------------- sampling


def next_word_probabilities(logits: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """softmax(logits / temperature) over the top_k words alone: (R, V) -> probabilities and ids, (R, k) each.

    The likeliest word comes first; float32; k = min(top_k, V). Words that tie for the last place are not all kept.
    """
    best, ids = (logits.float() / temperature).topk(min(top_k, logits.shape[-1]))
    return F.softmax(best, dim=-1), ids


def draw(probabilities: Tensor, ids: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse CDF: the first of a row's ids whose cumulative probability exceeds its number in [0, 1).

    probabilities and ids (R, k), uniforms (R,) float32 -> (R,).
    """
    cumulative = probabilities.double().cumsum(-1)
    # The float32 sum may miss 1 by a little; scaled by it, and below it in float64, a number never falls past
    # the end, nor on a word of probability 0.
    target = uniforms.double()[:, None] * cumulative[:, -1:]
    return ids.gather(1, (cumulative <= target).sum(1, keepdim=True))[:, 0]


@torch.no_grad()
def sample(
    model: T5, ids: Tensor, per_document: int, top_k: int, temperature: float, uniforms: Tensor
) -> Tensor:
    """Samples queries word by word. The encoder runs once per passage; its samples share keys and values.

    Args:
        ids: (B, S) token ids of the passages, padded with 0.
        uniforms: (B, per_document, max_length) float32 in [0, 1); number t of a query decides its word t.

    Returns:
        token ids (B, per_document, T), T <= max_length, without </s>; padded with 0 after it.
    """
    source, padding = model.encode(ids)
    cross = model.cross_keys_values(source)
    uniforms = uniforms.flatten(0, 1)  # (R, max_length); R = B * per_document, as beams that share a source
    x, past = model.start(len(uniforms)), None  # (R, 1, D)
    tokens = torch.full(uniforms.shape, PAD, device=ids.device)
    ended = torch.zeros(len(uniforms), dtype=torch.bool, device=ids.device)
    for t in range(uniforms.shape[1]):
        hidden, past, _ = model.decode(x, cross, padding, past)
        probabilities, likely = next_word_probabilities(model.word_logits(hidden)[:, 0], top_k, temperature)
        word = draw(probabilities, likely, uniforms[:, t])
        ended |= word == EOS
        if ended.all():
            tokens = tokens[:, :t]
            break
        tokens[:, t] = word.masked_fill(ended, PAD)  # an ended row runs on with PAD, and nobody reads it
        x = model.word[tokens[:, t]][:, None]
    return tokens.unflatten(0, (len(ids), per_document))


def document_uniforms(seed: int, doc_id: str, per_document: int, length: int) -> Tensor:
    """A document's own random numbers, (per_document, length) float32 in [0, 1), from the seed and its id.

    torch's CPU generator keeps 32 bits of a seed: of millions of documents a few pairs share their numbers,
    which is harmless, as their passages differ.
    """
    digest = hashlib.sha256(f"{seed} {doc_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.rand(per_document, length, generator=generator)


def to_text(tokenizer, ids: list[int]) -> str:
    """A query's text on one line. <unk>, <pad> and the rows that T5 has beyond its pieces say nothing."""
    pieces = [i for i in ids if i not in (PAD, EOS, UNK) and i < tokenizer.vocab_size()]
    return " ".join(tokenizer.decode(pieces).split())


def queries(model: T5, tokenizer, batch: list[tuple[str, str]], args) -> list[list[str]]:
    """The sampled queries of each (document id, passage), per_document of them; some may have no word."""
    ids = tokenize(tokenizer, [passage for _, passage in batch], args.document_length)
    shape = args.per_document, args.query_length
    uniforms = torch.stack([document_uniforms(args.seed, doc_id, *shape) for doc_id, _ in batch])
    device, settings = args.device, (args.per_document, args.top_k, args.temperature)
    sampled = sample(model, ids.to(device), *settings, uniforms.to(device))
    return [[to_text(tokenizer, row) for row in document] for document in sampled.tolist()]


def documents(args) -> Iterator[tuple[str, str]]:
    """(document id, passage) of every document, read as they are asked for. One without any text is left out.

    The file's ending tells its layout: .tsv is MS MARCO's collection, .json GenRet's NQ320k, all else BEIR lines.
    Raises ValueError at a line that is no document.
    """
    if args.documents.suffix == ".tsv":
        yield from ((pid, text) for _, pid, text in read_tsv(args.documents) if text.strip())
        return
    if args.documents.suffix == ".json":
        yield from ((doc_id, text) for _, doc_id, text in read_texts(args.documents) if text)
        return
    for _, doc_id, title, text in read_documents(args.documents):
        if title or text:
            yield doc_id, next(passages([title], [text]))


# --------------------------------------------------------------------------------------------------- resuming


def settings_path(out: Path) -> Path:
    return out.with_name(out.name + ".settings.json")


def begin(args) -> dict:
    """What the output's settings file says: the settings, and how far whole batches got.

    Raises ValueError where an output stands without that file, was sampled with other settings or is cut.
    """
    path, out = settings_path(args.out), args.out
    own = ("out", "batch", "device")  # change no query
    settings = {name: str(value) for name, value in vars(args).items() if name not in own}
    with args.documents.open("rb") as file:
        settings["documents_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    size = out.stat().st_size if out.exists() else 0
    if not size:
        write_json(path, {"settings": settings, "documents": 0, "queries": 0, "bytes": 0})
    elif not path.exists():
        missing = f"found {out} without {path.name}, which says how it was sampled"
        raise ValueError(f"{missing}; this command would overwrite it, so move it away or pass another --out")
    progress = read_json(path)
    was, anew = progress.get("settings", {}), f"remove {out.name} and {path.name} to begin anew"
    if names := [name for name in was | settings if was.get(name) != settings.get(name)]:
        then, now = (", ".join(f"{name}={of.get(name)}" for name in names) for of in (was, settings))
        to_do = f"Give the settings of then, or pass another --out, or {anew}"
        raise ValueError(f"{out}: found queries sampled with {then}; this command says {now}. {to_do}")
    if size < progress["bytes"]:
        raise ValueError(f"{out}: {size} of {progress['bytes']} bytes are left; {anew}")
    return progress


# -------------------------------------------------------------------------------------------------- command


def parse(argv: list[str]) -> argparse.Namespace:
    """The settings of a command line. Raises ValueError for a number that makes no sense."""
    about = "Sample pseudo-queries for documents; the same command goes on where it was stopped."
    parser = command.Parser(description=about)

    def flag(name: str, default, help: str) -> None:
        names = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])  # both spellings
        parser.add_argument(*names, type=type(default), default=default, help=f"{help} [{default}]")

    parser.add_argument("--t5", required=True, help="folder or hub name of the doc2query checkpoint")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece file [spiece.model of that folder]")
    layouts = "corpus.jsonl (BEIR), collection.tsv (MS MARCO) or corpus_lite.json (NQ320k)"
    parser.add_argument("--documents", type=Path, required=True, help=layouts)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines {doc_id, query} to write")
    flag("per_document", 10, "queries sampled per document; the paper has 10 on MS MARCO, up to 15 on NQ320k")
    flag("top_k", 10, "words to choose from at each step")
    flag("temperature", 1.0, "logits are divided by it")
    flag("seed", 42, "together with a document's id it fixes the document's random numbers")
    flag("batch", 16, "documents at a time")
    flag("document_length", 512, "word pieces kept of a document")
    flag("query_length", 64, "word pieces of a query at most")
    flag("device", command.default_device(), "where the model runs")
    args = parser.parse_args(argv)
    for name in ("per_document", "top_k", "batch", "document_length", "query_length"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: wanted a positive number")
    if not (math.isfinite(args.temperature) and args.temperature > 0):
        wanted = "wanted a positive number; for the likeliest words alone pass --top_k 1"
        raise ValueError(f"--temperature {args.temperature}: {wanted}")
    command.check_device(args.device)
    args.t5 = find_t5(args.t5)
    args.tokenizer = args.tokenizer or args.t5 / "spiece.model"
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if next(documents(args), None) is None:
        raise ValueError(f"{args.documents}: found no document with a title or a text")
    tokenizer = load_tokenizer(args.tokenizer)
    model = read_published(args.t5, codebooks=1, centroids=1).to(args.device).eval()  # no docid is asked for
    check_vocabulary(tokenizer.vocab_size(), model.config.vocab, str(args.t5))
    with args.out.open("ab") as file:
        hold(file, f"{args.out}: another process writes into it; wait, or pass another --out")
        progress = begin(args)
        stream = islice(documents(args), progress["documents"], None)
        earlier, start, last = progress["queries"], time.monotonic(), 0.0
        if progress["documents"]:
            print(f"goes on after {progress['documents']} documents")
        file.truncate(progress["bytes"])
        while batch := list(islice(stream, args.batch)):
            for (doc_id, _), texts in zip(batch, queries(model, tokenizer, batch, args)):
                kept = [{"doc_id": doc_id, "query": text} for text in texts if words(text)]
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept).encode())
                progress["queries"] += len(kept)
            file.flush()
            os.fsync(file.fileno())
            progress["documents"] += len(batch)
            progress["bytes"] = file.tell()
            write_json(settings_path(args.out), progress)
            seconds = time.monotonic() - start
            if seconds >= last + SECONDS_BETWEEN_LINES:
                last, rate = seconds, (progress["queries"] - earlier) / seconds
                counts = "{documents} documents | {queries} queries".format(**progress)
                print(f"{counts} | {rate:.1f} q/s", flush=True)
    left_out = args.per_document * progress["documents"] - progress["queries"]
    counts = "{queries} queries of {documents} documents".format(**progress)
    print(f"{counts}; left out {left_out} samples without a word")


if __name__ == "__main__":
    command.run(main, "tools.doc2query", "stopped; whole batches are kept, the same command goes on")
