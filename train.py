"""The continual loop: D_0, then for each new corpus D_t scan, grow, train, settle, evaluate.

Paper    Eq. 7 and appendix E: cross-entropy + alpha_1 * router losses + alpha_2 * KL to the previous model
In       Config, whose fields are the flags (config.py); what prepare.py makes of a corpus
Out      a run folder (store.py) and the results table
Next     search.py answers queries from the run folder, eval.py scores it again
Differs  plain AdamW in place of 8-bit; the docid mask is on for plain T5 on D_0 too; D_0 starts from the
         bi-encoder's weights; D_t's frozen encoder outputs, without dropout, and the previous model's hidden
         states are computed once, by the scan. Ours, each by a flag: on D_0 part of each batch asks for general
         text (`general`) or fragments of documents (`d0_fragments`); on D_t dreams (dream.py, `dreams`) and
         queries of general text (`dream_general`) hold the model to what it said of earlier docids, LoRA adapts
         the decoder's attention (`attention_rank`), and a layer that does not grow trains its newest expert
         (`evolve`). A corpus that a finished run takes in (extend.py) has steps, rates and weights by its number
         of documents, and where they are few other queries are held from their docids; where the encoder trains,
         a batch goes in two passes by length. None sees an earlier corpus's text.
"""

import hashlib
import math
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import baselines
import command
import data
import dense
import distributed
import eval as scoring
import extend
import mixlora
import ood
import optim
import prepare
import queries
import rq
import store
from config import Command, Config, mix_config, parse
from losses import docid_cross_entropy, kl_to_previous, router_losses
from mixlora import attention_lora, mixed_layers
from optim import Stage, fit, parameter_groups
from prepare import Prepared, Run
from scan import SourceCache, scan
from t5 import T5, segment_logits

EXTRA_SHARE = 0.3  # of D_0's batches: general text or, where there is none, fragments (ours)
FRESH_QUERIES = 8000  # pseudo-queries of a corpus on which its energies are measured once it is known (ours)
YARDSTICK = 4000  # dreams that give energies their scale (ours)
FAR = 10  # percent of the queries just learnt that may lie outside what was known, before a warning (ours)
PER_PAGE = 8  # pseudo-queries of each page of general text that is drawn for this, on average (ours)
FULL = 258  # documents of an added corpus that take `steps` steps: the default's D_t (ours)
FEW_KL = 2  # times the weight of the KL, for fewer documents, beside what their fewer steps ask for (ours)
PASSES = 2  # of a batch, by length, where the encoder trains (ours)
SLOW_FACTOR = 0.01  # of the docid table's gradient or learning rate on D_t (paper)


@dataclass
class State:
    """What one corpus hands to the next."""

    model: T5
    stats: list[ood.Stats]  # of each mixed layer


def new_stats(config: Config, model: T5) -> list[ood.Stats]:
    """Of layers that are about to see their first corpus."""
    return [ood.new_stats(config.ood_mode, len(layer), len(model.rq)) for layer in mixed_layers(model)]


def after_step(model: T5, energies: ood.MovingEnergies) -> None:
    """Moves the statistics of a step's energies, and puts router rows back to unit length."""
    energies.step(distributed.add_up)
    for layer in mixed_layers(model):
        layer.normalise_rows()


# -------------------------------------------------------------------------------------------------------- D_0


class FirstCorpus:
    """Sequence-to-sequence training on D_0: pseudo-query -> docid, from the bi-encoder's weights and the centroids.

    With `last` (joint retraining) on the documents of D_0..D_last.
    """

    def __init__(self, run: Run, made: Prepared, last: int = 0):
        self.run, self.config, self.last, self.made = run, run.config, last, made
        bi_encoder, books, codes = made.bi_encoder, made.books, made.codes
        config, self.corpus, self.draw = run.config, run.corpora[0], run.draw
        if last:
            self.corpus = data.joined(run.corpora[: last + 1])
            if not run.listed:
                self.draw = self.sampler(self.corpus.titles, self.corpus.texts).draw
        self.rows = run.live_of(self.corpus)
        torch.manual_seed(config.seed + 1 + last)
        table = baselines.table_so_far(run, last, books)
        self.model = T5(replace(bi_encoder.config, codebooks=len(table), centroids=table.shape[1]))
        self.model.load_state_dict(bi_encoder.state_dict() | {"rq": table})
        if config.mixture and config.d0_mixture:
            mixlora.add_mixture(self.model, mix_config(config))
            self.model.word.requires_grad_(False)
        run.ready(self.model)
        self.stats = new_stats(config, self.model)
        self.energies = ood.MovingEnergies(self.stats)
        self.rng = random.Random(f"{config.seed} D{last}")
        self.targets, self.extra = codes.to(run.device), None
        if run.general and config.docid_kind != "atomic":
            self.extra = run.general_sampler
            embedded = prepare.open_embeddings(run, [run.general])[0]
        elif config.d0_fragments:  # spans of documents are learnt as documents of their own
            titles, texts = ([of[row] for row in self.rows] for of in (self.corpus.titles, self.corpus.texts))
            self.extra = self.sampler(*queries.fragments(titles, texts, config.d0_fragments, self.rng))
            passages = list(queries.passages(self.extra.titles, self.extra.texts))
            tokens = data.tokenize(run.tokenizer, passages, config.document_length)
            embedded = dense.embed(bi_encoder, tokens, 256)
        if self.extra:
            docids = rq.encode(embedded, books, device=run.device)  # they follow those of the documents
            self.targets = torch.cat([self.targets, docids.to(run.device)])
            self.n_extra = int(EXTRA_SHARE * config.d0_batch)

    def sampler(self, titles: Sequence[str], texts: Sequence[str]) -> queries.PseudoQuerySampler:
        idf = queries.Idf(self.corpus.passages()) if self.last else self.run.idf
        return queries.PseudoQuerySampler(titles, texts, idf, self.run.excluded)

    def next_batch(self) -> list[tuple[int, str]]:
        """(row of `targets`, pseudo-query)"""
        config, rng = self.config, self.rng
        batch = [(row, self.draw(row, rng)) for row in rng.choices(self.rows, k=config.d0_batch)]
        if self.extra:
            rows = rng.choices(self.extra.rows, k=self.n_extra)
            batch[: len(rows)] = [(len(self.made.codes) + row, self.extra.draw(row, rng)) for row in rows]
        return batch

    def loss(self, batch: list[tuple[int, str]]) -> tuple[Tensor, dict[str, Tensor]]:
        model, ids = self.model, self.run.tokens(batch).to(self.run.device)
        docids = self.targets[[row for row, _ in batch]]
        source, padding = model.encode(ids)
        hidden, routes = model.docid_hidden(source, padding, docids)
        terms = {"ce": docid_cross_entropy(model, hidden, docids, self.config.d0_mask)}
        terms |= router_losses(routes, self.config)
        self.energies.see(routes)
        return sum(terms.values()), terms

    def train(self) -> State:
        config = self.config
        groups = parameter_groups(self.model.named_parameters(), config.d0_lr)
        stage = Stage(
            f"D{self.last}", groups, config.d0_steps + self.last * config.steps, config.d0_warmup, self.next_batch,
            self.loss, {"rng": self.rng, "energies": self.energies},
            after_step=partial(after_step, self.model, self.energies),
        )  # fmt: skip
        fit_and_check_frozen(self.run, self.model, stage)
        if self.stats:
            measure_dreams(self.run, self.model, self.made, self.stats, 0)
            ood.settle(self.stats, fresh_scores(self.run, self.model, self.made, 0), first_mixture=True)
        return State(self.model.eval(), self.stats)


# -------------------------------------------------------------------------------------------------------- D_t


class LaterCorpus:
    """Training on D_t, t >= 1, from the model before it, D_t's pseudo-queries, dreams, of its own and of old docids, and
    pseudo-queries of general text.
    """

    def __init__(self, run: Run, t: int, made: Prepared, previous: State):
        self.run, self.config, self.t, self.made = run, run.config, t, made
        self.model, self.stats, self.added = previous.model, previous.stats, run.corpora[t].added
        self.counts_as = len(run.corpora[t].rows) if self.added else FULL  # documents; `steps` are for FULL
        torch.manual_seed(self.config.seed + 1 + t)
        self.generator = torch.Generator().manual_seed(self.config.seed + t)  # of dreams and batches
        run.ready(self.model)
        pairs = run.training_queries(t)
        self.plan(len(pairs))
        self.ids, self.docids = self.queries(pairs)
        self.lengths = (self.ids != data.PAD).sum(1)
        self.table_before = self.model.rq.detach().clone()
        self.first_mixture = self.config.mixture and not mixed_layers(self.model)
        self.cache, self.before, self.memory = None, None, []
        self.record = {"decisions": []}

    def plan(self, n: int) -> None:
        """How long and at what pace D_t trains on its n pseudo-queries, what weight the KL has, and how many queries there are:
        `n_new` of D_t, the first `n_plain` of them no dreams, and `n_old` that hold the model to what it said before.
        """
        config, style = self.config, self.config.dream_style
        self.batch = min(config.batch, n) if self.added else config.batch
        self.steps = config.steps or config.epochs * math.ceil(n / self.batch)
        self.dream_kl, self.pace = config.dream_kl, 1.0  # the pace is of all learning rates
        earlier = self.run.live < self.run.corpora[self.t].first_row  # none where D_t replaces them all
        self.n_old = config.dreams if self.made.dreams and earlier.any() else 0
        if self.added:
            growth = extend.growth_of_steps(self.counts_as / FULL)
            self.steps = math.ceil(config.steps * growth) if config.steps else self.steps
            self.n_old = min(self.n_old, self.steps * config.dream_batch)
            if growth < 1:  # few would draw all queries to themselves
                self.dream_kl *= FEW_KL / growth  # what holds the model weighs more
                # Weights move in proportion to the documents, by steps and pace; of epochs, by their steps alone
                self.pace = growth if config.steps else 1.0
            if self.counts_as < ood.FEW:  # whose docids say little of their words
                style = 0.0
        # Where dreams alone hold it, part of the new queries are dreams too: it would tell old from new by their style
        dreamt = min(int(style * n), n - 1) if self.n_old else 0
        self.n_new, self.n_plain = n, n - dreamt

    def queries(self, pairs: list[tuple[int, str]]) -> tuple[Tensor, Tensor]:
        """Token ids (Q, S) and docids (Q, M) of the stage's queries, in this order: pseudo-queries of D_t, of these `pairs`;
        dreams of its own documents; and those that hold the model: dreams of earlier docids, and pseudo-queries of
        general text. Where D_t has few documents, every other one of these is paired with one of its docids: how
        unlikely that was is held.
        """
        config, run, codes, dreams = self.config, self.run, self.made.codes, self.made.dreams
        if not self.n_old:
            return run.tokens(pairs), codes[[row for row, _ in pairs]]
        order = torch.randperm(len(pairs), generator=self.generator).tolist()
        pairs = [pairs[i] for i in order]
        n_general = int(config.dream_general * self.n_old) if run.general else 0
        rows = run.choose(self.t, self.n_old - n_general, self.generator)
        docids = torch.cat([codes[[row for row, _ in pairs]], codes[rows]])
        parts = [run.tokens(pairs[: self.n_plain]), dreams.draw(docids[self.n_plain :], self.generator)]
        if config.rehearsal:
            rng = random.Random(f"{config.seed} rehearsal {self.t}")
            stored = run.tokens([(row, run.draw(row, rng)) for row in rows.tolist()])
            parts[1:] = parts[1][: -len(rows)], stored
        if n_general:
            asked, of_general = self.general_queries(n_general)
            parts, docids = [*parts, asked], torch.cat([docids, of_general])
        if self.added and self.counts_as < FULL:
            # Every other one holds how unlikely the model finds a new docid as its answer
            held = docids[self.n_new :: 2]
            held[:] = docids[torch.randint(self.n_new, (len(held),), generator=self.generator)]
        width = max(ids.shape[1] for ids in parts)
        return torch.cat([F.pad(ids, (0, width - ids.shape[1])) for ids in parts]), docids

    def general_queries(self, count: int) -> tuple[Tensor, Tensor]:
        """Token ids (count, S) of pseudo-queries of pages of general text, and these pages' docids (count, M)."""
        run, rng = self.run, random.Random(f"{self.config.seed} general {self.t}")
        pages = rng.sample(run.general.rows, min(math.ceil(count / PER_PAGE), len(run.general.rows)))
        rows = rng.choices(pages, k=count)
        embedded = prepare.open_embeddings(run, [run.general])[0][rows]
        asked = run.tokens([(row, run.general_sampler.draw(row, rng)) for row in rows])
        return asked, rq.encode(embedded, self.made.books, device=run.device)

    def scan(self) -> None:
        """D_t by the model before it: encoder outputs, router scores, and the teacher states of both KL terms."""
        config, model = self.config, self.model
        frozen, teacher = config.mixture or config.prompts, bool(config.kl_coef or self.n_old)
        if not (frozen or teacher):
            return
        cache = SourceCache(model, self.ids, config.precision, self.run.folder / "cache")

        def is_ood(layer: int, scores: Tensor) -> Tensor:
            below, above = ood.tails(scores, self.stats[layer], config.epsilon)
            return below | above

        self.before = scan(model, cache, self.docids, is_ood, self.n_plain if self.stats else 0, teacher)
        if frozen:
            self.cache = cache

    def grow(self) -> None:
        """Adds what trains on D_t beside the docid table, and freezes the rest."""
        config, model = self.config, self.model
        if self.first_mixture:
            mixlora.add_mixture(model, mix_config(config))
            self.stats = new_stats(config, model)
        elif config.mixture:
            self.record["decisions"] = self.expand()
        else:
            baselines.add_parts(self.run, model)
        if config.attention_rank and not attention_lora(model):
            mixlora.add_attention_lora(model, config.attention_rank)
        if config.mixture or config.prompts or config.adapters:
            freeze_old(model)
        baselines.extend_table(model, baselines.table_so_far(self.run, self.t, self.made.books))
        self.run.ready(model)
        if config.ewc:
            self.memory = baselines.ewc_memory(self.run, self.t, self.made.codes)

    def expand(self) -> list[dict]:
        """Decides for every mixed layer whether D_t makes it grow, and adds the experts. Returns the numbers."""
        config, t, documents, records = self.config, self.t, self.counts_as, []
        needed = ood.needed_percent(config.ood_mode, config.delta, config.epsilon)
        for number, (layer, stat) in enumerate(zip(mixed_layers(self.model), self.stats)):
            scores = self.before.scores[number][: self.n_plain]
            decision = ood.decide(scores, stat, config.delta, config.epsilon, documents=documents)
            expand = config.expand == "always" and documents >= ood.FEW
            expand |= config.expand == "ood" and decision.expand
            expand = distributed.agree(expand)  # processes may differ in a last bit, not in their experts
            histogram = ood.histogram(scores, stat, config.epsilon)
            if stat.mode == "pooled":
                ood.arrive(stat, scores, documents)
            experts = len(layer)
            if expand:
                layer.add_expert(self.before.direction[number] if config.router_row == "ood_mean" else None)
                ood.grow(stat)
            elif config.expand != "fixed":
                layer.freeze(but=int(config.evolve))
            below, above = decision.tails
            rule = "; " + ood.rule(decision, documents, needed) if config.expand == "ood" else ""
            self.run.log.line(
                f"D{t} layer {number}: {decision.ood_percent:.1f}% of queries OOD ({below:.1f}% below, {above:.1f}% above "
                f"what is known{rule}) -> experts {experts} to {len(layer)}"
            )
            grown = {"expanded": expand, "histogram": histogram, "experts": [experts, len(layer)]}
            records.append(asdict(decision) | grown)
        return records

    def next_batch(self) -> Tensor:
        """(B, 1 + R) rows of `ids`: a new query and R dreams of earlier docids beside it, in every part of a batch; where
        the encoder trains, those of like length.
        """
        new = next(self.order)
        each = self.config.dream_batch // self.batch if self.n_old else 0
        old = self.n_new + torch.randint(self.n_old or 1, (len(new) * each,), generator=self.generator)
        if not self.cache:
            new, old = (rows[self.lengths[rows].argsort(stable=True)] for rows in (new, old))
        return torch.cat([new[:, None], old.view(len(new), each)], dim=1)

    def loss(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a part of a batch of `next_batch`."""
        config, model, device = self.config, self.model, self.run.device
        new, old = rows[:, 0], rows[:, 1:].flatten()
        rows, n, past = torch.cat([new, old]), len(new), None
        docids = self.docids[rows].to(device)
        if self.cache:
            cross, padding = self.cache.get(rows, device)
            past = model.past(cross, padding)
            if not attention_lora(model):
                cross = model.cross_keys_values(cross)  # frozen, as the source is
        else:
            cross, padding = model.encode(self.ids[rows, : int(self.lengths[rows].max())].to(device))
        hidden, routes = model.docid_hidden(cross, padding, docids, past)
        logits = segment_logits(hidden, model.rq)  # shared by all terms
        terms = {"ce": docid_cross_entropy(model, hidden[:n], docids[:n], config.mask, logits[:n])}
        if config.kl_coef:
            terms["kl"] = config.kl_coef * self.kl(logits[:n], new)
        if len(old):
            terms["dream"] = self.dream_kl * self.kl(logits[n:], old)
        if self.memory:
            terms["ewc"] = config.ewc * baselines.ewc_penalty(model, self.memory)
        routes = [route.rows(slice(n)) for route in routes]
        terms |= router_losses(routes, config)
        self.energies.see(routes)
        return sum(terms.values()), terms

    def kl(self, logits: Tensor, rows: Tensor) -> Tensor:
        """KL of the previous model's codes to ours: logits (B, M, K) of the queries in `rows` (B,). Eq. 6."""
        hidden = self.before.hidden[rows].to(self.run.device).float()
        logits_before = segment_logits(hidden, self.table_before)
        return kl_to_previous(logits[..., : logits_before.shape[-1]], logits_before, self.config.kl_reduction)

    def before_clip(self) -> None:
        if self.config.slow == "grad":
            self.model.rq.grad *= SLOW_FACTOR

    def train(self) -> None:
        config, model = self.config, self.model
        self.energies = ood.MovingEnergies(self.stats, only_new=True)
        self.order = dense.Batches(self.n_new, self.batch, self.generator)
        table_lr = (config.table_lr or config.lr) * (SLOW_FACTOR if config.slow == "lr" else 1.0)
        lora = dict(mixlora.attention_parameters(model))
        rest = [(n, p) for n, p in model.named_parameters() if n != "rq" and n not in lora]
        groups = parameter_groups([("rq", model.rq)], table_lr * self.pace)
        groups += parameter_groups(rest, config.lr * self.pace)
        groups += parameter_groups(lora.items(), config.attention_lr * self.pace)
        self.record["trainable_parameters"] = sum(p.numel() for group in groups for p in group["params"])
        stage = Stage(
            f"D{self.t}", groups, self.steps, config.warmup, self.next_batch, self.loss,
            {"order": self.order, "energies": self.energies}, self.before_clip,
            partial(after_step, model, self.energies),
            climb=partial(baselines.climb, rho=config.sam_rho) if config.sam_rho else None,
            parts=1 if self.cache else PASSES,
        )  # fmt: skip
        fit_and_check_frozen(self.run, model, stage)

    def settle(self) -> None:
        """Which experts D_t's tokens use, and statistics of its energies, now that it is known."""
        layers = mixed_layers(self.model)
        if not layers:
            return
        scores = fresh_scores(self.run, self.model, self.made, self.t)
        active = layers[0].config.active
        self.record["routing"] = [mixlora.top_gates(s, active).mean((0, 1)).tolist() for s in scores]
        self.record["first_choice"] = [mixlora.first_choice_share(s).tolist() for s in scores]
        measure_dreams(self.run, self.model, self.made, self.stats, self.t)
        if self.config.ood_mode == "pooled" and not self.first_mixture:
            self.report_distance(scores)
        if self.first_mixture or self.counts_as >= ood.FEW:
            ood.settle(self.stats, scores, self.first_mixture)

    def report_distance(self, scores: list[Tensor]) -> None:
        """How many of the queries just learnt lie outside what was known: where many do, the model tells them from dreams."""
        percent = []
        for of_layer, stat in zip(scores, self.stats):
            known = replace(stat, newest=stat.newest[:0])  # its arrival included
            below, above = ood.tails(of_layer, known, self.config.epsilon)
            percent.append(100 * (below | above).sum().item() / len(below))
        self.record["distance_percent"] = percent
        shares = "by layer " + ", ".join(f"{p:.1f}%" for p in percent)
        self.run.log.line(f"D{self.t}: {shares} of the queries just learnt lie outside what was known")
        if max(percent) > FAR:
            advice = (
                "train anew with --consolidate" if self.added else "pass a larger --dream_kl or --dream_batch"
            )
            self.run.log.line(
                f"warning: above {FAR}% the model tells new queries from dreams, and later corpora may make it forget; {advice}"
            )


def learn(run: Run, t: int, made: Prepared, previous: State | None) -> tuple[State, dict]:
    """The model after D_t and a record of the stage for results.json.

    D_0, and by joint retraining every corpus, begins anew; IncDSI trains nothing; all others go on.
    """
    if t == 0 or run.config.joint:
        state = FirstCorpus(run, made, last=t).train()
        n_trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
        return state, {"decisions": [], "trainable_parameters": n_trained} if t else {}
    if run.config.insert:
        table = baselines.insert(run, t, made.books[0], previous.model)
        baselines.extend_table(previous.model, table[None])
        return previous, {"decisions": [], "trainable_parameters": table[run.corpora[t].first_row :].numel()}
    stage = LaterCorpus(run, t, made, previous)
    stage.scan()
    stage.grow()
    stage.train()
    stage.settle()
    return State(stage.model.eval(), stage.stats), stage.record


# -------------------------------------------------------------------------------------- what both of them need


def fresh_scores(run: Run, model: T5, made: Prepared, t: int, purpose: str = "fresh") -> list[Tensor]:
    """Router scores (Q, M, E) of each mixed layer for pseudo-queries of D_t that no training saw, unless they are listed."""
    corpus = run.corpora[t]
    count = FRESH_QUERIES
    if corpus.added:
        count = min(count, run.config.pseudo_per_document * len(corpus.rows))
    pairs = run.sample(t, count, purpose)
    docids = made.codes[[row for row, _ in pairs]]
    cache = SourceCache(model, run.tokens(pairs), run.config.precision)
    return scan(model, cache, docids, hidden=False).scores


def measure_dreams(run: Run, model: T5, made: Prepared, stats: list[ood.Stats], t: int) -> None:
    """Takes the scale of the layers' energies from dreams of D_0..D_t. In place; where there are no dreams, nothing."""
    if run.config.ood_mode != "pooled" or not (stats and made.dreams):
        return
    generator = torch.Generator().manual_seed(run.config.seed)
    docids = made.codes[run.choose(t + 1, YARDSTICK, generator)]
    cache = SourceCache(model, made.dreams.draw(docids, generator), run.config.precision)
    for stat, scores in zip(stats, scan(model, cache, docids, hidden=False).scores):
        ood.measure(stat, scores)


def freeze_old(model: T5) -> None:
    """Leaves the docid table and what was added (the newest experts and router rows, LoRA on attention, or a baseline's
    adapters or prompts) to train, and nothing else.
    """
    model.requires_grad_(False)
    model.rq.requires_grad_(True)
    for _, p in mixlora.attention_parameters(model):
        p.requires_grad_(True)
    baselines.unfreeze_parts(model)
    for layer in mixed_layers(model):
        trains = len(layer.new) > 0  # an empty tensor that trains would cost the old experts' gradients
        layer.new.requires_grad_(trains)
        layer.router_new.requires_grad_(trains)


def fit_and_check_frozen(run: Run, model: T5, stage: Stage) -> None:
    """Trains a stage. Raises ValueError where a frozen parameter is not, bit by bit, what it was before."""
    before = frozen_hashes(model.train())
    fit(stage, run.config, run.log, run.resume)
    after = frozen_hashes(model)
    if moved := [name for name in before if after.get(name) != before[name]]:
        raise ValueError(
            f"{stage.name}: frozen tensors moved ({', '.join(moved[:5])}); the stage is not saved, and the checkpoint "
            "before it is whole. This is a mistake in the program, not in the data"
        )


def frozen_hashes(model: T5) -> dict[str, str]:
    """sha256 of every parameter that does not train."""
    frozen = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if not p.requires_grad}
    return {name: hashlib.sha256(p.numpy().tobytes()).hexdigest() for name, p in frozen.items()}


# --------------------------------------------------------------------------------------------------- the loop


def train(asked: Command, log: store.Log, last: int | None = None) -> dict:
    """Runs every stage whose result the run folder does not hold yet; returns what results.json holds.

    With `last` it ends after D_last, without results.
    """
    config, folder = asked.config, Path(asked.config.run)
    done = store.Stages(folder)
    with done.stage("data"):
        run = Run(config, folder, log)
    with done.stage("dense"):
        bi_encoder = prepare.dense_stage(run)
    with done.stage("rq") as record:
        books, codes = prepare.docid_stage(run, bi_encoder)
        if "rq" not in done:
            record["docids"] = asdict(prepare.docid_report(run, books, codes))
    made = Prepared(
        bi_encoder, books, codes, prepare.find_dreams(run, bi_encoder, books, "dreams" in asked.given)
    )

    if asked.extends:
        extend.take_in(run, made, asked)
    evaluations, state = [], None
    for t, corpus in enumerate(run.corpora):
        if t - 1 == last:
            return {}
        name, checkpoint = f"D{t}", folder / f"D{t}.pt"
        kept = checkpoint.exists() or done.records.get(name, {}).get("dropped")
        # One that is gone, but not the newest, is left out where it cannot be made anew or the next one was dropped
        lost = t and not (folder / f"D{t - 1}.pt").exists()
        needless = t + 1 < len(run.corpora) and (lost or done.records.get(f"D{t + 1}", {}).get("dropped"))
        if name in done and (kept or needless):
            if not asked.extends:
                log.line(f"D{t} is done already")
            state, path = None, folder / f"evaluation_D{t}.json"
            if not corpus.tested:
                continue
            if not path.exists():
                model = run.ready(run.after(t)[0])  # by every process: it waits for all
                if distributed.is_main_process():
                    store.write_json(path, asdict(scoring.evaluate_after(run, t, model, made.codes)))
                distributed.wait()
            evaluations.append(scoring.Evaluation(**store.read_json(path)))
            continue
        with done.stage(name, anew=True) as record:
            begin = time.monotonic()
            previous = state or (State(*run.after(t - 1)) if t else None)
            state, learnt = learn(run, t, made, previous)
            record |= learnt | {"experts": [len(layer) for layer in mixed_layers(state.model)]}
            record["training_seconds"] = time.monotonic() - begin
            if distributed.is_main_process():
                store.save_model(checkpoint, state.model, state.stats)
                if corpus.replaced:
                    log.line(extend.delete(folder, corpus.replaced))
                if corpus.tested:
                    evaluations.append(scoring.evaluate_after(run, t, state.model, made.codes))
                    store.write_json(folder / f"evaluation_D{t}.json", asdict(evaluations[-1]))
    if run.corpora[-1].added and distributed.is_main_process():
        extend.drop_checkpoints(run, done)

    peak, references = scoring.peak_memory(), {}
    with done.stage("baselines"):
        if config.baselines and evaluations and distributed.is_main_process():
            if run.corpora[-1].tested or not (folder / "results.json").exists():
                references = prepare.references(run, made)
            else:  # nothing is scored anew
                references = store.read_json(folder / "results.json")["baselines"]
    if not distributed.is_main_process():
        return {}
    results = scoring.results(config, done.records, evaluations, references, peak)
    store.write_json(folder / "results.json", results)
    return results


def execute(asked: Command, last: int | None = None, quiet: bool = False) -> dict:
    """Trains in the run folder that was asked for, up to D_last where given; returns what results.json holds."""
    optim.keep_freed_memory()
    config = asked.config
    config.device = distributed.start(config.device)
    if config.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32, as the paper
    folder, main_process = Path(config.run), distributed.is_main_process()
    with ExitStack() as held:
        if main_process:
            again = asked.resume or asked.extends
            lock = store.lock(folder) if again else store.new_folder(folder, asdict(config), asked.overwrite)
            held.enter_context(lock)
            if asked.extends:
                extend.require_finished(folder, asked.data)
        distributed.wait()
        log = store.Log(folder, quiet, writes=main_process)
        log.line(" ".join(f"{name}={value}" for name, value in asdict(config).items() if value != ""))
        results = train(asked, log, last)
        if results:
            for line in scoring.report(results):
                log.line(line)
            log.line(command.quoted("python", "search.py", folder, "a question"))
    distributed.stop()
    return results


def consolidate(folder: Path, config: Config, overwrite: bool = False, quiet: bool = False) -> dict:
    """Trains D_0 of a new run, in the folder `config.run`, on all documents that the run in `folder` holds, by the settings
    of `config`; see `execute`.
    """
    corpora = store.load_corpora(folder)
    with tempfile.TemporaryDirectory(prefix="consolidate.") as place:
        documents = extend.export(folder, Path(place))
        config = extend.anew(config, Path(place), documents, len(corpora[0].rows))
        return execute(Command(config, overwrite=overwrite), quiet=quiet)


def main(argv: list[str]) -> None:
    asked = parse(argv)
    if asked.consolidates:
        consolidate(asked.consolidates, asked.config, asked.overwrite)
    else:
        execute(asked)


if __name__ == "__main__":
    command.run(main, "train.py", "stopped; finished stages are kept, go on with --resume RUN")
