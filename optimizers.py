"""Muon for the matrices, AdamW for the rest, and the schedule of their learning rates."""
import math

import torch
import torch.distributed as dist

from move import Linear, ValueMixer, memory_parameter_groups
from move_store import StoredAdamW, kernels_for, processes, stored_banks


def orthogonalize(g, steps=5):
    """Muon's Newton-Schulz iteration on a stack of matrices (n, rows, columns) → the same shape, in bfloat16:
    each becomes about U Vᵀ of its singular value decomposition U S Vᵀ. Coefficients: Keller Jordan's.
    In float32 where bfloat16 is not fast: a CPU without AVX-512 has no products of it, and needs seconds."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.size(1) > g.size(2)
    x = (g.mT if tall else g).to(torch.bfloat16 if fast_bfloat16(g.device.type) else torch.float32)
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7).view(-1, 1, 1)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x


def orthogonalize_shared(matrices):
    """Matrices of one shape → (n, rows, columns). Each process of a distributed run does its share, and they
    exchange the results, in bfloat16: these products are most of what Muon costs."""
    rank, world_size = processes()
    if world_size == 1:
        return orthogonalize(torch.stack(matrices))
    share = math.ceil(len(matrices) / world_size)
    mine = matrices[share * rank:share * (rank + 1)]
    part = torch.zeros(share, *matrices[0].shape, dtype=torch.bfloat16, device=matrices[0].device)
    if mine:
        part[:len(mine)] = orthogonalize(torch.stack(mine))
    whole = part.new_empty(share * world_size, *part.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before 2.13
    gather(whole.view(torch.uint8), part.view(torch.uint8))  # as bytes, for all backends
    return whole[:len(matrices)]


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) with Nesterov momentum, for matrices (rows, columns).

    The same step as torch.optim.Muon's without weight decay. But matrices of one shape are handled as one
    stack: a few large products instead of many small ones.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            stacks = {}
            for p in group["params"]:
                if p.grad is not None:
                    stacks.setdefault(p.shape, []).append(p)
            for (rows, columns), params in stacks.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                gradients = [p.grad for p in params]
                momenta = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
                updates = orthogonalize_shared(list(nesterov)).to(params[0].dtype)
                lr = group["lr"] * math.sqrt(max(1, rows / columns))
                torch._foreach_add_(params, list(updates), alpha=-lr)


class AdamW(torch.optim.AdamW):
    """torch's, fused. What is bfloat16 on CUDA, as banks are, takes its step in move_fast.adamw."""

    def __init__(self, groups, betas, eps, weight_decay=0.0):
        super().__init__(groups, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self):
        banks = [(group, p, p.grad) for group in self.param_groups for p in group["params"] if has_kernel(p)]
        try:
            for _, p, _ in banks:
                p.grad = None  # torch leaves them alone
            super().step()
        finally:
            for _, p, gradient in banks:
                p.grad = gradient
        for group, p, _ in banks:
            state = self.state[p]
            if not state:
                state.update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                             exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            kernels_for(p).adamw(p, state["exp_avg"], state["exp_avg_sq"], state["step"], group["lr"],
                                 group["betas"], group["eps"], group["weight_decay"])


def has_kernel(p):
    """Whether move_fast.adamw can take the step of a parameter. False for sharded ones (DTensor)."""
    return (p.grad is not None and p.dtype == torch.bfloat16 and type(p.data) is torch.Tensor
            and p.is_contiguous() and p.grad.is_contiguous() and kernels_for(p) is not None)


def make_optimizers(model, lr_scale=1.0):
    """[Muon, AdamW] for a GPT, and StoredAdamW if its banks are stored elsewhere (move_store.py); each of its
    parameters is in one group of one of them.

    Muon takes the matrices of the blocks; AdamW takes the embedding, the head, the banks and whatever else
    there is. The rates are nanochat's. Those of AdamW are times (d / 768)^-½. The banks have their own: see
    memory_parameter_groups. So have routers: 0.05 · (rows / columns)^½ of their matrix, since the more gates
    a head has, the faster its router learns best (docs/experiments.md; Muon's factor for the shape adds the
    rest where rows > columns). lr_scale: a factor on all rates.
    Each group keeps its highest rate as `peak_lr`: see set_learning_rates.
    """
    linear = [m for m in model.blocks.modules() if isinstance(m, Linear)]
    of_mixers = {m.router for m in model.modules() if isinstance(m, ValueMixer)}
    routers = [m.weight for m in linear if m in of_mixers]
    matrices = [m.weight for m in linear if m not in of_mixers]
    memory = memory_parameter_groups(model, lr_scale)
    taken = {model.embedding.weight, model.head.weight, *matrices, *routers}
    for group in memory:  # a router of another kind stays with AdamW
        group["params"] = [p for p in group["params"] if p not in taken]
        taken.update(group["params"])
    memory = [group for group in memory if group["params"]]
    working_sets = {bank.working_set.weight for bank in stored_banks(model).values()}
    stored = [group for group in memory if working_sets.issuperset(group["params"])]
    memory = [group for group in memory if not working_sets.issuperset(group["params"])]
    rest = [p for p in model.parameters() if p not in taken]  # of parts that move.py has not
    k = lr_scale * (model.config.dim / 768) ** -0.5
    groups = [dict(params=[model.embedding.weight], lr=0.2 * k),
              dict(params=[model.head.weight, *rest], lr=0.004 * k)]
    muon = [dict(params=matrices)]
    for rows, columns in sorted({router.shape for router in routers}):
        muon.append(dict(params=[router for router in routers if router.shape == (rows, columns)],
                         lr=0.05 * lr_scale * math.sqrt(min(1, rows / columns))))
    optimizers = [
        Muon(muon, lr=0.02 * lr_scale),
        AdamW([*groups, *memory], betas=(0.8, 0.95), eps=1e-10)]
    if stored:
        optimizers.append(StoredAdamW(model, stored))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def schedule(step, max_steps, warm_up=10):
    """Factor on the rates of step 0, 1, …: up over the first 10 steps, down over the second half."""
    return min((step + 1) / warm_up, 1, 2 * (max_steps - step) / max_steps)


def set_learning_rates(optimizers, factor):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def fast_bfloat16(device):
    """Whether the device multiplies bfloat16 faster than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device == "cpu" else {}
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
