"""experiments.py: the charts, and what the measurements refuse."""
import re

import pytest
import torch
from conftest import command, fails
from PIL import Image

import experiments
import train_gpt
from prepare_data import UserError


def test_overhead_refuses_what_it_cannot_measure():
    for flags, name in [(["--tokens", 1000], "--seq_len 2048"), (["--rounds", 0], "--rounds"),
                        (["--variants"], "--variants")]:
        fails(experiments, ["overhead", *flags], name)
    with pytest.raises(UserError, match="move-x"):
        experiments.Variant("move-x", None, 64)
    if not torch.cuda.is_available():
        fails(experiments, ["overhead"], "CUDA")


def test_the_overhead_chart_has_a_bar_a_variant(tmp_path):
    rows = [("standard", 0, 0, 0), ("move-x1", 0.02, 0.01, 0.03)]
    experiments.draw_overhead(rows, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart:
        colors = chart.convert("RGB").getcolors(1 << 20)
    assert max(count for count, color in colors if color == (0x33, 0x66, 0xCC)) > 1000


def test_words_and_curves_of_a_run(data_dir, tmp_path, capsys):
    out_dir = tmp_path / "run"
    train_gpt.main(command(data_dir, out_dir, "--max_steps", 2, "--eval_every", 1))
    capsys.readouterr()
    experiments.main(["words", str(out_dir), "--seeds", "2", "--words", "20"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(re.search(r"\d+ words, \d", line) for line in lines)
    experiments.main(["curves", str(out_dir), str(out_dir), "--out", str(tmp_path / "both.png")])
    with Image.open(tmp_path / "both.png") as chart:
        assert chart.width > 500
    fails(experiments, ["words", tmp_path], "checkpoint.pt")
    fails(experiments, ["curves", tmp_path / "nothing"], "nothing")


def test_copied_text_is_found():
    assert experiments.copied("abcdefgh", "xxcdefyy", 4) == "cdef"
    assert experiments.copied("abcdefgh", "xxcdefyy", 5) is None
    assert experiments.copied("abc", "abc", 4) is None
