"""The mix of MoVE and its gradients as Triton kernels: the same equations as move.py, read another way.

A batch has far fewer different ids than tokens. Its tokens are sorted by id once (`Plan`), and every kernel works on
tiles of sorted tokens, in which equal ids are neighbours. All tokens of one id share one block of the bank, so that
mixing them is a small matrix product, and the memory M_t (B, T, M, d) is never written down. For a head h, the
tokens of one id w, their gates g (n, M) and the id's slots E = bank[w, :, h] (M, d_h):

    forward       V_S = g_0 ⊙ V + g E                                                        (n, d_h)
    backward      dV = g_0 ⊙ dV_S      dg_0 = Σ_d V ⊙ dV_S      dg = dV_S Eᵀ                  (n, M)
                  dz = dg ⊙ g (1 - g/2), since g = 2σ(z)
    the bank      dE = Σ_layers gᵀ dV_S                                                      (M, d_h)

The last line waits for the gradients of all layers and is one product over tokens and layers: dE is written once, and
a row that no token of the batch has is not touched. Autograd is made to wait by tickets: the bank hands each layer two
tensors of zeros that nothing reads and that take no space; the "gradients" that the layer returns for them are its
dV_S and its router outputs z, and the tickets' own backward, which comes last, has them all (`Tickets`).

No sum depends on the order in which programs run: the results are the same from run to run.

Shapes: N = B·T tokens, H heads of d_h, W = H·d_h the width of a slot, M slots. `vz` (N, W + G) holds the values V and
behind them the router's outputs z: those of the slots, (H, M), then those of g_0, (H,), if it is gated, then padding, of
up to 64 columns. So one matrix product makes both, and one takes both their gradients. Sums are float32; products are in
the dtype of vz, which is float32, bfloat16 or float16; the bank's is any of these.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

MAX_LAYERS = 128  # that can share one bank in one pass
TILE = 16  # sorted tokens that one program mixes
MAX_TOKENS = TILE * 65535  # in one pass: CUDA's limit on a grid's second axis
GRADIENT_TILE = 32  # sorted tokens whose share of the bank's gradient one program adds up
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run as Python, for tests without a GPU


class Plan(NamedTuple):
    """The tokens of a batch in the order of their ids, int32. Made on the device; nothing waits for it."""
    order: torch.Tensor  # (N,) the token at each place of the order
    group: torch.Tensor  # (N,) which of the different ids it has: 0, 0, 1, 2, 2, 2, …
    start: torch.Tensor  # (N + 1,) the place where each group starts; N for groups that are not there
    ids: torch.Tensor  # (N,) the id of each group


def make_plan(idx):
    """Token ids (B, T) → Plan."""
    ids, order = idx.flatten().to(torch.int32).sort(stable=True)
    N = ids.size(0)
    group = F.pad(ids[1:] != ids[:-1], (1, 0)).cumsum(0)
    start = torch.searchsorted(group, torch.arange(N + 1, device=idx.device))
    ids = ids[start[:-1].clamp(max=N - 1)]
    return Plan(*(t.to(torch.int32) for t in (order, group, start, ids)))


# ---------------------------------------------------------------------------------------- kernels
#
# One program has one head and one tile of sorted tokens. It takes GROUPS groups at a time, so that one product serves
# them all: its inner dimension runs over GROUPS · SLOTS rows of the bank, and a token has gates of 0 for the groups that
# it is not of. Where M is large, SLOTS slots are taken at a time. HEAD is d_h and COLUMNS a power of two not below it.


@triton.jit
def gate(z):
    """g = 2σ(z) in float32."""
    return 2 / (1 + tl.exp(-z.to(tl.float32)))


@triton.jit
def spread(g, group, j_0, GROUPS: tl.constexpr, SLOTS: tl.constexpr):
    """Gates (n, SLOTS) of tokens of these groups → (n, GROUPS · SLOTS): each in the columns of its group, else 0."""
    mine = group[:, None, None] == j_0 + tl.arange(0, GROUPS)[None, :, None]
    return tl.reshape(tl.where(mine, g[:, None, :], 0), (g.shape[0], GROUPS * SLOTS))


@triton.jit
def rows_of_groups(ids, j_0, last, m_0, M: tl.constexpr, W: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr):
    """Where the slots m_0 … of groups j_0 … last begin in the bank, (GROUPS · SLOTS,), and which of them exist."""
    row = tl.arange(0, GROUPS * SLOTS)
    j, m = j_0 + row // SLOTS, m_0 + row % SLOTS
    return tl.load(ids + j, j <= last, 0).to(tl.int64) * M * W + m * W, (j <= last) & (m < M)


@triton.jit
def tokens_of_tile(order, group, N, TILE: tl.constexpr):
    """The tokens of this program's tile, which of them exist, their groups, and the first and the last of these."""
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = place < N
    my_group = tl.load(group + place, live, -1)
    return tl.load(order + place, live, 0).to(tl.int64), live, my_group, tl.load(group + tl.program_id(1) * TILE), tl.max(my_group)


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
        z = tl.load(vz + token[:, None] * ROW + W + head * M + m[None, :], live[:, None] & (m < M)[None, :], 0)
        g = gate(z).to(z.dtype)
        for j_0 in range(first, last + 1, GROUPS):
            row, there = rows_of_groups(ids, j_0, last, m_0, M, W, GROUPS, SLOTS)
            E = tl.load(bank + row[:, None] + head * HEAD + column[None, :], there[:, None] & (column < HEAD)[None, :], 0)
            v_s = tl.dot(spread(g, my_group, j_0, GROUPS, SLOTS), E.to(g.dtype), v_s, input_precision="ieee")
    tl.store(out + token[:, None] * W + head * HEAD + column[None, :], v_s, in_head)


@triton.jit
def mix_backward_kernel(d_vs, vz, bank, order, group, ids, d_vz, N,
                        M: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr, HEAD: tl.constexpr, GATED: tl.constexpr,
                        TILE: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr):
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
            row, there = rows_of_groups(ids, j_0, last, m_0, M, W, GROUPS, SLOTS)
            E = tl.load(bank + row[:, None] + head * HEAD + column[None, :], there[:, None] & (column < HEAD)[None, :], 0)
            every = tl.reshape(tl.dot(d, tl.trans(E.to(d.dtype)), input_precision="ieee"), (TILE, GROUPS, SLOTS))
            mine = my_group[:, None, None] == j_0 + tl.arange(0, GROUPS)[None, :, None]
            d_g += tl.sum(tl.where(mine, every, 0), 1)
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
                         M: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr, HEAD: tl.constexpr, GATED: tl.constexpr,
                         TILE: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Adds dE = Σ_layers gᵀ dV_S to the gradient. d_vs_of, vz_of (L,): how far behind `like` the layers' tensors lie, in
    UNITs of 16 bytes, so that the compiler knows that it can read so many at once. ROWS tokens-in-a-layer are summed at a time. Of a group that began in an earlier tile, the part
    of this tile goes to carry[tile] (M, W), for carry_kernel to add."""
    chunks = tl.cdiv(M, SLOTS)
    head, m_0, tile = tl.program_id(0) // chunks, tl.program_id(0) % chunks * SLOTS, tl.program_id(1)
    m, column = m_0 + tl.arange(0, SLOTS), tl.arange(0, COLUMNS)
    begin, end = tile * TILE, tl.minimum(tile * TILE + TILE, N)
    first, last = tl.load(group + begin), tl.load(group + end - 1)
    UNIT: tl.constexpr = 128 // like.dtype.element_ty.primitive_bitwidth
    for j_0 in range(first, last + 1, GROUPS):
        row, there = rows_of_groups(ids, j_0, last, m_0, M, W, GROUPS, SLOTS)
        earlier = tl.load(start + j_0 + tl.arange(0, GROUPS * SLOTS) // SLOTS, there, N) < begin
        to = gradient + row[:, None] + head * HEAD + column[None, :]
        mine = (there & ~earlier)[:, None] & (column < HEAD)[None, :]
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
            d = tl.load(like + at_d[:, None] + head * HEAD + column[None, :], live[:, None] & (column < HEAD)[None, :], 0)
            g = spread(gate(z).to(z.dtype), tl.load(group + from_place + r // L, live, -1), j_0, GROUPS, SLOTS)
            d_E = tl.dot(tl.trans(g), d, d_E, input_precision="ieee")
        tl.store(to, d_E, mine)
        slot = m_0 + tl.arange(0, GROUPS * SLOTS) % SLOTS
        tl.store(carry + (tile.to(tl.int64) * M + slot)[:, None] * W + head * HEAD + column[None, :], d_E,
                 (there & earlier)[:, None] & (column < HEAD)[None, :])


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


# -------------------------------------------------------------------------------------------- ops


def constants(vz, bank, n_heads, gated):
    """What every kernel is compiled for."""
    M, W = bank.shape[1:]
    columns = max(16, triton.next_power_of_2(W // n_heads))
    rows = min(64, max(16, triton.next_power_of_2(M)), 8192 // columns)  # of the bank at a time
    slots = min(rows, max(4, triton.next_power_of_2(M)))
    return dict(M=M, W=W, ROW=vz.size(1), HEAD=W // n_heads, GATED=gated, SLOTS=slots, GROUPS=rows // slots, COLUMNS=columns)


@torch.library.custom_op("move::mix", mutates_args=())
def mix(vz: torch.Tensor, bank: torch.Tensor, order: torch.Tensor, group: torch.Tensor, ids: torch.Tensor,
        n_heads: int, gated: bool) -> torch.Tensor:
    """Equation 3: vz (N, W + G), bank (V, M, W), the plan → V_S (N, W)."""
    out = vz.new_empty(len(vz), bank.size(2))
    fixed = constants(vz, bank, n_heads, gated)
    with torch.cuda.device_of(vz):
        mix_kernel[n_heads, triton.cdiv(len(vz), TILE)](vz, bank, order, group, ids, out, len(vz), TILE=TILE, **fixed,
                                                        num_warps=fixed["GROUPS"] * fixed["SLOTS"] // 16, num_stages=1)
    return out


@mix.register_fake
def _(vz, bank, order, group, ids, n_heads, gated):
    return vz.new_empty(vz.size(0), bank.size(2))


@torch.library.custom_op("move::mix_backward", mutates_args=())
def mix_backward(d_vs: torch.Tensor, vz: torch.Tensor, bank: torch.Tensor, order: torch.Tensor, group: torch.Tensor,
                 ids: torch.Tensor, n_heads: int, gated: bool) -> torch.Tensor:
    """dV_S (N, W) → the gradient of vz (N, W + G)."""
    d_vz = torch.empty_like(vz)
    fixed = constants(vz, bank, n_heads, gated)
    with torch.cuda.device_of(vz):
        mix_backward_kernel[n_heads, triton.cdiv(len(vz), TILE)](d_vs, vz, bank, order, group, ids, d_vz, len(vz), TILE=TILE, **fixed,
                                                                 num_warps=fixed["GROUPS"] * fixed["SLOTS"] // 16, num_stages=1)
    return d_vz


@mix_backward.register_fake
def _(d_vs, vz, bank, order, group, ids, n_heads, gated):
    return torch.empty_like(vz)


def aligned(tensors):
    """The tensors, those copied that do not begin at a multiple of 16 bytes, as a slice of another may."""
    return [t.clone() if t.data_ptr() % 16 else t for t in tensors]


def distances(tensors, like):
    """How far behind `like` these tensors lie, in 16 bytes: int64, on their device; nothing waits for the copy."""
    table = torch.tensor([(t.data_ptr() - like.data_ptr()) // 16 for t in tensors])
    return table.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else table


@torch.library.custom_op("move::add_bank_gradient", mutates_args={"gradient"})
def add_bank_gradient(gradient: torch.Tensor, d_vs: list[torch.Tensor], vz: list[torch.Tensor], order: torch.Tensor,
                      group: torch.Tensor, start: torch.Tensor, ids: torch.Tensor, n_heads: int, gated: bool) -> None:
    """gradient (V, M, W) += Σ_layers gᵀ dV_S. d_vs, vz: of each layer, (N, W) and (N, W + G)."""
    d_vs, vz = aligned(d_vs), aligned(vz)
    N, (M, W), fixed = len(vz[0]), gradient.shape[1:], constants(vz[0], gradient, n_heads, gated)
    tiles = triton.cdiv(N, GRADIENT_TILE)
    carry = gradient.new_empty(tiles, M, W, dtype=torch.float32)
    with torch.cuda.device_of(gradient):
        bank_gradient_kernel[n_heads * triton.cdiv(M, fixed["SLOTS"]), tiles](
            distances(d_vs, vz[0]), distances(vz, vz[0]), order, group, start, ids, gradient, carry, vz[0], N, L=len(vz),
            TILE=GRADIENT_TILE, ROWS=32, **fixed, num_stages=1)
        carry_kernel[tiles, triton.cdiv(M * W, 1024)](gradient, carry, group, start, ids, M * W, TILE=GRADIENT_TILE, BLOCK=1024)


# --------------------------------------------------------------------------------------- autograd


class Mix(torch.autograd.Function):
    """V_S of one layer. Its gradient for the two tickets is what the bank's gradient will need: dV_S and vz."""

    @staticmethod
    def forward(ctx, vz, ticket_d_vs, ticket_vz, bank, plan, n_heads, gated):
        ctx.save_for_backward(vz, bank, *plan)
        ctx.n_heads, ctx.gated = n_heads, gated
        return torch.ops.move.mix(vz, bank, plan.order, plan.group, plan.ids, n_heads, gated)

    @staticmethod
    def backward(ctx, d_vs):
        vz, bank, order, group, start, ids = ctx.saved_tensors
        d_vs = d_vs.contiguous()
        d_vz = torch.ops.move.mix_backward(d_vs, vz, bank, order, group, ids, ctx.n_heads, ctx.gated)
        return d_vz, d_vs, vz, None, None, None, None


class Tickets(torch.autograd.Function):
    """Two for each of MAX_LAYERS layers. Backward: the gradient of the bank, added to `gradient` if there is one."""

    @staticmethod
    def forward(ctx, bank, gradient, plan, like, n_heads, gated):
        ctx.set_materialize_grads(False)  # None for the tickets that no layer took
        ctx.save_for_backward(bank, *plan)
        ctx.gradient, ctx.n_heads, ctx.gated = gradient, n_heads, gated
        zero = like.new_zeros(())
        return tuple(zero.expand(like.size(0), width) for _ in range(MAX_LAYERS) for width in (bank.size(2), like.size(1)))

    @staticmethod
    def backward(ctx, *tickets):
        bank, order, group, start, ids = ctx.saved_tensors
        d_vs, vz = ([t for t in tickets[i::2] if t is not None] for i in (0, 1))
        dense = torch.zeros_like(bank) if ctx.gradient is None else None
        torch.ops.move.add_bank_gradient(ctx.gradient if dense is None else dense, d_vs, vz, order, group, start, ids,
                                         ctx.n_heads, ctx.gated)
        return dense, None, None, None, None, None


# torch.compile looks into autograd's functions, and would fill the tickets that no layer takes with zeros; as they
# stand, it leaves them out.
@torch.compiler.allow_in_graph
def mixed(*args):
    return Mix.apply(*args)


@torch.compiler.allow_in_graph
def tickets(*args):
    return Tickets.apply(*args)


def runs_on(device):
    """Whether the kernels run there: on a CUDA device, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1)."""
    return device.type == "cuda" or INTERPRETED


class FusedMemory:
    """The memory of a batch for all layers: what ValueBank gives in place of the (B, T, M, W) of the reference.

    bank (V, M, W), idx (B, T) int64. gradient: where the bank's gradient is to be added, (V, M, W), which autograd then
    does not see; or None, and autograd gets it as any other, as a new tensor.
    """

    def __init__(self, bank, idx, gradient=None):
        if not bank.is_contiguous():
            raise RuntimeError("the fused mix needs a contiguous bank")
        if idx.numel() > MAX_TOKENS:
            raise ValueError(f"the fused mix takes up to {MAX_TOKENS:,} tokens at a time, not {idx.numel():,}; use mix='reference'")
        in_bank = ((idx >= 0) & (idx < bank.size(0))).all()
        torch._assert_async(in_bank, "an id is outside the bank")  # on a GPU it stops the device, as an index would
        self.bank, self.gradient, self.plan, self.shape = bank, gradient, make_plan(idx), idx.shape
        self.tickets, self.first = [], None

    def values(self, x, v, w_router, n_heads, gated):
        """x (B, T, n_in), values v (B, T, H, d_h) or the weight (W, n_in) that makes them, and a router's weight, whose
        rows lie slot by slot, g_0 first if it is gated: (M + 1, H) of them → V_S (B, T, H, d_h)."""
        M, W = self.bank.shape[1:]
        fits = v.size(0) == W if v.ndim == 2 else v.shape == (*self.shape, n_heads, W // n_heads)
        if not fits or x.shape[:2] != self.shape or W % n_heads or w_router.size(0) != n_heads * (M + gated):
            raise RuntimeError(f"a memory of {tuple(self.shape)} tokens with {M} slots of {W} and {n_heads} heads does not fit tokens "
                               f"{tuple(x.shape[:2])}, values or their weight {tuple(v.shape)} and {w_router.size(0)} gates")
        w = w_router.unflatten(0, (-1, n_heads))
        w = torch.cat((w[gated:].transpose(0, 1).flatten(0, 1), w[:gated].flatten(0, 1)))  # as vz has them
        w = F.pad(w, (0, 0, 0, -len(w) % 64))  # the rows of vz begin where lines of the GPU's memory do
        if v.ndim == 2:
            vz = F.linear(x, torch.cat((v, w)).to(x.dtype))
        else:
            vz = torch.cat((v.flatten(-2), F.linear(x, w.to(x.dtype)).to(v.dtype)), dim=-1)
        return self.mix(vz, n_heads, gated)

    def mix(self, vz, n_heads, gated):
        """vz (B, T, W + G), values and router outputs as above → V_S (B, T, H, d_h). gated: whether there is a g_0.
        TypeError for another dtype than the three, ValueError for layers that differ or are more than MAX_LAYERS and for
        heads wider than 512."""
        vz, shape = vz.flatten(0, 1), vz.shape[:2]
        if self.bank.size(2) > 512 * n_heads:
            raise ValueError(f"the fused mix takes heads of up to 512, not {self.bank.size(2) // n_heads}; use mix='reference'")
        if vz.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"the fused mix computes in float32, bfloat16 or float16, not {vz.dtype}; use mix='reference'")
        if not torch.is_grad_enabled():
            out = torch.ops.move.mix(vz, self.bank, self.plan.order, self.plan.group, self.plan.ids, n_heads, gated)
            return out.view(*shape, n_heads, -1)
        layer = (vz.shape, vz.dtype, n_heads, gated)
        if self.first is None:
            self.first, self.tickets = layer, tickets(self.bank, self.gradient, self.plan, vz.detach(), n_heads, gated)
        if self.first != layer or not self.tickets:
            raise ValueError(f"the layers of one bank must be alike in heads, gates and dtype, and at most {MAX_LAYERS}")
        pair, self.tickets = self.tickets[:2], self.tickets[2:]
        return mixed(vz, *pair, self.bank, self.plan, n_heads, gated).view(*shape, n_heads, -1)
