"""The command line of train_gpt.py and train_image.py, and the machine that they run on.

A parser holds only what was given. `find_run` finds the run that goes on or is sampled from; `resolve_flags`
fills in the rest: from that run, else by the device. `set_up_machine` starts the processes.
"""
import argparse
import contextlib
import ctypes
import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import move_store
from optimizers import fast_bfloat16
from run_folder import newest_run, other_version, read_checkpoint
from script import ArgumentParser, UserError, first_line

EVERYWHERE = dict(data_dir="data", move_scale=1.0, memory="move", gate_value=None, attention="mha",
                  kv_rank=None, lr_scale=1.0, seed=0, dtype=None, kernels=None, bank_home="gpu", log_every=10,
                  top_k=None, top_p=None)
# What may change when a run goes on: it decides how a run is computed and shown, not what it computes.
MACHINE_FLAGS = {"micro_batch", "compile", "kernels"}  # follow from the device
OUTPUT_FLAGS = {"out_dir", "resume", "max_steps", "eval_every", "save_every", "log_every"}
SAMPLING_FLAGS = {"prompt", "sample", "save_npz", "temperature", "top_k", "top_p", "max_new_tokens",
                  "num_samples", "cfg_scale"}
FREE_FLAGS = {"device", "data_dir", "bank_home"} | MACHINE_FLAGS | OUTPUT_FLAGS | SAMPLING_FLAGS
LIMITS = dict(  # least and most
    depth=(1, 1000), kv_rank=(1, 10**6), seq_len=(1, 10**7), move_scale=(0, 10**4), batch_tokens=(1, 10**12),
    micro_batch=(1, 10**6), max_steps=(1, 10**9), lr_scale=(1e-30, 1e30), seed=(0, 2**63 - 1),
    eval_every=(1, 10**9), eval_tokens=(1, 10**12), save_every=(1, 10**9), log_every=(1, 10**9),
    temperature=(0, 100), top_k=(1, 10**6), top_p=(1e-6, 1), max_new_tokens=(1, 10**7),
    num_samples=(1, 10**5), cfg_scale=(0, 100), save_npz=(1, 10**8))


def training_parser(description, defaults, sizes=None):
    """(parser, its group for sampling) with the flags of every training script. What it parses holds only the
    flags that were given."""
    parser = ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                            argument_default=argparse.SUPPRESS)
    both = argparse.BooleanOptionalAction
    cuda, other = ({**EVERYWHERE, **defaults[device]} for device in ("cuda", "cpu"))

    def add(group, flag, help, **options):
        if "(default" not in help and cuda.get(flag) is not None:
            same = cuda[flag] == other[flag]
            help += f" (default: {cuda[flag]}" + ("" if same else f" on CUDA, else {other[flag]}") + ")"
        group.add_argument(f"--{flag}", help=help, **options)

    data = parser.add_argument_group("data")
    add(data, "dataset", "a folder of --data_dir, made by prepare_data.py")
    add(data, "data_dir", "where the data sets are")
    model = parser.add_argument_group("memory and model")
    add(model, "move_scale", "size of the memory, M = scale·depth/2 slots a token; 0: none", type=float)
    add(model, "memory", "one bank for all layers, tables of single layers, or none",
        choices=["move", "lave", "none"])
    add(model, "gate_value", "gate g_0 on the ordinary value (default: with move, not with lave)",
        action=both)
    add(model, "attention", "multi-head or latent attention", choices=["mha", "mla"])
    add(model, "kv_rank", "mla: width of the latent (default: half the model's)", type=int)
    add(model, "depth", "layers; the width is 64·depth, rounded up to heads of 128", type=int)
    if sizes:
        add(model, "size", "a model of LlamaGen's size, instead of --depth", choices=sizes)
    else:
        add(model, "seq_len", "tokens of a sequence", type=int)
    training = parser.add_argument_group("training")
    add(training, "batch_tokens", "tokens of an optimizer step, over all micro-batches and GPUs", type=int)
    add(training, "max_steps", "optimizer steps; the learning rate falls over their second half", type=int)
    add(training, "lr_scale", "factor on all learning rates", type=float)
    add(training, "seed", "of the weights, the order of the data and the samples", type=int)
    machine = parser.add_argument_group("machine")
    add(machine, "device", "(default: the best there is)", choices=["cuda", "mps", "cpu"])
    dtypes = ["bfloat16", "float32"]
    add(machine, "dtype", "of activations (default: bfloat16 where it is fast, for images on a GPU only; "
        "else float32)", choices=dtypes)
    add(machine, "bank_dtype", "of the bank, its gradient and its optimizer's state", choices=dtypes)
    add(machine, "bank_home", "where the rows of the bank and their moments are: in memory of the GPU, or "
        "of the host; of several processes each has its share", choices=["gpu", "host"])
    add(machine, "micro_batch", "sequences in memory at once; fewer need less memory and change nothing else "
        f"but rounding (default: as many as fit, at most {cuda['micro_batch']})", type=int)
    add(machine, "kernels", "compute with move_fast.py's kernels (default: on CUDA with Triton)", action=both)
    add(machine, "compile", "torch.compile the model", action=both)
    output = parser.add_argument_group("output")
    add(output, "out_dir", "folder of the run (default: out/ and a name from the flags; the newest run with "
        "--resume and for sampling)", type=Path)
    add(output, "resume", "go on from the checkpoint of the run", action="store_true")
    add(output, "eval_every", "steps between evaluations", type=int)
    add(output, "eval_tokens", "validation tokens of an evaluation, at most; at least a sequence", type=int)
    add(output, "save_every", "steps between checkpoints", type=int)
    add(output, "log_every", "steps between lines of the log", type=int)
    sampling = parser.add_argument_group("sampling")
    add(sampling, "temperature", "0 takes the most probable token", type=float)
    add(sampling, "top_k", "sample among the k most probable tokens only", type=int)
    add(sampling, "top_p", "nucleus sampling: among the fewest tokens of this probability", type=float)
    return parser, sampling


def can_parse(parser, flag, value):
    """Whether the parser can have read this value of a flag."""
    text = f"--{'no-' * (not value)}{flag}" if type(value) is bool else f"--{flag}={value}"
    try:
        return value is None or repr(vars(parser.parse_args([text]))[flag]) == repr(value)
    except (UserError, KeyError):
        return False


def find_run(given, kind, sampling, parser):
    """The checkpoint of the run that the flags `given` mean; its folder becomes their out_dir. UserError if
    there is none of this kind, or if a flag was given that makes another run of it."""
    folder = given.setdefault("out_dir", None) or newest_run(kind)
    given["out_dir"], saved = folder, read_checkpoint(folder)
    if saved["meta"]["kind"] != kind:
        raise UserError(f"{folder} holds a run of kind {saved['meta']['kind']}; this script needs {kind}")
    names = {action.dest for action in parser._actions}
    for flag, value in saved["flags"].items():
        if flag not in {*names, "seq_len"}:  # which an image set says
            raise other_version(folder / "checkpoint.pt", f"it has a flag {flag}")
        good = value == saved["config"]["seq_len"] if flag == "seq_len" else can_parse(parser, flag, value)
        if not good:
            raise UserError(f"{folder / 'checkpoint.pt'} is damaged: flag {flag} is {value!r}; remove it, "
                            "or give another --out_dir")
    free = FREE_FLAGS | ({"seed", "dtype"} if sampling else set())
    for flag, value in given.items():
        of_run = saved["flags"].get(flag)
        if of_run is None:  # what was left to its default
            of_run = saved["config"].get(flag)
        if flag not in free and of_run != value:
            raise UserError(f"--{flag} {value} does not fit the run in {folder}, which has {of_run}; "
                            "leave it out, or give another --out_dir")
    return saved


def resolve_flags(given, defaults, saved_flags=None):
    """All flags: those given, else those of the run that goes on, else what the device needs. UserError names
    the flag that is wrong."""
    saved = dict(saved_flags or {})
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    device = given.get("device") or saved.get("device")
    if not available.get(device):
        if "device" in given:
            raise UserError(f"--device {device}: PyTorch {torch.__version__} finds none; try --device cpu")
        device = next(name for name in available if available[name])
    if device != saved.get("device"):
        saved = {flag: value for flag, value in saved.items() if flag not in MACHINE_FLAGS}
    flags = {**EVERYWHERE, **defaults["cuda" if device == "cuda" else "cpu"], "micro_batch": None}
    for flag, value in flags.items():
        if saved_flags and (flag not in saved_flags or saved_flags[flag] is None and value is not None):
            raise other_version(given["out_dir"] / "checkpoint.pt", f"it has no flag {flag}")
    args = argparse.Namespace(**{**flags, **saved, **given, "device": device})
    args.asked = {flag: getattr(args, flag) for flag in MACHINE_FLAGS}  # what a checkpoint keeps of them
    for flag, (least, most) in LIMITS.items():
        value = getattr(args, flag, None)
        if value is not None and not least <= value <= most:  # nan is refused, too
            raise UserError(f"--{flag} must be from {least:g} to {most:g}, not {str(value)[:40]}")
    if 0 < (getattr(args, "temperature", None) or 0) < 1e-6:
        raise UserError(f"--temperature must be 0, or from 1e-6 to 100, not {args.temperature}")
    if Path(args.dataset).name != args.dataset or args.dataset in ("", ".", ".."):
        raise UserError(f"--dataset must be the name of a folder in {args.data_dir}, not {args.dataset!r}")
    if args.kv_rank is not None and args.attention != "mla":
        raise UserError("--kv_rank is for --attention mla")
    if args.bank_home == "host" and device == "mps":
        raise UserError("--bank_home host needs --device cuda or cpu")
    if args.dtype is None:
        args.dtype = "bfloat16" if fast_bfloat16(device) else "float32"
        if device == "cuda" and args.dtype == "float32":
            print("this GPU has no bfloat16; training in float32, which needs more memory", flush=True)
            args.bank_dtype = given.get("bank_dtype", "float32")
    resolve_kernels(args)
    if args.compile and (missing := compiler_missing(device)):
        print(f"--no-compile, since there is no {missing}", flush=True)
        args.compile = False
    if "out_dir" not in args:
        none = args.memory == "none" or args.move_scale == 0
        memory = "none" if none else f"{args.memory}-x{args.move_scale:g}"
        size = getattr(args, "size", None) or f"d{args.depth}"
        args.out_dir = Path("out") / f"{args.dataset}-{args.attention}-{memory}-{size}"
    return args


def resolve_kernels(args):
    """Sets args.kernels. UserError if they were asked for and cannot run."""
    if args.kernels is None and args.device == "cuda" or args.kernels:
        problem = None
        try:
            import move_fast
            if args.device != "cuda" and not move_fast.INTERPRETED:
                problem = "they run on CUDA only"
            elif args.device != "cuda" and args.dtype == "bfloat16":
                problem = "Triton's interpreter computes with --dtype float32 only"
        except ImportError as error:
            problem = f"move_fast.py cannot be imported ({error})"
        if not problem and args.device == "cuda" and (missing := compiler_missing("cuda")):
            problem = f"there is no {missing}"
        if problem and args.kernels:
            raise UserError(f"--kernels: {problem}; give --no-kernels")
        if problem:
            print(f"--no-kernels: {problem}; the bank takes more time and memory without them", flush=True)
        args.kernels = not problem
    args.kernels = bool(args.kernels)
    move_store.KERNELS = args.kernels or args.device != "cuda"


def compiler_missing(device):
    """What torch.compile, and on CUDA the kernels, need on this device and do not find, or None."""
    variable, language, names = "CXX", "C++", ("g++", "clang++", "cl")
    if device == "cuda":  # Triton builds a few lines of C at its first kernel
        if not importlib.util.find_spec("triton"):
            return "Triton"
        variable, language, names = "CC", "C", ("gcc", "clang", "cl", "tcc")
    if not any(name and shutil.which(name) for name in (os.environ.get(variable), *names)):
        return f"{language} compiler, such as {names[0]}"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.exists() else f"{header} (of Python's headers, package python3-dev)"


# ------------------------------------------------------------------------------- machine and processes

# Dense bfloat16 products with float32 sums, operations a second, from the makers' data sheets; for MFU.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12,
              "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


@dataclass
class Machine:
    """Where this process computes, and which of how many it is."""
    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def main(self):
        """The one process that prints and writes."""
        return self.rank == 0

    def peak_flops(self):
        """Of all GPUs together, or None where it is not known."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        return next((peak * self.world_size for part, peak in PEAK_FLOPS.items() if part in name), None)

    def sum(self, values):
        """Adds up a list of numbers over all processes."""
        values = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(values)  # on the CPU
        return values.tolist()

    def gather(self, number):
        """The integers, below 2⁵³, of all processes."""
        numbers = [0] * self.world_size
        numbers[self.rank] = number
        return [int(number) for number in self.sum(numbers)]

    def in_main(self, work):
        """work() in the main process, while the others wait. If it fails, all processes end."""
        return self.together(work if self.main else lambda: None)

    def together(self, work):
        """work() in each process. If one fails, all of them end."""
        result = failure = None
        try:
            result = work()
        except (UserError, OSError) as error:
            failure = error
        if self.sum([failure is not None])[0]:
            raise failure or UserError("another process failed; see its line")
        return result


def set_up_machine(args):
    """Device, processes (torchrun's, if it started us) and seed."""
    machine, cuda = Machine(torch.device(args.device)), args.device == "cuda"
    try:
        if cuda:
            machine.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(machine.device)
        if "RANK" in os.environ:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    except (ValueError, RuntimeError) as error:
        if "out of memory" in str(error):
            raise
        raise UserError(f"cannot start the processes ({first_line(error)}); use torchrun") from None
    machine.rank, machine.world_size = move_store.processes()
    if machine.world_size == 1 and args.device == "cpu" and sys.platform == "linux":
        # glibc gives large tensors back to the system after each use and has every page cleared at the
        # next: keeping them (M_MMAP_MAX = 0, M_TRIM_THRESHOLD = ∞) makes the default run 1.5 times faster.
        with contextlib.suppress(OSError, AttributeError):  # not every Linux has glibc
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-4, 0), mallopt(-1, -1)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    return machine


@contextlib.contextmanager
def ends_together():
    """The processes that start inside end together: Gloo's threads may abort a process that does not wait. If
    one of them fails, the others get a UserError."""
    try:
        yield
        if dist.is_initialized():
            dist.barrier()
    except RuntimeError as error:
        if dist.is_initialized() and any(name in str(error).lower() for name in ("gloo", "nccl")):
            raise UserError("another process ended; see its line") from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def how_to_save_memory(args):
    """What to do if memory runs out."""
    other = "" if args.device == "cpu" else ", or give --device cpu"
    if getattr(args, "prompt", None) is not None:
        return f"lower --num_samples {args.num_samples}{other}" if args.num_samples > 1 else \
            f"give a shorter --prompt{other}"
    if getattr(args, "save_npz", None):
        return f"lower --save_npz {args.save_npz} or --micro_batch{other}"
    size = f" {args.micro_batch}" if args.micro_batch else ""
    return (f"lower --micro_batch{size}{other}; if that does not help, train a model with "
            "a lower --move_scale or --depth")
