"""MoVE in nanoGPT (github.com/karpathy/nanoGPT, commit 3adf61e): what to change in its model.py and train.py.

    python examples/nanogpt_move.py path/to/nanoGPT     makes the changes; git diff, there, shows them

Each change is a pair: what stands in the file, once, and what takes its place. move.py is copied beside them.
"""
import shutil
import sys
from pathlib import Path

CHANGES = {"model.py": [
    ("import torch\n", "import torch\nfrom move import ValueBank, ValueMixer, memory_parameter_groups\n"),

    # attention: V_S in place of V. The router adds nothing to the random numbers of the start.
    ("        self.attn_dropout =",
     "        self.mixer = ValueMixer(config.n_embd, config.n_head, config.n_slots)\n"
     "        self.attn_dropout ="),
    ("def forward(self, x):\n        B, T, C", "def forward(self, x, memory):\n        B, T, C"),
    ("v = v.view(B, T, self.n_head, C // self.n_head)",
     "v = self.mixer(x, v.view(B, T, self.n_head, C // self.n_head), memory)"),
    ("def forward(self, x):\n        x = x + self.attn(self.ln_1(x))",
     "def forward(self, x, memory):\n        x = x + self.attn(self.ln_1(x), memory)"),

    # the model: one bank for all layers. type(), and not isinstance(): routers, which are of a subclass of
    # nn.Linear, keep their zeros, so that all gates start at 1.
    ("    n_embd: int = 768\n", "    n_embd: int = 768\n    n_slots: int = 4\n"),
    ("        # report number of parameters",
     "        self.bank = ValueBank(config.vocab_size, config.n_slots, config.n_embd)\n"
     "        # report number of parameters"),
    ("if isinstance(module, nn.Linear)", "if type(module) is nn.Linear"),
    ("x = self.transformer.drop(", "memory = self.bank(idx)\n        x = self.transformer.drop("),
    ("x = block(x)", "x = block(x, memory)"),
    ("n_params -= self.transformer.wpe.weight.numel()",  # no product reads the bank: it costs no FLOPs
     "n_params -= self.transformer.wpe.weight.numel() + self.bank.weight.numel()"),

    # the optimizer: the memory has groups of its own, without weight decay. `scale` is a group's rate over
    # that of the others, since the loop of train.py sets one rate for all.
    ("        # create optim groups.",
     "        memory = memory_parameter_groups(self)\n"
     "        taken = {p for group in memory for p in group['params']}\n"
     "        param_dict = {pn: p for pn, p in param_dict.items() if p not in taken}\n"
     "        # create optim groups."),
    ("optim_groups, lr=", "optim_groups + memory, lr="),
    ("        return optimizer\n",
     "        for group in optimizer.param_groups:\n"
     "            group['scale'] = group['lr'] / learning_rate\n"
     "        return optimizer\n"),
], "train.py": [
    ("param_group['lr'] = lr\n", "param_group['lr'] = lr * param_group['scale']\n"),
]}


def apply(changes, text):
    for old, new in changes:
        if text.count(old) != 1:
            raise ValueError(f"this is another nanoGPT: {text.count(old)} times {old!r}, and not once")
        text = text.replace(old, new)
    return text


if __name__ == "__main__":
    try:
        folder = Path(*sys.argv[1:2])
        changed = {name: apply(changes, (folder / name).read_text()) for name, changes in CHANGES.items()}
        for name, text in changed.items():
            (folder / name).write_text(text)
        shutil.copy(Path(__file__).resolve().parent.parent / "move.py", folder)
    except (OSError, ValueError) as error:
        print(f"error: {error}; give the folder of nanoGPT at that commit", file=sys.stderr)
        sys.exit(2)
