"""MoVE in transformers' Llama, with grouped-query heads. Run it beside move.py, which it imports.

How the memory gets to the layers. The model reads it once, by id, and hands it down as `memory`, a keyword
that Llama passes on. Each layer makes it a positional argument, since reentrant gradient checkpointing does
not see tensors in keywords. No layer keeps anything between calls.

A checkpoint of a plain Llama can be loaded, MoVEForCausalLM.from_pretrained(folder, n_slots=4): its memory
starts as a new one. docs/integrate.md says how to start it so that the outputs do not change.
"""
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

import move
from move import ValueBank, ValueMixer


class MoVEConfig(LlamaConfig):
    model_type = "move_llama"
    n_slots: int = 4


class MoVEAttention(LlamaAttention):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.mixer = ValueMixer(config.hidden_size, config.num_key_value_heads, config.n_slots)

    def forward(self, hidden_states, memory, position_embeddings, attention_mask, **kwargs):
        x, cache = hidden_states, kwargs.pop("cache", kwargs.pop("past_key_values", None))  # its older name
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.q_proj, self.k_proj, self.v_proj))
        v = self.mixer(x, v, memory)  # V_S in place of V, before the cache: all else here is Llama's
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation,
                                                       eager_attention_forward)
        y, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling,
                            dropout=self.attention_dropout if self.training else 0.0, **kwargs)
        return self.o_proj(y.flatten(-2)), weights


class MoVELayer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.self_attn = MoVEAttention(config, layer_idx)

    def __call__(self, hidden_states, memory, **kwargs):  # a keyword comes in, a positional argument goes on
        return super().__call__(hidden_states, memory, **kwargs)

    def forward(self, hidden_states, memory, **kwargs):
        return super().forward(hidden_states, memory=memory, **kwargs)


class MoVEPreTrainedModel(LlamaPreTrainedModel):
    config: MoVEConfig
    config_class = MoVEConfig
    _no_split_modules = ["MoVELayer"]

    def _init_weights(self, module):
        """Called for all parameters that no checkpoint has given a value, memory that was empty included."""
        if isinstance(module, (ValueBank, move.Linear)):  # Llama's own start would draw routers at random
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def resize_token_embeddings(self, *args, **options):
        """The bank gets or loses rows as the embedding does; new rows start as those of a new bank."""
        embedding, old = super().resize_token_embeddings(*args, **options), self.base_model.bank
        if (V := len(embedding.weight)) != len(old.weight):
            bank = self.base_model.bank = ValueBank(V, *old.weight.shape[1:]).to(old.weight)
            bank.weight.data[:len(old.weight)] = old.weight.data[:V]
            bank.weight.requires_grad_(old.weight.requires_grad)
        return embedding


class MoVEModel(MoVEPreTrainedModel, LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(MoVELayer(config, i) for i in range(config.num_hidden_layers))
        self.bank = ValueBank(config.vocab_size, config.n_slots, config.num_key_value_heads * config.head_dim)
        self.post_init()

    def forward(self, input_ids=None, *args, **kwargs):
        if input_ids is None:
            raise ValueError("MoVE reads its memory by token id: it needs input_ids, not inputs_embeds")
        return super().forward(input_ids, *args, memory=self.bank(input_ids), **kwargs)


class MoVEForCausalLM(MoVEPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = MoVEModel(config)
        self.post_init()


AutoConfig.register("move_llama", MoVEConfig, exist_ok=True)
AutoModelForCausalLM.register(MoVEConfig, MoVEForCausalLM, exist_ok=True)

if __name__ == "__main__":
    config = MoVEConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                        num_attention_heads=8, num_key_value_heads=2)
    model = MoVEForCausalLM(config)
    print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=10, do_sample=False)[0].tolist())
