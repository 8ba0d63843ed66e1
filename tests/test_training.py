"""Training: a run learns, survives whatever ends it, and can be used with nothing but its folder."""
import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HERE, command, fails, log_of

import command_line
import move
import move_store
import optimizers
import prepare_data
import run_folder
import script
import train_gpt
from move import GPT, GPTConfig, ValueMixer
from optimizers import Muon, make_optimizers, orthogonalize, schedule
from script import UserError

KINDS = list(itertools.product(["mha", "mla"], ["none", "lave", "move"]))
all_kinds = pytest.mark.parametrize("attention, memory", KINDS)
WHOLE = ("--max_steps", 24, "--eval_every", 8)


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Drawing takes longer than these runs; those that look at the curves draw them."""
    if "curves" not in request.node.name:
        monkeypatch.setattr(train_gpt, "update_curves", lambda folder: None)


def start(*arguments, script="train_gpt.py", prefix=(), **options):
    """The script in a process of its own, with SIGINT as in a terminal."""
    return subprocess.Popen(
        [sys.executable, *prefix, str(HERE / script), *map(str, arguments)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **options)


def checkpoint(folder):
    return run_folder.read_checkpoint(folder, verify=True)


def same(a, b):
    """Whether two checkpoints hold the same bits of model and optimizers."""
    x, y = a["optimizers"], b["optimizers"]
    return x.keys() == y.keys() and all(
        torch.equal(a["model"][name], b["model"][name]) for name in a["model"]) and all(
        torch.equal(x[name][key], y[name][key]) for name in x for key in x[name])


@pytest.fixture(scope="session")
def finished(data_dir, tmp_path_factory):
    """A run of 24 steps that nothing disturbed, curves and all."""
    out_dir = tmp_path_factory.mktemp("out") / "run"
    train_gpt.main(command(data_dir, out_dir, *WHOLE))
    run_folder.update_curves(out_dir)
    return out_dir


# ------------------------------------------------------------------------------------ a run, and its log


def test_training_learns_and_logs(finished):
    loss, bits = log_of(finished, "loss"), log_of(finished, "val_bits_per_byte")
    assert list(loss) == [1, *range(3, 25, 3)] and list(bits) == [0, 8, 16, 24]
    assert loss[1] == pytest.approx(math.log(512), abs=0.1) and loss[24] < loss[1] - 1
    assert sorted(bits.values(), reverse=True) == list(bits.values())
    assert log_of(finished, "g_0")[0] == [1, 1] and log_of(finished, "g_i")[0] == [1, 1]
    assert log_of(finished, "g_0")[24] != [1, 1]
    used, norm = log_of(finished, "rows_used"), log_of(finished, "row_norm")
    assert used[0] == 0 and 0.3 < used[24] <= 1 and norm[24] > norm[0]
    assert all(speed > 0 for speed in log_of(finished, "tokens_per_s").values())


def test_curves_are_an_image_of_one_or_several_runs(finished, tmp_path):
    from PIL import Image
    shutil.copytree(finished, tmp_path / "other")
    run_folder.draw_curves([finished, tmp_path / "other"], tmp_path / "both.png")
    for path in (finished / "curves.png", tmp_path / "both.png"):
        with Image.open(path) as image:
            assert image.size[0] > 500
            assert len(image.convert("L").getcolors()) > 20


def test_curves_of_runs_with_long_names(finished, tmp_path):
    """matplotlib warns where a legend leaves its axes no room."""
    folders = [tmp_path / f"{name * 100}" for name in "ab"]
    for folder in folders:
        shutil.copytree(finished, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_folder.draw_curves(folders, tmp_path / "both.png")


def test_no_curves_are_no_reason_to_end_a_run(data_dir, tmp_path, monkeypatch, capsys):
    def draw_curves(folders, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "draw_curves", draw_curves)
    train_gpt.main(command(data_dir, tmp_path / "run", "--max_steps", 1, "--max_new_tokens", 1))
    assert "curves.png" in capsys.readouterr().out and checkpoint(tmp_path / "run")["step"] == 1


def test_bits_per_byte_from_the_decoded_bytes(finished, data_dir):
    """Token by token, from the probabilities and the text itself."""
    data, (model, encoding) = prepare_data.load_dataset(data_dir / "small"), train_gpt.load_run(finished)
    bits, text = 0.0, b""
    for begin in range(0, 2048, 32):
        window = data.val[begin:begin + 33].astype(np.int64)
        probabilities = model(torch.from_numpy(window[None, :-1]))[0].double().softmax(-1)
        for position, token in enumerate(window[1:].tolist()):
            bits -= math.log2(probabilities[position, token].item())
            text += b"" if token == encoding.eot_token else encoding.decode_single_token_bytes(token)
    documents = encoding.decode(data.val.tolist()).split("<|endoftext|>")
    assert text[:40].decode() in next(document for document in documents if document)
    assert log_of(finished, "val_bits_per_byte")[24] == pytest.approx(bits / len(text), rel=1e-5)


def test_gate_means_are_those_of_the_gates(finished, data_dir):
    data, (model, _), means = prepare_data.load_dataset(data_dir / "small"), train_gpt.load_run(finished), []
    for begin in range(0, 2048, 32):
        x = model.embedding(torch.from_numpy(data.val[begin:begin + 32].astype(np.int64))[None])
        gates = model.blocks[0].attention.mixer.gates(move.rms_norm(move.rms_norm(x)))
        means.append([gates[..., 0].mean().item(), gates[..., 1:].mean().item()])
    g_0, g_i = np.mean(means, 0)
    assert log_of(finished, "g_0")[24][0] == pytest.approx(g_0, rel=1e-5)
    assert log_of(finished, "g_i")[24][0] == pytest.approx(g_i, rel=1e-5)


@all_kinds
def test_every_setting_trains_and_samples(attention, memory, data_dir, tmp_path, capsys):
    flags = ("--attention", attention, "--memory", memory, "--move_scale", 2, "--max_steps", 2)
    train_gpt.main(command(data_dir, tmp_path / "run", *flags))
    capsys.readouterr()
    train_gpt.main(["--out_dir", str(tmp_path / "run"), "--prompt", "def f", "--max_new_tokens", "9"])
    assert capsys.readouterr().out.startswith("def f")


@pytest.mark.skipif(not importlib.util.find_spec("move_fast") or not importlib.util.find_spec("triton"),
                    reason="there is no Triton")
def test_a_run_by_the_kernels_is_that_of_the_reference(data_dir, tmp_path):
    logs = []
    for kernels in ("--kernels", "--no-kernels"):
        flags = (kernels, "--max_steps", 3, "--log_every", 1, "--eval_every", 1, "--eval_tokens", 128,
                 "--batch_tokens", 128)
        train_gpt.main(command(data_dir, tmp_path / kernels, *flags))
        assert checkpoint(tmp_path / kernels)["flags"]["kernels"] == (kernels == "--kernels")
        keys = ("loss", "val_bits_per_byte", "g_0", "g_i", "rows_used")
        logs.append([log_of(tmp_path / kernels, key) for key in keys])
    for a, b in zip(*logs, strict=True):
        assert len(a) > 2 and list(a) == list(b)
        assert np.allclose(list(a.values()), list(b.values()), rtol=1e-3)


@pytest.mark.parametrize("what", ["compiler", "header"])
def test_a_machine_without_a_compiler_trains_without_it(what, data_dir, tmp_path, monkeypatch, capsys):
    """A line says what is missing. Kernels that were asked for are an error then."""
    assert command_line.compiler_missing("cpu") is None
    with monkeypatch.context() as patch:
        if what == "compiler":
            patch.setattr(command_line.shutil, "which", lambda name: None)
        else:
            patch.setattr(command_line.sysconfig, "get_path", lambda name: str(tmp_path))
        train_gpt.main(command(data_dir, tmp_path / "run", "--max_steps", 1, "--compile"))
        assert "--no-compile" in capsys.readouterr().out
        flags = checkpoint(tmp_path / "run")["flags"]  # as asked: with a compiler, --resume compiles
        assert flags["compile"] and flags["kernels"] is None
        args = argparse.Namespace(device="cuda", dtype="bfloat16", kernels=None)
        command_line.resolve_kernels(args)
        assert args.kernels is False and "--no-kernels" in capsys.readouterr().out
        rows = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
        assert move_store.kernels_for(rows) is None
        args.kernels = True
        with pytest.raises(UserError):
            command_line.resolve_kernels(args)
    command_line.resolve_kernels(argparse.Namespace(device="cpu", dtype="float32", kernels=None))
    assert move_store.KERNELS


# ------------------------------------------------------------------------------------ ends, and resuming


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_never_was(how, finished, data_dir, tmp_path):
    out_dir = tmp_path / "run"
    process = start(*command(data_dir, out_dir, *WHOLE, "--save_every", 5))
    for line in process.stdout:  # between the checkpoints of step 5 and 10
        if line.startswith("step 8/24"):
            process.send_signal(how)
            break
    error = process.communicate()[1]
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), error
    step = checkpoint(out_dir)["step"]
    if how == signal.SIGKILL:
        assert step % 5 == 0
        with open(out_dir / "log.jsonl", "a") as file:
            file.write('{"step": 11, "lo')  # a line cut short by the kill
    else:
        assert 8 <= step < 24 and error.count("\n") == 1 and "--resume" in error
    train_gpt.main(["--resume", "--out_dir", str(out_dir)])  # the checkpoint knows all else
    for key in ("loss", "val_bits_per_byte", "g_0", "rows_used"):
        assert log_of(out_dir, key) == log_of(finished, key)
    assert same(checkpoint(out_dir), checkpoint(finished))


def test_ctrl_c_before_the_first_step_logs_step_0_once(data_dir, tmp_path, monkeypatch):
    evaluate = train_gpt.Training.evaluate

    def interrupted(training):
        if training.step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        evaluate(training)

    monkeypatch.setattr(train_gpt.Training, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_gpt.main(command(data_dir, tmp_path / "run", "--max_steps", 2))
    monkeypatch.undo()
    train_gpt.main(["--resume", "--out_dir", str(tmp_path / "run"), "--max_steps", "3"])
    assert list(log_of(tmp_path / "run", "val_bits_per_byte")) == [0, 3]
    assert list(log_of(tmp_path / "run", "loss")) == [1, 3]


def test_resume_and_max_steps_are_enough_and_take_the_newest_run(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(train_gpt, ["--resume"], "out")
    for seed in (1, 2):
        train_gpt.main(command(data_dir, Path("out") / str(seed), "--seed", seed, "--max_steps", 1))
    os.utime(tmp_path / "out" / "1" / "checkpoint.pt")  # now the newest one
    train_gpt.main(["--resume", "--max_steps", "4"])
    assert checkpoint(tmp_path / "out" / "1")["step"] == 4 and checkpoint(tmp_path / "out" / "2")["step"] == 1
    assert checkpoint(tmp_path / "out" / "1")["flags"]["seed"] == 1
    fails(train_gpt, ["--resume"], "max_steps")  # all done


def test_smaller_micro_batches_change_nothing_but_memory(finished, data_dir, tmp_path):
    train_gpt.main(command(data_dir, tmp_path / "run", *WHOLE, "--micro_batch", 1))
    for key in ("loss", "val_bits_per_byte"):
        a, b = log_of(finished, key), log_of(tmp_path / "run", key)
        assert list(a) == list(b) and np.allclose(list(a.values()), list(b.values()), rtol=1e-3)


def test_two_processes_train_as_one(finished, data_dir, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    process = start(*command(data_dir, tmp_path / "run", *WHOLE), prefix=torchrun)
    output, error = process.communicate(timeout=150)
    assert process.returncode == 0, error
    assert output.count("step 24/24  loss") == 1  # one process speaks and writes
    for key, tolerance in dict(loss=1e-3, val_bits_per_byte=1e-3, g_0=1e-2, g_i=1e-2).items():
        a, b = log_of(finished, key), log_of(tmp_path / "run", key)
        assert list(a) == list(b) and np.allclose(list(a.values()), list(b.values()), rtol=tolerance)
    train_gpt.main(["--resume", "--out_dir", str(tmp_path / "run"), "--max_steps", "26"])  # by one process


def test_a_run_goes_on_with_more_processes(data_dir, tmp_path):
    """Its micro-batch was chosen for one process, and is chosen again."""
    flags = [flag for flag in command(data_dir, tmp_path / "run", "--max_steps", 1)
             if flag not in ("--micro_batch", "4")]
    train_gpt.main(flags)
    process = start("--resume", "--out_dir", tmp_path / "run", "--max_steps", 2,
                    prefix=["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"])
    output, error = process.communicate(timeout=100)
    assert process.returncode == 0 and "step 2/2  loss" in output, error


def test_two_runs_in_one_folder(data_dir, tmp_path):
    out_dir = tmp_path / "run"
    first = start(*command(data_dir, out_dir, "--max_steps", 1000))
    try:
        assert any(line.startswith("step 0/1000") for line in first.stdout)
        log = (out_dir / "log.jsonl").read_text()
        fails(train_gpt, command(data_dir, out_dir, "--seed", 1), "run; .*--out_dir")
        assert (out_dir / "log.jsonl").read_text().startswith(log)
    finally:
        first.kill()
        first.communicate()
    train_gpt.main(command(data_dir, out_dir, "--max_steps", 1))  # its lock died with it


def test_somebodys_own_files_stay(data_dir, tmp_path):
    for name, content in [("thesis.txt", "my own"), ("log.jsonl", "not a log\n"),
                          ("log.jsonl", '{"a": 1}\n'), ("log.jsonl", "my own, without a line end"),
                          ("log.jsonl", '{"step": 0, "loss": 3.5}\n')]:
        folder = tmp_path / f"{name}-{len(content)}"
        folder.mkdir()
        (folder / name).write_text(content)
        fails(train_gpt, command(data_dir, folder), re.escape(str(folder)))
        assert [path.name for path in folder.iterdir()] == [name] and (folder / name).read_text() == content
    folder, precious = tmp_path / "linked", tmp_path / "precious"
    folder.mkdir()
    precious.write_text("precious")
    (folder / "lock").symlink_to(precious)
    fails(train_gpt, command(data_dir, folder), "lock")
    assert precious.read_text() == "precious"
    (folder / "lock").unlink()
    (folder / "lock").write_text("kept")
    train_gpt.main(command(data_dir, folder, "--max_steps", 1))
    assert (folder / "lock").read_text() == "kept"


def test_a_file_where_the_folder_of_the_run_should_be(data_dir, tmp_path):
    (tmp_path / "file").write_text("mine")
    fails(train_gpt, command(data_dir, tmp_path / "file"), "file .*--out_dir")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    process = start(*command(data_dir, tmp_path / "file" / "below"), prefix=torchrun)
    error = process.communicate(timeout=100)[1]
    assert process.returncode and "file/below cannot be a folder" in error, error
    assert "terminate called" not in error  # no process ends by an abort


def test_one_of_two_processes_fails(data_dir, tmp_path):
    """The main one cannot write its log: it says so in a line, and the other one that another one ended."""
    script = tmp_path / "script.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(HERE)!r})
import train_gpt
def call(self, text, **record):
    raise OSError(28, "No space left on device", "log.jsonl")
train_gpt.Log.__call__ = call
train_gpt.run(train_gpt.main)""")
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script,
         *command(data_dir, tmp_path / "run", "--max_steps", 2)], capture_output=True, text=True, timeout=100)
    lines = re.findall("^error: .*", process.stderr, re.M)
    assert process.returncode and any("log.jsonl" in line for line in lines), process.stderr
    assert "RuntimeError" not in process.stderr and "terminate called" not in process.stderr


def test_a_run_keeps_the_tokenizer_of_its_own_data(data_dir, finished, tmp_path):
    """Not that of a run on other data, which a kill ended before its first checkpoint."""
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "log.jsonl", tmp_path / "run")
    (tmp_path / "run" / "tokenizer.tiktoken").write_bytes(b"of another data set")
    train_gpt.main(command(data_dir, tmp_path / "run", "--max_steps", 1))
    train_gpt.load_run(tmp_path / "run")


def test_a_file_system_without_locks(data_dir, tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(script.fcntl, "flock", flock)
    train_gpt.main(command(data_dir, tmp_path / "run", "--max_steps", 1))


def test_a_sequence_of_one_token(data_dir, tmp_path, capsys):
    """Trains, goes on and writes: each token from the one before alone."""
    flags = ["--seq_len", 1, "--batch_tokens", 4, "--micro_batch", 2, "--eval_tokens", 4]
    train_gpt.main(command(data_dir, tmp_path / "run", *flags, "--max_steps", 1))
    train_gpt.main(["--resume", "--max_steps", "2", "--out_dir", str(tmp_path / "run")])
    train_gpt.main(["--prompt", "", "--out_dir", str(tmp_path / "run")])
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_names_that_are_not_utf8(data_dir, finished, tmp_path):
    """A run in such a folder could be trained, but not be read again."""
    name = os.fsdecode(b"caf\xe9")
    fails(train_gpt, command(data_dir, tmp_path / name, "--max_steps", 1), "caf.*out_dir")
    assert not list(tmp_path.iterdir())
    shutil.copytree(finished, tmp_path / name)  # it was renamed
    fails(train_gpt, ["--prompt", "x", "--out_dir", tmp_path / name], "caf.*not UTF-8")
    fails(train_gpt, ["--prompt", name, "--out_dir", finished], "--prompt")


def test_curves_of_a_run_whose_name_is_no_formula(data_dir, tmp_path):
    train_gpt.main(command(data_dir, tmp_path / "$a_{$", "--max_steps", 2, "--eval_every", 1))
    assert (tmp_path / "$a_{$" / "curves.png").stat().st_size > 10_000


def test_a_bank_in_bfloat16_is_saved_and_resumed(data_dir, tmp_path):
    for folder, steps in (("whole", [4]), ("halves", [2, 4])):
        for i, step in enumerate(steps):
            flags = ("--bank_dtype", "bfloat16", "--max_steps", step, *["--resume"] * i)
            train_gpt.main(command(data_dir, tmp_path / folder, *flags))
    whole, halves = (checkpoint(tmp_path / folder) for folder in ("whole", "halves"))
    assert whole["model"]["bank.weight"].dtype == torch.bfloat16
    assert whole["optimizers"]["bank.weight"]["exp_avg_sq"].dtype == torch.bfloat16
    assert halves["step"] == 4 and halves["model"]["bank.weight"].dtype == torch.bfloat16
    more = ["--resume", "--out_dir", tmp_path / "whole", "--max_steps", 6]
    fails(train_gpt, [*more, "--bank_dtype", "float32"], "bank_dtype float32.*bfloat16")


# ------------------------------------------------------------------------------------------ sampling


def test_a_sample_is_the_same_for_the_same_seed(finished, capsys):
    texts = []
    for seed in (1, 1, 2):
        train_gpt.main(["--out_dir", str(finished), "--prompt", "import", "--max_new_tokens", "20", "--seed",
                        str(seed)])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("import") and len(texts[0]) > 10


def test_several_samples_at_once(finished, capsys):
    def write(*flags):
        train_gpt.main(["--out_dir", str(finished), "--prompt", "import", "--max_new_tokens", "20", *flags])
        return capsys.readouterr().out.removesuffix("\n")

    texts = write("--num_samples", "3").split("\n---\n")
    assert len(set(texts)) == 3 and all(text.startswith("import") for text in texts)
    greedy = write("--num_samples", "2", "--temperature", "0").split("\n---\n")
    assert greedy == [write("--temperature", "0")] * 2


def test_a_sample_ends_with_its_document(finished, capsys, monkeypatch):
    model, encoding = train_gpt.load_run(finished)
    a, b = encoding.encode_ordinary("a b")
    columns = [[a, a], [encoding.eot_token, b], [b, encoding.eot_token], [a, a], [b, b]]
    read = []
    monkeypatch.setattr(model, "generate", lambda *_, **__: (
        read.append(column) or torch.tensor(column) for column in columns))
    args = argparse.Namespace(max_new_tokens=5, num_samples=2, temperature=1, top_k=None, top_p=None, seed=0)
    train_gpt.print_samples(model, encoding, ">", args, torch.device("cpu"))
    assert capsys.readouterr().out == ">a\n---\n>a b\n" and len(read) == 3


def test_sampling_needs_the_runs_folder_only(finished, tmp_path, monkeypatch, capsys):
    """No data set, no flags; in a process that finds no Pillow."""
    shutil.copytree(finished, tmp_path / "out" / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "load_dataset", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    train_gpt.main(["--prompt", "def f", "--max_new_tokens", "3"])
    assert capsys.readouterr().out.startswith("def f")
    model, encoding = train_gpt.load_run(tmp_path / "out" / "moved")
    assert isinstance(model, GPT) and encoding.n_vocab == 512
    with open("out/moved/tokenizer.tiktoken", "ab") as file:
        file.write(b"x")
    fails(train_gpt, ["--prompt", "x"], "tokenizer.tiktoken")


# ------------------------------------------------------------------------------------- the pieces


def test_the_order_of_the_data():
    order = train_gpt.DataOrder(n=10, batch=4, seed=0)
    seen = np.concatenate([order(step) for step in range(5)])  # two epochs; batch 2 lies in both
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10, 20))
    assert seen[:10].tolist() != (seen[10:] - 10).tolist()
    assert train_gpt.DataOrder(10, 4, 0)(3).tolist() == seen[12:16].tolist()  # of (seed, step) alone
    assert train_gpt.DataOrder(10, 4, 1)(3).tolist() != seen[12:16].tolist()
    assert sorted(train_gpt.DataOrder(10, 35, 0)(0)) == [*range(30), *sorted(
        train_gpt.DataOrder(10, 35, 0)(0)[30:])]  # a batch of several epochs


def test_windows_cover_the_text_once():
    windows = train_gpt.TextWindows(np.arange(100, 111, dtype=np.uint16), 3, "")
    idx, targets = windows[np.arange(3)]
    assert len(windows) == 3 and idx.tolist() == [[100, 101, 102], [103, 104, 105], [106, 107, 108]]
    assert torch.equal(targets, idx + 1)
    assert torch.equal(windows[np.arange(3, 6)][0], idx)  # the second epoch


def test_the_learning_rate():
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:51] == [1] * 42 and rates[75] == 0.5
    assert rates[99] == pytest.approx(0.02)


@all_kinds
def test_every_parameter_is_optimized_once(attention, memory):
    model = GPT(GPTConfig(50, 24, 2, 2, 16, attention, memory=memory, n_slots=2))
    groups = [group for optimizer in make_optimizers(model, 1.0) for group in optimizer.param_groups]
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())
    assert all(group["peak_lr"] == group["lr"] > 0 for group in groups)
    twice = [group for optimizer in make_optimizers(model, 2.0) for group in optimizer.param_groups]
    assert [group["lr"] * 2 for group in groups] == pytest.approx([group["lr"] for group in twice])


@pytest.mark.parametrize("n_slots", [1, 4, 16, 150])  # 150: the router has more rows than columns
def test_a_routers_step_grows_with_the_root_of_its_gates(n_slots):
    """A singular value of the router moves by about 0.05 · √(rows / columns); one of w_q by about 0.02."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 24, 1, 2, 128, n_slots=n_slots))
    attention = model.blocks[0].attention
    for matrix, factor in ((attention.mixer.router.weight, 0.05 * (2 * (1 + n_slots) / 128) ** 0.5),
                           (attention.w_q.weight, 0.02)):
        before, matrix.grad = matrix.detach().clone(), torch.randn_like(matrix)
        make_optimizers(model)[0].step()
        moved = torch.linalg.svdvals(matrix.detach() - before)
        assert moved.mean().item() == pytest.approx(factor, rel=0.25)


@pytest.mark.parametrize("attention", ["mha", "mla"])
@pytest.mark.parametrize("memory, n_slots", [("move", 4), ("move", 40), ("lave", 1), ("lave", 6)])
def test_each_router_has_the_rate_of_its_shape(attention, memory, n_slots):
    """LaVE with 6 tables in 4 layers has routers of two shapes."""
    model = GPT(GPTConfig(50, 24, 4, 2, 32, attention, memory=memory, n_slots=n_slots))
    optimizers = make_optimizers(model, 0.5)
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())
    routers = {m.router.weight for m in model.modules() if isinstance(m, ValueMixer)}
    for group in optimizers[0].param_groups:
        for p in group["params"]:
            rows, columns = p.shape
            expected = 0.05 * 0.5 * min(1, rows / columns) ** 0.5 if p in routers else 0.02 * 0.5
            assert group["peak_lr"] == pytest.approx(expected)


def test_parts_that_move_py_has_not_are_optimized_too():
    model = GPT(GPTConfig(50, 24, 2, 2, 16, n_slots=2))
    model.blocks[0].norm, model.blocks[0].mlp_up = torch.nn.LayerNorm(16), torch.nn.Linear(16, 64)
    model.blocks[1].attention.mixer.router = model.blocks[0].attention.mixer.router = torch.nn.Linear(16, 6)
    held = [p for o in make_optimizers(model) for group in o.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_on_stacks_is_torchs_muon(dtype, monkeypatch):
    monkeypatch.setattr(optimizers, "fast_bfloat16", lambda device: dtype == torch.bfloat16)
    assert orthogonalize(torch.randn(1, 3, 2)).dtype == dtype
    torch.manual_seed(0)
    shapes = [(16, 16)] * 5 + [(64, 16)] * 3 + [(16, 64)] * 2 + [(6, 32), (7, 5), (1, 9)]
    ours, theirs = ([torch.nn.Parameter(torch.randn(shape)) for shape in shapes] for _ in range(2))
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
    muons = Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for muon in muons:
            muon.step()
        assert all((p - q).abs().max() < 1e-3 for p, q in zip(ours, theirs, strict=True))
        muons[0].load_state_dict(muons[0].state_dict())


def test_orthogonalized_matrices_have_singular_values_near_one():
    for shape in ((3, 24, 24), (2, 40, 10), (2, 10, 40)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        assert values.min() > 0.3 and values.max() < 1.4


SHARED = """
import sys
sys.path[:0] = [{here!r}]
import torch
import torch.distributed as dist
from optimizers import orthogonalize, orthogonalize_shared
dist.init_process_group("gloo")
for n in (1, 3, 4):
    matrices = list(torch.randn(n, 6, 9, generator=torch.Generator().manual_seed(n)))
    shared, alone = orthogonalize_shared(matrices), torch.stack([orthogonalize(m[None])[0] for m in matrices])
    assert shared.shape == (n, 6, 9) and (shared - alone).abs().max() < 0.02, n
dist.barrier()  # end together: Gloo's threads may abort a process whose peer ends first
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_out_the_matrices(world_size, tmp_path):
    (tmp_path / "shared.py").write_text(SHARED.format(here=str(HERE)))
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world_size}",
                             "--standalone", tmp_path / "shared.py"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("equal") == world_size, result.stderr


def flags_of(*flags):
    given = vars(command_line.training_parser("", train_gpt.DEFAULTS)[0].parse_args(list(map(str, flags))))
    return command_line.resolve_flags(given, train_gpt.DEFAULTS)


def test_the_default_micro_batch_fits_the_memory():
    args = flags_of("--device", "cpu", "--seq_len", 2048, "--batch_tokens", 131072, "--dtype", "bfloat16",
                    "--bank_dtype", "bfloat16")
    args.kernels = True
    config = GPTConfig(vocab_size=16384)
    GiB = 2**30
    sizes = [train_gpt.choose_micro_batch(args, config, 16, free * GiB) for free in (2, 8, 12, 24, 40, 80)]
    assert sizes[0] == 1 and sizes[-1] == 16 and sizes == sorted(sizes) and len(set(sizes)) >= 4
    assert all(64 % size == 0 for size in sizes)
    large = dataclasses.replace(config, n_slots=48)
    assert train_gpt.choose_micro_batch(args, large, 16, 24 * GiB) < sizes[3]
    assert train_gpt.choose_micro_batch(args, config, 16, 30 * GiB) == 16
    args.kernels = False  # all logits at once
    assert train_gpt.choose_micro_batch(args, config, 16, 30 * GiB) == 8
    many = dataclasses.replace(config, vocab_size=262144, n_slots=24)
    few = train_gpt.choose_micro_batch(args, many, 16, 60 * GiB)
    args.bank_home = "host"
    assert few < train_gpt.choose_micro_batch(args, many, 16, 60 * GiB)
    args.bank_home = "gpu"
    args.batch_tokens = 12 * 2048
    assert train_gpt.choose_micro_batch(args, config, 16) == 12  # not on a GPU


def test_the_default_dtype(monkeypatch):
    for capabilities, dtype in [(dict(avx512_bf16=True), "bfloat16"), (dict(amx_bf16=True), "bfloat16"),
                                (dict(avx2=True, amx_bf16=False), "float32")]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c)
        args = flags_of("--device", "cpu")
        assert args.dtype == dtype and args.bank_dtype == "float32" and args.dataset == "shakespeare"


def test_compile_is_off_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert flags_of("--device", "cpu", "--compile").compile is False
    assert capsys.readouterr().out.count("\n") == 1


def test_gradients_of_all_processes_are_summed_in_place(monkeypatch):
    calls = []

    def all_reduce(tensor):
        calls.append(tensor)
        tensor *= 2

    monkeypatch.setattr(train_gpt.dist, "all_reduce", all_reduce)
    model = GPT(GPTConfig(50, 24, 2, 2, 16, n_slots=2))
    model.bank.to(torch.bfloat16)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = {p: (p.grad, p.grad.clone()) for p in model.parameters()}
    train_gpt.sum_gradients(model, large=1000)
    assert all(p.grad is old and torch.equal(p.grad, 2 * value) for p, (old, value) in before.items())
    assert any(call is model.bank.weight.grad for call in calls) and len(calls) < 8


# ------------------------------------------------------------------------------------------- bad input


def test_bad_flags(data_dir, tmp_path):
    for flags, name in [
            (["--move_scale", -1], "move_scale"), (["--move_scale", "nan"], "move_scale"),
            (["--move_scale", 1e300], "move_scale"), (["--depth", 0], "depth"),
            (["--depth", 10 ** 20], "depth"), (["--depth", "x"], "depth"), (["--max_steps", 0], "max_steps"),
            (["--batch_tokens", 100], "tokens 100.*128"), (["--batch_tokens", 10 ** 20], "batch_tokens"),
            (["--batch_tokens", 32 * 10 ** 9], "batch_tokens"), (["--memory", "engram"], "engram"),
            (["--move_scal"], "argument"), (["--unknown"], "unknown"), (["--lr_scale", 0], "lr_scale"),
            (["--lr_scale", 1e308], "lr_scale"), (["--seed", -1], "seed"), (["--seed", 10 ** 20], "seed"),
            (["--temperature", "nan"], "temperature"), (["--temperature", -1], "temperature"),
            (["--seq_len", 0, "--batch_tokens", 4], "seq_len"), (["--top_k", 0], "top_k"),
            (["--temperature", 1e-7], "temperature"),
            (["--top_p", 0], "top_p"), (["--max_new_tokens", 0], "max_new_tokens"),
            (["--attention", "mla", "--kv_rank", 3, "--depth", 4], "kv_rank 3"),
            (["--kv_rank", 4], "kv_rank"), (["--dataset", "wikipedia"], "wikipedia"),
            (["--dataset", "../small"], "dataset.*small"), (["--dataset", ""], "dataset"),
            (["--dataset", data_dir / "small"], "dataset.*small"), (["--resume"], "none"),
            (["--prompt", "x"], "none"), (["--kernels", "--dtype", "bfloat16"], "kernels"),
            (["--seq_len", 100000, "--batch_tokens", 400000], "seq_len")]:
        fails(train_gpt, [*command(data_dir, tmp_path / "none"), *flags], name)
        assert not (tmp_path / "none").exists(), flags


def test_variables_of_torchrun_that_are_wrong(data_dir, tmp_path, monkeypatch):
    """They count only where there is a RANK."""
    monkeypatch.setenv("WORLD_SIZE", "two")
    train_gpt.main(command(data_dir, tmp_path / "alone", "--max_steps", 1))
    monkeypatch.setenv("RANK", "0")
    fails(train_gpt, command(data_dir, tmp_path / "none"), "torchrun")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(data_dir, tmp_path):
    fails(train_gpt, [*command(data_dir, tmp_path), "--device", "cuda"], "--device cuda.*--device cpu")


def test_flags_that_do_not_fit_the_run(finished, data_dir, sources, tmp_path):
    more = ["--max_steps", 30, "--resume"]
    before = (finished / "checkpoint.pt").read_bytes(), (finished / "log.jsonl").read_bytes()
    for flags, name in [
            ([*more, "--depth", 4], "depth 4.* 2"), ([*more, "--move_scale", 3], "move_scale 3.* 1"),
            ([*more, "--attention", "mla"], "attention mla.* mha"), ([*more, "--seed", 5], "seed 5.* 0"),
            ([*more, "--lr_scale", 2], "lr_scale 2.* 1"),
            ([*more, "--eval_tokens", 512], "eval_tokens 512.* 2048"), (["--max_steps", 30], "--resume"),
            (["--max_steps", 24, "--resume"], "max_steps"), (["--prompt", "x" * 500], "prompt.* 31"),
            (["--prompt", "x", "--depth", 4], "depth 4.* 2")]:
        fails(train_gpt, [*command(data_dir, finished), *flags], name)
    for vocab_size, name in [(1024, "vocab_size"), (500, "vocab_size")]:
        folder = tmp_path / str(vocab_size)
        prepare_data.main(["--text", *map(str, sources.iterdir()), "--name", "small", "--vocab_size",
                           str(vocab_size), "--data_dir", str(folder)])
        fails(train_gpt, command(folder, finished, *more), name)
    assert before == ((finished / "checkpoint.pt").read_bytes(), (finished / "log.jsonl").read_bytes())


def bytes_in_archive(path, name):
    """(first byte, length) of what a zip file stores under a name that ends so."""
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(name))
        archive.fp.seek(info.header_offset + 26)
        lengths = archive.fp.read(4)
    skip = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return info.header_offset + 30 + skip, info.file_size


def flip_bit(path, name):
    first, length = bytes_in_archive(path, name)
    content = bytearray(path.read_bytes())
    content[first + length // 2] ^= 4
    path.write_bytes(content)


def change(path, **changes):
    state = torch.load(path, weights_only=True)
    for key, value in changes.items():
        state[key] = value(state[key]) if callable(value) else value
    torch.save(state, path)


MATRIX, BANK = "blocks.0.attention.w_q.weight", "bank.weight"


def drop(dictionary, key):
    return {name: value for name, value in dictionary.items() if name != key}


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"not a checkpoint"),
    lambda path: os.truncate(path, path.stat().st_size // 2),
    lambda path: os.truncate(path, path.stat().st_size - 1),
    lambda path: torch.save(dict(model={}), path),
    lambda path: torch.save([1], path),
    lambda path: flip_bit(path, "data.pkl"),
    lambda path: flip_bit(path, "data/0"),
    lambda path: flip_bit(path, "data/20"),
    lambda path: change(path, step="24"),
    lambda path: change(path, losses=["x"]),
    lambda path: change(path, config=lambda c: {**c, "n_heads": 3}),
    lambda path: change(path, config=lambda c: {**c, "dim": 256}),
    lambda path: change(path, config=lambda c: {**c, "unknown": 3}),
    lambda path: change(path, meta={}),
    lambda path: change(path, flags=dict(seed=[1])),
    lambda path: change(path, model=lambda m: drop(m, "head.weight")),
    lambda path: change(path, model=lambda m: {**m, "head.weight": m["head.weight"].double()}),
    lambda path: change(path, step=23),
    lambda path: change(path, config=lambda c: {**c, "seq_len": 32.0}),
    lambda path: change(path, config=lambda c: {**c, "n_layers": 10 ** 9}),
    lambda path: change(path, meta=lambda m: drop(m, "files")),
    lambda path: change(path, meta=lambda m: {**m, "tokenizer": dict(name="bpe", pattern="x")}),
    lambda path: change(path, flags=lambda f: {**f, "lr_scale": "1"}),
    lambda path: change(path, flags=lambda f: {**f, "lr_scale": None}),
    lambda path: change(path, flags=lambda f: {**f, "dtype": "int8"}),
    lambda path: change(path, flags=lambda f: {**f, "seq_len": 16}),
    lambda path: change(path, flags=lambda f: drop(f, "lr_scale")),
    lambda path: change(path, model=lambda m: {**m, "head.weight": m["head.weight"] * math.nan}),
    lambda path: change(path, optimizers=lambda o: {**o, MATRIX: dict(x=o[MATRIX]["momentum_buffer"])}),
    lambda path: change(path, optimizers=lambda o: {
        **o, MATRIX: dict(momentum_buffer=o[MATRIX]["momentum_buffer"].bfloat16())}),
    lambda path: change(path, optimizers=lambda o: {**o, BANK: o[BANK] | dict(exp_avg=torch.ones(1))}),
    lambda path: change(path, optimizers=lambda o: drop(o, MATRIX)),
    lambda path: change(path, optimizers=lambda o: drop(o, BANK)),
    lambda path: change(path, optimizers=lambda o: {**o, BANK: drop(o[BANK], "exp_avg")}),
    lambda path: change(path, optimizers=lambda o: {**o, BANK: o[BANK] | dict(step=torch.ones(3))}),
    lambda path: change(path, optimizers=lambda o: {**o, BANK: o[BANK] | dict(step=torch.tensor(7.0))}),
    lambda path: change(path, optimizers=lambda o: {**o, BANK: [1]}),
    lambda path: change(path, optimizers=lambda o: {**o, "another.weight": o[BANK]}),
    lambda path: change(path, optimizers=lambda o: {**o, "bank.working_set.weight": [3]}),
    lambda path: change(path, optimizers=lambda o: list(o.values())),
])
def test_a_damaged_checkpoint(damage, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    damage(path)
    before = path.read_bytes()
    fails(train_gpt, ["--out_dir", tmp_path / "run", "--resume", "--max_steps", 30], "checkpoint.pt")
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [
    lambda o: drop(o, BANK), lambda o: {**o, BANK: {}}, lambda o: {**o, BANK: o[BANK] | dict(x=1)},
    lambda o: {**o, BANK: drop(o[BANK], "exp_avg")},
    lambda o: {**o, BANK: o[BANK] | dict(step=torch.tensor(7.0))}])
def test_a_damaged_bank_that_moves(damage, finished, tmp_path):
    """To host memory: its moments go with it."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    change(path, optimizers=damage)
    fails(train_gpt, ["--out_dir", tmp_path / "run", "--resume", "--max_steps", 30, "--bank_home", "host"],
          "checkpoint.pt")


def test_a_model_of_which_a_part_is_frozen_goes_on(tmp_path, finished):
    """It has no moments for what does not learn."""
    state = checkpoint(finished)
    frozen = {name: moments for name, moments in state["optimizers"].items() if "w_q" not in name}
    torch.save({**state, "optimizers": frozen}, tmp_path / "checkpoint.pt")
    model = GPT(GPTConfig(**state["config"]))
    for name, p in model.named_parameters():
        p.requires_grad_("w_q" not in name)
    muon, adamw = make_optimizers(model)
    assert run_folder.restore(tmp_path, model, [muon, adamw])[0] == state["step"]
    learns = [p.requires_grad for group in muon.param_groups for p in group["params"]]
    assert len(muon.state) == sum(learns) < len(learns)
    model.requires_grad_(True)
    with pytest.raises(UserError, match="checkpoint.pt"):
        run_folder.restore(tmp_path, model, make_optimizers(model))


@pytest.mark.parametrize("other", [
    lambda path: change(path, format=run_folder.FORMAT - 1), lambda path: change(path, format=0),
    lambda path: change(path, format=run_folder.FORMAT + 1),
    lambda path: change(path, flags=lambda f: {**f, "a_new_flag": 1}),
    lambda path: change(path, flags=lambda f: drop(f, "bank_home"))])
def test_a_checkpoint_of_another_version(other, finished, tmp_path):
    """It is not called damaged, and nobody is told to remove it."""
    shutil.copytree(finished, tmp_path / "run")
    other(tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt.* version") as error:
        train_gpt.main(["--out_dir", str(tmp_path / "run"), "--resume", "--max_steps", "30"])
    assert "damaged" not in str(error.value) and "remove" not in str(error.value)


def test_a_flag_that_agrees_with_the_default_of_a_run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for flags, fits in ((["--gate_value"], True), (["--no-gate_value"], False)):
        arguments = ["--out_dir", tmp_path / "run", "--resume", "--max_steps", 26, *flags]
        if fits:
            train_gpt.main(list(map(str, arguments)))
        else:
            fails(train_gpt, arguments, "--gate_value.*fit.*True")


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save(dict(step=Evil()), tmp_path / "checkpoint.pt")
    fails(train_gpt, ["--out_dir", tmp_path, "--prompt", "x"], "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


def test_a_loss_that_is_not_finite_stops_the_run(data_dir, tmp_path):
    flags = ("--lr_scale", 1e30, "--max_steps", 8, "--eval_every", 9)
    fails(train_gpt, command(data_dir, tmp_path / "run", *flags, "--save_every", 1), "finite.*lr_scale")
    if (tmp_path / "run" / "checkpoint.pt").exists():
        assert all(tensor.isfinite().all() for tensor in checkpoint(tmp_path / "run")["model"].values())
    fails(train_gpt, command(data_dir, tmp_path / "other", *flags), "loss.* finite.*lr_scale")
    assert not (tmp_path / "other" / "checkpoint.pt").exists()


@pytest.mark.parametrize("samples, flag", [(1, "--prompt"), (3, "--num_samples 3")])
def test_out_of_memory_of_a_sample_says_what_to_lower(samples, flag, finished, monkeypatch):
    """What it names can be lowered, and counts: --micro_batch does not."""
    def generate(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(GPT, "generate", generate)
    arguments = ["--out_dir", finished, "--prompt", "x", "--num_samples", samples]
    fails(train_gpt, arguments, f"^(?!.*micro).*{flag}")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_says_what_to_lower(error, data_dir, tmp_path, monkeypatch):
    def forward(*args):
        raise error

    monkeypatch.setattr(GPT, "forward", forward)
    fails(train_gpt, command(data_dir, tmp_path / "run"), "memory.*--micro_batch 4")


def test_ctrl_c_while_the_data_set_is_made(tmp_path):
    process = start("--device", "cpu", "--data_dir", tmp_path / "data", "--out_dir", tmp_path / "out")
    assert any("data set" in line for line in process.stdout)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and error.splitlines()[-1] and "Traceback" not in error
    assert not list(tmp_path.glob("data/*"))


def limited(kilobytes, script, arguments):
    """Runs a script that may write no file larger than this: as on a disk that is full."""
    code = ("import resource, runpy, sys; "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes * 1024},) * 2); "
            f"sys.argv = ['x'] + {list(map(str, arguments))!r}; "
            f"runpy.run_path({str(HERE / script)!r}, run_name='__main__')")
    return subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)


def test_a_full_disk(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    result = limited(20, "train_gpt.py", ["--out_dir", tmp_path / "run", "--resume", "--max_steps", 26])
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "checkpoint.pt" in result.stderr and "curves.png" in result.stdout
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 26
    result = limited(1, "train_gpt.py", ["--out_dir", tmp_path / "run", "--resume", "--max_steps", 40])
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "log.jsonl" in result.stderr


@pytest.mark.parametrize("before", [0, 1])
def test_two_ctrl_c_let_a_checkpoint_be_whole(before, tmp_path, monkeypatch):
    """An exception in the middle of torch.save may abort the program. before: how many come before it."""
    save = torch.save

    def interrupted(state, file):
        for _ in range(2 - before):
            signal.raise_signal(signal.SIGINT)
        save(state, file)

    monkeypatch.setattr(torch, "save", interrupted)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), train_gpt.stop_signals() as stop:
            for _ in range(before):
                signal.raise_signal(signal.SIGINT)
            run_folder.write_checkpoint(tmp_path / "checkpoint.pt", dict(step=7))
        assert stop == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)
    assert torch.load(tmp_path / "checkpoint.pt") == dict(step=7)


def test_a_signal_that_the_parent_ignores_stops_nothing():
    """As in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train_gpt.stop_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        assert stop == [signal.SIGTERM] and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_a_checkpoint_nothing_is_said_of_resuming(tmp_path, monkeypatch):
    def full(path, write):
        raise OSError(28, "no space", str(path))

    monkeypatch.setattr(run_folder, "write_file", full)
    for name, there in (("new", False), ("checkpoint.pt", True)):
        (tmp_path / name).touch()
        with pytest.raises(UserError) as error:
            run_folder.write_checkpoint(tmp_path / "checkpoint.pt", {})
        assert ("--resume" in str(error.value)) == there


def test_what_a_kill_left_half_written_goes(tmp_path):
    names = [".log.jsonl", ".checkpoint.pt", ".bank-3-0-of-2.pt", ".curves.png", ".tokenizer.tiktoken",
             ".codebook.npy", ".decoder.pt", ".samples_20.png", ".samples_20_codes.npy", ".samples_20.npz"]
    for name in (*names, ".mine.txt", ".samples.txt"):
        (tmp_path / f"{name}.0123456789abcdef").touch()
    with run_folder.only_run(tmp_path, resume=False):
        pass
    left = {path.name.rpartition(".")[0] for path in tmp_path.glob(".*")}
    assert left == {".mine.txt", ".samples.txt"}


def test_a_run_whose_name_matplotlib_would_hide_is_in_the_legend(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "_run").mkdir()
        (tmp_path / "_run" / "log.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n')
        run_folder.draw_curves([tmp_path / "_run"], tmp_path / "curves.png")
