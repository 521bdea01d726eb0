"""The main job: dense training, docids, D_0, then each new corpus in turn.

Paper    Eq. 7 and appendix E: cross-entropy + alpha_1 * router losses + alpha_2 * KL to the previous model
In       `Config`, whose fields are the flags; a corpus
Out      a run folder (see store.py) and the results table
Next     search.py answers queries from the run folder, eval.py scores it again
Differs  plain AdamW in place of 8-bit; the docid mask is on for plain T5 on D_0 too; D_0 starts from the
         bi-encoder's weights; D_t's frozen encoder outputs and the previous model's hidden states are computed
         once, by the scan. The small preset, for a T5 that starts from nothing, adds two things of its own: on D_0
         part of each batch asks for fragments of documents (`d0_fragments`), and on D_t a second KL term holds
         the model along docids of earlier corpora (`kl_old_coef`); neither sees an earlier corpus's text.
"""

import argparse
import ctypes
import hashlib
import math
import platform
import random
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import faiss
import numpy as np
import sentencepiece
import torch
from torch import Tensor

import baselines
import cost
import data
import dense
import distributed
import docids as other_docids
import download
import eval as scoring
import mixlora
import ood
import published
import queries
import rq
import store
from arrays import ArrayWriter, Chain, Lookup, open_array, write_array
from bm25 import BM25
from losses import docid_cross_entropy, kl_to_previous, router_losses
from mixlora import MixConfig, mixed_layers
from optim import fit, parameter_groups
from scan import Scan, SourceCache, scan
from search import Ranking, retrieve
from store import Resume
from t5 import T5, T5Config, read_published, segment_logits, start_from_lsa


def flag(default, group: str, text: str):
    """A field of Config: its default, the stage it belongs to, and unit and origin for --help."""
    return field(default=default, metadata={"group": group, "help": text})


# fmt: off
@dataclass
class Config:
    """Every setting of a run. Defaults are the paper's for NQ320k; PRESETS and METHODS override them."""

    data: str = flag("boolq", "data", "boolq, nq320k, msmarco, or a folder in BEIR layout")
    data_dir: str = flag("", "data", "folder of the published files of nq320k or msmarco (default data/NAME; fetched where absent)")
    preset: str = flag("", "data", "recipe: boolq, beir, nq320k, msmarco (default: that of --data, beir for a folder)")
    method: str = flag("mixlora-dsi", "data", "mixlora-dsi, mixlora-dsi-pt, never-expand, always-expand; baselines: naive-expansion, base, dsi++, clever, promptdsi, corpusbrain++, incdsi, joint")
    run: str = flag("", "data", "run folder (default runs/<data>)")
    save_seconds: float = flag(600.0, "data", "between two saves of where a stage stands (latest.pt)")
    seed: int = flag(42, "data", "of splits, draws and weights (paper: 42)")
    device: str = flag("", "data", "cpu or cuda (default: cuda where present)")
    splits: str = flag("60,10,10,10,10", "data", "percent of documents in D_0..D_T, counts, or paper: its exact sizes (tables 6-7)")
    split_by: str = flag("auto", "data", "order (the folder's file `order`), random, topic (each D_t a topic of its own, ours), or auto: order where there is one")
    skip_invalid: bool = flag(False, "data", "leave out empty documents and labels that name missing ones")
    tokenizer: str = flag("", "data", "a SentencePiece file (default: spiece.model beside --t5's weights, else trained on D_0)")
    vocab: int = flag(8000, "data", "pieces of a tokenizer trained on D_0 (ours)")
    query_length: int = flag(64, "data", "tokens of a query (paper: 256 in training, 64 in evaluation)")
    pseudo_queries: str = flag("", "data", "JSON lines {doc_id, query} of doc2query.py, or drawn: from the text (default: published ones, else drawn)")
    pseudo_per_document: int = flag(15, "data", "pseudo-queries of a new document (paper: up to 15 on NQ320k)")

    t5: str = flag("", "model", "folder or hub name of published T5 weights, as google-t5/t5-base (paper); none: from nothing, word rows by LSA")
    width: int = flag(768, "model", "D (T5-base)")
    heads: int = flag(12, "model", "H (T5-base); the head width is D / H")
    feed_forward: int = flag(3072, "model", "F (T5-base)")
    encoder_blocks: int = flag(12, "model", "T5-base")
    decoder_blocks: int = flag(12, "model", "T5-base")
    dropout: float = flag(0.1, "model", "share of units (T5)")

    precision: str = flag("", "model", "float32, or bf16 products under autocast (default: bf16 on CUDA, paper; float32 elsewhere)")
    micro_batch: int = flag(0, "model", "most examples computed together; a batch adds the gradients of its parts up (0: all; paper: all)")
    recompute: bool = flag(False, "model", "keep no activations within a block, compute them again for the gradient (ours)")
    compile: bool = flag(False, "model", "compile every block with torch.compile (ours)")
    check_memory: bool = flag(True, "model", "refuse a run whose stages are estimated to need more memory than is free (ours)")

    dense_length: int = flag(128, "dense", "tokens of a document window in training (paper: 128)")
    document_length: int = flag(256, "dense", "tokens of a document when indexed (paper: 256)")
    dense_warmup_steps: int = flag(0, "dense", "steps of in-batch contrastive training before the rounds (ours)")
    dense_rounds: int = flag(2, "dense", "rounds of MarginMSE: negatives from BM25, then self-mined (paper: 2)")
    dense_steps: int = flag(54_000, "dense", "steps of each round (paper: 50 epochs of 276,493 queries at batch 256)")
    dense_batch: int = flag(256, "dense", "queries (paper: 256)")
    dense_lr: float = flag(5e-4, "dense", "peak learning rate (paper)")
    dense_warmup: float = flag(0.04, "dense", "share of the steps in which the learning rate rises (paper)")
    dense_contrastive: float = flag(0.0, "dense", "weight of the in-batch contrastive term within the rounds (ours)")
    dense_margin: float = flag(1.0, "dense", "weight of MarginMSE (paper: 1)")
    dense_scale: float = flag(1.0, "dense", "inner products are multiplied by it in both losses (ours)")
    dense_pseudo: int = flag(0, "dense", "pseudo-queries of a document among the examples (paper: 0, annotated ones only)")
    negatives: int = flag(100, "dense", "hard negatives kept of each query (paper: 100)")
    teacher: str = flag("", "dense", "JSON lines {qid, docids, scores} of a cross-encoder, one file or one for each round, with commas (default: BM25)")
    save_negatives: bool = flag(False, "dense", "write each round's negatives, in the format of --teacher, into the run folder (ours)")

    M: int = flag(8, "docids", "codebooks (paper)")
    K: int = flag(2048, "docids", "centroids of a codebook (paper)")
    rq_pseudo: int = flag(0, "docids", "pseudo-queries of a document of D_0 whose embeddings fit the codebooks too (paper: 0)")
    rq_beam: int = flag(5, "docids", "partial docids kept while encoding (faiss)")
    docid_kind: str = flag("rq", "docids", "rq (paper), or for its table 9: pq, hierarchical (k-means), atomic (one row a document; M and K then follow)")
    docids: str = flag("", "docids", "docid_to_smtid.json: docids made elsewhere, {docid: [codes]} (default: made here)")

    mixture: bool = flag(True, "mixture", "experts and router in the decoder (off: plain T5)")
    d0_mixture: bool = flag(True, "mixture", "the mixture is there on D_0 already (off: it comes with D_1, the paper's -PT)")
    layers: int = flag(5, "mixture", "mixed decoder blocks, from the first (paper)")
    experts: int = flag(2, "mixture", "per layer, at the start (paper)")
    rank: int = flag(8, "mixture", "r (paper)")
    alpha: float = flag(16.0, "mixture", "an expert's output is scaled by alpha / r (paper)")
    lora_dropout: float = flag(0.05, "mixture", "on an expert's input (paper)")
    lora_in_site: str = flag("post_act", "mixture", "post_act (released code) or pre_act")
    router: str = flag("cosine", "mixture", "cosine (paper) or linear (Naive Expansion)")
    router_row: str = flag("random", "mixture", "a new router row: random (released code) or ood_mean (ours)")

    expand: str = flag("ood", "growth", "ood (paper), always, never, or fixed: D_0's experts go on training (ours, for comparison)")
    delta: float = flag(1.0, "growth", "percent of OOD queries above which a layer grows (paper: 1 on NQ320k)")
    ood_mode: str = flag("calibrated", "growth", "calibrated (ours) or paper_code")
    epsilon: float = flag(0.005, "growth", "calibrated: share of false alarms (ours)")
    ood_merge: float = flag(0.5, "growth", "calibrated: weight of the newest corpus in the statistics (ours)")
    calibration_queries: int = flag(20_000, "growth", "pseudo-queries of D_0 on which its energies are measured (ours)")
    control_queries: int = flag(2000, "growth", "fresh pseudo-queries of D_{t-1} that the scan of D_t watches for false alarms")

    d0_steps: int = flag(20_000, "training", "optimiser steps on D_0 (paper: 20,000 on NQ320k)")
    d0_batch: int = flag(1024, "training", "queries (paper: 1024)")
    d0_lr: float = flag(1e-3, "training", "peak learning rate (paper)")
    d0_warmup: float = flag(0.1, "training", "share of D_0's steps in which the learning rate rises (paper: 0.1; 0.045 for a plain T5 on MS MARCO)")
    d0_words: bool = flag(False, "training", "word rows train on D_0 with the mixture too (paper: no)")
    d0_mask: str = flag("", "training", "mask of D_0's loss (default: as --mask)")
    d0_fragments: int = flag(0, "training", "fragments of each document of D_0 that are learnt as documents of their own (ours)")
    d0_fragment_share: float = flag(0.5, "training", "share of D_0's batches that asks for fragments (ours)")
    steps: int = flag(0, "training", "optimiser steps on each D_t; 0: by epochs")
    epochs: int = flag(10, "training", "passes over D_t's pseudo-queries (paper: 10; BASE 5)")
    batch: int = flag(32, "training", "queries (paper: 32 on NQ320k)")
    lr: float = flag(1e-3, "training", "peak learning rate on D_t (paper)")
    warmup: float = flag(0.1, "training", "share of D_t's steps in which the learning rate rises (paper)")
    weight_decay: float = flag(0.01, "training", "of AdamW (paper)")
    clip: float = flag(1.0, "training", "largest gradient norm (paper)")
    mask: str = flag("segment", "training", "logits in the loss: segment (paper), docid_vocab, full_vocab (no mask)")
    align_coef: float = flag(1.0, "training", "alpha_1 of the align loss (paper)")
    repel_coef: float = flag(1.0, "training", "alpha_1 of the repel loss (paper)")
    repel_reduction: str = flag("mean", "training", "over older rows: mean (released code) or sum (paper)")
    aux_layers: str = flag("all", "training", "layers with router losses: all (released code) or expanded")
    balance_coef: float = flag(0.0, "training", "balance loss (paper: 0.01, Naive Expansion only)")
    z_coef: float = flag(0.0, "training", "z loss (paper: 0.001, Naive Expansion only)")
    kl_coef: float = flag(0.1, "training", "alpha_2 of the KL to the previous model (paper)")
    kl_old_coef: float = flag(0.0, "training", "weight of the same KL along random docids of earlier corpora (ours)")
    kl_reduction: str = flag("sum", "training", "over docid positions: sum (released code) or mean (paper)")
    rq_lr: float = flag(1.0, "training", "learning rate of the docid table on D_t, as a share of lr (paper: 1)")
    slow: str = flag("grad", "training", "slow learner of the docid table on D_t: grad (paper), lr, none")
    slow_factor: float = flag(0.01, "training", "its gradient or learning rate is multiplied by it (paper)")

    sam_rho: float = flag(0.0, "baselines", "radius of adaptive SAM on D_t (paper: 0.15, DSI++ only)")
    ewc: float = flag(0.0, "baselines", "weight of the EWC penalty on D_t (paper: 0.5, CLEVER only)")
    ewc_samples: int = flag(512, "baselines", "queries of an earlier corpus behind its Fisher information (paper: 512 and 1024)")
    ewc_protect_d0: bool = flag(False, "baselines", "EWC protects D_0 too (released code: D_1.. only)")
    prompts: int = flag(0, "baselines", "prefix prompts of PromptDSI's pool, one a topic (paper: 283 to 310 on NQ320k)")
    prompt_length: int = flag(10, "baselines", "keys and values of a prompt (paper)")
    adapters: bool = flag(False, "baselines", "CorpusBrain++'s bottleneck adapters, in both stacks, train on D_t")
    joint: bool = flag(False, "baselines", "on D_t train anew on all of D_0..D_t, by d0_steps + t * steps steps (ours)")
    insert: bool = flag(False, "baselines", "on D_t train nothing; find each new document's row of an atomic table (IncDSI)")

    beam: int = flag(10, "search", "partial docids kept (paper)")
    eval_batch: int = flag(128, "search", "queries decoded together (paper: 128 to 512)")
    baselines: bool = flag(True, "search", "score BM25 and the bi-encoder too")
# fmt: on


SMALL = dict(  # a T5 from nothing, on two cores
    query_length=32, pseudo_per_document=64, width=128, heads=4, feed_forward=512, encoder_blocks=2,
    decoder_blocks=2, layers=2, dropout=0.0, M=4, K=128, rq_pseudo=24, dense_length=32,
    dense_warmup_steps=160, dense_rounds=2, dense_steps=40, dense_batch=128, dense_lr=7e-4,
    dense_contrastive=1.0, dense_margin=0.01, dense_scale=0.1, dense_pseudo=8, negatives=50, d0_steps=700,
    d0_fragment_share=0.4, d0_batch=256, d0_lr=2e-3, steps=300, batch=256, lr=5e-3, rank=32, alpha=64.0, warmup=0.03,
    d0_warmup=0.03,
    router_row="ood_mean", d0_fragments=16, kl_coef=0.25, kl_old_coef=0.3,
)  # fmt: skip
PAPER = dict(splits="paper", t5="google-t5/t5-base")  # and the defaults of Config
PRESETS = {
    "boolq": SMALL,
    "beir": SMALL,
    "nq320k": PAPER,
    "msmarco": PAPER | dict(
        pseudo_per_document=10, dense_steps=88_400, d0_steps=250_000, batch=512, epochs=5, delta=0.01,
        baselines=False,  # BM25 over 8.8 million passages takes hours here; the paper's row is Pyserini's
    ),
}  # fmt: skip
PLAIN_START = dict(d0_mixture=False)
PLAIN = PLAIN_START | dict(mixture=False, kl_coef=0.0, kl_old_coef=0.0, slow="none")
BASE = PLAIN | dict(lr=1e-3)
METHODS = {
    "mixlora-dsi": {},
    "never-expand": dict(expand="never"),
    "always-expand": dict(expand="always"),
    "mixlora-dsi-pt": PLAIN_START | dict(delta=10.0),
    "naive-expansion": PLAIN_START | dict(
        expand="always", router="linear", router_row="random", align_coef=0.0, repel_coef=0.0, balance_coef=0.01,
        z_coef=0.001, kl_coef=0.0, kl_old_coef=0.0, slow="none",
    ),
    "base": BASE,
    "dsi++": BASE | dict(sam_rho=0.15),
    "clever": BASE | dict(ewc=0.5),
    "promptdsi": PLAIN | dict(prompts=300),
    "corpusbrain++": PLAIN | dict(adapters=True, mask="full_vocab", d0_mask="segment"),
    "joint": PLAIN | dict(joint=True),
    "incdsi": PLAIN | dict(docid_kind="atomic", insert=True, d0_fragments=0),
}  # fmt: skip
UNCOUNTED = ("dsi++", "clever", "promptdsi", "corpusbrain++", "joint", "incdsi")  # by cost.py, but for memory
# Where the paper's recipe of a method differs from its own preset's (appendix E and the released scripts): methods
# that start from the plain T5 take larger batches on NQ320k, BASE and its relatives fewer epochs; on MS MARCO they warm D_0 up less.
FROM_PLAIN = [method for method in METHODS if not METHODS[method].get("d0_mixture", True)]
METHOD_RECIPES = (
    {("nq320k", method): dict(batch=128) for method in FROM_PLAIN}
    | {("nq320k", method): dict(batch=128, epochs=5) for method in ("base", "dsi++", "clever")}
    | {("msmarco", method): dict(d0_warmup=0.045) for method in FROM_PLAIN}
    | {("msmarco", "promptdsi"): dict(d0_warmup=0.045, prompts=6611)}
    | {(preset, "promptdsi"): dict(prompts=32) for preset in ("boolq", "beir")}
)


# ----------------------------------------------------------------------------------------------------- stages


class Job:
    """What all stages share: the config, the run folder, the corpora, the tokenizer and the pseudo-query
    samplers. The first process reads and writes; the others find the files.
    """

    def __init__(self, config: Config, folder: Path, log: store.Log):
        self.config, self.folder, self.log = config, folder, log
        self.device = torch.device(config.device)
        self.t5 = None  # folder of published weights; a run that has its bi-encoder needs them no more
        if config.t5 and not (folder / "dense.pt").exists():
            if distributed.first():
                download.find_t5(config.t5, log=log.line)
            distributed.wait()
            self.t5 = download.find_t5(config.t5, log=log.line)
        if distributed.first() and not (folder / "corpus.json").exists():
            self._read()
        distributed.wait()
        self.corpora = store.load_corpora(folder)
        if distributed.first() and not (folder / "tokenizer.model").exists():
            store.write(folder / "tokenizer.model", self._tokenizer())
        distributed.wait()
        self.tokenizer = data.load_tokenizer(folder / "tokenizer.model")
        self.resume = Resume(folder, config.save_seconds, log)
        self.ids = Chain([corpus.ids for corpus in self.corpora])
        self.listed = None  # pseudo-queries from a file
        self.excluded = store.load_excluded(folder)
        if (folder / "pseudo_queries").exists():
            self.listed = True
            self.samplers = [
                queries.ListedPseudoQueries(folder / "pseudo_queries" / f"D{t}", corpus.first_row)
                for t, corpus in enumerate(self.corpora)
            ]
        else:
            idf = queries.Idf.load(folder / "idf.json")
            self.samplers = [
                queries.PseudoQuerySampler(corpus.titles, corpus.texts, idf, self.excluded, corpus.first_row)
                for corpus in self.corpora
            ]

    def _tokenizer(self) -> bytes:
        """The SentencePiece model that --tokenizer names, that comes with the weights, or that D_0 trains."""
        config = self.config
        path = Path(config.tokenizer) if config.tokenizer else self.t5 and self.t5 / "spiece.model"
        if not path:
            return data.train_tokenizer(self.corpora[0].passages(), config.vocab)
        data.load_tokenizer(path)
        return path.read_bytes()

    def _read(self) -> None:
        """Reads and splits the corpora into the run folder; corpus.json, written last, says that all is there."""
        config, log = self.config, self.log
        reading = self.folder / "reading"  # documents before they are split
        shutil.rmtree(self.folder / "pseudo_queries", ignore_errors=True)  # of a reading that was stopped
        if config.data == "boolq":
            log.line("reading BoolQ (downloaded once, about 20 MB)")
            collection = data.read_boolq(config.seed, store=reading)
        elif config.data in published.BENCHMARKS:
            collection = published.read(config.data, Path(config.data_dir), log.line, reading)
        else:
            collection = data.read_beir(Path(config.data), config.skip_invalid, reading)
        splits, spare = config.splits, 0
        if splits == "paper":
            splits, spare = published.paper_split(config.data, collection)
        corpora, left_out = data.split(collection, splits, config.split_by, config.seed, spare)
        for t, corpus in enumerate(corpora):
            if not corpus.test:
                raise ValueError(f"D_{t} got no test query; choose fewer or larger corpora with --splits")
        data.check_split(corpora)
        for reason, count in left_out.items():
            log.line(f"left out: {count} {reason}")
        manifest = published.manifest(config.data, collection, corpora)
        pseudo, strict = collection.pseudo, False
        if config.pseudo_queries not in ("", "drawn"):
            pseudo, strict = data.read_pseudo_queries(Path(config.pseudo_queries)), True
        if pseudo and config.pseudo_queries != "drawn":
            where = self.folder / "pseudo_queries"
            documents = [(corpus.ids, corpus.titles, corpus.texts) for corpus in corpora]
            counts = queries.store_pseudo_queries(
                pseudo, where, documents, data.excluded_queries(corpora), strict
            )
            manifest["pseudo-queries"] = dict(counts)
        for name, value in manifest.items():
            log.line(f"{name}: {value}")
        store.save_corpora(self.folder, config.data, corpora, left_out, manifest)
        shutil.rmtree(reading)

    def pseudo_queries(self, t: int, per_document: int, purpose: str) -> list[tuple[int, str]]:
        """A fixed list of D_t's (row, pseudo-query) pairs, the same at every call; checked for leaks."""
        seed = f"{self.config.seed} {purpose} {t}"
        pairs = queries.draw_pseudo_queries(self.samplers[t], self.corpora[t].rows, per_document, seed)
        data.check_no_leak(t, self.corpora[t].rows, pairs, self.excluded)
        return pairs

    def training_queries(self, t: int) -> list[tuple[int, str]]:
        """What D_t, t >= 1, trains on: all of its pseudo-queries from the file, or a drawn list."""
        if not self.listed:
            return self.pseudo_queries(t, self.config.pseudo_per_document, "training")
        pairs = self.samplers[t].pairs()
        data.check_no_leak(t, self.corpora[t].rows, pairs, self.excluded)
        return pairs

    def sample(self, t: int, count: int, purpose: str) -> list[tuple[int, str]]:
        """Some `count` pairs of D_t, at least one, as evenly over its documents as that goes."""
        count = max(1, count)
        rows, rng = self.corpora[t].rows, random.Random(f"{self.config.seed} {purpose} {t}")
        chosen = list(rows) * (count // len(rows)) or rng.sample(rows, count)
        pairs = [(row, self.samplers[t].draw(row, rng)) for row in chosen]
        data.check_no_leak(t, self.corpora[t].rows, pairs, self.excluded)
        return pairs

    def tokens(self, queries: list[tuple[int, str]]) -> Tensor:
        return data.tokenize(self.tokenizer, [query for _, query in queries], self.config.query_length)

    def ready(self, model: T5) -> T5:
        """The model on this process's device, with the first process's weights, as the flags want it to compute."""
        model.to(self.device)
        distributed.copy_from_first(model)
        model.recompute = self.config.recompute
        if self.config.compile:
            for block in [*model.encoder, *model.decoder]:
                block.compile(dynamic=True)
        return model


def dense_stage(job: Job) -> tuple[T5, Tensor]:
    """The bi-encoder trained on D_0, and the embeddings (N, D) of every corpus's documents by it, on disk."""
    config, path = job.config, job.folder / "dense.pt"
    if path.exists():
        return job.ready(store.load_model(path)[0]), open_array(job.folder / "embeddings.npy")
    place = job.folder / "cache" / f"documents_{config.document_length}"
    if distributed.first():
        tokenize_all(job, place)
    distributed.wait()
    passages = tokenize_all(job, place)
    torch.manual_seed(config.seed)
    if job.t5:
        model = read_published(job.t5, config.M, config.K, config.dropout)
        check_vocabulary(job.tokenizer.vocab_size(), model.config.vocab, config.t5)
    else:
        shape = dict(width=config.width, heads=config.heads, head_width=config.width // config.heads)
        shape |= dict(encoder_blocks=config.encoder_blocks, decoder_blocks=config.decoder_blocks)
        model = T5(T5Config(
            vocab=job.tokenizer.vocab_size(), feed_forward=config.feed_forward, dropout=config.dropout,
            codebooks=config.M, centroids=config.K, **shape,
        ))  # fmt: skip
        start_from_lsa(model, passages[0].batch(torch.arange(len(passages[0]))))
    job.ready(model)
    data.check_no_leak(0, job.corpora[0].rows, job.corpora[0].train, job.excluded)
    dense.train(
        model, job.tokenizer, job.corpora[0], passages[0], job.samplers[0], config, job.log,
        job.folder, job.resume,
    )  # fmt: skip
    if distributed.first():
        embeddings = ArrayWriter(job.folder / "embeddings.npy", (len(job.ids), model.config.width))
        for corpus, ids in zip(job.corpora, passages):
            dense.embed(model, ids, out=embeddings.values[corpus.rows.start : corpus.rows.stop])
        embeddings.close()
        store.save_model(path, model, [])
    distributed.wait()
    return model, open_array(job.folder / "embeddings.npy")


def tokenize_all(job: Job, place: Path) -> list:
    return [
        data.tokenize_passages(
            job.tokenizer,
            corpus.passages(),
            job.config.document_length,
            place.with_name(f"{place.name}_D{t}.bin"),
        )
        for t, corpus in enumerate(job.corpora)
    ]


def check_vocabulary(pieces: int, rows: int, weights: str) -> None:
    """T5's word table has 100 rows more than its tokenizer has pieces (some other checkpoints up to 128)."""
    if not 0 <= rows - pieces <= 128:
        raise ValueError(
            f"the tokenizer has {pieces} pieces, {weights} has {rows} word rows; pass the --tokenizer that belongs to "
            "the weights"
        )


def rq_stage(job: Job, bi_encoder: T5, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Codebooks (M, K, D) fitted on D_0, and the docids (N, M) of every corpus by them."""
    path = job.folder / "rq.pt"
    if distributed.first() and not path.exists():
        books, codes = make_docids(job, bi_encoder, embeddings)
        write_array(job.folder / "docids.npy", codes.numpy().astype(np.int16))
        store.write_tensors(path, books)
    distributed.wait()
    codes = store.load_docids(job.folder)
    return store.read_tensors(path), codes


def make_docids(job: Job, bi_encoder: T5, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Fits the codebooks, encodes all documents, and reports what quantisation costs the bi-encoder."""
    config, d0 = job.config, embeddings[: len(job.corpora[0].ids)]
    if config.docid_kind != "rq":
        books, codes = other_docids.make(
            config.docid_kind, embeddings, len(d0), config.M, config.K, config.seed
        )
    elif config.docids:
        codes = torch.tensor(published.read_docids(Path(config.docids), job.ids, config.M, config.K))
        books = rq.fit_to_docids(d0, codes[: len(d0)], config.K)
    else:
        points = d0
        if config.rq_pseudo:
            drawn = job.tokens(job.pseudo_queries(0, config.rq_pseudo, "quantiser"))
            points = torch.cat([d0, dense.embed(bi_encoder, drawn, 1024)])
        books = rq.fit(points, config.M, config.K, config.seed, config.rq_beam)
        codes = rq.encode(embeddings, books, config.rq_beam, device=job.device)
    found = rq.report(d0, books, codes[: len(d0)])
    job.log.line(f"docids of D0: {found}")
    rq.require_distinct(found)
    row_of, texts = Lookup(job.ids), [q for corpus in job.corpora for q in corpus.test.values()]
    labels = [found for corpus in job.corpora for found in corpus.qrels.values()]
    relevant = [{row_of(doc_id) for doc_id in found} for found in labels]
    embedded = dense.embed(bi_encoder, data.tokenize(job.tokenizer, texts, config.query_length))
    first = len(job.corpora[0].test)
    for name in ("before", "after"):

        def chunks(n: int, quantised: bool = name == "after"):
            for rows in torch.arange(n).split(dense.CHUNK):
                yield rq.decode(books, codes[rows]) if quantised else embeddings[rows]

        in_d0 = dense.recall(embedded[:first], relevant[:first], chunks(len(d0)), device=job.device)
        later = dense.recall(embedded[first:], relevant[first:], chunks(len(embeddings)), device=job.device)
        job.log.line(
            f"dense Recall@10 {name} quantisation: {in_d0:.3f} on D0 alone, {later:.3f} on later queries among all"
        )
    return books, codes


def table_so_far(job: Job, t: int, books: Tensor) -> Tensor:
    """What the docid table of D_0..D_t starts from: all codebooks or, of atomic docids, a row for each document that
    has arrived.
    """
    return books[:, : job.corpora[t].rows.stop] if job.config.docid_kind == "atomic" else books


def extend_table(model: T5, table: Tensor) -> None:
    """Appends to the docid table (M, K, D) those columns of a longer `table` that it lacks: new atomic docids."""
    missing = table[:, model.rq.shape[1] :].to(model.rq)
    if missing.shape[1]:
        model.rq = torch.nn.Parameter(torch.cat([model.rq.detach(), missing], dim=1))
        model.config = replace(model.config, centroids=model.rq.shape[1])


def mix_config(config: Config) -> MixConfig:
    return MixConfig(
        config.layers, config.experts, config.rank, config.alpha, config.lora_dropout, router=config.router,
        lora_in_site=config.lora_in_site,
    )  # fmt: skip


def d0_stage(
    job: Job, bi_encoder: T5, books: Tensor, codes: Tensor, last: int = 0
) -> tuple[T5, list[ood.Stats]]:
    """Sequence-to-sequence training on D_0: pseudo-query -> docid, from the bi-encoder's weights, RQ rows =
    centroids. With `last` (joint retraining) on the documents of D_0..D_last.
    """
    config, corpus, sampler = job.config, job.corpora[0], job.samplers[0]
    if last:
        corpus = data.joined(job.corpora[: last + 1])
        if job.listed:
            sampler = queries.JoinedSamplers(job.samplers, [part.first_row for part in job.corpora])
        else:
            sampler = queries.PseudoQuerySampler(
                corpus.titles, corpus.texts, queries.Idf(corpus.passages()), job.excluded
            )
    torch.manual_seed(config.seed + 1 + last)
    table = table_so_far(job, last, books)
    model = T5(replace(bi_encoder.config, codebooks=len(table), centroids=table.shape[1])).to(job.device)
    model.load_state_dict(bi_encoder.state_dict() | {"rq": table})
    if config.mixture and config.d0_mixture:
        mixlora.add_mixture(model, mix_config(config))
        model.word.requires_grad_(config.d0_words)
    job.ready(model)
    layers = mixed_layers(model)
    stats = [ood.new_stats(config.ood_mode, len(layer), codes.shape[1]) for layer in layers]
    rng = random.Random(f"{config.seed} D{last}")
    targets, n_fragments = codes.to(job.device), len(corpus.ids) * config.d0_fragments
    if n_fragments:  # their docids follow those of the documents
        spans = queries.fragments(corpus.titles, corpus.texts, config.d0_fragments, rng)
        of_fragments = queries.PseudoQuerySampler(*spans, queries.Idf(corpus.passages()), job.excluded)
        tokens = data.tokenize(job.tokenizer, list(queries.passages(*spans)), config.document_length)
        found = rq.encode(dense.embed(bi_encoder, tokens, 256), books, config.rq_beam, device=job.device)
        targets = torch.cat([targets, found.to(job.device)])

    def next_batch() -> list[tuple[int, str]]:
        """(row of `targets`, pseudo-query)"""
        rows = rng.choices(corpus.rows, k=config.d0_batch)
        batch = [(row, sampler.draw(row, rng)) for row in rows]
        if n_fragments:
            rows = rng.choices(range(n_fragments), k=int(config.d0_fragment_share * config.d0_batch))
            batch[: len(rows)] = [(len(codes) + row, of_fragments.draw(row, rng)) for row in rows]
        return batch

    averages = MovingEnergies(config, stats)

    def loss_of(batch: list[tuple[int, str]]):
        docids, ids = targets[[row for row, _ in batch]], job.tokens(batch).to(job.device)
        source, padding = model.encode(ids)
        hidden, routes = model.docid_hidden(source, padding, docids)
        terms = {"ce": docid_cross_entropy(model, hidden, docids, config.d0_mask)}
        terms |= router_losses(routes, config)
        averages.see(routes)
        return sum(terms.values()), terms

    def after_step() -> None:
        averages.step()
        for layer in layers:
            layer.normalise_rows()

    model.train()
    frozen = frozen_hashes(model)
    groups = parameter_groups(model.named_parameters(), config.d0_lr, config.weight_decay)
    steps = config.d0_steps + last * config.steps
    fit(
        f"D{last}", groups, steps, config.d0_warmup, config.clip, next_batch, loss_of, job.log, config.micro_batch, config.precision == "bf16", after_step=after_step, resume=job.resume,
        chance={"rng": rng, "energies": averages},
    )  # fmt: skip
    require_unmoved(f"D{last}", model, frozen)
    if layers:
        pairs = job.sample(0, config.calibration_queries, "calibration")
        docids = codes[[row for row, _ in pairs]]
        found = scan(model, SourceCache(model, job.tokens(pairs)), docids, [], hidden=False)
        stats = settle(config, stats, found, first=True)
    return model.eval(), stats


class MovingEnergies:
    """paper_code's statistics, moved once a step by the batch of all processes; without that mode, nothing."""

    def __init__(self, config: Config, stats: list[ood.Stats], only_new: bool = False):
        self.stats = stats if config.ood_mode == "paper_code" else []
        self.only_new, self.sums = only_new, {}

    def see(self, routes: list[mixlora.Route]) -> None:
        """One part of the batch; after D_0 only layers that grew take part (`only_new`)."""
        for number, (_, route) in enumerate(zip(self.stats, routes)):
            if route.newest or not self.only_new:
                self.sums[number] = self.sums.get(number, 0) + ood.sums(route.scores, route.gates)

    def state(self) -> list[dict]:
        """For store.Resume."""
        return [stat.state() for stat in self.stats]

    def restore(self, states: list[dict]) -> None:
        for stat, state in zip(self.stats, states):
            vars(stat).update(state)

    def step(self) -> None:
        distributed.add_up(self.sums.values())
        for number, batch in self.sums.items():
            if batch.isfinite().all():  # a step without a finite gradient is skipped
                ood.move(self.stats[number], batch)
        self.sums = {}


def settle(config: Config, stats: list[ood.Stats], found: Scan, first: bool) -> list[ood.Stats]:
    """The layers' OOD statistics after a corpus, from a scan of it with the trained model."""
    if config.ood_mode == "paper_code":
        if first:
            for stat in stats:
                ood.remember_base(stat)
        return stats
    new = [ood.calibrate(ood.energy(s), s.shape[-1], config.epsilon) for s in found.scores]
    return new if first else [ood.merge(a, b, config.ood_merge) for a, b in zip(stats, new)]


def continual_stage(
    job: Job, t: int, books: Tensor, codes: Tensor, previous: tuple[T5, list[ood.Stats]]
) -> tuple[T5, list[ood.Stats], dict]:
    """D_t, t >= 1: scan, grow, train, calibrate.

    Returns the model, its OOD statistics, and a record of the stage for results.json.
    """
    config, (model, stats) = job.config, previous
    torch.manual_seed(config.seed + 1 + t)
    job.ready(model)
    pairs = job.training_queries(t)
    ids, docids = job.tokens(pairs), codes[[row for row, _ in pairs]]
    record, rq_before = {"decisions": []}, model.rq.detach().clone()
    first_mixture = config.mixture and not mixed_layers(model)
    cache = None
    if config.mixture or config.prompts:  # the encoder is frozen
        cache = SourceCache(model, ids, folder=job.folder / "cache")
    if config.mixture:
        before = scan(model, cache, docids, stats)
        if config.kl_old_coef:  # an old docid for each query: what the model says where new documents are not
            generator = torch.Generator().manual_seed(config.seed + t)
            old = codes[torch.randint(job.corpora[t].first_row, (len(pairs),), generator=generator)]
            before_old = scan(model, cache, old, [])
        if first_mixture:
            mixlora.add_mixture(model, mix_config(config))
            layers = mixed_layers(model)
            stats = [ood.new_stats(config.ood_mode, len(layer), codes.shape[1]) for layer in layers]
        else:
            record["decisions"] = grow(job, t, codes, model, stats, before)
        freeze_old(model)
    else:
        add_baseline(job, model)
    extend_table(model, table_so_far(job, t, books))
    job.ready(model)
    memory = ewc_memory(job, t, codes) if config.ewc else []
    layers = mixed_layers(model)
    averages = MovingEnergies(config, stats, only_new=True)
    order = dense.Batches(len(pairs), config.batch, torch.Generator().manual_seed(config.seed + t))

    def kl(logits: Tensor, teacher: Scan, rows: Tensor) -> Tensor:
        logits_before = segment_logits(teacher.hidden[rows].to(job.device).float(), rq_before)
        return kl_to_previous(logits[..., : rq_before.shape[1]], logits_before, config.kl_reduction)

    def loss_of(rows: Tensor):
        target, past = docids[rows].to(job.device), None
        if cache:
            source, padding = cache.get(rows, job.device)
            past = model.past(source, padding)
            cross = model.cross_keys_values(source)  # frozen, as the source is
        else:
            cross, padding = model.encode(ids[rows].to(job.device))
        asked = target
        if config.kl_old_coef:  # each query with its own docid and an old one, in one pass
            asked = torch.stack([target, old[rows].to(job.device)], dim=1).flatten(0, 1)  # (2B, M)
        hidden, routes = model.docid_hidden(cross, padding, asked, past)
        logits = segment_logits(hidden, model.rq)  # shared by all terms
        if config.kl_old_coef:
            logits_old, hidden, logits = logits[1::2], hidden[::2], logits[::2]
            routes = [route.rows(slice(0, None, 2)) for route in routes]
        terms = {"ce": docid_cross_entropy(model, hidden, target, config.mask, logits)}
        if config.kl_coef:
            terms["kl"] = config.kl_coef * kl(logits, before, rows)
        if config.kl_old_coef:
            terms["kl_old"] = config.kl_old_coef * kl(logits_old, before_old, rows)
        if memory:
            terms["ewc"] = config.ewc * baselines.ewc_penalty(model, memory)
        terms |= router_losses(routes, config)
        averages.see(routes)
        return sum(terms.values()), terms

    def before_clip() -> None:
        if config.slow == "grad":
            model.rq.grad *= config.slow_factor

    def after_step() -> None:
        averages.step()
        for layer in layers:
            layer.normalise_rows()

    model.train()
    frozen = frozen_hashes(model)
    slow = config.slow_factor if config.slow == "lr" else 1.0
    groups = parameter_groups([("rq", model.rq)], config.lr * config.rq_lr * slow, config.weight_decay)
    others = [(name, p) for name, p in model.named_parameters() if name != "rq"]
    groups += parameter_groups(others, config.lr, config.weight_decay)
    record["trainable_parameters"] = sum(p.numel() for group in groups for p in group["params"])
    steps = config.steps or math.ceil(config.epochs * len(pairs) / config.batch)
    fit(
        f"D{t}", groups, steps, config.warmup, config.clip, lambda: next(order), loss_of, job.log,
        config.micro_batch, config.precision == "bf16", before_clip, after_step, config.sam_rho, job.resume,
        {"order": order, "energies": averages},
    )  # fmt: skip
    require_unmoved(f"D{t}", model, frozen)
    if layers:
        after = scan(model, cache, docids, [], hidden=False)
        stats = settle(config, stats, after, first_mixture)
        gates = [mixlora.top_gates(scores, layers[0].config.active) for scores in after.scores]
        record["routing"] = [gate.mean((0, 1)).tolist() for gate in gates]
        record["first_choice"] = [mixlora.first_choice_share(scores).tolist() for scores in after.scores]
    return model.eval(), stats, record


def later_stage(
    job: Job, t: int, bi_encoder: T5, books: Tensor, codes: Tensor, previous: tuple[T5, list[ood.Stats]]
) -> tuple[T5, list[ood.Stats], dict]:
    """D_t, t >= 1, by the run's method: joint retraining begins anew, IncDSI trains nothing, all others go on."""
    if job.config.joint:
        model, stats = d0_stage(job, bi_encoder, books, codes, last=t)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return model, stats, {"decisions": [], "trainable_parameters": trained}
    if job.config.insert:
        return *previous, insertion_stage(job, t, books, codes, previous[0])
    return continual_stage(job, t, books, codes, previous)


def add_baseline(job: Job, model: T5) -> None:
    """Puts in what PromptDSI and CorpusBrain++ train beside the shared table, on D_1; else everything trains (BASE)."""
    config = job.config
    if config.prompts and model.prompts is None:
        model.eval()
        with torch.no_grad():
            pairs = job.sample(0, config.calibration_queries, "topics")
            parts = job.tokens(pairs).split(config.eval_batch)
            seen = [baselines.representation(*model.encode(part.to(job.device))).cpu() for part in parts]
        topics = baselines.topic_keys(torch.cat(seen), config.prompts, config.seed)
        baselines.add_prompts(model, topics, config.prompt_length)
    if config.adapters and not baselines.adapters(model):
        baselines.add_adapters(model, baselines.inner_width(model.config.width))
    if config.prompts or config.adapters:
        freeze_old(model)


def ewc_memory(job: Job, t: int, codes: Tensor) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Fisher information and weights after each corpus that EWC protects on D_t.

    From that corpus's checkpoint and a fixed sample of its queries, and so the same whenever it is computed.
    """
    memory = []
    for i in range(0 if job.config.ewc_protect_d0 else 1, t):
        model = job.ready(store.load_model(job.folder / f"D{i}.pt")[0])
        rng = random.Random(f"{job.config.seed} ewc {i}")
        rows = rng.choices(job.corpora[i].rows, k=job.config.ewc_samples)
        pairs = [(row, job.samplers[i].draw(row, rng)) for row in rows]
        found = baselines.fisher(model, job.tokens(pairs), codes[[row for row, _ in pairs]].to(job.device))
        memory.append((found, baselines.values_of(model, found)))
    return memory


def insertion_stage(job: Job, t: int, books: Tensor, codes: Tensor, model: T5) -> dict:
    """D_t by IncDSI: the model stays as D_0 left it, and each new document gets the row that its queries find.

    It needs a mean query of every older document. They are what they were when the document came, since the model is
    frozen and the draw (four queries each) has a fixed seed, and so are computed again instead of stored.
    """
    job.ready(model).eval()
    first, pairs = job.corpora[t].first_row, job.training_queries(t)
    queries = dense.embed(model, job.tokens(pairs))
    owner = torch.tensor([row for row, _ in pairs]) - first
    old = [pair for i in range(t) for pair in job.sample(i, 4 * len(job.corpora[i].ids), "insertion")]
    seen = torch.tensor([row for row, _ in old])
    represented = torch.zeros(first, queries.shape[1]).index_add_(
        0, seen, dense.embed(model, job.tokens(old))
    )
    represented /= torch.bincount(seen, minlength=first)[:, None]
    rows = table_so_far(job, t, books)[0, first:]
    table = model.rq.detach()[0].cpu()
    rows = baselines.insert_rows(table, represented, rows, queries, owner)
    extend_table(model, torch.cat([table, rows])[None])
    return {"decisions": [], "trainable_parameters": rows.numel()}


def grow(job: Job, t: int, codes: Tensor, model: T5, stats: list[ood.Stats], before: Scan) -> list[dict]:
    """Decides for every mixed layer whether D_t makes it expand, and adds the experts. Returns the numbers."""
    config, records = job.config, []
    control = control_scan(job, t, codes, model)
    for number, (layer, stat, scores) in enumerate(zip(mixed_layers(model), stats, before.scores)):
        decision = ood.decide(scores, stat, config.delta, config.epsilon)
        expand = config.expand == "always" or (config.expand == "ood" and decision.expand)
        expand = distributed.say(expand)  # processes may differ in a last bit, and must not in their experts
        false_alarms = ood.decide(control.scores[number], stat, config.delta, config.epsilon)
        experts = len(layer)
        histogram = ood.histogram(ood.energy(scores), ood.energy(control.scores[number]), stat)
        if expand:
            layer.add_expert(before.direction[number] if config.router_row == "ood_mean" else None)
            ood.grow(stat)
        elif config.expand != "fixed":
            layer.freeze_all()
        job.log.line(
            f"D{t} layer {number}: {decision.ood_percent:.1f}% of queries OOD (control {false_alarms.ood_percent:.1f}%, "
            f"delta {decision.delta:g}%) -> experts {experts} to {len(layer)}"
        )
        record = asdict(decision) | {"expanded": expand, "control_percent": false_alarms.ood_percent}
        record |= {"histogram": histogram}
        records.append(record | {"control_expand": false_alarms.expand, "experts": [experts, len(layer)]})
    return records


def control_scan(job: Job, t: int, codes: Tensor, model: T5) -> Scan:
    """What the detector says where nothing is new: fresh pseudo-queries of D_{t-1}, which no training saw; where
    they come from a file, those of the file.
    """
    pairs = job.sample(t - 1, job.config.control_queries, "control")
    return scan(
        model, SourceCache(model, job.tokens(pairs)), codes[[row for row, _ in pairs]], [], hidden=False
    )


def frozen_hashes(model: T5) -> dict[str, str]:
    """sha256 of every parameter that does not train."""
    frozen = {
        name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if not p.requires_grad
    }
    return {name: hashlib.sha256(p.numpy().tobytes()).hexdigest() for name, p in frozen.items()}


def require_unmoved(stage: str, model: T5, before: dict[str, str]) -> None:
    """Raises ValueError where a frozen parameter is not, bit by bit, what it was before the stage."""
    after = frozen_hashes(model)
    if moved := [name for name in before if after.get(name) != before[name]]:
        raise ValueError(
            f"{stage}: frozen tensors moved ({', '.join(moved[:5])}); the stage is not saved, and the checkpoint before "
            "it is whole. This is a mistake in the program, not in the data"
        )


def freeze_old(model: T5) -> None:
    """Leaves the docid table and what was added (the newest experts and router rows, or a baseline's adapters or
    prompts) to train, and nothing else.
    """
    model.requires_grad_(False)
    model.rq.requires_grad_(True)
    if adapters := baselines.adapters(model):
        model.word.requires_grad_(True)  # CorpusBrain++ trains the whole shared table
        for adapter in adapters:
            adapter.requires_grad_(True)
    if model.prompts:
        model.prompts.keys_values.requires_grad_(True)
    for layer in mixed_layers(model):
        grew = len(layer.new) > 0  # an empty tensor that trains would cost the old experts' gradients
        layer.new.requires_grad_(grew)
        layer.router_new.requires_grad_(grew)


def evaluate_stage(job: Job, t: int, model: T5, codes: Tensor) -> scoring.Evaluation:
    """Searches D_0..D_t with every test query seen so far."""
    corpora, trie = job.corpora[: t + 1], rq.Trie(codes[: job.corpora[t].rows.stop])

    def rank(queries: list[str]) -> list[Ranking]:
        return retrieve(
            model, trie, job.tokenizer, queries, job.ids, 10, job.config.beam, job.config.eval_batch,
            job.config.query_length,
        )  # fmt: skip

    begin = time.monotonic()
    evaluation = scoring.evaluate(corpora, rank)
    rate = sum(len(corpus.test) for corpus in corpora) / (time.monotonic() - begin)
    for metric in ("recall@1", "recall@10", "mrr@10"):
        row = " ".join(f"D{i} {100 * value:.1f}" for i, value in enumerate(evaluation.means(metric)))
        job.log.line(f"after D{t}: {metric} {row}")
    job.log.line(f"after D{t}: searched at {rate:.0f} queries/s")
    return evaluation


def references(job: Job, bi_encoder: T5, embeddings: Tensor) -> dict[str, dict]:
    """BM25 and the bi-encoder (exact search, later documents added), after each corpus."""
    rows: dict[str, list] = {"bm25": [], "dense": []}
    for t in range(len(job.corpora)):
        corpora = job.corpora[: t + 1]
        index = BM25(passage for corpus in corpora for passage in corpus.passages())
        rows["bm25"].append(
            scoring.evaluate(corpora, lambda queries, i=index: [i.top(q, 10) for q in queries])
        )

        def rank(queries: list[str], n=corpora[-1].rows.stop) -> list[Ranking]:
            ids = data.tokenize(job.tokenizer, queries, job.config.query_length)
            scores, found = dense.rank(dense.embed(bi_encoder, ids), embeddings[:n], 10, job.device)
            return [list(zip(*pair)) for pair in zip(found.tolist(), scores.tolist())]

        rows["dense"].append(scoring.evaluate(corpora, rank))
    for name, evaluations in rows.items():
        store.write_json(job.folder / f"evaluation_{name}.json", asdict(evaluations[-1]))
    return {name: scoring.summarise(evaluations, job.config.seed) for name, evaluations in rows.items()}


# --------------------------------------------------------------------------------------------------- the loop


def train(config: Config, folder: Path, log: store.Log, last: int | None = None) -> dict:
    """Runs every stage whose result the folder does not hold yet; returns what results.json holds.

    With `last` it ends after D_last, without results.
    """
    done = store.read_json(folder / "stages.json") if (folder / "stages.json").exists() else {}

    def finish(stage: str, begin: float, **record) -> None:
        done[stage] = {"seconds": time.monotonic() - begin} | record
        if distributed.first():
            decisions = {s: done[s]["decisions"] for s in done if "decisions" in done[s]}
            store.write_json(folder / "ood.json", decisions)
            store.write_json(folder / "stages.json", done)  # last: a stage that it names is not run again
        distributed.wait()

    begin = time.monotonic()
    job = Job(config, folder, log)
    for t, corpus in enumerate(job.corpora):
        log.line(
            f"D{t}: {len(corpus.ids)} documents, {len(corpus.train)} annotated and {len(corpus.test)} test queries, "
            f"ids sha256 {store.ids_sha256(corpus)[:16]}"
        )
    if config.docid_kind == "atomic":
        other_docids.require_few(len(job.ids))
    if "data" not in done:
        finish("data", begin)
    if config.check_memory:
        cost.require_memory(config, workload(job), cost.free_memory(config.device), config.device)
    begin = time.monotonic()
    bi_encoder, embeddings = dense_stage(job)
    if distributed.first():
        for examples in folder.glob("examples_*.pt"):  # of its rounds
            examples.unlink()
    if "dense" not in done:
        finish("dense", begin)
    begin = time.monotonic()
    books, codes = rq_stage(job, bi_encoder, embeddings)
    if "rq" not in done:
        d0 = slice(0, len(job.corpora[0].ids))
        finish("rq", begin, docids=asdict(rq.report(embeddings[d0], books, codes[d0])))

    evaluations, state = [], None
    for t in range(len(job.corpora)):
        if t - 1 == last:
            return {}
        checkpoint, stage = folder / f"D{t}.pt", f"D{t}"
        if stage in done and checkpoint.exists():
            log.line(f"D{t} is done already")
            evaluations.append(scoring.Evaluation(**store.read_json(folder / f"evaluation_D{t}.json")))
            state = None
            continue
        begin = time.monotonic()
        if t == 0:
            model, stats = d0_stage(job, bi_encoder, books, codes)
            record = {}
        else:
            state = state or store.load_model(folder / f"D{t - 1}.pt")
            model, stats, record = later_stage(job, t, bi_encoder, books, codes, state)
        state = model, stats
        record |= {
            "experts": [len(layer) for layer in mixed_layers(model)],
            "training_seconds": time.monotonic() - begin,
        }
        if distributed.first():
            store.save_model(checkpoint, model, stats)
            evaluations.append(evaluate_stage(job, t, model, codes))
            store.write_json(folder / f"evaluation_D{t}.json", asdict(evaluations[-1]))
        finish(stage, begin, **record)

    results = {}
    if distributed.first():
        begin = time.monotonic()
        peak = peak_memory()
        rows = references(job, bi_encoder, embeddings) if config.baselines else {}
        done["baselines"] = {"seconds": time.monotonic() - begin}
        results = assemble(config, job, done, scoring.summarise(evaluations, config.seed), rows, peak)
        store.write_json(folder / "results.json", results)
    distributed.wait()
    return results


def workload(job: Job) -> cost.Workload:
    """What the run has to do, for the estimate of its memory."""
    per_document, corpora = job.config.pseudo_per_document, job.corpora
    counts = published.Benchmark(
        tuple(len(corpus.ids) for corpus in corpora), tuple(per_document * len(corpus.ids) for corpus in corpora),
        tuple(len(corpus.test) for corpus in corpora), len(corpora[0].train), (), {}, "",
    )  # fmt: skip
    return cost.Workload(counts, job.config.document_length)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes (ru_maxrss counts KiB on Linux, bytes on macOS)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def assemble(config: Config, job: Job, done: dict, metrics: dict, rows: dict, peak: int) -> dict:
    """The contents of results.json."""
    later = [stage for stage in done if stage[1:].isdigit() and stage != "D0"]
    return {
        "method": config.method,
        "data": config.data,
        "seed": config.seed,
        "metrics": metrics,
        "baselines": rows,
        "experts": {f"D{t}": done[f"D{t}"]["experts"] for t in range(len(job.corpora))},
        "ood_percent": {s: [d["ood_percent"] for d in done[s]["decisions"]] for s in later},
        "routing": {s: done[s].get("routing", []) for s in later},
        "first_choice": {s: done[s].get("first_choice", []) for s in later},
        "trainable_parameters": {s: done[s]["trainable_parameters"] for s in later},
        "seconds": {stage: record["seconds"] for stage, record in done.items()},
        "peak_memory_bytes": peak,
        "docids": done["rq"]["docids"],
        "config": asdict(config),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "faiss": faiss.__version__, "sentencepiece": sentencepiece.__version__, "threads":
            torch.get_num_threads(), "processes": distributed.size(),
        },
    }  # fmt: skip


def show(results: dict, log: store.Log) -> None:
    """The results table and what grew where."""
    systems = {results["method"]: results["metrics"]} | results["baselines"]
    log.line(scoring.table("Recall@10/MRR@10 in percent after the last corpus", systems))
    for stage, experts in results["experts"].items():
        shares = ", ".join(f"{percent:.1f}%" for percent in results["ood_percent"].get(stage, []))
        log.line(f"{stage}: experts per layer {experts}" + (f", OOD queries {shares}" if shares else ""))
    low, high = results["metrics"]["recall@10"]["AP_ci95"]
    log.line(f"AP in Recall@10: 95% interval {100 * low:.1f} to {100 * high:.1f} over queries")
    minutes, gib = sum(results["seconds"].values()) / 60, results["peak_memory_bytes"] / 2**30
    log.line(f"{minutes:.1f} minutes, peak memory {gib:.2f} GiB")


# ------------------------------------------------------------------------------------------------ the command


@dataclass
class Command:
    """What a command line asks for."""

    config: Config
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False


def parse(argv: list[str]) -> Command:
    """Flags -> what to do: defaults < preset < method < flags.

    Raises ValueError that names an unknown preset or method and those that exist.
    """
    parser = argparse.ArgumentParser(
        description="Index a growing corpus in a T5 and retrieve from it. In brackets: the default, which is the paper's "
        "for NQ320k; the preset and the method override it.",
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in fields(Config):
        name = item.metadata["group"]
        group = groups.setdefault(name, parser.add_argument_group(name))
        kind = {"type": type(item.default), "metavar": type(item.default).__name__}
        if isinstance(item.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        names = dict.fromkeys([f"--{item.name}", f"--{item.name.replace('_', '-')}"])  # both spellings
        group.add_argument(
            *names,
            dest=item.name,
            default=argparse.SUPPRESS,
            help=f"{item.metadata['help']} [{item.default}]",
            **kind,
        )
    parser.add_argument("--resume", metavar="RUN", default=argparse.SUPPRESS, help="go on with a stopped run")
    parser.add_argument("--overwrite", action="store_true", help="move a run that is in the way aside")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what the run would cost, and do nothing"
    )
    given = vars(parser.parse_args(argv))
    overwrite, resume = given.pop("overwrite"), given.pop("resume", None)
    dry_run = given.pop("dry_run")
    if resume is not None:
        if given:
            raise ValueError(f"--resume takes every setting from the run; remove --{' --'.join(given)}")
        path = Path(resume) / "config.json"
        try:
            return Command(Config(**store.read_json(path) | {"run": resume}), resume=True)
        except TypeError as error:
            raise ValueError(f"{path}: written by another version of this program ({error})") from None

    source, method = given.get("data", "boolq"), given.get("method", "mixlora-dsi")
    preset = given.get("preset") or (source if source in PRESETS else "beir")
    if preset not in PRESETS or method not in METHODS:
        raise ValueError(
            f"found preset {preset!r} and method {method!r}, wanted a preset of {', '.join(PRESETS)} and a method of "
            f"{', '.join(METHODS)}"
        )
    recipe = PRESETS[preset] | METHODS[method] | METHOD_RECIPES.get((preset, method), {})
    config = Config(**(recipe | given | {"data": source, "method": method, "preset": preset}))
    config.t5 = "" if config.t5 == "none" else config.t5
    config.d0_mask = config.d0_mask or config.mask
    config.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config.precision = config.precision or ("bf16" if config.device.startswith("cuda") else "float32")
    config.run = config.run or f"runs/{Path(source).name}"
    if source in published.BENCHMARKS:
        config.data_dir = config.data_dir or str(Path(__file__).parent / "data" / source)
    if not dry_run:
        check(config)
    return Command(config, overwrite=overwrite, dry_run=dry_run)


def check(config: Config) -> None:
    """Raises ValueError where a setting cannot work, and says which would."""
    masks = ("segment", "docid_vocab", "full_vocab")
    choices = {
        "split_by": ("auto", "order", "random", "topic"), "docid_kind": ("rq", *other_docids.KINDS), "router_row": ("random", "ood_mean"), "expand": ("ood",
        "always", "never", "fixed"), "ood_mode": ood.MODES, "mask": masks, "d0_mask": masks,
        "repel_reduction": ("mean", "sum"), "aux_layers": ("all", "expanded"), "kl_reduction": ("sum",
        "mean"), "slow": ("grad", "lr", "none"), "precision": ("float32", "bf16"),
    }  # fmt: skip
    for name, wanted in choices.items():
        if getattr(config, name) not in wanted:
            raise ValueError(f"found --{name} {getattr(config, name)}, wanted one of {', '.join(wanted)}")
    for item in fields(Config):
        value = getattr(config, item.name)
        if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"found --{item.name} {value}, wanted a finite number of 0 or more")
    if config.width % config.heads:
        raise ValueError(
            f"found --width {config.width} and --heads {config.heads}, wanted a width that heads divide"
        )
    if config.d0_fragment_share > 1 or not 0 < config.epsilon < 1:
        raise ValueError("--d0_fragment_share and --epsilon are shares: wanted at most 1")
    if config.docid_kind in ("hierarchical", "atomic") and config.d0_fragments:
        raise ValueError(f"fragments have no {config.docid_kind} docid; pass --d0_fragments 0")
    if config.insert and config.docid_kind != "atomic":
        raise ValueError("--insert gives each new document a row of its own; pass --docid_kind atomic")
    if config.ewc and (config.mixture or config.docid_kind == "atomic"):
        raise ValueError(
            "--ewc compares tensors with earlier ones, and experts and atomic tables grow; pass --ewc 0"
        )
    if config.mixture and (config.prompts or config.adapters or config.joint or config.insert):
        raise ValueError(
            "--prompts, --adapters, --joint and --insert are of methods without a mixture: --no-mixture"
        )
    if config.docids and config.docid_kind != "rq":
        raise ValueError(f"--docids brings docids of its own, not those of --docid_kind {config.docid_kind}")
    if config.docid_kind == "pq" and config.width % config.M and not config.t5:
        raise ValueError(
            f"found --M {config.M}, wanted one that divides --width {config.width} for --docid_kind pq"
        )
    if config.joint and not config.steps:
        raise ValueError("--joint trains for d0_steps + t * steps steps; pass --steps")
    if config.mixture:
        mix_config(config)
    elif config.kl_coef or config.kl_old_coef:
        raise ValueError(
            "without a mixture the encoder trains too and no teacher is cached: pass --kl_coef 0 --kl_old_coef 0"
        )
    given = [config.tokenizer, config.docids, *config.teacher.split(",")]
    given += [config.pseudo_queries] if config.pseudo_queries != "drawn" else []
    for path in filter(None, given):
        if not Path(path).is_file():
            raise ValueError(f"found no file {path}, which a flag names")
    if config.data == "msmarco" and not (
        config.pseudo_queries or published.authors_parts(Path(config.data_dir))
    ):
        raise ValueError(
            "--data msmarco has no pseudo-queries of its own: make them with doc2query.py and pass --pseudo_queries "
            "FILE, or pass --pseudo_queries drawn to draw them from the passages"
        )
    if config.layers > config.decoder_blocks and not config.t5:
        raise ValueError(
            f"found --layers {config.layers}, wanted at most --decoder_blocks {config.decoder_blocks}"
        )


def open_folder(config: Config, overwrite: bool) -> Path:
    """The run's folder, new and with its config; one that holds another run is moved aside or refused."""
    folder = Path(config.run)
    if (
        folder / "corpus.json"
    ).exists():  # a run that got no further than a wrong --data left nothing to keep
        if not overwrite:
            raise ValueError(
                f"{folder} holds a run already: pass --resume {folder}, --overwrite, or another --run"
            )
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        print(f"moved the earlier run to {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    store.write_json(folder / "config.json", asdict(config))
    return folder


def keep_freed_memory() -> None:
    """Keeps what tensors free for the next ones, where the C library is glibc.

    It gives blocks of 128 KB and more back to the system, which hands them out again a zeroed page at a time: a fifth
    of a small model's training on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, most_mapped = -1, -4  # numbers of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(most_mapped, 0)


def execute(command: Command, last: int | None = None, quiet: bool = False) -> dict:
    """Trains in the command's run folder, up to D_last where given; returns what results.json holds."""
    keep_freed_memory()
    config = command.config
    config.device = distributed.start(config.device)
    if config.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32, as the paper
    folder = Path(config.run)
    if distributed.first() and not command.resume:
        open_folder(config, command.overwrite)
    distributed.wait()
    lock = store.lock(folder) if distributed.first() else None
    log = store.Log(folder, quiet, writes=distributed.first())
    log.line(" ".join(f"{name}={value}" for name, value in asdict(config).items() if value != ""))
    results = train(config, folder, log, last)
    if results:
        show(results, log)
        log.line(f'python search.py {folder} "a question"')
    if lock:
        lock.close()
    distributed.stop()
    return results


def main(argv: list[str]) -> None:
    command = parse(argv)
    if command.dry_run:
        source = command.config.data
        if source not in cost.WORKLOADS:
            raise ValueError(f"--dry-run counts --data {' or '.join(cost.WORKLOADS)}, found --data {source}")
        if command.config.method in UNCOUNTED:
            raise ValueError(
                f"--dry-run counts no {command.config.method}; take --method base or mixlora-dsi"
            )
        print(cost.table(command.config, cost.WORKLOADS[source]))
    else:
        execute(command)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ntrain.py: stopped; finished stages are kept, go on with --resume RUN")
