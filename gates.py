"""What the routers of a trained model do: a page to read their gates on, and a test of words with two senses.

    from train_gpt import load_run
    model, encoding = load_run("out/<run>")
    write_page(model, encoding, text_of("play.txt"), "gates.html")                     open it in a browser
    draw_senses(sense_distances(model, encoding, read_senses("docs/senses.txt")), "senses.png")

A model is a GPT of move.py with a memory, on any device, with the reference modules. Layers count from 1.
"""
import base64
import codecs
import html
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from move import ValueMixer, mix_values
from prepare_data import pieces, tiktoken_errors
from script import UserError, require_utf8, write_file


def find_mixers(model):
    """{layer: its ValueMixer}, of the layers that have one. UserError for a model without memory."""
    mixers = {layer: module for layer, block in enumerate(model.blocks, 1)
              for module in block.modules() if isinstance(module, ValueMixer)}
    if not mixers:
        raise UserError("this model has no memory, so it has no gates; give a run with --memory move or lave")
    return mixers


@torch.inference_mode()
def observe(model, idx):
    """One sequence idx (1, T) → [(gates (T, H, M+1), share (T,))], float32, for each layer of find_mixers.

    share, in [0, 1]: how much of a token's V_S comes from its memory, ‖Σ g_i M_i‖ / (‖Σ g_i M_i‖ + ‖g_0 V‖),
    over all heads. ValueError for another shape of idx or more than seq_len tokens.
    """
    if idx.dim() != 2 or len(idx) != 1:
        raise ValueError(f"expected one sequence (1, T), not {tuple(idx.shape)}")
    layers = []

    def hook(mixer, inputs):
        x, v, memory = inputs
        gates, v, memory = mixer.gates(x).float(), v.float(), memory.float()
        parts = gates[..., :1] * v, mix_values(torch.zeros_like(v), memory, gates)
        own, recalled = (part.flatten(-2).norm(dim=-1) for part in parts)
        share = recalled / (own + recalled).clamp_min(1e-30)  # 0 where both are 0
        layers.append((gates[0].cpu().numpy(), share[0].cpu().numpy()))

    hooks = [mixer.register_forward_pre_hook(hook) for mixer in find_mixers(model).values()]
    try:
        model(idx.to(model.embedding.weight.device))
    finally:
        for handle in hooks:
            handle.remove()
    return layers


# ------------------------------------------------------------------------------------ words of two senses


def read_senses(path):
    """[(word, sense, sentence)] of a file like docs/senses.txt. UserError, with the line, if it has another
    form, or if a word has not two senses with two sentences each."""
    contexts, lines = [], {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        where, fields = f"{path}, line {number}", line.split("\t")
        if len(fields) != 3 or not all(map(str.strip, fields)):
            raise UserError(f"{where}: expected word, sense and sentence with one tab between, not {line!r}")
        word, sense, sentence = fields
        if not (re.fullmatch("[a-z]+", word) and re.match(rf"\s*(\S+ +){{8,}}{word}\b", sentence)
                and len(re.findall(rf"\b{word}\b", sentence, re.I)) == 1):
            raise UserError(f"{where}: expected {word!r} in the sentence once, a word in lower case with a "
                            "space and 8 words or more before it")
        contexts.append((word, sense, sentence))
        lines.setdefault(word, (where, []))[1].append(sense)
    for word, (where, senses) in lines.items():
        if len(set(senses)) < 2 or min(map(senses.count, senses)) < 2:
            raise UserError(f"{where}: {word!r} needs two senses or more, and two sentences or more of each")
    if not contexts:
        raise UserError(f"{path} has no sentences")
    return contexts


def sense_distances(model, encoding, senses, lengths=(1, 2, 4, 8, 16)):
    """Do gates differ more between two senses of a word than within one? senses: see read_senses.

    A context is the separator and the last n tokens of the sentence up to the word, which counts: n = 1 is
    the word alone. Fewer if the sentence has fewer. The distance of two contexts in a layer is the root mean
    square difference of all the gates at the word, over heads and gates 0 to M. Returns a dict of
        lengths (N,)  those of `lengths` that fit into seq_len      layers (L,)   those that have gates
        between (N, L), within (N, L)   mean distance of contexts of different senses, of the same sense
        error (N, L)                    standard error of between - within, from its spread over the words
        words, dropped                  lists of those that are one token, and those that are not
        ratio (words,)                  between / within at the last of the lengths, all layers together;
                                        nan where within is 0
    A mean over words, each of which is a mean over its pairs of contexts. UserError if no word is one token
    or no length fits.
    """
    layers = list(find_mixers(model))
    lengths = [n for n in lengths if n + 1 <= model.config.seq_len]
    tokens = {word: encoding.encode_ordinary(" " + word) for word, _, _ in senses}
    words = [word for word, ids in tokens.items() if len(ids) == 1]
    if not words or not lengths:
        raise UserError(f"no word of {list(tokens)} is one token of this vocabulary" if lengths else
                        f"seq_len {model.config.seq_len} is too short for a context")
    distances = np.zeros((2, len(words), len(lengths), len(layers)))  # within, between
    for w, word in enumerate(words):
        contexts = [(sense, encoding.encode_ordinary(re.split(rf" {word}\b", sentence)[0]) + tokens[word])
                    for other, sense, sentence in senses if other == word]
        for i, n in enumerate(lengths):
            seen = [(sense, observe(model, torch.tensor([[encoding.eot_token, *ids[-n:]]])))
                    for sense, ids in contexts]
            pairs = ([], [])
            for (sense_a, a), (sense_b, b) in itertools.combinations(seen, 2):
                pairs[sense_a != sense_b].append([np.mean((gates_a[-1] - gates_b[-1]) ** 2) ** 0.5
                                                  for (gates_a, _), (gates_b, _) in zip(a, b, strict=True)])
            distances[:, w, i] = [np.mean(part, axis=0) for part in pairs]
    within, between = distances
    return dict(lengths=np.array(lengths), layers=np.array(layers),
                between=between.mean(0), within=within.mean(0),
                error=(between - within).std(0) / max(1, len(words) - 1) ** 0.5,
                words=words, dropped=[word for word in tokens if word not in words],
                ratio=divide(between[:, -1].mean(-1), within[:, -1].mean(-1)))


def divide(a, b):
    return np.divide(a, b, out=np.full_like(b, np.nan), where=b > 0)  # nan where b is 0


def draw_senses(result, path):
    """A PNG of what sense_distances returns: how much farther apart the gates are between senses than within
    one, in percent with its standard error, for each layer and length of context; and for each word."""
    excess = 100 * (divide(result["between"], result["within"]) - 1).T  # (L, N)
    error = 100 * divide(result["error"], result["within"]).T
    n_words, n = len(result["words"]), result["lengths"][-1]
    figure = Figure(figsize=(10, max(4, 1.2 + 0.2 * n_words)), layout="constrained")
    heat, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    limit = np.nanmax(np.abs(excess), initial=1)
    heat.imshow(excess, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    heat.set_facecolor("#ddd")
    for (row, column), value in np.ndenumerate(excess):
        text = "same" if np.isnan(value) else f"{round(value):+d} ± {error[row, column]:.0f} %"
        color = "white" if abs(value) > 0.6 * limit else "black"
        heat.text(column, row, text, ha="center", va="center", color=color)
    heat.set_xticks(range(len(result["lengths"])), result["lengths"])
    heat.set_yticks(range(len(result["layers"])), result["layers"])
    heat.set(xlabel="tokens of context, with the word", ylabel="layer",
             title="distance of gates: between two senses of a word\nover within one sense, minus 1")
    percent = 100 * (result["ratio"] - 1)
    order = np.argsort(np.nan_to_num(percent))
    bars.barh(np.array(result["words"])[order], percent[order], color="#36c")
    bars.axvline(0, color="#333", linewidth=1)
    bars.grid(axis="x", alpha=0.3)
    bars.set(xlabel="%", ylim=(-0.6, n_words - 0.4),
             title=f"the same for each word, all layers,\n{n} tokens of context")
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=100))


# ------------------------------------------------------------------------------------------------ the page

PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>MoVE: what each token takes from its memory</title>
<style>
  :root { color-scheme: light dark; --ink: #1d1d20; --paper: #fff; --soft: #66666e; --line: #dcdce2;
          --memory: #ffa033; --gate: #5b8def }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #ececef; --paper: #17171a; --soft: #a3a3ab; --line: #3b3b42;
            --memory: #a34f00; --gate: #3f6fd0 } }
  body { max-width: 860px; margin: 1.5em auto; padding: 0 1em; font: 15px/1.5 system-ui, sans-serif;
         color: var(--ink); background: var(--paper) }
  h1 { font-size: 1.4em; margin: 0 }
  p, small, th { color: var(--soft) }
  #bar { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .3em 2em; padding: .6em 0;
         background: var(--paper); border-bottom: 1px solid var(--line) }
  #bar > * { display: flex; align-items: center; gap: .6em }
  output { min-width: 10em }
  #scale { width: 110px; height: 1em; border: 1px solid var(--line);
           background: linear-gradient(to right, transparent, var(--memory)) }
  main { display: grid; grid-template-columns: 1fr 330px; gap: 2em; align-items: start; margin-top: 1em }
  #text { font: 16px/1.75 Georgia, serif; white-space: pre-wrap; overflow-wrap: anywhere }
  #text span { padding: .15em 0; border-radius: 2px; cursor: default;
               background: color-mix(in srgb, var(--memory) calc(100% * var(--share)), transparent) }
  #text span.shown { outline: 2px solid var(--ink) }
  #text i { color: var(--soft); opacity: .6; font-style: normal; user-select: none }
  #panel { position: sticky; top: 4em; padding: .8em 1em; border: 1px solid var(--line); border-radius: 8px;
           background: var(--paper); max-height: calc(100vh - 7em); overflow: auto }
  @media (max-width: 640px) { main { grid-template-columns: 1fr }
                              #panel { top: auto; bottom: 0; max-height: 40vh } }
  #token { font: 18px Georgia, serif; white-space: pre-wrap }
  table { width: 100%; border-spacing: 3px 2px; font-variant-numeric: tabular-nums; margin-top: .5em }
  th { text-align: left; font-size: 12px; font-weight: normal }
  .gate { width: 100%; min-width: 50px;
          background: linear-gradient(var(--gate) 0 0) 0/calc(50% * var(--g)) no-repeat,
                      linear-gradient(var(--soft) 0 0) 50%/1px no-repeat, var(--line) }
  .head { min-width: 21px; text-align: center; font-size: 11px;
          background: color-mix(in srgb, var(--gate) calc(40% * var(--g)), transparent) }
</style>
<h1>What each token takes from its memory</h1>
<p>Color is the memory’s share of the token’s value,
‖Σ g<sub>i</sub> M<sub>i</sub>‖ / (‖Σ g<sub>i</sub> M<sub>i</sub>‖ + ‖g<sub>0</sub> V‖).
Point at a token, or walk with the arrow keys, to see its gates. {{note}}</p>
<div id="bar">
  <label>Layer <input type="range" min="0" max="{{last}}" value="0"><output></output></label>
  <div>share of memory: 0 % <span id="scale"></span> {{percent}} %</div>
</div>
<main>
<div id="text">{{text}}</div>
<div id="panel"><span id="token"></span> <small id="share"></small><table></table>
<small>Bars: mean over heads, from 0 to 2; the line is 1, the value at the start of training.</small></div>
</main>
<script>
const data = {{data}}, find = query => document.querySelector(query), slider = find("input")
const tokens = [...document.querySelectorAll("#text span")]
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0))
const views = data.views.map(([name, gates, share]) => ({name, gates: bytes(gates), share: bytes(share)}))
let current = 0

function show(t) {  // the gates of token t
  tokens[current].classList.remove("shown")
  tokens[current].tabIndex = -1
  current = t
  tokens[t].classList.add("shown")
  tokens[t].tabIndex = 0
  const view = views[slider.value], heads = Array.from({length: data.heads}, (_, h) => h)
  let rows = "<tr><th><th>mean<th>" + heads.map(h => "<th>h" + (h + 1)).join("")
  for (let i = 0; i < data.gates; i++) {
    const g = heads.map(h => view.gates[(t * data.heads + h) * data.gates + i] / 127)
    if (g[0] > 2) continue  // this layer has fewer slots
    const mean = g.reduce((a, b) => a + b) / data.heads
    rows += "<tr><th>g<sub>" + i + "</sub><td class=gate style='--g:" + mean + "'><td>" + mean.toFixed(2) +
            g.map(x => "<td class=head style='--g:" + x + "'>" + x.toFixed(1)).join("")
  }
  find("table").innerHTML = rows
  find("#token").textContent = tokens[t].textContent.replace(/ /g, "␣").replace(/\\n/g, "")
  find("#share").textContent = "memory " + Math.round(view.share[t] / 2.55) + " %"
}

slider.oninput = () => {
  const view = views[slider.value]
  tokens.forEach((token, t) => token.style.setProperty("--share", view.share[t] / data.top))
  find("output").textContent = view.name
  slider.setAttribute("aria-valuetext", view.name)
  show(current)
}
tokens.forEach((token, t) => token.onmouseenter = token.onfocus = () => show(t))
find("#text").onkeydown = event => {
  const next = tokens[current + ({ArrowLeft: -1, ArrowRight: 1}[event.key] ?? NaN)]
  if (next) next.focus()
}
slider.oninput()
</script>
</html>
"""

codecs.register_error("angles", lambda error: (
    "".join(f"⟨{byte:02x}⟩" for byte in error.object[error.start:error.end]), error.end))


def visible(token):
    """The text of a token's bytes. A byte that is no whole character, and a control character, is ⟨e2⟩."""
    text = token.decode(errors="angles")
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f]", lambda match: f"⟨{ord(match[0]):02x}⟩", text)


def write_page(model, encoding, text, path):
    """Writes an HTML page, whole in itself: the text, each token colored by the share of `observe`, and its
    gates. A text of more than seq_len - 1 tokens is cut, and the page says so. Gates are rounded to 1/127.
    UserError if seq_len is 1."""
    room = model.config.seq_len - 1  # the separator comes first
    if not room:
        raise UserError("this model reads 1 token, the separator; train one with a longer --seq_len")
    with tiktoken_errors("the text"):
        ids = itertools.chain.from_iterable(map(encoding.encode_ordinary, pieces(text)))
        ids = list(itertools.islice(ids, room + 1))
    note = f"The text is cut: this model reads {room} tokens." if len(ids) > room else ""
    ids = ids[:room]
    layers = observe(model, torch.tensor([[encoding.eot_token, *ids]]))
    width = max(gates.shape[-1] for gates, _ in layers)
    gates = np.full((len(layers), len(ids), layers[0][0].shape[1], width), np.nan)  # nan: no such slot
    for padded, (layer, _) in zip(gates, layers, strict=True):
        padded[..., :layer.shape[-1]] = layer[1:]
    share = np.stack([share[1:] for _, share in layers])  # (L, T)
    gates, share = (np.concatenate((np.nanmean(x, 0, keepdims=True), x)) for x in (gates, share))
    gates, share = np.nan_to_num(np.round(127 * gates), nan=255), np.round(255 * share)
    packed = ([base64.b64encode(layer.astype(np.uint8)).decode() for layer in x] for x in (gates, share))
    names = ["mean of all layers", *(f"{layer} of {len(model.blocks)}" for layer in find_mixers(model))]
    top = max(1, int(share.max()))
    data = dict(heads=gates.shape[2], gates=width, top=top, views=list(zip(names, *packed, strict=True)))
    words = (html.escape(visible(encoding.decode_single_token_bytes(i))) for i in ids)
    spans = (f"<span tabindex=-1>{word}</span>".replace("\n", "<i>↵</i>\n") for word in words)
    parts = dict(text="".join(spans), note=note, last=len(layers), percent=round(top / 2.55),
                 data=json.dumps(data))
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: str(parts[match[1]]), PAGE)
    write_file(path, lambda file: file.write(page.encode()))


def text_of(text_or_path):
    """The text itself, or that of the file if there is one of this name. UserError if it is empty, not UTF-8,
    or looks like the name of a file that is not there."""
    text = read_text(text_or_path) if os.path.isfile(text_or_path) else str(text_or_path)
    name = r".*\.(txt|md|py|html|json)\s*|.*[/\\]|(/|\./|\.\./|~/)\S+"
    if text == str(text_or_path) and (isinstance(text_or_path, Path) or re.fullmatch(name, text)):
        raise UserError(f"there is no file {text}; give the name of a file, or a text")
    if not text.strip():
        raise UserError(f"expected a text, and there is none in {str(text_or_path)!r}")
    require_utf8(text, "--text")
    return text


def read_text(path):
    """The text of a file. UserError if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from None
