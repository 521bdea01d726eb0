"""Where a T5's weights come from: a published file, fetched and read by name, or latent semantic analysis of D_0.

Paper    appendix C starts from a published T5
In       a hub's T5 or a folder (config.json, spiece.model, weights); or the token ids of D_0
Out      a t5.T5 that has every tensor of the file; any file of an https server, checked
Next     prepare.py starts the bi-encoder with it; published.py fetches the benchmarks
Differs  the released code leaves this to hub clients. Here a broken transfer goes on where it stopped and what is
         complete needs no network; without published weights a T5 may start from D_0's words (`start_from_lsa`)
"""

import errno
import hashlib
import http.client
import json
import mmap
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t5 import T5, T5Config

# ------------------------------------------------------------------------------------- files of an https server

CHUNK = 1 << 20  # bytes read at a time
LOG_EVERY = 10  # seconds between two lines about a transfer
HUB = "https://huggingface.co"
CACHE = Path(__file__).parent / "data" / "t5"  # of hub models
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # one is enough
T5_FILES = (("config.json",), ("spiece.model",), WEIGHTS)
# All T5 v1.0 and v1.1 share one SentencePiece model.
T5_PIECES = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
SHARE_PIECES = ("google-t5/", "google/t5-v1_1")


def require_https(url: str) -> None:
    """Raises ValueError for any address but https, or http on this machine."""
    parts = urlsplit(url)
    local = parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1")
    if parts.scheme != "https" and not local:
        raise ValueError(f"address {url!r}: wanted one that starts with https://")


class HttpsRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, url):
        require_https(url)
        return super().redirect_request(request, file, code, message, headers, url)


def ask(url: str, begin: int = 0):
    """The server's answer, from byte `begin` on if it can; all of the file if nothing lies there."""
    require_https(url)
    headers = {"User-Agent": "mixlora-dsi"} | ({"Range": f"bytes={begin}-"} if begin else {})
    request = urllib.request.Request(url, headers=headers)
    try:
        return urllib.request.build_opener(HttpsRedirects).open(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the range is not there
            raise
        error.close()
        return ask(url)


@contextmanager
def reported(url: str, path: Path) -> Iterator[None]:
    """Turns a failure of the network, the disk or a hub's listing into a ValueError that says what to do."""
    try:
        yield
    except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC
        room = f"; {shutil.disk_usage(path.parent).free:,} bytes are free there, make room" if full else ""
        todo = f"run again to go on, or place the file by hand at {path.resolve()}"
        raise ValueError(f"{url} cannot be fetched ({error}{room}); {todo}") from None


def transfer(url: str, part: Path, begin: int, size: int | None, log: Callable) -> None:
    """Writes the file to `part`, which holds its first `begin` bytes. Raises OSError or HTTPException."""
    with ask(url, begin) as answer, part.open("r+b" if begin else "wb") as file:
        span = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        begin = int(span[1]) if span else 0  # where the server does begin
        length = answer.headers.get("Content-Length")
        total = begin + int(length) if length else size
        whole = "an unknown number of" if total is None else f"{total:,}"
        log(f"fetching {url}: {whole} bytes" + (f", of which {begin:,} are here" if begin else ""))
        file.seek(begin)
        file.truncate()
        spoke = time.monotonic()
        while chunk := answer.read(CHUNK):
            file.write(chunk)
            if time.monotonic() - spoke > LOG_EVERY:
                log(f"{part.stem}: {file.tell():,} of {whole} bytes")
                spoke = time.monotonic()
        if total is not None and file.tell() < total:
            raise ConnectionError(f"it broke off after {file.tell():,} of {total:,} bytes")
        file.flush()
        os.fsync(file.fileno())


def verify(path: Path, size: int | None = None, **digests: str) -> None:
    """Raises ValueError where the file has another size, or another sha256, md5 or git_blob."""
    length = path.stat().st_size
    if size not in (None, length):
        raise ValueError(f"{path}: {length:,} bytes, wanted {size:,}")
    for kind, wanted in digests.items():
        digest = hashlib.sha1(b"blob %d\0" % length) if kind == "git_blob" else hashlib.new(kind)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != wanted.lower():
            raise ValueError(f"{path}: {kind} {digest.hexdigest()}, wanted {wanted}")


def fetch(url: str, path: Path, *, size: int | None = None, log: Callable = print, **digests: str) -> Path:
    """The file at `url`, at `path`: whole and of the size and digests that `verify` is given, or not at all.

    A file that is there is checked and used. One that is not grows as `path`.part, which a later call continues if a
    digest can tell whether the two belong together, and is renamed once it is checked.
    Raises ValueError that says what to do when the network fails, the disk is full or a check fails.
    """
    part, here = path.with_name(path.name + ".part"), path.exists()
    if not here:
        path.parent.mkdir(parents=True, exist_ok=True)
        begin = part.stat().st_size if digests and part.exists() else 0
        if not begin or begin != size:
            with reported(url, path):
                transfer(url, part, begin, size, log)
    try:
        verify(path if here else part, size, **digests)
    except ValueError as error:
        part.unlink(missing_ok=True)
        todo = "delete that file and run again" if here else "deleted it: run again"
        raise ValueError(f"{error}; {todo}; if this returns, {url} has changed") from None
    if not here:
        os.replace(part, path)
    return path


def find_t5(given: str, cache: Path = CACHE, hub: str = HUB, log: Callable = print) -> Path:
    """The folder of a T5's files: the one that is given, or the copy in `cache` of a hub's owner/model.

    What lies in `cache` is used; a network is needed only for files that are missing. Raises ValueError as `fetch` does.
    """
    if Path(given).is_dir() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given):
        return Path(given)
    folder, listing = cache / given.replace("/", "--"), f"{hub}/api/models/{given}/tree/main"
    lacking = [names for names in T5_FILES if not any((folder / name).exists() for name in names)]
    if lacking:
        with reported(listing, folder), ask(listing) as answer:
            entries = {entry["path"]: entry for entry in json.load(answer)}
    for names in lacking:
        name = next((name for name in names if name in entries), None)
        if name is None:
            raise ValueError(f"found none of {', '.join(names)} at {hub}/{given}")
        entry = entries[name]
        digest = {"sha256": entry["lfs"]["oid"]} if "lfs" in entry else {"git_blob": entry["oid"]}
        fetch(f"{hub}/{given}/resolve/main/{name}", folder / name, size=entry["size"], log=log, **digest)
    if given.startswith(SHARE_PIECES):
        fetch(f"{hub}/{given}/resolve/main/spiece.model", folder / "spiece.model", sha256=T5_PIECES)
    return folder


# ------------------------------------------------------------------------------------------ published T5 weights

# A published word table has 32,128 rows: 32,000 SentencePiece pieces, 100 sentinels, and 28 rows that mean
# nothing and only fill it up to a multiple of 128. Ours (and the head of v1.1) ends after the sentinels.
PUBLISHED_ROWS, MEANT_ROWS = 32_128, 32_100
# Copies of shared.weight; of v1.1, the last is a tensor of its own.
COPIES = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
# Left in t5-small's and t5-base's files by their conversion; no such bias exists in the network.
STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def our_rows(published: int) -> int:
    """How many of a published table's rows we keep: all, unless it is T5's own, filled up to 32,128."""
    return MEANT_ROWS if published == PUBLISHED_ROWS else published


def published_names(config: T5Config) -> dict[str, str]:
    """Our parameter name -> the published one, for every tensor but `rq`, which no published file has."""
    names = {"word": "shared.weight"} | ({} if config.tied else {"head": "lm_head.weight"})
    attention, inner = {w: w for w in "qkvo"}, {"w_in": "wi", "w_out": "wo"}
    if config.gated:
        inner = {"w_in": "wi_0", "w_linear": "wi_1", "w_out": "wo"}
    own, ff = ("self_attention", "SelfAttention", attention), ("ff", "DenseReluDense", inner)
    cross = ("cross_attention", "EncDecAttention", attention)
    encoder, decoder = (config.encoder_blocks, [own, ff]), (config.decoder_blocks, [own, cross, ff])
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for stack, (blocks, parts) in (("encoder", encoder), ("decoder", decoder)):
        names[f"{stack}_bias.weight"] = f"{stack}.{bias}"
        names[f"{stack}_norm.weight"] = f"{stack}.final_layer_norm.weight"
        for i, (j, (ours, theirs, weights)) in product(range(blocks), enumerate(parts)):
            layer, norm = f"{stack}.block.{i}.layer.{j}", ours.removesuffix("_attention") + "_norm"
            names[f"{stack}.{i}.{norm}.weight"] = f"{layer}.layer_norm.weight"
            for w, published in weights.items():
                names[f"{stack}.{i}.{ours}.{w}"] = f"{layer}.{theirs}.{published}.weight"
    return names


@torch.no_grad()
def load_published(model: T5, tensors: dict[str, Tensor]) -> None:
    """Copies published tensors into the model by name; raises ValueError if one is left over or has another shape."""
    names = published_names(model.config)
    copies = COPIES - set(names.values())
    shared = next((tensors[name] for name in ("shared.weight", *copies) if name in tensors), None)
    if shared is not None:
        tensors = tensors | {"shared.weight": shared}
    missing = set(names.values()) - set(tensors)
    unknown = set(tensors) - set(names.values()) - copies - {STRAY}
    if missing or unknown:
        raise ValueError(f"published weights: missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}")
    for name in copies & set(tensors):
        if not torch.equal(tensors[name], shared):
            raise ValueError(f"published weights: {name} differs from shared.weight; wanted a copy of it")
    parameters = dict(model.named_parameters())
    for ours, theirs in names.items():
        value, parameter = tensors[theirs], parameters[ours]
        if ours in ("word", "head") and value.ndim == 2:
            value = value[: our_rows(len(value))]
        if parameter.shape != value.shape:
            shapes = f"shape {tuple(value.shape)}, wanted {tuple(parameter.shape)}"
            raise ValueError(f"published weights: {theirs} has {shapes}")
        parameter.copy_(value)


def to_published(model: T5) -> dict[str, Tensor]:
    """The model's tensors under their published names, without the docid table, as `pytorch_model.bin` holds them.

    Tables of words are filled up with rows of zeros to T5's 32,128.
    """
    tensors = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for name in {"word", "head"} & set(tensors):
        if len(tensors[name]) == MEANT_ROWS:
            tensors[name] = F.pad(tensors[name], (0, 0, 0, PUBLISHED_ROWS - MEANT_ROWS))
    return {theirs: tensors[ours] for ours, theirs in published_names(model.config).items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The float tensors of a .safetensors file: 8 bytes of header length, a JSON header, raw little-endian data.

    They are views of the file, mapped into memory; what is written to them does not reach the file.
    Raises errors of several kinds where the file is none, or cut; `read_weights` names the file.
    """
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    size = int.from_bytes(data[:8], "little")
    header, body, tensors = json.loads(bytes(data[8 : 8 + size])), data[8 + size :], {}
    header.pop("__metadata__", None)
    for name, item in header.items():
        start, end = item["data_offsets"]
        flat = torch.frombuffer(body[start:end], dtype=types[item["dtype"]])
        tensors[name] = flat.reshape(item["shape"])  # raises where bytes are missing
    return tensors


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a published T5: views of its file, but for the format that torch wrote before 2020."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"found neither {' nor '.join(WEIGHTS)} in {folder}")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch's are of all kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a whole file of float tensors ({reason}); fetch it again") from None


CONFIG_KEYS = dict(
    width="d_model", head_width="d_kv", heads="num_heads", feed_forward="d_ff", encoder_blocks="num_layers",
    buckets="relative_attention_num_buckets",
)  # fmt: skip


def kind_of_t5(given: dict) -> dict[str, bool]:
    """`gated` and `tied` from a published config.json; keys that a T5 v1.0 of 2020 lacks mean v1.0.

    Old files tell by `tie_word_embeddings` whether the head is tied, with its D^-1/2 scale; newer ones may set it to
    true even for v1.1 and tell by `scale_decoder_outputs`. Raises ValueError where the network is neither.
    """
    name = given.get("feed_forward_proj", "relu")
    activation = {"relu": "relu", "gated-gelu": "gelu_new"}.get(name)  # gelu_new: GELU by its tanh formula
    if activation is None or given.get("dense_act_fn", activation) != activation:
        keys = f"feed_forward_proj={name!r}, dense_act_fn={given.get('dense_act_fn')!r}"
        raise ValueError(f"{keys}; wanted 'relu', or 'gated-gelu' with 'gelu_new'")
    tied = given.get("tie_word_embeddings", True)
    scaled = given.get("scale_decoder_outputs", tied)
    if (tied, scaled) not in ((True, True), (False, False), (True, False)):
        keys = f"tie_word_embeddings={tied!r}, scale_decoder_outputs={scaled!r}"
        raise ValueError(f"{keys}; wanted true or false, and no scale where the head is untied")
    return {"gated": name == "gated-gelu", "tied": scaled}


def read_published(folder: Path, codebooks: int, centroids: int, dropout: float | None = None) -> T5:
    """A T5 v1.0 or v1.1 from `config.json` and `model.safetensors` or `pytorch_model.bin`, its docid table random.

    The weights are copied from the mapped file straight into the model: one float32 copy is in memory.
    Raises ValueError where a file or tensor is missing, unknown or of another shape, or the network is not t5.py's.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"found no {path}; --t5 wants a folder with config.json and the weights")
    try:
        given = json.loads(path.read_text())
        shape = {ours: given[theirs] for ours, theirs in CONFIG_KEYS.items()} | kind_of_t5(given)
        shape["vocab"] = our_rows(given["vocab_size"])
        shape["decoder_blocks"] = given.get("num_decoder_layers") or given["num_layers"]
        shape["max_distance"] = given.get("relative_attention_max_distance", 128)
        shape["dropout"] = given["dropout_rate"] if dropout is None else dropout
        config = T5Config(**shape, codebooks=codebooks, centroids=centroids)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the config of a T5 v1.0 or v1.1 ({error})") from None
    tensors = read_weights(folder)
    if not config.tied and given.get("tie_word_embeddings", True) and "shared.weight" in tensors:
        # One table but logits without the scale: the head may be left out, being a copy of the table.
        tensors.setdefault("lm_head.weight", tensors["shared.weight"])
    with torch.device("meta"):  # no time is spent on random weights that the file replaces
        model = T5(config)
    model.to_empty(device="cpu")
    nn.init.normal_(model.rq)  # the one tensor that no published file has
    load_published(model, tensors)
    return model


# --------------------------------------------------------------------------------- without a file: LSA of D_0


@torch.no_grad()
def start_from_lsa(model: T5, documents: Tensor) -> None:
    """Starts a T5 that has no published weights as a latent semantic index of D_0 (N, S), in place. Ours.

    Each word row is its row of the truncated SVD of D_0's TF-IDF matrix (V, N), to standard deviation `std`;
    the last of the D columns holds ln(idf) instead. The first decoder block's cross-attention looks that
    column up, so that it weights words by idf, and passes their sum on (O = gain * V^T, V orthogonal). All
    other sub-layers start small (`residual`). The dense representation is then the idf-weighted mean of the
    words' rows: retrieval works from step 0.
    """
    std, residual, gain = 0.5, 0.1, 4.0
    width, real = model.config.width, documents > 0
    column = torch.arange(len(documents))[:, None].expand_as(documents)[real]
    counts = torch.zeros(model.config.vocab, len(documents))
    counts.index_put_((documents[real], column), torch.ones(()), accumulate=True)
    idf = torch.log((1 + len(documents)) / (1 + (counts > 0).sum(1)))  # (V,)
    tf_idf = F.normalize(counts.log1p() * idf[:, None], dim=0)
    dimensions = min(width - 1, *tf_idf.shape)
    u, s, _ = torch.svd_lowrank(tf_idf, q=dimensions, niter=4)
    word = torch.randn(model.config.vocab, width) * 1e-4  # direction of the words that D_0 lacks
    word[:, :dimensions] += u * s.sqrt()
    word = F.normalize(word, dim=1) * std * width**0.5
    word[:, -1] = std * idf.clamp(min=0.05).log()
    word[0] = 0  # the start token carries nothing but a query for the idf column
    word[0, -1] = std * width**0.5
    model.word.copy_(word.to(model.word))

    for block in [*model.encoder, *model.decoder]:
        block.self_attention.o *= residual
        block.ff.w_out *= residual
    for block in model.decoder[1:]:
        block.cross_attention.o *= residual
    cross = model.decoder[0].cross_attention
    cross.v.copy_(nn.init.orthogonal_(torch.empty_like(cross.v)))
    cross.o.copy_(gain * cross.v.T)
    cross.k *= residual
    query = F.normalize(cross.q[:, -1].unflatten(0, (cross.heads, -1)), dim=-1)  # (H, Dh), unit rows
    cross.q[:, -1] = query.flatten() / width**0.5  # RMSNorm turns the start row's last entry into D^1/2
    cross.k[:, -1] = query.flatten()
