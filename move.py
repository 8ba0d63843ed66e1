"""MoVE: Mixture of Value Embeddings (arXiv 2601.22887). A memory that grows without the compute.

One bank E of learned value embeddings, indexed by token id, is shared by all attention layers.
Each layer's router decides, per head, how much of the ordinary value and of each slot to use:

    M_t = E[w_t]                              the memory of token t: an index, no product     (1)
    g   = 2 σ(x W_G)                          the gates, in (0, 2), exactly 1 at the start    (2)
    V_S = g_0 ⊙ V + Σ_{i=1..M} g_i ⊙ M_i      the values that attention sees, V = x W_V       (3)

Shapes, everywhere in this file
    B  batch            T  tokens in a sequence        V  vocabulary (where it is a size)
    L  layers           d  model width                 H  heads            d_h = d / H
    M  memory slots a token                            S  tokens attended to, S ≥ T with a cache

Top to bottom: the bank (1), the mix (3), the router (2), a KV cache, multi-head attention, latent
attention (MLA), and a GPT whose layers share one bank. `ValueBank` and `ValueMixer` are what
another model needs. This file needs torch only and can be copied alone; with move_triton.py beside it, a CUDA device
mixes by that file's kernels, which compute the same without ever writing M_t down (`mix="auto"`).
"""
import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

try:
    if __package__:
        from . import move_triton
    else:
        import move_triton
except (ImportError, AttributeError):  # it is not here, or there is no Triton, or an old one: the reference does it all
    move_triton = None


class Linear(nn.Linear):
    """y = x Wᵀ without a bias, in the dtype of x: (..., n_in) → (..., n_out).

    The weight stays in float32 for the optimizer; bfloat16 activations get bfloat16 products.
    It starts normal with standard deviation `std`, by default n_in^-½, which keeps the variance.
    """

    def __init__(self, n_in, n_out, std=None):
        self.std = n_in ** -0.5 if std is None else std
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self):
        if self.std == 0:  # draws nothing: a router leaves the random numbers of other layers alone
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.std)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def norm(x):
    """RMS-norm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


# ------------------------------------------------------------------- the memory, equations 1 to 3


class ValueBank(nn.Module):
    """The bank E of equation 1: `weight` (V, M, d), one per model, shared by its attention layers.

    bank(idx): token ids (B, T), int64 in [0, V) → the memory of these tokens, to be handed to the mixers:
    (B, T, M, d), in the weight's dtype. An id outside the vocabulary raises IndexError on a CPU and stops
    a CUDA device. mix: 'reference', or 'fused' for the same by move_triton.py, where the memory is a
    move_triton.FusedMemory; or 'auto', fused on a CUDA device if Triton is there. ValueError if it is not.

    The start must be random: with slots all zero and gates all alike, every slot of a token would
    get the same gradient for ever, and M slots would act as one. And it must be small: gates of 1
    add up M slots, so Var(V_S) starts at Var(V) + M·std², here 1 + 0.026 for M = 64 and Var(V) = 1.
    """

    def __init__(self, vocab_size, n_slots, dim, std=0.02, mix="auto"):
        super().__init__()
        if mix not in ("auto", "reference", "fused"):
            raise ValueError(f"mix must be 'auto', 'reference' or 'fused', not {mix!r}")
        self.mix, self.gradient = mix, None
        self.weight = nn.Parameter(torch.empty(vocab_size, n_slots, dim))
        nn.init.normal_(self.weight, std=std)

    @property
    def fused(self):
        """Whether move_triton.py mixes."""
        if self.mix == "auto":
            return move_triton is not None and self.weight.is_cuda
        if self.mix == "fused" and not (move_triton is not None and move_triton.runs_on(self.weight.device)):
            raise ValueError("mix='fused' needs move_triton.py, Triton and a CUDA device")
        return self.mix == "fused"

    def forward(self, idx):
        if self.fused:
            in_place = self.gradient is not None and self.weight.grad is self.gradient
            return move_triton.FusedMemory(self.weight, idx, self.gradient if in_place else None)
        memory = F.embedding(idx, self.weight.flatten(1))  # (B, T, M·d)
        return memory.unflatten(-1, self.weight.shape[1:])

    def zero_gradient(self):
        """Fused: makes weight.grad zeros that backward adds to in place, instead of a new (V, M, d) tensor each time.
        For a training loop to call before the first forward pass of each step, after any optimizer.zero_grad(); where
        the model is compiled, each forward pass is then followed by its backward pass. Setting weight.grad to None ends it."""
        if self.fused and self.weight.requires_grad:
            kept = self.gradient
            fits = kept is not None and (kept.shape, kept.dtype, kept.device) == (self.weight.shape, self.weight.dtype, self.weight.device)
            self.gradient = self.weight.grad = kept.zero_() if fits else torch.zeros_like(self.weight)


def mix_values(v, memory, gates):
    """Equation 3: V_S = g_0 ⊙ V + Σ_i g_i ⊙ M_i, per token and head.

    v (B, T, H, d_h), memory (B, T, M, H·d_h), gates (B, T, H, M+1) → (B, T, H, d_h). RuntimeError for other shapes.
    """
    if memory.shape[:2] != v.shape[:2] or gates.shape != (*v.shape[:3], memory.size(2) + 1):  # which might broadcast
        raise RuntimeError(f"values {tuple(v.shape)}, memory {tuple(memory.shape)} and gates {tuple(gates.shape)} do not fit")
    memory = memory.unflatten(-1, v.shape[-2:])  # (B, T, M, H, d_h)
    g_0 = gates[..., :1]  # (B, T, H, 1)
    g = gates[..., 1:].transpose(-2, -1).unsqueeze(-1)  # (B, T, M, H, 1)
    # A product and a sum, not an einsum: the compiler makes one pass over the memory out of it.
    return g_0 * v + (g * memory).sum(dim=2)


class ValueMixer(nn.Module):
    """The router of one layer and its mix, equations 2 and 3.

    dim: width d of the layer's input. n_heads: the number of *value* heads, so that grouped-query
    attention works as it is. n_slots: M. gate_value=False leaves V as it is (g_0 = 1), as in LaVE.

    mixer(x, v, memory): input (B, T, d), values (B, T, H, d_h), what the bank gave for the tokens
    → V_S (B, T, H, d_h), in the dtype of v. Raises RuntimeError where the shapes do not fit. v may also be
    the Linear that makes the values from x: where the mix is fused, one product then makes values and gates.
    """

    def __init__(self, dim, n_heads, n_slots, gate_value=True):
        super().__init__()
        self.n_heads, self.gate_value = n_heads, gate_value
        # W_G starts at zero: 2σ(0) = 1, nothing is amplified and nothing suppressed.
        self.router = Linear(dim, n_heads * (n_slots + gate_value), std=0)

    def gates(self, x):
        """(B, T, d) → (B, T, H, M+1): gate 0 for the ordinary value, gates 1..M for the slots."""
        # The router's outputs lie slot by slot, as the memory does: its compiled passes are faster so.
        g = 2 * torch.sigmoid(self.router(x)).unflatten(-1, (-1, self.n_heads)).transpose(-2, -1)
        return g if self.gate_value else F.pad(g, (1, 0), value=1.0)

    def forward(self, x, v, memory):
        if isinstance(v, nn.Module) and not isinstance(v, Linear):
            raise TypeError(f"v must be values (B, T, H, d_h) or a move.Linear, not {type(v).__name__}")
        if not isinstance(memory, torch.Tensor):  # a move_triton.FusedMemory
            v = v.weight if isinstance(v, Linear) else v
            return memory.values(x, v, self.router.weight, self.n_heads, self.gate_value)
        if isinstance(v, Linear):
            v = v(x).unflatten(-1, (self.n_heads, -1))
        return mix_values(v, memory.to(v.dtype), self.gates(x).to(v.dtype))


# ------------------------------------------------------------------------------------- attention


def rotary_angles(places, dim, base=10000.0):
    """cos and sin of the rotary angles (arXiv 2104.09864), each (T, 1, dim/2) in float32.

    places (T, axes): where the tokens stand, on a line (text) or in rows and columns (a picture). The
    dim/2 pairs are dealt out to the axes evenly.
    """
    dim_of_axis = dim // places.size(1)
    frequency = base ** (-torch.arange(0, dim_of_axis, 2) / dim_of_axis)
    angle = (places[:, :, None] * frequency).flatten(1).unsqueeze(1)
    return angle.cos(), angle.sin()


def rotate(x, rotary):
    """Turns the pairs (x_j, x_{j + dim/2}) by their position's angle: (B, T, H, dim) → the same."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)


def causal_attention(q, k, v, scale=None):
    """softmax(q kᵀ · scale) v, where the T queries are the last of the S tokens and see no later one.

    q (B, T, H, ·), k and v (B, S, H, ·) → (B, T, H, ·). scale defaults to (width of q)^-½.
    """
    T, S = q.size(1), k.size(1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask, is_causal = None, False  # a single new token sees all
    if T == S:
        is_causal = True
    elif T > 1:  # new tokens behind a filled cache; is_causal would align them with the first keys
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)
    return y.transpose(1, 2)


class KVCache:
    """What generation keeps of past tokens: `n_layers` layers of preallocated tensors.

    shapes: what one token of one layer leaves, as the attention says in `cache_shapes`: its key and
    its V_S for MHA, its c_S and its rotary key for MLA. The memory is mixed in before, so a token is
    looked up once, however many follow it, and the cache has the same size for every M.
    """

    def __init__(self, n_layers, batch, max_len, shapes, dtype=torch.float32, device="cpu"):
        self.length, self.max_len = 0, max_len
        self.stores = [torch.empty(n_layers, batch, max_len, *shape, dtype=dtype, device=device)
                       for shape in shapes]

    @property
    def bytes_per_token(self):
        return sum(s[:, 0, 0].numel() * s.element_size() for s in self.stores)

    def append(self, layer, *new):
        """Stores (B, T, ...) behind what the layer holds; returns all of it, (B, S, ...) each.

        The model moves `length` on by T when every layer has appended. IndexError when it is full.
        """
        end = self.length + new[0].size(1)
        if end > self.max_len:
            raise IndexError(f"KV cache of {self.max_len} tokens cannot take token {end}")
        for store, tensor in zip(self.stores, new):
            store[layer, :, self.length:end] = tensor
        return [store[layer, :, :end] for store in self.stores]


class MoVEAttention(nn.Module):
    """Causal multi-head attention, rotary, with QK-norm, whose values are mixed by equation 3.

    attention(x, rotary, memory=None, cache=None): x (B, T, d), the (cos, sin) of its T positions
    with width d_h, memory (B, T, M, d) → (B, T, d). n_slots=0 is the plain transformer, to the bit.
    layer: which layer of the cache is this one's.
    """

    def __init__(self, dim, n_heads, n_slots=0, gate_value=True, layer=0):
        super().__init__()
        self.n_heads, self.head_dim, self.layer = n_heads, dim // n_heads, layer
        self.w_q = Linear(dim, dim)
        self.w_k = Linear(dim, dim)
        self.w_v = Linear(dim, dim)
        self.w_o = Linear(dim, dim, std=0)  # the layer starts as the identity
        self.mixer = ValueMixer(dim, n_heads, n_slots, gate_value) if n_slots else None
        self.cache_shapes = [(n_heads, self.head_dim)] * 2  # k, V_S

    def forward(self, x, rotary, memory=None, cache=None):
        heads = (self.n_heads, self.head_dim)
        q, k = F.linear(x, torch.cat((self.w_q.weight, self.w_k.weight)).to(x.dtype)).chunk(2, dim=-1)
        q, k = (rotate(norm(t.unflatten(-1, heads)), rotary) for t in (q, k))  # (B, T, H, d_h)
        if self.mixer is None:
            v = self.w_v(x).unflatten(-1, heads)
        else:
            v = self.mixer(x, self.w_v, memory)  # V_S, of V = x W_V
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self.w_o(causal_attention(q, k, v).flatten(-2))


class MoVELatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), the memory mixed into the latent:

        c_S = g_0 ⊙ c_KV + Σ_i g_i ⊙ M_i        slots in R^kv_rank; the cache holds c_S and k_rope.

    Keys (their part without position) and values are both projected up from c_S. Mixing after that
    would need slots of full width and a cache of them. Our reading of a point the paper's summary
    leaves open: the latent is split into H groups, and gate h acts on group h.

    Same call as MoVEAttention, with rotary of width rope_dim and memory (B, T, M, kv_rank). kv_rank
    must be divisible by n_heads. No QK-norm: keys that are normed could not be absorbed.
    """

    def __init__(self, dim, n_heads, n_slots=0, gate_value=True, layer=0, *, kv_rank, rope_dim):
        super().__init__()
        self.n_heads, self.head_dim, self.layer = n_heads, dim // n_heads, layer
        self.kv_rank, self.rope_dim = kv_rank, rope_dim
        self.w_q = Linear(dim, n_heads * (self.head_dim + rope_dim))
        self.w_down = Linear(dim, kv_rank + rope_dim)  # x → c_KV and the rotary key all heads share
        self.w_up = Linear(kv_rank, n_heads * 2 * self.head_dim)  # c_S → per head k_nope and v
        self.w_o = Linear(dim, dim, std=0)
        self.mixer = ValueMixer(dim, n_heads, n_slots, gate_value) if n_slots else None
        self.cache_shapes = [(kv_rank,), (rope_dim,)]  # c_S, k_rope

    def forward(self, x, rotary, memory=None, cache=None):
        H, d_h = self.n_heads, self.head_dim
        q_nope, q_rope = self.w_q(x).unflatten(-1, (H, -1)).split([d_h, self.rope_dim], dim=-1)
        q_rope = rotate(q_rope, rotary)  # (B, T, H, rope_dim)
        c, k_rope = self.w_down(x).split([self.kv_rank, self.rope_dim], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(2), rotary).squeeze(2)  # (B, T, rope_dim)
        c = norm(c)
        if self.mixer is not None:
            c = self.mixer(x, c.unflatten(-1, (H, -1)), memory).flatten(-2)  # c_S (B, T, kv_rank)
        if cache is None:
            y = self.expanded(q_nope, q_rope, c, k_rope)
        else:
            y = self.absorbed(q_nope, q_rope, *cache.append(self.layer, c, k_rope))
        return self.w_o(y.flatten(-2))

    def expanded(self, q_nope, q_rope, c, k_rope):
        """For training: make the keys and values of every head, then attend as usual."""
        k_nope, v = self.w_up(c).unflatten(-1, (self.n_heads, -1)).chunk(2, dim=-1)
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, self.n_heads, -1)
        return causal_attention(torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1), v)

    def absorbed(self, q_nope, q_rope, c, k_rope):
        """For decoding: q·(W_K c) = (W_Kᵀ q)·c, and Σ a (W_V c) = W_V Σ a c. The latent is attended
        to as it is, key and value in one, and no past token is ever projected up again."""
        w_k, w_v = self.w_up.weight.to(c.dtype).view(self.n_heads, -1, self.kv_rank).chunk(2, dim=1)
        q = torch.cat((torch.einsum("bthn,hnr->bthr", q_nope, w_k), q_rope), dim=-1)
        k = torch.cat((c, k_rope), dim=-1)  # (B, S, kv_rank + rope_dim), the same for all heads
        k, c = (t.unsqueeze(2).expand(-1, -1, self.n_heads, -1) for t in (k, c))
        scale = (self.head_dim + self.rope_dim) ** -0.5  # that of the expanded form
        return torch.einsum("bthr,hnr->bthn", causal_attention(q, k, c, scale), w_v)


# ------------------------------------------------------------------------------------- the model


@dataclass
class GPTConfig:
    """What a GPT is made of. Raises ValueError, in one line, for what cannot be built.

    memory and gate_value are the two switches of the paper's ablation:
        'move'  one bank of n_slots slots, shared by all layers      with gate_value: MoVE
        'lave'  the same n_slots tables dealt out to the layers      without it: LaVE (modded-nanogpt)
        'none'  the plain transformer, the same as n_slots = 0
    gate_value is by default what the method has: True for 'move', False for 'lave'.
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
    grid: tuple[int, int] | None = None  # of a picture: rows and columns of its codes; seq_len is their product

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
                raise ValueError(f"kv_rank {self.kv_rank} is not a positive multiple of n_heads {self.n_heads}")
        else:
            self.kv_rank = self.rope_dim = None
        axes = 1 if self.grid is None else 2
        if self.rotary_dim < 1 or self.rotary_dim % (2 * axes):
            raise ValueError("rotary embeddings turn pairs: the width of a head (MHA) or rope_dim (MLA) "
                             f"must be a multiple of {2 * axes}, not {self.rotary_dim}")
        if self.grid is not None and self.seq_len != self.grid[0] * self.grid[1]:
            raise ValueError(f"a grid of {self.grid[0]} × {self.grid[1]} codes needs a seq_len of as many, not {self.seq_len}")

    @classmethod
    def from_depth(cls, depth, scale=1.0, **overrides):
        """nanochat's family: d = 64·depth, d_h = 128; and the scale of the memory, MoVE-×scale:
        M = scale·depth/2, at least 1, as many parameters as LaVE with M tables; 0 for none."""
        if depth < 1 or scale < 0:
            raise ValueError(f"depth must be at least 1 and scale 0 or more, not {depth} and {scale}")
        n_slots = max(1, round(scale * depth / 2)) if scale else 0
        n_heads = math.ceil(depth / 2)  # an odd depth rounds d up to whole heads
        shape = dict(n_layers=depth, n_heads=n_heads, dim=128 * n_heads, n_slots=n_slots)
        return cls(**{**shape, **overrides})

    @property
    def rotary_dim(self):
        """Width of what is turned by its position: a head, or the rotary key of MLA."""
        return self.rope_dim if self.attention == "mla" else self.dim // self.n_heads

    @property
    def memory_dim(self):
        """Width of a slot: that of all values of a token, or of the latent."""
        return self.kv_rank if self.attention == "mla" else self.dim

    def places(self):
        """Where the tokens of a sequence stand, (seq_len, axes): text on a line. The sequence of a picture
        is its class and then its codes, row by row; the class stands at (0, 0), off the grid."""
        if self.grid is None:
            return torch.arange(self.seq_len).unsqueeze(1)
        codes = torch.cartesian_prod(*(torch.arange(1, n + 1) for n in self.grid))
        return torch.cat((torch.zeros(1, 2, dtype=torch.long), codes[:-1]))  # the last code is never read

    def layer_slots(self):
        """Slots that each layer mixes. LaVE deals its M tables out evenly, the last layer always
        included: M = L/2 gives every other layer one, M = L each layer one, M = 2L each two."""
        L, M = self.n_layers, self.n_slots
        if self.memory == "lave":
            return [(i + 1) * M // L - i * M // L for i in range(L)]
        return [M] * L


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)) with ReLU² in between: (B, T, d) → the same."""

    def __init__(self, config, layer, n_slots):
        super().__init__()
        c = config
        if c.attention == "mha":
            self.attention = MoVEAttention(c.dim, c.n_heads, n_slots, c.gate_value, layer)
        else:
            self.attention = MoVELatentAttention(c.dim, c.n_heads, n_slots, c.gate_value, layer,
                                                 kv_rank=c.kv_rank, rope_dim=c.rope_dim)
        self.mlp_up = Linear(c.dim, 4 * c.dim)
        self.mlp_down = Linear(4 * c.dim, c.dim, std=0)

    def forward(self, x, rotary, memory, cache):
        x = x + self.attention(norm(x), rotary, memory, cache)
        return x + self.mlp_down(F.relu(self.mlp_up(norm(x))).square())


CAP = 15.0  # of the logits
CHUNK = 8192  # tokens of a step of the loss


def cap(z):
    """15·tanh(z / 15), in float32 at least: soft-capped logits, as in Gemma 2 (arXiv 2408.00118)."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return CAP * (2 * torch.sigmoid(2 / CAP * z) - 1)  # tanh(u) = 2σ(2u) - 1, which is faster when compiled


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy in nats of the capped logits of x (N, d) for a head's weight (V, d) and targets (N,), int64 in
    [0, V) or -100 for those that do not count → (), at least float32.

    The logits (N, V) are by far the largest tensor of a training step. So CHUNK tokens at a time get theirs, the loss
    and, at once, its gradients, which only have to be scaled later; compiled, no logits are written down in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        w, n = weight.to(x.dtype), (targets != -100).sum()  # n: how many count
        loss, d_x, d_w = 0, [], 0
        for x, t in zip(x.split(CHUNK), targets.split(CHUNK)):
            counts = (t != -100).unsqueeze(1)
            t = torch.where(counts, t.unsqueeze(1), 0)
            logits = cap(x @ w.T)
            total = logits.exp().sum(-1, keepdim=True).log()  # what is capped needs no maximum taken off first
            loss += torch.where(counts, total - logits.gather(1, t), 0).sum() / n
            if with_gradients:
                d = (logits - total).exp() - (torch.arange(len(w), device=t.device) == t).to(logits.dtype)
                d = (torch.where(counts, d, 0) * (1 - (logits / CAP).square())).to(w.dtype)
                d_x.append(d @ w)
                d_w += (d.T @ x).to(weight.dtype)
        if with_gradients:
            ctx.save_for_backward(torch.cat(d_x), d_w, n)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        d_x, d_w, n = ctx.saved_tensors
        d = d / n.clamp(min=1)
        return (d * d_x).to(d_x.dtype), d * d_w, None, None


@torch.compiler.allow_in_graph  # as it stands: PyTorch 2.11's compiler, looking into it, takes its gradient for zero
def linear_cross_entropy(x, weight, targets):
    """LinearCrossEntropy, with its gradients where autograd is on."""
    return LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())


@contextlib.contextmanager
def without_cudnn_attention():
    """For decoding: cuDNN's attention makes a plan, of 20 ms on an H200, for every length of the cache."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def draw(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draws an id from each row of logits (B, V) → (B,): the likeliest if temperature is 0; with top_k among
    the k likeliest; with top_p among the fewest whose probabilities add up to p (arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    p = logits.softmax(-1)
    if top_p is not None:
        falling, order = p.sort(descending=True)
        before = falling.cumsum(-1) - falling  # of those that are likelier
        p = p.masked_fill((before >= top_p).scatter(1, order, before >= top_p), 0)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


class GPT(nn.Module):
    """A decoder-only transformer in nanochat's style, with MoVE, LaVE or no memory.

    RMS-norm without parameters, also after the embedding; rotary positions; ReLU² MLP; untied head;
    logits capped at ±15; no biases; each layer starts as the identity.
    dtype: that of the activations, by default the parameters'; bfloat16 is the fast one on a GPU. mix: see ValueBank;
    LaVE's tables have one layer each and are always read by the reference.
    The same seed gives the same transformer whatever its memory, which is drawn last.
    """

    def __init__(self, config, dtype=None, mix="auto"):
        super().__init__()
        self.config, self.dtype = config, dtype
        V, d = config.vocab_size, config.dim
        slots = config.layer_slots()
        self.embedding = nn.Embedding(V, d)  # starts as N(0, 1)
        self.blocks = nn.ModuleList(Block(config, i, m) for i, m in enumerate(slots))
        self.head = Linear(d, V, std=0.001)
        if config.memory == "move":
            self.banks = nn.ModuleList([ValueBank(V, config.n_slots, config.memory_dim, mix=mix)])
        elif config.memory == "lave":
            self.banks = nn.ModuleList(ValueBank(V, m, config.memory_dim, mix="reference") if m else None for m in slots)
        else:
            self.banks = nn.ModuleList([None])
        cos, sin = rotary_angles(config.places(), config.rotary_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, idx, targets=None, cache=None):
        """Token ids (B, T), int64 in [0, V) → logits (B, T, V), at least float32, or, given the next ids
        `targets` (B, T), their mean cross-entropy in nats. Targets of -100 do not count.

        With a cache, idx continues what it holds. ValueError beyond seq_len tokens.
        """
        start = 0 if cache is None else cache.length
        end = start + idx.size(1)
        if end > self.config.seq_len:
            raise ValueError(f"{end} tokens are more than this model's seq_len, {self.config.seq_len}")
        rotary = self.cos[start:end], self.sin[start:end]
        x = norm(self.embedding(idx).to(self.dtype or self.embedding.weight.dtype))  # (B, T, d)
        # Equation 1. All layers of MoVE share one gather; in LaVE each has its own table, or none.
        memory = [None if bank is None else bank(idx) for bank in self.banks]
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, memory[i % len(memory)], cache)
        if cache is not None:
            cache.length = end
        x = norm(x)
        if targets is not None:
            return linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten())
        return cap(self.head(x))

    def new_cache(self, batch, max_len):
        """An empty KVCache for `batch` sequences of up to max_len tokens."""
        weight = self.embedding.weight
        return KVCache(len(self.blocks), batch, max_len, self.blocks[0].attention.cache_shapes,
                       self.dtype or weight.dtype, weight.device)

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, n_ids=None,
                 idx_without=None, cfg_scale=1.0, generator=None):
        """Continues idx (B, T ≥ 1) and yields the next ids (B,), one token at a time.

        temperature, top_k, top_p: see draw. n_ids: draw only ids below it, where the others are padding
        or no codes. generator: the torch.Generator to draw from.
        Classifier-free guidance (arXiv 2207.12598): idx_without (B, T) is idx without its condition,
        and logits = without + cfg_scale · (with − without). At a cfg_scale of 1 there is nothing to do.
        ValueError if the tokens to be read, which are all but the last new one, exceed seq_len.
        """
        B, T = idx.shape
        if T + max_new_tokens - 1 > self.config.seq_len:
            raise ValueError(f"{T} tokens and {max_new_tokens} new ones, the last of which is not read, are more "
                             f"than this model's seq_len, {self.config.seq_len}")
        guided = idx_without is not None and cfg_scale != 1
        if guided:
            idx = torch.cat((idx, idx_without))
        cache = self.new_cache(idx.size(0), T + max_new_tokens - 1)
        for _ in range(max_new_tokens):
            with without_cudnn_attention():
                logits = self(idx, cache=cache)[:, -1, :n_ids]
            if guided:
                logits, without = logits.chunk(2)
                logits = without + cfg_scale * (logits - without)
            new = draw(logits, temperature, top_k, top_p, generator)
            yield new
            idx = new.repeat(idx.size(0) // B).unsqueeze(1)

    def parameter_counts(self):
        """Parameters by what they are for: embedding, matrices, head, router, memory, total."""
        counts = dict(
            embedding=self.embedding.weight.numel(),
            matrices=sum(p.numel() for n, p in self.blocks.named_parameters() if "router" not in n),
            head=self.head.weight.numel(),
            router=sum(p.numel() for n, p in self.blocks.named_parameters() if "router" in n),
            memory=sum(p.numel() for p in self.banks.parameters()),
        )
        return {**counts, "total": sum(counts.values())}

    def flops_per_token(self):
        """Multiplications and additions of a forward pass for one token of a sequence of seq_len, by
        part: matrices, attention, head, router, mix. Training costs three times as much.

        attention counts all T positions, as is the custom (PaLM, arXiv 2204.02311), not the half
        that causality leaves.
        """
        c, counts = self.config, self.parameter_counts()
        head_dim = c.dim // c.n_heads
        q_dim = c.n_heads * (head_dim + (c.rope_dim or 0))  # width of all queries, that of all values is d
        gates = sum(m + c.gate_value for m in c.layer_slots() if m)
        return dict(
            matrices=2 * counts["matrices"],
            attention=2 * c.n_layers * c.seq_len * (q_dim + c.dim),
            head=2 * counts["head"],
            router=2 * counts["router"],
            mix=2 * gates * c.memory_dim,
        )
