"""Downloads from a scripted server on this machine: whole or not at all, whatever the network does."""

import contextlib
import errno
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import download
from download import describe, fetch, fetch_t5, require_https, verify

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`, does what `faults` says of a path, and notes each request as (method, path, range)."""

    files: dict[str, bytes]
    faults: dict[str, dict]
    seen: list

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        fault, asked = self.faults.get(self.path, {}), self.headers.get("Range")
        self.seen.append((self.command, self.path, asked))
        if "redirect" in fault:
            self.send_response(fault.get("status", 302))
            self.send_header("Location", fault["redirect"])
            return self.finish_headers(fault)
        content = self.files.get(self.path)
        if content is None or "status" in fault:
            self.send_response(fault.get("status", 404))
            return self.finish_headers(fault)
        begin, status = 0, 200
        if asked and not fault.get("ignores_range"):
            begin, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
            if begin >= len(content):
                self.send_response(416)
                return self.finish_headers(fault)
        begin -= fault.get("early", 0) if status == 206 else 0
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        if not fault.get("no_length"):
            self.send_header("Content-Length", str(len(content) - begin))
        self.finish_headers(fault)
        with contextlib.suppress(ConnectionError):  # a client may refuse what it sees in the header
            self.wfile.write(content[begin : begin + fault.get("cut", len(content))] if body else b"")

    def finish_headers(self, fault: dict):
        for name, value in fault.get("headers", {}).items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def web(monkeypatch):
    """A server on this machine: files, faults and seen to script and to look at, url to reach it by."""
    monkeypatch.setenv("no_proxy", "*")
    handler = type("Scripted", (Server,), {"files": {"/f": CONTENT}, "faults": {}, "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield SimpleNamespace(
        url=f"http://127.0.0.1:{server.server_port}",
        files=handler.files,
        faults=handler.faults,
        seen=handler.seen,
    )
    server.shutdown()
    thread.join()
    server.server_close()


def quiet(line: str) -> None:
    pass


def part_of(path: Path, content: bytes) -> Path:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    return part


# --------------------------------------------------------------------------------------------------- one file


@pytest.mark.parametrize(
    "digest", [{}, {"sha256": SHA256}, {"size": len(CONTENT)}, {"git_blob": git_blob(CONTENT)}]
)
def test_a_file_arrives_whole_and_leaves_no_part(web, tmp_path, digest):
    path = fetch(f"{web.url}/f", tmp_path / "new" / "f", **digest, log=quiet)
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["f"]
    assert web.seen == [("GET", "/f", None)]


def test_an_empty_file_arrives_too(web, tmp_path):
    web.files["/f"] = b""
    assert fetch(
        f"{web.url}/f", tmp_path / "f", size=0, sha256=hashlib.sha256().hexdigest(), log=quiet
    ).exists()


def test_a_file_that_is_there_is_checked_and_used_without_the_server(web, tmp_path):
    (tmp_path / "f").write_bytes(CONTENT)
    assert (
        fetch("https://nowhere.invalid/f", tmp_path / "f", sha256=SHA256, log=quiet).read_bytes() == CONTENT
    )
    (tmp_path / "f").write_bytes(b"other")
    with pytest.raises(ValueError, match=rf"found sha256 .*, wanted {SHA256}; delete that file"):
        fetch(f"{web.url}/f", tmp_path / "f", sha256=SHA256, log=quiet)
    assert (tmp_path / "f").read_bytes() == b"other" and web.seen == []


@pytest.mark.parametrize("begin", [1, 1000, len(CONTENT) - 1])
def test_a_part_is_continued_where_it_stopped(web, tmp_path, begin):
    part_of(tmp_path / "f", CONTENT[:begin])
    assert fetch(f"{web.url}/f", tmp_path / "f", sha256=SHA256, log=quiet).read_bytes() == CONTENT
    assert web.seen == [("GET", "/f", f"bytes={begin}-")]


def test_a_part_that_no_digest_can_tell_from_another_files_is_not_continued(web, tmp_path):
    part_of(tmp_path / "f", b"x" * 1000)
    assert fetch(f"{web.url}/f", tmp_path / "f", size=len(CONTENT), log=quiet).read_bytes() == CONTENT
    assert web.seen == [("GET", "/f", None)]


@pytest.mark.parametrize("fault", [{"ignores_range": True}, {"early": 10}])
def test_a_server_that_sends_another_range_is_asked_for_all(web, tmp_path, fault):
    web.faults["/f"] = fault
    part_of(tmp_path / "f", CONTENT[:1000])
    assert fetch(f"{web.url}/f", tmp_path / "f", sha256=SHA256, log=quiet).read_bytes() == CONTENT


def test_a_part_that_is_whole_needs_no_transfer(web, tmp_path):
    part_of(tmp_path / "f", CONTENT)
    fetch("https://nowhere.invalid/f", tmp_path / "f", sha256=SHA256, size=len(CONTENT), log=quiet)
    part_of(tmp_path / "g", CONTENT)
    web.files["/g"] = CONTENT
    fetch(f"{web.url}/g", tmp_path / "g", sha256=SHA256, log=quiet)  # the server answers 416
    assert web.seen == [("GET", "/g", f"bytes={len(CONTENT)}-")]
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes() == CONTENT


@pytest.mark.parametrize("wrong", [b"x" * len(CONTENT), CONTENT + b"more"])
def test_a_part_that_ends_where_the_file_does_but_differs_is_fetched_anew(web, tmp_path, wrong):
    part_of(tmp_path / "f", wrong)
    assert fetch(f"{web.url}/f", tmp_path / "f", sha256=SHA256, log=quiet).read_bytes() == CONTENT
    assert [asked for _, _, asked in web.seen] == [f"bytes={len(wrong)}-", None]


@pytest.mark.parametrize("no_length", [False, True])
def test_a_transfer_that_breaks_off_is_no_file_and_goes_on_the_next_time(web, tmp_path, no_length):
    web.faults["/f"] = {"cut": 300_000, "no_length": no_length}
    known = {"sha256": SHA256} | ({"size": len(CONTENT)} if no_length else {})
    with pytest.raises(ValueError, match=r"broke off after 300,000 of 1,024,000 bytes\); run again"):
        fetch(f"{web.url}/f", tmp_path / "f", **known, log=quiet)
    assert not (tmp_path / "f").exists() and (tmp_path / "f.part").read_bytes() == CONTENT[:300_000]
    web.faults.clear()
    assert fetch(f"{web.url}/f", tmp_path / "f", **known, log=quiet).read_bytes() == CONTENT
    assert web.seen[-1] == ("GET", "/f", "bytes=300000-")


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"sha256": "0" * 64}, f"found sha256 {SHA256}, wanted {'0' * 64}"),
        ({"md5": "0" * 32}, f"found md5 {hashlib.md5(CONTENT).hexdigest()}, wanted {'0' * 32}"),
        ({"git_blob": "0" * 40}, f"found git blob id {git_blob(CONTENT)}, wanted {'0' * 40}"),
    ],
)
def test_wrong_content_is_deleted_and_told(web, tmp_path, wanted, message):
    with pytest.raises(ValueError, match=message + ".*deleted it: run again"):
        fetch(f"{web.url}/f", tmp_path / "f", **wanted, log=quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_another_file_is_found_out_and_deleted(web, tmp_path):
    part_of(tmp_path / "f", b"x" * 1000)
    with pytest.raises(ValueError, match="found sha256"):
        fetch(f"{web.url}/f", tmp_path / "f", sha256=SHA256, log=quiet)
    assert list(tmp_path.iterdir()) == []
    assert fetch(f"{web.url}/f", tmp_path / "f", sha256=SHA256, log=quiet).read_bytes() == CONTENT


def test_a_server_that_offers_another_size_is_refused_before_the_transfer(web, tmp_path):
    part_of(tmp_path / "f", CONTENT[:1000])
    with pytest.raises(ValueError, match="offers 1,024,000 bytes, wanted 5,000"):
        fetch(f"{web.url}/f", tmp_path / "f", size=5000, sha256=SHA256, log=quiet)
    assert (tmp_path / "f.part").read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("status", [404, 403, 500])
def test_no_network_tells_what_to_fetch_and_where_to_place_it(web, tmp_path, status):
    part_of(tmp_path / "f", CONTENT[:1000])
    web.faults["/f"] = {"status": status}
    for url, reason in ((f"{web.url}/f", f"HTTP Error {status}"), ("http://127.0.0.1:1/f", "refused")):
        with pytest.raises(ValueError) as error:
            fetch(url, tmp_path / "f", sha256=SHA256, log=quiet)
        assert url in str(error.value) and reason in str(error.value)
        assert f"place it at {tmp_path / 'f'}" in str(error.value)
    assert (tmp_path / "f.part").read_bytes() == CONTENT[:1000]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_told_with_the_folder_and_the_bytes_wanted(web, tmp_path):
    (tmp_path / "f.part").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=rf"{tmp_path}: the disk is full; f has 1,024,000 bytes"):
        fetch(f"{web.url}/f", tmp_path / "f", sha256=SHA256, log=quiet)
    assert not (tmp_path / "f").exists()


def test_a_folder_that_cannot_be_written_is_not_called_a_network_failure(web, tmp_path):
    (tmp_path / "f.part").mkdir()
    with pytest.raises(ValueError, match=rf"f.part: cannot be written .*Errno {errno.EISDIR}"):
        fetch(f"{web.url}/f", tmp_path / "f", log=quiet)


@pytest.mark.parametrize("url", ["http://example.org/f", "ftp://127.0.0.1/f", "file:///etc/hosts", "f", ""])
def test_only_https_is_spoken_but_on_this_machine(url, web, tmp_path):
    with pytest.raises(ValueError, match="https://"):
        fetch(url, tmp_path / "f", log=quiet)
    web.faults["/f"] = {"redirect": url}
    if "//" in url:
        with pytest.raises(ValueError, match="https://|not allowed"):
            fetch(f"{web.url}/f", tmp_path / "f", log=quiet)
    require_https("https://example.org/f")
    require_https("http://localhost:8000/f")


def test_a_redirect_is_followed_with_the_range(web, tmp_path):
    web.faults["/here"] = {"redirect": f"{web.url}/f"}
    part_of(tmp_path / "f", CONTENT[:1000])
    assert fetch(f"{web.url}/here", tmp_path / "f", sha256=SHA256, log=quiet).read_bytes() == CONTENT
    assert web.seen == [("GET", "/here", "bytes=1000-"), ("GET", "/f", "bytes=1000-")]


def test_progress_is_told_by_the_clock(web, tmp_path, monkeypatch):
    lines = []
    fetch(f"{web.url}/f", tmp_path / "f", log=lines.append)
    assert lines == [f"fetching {web.url}/f: 1,024,000 bytes"]
    monkeypatch.setattr(download, "LOG_EVERY", -1)
    part_of(tmp_path / "g", CONTENT[:24_000])
    web.files["/g"] = CONTENT
    fetch(f"{web.url}/g", tmp_path / "g", sha256=SHA256, log=lines.append)
    assert "of which 24,000 are here" in lines[1] and lines[-1] == "g: 1,024,000 of 1,024,000 bytes"


def test_verify_by_known_digests(tmp_path):
    path = tmp_path / "hello"
    path.write_bytes(b"hello\n")
    good = dict(
        size=6,
        sha256="5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
        md5="b1946ac92492d2347c6235b4d2611184",
        git_blob="ce013625030ba8dba906f756967f9e9ca394464a",  # what `git hash-object` says
    )
    verify(path, **good)
    verify(path, sha256=good["sha256"].upper())
    for name in good:
        with pytest.raises(ValueError, match="hello: found .*, wanted"):
            verify(path, **good | {name: 7 if name == "size" else "0" * len(good[name])})


# ---------------------------------------------------------------------------------------------------- T5 files

FILES = {
    "config.json": b'{"d_model": 12}\n',
    "spiece.model": b"pieces" * 99,
    "model.safetensors": b"weights" * 5000,
}


def hub(web, name: str, files: dict[str, bytes]) -> None:
    """Puts a model on the server as the hub does: large files lie elsewhere, behind a redirect that tells."""
    for file, content in files.items():
        path = f"/{name}/resolve/main/{file}"
        if file == "config.json":
            web.files[path], web.faults[path] = content, {"headers": {"ETag": f'"{git_blob(content)}"'}}
        else:
            web.files[f"/elsewhere/{name}/{file}"] = content
            told = {
                "X-Linked-Size": len(content),
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            }
            web.faults[path] = {"redirect": f"{web.url}/elsewhere/{name}/{file}", "headers": told}
            web.faults[f"/elsewhere/{name}/{file}"] = {"headers": {"ETag": '"an etag of the store"'}}


def test_a_t5_is_fetched_once_and_then_used_without_a_network(web, tmp_path):
    hub(web, "some/t5", FILES)
    home = fetch_t5("some/t5", tmp_path, web.url, quiet)
    assert home == tmp_path / "some--t5"
    assert {p.name: p.read_bytes() for p in home.iterdir() if p.name != "sources.json"} == FILES
    sources = json.loads((home / "sources.json").read_text())
    assert sources["config.json"] == {
        "url": f"{web.url}/some/t5/resolve/main/config.json",
        "size": len(FILES["config.json"]),
        "git_blob": git_blob(FILES["config.json"]),
    }
    weights = FILES["model.safetensors"]
    assert sources["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert sources["model.safetensors"]["size"] == len(weights)
    assert fetch_t5("some/t5", tmp_path, "https://nowhere.invalid", quiet) == home

    (home / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(
        ValueError, match=r"model.safetensors: found 34,999 bytes, wanted 35,000; delete that file"
    ):
        fetch_t5("some/t5", tmp_path, "https://nowhere.invalid", quiet)


def test_weights_come_as_pytorch_bin_where_there_are_no_safetensors(web, tmp_path):
    files = dict(FILES)
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    hub(web, "some/t5", files)
    home = fetch_t5("some/t5", tmp_path, web.url, quiet)
    assert {p.name for p in home.iterdir()} == {*files, "sources.json"}


def test_only_what_is_missing_is_fetched(web, tmp_path):
    hub(web, "some/t5", FILES)
    web.faults["/elsewhere/some/t5/model.safetensors"]["cut"] = 20_000
    with pytest.raises(ValueError, match="broke off"):
        fetch_t5("some/t5", tmp_path, web.url, quiet)
    del web.faults["/elsewhere/some/t5/model.safetensors"]["cut"]
    web.seen.clear()
    home = fetch_t5("some/t5", tmp_path, web.url, quiet)
    assert (home / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert {path.split("/")[-1] for _, path, _ in web.seen} == {"model.safetensors"}
    assert web.seen[-1] == ("GET", "/elsewhere/some/t5/model.safetensors", "bytes=20000-")


def test_files_placed_by_hand_are_used(tmp_path):
    home = tmp_path / "some--t5"
    home.mkdir()
    for file, content in FILES.items():
        (home / file).write_bytes(content)
    assert fetch_t5("some/t5", tmp_path, "https://nowhere.invalid", quiet) == home


@pytest.mark.parametrize("name", ["google-t5/t5-base", "google/t5-v1_1-xl"])
def test_the_pieces_of_a_published_t5_are_known(web, tmp_path, name):
    hub(web, name, FILES)
    with pytest.raises(ValueError, match=rf"spiece.model.part: found sha256 .*, wanted {download.T5_PIECES}"):
        fetch_t5(name, tmp_path, web.url, quiet)
    home = tmp_path / name.replace("/", "--")
    assert not (home / "spiece.model").exists()
    for file, content in FILES.items():
        (home / file).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"spiece.model: found .*, wanted {download.T5_PIECES}; delete that file"
    ):
        fetch_t5(name, tmp_path, web.url, quiet)


def test_content_that_the_hub_did_not_announce_is_refused(web, tmp_path):
    hub(web, "some/t5", FILES)
    web.files["/some/t5/resolve/main/config.json"] = b'{"d_model": 13}\n'
    with pytest.raises(ValueError, match="config.json.part: found git blob id"):
        fetch_t5("some/t5", tmp_path, web.url, quiet)
    assert not (tmp_path / "some--t5" / "config.json").exists()


def test_what_the_hub_lacks_is_named(web, tmp_path):
    hub(web, "some/t5", {name: FILES[name] for name in ("config.json", "spiece.model")})
    with pytest.raises(ValueError, match=r"found none of model.safetensors, pytorch_model.bin at .*/some/t5"):
        fetch_t5("some/t5", tmp_path, web.url, quiet)


def test_a_folder_that_lacks_a_file_needs_a_network_and_says_which(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    wanted = tmp_path / "some--t5" / "config.json"
    with pytest.raises(
        ValueError, match=f"http://127.0.0.1:1/some/t5/resolve/main/config.json .*place it at {wanted}"
    ):
        fetch_t5("some/t5", tmp_path, "http://127.0.0.1:1", quiet)


@pytest.mark.parametrize("name", ["", "/etc", "../t5", "a/b/c", "google-t5/..", "a b/c", "a/b?c"])
def test_a_name_that_is_none_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="wanted a name such as google-t5/t5-base"):
        fetch_t5(name, tmp_path, "http://127.0.0.1:1", quiet)


def test_broken_sources_are_named(tmp_path):
    (tmp_path / "a--b").mkdir()
    for text in ("{", "[]", '{"config.json": 3}'):
        (tmp_path / "a--b" / "sources.json").write_text(text)
        with pytest.raises(ValueError, match=r"sources.json: cannot be read .*delete it"):
            fetch_t5("a/b", tmp_path, "http://127.0.0.1:1", quiet)


BLOB, SUM = "a" * 40, "b" * 64


@pytest.mark.parametrize(
    "fault, told",
    [
        ({"redirect": "https://nowhere.invalid/", "headers": {"X-Linked-Etag": f'"{SUM}"', "X-Linked-Size": 7}}, {"size": 7, "sha256": SUM}),
        ({"redirect": "/f", "status": 307, "headers": {"X-Linked-Etag": BLOB}}, {"git_blob": BLOB}),
        ({"redirect": "/tagged", "status": 307}, {"size": 3, "git_blob": BLOB}),  # a model that was renamed
        ({"headers": {"ETag": f'W/"{BLOB}"'}}, {"size": 3, "git_blob": BLOB}),
        ({"headers": {"ETag": '"5d41402abc4b2a76b9719d911017c592"'}}, {"size": 3}),
        ({"status": 404}, None),
    ],
)  # fmt: skip
def test_describe_reads_what_the_hub_tells_of_a_file(web, tmp_path, fault, told):
    web.files |= {"/x": b"abc", "/tagged": b"abc"}
    web.faults |= {"/x": fault, "/tagged": {"headers": {"ETag": f'"{BLOB}"'}}}
    assert describe(f"{web.url}/x", tmp_path / "x") == told
    assert all(method == "HEAD" for method, _, _ in web.seen)
