"""Settings of a run: their flags, the presets of the benchmarks, the methods, and every check before any work.

Paper    appendix E (recipes), tables 1 and 6-7
In       a command line
Out      Config, whose fields are the flags; ValueError where a setting cannot work
Next     prepare.py and train.py read it; the run folder keeps it as config.json
Differs  the defaults are the paper's for NQ320k; what a preset or method changes stands in one dict each
"""

import argparse
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

import dream
import published
from command import Parser, check_device, default_device
from mixlora import MixConfig
from store import read_json

LARGEST = 2**31 - 2**16  # of an integer: seeds count up from it in 32 bits
LARGEST_K = 2**15  # codes are int16 in docids.npy and the trie
AT_LEAST_1 = (
    "width heads feed_forward encoder_blocks decoder_blocks dense_batch negatives layers lora_rank "
    "pseudo_per_document d0_batch batch epochs ewc_samples beam"
)
AT_LEAST_2 = "query_length dense_length document_length dream_words"  # a text of one token is its </s>
SHARES = "dropout lora_dropout d0_warmup warmup epsilon dream_general dream_style"


def flag(default, group: str, text: str, choices: str = ""):
    """A field of Config: its default, the stage it belongs to, unit and origin for --help, and what it may be."""
    return field(default=default, metadata={"group": group, "help": text, "choices": choices.split()})


# fmt: off
@dataclass
class Config:
    """Every setting of a run. Defaults are the paper's for NQ320k; PRESETS and METHODS override them."""

    data: str = flag("boolq", "data", "boolq, nq320k, msmarco, or a folder in BEIR layout")
    data_dir: str = flag("", "data", "folder of the published files of nq320k or msmarco (default data/NAME; fetched where absent)")
    preset: str = flag("", "data", "recipe: boolq, beir, nq320k, msmarco (default: that of --data, beir for a folder)")
    method: str = flag("mixlora-dsi", "data", "mixlora-dsi, paper (its recipe alone), dream (all weights train, ours); the paper's mixlora-dsi-pt, never-expand, always-expand; baselines: naive-expansion, base, dsi++, clever, promptdsi, corpusbrain++, incdsi, joint")
    run: str = flag("", "data", "run folder (default runs/<data>)")
    save_seconds: float = flag(600.0, "data", "between two saves of where a stage stands (latest.pt)")
    seed: int = flag(42, "data", "of splits, draws and weights (paper: 42)")
    device: str = flag("", "data", "cpu or cuda (default: cuda where present)")
    splits: str = flag("60,10,10,10,10", "data", "percent of documents in D_0..D_T, counts, or paper: its exact sizes (tables 6-7)")
    split_by: str = flag("auto", "data", "order (the folder's file `order`), random, topic (each D_t a topic of its own, ours), or auto: order where there is one", "auto order random topic")
    skip_invalid: bool = flag(False, "data", "leave out what is wrong in the files (documents without a word, ids with white space, labels of missing documents, malformed lines ..), and say how many")
    merge_equal: bool = flag(False, "data", "keep one of documents that are equal, with the labels and training queries of all")
    general: str = flag("", "data", "general text in place of T5's pre-training, never indexed: a folder whose corpus.jsonl holds it, boolq (its pages of one question) or none (ours)")
    tokenizer: str = flag("", "data", "a SentencePiece file (default: spiece.model beside --t5's weights, else trained on D_0 and general text)")
    vocab: int = flag(8000, "data", "pieces of a tokenizer trained on D_0; 0: by the number of its documents (ours)")
    query_length: int = flag(64, "data", "tokens of a query (paper: 256 in training, 64 in evaluation)")
    pseudo_queries: str = flag("", "data", "JSON lines {doc_id, query} of tools.doc2query, or drawn: from the text (default: published ones, else drawn)")
    pseudo_per_document: int = flag(15, "data", "pseudo-queries of a new document (paper: up to 15 on NQ320k)")

    t5: str = flag("", "model", "folder or hub name of published T5 weights, as google-t5/t5-base (paper); none: from scratch, word rows by LSA")
    width: int = flag(768, "model", "D (T5-base)")
    heads: int = flag(12, "model", "H (T5-base); the head width is D / H")
    feed_forward: int = flag(3072, "model", "F (T5-base)")
    encoder_blocks: int = flag(12, "model", "T5-base")
    decoder_blocks: int = flag(12, "model", "T5-base")
    dropout: float = flag(0.1, "model", "share of units (T5)")

    precision: str = flag("", "model", "float32, or bf16 products under autocast (default: bf16 on CUDA, paper; float32 elsewhere)", "float32 bf16")
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
    dense_contrastive: float = flag(0.0, "dense", "weight of the in-batch contrastive term within the rounds (ours)")
    dense_margin: float = flag(1.0, "dense", "weight of MarginMSE (paper: 1)")
    dense_scale: float = flag(1.0, "dense", "inner products are multiplied by it in both losses (ours)")
    dense_pseudo: int = flag(0, "dense", "pseudo-queries of a document among the examples (paper: 0, annotated ones only)")
    negatives: int = flag(100, "dense", "hard negatives kept of each query (paper: 100)")
    teacher: str = flag("", "dense", "JSON lines {qid, docids, scores} of a cross-encoder, one file or one for each round, with commas (default: BM25)")
    save_negatives: bool = flag(False, "dense", "write each round's negatives, in the format of --teacher, into the run folder (ours)")

    M: int = flag(8, "docids", "codebooks (paper); 0: by the number of D_0's documents")
    K: int = flag(2048, "docids", "centroids of a codebook (paper); 0: by the number of D_0's documents")
    rq_pseudo: int = flag(0, "docids", "pseudo-queries of a document of D_0 whose embeddings fit the codebooks too (paper: 0)")
    docid_kind: str = flag("rq", "docids", "rq (paper), or for its table 9: pq, atomic (a code for each document; M and K then follow)", "rq pq atomic")
    docids: str = flag("", "docids", "docid_to_smtid.json: docids made elsewhere, {docid: [codes]} (default: made here)")

    mixture: bool = flag(True, "mixture", "experts and router in the decoder (off: plain T5)")
    d0_mixture: bool = flag(True, "mixture", "the mixture is there on D_0 already (off: it comes with D_1, the paper's -PT)")
    layers: int = flag(5, "mixture", "mixed decoder blocks, from the first (paper)")
    experts: int = flag(2, "mixture", "per layer, at the start (paper)")
    lora_rank: int = flag(8, "mixture", "r (paper)")
    lora_alpha: float = flag(16.0, "mixture", "an expert's output is scaled by lora_alpha / r (paper)")
    lora_dropout: float = flag(0.05, "mixture", "on an expert's input (paper)")
    lora_in_site: str = flag("post_act", "mixture", "post_act (released code) or pre_act", "post_act pre_act")
    router: str = flag("cosine", "mixture", "cosine (paper) or linear (Naive Expansion)", "cosine linear")
    router_row: str = flag("random", "mixture", "a new router row: random (released code) or ood_mean (ours)", "random ood_mean")

    expand: str = flag("ood", "growth", "ood (paper), always, never, or fixed: D_0's experts all go on training (ours, for comparison)", "ood always never fixed")
    delta: float = flag(1.0, "growth", "percent of OOD queries above which a layer grows, pooled: beyond 100 * epsilon (paper: 1)")
    ood_mode: str = flag("paper_code", "growth", "paper_code, or pooled: both tails, on the scale of dreams (ours)", "paper_code pooled")
    epsilon: float = flag(0.02, "growth", "pooled: share of false alarms (ours)")
    evolve: bool = flag(False, "growth", "a layer that does not grow trains its newest expert (ours; paper: nothing)")

    d0_steps: int = flag(20_000, "training", "optimiser steps on D_0 (paper: 20,000 on NQ320k)")
    d0_batch: int = flag(1024, "training", "queries (paper: 1024)")
    d0_lr: float = flag(1e-3, "training", "peak learning rate (paper)")
    d0_warmup: float = flag(0.1, "training", "share of D_0's steps in which the learning rate rises (paper: 0.1; 0.045 for a plain T5 on MS MARCO)")
    d0_fragments: int = flag(0, "training", "fragments of each document of D_0 that are learnt as documents of their own, where there is no general text (ours)")
    steps: int = flag(0, "training", "optimiser steps on each D_t; 0: by epochs")
    epochs: int = flag(10, "training", "passes over D_t's pseudo-queries (paper: 10; BASE 5)")
    batch: int = flag(32, "training", "queries (paper: 32 on NQ320k)")
    lr: float = flag(1e-3, "training", "peak learning rate on D_t (paper)")
    warmup: float = flag(0.1, "training", "share of D_t's steps in which the learning rate rises (paper)")
    mask: str = flag("segment", "training", "logits in the loss: segment (paper), docid_vocab, full_vocab (no mask)", "segment docid_vocab full_vocab")
    d0_mask: str = flag("", "training", "mask of D_0's loss (default: as --mask)", "segment docid_vocab full_vocab")
    align_coef: float = flag(1.0, "training", "alpha_1 of the align loss (paper)")
    repel_coef: float = flag(1.0, "training", "alpha_1 of the repel loss (paper)")
    repel_reduction: str = flag("mean", "training", "over older rows: mean (released code) or sum (paper)", "mean sum")
    aux_layers: str = flag("all", "training", "layers with router losses: all (released code) or expanded: those with experts that train", "all expanded")
    balance_coef: float = flag(0.0, "training", "balance loss (paper: 0.01, Naive Expansion only)")
    z_coef: float = flag(0.0, "training", "z loss (paper: 0.001, Naive Expansion only)")
    kl_coef: float = flag(0.1, "training", "alpha_2 of the KL to the previous model (paper)")
    kl_reduction: str = flag("sum", "training", "over docid positions: sum (released code) or mean (paper)", "sum mean")
    slow: str = flag("grad", "training", "slow learner of the docid table on D_t: its gradient (grad, paper; AdamW undoes the scale but in clipping and where gradients are near its epsilon) or its learning rate (lr) times 0.01, or none", "grad lr none")

    table_lr: float = flag(0.0, "training", "peak learning rate of the docid table on D_t (default, and paper: as --lr)")
    attention_rank: int = flag(0, "training", "rank of un-routed LoRA on the decoder's self- and cross-attention, from D_1 on (0: none; paper: none)")
    attention_lr: float = flag(5e-3, "training", "its peak learning rate (ours)")

    dreams: int = flag(0, "dreams", "pseudo-queries of earlier documents that are made from their docids for each D_t (ours)")
    dream_batch: int = flag(512, "dreams", "dreams beside --batch new queries in a step, a multiple of these (ours)")
    dream_kl: float = flag(2.0, "dreams", "weight of the KL to the previous model on dreams; beside general text 2.25, with --method dream 4 and 2.5 (ours)")
    dream_words: int = flag(4, "dreams", "words at most of its document in a dream, 2 at least (ours)")
    dream_noise: int = flag(4, "dreams", "words at most that are drawn by their frequency alone (ours)")
    dream_general: float = flag(0.5, "dreams", "share of dreams in whose place pseudo-queries of general text stand, where there is some (ours)")
    dream_style: float = flag(0.5, "dreams", "share of D_t's own queries that are dreams of its documents; 0 beside general text (ours)")

    sam_rho: float = flag(0.0, "baselines", "radius of adaptive SAM on D_t (paper: 0.15, DSI++ only)")
    ewc: float = flag(0.0, "baselines", "weight of the EWC penalty on D_t (paper: 0.5, CLEVER only)")
    ewc_samples: int = flag(512, "baselines", "queries of an earlier corpus behind its Fisher information (paper: 512 and 1024)")
    ewc_protect_d0: bool = flag(False, "baselines", "EWC protects D_0 too (released code: D_1.. only)")
    prompts: int = flag(0, "baselines", "prefix prompts of PromptDSI's pool, one a topic (paper: 283 to 310 on NQ320k)")
    adapters: bool = flag(False, "baselines", "CorpusBrain++'s bottleneck adapters, in both stacks, train on D_t")
    joint: bool = flag(False, "baselines", "on D_t train anew on all of D_0..D_t, by d0_steps + t * steps steps (ours)")
    rehearsal: bool = flag(False, "baselines", "pseudo-queries of the earlier documents' text in place of dreams of them: an upper bound that the method forbids (ours)")
    insert: bool = flag(False, "baselines", "on D_t train nothing; find each new document's row of an atomic table (IncDSI)")

    beam: int = flag(10, "search", "partial docids kept (paper)")
    baselines: bool = flag(True, "search", "score BM25 and the bi-encoder too")
# fmt: on


SMALL = dict(  # a T5 without published weights, on two cores
    query_length=32, pseudo_per_document=64, width=128, heads=4, feed_forward=512, encoder_blocks=2,
    decoder_blocks=2, layers=2, dropout=0.0, M=6, K=256, rq_pseudo=24, dense_length=32, beam=40,
    dense_warmup_steps=400, dense_rounds=2, dense_steps=60, dense_batch=128, dense_lr=7e-4,
    dense_contrastive=1.0, dense_margin=0.01, dense_scale=0.1, dense_pseudo=8, negatives=50, d0_steps=1000,
    d0_batch=256, d0_lr=2e-3, steps=300, batch=256, lr=5e-3, lora_rank=32, lora_alpha=64.0, lora_dropout=0.0, warmup=0.03,
    d0_warmup=0.03,
    d0_fragments=16, kl_coef=0.25,
)  # fmt: skip
PAPER = dict(splits="paper", t5="google-t5/t5-base")  # and the defaults of Config
PRESETS = {
    "boolq": SMALL | dict(general="boolq"),
    "beir": SMALL | dict(M=0, K=0, vocab=0),  # by the number of documents: prepare.sized
    "nq320k": PAPER,
    "msmarco": PAPER | dict(
        pseudo_per_document=10, dense_steps=88_400, d0_steps=250_000, batch=512, epochs=5, delta=0.01,
        baselines=False,  # BM25 over 8.8 million passages takes hours here; the paper's row is Pyserini's
    ),
}  # fmt: skip
PLAIN_START = dict(d0_mixture=False)
PLAIN = PLAIN_START | dict(mixture=False, kl_coef=0.0, slow="none")
BASE = PLAIN | dict(lr=1e-3)
METHODS = {
    "mixlora-dsi": {},  # the paper's recipe; the small presets add OURS
    "paper": {},
    "dream": PLAIN | dict(dreams=20_000, dream_kl=4.0, lr=1e-3, table_lr=5e-3),
    "never-expand": dict(expand="never"),
    "always-expand": dict(expand="always"),
    "mixlora-dsi-pt": PLAIN_START | dict(delta=10.0),
    "naive-expansion": PLAIN_START | dict(
        expand="always", router="linear", align_coef=0.0, repel_coef=0.0, balance_coef=0.01,
        z_coef=0.001, kl_coef=0.0, slow="none",
    ),
    "base": BASE,
    "dsi++": BASE | dict(sam_rho=0.15),
    "clever": BASE | dict(ewc=0.5),
    "promptdsi": PLAIN | dict(prompts=300),
    "corpusbrain++": PLAIN | dict(adapters=True, mask="full_vocab", d0_mask="segment"),
    "joint": PLAIN | dict(joint=True),
    "incdsi": PLAIN | dict(docid_kind="atomic", insert=True, d0_fragments=0),
}  # fmt: skip
OURS = dict(  # dreams carry the KL to the previous model, in place of D_t's own queries
    dreams=20_000, attention_rank=32, ood_mode="pooled", router_row="ood_mean", evolve=True, kl_coef=0.0, slow="none",
)  # fmt: skip
# Where the paper's recipe of a method differs from its own preset's (appendix E and the released scripts): methods
# that start from the plain T5 take larger batches on NQ320k, BASE and its relatives fewer epochs; on MS MARCO they warm D_0 up less.
FROM_PLAIN = [method for method in METHODS if not METHODS[method].get("d0_mixture", True)]
METHOD_RECIPES = (
    {("nq320k", method): dict(batch=128) for method in FROM_PLAIN}
    | {("nq320k", method): dict(batch=128, epochs=5) for method in ("base", "dsi++", "clever")}
    | {("msmarco", method): dict(d0_warmup=0.045) for method in FROM_PLAIN}
    | {("msmarco", "promptdsi"): dict(d0_warmup=0.045, prompts=6611)}
    | {(preset, "promptdsi"): dict(prompts=32) for preset in ("boolq", "beir")}
    | {(preset, "mixlora-dsi"): OURS for preset in ("boolq", "beir")}
)
# Beside general text new queries need no style of their own, since what holds the model is in natural words too
BESIDE_GENERAL = dict(dream_style=0.0, dream_kl=2.25)

OF_MACHINE = ("device", "micro_batch", "recompute", "check_memory")  # may change as a run goes on


@dataclass
class Command:
    """What a command line asks for."""

    config: Config
    resume: bool = False
    overwrite: bool = False
    extends: bool = False  # the run takes in the documents of `data`
    data: Path = Path()
    replace: bool = False  # documents of the same ids
    keep: int = 2  # checkpoints beside D_0's
    skip_invalid: bool = False
    consolidates: Path | None = None  # the run whose documents a new one is trained on
    given: frozenset[str] = frozenset()  # settings that the command line names


def parse(argv: list[str], files: bool = True) -> Command:
    """Flags -> what to do: defaults < preset < method < flags. Without `files` those that they name may be absent.

    Raises ValueError that names an unknown preset or method and those that exist.
    """
    parser = Parser(
        description="Index a growing corpus in a T5 and retrieve from it. In brackets: the default, which is the paper's "
        "for NQ320k; the preset and the method override it.",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in fields(Config):
        name, kind = item.metadata["group"], type(item.default)
        group = groups.setdefault(name, parser.add_argument_group(name))
        form = {"type": kind, "metavar": kind.__name__}
        if kind is bool:
            form = {"action": argparse.BooleanOptionalAction}
        spellings = dict.fromkeys([f"--{item.name}", f"--{item.name.replace('_', '-')}"])
        text = f"{item.metadata['help']} [{item.default}]"
        group.add_argument(*spellings, dest=item.name, default=argparse.SUPPRESS, help=text, **form)
    parser.add_argument("--resume", metavar="RUN", default=argparse.SUPPRESS, help="go on with a stopped run")
    text = "a finished run takes in the documents of --data, a folder in BEIR layout"
    parser.add_argument("--extend", metavar="RUN", default=argparse.SUPPRESS, help=text)
    text = "with --extend: new versions take the place of documents with the same ids"
    parser.add_argument("--replace", action="store_true", default=argparse.SUPPRESS, help=text)
    text = "with --extend: checkpoints that stay beside D_0's, the newest; 0: all [2]"
    parser.add_argument("--keep", type=int, default=argparse.SUPPRESS, help=text)
    text = "train D_0 of a new run, --run, on all documents that this run holds"
    parser.add_argument("--consolidate", metavar="RUN", default=argparse.SUPPRESS, help=text)
    parser.add_argument("--overwrite", action="store_true", help="move a run that is in the way aside")
    given = vars(parser.parse_args(argv))
    modes = [f"--{name}" for name in ("resume", "extend", "consolidate") if name in given]
    modes += ["--overwrite"] * (given["overwrite"] and "--consolidate" not in modes)
    if len(modes) > 1:
        raise ValueError(f"{modes[0]} and {modes[1]} do not go together")
    overwrite, resume = given.pop("overwrite"), given.pop("resume", None)
    if "extend" in given:
        return extension(given)
    if stray := [name for name in ("replace", "keep") if name in given]:
        raise ValueError(f"--{stray[0]} is of --extend RUN --data DIR")
    if "consolidate" in given:
        source = Path(given.pop("consolidate"))
        if "run" not in given or set(given) - {"run", *OF_MACHINE}:
            also = ", ".join(f"--{name}" for name in ("overwrite", *OF_MACHINE))
            raise ValueError(f"--consolidate RUN takes --run NEW, a folder for the new run, {also} alone")
        config = replace(going_on(source, given), run=given["run"])
        return Command(config, overwrite=overwrite, consolidates=source)
    if resume is None:
        return Command(settle(given, files), overwrite=overwrite, given=frozenset(given))
    if stray := [name for name in given if name not in OF_MACHINE]:
        but = ", ".join(f"--{name}" for name in OF_MACHINE)
        raise ValueError(f"--resume takes every setting but {but} from the run; remove --{' --'.join(stray)}")
    return Command(going_on(Path(resume), given), resume=True)


def going_on(run: Path, given: dict) -> Config:
    """The run's own settings but for those of the machine, which are taken out of `given`."""
    config = replace(saved_config(run), **{name: given.pop(name) for name in OF_MACHINE if name in given})
    for name in OF_MACHINE:
        check_value(config, name)
    return config


def extension(given: dict) -> Command:
    """--extend RUN --data DIR, with settings that are the run's."""
    run, own = Path(given.pop("extend")), ("replace", "keep", "skip_invalid", *OF_MACHINE)
    if "data" not in given or set(given) - {"data", *own}:
        wanted = ", ".join(f"--{name}" for name in own)
        raise ValueError(f"--extend {run} takes --data DIR, {wanted} alone; every other setting is the run's")
    if given.get("keep", 2) < 0:
        raise ValueError(f"--keep {given['keep']}: wanted a number of checkpoints, 0 for all")
    config = going_on(run, given)
    return Command(config, extends=True, **given | {"data": Path(given["data"])})


def settle(given: dict, files: bool) -> Config:
    """The whole Config of the flags that were given."""
    source, method = given.get("data", "boolq"), given.get("method", "mixlora-dsi")
    preset = given.get("preset") or (source if source in PRESETS else "beir")
    if preset not in PRESETS or method not in METHODS:
        raise ValueError(
            f"found preset {preset!r} and method {method!r}, wanted a preset of {', '.join(PRESETS)} and a method of "
            f"{', '.join(METHODS)}"
        )
    recipe = PRESETS[preset] | METHODS[method] | METHOD_RECIPES.get((preset, method), {})
    chosen = {"general": "", "dream_general": Config.dream_general} | recipe | given
    if chosen["general"] not in ("", "none") and chosen["dream_general"]:
        recipe |= BESIDE_GENERAL | ({"dream_kl": 2.5} if method == "dream" else {})
    config = Config(**(recipe | given | {"data": source, "method": method, "preset": preset}))
    config.t5 = "" if config.t5 == "none" else config.t5
    config.general = "" if config.general == "none" else config.general
    config.d0_mask = config.d0_mask or config.mask
    config.device = config.device or default_device()
    config.precision = config.precision or ("bf16" if config.device.startswith("cuda") else "float32")
    config.run = config.run or f"runs/{Path(source).absolute().name}"
    if source in published.BENCHMARKS:
        config.data_dir = config.data_dir or str(Path(__file__).parent / "data" / source)
    check(config, files)
    return config


def saved_config(run: Path) -> Config:
    """The settings of a run folder. Raises ValueError where they are another version's."""
    path = run / "config.json"
    saved, names = read_json(path), {item.name for item in fields(Config)}
    other = sorted(names.symmetric_difference(saved)) if isinstance(saved, dict) else ["no settings"]
    if other:
        raise ValueError(f"{path}: written by another version of this program ({', '.join(other)})")
    return Config(**saved | {"run": str(run)})


def mix_config(config: Config) -> MixConfig:
    return MixConfig(
        config.layers, config.experts, config.lora_rank, config.lora_alpha, config.lora_dropout, router=config.router,
        lora_in_site=config.lora_in_site,
    )  # fmt: skip


def check(config: Config, files: bool = True) -> None:
    """Raises ValueError where a setting cannot work, or with `files` one that it names is absent, and says which would."""
    for item in fields(Config):
        check_value(config, item.name)
    for holds, message in [*rules(config), *(of_files(config) if files else [])]:
        if not holds:
            raise ValueError(message)
    if config.mixture:
        mix_config(config)


def check_value(config: Config, name: str) -> None:
    """`check` of a setting by itself."""
    value, choices = getattr(config, name), Config.__dataclass_fields__[name].metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"found --{name} {value}, wanted one of {', '.join(choices)}")
    if isinstance(value, (int, float)):
        low, high = bounds(name, value)
        if not low <= value <= high:
            raise ValueError(f"--{name} {value}: wanted a number from {low} to {high:g}")
    if name == "device":
        check_device(value)


def bounds(name: str, value: float) -> tuple[float, float]:
    """The least and the largest value of a number's flag."""
    if name in SHARES.split():
        return 0, 1
    low = 2 if name in AT_LEAST_2.split() else int(name in AT_LEAST_1.split())
    largest = LARGEST_K if name == "K" else LARGEST
    return low, float(np.finfo(np.float32).max) if isinstance(value, float) else largest


def rules(c: Config) -> list[tuple[bool, str]]:
    """What must hold between settings, each with what to say where it does not."""
    from_scratch, pq, atomic = not c.t5, c.docid_kind == "pq", c.docid_kind == "atomic"
    of_plain_t5 = [flag for flag in ("prompts", "adapters", "joint", "insert") if getattr(c, flag)]
    return [
        (c.width % c.heads == 0, f"--width {c.width} must be a multiple of --heads {c.heads}"),
        (c.K != 1, "--K 1: wanted 2 or more centroids, or 0: by the number of D_0's documents"),
        (not (pq and from_scratch and c.M and c.width % c.M), f"--docid_kind pq wants an --M that divides --width {c.width}"),
        (c.t5 or not c.mixture or c.layers <= c.decoder_blocks, f"--layers {c.layers}: wanted at most --decoder_blocks {c.decoder_blocks}"),
        (0 < c.epsilon < 1, "--epsilon is a share: wanted more than 0 and less than 1"),
        (max(c.dropout, c.lora_dropout, c.dream_general) < 1, "--dropout, --lora_dropout and --dream_general must be less than 1"),
        (not (atomic and c.d0_fragments), "fragments have no atomic docid; pass --d0_fragments 0"),
        (not c.docids or c.docid_kind == "rq", f"--docids brings docids of its own, not those of --docid_kind {c.docid_kind}"),
        (not c.insert or atomic, "--insert gives each new document a row of its own; pass --docid_kind atomic"),
        (not (c.ewc and (c.mixture or atomic)), "--ewc compares tensors with earlier ones, and experts and atomic tables grow; pass --ewc 0"),
        (not (c.mixture and of_plain_t5), "--prompts, --adapters, --joint and --insert are of methods without a mixture: --no-mixture"),
        (len(of_plain_t5) < 2, f"--{' and --'.join(of_plain_t5)} are ways to learn D_t: pass one of them"),
        (not ((c.ewc or c.sam_rho) and (c.joint or c.insert)), "--ewc and --sam_rho are of models that go on training: pass --ewc 0 --sam_rho 0 with --joint or --insert"),
        (not (c.dreams and (c.joint or c.insert)), "--dreams hold a model that goes on training; pass --dreams 0 with --joint or --insert"),
        (not c.rehearsal or c.dreams, "--rehearsal takes the place of dreams; pass --dreams too"),
        (not (c.sam_rho and c.mixture), "--sam_rho is of methods without a mixture, whose energies it would count twice: pass --sam_rho 0"),
        (not c.prompts or c.t5 or c.decoder_blocks > 1, "--prompts go into the second decoder block; pass --decoder_blocks 2 or more"),
        (not c.joint or c.steps, "--joint trains for d0_steps + t * steps steps; pass --steps"),
        (c.mixture or not c.attention_rank, "--attention_rank is of methods with a mixture; pass --attention_rank 0"),
        (c.dream_words <= dream.TOP, f"--dream_words {c.dream_words}: wanted at most the {dream.TOP} words of a docid"),
        (not c.dreams or (c.dream_batch % c.batch == 0 and c.dream_batch), f"--dream_batch {c.dream_batch}: wanted a multiple of --batch {c.batch}"),
    ]  # fmt: skip


def of_files(c: Config) -> list[tuple[bool, str]]:
    """What must hold of the files that settings name, in the same form."""
    listed = c.pseudo_queries or published.authors_parts(Path(c.data_dir)) if c.data == "msmarco" else True
    general = c.general in ("", "boolq") or Path(c.general).is_dir()
    files = [c.tokenizer, c.docids, *c.teacher.split(","), c.pseudo_queries]
    return [
        (general, f"--general {c.general}: found no such folder; wanted one that holds corpus.jsonl"),
        (listed, "--data msmarco has no pseudo-queries of its own: make them with python -m tools.doc2query and pass --pseudo_queries FILE, or pass --pseudo_queries drawn to draw them from the passages"),
        *((Path(path).is_file(), f"found no file {path}, which a flag names") for path in files if path not in ("", "drawn")),
    ]  # fmt: skip
