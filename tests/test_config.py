"""Settings: what flags, presets and methods make of each other, and what is refused before any work."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import store
import train
from config import SMALL, Config, parse, saved_config

PAPER = {"method": "paper"}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--precision", "fp8"], "float32, bf16"),
        (["--data", "msmarco"], "tools.doc2query .* --pseudo_queries drawn"),
        (["--teacher", "absent.jsonl"], "found no file absent.jsonl"),
        (["--docids", "absent.json"], "found no file absent.json"),
        (["--data", "toy", "--splits", "paper"], "nq320k or msmarco"),
        (["--method", "magic"], "mixlora-dsi-pt"),
        (["--preset", "magic"], "msmarco"),
        (["--slow", "maybe"], "grad, lr, none"),
        (["--ood_mode", "x"], "paper_code, pooled"),
        (["--router", "x"], "cosine, linear"),
        (["--width", "130"], "heads"),
        (["--layers", "9"], "--decoder_blocks"),
        (["--lr", "nan"], "--lr nan: wanted a number from 0"),
        (["--delta", "-1"], "--delta -1.0: wanted a number from 0"),
        (["--experts", "1"], "at least the 2"),
        (["--no-mixture"], "methods with a mixture; pass --attention_rank 0"),
        (["--method", "dream", "--attention_rank", "4"], "methods with a mixture; pass --attention_rank 0"),
        (["--method", "promptdsi", "--adapters"], "--prompts and --adapters are ways to learn D_t: pass one"),
        (["--method", "incdsi", "--joint"], "--joint and --insert are ways to learn D_t: pass one"),
        (["--method", "clever", "--joint"], "pass --ewc 0 --sam_rho 0 with --joint or --insert"),
        (["--method", "incdsi", "--sam_rho", "0.1"], "pass --ewc 0 --sam_rho 0 with --joint or --insert"),
        (["--method", "base", "--rehearsal"], "--rehearsal takes the place of dreams"),
        (["--pseudo_queries", "drawn/absent.jsonl"], "found no file drawn/absent.jsonl"),
        (["--extend", "a", "--data", "b", "--resume", "c"], "--resume and --extend do not go together"),
        (["--resume", "a", "--overwrite"], "--resume and --overwrite do not go together"),
        (["--dream_batch", "100"], "--dream_batch 100: wanted a multiple of --batch 256"),
        (["--dream_batch", "0"], "--dream_batch 0: wanted a multiple of --batch 256"),
        (["--dream_words", "41"], "--dream_words 41: wanted at most the 40 words of a docid"),
        (["--dream_words", "1"], "--dream_words 1: wanted a number from 2"),
        (["--dream_general", "1"], "--dream_general must be less than 1"),
        (["--dream_style", "1.5"], "--dream_style 1.5: wanted a number from 0 to 1"),
        (["--data", "toy", "--general", "no/such/folder"], "--general no/such/folder: found no such folder"),
        (["--method", "joint", "--dreams", "512"], "pass --dreams 0 with --joint or --insert"),
        (["--docid_kind", "atomic"], "--d0_fragments 0"),
        (["--insert"], "--docid_kind atomic"),
        (["--docid_kind", "atomic", "--d0_fragments", "0", "--ewc", "1"], "--ewc 0"),
        (["--ewc", "1"], "experts and atomic tables grow"),
        (["--method", "paper", "--sam_rho", "0.1"], "--sam_rho 0"),
        (["--prompts", "5"], "--no-mixture"),
        (["--docid_kind", "pq", "--M", "5"], "divides --width 128"),
        (["--method", "joint", "--steps", "0"], "pass --steps"),
        (["--data", "no/such/folder"], "corpus.jsonl"),
        (["--resume", "no/such/run"], "config.json"),
        (["--resume", "runs/x", "--lr", "1"], "remove --lr"),
    ],
)
def test_a_wrong_flag_is_named_with_what_is_wanted(argv, message, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").symlink_to(toy)
    with pytest.raises(ValueError, match=message):
        train.main(argv)


def test_help_groups_every_field_of_config_by_stage(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name} " in text or f"--{name}," in text for name in Config.__dataclass_fields__)
    assert [text.index(f"\n{group}:") for group in ("data", "model", "dense", "docids", "mixture", "growth")]


def test_a_folder_that_holds_a_run_is_refused_and_overwrite_moves_it_aside(tmp_path):
    folder = tmp_path / "run"
    store.new_folder(folder, PAPER, overwrite=False)
    store.new_folder(folder, PAPER, overwrite=False)  # nothing was saved yet: no run is in the way
    (tmp_path / "run" / "corpus.json").write_text("{}")
    (tmp_path / "run" / "precious").write_text("kept")
    with pytest.raises(ValueError, match="--resume .*--overwrite"):
        store.new_folder(folder, PAPER, overwrite=False)
    store.new_folder(folder, PAPER, overwrite=True)
    assert [path.read_text() for path in tmp_path.glob("run.*/precious")] == ["kept"]


def test_a_run_may_be_moved_and_one_of_another_version_is_refused_by_name(tmp_path):
    store.new_folder(tmp_path / "old", asdict(Config(lr=0.5, device="cpu")), overwrite=False)
    (tmp_path / "old").rename(tmp_path / "new")
    command = parse(["--resume", str(tmp_path / "new")])
    assert command.resume and command.config.lr == 0.5 and command.config.run == str(tmp_path / "new")
    store.write_json(tmp_path / "new" / "config.json", {"learning_rate": 1})
    with pytest.raises(ValueError, match="config.json: written by another version"):
        parse(["--resume", str(tmp_path / "new")])


def test_flags_override_the_method_and_the_method_overrides_the_preset():
    settings = parse(["--method", "naive-expansion"]).config
    assert (settings.router, settings.kl_coef, settings.width) == ("linear", 0.0, SMALL["width"])
    settings = parse(["--method", "naive-expansion", "--router", "cosine", "--kl-coef", "0.2"]).config
    assert (settings.router, settings.kl_coef) == ("cosine", 0.2)
    settings = parse(["--method", "base", "--decoder_blocks", "1"]).config
    assert (settings.mixture, settings.layers) == (False, 2)  # layers are of a mixture
    settings = parse(["--data", "some/folder", "--preset", "nq320k", "--method", "base"]).config
    assert (settings.M, settings.K, settings.width, settings.batch, settings.epochs) == (8, 2048, 768, 128, 5)


ADDED = dict(dreams=0, attention_rank=0, ood_mode="paper_code", router_row="random", evolve=False)
OURS = dict(
    dreams=20_000, attention_rank=32, ood_mode="pooled", router_row="ood_mean", evolve=True, kl_coef=0.0, slow="none"
)  # fmt: skip


def test_beside_general_text_new_queries_are_plain_and_the_kl_weighs_less():
    def held(*flags: str) -> tuple[float, float]:
        config = parse(["--data", "boolq", *flags]).config
        return config.dream_style, config.dream_kl

    assert held() == (0.0, 2.25) and held("--method", "dream") == (0.0, 2.5)
    for without in (("--general", "none"), ("--dream_general", "0")):
        assert held(*without) == (0.5, 2.0) and held(*without, "--method", "dream") == (0.5, 4.0)
    assert held("--dream_style", "0.25", "--dream_kl", "3") == (0.25, 3.0)


@pytest.mark.parametrize(
    "data, method, settings",
    [
        ("boolq", "mixlora-dsi", OURS | dict(general="boolq", mixture=True, d0_mixture=True, beam=40)),
        ("boolq", "paper", ADDED | dict(mixture=True, d0_mixture=True, kl_coef=0.25, slow="grad")),
        (
            "boolq",
            "dream",
            ADDED | dict(dreams=20_000, dream_kl=2.5, mixture=False, kl_coef=0.0, slow="none"),
        ),
        ("boolq", "never-expand", ADDED),
        ("boolq", "base", ADDED),
        ("nq320k", "mixlora-dsi", ADDED | dict(general="")),
    ],
)
def test_our_additions_are_of_two_methods_and_the_small_presets(data, method, settings):
    config = parse(["--data", data, "--method", method]).config
    assert {name: getattr(config, name) for name in settings} == settings


def test_each_addition_can_be_switched_off_and_what_was_given_is_told():
    flags = [
        "--dreams",
        "0",
        "--attention-rank",
        "0",
        "--ood_mode",
        "paper_code",
        "--no-evolve",
        "--general",
        "none",
    ]
    asked = parse([*flags, "--router_row", "random"])
    settings = ADDED | dict(general="")
    assert {name: getattr(asked.config, name) for name in settings} == settings
    assert asked.given == {"dreams", "attention_rank", "ood_mode", "evolve", "general", "router_row"}


# Method, then batch, epochs or steps, learning rates, warm-up and delta, as the specification's tables of recipes have them.
NQ = dict(M=8, K=2048, layers=5, experts=2, lora_rank=8, dense_steps=54_000, dense_batch=256, dense_lr=5e-4,
          d0_steps=20_000, d0_batch=1024, d0_lr=1e-3, d0_warmup=0.1, lr=1e-3, warmup=0.1,
          beam=10, splits="paper", t5="google-t5/t5-base", seed=42)  # fmt: skip
MS = NQ | dict(dense_steps=88_400, d0_steps=250_000, batch=512, epochs=5, pseudo_per_document=10)
GOOD = dict(
    align_coef=1.0, repel_coef=1.0, balance_coef=0.0, z_coef=0.0, kl_coef=0.1, slow="grad", router="cosine"
)
NAIVE = dict(
    align_coef=0.0, repel_coef=0.0, balance_coef=0.01, z_coef=0.001, kl_coef=0.0, slow="none", router="linear"
)
PLAIN = dict(d0_mixture=False)


@pytest.mark.parametrize(
    "data, method, recipe",
    [
        ("nq320k", "mixlora-dsi", NQ | GOOD | dict(batch=32, epochs=10, delta=1.0, expand="ood", d0_mixture=True)),
        ("nq320k", "never-expand", NQ | GOOD | dict(batch=32, epochs=10, expand="never", d0_mixture=True)),
        ("nq320k", "always-expand", NQ | GOOD | dict(batch=32, epochs=10, expand="always", d0_mixture=True)),
        ("nq320k", "mixlora-dsi-pt", NQ | GOOD | PLAIN | dict(batch=128, epochs=10, delta=10.0, expand="ood")),
        ("nq320k", "naive-expansion", NQ | NAIVE | PLAIN | dict(batch=128, epochs=10, expand="always")),
        ("nq320k", "base", NQ | PLAIN | dict(batch=128, epochs=5, mixture=False, kl_coef=0.0, slow="none")),
        ("nq320k", "dsi++", NQ | PLAIN | dict(batch=128, epochs=5, mixture=False, slow="none", sam_rho=0.15)),
        ("nq320k", "clever", NQ | PLAIN | dict(batch=128, epochs=5, mixture=False, ewc=0.5, ewc_samples=512)),
        ("nq320k", "promptdsi", NQ | PLAIN | dict(batch=128, epochs=10, mixture=False, prompts=300)),
        ("nq320k", "corpusbrain++", NQ | PLAIN | dict(batch=128, epochs=10, adapters=True, mask="full_vocab")),
        ("msmarco", "promptdsi", MS | PLAIN | dict(d0_warmup=0.045, prompts=6611)),
        ("msmarco", "clever", MS | PLAIN | dict(d0_warmup=0.045, ewc=0.5)),
        ("msmarco", "mixlora-dsi", MS | GOOD | dict(delta=0.01, expand="ood", d0_mixture=True)),
        ("msmarco", "always-expand", MS | GOOD | dict(expand="always", d0_mixture=True)),
        ("msmarco", "mixlora-dsi-pt", MS | GOOD | PLAIN | dict(delta=10.0, d0_warmup=0.045)),
        ("msmarco", "naive-expansion", MS | NAIVE | PLAIN | dict(expand="always", d0_warmup=0.045)),
        ("msmarco", "base", MS | PLAIN | dict(mixture=False, kl_coef=0.0, slow="none", d0_warmup=0.045)),
    ],
)  # fmt: skip
def test_presets_carry_the_recipe_of_the_paper_for_every_method(data, method, recipe):
    settings = parse(["--data", data, "--method", method, "--pseudo_queries", "drawn"]).config
    assert {name: getattr(settings, name) for name in recipe} == recipe
    assert settings.precision == ("bf16" if torch.cuda.is_available() else "float32")


@pytest.mark.parametrize("name", ["", ".", "..", "\n", " ", "a\0b"])
def test_a_name_that_is_no_folder_s_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="wanted the name of a folder"):
        store.new_folder(Path(name), {}, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_runs_and_a_file_are_refused(tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "corpus.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="runs: holds other runs, as .*one"):
            store.new_folder(tmp_path / "runs", {}, overwrite)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="this is a file"):
        store.new_folder(tmp_path / "file", {}, overwrite=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "pseudo_queries").touch()  # which reading a corpus would remove
    with pytest.raises(ValueError, match="mine: holds pseudo_queries, which is of no run"):
        store.new_folder(tmp_path / "mine", {}, overwrite=True)
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(shape := '{"d_model": 768}')
    with pytest.raises(ValueError, match="t5: holds config.json, which is of no run"):
        store.new_folder(tmp_path / "t5", {}, overwrite=True)
    assert (tmp_path / "t5" / "config.json").read_text() == shape
    names = ["config.json", "corpus.json", "file", "mine", "one", "pseudo_queries", "runs", "t5"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == names


def test_nothing_changes_in_a_folder_where_another_process_trains(tmp_path):
    held = store.new_folder(tmp_path / "run", PAPER, overwrite=False)
    (tmp_path / "run" / "corpus.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="another process trains here"):
            store.new_folder(tmp_path / "run", {"method": "dream"}, overwrite)
    assert store.read_json(tmp_path / "run" / "config.json") == PAPER
    held.close()
    store.new_folder(tmp_path / "run", {"method": "dream"}, overwrite=True).close()
    assert store.read_json(tmp_path / "run" / "config.json") == {"method": "dream"}
    (aside,) = tmp_path.glob("run.*")
    assert store.read_json(aside / "config.json") == PAPER


def test_a_run_that_goes_on_takes_settings_of_the_machine_and_no_others(finished):
    asked = parse(["--resume", str(finished), "--micro_batch", "8", "--recompute", "--no-check_memory"])
    assert (asked.config.micro_batch, asked.config.recompute, asked.config.check_memory) == (8, True, False)
    extends = parse(["--extend", str(finished), "--data", "x", "--micro_batch", "8"])
    assert asdict(extends.config) == asdict(saved_config(finished)) | {"micro_batch": 8}
    consolidates = parse(["--consolidate", str(finished), "--run", "x", "--micro_batch", "8"])
    assert (consolidates.config.run, consolidates.config.micro_batch) == ("x", 8)
    for mode in (["--resume", str(finished)], ["--extend", str(finished), "--data", "x"]):
        with pytest.raises(ValueError, match="--micro_batch -1: wanted a number from 0"):
            parse([*mode, "--micro_batch", "-1"])
