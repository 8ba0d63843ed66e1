"""Trains a GPT with a memory of value embeddings (MoVE) on text, and samples from it.

    python train_gpt.py --move_scale 2                    train; on a GPU and on a CPU
    python train_gpt.py --move_scale 2 --resume           go on after Ctrl-C, a crash or a kill
    python train_gpt.py --move_scale 2 --prompt "def "    what the trained model writes
    torchrun --nproc_per_node=8 train_gpt.py ...          the same run on several GPUs

The script reads from the bottom: `main` prepares data and model, `train` is the one training loop.
A run lives in out/<run>/: checkpoint.pt, log.jsonl with one JSON object a line, and an empty lock.
"""
import argparse
import codecs
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import pickle
import signal
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist

from move import GPT, GPTConfig, ValueMixer
from prepare_data import (DEFAULT_VOCAB_SIZE, ArgumentParser, UserError, load_dataset, prepare_python, run,
                          token_bytes, write_file)

# ------------------------------------------------------------------------------------------ flags

# What a flag is by default depends on the device: a D12-class run on a GPU, three minutes on two cores.
DEFAULTS = {
    "cuda": dict(depth=12, seq_len=2048, micro_batch=16, batch_tokens=131072, max_steps=500, eval_every=100,
                 eval_tokens=1 << 20, save_every=250, dtype="bfloat16", bank_dtype="bfloat16", compile=True),
    "cpu": dict(depth=2, seq_len=256, micro_batch=4, batch_tokens=4096, max_steps=200, eval_every=40,
                eval_tokens=1 << 15, save_every=100, dtype="float32", bank_dtype="float32", compile=False),
    "dataset": "python", "temperature": 0.8, "top_k": 50,
}


def add_training_flags(parser, defaults):
    """The flags of every training script; returns the group for sampling. defaults: {'cuda': {flag: value},
    'cpu': ..., flag: value}."""
    both = argparse.BooleanOptionalAction

    def add(group, flag, help, **options):
        if flag in defaults["cuda"]:
            cuda, elsewhere = (defaults[device][flag] for device in ("cuda", "cpu"))
            help += f" (default: {cuda})" if cuda == elsewhere else f" (default: {cuda} on CUDA, {elsewhere} elsewhere)"
        elif "default" in options:
            help += " (default: %(default)s)"
        group.add_argument(f"--{flag}", help=help, **options)

    data = parser.add_argument_group("data")
    add(data, "dataset", "a folder of --data_dir, made by prepare_data.py", default=defaults["dataset"])
    add(data, "data_dir", "where the data sets are", type=Path, default=Path("data"))
    model = parser.add_argument_group("memory and model")
    add(model, "move_scale", "size of the memory, M = scale·depth/2 slots a token; 0: none", type=float, default=1.0)
    add(model, "memory", "one bank for all layers, a table a layer, or none", choices=["move", "lave", "none"], default="move")
    add(model, "gate_value", "gate g_0 on the ordinary value (default: with move, not with lave)", action=both)
    add(model, "attention", "multi-head or latent attention", choices=["mha", "mla"], default="mha")
    add(model, "kv_rank", "mla: width of the latent (default: half the model's)", type=int)
    add(model, "depth", "layers; the width is 64·depth", type=int)
    if "sizes" in defaults:
        add(model, "size", "a model of LlamaGen's size, instead of --depth", choices=defaults["sizes"])
    if "seq_len" in defaults["cuda"]:
        add(model, "seq_len", "tokens of a sequence", type=int)
    training = parser.add_argument_group("training")
    add(training, "batch_tokens", "tokens of an optimizer step, over all micro-batches and GPUs", type=int)
    add(training, "micro_batch", "sequences in memory at once; for training, less needs less memory and changes nothing else, beside rounding", type=int)
    add(training, "max_steps", "optimizer steps; the learning rate falls over their second half", type=int)
    add(training, "lr_scale", "factor on all learning rates", type=float, default=1.0)
    add(training, "seed", "of the weights, the order of the data and the samples", type=int, default=0)
    machine = parser.add_argument_group("machine")
    add(machine, "device", "(default: the best there is)", choices=["cuda", "mps", "cpu"])
    add(machine, "dtype", "of the activations; parameters are float32, but for the bank", choices=["bfloat16", "float32"])
    add(machine, "bank_dtype", "of the bank, its gradient and its optimizer's state", choices=["bfloat16", "float32"])
    add(machine, "mix", "how the bank is read: move.py's few lines, or move_triton.py's kernels; auto: those, on CUDA with Triton",
        choices=["auto", "reference", "fused"], default="auto")
    add(machine, "compile", "torch.compile the model", action=both)
    output = parser.add_argument_group("output")
    add(output, "out_dir", "folder of the run (default: out/ and a name from the flags)", type=Path)
    add(output, "resume", "go on from the checkpoint in --out_dir", action="store_true")
    add(output, "eval_every", "steps between evaluations", type=int)
    add(output, "eval_tokens", "validation tokens of an evaluation, at most", type=int)
    add(output, "save_every", "steps between checkpoints", type=int)
    add(output, "log_every", "steps between lines of the log", type=int, default=10)
    sampling = parser.add_argument_group("sampling")
    add(sampling, "temperature", "0 takes the likeliest token", type=float, default=defaults["temperature"])
    add(sampling, "top_k", "draw among the k likeliest only", type=int, default=defaults["top_k"])
    add(sampling, "top_p", "draw among the fewest that make up this probability only", type=float)
    return sampling


def resolve_flags(args, defaults):
    """Fills in what depends on the device, and checks the numbers. UserError names the flag."""
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    args.device = args.device or next(name for name in available if available[name])
    if not available[args.device]:
        raise UserError(f"--device {args.device}: there is none that PyTorch {torch.__version__} can use; try --device cpu")
    for flag, value in defaults["cuda" if args.device == "cuda" else "cpu"].items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    for flag, least in dict(depth=1, seq_len=2, batch_tokens=1, micro_batch=1, max_steps=1, eval_every=1, eval_tokens=1,
                            save_every=1, log_every=1, max_new_tokens=1, top_k=1).items():
        if getattr(args, flag, None) is not None and getattr(args, flag) < least:
            raise UserError(f"--{flag} must be at least {least}, not {getattr(args, flag)}")
    if not (args.temperature == 0 or 0.01 <= args.temperature <= 100):
        raise UserError(f"--temperature must be 0 or from 0.01 to 100, not {args.temperature:g}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top_p must be more than 0 and at most 1, not {args.top_p:g}")
    if not 0 <= args.seed < 1 << 63:
        raise UserError(f"--seed must be 0 or more and less than 2^63, not {args.seed}")
    if not 0 <= args.move_scale <= 10_000:  # also refuses nan
        raise UserError(f"--move_scale must be 0 (no memory) or more, up to 10000, not {args.move_scale:g}")
    if args.move_scale == 0:
        args.memory = "none"
    if args.kv_rank is not None and args.attention != "mla":
        raise UserError("--kv_rank is for --attention mla")
    if args.lr_scale <= 0 or not math.isfinite(args.lr_scale):
        raise UserError(f"--lr_scale must be more than 0, not {args.lr_scale:g}")
    if args.out_dir is None:
        memory = "none" if args.memory == "none" else f"{args.memory}-x{args.move_scale:g}"
        args.out_dir = Path("out") / f"{args.dataset}-{args.attention}-{memory}-{getattr(args, 'size', None) or f'd{args.depth}'}"


def check_batch(args):
    """UserError if a step is no whole number of micro-batches."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    micro_tokens = args.micro_batch * args.seq_len * world
    if args.batch_tokens % micro_tokens:
        raise UserError(f"--batch_tokens {args.batch_tokens} is not a multiple of micro_batch · seq_len · processes "
                        f"= {args.micro_batch} · {args.seq_len} · {world} = {micro_tokens}")


# ------------------------------------------------------------------------------ machine and processes

# Dense bf16 products with float32 sums, operations a second, from the makers' data sheets; for MFU.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12,
              "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


@dataclasses.dataclass
class Machine:
    """Where this process computes, and which of how many it is."""
    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self):
        """The one process that prints and writes."""
        return self.rank == 0

    def peak_flops(self):
        """Of all GPUs together, or None where it is not known."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        return next((peak * self.world for part, peak in PEAK_FLOPS.items() if part in name), None)

    def sum(self, values):
        """Adds up a list of numbers over all processes."""
        values = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(values)  # on the CPU
        return values.tolist()


def set_up_machine(args):
    """Device, processes (torchrun's, if it started us) and seed."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    machine = Machine(torch.device(args.device, local_rank) if args.device == "cuda" else torch.device(args.device))
    if "RANK" in os.environ:
        if args.device == "cuda":
            torch.cuda.set_device(machine.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
        machine.rank, machine.world = dist.get_rank(), dist.get_world_size()
    elif args.device == "cpu" and sys.platform == "linux":
        # glibc gives large tensors back to the system after each use and has every page cleared at the
        # next: keeping them (M_MMAP_MAX = 0, M_TRIM_THRESHOLD = ∞) made the default run 1.5 times faster.
        with contextlib.suppress(OSError, AttributeError):  # not every Linux has glibc
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-4, 0), mallopt(-1, -1)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    return machine


# ------------------------------------------------------------------------------------------- data


class TextWindows:
    """A long sequence of tokens as windows of seq_len: windows[(n,) visits] → the ids (n, seq_len) and the ids
    that follow them, int64. A token is the target in one window only. Visits: see DataOrder."""

    def __init__(self, tokens, seq_len, where):
        self.tokens, self.seq_len = tokens, seq_len
        if not len(self):
            raise UserError(f"{where} has {len(tokens)} tokens, fewer than seq_len + 1 = {seq_len + 1}; lower --seq_len")

    def __len__(self):
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, visits):
        rows = np.stack([self.tokens[i * self.seq_len:(i + 1) * self.seq_len + 1] for i in visits % len(self)])
        rows = torch.from_numpy(rows.astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class DataOrder:
    """What batch `step` holds, a function of (seed, step) alone: epoch e visits all n records (windows of text,
    pictures) in an order drawn from (seed, e). Nothing needs to be remembered to resume. A visit is a number
    of its own, e·n + the record's, so that a data set can show a record in another way at each."""

    def __init__(self, n, batch, seed):
        self.n, self.batch, self.seed, self.epochs = n, batch, seed, {}

    def __call__(self, step):
        return np.array([self.visit(i) for i in range(step * self.batch, (step + 1) * self.batch)])

    def visit(self, i):
        epoch, position = divmod(i, self.n)
        if epoch not in self.epochs:
            self.epochs = {epoch: np.random.default_rng((self.seed, epoch)).permutation(self.n)}
        return epoch * self.n + self.epochs[epoch][position]


# -------------------------------------------------------------------------------------- optimizers


def make_optimizers(model, lr_scale):
    """Muon for the matrices, AdamW for the rest. nanochat's learning rates, k = (d / 768)^-½ of them."""
    k = lr_scale * (model.config.dim / 768) ** -0.5
    blocks = list(model.blocks.named_parameters())
    matrices = [p for name, p in blocks if "router" not in name]
    adamw = [dict(params=[model.embedding.weight], lr=0.2 * k),
             dict(params=[model.head.weight], lr=0.004 * k),
             dict(params=list(model.banks.parameters()), lr=0.1 * k),
             dict(params=[p for name, p in blocks if "router" in name], lr=0.004 * k)]
    optimizers = [torch.optim.Muon(matrices, lr=0.02 * lr_scale, momentum=0.95, weight_decay=0),
                  torch.optim.AdamW([g for g in adamw if g["params"]], betas=(0.8, 0.95), eps=1e-10, weight_decay=0, fused=True)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def schedule(step, max_steps, warm_up=10):
    """Factor on the learning rate of step 0, 1, …: up over the first 10 steps, down over the second half."""
    return min((step + 1) / warm_up, 1, 2 * (max_steps - step) / max_steps)


# ------------------------------------------------------------------------------------- checkpoints


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def save_checkpoint(path, **state):
    """Everything that load_checkpoint gives back. UserError if the disk is full; the old file is kept then."""
    try:
        write_file(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:
        kept = "the one before is kept" if path.exists() else "there is none yet"
        raise UserError(f"cannot write checkpoint {path} ({first_line(error)}); {kept}; make room and --resume") from None


def load_checkpoint(path, device="cpu"):
    """Everything save_checkpoint was given. UserError if it is missing or damaged."""
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}; train without --resume and without sampling first, or give its --out_dir")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not {"step", "identity", "model", "optimizers", "losses"} <= set(state):
            raise ValueError("it is not a checkpoint of this program")
        return state
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {path} is damaged ({first_line(error)}); remove it and start again") from None


def check_same_run(saved, asked, path):
    """UserError naming the first difference between two dicts of what makes a run what it is."""
    for key in asked:
        if saved.get(key) != asked[key]:
            raise UserError(f"{path} was made with {key} = {saved.get(key)}, now it is {asked[key]}; "
                            "give the same flags and data, or another --out_dir")


# ------------------------------------------------------------------------------------------ model


def make_model(args, machine, data, **shape):
    """The GPT of the flags, for the vocabulary of a data set. shape: what is not nanochat's for this depth."""
    vocab_size = -64 * (-data.meta["vocab_size"] // 64)  # padded, for fast matrix products
    try:
        config = GPTConfig.from_depth(args.depth, args.move_scale, vocab_size=vocab_size, seq_len=args.seq_len, memory=args.memory,
                                      gate_value=args.gate_value, attention=args.attention, kv_rank=args.kv_rank, **shape)
    except ValueError as error:
        raise UserError(error) from None
    model = build(config, args, machine, args.bank_dtype)
    if machine.main:
        sizes = ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in model.parameter_counts().items())
        mixes = {"fused" if bank.fused else "reference" for bank in model.banks if bank is not None}
        print(f"{config}\nparameters: {sizes}\n{args.out_dir} on {machine.world} × {args.device}, {args.dtype}"
              + "".join(f", {mix} mix of a bank in {args.bank_dtype}" for mix in mixes), flush=True)
    return model


def build(config, args, machine, bank_dtype):
    """A GPT of this config, with a bank in this dtype, and the rest by the flags."""
    model = GPT(config, getattr(torch, args.dtype), args.mix)
    model.banks.to(getattr(torch, bank_dtype))
    model.to(machine.device)
    try:
        any(bank.fused for bank in model.banks if bank is not None)
    except ValueError as error:
        raise UserError(f"{error}; give --mix auto") from None
    return model


def load_model(path, identity, args, machine):
    """(GPT, its step) of a checkpoint. UserError if it was made with something else than `identity` says."""
    saved = load_checkpoint(path, machine.device)
    check_same_run(saved["identity"], identity, path)
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    config = GPTConfig(**{name: value for name, value in saved["identity"].items() if name in fields})
    model = build(config, args, machine, saved["identity"].get("bank_dtype", "float32"))  # there may be no bank
    model.load_state_dict(saved["model"])
    return model, saved["step"]


# -------------------------------------------------------------------------------------- evaluation


@contextlib.contextmanager
def watch_gates(model):
    """Collects the gates that the block computes: yields a list with [Σ mean g_0, Σ mean g_i, sequences] for
    each layer that has a router. Gates that collapse (g_0 → 2 and g_i → 0, or g_0 → 0) show here."""
    mixers = [m for m in model.modules() if isinstance(m, ValueMixer)]
    sums = [[0.0, 0.0, 0] for _ in mixers]

    def watch(total):
        def hook(mixer, inputs):
            gates = mixer.gates(inputs[0]).float()
            n = len(gates)
            total[:] = total[0] + n * gates[..., 0].mean(), total[1] + n * gates[..., 1:].mean(), total[2] + n
        return hook

    hooks = [m.register_forward_pre_hook(watch(total)) for m, total in zip(mixers, sums)]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def evaluate(model, records, count, count_units, args, machine):
    """Cross-entropy over the first `count` records, always the same, shared out among the processes.

    count_units: what the bits are counted per, of a tensor of targets: its bytes of text, or its tokens.
    Returns dict(bits=bits per unit, g_0=[mean of each layer], g_i=[...]).
    """
    nats = units = 0
    mine = np.arange(machine.rank, count, machine.world)
    with watch_gates(model) as gates:
        for start in range(0, len(mine), args.micro_batch):
            idx, targets = records[mine[start:start + args.micro_batch]]
            loss = model(idx.to(machine.device), targets.to(machine.device))
            nats += loss.item() * (targets != -100).sum().item()
            units += count_units(targets)
    nats, units = machine.sum([nats, units])
    gates = [machine.sum([float(x) for x in total]) for total in gates]
    return dict(bits=nats / math.log(2) / units, g_0=[a / n for a, _, n in gates], g_i=[b / n for _, b, n in gates])


def bank_use(model, adamw):
    """How much of the memory is in use: the share of its rows that have had a gradient, which are those with a
    second moment other than 0 (it fades, but to the smallest number there is), and the mean norm of a row."""
    rows = touched = norms = 0
    for bank in model.banks.parameters():
        moment = adamw.state.get(bank, {}).get("exp_avg_sq")
        rows += bank[..., 0].numel()
        touched += 0 if moment is None else moment.any(dim=-1).sum().item()
        norms += bank.detach().norm(dim=-1, dtype=torch.float32).sum().item()
    return dict(rows_used=touched / rows, row_norm=norms / rows) if rows else {}


# ---------------------------------------------------------------------------------- the training loop


class Log:
    """Lines for people on the screen, and the same as JSON objects in log.jsonl."""

    def __init__(self, path, keep_to_step=None):
        """keep_to_step: when a run resumes, what a killed run wrote behind its checkpoint is dropped."""
        lines = []
        if keep_to_step is not None and path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # a line that a kill cut short
                    if json.loads(line)["step"] <= keep_to_step:
                        lines.append(line + "\n")
        write_file(path, lambda file: file.write("".join(lines).encode()))
        self.file = open(path, "a")

    def __call__(self, text, **record):
        print(text, flush=True)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


@contextlib.contextmanager
def only_run(folder, machine):
    """Makes the folder of a run and keeps other runs out of it. UserError, in all processes, if there is one in it."""
    with contextlib.ExitStack() as stack:
        taken = False
        if machine.main:
            folder.mkdir(parents=True, exist_ok=True)
        if machine.main and fcntl:
            file = stack.enter_context(open(folder / "lock", "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
            except BlockingIOError:
                taken = True
            except OSError:  # a file system without locks
                pass
        if machine.sum([taken])[0]:
            raise UserError(f"another process trains in {folder}; wait for it, or give another --out_dir")
        yield


@contextlib.contextmanager
def stop_signals():
    """Yields a list that Ctrl-C and SIGTERM are put into, for the loop to end where its state can be saved.
    A second Ctrl-C ends the program at once."""
    stop = []

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old_handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


def zero_gradients(model):
    """No gradients; but zeros for a bank that adds up its own in place."""
    for parameter in model.parameters():
        parameter.grad = None
    for bank in model.banks:
        if bank is not None:
            bank.zero_gradient()


def backward(fast_model, train_set, micro_batches, machine):
    """Adds up the gradient of the mean loss over the micro-batches (n, micro_batch) of visits, of all processes; returns
    that loss of this process, on the device: nothing here waits for the GPU, so that it always has work."""
    loss = 0
    for visits in micro_batches:
        idx, targets = (t.pin_memory() if machine.device.type == "cuda" else t for t in train_set[visits])
        idx, targets = (t.to(machine.device, non_blocking=True) for t in (idx, targets))
        micro_loss = fast_model(idx, targets) / len(micro_batches)
        (micro_loss / machine.world).backward()
        loss += micro_loss.detach()
    if machine.world > 1:  # once a step
        for parameter in fast_model.parameters():
            dist.all_reduce(parameter.grad)
    return loss


def train(args, machine, model, train_set, val_set, count_units, unit, data_identity, after_save=None):
    """Trains `model` (a GPT on machine.device) to args.max_steps. The one loop, for text and images.

    train_set, val_set: sized, and indexed by (n,) visits → (ids, targets), as TextWindows.
    count_units, unit: what `evaluate` counts the bits per, and its name.
    data_identity: dict of hashes and the like; a checkpoint of other data is refused.
    after_save: called with the step after each checkpoint, in one process, for a look at what has been learned.
    KeyboardInterrupt if Ctrl-C or SIGTERM stopped it; the state is saved then.
    """
    with only_run(args.out_dir, machine), stop_signals() as stop:
        path = args.out_dir / "checkpoint.pt"
        optimizers = make_optimizers(model, args.lr_scale)
        identity = {**dataclasses.asdict(model.config), **data_identity, "seed": args.seed, "batch_tokens": args.batch_tokens,
                    "lr_scale": args.lr_scale, **({} if model.config.memory == "none" else {"bank_dtype": args.bank_dtype})}
        first, losses = 0, []  # losses: of the steps since the last line of the log
        if args.resume:
            saved = load_checkpoint(path, machine.device)
            check_same_run(saved["identity"], identity, path)
            first, losses = saved["step"], saved["losses"]
            if first >= args.max_steps:
                raise UserError(f"{path} has done its {first} steps; raise --max_steps to go on, or sample from it")
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"]):
                optimizer.load_state_dict(state)
            del saved
        elif path.exists():
            raise UserError(f"{args.out_dir} holds a run already; go on with --resume, or give another --out_dir")
        log = Log(args.out_dir / "log.jsonl", first if args.resume else None) if machine.main else None

        fast_model = torch.compile(model, fullgraph=True) if args.compile else model
        zero_gradients(model)
        order = DataOrder(len(train_set), args.batch_tokens // args.seq_len, args.seed)
        n_eval = min(len(val_set), max(1, args.eval_tokens // args.seq_len))
        train_flops = 3 * sum(model.flops_per_token().values())

        step, clock_step, clock = first, first, time.time()
        while True:
            stopping = machine.sum([len(stop)])[0] > 0  # all processes stop after the same step
            done = step == args.max_steps
            save = done or stopping or (step % args.save_every == 0 and step > first)
            kept = f"the checkpoint in {args.out_dir} is good" if path.exists() else "there is no checkpoint yet"
            advice = f"is not finite at step {step}; {kept}; try a lower --lr_scale or --dtype float32"
            log_now = step > first and (step % args.log_every == 0 or step == 1 or done)
            if log_now or save or step == first + 1:
                losses = machine.sum([float(loss) / machine.world for loss in losses])  # waits for the device
                if not all(map(math.isfinite, losses)):
                    raise UserError(f"the loss {advice}")
            if log_now:
                seconds_a_step = (time.time() - clock) / (step - clock_step)
                speed = args.batch_tokens / seconds_a_step
                mfu = speed * train_flops / machine.peak_flops() if machine.peak_flops() else None
                left = seconds_a_step * (args.max_steps - step)
                loss = sum(losses) / len(losses)
                if machine.main:
                    log(f"step {step}/{args.max_steps}  loss {loss:.4f}  {speed:,.0f} tokens/s"
                        + (f"  MFU {mfu:.1%}" if mfu else "") + f"  {int(left // 60)}:{int(left % 60):02d} left",
                        step=step, loss=loss, tokens_per_s=speed, mfu=mfu, seconds_left=left)
                losses, clock_step, clock = [], step, time.time()
            if step == first + 1:
                clock_step, clock = step, time.time()  # the first step compiles
            if (step % args.eval_every == 0 or done) and (step > first or first == 0):
                result = evaluate(model, val_set, n_eval, count_units, args, machine)
                if not math.isfinite(result["bits"]):
                    raise UserError(f"the validation loss {advice}")
                if machine.main:
                    result |= bank_use(model, optimizers[1])
                    text = f"step {step}/{args.max_steps}  validation {result['bits']:.4f} {unit}"
                    text += "".join(f"  {name} " + " ".join(f"{g:.2f}" for g in result[name])
                                    for name in ("g_0", "g_i") if result[name])
                    if "rows_used" in result:
                        text += f"  rows used {result['rows_used']:.0%}, norm {result['row_norm']:.2f}"
                    log(text, step=step, **{"val_" + unit.replace(" ", "_"): result.pop("bits")}, **result)
                clock_step, clock = step, time.time()
            if save and not all(p.isfinite().all() for p in model.parameters()):
                raise UserError(f"a weight {advice}")
            if save and machine.main:
                save_checkpoint(path, step=step, identity=identity, losses=losses, model=model.state_dict(),
                                optimizers=[o.state_dict() for o in optimizers])
                if after_save and not stopping:
                    after_save(step)
            if save:
                clock_step, clock = step, time.time()
            if done or stopping:
                break

            rows = order(step).reshape(-1, machine.world, args.micro_batch)[:, machine.rank]
            losses.append(backward(fast_model, train_set, rows, machine))
            factor = schedule(step, args.max_steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
                optimizer.step()
            zero_gradients(model)
            step += 1
        if machine.main and machine.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(machine.device)
            log(f"peak memory {peak / 2**30:.1f} GiB", step=step, peak_memory_bytes=peak)
    if not done:
        raise KeyboardInterrupt(f"stopped; the state is saved in {args.out_dir}, go on with --resume")


@contextlib.contextmanager
def memory_advice(args):
    """Turns running out of memory into one line of advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        said = str(error).lower()  # the CPU, CUDA's libraries and MPS have no exception of their own for it
        if not isinstance(error, MemoryError) and not any(
                words in said for words in ("out of memory", "allocate memory", "alloc_failed")):
            raise
        raise UserError(f"out of memory with --micro_batch {args.micro_batch} of {args.seq_len} tokens; lower --micro_batch, "
                        "then --move_scale, then the model's size") from None


# ------------------------------------------------------------------------------------------- text


def load(args, machine, kind, default, prepare):
    """The checked data set of --dataset, of this kind; prepare(folder) makes the default one if it is not there."""
    folder = args.data_dir / args.dataset
    if args.dataset == default and not folder.exists() and machine.main:
        print(f"making the data set {folder}, once", flush=True)
        try:
            prepare(folder)
        except UserError:
            if not folder.exists():  # else another process was faster
                raise
    machine.sum([0])  # the other processes wait here
    data = load_dataset(folder)
    if data.meta["kind"] != kind:
        raise UserError(f"{folder} is of kind {data.meta['kind']}, this script needs {kind}; give another --dataset")
    return data


def sample(model, encoding, prompt, args, machine):
    """Prints `prompt` and what the model writes behind it, token by token, to the end of the document."""
    idx = [encoding.eot_token, *encoding.encode_ordinary(prompt)]
    count = min(args.max_new_tokens, model.config.seq_len - len(idx) + 1)
    if count < 1:
        raise UserError(f"--prompt has {len(idx) - 1} tokens; this model takes at most {model.config.seq_len - 1}")
    generator = torch.Generator(machine.device).manual_seed(args.seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
    print(prompt, end="", flush=True)
    for token in model.generate(torch.tensor([idx], device=machine.device), count, args.temperature, args.top_k, args.top_p,
                                n_ids=encoding.n_vocab, generator=generator):  # the model's vocabulary is padded
        if token.item() == encoding.eot_token:
            break
        print(decoder.decode(encoding.decode_single_token_bytes(token.item())), end="", flush=True)
    print(decoder.decode(b"", final=True))


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sampling = add_training_flags(parser, DEFAULTS)
    sampling.add_argument("--prompt", help="do not train: print how the run in --out_dir continues this text")
    sampling.add_argument("--max_new_tokens", type=int, default=200, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    resolve_flags(args, DEFAULTS)
    check_batch(args)
    with memory_advice(args):
        run_command(args)


def run_command(args):
    """Trains, or samples if there is a --prompt."""
    path = args.out_dir / "checkpoint.pt"
    if (args.resume or args.prompt is not None) and not path.exists():
        load_checkpoint(path)  # says so before any data set is made
    machine = set_up_machine(args)
    data = load(args, machine, "text", "python", lambda folder: prepare_python(folder, DEFAULT_VOCAB_SIZE))
    encoding = data.tokenizer()
    data_identity = data.identity()

    if args.prompt is not None:
        name = "sha256 of tokenizer.tiktoken"
        model, _ = load_model(path, {name: data_identity[name]}, args, machine)
        if machine.main:
            sample(model, encoding, args.prompt, args, machine)
        return

    lengths = torch.from_numpy(token_bytes(encoding))
    model = make_model(args, machine, data)
    train(args, machine, model,
          TextWindows(data.train, args.seq_len, data.folder / "train.bin"),
          TextWindows(data.val, args.seq_len, data.folder / "val.bin"),
          lambda targets: lengths[targets].sum().item(), "bits per byte", data_identity)
    if machine.main:
        print("\na sample:\n")
        sample(model, encoding, "", args, machine)
    if machine.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
