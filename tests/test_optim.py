import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import optim
from optim import Stage, linear_schedule, parameter_groups
from t5 import T5, T5Config


class Lines:
    """Stands in for store.Log and keeps what it is told."""

    def __init__(self):
        self.progressed, self.measured, self.lines = [], [], []

    def line(self, text: str = "") -> None:
        self.lines.append(text)

    def progress(self, text: str, last: bool = False) -> None:
        self.progressed.append((text, last))

    def metrics(self, **values) -> None:
        self.measured.append(values)


def group(*parameters: nn.Parameter, lr: float = 0.1, weight_decay: float = 0.0) -> list[dict]:
    return [{"params": list(parameters), "lr": lr, "weight_decay": weight_decay}]


def fit(stage: Stage, log: Lines, micro_batch: int = 0, clip: float = 1.0) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "CLIP", clip)
        optim.fit(stage, SimpleNamespace(micro_batch=micro_batch, precision="float32"), log)


def run(groups: list[dict], steps: int, loss_of, warmup: float = 0.0, clip: float = 1e9, **hooks) -> Lines:
    lines = Lines()

    def whole(batch):
        loss = loss_of()
        return loss, {"whole": loss}

    fit(Stage("stage", groups, steps, warmup, lambda: [0] * 3, whole, **hooks), lines, clip=clip)
    return lines


# --------------------------------------------------------------------------------------------------- schedule


def test_linear_schedule_by_hand():
    found = [linear_schedule(step, 10, 4) for step in range(10)]
    assert found == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert linear_schedule(10, 10, 4) == 0  # after the last step
    assert [linear_schedule(0, 1, 1)] == [1.0]


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(1, 200).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(1, steps))))
def test_schedule_rises_to_one_in_the_warm_up_then_falls_and_never_is_zero(shape):
    steps, warmup = shape
    factors = [linear_schedule(step, steps, warmup) for step in range(steps)]
    assert factors[warmup - 1] == max(factors) == 1 and min(factors) > 0
    assert factors[:warmup] == sorted(factors[:warmup]) and factors[warmup:] == sorted(
        factors[warmup:], reverse=True
    )


# ----------------------------------------------------------------------------------------------------- groups


def test_groups_hold_each_training_parameter_once_and_nothing_else():
    model = T5(T5Config(20, 8, 4, 2, 16, 1, 1, codebooks=2, centroids=4))
    model.word.requires_grad_(False)
    model.nothing = nn.Parameter(torch.empty(0, 8))
    groups = parameter_groups(model.named_parameters(), 1e-3, 0.01)
    held = [id(p) for g in groups for p in g["params"]]
    wanted = {id(p) for p in model.parameters() if p is not model.word and p is not model.nothing}
    assert len(held) == len(set(held)) and set(held) == wanted
    assert all(g["lr"] == 1e-3 for g in groups)


def test_rms_norm_weights_alone_are_not_decayed():
    model = T5(T5Config(20, 8, 4, 2, 16, 1, 2, codebooks=2, centroids=4))
    groups = parameter_groups(model.named_parameters(), 1e-3, 0.01)
    undecayed = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    norms = {
        id(p) for module in model.modules() if type(module).__name__ == "RMSNorm" for p in module.parameters()
    }
    assert len(norms) == 2 + 2 * 3 + 2 and undecayed == norms
    assert {g["weight_decay"] for g in groups} == {0.0, 0.01}


def test_group_without_parameters_is_left_out():
    w = nn.Parameter(torch.ones(2))
    assert len(parameter_groups([("a.weight", w)], 0.1, 0.01)) == 1
    assert len(parameter_groups([("self_norm.weight", w)], 0.1, 0.01)) == 1
    assert parameter_groups([("w", nn.Parameter(torch.ones(2), requires_grad=False))], 0.1, 0.01) == []


# -------------------------------------------------------------------------------------------------------- fit


def test_fit_under_a_constant_gradient_moves_by_the_scheduled_rate_each_step():
    """Where the gradient stays, AdamW moves by the rate times its sign, so the path is known by hand."""
    w = nn.Parameter(torch.tensor([1.0, -1.0]))
    path = []
    run(
        group(w, lr=0.1), 10, lambda: (w * torch.tensor([3.0, -3.0])).sum(), 0.4,
        after_step=lambda: path.append(w[0].item()),
    )  # fmt: skip
    rates = torch.tensor([1 / 4, 2 / 4, 3 / 4, 1, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]) * 0.1
    assert path == pytest.approx((1 - rates.cumsum(0)).tolist(), abs=1e-5)
    assert w[1].item() == pytest.approx(-path[-1], abs=1e-6)


def test_fit_equals_a_plain_loop_of_adamw():
    torch.manual_seed(0)
    data, start = torch.randn(20, 4), torch.randn(4)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    order = iter(data)
    run(group(ours, lr=0.05, weight_decay=0.1), 20, lambda: (ours @ next(order)).pow(2), 0.25, clip=0.7)

    optimizer = torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.1, fused=False)
    for step, x in enumerate(data):
        optimizer.param_groups[0]["lr"] = 0.05 * min((step + 1) / 5, (20 - step) / 15)
        optimizer.zero_grad()
        (theirs @ x).pow(2).backward()
        theirs.grad *= min(1.0, 0.7 / theirs.grad.norm().item())
        optimizer.step()
    assert not torch.allclose(ours, start, atol=0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_groups_keep_their_own_peak_rate():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    run(group(a, lr=0.1) + group(b, lr=0.001), 5, lambda: (a + b).sum(), 0.2)
    factors = sum(linear_schedule(step, 5, 1) for step in range(5))
    assert a.item() == pytest.approx(-0.1 * factors, rel=1e-4)
    assert b.item() == pytest.approx(-0.001 * factors, rel=1e-4)


def test_fit_moves_only_what_it_is_handed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    before = [p.detach().clone() for p in net.parameters()]
    run(group(*net[1].parameters(), weight_decay=0.1), 5, lambda: net(torch.ones(2, 3)).pow(2).sum())
    moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), before)]
    assert moved == [False, False, True, True]


def test_hooks_run_once_a_step_around_clipping():
    w = nn.Parameter(torch.ones(4))
    events, raw, clipped = [], [], []

    def loss():
        events.append("loss")
        return (w * 50).sum()

    def before():
        events.append("before")
        raw.append(w.grad.norm().item())

    def after():
        events.append("after")
        clipped.append(w.grad.norm().item())

    run(group(w), 3, loss, clip=1.0, before_clip=before, after_step=after)
    assert events == ["loss", "before", "after"] * 3
    assert raw == pytest.approx([100.0] * 3)  # whole, and not added up over steps
    assert clipped == pytest.approx([1.0] * 3, rel=1e-4)


def test_gradient_that_before_clip_takes_away_moves_nothing():
    w = nn.Parameter(torch.ones(3))
    run(group(w), 4, lambda: w.sum(), before_clip=lambda: w.grad[1:].zero_())
    assert w[0] < 1 and w[1:].tolist() == [1.0, 1.0]


def test_parameter_that_after_step_resets_stays():
    w = nn.Parameter(torch.ones(2))

    @torch.no_grad()
    def reset():
        w[0] = 5.0

    run(group(w), 3, lambda: w.sum(), after_step=reset)
    assert w[0] == 5 and w[1] < 1


@pytest.mark.parametrize("clip, wanted", [(1.0, 1.0), (2.0, 2.0), (100.0, 5.0)])
def test_clipping_bounds_the_norm_over_all_parameters_and_lets_small_gradients_be(clip, wanted):
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    norms = []
    lines = run(
        group(a) + group(b), 1, lambda: (3 * a + 4 * b).sum(), clip=clip,
        after_step=lambda: norms.append(math.hypot(a.grad.item(), b.grad.item())),
    )  # fmt: skip
    assert norms == pytest.approx([wanted], rel=1e-4)
    assert float(lines.measured[0]["gradient_norm"]) == pytest.approx(5.0)  # the log shows it before clipping


def test_log_holds_every_tenth_step_and_the_last():
    w = nn.Parameter(torch.ones(1))
    for steps, wanted in ((1, [1]), (7, [1, 7]), (11, [1, 11]), (25, [1, 11, 21, 25])):
        lines = run(group(w), steps, lambda: w.sum())
        assert [values["step"] for values in lines.measured] == wanted
        assert [last for _, last in lines.progressed] == [False] * (len(wanted) - 1) + [True]
        assert lines.progressed[-1][0].startswith(f"stage step {steps}/{steps} | loss ")


def test_log_tells_loss_terms_and_rate_of_the_step():
    w, lines = nn.Parameter(torch.tensor([2.0])), Lines()

    def loss_of(batch):
        terms = {"ce": w.sum(), "kl": 0.5 * w.sum()}
        return sum(terms.values()), terms

    fit(Stage("D1", group(w, lr=0.3), 1, 0.0, lambda: [0] * 4, loss_of), lines, clip=10.0)
    (found,) = lines.measured  # taken before the step
    assert (found["stage"], found["loss"], found["ce"], found["kl"]) == ("D1", 3.0, 2.0, 1.0)
    assert found["lr"] == pytest.approx(0.3) and found["queries_per_second"] > 0
    assert "D1 step 1/1 | loss 3.000 (ce 2.000 kl 1.000) | lr 3.0e-01 |" in lines.progressed[0][0]


def test_log_s_last_loss_is_that_of_the_last_step():
    w, losses, lines = nn.Parameter(torch.tensor([2.0])), [], Lines()

    def loss_of(batch):
        loss = w.pow(2).sum()
        losses.append(loss.item())
        return loss, {}

    fit(Stage("x", group(w), 15, 0.1, lambda: [0], loss_of), lines)
    assert len(losses) == 15 and lines.measured[-1]["loss"] == losses[-1] < losses[0]


def test_no_step_changes_nothing_and_logs_nothing():
    w = nn.Parameter(torch.ones(1))
    fail = pytest.fail
    stage = Stage("x", group(w), 0, 0.1, lambda: fail("drew a batch"), lambda _: fail("computed"))
    lines = Lines()
    fit(stage, lines)
    assert w.item() == 1 and lines.measured == lines.progressed == lines.lines == []


# ---------------------------------------------------------------------------------------------- micro-batches


def regression(n: int, micro_batch: int, as_list: bool = False, steps: int = 6, **hooks):
    """A small network after some steps on batches of n rows: its parameters, the sizes computed, the log."""
    torch.manual_seed(0)
    data, target = torch.randn(40, 5), torch.randn(40)
    net, lines, sizes = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)), Lines(), []
    generator = torch.Generator().manual_seed(1)

    def next_batch():
        rows = torch.randperm(40, generator=generator)[:n]
        return rows.tolist() if as_list else rows

    def loss_of(rows):
        sizes.append(len(rows))
        squared = (net(data[rows])[:, 0] - target[rows]).pow(2)
        terms = {"near": 0.25 * squared.mean(), "far": 0.75 * squared.mean()}
        return sum(terms.values()), terms

    groups = group(*net.parameters(), lr=0.05, weight_decay=0.01)
    fit(Stage("x", groups, steps, 0.2, next_batch, loss_of, **hooks), lines, micro_batch, clip=0.3)
    return torch.cat([p.detach().flatten() for p in net.parameters()]), sizes, lines


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3, 4, 11, 12, 100])
def test_any_micro_batch_moves_the_parameters_as_the_whole_batch_does(micro_batch, as_list):
    whole, sizes, lines = regression(12, 0, as_list)
    assert sizes == [12] * 6
    found, parts, found_lines = regression(12, micro_batch, as_list)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)
    per_step = [
        min(micro_batch, 12 - start) for start in range(0, 12, micro_batch)
    ]  # 11 leaves a part of one
    assert parts == per_step * 6
    for one, other in zip(found_lines.measured, lines.measured, strict=True):
        for name in ("loss", "near", "far", "gradient_norm"):
            assert float(one[name]) == pytest.approx(float(other[name]), abs=1e-6)


def test_a_stage_cuts_its_batches_where_no_micro_batch_is_set():
    whole, _, _ = regression(11, 0)
    for micro_batch, sizes in ((0, [4, 4, 3]), (6, [6, 5])):
        found, parts, _ = regression(11, micro_batch, parts=3)
        assert parts == sizes * 6
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40), st.integers(1, 45))
def test_micro_batches_of_any_size_cover_a_batch_of_any_size_once(n, micro_batch):
    whole, _, _ = regression(n, 0, steps=2)
    found, parts, _ = regression(n, micro_batch, steps=2)
    assert sum(parts) == 2 * n and max(parts) <= micro_batch
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


def test_hooks_see_the_gradient_of_all_micro_batches_once_a_step():
    norms = {}
    for micro_batch in (0, 5):
        calls = []
        *_, lines = regression(12, micro_batch, before_clip=lambda c=calls: c.append("before"),
                                  after_step=lambda c=calls: c.append("after"))  # fmt: skip
        assert calls == ["before", "after"] * 6
        norms[micro_batch] = [float(values["gradient_norm"]) for values in lines.measured]
    assert norms[5] == pytest.approx(norms[0], abs=1e-6)


def test_one_batch_is_drawn_a_step_and_its_examples_are_counted_whole(monkeypatch):
    drawn, lines, w = [], Lines(), nn.Parameter(torch.ones(1))
    seconds = iter(
        range(10)
    )  # a clock that moves by one at every look: at the start, and when a step is logged
    monkeypatch.setattr(optim.time, "monotonic", lambda: float(next(seconds)))

    def next_batch():
        drawn.append(1)
        return list(range(7))

    fit(Stage("x", group(w), 4, 0.0, next_batch, lambda part: (w.sum(), {})), lines, 2)
    assert len(drawn) == 4
    assert [values["queries_per_second"] for values in lines.measured] == [7 / 1, 4 * 7 / 2]


# -------------------------------------------------------------------------------------- loss of a whole batch


def in_batch_stage(net: nn.Module, sizes: list[int]) -> tuple[Stage, list[list[int]]]:
    """A contrastive loss of texts and their documents, whose embeddings `net` makes; and five batches of 12."""
    torch.manual_seed(0)
    texts, documents = torch.randn(2, 40, 5)
    batches = [torch.randperm(40)[:12].tolist() for _ in range(5)]

    def embed(part: list[int]) -> torch.Tensor:
        sizes.append(len(part))
        return torch.stack([net(texts[part]), net(documents[part])], dim=1)

    def loss(batch: list[int], embedded: torch.Tensor) -> tuple[torch.Tensor, dict]:
        q, d = embedded.unbind(1)
        assert len(q) == len(batch)
        terms = {"near": (q - d).pow(2).mean(), "in_batch": (q @ d.T).log_softmax(1).diagonal().neg().mean()}
        return sum(terms.values()), terms

    groups = group(*net.parameters(), lr=0.05)
    return Stage("x", groups, 5, 0.2, iter(batches).__next__, loss, embed=embed), batches


def small_net(dropout: float) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


@pytest.mark.parametrize("micro_batch", [1, 5, 11])
def test_in_batch_loss_in_micro_batches_is_that_of_the_whole_batch(micro_batch):
    found = []
    for size in (0, 12, micro_batch):
        net, sizes, lines = small_net(0.0), [], Lines()
        fit(in_batch_stage(net, sizes)[0], lines, size)
        found.append((torch.cat([p.detach().flatten() for p in net.parameters()]), sizes, lines.measured))
    (whole, whole_sizes, logged), same, (parts, sizes, parts_logged) = found
    assert torch.equal(whole, same[0]) and whole_sizes == same[1] == [12] * 5  # nothing is computed twice
    assert max(sizes) == micro_batch and sum(sizes) == 2 * 12 * 5
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    for one, other in zip(logged, parts_logged, strict=True):
        for name in ("loss", "near", "in_batch", "gradient_norm"):
            assert float(one[name]) == pytest.approx(float(other[name]), abs=1e-5)


def test_in_batch_loss_in_micro_batches_draws_one_dropout_for_both_passes():
    """The gradient is that of one graph over all parts; and what is drawn next is the same."""
    net = small_net(0.5)
    stage, (batch, *_) = in_batch_stage(net, [])
    settings = SimpleNamespace(micro_batch=5, precision="float32")
    torch.manual_seed(3)
    optim.gradients(stage, batch, list(net.parameters()), settings)
    found, after = [p.grad.clone() for p in net.parameters()], torch.rand(())
    net.zero_grad()
    torch.manual_seed(3)
    stage.loss(batch, torch.cat([stage.embed(batch[i : i + 5]) for i in (0, 5, 10)]))[0].backward()
    assert torch.equal(after, torch.rand(()))
    for gradient, p in zip(found, net.parameters()):
        torch.testing.assert_close(gradient, p.grad)


# ------------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_without_a_finite_gradient_is_skipped_counted_and_its_batch_is_named(bad):
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    factors = iter([1.0, bad, 1.0])
    plain = iter([1.0, 0.0, 1.0])
    path = []
    lines = run(group(w), 3, lambda: (w * next(factors)).sum(), after_step=lambda: path.append(w.tolist()))
    assert w.isfinite().all() and path[0] == path[1] != path[2]
    (line,) = lines.lines
    assert line.startswith("stage step 2: ") and "skipped (1 in a row); batch: ['0', '0', '0'] .." in line
    run(group(v), 3, lambda: (v * next(plain)).sum())
    assert v.isfinite().all()


def test_ten_such_steps_in_a_row_stop_with_advice_and_nothing_changed():
    w = nn.Parameter(torch.ones(2))
    factors = iter([math.nan] * 9 + [1.0] + [math.nan] * 10)
    lines = Lines()
    with pytest.raises(ValueError, match="stage: 10 steps in a row .* lower the learning rate"):
        loss = lambda _: ((w * next(factors)).sum(), {})  # noqa: E731
        fit(Stage("stage", group(w), 30, 0.0, lambda: torch.arange(40), loss), lines)
    assert len(lines.lines) == 19 and w.isfinite().all()
    assert f"batch: {list(map(str, range(20)))} .." in lines.lines[0]
