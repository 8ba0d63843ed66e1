"""Images and tokens: how an image becomes codes, how codes become an image, and the data sets of images.

Two tokenizers of images are here. Ours cuts an image into patches of 2×2 pixels and replaces each by the
nearest entry of a codebook that k-means learns: 32×32 pixels become 16×16 codes, with nothing to download.
The other is the decoder of MaskGIT's VQGAN, whose codes of ImageNet are published: 16×16 codes become
256×256 pixels.

Images are uint8 (N, height, width, 3) everywhere, codes (N, rows·columns), row by row. A data set holds
records [class, code_1 … code_n] in one vocabulary: the codes, then the classes, then the null class.

Nothing of the other files is imported. What is wrong with the user's files is a ValueError of one line.
`create` is prepare_data.new_dataset for one folder: create(**meta) is a context manager that yields
(folder, meta), a folder to write files into and the dict that becomes its meta.json.
"""
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import tarfile
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from tqdm import tqdm

PATCH = 2  # pixels, of an edge


# -------------------------------------------------------------------------- patches and their codes


def to_patches(images):
    """(N, h, w, 3) → (N, h/2 · w/2, 12), row by row."""
    N, h, w, C = images.shape
    patches = images.reshape(N, h // PATCH, PATCH, w // PATCH, PATCH, C).swapaxes(2, 3)
    return patches.reshape(N, -1, PATCH * PATCH * C)


def nearest(patches, codebook):
    """For each patch (n, D) the nearest of the codes (K, D): indices and squared distances, (n,) each.

    |p - c|² = |p|² - 2 p·c + |c|². Both are whole numbers up to 255, so that float32 sums are exact, also
    where a GPU multiplies in TF32: every machine finds the same.
    """
    cost = torch.addmm(codebook.square().sum(1), patches, codebook.T, alpha=-2).min(dim=1)
    return cost.indices, cost.values + patches.square().sum(1)


def fit_codebook(images, n_codes, seed=0, iterations=10, patches_a_code=64):
    """k-means (Lloyd's algorithm) on a sample of the patches of training images → uint8 (n_codes, 12).

    Starts from patches that differ, of all images if the sample has too few; a code that no patch is nearest
    to moves to the worst served patch.
    ValueError if there are fewer different patches than codes.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = patches = to_patches(images).reshape(-1, PATCH * PATCH * 3)
    rng = np.random.default_rng(seed)
    if len(patches) > n_codes * patches_a_code:
        patches = patches[np.sort(rng.choice(len(patches), n_codes * patches_a_code, replace=False))]
    distinct = np.unique(patches, axis=0)
    if len(distinct) < n_codes and len(patches) < len(every):
        distinct = np.unique(every, axis=0)
        patches = np.concatenate((patches, distinct))
    if len(distinct) < n_codes:
        raise ValueError(f"the images have {len(distinct)} different patches, fewer than {n_codes} codes; "
                         "lower --codebook_size")
    codebook = torch.tensor(rng.permutation(distinct)[:n_codes], dtype=torch.float32, device=device)
    patches = torch.tensor(patches, dtype=torch.float32, device=device)
    for _ in tqdm(range(iterations), desc=f"learning {n_codes:,} codes", disable=None):
        found = [nearest(block, codebook) for block in patches.split(2048)]
        codes, error = map(torch.cat, zip(*found, strict=True))
        count = torch.bincount(codes, minlength=n_codes)
        total = torch.zeros(n_codes, patches.size(1), dtype=torch.int64, device=device)  # exact in any order
        total.index_add_(0, codes, patches.long())
        codebook = (total / count.clamp(min=1).unsqueeze(1)).round()
        unused = (count == 0).nonzero().squeeze(1)
        codebook[unused] = patches[error.topk(len(unused)).indices]
    return codebook.to(torch.uint8).cpu().numpy()


def encode(images, codebook):
    """uint8 images (N, h, w, 3) → uint16 codes (N, h/2 · w/2) of a codebook (K, 12)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes = torch.tensor(codebook, dtype=torch.float32, device=device)
    result = np.empty((len(images), images.shape[1] // PATCH * (images.shape[2] // PATCH)), dtype=np.uint16)
    with tqdm(total=len(images), desc="encoding", unit=" images", disable=None) as bar:
        for start in range(0, len(images), 256):
            patches = torch.from_numpy(to_patches(images[start:start + 256])).to(device).float()
            found = [nearest(block, codes)[0] for block in patches.flatten(0, 1).split(2048)]
            result[start:start + 256] = torch.cat(found).view(len(patches), -1).cpu().numpy()
            bar.update(len(patches))
    return result


def decode(codes, codebook, grid):
    """Codes (N, rows·columns) of a codebook (K, 12) → uint8 images (N, 2·rows, 2·columns, 3)."""
    rows, columns = grid
    patches = codebook[codes].reshape(len(codes), rows, columns, PATCH, PATCH, 3)
    return patches.swapaxes(2, 3).reshape(len(codes), rows * PATCH, columns * PATCH, 3)


def psnr(images, others):
    """Peak signal-to-noise ratio in dB, of the mean squared error over all pixels."""
    error = np.mean([np.square(a.astype(np.float32) - b).mean() for a, b in zip(images, others, strict=True)])
    return 10 * math.log10(255 ** 2 / error) if error else math.inf


# ------------------------------------------------------------------------------- MaskGIT's decoder


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and what they are added to, (N, n_in, h, w) → (N, n_out, h, w)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, n_in, eps=1e-6)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, n_out, eps=1e-6)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(n_out, n_out, 1, bias=False) if n_in != n_out else None

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        # Where the widths differ, what is added is made from y, not from x: so the weights were trained.
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(y))


class Stage(nn.Module):
    """Two residual blocks; then twice the height and width, but for the last stage."""

    def __init__(self, n_in, n_out, enlarge):
        super().__init__()
        self.block = nn.Sequential(ResidualBlock(n_in, n_out), ResidualBlock(n_out, n_out))
        self.upsample_conv = nn.Conv2d(n_out, n_out, 3, padding=1) if enlarge else None

    def forward(self, x):
        x = self.block(x)
        return x if self.upsample_conv is None else self.upsample_conv(F.interpolate(x, scale_factor=2.0))


class MaskGITDecoder(nn.Module):
    """The decoder of MaskGIT's VQGAN (arXiv 2202.04200): codes (N, rows·columns), int64 below n_codes
    → images (N, 3, 16·rows, 16·columns), about 0 to 1.

    Parameters have the names of the published file `maskgit-vqgan-imagenet-f16-256.bin`, whose
    `decoder.` and `quantize.embedding.` parts it takes.
    """

    def __init__(self, n_codes=1024, code_dim=256, width=128, multipliers=(1, 1, 2, 2, 4)):
        super().__init__()
        widths = [width * m for m in multipliers]
        self.quantize = nn.ModuleDict(dict(embedding=nn.Embedding(n_codes, code_dim)))
        self.decoder = nn.ModuleDict(dict(
            conv_in=nn.Conv2d(code_dim, widths[-1], 3, padding=1),
            mid=nn.Sequential(*(ResidualBlock(widths[-1], widths[-1]) for _ in range(2))),
            # up[0] is the last to be run, as in the file
            up=nn.ModuleList(Stage(widths[min(i + 1, len(widths) - 1)], n_out, enlarge=i > 0)
                             for i, n_out in enumerate(widths)),
            norm_out=nn.GroupNorm(32, widths[0], eps=1e-6),
            conv_out=nn.Conv2d(widths[0], 3, 3, padding=1)))

    def forward(self, codes, grid):
        x = self.quantize.embedding(codes).transpose(1, 2).unflatten(-1, grid)  # (N, code_dim, rows, columns)
        d = self.decoder
        x = d.mid(d.conv_in(x))
        for stage in reversed(d.up):
            x = stage(x)
        return d.conv_out(F.silu(d.norm_out(x)))

    @torch.inference_mode()
    def to_images(self, codes, grid, batch=16):
        """Codes (N, rows·columns), an array → uint8 images (N, 16·rows, 16·columns, 3)."""
        device = self.decoder.conv_in.weight.device
        blocks = torch.from_numpy(codes.astype(np.int64)).split(batch)
        images = [(self(block.to(device), grid).clamp(0, 1) * 255).round().byte().cpu() for block in blocks]
        return torch.cat(images).permute(0, 2, 3, 1).numpy()


# ------------------------------------------------------------------------------- files of decoders


def load_maskgit(file, name):
    """MaskGIT's decoder with the weights of a file (a path or an open file). ValueError, with the file's
    name, if it holds others."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        decoder = MaskGITDecoder()
        wanted = decoder.state_dict()
        for key, tensor in wanted.items():
            if weights[key].shape != tensor.shape:
                raise ValueError(f"{key} has {tuple(weights[key].shape)}, expected {tuple(tensor.shape)}")
        if other := [key for key in weights
                     if key.startswith(("decoder.", "quantize.")) and key not in wanted]:
            raise ValueError(f"{other[0]} is not of this decoder")
        decoder.load_state_dict({key: weights[key] for key in wanted})
        return decoder.eval()
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises all kinds for a file that is damaged
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{name} is not the decoder of MaskGIT's VQGAN ({reason}); "
                         "remove it and run again") from None


def load_array(file, name):
    """The array of a .npy file. ValueError, with the file's name, if there is none."""
    try:
        array = np.load(file, allow_pickle=False)
        return array[...]  # an archive of several arrays has no such item
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy raises all kinds; MemoryError too, for a header that is damaged
        raise ValueError(f"{name} holds no array ({type(error).__name__}: {error})") from None


def load_decoder(folder, meta):
    """What turns codes into images: a function (codes (N, rows·columns) array, device="cpu") → uint8 images
    (N, height, width, 3). None if the data set has no decoder.

    folder: any folder that holds the decoder's file, of a data set or of a run. meta: of the data set.
    ValueError if the file is not the one that meta names by size and sha256.
    """
    name = {"codebook": "codebook.npy", "maskgit": "decoder.pt"}.get(meta["decoder"])
    if name is None:
        return None
    path, grid, published = Path(folder) / name, tuple(meta["grid"]), meta["files"][name]
    if not path.is_file():
        raise ValueError(f"{path} is missing, or is no regular file")
    content = path.read_bytes()
    if len(content) != published["size"] or hashlib.sha256(content).hexdigest() != published["sha256"]:
        raise ValueError(f"{path} was altered: its size or sha256 is not that of its data set's meta.json")
    if meta["decoder"] == "maskgit":
        model = load_maskgit(io.BytesIO(content), path)
        return lambda codes, device="cpu": model.to(device).to_images(codes, grid)
    codebook, shape = load_array(io.BytesIO(content), path), (meta["n_codes"], PATCH * PATCH * 3)
    if codebook.dtype != np.uint8 or codebook.shape != shape:
        raise ValueError(f"{path} has shape {codebook.shape} and type {codebook.dtype}, "
                         f"expected {shape} and uint8")
    return lambda codes, device="cpu": decode(codes, codebook, grid)


# ---------------------------------------------------------------------------------- for the eye


def contact_sheet(rows, labels):
    """A page of many images, as a PIL image: rows of uint8 images (n, h, w, 3), each behind its label.
    Small images are enlarged."""
    # Pillow's own font has the letters of Latin-1 only; others stand as escapes.
    labels = [label if max(label, default="") < "\u0100" else ascii(label)[1:-1] for label in labels]
    height, width = rows[0].shape[1:3]
    scale = max(1, 32 // height)
    margin = 6 * max(map(len, labels)) + 12
    columns = max(map(len, rows))
    page = Image.new("RGB", (margin + columns * (width * scale + 2), len(rows) * (height * scale + 2) + 2),
                     "white")
    draw = ImageDraw.Draw(page)
    for i, (images, label) in enumerate(zip(rows, labels, strict=True)):
        top = 2 + i * (height * scale + 2)
        draw.text((4, top + height * scale // 2 - 6), label, fill="black")
        for j, image in enumerate(images):
            tile = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            page.paste(tile, (margin + j * (width * scale + 2), top))
    return page


# --------------------------------------------------------------------------------- reading images


def gray_of(image, stored):
    """The pixels of an image with one channel of more than 8 bits → a PIL image of 8 bits. stored: see
    read_image. ValueError if its values do not tell which of them is white."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        gray = (values >> (4 if "I;12" in stored else 8)).astype(np.uint8)
    else:
        low, high = values.min(), values.max()
        whites = [65535] if image.mode == "I" and image.format in ("PNG", "PPM") else [1, 255, 65535]
        white = next((white for white in whites if 0 <= low and high <= white), None)
        if white is None:
            raise ValueError(f"its values are from {low:g} to {high:g}, not 0 to 1, 255 or 65535")
        gray = np.round(values * (255 / white)).astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # 0 is white
        gray = 255 - gray
    if type(hidden := image.info.get("transparency")) is int:  # the gray that stands for "nothing here"
        gray[values == hidden] = 255
    return Image.fromarray(gray)


TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
         7: "TRANSVERSE", 8: "ROTATE_90"}  # what makes an image upright, by the value of EXIF's orientation


def read_image(path, size):
    """An image file as a person sees it, its middle square → uint8 (size, size, 3). Raises whatever Pillow
    raises for a file that it cannot read."""
    if not path.is_file():  # a pipe would wait for somebody to write into it
        raise ValueError("not a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of what it can read all the same
        with Image.open(path) as image:
            stored = str(image.tile[:1])  # how the file stores a pixel, "RGB;16B" say
            image.load()  # before the orientation: readers of some formats apply it themselves
            try:
                turn = TURNS.get(image.getexif().get(0x0112))
            except Exception:  # what stands there beside the image is often damaged; the image is not
                turn = None
            if image.mode[0] in "IF":
                image = gray_of(image, stored)
            elif image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
                hidden = image.info.get("transparency")  # in the depth of the file, the pixels have 8 bits
                if "RGB;16B" in stored and hidden:
                    image.info["transparency"] = tuple(value >> 8 for value in hidden)
                elif "'L;2'" in stored or "'L;4'" in stored:
                    image.info["transparency"] = hidden * (85 if "'L;2'" in stored else 17)
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            if turn:
                image = image.transpose(Image.Transpose[turn])
            return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


def files_below(folder):
    """Every file below a folder, behind links to folders too, without hidden ones."""
    def stop(error):
        raise error

    seen = set(map(str, Path(os.path.realpath(folder)).parents))
    for where, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        if (real := os.path.realpath(where)) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(where, name) for name in sorted(names) if not name.startswith("."))


def read_images(source, size):
    """The images below a folder that has one folder for each class: the middle square of each → (images
    uint8 (N, size, size, 3), labels int64 (N,), names of the classes, number of unreadable files)."""
    if size % 2 or not 2 <= size <= 4096:
        raise ValueError(f"--image_size must be an even number of pixels from 2 to 4096, not {size}")
    if not source.is_dir():
        raise ValueError(f"there is no folder {source}")
    classes = sorted(path.name for path in source.iterdir() if path.is_dir() and path.name[0] != ".")
    if classes and {name.lower() for name in classes} <= {"train", "val", "valid", "validation", "test"}:
        print(f"the classes are {', '.join(classes)}; if these are splits of a set, give one of them "
              f"instead: --images {source / classes[0]}")
    images, labels, unreadable = [], [], {}
    for label, name in enumerate(tqdm(classes, desc="reading", unit=" classes", disable=None)):
        for path in files_below(source / name):
            try:
                images.append(read_image(path, size))
                labels.append(label)
            except MemoryError:
                raise
            except Image.DecompressionBombError:
                unreadable[path] = "it has too many pixels"
            except Exception as error:  # readers of images raise all kinds; one file never ends a preparation
                unreadable[path] = f"{type(error).__name__}: {error}"
    for path, reason in itertools.islice(unreadable.items(), 20):
        print(f"skipped {path}: {' '.join(reason.split())[:200]}")
    if len(unreadable) > 20:
        print(f"skipped {len(unreadable) - 20:,} more files")
    if empty := [name for label, name in enumerate(classes) if label not in set(labels)]:
        raise ValueError(f"{source / empty[0]} has no readable image; every folder is a class and needs some")
    if not images:
        raise ValueError(f"{source} has no folders of images; it needs one for each class")
    return np.stack(images), np.array(labels), classes, len(unreadable)


def varied(images, seed, degrees=8, stretch=0.08, shift=0.5):
    """The images (N, h, w, 3), each turned, stretched and shifted (in pixels) a little, by random amounts
    up to these."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    u = 2 * torch.rand(5, len(pixels), generator=torch.Generator().manual_seed(seed)) - 1
    angle, (x, y) = u[0] * math.radians(degrees), u[1:3] * shift * 2 / pixels.size(-1)
    rows = [torch.stack([(1 + stretch * u[3]) * angle.cos(), -angle.sin(), x]),
            torch.stack([angle.sin(), (1 + stretch * u[4]) * angle.cos(), y])]
    grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1), pixels.shape, align_corners=False)
    pixels = F.grid_sample(pixels, grid, align_corners=False)
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def read_cifar10(path, per_file):
    """CIFAR-10's binary archive, six files of `per_file` images → ((images uint8 (N, 32, 32, 3), labels
    int64 (N,)) to train, the same to validate)."""
    again = "remove it and run again"
    parts, record = {}, 1 + 3 * 32 * 32
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                name = os.path.basename(member.name)
                if member.isfile() and re.fullmatch(r"(data_batch_[1-5]|test_batch)\.bin", name):
                    content = archive.extractfile(member).read()
                    parts[name] = np.frombuffer(content, np.uint8).reshape(per_file, record)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no whole archive of CIFAR-10 ({error}); {again}") from None
    if len(parts) != 6:
        raise ValueError(f"{path} has {len(parts)} of the 6 files of CIFAR-10; {again}")

    def split(names):
        rows = np.concatenate([parts[name] for name in names])
        if np.bincount(rows[:, 0], minlength=10).tolist() != [len(rows) // 10] * 10:
            raise ValueError(f"{path} does not have {len(rows) // 10:,} images of each class in "
                             f"{', '.join(names)}; {again}")
        images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), rows[:, 0].astype(np.int64)

    return split([f"data_batch_{i}.bin" for i in range(1, 6)]), split(["test_batch.bin"])


# ---------------------------------------------------------------------------- records and data sets


@contextlib.contextmanager
def new_records(create, classes, n_codes, grid, **about):
    """A data set of images in the making: yields (folder, meta, write), where write(split, labels (n,),
    codes (n, rows·columns)) adds n records. ValueError if a split stays empty."""
    length = 1 + grid[0] * grid[1]
    vocab_size = n_codes + len(classes) + 1  # the last one is the null class
    with create(kind="image", vocab_size=vocab_size, n_codes=n_codes, classes=classes, grid=list(grid),
                **about) as (new, meta), contextlib.ExitStack() as stack:
        id_type = np.dtype(meta["dtype"]).newbyteorder("<")
        files = {split: stack.enter_context(open(new / f"{split}.bin", "wb")) for split in ("train", "val")}
        counts = dict.fromkeys(files, 0)

        def write(split, labels, codes):
            records = np.column_stack((n_codes + np.asarray(labels, dtype=np.int64), codes))
            files[split].write(records.astype(id_type).tobytes())
            counts[split] += len(records)

        yield new, meta, write
        stack.close()
        if not all(counts.values()):
            raise ValueError(f"{about['source']}: too few images to split into training and validation")
        val = np.fromfile(new / "val.bin", id_type).reshape(-1, length)
        # An evaluation may take only the first ones, so the order of the classes must not show.
        (new / "val.bin").write_bytes(np.random.default_rng(0).permutation(val).tobytes())
        meta |= {split: dict(tokens=n * length, records=n) for split, n in counts.items()}


def write_images(create, train, val, classes, n_codes, variants=(), **about):
    """Makes a data set of images with a codebook of its own. train, val: (uint8 images (N, h, w, 3),
    labels (N,)). variants: the training images again in other ways, mirrored say, for more records: arrays
    (N, h, w, 3). ValueError if the images have too few different patches."""
    codebook = fit_codebook(train[0], n_codes)
    grid = [size // PATCH for size in train[0].shape[1:3]]
    with new_records(create, classes, n_codes, grid, decoder="codebook", **about) as (new, meta, write):
        np.save(new / "codebook.npy", codebook)
        used = np.zeros(n_codes, dtype=bool)
        for images in (train[0], *variants):
            codes = encode(images, codebook)
            used[codes] = True
            write("train", train[1], codes)
        images, labels = val
        codes = encode(images, codebook)
        write("val", labels, codes)
        decoded = decode(codes, codebook, grid)
        meta |= dict(psnr=psnr(images, decoded), codes_used=float(used.mean()))
        pairs = np.stack((images, decoded), axis=1)  # (N, 2, h, w, 3)
        shown = [c for c in range(len(classes)) if (labels == c).any()][:20]
        rows = [pairs[labels == c][:5].reshape(-1, *images.shape[1:]) for c in shown]
        contact_sheet(rows, [classes[c] for c in shown]).save(new / "contact_sheet.png")
    print(f"validation images and what their codes decode to: {meta['psnr']:.1f} dB PSNR (look at "
          f"contact_sheet.png); training uses {meta['codes_used']:.1%} of the codes")


IMAGENET_CLASSES = [str(i) for i in range(1000)]


def check_codes(codes, n_codes, label, where):
    """ValueError, saying where, unless codes is (..., 256) whole numbers below n_codes and label a class of
    ImageNet."""
    if codes.ndim < 1 or codes.shape[-1] != 256 or codes.dtype.kind not in "iu" or not codes.size:
        raise ValueError(f"{where}: has codes of shape {codes.shape} and type {codes.dtype}, "
                         "expected 256 whole numbers")
    if codes.min() < 0 or codes.max() >= n_codes:
        wrong = codes.max() if codes.max() >= n_codes else codes.min()
        raise ValueError(f"{where}: has code {wrong}, expected 0 to {n_codes - 1}")
    if type(label) is not int or not 0 <= label < 1000:
        raise ValueError(f"{where}: has class {label!r}, expected 0 to 999")


def held_out(i, n, stretch=1):
    """Whether record i of about n, which lie in the order of their classes, is for validation: a hundredth
    is, of fewer than 10,000 a tenth, in whole stretches."""
    every = 100 if n >= 10_000 else 10
    return i // stretch % every == every // 2


def write_imagenet(create, codes_path, decoder_path, source):
    """ImageNet-1K in MaskGIT's 1,024 codes: JSON lines with class_id and 256 tokens, read one by one. The
    file does not say which records are crops of one image; they lie together, so whole stretches are held
    out."""
    decoder = load_maskgit(decoder_path, decoder_path)
    size = codes_path.stat().st_size
    with open(codes_path, "rb") as file, \
            tqdm(total=size, desc="records", unit="B", unit_scale=True, disable=None) as bar, \
            new_records(create, IMAGENET_CLASSES, 1024, [16, 16], decoder="maskgit",
                        source=source) as (new, _, write):
        n, shown = 0, []
        for i, line in enumerate(file):
            n = n or size // len(line)
            where = f"{codes_path} line {i + 1}"
            try:
                record = json.loads(line)
                codes, label = np.array(record["tokens"]), record["class_id"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{where}: is not a record with class_id and tokens ({error!r}); "
                                 "remove the file and run again") from None
            check_codes(codes, 1024, label, where)
            split = "val" if held_out(i, n, stretch=max(1, n // 1600)) else "train"
            write(split, [label], codes.reshape(1, -1))
            if i % max(1, n // 8) == 0 and len(shown) < 8:
                shown.append((str(label), codes))
            bar.update(len(line))
        if not shown:
            raise ValueError(f"{codes_path} is empty; remove it and run again")
        torch.save(decoder.state_dict(), new / "decoder.pt")
        images = decoder.to_images(np.stack([codes for _, codes in shown]), (16, 16))
        page = contact_sheet(images[:, None], [label for label, _ in shown])
        page.save(new / "contact_sheet.png")


def write_codes(create, folder):
    """Codes of LlamaGen's VQGAN (arXiv 2406.06525), as its extraction leaves them: for each image a file
    imagenet256_codes/<i>.npy (1, crops, 256) and imagenet256_labels/<i>.npy (1,). Every crop is a record."""
    names = sorted((path.stem for path in (folder / "imagenet256_codes").glob("[!.]*.npy")),
                   key=lambda name: (len(name), name))
    if not names:
        raise ValueError(f"{folder / 'imagenet256_codes'} has no .npy files; "
                         "--codes wants the folder that LlamaGen's extraction writes to")

    def array(kind, name):
        path = folder / f"imagenet256_{kind}" / f"{name}.npy"
        if not path.is_file():
            raise ValueError(f"{path} is missing or no regular file; every file of codes needs its label")
        return load_array(path, path)

    with new_records(create, IMAGENET_CLASSES, 16384, [16, 16], decoder=None,
                     source=f"LlamaGen codes of {folder.name}") as (_, _, write):
        for i, name in enumerate(tqdm(names, desc="records", unit=" images", disable=None)):
            codes, labels = array("codes", name), array("labels", name)
            label = labels.item() if labels.size == 1 and labels.dtype.kind in "iu" else None
            check_codes(codes, 16384, label, folder / "imagenet256_codes" / f"{name}.npy")
            codes = codes.reshape(-1, 256)
            write("val" if held_out(i, len(names)) else "train", [label] * len(codes), codes)
