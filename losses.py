"""The losses of docid training: cross-entropy under the docid mask, KL to the previous model, router losses.

Paper    Eq. 3-7
In       decoder states (B, M, D), the docid table (M, K, D), the mixed layers' routes
Out      scalars, and router losses by name, each as weighted in the whole loss
Next     train.py adds them up
Differs  only the K logits of a position are computed (t5.py); align and repel losses follow the released code where
         it disagrees with the paper's text, with the paper's form as an option
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import mixlora
from t5 import T5, segment_logits


def docid_cross_entropy(
    model: T5, hidden: Tensor, codes: Tensor, mask: str, logits: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Cross-entropy of docids (B, M) given hidden states (B, M, D), mean over all B * M tokens. Paper Eq. 4-5.

    `segment` normalises over the K codes of a position, `docid_vocab` over all M * K, `full_vocab` over the words too.
    `logits` (B, M, K) are t5.segment_logits, where they are at hand.
    """
    if mask == "segment":
        logits = segment_logits(hidden, model.rq) if logits is None else logits
        return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
    table = model.rq.flatten(0, 1)  # (M * K, D)
    target = codes + torch.arange(codes.shape[1], device=codes.device) * model.config.centroids
    if mask == "full_vocab":
        words = model.word if model.head is None else model.head
        table, target = torch.cat([words, table]), target + model.config.vocab
    return F.cross_entropy((hidden @ table.T).float().flatten(0, 1), target.flatten())


def kl_to_previous(logits: Tensor, logits_before: Tensor, reduction: str) -> Tensor:
    """KL(previous model || this one) over the K codes of each position, mean over queries, sum over positions. Eq. 6.

    logits (B, M, K) of each model; the paper divides by M (`mean`), the released code does not (`sum`).
    """
    before = F.log_softmax(logits_before.float(), dim=-1)
    now = F.log_softmax(logits.float(), dim=-1)
    kl = (before.exp() * (before - now)).sum(-1).mean(0)  # (M,)
    return kl.mean() if reduction == "mean" else kl.sum()


def router_losses(routes: list[mixlora.Route], config) -> dict[str, Tensor]:
    """The weighted router losses, summed over mixed layers. Paper Eq. 3, and the linear router's own."""
    if config.aux_layers == "expanded":
        routes = [route for route in routes if route.newest]
    terms = {
        "align": (config.align_coef, mixlora.align_loss),
        "repel": (config.repel_coef, lambda route: mixlora.repel_loss(route, config.repel_reduction)),
        "balance": (config.balance_coef, mixlora.balance_loss),
        "z": (config.z_coef, mixlora.z_loss),
    }
    if not routes:
        return {}
    with torch.autocast(routes[0].x.device.type, enabled=False):  # cosines near 1 need float32
        return {name: coef * sum(map(loss, routes)) for name, (coef, loss) in terms.items() if coef}
