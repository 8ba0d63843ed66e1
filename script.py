"""What all scripts have in common: errors of one line, files that are whole, and checks of what is read."""
import argparse
import contextlib
import os
import re
import secrets
import signal
import sys
import threading
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(Exception):
    """An error that the user can fix: one line that says what was wrong, what was expected, what to do."""


@contextlib.contextmanager
def memory_advice(advice):
    """Turns running out of memory into a UserError that ends with advice(), a text."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        said = str(error).lower()  # the CPU, CUDA's libraries and MPS have no exception of their own for it
        if not isinstance(error, MemoryError) and not any(
                words in said for words in ("out of memory", "allocate memory", "alloc_failed", "bad_alloc")):
            raise
        raise UserError(f"out of memory; {advice()}") from None


class ArgumentParser(argparse.ArgumentParser):
    """argparse, whose complaints are one line too."""

    def parse_args(self, *args):
        result = super().parse_args(*args)
        for name, value in vars(result).items():
            if value == []:  # what Python before 3.13 makes of --name=--
                self.error(f"--{name} has no value")
        return result

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def run(main, advice="close other programs"):
    """Runs a script: errors of the user or of the machine end it with one line and exit code 2, Ctrl-C and
    SIGTERM with exit code 130. advice: what to do if memory runs out, where main does not know better."""
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGTERM as Ctrl-C: temporary files are removed
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed; but progress bars write there
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without "×" shows "?"
    code = 0
    try:
        with memory_advice(lambda: advice):
            main()
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        code = 130
    if "TORCHELASTIC_RUN_ID" in os.environ:  # one of torchrun's, which Gloo's threads may abort at its end
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


@contextlib.contextmanager
def interrupts_kept(at_once):
    """Ctrl-C and SIGTERM in a block of code that Python's exceptions do not pass well.

    at_once: the block ends at once, and at its end the exception is raised again: Rust code may have dropped
    it, whose log calls Python's and ignores what is raised there. Not at_once: the signals come after the
    block, since an exception in the middle of torch.save can abort the program.
    """
    seen, old = [], {}

    def handler(number, frame):
        seen.append(number)
        if at_once:
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # handlers can be set there only
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if before is signal.default_int_handler or (callable(before) and not at_once):
                old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)
    for number in seen:
        signal.raise_signal(number)


def first_line(error):
    """The first line of its message that says something, or its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def lock(file, message=None):
    """Locks an open file, or its number, until it is closed, however the process ends. If another process has
    locked it: UserError with the message, or without one a wait for it. Where Windows and some file systems
    have no locks, nothing is kept."""
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if message else 0))
        except BlockingIOError:
            raise UserError(message) from None
        except OSError:
            pass


def write_file(path, write):
    """write(file) to a fresh name in the same folder, then renames: the file is always whole, the old one
    or the new. OSError names the file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    try:
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        # torch.save hides that the disk is full behind an error of its own.
        cause = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None or cause.errno is None:
            raise
        raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from error


def make_folder(folder, flag):
    """Makes a folder and those above it. UserError if a file is in the way, or if its name is not UTF-8,
    which torch.load cannot read; flag: which one names another."""
    require_utf8(folder, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} cannot be a folder, a file is in the way; give another {flag}") from None


def require_utf8(text, flag):
    """UserError if a text or path of the command line is not UTF-8."""
    try:
        str(text).encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(text)!r} is not UTF-8; give another {flag}") from None


def check_form(value, form, name):
    """ValueError, with the name of the field, unless the value has the form: a range of whole numbers, a
    tuple of choices, a pattern of a text, a type, a list of values of one form, or a dict, whose keys are
    names or one pattern that all names match."""
    def wrong(expected):
        text = repr(value)
        return ValueError(f"{name} is {text[:60]}{'…' * (len(text) > 60)}, expected {expected}")

    if isinstance(form, dict):
        if type(value) is not dict:
            raise wrong("names and values")
        for key, part in form.items():
            for each in [key] if isinstance(key, str) else value:
                if each not in value:
                    raise ValueError(f"{name + '.' if name else ''}{each} is missing")
                if each is not key and not key.fullmatch(each):
                    raise ValueError(f"{name} has {each!r}, which is no plain name of a file")
                check_form(value[each], part, f"{name}.{each}".lstrip("."))
    elif isinstance(form, list):
        if type(value) is not list or not value:
            raise wrong("a list")
        for each in value:
            check_form(each, form[0], name)
    elif isinstance(form, range):
        if type(value) is not int or value not in form:
            raise wrong(f"{form[0]} to {form[-1]}" if len(form) > 1 else form[0])
    elif isinstance(form, tuple):
        if value not in form:
            raise wrong(f"one of {form}")
    elif isinstance(form, re.Pattern):
        if type(value) is not str or not form.fullmatch(value):
            raise wrong(form.pattern)
    elif not isinstance(value, form):
        raise wrong(f"a {form.__name__}")
