"""A memory for a model that is trained already. Its outputs stay as they are, and every slot learns:

    model.load_state_dict(trained.state_dict(), strict=False)  # model: with a bank and mixers
    start_from_trained(model)
    groups = only_the_memory_learns(model)                      # if the rest is to be frozen, as with LoRA
"""
import torch
from torch import nn

from move import ValueBank, ValueMixer, memory_parameter_groups


@torch.no_grad()
def start_from_trained(model):
    """A bank of zeros adds nothing to the values, and g_0 = 1 leaves them: the outputs stay bit-identical.

    But equal slots under equal gates get equal gradients, g_i dV_S, and stay equal for ever. So it is the
    gates of the slots that start at random; those of the values do not. As in LoRA, one factor of a product
    is random, the other one zero. std: for inputs of unit variance, which is what a norm gives. ValueError
    for a stored bank.
    """
    for module in model.modules():
        if hasattr(module, "working_set"):  # a StoredBank of move_store.py
            raise ValueError("the rows of a stored bank are elsewhere; start from a plain bank")
        if isinstance(module, ValueBank):
            nn.init.zeros_(module.weight)
        if isinstance(module, ValueMixer):
            weight = module.router.weight.unflatten(0, (module.n_heads, -1))  # (H, M+1, d), g_0 first
            nn.init.zeros_(weight)
            nn.init.normal_(weight[:, module.gate_value:], std=weight.size(-1) ** -0.5)


def only_the_memory_learns(model):
    """Freezes all but banks and routers. Returns their groups for AdamW."""
    groups = memory_parameter_groups(model)
    memory = {p for group in groups for p in group["params"]}
    for p in model.parameters():
        p.requires_grad_(p in memory)
    return groups
