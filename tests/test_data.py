"""Data on disk: what is written comes back whole, what is damaged is refused, what a kill leaves goes."""
import contextlib
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import HERE, fails

import prepare_data
from prepare_data import SEPARATOR
from script import UserError, run, write_file


def documents_of(folder):
    """{document: split} of a text data set, from its tokens alone."""
    data, documents = prepare_data.load_dataset(folder), {}
    encoding = data.tokenizer()
    for split in ("train", "val"):
        tokens = getattr(data, split)
        starts = np.flatnonzero(tokens == encoding.eot_token)
        assert starts[0] == 0 and data.meta[split]["tokens"] == len(tokens)
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            documents[encoding.decode(tokens[start + 1:end].tolist())] = split
    return documents


def prepare_text(tmp_path, content):
    """A data set of one file of these bytes → its folder."""
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    prepare_data.main(["--text", str(path), "--vocab_size", "300", "--data_dir", str(tmp_path / "data")])
    return tmp_path / "data" / "text"


def run_script(script, *arguments, before="", **options):
    """A script as a process of its own, after this code."""
    code = (f"import runpy, sys; sys.path.insert(0, {str(HERE)!r}); "
            f"sys.argv = ['x'] + {list(map(str, arguments))!r}\n{before}\n"
            f"runpy.run_path({str(HERE / script)!r}, run_name='__main__')")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, **{"text": True, **options})


# ------------------------------------------------------------------------------------- documents


def test_texts_come_back_whole_and_split_by_document(sources, data_dir):
    meta, documents = prepare_data.load_dataset(data_dir / "small").meta, documents_of(data_dir / "small")
    assert meta["vocab_size"] == 512 and meta["dtype"] == "uint16"
    for split in ("train", "val"):
        mine = [document for document, its_split in documents.items() if its_split == split]
        assert meta[split]["bytes"] == sum(len(document.encode()) for document in mine)
        assert meta[split]["documents"] == len(mine)
    assert set(documents) == {path.read_text(encoding="utf-8") for path in sources.iterdir()}
    assert set(documents.values()) == {"train", "val"}


def test_the_same_files_give_the_same_hashes(sources, data_dir, tmp_path):
    files = sorted(sources.iterdir(), reverse=True)
    prepare_data.main(["--text", *map(str, files), str(files[0]), "--name", "again", "--vocab_size", "512",
                       "--data_dir", str(tmp_path)])  # another order, and one file twice
    first, again = (prepare_data.load_dataset(f).meta for f in (data_dir / "small", tmp_path / "again"))
    assert first["files"] == again["files"]
    assert first["dropped"]["duplicate"] == 0 and again["dropped"]["duplicate"] == 1


@pytest.mark.parametrize("sizes", [[500_000, 300], [300, 500_000], [1000] * 50, [900_000], [10, 10, 70_000]])
def test_a_tenth_is_for_validation_however_long_the_documents(sizes):
    documents = [f"{i}".ljust(size - 1, "x") + "\n" for i, size in enumerate(sizes)]
    train, val = prepare_data.split_documents(documents)
    assert sorted("".join(train + val)) == sorted("".join(documents))
    assert 0.05 < sum(map(len, val)) / sum(sizes) < 0.2


def test_one_document_is_cut_at_a_line(tmp_path):
    text = "".join(f"line {i} of one long text\n" for i in range(1000)).encode()
    data = prepare_data.load_dataset(prepare_text(tmp_path, text))
    val = data.tokenizer().decode(data.val[1:].tolist())
    assert val.startswith("line 9") and val.endswith("line 999 of one long text\n")
    assert data.meta["val"]["bytes"] == pytest.approx(0.1 * len(text), rel=0.01)


TEXTS = [f"document {i} says x{i}" for i in range(40)]


@pytest.mark.parametrize("content", [
    f"\n{SEPARATOR}\n".join(TEXTS), f"\r\n{SEPARATOR}\r\n".join(TEXTS), f"\n{SEPARATOR}  \t\n".join(TEXTS),
    f"\n{SEPARATOR}\n{SEPARATOR}\n".join(TEXTS), f"{SEPARATOR}\n" + f"\n{SEPARATOR}\n".join(TEXTS),
    f"\ufeff{SEPARATOR}\n" + f"\n \ufeff{SEPARATOR}\n".join(TEXTS), "\ufeff" + f"\n{SEPARATOR}\n".join(TEXTS),
    f"\n{SEPARATOR}\n".join([*TEXTS, ""]), f"\n{SEPARATOR}\n".join(TEXTS) + f"\r\n{SEPARATOR}",
    f"\r{SEPARATOR}\r".join(TEXTS), f"{SEPARATOR}\r" + f"\r{SEPARATOR} \r{SEPARATOR}\r".join(TEXTS),
    "\r".join([*TEXTS, ""]).replace("\r", f"\r{SEPARATOR}\r"), f"\n\u3000{SEPARATOR}\u00a0\n".join(TEXTS),
    f"{SEPARATOR}\r\n{SEPARATOR}\r\n" + f"\r\n{SEPARATOR}\r\n".join(TEXTS) + f"\n{SEPARATOR} \n"])
def test_a_line_with_the_mark_separates_documents_wherever_it_stands(content, tmp_path):
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert prepare_data.read_documents(tmp_path / "a.txt") == TEXTS


def test_documents_of_one_file_are_counted(tmp_path, capsys):
    blank, twice, inside = "  \n", TEXTS[0], f"a mark {SEPARATOR} inside a line"
    folder = prepare_text(tmp_path, f"\n{SEPARATOR}\n".join([*TEXTS, blank, twice, inside]).encode())
    assert set(documents_of(folder)) == {*TEXTS, inside}
    meta = prepare_data.load_dataset(folder).meta
    assert meta["documents"] == 41 and meta["dropped"] == dict(duplicate=1, empty=1)
    assert meta["marks_in_text"] == 1
    output = capsys.readouterr().out
    assert all(word in output for word in ("41 documents", "1 duplicate", "1 empty", f"1 {SEPARATOR}"))


def test_documents_that_differ_in_their_last_line_end_are_one(tmp_path, capsys):
    """The last document of a file has one, others have not. None may be in training and validation both."""
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text + "\n")
    (tmp_path / "lines.txt").write_bytes(b"two\nlines")
    (tmp_path / "dos.txt").write_bytes(b"two\r\nlines\r\n")
    (tmp_path / "mac.txt").write_bytes(b"\rtwo\rlines\r")
    (tmp_path / "joined.txt").write_text(f"\r\n{SEPARATOR}\r\n".join(TEXTS))
    files = [str(path) for path in tmp_path.glob("*.txt")]
    found = []
    for i, order in enumerate((files, files[::-1])):
        prepare_data.main(["--text", *order, "--name", str(i), "--vocab_size", "300", "--data_dir",
                           str(tmp_path)])
        found.append(prepare_data.load_dataset(tmp_path / str(i)).meta)
    kept = sorted("\n".join(document.strip().splitlines()) for document in documents_of(tmp_path / "0"))
    assert kept == sorted([*TEXTS, "two\nlines"])
    assert found[0]["dropped"]["duplicate"] == len(TEXTS) + 2 and found[0]["files"] == found[1]["files"]


@pytest.mark.parametrize("documents", [
    ["word and more words\n" * 100 + "\n" * 400], ["\n" * 200 + "word " * 200],
    ["a b c\n" * 60, "\n" * 900 + "d"], ["word " * 140, "some words" + "\n" * 3000]])
def test_no_part_is_blank(documents):
    for part in prepare_data.split_documents(documents):
        assert any(document.strip() for document in part)
    with pytest.raises(prepare_data.UserError):
        prepare_data.split_documents(["\n" * 1000 + "word " * 20])


def test_a_folder_for_data_that_cannot_be_is_no_late_surprise(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(f"\n{SEPARATOR}\n".join(TEXTS))
    monkeypatch.setattr(prepare_data, "train_tokenizer", None)  # hours
    fails(prepare_data, ["--text", tmp_path / "a.txt", "--data_dir", tmp_path / "a.txt" / "data"], "a.txt")
    fails(prepare_data, ["--text", tmp_path / "a.txt", "--name", "n" * 240, "--data_dir", tmp_path], "--name")


def test_long_runs_and_long_documents_come_back_whole(tmp_path):
    """A run of a million blanks is more than the tokenizer takes at once; so is what follows."""
    texts = ["a" + " " * 3_000_000 + "b", "x" * 400_000, "!" + "\n" * 300_000 + "?",
             "é\u0301\r\n" * 100_000 + "!", "def f(x):\n    return x  # a line\n\n\n" * 9000 + "!"]
    folder = prepare_text(tmp_path, f"\n{SEPARATOR}\n".join(texts).encode())
    assert set(documents_of(folder)) == set(texts)


def test_a_document_in_pieces_has_the_tokens_of_the_whole(sources, data_dir, monkeypatch):
    encoding = prepare_data.load_dataset(data_dir / "small").tokenizer()
    documents = [path.read_text(encoding="utf-8") for path in sorted(sources.iterdir())][:6]
    whole = np.concatenate(list(prepare_data.tokenize(documents, encoding, "")))
    monkeypatch.setattr(prepare_data, "PIECE", 3000)
    assert sum(len(list(prepare_data.pieces(document))) for document in documents) > 30
    assert (np.concatenate(list(prepare_data.tokenize(documents, encoding, ""))) == whole).all()
    expected = [t for d in documents for t in (encoding.eot_token, *encoding.encode_ordinary(d))]
    assert whole.tolist() == expected


def test_what_tiktoken_cannot_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "PIECE", 1 << 30)
    (tmp_path / "a.txt").write_text("a text" + " " * 3_000_000 + "b")
    fails(prepare_data, ["--text", tmp_path / "a.txt", "--data_dir", tmp_path / "x"], "tiktoken .*documents")
    encoding = prepare_data.make_encoding({bytes([i]): i for i in range(256)}, prepare_data.PATTERN)
    with pytest.raises(UserError, match="a text"):
        list(prepare_data.tokenize(["a text" + " " * 3_000_000], encoding, ""))


def test_bad_text(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 100)
    (tmp_path / "utf-16.txt").write_bytes(("some words " * 100).encode("utf-16-le"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "marks.txt").write_text(f"{SEPARATOR}\n{SEPARATOR}\n")
    for name in ("latin.txt", "utf-16.txt", "missing.txt"):
        fails(prepare_data, ["--text", tmp_path / name, "--data_dir", tmp_path / "data"], name)
    for name in ("empty.txt", "marks.txt"):
        fails(prepare_data, ["--text", tmp_path / name, "--data_dir", tmp_path / "data"], "text")
    assert not (tmp_path / "data").exists()


# ------------------------------------------------------------------------------------ vocabularies


def test_a_vocabulary_above_65536_has_ids_of_32_bits(tmp_path):
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes([i // 256, i % 256, 33]): 256 + i for i in range(65_536)}
    encoding = prepare_data.make_encoding(ranks, prepare_data.PATTERN)
    tokens = np.array([encoding.eot_token, 5, 65_535, 65_536, 65_791])
    splits = dict(train=[tokens], val=[tokens[:2]])
    prepare_data.write_tokens(tmp_path / "wide", splits, encoding, source="here")
    data = prepare_data.load_dataset(tmp_path / "wide")
    assert data.meta["dtype"] == "uint32" and data.train.tolist() == tokens.tolist() == [65_792, *tokens[1:]]
    assert data.train.dtype == np.dtype("<u4") and data.tokenizer().n_vocab == 65_793
    assert (prepare_data.token_bytes(data.tokenizer())[data.train] == [0, 1, 3, 3, 3]).all()


@pytest.mark.parametrize("vocab_size", [0, 256, 1_000_001, -1])
def test_sizes_of_vocabularies_that_are_refused(vocab_size, tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 100)
    for dataset in (["--text", tmp_path / "a.txt"], ["shakespeare"]):
        fails(prepare_data, [*dataset, "--vocab_size", vocab_size, "--data_dir", tmp_path / "data"],
              f"--vocab_size.*{vocab_size}")


# ---------------------------------------------------------------------------- the data sets of text


def test_shakespeare(tmp_path, monkeypatch):
    prepare_data.main(["shakespeare", "--data_dir", str(tmp_path)])
    data = prepare_data.load_dataset(tmp_path / "shakespeare")
    assert data.meta["vocab_size"] == 1024 and data.meta["documents"] == 42
    assert "Project Gutenberg" in data.meta["source"] and "Open Shakespeare" in data.meta["source"]
    documents = documents_of(tmp_path / "shakespeare")
    assert sum(map(len, documents)) + 41 * len(f"\n{SEPARATOR}\n") == 5_052_763
    assert any("To be, or not to be" in document for document in documents)
    assert 0.05 < data.meta["val"]["bytes"] / data.meta["train"]["bytes"] < 0.2
    (tmp_path / "damaged.xz").write_bytes(prepare_data.SHAKESPEARE.read_bytes()[:-100])
    for path in (tmp_path / "damaged.xz", tmp_path / "missing.xz"):
        monkeypatch.setattr(prepare_data, "SHAKESPEARE", path)
        fails(prepare_data, ["shakespeare", "--name", "x", "--data_dir", tmp_path], path.name)


def test_the_python_set_is_the_library_and_the_packages(tmp_path, monkeypatch, sources):
    """On a small installation: no twice-counted packages, no file that is not UTF-8, no other files."""
    stdlib, packages = tmp_path / "lib", tmp_path / "venv"
    for folder in (stdlib, stdlib / "site-packages", packages / "torch"):
        folder.mkdir(parents=True)
    for i, path in enumerate(sorted(sources.iterdir())):
        shutil.copy(path, (stdlib if i % 2 else packages / "torch") / path.name)
    (stdlib / "site-packages" / "other.py").write_text("belongs_to_another_environment = 1\n")
    (stdlib / "latin.py").write_bytes("# é\n".encode("latin-1"))
    (stdlib / "empty.py").write_text("")
    (stdlib / ".#lock.py").symlink_to("nowhere")
    os.mkfifo(stdlib / "pipe.py")
    (stdlib / "notes.txt").write_text("not python")
    paths = dict(stdlib=str(stdlib), purelib=str(packages), platlib=str(packages))
    # Others ask the real sysconfig.
    monkeypatch.setattr(prepare_data, "sysconfig", types.SimpleNamespace(get_paths=lambda: paths))
    prepare_data.prepare_python(tmp_path / "data" / "python", vocab_size=400)
    assert set(documents_of(tmp_path / "data" / "python")) == {path.read_text(encoding="utf-8")
                                                             for path in sources.iterdir()}


def test_fineweb_edu_from_a_server(server, tmp_path, data_dir, monkeypatch):
    encoding = prepare_data.load_dataset(data_dir / "small").tokenizer()  # stands in for GPT-2's
    monkeypatch.setattr(prepare_data, "gpt2_encoding", lambda: encoding)
    monkeypatch.setattr(prepare_data, "FINEWEB_EDU", server.url)

    def shard(tokens, count=None):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(tokens) if count is None else count
        return header.tobytes() + np.array(tokens, "<u2").tobytes()

    shards = [[511, 7, 8, 9], [511, 1, 2], [511, 3]]
    for name, tokens in zip(["val_000000", "train_000001", "train_000002"], shards, strict=True):
        server.files[f"edu_fineweb_{name}.bin"] = shard(tokens)
    prepare_data.main(["fineweb_edu", "--shards", "2", "--data_dir", str(tmp_path)])
    data = prepare_data.load_dataset(tmp_path / "fineweb_edu")
    assert data.val.tolist() == shards[0] and data.train.tolist() == shards[1] + shards[2]
    assert data.meta["train"] == dict(tokens=5, bytes=len(encoding.decode_bytes([1, 2, 3])), documents=2)
    for broken in (shard([1, 2], count=3), shard([1, 512]), shard([]), b"<html>"):
        server.files["edu_fineweb_train_000003.bin"] = broken
        fails(prepare_data, ["fineweb_edu", "--shards", 3, "--name", "broken", "--data_dir", tmp_path],
              "edu_fineweb_train_000003.bin")
        assert not [p for p in tmp_path.iterdir() if "broken" in p.name]
        (tmp_path / "downloads" / "edu_fineweb_train_000003.bin").unlink()


# ------------------------------------------------------------------------------------- downloads

BODY = random.Random(0).randbytes(1_280_000)


def fetch(server, tmp_path, **options):
    return prepare_data.download(server.url + "file", tmp_path / "got" / "file", patience=0.01, **options)


def test_a_cut_download_goes_on_where_it_broke(server, tmp_path):
    server.files["file"], server.trouble["file"] = BODY, ["cut", 503, "cut"]
    sha256 = hashlib.sha256(BODY).hexdigest()
    assert fetch(server, tmp_path, size=len(BODY), sha256=sha256).read_bytes() == BODY
    starts = [int(asked[6:-1]) if asked else 0 for _, asked in server.requests]
    assert starts[0] == 0 and 0.4 < starts[1] / len(BODY) <= 0.5 and starts[2] == starts[1]
    assert 0.65 < starts[3] / len(BODY) <= 0.75
    fetch(server, tmp_path, size=len(BODY))  # it is there: asks nobody
    assert len(server.requests) == 4
    with pytest.raises(UserError, match="sha256"):
        fetch(server, tmp_path, sha256="0" * 64)


def test_a_download_goes_on_in_a_later_run(server, tmp_path):
    server.files["file"], server.trouble["file"] = BODY, ["cut", 500, 500, 500, 500]
    with pytest.raises(UserError, match="shakespeare.*no network"):
        fetch(server, tmp_path)
    assert not (tmp_path / "got" / "file").exists()
    server.trouble["file"] = []
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert 0.4 < int(server.requests[-1][1][6:-1]) / len(BODY) <= 0.5


def test_a_server_that_cannot_resume_starts_over(server, tmp_path):
    server.files["file"], server.trouble["file"] = BODY, ["cut", "no range"]
    assert fetch(server, tmp_path).read_bytes() == BODY
    (tmp_path / "got" / "file").unlink()
    server.trouble["file"] = ["cut", "from the start"]  # and one that resumes in the wrong place
    assert fetch(server, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("options, trouble, name", [
    (dict(size=len(BODY) + 1), [], str(len(BODY) + 1)), (dict(sha256="0" * 64), [], "sha256"),
    (dict(md5="0" * 32), [], "md5"), ({}, [404], "404"), ({}, ["long"] * 99, "127.0.0.1"),
    ({}, [503] * 99, "127.0.0.1"), ({}, [416] * 99, "127.0.0.1"), ({}, ["always cut"] * 99, "127.0.0.1"),
    ({}, ["no length"], "file")])
def test_a_bad_download_leaves_nothing_that_looks_good(server, tmp_path, options, trouble, name):
    server.files["file"], server.trouble["file"] = BODY, trouble
    with pytest.raises(UserError, match=name) as error:
        fetch(server, tmp_path, **options)
    assert "\n" not in str(error.value) and not (tmp_path / "got" / "file").exists()


def test_the_hash_that_the_hub_publishes_is_checked(server, tmp_path):
    headers = {"X-Linked-ETag": f'"{"0" * 64}"', "X-Linked-Size": str(len(BODY))}
    server.files["file"], server.headers = BODY, headers
    with pytest.raises(UserError, match="sha256"):
        fetch(server, tmp_path)
    server.headers["X-Linked-ETag"] = f'"{hashlib.sha256(BODY).hexdigest()}"'
    assert fetch(server, tmp_path).read_bytes() == BODY


class Reply:
    """An answer of a server with these headers, for requests.get."""
    reason, history = "", []

    def __init__(self, status_code, headers, body):
        self.status_code, self.headers, self.body = status_code, headers, body

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def iter_content(self, size):
        yield self.body


def test_headers_that_are_no_numbers_are_an_error_of_the_download(tmp_path, monkeypatch):
    for headers in ({"Content-Length": "many"}, {"Content-Length": "5", "X-Linked-Size": "0x5"}):
        monkeypatch.setattr(prepare_data.requests, "get", lambda *a, h=headers, **o: Reply(200, h, b"12345"))
        with pytest.raises(UserError, match="example.org"):
            prepare_data.download("http://example.org/file", tmp_path / "file", patience=0)
        assert not (tmp_path / "file").exists()


def test_the_end_of_a_resumed_download_is_that_of_the_whole_file(tmp_path, monkeypatch):
    """A server may send a part of what is left; Content-Range says how long the file is."""
    (tmp_path / "file.part").write_bytes(BODY[:1000])
    asked = []

    def get(url, headers, **options):
        start = int(headers["Range"][6:-1])
        asked.append(start)
        body = BODY[start:start + 3000]
        content_range = f"bytes {start}-{start + len(body) - 1}/10000"
        return Reply(206, {"Content-Range": content_range, "Content-Length": str(len(body))}, body)

    monkeypatch.setattr(prepare_data.requests, "get", get)
    path = prepare_data.download("http://example.org/file", tmp_path / "file", patience=0)
    assert asked == [1000, 4000, 7000] and path.read_bytes() == BODY[:10000]


def test_without_a_network_it_says_what_works(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="shakespeare, python and digits"):
        fetch(server, tmp_path)


# --------------------------------------------------------------------------------- damaged data sets


def change_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


@pytest.mark.parametrize("damage, name", [
    (lambda f: (f / "val.bin").unlink(), "val.bin"),
    (lambda f: (f / "meta.json").unlink(), "meta.json"),
    (lambda f: os.truncate(f / "train.bin", 1001), "train.bin"),
    (lambda f: os.truncate(f / "train.bin", 0), "train.bin"),
    (lambda f: (f / "val.bin").write_bytes(bytes((f / "val.bin").stat().st_size)), "val.bin"),
    (lambda f: (f / "tokenizer.tiktoken").open("ab").write(b"x"), "tokenizer.tiktoken"),
    (lambda f: change_meta(f, vocab_size=400), "vocab_size"),
    (lambda f: change_meta(f, kind="image"), "meta.json.*decoder"),
    (lambda f: (f / "meta.json").write_text("{"), "meta.json"),
    (lambda f: (f / "meta.json").write_text("[" * 100_000), "meta.json"),
    (lambda f: (f / "meta.json").write_bytes(b"\xff"), "meta.json"),
    (lambda f: (f / "meta.json").write_text('{"format": 2}'), "meta.json.*kind"),
    (lambda f: (f / "meta.json").write_text('{"format": 99}'), "format is 99"),
    (lambda f: change_meta(f, format=1), "format is 1")])
def test_damaged_data_sets(damage, name, data_dir, tmp_path):
    shutil.copytree(data_dir / "small", tmp_path / "small")
    prepare_data.load_dataset(tmp_path / "small")  # so that it was found good before
    damage(tmp_path / "small")
    with pytest.raises(UserError, match=name) as error:
        prepare_data.load_dataset(tmp_path / "small")
    assert "\n" not in str(error.value)


def fields(value, name=""):
    """(names of the way to it, value) of every field of nested dicts."""
    for key, part in value.items() if isinstance(value, dict) else ():
        yield [*name, key], part
        yield from fields(part, [*name, key])


def test_every_field_of_meta_is_checked(data_dir, tmp_path):
    """Each field in turn is taken away, or has a value of another kind: one line that names it."""
    whole = json.loads((data_dir / "small" / "meta.json").read_text())
    free = {"source", "documents", "dropped", "marks_in_text", "empty", "duplicate"}
    tried = 0
    for way, value in list(fields(whole)):
        if set(way) & free or way[-1] == "documents":
            continue
        for other in ("gone", None, -1, 1.5, float("nan"), [], {}, [1], "x", 10 ** 30, True, [[]]):
            if type(other) is type(value) and isinstance(value, str) and way[0] == "tokenizer":
                continue  # a name or a pattern may be any text
            meta = json.loads(json.dumps(whole))
            place = meta
            for key in way[:-1]:
                place = place[key]
            place[way[-1]] = other
            if other == "gone":
                del place[way[-1]]
            (tmp_path / "meta.json").write_text(json.dumps(meta))
            with pytest.raises(ValueError) as error:
                prepare_data.read_meta(tmp_path / "meta.json")
            assert way[0] in str(error.value) and "\n" not in str(error.value)
            tried += 1
    assert tried > 150


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", ".checked.json", "a\0b"])
def test_files_have_plain_names(name, data_dir, tmp_path):
    shutil.copytree(data_dir / "small", tmp_path / "small")
    meta = json.loads((tmp_path / "small" / "meta.json").read_text())
    change_meta(tmp_path / "small", files={**meta["files"], name: dict(size=1, sha256="0" * 64)})
    with pytest.raises(UserError, match="meta.json.*files"):
        prepare_data.load_dataset(tmp_path / "small")


@pytest.mark.parametrize("name", ["meta.json", "train.bin", "tokenizer.tiktoken", ".checked.json"])
def test_a_pipe_is_never_opened(name, data_dir, tmp_path):
    shutil.copytree(data_dir / "small", tmp_path / "small")
    (tmp_path / "small" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "small" / name)
    if name == ".checked.json":  # of no use, but no harm either
        prepare_data.load_dataset(tmp_path / "small")
    else:
        with pytest.raises(UserError, match=name):
            prepare_data.load_dataset(tmp_path / "small")


def replace_tokenizer(folder, content):
    """Another tokenizer.tiktoken, whose size and hash meta.json has."""
    (folder / "tokenizer.tiktoken").write_bytes(content)
    files = json.loads((folder / "meta.json").read_text())["files"]
    files["tokenizer.tiktoken"] = dict(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    change_meta(folder, files=files)


def test_tokenizers_that_are_none(data_dir, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(data_dir / "small", folder)
    lines = (folder / "tokenizer.tiktoken").read_bytes().splitlines(keepends=True)
    for content in (b"", b"\n".join([b"x"] * 9), b"".join(lines[:-1]), b"".join(lines[1:] + lines[:1]),
                    b"".join([*lines[:-1], b"YQ== 510\n"]), b"".join([*lines[:-1], b"!!!! 510\n"]),
                    b"".join([*lines[:-1], b"YWFh -1\n"]), b"YWFhYQ== 0\n" + b"".join(lines[1:])):
        replace_tokenizer(folder, content)
        data = prepare_data.load_dataset(folder)
        with pytest.raises(UserError, match="tokenizer.tiktoken"):
            data.tokenizer()
    replace_tokenizer(folder, b"".join(lines))
    change_meta(folder, tokenizer=dict(name="bpe", pattern="("))
    with pytest.raises(UserError, match="pattern of .*tokenizer.tiktoken"):
        prepare_data.load_dataset(folder).tokenizer()


def test_a_tokenizer_works_in_any_folder(data_dir, tmp_path):
    data = prepare_data.load_dataset(data_dir / "small")
    assert prepare_data.decoder_files(data.meta) == ["tokenizer.tiktoken"]
    shutil.copy(data_dir / "small" / "tokenizer.tiktoken", tmp_path)
    copy = prepare_data.load_tokenizer(tmp_path, data.meta)
    assert copy.encode("def f(x):") == data.tokenizer().encode("def f(x):")
    (tmp_path / "tokenizer.tiktoken").open("ab").write(b"\n")
    with pytest.raises(UserError, match="tokenizer.tiktoken"):
        prepare_data.load_tokenizer(tmp_path, data.meta)


def test_a_file_is_hashed_once_and_again_when_it_changes(data_dir, tmp_path, monkeypatch):
    folder, hashed = tmp_path / "small", []
    shutil.copytree(data_dir / "small", folder, ignore=shutil.ignore_patterns(".checked.json"))
    hash_of = prepare_data.hash_of
    monkeypatch.setattr(prepare_data, "hash_of", lambda path: hashed.append(path.name) or hash_of(path))

    def hashes(**options):
        hashed.clear()
        prepare_data.load_dataset(folder, **options)
        return sorted(set(hashed) - {"meta.json"})

    assert hashes(check=False) == [] and not (folder / ".checked.json").exists()
    assert hashes() == ["tokenizer.tiktoken", "train.bin", "val.bin"]
    assert hashes() == []
    os.utime(folder / "val.bin")
    assert hashes() == ["val.bin"] and hashes() == []
    (folder / ".checked.json").write_text("[1")
    assert len(hashes()) == 3
    stat = (folder / "train.bin").stat()  # the same size, and the time of before
    with open(folder / "train.bin", "r+b") as file:
        file.write(b"\0\0")
    os.utime(folder / "train.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(UserError, match="train.bin"):
            prepare_data.load_dataset(folder)


def test_what_decides_the_meaning_of_a_token_is_part_of_the_identity(data_dir):
    data = prepare_data.load_dataset(data_dir / "small")
    identity = data.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert not any(isinstance(value, dict) for value in identity.values())
    tokenizer = data.meta["tokenizer"]
    for change in (dict(tokenizer={**tokenizer, "pattern": "x"}), dict(tokenizer={**tokenizer, "name": "x"}),
                   dict(vocab_size=513), dict(dtype="uint32")):
        other = prepare_data.Dataset(data.folder, {**data.meta, **change}, data.train, data.val).identity()
        assert len([key for key in identity if identity[key] != other[key]]) == 1


# --------------------------------------------------------------------------------- files and folders


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    for name in ("x.tmp", "x.png", ".x.png", "x"):
        (tmp_path / name).write_bytes(b"of somebody")
    write_file(tmp_path / "x.png", lambda file: file.write(b"new"))
    write_file(tmp_path / "y.tmp", lambda file: file.write(b"new"))
    (tmp_path / "link").symlink_to(tmp_path / "x")
    write_file(tmp_path / "link", lambda file: file.write(b"new"))

    def broken(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "x.png", broken)
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert content == {**dict.fromkeys(["x.tmp", "x", ".x.png"], b"of somebody"),
                       **dict.fromkeys(["x.png", "y.tmp", "link"], b"new")}


def test_a_full_disk_is_named_with_the_file(tmp_path):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_for_torch(file):
        class Full(io.BytesIO):
            def write(self, content):
                full(self)
        torch.save(dict(weight=torch.zeros(10)), Full())

    for write in (full, full_for_torch):
        with pytest.raises(OSError, match="No space left.*x.bin"):
            write_file(tmp_path / "x.bin", write)
    with pytest.raises(OSError, match="No space left.*new"):
        with prepare_data.new_folder(tmp_path / "new") as folder:
            full(folder)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_a_data_set_is_made(sources, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10,) * 2)"
    result = run_script("prepare_data.py", "--text", *sources.iterdir(), "--vocab_size", 300,
                        "--data_dir", tmp_path / "data", before=limit)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "File too large" in result.stderr and str(tmp_path / "data" / "text") in result.stderr
    assert not list((tmp_path / "data").iterdir())


def test_a_data_set_is_never_overwritten(data_dir, sources, tmp_path):
    before = (data_dir / "small" / "meta.json").read_bytes()
    text = next(sources.iterdir())
    fails(prepare_data, ["--text", text, "--name", "small", "--data_dir", data_dir], "small")
    with pytest.raises(UserError, match="new"):
        with prepare_data.new_folder(tmp_path / "new"):
            (tmp_path / "new" / "of the other").mkdir(parents=True)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (data_dir / "small" / "meta.json").read_bytes() == before


def test_what_a_killed_preparation_leaves_is_removed_by_the_next(tmp_path):
    code = ("import os, sys, pathlib, prepare_data\n"
            "with prepare_data.new_folder(pathlib.Path(sys.argv[1])) as folder:\n"
            "    (folder / 'train.bin').write_bytes(b'half')\n"
            "    print(folder.name, flush=True)\n"
            "    sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "name")], cwd=HERE, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    left = tmp_path / process.stdout.readline().strip()
    (tmp_path / ".name.of.mine").mkdir()
    with prepare_data.new_folder(tmp_path / "name"):
        assert left.exists()  # the other one works in it
    process.kill()
    process.communicate()
    shutil.rmtree(tmp_path / "name")
    with prepare_data.new_folder(tmp_path / "name"):
        assert not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".name.of.mine", "name"]


# ------------------------------------------------------------------------------------ command line


def test_bad_flags(tmp_path):
    for flags, name in [
            ([], "shakespeare"), (["wikipedia"], "wikipedia"), (["python", "--text", "x"], "--text"),
            (["--images", "x", "--codes", "x"], "--codes"), (["python", "--name", "../x"], "--name .*'../x'"),
            (["python", "--name", ""], "--name"), (["fineweb_edu", "--shards", 0], "--shards"),
            (["cifar10", "--codebook_size", 1], "--codebook_size"),
            (["digits", "--image_size", 64], "--image_size.*digits"),
            (["digits", "--codebook_size", 512], "--codebook_size.*digits"),
            (["shakespeare", "--shards", 2], "--shards.*shakespeare"),
            (["fineweb_edu", "--vocab_size", 32768], "--vocab_size.*fineweb_edu")]:
        fails(prepare_data, [*flags, "--data_dir", tmp_path / "data"], name)
        assert not (tmp_path / "data").exists()


def test_text_needs_neither_torch_nor_pillow():
    code = "import prepare_data, sys; print([m for m in ('PIL', 'torch', 'image_data') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_encoding_of_the_output(encoding, tmp_path):
    (tmp_path / "日本.txt").write_text("some words × · and more\n" * 100, encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for arguments in (["--text", tmp_path / "日本.txt", "--vocab_size", 300, "--data_dir", tmp_path / "data"],
                      ["--help"], ["--text", "日本", "nowhere"]):
        result = run_script("prepare_data.py", *arguments, env=environment, encoding=encoding)
        assert result.returncode == (2 if "nowhere" in arguments else 0), result.stderr
        assert result.returncode == 0 or result.stderr.count("\n") == 1


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, "interrupted"), (MemoryError(), 2, "memory; buy more"),
    (RuntimeError("CUDA out of memory"), 2, "memory; buy more"), (OSError("a\nb"), 2, "a b"),
    (UserError("x.txt is bad"), 2, "x.txt is bad")])
def test_errors_end_a_script_with_one_line(error, code, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main, "buy more")
    output = capsys.readouterr().err
    assert stop.value.code == code and words in output and output.count("\n") == 1


@pytest.mark.parametrize("script", ["prepare_data.py", "train_gpt.py", "train_image.py"])
def test_ctrl_c_while_modules_load(script):
    """The first module that the script imports after its guard sends the signal."""
    before = ("import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
              "class Finder:\n"
              "    def find_spec(self, name, *_):\n"
              "        if name == 'numpy': os.kill(os.getpid(), signal.SIGINT)\n"
              "sys.meta_path.insert(0, Finder())")
    result = run_script(script, before=before)
    assert result.returncode == 130 and not result.stderr


def test_a_file_where_a_folder_should_be(sources, tmp_path):
    (tmp_path / "file").write_text("mine")
    for data_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        text = next(sources.iterdir())
        fails(prepare_data, ["--text", text, "--data_dir", data_dir], f"{data_dir} .*--data_dir")
    fails(prepare_data, ["shakespeare", "--name=--"], "--name")


def test_ctrl_c_that_rust_drops(monkeypatch):
    """rustbpe logs by Python's logging, and ignores what is raised there, an interrupt too."""
    class Tokenizer:
        def train_from_iterator(self, texts, vocab_size, pattern):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

        def get_mergeable_ranks(self):
            return [(bytes([i]), i) for i in range(256)]

    monkeypatch.setattr(prepare_data.rustbpe, "Tokenizer", Tokenizer)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare_data.train_tokenizer(["x"], 300)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_data_set_is_made(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i * i * 7919 % 10_007} {i}\n" for i in range(2_000_000)))
    process = subprocess.Popen(
        [sys.executable, str(HERE / "prepare_data.py"), "--text", str(tmp_path / "a.txt"), "--data_dir",
         str(tmp_path / "data"), "--vocab_size", "30000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # pytest may be started without it
    assert any(re.search("learning", line) for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr == "interrupted\n"
    assert not list(tmp_path.glob("data/*"))


def test_a_data_set_is_made_without_stderr(tmp_path):
    (tmp_path / "a.txt").write_text(f"\n{SEPARATOR}\n".join(TEXTS))
    command = [sys.executable, HERE / "prepare_data.py", "--text", tmp_path / "a.txt", "--vocab_size", "300",
               "--data_dir", tmp_path]
    assert subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command]).returncode == 0
    assert (tmp_path / "text" / "meta.json").exists()
