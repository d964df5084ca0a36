"""Looped weights and activation checkpointing."""

import copy

import pytest
import torch

from tbf.errors import ConfigError
from tbf.model.encoder import TormentedBertFrankenstein
from tbf.model.segment_info import SegmentInfo


def batch(token_ids):
    segments = torch.tensor([[1] * 7 + [2] * 5 + [0] * 2, [1] * 14])
    positions = torch.tensor([[1, 4, 8], [0, 5, 13]])
    return {
        "input_ids": token_ids(2, 14),
        "segment_ids": segments,
        "masked_positions": positions,
        "masked_labels": token_ids(2, 3, seed=7),
    }


def gradients(model, inputs, **extra):
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, **extra).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("mode", ["none", "layer", "loop"])
def test_each_gradient_hook_fires_once(all_mixers, lively, token_ids, mode, experts):
    model = lively(all_mixers.replace(ode_steps=2, use_moe=experts))
    model.set_activation_checkpointing(mode)
    fired = dict.fromkeys(dict(model.named_parameters()), 0)

    def count(name):
        def hook(parameter):
            fired[name] += 1

        return hook

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(count(name))
    model(**batch(token_ids)).loss.backward()
    assert fired == dict.fromkeys(fired, 1)


def test_shared_gradients_equal_the_unrolled_model(all_mixers, lively, token_ids):
    """The reference has its own copy of every layer for each loop; a shared weight's gradient is the copies' sum."""
    model = lively(all_mixers)
    model.set_activation_checkpointing("layer")
    inputs = batch(token_ids)
    loss, shared = gradients(model, inputs)

    model.zero_grad(set_to_none=True)
    copies = [copy.deepcopy(model.layers) for _ in range(2)]
    info = SegmentInfo.build(model.config, inputs["segment_ids"])
    x0 = model.embeddings(inputs["input_ids"], inputs["segment_ids"])
    inject, shift = model.loop_start.inject, model.loop_start.shift
    x = inject[0] * x0 + shift[0]
    for loop, layers in enumerate(copies):
        if loop:
            x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() + inject[loop] * x0 + shift[loop]
        for layer in layers:
            x, _ = layer(x, info, loop)
    hidden = model.final_norm(x)
    picked = hidden[torch.arange(2)[:, None], inputs["masked_positions"]]
    logits = model.predict(picked).flatten(0, 1)
    reference = torch.nn.functional.cross_entropy(logits, inputs["masked_labels"].flatten())
    reference.backward()

    torch.testing.assert_close(loss, reference.detach(), rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name.startswith("layers."):
            expected = sum(dict(c.named_parameters())[name.removeprefix("layers.")].grad for c in copies)
        else:
            expected = parameter.grad
        torch.testing.assert_close(shared[name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("bitnet", [False, True])
def test_checkpoint_modes_give_equal_gradients(all_mixers, lively, token_ids, dropout, bitnet):
    model = lively(all_mixers.replace(dropout=dropout, ode_steps=2, use_bitnet=bitnet))
    results = []
    for mode in ("none", "layer", "loop"):
        model.set_activation_checkpointing(mode)
        torch.manual_seed(5)
        results.append(gradients(model, batch(token_ids)))
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        for name, gradient in grads.items():
            assert torch.equal(gradient, results[0][1][name]), name


def test_each_loop_has_its_own_gains(all_mixers, lively, token_ids):
    model = lively(all_mixers)
    _, first = gradients(model, batch(token_ids), num_loops=1)
    _, both = gradients(model, batch(token_ids))
    name = "layers.0.mixer_norm.weight"
    assert torch.all(first[name][1] == 0)
    assert torch.all(both[name].abs().sum(1) > 0)


def test_more_loops_reuse_the_last_gains(all_mixers, lively, token_ids):
    model = lively(all_mixers)
    wide = TormentedBertFrankenstein(all_mixers.replace(num_loops=3))
    state = model.state_dict()
    for name, target in wide.state_dict().items():
        if state[name].shape != target.shape:
            state[name] = torch.cat([state[name], state[name][-1:]])
    wide.load_state_dict(state)
    ids = token_ids(2, 9)
    three = model(ids, num_loops=3).last_hidden_state
    assert torch.equal(three, wide(ids).last_hidden_state)
    assert not torch.allclose(three, model(ids).last_hidden_state, atol=1e-3)


def test_wrong_loop_count_and_mode_are_refused(tiny, token_ids):
    model = TormentedBertFrankenstein(tiny(layer_pattern=["standard_attn"]))
    with pytest.raises(ConfigError, match="num_loops is 0"):
        model(token_ids(1, 4), num_loops=0)
    with pytest.raises(ConfigError, match="did you mean 'layer'"):
        model.set_activation_checkpointing("layers")


@pytest.mark.parametrize(("mode", "kept"), [("layer", 11), ("loop", 1)])
def test_what_waits_for_backward_goes_to_the_host_once(all_mixers, lively, token_ids, monkeypatch, mode, kept):
    """A state per layer visit or per loop, but for the first, which the embeddings make; gradients don't change."""
    model, inputs = lively(all_mixers.replace(ode_steps=2)), batch(token_ids)
    model.set_activation_checkpointing(mode)
    expected = gradients(model, inputs)
    moved = []

    class Host(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            assert pin_memory is False  # no card here
            super().__init__(lambda x: moved.append(x.shape) or x.clone(), lambda x: x.clone())

    monkeypatch.setattr("tbf.model.encoder.save_on_cpu", Host)
    model.set_activation_checkpointing(mode, on_host=True)
    loss, grads = gradients(model, inputs)
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in grads.items())
    states = [shape for shape in moved if shape == (2, 14, model.config.hidden_size)]
    assert len(states) == kept


def test_nothing_kept_is_nothing_to_move(tiny):
    model = TormentedBertFrankenstein(tiny(layer_pattern=["standard_attn"]))
    with pytest.raises(ConfigError, match="choose layer or loop"):
        model.set_activation_checkpointing("none", on_host=True)
