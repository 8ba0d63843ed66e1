"""A small language model of ordinary PyTorch."""
import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Grouped-query attention: n_heads heads of queries share n_kv_heads heads of keys and values."""

    def __init__(self, dim, n_heads=8, n_kv_heads=2):
        super().__init__()
        self.n_heads, self.n_kv_heads, head_dim = n_heads, n_kv_heads, dim // n_heads
        self.w_q = nn.Linear(dim, dim)
        self.w_kv = nn.Linear(dim, 2 * n_kv_heads * head_dim)
        self.w_o = nn.Linear(dim, dim)

    def forward(self, x):
        q = self.w_q(x).unflatten(-1, (self.n_heads, -1))
        k, v = self.w_kv(x).unflatten(-1, (2 * self.n_kv_heads, -1)).chunk(2, dim=-2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.w_o(y.transpose(1, 2).flatten(-2))


class Model(nn.Module):
    def __init__(self, vocab_size=1000, dim=64, n_layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(n_layers))
        self.layers = nn.ModuleList(Attention(dim) for _ in range(n_layers))
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, idx):
        x = self.embedding(idx)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(x)


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def train_step(model, optimizer, idx, targets):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    loss.backward()
    optimizer.step()
    return loss.item()


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model().to(device)
    optimizer = make_optimizer(model)
    tokens = torch.randint(1000, (4, 65), device=device)  # a real trainer reads text here
    for step in range(20):
        print(f"step {step}  loss {train_step(model, optimizer, tokens[:, :-1], tokens[:, 1:]):.3f}")
