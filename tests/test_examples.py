"""The README and docs/ say what is there: the diff makes the example, and files, links and flags exist."""
import contextlib
import importlib
import io
import re
import runpy
from pathlib import Path

import pytest
import torch

import move

HERE = Path(__file__).resolve().parent.parent
PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
OTHER_PROGRAMS_FLAGS = {"--nproc_per_node"}  # torchrun's


def example(name):
    return runpy.run_path(str(HERE / "examples" / name))


# ------------------------------------------------------------------------------------------ the example


def apply_diff(diff, text):
    """A unified diff, applied where its hunks say; what they take away and keep must stand there."""
    lines, shift = text.splitlines(keepends=True), 0
    for start, hunk in re.findall(r"^@@ -(\d+).*\n((?:[ +-].*\n|\n)+)", diff, flags=re.M):
        parts = [(line[0], line[1:] or line) for line in hunk.splitlines(keepends=True)]
        old, new = ([line for mark, line in parts if mark != left_out] for left_out in "+-")
        at = int(start) - 1 + shift
        assert lines[at:at + len(old)] == old
        lines[at:at + len(old)] = new
        shift += len(new) - len(old)
    return "".join(lines)


def test_the_diff_of_the_readme_makes_the_example():
    (diff,) = re.findall(r"^```diff\n(.*?)^```", README, flags=re.M | re.S)
    before, after = re.match(r"--- (\S+)\n\+\+\+ (\S+)\n", diff).groups()
    assert apply_diff(diff, (HERE / before).read_text()) == (HERE / after).read_text()


@pytest.mark.parametrize("name", ["attention.py", "attention_move.py"])
def test_an_example_learns(name):
    torch.manual_seed(0)
    code = example(name)
    model = code["Model"]()
    optimizer = code["make_optimizer"](model)
    tokens = torch.randint(1000, (4, 33))
    losses = [code["train_step"](model, optimizer, tokens[:, :-1], tokens[:, 1:]) for _ in range(10)]
    assert losses[-1] < losses[0] - 0.5, losses


def test_the_optimizer_of_the_example_has_each_parameter_once():
    code = example("attention_move.py")
    model = code["Model"]()
    optimizer = code["make_optimizer"](model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(model.parameters()))
    (bank,) = (group for group in optimizer.param_groups if model.bank.weight in set(group["params"]))
    assert bank["weight_decay"] == 0 and bank["lr"] > optimizer.param_groups[0]["lr"]


def test_only_rows_of_ids_in_the_batch_get_a_gradient():
    torch.manual_seed(0)
    code = example("attention_move.py")
    model, idx = code["Model"](), torch.randint(1000, (2, 16))
    model(idx).square().sum().backward()
    rows = model.bank.weight.grad.flatten(1).any(1)
    assert set(rows.nonzero().flatten().tolist()) == set(idx.flatten().tolist())


def test_at_the_start_the_example_has_the_values_and_all_slots():
    torch.manual_seed(0)
    model, x = example("attention_move.py")["Model"](), torch.randn(1, 5, 64)
    idx = torch.randint(1000, (1, 5))
    layer, v, memory = model.layers[0], torch.randn(1, 5, 2, 8), model.bank(idx)
    assert isinstance(layer.mixer, move.ValueMixer)
    expected = v + memory.sum(2).unflatten(-1, (2, 8))
    torch.testing.assert_close(layer.mixer(x, v, memory), expected)


def test_the_example_by_the_kernels():
    move_fast = pytest.importorskip("move_fast", reason="needs Triton")
    code, device = example("attention_move.py"), "cuda" if torch.cuda.is_available() else "cpu"
    tokens, losses = torch.randint(1000, (2, 9), device=device), []
    for kernels in (False, True):
        torch.manual_seed(0)
        model = code["Model"]().to(device)
        assert not kernels or move_fast.accelerate(model)
        optimizer = code["make_optimizer"](model)
        losses.append([code["train_step"](model, optimizer, tokens[:, :-1], tokens[:, 1:]) for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[0][2] < losses[0][0]


# ------------------------------------------------------------------------------------------ the pages


def test_size_of_the_readme():
    assert len(README.splitlines()) <= 200
    assert len(re.findall(r"!\[|<img", README)) <= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_fit_on_a_screen(page):
    for line in page.read_text(encoding="utf-8").splitlines():
        long_by_nature = line.startswith("|") or "://" in line or "![" in line
        assert len(line) <= 110 or long_by_nature, line


def anchors(page):
    """The names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        target = "".join(target)
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        path = page.parent / path if path else page
        assert path.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(path), target


def flags_of(script, *command):
    """The flags in the --help of a script, or of a command of it."""
    help = io.StringIO()
    with contextlib.redirect_stdout(help), pytest.raises(SystemExit):
        importlib.import_module(script).main([*command, "--help"])
    return set(re.findall(r"--[a-z]\w*(?:-[a-z]\w*)*", help.getvalue()))


@pytest.fixture(scope="module")
def flags():
    """Script → its flags."""
    found = {name: flags_of(name) for name in ("train_gpt", "train_image", "prepare_data")}
    commands = ("parity scaling gates gradient_highway ablation gate_init mla keys rates recipe curves words "
                "digits overhead decode store")
    found["experiments"] = set().union(*(flags_of("experiments", name) for name in commands.split()))
    return found


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-[a-z]\w*)*", text)) - OTHER_PROGRAMS_FLAGS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page, flags):
    text = page.read_text(encoding="utf-8")
    assert flags_in(text) <= set().union(*flags.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_of_scripts_that_have_their_flags(page, flags):
    for script, arguments in re.findall(r"(\w+)\.py\b([^\n`#&|]*)", page.read_text(encoding="utf-8")):
        if script in flags:
            assert flags_in(arguments) <= flags[script], f"{script}.py {arguments}"


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", README):
        assert (HERE / name).exists(), name


def test_the_drawing_is_what_its_script_draws():
    drawn = runpy.run_path(str(HERE / "docs" / "draw_move.py"))["draw"]()
    assert (HERE / "docs" / "move.svg").read_text(encoding="utf-8") == drawn
