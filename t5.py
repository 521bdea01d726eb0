"""The T5 encoder-decoder, written out, with a word table and a docid table in place of one vocabulary.

Paper    section 2 (generative retrieval) and appendix C; the network is T5 v1.0 (Raffel et al., 2020), or
         v1.1 with its gated feed-forward and untied head (Shazeer, 2020)
In       token ids of queries or documents (B, S); docid prefixes (B, T)
Out      decoder hidden states (B, T, D); one row of K logits per docid position
Next     mixlora.py replaces the feed-forward of the first decoder blocks; search.py decodes docids
Differs  the released code extends one tied table to V + M * K rows and masks 46,436 of its 48,484 logits.
         Here the words (V, D) and the codes (M, K, D) are two tensors and only the K logits of a position are
         computed: the same loss, and the frozen encoder needs no gradient. The word table ends after the
         32,100 rows that mean something (weights.our_rows); with them, M = 8 and K = 2048 T5-base has the
         paper's 235.4M parameters. Dropout, padding and cross-attention have forms of their own that do less
         work; tests hold each against the plain one.

Letters, for all files:
B batch, S source length, T target length, D model width, H heads, Dh head width, F feed-forward width, V
vocabulary, E experts, A active experts, r LoRA rank, M codebooks, K centroids, N documents, L mixed layers.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class T5Config:
    """Shape of the network; the defaults are T5-base's. Raises ValueError that names a field of no sense."""

    vocab: int = 32_100  # rows of the word table, V: 32,000 pieces and 100 sentinels
    width: int = 768  # D
    head_width: int = 64  # Dh
    heads: int = 12  # H
    feed_forward: int = 3072  # F
    encoder_blocks: int = 12
    decoder_blocks: int = 12
    buckets: int = 32  # relative position buckets
    max_distance: int = 128  # beyond it all positions share the last bucket
    dropout: float = 0.1
    codebooks: int = 8  # M
    centroids: int = 2048  # K

    gated: bool = False  # v1.1: a gated GELU in place of ReLU
    tied: bool = True  # v1.0: the word logits reuse the word table; v1.1 has a head of its own

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "dropout":
                good, wanted = isinstance(value, (int, float)) and 0 <= value < 1, "0 <= p < 1"
            elif isinstance(item.default, bool):
                good, wanted = isinstance(value, bool), "True or False"
            else:
                good, wanted = type(value) is int and value > 0, "a positive integer"
            if not good:
                raise ValueError(f"T5 shape: {item.name}={value}, wanted {wanted}")


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout: zeroes a share p of x and scales the rest by 1 / (1 - p), where `training`.

    On a CPU most of F.dropout's time goes into one random number for each entry and half of a layer's memory into its
    mask. Here 64 random bits serve four entries (p is met to 2^-17), and the mask takes a byte an entry.
    """
    if not (training and p):
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = min(round(p * 2**16), 2**16 - 1)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = (bits.view(torch.int16)[: x.numel()] >= dropped - 2**15).view(x.shape)
    return torch.where(kept, x, 0.0).mul_(2**16 / (2**16 - dropped))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32: no mean, no bias, epsilon 1e-6."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)


def relative_bucket(offset: Tensor, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each offset = key position - query position: exact when near, logarithmic when far.

    The encoder splits the buckets between the two signs; the decoder only looks back.
    """
    bucket = torch.zeros_like(offset)
    if bidirectional:
        buckets //= 2
        bucket += (offset > 0) * buckets
        distance = offset.abs()
    else:
        distance = (-offset).clamp(min=0)
    exact = buckets // 2
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = share * (buckets - exact)
    return bucket + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=buckets - 1))


class RelativeBias(nn.Module):
    """One learned bias per bucket and head, added to every self-attention score of a stack."""

    def __init__(self, config: T5Config, bidirectional: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(config.buckets, config.heads) * config.width**-0.5)
        self.bidirectional, self.max_distance = bidirectional, config.max_distance

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """(Tq,), (Tk,) -> (1, H, Tq, Tk)."""
        offset = key_positions[None, :] - query_positions[:, None]
        bucket = relative_bucket(offset, self.bidirectional, len(self.weight), self.max_distance)
        return F.embedding(bucket, self.weight).permute(2, 0, 1)[None]


class Packing:
    """Leaves the padding of a batch out: (B, S, ..) to (n, ..) and back, n being the number of its tokens."""

    def __init__(self, real: Tensor):
        """real (B, S) bool: no padding here."""
        self.shape = real.shape
        self.at = None if real.all() else real.flatten().nonzero()[:, 0]

    def pack(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return x if self.at is None else x.index_select(0, self.at)

    def pad(self, x: Tensor) -> Tensor:
        if self.at is not None:
            room = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
            x = room.index_copy(0, self.at, x)
        return x.unflatten(0, self.shape)


class Attention(nn.Module):
    """Multi-head attention of T5: no linear biases, and no division of the scores by sqrt(Dh)."""

    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.heads * config.head_width
        self.heads, self.dropout = config.heads, config.dropout
        self.q = nn.Parameter(torch.randn(inner, config.width) * (config.width * config.head_width) ** -0.5)
        self.k = nn.Parameter(torch.randn(inner, config.width) * config.width**-0.5)
        self.v = nn.Parameter(torch.randn(inner, config.width) * config.width**-0.5)
        self.o = nn.Parameter(torch.randn(config.width, inner) * inner**-0.5)
        self.after = nn.Identity()  # where baselines.py puts an adapter

    def split(self, x: Tensor) -> Tensor:
        """(B, T, H * Dh) -> (B, H, T, Dh)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> keys and values, each (B, H, T, Dh)."""
        return self.split(x @ self.k.T), self.split(x @ self.v.T)

    def weights(self, scores: Tensor, bias: Tensor) -> Tensor:
        """Scores (B, H, Tq, Tk), which it may overwrite, and a bias that broadcasts to them -> weights."""
        exact = scores.float()
        exact += bias
        weights = F.softmax(exact, dim=-1).to(scores.dtype)
        return dropout(weights, self.dropout, self.training)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """softmax(q K^T + bias) V by heads: q (B, H, Tq, Dh) -> (B, Tq, H * Dh)."""
        if torch.is_grad_enabled() or self.training:
            y = self.weights(q @ keys.transpose(-1, -2), bias) @ values
        else:  # the same in one call that never holds all scores
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias.to(q.dtype), scale=1.0)
        return y.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """x (B, Tq, D) attends to keys and values (B, H, Tk, Dh); bias broadcasts to (B, H, Tq, Tk)."""
        return self.after(self.attend(self.split(x @ self.q.T), keys, values, bias) @ self.o.T)

    def among(self, x: Tensor, packing: Packing, bias: Tensor) -> Tensor:
        """Self-attention of packed tokens (n, D): all products but its own two leave the padding out."""
        q, k, v = (self.split(packing.pad(x @ w.T)) for w in (self.q, self.k, self.v))
        return self.after(packing.pack(self.attend(q, k, v, bias)) @ self.o.T)

    def to_source(self, x: Tensor, source: Tensor, bias: Tensor) -> Tensor:
        """forward(x, *keys_values(source), bias) without the keys and values: x (B, Tq, D), source (B, Tk, D).

        Head by head, q_t . (W_k s) = (W_k^T q_t) . s, and sum_s w_s W_v s = W_v (sum_s w_s s). With few x and a longer
        source, as a docid's codes and a query, that is less to compute: B Tq rows instead of B Tk pass W_k and W_v.
        """
        batch, length, _ = x.shape
        q = (x @ self.q.T).flatten(0, 1).unflatten(1, (self.heads, -1)).transpose(0, 1)  # (H, B * Tq, Dh)
        q = q @ self.k.unflatten(0, (self.heads, -1))  # (H, B * Tq, D)
        q = q.unflatten(1, (batch, length)).transpose(0, 1).flatten(1, 2)  # (B, H * Tq, D)
        scores = (q @ source.transpose(1, 2)).unflatten(1, (self.heads, length))
        mixed = self.weights(scores, bias).flatten(1, 2) @ source  # (B, H * Tq, D)
        mixed = mixed.unflatten(1, (self.heads, length)).transpose(0, 1).flatten(1, 2)  # (H, B * Tq, D)
        y = mixed @ self.v.unflatten(0, (self.heads, -1)).transpose(1, 2)  # (H, B * Tq, Dh)
        return self.after(y.transpose(0, 1).flatten(1) @ self.o.T).unflatten(0, (batch, length))


class FeedForward(nn.Module):
    """W_out u with u = Drop(ReLU(W_in x)), or, where gated, u = Drop(GELU(W_in x) * W_linear x).

    Returns None beside it, where a mixed layer returns how it routed.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.dropout = config.dropout
        self.w_in = nn.Parameter(torch.randn(config.feed_forward, config.width) * config.width**-0.5)
        self.w_out = nn.Parameter(torch.randn(config.width, config.feed_forward) * config.feed_forward**-0.5)
        self.w_linear = None
        if config.gated:
            self.w_linear = nn.Parameter(torch.randn_like(self.w_in) * config.width**-0.5)
        self.after = nn.Identity()  # where baselines.py puts an adapter

    def activate(self, inner: Tensor, x: Tensor) -> Tensor:
        """u from W_in x (B, T, F), which it may overwrite, and x itself (B, T, D)."""
        if self.w_linear is None:
            u = F.relu_(inner)
        else:
            u = F.gelu(inner, approximate="tanh") * (x @ self.w_linear.T)
        return dropout(u, self.dropout, self.training)

    def hidden(self, x: Tensor) -> Tensor:
        """u of x: (B, T, D) -> (B, T, F)."""
        return self.activate(x @ self.w_in.T, x)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.after(self.hidden(x) @ self.w_out.T), None


class EncoderBlock(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.dropout = config.dropout
        self.self_norm, self.self_attention = RMSNorm(config.width), Attention(config)
        self.ff_norm, self.ff = RMSNorm(config.width), FeedForward(config)

    def forward(self, x: Tensor, packing: Packing, bias: Tensor) -> Tensor:
        """x (n, D), packed; bias (B, H, S, S) of positions and padding."""
        y = self.self_attention.among(self.self_norm(x), packing, bias)
        x = x + dropout(y, self.dropout, self.training)
        return x + dropout(self.ff(self.ff_norm(x))[0], self.dropout, self.training)


class DecoderBlock(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.dropout = config.dropout
        self.self_norm, self.self_attention = RMSNorm(config.width), Attention(config)
        self.cross_norm, self.cross_attention = RMSNorm(config.width), Attention(config)
        self.ff_norm, self.ff = RMSNorm(config.width), FeedForward(config)

    def forward(self, x: Tensor, bias: Tensor, past, cross, cross_bias: Tensor):
        """One block over the newest T positions.

        Args:
            x: (B, T, D).
            bias: (1, H, T, T' + T) of the positions.
            past: keys and values (B, H, T', Dh) of the T' positions before these, or None.
            cross: the source (B, S, D), or its keys and values; when R beams share a query, of B / R rows.
            cross_bias: (B, 1, 1, S) of the padding, of as many rows as cross.

        Returns:
            x; the self-attention's keys and values, the past's included; what the feed-forward tells of its routing.
        """
        x, keys_values = self.attend(x, bias, past, cross, cross_bias)
        y, route = self.ff(self.ff_norm(x))
        return x + dropout(y, self.dropout, self.training), keys_values, route

    def attend(self, x: Tensor, bias: Tensor, past, cross, cross_bias: Tensor):
        """The block up to its feed-forward: x with both attentions added, and keys and values as `forward`."""
        y = self.self_norm(x)
        keys, values = self.self_attention.keys_values(y)
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        x = x + dropout(self.self_attention(y, keys, values, bias), self.dropout, self.training)
        # Beams of one query are folded into the query dimension: (B * R, 1, D) -> (B, R, D), no key is copied.
        y = self.cross_norm(x)
        if isinstance(cross, Tensor):
            y = self.cross_attention.to_source(y.reshape(len(cross), -1, x.shape[-1]), cross, cross_bias)
        else:
            y = self.cross_attention(y.reshape(len(cross[0]), -1, x.shape[-1]), *cross, cross_bias)
        return x + dropout(y.reshape(x.shape), self.dropout, self.training), (keys, values)


class T5(nn.Module):
    """Encoder, decoder, word table (V, D), and docid table rq (M, K, D), tied between decoder input and output. `head`
    (V, D) scores words where the config is untied, and is None otherwise.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.word = nn.Parameter(torch.randn(config.vocab, config.width))
        self.rq = nn.Parameter(torch.randn(config.codebooks, config.centroids, config.width))
        self.recompute = False  # see `through`
        self.prefix: nn.Module | None = None  # see `past`; set by baselines.add_prompts
        self.encoder_bias = RelativeBias(config, bidirectional=True)
        self.decoder_bias = RelativeBias(config, bidirectional=False)
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_blocks))
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_blocks))
        self.encoder_norm, self.decoder_norm = RMSNorm(config.width), RMSNorm(config.width)
        self.head = None  # scores words for doc2query; docids have rq, so that no stage trains it
        if not config.tied:
            head = torch.randn_like(self.word) * config.width**-0.5
            self.head = nn.Parameter(head, requires_grad=False)

    def drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.config.dropout, self.training)

    def through(self, block: nn.Module, *inputs):
        """block(*inputs); with `recompute` its activations are forgotten and made again for the gradient."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, S), padded with 0 -> hidden states (B, S, D) and padding bias (B, 1, 1, S) for `decode`."""
        packing = Packing(ids != 0)
        x = self.drop(F.embedding(packing.pack(ids), self.word))  # (n, D)
        padding = torch.zeros(ids.shape, device=x.device).masked_fill(ids == 0, -1e9)[:, None, None, :]
        position = torch.arange(ids.shape[1], device=x.device)
        bias = self.encoder_bias(position, position) + padding  # (B, H, S, S)
        for block in self.encoder:
            x = self.through(block, x, packing, bias)
        return packing.pad(self.drop(self.encoder_norm(x))), padding

    def cross_keys_values(self, source: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every decoder block's cross-attention, for many positions of each query."""
        return [block.cross_attention.keys_values(source) for block in self.decoder]

    def causal_bias(self, seen: int, new: int) -> Tensor:
        """What `new` positions after `seen` ones add to their self-attention scores: (1, H, new, seen + new)."""
        keys_at = torch.arange(seen + new, device=self.word.device)
        queries_at = keys_at[seen:]
        return self.decoder_bias(queries_at, keys_at) + (keys_at[None, :] > queries_at[:, None]) * -1e9

    def past(self, source: Tensor, padding: Tensor) -> list | None:
        """What `decode` starts from: None or, with a prefix, for each block None or keys and values (B, H, P, Dh)."""
        return None if self.prefix is None else self.prefix(source, padding)

    def decode(self, x: Tensor, cross: list | Tensor, padding: Tensor, past: list | None = None, bias=None):
        """Runs the decoder over T new positions.

        Args:
            x: (B, T, D) input embeddings of the new positions.
            cross: the source (B, S, D) or, where many positions will attend to it, `cross_keys_values` of it.
            padding: the (B, 1, 1, S) bias from `encode`.
            past: what an earlier call returned for the positions before these; before the first, `past` of the source.
            bias: `causal_bias` of a whole docid, for a caller that decodes it position by position.

        Returns:
            hidden states (B, T, D) after the final norm; keys and values of all positions so far, per block;
            the routes of the mixed layers, in order (mixlora.Route, empty for a plain T5).
        """
        seen = past[0][0].shape[2] if past and past[0] is not None else 0  # a prefix leaves block 0 alone
        end = seen + x.shape[1]
        bias = self.causal_bias(seen, x.shape[1]) if bias is None else bias[:, :, seen:end, :end]
        present, routes = [], []
        x = self.drop(x)
        for i, block in enumerate(self.decoder):
            of_block = cross if isinstance(cross, Tensor) else cross[i]
            x, keys_values, route = self.through(block, x, bias, past[i] if past else None, of_block, padding)
            present.append(keys_values)
            if route is not None:
                routes.append(route)
        return self.drop(self.decoder_norm(x)), present, routes

    def start(self, batch: int) -> Tensor:
        """Input of the first decoder position: the pad word's row, (B, 1, D)."""
        return self.word[0].expand(batch, 1, -1)

    def docid_inputs(self, codes: Tensor) -> Tensor:
        """Teacher forcing: docids (B, T) -> [start, code 1, .., code T-1] as embeddings (B, T, D)."""
        codebook = torch.arange(codes.shape[1] - 1, device=codes.device)
        before = F.embedding(codes[:, :-1] + codebook * self.config.centroids, self.rq.flatten(0, 1))
        return torch.cat([self.start(len(codes)).to(self.rq.dtype), before], dim=1)

    def docid_hidden(self, cross: list | Tensor, padding: Tensor, codes: Tensor, past: list | None = None):
        """Hidden states (B, M, D) that predict each code of the docids (B, M), and the mixed layers' routes.

        `cross` is the source, or `cross_keys_values` of it, which cost less where they need no gradient and x does.
        There may be several docids of each query (B * R, M), those of the first query first. `past` is that of the
        source.
        """
        hidden, _, routes = self.decode(self.docid_inputs(codes), cross, padding, past)
        return hidden, routes

    def embed(self, ids: Tensor) -> Tensor:
        """Dense representation (B, D): the decoder's hidden state after its start token. Appendix C, Eq. 8."""
        source, padding = self.encode(ids)
        return self.decode(self.start(len(ids)), source, padding)[0][:, 0]

    def word_logits(self, hidden: Tensor) -> Tensor:
        """Published T5's language-model head, tied with a D^-1/2 scale or untied: (B, T, D) -> (B, T, V)."""
        if self.head is not None:
            return hidden @ self.head.T
        return hidden * self.config.width**-0.5 @ self.word.T


def segment_logits(hidden: Tensor, rq: Tensor) -> Tensor:
    """z_m = h_m C_m^T, the only K logits that the paper's mask leaves at position m (Eq. 4-5), without a D^-1/2 scale.

    hidden (B, T, D), rq (T, K, D) -> (B, T, K).
    """
    return (hidden.transpose(0, 1) @ rq.transpose(1, 2)).transpose(0, 1)
