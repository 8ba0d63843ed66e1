"""Pictures and codes: how an image becomes tokens, and tokens an image again.

Two tokenizers of images are here. Ours cuts an image into patches of 2×2 pixels and replaces each by the
nearest entry of a codebook that k-means learned: 32×32 pixels become 16×16 codes, with nothing to download.
The other is the decoder of MaskGIT's VQGAN, whose codes of ImageNet others have published: 16×16 codes
become 256×256 pixels. And `sheet` draws the pictures that a person should look at.

Images are uint8 (N, height, width, 3) everywhere, codes (N, rows·columns), row by row.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

PATCH = 2  # pixels, of an edge


# -------------------------------------------------------------------------- patches and their codes


def to_patches(images):
    """(N, h, w, 3) → (N, h/2 · w/2, 12), row by row."""
    N, h, w, C = images.shape
    patches = images.reshape(N, h // PATCH, PATCH, w // PATCH, PATCH, C).swapaxes(2, 3)
    return patches.reshape(N, -1, PATCH * PATCH * C)


def nearest(patches, codebook):
    """For each patch (n, D) the nearest of the codes (K, D): indices and squared distances, (n,) each.

    |p - c|² = |p|² - 2 p·c + |c|². Both are whole numbers up to 255, so that float32 sums are exact, also
    where a GPU multiplies in TF32: every machine finds the same.
    """
    cost = torch.addmm(codebook.square().sum(1), patches, codebook.T, alpha=-2).min(dim=1)
    return cost.indices, cost.values + patches.square().sum(1)


def fit_codebook(images, n_codes, seed=0, iterations=10, patches_a_code=64):
    """k-means (Lloyd's algorithm) on a sample of the patches of training images → uint8 (n_codes, 12).

    Starts from patches that differ; a code that no patch is nearest to moves to the worst served patch.
    ValueError if there are fewer different patches than codes.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    patches = to_patches(images).reshape(-1, PATCH * PATCH * 3)
    rng = np.random.default_rng(seed)
    if len(patches) > n_codes * patches_a_code:
        patches = patches[np.sort(rng.choice(len(patches), n_codes * patches_a_code, replace=False))]
    distinct = np.unique(patches, axis=0)
    if len(distinct) < n_codes:
        raise ValueError(f"the pictures have {len(distinct)} different patches, fewer than {n_codes} codes")
    codebook = torch.tensor(rng.permutation(distinct)[:n_codes], dtype=torch.float32, device=device)
    patches = torch.tensor(patches, dtype=torch.float32, device=device)
    for _ in tqdm(range(iterations), desc=f"learning {n_codes:,} codes", disable=None):
        codes, error = map(torch.cat, zip(*(nearest(block, codebook) for block in patches.split(2048))))
        count = torch.bincount(codes, minlength=n_codes)
        total = torch.zeros(n_codes, patches.size(1), dtype=torch.int64, device=device)  # exact in any order
        total.index_add_(0, codes, patches.long())
        codebook = (total / count.clamp(min=1).unsqueeze(1)).round()
        unused = (count == 0).nonzero().squeeze(1)
        codebook[unused] = patches[error.topk(len(unused)).indices]
    return codebook.to(torch.uint8).cpu().numpy()


def encode(images, codebook):
    """uint8 images (N, h, w, 3) → uint16 codes (N, h/2 · w/2) of a codebook (K, 12)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes = torch.tensor(codebook, dtype=torch.float32, device=device)
    result = np.empty((len(images), images.shape[1] // PATCH * (images.shape[2] // PATCH)), dtype=np.uint16)
    with tqdm(total=len(images), desc="encoding", unit=" images", disable=None) as bar:
        for start in range(0, len(images), 256):
            patches = torch.from_numpy(to_patches(images[start:start + 256])).to(device).float()
            found = [nearest(block, codes)[0] for block in patches.flatten(0, 1).split(2048)]
            result[start:start + 256] = torch.cat(found).view(len(patches), -1).cpu().numpy()
            bar.update(len(patches))
    return result


def decode(codes, codebook, grid):
    """Codes (N, rows·columns) of a codebook (K, 12) → uint8 images (N, 2·rows, 2·columns, 3)."""
    rows, columns = grid
    patches = codebook[codes].reshape(len(codes), rows, columns, PATCH, PATCH, 3)
    return patches.swapaxes(2, 3).reshape(len(codes), rows * PATCH, columns * PATCH, 3)


def psnr(images, others):
    """Peak signal-to-noise ratio in dB, of the mean squared error over all pixels."""
    error = np.mean([np.square(a.astype(np.float32) - b).mean() for a, b in zip(images, others)])
    return 10 * math.log10(255 ** 2 / error) if error else math.inf


# ------------------------------------------------------------------------------- MaskGIT's decoder


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and what they are added to, (N, n_in, h, w) → (N, n_out, h, w)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, n_in, eps=1e-6)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, n_out, eps=1e-6)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(n_out, n_out, 1, bias=False) if n_in != n_out else None

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        # Where the widths differ, what is added is made from y, not from x: so the weights were trained.
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(y))


class Stage(nn.Module):
    """Two residual blocks; then twice the height and width, but for the last stage."""

    def __init__(self, n_in, n_out, enlarge):
        super().__init__()
        self.block = nn.Sequential(ResidualBlock(n_in, n_out), ResidualBlock(n_out, n_out))
        self.upsample_conv = nn.Conv2d(n_out, n_out, 3, padding=1) if enlarge else None

    def forward(self, x):
        x = self.block(x)
        return x if self.upsample_conv is None else self.upsample_conv(F.interpolate(x, scale_factor=2.0))


class MaskGITDecoder(nn.Module):
    """The decoder of MaskGIT's VQGAN (arXiv 2202.04200): codes (N, rows·columns), int64 below n_codes
    → images (N, 3, 16·rows, 16·columns), about 0 to 1.

    Parameters have the names of the published file `maskgit-vqgan-imagenet-f16-256.bin`, whose
    `decoder.` and `quantize.embedding.` parts it takes.
    """

    def __init__(self, n_codes=1024, code_dim=256, width=128, multipliers=(1, 1, 2, 2, 4)):
        super().__init__()
        widths = [width * m for m in multipliers]
        self.quantize = nn.ModuleDict(dict(embedding=nn.Embedding(n_codes, code_dim)))
        self.decoder = nn.ModuleDict(dict(
            conv_in=nn.Conv2d(code_dim, widths[-1], 3, padding=1),
            mid=nn.Sequential(*(ResidualBlock(widths[-1], widths[-1]) for _ in range(2))),
            # up[0] is the last to be run, as in the file
            up=nn.ModuleList(Stage(n_in, n_out, enlarge=i > 0)
                             for i, (n_in, n_out) in enumerate(zip(widths[1:] + widths[-1:], widths))),
            norm_out=nn.GroupNorm(32, widths[0], eps=1e-6),
            conv_out=nn.Conv2d(widths[0], 3, 3, padding=1)))

    def forward(self, codes, grid):
        x = self.quantize.embedding(codes).transpose(1, 2).unflatten(-1, grid)  # (N, code_dim, rows, columns)
        d = self.decoder
        x = d.mid(d.conv_in(x))
        for stage in reversed(d.up):
            x = stage(x)
        return d.conv_out(F.silu(d.norm_out(x)))

    @torch.inference_mode()
    def to_images(self, codes, grid, batch=16):
        """Codes (N, rows·columns), an array → uint8 images (N, 16·rows, 16·columns, 3)."""
        device = self.decoder.conv_in.weight.device
        blocks = torch.from_numpy(codes.astype(np.int64)).split(batch)
        images = [(self(block.to(device), grid).clamp(0, 1) * 255).round().to(torch.uint8).cpu() for block in blocks]
        return torch.cat(images).permute(0, 2, 3, 1).numpy()


# ---------------------------------------------------------------------------------- for the eye


def sheet(rows, labels):
    """One picture of many: rows of uint8 images (n, h, w, 3), each behind its label. Small images are enlarged."""
    height, width = rows[0].shape[1:3]
    scale = max(1, 32 // height)
    margin = 6 * max(map(len, labels)) + 12
    columns = max(map(len, rows))
    page = Image.new("RGB", (margin + columns * (width * scale + 2), len(rows) * (height * scale + 2) + 2), "white")
    draw = ImageDraw.Draw(page)
    for i, (images, label) in enumerate(zip(rows, labels)):
        top = 2 + i * (height * scale + 2)
        draw.text((4, top + height * scale // 2 - 6), label, fill="black")
        for j, image in enumerate(images):
            tile = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            page.paste(tile, (margin + j * (width * scale + 2), top))
    return page
