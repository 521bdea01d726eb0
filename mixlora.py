"""A mixture of LoRA experts beside the frozen feed-forward of the first decoder blocks.

Paper    section 3.1, Eq. 3 and 10-12: cosine router, top-2 gates, align and repel losses
In       the feed-forward's normalised input x (B, T, D)
Out      its output (B, T, D) and a Route: router scores and gates (B, T, E), kept for losses and energies
Next     ood.py reads the scores; train.py adds the losses and calls add_expert()
Differs  top-2 is deterministic (the released code drops the second expert at random, also in evaluation), gates have
         their plain gradient (its straight-through dispatch multiplies it by 1 + g), the
         router row is normalised inside the forward instead of overwritten, all experts are computed as one
         product, and what is frozen is a parameter of its own instead of a gradient mask. New router rows may
         start from the mean of the out-of-distribution inputs (`ood_mean`), where the released code draws
         them at random. A layer whose experts are all frozen leaves their dropout out. LoRA on the decoder's
         attention is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t5 import T5, Attention, FeedForward, dropout

ATTENTIONS = ("self_attention", "cross_attention")  # of a decoder block


@dataclass(frozen=True)
class MixConfig:
    """Experts and router of every mixed layer. Defaults are the paper's."""

    layers: int = 5  # the first decoder blocks
    experts: int = 2  # per layer, at the start
    rank: int = 8  # r
    alpha: float = 16.0  # an expert's output is scaled by alpha / r
    dropout: float = 0.05  # on an expert's input
    active: int = 2  # A, experts per token
    router: str = "cosine"  # or "linear"
    lora_in_site: str = "post_act"  # W_in's expert comes after the activation (released code), or "pre_act"

    def __post_init__(self):
        for name, wanted in (("router", ("cosine", "linear")), ("lora_in_site", ("post_act", "pre_act"))):
            if getattr(self, name) not in wanted:
                raise ValueError(f"found {name}={getattr(self, name)!r}, wanted one of {', '.join(wanted)}")
        if self.experts < self.active:
            raise ValueError(
                f"found {self.experts} experts, wanted at least the {self.active} that each token uses"
            )


@dataclass
class Route:
    """What one mixed layer did: its router's view of every token."""

    x: Tensor  # (B, T, D) router input: the normalised input of the feed-forward
    scores: Tensor  # (B, T, E) float32, cosines or linear logits
    gates: Tensor  # (B, T, E) float32, zero but for the active experts, summing to 1
    router: Tensor  # (E, D) float32 router rows, the newest last
    newest: int  # how many of the last rows train

    def rows(self, chosen: slice) -> "Route":
        """That of some of the B rows."""
        return replace(self, x=self.x[chosen], scores=self.scores[chosen], gates=self.gates[chosen])


def kaiming(*shape: int) -> nn.Parameter:
    """Uniform with a = sqrt(5), as published: bound = fan_in^-1/2, fan_in being the last of the shape."""
    return nn.Parameter((torch.rand(shape) * 2 - 1) * shape[-1] ** -0.5)


class Experts(nn.Module):
    """E LoRA experts, stacked: `in` adapts W_in (F, D), `out` adapts W_out (D, F)."""

    def __init__(self, experts: int, width: int, feed_forward: int, rank: int):
        super().__init__()
        each = experts, rank
        # B lies as (E, r, F) in memory, as `mixed_delta` multiplies by it
        self.in_a, self.in_b = kaiming(*each, width), nn.Parameter(torch.zeros(*each, feed_forward).mT)
        self.out_a, self.out_b = kaiming(*each, feed_forward), nn.Parameter(torch.zeros(*each, width).mT)

    def __len__(self) -> int:
        return len(self.in_a)


def mixed_delta(x: Tensor, a: Tensor, b: Tensor, gates: Tensor, onto: Tensor) -> Tensor:
    """onto + sum_e g_e B_e A_e x of every token, all experts in two products.

    x (B, T, D), a (E, r, D), b (E, F, r), gates (B, T, E), onto (B, T, F) -> (B, T, F).
    """
    experts, rank, _ = a.shape
    z = x @ a.flatten(0, 1).T  # (B, T, E * r)
    z = z.unflatten(-1, (experts, rank)) * gates[..., None].to(x.dtype)  # (B, T, E, r)
    return torch.addmm(onto.flatten(0, 1), z.flatten(2).flatten(0, 1), b.mT.flatten(0, 1)).view_as(onto)


def top_gates(scores: Tensor, active: int) -> Tensor:
    """Softmax over all E experts, the `active` largest kept and rescaled to sum 1, the others 0: (.., E) -> (.., E)."""
    p = F.softmax(scores.float(), dim=-1)
    top = p.topk(active, dim=-1)
    return torch.zeros_like(p).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))


class MixedFeedForward(nn.Module):
    """The plain feed-forward once, plus the gated sum of its experts' deltas.

    Frozen experts and router rows are parameters apart from the trainable ones, so no optimiser ever holds them.
    """

    def __init__(self, plain: FeedForward, config: MixConfig, frozen: int, trainable: int):
        super().__init__()
        feed_forward, width = plain.w_in.shape
        self.plain, self.config, self.scale = plain, config, config.alpha / config.rank
        self.old = Experts(frozen, width, feed_forward, config.rank).requires_grad_(False)
        self.new = Experts(trainable, width, feed_forward, config.rank)
        self.router_old = nn.Parameter(torch.randn(frozen, width) * width**-0.5, requires_grad=False)
        self.router_new = nn.Parameter(torch.randn(trainable, width) * width**-0.5)

    def __len__(self) -> int:
        return len(self.old) + len(self.new)

    def stacked(self, name: str) -> Tensor:
        """One of the experts' four tensors, frozen and trainable together; B in its own layout in memory."""
        old, new = getattr(self.old, name), getattr(self.new, name)
        if not len(new):
            return old
        return torch.cat([old.mT, new.mT]).mT if name.endswith("b") else torch.cat([old, new])

    def route(self, x: Tensor) -> Route:
        """Router scores and gates of x (B, T, D), in float32 whatever the precision around."""
        with torch.autocast(x.device.type, enabled=False):
            router = torch.cat([self.router_old, self.router_new]).float()  # (E, D)
            if self.config.router == "cosine":
                scores = F.normalize(x.float(), dim=-1) @ F.normalize(router, dim=-1).T  # cosine in [-1, 1]
            else:
                scores = x.float() @ router.T
            return Route(x, scores, top_gates(scores, self.config.active), router, len(self.router_new))

    def forward(self, x: Tensor) -> tuple[Tensor, Route]:
        route = self.route(x)
        gates = self.scale * route.gates
        drop = self.config.dropout if len(self.new) else 0.0  # it is for experts that train

        def add_delta(y: Tensor, side: str, onto: Tensor) -> Tensor:
            a, b = self.stacked(f"{side}_a"), self.stacked(f"{side}_b")
            return mixed_delta(dropout(y, drop, self.training), a, b, gates, onto)

        if self.config.lora_in_site == "pre_act":
            u = self.plain.activate(add_delta(x, "in", x @ self.plain.w_in.T), x)
        else:
            u = add_delta(x, "in", self.plain.hidden(x))
        return add_delta(u, "out", u @ self.plain.w_out.T), route

    @torch.no_grad()
    def freeze(self, but: int = 0) -> None:
        """Freezes every expert and router row but the last few, bit by bit."""
        n = len(self) - but
        router = torch.cat([self.router_old, self.router_new])
        for name in ("in_a", "in_b", "out_a", "out_b"):
            every = self.stacked(name)
            setattr(self.old, name, nn.Parameter(every[:n].clone(), requires_grad=False))
            setattr(self.new, name, nn.Parameter(every[n:].clone()))
        self.router_old = nn.Parameter(router[:n].clone(), requires_grad=False)
        self.router_new = nn.Parameter(router[n:].clone())

    def add_expert(self, direction: Tensor | None = None) -> None:
        """Freezes what is there and adds one trainable expert with B = 0, so that its delta starts at zero.

        `direction` (D,) starts its router row; without one the row is drawn at random, as published.
        """
        self.freeze()
        feed_forward, width = self.plain.w_in.shape
        device = self.plain.w_in.device
        self.new = Experts(1, width, feed_forward, self.config.rank).to(device)
        row = torch.randn(width, device=device) if direction is None else direction.to(device)
        self.router_new = nn.Parameter(F.normalize(row, dim=0)[None].clone())

    @torch.no_grad()
    def normalise_rows(self) -> None:
        """Rescales the trainable router rows to unit length, after an optimiser step: their length has no gradient."""
        if self.config.router == "cosine":
            self.router_new.copy_(F.normalize(self.router_new, dim=-1))


def add_mixture(
    model: T5, config: MixConfig, frozen: list[int] | None = None, trainable: list[int] | None = None
) -> None:
    """Puts a mixed feed-forward into the first `config.layers` decoder blocks of a plain T5, `config.experts` in each.

    The counts of frozen and trainable experts per layer are given when a checkpoint is to be loaded.
    Raises ValueError where the decoder has fewer blocks.
    """
    if config.layers > len(model.decoder):
        raise ValueError(
            f"found {len(model.decoder)} decoder blocks, wanted {config.layers} mixed layers; pass --layers"
        )
    frozen, trainable = frozen or [0] * config.layers, trainable or [config.experts] * config.layers
    for block, n_frozen, n_trainable in zip(model.decoder, frozen, trainable):
        block.ff = MixedFeedForward(block.ff, config, n_frozen, n_trainable).train(block.training)


def mixed_layers(model: T5) -> list[MixedFeedForward]:
    return [block.ff for block in model.decoder if isinstance(block.ff, MixedFeedForward)]


@torch.no_grad()
def routes_of(model: T5, source: Tensor, padding: Tensor, codes: Tensor) -> list[Route]:
    """The routes that T5.docid_hidden returns, in evaluation mode, without what comes after the last router."""
    assert not model.training, "dropout would change what the routers see"
    x, bias, routes = model.docid_inputs(codes), model.causal_bias(0, codes.shape[1]), []
    for block in model.decoder[: len(mixed_layers(model))]:
        x, _ = block.attend(x, bias, None, source, padding)
        y = block.ff_norm(x)
        if len(routes) + 1 < len(mixed_layers(model)):
            y, route = block.ff(y)
            x = x + y
        else:
            route = block.ff.route(y)
        routes.append(route)
    return routes


# ------------------------------------------------------------------------------------------ LoRA on attention


class LowRankAttention(Attention):
    """Attention whose W_q, W_k, W_v and W_o are W + B A with W frozen: plain LoRA, without a router. Ours.

    MixLoRA (Li et al., 2024) has it beside the routed experts, and new documents need it: what they are asked by is
    read through the attention to the query, and what of their docid came before through the self-attention.
    """

    def __init__(self, plain: Attention, rank: int):
        nn.Module.__init__(self)
        self.heads, self.dropout, self.after, self.plain = plain.heads, plain.dropout, plain.after, plain
        for name in "qkvo":
            n_out, n_in = getattr(plain, name).shape
            self.register_parameter(f"{name}_a", kaiming(rank, n_in))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.zeros(n_out, rank)))

    def adapted(self, name: str) -> Tensor:
        w, a, b = getattr(self.plain, name), getattr(self, f"{name}_a"), getattr(self, f"{name}_b")
        return torch.addmm(w, b, a)

    q, k = property(lambda self: self.adapted("q")), property(lambda self: self.adapted("k"))
    v, o = property(lambda self: self.adapted("v")), property(lambda self: self.adapted("o"))


def add_attention_lora(model: T5, rank: int, sites: Sequence[str] = ATTENTIONS) -> None:
    """Puts LoRA of this rank on both attentions of every decoder block; its deltas start at zero.

    `sites`: those that have it, where a checkpoint is to be loaded. Of commit 9c736df and before, cross_attention alone.
    """
    for block in model.decoder:
        for site in sites:
            adapted = LowRankAttention(getattr(block, site), rank).to(model.word.device)
            setattr(block, site, adapted.train(block.training))


def attention_lora(model: T5) -> list[LowRankAttention]:
    """By block, the self-attention before the attention to the query."""
    every = [getattr(block, site) for block in model.decoder for site in ATTENTIONS]
    return [attention for attention in every if isinstance(attention, LowRankAttention)]


def attention_parameters(model: T5) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of every A and B on attention."""
    adapted = [pair for pair in model.named_modules() if isinstance(pair[1], LowRankAttention)]
    return [pair for name, module in adapted for pair in module.named_parameters(name, recurse=False)]


@torch.no_grad()
def fold(model: T5) -> None:
    """Does once what a model that only answers would do at every step: adds LoRA on attention to the weights, and puts
    each layer's experts into one tensor. In place; answers stay the same, bit by bit.
    """
    for block in model.decoder:
        for site in ATTENTIONS:
            if isinstance(lora := getattr(block, site), LowRankAttention):
                for name in "qkvo":
                    setattr(lora.plain, name, nn.Parameter(lora.adapted(name), requires_grad=False))
                setattr(block, site, lora.plain)
    for layer in mixed_layers(model):
        layer.freeze()


# ---------------------------------------------------------------------------------------------- router losses


def align_loss(route: Route) -> Tensor:
    """mean over tokens of 1 - cos(R_N, x): pulls the newest row towards its tokens. First term of Eq. 3.

    Of two rows both take part, as in the released code.
    """
    rows = route.router[-1:] if len(route.router) > 2 else route.router
    cosine = F.normalize(route.x.float(), dim=-1) @ F.normalize(rows, dim=-1).T
    return (1 - cosine).mean()


def repel_loss(route: Route, reduction: str = "mean") -> Tensor:
    """max(0, cos(R_j, R_N)) over older rows j: pushes the newest row from them. Second term of Eq. 3.

    The paper sums over j; the released code, and so the default, takes the mean.
    """
    rows = F.normalize(route.router, dim=-1)
    positive = (rows[:-1] @ rows[-1]).clamp(min=0)
    return positive.sum() if reduction == "sum" else positive.mean()


def balance_loss(route: Route) -> Tensor:
    """N^2 mean_{b,e} f_{b,e} P_{b,e}: f share of a sequence's tokens whose first choice is e, P its mean probability."""
    experts = route.scores.shape[-1]
    chosen = F.one_hot(route.scores.argmax(-1), experts).float().mean(1)  # (B, E)
    probability = F.softmax(route.scores, dim=-1).mean(1)  # (B, E)
    return experts**2 * (chosen * probability).mean()


def z_loss(route: Route) -> Tensor:
    """mean over tokens of logsumexp_e(scores)^2: keeps a linear router's logits small."""
    return route.scores.logsumexp(-1).pow(2).mean()


def first_choice_share(scores: Tensor) -> Tensor:
    """Share of tokens whose largest gate is each expert's: scores (B, T, E) -> (E,), summing to 1."""
    experts = scores.shape[-1]
    return torch.bincount(scores.argmax(-1).flatten(), minlength=experts) / scores[..., 0].numel()


def expert_parameters(width: int, feed_forward: int, rank: int) -> int:
    """Parameters of one expert: r * (D + F) for each of its two adapters. 61,440 at T5-base's shape and r = 8."""
    return 2 * rank * (width + feed_forward)
