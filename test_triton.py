"""The kernels of move_triton.py against float64, on a GPU or, elsewhere, in Triton's interpreter.

    pytest -q test_triton.py
"""
import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter

import experiments
import move
from move import GPT, GPTConfig, ValueBank, ValueMixer
from prepare_data import UserError
from test_move import fails

pytest.importorskip("triton")
import move_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LIMIT = {F32: 1e-5, BF16: 4e-3, F16: 1e-3}  # of relative errors


@pytest.fixture(autouse=True, scope="module")
def bfloat16_in_the_interpreter():
    """Triton's interpreter keeps bfloat16 as uint16: it multiplies the bits, and cuts where it should round."""
    if not move_triton.INTERPRETED:
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
        yield


def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def ids_of(kind, n, vocab_size):
    """Ids (1, n): all equal, all distinct, or some often and many seldom, as words are."""
    if kind == "equal":
        return torch.full((1, n), vocab_size - 1, device=DEVICE)
    if kind == "distinct":
        return torch.randperm(vocab_size, device=DEVICE)[None, :n]
    return (torch.rand(1, n, device=DEVICE) ** 3 * vocab_size).long()


def check(n=70, M=3, H=2, d_h=8, L=2, V=90, dtype=F32, bank_dtype=None, gated=True, kind="words", in_place=False):
    """V_S of L layers and all gradients, against equation 3 in float64 and autograd."""
    torch.manual_seed(n * M + d_h)
    W, gates = H * d_h, H * (M + gated)
    idx = ids_of(kind, n, V)
    bank = torch.randn(V, M, W, device=DEVICE).to(bank_dtype or dtype).requires_grad_()
    layers = [torch.randn(1, n, W + gates + -gates % 64, device=DEVICE).to(dtype).requires_grad_() for _ in range(L)]
    above = [torch.randn(1, n, H, d_h, device=DEVICE).to(dtype) for _ in range(L)]
    gradient = torch.zeros_like(bank) if in_place else None
    memory = move_triton.FusedMemory(bank, idx, gradient)
    outs = [memory.mix(vz, H, gated) for vz in layers]
    torch.autograd.backward(outs, above)

    bank64, layers64 = bank.detach().double().requires_grad_(), [vz.detach().double().requires_grad_() for vz in layers]
    outs64 = []
    for vz in layers64:
        v, g = vz[..., :W].unflatten(-1, (H, d_h)), 2 * torch.sigmoid(vz[..., W:W + gates])
        v_s = torch.einsum("bthm,btmhd->bthd", g[..., :H * M].unflatten(-1, (H, M)), bank64[idx].unflatten(-1, (H, d_h)))
        outs64.append(v_s + (g[..., H * M:].unsqueeze(-1) if gated else 1) * v)
    torch.autograd.backward(outs64, [a.double() for a in above])

    for got, expected in zip(outs, outs64):
        assert got.dtype == dtype and error(got, expected) <= LIMIT[dtype]
    for got, expected in zip(layers, layers64):
        for part in (slice(0, W), slice(W, W + gates)):
            assert error(got.grad[..., part], expected.grad[..., part]) <= LIMIT[dtype]
        assert not got.grad[..., W + gates:].any()  # the padding
    got = gradient if in_place else bank.grad
    assert got.dtype == bank.dtype and error(got, bank64.grad) <= max(LIMIT[dtype], LIMIT[bank.dtype])
    untouched = torch.ones(V, dtype=torch.bool, device=DEVICE).index_fill_(0, idx.flatten(), False)
    assert not got[untouched].any()


@pytest.mark.parametrize("kind", ["equal", "distinct", "words"])
@pytest.mark.parametrize("dtype, bank_dtype", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)])
def test_equation_and_gradients(kind, dtype, bank_dtype):
    check(kind=kind, dtype=dtype, bank_dtype=bank_dtype)


@pytest.mark.parametrize("M, d_h", [(1, 4), (5, 20), (9, 12), (16, 33), (70, 16), (256, 4), (2, 256)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_slots_and_sizes_of_heads(M, d_h, dtype):
    check(n=40, M=M, d_h=d_h, dtype=dtype, in_place=True)


@pytest.mark.parametrize("n", [1, 15, 17, 33])
def test_few_tokens(n):
    check(n=n)


@pytest.mark.parametrize("gated, H", [(False, 2), (True, 1), (True, 3)])
def test_without_the_gate_on_the_value_and_other_numbers_of_heads(gated, H):
    check(gated=gated, H=H, L=1)


@pytest.mark.parametrize("kind", ["equal", "words"])
def test_an_id_that_fills_many_tiles(kind):
    check(n=10 * move_triton.GRADIENT_TILE + 5, V=4, kind=kind, in_place=True)


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed):
    pick = torch.Generator().manual_seed(seed)
    n, M, H, d_h, L, V = (int(torch.randint(low, high, (), generator=pick)) for low, high in
                          ((1, 90), (1, 40), (1, 4), (4, 40), (1, 4), (90, 200)))
    check(n, M, H, d_h, L, V, dtype=[F32, BF16, F16][seed % 3], bank_dtype=[F32, BF16][seed % 2], gated=seed % 4 > 0,
          kind=["words", "distinct", "equal"][seed % 3])


def test_the_plan_in_plain_python():
    idx = torch.tensor([[7, 3, 7], [3, 9, 7]])
    order, group, start, ids = (t.tolist() for t in move_triton.make_plan(idx))
    assert order == [1, 3, 0, 2, 5, 4]  # where 3, 3, 7, 7, 7, 9 stand
    assert group == [0, 0, 1, 1, 1, 2]
    assert start == [0, 2, 5, 6, 6, 6, 6]
    assert ids[:3] == [3, 7, 9]


# -------------------------------------------------------------------------------------- the model


def losses_and_gradients(mix, compiled=False, in_place=False, **kind):
    config = GPTConfig.from_depth(2, 3, vocab_size=64, seq_len=20, **kind)
    torch.manual_seed(0)
    model = GPT(config, mix=mix).to(DEVICE)
    with torch.no_grad():  # output projections start at zero
        for parameter in model.blocks.parameters():
            parameter.add_(torch.randn(parameter.shape).to(DEVICE), alpha=0.02)
    if in_place:
        model.banks[0].zero_gradient()
    # The compiler's own steps are the same for every backend; making code takes long.
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    losses = []
    for seed in range(2):  # micro-batches
        idx = torch.randint(0, 64, (2, 21), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        loss = forward(idx[:, :-1], idx[:, 1:]) / 3
        loss.backward()
        losses.append(loss.item())
    if in_place:
        assert model.banks[0].weight.grad is model.banks[0].gradient
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", [dict(), dict(attention="mla"), dict(gate_value=False)], ids=["mha", "mla", "no g_0"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_by_the_kernels_is_the_reference(kind, compiled, in_place):
    expected_losses, expected = losses_and_gradients("reference", **kind)
    losses, gradients = losses_and_gradients("fused", compiled, in_place, **kind)
    torch._dynamo.reset()
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, gradient in gradients.items():
        assert error(gradient, expected[name].double()) < 1e-5, name


def test_zero_gradient_starts_again_in_the_same_place():
    bank = ValueBank(5, 2, 8, mix="fused").to(DEVICE)
    bank.zero_gradient()
    place = bank.weight.grad
    for _ in range(2):
        vz = torch.ones(1, 3, 8 + 64, device=DEVICE)
        bank(torch.tensor([[0, 1, 1]], device=DEVICE)).mix(vz.requires_grad_(), 2, True).sum().backward()
        first = place.clone()
        assert first[:2].all() and not first[2:].any()
        bank.weight.grad = None  # as optimizer.zero_grad() does
        bank.zero_gradient()
        assert bank.weight.grad is place and not place.any()


def test_zero_gradient_follows_the_weight_to_another_dtype():
    bank = ValueBank(9, 2, 8, mix="fused").to(DEVICE)
    bank.zero_gradient()
    bank.weight.grad = None  # as optimizer.zero_grad() does
    bank.bfloat16().zero_gradient()
    assert bank.weight.grad.dtype == torch.bfloat16 and not bank.weight.grad.any()


def test_grouped_query_heads_beside_ordinary_values():
    """A mixer for 2 value heads of 8, in somebody's model: v comes from elsewhere."""
    torch.manual_seed(0)
    bank, mixer = ValueBank(30, 4, 16).to(DEVICE), ValueMixer(32, n_heads=2, n_slots=4).to(DEVICE)
    torch.nn.init.normal_(mixer.router.weight)
    torch.nn.init.normal_(bank.weight)
    x, v, idx = torch.randn(2, 9, 32).to(DEVICE), torch.randn(2, 9, 2, 8).to(DEVICE), torch.randint(0, 30, (2, 9)).to(DEVICE)
    outs = []
    for bank.mix in ("reference", "fused"):
        outs.append(mixer(x, v, bank(idx)))
    assert error(outs[1], outs[0].double()) < 1e-6


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_generation_by_the_kernels(attention):
    config = GPTConfig.from_depth(2, 3, vocab_size=64, seq_len=20, attention=attention)
    drawn = []
    for mix in ("reference", "fused"):
        torch.manual_seed(0)
        model = GPT(config, mix=mix).to(DEVICE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape).to(DEVICE), alpha=0.05)
        drawn.append(torch.stack(list(model.generate(torch.tensor([[1, 2], [3, 4]], device=DEVICE), 8, temperature=0))))
    assert (drawn[0] == drawn[1]).all()


def test_the_gradient_is_the_same_from_run_to_run():
    torch.use_deterministic_algorithms(True)
    try:
        runs = [losses_and_gradients("fused", in_place=True)[1]["banks.0.weight"] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*runs)


def test_layers_that_do_not_fit():
    bank = torch.randn(9, 2, 8, device=DEVICE, requires_grad=True)
    memory = move_triton.FusedMemory(bank, torch.zeros(1, 3, dtype=torch.long, device=DEVICE))
    memory.mix(torch.randn(1, 3, 72, device=DEVICE), 2, True)
    with pytest.raises(ValueError, match="alike in heads"):
        memory.mix(torch.randn(1, 3, 72, device=DEVICE), 4, True)
    with pytest.raises(TypeError, match="not torch.float64; use mix='reference'"):
        memory.mix(torch.randn(1, 3, 72, dtype=torch.float64, device=DEVICE), 2, True)
    for _ in range(move_triton.MAX_LAYERS - 1):
        memory.mix(torch.randn(1, 3, 72, device=DEVICE), 2, True)
    with pytest.raises(ValueError, match="at most 128"):
        memory.mix(torch.randn(1, 3, 72, device=DEVICE), 2, True)


@pytest.mark.parametrize("mix", ["reference", "fused"])
def test_somebody_elses_layer_for_the_values(mix):
    bank, mixer = ValueBank(9, 2, 8, mix=mix).to(DEVICE), ValueMixer(8, 2, 2).to(DEVICE)
    memory = bank(torch.zeros(1, 3, dtype=torch.long, device=DEVICE))
    with pytest.raises(TypeError, match="v must be values .* or a move.Linear, not Linear"):
        mixer(torch.randn(1, 3, 8, device=DEVICE), torch.nn.Linear(8, 8).to(DEVICE), memory)


def test_shapes_that_do_not_fit():
    """As with the reference, a RuntimeError; and no kernel reads or writes beyond the bank."""
    mixer = ValueMixer(16, n_heads=2, n_slots=3).to(DEVICE)
    for bank_shape, n_ids, values in [((9, 2, 16), 5, (2, 8)), ((9, 3, 32), 5, (2, 8)), ((9, 3, 16), 6, (2, 8)), ((9, 3, 16), 5, (4, 4)),
                                      ((9, 1, 16), 5, (2, 8)), ((9, 3, 16), 1, (2, 8)), ((9, 3, 16), 5, (1, 16))]:
        for mix in ("reference", "fused"):
            bank = ValueBank(*bank_shape, mix=mix).to(DEVICE)
            memory = bank(torch.zeros(1, n_ids, dtype=torch.long, device=DEVICE))
            with pytest.raises(RuntimeError):
                mixer(torch.randn(1, 5, 16, device=DEVICE), torch.randn(1, 5, *values, device=DEVICE), memory)
    with pytest.raises(ValueError, match="up to 1,048,560 tokens at a time, not 1,048,561"):
        ValueBank(9, 3, 16, mix="fused").to(DEVICE)(torch.zeros(1, 1048561, dtype=torch.long, device=DEVICE))
    with pytest.raises(RuntimeError, match="contiguous"):
        move_triton.FusedMemory(torch.randn(2, 9, 16, device=DEVICE).transpose(0, 1), torch.zeros(1, 5, dtype=torch.long, device=DEVICE))
    with pytest.raises(ValueError, match="heads of up to 512, not 513"):
        bank = ValueBank(9, 2, 513, mix="fused").to(DEVICE)
        bank(torch.zeros(1, 3, dtype=torch.long, device=DEVICE)).mix(torch.randn(1, 3, 600, device=DEVICE), 1, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it stops the device")
@pytest.mark.parametrize("id", [9, -1, 2 ** 32])
def test_an_id_outside_the_bank(id):
    with pytest.raises(RuntimeError, match="an id is outside the bank"):
        ValueBank(9, 2, 8, mix="fused")(torch.tensor([[0, id]]))


def test_tensors_that_do_not_begin_at_sixteen_bytes():
    """The gradients of the layers' outputs may be slices of one tensor."""
    torch.manual_seed(0)
    idx = torch.tensor([[0, 1, 1]], device=DEVICE)
    bank = torch.randn(4, 2, 5, device=DEVICE, requires_grad=True)
    layers = [torch.randn(1, 3, 5 + 64, device=DEVICE) for _ in range(3)]
    above = torch.randn(3, 1, 3, 1, 5, device=DEVICE)
    memory = move_triton.FusedMemory(bank, idx)
    torch.stack([memory.mix(vz.requires_grad_(), 1, False) for vz in layers]).backward(above)
    expected = torch.zeros(4, 2, 5, dtype=torch.float64, device=DEVICE)
    for vz, d in zip(layers, above):
        for t, id in enumerate(idx[0]):
            expected[id] += torch.outer(2 * torch.sigmoid(vz[0, t, 5:7].detach()), d[0, t, 0])
    assert error(bank.grad, expected) < 1e-6


def test_in_place_only_where_it_was_asked_for():
    def step(bank):
        vz = torch.ones(1, 3, 8 + 64, device=DEVICE, requires_grad=True)
        bank(torch.tensor([[0, 1, 1]], device=DEVICE)).mix(vz, 2, True).sum().backward()

    bank = ValueBank(5, 2, 8, mix="fused").to(DEVICE)
    bank.zero_gradient()
    step(bank)
    in_place = bank.weight.grad.clone()
    another = copy.deepcopy(bank)
    for b in (bank, another):
        b.weight.grad = None  # an ordinary training loop from here on
        step(b)
        assert b.weight.grad is not b.gradient and torch.equal(b.weight.grad, in_place)
    frozen = ValueBank(5, 2, 8, mix="fused").to(DEVICE).requires_grad_(False)
    frozen.zero_gradient()
    step(frozen)
    assert frozen.weight.grad is None and frozen.gradient is None


def test_lengths_do_not_compile_again_and_again():
    torch._dynamo.reset()
    model = GPT(GPTConfig.from_depth(2, 3, vocab_size=64, seq_len=20), mix="fused").to(DEVICE)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for T in range(5, 12):
        idx = torch.zeros(1, T, dtype=torch.long, device=DEVICE)
        compiled(idx, idx)
    torch._dynamo.reset()
    assert counter.frame_count <= 2


def test_inside_a_package(tmp_path):
    package = tmp_path / "somebodys"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("move.py", "move_triton.py"):
        shutil.copy(Path(move.__file__).with_name(name), package)
    code = "import somebodys.move as move; print(move.move_triton.__name__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "somebodys.move_triton\n", result.stderr


def test_where_the_kernels_cannot_run(monkeypatch):
    bank = ValueBank(9, 2, 8, mix="fused")
    idx = torch.zeros(1, 3, dtype=torch.long)
    monkeypatch.setattr(move_triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs move_triton.py, Triton and a CUDA device"):
        bank(idx)
    monkeypatch.setattr(move, "move_triton", None)  # only move.py was copied, or there is no Triton
    with pytest.raises(ValueError, match="needs move_triton.py, Triton and a CUDA device"):
        bank(idx)
    assert ValueBank(9, 2, 8, mix="auto")(idx).shape == (1, 3, 2, 8)
    with pytest.raises(ValueError, match="mix must be 'auto', 'reference' or 'fused', not 'fussed'"):
        ValueBank(9, 2, 8, mix="fussed")


# ------------------------------------------------------------------------------------ what it costs


def test_the_overhead_says_what_is_wrong(tmp_path):
    for flags, message in [(["--tokens", 1000], "--tokens 1000 is not a multiple of --seq_len 2048"),
                           (["--rounds", 0], "--rounds must be at least 1"), (["--variants"], "expected at least one argument")]:
        fails(experiments, ["overhead", *flags], message)
    with pytest.raises(UserError, match="move-x is none; there are standard, lave-x<scale>"):
        experiments.Variant("move-x", None, 64)
    if not torch.cuda.is_available():
        fails(experiments, ["overhead"], "overhead measures a CUDA device")


def test_the_chart_has_a_bar_a_variant(tmp_path):
    experiments.chart([("standard", 0, 0, 0), ("move-x1", 0.02, 0.01, 0.03)], tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart:
        colors = chart.convert("RGB").getcolors(1 << 20)
    assert max(count for count, color in colors if color == (0x33, 0x66, 0xCC)) > 1000
