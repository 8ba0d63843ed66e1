"""Trains the GPT of move.py on images, class by class, and makes new ones.

An image is a sentence [class, code_1 … code_n] in one vocabulary (the codes, the classes, the null class), so
that the memory holds embeddings of classes and of codes with no new mechanism. The loop is train_gpt.py's.

    python train_image.py --move_scale 2                           handwritten digits, on a CPU or a GPU
    python train_image.py --move_scale 2 --dataset cifar10 --size B
    python train_image.py --resume                                 go on after Ctrl-C, a crash or a kill
    python train_image.py --sample --cfg_scale 3                   images of the trained model, a row a class
    python train_image.py --save_npz 1000                          many, for a program that evaluates them

--resume, --sample and --save_npz take the newest run in out/, or that of --out_dir, with all its flags. The
null class replaces a tenth of the classes in training, so that the model also learns images without a class;
sampling moves away from those (classifier-free guidance, arXiv 2207.12598). A run also writes
samples_<step>.png at every checkpoint, but that of Ctrl-C. The data set digits has the same defaults on every
device.
"""
import os
import signal
import time

if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C while modules load

import numpy as np
import torch
import torch.nn.functional as F

from command_line import (
    ends_together,
    find_run,
    how_to_save_memory,
    resolve_flags,
    set_up_machine,
    training_parser,
)
from move import sample
from prepare_data import image_code, prepare_digits
from script import UserError, memory_advice, run, write_file
from train_gpt import check_batch, load, load_model, start_model, train

# LlamaGen's models (arXiv 2406.06525): layers, width, heads.
SIZES = {"B": (12, 768, 12), "L": (24, 1024, 16), "XL": (36, 1280, 20), "XXL": (48, 1536, 24)}
SMALL = dict(dataset="digits", depth=2, batch_tokens=None, micro_batch=64, max_steps=400, eval_every=100,
             eval_tokens=1 << 22, save_every=200, dtype="float32", bank_dtype="float32", compile=False,
             temperature=1.0, cfg_scale=1.5)
LARGE = {**SMALL, **dict(depth=12, micro_batch=128, max_steps=1000, save_every=500, dtype=None,
                         bank_dtype="bfloat16", compile=True)}
DEFAULTS = dict(cuda=LARGE, cpu=SMALL)


class ImageRecords:
    """Records (N, 1 + n) as what a GPT reads and what follows: records[indices (B,)] → ids [class, code_1 …
    code_n-1] and targets [code_1 … code_n], int64 (B, n) each. Indices: see DataOrder.

    null_class: the id that stands for the class of a tenth of the records, evenly spread. Each epoch takes
    another tenth: in ten epochs each record has it once.
    """

    def __init__(self, tokens, n, null_class=None):
        self.rows, self.null_class = tokens.reshape(-1, 1 + n), null_class

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, indices):
        epoch, record = np.divmod(indices, len(self))
        rows = torch.from_numpy(self.rows[record].astype(np.int64))
        if self.null_class is not None:
            # Multiples of the golden ratio fill [0, 1) evenly, also those of every second record, and so on.
            without = (record * 0.6180339887498949 + epoch % 10 / 10) % 1 < 0.1
            rows[torch.from_numpy(without), 0] = self.null_class
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def grid_positions(grid):
    """(row, column) of the n tokens that a GPT reads of a record, (n, 2): the class at (0, 0), then the codes
    but the last, row by row, from (1, 1)."""
    codes = torch.cartesian_prod(*(torch.arange(1, size + 1) for size in grid)).view(-1, 2)
    return torch.cat((torch.zeros(1, 2, dtype=torch.int64), codes[:-1]))


@torch.inference_mode()
def generate_codes(model, classes, n_codes, null_class, cfg_scale=1.0, temperature=1.0, top_k=None,
                   top_p=None, generator=None, batch=None):
    """Codes of new images (N, n), int64, for token ids of classes (N,) on the model's device; `batch` images
    at a time, by default all.

    Classifier-free guidance reads each image twice, with its class and with the null class:
    logits = uncond + cfg_scale · (cond − uncond). At a cfg_scale of 1 there is nothing to do.
    """
    guided, n, batch, images = cfg_scale != 1, model.config.seq_len, batch or len(classes), []

    def pick(logits, noise):
        logits = logits[:, :n_codes]
        if guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + cfg_scale * (cond - uncond)
        return sample(logits, temperature, top_k, top_p, noise=noise)

    step = model.decoding_step(pick, n * -(-len(classes) // batch))
    cache = model.new_cache(batch * (1 + guided), n)
    for part in classes.split(batch):
        part = F.pad(part, (0, batch - len(part)), value=null_class)  # one shape for all: one compiled step
        idx, codes = torch.cat((part, torch.full_like(part, null_class))) if guided else part, []
        cache.reset()
        for _ in range(n):
            noise = torch.empty(batch, n_codes, device=idx.device).exponential_(generator=generator)
            codes.append(step(idx.unsqueeze(1), cache, noise))
            idx = codes[-1].repeat(2) if guided else codes[-1]
        images.append(torch.stack(codes, dim=1))
    return torch.cat(images)[:len(classes)]


def codes_of_classes(model, meta, classes, args):
    """Codes of new images of these classes (N,), an array → (N, n), as many at a time as --micro_batch says.
    They depend on it: what training chose by itself counts on a GPU only, which may have no room for more."""
    device, n_codes, null_class = model.head.weight.device, meta["n_codes"], meta["vocab_size"] - 1
    micro_batch = args.micro_batch if device.type == "cuda" else args.asked["micro_batch"]
    batch = min(len(classes), micro_batch or LARGE["micro_batch"])
    codes = generate_codes(model, n_codes + torch.as_tensor(classes).to(device), n_codes, null_class,
                           args.cfg_scale, args.temperature, args.top_k, args.top_p,
                           torch.Generator(device).manual_seed(args.seed), batch)
    return codes.cpu().numpy()


def save(path, write):
    write_file(path, write)
    print(f"wrote {path}", flush=True)


def save_codes(step, codes, classes, args):
    """samples_<step>_codes.npy, int64 (N, n), and their classes (N,), for another decoder (LlamaGen's)."""
    save(args.out_dir / f"samples_{step}_codes.npy", lambda file: np.save(file, codes))
    save(args.out_dir / f"samples_{step}_classes.npy", lambda file: np.save(file, classes))


MAX_ROWS, MAX_COLUMNS, MAX_PIXELS = 20, 10, 2048  # of a page of samples


def save_samples(step, model, meta, args):
    """samples_<step>.png: a row of new images a class, of up to 20; their codes, if there is no decoder."""
    with image_code() as image_data:
        decoder, names = image_data.load_decoder(args.out_dir, meta), meta["classes"]
    pixels = 16 if meta["decoder"] == "maskgit" else image_data.PATCH  # of a code's edge
    most_rows, columns = (min(most, max(1, MAX_PIXELS // (codes * pixels)))
                          for most, codes in zip((MAX_ROWS, MAX_COLUMNS), meta["grid"], strict=True))
    classes = np.linspace(0, len(names) - 1, min(most_rows, len(names))).round().astype(np.int64)
    codes = codes_of_classes(model, meta, classes.repeat(columns), args)
    if decoder is None:
        return save_codes(step, codes, classes.repeat(columns), args)
    images = decoder(codes, model.head.weight.device)
    page = image_data.contact_sheet(images.reshape(len(classes), columns, *images.shape[1:]),
                                    [names[c] for c in classes])
    save(args.out_dir / f"samples_{step}.png", lambda file: page.save(file, "PNG", optimize=True))


def save_many(step, model, meta, args):
    """samples_<step>.npz: --save_npz new images, equally many of each class (to within one), uint8
    (N, h, w, 3) under arr_0, as programs that compute an FID read them, their classes under arr_1; their
    codes, if there is no decoder."""
    with image_code() as image_data:
        decoder = image_data.load_decoder(args.out_dir, meta)
    classes = np.arange(args.save_npz) % len(meta["classes"])
    start = time.time()
    codes = codes_of_classes(model, meta, classes, args)
    print(f"{len(codes) / (time.time() - start):,.1f} images/s", flush=True)
    if decoder is None:
        return save_codes(step, codes, classes, args)
    images = decoder(codes, model.head.weight.device)
    save(args.out_dir / f"samples_{step}.npz", lambda file: np.savez(file, images, classes))


def main(argv=None):
    parser, sampling = training_parser(__doc__, DEFAULTS, SIZES)
    sampling.add_argument("--cfg_scale", type=float,
                          help="guidance towards the class; 1: none (default: 1.5)")
    sampling.add_argument("--sample", action="store_true",
                          help="do not train: make samples_<step>.png of a run")
    sampling.add_argument("--save_npz", type=int, metavar="N",
                          help="do not train: make samples_<step>.npz of N images")
    given = vars(parser.parse_args(argv))
    with image_code():  # before hours of training, if it cannot be imported
        pass
    only_sample = "sample" in given or "save_npz" in given
    saved = find_run(given, "image", only_sample, parser) if only_sample or "resume" in given else None
    if saved is None and "size" in given:
        if "depth" in given:
            raise UserError("give --size or --depth, not both")
        given["depth"] = SIZES[given["size"]][0]
    dataset = (saved["flags"] if saved else given).get("dataset", "digits")
    defaults = dict(cuda=SMALL, cpu=SMALL) if dataset == "digits" else DEFAULTS
    args = resolve_flags(given, defaults, saved and saved["flags"])
    with ends_together(), memory_advice(lambda: how_to_save_memory(args)):
        machine = set_up_machine(args)
        if not only_sample:
            train_images(args, machine, saved)
        elif machine.main:
            model = load_model(saved, args.out_dir, args, machine.device)
            for flag, make in (("sample", save_samples), ("save_npz", save_many)):
                if flag in given:
                    make(saved["step"], model, saved["meta"], args)


def train_images(args, machine, saved):
    data = load(args, machine, "image", dict(digits=prepare_digits))
    rows, columns = data.meta["grid"]
    args.seq_len = rows * columns
    args.batch_tokens = args.batch_tokens or 256 * args.seq_len  # 256 images
    check_batch(args, machine)
    size = getattr(args, "size", None)
    shape = dict(zip(("n_layers", "dim", "n_heads"), SIZES[size], strict=True)) if size else {}
    model = start_model(args, machine, data, saved, LARGE["micro_batch"], grid_positions(data.meta["grid"]),
                        **shape)
    sets = (ImageRecords(data.train, args.seq_len, null_class=data.meta["vocab_size"] - 1),
            ImageRecords(data.val, args.seq_len))
    train(args, machine, model, data, sets, "bits per image token", torch.numel, saved,
          after_save=lambda step: save_samples(step, model, data.meta, args))


if __name__ == "__main__":
    run(main)
