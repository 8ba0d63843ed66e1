"""How experiments run: training runs over all GPUs, what they leave, tables, sentences and charts."""
import argparse
import concurrent.futures
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from command_line import Machine, resolve_flags
from move import GPT, GPTConfig
from optimizers import fast_bfloat16, make_optimizers
from prepare_data import load_dataset
from run_folder import read_checkpoint, read_log
from script import UserError, lock, make_folder, write_file
from train_gpt import DEFAULTS, TEXT_SETS, load, make_parser, padded, set_up_machine, train_text

FULL = dict(depth=8, seeds=3, steps=600, seq_len=1024, batch_tokens=65536, eval_tokens=1 << 20, evaluations=8)
QUICK = dict(depth=2, seeds=1, steps=30, seq_len=128, batch_tokens=512, eval_tokens=1 << 12, evaluations=3)

# ------------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass
class Run:
    """One training run: flags of train_gpt.py, and what is changed in it.

    note: names the change. change, optimizers_of, part: see train_text. look: called with (model, data) at
    the end; the dict that it returns is kept. keep: whether the last checkpoint is.
    """
    flags: dict
    note: str = ""
    change: Callable | None = None
    optimizers_of: Callable = make_optimizers
    part: tuple = (0, 1)
    look: Callable | None = None
    keep: bool = False

    @property
    def name(self):
        f = self.flags
        parts = [f["dataset"], f"d{f['depth']}", f"{f['max_steps']}x{f['batch_tokens']}", f["attention"],
                 f["memory"], f"m{round(f['move_scale'] * f['depth'] / 2)}", self.note, f"seed{f['seed']}"]
        return "-".join(part for part in parts if part)

    def arguments(self):
        """The flags as train_gpt.py reads them."""
        for flag, value in self.flags.items():
            if isinstance(value, bool):
                yield f"--{flag}" if value else f"--no-{flag}"
            elif value is not None:
                yield f"--{flag}={value}"


class Lab:
    """Settings of an experiment, where its runs lie, and its report."""

    def __init__(self, args, name):
        given = {key: value for key, value in vars(args).items() if value is not None}
        sizes = {**(QUICK if args.quick else FULL), **given}
        for key, most in dict(depth=1000, seeds=1000, steps=10**9).items():
            if not 1 <= sizes[key] <= most:
                raise UserError(f"--{key} must be from 1 to {most}, not {sizes[key]}")
        self.name, self.args, self.machines = name, args, []  # machines: of the runs
        self.depth, self.seeds, self.steps = sizes["depth"], sizes["seeds"], sizes["steps"]
        self.slots = max(1, round(self.depth / 2))  # M of ×1
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dataset = args.dataset or DEFAULTS["cuda" if self.device == "cuda" else "cpu"]["dataset"]
        given = dict(device=self.device, dataset=self.dataset, out_dir=args.out_dir)
        resolve_flags(given, DEFAULTS)  # checks them
        make_folder(args.out_dir, "--out_dir")
        if not getattr(args, "run", None):  # else no model is trained
            data = load(argparse.Namespace(data_dir=args.data_dir, dataset=self.dataset),
                        Machine(torch.device("cpu")), "text", TEXT_SETS)
            self.vocab_size = data.meta["vocab_size"]
        every = max(1, self.steps // sizes["evaluations"])
        self.flags = dict(dataset=self.dataset, data_dir=args.data_dir, device=self.device,
                          seq_len=sizes["seq_len"], batch_tokens=sizes["batch_tokens"], max_steps=self.steps,
                          eval_every=every, eval_tokens=sizes["eval_tokens"], log_every=every)
        depth = f"-d{args.depth}" if args.depth else ""
        self.report = args.out_dir / f"{name}-{self.dataset}{depth}{'-quick' * args.quick}.json"

    def runs(self, memory, n_slots=0, note="", depth=None, flags=None, **parts):
        """The same Run with each seed. parts: the Run's other fields."""
        depth = depth or self.depth
        flags = {**self.flags, "attention": "mha", "memory": memory if n_slots else "none", "depth": depth,
                 "move_scale": 2 * n_slots / depth, "save_every": self.steps, **(flags or {})}
        return [Run({**flags, "seed": seed}, note, **parts) for seed in range(self.seeds)]

    def config(self, memory, n_slots, depth=None, attention="mha"):
        return GPTConfig.from_depth(depth or self.depth, vocab_size=padded(self.vocab_size), memory=memory,
                                    n_slots=n_slots, seq_len=self.flags["seq_len"], attention=attention)

    def memory_parameters(self, *about):
        with torch.device("meta"):
            return GPT(self.config(*about)).parameter_counts()["memory"]

    def train(self, methods):
        """{label: runs} → {label: results of its runs}. Trains what is not done yet, on all GPUs."""
        folder = self.args.out_dir / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        different = {run.name: run for run in itertools.chain(*methods.values())}
        todo = [run for run in different.values() if not is_done(run, folder)]
        todo.sort(key=lambda run: run.flags["seed"])  # with the next seed all is compiled already
        gpus = torch.cuda.device_count() if self.device == "cuda" else 1
        print(f"{self.name}: {len(different)} runs, {len(todo)} to do"
              + (f", about {math.ceil(self.estimate(todo) / 60 / gpus)} min" if todo else "")
              + (" (--quick is for CPUs)" if todo and self.device != "cuda" and not self.args.quick else ""),
              flush=True)
        failed = []
        for run, error in self.finished(todo, folder, gpus):
            failed += [f"{run.name} ({error})"] if error else []
            found = error or f"{result(run, folder)['bits']:.4f} bits per byte"
            print(f"  {run.name}: {found}", flush=True)
        if failed:
            raise UserError(f"{len(failed)} runs failed, {failed[0]} first; see {folder}/<run>.txt; the same "
                            "command goes on")
        done = {label: [result(run, folder) for run in runs] for label, runs in methods.items()}
        self.machines = sorted({r["machine"] for results in done.values() for r in results})
        return done

    def finished(self, todo, folder, gpus):
        """Trains and yields (run, error or None) as they end."""
        if gpus == 1 or len(todo) == 1:
            yield from ((run, train_run(run, folder)) for run in todo)
        elif todo:
            context = multiprocessing.get_context("spawn")
            free = context.Queue()
            for gpu in range(gpus):
                free.put(gpu)
            with concurrent.futures.ProcessPoolExecutor(gpus, context, take_gpu, (free,)) as pool:
                futures = {pool.submit(train_run, run, folder): run for run in todo}
                for future in concurrent.futures.as_completed(futures):
                    try:
                        yield futures[future], future.result()
                    except concurrent.futures.BrokenExecutor:
                        yield futures[future], "its process was killed"

    def estimate(self, runs):
        """Seconds that the runs take on one GPU or CPU, from their operations and the speed of a matrix
        product, of which a training step reaches about a third."""
        n = 4096 if self.device == "cuda" else 1024
        dtype = torch.bfloat16 if fast_bfloat16(self.device) else torch.float32
        a = torch.randn(n, n, device=self.device, dtype=dtype)
        float((a @ a)[0, 0])
        start = time.perf_counter()
        for _ in range(5):
            a = a @ a / n
        float(a[0, 0])
        speed = 5 * 2 * n ** 3 / (time.perf_counter() - start) / 3
        total = len(runs) * (40 if self.device == "cuda" else 5)  # to start and to compile
        for flags in (run.flags for run in runs):
            slots = round(flags["move_scale"] * flags["depth"] / 2)
            with torch.device("meta"):
                model = GPT(self.config(flags["memory"], slots, flags["depth"], flags["attention"]))
            tokens = flags["max_steps"] * flags["batch_tokens"]
            total += 3 * sum(model.flops_per_token().values()) * tokens / speed
        return total

    def table(self, header, rows):
        """Prints a table in Markdown and keeps it."""
        lines = [header, ["---"] * len(header), *rows]
        print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines), flush=True)
        return [dict(zip(header, row, strict=True)) for row in rows]

    def write(self, table, sentences, panels=()):
        """The report: table, sentences, and a chart of panels (see draw)."""
        if len(self.machines) > 1:
            sentences = [*sentences, f"The runs are of {len(self.machines)} machines, so their speeds do not "
                                     f"compare: {'; '.join(self.machines)}."]
        for sentence in sentences:
            print(sentence)
        content = dict(command="python " + " ".join(sys.argv), machines=self.machines,
                       flags={key: str(value) for key, value in self.flags.items()}, table=table,
                       sentences=sentences)
        write_file(self.report, lambda file: file.write(json.dumps(content, indent=1).encode()))
        if panels:
            draw(panels, self.report.with_suffix(".png"))
        print(f"wrote {self.report}" + (" and its chart" if panels else ""))


def take_gpu(free):
    """A new process of the pool trains on a GPU of its own."""
    os.environ["LOCAL_RANK"] = str(free.get())


def is_done(run, folder):
    """Whether a run has ended, and left its log, what its look found, and the checkpoint that is kept."""
    path, settings = folder / run.name, folder / f"{run.name}.json"
    try:
        about, _, look = settings.read_text(errors="replace").splitlines()
        found = json.loads(look)
        if about != settings_of(run) or (run.look and found is None):
            return False
        steps = read_log(path, "val_bits_per_byte")[0]
        every, last = run.flags["eval_every"], run.flags["max_steps"]
        if steps != [*range(0, last, every), last] or not read_log(path, "tokens_per_s")[0]:
            return False
    except (OSError, ValueError):  # a file that is missing or damaged
        return False
    if run.keep:
        try:
            read_checkpoint(path, verify=True)
        except UserError:  # there is none, or one that is damaged or of another version
            return False
    return True


RECIPE = 6  # to be raised where a change of the code changes what a run finds


def settings_of(run):
    """What a result depends on, as JSON: the recipe, the flags and the data set."""
    flags = {key: value for key, value in run.flags.items() if key != "data_dir"}
    return json.dumps([RECIPE, flags, data_of(run).identity()], sort_keys=True)


def data_of(run):
    return load_dataset(Path(run.flags["data_dir"]) / run.flags["dataset"], check=False)


def train_run(run, folder):
    """Trains a run from its start; if another process does, waits for that. What it prints goes to <run>.txt
    → None, or what went wrong."""
    path, settings = folder / run.name, folder / f"{run.name}.json"
    with open(folder / f"{run.name}.txt", "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        try:
            lock(file)
            if is_done(run, folder):
                return None
            file.truncate(0)
            shutil.rmtree(path, ignore_errors=True)  # of a run that did not end
            settings.unlink(missing_ok=True)
            content = train_and_look(run, path)
        except KeyboardInterrupt:  # not as train_gpt.py says it
            raise KeyboardInterrupt("stopped; the same command trains this run from its start") from None
        except Exception as error:  # the other runs go on
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            torch._dynamo.reset()  # it remembers a limited number of models
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if not run.keep:
            (path / "checkpoint.pt").unlink()
        write_file(settings, lambda file: file.write(content.encode()))
    return None


def train_and_look(run, path):
    """What <run>.json holds, a line each: settings, machine and PyTorch, what `look` found."""
    given = vars(make_parser().parse_args([*run.arguments(), f"--out_dir={path}"]))
    args = resolve_flags(given, DEFAULTS)
    model, _ = train_text(args, set_up_machine(args), None, run.change, run.optimizers_of, run.part)
    found = run.look(model.eval(), data_of(run)) if run.look else None
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    return f"{settings_of(run)}\n{machine}, PyTorch {torch.__version__}\n{json.dumps(found)}\n"


def result(run, folder):
    """What a run that is done has left: see the keys."""
    path = folder / run.name
    keys = ("val_bits_per_byte", "g_0", "g_i", "rows_used", "tokens_per_s")
    logs = {key: read_log(path, key) for key in keys}
    steps, bits = logs["val_bits_per_byte"]
    speed = float(np.median(logs["tokens_per_s"][1] or [float("nan")]))
    seconds = [step * run.flags["batch_tokens"] / speed for step in steps]
    _, machine, look = (folder / f"{run.name}.json").read_text().splitlines()
    return dict(machine=machine, bits=bits[-1],
                curve=dict(steps=steps, bits=bits, seconds=seconds),
                tokens_per_s=speed, g_0=logs["g_0"][1], g_i=logs["g_i"][1], rows_used=logs["rows_used"][1],
                look=json.loads(look))


# ---------------------------------------------------------------------------------------------- reports


def mean(results, key="bits"):
    return float(np.mean([r[key] for r in results]))


def noise(results):
    """Standard deviation between seeds; 0 for one seed."""
    return float(np.std([r["bits"] for r in results], ddof=min(1, len(results) - 1)))


def spread(results):
    """'mean ± standard deviation (n)' of the results of one method."""
    between = f" ± {noise(results):.4f}" if len(results) > 1 else ""
    return f"{mean(results):.4f}{between} ({len(results)})"


def average(looks, key, form):
    """The mean of one number of several looks as text, '' if they do not have it."""
    return format(np.mean([look[key] for look in looks]), form) if looks and key in looks[0] else ""


def differences(results, others):
    """(mean, half of its 95 % interval by Student's t) of how many more bits per byte the first method has
    than the second. Runs with the same seed are pairs: they see the same batches and start alike, so that
    much of what a seed does drops out. One seed cannot tell: the interval is infinite."""
    pairs = [a["bits"] - b["bits"] for a, b in zip(results, others, strict=False)]
    n = len(pairs)
    if n == 1:
        return pairs[0], float("inf")
    t = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)[min(n, 10) - 2]  # a bit wide above ten
    return float(np.mean(pairs)), float(t * np.std(pairs, ddof=1) / n ** 0.5)


def differ(results, others):
    """By how much the first has more bits per byte than the second; 0 if seeds may do that."""
    difference, error = differences(results, others)
    return difference if abs(difference) > error else 0.0


def compare(label, results, other, others):
    """A sentence: which of two methods has fewer bits, by how much, and whether seeds alone do that."""
    difference, error = differences(results, others)
    between = "" if error == float("inf") else f" ± {error:.4f}"
    if not round(difference, 4):
        return f"{label} and {other} have the same bits per byte{between}."
    kind = "worse" if difference > 0 else "better"
    text = f"{label} is {abs(difference):.4f}{between} bits per byte {kind} than {other}"
    if not between:
        return text + " (one seed)."
    return text + (", more than seeds differ." if differ(results, others) else ", no more than seeds differ.")


def draw(panels, path):
    """A PNG of panels: dicts of lines {label: (x, y) or (x, y, spread)}, and what axes.set takes."""
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    shorten = EngFormatter(sep="")  # 2k, 5M; of 0.5 it would make 500m
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        panel = dict(panel)
        for label, (x, y, *error) in panel.pop("lines").items():
            axes.errorbar(x, y, *error, fmt=".-", capsize=3, label=label)
        axes.set(**panel)
        if axes.get_xscale() == "log":
            axes.xaxis.set_minor_formatter("")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda x, at: f"{x:g}" if x < 1 else shorten(x, at))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=90))


def mean_curve(results, against="steps"):
    """(x, y) of the mean validation curve of one method, without the first evaluation, which is far above."""
    x, y = (np.mean([r["curve"][key] for r in results], axis=0) for key in (against, "bits"))
    return x[1:], y[1:]
