"""MoVE in other people's code: nanoGPT's lines, transformers' Llama, trained models, export."""
import copy
import importlib.util
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import move
from move import GPT, GPTConfig, ValueMixer, memory_parameter_groups
from move_store import StoredBank

HERE = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers reads folders only


def example(name):
    return runpy.run_path(str(HERE / "examples" / name))


def routers(model):
    return [m.router.weight for m in model.modules() if isinstance(m, ValueMixer)]


def randomize(model):
    """Routers and banks that no start would give: every gate and slot counts."""
    for module in model.modules():
        if isinstance(module, ValueMixer):
            nn.init.normal_(module.router.weight)
        if isinstance(module, move.ValueBank):
            nn.init.normal_(module.weight)


# ---------------------------------------------------------------------------------------- nanoGPT's lines

# A model and a loop of nanoGPT's shape, with the lines that examples/nanogpt_move.py changes.
MODEL = '''
from dataclasses import dataclass
import torch
from torch import nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    block_size: int = 16
    vocab_size: int = 50
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 768


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(0)
        self.n_head = config.n_head

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        q, k = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k))
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), CausalSelfAttention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x)).relu()


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(0), h=nn.ModuleList(Block(config) for _ in range(config.n_layer))))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        # report number of parameters
        self.n_params = self.get_num_params()

    def get_num_params(self):
        n_params = sum(p.numel() for p in self.parameters())
        n_params -= self.transformer.wpe.weight.numel()
        return n_params

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, idx):
        position = self.transformer.wpe.weight[:idx.size(1)]
        x = self.transformer.drop(self.transformer.wte(idx) + position)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(x)

    def configure_optimizers(self, weight_decay, learning_rate):
        param_dict = dict(self.named_parameters())
        # create optim groups.
        matrices = [p for p in param_dict.values() if p.dim() >= 2]
        others = [p for p in param_dict.values() if p.dim() < 2]
        optim_groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0)]
        optimizer = torch.optim.AdamW(optim_groups, lr=learning_rate)
        return optimizer
'''

LOOP = '''
def step(model, optimizer, lr, idx, targets):
    for param_group in optimizer.param_groups:
        param_group['lr'] = lr
    loss = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
'''


@pytest.fixture(scope="module")
def nanogpt():
    """(the host, the host with our lines), each a module with GPT, GPTConfig and step."""
    code, made = example("nanogpt_move.py"), []
    apply, changes = code["apply"], code["CHANGES"]
    for name, model, loop in [("host", MODEL, LOOP), ("with_memory", apply(changes["model.py"], MODEL),
                                                      apply(changes["train.py"], LOOP))]:
        module = sys.modules[name] = types.ModuleType(name)  # dataclass looks its module up
        exec(model + loop, module.__dict__)
        made.append(module)
    yield made
    del sys.modules["host"], sys.modules["with_memory"]


def build(module, seed=0, n_embd=32):
    torch.manual_seed(seed)
    return module.GPT(module.GPTConfig(n_embd=n_embd))


def test_the_lines_in_nanogpt_keep_the_start_of_the_host_and_of_the_memory(nanogpt):
    host, model = map(build, nanogpt)
    assert not any(w.any() for w in routers(model)) and len(routers(model)) == 2
    assert model.bank.weight.std().item() == pytest.approx(0.3 * 4 ** -0.5, rel=0.05)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], p) for name, p in host.state_dict().items())
    assert model.n_params == host.n_params + sum(w.numel() for w in routers(model))
    nn.init.zeros_(model.bank.weight)
    idx = torch.randint(50, (2, 16))
    assert torch.equal(model(idx), host(idx))


def test_the_lines_in_nanogpt_change_values_and_nothing_else(nanogpt):
    _, model = map(build, nanogpt)
    randomize(model)
    attention, x, idx = model.transformer.h[0].attn, torch.randn(2, 5, 32), torch.randint(50, (2, 5))
    seen = []
    attention.mixer.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    attention(x, model.bank(idx))
    ((x_seen, v, memory, v_s),) = seen
    assert torch.equal(x_seen, x) and torch.equal(memory, model.bank(idx))
    assert torch.equal(v, attention.c_attn(x)[..., 64:].unflatten(-1, (2, 16))) and v_s.shape == v.shape


def test_the_lines_in_nanogpt_keep_the_rates_of_the_memory(nanogpt):
    _, module = nanogpt
    model = build(module)
    optimizer = model.configure_optimizers(0.1, 1e-3)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(model.parameters()))
    memory = memory_parameter_groups(model)
    taken = {p for group in memory for p in group["params"]}
    idx, losses = torch.randint(50, (4, 17)), []
    for lr in (1e-4, 1e-3, 1e-3, 5e-4, 5e-4):
        losses.append(module.step(model, optimizer, lr, idx[:, :-1], idx[:, 1:]))
        assert [g["lr"] for g in optimizer.param_groups[:2]] == pytest.approx([lr, lr])
        for group, own in zip(optimizer.param_groups[2:], memory, strict=True):
            assert group["params"] == own["params"] and group["lr"] == pytest.approx(lr / 1e-3 * own["lr"])
            assert group["weight_decay"] == 0 and group["betas"] == own["betas"]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert not taken & set(optimizer.param_groups[0]["params"])
    assert losses[-1] < losses[0] - 0.05, losses
    again = build(module).configure_optimizers(0.1, 1e-3)
    again.load_state_dict(optimizer.state_dict())  # a resumed run
    assert [g["scale"] for g in again.param_groups] == [g["scale"] for g in optimizer.param_groups]


def test_another_nanogpt_is_refused():
    code = example("nanogpt_move.py")
    with pytest.raises(ValueError, match="another nanoGPT"):
        code["apply"](code["CHANGES"]["model.py"], MODEL.replace("block(x)", "block(x, mask)"))


@pytest.mark.parametrize("files", [[], ["model.py"], ["model.py", "train.py"]])
def test_a_folder_without_nanogpt_is_refused(files, tmp_path):
    """In one line, and nothing changes in it."""
    before = dict.fromkeys(files, "import torch\n")
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    result = subprocess.run([sys.executable, str(HERE / "examples" / "nanogpt_move.py"), str(tmp_path)],
                            capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


# ----------------------------------------------------------------------------------- transformers' Llama

SHAPE = dict(vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
             num_attention_heads=8, num_key_value_heads=2, pad_token_id=0)


@pytest.fixture(scope="module")
def llama():
    """The module examples/transformers_llama.py."""
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("transformers_llama",
                                                  HERE / "examples" / "transformers_llama.py")
    module = sys.modules["transformers_llama"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def new_llama(llama, **config):
    """A Llama whose memory counts."""
    torch.manual_seed(0)
    model = llama.MoVEForCausalLM(llama.MoVEConfig(n_slots=3, **{**SHAPE, **config})).eval()
    randomize(model)
    return model


def random_ids(*shape):
    return torch.randint(1, 100, shape, generator=torch.Generator().manual_seed(1))


def continued(model, ids, **options):
    """The 20 most probable next ids."""
    options = dict(do_sample=False, max_new_tokens=20, eos_token_id=None, **options)
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **options)[:, ids.size(1):]


def llama_gradients(model, idx):
    model.zero_grad()
    model(idx, labels=idx).loss.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("size", [130, 70])
def test_a_llama_of_another_vocabulary(size, llama, tmp_path):
    """The bank has the rows of the ids: the old ones as they were, new ones as those of a new bank."""
    model = new_llama(llama)
    old = model.model.bank.weight.requires_grad_(False).clone()
    model.resize_token_embeddings(size)
    new = model.model.bank.weight
    assert not new.requires_grad and len(new) == size and torch.equal(new[:100], old[:size])
    assert size < 100 or new[100:].std().item() == pytest.approx(0.3 * 3 ** -0.5, rel=0.1)
    model.save_pretrained(tmp_path)
    again = llama.MoVEForCausalLM.from_pretrained(tmp_path).eval()
    idx = torch.tensor([[1, 2, size - 1]])
    assert torch.equal(again(idx).logits, model(idx).logits)
    model.resize_token_embeddings(size)  # nothing to do
    assert torch.equal(model.model.bank.weight, new)


def starts_as_a_new_one(model, n_slots):
    """Zero routers, a bank of the right variance, which memory that was only allocated would not have."""
    assert len(routers(model)) == 3 and not any(w.any() for w in routers(model))
    bank = model.model.bank.weight.detach()
    assert bank.shape == (100, n_slots, 16) and abs(bank.mean()) < 0.02
    assert bank.std().item() == pytest.approx(0.3 * n_slots ** -0.5, rel=0.1)
    return True


@pytest.mark.parametrize("tied", [False, True])
def test_llama_starts_with_zero_routers(llama, tied):
    config = llama.MoVEConfig(n_slots=3, **SHAPE, tie_word_embeddings=tied)
    assert starts_as_a_new_one(llama.MoVEForCausalLM(config), 3)
    with torch.device("meta"):
        model = llama.MoVEForCausalLM(config)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(7)
    model.init_weights()
    assert starts_as_a_new_one(model, 3)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_llama_loads_a_checkpoint_without_memory(llama, tied, tmp_path):
    torch.manual_seed(0)
    host = llama.LlamaForCausalLM(llama.LlamaConfig(**SHAPE, tie_word_embeddings=tied)).eval()
    host.save_pretrained(tmp_path)
    model, info = llama.MoVEForCausalLM.from_pretrained(tmp_path, n_slots=2, output_loading_info=True)
    assert {name.split(".")[-2] for name in info["missing_keys"]} == {"bank", "router"}
    assert starts_as_a_new_one(model, 2) and model.config.n_slots == 2
    example("trained_model.py")["start_from_trained"](model)
    assert torch.equal(model(random_ids(2, 9)).logits, host(random_ids(2, 9)).logits)


def test_llama_comes_back_from_its_own_checkpoint(llama, tmp_path):
    model = new_llama(llama)
    model.save_pretrained(tmp_path)
    for kind in (llama.MoVEForCausalLM, llama.AutoModelForCausalLM):
        twin = kind.from_pretrained(tmp_path)
        assert type(twin) is llama.MoVEForCausalLM
        assert torch.equal(twin(random_ids(2, 9)).logits, model(random_ids(2, 9)).logits)


def test_llama_mixes_before_the_cache(llama):
    """The cache holds V_S of the two value heads, as the equation has it."""
    model = new_llama(llama)
    ids, seen = random_ids(2, 9), []
    mixer = model.model.layers[0].self_attn.mixer
    mixer.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    cache = next(value for value in model(ids, use_cache=True).values() if hasattr(value, "layers"))
    ((x, v, memory, v_s),) = seen
    g = 2 * torch.sigmoid(mixer.router(x)).unflatten(-1, (2, 4))
    slots = model.model.bank.weight[ids].unflatten(-1, (2, 8))
    expected = g[..., :1] * v + sum(g[..., i + 1, None] * slots[:, :, i] for i in range(3))
    torch.testing.assert_close(v_s, expected)
    assert torch.equal(cache.layers[0].values, v_s.transpose(1, 2)) and v_s.shape == (2, 9, 2, 8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_generates_with_a_cache_as_without(llama, attention):
    model = new_llama(llama, attn_implementation=attention)
    ids = random_ids(2, 9)
    expected = continued(model, ids, use_cache=False)
    assert expected.unique().numel() > 5
    assert torch.equal(continued(model, ids), expected)
    assert torch.equal(continued(model, ids, cache_implementation="static"), expected)


def test_llama_with_a_padded_batch(llama):
    model, ids = new_llama(llama), random_ids(2, 9)
    short = ids[1:, 4:]
    padded = torch.cat((ids[:1], F.pad(short, (4, 0))))
    got = continued(model, padded, attention_mask=(padded != 0).long())
    assert torch.equal(got, torch.cat((continued(model, ids[:1]), continued(model, short))))


def test_llama_needs_ids(llama):
    with pytest.raises(ValueError, match="needs input_ids"):
        new_llama(llama)(inputs_embeds=torch.zeros(1, 2, 64))


@pytest.mark.parametrize("reentrant", [False, True])
def test_llama_with_gradient_checkpointing(llama, reentrant):
    model, ids = new_llama(llama).train(), random_ids(2, 9)
    expected, calls = llama_gradients(model, ids), []
    assert all(g.any() for g in expected)
    model.model.layers[0].self_attn.mixer.register_forward_hook(lambda *_: calls.append(1))
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(dict(use_reentrant=reentrant))
    for got, g in zip(llama_gradients(model, ids), expected, strict=True):
        torch.testing.assert_close(got, g)
    assert len(calls) == 2  # the layer ran once more in the backward pass


def test_llama_compiled(llama):
    model, ids = new_llama(llama, num_hidden_layers=1), random_ids(2, 9)
    expected, twin = llama_gradients(model, ids), copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for got, g in zip(llama_gradients(compiled, ids), expected, strict=True):
        torch.testing.assert_close(got, g)
    torch._dynamo.reset()


def test_llama_learns_by_the_groups_of_its_memory(llama):
    torch.manual_seed(0)
    model = llama.MoVEForCausalLM(llama.MoVEConfig(**SHAPE))
    memory = memory_parameter_groups(model)
    assert [len(group["params"]) for group in memory] == [1, 3]
    taken = {p for group in memory for p in group["params"]}
    rest = dict(params=[p for p in model.parameters() if p not in taken])
    optimizer, ids, losses = torch.optim.AdamW([rest, *memory], lr=1e-3), random_ids(4, 16), []
    for _ in range(6):
        losses.append(model(ids, labels=ids).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.4, losses


def test_llama_by_the_kernels(llama):
    move_fast = pytest.importorskip("move_fast", reason="needs Triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids = new_llama(llama).to(device), random_ids(2, 9).to(device)
    expected, fast = llama_gradients(model, ids), copy.deepcopy(model)
    assert move_fast.accelerate(fast)
    for got, g in zip(llama_gradients(fast, ids), expected, strict=True):
        torch.testing.assert_close(got, g, rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------- models that are trained


@pytest.fixture
def trained():
    """(a plain model after 30 steps, the same with a new memory, its code, tokens). Id 7 is frequent."""
    torch.manual_seed(0)
    plain, code = example("attention.py"), example("attention_move.py")
    tokens = torch.randint(1000, (8, 33))
    tokens[:, ::3] = 7
    host = plain["Model"]()
    optimizer = plain["make_optimizer"](host)
    for _ in range(30):
        plain["train_step"](host, optimizer, tokens[:, :-1], tokens[:, 1:])
    model = code["Model"]()
    missing, unexpected = model.load_state_dict(host.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[-2] for name in missing} == {"bank", "router"}
    return host, model, code, tokens


def train(model, code, tokens, steps=20, optimizer=None):
    optimizer = optimizer or code["make_optimizer"](model)
    return [code["train_step"](model, optimizer, tokens[:, :-1], tokens[:, 1:]) for _ in range(steps)]


def differences(slots):
    """Distances of all pairs of slots (M, d) over their mean norm."""
    i, j = torch.triu_indices(len(slots), len(slots), 1)
    return (slots[i] - slots[j]).norm(dim=-1) / slots.norm(dim=-1).mean()


def test_a_memory_for_a_trained_model(trained):
    host, model, code, tokens = trained
    assert not torch.allclose(model(tokens), host(tokens), atol=0.1)  # the usual start changes the outputs
    example("trained_model.py")["start_from_trained"](model)
    assert torch.equal(model(tokens), host(tokens))
    losses = train(model, code, tokens)
    assert losses[-1] < losses[0] - 0.2, losses
    slots = model.bank.weight.detach()
    moved, seen = slots.any(-1), tokens[:, :-1].unique()
    assert moved[seen].all() and moved.sum() == 4 * len(seen)
    assert differences(slots[7]).min() > 0.1, differences(slots[7])


def test_a_stored_bank_is_no_start():
    """Its rows are not among the parameters, so that they would stay as they are."""
    model = GPT(GPTConfig(64, 8, 1, 1, 16, n_slots=2), bank=lambda *shape: StoredBank(*shape, home="host"))
    with pytest.raises(ValueError):
        example("trained_model.py")["start_from_trained"](model)


def test_a_zero_bank_under_equal_gates_would_have_one_slot(trained):
    host, model, code, tokens = trained
    nn.init.zeros_(model.bank.weight)
    assert torch.equal(model(tokens), host(tokens))
    train(model, code, tokens)
    slots = model.bank.weight.detach()
    assert slots[7].any() and differences(slots[7]).max() < 1e-3


def test_only_the_memory_learns(trained):
    host, model, code, tokens = trained
    start = example("trained_model.py")
    start["start_from_trained"](model)
    optimizer = torch.optim.AdamW(start["only_the_memory_learns"](model))
    losses = train(model, code, tokens, optimizer=optimizer)
    assert losses[-1] < losses[0] - 0.2, losses
    weights = model.state_dict()
    assert all(torch.equal(weights[name], p) for name, p in host.state_dict().items())
    assert all(w.any() for w in routers(model)) and differences(weights["bank.weight"][7]).min() > 0.1
    learns = {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {"bank", "router"}


@pytest.mark.parametrize("kind", [dict(attention="mla", kv_rank=16), dict(gate_value=False),
                                  dict(memory="lave"), dict(n_slots=1)], ids=str)
def test_the_outputs_of_other_trained_models_stay(kind):
    torch.manual_seed(0)
    config = dict(vocab_size=50, seq_len=16, n_layers=2, n_heads=2, dim=32, n_slots=3)
    model = GPT(GPTConfig(**{**config, **kind}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    host = GPT(GPTConfig(**{**config, **kind, "memory": "none"}))
    host.load_state_dict(model.state_dict(), strict=False)
    example("trained_model.py")["start_from_trained"](model)
    idx = torch.randint(50, (2, 16))
    assert torch.equal(model(idx), host(idx))


# ------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("kind", [dict(), dict(attention="mla", kv_rank=16), dict(memory="lave")], ids=str)
def test_export(kind):
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 32, n_layers=2, n_heads=2, dim=32, n_slots=3, **kind)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    axes = (torch.export.Dim("batch"), torch.export.Dim("tokens", max=32))
    exported = torch.export.export(model, (torch.randint(50, (2, 9)),), dynamic_shapes=(axes,)).module()
    idx = torch.randint(50, (3, 20))
    torch.testing.assert_close(exported(idx), model(idx))


def test_export_of_the_example_and_to_onnx(tmp_path):
    torch.manual_seed(0)
    model, idx = example("attention_move.py")["Model"]().eval(), torch.randint(1000, (3, 20))
    randomize(model)
    axes = (torch.export.Dim("batch"), torch.export.Dim("tokens"))
    arguments = dict(args=(idx[:2, :9].clone(),), dynamic_shapes=(axes,))
    torch.testing.assert_close(torch.export.export(model, **arguments).module()(idx), model(idx))
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(model, dynamo=True, **arguments).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: idx.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(idx).detach(), rtol=1e-4, atol=1e-4)
