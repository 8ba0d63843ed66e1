"""The claims of README.md, executed: the memory, the model, text and training. test_images.py has those about pictures."""
import dataclasses
import hashlib
import http.server
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for models this small one thread is as fast, and does not fight for a busy core

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import move
import prepare_data
import train_gpt
from move import (GPT, GPTConfig, KVCache, MoVELatentAttention, ValueBank, ValueMixer, mix_values,
                  rotary_angles)

HERE = Path(__file__).resolve().parent
KINDS = list(itertools.product(["mha", "mla"], ["none", "lave", "move"]))
all_kinds = pytest.mark.parametrize("attention, memory", KINDS)


def small_config(attention="mha", memory="move", **overrides):
    return GPTConfig(**{**dict(vocab_size=50, seq_len=24, n_layers=2, n_heads=2, dim=16, n_slots=2,
                               attention=attention, memory=memory), **overrides})


def awake(module, seed=0):
    """Random weights everywhere: as it starts, a layer is the identity, and tests would see nothing of it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if p.ndim == 3 else p.size(-1) ** -0.5))
    return module


def random_ids(*shape, vocab_size=50, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------ the mix and the bank


@pytest.mark.parametrize("M, H, d_h", [(1, 1, 1), (1, 3, 5), (3, 2, 7), (4, 6, 8)])
def test_mix_is_the_equation_in_plain_loops(M, H, d_h):
    B, T = 2, 3
    v = torch.randn(B, T, H, d_h, dtype=torch.float64)
    memory = torch.randn(B, T, M, H * d_h, dtype=torch.float64)
    gates = 2 * torch.rand(B, T, H, M + 1, dtype=torch.float64)
    mixed = mix_values(v, memory, gates)
    for b, t, h, j in itertools.product(range(B), range(T), range(H), range(d_h)):
        expected = gates[b, t, h, 0].item() * v[b, t, h, j].item()
        for i in range(M):
            expected += gates[b, t, h, i + 1].item() * memory[b, t, i, h * d_h + j].item()
        assert mixed[b, t, h, j].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_bank_is_an_index():
    bank = ValueBank(vocab_size=7, n_slots=3, dim=4)
    idx = torch.tensor([[0, 6, 6], [2, 0, 1]])
    memory = bank(idx)
    assert memory.shape == (2, 3, 3, 4)
    for b, t in itertools.product(range(2), range(3)):
        assert torch.equal(memory[b, t], bank.weight[idx[b, t]])
    assert bank(torch.tensor([[5]])).shape == (1, 1, 3, 4)
    for bad in (7, -1):
        with pytest.raises(IndexError):
            bank(torch.tensor([[bad]]))


@pytest.mark.parametrize("gate_value", [True, False])
def test_gates_start_at_one_and_stay_between_zero_and_two(gate_value):
    mixer = ValueMixer(dim=16, n_heads=2, n_slots=3, gate_value=gate_value)
    x = torch.randn(4, 5, 16)
    assert torch.equal(mixer.gates(x), torch.ones(4, 5, 2, 4))
    gates = awake(mixer).gates(x)
    assert gates.shape == (4, 5, 2, 4)
    assert gates.min() > 0 and gates.max() < 2 and gates[..., 1:].std() > 0.1
    assert torch.equal(gates[..., 0], torch.ones(4, 5, 2)) != gate_value
    assert mixer.router.weight.shape == (2 * (3 + gate_value), 16) and mixer.router.bias is None
    # Equation 2 by itself: gate i of head h is output i·H + h of the router.
    for i, h in itertools.product(range(3 + gate_value), range(2)):
        z = x.double() @ mixer.router.weight[i * 2 + h].double()
        assert torch.allclose(gates[..., h, i + 1 - gate_value].double(), 2 / (1 + torch.exp(-z)), atol=1e-6)


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_gradient_of_the_shared_bank_through_the_whole_model(attention):
    model = awake(GPT(small_config(attention, vocab_size=6, dim=8, n_layers=3))).double()
    assert len(list(model.banks.parameters())) == 1
    idx, targets = random_ids(1, 5, vocab_size=6), random_ids(1, 5, vocab_size=6, seed=1)

    def loss(weight):
        return torch.func.functional_call(model, {"banks.0.weight": weight}, (idx, targets))

    weight = model.banks[0].weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(loss, (weight,), eps=1e-6, atol=1e-7)
    # The sum over the layers: three layers with a copy of the bank each have its three parts.
    apart = GPT(dataclasses.replace(model.config, memory="lave", n_slots=6, gate_value=True)).double()
    apart.load_state_dict({**model.state_dict(), **{f"banks.{i}.weight": weight.detach() for i in range(3)}})
    parts = torch.autograd.grad(apart(idx, targets), list(apart.banks.parameters()))
    whole, = torch.autograd.grad(loss(weight), weight)
    assert torch.allclose(sum(parts), whole, rtol=1e-9, atol=1e-12)
    assert all(part.abs().max() > 1e-4 for part in parts)


def test_slots_do_not_stay_twins():
    def distance_after_training(zero_bank):
        torch.manual_seed(0)
        model = GPT(small_config(n_slots=4))
        if zero_bank:
            nn.init.zeros_(model.banks[0].weight)
        optimizers = train_gpt.make_optimizers(model, 1.0)
        idx, targets = random_ids(4, 24, vocab_size=5), random_ids(4, 24, vocab_size=5, seed=1)
        for _ in range(5):
            model(idx, targets).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        slots = model.banks[0].weight[idx[0, 0]]  # of an id that is in every batch
        assert slots.norm() > 0.1
        return torch.pdist(slots).min()

    assert distance_after_training(zero_bank=False) > 0.01
    assert distance_after_training(zero_bank=True) == 0


@pytest.mark.parametrize("attention, dim", [("mha", 64), ("mha", 768), ("mla", 64)])
def test_values_start_with_their_variance(attention, dim):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=500, seq_len=64, n_layers=1, n_heads=2, dim=dim, n_slots=64, attention=attention)
    layer, bank = GPT(config).blocks[0].attention, ValueBank(500, 64, config.memory_dim)
    idx, x = random_ids(4, 64, vocab_size=500), move.norm(torch.randn(4, 64, dim))
    v = layer.w_v(x) if attention == "mha" else move.norm(layer.w_down(x)[..., :config.kv_rank])
    v = v.unflatten(-1, (2, -1))
    ratio = layer.mixer(x, v, bank(idx)).var() / v.var()
    assert 1 < ratio < 1.1


# ------------------------------------------------------------------- without memory, a plain transformer


def plain_transformer(weights, config, idx):
    """The model without the feature, from its weights: written apart, no mixer and no bank in it."""
    B, T = idx.shape
    L, H, d, d_h = config.n_layers, config.n_heads, config.dim, config.dim // config.n_heads
    width = config.rope_dim or d_h
    angle = torch.arange(T)[:, None] * 10000 ** (-torch.arange(0, width, 2) / width)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rms(x):
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)

    def turn(x):
        a, b = x[..., :width // 2], x[..., width // 2:]
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)

    x = rms(F.embedding(idx, weights["embedding.weight"]))
    for i in range(L):
        def linear(name, x):
            return x @ weights[f"blocks.{i}.{name}.weight"].T

        h = rms(x)
        if config.attention == "mha":
            q, k, v = (linear(f"attention.w_{n}", h).view(B, T, H, d_h) for n in "qkv")
            q, k = turn(rms(q)), turn(rms(k))
        else:
            q = linear("attention.w_q", h).view(B, T, H, -1)
            q = torch.cat([q[..., :d_h], turn(q[..., d_h:])], -1)
            down = linear("attention.w_down", h)
            up = linear("attention.w_up", rms(down[..., :config.kv_rank])).view(B, T, H, 2 * d_h)
            k_rope = turn(down[..., None, config.kv_rank:]).expand(B, T, H, width)
            k, v = torch.cat([up[..., :d_h], k_rope], -1), up[..., d_h:]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, d)
        x = x + linear("attention.w_o", y)
        x = x + linear("mlp_down", F.relu(linear("mlp_up", rms(x))) ** 2)
    return 15 * (2 * torch.sigmoid(2 / 15 * (rms(x) @ weights["head.weight"].T)) - 1)  # 15·tanh(z / 15)


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_without_memory_it_is_the_plain_transformer_to_the_bit(attention):
    off = [small_config(attention, memory="none"), small_config(attention, n_slots=0)]
    models = [awake(GPT(config)) for config in off]
    idx = random_ids(3, 17)
    for model in models:
        assert not any("router" in name or "bank" in name for name in model.state_dict())
        assert torch.equal(model(idx), plain_transformer(model.state_dict(), model.config, idx))


@all_kinds
def test_the_same_seed_gives_the_same_transformer_with_any_memory(attention, memory):
    def weights(memory):
        torch.manual_seed(3)
        return GPT(small_config(attention, memory)).state_dict()

    with_memory, without = weights(memory), weights("none")
    assert all(torch.equal(with_memory[name], without[name]) for name in without)


def test_lave_is_one_table_in_every_other_layer_and_no_gate_on_the_value():
    def slots(n_slots, n_layers=12):
        return small_config(memory="lave", n_slots=n_slots, n_layers=n_layers).layer_slots()

    assert slots(6) == [0, 1] * 6 and slots(12) == [1] * 12 and slots(24) == [2] * 12
    assert slots(3, 7)[-1] == 1 and sum(slots(3, 7)) == 3
    lave = GPTConfig.from_depth(12, 1, vocab_size=100, memory="lave")
    assert GPT(lave).parameter_counts()["memory"] == 6 * 100 * 768
    # V + g ⊙ E_l[w_t], with g of the router alone
    model = awake(GPT(small_config(memory="lave", n_slots=1)))
    assert model.config.gate_value is False and model.banks[0] is None
    assert model.blocks[0].attention.mixer is None
    mixer, idx, x, v = model.blocks[1].attention.mixer, random_ids(1, 4), torch.randn(1, 4, 16), torch.randn(1, 4, 2, 8)
    mixed = mixer(x, v, model.banks[1](idx))
    for t, h in itertools.product(range(4), range(2)):
        g = 2 / (1 + math.exp(-(x[0, t] @ mixer.router.weight[h]).item()))
        expected = v[0, t, h] + g * model.banks[1].weight[idx[0, t], 0, 8 * h:8 * h + 8]
        assert torch.allclose(mixed[0, t, h], expected, atol=1e-5)


def test_the_two_switches_of_the_ablation():
    for memory, gate_value in itertools.product(["move", "lave"], [True, False]):
        model = GPT(small_config(memory=memory, gate_value=gate_value, n_slots=2, n_layers=2))
        assert len([b for b in model.banks if b is not None]) == (1 if memory == "move" else 2)
        slots = 2 if memory == "move" else 1
        assert model.blocks[0].attention.mixer.router.weight.shape == (2 * (slots + gate_value), 16)
        assert model.parameter_counts()["memory"] == 2 * 50 * 16


# ---------------------------------------------------------------------------- the cache and generation


@all_kinds
@pytest.mark.parametrize("chunks", [[1] * 9, [5, 1, 1, 2], [9]])
def test_logits_with_and_without_the_cache_agree(attention, memory, chunks):
    model = awake(GPT(small_config(attention, memory)))
    idx = random_ids(3, 9)
    cache, logits = model.new_cache(3, 9), []
    with torch.no_grad():
        for ids in idx.split(chunks, dim=1):
            logits.append(model(ids, cache=cache))
        expected = model(idx)
    assert (torch.cat(logits, 1) - expected).abs().max() < 1e-5
    assert expected.std() > 0.1
    with pytest.raises(IndexError, match="cannot take token 10"):
        model(idx[:, :1], cache=cache)


@pytest.mark.parametrize("n_slots", [0, 1, 8])
def test_what_a_token_leaves_in_the_cache(n_slots):
    mha = GPT(small_config("mha", n_slots=n_slots)).new_cache(1, 4)
    mla = GPT(small_config("mla", n_slots=n_slots, kv_rank=6, rope_dim=4)).new_cache(1, 4)
    assert mha.bytes_per_token == 2 * (2 * 16) * 4  # layers · (k and V_S) · float32
    assert mla.bytes_per_token == 2 * (6 + 4) * 4
    assert isinstance(mla, KVCache) and sum(store.numel() for store in mla.stores) == 2 * 4 * (6 + 4)


@pytest.mark.parametrize("n_slots", [0, 3])
def test_absorbed_latent_attention_is_the_expanded_one(n_slots):
    layer = awake(MoVELatentAttention(32, 4, n_slots, kv_rank=12, rope_dim=6))
    x, memory = torch.randn(2, 11, 32), torch.randn(2, 11, 3, 12)
    cache = KVCache(1, 2, 11, layer.cache_shapes)
    expanded, absorbed = (layer(x, rotary_angles(torch.arange(11)[:, None], 6), memory, c) for c in (None, cache))
    assert (expanded - absorbed).abs().max() < 1e-5 and expanded.std() > 0.05
    # The memory went into the latent: c_S of the cache is g_0 ⊙ c_KV + Σ g_i ⊙ M_i, group by group.
    c = move.norm(layer.w_down(x)[..., :12])
    if n_slots:
        g = layer.mixer.gates(x)  # (2, 11, 4, 4): four groups of three
        c = torch.stack([g[..., j // 3, 0] * c[..., j] + sum(g[..., j // 3, i + 1] * memory[..., i, j] for i in range(3))
                         for j in range(12)], -1)
    assert torch.allclose(cache.stores[0][0], c, atol=1e-5)


@all_kinds
def test_nothing_later_changes_what_came_before(attention, memory):
    model = awake(GPT(small_config(attention, memory)))
    idx = random_ids(2, 12)
    logits = model(idx)
    for t in range(11):
        changed = idx.clone()
        changed[:, t + 1:] = (changed[:, t + 1:] + 7) % 50
        other = model(changed)
        assert torch.allclose(logits[:, :t + 1], other[:, :t + 1], atol=1e-5)
        assert not torch.allclose(logits[:, t + 1], other[:, t + 1], atol=1e-2)


@all_kinds
def test_generation(attention, memory):
    model = awake(GPT(small_config(attention, memory)))
    prompt = random_ids(3, 2)
    greedy = torch.stack(list(model.generate(prompt, 10, temperature=0)), 1)
    idx = prompt
    for _ in range(10):  # without a cache
        idx = torch.cat([idx, model(idx)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(greedy, idx[:, 2:])
    assert torch.equal(greedy, torch.stack(list(model.generate(prompt, 10, top_k=1)), 1))
    draws = [torch.stack(list(model.generate(prompt, 10, generator=torch.Generator().manual_seed(s)))) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert len(list(model.generate(prompt, 23))) == 23  # the last one is never read
    with pytest.raises(ValueError, match="seq_len, 24"):
        list(model.generate(prompt, 24))


def test_generation_leaves_out_the_attention_that_plans_anew_for_each_length():
    model, on = GPT(small_config()), []
    model.register_forward_pre_hook(lambda *_: on.append(torch.backends.cuda.cudnn_sdp_enabled()))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    tokens = model.generate(random_ids(1, 2), 3)
    next(tokens), next(tokens)
    assert before and on == [False, False]
    assert torch.backends.cuda.cudnn_sdp_enabled()  # between two tokens the caller's setting holds
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # and what the caller turned off stays off
        model.register_forward_pre_hook(lambda *_: on.append(torch.backends.cuda.flash_sdp_enabled()))
        next(tokens)
    assert on[2:] == [False, False]


def test_top_k_draws_only_among_the_likeliest():
    model = awake(GPT(small_config()))
    prompt = random_ids(1, 3).expand(400, 3)
    likeliest = model(prompt[:1])[0, -1].topk(3).indices
    drawn = next(iter(model.generate(prompt, 1, temperature=2.0, top_k=3)))
    assert set(drawn.tolist()) == set(likeliest.tolist())
    assert max(next(iter(model.generate(prompt, 1, temperature=100.0, n_ids=7))).tolist()) == 6


def test_top_p_draws_among_the_fewest_that_make_up_p():
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    for top_p, kept in [(0.01, {1}), (0.39, {1}), (0.45, {1, 3}), (0.69, {1, 3}), (0.8, {1, 3, 4}), (1.0, {0, 1, 2, 3, 4})]:
        assert set(move.draw(p.log().expand(2000, 5), top_p=top_p).tolist()) == kept
    # At temperature ½ the probabilities are squared, and add up otherwise.
    q = p ** 2 / (p ** 2).sum()
    drawn = move.draw(p.log().expand(20000, 5), temperature=0.5, top_p=0.85, generator=torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=5) / 20000
    assert torch.allclose(shares, torch.tensor([0, q[1], 0, q[3], 0]) / (q[1] + q[3]), atol=0.01)


@pytest.mark.parametrize("attention, memory", KINDS)
def test_guidance_is_its_formula(attention, memory):
    """Against two models' worth of forward passes without a cache."""
    model = awake(GPT(small_config(attention, memory)))
    with_class, without = random_ids(3, 2), random_ids(3, 2, seed=1)

    def generate(**options):
        return torch.stack(list(model.generate(with_class, 8, generator=torch.Generator().manual_seed(0), **options)), 1)

    for scale in (0.0, 0.5, 3.0):
        generator, ids = torch.Generator().manual_seed(0), torch.empty(3, 0, dtype=torch.long)
        for _ in range(8):
            a, b = (model(torch.cat([prompt, ids], 1))[:, -1] for prompt in (with_class, without))
            probabilities = (b + scale * (a - b)).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
        assert torch.equal(generate(idx_without=without, cfg_scale=scale), ids)
    assert torch.equal(generate(idx_without=without, cfg_scale=1.0), generate())
    assert not torch.equal(generate(idx_without=without, cfg_scale=3.0), generate())


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_rotary_places_of_a_picture(attention):
    config = small_config(attention, grid=(2, 3), seq_len=6, dim=32, rope_dim=8 if attention == "mla" else None)
    assert config.places().tolist() == [[0, 0], [1, 1], [1, 2], [1, 3], [2, 1], [2, 2]]
    model, width = GPT(config), config.rotary_dim
    x = torch.randn(1, 6, 1, width, dtype=torch.float64)
    turned = move.rotate(x, (model.cos.double(), model.sin.double()))
    for t, (row, column) in enumerate(config.places().tolist()):  # pair by pair, as complex numbers
        for j in range(width // 2):
            place, i = (row, j) if j < width // 4 else (column, j - width // 4)
            angle = place * 10000 ** (-i / (width // 4))
            a, b = x[0, t, 0, j].item(), x[0, t, 0, j + width // 2].item()
            z = complex(a, b) * complex(math.cos(angle), -math.sin(angle))
            assert turned[0, t, 0, j].item() == pytest.approx(z.real, abs=1e-5)
            assert turned[0, t, 0, j + width // 2].item() == pytest.approx(z.imag, abs=1e-5)


# ---------------------------------------------------------------------------------------- the model


@all_kinds
def test_compiles_whole_and_once(attention, memory):
    torch._dynamo.reset()
    generate_code = memory == "move"  # it takes long on a CPU: one memory and one layer will do
    model = awake(GPT(small_config(attention, memory, n_layers=1 if generate_code else 2)))
    backend = "inductor" if generate_code else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)  # fullgraph: raises at a graph break
    for seed in range(2):
        idx, targets = random_ids(2, 16, seed=seed), random_ids(2, 16, seed=seed + 9)
        with torch._dynamo.config.patch(error_on_recompile=True):
            loss = compiled(idx, targets)
        (loss / 3).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        expected = model(idx, targets)
        (expected / 3).backward()
        assert torch.allclose(loss, expected, atol=1e-5)
        assert all(torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(gradients, model.parameters()))
        model.zero_grad()


@pytest.mark.parametrize("depth, millions", [(12, 186), (20, 561), (32, 1879)])
def test_sizes_of_the_family(depth, millions):
    with torch.device("meta"):
        plain = GPT(GPTConfig.from_depth(depth, 0, vocab_size=65536)).parameter_counts()["total"]
        assert round(plain / 1e6) == millions
        if depth == 12:
            counts = GPT(GPTConfig.from_depth(12, 1, vocab_size=65536)).parameter_counts()
            assert round(counts["memory"] / 1e6) == 302 and counts["total"] == plain + counts["memory"] + counts["router"]


def test_flops_of_the_router_are_the_papers():
    with torch.device("meta"):  # d = 2048, H = 16, M = 32, T = 2048
        flops = GPT(GPTConfig.from_depth(32, 2, vocab_size=65536, seq_len=2048)).flops_per_token()
    assert flops["router"] == 32 * 2 * 2048 * 16 * 33
    assert flops["matrices"] == 32 * 24 * 2048 ** 2 and flops["attention"] == 32 * 4 * 2048 * 2048
    assert flops["router"] / (flops["matrices"] + flops["attention"]) == pytest.approx(0.018, abs=0.0005)


@all_kinds
def test_flops_are_what_pytorch_counts(attention, memory):
    from torch.utils.flop_counter import FlopCounterMode
    config = small_config(attention, memory, dim=32, seq_len=16)
    model = GPT(config)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(random_ids(1, 16))
    flops = model.flops_per_token()
    assert counter.get_total_flops() == 16 * (sum(flops.values()) - flops["mix"])  # it counts products of matrices


@pytest.mark.parametrize("bad, message", [
    (dict(n_heads=3), "dim 16 is not divisible by n_heads 3"), (dict(n_slots=-1), "n_slots must be 0 or more"),
    (dict(attention="mqa"), "attention must be"), (dict(memory="engram"), "memory must be"),
    (dict(vocab_size=0), "vocab_size must be at least 1"), (dict(attention="mla", kv_rank=5), "kv_rank 5 is not a positive"),
    (dict(attention="mla", kv_rank=0), "kv_rank 0 is not a positive"), (dict(attention="mla", rope_dim=0), "must be a multiple of 2, not 0"),
    (dict(grid=(4, 5)), "a grid of 4 × 5 codes needs a seq_len of as many, not 24"), (dict(grid=(4, 6), n_heads=8), "must be a multiple of 4, not 2"),
    (dict(n_heads=16), "must be a multiple of 2, not 1"), (dict(attention="mla", rope_dim=3), "must be a multiple of 2, not 3")])
def test_configurations_that_cannot_be_built(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        small_config(**bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 7])
def test_every_depth_can_be_built(depth):
    for attention in ("mha", "mla"):
        config = GPTConfig.from_depth(depth, 0.1, vocab_size=20, seq_len=8, attention=attention)
        assert config.n_slots == 1 and GPT(config)(random_ids(1, 1, vocab_size=20)).shape == (1, 1, 20)
    with pytest.raises(ValueError):
        GPTConfig.from_depth(depth, -1)


def test_more_than_seq_len_tokens():
    with pytest.raises(ValueError, match="25 tokens are more than this model's seq_len, 24"):
        GPT(small_config())(random_ids(1, 25))


def test_bfloat16_activations_and_float32_parameters():
    model = awake(GPT(small_config(), torch.bfloat16))
    reference = awake(GPT(small_config()))
    idx = random_ids(2, 20)
    assert model(idx).dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters())
    assert 1e-4 < (model(idx) - reference(idx)).abs().max() < 0.3
    assert model.new_cache(1, 4).stores[0].dtype == torch.bfloat16


@pytest.mark.parametrize("chunk", [4, 7, 100])
def test_the_loss_by_chunks(chunk, monkeypatch):
    monkeypatch.setattr(move, "CHUNK", chunk)  # of 14 tokens
    torch.manual_seed(0)
    x, weight = torch.randn(14, 6, dtype=torch.float64), 9 * torch.randn(11, 6, dtype=torch.float64)  # logits far beyond the cap
    targets = torch.tensor([-100, 3, 0, 10, -100, 5, 5, 1, 2, 9, -100, 7, 8, 4])
    results = []
    for by_chunks in (True, False):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if by_chunks:
            loss = move.linear_cross_entropy(a, w, targets)
            with torch.no_grad():
                assert loss == move.linear_cross_entropy(a, w, targets)
        else:
            loss = F.cross_entropy(15 * torch.tanh(a @ w.T / 15), targets)
        (loss / 3).backward()
        results.append((loss, a.grad, w.grad))
    for got, expected in zip(*results):
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-15)
    with pytest.raises(RuntimeError):
        move.linear_cross_entropy(x, weight, targets.clamp(min=11))
    none = torch.full_like(targets, -100)
    a = x.clone().requires_grad_()
    move.linear_cross_entropy(a, weight, none).backward()
    assert not a.grad.any()
    with pytest.raises(RuntimeError, match="does not require grad"):  # there is no second derivative
        slope, = torch.autograd.grad(move.linear_cross_entropy(a, weight, targets), a, create_graph=True)
        slope.sum().backward()


# ---------------------------------------------------------------------------------- the README's claims


def test_move_runs_alone_in_an_empty_folder(tmp_path):
    shutil.copy(HERE / "move.py", tmp_path)
    code = ("import torch, move; m = move.GPT(move.GPTConfig.from_depth(2, vocab_size=9, seq_len=4));"
            "x = torch.tensor([[1, 2, 3]]); m(x, x).backward(); print([t.item() for t in m.generate(x, 1)])")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and re.fullmatch(r"\[\d]\n", result.stdout), result.stderr


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.S)


def test_the_snippet_for_grouped_query_attention():
    snippet, = [block for block in readme_blocks("python") if "ValueMixer" in block]
    scope = {}
    torch.manual_seed(0)
    exec(snippet, scope)
    model = scope["model"]
    n_kv_heads = model.layers[0].mixer.n_heads
    assert n_kv_heads < model.layers[0].n_heads  # it is grouped-query attention
    idx = random_ids(2, 7, vocab_size=model.bank.weight.size(0))
    out = model(idx)
    out.square().mean().backward()
    touched = model.bank.weight.grad.flatten(1).abs().sum(1) > 0
    assert touched.sum() == len(idx.unique()) and touched[idx].all()


def test_the_table_of_symbols_points_at_the_code():
    lines = (HERE / "move.py").read_text().splitlines()
    rows = re.findall(r"\| `([^`]+)` \| \[move\.py:(\d+)\]\(move\.py#L(\d+)\) \|", (HERE / "README.md").read_text())
    assert len(rows) >= 8
    for code, number, anchor in rows:
        assert number == anchor and code in lines[int(number) - 1], f"{code} is not on line {number}"


@pytest.mark.parametrize("script", ["train_gpt.py", "train_image.py", "prepare_data.py"])
def test_the_readme_names_every_flag(script):
    parser_help = subprocess.run([sys.executable, script, "--help"], cwd=HERE, capture_output=True, text=True)
    assert parser_help.returncode == 0
    flags = set(re.findall(r"(--[a-z]\w+)", parser_help.stdout)) - {"--help", "--nproc_per_node"}
    readme = (HERE / "README.md").read_text()
    quote = "" if script == "prepare_data.py" else "`"  # whose flags stand in the commands of the table of data sets
    assert flags and not [flag for flag in flags if quote + flag not in readme]


# ------------------------------------------------------------------------------------------ the data


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Some 700 kB of real Python, as files."""
    folder = tmp_path_factory.mktemp("sources")
    stdlib = Path(os.__file__).parent
    names = ["argparse.py", "ast.py", "copy.py", "csv.py", "heapq.py", "inspect.py", "json/decoder.py", "os.py", "pydoc.py",
             "random.py", "shutil.py", "statistics.py", "tarfile.py", "textwrap.py", "threading.py", "typing.py", "zipfile.py"]
    for path in (stdlib / name for name in names):
        if path.exists():  # zipfile is a folder in some versions
            shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture(scope="session")
def data_dir(sources, tmp_path_factory):
    """data/small: a data set of those files, made as a user would."""
    folder = tmp_path_factory.mktemp("data")
    prepare_data.main(["--text", *map(str, sorted(sources.iterdir())), "--name", "small", "--vocab_size", "512",
                       "--data_dir", str(folder)])
    return folder


def test_texts_come_back_whole_and_split_by_document(sources, data_dir):
    data = prepare_data.load_dataset(data_dir / "small")
    encoding, documents = data.tokenizer(), {}
    assert data.meta["vocab_size"] == encoding.n_vocab == 512 and data.train.dtype == np.uint16
    for split, tokens in (("train", data.train), ("val", data.val)):
        starts = np.flatnonzero(tokens == encoding.eot_token)
        assert starts[0] == 0 and data.meta[split]["tokens"] == len(tokens)
        for start, end in zip(starts, [*starts[1:], len(tokens)]):
            documents[encoding.decode(tokens[start + 1:end].tolist())] = split
        assert data.meta[split]["bytes"] == sum(len(d.encode()) for d, s in documents.items() if s == split)
    assert set(documents) == {path.read_text(encoding="utf-8") for path in sources.iterdir()}
    assert set(documents.values()) == {"train", "val"}


def test_the_same_files_give_the_same_hashes(sources, data_dir, tmp_path):
    files = sorted(sources.iterdir(), reverse=True)
    prepare_data.main(["--text", *map(str, files), str(files[0]), "--name", "again", "--vocab_size", "512",
                       "--data_dir", str(tmp_path)])  # another order, and one file twice
    first, again = (prepare_data.load_dataset(f).meta["files"] for f in (data_dir / "small", tmp_path / "again"))
    assert first == again


@pytest.mark.parametrize("sizes", [[500_000, 300], [300, 500_000], [1000] * 50, [900_000], [10, 10, 70_000]])
def test_a_tenth_is_for_validation_however_long_the_documents(sizes):
    documents = [f"{i}".ljust(size - 1, "x") + "\n" for i, size in enumerate(sizes)]
    train, val = prepare_data.split_documents(documents)
    assert sorted("".join(train + val)) == sorted("".join(documents))
    assert 0.05 < sum(map(len, val)) / sum(sizes) < 0.2


def test_one_document_is_cut_at_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i} of one long text\n" for i in range(1000)))
    prepare_data.main(["--text", str(tmp_path / "a.txt"), "--vocab_size", "300", "--data_dir", str(tmp_path)])
    data = prepare_data.load_dataset(tmp_path / "text")
    val = data.tokenizer().decode(data.val[1:].tolist())
    assert val.startswith("line 9") and val.endswith("line 999 of one long text\n")
    assert data.meta["val"]["bytes"] == pytest.approx(0.1 * (data.meta["train"]["bytes"] + data.meta["val"]["bytes"]), rel=0.01)


def test_documents_in_one_file(tmp_path):
    documents = [f"document {i} says x{i}" for i in range(100)]
    text = "\n<|endoftext|>\n".join(documents[:50]) + "\r\n<|endoftext|>\r\n" + "\r\n<|endoftext|>\r\n".join(documents[50:])
    (tmp_path / "a.txt").write_bytes(text.encode())
    prepare_data.main(["--text", str(tmp_path / "a.txt"), "--vocab_size", "300", "--data_dir", str(tmp_path)])
    data = prepare_data.load_dataset(tmp_path / "text")
    assert (data.train == data.tokenizer().eot_token).sum() + (data.val == data.tokenizer().eot_token).sum() == 100


def test_the_python_set_is_the_library_and_the_packages(tmp_path, monkeypatch, sources):
    """On a small installation: no twice-counted packages, no file that is not UTF-8, no other files."""
    stdlib, packages = tmp_path / "lib", tmp_path / "venv"
    for folder in (stdlib, stdlib / "site-packages", packages / "torch"):
        folder.mkdir(parents=True)
    for i, path in enumerate(sorted(sources.iterdir())):
        shutil.copy(path, (stdlib if i % 2 else packages / "torch") / path.name)
    (stdlib / "site-packages" / "other.py").write_text("belongs_to_another_environment = 1\n")
    (stdlib / "latin.py").write_bytes("# é\n".encode("latin-1"))
    (stdlib / "empty.py").write_text("")
    (stdlib / ".#lock.py").symlink_to("nowhere")
    (stdlib / "notes.txt").write_text("not python")
    paths = dict(stdlib=str(stdlib), purelib=str(packages), platlib=str(packages))
    monkeypatch.setattr(prepare_data, "sysconfig", types.SimpleNamespace(get_paths=lambda: paths))  # torch asks the real one
    monkeypatch.setattr(train_gpt, "DEFAULT_VOCAB_SIZE", 400)
    train_gpt.main([*TINY, "--data_dir", str(tmp_path / "data"), "--out_dir", str(tmp_path / "out"), "--max_steps", "1"])
    data = prepare_data.load_dataset(tmp_path / "data" / "python")
    expected = {path.read_bytes() for path in sources.iterdir()}
    assert data.meta["train"]["bytes"] + data.meta["val"]["bytes"] == sum(map(len, expected))
    assert sorted(p.name for p in data.folder.iterdir()) == ["meta.json", "tokenizer.tiktoken", "train.bin", "val.bin"]


class Server(http.server.ThreadingHTTPServer):
    """A loopback server. files: path → bytes; trouble: path → list of things to do wrong, one a request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.trouble, self.requests, self.headers = {}, {}, [], {}
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # the client hung up, as some of the tests want it to


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name, asked = self.path.lstrip("/"), self.headers.get("Range")
        self.server.requests.append((name, asked))
        trouble = self.server.trouble.get(name) or [None]
        trouble = trouble.pop(0)
        if name not in self.server.files or isinstance(trouble, int):
            return self.send_error(trouble or 404)
        body = self.server.files[name]
        start = int(asked[6:-1]) if asked and trouble not in ("no range", "always cut") else 0
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {0 if trouble == 'from the start' else start}-{len(body) - 1}/{len(body)}")
        if trouble != "no length":
            self.send_header("Content-Length", str(len(body) - start + (1000 if trouble == "long" else 0)))
        for key, value in self.server.headers.items():
            self.send_header(key, value)
        self.end_headers()
        body = body[:len(body) - start] if trouble == "from the start" else body[start:]
        self.wfile.write(body[:len(body) // 2] if trouble in ("cut", "always cut") else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


BODY = random.Random(0).randbytes(1_280_000)


def fetch(server, tmp_path, **options):
    return prepare_data.download(server.url + "file", tmp_path / "got" / "file", patience=0.01, **options)


def test_a_cut_download_goes_on_where_it_broke(server, tmp_path):
    server.files["file"], server.trouble["file"] = BODY, ["cut", 503, "cut"]
    assert fetch(server, tmp_path, size=len(BODY), sha256=hashlib.sha256(BODY).hexdigest()).read_bytes() == BODY
    starts = [int(asked[6:-1]) if asked else 0 for _, asked in server.requests]
    assert starts[0] == 0 and 0.4 < starts[1] / len(BODY) <= 0.5 and starts[2] == starts[1]
    assert 0.65 < starts[3] / len(BODY) <= 0.75
    fetch(server, tmp_path, size=len(BODY))  # it is there: asks nobody
    assert len(server.requests) == 4
    with pytest.raises(prepare_data.UserError, match="another sha256 than published; remove it and run again"):
        fetch(server, tmp_path, sha256="0" * 64)


def test_a_download_goes_on_in_a_later_run(server, tmp_path):
    server.files["file"], server.trouble["file"] = BODY, ["cut", 500, 500, 500, 500]
    with pytest.raises(prepare_data.UserError, match="what came is kept, run again.*python` and `digits` need no network"):
        fetch(server, tmp_path)
    assert not (tmp_path / "got" / "file").exists()
    server.trouble["file"] = []
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert 0.4 < int(server.requests[-1][1][6:-1]) / len(BODY) <= 0.5


def test_a_server_that_cannot_resume_starts_over(server, tmp_path):
    server.files["file"], server.trouble["file"] = BODY, ["cut", "no range"]
    assert fetch(server, tmp_path).read_bytes() == BODY
    (tmp_path / "got" / "file").unlink()
    server.trouble["file"] = ["cut", "from the start"]  # and one that resumes in the wrong place
    assert fetch(server, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("options, trouble, message", [
    (dict(size=len(BODY) + 1), [], f"has {len(BODY)} bytes, expected {len(BODY) + 1}"),
    (dict(sha256="0" * 64), [], "another sha256 than published"),
    ({}, [404], "answered 404"), ({}, ["long"] * 99, "cannot download"), ({}, [503] * 99, "cannot download"),
    ({}, ["always cut"] * 99, "cannot download"), ({}, ["no length"], "does not say how long it is")])
def test_a_bad_download_leaves_nothing_that_looks_good(server, tmp_path, options, trouble, message):
    server.files["file"], server.trouble["file"] = BODY, trouble
    with pytest.raises(prepare_data.UserError, match=message) as error:
        fetch(server, tmp_path, **options)
    assert "\n" not in str(error.value) and not (tmp_path / "got" / "file").exists()


def test_the_hash_that_the_hub_publishes_is_checked(server, tmp_path):
    server.files["file"], server.headers = BODY, {"X-Linked-ETag": f'"{"0" * 64}"', "X-Linked-Size": str(len(BODY))}
    with pytest.raises(prepare_data.UserError, match="another sha256"):
        fetch(server, tmp_path)
    server.headers["X-Linked-ETag"] = f'"{hashlib.sha256(BODY).hexdigest()}"'
    assert fetch(server, tmp_path).read_bytes() == BODY


def test_without_a_network_it_says_what_works(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(prepare_data.UserError, match="`python prepare_data.py python` and `digits` need no network"):
        fetch(server, tmp_path)


def test_shakespeare_and_fineweb_edu_from_a_server(server, tmp_path, data_dir, monkeypatch):
    encoding = prepare_data.load_dataset(data_dir / "small").tokenizer()  # stands in for GPT-2's
    text = "".join(f"ROMEO {i}: to be, or not to be\n" for i in range(500)).encode()
    server.files["input.txt"] = text
    monkeypatch.setattr(prepare_data, "gpt2_encoding", lambda: encoding)
    monkeypatch.setattr(prepare_data, "SHAKESPEARE", dict(url=server.url + "input.txt", size=len(text),
                                                          sha256=hashlib.sha256(text).hexdigest()))
    monkeypatch.setattr(prepare_data, "FINEWEB_EDU", server.url)
    prepare_data.main(["shakespeare", "--data_dir", str(tmp_path)])
    data = prepare_data.load_dataset(tmp_path / "shakespeare")
    assert encoding.decode(data.train[1:].tolist()) + encoding.decode(data.val[1:].tolist()) == text.decode()

    def shard(tokens, count=None):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(tokens) if count is None else count
        return header.tobytes() + np.array(tokens, "<u2").tobytes()

    shards = [[511, 7, 8, 9], [511, 1, 2], [511, 3]]
    for name, tokens in zip(["val_000000", "train_000001", "train_000002"], shards):
        server.files[f"edu_fineweb_{name}.bin"] = shard(tokens)
    prepare_data.main(["fineweb_edu", "--shards", "2", "--data_dir", str(tmp_path)])
    data = prepare_data.load_dataset(tmp_path / "fineweb_edu")
    assert data.val.tolist() == shards[0] and data.train.tolist() == shards[1] + shards[2]
    assert data.meta["train"]["bytes"] == len(encoding.decode_bytes([1, 2, 3]))
    for broken in (shard([1, 2], count=3), shard([1, 512]), b"<html>"):
        server.files["edu_fineweb_train_000003.bin"] = broken
        fails(prepare_data, ["fineweb_edu", "--shards", "3", "--name", "broken", "--data_dir", str(tmp_path)],
              "edu_fineweb_train_000003.bin .*remove it and run again")
        assert not [p for p in tmp_path.iterdir() if "broken" in p.name]
        (tmp_path / "downloads" / "edu_fineweb_train_000003.bin").unlink()


# --------------------------------------------------------------------------------------------- training

TINY = "--device cpu --depth 2 --seq_len 32 --micro_batch 4 --batch_tokens 256 --eval_tokens 2048 --log_every 3".split()


def command(data_dir, out_dir, *flags):
    return ["--dataset", "small", "--data_dir", str(data_dir), "--out_dir", str(out_dir), *TINY, *map(str, flags)]


def start(data_dir, out_dir, *flags, prefix=()):
    """The same in a process of its own."""
    return subprocess.Popen([sys.executable, *prefix, str(HERE / "train_gpt.py"), *command(data_dir, out_dir, *flags)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def log_of(out_dir, key):
    records = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if key in record]
    assert len(steps) == len(set(steps))
    return {record["step"]: record[key] for record in records if key in record}


def fails(script, arguments, message):
    """The command ends with exit code 2 and one line on stderr that says `message`."""
    lines = []

    def said(text, **options):
        lines.append(str(text)) if options.get("file") is sys.stderr else None

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("builtins.print", said)
        prepare_data.run(lambda: script.main(list(map(str, arguments))))
    assert stop.value.code == 2 and len(lines) == 1 and "\n" not in lines[0], lines
    assert re.search(message, lines[0]), lines[0]


@pytest.fixture(scope="session")
def finished(data_dir, tmp_path_factory):
    """A run of 24 steps that nothing disturbed."""
    out_dir = tmp_path_factory.mktemp("out") / "run"
    train_gpt.main(command(data_dir, out_dir, "--max_steps", 24, "--eval_every", 8))
    return out_dir


def test_training_learns_and_logs(finished):
    loss, bits = log_of(finished, "loss"), log_of(finished, "val_bits_per_byte")
    assert list(loss) == [1, *range(3, 25, 3)] and list(bits) == [0, 8, 16, 24]
    assert loss[1] == pytest.approx(math.log(512), abs=0.1) and loss[24] < loss[1] - 1
    assert sorted(bits.values(), reverse=True) == list(bits.values())
    assert log_of(finished, "g_0")[0] == [1, 1] and log_of(finished, "g_i")[0] == [1, 1]
    assert log_of(finished, "g_0")[24] != [1, 1]
    used = log_of(finished, "rows_used")
    assert used[0] == 0 and 0.3 < used[24] <= 1 and log_of(finished, "row_norm")[24] > log_of(finished, "row_norm")[0]
    assert all(speed > 0 for speed in log_of(finished, "tokens_per_s").values())
    for state in train_gpt.load_checkpoint(finished / "checkpoint.pt")["optimizers"]:  # the last step was warmed down
        assert all(group["lr"] == pytest.approx(group["peak_lr"] * 2 / 24) for group in state["param_groups"])


def trained_model(out_dir):
    saved = train_gpt.load_checkpoint(out_dir / "checkpoint.pt")
    config = GPTConfig(**{f.name: saved["identity"][f.name] for f in dataclasses.fields(GPTConfig)})
    model = GPT(config)
    model.load_state_dict(saved["model"])
    return model


def test_bits_per_byte_from_the_decoded_bytes(finished, data_dir):
    """Token by token, from the probabilities and the text itself."""
    data, model = prepare_data.load_dataset(data_dir / "small"), trained_model(finished)
    encoding, bits, text = data.tokenizer(), 0.0, b""
    for start in range(0, 2048, 32):
        window = data.val[start:start + 33].astype(np.int64)
        probabilities = model(torch.from_numpy(window[None, :-1]))[0].double().softmax(-1)
        for position, token in enumerate(window[1:].tolist()):
            bits -= math.log2(probabilities[position, token].item())
            text += b"" if token == encoding.eot_token else encoding.decode_single_token_bytes(token)
    assert text[:40].decode() in next(p for p in encoding.decode(data.val.tolist()).split("<|endoftext|>") if p)
    assert log_of(finished, "val_bits_per_byte")[24] == pytest.approx(bits / len(text), rel=1e-5)


def test_gate_means_are_those_of_the_gates(finished, data_dir):
    data, model, means = prepare_data.load_dataset(data_dir / "small"), trained_model(finished), []
    for start in range(0, 2048, 32):
        x = move.norm(model.embedding(torch.from_numpy(data.val[start:start + 32].astype(np.int64))[None]))
        gates = model.blocks[0].attention.mixer.gates(move.norm(x))
        means.append([gates[..., 0].mean().item(), gates[..., 1:].mean().item()])
    g_0, g_i = np.mean(means, 0)
    assert log_of(finished, "g_0")[24][0] == pytest.approx(g_0, rel=1e-5)
    assert log_of(finished, "g_i")[24][0] == pytest.approx(g_i, rel=1e-5)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_never_was(how, finished, data_dir, tmp_path):
    flags = ("--max_steps", 24, "--eval_every", 8, "--save_every", 5)
    out_dir = tmp_path / "run"
    process = start(data_dir, out_dir, *flags)
    for line in process.stdout:  # between the checkpoints of step 5 and 10
        if line.startswith("step 8/24"):
            process.send_signal(how)
            break
    process.stdout.read()
    error = process.stderr.read()
    assert process.wait() == (-signal.SIGKILL if how == signal.SIGKILL else 130), error
    saved = train_gpt.load_checkpoint(out_dir / "checkpoint.pt")["step"]
    if how == signal.SIGKILL:
        assert saved % 5 == 0
        with open(out_dir / "log.jsonl", "a") as file:
            file.write('{"step": 11, "lo')  # a line cut short by the kill
    else:
        assert 8 <= saved < 24 and error.count("\n") == 1 and "go on with --resume" in error
    train_gpt.main(command(data_dir, out_dir, *flags, "--resume"))
    for key in ("loss", "val_bits_per_byte", "g_0", "rows_used"):
        assert log_of(out_dir, key) == log_of(finished, key)
    first, resumed = (train_gpt.load_checkpoint(f / "checkpoint.pt")["model"] for f in (finished, out_dir))
    assert all(torch.equal(first[name], resumed[name]) for name in first)


def test_less_memory_by_smaller_micro_batches_changes_nothing_else(finished, data_dir, tmp_path):
    train_gpt.main(command(data_dir, tmp_path / "run", "--max_steps", 24, "--eval_every", 8, "--micro_batch", 1))
    for key in ("loss", "val_bits_per_byte"):
        a, b = log_of(finished, key), log_of(tmp_path / "run", key)
        assert list(a) == list(b) and np.allclose(list(a.values()), list(b.values()), rtol=1e-3)


def test_two_processes_train_as_one(finished, data_dir, tmp_path):
    process = start(data_dir, tmp_path / "run", "--max_steps", 24, "--eval_every", 8,
                    prefix=["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"])
    output, error = process.communicate(timeout=150)
    assert process.returncode == 0, error
    assert output.count("step 24/24  loss") == 1  # one process speaks and writes
    for key in ("loss", "val_bits_per_byte", "g_0", "g_i"):
        a, b = log_of(finished, key), log_of(tmp_path / "run", key)
        assert list(a) == list(b) and np.allclose(list(a.values()), list(b.values()), rtol=1e-3)
    process = start(data_dir, tmp_path / "run", "--prompt", "def f", "--max_new_tokens", 3,
                    prefix=["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"])
    output, error = process.communicate(timeout=150)
    assert process.returncode == 0 and output.count("def f") == 1, error


def test_two_runs_in_one_folder(data_dir, tmp_path):
    first = start(data_dir, tmp_path / "run", "--max_steps", 1000)
    try:
        assert any(line.startswith("step 0/1000") for line in first.stdout)
        log = (tmp_path / "run" / "log.jsonl").read_text()
        fails(train_gpt, command(data_dir, tmp_path / "run", "--seed", 1), "another process trains in .*run; wait for it, or give another")
        assert (tmp_path / "run" / "log.jsonl").read_text().startswith(log)
    finally:
        first.kill()
        first.communicate()
    train_gpt.main(command(data_dir, tmp_path / "run", "--max_steps", 1))  # its lock died with it


def test_a_run_without_memory_goes_on_whatever_the_bank_would_be(data_dir, tmp_path):
    train_gpt.main(command(data_dir, tmp_path / "run", "--move_scale", 0, "--bank_dtype", "bfloat16", "--max_steps", 1))
    train_gpt.main(command(data_dir, tmp_path / "run", "--move_scale", 0, "--bank_dtype", "float32", "--max_steps", 2, "--resume"))
    train_gpt.main(command(data_dir, tmp_path / "run", "--prompt", "x", "--max_new_tokens", 1))


@all_kinds
def test_every_setting_trains_and_samples(attention, memory, data_dir, tmp_path, capsys):
    flags = ("--attention", attention, "--memory", memory, "--move_scale", 2, "--max_steps", 2)
    train_gpt.main(command(data_dir, tmp_path / "run", *flags))
    capsys.readouterr()
    train_gpt.main(command(data_dir, tmp_path / "run", "--prompt", "def f", "--max_new_tokens", 9))
    assert capsys.readouterr().out.startswith("def f")


@pytest.mark.skipif(move.move_triton is None, reason="there is no Triton")
def test_a_run_by_the_kernels_is_that_of_the_reference(data_dir, tmp_path):
    logs = []
    for mix in ("reference", "fused"):
        flags = ("--mix", mix, "--max_steps", 4, "--batch_tokens", 256, "--log_every", 1, "--eval_every", 2, "--eval_tokens", 256)
        train_gpt.main(command(data_dir, tmp_path / mix, *flags))
        logs.append([log_of(tmp_path / mix, key) for key in ("loss", "val_bits_per_byte", "g_0", "g_i", "rows_used")])
    for a, b in zip(*logs):
        assert len(a) > 2 and list(a) == list(b) and np.allclose(list(a.values()), list(b.values()), rtol=1e-4)


def test_a_bank_in_bfloat16_is_saved_and_resumed(data_dir, tmp_path):
    for folder, steps in (("whole", [4]), ("halves", [2, 4])):
        for i, step in enumerate(steps):
            train_gpt.main(command(data_dir, tmp_path / folder, "--bank_dtype", "bfloat16", "--max_steps", step, *["--resume"] * i))
    whole, halves = (torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True) for folder in ("whole", "halves"))
    assert whole["model"]["banks.0.weight"].dtype == torch.bfloat16
    assert whole["optimizers"][1]["state"][2]["exp_avg_sq"].dtype == torch.bfloat16
    assert halves["step"] == 4 and halves["model"]["banks.0.weight"].dtype == torch.bfloat16
    fails(train_gpt, [*command(data_dir, tmp_path / "whole", "--resume", "--max_steps", 6), "--bank_dtype", "float32"],
          "was made with bank_dtype = bfloat16, now it is float32")
    train_gpt.main(command(data_dir, tmp_path / "whole", "--prompt", "def f", "--max_new_tokens", 3))


def test_a_sample_is_the_same_for_the_same_seed(finished, data_dir, capsys):
    texts = []
    for seed in (1, 1, 2):
        train_gpt.main(command(data_dir, finished, "--prompt", "import", "--max_new_tokens", 20, "--seed", seed))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("import") and len(texts[0]) > 10


def test_the_order_of_the_data():
    order = train_gpt.DataOrder(n=10, batch=4, seed=0)
    seen = np.concatenate([order(step) for step in range(5)])  # two epochs; batch 2 lies in both
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10, 20))
    assert seen[:10].tolist() != (seen[10:] - 10).tolist()
    assert train_gpt.DataOrder(10, 4, 0)(3).tolist() == seen[12:16].tolist()  # of (seed, step) alone
    assert train_gpt.DataOrder(10, 4, 1)(3).tolist() != seen[12:16].tolist()


def test_windows_cover_the_text_once():
    windows = train_gpt.TextWindows(np.arange(100, 111, dtype=np.uint16), 3, "")
    idx, targets = windows[np.arange(3)]
    assert len(windows) == 3 and idx.tolist() == [[100, 101, 102], [103, 104, 105], [106, 107, 108]]
    assert torch.equal(targets, idx + 1)
    assert torch.equal(windows[np.arange(3, 6)][0], idx)  # the second visit


def test_the_learning_rate():
    rates = [train_gpt.schedule(step, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:51] == [1] * 42 and rates[75] == 0.5 and rates[99] == pytest.approx(0.02)


def test_every_parameter_is_optimized_once():
    for attention, memory in KINDS:
        model = GPT(small_config(attention, memory))
        groups = [g for o in train_gpt.make_optimizers(model, 1.0) for g in o.param_groups]
        held = [p for g in groups for p in g["params"]]
        assert len(held) == len(set(held)) and set(held) == set(model.parameters())


# ------------------------------------------------------------------------------------------- bad input


def test_bad_flags(data_dir, tmp_path):
    for flags, message in [
            (["--move_scale", -1], "--move_scale must be 0"), (["--move_scale", "nan"], "--move_scale must be 0"),
            (["--depth", 0], "--depth must be at least 1"), (["--max_steps", 0], "--max_steps must be"),
            (["--batch_tokens", 100], r"--batch_tokens 100 is not a multiple .* = 4 · 32 · 1 = 128"),
            (["--memory", "engram"], "invalid choice: 'engram'"), (["--move_scal"], "expected one argument"),
            (["--depth", "x"], "invalid int value"), (["--unknown"], "unrecognized arguments: --unknown"),
            (["--lr_scale", 0], "--lr_scale must be"), (["--seed", -1], "--seed must be 0"),
            (["--seed", 10 ** 20], "--seed must be 0"), (["--temperature", "nan"], "--temperature must be"),
            (["--seq_len", 1, "--batch_tokens", 4], "--seq_len must be at least 2"), (["--move_scale", 1e300], "--move_scale must"), (["--temperature", -1], "--temperature must be"),
            (["--top_k", 0], "--top_k must be"), (["--top_p", 0], "--top_p must be"), (["--max_new_tokens", 0], "--max_new_tokens must"),
            (["--attention", "mla", "--kv_rank", 3, "--depth", 4], "kv_rank 3 is not a positive multiple"),
            (["--kv_rank", 4], "--kv_rank is for --attention mla"),
            (["--dataset", "wikipedia"], "there is no data set .*wikipedia; make it with prepare_data.py"),
            (["--resume"], "there is no checkpoint .*checkpoint.pt; train without --resume"),
            (["--prompt", "x"], "there is no checkpoint"),
            (["--seq_len", 100000, "--batch_tokens", 400000], "fewer than seq_len .* lower --seq_len")]:
        fails(train_gpt, [*command(data_dir, tmp_path / "none"), *flags], message)
        assert not (tmp_path / "none").exists()
    for flags, message in [
            ([], "name one data set"), (["wikipedia"], "invalid choice: 'wikipedia'"), (["python", "--text", "x"], "name one"), (["--images", "x", "--codes", "x"], "name one"),
            (["--text", tmp_path / "missing.txt"], "missing.txt"), (["python", "--vocab_size", 70000], "65536"),
            (["python", "--name", "../x"], "--name must be the name of a folder in .*data, not '../x'"), (["python", "--name", ""], "not ''"),
            (["fineweb_edu", "--shards", 0], "--shards must be from 1 to 1001")]:
        fails(prepare_data, [*flags, "--data_dir", tmp_path / "data"], message)
        assert not (tmp_path / "data").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(data_dir, tmp_path):
    fails(train_gpt, [*command(data_dir, tmp_path), "--device", "cuda"], "--device cuda: there is none .*try --device cpu")


def test_bad_text(tmp_path, sources):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 100)
    (tmp_path / "empty.txt").write_text("")
    for name, message in [("latin.txt", "latin.txt is not UTF-8 text .byte 0."), ("empty.txt", "too little text")]:
        fails(prepare_data, ["--text", tmp_path / name, "--data_dir", tmp_path / "data"], message)
    fails(prepare_data, ["--text", tmp_path / "latin.txt", "--name", "x", "--data_dir", tmp_path / "data", "--vocab_size", 3],
          "latin.txt is not UTF-8")
    assert not list((tmp_path / "data").glob("*")) and not list((tmp_path / "data").glob(".*"))


def test_ctrl_c_while_the_data_set_is_made(tmp_path):
    process = subprocess.Popen([sys.executable, str(HERE / "train_gpt.py"), "--device", "cpu", "--data_dir", str(tmp_path / "data")],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any(line.startswith("learning a vocabulary") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "interrupted\n" and process.returncode == 130
    assert not list(tmp_path.glob("data/*"))


def test_a_data_set_is_never_overwritten(data_dir, sources, tmp_path):
    before = (data_dir / "small" / "meta.json").read_bytes()
    fails(prepare_data, ["--text", next(sources.iterdir()), "--name", "small", "--data_dir", data_dir], "small is there already")
    with pytest.raises(prepare_data.UserError, match="made by another process meanwhile; it can be used"):
        with prepare_data.new_folder(tmp_path / "new"):
            (tmp_path / "new" / "of the other").mkdir(parents=True)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (data_dir / "small" / "meta.json").read_bytes() == before


def change_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "val.bin").unlink(), "val.bin is missing"),
    (lambda f: (f / "meta.json").unlink(), "meta.json is missing"),
    (lambda f: os.truncate(f / "train.bin", 1001), r"train.bin has 1001 bytes, not the \d+ of"),
    (lambda f: os.truncate(f / "train.bin", 0), "train.bin has 0 bytes"),
    (lambda f: (f / "val.bin").write_bytes(bytes((f / "val.bin").stat().st_size)), "val.bin was altered"),
    (lambda f: (f / "tokenizer.tiktoken").open("ab").write(b"x"), "tokenizer.tiktoken has"),
    (lambda f: change_meta(f, vocab_size=400), r"has token \d+, outside its vocabulary of 400"),
    (lambda f: change_meta(f, kind="image"), "meta.json is damaged .KeyError..decoder"),
    (lambda f: (f / "meta.json").write_text("{"), "meta.json is damaged"),
    (lambda f: (f / "meta.json").write_text('{"format": 1}'), "meta.json is damaged"),
    (lambda f: change_meta(f, files={}), "meta.json is damaged .it has no hash of train.bin"),
    (lambda f: change_meta(f, files=[]), "meta.json is damaged"),
    (lambda f: (f / "meta.json").write_text('{"format": 99}'), "has format 99, this program reads 1")])
def test_damaged_data_sets(damage, message, data_dir, tmp_path):
    shutil.copytree(data_dir / "small", tmp_path / "small")
    damage(tmp_path / "small")
    fails(train_gpt, command(tmp_path, tmp_path / "out"), message)


def test_checkpoints_that_do_not_fit(finished, data_dir, sources, tmp_path):
    more = ["--max_steps", 30, "--resume"]
    before = (finished / "checkpoint.pt").read_bytes(), (finished / "log.jsonl").read_bytes()
    for flags, message in [
            ([*more, "--depth", 4], "made with n_layers = 2, now it is 4"), ([*more, "--move_scale", 3], "n_slots = 1, now it is 3"),
            ([*more, "--attention", "mla"], "attention = mha, now it is mla"), ([*more, "--seed", 5], "seed = 0, now it is 5"),
            (["--max_steps", 30], "holds a run already; go on with --resume"),
            (["--max_steps", 24, "--resume"], "has done its 24 steps; raise --max_steps"),
            (["--prompt", "x" * 500], r"--prompt has \d+ tokens; this model takes at most 31")]:
        fails(train_gpt, command(data_dir, finished, *flags), message)
    for vocab_size, message in [(1024, "made with vocab_size = 512, now it is 1024"), (500, "sha256 of tokenizer.tiktoken")]:
        folder = tmp_path / str(vocab_size)
        prepare_data.main(["--text", *map(str, sources.iterdir()), "--name", "small", "--vocab_size", str(vocab_size),
                           "--data_dir", str(folder)])
        fails(train_gpt, command(folder, finished, *more), message)
        fails(train_gpt, command(folder, finished, "--prompt", "x"), "sha256 of tokenizer.tiktoken")
    assert before == ((finished / "checkpoint.pt").read_bytes(), (finished / "log.jsonl").read_bytes())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "half"])
def test_a_damaged_checkpoint(content, finished, data_dir, tmp_path):
    whole = (finished / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[:len(whole) // 2] if content == "half" else content)
    fails(train_gpt, command(data_dir, tmp_path, "--resume", "--max_steps", 30), "checkpoint.pt is damaged")
    torch.save(dict(model={}), tmp_path / "checkpoint.pt")
    fails(train_gpt, command(data_dir, tmp_path, "--prompt", "x"), "damaged .it is not a checkpoint of this program")


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save(dict(step=Evil()), tmp_path / "checkpoint.pt")
    with pytest.raises(prepare_data.UserError, match="damaged"):
        train_gpt.load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


def test_a_loss_that_is_not_finite_stops_the_run(data_dir, tmp_path):
    fails(train_gpt, command(data_dir, tmp_path / "run", "--lr_scale", 1e30, "--max_steps", 8, "--save_every", 1, "--eval_every", 9),
          "a weight is not finite at step .; the checkpoint in .* is good; try a lower --lr_scale")
    saved = train_gpt.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())
    fails(train_gpt, command(data_dir, tmp_path / "other", "--lr_scale", 1e30, "--max_steps", 8, "--eval_every", 9),
          "the loss is not finite at step .; there is no checkpoint yet; try a lower --lr_scale")
    assert not (tmp_path / "other" / "checkpoint.pt").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_says_what_to_lower(error, data_dir, tmp_path, monkeypatch):
    def forward(*args):
        raise error

    monkeypatch.setattr(GPT, "forward", forward)
    fails(train_gpt, command(data_dir, tmp_path / "run"), "out of memory with --micro_batch 4 of 32 tokens; lower --micro_batch")


def test_ctrl_c_before_the_training(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        prepare_data.run(main)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def limited(kilobytes, script, arguments):
    """Runs a script that may write no file larger than this: as on a disk that is full."""
    code = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes * 1024},) * 2); " \
           f"sys.argv = ['x'] + {list(map(str, arguments))!r}; runpy.run_path({str(HERE / script)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)


def test_a_full_disk(finished, data_dir, sources, tmp_path):
    result = limited(100, "prepare_data.py", ["--text", *sources.iterdir(), "--vocab_size", 300, "--data_dir", tmp_path / "data"])
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "File too large" in result.stderr
    assert not list((tmp_path / "data").iterdir())
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    result = limited(100, "train_gpt.py", command(data_dir, tmp_path / "run", "--resume", "--max_steps", 26))
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert re.search("cannot write checkpoint .*the one before is kept; make room and --resume", result.stderr)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint.pt", "lock", "log.jsonl"]
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
