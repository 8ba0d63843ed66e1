"""Trains a GPT with a memory of value embeddings (MoVE) on text, and samples from it.

    python train_gpt.py --move_scale 2                 train, on a GPU or on a CPU
    python train_gpt.py --resume                       go on after Ctrl-C, a crash or a kill
    python train_gpt.py --prompt "Enter the King"      what the trained model writes
    torchrun --nproc_per_node=8 train_gpt.py           the same run on several GPUs

--resume and --prompt take the newest run in out/, or that of --out_dir, with all its flags. From Python,
`load_run(folder)` gives the model and its tokenizer.

The file reads top to bottom: data, model, evaluation, `train` (the one training loop, for images too), then
what is special to text. Flags are in command_line.py, what a run leaves on disk in run_folder.py.
"""
import codecs
import collections
import contextlib
import functools
import itertools
import math
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C while modules load

import numpy as np
import torch
import torch.distributed as dist

from command_line import (
    ends_together,
    find_run,
    how_to_save_memory,
    resolve_flags,
    set_up_machine,
    training_parser,
)
from move import GPT, GPTConfig, ValueBank, ValueMixer
from move_store import StoredBank, borrow, empty_bank, prefetch, processes, rows_are_finite, stored_banks
from optimizers import make_optimizers, schedule, set_learning_rates
from prepare_data import load_dataset, load_tokenizer, prepare_python, prepare_shakespeare, token_bytes
from run_folder import (
    Log,
    copy_decoder,
    only_run,
    restore,
    save_checkpoint,
    save_rows,
    update_curves,
)
from script import UserError, memory_advice, require_utf8, run

# Defaults follow the device: a D12 on a GPU; on other devices what two cores train in some minutes.
# micro_batch is the largest that is tried.
DEFAULTS = {
    "cuda": dict(dataset="python", depth=12, seq_len=2048, batch_tokens=131072, micro_batch=16, max_steps=500,
                 eval_every=100, eval_tokens=1 << 20, save_every=250, bank_dtype="bfloat16", compile=True,
                 temperature=0.8, top_k=50, max_new_tokens=200, num_samples=1),
    "cpu": dict(dataset="shakespeare", depth=4, seq_len=256, batch_tokens=4096, micro_batch=16, max_steps=400,
                eval_every=50, eval_tokens=1 << 15, save_every=100, bank_dtype="float32", compile=False,
                temperature=0.4, top_k=50, max_new_tokens=200, num_samples=1),
}


TEXT_SETS = dict(python=prepare_python, shakespeare=prepare_shakespeare)  # made if they are not there


# ------------------------------------------------------------------------------------- data and batches


def load(args, machine, kind, prepare):
    """The checked data set of --dataset, of this kind. prepare: {name: function(folder)} for those that are
    made if they are not there."""
    folder = Path(args.data_dir) / args.dataset

    def check():
        if args.dataset in prepare and not folder.exists():
            print(f"making the data set {folder}, once", flush=True)
            try:
                prepare[args.dataset](folder)
            except UserError:
                if not folder.exists():  # else another process was faster
                    raise
        return load_dataset(folder)

    data = machine.in_main(check) or load_dataset(folder, check=False)
    if data.meta["kind"] != kind:
        raise UserError(f"{folder} is of kind {data.meta['kind']}, this script needs {kind}; "
                        "give another --dataset")
    return data


def check_same_data(data, saved):
    """UserError if a run that goes on was trained on other data."""
    for key, value in data.identity().items():
        if saved["data"].get(key) != value:
            raise UserError(f"{data.folder} is not the data set of this run: {key} was "
                            f"{saved['data'].get(key)}, now it is {value}; give the --data_dir that has it")


class TextWindows:
    """A long sequence of tokens as windows of seq_len: windows[indices (n,)] → the ids (n, seq_len) and the
    ids that follow them, int64. A token is the target in one window only. Indices: see DataOrder."""

    def __init__(self, tokens, seq_len, path):
        self.tokens, self.seq_len = tokens, seq_len
        if not len(self):
            raise UserError(f"{path} has {len(tokens)} tokens, fewer than seq_len + 1 = {seq_len + 1}; "
                            "lower --seq_len")

    def __len__(self):
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, indices):
        starts = indices % len(self) * self.seq_len
        rows = np.stack([self.tokens[start:start + self.seq_len + 1] for start in starts])
        rows = torch.from_numpy(rows.astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class DataOrder:
    """order(step) → indices (batch,) of what batch `step` holds, a function of (seed, step) alone: a run
    needs to remember nothing to go on.

    Epoch e goes through all n records (windows of text, images) in an order random by (seed, e). Record r has
    the index e·n + r there, so that a data set can show it in another way in each epoch.
    """

    def __init__(self, n, batch, seed):
        if batch > 100 * n:
            raise UserError(f"--batch_tokens: {batch} sequences are over 100 times the data set's {n}")
        self.n, self.batch, self.seed, self.epoch = n, batch, seed, None

    def __call__(self, step):
        start, end = step * self.batch, (step + 1) * self.batch
        parts = []
        for epoch in range(start // self.n, (end - 1) // self.n + 1):
            if epoch != self.epoch:
                self.epoch = epoch
                self.permutation = np.random.default_rng((self.seed, epoch)).permutation(self.n)
            first = epoch * self.n
            parts.append(first + self.permutation[max(0, start - first):end - first])
        return np.concatenate(parts)


def check_batch(args, machine):
    """UserError if a step is no whole number of micro-batches."""
    n, sequences = machine.world_size, args.micro_batch or 1
    if args.batch_tokens % (tokens := sequences * args.seq_len * n):
        raise UserError(f"--batch_tokens {args.batch_tokens} is no multiple of micro_batch · seq_len · "
                        f"processes = {sequences} · {args.seq_len} · {n} = {tokens}")


def choose_micro_batch(args, config, most, free=None):
    """The largest divisor up to `most` of the sequences that a process has in a step; on a GPU one that fits.

    free: bytes of free GPU memory, of which 90 % may be filled. The estimate: 16 bytes a parameter (itself,
    its gradient, two moments; 8 in a bfloat16 bank; of a bank in host memory 1.5 times that for the rows of
    a step, a different one for every fourth token); 30 activations for each token, layer and unit of width,
    of 2 bytes in bfloat16; of logits the kernels hold 8,192 tokens' at once, 8 bytes each, and the reference
    all, 16 bytes each.
    """
    n_processes = processes()[1]
    sequences = args.batch_tokens // (args.seq_len * n_processes)
    divisors = [n for n in range(min(most, sequences), 0, -1) if sequences % n == 0]
    if free is None:
        return divisors[0]
    with torch.device("meta"):
        counts = GPT(config).parameter_counts()
    bank = (8 if args.bank_dtype == "bfloat16" else 16) * counts["memory"] / n_processes
    if args.bank_home == "host":
        bank *= min(1, 1.5 * args.batch_tokens / 4 / config.vocab_size)
    parameters = 16 * (counts["total"] - counts["memory"]) + bank
    token = 30 * config.n_layers * config.dim * (2 if args.dtype == "bfloat16" else 4)

    def needed(n):
        tokens = n * args.seq_len
        logits = config.vocab_size * (8 * min(tokens, 8192) if args.kernels else 16 * tokens)
        return parameters + tokens * token + logits

    return next((n for n in divisors if needed(n) <= 0.9 * free), 1)


# ------------------------------------------------------------------------------------------------ model


def padded(vocab_size):
    """A multiple of 64, for fast matrix products."""
    return -64 * (-vocab_size // 64)


def make_config(args, data, **shape):
    """The GPTConfig of the flags, for the vocabulary of a data set. shape: what differs from nanochat's."""
    try:
        return GPTConfig.from_depth(args.depth, args.move_scale, seq_len=args.seq_len,
                                    vocab_size=padded(data.meta["vocab_size"]),
                                    memory=args.memory, gate_value=args.gate_value, attention=args.attention,
                                    kv_rank=args.kv_rank, **shape)
    except ValueError as error:
        raise UserError(error) from None


def build(config, args, device, positions=None, change=None, bank=None):
    """A GPT of this config on a device, by the flags dtype, bank_dtype, bank_home and kernels. change: a
    function that is called with the model first, to alter its parts. bank: what makes the banks."""
    if bank is None:
        elsewhere = args.bank_home == "host" or processes()[1] > 1
        bank = functools.partial(StoredBank, home=args.bank_home, device=device,
                                 dtype=getattr(torch, args.bank_dtype)) if elsewhere else ValueBank
    try:
        model = GPT(config, getattr(torch, args.dtype), positions, bank)
    except ValueError as error:  # of the rotary embedding
        raise UserError(error) from None
    except MemoryError as error:  # says more than that memory ran out
        raise UserError(f"--bank_home {args.bank_home}: {error}; lower --move_scale") from None
    for module in model.modules():
        if isinstance(module, ValueBank):
            module.to(getattr(torch, args.bank_dtype))
    if change:
        change(model)
    model.to(device)
    if args.kernels:
        from move_fast import accelerate
        args.kernels = accelerate(model)  # False if it leaves the model on the reference
    return model


def compile_parts(model, **how):
    """`model`, with its parameters, in compiled code for training. Equal blocks are compiled once, so that
    the compiler takes no longer for many of them. `model` itself stays as it is.
    how: what torch.compile gets besides."""
    def compiled(function):
        # Of one piece of code the compiler remembers a few models only: each gets code of its own.
        function.__code__ = function.__code__.replace()
        return torch.compile(function, fullgraph=True, **how)

    def block_code():
        return compiled(lambda block, *inputs: block(*inputs))

    kinds = collections.defaultdict(block_code)  # of blocks: with a table of LaVE, and without

    def part(block):
        # The compiler takes blocks that differ by a hook for equal ones.
        hooks = any(m._forward_pre_hooks or m._forward_hooks or m._backward_pre_hooks or m._backward_hooks
                    for m in block.modules())
        run = block_code() if hooks else kinds[block.table is not None]

        def forward(x, idx, rotary, memory, cache):
            if hasattr(memory, "of_layer"):  # of the kernels
                memory = memory.of_layer(block.attention.mixer, x.dtype)
            return run(block, x, idx, rotary, memory, cache)
        return forward

    fast = model.with_blocks([part(block) for block in model.blocks])
    fast.embed = compiled(lambda idx: model.embed(idx))
    fast.loss = compiled(lambda x, targets: model.loss(x, targets))
    return fast


def start_model(args, machine, data, saved, most, positions=None, change=None, **shape):
    """The GPT to train: of the run that goes on, or of the flags. Sets args.micro_batch, up to `most`.
    change: see build."""
    if saved is not None:
        check_same_data(data, saved)
    config = GPTConfig(**saved["config"]) if saved else make_config(args, data, **shape)
    if args.micro_batch is None:
        free = torch.cuda.mem_get_info(machine.device)[0] if args.device == "cuda" else None
        args.micro_batch = min(machine.gather(choose_micro_batch(args, config, most, free)))
    model = build(config, args, machine.device, positions, change)
    if machine.main:
        describe(model, args, machine)
    return model


def describe(model, args, machine):
    """Prints what is trained, and where."""
    with torch.device("meta"):  # whatever the model holds of a bank that is elsewhere
        counts = GPT(model.config).parameter_counts()
    sizes = ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in counts.items())
    how = "kernels" if args.kernels else "reference"
    memory = "" if model.config.memory == "none" else f", bank in {args.bank_dtype}"
    home = "GPU" if args.bank_home == "gpu" and args.device == "cuda" else "host"
    memory += f" (in {home} memory)" * bool(stored_banks(model))
    print(f"{model.config}\nparameters: {sizes}\n{args.out_dir} on {machine.world_size} × {args.device}, "
          f"{args.dtype}{memory}, {how}, micro-batches of {args.micro_batch}", flush=True)


def load_model(saved, folder, args, device):
    """The trained GPT of a run's folder, whose checkpoint is `saved`, for sampling."""
    bank = functools.partial(empty_bank, home=args.bank_home, device=device,
                             dtype=getattr(torch, args.bank_dtype))
    model = build(GPTConfig(**saved["config"]), args, device, bank=bank)  # positions are in the checkpoint
    restore(folder, model)
    return model.eval()


def load_run(folder, device="cpu"):
    """(model, tokenizer) of a run of train_gpt.py: a GPT and a tiktoken.Encoding. It needs no data set.

    UserError if the folder has no whole checkpoint.
    """
    folder = Path(folder)
    saved = find_run(dict(out_dir=folder), "text", True, make_parser())
    args = resolve_flags(dict(device="cpu", kernels=False, out_dir=folder), DEFAULTS, saved["flags"])
    return load_model(saved, folder, args, device), load_tokenizer(folder, saved["meta"])


# ------------------------------------------------------------------------------------------- evaluation


@contextlib.contextmanager
def watch_gates(model):
    """Yields a list with [Σ mean g_0, Σ mean g_i, sequences] of each layer that has a router, summed while
    the block lasts. Gates that collapse (g_0 → 2 and g_i → 0, or g_0 → 0) show here."""
    mixers = [module for module in model.modules() if isinstance(module, ValueMixer)]
    sums = [[0.0, 0.0, 0] for _ in mixers]

    def watch(total):
        def hook(mixer, inputs):
            gates = mixer.gates(inputs[0]).float()
            n = len(gates)
            total[:] = total[0] + n * gates[..., 0].mean(), total[1] + n * gates[..., 1:].mean(), total[2] + n
        return hook

    hooks = [mixer.register_forward_pre_hook(watch(total)) for mixer, total in zip(mixers, sums, strict=True)]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def bank_use(model, optimizers):
    """How much of the memory is in use: dict(rows_used, row_norm), {} without a memory.

    rows_used: share of the ids whose rows have had a gradient, which are those with a second moment other
    than 0: it shrinks, but never reaches 0. row_norm: mean norm of a slot of an id. Of a stored bank
    rows_used alone: the share of this process's ids that were in a batch.
    """
    if stored := stored_banks(model):
        lasts = [bank.rows.last for bank in stored.values()]
        return dict(rows_used=sum(last.count_nonzero().item() for last in lasts) / sum(map(len, lasts)))
    banks = [module.weight for module in model.modules() if isinstance(module, ValueBank)]
    moments = [optimizer.state[bank]["exp_avg_sq"] for optimizer in optimizers for bank in banks
               if optimizer.state.get(bank)]
    used = sum(moment.flatten(1).any(1).sum().item() for moment in moments)
    norms = sum(bank.detach().norm(dim=-1, dtype=torch.float32).sum().item() for bank in banks)
    return dict(rows_used=used / sum(map(len, banks)),
                row_norm=norms / sum(bank[..., 0].numel() for bank in banks)) if banks else {}


@torch.no_grad()
def evaluate(model, records, count, count_units, args, machine):
    """Cross-entropy over the first `count` records, always the same, shared out among the processes.

    count_units: what the bits are counted per, of a tensor of targets: its bytes of text, or its tokens.
    Returns dict(bits=bits per unit, g_0=[mean of each layer], g_i=[...]).
    """
    nats = units = 0
    mine = np.arange(machine.rank, count, machine.world_size)
    with watch_gates(model) as gates:
        for start in range(0, -(-count // machine.world_size), args.micro_batch):  # as often in each process
            indices = mine[start:start + args.micro_batch]
            batches = [records[indices]] if len(indices) else []
            borrow(model, [idx for idx, _ in batches])
            for idx, targets in batches:
                loss = model(idx.to(machine.device), targets.to(machine.device))
                nats += loss.item() * targets.numel()
                units += count_units(targets)
    nats, units = machine.sum([nats, units])
    gates = [machine.sum([float(x) for x in total]) for total in gates]
    g_0, g_i = ([total[j] / total[2] for total in gates] for j in (0, 1))
    return dict(bits=nats / math.log(2) / units, g_0=g_0, g_i=g_i)


# ------------------------------------------------------------------------------------ the training loop


def can_sample(model):
    """Whether this process has the whole model. If the bank is dealt out, one line says how to sample."""
    whole = processes()[1] == 1 or not stored_banks(model)
    if not whole:
        print("no samples, since each process has a part of the bank; the checkpoint gives some to one "
              "process, with --prompt (text) or --sample (images)", flush=True)
    return whole


@contextlib.contextmanager
def stop_signals():
    """Yields a list that Ctrl-C and SIGTERM are put into, unless the parent has this process ignore them, for
    the loop to end where its state can be saved. A second Ctrl-C ends the program, but for a file that is
    being written, at once."""
    stop, numbers = [], [number for number in (signal.SIGINT, signal.SIGTERM)
                         if signal.getsignal(number) != signal.SIG_IGN]

    def on_signal(number, frame):
        stop.append(number)
        if signal.SIGINT in numbers:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    old_handlers = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


def train(args, machine, model, data, sets, unit, count_units, saved=None, after_save=None,
          optimizers_of=make_optimizers):
    """Trains `model` (a GPT on machine.device) to args.max_steps. The one loop, for text and images.

    sets: (train, validation), each sized, and indexed by indices (n,) → (ids, targets), as TextWindows.
    unit, count_units: what `evaluate` counts the bits per.
    saved: the checkpoint of the run that goes on.
    after_save: called with the step after each checkpoint but that of a run that is stopped, in the main
    process, to look at what is learned.
    optimizers_of: called with (model, args.lr_scale) → [Muon, AdamW], or others like them.
    KeyboardInterrupt if Ctrl-C or SIGTERM stopped it; the state is saved then.
    """
    order = DataOrder(len(sets[0]), args.batch_tokens // args.seq_len, args.seed)
    with contextlib.ExitStack() as stack, stop_signals() as stop:
        machine.in_main(lambda: stack.enter_context(only_run(args.out_dir, resume=saved is not None)))
        training = Training(args, machine, model, data, sets, order, unit, count_units, saved, optimizers_of)
        while True:
            step = training.step
            stopping = machine.sum([len(stop)])[0] > 0  # all processes stop after the same step
            done = step == args.max_steps
            new = step > training.first_step  # false where a run starts or goes on
            unsaved = new or saved is None  # false where a run goes on: its checkpoint is of this step
            if new and (step % args.log_every == 0 or step == 1 or done):
                training.report()
            if unsaved and (step % args.eval_every == 0 or done):
                training.evaluate()
            if done or stopping or (new and step % args.save_every == 0):
                if unsaved:
                    training.save()
                if after_save and machine.main and not stopping and can_sample(model):
                    model.eval()
                    after_save(step)
                    model.train()
                training.restart_clock()
            if done or stopping:
                break
            training.take_step()
    if not done:
        raise KeyboardInterrupt(f"stopped; the state is saved in {args.out_dir}, go on with --resume")


class Training:
    """The state of a run while it trains, and the steps of the loop."""

    def __init__(self, args, machine, model, data, sets, order, unit, count_units, saved, optimizers_of):
        """Starts the run, or goes on from its checkpoint."""
        self.args, self.machine, self.model, self.data = args, machine, model, data
        (self.train_set, self.val_set), self.order = sets, order
        self.unit, self.count_units = unit, count_units
        self.optimizers = optimizers_of(model, args.lr_scale)
        self.next = None  # the micro-batches of the next step, if they are loaded
        self.first_step, self.losses = 0, []  # the first step here; losses of the steps since the last report
        if saved is not None:
            self.first_step, self.losses = restore(args.out_dir, model, self.optimizers)
            if self.first_step >= args.max_steps:
                raise UserError(f"the run in {args.out_dir} has done its {self.first_step} steps; "
                                "raise --max_steps to go on, or sample from it")
        self.step = self.first_step
        if machine.main:
            self.log = Log(args.out_dir / "log.jsonl", None if saved is None else self.first_step)
            copy_decoder(data, args.out_dir)
        self.fast_model = compile_parts(model) if args.compile else model
        self.restart_clock()

    def restart_clock(self):
        """Speed is that of the steps since; what is no step does not count."""
        self.clock_step, self.clock = self.step, time.time()

    def zero_grad(self):
        """No gradients; but zeros for a bank that accumulates in place."""
        if self.args.kernels:
            from move_fast import zero_grad
            zero_grad(self.model)
        else:
            self.model.zero_grad()

    def take_step(self):
        """One optimizer step on the mean loss over all micro-batches of all processes."""
        args, machine = self.args, self.machine
        if self.step == self.first_step + 1:  # the first step compiles: it does not count
            self.synchronize_losses()
            self.restart_clock()
        batches = self.load()
        self.zero_grad()
        self.losses.append(self.backward(batches))
        if machine.world_size > 1:
            sum_gradients(self.model)
        set_learning_rates(self.optimizers, schedule(self.step, args.max_steps))
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()  # frees them before an evaluation
        self.step += 1

    def load(self):
        """This process's micro-batches of this step. Stored banks get to know their ids, and those of the
        next step, which can be brought while this one computes."""
        def batches(step):
            indices = self.order(step).reshape(-1, self.machine.world_size, self.args.micro_batch)
            return [self.train_set[part] for part in indices[:, self.machine.rank]]

        now, self.next = self.next or batches(self.step), None
        borrow(self.model, [idx for idx, _ in now])
        if stored_banks(self.model) and self.step + 1 < self.args.max_steps:
            self.next = batches(self.step + 1)
            prefetch(self.model, [idx for idx, _ in self.next])
        return now

    def backward(self, batches):
        """Adds up the gradient over micro-batches; returns this process's mean loss, on the device: nothing
        here waits for the GPU, so that it always has work."""
        total, device = 0, self.machine.device
        for batch in batches:
            if device.type == "cuda":
                batch = [t.pin_memory() for t in batch]
            idx, targets = (t.to(device, non_blocking=True) for t in batch)
            loss = self.fast_model(idx, targets) / len(batches)
            (loss / self.machine.world_size).backward()
            total += loss.detach()
        return total

    def synchronize_losses(self):
        """Waits for the device. Losses become numbers, means over all processes, and are checked."""
        self.losses = self.machine.sum([float(loss) / self.machine.world_size for loss in self.losses])
        self.require_finite("the loss", all(map(math.isfinite, self.losses)))

    def require_finite(self, what, finite):
        if not finite:
            folder = self.args.out_dir
            kept = (f"the checkpoint in {folder} is good, but --resume comes here again"
                    if (folder / "checkpoint.pt").exists() else "there is no checkpoint yet")
            raise UserError(f"{what} is not finite at step {self.step}; {kept}; train anew with a lower "
                            "--lr_scale or --dtype float32, and another --out_dir")

    def report(self):
        """Logs the training loss and the speed since the last report."""
        self.synchronize_losses()
        loss, self.losses = sum(self.losses) / len(self.losses), []
        text, record = f"step {self.step}/{self.args.max_steps}  loss {loss:.4f}", dict(loss=loss)
        if not self.args.compile or self.step > self.first_step + 1:  # else it is the compiler's time
            seconds_a_step = (time.time() - self.clock) / (self.step - self.clock_step)
            speed = self.args.batch_tokens / seconds_a_step
            peak, flops = self.machine.peak_flops(), 3 * sum(self.model.flops_per_token().values())
            mfu = speed * flops / peak if peak else None
            left = seconds_a_step * (self.args.max_steps - self.step)
            text += f"  {speed:,.0f} tokens/s" + (f"  MFU {mfu:.1%}" if mfu else "")
            text += f"  {int(left // 60)}:{int(left % 60):02d} left"
            record |= dict(tokens_per_s=speed, mfu=mfu, seconds_left=left)
        if self.machine.main:
            self.log(text, step=self.step, **record)
        self.restart_clock()

    def evaluate(self):
        """Logs bits per unit of the validation set, gates and use of the memory; draws the curves."""
        args = self.args
        count = min(len(self.val_set), max(1, args.eval_tokens // args.seq_len))
        result = evaluate(self.model, self.val_set, count, self.count_units, args, self.machine)
        bits = result.pop("bits")
        self.require_finite("the validation loss", math.isfinite(bits))
        if self.machine.main:
            text = f"step {self.step}/{args.max_steps}  validation {bits:.4f} {self.unit}"
            text += "".join(f"  {name} " + " ".join(f"{g:.2f}" for g in gates)
                            for name, gates in result.items() if gates)
            result |= bank_use(self.model, self.optimizers)
            if "rows_used" in result:
                text += f"  rows used {result['rows_used']:.0%}"
            if self.machine.device.type == "cuda":
                peak = result["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.machine.device)
                text += f"  peak memory {peak / 2**30:.1f} GiB"
            self.log(text, step=self.step, **{"val_" + self.unit.replace(" ", "_"): bits}, **result)
            if self.step:  # else there is no curve yet
                update_curves(args.out_dir)
        self.restart_clock()

    def save(self):
        """Writes a checkpoint, which holds finite numbers only."""
        self.synchronize_losses()
        finite = all(p.isfinite().all() for p in self.model.parameters()) and rows_are_finite(self.model)
        self.require_finite("a weight", not self.machine.sum([not finite])[0])
        not_saved = {"out_dir", "resume", "prompt", "sample", "save_npz", "asked"}
        flags = {flag: value for flag, value in vars(self.args).items() if flag not in not_saved}
        flags |= self.args.asked  # a machine where they can be had gets them again
        number = self.machine.together(lambda: save_rows(self.args.out_dir, self.model, self.step))
        files = self.machine.gather(number) if stored_banks(self.model) else []
        self.machine.in_main(lambda: save_checkpoint(
            self.args.out_dir, self.model, self.optimizers, step=self.step, losses=self.losses, flags=flags,
            data=self.data.identity(), meta=self.data.meta, rows=files))


def sum_gradients(model, large=1 << 22):
    """Adds up the gradients of all processes, in place: those of `large` numbers or more one by one, the
    others packed together, since a call has a cost of its own. Stored banks exchange theirs themselves."""
    packs, apart = {}, {bank.working_set.weight for bank in stored_banks(model).values()}
    for p in model.parameters():
        if p.grad is None or p in apart:
            continue
        if p.grad.numel() >= large:
            dist.all_reduce(p.grad)
        else:
            packs.setdefault(p.grad.dtype, []).append(p.grad)
    for gradients in packs.values():
        pack = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(pack)
        for g, total in zip(gradients, pack.split([g.numel() for g in gradients]), strict=True):
            g.copy_(total.view_as(g))


# ------------------------------------------------------------------------------------------------- text


def print_samples(model, encoding, prompt, args, device):
    """Prints `prompt` and what the model writes after it, to the end of the document or of what the model
    can read: as it comes, or one after the other where --num_samples are written at once."""
    idx, n = [encoding.eot_token, *encoding.encode_ordinary(prompt)], args.num_samples
    count = min(args.max_new_tokens, model.config.seq_len - len(idx) + 1)
    if count < 1:
        raise UserError(f"--prompt has {len(idx) - 1} tokens; this model takes up to "
                        f"{model.config.seq_len - 1}")
    # The model's vocabulary is padded: n_ids.
    stream = model.generate(torch.tensor([idx] * n, device=device), count, args.temperature, args.top_k,
                            args.top_p, n_ids=encoding.n_vocab,
                            generator=torch.Generator(device).manual_seed(args.seed))
    # A character may span tokens.
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(n)]
    texts, ended = [prompt] * n, set()
    print(prompt * (n == 1), end="", flush=True)
    at_once = 16 if device.type == "cuda" else 1  # the GPU is not waited for at every token
    while len(ended) < n and (chunk := list(itertools.islice(stream, at_once))):
        for i, tokens in enumerate(torch.stack(chunk, dim=1).tolist()):
            before = len(texts[i])
            for token in tokens:
                if token == encoding.eot_token:
                    ended.add(i)
                if i not in ended:
                    texts[i] += decoders[i].decode(encoding.decode_single_token_bytes(token))
            print(texts[i][before:] * (n == 1), end="", flush=True)
    tails = [decoder.decode(b"", final=True) for decoder in decoders]
    print(tails[0] if n == 1 else "\n---\n".join(map("".join, zip(texts, tails, strict=True))), flush=True)
    if len(ended) < n and count < args.max_new_tokens and "prompt" in args:
        print(f"stopped after {count} new tokens: prompt and answer can have {model.config.seq_len} together",
              file=sys.stderr)


def make_parser():
    parser, sampling = training_parser(__doc__, DEFAULTS)
    sampling.add_argument("--prompt", help="do not train: print how the model of a run continues this text")
    sampling.add_argument("--max_new_tokens", type=int, help="the most tokens that --prompt adds; less "
                          "where the model's seq_len ends (default: 200)")
    sampling.add_argument("--num_samples", type=int, help="texts to write at once (default: 1)")
    return parser


def main(argv=None):
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    sampling, saved = "prompt" in given, None
    require_utf8(given.get("prompt", ""), "--prompt")
    if sampling or "resume" in given:
        saved = find_run(given, "text", sampling, parser)
    args = resolve_flags(given, DEFAULTS, saved and saved["flags"])
    with ends_together(), memory_advice(lambda: how_to_save_memory(args)):
        machine = set_up_machine(args)
        if sampling:
            if machine.main:
                encoding = load_tokenizer(args.out_dir, saved["meta"])
                model = load_model(saved, args.out_dir, args, machine.device)
                print_samples(model, encoding, args.prompt, args, machine.device)
        else:
            check_batch(args, machine)
            model, encoding = train_text(args, machine, saved)
            if machine.main and can_sample(model):
                model.eval()
                print("\na sample:\n")
                print_samples(model, encoding, "", args, machine.device)


def train_text(args, machine, saved, change=None, optimizers_of=make_optimizers, part=(0, 1)):
    """Trains on text → the model and its tokenizer. change, optimizers_of: see `build` and `train`. part:
    where the training tokens begin and end, as shares."""
    data = load(args, machine, "text", TEXT_SETS)
    encoding = data.tokenizer()
    lengths = torch.from_numpy(token_bytes(encoding))
    model = start_model(args, machine, data, saved, most=DEFAULTS["cpu"]["micro_batch"], change=change)
    begin, end = (int(len(data.train) * share) for share in part)
    sets = [TextWindows(tokens, args.seq_len, data.folder / name)
            for tokens, name in ((data.train[begin:end], "train.bin"), (data.val, "val.bin"))]
    train(args, machine, model, data, sets, "bits per byte", lambda targets: lengths[targets].sum().item(),
          saved, optimizers_of=optimizers_of)
    return model, encoding


if __name__ == "__main__":
    run(main)
