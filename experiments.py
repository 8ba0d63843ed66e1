"""Checks of what was trained, as commands anyone can run.

    python experiments.py digits out/<run>/samples_<step>.npz    are generated digits the digits that were asked for?
"""
import argparse
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from prepare_data import ArgumentParser, UserError, load_digits, run, split_pictures


def read_samples(path):
    """(images uint8 (N, h, w, 3), classes (N,)) of a file that train_image.py --save_npz wrote."""
    try:
        with np.load(path, allow_pickle=False) as samples:
            images, classes = samples["arr_0"], samples["arr_1"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no file of train_image.py --save_npz ({error})") from None
    if images.shape[1:] != (8, 8, 3) or images.dtype != np.uint8 or classes.shape != images.shape[:1]:
        raise UserError(f"{path} has pictures of shape {images.shape[1:]}, expected digits of (8, 8, 3)")
    return images, classes


def digits(path, seed=0, steps=600):
    """Trains a small convolutional network on the real training scans, says how many of the real held-out scans it
    gets right, and how many generated digits it takes for the class that was asked for; and whether they are copies."""
    generated, asked = read_samples(path)
    (train, labels), (held_out, held_out_labels) = split_pictures(*load_digits())
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                            nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)

    def pixels(images):
        return torch.from_numpy(images[..., 0]).float().unsqueeze(1) / 255

    x, y = pixels(train), torch.from_numpy(labels)
    for _ in range(steps):
        batch = torch.randint(len(x), (128,))
        F.cross_entropy(network(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()

    @torch.inference_mode()
    def agree(images, classes):
        return (network(pixels(images)).argmax(1) == torch.from_numpy(classes)).float()

    print(f"real scans, held out: {agree(held_out, held_out_labels).mean():.1%} of {len(held_out)} are classified right")
    right = agree(generated, asked)
    print(f"generated digits: {right.mean():.1%} of {len(generated)} are classified as what was asked for; by class "
          + " ".join(f"{right[torch.from_numpy(asked) == c].mean():.0%}" for c in np.unique(asked)))

    def copied(images):  # root mean squared difference to the nearest training scan, in gray levels of 256
        return torch.cdist(pixels(images).flatten(1), x.flatten(1)).min(1).values.mean() * 255 / 8

    print(f"from the nearest training scan they differ by {copied(generated):.0f} gray levels, held-out scans by {copied(held_out):.0f}")


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["digits"])
    parser.add_argument("samples", type=Path, help="the .npz file of train_image.py --save_npz")
    args = parser.parse_args(argv)
    digits(args.samples)


if __name__ == "__main__":
    run(main)
