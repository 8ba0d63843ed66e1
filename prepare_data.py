"""Makes every data set into one format on disk, from which the training scripts read:

    data/<name>/train.bin  val.bin      token ids, uint16 little endian
                meta.json               sizes, source, and the sha256 of the other files
    text:       tokenizer.tiktoken      a token a line: its bytes in base64, its rank
    pictures:   codebook.npy            the patches that the codes stand for; or decoder.pt, a network's weights
                contact_sheet.png       for a look before training

    python prepare_data.py python                    Python's own source: no network, the default of train_gpt.py
    python prepare_data.py shakespeare               1.1 MB, downloaded
    python prepare_data.py fineweb_edu --shards 10   100M tokens a shard, downloaded
    python prepare_data.py --text FILE... --name N   your own files

    python prepare_data.py digits                    1,797 scans of 8×8 pixels: no network, the default of train_image.py
    python prepare_data.py cifar10                   60,000 pictures of 32×32 pixels, downloaded (170 MB)
    python prepare_data.py --images DIR --name N     your own pictures, one folder a class
    python prepare_data.py imagenet                  ImageNet-1K in the codes of MaskGIT's VQGAN, downloaded
    python prepare_data.py --codes DIR --name N      codes that LlamaGen's extraction wrote

A folder is written under another name and renamed, so that one that exists is complete. Text is one
long sequence; documents are separated by the token <|endoftext|>, which stands before each of them and
for no byte of text. Pictures are records [class, code_1 … code_n] in one vocabulary: the codes, then the
classes, then the empty class.
"""
import argparse
import base64
import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import requests
import rustbpe
import tiktoken
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from pictures import MaskGITDecoder, decode, encode, fit_codebook, psnr, sheet

FORMAT = 1  # of the files above; a reader refuses any other
SEPARATOR = "<|endoftext|>"

SHAKESPEARE = dict(
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    size=1115394, sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
# FineWeb-Edu in GPT-2's tokens, made by Andrej Karpathy for llm.c: one shard to validate, 1,001 to train.
FINEWEB_EDU = "https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main/"
FINEWEB_EDU_SHARDS = 1001

# 1,797 handwritten digits of UCI's Optical Recognition of Handwritten Digits (https://doi.org/10.24432/C50P49),
# CC BY 4.0, by E. Alpaydin and C. Kaynak.
DIGITS = Path(__file__).resolve().parent / "digits.npz"
DIGITS_SHA256 = "a574184a37ce1fc944b97f3077d6e05600d93de4cc772d19d29f67fd6b426f20"
CIFAR10 = dict(url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", md5="c32a1d4ab5d03f1284b67883e8d87530",
               batch=10_000)  # pictures in each of its six files
# ImageNet-1K as codes, of the RAR project (arXiv 2411.00776), and the VQGAN that they are codes of.
IMAGENET_CODES = "https://huggingface.co/yucornetto/RAR/resolve/main/maskgitvq.jsonl"
MASKGIT_VQGAN = "https://huggingface.co/fun-research/TiTok/resolve/main/maskgit-vqgan-imagenet-f16-256.bin"


# ------------------------------------------------------------------------------- errors and flags


class UserError(Exception):
    """What the user can mend: one line that says what was wrong, what was expected, what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, whose complaints are one line too."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def run(main):
    """Runs a script: errors of the user or of the machine end it with one line and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: temporary files are removed
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------------ the format on disk


# Which file turns tokens back into what they stand for.
DECODERS = {"text": ["tokenizer.tiktoken"], "codebook": ["codebook.npy"], "maskgit": ["decoder.pt"], None: []}


@dataclass
class Dataset:
    """A checked data set: its meta.json and its token ids, uint16, read from disk as needed."""
    folder: Path
    meta: dict
    train: np.ndarray
    val: np.ndarray

    def identity(self):
        """What tells this data set from others: the hashes of its files."""
        return {f"sha256 of {name}": published["sha256"] for name, published in self.meta["files"].items()}

    def tokenizer(self):
        """The tiktoken.Encoding of a text data set."""
        lines = (self.folder / "tokenizer.tiktoken").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        return make_encoding(ranks, self.meta["tokenizer"]["pattern"])

    def to_images(self, codes, device="cpu"):
        """Codes (N, n) of a data set of pictures → uint8 images (N, height, width, 3); None if it has no decoder."""
        grid = tuple(self.meta["grid"])
        if self.meta["decoder"] == "codebook":
            return decode(codes, np.load(self.folder / "codebook.npy"), grid)
        if self.meta["decoder"] == "maskgit":
            return load_maskgit(self.folder / "decoder.pt").to(device).to_images(codes, grid)


def hash_of(path, kind="sha256"):
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_dataset(folder):
    """Reads data/<name>/ and checks every file's size and hash. UserError names what is wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no data set {folder}; make it with prepare_data.py (see its --help)")
    again = f"; remove {folder} and make it again with prepare_data.py"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["format"] != FORMAT:
            raise UserError(f"{folder} has format {meta['format']}, this program reads {FORMAT}{again}")
        needed = ["train.bin", "val.bin", *DECODERS["text" if meta["kind"] == "text" else meta["decoder"]]]
        if missing := [name for name in needed if name not in meta["files"]]:
            raise UserError(f"{folder / 'meta.json'} is damaged (it has no hash of {missing[0]}){again}")
        for name, published in meta["files"].items():
            size = (folder / name).stat().st_size
            if size != published["size"]:
                raise UserError(f"{folder / name} has {size} bytes, not the {published['size']} of meta.json{again}")
            if hash_of(folder / name) != published["sha256"]:
                raise UserError(f"{folder / name} was altered: its sha256 is not that of meta.json{again}")
        bins = [np.memmap(folder / f"{split}.bin", dtype="<u2", mode="r") for split in ("train", "val")]
        largest = max(tokens.max() for tokens in bins)
        if largest >= meta["vocab_size"]:
            raise UserError(f"{folder} has token {largest}, outside its vocabulary of {meta['vocab_size']}{again}")
        if meta["kind"] == "image":
            length = 1 + meta["grid"][0] * meta["grid"][1]
            for tokens in bins:
                if len(tokens) % length or (tokens[::length] < meta["n_codes"]).any():
                    raise UserError(f"{folder} has records that are not a class and {length - 1} codes{again}")
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing{again}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'meta.json'} is damaged ({error!r}){again}") from None
    return Dataset(folder, meta, *bins)


def write_file(path, write):
    """write(file) to a temporary name, then renames: the file is always whole, the old one or the new."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder):
    """A temporary folder that becomes `folder` if the block ends well, and vanishes otherwise."""
    if folder.exists():
        raise UserError(f"{folder} is there already; remove it to make it again, or give another --name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    temporary.chmod(0o755)  # mkdtemp's folders are for their owner only
    try:
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if folder.exists():
                raise UserError(f"{folder} was made by another process meanwhile; it can be used") from None
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_dataset(folder, **meta):
    """A data set in the making: a temporary folder for its files, and the dict that becomes meta.json, to
    which the sizes and hashes of the files are added."""
    with new_folder(Path(folder)) as new:
        meta = dict(format=FORMAT, **meta)
        yield new, meta
        meta["files"] = {path.name: dict(size=path.stat().st_size, sha256=hash_of(path))
                         for path in sorted(new.iterdir()) if path.suffix != ".png"}
        (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


# -------------------------------------------------------------------------------- text and tokens

# How text is cut before byte pairs are merged: contractions, words with the sign before them, up to
# two digits, runs of signs, ends of lines, white space. After GPT-4's pattern.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
           r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")


def make_encoding(ranks, pattern, name="bpe"):
    """A tiktoken.Encoding of byte-pair ranks, whose last token is the separator."""
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={SEPARATOR: len(ranks)})


def token_bytes(encoding):
    """Bytes of text that each token stands for, (vocab_size,): none for the separator."""
    return np.array([len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab - 1)] + [0])


def train_tokenizer(documents, vocab_size, sample=32_000_000):
    """Byte-pair encoding learned from the first `sample` characters of the documents."""
    if not 257 <= vocab_size <= 65536:
        raise UserError(f"--vocab_size must be from 257 (bytes and separator) to 65536 (uint16), not {vocab_size}")

    def head():
        left = sample
        for document in documents:
            yield document[:left]
            left -= len(document)
            if left <= 0:
                return

    print(f"learning a vocabulary of {vocab_size:,} tokens", flush=True)
    bpe = rustbpe.Tokenizer()
    try:
        bpe.train_from_iterator(head(), vocab_size - 1, pattern=PATTERN)
    except SystemError as error:  # what becomes of a Ctrl-C in there
        raise error.__cause__ or error
    return make_encoding({bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}, PATTERN)


def tokenize(documents, encoding, title):
    """Yields the tokens of the documents as uint16 arrays, the separator before each document."""
    separator = encoding.eot_token
    with tqdm(total=sum(map(len, documents)), desc=title, unit="B", unit_scale=True, disable=None) as bar:
        for start in range(0, len(documents), 256):
            batch = documents[start:start + 256]
            try:
                tokens = encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count())
            except BaseException as error:  # what a panic of tiktoken's Rust code is derived from
                if type(error).__name__ != "PanicException":
                    raise
                raise UserError("tiktoken cannot read a document with a run of a million blanks; break or remove it") from None
            yield np.concatenate([np.array([separator, *t], dtype=np.uint16) for t in tokens])
            bar.update(sum(map(len, batch)))


def split_documents(documents):
    """(train, val): whole documents in the order of their hashes, so that the split is random, the
    same whatever the order of the files, and no text is in both. A hundredth goes to val, a tenth of
    a set under 10 MB. Where that leaves val less than half full, it gets the end of the longest document."""
    unique = {hashlib.sha256(d.encode()).digest(): d for d in documents if d.strip()}
    documents = [unique[digest] for digest in sorted(unique)]
    size = sum(map(len, documents))
    val_size = size // 100 if size > 10_000_000 else size // 10
    train, val, filled = [], [], 0
    for document in documents:
        if filled < val_size and len(document) <= val_size:
            val.append(document)
            filled += len(document)
        else:
            train.append(document)
    if train and filled < val_size / 2:
        longest = max(range(len(train)), key=lambda i: len(train[i]))
        text = train[longest]
        missing = val_size - filled
        cut = len(text) - missing
        cut = text.rfind("\n", max(0, cut - missing), cut) + 1 or cut  # at the end of a line, if one is near
        train[longest] = text[:cut]
        val.append(text[cut:])
    if not any(train) or not any(val):
        raise UserError("there is too little text to split into training and validation")
    return train, val


def write_tokens(folder, splits, encoding, source):
    """Writes a text data set. splits: {'train': ..., 'val': ...}, each an iterable of uint16 arrays."""
    lengths = token_bytes(encoding)
    with new_dataset(folder, kind="text", vocab_size=encoding.n_vocab, source=source,
                     tokenizer=dict(name=encoding.name, pattern=encoding._pat_str)) as (new, meta):
        for split, arrays in splits.items():
            tokens = text_bytes = 0
            with open(new / f"{split}.bin", "wb") as file:
                for array in arrays:
                    file.write(array.astype("<u2").tobytes())
                    tokens, text_bytes = tokens + len(array), text_bytes + int(lengths[array].sum())
            meta[split] = dict(tokens=tokens, bytes=text_bytes)
        with open(new / "tokenizer.tiktoken", "wb") as file:
            for rank in range(encoding.n_vocab - 1):  # the last one is the separator
                file.write(base64.b64encode(encoding.decode_single_token_bytes(rank)) + b" %d\n" % rank)
    print(f"{folder}: {meta['train']['tokens']:,} tokens to train ({meta['train']['bytes']:,} bytes), "
          f"{meta['val']['tokens']:,} to validate ({meta['val']['bytes']:,} bytes), "
          f"vocabulary {encoding.n_vocab:,}, {source}")


def write_texts(folder, documents, encoding, source):
    """Makes a data set of documents (a list of str). encoding: a tiktoken.Encoding, or the size of a
    vocabulary to learn from the training documents."""
    train, val = split_documents(documents)
    if isinstance(encoding, int):
        encoding = train_tokenizer(train, encoding)
    splits = dict(train=tokenize(train, encoding, "train"), val=tokenize(val, encoding, "val"))
    write_tokens(folder, splits, encoding, source)


# ------------------------------------------------------------------------------ pictures and records


@contextlib.contextmanager
def new_records(folder, classes, n_codes, grid, **about):
    """A data set of pictures in the making: yields (folder, meta, write), where write(split, labels (n,),
    codes (n, rows·columns)) adds n records. UserError if a split stays empty."""
    if (vocab_size := n_codes + len(classes) + 1) > 65536:
        raise UserError(f"{n_codes} codes, {len(classes)} classes and the empty class are more than 65536 (uint16)")
    length = 1 + grid[0] * grid[1]
    counts = dict(train=0, val=0)
    with new_dataset(folder, kind="image", vocab_size=vocab_size, n_codes=n_codes, classes=classes, grid=grid, **about) as (new, meta), \
            open(new / "train.bin", "wb") as train_file, open(new / "val.bin", "wb") as val_file:
        files = dict(train=train_file, val=val_file)

        def write(split, labels, codes):
            records = np.column_stack((n_codes + np.asarray(labels, dtype=np.int64), codes))
            files[split].write(records.astype("<u2").tobytes())
            counts[split] += len(records)

        yield new, meta, write
        train_file.close(), val_file.close()
        if not all(counts.values()):
            raise UserError(f"{about['source']}: too few pictures to split into training and validation")
        val = np.fromfile(new / "val.bin", dtype="<u2").reshape(-1, length)  # an evaluation takes the first ones
        np.random.default_rng(0).permutation(val).tofile(new / "val.bin")
        meta |= {split: dict(records=n, tokens=n * length) for split, n in counts.items()}
    print(f"{folder}: {counts['train']:,} records to train, {counts['val']:,} to validate, {len(classes):,} classes, "
          f"{n_codes:,} codes, {grid[0]}×{grid[1]} of them a picture, {about['source']}")


def write_pictures(folder, train, val, classes, n_codes, source, variants=()):
    """Makes a data set of pictures with a codebook of its own. train, val: (uint8 images (N, h, w, 3), labels (N,)).
    variants: the training images again in other ways, mirrored say, for more records: arrays (N, h, w, 3)."""
    try:
        codebook = fit_codebook(train[0], n_codes)
    except ValueError as error:
        raise UserError(f"{error}; lower --codebook_size") from None
    grid = [train[0].shape[1] // 2, train[0].shape[2] // 2]
    with new_records(folder, classes, n_codes, grid, decoder="codebook", source=source) as (new, meta, write):
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
        sheet([pairs[labels == c][:5].reshape(-1, *images.shape[1:]) for c in shown], [classes[c] for c in shown]
              ).save(new / "contact_sheet.png")
    print(f"held-out pictures and what their codes decode to: {meta['psnr']:.1f} dB PSNR; {meta['codes_used']:.1%} of the codes are used to train; "
          f"look at {folder / 'contact_sheet.png'}")


def split_pictures(images, labels):
    """((images, labels) to train, to validate): a tenth of each class is held out, chosen by the hash of its
    pixels, so that the split is random, does not depend on the order, and no picture of a class is in both."""
    train, val = [], []
    for label in np.unique(labels):
        unique = {hashlib.sha256(images[i].tobytes()).digest(): i for i in np.flatnonzero(labels == label)}
        indices = [unique[digest] for digest in sorted(unique)]
        n_val = min(len(indices) - 1, max(1, len(indices) // 10))
        val += indices[:n_val]
        train += indices[n_val:]
    if not val:
        raise UserError("there is no class with two different pictures, one to train and one to validate")
    return [(images[part], labels[part]) for part in (train, val)]


def held_out(i, n, stretch=1):
    """Whether record i of about n, which lie in the order of their classes, is for validation: a hundredth
    is, of fewer than 10,000 a tenth, in whole stretches."""
    every = 100 if n >= 10_000 else 10
    return i // stretch % every == every // 2


# -------------------------------------------------------------------------------------- downloads


def download(url, path, size=None, sha256=None, md5=None, patience=1.0):
    """Fetches url into path unless it is there. A cut connection is resumed where it broke, up to
    four times in a row without progress, and by the next call. Size and hash are checked where they
    are given or the Hugging Face hub publishes them. Waits patience · 1, 2, 4 seconds in between."""
    path = Path(path)

    def check(file, what_to_do):
        if size and file.stat().st_size != size:
            raise UserError(f"{file} of {url} has {file.stat().st_size} bytes, expected {size}; {what_to_do}")
        for kind, published in dict(sha256=sha256, md5=md5).items():
            if published and hash_of(file, kind) != published:
                raise UserError(f"{file} of {url} has another {kind} than published; {what_to_do}")

    if path.exists():
        check(path, "remove it and run again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = best = part.stat().st_size if part.exists() else 0
    failures = 0
    while True:
        try:
            headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
            with requests.get(url, headers=headers, stream=True, timeout=30) as reply:
                resumed = reply.status_code == 206
                if reply.status_code == 416 or resumed and not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    part.unlink()  # what we have is not the beginning of this file, or the server cannot resume
                    raise requests.ConnectionError("the server did not resume where the download broke")
                if reply.status_code >= 500 or reply.status_code == 429:
                    raise requests.ConnectionError(f"the server answered {reply.status_code}")
                if reply.status_code not in (200, 206):
                    raise UserError(f"{url} answered {reply.status_code} {reply.reason}; has it moved?")
                for answer in [*reply.history, reply]:  # the hub says it in the redirect to its store
                    size = size or int(answer.headers.get("X-Linked-Size", 0)) or None
                    etag = answer.headers.get("X-Linked-ETag", "").strip('"')  # a sha256 of large files only
                    sha256 = sha256 or (etag if len(etag) == 64 else None)
                if "Content-Length" not in reply.headers and not size:
                    raise UserError(f"{url} does not say how long it is, so that a cut could not be seen; fetch {path} by other means")
                have = have if resumed else 0
                total = have + int(reply.headers["Content-Length"]) if "Content-Length" in reply.headers else size
                if size and total != size:
                    part.unlink(missing_ok=True)
                    raise UserError(f"{url} has {total} bytes, expected {size}; it is not the published file")
                with open(part, "ab" if resumed else "wb") as file, \
                        tqdm(total=total, initial=have, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
                    for block in reply.iter_content(1 << 16):
                        file.write(block)
                        bar.update(len(block))
            if part.stat().st_size == total:
                break
            raise requests.ConnectionError("the connection was cut")
        except requests.RequestException as error:
            have = part.stat().st_size if part.exists() else 0
            failures = 1 if have > best else failures + 1
            best = max(best, have)
            if failures == 4:
                raise UserError(f"cannot download from {urlsplit(url).netloc} ({type(error).__name__}); what came is kept, "
                                "run again to go on; `python prepare_data.py python` and `digits` need no network") from None
            time.sleep(patience * 2 ** (failures - 1))
    try:
        check(part, "it was removed, run again")
    except UserError:
        part.unlink()
        raise
    part.rename(path)
    return path


def gpt2_encoding():
    """GPT-2's tokens, which tiktoken downloads once."""
    try:
        return tiktoken.get_encoding("gpt2")
    except requests.RequestException as error:
        raise UserError(f"cannot download GPT-2's vocabulary ({type(error).__name__}); "
                        "`python prepare_data.py python` needs no network") from None


# ----------------------------------------------------------------------------------- the data sets


def prepare_python(folder, vocab_size):
    """Every .py file of the standard library and the installed packages of this interpreter."""
    paths = sysconfig.get_paths()
    files = set()
    for root in {paths["stdlib"], paths["purelib"], paths["platlib"]}:
        for where, folders, names in os.walk(root):
            if root == paths["stdlib"]:  # packages of the interpreter behind a virtual environment
                folders[:] = [f for f in folders if f not in ("site-packages", "dist-packages")]
            files.update(os.path.join(where, name) for name in names if name.endswith(".py"))
    documents = []
    for file in files:
        with contextlib.suppress(UnicodeDecodeError, OSError):  # a few test files are not UTF-8; dangling links
            documents.append(Path(file).read_bytes().decode())
    write_texts(folder, documents, vocab_size,
                f"{len(files):,} .py files of Python {sys.version.split()[0]} and its installed packages")


def prepare_shakespeare(folder):
    """Tiny Shakespeare, 1.1 MB, in GPT-2's tokens."""
    encoding = gpt2_encoding()
    path = download(path=folder.parent / "downloads" / "tinyshakespeare.txt", **SHAKESPEARE)
    write_texts(folder, [path.read_text(encoding="utf-8")], encoding, SHAKESPEARE["url"])


def prepare_fineweb_edu(folder, shards):
    """The first `shards` of FineWeb-Edu's 1,001, about 100M tokens each, in GPT-2's tokens."""
    if not 1 <= shards <= FINEWEB_EDU_SHARDS:
        raise UserError(f"--shards must be from 1 to {FINEWEB_EDU_SHARDS}, not {shards}")
    encoding = gpt2_encoding()
    names = ["edu_fineweb_val_000000.bin"] + [f"edu_fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]
    paths = [download(FINEWEB_EDU + name, folder.parent / "downloads" / name) for name in names]

    def tokens(path):  # llm.c's format: 256 int32, of which magic, version, count; then uint16
        header = np.fromfile(path, dtype="<i4", count=256)
        if len(header) < 256 or tuple(header[:2]) != (20240520, 1) or path.stat().st_size != 1024 + 2 * header[2]:
            raise UserError(f"{path} is not a complete shard of tokens; remove it and run again")
        shard = np.memmap(path, dtype="<u2", mode="r", offset=1024)
        for start in range(0, len(shard), 1 << 22):
            block = shard[start:start + (1 << 22)]
            if block.max() >= encoding.n_vocab:
                raise UserError(f"{path} has token {block.max()}, outside GPT-2's vocabulary; remove it and run again")
            yield block

    splits = dict(train=(block for path in paths[1:] for block in tokens(path)), val=tokens(paths[0]))
    write_tokens(folder, splits, encoding, f"{FINEWEB_EDU} ({shards} of {FINEWEB_EDU_SHARDS} shards)")


def prepare_text(folder, files, vocab_size):
    """One's own files. A line <|endoftext|> separates documents; each file is at least one."""
    documents = []
    for file in files:
        try:
            documents += re.split(rf"\r?\n{re.escape(SEPARATOR)}\r?\n", Path(file).read_bytes().decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from None
    write_texts(folder, documents, vocab_size, f"{len(files)} file(s): {', '.join(Path(f).name for f in files[:5])}")


def load_digits():
    """(images uint8 (1797, 8, 8, 3), labels) of the scans that lie beside this file."""
    if not DIGITS.exists() or hash_of(DIGITS) != DIGITS_SHA256:
        raise UserError(f"{DIGITS} is missing or damaged; get it again with this program")
    with np.load(DIGITS) as digits:
        images = np.round(digits["images"] * (255 / 16)).astype(np.uint8)
        return np.repeat(images[..., None], 3, axis=-1), digits["labels"].astype(np.int64)


def varied(images, seed, degrees=8, stretch=0.08, shift=0.5):
    """The images (N, h, w, 3), each turned, stretched and shifted (in pixels) a little, by random amounts up to these."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    u = 2 * torch.rand(5, len(pixels), generator=torch.Generator().manual_seed(seed)) - 1
    angle, (x, y) = u[0] * math.radians(degrees), u[1:3] * shift * 2 / pixels.size(-1)
    rows = [(1 + stretch * u[3]) * angle.cos(), -angle.sin(), x], [angle.sin(), (1 + stretch * u[4]) * angle.cos(), y]
    grid = F.affine_grid(torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1), pixels.shape, align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def prepare_digits(folder):
    """Handwritten digits, 16 codes each. The scans are so few that each is taken to train 16 times, varied."""
    train, val = split_pictures(*load_digits())
    write_pictures(folder, train, val, [str(i) for i in range(10)], 256,
                   "UCI's handwritten digits (https://doi.org/10.24432/C50P49, CC BY 4.0)",
                   variants=(varied(train[0], seed) for seed in range(15)))


def prepare_cifar10(folder, n_codes):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 pictures and their mirror images to train, 10,000 to validate."""
    name = CIFAR10["url"].rsplit("/")[-1]
    path = folder.parent / name  # where somebody may have put it
    path = path if path.exists() else folder.parent / "downloads" / name
    if not path.exists():
        download(CIFAR10["url"], path, md5=CIFAR10["md5"])
    parts, record = {}, 1 + 3 * 32 * 32
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                name = os.path.basename(member.name)
                if member.isfile() and re.fullmatch(r"(data_batch_[1-5]|test_batch)\.bin", name):
                    if member.size != CIFAR10["batch"] * record:
                        raise UserError(f"{path}: {name} has {member.size} bytes, expected {CIFAR10['batch'] * record}; remove it and run again")
                    parts[name] = np.frombuffer(archive.extractfile(member).read(), np.uint8).reshape(-1, record)
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        raise UserError(f"{path} is no whole archive ({error}); remove it and run again") from None
    if len(parts) != 6:
        raise UserError(f"{path} has {len(parts)} of the 6 files of CIFAR-10; remove it and run again")

    def pictures(split, names):
        rows, each = np.concatenate([parts[name] for name in names]), len(names) * CIFAR10["batch"] // 10
        if np.bincount(rows[:, 0], minlength=10).tolist() != [each] * 10:
            raise UserError(f"{path} does not have {each:,} {split} pictures of each class; remove it and run again")
        return np.ascontiguousarray(rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), rows[:, 0].astype(np.int64)

    train = pictures("training", [f"data_batch_{i}.bin" for i in range(1, 6)])
    write_pictures(folder, train, pictures("test", ["test_batch.bin"]),
                   "airplane automobile bird cat deer dog frog horse ship truck".split(), n_codes, CIFAR10["url"],
                   variants=[train[0][:, :, ::-1]])


def prepare_images(folder, source, image_size, n_codes):
    """One's own pictures, one folder a class: the middle square of each, in image_size² pixels."""
    if image_size < 2 or image_size % 2:
        raise UserError(f"--image_size must be an even number of pixels, not {image_size}")
    if not source.is_dir():
        raise UserError(f"there is no folder {source}")
    classes = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    images, labels, bad = [], [], []
    for label, name in enumerate(tqdm(classes, desc="reading", unit=" classes", disable=None)):
        for path in sorted((source / name).rglob("*")):
            if path.is_dir() or path.name.startswith("."):
                continue
            try:
                with Image.open(path) as image:
                    image = ImageOps.exif_transpose(image).convert("RGB")
                    images.append(np.asarray(ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)))
                labels.append(label)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises for damage
                bad.append(path)
    if bad:
        print(f"skipped {len(bad)} file(s) that are no readable picture: {', '.join(map(str, bad[:10]))}{', …' * (len(bad) > 10)}")
    if empty := [name for label, name in enumerate(classes) if label not in set(labels)]:
        raise UserError(f"{source / empty[0]} has no readable picture; every folder is a class and needs some")
    if not images:
        raise UserError(f"{source} has no folders of pictures; it needs one for each class")
    train, val = split_pictures(np.stack(images), np.array(labels))
    write_pictures(folder, train, val, classes, n_codes, f"{len(images):,} pictures of {source.name}")


def load_maskgit(path):
    """MaskGIT's decoder with the weights of a file. UserError if the file has others."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(weights, dict):
            raise ValueError("it holds no weights by name")
        decoder = MaskGITDecoder()
        wanted = decoder.state_dict()
        for name, tensor in wanted.items():
            if name not in weights:
                raise ValueError(f"it has no {name}")
            if weights[name].shape != tensor.shape:
                raise ValueError(f"its {name} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}")
        if other := [name for name in weights if name.startswith(("decoder.", "quantize.")) and name not in wanted]:
            raise ValueError(f"its {other[0]} is not of this decoder")
        decoder.load_state_dict({name: weights[name] for name in wanted})
        return decoder.eval()
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        message = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not the decoder of MaskGIT's VQGAN ({message}); remove it and run again") from None


def check_codes(codes, n_codes, label, n_classes, where):
    """UserError, saying where, unless codes is (..., 256) whole numbers below n_codes and label one below n_classes."""
    if codes.ndim < 1 or codes.shape[-1] != 256 or codes.dtype.kind not in "iu":
        raise UserError(f"{where}: has codes of shape {codes.shape} and type {codes.dtype}, expected 256 whole numbers")
    if codes.min() < 0 or codes.max() >= n_codes:
        raise UserError(f"{where}: has code {codes.max() if codes.max() >= n_codes else codes.min()}, expected 0 to {n_codes - 1}")
    if type(label) is not int or not 0 <= label < n_classes:
        raise UserError(f"{where}: has class {label!r}, expected 0 to {n_classes - 1}")


IMAGENET_CLASSES = [str(i) for i in range(1000)]


def prepare_imagenet(folder):
    """ImageNet-1K in MaskGIT's 1,024 codes: JSON lines with class_id and 256 tokens, read one by one. The file does
    not say which records are crops of one picture; they lie together, so whole stretches are held out."""
    downloads = folder.parent / "downloads"
    decoder = load_maskgit(download(MASKGIT_VQGAN, downloads / MASKGIT_VQGAN.rsplit("/")[-1]))
    path = download(IMAGENET_CODES, downloads / IMAGENET_CODES.rsplit("/")[-1])
    size = path.stat().st_size
    with open(path, "rb") as file, tqdm(total=size, desc="records", unit="B", unit_scale=True, disable=None) as bar, \
            new_records(folder, IMAGENET_CLASSES, 1024, [16, 16], decoder="maskgit", source=IMAGENET_CODES) as (new, _, write):
        n, shown = 0, []
        for i, line in enumerate(file):
            n = n or size // len(line)
            where = f"{path} line {i + 1}"
            try:
                record = json.loads(line)
                codes = np.array(record["tokens"])
                label = record["class_id"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{where}: is not a record with class_id and tokens ({error!r}); remove the file and run again") from None
            check_codes(codes, 1024, label, 1000, where)
            write("val" if held_out(i, n, stretch=max(1, n // 1600)) else "train", [label], codes.reshape(1, -1))
            if i % max(1, n // 8) == 0 and len(shown) < 8:
                shown.append((label, codes))
            bar.update(len(line))
        torch.save(decoder.state_dict(), new / "decoder.pt")
        images = decoder.to_images(np.stack([codes for _, codes in shown]), (16, 16))
        sheet([image[None] for image in images], [str(label) for label, _ in shown]).save(new / "contact_sheet.png")


def prepare_codes(folder, source):
    """Codes of LlamaGen's VQGAN (arXiv 2406.06525), as its extraction leaves them: for each picture a file
    imagenet256_codes/<i>.npy (1, crops, 256) and imagenet256_labels/<i>.npy (1,). Every crop is a record."""
    names = sorted((path.stem for path in (source / "imagenet256_codes").glob("*.npy")), key=lambda s: (len(s), s))
    if not names:
        raise UserError(f"{source / 'imagenet256_codes'} has no .npy files; --codes wants the folder that LlamaGen's extraction wrote to")

    def array(kind, name):
        path = source / f"imagenet256_{kind}" / f"{name}.npy"
        try:
            return np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise UserError(f"{path} is missing; every file of codes needs its label") from None
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); extract it again") from None

    with new_records(folder, IMAGENET_CLASSES, 16384, [16, 16], decoder=None, source=f"LlamaGen codes of {source.name}") as (_, _, write):
        for i, name in enumerate(tqdm(names, desc="records", unit=" pictures", disable=None)):
            codes, labels = array("codes", name), array("labels", name)
            label = labels.item() if labels.size == 1 and labels.dtype.kind in "iu" else None
            check_codes(codes, 16384, label, 1000, source / "imagenet256_codes" / f"{name}.npy")
            codes = codes.reshape(-1, 256)
            write("val" if held_out(i, len(names)) else "train", [label] * len(codes), codes)


DEFAULT_VOCAB_SIZE = 16384
DATASETS = ["python", "shakespeare", "fineweb_edu", "digits", "cifar10", "imagenet"]


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", choices=DATASETS)
    parser.add_argument("--text", nargs="+", metavar="FILE", help="make a data set of these files instead")
    parser.add_argument("--images", type=Path, metavar="DIR", help="or of the pictures in this folder's folders, one a class")
    parser.add_argument("--codes", type=Path, metavar="DIR", help="or of the codes of ImageNet that LlamaGen's extraction wrote here")
    parser.add_argument("--name", help="name of the folder (default: that of the data set, or 'text', 'images', 'codes')")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="(default: %(default)s)")
    parser.add_argument("--shards", type=int, default=1, help="fineweb_edu: how many (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=DEFAULT_VOCAB_SIZE,
                        help="python, --text: tokens to learn (default: %(default)s); downloads use GPT-2's 50,257")
    parser.add_argument("--codebook_size", type=int, default=4096, help="cifar10, --images: codes to learn (default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=32, help="--images: pixels of an edge (default: %(default)s)")
    args = parser.parse_args(argv)
    sources = dict(text=args.text, images=args.images, codes=args.codes)
    given = [args.dataset] * bool(args.dataset) + [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"name one data set ({', '.join(DATASETS)}) or give one of --text FILE..., --images DIR, --codes DIR")
    if not 2 <= args.codebook_size <= 65000:
        raise UserError(f"--codebook_size must be from 2 to 65000, not {args.codebook_size}")
    name = given[0] if args.name is None else args.name
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"--name must be the name of a folder in {args.data_dir}, not {name!r}")
    folder = args.data_dir / name
    if folder.exists():
        raise UserError(f"{folder} is there already; remove it to make it again, or give another --name")
    {
        "text": lambda: prepare_text(folder, args.text, args.vocab_size),
        "python": lambda: prepare_python(folder, args.vocab_size),
        "shakespeare": lambda: prepare_shakespeare(folder),
        "fineweb_edu": lambda: prepare_fineweb_edu(folder, args.shards),
        "digits": lambda: prepare_digits(folder),
        "cifar10": lambda: prepare_cifar10(folder, args.codebook_size),
        "images": lambda: prepare_images(folder, args.images, args.image_size, args.codebook_size),
        "imagenet": lambda: prepare_imagenet(folder),
        "codes": lambda: prepare_codes(folder, args.codes),
    }[given[0]]()


if __name__ == "__main__":
    run(main)
