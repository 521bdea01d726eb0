"""Constrained decoding: a query becomes the docids that the model finds most likely, and so documents.

Paper    section 2 and E.3: beam search over the K codes of each position, held to the prefix trie of indexed
         docids
In       token ids of queries (B, S), the model, the trie
Out      documents with scores sum_m log p_m; `python search.py RUN "query"` prints them with titles
Next     eval.py scores the rankings
Differs  keys and values are cached and the beams of a query share its source's; the released code re-runs the
         decoder on the whole prefix with all 48,484 logits. As there, probabilities are not renormalised over
         the trie.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import command
from data import tokenize
from mixlora import fold
from rq import Trie
from store import LoadedRun
from t5 import T5, segment_logits

BATCH = 128  # queries decoded together (paper: 128 to 512)

Ranking = list[tuple[int, float]]  # (row of the document in the stream, score), best first


@torch.inference_mode()
def beam_search(model: T5, trie: Trie, ids: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """The `beam` best docids of each query, as leaves of the trie.

    Args:
        ids: (B, S) token ids of the queries, padded with 0.

    Returns:
        leaves (B, L, 2) int64, runs of the trie's rows, and scores (B, L), score descending; L = min(beam, documents),
        and where there are fewer docids, empty runs and -inf.
    """
    batch, device, centroids = len(ids), ids.device, model.config.centroids
    beam = min(beam, len(trie.documents))
    assert trie.rows.shape[1] == model.config.codebooks, "trie and model are of different docids"
    source, padding = model.encode(ids)
    cross = model.cross_keys_values(source)
    x, past = model.start(batch), model.past(source, padding)  # (R, 1, D); R = B * live beams
    bias = model.causal_bias(0, model.config.codebooks)
    nodes, scores = trie.root(batch), torch.zeros(batch, 1, device=device)
    for m in range(model.config.codebooks):
        hidden, past, _ = model.decode(x, cross, padding, past, bias)
        log_p = F.log_softmax(segment_logits(hidden, model.rq[m : m + 1])[:, 0].float(), dim=-1)  # (R, K)
        log_p += scores.flatten()[:, None]
        node, below, runs = trie.children(m, nodes)  # (C,), (C,), (C, 2)
        held = node * centroids + below  # where in log_p, ascending
        forbidden = torch.ones(log_p.numel(), dtype=torch.bool).index_fill_(0, held, False)
        log_p.masked_fill_(forbidden.view_as(log_p).to(device), -torch.inf)
        total = log_p.reshape(batch, -1)  # (B, live beams * K)
        scores, best = total.topk(min(beam, total.shape[1]), dim=1)
        best = (best + torch.arange(batch, device=device)[:, None] * total.shape[1]).flatten()  # in log_p
        parent, code = best // centroids, best % centroids
        at = torch.searchsorted(held, best.cpu()).clamp(max=len(held) - 1)
        nodes = runs[at] * (held[at] == best.cpu())[:, None]  # empty where the score is -inf
        if m + 1 < model.config.codebooks:
            past = [(k.index_select(0, parent), v.index_select(0, parent)) for k, v in past]
            x = model.rq[m][code][:, None]
    leaves, missing = nodes.reshape(batch, -1, 2), beam - scores.shape[1]
    return F.pad(leaves, (0, 0, 0, missing)), F.pad(scores, (0, missing), value=-torch.inf)


@torch.no_grad()
def exact_scores(model: T5, ids: Tensor, codes: Tensor, chunk: int = 4096) -> Tensor:
    """Score of every docid for every query by teacher forcing: ids (B, S), codes (N, M) -> (B, N). For small corpora."""
    scores = []
    for query in ids:
        source, padding = model.encode(query[None, : max(1, int((query != 0).sum()))])
        cross, past = model.cross_keys_values(source), model.past(source, padding)
        parts = []
        for part in codes.split(chunk):
            hidden, _ = model.docid_hidden(cross, padding, part, past)
            log_p = F.log_softmax(segment_logits(hidden, model.rq).float(), dim=-1)
            parts.append(log_p.gather(2, part[..., None])[..., 0].sum(1))
        scores.append(torch.cat(parts))
    return torch.stack(scores)


def documents(trie: Trie, leaves: Tensor, scores: Tensor, doc_ids: list[str], k: int) -> list[Ranking]:
    """Docids -> documents: all that share a docid have its score; ranked by (score descending, document id ascending)."""
    rankings = []
    for row, row_scores in zip(leaves.tolist(), scores.tolist()):
        scored = [(doc, s) for leaf, s in zip(row, row_scores) for doc in trie.documents_at(leaf)]
        least = min((s for _, s in scored[:k]), default=0.0)  # leaves come best first
        best = [pair for pair in scored if pair[1] >= least]
        rankings.append(sorted(best, key=lambda pair: (-pair[1], doc_ids[pair[0]]))[:k])
    return rankings


def retrieve(
    model: T5, trie: Trie, tokenizer, queries: list[str], doc_ids, k=10, beam=10, max_length=64
) -> list[Ranking]:
    """The k best documents of each query text, in evaluation mode; queries of like length share a batch."""
    if not queries:
        return []
    model.eval()
    ids = tokenize(tokenizer, queries, max_length)
    lengths = (ids != 0).sum(1)
    device = model.word.device
    rankings: list[Ranking] = [[]] * len(queries)
    for rows in lengths.argsort(stable=True).split(BATCH):
        leaves, scores = beam_search(model, trie, ids[rows, : lengths[rows].max()].to(device), beam)
        for row, ranking in zip(rows.tolist(), documents(trie, leaves, scores.cpu(), doc_ids, k)):
            rankings[row] = ranking
    return rankings


def main(argv: list[str]) -> None:
    parser = command.Parser(description="Retrieve documents from a finished run.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("query", nargs="?", help="without it, an interactive prompt")
    parser.add_argument("-k", type=int, default=10, help="documents to show (default 10)")
    parser.add_argument("--beam", type=int, help="beams of each position, at least -k (default: the run's)")
    parser.add_argument("--device", default=command.default_device(), help="default: cuda where present")
    args = parser.parse_args(argv)
    run = LoadedRun(args.run, command.check_device(args.device))
    chosen = run.config["beam"] if args.beam is None else args.beam
    if args.k < 1 or chosen < 1:
        raise ValueError(f"-k {args.k} and --beam {chosen}: wanted positive numbers")
    model, trie = run.at(run.finished[-1])
    fold(model)

    def answer(query: str) -> None:
        if not query.strip():
            raise ValueError("the query is empty; type some words")
        length, beam = run.config["query_length"], max(chosen, args.k)
        ranking = retrieve(model, trie, run.tokenizer, [query], run.ids, args.k, beam, max_length=length)[0]
        for place, (row, score) in enumerate(ranking, 1):
            docid = "-".join(map(str, run.docids[row].tolist()))
            print(f"{place:3}  {score:8.3f}  {docid:14}  {run.ids[row]}  {run.headline(row)}")

    if args.query is not None:
        answer(args.query)
        return
    print(f"{len(trie.documents)} documents; an empty line ends")
    try:
        while query := input("query> ").strip():
            answer(query)
    except EOFError:
        print()


if __name__ == "__main__":
    command.run(main, "search.py")
