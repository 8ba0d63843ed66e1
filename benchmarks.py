"""Checks and measurements of trained and of random models: the commands words, digits, overhead, store,
decode and curves of experiments.py."""
import argparse
import collections
import dataclasses
import gc
import itertools
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import move_store
from command_line import ends_together, set_up_machine
from lab import draw
from move import GPT, GPTConfig, ValueBank, sample
from move_store import StoredAdamW, borrow, copy_rows, empty_bank, host_memory, ids_of, prefetch, stored_banks
from optimizers import make_optimizers
from prepare_data import load_dataset, load_digits, split_images, state_of
from run_folder import draw_curves, read_checkpoint
from script import UserError, first_line, write_file
from train_gpt import build, check_same_data, compile_parts, load_run, padded, sum_gradients


def read_samples(path):
    """(images uint8 (N, h, w, 3), classes (N,)) of a file that train_image.py --save_npz wrote."""
    state_of(path)
    try:
        with np.load(path, allow_pickle=False) as samples:
            images, classes = samples["arr_0"], samples["arr_1"]
    except (OSError, MemoryError):
        raise
    except Exception as error:  # there is no end to what bytes at random make a reader raise
        raise UserError(f"{path} is no file of train_image.py --save_npz ({error})") from None
    if images.shape[1:] != (8, 8, 3) or images.dtype != np.uint8 or not len(images):
        raise UserError(f"{path} has images of shape {images.shape} and {images.dtype}, expected digits, "
                        "uint8 of shape (N, 8, 8, 3)")
    if classes.shape != images.shape[:1] or not np.isin(classes, range(10)).all():
        raise UserError(f"{path} has not a class from 0 to 9 for each image")
    return images, classes


def digits(path, seed=0, steps=600):
    """Trains a small convolutional network on the real training scans; prints how many of the real held-out
    scans it gets right, how many generated digits it takes for the class that was asked for, and whether
    these are copies."""
    generated, asked = read_samples(path)
    (train, labels), (held_out, held_out_labels) = split_images(*load_digits())
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1),
                            nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)

    def pixels(images):
        return torch.from_numpy(images[..., 0]).float().unsqueeze(1) / 255

    x, y = pixels(train), torch.from_numpy(labels)
    for _ in range(steps):
        batch = torch.randint(len(x), (128,))
        F.cross_entropy(network(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()

    @torch.inference_mode()
    def agree(images, classes):
        return (network(pixels(images)).argmax(1) == torch.from_numpy(classes)).float()

    print(f"real scans, held out: {agree(held_out, held_out_labels).mean():.1%} of {len(held_out)} are right")
    right = agree(generated, asked)
    print(f"generated digits: {right.mean():.1%} of {len(generated)} are what was asked for; by class "
          + " ".join(f"{right[torch.from_numpy(asked) == c].mean():.0%}" for c in np.unique(asked)))

    def distance(images):  # root mean squared difference to the nearest training scan, in gray levels of 256
        return torch.cdist(pixels(images).flatten(1), x.flatten(1)).min(1).values.mean() * 255 / 8

    print(f"from the nearest training scan they differ by {distance(generated):.0f} gray levels, held-out "
          f"scans by {distance(held_out):.0f}")


# --------------------------------------------------------------------------------------- overhead

VARIANTS = ["standard", "lave-x1", "move-x1", "move-x4", "move-x8",
            "move-x1-reference", "move-x4-reference", "move-x8-reference"]
MICRO_BATCHES = 4  # of an optimizer step


def config_of(name, args, vocab_size, end):
    """(GPTConfig, whether the name has this end) of a variant: standard, lave-x<scale> or move-x<scale>,
    perhaps with the end. UserError for another name."""
    if not (match := re.fullmatch(rf"(?:standard|(lave|move)-x(\d+(?:\.\d+)?))({end})?", name)):
        raise UserError(f"--variants: {name} is unknown; there are standard, lave-x<scale> and "
                        f"move-x<scale>, also with {end}")
    memory, scale, ended = match.groups()
    try:
        config = GPTConfig.from_depth(args.depth, float(scale or 0), vocab_size=vocab_size,
                                      seq_len=args.seq_len, memory=memory or "none")
        return config, ended is not None
    except ValueError as error:
        raise UserError(error) from None


def at_least_one(args, *flags):
    """UserError for a flag with a value below 1."""
    for flag in flags:
        if (least := np.min(getattr(args, flag))) < 1:
            raise UserError(f"--{flag} must be at least 1, not {least}")


class Variant:
    """One model that is measured: see config_of; with -reference it has no kernels."""

    def __init__(self, name, args, vocab_size):
        config, self.reference = config_of(name, args, vocab_size, "-reference")
        from move_fast import zero_grad  # needs Triton
        torch.manual_seed(0)
        self.name, self.before = name, torch.cuda.memory_allocated()  # bytes of the variants before this one
        self.model = build(config, argparse.Namespace(dtype="bfloat16", bank_dtype=args.bank_dtype,
                                                      bank_home="gpu", kernels=not self.reference), "cuda")
        self.zero_grad = nn.Module.zero_grad if self.reference else zero_grad
        self.optimizers = make_optimizers(self.model)
        self.compiled = compile_parts(self.model)
        self.zero_grad(self.model)
        self.forward_backward, self.step_ms, self.losses, self.peak = [], [], [], 0

    def banks(self):
        return [module for module in self.model.modules() if isinstance(module, ValueBank)]

    def step(self, batches):
        """An optimizer step; its times in ms: of forward and backward of a micro-batch, and of the
        optimizers, with zero_grad."""
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        for i, (idx, targets) in enumerate([batches[-1], *batches]):
            if i == 1:  # the first one is not timed: it keeps the GPU busy while the CPU gets ahead
                start.record()
            loss = self.compiled(idx, targets)
            loss.backward()
        middle.record()
        move_store.KERNELS = not self.reference  # of AdamW
        for optimizer in self.optimizers:
            optimizer.step()
        self.zero_grad(self.model)
        end.record()
        self.losses.append(loss.item())
        return start.elapsed_time(middle) / len(batches), middle.elapsed_time(end)

    def bank_bytes(self):
        """Of the memory's parameters, gradients and optimizer state."""
        return sum(4 * bank.weight.numel() * bank.weight.element_size() for bank in self.banks())


def token_ids(args):
    """(ids (n,) int64 on the GPU, vocabulary) of one step: of --dataset, or drawn from a 1/rank law."""
    length = args.tokens * MICRO_BATCHES + 1
    if args.dataset:
        data = load_dataset(args.data_dir / args.dataset)
        vocab_size, ids = padded(data.meta["vocab_size"]), data.train[:length].astype(np.int64)
        if len(ids) < length:
            raise UserError(f"{data.folder} has {len(ids)} training tokens, not {length}; lower --tokens")
    else:
        rng, vocab_size = np.random.default_rng(0), args.vocab_size
        law = 1 / np.arange(1, vocab_size + 1)
        ids = rng.permutation(vocab_size)[rng.choice(vocab_size, length, p=law / law.sum())]
    return torch.from_numpy(ids).to("cuda"), vocab_size


def overhead(args):
    """Times a training step of each variant, in another order in each round, and prints each beside the
    first one: median and spread (smallest to largest) of all rounds. The last figure of GPU memory is
    without the bank's own parameters, gradients and optimizer state."""
    at_least_one(args, "tokens", "seq_len", "vocab_size", "rounds")
    if args.tokens % args.seq_len:
        raise UserError(f"--tokens {args.tokens} is not a multiple of --seq_len {args.seq_len}")
    if not torch.cuda.is_available():
        raise UserError("overhead measures a CUDA device, and there is none that PyTorch can use")
    torch.set_float32_matmul_precision("high")
    ids, vocab_size = token_ids(args)
    batches = [tuple(ids[shift:][i * args.tokens:(i + 1) * args.tokens].view(-1, args.seq_len)
                     for shift in (0, 1)) for i in range(MICRO_BATCHES)]
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, depth {args.depth}, vocabulary "
          f"{vocab_size:,}, bank in {args.bank_dtype}, {args.tokens:,} tokens a micro-batch with "
          f"{len(batches[0][0].unique()):,} different ids, {MICRO_BATCHES} micro-batches a step, "
          f"{args.rounds} rounds", flush=True)

    variants = []
    for name in args.variants:
        variant = None
        try:
            start = time.time()
            variant = Variant(name, args, vocab_size)
            for _ in range(3):  # compiles
                torch.cuda.reset_peak_memory_stats()
                variant.step(batches)
            variant.peak = torch.cuda.max_memory_allocated() - variant.before
            variants.append(variant)
            print(f"{name}: ready after {time.time() - start:.0f} s", flush=True)
        except torch.OutOfMemoryError:
            if not variants:
                raise UserError(f"out of memory with {name}, the first variant; lower --tokens") from None
            print(f"{name}: out of memory", flush=True)
            del variant
            gc.collect()
            torch.cuda.empty_cache()
    rng = np.random.default_rng(0)
    for _ in range(args.rounds):
        for i in rng.permutation(len(variants)):  # a GPU is slower after work that took much power
            times = variants[i].step(batches)
            variants[i].forward_backward.append(times[0]), variants[i].step_ms.append(times[1])

    rows = report_overhead(variants, args.tokens)
    if len(rows) > 1:
        draw_overhead(rows, args.out)


def report_overhead(variants, tokens):
    """Prints the table → [(name, median, smallest, largest)] of forward and backward over the first."""
    base, rows = variants[0], []
    over = f"over {base.name}"
    print(f"| variant | forward + backward, ms | {over} | FLOPs {over} | optimizers, ms a step | tokens/s | "
          f"peak, GiB | {over} without the bank's own, GiB | loss, first to last |\n" + "|---" * 9 + "|")
    for v in variants:
        ms, step_ms = np.median(v.forward_backward), np.median(v.step_ms)
        ratios = np.array(v.forward_backward) / np.array(base.forward_backward)  # round by round
        middle, low, high = (f(ratios) - 1 for f in (np.median, np.min, np.max))
        flops, least = (sum(model.flops_per_token().values()) for model in (v.model, base.model))
        speed = tokens * MICRO_BATCHES / (MICRO_BATCHES * ms + step_ms) * 1000
        extra = (v.peak - v.bank_bytes()) - (base.peak - base.bank_bytes())
        rows.append((v.name, middle, low, high))
        print(f"| {v.name} | {ms:.2f} ({min(v.forward_backward):.2f} to {max(v.forward_backward):.2f}) | "
              f"{middle:+.1%} ({low:+.1%} to {high:+.1%}) | {flops / least - 1:+.2%} | {step_ms:.1f} | "
              f"{speed:,.0f} | {v.peak / 2**30:.2f} | {extra / 2**30:+.2f} | {v.losses[0]:.3f} to "
              f"{v.losses[-1]:.3f} |", flush=True)
    return rows


def draw_overhead(rows, path):
    """A bar for each variant but the first: how much longer its forward and backward take. rows: (name,
    median, smallest, largest)."""
    names, middle, low, high = zip(*rows[1:], strict=True)
    middle, low, high = (100 * np.array(x) for x in (middle, low, high))
    figure = Figure(figsize=(7, 0.5 * len(names) + 1), layout="constrained")
    axes = figure.subplots()
    colors = ["#999" if "reference" in name else "#36c" for name in names]
    bars = axes.barh(names, middle, xerr=(middle - low, high - middle), color=colors)
    axes.bar_label(bars, fmt="%+.1f %%", padding=4)
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.set_xlabel(f"forward + backward over {rows[0][0]}, %")
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=120))
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------- a bank elsewhere

PARTS = "rows", "compute", "gradients", "optimizers"


class Home:
    """A model whose bank has this home, and its training steps. For one process 'gpu' is a plain bank."""

    def __init__(self, home, config, machine):
        from move_fast import zero_grad  # needs Triton
        torch.manual_seed(0)
        self.home, self.machine, cuda = home, machine, machine.device.type == "cuda"
        dtype = "bfloat16" if cuda else "float32"
        self.before = torch.cuda.memory_allocated() if cuda else 0  # bytes of the models before this one
        args = argparse.Namespace(dtype=dtype, bank_dtype=dtype, bank_home=home, kernels=cuda)
        self.model = build(config, args, machine.device)
        self.zero_grad = zero_grad if args.kernels else nn.Module.zero_grad
        self.optimizers = make_optimizers(self.model)
        self.compiled = compile_parts(self.model) if cuda else self.model
        self.seconds, self.loss, self.peak = [], None, 0

    def bank_bytes(self):
        """Of this GPU's memory that the bank takes: rows or working set, gradients, moments, seats."""
        stored = [bank.rows.near for bank in stored_banks(self.model).values()]
        weights = [m.weight for m in self.model.modules() if isinstance(m, ValueBank)]
        tensors = [*weights, *weights, *(stored or weights + weights)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def measure_peak(self, batches):
        """Of GPU memory, while no model is there that was made later."""
        if self.machine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.steps(batches)
            self.peak = torch.cuda.max_memory_allocated() - self.before

    def rows_moved(self):
        return sum(getattr(bank.rows, "moved", 0) for bank in stored_banks(self.model).values())

    def steps(self, batches, lap=lambda part: None):
        """A step for each of `batches`, [(idx, targets), …] each, after which the first comes again → seconds
        a step. lap: called at the start, and at the end of each part of a step with its name."""
        self.machine.sum([0])  # waits for the other processes
        start = time.perf_counter()
        lap("start")
        for now, later in itertools.pairwise([*batches, batches[0]]):
            borrow(self.model, [idx for idx, _ in now])
            prefetch(self.model, [idx for idx, _ in later])
            lap("rows")
            self.zero_grad(self.model)
            for batch in now:
                idx, targets = (t.to(self.machine.device, non_blocking=True) for t in batch)
                loss = self.compiled(idx, targets) / len(now) / self.machine.world_size
                loss.backward()
            lap("compute")
            if self.machine.world_size > 1:
                sum_gradients(self.model)
            lap("gradients")
            for optimizer in self.optimizers:
                optimizer.step()
                lap("rows" if isinstance(optimizer, StoredAdamW) else "optimizers")
        self.loss, = self.machine.sum([loss.item() * len(now)])  # waits for the GPU
        return (time.perf_counter() - start) / len(batches)

    def parts(self, batches):
        """Milliseconds of each of PARTS in a step, where each one waits for the last: rows that come, their
        gradients that go and their update; forward and backward; the sum over the processes of all other
        gradients; the other optimizers."""
        spent, last = collections.Counter(), 0

        def lap(part):
            nonlocal last
            if self.machine.device.type == "cuda":
                torch.cuda.synchronize()
            last, before = time.perf_counter(), last
            spent[part] += 1000 * (last - before) / len(batches)

        self.steps(batches, lap)
        return [spent[part] for part in PARTS]


def link_speed(device, size=1 << 30):
    """GB/s of rows from pinned host memory to the GPU, and back."""
    memory = host_memory((size // 65536, 1, 16384), torch.float32, device)[1]
    here = torch.zeros_like(memory, device=device)
    rows, every = torch.randperm(len(memory), device=device), torch.arange(len(memory), device=device)
    speeds = []
    for to, source in ((here, memory), (memory, here)):
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            copy_rows(to, every, source, rows)
            torch.cuda.synchronize()
        speeds.append(size / (time.perf_counter() - start) / 1e9)
    return speeds


def store(args):
    """Whole training steps with the bank in several homes, in another order in each round, each step with ids
    of its own from a 1/rank law. torchrun deals the bank out: each process has as many tokens as one alone.
    Rows that move come from host memory or go back, with both moments."""
    at_least_one(args, "tokens", "seq_len", "vocab_size", "rounds", "steps", "depth")
    if args.tokens % args.seq_len:
        raise UserError(f"--tokens {args.tokens} is not a multiple of --seq_len {args.seq_len}")
    for scale in args.scales:
        if not 0 < scale <= 10**4:
            raise UserError(f"--scales must be above 0 and at most 10000, not {scale:g}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = set_up_machine(argparse.Namespace(device=device, seed=0))
    with ends_together():
        measure_homes(args, machine)


def measure_homes(args, machine):
    cuda, name = machine.device.type == "cuda", "CPU"
    rng, law = np.random.default_rng(machine.rank), 1 / np.arange(1, args.vocab_size + 1)
    order, series = np.random.default_rng(0).permutation(args.vocab_size), []
    for _ in range(args.steps):
        ids = order[rng.choice(args.vocab_size, args.tokens * MICRO_BATCHES + 1, p=law / law.sum())]
        parts = [torch.from_numpy(ids[shift:len(ids) - 1 + shift]).view(MICRO_BATCHES, -1, args.seq_len)
                 for shift in (0, 1)]
        series.append(list(zip(*(t.pin_memory() if cuda else t for t in parts), strict=True)))
    used = np.mean([len(ids_of([idx for idx, _ in step], args.vocab_size)) for step in series])
    tokens = ids.size - 1
    link = ""
    if cuda:
        name = torch.cuda.get_device_name()
        link = ", pinned rows {:.0f} GB/s to the GPU, {:.0f} back".format(*link_speed(machine.device))

    def say(text):
        if machine.main:
            print(text, flush=True)

    n = machine.world_size
    say(f"{n} × {name}, PyTorch {torch.__version__}, depth {args.depth}, vocabulary {args.vocab_size:,}, "
        f"{tokens:,} tokens a step and process with {used:,.0f} different ids, {args.rounds} rounds "
        f"of {args.steps} steps{link}\n| bank | parameters | home | ms a step | over the "
        "first | tokens/s | rows moved in a step (GB) | bytes on a GPU, a parameter | peak, GiB | loss | "
        f"{' + '.join(PARTS)}, ms apart |\n" + "|---" * 11 + "|")
    found = []
    for scale in args.scales:
        found += compare_homes(scale, args, machine, series, say)
        torch._dynamo.reset()  # it remembers models
        gc.collect()
    if machine.main and found:
        draw_homes(found, args.out)


def compare_homes(scale, args, machine, series, say):
    """The lines of one size of the memory → [(home, parameters of the bank, ms a step, peak GiB)]. In a
    function of its own: at its end nothing keeps the models."""
    found, homes = [], []
    config = GPTConfig.from_depth(args.depth, scale, vocab_size=args.vocab_size, seq_len=args.seq_len)
    for home in args.homes:
        try:
            homes.append(Home(home, config, machine))
            homes[-1].steps(series[:2])  # compiles; the next step is that of series[0]
            homes[-1].measure_peak(series)
        except torch.OutOfMemoryError:
            say(f"| ×{scale:g} | | {home} | out of memory" + " |" * 8)
            homes = [variant for variant in homes if variant.home != home]
            gc.collect()
            torch.cuda.empty_cache()
    before = {variant: variant.rows_moved() for variant in homes}
    rng = np.random.default_rng(0)  # the same order in each process, another in each round: see overhead
    for _ in range(args.rounds):
        for i in rng.permutation(len(homes)):
            homes[i].seconds.append(homes[i].steps(series))
    parameters = args.vocab_size * config.n_slots * config.memory_dim
    tokens = machine.world_size * args.tokens * MICRO_BATCHES
    for variant in homes:
        over = np.array(variant.seconds) / np.array(homes[0].seconds) - 1
        over = f"{np.median(over):+.1%} ({over.min():+.1%} to {over.max():+.1%})"
        rows = (variant.rows_moved() - before[variant]) / args.rounds / args.steps
        width = 2 if machine.device.type == "cuda" else 4  # bytes of a number
        size = 3 * parameters / args.vocab_size * width / 1e9  # of a row with both moments
        ms, each = 1000 * np.median(variant.seconds), variant.bank_bytes() / parameters
        say(f"| ×{scale:g} | {parameters / 1e9:.2f}B | {variant.home} | {ms:.1f} | {over} | "
            f"{tokens / ms * 1000:,.0f} | {rows:,.0f} ({rows * size:.2f}) | {each:.2f} | "
            f"{variant.peak / 2**30:.1f} | {variant.loss:.4f} | "
            f"{' + '.join(f'{ms:.1f}' for ms in variant.parts(series))} |")
        found.append((variant.home, parameters, ms, variant.peak / 2**30))
    return found


def draw_homes(found, path):
    """Time and memory against the size of the bank, a line for each home. found: see compare_homes."""
    lines = {f"bank in the memory of the {home}": list(zip(*(rest for of, *rest in found if of == home),
                                                           strict=True)) for home, *_ in found}
    about = dict(xscale="log", xlabel="parameters of the bank", ylim=(0, None))
    draw([dict(about, lines={label: (x, ms) for label, (x, ms, _) in lines.items()}, ylabel="ms a step"),
          dict(about, lines={label: (x, peak) for label, (x, _, peak) in lines.items()},
               ylabel="GPU memory, GiB")], path)
    print(f"wrote {path}")


# --------------------------------------------------------------------------------------- generation


def decode(args):
    """Times steps of generation of random models in turn, round after round: plain, as one CUDA graph, and as
    one of compiled code (see move_fast.fast_step): median and spread (smallest to largest) of ms a step,
    sampling included. What is behind a name, -mla, is latent attention. Also the bytes that a token leaves
    in the cache, and the seconds until the graphs are ready."""
    at_least_one(args, "batch", "seq_len", "vocab_size", "rounds")
    try:
        from move_fast import fast_step
    except ImportError as error:
        raise UserError(f"decode needs move_fast.py, which cannot be imported ({error})") from None
    configs = {name: config_of(name, args, args.vocab_size, "-mla") for name in args.variants}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"{machine}, PyTorch {torch.__version__}, depth {args.depth}, vocabulary {args.vocab_size:,}, "
          f"sequences of {args.seq_len}, bank on the {args.bank_home}, {args.rounds} rounds\n"
          "| variant | batch | plain, ms | graph, ms | compiled, ms | tokens/s | cache, bytes a token | "
          "ready after, s |\n" + "|---" * 8 + "|", flush=True)

    def pick(logits, noise):
        return sample(logits, temperature=0.8, top_k=50, noise=noise)

    for name, batch in itertools.product(args.variants, args.batch):
        config, latent = configs[name]
        config = dataclasses.replace(config, attention="mla" if latent else "mha")
        bank = partial(empty_bank, home=args.bank_home, dtype=dtype, device=device)
        model = GPT(config, dtype, bank=bank).to(device).eval()
        for memory in (m for m in model.modules() if isinstance(m, ValueBank)):
            memory.reset_parameters()
        steps, caches, ready, ms = [], [], [], ([], [], [])
        for make in (partial(model.decoding_step, steps=1), *(partial(fast_step, model, compiled=compiled)
                                                              for compiled in (False, True))):
            start = time.time()
            steps.append(make(pick))
            caches.append(model.new_cache(batch, args.seq_len))
            ms_of(steps[-1], caches[-1], min(3, args.seq_len), args.vocab_size)
            ready.append(time.time() - start)
        for _ in range(args.rounds):
            for times, step, cache in zip(ms, steps, caches, strict=True):
                times.append(ms_of(step, cache, args.seq_len, args.vocab_size))
        times = " | ".join(f"{np.median(t):.3f} ({min(t):.3f} to {max(t):.3f})" for t in ms)
        print(f"| {name} | {batch} | {times} | {1000 * batch / np.median(ms[2]):,.0f} | "
              f"{caches[0].bytes_per_token:,} | {ready[1]:.1f}, {ready[2]:.1f} |", flush=True)


@torch.inference_mode()
def ms_of(step, cache, tokens, vocab_size):
    """Milliseconds a step while a sequence of `tokens` is made from nothing."""
    batch, device = cache.layers[0].stores[0].size(0), cache.position.device
    cache.reset()
    idx = torch.zeros(batch, 1, dtype=torch.long, device=device)
    idx.sum().item()  # waits for the GPU
    start = time.perf_counter()
    for _ in range(tokens):
        noise = torch.empty(batch, vocab_size, device=device).exponential_()
        idx = step(idx, cache, noise).unsqueeze(1)
    idx.sum().item()
    return 1000 * (time.perf_counter() - start) / tokens


# ------------------------------------------------------------------------------------------ writing


def copied(text, source, length):
    """The first run of `length` characters of the text that stands in the source, or None."""
    runs = (text[i:i + length] for i in range(len(text) - length + 1))
    return next((run for run in runs if run in source), None)


def words(args):
    """Lets a run of text write with several seeds, at its default temperature; prints how many of the words
    are words of its data set, and whether it copies 60 characters in a row of the training text."""
    at_least_one(args, "seeds", "words")
    model, tokenizer = load_run(args.run)
    saved = read_checkpoint(args.run)
    flags = saved["flags"]
    data = load_dataset((args.data_dir or Path(flags["data_dir"])) / flags["dataset"])
    check_same_data(data, saved)
    source = tokenizer.decode(data.train.tolist())
    corpus = source + tokenizer.decode(data.val.tolist())
    vocabulary, total, known = set(re.findall(r"[\w']+", corpus.lower())), 0, 0
    for seed in range(args.seeds):
        generator, text = torch.Generator().manual_seed(seed), ""
        while len(re.findall(r"[\w']+", text)) < args.words:
            prompts = torch.full((8, 1), tokenizer.eot_token)
            ids = model.generate(prompts, model.config.seq_len, temperature=flags["temperature"],
                                 top_k=flags["top_k"], n_ids=tokenizer.n_vocab, generator=generator)
            for row in torch.stack(list(ids), dim=1).tolist():
                text += tokenizer.decode([id for id in row if id != tokenizer.eot_token]) + "\n"
            if not re.search(r"[\w']", text):
                raise UserError(f"the run in {args.run} writes no words; train it for longer")
        found = [word in vocabulary for word in re.findall(r"[\w']+", text.lower())]
        total, known = total + len(found), known + sum(found)
        copy = copied(text, source, 60)
        print(f"seed {seed}: {len(found)} words, {sum(found) / len(found):.1%} of them in the data set; "
              + (f"copies {copy!r}" if copy else "copies no 60 characters"), flush=True)
    print(f"all: {total} words, {known / total:.1%} of them in the data set")


def curves(args):
    """Draws losses and gates of several runs in one chart."""
    try:
        draw_curves(args.runs, args.out)
    except OSError:
        raise
    except Exception as error:  # of what stands in the logs
        raise UserError(f"log.jsonl of {', '.join(map(str, args.runs))} cannot be drawn "
                        f"({first_line(error)})") from None
    print(f"wrote {args.out}")


def add_commands(commands):
    """Adds the commands of this file to the command line of experiments.py."""
    def command(function, call):
        sub = commands.add_parser(function.__name__, description=function.__doc__,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(call=call)
        return sub.add_argument

    add = command(curves, curves)
    add("runs", type=Path, nargs="+", help="folders of runs")
    add("--out", type=Path, default=Path("curves.png"), help="the chart")
    add = command(words, words)
    add("run", type=Path, help="the folder of a run of text")
    add("--seeds", type=int, default=5, help="texts to write")
    add("--words", type=int, default=2000, help="of each text, at least")
    add("--data_dir", type=Path, help="where its data set is, if not where it was")
    add = command(digits, lambda args: digits(args.samples))
    add("samples", type=Path, help="the .npz file of train_image.py --save_npz")
    add = command(overhead, overhead)
    add("--variants", nargs="+", default=VARIANTS, help="the first is what the others are compared with")
    add("--tokens", type=int, default=32768, help="of a micro-batch")
    add("--seq_len", type=int, default=2048, help="tokens of a sequence")
    add("--depth", type=int, default=12, help="layers; the width is 64·depth, rounded up to heads of 128")
    add("--bank_dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the memory")
    add("--vocab_size", type=int, default=50304, help="where ids are drawn")
    add("--dataset", help="take the ids of this data set of text")
    add("--data_dir", type=Path, default=Path("data"), help="where the data sets are")
    add("--rounds", type=int, default=10, help="measured steps of each variant")
    add("--out", type=Path, default=Path("overhead.png"), help="the bar chart")
    add = command(store, store)
    add("--scales", type=float, nargs="+", default=[1, 4, 8], help="of the memory: ×scale")
    add("--homes", choices=["gpu", "host"], nargs="+", default=["gpu", "host"], help="of the bank")
    add("--tokens", type=int, default=32768, help=f"of a micro-batch, of {MICRO_BATCHES} a step")
    add("--seq_len", type=int, default=2048, help="tokens of a sequence")
    add("--depth", type=int, default=12, help="layers; the width is 64·depth, rounded up to heads of 128")
    add("--vocab_size", type=int, default=50304, help="of the random ids")
    add("--steps", type=int, default=8, help="of a round")
    add("--rounds", type=int, default=6, help="measured rounds of each variant")
    add("--out", type=Path, default=Path("scale.png"), help="the chart")
    add = command(decode, decode)
    add("--variants", nargs="+", default=["standard", "move-x1", "move-x4", "lave-x1", "standard-mla",
                                          "move-x4-mla"], help="what is measured")
    add("--batch", type=int, nargs="+", default=[1, 64], help="sequences at once")
    add("--seq_len", type=int, default=512, help="tokens of a sequence")
    add("--depth", type=int, default=12, help="layers; the width is 64·depth, rounded up to heads of 128")
    add("--vocab_size", type=int, default=50304, help="number of ids")
    add("--bank_home", choices=["gpu", "host"], default="gpu", help="where the memory is")
    add("--rounds", type=int, default=5, help="sequences of each, plain, by graph and compiled")
