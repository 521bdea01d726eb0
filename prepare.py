"""The stages before D_0: corpora, tokenizer, bi-encoder and docids; and the rows of BM25 and the bi-encoder beside.

Paper    appendix C (bi-encoder), section 2 and Eq. 9 (docids), section 4.1 (BM25 and dense retrieval as references)
In       Config and a run folder
Out      a Run, which all stages are handed; embeddings (n, D) of each corpus; codebooks (M, K, D) and docids (N, M)
Next     train.py trains on D_0 and on each later corpus
Differs  see dense.py and rq.py; the tokenizer is trained on D_0 where no published weights bring one. General text,
         ours, stands for T5's pre-training: tokenizer, bi-encoder and codebooks are fitted on it too
"""

import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import arrays
import command
import data
import dense
import distributed
import dream
import eval as scoring
import memory
import ood
import published
import queries
import rq
import store
import weights
from arrays import ArrayWriter, Chain, Tokens, open_array
from bm25 import BM25
from config import Config
from dream import Dreams, dreams
from reading import Problems, read_pseudo_queries
from search import Ranking
from t5 import T5

ENOUGH = 1500  # documents of D_0 for the small presets' M, K and vocab; of fewer, these follow from the number (ours)


@dataclass
class Prepared:
    """What training on D_0 and on every D_t starts from."""

    bi_encoder: T5
    books: Tensor  # (M, K, D) codebooks; of atomic docids (1, N, D)
    codes: Tensor  # (N, M) docids of all corpora
    dreams: Dreams | None


class Run:
    """What all stages share: config, run folder, corpora, tokenizer, and pseudo-queries of each corpus.

    The main process reads and writes; the others find the files. What belongs to one corpus is opened when a stage
    first asks for it.
    """

    def __init__(self, config: Config, folder: Path, log: store.Log):
        self.folder, self.log = folder, log
        self.device = torch.device(config.device)
        self.t5 = None  # folder of published weights; a run that has its bi-encoder needs them no more
        if config.t5 and not (folder / "dense.pt").exists():
            if distributed.is_main_process():
                weights.find_t5(config.t5, log=log.line)
            distributed.wait()
            self.t5 = weights.find_t5(config.t5, log=log.line)
            check_weights(config, self.t5)
        if distributed.is_main_process():
            (report_changes if (folder / "corpus.json").exists() else read)(config, folder, log)
            shutil.rmtree(folder / "reading", ignore_errors=True)
        distributed.wait()
        self.load_corpora()
        self.config = config = sized(config, len(self.corpora[0].rows))
        self.general = store.load_general(folder)  # text that stands for pre-training, or None
        if distributed.is_main_process() and not (folder / "tokenizer.model").exists():
            store.write(folder / "tokenizer.model", self._tokenizer())
        distributed.wait()
        self.tokenizer = data.load_tokenizer(folder / "tokenizer.model")
        self.resume = store.Resume(folder, config.save_seconds, log)
        self.listed = (folder / "pseudo_queries").exists()  # pseudo-queries came from a file
        sizes = [len(corpus.rows) for corpus in self.corpora if not self.is_few(corpus)]
        few = sum(len(corpus.rows) for corpus in self.corpora if self.is_few(corpus))
        sizes += [min(ood.FEW, few - start) for start in range(0, few, ood.FEW)]  # they grow a layer together
        if config.docid_kind == "atomic":
            rq.require_few(sum(sizes))
        if config.check_memory:
            free = memory.free_memory(config.device)
            n_general = len(self.general.rows) if self.general else 0
            done, left = store.Stages(folder), None  # None: all
            if "rq" in done and not (left := sum(corpus.name not in done for corpus in self.corpora)):
                sizes, left = [*sizes, 1], 1  # what it may take in
            workload = memory.Workload(tuple(sizes), config.document_length, n_general)
            memory.require_memory(config, workload, free, config.device, left)

    def load_corpora(self) -> None:
        """What the folder holds of corpora now."""
        self.corpora = store.load_corpora(self.folder)
        self.live = store.live_rows(self.folder, self.corpora)  # rows of documents not deleted or replaced
        self.excluded = store.load_excluded(self.folder)  # digests of test queries; no pseudo-query is one
        self._samplers = {}

    @staticmethod
    def is_few(corpus: data.Corpus) -> bool:
        """Was it added, and has so few documents that they count with others?"""
        return bool(corpus.added) and len(corpus.rows) < ood.FEW

    @property
    def ids(self) -> Chain:
        """Document ids of D_0..D_T, by document row."""
        return Chain([corpus.ids for corpus in self.corpora])

    def live_of(self, corpus: data.Corpus) -> Sequence[int]:
        """Rows of a corpus's documents that are not deleted."""
        rows = within(self.live, corpus)
        return corpus.rows if len(rows) == len(corpus.rows) else rows.tolist()

    def choose(self, t: int, count: int, generator: torch.Generator) -> Tensor:
        """Rows (count,) of documents of D_0..D_{t-1} to dream of, none of them deleted or about to be replaced.

        Added corpora of few documents count as one together.
        """
        live, groups, few = self.live, [], self.live[:0]
        for corpus in self.corpora[:t]:
            rows = within(live, corpus)
            if self.is_few(corpus):
                few = torch.cat([few, rows])
            elif len(rows):
                groups.append(rows)
        groups += [few] if len(few) else []
        ends = torch.tensor([len(rows) for rows in groups]).cumsum(0).tolist()
        return torch.cat(groups)[dream.choose(ends, count, generator)]

    @property
    def read_first(self) -> list[data.Corpus]:
        """What tokenizer, bi-encoder and quantiser are fitted on: D_0 and, where there is some, general text."""
        return [self.corpora[0], self.general] if self.general else [self.corpora[0]]

    @cached_property
    def general_sampler(self) -> queries.PseudoQuerySampler:
        """Draws pseudo-queries of the general text, by its own rows."""
        return queries.PseudoQuerySampler(self.general.titles, self.general.texts, self.idf, self.excluded)

    @cached_property
    def idf(self) -> queries.Idf:
        """Inverse document frequencies of the words of D_0 and of general text."""
        return queries.Idf.load(self.folder / "idf.json")

    def sampler(self, t: int) -> queries.PseudoQuerySampler | queries.ListedPseudoQueries:
        """Draws pseudo-queries of D_t's documents."""
        if t not in self._samplers:
            corpus, place = self.corpora[t], self.folder / "pseudo_queries" / f"D{t}"
            if place.exists():
                self._samplers[t] = queries.ListedPseudoQueries(place, corpus.first_row)
            else:
                given = corpus.titles, corpus.texts, self.idf, self.excluded, corpus.first_row
                self._samplers[t] = queries.PseudoQuerySampler(*given)
        return self._samplers[t]

    def draw(self, row: int, rng: random.Random) -> str:
        """A pseudo-query of the document in this row of the stream."""
        t = next(t for t, corpus in enumerate(self.corpora) if row in corpus.rows)
        return self.sampler(t).draw(row, rng)

    def _tokenizer(self) -> bytes:
        """The SentencePiece model that --tokenizer names, that comes with the weights, or that D_0 trains."""
        path = Path(self.config.tokenizer) if self.config.tokenizer else self.t5 and self.t5 / "spiece.model"
        if not path:
            return data.train_tokenizer(chain(*(c.passages() for c in self.read_first)), self.config.vocab)
        data.load_tokenizer(path)
        return path.read_bytes()

    def pseudo_queries(self, t: int, per_document: int, purpose: str) -> list[tuple[int, str]]:
        """A fixed list of D_t's (document row, pseudo-query), the same at every call; checked for leaks."""
        seed = f"{self.config.seed} {purpose} {t}"
        rows = self.live_of(self.corpora[t])
        return self.checked(t, queries.draw_pseudo_queries(self.sampler(t), rows, per_document, seed))

    def training_queries(self, t: int) -> list[tuple[int, str]]:
        """What D_t, t >= 1, trains on: all of its pseudo-queries from the file, or a drawn list."""
        if not isinstance(self.sampler(t), queries.ListedPseudoQueries):
            return self.pseudo_queries(t, self.config.pseudo_per_document, "training")
        live = set(self.live_of(self.corpora[t]))
        return self.checked(t, [pair for pair in self.sampler(t).pairs() if pair[0] in live])

    def sample(self, t: int, count: int, purpose: str) -> list[tuple[int, str]]:
        """Some `count` pairs of D_t, at least one, as evenly over its documents as that goes."""
        count, rng = max(1, count), random.Random(f"{self.config.seed} {purpose} {t}")
        rows = list(self.live_of(self.corpora[t]))
        chosen = rows * (count // max(1, len(rows))) or rng.sample(rows, min(count, len(rows)))
        return self.checked(t, [(row, self.sampler(t).draw(row, rng)) for row in chosen])

    def checked(self, t: int, pairs: list[tuple[int, str]]) -> list[tuple[int, str]]:
        """The pairs, where each is of D_t and no test query; data.check_no_leak raises ValueError otherwise."""
        data.check_no_leak(t, self.corpora[t].rows, pairs, self.excluded)
        return pairs

    def tokens(self, pairs: list[tuple[int, str]]) -> Tensor:
        """Token ids (Q, S) of the queries of (row, query) pairs."""
        return data.tokenize(self.tokenizer, [query for _, query in pairs], self.config.query_length)

    def ready(self, model: T5) -> T5:
        """The model on this process's device, with the main process's weights, as the flags want it to compute."""
        model.to(self.device)
        distributed.copy_from_main(model)
        model.recompute = self.config.recompute
        if self.config.compile:
            for block in [*model.encoder, *model.decoder]:
                block.compile(dynamic=True)
        return model

    def after(self, t: int) -> tuple[T5, list]:
        """The model and OOD statistics that D_t's checkpoint holds."""
        return store.load_model(self.folder / f"D{t}.pt")


def within(rows: Tensor, corpus: data.Corpus) -> Tensor:
    """Those of the rows that are of this corpus."""
    return rows[(rows >= corpus.rows.start) & (rows < corpus.rows.stop)]


def read(config: Config, folder: Path, log: store.Log) -> None:
    """Reads and splits the corpora into the run folder; corpus.json, written last, says that all is there."""
    reading = folder / "reading"  # documents before they are split
    shutil.rmtree(folder / "pseudo_queries", ignore_errors=True)  # of a reading that was stopped
    if config.data == "boolq":
        log.line("reading BoolQ (downloaded once, about 20 MB)")
        collection = data.read_boolq(config.seed, store=reading, skip_invalid=config.skip_invalid)
    elif config.data in published.BENCHMARKS:
        place = Path(config.data_dir)
        collection = published.read(config.data, place, log.line, reading, config.skip_invalid)
    else:
        tested = config.splits != "100"
        collection = data.read_beir(Path(config.data), config.skip_invalid, reading, tested)
    equal, general, sources = merge_or_count(config, collection, log), None, [collection.problems]
    if config.general:
        place, texts = folder / "documents" / "general", collection.documents.texts
        sources.append(Problems(config.skip_invalid))
        general, known = data.read_general(config.general, texts, place, sources[-1])
        log.line(f"general text: {len(general)} documents, never indexed; {known} left out that are indexed")
    splits, spare = config.splits, 0
    if splits == "paper":
        splits, spare = published.paper_split(config.data, collection)
    corpora, left_out = data.split(collection, splits, config.split_by, config.seed, spare)
    for t, corpus in enumerate(corpora):
        counts = (
            f"{len(corpus.ids)} documents, {len(corpus.train)} annotated and {len(corpus.test)} test queries"
        )
        log.line(f"D{t}: {counts}, ids sha256 {store.ids_sha256(corpus)[:16]}")
        if not corpus.test and len(corpora) > 1:
            raise ValueError(f"D_{t} got no test query; choose fewer or larger corpora with --splits")
    check_sizes(config, len(corpora[0].ids), log)
    manifest = published.manifest(config.data, collection, corpora)
    listed, problems = collection.pseudo, None
    if config.pseudo_queries not in ("", "drawn"):
        sources.append(problems := Problems(config.skip_invalid))
        listed = read_pseudo_queries(Path(config.pseudo_queries), problems)
    if listed and config.pseudo_queries != "drawn":
        documents = [(corpus.ids, corpus.titles, corpus.texts) for corpus in corpora]
        excluded, place = data.excluded_queries(corpora), folder / "pseudo_queries"
        listed = ((place, collection.merged.get(doc_id, doc_id), query) for place, doc_id, query in listed)
        counts = queries.store_pseudo_queries(listed, place, documents, excluded, problems)
        manifest["pseudo-queries"] = dict(counts)
    for found in sources:
        found.check()
        left_out.update(found.counts)
    for reason, count in left_out.items():
        log.line(f"left out, {reason}: {count}")
    for name, value in manifest.items():
        log.line(f"{name}: {value}")
    if config.data not in ("boolq", *published.BENCHMARKS):
        manifest["files"] = data.describe_files(Path(config.data))
    store.save_corpora(folder, config.data, corpora, left_out, manifest | equal, general)


def merge_or_count(config: Config, collection: data.Collection, log: store.Log) -> dict:
    """Names equal documents in the log, and returns this for the manifest; --merge_equal keeps one of each."""
    documents = collection.documents
    groups = data.equal_documents(documents.titles, documents.texts)
    if not groups:
        return {}
    pairs = [f"{documents.ids[row]} = {documents.ids[group[0]]}" for group in groups for row in group[1:]]
    said = f"{len(pairs)} documents equal others: {', '.join(pairs[:10])}{', ..' * (len(pairs) > 10)}"
    if config.merge_equal:
        data.merge_equal(collection, groups)
        said += "; merged, with the labels and training queries of all"
    log.line(said)
    return {"equal documents": said}


def sized(config: Config, documents: int) -> Config:
    """The config with M, K and vocab by the number of D_0's documents where they are 0."""
    codebooks, centroids = (6, 256) if documents >= ENOUGH or config.docids else rq.suggest(documents)
    if config.K:  # at least twice the bits that tell the documents apart
        codebooks = max(codebooks, math.ceil(2 * math.log2(documents) / math.log2(config.K)))
        centroids = config.K
    if config.docid_kind == "pq":
        codebooks = next(m for m in range(codebooks, config.width + 1) if config.width % m == 0)
    vocab = min(8000, 500 + 50 * documents)
    return replace(config, M=config.M or codebooks, K=centroids, vocab=config.vocab or vocab)


def check_weights(config: Config, t5: Path) -> None:
    """Raises ValueError where a published T5 has too few decoder blocks for `--layers`, or a width that the M of product
    quantisation does not divide; before anything is read.
    """
    shape, _ = weights.read_shape(t5, config.M, config.K)
    if config.mixture and config.layers > shape.decoder_blocks:
        raise ValueError(
            f"--layers {config.layers}: wanted at most the {shape.decoder_blocks} decoder blocks of {config.t5}"
        )
    if config.docid_kind == "pq" and config.M and shape.width % config.M:
        raise ValueError(
            f"--docid_kind pq wants an --M that divides the width of {config.t5}, {shape.width}; M is {config.M}"
        )


def check_sizes(config: Config, documents: int, log: store.Log) -> None:
    """Raises ValueError where D_0's documents are too few for what is to be fitted on them, before any training."""
    if documents < 2:
        raise ValueError("D_0 has 1 document, wanted 2 or more to tell apart; pass fewer or other --splits")
    chosen = sized(config, documents)
    if chosen.docid_kind != "atomic" and documents > chosen.K**chosen.M:
        raise ValueError(
            f"--M {chosen.M} codes of --K {chosen.K} are fewer docids than D_0's {documents} documents; pass more"
        )
    if not (chosen.docid_kind == "atomic" or chosen.docids):
        rq.require_points(documents, chosen.K, chosen.rq_pseudo if chosen.docid_kind == "rq" else 0)
    if chosen != config:
        log.line(f"D_0 has {documents} documents: M {chosen.M}, K {chosen.K}, vocabulary {chosen.vocab}")


def report_changes(config: Config, folder: Path, log: store.Log) -> None:
    """Says which files of the BEIR folder are others than those that the run has read."""
    was = store.read_json(folder / "corpus.json")["manifest"].get("files")
    if was and Path(config.data).is_dir() and (now := data.describe_files(Path(config.data))) != was:
        changed = ", ".join(name for name in data.BEIR_FILES if now.get(name) != was.get(name))
        to_do = command.quoted("python", "train.py", "--extend", folder, "--data", "DIR")
        log.line(
            f"{config.data} has changed since it was read ({changed}): this run does not hold what is new; put new "
            f"documents into a folder DIR and pass them to {to_do}"
        )


# ------------------------------------------------------------------------------------------------- bi-encoder


def dense_stage(run: Run) -> T5:
    """The bi-encoder, trained on D_0 and general text; it embeds the documents of each corpus (n, D), on disk."""
    config, path = run.config, run.folder / "dense.pt"
    if path.exists():
        drop_examples(run)
        return run.ready(store.load_model(path)[0])
    everything = [*run.read_first, *run.corpora[1:]]
    if distributed.is_main_process():
        for corpus in everything:
            document_tokens(run, corpus)
    distributed.wait()
    passages = Tokens.joined([document_tokens(run, corpus) for corpus in run.read_first])
    torch.manual_seed(config.seed)
    if run.t5:
        model = weights.read_published(run.t5, config.M, config.K, config.dropout)
        check_vocabulary(run.tokenizer.vocab_size(), model.config.vocab, config.t5)
    else:
        shape = replace(memory.network(config), vocab=run.tokenizer.vocab_size(), dropout=config.dropout)
        model = T5(shape)
        weights.start_from_lsa(model, passages)
    run.ready(model)
    run.checked(0, run.corpora[0].train)
    for teacher in filter(None, config.teacher.split(",")):  # before any training
        dense.read_teacher(Path(teacher), run.corpora[0], config.skip_invalid)
    dense.train(run, model, passages)
    if distributed.is_main_process():
        for corpus in everything:
            embed_documents(run, model, corpus)
        store.save_model(path, model, [])
        drop_examples(run)
    distributed.wait()
    return model


def drop_examples(run: Run) -> None:
    """Removes what dense.train keeps for a stop within its rounds, which are over."""
    for examples in run.folder.glob("examples_*.pt"):
        examples.unlink(missing_ok=True)  # another process may have been faster


def document_tokens(run: Run, corpus: store.StoredCorpus) -> Tokens:
    """Token ids of a corpus's documents, in a store that is written once."""
    length, n = run.config.document_length, len(corpus.rows)
    place = run.folder / "cache" / f"documents_{length}_{corpus.name}.bin"

    def report(cut: int) -> None:
        if cut:
            run.log.line(f"{corpus.name}: {cut} of {n} documents are cut at --document_length {length}")

    return data.tokenize_passages(run.tokenizer, corpus.passages(), length, place, report)


def embed_documents(run: Run, bi_encoder: T5, corpus: store.StoredCorpus) -> Tensor:
    """(n, D) of a corpus's documents, on disk."""
    tokens, path = document_tokens(run, corpus), run.folder / "embeddings" / f"{corpus.name}.npy"
    written = ArrayWriter(path, (len(tokens), bi_encoder.config.width))
    dense.embed(bi_encoder, tokens, out=written.values)
    return written.close()


def open_embeddings(run: Run, corpora: list[store.StoredCorpus]) -> list[Tensor]:
    """(n, D) of each of these corpora."""
    return [open_array(run.folder / "embeddings" / f"{corpus.name}.npy") for corpus in corpora]


def check_vocabulary(pieces: int, rows: int, name: str) -> None:
    """T5's word table has 100 rows more than its tokenizer has pieces (some other checkpoints up to 128)."""
    if not 0 <= rows - pieces <= 128:
        raise ValueError(
            f"the tokenizer has {pieces} pieces, {name} has {rows} word rows; pass the --tokenizer that belongs to "
            "the weights"
        )


# ----------------------------------------------------------------------------------------------------- docids


def docid_stage(run: Run, bi_encoder: T5) -> tuple[Tensor, Tensor]:
    """Codebooks (M, K, D) fitted on D_0, and the docids (N, M) of every corpus by them.

    Of atomic docids, "codebooks" are (1, N, D): the documents' own embeddings.
    """
    path = run.folder / "rq.pt"
    if distributed.is_main_process() and not path.exists():
        embeddings = open_embeddings(run, run.corpora)
        books, codes = make_docids(run, bi_encoder, embeddings)
        report = docid_report(run, books, codes)
        run.log.line(f"docids of D0: {report}")
        rq.require_distinct(report, data.different_documents(run.corpora[0].titles, run.corpora[0].texts))
        report_recall(run, bi_encoder, embeddings, books, codes)
        arrays.write_array(run.folder / "docids.npy", codes.numpy().astype(np.int16))
        store.write_tensors(path, books)
    distributed.wait()
    return store.read_tensors(path), store.load_docids(run.folder)


def docid_report(run: Run, books: Tensor, codes: Tensor) -> rq.Report:
    """How well docids tell D_0's documents apart."""
    d0 = open_embeddings(run, run.corpora[:1])[0]
    return rq.report(d0, books, codes[: len(d0)])


def find_dreams(run: Run, bi_encoder: T5, books: Tensor, wanted: bool) -> Dreams | None:
    """Where the settings ask for dreams, what draws them. Too few words: a warning or, if they are `wanted`, ValueError."""
    if not (run.config.dreams or run.config.ood_mode == "pooled"):
        return None
    found = dreams(bi_encoder, run.tokenizer, books, run.config.dream_words, run.config.dream_noise)
    if not found:
        least = max(dream.LEAST, run.config.dream_words)
        text = f"the tokenizer has fewer than {least} words, too few for dreams"
        if wanted and run.config.dreams:
            raise ValueError(f"{text}; pass a larger --vocab, or --dreams 0")
        run.log.line(f"warning: {text}; going on without")
    return found


def make_docids(run: Run, bi_encoder: T5, embeddings: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Fits the codebooks on D_0 and encodes all documents."""
    config, d0 = run.config, embeddings[0]
    if config.docid_kind == "atomic":
        return torch.cat(embeddings)[None], torch.arange(len(run.ids))[:, None]
    if config.docids:
        codes = torch.tensor(published.read_docids(Path(config.docids), run.ids, config.M, config.K))
        return rq.fit_to_docids(d0, codes[: len(d0)], config.K), codes
    if config.docid_kind == "pq":
        books = rq.fit_product(d0, config.M, config.K, config.seed)
    else:
        points = d0
        if config.rq_pseudo:
            drawn = run.tokens(run.pseudo_queries(0, config.rq_pseudo, "quantiser"))
            points = torch.cat([d0, dense.embed(bi_encoder, drawn, 1024)])
        if run.general:
            points = torch.cat([points, *open_embeddings(run, [run.general])])
        books = rq.fit(points, config.M, config.K, config.seed)
    return books, torch.cat([rq.encode(part, books, device=run.device) for part in embeddings])


def report_recall(run: Run, bi_encoder: T5, embeddings: list[Tensor], books: Tensor, codes: Tensor) -> None:
    """Logs what quantisation costs the bi-encoder: Recall@10 of exact search before and after it."""
    row_of, relevant = {doc_id: row for row, doc_id in enumerate(run.ids)}, []
    for corpus in run.corpora:
        relevant += [{row_of[doc_id] for doc_id in labels} for labels in corpus.qrels.values()]
    texts = [text for corpus in run.corpora for text in corpus.test.values()]
    if not texts:
        return
    embedded = dense.embed(bi_encoder, data.tokenize(run.tokenizer, texts, run.config.query_length))
    n_d0, d0 = len(run.corpora[0].test), len(embeddings[0])

    def recall(chosen: slice, documents) -> float:
        return dense.recall(embedded[chosen], relevant[chosen], documents, device=run.device)

    before = chunks_of(embeddings[:1]), chunks_of(embeddings)
    after = decoded(books, codes[:d0]), decoded(books, codes)
    for name, (first, every) in (("before", before), ("after", after)):
        in_d0, later = recall(slice(n_d0), first), recall(slice(n_d0, None), every)
        run.log.line(
            f"dense Recall@10 {name} quantisation: {in_d0:.3f} on D0 alone, {later:.3f} on later queries among all"
        )


def chunks_of(embeddings: list[Tensor]):
    """The embeddings of several corpora, as many at a time as are ranked together."""
    return (chunk for part in embeddings for chunk in part.split(dense.CHUNK))


def decoded(books: Tensor, codes: Tensor):
    """The vectors that docids (N, M) stand for, in chunks as those of `chunks_of`."""
    return (rq.decode(books, chunk) for chunk in codes.split(dense.CHUNK))


# ------------------------------------------------------------------------------------------------- references


def references(run: Run, made: Prepared) -> dict[str, dict]:
    """BM25 and the bi-encoder, after each corpus with test queries: rows of the results. `dense` is its exact search,
    `quantised` that among the vectors that docids stand for. One corpus or more has some.
    """
    scored: dict[str, list] = {"bm25": [], "dense": [], "quantised": []}
    embeddings = open_embeddings(run, run.corpora)
    texts = list({text: None for corpus in run.corpora for text in corpus.test.values()})
    tokens = data.tokenize(run.tokenizer, texts, run.config.query_length)
    asked = dict(zip(texts, dense.embed(made.bi_encoder, tokens)))
    index = BM25(())
    _, *counted = queries.count_terms(passage for corpus in run.corpora for passage in corpus.passages())
    for t in [t for t, corpus in enumerate(run.corpora) if corpus.tested]:
        corpora = run.corpora[: t + 1]
        live = store.live_rows(run.folder, corpora)
        index.weigh(corpora[-1].rows.stop, *counted)

        def by_bm25(texts: list[str]) -> list[Ranking]:
            return [index.top(text, 10) for text in texts]

        def by_bi_encoder(texts: list[str], documents: list, live=live) -> list[Ranking]:
            embedded = torch.stack([asked[text] for text in texts])
            scores, rows = dense.nearest(embedded, documents, 10, run.device)
            return [list(zip(*pair)) for pair in zip(live[rows].tolist(), scores.tolist())]

        parts = zip(embeddings, corpora)
        exact = list(chunks_of([part[np.isin(corpus.rows, live)] for part, corpus in parts]))
        quantised = list(decoded(made.books, made.codes[live]))
        scored["bm25"].append(scoring.evaluate(corpora, by_bm25))
        scored["dense"].append(scoring.evaluate(corpora, partial(by_bi_encoder, documents=exact)))
        scored["quantised"].append(scoring.evaluate(corpora, partial(by_bi_encoder, documents=quantised)))
    for name, stages in scored.items():
        store.write_json(run.folder / f"evaluation_{name}.json", asdict(stages[-1]))
    return {name: scoring.summarise(stages, run.config.seed) for name, stages in scored.items()}
