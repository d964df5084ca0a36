"""The whole model: construction, initial weights, learning, no waiting for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tbf.model.config import UltraConfig
from tbf.model.encoder import TormentedBertFrankenstein, TormentedBertMini


def test_output_shapes(all_mixers, lively, token_ids):
    out = lively(all_mixers)(
        token_ids(2, 9), masked_positions=torch.zeros(2, 3, dtype=torch.long), masked_labels=token_ids(2, 3)
    )
    assert out.last_hidden_state.shape == (2, 9, 32)
    assert out.pooler_output.shape == (2, 32)
    assert out.logits.shape == (2, 3, 60)
    assert out.loss.shape == out.masked_correct.shape == ()
    assert not out.masked_correct.requires_grad


@pytest.mark.parametrize(
    "changes",
    [
        {"use_factorized_embedding": False},
        {"use_embedding_conv": False},
        {"norm_type": "derf"},
        {"norm_type": "dynamic_tanh", "ffn_activation": "geglu"},
        {"pooling": "cls", "use_bitnet": True},
    ],
)
def test_variants_train(all_mixers, token_ids, changes):
    torch.manual_seed(0)
    model = TormentedBertFrankenstein(all_mixers.replace(**changes))
    out = model(token_ids(2, 9), labels=token_ids(2, 9, seed=2))
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_router_losses_join_the_loss_with_their_coefficients(tiny, lively, token_ids):
    config = tiny(layer_pattern=["standard_attn"], num_loops=2, use_moe=True)
    model = lively(config)
    ids, labels = token_ids(2, 9), token_ids(2, 9, seed=2)
    out = model(ids, labels=labels)
    logits = model.predict(out.last_hidden_state).flatten(0, 1)
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels.flatten())
    expected = cross_entropy + 1e-2 * out.router["balance"] + 1e-3 * out.router["z"]
    torch.testing.assert_close(out.loss, expected)
    assert out.router["balance"] > 0.5


def test_every_mixer_can_overfit_one_batch(one_mixer, token_ids):
    torch.manual_seed(0)
    model = TormentedBertFrankenstein(one_mixer.replace(use_bitnet=True))
    ids = token_ids(4, 12)
    masked = ids.clone()
    masked[:, ::3] = 4
    labels = torch.where(masked == 4, ids, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(masked, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses[::10]


def test_meta_device_construction(all_mixers):
    real = TormentedBertFrankenstein(all_mixers)
    with torch.device("meta"):
        empty = TormentedBertFrankenstein(all_mixers)
    assert all(p.is_meta for p in empty.parameters())
    shapes = {name: tensor.shape for name, tensor in real.state_dict().items()}
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes
    empty.load_state_dict(real.state_dict(), assign=True)
    ids = torch.arange(5, 25).view(2, 10)
    assert torch.equal(empty(ids).last_hidden_state, real(ids).last_hidden_state)


def test_sizes_of_the_two_reference_shapes():
    """454M parameters for the full dense model with memory, 14.5M for the small one."""
    with torch.device("meta"):
        full = TormentedBertFrankenstein(UltraConfig())
        mini = TormentedBertMini()
    assert full.num_parameters() == pytest.approx(454.0e6, rel=0.002)
    assert mini.num_parameters() == pytest.approx(14.5e6, rel=0.01)
    assert mini.config.norm_type == "derf"


def test_mini_takes_overrides():
    with torch.device("meta"):
        model = TormentedBertMini(vocab_size=100, num_layers=2)
        copied = TormentedBertMini(model.config, num_loops=3)
    assert (model.config.vocab_size, model.config.num_layers, model.config.hidden_size) == (100, 2, 384)
    assert copied.config == model.config.replace(num_loops=3)


def test_seed_decides_the_weights(all_mixers):
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(TormentedBertFrankenstein(all_mixers).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert any(not torch.equal(models[0][name], models[2][name]) for name in models[0])


def test_initial_scales(tiny):
    torch.manual_seed(0)
    config = tiny(hidden_size=64, num_layers=2, num_loops=2, layer_pattern=["standard_attn", "mamba"])
    model = TormentedBertFrankenstein(config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    attention, mamba = (layer.mixer for layer in model.layers)
    shrink = 0.8796  # a normal cut at two deviations is narrower
    assert attention.qkv_proj.weight.std() == pytest.approx(0.02 * shrink, rel=0.05)
    assert attention.qkv_proj.weight.abs().max() <= 0.04
    assert attention.out_proj.weight.std() == pytest.approx(0.02 / 8**0.5 * shrink, rel=0.05)
    assert model.layers[0].ffn.down_proj.weight.std() == pytest.approx(0.02 / 8**0.5 * shrink, rel=0.05)
    step = torch.nn.functional.softplus(mamba.dt_bias)
    assert step.min() >= 1e-3 * 0.99
    assert step.max() <= 0.1 * 1.01
    assert mamba.A_log.min() >= 0
    hidden = model(torch.randint(5, 60, (2, 16))).last_hidden_state
    torch.testing.assert_close(hidden.square().mean(-1), torch.ones(2, 16), rtol=1e-3, atol=0)


def test_undecayed_names_exist_and_cover_gains_and_gates(all_mixers):
    model = TormentedBertFrankenstein(all_mixers)
    undecayed = set()
    for prefix, module in model.named_modules():
        for name in getattr(module, "no_weight_decay", ()):
            assert isinstance(getattr(module, name), torch.nn.Parameter), f"{prefix}.{name}"
            undecayed.add(f"{prefix}.{name}")
    for name in (
        "layers.0.mixer_norm.weight",
        "layers.1.mixer.memory.gates.weight",
        "layers.1.mixer.memory.initial",
        "layers.2.mixer.A_log",
        "layers.3.mixer.tau",
        "loop_start.inject",
        "final_norm.weight",
    ):
        assert name in undecayed
    assert not any("proj" in name or "table" in name for name in undecayed)


class _RefuseReads(TorchDispatchMode):
    """Raises where a program would wait for the device to read a value."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(word in name for word in self.FORBIDDEN), f"{name} reads from the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bitnet", [False, True])
def test_training_step_never_reads_from_the_device(all_mixers, lively, token_ids, bitnet):
    model = lively(all_mixers.replace(use_bitnet=bitnet))
    model.set_activation_checkpointing("layer")
    inputs = {
        "input_ids": token_ids(2, 9),
        "segment_ids": torch.tensor([[1] * 5 + [2] * 4, [1] * 7 + [0] * 2]),
        "masked_positions": torch.tensor([[0, 4], [1, 6]]),
        "masked_labels": token_ids(2, 2, seed=2),
        "loss_denominator": torch.tensor(4.0),
    }
    with _RefuseReads():
        model(**inputs).loss.backward()


def test_the_read_detector_works():
    with pytest.raises(AssertionError, match="reads from the device"), _RefuseReads():
        torch.ones(1).item()
