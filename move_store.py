"""A bank larger than a GPU: its rows live in host memory, or are dealt out over many processes.

    model = GPT(config, bank=partial(StoredBank, home="host"))
    optimizer = StoredAdamW(model, groups)          for the banks; another one takes the rest
    for idx, targets in batches:
        borrow(model, [idx])                        reads the rows of the batch; their gradient is zero
        model(idx, targets).backward()
        optimizer.step()                            their owners update them

The idea is the working set. A step needs the rows of the ids of its batch, and these are known before it
starts. `StoredBank` copies them into a small `ValueBank`, on which the model trains as on any other, so its
kernels, torch.compile and micro-batches stay as they are. No other row is read or written, and there is no
gradient of any other.

But AdamW moves every row at each step, also those without a gradient, since their moments fade slowly. For a
row that is not read, that can wait. If its last update was step r, after step t it has moved by

    - Σ_{s=r+1..t} lr_s · m_s / √v_s      m_s = β1^{s-r} m · 1/(1 - β1^s)    v_s = β2^{s-r} v · 1/(1 - β2^s)

    = - c_r · m / √v      c_r = Σ_s lr_s · √(1 - β2^s)/(1 - β1^s) · ρ^{s-r}      ρ = β1/√β2

and c_r is the same for all rows. So a row is brought up to date when it is read, with one number from a
table: the result is that of AdamW on the whole bank, to rounding, but for eps: it is added to √v as it was
after step r, not as it fades. Where √v is not far from eps, a row that waits moves a little further.

Shapes: V ids, M slots of an id, d the width of a slot, as in move.py. A row is here all that an id has,
(M, d). Process r of N owns the rows of the ids r, r + N, r + 2N, …
"""
import contextlib
import weakref
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from move import ValueBank

CHUNK = 1 << 26  # numbers that are updated at a time


def processes():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def to_device(array, device):
    """A NumPy array as a tensor; on CUDA without waiting for the GPU."""
    tensor = torch.from_numpy(np.require(array, requirements="CW"))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# --------------------------------------------------------------------------------- AdamW, put off


def wide(tensor):
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def current(rows, c, eps):
    """Rows (n, M, d), in float32 at least, as they are now. rows (n, 3, M, d): as after their last update,
    with AdamW's moments, p, m, v. c (n,): c_r of each."""
    p, m, v = wide(rows).unbind(1)
    return p - c.to(p.dtype).view(-1, 1, 1) * m / (v.sqrt() + eps)


def read_rows(out, near, slots, c, numbers):
    """The rows in these slots of near (slots, 3, M, d), as they are now, into out (n, M, d). numbers: see
    Steps.numbers."""
    if kernels := kernels_for(near):
        return kernels.read_rows(out, near, slots, c, numbers)
    out[:] = current(near[slots], c, numbers[-1])


def update_rows(near, slots, c, left, g, numbers):
    """A step of AdamW with the gradient g (n, M, d), of rows that may have missed some before; in place. left
    (2, n): how much of each moment is; the others as for read_rows."""
    if kernels := kernels_for(near):
        return kernels.update_rows(near, slots, c, left, g, numbers)
    gain_m, gain_v, rate, correction, eps = numbers.unbind()
    rows, g = near[slots], wide(g)
    p, (_, m, v) = current(rows, c, eps), wide(rows).unbind(1)
    left_m, left_v = left.to(p.dtype).view(2, -1, 1, 1)
    m = left_m * m + gain_m * g
    v = left_v * v + gain_v * g * g
    p = p - rate * m / ((v / correction).sqrt() + eps)
    near[slots] = torch.stack((p, m, v), dim=1).to(near.dtype)


def kernels_for(tensor):
    """move_fast.py, if a tensor is on a GPU and of a dtype that its kernels know; None without Triton."""
    if tensor.is_cuda and tensor.dtype != torch.float64:
        with contextlib.suppress(ImportError):
            import move_fast
            return move_fast


class Steps:
    """What all rows of a bank have in common: the number of steps t, and the table c with an entry for each
    step that can have been a row's last, 0 to t."""

    def __init__(self, device):
        self.betas, self.eps, self.t = (0.8, 0.95), 1e-10, 0
        self.c = torch.zeros(1024, dtype=torch.float64, device=device)  # grows

    def use(self, betas, eps):
        """ValueError for betas with which a moment that fades moves a row for ever, and for others than those
        of the steps so far."""
        if betas[0] ** 2 >= betas[1]:
            raise ValueError(f"β1² must be less than β2, not as in {betas}")
        if self.t and (tuple(betas), eps) != (tuple(self.betas), self.eps):
            raise ValueError(f"this bank has done {self.t} steps with {self.betas} and {self.eps}")
        self.betas, self.eps = betas, eps

    def left(self, last):
        """What the next step leaves of the moments of rows with these last steps (n,): β1^s and β2^s after s
        steps, (2, n)."""
        return torch.stack([beta ** (self.t + 1 - last).double() for beta in self.betas])

    def numbers(self, lr, dtype):
        """What a step needs next: 1 - β1, 1 - β2, lr/(1 - β1^t), 1 - β2^t and eps."""
        (beta1, beta2), t = self.betas, self.t + 1
        numbers = 1 - beta1, 1 - beta2, lr / (1 - beta1 ** t), 1 - beta2 ** t, self.eps
        return to_device(torch.tensor(numbers, dtype=dtype).numpy(), self.c.device)

    def count(self, lr):
        """One step more: all rows fall back by it, but those that it updates."""
        beta1, beta2 = self.betas
        self.t += 1
        if self.t == len(self.c):
            self.c = torch.cat((self.c, torch.zeros_like(self.c)))
        step = lr * (1 - beta2 ** self.t) ** 0.5 / (1 - beta1 ** self.t)
        ages = torch.arange(self.t, 0, -1, device=self.c.device).double()
        self.c[:self.t] += step * (beta1 * beta2 ** -0.5) ** ages


# ------------------------------------------------------------------------------ where the rows live


class DeviceRows:
    """Rows in the memory of a device. home (n, 3, M, d): each row with AdamW's moments, p, m, v; last (n,):
    the step of its last update."""

    def __init__(self, n, n_slots, dim, dtype, device):
        self.home = torch.zeros(n, 3, n_slots, dim, dtype=dtype, device=device)
        self.near = self.to_save = self.home  # where `hold` gives slots, and what is saved
        self.last = torch.zeros(n, dtype=torch.int64, device=device)

    def hold(self, rows):
        """Sorted, unique indices of rows, a NumPy array → their slots in self.near. They stay there until
        the next call."""
        return to_device(rows, self.last.device)

    def prefetch(self, rows):
        """Says which rows the next call of `hold` will name."""

    def flush(self):
        """Now self.to_save holds the latest state of each row."""

    def put(self, rows, values, last):
        """Sets rows and their moments."""
        self.home[rows] = values.to(self.home.device)
        self.last[rows] = last.to(self.last.device)


class HostRows(DeviceRows):
    """Rows in host memory. The device holds copies of those in use, in slots, and keeps them while there is
    room: ids that come in every batch never leave it. `moved` counts the rows that came and went.

    On CUDA the host memory is pinned and has an address for the GPU. Rows move in a second stream: those of
    the next step come while this one computes.
    """

    def __init__(self, n, n_slots, dim, dtype, device):
        self.device = device
        self.to_save, self.home = host_memory((n, 3, n_slots, dim), dtype, device)  # the same memory
        self.last = torch.zeros(n, dtype=torch.int64, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.slot_of = np.full(n, -1)
        self.clock = self.moved = 0
        self.make_slots(0)

    def make_slots(self, n):
        self.near = None  # frees them before there are new ones
        self.near = self.home.new_empty(n, *self.home.shape[1:])
        if self.stream:
            self.near.record_stream(self.stream)
        self.slot_of[:] = -1
        self.row_in, self.used = np.full(n, -1), np.full(n, -1)

    def hold(self, rows):
        if len(rows) > len(self.row_in):
            self.flush()
            self.make_slots(min(len(self.slot_of), len(rows) * 3 // 2))  # two batches share many of their ids
        self.clock += 2
        self.bring(rows, self.clock)
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return to_device(self.slot_of[rows], self.device)

    def prefetch(self, rows):
        self.bring(rows, self.clock + 1)

    def bring(self, rows, use):
        """These rows come into slots, in the place of those that were not used for longest; a prefetch takes
        none from the rows held now. use: what the clock says of it."""
        slots = self.slot_of[rows]
        self.used[slots[slots >= 0]] = use
        if (slots >= 0).all():
            return
        room = np.flatnonzero(self.used < self.clock)
        to = room[np.argsort(self.used[room], kind="stable")][:np.count_nonzero(slots < 0)]
        new = rows[slots < 0][:len(to)]
        full = to[self.row_in[to] >= 0]
        old = self.row_in[full]
        self.copy(self.home, old, self.near, full)
        self.copy(self.near, to, self.home, new)
        self.slot_of[old] = -1
        self.slot_of[new], self.row_in[to], self.used[to] = to, new, use
        self.moved += len(old) + len(new)

    def copy(self, to, to_rows, source, source_rows):
        """In the second stream, after the work that is in the first one by now."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):  # on a CPU it is None and this does nothing
            copy_rows(to, to_device(to_rows, self.device), source, to_device(source_rows, self.device))

    def flush(self):
        slots = np.flatnonzero(self.row_in >= 0)
        self.copy(self.home, self.row_in[slots], self.near, slots)
        if self.stream:
            self.stream.synchronize()


def host_memory(shape, dtype, device):
    """Zeros in host memory, twice: as a CPU tensor, and as a tensor that the device can compute with. On CUDA
    that is a CUDA tensor whose memory is the same, pinned. MemoryError if there is too little."""
    if device.type != "cuda":
        return (torch.zeros(shape, dtype=dtype),) * 2
    if 0 in shape:
        return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype, device=device)
    tensor = torch.empty(shape, dtype=dtype)  # not pin_memory=True, which rounds up to a power of two
    view = HostMemory(tensor)
    # torch takes bytes as they are, and knows no bfloat16 here
    alias = torch.as_tensor(view, device=device).view(dtype).view(shape)
    if alias.data_ptr() != tensor.data_ptr():
        raise MemoryError("this GPU cannot address host memory; give --bank_home gpu")
    return tensor, alias.zero_()


class HostMemory:
    """Host memory, pinned while this object lives, as an array that CUDA libraries understand."""

    def __init__(self, tensor):
        size = tensor.numel() * tensor.element_size()
        error = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 0))
        if error:
            raise MemoryError(f"cannot pin {size / 1e9:.1f} GB of host memory (CUDA error {error})")
        self.tensor = tensor
        self.__cuda_array_interface__ = dict(data=(tensor.data_ptr(), False), shape=(size,), typestr="|u1",
                                             version=3)
        weakref.finalize(self, unpin, tensor.data_ptr()).atexit = False


def unpin(pointer):
    torch.cuda.synchronize()  # a stream may still read it
    torch.cuda.cudart().cudaHostUnregister(pointer)


def copy_rows(to, to_rows, source, source_rows):
    """to[to_rows] = source[source_rows], of tensors (n, 3, M, d)."""
    if kernels := kernels_for(to):
        kernels.copy_rows(to, to_rows, source, source_rows)
    else:
        to[to_rows] = source[source_rows]


# --------------------------------------------------------------------------- the bank that borrows


class Share(NamedTuple):
    """Who reads which rows in a step; NumPy arrays."""
    ids: np.ndarray  # (n,) that this process reads
    order: np.ndarray  # (n,) their indices, sorted by the process that owns them
    given: np.ndarray  # (N,) how many this process gets of each
    asked: np.ndarray  # (N,) how many each gets of this one
    rows: np.ndarray  # the different ones of this process's rows that are asked for
    at: np.ndarray  # which of these, for each row that is asked for, process by process


class StoredBank(nn.Module):
    """A ValueBank (V, M, d) whose rows live elsewhere: bank(idx) → memory (B, T, M, d), after bank.read(ids).

    home: 'gpu', the memory of `device`, or 'host', host memory. With several processes of torch.distributed
    the rows are dealt out over them; they call `read` and `update` together.
    generator, std: as ValueBank; the rows start with its numbers on a CPU, drawn on `device` otherwise.

    An id that was not read raises IndexError on a CPU and is a device-side assert on CUDA. In eval mode,
    without gradients, bank(idx) reads by itself, for generation by one process. The state_dict does not have
    the rows: see content_to_save.
    """

    def __init__(self, vocab_size, n_slots, dim, std=None, generator=None, *, home, dtype=torch.float32,
                 device="cpu"):
        super().__init__()
        device = torch.device(device)
        self.rank, self.n = processes()
        with torch.device("meta"):
            self.working_set = ValueBank(1, n_slots, dim, std).to(dtype)
        self.working_set.to_empty(device=device)
        self.register_buffer("place", torch.ones(vocab_size, dtype=torch.int64, device=device),
                             persistent=False)  # of an id in the working set; its length for those not there
        self.vocab_size, self.steps = vocab_size, Steps(device)
        self.now = self.coming = None  # the Share of this read; of the next one, if prefetch said which
        mine = len(range(self.rank, vocab_size, self.n))
        if home not in ("gpu", "host"):
            raise ValueError(f"home must be 'gpu' or 'host', not {home!r}")
        self.rows = (DeviceRows if home == "gpu" else HostRows)(mine, n_slots, dim, dtype, device)
        self.draw(generator)

    def draw(self, generator):
        """The rows start as N(0, std²)."""
        device, (M, d) = self.place.device, self.rows.home.shape[2:]
        if device.type == "cuda" and (generator is None or generator.device != device):
            seed = torch.randint(1 << 62, (), generator=generator).item()
            generator = torch.Generator(device).manual_seed(seed)
        step = max(self.n, CHUNK // (M * d) // self.n * self.n)
        for start in range(0, self.vocab_size, step):  # the same numbers as of one draw
            drawn = torch.empty(min(step, self.vocab_size - start), M, d, device=device)
            nn.init.normal_(drawn, std=self.working_set.std, generator=generator)
            mine = drawn[self.rank::self.n]
            self.rows.home[start // self.n:start // self.n + len(mine), 0] = mine

    def forward(self, idx):
        if not self.training and not torch.is_grad_enabled():
            self.read(np.unique(idx.cpu().numpy()))
        if self.now is None:
            raise RuntimeError("no rows are borrowed; call borrow(model, batches) before the forward pass")
        return self.working_set(F.embedding(idx, self.place.unsqueeze(1)).squeeze(-1))

    @torch.inference_mode(False)
    @torch.no_grad()
    def read(self, ids):
        """Borrows the rows of these ids (n,), sorted and unique, a NumPy array: the working set holds them,
        as they are after the last update, without a gradient."""
        self.working_set.weight.grad = None  # of other ids
        coming = self.coming
        if coming is None or not self.all_agree(np.array_equal(ids, coming.ids)):
            coming = self.share(ids)
        else:
            self.coming = None
        self.now = now = coming
        self.held = to_device(now.rows, self.place.device)
        self.slots = self.rows.hold(now.rows)
        out = self.room(len(ids))
        if self.n == 1:
            self.look_up(self.slots, self.held, out)
        else:
            at = to_device(now.at, self.place.device)
            values = out.new_empty(len(now.at), *out.shape[1:])
            self.look_up(self.slots[at], self.held[at], values)
            exchange(out, values, now.given, now.asked)
        self.place.fill_(len(self.working_set.weight))  # an id that was not read has no place
        index = to_device(ids[now.order], self.place.device)
        self.place[index] = torch.arange(len(ids), device=index.device)

    def prefetch(self, ids):
        """Says which ids the next `read` will have, while the GPU works on this step. All processes call it,
        or none."""
        self.coming = self.share(ids)
        self.rows.prefetch(self.coming.rows)

    def share(self, ids):
        """Who reads which rows: see Share."""
        owner = ids % self.n
        order = np.argsort(owner, kind="stable")
        given = np.bincount(owner, minlength=self.n)
        asked = self.exchange_counts(given)
        rows, at = np.unique(self.exchange_ids(ids[order] // self.n, given, asked), return_inverse=True)
        return Share(ids, order, given, asked, rows, at)

    def all_agree(self, condition):
        """Whether it holds in all processes: they do the same then."""
        if self.n > 1:
            condition = torch.tensor(int(condition))
            dist.all_reduce(condition, dist.ReduceOp.MIN)
        return bool(condition)

    def look_up(self, slots, rows, out):
        """The rows in these slots, as they are now, into out."""
        numbers = self.steps.numbers(0, wide(out[:0]).dtype)
        for part in self.chunks(len(slots)):
            c = self.steps.c[self.rows.last[rows[part]]]
            read_rows(out[part], self.rows.near, slots[part], c, numbers)

    def chunks(self, n):
        size = max(1, CHUNK // self.working_set.weight[0].numel())
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]

    def room(self, n):
        """The first n rows of the working set, which grows if it is too small."""
        weight = self.working_set.weight
        if n > len(weight):
            larger = min(self.vocab_size, n + n // 4 + 64)  # each time torch.compile compiles anew
            weight.data = weight.data.new_zeros(0, *weight.shape[1:])  # frees it first
            # A new parameter, since the loss of a step before, if it is still there, knows the old shape.
            weight = nn.Parameter(weight.data.new_zeros(larger, *weight.shape[1:]))
            self.working_set.weight = weight
        return weight.data[:n]

    @torch.no_grad()
    def update(self, lr):
        """A step of AdamW for the rows that were read, by the gradient of the working set."""
        if self.now is None:
            raise RuntimeError("no rows are borrowed; call borrow(model, batches) before the step")
        weight, steps = self.working_set.weight, self.steps
        n = int(self.now.given.sum())
        g = weight.new_zeros(n, *weight.shape[1:]) if weight.grad is None else weight.grad[:n].contiguous()
        received = self.received_gradients(g)
        numbers = steps.numbers(lr, wide(g[:0]).dtype)
        for part in self.chunks(len(self.slots)):
            total = g[part] if self.n == 1 else sum_of_part(received, part, g)
            last = self.rows.last[self.held[part]]
            update_rows(self.rows.near, self.slots[part], steps.c[last], steps.left(last), total, numbers)
        steps.count(lr)
        self.rows.last.index_fill_(0, self.held, steps.t)  # [held] = t would wait for the GPU

    def received_gradients(self, g):
        """[(which of the rows held, ascending; their gradients)] of each process that read some here."""
        if self.n == 1:
            return []
        _, _, given, asked, _, at = self.now
        received = g.new_empty(int(asked.sum()), *g.shape[1:])
        exchange(received, g, asked, given)
        places = np.split(at, np.cumsum(asked)[:-1])
        return list(zip(places, received.split(asked.tolist()), strict=True))

    def exchange_counts(self, counts):
        if self.n == 1:
            return counts
        received = torch.empty(self.n, dtype=torch.int64)
        dist.all_to_all_single(received, torch.from_numpy(counts))
        return received.numpy()

    def exchange_ids(self, ids, given, asked):
        if self.n == 1:
            return ids
        received = torch.empty(int(asked.sum()), dtype=torch.int64)
        dist.all_to_all_single(received, torch.from_numpy(ids), asked.tolist(), given.tolist())
        return received.numpy()


def sum_of_part(received, part, g):
    """The gradient of a part of the rows held, float32: in the order of the processes, so always the same."""
    total = torch.zeros(part.stop - part.start, *g.shape[1:], dtype=wide(g[:0]).dtype, device=g.device)
    for places, gradients in received:
        first, end = np.searchsorted(places, (part.start, part.stop))
        total[to_device(places[first:end] - part.start, g.device)] += gradients[first:end].to(total.dtype)
    return total


def exchange(received, sent, received_counts, sent_counts):
    """Each process sends rows to each: as bytes, which all backends know."""
    received, sent = (t.view(torch.uint8).flatten(1) for t in (received, sent))
    dist.all_to_all_single(received, sent, received_counts.tolist(), sent_counts.tolist())


def empty_bank(vocab_size, n_slots, dim, generator=None, *, home, dtype, device):
    """A plain ValueBank whose rows are to be filled, in the memory of the device or, on CUDA, in that of the
    host, which the GPU then reads over the link: for generation, where a step reads a row for each text."""
    with torch.device("meta"):
        bank = ValueBank(vocab_size, n_slots, dim).to(dtype)
    shape, device = bank.weight.shape, torch.device(device)
    weight = host_memory(shape, dtype, device)[1] if home == "host" else torch.zeros(shape, dtype=dtype,
                                                                                       device=device)
    bank.weight = nn.Parameter(weight, requires_grad=False)
    return bank


def stored_banks(model):
    """{name: StoredBank} of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StoredBank)}


def ids_of(batches, vocab_size):
    """The different ids of some tensors, sorted: a NumPy array. IndexError for one of vocab_size or more."""
    seen = np.zeros(vocab_size, dtype=bool)
    for idx in batches:
        seen[idx.numpy()] = True
    return np.flatnonzero(seen)


def borrow(model, batches):
    """The stored banks of a model read the rows of token ids, (B, T) tensors on the CPU. All processes call
    it, also one without any batch."""
    each_bank(model, batches, StoredBank.read)


def prefetch(model, batches):
    """Says which batches the next `borrow` will get. All processes call it, or none."""
    each_bank(model, batches, StoredBank.prefetch)


def each_bank(model, batches, call):
    if banks := stored_banks(model).values():
        ids = ids_of(batches, max(bank.vocab_size for bank in banks))
        for bank in banks:
            call(bank, ids)


class StoredAdamW:
    """AdamW for the stored banks of a model. groups: as memory_parameter_groups makes them, but the last one.
    A schedule sets the "lr" of param_groups. ValueError for weight decay, and for other parameters."""

    def __init__(self, model, groups):
        banks = {bank.working_set.weight: bank for bank in stored_banks(model).values()}
        if any(p not in banks for group in groups for p in group["params"]):
            raise ValueError("StoredAdamW takes the groups of the stored banks only: "
                             "memory_parameter_groups(model)[:-1]")
        self.param_groups = [dict(group, banks=[banks[p] for p in group["params"]]) for group in groups]
        for group in self.param_groups:
            del group["params"]  # a working set that grows is another parameter
        if any(group["weight_decay"] for group in groups):
            raise ValueError("rows that are not read cannot decay: the weight decay must be 0")
        for group in self.param_groups:
            for bank in group["banks"]:
                bank.steps.use(group["betas"], group["eps"])

    def step(self):
        for group in self.param_groups:
            for bank in group["banks"]:
                bank.update(group["lr"])


# ------------------------------------------------------------------------------------------ on disk


def content_to_save(model):
    """What a file of this process holds: {name of the bank: dict of its rows (n, 3, M, d), p, m and v
    each, their last steps, and c}."""
    content = {}
    for name, bank in stored_banks(model).items():
        bank.rows.flush()
        content[name] = dict(rows=bank.rows.to_save, last=bank.rows.last,
                             c=bank.steps.c[:bank.steps.t + 1].clone())
    return content


def rows_are_finite(model):
    """Whether this process's rows of the stored banks are."""
    banks = stored_banks(model).values()
    for bank in banks:
        bank.rows.flush()
    return all(bank.rows.to_save[part].isfinite().all() for bank in banks
               for part in bank.chunks(len(bank.rows.to_save)))


def pieces(state, first, stride):
    """The rows of one bank in such a file, or of a whole bank, in pieces: (ids, rows, last)."""
    n = len(state["last"])
    size = max(1, CHUNK // state["rows"][:1].numel()) if n else 1
    for start in range(0, n, size):
        part = slice(start, min(n, start + size))
        ids = torch.arange(first + stride * part.start, first + stride * part.stop, stride)
        if not state["rows"][part].isfinite().all():
            raise ValueError("a bank has a number that is not finite")
        yield ids, state["rows"][part], state["last"][part]


def load_stored(bank, files, step):
    """Fills a StoredBank from all the files of a checkpoint: [(state of this bank, first id, stride)]."""
    for state, first, stride in files:
        if stride == bank.n and first != bank.rank:
            continue  # of another process
        for ids, rows, last in pieces(state, first, stride):
            mine = ids % bank.n == bank.rank
            bank.rows.put((ids[mine] // bank.n).to(bank.place.device), rows[mine], last[mine])
    c = files[0][0]["c"]
    bank.steps.t = step
    bank.steps.c = bank.steps.c.new_zeros(max(1024, 2 * step))
    bank.steps.c[:len(c)] = c


def load_plain(weight, files, step, betas=(0.8, 0.95), eps=1e-10, moments=None):
    """Fills the weight (V, M, d) of a plain bank, and AdamW's moments (exp_avg, exp_avg_sq) if they are
    given, from the files of a checkpoint: all rows as they are after `step`."""
    for state, first, stride in files:
        for ids, rows, last in pieces(state, first, stride):
            weight[ids.to(weight.device)] = current(rows, state["c"][last], eps).to(weight)
            if moments:
                steps = (step - last).view(-1, 1, 1).double()
                for tensor, old, beta in zip(moments, rows.unbind(1)[1:], betas, strict=True):
                    tensor[ids] = (old * beta ** steps).to(tensor.dtype)
