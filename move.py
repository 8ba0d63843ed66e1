"""MoVE: Mixture of Value Embeddings (arXiv 2601.22887), a memory that grows without the compute.

One bank E of learned value embeddings, indexed by token id, is shared by all attention layers.
In each layer a router looks at the context and decides, per head, how much of the ordinary value
and of each memory slot to use:

    M_t = E[w_t]                              the memory of token t: an index, no product     (1)
    g   = 2 σ(x W_G)                          gates in (0, 2), all exactly 1 at the start     (2)
    V_S = g_0 ⊙ V + Σ_{i=1..M} g_i ⊙ M_i      the values that attention sees, V = x W_V       (3)

Shapes in this file
    B  batch        T  tokens in a sequence        S  tokens attended to: T, or more with a cache
    V  vocabulary (as a size)     L  layers     d  model width     H  heads     d_h = d / H
    M  memory slots of a token

The file reads top to bottom: the bank (1), the mix (3) and the router (2); then what a transformer
needs besides; then a GPT whose layers share one bank. It needs torch and nothing else: copy it.
`ValueBank` and `ValueMixer` are the two parts that another model needs.
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# ----------------------------------------------------------------------------------- the memory


class ValueBank(nn.Module):
    """Equation 1. The bank E, `weight` (V, M, d), one per model, read by all its attention layers.

    bank(idx): token ids (B, T), int64 in [0, V) → memory (B, T, M, d), in the dtype of the weight.
    dim: the width d of a slot, that of all values of a token together.
    An id out of range raises IndexError on a CPU and is a device-side assert on CUDA.
    ValueError for a bank without rows, slots or width.

    The bank starts as N(0, std²). Random and not zero: equal slots under equal gates would get equal
    gradients and stay equal for ever. By default std = 0.3 · M^-½: M gates of 1 add up to
    Var(V_S) = Var(V) + M·std², which is 1.09 where Var(V) = 1, however many slots there are.
    """

    def __init__(self, vocab_size, n_slots, dim, std=None):
        super().__init__()
        if min(vocab_size, n_slots, dim) < 1:
            raise ValueError(f"vocab_size, n_slots and dim must be 1 or more, not {vocab_size, n_slots, dim}")
        self.std = 0.3 * n_slots ** -0.5 if std is None else std
        self.weight = nn.Parameter(torch.empty(vocab_size, n_slots, dim))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, idx):
        rows = F.embedding(idx, self.weight.flatten(1))  # (B, T, M·d)
        return rows.unflatten(-1, self.weight.shape[1:])


def mix_values(v, memory, gates):
    """Equation 3, per token and head: V_S = g_0 ⊙ V + Σ_i g_i ⊙ M_i.

    v (B, T, H, d_h), memory (B, T, M, H·d_h), gates (B, T, H, M+1) → (B, T, H, d_h).
    RuntimeError for shapes that do not fit, which could otherwise broadcast.
    """
    if memory.shape[:2] != v.shape[:2] or gates.shape != (*v.shape[:3], memory.size(2) + 1):
        raise RuntimeError(f"values {tuple(v.shape)}, memory {tuple(memory.shape)} and gates "
                           f"{tuple(gates.shape)} do not fit")
    memory = memory.unflatten(-1, v.shape[-2:])  # (B, T, M, H, d_h)
    g_0 = gates[..., :1]  # (B, T, H, 1)
    g = gates[..., 1:].mT.unsqueeze(-1)  # (B, T, M, H, 1)
    return g_0 * v + (g * memory).sum(dim=2)  # not an einsum: torch.compile makes one pass of this


class ValueMixer(nn.Module):
    """Equations 2 and 3: the router of one layer, and the mix. (These equations have a second home, the
    kernels of move_fast.py. If you change them here, accelerate() notices and uses no kernels.)

    dim: width d of the layer's input. n_heads: number of *value* heads H, so that grouped-query
    attention needs nothing else. n_slots: M. gate_value=False fixes g_0 = 1, as in LaVE.

    mixer(x, v, memory): input (B, T, d), values (B, T, H, d_h), memory (B, T, M, H·d_h) → V_S
    (B, T, H, d_h), in the dtype of v. RuntimeError for shapes that do not fit.
    """

    def __init__(self, dim, n_heads, n_slots, gate_value=True):
        super().__init__()
        self.n_heads = n_heads
        self.gate_value = gate_value
        self.router = Linear(dim, n_heads * (n_slots + gate_value), std=0)  # W_G = 0, so all gates start at 1

    def gates(self, x):
        """(B, T, d) → (B, T, H, M+1): gate 0 for the ordinary value, gates 1..M for the slots."""
        z = self.router(x).unflatten(-1, (self.n_heads, -1))
        g = 2 * torch.sigmoid(z)
        return g if self.gate_value else F.pad(g, (1, 0), value=1.0)  # g_0 = 1

    def forward(self, x, v, memory):
        if memory is None:
            raise RuntimeError("this layer mixes a memory and got none; give it bank(idx)")
        return mix_values(v, memory.to(v.dtype), self.gates(x).to(v.dtype))


# --------------------------------------------------------------------- the pieces of a transformer


class Linear(nn.Linear):
    """y = x Wᵀ without a bias, in the dtype of x: (..., n_in) → (..., n_out).

    The weight stays in float32 for the optimizer; bfloat16 activations get bfloat16 products.
    It starts as N(0, std²), by default with std = n_in^-½, which keeps the variance.
    """

    def __init__(self, n_in, n_out, std=None):
        self.std = n_in ** -0.5 if std is None else std
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self):
        if self.std == 0:  # uses no random numbers: a router does not change the start of other layers
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.std)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rms_norm(x):
    """RMS-norm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotary_embedding(positions, dim, base=10000.0):
    """cos and sin of the rotary angles (arXiv 2104.09864), each (T, 1, dim/2) in float32.

    positions (T, axes): one axis for text, row and column for images. The dim/2 pairs are shared out
    evenly among the axes; ValueError if they cannot be.
    """
    T, axes = positions.shape
    if dim < 1 or dim % (2 * axes):
        raise ValueError(f"rotary embeddings turn pairs: the width of a head (MHA) or rope_dim (MLA) must be "
                         f"a positive multiple of {2 * axes}, not {dim}")
    frequencies = base ** (-torch.arange(0, dim // axes, 2) / (dim // axes))
    angles = (positions.unsqueeze(-1) * frequencies).reshape(T, 1, dim // 2)
    return angles.cos(), angles.sin()


def apply_rotary_emb(x, rotary):
    """Turns the pairs (x_j, x_{j + dim/2}) by the angle of their position: (B, T, H, dim) → the same."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)


def causal_attention(q, k, v, mask=None, scale=None):
    """softmax(q kᵀ · scale) v over the keys that a query sees: those where mask (T, S) is true, by default
    its own and those before it (T = S).

    q (B, T, H, ·), k and v (B, S, H, ·) → (B, T, H, ·). scale is by default (width of q)^-½.
    """
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    # For one query squeeze and unsqueeze are the transpose, too. Compiled, they keep strides that all kernels
    # of attention accept; those of transpose(1, 2) some refuse ("query is not correctly aligned").
    q = q.squeeze(1).unsqueeze(2) if q.size(1) == 1 else q.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    return y.transpose(1, 2)


class LayerCache:
    """What generation keeps of past tokens in one layer: preallocated tensors (B, max_len, ...).

    shapes: what one token leaves, as the attention says in `cache_shapes`: its key and V_S for MHA, its
    c_S and rotary key for MLA. Values are stored already mixed: a token is looked up once, however many
    follow it, and the cache has the same size for every M.
    position: the number of tokens held, () int64 on the device, so that one compiled step serves every
    token. The layers share it; see KVCache.
    """

    def __init__(self, batch, max_len, shapes, position, dtype=torch.float32):
        self.position = position
        self.stores = [torch.zeros(batch, max_len, *shape, dtype=dtype, device=position.device)
                       for shape in shapes]

    def append(self, *new):
        """Stores (B, T, ...) behind what is held → all that is there, (B, max_len, ...) each, and the mask
        (T, max_len) of what the T tokens see. It leaves `position` where it is: all layers store their part
        of the same tokens, then KVCache.advance moves it."""
        positions = self.position + torch.arange(new[0].size(1), device=self.position.device)
        for store, tensor in zip(self.stores, new, strict=True):
            store.index_copy_(1, positions, tensor.to(store.dtype))
        mask = torch.arange(self.stores[0].size(1), device=positions.device) <= positions.unsqueeze(1)
        return self.stores, mask


class KVCache:
    """A LayerCache for each of the attentions, which can hold max_len tokens.

    The number of tokens held is there twice: `position` on the device, and `length` on the host, so that a
    full cache raises. (Compiled code leaves `length` alone.)
    """

    def __init__(self, attentions, batch, max_len, dtype=torch.float32, device="cpu"):
        self.length, self.max_len = 0, max_len
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.layers = [LayerCache(batch, max_len, attention.cache_shapes, self.position, dtype)
                       for attention in attentions]

    @property
    def bytes_per_token(self):
        return sum(s[0, 0].numel() * s.element_size() for layer in self.layers for s in layer.stores)

    def positions(self, T):
        """Those of the next T tokens, (T,). IndexError if there is no room for them."""
        if not torch.compiler.is_compiling() and self.length + T > self.max_len:
            raise IndexError(f"the KV cache holds {self.max_len} tokens, there is no room for token "
                             f"{self.length + T}")
        return self.position + torch.arange(T, device=self.position.device)

    def advance(self, T):
        """T tokens more are held: every layer has appended them."""
        self.position.add_(T)
        if not torch.compiler.is_compiling():
            self.length += T

    def reset(self):
        """Holds nothing, for a new sequence."""
        self.position.zero_()
        self.length = 0
        for layer in self.layers:  # nor what autograd knows of them
            layer.stores = [store.detach() for store in layer.stores]


# ------------------------------------------------------------------------------------- attention


class MoVEAttention(nn.Module):
    """Causal multi-head attention, rotary, with QK-norm, over the mixed values of equation 3.

    attention(x, rotary, memory=None, cache=None): x (B, T, d); (cos, sin) of the T positions for
    width d_h; memory (B, T, M, d); the LayerCache of this layer → (B, T, d). n_slots=0 is the plain
    transformer, bit-identical.
    """

    def __init__(self, dim, n_heads, n_slots=0, gate_value=True):
        super().__init__()
        self.n_heads, self.head_dim = n_heads, dim // n_heads
        self.w_q = Linear(dim, dim)
        self.w_k = Linear(dim, dim)
        self.w_v = Linear(dim, dim)
        self.w_o = Linear(dim, dim, std=0)  # the layer starts as the identity
        self.mixer = ValueMixer(dim, n_heads, n_slots, gate_value) if n_slots else None
        self.cache_shapes = [(n_heads, self.head_dim)] * 2  # k, V_S

    def values(self, x, memory):
        """What MoVE changes: V_S in place of V = x W_V, (B, T, H, d_h)."""
        v = self.w_v(x).unflatten(-1, (self.n_heads, -1))
        return v if self.mixer is None else self.mixer(x, v, memory)

    def queries_and_keys(self, x, rotary):
        heads = [w(x).unflatten(-1, (self.n_heads, -1)) for w in (self.w_q, self.w_k)]
        return [apply_rotary_emb(rms_norm(t), rotary) for t in heads]  # (B, T, H, d_h) each

    def forward(self, x, rotary, memory=None, cache=None):
        q, k = self.queries_and_keys(x, rotary)
        v, mask = self.values(x, memory), None
        if cache is not None:
            (k, v), mask = cache.append(k, v)
        return self.w_o(causal_attention(q, k, v, mask).flatten(-2))


class MoVELatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), with the memory in the latent:

        c_S = rms_norm(g_0 ⊙ c_KV + Σ_i g_i ⊙ M_i)        slots in R^kv_rank; the cache holds c_S, k_rope.

    Keys (their part without position) and values are both projected up from c_S. Mixing after W_up
    would need slots of width d, and a cache of them. Two points the paper's summary leaves open: we
    split the latent into H groups, and gate h acts on group h; and the RMS-norm comes after the mix. Keys
    have no norm of their own: if the latent were normed before the mix, they would grow with the memory.

    Same call as MoVEAttention, with rotary of width rope_dim and memory (B, T, M, kv_rank). kv_rank
    must be divisible by n_heads.
    """

    def __init__(self, dim, n_heads, n_slots=0, gate_value=True, *, kv_rank, rope_dim):
        super().__init__()
        self.n_heads, self.head_dim = n_heads, dim // n_heads
        self.kv_rank, self.rope_dim = kv_rank, rope_dim
        self.w_q = Linear(dim, n_heads * (self.head_dim + rope_dim))
        self.w_down = Linear(dim, kv_rank + rope_dim)  # x → c_KV and the rotary key that all heads share
        self.w_up = Linear(kv_rank, n_heads * 2 * self.head_dim)  # c_S → per head k_nope and v
        self.w_o = Linear(dim, dim, std=0)
        self.mixer = ValueMixer(dim, n_heads, n_slots, gate_value) if n_slots else None
        self.cache_shapes = [(kv_rank,), (rope_dim,)]  # c_S, k_rope

    def latent(self, x, c_kv, memory):
        """What MoVE changes: c_S, (B, T, kv_rank)."""
        if self.mixer is not None:
            c_kv = self.mixer(x, c_kv.unflatten(-1, (self.n_heads, -1)), memory).flatten(-2)
        return rms_norm(c_kv)

    def forward(self, x, rotary, memory=None, cache=None):
        q = self.w_q(x).unflatten(-1, (self.n_heads, -1))
        q_nope, q_rope = q.split([self.head_dim, self.rope_dim], dim=-1)
        q_rope = apply_rotary_emb(q_rope, rotary)  # (B, T, H, rope_dim)
        c_kv, k_rope = self.w_down(x).split([self.kv_rank, self.rope_dim], dim=-1)
        k_rope = apply_rotary_emb(k_rope.unsqueeze(2), rotary).squeeze(2)  # (B, T, rope_dim)
        c_s = self.latent(x, c_kv, memory)
        if cache is None:
            y = self.expanded(q_nope, q_rope, c_s, k_rope)
        else:
            (c_s, k_rope), mask = cache.append(c_s, k_rope)
            y = self.absorbed(q_nope, q_rope, c_s, k_rope, mask)
        return self.w_o(y.flatten(-2))

    def expanded(self, q_nope, q_rope, c_s, k_rope):
        """For training: make the keys and values of every head, then attend as usual."""
        k_nope, v = self.w_up(c_s).unflatten(-1, (self.n_heads, -1)).chunk(2, dim=-1)
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, self.n_heads, -1)
        return causal_attention(torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1), v)

    def absorbed(self, q_nope, q_rope, c_s, k_rope, mask):
        """For decoding: q·(W_K c) = (W_Kᵀ q)·c, and Σ a (W_V c) = W_V Σ a c. Attention reads the latent
        as key and as value, and no past token is projected up again. (QK-norm would not allow it.)"""
        w_k, w_v = self.w_up.weight.to(c_s.dtype).view(self.n_heads, -1, self.kv_rank).chunk(2, dim=1)
        q = torch.cat((torch.einsum("bthn,hnr->bthr", q_nope, w_k), q_rope), dim=-1)
        k = torch.cat((c_s, k_rope), dim=-1)  # (B, S, kv_rank + rope_dim), the same for all heads
        k, c_s = (t.unsqueeze(2).expand(-1, -1, self.n_heads, -1) for t in (k, c_s))
        scale = (self.head_dim + self.rope_dim) ** -0.5  # that of the expanded form
        return torch.einsum("bthr,hnr->bthn", causal_attention(q, k, c_s, mask, scale), w_v)


# ------------------------------------------------------------------------------------- the model


@dataclass
class GPTConfig:
    """What a GPT is made of. ValueError, in one line, for what cannot be built.

    memory and gate_value are the two switches of the paper's ablation:
        'move'  one bank of n_slots slots, shared by all layers (MoVE; gate_value is True by default)
        'lave'  n_slots tables, each read by one layer (LaVE, from modded-nanogpt; False by default)
        'none'  the plain transformer, the same as n_slots = 0
    gate_value: whether g_0 is a gate on the ordinary value, or 1.
    """
    vocab_size: int = 65536
    seq_len: int = 2048
    n_layers: int = 12
    n_heads: int = 6
    dim: int = 768
    attention: str = "mha"  # or 'mla'
    kv_rank: int | None = None  # MLA: width of the latent; by default dim // 2
    rope_dim: int | None = None  # MLA: width of the rotary key; by default half a head
    memory: str = "move"
    n_slots: int = 6
    gate_value: bool | None = None

    def __post_init__(self):
        for name in ("vocab_size", "seq_len", "n_layers", "n_heads", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.attention not in ("mha", "mla"):
            raise ValueError(f"attention must be 'mha' or 'mla', not {self.attention!r}")
        if self.memory not in ("move", "lave", "none"):
            raise ValueError(f"memory must be 'move', 'lave' or 'none', not {self.memory!r}")
        if self.n_slots < 0:
            raise ValueError(f"n_slots must be 0 or more, not {self.n_slots}")
        if self.memory == "none" or self.n_slots == 0:
            self.memory, self.n_slots = "none", 0
        if self.gate_value is None:
            self.gate_value = self.memory == "move"
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not divisible by n_heads {self.n_heads}")
        if self.attention == "mla":
            self.kv_rank = self.dim // 2 if self.kv_rank is None else self.kv_rank
            self.rope_dim = self.dim // self.n_heads // 2 if self.rope_dim is None else self.rope_dim
            if self.kv_rank < 1 or self.kv_rank % self.n_heads:
                raise ValueError(f"kv_rank {self.kv_rank} is no positive multiple of n_heads {self.n_heads}")
        else:
            self.kv_rank = self.rope_dim = None

    @classmethod
    def from_depth(cls, depth, scale=1.0, **overrides):
        """nanochat's family, d = 64·depth and d_h = 128, with MoVE-×scale: M = scale·depth/2 slots, at
        least 1. scale 0: no memory."""
        if depth < 1 or scale < 0:
            raise ValueError(f"depth must be at least 1 and scale 0 or more, not {depth} and {scale}")
        n_slots = max(1, round(scale * depth / 2)) if scale else 0
        n_heads = math.ceil(depth / 2)  # an odd depth rounds d up to whole heads
        shape = dict(n_layers=depth, n_heads=n_heads, dim=128 * n_heads, n_slots=n_slots)
        return cls(**{**shape, **overrides})

    @property
    def rotary_dim(self):
        """Width of what the rotary embedding turns: a head, or the rotary key of MLA."""
        return self.rope_dim if self.attention == "mla" else self.dim // self.n_heads

    @property
    def memory_dim(self):
        """Width of a slot: that of all values of a token, or of the latent."""
        return self.kv_rank if self.attention == "mla" else self.dim

    def layer_slots(self):
        """Number of slots that each layer mixes. LaVE shares out its M tables evenly, and the last layer
        always has one: M = L/2 gives every other layer one, M = L each layer one, M = 2L each two."""
        L, M = self.n_layers, self.n_slots
        if self.memory == "lave":
            return [(i + 1) * M // L - i * M // L for i in range(L)]
        return [M] * L


class Block(nn.Module):
    """x + attention(rms_norm(x)), then x + MLP(rms_norm(x)) with ReLU² in between: (B, T, d) → the same.

    A block of LaVE reads a table of its own, which GPT makes, instead of the shared memory.
    """

    def __init__(self, config, layer):
        super().__init__()
        c, n_slots = config, config.layer_slots()[layer]
        if c.attention == "mha":
            self.attention = MoVEAttention(c.dim, c.n_heads, n_slots, c.gate_value)
        else:
            self.attention = MoVELatentAttention(c.dim, c.n_heads, n_slots, c.gate_value,
                                                 kv_rank=c.kv_rank, rope_dim=c.rope_dim)
        self.mlp_up = Linear(c.dim, 4 * c.dim)
        self.mlp_down = Linear(4 * c.dim, c.dim, std=0)
        self.table = None

    def forward(self, x, idx, rotary, memory, cache):
        if self.table is not None:
            memory = self.table(idx)
        x = x + self.attention(rms_norm(x), rotary, memory, cache)
        return x + self.mlp_down(F.relu(self.mlp_up(rms_norm(x))).square())


def softcap(z, limit=15.0):
    """limit · tanh(z / limit), at least float32: logits within ±limit, as in Gemma 2 (arXiv 2408.00118)."""
    return limit * torch.tanh(z.to(torch.promote_types(z.dtype, torch.float32)) / limit)


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None, noise=None):
    """Samples an id from each row of logits (B, V) → (B,): the most probable one at temperature 0;
    among the k most probable, and those that are as probable as the k-th, with top_k; with top_p by nucleus
    sampling (arXiv 1904.09751).

    noise (B, V): exponential random numbers, by default of the generator. The id with the largest p / noise
    is a sample of p: of clocks that ring at rates p, each is the first one with probability p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    p = logits.softmax(-1)
    if top_p is not None:
        descending, order = p.sort(descending=True)
        before = descending.cumsum(-1) - descending  # of the more probable ones
        out = (before >= top_p) & (before > 0)
        p = p.masked_fill(out.scatter(1, order, out), 0)
    if noise is None:
        noise = torch.empty_like(p).exponential_(generator=generator)
    return (p / noise.clamp(min=1e-30)).argmax(-1)


class GPT(nn.Module):
    """A decoder-only transformer in nanochat's style, with MoVE, LaVE or no memory.

    RMS-norm without parameters, also after the embedding; rotary positions; ReLU² MLP; untied head;
    logits within ±15; no biases; each layer starts as the identity.
    dtype: of the activations, by default the parameters'; bfloat16 is the fast one on a GPU.
    positions (seq_len, axes): see rotary_embedding; by default 0, 1, 2, … on one axis. The state_dict
    holds their cos and sin. The same seed gives the same transformer whatever its memory is.
    bank: the class of the banks, or a function like it, for banks that live elsewhere (move_store.py).
    """

    def __init__(self, config, dtype=None, positions=None, bank=ValueBank):
        super().__init__()
        self.config, self.dtype = config, dtype
        V, d = config.vocab_size, config.dim
        self.embedding = nn.Embedding(V, d)  # starts as N(0, 1)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.head = Linear(d, V, std=0.001)
        self.bank = None  # the memory comes last: the random numbers of all else do not depend on it
        if config.memory == "move":
            self.bank = bank(V, config.n_slots, config.memory_dim)
        elif config.memory == "lave":
            for block, n_slots in zip(self.blocks, config.layer_slots(), strict=True):
                block.table = bank(V, n_slots, config.memory_dim) if n_slots else None
        if positions is None:
            positions = torch.arange(config.seq_len).unsqueeze(1)
        if len(positions) != config.seq_len:
            raise ValueError(f"positions must be {config.seq_len} (seq_len), not {len(positions)}")
        cos, sin = rotary_embedding(positions, config.rotary_dim)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, idx, targets=None, cache=None):
        """Token ids (B, T), int64 in [0, V) → logits (B, T, V), at least float32; or, given the next ids
        `targets` (B, T), their mean cross-entropy in nats. Targets of -100 do not count.

        With a cache, idx continues what it holds. ValueError beyond seq_len tokens, RuntimeError for
        targets of another shape.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.logits(x)
        if targets.shape != idx.shape:
            raise RuntimeError(f"targets {tuple(targets.shape)} do not fit token ids {tuple(idx.shape)}")
        return self.loss(x, targets)

    def hidden(self, idx, cache=None):
        """What the last block gives for token ids (B, T): (B, T, d)."""
        T = idx.size(1)
        end = T if cache is None or torch.compiler.is_compiling() else cache.length + T
        if end > self.config.seq_len:
            raise ValueError(f"{end} tokens are more than this model's seq_len, {self.config.seq_len}")
        positions = slice(T) if cache is None else cache.positions(T)
        rotary = self.cos[positions], self.sin[positions]
        x = self.embed(idx)
        memory = None if self.bank is None else self.bank(idx)  # equation 1, once for all layers
        layer_caches = [None] * len(self.blocks) if cache is None else cache.layers
        for block, layer_cache in zip(self.blocks, layer_caches, strict=True):
            x = block(x, idx, rotary, memory, layer_cache)
        if cache is not None:
            cache.advance(T)
        return x

    def embed(self, idx):
        """What the first block gets: (B, T, d)."""
        return rms_norm(self.embedding(idx).to(self.dtype or self.embedding.weight.dtype))

    def logits(self, x):
        """Of what the last block gives, x (B, T, d): (B, T, V), at least float32."""
        return softcap(self.head(rms_norm(x)))

    def loss(self, x, targets):
        """Mean cross-entropy in nats of the logits of x (B, T, d) for targets (B, T) → ()."""
        return F.cross_entropy(self.logits(x).flatten(0, 1), targets.flatten())

    def with_blocks(self, blocks):
        """A model that shares all parts and parameters with this one, but calls these functions in place of
        its blocks: (x, idx, rotary, memory, cache) → x. They may be its blocks, compiled."""
        twin = copy.copy(self)
        twin._modules = {name: part for name, part in self._modules.items() if name != "blocks"}
        twin.blocks = blocks
        return twin

    def new_cache(self, batch, max_len):
        """An empty KVCache for `batch` sequences of up to max_len tokens."""
        weight = self.embedding.weight
        return KVCache([block.attention for block in self.blocks], batch, max_len, self.dtype or weight.dtype,
                       weight.device)

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, n_ids=None,
                 generator=None):
        """Continues idx (B, T ≥ 1) and yields the next ids (B,), one token at a time.

        temperature, top_k, top_p, generator: see sample. n_ids: sample only ids below it, where the
        vocabulary is padded. ValueError for numbers out of range, and if the tokens to be read, which
        are all but the last new one, exceed seq_len.
        """
        B, T = idx.shape
        if T < 1 or max_new_tokens < 0 or T + max_new_tokens - 1 > self.config.seq_len:
            raise ValueError(f"{T} tokens and {max_new_tokens} new ones do not fit: this model reads 1 to "
                             f"{self.config.seq_len} tokens (seq_len), and the last new one is not read")
        ids = self.config.vocab_size if n_ids is None else n_ids
        if not (temperature == 0 or 1e-6 <= temperature < math.inf) or not 1 <= ids <= self.config.vocab_size:
            raise ValueError(f"temperature must be 0, or 1e-6 or more, and n_ids from 1 to "
                             f"{self.config.vocab_size}, not {temperature} and {n_ids}")
        if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise ValueError(f"top_k must be 1 or more and top_p in (0, 1], not {top_k} and {top_p}")
        cache, idx = self.new_cache(B, T + max_new_tokens - 1), idx.clone()

        def pick(logits, noise):
            return sample(logits[:, :ids], temperature, top_k, top_p, noise=noise)

        step = self.decoding_step(pick, max_new_tokens)
        for _ in range(max_new_tokens):  # noise is an input of the step: a captured step has no generator
            noise = torch.empty(B, ids, device=idx.device, dtype=torch.float32)
            noise.exponential_(generator=generator)
            new = step(idx, cache, noise)
            yield new
            idx = new.unsqueeze(1)

    def decoding_step(self, pick, steps):
        """step(idx (B, T), cache, noise) → the next ids (B,), by pick(logits (B, V), noise). It is to be
        taken `steps` times: move_fast.py has a faster one, which pays for many."""
        return lambda idx, cache, noise: pick(self.logits(self.hidden(idx, cache)[:, -1:])[:, -1], noise)

    def parameter_counts(self):
        """Number of parameters by purpose: embedding, matrices, head, router, memory, total."""
        def count(module, kind):
            return sum(p.numel() for m in module.modules() if isinstance(m, kind) for p in m.parameters())

        memory, router = count(self, ValueBank), count(self, ValueMixer)
        counts = dict(embedding=count(self.embedding, nn.Embedding),
                      matrices=count(self.blocks, Linear) - router, head=count(self.head, Linear),
                      router=router, memory=memory)
        return {**counts, "total": sum(counts.values())}

    def flops_per_token(self):
        """Multiplications and additions of a forward pass for one token of a sequence of seq_len, by
        part: matrices, attention, head, router, mix. Training costs three times as much.

        attention counts all T positions, as is the custom (PaLM, arXiv 2204.02311), not the half
        that causality leaves.
        """
        c, counts = self.config, self.parameter_counts()
        q_dim = c.dim + c.n_heads * (c.rope_dim or 0)  # width of all queries; that of all values is d
        gates = sum(m + c.gate_value for m in c.layer_slots() if m)
        return dict(
            matrices=2 * counts["matrices"],
            attention=2 * c.n_layers * c.seq_len * (q_dim + c.dim),
            head=2 * counts["head"],
            router=2 * counts["router"],
            mix=2 * gates * c.memory_dim,
        )


def memory_parameter_groups(model, lr_scale=1.0):
    """AdamW's parameter groups for any model that holds banks and routers: those of the banks, and the last
    one for the routers; [] if it has no bank. ValueError for a bank without a ValueMixer, whose router says
    how wide the model is: give it a group of its own.

    Each group holds params, lr, betas, eps and weight_decay; the model's other parameters are not in them.
    The memory is worth little at a host's usual rates: a bank needs a high rate and no weight decay. The
    steps of M slots add up in V_S, so their rate falls with M: 0.15 · M^-½. Both rates are times
    (d / 768)^-½. Where matrices are trained by Muon, give it the routers, too: under AdamW the gates of a
    head move alike, and more slots help less. Muon's rate for them, at any d, is 0.05 · min(1, rows /
    columns)^½ of the router's matrix; for rows > columns Muon itself has the factor (rows / columns)^½.
    """
    mixers = [m for m in model.modules() if isinstance(m, ValueMixer)]
    banks = dict.fromkeys(m.weight for m in model.modules() if isinstance(m, ValueBank))  # (V, M, d) each
    routers = list(dict.fromkeys(p for mixer in mixers for p in mixer.router.parameters()))
    widths = [p.size(-1) for p in routers if p.ndim == 2]
    if not banks:
        return []
    if not widths:
        raise ValueError("the model has a ValueBank but no ValueMixer whose router has a matrix; give the "
                         "bank a parameter group with a rate of 0.15 · (d / 768)^-½ · M^-½, no weight decay")
    k = lr_scale * (widths[0] / 768) ** -0.5
    shared = dict(betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
    groups = [dict(params=[bank for bank in banks if bank.size(1) == M], lr=0.15 * k * M ** -0.5, **shared)
              for M in sorted({bank.size(1) for bank in banks})]
    return [*groups, dict(params=routers, lr=0.004 * k, **shared)]
