"""The continual loop: D_0, then for each new corpus D_t scan, grow, train, settle, evaluate.

Paper    Eq. 7 and appendix E: cross-entropy + alpha_1 * router losses + alpha_2 * KL to the previous model
In       Config, whose fields are the flags (config.py); what prepare.py makes of a corpus
Out      a run folder (store.py) and the results table
Next     search.py answers queries from the run folder, eval.py scores it again
Differs  plain AdamW in place of 8-bit; the docid mask is on for plain T5 on D_0 too; D_0 starts from the
         bi-encoder's weights; D_t's frozen encoder outputs and the previous model's hidden states are computed
         once, by the scan. The small preset, for a T5 without published weights, adds two things of its own: on D_0
         part of each batch asks for fragments of documents (`d0_fragments`), and on D_t a second KL term holds
         the model along docids of earlier corpora (`kl_old_coef`); neither sees an earlier corpus's text.
"""

import hashlib
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import baselines
import command
import data
import dense
import distributed
import eval as scoring
import mixlora
import ood
import optim
import prepare
import queries
import rq
import store
from config import Command, mix_config, parse
from losses import docid_cross_entropy, kl_to_previous, router_losses
from mixlora import mixed_layers
from optim import Stage, fit, parameter_groups
from prepare import Run
from scan import Scan, SourceCache, scan
from t5 import T5, segment_logits

FRAGMENT_SHARE = 0.4  # of D_0's batches, where there are fragments (ours)
CALIBRATION_QUERIES = 20_000  # pseudo-queries of D_0 on which its energies are measured (ours)
CONTROL_QUERIES = 2000  # fresh ones of D_{t-1} that the scan of D_t watches for false alarms (ours)
SLOW_FACTOR = 0.01  # of the docid table's gradient or learning rate on D_t (paper)


@dataclass
class State:
    """What one corpus hands to the next."""

    model: T5
    stats: list[ood.Stats]  # of each mixed layer


class Training:
    """What training on D_0 and on D_t share: a model, the statistics of its mixed layers, and what follows a step."""

    model: T5
    stats: list[ood.Stats]
    energies: ood.MovingEnergies

    def new_stats(self, run: Run) -> list[ood.Stats]:
        """Of layers that are about to see their first corpus."""
        return [
            ood.new_stats(run.config.ood_mode, len(x), len(self.model.rq)) for x in mixed_layers(self.model)
        ]

    def after_step(self) -> None:
        self.energies.step(distributed.add_up)
        for layer in mixed_layers(self.model):
            layer.normalise_rows()


# -------------------------------------------------------------------------------------------------------- D_0


class FirstCorpus(Training):
    """Sequence-to-sequence training on D_0: pseudo-query -> docid, from the bi-encoder's weights and the centroids.

    With `last` (joint retraining) on the documents of D_0..D_last.
    """

    def __init__(self, run: Run, bi_encoder: T5, books: Tensor, codes: Tensor, last: int = 0):
        """books (M, K, D), codes (N, M): what prepare.docid_stage returns."""
        self.run, self.config, self.last, self.codes = run, run.config, last, codes
        config, self.corpus, self.draw = run.config, run.corpora[0], run.draw
        if last:
            self.corpus = data.joined(run.corpora[: last + 1])
            if not run.listed:
                self.draw = self.sampler(self.corpus.titles, self.corpus.texts).draw
        torch.manual_seed(config.seed + 1 + last)
        table = baselines.table_so_far(run, last, books)
        self.model = T5(replace(bi_encoder.config, codebooks=len(table), centroids=table.shape[1]))
        self.model.load_state_dict(bi_encoder.state_dict() | {"rq": table})
        if config.mixture and config.d0_mixture:
            mixlora.add_mixture(self.model, mix_config(config))
            self.model.word.requires_grad_(False)
        run.ready(self.model)
        self.stats = self.new_stats(run)
        self.energies = ood.MovingEnergies(self.stats)
        self.rng = random.Random(f"{config.seed} D{last}")
        self.targets, self.n_fragments = codes.to(run.device), len(self.corpus.rows) * config.d0_fragments
        if self.n_fragments:
            self.add_fragments(bi_encoder, books)

    def sampler(self, titles: Sequence[str], texts: Sequence[str]) -> queries.PseudoQuerySampler:
        idf = queries.Idf(self.corpus.passages()) if self.last else self.run.idf
        return queries.PseudoQuerySampler(titles, texts, idf, self.run.excluded)

    def add_fragments(self, bi_encoder: T5, books: Tensor) -> None:
        """Spans of documents that are learnt as documents of their own; their docids follow those of the documents."""
        corpus, length = self.corpus, self.config.document_length
        titles, texts = queries.fragments(corpus.titles, corpus.texts, self.config.d0_fragments, self.rng)
        self.of_fragments = self.sampler(titles, texts)
        passages = list(queries.passages(titles, texts))
        embedded = dense.embed(bi_encoder, data.tokenize(self.run.tokenizer, passages, length), 256)
        docids = rq.encode(embedded, books, device=self.run.device)
        self.targets = torch.cat([self.targets, docids.to(self.run.device)])

    def next_batch(self) -> list[tuple[int, str]]:
        """(row of `targets`, pseudo-query)"""
        config, rng = self.config, self.rng
        batch = [(row, self.draw(row, rng)) for row in rng.choices(self.corpus.rows, k=config.d0_batch)]
        if self.n_fragments:
            rows = rng.choices(range(self.n_fragments), k=int(FRAGMENT_SHARE * config.d0_batch))
            batch[: len(rows)] = [(len(self.codes) + row, self.of_fragments.draw(row, rng)) for row in rows]
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
            self.loss, {"rng": self.rng, "energies": self.energies}, after_step=self.after_step,
        )  # fmt: skip
        fit_and_check_frozen(self.run, self.model, stage)
        if self.stats:
            scores = router_scores(self.run, self.model, self.codes, 0, CALIBRATION_QUERIES, "calibration")
            self.stats = ood.settle(self.stats, scores, config.epsilon, first_mixture=True)
        return State(self.model.eval(), self.stats)


# -------------------------------------------------------------------------------------------------------- D_t


class LaterCorpus(Training):
    """Training on D_t, t >= 1, from the model before it and D_t's pseudo-queries alone."""

    def __init__(self, run: Run, t: int, books: Tensor, codes: Tensor, previous: State):
        """books (M, K, D), codes (N, M): what prepare.docid_stage returns."""
        self.run, self.config, self.t, self.books, self.codes = run, run.config, t, books, codes
        self.model, self.stats = previous.model, previous.stats
        torch.manual_seed(self.config.seed + 1 + t)
        self.generator = torch.Generator().manual_seed(self.config.seed + t)  # of earlier docids and batches
        run.ready(self.model)
        pairs = run.training_queries(t)
        self.ids, self.docids = run.tokens(pairs), codes[[row for row, _ in pairs]]  # (Q, S), (Q, M)
        self.table_before = self.model.rq.detach().clone()
        self.first_mixture = self.config.mixture and not mixed_layers(self.model)
        self.cache, self.before, self.before_old, self.memory = None, None, None, []
        self.record = {"decisions": []}

    def scan(self) -> None:
        """D_t by the model before it: encoder outputs, router scores, and the KL's teacher states."""
        config = self.config
        if config.mixture or config.prompts:  # the encoder is frozen
            self.cache = SourceCache(self.model, self.ids, folder=self.run.folder / "cache")
        if config.mixture:
            self.before = scan(self.model, self.cache, self.docids, self.stats)
        if config.kl_old_coef:  # an old docid for each query: what the model says where new documents are not
            n_old = self.run.corpora[self.t].first_row
            self.old_docids = self.codes[torch.randint(n_old, (len(self.ids),), generator=self.generator)]
            self.before_old = scan(self.model, self.cache, self.old_docids, [])

    def grow(self) -> None:
        """Adds what trains on D_t beside the docid table, and freezes the rest."""
        config, model = self.config, self.model
        if self.first_mixture:
            mixlora.add_mixture(model, mix_config(config))
            self.stats = self.new_stats(self.run)
        elif config.mixture:
            self.record["decisions"] = self.expand()
        else:
            baselines.add_parts(self.run, model)
        if config.mixture or config.prompts or config.adapters:
            freeze_old(model)
        baselines.extend_table(model, baselines.table_so_far(self.run, self.t, self.books))
        self.run.ready(model)
        if config.ewc:
            self.memory = baselines.ewc_memory(self.run, self.t, self.codes)

    def expand(self) -> list[dict]:
        """Decides for every mixed layer whether D_t makes it grow, and adds the experts. Returns the numbers.

        Beside them stands what the detector says where nothing is new: fresh pseudo-queries of D_{t-1}, which no
        training saw (where they come from a file, those of the file).
        """
        config, t, records = self.config, self.t, []
        control = router_scores(self.run, self.model, self.codes, t - 1, CONTROL_QUERIES, "control")
        for number, (layer, stat) in enumerate(zip(mixed_layers(self.model), self.stats)):
            scores = self.before.scores[number]
            decision = ood.decide(scores, stat, config.delta, config.epsilon)
            false_alarms = ood.decide(control[number], stat, config.delta, config.epsilon)
            expand = config.expand == "always" or (config.expand == "ood" and decision.expand)
            expand = distributed.agree(expand)  # processes may differ in a last bit, not in their experts
            histogram = ood.histogram(ood.energy(scores), ood.energy(control[number]), stat)
            experts = len(layer)
            if expand:
                layer.add_expert(self.before.direction[number] if config.router_row == "ood_mean" else None)
                ood.grow(stat)
            elif config.expand != "fixed":
                layer.freeze_all()
            self.run.log.line(
                f"D{t} layer {number}: {decision.ood_percent:.1f}% of queries OOD (control "
                f"{false_alarms.ood_percent:.1f}%, delta {decision.delta:g}%) -> experts {experts} to {len(layer)}"
            )
            records.append(asdict(decision) | {
                "expanded": expand, "control_percent": false_alarms.ood_percent, "histogram": histogram,
                "control_expand": false_alarms.expand, "experts": [experts, len(layer)],
            })  # fmt: skip
        return records

    def loss(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of D_t's queries in `rows` (B,)."""
        config, model, device = self.config, self.model, self.run.device
        docids, past = self.docids[rows].to(device), None
        if self.cache:
            source, padding = self.cache.get(rows, device)
            past = model.past(source, padding)
            cross = model.cross_keys_values(source)  # frozen, as the source is
        else:
            cross, padding = model.encode(self.ids[rows].to(device))
        targets = docids
        if config.kl_old_coef:  # each query with its own docid and an old one, in one pass
            targets = torch.stack([docids, self.old_docids[rows].to(device)], dim=1).flatten(0, 1)  # (2B, M)
        hidden, routes = model.docid_hidden(cross, padding, targets, past)
        logits = segment_logits(hidden, model.rq)  # shared by all terms
        if config.kl_old_coef:
            logits_old, hidden, logits = logits[1::2], hidden[::2], logits[::2]
            routes = [route.rows(slice(0, None, 2)) for route in routes]
        terms = {"ce": docid_cross_entropy(model, hidden, docids, config.mask, logits)}
        if config.kl_coef:
            terms["kl"] = config.kl_coef * self.kl(logits, self.before, rows)
        if config.kl_old_coef:
            terms["kl_old"] = config.kl_old_coef * self.kl(logits_old, self.before_old, rows)
        if self.memory:
            terms["ewc"] = config.ewc * baselines.ewc_penalty(model, self.memory)
        terms |= router_losses(routes, config)
        self.energies.see(routes)
        return sum(terms.values()), terms

    def kl(self, logits: Tensor, teacher: Scan, rows: Tensor) -> Tensor:
        """KL of the previous model's codes to ours: logits (B, M, K), the teacher's states of `rows` (B,). Eq. 6."""
        hidden = teacher.hidden[rows].to(self.run.device).float()
        logits_before = segment_logits(hidden, self.table_before)
        return kl_to_previous(logits[..., : logits_before.shape[-1]], logits_before, self.config.kl_reduction)

    def before_clip(self) -> None:
        if self.config.slow == "grad":
            self.model.rq.grad *= SLOW_FACTOR

    def train(self) -> None:
        config, model = self.config, self.model
        self.energies = ood.MovingEnergies(self.stats, only_new=True)
        order = dense.Batches(len(self.ids), config.batch, self.generator)
        table_lr = config.lr * (SLOW_FACTOR if config.slow == "lr" else 1.0)
        groups = parameter_groups([("rq", model.rq)], table_lr)
        groups += parameter_groups([(n, p) for n, p in model.named_parameters() if n != "rq"], config.lr)
        self.record["trainable_parameters"] = sum(p.numel() for group in groups for p in group["params"])
        stage = Stage(
            f"D{self.t}", groups, config.steps or math.ceil(config.epochs * len(self.ids) / config.batch), config.warmup,
            order.__next__, self.loss, {"order": order, "energies": self.energies}, self.before_clip, self.after_step,
            climb=partial(baselines.climb, rho=config.sam_rho) if config.sam_rho else None,
        )  # fmt: skip
        fit_and_check_frozen(self.run, model, stage)

    def settle(self) -> None:
        """Statistics of the energies, now that D_t is known, and which experts its tokens use."""
        if not mixed_layers(self.model):
            return
        scores = scan(self.model, self.cache, self.docids, [], hidden=False).scores
        self.stats = ood.settle(self.stats, scores, self.config.epsilon, self.first_mixture)
        active = mixed_layers(self.model)[0].config.active
        self.record["routing"] = [mixlora.top_gates(s, active).mean((0, 1)).tolist() for s in scores]
        self.record["first_choice"] = [mixlora.first_choice_share(s).tolist() for s in scores]


def learn(
    run: Run, t: int, bi_encoder: T5, books: Tensor, codes: Tensor, previous: State | None
) -> tuple[State, dict]:
    """The model after D_t and a record of the stage for results.json.

    D_0, and by joint retraining every corpus, begins anew; IncDSI trains nothing; all others go on.
    """
    if t == 0 or run.config.joint:
        state = FirstCorpus(run, bi_encoder, books, codes, last=t).train()
        n_trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
        return state, {"decisions": [], "trainable_parameters": n_trained} if t else {}
    if run.config.insert:
        added = baselines.insert(run, t, books[0], previous.model)
        baselines.extend_table(previous.model, added[None])
        return previous, {"decisions": [], "trainable_parameters": added[run.corpora[t].first_row :].numel()}
    stage = LaterCorpus(run, t, books, codes, previous)
    stage.scan()
    stage.grow()
    stage.train()
    stage.settle()
    return State(stage.model.eval(), stage.stats), stage.record


# -------------------------------------------------------------------------------------- what both of them need


def router_scores(run: Run, model: T5, codes: Tensor, t: int, count: int, purpose: str) -> list[Tensor]:
    """Router scores (Q, M, E) of each mixed layer for fresh pseudo-queries of D_t."""
    pairs = run.sample(t, count, purpose)
    cache = SourceCache(model, run.tokens(pairs))
    return scan(model, cache, codes[[row for row, _ in pairs]], [], hidden=False).scores


def freeze_old(model: T5) -> None:
    """Leaves the docid table and what was added (the newest experts and router rows, or a baseline's adapters or
    prompts) to train, and nothing else.
    """
    model.requires_grad_(False)
    model.rq.requires_grad_(True)
    baselines.unfreeze_parts(model)
    for layer in mixed_layers(model):
        grew = len(layer.new) > 0  # an empty tensor that trains would cost the old experts' gradients
        layer.new.requires_grad_(grew)
        layer.router_new.requires_grad_(grew)


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
        bi_encoder, embeddings = prepare.dense_stage(run)
    with done.stage("rq") as record:
        books, codes = prepare.docid_stage(run, bi_encoder, embeddings)
        if "rq" not in done:
            record["docids"] = asdict(rq.report(embeddings[0], books, codes[: len(embeddings[0])]))

    evaluations, state = [], None
    for t in range(len(run.corpora)):
        if t - 1 == last:
            return {}
        name, checkpoint = f"D{t}", folder / f"D{t}.pt"
        if name in done and checkpoint.exists():
            log.line(f"D{t} is done already")
            evaluations.append(scoring.Evaluation(**store.read_json(folder / f"evaluation_D{t}.json")))
            state = None
            continue
        done.records.pop(name, None)  # its checkpoint is gone
        with done.stage(name) as record:
            begin = time.monotonic()
            previous = state or (State(*run.after(t - 1)) if t else None)
            state, learnt = learn(run, t, bi_encoder, books, codes, previous)
            record |= learnt | {"experts": [len(layer) for layer in mixed_layers(state.model)]}
            record["training_seconds"] = time.monotonic() - begin
            if distributed.is_main_process():
                store.save_model(checkpoint, state.model, state.stats)
                evaluations.append(scoring.evaluate_after(run, t, state.model, codes))
                store.write_json(folder / f"evaluation_D{t}.json", asdict(evaluations[-1]))

    peak, references = scoring.peak_memory(), {}
    with done.stage("baselines"):
        if config.baselines and distributed.is_main_process():
            references = prepare.references(run, bi_encoder, embeddings)
    if not distributed.is_main_process():
        return {}
    metrics = scoring.summarise(evaluations, config.seed)
    results = scoring.results(config, done.records, metrics, references, peak)
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
    lock = None
    if main_process:
        lock = (
            store.lock(folder) if asked.resume else store.new_folder(folder, asdict(config), asked.overwrite)
        )
    distributed.wait()
    log = store.Log(folder, quiet, writes=main_process)
    log.line(" ".join(f"{name}={value}" for name, value in asdict(config).items() if value != ""))
    results = train(asked, log, last)
    if results:
        for line in scoring.report(results):
            log.line(line)
        log.line(command.quoted("python", "search.py", folder, "a question"))
    if lock:
        lock.close()
    distributed.stop()
    return results


def main(argv: list[str]) -> None:
    execute(parse(argv))


if __name__ == "__main__":
    command.run(main, "train.py", "stopped; finished stages are kept, go on with --resume RUN")
