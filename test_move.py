"""The paper's claims, executed: the memory, the attention and the model of move.py. `pytest test_move.py`

Everything is compared with a computation of its own: plain loops, float64, finite differences, a
transformer written without the feature.
"""
import dataclasses
import itertools
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import move
from move import (
    GPT,
    GPTConfig,
    KVCache,
    MoVELatentAttention,
    ValueBank,
    ValueMixer,
    memory_parameter_groups,
    mix_values,
    rotary_embedding,
)

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
    # Equation 2 by itself: gate i of head h is output h·(M+1) + i of the router.
    for i, h in itertools.product(range(3 + gate_value), range(2)):
        z = x.double() @ mixer.router.weight[h * (3 + gate_value) + i].double()
        assert torch.allclose(gates[..., h, i + 1 - gate_value].double(), 2 / (1 + torch.exp(-z)), atol=1e-6)


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_gradient_of_the_shared_bank_through_the_whole_model(attention):
    model = awake(GPT(small_config(attention, vocab_size=6, dim=8, n_layers=3))).double()
    assert [name for name, module in model.named_modules() if isinstance(module, ValueBank)] == ["bank"]
    idx, targets = random_ids(1, 5, vocab_size=6), random_ids(1, 5, vocab_size=6, seed=1)

    def loss(weight):
        return torch.func.functional_call(model, {"bank.weight": weight}, (idx, targets))

    weight = model.bank.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(loss, (weight,), eps=1e-6, atol=1e-7)
    # The sum over the layers: three layers with a copy of the bank each have its three parts.
    apart = GPT(dataclasses.replace(model.config, memory="lave", n_slots=6, gate_value=True)).double()
    weights = {name: w for name, w in model.state_dict().items() if name != "bank.weight"}
    weights.update({f"blocks.{i}.table.weight": weight.detach() for i in range(3)})
    apart.load_state_dict(weights)
    parts = torch.autograd.grad(apart(idx, targets), [block.table.weight for block in apart.blocks])
    whole, = torch.autograd.grad(loss(weight), weight)
    assert torch.allclose(sum(parts), whole, rtol=1e-9, atol=1e-12)
    assert all(part.abs().max() > 1e-4 for part in parts)


@pytest.mark.parametrize("zero_bank", [False, True])
def test_slots_do_not_stay_equal(zero_bank):
    """A bank of zeros with routers of zeros gives all slots of a token the same gradient for ever."""
    torch.manual_seed(0)
    model = GPT(small_config(n_slots=4))
    if zero_bank:
        nn.init.zeros_(model.bank.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    idx, targets = random_ids(4, 24, vocab_size=5), random_ids(4, 24, vocab_size=5, seed=1)
    for _ in range(5):
        optimizer.zero_grad()
        model(idx, targets).backward()
        optimizer.step()
    slots = model.bank.weight[idx[0, 0]]  # of an id that is in every batch
    assert slots.norm() > 0.1
    assert (torch.pdist(slots).min() > 0.01) != zero_bank


@pytest.mark.parametrize("attention, dim, n_slots", [("mha", 64, 64), ("mha", 768, 64), ("mla", 64, 64),
                                                     ("mha", 64, 1)])
def test_values_start_with_their_variance(attention, dim, n_slots):
    """However many slots are added: the memory adds less than a tenth."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=500, seq_len=64, n_layers=1, n_heads=2, dim=dim, n_slots=n_slots,
                       attention=attention)
    layer, bank = GPT(config).blocks[0].attention, ValueBank(500, n_slots, config.memory_dim)
    idx, x = random_ids(4, 64, vocab_size=500), move.rms_norm(torch.randn(4, 64, dim))
    v = layer.w_v(x) if attention == "mha" else move.rms_norm(layer.w_down(x)[..., :config.kv_rank])
    v = v.unflatten(-1, (2, -1))
    ratio = layer.mixer(x, v, bank(idx)).var() / v.var()
    assert 1.06 < ratio < 1.1


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
        def linear(name, x, i=i):
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
    return 15 * torch.tanh(rms(x) @ weights["head.weight"].T / 15)


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_without_memory_it_is_the_plain_transformer_bit_for_bit(attention):
    off = [small_config(attention, memory="none"), small_config(attention, n_slots=0)]
    models = [awake(GPT(config)) for config in off]
    idx = random_ids(3, 17)
    for model in models:
        assert not any(isinstance(m, (ValueBank, ValueMixer)) for m in model.modules())
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
    assert model.config.gate_value is False and model.bank is None and model.blocks[0].table is None
    assert model.blocks[0].attention.mixer is None
    mixer, idx = model.blocks[1].attention.mixer, random_ids(1, 4)
    x, v = torch.randn(1, 4, 16), torch.randn(1, 4, 2, 8)
    mixed = mixer(x, v, model.blocks[1].table(idx))
    for t, h in itertools.product(range(4), range(2)):
        g = 2 / (1 + math.exp(-(x[0, t] @ mixer.router.weight[h]).item()))
        expected = v[0, t, h] + g * model.blocks[1].table.weight[idx[0, t], 0, 8 * h:8 * h + 8]
        assert torch.allclose(mixed[0, t, h], expected, atol=1e-5)


def test_the_two_switches_of_the_ablation():
    for memory, gate_value in itertools.product(["move", "lave"], [True, False]):
        model = GPT(small_config(memory=memory, gate_value=gate_value, n_slots=2, n_layers=2))
        banks = [m for m in model.modules() if isinstance(m, ValueBank)]
        assert len(banks) == (1 if memory == "move" else 2)
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
    with pytest.raises(IndexError, match="10"):
        model(idx[:, :1], cache=cache)
    assert cache.length == cache.position.item() == 9
    cache.reset()  # for other sequences
    with torch.no_grad():
        assert (model(idx.flip(0)[:, :4], cache=cache) - expected.flip(0)[:, :4]).abs().max() < 1e-5


@pytest.mark.parametrize("n_slots", [0, 1, 8])
def test_what_a_token_leaves_in_the_cache(n_slots):
    mha = GPT(small_config("mha", n_slots=n_slots)).new_cache(1, 4)
    mla = GPT(small_config("mla", n_slots=n_slots, kv_rank=6, rope_dim=4)).new_cache(1, 4)
    assert mha.bytes_per_token == 2 * (2 * 16) * 4  # layers · (k and V_S) · float32
    assert mla.bytes_per_token == 2 * (6 + 4) * 4
    assert isinstance(mla, KVCache)
    assert sum(store.numel() for layer in mla.layers for store in layer.stores) == 2 * 4 * (6 + 4)


@pytest.mark.parametrize("n_slots", [0, 3])
def test_absorbed_latent_attention_is_the_expanded_one(n_slots):
    layer = awake(MoVELatentAttention(32, 4, n_slots, kv_rank=12, rope_dim=6))
    x, memory = torch.randn(2, 11, 32), torch.randn(2, 11, 3, 12)
    cache = KVCache([layer], 2, 11).layers[0]
    rotary = rotary_embedding(torch.arange(11)[:, None], 6)
    expanded, absorbed = (layer(x, rotary, memory, c) for c in (None, cache))
    assert (expanded - absorbed).abs().max() < 1e-5 and expanded.std() > 0.05
    # The memory went into the latent: c_S of the cache is g_0 ⊙ c_KV + Σ g_i ⊙ M_i, group by group, normed.
    c = layer.w_down(x)[..., :12]
    if n_slots:
        g = layer.mixer.gates(x)  # (2, 11, 4, 4): four groups of three
        mixed = [sum(g[..., j // 3, i + 1] * memory[..., i, j] for i in range(3)) for j in range(12)]
        c = torch.stack([g[..., j // 3, 0] * c[..., j] + mixed[j] for j in range(12)], -1)
    c = c / c.square().mean(-1, keepdim=True).sqrt()
    assert torch.allclose(cache.stores[0], c, atol=1e-5)


def test_the_keys_of_latent_attention_do_not_grow_with_the_memory():
    """They have no norm of their own: a memory that grows would make attention ever sharper."""
    layer = awake(MoVELatentAttention(32, 4, 3, kv_rank=12, rope_dim=6))
    x, memory = torch.randn(2, 11, 32), torch.randn(2, 11, 3, 12)
    rotary = rotary_embedding(torch.arange(11)[:, None], 6)
    for factor in (1, 1000):
        cache = KVCache([layer], 2, 11).layers[0]
        layer(x, rotary, factor * memory, cache)
        assert cache.stores[0].square().mean(-1).sub(1).abs().max() < 1e-3


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
    samples = [torch.stack(list(model.generate(prompt, 10, generator=torch.Generator().manual_seed(seed))))
               for seed in (1, 1, 2)]
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    assert len(list(model.generate(prompt, 23))) == 23  # the last one is never read
    with pytest.raises(ValueError, match="seq_len"):
        list(model.generate(prompt, 24))


def test_top_k_samples_among_the_most_probable():
    model = awake(GPT(small_config()))
    prompt = random_ids(1, 3).expand(400, 3)
    most_probable = model(prompt[:1])[0, -1].topk(3).indices
    sampled = next(iter(model.generate(prompt, 1, temperature=2.0, top_k=3)))
    assert set(sampled.tolist()) == set(most_probable.tolist())
    assert max(next(iter(model.generate(prompt, 1, temperature=100.0, n_ids=7))).tolist()) == 6


def test_generation_under_autocast():
    for attention in ("mha", "mla"):
        model = awake(GPT(small_config(attention)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert len(list(model.generate(random_ids(1, 2), 4))) == 4


def test_nucleus_sampling():
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    for top_p, kept in [(0, {1}), (0.01, {1}), (0.39, {1}), (0.45, {1, 3}), (0.69, {1, 3}), (0.8, {1, 3, 4}),
                        (1.0, {0, 1, 2, 3, 4})]:
        assert set(move.sample(p.log().expand(2000, 5), top_p=top_p).tolist()) == kept
    # At temperature ½ the probabilities are squared, and add up otherwise.
    q = p ** 2 / (p ** 2).sum()
    sampled = move.sample(p.log().expand(20000, 5), temperature=0.5, top_p=0.85,
                          generator=torch.Generator().manual_seed(0))
    shares = sampled.bincount(minlength=5) / 20000
    noise = torch.tensor([[1.0, 9, 9, 9, 9], [9, 1, 9, 0, 9]])  # the largest p / noise
    assert move.sample(p.log().expand(2, 5), noise=noise).tolist() == [0, 3]
    assert torch.allclose(shares, torch.tensor([0, q[1], 0, q[3], 0]) / (q[1] + q[3]), atol=0.01)


@pytest.mark.parametrize("positions", [torch.arange(6)[:, None],
                                       torch.tensor([[0, 0], [1, 1], [1, 2], [1, 3], [2, 1], [2, 2]])])
def test_rotary_embedding_pair_by_pair_as_complex_numbers(positions):
    axes, width = positions.size(1), 8
    x = torch.randn(1, 6, 1, width, dtype=torch.float64)
    turned = move.apply_rotary_emb(x, [t.double() for t in rotary_embedding(positions, width)])
    pairs = width // 2 // axes  # of one axis
    for t, position in enumerate(positions.tolist()):
        for j in range(width // 2):
            angle = position[j // pairs] * 10000 ** (-(j % pairs) / pairs)
            a, b = x[0, t, 0, j].item(), x[0, t, 0, j + width // 2].item()
            z = complex(a, b) * complex(math.cos(angle), -math.sin(angle))
            assert turned[0, t, 0, j].item() == pytest.approx(z.real, abs=1e-5)
            assert turned[0, t, 0, j + width // 2].item() == pytest.approx(z.imag, abs=1e-5)


def test_positions_are_kept_in_the_state_dict():
    torch.manual_seed(0)
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(6))
    model, other = awake(GPT(small_config(dim=32), positions=grid)), GPT(small_config(dim=32))
    other.load_state_dict(model.state_dict())
    idx = random_ids(2, 24)
    assert torch.equal(model(idx), other(idx))
    assert not torch.allclose(model(idx), awake(GPT(small_config(dim=32)))(idx), atol=1e-3)
    with pytest.raises(ValueError):
        GPT(small_config(dim=12), positions=grid)  # a head of 6 has 3 pairs for two axes


# ---------------------------------------------------------------------------------------- the model


def test_positions_of_any_layout():
    grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij"))
    rows = grid.flatten(1).T
    for a, b in zip(rotary_embedding(rows, 8), rotary_embedding(rows.contiguous(), 8), strict=True):
        assert torch.equal(a, b) and a.shape == (24, 1, 4)


@all_kinds
def test_compiles_whole_and_once(attention, memory):
    torch._dynamo.reset()
    # It takes long on a CPU, so one memory and one layer will do; and it needs a compiler.
    generate_code = memory == "move" and shutil.which("g++")
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
        for gradient, p in zip(gradients, model.parameters(), strict=True):
            assert torch.allclose(gradient, p.grad, atol=1e-5)
        model.zero_grad()


@all_kinds
def test_a_prompt_has_logits_of_its_last_token_only(attention, memory):
    model, seen = awake(GPT(small_config(attention, memory))), []
    model.head.register_forward_pre_hook(lambda head, inputs: seen.append(tuple(inputs[0].shape)))
    expected = model(random_ids(2, 9))[:, -1].argmax(-1)
    assert torch.equal(next(model.generate(random_ids(2, 9), 3, temperature=0)), expected)
    assert seen == [(2, 9, 16), (2, 1, 16)]


def test_a_cache_that_is_reset_keeps_no_graph():
    model = awake(GPT(small_config()))
    cache = model.new_cache(1, 9)
    first = model(random_ids(1, 9), cache=cache)
    cache.reset()
    assert not any(store.requires_grad for layer in cache.layers for store in layer.stores)
    assert torch.equal(model(random_ids(1, 9), cache=cache), first)


@pytest.mark.parametrize("depth, millions", [(12, 186), (20, 561), (32, 1879)])
def test_sizes_of_the_family(depth, millions):
    with torch.device("meta"):
        plain = GPT(GPTConfig.from_depth(depth, 0, vocab_size=65536)).parameter_counts()["total"]
        assert round(plain / 1e6) == millions
        if depth == 12:
            counts = GPT(GPTConfig.from_depth(12, 1, vocab_size=65536)).parameter_counts()
            assert round(counts["memory"] / 1e6) == 302
            assert counts["total"] == plain + counts["memory"] + counts["router"]


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
    math_backend = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math_backend:
        model(random_ids(1, 16))
    flops = model.flops_per_token()
    assert counter.get_total_flops() == 16 * (sum(flops.values()) - flops["mix"])  # it counts matrix products


@pytest.mark.parametrize("field, value", [
    ("n_heads", 3), ("n_slots", -1), ("attention", "mqa"), ("memory", "engram"), ("vocab_size", 0),
    ("kv_rank", 5), ("kv_rank", 0), ("rope_dim", 0), ("rope_dim", 3)])
def test_configurations_that_cannot_be_built(field, value):
    with pytest.raises(ValueError, match=field) as error:
        GPT(small_config(**{"attention": "mla", field: value}))
    assert str(value) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 7])
def test_every_depth_can_be_built(depth):
    for attention in ("mha", "mla"):
        config = GPTConfig.from_depth(depth, 0.1, vocab_size=20, seq_len=8, attention=attention)
        assert config.n_slots == 1 and GPT(config)(random_ids(1, 1, vocab_size=20)).shape == (1, 1, 20)
    with pytest.raises(ValueError):
        GPTConfig.from_depth(depth, -1)


def test_more_than_seq_len_tokens():
    with pytest.raises(ValueError, match="seq_len"):
        GPT(small_config())(random_ids(1, 25))


def test_bfloat16_activations_and_float32_parameters():
    model = awake(GPT(small_config(), torch.bfloat16))
    reference = awake(GPT(small_config()))
    idx = random_ids(2, 20)
    assert model(idx).dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters())
    assert 1e-4 < (model(idx) - reference(idx)).abs().max() < 0.3
    assert model.new_cache(1, 4).layers[0].stores[0].dtype == torch.bfloat16


# ---------------------------------------------------------------------------------- the README's claims


def test_move_runs_alone_in_an_empty_folder(tmp_path):
    shutil.copy(HERE / "move.py", tmp_path)
    code = ("import torch, move; m = move.GPT(move.GPTConfig.from_depth(2, vocab_size=9, seq_len=4));"
            "x = torch.tensor([[1, 2, 3]]); m(x, x).backward(); print([t.item() for t in m.generate(x, 1)])")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and re.fullmatch(r"\[\d]\n", result.stdout), result.stderr


@pytest.mark.parametrize("shape", [(0, 2, 4), (3, 0, 4), (3, 2, 0)])
def test_a_bank_of_nothing(shape):
    with pytest.raises(ValueError):
        ValueBank(*shape)


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_the_start_of_the_memory(attention):
    starts = []
    for about in (dict(memory="none"), dict(n_slots=1), dict(n_slots=5), dict(memory="lave", n_slots=2)):
        torch.manual_seed(1)
        model = GPT(small_config(attention, **about))
        banks = [m.weight for m in model.modules() if isinstance(m, ValueBank)]
        starts.append({name: p for name, p in model.named_parameters()
                       if not name.endswith("router.weight") and all(p is not bank for bank in banks)})
        for bank in banks:  # whose numbers are not the embedding's, times a factor
            first = min(bank.numel(), model.embedding.weight.numel())
            pair = torch.stack([w.detach().flatten()[:first] for w in (bank, model.embedding.weight)])
            assert torch.corrcoef(pair)[0, 1].abs() < 0.15
            assert bank.std().item() == pytest.approx(0.3 / bank.size(1) ** 0.5, rel=0.1)
    for other in starts[1:]:
        assert starts[0].keys() == other.keys()
        assert all(torch.equal(p, other[name]) for name, p in starts[0].items())
    assert not torch.equal(*banks)  # LaVE's tables


@pytest.mark.parametrize("memory, n_slots", [("move", 4), ("move", 16), ("lave", 4), ("lave", 6)])
def test_parameter_groups_of_the_memory(memory, n_slots):
    """The rate of a bank falls with the root of its number of slots."""
    model = GPT(GPTConfig.from_depth(4, vocab_size=50, seq_len=8, memory=memory, n_slots=n_slots))
    *banks, router = groups = memory_parameter_groups(model, lr_scale=3.0)
    k = 3 * (256 / 768) ** -0.5
    named = {id(p): name for name, p in model.named_parameters()}
    memories = [name for name in named.values() if "bank" in name or "table" in name]
    assert sorted(named[id(p)] for group in banks for p in group["params"]) == sorted(memories)
    for group in banks:
        for bank in group["params"]:
            assert group["lr"] == pytest.approx(0.15 * k / math.sqrt(bank.shape[1]))
    assert router["lr"] == pytest.approx(0.004 * k)
    assert {named[id(p)] for p in router["params"]} == {n for n in named.values() if "router" in n}
    torch.optim.AdamW(groups)
    assert memory_parameter_groups(GPT(small_config(memory="none"))) == []
    with pytest.raises(ValueError, match="ValueMixer"):
        memory_parameter_groups(nn.ModuleList([ValueBank(5, 2, 4), nn.Linear(4, 4)]))


def test_groups_of_tied_banks_and_of_a_router_with_a_number():
    """A bank is in them once. The width is that of the router's matrix, whatever else it holds."""
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.weight = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(6, 96))

    one, two, mixer = ValueBank(5, 2, 4), ValueBank(5, 2, 4), ValueMixer(96, 2, 2)
    two.weight, mixer.router = one.weight, Router()
    banks, routers = memory_parameter_groups(nn.ModuleList([one, two, mixer]))
    assert [id(p) for p in banks["params"]] == [id(one.weight)] and len(routers["params"]) == 2
    assert routers["lr"] == pytest.approx(0.004 * (96 / 768) ** -0.5)


def test_there_is_a_position_for_each_token():
    for n in (1, 7, 9):
        with pytest.raises(ValueError, match="8"):
            GPT(small_config(seq_len=8), positions=torch.zeros(n, 1))


def test_a_layer_with_a_router_needs_a_memory():
    for layer in (GPT(small_config()).blocks[0].attention, GPT(small_config("mla")).blocks[0].attention):
        rotary = rotary_embedding(torch.arange(5)[:, None], 8 if layer.__class__ is move.MoVEAttention else 4)
        with pytest.raises(RuntimeError, match="memory"):
            layer(torch.randn(1, 5, 16), rotary)


@pytest.mark.parametrize("shape", [(2, 7), (1, 8), (2, 1), (8, 2), (16,)])
def test_targets_of_another_shape(shape):
    with pytest.raises(RuntimeError):
        GPT(small_config())(random_ids(2, 8), random_ids(*shape))


def test_targets_that_do_not_count():
    model = awake(GPT(small_config()))
    idx, targets = random_ids(2, 8), random_ids(2, 8, seed=1)
    targets[0, 2:] = -100
    losses = -model(idx).log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1))[..., 0]
    assert torch.allclose(model(idx, targets), losses[targets >= 0].mean())


@pytest.mark.parametrize("options", [
    dict(temperature=-1), dict(temperature=math.nan), dict(temperature=1e-40), dict(n_ids=-1), dict(n_ids=0),
    dict(n_ids=51), dict(top_k=0), dict(top_k=-1), dict(top_p=0), dict(top_p=-1), dict(top_p=1.5)])
def test_generation_refuses_numbers_out_of_range(options):
    with pytest.raises(ValueError):
        next(GPT(small_config()).generate(random_ids(1, 2), 3, **options))
    with pytest.raises(ValueError):
        next(GPT(small_config()).generate(torch.zeros(1, 0, dtype=torch.long), 3))
