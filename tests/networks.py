"""Small random T5s, and transformers' own, for the tests of t5.py and weights.py."""

import math

import pytest
import torch

import weights
from t5 import T5, T5Config

# V, D, Dh, H, F, encoder and decoder blocks, by the names of T5Config and of transformers' T5Config
OURS = ("vocab", "width", "head_width", "heads", "feed_forward", "encoder_blocks", "decoder_blocks")
THEIRS = ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_layers", "num_decoder_layers")
TINY = (30, 12, 5, 3, 20, 2, 3)
V1_1 = {"gated": True, "tied": False}
SHAPES = {  # the published networks, and the number of their parameters
    "t5-small": ((32128, 512, 64, 8, 2048, 6, 6), {}, 60_506_624),
    "t5-base": ((32128, 768, 64, 12, 3072, 12, 12), {}, 222_903_552),
    "t5-large": ((32128, 1024, 64, 16, 4096, 24, 24), {}, 737_668_096),
    "t5-3b": ((32128, 1024, 128, 32, 16384, 24, 24), {}, 2_851_598_336),
    "t5-v1_1-small": ((32128, 512, 64, 6, 1024, 8, 8), V1_1, 76_961_152),
    "t5-v1_1-base": ((32128, 768, 64, 12, 2048, 12, 12), V1_1, 247_577_856),
    "t5-v1_1-large": ((32128, 1024, 64, 16, 2816, 24, 24), V1_1, 783_150_080),
    "t5-v1_1-xl": ((32128, 2048, 64, 32, 5120, 24, 24), V1_1, 2_849_757_184),
}
PADDING = 32_128 - 32_100  # rows of a published table that belong to no piece


def shape(sizes: tuple, codebooks: int = 4, centroids: int = 6, **changes) -> T5Config:
    sizes = dict(zip(OURS, sizes))
    vocab = weights.our_rows(sizes.pop("vocab"))
    return T5Config(vocab=vocab, **sizes, codebooks=codebooks, centroids=centroids, **changes)


def on_meta(sizes: tuple, gated: bool = False, tied: bool = True):
    """A transformers T5 without memory for its weights: v1.0, or v1.1 where gated and untied."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        **dict(zip(THEIRS, sizes)),
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):  # skips transformers' own, slower initialisation
        model = transformers.T5ForConditionalGeneration(config)
    untie(model)
    return model


def untie(model) -> None:
    """Gives the model a head of its own where its config wants one: transformers 5 shares the word table."""
    if not model.config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))


def reference(sizes: tuple = TINY, **kind):
    """A transformers T5 with random weights everywhere, norms and position biases too, in evaluation mode."""
    model = on_meta(sizes, **kind).to_empty(device="cpu").eval()
    model.tie_weights()
    untie(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(1, 0.3)
            elif "relative_attention_bias" in key:
                weight.normal_()
            elif "shared" not in key:
                d_kv = model.config.d_kv if key.endswith(".q.weight") else 1  # no division by sqrt(Dh) inside
                weight.normal_(0, (weight.shape[1] * d_kv) ** -0.5)
            else:
                weight.normal_()
    return model


def blank(sizes: tuple = TINY, **kind) -> T5:
    """Our T5 with nan in all tensors, so that a tensor that is never loaded shows."""
    with torch.device("meta"):
        model = T5(shape(sizes, **kind))
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(math.nan)
    return model


def logits_of(hf, *args, **kwargs):
    """Logits by transformers, without those of the words that are none."""
    return hf(*args, **kwargs).logits[..., : weights.our_rows(hf.config.vocab_size)]


def batch(vocab: int, lengths: list[int], seed: int = 0) -> torch.Tensor:
    """Random token ids (B, S) of these lengths, padded with 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (len(lengths), max(lengths)), generator=generator)
    return ids * (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
