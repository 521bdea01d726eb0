"""Why does a run not retrieve? Checks of a run folder, in the order in which its stages could have gone wrong.

    python -m tools.doctor RUN [--queries 200] [--device cpu]

Paper    none; it asks of a run what appendix C (docids), Eq. 3-7 (training) and section 3.2 (energies) presuppose
In       a run folder, finished or stopped after some D_t
Out      a line per check: verdict, what was measured and wanted, and advice; exit status 1 where one FAILs
Next     the first FAIL is the place to start: what comes after it often follows from it
Differs  cross-entropy before docid training is judged at its best scale: here it may start above ln K, since inner
         products of embeddings and centroids have the scale of the bi-encoder's loss

Limits are wide. They tell a broken run from a weak one: recall counts beyond chance, which is 10 / N.
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baselines
import command
import data
import dense
import mixlora
import optim
import prepare
import queries
import rq
import store
from arrays import Chain
from config import saved_config
from mixlora import MixedFeedForward, mixed_layers
from search import beam_search, exact_scores, retrieve
from t5 import T5, segment_logits

TOLERANCE = 1e-3  # of sums of log-probabilities, which batches of another shape round otherwise
EMBEDDED, FORCED, EXACT = 64, 64, 24  # most documents embedded again, queries forced, queries scored exactly
EXACT_DOCIDS = 4096  # most docids that every query is scored on
MATRICES = ("in_a", "in_b", "out_a", "out_b")  # of the experts


@dataclass
class Finding:
    verdict: str  # ok, warn, FAIL, or skip where a run has nothing to check
    measured: str
    wanted: str = ""
    advice: str = ""


def verdict(fail: bool, warn: bool = False) -> str:
    return "FAIL" if fail else "warn" if warn else "ok"


def beyond_chance(recall: float, documents: int) -> float:
    """Recall@10 so rescaled that a random ranking of the documents has 0: (r - c) / (1 - c), c = 10 / N."""
    chance = min(10 / documents, 0.9)
    return (recall - chance) / (1 - chance)


def some(rows: Tensor, most: int) -> Tensor:
    """At most so many of these rows (n, ..), the same at every call."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]]


class NothingToAsk(Exception):
    """The run has no test queries."""


class Patient:
    """A run with what several checks use; a model, which may be broken, is loaded when it is first asked for."""

    def __init__(self, folder: Path, queries: int, device: str):
        self.trained, self.folder, self.count = store.LoadedRun(folder, device), folder, queries
        # The folder is whole, so that Run reads no source, and no published weights.
        self.config = replace(saved_config(folder), device=device, t5="", check_memory=False)
        self.run = prepare.Run(self.config, folder, store.Log(folder, writes=False))
        self.t = self.trained.finished[-1]  # the last corpus that was trained on
        self.corpora, self.ids = self.run.corpora[: self.t + 1], self.run.ids
        self.codes = self.trained.docids  # (N, M)
        self.live = store.live_rows(folder, self.corpora)  # rows of documents that are not deleted
        self.books = store.read_tensors(folder / "rq.pt")  # (M, K, D)
        self.embeddings = Chain(prepare.open_embeddings(self.run, self.run.corpora))  # N of (D,), on disk
        self.d0_embeddings = self.embeddings.parts[0]  # (N_0, D)
        self.d0_codes = self.codes[: len(self.d0_embeddings)]  # (N_0, M)
        self.row_of = {self.ids[row]: row for row in self.live.tolist()}

    @cached_property
    def start(self) -> T5:
        """What D_0 starts from: the bi-encoder, with the centroids as its docid table."""
        model = self.checkpoint("dense.pt")
        model.rq = nn.Parameter(self.books.to(self.run.device))
        return model

    @cached_property
    def last(self) -> tuple[T5, rq.Trie]:
        """The model after the last corpus, and the trie of all documents up to there."""
        return self.trained.at(self.t)

    def checkpoint(self, name: str) -> T5:
        return store.load_model(self.folder / name, self.run.device)[0]

    def logged(self, name: str) -> dict[str, list[float]]:
        """stage -> the values of one number in metrics.jsonl."""
        path, values = self.folder / "metrics.jsonl", {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        try:
            for line in map(json.loads, lines):
                if name in line:
                    number = math.nan if line[name] is None else float(line[name])  # see arrays.strict_json
                    values.setdefault(line["stage"], []).append(number)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON lines ({error})") from None
        return values

    def stored(self, rows: Tensor) -> Tensor:
        """Embeddings (R, D) of the documents in these rows of the stream."""
        return torch.stack([self.embeddings[row] for row in rows.tolist()])

    def training_queries(self, t: int) -> list[tuple[set[int], str]]:
        """Pseudo-queries of D_t: of those that a file lists, or drawn as the ones that it was trained on."""
        return [({row}, query) for row, query in self.run.sample(t, self.count, "doctor")]

    def test_queries(self, count: int, *corpora: int) -> list[tuple[set[int], str]]:
        """Test queries with their documents' rows, equally many of each corpus (default: of all) where it has them.

        Raises NothingToAsk where there are none.
        """
        corpora, pairs = corpora or range(len(self.corpora)), []
        for t in corpora:
            corpus, most = self.corpora[t], math.ceil(count / len(corpora))
            chosen = random.Random(f"doctor {t}").sample(list(corpus.test), min(most, len(corpus.test)))
            pairs += [({self.row_of[doc_id] for doc_id in corpus.qrels[q]}, corpus.test[q]) for q in chosen]
        if not pairs:
            raise NothingToAsk
        return pairs

    def tokens(self, pairs: list[tuple[set[int], str]]) -> Tensor:
        return self.run.tokens(pairs).to(self.run.device)

    def hidden(self, model: T5, pairs: list[tuple[set[int], str]]) -> tuple[Tensor, Tensor, list]:
        """Docids (Q, M) of the queries' documents, and the model's hidden states and routes along them."""
        codes = self.codes[[min(rows) for rows, _ in pairs]].to(self.run.device)
        return codes, *model.docid_hidden(*model.encode(self.tokens(pairs)), codes)

    def recall(self, model: T5, trie: rq.Trie, pairs: list[tuple[set[int], str]]) -> float:
        """Recall@10 of docid search, beyond chance."""
        texts, length = [query for _, query in pairs], self.config.query_length
        beam, tokenizer = max(10, self.config.beam), self.run.tokenizer
        rankings = retrieve(model, trie, tokenizer, texts, self.ids, 10, beam, length)
        shares = [len(rows & {row for row, _ in top}) / len(rows) for (rows, _), top in zip(pairs, rankings)]
        return beyond_chance(float(np.mean(shares)), len(trie.documents))


# ------------------------------------------------------------------------------------- documents and their docids


def counts(patient: Patient) -> Finding:
    """corpus.json, documents/, doc_ids.txt, docids.npy and embeddings/ speak of the same documents."""
    corpora, n = patient.run.corpora, len(patient.ids)
    sizes = {"docids.npy": len(patient.codes), "embeddings": len(patient.embeddings)}
    with (patient.folder / "doc_ids.txt").open(encoding="utf-8") as file:
        lines = (line.removesuffix("\n") for line in file)
        moved = sum(line != doc_id for line, doc_id in zip_longest(lines, patient.ids))
    hashes = [item["ids_sha256"] for item in store.read_json(patient.folder / "corpus.json")["corpora"]]
    changed = [f"D{t}" for t, corpus in enumerate(corpora) if store.ids_sha256(corpus) != hashes[t]]
    return Finding(
        verdict(moved > 0 or bool(changed) or set(sizes.values()) != {n}),
        f"{n} documents, {sizes}, {moved} other lines in doc_ids.txt, other hashes {changed}", "equal numbers, ids and hashes",
        "files of different runs were mixed: take all of them from one run, or start anew",
    )  # fmt: skip


def round_trip(patient: Patient) -> Finding:
    """Walks the trie along the docids of some documents, from the root to the leaf, which must name them."""
    codes, (model, trie), (m, k, _) = patient.codes, patient.last, patient.books.shape
    fits = codes.shape[1:] == (m,) and (model.config.codebooks, model.config.centroids) == (m, k)
    fits = fits and bool(((codes >= 0) & (codes < k)).all())
    live = patient.live
    lost = len(live) - len(trie.documents)
    if fits:
        rows = some(live[live < len(codes)], patient.count)
        nodes = trie.root(len(rows))
        for depth in range(m):
            nodes = trie.child(depth, nodes, codes[rows, depth])
        lost += sum(row not in trie.documents_at(leaf) for row, leaf in zip(rows.tolist(), nodes.tolist()))
        lost += int((codes[trie.documents.long()] != trie.rows).any(1).sum())
    return Finding(
        verdict(not fits or lost > 0),
        f"shape {tuple(codes.shape)}, codes {int(codes.min())} to {int(codes.max())}, {lost} documents not in the trie",
        f"shape ({len(patient.ids)}, {m}), codes 0 to {k - 1}, 0 documents",
        "the docid table is cut or made for other M and K: encode the documents anew with rq.pt",
    )  # fmt: skip


def fresh_embeddings(patient: Patient) -> Finding:
    """Embeds some documents again."""
    n, corpora = min(len(patient.embeddings), len(patient.ids)), patient.run.corpora
    rows = some(patient.live[patient.live < n], EMBEDDED)
    titles, texts = (Chain([getattr(corpus, name) for corpus in corpora]) for name in ("titles", "texts"))
    passages = list(queries.passages(*([part[row] for row in rows.tolist()] for part in (titles, texts))))
    ids = data.tokenize(patient.run.tokenizer, passages, patient.config.document_length)
    again, stored = dense.embed(patient.start, ids), patient.stored(rows)
    difference = float((again - stored).norm() / stored.norm())
    return Finding(
        verdict(not difference < 0.05, difference > 0.01), f"relative difference {difference:.4f} when embedded again", "below 0.01",
        "embeddings/ is not dense.pt's on these documents: remove dense.pt and all that was made from it, and resume",
    )  # fmt: skip


def fresh_docids(patient: Patient) -> Finding:
    """Encodes some embeddings again."""
    if made := patient.config.docids:
        return Finding("skip", f"docids come from {made}")
    n = min(len(patient.embeddings), len(patient.codes))
    # Those of few added documents are of the model's choice
    few = [row for c in patient.corpora if patient.run.is_few(c) for row in c.rows]
    by_quantiser = patient.live[~np.isin(patient.live, few)]
    rows = some(by_quantiser[by_quantiser < n], 10 * patient.count)
    again = rq.encode(patient.stored(rows), patient.books, device=patient.run.device)
    same = float((again == patient.codes[rows]).all(1).float().mean())
    return Finding(
        verdict(same < 0.99), f"{same:.1%} of {len(rows)} docids the same when encoded again", "at least 99%",
        "docids.npy is stale or its rows are permuted: encode embeddings/ with rq.pt, in the order of the documents",
    )  # fmt: skip


def distinct_docids(patient: Patient) -> Finding:
    """Tells docids that many documents share, and codebooks that tell little."""
    d0, corpus = rq.report(patient.d0_embeddings, patient.books, patient.d0_codes), patient.corpora[0]
    different = data.different_documents(corpus.titles, corpus.texts)
    distinct = len(patient.codes[patient.live].unique(dim=0)) / len(patient.live)
    full = math.log2(min(patient.books.shape[1], d0.documents))
    return Finding(
        verdict(not rq.are_distinct(d0, different), distinct < 0.9 or min(d0.entropy) < full / 2),
        f"{d0.distinct:.1%} of D_0's, {distinct:.1%} of all; bits per codebook "
        + " ".join(f"{bits:.1f}" for bits in d0.entropy), f"over 95% and 90%; over {full / 2:.1f} of {full:.1f} bits",
        "take more codebooks (--M) or centroids (--K), and look for copies among the documents",
    )  # fmt: skip


def dense_recall(patient: Patient) -> Finding:
    """The bi-encoder on D_0, by its embeddings and by what their docids keep of them."""
    n0 = len(patient.d0_embeddings)
    pairs = [pair for pair in patient.test_queries(patient.count, 0) if max(pair[0]) < n0]
    embedded, relevant = dense.embed(patient.start, patient.run.tokens(pairs)), [rows for rows, _ in pairs]
    both = patient.d0_embeddings, prepare.decoded(patient.books, patient.d0_codes)
    recalls = [dense.recall(embedded, relevant, documents, device=patient.run.device) for documents in both]
    exact, quantised = (beyond_chance(recall, n0) for recall in recalls)
    return Finding(
        verdict(exact < 0.2 or quantised < 0.25 * exact, exact < 0.5 or quantised < 0.5 * exact),
        f"Recall@10 {recalls[0]:.1%}, {recalls[1]:.1%} quantised", "beyond chance half of all, and half of that quantised",
        "docids can be no better than the bi-encoder: train it longer; where only the quantised one is low, raise --M or --K",
    )  # fmt: skip


@torch.no_grad()
def initial_cross_entropy(patient: Patient) -> Finding:
    """Cross-entropy of D_0's pseudo-queries before the first step: codes must be likelier than by chance."""
    codes, hidden, _ = patient.hidden(patient.start, patient.training_queries(0))
    logits = segment_logits(hidden, patient.start.rq)  # (Q, M, K)
    ce = [F.cross_entropy(logits[:, m], codes[:, m]).item() for m in range(codes.shape[1])]
    scales = torch.logspace(-4, 1, 51).tolist()
    best = min(F.cross_entropy(scale * logits[:, 0], codes[:, 0]).item() for scale in scales)
    chance = math.log(patient.books.shape[1])
    return Finding(
        verdict(not best < 0.95 * chance, not ce[0] < 4 * chance),
        f"first position {ce[0]:.2f} ({best:.2f} at its best scale), all {np.mean(ce):.2f}",
        f"first position at its best scale below 0.95 ln K = {0.95 * chance:.2f}, unscaled below 4 ln K",
        "centroids and embeddings do not belong together: docid table = centroids in the codebooks' order, docids of these "
        "documents, logits h C^T without D^-1/2",
    )  # fmt: skip


def docid_table(patient: Patient) -> Finding:
    """D_0's docid table is still near the centroids that it starts from."""
    table, books = patient.checkpoint("D0.pt").rq.detach().cpu(), patient.books
    if patient.config.docid_kind == "atomic":
        books = books[:, : patient.run.corpora[0].rows.stop]
    near = float(F.cosine_similarity(table, books, dim=-1).mean(1).min())
    length = table.norm(dim=-1).mean(1) / books.norm(dim=-1).mean(1)
    return Finding(
        verdict(not (near > 0.3 and length.min() > 0.4 and length.max() < 2.5), near < 0.6),
        f"cosine {near:.2f}, length {length.min():.2f} to {length.max():.2f} times the centroids of rq.pt, of the worst codebook", "cosine over 0.6, length 0.4 to 2.5",
        "start the docid table from the centroids, unscaled and codebook by codebook",
    )  # fmt: skip


def log(patient: Patient) -> Finding:
    """The logged cross-entropy of D_0 fell below guessing; gradients are finite, and not always cut to a hundredth."""
    chance, ce, norms = math.log(patient.books.shape[1]), *map(patient.logged, ("ce", "gradient_norm"))
    if "D0" not in ce:
        return Finding("skip", "metrics.jsonl has no line of D0")
    begin, *_, end = ce["D0"] * 2
    broken = [stage for stage, values in norms.items() if not all(map(math.isfinite, values))]
    always_cut = [stage for stage, values in norms.items() if min(values) > 100 * optim.CLIP]
    return Finding(
        verdict(bool(broken) or not end < chance, bool(always_cut)),
        f"D_0's cross-entropy {begin:.2f} to {end:.2f}; gradients not finite in {broken}, always cut in {always_cut}",
        f"below ln K = {chance:.2f} at the end, gradients finite and at times below 100 x clip = {100 * optim.CLIP:g}",
        "see the checks above, --d0_lr and --d0_steps; for gradients a lower learning rate, or --precision float32",
    )  # fmt: skip


def groups(model: T5, frozen: list[int]) -> dict[str, list[Tensor]]:
    """The model's tensors by what trains together. Of each layer's experts and router rows so many of the oldest are
    `frozen`; those after them train.
    """
    decoder, mixture = [model.decoder_bias, model.decoder_norm], []
    for layer, n in zip(mixed_layers(model), frozen):
        rows = torch.cat([layer.router_old, layer.router_new])
        mixture += [x.split([n, len(x) - n]) for x in (rows, *map(layer.stacked, MATRICES))]
    for b in model.decoder:
        plain = b.ff.plain if isinstance(b.ff, MixedFeedForward) else b.ff
        attentions = [getattr(a, "plain", a) for a in (b.self_attention, b.cross_attention)]
        decoder += [b.self_norm, b.cross_norm, *attentions, b.ff_norm, plain]
    encoder = [model.encoder, model.encoder_bias, model.encoder_norm]
    bottlenecks = {id(p): p for adapter in baselines.adapters(model) for p in adapter.parameters()}
    return {
        "word table": [model.word],
        "docid table": [model.rq],
        "encoder": [p for part in encoder for p in part.parameters() if id(p) not in bottlenecks],
        "decoder": [p for part in decoder for p in part.parameters() if id(p) not in bottlenecks],
        "adapters": list(bottlenecks.values()),
        "prompts": [model.prefix.keys_values] if model.prefix else [],
        "LoRA on attention": [p for _, p in mixlora.attention_parameters(model)],
        "older experts": [old for old, _ in mixture],
        "newest experts": [new for _, new in mixture],
    }


def frozen_groups(t: int, model: T5, config) -> set[str]:
    """Names of the groups that no step on D_t may move."""
    adapters, mixture = bool(baselines.adapters(model)), bool(mixed_layers(model))
    if t == 0:
        return {"word table"} if mixture else set()
    if not (mixture or model.prefix or adapters or config.insert):
        return set()
    others = {"docid table": config.insert, "word table": not adapters}  # IncDSI: the table's old rows
    return {"encoder", "decoder", "older experts"} | {name for name, rests in others.items() if rests}


def moved_by(before: list[Tensor], after: list[Tensor]) -> float:
    """||after - before|| / ||before||; rows that one has more are no change."""
    change = 0.0
    for a, b in zip(before, after):
        both = tuple(slice(min(sizes)) for sizes in zip(a.shape, b.shape))
        change += (b[both] - a[both]).double().pow(2).sum()
    return float((change / sum(a.double().pow(2).sum() for a in before)) ** 0.5)


@torch.no_grad()
def updates(patient: Patient) -> Finding:
    """How far each stage moved every group: what trains must move, what is frozen must not."""
    before, stages, rates = patient.start, [], patient.logged("lr")
    faults = {"did not train": [], "frozen but moved": [], "large": []}
    for t in patient.trained.finished:
        after = patient.checkpoint(f"D{t}.pt")
        if t and t - 1 not in patient.trained.finished:  # dropped since
            before = after
            continue
        frozen, counts = frozen_groups(t, after, patient.config), [len(x.old) for x in mixed_layers(after)]
        both = zip(groups(before, counts).items(), groups(after, counts).values())
        ratios = {name: moved_by(old, new) for (name, old), new in both if any(map(Tensor.numel, old))}
        for name, ratio in ratios.items():
            faults["frozen but moved"] += [f"D{t} {name}"] * (name in frozen and ratio != 0)  # NaN too
            faults["did not train"] += [f"D{t} {name}"] * (name not in frozen and not ratio > 0)
            faults["large"] += [f"D{t} {name}"] * (name not in frozen and ratio > 1)
        rate = f"lr {max(rates[f'D{t}']):.0e} " if f"D{t}" in rates else ""
        shown = [f"{name} {ratio:.3g}" for name, ratio in ratios.items() if name not in frozen]
        shown += [f"frozen {max(ratios[name] for name in frozen & set(ratios)):.3g}"] if frozen else []
        stages.append(f"D{t} {rate}" + ", ".join(shown))
        before = after
    return Finding(
        verdict(bool(faults["did not train"] or faults["frozen but moved"]), bool(faults["large"])),
        "; ".join(stages + [f"{fault}: {names}" for fault, names in faults.items() if names]),
        "over 0 and at most 1 where a group trains, 0 where it is frozen",
        "what did not train was frozen or not given to the optimiser; what moved though frozen was given to it (weight decay "
        "moves it too), or files of two runs are mixed; what is large wants a lower learning rate",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ retrieval


def learnt(patient: Patient) -> Finding:
    """Recall on queries as trained on against test queries: neither, both, or the former alone (memorised)."""
    recalls, verdicts, at_first = [], [("ok", "")], 0.0
    for t, i in dict.fromkeys([(0, 0), (patient.t, patient.t), (patient.t, 0)]):  # D_i by the model after D_t
        if not patient.corpora[i].test:
            continue
        model, trie = patient.last if t == patient.t else patient.trained.at(t)
        trained = patient.recall(model, trie, patient.training_queries(i))
        tested = patient.recall(model, trie, patient.test_queries(patient.count, i))
        recalls.append(f"D_{i} after D{t} {trained:.1%} trained on, {tested:.1%} test")
        at_first = tested if t == 0 else at_first
        if i < t:
            advice = f"D{t}.pt forgot D_0: raise --dreams or --kl_coef, or lower --lr"
            verdicts.append((verdict(False, tested < 0.5 * at_first), advice))
        elif not trained >= 0.3:
            advice = f"D{t}.pt has not learnt D_{t}: see the checks above"
            verdicts.append((verdict(not trained >= 0.1, True), advice))
        elif tested < 0.5 * trained:
            advice = f"D{t}.pt has memorised its training queries: take more, and more varied, pseudo-queries"
            verdicts.append((verdict(tested < 0.25 * trained, True), advice))
    recalls, wanted = "; ".join(recalls), "30% trained on, half of that in test, half of D_0 kept"
    worst, advice = max(verdicts, key=lambda pair: ("ok", "warn", "FAIL").index(pair[0]))
    return Finding(worst, f"Recall@10 beyond chance: {recalls}", wanted, advice)


def answers_dreams(patient: Patient) -> Finding:
    """How often the model finds the docid that a dream was made from, and the model before it, which it was held to."""
    config, t, generator = patient.config, patient.t, torch.Generator().manual_seed(0)
    if not (config.dreams and t):
        return Finding("skip", f"D{t}.pt was trained on no dreams")
    if t - 1 not in patient.trained.finished:
        return Finding("skip", f"D{t - 1}.pt, with which D{t}.pt is compared, was dropped")
    if not (drawer := prepare.find_dreams(patient.run, patient.start, patient.books, wanted=False)):
        return Finding("skip", "the tokenizer has too few words for dreams")
    rows = patient.run.choose(t, patient.count, generator)
    codes, shares = patient.codes[rows], []
    ids, beam = drawer.draw(codes, generator).to(patient.run.device), max(10, config.beam)
    for model, trie in patient.trained.at(t - 1), patient.last:
        leaves = torch.cat([beam_search(model, trie, part, beam)[0] for part in ids.split(64)])
        begin, end = leaves[:, :10].unbind(-1)
        answers = trie.rows[begin.clamp(max=len(trie.rows) - 1)] == codes[:, None]  # (Q, 10, M)
        shares.append(float((answers.all(-1) & (begin < end)).any(1).float().mean()))
    before, now = shares
    return Finding(
        verdict(now < 0.5 * before, now < 0.8 * before or before < 0.2),
        f"{now:.1%} of {len(ids)} dreams of D_0..D_{t - 1} find their docid among 10, {before:.1%} by D{t - 1}.pt",
        "80% of the latter, and that 20%",
        "raise --dream_kl or --dream_batch, or lower --lr; where both are low, dreams say little of their documents "
        "(python -m tools.dreams): train the bi-encoder longer, or take more codebooks",
    )  # fmt: skip


def reachable(patient: Patient) -> Finding:
    """Every document that a test query asks for is in the trie and has a query to train on."""
    indexed, rng = set(patient.last[1].documents.tolist()), random.Random("doctor")
    relevant = {d for corpus in patient.corpora for labels in corpus.qrels.values() for d in labels}
    rows = {doc_id: patient.row_of.get(doc_id) for doc_id in relevant}
    unknown = sorted(doc_id for doc_id, row in rows.items() if row not in indexed)
    known, silent = sorted(row for row in rows.values() if row in indexed), []
    for row in rng.sample(known, min(len(known), 10 * patient.count)):
        try:
            patient.run.draw(row, rng)
        except (ValueError, IndexError):  # too short a text, or none listed
            silent.append(patient.ids[row])
    return Finding(
        verdict(bool(unknown or silent)),
        f"{len(rows)} asked for, {len(unknown)} not indexed {unknown[:3]}, {len(silent)} without a query {silent[:3]}",
        "0 not indexed, 0 without a query to train on",
        "the docid table is cut, or labels name documents that the corpora lack; a document without a query stays unknown",
    )  # fmt: skip


@torch.no_grad()
def scores_agree(patient: Patient) -> Finding:
    """The beam's scores are those of teacher forcing: cache, positions and tables of the two agree."""
    (model, trie), differences = patient.last, []
    for ids in patient.tokens(patient.test_queries(min(FORCED, patient.count))).split(1):
        leaves, scores = beam_search(model, trie, ids, patient.config.beam)
        begin, end = leaves[0].T
        codes = trie.rows[begin[begin < end]].long()
        forced = exact_scores(model, ids, codes.to(ids.device))[0]
        differences.append((scores[0, : len(forced)] - forced).abs().max())
    worst = float(torch.stack(differences).max())  # NaN where one is
    return Finding(
        verdict(not worst < TOLERANCE), f"largest difference {worst:.2g} over {len(differences)} queries", f"below {TOLERANCE:g}",
        "search and training see different networks: start token, positions of cached keys, docid table; NaN: broken weights",
    )  # fmt: skip


@torch.no_grad()
def beam_reaches_best(patient: Patient) -> Finding:
    """How often the best docid of all survives the beam."""
    (model, trie), hits = patient.last, []
    docids = some(trie.rows.unique(dim=0).long(), EXACT_DOCIDS)
    for ids in patient.tokens(patient.test_queries(min(EXACT, patient.count))).split(1):
        best = beam_search(model, trie, ids, patient.config.beam)[1].max()
        hits.append(bool(best >= exact_scores(model, ids, docids.to(ids.device)).max() - TOLERANCE))
    share = sum(hits) / len(hits)
    return Finding(
        verdict(share < 0.5, share < 0.9),
        f"best of {len(docids)} docids in the beam for {share:.1%} of {len(hits)} queries", "at least 90%",
        f"good docids are pruned early: pass --beam above {patient.config.beam} to eval.py or search.py",
    )  # fmt: skip


@torch.no_grad()
def expert_load(patient: Patient) -> Finding:
    """Which experts the tokens of test queries reach, along the docids that they ask for; and which are still zero."""
    model = patient.last[0]
    if not (layers := mixed_layers(model)):
        return Finding("skip", f"D{patient.t}.pt has no mixture")
    routes, loads, idle, zero = patient.hidden(model, patient.test_queries(patient.count))[2], [], [], []
    for number, (layer, route) in enumerate(zip(layers, routes)):
        choices, mass = mixlora.first_choice_share(route.scores).tolist(), route.gates.mean((0, 1)).tolist()
        shares = " ".join(f"{100 * a:.0f}/{100 * b:.0f}" for a, b in zip(choices, mass))
        loads.append(f"layer {number} {shares}")
        b = torch.cat([layer.stacked(name).flatten(1) for name in ("in_b", "out_b")], dim=1)  # (E, all of B)
        zero += [f"layer {number} expert {e}" for e in range(len(layer)) if not b[e].any()]
        idle += [f"layer {number} expert {e}" for e, share in enumerate(mass) if not share >= 0.01]
    faults = f", idle: {idle}" * bool(idle) + f", B = 0: {zero}" * bool(zero)
    return Finding(
        verdict(bool(zero), bool(idle)), "percent of first choices/gates: " + "; ".join(loads) + faults,
        "each 1% of gates or more, none with B = 0",
        "an expert without tokens learns nothing, and of an older one what it knew is lost: --router_row ood_mean for a new "
        "row, a smaller --align_coef where new rows outbid the old ones",
    )  # fmt: skip


def ood_statistics(patient: Patient) -> Finding:
    """Every mixed layer of every checkpoint knows the energies of what it has seen."""
    broken, seen, unseen, m = [], 0, 0, len(patient.books)
    for t in patient.trained.finished:
        large = [c for c in patient.corpora[: t + 1] if not patient.run.is_few(c)]
        model, stats = store.load_model(patient.folder / f"D{t}.pt")
        layers = mixed_layers(model)
        if len(stats) != len(layers):
            broken.append(f"D{t}: {len(stats)} statistics of {len(layers)} layers")
        for number, (layer, stat) in enumerate(zip(layers, stats)):
            if stat.mode == "pooled":  # a sketch of each corpus since the mixture came, and the scale
                arrived = len(large) - 1 + patient.config.d0_mixture  # few: in a pool, later in a sketch
                pooled = t + 1 > len(large)
                good = len(stat.arrivals) == arrived or (pooled and len(stat.arrivals) > arrived)
                good &= len(stat.newest) == (arrived > 1) and bool(stat.dreams[1] > 0)
                values = [stat.arrivals.flatten(), stat.newest.flatten(), stat.dreams]
            else:
                values, good = [stat.mean, stat.variance], bool((stat.variance >= 0).all())
                good &= stat.mean.shape == stat.variance.shape == (len(layer), m)
                unseen += int((stat.variance == 0).sum())  # of (expert, position) without a token
            good &= stat.experts == len(layer) and bool(torch.cat(values).isfinite().all())
            broken, seen = broken + [f"D{t} layer {number}"] * (not good), seen + 1
    return Finding(
        verdict(bool(broken), unseen > 0) if seen or broken else "skip",
        f"{seen} of layers, {unseen} variances of 0, broken: {broken}",
        "one for each mixed layer, finite, of its number of experts; a sketch of each corpus, or variances over 0",
        "without them no corpus can be told from another: remove the checkpoint named and resume; variances of 0 are of "
        "positions that no expert's tokens reached",
    )  # fmt: skip


CHECKS = {
    counts: "document counts and ids", round_trip: "docid round trip", fresh_embeddings: "embeddings of these documents",
    fresh_docids: "docids of these embeddings", distinct_docids: "distinct docids", dense_recall: "bi-encoder on D_0",
    initial_cross_entropy: "cross-entropy at step 0", docid_table: "docid table of D0.pt",
    log: "log of the training", updates: "relative updates",
    reachable: "test documents", learnt: "learnt, not memorised", answers_dreams: "dreams answered", scores_agree: "search score against forced",
    beam_reaches_best: "beam against exact search", expert_load: "experts", ood_statistics: "OOD statistics",
}  # fmt: skip


def examine(patient: Patient) -> Iterator[tuple[str, Finding]]:
    """All checks. Files may be so broken that one of them cannot be carried out, which is a FAIL too."""
    for check, name in CHECKS.items():
        try:
            yield name, check(patient)
        except NothingToAsk:
            yield name, Finding("skip", "there are no test queries to ask")
        except (ValueError, KeyError, IndexError, RuntimeError, TypeError, OSError) as error:
            reason = f"could not be checked ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            advice = "files do not fit each other: mend what FAILs above first"
            yield name, Finding("FAIL", reason, "a whole run", advice)


def main(argv: list[str]) -> int:
    """Prints the findings; 1 where one of them FAILs, else 0."""
    parser = command.Parser(description="Find out why a run does not retrieve.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--queries", type=int, default=200, help="most queries of a check (default 200)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.queries < 1:
        raise ValueError(f"--queries {args.queries}: wanted a positive number")
    tally = dict.fromkeys(("ok", "warn", "FAIL", "skip"), 0)
    for name, finding in examine(Patient(args.run, args.queries, command.check_device(args.device))):
        tally[finding.verdict] += 1
        wanted = f" (wanted: {finding.wanted})" * bool(finding.wanted)
        print(f"{finding.verdict:4}  {name}: {finding.measured}{wanted}", flush=True)
        if finding.verdict in ("warn", "FAIL"):
            print(f"      -> {finding.advice}")
    print(", ".join(f"{number} {kind}" for kind, number in tally.items()))
    return int(tally["FAIL"] > 0)


if __name__ == "__main__":
    command.run(main, "tools.doctor")
