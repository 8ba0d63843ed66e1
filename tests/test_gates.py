"""gates.py: what it says about a model's gates, against plain loops and known answers."""
import base64
import html.parser
import json
import math

import numpy as np
import pytest
import torch
from conftest import HERE
from PIL import Image

import gates
from move import GPT, GPTConfig, ValueMixer
from prepare_data import make_encoding
from script import UserError

CONFIGS = dict(mha=dict(n_slots=3), mla=dict(n_slots=3, attention="mla"), lave=dict(n_slots=1, memory="lave"),
               uneven=dict(n_slots=3, memory="lave"))
TOKENS = [" river", " money", " by", " the", " old", " bank", " a", " go"]


def encoding_of(*words):
    """Bytes, and these words as one token each."""
    return make_encoding({**{bytes([i]): i for i in range(256)},
                          **{word.encode(): 256 + i for i, word in enumerate(words)}}, r" ?\w+|\s|[^\w\s]+")


def random_model(seed=0, **options):
    """Two layers in which every part does something."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(vocab_size=320, seq_len=40, n_layers=2, n_heads=2, dim=16), **options}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def planted_model(encoding):
    """Attention takes the mean of the tokens, and the router of layer 2 reads one direction of it, in which
    " river" is +1, " money" -1 and all others are 0."""
    model = random_model(vocab_size=encoding.n_vocab, n_slots=2)
    for name, parameter in model.named_parameters():
        if not name.startswith("embedding"):
            torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        model.embedding.weight[:, 0] = 0
        for word, sign in ((" river", 1), (" money", -1)):
            model.embedding.weight[encoding.encode_ordinary(word)[0]] = sign * torch.eye(16)[0]
        model.blocks[0].attention.w_v.weight.copy_(torch.eye(16))
        model.blocks[0].attention.w_o.weight.copy_(torch.eye(16))
        model.blocks[1].attention.mixer.router.weight[:, 0] = 2
    return model


LEFT = dict(water=("a the river by the", "the by river a a"), cash=("a the money by the", "the by money a a"))
SENSES = [(word, sense, f"{left} {word} and more") for word in ("bank", "go") for sense in LEFT
          for left in LEFT[sense]]


# --------------------------------------------------------------------------------------------- observe


@pytest.mark.parametrize("name", CONFIGS)
def test_observe_gives_the_gates_and_the_share_that_plain_loops_give(name):
    """From the inputs of each mixer, in float64, with W_G and equation 3 written out."""
    model, seen = random_model(**CONFIGS[name]).double().requires_grad_(False), []
    idx = torch.randint(320, (1, 9))
    idx, seen = torch.randint(320, (1, 9)), []
    mixers = [module for module in model.modules() if isinstance(module, ValueMixer)]
    hooks = [mixer.register_forward_hook(lambda mixer, inputs, output: seen.append((mixer, *inputs, output)))
             for mixer in mixers]
    model(idx)
    for hook in hooks:
        hook.remove()
    layers = gates.observe(model, idx)
    assert len(layers) == len(seen) == (1 if name == "lave" else 2)
    for (mixer, x, v, memory, output), (g, share) in zip(seen, layers, strict=True):
        T, H, d_h = v.shape[1:]
        assert g.dtype == share.dtype == np.float32 and share.shape == (T,)
        assert g.shape == (T, H, memory.size(2) + 1)
        W = mixer.router.weight
        for t in range(T):
            own = recalled = 0.0
            for h in range(H):
                n = len(W) // H  # gates of a head that are learned
                learned = [2 / (1 + math.exp(-(W[h * n + i] @ x[0, t]).item())) for i in range(n)]
                by_hand = learned if model.config.gate_value else [1.0, *learned]
                assert np.allclose(g[t, h], by_hand, atol=1e-5)
                for j in range(d_h):
                    value = by_hand[0] * float(v[0, t, h, j])
                    slots = sum(by_hand[i + 1] * float(memory[0, t, i, h * d_h + j])
                                for i in range(memory.size(2)))
                    assert math.isclose(value + slots, output[0, t, h, j], abs_tol=1e-9)
                    own, recalled = own + value ** 2, recalled + slots ** 2
            assert 0 <= share[t] <= 1
            assert math.isclose(share[t], recalled ** 0.5 / (recalled ** 0.5 + own ** 0.5), abs_tol=1e-5)


def test_observe_leaves_the_model_as_it_was_and_knows_the_extremes():
    model, idx = random_model(n_slots=2), torch.randint(320, (1, 5))
    before = model(idx)
    gates.observe(model, idx)
    assert torch.equal(model(idx), before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    for parameter, expected in ((model.bank.weight, 0), (model.blocks[1].attention.w_v.weight, 1)):
        torch.nn.init.zeros_(parameter)
        assert (gates.observe(model, idx)[1][1] == expected).all()
        torch.nn.init.ones_(parameter)
    torch.nn.init.zeros_(model.bank.weight), torch.nn.init.zeros_(model.blocks[1].attention.w_v.weight)
    assert (gates.observe(model, idx)[1][1] == 0).all()  # no value at all


def test_observe_refuses_batches_and_models_without_memory():
    model = random_model(n_slots=2)
    for shape in ((2, 5), (5,)):
        with pytest.raises(ValueError, match="one sequence"):
            gates.observe(model, torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="seq_len"):
        gates.observe(model, torch.zeros(1, 41, dtype=torch.long))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(UserError, match="no memory"):
        gates.observe(random_model(n_slots=0), torch.zeros(1, 5, dtype=torch.long))


# ---------------------------------------------------------------------------------------------- senses


def test_the_file_of_senses_is_what_it_says():
    senses = gates.read_senses(HERE / "docs" / "senses.txt")
    words = {word for word, _, _ in senses}
    assert len(words) >= 12 and len(set(senses)) == len(senses)
    for word in words:
        found = [sense for other, sense, _ in senses if other == word]
        assert len(set(found)) == 2 and all(found.count(sense) >= 3 for sense in found)
    for word, _, sentence in senses:
        parts = f"{sentence} ".split(f" {word}")
        assert len(parts) == 2 and not parts[1][0].isalpha() and len(parts[0].split()) >= 8


def test_what_is_no_file_of_senses_is_refused_by_line(tmp_path):
    path, left = tmp_path / "senses.txt", "one two three four five six seven eight"
    good = "".join(f"{word}\t{sense}\t{left} {word} {i}\n" for word in ("bank", "bat") for sense in "ab"
                   for i in range(2))
    path.write_text(f"# a comment\n\n{good}")
    assert gates.read_senses(path)[0] == ("bank", "a", f"{left} bank 0") and len(gates.read_senses(path)) == 8
    for line in ("bank\ta", "bank\ta\tb\tc", f"bank\t\t{left} bank", f"bank\ta\t{left} banks",
                 f"bank\ta\t{left} bank bank", f"bank\ta\t{left} Bank", f"bank\ta\tBank, {left} bank",
                 f"bank\ta\t{left}-bank", "bank\ta\tthe bank", f"Bank\ta\t{left} Bank", f"b.\ta\t{left} b."):
        path.write_text(f"{good}{line}\n{good}")
        with pytest.raises(UserError, match=r"senses\.txt, line 9: "):
            gates.read_senses(path)
    for line in (f"ring\ta\t{left} ring", f"bank\tc\t{left} bank"):  # one sense; one sentence of a sense
        path.write_text(f"{good}{line}\n")
        with pytest.raises(UserError, match=r"senses\.txt, line \d: '(ring|bank)' needs two"):
            gates.read_senses(path)
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="no sentences"):
        gates.read_senses(path)
    path.write_bytes(b"bank\ta\t\xff")
    with pytest.raises(UserError, match="UTF-8"):
        gates.read_senses(path)
    with pytest.raises(OSError):
        gates.read_senses(tmp_path / "nothing")


def test_a_router_that_reads_the_context_tells_senses_apart():
    """The word's place gets the mean of all tokens: with four tokens of context " river" or " money" is one
    of them, with two it is not."""
    encoding = encoding_of(*TOKENS)
    result = gates.sense_distances(planted_model(encoding), encoding, SENSES)
    assert list(result["lengths"]) == [1, 2, 4, 8, 16] and list(result["layers"]) == [1, 2]
    assert result["words"] == ["bank", "go"] and result["dropped"] == []
    between, within = result["between"], result["within"]
    assert (between[:, 0] == 0).all() and (within[:, 0] == 0).all()  # layer 1 sees the word alone
    assert (between[:2] == 0).all() and (within[:2] == 0).all()
    assert (between[2:, 1] > 5 * within[2:, 1]).all() and (within[2:, 1] > 0).all()
    assert (result["ratio"] > 5).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_distances_are_those_of_plain_loops(name):
    encoding, model = encoding_of(*TOKENS), random_model(**CONFIGS[name])
    result = gates.sense_distances(model, encoding, SENSES, lengths=(1, 3, 39, 40))
    assert list(result["lengths"]) == [1, 3, 39]  # and the separator: seq_len is 40
    assert (result["between"][0] == 0).all() and (result["within"][0] == 0).all()
    for layer in range(len(result["layers"])):
        means = {"between": [], "within": []}
        for word in ("bank", "go"):
            vectors, pairs = [], {"between": [], "within": []}
            for sense in LEFT:
                for left in LEFT[sense]:
                    ids = encoding.encode_ordinary(f"{left} {word}")[-3:]
                    g = gates.observe(model, torch.tensor([[encoding.eot_token, *ids]]))[layer][0]
                    vectors.append((sense, [float(x) for head in g[-1] for x in head]))
            for i, (sense, a) in enumerate(vectors):
                for other, b in vectors[:i]:
                    total = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
                    pairs["within" if sense == other else "between"].append(math.sqrt(total / len(a)))
            for kind in means:
                means[kind].append(sum(pairs[kind]) / len(pairs[kind]))
        for kind, (bank, go) in means.items():
            assert math.isclose(result[kind][1, layer], (bank + go) / 2, rel_tol=1e-5, abs_tol=1e-12)
        bank, go = (b - w for b, w in zip(means["between"], means["within"], strict=True))
        assert math.isclose(result["error"][1, layer], abs(bank - go) / 2, rel_tol=1e-4, abs_tol=1e-7)


def test_identical_contexts_are_at_distance_zero(tmp_path):
    encoding, model = encoding_of(*TOKENS), random_model(n_slots=3)
    senses = [("bank", sense, "the by river a a bank") for sense in LEFT for _ in range(3)]
    result = gates.sense_distances(model, encoding, senses)
    assert (result["between"] == 0).all() and (result["within"] == 0).all()
    assert np.isnan(result["ratio"]).all()
    gates.draw_senses(result, tmp_path / "same.png")


def test_words_of_several_tokens_are_dropped_by_name():
    encoding, model = encoding_of(*TOKENS), random_model(n_slots=3)
    bats = [("bat", sense, sentence.replace(" bank", " bat")) for _, sense, sentence in SENSES[:4]]
    result = gates.sense_distances(model, encoding, bats + SENSES, lengths=[2])
    assert result["words"] == ["bank", "go"] and result["dropped"] == ["bat"] and len(result["ratio"]) == 2
    with pytest.raises(UserError, match="bat.*one token"):
        gates.sense_distances(model, encoding, bats)
    with pytest.raises(UserError, match="seq_len 40"):
        gates.sense_distances(model, encoding, SENSES, lengths=[40])


def test_the_heat_map_is_a_small_image(tmp_path):
    encoding = encoding_of(*TOKENS)
    path = tmp_path / "senses.png"
    gates.draw_senses(gates.sense_distances(planted_model(encoding), encoding, SENSES), path)
    with Image.open(path) as image:
        assert image.width == 1000 and path.stat().st_size < 150_000


# ------------------------------------------------------------------------------------------------ page


class Reader(html.parser.HTMLParser):
    """The texts of the page's tokens, and its script. An end tag must close the last open element."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tokens, self.script, self.tags = [], [], "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if (tag, attributes[:1]) == ("span", [("tabindex", "-1")]):
            self.tokens.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "span" and self.tokens:
            self.tokens[-1] += data
        elif self.open[-1:] == ["script"]:
            self.script += data


def page_of(model, encoding, text, folder):
    gates.write_page(model, encoding, text, folder / "page.html")
    page = (folder / "page.html").read_text(encoding="utf-8")
    reader = Reader(page)
    assert not reader.open and "http" not in page and "src=" not in page and reader.tags.count("script") == 1
    return page, reader


TEXT = "<script>alert('1 & 2')</script> the old\n\n&amp; {{text}} bank é 😀\x00\ttail"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_page_holds_every_token_escaped_and_its_numbers(name, tmp_path):
    encoding, model = encoding_of(*TOKENS, " é"), random_model(**CONFIGS[name], seq_len=100)
    page, reader = page_of(model, encoding, TEXT, tmp_path)
    ids = encoding.encode_ordinary(TEXT)
    assert "".join(reader.tokens) == TEXT.replace("😀", "⟨f0⟩⟨9f⟩⟨98⟩⟨80⟩").replace("\x00", "⟨00⟩")
    assert len(reader.tokens) == len(ids) and " é" in reader.tokens and "cut" not in page
    data, end = json.JSONDecoder().raw_decode(reader.script[reader.script.index("{"):])
    layers = gates.observe(model, torch.tensor([[encoding.eot_token, *ids]]))
    assert [view[0] for view in data["views"]] == ["mean of all layers", *(
        ["2 of 2"] if name == "lave" else ["1 of 2", "2 of 2"])]
    shares = []
    for (_, packed, packed_share), (g, share) in zip(data["views"][1:], layers, strict=True):
        stored, n = np.frombuffer(base64.b64decode(packed), np.uint8), g.shape[-1]
        stored = stored.reshape(len(ids), data["heads"], data["gates"])
        assert np.abs(stored[..., :n] / 127 - g[1:]).max() < 0.005 and (stored[..., n:] == 255).all()
        shares.append(np.frombuffer(base64.b64decode(packed_share), np.uint8))
        assert np.abs(shares[-1] / 255 - share[1:]).max() < 0.003
    mean = np.frombuffer(base64.b64decode(data["views"][0][2]), np.uint8)
    assert np.abs(mean - np.mean(shares, axis=0)).max() <= 1 and data["top"] == np.max(shares)


def test_a_long_text_is_cut_and_the_page_says_so(tmp_path):
    encoding, model = encoding_of(*TOKENS), random_model(n_slots=2)
    page, reader = page_of(model, encoding, "a" + " the old" * 1000, tmp_path)
    assert reader.tokens == ["a", *[" the", " old"] * 19] and "cut: this model reads 39 tokens" in page
    page, reader = page_of(model, encoding, "a" + " the old" * 19, tmp_path)
    assert len(reader.tokens) == 39 and "cut" not in page


def test_a_page_of_a_d12_with_250_tokens_is_small(tmp_path):
    model = random_model(n_layers=12, n_heads=6, dim=24, n_slots=24, seq_len=251)  # MoVE-×4
    gates.write_page(model, encoding_of(*TOKENS), "word " * 100, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 1_000_000


def test_a_text_is_given_itself_or_as_a_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffé\n".encode())
    assert gates.text_of(path) == gates.text_of(str(path)) == "é\n"
    assert gates.text_of("no such file") == "no such file" and gates.text_of("x" * 9999) == "x" * 9999
    for text in ("he/she", "3.14", "e.g", "The end.", "https://a.b/c", "in a.txt\nthere"):
        assert gates.text_of(text) == text
    for name in ("plya.txt", "my play.txt", "out/", tmp_path / "other", tmp_path / "my play.txt",
                 str(tmp_path / "other"), "../play", "~/play"):
        with pytest.raises(UserError, match="no file"):
            gates.text_of(name)
    for content in (b"", b" \n", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="text"):
            gates.text_of(path)
    for text in ("", " \n", "\udcff"):
        with pytest.raises(UserError, match="text"):
            gates.text_of(text)


def test_a_model_without_memory_has_no_page_and_no_distances(tmp_path):
    encoding, model = encoding_of(*TOKENS), random_model(n_slots=0)
    with pytest.raises(UserError, match="no memory"):
        gates.write_page(model, encoding, "the old bank", tmp_path / "page.html")
    with pytest.raises(UserError, match="no memory"):
        gates.sense_distances(model, encoding, SENSES)
    assert not list(tmp_path.iterdir())


def test_a_model_that_reads_one_token_has_no_page(tmp_path):
    encoding = encoding_of(*TOKENS)
    model = GPT(GPTConfig(encoding.n_vocab, 1, 1, 1, 8, n_slots=1))
    with pytest.raises(UserError):
        gates.write_page(model, encoding, "word", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
