"""A page in the browser that shows one query's way through the model, and adds and deletes documents.

    python serve.py RUN

Paper    none: it shows what section 2 and Eq. 2 and 10-12 compute
In       a run folder, by index.Index; requests from a browser on this machine
Out      serve.html at http://127.0.0.1:8000, and JSON for it: tokens, beams, experts, energies, documents, dreams
Next     nobody; tools/doctor.py asks many queries at once
Differs  nothing: it is not in the released code

Any web page that a browser shows can send requests to this server. It must neither read nor change the index: so a request
names this server as its host and origin, and a change carries a token that only our own page has.
"""

import inspect
import json
import re
import secrets
import socket
import sys
import threading
import traceback
from contextlib import contextmanager, suppress
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import torch
import torch.nn.functional as F
from torch import Tensor

import arrays
import command
import dense
import dream
import ood
import search
import store
from bm25 import BM25
from config import saved_config
from data import EOS, PAD, tokenize
from index import Index
from rq import Trie
from t5 import T5, segment_logits

SHOWN = 10  # documents of an answer
OUTSIDE, CODES, BELOW, WORDS, DREAMS = 6, 8, 4, 12, 5  # how many of what is listed beside it
BODY, QUERY, TEXT = 1_000_000, 1000, 5000  # bytes of a request; characters of a query and of a shown text
PATIENCE, WAIT, CLIENTS = 10, 60, 64  # seconds for a request to arrive and for its turn; requests at a time
HEADERS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]
PAGE = Path(__file__).with_name("serve.html")


class Refusal(ValueError):
    """An answer whose status is not 400."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


# -------------------------------------------------------------------------------------------- the way of a query


@torch.no_grad()
def beams(model: T5, trie: Trie, ids: Tensor, beam: int) -> tuple[list[dict], Tensor, Tensor]:
    """search.beam_search of one query (1, S), with all M steps beside its leaves and scores.

    A step lists its `beams`, best first, by their parent's place in the step before; and codes `outside` the trie that
    are likelier than its last beam.
    """
    source, padding = model.encode(ids)
    cross, x, past = model.cross_keys_values(source), model.start(1), model.past(source, padding)
    nodes, scores, steps = trie.root(), torch.zeros(1), []
    for m in range(model.config.codebooks):
        hidden, past, _ = model.decode(x, cross, padding, past)
        logits = segment_logits(hidden, model.rq[m : m + 1])[:, 0]  # (R, K)
        log_p = F.log_softmax(logits.float(), dim=-1).cpu()
        allowed, total = trie.allowed(m, nodes, log_p.shape[1]), log_p + scores[:, None]
        kept = total.masked_fill(~allowed, -torch.inf).flatten().topk(min(beam, int(allowed.sum())))
        other = total.masked_fill(allowed, -torch.inf).flatten().topk(min(OUTSIDE, total.numel()))
        parent, code = kept.indices // log_p.shape[1], kept.indices % log_p.shape[1]
        nodes, scores = trie.child(m, nodes[parent], code), kept.values
        sizes = (nodes[:, 1] - nodes[:, 0]).tolist()
        listed = [
            {"parent": r, "code": k, "log_p": float(log_p[r, k]), "score": score, "documents": n}
            for r, k, score, n in zip(parent.tolist(), code.tolist(), scores.tolist(), sizes)
        ]
        outside = [divmod(i, log_p.shape[1]) for i in other.indices[other.values > scores[-1]].tolist()]
        outside = [{"parent": r, "code": k, "log_p": float(log_p[r, k])} for r, k in outside]
        steps.append({"beams": listed, "outside": outside})
        parent, code = parent.to(ids.device), code.to(ids.device)
        past, x = [(keys[parent], values[parent]) for keys, values in past], model.rq[m][code][:, None]
    return steps, nodes, scores


@torch.no_grad()
def along(index: Index, ids: Tensor, docids: Tensor) -> tuple[list[dict], list[dict | None]]:
    """The way to each of these docids (P, M), by teacher forcing, and each mixed layer's histogram of known z.

    A way lists each step's likely codes and some documents below it; and of each layer gates, cosines and the query's z.
    z and histogram are None where the run keeps no pooled statistics.
    """
    model, trie, run = index.model, index.trie, index.run
    source, padding = model.encode(ids)
    hidden, routes = model.docid_hidden(source, padding, docids.to(ids.device), model.past(source, padding))
    p = segment_logits(hidden, model.rq).float().softmax(-1).cpu()  # (P, M, K)
    pooled = [s if s.mode == "pooled" and len(ood.reference(s)) else None for s in index.stats]
    ways = []
    for i, docid in enumerate(docids.tolist()):
        node, steps, layers = trie.root(), [], []
        for m, code in enumerate(docid):
            allowed, p_step = trie.allowed(m, node, p.shape[-1])[0], p[i, m]
            codes = p_step.topk(min(CODES, len(p_step))).indices.tolist()
            codes += [code] * (code not in codes)
            ends = trie.child(m, node.expand(len(codes), 2), torch.tensor(codes))
            sizes = (ends[:, 1] - ends[:, 0]).tolist()
            likely = [{"code": k, "p": float(p_step[k]), "documents": n} for k, n in zip(codes, sizes)]
            node = ends[codes.index(code)][None]
            first, end = node[0].tolist()
            below = [headline(run, row) for row in trie.documents[first : min(end, first + BELOW)].tolist()]
            outside = float(p_step[~allowed].sum())
            steps.append({"codes": likely, "allowed": int(allowed.sum()), "outside": outside, "below": below})
        for route, stats in zip(routes, pooled):
            z = float(ood.standardised(route.scores[i : i + 1].cpu(), stats)) if stats else None
            layers.append({"gates": route.gates[i].tolist(), "cosines": route.scores[i].tolist(), "z": z})
        ways.append({"docid": docid, "steps": steps, "layers": layers})
    epsilon, bins = run.config["epsilon"], 48
    seen = [(route.scores[:1].cpu(), stats) for route, stats in zip(routes, pooled)]
    return ways, [ood.histogram(scores, stats, epsilon, bins) if stats else None for scores, stats in seen]


def trace(index: Index, query: str) -> dict:
    """One query's way through the model to the documents that index.search gives."""
    model, trie, run = index.model, index.trie, index.run
    ids = tokenize(run.tokenizer, [query], run.config["query_length"]).to(model.word.device)
    beam = min(max(run.config["beam"], SHOWN), len(trie.documents))
    steps, leaves, scores = beams(model, trie, ids, beam)
    ranking = search.documents(trie, leaves[None], scores[None], run.ids, SHOWN)[0]
    ways, histograms = along(index, ids, run.docids[[row for row, _ in ranking]])
    tokens = [{"id": i, "piece": run.tokenizer.id_to_piece(i)} for i in ids[0].tolist()]
    answer = {"query": query, "tokens": tokens, "beam": beam, "steps": steps, "ways": ways}
    return answer | {"histograms": histograms, "documents": [headline(run, *pair) for pair in ranking]}


def headline(run: store.LoadedRun, row: int, score: float = 0.0) -> dict:
    corpus = next(t for t, corpus in enumerate(run.corpora) if row in corpus.rows)
    about = {"id": run.ids[row], "title": run.headline(row)[:TEXT], "corpus": corpus}
    return about | {"docid": run.docids[row].tolist(), "score": float(score)}


def growth(folder: Path) -> list[dict]:
    """Of each mixed layer: the corpus for which each expert was added, and the decisions that led there."""
    layers: list[dict] = []
    for stage, record in store.Stages(folder).records.items():
        experts = record.get("experts") or []
        layers += [{"added": [], "decisions": []} for _ in experts[len(layers) :]]
        for layer, n in zip(layers, experts):
            layer["added"] += [stage] * (n - len(layer["added"]))
        for layer, decision in zip(layers, record.get("decisions", [])):
            shown = {name: decision[name] for name in ("ood_percent", "expanded")}
            layer["decisions"].append({"corpus": stage} | shown)
    return layers


# ------------------------------------------------------------------------------------------ what the page asks for


def checked(name: str, value: object, limit: int, blank: bool = False) -> str:
    """A text that came with a request. Raises ValueError where it is none, or too long."""
    if not isinstance(value, str) or not (blank or value.strip()):
        raise ValueError(f"{name}: wanted some text")
    if len(value) > limit:
        raise ValueError(f"{name}: has {len(value)} characters, at most {limit} are taken")
    value.encode()  # raises ValueError for half a surrogate pair
    return value


@contextmanager
def held(lock: threading.Lock, seconds: int, refusal: Refusal):
    if not lock.acquire(timeout=seconds):
        raise refusal
    try:
        yield
    finally:
        lock.release()


class Site:
    """The answers, as JSON-able dicts. One model computation at a time and, beside it, one change of the index."""

    def __init__(self, index: Index):
        self.index, self.token = index, secrets.token_urlsafe(32)
        self.model_lock, self.change_lock = threading.Lock(), threading.Lock()
        self.ranked = torch.empty(0, dtype=torch.long)  # rows that BM25 and the bi-encoder rank

    @contextmanager
    def computing(self):
        """The run, with what is finished by now."""
        with held(self.model_lock, WAIT, Refusal(503, "the model is busy; try again")):
            self.index.refresh()
            yield self.index.run

    def changing(self):
        return held(self.change_lock, 0, Refusal(409, "the index is being changed; wait until that is done"))

    def about(self) -> dict:
        with self.computing() as run:
            rows, shape = self.index.trie.documents, self.index.model.config
            corpora = [int(((rows >= c.rows.start) & (rows < c.rows.stop)).sum()) for c in run.corpora]
            examples = [query for c, n in zip(run.corpora, corpora) if n for query in [*c.test.values()][:2]]
            answer = {name: run.config[name] for name in ("method", "expand", "ood_mode", "epsilon", "delta")}
            answer |= {"name": run.folder.resolve().name, "few": ood.FEW}
            answer |= {"M": shape.codebooks, "K": shape.centroids}
            return answer | {"corpora": corpora, "examples": examples[-6:], "layers": growth(run.folder)}

    def search(self, q: str) -> dict:
        query = checked("the query", q, QUERY)
        with self.computing():
            return trace(self.index, query)

    @cached_property
    def bi_encoder(self) -> T5:
        return store.load_model(self.index.run.folder / "dense.pt", self.index.run.device)[0]

    @cached_property
    def dreams(self) -> dream.Dreams | None:
        run, books = self.index.run, arrays.read_tensors(self.index.run.folder / "rq.pt")
        config = saved_config(run.folder)
        return dream.dreams(self.bi_encoder, run.tokenizer, books, config.dream_words, config.dream_noise)

    def others(self, q: str) -> dict:
        """What BM25 and the bi-encoder answer, over the documents that the model has."""
        query = checked("the query", q, QUERY)
        with self.computing() as run:
            rows = self.index.trie.documents.long().sort().values
            if not torch.equal(rows, self.ranked):
                kept = set(rows.tolist())
                passages = ((row, text) for c in run.corpora for row, text in zip(c.rows, c.passages()))
                self.bm25 = BM25(text for row, text in passages if row in kept)
                paths = [run.folder / "embeddings" / f"{corpus.name}.npy" for corpus in run.corpora]
                self.vectors = torch.cat([arrays.open_array(path) for path in paths])[rows]
                self.ranked = rows
            ids = tokenize(run.tokenizer, [query], run.config["query_length"])
            scores, places = dense.nearest(dense.embed(self.bi_encoder, ids), self.vectors, SHOWN)
            best = {"bm25": self.bm25.top(query, SHOWN), "dense": zip(places[0].tolist(), scores[0].tolist())}
            return {name: [headline(run, int(rows[i]), s) for i, s in pairs] for name, pairs in best.items()}

    def document(self, id: str, seed: str = "0") -> dict:
        """A document, words near its docid, and what the run dreams of it."""
        if not re.fullmatch("[0-9]{1,9}", seed):
            raise ValueError("seed: wanted a number")
        with self.computing():
            _, title, text = self.index.documents([checked("the id", id, QUERY)])[0]
            run, row = self.index.run, self.index.row_of[id]  # of what it has found by now
            answer = headline(run, row) | {"title": title, "text": text[:TEXT], "words": [], "dreams": []}
            if self.dreams:
                numbers, p = (values[0, :WORDS] for values in self.dreams.words(run.docids[[row]]))
                pieces = run.tokenizer.id_to_piece(self.dreams.pieces[numbers].tolist())
                answer["words"] = [[piece.strip("▁"), share] for piece, share in zip(pieces, p.tolist())]
                drawn = self.dreams.draw(run.docids[[row] * DREAMS], torch.Generator().manual_seed(int(seed)))
                ids = [[i for i in ids if i not in (PAD, EOS)] for ids in drawn.tolist()]
                answer["dreams"] = run.tokenizer.decode(ids)
            return answer

    def add(self, id: str, title: str, text: str) -> dict:
        named = checked("the id", id, 200), checked("the title", title, QUERY, blank=True)
        document = *named, checked("the text", text, BODY)
        with self.changing():  # by an index of its own, so that searches go on
            index = Index.open(self.index.run.folder, self.index.run.device)
            index.add([document])
            return {"documents": len(index)}

    def delete(self, id: str) -> dict:
        with self.changing(), self.computing():
            self.index.delete([checked("the id", id, QUERY)])
            return {"documents": len(self.index)}


# --------------------------------------------------------------------------------------------------------- server

CALLS = {("GET", call.__name__): call for call in (Site.about, Site.search, Site.others, Site.document)}
CALLS |= {("POST", call.__name__): call for call in (Site.add, Site.delete)}


class Handler(BaseHTTPRequestHandler):
    """One request, after which the connection ends. What is wrong with it is said in one line of JSON."""

    timeout, server_version, sys_version, nonce = PATIENCE, "mixlora-dsi", "", ""

    def setup(self) -> None:
        """`timeout` is that of one byte; a request as a whole has no longer."""
        super().setup()
        self.arrival = threading.Timer(PATIENCE, self.stop_reading)
        self.arrival.daemon = True
        self.arrival.start()

    def stop_reading(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def finish(self) -> None:
        self.arrival.cancel()
        super().finish()

    def do_GET(self) -> None:
        try:
            kind, body = self.answer()
        except ValueError as error:
            self.send_error(getattr(error, "status", 400), " ".join(str(error).split()))
        except Exception:
            traceback.print_exc()
            self.send_error(500, "the server failed; its terminal says how")
        else:
            self.reply(200, kind, body)

    do_POST = do_GET

    def answer(self) -> tuple[str, bytes]:
        """Content type and body. Raises ValueError where it is no request that our page makes."""
        site, address, port = self.server.site, urlsplit(self.path), self.server.server_port
        host, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if host not in ([f"127.0.0.1:{port}"], [f"localhost:{port}"]) or {*origins} - {f"http://{host[0]}"}:
            raise Refusal(403, "Host or Origin is not this server")
        if (self.command, address.path) == ("GET", "/"):
            return self.page(site)
        name = address.path.removeprefix("/api/")
        if (self.command, name) not in CALLS:
            known = any(name == other for _, other in CALLS)
            raise Refusal(405 if known else 404, f"no answer to {self.command} {address.path[:80]}")
        if self.command == "POST":
            values = self.posted(site)
        else:
            values = dict(parse_qsl(address.query, errors="strict", max_num_fields=9))
        self.arrival.cancel()
        call = CALLS[self.command, name]
        try:
            arguments = inspect.signature(call).bind(site, **values).args
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from None
        return "application/json", json.dumps(call(*arguments)).encode()

    def posted(self, site: Site) -> dict:
        """The JSON object that came with a POST of our page."""
        token, length = self.headers.get("X-Token", ""), self.headers.get("Content-Length", "")
        if not secrets.compare_digest(token.encode(), site.token.encode()):
            raise Refusal(403, "the token is not of this server; load the page again")
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "wanted Content-Type: application/json")
        if not re.fullmatch("[0-9]{1,19}", length):
            raise Refusal(411, "wanted a Content-Length")
        if int(length) > BODY:
            raise Refusal(413, f"at most {BODY:,} bytes are taken")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refusal(408, f"the body did not arrive within {PATIENCE} seconds")
        try:
            values = json.loads(body)
        except RecursionError:
            values = None
        if not isinstance(values, dict):
            raise ValueError("wanted a JSON object")
        return values

    def page(self, site: Site) -> tuple[str, bytes]:
        """serve.html; its script and its style carry a number drawn anew, without which the browser runs none."""
        self.nonce = secrets.token_urlsafe(16)
        html = PAGE.read_text(encoding="utf-8").replace("{{nonce}}", self.nonce)
        return "text/html; charset=utf-8", html.replace("{{token}}", site.token).encode()

    def reply(self, status: int, kind: str, body: bytes) -> None:
        # also where the first line made no sense, or there is no status line
        self.request_version = "HTTP/1.0"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        own = f"'nonce-{self.nonce}'" if self.nonce else "'none'"
        policy = f"default-src 'none'; script-src {own}; style-src {own}; connect-src 'self'; img-src data:; "
        policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        self.send_header("Content-Security-Policy", policy)
        for header in HEADERS:
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """In JSON. An unknown method or version of HTTP, to http.server a fault of its own, is the client's."""
        code = {501: 405, 505: 400}.get(code, int(code))
        said = json.dumps({"error": message or HTTPStatus(code).phrase})
        self.reply(code, "application/json", said.encode())

    def log_message(self, *line) -> None:
        pass


class Server(ThreadingHTTPServer):
    """On 127.0.0.1 alone; a thread for each of at most CLIENTS requests, more are hung up on."""

    request_queue_size = CLIENTS

    def __init__(self, index: Index, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.site, self.places = Site(index), threading.BoundedSemaphore(CLIENTS)

    def process_request(self, request, client) -> None:
        if self.places.acquire(blocking=False):
            super().process_request(request, client)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, client) -> None:
        try:
            super().process_request_thread(request, client)
        finally:
            self.places.release()

    def handle_error(self, request, client) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # of a client that went away
            traceback.print_exc()


def main(argv: list[str]) -> None:
    parser = command.Parser(
        description="Show a query's way through a finished run, in a browser on this machine."
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    args = parser.parse_args(argv)
    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port {args.port}: wanted 0 to 65535")
    index = Index.open(args.run, args.device)
    try:
        server = Server(index, args.port)
    except OSError as error:
        raise ValueError(f"--port {args.port}: {error.strerror}; pass another, or 0 for a free one") from None
    with server:
        print(f"http://127.0.0.1:{server.server_port}  (Ctrl-C ends)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    command.run(main, "serve.py")
