"""Muon for the matrices, AdamW for the rest, and the schedule of their learning rates."""
import torch

from move import Linear, memory_parameter_groups


def make_optimizers(model, lr_scale=1.0):
    """[Muon, AdamW] for a GPT; each of its parameters is in one group of one of them.

    Muon (torch.optim.Muon, for matrices only) takes those of the blocks; AdamW takes the embedding, the
    head, the banks and the routers. The rates are nanochat's, those of AdamW times (d / 768)^-½.
    lr_scale: a factor on all rates. Each group keeps its highest rate as `peak_lr`: see set_learning_rates.
    """
    memory = memory_parameter_groups(model, lr_scale)
    taken = {p for group in memory for p in group["params"]}
    matrices = [m.weight for m in model.blocks.modules() if isinstance(m, Linear) and m.weight not in taken]
    k = lr_scale * (model.config.dim / 768) ** -0.5
    groups = [dict(params=[model.embedding.weight], lr=0.2 * k),
              dict(params=[model.head.weight], lr=0.004 * k)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02 * lr_scale, momentum=0.95, weight_decay=0),
        torch.optim.AdamW([*groups, *memory], betas=(0.8, 0.95), eps=1e-10, weight_decay=0, fused=True)]
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


def bank_use(model, adamw):
    """How much of the memory is in use: dict(rows_used, row_norm), {} without a memory.

    rows_used: share of the rows (a slot of a token) that have had a gradient, which are those with a
    second moment other than 0: it fades, but to the smallest number there is. row_norm: mean norm of a row.
    """
    rows = used = norms = 0
    for bank in (p for group in memory_parameter_groups(model)[:1] for p in group["params"]):
        moment = adamw.state.get(bank, {}).get("exp_avg_sq")
        rows += bank[..., 0].numel()
        used += 0 if moment is None else moment.any(dim=-1).sum().item()
        norms += bank.detach().norm(dim=-1, dtype=torch.float32).sum().item()
    return dict(rows_used=used / rows, row_norm=norms / rows) if rows else {}
