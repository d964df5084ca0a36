"""Documents of a row never see each other and padding changes nothing; inside a document tokens do see each other."""

import pytest
import torch
from torch import Tensor

from tbf.model.encoder import TormentedBertFrankenstein

LENGTHS = (5, 9, 7)
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def packed_row(documents: list[Tensor], padding: int) -> tuple[Tensor, Tensor]:
    """Documents side by side in one row -> (ids [1, T], segments [1, T])."""
    ids = torch.cat([*documents, torch.zeros(padding, dtype=torch.long)])[None]
    runs = [torch.full((len(d),), i + 1) for i, d in enumerate(documents)]
    return ids, torch.cat([*runs, torch.zeros(padding, dtype=torch.long)])[None]


def leaf_embeddings(model: TormentedBertFrankenstein) -> list[Tensor]:
    """Cuts the graph at the table's output; after a forward the list holds that tensor, ready for gradients."""
    caught: list[Tensor] = []

    def cut(module, inputs, output):
        caught.append(output.detach().requires_grad_())
        return caught[-1]

    model.embeddings.table.register_forward_hook(cut)
    return caught


def test_packed_row_equals_separate_rows(mixed, lively, token_ids):
    model = lively(mixed)
    documents = [token_ids(n, seed=n) for n in LENGTHS]
    ids, segments = packed_row(documents, padding=3)
    packed = model(ids, segment_ids=segments).last_hidden_state[0]
    for document, piece in zip(documents, packed.split([*LENGTHS, 3])):
        alone = model(document[None]).last_hidden_state[0]
        torch.testing.assert_close(piece, alone, **CLOSE)


@pytest.mark.parametrize("left", [0, 3])
def test_padding_changes_nothing(mixed, lively, token_ids, left):
    model = lively(mixed)
    ids = token_ids(2, 9)
    padded = torch.nn.functional.pad(ids, (left, 6))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, 6))
    short, long = model(ids), model(padded, attention_mask=mask)
    torch.testing.assert_close(long.last_hidden_state[:, left : left + 9], short.last_hidden_state, **CLOSE)
    torch.testing.assert_close(long.pooler_output, short.pooler_output, **CLOSE)


@pytest.mark.parametrize("bitnet", [False, True])
def test_no_gradient_between_documents(mixed, lively, token_ids, bitnet):
    model = lively(mixed.replace(use_bitnet=bitnet))
    ids, segments = packed_row([token_ids(n, seed=n) for n in LENGTHS], padding=4)
    caught = leaf_embeddings(model)
    hidden = model(ids, segment_ids=segments).last_hidden_state
    target = segments[0] == 2
    hidden[0, target].pow(3).sum().backward()
    gradient = caught[0].grad[0]  # [T, e]
    assert torch.all(gradient[~target] == 0)
    assert torch.all(gradient[target].abs().sum(-1) > 0)


def test_other_documents_and_padding_leave_output_bitwise_alone(mixed, lively, token_ids):
    model = lively(mixed)
    documents = [token_ids(n, seed=n) for n in LENGTHS]
    ids, segments = packed_row(documents, padding=4)
    changed = torch.where(segments == 2, ids, token_ids(*ids.shape, seed=99))
    before, after = (model(x, segment_ids=segments).last_hidden_state for x in (ids, changed))
    target = segments == 2
    assert torch.equal(before[target], after[target])
    assert not torch.equal(before[~target], after[~target])


def test_mixer_lets_neighbours_talk(one_mixer, lively, token_ids):
    model = lively(one_mixer.replace(use_embedding_conv=False))
    ids = token_ids(1, 8)
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] + 1) % 50 + 5
    difference = (model(ids).last_hidden_state - model(changed).last_hidden_state)[0].abs().amax(-1)  # [T]
    assert torch.all(difference[[3, 5]] > 1e-5), difference


@pytest.mark.parametrize("name", ["titan_attn", "standard_attn", "sigmoid_attn", "ode"])
def test_local_window_reaches_half_its_width(tiny, lively, token_ids, name):
    config = tiny(
        layer_pattern=[f"{name}:local"], window=4, use_embedding_conv=False, ode_solver="euler"
    )  # one Euler step sees one window; the stages of RK4 widen it
    model = lively(config)
    ids = token_ids(1, 12)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 50 + 5
    moved = (model(ids).last_hidden_state != model(changed).last_hidden_state).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [4, 5, 6, 7, 8]
