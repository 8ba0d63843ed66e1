"""A bank larger than a GPU: its rows live in host memory, or are dealt out over many processes.

    model = GPT(config, bank=partial(StoredBank, home="host"))
    optimizer = StoredAdamW(model, groups)          for the banks; another one takes the rest
    for idx, targets in batches:
        borrow(model, [idx])                        reads the rows of the batch; their gradient is zero
        model(idx, targets).backward()
        optimizer.step()                            their owners update them

The ids of a batch are known before its step. `StoredBank` copies their rows, the working set, into a small
`ValueBank`, on which the model trains as on any other. No other row is read or written, or has a gradient.

But AdamW moves every row at each step, also those without a gradient, since their moments fade slowly. For a
row that is not read, that can wait. If its last update was step r, after step t it has moved by

    - Σ_{s=r+1..t} lr_s · m_s / √v_s      m_s = β1^{s-r} m · 1/(1 - β1^s)    v_s = β2^{s-r} v · 1/(1 - β2^s)

    = - c_r · m / √v      c_r = Σ_s lr_s · √(1 - β2^s)/(1 - β1^s) · ρ^{s-r}      ρ = β1/√β2

and c_r is the same for all rows: one number from a table brings a row up to date when it is read. The result
is that of AdamW on the whole bank, to rounding, but for eps, which is added to √v as it was after step r.

Shapes: V ids, M slots of an id, d the width of a slot, as in move.py. A row is here all that an id has,
(M, d). Process r of N owns the rows of the ids r, r + N, r + 2N, …
"""
import contextlib
import functools
import math
import weakref
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from move import ValueBank

CHUNK = 1 << 26  # numbers that are updated at a time
KERNELS = True  # whether move_fast.py may be used; the flag --kernels sets it


def processes():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def to_device(array, device):
    """A NumPy array as a tensor; on CUDA without waiting for the GPU."""
    tensor = torch.from_numpy(np.require(array, requirements="CW"))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def chunks(n, shape):
    """Slices of n tensors of this shape, with about CHUNK numbers each."""
    size = max(1, CHUNK // math.prod(shape))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


# ----------------------------------------------------------- rows with AdamW's moments, (n, 3, M, d)


def current(rows, c, eps):
    """Rows (n, M, d) as they are now. rows: as after their last update; c (n,): c_r of each."""
    p, m, v = rows.unbind(1)
    return p - c.to(p.dtype).view(-1, 1, 1) * m / (v.sqrt() + eps)


def read_rows(out, near, seats, c, constants):
    """Those in these seats of near, as they are now, into out (n, M, d). constants: see Steps."""
    if kernels := kernels_for(near):
        return kernels.read_rows(out, near, seats, c, constants)
    for part in chunks(len(out), out.shape[1:]):
        out[part] = current(near[seats[part]].to(constants.dtype), c[part], constants[-1])


def update_rows(near, seats, c, decay, g, sources, constants):
    """A step of AdamW for the rows in n seats of near, in place. decay (2, n): what is left of each moment,
    since they may have missed some steps. The gradient of a row is the sum of rows of g (·, M, d), those with
    its indices in sources (N, n), in this order, without those that are -1."""
    if kernels := kernels_for(near):
        return kernels.update_rows(near, seats, c, decay, g, sources, constants)
    gain_m, gain_v, rate, correction, eps = constants.unbind()
    for part in chunks(len(seats), g.shape[1:]):
        rows = near[seats[part]].to(constants.dtype)
        p, (_, m, v) = current(rows, c[part], eps), rows.unbind(1)
        total = torch.zeros_like(p)
        for source in sources[:, part]:
            there = (source >= 0).view(-1, 1, 1)
            total += torch.where(there, g[source.clamp(min=0)].to(total.dtype), 0)
        decay_m, decay_v = decay[:, part].to(p.dtype).view(2, -1, 1, 1)
        m = decay_m * m + gain_m * total
        v = decay_v * v + gain_v * total * total
        p = p - rate * m / ((v / correction).sqrt() + eps)
        near[seats[part]] = torch.stack((p, m, v), dim=1).to(near.dtype)


def copy_rows(to, to_rows, source, source_rows):
    """to[to_rows] = source[source_rows]."""
    if kernels := kernels_for(to):
        return kernels.copy_rows(to, to_rows, source, source_rows)
    to[to_rows] = source[source_rows]


def kernels_for(tensor):
    """move_fast.py, if a tensor is on a GPU and of a dtype that its kernels know; None without Triton."""
    if KERNELS and tensor.is_cuda and tensor.dtype != torch.float64:
        with contextlib.suppress(ImportError):
            import move_fast
            return move_fast


class Steps:
    """What all rows of a bank have in common: the number of steps t, and the table c with an entry for each
    step that can have been a row's last, 0 to t."""

    def __init__(self, dtype, device):
        self.betas, self.eps, self.t, self.chosen = (0.8, 0.95), 1e-10, 0, False
        self.dtype = torch.promote_types(dtype, torch.float32)  # in which rows are computed
        self.c = torch.zeros(1, dtype=torch.float64, device=device)

    def use(self, betas, eps):
        """ValueError if a moment that fades would move a row for ever, or if the steps so far had others."""
        if betas[0] ** 2 >= betas[1]:
            raise ValueError(f"β1² must be less than β2, not as in {betas}")
        if self.t and (tuple(betas), eps) != (self.betas, self.eps):
            raise ValueError(f"this bank has done {self.t} steps with betas {self.betas} and eps {self.eps}; "
                             f"go on with these, not with {tuple(betas)} and {eps}")
        self.betas, self.eps, self.chosen = tuple(betas), eps, True

    def load(self, c, adam):
        """Goes on after as many steps as there are in c. adam: their β1, β2 and ε, or None where they are not
        known. ValueError if an optimizer that is there has others."""
        t = len(c) - 1
        if t and adam is not None:
            *betas, eps = adam.tolist()
            if self.chosen and (tuple(betas), eps) != (self.betas, self.eps):
                raise ValueError(f"these rows have done {t} steps with betas {tuple(betas)} and eps {eps}; "
                                 f"give their optimizer the same, not {self.betas} and {self.eps}")
            self.betas, self.eps = tuple(betas), eps
        self.t, self.c = t, c.clone().to(self.c.device)

    def constants(self, lr):
        """What the next step needs: 1 - β1, 1 - β2, lr/(1 - β1^t), 1 - β2^t and eps."""
        (beta1, beta2), t = self.betas, self.t + 1
        constants = 1 - beta1, 1 - beta2, lr / (1 - beta1 ** t), 1 - beta2 ** t, self.eps
        return to_device(torch.tensor(constants, dtype=self.dtype).numpy(), self.c.device)

    def count(self, lr):
        """One step more: all rows fall back by it, but those that it updates."""
        (beta1, beta2), self.t = self.betas, self.t + 1
        step = lr * (1 - beta2 ** self.t) ** 0.5 / (1 - beta1 ** self.t)
        ages = torch.arange(self.t, 0, -1, dtype=torch.float64, device=self.c.device)
        self.c = F.pad(self.c + step * (beta1 * beta2 ** -0.5) ** ages, (0, 1))


# ------------------------------------------------------------------------------ where the rows live


class DeviceRows:
    """Rows in the memory of a device. home (n, 3, M, d): where they live; near (·, 3, M, d): where those that
    are held have their seats, here the same; last (n,): the step of each row's last update."""

    def __init__(self, shape, dtype, device):
        self.near = self.home = torch.zeros(shape, dtype=dtype, device=device)
        self.last = torch.zeros(shape[0], dtype=torch.int64, device=device)

    def hold(self, rows):
        """Sorted, unique indices of rows, a NumPy array → their seats in self.near, until the next call."""
        return to_device(rows, self.last.device)

    def prefetch(self, rows):
        """Says which rows the next call of `hold` will name."""

    def flush(self):
        """The latest state of each row, to save."""
        return self.home

    def put(self, rows, values, last):
        """Sets rows. None is held any more."""
        self.home[rows] = values.to(self.home)
        self.last[rows] = last.to(self.last)


class HostRows(DeviceRows):
    """Rows in host memory. The device holds copies of those in use, in seats, and keeps them while there is
    room: ids that come in every batch never leave it. `moved` counts the rows that came and went.

    On CUDA they move in a second stream: those of the next step come while this one computes.
    """

    def __init__(self, shape, dtype, device):
        self.host, self.home = host_memory(shape, dtype, device)  # the same memory
        self.last = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self.device, self.stream = device, torch.cuda.Stream(device) if device.type == "cuda" else None
        self.seat_of = np.full(shape[0], -1)
        self.clock = self.moved = 0
        self.make_seats(0)

    def make_seats(self, n):
        """n empty ones."""
        self.seat_of[:] = -1
        self.row_in = self.used = np.full(0, -1)
        self.near = self.home[:0]  # frees them before there are new ones
        self.near = self.home.new_empty(n, *self.home.shape[1:])
        if self.stream:
            self.near.record_stream(self.stream)
        self.row_in, self.used = np.full(n, -1), np.full(n, -1)

    def hold(self, rows):
        if len(rows) > len(self.row_in):
            self.flush()
            self.make_seats(min(len(self.seat_of), len(rows) * 3 // 2))  # two batches share many of their ids
        self.clock += 2
        self.bring(rows, self.clock)
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return to_device(self.seat_of[rows], self.device)

    def prefetch(self, rows):
        self.bring(rows, self.clock + 1)

    def bring(self, rows, use):
        """These rows come into seats, in the place of those that were not used for longest; a prefetch takes
        none from the rows held now. use: what the clock says of it."""
        seats = self.seat_of[rows]
        new = rows[seats < 0]
        self.used[seats[seats >= 0]] = use
        if not len(new):
            return
        room = np.flatnonzero(self.used < self.clock)
        to = room[np.argsort(self.used[room], kind="stable")][:len(new)]
        new, full = new[:len(to)], to[self.row_in[to] >= 0]
        old = self.row_in[full]
        self.copy(self.home, old, self.near, full)
        self.seat_of[old] = self.row_in[full] = -1  # before others come: a signal may end this at any line
        self.copy(self.near, to, self.home, new)
        self.seat_of[new], self.row_in[to], self.used[to] = to, new, use
        self.moved += len(old) + len(new)

    def copy(self, to, to_rows, source, source_rows):
        """In the second stream, after the work that is in the first one by now."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):  # on a CPU it is None and this does nothing
            copy_rows(to, to_device(to_rows, self.device), source, to_device(source_rows, self.device))

    def flush(self):
        seats = np.flatnonzero(self.row_in >= 0)
        self.copy(self.home, self.row_in[seats], self.near, seats)
        if self.stream:
            self.stream.synchronize()
        return self.host

    def put(self, rows, values, last):
        if self.stream:
            self.stream.synchronize()  # it may still write some back
        super().put(rows, values, last)
        self.make_seats(0)  # or the copies there would win


def host_memory(shape, dtype, device):
    """Zeros in host memory, as a CPU tensor and as one that the device can compute with: on CUDA the same
    memory, pinned, with its address for the GPU. MemoryError if there is too little."""
    if device.type != "cuda" or 0 in shape:
        tensor = torch.zeros(shape, dtype=dtype)
        return tensor, tensor.to(device)
    tensor = torch.empty(shape, dtype=dtype)  # not pin_memory=True, which rounds up to a power of two
    # torch takes bytes as they are, and knows no bfloat16 here
    alias = torch.as_tensor(Pinned(tensor, device), device=device).view(dtype).view(shape)
    if alias.data_ptr() != tensor.data_ptr():
        raise MemoryError("this GPU cannot address host memory; give --bank_home gpu")
    return tensor, alias.zero_()


class Pinned:
    """Host memory, pinned for a device while this object lives, as an array that CUDA libraries know."""

    def __init__(self, tensor, device):
        self.tensor, pointer, size = tensor, tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if error := int(torch.cuda.cudart().cudaHostRegister(pointer, size, 0)):
            raise MemoryError(f"cannot pin {size / 1e9:.1f} GB of host memory (CUDA error {error})")
        self.__cuda_array_interface__ = dict(data=(pointer, False), shape=(size,), typestr="|u1", version=3)
        weakref.finalize(self, unpin, pointer, device).atexit = False


def unpin(pointer, device):
    torch.cuda.synchronize(device)  # a stream may still read it
    torch.cuda.cudart().cudaHostUnregister(pointer)


# --------------------------------------------------------------------------- the bank that borrows


class Share(NamedTuple):
    """Who reads which rows in a step; NumPy arrays."""
    ids: np.ndarray  # (n,) that this process reads
    order: np.ndarray  # (n,) their indices, sorted by the process that owns them
    received: np.ndarray  # (N,) how many rows this process gets of each
    sent: np.ndarray  # (N,) how many rows each gets of this one
    rows: np.ndarray  # (m,) the different ones of this process's rows that are asked for
    at: np.ndarray  # which of these, for each row that is asked for, process by process
    sources: np.ndarray  # (N, m) the other way: where process q asks for row i; -1 if it does not


class StoredBank(nn.Module):
    """A ValueBank (V, M, d) whose rows live elsewhere: bank(idx) → memory (B, T, M, d), after bank.read(ids).

    home: 'gpu', the memory of `device`, or 'host', host memory. The processes of torch.distributed share the
    rows out, and call `read` and `update` together.
    std: as ValueBank. On a CPU the rows start as those of a ValueBank, if M·d is a multiple of 16; on CUDA
    they start as N(0, std²) by random numbers of the GPU.

    An id that was not read raises IndexError on a CPU and is a device-side assert on CUDA. In eval mode,
    without gradients, the bank of one process reads by itself. The state_dict does not have the rows.
    """

    def __init__(self, vocab_size, n_slots, dim, std=None, *, home, dtype=torch.float32, device="cpu"):
        super().__init__()
        if home not in ("gpu", "host"):
            raise ValueError(f"home must be 'gpu' or 'host', not {home!r}")
        device = torch.device(device)
        self.rank, self.n = processes()
        with torch.device("meta"):
            self.working_set = ValueBank(1, n_slots, dim, std)
        self.working_set.weight = nn.Parameter(torch.zeros(1, n_slots, dim, dtype=dtype, device=device))
        self.register_buffer("place", torch.ones(vocab_size, dtype=torch.int64, device=device),
                             persistent=False)  # of an id in the working set; its length for those not there
        self.vocab_size, self.steps = vocab_size, Steps(dtype, device)
        self.borrowed = None  # what is borrowed: its Share, the rows of this process among it, their seats
        self.prefetched = None  # the Share of the next read, if prefetch said which
        shape = len(range(self.rank, vocab_size, self.n)), 3, n_slots, dim
        self.rows = (DeviceRows if home == "gpu" else HostRows)(shape, dtype, device)
        self.reset_parameters()

    def reset_parameters(self):
        """The rows start as N(0, std²), the same whatever the number of processes."""
        device, (M, d), generator = self.place.device, self.rows.home.shape[2:], None
        if device.type == "cuda":
            generator = torch.Generator(device).manual_seed(torch.randint(1 << 62, ()).item())
        step = max(1, CHUNK // (M * d))
        for start in range(0, self.vocab_size, step):
            some = torch.empty(min(step, self.vocab_size - start), M, d, device=device)
            nn.init.normal_(some, std=self.working_set.std, generator=generator)
            mine = some[(self.rank - start) % self.n::self.n]
            first = len(range(self.rank, start, self.n))  # of mine, as this process counts its rows
            self.rows.home[first:first + len(mine), 0] = mine

    def forward(self, idx):
        if self.n == 1 and not self.training and not torch.is_grad_enabled():
            self.read(np.unique(idx.cpu().numpy()))
        if self.borrowed is None:
            raise RuntimeError("no rows are borrowed; call borrow(model, batches) before the forward pass")
        weight = self.working_set.weight
        memory = self.working_set(F.embedding(idx, self.place.unsqueeze(1)).squeeze(-1))
        # The kernels look by themselves, and in what is compiled without them there are no hooks.
        if torch.is_tensor(memory) and memory.requires_grad and not torch.compiler.is_compiling():
            memory.register_hook(functools.partial(refuse_replaced, weight, weight._version))
        return memory

    @torch.inference_mode(False)
    @torch.no_grad()
    def read(self, ids):
        """Borrows the rows of these ids (n,), sorted and unique, a NumPy array: the working set holds them,
        as they are after the last update, without a gradient. RuntimeError if one waits for its update, and
        in a backward pass later whose forward pass had other rows (which is not noticed where the bank is in
        a block that is compiled without the kernels)."""
        weight = self.working_set.weight
        if self.borrowed is not None and weight.grad is not None and weight.grad.any():
            raise RuntimeError("a gradient of the rows that are borrowed waits: call the optimizer's step or "
                               "model.zero_grad() before other rows are read")
        self.borrowed = weight.grad = None  # of other ids
        torch.autograd.graph.increment_version(weight)  # autograd is to know that it is written
        share, device = self.prefetched, self.place.device
        same = torch.tensor(int(share is not None and np.array_equal(ids, share.ids)))
        if self.n > 1:  # all processes do the same
            dist.all_reduce(same, dist.ReduceOp.MIN)
        if same:
            self.prefetched = None
        else:
            share = self.share(ids)
        held, at = to_device(share.rows, device), to_device(share.at, device)
        seats, c = self.rows.hold(share.rows), self.steps.c[self.rows.last[held]]
        out = self.room(len(ids))
        rows = out if self.n == 1 else out.new_empty(len(at), *out.shape[1:])
        read_rows(rows, self.rows.near, seats[at], c[at], self.steps.constants(0))
        exchange(rows, share.sent, share.received, out)
        self.place.fill_(len(self.working_set.weight))  # an id that was not read has no place
        self.place[to_device(ids[share.order], device)] = torch.arange(len(ids), device=device)
        self.borrowed = share, held, seats

    def prefetch(self, ids):
        """Says which ids the next `read` will have, while the GPU works on this step. All processes call it,
        or none."""
        self.prefetched = self.share(ids)
        self.rows.prefetch(self.prefetched.rows)

    def share(self, ids):
        """Who reads which rows: see Share."""
        if len(ids) and not 0 <= ids[0] <= ids[-1] < self.vocab_size:
            raise IndexError(f"ids from {ids[0]} to {ids[-1]} are not all in a bank of {self.vocab_size}")
        owner = ids % self.n
        order = np.argsort(owner, kind="stable")
        received, one = np.bincount(owner, minlength=self.n), np.ones(self.n, dtype=np.int64)
        sent = exchange(torch.from_numpy(received), one, one).numpy()
        rows = exchange(torch.from_numpy(ids[order] // self.n), received, sent).numpy()
        rows, at = np.unique(rows, return_inverse=True)
        sources = np.full((self.n, len(rows)), -1)
        sources[np.repeat(np.arange(self.n), sent), at] = np.arange(len(at))
        return Share(ids, order, received, sent, rows, at, sources)

    def room(self, n):
        """The first n rows of the working set, which grows if it is too small."""
        weight = self.working_set.weight
        if n > len(weight):
            larger = min(self.vocab_size, n + n // 4 + 64)  # each time torch.compile compiles anew
            weight.data = weight.data.new_zeros(0, *weight.shape[1:])  # frees it first
            # A new parameter, since the loss of a step before, if it is still there, knows the old shape.
            weight = self.working_set.weight = nn.Parameter(
                weight.data.new_zeros(larger, *weight.shape[1:]), weight.requires_grad)
        return weight.data[:n]

    @torch.no_grad()
    def update(self, lr):
        """A step of AdamW for the rows that were read, by the gradient of the working set; none if no process
        has one. After it they must be read again."""
        if self.borrowed is None:
            raise RuntimeError("no rows are borrowed; call borrow(model, batches) before the step")
        (share, held, seats), weight, steps = self.borrowed, self.working_set.weight, self.steps
        self.borrowed, trained = None, torch.tensor(int(weight.grad is not None))
        if self.n > 1:  # one without a batch has none
            dist.all_reduce(trained, dist.ReduceOp.MAX)
        if not trained:
            return
        n, last = len(share.ids), self.rows.last[held]
        g = weight.new_zeros(n, *weight.shape[1:]) if weight.grad is None else weight.grad[:n].contiguous()
        decay = torch.stack([beta ** (steps.t + 1 - last).double() for beta in steps.betas])
        g = exchange(g, share.received, share.sent)  # back, the way that the rows came
        update_rows(self.rows.near, seats, steps.c[last], decay, g,
                    to_device(share.sources, held.device), steps.constants(lr))
        steps.count(lr)
        self.rows.last.index_fill_(0, held, steps.t)  # [held] = t would wait for the GPU


def refuse_replaced(weight, version, gradient):
    """A hook of a memory: RuntimeError if the rows that it was read from are no longer in the weight."""
    if weight._version != version:
        raise RuntimeError("other rows were borrowed between this forward pass and its backward pass; borrow "
                           "all ids of a step at once")


def exchange(sent, sent_counts, received_counts, received=None):
    """Each process sends rows to each, as bytes, which all backends know → those that this one gets."""
    if len(sent_counts) == 1:
        return sent
    if received is None:
        received = sent.new_empty(int(received_counts.sum()), *sent.shape[1:])
    to, source = (rows.unsqueeze(-1).view(torch.uint8).flatten(1) for rows in (received, sent))
    dist.all_to_all_single(to, source, received_counts.tolist(), sent_counts.tolist())
    return received


def empty_bank(vocab_size, n_slots, dim, *, home, dtype, device):
    """A plain ValueBank whose rows are to be filled, in the memory of the device or, on CUDA, in that of the
    host, which the GPU then reads over the link: for generation, where a step reads a row for each text."""
    with torch.device("meta"):
        bank = ValueBank(vocab_size, n_slots, dim).to(dtype)
    if home == "host":
        bank.weight = nn.Parameter(host_memory(bank.weight.shape, dtype, torch.device(device))[1])
    else:
        bank.to_empty(device=device)
    return bank.requires_grad_(False)


def stored_banks(model):
    """{name: StoredBank} of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StoredBank)}


def ids_of(batches, vocab_size):
    """The different ids of some tensors, sorted: a NumPy array. IndexError for one of vocab_size or more."""
    seen = np.zeros(vocab_size, dtype=bool)
    for idx in batches:
        seen[idx.numpy()] = True
    return np.flatnonzero(seen)


def borrow(model, batches, read=StoredBank.read):
    """The stored banks of a model read the rows of token ids, (B, T) tensors on the CPU. All processes call
    it, also one without any batch."""
    if banks := stored_banks(model).values():
        ids = ids_of(batches, max(bank.vocab_size for bank in banks))
        for bank in banks:
            read(bank, ids)


def prefetch(model, batches):
    """Says which batches the next `borrow` will get. All processes call it, or none."""
    borrow(model, batches, StoredBank.prefetch)


class StoredAdamW:
    """AdamW for the stored banks of a model. groups: as memory_parameter_groups makes them, but the last one.
    A schedule sets the "lr" of param_groups. ValueError for weight decay, and for other parameters."""

    def __init__(self, model, groups):
        banks = {bank.working_set.weight: bank for bank in stored_banks(model).values()}
        self.param_groups = [dict(group) for group in groups]
        for group in self.param_groups:
            parameters = group.pop("params")  # not kept: a working set that grows is another one
            if group["weight_decay"] or not banks.keys() >= set(parameters):
                raise ValueError("StoredAdamW takes the groups of stored banks, without the routers', and "
                                 "no weight decay: rows that are not read cannot decay")
            group["banks"] = [banks[p] for p in parameters]
            for bank in group["banks"]:
                bank.steps.use(group["betas"], group["eps"])

    def step(self):
        for group in self.param_groups:
            for bank in group["banks"]:
                bank.update(group["lr"])


# ------------------------------------------------------------------------------------------ on disk


def content_to_save(model):
    """What a file of this process holds: {name of the bank: dict of its rows (n, 3, M, d), p, m and v
    each, their last steps, c, and β1, β2, ε as `adam`}."""
    return {name: dict(rows=bank.rows.flush(), last=bank.rows.last, c=bank.steps.c,
                       adam=torch.tensor([*bank.steps.betas, bank.steps.eps], dtype=torch.float64))
            for name, bank in stored_banks(model).items()}


def rows_are_finite(model):
    """Whether this process's rows of the stored banks are."""
    every = [bank.rows.flush() for bank in stored_banks(model).values()]
    return all(rows[part].isfinite().all() for rows in every for part in chunks(len(rows), rows.shape[1:]))


def pieces(files):
    """The rows of one bank in such files, [(its dict, first id, stride)], in pieces: (ids, rows, last)."""
    for state, first, stride in files:
        rows, last = state["rows"], state["last"]
        for part in chunks(len(rows), rows.shape[1:]):
            if not rows[part].isfinite().all():
                raise ValueError("a bank has a number that is not finite")
            yield first + stride * torch.arange(part.start, part.stop), rows[part], last[part]


def load_stored(bank, files):
    """Fills a StoredBank from all the files of a checkpoint (see pieces), or, if there are as many processes
    as files, from the one that this process wrote. ValueError if they are of a bank of another size, or if
    the optimizer of this bank has other betas or eps."""
    for state, first, stride in files:
        if (found := len(state["rows"])) != (fits := len(range(first, bank.vocab_size, stride))):
            raise ValueError(f"a file has {found} rows, where this bank of {bank.vocab_size} has {fits}")
    bank.steps.load(files[0][0]["c"], files[0][0].get("adam"))
    bank.borrowed = None
    for ids, rows, last in pieces(files):
        mine = ids % bank.n == bank.rank
        bank.rows.put((ids[mine] // bank.n).to(bank.place.device), rows[mine], last[mine])


def load_plain(weight, files, eps=1e-10, moments=None, betas=None):
    """Fills the weight (V, M, d) of a plain bank, and AdamW's moments (exp_avg, exp_avg_sq), which fade by
    betas, if they are given, from the files of a checkpoint: all rows as they are after its last step."""
    c = files[0][0]["c"]
    for ids, rows, last in pieces(files):
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        weight[ids.to(weight.device)] = current(rows, c[last], eps).to(weight)
        if moments:
            steps = (len(c) - 1 - last).view(-1, 1, 1).double()
            for tensor, old, beta in zip(moments, rows.unbind(1)[1:], betas, strict=True):
                tensor[ids] = (old * beta ** steps).to(tensor.dtype)
