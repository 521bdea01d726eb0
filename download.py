"""A file from an HTTPS server arrives whole or not at all.

Paper    none; appendix C starts from a published T5, and NQ320k is made from published files
In       the address of a file and what is known of it (size, sha256, md5, git blob id); the name of a T5
Out      the file at its place, checked; a folder with a T5's config.json, spiece.model and weights
Next     t5.read_published() reads the folder
Differs  the released code leaves this to a hub client. Here a transfer that broke off goes on where it
         stopped, and what is complete is used without a network.
"""

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

HUB = "https://huggingface.co"
CACHE = Path(__file__).parent / "data" / "t5"  # of hub models
AGENT = {"User-Agent": "mixlora-dsi"}
CHUNK = 1 << 20  # bytes read at a time
PATIENCE = 60  # seconds without a byte, after which the server counts as gone
LOG_EVERY = 10  # seconds between two lines about a transfer

T5_FILES = (("config.json",), ("spiece.model",), ("model.safetensors", "pytorch_model.bin"))  # one of each
# All T5 v1.0 and v1.1 share one SentencePiece model.
T5_PIECES = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
SHARE_PIECES = ("google-t5/", "google/t5-v1_1")

# -------------------------------------------------------------------------------------------------- the checks


def verify(
    path: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    git_blob: str | None = None,
    size: int | None = None,
) -> None:
    """Raises ValueError where the file has another size or digest; what is None is not checked.

    A git blob id is the sha1 of b"blob <size>", a zero byte and the content.
    """
    found = Path(path).stat().st_size
    if size is not None and found != size:
        raise ValueError(f"{path}: found {found:,} bytes, wanted {size:,}")
    blob = hashlib.sha1(b"blob %d\0" % found, usedforsecurity=False)
    every = (
        ("sha256", sha256, hashlib.sha256()),
        ("md5", md5, hashlib.md5(usedforsecurity=False)),
        ("git blob id", git_blob, blob),
    )
    checks = [check for check in every if check[1]]
    with open(path, "rb") as file:
        while checks and (chunk := file.read(CHUNK)):
            for _, _, digest in checks:
                digest.update(chunk)
    for name, wanted, digest in checks:
        if digest.hexdigest() != wanted.lower():
            raise ValueError(f"{path}: found {name} {digest.hexdigest()}, wanted {wanted}")


def require_https(url: str) -> None:
    """Raises ValueError for any address but https, or http on this machine."""
    parts = urlsplit(url)
    if parts.scheme != "https" and (parts.scheme, parts.hostname) not in (
        ("http", "localhost"),
        ("http", "127.0.0.1"),
    ):
        raise ValueError(f"found {url}, wanted an address that starts with https://")


# ------------------------------------------------------------------------------------------------- the network


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only and, asked for the header, stops at the answer that describes a file."""

    def redirect_request(self, request, file, code, message, headers, url):
        require_https(url)
        if request.get_method() == "HEAD" and headers.get("X-Linked-Etag"):
            return None  # urllib then raises the answer as an HTTPError
        again = super().redirect_request(request, file, code, message, headers, url)
        again.method = request.get_method()
        return again


def unreachable(url: str, path: Path, reason: object) -> ValueError:
    return ValueError(
        f"{url} cannot be fetched ({reason}); run again to go on, or fetch it on another machine and place it "
        f"at {Path(path).resolve()}"
    )


def ask(url: str, method: str = "GET", begin: int = 0):
    """The server's answer, from byte `begin` on if the server can. Raises OSError or HTTPException."""
    headers = AGENT | ({"Range": f"bytes={begin}-"} if begin else {})
    request = urllib.request.Request(url, headers=headers, method=method)
    return urllib.request.build_opener(Redirects).open(request, timeout=PATIENCE)


def pieces(answer, url: str, path: Path) -> Iterator[bytes]:
    """The body of an answer, in chunks. Raises ValueError when the network fails."""
    while True:
        try:
            chunk = answer.read(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise unreachable(url, path, error) from None
        if not chunk:
            return
        yield chunk


def open_from(url: str, path: Path, begin: int):
    """(answer, the byte it begins at), or (None, begin) where the server has nothing after `begin`.

    Raises ValueError when the network fails.
    """
    try:
        answer = ask(url, begin=begin)
        span = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if answer.status == 206 and not (span and int(span[1]) == begin):
            answer.close()
            return ask(url), 0  # another range than wanted: all of it
        return answer, begin if answer.status == 206 else 0
    except urllib.error.HTTPError as error:
        error.close()
        if begin and error.code == 416:
            return None, begin
        raise unreachable(url, path, error) from None
    except (OSError, http.client.HTTPException) as error:
        raise unreachable(url, path, error) from None


def transfer(answer, begin: int, url: str, path: Path, part: Path, size: int | None, log: Callable) -> None:
    """Writes the answer into `part` from byte `begin` on.

    Raises ValueError when the network fails or breaks off, or the folder takes no more: what came stays in
    `part`.
    """
    length = answer.headers.get("Content-Length")
    total = begin + int(length) if length else size
    if size is not None and total != size:
        raise ValueError(f"{url}: the server offers {total:,} bytes, wanted {size:,}")
    whole = f"{total:,}" if total is not None else "an unknown number of"
    log(f"fetching {url}: {whole} bytes" + (f", of which {begin:,} are here" if begin else ""))
    done, spoke = begin, time.monotonic()
    try:
        with open(part, "ab" if begin else "wb") as file:
            for chunk in pieces(answer, url, path):
                file.write(chunk)
                done += len(chunk)
                if time.monotonic() - spoke > LOG_EVERY:
                    log(f"{path.name}: {done:,} of {whole} bytes")
                    spoke = time.monotonic()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"{part}: cannot be written ({error})") from None
        free = shutil.disk_usage(path.parent).free
        raise ValueError(
            f"{path.parent}: the disk is full; {path.name} has {whole} bytes, {free:,} are free; make room and "
            "run again"
        ) from None
    if total is not None and done < total:
        raise unreachable(url, path, f"it broke off after {done:,} of {total:,} bytes")


def receive(url: str, path: Path, part: Path, wanted: dict, log: Callable) -> None:
    """Completes `part`, from where an earlier call left it if a digest is wanted. Raises as `transfer` does."""
    size, checkable = wanted["size"], any(wanted[name] for name in ("sha256", "md5", "git_blob"))
    begin = part.stat().st_size if checkable and part.exists() else 0
    if begin and begin == size:
        return
    answer, begin = open_from(url, path, begin)
    if answer is None:  # the part is as long as the file, or longer
        try:
            return verify(part, **wanted)
        except ValueError:
            answer, begin = open_from(url, path, 0)
    with answer:
        transfer(answer, begin, url, path, part, size, log)


def fetch(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    git_blob: str | None = None,
    size: int | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """The file at `url`, at `path`: whole and with the wanted size and digests, or not at all.

    A file that is there is checked and used. One that is not grows as `path`.part and gets its name once it is
    checked; a part left by an earlier call is continued where a digest will tell whether the two belong
    together, and fetched anew otherwise.
    Raises ValueError that says what to do when the network fails, the disk is full or a check fails.
    """
    path = Path(path)
    wanted = dict(sha256=sha256, md5=md5, git_blob=git_blob, size=size)
    if path.exists():
        try:
            verify(path, **wanted)
        except ValueError as error:
            raise ValueError(f"{error}; delete that file and run again") from None
        return path
    require_https(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    receive(url, path, part, wanted, log)
    try:
        verify(part, **wanted)
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{error}; deleted it: run again, and if this returns, {url} has changed") from None
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    return path


# ---------------------------------------------------------------------------------------------------- T5 files


def describe(url: str, path: Path) -> dict | None:
    """What a hub says of a file before it sends it: `size` and `sha256` or `git_blob`, as far as it tells.

    Large files lie elsewhere, and the redirect there carries X-Linked-Size and X-Linked-Etag. An etag of 64
    hexadecimal digits is a sha256, one of 40 a git blob id; others mean nothing to us.
    Returns None where there is no such file; raises ValueError when the network fails.
    """
    try:
        with ask(url, "HEAD") as answer:
            status, headers, here = answer.status, answer.headers, answer.url
    except urllib.error.HTTPError as error:
        status, headers, here = error.code, error.headers, url
        error.close()
        if status == 404:
            return None
        if not 300 <= status < 400:
            raise unreachable(url, path, error) from None
    except (OSError, http.client.HTTPException) as error:
        raise unreachable(url, path, error) from None
    size, etag = headers.get("X-Linked-Size"), headers.get("X-Linked-Etag")
    if (
        status == 200 and urlsplit(here).netloc == urlsplit(url).netloc
    ):  # the hub itself, not where it keeps files
        size, etag = size or headers.get("Content-Length"), etag or headers.get("ETag")
    told = {"size": int(size)} if size else {}
    digest = re.fullmatch(r'(?:W/)?"?([0-9a-f]{64}|[0-9a-f]{40})"?', etag or "")
    return told | ({"sha256" if len(digest[1]) == 64 else "git_blob": digest[1]} if digest else {})


def read_sources(path: Path) -> dict[str, dict]:
    """File name -> its url, size and digest, as an earlier call wrote them; empty where there was none."""
    if not path.exists():
        return {}
    try:
        sources = json.loads(path.read_text())
        return {name: dict(item) for name, item in sources.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete it and run again") from None


def write_sources(path: Path, sources: dict[str, dict]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(sources, indent=1) + "\n")
    os.replace(part, path)


def fetch_t5(name: str, folder: Path, base: str = HUB, log: Callable[[str], None] = print) -> Path:
    """The folder of a hub's T5, such as google-t5/t5-base: config.json, spiece.model and its weights.

    What is there is used, if it has the size that sources.json tells; no network is needed when nothing is
    missing. The weights are model.safetensors or, where a model has none, pytorch_model.bin.
    Raises ValueError that says what to do, as `fetch` does.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"found {name!r}, wanted a name such as google-t5/t5-base")
    home = Path(folder) / name.replace("/", "--")
    sources = read_sources(home / "sources.json")
    for choices in T5_FILES:
        known = (
            {"sha256": T5_PIECES} if choices == ("spiece.model",) and name.startswith(SHARE_PIECES) else {}
        )
        here = next((choice for choice in choices if (home / choice).exists()), None)
        if here:
            told = {"size": sources.get(here, {}).get("size")}
            fetch(f"{base}/{name}/resolve/main/{here}", home / here, **told | known, log=log)
            continue
        for choice in choices:
            url = f"{base}/{name}/resolve/main/{choice}"
            require_https(url)
            told = describe(url, home / choice)
            if told is not None:
                break
        else:
            raise ValueError(f"found none of {', '.join(choices)} at {base}/{name}")
        told |= known
        home.mkdir(parents=True, exist_ok=True)
        sources[choice] = {"url": url} | told
        write_sources(home / "sources.json", sources)
        fetch(url, home / choice, **told, log=log)
    return home


def find_t5(given: str, cache: Path = CACHE, log: Callable[[str], None] = print) -> Path:
    """The folder of a T5's files: a folder that is given, or the copy in `cache` of a hub model `owner/model`."""
    if Path(given).is_dir() or given.count("/") != 1 or given.startswith((".", "/")):
        return Path(given)
    return fetch_t5(given, cache, log=log)
