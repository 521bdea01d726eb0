"""Where a T5's weights come from: a published file, fetched and read by name, or latent semantic analysis of texts.

Paper    appendix C starts from a published T5
In       a hub's T5 or a folder (config.json, spiece.model, weights); or the token ids of D_0 and general text
Out      a t5.T5 that has every tensor of the file; any file of an https server, checked
Next     prepare.py starts the bi-encoder with it; published.py fetches the benchmarks
Differs  the released code leaves this to hub clients; without published weights a T5 may start from the words of
         these texts
"""

import hashlib
import http.client
import json
import mmap
import os
import re
import shutil
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import arrays
from arrays import Tokens
from t5 import T5, T5Config

# ------------------------------------------------------------------------------------- files of an https server

HUB = "https://huggingface.co"
CACHE = Path(__file__).parent / "data" / "t5"  # of hub models
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # one is enough
T5_FILES = (("config.json",), ("spiece.model",), WEIGHTS)


class HttpsOnly(urllib.request.BaseHandler):
    def default_open(self, request) -> None:  # sees every address before it is opened, those of redirects too
        if not re.match(r"https://|http://(localhost|127\.0\.0\.1)(:\d+)?/", request.full_url):
            raise ValueError(f"address {request.full_url!r}: wanted one that starts with https://")

    def http_error_416(self, request, answer, *rest):  # the file ends before the byte that was asked for
        return answer


def ask(url: str, begin: int = 0):
    """The server's answer, from byte `begin` on if it can."""
    headers = {"User-Agent": "mixlora-dsi"} | ({"Range": f"bytes={begin}-"} if begin else {})
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.build_opener(HttpsOnly).open(request, timeout=60)


@contextmanager
def reported(url: str, path: Path) -> Iterator[None]:
    """Turns a failure of the network, the disk or a hub's listing into a ValueError that says what to do."""
    try:
        yield
    except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
        raise ValueError(f"{url}: {error}; run again or place the file at {path.resolve()}") from None


def verify(path: Path, **checks: str | int) -> None:
    """Raises ValueError where the file's size, sha256, md5 or git_blob (git's name for its content) is another."""
    size = path.stat().st_size
    for kind, wanted in checks.items():
        digest = (lambda: hashlib.sha1(b"blob %d\0" % size)) if kind == "git_blob" else kind
        with path.open("rb") as file:
            held = size if kind == "size" else hashlib.file_digest(file, digest).hexdigest()
        if held != wanted:
            raise ValueError(f"{path}: {kind} {held}, wanted {wanted}; once it is gone, run again")


def fetch(url: str, path: Path, log: Callable = print, **checks: str | int) -> Path:
    """The file at `url`, at `path`: whole and with the size and digests of `checks` (see `verify`), or not at all.

    A file that is there is checked and used. Another grows as `path`.part, which a later call continues if a digest can
    tell whether the two belong together; another process that asks for it waits. Raises ValueError where the network, the
    disk or a check fails.
    """
    part = path.with_name(path.name + ".part")
    with arrays.alone(path.parent):
        if path.exists():
            verify(path, **checks)
            return path
        begin = part.stat().st_size if checks.keys() - {"size"} and part.exists() else 0
        with reported(url, path), ask(url, begin) as answer, part.open("ab") as file:
            # 200: the whole file; 206: the rest; 416: there is no more
            begin = 0 if answer.status == 200 else begin
            file.truncate(begin)
            log(f"fetching {url} from byte {begin:,} on")
            if answer.status != 416:
                shutil.copyfileobj(answer, file)
                if answer.length:
                    raise ConnectionError(f"it broke off {answer.length:,} bytes before its end")
            file.flush()
            os.fsync(file.fileno())
        try:
            verify(part, **checks)
        except ValueError:
            part.unlink()
            raise
        os.replace(part, path)
        return path


def find_t5(given: str, cache: Path = CACHE, hub: str = HUB, log: Callable = print) -> Path:
    """The folder `given`, or that of a hub's owner/model in `cache`, what it lacks fetched; ValueError as in `fetch`."""
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
        fetch(f"{hub}/{given}/resolve/main/{name}", folder / name, log, size=entry["size"], **digest)
    return folder


# ------------------------------------------------------------------------------------------ published T5 weights

# Copies of shared.weight; of v1.1, the last is a tensor of its own.
COPIES = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
# Left in t5-small's and t5-base's files by their conversion; no such bias exists in the network.
STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def our_rows(published: int) -> int:
    """Rows kept of a published table: of T5's own 32,128 its 32,000 pieces and 100 sentinels; 28 only fill it up."""
    return 32_100 if published == 32_128 else published


def published_names(model: T5) -> dict[str, str]:
    """Our parameter name -> the published one, for every tensor but `rq`, which no published file has."""
    names = {"word": "shared.weight"} | ({} if model.config.tied else {"head": "lm_head.weight"})
    inner = {"w_in": "wi_0" if model.config.gated else "wi", "w_linear": "wi_1", "w_out": "wo"}
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    modules = {"self": "SelfAttention", "cross": "EncDecAttention", "ff": "DenseReluDense"}
    for stack, blocks, last in (("encoder", model.encoder, 1), ("decoder", model.decoder, 2)):
        names[f"{stack}_bias.weight"] = f"{stack}.{bias}"
        names[f"{stack}_norm.weight"] = f"{stack}.final_layer_norm.weight"
        for ours, _ in blocks.named_parameters():
            block, part, weight = ours.split(".")
            kind = part.partition("_")[0]
            layer = {"self": 0, "cross": 1, "ff": last}[kind]
            leaf = "layer_norm" if part.endswith("_norm") else f"{modules[kind]}.{inner.get(weight, weight)}"
            names[f"{stack}.{ours}"] = f"{stack}.block.{block}.layer.{layer}.{leaf}.weight"
    return names


def load_published(model: T5, tensors: dict[str, Tensor]) -> None:
    """Copies published tensors into the model; raises ValueError if one is missing, unknown or of another shape."""
    names = dict.fromkeys(COPIES, "word") | {theirs: ours for ours, theirs in published_names(model).items()}
    tables = [tensors[theirs] for theirs, ours in names.items() if ours == "word" and theirs in tensors]
    if not all(torch.equal(table, tables[0]) for table in tables):
        raise ValueError("published weights: a copy of the word table differs from shared.weight")
    known = {names.get(name, name): value[: our_rows(len(value))] for name, value in tensors.items()}
    known.pop(STRAY, None)
    try:
        model.load_state_dict(known | {"rq": model.rq})
    except RuntimeError as error:
        raise ValueError(f"published weights: {' '.join(str(error).split())[:400]}") from None


def to_published(model: T5) -> dict[str, Tensor]:
    """The model's tensors, but for `rq`, under their published names; tables of words stay without the padding."""
    return {theirs: model.get_parameter(ours).detach() for ours, theirs in published_names(model).items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The float tensors of a .safetensors file: 8 bytes of header length, a JSON header, raw little-endian data.

    They are views of the mapped file, which writes to them do not reach. Raises errors of many kinds where it is cut.
    """
    types, tensors = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}, {}
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    body = 8 + int.from_bytes(data[:8], "little")
    for name, item in json.loads(bytes(data[8:body])).items():
        if name != "__metadata__":
            start, end = item["data_offsets"]
            flat = torch.frombuffer(data[body + start : body + end], dtype=types[item["dtype"]])
            tensors[name] = flat.reshape(item["shape"])  # raises where bytes are missing
    return tensors


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a published T5: views of its file, but for the format that torch wrote before 2020."""
    paths = [folder / name for name in WEIGHTS]
    path = next(filter(Path.is_file, paths), paths[-1])
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not all(value.dim() for value in tensors.values()):
            raise ValueError("a number in place of a tensor")
        return tensors
    except Exception as error:  # torch's are of all kinds
        raise ValueError(f"{path}: not a whole file of tensors ({error!r:.99}); fetch it again") from None


def kind_of_t5(given: dict) -> dict[str, bool]:
    """`gated` and `tied` from a published config.json, where keys may be missing; ValueError for another network.

    Old files tell by `tie_word_embeddings` whether the head is tied, with its D^-1/2 scale; newer ones may set it to
    true even for v1.1 and tell by `scale_decoder_outputs`.
    """
    name, tied = given.get("feed_forward_proj", "relu"), given.get("tie_word_embeddings", True)
    activation = {"relu": "relu", "gated-gelu": "gelu_new"}.get(name)  # gelu_new: GELU by its tanh formula
    scaled, heads = given.get("scale_decoder_outputs", tied), ((True, True), (False, False), (True, False))
    if given.get("dense_act_fn", activation) != activation or not activation or (tied, scaled) not in heads:
        keys = ("feed_forward_proj", "dense_act_fn", "tie_word_embeddings", "scale_decoder_outputs")
        raise ValueError(", ".join(f"{key}={given[key]!r}" for key in keys if key in given))
    return {"gated": name == "gated-gelu", "tied": scaled}


def read_shape(
    folder: Path, codebooks: int, centroids: int, dropout: float | None = None
) -> tuple[T5Config, dict]:
    """The shape of a T5 v1.0 or v1.1 from `config.json`, and what that file holds.

    Raises ValueError where the file is missing or of another network.
    """
    path = folder / "config.json"
    try:
        given = json.loads(path.read_text())
        return T5Config(
            vocab=our_rows(given["vocab_size"]), width=given["d_model"], head_width=given["d_kv"],
            heads=given["num_heads"], feed_forward=given["d_ff"], encoder_blocks=given["num_layers"],
            decoder_blocks=given.get("num_decoder_layers") or given["num_layers"], **kind_of_t5(given),
            buckets=given["relative_attention_num_buckets"], codebooks=codebooks, centroids=centroids,
            max_distance=given.get("relative_attention_max_distance", 128),
            dropout=given["dropout_rate"] if dropout is None else dropout,
        ), given  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the config of a T5 v1.0 or v1.1 ({error})") from None


def read_published(folder: Path, codebooks: int, centroids: int, dropout: float | None = None) -> T5:
    """A T5 v1.0 or v1.1 from `config.json` and `model.safetensors` or `pytorch_model.bin`, its docid table random.

    Raises ValueError where a file or tensor is missing, unknown or of another shape, or the network is not t5.py's.
    """
    config, given = read_shape(folder, codebooks, centroids, dropout)
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


# -------------------------------------------------------------------------------- without a file: LSA of texts


def pieces_of(documents: Tokens, vocab: int) -> tuple[Tensor, Tensor]:
    """Each pair of a document and a piece in it, documents ascending, then pieces (2, P); its occurrences (P,)."""
    pairs, counts = [], []
    for rows in torch.arange(len(documents)).split(4096):  # few, so that no N * S numbers are held
        ids = documents.batch(rows)
        pair, count = (rows[:, None] * vocab + ids)[ids > 0].unique(return_counts=True)
        pairs.append(torch.stack([pair // vocab, pair % vocab]))
        counts.append(count.float())
    return torch.cat(pairs, 1), torch.cat(counts)


@torch.no_grad()
def start_from_lsa(model: T5, documents: Tensor | Tokens) -> None:
    """Starts a T5 that has no published weights as a latent semantic index of documents, padded (N, S) or a store. Ours.

    Each word row is its row of the truncated SVD of their TF-IDF matrix (N, V), to standard deviation `std`; the last of
    the D columns holds ln(idf). The first decoder block's cross-attention looks that column up, so that it weights words
    by idf, and passes their sum on (O = gain * V^T, V orthogonal). All other sub-layers start small (`residual`). The
    dense representation is then the idf-weighted mean of the words' rows: retrieval works from step 0.
    """
    std, residual, gain = 0.5, 0.1, 4.0
    width, vocab = model.config.width, model.config.vocab
    documents = documents if isinstance(documents, Tokens) else Tokens.of(documents)
    places, counts = pieces_of(documents, vocab)  # sparse: N * V numbers may not fit into memory
    idf = torch.log((1 + len(documents)) / (1 + places[1].bincount(minlength=vocab)))  # (V,)
    weight = counts.log1p() * idf[places[1]]
    norm = torch.zeros(len(documents)).index_add_(0, places[0], weight**2).sqrt().clamp(min=1e-12)
    weight /= norm[places[0]]
    shape = len(documents), vocab
    tf_idf = torch.sparse_coo_tensor(places, weight, shape, check_invariants=True, is_coalesced=True)
    dimensions = min(width - 1, *shape)
    _, s, v = torch.svd_lowrank(tf_idf, q=dimensions, niter=4)
    word = torch.randn(vocab, width) * 1e-4  # direction of the words that D_0 lacks
    word[:, :dimensions] += v * s.sqrt()
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
