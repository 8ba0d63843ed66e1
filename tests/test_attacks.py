"""Random edits of all that the programs read: each ends in time, with the right result, or with one line and
exit code 2. A longer run: ATTACKS=10000 ATTACK_SEED=1 pytest tests/test_attacks.py"""
import collections
import contextlib
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import traceback
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import image_data
import prepare_data
import train_gpt
import train_image
from script import run

ATTACKS, SEED = int(os.environ.get("ATTACKS", 400)), os.environ.get("ATTACK_SEED", "0")
SCRIPTS = dict(text=train_gpt, image=train_image)
DECODERS = dict(text="tokenizer.tiktoken", image="codebook.npy")
SAMPLE = dict(text=["--prompt", "ab"], image=["--sample"])
MARK = prepare_data.SEPARATOR
ODD = [None, True, -1, 0, 1, 3, 1.0, 2.5, math.nan, math.inf, 10 ** 30, "", "x", "a\nb", "../x", "\ud800", [],
       {}, [[]], [1, 2], {"x": 1}]


class Hang(BaseException):
    """Nothing that is attacked catches it."""


def ends_well(main, *arguments, seconds=20):
    """True if the command succeeds, False if it ends with one line and exit code 2; all else is a failure."""
    def hang(*_):
        raise Hang(f"more than {seconds} s")

    errors, code = io.StringIO(), 0
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            run(lambda: main(list(map(str, arguments))))
    except SystemExit as stop:
        code = stop.code
    finally:
        signal.alarm(0)
    assert code == 0 or code == 2 and errors.getvalue().count("\n") == 1, (code, errors.getvalue())
    return code == 0


# ------------------------------------------------------------------------------------------- edits


def edit_bytes(rng, content):
    """Flips, cuts, inserts, replaces, repeats or appends bytes, once to three times."""
    for _ in range(rng.randint(1, 3)):
        i, n = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 8, 100])
        before, there, after, noise = content[:i], content[i:i + n], content[i + n:], rng.randbytes(n)
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in there[:1]) + there[1:]
        content = before + rng.choice([flipped + after, flipped + after, b"", after, noise + after,
                                       there + there + after, there + after + noise])
    return content


def edit_tensor(rng, t):
    """(another tensor, whether its form is the same)."""
    how = rng.choice(["values", "nan", "dtype", "flat", "cut", "strides", "one number", "sparse", "list"])
    if how in ("values", "nan"):
        return t + (torch.rand_like(t) / 100 if how == "values" else math.nan), how == "values"
    if t.dim() < 2 or min(t.shape) < 2:
        return t[None], False
    edits = {"dtype": lambda: t.to(rng.choice([torch.float64, torch.bfloat16])), "flat": t.flatten,
             "cut": lambda: t[..., 1:], "strides": lambda: t.mT.contiguous().mT, "sparse": t.to_sparse,
             "one number": lambda: t[:1, :1].expand_as(t), "list": t.tolist}
    return edits[how](), False


def edit_tree(rng, tree):
    """Edits a value in nested dicts and lists → (the keys that lead there, whether it has the same form)."""
    way, holder, same_form = [], tree, False
    while True:
        keys = list(holder if isinstance(holder, dict) else range(len(holder)))
        way.append(rng.choice(keys))
        value = holder[way[-1]]
        if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
            break
        holder = value
    key, how = way[-1], rng.choice(["odd", "odd", "gone", "name", "extra", "near", "near", "near", "other"])
    if how in ("gone", "name"):
        del holder[key]
        if how == "name" and isinstance(holder, dict):
            holder[rng.choice([f"{key}x", 7, ""])] = value
    elif how == "extra" and isinstance(holder, dict):
        holder[rng.choice(["extra", 99])] = value
    elif how == "other":
        other, same_form = rng.choice(keys), True
        holder[key], holder[other] = holder[other], value
    elif torch.is_tensor(value):
        holder[key], same_form = edit_tensor(rng, value)
    elif how == "near" and type(value) in (int, float, str):
        near = [value + "x", value[1:]] if type(value) is str else [value + 1, value - 1, value * 2, -value]
        holder[key], same_form = rng.choice(near), True
    else:
        holder[key] = rng.choice(ODD)
    return way, same_form


# ------------------------------------------------------------------------------ a world to attack


def weights(out_dir):
    """Hash of all bits of the model and the optimizers of a run, which are finite."""
    state, digest = torch.load(out_dir / "checkpoint.pt", weights_only=True), hashlib.sha256()
    tensors = [t for _, moments in sorted(state["optimizers"].items()) for _, t in sorted(moments.items())]
    for tensor in [*state["model"].values(), *tensors]:
        assert tensor.isfinite().all()
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


class World:
    """A data set and a run of each kind, and what undisturbed runs make of them."""

    def __init__(self, folder):
        rng, self.folder, data = random.Random(0), folder, ["--data_dir", folder / "data"]
        words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(100)]
        texts = [" ".join(rng.choices(words, k=40)) for _ in range(60)]
        (folder / "a.txt").write_text(f"\n{MARK}\n".join(texts))
        for i in range(8):
            (folder / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / "ab"[i % 2] / f"{i}.png")
        self.images = ["--image_size", 8, "--codebook_size", 16]
        assert ends_well(prepare_data.main, "--text", folder / "a.txt", *data, "--vocab_size", 300)
        source = ["--images", folder / "photos", "--name", "image"]
        assert ends_well(prepare_data.main, *source, *data, *self.images)
        tiny = ("--device cpu --dtype float32 --depth 1 --batch_tokens 64 --micro_batch 2 --eval_tokens 64 "
                "--max_steps 2 --log_every 1 --eval_every 2").split()
        self.new = dict(text=["--dataset", "text", "--seq_len", 16, "--max_new_tokens", 2, *tiny],
                        image=["--dataset", "image", *tiny])
        self.first, self.resumed = {}, {}
        for kind, script in SCRIPTS.items():
            assert ends_well(script.main, *self.new[kind], *data, "--out_dir", folder / kind)
            self.first[kind] = weights(folder / kind)
            shutil.copytree(folder / kind, folder / f"{kind} again")
            assert self.resume(kind, folder / f"{kind} again")
            self.resumed[kind] = weights(folder / f"{kind} again")

    def resume(self, kind, out_dir):
        return ends_well(SCRIPTS[kind].main, "--resume", "--max_steps", 3, "--out_dir", out_dir)

    def sample(self, kind, out_dir):
        return ends_well(SCRIPTS[kind].main, "--out_dir", out_dir, *SAMPLE[kind])


def hasten(patch):
    """Leaves out what takes longer than all else."""
    patch.setattr(train_gpt, "update_curves", lambda folder: None)
    patch.setattr(train_image, "MAX_COLUMNS", 1)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        return World(tmp_path_factory.mktemp("world"))


# ----------------------------------------------------------------------------------------- attacks
# Each has random numbers, the world, and an empty folder to work in → what came of it. `what` takes notes.


def attack_data(rng, world, folder, what):
    """A file of a data set, most with new hashes in meta.json: nothing but tokens changes a weight."""
    kind = rng.choice(["text", "image"])
    data = shutil.copytree(world.folder / "data" / kind, folder / kind)
    names = ["meta.json"] * 5 + [DECODERS[kind]] * 2 + ["train.bin", "val.bin", ".checked.json"]
    path, hashed = data / rng.choice(names), rng.random() < 0.75
    meta = json.loads((data / "meta.json").read_text())
    what += [path.name, hashed]
    content = path.read_bytes() if path.exists() else b"{}"
    if path.name == "meta.json" and hashed:
        what += [edit_tree(rng, meta) for _ in range(rng.choice([1, 1, 2]))]
        path.write_text(json.dumps(meta))
    elif path.name == "tokenizer.tiktoken" and rng.random() < 0.5:
        lines = [line.split() for line in content.splitlines()]
        line, other = rng.sample(lines, 2)
        line[rng.randrange(2)] = other[rng.randrange(2)]
        path.write_bytes(b"".join(b" ".join(line) + b"\n" for line in lines))
    else:
        path.write_bytes(edit_bytes(rng, content))
    if hashed and path.name not in ("meta.json", ".checked.json"):
        edited, split = path.read_bytes(), path.name.removesuffix(".bin")
        meta["files"][path.name] = dict(size=len(edited), sha256=hashlib.sha256(edited).hexdigest())
        if split in ("train", "val"):
            meta[split]["tokens"] = len(edited) // 2
        (data / "meta.json").write_text(json.dumps(meta))
    if not ends_well(SCRIPTS[kind].main, *world.new[kind], "--data_dir", folder, "--out_dir", folder / "out"):
        return "refused"
    if path.name == "train.bin" and hashed and path.read_bytes() != content:
        return "other content"
    assert hashed or path.read_bytes() == content or path.name in ("meta.json", ".checked.json")
    assert weights(folder / "out") == world.first[kind]
    return "right"


def attack_checkpoint(rng, world, folder, what):
    """A checkpoint: its bytes, its archive with new checksums, or what it holds, saved anew."""
    kind, how = rng.choice(["text", "image"]), rng.choice(["bytes", "member", "archive", *["tree"] * 4])
    path, other_content = shutil.copytree(world.folder / kind, folder / kind) / "checkpoint.pt", False
    what += [kind, how]
    if how == "bytes":
        path.write_bytes(edit_bytes(rng, path.read_bytes()))
    elif how == "tree":
        state = torch.load(path, weights_only=True)
        way, same_form = edit_tree(rng, state)
        what += [way, same_form]
        other_content = same_form and way[0] in ("model", "optimizers") or way[0] == "flags"
        torch.save(state, path)
    else:
        with zipfile.ZipFile(path) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        i, compression = rng.randrange(len(members)), zipfile.ZIP_STORED
        change = rng.choice(["pack", "gone", "extra", "again", "order", "root"])
        what += [i, change]
        if how == "member":
            i = rng.choice([i, next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))])
            members[i], other_content = (members[i][0], edit_bytes(rng, members[i][1])), True
        elif change == "pack":
            compression = zipfile.ZIP_DEFLATED
        elif change == "gone":
            del members[i]
        elif change in ("extra", "again"):
            members.append((members[i][0] if change == "again" else "x/extra", b"x"))
        elif change == "order":
            rng.shuffle(members)
        else:
            members = [(f"x{name}", content) for name, content in members]
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in members:
                archive.writestr(name, content)
    before = path.read_bytes()
    if rng.random() < 0.3:
        return "sampled" if world.sample(kind, path.parent) else "refused"
    if not world.resume(kind, path.parent):
        assert path.read_bytes() == before
        return "refused"
    if weights(path.parent) == world.resumed[kind]:
        return "right"
    assert other_content
    return "other content"


def attack_run(rng, world, folder, what):
    """The other files of a run: they change no weight, and a decoder that was altered is never used."""
    kind, how = rng.choice(["text", "image"]), rng.choice(["bytes", "line", "folder", "pipe", "gone", "link"])
    run = shutil.copytree(world.folder / kind, folder / kind)
    path = run / rng.choice(["log.jsonl", "log.jsonl", "lock", DECODERS[kind]])
    what += [path, how]
    before = path.read_bytes()
    (folder / "mine").write_bytes(b"my own")
    if how == "bytes":
        path.write_bytes(edit_bytes(rng, before))
    elif how == "line":
        lines, odd = before.splitlines(), [json.dumps({"step": step}).encode() for step in ODD]
        odd += [b"[" * 10 ** 5, b"[1]", b"\xff", b"", b"nan"]
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(odd))
        path.write_bytes(b"\n".join(lines) + b"\n")
    else:
        path.unlink()
        dict(folder=path.mkdir, pipe=lambda: os.mkfifo(path), gone=lambda: None,
             link=lambda: path.symlink_to(folder / "mine"))[how]()
    if path.name == DECODERS[kind] and rng.random() < 0.5:
        same = path.is_file() and path.read_bytes() == before
        assert world.sample(kind, run) == same
        return "right" if same else "refused"
    well = world.resume(kind, run)
    assert (folder / "mine").read_bytes() == b"my own" and (well or how in ("folder", "link"))
    if well:
        assert weights(run) == world.resumed[kind]
        steps = [json.loads(line).get("step") for line in (run / "log.jsonl").read_text().splitlines()]
        assert steps[-2:] == [3, 3]
    return "right" if well else "refused"


def random_image(rng, mode):
    """(a Pillow image, what a person sees (8, 8, 1 or 3))."""
    shape = (8, 8, {"RGBA": 4, "LA": 2, "RGB": 3, "P": 3, "CMYK": 3}.get(mode, 1))
    pixels = np.random.default_rng(rng.randrange(10 ** 6)).integers(0, 256, shape, np.uint8)
    pixels[0, 0], pixels[0, 1] = 0, 255
    deep = {"I;16": (257, np.uint16), "I": (257, np.int32), "F": (1 / 255, np.float32)}
    if mode in deep:
        scale, dtype = deep[mode]
        return Image.fromarray((pixels[..., 0].astype(np.float64) * scale).astype(dtype)), pixels
    image = Image.fromarray(pixels[..., 0] if shape[2] == 1 else pixels)
    if mode in ("RGBA", "LA"):
        alpha = pixels[..., -1:] / 255
        return image, pixels[..., :-1] * alpha + 255 * (1 - alpha)
    image = image.convert(mode)
    return image, np.asarray(image.convert("RGB"))


def attack_images(rng, world, folder, what):
    """An image among others: used as a person sees it, or skipped; the others stay as they are."""
    photos = shutil.copytree(world.folder / "photos", folder / "photos")
    mode = rng.choice(["RGB", "L", "1", "RGBA", "LA", "P", "I;16", "I", "F", "CMYK"])
    name = rng.choice("png png tif tif webp jpg bmp gif ppm tga ico dds avif jp2 pcx sgi icns".split())
    image, seen = random_image(rng, mode)
    path, edited = photos / "a" / f"7.{name}", rng.random() < 0.6
    what += [mode, name, edited]
    try:
        image.save(path, **dict(quality=100) if name in ("jpg", "avif") else dict(lossless=True))
    except Exception:  # Pillow does not write all modes in all formats
        return "not written"
    content = path.read_bytes()
    path.write_bytes(edit_bytes(rng, content) if edited else content + b"behind its end" * (name != "tga"))
    with contextlib.redirect_stdout(io.StringIO()):
        images, labels, classes, unreadable = image_data.read_images(photos, 8)
    assert len(images) == len(labels) == 9 - unreadable and images.dtype == np.uint8 and classes == ["a", "b"]
    others = images if unreadable else np.delete(images, 4, axis=0)
    for path, other in zip(sorted((world.folder / "photos").glob("*/*")), others, strict=True):
        assert (np.asarray(Image.open(path)) == other).all()
    if not edited and (name in ("png", "tif") or name in ("webp", "bmp", "ppm") and mode in ("L", "RGB")):
        assert not unreadable and np.abs(images[4] - seen).max() <= 1
        return "right"
    return "skipped" if unreadable else "used"


def attack_text(rng, world, folder, what):
    """Text with marks, blanks and line ends of all kinds: its documents are those that were joined."""
    end, blank = rng.choice(["\n", "\r\n", "\r"]), rng.choice(["", " ", "\t ", "\ufeff", "\u00a0", "\u3000"])
    documents = [" ".join(str(rng.randrange(10 ** 6)) for _ in range(rng.randint(1, 30)))
                 + rng.choice(["", "!\r x", "\u2028y", f" {MARK} z"]) for _ in range(rng.randint(2, 30))]

    def marks(least):
        return "".join(f"{blank * rng.randint(0, 1)}{MARK}{blank}{end}" for _ in range(rng.randint(least, 3)))

    text = rng.choice(["", "\ufeff"]) + marks(0) + "".join(d + end + marks(1) for d in documents[:-1])
    text += documents[-1] + rng.choice(["", end + MARK, end + marks(1)])
    edited = rng.random() < 0.3
    path = folder / "a.txt"
    path.write_bytes(edit_bytes(rng, text.encode()) if edited else text.encode())
    what.append(path.read_bytes())
    well = ends_well(prepare_data.main, "--text", path, "--data_dir", folder, "--vocab_size", 260)
    if edited:
        return "used" if well else "refused"
    assert prepare_data.read_documents(path) == documents
    data = prepare_data.load_dataset(folder / "text")
    joined = data.tokenizer().decode([t for t in [*data.train, *data.val] if t < data.meta["vocab_size"] - 1])
    assert sorted(joined) == sorted("".join(documents)) and data.meta["documents"] == len(documents)
    return "right"


VALUES = ["nan", "inf", "1e999", "1e308", "-1", "0", "1", "2", "0.5", "0x10", "1e", "0_2", "\uff12", "9" * 20,
          "9" * 400, "1" * 5000, "", " ", "x", "x" * 300, "--", "None", "\udcff", "a b", "../x", "/"]


def attack_flags(rng, world, folder, what):
    """Flags with odd values: a new run has those that it was given, a finished one stays as it is."""
    kind, out_dir = rng.choice(["text", "image", "prepare"]), folder / "run"
    flags = "vocab_size codebook_size image_size name shards".split()
    if kind == "prepare":
        source = rng.choice([["--text", world.folder / "a.txt"], ["--images", world.folder / "photos"]])
        main, command = prepare_data.main, [*source, "--data_dir", folder, "--vocab_size", 260, *world.images]
    else:
        shutil.copytree(world.folder / kind, out_dir)
        flags = [*torch.load(out_dir / "checkpoint.pt")["flags"], "prompt", "save_npz", "size", "out_dir"]
        new = [*world.new[kind], "--data_dir", world.folder / "data", "--out_dir", folder / "new"]
        old = rng.choice([["--resume", "--max_steps", 3], SAMPLE[kind]])
        main, command = SCRIPTS[kind].main, rng.choice([new, [*old, "--out_dir", out_dir]])
    flag, value = rng.choice(flags), rng.choice(VALUES)
    what += [command, flag, value]
    well = ends_well(main, *command, f"--{flag}={value}")
    if out_dir.exists() and not well:
        assert weights(out_dir) == world.first[kind] and not (folder / "new" / "checkpoint.pt").exists()
    if (folder / "new" / "checkpoint.pt").exists() and flag not in ("prompt", "size", "out_dir"):
        used = torch.load(folder / "new" / "checkpoint.pt")["flags"][flag]
        assert used == type(used)(value)
        return "right"
    return "used" if well else "refused"


SHARES = {attack_data: 5, attack_checkpoint: 6, attack_run: 2, attack_images: 4, attack_text: 3,
          attack_flags: 4}


@pytest.mark.parametrize("attack", SHARES, ids=lambda attack: attack.__name__)
@pytest.mark.filterwarnings("ignore")  # of doubled names in archives
def test_attacks(attack, world, tmp_path, monkeypatch, record_property):
    hasten(monkeypatch)
    outcomes, failures = collections.Counter(), []
    for i in range(ATTACKS * SHARES[attack] // sum(SHARES.values())):
        folder, what = tmp_path / str(i), []
        folder.mkdir()
        monkeypatch.chdir(folder)
        try:
            outcomes[attack(random.Random(f"{SEED} {i}"), world, folder, what)] += 1
        except (Exception, SystemExit, Hang):
            failures.append(f"ATTACK_SEED={SEED}, {i}: {what}\n{traceback.format_exc(limit=-6)}")
        shutil.rmtree(folder)
    record_property(attack.__name__, str(dict(outcomes)))
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures[:20])
