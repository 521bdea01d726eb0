"""Dreams: pseudo-queries of earlier documents, made from their docids alone.

Paper    none, ours: pseudo-rehearsal (Robins, 1995) from what the model keeps of a document. A docid is geometry,
         e_d ~ sum_m C^m[k_m] (Eq. 9), in the space of the frozen bi-encoder, and the words whose embeddings have a
         large inner product with that vector are words that a query for the document would hold
In       the bi-encoder, the tokenizer's pieces, codebooks (M, K, D), docids (n, M)
Out      token ids (n, S) of a bag of words for each docid
Next     train.py holds the model to its answers to dreams of old docids, and lets it learn dreams of new ones;
         ood.py measures energies on the scale of dreams
Differs  no text or query of an earlier corpus is kept or read: docids, codebooks and bi-encoder are
"""

import torch
from torch import Tensor

import rq
from data import EOS, PAD
from queries import MARKS, is_unspaced
from t5 import T5

LEAST = 10  # words of a tokenizer; fewer say too little of a document (ours)
TOP = 40  # words of a docid at most, by inner product
FEWEST, MOST = 2, 4  # of these in a dream
NOISE = 4  # words at most from the tokenizer's prior; without them the model keeps bags of words and forgets queries
STEEP = 3.0  # the word at place TOP is e^-3 times as likely as the first
CHUNK = 1024  # words embedded, and docids whose inner products with all words are held, at a time


class Dreams:
    """Draws bags of words that queries for a document with this docid would hold: 2 to `most` of these, and up to `noise`
    from the tokenizer's prior.
    """

    def __init__(
        self, pieces: Tensor, embeddings: Tensor, prior: Tensor, books: Tensor, most=MOST, noise=NOISE
    ):
        """pieces (W,) token ids of words, their embeddings (W, D) as queries and log-probabilities (W,); books (M, K, D)."""
        self.pieces, self.embeddings, self.prior, self.books = pieces, embeddings, prior.double().exp(), books
        self.most, self.noise = most, noise

    def words(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The TOP words, or all, of docids (n, M), nearest first: numbers among the pieces, and probabilities, (n, TOP)."""
        best = (rq.decode(self.books, codes) @ self.embeddings.T).topk(min(TOP, len(self.pieces)), dim=1)
        first, last = best.values[:, :1], best.values[:, -1:]
        p = torch.exp(STEEP * (best.values - first) / (first - last).clamp(min=1e-9))
        return best.indices, p / p.sum(1, keepdim=True)

    def draw(self, codes: Tensor, generator: torch.Generator) -> Tensor:
        """A dream of each docid (n, M): token ids (n, most + max(1, noise) + 1), shuffled, with a trailing </s>, padded
        with 0.
        """
        most, noise, parts = self.most, self.noise, []
        for part in codes.split(CHUNK):
            words, p = self.words(part)
            own = words.gather(1, torch.multinomial(p, most, generator=generator))
            others = torch.multinomial(self.prior, len(part) * max(1, noise), True, generator=generator)
            others = others.view(len(part), -1)
            n_own = torch.randint(min(FEWEST, most), most + 1, (len(part), 1), generator=generator)
            n_noise = torch.randint(noise + 1, (len(part), 1), generator=generator)
            kept = torch.cat([torch.arange(most) < n_own, torch.arange(others.shape[1]) < n_noise], dim=1)
            order = torch.rand(kept.shape, generator=generator).masked_fill(~kept, 2.0).argsort(1)
            ids = self.pieces[torch.cat([own, others], dim=1)].masked_fill(~kept, PAD).gather(1, order)
            ids = torch.cat([ids, ids.new_full((len(ids), 1), PAD)], dim=1)
            parts.append(ids.scatter(1, n_own + n_noise, EOS))
        return torch.cat(parts)


@torch.no_grad()
def dreams(bi_encoder: T5, tokenizer, books: Tensor, most: int = MOST, noise: int = NOISE) -> Dreams | None:
    """Dreams by this bi-encoder, or None where the tokenizer has fewer words than LEAST, or than a dream takes."""
    pieces = word_pieces(tokenizer)
    if len(pieces) < max(LEAST, most):
        return None
    asked = torch.stack([pieces, torch.full_like(pieces, EOS)], dim=1)
    prior = torch.tensor([tokenizer.get_score(piece) for piece in pieces.tolist()])
    device = bi_encoder.eval().word.device
    embedded = [bi_encoder.embed(part.to(device)).float().cpu() for part in asked.split(CHUNK)]
    return Dreams(pieces, torch.cat(embedded), prior, books, most, noise)


def word_pieces(tokenizer) -> Tensor:
    """Pieces (W,) of letters and their marks: beginnings of words of three characters or more; of unspaced scripts, all."""
    kept = []
    for piece in range(tokenizer.vocab_size()):
        name = tokenizer.id_to_piece(piece)
        text = name.lstrip("▁")  # the mark of a word's beginning
        letters = "".join(c for c in text if c not in MARKS)
        if letters.isalpha() and (is_unspaced(letters[0]) or (text != name and len(text) > 2)):
            kept.append(piece)
    return torch.tensor(kept, dtype=torch.long)


def choose(ends: list[int], count: int, generator: torch.Generator) -> Tensor:
    """Document rows (count,): half of them balanced by corpus, half by document. D_i's rows end before `ends[i]`."""
    rows = torch.randint(ends[-1], (count,), generator=generator)
    bounds = torch.tensor([0, *ends])
    corpus = torch.randint(len(ends), (count // 2,), generator=generator)
    size = bounds[corpus + 1] - bounds[corpus]
    within = (torch.rand(count // 2, generator=generator, dtype=torch.float64) * size).long()
    rows[: count // 2] = bounds[corpus] + within
    return rows
