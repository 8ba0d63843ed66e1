"""What a run leaves on disk, out/<run>/, and how it goes on from there.

    lock              empty; held while a process trains here
    log.jsonl         a JSON object a line, each with its step
    checkpoint.pt     all that the run needs to go on, and to be sampled from: see `save_checkpoint`
    bank-<step>-<process>-of-<n>.pt    the rows of a stored bank (move_store.py) that belong to it
    curves.png        the log as a figure
    tokenizer.tiktoken, codebook.npy or decoder.pt    a copy of what turns the tokens back

A checkpoint is the zip file of torch.save, which holds a CRC-32 of each tensor: `restore` verifies them.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import zipfile
from pathlib import Path

import torch

from move import GPT, GPTConfig, ValueBank
from move_store import (
    StoredBank,
    content_to_save,
    load_plain,
    load_stored,
    processes,
    stored_banks,
)
from optimizers import Muon
from prepare_data import check_meta, decoder_files, identity
from script import (
    UserError,
    check_form,
    first_line,
    interrupts_kept,
    lock,
    make_folder,
    require_utf8,
    write_file,
)

# ------------------------------------------------------------------------------ the folder and its lock


ROWS = r"bank-\d+-\d+-of-\d+\.pt"  # see rows_name
WHOLE = rf"checkpoint|{ROWS}|curves|log|tokenizer|codebook|decoder|samples_\w+"  # what write_file writes
LEFT = rf"\.({WHOLE})(\.(pt|png|jsonl|tiktoken|npy|npz))?\.[0-9a-f]{{16}}"
FIRST_RECORD = b'{"step": 0, "val_bits_per_'  # so starts each log of ours


def is_our_log(path):
    """Whether log.jsonl is of a run of ours, also if a kill cut its first line short."""
    with open(path, "rb") as file:
        return FIRST_RECORD.startswith(file.read(len(FIRST_RECORD)))


@contextlib.contextmanager
def only_run(folder, resume):
    """Makes the folder of a run and keeps other runs out of it while the block lasts.

    UserError if another process trains in it, if it holds somebody's own files and no run, or, without
    `resume`, if it holds a run.
    """
    make_folder(folder, "--out_dir")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {"lock"}
    if names and not (folder / "checkpoint.pt").exists() and not (
            (folder / "log.jsonl").is_file() and is_our_log(folder / "log.jsonl")):
        raise UserError(f"{folder} holds files that are not a run's; give another --out_dir")
    # Neither truncated nor followed where it is a link: whatever lies there stays as it is.
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        lock(file, f"another process trains in {folder}; wait for it, or give another --out_dir")
        if not resume and (folder / "checkpoint.pt").exists():
            raise UserError(f"{folder} holds a run already; go on with --resume (and a larger --max_steps, "
                            "if it has ended), or give another --out_dir")
        for path in folder.glob(".*.????????????????"):  # what a kill left of files half written
            if re.fullmatch(LEFT, path.name):
                path.unlink()
        yield
    finally:
        os.close(file)


def copy_decoder(data, folder):
    """Copies into the run's folder what turns the tokens of a data set back."""
    for name in decoder_files(data.meta):
        with open(data.folder / name, "rb") as source:
            write_file(folder / name, lambda file, source=source: shutil.copyfileobj(source, file))


class Log:
    """Lines for people on the screen, and the same as JSON objects in log.jsonl."""

    def __init__(self, path, keep_to_step=None):
        """keep_to_step: when a run resumes, what it wrote after its checkpoint is dropped."""
        lines = []
        if keep_to_step is not None and path.is_file():
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, RecursionError):  # a line that a kill cut short
                    record = json.loads(line)
                    if isinstance(record, dict) and record.get("step") in range(keep_to_step + 1):
                        lines.append(line + b"\n")
        write_file(path, lambda file: file.write(b"".join(lines)))
        self.path, self.file = path, open(path, "a")

    def __call__(self, text, **record):
        print(text, flush=True)
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(self.path)) from None


# ----------------------------------------------------------------------------------------- checkpoints

FORMAT = 8  # also raised where a rate changes: a run must not go on at another one
FORM = dict(format=range(FORMAT, FORMAT + 1), step=range(10**9 + 1), losses=list, flags=dict, config=dict,
            data=dict, meta=dict, model=dict, optimizers=dict, rows=list)
MUON, ADAMW = {"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}  # the states of a parameter


def save_checkpoint(folder, model, optimizers, rows, **rest):
    """Writes checkpoint.pt, whole or not at all. UserError if it cannot be written; the old one is kept.

    rows: the checksums of the files that save_rows has written, in the order of the processes; [] if there
    is no stored bank. checkpoint.pt is written last: so all files together are whole, or the old ones are.
    rest: step; losses of the steps since the last line of the log; flags of the run; identity of the data
    set as `data`; its `meta`. Of the optimizers only their states are kept, by the name of the parameter:
    rates follow from flags and step.
    """
    apart = tuple(f"{bank}." for bank in stored_banks(model))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(apart)}
    states = {name: optimizer.state[p] for name, p in model.named_parameters() for optimizer in optimizers
              if isinstance(optimizer, torch.optim.Optimizer)  # what StoredAdamW has is with the rows
              and p in optimizer.state}
    write_checkpoint(folder / "checkpoint.pt", dict(
        format=FORMAT, config=dataclasses.asdict(model.config), model=tensors, rows=rows, optimizers=states,
        **rest))
    named = {rows_name(rest["step"], i, len(rows)) for i in range(len(rows))}
    for path in folder.glob("bank-*.pt"):
        if re.fullmatch(ROWS, path.name) and path.name not in named:
            path.unlink()


def write_checkpoint(path, state):
    """Writes one of its files. UserError if it cannot be written."""
    try:
        with interrupts_kept(at_once=False):
            write_file(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:
        there = (path.parent / "checkpoint.pt").exists()
        then = "--resume from the one before, which is kept" if there else "start again, there is none yet"
        raise UserError(f"cannot write checkpoint {path} ({first_line(error)}); make room and {then}"
                        ) from None


def rows_name(step, process, n):
    """With n in it, so that a run that goes on with other processes overwrites none at the same step."""
    return f"bank-{step}-{process}-of-{n}.pt"


def save_rows(folder, model, step):
    """Writes this process's file of the rows of stored banks → its checksum; 0 without such banks."""
    if not stored_banks(model):
        return 0
    path = folder / rows_name(step, *processes())
    write_checkpoint(path, content_to_save(model))
    return checksum(path)


def checksum(path):
    """48 bits, of the checksums that the zip file of torch.save has of its parts."""
    with zipfile.ZipFile(path) as archive:
        parts = [(info.filename, info.file_size, info.CRC) for info in archive.infolist()]
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


@contextlib.contextmanager
def damage_named(path):
    """Whatever fails inside is a damaged checkpoint, and becomes a UserError that names it."""
    try:
        yield
    except (OSError, MemoryError, torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # there is no end to what bytes at random make a reader raise
        raise UserError(f"checkpoint {path} is damaged ({first_line(error)}); "
                        "remove it, or give another --out_dir") from None


def other_version(path, difference):
    return UserError(f"checkpoint {path} is of another version of this program ({difference}); use that "
                     "version, or give another --out_dir")


def require(true, problem):
    if not true:
        raise ValueError(problem)


def read_checkpoint(folder, verify=False):
    """The dict that save_checkpoint wrote, its form checked, tensors on the CPU. UserError if it is missing
    or damaged. verify: each bit is read and checked, else tensors stay on disk until they are used."""
    path = folder / "checkpoint.pt"
    require_utf8(path, "--out_dir")
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}; train first, or give the --out_dir of a run")
    with damage_named(path):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=not verify)
        if verify:
            check_archive(path)
        found = state.get("format") if isinstance(state, dict) else None
        if type(found) is int and 0 <= found != FORMAT:
            raise other_version(path, f"its format is {found}, not {FORMAT}")
        check_form(state, FORM, "")
        require(all(type(loss) is float for loss in state["losses"]), "losses are no numbers")
        require(all(type(flag) is str for flag in state["flags"]), "flags have no names")
        require(all(type(number) is int for number in state["rows"]), "rows are no checksums")
        check_config(state["config"], state["model"], bool(state["rows"]))
        require(state["optimizers"].keys() <= state["model"].keys(), "optimizers have other parameters")
        meta, config = check_meta(state["meta"]), state["config"]
        fits = identity(meta) == state["data"] and 0 <= config["vocab_size"] - meta["vocab_size"] < 64 and (
            meta["kind"] == "text" or config["seq_len"] == math.prod(meta["grid"]))
        require(fits, "its data set does not fit")
    return state


def check_config(values, tensors, stored):
    """ValueError unless these are the fields of a GPTConfig, and these the names and shapes of its GPT; its
    banks are not among them if they are `stored` in files of their own."""
    fields = {field.name: field.type for field in dataclasses.fields(GPTConfig)}
    require(values.keys() == fields.keys() and all(isinstance(values[name], fields[name]) for name in fields)
            and values["n_layers"] <= len(tensors), "config has other fields")
    with torch.device("meta"):
        model = GPT(GPTConfig(**values))
    apart = {f"{name}.weight" for name in banks_of(model)} if stored else ()
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in apart}
    other = sorted(expected.keys() ^ tensors.keys())
    require(not other, f"model has other tensors: {other}")
    for name, tensor in tensors.items():
        require(tensor.shape == expected[name].shape, f"model.{name} has not the shape of its config")


def restore(folder, model, optimizers=()):
    """Fills model and optimizers from the run's checkpoint → (step, losses). The banks may live
    elsewhere than they did, and be dealt out to another number of processes.

    UserError if any bit of it has changed, or if it has not exactly the tensors of this model.
    """
    path, stored = folder / "checkpoint.pt", stored_banks(model)
    while True:
        state = read_checkpoint(folder, verify=True)
        try:
            with damage_named(path):
                files = read_rows(folder, state) if state["rows"] else {}
            break
        except UserError:  # a run that trains on may have replaced its files meanwhile
            if read_checkpoint(folder)["step"] == state["step"]:
                raise
    step, names = state["step"], banks_of(model)
    with damage_named(path):
        moments, trains = state["optimizers"], bool(optimizers)
        if stored and not files:
            files = {name: rows_in_checkpoint(state, f"{name}.weight") for name in names}
        for name in names:
            if name in stored:
                load_stored(stored[name], files[name])
            elif files:
                weight = model.get_submodule(name).weight
                *betas, eps = files[name][0][0]["adam"].tolist()
                if not trains:
                    load_plain(weight.data, files[name], eps)
                    continue
                m, v = (torch.zeros(weight.shape, dtype=weight.dtype) for _ in range(2))
                load_plain(weight.data, files[name], eps, (m, v), betas)
                if step:
                    moments[f"{name}.weight"] = dict(step=torch.tensor(float(step)), exp_avg=m, exp_avg_sq=v)
        weights = {name: tensor for name, tensor in state["model"].items()
                   if name not in {f"{bank}.weight" for bank in stored}}
        for name, tensor in model.state_dict().items():
            if name in weights:
                check_tensor(weights[name], tensor, f"model.{name}")
        model.load_state_dict(weights, strict=False)  # check_config has looked at the names
        name_of = {p: name for name, p in model.named_parameters()}
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.Optimizer):  # StoredAdamW has its moments with the rows
                restore_optimizer(optimizer, moments, name_of, step)
    return step, state["losses"]


def check_archive(path):
    with zipfile.ZipFile(path) as archive:
        require(not (name := archive.testzip()), f"{name} has another checksum")


def banks_of(model):
    """Names of the banks of a GPT."""
    return [name for name, module in model.named_modules()
            if isinstance(module, (ValueBank, StoredBank)) and not name.endswith("working_set")]


def rows_in_checkpoint(state, name):
    """As read_rows, of the weight of a bank that is in checkpoint.pt itself."""
    p, step, moments = state["model"][name], state["step"], state["optimizers"].get(name)
    if step:
        check_moments(moments, ADAMW, p, step, name)
    m, v = (moments[key] if step else torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq"))
    last = v.flatten(1).any(1) * step  # a row that was never in a batch has no moments to fade
    return [(dict(rows=torch.stack((p, m, v), dim=1), last=last, c=torch.zeros(step + 1).double()), 0, 1)]


def read_rows(folder, state):
    """The rows of stored banks: {name: [(dict of rows, last, c and adam, first id, stride) of each file]}."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**state["config"]))
    shapes = {name: model.get_submodule(name).weight.shape for name in banks_of(model)}
    files, step, n = {name: [] for name in shapes}, state["step"], len(state["rows"])
    rank, world_size = processes()
    for process, number in enumerate(state["rows"]):
        if n == world_size and process != rank:
            continue  # another process reads it
        path = folder / rows_name(step, process, n)
        require(path.exists(), f"its file {path.name} is missing")
        with damage_named(path):
            require(checksum(path) == number, "it belongs to another checkpoint")
            check_archive(path)
            content = torch.load(path, "cpu", weights_only=True, mmap=True)
            require(content.keys() == shapes.keys(), "it has other banks")
            for name, (V, M, d) in shapes.items():
                check_rows(content[name], len(range(process, V, n)), M, d, step)
                files[name].append((content[name], process, n))
    return files


def check_rows(state, n, n_slots, dim, step):
    """ValueError unless this is the state of n rows (M, d). `pieces` checks later that they are finite."""
    require(state.keys() == {"rows", "last", "c", "adam"} and all(map(torch.is_tensor, state.values())),
            "it has other entries")
    rows = state["rows"]
    require(rows.shape == (n, 3, n_slots, dim) and rows.is_floating_point(), "its rows have another shape")
    last, c, adam = state["last"], state["c"], state["adam"]
    require(last.shape == (n,) and last.dtype == torch.int64 and ((0 <= last) & (last <= step)).all(),
            "its rows have done other steps")
    require(c.shape == (step + 1,) and c.dtype == torch.float64 and c.isfinite().all(), "its rates are wrong")
    require(adam.shape == (3,) and adam.dtype == torch.float64 and (0 <= adam).all() and (adam < 1).all(),
            "its betas or eps are not from 0 to 1")


def check_tensor(tensor, expected, name):
    """ValueError unless the tensor is like the expected one, with finite numbers."""
    require(torch.is_tensor(tensor) and tensor.shape == expected.shape and tensor.dtype == expected.dtype
            and tensor.is_contiguous(), f"{name} is no {expected.dtype} of shape {tuple(expected.shape)}")
    require(tensor.isfinite().all(), f"{name} has a number that is not finite")


def check_moments(state, keys, p, step, name):
    """ValueError unless this is an optimizer's whole state of a parameter like p after `step` steps."""
    require(type(state) is dict and state.keys() == keys, f"{name} has not {', '.join(sorted(keys))}")
    for key, tensor in state.items():
        check_tensor(tensor, torch.tensor(0.0) if key == "step" else p, f"{key} of {name}")
    # AdamW counts in float32, which ends at 2²⁴.
    require(state.get("step", step) == min(step, 1 << 24), f"{name} has done other steps")


def restore_optimizer(optimizer, states, name_of, step):
    """Fills an optimizer from states of parameters by name. ValueError unless there is the whole state of
    each parameter that learns; of none before the first step."""
    found = {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        name = name_of[p]
        require((name in states) == bool(step) or not p.requires_grad, f"{name} has done other steps")
        if name in states:
            check_moments(states[name], MUON if isinstance(optimizer, Muon) else ADAMW, p, step, name)
            found[i] = states[name]
    optimizer.load_state_dict(dict(state=found, param_groups=optimizer.state_dict()["param_groups"]))


def newest_run(kind, parent=Path("out")):
    """The folder in `parent` with the newest checkpoint of a run of this kind, 'text' or 'image'."""
    paths = sorted(parent.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in paths:
        if read_checkpoint(path.parent)["meta"]["kind"] == kind:
            return path.parent
    raise UserError(f"there is no checkpoint of a run on {kind} data in {parent}; train first, "
                    "or give --out_dir")


# ---------------------------------------------------------------------------------------------- curves


def read_log(folder, key):
    """(steps, values) of one key of a run's log."""
    records = []
    for line in (folder / "log.jsonl").read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # a line that a kill cut short
            record = json.loads(line)
            if isinstance(record, dict) and {"step", key} <= record.keys():
                records.append(record)
    return [record["step"] for record in records], [record[key] for record in records]


def draw_curves(folders, path):
    """A PNG of one or several runs: training loss and validation bits against steps; the mean gates of each
    layer that has a router, at the last evaluation and against steps."""
    from matplotlib.figure import Figure  # takes half a second: not for those who only sample

    figure = Figure(figsize=(10, 7), layout="constrained")
    (loss, bits), (layers, gates) = figure.subplots(2, 2)
    later = []  # validation after the first evaluation, which is far above the others
    for i, folder in enumerate(folders):
        color, name = f"C{i}", folder.name if len(folder.name) <= 30 else "…" + folder.name[-29:]
        name = re.sub("^_", "\u200b_", name.replace("$", r"\$"))  # it is no formula, and not to be hidden
        loss.plot(*read_log(folder, "loss"), color=color, label=name)
        for unit in ("bits per byte", "bits per image token"):
            steps, values = read_log(folder, "val_" + unit.replace(" ", "_"))
            if steps:
                bits.plot(steps, values, ".-", color=color, label=f"{name}: {values[-1]:.3f}")
                bits.set_ylabel(unit)
                later += values[1:]
        for key, style in (("g_0", "-"), ("g_i", "--")):
            steps, values = read_log(folder, key)
            if steps and values[-1]:
                label = f"{name} {key}"
                layers.plot(range(1, len(values[-1]) + 1), values[-1], "o" + style, color=color, label=label)
                for j, layer in enumerate(zip(*values, strict=True)):
                    # a later layer is darker
                    gates.plot(steps, layer, style, color=color, linewidth=1,
                               alpha=0.25 + 0.75 * (j + 1) / len(values[-1]), label=None if j else label)
    loss.set(title="training loss", xlabel="step", ylabel="nats per token")
    bits.set(title="validation", xlabel="step")
    if later:
        margin = 0.05 * (max(later) - min(later)) + 0.01
        bits.set_ylim(min(later) - margin, max(later) + margin)
    layers.set(title="gates at the last evaluation: mean of each layer", xlabel="layer with a router",
               ylabel="gate")
    gates.set(title="gates: a line a layer, later layers darker", xlabel="step", ylabel="gate")
    layers.xaxis.get_major_locator().set_params(integer=True)
    for axes in (loss, bits, layers, gates):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center")
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=100))


def update_curves(folder):
    """Draws curves.png anew. A figure is no reason to end a run: what goes wrong is one line."""
    try:
        draw_curves([folder], folder / "curves.png")
    except Exception as error:
        print(f"{folder / 'curves.png'} is not drawn: {first_line(error)}", flush=True)
