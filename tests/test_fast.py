"""The kernels of move_fast.py against float64, on a GPU or, elsewhere, in Triton's interpreter."""
import copy
import gc
import importlib.util
import linecache
import os
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from conftest import HERE, NEEDS_OLDER_NUMPY
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import move
import move_store
import optimizers
import train_gpt
from move import GPT, GPTConfig, ValueBank, ValueMixer

pytest.importorskip("triton")
import move_fast  # noqa: E402
from move_fast import accelerate  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LIMIT = {F32: 1e-5, BF16: 4e-3, F16: 1e-3}  # of relative errors


@pytest.fixture(autouse=True, scope="module")
def bfloat16_in_the_interpreter():
    """Triton's interpreter keeps bfloat16 as uint16: it multiplies the bits and cuts instead of rounding."""
    if not move_fast.INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter
    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def create_dot(self, a, b, d, *rest):
        a, b = (self.create_fp_ext(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, d, *rest)

    def convert_float(data, source, target, *rest):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).to(BF16).view(torch.uint16).numpy()
        return convert(data, source, target, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(interpreter, "_convert_float", convert_float)
        patch.setattr(move_fast, "DTYPES", (F32, BF16, F16))
        yield


def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def random_ids(*shape, vocab_size=64, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ids_of(kind, n, vocab_size):
    """Ids (1, n): all equal, all distinct, or some often and many seldom, as words are."""
    if kind == "equal":
        return torch.full((1, n), vocab_size - 1, device=DEVICE)
    if kind == "distinct":
        return torch.randperm(vocab_size, device=DEVICE)[None, :n]
    return (torch.rand(1, n, device=DEVICE) ** 3 * vocab_size).long()


# ------------------------------------------------------------------------------------- the kernels


def check(n=70, M=3, H=2, d_h=8, L=2, V=90, dtype=F32, bank_dtype=None, gated=True, kind="words",
          in_place=False):
    """V_S of L layers and all gradients, against equation 3 in float64 and autograd."""
    torch.manual_seed(n * M + d_h)
    W, gates = H * d_h, H * (M + gated)
    idx = ids_of(kind, n, V)
    bank = torch.randn(V, M, W, device=DEVICE).to(bank_dtype or dtype).requires_grad_()
    row = W + gates + -gates % 64
    layers = [torch.randn(n, row, device=DEVICE).to(dtype).requires_grad_() for _ in range(L)]
    above = [torch.randn(n, W, device=DEVICE).to(dtype) for _ in range(L)]
    bank.grad = torch.zeros_like(bank) if in_place else None
    memory = move_fast.Memory(bank, idx, bank.grad)
    outs = [memory.mix(vz, H, gated) for vz in layers]
    torch.autograd.backward(outs, above)

    bank64 = bank.detach().double().requires_grad_()
    layers64 = [vz.detach().double().requires_grad_() for vz in layers]
    outs64 = []
    for vz in layers64:
        v, g = vz[..., :W].unflatten(-1, (H, d_h)), 2 * torch.sigmoid(vz[..., W:W + gates])
        slots = bank64[idx[0]].unflatten(-1, (H, d_h))
        v_s = torch.einsum("nhm,nmhd->nhd", g[..., :H * M].unflatten(-1, (H, M)), slots)
        outs64.append((v_s + (g[..., H * M:].unsqueeze(-1) if gated else 1) * v).flatten(1))
    torch.autograd.backward(outs64, [a.double() for a in above])

    for got, expected in zip(outs, outs64, strict=True):
        assert got.dtype == dtype and error(got, expected) <= LIMIT[dtype]
    for got, expected in zip(layers, layers64, strict=True):
        for part in (slice(0, W), slice(W, W + gates)):
            assert error(got.grad[..., part], expected.grad[..., part]) <= LIMIT[dtype]
        assert not got.grad[..., W + gates:].any()  # the padding
    assert bank.grad.dtype == bank.dtype
    assert error(bank.grad, bank64.grad) <= max(LIMIT[dtype], LIMIT[bank.dtype])
    untouched = torch.ones(V, dtype=torch.bool, device=DEVICE).index_fill_(0, idx.flatten(), False)
    assert not bank.grad[untouched].any()


@pytest.mark.parametrize("kind", ["equal", "distinct", "words"])
@pytest.mark.parametrize("dtype, bank_dtype", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)])
def test_equation_and_gradients(kind, dtype, bank_dtype):
    check(kind=kind, dtype=dtype, bank_dtype=bank_dtype)


@pytest.mark.parametrize("M, d_h", [(1, 4), (5, 20), (9, 12), (16, 33), (70, 16), (130, 4), (2, 256)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_slots_and_widths_of_heads(M, d_h, dtype):
    check(n=40, M=M, d_h=d_h, dtype=dtype, in_place=True)


@pytest.mark.parametrize("n", [1, 15, 17, 33])
def test_few_tokens(n):
    check(n=n)


@pytest.mark.parametrize("gated, H", [(False, 2), (True, 1), (True, 3)])
def test_without_the_gate_on_the_value_and_other_numbers_of_heads(gated, H):
    check(gated=gated, H=H, L=1)


@pytest.mark.parametrize("kind", ["equal", "words"])
def test_an_id_that_fills_many_tiles(kind):
    check(n=10 * move_fast.GRADIENT_TILE + 5, V=4, kind=kind, in_place=True)


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed):
    pick = torch.Generator().manual_seed(seed)
    n, M, H, d_h, L, V = (int(torch.randint(low, high, (), generator=pick)) for low, high in
                          ((1, 90), (1, 40), (1, 4), (4, 40), (1, 4), (90, 200)))
    check(n, M, H, d_h, L, V, dtype=[F32, BF16, F16][seed % 3], bank_dtype=[F32, BF16][seed % 2],
          gated=seed % 4 > 0, kind=["words", "distinct", "equal"][seed % 3])


def test_more_layers_than_tickets(monkeypatch):
    monkeypatch.setattr(move_fast, "TICKETS", 2)
    check(L=5)


def test_the_plan_in_plain_python():
    order, group, start, ids = (t.tolist() for t in move_fast.make_plan(torch.tensor([7, 3, 7, 3, 9, 7])))
    assert order == [1, 3, 0, 2, 5, 4]  # where 3, 3, 7, 7, 7, 9 stand
    assert group == [0, 0, 1, 1, 1, 2]
    assert start == [0, 2, 5, 6, 6, 6, 6]
    assert ids[:3] == [3, 7, 9]


def test_tensors_that_do_not_begin_at_sixteen_bytes():
    """The gradients of the layers' outputs may be slices of one tensor."""
    torch.manual_seed(0)
    bank = torch.randn(4, 2, 5, device=DEVICE, requires_grad=True)
    layers = [torch.randn(3, 5 + 64, device=DEVICE) for _ in range(3)]
    above = torch.randn(3, 3, 5, device=DEVICE)
    memory = move_fast.Memory(bank, torch.tensor([[0, 1, 1]], device=DEVICE))
    torch.stack([memory.mix(vz.requires_grad_(), 1, False) for vz in layers]).backward(above)
    expected = torch.zeros(4, 2, 5, dtype=torch.float64, device=DEVICE)
    for vz, d in zip(layers, above, strict=True):
        for t, id in enumerate([0, 1, 1]):
            expected[id] += torch.outer(2 * torch.sigmoid(vz[t, 5:7].detach()), d[t])
    assert error(bank.grad, expected) < 1e-6


# --------------------------------------------------------------------------------------- whole models


def random_model(config, seed=0):
    """A GPT whose layers do something: output projections and routers start at zero."""
    torch.manual_seed(seed)
    model = GPT(config).to(DEVICE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(DEVICE), alpha=0.02)
    return model


def small_config(**kind):
    return GPTConfig.from_depth(2, 3, **{**dict(vocab_size=64, seq_len=20), **kind})


def step(model, compile=lambda model: model):
    """Losses and gradients of two micro-batches, added up."""
    forward, losses = compile(model), []
    for seed in range(2):
        idx = random_ids(2, 21, seed=seed)
        loss = forward(idx[:, :-1], idx[:, 1:]) / 3
        loss.backward()
        losses.append(loss.item())
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


def same(got, expected, limit=1e-5):
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in got[1].items():
        assert error(gradient, expected[1][name].double()) < limit, name


KINDS = dict(mha=dict(), mla=dict(attention="mla"), no_g_0=dict(gate_value=False), lave=dict(memory="lave"),
             none=dict(memory="none"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled, in_place", [(False, False), (False, True), (True, False), (True, True)])
def test_an_accelerated_model_has_the_losses_and_gradients_of_the_reference(kind, compiled, in_place):
    reference, model = (random_model(small_config(**KINDS[kind])) for _ in range(2))
    assert accelerate(model)
    assert model.state_dict().keys() == reference.state_dict().keys()
    if in_place:
        move_fast.zero_grad(model)
    # The steps of the compiler are the same for every backend; generating code takes long.
    torch._dynamo.reset()
    got = step(model, *[partial(torch.compile, fullgraph=True, backend="aot_eager")] * compiled)
    torch._dynamo.reset()
    same(got, step(reference))
    if in_place and model.bank is not None:
        assert model.bank.weight.grad is model.bank.gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fast, in_place", [(False, False), (True, False), (True, True)])
def test_equal_blocks_are_compiled_once(kind, fast, in_place):
    """With the losses and gradients of the reference. Of LaVE every other block has a table."""
    config = small_config(**{**dict(n_layers=5, n_slots=2), **KINDS[kind]})
    reference, model = (random_model(config) for _ in range(2))
    assert not fast or accelerate(model)
    if in_place:
        move_fast.zero_grad(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = train_gpt.compile_parts(model, backend=counter)
    assert compiled.state_dict().keys() < model.state_dict().keys() == reference.state_dict().keys()
    with torch.no_grad():  # an evaluation, which watches the gates
        calls = []
        hooks = [m.register_forward_pre_hook(lambda *_: calls.append(1)) for m in model.modules()
                 if isinstance(m, ValueMixer)]
        idx = random_ids(2, 20)
        assert model(idx, idx).item() == pytest.approx(reference(idx, idx).item(), rel=1e-5)
        assert len(calls) == len(hooks)
        [hook.remove() for hook in hooks]
    same(step(model, lambda model: compiled), step(reference))
    assert counter.frame_count == (4 if kind == "lave" else 3)  # embedding, block and loss
    torch._dynamo.reset()


@pytest.mark.parametrize("change", [
    lambda mixer: mixer.register_forward_pre_hook(lambda _, inputs: (*inputs[:2], inputs[2].detach())),
    lambda mixer: mixer.register_forward_hook(lambda _, inputs, out: 2 * out),
    lambda mixer: setattr(mixer, "gates", lambda x: ValueMixer.gates(mixer, x) / 2),
    lambda mixer: setattr(mixer, "__class__", type("Half", (ValueMixer,), dict(
        gates=lambda self, x: ValueMixer.gates(self, x) / 2)))], ids=range(4))
def test_a_block_unlike_the_others_is_compiled_apart(change):
    """Also if only a hook makes the difference, which the compiler does not look for."""
    torch._dynamo.reset()
    reference, model, plain = (random_model(small_config(n_layers=4, n_slots=2)) for _ in range(3))
    for gpt in (reference, model):
        change(gpt.blocks[2].attention.mixer)
    compiled = train_gpt.compile_parts(model, backend="aot_eager")
    expected = step(reference)
    same(step(model, lambda model: compiled), expected)
    assert not torch.equal(step(plain)[1]["bank.weight"], expected[1]["bank.weight"])
    torch._dynamo.reset()


def test_blocks_of_many_models_are_compiled():
    """More than the compiler remembers for one piece of code."""
    idx, models, counter = random_ids(1, 8), [], CompileCounter()
    for i in range(10):
        model = random_model(small_config(n_layers=2, dim=8 * (i + 1), n_heads=1))
        assert accelerate(model)
        models.append((train_gpt.compile_parts(model, backend=counter), model))
    for _ in range(2):  # none is forgotten
        for compiled, model in models:
            assert compiled(idx, idx).item() == pytest.approx(model(idx, idx).item(), rel=1e-6)
    assert counter.frame_count == 30  # embedding, block and loss of each


@pytest.mark.parametrize("kind", ["mha", "mla", "lave"])
def test_generation_by_the_kernels(kind):
    sampled = []
    for fast in (False, True):
        model = random_model(small_config(**KINDS[kind]))
        assert not fast or accelerate(model)
        tokens = model.generate(torch.tensor([[1, 2], [3, 4]], device=DEVICE), 8, temperature=0)
        sampled.append(torch.stack(list(tokens)))
    assert torch.equal(*sampled)


@pytest.mark.parametrize("kind", ["mha", "heads", "mla", "lave", "none"])
@pytest.mark.parametrize("sampling", [dict(temperature=0), dict(top_k=5, n_ids=40), dict(top_p=0.8)])
def test_a_compiled_step_of_generation(kind, sampling, monkeypatch):
    """The same ids as without it, from the same random numbers; one graph serves all tokens."""
    config = small_config(**{**KINDS, "heads": dict(n_heads=4)}[kind])  # the others have one head
    model, texts, graphs = random_model(config), [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    how = {} if DEVICE == "cuda" else dict(backend=backend)
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            monkeypatch.setattr(GPT, "decoding_step",
                                lambda model, pick, steps: move_fast.fast_step(model, pick, True, **how))
        tokens = model.generate(torch.tensor([[1, 2], [3, 4]], device=DEVICE), 12, **sampling,
                                generator=torch.Generator(DEVICE).manual_seed(0))
        texts.append(torch.stack(list(tokens)))
    assert torch.equal(*texts) and len(texts[0].unique()) > 4
    if DEVICE == "cpu":  # equal blocks share a graph; those of LaVE with a table and without are two kinds
        assert len(graphs) == (3 if kind == "lave" else 2)
    cache, noise = model.new_cache(1, 1), torch.ones(1, 50, device=DEVICE)
    step = move_fast.fast_step(model, lambda logits, noise: logits.argmax(-1), True, **how)
    step(torch.tensor([[1]], device=DEVICE), cache, noise)
    with pytest.raises(IndexError):
        step(torch.tensor([[1]], device=DEVICE), cache, noise)
    torch._dynamo.reset()
    graphs.clear()
    with torch.inference_mode():
        cache = model.new_cache(1, 30)
        for other in (cache, model.new_cache(1, 30), cache):  # two caches, compiled once
            assert step(torch.tensor([[1]], device=DEVICE), other, noise).shape == (1,)
        assert len(graphs) <= 3 and cache.length == cache.position.item() == 2
        with pytest.raises(ValueError):  # more than seq_len
            for _ in range(30):
                step(torch.tensor([[1]], device=DEVICE), cache, noise)


def test_a_compiled_step_has_the_weights_in_the_dtype_of_the_activations():
    """Cast once instead of at each token: in bfloat16 the logits are those of the model, bit by bit."""
    model = random_model(small_config())
    model.dtype, logits = torch.bfloat16, []
    cache, idx = model.new_cache(1, 3), torch.tensor([[5, 6, 7]], device=DEVICE)
    step = move_fast.fast_step(model, lambda z, noise: logits.append(z) or z.argmax(-1), False)
    with torch.inference_mode():
        step(idx, cache, None)
        assert torch.equal(logits[0], model(idx, cache=model.new_cache(1, 3))[:, -1])


def test_methods_of_latent_attention_that_were_replaced():
    model = random_model(small_config(**KINDS["mla"]))
    assert move_fast.plain_twin(model)
    model.blocks[0].attention.latent = lambda x, c_kv, memory: c_kv
    assert not move_fast.plain_twin(model)


def test_compiled_steps_of_many_models():
    """More than the compiler remembers for one piece of code; with the compiler off, too."""
    for i in range(10):
        model = random_model(small_config(n_layers=1, dim=8 * (i + 1), n_heads=1))
        step = move_fast.fast_step(model, lambda z, _: z.argmax(-1), True, backend="eager")
        cache = model.new_cache(1, 3)
        with torch.inference_mode():
            for _ in range(3):
                step(torch.tensor([[1]], device=DEVICE), cache, torch.ones(1, 50, device=DEVICE))
        assert cache.length == cache.position.item() == 3
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        cache.reset()
        for _ in range(3):
            step(torch.tensor([[1]], device=DEVICE), cache, torch.ones(1, 50, device=DEVICE))
        assert cache.length == cache.position.item() == 3


@pytest.mark.parametrize("edit", [
    lambda model: setattr(model.blocks[1].attention.mixer, "gates", lambda x: 0),
    lambda model: setattr(model.blocks[1].attention.mixer, "__class__", type("Mine", (ValueMixer,), {})),
    lambda model: setattr(model.blocks[1].attention.mixer, "router", torch.nn.Linear(16, 6)),
    lambda model: model.blocks[0].mlp_up.register_forward_hook(lambda *_: None),
    lambda model: setattr(model, "bank", type("Pairs", (ValueBank,), {})(50, 2, 16)),
    lambda model: setattr(model.blocks[0].attention, "queries_and_keys", lambda x, rotary: (x, x)),
    lambda model: setattr(model.blocks[1], "__class__", type("Mine", (type(model.blocks[1]),), {})),
    lambda model: model.blocks.append(model.blocks[0]),
    lambda model: model.register_buffer("ema", torch.zeros(3)),
    lambda model: setattr(model, "head", move.Linear(16, 40)),
    lambda model: model.head.register_full_backward_pre_hook(lambda *_: None),
    lambda model: setattr(model.blocks[0], "__class__", type("Mine", (type(model.blocks[0]),), dict(
        get_extra_state=lambda self: {})))], ids=range(12))
def test_a_changed_model_has_no_compiled_step(edit):
    """It would compute the old one."""
    model = random_model(small_config(n_heads=2, dim=16, n_slots=2))
    assert move_fast.plain_twin(model) and (accelerate(model), move_fast.plain_twin(model))[1]
    edit(model)
    assert not move_fast.plain_twin(model)
    with pytest.raises(ValueError):
        move_fast.fast_step(model, None, True)


def test_many_steps_of_generation_are_a_graph_and_very_many_are_compiled(monkeypatch):
    model, asked = random_model(small_config()), []
    accelerate(model)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    other = random_model(small_config())
    other.__class__ = move_fast.FastGPT
    other.register_buffer("ema", torch.zeros(3))
    assert other.decoding_step(None, move_fast.STEPS_FOR_GRAPH).__module__ == "move"  # as usual
    monkeypatch.setattr(move_fast, "fast_step", lambda model, pick, compiled: asked.append(compiled))
    for steps in (move_fast.STEPS_FOR_GRAPH - 1, move_fast.STEPS_FOR_GRAPH, move_fast.STEPS_TO_COMPILE):
        model.decoding_step(None, steps)
    assert asked == [False, True]


def test_the_gradient_is_the_same_from_run_to_run():
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            model = random_model(small_config())
            accelerate(model)
            runs.append(step(model)[1]["bank.weight"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*runs)


def test_lengths_do_not_compile_again_and_again():
    torch._dynamo.reset()
    model = random_model(small_config())
    accelerate(model)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for T in range(5, 12):
        compiled(random_ids(1, T), random_ids(1, T))
    torch._dynamo.reset()
    assert counter.frame_count <= 2


class GroupedQueries(nn.Module):
    """Somebody's model: a mixer for 2 value heads of 8 beside ordinary values."""

    def __init__(self, mixer=ValueMixer):
        super().__init__()
        self.embedding, self.w_v = nn.Embedding(30, 32), nn.Linear(32, 16)
        self.bank = ValueBank(30, 4, 16)
        self.mixers = nn.ModuleList(mixer(32, n_heads=2, n_slots=4) for _ in range(2))
        for m in self.mixers:
            nn.init.normal_(m.router.weight)
        nn.init.normal_(self.bank.weight)

    def forward(self, idx):
        x, memory = self.embedding(idx), self.bank(idx)
        return sum(mixer(x, self.w_v(x).unflatten(-1, (2, 8)), memory) for mixer in self.mixers)


def test_somebody_elses_model():
    torch.manual_seed(0)
    model = GroupedQueries().to(DEVICE)
    fast = copy.deepcopy(model)
    idx = random_ids(2, 9, vocab_size=30)
    assert accelerate(fast)
    for m in (model, fast):
        m(idx).square().sum().backward()
    assert error(fast(idx), model(idx).double()) < 1e-6
    for p, q in zip(fast.parameters(), model.parameters(), strict=True):
        assert error(p.grad, q.grad.double()) < 1e-5


def test_a_bank_that_is_read_without_autograd_is_not_trained():
    class Frozen(GroupedQueries):
        def forward(self, idx):
            with torch.no_grad():
                memory = self.bank(idx)
            x = self.embedding(idx)
            return sum(mixer(x, self.w_v(x).unflatten(-1, (2, 8)), memory) for mixer in self.mixers)

    torch.manual_seed(0)
    model, idx = Frozen().to(DEVICE), random_ids(2, 9, vocab_size=30)
    fast = copy.deepcopy(model)
    assert accelerate(fast)
    for forward in (fast, torch.compile(fast, backend="aot_eager")):
        model.zero_grad(), fast.zero_grad()
        for m in (model, forward):
            m(idx).square().sum().backward()
        assert fast.bank.weight.grad is None
        for p, q in zip(fast.parameters(), model.parameters(), strict=True):
            assert p.grad is q.grad is None or error(p.grad, q.grad.double()) < 1e-5
    torch._dynamo.reset()


def test_a_gradient_of_a_gradient_raises():
    model, idx = GroupedQueries().to(DEVICE), random_ids(2, 9, vocab_size=30)
    assert accelerate(model)
    for p in (model.bank.weight, model.mixers[0].router.weight):
        loss = model(idx).square().sum()
        gradient, = torch.autograd.grad(loss, p, create_graph=True)
        with pytest.raises(RuntimeError):  # and no penalty that does nothing
            (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("where", ["mixer", "layer", "attention"])
def test_backward_hooks_that_would_not_see_the_memory(where):
    """They are honoured, by the reference. Around the bank and all mixers they see no less."""
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = ValueMixer(32, 2, 4)

        def forward(self, x, v, memory):
            return self.mixer(x, v, memory)

    if where == "attention":
        model = random_model(small_config())
        module = model.blocks[1].attention
    else:
        model = GroupedQueries()
        if where == "layer":
            model.mixers = nn.ModuleList(Layer() for _ in range(2))
        model, module = model.to(DEVICE), model.mixers[0]
    handle = module.register_full_backward_hook(lambda module, into, out: None)
    said = []
    assert not accelerate(model, log=said.append) and len(said) == 1
    handle.remove()
    around = model.register_full_backward_hook(lambda module, into, out: None)
    assert accelerate(model)
    around.remove()
    if where == "mixer":
        module.register_full_backward_hook(lambda module, into, out: None)
        with pytest.raises(RuntimeError):
            model(random_ids(2, 9, vocab_size=30))


@pytest.mark.parametrize("register", [
    nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook,
    nn.modules.module.register_module_full_backward_hook,
    nn.modules.module.register_module_full_backward_pre_hook])
def test_hooks_for_all_modules_are_honoured(register):
    model, said = GroupedQueries().to(DEVICE), []
    handle = register(lambda *_: None)
    try:
        assert not accelerate(model, log=said.append) and len(said) == 1
    finally:
        handle.remove()
    assert accelerate(model)


def test_nothing_to_accelerate_is_said():
    said = []
    single = GroupedQueries().to(DEVICE)
    single.mixers = single.mixers[:1]  # a table that one layer reads
    for model in (nn.Linear(3, 3).to(DEVICE), single):
        assert not accelerate(model, log=said.append)
    assert len(said) == 2 and type(single.bank) is ValueBank


def test_rows_that_are_replaced_before_the_backward_pass_are_an_error():
    torch.manual_seed(0)
    model = GPT(small_config(), bank=partial(move_store.StoredBank, home="gpu", device=DEVICE)).to(DEVICE)
    assert accelerate(model)
    few, many = torch.tensor([[1, 2, 3]]), torch.arange(60).view(3, 20)
    for first, then in ((few, many), (many, few)):  # the working set grows, or not
        move_store.borrow(model, [first])
        loss = model(first.to(DEVICE), first.to(DEVICE))
        move_store.borrow(model, [then])
        with pytest.raises(RuntimeError):
            loss.backward()


def test_a_model_with_a_length():
    """As torch.compile's, which has none to give."""
    model, idx = random_model(small_config()), random_ids(2, 9)
    expected, compiled = model(idx), torch.compile(model, backend="eager")
    assert accelerate(compiled)
    for forward in (compiled, model):
        assert torch.allclose(forward(idx), expected, atol=1e-4)
    torch._dynamo.reset()


def test_what_a_mixer_holds_besides_does_not_matter():
    model, idx = GroupedQueries().to(DEVICE), random_ids(2, 9, vocab_size=30)
    for mixer in model.mixers:
        mixer.lock = threading.Lock()
        mixer.register_forward_hook(lambda mixer, inputs, out: setattr(mixer, "seen", out))
    model(idx)
    assert accelerate(model) and accelerate(model)
    assert isinstance(model.bank(idx), move_fast.Memory)


def test_the_dtypes_of_the_surroundings_do_not_matter():
    torch.set_default_dtype(torch.float16)
    try:
        assert accelerate(random_model(small_config()).float())
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast(DEVICE, torch.float16):
        assert accelerate(random_model(small_config()))


def test_the_loss_in_float16_does_not_overflow():
    """One large channel and one frequent target: their sum over thousands of tokens is beyond float16."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(1, 1, vocab_size=64, seq_len=8192), F16).to(DEVICE)
    x = torch.randn(1, 8192, 128, device=DEVICE)
    x[..., 0] = 40
    targets = torch.where(torch.rand(1, 8192, device=DEVICE) < 0.9, 0, random_ids(1, 8192).to(DEVICE))
    fast = copy.deepcopy(model)
    assert accelerate(fast)
    for autocast in (False, True):
        for m in (model, fast):
            m.zero_grad()
            with torch.autocast(DEVICE, F16, enabled=autocast):
                loss = m.loss(x if autocast else x.to(F16), targets)
            loss.backward()
        gradients = [m.head.weight.grad for m in (model, fast)]
        assert gradients[1].isfinite().all() and torch.allclose(*gradients, atol=1e-3)


def test_what_the_kernels_cannot_do_is_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(move_fast, "DTYPES", (F16,))  # so float32 is not among them
    reference, model = (random_model(small_config()) for _ in range(2))
    assert accelerate(model)
    assert isinstance(model.bank(random_ids(1, 3)), move_fast.Memory)
    for in_place in (False, True):
        model.zero_grad(), reference.zero_grad()
        if in_place:
            move_fast.zero_grad(model)
        with pytest.warns(UserWarning, match="without the kernels"):
            got = step(model)
        same(got, step(reference))


def test_bfloat16_is_not_for_the_interpreter():
    code = "import torch, move_fast\nprint(torch.bfloat16 in move_fast.DTYPES, move_fast.INTERPRETED)"
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                            env={**os.environ, "TRITON_INTERPRET": "1"})
    assert result.stdout == "False True\n", result.stderr


def test_no_tokens():
    model = random_model(small_config())
    empty = torch.zeros(2, 0, dtype=torch.long, device=DEVICE)
    expected = model(empty)
    accelerate(model)
    assert model(empty).shape == expected.shape == (2, 0, 64)


def test_shapes_that_do_not_fit():
    """As with the reference, a RuntimeError; and no kernel reads or writes beyond the bank."""
    for bank, n_ids, values in [((9, 2, 16), 5, (2, 8)), ((9, 3, 32), 5, (2, 8)), ((9, 3, 16), 6, (2, 8)),
                                ((9, 3, 16), 5, (4, 4)), ((9, 1, 16), 5, (2, 8)), ((9, 3, 16), 1, (2, 8)),
                                ((9, 3, 16), 5, (1, 16))]:
        model = nn.ModuleList([ValueBank(*bank), *(ValueMixer(16, n_heads=2, n_slots=3) for _ in range(2))])
        model.to(DEVICE)
        for fast in (False, True):
            assert not fast or accelerate(model)
            with pytest.raises(RuntimeError):
                memory = model[0](torch.zeros(1, n_ids, dtype=torch.long, device=DEVICE))
                x, v = torch.randn(1, 5, 16, device=DEVICE), torch.randn(1, 5, *values, device=DEVICE)
                model[1](x, v, memory)
    bank = torch.zeros(9, 1, 16, device=DEVICE)
    with pytest.raises(ValueError, match="1,048,561"):
        move_fast.Memory(bank, torch.zeros(1, 1048561, dtype=torch.long, device=DEVICE))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it stops the device")
@pytest.mark.parametrize("id", [9, -1, 2 ** 32])
def test_an_id_out_of_range(id):
    model = nn.ModuleList([ValueBank(9, 2, 8), ValueMixer(8, 2, 2), ValueMixer(8, 2, 2)])
    assert accelerate(model)
    with pytest.raises(IndexError):
        model[0](torch.tensor([[0, id]]))


@pytest.mark.parametrize("dtype", [F32, torch.bool, torch.uint8, torch.int16])
def test_ids_of_another_type(dtype):
    model = random_model(small_config())
    for fast in (False, True):
        assert not fast or accelerate(model)
        with pytest.raises(RuntimeError):
            model.bank(torch.ones(1, 3, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("chunk", [4, 7, 100])
def test_the_loss_by_chunks(chunk, monkeypatch):
    monkeypatch.setattr(move_fast, "CHUNK", chunk)  # of 14 tokens
    torch.manual_seed(0)
    x = torch.randn(14, 6, dtype=torch.float64)
    weight = 9 * torch.randn(11, 6, dtype=torch.float64)  # logits far beyond the cap
    targets = torch.tensor([-100, 3, 0, 10, -100, 5, 5, 1, 2, 9, -100, 7, 8, 4])
    results = []
    for by_chunks in (True, False):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if by_chunks:
            loss = move_fast.linear_cross_entropy(a, w, targets)
            with torch.no_grad():
                assert loss == move_fast.linear_cross_entropy(a, w, targets)
        else:
            loss = nn.functional.cross_entropy(15 * torch.tanh(a @ w.T / 15), targets)
        (loss / 3).backward()
        results.append((loss, a.grad, w.grad))
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-15)
    with pytest.raises(RuntimeError):
        move_fast.linear_cross_entropy(x, weight, targets.clamp(min=11))
    none = torch.full_like(targets, -100)
    assert move_fast.linear_cross_entropy(x, weight, none).isnan()  # as F.cross_entropy


# ------------------------------------------------------- whoever changes the equation gets the change


def softmax_gates(mixer, x):
    z = mixer.router(x).unflatten(-1, (-1, mixer.n_heads)).transpose(-2, -1)
    return z.softmax(-1)


class SoftmaxMixer(ValueMixer):
    gates = softmax_gates


def subclass(model, patch):
    for block in model.blocks:
        block.attention.mixer.__class__ = SoftmaxMixer


def instance_gates(model, patch):
    mixer = model.blocks[0].attention.mixer
    mixer.gates = partial(softmax_gates, mixer)


def class_gates(model, patch):
    patch.setattr(ValueMixer, "gates", softmax_gates)


def another_mix(model, patch):
    def mix(v, memory, gates):
        return gates[..., :1] * v + 9 * memory.sum(2).view_as(v)

    patch.setattr(move, "mix_values", mix)


def router_with_a_bias(model, patch):
    router = model.blocks[1].attention.mixer.router
    router.bias = nn.Parameter(torch.ones(len(router.weight), device=DEVICE))
    router.forward = partial(nn.Linear.forward, router)


def router_of_another_type(model, patch):
    mixer = model.blocks[1].attention.mixer
    mixer.router = nn.Sequential(mixer.router, nn.Softplus())


def router_hook(model, patch):
    model.blocks[0].attention.mixer.router.register_forward_hook(lambda module, inputs, output: output + 1)


def router_pre_hook(model, patch):
    model.blocks[0].attention.mixer.router.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def value_hook(model, patch):
    model.blocks[0].attention.w_v.register_forward_hook(lambda module, inputs, output: output + 1)


def value_adapter(model, patch):
    model.blocks[0].attention.w_v = nn.Sequential(model.blocks[0].attention.w_v, nn.Tanh())


class FastSoftmaxMixer(move_fast.FastValueMixer):
    gates = softmax_gates


def subclass_of_the_kernels(model, patch):
    model.blocks[0].attention.mixer.__class__ = FastSoftmaxMixer


def bank_hook(model, patch):
    model.bank.register_forward_hook(lambda module, inputs, output: output * 2)


def another_mixer(model, patch):
    model.blocks[0].attention.mixer = SoftmaxMixer(128, 1, 3).to(DEVICE)


CHANGES = [subclass, subclass_of_the_kernels, bank_hook, another_mixer, instance_gates, class_gates,
           another_mix, router_with_a_bias, router_of_another_type, router_hook, router_pre_hook, value_hook,
           value_adapter]
all_changes = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


@all_changes
def test_a_changed_model_trains_on_the_reference(change, monkeypatch):
    reference, model = (random_model(small_config()) for _ in range(2))
    before = step(reference)
    reference.zero_grad()
    change(reference, monkeypatch)
    change(model, monkeypatch) if change not in (class_gates, another_mix) else None
    lines = []
    assert not accelerate(model, log=lines.append)
    assert len(lines) == 1 and "\n" not in lines[0]
    got, expected = step(model), step(reference)
    assert got[0] == expected[0] and got[0] != pytest.approx(before[0], rel=1e-6)
    assert all(torch.equal(got[1][name], expected[1][name]) for name in got[1])


@all_changes
@pytest.mark.parametrize("compiled", [False, True])
def test_a_change_after_accelerate_is_honoured_or_raises(change, compiled, monkeypatch):
    torch._dynamo.reset()
    model = random_model(small_config())
    assert accelerate(model)
    forward = torch.compile(model, backend="eager") if compiled else model
    idx = random_ids(2, 20)
    forward(idx, idx)
    change(model, monkeypatch)
    with pytest.raises((RuntimeError, AttributeError)):
        forward(idx, idx)
    torch._dynamo.reset()
    accelerate(model, log=lambda line: None)  # once more: on the reference, with the change
    reference = random_model(small_config())
    if change not in (class_gates, another_mix):
        change(reference, monkeypatch)
    assert torch.allclose(model(idx, idx), reference(idx, idx), rtol=1e-6)


@pytest.mark.parametrize("kind", ["none", "lave"])
def test_a_change_in_a_model_without_a_shared_bank(kind):
    """Of somebody's own, which has an attention of ours but no GPT."""
    model = torch.nn.ModuleDict(dict(attention=random_model(small_config(**KINDS[kind])).blocks[0].attention))
    assert accelerate(model)
    attention, x = model["attention"], torch.randn(1, 5, 128, device=DEVICE)
    rotary = [table.to(DEVICE) for table in move.rotary_embedding(torch.arange(5).unsqueeze(1), 128)]
    attention.queries_and_keys(x, rotary)
    attention.w_q.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError):
        attention.queries_and_keys(x, rotary)


HOOKS = {"forward": ("w_q", "register_forward_hook"), "backward": ("w_k", "register_full_backward_pre_hook"),
         "head": ("head", "register_full_backward_hook"), "bank": ("bank", "register_full_backward_hook")}


@pytest.mark.parametrize("how", ["plain", "compiled", "in parts"])
@pytest.mark.parametrize("kind, hook", [(kind, hook) for kind in ("mha", "lave", "none") for hook in HOOKS
                                        if (kind, hook) not in (("lave", "bank"), ("none", "bank"))])
def test_a_hook_is_honoured_or_raises(kind, hook, how):
    """Whatever the memory is, and whether it is there before accelerate or comes later."""
    def register(model):
        name, method = HOOKS[hook]
        module = getattr(model, name, None) or getattr(model.blocks[0].attention, name)
        getattr(module, method)(lambda *_: None)

    torch._dynamo.reset()
    model, idx = random_model(small_config(**KINDS[kind])), random_ids(2, 20)
    register(model)
    assert not accelerate(model, log=lambda line: None)
    model = random_model(small_config(**KINDS[kind]))
    assert accelerate(model)
    register(model)
    forward = {"plain": lambda model: model, "compiled": partial(torch.compile, backend="eager"),
               "in parts": partial(train_gpt.compile_parts, backend="eager")}[how](model)
    with pytest.raises(RuntimeError):
        forward(idx, idx)
    torch._dynamo.reset()


def test_two_models_that_share_a_bank():
    a, b, idx = *(random_model(small_config()) for _ in range(2)), random_ids(2, 20)
    b.bank = a.bank
    expected = a(idx)
    assert accelerate(a) and accelerate(b)
    del b
    gc.collect()
    assert torch.allclose(a(idx), expected, atol=1e-4)
    b = random_model(small_config())
    b.bank = a.bank
    with pytest.raises(RuntimeError, match="accelerate"):
        b(idx)
    assert accelerate(b)
    a.blocks[0].attention.w_q.register_forward_hook(lambda *_: None)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError):
        torch.compile(a, backend="eager")(idx)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["mha", "lave", "none"])
def test_a_copy_of_an_accelerated_model_is_to_be_accelerated(kind):
    """What is changed in the one does not count in the other."""
    model, idx = random_model(small_config(**KINDS[kind])), random_ids(2, 20)
    assert accelerate(model)
    expected = model(idx, idx)
    twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError):
        twin(idx, idx)
    assert accelerate(twin)
    twin.blocks[0].attention.w_q.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError):
        twin(idx, idx)
    assert torch.equal(model(idx, idx), expected)
    del twin
    gc.collect()
    assert torch.equal(model(idx.int(), idx), expected)  # ids of the other type


def test_a_part_is_accelerated_and_then_the_whole():
    model, idx = random_model(small_config()), random_ids(2, 20)
    whole = nn.ModuleDict(dict(model=model, other=ValueBank(9, 2, 16).to(DEVICE)))
    expected = model(idx)
    for part in (model, whole, model):
        assert accelerate(part)
        assert torch.allclose(model(idx), expected, atol=1e-4)


def test_blocks_are_compiled_for_several_shapes():
    """Those with a table of LaVE and those without have code of their own."""
    torch._dynamo.reset()
    model = random_model(small_config(memory="lave", n_layers=4, n_slots=2))
    assert accelerate(model)
    compiled = train_gpt.compile_parts(model, backend="eager")
    for shape in ((4, 16), (2, 16), (2, 8)):
        idx = random_ids(*shape)
        for _ in range(2):
            compiled(idx, idx).backward()
        with torch.no_grad():
            assert torch.allclose(compiled(idx, idx), model(idx, idx))
    torch._dynamo.reset()


@all_changes
def test_a_change_is_noticed_where_blocks_are_compiled(change, monkeypatch):
    torch._dynamo.reset()
    model, idx = random_model(small_config()), random_ids(2, 20)
    assert accelerate(model)
    compiled = train_gpt.compile_parts(model, backend="eager")
    compiled(idx, idx)
    change(model, monkeypatch)
    with pytest.raises((RuntimeError, AttributeError)):
        compiled(idx, idx)
    torch._dynamo.reset()


EDITS = [("g = 2 * torch.sigmoid(z)", "g = 2 * torch.sigmoid(z + self.bias)"),
         ("g = 2 * torch.sigmoid(z)", "g = z.size(-1) * z.softmax(-1)"),
         ("z = self.router(x)", "z = self.router(x.detach())"),
         ("memory.to(v.dtype), self", "memory.to(v.dtype).detach(), self"),
         ("std=0)  # W_G", "std=0.1)  # W_G"),
         ("rows = F.embedding(idx,", "rows = 30 * F.embedding(idx,"),
         ("rms_norm(t), rotary) for t", "t, rotary) for t"),
         ("else self.mixer(x, v, memory)", "else self.mixer(x, rms_norm(v), memory)"),
         ("limit=15.0", "limit=0.5"),
         ("targets.flatten())\n", "targets.flatten(), label_smoothing=0.1)\n")]


def edited_module(tmp_path, old, new):
    source = (HERE / "move.py").read_text()
    assert source.count(old) == 1
    (tmp_path / "edited.py").write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
    module = sys.modules["edited"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    linecache.clearcache()
    return module


def edits_seen(module):
    owners = {owner: module if owner is move else getattr(module, owner.__name__)
              for owner, _ in move_fast.COPIED}
    return [name for (owner, name), expected in move_fast.COPIED.items()
            if move_fast.fingerprint(getattr(owners[owner], name)) != expected]


@pytest.mark.parametrize("old, new", EDITS)
def test_an_edited_equation_is_noticed(old, new, tmp_path):
    """Whoever changes the text of move.py must never train the old equation on a GPU."""
    assert edits_seen(edited_module(tmp_path, old, new))


def test_a_comment_or_another_layout_is_no_edit(tmp_path):
    assert move_fast.edited() is None
    for old, new in [("g = 2 * torch.sigmoid(z)", "g = (2 *  # twice\n             torch.sigmoid(z))"),
                     ('"""(B, T, d) → (B, T, H, M+1): gate 0', '"""Gates: gate 0')]:
        assert not edits_seen(edited_module(tmp_path, old, new))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 70])
def test_copied_rows(dtype, n):
    """Beside indexing; rows of another row count and of a width that is no multiple of a block."""
    a, b = (torch.randn(100, 3, 50, device=DEVICE).to(dtype) for _ in range(2))
    to, source = (torch.randperm(100, device=DEVICE)[:n] for _ in range(2))
    expected = b.clone()
    expected[to] = a[source]
    move_fast.copy_rows(b, to, a, source)
    assert torch.equal(b, expected)
    wide = torch.randn(5, 9, 1000, device=DEVICE).to(dtype)
    other, every = torch.zeros_like(wide), torch.arange(5, device=DEVICE)
    move_fast.copy_rows(other, every, wide, every)
    assert torch.equal(wide, other)


@pytest.mark.parametrize("dtype", move_fast.DTYPES)
@pytest.mark.parametrize("width", [5, 1024, 1500])
def test_rows_of_a_store_are_read_and_updated(dtype, width):
    """As by move_store.py without kernels, in float64."""
    near = torch.randn(9, 3, 1, width, device=DEVICE).to(dtype)
    near[:, 2].abs_()
    seats = torch.tensor([4, 0, 8, 3], device=DEVICE)
    c, decay = torch.rand(4, device=DEVICE), torch.rand(2, 4, device=DEVICE)
    g = torch.randn(6, 1, width).to(near)
    sources = torch.tensor([[5, 0, -1, 2], [-1, 1, 3, -1], [4, -1, -1, -1]], device=DEVICE)
    constants = torch.tensor([0.2, 0.05, 0.01, 0.4, 1e-3], device=DEVICE)
    exact, out = near.cpu().double(), torch.empty_like(g[:4])
    total = torch.stack([g[5].double() + g[4], g[0].double() + g[1], g[3].double(), g[2].double()]).cpu()
    others = [t.cpu().double() for t in (c, decay, constants)]
    expected = torch.empty(4, 1, width, dtype=torch.float64)
    move_store.read_rows(expected, exact, seats.cpu(), others[0], others[-1])
    move_store.update_rows(exact, seats.cpu(), *others[:2], total, torch.arange(4).unsqueeze(0), others[-1])
    move_fast.read_rows(out, near, seats, c, constants)
    assert torch.allclose(out.cpu().double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    move_fast.update_rows(near, seats, c, decay, g, sources, constants)
    assert torch.allclose(near.cpu().double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_of_a_bank(dtype):
    """Each step beside one of torch's in float64, from the same numbers."""
    p = nn.Parameter(torch.randn(7, 3, 401, device=DEVICE).to(dtype))
    m, v, step = torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=DEVICE)
    options = dict(betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    for lr in (0.1, 0.3, 0.05):
        p.grad = torch.randn_like(p) * (torch.rand(7, 1, 1, device=DEVICE) < 0.5)  # rows without a gradient
        exact = nn.Parameter(p.detach().cpu().double())
        exact.grad, adamw = p.grad.cpu().double(), torch.optim.AdamW([exact], lr=lr, **options)
        moments = [t.cpu().double() for t in (m, v)]
        adamw.state[exact] = dict(step=step.cpu().clone(), exp_avg=moments[0], exp_avg_sq=moments[1])
        adamw.step()
        step += 1
        move_fast.adamw(p, m, v, step, lr, **options)
        for got, expected in zip((p, m, v), (exact, *moments), strict=True):
            assert torch.allclose(got.cpu().double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_adamw_takes_its_kernel_for_banks(monkeypatch):
    """For them alone, and with torch's states: either goes on with those of the other."""
    taken, kernel = [], move_fast.adamw
    monkeypatch.setattr(move_fast, "adamw", lambda p, *rest: taken.append(p) or kernel(p, *rest))
    monkeypatch.setattr(optimizers, "kernels_for", lambda p: move_fast)
    bank = torch.randn(5, 2, 16, device=DEVICE).bfloat16()
    start = [bank, torch.randn(8, 8, device=DEVICE), bank.clone().transpose(0, 1)]
    ours, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    assert not ours[2].is_contiguous()
    unused, options = nn.Parameter(bank.clone()), dict(betas=(0.7, 0.9), eps=1e-6, weight_decay=0.1)
    a = optimizers.AdamW([dict(params=[*ours, unused], lr=0.1)], **options)
    b = torch.optim.AdamW([dict(params=[*theirs, unused], lr=0.1)], **options, fused=True)
    for step in range(6):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        gradients = [p.grad for p in ours]
        a.step(), b.step()
        assert all(p.grad is gradient for p, gradient in zip(ours, gradients, strict=True))
        assert all(torch.allclose(p, q, rtol=0.01, atol=0.002) for p, q in zip(ours, theirs, strict=True))
        state, other = a.state_dict()["state"], b.state_dict()["state"]
        assert state.keys() == other.keys()
        for i, entries in state.items():
            assert {k: (t.dtype, t.shape) for k, t in entries.items()} == {
                k: (t.dtype, t.shape) for k, t in other[i].items()}
        to, source, old, new = (a, b, ours, theirs) if step < 3 else (b, a, theirs, ours)
        to.load_state_dict(copy.deepcopy(source.state_dict()))
        for p, q in zip(old, new, strict=True):
            p.data.copy_(q.data)
    assert len(taken) == 6 and all(p is ours[0] for p in taken) and torch.equal(unused, bank)


def test_adamw_without_kernels(monkeypatch):
    """--no-kernels, and what fails in between, leave a bank with its gradient."""
    bank = nn.Parameter(torch.randn(5, 2, 16, device=DEVICE).bfloat16())
    bank.grad = gradient = torch.randn_like(bank)
    adamw = optimizers.AdamW([dict(params=[bank], lr=0.1)], betas=(0.8, 0.95), eps=1e-10)
    monkeypatch.setattr(move_fast, "adamw", None)
    monkeypatch.setattr(move_store, "KERNELS", False)
    before = bank.detach().clone()
    adamw.step()
    assert not torch.equal(bank, before)
    monkeypatch.setattr(optimizers, "kernels_for", lambda p: move_fast)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adamw.step()
    assert bank.grad is gradient


def test_numbers_that_differ_leave_the_reference(monkeypatch):
    """Whatever the way in which a mixer was changed, both mixes are compared."""
    model = random_model(small_config())
    known = ValueMixer.gates

    def gates(self, x):
        return 1.001 * known(self, x)

    monkeypatch.setattr(ValueMixer, "gates", gates)
    monkeypatch.setitem(move_fast.KNOWN, (ValueMixer, "gates"), gates)
    monkeypatch.setitem(move_fast.COPIED, (ValueMixer, "gates"), move_fast.fingerprint(gates))
    assert not accelerate(model, log=lambda line: None)
    assert type(model.bank) is ValueBank and type(model) is GPT


def test_all_or_none():
    model = nn.ModuleList([random_model(small_config()), GroupedQueries(SoftmaxMixer).to(DEVICE)])
    assert not accelerate(model, log=lambda line: None)
    assert not [m for m in model.modules() if type(m) in move_fast.REFERENCE]


def test_a_copy_of_an_accelerated_model():
    model = random_model(small_config())
    accelerate(model)
    twin, idx = copy.deepcopy(model), random_ids(2, 20)
    with pytest.raises(RuntimeError):
        twin(idx, idx)
    assert accelerate(twin)
    assert torch.equal(twin(idx, idx), model(idx, idx))
    twin.blocks[0].attention.mixer.router.register_forward_hook(lambda module, inputs, output: output + 1)
    model(idx, idx)  # a change of the copy is none of the model
    with pytest.raises(RuntimeError):
        twin(idx, idx)


# ------------------------------------------------------------------------- inside other training loops


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by", ["model", "optimizer", "move_fast"])
def test_zero_grad_between_forward_and_backward(by, set_to_none):
    reference, model = (random_model(small_config()) for _ in range(2))
    accelerate(model)
    move_fast.zero_grad(model)
    optimizer = torch.optim.SGD(model.parameters())
    for seed in range(2):
        idx, gradients = random_ids(2, 20, seed=seed), []
        for m in (reference, model):
            loss = m(idx, idx)
            if m is reference:
                m.zero_grad()
            elif by == "move_fast":
                move_fast.zero_grad(m)
            else:
                (m if by == "model" else optimizer).zero_grad(set_to_none=set_to_none)
            loss.backward()
            gradients.append({name: p.grad.clone() for name, p in m.named_parameters()})
        same(([], gradients[1]), ([], gradients[0]))


def test_zero_grad_between_forward_and_backward_of_a_compiled_model_is_an_error():
    torch._dynamo.reset()
    model, idx = random_model(small_config()), random_ids(2, 20)
    accelerate(model)
    move_fast.zero_grad(model)
    loss = torch.compile(model, backend="aot_eager")(idx, idx)
    model.zero_grad()
    with pytest.raises(RuntimeError):
        loss.backward()
    torch._dynamo.reset()


def test_in_place_only_where_it_was_asked_for():
    model, idx = random_model(small_config()), random_ids(2, 20)
    accelerate(model)
    move_fast.zero_grad(model)
    place = model.bank.weight.grad
    model(idx, idx).backward()
    in_place = place.clone()
    assert model.bank.weight.grad is place and in_place.any()
    move_fast.zero_grad(model)  # starts again in the same place
    assert model.bank.weight.grad is place and not place.any()
    model.zero_grad()  # an ordinary training loop from here on
    model(idx, idx).backward()
    assert model.bank.weight.grad is not place and torch.equal(model.bank.weight.grad, in_place)
    model.bank.bfloat16()
    move_fast.zero_grad(model)
    assert model.bank.weight.grad.dtype == BF16
    model.bank.requires_grad_(False).weight.grad = None
    move_fast.zero_grad(model)
    model(idx, idx).backward()
    assert model.bank.weight.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_gradient_checkpointing(reentrant, in_place):
    reference, model = (random_model(small_config(n_layers=3)) for _ in range(2))
    expected = step(reference)
    accelerate(model)
    if in_place:
        move_fast.zero_grad(model)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
    same(step(model), expected)


DISTRIBUTED = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
sys.path[:0] = [{here!r}, {tests!r}]
import conftest
from test_fast import accelerate, random_ids, random_model, small_config, error

gpus = torch.cuda.is_available()
if gpus:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if gpus else "gloo")
rank = dist.get_rank()
idx = random_ids(4, 20)
reference = random_model(small_config())
reference(idx, idx).backward()
expected = {{name: p.grad for name, p in reference.named_parameters()}}
mine = idx[2 * rank:2 * rank + 2]


def gradients(model):
    return {{name.removeprefix("module."): p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for name, p in model.named_parameters()}}


def ddp(model):
    return DistributedDataParallel(model)


def fsdp_model(model):
    return fully_shard(model)


def fsdp_blocks(model):
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def fsdp_bank(model):
    fully_shard(model.bank)
    return fully_shard(model)


for wrap in (ddp, fsdp_model, fsdp_blocks, fsdp_bank):
    for order in ("accelerate first", "wrap first"):
        model = random_model(small_config())
        if order == "accelerate first":
            fast = accelerate(model)
            model = wrap(model)
        else:
            model = wrap(model)
            fast = accelerate(model, log=lambda line: None)
        try:
            for _ in range(2):  # accumulated
                (model(mine, mine) / 2).backward()
            worst = max(error(g, expected[name].double()) for name, g in gradients(model).items())
            result = "right" if worst < 1e-5 else f"WRONG {{worst}}"
        except RuntimeError as problem:
            result = "refused" if "bank" in str(problem) else repr(problem)
        if rank == 0:
            print(wrap.__name__, order, fast, result, sep=", ", flush=True)
dist.barrier()  # end together: Gloo's threads may abort a process whose peer ends first
dist.destroy_process_group()
"""


def test_data_parallel_and_sharded_models(tmp_path):
    """Two processes, on a GPU each or on a CPU: right gradients, or an error that says what to do."""
    (tmp_path / "two.py").write_text(DISTRIBUTED.format(here=str(HERE), tests=str(HERE / "tests")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() < 2 else {}
    if hidden and NEEDS_OLDER_NUMPY:
        pytest.skip("Triton's interpreter needs numpy<2.4")
    result = subprocess.run([*torchrun, tmp_path / "two.py"], capture_output=True, text=True, timeout=200,
                            env={**os.environ, **hidden})
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 8
    for line in lines:
        wrap, order, fast, outcome = line.split(", ")
        assert outcome == "right" or (wrap == "fsdp_bank" and outcome == "refused"), lines
        assert fast == "True" or order == "wrap first"


def test_a_model_that_is_accelerated_again_is_not_compiled_again():
    model, idx, graphs = random_model(small_config()), random_ids(1, 8), []
    assert accelerate(model)
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    for _ in range(3):
        assert accelerate(model)
        with torch.no_grad():
            compiled(idx)
    assert len(graphs) == 1


@pytest.mark.skipif(NEEDS_OLDER_NUMPY, reason="Triton's interpreter needs numpy<2.4")
def test_compiled_code_is_the_same_in_each_process():
    """Or the compiler's cache would not help the next run: there is nothing of this process in it."""
    code = """if True:
        import torch, move, move_fast
        other = [object() for _ in range({})]  # other addresses
        config = move.GPTConfig(vocab_size=50, seq_len=8, n_layers=2, n_heads=2, dim=32, n_slots=3)
        model, idx = move.GPT(config), torch.zeros(1, 8, dtype=torch.long)
        assert move_fast.accelerate(model)

        def backend(graph, inputs):
            for node in graph.graph.nodes:
                numbers = [a for a in node.args if isinstance(a, (int, float))]
                print(getattr(node.target, '__name__', node.target), numbers)
            return graph

        move_fast.zero_grad(model)
        torch.compile(model, backend=backend, fullgraph=True)(idx, idx)
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    results = [subprocess.run([sys.executable, "-c", code.format(n)], capture_output=True, text=True,
                              cwd=HERE, env=environment) for n in (0, 100_000)]
    assert not any(result.returncode for result in results), results[0].stderr
    first, second = (result.stdout for result in results)
    assert "mixed" in first and "tickets" in first and first == second
