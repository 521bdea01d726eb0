"""The page's way of a query against the search itself; its server against ten clients, malformed and hostile requests; and
the page in headless Chromium, as a person uses it.
"""

import http.client
import json
import re
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlencode

import pytest
import torch
from conftest import link_tree

import arrays
import dense
import ood
import search
import serve
from data import tokenize
from index import Index
from mixlora import mixed_layers
from t5 import segment_logits

QUERY = "commona rfoma commonb"


@pytest.fixture(scope="module")
def index(finished) -> Index:
    return Index.open(finished)


@pytest.fixture(scope="module")
def traced(index) -> dict:
    return json.loads(json.dumps(serve.trace(index, QUERY)))


def ids_of(index: Index):
    return tokenize(index.run.tokenizer, [QUERY], index.run.config["query_length"])


def prefix(steps: list[dict], m: int, place: int) -> list[int]:
    """The codes of a beam of step m, found by its parents."""
    codes = []
    for step in steps[m::-1]:
        codes.insert(0, step["beams"][place]["code"])
        place = step["beams"][place]["parent"]
    return codes


# ---------------------------------------------------------------------------------------------- the way of a query


def test_steps_end_where_beam_search_ends(index):
    ids, beam = ids_of(index), index.run.config["beam"]
    steps, leaves, scores = serve.beams(index.model, index.trie, ids, beam)
    expected = search.beam_search(index.model, index.trie, ids, beam)
    n = len(leaves)
    assert torch.equal(leaves, expected[0][0, :n]) and torch.allclose(scores, expected[1][0, :n])
    assert not (expected[1][0, n:] > -torch.inf).any()
    for place, (first, _) in enumerate(leaves.tolist()):
        assert prefix(steps, len(steps) - 1, place) == index.trie.rows[first].tolist()


def test_documents_are_those_of_the_index(index, traced):
    hits = index.search(QUERY, serve.SHOWN)
    assert [(d["id"], d["title"]) for d in traced["documents"]] == [(hit.id, hit.title) for hit in hits]
    assert [d["score"] for d in traced["documents"]] == pytest.approx([hit.score for hit in hits])


def test_probabilities_along_a_way_make_its_score(traced):
    for document, way in zip(traced["documents"], traced["ways"]):
        assert document["docid"] == way["docid"]
        p = [{c["code"]: c["p"] for c in step["codes"]}[k] for k, step in zip(way["docid"], way["steps"])]
        assert torch.tensor(p).log().sum().item() == pytest.approx(document["score"], abs=1e-4)


@torch.no_grad()
def test_codes_outside_the_trie_are_likely_and_of_no_document(index, traced):
    source, padding = index.model.encode(ids_of(index))
    held = {tuple(row[: m + 1]) for row in index.trie.rows.tolist() for m in range(len(row))}
    n_outside = 0
    for m, step in enumerate(traced["steps"]):
        for item in step["outside"]:
            before = prefix(traced["steps"], m - 1, item["parent"]) if m else []
            assert (*before, item["code"]) not in held
            hidden, _ = index.model.docid_hidden(source, padding, torch.tensor([[*before, 0]]))
            log_p = segment_logits(hidden[:, -1:], index.model.rq[m : m + 1])[0, 0].log_softmax(-1)
            assert item["log_p"] == pytest.approx(log_p[item["code"]].item(), abs=1e-4)
            n_outside += 1
    assert n_outside


@torch.no_grad()
def test_gates_and_energies_are_the_model_s(index, traced):
    docids = torch.tensor([way["docid"] for way in traced["ways"]])
    _, routes = index.model.docid_hidden(*index.model.encode(ids_of(index)), docids)
    for number, (route, stats) in enumerate(zip(routes, index.stats)):
        layers = [way["layers"][number] for way in traced["ways"]]
        assert torch.allclose(torch.tensor([layer["gates"] for layer in layers]), route.gates, atol=1e-5)
        z = torch.tensor([layer["z"] for layer in layers])
        assert torch.allclose(z, ood.standardised(route.scores, stats), atol=1e-4)
        low, high = ood.known_range(stats, index.run.config["epsilon"]).tolist()
        assert traced["histograms"][number]["thresholds"] == pytest.approx([low, high])
        assert sum(traced["histograms"][number]["reference"]) == len(ood.reference(stats))


def test_experts_know_the_corpus_for_which_they_were_added(index):
    layers = serve.growth(index.run.folder)  # every layer of this run grows at every corpus
    assert [layer["added"] for layer in layers] == [["D0", "D0", "D1", "D2", "D3", "D4"]] * 2
    assert [len(layer["added"]) for layer in layers] == [len(layer) for layer in mixed_layers(index.model)]
    assert [d["expanded"] for d in layers[0]["decisions"]] == [True] * 4


def test_run_without_pooled_statistics_has_no_histogram(finished):
    index = Index.open(finished)
    for stats in index.stats:
        stats.mode = "paper_code"
    traced = serve.trace(index, QUERY)
    assert traced["histograms"] == [None, None] and traced["ways"][0]["layers"][0]["z"] is None


def test_run_without_experts_has_a_way_all_the_same(begun):
    traced = serve.trace(Index.open(begun(False)), QUERY)
    assert traced["documents"] and traced["histograms"] == [] and traced["ways"][0]["layers"] == []


# ------------------------------------------------------------------------------------------------------ the server


@contextmanager
def serving(folder):
    server = serve.Server(Index.open(folder), 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def server(finished, tmp_path_factory):
    with serving(link_tree(finished, tmp_path_factory.mktemp("served") / "run")) as server:
        yield server


def ask(server, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, bytes, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.read(), dict(response.headers)


def get(server, name: str, **values) -> tuple[int, dict]:
    status, body, _ = ask(server, "GET", f"/api/{name}?{urlencode(values)}")
    return status, json.loads(body)


def post(server, name: str, **values) -> tuple[int, dict]:
    headers = {"Content_Type": "application/json", "X_Token": server.site.token}
    status, body, _ = ask(server, "POST", f"/api/{name}", json.dumps(values).encode(), **headers)
    return status, json.loads(body)


def raw(server, content: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_ten_clients_at_once_get_right_answers(server):
    queries = [f"common{letter} query" for letter in "abcdefghij"]
    expected = [json.loads(json.dumps(serve.trace(server.site.index, query))) for query in queries]
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda query: get(server, "search", q=query), queries * 3))
    assert answers == [(200, answer) for answer in expected] * 3


def test_other_rankings_are_of_the_live_documents(server):
    status, answer = get(server, "others", q=QUERY)
    assert status == 200 and len(answer["dense"]) == serve.SHOWN and answer["bm25"][0]["title"] == "rfoma"
    assert get(server, "others", q="zzzz")[1]["bm25"] == []


def test_bi_encoder_ranks_what_is_left_by_its_own_vectors(copied):
    site = serve.Site(Index.open(copied))
    run, answers = site.index.run, site.others(QUERY)["dense"]
    vectors = torch.cat([arrays.open_array(copied / "embeddings" / f"{c.name}.npy") for c in run.corpora])
    (query,) = dense.embed(site.bi_encoder, ids_of(site.index))
    expected = {run.ids[row]: float(score) for row, score in enumerate(vectors @ query)}
    site.delete(run.ids[0])  # the rows of all others move up by one
    left = site.others(QUERY)["dense"]
    assert [d["id"] for d in left][:9] == [d["id"] for d in answers if d["id"] != run.ids[0]][:9]
    for d in left:
        assert d["score"] == pytest.approx(expected[d["id"]], rel=1e-4)


def test_document_has_its_text_and_dreams(server):
    (document,) = server.site.index.documents(["d12"])
    status, answer = get(server, "document", id="d12")
    assert status == 200 and (answer["id"], answer["title"], answer["text"]) == document
    assert len(answer["words"]) == serve.WORDS and len(answer["dreams"]) == serve.DREAMS
    assert answer["dreams"] != get(server, "document", id="d12", seed=1)[1]["dreams"]


def test_page_runs_its_own_script_alone(server):
    status, body, headers = ask(server, "GET", "/")
    policy, page = headers["Content-Security-Policy"], body.decode()
    nonce = re.search("script-src 'nonce-([^']+)'", policy)[1]
    assert status == 200 and policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert page.count(f'nonce="{nonce}"') == 2 and server.site.token in page and "{{" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and "innerHTML" not in page
    assert nonce not in ask(server, "GET", "/")[1].decode()


@pytest.mark.parametrize(
    "path, status",
    {
        "/api/search": 400,  # without a query
        "/api/search?q=%20": 400,
        "/api/search?q=" + 1001 * "a": 400,
        "/api/search?q=%ff": 400,
        "/api/search?q=a&k=5": 400,
        "/api/document?id=nobody": 400,
        "/api/document?id=d1&seed=-1": 400,
        "/api/add": 405,
        "/api/__init__": 404,
        "/../etc/passwd": 404,
        "/?" + 70000 * "a": 414,
    }.items(),
)
def test_wrong_requests_are_told_so(server, path, status):
    answered, body, _ = ask(server, "GET", path)
    assert answered == status and "\n" not in json.loads(body)["error"]


@pytest.mark.parametrize(
    "content",
    [
        b"\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"b" * 70000 + b"\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    ],
)
def test_malformed_requests_get_a_4xx_or_nothing(server, content):
    answer = raw(server, content)
    assert re.match(rb"HTTP/1.0 4\d\d ", answer) or (answer == b"" and not content.strip())
    assert get(server, "search", q=QUERY)[0] == 200


def test_other_hosts_and_origins_are_refused(server):
    own = f"127.0.0.1:{server.server_port}"
    for host in (
        "evil.example",
        "127.0.0.1",
        f"evil.example:{server.server_port}",
        f"127.0.0.1:{server.server_port + 1}",
    ):
        assert ask(server, "GET", "/", Host=host)[0] == 403
    for origin in ("http://evil.example", "null", f"https://{own}", "http://127.0.0.1"):
        assert ask(server, "GET", "/api/search?q=a", Origin=origin)[0] == 403
    assert (
        ask(
            server,
            "GET",
            "/",
            Host=f"localhost:{server.server_port}",
            Origin=f"http://localhost:{server.server_port}",
        )[0]
        == 200
    )
    assert raw(server, f"GET / HTTP/1.1\r\nHost: {own}\r\nHost: evil\r\n\r\n".encode()).startswith(
        b"HTTP/1.0 403"
    )
    assert server.server_address[0] == "127.0.0.1"


def test_changes_need_the_token_and_a_small_json_object(server):
    before = set(server.site.index.row_of)
    body, good = b'{"id": "d1"}', {"Content_Type": "application/json", "X_Token": server.site.token}

    def status(path="/api/delete", body=body, **headers) -> int:
        return ask(server, "POST", path, body, **(good | headers))[0]

    assert status(X_Token="") == status(X_Token="é") == status(X_Token=server.site.token[:-1]) == 403
    assert status(Origin="http://evil.example") == 403
    assert status(Content_Type="text/plain") == 415
    assert status(Content_Length="-1") == status(Content_Length="a") == 411
    assert status(body=b"", Content_Length=str(serve.BODY + 1)) == 413
    for wrong in (
        b"[]",
        b"{",
        b"[" * 100_000,
        b"\xff",
        b'{"id": 1}',
        b'{"id": "d1", "more": 1}',
        b'{"id": "\\ud800"}',
    ):
        assert status(body=wrong) == 400
    assert status("/api/add", b'{"id": "new", "title": "", "text": " "}') == 400
    assert status("/api/add", b'{"id": "d1", "title": "", "text": "held"}') == 400
    assert status("/api/search") == 405 and status("/") == 404
    assert set(server.site.index.row_of) == before


def test_taken_port_is_told_in_a_line(server, finished):
    with pytest.raises(ValueError, match=f"--port {server.server_port}: .*; pass another"):
        serve.main([str(finished), "--port", str(server.server_port)])
    with pytest.raises(ValueError, match="--port 65536: wanted 0 to 65535"):
        serve.main([str(finished), "--port", "65536"])


def test_slow_client_is_let_go(server, monkeypatch):
    monkeypatch.setattr(serve, "PATIENCE", 1)
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(OSError):
            for _ in range(100):  # a header's byte each 0.1 s would keep a plain timeout waiting for ever
                connection.sendall(b"a")
                time.sleep(0.1)
    assert time.monotonic() - begin < 8
    head = f"POST /api/delete HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Type: application/json\r\n"
    head += f"X-Token: {server.site.token}\r\nContent-Length: 50\r\n\r\n{{"
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.0 408")


def test_added_document_is_found_and_searches_go_on_meanwhile(server):
    text = "octopus gardens purple octopus seaweed octopus"
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(post, server, "add", id="octopus", title="<b>Octopus</b>", text=text)
        while not (server.site.change_lock.locked() or adding.done()):
            time.sleep(0.01)
        statuses = [get(server, "search", q=QUERY)[0]]
        refused = post(server, "delete", id="d1")
        while not adding.done():
            statuses.append(get(server, "search", q=QUERY)[0])
        assert adding.result() == (200, {"documents": 51})
    assert set(statuses) == {200} and refused[0] == 409
    assert get(server, "document", id="octopus")[1]["text"] == text
    assert get(server, "others", q="octopus")[1]["bm25"][0]["id"] == "octopus"
    assert post(server, "delete", id="octopus") == (200, {"documents": 50})
    assert get(server, "others", q="octopus")[1]["bm25"] == []
    assert post(server, "delete", id="octopus")[0] == 400


# -------------------------------------------------------------------------------------------------- as a person does


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    names = "chromium", "chromium-browser", "google-chrome"
    chromium, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("found no Chromium and chromedriver; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_script_timeout(60)
    yield browser
    browser.quit()


class Page:
    """The page as a person sees it: what is shown, and what keys and buttons do."""

    def __init__(self, browser, port: int):
        self.browser = browser
        browser.get(f"http://127.0.0.1:{port}/")
        self.wait(lambda: self.text("glance"))

    def wait(self, condition, seconds: float = 20):
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, self.browser.find_element("tag name", "body").text
            time.sleep(0.05)
        return value

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def text(self, id: str) -> str:
        return self.one(f"#{id}").text

    def keys(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def search(self, query: str) -> None:
        """By keyboard alone: / goes to the field, whose content is replaced."""
        self.browser.execute_script("document.activeElement.blur()")
        self.keys("/")
        self.keys(query, "\ue007")  # Enter
        self.wait(lambda: query in self.text("glance"))
        self.wait(lambda: "…" not in (self.text("bm25"), self.text("dense")))


@pytest.fixture
def page(browser, server) -> Page:
    return Page(browser, server.server_port)


def test_search_shows_the_way_and_three_rankings(page, server):
    index, traced = server.site.index, get(server, "search", q=QUERY)[1]
    page.search(QUERY)
    assert [b.get_attribute("data-id") for b in page.all("#found .hit")] == [
        d["id"] for d in traced["documents"]
    ]
    assert [t.text.split("\n")[1] for t in page.all("#tokens span")] == [
        str(t["id"]) for t in traced["tokens"]
    ]
    assert len(page.all("#dense .hit")) == serve.SHOWN and "rfoma" in page.text("bm25")
    assert len(page.all("#experts tbody tr")) == sum(map(len, mixed_layers(index.model)))
    assert len(page.all("#energy svg")) == 2 and page.all("#tree svg[role=img]")
    page.wait(lambda: "Dreams" in page.text("document"))
    assert not page.browser.get_log("browser")


def test_steps_are_walked_through_by_keys_and_buttons(page, server):
    traced = get(server, "search", q=QUERY)[1]
    page.search(QUERY)
    page.browser.execute_script("document.activeElement.blur()")
    docid = traced["ways"][0]["docid"]
    for step in (2, 1, 1):  # the first has none before it
        page.keys("\ue012")  # arrow left
        assert page.text("said").startswith(f"Step {step} of 3: code {docid[step - 1]} ")
        assert page.one("#stepper [aria-pressed=true]").text == str(step)
        assert len(page.all("#experts .now")) == 2 * 7
    page.one("[aria-label='Next step']").click()
    assert page.text("said").startswith("Step 2 of 3")
    page.all("#found .hit")[3].click()
    assert page.text("said").startswith(f"Step 2 of 3: code {traced['ways'][3]['docid'][1]} ")
    assert traced["documents"][3]["title"] in page.text("glance")


def test_script_in_a_title_is_text_and_the_document_goes_again(page, server):
    page.search(QUERY)
    title, id = "<script>document.title = 'hacked'</script><img src=x onerror=alert(1)>", "<i>octopus</i>"
    for name, value in {"id": id, "title": title, "text": "<b>octopus</b> garden octopus seaweed"}.items():
        page.one(f"#add [name={name}]").send_keys(value)
    page.one("#add button").click()
    page.wait(lambda: page.text("changed").startswith("Added <i>octopus</i>; the index holds 51 documents"))
    page.search("octopus garden")
    hit = next(b for b in page.all("#bm25 .hit") if b.get_attribute("data-id") == id)
    assert title in hit.text and not page.all("main script, main img, .hit i, .hit b")
    page.browser.execute_script("document.getElementById('document').replaceChildren()")
    hit.click()
    page.wait(lambda: title in page.text("document"))
    assert "hacked" not in page.browser.title and "<b>octopus</b> garden" in page.text("document")
    remove = page.all("#document .row button")[-1]
    remove.click()
    assert id in server.site.index and "again" in remove.text  # one click deletes nothing
    remove.click()
    page.wait(lambda: id not in server.site.index)
    page.wait(lambda: "no document" in page.text("bm25"))
    assert page.text("changed").startswith(f"Deleted {id}: the trie leads to it no more")
    assert id not in [b.get_attribute("data-id") for b in page.all(".hit")]


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_and_is_readable(page, width, scheme):
    metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        page.search(QUERY)
        assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
        wide = """return [...document.querySelectorAll('svg *, td, button, h2, p')].map((e) => e.getBoundingClientRect())
            .filter((box) => box.width && (box.left < -1 || box.right > innerWidth + 1)).length"""
        assert page.browser.execute_script(wide) == 0
        shade = "return getComputedStyle(document.body)[arguments[0]].match(/[0-9]+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
        ink, paper = (page.browser.execute_script(shade, name) for name in ("color", "backgroundColor"))
        assert paper - ink > 400 if scheme == "light" else ink - paper > 400
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_error_of_the_server_is_shown(page, server, monkeypatch):
    monkeypatch.setattr(serve, "QUERY", 5)
    page.browser.execute_script("search('longer than five')")
    page.wait(lambda: "at most 5" in page.text("error"))
