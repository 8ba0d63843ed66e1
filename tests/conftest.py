"""What several test files share: data sets made as a user makes them, short commands, a local server."""
import contextlib
import http.server
import importlib.metadata
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # models this small gain nothing from a second thread

import pytest  # noqa: E402
import torch  # noqa: E402


def release(package):
    """(major, minor) of an installed package."""
    return tuple(int(number) for number in importlib.metadata.version(package).split(".")[:2])


NEEDS_OLDER_NUMPY = False  # whether Triton's interpreter does
with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    NEEDS_OLDER_NUMPY = release("triton") < (3, 7) and release("numpy") >= (2, 4)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before Triton is imported: the kernels run as Python
    if NEEDS_OLDER_NUMPY:
        pytest.exit("Triton's interpreter needs an older NumPy: pip install 'numpy<2.4'", returncode=2)

import prepare_data  # noqa: E402
from script import run  # noqa: E402

HERE = Path(__file__).resolve().parent.parent
TINY = ("--device cpu --dtype float32 --depth 2 --seq_len 32 --micro_batch 4 --batch_tokens 256 "
        "--eval_tokens 2048 --log_every 3").split()


def command(data_dir, out_dir, *flags):
    """Arguments of train_gpt.py for a run of seconds on the data set `small`."""
    return ["--dataset", "small", "--data_dir", str(data_dir), "--out_dir", str(out_dir), *TINY,
            *map(str, flags)]


def log_of(out_dir, key):
    """{step: value} of one key of a run's log. A step must not appear twice."""
    records = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if key in record]
    assert len(steps) == len(set(steps))
    return {record["step"]: record[key] for record in records if key in record}


def fails(script, arguments, name):
    """The command ends with exit code 2 and one line on stderr that names what is at fault (a regex)."""
    lines = []

    def capture(text, **options):
        if options.get("file") is sys.stderr:
            lines.append(str(text))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("builtins.print", capture)
        run(lambda: script.main(list(map(str, arguments))))
    assert stop.value.code == 2 and len(lines) == 1 and "\n" not in lines[0], lines
    assert re.search(name, lines[0]), lines[0]


@pytest.fixture(autouse=True)
def precision():
    """A script sets how exact products in float32 are, for the whole process; other tests compare them."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Some 700 kB of real Python, as files."""
    folder = tmp_path_factory.mktemp("sources")
    stdlib = Path(os.__file__).parent
    names = ["argparse.py", "ast.py", "copy.py", "csv.py", "heapq.py", "inspect.py", "json/decoder.py",
             "os.py", "pydoc.py", "random.py", "shutil.py", "statistics.py", "tarfile.py", "textwrap.py",
             "threading.py", "typing.py", "zipfile.py"]
    for path in (stdlib / name for name in names):
        if path.exists():  # zipfile is a folder in some versions
            shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture(scope="session")
def data_dir(sources, tmp_path_factory):
    """data/small: a data set of those files, made as a user would."""
    folder = tmp_path_factory.mktemp("data")
    prepare_data.main(["--text", *map(str, sorted(sources.iterdir())), "--name", "small",
                       "--vocab_size", "512", "--data_dir", str(folder)])
    return folder


class Server(http.server.ThreadingHTTPServer):
    """A server on loopback. files: path → bytes; trouble: path → what to do wrong, one entry a request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.trouble, self.requests, self.headers = {}, {}, [], {}
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # the client hung up, as some of the tests want it to


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name, asked = self.path.lstrip("/"), self.headers.get("Range")
        self.server.requests.append((name, asked))
        trouble = self.server.trouble.get(name) or [None]
        trouble = trouble.pop(0)
        if name not in self.server.files or isinstance(trouble, int):
            return self.send_error(trouble or 404)
        body = self.server.files[name]
        start = int(asked[6:-1]) if asked and trouble not in ("no range", "always cut") else 0
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            first = 0 if trouble == "from the start" else start
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if trouble != "no length":
            extra = 1000 if trouble == "long" else 0
            self.send_header("Content-Length", str(len(body) - start + extra))
        for key, value in self.server.headers.items():
            self.send_header(key, value)
        self.end_headers()
        body = body[:len(body) - start] if trouble == "from the start" else body[start:]
        self.wfile.write(body[:len(body) // 2] if trouble in ("cut", "always cut") else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def pytest_terminal_summary(terminalreporter):
    """Prints what tests recorded, from all processes."""
    for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")
