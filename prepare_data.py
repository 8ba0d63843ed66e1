"""Makes every data set into one format on disk, from which the training scripts read:

    data/<name>/train.bin  val.bin      token ids, little endian: uint16, above a vocabulary of 65,536 uint32
                meta.json               counts, source, and the size and sha256 of the other files
    text:       tokenizer.tiktoken      a token a line: its bytes in base64, its rank
    images:     codebook.npy            the patches that the codes stand for; or decoder.pt, a network
                contact_sheet.png       for a look before training

    python prepare_data.py shakespeare               5 MB, no network: the default of train_gpt.py on a CPU
    python prepare_data.py python                    Python's own source, no network: its default on a GPU
    python prepare_data.py fineweb_edu --shards 10   100M tokens a shard, downloaded
    python prepare_data.py --text FILE... --name N   your own files

    python prepare_data.py digits                    1,797 scans of 8×8 pixels, no network: train_image.py's
    python prepare_data.py cifar10                   60,000 images of 32×32 pixels, downloaded (170 MB)
    python prepare_data.py --images DIR --name N     your own images, one folder a class
    python prepare_data.py imagenet                  ImageNet-1K in the codes of MaskGIT's VQGAN, downloaded
    python prepare_data.py --codes DIR --name N      codes that LlamaGen's extraction wrote

A folder is written under another name and renamed, so that one that exists is complete. Text is one long
sequence; the token <|endoftext|> stands before each document and for no byte of text. Images are records
[class, code_1 … code_n] in one vocabulary: the codes, then the classes, then the null class.
"""
import argparse
import base64
import contextlib
import hashlib
import itertools
import json
import lzma
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C while modules load

import numpy as np
import requests
import rustbpe
import tiktoken
from tqdm import tqdm

from script import ArgumentParser, UserError, check_form, interrupts_kept, make_folder, run, write_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 2  # of the files above; a reader refuses any other
SEPARATOR = "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 16384
HERE = Path(__file__).resolve().parent

# The plays, sonnets and poems of William Shakespeare: 42 documents, 5 MB.
SHAKESPEARE = HERE / "shakespeare.txt.xz"
SHAKESPEARE_SHA256 = "bbfd67fa5ded1050fff7e3d162ce69b44e83482a6dbeea383e3134e087596cc5"  # of the text
# FineWeb-Edu in GPT-2's tokens, made by Andrej Karpathy for llm.c: one shard to validate, 1,001 to train.
FINEWEB_EDU = "https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main/"
FINEWEB_EDU_SHARDS = 1001

# UCI's Optical Recognition of Handwritten Digits, by E. Alpaydin and C. Kaynak: 1,797 scans.
DIGITS = HERE / "digits.npz"
DIGITS_SHA256 = "a574184a37ce1fc944b97f3077d6e05600d93de4cc772d19d29f67fd6b426f20"
CIFAR10 = dict(url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
               md5="c32a1d4ab5d03f1284b67883e8d87530", batch=10_000)  # images in each of its six files
# ImageNet-1K as codes, of the RAR project (arXiv 2411.00776), and the VQGAN that they are codes of.
IMAGENET_CODES = "https://huggingface.co/yucornetto/RAR/resolve/main/maskgitvq.jsonl"
MASKGIT_VQGAN = "https://huggingface.co/fun-research/TiTok/resolve/main/maskgit-vqgan-imagenet-f16-256.bin"


# ---------------------------------------------------------------------------------- files and folders


def hash_of(path, kind="sha256"):
    """The hash of a file, in hexadecimal. kind: a name that hashlib knows."""
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def lock_folder(folder):
    """Locks a folder for this process, until the number that it gives is closed; None if another has it."""
    if fcntl:
        number = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number
        except OSError:  # another process works in it; or the file system has no locks
            os.close(number)


@contextlib.contextmanager
def new_folder(folder):
    """A temporary folder that becomes `folder` if the block ends well, and vanishes otherwise. What a
    killed process left of an earlier one is removed."""
    if os.path.lexists(folder):
        raise UserError(f"{folder} is there already; remove it to make it again, or give another --name")
    make_folder(folder.parent, "--data_dir")
    prefix = f".{folder.name}.unfinished."
    for left in folder.parent.iterdir():
        with contextlib.suppress(OSError):  # another process may remove it too
            # An empty one may be of a process that is about to lock it.
            if left.name.startswith(prefix) and any(left.iterdir()):
                if (number := lock_folder(left)) is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(number)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    number = lock_folder(temporary)
    temporary.chmod(0o755)  # mkdtemp's folders are for their owner only
    try:
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if folder.exists():
                raise UserError(f"{folder} was made by another process meanwhile; it can be used") from None
            raise
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error  # a full disk names no file
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if number is not None:
            os.close(number)


@contextlib.contextmanager
def new_dataset(folder, vocab_size, **about):
    """A data set in the making: yields (folder, meta), a temporary folder for its files and the dict that
    becomes meta.json, to which the sizes and hashes of the files are added."""
    with new_folder(Path(folder)) as new:
        meta = dict(format=FORMAT, vocab_size=vocab_size, **about)
        meta["dtype"] = "uint16" if vocab_size <= 1 << 16 else "uint32"
        yield new, meta
        meta["files"] = {path.name: dict(size=path.stat().st_size, sha256=hash_of(path))
                         for path in sorted(new.iterdir()) if path.suffix != ".png"}
        (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    for split in ("train", "val"):
        counts = ", ".join(f"{count:,} {what}" for what, count in meta[split].items())
        print(f"{folder} {split}: {counts}")
    print(f"{folder} vocabulary: {vocab_size:,}; source: {meta['source']}")


# ------------------------------------------------------------------------------- reading a data set

# What meta.json must hold, see check_form: for all data sets, and for each kind.
TOKENS = {"tokens": range(1, 1 << 50)}
FORM = {
    "format": range(FORMAT, FORMAT + 1), "kind": ("text", "image"), "dtype": ("uint16", "uint32"),
    "vocab_size": range(2, 1 << 31), "train": TOKENS, "val": TOKENS,
    "files": {re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*"): {"size": range(1 << 50),
                                                           "sha256": re.compile("[0-9a-f]{64}")}},
}
FORM_OF_KIND = {
    "text": {"tokenizer": {"name": str, "pattern": str}, "train": {"bytes": range(1 << 50)},
             "val": {"bytes": range(1 << 50)}},
    "image": {"decoder": ("codebook", "maskgit", None), "n_codes": range(1, 1 << 31), "classes": [str],
              "grid": [range(1, 1 << 16)]},
}


def decoder_files(meta):
    """Names of the files of a data set that turn its tokens back into what they stand for. A run keeps
    copies of them."""
    by_kind = {"codebook": ["codebook.npy"], "maskgit": ["decoder.pt"], None: []}
    return ["tokenizer.tiktoken"] if meta["kind"] == "text" else by_kind[meta["decoder"]]


def read_meta(path):
    """The dict of a meta.json, checked: nobody else needs to. ValueError names the field that is wrong."""
    return check_meta(json.loads(path.read_bytes()))


def check_meta(meta):
    """The same dict. ValueError names the field that is wrong."""
    check_form(meta, FORM, "")
    check_form(meta, FORM_OF_KIND[meta["kind"]], "")
    for name in ("train.bin", "val.bin", *decoder_files(meta)):
        if name not in meta["files"]:
            raise ValueError(f"files.{name} is missing")
    for split in ("train", "val"):
        if meta["files"][f"{split}.bin"]["size"] != meta[split]["tokens"] * np.dtype(meta["dtype"]).itemsize:
            raise ValueError(f"{split}.tokens does not fit to the size of {split}.bin and the dtype")
    if meta["kind"] == "image":
        if len(meta["grid"]) != 2:
            raise ValueError(f"grid is {meta['grid']}, expected rows and columns")
        if meta["vocab_size"] != meta["n_codes"] + len(meta["classes"]) + 1:
            raise ValueError("vocab_size is not that of n_codes, the classes and the null class")
    return meta


def identity(meta):
    """What tells a data set from others, name → JSON value: the hashes of its files, and all that decides
    what a token means."""
    meaning = {name: meta[name] for name in
               ("kind", "dtype", "vocab_size", "decoder", "n_codes", "grid", "classes") if name in meta}
    tokenizer = {f"tokenizer {key}": meta["tokenizer"][key] for key in ("name", "pattern")
                 if meta["kind"] == "text"}
    return meaning | tokenizer | {f"sha256 of {name}": published["sha256"]
                                  for name, published in meta["files"].items()}


@dataclass
class Dataset:
    """A checked data set: its meta.json and its token ids, (n,) uint16 or uint32, which are read from disk
    as needed."""
    folder: Path
    meta: dict
    train: np.ndarray
    val: np.ndarray

    def identity(self):
        return identity(self.meta)

    def tokenizer(self):
        """The tiktoken.Encoding of a text data set."""
        return load_tokenizer(self.folder, self.meta)


def state_of(path):
    """[size, time of the last write, time of the last change of any kind] of a file. UserError if it is no
    regular file: a pipe would wait for somebody to write into it."""
    if not path.is_file():
        raise UserError(f"{path} is missing, or is no regular file")
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def load_dataset(folder, check=True):
    """Reads data/<name>/ → Dataset. UserError names what is wrong.

    Sizes are checked always. With `check`, contents are too: the hashes of the files, and whether token ids
    are in the vocabulary. That happens once and again only when a file has changed; .checked.json in the
    folder keeps what was found good. Of several processes one needs to check, before the others load.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no data set {folder}; make it with prepare_data.py (see its --help)")
    again = f"; remove {folder} and make it again with prepare_data.py"
    stamp, path = folder / ".checked.json", folder / "meta.json"
    try:
        states = {"meta.json": [*state_of(path), hash_of(path)]}
        meta = read_meta(path)
        for name, published in meta["files"].items():
            states[name] = [*state_of(folder / name), published["sha256"]]
            if states[name][0] != published["size"]:
                raise UserError(f"{folder / name} has {states[name][0]} bytes, not the {published['size']} "
                                "of meta.json")
        bins = [np.memmap(folder / f"{split}.bin", f"<u{np.dtype(meta['dtype']).itemsize}", mode="r")
                for split in ("train", "val")]
        known = read_stamp(stamp) if check else states
        if known != states:
            for name, published in meta["files"].items():
                if known.get(name) != states[name] and hash_of(folder / name) != published["sha256"]:
                    raise UserError(f"{folder / name} was altered: its sha256 is not that of meta.json")
            check_ids(meta, bins)
            with contextlib.suppress(OSError):  # a folder that is read-only is checked each time
                write_file(stamp, lambda file: file.write(json.dumps(states).encode()))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}{again}") from None
    except UserError as error:
        raise UserError(f"{error}{again}") from None
    return Dataset(folder, meta, *bins)


def read_stamp(path):
    """What load_dataset found good the last time; {} if that is unknown."""
    try:
        stamp = json.loads(path.read_bytes()) if path.is_file() else {}
        return stamp if isinstance(stamp, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def check_ids(meta, bins):
    """ValueError unless all token ids are in the vocabulary, and image records are a class and codes."""
    largest = max(tokens.max() for tokens in bins)
    if largest >= meta["vocab_size"]:
        raise ValueError(f"vocab_size is {meta['vocab_size']}, but there is a token {largest}")
    if meta["kind"] == "image":
        n = meta["grid"][0] * meta["grid"][1]
        for tokens in bins:
            rows = tokens.reshape(-1, 1 + n) if len(tokens) % (1 + n) == 0 else None
            if rows is None or (rows[:, 0] < meta["n_codes"]).any() or (rows[:, 1:] >= meta["n_codes"]).any():
                raise ValueError(f"n_codes or grid: the records are not a class and {n} codes")


def load_tokenizer(folder, meta):
    """The tiktoken.Encoding of the tokenizer.tiktoken in a folder, of a data set or of a run. meta: of the
    data set. UserError if the file is not the one that meta names by size and sha256."""
    path, published = Path(folder) / "tokenizer.tiktoken", meta["files"]["tokenizer.tiktoken"]
    if state_of(path)[0] != published["size"] or hash_of(path) != published["sha256"]:
        raise UserError(f"{path} was altered: its size or sha256 is not that of its data set's meta.json")
    try:
        lines = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if list(ranks.values()) != list(range(meta["vocab_size"] - 1)) or len(lines) != len(ranks):
            raise ValueError(f"its ranks are not 0 to {meta['vocab_size'] - 2}")
        if not {bytes([byte]) for byte in range(256)} <= set(ranks):
            raise ValueError("a single byte has no token")
    except ValueError as error:
        raise UserError(f"{path} is no tokenizer of this vocabulary ({error}); make it again") from None
    with tiktoken_errors(f"the pattern of {path}"):
        return make_encoding(ranks, meta["tokenizer"]["pattern"], meta["tokenizer"]["name"])


# -------------------------------------------------------------------------------- text and tokens

# How text is cut before byte pairs are merged: contractions, words with the sign before them, up to
# two digits, runs of signs, ends of lines, white space. After GPT-4's pattern.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
           r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
PIECE = 1 << 17  # characters that tiktoken gets at once: it fails on a run of a million blanks


def make_encoding(ranks, pattern, name="bpe"):
    """A tiktoken.Encoding of byte-pair ranks, whose last token is the separator."""
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={SEPARATOR: len(ranks)})


@contextlib.contextmanager
def tiktoken_errors(what):
    """Errors of tiktoken or rustbpe become a UserError that names what they were given."""
    try:
        yield
    except BaseException as error:  # panics of Rust code are no Exception
        if isinstance(error, SystemError) and isinstance(error.__cause__, KeyboardInterrupt):
            raise error.__cause__ from None  # what becomes of a Ctrl-C in there
        panic = type(error).__name__ == "PanicException"
        if not panic and (isinstance(error, MemoryError) or not isinstance(error, Exception)):
            raise
        raise UserError(f"tiktoken failed on {what} ({type(error).__name__}: {error})") from None


def token_bytes(encoding):
    """Bytes of text that each token stands for, (vocab_size,) int64: none for the separator."""
    sizes = [len(encoding.decode_single_token_bytes(token)) for token in range(encoding.n_vocab - 1)]
    return np.array([*sizes, 0])


def pieces(document):
    """Cuts a long document at the start of a line that is not blank, where tokens end anyway; where there is
    none, in a run of a million blanks say, anywhere."""
    start = 0
    while len(document) - start > PIECE:
        line = re.compile(r"(?s:.*)\n(?=[^\S\r\n]*\S)").match(document, start, start + PIECE)
        end = line.end() if line else start + PIECE
        yield document[start:end]
        start = end
    yield document[start:]


def train_tokenizer(documents, vocab_size, sample=32_000_000):
    """A tiktoken.Encoding: byte-pair encoding learned from the first `sample` characters of the documents."""
    if not 257 <= vocab_size <= 1_000_000:
        raise UserError(f"--vocab_size must be from 257 (bytes and separator) to 1000000, not {vocab_size}")

    def head():
        left = sample
        for piece in itertools.chain.from_iterable(map(pieces, documents)):
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                return

    print(f"learning a vocabulary of {vocab_size:,} tokens", flush=True)
    bpe = rustbpe.Tokenizer()
    with interrupts_kept(at_once=True), tiktoken_errors("the training documents"):
        bpe.train_from_iterator(head(), vocab_size - 1, pattern=PATTERN)
    return make_encoding({bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}, PATTERN)


def tokenize(documents, encoding, title):
    """Yields the tokens of the documents as uint32 arrays, the separator before each document."""
    stream = ((i == 0, piece) for document in documents for i, piece in enumerate(pieces(document)))
    with tqdm(total=sum(map(len, documents)), desc=title, unit="B", unit_scale=True, disable=None) as bar:
        while batch := list(itertools.islice(stream, 256)):
            texts = [piece for _, piece in batch]
            with tiktoken_errors(f"text near {texts[0][:40]!r}"):
                tokens = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
            starts = [[encoding.eot_token] * first for first, _ in batch]
            yield np.concatenate([np.array([*start, *t], dtype=np.uint32)
                                  for start, t in zip(starts, tokens, strict=True)])
            bar.update(sum(map(len, texts)))


def in_hash_order(contents):
    """Indices of different contents (an iterable of bytes), in the order of their hashes: random, but the
    same whatever the order of the files."""
    unique = {hashlib.sha256(content).digest(): i for i, content in enumerate(contents)}
    return [unique[digest] for digest in sorted(unique)]


def without_ends(document):
    """A document with \\n as line ends and no blanks around it: where two are the same, they are duplicates.
    (The last one of a file has a line end after it, the others have none.)"""
    return document.strip().replace("\r\n", "\n").replace("\r", "\n")


def split_documents(documents):
    """(train, val): whole documents in the order of their hashes, so that no text is in both. They go to val
    until it has a hundredth of all text, a tenth of a set under 10 MB; never twice that. Where it would be
    less than half full, it gets the end of the longest document. Empty documents and duplicates are dropped.
    UserError if there is too little."""
    documents = [document for document in documents if document.strip()]
    documents = [documents[i] for i in in_hash_order(document.encode() for document in documents)]
    first = {}
    for document in documents:
        first.setdefault(without_ends(document), document)
    documents = list(first.values())
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
        longest = max(range(len(train)), key=lambda i: len(train[i].rstrip()))
        text = train[longest]
        missing = val_size - filled
        cut = len(text.rstrip()) - missing
        cut = text.rfind("\n", max(0, cut - missing), cut) + 1 or cut  # at the end of a line, if one is near
        train[longest] = text[:cut]
        val.append(text[cut:])
    if not all(any(document.strip() for document in part) for part in (train, val)):
        raise UserError("there is too little text to split into training and validation")
    return train, val


def read_documents(path):
    """The documents of a UTF-8 file. A line that holds only <|endoftext|>, and perhaps blanks, separates
    them; several in a row, or at an end of the file, separate nothing."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    if text.count("\0") > len(text) / 4:
        raise UserError(f"{path} is not UTF-8 text (it looks like UTF-16); convert it first")
    blanks, end = r"(?:[^\S\r\n]|\ufeff)*", r"(?:\r\n|\r|\n)"  # a BOM is inside where files were joined
    line = rf"(?:(?:\A|{end}){blanks}{re.escape(SEPARATOR)}{blanks}(?={end}|\Z))"
    documents = re.split(rf"{line}+{end}?", text)
    return [document for i, document in enumerate(documents)
            if document or 0 < i < len(documents) - 1 or len(documents) == 1]


def write_tokens(folder, splits, encoding, **about):
    """Writes a text data set. splits: {'train': ..., 'val': ...}, each an iterable of arrays of token ids."""
    lengths = token_bytes(encoding)
    with new_dataset(folder, encoding.n_vocab, kind="text", **about,
                     tokenizer=dict(name=encoding.name, pattern=encoding._pat_str)) as (new, meta):
        id_type = np.dtype(meta["dtype"]).newbyteorder("<")
        for split, arrays in splits.items():
            counts = meta[split] = dict(tokens=0, bytes=0, documents=0)
            with open(new / f"{split}.bin", "wb") as file:
                for array in arrays:
                    file.write(array.astype(id_type).tobytes())
                    counts["tokens"] += len(array)
                    counts["bytes"] += int(lengths[array].sum())
                    counts["documents"] += int((array == encoding.eot_token).sum())
        with open(new / "tokenizer.tiktoken", "wb") as file:
            for rank in range(encoding.n_vocab - 1):  # the last one is the separator
                file.write(base64.b64encode(encoding.decode_single_token_bytes(rank)) + b" %d\n" % rank)


def write_texts(folder, documents, vocab_size, source):
    """Makes a data set of documents (a list of str), with a vocabulary learned from those to train."""
    texts = [document for document in documents if document.strip()]
    kept = len(set(map(without_ends, texts)))
    dropped = dict(empty=len(documents) - len(texts), duplicate=len(texts) - kept)
    marks = sum(document.count(SEPARATOR) for document in set(texts))
    print(f"{kept:,} documents; dropped {dropped['duplicate']:,} duplicate, {dropped['empty']:,} empty")
    if marks:
        print(f"{marks:,} {SEPARATOR} inside lines are taken as text; a separator has a line of its own")
    train, val = split_documents(texts)
    encoding = train_tokenizer(train, vocab_size)
    splits = dict(train=tokenize(train, encoding, "train"), val=tokenize(val, encoding, "val"))
    write_tokens(folder, splits, encoding, source=source, documents=kept, dropped=dropped,
                 marks_in_text=marks)


# -------------------------------------------------------------------------------------- downloads


def download(url, path, size=None, sha256=None, md5=None, patience=1.0):
    """Fetches url into path unless it is there → path. A cut connection is resumed where it broke, up to
    four times in a row without progress, and by the next call. Size and hash are checked where they are
    given or the Hugging Face hub publishes them. Waits patience · 1, 2, 4 seconds in between. UserError."""
    path = Path(path)

    def check(file, what_to_do):
        if size and file.stat().st_size != size:
            raise UserError(f"{file} of {url} has {file.stat().st_size} bytes, expected {size}; {what_to_do}")
        for kind, published in dict(sha256=sha256, md5=md5).items():
            if published and hash_of(file, kind) != published:
                raise UserError(f"{file} of {url} has another {kind} than published; {what_to_do}")

    if path.exists():
        state_of(path)
        check(path, "remove it and run again")
        return path
    make_folder(path.parent, "--data_dir")
    part = path.with_name(path.name + ".part")
    have = best = part.stat().st_size if part.exists() else 0
    failures = 0
    while True:
        try:
            headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
            with requests.get(url, headers=headers, stream=True, timeout=30) as reply:
                resumed = reply.status_code == 206
                answer = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", reply.headers.get("Content-Range", ""))
                if reply.status_code == 416 or resumed and not (answer and int(answer[1]) == have):
                    part.unlink(missing_ok=True)  # what we have is not the beginning of this file
                    raise requests.ConnectionError("the server did not resume where the download broke")
                if reply.status_code >= 500 or reply.status_code == 429:
                    raise requests.ConnectionError(f"the server answered {reply.status_code}")
                if reply.status_code not in (200, 206):
                    raise UserError(f"{url} answered {reply.status_code} {reply.reason}; has it moved?")
                for said in [*reply.history, reply]:  # the hub says it in the redirect to its store
                    size = size or int(said.headers.get("X-Linked-Size", 0)) or None
                    etag = said.headers.get("X-Linked-ETag", "").strip('"')  # a sha256 of large files only
                    sha256 = sha256 or (etag if len(etag) == 64 else None)
                have = have if resumed else 0
                if resumed and answer[2] != "*":
                    total = int(answer[2])
                elif "Content-Length" in reply.headers:
                    total = have + int(reply.headers["Content-Length"])
                elif size:
                    total = size
                else:
                    raise UserError(f"{url} does not say how long it is, so that a cut could not be seen; "
                                    f"fetch {path} by other means")
                if size and total != size:
                    part.unlink(missing_ok=True)
                    raise UserError(f"{url} has {total} bytes, expected {size}; it is not the published file")
                with open(part, "ab" if resumed else "wb") as file, \
                        tqdm(total=total, initial=have, desc=path.name, unit="B", unit_scale=True,
                             disable=None) as bar:
                    for block in reply.iter_content(1 << 16):
                        file.write(block)
                        bar.update(len(block))
            if part.stat().st_size == total:
                break
            raise requests.ConnectionError("the connection was cut")
        except (requests.RequestException, ValueError) as error:  # ValueError: of headers that are no numbers
            have = part.stat().st_size if part.exists() else 0
            failures = 1 if have > best else failures + 1
            best = max(best, have)
            if failures == 4:
                raise UserError(f"cannot download from {urlsplit(url).netloc} ({type(error).__name__}); what "
                                "came is kept, run again to go on; the data sets shakespeare, python and "
                                "digits need no network") from None
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
    except (requests.RequestException, ValueError) as error:
        raise UserError(f"cannot download GPT-2's vocabulary ({type(error).__name__}); the data sets "
                        "shakespeare and python need no network") from None


# ----------------------------------------------------------------------------------- sets of text


def prepare_shakespeare(folder, vocab_size=1024):
    """The works of William Shakespeare, which lie beside this file."""
    try:
        text = lzma.decompress(SHAKESPEARE.read_bytes())
    except (FileNotFoundError, lzma.LZMAError):
        text = b""
    if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f"{SHAKESPEARE} is missing or damaged; get it again with this program")
    documents = text.decode().split(f"\n{SEPARATOR}\n")
    write_texts(folder, documents, vocab_size,
                "William Shakespeare's works in Project Gutenberg's public-domain editions, as collected by "
                "the Open Shakespeare project of the Open Knowledge Foundation (CC BY 2.5)")


def prepare_python(folder, vocab_size=DEFAULT_VOCAB_SIZE):
    """Every .py file of the standard library and the installed packages of this interpreter."""
    paths = sysconfig.get_paths()
    files = set()
    for root in {paths["stdlib"], paths["purelib"], paths["platlib"]}:
        for where, folders, names in os.walk(root):
            if root == paths["stdlib"]:  # packages of the interpreter behind a virtual environment
                folders[:] = [f for f in folders if f not in ("site-packages", "dist-packages")]
            files.update(Path(where, name) for name in names if name.endswith(".py"))
    documents = []
    for file in filter(Path.is_file, files):  # not dangling links
        with contextlib.suppress(UnicodeDecodeError, OSError):  # a few test files are not UTF-8
            documents.append(file.read_bytes().decode())
    write_texts(folder, documents, vocab_size,
                f"{len(files):,} .py files of Python {sys.version.split()[0]} and its installed packages")


def prepare_fineweb_edu(folder, shards):
    """The first `shards` of FineWeb-Edu's 1,001, about 100M tokens each, in GPT-2's tokens."""
    if not 1 <= shards <= FINEWEB_EDU_SHARDS:
        raise UserError(f"--shards must be from 1 to {FINEWEB_EDU_SHARDS}, not {shards}")
    encoding = gpt2_encoding()
    names = ["val_000000", *(f"train_{i:06d}" for i in range(1, shards + 1))]
    names = [f"edu_fineweb_{name}.bin" for name in names]
    paths = [download(FINEWEB_EDU + name, folder.parent / "downloads" / name) for name in names]

    def tokens(path):  # llm.c's format: 256 int32, of which magic, version, count; then uint16
        header = np.fromfile(path, dtype="<i4", count=256)
        if (len(header) < 256 or tuple(header[:2]) != (20240520, 1) or header[2] < 1
                or path.stat().st_size != 1024 + 2 * int(header[2])):
            raise UserError(f"{path} is not a complete shard of tokens; remove it and run again")
        shard = np.memmap(path, dtype="<u2", mode="r", offset=1024)
        for start in range(0, len(shard), 1 << 22):
            block = shard[start:start + (1 << 22)]
            if block.max() >= encoding.n_vocab:
                raise UserError(f"{path} has token {block.max()}, outside GPT-2's vocabulary; "
                                "remove it and run again")
            yield block

    splits = dict(train=(block for path in paths[1:] for block in tokens(path)), val=tokens(paths[0]))
    write_tokens(folder, splits, encoding, source=f"{FINEWEB_EDU} ({shards} of {FINEWEB_EDU_SHARDS} shards)")


def prepare_text(folder, files, vocab_size):
    """One's own files, see read_documents; each file is at least one document."""
    documents = [document for file in files for document in read_documents(file)]
    names = ", ".join(Path(file).name for file in files[:5])
    write_texts(folder, documents, vocab_size, f"{len(files)} file(s): {names}")


# --------------------------------------------------------------------------------- sets of images


@contextlib.contextmanager
def image_code():
    """The module image_data, which text does not need, nor its Pillow. Its ValueErrors become UserErrors."""
    try:
        import image_data
    except ImportError as error:
        raise UserError(f"images need more packages ({error}); pip install -r requirements.txt") from None
    try:
        yield image_data
    except ValueError as error:
        raise UserError(str(error)) from None


def load_digits():
    """(images uint8 (1797, 8, 8, 3), labels int64 (1797,)) of the scans that lie beside this file."""
    if not DIGITS.exists() or hash_of(DIGITS) != DIGITS_SHA256:
        raise UserError(f"{DIGITS} is missing or damaged; get it again with this program")
    with np.load(DIGITS) as digits:
        images = np.round(digits["images"] * (255 / 16)).astype(np.uint8)
        return np.repeat(images[..., None], 3, axis=-1), digits["labels"].astype(np.int64)


def split_images(images, labels):
    """((images, labels) to train, to validate): a tenth of each class is held out, chosen by the hash of its
    pixels, so that no image of a class is in both. Duplicates in a class are dropped. UserError if no class
    has two images."""
    train, val = [], []
    for label in np.unique(labels):
        of_label = np.flatnonzero(labels == label)
        indices = of_label[in_hash_order(images[i].tobytes() for i in of_label)]
        n_val = min(len(indices) - 1, max(1, len(indices) // 10))
        val += [*indices[:n_val]]
        train += [*indices[n_val:]]
    if not val:
        raise UserError("there is no class with two different images, one to train and one to validate")
    return [(images[part], labels[part]) for part in (train, val)]


def prepare_digits(folder):
    """Handwritten digits, 16 codes each. The scans are so few that each is used 16 times, varied."""
    train, val = split_images(*load_digits())
    with image_code() as code:
        code.write_images(partial(new_dataset, folder), train, val, [str(i) for i in range(10)], 256,
                          variants=(code.varied(train[0], seed) for seed in range(15)),
                          source="UCI's handwritten digits (https://doi.org/10.24432/C50P49, CC BY 4.0)")


def prepare_cifar10(folder, n_codes):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 images and their mirror images to train, 10,000 to validate."""
    name = CIFAR10["url"].rsplit("/")[-1]
    path = folder.parent / name  # where somebody may have put it
    path = path if path.exists() else folder.parent / "downloads" / name
    download(CIFAR10["url"], path, md5=CIFAR10["md5"])
    with image_code() as code:
        train, val = code.read_cifar10(path, CIFAR10["batch"])
        classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
        code.write_images(partial(new_dataset, folder), train, val, classes, n_codes,
                          variants=[train[0][:, :, ::-1]], source=CIFAR10["url"])


def prepare_images(folder, source, image_size, n_codes):
    """One's own images, one folder a class: the middle square of each, in image_size² pixels."""
    with image_code() as code:
        images, labels, classes, unreadable = code.read_images(source, image_size)
        train, val = split_images(images, labels)
        dropped = dict(unreadable=unreadable, duplicate=len(images) - len(train[0]) - len(val[0]))
        print(f"{len(images) - dropped['duplicate']:,} images; dropped {dropped['duplicate']:,} duplicate, "
              f"{unreadable:,} unreadable")
        code.write_images(partial(new_dataset, folder), train, val, classes, n_codes, dropped=dropped,
                          source=f"{len(images):,} images of {source.name}")


def prepare_imagenet(folder):
    """ImageNet-1K as codes of MaskGIT's VQGAN, and the decoder of that."""
    decoder, codes = (download(url, folder.parent / "downloads" / url.rsplit("/")[-1])
                      for url in (MASKGIT_VQGAN, IMAGENET_CODES))
    with image_code() as code:
        code.write_imagenet(partial(new_dataset, folder), codes, decoder, IMAGENET_CODES)


def prepare_codes(folder, source):
    """ImageNet as codes of LlamaGen's VQGAN, from the folder that its extraction writes to."""
    with image_code() as code:
        code.write_codes(partial(new_dataset, folder), source)


# ------------------------------------------------------------------------------------ command line

DATASETS = ["shakespeare", "python", "fineweb_edu", "digits", "cifar10", "imagenet"]
FLAGS = dict(  # default, and for what
    shards=(1, {"fineweb_edu"}), vocab_size=(None, {"shakespeare", "python", "text"}),
    codebook_size=(4096, {"cifar10", "images"}), image_size=(32, {"images"}))


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", nargs="?", choices=DATASETS)
    add("--text", nargs="+", metavar="FILE", help="make a data set of these files instead")
    add("--images", type=Path, metavar="DIR", help="or of the images in this folder's folders, one a class")
    add("--codes", type=Path, metavar="DIR", help="or of the codes that LlamaGen's extraction wrote here")
    add("--name", help="name of the folder (default: the data set's, or 'text', 'images', 'codes')")
    add("--data_dir", type=Path, default=Path("data"), help="(default: %(default)s)")
    add("--shards", type=int, help="fineweb_edu: how many (default: 1)")
    add("--vocab_size", type=int, help="shakespeare, python, --text: tokens to learn (default: 1024 for "
        f"shakespeare, else {DEFAULT_VOCAB_SIZE}); fineweb_edu has GPT-2's 50,257")
    add("--codebook_size", type=int, help="cifar10, --images: codes (default: 4096)")
    add("--image_size", type=int, help="--images: pixels of an edge (default: 32)")
    args = parser.parse_args(argv)
    sources = dict(text=args.text, images=args.images, codes=args.codes)
    given = [args.dataset] * bool(args.dataset)
    given += [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"name one data set ({', '.join(DATASETS)}) or give one of --text FILE..., "
                        "--images DIR, --codes DIR")
    for flag, (default, fits) in FLAGS.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
        elif given[0] not in fits:
            raise UserError(f"--{flag} does not fit {given[0]}; leave it out")
    if not 2 <= args.codebook_size <= 65536:
        raise UserError(f"--codebook_size must be from 2 to 65536, not {args.codebook_size}")
    name = given[0] if args.name is None else args.name
    if name in ("", ".", "..") or Path(name).name != name or len(os.fsencode(name)) > 200:
        raise UserError(f"--name must be the name of a folder in {args.data_dir}, of up to 200 bytes, not "
                        f"{name!r}")
    folder = args.data_dir / name
    vocab_size = args.vocab_size
    if vocab_size is None:
        vocab_size = 1024 if args.dataset == "shakespeare" else DEFAULT_VOCAB_SIZE
    if os.path.lexists(folder):
        raise UserError(f"{folder} is there already; remove it to make it again, or give another --name")
    place = next(path for path in (args.data_dir, *args.data_dir.parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):  # said before hours of work
        raise UserError(f"{args.data_dir} cannot be made or written to; give another --data_dir")
    {
        "text": lambda: prepare_text(folder, args.text, vocab_size),
        "python": lambda: prepare_python(folder, vocab_size),
        "shakespeare": lambda: prepare_shakespeare(folder, vocab_size),
        "fineweb_edu": lambda: prepare_fineweb_edu(folder, args.shards),
        "digits": lambda: prepare_digits(folder),
        "cifar10": lambda: prepare_cifar10(folder, args.codebook_size),
        "images": lambda: prepare_images(folder, args.images, args.image_size, args.codebook_size),
        "imagenet": lambda: prepare_imagenet(folder),
        "codes": lambda: prepare_codes(folder, args.codes),
    }[given[0]]()


if __name__ == "__main__":
    run(main, "make a smaller data set: fewer files, or a lower --vocab_size, --image_size, --codebook_size")
