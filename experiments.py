"""The paper's experiments, and a few more, as commands that anyone can run.

    python experiments.py scaling --quick       two CPU cores, minutes: the same code at a smaller size
    python experiments.py scaling               all GPUs of the machine, a run on each
    python experiments.py scaling --dataset english --depth 8 --seeds 3 --steps 600

    parity            bits per byte of no memory, LaVE and MoVE against steps and seconds
    scaling           against the size of the memory, at several depths
    gates             do the gates of a word depend on its sense? --text: a page that shows them
    gradient_highway  the gradient that reaches a row, layer by layer; a bank that one layer trains
    ablation          one bank or a table a layer, with or without the gate on the ordinary value
    gate_init         gates that start open to the memory, to the context, or neutral
    mla               the memory in the latent: bits per byte, bytes of the cache
    keys              rows found by a hash of the last two ids instead of the last one
    late              a memory for a model that is trained already
    rates             do the rates of the bank and of the routers suit each number of slots?
    recipe            optimizers and start of the memory, one change at a time; the rates of all else

Each trains with train_gpt.py's loop, skips the runs that are done, prints a table and a sentence, and writes
out/experiments/<name>-<dataset>.json and, but for recipe, a chart beside it; with --depth N the name ends in
-dN, with --quick in -quick. Then there are checks and measurements of benchmarks.py:

    python experiments.py curves out/<run> out/<run>             losses and gates of several runs in one chart
    python experiments.py words out/<run>                        does a run write words, and words of its own?
    python experiments.py digits out/<run>/samples_<step>.npz    are generated digits what was asked for?
    python experiments.py overhead                               what the memory costs on the clock (CUDA GPU)
    python experiments.py store                                  a step with the bank in host memory
    python experiments.py decode                                 milliseconds of a step of generation
"""
import argparse
import functools
import itertools
import os
import re
import signal
import textwrap
from pathlib import Path

if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C while modules load

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import benchmarks
from examples.trained_model import only_the_memory_learns, start_from_trained
from gates import draw_senses, read_senses, sense_distances, text_of, write_page
from lab import FULL, Lab, average, compare, differ, mean, mean_curve, noise, spread
from move import GPT, Linear, ValueBank, ValueMixer
from optimizers import make_optimizers
from prepare_data import token_bytes
from run_folder import newest_run, read_checkpoint
from script import ArgumentParser, UserError, make_folder, run
from train_gpt import TextWindows, load_run

# ------------------------------------------------------------------------------------------ experiments

GAIN = "gain over no memory, bits per byte"


def gain(without, results):
    """Mean and standard deviation, over pairs of the same seed, of how many bits per byte fewer."""
    pairs = [a["bits"] - b["bits"] for a, b in zip(without, results, strict=True)]
    return float(np.mean(pairs)), float(np.std(pairs, ddof=min(1, len(pairs) - 1)))


def gains_over(without, results):
    """(steps, how many bits per byte fewer than `without`) of the mean validation curve of one method."""
    steps, bits = mean_curve(results)
    return steps, mean_curve(without)[1] - bits


def gains(done):
    """The lines of the methods other than "none", over that one."""
    return {label: gains_over(done["none"], rs) for label, rs in done.items() if label != "none"}


def parity(lab):
    """No memory, LaVE-×1 and MoVE-×1: bits per byte against steps and seconds."""
    done = lab.train({"none": lab.runs("none"), "LaVE-×1": lab.runs("lave", lab.slots),
                      "MoVE-×1": lab.runs("move", lab.slots)})
    table = lab.table(["method", "bits per byte", "tokens/s"],
                      [[label, spread(rs), f"{mean(rs, 'tokens_per_s'):,.0f}"] for label, rs in done.items()])
    sentences = [compare("LaVE-×1", done["LaVE-×1"], "none", done["none"]),
                 compare("MoVE-×1", done["MoVE-×1"], "none", done["none"]),
                 compare("MoVE-×1", done["MoVE-×1"], "LaVE-×1", done["LaVE-×1"])]
    axes = ["steps", "seconds"] if len(lab.machines) == 1 else ["steps"]
    lab.write(table, sentences, [
        dict(lines={label: mean_curve(rs, against) for label, rs in done.items()}, xlabel=against,
             ylabel="validation, bits per byte") for against in axes])


def sizes_for(depth):
    """The numbers of slots M that are compared: L/4, L/2, L, 2L, 4L, in deep models the middle three."""
    factors = (1 / 4, 1 / 2, 1, 2, 4) if depth < 12 else (1 / 2, 1, 2)
    return sorted({max(1, round(depth * factor)) for factor in factors})


def scaling(lab):
    """More slots: M = L/4, L/2, L, 2L, 4L for MoVE and for LaVE with as many tables, at several depths."""
    depths = [lab.depth] if lab.args.depth else [2, 4] if lab.args.quick else [4, 8]
    methods, sizes = {}, {}
    for depth in depths:
        sizes[depth] = sizes_for(depth)
        methods["none", 0, depth] = lab.runs("none", depth=depth)
        for memory, n_slots in itertools.product(("lave", "move"), sizes[depth]):
            methods[memory, n_slots, depth] = lab.runs(memory, n_slots, depth=depth)
    done = lab.train(methods)
    table = lab.table(["memory", "M", "depth", "memory parameters", "bits per byte"],
                      [[*about, f"{lab.memory_parameters(*about) / 1e6:.1f}M", spread(rs)]
                       for about, rs in done.items()])
    sentences, lines, early = [], {}, {}
    for depth, memory in itertools.product(depths, ("lave", "move")):
        series = [done[memory, n, depth] for n in sizes[depth]]
        without = done["none", 0, depth]
        lines[f"{memory}, depth {depth}"] = ([lab.memory_parameters(memory, n, depth) for n in sizes[depth]],
                                             *zip(*(gain(without, rs) for rs in series), strict=True))
        best = 0
        while best + 1 < len(series) and differ(series[best], series[best + 1]) > 0:
            best += 1
        few, *_, many = sizes[depth]
        label = f"{memory}, depth {depth}, M = "
        sentences.append(compare(f"{label}{many}", series[-1], f"M = {few}", series[0]))
        if lab.seeds > 1:
            sentences.append(f"{memory}, depth {depth}: each step to more slots helps more than seeds differ "
                             + (f"up to M = {sizes[depth][best]}." if best else "nowhere."))
        if memory == "move":
            for n in sorted({few, max(1, round(depth / 2)), many}):
                steps, bits = gains_over(without, done["move", n, depth])
                early[label + str(n)] = steps * lab.flags["batch_tokens"] / lab.vocab_size, bits
    lab.write(table, sentences, [
        dict(lines=lines, xlabel="memory parameters", ylabel=GAIN, xscale="log"),
        dict(lines=early, xlabel="tokens seen per row", ylabel=GAIN, xscale="log")])


def ablation(lab):
    """Two switches at equal parameters: one bank or a table a layer; a gate on the ordinary value or not."""
    methods = {}
    for memory, gate in itertools.product(("move", "lave"), (True, False)):
        default = gate == (memory == "move")
        methods[memory, gate] = lab.runs(memory, lab.slots, "" if default else f"gate{gate:d}",
                                         flags=None if default else dict(gate_value=gate))
    done = lab.train(methods)
    names = dict(move="one bank", lave="tables of layers")
    table = lab.table(["memory", "g_0", "bits per byte"],
                      [[names[memory], "gated" if gate else "1", spread(rs)]
                       for (memory, gate), rs in done.items()])
    sentences = [compare("one bank", done["move", True], "tables of layers", done["lave", True]),
                 compare("a gate on the ordinary value", done["move", True], "none", done["move", False])]
    cells = {name: [done[memory, gate] for gate in (False, True)] for memory, name in names.items()}
    lab.write(table, sentences, [
        dict(lines={name: ([0, 1], *([f(rs) for rs in pair] for f in (mean, noise)))
                    for name, pair in cells.items()},
             xlabel="g_0", ylabel="validation, bits per byte", xticks=[0, 1], xticklabels=["1", "gated"])])


# --- gates


def page(args):
    """gates --text: the page, of a run that is there."""
    refuse_flags_of_runs(args, "--text", "device")
    folder, path, text = args.run or newest_run("text"), args.out_dir / "gates.html", text_of(args.text)
    make_folder(args.out_dir, "--out_dir")
    write_page(*load_run(folder), text, path)
    source = args.text if os.path.isfile(args.text) else f"the text {textwrap.shorten(text, 60)!r}"
    print(f"wrote {path}, the gates of the run in {folder} on {source}; open it in a browser")


def refuse_flags_of_runs(args, beside, *others):
    """UserError if a flag that only new runs have is given, or one of the others. beside: the flag that says
    that there are no new runs."""
    for flag in ("dataset", "depth", "seeds", "steps", "quick", *others):
        if getattr(args, flag):
            raise UserError(f"--{flag} is for new runs; leave it out with {beside}")


def gates(lab):
    """Do the gates of a word depend on its sense? The distance of gates between two senses of a word beside
    that within one sense, by layer and by length of the context, for the words of docs/senses.txt. With
    --text no test: a page of HTML that shows the gates of a text."""
    if run := lab.args.run:
        refuse_flags_of_runs(lab.args, "--run")
        folders, lab.flags = [run], read_checkpoint(run)["flags"]
        lab.report = lab.args.out_dir / f"gates-{run.resolve().name}.json"
    else:
        runs = lab.runs("move", lab.slots, "kept", keep=True)
        lab.train({"MoVE-×1": runs})
        folders = [lab.args.out_dir / "runs" / run.name for run in runs]
    senses = read_senses(Path(__file__).parent / "docs" / "senses.txt")
    found = [sense_distances(*load_run(folder), senses) for folder in folders]
    first = found[0]
    print(f"{len(first['words'])} words are one token: {', '.join(first['words'])}; dropped: "
          f"{', '.join(first['dropped']) or 'none'}")
    between, within, error = (np.array([f[key] for f in found]) for key in ("between", "within", "error"))
    rows, clear = [], []  # the arrays are (seeds, lengths, layers)
    for (i, n), (j, layer) in itertools.product(enumerate(first["lengths"]), enumerate(first["layers"])):
        difference = between[:, i, j] - within[:, i, j]
        rows.append([int(n), int(layer), f"{between[:, i, j].mean():.4f}", f"{within[:, i, j].mean():.4f}",
                     f"{difference.mean():.4f} ± {error[:, i, j].mean():.4f}"])
        if n == first["lengths"][-1] and (difference > 2 * error[:, i, j]).all():
            clear.append(str(layer))
    percent = 100 * (np.mean([f["ratio"] for f in found], axis=0) - 1)
    by_word = [first["words"][w] + (" the same" if np.isnan(percent[w]) else f" {percent[w]:+.0f} %")
               for w in np.argsort(-percent)]
    table = lab.table(["tokens of context", "layer", "distance between senses", "within a sense",
                       "difference ± error over words"], rows)
    lab.write(table, [f"With {n} tokens of context gates differ more between senses of a word than within "
                      "one, by over two standard errors in each model, in these layers: "
                      f"{', '.join(clear) or 'none'}.",
                      f"Between senses over within one, minus 1, all layers together: {', '.join(by_word)}."])
    draw_senses(first, lab.report.with_suffix(".png"))


# --- gate_init


class BiasedRouter(Linear):
    """A router with a bias, so that gates can start anywhere: z = x W_G + b."""

    def __init__(self, router, bias):
        super().__init__(router.in_features, router.out_features, std=0)
        self.start = nn.Parameter(bias)

    def forward(self, x):
        return super().forward(x) + self.start.to(x.dtype)


def bias_gates(model, value, slots):
    """Gates start at 2σ(value) for g_0 and at 2σ(slots) for the slots."""
    for mixer in model.modules():
        if isinstance(mixer, ValueMixer):
            bias = torch.full((mixer.n_heads, mixer.router.out_features // mixer.n_heads), float(slots))
            bias[:, 0] = value
            mixer.router = BiasedRouter(mixer.router, bias.flatten())


def collapsed(g_0, g_i):
    """The layers (from 0) whose mean gates have collapsed: the memory is ignored, or the context is."""
    return [layer for layer, (value, slot) in enumerate(zip(g_0, g_i, strict=True))
            if (value > 1.8 and slot < 0.1) or value < 0.1]


def gate_init(lab):
    """Gates that start open to the memory (g_0 = 0.24, g_i = 1.76), to the context, or neutral (1)."""
    starts = dict(neutral=(0, 0), memory=(-2, 2), context=(2, -2))
    done = lab.train({name: lab.runs("move", lab.slots, f"gates-{name}", flags=dict(kernels=False),
                                     change=functools.partial(bias_gates, value=value, slots=slots))
                      for name, (value, slots) in starts.items()})
    rows = []
    for name, rs in done.items():
        layers = sorted(set(itertools.chain(*(collapsed(r["g_0"][-1], r["g_i"][-1]) for r in rs))))
        g_0, g_i = (np.mean([np.mean(r[key][-1]) for r in rs]) for key in ("g_0", "g_i"))
        rows.append([name, spread(rs), f"{g_0:.2f}", f"{g_i:.2f}",
                     ", ".join(str(layer + 1) for layer in layers) or "none"])
    table = lab.table(["start", "bits per byte", "g_0 in the end", "g_i in the end", "collapsed layers"],
                      rows)
    panels = [dict(lines={name: (rs[0]["curve"]["steps"], np.mean([r[key] for r in rs], axis=(0, 2)))
                          for name, rs in done.items()}, xlabel="steps", ylabel=f"mean {key}")
              for key in ("g_0", "g_i")]
    sentences = [compare(f"a start open to the {name}", done[name], "a neutral one", done["neutral"])
                 for name in ("memory", "context")]
    lab.write(table, sentences, panels)


# --- gradient_highway


def reference(model):
    """The same model with move.py's own modules, which hooks can be put into."""
    copy = GPT(model.config, model.dtype).to(model.embedding.weight.device)
    weights = model.state_dict()
    for name, module in copy.named_modules():
        if isinstance(module, ValueBank):
            module.to(weights[f"{name}.weight"].dtype)
    copy.load_state_dict(weights)
    return copy


def gradients_by_layer(model, idx, targets):
    """What each layer with a router contributes to the gradient of the rows of the batch's ids: a list of
    (ids, M·d) float32, zeros for a layer that does not train the memory."""
    mixers = [module for module in model.modules() if isinstance(module, ValueMixer)]
    read = []

    def hook(mixer, inputs):
        x, v, memory = inputs
        read.append(memory.view_as(memory))  # a tensor of this layer alone
        return x, v, read[-1]

    hooks = [mixer.register_forward_pre_hook(hook) for mixer in mixers]
    try:
        loss = model(idx, targets)
    finally:
        for handle in hooks:
            handle.remove()
    trained = [memory for memory in read if memory.requires_grad]
    gradients = dict(zip(map(id, trained), torch.autograd.grad(loss, trained), strict=True))
    ids, index = idx.flatten().unique(return_inverse=True)
    rows = []
    for memory in read:
        row = torch.zeros(len(ids), memory[0, 0].numel(), device=idx.device)
        if id(memory) in gradients:
            row.index_add_(0, index, gradients[id(memory)].flatten(0, 1).flatten(1).float())
        rows.append(row)
    return rows


def look_at_gradients(model, data):
    """Of a batch of the validation set: the mean norm of a layer's gradient of a row; for a shared bank also
    the mean cosine between the gradients of two layers, and |Σ g_l|² / Σ |g_l|², which is 1 where layers
    have nothing to do with each other, more where they help and less where they hinder each other."""
    config, device = model.config, model.embedding.weight.device
    windows = TextWindows(data.val, config.seq_len, data.folder)
    batch = windows[np.arange(min(8, len(windows)))]
    gradients = gradients_by_layer(reference(model), *(t.to(device) for t in batch))
    found = dict(norms=[g.norm(dim=1).mean().item() for g in gradients])
    if config.memory == "move":
        stack = torch.stack(gradients)
        unit = F.normalize(stack, dim=-1)
        pairs = [(unit[i] * unit[j]).sum(-1).mean().item()
                 for i, j in itertools.combinations(range(len(unit)), 2)]
        together = stack.sum(0).square().sum() / stack.square().sum()
        found |= dict(cosine=float(np.mean(pairs)) if pairs else 0.0, together=together.item())
    return found


def one_layer_trains(model, layer):
    """Only this layer (of those with a router) trains the bank; the others read it."""
    mixers = [module for module in model.modules() if isinstance(module, ValueMixer)]
    for i, mixer in enumerate(mixers):
        if i != layer % len(mixers):
            mixer.register_forward_pre_hook(lambda mixer, inputs: (*inputs[:2], inputs[2].detach()))


def gradient_highway(lab):
    """The gradient that reaches a row of the memory, layer by layer, shared and layer-local; and a shared
    bank that only the middle layer trains. (A smaller gradient is no test: AdamW's step does not change.)"""
    memories = {"LaVE-×1": "lave", "MoVE-×1": "move"}
    done = lab.train({
        "none": lab.runs("none"),
        **{label: lab.runs(memory, lab.slots, "looked", look=look_at_gradients)
           for label, memory in memories.items()},
        "MoVE-×1, one layer trains the bank": lab.runs(
            "move", lab.slots, "onelayer", flags=dict(kernels=False),
            change=functools.partial(one_layer_trains, layer=lab.depth // 2))})
    early = max(1, len(done["none"][0]["curve"]["steps"]) // 4)
    rows, lines, used = [], {}, {}
    for label, rs in done.items():
        looks = [r["look"] for r in rs if r["look"]]
        norms = np.mean([look["norms"] for look in looks], axis=0) if looks else []
        rows.append([label, spread(rs), f"{np.mean([r['curve']['bits'][early] for r in rs]):.4f}",
                     " ".join(f"{norm:.1e}" for norm in norms),
                     *(average(looks, key, ".2f") for key in ("cosine", "together"))])
        if looks:
            slots = lab.config(memories[label], lab.slots).layer_slots()
            lines[label] = [layer for layer, n_slots in enumerate(slots, 1) if n_slots], norms
        if label != "none":
            used[label] = rs[0]["curve"]["steps"], np.mean([r["rows_used"] for r in rs], axis=0)
    table = lab.table(["memory", "bits per byte", "at a quarter of the run", "gradient of a row, by layer",
                       "cosine of two layers", "|Σ g|² / Σ |g|²"], rows)
    one = done["MoVE-×1, one layer trains the bank"]
    lab.write(table, [compare("MoVE-×1", done["MoVE-×1"], "one layer that trains the bank", one),
                      compare("MoVE-×1", done["MoVE-×1"], "LaVE-×1", done["LaVE-×1"])],
              [dict(lines=lines, xlabel="layer", ylabel="mean gradient norm of a row"),
               dict(lines=used, xlabel="steps", ylabel="share of ids that have had a gradient"),
               dict(lines=gains(done), xlabel="steps", ylabel=GAIN)])


# --- mla, keys


def mla(lab):
    """The memory in the latent of MLA, at growing scale: bits per byte, bytes of the cache. (For the time of
    a step of generation see decode.)"""
    sizes = [scale * lab.slots for scale in ((1, 2) if lab.args.quick else (1, 2, 4, 8))]
    flags = dict(flags=dict(attention="mla"))
    methods = {("none", 0): lab.runs("none", **flags)}
    for memory, n_slots in itertools.product(("lave", "move"), sizes):
        methods[memory, n_slots] = lab.runs(memory, n_slots, **flags)
    done, rows = lab.train(methods), []
    for (memory, n_slots), rs in done.items():
        with torch.device("meta"):
            cache = GPT(lab.config(memory, n_slots, attention="mla"), torch.bfloat16).new_cache(1, 2)
        rows.append([memory, n_slots, f"{lab.memory_parameters(memory, n_slots, None, 'mla') / 1e6:.1f}M",
                     spread(rs), cache.bytes_per_token])
    table = lab.table(["memory", "M", "memory parameters", "bits per byte", "cache, bytes a token"], rows)
    lines = {memory: (sizes, *([f(done[memory, n]) for n in sizes] for f in (mean, noise)))
             for memory in ("lave", "move")}
    lab.write(table, [compare(f"{memory} with M = {n}", done[memory, n], "none", done["none", 0])
                      for memory in ("lave", "move") for n in (sizes[0], sizes[-1])],
              [dict(lines=lines, xlabel="M", ylabel="validation, bits per byte", xscale="log")])


class PairBank(ValueBank):
    """A bank whose rows are found by a hash of the last two ids."""

    def forward(self, idx):
        previous = F.pad(idx[:, :-1], (1, 0))
        return super().forward((idx * 1_000_003 + previous * 92_821) % self.weight.size(0))


def read_by_pairs(model):
    model.bank.__class__ = PairBank


def keys(lab):
    """The same bank read by the last id, and by a hash of the last two; both without the kernels."""
    methods = {"none": lab.runs("none")}
    for n_slots in (lab.slots, 4 * lab.slots):
        for label, change in (("last id", None), ("last two ids", read_by_pairs)):
            methods[f"{label}, M = {n_slots}"] = lab.runs(
                "move", n_slots, label.replace(" ", "_"), change=change, flags=dict(kernels=False))
    done = lab.train(methods)
    table = lab.table(["rows found by", "bits per byte", "tokens/s"],
                      [[label, spread(rs), f"{mean(rs, 'tokens_per_s'):,.0f}"] for label, rs in done.items()])
    pairs = [(f"last two ids, M = {n}", f"last id, M = {n}") for n in (lab.slots, 4 * lab.slots)]
    lab.write(table, [compare(a, done[a], b, done[b]) for a, b in pairs],
              [dict(lines=gains(done), xlabel="steps", ylabel=GAIN)])


# --- late


def go_on_from(model, folder, freeze=False):
    """The model takes the weights of the run in `folder`. Where that has no memory, the model's starts so
    that nothing changes. freeze: only the memory learns."""
    saved = read_checkpoint(folder, verify=True)["model"]
    missing, _ = model.load_state_dict(saved, strict=False)
    if missing:
        start_from_trained(model)
    if freeze:
        only_the_memory_learns(model)


def late(lab):
    """A memory for a model that is trained already: it learns from one half of the text without memory, then
    from the other half without one, with a new one, and with a new one alone, all else frozen; beside a model
    that had the memory all the time."""
    steps = max(1, lab.steps // 2)
    first = dict(flags=dict(max_steps=steps), part=(0, 0.5), keep=True)
    begun = {memory: lab.runs(memory, lab.slots * (memory == "move"), "begun", **first)
             for memory in ("none", "move")}
    lab.train(begun)
    ways = {"no memory": ("none", "none", {}), "a new memory": ("none", "move", {}),
            "a new memory alone": ("none", "move", dict(freeze=True)),
            "the memory it had": ("move", "move", {})}
    methods = {}
    for label, (start, memory, options) in ways.items():
        methods[label] = lab.runs(memory, lab.slots * (memory == "move"), f"late-{label.replace(' ', '_')}",
                                  flags=dict(max_steps=steps), part=(0.5, 1))
        for then, before in zip(methods[label], begun[start], strict=True):
            folder = lab.args.out_dir / "runs" / before.name
            then.change = functools.partial(go_on_from, folder=folder, **options)
    done = lab.train(methods)
    table = lab.table(["second half of the text with", "bits per byte"],
                      [[label, spread(rs)] for label, rs in done.items()])
    sentences = [compare(label, done[label], "no memory", done["no memory"]) for label in list(ways)[1:]]
    lab.write(table, [*sentences, compare("a new memory", done["a new memory"], "the memory it had",
                                          done["the memory it had"])],
              [dict(lines={label: mean_curve(rs) for label, rs in done.items()}, xlabel="steps",
                    ylabel="validation, bits per byte")])


# --- recipe


class RowAdam(torch.optim.Optimizer):
    """One second moment for each row (a slot of an id), and steps of the rows that have a gradient only:
    p ← p - lr · g / √v, v ← v + (1 - beta)(mean g² - v), which starts as the row's first mean g²."""

    def __init__(self, params, lr, beta=0.95):
        super().__init__(params, dict(lr=lr, beta=beta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                square = p.grad.float().square().mean(-1, keepdim=True)  # (V, M, 1)
                if not self.state[p]:
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(square)
                v, touched = self.state[p]["exp_avg_sq"], square > 0
                later = v.lerp(square, 1 - group["beta"])
                v.copy_(torch.where(touched, torch.where(v > 0, later, square), v))
                p.copy_(p.float() - group["lr"] * p.grad.float() * torch.where(touched, v.rsqrt(), 0))


class RowAdamW(torch.optim.Optimizer):
    """AdamW without decay, but with one second moment for each row (a slot of an id): the mean of g²."""

    def __init__(self, params, lr, betas=(0.8, 0.95), eps=1e-10):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, t=0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["t"] += 1
            (beta1, beta2), t = group["betas"], group["t"]
            for p in group["params"]:
                m, v = self.state[p].values() if self.state[p] else (
                    torch.zeros_like(p), torch.zeros_like(p[..., :1], dtype=torch.float32))
                m.lerp_(p.grad, 1 - beta1)
                v.lerp_(p.grad.float().square().mean(-1, keepdim=True), 1 - beta2)
                self.state[p] = dict(exp_avg=m, exp_avg_sq=v)
                root = (v / (1 - beta2 ** t)).sqrt() + group["eps"]
                p.copy_(p.float() - group["lr"] / (1 - beta1 ** t) * m.float() / root)


def varied_optimizers(model, lr_scale, bank=1.0, routers=1.0, embedding=1.0, head=1.0, matrices=1.0,
                      betas=None, weight_decay=0.0, routers_by="muon", rows=None):
    """make_optimizers with factors on the rates of banks, routers, embedding, head and the other matrices,
    and other choices: betas and weight_decay of the banks; rows: RowAdam or RowAdamW for them; routers_by:
    'muon', or 'adamw' at 0.004 · (d / 768)^-½."""
    muon, adamw = make_optimizers(model, lr_scale)
    banks = {m.weight for m in model.modules() if isinstance(m, ValueBank)}
    held = [p for m in model.modules() if isinstance(m, ValueMixer) for p in m.router.parameters()]
    extra = []
    factors = {**dict.fromkeys(banks, bank), **dict.fromkeys(held, routers),
               model.embedding.weight: embedding, model.head.weight: head,
               muon.param_groups[0]["params"][0]: matrices}  # its first group has all but the routers
    for group in [*muon.param_groups, *adamw.param_groups]:
        p = group["params"][0]
        factor = factors.get(p, 1)
        group["lr"] *= factor
        group["peak_lr"] *= factor
        if p in banks:
            group.update(betas=betas or group["betas"], weight_decay=weight_decay)
            if rows:
                extra.append(rows(group["params"], group["lr"]))
    if rows:
        adamw.param_groups[:] = [g for g in adamw.param_groups if g["params"][0] not in banks]
    if routers_by == "adamw" and held:
        muon.param_groups[:] = [g for g in muon.param_groups if g["params"][0] not in set(held)]
        lr = 0.004 * lr_scale * routers * (model.config.dim / 768) ** -0.5
        extra.append(torch.optim.AdamW(held, lr=lr, betas=(0.8, 0.95), eps=1e-10, weight_decay=0))
    for optimizer in extra:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw, *extra]


def start_banks(model, std):
    """Banks that start with another standard deviation."""
    for bank in (m for m in model.modules() if isinstance(m, ValueBank)):
        bank.weight.data.mul_(std / bank.std)


def frozen_gates(model, data, sequences=32):
    """Bits per byte that the gates carry: how many more there are with each gate at its mean over contexts
    (`mean`), and at its mean over the other contexts of the same id (`mean_of_id`; where there is no other,
    at `mean`); of part of the validation set.
    And `slot_cosine`, the mean cosine between two slots of an id, weighted by how often the id comes."""
    model = reference(model).eval()
    config, device = model.config, model.embedding.weight.device
    windows = TextWindows(data.val, config.seq_len, data.folder)
    count = min(sequences, len(windows))
    mixers = [module for module in model.modules() if isinstance(module, ValueMixer)]
    all_ids, all_targets = windows[np.arange(count)]
    ids, index, times = all_ids.flatten().unique(return_inverse=True, return_counts=True)
    gates = {mixer: [] for mixer in mixers}

    def replaced(mixer, i, gates_of):
        return lambda x: gates_of(mixer, i, type(mixer).gates(mixer, x))

    def nats(gates_of):
        """Summed cross-entropy where gates_of(mixer, number of the sequence, g) replaces the gates g."""
        total = 0
        for i in range(count):
            for mixer in mixers:
                mixer.gates = replaced(mixer, i, gates_of)
            idx, targets = (t[i:i + 1].to(device) for t in (all_ids, all_targets))
            total += model(idx, targets).item() * targets.numel()
        return total

    def record(mixer, i, g):
        gates[mixer].append(g.float().cpu())
        return g

    with torch.inference_mode():
        plain = nats(record)
        gates = {mixer: torch.cat(g) for mixer, g in gates.items()}  # (sequences, T, H, M+1) each
        means = {mixer: g.mean((0, 1)) for mixer, g in gates.items()}
        of_id = {}
        for mixer, g in gates.items():
            total = torch.zeros(len(ids), *g.shape[2:]).index_add_(0, index, g.flatten(0, 1))
            others = (times[index] - 1).view(-1, 1, 1)
            mean_of_others = (total[index] - g.flatten(0, 1)) / others.clamp(min=1)
            of_id[mixer] = torch.where(others > 0, mean_of_others, means[mixer]).view_as(g)
        by_mean = nats(lambda mixer, i, g: means[mixer].to(g).expand_as(g))
        by_id = nats(lambda mixer, i, g: of_id[mixer][i:i + 1].to(g))
        lengths = torch.from_numpy(token_bytes(data.tokenizer()))
        size = lengths[all_targets].sum().item() * float(np.log(2))
        found = dict(mean=(by_mean - plain) / size, mean_of_id=(by_id - plain) / size)
        if config.memory == "move" and config.n_slots > 1:
            M, sample = config.n_slots, all_ids.flatten()[:4096].to(device)
            rows = F.normalize(model.bank.weight[sample].float(), dim=-1).sum(1)  # |Σ of units|² = M + pairs
            found["slot_cosine"] = ((rows.square().sum(-1) - M) / (M * (M - 1))).mean().item()
    return found


def note_of(label):
    """A label as part of the name of a run."""
    return re.sub("[^a-z0-9.]+", "_", label.replace("β", "beta").replace("×", "x").lower())


def rate_changes(factors):
    """{part: factors on its rate} → {label: options of varied_optimizers}."""
    return {f"rate of the {part} × {factor:g}": {part: factor}
            for part in factors for factor in factors[part]}


FACTORS = dict(bank=(1 / 2, 2, 4), routers=(1 / 8, 1 / 4, 1 / 2, 2, 4))


def rates(lab):
    """Factors on the rate of the bank, or on that of the routers, for the M of `scaling`, of MoVE and LaVE:
    does one rule suit all, and what are more slots worth where each M has the best of these changes? (Which
    is chosen afterwards: that flatters it a little.)"""
    sizes = sizes_for(lab.depth)[:2 if lab.args.quick else None]
    kinds = list(itertools.product(("lave", "move"), sizes))
    changes = rate_changes(FACTORS)
    methods = {(*kind, "as it is"): lab.runs(*kind) for kind in kinds}
    for kind, (label, change) in itertools.product(kinds, changes.items()):
        methods[(*kind, label)] = lab.runs(*kind, note_of(label), optimizers_of=functools.partial(
            varied_optimizers, **change))
    done, best, sentences, labels = lab.train(methods), {}, [], ["as it is", *changes]
    for kind in kinds:
        label = min(labels, key=lambda label, kind=kind: mean(done[(*kind, label)]))
        best[kind], about = done[(*kind, label)], f"{kind[0]}, M = {kind[1]}"
        sentences.append(compare(f"{about}, {label}, the best,", best[kind], "as it is",
                                 done[(*kind, "as it is")])
                         if label in changes else f"{about}: no change helps.")
    for memory, n_slots in itertools.product(("lave", "move"), sizes[1:]):
        sentences.append(compare(f"{memory}, each with its best change: M = {n_slots}", best[memory, n_slots],
                                 f"M = {sizes[0]}", best[memory, sizes[0]]))
    table = lab.table(["memory", "M", *labels],
                      [[*kind, *(spread(done[(*kind, label)]) for label in labels)] for kind in kinds])
    panels = []
    for memory, (part, factors) in itertools.product(("lave", "move"), FACTORS.items()):
        at = {1: "as it is", **{factor: f"rate of the {part} × {factor:g}" for factor in factors}}
        panels.append(dict(
            lines={f"{memory}, M = {n}": (sorted(at), [mean(done[memory, n, at[x]]) for x in sorted(at)])
                   for n in sizes},
            xlabel=f"factor on the rate of the {part}", ylabel="validation, bits per byte", xscale="log"))
    lab.write(table, sentences, panels)


def recipe(lab):
    """One change at a time of how the memory learns, for few slots and many; and of the rates of all else,
    so that each model is compared at its own best. For the rates of bank and routers see `rates`."""
    few, many = lab.slots, 4 * lab.slots
    changes = {"routers by AdamW": dict(routers_by="adamw"), "β2 = 0.995": dict(betas=(0.8, 0.995)),
               "β1 = 0": dict(betas=(0.0, 0.95)), "weight decay 0.01": dict(weight_decay=0.01),
               "one second moment a row": dict(rows=RowAdamW),
               "one a row, touched rows only": dict(rows=RowAdam, bank=1 / 8)}
    methods = {}

    def add(memory, n_slots, label, options=None, **parts):
        """Runs with a change of the optimizers, or of other parts."""
        if options:
            parts["optimizers_of"] = functools.partial(varied_optimizers, **options)
        methods[memory, n_slots, label or "as it is"] = lab.runs(memory, n_slots, note_of(label), **parts)

    for n_slots in (few, many):
        methods["move", n_slots, "as it is"] = lab.runs("move", n_slots, "gates", look=frozen_gates)
        for label, options in changes.items():
            add("move", n_slots, label, options, look=frozen_gates if "routers" in label else None)
        add("move", n_slots, "start with std 0.02", change=functools.partial(start_banks, std=0.02))
        add("move", n_slots, "bank in float32", flags=dict(bank_dtype="float32"))
    add("lave", few, "")
    add("lave", few, "routers by AdamW", changes["routers by AdamW"])
    add("none", 0, "")
    kinds = (("none", 0), ("move", few), ("lave", few))
    others = rate_changes(dict.fromkeys(("embedding", "head", "matrices"), (1 / 2, 2)))
    for kind, (label, options) in itertools.product(kinds, others.items()):
        add(*kind, label, options)
    done, rows = lab.train(methods), []
    for (memory, n_slots, label), rs in done.items():
        looks = [r["look"] for r in rs if r["look"]]
        rows.append([memory, n_slots, label, spread(rs),
                     *(average(looks, key, ".4f") for key in ("mean", "mean_of_id", "slot_cosine"))])
    table = lab.table(["memory", "M", "change", "bits per byte", "carried by gates", "by gates within an id",
                       "cosine of two slots"], rows)
    sentences = [compare(f"{memory}, M = {n_slots}, {label}", rs, "as it is",
                         done[memory, n_slots, "as it is"])
                 for (memory, n_slots, label), rs in done.items() if label != "as it is"]
    best = {memory: min((done[memory, n_slots, label] for label in ("as it is", *others)), key=mean)
            for memory, n_slots in kinds}
    sentences += [compare(f"each at its best rates: {memory}", best[memory], other, best[other])
                  for memory, other in (("move", "none"), ("lave", "none"), ("move", "lave"))]
    lab.write(table, sentences)


EXPERIMENTS = [parity, scaling, gates, gradient_highway, ablation, gate_init, mla, keys, late, rates,
               recipe]


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="experiment", required=True)
    for experiment in EXPERIMENTS:
        sub = commands.add_parser(experiment.__name__, description=experiment.__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        add = sub.add_argument
        add("--dataset", help="a set of text in --data_dir (default: that of train_gpt.py)")
        add("--depth", type=int, help=f"(default: {FULL['depth']})")
        add("--seeds", type=int, help=f"(default: {FULL['seeds']})")
        add("--steps", type=int, help=f"of each run (default: {FULL['steps']})")
        add("--quick", action="store_true", help="a small size, for two CPU cores")
        add("--device", choices=["cuda", "mps", "cpu"], help="(default: CUDA if there is, else the CPU)")
        add("--data_dir", type=Path, default=Path("data"), help="(default: data)")
        add("--out_dir", type=Path, default=Path("out/experiments"), help="(default: out/experiments)")
        sub.set_defaults(call=lambda args, f=experiment: f(Lab(args, f.__name__)), text=None)
        if experiment is gates:
            add("--run", type=Path, help="a trained run instead of new ones (--text: the newest in out/)")
            add("--text", help="make a page of HTML of the gates on this text, or on that of this file")
    benchmarks.add_commands(commands)
    args = parser.parse_args(argv)
    page(args) if getattr(args, "text", None) is not None else args.call(args)


if __name__ == "__main__":
    run(main)
