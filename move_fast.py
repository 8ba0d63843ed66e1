"""The numbers of move.py, faster, on a CUDA device: `accelerate(model)`.

    model = GPT(config).to("cuda")
    accelerate(model)                      # the same model, parameters and state_dict, with kernels
    loss = torch.compile(model)(idx, targets)

move.py knows nothing of this file. `accelerate` swaps the classes of its modules for the subclasses
here, all or none: a model with a gate, a router or a bank that these kernels do not know stays as it is.

The idea. Taken literally, each layer reads M_t (B, T, M, d), and reads and writes as much for its
gradient. But a batch has far fewer different ids than tokens. So its tokens are sorted by id once
(`Plan`), and every kernel works on tiles of sorted tokens, in which equal ids are neighbours. All
tokens of one id share one block of the bank: mixing them is a small matrix product, and M_t is never
written down. For a head h, the n tokens of one id w, their gates g (n, M) and the id's slots
E = bank[w, :, h] (M, d_h):

    forward       V_S = g_0 ⊙ V + g E                                                        (n, d_h)
    backward      dV = g_0 ⊙ dV_S      dg_0 = Σ_d V ⊙ dV_S      dg = dV_S Eᵀ                  (n, M)
                  dz = dg ⊙ g (1 - g/2), since g = 2σ(z)
    the bank      dE = Σ_layers gᵀ dV_S                                                      (M, d_h)

The last line waits for the gradients of all layers and is one product over tokens and layers: dE is
written once, and a row that no token of the batch has is not touched. Autograd waits by means of
tickets: each layer gets two tensors of zeros that nothing reads and that take no space; the
"gradients" that the layer returns for them are its dV_S and its router outputs z, and the tickets'
own backward, which comes last, has them all (`Tickets`).

No sum depends on the order in which programs run: the results are the same from run to run.

Shapes: N = B·T tokens, H heads of d_h, W = H·d_h the width of a slot, M slots. `vz` (N, W + G) holds
the values V and behind them the router's outputs z: those of the slots, (H, M), then those of g_0,
(H,), if it is gated, then padding, of up to 64 columns. So one matrix product makes both, and one
takes both their gradients. Sums are float32; products are in the dtype of vz, which is float32,
bfloat16 or float16; the bank's is any of these.

In this file: the mix (kernels, ops, autograd), the loss, the modules that are swapped, accelerate(),
generation; at the end the kernels of optimizers.py and move_store.py.
"""
import ast
import contextlib
import copy
import functools
import hashlib
import inspect
import itertools
import textwrap
import warnings
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

import move

TILE = 16  # sorted tokens that one program mixes
MAX_TOKENS = TILE * 65535  # in one pass: CUDA's limit on a grid's second axis
GRADIENT_TILE = 32  # sorted tokens whose share of the bank's gradient one program adds up
TICKETS = 128  # pairs that are made at a time
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run as Python, for tests
# Triton's interpreter multiplies the bits of bfloat16 as integers: there, bfloat16 is left to the reference.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)


class Plan(NamedTuple):
    """The tokens of a batch in the order of their ids, int32. Made on the device; nothing waits for it."""
    order: torch.Tensor  # (N,) the token at each place of the order
    group: torch.Tensor  # (N,) which of the different ids it has: 0, 0, 1, 2, 2, 2, …
    start: torch.Tensor  # (N + 1,) the place where each group starts; N for groups that are not there
    ids: torch.Tensor  # (N,) the id of each group


def make_plan(ids):
    """Token ids (N ≥ 1,), int32 → Plan."""
    N = ids.size(0)
    ids, order = ids.sort(stable=True)
    group = F.pad(ids[1:] != ids[:-1], (1, 0)).cumsum(0)
    start = torch.searchsorted(group, torch.arange(N + 1, device=ids.device))
    ids = ids[start[:-1].clamp(max=N - 1)]
    return Plan(*(t.to(torch.int32) for t in (order, group, start, ids)))


# ----------------------------------------------------------------------------------------- kernels
#
# One program has one head and one tile of sorted tokens. It takes GROUPS groups at a time, so that one
# product serves them all: its inner dimension runs over GROUPS · SLOTS rows of the bank, and a token has
# gates of 0 for the groups that it is not of. Where M is large, SLOTS slots are taken at a time. HEAD is
# d_h and COLUMNS a power of two not below it.


@triton.jit
def gate(z):
    """g = 2σ(z) in float32."""
    return 2 / (1 + tl.exp(-z.to(tl.float32)))


@triton.jit
def spread(g, group, j_0, GROUPS: tl.constexpr, SLOTS: tl.constexpr):
    """Gates (n, SLOTS) of tokens of these groups → (n, GROUPS · SLOTS), 0 outside of their group."""
    mine = group[:, None, None] == j_0 + tl.arange(0, GROUPS)[None, :, None]
    return tl.reshape(tl.where(mine, g[:, None, :], 0), (g.shape[0], GROUPS * SLOTS))


@triton.jit
def rows_of_groups(ids, j_0, last, m_0, M: tl.constexpr, W: tl.constexpr, GROUPS: tl.constexpr,
                   SLOTS: tl.constexpr):
    """Where the slots m_0 … of groups j_0 … last begin in the bank, (GROUPS · SLOTS,), and which exist."""
    row = tl.arange(0, GROUPS * SLOTS)
    j, m = j_0 + row // SLOTS, m_0 + row % SLOTS
    return tl.load(ids + j, j <= last, 0).to(tl.int64) * M * W + m * W, (j <= last) & (m < M)


@triton.jit
def slots_of_groups(bank, ids, j_0, last, m_0, head, column, M: tl.constexpr, W: tl.constexpr,
                    HEAD: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr):
    """E: the head's part of these slots, (GROUPS · SLOTS, COLUMNS)."""
    row, exists = rows_of_groups(ids, j_0, last, m_0, M, W, GROUPS, SLOTS)
    return tl.load(bank + row[:, None] + head * HEAD + column[None, :],
                   exists[:, None] & (column < HEAD)[None, :], 0)


@triton.jit
def tokens_of_tile(order, group, N, TILE: tl.constexpr):
    """The tokens of this program's tile, which exist, their groups, and the first and last of these."""
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = place < N
    my_group = tl.load(group + place, live, -1)
    token = tl.load(order + place, live, 0).to(tl.int64)
    return token, live, my_group, tl.load(group + tl.program_id(1) * TILE), tl.max(my_group)


@triton.jit
def mix_kernel(vz, bank, order, group, ids, out, N,
               M: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr, HEAD: tl.constexpr, GATED: tl.constexpr,
               TILE: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
    """V_S = g_0 ⊙ V + g E."""
    head, column = tl.program_id(0), tl.arange(0, COLUMNS)
    token, live, my_group, first, last = tokens_of_tile(order, group, N, TILE)
    in_head = live[:, None] & (column < HEAD)[None, :]
    v_s = tl.load(vz + token[:, None] * ROW + head * HEAD + column[None, :], in_head, 0).to(tl.float32)
    if GATED:
        v_s *= gate(tl.load(vz + token * ROW + W + W // HEAD * M + head, live, 0))[:, None]
    for m_0 in range(0, M, SLOTS):
        m = m_0 + tl.arange(0, SLOTS)
        z = tl.load(vz + token[:, None] * ROW + W + head * M + m[None, :],
                    live[:, None] & (m < M)[None, :], 0)
        g = gate(z).to(z.dtype)
        for j_0 in range(first, last + 1, GROUPS):
            E = slots_of_groups(bank, ids, j_0, last, m_0, head, column, M, W, HEAD, GROUPS, SLOTS)
            v_s = tl.dot(spread(g, my_group, j_0, GROUPS, SLOTS), E.to(g.dtype), v_s, input_precision="ieee")
    tl.store(out + token[:, None] * W + head * HEAD + column[None, :], v_s, in_head)


@triton.jit
def mix_backward_kernel(d_vs, vz, bank, order, group, ids, d_vz, N,
                        M: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr, HEAD: tl.constexpr,
                        GATED: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr,
                        COLUMNS: tl.constexpr):
    """dV = g_0 ⊙ dV_S, dg_0 = Σ V ⊙ dV_S, dg = dV_S Eᵀ and dz = dg ⊙ g (1 - g/2); zeros in the padding."""
    head, column = tl.program_id(0), tl.arange(0, COLUMNS)
    token, live, my_group, first, last = tokens_of_tile(order, group, N, TILE)
    in_head = live[:, None] & (column < HEAD)[None, :]
    at_v = token[:, None] * ROW + head * HEAD + column[None, :]
    d = tl.load(d_vs + token[:, None] * W + head * HEAD + column[None, :], in_head, 0)
    d_v = d.to(tl.float32)
    if GATED:
        at_z_0 = token * ROW + W + W // HEAD * M + head
        g_0 = gate(tl.load(vz + at_z_0, live, 0))
        d_g_0 = tl.sum(d_v * tl.load(vz + at_v, in_head, 0).to(tl.float32), 1)
        tl.store(d_vz + at_z_0, d_g_0 * g_0 * (1 - g_0 / 2), live)
        d_v *= g_0[:, None]
    tl.store(d_vz + at_v, d_v, in_head)
    for m_0 in range(0, M, SLOTS):
        m = m_0 + tl.arange(0, SLOTS)
        d_g = tl.zeros((TILE, SLOTS), tl.float32)
        for j_0 in range(first, last + 1, GROUPS):
            E = slots_of_groups(bank, ids, j_0, last, m_0, head, column, M, W, HEAD, GROUPS, SLOTS)
            every = tl.dot(d, tl.trans(E.to(d.dtype)), input_precision="ieee")
            mine = my_group[:, None, None] == j_0 + tl.arange(0, GROUPS)[None, :, None]
            d_g += tl.sum(tl.where(mine, tl.reshape(every, (TILE, GROUPS, SLOTS)), 0), 1)
        at_z = token[:, None] * ROW + W + head * M + m[None, :]
        in_gates = live[:, None] & (m < M)[None, :]
        g = gate(tl.load(vz + at_z, in_gates, 0))
        tl.store(d_vz + at_z, d_g * g * (1 - g / 2), in_gates)
    if head == 0:
        padding = W + W // HEAD * (M + GATED) + tl.arange(0, 64)
        tl.store(d_vz + token[:, None] * ROW + padding[None, :], tl.zeros((TILE, 64), d_vz.dtype.element_ty),
                 live[:, None] & (padding < ROW)[None, :])


@triton.jit
def bank_gradient_kernel(d_vs_of, vz_of, order, group, start, ids, gradient, carry, like, N, L: tl.constexpr,
                         M: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr, HEAD: tl.constexpr,
                         GATED: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr,
                         COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Adds dE = Σ_layers gᵀ dV_S to the gradient.

    d_vs_of, vz_of (L,): how far behind `like` the layers' tensors lie, in UNITs of 16 bytes, so that the
    compiler knows that it can read so many at once. ROWS tokens-in-a-layer are summed at a time. Of a
    group that began in an earlier tile, the part of this tile goes to carry[tile] (M, W), for
    carry_kernel to add.
    """
    chunks = tl.cdiv(M, SLOTS)
    head, m_0, tile = tl.program_id(0) // chunks, tl.program_id(0) % chunks * SLOTS, tl.program_id(1)
    m, column = m_0 + tl.arange(0, SLOTS), tl.arange(0, COLUMNS)
    in_columns = (column < HEAD)[None, :]
    begin, end = tile * TILE, tl.minimum(tile * TILE + TILE, N)
    first, last = tl.load(group + begin), tl.load(group + end - 1)
    UNIT: tl.constexpr = 128 // like.dtype.element_ty.primitive_bitwidth
    for j_0 in range(first, last + 1, GROUPS):
        row, exists = rows_of_groups(ids, j_0, last, m_0, M, W, GROUPS, SLOTS)
        earlier = tl.load(start + j_0 + tl.arange(0, GROUPS * SLOTS) // SLOTS, exists, N) < begin
        to = gradient + row[:, None] + head * HEAD + column[None, :]
        mine = (exists & ~earlier)[:, None] & in_columns
        d_E = tl.load(to, mine, 0).to(tl.float32)
        from_place = tl.maximum(tl.load(start + j_0), begin)
        n = (tl.minimum(tl.load(start + tl.minimum(j_0 + GROUPS, last + 1)), end) - from_place) * L
        for r_0 in range(0, n, ROWS):
            r = r_0 + tl.arange(0, ROWS)
            live = r < n
            token = tl.load(order + from_place + r // L, live, 0).to(tl.int64)
            at_z = tl.load(vz_of + r % L, live, 0) * UNIT + token * ROW
            at_d = tl.load(d_vs_of + r % L, live, 0) * UNIT + token * W
            z = tl.load(like + at_z[:, None] + W + head * M + m[None, :], live[:, None] & (m < M)[None, :], 0)
            d = tl.load(like + at_d[:, None] + head * HEAD + column[None, :], live[:, None] & in_columns, 0)
            my_group = tl.load(group + from_place + r // L, live, -1)
            g = spread(gate(z).to(z.dtype), my_group, j_0, GROUPS, SLOTS)
            d_E = tl.dot(tl.trans(g), d, d_E, input_precision="ieee")
        tl.store(to, d_E, mine)
        slot = m_0 + tl.arange(0, GROUPS * SLOTS) % SLOTS
        tl.store(carry + (tile.to(tl.int64) * M + slot)[:, None] * W + head * HEAD + column[None, :], d_E,
                 (exists & earlier)[:, None] & in_columns)


@triton.jit
def carry_kernel(gradient, carry, group, start, ids, MW, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds what later tiles carry of a group that began in the tile before this one."""
    tile = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(group + tile * TILE)
    begin_j = tl.load(start + j)
    if (begin_j < tile * TILE) & (begin_j >= (tile - 1) * TILE):
        to = gradient + tl.load(ids + j).to(tl.int64) * MW + column
        d_E = tl.load(to, column < MW, 0).to(tl.float32)
        for t in range(tile, tl.cdiv(tl.load(start + j + 1), TILE)):
            d_E += tl.load(carry + tl.cast(t, tl.int64) * MW + column, column < MW, 0)
        tl.store(to, d_E, column < MW)


# --------------------------------------------------------------------------------------------- ops


def kernel_sizes(vz, bank, n_heads, gated):
    """What every kernel is compiled for."""
    if bank.untyped_storage().size() == 0:
        raise RuntimeError("the storage of the bank is freed, as by fully_shard(bank): "
                           "leave the bank to fully_shard(model), or do without accelerate()")
    M, W = bank.shape[1:]
    columns = max(16, triton.next_power_of_2(W // n_heads))
    rows = min(64, max(16, triton.next_power_of_2(M)), 8192 // columns)  # of the bank at a time
    slots = min(rows, max(4, triton.next_power_of_2(M)))
    return dict(M=M, W=W, ROW=vz.size(1), HEAD=W // n_heads, GATED=gated, SLOTS=slots, GROUPS=rows // slots,
                COLUMNS=columns)


def launch(kernel, tensors, vz, bank, n_heads, gated):
    fixed = kernel_sizes(vz, bank, n_heads, gated)
    with torch.cuda.device_of(vz):
        kernel[n_heads, triton.cdiv(len(vz), TILE)](
            *tensors, len(vz), **fixed, TILE=TILE, num_warps=fixed["GROUPS"] * fixed["SLOTS"] // 16,
            num_stages=1)


@torch.library.custom_op("move::mix", mutates_args=())
def mix(vz: torch.Tensor, bank: torch.Tensor, order: torch.Tensor, group: torch.Tensor, ids: torch.Tensor,
        n_heads: int, gated: bool) -> torch.Tensor:
    """Equation 3: vz (N, W + G), bank (V, M, W), the plan → V_S (N, W)."""
    out = vz.new_empty(len(vz), bank.size(2))
    launch(mix_kernel, (vz, bank, order, group, ids, out), vz, bank, n_heads, gated)
    return out


@mix.register_fake
def _(vz, bank, order, group, ids, n_heads, gated):
    return vz.new_empty(vz.size(0), bank.size(2))


@torch.library.custom_op("move::mix_backward", mutates_args=())
def mix_backward(d_vs: torch.Tensor, vz: torch.Tensor, bank: torch.Tensor, order: torch.Tensor,
                 group: torch.Tensor, ids: torch.Tensor, n_heads: int, gated: bool) -> torch.Tensor:
    """dV_S (N, W) → the gradient of vz (N, W + G)."""
    d_vz = torch.empty_like(vz)
    launch(mix_backward_kernel, (d_vs, vz, bank, order, group, ids, d_vz), vz, bank, n_heads, gated)
    return d_vz


@mix_backward.register_fake
def _(d_vs, vz, bank, order, group, ids, n_heads, gated):
    return torch.empty_like(vz)


def aligned(tensors):
    """The tensors; copies of those that do not begin at a multiple of 16 bytes, as a slice may."""
    return [t.clone() if t.data_ptr() % 16 else t for t in tensors]


def distances(tensors, like):
    """How far behind `like` these tensors lie, in 16 bytes: int64, on their device; nothing waits for it."""
    table = torch.tensor([(t.data_ptr() - like.data_ptr()) // 16 for t in tensors])
    return table.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else table


@torch.library.custom_op("move::add_bank_gradient", mutates_args={"gradient"})
def add_bank_gradient(gradient: torch.Tensor, d_vs: list[torch.Tensor], vz: list[torch.Tensor],
                      order: torch.Tensor, group: torch.Tensor, start: torch.Tensor, ids: torch.Tensor,
                      n_heads: int, gated: bool, key: int) -> None:
    """gradient (V, M, W) += Σ_layers gᵀ dV_S. d_vs, vz: of each layer, (N, W) and (N, W + G). key: of the
    bank whose weight.grad it is, or 0."""
    for bank in WATCHED:
        if bank.key == key and bank.weight.grad is not bank.gradient:
            raise RuntimeError("the gradient of an accelerated bank was taken away between its forward and "
                               "backward pass; call move_fast.zero_grad() before the forward pass")
    d_vs, vz = aligned(d_vs), aligned(vz)
    N, (M, W), fixed = len(vz[0]), gradient.shape[1:], kernel_sizes(vz[0], gradient, n_heads, gated)
    tiles = triton.cdiv(N, GRADIENT_TILE)
    carry = gradient.new_empty(tiles, M, W, dtype=torch.float32)
    with torch.cuda.device_of(gradient):
        bank_gradient_kernel[n_heads * triton.cdiv(M, fixed["SLOTS"]), tiles](
            distances(d_vs, vz[0]), distances(vz, vz[0]), order, group, start, ids, gradient, carry, vz[0], N,
            L=len(vz), TILE=GRADIENT_TILE, ROWS=32, **fixed, num_stages=1)
        carry_kernel[tiles, triton.cdiv(M * W, 1024)](gradient, carry, group, start, ids, M * W,
                                                      TILE=GRADIENT_TILE, BLOCK=1024)


# ---------------------------------------------------------------------------------------- autograd


class Mix(torch.autograd.Function):
    """V_S of one layer. Its gradient for its two tickets is what the bank's gradient needs: dV_S and vz."""

    @staticmethod
    def forward(ctx, vz, ticket_d_vs, ticket_vz, bank, plan, n_heads, gated):
        ctx.save_for_backward(vz, bank, *plan)
        ctx.n_heads, ctx.gated = n_heads, gated
        return torch.ops.move.mix(vz, bank, plan.order, plan.group, plan.ids, n_heads, gated)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_vs):
        vz, bank, order, group, start, ids = ctx.saved_tensors
        d_vs = d_vs.contiguous()
        d_vz = torch.ops.move.mix_backward(d_vs, vz, bank, order, group, ids, ctx.n_heads, ctx.gated)
        return d_vz, d_vs, vz, None, None, None, None


class Tickets(torch.autograd.Function):
    """Two inputs for each of TICKETS layers, whose "gradients" are no gradients but what the bank needs from
    that layer. Backward: the gradient of the bank, returned; or added to `gradient`, its weight.grad.
    What it keeps is on ctx, not saved for backward: gradient checkpointing counts what is saved, and
    only the first layer of a forward pass makes tickets."""

    @staticmethod
    def forward(ctx, bank, gradient, plan, like, n_heads, gated, key, eager):
        ctx.set_materialize_grads(False)  # None for the tickets that no layer took
        ctx.bank, ctx.gradient, ctx.plan = bank, gradient, plan
        ctx.n_heads, ctx.gated, ctx.key, ctx.eager = n_heads, gated, key, eager
        zero = like.new_zeros(())
        return tuple(zero.expand(like.size(0), width) for _ in range(TICKETS)
                     for width in (bank.size(2), like.size(1)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *tickets):
        d_vs, vz = ([t for t in tickets[i::2] if t is not None] for i in (0, 1))
        gradient, key = ctx.gradient, ctx.key
        if gradient is None or (ctx.eager and ctx.bank.grad is not gradient):  # zero_grad() came in between
            gradient, key = torch.zeros_like(ctx.bank), 0
        torch.ops.move.add_bank_gradient(gradient, d_vs, vz, *ctx.plan, ctx.n_heads, ctx.gated, key)
        return None if gradient is ctx.gradient else gradient, *[None] * 7


# torch.compile looks into autograd's functions, and would fill the tickets that no layer takes with zeros;
# as they stand, it leaves them out.
@torch.compiler.allow_in_graph
def mixed(*args):
    return Mix.apply(*args)


@torch.compiler.allow_in_graph
def tickets(*args):
    return Tickets.apply(*args)


class Memory:
    """What an accelerated bank gives in place of M_t (B, T, M, W): its rows stay where they are.

    weight (V, M, W), idx (B, T ≥ 1). gradient: where the bank's gradient is added, (V, M, W), which
    autograd then does not see; None: autograd gets it as any other, as a new tensor. key: of the
    bank, or 0 for none. ValueError for more tokens than one pass can take.
    """

    def __init__(self, weight, idx, gradient=None, key=0):
        if idx.numel() > MAX_TOKENS:
            raise ValueError(f"the kernels take up to {MAX_TOKENS:,} tokens at a time, not {idx.numel():,}")
        # As an embedding, a bank that is read without autograd is not trained by what reads it later.
        self.weight = weight if torch.is_grad_enabled() else weight.detach()
        self.idx, self.gradient, self.key = idx, gradient, key
        self.plan = make_plan(torch.ops.move.checked_ids(idx, weight.size(0), key))
        self.tickets, self.pair, self.layer = (), None, None  # pair: see of_layer

    def to(self, *args):
        raise RuntimeError("this memory is of an accelerated bank: pass it on as it is; if the ValueMixer "
                           "that reads it is of a model that is not, call accelerate() on that, too")

    def tensor(self):
        """M_t (B, T, M, W), as the reference has it."""
        return F.embedding(self.idx, self.weight.flatten(1)).unflatten(-1, self.weight.shape[1:])

    def values(self, x, v, w_router, n_heads, gated):
        """x (B, T, n_in), values v (B, T, H, d_h) or the weight (W, n_in) that makes them, and a router's
        weight, (H, M + 1) rows, g_0 first if it is gated → V_S (B, T, H, d_h); None where the kernels
        cannot. RuntimeError for shapes that do not fit."""
        M, W = self.weight.shape[1:]
        fits = v.size(0) == W if v.ndim == 2 else v.shape == (*self.idx.shape, n_heads, W // n_heads)
        if not fits or x.shape[:2] != self.idx.shape or W % n_heads or len(w_router) != n_heads * (M + gated):
            raise RuntimeError(f"a memory of {tuple(self.idx.shape)} tokens with {M} slots of {W} does not "
                               f"fit {n_heads} heads, tokens {tuple(x.shape[:2])}, values or their weight "
                               f"{tuple(v.shape)} and {len(w_router)} gates")
        w = w_router.unflatten(0, (n_heads, -1))
        w = torch.cat((w[:, gated:].flatten(0, 1), w[:, :gated].flatten(0, 1)))  # in the order of vz
        w = F.pad(w, (0, 0, 0, -len(w) % 64))  # rows of vz begin where cache lines do
        if v.ndim == 2:
            vz = F.linear(x, torch.cat((v, w)).to(x.dtype))
        else:
            vz = torch.cat((v.flatten(-2), F.linear(x, w.to(x.dtype)).to(v.dtype)), dim=-1)
        v_s = self.mix(vz.flatten(0, 1), n_heads, gated)
        return None if v_s is None else v_s.view(*self.idx.shape, n_heads, -1)

    def mix(self, vz, n_heads, gated):
        """vz (N, W + G), values and router outputs → V_S (N, W). gated: whether there is a g_0. None for
        another dtype than the three, heads wider than 512, a layer unlike the first, a bank in pieces."""
        plan, layer = self.plan, (vz.shape, vz.dtype, n_heads, gated)
        if (vz.dtype not in DTYPES or self.weight.size(2) > 512 * n_heads or not self.weight.is_contiguous()
                or self.layer not in (None, layer)):
            return None
        if not torch.is_grad_enabled():
            return torch.ops.move.mix(vz, self.weight, plan.order, plan.group, plan.ids, n_heads, gated)
        # Inside a backward pass, a checkpointed layer runs again: its gradient may come by itself, so that
        # it needs tickets of its own.
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        pair = self.pair or self.take(vz.detach(), n_heads, gated, again)
        return mixed(vz, *pair, self.weight, plan, n_heads, gated)

    def take(self, like, n_heads, gated, again=False):
        """A pair of tickets, for a layer whose vz is like this. again: for it alone."""
        if again or not self.tickets:
            new = tickets(self.weight, self.gradient, self.plan, like, n_heads, gated, self.key,
                          not torch.compiler.is_compiling())
            self.layer = (like.shape, like.dtype, n_heads, gated)
            if again:
                return new[:2]
            self.tickets = new
        pair, self.tickets = self.tickets[:2], self.tickets[2:]
        return pair

    def of_layer(self, mixer, dtype):
        """This memory for one layer with activations of this dtype, which holds its pair of tickets: nothing
        in it changes when it is read, and equal layers, each with its own, are the same to the compiler."""
        mine = copy.copy(self)
        if torch.is_grad_enabled() and dtype in DTYPES:
            (M, W), H = self.weight.shape[1:], mixer.n_heads
            gates = H * (M + mixer.gate_value)
            like = self.weight.new_empty((), dtype=dtype).expand(self.idx.numel(), W + gates + -gates % 64)
            mine.pair, mine.layer = self.take(like, H, mixer.gate_value), self.layer
        mine.tickets = ()  # those of the others
        return mine


# ------------------------------------------------------------------------------------------- the loss

CHUNK = 8192  # tokens of a step of the loss
LIMIT = 15.0  # of move.softcap


def softcap(z):
    """move.softcap, in float32 at least. tanh(u) = 2σ(2u) - 1, which is faster when compiled."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return LIMIT * (2 * torch.sigmoid(2 / LIMIT * z) - 1)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy in nats of the softcapped logits of x (N, d) for a head's weight (V, d) and targets
    (N,), int64 in [0, V) or -100 for those that do not count → (), at least float32.

    The logits (N, V) are by far the largest tensor of a training step. So CHUNK tokens at a time get
    theirs, the loss and, at once, its gradients, which only have to be scaled later; compiled, no logits
    are written down in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        w, n = weight.to(x.dtype), (targets != -100).sum()  # n: how many count
        loss, d_x, d_w = 0, [], 0
        for x_part, t in zip(x.split(CHUNK), targets.split(CHUNK), strict=True):
            counts = (t != -100).unsqueeze(1)
            t = torch.where(counts, t.unsqueeze(1), 0)
            logits = softcap(x_part @ w.T)
            total = logits.exp().sum(-1, keepdim=True).log()  # capped logits need no maximum taken off first
            loss += torch.where(counts, total - logits.gather(1, t), 0).sum() / n
            if with_gradients:
                d = (logits - total).exp() - (torch.arange(len(w), device=t.device) == t).to(logits.dtype)
                d = (torch.where(counts, d, 0) * (1 - (logits / LIMIT).square())).to(w.dtype)
                d_x.append(d @ w)
                d_w += (d.T @ x_part).to(weight.dtype)
        if with_gradients:
            ctx.save_for_backward(torch.cat(d_x), d_w, n)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        d_x, d_w, n = ctx.saved_tensors
        d = d / n.clamp(min=1)
        return (d * d_x).to(d_x.dtype), d * d_w, None, None


@torch.compiler.allow_in_graph  # PyTorch 2.11's compiler, looking into it, takes its gradient for zero
def linear_cross_entropy(x, weight, targets):
    """LinearCrossEntropy, with its gradients where autograd is on."""
    return LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())


# --------------------------------------------------------------------------------- the swapped modules


class FastValueBank(move.ValueBank):
    """bank(idx) gives a Memory. Its gradient goes through autograd, or in place after zero_grad()."""
    gradient = None  # what weight.grad is then
    key = -1  # of KEYS, after accelerate()

    def __setstate__(self, state):
        super().__setstate__(state)
        self.key = -1  # a copy is another bank

    def forward(self, idx):
        if idx.numel() == 0:
            return super().forward(idx)
        in_place = self.gradient is not None and self.weight.grad is self.gradient
        return Memory(self.weight, idx, self.gradient if in_place else None, self.key)

    def zero_grad_in_place(self):
        """weight.grad becomes zeros that backward adds to in place, instead of making (V, M, W) each time."""
        w, kept = self.weight, self.gradient
        if kept is None or (kept.shape, kept.dtype, kept.device) != (w.shape, w.dtype, w.device):
            kept = torch.empty_like(w)
        self.gradient = w.grad = kept.zero_()


class FastValueMixer(move.ValueMixer):
    """mixer(x, v, memory) by the kernels, where memory is a Memory; v may then be the Linear that makes the
    values from x, so that one product makes values and gates."""

    def forward(self, x, v, memory):
        if not isinstance(memory, Memory):
            return super().forward(x, v, memory)
        linear = isinstance(v, move.Linear)
        v_s = memory.values(x, v.weight if linear else v, self.router.weight, self.n_heads, self.gate_value)
        if v_s is None:
            if not torch.compiler.is_compiling():
                names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                warnings.warn("a layer mixes without the kernels, which takes more time and memory: they "
                              f"need one of {names}, heads up to 512, one piece of memory for the bank, and "
                              "layers like the first", stacklevel=2)
            v = v(x).unflatten(-1, (self.n_heads, -1)) if linear else v
            return super().forward(x, v, memory.tensor())
        return v_s


class FastMoVEAttention(move.MoVEAttention):
    """Fewer and larger matrix products: queries with keys, values with gates."""

    def values(self, x, memory):
        if self.mixer is None or not isinstance(memory, Memory):
            return super().values(x, memory)
        return self.mixer(x, self.w_v, memory)

    def queries_and_keys(self, x, rotary):
        refuse_changes(self)  # there may be no bank in the model that looks
        both = F.linear(x, torch.cat((self.w_q.weight, self.w_k.weight)).to(x.dtype))
        heads = both.unflatten(-1, (2 * self.n_heads, -1)).chunk(2, dim=-2)
        return [move.apply_rotary_emb(move.rms_norm(t), rotary) for t in heads]


class FastGPT(move.GPT):
    """The loss without float32 logits; many steps of generation as a CUDA graph."""
    key = -1  # of KEYS, after accelerate()

    def __setstate__(self, state):
        super().__setstate__(state)
        self.key = -1  # a copy is another model

    def with_blocks(self, blocks):
        twin = super().with_blocks(blocks)
        twin.key = self.key
        return twin

    def embed(self, idx):
        if type(self.bank) is not FastValueBank:  # which checks the ids, and what was changed
            idx = torch.ops.move.checked_ids(idx, self.config.vocab_size, self.key).view_as(idx)
        return super().embed(idx)

    def decoding_step(self, pick, steps):
        if steps >= STEPS_FOR_GRAPH and self.head.weight.is_cuda:
            with contextlib.suppress(ValueError):  # of a model with other parts
                return fast_step(self, pick, compiled=steps >= STEPS_TO_COMPILE)
        return super().decoding_step(pick, steps)

    def loss(self, x, targets):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if dtype == torch.float16:  # whose range is too small for sums over thousands of tokens
            return super().loss(x, targets)
        return linear_cross_entropy(move.rms_norm(x).flatten(0, 1), self.head.weight, targets.flatten())


# ----------------------------------------------------------- what the kernels know, and accelerate()

# Exactly these types are swapped. The kernels read the weights of these Linear layers without calling them,
# and have a copy of these functions of move.py: the fingerprints say of which.
FAST = {move.ValueBank: FastValueBank, move.ValueMixer: FastValueMixer,
        move.MoVEAttention: FastMoVEAttention, move.GPT: FastGPT}
REFERENCE = {fast: reference for reference, fast in FAST.items()}
LINEARS = {move.ValueMixer: ("router",), move.MoVEAttention: ("w_q", "w_k", "w_v"), move.GPT: ("head",)}
COPIED = {
    (move, "mix_values"): "f7ce4ce1",
    (move, "softcap"): "a3b68fbf",
    (move.Linear, "forward"): "ee119d12",
    (move.ValueBank, "forward"): "1662746b",
    (move.ValueMixer, "__init__"): "054257d4",
    (move.ValueMixer, "gates"): "56c44da9",
    (move.ValueMixer, "forward"): "1b1f3c5c",
    (move.MoVEAttention, "values"): "6e992e76",
    (move.MoVEAttention, "queries_and_keys"): "6443f28b",
    (move.GPT, "logits"): "756baecb",
    (move.GPT, "loss"): "ad71336c"}
KNOWN = {(owner, name): getattr(owner, name) for owner, name in COPIED}


def fingerprint(function):
    """A hash of its code, without docstring, comments and checks that only raise."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    node.body = [statement for statement in node.body
                 if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
                 and not (isinstance(statement, ast.If) and isinstance(statement.body[0], ast.Raise))]
    return hashlib.sha256(ast.unparse(node).encode()).hexdigest()[:8]


def edited():
    """Which function of move.py is not the one that this file has a copy of, in words; or None."""
    for (owner, name), expected in COPIED.items():
        try:
            found = fingerprint(getattr(owner, name))
        except (OSError, TypeError, SyntaxError):  # there is no source
            found = None
        if found != expected:
            if found is None:
                return f"the source of {owner.__name__}.{name} cannot be read"
            return (f"{owner.__name__}.{name} is not the one that the kernels have a copy of; if its numbers "
                    f"are the same, write {found} into COPIED of move_fast.py")
    return None


GLOBAL_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def has_backward_hooks(module):
    return bool(module._backward_hooks or module._backward_pre_hooks)


def has_hooks(module):
    return bool(module._forward_hooks or module._forward_pre_hooks) or has_backward_hooks(module)


def what_changed(module):
    """What of a module (of one of the types above) the kernels do not know, in words; or None."""
    kind = type(module).__name__.removeprefix("Fast")
    for (owner, name), known in KNOWN.items():
        if getattr(owner, name) is not known:
            return f"{owner.__name__}.{name} was replaced"
        here = {known, getattr(FAST.get(owner), name, known)}
        if isinstance(owner, type) and isinstance(module, owner) and getattr(type(module), name) not in here:
            return f"{name} of a {kind} was replaced"
    for name in ("forward", *(name for _, name in KNOWN)):
        if name in module.__dict__:
            return f"{name} of a {kind} was replaced"
    if isinstance(module, move.ValueBank) and has_hooks(module):
        return "the bank has hooks"
    if isinstance(module, move.ValueMixer) and has_backward_hooks(module):
        return "a ValueMixer has backward hooks, which would not see the memory"
    for name in next((names for owner, names in LINEARS.items() if isinstance(module, owner)), ()):
        linear = getattr(module, name)
        if type(linear) is not move.Linear or "forward" in linear.__dict__ or linear.bias is not None:
            return f"{name} of a {kind} is no plain move.Linear"
        if has_hooks(linear):
            return f"{name} of a {kind} has hooks"
    return None


def refuse_changes(module):
    if torch.compiler.is_compiling():  # checked_ids does it at run time
        return
    if what := what_changed(module):
        raise RuntimeError(f"{what} after accelerate(): call accelerate() again, which then leaves the "
                           "model on the reference")


def refuse_other_parts(model, parts):
    """model: a weak reference; parts: [(weak reference, type)] of its modules of the types above, as they
    were at accelerate(). Of a model that is gone, those that are left."""
    model, was = model(), [(part(), kind) for part, kind in parts]
    if model is None:
        was = [(part, kind) for part, kind in was if part is not None]
    now = [part for part, _ in was]
    if model is not None:  # a model may have a length, which may be 0
        now = [m for m in model.modules() if isinstance(m, tuple(FAST))]
    if len(now) != len(was) or any(a is not b or not isinstance(a, kind)
                                   for a, (b, kind) in zip(now, was, strict=True)):
        raise RuntimeError("a bank, mixer, attention or GPT was exchanged after accelerate(): call it again")
    for module in now:
        refuse_changes(module)


KEYS = itertools.count(1)  # of accelerated banks and GPTs: the same in each process
WATCHED = weakref.WeakKeyDictionary()  # each → what the models that hold it were made of: see accelerate


@torch.library.custom_op("move::checked_ids", mutates_args=())
def checked_ids(idx: torch.Tensor, vocab_size: int, key: int) -> torch.Tensor:
    """Token ids (B, T), int64 or int32 → the same (N,), int32. IndexError (a device-side assert on CUDA)
    for an id out of range.

    An op, so that it also runs inside compiled graphs: for a model with a bank it is the one place that
    sees what was changed since accelerate(), and refuses it. key: of the bank or GPT that asks, or 0.
    """
    if idx.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"token ids must be int64 or int32, not {idx.dtype}")
    if key:
        module = next((module for module in WATCHED if module.key == key), None)
        if module is None:
            raise RuntimeError("this model is a copy of an accelerated one: call accelerate() on it")
        for model, parts in WATCHED[module]:
            refuse_other_parts(model, parts)
    in_range = ((idx >= 0) & (idx < vocab_size)).all()
    if idx.is_cuda:
        torch._assert_async(in_range, "a token id is out of range")
    elif not in_range:
        raise IndexError(f"token ids must be from 0 to {vocab_size - 1}, and in a stored bank borrowed")
    return idx.flatten().to(torch.int32, copy=True)  # an op may not return its input


@checked_ids.register_fake
def _(idx, vocab_size, key):
    return idx.new_empty(idx.numel(), dtype=torch.int32)


def mixes_agree(mixer):
    """Whether reference and kernels give the same for a mixer of these sizes, on a few tokens with random
    weights."""
    device, (gates, d), H = mixer.router.weight.device, mixer.router.weight.shape, mixer.n_heads
    M = gates // H - mixer.gate_value
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device=device, generator=generator, dtype=torch.float32)

    twin = move.ValueMixer(d, H, M, mixer.gate_value).to(device, torch.float32)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            twin.router.weight.copy_(random(gates, d) * d ** -0.5)
            idx = torch.tensor([[4, 0, 4, 2, 1, 4, 0, 3]], device=device)
            memory = Memory(random(5, M, H * 16), idx)
            x, v = random(1, 8, d), random(1, 8, H, 16)
            expected = twin(x, v, memory.tensor())
            twin.__class__ = FastValueMixer
            got = twin(x, v, memory)
    finally:
        torch.set_float32_matmul_precision(precision)
    return bool((got - expected).norm() <= 1e-4 * expected.norm())


def obstacle(model):
    """Why a model cannot be accelerated, in words; or None."""
    if what := edited():
        return what
    if any(getattr(torch.nn.modules.module, f"_global_{kind}", None) for kind in GLOBAL_HOOKS):
        return "there are hooks for all modules"
    mixers = []
    for module in model.modules():
        inside = {type(m) for m in module.modules()} if has_backward_hooks(module) else ()
        if move.ValueMixer in inside and move.ValueBank not in inside:  # it comes from outside
            return f"a {type(module).__name__} has backward hooks, which would not see the memory"
        kind = next((kind for kind in FAST if isinstance(module, kind)), None)
        if kind is None:
            continue
        if type(module) is not kind:
            return f"{type(module).__name__} is a subclass of {kind.__name__}"
        if what := what_changed(module):
            return what
        for parameter in module.parameters():
            if type(parameter.data) is not torch.Tensor:
                return f"the weights of a {kind.__name__} are no plain tensors"
            if not (parameter.is_cuda or INTERPRETED and parameter.device.type == "cpu"):
                return f"the model is on {parameter.device.type}, not on a CUDA device"
        mixers += [module] if kind is move.ValueMixer else []
    if not all(map(mixes_agree, mixers)):
        return "a ValueMixer gives other values than the kernels"
    return None


def accelerate(model, log=print):
    """Makes a model faster that is on a CUDA device: any nn.Module that holds a ValueBank and ValueMixers, a
    GPT above all. Returns whether it did. Parameters, state_dict and numbers (but for rounding) stay. A
    number that is not finite also makes NaN of other tokens in the same matrix product.

    It swaps the classes of all modules of exactly the types in FAST, or of none: for a subclass, another
    router, a hook, also one for all modules, a method that was replaced, or a move.py whose equations were
    edited, it logs one line and leaves the reference, which honours them all. What is changed later raises
    RuntimeError at the next forward pass, but for hooks for all modules.

    An accelerated bank gives a private handle, which only ValueMixers can read: hooks that are put on a layer
    or on all modules later see neither the memory nor the layers that the kernels compute. A gradient of a
    gradient is a RuntimeError. A table that a single layer reads, as in LaVE, is left to the reference, which
    torch.compile makes as fast.
    """
    for module in model.modules():  # a model may be accelerated again
        if type(module) in REFERENCE:
            module.__class__ = REFERENCE[type(module)]
    if what := obstacle(model):
        log(f"no kernels: {what}")
        return False
    modules = [m for m in model.modules() if type(m) in FAST]
    banks, mixers = ([m for m in modules if type(m) is kind] for kind in (move.ValueBank, move.ValueMixer))
    parts_of_memory = {*banks, *mixers} if len(banks) >= len(mixers) else ()
    swapped = [m for m in modules if m not in parts_of_memory]
    if not swapped:
        log("no kernels: there is no bank that several layers read, and no GPT")
        return False
    for module in swapped:
        module.__class__ = FAST[type(module)]
    parts, inside = [(weakref.ref(m), type(m)) for m in modules], {None, *model.modules()}
    for module in modules:
        if hasattr(module, "key"):
            if module not in WATCHED:  # a model may be accelerated again, also as a part of another
                module.key = next(KEYS)
            others = [entry for entry in WATCHED.get(module, []) if entry[0]() not in inside]
            WATCHED[module] = [*others, (weakref.ref(model), parts)]
    return True


def zero_grad(model):
    """As model.zero_grad(), but the gradients of accelerated banks become zeros that backward adds to in
    place, in the rows that the batch touches. To be called before the first forward pass of each step.
    Autograd does not see such gradients: DistributedDataParallel, hooks and autograd.grad need
    model.zero_grad() instead. zero_grad between a forward and its backward pass: right, or an error."""
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, FastValueBank) and module.weight.requires_grad:
            module.zero_grad_in_place()


# ------------------------------------------------------------------------------------------ generation

# Steps of generation from which on it takes less time to make a CUDA graph first, and to compile it.
STEPS_FOR_GRAPH, STEPS_TO_COMPILE = 16, 10_000


def plain_twin(model):
    """A GPT of this config on the meta device, where it takes no room, if the model is what its config makes:
    modules of the types of move.py, or of their fast ones, with the same tensors, without hooks and without
    changes. Else None."""
    with torch.device("meta"):
        twin = move.GPT(model.config, model.dtype)
    same = parts_of(twin) == parts_of(model) and not any(
        what_changed(part) or has_hooks(part)
        or any(callable(getattr(type(part), name, None)) for name in vars(part))  # a method of its own
        for part in model.modules())
    return twin if same else None


def parts_of(model):
    """The types of its modules and the shapes of its tensors, by name."""
    return ({name: REFERENCE.get(type(part), type(part))
             for name, part in model.named_modules(remove_duplicate=False)},
            {name: getattr(tensor, "shape", None) for name, tensor in model.state_dict().items()})


def fast_step(model, pick, compiled, **how):
    """A step of generation for one new token (see move.GPT.decoding_step), sampling included, as one CUDA
    graph. Several new tokens, those of a prompt, are read as usual; and on a CPU there is no graph.

    It computes with a plain GPT of the model's config and weights, cast to the dtype of the activations
    once: if a weight changes, make a new step. ValueError for a model with other parts. To be called in
    inference mode, with noise.
    compiled: whether the compiler is asked, which takes seconds. how: what torch.compile gets then, instead
    of the options that are best for this batch.
    """
    twin = plain_twin(model)
    if twin is None:
        raise ValueError("this GPT has parts that its config does not say; take model.decoding_step")
    dtype = model.dtype or model.embedding.weight.dtype
    kept = {"cos", "sin", *(f"{name}.weight" for name, module in model.named_modules()
                            if isinstance(module, move.ValueBank))}  # only rows of a bank are read, and cast
    twin.load_state_dict({name: tensor if name in kept else tensor.to(dtype)
                          for name, tensor in model.state_dict().items()}, assign=True)
    steps_of = functools.cache(lambda batch: step_of(twin, pick, compiled, batch, how))
    graphs = weakref.WeakKeyDictionary()  # cache → StepGraph

    def next_ids(idx, cache, noise):
        if idx.size(1) > 1:
            return pick(model.logits(model.hidden(idx, cache)[:, -1:])[:, -1], noise)  # with the kernels
        if cache.length >= model.config.seq_len:
            raise ValueError(f"this model reads {model.config.seq_len} tokens (seq_len), and no more")
        cache.positions(1)  # raises where the cache is full
        step = steps_of(idx.size(0))
        if not idx.is_cuda:
            return step(idx, cache, noise)
        if cache not in graphs:
            graphs[cache] = StepGraph(step, idx, cache, noise)
        return graphs[cache](idx, cache, noise)

    return next_ids


def step_of(model, pick, compiled, batch, how):
    """step(idx (batch, 1), cache, noise) → the next ids."""
    def block_step(block, *inputs):
        if batch > 1:
            return block(*inputs)
        with sdpa_kernel(SDPBackend.MATH):  # which the compiler fuses
            return block(*inputs)

    def finish(x, noise):
        return pick(model.logits(x)[:, -1], noise)

    fast = model
    if compiled:
        # A text alone: with this option products with one row become sums, which are fused with what
        # surrounds them. Each function has code of its own: the compiler remembers a few models for each.
        how = how or dict(options={"coordinate_descent_tuning": batch == 1})
        for function in (block_step, finish):
            function.__code__ = function.__code__.replace()
        run, finish = (torch.compile(f, fullgraph=True, dynamic=False, **how) for f in (block_step, finish))
        fast = model.with_blocks([functools.partial(run, block) for block in model.blocks])
    return lambda idx, cache, noise: finish(fast.hidden(idx, cache), noise)


@functools.cache
def capture_stream(device):
    """The stream on which graphs of this device are made: libraries keep memory for each stream."""
    return torch.cuda.Stream(device)


class StepGraph:
    """A step of generation with this cache and batch as a CUDA graph."""

    def __init__(self, step, idx, cache, noise):
        self.idx, self.noise, self.graph = idx.clone(), noise.clone(), torch.cuda.CUDAGraph()
        position, length = cache.position.clone(), cache.length
        with torch.cuda.device_of(idx):
            stream = capture_stream(idx.device)
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    for _ in range(2):  # compiles; then all is as in any later step
                        step(self.idx, cache, self.noise)
                        cache.position.copy_(position)
                        cache.length = length
                torch.cuda.current_stream().wait_stream(stream)
                with torch.cuda.graph(self.graph, stream=stream):
                    self.new = step(self.idx, cache, self.noise)
            finally:
                cache.position.copy_(position)
                cache.length = length

    def __call__(self, idx, cache, noise):
        if (idx.shape, noise.shape) != (self.idx.shape, self.noise.shape):
            raise RuntimeError(f"this cache is one of {len(self.idx)} sequences, not of ids "
                               f"{tuple(idx.shape)} and noise {tuple(noise.shape)}")
        self.idx.copy_(idx)
        self.noise.copy_(noise)
        self.graph.replay()
        cache.length += 1
        return self.new.clone()  # the next replay overwrites it


# ---------------------------------------------------------------------------------- AdamW of a bank


@triton.jit
def adamw_kernel(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there, t = at < n, tl.load(step)
    old, d = tl.load(p + at, there).to(tl.float32), tl.load(g + at, there).to(tl.float32)
    first = beta1 * tl.load(m + at, there).to(tl.float32) + (1 - beta1) * d
    second = beta2 * tl.load(v + at, there).to(tl.float32) + (1 - beta2) * d * d
    share1, share2 = 1 - tl.exp2(t * tl.log2(beta1)), 1 - tl.exp2(t * tl.log2(beta2))
    new = old * (1 - lr * weight_decay) - lr / share1 * first / (tl.sqrt(second / share2) + eps)
    tl.store(p + at, new, there)
    tl.store(m + at, first, there)
    tl.store(v + at, second, there)


def adamw(p, m, v, step, lr, betas, eps, weight_decay):
    """A step of AdamW on p by p.grad; all contiguous and of the same shape and dtype. step (): the number of
    this step, from 1, float32. Sums are float32. PyTorch's takes 1.4 to 1.5 times as long in bfloat16."""
    n = p.numel()
    with torch.cuda.device_of(p):
        adamw_kernel[triton.cdiv(n, 4096),](p, p.grad, m, v, step, lr, *betas, eps, weight_decay, n,
                                            BLOCK=4096, num_warps=8)


# --------------------------------------------------------------------------------- rows of a store

COPIERS = 4  # programs that copy rows: nearly enough for the bandwidth of a link; products wait for more


@triton.jit
def copy_rows_kernel(to, to_rows, source, source_rows, n, width, BLOCK: tl.constexpr):
    for i in range(tl.program_id(0), n, tl.num_programs(0)):
        to_row = tl.load(to_rows + i).to(tl.int64)
        source_row = tl.load(source_rows + i).to(tl.int64)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            values = tl.load(source + source_row * width + at, mask=at < width)
            tl.store(to + to_row * width + at, values, mask=at < width)


def copy_rows(to, to_rows, source, source_rows):
    """to[to_rows] = source[source_rows] for tensors (n, …), of which one may be pinned host memory: the
    bytes cross the link once. Rows: int64 (n,)."""
    if n := len(source_rows):
        word = torch.int32 if to[0].numel() * to.element_size() % 4 == 0 else torch.int16
        to, source = (t.flatten(1).view(word) for t in (to, source))
        with torch.cuda.device_of(source_rows):
            copy_rows_kernel[min(n, COPIERS),](to, to_rows, source, source_rows, n, to.size(1), BLOCK=4096)


@triton.jit
def row_in_seat(near, seats, i, at, width):
    """Where p is, in row i; m and v come behind it. And p, m and v, float32."""
    row = near + tl.load(seats + i).to(tl.int64) * 3 * width + at
    p, m, v = tl.load(row, at < width), tl.load(row + width, at < width), tl.load(row + 2 * width, at < width)
    return row, p.to(tl.float32), m.to(tl.float32), v.to(tl.float32)


@triton.jit
def read_rows_kernel(out, near, seats, c, constants, width, BLOCK: tl.constexpr):
    i, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, p, m, v = row_in_seat(near, seats, i, at, width)
    p -= tl.load(c + i) * m / (tl.sqrt(v) + tl.load(constants + 4))
    tl.store(out + i * width + at, p, at < width)


@triton.jit
def update_rows_kernel(near, seats, c, decay, g, sources, n_sources, constants, n, width,
                       BLOCK: tl.constexpr):
    i, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, p, m, v = row_in_seat(near, seats, i, at, width)
    d = tl.zeros([BLOCK], tl.float32)
    for q in range(n_sources):
        source = tl.load(sources + q * n + i)
        d += tl.load(g + source * width + at, at < tl.where(source < 0, 0, width), 0).to(tl.float32)
    eps = tl.load(constants + 4)
    p -= tl.load(c + i) * m / (tl.sqrt(v) + eps)
    m = tl.load(decay + i) * m + tl.load(constants) * d
    v = tl.load(decay + n + i) * v + tl.load(constants + 1) * d * d
    p -= tl.load(constants + 2) * m / (tl.sqrt(v / tl.load(constants + 3)) + eps)
    tl.store(row, p, at < width)
    tl.store(row + width, m, at < width)
    tl.store(row + 2 * width, v, at < width)


def read_rows(out, near, seats, c, constants):
    """move_store.read_rows, in one pass."""
    if n := len(seats):
        width = near[0, 0].numel()
        with torch.cuda.device_of(near):
            read_rows_kernel[n, triton.cdiv(width, 1024)](out, near, seats, c.float(), constants, width,
                                                          BLOCK=1024)


def update_rows(near, seats, c, decay, g, sources, constants):
    """move_store.update_rows, in one pass."""
    if n := len(seats):
        width = near[0, 0].numel()
        with torch.cuda.device_of(near):
            update_rows_kernel[n, triton.cdiv(width, 1024)](near, seats, c.float(), decay.float(), g, sources,
                                                            len(sources), constants, n, width, BLOCK=1024)
