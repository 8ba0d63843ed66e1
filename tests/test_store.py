"""A bank that lives elsewhere: losses, gradients and rows are those of a plain bank, whatever its home."""
import copy
import functools
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import HERE, command, fails, log_of
from test_training import checkpoint, start

import move
import move_store
import optimizers
import run_folder
import train_gpt
from move import GPT, GPTConfig, memory_parameter_groups
from move_store import StoredAdamW, StoredBank, borrow, prefetch, stored_banks
from optimizers import make_optimizers

HOMES = ["gpu", "host"]
every_home = pytest.mark.parametrize("home", HOMES)
CONFIG = dict(vocab_size=200, seq_len=12, n_layers=3, n_heads=2, dim=32, n_slots=3)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(train_gpt, "update_curves", lambda folder: None)


def batch(step):
    """(idx, targets) of a step: most ids are rare, and some come back after a long time."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 200 if step % 4 == 0 else 30, (3, 13), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def build(home, dtype=torch.float64, **about):
    """A GPT whose layers are not the identity, and the optimizer of its banks."""
    torch.manual_seed(0)
    bank = functools.partial(StoredBank, home=home, dtype=dtype)
    model = GPT(GPTConfig(**{**CONFIG, **about}), **({} if home is None else dict(bank=bank))).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.w_o.weight, std=0.2, generator=generator)
        torch.nn.init.normal_(block.attention.mixer.router.weight, std=0.2, generator=generator)
    groups = [dict(group, eps=1e-20) for group in memory_parameter_groups(model)[:-1]]  # eps is not exact
    return model, (torch.optim.AdamW(groups) if home is None else StoredAdamW(model, groups))


def train(model, optimizer, steps, fetch_ahead=True):
    """→ losses. The rates change from step to step; there are two micro-batches."""
    losses = []
    for step in steps:
        parts = list(zip(*(t.split((2, 1)) for t in batch(step)), strict=True))
        borrow(model, [idx for idx, _ in parts])
        if fetch_ahead and step % 5:
            prefetch(model, [batch(step + 1)[0]])
        model.zero_grad()
        for idx, targets in parts:
            loss = model(idx, targets) * len(idx) / 3
            loss.backward()
            losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 + step % 7)
        optimizer.step()
    return losses


def rows_now(model):
    """{name: rows (V, M, d) as they are now} of the banks of a model, plain or stored."""
    found = {name: model.get_submodule(name).weight.detach() for name in run_folder.banks_of(model)
             if name not in stored_banks(model)}
    for name, content in move_store.content_to_save(model).items():
        bank = stored_banks(model)[name]
        found[name] = torch.zeros(bank.vocab_size, *content["rows"].shape[2:], dtype=content["rows"].dtype)
        move_store.load_plain(found[name], [(content, 0, 1)], eps=bank.steps.eps)
    return found


@every_home
@pytest.mark.parametrize("about", [
    dict(), dict(n_slots=1), dict(memory="lave"), dict(memory="lave", n_slots=5), dict(attention="mla"),
    dict(attention="mla", memory="lave")])
def test_losses_and_rows_are_those_of_a_plain_bank(home, about):
    (plain, optimizer), (stored, other) = build(None, **about), build(home, **about)
    assert len(stored_banks(stored)) == len(run_folder.banks_of(plain)) > 0
    a, b = train(plain, optimizer, range(30)), train(stored, other, range(30))
    assert np.allclose(a, b, rtol=0, atol=1e-12), np.abs(np.subtract(a, b)).max()
    for name, rows in rows_now(stored).items():
        expected = plain.get_submodule(name).weight
        assert (rows - expected).abs().max() < 1e-6  # gradients of nearly 0 have the sign of rounding


@every_home
def test_float32(home):
    a, b = (train(*build(where, torch.float32), range(20)) for where in (None, home))
    assert np.allclose(a, b, rtol=0, atol=1e-5)


@every_home
def test_bfloat16_rows(home):
    plain, other = build(None, torch.float32)
    model = GPT(plain.config, bank=functools.partial(StoredBank, home=home, dtype=torch.bfloat16))
    bank = model.bank
    assert bank.rows.home.dtype == bank.working_set.weight.dtype == torch.bfloat16
    model.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "bank.weight"}, strict=False)
    optimizer = StoredAdamW(model, memory_parameter_groups(model)[:-1])
    a, b = train(plain, other, range(20)), train(model, optimizer, range(20))
    assert np.allclose(a, b, rtol=0, atol=0.02) and not np.allclose(a, b, rtol=0, atol=1e-7)


def test_adamw_that_waits_is_adamw():
    """Against plain loops in float64: every row moves at every step, with or without a gradient."""
    rng, V, shape = np.random.default_rng(0), 9, (2, 4)
    bank = StoredBank(V, *shape, home="gpu", dtype=torch.float64)
    optimizer = StoredAdamW(torch.nn.ModuleDict(dict(bank=bank)),
                            [dict(params=[bank.working_set.weight], lr=0, betas=(0.8, 0.95), eps=1e-20,
                                  weight_decay=0)])
    p = bank.rows.home[:, 0].numpy().copy()
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t in range(1, 400):
        # ids 0 to 2 come often, 3 and 4 seldom, 5 once, 6 to 8 never
        ids = np.flatnonzero(rng.random(V) < [0.9, 0.5, 0.5, 0.02, 0.01, t == 7, 0, 0, 0])
        lr, g = 0.1 * rng.random(), np.zeros_like(p)
        g[ids] = rng.normal(size=(len(ids), *shape))
        bank.read(ids)
        bank.working_set.weight.grad = torch.zeros_like(bank.working_set.weight)
        bank.working_set.weight.grad[:len(ids)] = torch.from_numpy(g[ids])
        assert np.allclose(bank.working_set.weight.data[:len(ids)].numpy(), p[ids], rtol=0, atol=1e-12)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        p = p - lr * (m / (1 - 0.8 ** t)) / (np.sqrt(v / (1 - 0.95 ** t)) + 1e-20)
    bank.read(np.arange(V))
    assert np.allclose(bank.working_set.weight.data[:V].numpy(), p, rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory", ["move", "lave"])
def test_the_kernels_train_on_a_working_set(memory):
    """In Triton's interpreter, beside the reference on a plain bank."""
    move_fast = pytest.importorskip("move_fast")
    if not move_fast.INTERPRETED:
        pytest.skip("the model is on the CPU")
    losses = []
    for home in (None, "host"):
        model, optimizer = build(home, torch.float32, memory=memory)
        if home:
            assert move_fast.accelerate(model)
        losses.append(train(model, optimizer, range(4)))
    assert np.allclose(*losses, rtol=0, atol=1e-5)


@every_home
def test_gradients_and_rows_of_one_step_stay_there(home):
    """Without zero_grad between steps; with an evaluation, with gradients, between the micro-batches."""
    losses = []
    for where in (None, home):
        model, optimizer = build(where)
        losses.append([])
        for step in range(6):
            idx, targets = batch(step)
            if where is None:
                model.zero_grad()
            borrow(model, [idx])
            for mode, part in ((True, slice(2)), (False, slice(2, 3))):
                loss = model.train(mode)(idx[part], targets[part])
                loss.backward()
                losses[-1].append(loss.item())
            optimizer.step()
    assert np.allclose(*losses, rtol=0, atol=1e-12)


@every_home
def test_training_after_generation(home):
    """Which computes in inference mode, and reads more ids than a step."""
    model, optimizer = build(home)
    plain, other = build(None)
    idx = torch.arange(12).unsqueeze(0) * 16
    for _ in model.eval().generate(idx[:, :4], 4):
        pass
    with torch.inference_mode():
        assert torch.equal(model(idx), plain(idx))
    model.train()
    assert np.allclose(train(model, optimizer, range(5)), train(plain, other, range(5)), rtol=0, atol=1e-12)


def test_betas_that_do_not_fit_are_refused():
    model, optimizer = build("host")
    train(model, optimizer, range(3))
    before = rows_now(model)["bank"]
    groups = [dict(group, eps=1e-20) for group in memory_parameter_groups(model)[:-1]]
    StoredAdamW(model, groups)  # a second one goes on
    assert torch.equal(rows_now(model)["bank"], before)
    for betas in ((0.9, 0.95), (0.99, 0.95)):
        with pytest.raises(ValueError):
            StoredAdamW(model, [dict(group, betas=betas) for group in groups])
    fresh, _ = build("host")
    with pytest.raises(ValueError):
        StoredAdamW(fresh, [dict(group, betas=(0.99, 0.95)) for group in memory_parameter_groups(fresh)[:-1]])


def test_slow_betas():
    """With which rows move long after they were read: beside torch's AdamW on the whole bank."""
    losses = []
    for home in (None, "gpu"):
        model, _ = build(home)
        groups = [dict(group, eps=1e-20, betas=(0.95, 0.95)) for group in memory_parameter_groups(model)[:-1]]
        losses.append(train(model, torch.optim.AdamW(groups) if home is None else StoredAdamW(model, groups),
                            range(40)))
    assert np.allclose(*losses, rtol=0, atol=1e-12)


def test_weight_decay_is_refused():
    model, _ = build("host")
    groups = [dict(group, weight_decay=0.1) for group in memory_parameter_groups(model)[:-1]]
    with pytest.raises(ValueError):
        StoredAdamW(model, groups)


@every_home
def test_an_id_that_was_not_read_is_an_error(home):
    """And one out of range, also below 0: never another id's row."""
    bank = StoredBank(10, 2, 4, home=home)
    for ids, wrong in itertools.product(([], [3], [1, 3, 7]), ([0], [3, 2], [-1], [-10], [10], [99])):
        bank.read(np.array(ids, dtype=np.int64))
        with pytest.raises(IndexError):
            bank(torch.tensor([wrong]))
    bank.read(np.array([1, 3, 7]))
    assert torch.equal(bank(torch.tensor([[7, 1, 7]]))[0], bank.rows.home[[7, 1, 7], 0])
    bank.read(np.array([2]))
    with pytest.raises(IndexError):
        bank(torch.tensor([[7]]))  # it was read before, not now
    new = StoredBank(10, 2, 4, home=home)  # without any read yet
    for call in (lambda: new(torch.tensor([[0]])), lambda: new.update(0.1)):
        with pytest.raises(RuntimeError):
            call()


def one_bank(home, **about):
    """A StoredBank of 100 ids, and step(ids), which trains these rows."""
    torch.manual_seed(0)
    bank = StoredBank(100, 1, 4, home=home, **about)
    module = torch.nn.ModuleDict(dict(bank=bank))
    optimizer = StoredAdamW(module, [dict(params=[bank.working_set.weight], lr=0.1, betas=(0.8, 0.95),
                                          eps=1e-10, weight_decay=0)])

    def step(ids):
        bank.read(np.array(ids))
        bank.working_set.weight.grad = torch.ones_like(bank.working_set.weight)
        optimizer.step()

    return bank, step, lambda: copy.deepcopy(move_store.content_to_save(module)["bank"])


def rows_of(bank, ids):
    bank.read(np.array(ids))
    return bank.working_set.weight.data[:len(ids)].clone()


@every_home
def test_a_bank_that_was_used_can_be_loaded(home):
    bank, step, content = one_bank(home)
    step([1, 2, 3])
    saved, expected = content(), rows_of(bank, [1, 2, 3])
    step([1, 2, 3])
    move_store.load_stored(bank, [(saved, 0, 1)])
    with pytest.raises(RuntimeError):
        bank(torch.tensor([[1]]))  # nothing is borrowed
    assert torch.equal(rows_of(bank, [1, 2, 3]), expected)
    narrow, _, _ = one_bank(home, dtype=torch.bfloat16)
    move_store.load_stored(narrow, [(saved, 0, 1)])
    assert torch.allclose(rows_of(narrow, [1, 2, 3]).float(), expected, rtol=0.02)


@every_home
def test_what_was_borrowed_before_a_step_is_not_read_after_it(home):
    bank, step, _ = one_bank(home)
    step([1, 2, 3])
    for call in (lambda: bank(torch.tensor([[1]])), lambda: bank.update(0.1)):
        with pytest.raises(RuntimeError):
            call()


def test_an_id_out_of_range_changes_nothing():
    bank, _, _ = one_bank("host")
    start = bank.rows.home[:, 0].clone()
    with torch.no_grad():
        bank.eval()(torch.tensor([[1, 2, 3]]))
        for wrong in ([[-1, 2]], [[2, 100]]):
            with pytest.raises(IndexError):
                bank(torch.tensor(wrong))
        for ids in ([4, 5, 6], [7, 8, 1], [99, 0, 3]):
            assert torch.equal(bank(torch.tensor([ids]))[0], start[ids])


def test_a_read_that_ends_early_leaves_no_other_rows(monkeypatch):
    bank, step, content = one_bank("host")
    step(range(5))
    saved = content()["rows"]
    with monkeypatch.context() as patch:  # no memory for more seats
        patch.setattr(torch.Tensor, "new_empty", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            bank.read(np.arange(50))
    assert torch.equal(content()["rows"], saved)
    bank.read(np.arange(5))
    with monkeypatch.context() as patch:  # Ctrl-C when the rows are there, and `place` is not
        patch.setattr(torch.Tensor, "fill_", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bank.read(np.arange(50, 55))
    with pytest.raises(RuntimeError):
        bank(torch.tensor([[0]]))


@pytest.mark.parametrize("calls", [1, 2])
def test_a_copy_that_is_interrupted_leaves_no_other_rows(calls, monkeypatch):
    """A signal that comes while rows go is handled when they are gone."""
    bank, _, _ = one_bank("host")
    start, copy_rows, done = bank.rows.home[:, 0].clone(), move_store.copy_rows, []
    bank.read(np.arange(6))
    bank.read(np.arange(6, 12))

    def copy_and_stop(*about):
        copy_rows(*about)
        done.append(1)
        if len(done) == calls:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(move_store, "copy_rows", copy_and_stop)
        with pytest.raises(KeyboardInterrupt):
            bank.read(np.arange(20, 26))
    for ids in (range(6), range(6, 12), range(20, 26)):
        assert torch.equal(rows_of(bank, ids), start[list(ids)])
    assert torch.equal(bank.rows.flush()[:, 0], start)


@every_home
def test_a_gradient_that_waits_is_not_lost(home):
    """By sampling before the optimizer's step, for example."""
    model, optimizer = build(home)
    idx, targets = batch(0)
    borrow(model, [idx])
    model(idx, targets).backward()
    with torch.no_grad(), pytest.raises(RuntimeError):
        model.eval()(idx[:1, :3])
    optimizer.step()
    with torch.no_grad():
        model(idx[:1, :3])


def test_what_a_store_refuses():
    model, _ = build("host")
    with pytest.raises(ValueError):
        StoredAdamW(model, memory_parameter_groups(model))  # with the routers
    with pytest.raises(ValueError):
        StoredBank(10, 2, 4, home="cpu")


def test_the_example_in_the_documents():
    """Its bank and its routers learn, on a CPU; batches have different numbers of ids."""
    page = (HERE / "docs" / "scale.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, flags=re.S)[1]
    for old, new in {"torch.bfloat16": "torch.float32", '"cuda"': '"cpu"', ".cuda()": ""}.items():
        assert old in code
        code = code.replace(old, new)
    imports, (bank,), (steps,) = (code.split("class ")[0], re.findall("self.bank = (.*)", code),
                                  re.findall(r"^model = .*", code, flags=re.M | re.S))
    ids = [torch.randint(0, n, (2, 12), generator=torch.Generator().manual_seed(n)) for n in (5, 40, 190) * 3]
    losses, names = [], dict(vocab_size=200, dim=64, batches=[(idx, idx) for idx in ids])
    exec(imports, names)

    def my_model(vocab_size, dim):
        model = build(None, torch.float32, dim=64, n_slots=4)[0]
        model.bank = eval(bank, names)
        for block in model.blocks:
            torch.nn.init.zeros_(block.attention.mixer.router.weight)
        model.register_forward_hook(lambda model, inputs, loss: losses.append(loss.item()))
        return model

    names["MyModel"] = my_model
    exec(steps, names)
    model = names["model"]
    assert losses[-1] < losses[2] and len(model.bank.rows.last.nonzero()) == len(torch.cat(ids).unique())
    assert all(block.attention.mixer.router.weight.any() for block in model.blocks)


@every_home
def test_a_bank_in_eval_mode_reads_by_itself(home):
    """So that it generates what the plain bank does."""
    models = []
    for where in (None, home):
        model, optimizer = build(where)
        train(model, optimizer, range(5))
        models.append(model.eval())
    texts = [torch.stack(list(model.generate(torch.tensor([[5, 150], [7, 9]]), 8, temperature=0)))
             for model in models]
    assert torch.equal(*texts)


def test_only_rows_that_are_needed_move():
    """Those that are not on the device yet come, and those make room that were not used for longest."""
    bank = StoredBank(1000, 2, 4, home="host")
    rows = bank.rows
    start = rows.home[:, 0].clone()

    def moved(*ids):
        before = rows.moved
        bank.read(np.unique(ids))
        expected = start[np.unique(ids)]
        assert torch.equal(bank.working_set.weight.data[:len(expected)], expected)
        return rows.moved - before

    assert moved(*range(100)) == 100
    seats = len(rows.row_in)
    assert 100 <= seats < 250
    assert moved(*range(100)) == 0 and moved(*range(50)) == 0
    new = seats - 100  # there is room for these
    assert moved(*range(500, 500 + new)) == new
    assert moved(*range(50)) == 0
    assert moved(700, 701, 702) == 6  # three came and three went, of those that were not used for longest
    assert moved(*range(50)) == 0 and moved(*range(500, 500 + new)) == 0
    assert moved(*range(50, 100)) == 3 + 3
    before = rows.moved
    bank.prefetch(np.arange(800, 820))
    assert rows.moved == before + 40 and moved(*range(800, 820)) == 0
    assert moved(*range(50, 100)) == 0  # they were in use when the others came
    bank.prefetch(np.arange(0, 900))  # comes as far as there is room
    assert moved(*range(50, 100)) == 0 and moved(*range(400)) > 0
    assert moved(*range(900)) > 800 and len(rows.row_in) >= 900  # more seats


@every_home
def test_a_working_set_that_grows(home):
    """Also where the loss of the step before is still there."""
    model, optimizer = build(home, torch.float32)
    for n in (8, 80, 200):
        idx = torch.arange(n).view(-1, 8)
        borrow(model, [idx])
        loss = model(idx, idx)
        loss.backward()
        optimizer.step()
    assert len(model.bank.working_set.weight) == 200


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to wait for")
@every_home
def test_a_step_does_not_wait_for_the_gpu(home):
    model = GPT(GPTConfig(vocab_size=200, seq_len=8, n_layers=2, n_heads=2, dim=32, n_slots=2),
                bank=functools.partial(StoredBank, home=home, device="cuda")).cuda()
    optimizer = StoredAdamW(model, memory_parameter_groups(model)[:-1])
    for step in range(4):
        idx = torch.arange(8 * step, 8 * step + 8).view(1, 8)
        on_gpu = idx.pin_memory().cuda(non_blocking=True)
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            borrow(model, [idx])
            prefetch(model, [idx + 8])
            model.zero_grad()
            model(on_gpu, on_gpu).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_device_holds_no_more_for_more_ids():
    """Its memory follows from the ids of a step, not from those of the vocabulary."""
    sizes = []
    for vocab_size in (1000, 100_000):
        bank = StoredBank(vocab_size, 2, 4, home="host")
        bank.read(np.arange(0, 500))
        sizes.append([len(t) for t in (bank.working_set.weight, *bank.rows.near)])
    assert sizes[0] == sizes[1] and max(sizes[0]) < 800


def test_the_start_is_that_of_a_plain_bank(monkeypatch):
    """Also if it is drawn in pieces."""
    monkeypatch.setattr(move_store, "CHUNK", 700)
    for about in (dict(), dict(memory="lave", n_slots=4)):
        plain, stored = (build(home, torch.float32, **about)[0] for home in (None, "host"))
        for name, rows in rows_now(stored).items():
            assert torch.equal(rows, plain.get_submodule(name).weight)
        others = {k: v for k, v in plain.state_dict().items() if k not in
                  {f"{name}.weight" for name in run_folder.banks_of(plain)}}
        assert all(torch.equal(v, stored.state_dict()[k]) for k, v in others.items())


def test_the_start_is_the_same_with_any_number_of_processes(monkeypatch):
    """Also where a piece is no multiple of it."""
    monkeypatch.setattr(move_store, "CHUNK", 5 * 8)  # five rows
    starts = []
    for n in (1, 2, 3):
        start = torch.zeros(23, 2, 4)
        for rank in range(n):
            monkeypatch.setattr(move_store, "processes", lambda rank=rank, n=n: (rank, n))
            torch.manual_seed(0)
            start[rank::n] = StoredBank(23, 2, 4, home="host").rows.home[:, 0]
        starts.append(start)
    assert starts[0].std() > 0.1 and all(torch.equal(starts[0], start) for start in starts[1:])


def test_pieces_change_nothing(monkeypatch):
    whole = train(*build("host"), range(12))
    monkeypatch.setattr(move_store, "CHUNK", 300)  # three rows
    assert np.allclose(whole, train(*build("host"), range(12)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory", ["move", "lave"])
def test_the_optimizers_of_a_stored_bank(memory):
    """Each parameter is in one group of one optimizer; the rates of the banks are those of plain ones."""
    def params_of(group):
        return [bank.working_set.weight for bank in group["banks"]] if "banks" in group else group["params"]

    rates = []
    for home in (None, "host"):
        model, _ = build(home, torch.float32, memory=memory)
        optimizers = make_optimizers(model)
        held = [p for optimizer in optimizers for group in optimizer.param_groups for p in params_of(group)]
        assert len(held) == len(set(held)) and set(held) == set(model.parameters())
        banks = {m.weight for name, m in model.named_modules() if hasattr(m, "std") and hasattr(m, "weight")
                 and not hasattr(m, "in_features")}
        rates.append(sorted(group["peak_lr"] for optimizer in optimizers for group in optimizer.param_groups
                            if banks.intersection(params_of(group))))
    assert rates[0] == rates[1]


# ------------------------------------------------------------------------------------ many processes

MANY = """
import os
import sys
sys.path[:0] = [{here!r}, {here!r} + "/tests"]
import functools
import numpy as np
import torch
import torch.distributed as dist
from move import GPT, GPTConfig, memory_parameter_groups
from move_store import StoredAdamW, StoredBank, borrow, prefetch, stored_banks

def batch(step):
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 7, (3, 9), generator=g)
    ids[0] += 0 if step % 3 else 20          # now and then no id is in two sequences
    ids[1] += 7 if step % 3 else 40
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

def train(home):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size={vocab_size}, seq_len=8, n_layers=2, n_heads=2, dim=16, n_slots=3,
                       memory={memory!r})
    model = GPT(config, **(dict() if home is None else dict(bank=functools.partial(StoredBank, home=home))))
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.w_o.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    groups = memory_parameter_groups(model)[:-1]
    optimizer = torch.optim.AdamW(groups) if home is None else StoredAdamW(model, groups)
    rank, n = (0, 1) if home is None else (dist.get_rank(), dist.get_world_size())
    losses, shares = [], []

    def mine(step):
        idx, targets = (t[rank::n] for t in batch(step))
        if step == 11 and n > 1 and rank == 1:
            idx, targets = idx[:0], targets[:0]        # this process has nothing to do
        if step == 11 and n == 1:                      # what the others do then
            keep = [i for i in range(3) if {n} == 1 or i % {n} != 1]
            idx, targets = idx[keep], targets[keep]
        return idx, targets

    for bank in stored_banks(model).values():
        bank.share = lambda ids, share=bank.share: shares.append(1) or share(ids)
    for step in range(20):
        idx, targets = mine(step)
        if step == 5:                                  # an evaluation: what is prefetched is not lost
            borrow(model, [batch(100)[0]])
        borrow(model, [idx] if len(idx) else [])
        if step < 19:
            following = mine(step + 1)[0]
            prefetch(model, [following] if len(following) else [])
        model.zero_grad()
        loss = model(idx, targets) * len(idx) / 3 if len(idx) else torch.zeros((), requires_grad=True)
        loss.backward()
        total = loss.detach().clone()
        if n > 1:
            dist.all_reduce(total)
        losses.append(total.item())
        optimizer.step()
    assert len(shares) == 21 * len(stored_banks(model))  # once for each step and for the evaluation
    return losses

dist.init_process_group("gloo")
plain = train(None)
for home in ("gpu", "host"):
    difference = np.abs(np.subtract(train(home), plain)).max()
    assert difference < 1e-5, (home, difference)
print("as one")
sys.stdout.flush()
dist.barrier()
os._exit(0)  # Gloo's threads now and then abort a process that ends otherwise
"""


@pytest.mark.parametrize("n, vocab_size, memory", [(1, 64, "move"), (2, 64, "move"), (3, 64, "move"),
                                                   (3, 64, "lave")])
def test_many_processes_are_as_one(n, vocab_size, memory, tmp_path):
    (tmp_path / "many.py").write_text(MANY.format(here=str(HERE), n=n, vocab_size=vocab_size, memory=memory))
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}",
                             "--standalone", tmp_path / "many.py"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("as one") == n, result.stderr[-3000:]


SHARE = """
import os
import sys
from datetime import timedelta
sys.path[:0] = [{here!r}]
import numpy as np
import torch
import torch.distributed as dist
from move_store import StoredBank
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
for home in ("gpu", "host"):
    bank = StoredBank(2, 1, 4, home=home)              # the third process owns no row
    assert len(bank.rows.home) == (1, 1, 0)[dist.get_rank()]
    bank.read(np.arange(2) if dist.get_rank() else np.arange(0))
    bank.working_set.weight.grad = torch.ones_like(bank.working_set.weight)
    bank.update(0.5)
    bank.read(np.arange(2))
    found = bank.working_set.weight.data[:2]
    torch.manual_seed(0)
    print("row", dist.get_rank(), bank.rows.moved if home == "host" else 0)
    others = [torch.empty_like(found) for _ in range(3)]
    dist.all_gather(others, found.contiguous())
    places = [bank.place.clone() for _ in range(3)]
    dist.all_gather(places, bank.place)
    assert all(torch.equal(o[q], found[bank.place]) for o, q in zip(others, places))
    if not dist.get_rank():  # one process alone evaluates what was borrowed
        with torch.no_grad():
            assert torch.equal(bank.eval()(torch.tensor([[1]]))[0], found[bank.place[1:]])
print("shared")
sys.stdout.flush()
dist.barrier()
os._exit(0)  # Gloo's threads now and then abort a process that ends otherwise
"""


def test_a_process_without_rows(tmp_path):
    (tmp_path / "share.py").write_text(SHARE.format(here=str(HERE)))
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3",
                             "--standalone", tmp_path / "share.py"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("shared") == 3, result.stderr[-3000:]


# ------------------------------------------------------------------------------------------- runs

WHOLE = ("--max_steps", 12, "--eval_every", 6, "--save_every", 4, "--log_every", 1)


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """{home: the folder of a run of 12 steps}"""
    folders = {home: tmp_path_factory.mktemp("out") / home for home in HOMES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "update_curves", lambda folder: None)
        for home, folder in folders.items():
            train_gpt.main(command(data_dir, folder, *WHOLE, "--bank_home", home))
    return folders


def files_of(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


def same_bits(a, b):
    """Whether two checkpoints hold the same, in all their files."""
    def content(folder):
        yield checkpoint(folder)["model"]
        for path in sorted(folder.glob("bank-*.pt")):
            yield from torch.load(path, weights_only=True).values()

    pairs = list(zip(content(a), content(b), strict=True))
    return files_of(a) == files_of(b) and all(torch.equal(x[k], y[k]) for x, y in pairs for k in x)


def logs_agree(a, b, keys=("loss", "val_bits_per_byte"), **tolerance):
    for key in keys:
        x, y = log_of(a, key), log_of(b, key)
        assert list(x) == list(y) and np.allclose(list(x.values()), list(y.values()), **tolerance), key


def test_a_run_with_the_bank_in_host_memory(runs, capsys):
    logs_agree(runs["gpu"], runs["host"], rtol=1e-4)  # Muon rounds to bfloat16
    assert 0 < log_of(runs["host"], "rows_used")[12] <= 1
    assert files_of(runs["host"]) == ["bank-12-0-of-1.pt", "checkpoint.pt"]
    assert "bank.weight" not in checkpoint(runs["host"])["model"]
    texts = []
    for folder, home in itertools.product(runs.values(), HOMES):  # sampled in either place
        capsys.readouterr()
        train_gpt.main(["--prompt", "def ", "--out_dir", str(folder), "--bank_home", home,
                        "--temperature", "0", "--max_new_tokens", "20"])
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1 and len(texts[0]) > 10
    model, _ = train_gpt.load_run(runs["host"])
    assert (model.bank.weight - train_gpt.load_run(runs["gpu"])[0].bank.weight).abs().mean() < 0.01


def test_moments_fade_by_the_betas_of_the_run(data_dir, tmp_path, monkeypatch):
    """In a code whose betas were edited: rows that no batch reads end with the moments of a plain bank."""
    real, found = move.memory_parameter_groups, []

    def edited(*args):
        return [{**group, "betas": (0.5, 0.9)} for group in real(*args)]

    monkeypatch.setattr(optimizers, "memory_parameter_groups", edited)
    for home in HOMES:
        train_gpt.main(command(data_dir, tmp_path / home, "--bank_home", home, "--max_steps", 12))
        model = GPT(GPTConfig(**checkpoint(tmp_path / "gpu")["config"]))
        both = make_optimizers(model)
        run_folder.restore(tmp_path / home, model, both)
        found.append(both[1].state[model.bank.weight])
    for key in ("exp_avg", "exp_avg_sq"):
        a, b = (state[key] for state in found)
        rare = (a.flatten(1).abs().amax(1) > 0) & (a.flatten(1).abs().amax(1) < 1e-3 * a.abs().max())
        assert rare.sum() > 20 and (a[rare] - b[rare]).norm() < 0.05 * a[rare].norm()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_bit_by_bit(how, runs, data_dir, tmp_path):
    out_dir = tmp_path / "run"
    process = start(*command(data_dir, out_dir, *WHOLE, "--bank_home", "host"))
    for line in process.stdout:
        if line.startswith("step 7/12"):
            process.send_signal(how)
            break
    error = process.communicate()[1]
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), error
    train_gpt.main(["--resume", "--out_dir", str(out_dir)])
    logs_agree(out_dir, runs["host"], ("loss", "val_bits_per_byte", "g_0", "rows_used"), rtol=0, atol=0)
    assert same_bits(out_dir, runs["host"])


@pytest.mark.parametrize("first, then", list(itertools.permutations(HOMES)))
def test_a_run_goes_on_in_another_home(first, then, runs, data_dir, tmp_path):
    out_dir = tmp_path / "run"
    train_gpt.main(command(data_dir, out_dir, *WHOLE[2:], "--max_steps", 12, "--bank_home", first))
    for flags in (["--max_steps", "15", "--bank_home", then], ["--max_steps", "18", "--bank_home", first]):
        train_gpt.main(["--resume", "--out_dir", str(out_dir), *flags])
    shutil.copytree(runs[first], tmp_path / "whole")
    for steps in ("15", "18"):
        train_gpt.main(["--resume", "--out_dir", str(tmp_path / "whole"), "--max_steps", steps])
    logs_agree(out_dir, tmp_path / "whole", rtol=1e-4)
    assert log_of(out_dir, "rows_used")[15] < 1


def torchrun(n, *arguments):
    prefix = ["-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone"]
    process = start(*arguments, prefix=prefix)
    output, error = process.communicate(timeout=200)
    return process.returncode, output, error


def test_a_run_by_two_processes_goes_on_with_four_and_with_one(runs, data_dir, tmp_path):
    out_dir = tmp_path / "run"
    flags = (*WHOLE, "--micro_batch", 2, "--bank_home")
    code, output, error = torchrun(2, *command(data_dir, out_dir, *flags, "host"))
    assert code == 0 and output.count("step 12/12  loss") == 1, error
    assert files_of(out_dir) == ["bank-12-0-of-2.pt", "bank-12-1-of-2.pt", "checkpoint.pt"]
    logs_agree(out_dir, runs["gpu"], rtol=1e-4)
    again = ("--resume", "--out_dir", out_dir, "--bank_home", "gpu", "--max_steps")
    code, output, error = torchrun(4, *again, 15)
    assert code == 0 and len(files_of(out_dir)) == 5, error
    train_gpt.main([*map(str, again), "18"])
    assert files_of(out_dir) == ["checkpoint.pt"]
    shutil.copytree(runs["gpu"], tmp_path / "whole")
    for steps in ("15", "18"):
        train_gpt.main(["--resume", "--out_dir", str(tmp_path / "whole"), "--max_steps", steps])
    logs_agree(out_dir, tmp_path / "whole", rtol=1e-3)


def test_checkpoints_that_are_not_whole(runs, tmp_path):
    """A file is missing, damaged, or of another run or step: one line that names it, and nothing changes."""
    def broken(change):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(runs["host"], folder)
        change(folder / "bank-12-0-of-1.pt")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        for flags in (["--resume", "--max_steps", 20], ["--prompt", "def"]):
            fails(train_gpt, [*flags, "--out_dir", folder], "bank-12-0-of-1.pt")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def flip(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def other_run(path):
        content = torch.load(path, weights_only=True)
        content["bank"]["rows"][0, 0, 0, 0] += 1
        torch.save(content, path)

    broken(lambda path: path.unlink())
    broken(lambda path: path.write_bytes(b""))
    broken(lambda path: path.write_bytes(path.read_bytes()[:5000]))
    broken(flip)
    broken(other_run)


def test_a_run_that_trains_on_while_it_is_read(runs, tmp_path, monkeypatch):
    """Between checkpoint.pt and the files of its rows: the new ones are taken."""
    shutil.copytree(runs["host"], tmp_path / "run")
    read_rows = run_folder.read_rows

    def slowly(folder, state):
        if state["step"] == 12:
            monkeypatch.setattr(run_folder, "read_rows", read_rows)
            train_gpt.main(["--resume", "--out_dir", str(folder), "--max_steps", "14"])
        return read_rows(folder, state)

    monkeypatch.setattr(run_folder, "read_rows", slowly)
    model, _ = train_gpt.load_run(tmp_path / "run")
    assert torch.equal(model.bank.weight, train_gpt.load_run(tmp_path / "run")[0].bank.weight)


@pytest.mark.parametrize("change", [
    dict(p=torch.zeros(3, 2, 2)), dict(last=torch.full((512,), 13)), dict(last=torch.full((512,), -1)),
    dict(c=torch.zeros(3)), dict(c=torch.full((13,), float("nan"))), dict(p="text"), dict(q=torch.zeros(3))])
def test_files_that_contradict_their_checkpoint(change, runs, tmp_path):
    """With all checksums right."""
    shutil.copytree(runs["host"], tmp_path / "run")
    path = tmp_path / "run" / "bank-12-0-of-1.pt"
    content = torch.load(path, weights_only=True)
    content["bank"].update(change)
    torch.save(content, path)
    state = checkpoint(tmp_path / "run")
    torch.save(dict(state, rows=[run_folder.checksum(path)]), tmp_path / "run" / "checkpoint.pt")
    fails(train_gpt, ["--resume", "--max_steps", 20, "--out_dir", tmp_path / "run"], "bank-12-0-of-1.pt")


def test_rows_that_are_not_finite(runs, tmp_path):
    shutil.copytree(runs["host"], tmp_path / "run")
    path = tmp_path / "run" / "bank-12-0-of-1.pt"
    content = torch.load(path, weights_only=True)
    content["bank"]["rows"][5, 2, 0, 0] = float("nan")
    torch.save(content, path)
    torch.save(dict(checkpoint(tmp_path / "run"), rows=[run_folder.checksum(path)]),
               tmp_path / "run" / "checkpoint.pt")
    fails(train_gpt, ["--resume", "--max_steps", 20, "--out_dir", tmp_path / "run"], "checkpoint")


@pytest.mark.parametrize("full", ["bank-8-0-of-1.pt", "checkpoint.pt"])
def test_a_disk_that_is_full_keeps_the_checkpoint_before(full, data_dir, tmp_path, monkeypatch):
    """Whichever file does not fit."""
    write_file = run_folder.write_file

    def write(path, writer):
        if path.name == full and (full != "checkpoint.pt" or (path.parent / "bank-8-0-of-1.pt").exists()):
            raise OSError(28, "No space left on device", str(path))
        write_file(path, writer)

    monkeypatch.setattr(run_folder, "write_file", write)
    fails(train_gpt, command(data_dir, tmp_path / "run", *WHOLE, "--bank_home", "host"), full)
    assert checkpoint(tmp_path / "run")["step"] == 4
    monkeypatch.undo()
    monkeypatch.setattr(train_gpt, "update_curves", lambda folder: None)
    train_gpt.main(["--resume", "--out_dir", str(tmp_path / "run")])
    assert files_of(tmp_path / "run") == ["bank-12-0-of-1.pt", "checkpoint.pt"]


def test_a_row_that_is_not_finite_is_not_saved(data_dir, tmp_path, monkeypatch):
    """Also if no token of this step has it."""
    step_on = train_gpt.Training.take_step

    def take_step(training):
        step_on(training)
        if training.step == 6:
            training.model.bank.rows.flush()
            training.model.bank.rows.home[511] = float("nan")

    monkeypatch.setattr(train_gpt.Training, "take_step", take_step)
    fails(train_gpt, command(data_dir, tmp_path / "run", *WHOLE, "--bank_home", "host"), "finite.*checkpoint")
    assert checkpoint(tmp_path / "run")["step"] == 4


def test_a_run_that_ends_before_its_next_step_changes_nothing(runs, tmp_path):
    """Other processes take over, and Ctrl-C comes at once. What an earlier kill left half written goes."""
    out_dir = tmp_path / "run"
    shutil.copytree(runs["host"], out_dir)
    (out_dir / ".bank-12-0-of-1.pt.0123456789abcdef").write_bytes(b"half a file")
    kept = {path.name: path.read_bytes() for path in out_dir.glob("*.pt")}
    script = tmp_path / "script.py"
    script.write_text(f"""import os, signal, sys; sys.path.insert(0, {str(HERE)!r})
import train_gpt
start = train_gpt.Training.__init__
def interrupted(*about):
    start(*about)
    os.kill(os.getpid(), signal.SIGINT)
train_gpt.Training.__init__ = interrupted
train_gpt.run(train_gpt.main)""")
    flags = ["--resume", "--out_dir", out_dir, "--max_steps", 20, "--micro_batch", 2]
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                             "--standalone", script, *map(str, flags)], capture_output=True, text=True)
    assert result.returncode and "--resume" in result.stderr, result.stderr
    assert files_of(out_dir) == sorted(kept)
    assert all((out_dir / name).read_bytes() == content for name, content in kept.items())
    train_gpt.main(["--resume", "--out_dir", str(out_dir), "--max_steps", "13"])
    assert files_of(out_dir) == ["bank-13-0-of-1.pt", "checkpoint.pt"]
    assert not list(out_dir.glob(".*"))  # nor is there anything half written


def test_too_little_memory_to_pin(data_dir, tmp_path, monkeypatch):
    def host_memory(*about):
        raise MemoryError("cannot pin 100 GB of host memory (CUDA error 2)")

    monkeypatch.setattr(move_store, "host_memory", host_memory)
    fails(train_gpt, command(data_dir, tmp_path / "run", "--bank_home", "host"), "pin 100 GB.*--move_scale")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_images(tmp_path, monkeypatch):
    import train_image
    monkeypatch.chdir(tmp_path)
    flags = ["--device", "cpu", "--depth", "2", "--max_steps", "3", "--eval_tokens", "512", "--batch_tokens",
             "512", "--micro_batch", "4", "--log_every", "1", "--eval_every", "3"]
    for home in HOMES:
        train_image.main([*flags, "--bank_home", home, "--out_dir", f"out/{home}"])
        assert (tmp_path / "out" / home / "samples_3.png").exists()
    losses = [[json.loads(line) for line in (tmp_path / "out" / home / "log.jsonl").read_text().splitlines()]
              for home in HOMES]
    a, b = ([record["loss"] for record in log if "loss" in record] for log in losses)
    assert len(a) == 3 and np.allclose(a, b, rtol=1e-5)


def test_the_command_names_its_home(data_dir, tmp_path, capsys):
    fails(train_gpt, command(data_dir, tmp_path / "run", "--bank_home", "disk"), "bank_home")
    train_gpt.main(command(data_dir, tmp_path / "run", "--bank_home", "host", "--max_steps", 1))
    assert re.search("parameters: .*memory 0.1M", capsys.readouterr().out)


@every_home
def test_a_frozen_bank_is_not_trained(home):
    model, optimizer = build(home)
    model.bank.requires_grad_(False)
    before = model.bank.rows.flush().clone()
    for step in range(2):  # the working set grows
        idx, targets = batch(step)
        borrow(model, [idx])
        model(idx, targets).backward()
        optimizer.step()
    assert torch.equal(model.bank.rows.flush(), before)


@every_home
def test_a_step_without_a_gradient_changes_nothing(home):
    """As AdamW's. (A batch may be skipped.)"""
    (model, optimizer), (plain, adamw) = build(home), build(None)
    for step in range(4):
        idx, targets = batch(step)
        borrow(model, [idx])
        if step != 2:
            model(idx, targets).backward()
            plain(idx, targets).backward()
        optimizer.step()
        adamw.step()
        plain.zero_grad()
    rows = torch.empty_like(plain.bank.weight)
    content = move_store.content_to_save(model)["bank"]
    move_store.load_plain(rows, [(content, 0, 1)], eps=1e-20)
    assert model.bank.steps.t == 3
    torch.testing.assert_close(rows, plain.bank.weight.detach(), rtol=0, atol=1e-6)


@every_home
@pytest.mark.parametrize("fewer", [True, False])
def test_a_backward_pass_whose_rows_were_replaced_raises(home, fewer):
    """Its gradients would be those of other ids; also where the working set has grown meanwhile."""
    model, _ = build(home)
    few, many = torch.tensor([[190, 191, 192]]), torch.arange(180).view(15, 12)
    first, then = (many, few) if fewer else (few, many)
    borrow(model, [first])
    loss = model(first, first)
    borrow(model, [then])
    with pytest.raises(RuntimeError):
        (loss + model(then, then)).backward()


@every_home
def test_rows_go_on_with_the_betas_that_they_had(home):
    bank, step, content = one_bank(home)  # 0.8, 0.95
    step([1, 2, 3])
    saved = content()

    def optimizer_of(bank, betas):
        return StoredAdamW(torch.nn.ModuleDict(dict(bank=bank)), [
            dict(params=[bank.working_set.weight], lr=0.1, betas=betas, eps=1e-10, weight_decay=0)])

    new = StoredBank(100, 1, 4, home=home)
    move_store.load_stored(new, [(saved, 0, 1)])
    with pytest.raises(ValueError):
        optimizer_of(new, (0.9, 0.99))
    optimizer_of(new, (0.8, 0.95))
    other, larger = StoredBank(100, 1, 4, home=home), StoredBank(120, 1, 4, home=home)
    optimizer_of(other, (0.9, 0.99))
    for bank in (other, larger):
        before = bank.rows.flush().clone()
        with pytest.raises(ValueError):
            move_store.load_stored(bank, [(saved, 0, 1)])
        assert torch.equal(bank.rows.flush(), before)
    start = StoredBank(100, 1, 4, home=home)  # whose betas say nothing yet
    optimizer_of(start, (0.7, 0.9))
    move_store.load_stored(other, [(move_store.content_to_save(torch.nn.ModuleDict(dict(bank=start)))["bank"],
                                    0, 1)])
    assert other.steps.betas == (0.9, 0.99) and torch.equal(other.rows.flush(), start.rows.flush())


@every_home
def test_rows_of_a_run_that_skipped_a_batch_can_be_loaded(home):
    bank, step, content = one_bank(home)
    step([1, 2, 3])
    bank.read(np.array([4, 5]))
    bank.working_set.weight.grad = None
    bank.update(0.1)
    step([3, 4])
    new = StoredBank(100, 1, 4, home=home)
    move_store.load_stored(new, [(content(), 0, 1)])
    for ids in ([1, 2, 3, 4], [5, 6]):
        assert torch.equal(rows_of(new, ids), rows_of(bank, ids))
    assert new.steps.t == bank.steps.t == 2


@pytest.mark.parametrize("memory", ["move", "lave"])
def test_a_model_with_stored_banks_is_compiled(memory):
    model, _ = build("host", memory=memory, gate_value=memory == "move")
    idx, targets = batch(0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        borrow(model, [idx])
        loss = compiled(idx, targets)
        loss.backward()
        assert torch.allclose(loss, model(idx, targets))
        model.zero_grad()
    torch._dynamo.reset()


def test_gradients_that_are_zero_do_not_wait():
    model, _ = build("host")
    idx, targets = batch(0)
    borrow(model, [idx])
    model(idx, targets).backward()
    with pytest.raises(RuntimeError):
        borrow(model, [targets])
    model.zero_grad(set_to_none=False)
    borrow(model, [targets])
