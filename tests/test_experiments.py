"""The experiments at toy size, what they measure in cases where it is known, and the benchmarks."""
import argparse
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, fails
from PIL import Image

import benchmarks
import experiments
import lab
import run_folder
import train_gpt
from move import GPT, GPTConfig, Linear, ValueBank, ValueMixer
from optimizers import make_optimizers
from prepare_data import load_dataset
from script import UserError
from train_gpt import bank_use

TOY = dict(depth=2, seeds=1, steps=2, seq_len=32, batch_tokens=64, eval_tokens=64, evaluations=2)


@pytest.fixture
def toy(monkeypatch, data_dir, tmp_path):
    """Arguments of an experiment of a second or two."""
    monkeypatch.setattr(lab, "QUICK", TOY)
    monkeypatch.setattr(train_gpt, "update_curves", lambda folder: None)
    return ["--quick", "--dataset", "small", "--data_dir", str(data_dir), "--out_dir", str(tmp_path / "out"),
            "--device", "cpu"]


def small_model(memory="move", n_slots=2, seed=0, **about):
    torch.manual_seed(seed)
    config = dict(vocab_size=512, seq_len=16, n_layers=3, n_heads=2, dim=16)
    return GPT(GPTConfig(**{**config, "memory": memory, "n_slots": n_slots, **about}))


def awake(model):
    """All its parameters are random, so that nothing is zero by its start."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("experiment, runs", [
    (experiments.parity, 3), (experiments.scaling, 18), (experiments.ablation, 4), (experiments.gate_init, 3),
    (experiments.gradient_highway, 4), (experiments.mla, 5), (experiments.keys, 5), (experiments.late, 6),
    (experiments.rates, 12), (experiments.recipe, 39)])
def test_an_experiment_at_toy_size(experiment, runs, toy, tmp_path, capsys, monkeypatch):
    if experiment is experiments.scaling:
        toy = [*toy, "--seeds", "2", "--depth", "2"]  # no memory, and M = 1, 2, 4, 8 of each kind, twice
    if experiment is experiments.rates:
        monkeypatch.setattr(experiments, "sizes_for", lambda depth: [1, 2])  # at three rates, of each kind
        monkeypatch.setattr(experiments, "FACTORS", dict(bank=[2], routers=[0.5]))
    experiments.main([experiment.__name__, *toy])
    name = f"{experiment.__name__}-small{'-d2' * ('--depth' in toy)}-quick"
    report = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert report["table"] and report["sentences"] and all(report["sentences"])
    for row in report["table"]:
        values = [v for key, v in row.items() if key in ("bits per byte", "as it is") or "×" in key]
        assert len(values) == (3 if experiment is experiments.rates else 1)
        assert all(2 < float(value.split()[0]) < 8 for value in values)
    trained = [path for path in (tmp_path / "out" / "runs").iterdir() if path.is_dir()]
    assert len(trained) == runs
    kept = list((tmp_path / "out").glob("runs/*/checkpoint.pt"))
    assert len(kept) == (2 if experiment is experiments.late else 0)
    chart = tmp_path / "out" / f"{name}.png"
    assert chart.exists() == (experiment is not experiments.recipe)
    if chart.exists():
        with Image.open(chart) as image:
            assert image.width > 400 and os.path.getsize(chart) < 150_000
    if experiment is experiments.late:  # each goes on where the first half ended
        bits = {path.parent.name: [json.loads(line)["val_bits_per_byte"] for line in path.open()
                                   if "val_bits_per_byte" in line] for path in
                (tmp_path / "out").glob("runs/*/log.jsonl")}
        for then in (then for then in bits if "late" in then):
            start = "move" if "it_had" in then else "none"
            before, = (bits[other][-1] for other in bits if f"{start}-m{int(start == 'move')}-begun" in other)
            assert bits[then][0] == pytest.approx(before, rel=1e-6)
    monkeypatch.setattr(train_gpt, "train", None)  # nothing is trained again
    experiments.main([experiment.__name__, *toy])
    assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["table"] == report["table"]


@pytest.fixture
def reported(toy, monkeypatch):
    """(experiment, result of a run, flags) → table, sentences and panels of its report, without training."""
    def report(experiment, result_of, *flags):
        content = []
        with monkeypatch.context() as patch:
            patch.setattr(lab.Lab, "train", lambda self, methods: {
                label: [about(**result_of(run)) for run in runs] for label, runs in methods.items()})
            patch.setattr(lab.Lab, "write", lambda self, table, sentences, panels=(): content.extend(
                (table, sentences, panels)))
            experiments.main([experiment.__name__, *toy, *map(str, flags)])
        return content

    def about(bits=1.0, **others):
        curve = dict(steps=[0, 1, 2, 3, 4, 5, 6, 7, 8], bits=[9, 8, 7, 6, 5, 4, 3, 2, 1], seconds=range(9))
        return dict(bits=bits, curve=curve, tokens_per_s=1.0, look=None, rows_used=[0.5] * 9) | others

    return report


def test_a_report_of_switches_and_of_keys_has_each_result_in_its_place(reported):
    def result_of(run):
        move = run.flags["memory"] == "move"
        return dict(bits=1 + 2 * move + run.flags.get("gate_value", move))

    table, _, (panel,) = reported(experiments.ablation, result_of)
    assert {(row["memory"], row["g_0"]): float(row["bits per byte"].split()[0]) for row in table} == {
        ("tables of layers", "1"): 1, ("tables of layers", "gated"): 2,
        ("one bank", "1"): 3, ("one bank", "gated"): 4}
    assert {name: line[:2] for name, line in panel["lines"].items()} == {
        "tables of layers": ([0, 1], [1, 2]), "one bank": ([0, 1], [3, 4])}

    def keys_of(run):
        """1 bit where the last id alone finds the row, 2 where the last two do."""
        model = small_model(n_slots=round(run.flags["move_scale"]) or 1)
        if run.change:
            run.change(model)
        rows = model.bank(torch.tensor([[3, 7, 5, 7]]))[0]
        return dict(bits=1 if torch.equal(rows[1], rows[3]) else 2)

    table, *_ = reported(experiments.keys, keys_of)
    assert {row["rows found by"]: float(row["bits per byte"].split()[0]) for row in table} == {
        "none": 1, "last id, M = 1": 1, "last id, M = 4": 1,
        "last two ids, M = 1": 2, "last two ids, M = 4": 2}


def test_a_report_of_starts_has_each_in_its_place(reported):
    """The gates of a new model say which start it has."""
    def result_of(run):
        model = small_model()
        run.change(model)
        mixer = model.blocks[0].attention.mixer
        g = mixer.gates(torch.zeros(1, 1, 16))[0, 0, 0]
        return dict(g_0=[[g[0].item()] * 2] * 9, g_i=[[g[1].item()] * 2] * 9)

    table, _, panels = reported(experiments.gate_init, result_of)
    found = {row["start"]: (float(row["g_0 in the end"]), float(row["g_i in the end"])) for row in table}
    assert found == dict(neutral=(1, 1), memory=(0.24, 1.76), context=(1.76, 0.24))
    for panel, gate in zip(panels, (0, 1), strict=True):
        assert {name: round(float(y[-1]), 2) for name, (_, y) in panel["lines"].items()} == {
            name: pair[gate] for name, pair in found.items()}


def test_a_report_of_gradients_has_each_layer_in_its_place(reported):
    """At depth 4 the tables of LaVE-×1 are those of the second layer and the last."""
    def result_of(run):
        layers = [i + 1 for i, block in enumerate(small_model(run.flags["memory"], n_layers=4).blocks)
                  if block.attention.mixer]
        return dict(look=dict(norms=[10.0 * layer for layer in layers]) if run.look else None)

    table, _, panels = reported(experiments.gradient_highway, result_of, "--depth", 4)
    lines = {label: (list(x), list(y)) for label, (x, y) in panels[0]["lines"].items()}
    assert lines == {"LaVE-×1": ([2, 4], [20, 40]), "MoVE-×1": ([1, 2, 3, 4], [10, 20, 30, 40])}
    assert {float(row["at a quarter of the run"]) for row in table} == {7}


def test_a_report_of_the_recipe_compares_each_model_at_its_own_best_rates(reported, monkeypatch):
    """The best factor on the rate of the head is 2 without memory, 1 with MoVE, ½ with LaVE; all else is best
    as it is."""
    best, worth = dict(none=2, move=1, lave=0.5), dict(none=5, move=2, lave=1)
    costs = dict(head=1, embedding=0.25, matrices=0.125)  # bits for a factor of 2 away from the best

    def bits(memory, **factors):
        away = {**dict.fromkeys(costs, 1.0), **factors}
        away["head"] /= best[memory]
        return worth[memory] + sum(cost * abs(math.log2(away[part])) for part, cost in costs.items())

    def result_of(run):
        memory = run.flags["memory"]
        model = small_model(memory)
        usual, taken = ({p: group["lr"] for optimizer in make(model, 1.0) for group in optimizer.param_groups
                         for p in group["params"]} for make in (make_optimizers, run.optimizers_of))
        matrix = next(m.weight for m in model.blocks.modules() if isinstance(m, Linear))
        parts = dict(head=model.head.weight, embedding=model.embedding.weight, matrices=matrix)
        factors = {part: taken[p] / usual[p] for part, p in parts.items()}
        look = run.look and dict(mean=0.1, mean_of_id=0.2, slot_cosine=0.3)
        return dict(bits=bits(memory, **factors) + 10 * (run.flags["move_scale"] > 1), look=look)

    monkeypatch.setattr(experiments, "compare", lambda label, results, other, others: (
        label.split()[-1], lab.mean(results), other, lab.mean(others)))
    table, sentences, _ = reported(experiments.recipe, result_of)
    assert len({(row["memory"], row["M"], row["change"]) for row in table}) == 39
    columns = ("carried by gates", "by gates within an id", "cosine of two slots")
    assert {row["change"]: tuple(row[c] for c in columns) for row in table if row[columns[0]]} == {
        label: ("0.1000", "0.2000", "0.3000") for label in ("as it is", "routers by AdamW")}
    found = {(row["memory"], row["change"]): float(row["bits per byte"].split()[0]) for row in table
             if "rate of" in row["change"]}
    assert found == {(memory, f"rate of the {part} × {factor:g}"): bits(memory, **{part: factor})
                     for memory in best for part in costs for factor in (0.5, 2)}
    assert sentences[-3:] == [("move", 2, "none", 5), ("lave", 1, "none", 5), ("move", 2, "lave", 1)]


def test_a_logarithmic_axis_shortens_thousands_and_millions_and_no_fractions(tmp_path, monkeypatch):
    seen = []

    class Seen(lab.Figure):
        def savefig(self, *args, **options):
            super().savefig(*args, **options)
            seen.extend(label.get_text() for label in self.axes[0].get_xticklabels())

    monkeypatch.setattr(lab, "Figure", Seen)
    lines = {"memory": ([0.5, 1, 2000, 5e6], [1, 2, 3, 4])}
    lab.draw([dict(lines=lines, xscale="log")], tmp_path / "chart.png")
    assert {"0.2", "0.5", "1", "20", "2k", "5M"} <= set(seen)


@pytest.mark.parametrize("bits, few", [
    ([1.0] * 5, None), ([1.0, 0.9, 0.9, 0.9, 0.9], 2), ([1.0, 0.9, 0.8, 0.7, 0.6], 16),
    ([1.0, 1.1, 0.5, 0.4, 0.3], None)])
def test_where_more_slots_stop_to_help(bits, few, reported):
    """The largest M up to which each step helps; and the axis of the tokens that a row has seen."""
    def result_of(run):
        n_slots = round(run.flags["move_scale"] * 2)
        return dict(bits=bits[[1, 2, 4, 8, 16].index(n_slots)] if n_slots else 2.0)

    table, sentences, panels = reported(experiments.scaling, result_of, "--depth", 4, "--seeds", 3)
    said = [re.findall(r"M = (\d+)", sentence) for sentence in sentences]
    assert said == [["16", "1"], [str(few)] if few else []] * 2
    for x, y in panels[1]["lines"].values():
        assert list(x) == [step * TOY["batch_tokens"] / 512 for step in range(1, 9)] and not np.any(y)


def test_a_report_of_the_latent_has_its_cache(reported):
    """c_S and the rotary key, of 64 numbers each, in two layers, in bfloat16."""
    table, *_ = reported(experiments.mla, lambda run: {})
    assert [row["cache, bytes a token"] for row in table] == [(64 + 64) * 2 * 2] * 5


def test_the_result_of_a_run_is_that_of_its_log(toy, data_dir, tmp_path):
    """The last evaluation, not the best; seconds from the median speed."""
    run, folder = one_run(data_dir, tmp_path, steps=8)
    (folder / run.name).mkdir()
    bits, speeds = (3.0, 1.0, 2.0), (1000.0, 10.0, 20.0)
    lines = [dict(step=step, val_bits_per_byte=b, tokens_per_s=s)
             for step, b, s in zip((0, 4, 8), bits, speeds, strict=True)]
    (folder / run.name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"{run.name}.json").write_text("settings\nmachine\nnull\n")
    found = lab.result(run, folder)
    assert found["bits"] == 2 and found["tokens_per_s"] == 20
    assert found["curve"]["seconds"] == [0, 4 * 64 / 20, 8 * 64 / 20]
    for against, x in (("steps", [4, 8]), ("seconds", [4 * 64 / 20, 8 * 64 / 20])):
        assert [list(line) for line in lab.mean_curve([found, found], against)] == [x, [1, 2]]


def test_gates_of_senses_and_of_a_text(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "read_senses", lambda path: [
        ("self", sense, f"one two three four five six seven {i} self") for sense in "ab" for i in range(2)])
    experiments.main(["gates", *toy])
    report = json.loads((tmp_path / "out" / "gates-small-quick.json").read_text())
    assert {row["layer"] for row in report["table"]} == {1, 2} and len(report["table"]) == 10
    assert (tmp_path / "out" / "gates-small-quick.png").exists()
    run, = (tmp_path / "out" / "runs").glob("*/checkpoint.pt")
    (tmp_path / "a.txt").write_text("def f(self): <b>")
    experiments.main(["gates", "--run", str(run.parent), "--text", str(tmp_path / "a.txt"), "--out_dir",
                      str(tmp_path / "out")])
    assert "&lt;" in (tmp_path / "out" / "gates.html").read_text()
    fails(experiments, ["gates", "--run", tmp_path, "--text", "x"], "checkpoint.pt")
    for flag in (["--quick"], ["--steps", 3], ["--device", "cpu"]):
        fails(experiments, ["gates", "--run", run.parent, "--text", "x", *flag], flag[0])
    monkeypatch.setattr(experiments, "read_senses", lambda path: [
        ("the", sense, f"{'one two three four ' * 3}{end} the") for sense in "ab" for end in ("x", "y")])
    experiments.main(["gates", "--run", str(run.parent), "--out_dir", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("gates-*.png"))) == 2
    zero = np.zeros((1, 1))
    monkeypatch.setattr(experiments, "sense_distances", lambda *_: dict(
        words=["self", "the", "of"], dropped=[], lengths=np.array([1]), layers=np.array([1]), between=zero,
        within=zero, error=zero, ratio=np.array([0.9, np.nan, 2.25])))
    experiments.main(["gates", *toy])
    report = json.loads((tmp_path / "out" / "gates-small-quick.json").read_text())
    last = report["sentences"][-1]
    assert last.index("of +125 %") < last.index("self -10 %") < last.index("the ") and "nan" not in last


def test_a_series_that_was_cut_goes_on(toy, tmp_path, monkeypatch, capsys):
    """A run that failed is named, with what to do; the others are kept, and it starts anew."""
    real = train_gpt.train

    def train(args, *others, **options):
        if args.memory == "lave":
            raise UserError("no more power")
        return real(args, *others, **options)

    monkeypatch.setattr(train_gpt, "train", train)
    fails(experiments, ["parity", *toy], "1 runs failed.*lave.*no more power")
    monkeypatch.setattr(train_gpt, "train", lambda args, *others, **options: real(args, *others, **options)
                        if args.memory == "lave" else pytest.fail("trained twice"))
    experiments.main(["parity", *toy])
    for flag, value in [("--steps", 0), ("--seeds", -1), ("--depth", 0), ("--depth", 1001),
                        ("--dataset", "nothing"), ("--dataset", "../small")]:
        fails(experiments, ["parity", *toy, flag, value], "nothing" if value == "nothing" else flag)
    if not torch.cuda.is_available():
        fails(experiments, ["parity", *toy, "--device", "cuda"], "--device cuda")
    (tmp_path / "file").write_text("mine")
    fails(experiments, ["parity", *toy, "--out_dir", tmp_path / "file"], "file")


def test_runs_on_several_gpus(toy, tmp_path):
    """Two processes train what one would, here on the CPU."""
    args = argparse.Namespace(quick=True, dataset="small", data_dir=Path(toy[4]), out_dir=tmp_path,
                              device="cpu", depth=1, seeds=2, steps=1)
    pool = lab.Lab(args, "pool")
    runs = pool.runs("move", 1)
    (tmp_path / "both").mkdir(), (tmp_path / "one").mkdir()
    assert sorted((run.name, error) for run, error in pool.finished(runs, tmp_path / "both", 2)) \
        == [(run.name, None) for run in runs]
    for run in runs:
        assert lab.train_run(run, tmp_path / "one") is None
        a, b = (lab.result(run, tmp_path / name) for name in ("both", "one"))
        assert a["bits"] == b["bits"]
    assert a["bits"] != lab.result(runs[0], tmp_path / "one")["bits"]  # another seed


def test_runs_of_several_machines_are_not_compared_by_their_speed(toy, tmp_path, capsys):
    experiments.main(["parity", *toy])
    report, = (tmp_path / "out").glob("parity-*.json")
    width = Image.open(report.with_suffix(".png")).width
    machines, = {tuple(json.loads(report.read_text())["machines"])}
    assert machines == (f"CPU, PyTorch {torch.__version__}",)
    path = next((tmp_path / "out/runs").glob("*lave*.json"))
    path.write_text(path.read_text().split("\n")[0] + "\nAnother GPU, PyTorch 9\nnull\n")
    capsys.readouterr()
    experiments.main(["parity", *toy])
    assert " 0 to do" in (output := capsys.readouterr().out) and "Another GPU" in output
    assert len(json.loads(report.read_text())["machines"]) == 2
    assert Image.open(report.with_suffix(".png")).width == width / 2  # against steps only


def test_mean_spread_and_comparison():
    a, b, c = ([dict(bits=x) for x in xs] for xs in ((1.0, 1.2), (2.0, 2.2), (1.1,)))
    assert lab.spread(a) == "1.1000 ± 0.1414 (2)" and lab.spread(c) == "1.1000 (1)"
    assert lab.noise(a) == pytest.approx(0.02 ** 0.5) and lab.noise(c) == 0
    assert lab.differ(b, a) == pytest.approx(1) and lab.differ(a, b) == pytest.approx(-1)
    assert lab.differ(a, [dict(bits=1.0), dict(bits=1.1)]) == 0
    assert lab.differ(a, c) == lab.differ(c, [dict(bits=9.0)]) == 0  # one seed cannot tell
    seeds = np.random.default_rng(0).normal(size=3)  # what a seed does is alike in both methods
    paired = [[dict(bits=x + d) for x, d in zip(seeds, shift, strict=True)] for shift in
              ((0, 0, 0), (0.10, 0.11, 0.09))]
    eight = [dict(bits=bits) for bits in (0, 2) * 4]
    assert lab.differences(eight, [dict(bits=1)] * 8)[1] == pytest.approx(2.365 / 7 ** 0.5, rel=0.01)
    mean, half = lab.differences(paired[1], paired[0])
    assert mean == pytest.approx(0.1) and half == pytest.approx(4.30 * 0.01 / 3 ** 0.5, rel=1e-6)
    assert lab.differ(*paired) == pytest.approx(-0.1)
    same = lab.compare("a", a, "b", [dict(bits=r["bits"] + 1e-5) for r in a])
    assert "better" not in same and "worse" not in same and "0.0000 b" not in same
    assert "better" in lab.compare("a", a, "b", b) and "worse" in lab.compare("b", b, "a", a)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_seeds_alone_seldom_make_a_difference(n):
    rng = np.random.default_rng(0)
    wrong = [lab.differ(*([dict(bits=x) for x in rng.normal(size=n)] for _ in range(2))) != 0
             for _ in range(2000)]
    assert np.mean(wrong) < 0.06


def test_results_of_another_data_set_are_not_taken(toy, data_dir, tmp_path, monkeypatch):
    """Nor those of other flags, or of another recipe."""
    args = argparse.Namespace(quick=True, dataset="small", data_dir=data_dir, out_dir=tmp_path, device="cpu",
                              depth=1, seeds=1, steps=1)
    run, = lab.Lab(args, "x").runs("none")
    (tmp_path / "runs").mkdir()
    assert not lab.is_done(run, tmp_path / "runs")
    assert lab.train_run(run, tmp_path / "runs") is None and lab.is_done(run, tmp_path / "runs")
    data = load_dataset(data_dir / "small")
    other = type(data)(data.folder, {**data.meta, "vocab_size": 500}, data.train, data.val)
    with monkeypatch.context() as patch:
        patch.setattr(lab, "load_dataset", lambda *_, **__: other)
        assert not lab.is_done(run, tmp_path / "runs")
    other, = lab.Lab(args, "x").runs("none", note="rate_0.5")  # a point in a name ends nothing
    again = dataclasses.replace(other, flags={**other.flags, "seed": 1})
    assert lab.train_run(other, tmp_path / "runs") is None and lab.train_run(again, tmp_path / "runs") is None
    assert lab.is_done(other, tmp_path / "runs") and lab.is_done(again, tmp_path / "runs")
    kept = dataclasses.replace(run, keep=True)
    assert not lab.is_done(kept, tmp_path / "runs")  # its checkpoint is gone
    assert lab.train_run(kept, tmp_path / "runs") is None and lab.is_done(kept, tmp_path / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "FORMAT", 10**6)  # another version of the program
        assert not lab.is_done(kept, tmp_path / "runs") and lab.is_done(run, tmp_path / "runs")
    looked = dataclasses.replace(run, look=lambda model, data: dict(x=np.float32(1)))
    assert not lab.is_done(looked, tmp_path / "runs")  # nobody has looked
    assert "TypeError" in lab.train_run(looked, tmp_path / "runs")
    looked.look = lambda model, data: dict(x=1)
    assert lab.train_run(looked, tmp_path / "runs") is None and lab.is_done(looked, tmp_path / "runs")
    assert lab.result(looked, tmp_path / "runs")["look"] == dict(x=1)
    run.flags["seq_len"] = 16
    assert not lab.is_done(run, tmp_path / "runs")
    run.flags["seq_len"] = TOY["seq_len"]
    monkeypatch.setattr(lab, "RECIPE", 0)
    assert not lab.is_done(run, tmp_path / "runs")


def test_the_gradient_of_a_row_by_layer():
    """The layers' parts add up to autograd's gradient of the bank; a layer that is detached has none."""
    model = awake(small_model()).double()
    idx, targets = torch.randint(20, (2, 16)), torch.randint(512, (2, 16))
    parts = experiments.gradients_by_layer(model, idx, targets)
    model(idx, targets).backward()
    ids = idx.unique()
    assert len(parts) == 3 and all(part.abs().max() > 0 for part in parts)
    assert torch.allclose(sum(parts).double(), model.bank.weight.grad[ids].flatten(1), rtol=1e-4, atol=1e-7)
    experiments.one_layer_trains(model, 1)
    alone = experiments.gradients_by_layer(model, idx, targets)
    assert not alone[0].any() and not alone[2].any() and torch.allclose(alone[1], parts[1])
    model.zero_grad()
    model(idx, targets).backward()
    assert torch.allclose(parts[1].double(), model.bank.weight.grad[ids].flatten(1), rtol=1e-4, atol=1e-7)


def test_gradients_that_help_and_hinder(data_dir):
    """|Σ g|² / Σ |g|² is L where all layers have the same gradient, and their cosine 1."""
    model, data = awake(small_model(n_layers=2)), load_dataset(data_dir / "small")
    found = experiments.look_at_gradients(model, data)
    assert len(found["norms"]) == 2 and -1 < found["cosine"] < 1 and 0 < found["together"] < 2
    with pytest.MonkeyPatch.context() as patch:
        same = [torch.ones(5, 8)] * 2
        patch.setattr(experiments, "gradients_by_layer", lambda *_: same)
        found = experiments.look_at_gradients(model, data)
        assert found["cosine"] == pytest.approx(1) and found["together"] == pytest.approx(2)
        assert found["norms"] == pytest.approx([8 ** 0.5] * 2)
        patch.setattr(experiments, "gradients_by_layer", lambda *_: [same[0], -same[0]])
        found = experiments.look_at_gradients(model, data)
        assert found["cosine"] == pytest.approx(-1) and found["together"] == 0


def test_what_gates_carry(data_dir):
    """Gates that do not depend on the context carry nothing; equal slots have a cosine of 1."""
    model, data = awake(small_model(n_slots=3)), load_dataset(data_dir / "small")
    found = experiments.frozen_gates(model, data)
    assert abs(found["mean"]) > 1e-4 and abs(found["mean_of_id"]) > 1e-4 and abs(found["slot_cosine"]) < 0.3
    windows = train_gpt.TextWindows(data.val, 16, data.folder)
    idx, targets = windows[np.arange(min(32, len(windows)))]
    size = experiments.token_bytes(data.tokenizer())
    one = awake(small_model(n_slots=3, n_layers=1))
    with torch.no_grad():  # all sequences at once, and then each gate at its mean
        plain, mixer, gates = one(idx, targets), one.blocks[0].attention.mixer, []
        usual = mixer.gates
        mixer.gates = lambda x: gates.append(usual(x)) or gates[-1]
        one(idx, targets)
        mixer.gates = lambda x: gates[0].mean((0, 1)).expand(gates[0].shape)
        more = (one(idx, targets) - plain).item() * targets.numel()
    del mixer.gates
    assert experiments.frozen_gates(one, data)["mean"] == pytest.approx(
        more / np.log(2) / sum(int(size[t]) for t in targets.flatten()), rel=1e-3, abs=1e-6)
    for mixer in (m for m in model.modules() if isinstance(m, ValueMixer)):
        torch.nn.init.zeros_(mixer.router.weight)
    model.bank.weight.data[:] = model.bank.weight.data[:, :1]
    found = experiments.frozen_gates(model, data)
    assert found["mean"] == found["mean_of_id"] == 0 and found["slot_cosine"] == pytest.approx(1)


@pytest.mark.parametrize("g_0, g_i, layers", [
    ([1, 1], [1, 1], []), ([1.9, 1], [0.01, 1], [0]), ([1, 0.05], [1, 1.5], [1]),
    ([1.9, 0.2], [0.5, 0.01], [])])
def test_gates_that_collapse_are_found(g_0, g_i, layers):
    assert experiments.collapsed(g_0, g_i) == layers


def test_gates_start_where_the_bias_says():
    model = small_model()
    experiments.bias_gates(model, -2, 2)
    gates = model.blocks[1].attention.mixer.gates(torch.randn(1, 4, 16))
    expected = 2 * torch.sigmoid(torch.tensor([-2.0, 2, 2])).expand(1, 4, 2, 3)
    assert torch.allclose(gates, expected)
    held = {p for optimizer in make_optimizers(model) for g in optimizer.param_groups for p in g["params"]}
    assert held == set(model.parameters())


def test_rows_of_pairs_of_ids():
    model = small_model()
    experiments.read_by_pairs(model)
    idx = torch.tensor([[3, 7, 5, 7, 3, 7]])
    rows = model.bank(idx)[0]
    assert torch.equal(rows[1], rows[5])  # 3, 7 twice
    assert not torch.equal(rows[1], rows[3])  # 5, 7


@pytest.mark.parametrize("n_slots", [4, 16])
def test_the_step_of_the_values_follows_the_rule(n_slots):
    """All slots of an id move by the learning rate, and V_S by M of it: 0.15 · k · √M."""
    model = small_model(n_slots=n_slots)
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.w_o.weight)
    idx = torch.arange(16).unsqueeze(0)
    before = model.bank.weight.detach().sum(1)[idx[0]]
    optimizers = make_optimizers(model)
    model(idx, idx.flip(1)).backward()
    optimizers[1].step()
    moved = (model.bank.weight.detach().sum(1)[idx[0]] - before).abs()
    k = (16 / 768) ** -0.5
    assert moved.median().item() == pytest.approx(0.15 * k * n_slots ** 0.5, rel=1e-3)


def test_one_second_moment_a_row():
    """As plain loops over rows; a row without a gradient stays where it is."""
    rng = np.random.default_rng(0)
    p = torch.nn.Parameter(torch.zeros(4, 2, 3))
    optimizer, expected, v = experiments.RowAdam([p], lr=0.1), np.zeros((4, 2, 3)), np.zeros((4, 2))
    for _ in range(5):
        g = rng.normal(size=(4, 2, 3)) * (rng.random((4, 2, 1)) < 0.5)
        p.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
        for i in range(4):
            for j in range(2):
                if g[i, j].any():
                    square = (g[i, j] ** 2).mean()
                    v[i, j] = square if v[i, j] == 0 else 0.95 * v[i, j] + 0.05 * square
                    expected[i, j] -= 0.1 * g[i, j] / v[i, j] ** 0.5
        assert np.allclose(p.detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def test_one_second_moment_a_row_of_one_number_is_adamw():
    """Where a row is one number, or all its numbers have the same gradient."""
    p, q = (torch.nn.Parameter(torch.ones(4, 2, 1)) for _ in range(2))
    wide = torch.nn.Parameter(torch.ones(4, 2, 3))
    optimizer = experiments.RowAdamW([p, wide], lr=0.1)
    adamw = torch.optim.AdamW([q], lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0)
    for _ in range(5):
        p.grad = torch.randn(4, 2, 1) * (torch.rand(4, 2, 1) < 0.5)
        q.grad, wide.grad = p.grad.clone(), p.grad.expand(4, 2, 3).clone()
        optimizer.step()
        adamw.step()
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(wide, q.expand(4, 2, 3))


@pytest.mark.parametrize("memory", ["move", "lave", "none"])
def test_varied_optimizers(memory):
    """Each parameter stays in one group of one optimizer; factors change the rates they are for."""
    model = small_model(memory)
    usual = [group for optimizer in make_optimizers(model) for group in optimizer.param_groups]
    banks = {m.weight for m in model.modules() if isinstance(m, ValueBank)}
    routers = {m.router.weight for m in model.modules() if isinstance(m, ValueMixer)}
    kinds = dict(bank=banks, routers=routers, embedding={model.embedding.weight}, head={model.head.weight},
                 matrices={m.weight for m in model.blocks.modules() if isinstance(m, Linear)} - routers)
    for options in (dict(bank=4, routers=3, embedding=0.5, head=2, matrices=5), dict(routers_by="adamw"),
                    dict(betas=(0.1, 0.2), weight_decay=0.3),
                    dict(rows=experiments.RowAdam), dict(rows=experiments.RowAdamW)):
        taken = experiments.varied_optimizers(model, 1.0, **options)
        groups = [g for optimizer in taken for g in optimizer.param_groups]
        held = [p for g in groups for p in g["params"]]
        assert len(held) == len(set(held)) and set(held) == set(model.parameters())
        assert all(g["lr"] == g["peak_lr"] for g in groups)
        by_muon = {p for g in taken[0].param_groups for p in g["params"]}
        assert routers & by_muon == (set() if "routers_by" in options else routers)
        rates = {p: g["lr"] for g in groups for p in g["params"]}
        changed = {p for g in groups if (g.get("betas"), g.get("weight_decay")) == ((0.1, 0.2), 0.3)
                   for p in g["params"]}
        assert changed == (banks if "betas" in options else set())
        for group in usual:
            for p in group["params"]:
                factor = next((options.get(kind, 1) for kind, params in kinds.items() if p in params), 1)
                if p in by_muon or p not in routers:
                    assert rates[p] == pytest.approx(group["lr"] * factor)


@pytest.mark.parametrize("rows", [None, experiments.RowAdam, experiments.RowAdamW])
@pytest.mark.parametrize("memory", ["move", "lave"])
def test_rows_used_with_any_optimizer(memory, rows):
    """The share of the ids that were in a batch."""
    model = awake(small_model(memory))
    taken = experiments.varied_optimizers(model, 1.0, rows=rows)
    assert bank_use(model, taken)["rows_used"] == 0
    idx = torch.tensor([[3, 1, 3, 5]])
    model(idx, idx).backward()
    for optimizer in taken:
        optimizer.step()
    used = bank_use(model, taken)
    assert used["rows_used"] == pytest.approx(3 / model.config.vocab_size) and used["row_norm"] > 0


def test_a_new_memory_alone_learns(monkeypatch):
    """All else stays as it was; and before the first step nothing changes."""
    trained, model = awake(small_model("none", 0)), small_model()
    monkeypatch.setattr(experiments, "read_checkpoint", lambda *_, **__: dict(model=trained.state_dict()))
    experiments.go_on_from(model, None, freeze=True)
    idx, before = torch.randint(512, (2, 16)), {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(model(idx), trained(idx))
    optimizers, losses = make_optimizers(model), []
    for _ in range(4):
        losses.append(model(idx, idx))
        model.zero_grad()
        losses[-1].backward()
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        memory = "bank" in name or "router" in name
        assert torch.equal(tensor, before[name]) != memory, name


def test_the_gain_is_that_of_pairs_of_runs():
    without, results = ([dict(bits=bits) for bits in series] for series in ((1.0, 2.0, 3.0), (0.9, 1.8, 2.7)))
    assert experiments.gain(without, results) == pytest.approx((0.2, 0.1))
    assert experiments.gain(without[:1], results[:1]) == pytest.approx((0.1, 0))


def test_banks_that_start_otherwise():
    model = small_model(n_slots=4, vocab_size=4096)
    functools.partial(experiments.start_banks, std=0.02)(model)
    assert model.bank.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_homes_of_a_bank_are_measured(tmp_path, capsys):
    pytest.importorskip("triton")
    experiments.main(["store", "--depth", "2", "--tokens", "64", "--seq_len", "32", "--vocab_size", "4000",
                      "--rounds", "2", "--steps", "2", "--scales", "1", "--out", str(tmp_path / "scale.png")])
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    _, _, _, plain, host, _ = capsys.readouterr().out.splitlines()
    plain, host = ([cell.strip() for cell in line.split("|")] for line in (plain, host))
    assert (plain[3], host[3]) == ("gpu", "host") and float(plain[4]) > 0
    assert float(plain[10]) == pytest.approx(float(host[10]), abs=3e-4)  # the losses, in float32
    assert plain[7].startswith("0 ") and not host[7].startswith("0 ")
    assert all(len(line[11].split(" + ")) == 4 for line in (plain, host))
    for flags in (["--tokens", 33, "--seq_len", 32], ["--steps", 0], ["--homes", "disk"]):
        fails(experiments, ["store", *flags], flags[0])


def test_a_round_of_steps_goes_on_where_the_last_one_ended(monkeypatch):
    """Also its first rows have been prefetched."""
    pytest.importorskip("triton")
    config = GPTConfig(vocab_size=200, seq_len=8, n_layers=2, n_heads=2, dim=32, n_slots=2)
    home = benchmarks.Home("host", config, train_gpt.set_up_machine(argparse.Namespace(device="cpu", seed=0)))
    rows = home.model.bank.rows
    series = [[(torch.randint(0, 200, (2, 8)),) * 2] for _ in range(3)]
    calls = []

    def record(name, method):
        monkeypatch.setattr(rows, name, lambda ids: calls.append((name, ids.tolist())) or method(ids))

    record("hold", rows.hold)
    record("prefetch", rows.prefetch)
    home.steps(series)
    home.steps(series)
    names, ids = zip(*calls, strict=True)
    assert names == ("hold", "prefetch") * 6
    assert ids[1:-1:2] == ids[2::2] and ids[0] != ids[2]  # what is prefetched is what comes next


@pytest.mark.parametrize("slow", range(4))
def test_the_parts_of_a_step_are_told_apart(slow, monkeypatch):
    """What takes long is said to."""
    pytest.importorskip("triton")
    config = GPTConfig(vocab_size=20, seq_len=8, n_layers=2, n_heads=2, dim=32, n_slots=2)
    home = benchmarks.Home("host", config, train_gpt.set_up_machine(argparse.Namespace(device="cpu", seed=0)))
    home.machine = dataclasses.replace(home.machine, world_size=2)
    monkeypatch.setattr(type(home.machine), "sum", lambda machine, numbers: numbers)
    series = [[(torch.randint(0, 20, (2, 8)),) * 2] for _ in range(2)]
    home.optimizers[1].step = lambda step=home.optimizers[1].step: (time.sleep(0.2 * (slow == 3)), step())
    home.optimizers[2].step = lambda step=home.optimizers[2].step: (time.sleep(0.2 * (slow == 0)), step())
    home.compiled = lambda *batch: (time.sleep(0.2 * (slow == 1)), home.model(*batch))[1]
    monkeypatch.setattr(benchmarks, "sum_gradients", lambda model: time.sleep(0.2 * (slow == 2)))
    parts = home.parts(series)
    assert len(parts) == 4 and np.argmax(parts) == slow and 200 < parts[slow] < sum(parts)


def test_models_of_one_size_are_gone_before_the_next_is_measured(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    models, alive = [], []

    class Recorded(benchmarks.Home):
        def __init__(self, *about):
            alive.append(sum(model() is not None for model in models))
            super().__init__(*about)
            models.append(weakref.ref(self.model))

    monkeypatch.setattr(benchmarks, "Home", Recorded)
    experiments.main(["store", "--depth", "2", "--tokens", "64", "--seq_len", "32", "--vocab_size", "4000",
                      "--rounds", "1", "--steps", "1", "--scales", "1", "2",
                      "--out", str(tmp_path / "a.png")])
    assert alive == [0, 1, 0, 1]


def test_overhead_refuses_what_it_cannot_measure():
    for flags, name in [(["--tokens", 1000], "--seq_len 2048"), (["--rounds", 0], "--rounds"),
                        (["--variants"], "--variants")]:
        fails(experiments, ["overhead", *flags], name)
    with pytest.raises(UserError, match="move-x"):
        benchmarks.Variant("move-x", None, 64)
    if not torch.cuda.is_available():
        fails(experiments, ["overhead"], "CUDA")


def test_steps_of_generation_are_timed(monkeypatch, capsys):
    import move_fast
    real = move_fast.fast_step
    monkeypatch.setattr(move_fast, "fast_step", lambda *about, **how: real(*about, **how, backend="eager"))
    experiments.main("decode --variants move-x1 standard-mla --batch 1 2 --seq_len 4 --depth 1 --rounds 2 "
                     "--vocab_size 64".split())
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[3:]]
    assert [(row[0].strip(), int(row[1])) for row in rows] == [
        ("move-x1", 1), ("move-x1", 2), ("standard-mla", 1), ("standard-mla", 2)]
    # keys and V_S are 2 · 128 · 4 bytes, c_S and rotary key (64 + 64) · 4
    assert [int(row[6].replace(",", "")) for row in rows] == [1024, 1024, 512, 512]
    for flags in (["--batch", 0], ["--variants", "move-x4-reference"], ["--rounds", 0]):
        fails(experiments, ["decode", *flags], flags[0])


def test_the_overhead_table_has_the_operations_beside_the_time(capsys):
    """By hand: a token of MoVE has H(M + 1) gates of d weights a layer and mixes M + 1 times d numbers."""
    def variant(name, n_slots, ms):
        config = GPTConfig(vocab_size=64, seq_len=32, n_layers=2, n_heads=2, dim=16, n_slots=n_slots)
        return argparse.Namespace(name=name, model=GPT(config), forward_backward=ms, step_ms=[1.0, 1.0],
                                  peak=2**30, bank_bytes=lambda: 0, losses=[3.0, 2.0])

    rows = benchmarks.report_overhead([variant("standard", 0, [4.0, 2.0]), variant("move", 3, [5.0, 3.0])], 8)
    assert rows == [("standard", 0, 0, 0), ("move", 0.375, 0.25, 0.5)]
    *_, standard, move = ([cell.strip() for cell in line.split("|")] for line
                          in capsys.readouterr().out.splitlines())
    d, L = 16, 2
    plain = 2 * (L * (4 * d * d + 8 * d * d)) + 2 * L * 32 * 2 * d + 2 * 64 * d
    memory = 2 * L * 2 * 4 * d + 2 * L * 4 * d
    assert standard[4] == "+0.00%" and move[4] == f"{memory / plain:+.2%}"


def test_the_overhead_chart_has_a_bar_a_variant(tmp_path):
    rows = [("standard", 0, 0, 0), ("move-x1", 0.02, 0.01, 0.03)]
    benchmarks.draw_overhead(rows, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart:
        colors = chart.convert("RGB").getcolors(1 << 20)
    assert max(count for count, color in colors if color == (0x33, 0x66, 0xCC)) > 1000


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 7, 11])
def test_the_size_of_x1_is_that_of_train_gpt(depth, data_dir, tmp_path):
    args = argparse.Namespace(quick=True, dataset="small", data_dir=data_dir, out_dir=tmp_path, device="cpu",
                              depth=depth, seeds=1, steps=1)
    assert lab.Lab(args, "x").slots == GPTConfig.from_depth(depth, 1, vocab_size=64).n_slots


def test_two_processes_do_not_train_the_same_run(toy, data_dir, tmp_path):
    """Nor does one of them remove what the other has found."""
    args = argparse.Namespace(quick=True, dataset="small", data_dir=data_dir, out_dir=tmp_path, device="cpu",
                              depth=1, seeds=1, steps=1)
    run, = lab.Lab(args, "x").runs("none")
    folder = tmp_path / "runs"
    (folder / run.name).mkdir(parents=True)
    (folder / run.name / "log.jsonl").write_text("of the other process")
    with open(folder / f"{run.name}.txt", "w") as file:
        file.write("training")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        found = []

        def die():
            found.extend((folder / name).read_text() for name in (f"{run.name}.txt", f"{run.name}/log.jsonl"))
            fcntl.flock(file, fcntl.LOCK_UN)

        threading.Timer(0.5, die).start()
        assert lab.train_run(run, folder) is None and found == ["training", "of the other process"]
    said = (folder / f"{run.name}.txt").read_text()
    assert "training" not in said and "step 1/1" in said
    before = lab.result(run, folder), (folder / run.name / "log.jsonl").stat().st_mtime_ns
    assert lab.train_run(run, folder) is None  # the other one has done it
    assert before == (lab.result(run, folder), (folder / run.name / "log.jsonl").stat().st_mtime_ns)
    shutil.rmtree(folder / run.name)
    assert not lab.is_done(run, folder) and lab.train_run(run, folder) is None


def test_a_damaged_start_is_trained_again(toy, tmp_path, monkeypatch):
    """`late` goes on from checkpoints that are kept. A bit that has changed does not change its results."""
    experiments.main(["late", *toy])
    report = tmp_path / "out" / "late-small-quick.json"
    before = json.loads(report.read_text())["table"]
    for path in (tmp_path / "out" / "runs").glob("*late*.json"):
        path.unlink()
    path, = (tmp_path / "out" / "runs").glob("*none-m0-begun-seed0/checkpoint.pt")
    content = bytearray(path.read_bytes())
    embedding = torch.load(path, weights_only=True)["model"]["embedding.weight"].numpy().tobytes()
    content[content.index(embedding[:64]) + 1] ^= 64
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        experiments.go_on_from(None, path.parent)
    experiments.main(["late", *toy])
    assert json.loads(report.read_text())["table"] == before


def test_the_gates_of_a_run_have_a_report_of_their_own(toy, data_dir, tmp_path, monkeypatch):
    """With the flags of the run; the report of new runs stays."""
    monkeypatch.setattr(experiments, "read_senses", lambda path: [
        ("self", sense, f"one two {i} self") for sense in "ab" for i in range(2)])
    experiments.main(["gates", *toy])
    report = tmp_path / "out" / "gates-small-quick.json"
    before = report.read_bytes()
    train_gpt.main(command(data_dir, tmp_path / "mine", "--max_steps", 3))
    given = ["gates", "--run", str(tmp_path / "mine"), "--out_dir", str(tmp_path / "out")]
    experiments.main(given)
    content = json.loads((tmp_path / "out" / "gates-mine.json").read_text())
    assert content["flags"]["max_steps"] == "3" and (tmp_path / "out" / "gates-mine.png").exists()
    assert report.read_bytes() == before
    for flag in (["--quick"], ["--depth", 3], ["--dataset", "small"]):
        fails(experiments, [*given, *flag], flag[0])


def test_words_of_another_data_set_and_of_none(data_dir, tmp_path, monkeypatch):
    train_gpt.main(command(data_dir, tmp_path / "run", "--max_steps", 1))
    other = tmp_path / "other"
    shutil.copytree(data_dir / "small", other)
    meta, ids = json.loads((other / "meta.json").read_text()), np.fromfile(other / "train.bin", np.uint16)
    ids[1:3] = ids[2:0:-1]
    ids.tofile(other / "train.bin")
    meta["files"]["train.bin"]["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
    (other / "meta.json").write_text(json.dumps(meta))
    with monkeypatch.context() as patch:
        patch.setattr(benchmarks, "load_dataset", lambda path: load_dataset(other))
        fails(experiments, ["words", tmp_path / "run"], "not the data set of this run")

    def dots(model, idx, count, **options):
        dot, = train_gpt.load_run(tmp_path / "run")[1].encode(".")
        return iter([torch.full((len(idx),), dot)] * count)

    monkeypatch.setattr(GPT, "generate", dots)
    fails(experiments, ["words", tmp_path / "run", "--words", 5], "no words")


def test_words_of_a_run_whose_data_has_moved(data_dir, tmp_path, capsys):
    shutil.copytree(data_dir / "small", tmp_path / "a" / "small")
    train_gpt.main(command(tmp_path / "a", tmp_path / "run", "--max_steps", 1))
    (tmp_path / "a").rename(tmp_path / "b")
    words = ["words", tmp_path / "run", "--seeds", 1, "--words", 5]
    fails(experiments, words, "small")
    experiments.main([str(word) for word in (*words, "--data_dir", tmp_path / "b")])
    assert "of them in the data set" in capsys.readouterr().out


def test_words_and_curves_of_a_run(data_dir, tmp_path, capsys):
    out_dir = tmp_path / "run"
    train_gpt.main(command(data_dir, out_dir, "--max_steps", 2, "--eval_every", 1))
    capsys.readouterr()
    experiments.main(["words", str(out_dir), "--seeds", "2", "--words", "20"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(re.search(r"\d+ words, \d", line) for line in lines)
    experiments.main(["curves", str(out_dir), str(out_dir), "--out", str(tmp_path / "both.png")])
    with Image.open(tmp_path / "both.png") as chart:
        assert chart.width > 500
    fails(experiments, ["words", tmp_path], "checkpoint.pt")
    fails(experiments, ["words", out_dir, "--seeds", 0], "--seeds")
    fails(experiments, ["curves", tmp_path / "nothing"], "nothing")
    with open(out_dir / "log.jsonl", "a") as log:
        log.write('[1]\nno JSON\n{"loss": 1}\n{"step": 3, "val_bits_per')  # a kill cut it short
    experiments.main(["curves", str(out_dir), "--out", str(tmp_path / "cut.png")])
    with open(out_dir / "log.jsonl", "a") as log:
        log.write('\n{"step": "x", "val_bits_per_byte": {}}\n')
    fails(experiments, ["curves", out_dir, "--out", tmp_path / "odd.png"], "run")
    os.mkfifo(tmp_path / "pipe.npz")
    fails(experiments, ["digits", tmp_path / "pipe.npz"], "pipe.npz")


def test_copied_text_is_found():
    assert benchmarks.copied("abcdefgh", "xxcdefyy", 4) == "cdef"
    assert benchmarks.copied("abcdefgh", "xxcdefyy", 5) is None
    assert benchmarks.copied("abc", "abc", 4) is None


def one_run(data_dir, tmp_path, steps):
    """A run without memory, and the folder for it."""
    args = argparse.Namespace(quick=True, dataset="small", data_dir=data_dir, out_dir=tmp_path, device="cpu",
                              depth=1, seeds=1, steps=steps)
    (tmp_path / "runs").mkdir()
    run, = lab.Lab(args, "x").runs("none")
    return run, tmp_path / "runs"


def test_a_run_with_a_damaged_result_is_not_done(toy, data_dir, tmp_path):
    run, folder = one_run(data_dir, tmp_path, steps=8)
    assert lab.train_run(run, folder) is None and lab.is_done(run, folder)
    path, log = folder / f"{run.name}.json", folder / run.name / "log.jsonl"
    whole, lines = path.read_text(), log.read_text().splitlines()
    evaluations = [line for line in lines if "val_" in line]
    assert len(evaluations) == 3 < len(lines)
    for damaged in ("\ufffd" + whole, "\n".join(whole.splitlines()[:2]), whole[:-3], ""):
        path.write_text(damaged)
        assert not lab.is_done(run, folder)
    path.write_bytes(b"\xff" + whole.encode())
    assert not lab.is_done(run, folder)
    path.write_text(whole)
    for kept in ([line for line in lines if line != evaluations[1]], lines[:-2], evaluations, lines[-1:], []):
        log.write_text("\n".join(kept))
        assert not lab.is_done(run, folder)
    log.unlink()
    assert not lab.is_done(run, folder)
    log.write_text("\n".join(lines))
    assert lab.is_done(run, folder)


def test_ctrl_c_in_an_experiment_says_what_goes_on(toy, monkeypatch):
    """Not what train_gpt.py says: the command has no --resume."""
    def interrupted(run, path):
        raise KeyboardInterrupt("go on with --resume")

    monkeypatch.setattr(lab, "train_and_look", interrupted)
    with pytest.raises(KeyboardInterrupt) as stop:
        experiments.main(["parity", *toy])
    assert str(stop.value) and "--resume" not in str(stop.value)


def test_what_a_run_prints_is_kept_in_any_locale(toy, data_dir, tmp_path, monkeypatch):
    """Also where open() alone would write ASCII."""
    def ascii_open(path, mode="r", encoding=None, **options):
        return open(path, mode, encoding=encoding or "ascii", **options)

    def training(run, path):
        print("MoVE-×1")
        raise ValueError("wrong")

    run, folder = one_run(data_dir, tmp_path, steps=1)
    monkeypatch.setattr(lab, "open", ascii_open, raising=False)
    monkeypatch.setattr(lab, "train_and_look", training)
    assert lab.train_run(run, folder) == "ValueError: wrong"
    assert (folder / f"{run.name}.txt").read_text(encoding="utf-8") == "MoVE-×1\n"
