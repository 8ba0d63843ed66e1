"""Measurements and checks, as commands anyone can run.

    python experiments.py digits out/<run>/samples_<step>.npz    are generated digits the digits that were asked for?
    python experiments.py overhead                               what does the memory cost on the clock? On a CUDA GPU
"""
import argparse
import gc
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from move import GPT, GPTConfig
from prepare_data import ArgumentParser, UserError, load_dataset, load_digits, run, split_pictures, write_file
from train_gpt import make_optimizers, zero_gradients


def read_samples(path):
    """(images uint8 (N, h, w, 3), classes (N,)) of a file that train_image.py --save_npz wrote."""
    try:
        with np.load(path, allow_pickle=False) as samples:
            images, classes = samples["arr_0"], samples["arr_1"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no file of train_image.py --save_npz ({error})") from None
    if images.shape[1:] != (8, 8, 3) or images.dtype != np.uint8 or classes.shape != images.shape[:1]:
        raise UserError(f"{path} has pictures of shape {images.shape[1:]}, expected digits of (8, 8, 3)")
    return images, classes


def digits(path, seed=0, steps=600):
    """Trains a small convolutional network on the real training scans, says how many of the real held-out scans it
    gets right, and how many generated digits it takes for the class that was asked for; and whether they are copies."""
    generated, asked = read_samples(path)
    (train, labels), (held_out, held_out_labels) = split_pictures(*load_digits())
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                            nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10))
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

    print(f"real scans, held out: {agree(held_out, held_out_labels).mean():.1%} of {len(held_out)} are classified right")
    right = agree(generated, asked)
    print(f"generated digits: {right.mean():.1%} of {len(generated)} are classified as what was asked for; by class "
          + " ".join(f"{right[torch.from_numpy(asked) == c].mean():.0%}" for c in np.unique(asked)))

    def copied(images):  # root mean squared difference to the nearest training scan, in gray levels of 256
        return torch.cdist(pixels(images).flatten(1), x.flatten(1)).min(1).values.mean() * 255 / 8

    print(f"from the nearest training scan they differ by {copied(generated):.0f} gray levels, held-out scans by {copied(held_out):.0f}")


# --------------------------------------------------------------------------------------- overhead

VARIANTS = ["standard", "lave-x1", "move-x1", "move-x4", "move-x8", "move-x1-reference", "move-x4-reference", "move-x8-reference"]
MICRO_BATCHES = 4  # of an optimizer step


class Variant:
    """One model that is measured: standard, lave-x<scale>, move-x<scale> or move-x<scale>-reference. UserError for others."""

    def __init__(self, name, args, vocab_size):
        if not (match := re.fullmatch(r"standard|(lave|move)-x(\d+(?:\.\d+)?)(-reference)?", name)):
            raise UserError(f"--variants: {name} is none; there are standard, lave-x<scale>, move-x<scale>, move-x<scale>-reference")
        memory, scale, reference = match.groups()
        try:
            config = GPTConfig.from_depth(args.depth, float(scale or 0), vocab_size=vocab_size, seq_len=args.seq_len, memory=memory or "none")
        except ValueError as error:
            raise UserError(error) from None
        torch.manual_seed(0)
        self.name, self.before = name, torch.cuda.memory_allocated()  # bytes of the variants before this one
        self.model = GPT(config, torch.bfloat16, "reference" if reference else "auto")
        self.model.banks.to(getattr(torch, args.bank_dtype))
        self.model.to("cuda")
        self.optimizers = make_optimizers(self.model, 1.0)
        self.compiled = torch.compile(self.model, fullgraph=True)
        zero_gradients(self.model)
        self.forward_backward, self.step_ms, self.losses, self.peak = [], [], [], 0

    def step(self, batches):
        """An optimizer step; its times in ms: of forward and backward of a micro-batch, and of the optimizers, which
        includes that gradients are set to zero, or dropped."""
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        for i, (idx, targets) in enumerate([batches[-1], *batches]):
            if i == 1:  # the first one is not timed: it keeps the GPU at work while the CPU gets ahead, as in training
                start.record()
            loss = self.compiled(idx, targets)
            loss.backward()
        middle.record()
        for optimizer in self.optimizers:
            optimizer.step()
        zero_gradients(self.model)
        end.record()
        self.losses.append(loss.item())
        return start.elapsed_time(middle) / len(batches), middle.elapsed_time(end)

    def bank_bytes(self):
        """Of the memory's parameters, gradients and optimizer state."""
        return sum(4 * p.numel() * p.element_size() for p in self.model.banks.parameters())


def overhead(args):
    """Times training steps of the variants in turn, round after round, and prints each beside the first of them:
    median and spread (from the smallest to the largest) of all rounds. The ids are those of --dataset or, by default,
    drawn from a 1/rank law. The last figure of memory is without the bank's own parameters, gradients and optimizer state."""
    for flag in ("tokens", "seq_len", "vocab_size", "rounds"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    if args.tokens % args.seq_len:
        raise UserError(f"--tokens {args.tokens} is not a multiple of --seq_len {args.seq_len}")
    if not torch.cuda.is_available():
        raise UserError("overhead measures a CUDA device, and there is none that PyTorch can use")
    torch.set_float32_matmul_precision("high")
    rng = np.random.default_rng(0)
    vocab_size, length = args.vocab_size, args.tokens * MICRO_BATCHES + 1
    if args.dataset:
        data = load_dataset(args.data_dir / args.dataset)
        vocab_size, ids = -64 * (-data.meta["vocab_size"] // 64), data.train[:length].astype(np.int64)
        if len(ids) < length:
            raise UserError(f"{data.folder} has {len(ids)} tokens to train, overhead needs {length}; lower --tokens")
    else:
        law = 1 / np.arange(1, vocab_size + 1)
        ids = rng.permutation(vocab_size)[rng.choice(vocab_size, length, p=law / law.sum())]
    ids = torch.from_numpy(ids).to("cuda")
    batches = [tuple(ids[shift:][i * args.tokens:(i + 1) * args.tokens].view(-1, args.seq_len) for shift in (0, 1))
               for i in range(MICRO_BATCHES)]
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, depth {args.depth}, vocabulary {vocab_size:,}, bank in "
          f"{args.bank_dtype}, {args.tokens:,} tokens a micro-batch with {len(batches[0][0].unique()):,} different ids, "
          f"{MICRO_BATCHES} micro-batches a step, {args.rounds} rounds", flush=True)

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
                raise UserError(f"out of memory with {name}, which the others are compared with; lower --tokens") from None
            print(f"{name}: out of memory", flush=True)
            del variant
            gc.collect()
            torch.cuda.empty_cache()
    for _ in range(args.rounds):
        for variant in variants:
            times = variant.step(batches)
            variant.forward_backward.append(times[0]), variant.step_ms.append(times[1])

    base, rows = variants[0], []
    print(f"variant, forward+backward in ms and over {base.name}, optimizers in ms, tokens/s, peak GiB and over {base.name} without "
          "the bank's own, loss of the first and of the last micro-batch")
    for v in variants:
        ms, step_ms = np.median(v.forward_backward), np.median(v.step_ms)
        ratios = np.array(v.forward_backward) / np.array(base.forward_backward)  # round by round
        speed = args.tokens * MICRO_BATCHES / (MICRO_BATCHES * ms + step_ms) * 1000
        extra = (v.peak - v.bank_bytes()) - (base.peak - base.bank_bytes())
        rows.append((v.name, np.median(ratios) - 1, ratios.min() - 1, ratios.max() - 1))
        print(f"{v.name:20} {ms:6.2f} ({min(v.forward_backward):6.2f} to {max(v.forward_backward):6.2f})  {rows[-1][1]:+6.1%} "
              f"({ratios.min() - 1:+.1%} to {ratios.max() - 1:+.1%})  {step_ms:6.1f}  {speed:9,.0f}  {v.peak / 2**30:6.2f}  {extra / 2**30:+6.2f}  {v.losses[0]:6.3f} to {v.losses[-1]:.3f}", flush=True)
    if len(rows) > 1:
        chart(rows, args.out)


def chart(rows, path):
    """A bar for each variant but the first: how much longer its forward and backward take. rows: (name, median, smallest,
    largest)."""
    names, middle, low, high = zip(*rows[1:])
    middle, low, high = (100 * np.array(x) for x in (middle, low, high))
    figure = Figure(figsize=(7, 0.5 * len(names) + 1), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, middle, xerr=(middle - low, high - middle), color=["#999" if "reference" in n else "#36c" for n in names])
    axes.bar_label(bars, fmt="%+.1f %%", padding=4)
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.set_xlabel(f"forward + backward over {rows[0][0]}, %")
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=120))
    print(f"wrote {path}")


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="experiment", required=True)
    command = commands.add_parser("digits", description=digits.__doc__)
    command.add_argument("samples", type=Path, help="the .npz file of train_image.py --save_npz")
    command = commands.add_parser("overhead", description=overhead.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--variants", nargs="+", default=VARIANTS, help="the first is what the others are compared with")
    command.add_argument("--tokens", type=int, default=32768, help="of a micro-batch")
    command.add_argument("--seq_len", type=int, default=2048, help="tokens of a sequence")
    command.add_argument("--depth", type=int, default=12, help="layers; the width is 64 times that")
    command.add_argument("--bank_dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the memory")
    command.add_argument("--vocab_size", type=int, default=50304, help="where ids are drawn")
    command.add_argument("--dataset", help="take the ids of this data set of text")
    command.add_argument("--data_dir", type=Path, default=Path("data"), help="where the data sets are")
    command.add_argument("--rounds", type=int, default=10, help="measured steps of each variant")
    command.add_argument("--out", type=Path, default=Path("overhead.png"), help="the bar chart")
    args = parser.parse_args(argv)
    if args.experiment == "digits":
        digits(args.samples)
    else:
        overhead(args)


if __name__ == "__main__":
    run(main)
