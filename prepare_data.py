"""Makes every data set into one format on disk, from which the training scripts read:

    data/<name>/train.bin  val.bin      token ids, uint16 little endian, one long sequence each
                tokenizer.tiktoken      a token a line: its bytes in base64, its rank
                meta.json               sizes, source, and the sha256 of the files above

    python prepare_data.py python                    Python's own source: no network, the default
    python prepare_data.py shakespeare               1.1 MB, downloaded
    python prepare_data.py fineweb_edu --shards 10   100M tokens a shard, downloaded
    python prepare_data.py --text FILE... --name N   your own files

A folder is written under another name and renamed, so that one that exists is complete. Documents
are separated by the token <|endoftext|>, which stands before each of them and for no byte of text.
"""
import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import requests
import rustbpe
import tiktoken
from tqdm import tqdm

FORMAT = 1  # of the files above; a reader refuses any other
SEPARATOR = "<|endoftext|>"

SHAKESPEARE = dict(
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    size=1115394, sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
# FineWeb-Edu in GPT-2's tokens, made by Andrej Karpathy for llm.c: one shard to validate, 1,001 to train.
FINEWEB_EDU = "https://huggingface.co/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main/"
FINEWEB_EDU_SHARDS = 1001


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


@dataclass
class Dataset:
    """A checked data set: its meta.json and its token ids, uint16, read from disk as needed."""
    folder: Path
    meta: dict
    train: np.ndarray
    val: np.ndarray

    def tokenizer(self):
        """The tiktoken.Encoding of a text data set."""
        lines = (self.folder / "tokenizer.tiktoken").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        return make_encoding(ranks, self.meta["tokenizer"]["pattern"])


def sha256_of(path):
    digest = hashlib.sha256()
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
        needed = ["train.bin", "val.bin"] + (["tokenizer.tiktoken"] if meta["kind"] == "text" else [])
        if missing := [name for name in needed if name not in meta["files"]]:
            raise UserError(f"{folder / 'meta.json'} is damaged (it has no hash of {missing[0]}){again}")
        for name, published in meta["files"].items():
            size = (folder / name).stat().st_size
            if size != published["size"]:
                raise UserError(f"{folder / name} has {size} bytes, not the {published['size']} of meta.json{again}")
            if sha256_of(folder / name) != published["sha256"]:
                raise UserError(f"{folder / name} was altered: its sha256 is not that of meta.json{again}")
        bins = [np.memmap(folder / f"{split}.bin", dtype="<u2", mode="r") for split in ("train", "val")]
        largest = max(tokens.max() for tokens in bins)
        if largest >= meta["vocab_size"]:
            raise UserError(f"{folder} has token {largest}, outside its vocabulary of {meta['vocab_size']}{again}")
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing{again}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'meta.json'} is damaged ({error!r}){again}") from None
    return Dataset(folder, meta, *bins)


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
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_dataset(folder, splits, encoding, **about):
    """Writes a text data set. splits: {'train': ..., 'val': ...}, each an iterable of uint16 arrays."""
    lengths = token_bytes(encoding)
    with new_folder(Path(folder)) as new:
        counts = {}
        for split, arrays in splits.items():
            tokens = text_bytes = 0
            with open(new / f"{split}.bin", "wb") as file:
                for array in arrays:
                    file.write(array.astype("<u2").tobytes())
                    tokens, text_bytes = tokens + len(array), text_bytes + int(lengths[array].sum())
            counts[split] = dict(tokens=tokens, bytes=text_bytes)
        with open(new / "tokenizer.tiktoken", "wb") as file:
            for rank in range(encoding.n_vocab - 1):  # the last one is the separator
                file.write(base64.b64encode(encoding.decode_single_token_bytes(rank)) + b" %d\n" % rank)
        files = {path.name: dict(size=path.stat().st_size, sha256=sha256_of(path))
                 for path in sorted(new.iterdir())}
        meta = dict(format=FORMAT, kind="text", vocab_size=encoding.n_vocab, **about, **counts,
                    tokenizer=dict(name=encoding.name, pattern=encoding._pat_str), files=files)
        (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    print(f"{folder}: {counts['train']['tokens']:,} tokens to train ({counts['train']['bytes']:,} bytes), "
          f"{counts['val']['tokens']:,} to validate ({counts['val']['bytes']:,} bytes), "
          f"vocabulary {encoding.n_vocab:,}, {about['source']}")


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
    bpe.train_from_iterator(head(), vocab_size - 1, pattern=PATTERN)
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


def write_texts(folder, documents, encoding, source):
    """Makes a data set of documents (a list of str). encoding: a tiktoken.Encoding, or the size of a
    vocabulary to learn from the training documents."""
    train, val = split_documents(documents)
    if isinstance(encoding, int):
        encoding = train_tokenizer(train, encoding)
    splits = dict(train=tokenize(train, encoding, "train"), val=tokenize(val, encoding, "val"))
    write_dataset(folder, splits, encoding, source=source)


# -------------------------------------------------------------------------------------- downloads


def download(url, path, size=None, sha256=None, patience=1.0):
    """Fetches url into path unless it is there. A cut connection is resumed where it broke, up to
    four times in a row without progress, and by the next call. Size and hash are checked where they
    are given or the Hugging Face hub publishes them. Waits patience · 1, 2, 4 seconds in between."""
    path = Path(path)

    def check(file, what_to_do):
        if size and file.stat().st_size != size:
            raise UserError(f"{file} of {url} has {file.stat().st_size} bytes, expected {size}; {what_to_do}")
        if sha256 and sha256_of(file) != sha256:
            raise UserError(f"{file} of {url} has another sha256 than published; {what_to_do}")

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
                                "run again to go on; `python prepare_data.py python` needs no network") from None
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
    write_dataset(folder, splits, encoding, source=f"{FINEWEB_EDU} ({shards} of {FINEWEB_EDU_SHARDS} shards)")


def prepare_text(folder, files, vocab_size):
    """One's own files. A line <|endoftext|> separates documents; each file is at least one."""
    documents = []
    for file in files:
        try:
            documents += re.split(rf"\r?\n{re.escape(SEPARATOR)}\r?\n", Path(file).read_bytes().decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from None
    write_texts(folder, documents, vocab_size, f"{len(files)} file(s): {', '.join(Path(f).name for f in files[:5])}")


DEFAULT_VOCAB_SIZE = 16384


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", choices=["python", "shakespeare", "fineweb_edu"])
    parser.add_argument("--text", nargs="+", metavar="FILE", help="make a data set of these files instead")
    parser.add_argument("--name", help="name of the folder (default: that of the data set, or 'text')")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="(default: %(default)s)")
    parser.add_argument("--shards", type=int, default=1, help="fineweb_edu: how many (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=DEFAULT_VOCAB_SIZE,
                        help="python, --text: tokens to learn (default: %(default)s); downloads use GPT-2's 50,257")
    args = parser.parse_args(argv)
    if (args.dataset is None) == (args.text is None):
        raise UserError("name one data set (python, shakespeare, fineweb_edu) or give --text FILE...")
    folder = args.data_dir / (args.name or args.dataset or "text")
    if folder.exists():
        raise UserError(f"{folder} is there already; remove it to make it again, or give another --name")
    if args.text:
        prepare_text(folder, args.text, args.vocab_size)
    elif args.dataset == "python":
        prepare_python(folder, args.vocab_size)
    elif args.dataset == "shakespeare":
        prepare_shakespeare(folder)
    else:
        prepare_fineweb_edu(folder, args.shards)


if __name__ == "__main__":
    run(main)
