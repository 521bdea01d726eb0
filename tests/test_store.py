import io
import json
import math
import os
import pickle
import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import arrays
import data
import ood
import store
from data import Corpus
from mixlora import MixConfig, add_mixture, mixed_layers
from queries import Idf, query_digest
from t5 import T5, T5Config


def fail(*_, **__):
    raise OSError("No space left on device")


# ------------------------------------------------------------------------------------------------------ files


def test_write_replaces_the_file_whole_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.json"
    store.write(path, b"old")
    store.write(path, b"new and longer")
    assert path.read_bytes() == b"new and longer"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_write_flushes_the_whole_content_to_disk_before_it_renames(tmp_path, monkeypatch):
    path, events = tmp_path / "a", []
    path.write_bytes(b"old")
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        size = os.fstat(descriptor).st_size
        events.append(("fsync", size, path.read_bytes()))
        fsync(descriptor)

    def spy_replace(source, target):
        events.append(("replace", Path(source).read_bytes(), Path(target).read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    store.write(path, b"new content")
    assert events[:2] == [("fsync", 11, b"old"), ("replace", b"new content", b"old")]
    assert [event[0] for event in events[2:]] == ["fsync"]  # of the folder, so that the rename lasts


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_that_fails_midway_keeps_the_old_file_and_the_next_succeeds(tmp_path, monkeypatch, step):
    path = tmp_path / "a.json"
    store.write_json(path, {"old": 1})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, step, fail)
        store.write_json(path, {"new": 2})
    assert store.read_json(path) == {"old": 1}
    store.write_json(path, {"new": 2})
    assert store.read_json(path) == {"new": 2} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_write_that_fails_at_first_leaves_no_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        store.write_tensors(tmp_path / "D0.pt", torch.ones(3))
    assert not (tmp_path / "D0.pt").exists()


def test_values_come_back_as_written(tmp_path):
    value = {"é": [1, 2.5, None, True], "nested": {"x": "↯"}}
    store.write_json(tmp_path / "v.json", value)
    assert store.read_json(tmp_path / "v.json") == value
    tensors = {
        "a": torch.randn(3, 2),
        "list": [torch.arange(4)],
        "n": 3,
        "s": "text",
        "inf": math.inf,
        "none": None,
    }
    store.write_tensors(tmp_path / "v.pt", tensors)
    found = store.read_tensors(tmp_path / "v.pt")
    assert torch.equal(found.pop("a"), tensors.pop("a")) and torch.equal(
        found.pop("list")[0], tensors.pop("list")[0]
    )
    assert found == tensors
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    arrays.write_array(tmp_path / "v.npy", array)
    again = np.load(tmp_path / "v.npy", allow_pickle=False)
    assert again.dtype == np.int16 and (again == array).all()


@pytest.mark.parametrize("read", [store.read_json, store.read_tensors])
def test_missing_file_is_named(tmp_path, read):
    for path in (tmp_path / "gone", tmp_path):  # a folder is no file
        with pytest.raises(ValueError, match="found no ") as error:
            read(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b'{"a": [1, 2', b"\xff\xfe", b"nothing", b'{"a": 1}}', b"1" * 5000])
def test_json_cut_or_garbled_is_refused_by_name(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json: cannot be read .* take it from a copy"):
        store.read_json(tmp_path / "config.json")


def written(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_tensors_cut_anywhere_are_refused_by_name(tmp_path):
    path, content = tmp_path / "D0.pt", written({"a": torch.arange(100.0), "b": [1, "x"]})
    for length in [*range(41, len(content), 41), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cannot be read .* remove the file") as error:
            store.read_tensors(path)
        assert str(error.value).startswith(str(path))


def test_garbled_tensors_are_read_or_refused_by_name(tmp_path):
    path, content, rng, refused = (
        tmp_path / "D0.pt",
        written({"a": torch.arange(9.0), "b": [1, "x"]}),
        random.Random(0),
        0,
    )
    for _ in range(150):
        bad = bytearray(content)
        for _ in range(8):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(rng.choice([bad, rng.randbytes(40)]))
        try:
            store.read_tensors(path)
        except ValueError as error:
            refused += 1
            assert type(error) is ValueError and str(error).startswith(f"{path}: cannot be read")
    assert refused > 75


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, folder: str):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    path, marker = tmp_path / "D0.pt", tmp_path / "ran"
    evil = {"model": Evil(str(marker))}
    for content in (written(evil), pickle.dumps(evil, protocol=2)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"D0.pt: cannot be read"):
            store.read_tensors(path)
        assert not marker.exists()
    pickle.loads(pickle.dumps(evil))
    assert marker.exists()  # it would have


# ---------------------------------------------------------------------------------------------------- corpora


def corpora() -> list[Corpus]:
    first = Corpus(
        0, ["a", "ü"], ["Älpha", ""], ["text one", 'a "quoted"\nline'], [(0, "why"), (1, "how")], ["t1", "t2"]
    )
    first.test, first.qrels = {"q1": "who\u2028?"}, {"q1": {"a": 2}}
    second = Corpus(
        2,
        ["c"],
        ["Gamma"],
        [""],
        test={"q2": "where", "q3": "when"},
        qrels={"q2": {"c": 1, "a": 1}, "q3": {"c": 3}},
    )
    return [first, second]


def plain(corpora: list[Corpus]) -> list[dict]:
    """All fields, with stores read out as lists."""
    names = [field.name for field in fields(Corpus)]
    texts = ("ids", "titles", "texts")
    return [
        {name: list(value) if name in texts else value for name in names for value in [getattr(c, name)]}
        for c in corpora
    ]


def test_corpora_come_back_as_saved_with_a_hash_of_their_ids(tmp_path):
    manifest, left_out = {"found": {"documents": [2, 1]}}, {"annotated queries of documents outside D0": 3}
    store.save_corpora(tmp_path, "boolq", corpora(), left_out, manifest)
    assert plain(store.load_corpora(tmp_path)) == plain(corpora())  # pairs are tuples again
    saved = store.read_json(tmp_path / "corpus.json")
    assert (saved["format"], saved["source"], saved["left_out"]) == (2, "boolq", left_out)
    assert saved["manifest"] == manifest and [item["documents"] for item in saved["corpora"]] == [2, 1]
    hashes = [data.sha256("a\nü\n".encode()), data.sha256(b"c\n")]
    assert [item["ids_sha256"] for item in saved["corpora"]] == hashes
    assert (tmp_path / "doc_ids.txt").read_text(encoding="utf-8") == "a\nü\nc\n"
    idf = Idf.load(tmp_path / "idf.json")  # of D_0 alone
    assert idf.n_documents == 2 and idf.counts["text"] == 1 and "gamma" not in idf.counts
    excluded = store.load_excluded(tmp_path)
    assert excluded == {query_digest(text) for text in ("who\u2028?", "where", "When!")}


def test_corpora_that_were_loaded_can_be_saved_elsewhere_the_same(tmp_path):
    store.save_corpora(tmp_path / "one", "boolq", corpora(), {}, {})
    store.save_corpora(tmp_path / "two", "boolq", store.load_corpora(tmp_path / "one"), {}, {})
    contents = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    # of two corpora three stores of two files and the queries; ids, excluded queries, IDF and corpus.json
    assert contents[0] == contents[1] and len(contents[0]) == 2 * (6 + 1) + 4


def test_corpus_is_read_without_the_files_of_others(tmp_path):
    store.save_corpora(tmp_path, "boolq", corpora(), {}, {})
    for part in ("documents", "queries"):
        (tmp_path / part).rename(tmp_path / f"away_{part}")
    first, second = store.load_corpora(tmp_path)
    assert (first.rows, second.rows) == (range(0, 2), range(2, 3))  # known without opening anything
    for name in ("documents/D1", "queries/D1.json"):
        (tmp_path / name).parent.mkdir()
        part, file = name.split("/")
        (tmp_path / f"away_{part}" / file).rename(tmp_path / name)
    assert plain([second]) == plain(corpora()[1:])
    with pytest.raises(ValueError, match=r"documents/D0/titles.bin"):
        first.titles  # noqa: B018
    with pytest.raises(ValueError, match=r"queries/D0.json"):
        first.test  # noqa: B018
    with pytest.raises(AttributeError, match="answers"):
        first.answers  # noqa: B018


@pytest.mark.parametrize("name", ["ids.bin", "titles.npy", "texts.bin", "texts.npy"])
@pytest.mark.parametrize("cut", [False, True])
def test_missing_or_cut_documents_are_refused_by_name(tmp_path, name, cut):
    store.save_corpora(tmp_path, "boolq", corpora(), {}, {})
    path = tmp_path / "documents" / "D0" / name
    content = path.read_bytes()
    path.unlink()
    if cut:
        path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"documents/D0/{path.stem}"):
        plain(store.load_corpora(tmp_path))


@pytest.mark.parametrize("held", [1, 3])
def test_documents_of_another_run_are_refused(tmp_path, held):
    store.save_corpora(tmp_path, "boolq", corpora(), {}, {})
    documents = arrays.Documents(tmp_path / "documents" / "D0")
    for i in range(held):
        documents.add(f"other{i}", "", "text")
    documents.close()
    with pytest.raises(ValueError, match=f"ids.bin: found {held} ids, corpus.json says 2; .* different runs"):
        plain(store.load_corpora(tmp_path))


@pytest.mark.parametrize(
    "value", ["[]", "{}", '{"train": []}', "7", '{"train": [1], "train_ids": [], "test": {}, "qrels": {}}']
)
def test_json_that_holds_no_queries_is_refused_by_name(tmp_path, value):
    store.save_corpora(tmp_path, "boolq", corpora(), {}, {})
    (tmp_path / "queries" / "D1.json").write_text(value)
    with pytest.raises(ValueError, match="queries/D1.json: cannot be read"):
        plain(store.load_corpora(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["doc_ids.txt", "documents/D1/titles.npy", "queries/D1.json", "idf.json", "excluded.npy", "corpus.json"],
)
def test_corpora_that_meet_a_full_disk_do_not_count_and_can_be_saved_after(tmp_path, monkeypatch, name):
    """A device that is always full stands where the file is to be written."""
    full, opened = Path("/dev/full"), Path.open
    if not full.is_char_device():
        pytest.skip("no /dev/full here")

    def onto_full(path, mode="r", *rest, **options):
        return opened(full if path == tmp_path / f"{name}.part" else path, mode, *rest, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "open", onto_full)
        store.save_corpora(tmp_path, "boolq", corpora(), {}, {})
    assert not (tmp_path / "corpus.json").exists() and not (tmp_path / name).exists()
    store.save_corpora(tmp_path, "boolq", corpora(), {}, {})
    assert plain(store.load_corpora(tmp_path)) == plain(corpora())


@pytest.mark.parametrize(
    "value", [[], 7, {"format": 2}, *({"format": 2, "corpora": listed} for listed in ([{}], [7], None))]
)
def test_json_that_holds_no_corpora_is_refused_by_name(tmp_path, value):
    store.write_json(tmp_path / "corpus.json", value)
    with pytest.raises(ValueError, match="corpus.json: not the corpora of a run"):
        store.load_corpora(tmp_path)


@pytest.mark.parametrize("rows", [(0, -1), (1, 2), (0, 2.0), (0, "2")])
def test_corpora_whose_rows_do_not_follow_each_other_are_refused_by_name(tmp_path, rows):
    listed = [dict(zip(("first_row", "documents"), rows), ids_sha256="")]
    store.write_json(tmp_path / "corpus.json", {"format": 2, "corpora": listed})
    with pytest.raises(ValueError, match="corpus.json: not the corpora of a run"):
        store.load_corpora(tmp_path)


@pytest.mark.parametrize("number", [None, 1, 3])
def test_run_folder_of_another_format_is_refused_in_one_line(tmp_path, number):
    store.save_corpora(tmp_path, "boolq", corpora(), {}, {})
    saved = store.read_json(tmp_path / "corpus.json")
    older = saved | {"format": number} if number else {k: v for k, v in saved.items() if k != "format"}
    store.write_json(tmp_path / "corpus.json", older)
    store.write_tensors(tmp_path / "D0.pt", {"format": number or 1, "docids": False, "made_for": ""})
    for read, name in ((store.load_corpora, ""), (store.load_model, "D0.pt")):
        with pytest.raises(
            ValueError, match=f"found format {number or 1} .*, wanted 2; commit dfcda6d"
        ) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ checkpoints


SHAPE = T5Config(30, 16, 4, 2, 24, 1, 3, dropout=0.1, codebooks=3, centroids=5)
MIX = MixConfig(layers=2, experts=2, rank=3, alpha=6.0, dropout=0.05, router="cosine", lora_in_site="pre_act")


def mixed_t5() -> T5:
    """The first mixed layer holds 3 frozen experts and 1 that trains, the second 2 that train."""
    model = T5(SHAPE)
    add_mixture(model, MIX)
    first, _ = mixed_layers(model)
    first.add_expert()
    first.add_expert(torch.randn(16))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_b"):
                p.normal_()
    return model


def answer(model: T5) -> torch.Tensor:
    ids, codes = torch.tensor([[5, 6, 1], [7, 1, 0]]), torch.tensor([[0, 1, 2], [4, 3, 0]])
    with torch.no_grad():
        return model.docid_hidden(*model.encode(ids), codes)[0]


def same(a, b) -> bool:
    """Equality of dataclass fields that may be tensors or dicts of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("make", [lambda: T5(SHAPE), mixed_t5], ids=["plain", "mixed"])
def test_model_comes_back_bit_equal_and_answers_the_same(tmp_path, make):
    torch.manual_seed(0)
    model = make()
    store.save_model(tmp_path / "D1.pt", model, [])
    loaded, stats = store.load_model(tmp_path / "D1.pt")
    assert stats == [] and not loaded.training and loaded.config == model.config
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert torch.equal(answer(loaded), answer(model.eval()))
    assert [layer.config for layer in mixed_layers(loaded)] == [layer.config for layer in mixed_layers(model)]


def test_loaded_model_trains_just_the_experts_that_trained(tmp_path):
    model = mixed_t5()
    store.save_model(tmp_path / "D1.pt", model, [])
    loaded, _ = store.load_model(tmp_path / "D1.pt")
    assert [(len(layer.old), len(layer.new)) for layer in mixed_layers(loaded)] == [(3, 1), (0, 2)]
    frozen = {name for name, p in loaded.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert "decoder.0.ff.router_old" in frozen and "decoder.0.ff.old.in_a" in frozen


def test_model_whose_experts_are_all_frozen_comes_back(tmp_path):
    model = mixed_t5()
    for layer in mixed_layers(model):
        layer.freeze()
    store.save_model(tmp_path / "D1.pt", model, [])
    loaded, _ = store.load_model(tmp_path / "D1.pt")
    assert [(len(layer.old), len(layer.new)) for layer in mixed_layers(loaded)] == [(4, 0), (2, 0)]
    assert torch.equal(answer(loaded), answer(model.eval()))


def test_statistics_of_both_modes_come_back(tmp_path):
    torch.manual_seed(0)
    pooled, grown = (ood.new_stats(mode, 2, 3) for mode in ood.MODES)
    ood.measure(pooled, torch.randn(50, 3, 2))
    ood.settle([pooled], [torch.randn(60, 3, 2)], first_mixture=True)
    ood.arrive(pooled, torch.randn(70, 3, 2))
    ood.settle([pooled], [torch.randn(80, 3, 2)], first_mixture=False)
    ood.move(grown, ood.routed_energy_moments(torch.randn(8, 3, 2), torch.ones(8, 3, 2)))
    ood.remember_base(grown)
    ood.grow(grown)
    stats = [pooled, grown, ood.new_stats("pooled", 2, 3)]
    assert len(pooled.arrivals) == 2 and len(pooled.newest) == 1 and grown.base
    store.save_model(tmp_path / "D1.pt", T5(SHAPE), stats)
    _, loaded = store.load_model(tmp_path / "D1.pt")
    assert [type(item) for item in loaded] == [ood.Stats] * 3
    assert all(same(vars(a), vars(b)) for a, b in zip(loaded, stats, strict=True))
    scores = torch.randn(40, 3, 2) - 0.5
    assert torch.equal(*(torch.stack(ood.tails(scores, stat, 0.1)) for stat in (loaded[0], pooled)))


# ------------------------------------------------------------------------------------------------- loaded run


def run_folder(folder: Path, finished: int) -> Path:
    store.write_json(folder / "config.json", {"data": "boolq", "seed": 3})
    store.write(folder / "tokenizer.model", data.train_tokenizer(["a cat sat", "a dog"], 30))
    store.save_corpora(folder, "boolq", corpora(), {}, {})
    arrays.write_array(folder / "docids.npy", np.array([[4, 0, 1], [0, 2, 2], [0, 1, 3]], dtype=np.int16))
    for t in range(finished):
        torch.manual_seed(t)
        store.save_model(folder / f"D{t}.pt", T5(SHAPE), [])
    return folder


def test_loaded_run_holds_the_model_and_the_trie_after_each_corpus(tmp_path):
    loaded = store.LoadedRun(run_folder(tmp_path, 2))
    assert (loaded.config["seed"], loaded.finished, plain(loaded.corpora)) == (3, [0, 1], plain(corpora()))
    assert list(loaded.ids) == ["a", "ü", "c"]
    assert [loaded.headline(row) for row in range(3)] == ["Älpha", 'a "quoted" line', "Gamma"]
    assert loaded.docids.dtype == torch.int64 and loaded.tokenizer.encode("cat")
    model, trie = loaded.at(0)
    assert trie.rows.tolist() == [[0, 2, 2], [4, 0, 1]] and trie.documents.tolist() == [1, 0]  # D_0's alone
    later, both = loaded.at(1)
    assert both.rows.tolist() == [[0, 1, 3], [0, 2, 2], [4, 0, 1]] and both.documents.tolist() == [2, 1, 0]
    assert not torch.equal(model.word, later.word)


def test_document_without_a_title_is_shown_by_its_first_words(tmp_path):
    words = [f"word{i}" for i in range(30)]
    long = Corpus(0, ["a", "b", "c"], [""] * 3, [" \n ".join(words), "x" * 500, ""], test={"q": "w"})
    run_folder(tmp_path, 1)
    store.save_corpora(tmp_path, "boolq", [long], {}, {})
    loaded = store.LoadedRun(tmp_path)
    assert loaded.headline(0).split() == words[:12]
    assert loaded.headline(1) == "x" * 400 and loaded.headline(2) == ""


def test_unfinished_run_counts_its_finished_corpora_and_says_what_to_do_without_any(tmp_path):
    folder = run_folder(tmp_path, 1)
    assert store.LoadedRun(folder).finished == [0]
    (folder / "D0.pt").unlink()
    with pytest.raises(
        ValueError, match=r"found no finished corpus .* go on with python train.py --resume"
    ) as error:
        store.LoadedRun(folder)
    assert str(error.value).endswith(str(folder))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.model", "corpus.json", "documents/D1/ids.bin", "docids.npy"]
)
def test_run_without_a_file_names_it(tmp_path, name):
    (run_folder(tmp_path, 1) / name).unlink()
    with pytest.raises(ValueError, match=name):
        store.LoadedRun(tmp_path)


# -------------------------------------------------------------------------------------------------------- log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def log_with(
    folder: Path, monkeypatch, out: io.StringIO, quiet: bool = False
) -> tuple[store.Log, list[float]]:
    """A log that prints into `out`, under a clock that stands still; set clock[0] to move it."""
    clock = [1000.0]
    monkeypatch.setattr(store.time, "monotonic", lambda: clock[0])
    log = store.Log(folder, quiet)
    log.out = out
    return log, clock


def test_line_is_printed_and_added_to_the_log_file(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("an earlier run\n")
    log = store.Log(tmp_path)
    log.line("α: one")
    log.line()
    log.line("two")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "an earlier run\nα: one\n\ntwo\n"
    assert capsys.readouterr().out == "α: one\n\ntwo\n"


def test_progress_off_a_terminal_keeps_one_line_in_ten_seconds_and_the_last(tmp_path, monkeypatch):
    log, clock = log_with(tmp_path, monkeypatch, io.StringIO())
    for second in range(25):
        clock[0] = 1000.0 + second
        log.progress(f"step {second}", last=second == 24)
    wanted = ["step 0", "step 10", "step 20", "step 24"]
    assert (tmp_path / "log.txt").read_text().splitlines() == log.out.getvalue().splitlines() == wanted
    log.progress("the next stage's last", last=True)
    assert (tmp_path / "log.txt").read_text().splitlines()[-1] == "the next stage's last"


def test_progress_on_a_terminal_rewrites_one_line_that_a_kept_line_clears(tmp_path, monkeypatch):
    log, _ = log_with(tmp_path, monkeypatch, Terminal())
    for i in range(3):
        log.progress(f"step {i}")
    log.line("done")
    log.line("more")
    clear = "\r\x1b[K"
    assert log.out.getvalue() == f"step 0\n{clear}step 1{clear}step 2{clear}done\nmore\n"
    assert (tmp_path / "log.txt").read_text() == "step 0\ndone\nmore\n"


def test_quiet_log_prints_nothing_and_still_keeps_its_files(tmp_path, monkeypatch):
    log, _ = log_with(tmp_path, monkeypatch, Terminal(), quiet=True)
    for i in range(3):
        log.progress(f"step {i}", last=i == 2)
    log.line("done")
    assert log.out.getvalue() == ""
    assert (tmp_path / "log.txt").read_text() == "step 0\nstep 2\ndone\n"


def test_log_of_another_process_writes_and_prints_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(store.time, "monotonic", lambda: 1000.0)
    log = store.Log(tmp_path, writes=False)
    log.out = Terminal()
    log.line("a line")
    for i in range(3):
        log.progress(f"step {i}", last=i == 2)
    log.metrics(step=1)
    assert list(tmp_path.iterdir()) == [] and log.out.getvalue() == ""


def test_metrics_are_one_json_object_a_line_with_numbers_for_tensors(tmp_path):
    log = store.Log(tmp_path, quiet=True)
    log.metrics(
        stage="D0", step=1, loss=torch.tensor(1.5), gradient_norm=torch.tensor([2.0], requires_grad=True)
    )
    log.metrics(stage="D0", step=2, loss=0.5)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"stage": "D0", "step": 1, "loss": 1.5, "gradient_norm": 2.0},
        {"stage": "D0", "step": 2, "loss": 0.5},
    ]


# ---------------------------------------------------------------------------- found while writing these tests


def test_deeply_nested_json_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config.json: cannot be read"):
        store.read_json(tmp_path / "config.json")


@pytest.mark.parametrize("content", [b"", b"\x80\x02]"])
def test_empty_file_and_cut_pickle_are_refused_by_name(tmp_path, content):
    (tmp_path / "D0.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"D0.pt: cannot be read"):
        store.read_tensors(tmp_path / "D0.pt")


@pytest.mark.parametrize("content", [None, b"", b"\x93NUMPY", b"garbage"])
def test_missing_or_cut_docids_are_refused_by_name(tmp_path, content):
    path = run_folder(tmp_path, 1) / "docids.npy"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"docids.npy"):
        store.LoadedRun(tmp_path)


def test_file_of_another_kind_is_refused_by_name(tmp_path):
    store.write_tensors(tmp_path / "D0.pt", {"a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"D0.pt"):
        store.load_model(tmp_path / "D0.pt")
