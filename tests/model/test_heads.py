"""The sparse masked-language-model head and its loss."""

import pytest
import torch
import torch.nn.functional as F

from tbf.errors import ConfigError
from tbf.model.heads import dense_to_slots, masked_lm_loss, pool

POSITIONS = torch.tensor([[2, 5, 0], [1, 3, 8]])


@pytest.fixture
def model(tiny, lively):
    return lively(tiny(layer_pattern=["standard_attn"]))


@pytest.fixture
def slots(token_ids):
    labels = token_ids(2, 3, seed=4)
    labels[0, 2] = -100
    return labels


def test_head_at_masked_positions_equals_the_dense_one(model, token_ids, slots):
    ids = token_ids(2, 9)
    out = model(ids, masked_positions=POSITIONS, masked_labels=slots)
    dense = model.predict(model(ids).last_hidden_state)  # [B, T, V]
    expected = dense[torch.arange(2)[:, None], POSITIONS]
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-5)
    filled = slots != -100
    torch.testing.assert_close(out.loss, F.cross_entropy(expected[filled], slots[filled]))
    assert out.masked_correct == (expected.argmax(-1) == slots)[filled].sum()


def test_head_follows_its_formula(model):
    hidden = torch.randn(4, 32)
    inner = F.gelu(hidden @ model.head.dense.weight.T)
    inner = inner / (inner.square().mean(-1, keepdim=True) + 1e-6).sqrt() * model.head.norm.weight
    expected = inner @ model.embeddings.table.weight[:60].T + model.head.bias
    torch.testing.assert_close(model.predict(hidden), expected, rtol=1e-5, atol=1e-5)


def test_dense_labels_equal_slots(model, token_ids, slots):
    ids = token_ids(2, 9)
    labels = torch.full((2, 9), -100)
    for row in range(2):
        for position, label in zip(POSITIONS[row], slots[row]):
            if label != -100:
                labels[row, position] = label
    dense = model(ids, labels=labels)
    sparse = model(ids, masked_positions=POSITIONS, masked_labels=slots)
    torch.testing.assert_close(dense.loss, sparse.loss)
    assert dense.masked_correct == sparse.masked_correct
    positions, picked = dense_to_slots(labels)
    assert positions[1].tolist() == [1, 3, 8]
    assert picked[0].tolist() == [slots[0, 0], slots[0, 1], -100]


def test_kept_and_random_positions_carry_loss(model, token_ids):
    """Of three predicted positions one is masked, one random, one kept: each adds its own term."""
    original = token_ids(1, 9)
    ids = original.clone()
    ids[0, 1], ids[0, 3] = 4, 17  # [MASK]; a random token; position 8 keeps its own
    positions = torch.tensor([[1, 3, 8]])
    labels = original.gather(1, positions)
    loss = model(ids, masked_positions=positions, masked_labels=labels).loss
    terms = [model(ids, masked_positions=positions[:, [i]], masked_labels=labels[:, [i]]).loss for i in range(3)]
    assert all(term > 0 for term in terms)
    torch.testing.assert_close(loss, sum(terms) / 3)


def test_loss_denominator_divides_the_sum(model, token_ids, slots):
    inputs = {"input_ids": token_ids(2, 9), "masked_positions": POSITIONS, "masked_labels": slots}
    mean = model(**inputs).loss
    torch.testing.assert_close(model(**inputs, loss_denominator=10).loss, mean * 5 / 10)
    torch.testing.assert_close(model(**inputs, loss_denominator=torch.tensor(20.0)).loss, mean * 5 / 20)


def test_loss_equals_cross_entropy_of_pytorch():
    logits = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, -100, 10], [4, 4, -100]])
    loss, correct = masked_lm_loss(logits, labels, 3.0)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 3
    torch.testing.assert_close(loss, expected)
    assert correct == (logits.argmax(-1) == labels).sum()
    torch.testing.assert_close(
        *(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected))
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nan_logits_reach_the_loss():
    logits = torch.zeros(1, 2, 5)
    logits[0, 1, 3] = torch.nan
    loss, correct = masked_lm_loss(logits, torch.tensor([[0, 1]]), None)
    assert loss.isnan()
    assert correct == 1


def test_a_batch_without_targets_has_zero_loss(model, token_ids):
    out = model(token_ids(2, 9), labels=torch.full((2, 9), -100))
    out.loss.backward()
    assert out.loss == 0
    assert out.masked_correct == 0


def test_padded_vocabulary_never_wins(model, token_ids, slots):
    inputs = {"input_ids": token_ids(2, 9), "masked_positions": POSITIONS, "masked_labels": slots}
    before = model(**inputs)
    assert model.embeddings.table.weight.shape[0] == 64
    with torch.no_grad():
        model.embeddings.table.weight[60:] = 1e4
    after = model(**inputs)
    assert after.logits.shape[-1] == 60
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)
    after.loss.backward()
    assert torch.all(model.embeddings.table.weight.grad[60:] == 0)


def test_no_labels_no_loss(model, token_ids):
    out = model(token_ids(2, 9))
    assert out.logits is None
    assert out.loss is None
    assert out.masked_correct is None
    assert out.router is None


def test_half_given_or_doubled_labels_are_refused(model, token_ids, slots):
    with pytest.raises(ConfigError, match="without masked_labels"):
        model(token_ids(2, 9), masked_positions=POSITIONS)
    with pytest.raises(ConfigError, match="give one of them"):
        model(token_ids(2, 9), labels=token_ids(2, 9), masked_positions=POSITIONS, masked_labels=slots)


def test_pooling():
    hidden = torch.arange(12.0).view(1, 4, 3)
    real = torch.tensor([[True, True, False, False]])
    assert torch.equal(pool(hidden, real, "mean"), hidden[:, :2].mean(1))
    assert torch.equal(pool(hidden, real, "cls"), hidden[:, 0])
    assert torch.all(pool(hidden, torch.zeros_like(real), "mean") == 0)
