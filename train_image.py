"""Trains the GPT of move.py on pictures, class by class, and draws new ones.

A picture is a sentence [class, code_1 … code_n] in one vocabulary (the codes, the classes, the empty class), so
that the memory holds concepts of classes and of codes with no new mechanism. The training loop is train_gpt.py's.

    python train_image.py --move_scale 2                           handwritten digits, on a CPU or a GPU
    python train_image.py --move_scale 2 --dataset cifar10 --size B
    python train_image.py --move_scale 2 --sample --cfg_scale 3    pictures of the trained model, a row a class
    python train_image.py --move_scale 2 --save_npz 1000           many, for a program that evaluates them

The empty class replaces a tenth of the classes in training, so that the model also learns pictures without a
class; drawing moves away from those (classifier-free guidance, arXiv 2207.12598). A run lives in out/<run>/:
checkpoint.pt, log.jsonl, and samples_<step>.png at every checkpoint. --batch_tokens is by default 256 pictures;
the data set digits takes the defaults of "elsewhere" on every device.
"""
import argparse
import time

import numpy as np
import torch
import torch.distributed as dist

from pictures import sheet
from prepare_data import ArgumentParser, UserError, prepare_digits, run, write_file
from train_gpt import (add_training_flags, check_batch, load, load_checkpoint, load_model, make_model, memory_advice,
                       resolve_flags, set_up_machine, train)

# LlamaGen's models (arXiv 2406.06525): layers, width, heads.
SIZES = {"B": (12, 768, 12), "L": (24, 1024, 16), "XL": (36, 1280, 20), "XXL": (48, 1536, 24)}
DEFAULTS = {
    "cuda": dict(depth=12, micro_batch=128, max_steps=1000, eval_every=100, eval_tokens=1 << 22, save_every=500,
                 dtype="bfloat16", bank_dtype="bfloat16", compile=True),
    "cpu": dict(depth=2, micro_batch=64, max_steps=400, eval_every=100, eval_tokens=1 << 22, save_every=200,
                dtype="float32", bank_dtype="float32", compile=False),
    "dataset": "digits", "temperature": 1.0, "top_k": None, "sizes": SIZES,
}


class ImageRecords:
    """Records (N, 1 + n) as what a GPT reads and what follows: records[(B,) visits] → ids [class, code_1 … code_n-1]
    and targets [code_1 … code_n], int64 (B, n) each. Visits: see DataOrder.

    empty: the id of the empty class, which stands for the class of a tenth of the records, evenly spread; in each
    epoch of others, so that in ten epochs it is each one's once.
    """

    def __init__(self, tokens, n, empty=None):
        self.rows, self.empty = tokens.reshape(-1, 1 + n), empty

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, visits):
        epoch, record = np.divmod(visits, len(self))
        rows = torch.from_numpy(self.rows[record].astype(np.int64))
        if self.empty is not None:  # multiples of the golden ratio fill [0, 1) evenly, also those of every second record, and so on
            rows[torch.from_numpy((record * 0.6180339887498949 + epoch % 10 / 10) % 1 < 0.1), 0] = self.empty
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def draw_codes(model, data, classes, args, machine):
    """New pictures of these classes (N,) → their codes, uint16 (N, n). Drawn args.micro_batch at a time."""
    n_codes, empty = data.meta["n_codes"], data.meta["vocab_size"] - 1
    generator = torch.Generator(machine.device).manual_seed(args.seed)
    batches = []
    for batch in torch.as_tensor(classes).split(args.micro_batch):
        prompt = (n_codes + batch.to(machine.device)).unsqueeze(1)
        codes = model.generate(prompt, model.config.seq_len, args.temperature, args.top_k, args.top_p, n_ids=n_codes,
                               idx_without=torch.full_like(prompt, empty), cfg_scale=args.cfg_scale, generator=generator)
        batches.append(torch.stack(list(codes), dim=1).cpu().numpy().astype(np.uint16))
    return np.concatenate(batches)


def save(path, write):
    write_file(path, write)
    print(f"wrote {path}", flush=True)


def save_codes(step, codes, classes, args):
    """samples_<step>_codes.npy, int64 (N, n), and their classes (N,), for a decoder of elsewhere (LlamaGen's)."""
    save(args.out_dir / f"samples_{step}_codes.npy", lambda file: np.save(file, codes.astype(np.int64)))
    save(args.out_dir / f"samples_{step}_classes.npy", lambda file: np.save(file, classes))


MAX_ROWS, MAX_COLUMNS, MAX_PIXELS = 20, 10, 2048  # of a page of samples


def save_samples(step, model, data, args, machine):
    """samples_<step>.png: a row of new pictures of each class, or of some; their codes, if there is no decoder."""
    names = data.meta["classes"]
    pixels = 16 if data.meta["decoder"] == "maskgit" else 2  # of a code's edge
    most_rows, columns = (min(most, max(1, MAX_PIXELS // (codes * pixels)))
                          for most, codes in zip((MAX_ROWS, MAX_COLUMNS), data.meta["grid"]))
    classes = np.linspace(0, len(names) - 1, min(most_rows, len(names))).round().astype(np.int64)
    codes = draw_codes(model, data, classes.repeat(columns), args, machine)
    images = data.to_images(codes, machine.device)
    if images is None:
        return save_codes(step, codes, classes.repeat(columns), args)
    page = sheet(images.reshape(len(classes), columns, *images.shape[1:]), [names[c] for c in classes])
    save(args.out_dir / f"samples_{step}.png", lambda file: page.save(file, "PNG", optimize=True))


def save_many(step, model, data, args, machine):
    """samples_<step>.npz: --save_npz new pictures, as many of each class, uint8 (N, h, w, 3) under arr_0, as programs
    that compute an FID read them, their classes under arr_1; or their codes, if there is no decoder."""
    classes = np.arange(args.save_npz) % len(data.meta["classes"])
    start = time.time()
    codes = draw_codes(model, data, classes, args, machine)
    print(f"{len(codes) / (time.time() - start):,.1f} images/s", flush=True)
    images = data.to_images(codes, machine.device)
    if images is None:
        return save_codes(step, codes, classes, args)
    save(args.out_dir / f"samples_{step}.npz", lambda file: np.savez(file, images, classes))


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sampling = add_training_flags(parser, DEFAULTS)
    sampling.add_argument("--cfg_scale", type=float, default=1.5, help="guidance towards the class; 1: none (default: %(default)s)")
    sampling.add_argument("--sample", action="store_true", help="do not train: draw samples_<step>.png of the run in --out_dir")
    sampling.add_argument("--save_npz", type=int, metavar="N", help="do not train: draw N pictures into samples_<step>.npz")
    args = parser.parse_args(argv)
    if args.size and args.depth:
        raise UserError("give --size or --depth, not both")
    args.depth = SIZES[args.size][0] if args.size else args.depth
    resolve_flags(args, DEFAULTS if args.dataset != "digits" else {**DEFAULTS, "cuda": DEFAULTS["cpu"]})
    if not 0 <= args.cfg_scale <= 100:
        raise UserError(f"--cfg_scale must be from 0 to 100, not {args.cfg_scale:g}")
    if args.save_npz is not None and args.save_npz < 1:
        raise UserError(f"--save_npz must be at least 1, not {args.save_npz}")
    with memory_advice(args):
        run_command(args)


def run_command(args):
    """Trains; or draws, if there is --sample or --save_npz."""
    path = args.out_dir / "checkpoint.pt"
    drawing = args.sample or args.save_npz
    if (args.resume or drawing) and not path.exists():
        load_checkpoint(path)  # says so before any data set is made
    machine = set_up_machine(args)
    data = load(args, machine, "image", "digits", prepare_digits)
    args.seq_len = data.meta["grid"][0] * data.meta["grid"][1]
    if drawing:
        model, step = load_model(path, data.identity(), args, machine)
        if args.sample and machine.main:
            save_samples(step, model, data, args, machine)
        if args.save_npz and machine.main:
            save_many(step, model, data, args, machine)
        return

    args.batch_tokens = args.batch_tokens or 256 * args.seq_len
    check_batch(args)
    shape = dict(zip(("n_layers", "dim", "n_heads"), SIZES[args.size])) if args.size else {}
    model = make_model(args, machine, data, grid=tuple(data.meta["grid"]), **shape)
    train(args, machine, model, ImageRecords(data.train, args.seq_len, empty=data.meta["vocab_size"] - 1),
          ImageRecords(data.val, args.seq_len), torch.numel, "bits per image token", data.identity(),
          after_save=lambda step: save_samples(step, model, data, args, machine))
    if machine.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
