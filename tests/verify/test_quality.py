"""Are perplexity, divergence, agreement and their errors what their definitions say?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from qpass.errors import BadInput
from qpass.verify import Evaluation, evaluate, evaluate_many, score_batches, windows
from qpass.verify.logits import CHUNK

V = 11
EXACT = 1e-12  # float64 against the same sums in another order


class Table(nn.Module):
    """Logits that depend on the token alone, so that everything can be worked out by hand."""

    def __init__(self, seed: int, v: int = V) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(v, v, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(values * 2, requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.weight[input_ids]


def tokens(b: int, t: int, seed: int = 0, v: int = V) -> Tensor:
    return torch.randint(v, (b, t), generator=torch.Generator().manual_seed(seed))


def by_hand(model: Table, reference: Table, rows: list[list[int]]) -> dict[str, float]:
    """The definitions, one position at a time."""
    loss, divergence, agreed, scored, compared = 0.0, 0.0, 0, 0, 0
    for row in rows:
        for at, token in enumerate(row):
            q = torch.softmax(model.weight[token], 0)
            p = torch.softmax(reference.weight[token], 0)
            divergence += sum(
                float(p[k]) * (math.log(float(p[k])) - math.log(float(q[k]))) for k in range(V)
            )
            agreed += int(q.argmax()) == int(p.argmax())
            compared += 1
            if at + 1 < len(row):
                loss -= math.log(float(q[row[at + 1]]))
                scored += 1
    return {
        "perplexity": math.exp(loss / scored),
        "kl": divergence / compared,
        "agreement": agreed / compared,
        "tokens": scored,
        "positions": compared,
    }


def assert_is(found: Evaluation, want: dict[str, float]) -> None:
    assert found.perplexity is not None
    assert found.perplexity.value == pytest.approx(want["perplexity"], rel=EXACT)
    assert found.kl.value == pytest.approx(want["kl"], rel=EXACT)
    assert found.agreement.value == pytest.approx(want["agreement"], rel=EXACT)
    assert (found.tokens, found.positions) == (want["tokens"], want["positions"])


@pytest.mark.parametrize("t", [2, 7, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_equals_the_definitions(t: int) -> None:
    ids = tokens(3, t)
    found = evaluate(Table(1), Table(2), [ids[:1], ids[1:]])
    assert_is(found, by_hand(Table(1), Table(2), ids.tolist()))
    assert found.windows == 3


def test_a_model_equals_itself() -> None:
    found = evaluate(Table(1), Table(1), [tokens(2, 9)])
    assert found.kl.value == 0.0
    assert found.kl.error == 0.0
    assert found.agreement.value == 1.0
    assert found.perplexity == found.reference_perplexity
    assert found.perplexity_ratio is not None
    assert found.perplexity_ratio.value == 1.0


def test_divergence_is_from_the_reference() -> None:
    # KL is not symmetric: swapping the two is a different number
    one = evaluate(Table(1), Table(2), [tokens(2, 9)])
    other = evaluate(Table(2), Table(1), [tokens(2, 9)])
    assert abs(one.kl.value - other.kl.value) > 0.01
    assert one.perplexity == other.reference_perplexity


@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(left: bool) -> None:
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (9, 4, 1, 6)]
    ids = torch.zeros(4, 9, dtype=torch.int64)
    mask = torch.zeros(4, 9, dtype=torch.int64)
    for at, row in enumerate(rows):
        place = slice(9 - len(row), 9) if left else slice(0, len(row))
        ids[at, place] = torch.tensor(row)
        mask[at, place] = 1
    found = evaluate(Table(1), Table(2), [{"input_ids": ids, "attention_mask": mask}])
    assert_is(found, by_hand(Table(1), Table(2), rows))


def test_padding_may_hold_anything() -> None:
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    poisoned = ids.clone()
    poisoned[:, 4:] = V - 1
    model, reference = Table(1), Table(2)
    with torch.no_grad():
        model.weight[V - 1] = torch.nan
    whole = ids[:, :4].clamp(max=V - 2)
    poisoned[:, :4] = whole
    found = evaluate(model, reference, [{"input_ids": poisoned, "attention_mask": mask}])
    assert found == evaluate(model, reference, [whole])
    assert found.broken == 0


def test_an_empty_row_is_no_window_of_its_own() -> None:
    ids = tokens(3, 6)
    mask = torch.ones_like(ids)
    mask[2] = 0
    found = evaluate(Table(1), Table(2), [{"input_ids": ids, "attention_mask": mask}])
    alone = evaluate(Table(1), Table(2), [ids[:2]])
    assert found.kl == alone.kl
    assert found.perplexity == alone.perplexity


def test_standard_error_over_windows() -> None:
    # windows of equal length: the textbook standard error of the mean of window means
    ids = tokens(12, 8)
    model, reference = Table(1), Table(2)
    found = evaluate(model, reference, [ids])
    means = torch.stack(
        [torch.nn.functional.cross_entropy(model.weight[row[:-1]], row[1:]).detach() for row in ids]
    )
    error = float(means.std(correction=1)) / 12**0.5
    assert found.perplexity is not None
    assert found.perplexity.error == pytest.approx(found.perplexity.value * error, rel=1e-9)


def test_standard_errors_cover_the_truth() -> None:
    # tokens are independent and uniform, so the true divergence is the mean over the vocabulary
    model, reference = Table(1), Table(2)
    p, q = reference.weight.log_softmax(-1), model.weight.log_softmax(-1)
    truth = float((p.exp() * (p - q)).sum(-1).mean())
    inside = 0
    for seed in range(200):
        found = evaluate(model, reference, [tokens(20, 10, seed=seed + 1)])
        assert found.kl.error is not None
        inside += abs(found.kl.value - truth) <= 1.96 * found.kl.error
    # 95% of 200, give or take four standard deviations of a binomial
    assert 175 <= inside <= 200


def test_one_window_has_no_error() -> None:
    found = evaluate(Table(1), Table(2), [tokens(1, 9)])
    assert found.kl.error is None


def test_several_models_share_the_reference() -> None:
    reference = Table(0)
    calls: list[int] = []
    reference.register_forward_hook(lambda *_: calls.append(1))
    batches = [tokens(2, 5), tokens(1, 7, seed=3)]
    many = evaluate_many({"a": Table(1), "b": Table(2)}, reference, iter(batches))
    assert len(calls) == 2
    assert many == {
        "a": evaluate(Table(1), Table(0), batches),
        "b": evaluate(Table(2), Table(0), batches),
    }


def test_scores_come_batch_by_batch() -> None:
    seen = score_batches({"a": Table(1)}, Table(2), (tokens(2, 5, seed=s) for s in range(3)))
    assert len(next(seen)["a"]) == 2


def test_broken_positions_are_counted_and_never_flatter() -> None:
    model = Table(1)
    with torch.no_grad():
        model.weight[3, 5] = torch.nan
        model.weight[4, 5] = torch.inf
    ids = torch.tensor([[0, 3, 4, 1], [1, 2, 0, 2]])
    found = evaluate(model, Table(2), [ids])
    assert found.broken == 2
    assert found.kl.value == math.inf
    assert found.perplexity is not None
    assert found.perplexity.value == math.inf
    assert found.agreement.value <= 6 / 8


def test_ruled_out_tokens_are_not_broken() -> None:
    # models with a padded vocabulary give minus infinity to the tokens that do not exist
    model, reference = Table(1), Table(2)
    with torch.no_grad():
        model.weight[:, -1] = -torch.inf
        reference.weight[:, -1] = -torch.inf
    found = evaluate(model, reference, [tokens(2, 9, v=V - 1)])
    assert found.broken == 0
    assert 0 < found.kl.value < math.inf


@dataclass
class Output:
    logits: Tensor


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner = inner
        self.how = how

    def forward(self, *args: object, **kwargs: object) -> object:
        out = self.inner(*args, **kwargs)
        if self.how == "tuple":
            return (out, "cache")
        if self.how == "attribute":
            return Output(out)
        return {"loss": None, "logits": out}


@pytest.mark.parametrize("how", ["tuple", "attribute", "mapping"])
@pytest.mark.parametrize("spelling", ["tensor", "tuple", "dict"])
def test_every_spelling_of_inputs_and_outputs(how: str, spelling: str) -> None:
    ids = tokens(2, 5)
    batch = {"tensor": ids, "tuple": (ids,), "dict": {"input_ids": ids}}[spelling]
    found = evaluate(Wrapped(Table(1), how), Table(2), [batch])
    assert found.kl == evaluate(Table(1), Table(2), [ids]).kl
    assert found.tokens == 8


def test_classifiers_have_no_perplexity() -> None:
    generator = torch.Generator().manual_seed(0)
    model, reference = nn.Linear(6, V), nn.Linear(6, V)
    found = evaluate(model, reference, [torch.randn(4, 6, generator=generator)])
    assert found.perplexity is None
    assert found.perplexity_ratio is None
    assert (found.windows, found.positions, found.tokens) == (4, 4, 0)
    assert found.kl.value > 0


class Half(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        # large logits, where half precision has steps of 1/16
        return (100 + Table(1).weight[input_ids]).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_first(dtype: torch.dtype) -> None:
    ids = tokens(2, 9)
    found = evaluate(Half(dtype), Half(torch.float64), [ids])
    rounded = Half(dtype)(ids).double().log_softmax(-1)
    exact = Half(torch.float64)(ids).log_softmax(-1)
    want = float((exact.exp() * (exact - rounded)).sum(-1).mean())
    assert found.kl.value == pytest.approx(want, abs=1e-5)  # float32 logarithms of logits near 100


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = Table(1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.dropout(self.table(input_ids))


def test_measures_in_evaluation_mode_and_restores_it() -> None:
    model = Dropped()
    model.table.eval()
    found = evaluate(model, Table(1), [tokens(2, 5)])
    assert found.kl.value == 0.0
    assert model.training
    assert model.dropout.training
    assert not model.table.training


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "nothing to evaluate"),
        ([torch.zeros(0, 4, dtype=torch.int64)], "nothing to evaluate"),
        ([{"input_ids": tokens(1, 3), "attention_mask": torch.zeros(1, 3)}], "nothing"),
        ([{"input_ids": tokens(1, 3), "attention_mask": torch.ones(1, 1, 3, 3)}], "attention_mask"),
        ([tokens(1, 3)[0]], "expected \\[windows, tokens\\]"),
        (tokens(1, 3), "wrap it in a list"),
        ({"input_ids": tokens(1, 3)}, "wrap it in a list"),
        ([3], "got int"),
        ([Table], "got type"),
    ],
)
def test_bad_input_is_refused(batches: object, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        evaluate(Table(1), Table(2), batches)


def test_models_that_do_not_match_are_refused() -> None:
    with pytest.raises(BadInput, match="the same model"):
        evaluate(Table(1, v=V + 1), Table(2), [tokens(1, 3)])
    with pytest.raises(BadInput, match="without logits"):
        evaluate(nn.Flatten(0), nn.Flatten(0), [torch.zeros(2, 3)])
    with pytest.raises(BadInput, match=r"from -1 to 2, .* mask out"):
        evaluate(Table(1), Table(2), [torch.tensor([[1, -1, 2]])])


def test_a_broken_reference_is_refused() -> None:
    reference = Table(2)
    with torch.no_grad():
        reference.weight[3] = torch.nan
    with pytest.raises(BadInput, match="reference"):
        evaluate(Table(1), reference, [torch.tensor([[0, 3, 1]])])


def test_windows_drop_the_rest() -> None:
    assert torch.equal(windows(torch.arange(11), 4), torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]))


@pytest.mark.parametrize(("n", "length"), [(3, 4), (0, 2), (9, 1), (9, 0)])
def test_windows_need_enough_text(n: int, length: int) -> None:
    with pytest.raises(BadInput, match="no window"):
        windows(torch.arange(n), length)
    with pytest.raises(BadInput, match="a row of token ids"):
        windows(torch.zeros(2, 9), 4)
