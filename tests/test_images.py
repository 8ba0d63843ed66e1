"""Images: what a person sees becomes codes and comes back, whatever kind of file it was."""
import argparse
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from conftest import HERE, fails, log_of
from PIL import Image

import benchmarks
import command_line
import experiments
import image_data
import prepare_data
import run_folder
import train_gpt
import train_image
from move import GPT
from script import UserError, memory_advice


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def decoded(folder, records):
    """uint8 images (N, h, w, 3) of records (N, 1 + n) of a data set."""
    data = prepare_data.load_dataset(folder)
    return image_data.load_decoder(folder, data.meta)(records[:, 1:])


def records_of(folder):
    """(records to train, to validate), (N, 1 + n) each."""
    data = prepare_data.load_dataset(folder)
    length = 1 + data.meta["grid"][0] * data.meta["grid"][1]
    return data.train.reshape(-1, length), data.val.reshape(-1, length)


def make_images(source, tmp_path, image_size=8, codebook_size=16):
    """A data set of a folder of images, made as a user would → its folder."""
    prepare_data.main(["--images", str(source), "--data_dir", str(tmp_path / "data"), "--image_size",
                       str(image_size), "--codebook_size", str(codebook_size)])
    return tmp_path / "data" / "images"


# ---------------------------------------------------------------------------------- images and codes


@pytest.mark.parametrize("h, w", [(2, 2), (4, 6), (8, 2)])
def test_codes_in_plain_loops(h, w):
    images, codebook = random_images(3, h, w), random_images(20, 4).reshape(20, 12)
    codes = image_data.encode(images, codebook)
    assert codes.shape == (3, h * w // 4) and codes.dtype == np.uint16
    decoded = image_data.decode(codes, codebook, (h // 2, w // 2))
    assert decoded.shape == images.shape and decoded.dtype == np.uint8
    for n, row, column in itertools.product(range(3), range(h // 2), range(w // 2)):
        patch = images[n, 2 * row:2 * row + 2, 2 * column:2 * column + 2].reshape(12).astype(int)
        distances = [((patch - code.astype(int)) ** 2).sum() for code in codebook]
        code = codes[n, row * (w // 2) + column]
        assert distances[code] == min(distances)
        patch = decoded[n, 2 * row:2 * row + 2, 2 * column:2 * column + 2]
        assert (patch.reshape(12) == codebook[code]).all()


def test_as_many_codes_as_patches_lose_nothing():
    images = np.repeat(random_images(5, 4, 4), 4, axis=0)  # 20 different patches
    codebook = image_data.fit_codebook(images, 20)
    assert (image_data.decode(image_data.encode(images, codebook), codebook, (2, 2)) == images).all()
    assert image_data.psnr(images, images) == math.inf
    with pytest.raises(ValueError, match="20 .*21"):
        image_data.fit_codebook(images, 21)


def test_seldom_patches_make_codes_too():
    """The sample of mostly flat images may have fewer than all of them."""
    images = np.full((2000, 4, 4, 3), 255, np.uint8)
    images[:4] = random_images(4, 4, 4)  # 16 patches, and the white one
    codebook = image_data.fit_codebook(images, 17)
    assert (image_data.decode(image_data.encode(images, codebook), codebook, (2, 2)) == images).all()
    with pytest.raises(ValueError, match="17 .*18"):
        image_data.fit_codebook(images, 18)


def test_k_means_finds_clusters_and_is_the_same_every_time():
    rng = np.random.default_rng(0)
    centers = rng.permutation(np.linspace(20, 235, 8)).repeat(12).reshape(8, 12)
    patches = centers[rng.integers(8, size=4000)] + rng.normal(0, 2, (4000, 12))
    images = patches.round().astype(np.uint8).reshape(4000, 2, 2, 3)
    codebook = image_data.fit_codebook(images, 8)
    assert (codebook == image_data.fit_codebook(images, 8)).all()
    codes = image_data.encode(images, codebook)[:, 0]
    for code in range(8):  # each code is about the mean of what is nearest to it, and none is idle
        assert np.abs(images[codes == code].reshape(-1, 12).mean(0) - codebook[code]).max() <= 2

    def error(codebook):
        again = image_data.decode(image_data.encode(images, codebook), codebook, (1, 1))
        return np.square(images.astype(float) - again).mean()

    assert error(codebook) < 0.6 * min(error(rng.permutation(images)[:8].reshape(8, 12)) for _ in range(5))


def test_psnr_is_its_definition():
    a, b = random_images(2, 4, 4), random_images(2, 4, 4, seed=1)
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    assert image_data.psnr(a, b) == pytest.approx(10 * math.log10(255 ** 2 / error), abs=1e-5)


def maskgit_by_hand(w, codes, grid):
    """The decoder of MaskGIT's VQGAN, from its description: a function of the weights by name."""
    def conv(x, name, padding=1):
        return torch.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), padding=padding)

    def norm(x, name):
        groups = x.reshape(len(x), 32, -1)
        deviation = (groups.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        x = ((groups - groups.mean(-1, True)) / deviation).view_as(x)
        x = x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]
        return x * torch.sigmoid(x)

    def block(x, name):
        y = conv(norm(conv(norm(x, f"{name}.norm1"), f"{name}.conv1"), f"{name}.norm2"), f"{name}.conv2")
        shortcut = f"{name}.nin_shortcut"
        return y + (conv(y, shortcut, 0) if f"{shortcut}.weight" in w else x)

    x = w["quantize.embedding.weight"][codes].reshape(len(codes), *grid, -1).permute(0, 3, 1, 2)
    x = conv(x, "decoder.conv_in")
    x = block(block(x, "decoder.mid.0"), "decoder.mid.1")
    for level in (4, 3, 2, 1, 0):
        x = block(block(x, f"decoder.up.{level}.block.0"), f"decoder.up.{level}.block.1")
        if level:
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            x = conv(x, f"decoder.up.{level}.upsample_conv")
    return conv(norm(x, "decoder.norm_out"), "decoder.conv_out")


def test_maskgit_decoder():
    torch.manual_seed(0)
    decoder = image_data.MaskGITDecoder(n_codes=10, code_dim=8, width=32).double()
    for p in decoder.parameters():
        torch.nn.init.normal_(p, std=0.1)
    codes = torch.randint(10, (2, 6))
    with torch.inference_mode():
        x = decoder(codes, (2, 3))
        assert x.shape == (2, 3, 32, 48)
        assert torch.allclose(x, maskgit_by_hand(decoder.state_dict(), codes, (2, 3)), atol=1e-9)
    images = decoder.float().to_images(codes.numpy().astype(np.uint16), (2, 3), batch=1)
    expected = x.clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    assert images.dtype == np.uint8 and np.abs(images - expected).max() < 0.6


# --------------------------------------------------------------------------------------- the data sets


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A folder that holds the data set digits."""
    folder = tmp_path_factory.mktemp("images")
    prepare_data.main(["digits", "--data_dir", str(folder)])
    return folder


def test_digits(digits_dir, tmp_path):
    folder = digits_dir / "digits"
    meta = prepare_data.load_dataset(folder).meta
    assert (HERE / "digits.npz").stat().st_size < 60_000
    assert meta["vocab_size"] == 256 + 10 + 1 and meta["grid"] == [4, 4] and meta["psnr"] > 24
    (train, labels), (val, val_labels) = prepare_data.split_images(*prepare_data.load_digits())
    assert len(train) + len(val) == 1797 and len(val) == 176
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in val}
    train_records, val_records = records_of(folder)
    assert len(train_records) == 16 * len(train)
    assert (train_records[:len(train), 0] - 256 == labels).all()
    # The first of 16 ways are the scans themselves, the others are much like them.
    assert image_data.psnr(decoded(folder, train_records[:len(train)]), train) > 24
    assert image_data.psnr(decoded(folder, train_records[-len(train):]), train) > 12
    assert sorted(val_records[:, 0] - 256) == sorted(val_labels)
    assert (np.diff(val_records[:, 0].astype(int)) < 0).any()  # mixed
    with Image.open(folder / "contact_sheet.png") as page:
        assert page.size[0] > 300 and page.size[1] > 300
    prepare_data.prepare_digits(tmp_path / "digits")
    assert prepare_data.load_dataset(tmp_path / "digits").meta == meta  # the same again, hashes too


def test_a_damaged_file_of_digits(tmp_path, monkeypatch):
    (tmp_path / "digits.npz").write_bytes(b"x")
    monkeypatch.setattr(prepare_data, "DIGITS", tmp_path / "digits.npz")
    fails(prepare_data, ["digits", "--data_dir", tmp_path / "data"], "digits.npz")


def test_a_scan_is_varied_a_little():
    images = np.zeros((50, 8, 8, 3), np.uint8)
    images[:, 2:6, 2:6] = 200
    varied = image_data.varied(images, seed=0)
    assert len(np.unique(varied.reshape(50, -1), axis=0)) == 50
    assert (varied == image_data.varied(images, seed=0)).all()
    mass = varied.astype(float).sum((1, 2, 3)) / images[0].sum()
    assert 0.75 < mass.min() and mass.max() < 1.3
    centers = [(np.arange(8) * image[..., 0].astype(float).sum(axis)).sum() / image[..., 0].sum() - 3.5
               for image in varied for axis in (0, 1)]
    assert 0.2 < np.abs(centers).max() < 0.75


def cifar10_archive(path, n=100, drop=None, extra=0, truncate=None, labels=None):
    """The archive's true form, n images a file: bright ones of class 0, dark ones of class 9 → its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), {}
    with tarfile.open(path, "w:gz") as archive:
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "readme"]:
            row = np.empty((n, 3073), np.uint8)
            row[:, 0] = np.arange(n) % 10 if labels is None else labels
            row[:, 1:] = 250 - row[:, :1] * 25 + rng.integers(0, 5, (n, 3072))
            rows[name] = row
            if name != drop:
                info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
                info.size = n * 3073 + (extra if name == "test_batch" else 0)
                archive.addfile(info, io.BytesIO(row.tobytes() + bytes(extra)))
    if truncate:
        path.write_bytes(path.read_bytes()[:truncate])
    return rows


def publish(path, monkeypatch):
    """From here on, this archive of 100 images a file is the published one."""
    monkeypatch.setitem(prepare_data.CIFAR10, "batch", 100)
    monkeypatch.setitem(prepare_data.CIFAR10, "md5", prepare_data.hash_of(path, "md5"))


def test_cifar10_from_a_file_that_lies_there(tmp_path, monkeypatch):
    path = tmp_path / "cifar-10-binary.tar.gz"
    rows = cifar10_archive(path)
    publish(path, monkeypatch)
    prepare_data.main(["cifar10", "--data_dir", str(tmp_path), "--codebook_size", "64"])
    meta = prepare_data.load_dataset(tmp_path / "cifar10").meta
    assert meta["grid"] == [16, 16] and meta["vocab_size"] == 64 + 11 and meta["psnr"] > 28
    train, val = records_of(tmp_path / "cifar10")
    assert len(train) == 1000 and len(val) == 100  # to train each image, and its mirror image
    original = rows["data_batch_1"][7, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
    images = decoded(tmp_path / "cifar10", train[[7, 507]])
    assert train[7, 0] == train[507, 0] == 64 + 7
    assert meta["codes_used"] == len(np.unique(train[:, 1:])) / 64 > 0.5
    assert image_data.psnr(images[:1], original[None]) > 28
    assert image_data.psnr(images[1:], original[None, :, ::-1]) > 28


@pytest.mark.parametrize("where", [".", "downloads"])
def test_an_archive_that_lies_there_has_the_published_md5(where, tmp_path, monkeypatch):
    path = tmp_path / where / "cifar-10-binary.tar.gz"
    cifar10_archive(path)
    publish(path, monkeypatch)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # in gzip's own checksum, of which readers of archives take no notice
    path.write_bytes(content)
    fails(prepare_data, ["cifar10", "--data_dir", tmp_path, "--codebook_size", 16], f"{path}.*md5")
    assert path.exists() and not (tmp_path / "cifar10").exists()


@pytest.mark.parametrize("damage, name", [
    (dict(truncate=5000), ""), (dict(drop="data_batch_3"), " 5 of the 6"), (dict(extra=7), ""),
    (dict(labels=3), "data_batch_1"), (dict(labels=200), "data_batch_1")])
def test_bad_cifar10_archives(damage, name, tmp_path, monkeypatch):
    path = tmp_path / "downloads" / "cifar-10-binary.tar.gz"
    cifar10_archive(path, **damage)
    publish(path, monkeypatch)
    fails(prepare_data, ["cifar10", "--data_dir", tmp_path], f"cifar-10-binary.tar.gz.*{name}")
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]


def test_cifar10_from_a_server(server, tmp_path, monkeypatch):
    cifar10_archive(tmp_path / "there.tar.gz")
    server.files["cifar-10-binary.tar.gz"] = (tmp_path / "there.tar.gz").read_bytes()
    server.trouble["cifar-10-binary.tar.gz"] = ["cut"]
    monkeypatch.setitem(prepare_data.CIFAR10, "url", server.url + "cifar-10-binary.tar.gz")
    assert re.fullmatch("[0-9a-f]{32}", prepare_data.CIFAR10["md5"])
    fails(prepare_data, ["cifar10", "--data_dir", tmp_path / "data"], "md5")
    publish(tmp_path / "there.tar.gz", monkeypatch)
    prepare_data.main(["cifar10", "--data_dir", str(tmp_path / "data"), "--codebook_size", "16"])
    assert len(records_of(tmp_path / "data" / "cifar10")[0]) == 1000


# ------------------------------------------------------------------------------- images of one's own


@pytest.fixture
def photos(tmp_path):
    """Two classes of images in many forms."""
    folder = tmp_path / "photos"
    for name, color in [("night", 20), ("noon", 220)]:
        (folder / name / "more").mkdir(parents=True)
        for i in range(12):
            noise = np.random.default_rng(i).integers(0, 30, (20 + i, 40, 3), dtype=np.uint8)
            path = folder / name / f"{i}.{['png', 'jpg', 'bmp'][i % 3]}"
            Image.fromarray(noise + np.uint8(color)).save(path)
    Image.new("RGBA", (9, 30), (20, 20, 20, 255)).save(folder / "night" / "more" / "alpha.png")
    Image.new("L", (1, 1), 220).save(folder / "noon" / "gray.png")
    Image.new("P", (16, 16)).save(folder / "night" / "palette.gif")
    (folder / ".hidden").mkdir()
    (folder / "noon" / ".DS_Store").write_bytes(b"x")
    return folder


def test_many_files_that_are_no_images_are_counted(photos, capsys):
    for i in range(31):
        (photos / "noon" / f"{i}.txt").write_text("no image")
    *_, unreadable = image_data.read_images(photos, 16)
    lines = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert unreadable == 31 and len(lines) == 21 and "11" in lines[-1]


def test_images_of_ones_own(photos, tmp_path, capsys):
    (photos / "noon" / "broken.jpg").write_bytes((photos / "noon" / "1.jpg").read_bytes()[:400])
    (photos / "noon" / "notes.txt").write_text("no image")
    shutil.copy(photos / "noon" / "0.png", photos / "noon" / "copy.png")
    os.mkfifo(photos / "noon" / "pipe.png")
    (photos / "noon" / "gone.png").symlink_to("nowhere")
    folder = make_images(photos, tmp_path, codebook_size=40)
    output = capsys.readouterr().out
    assert all(f"skipped {photos / 'noon' / name}" in output
               for name in ("broken.jpg", "notes.txt", "pipe.png", "gone.png"))
    meta = prepare_data.load_dataset(folder).meta
    assert meta["classes"] == ["night", "noon"] and meta["grid"] == [4, 4]
    assert meta["dropped"] == dict(unreadable=4, duplicate=1) and "1 duplicate, 4 unreadable" in output
    train, val = records_of(folder)
    assert len(train) + len(val) == 14 + 13 and len(val) == 2
    for records in (train, val):
        brightness = decoded(folder, records).mean((1, 2, 3))
        assert ((brightness > 128) == (records[:, 0] == 41)).all()


def test_the_middle_square_is_taken(tmp_path):
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            image[5, 15] = 100 * i
            path = tmp_path / "photos" / name / f"{i}.png"
            Image.fromarray(image if name == "a" else 255 - image).save(path)
    fails(prepare_data, ["--images", tmp_path / "photos", "--data_dir", tmp_path / "data"], "--codebook_size")
    folder = make_images(tmp_path / "photos", tmp_path, image_size=10, codebook_size=2)
    train, _ = records_of(folder)
    assert np.abs(decoded(folder, train).mean((1, 2, 3)) - [255, 0]).max() < 5


def test_bad_folders_of_images(photos, tmp_path):
    data = ["--data_dir", tmp_path / "data", "--codebook_size", 40]
    for size in (7, 0, -2, 10 ** 19):
        fails(prepare_data, ["--images", photos, "--image_size", size, *data], f"--image_size.*{size}")
    fails(prepare_data, ["--images", tmp_path / "nowhere", *data], "nowhere")
    (tmp_path / "empty").mkdir()
    fails(prepare_data, ["--images", tmp_path / "empty", *data], "empty")
    for name in "ab":
        (tmp_path / "one" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "one" / name / "a.png")
    fails(prepare_data, ["--images", tmp_path / "one", *data], "class")
    (photos / "zebra").mkdir()
    (photos / "zebra" / "a.png").write_bytes(b"")
    fails(prepare_data, ["--images", photos, *data], "zebra")
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_linked_folders_are_followed_once(photos, tmp_path):
    shutil.move(photos / "noon", tmp_path / "elsewhere")
    (photos / "noon").mkdir()
    (photos / "noon" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "elsewhere")
    files = list(image_data.files_below(photos / "noon"))
    assert len(files) == 13 and all(path.is_file() for path in files)
    assert len(records_of(make_images(photos, tmp_path))[0]) == 25
    (photos / "noon" / "up").symlink_to(photos)  # all other classes would be in this one
    assert sorted(image_data.files_below(photos / "noon")) == sorted(files)


def test_splits_that_look_like_classes_are_reported(photos, tmp_path, capsys):
    (photos / "night").rename(photos / "train")
    (photos / "noon").rename(photos / "val")
    make_images(photos, tmp_path)
    assert f"--images {photos / 'train'}" in capsys.readouterr().out


GRAY = np.linspace(0, 1, 64 * 64).reshape(64, 64)
GRAY8 = np.round(GRAY * 255).astype(np.uint8)


@pytest.mark.parametrize("pixels, name", [
    (GRAY8, "8.png"), ((GRAY * 65535).astype(np.uint16), "16.png"),
    ((GRAY * 65535).astype(np.uint16), "16.tif"),
    (GRAY.astype(np.float32), "unit.tif"), ((GRAY * 255).astype(np.float32), "bytes.tif"),
    ((GRAY * 65535).astype(np.int32), "words.tif"), (GRAY8.astype(np.int32), "int.tif")])
def test_gray_of_any_depth_is_the_same_image(pixels, name, tmp_path):
    Image.fromarray(pixels).save(tmp_path / name)
    image = image_data.read_image(tmp_path / name, 64)
    assert np.abs(image.astype(int) - GRAY8[..., None]).max() <= 1


def test_a_dark_image_of_16_bits_stays_dark(tmp_path):
    header = b"P5 64 64 65535\n"
    (tmp_path / "dark.pgm").write_bytes(header + (GRAY8 >> 1).astype(">u2").tobytes())
    assert image_data.read_image(tmp_path / "dark.pgm", 64).max() == 0


@pytest.mark.parametrize("values", [(-3, 7), (0, 1e6), (0, float("nan")), (0, float("inf"))])
def test_values_without_a_known_white_are_refused(values, tmp_path):
    Image.fromarray(np.array([values, values], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="values"):
        image_data.read_image(tmp_path / "a.tif", 2)


def test_what_transparency_hides_is_not_seen(tmp_path):
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:6, 2:6], alpha[0] = 255, 128
    for name, color in [("black.png", 0), ("bright.png", 250)]:
        pixels = np.full((8, 8, 4), color, np.uint8)
        pixels[alpha > 0, :3] = 60
        pixels[..., 3] = alpha
        Image.fromarray(pixels).save(tmp_path / name)
        Image.fromarray(pixels[..., [0, 3]]).save(tmp_path / f"gray_{name}")
    expected = np.round(255 - alpha / 255 * (255 - 60))[..., None]
    for path in tmp_path.iterdir():
        assert np.abs(image_data.read_image(path, 8) - expected).max() <= 1, path


@pytest.mark.parametrize("mode, color", [("P", 3), ("L", 3), ("RGB", (3, 3, 3)), ("I;16", 700)])
def test_a_transparent_color_is_white(mode, color, tmp_path):
    image = Image.new("L" if mode == "P" else mode, (8, 8), color)
    image.convert(mode).save(tmp_path / "a.png", transparency=color)
    assert (image_data.read_image(tmp_path / "a.png", 8) == 255).all()


def png(path, depth, kind, row, hidden):
    """Saves a PNG of 8 equal rows, of this depth, kind of color and transparent color."""
    def chunk(name, content):
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    header = struct.pack(">IIBBBBB", 8, 8, depth, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", hidden)
                     + chunk(b"IDAT", zlib.compress((b"\0" + row) * 8)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("depth, kind, row, hidden, seen", [
    (1, 0, b"\x0f", b"\0\0", 255),
    (2, 0, b"\x55\xaa", b"\0\1", 170), (4, 0, b"wwDD", b"\0\7", 68),
    (8, 0, b"\7\7\7\7\3\3\3\3", b"\0\7", 3), (16, 0, b"\7\1" * 4 + b"\3\1" * 4, b"\7\1", 3),
    (8, 2, b"\1\2\3" * 4 + b"\5\5\5" * 4, b"\0\1\0\2\0\3", 5),
    (16, 2, b"\1\2\3\4\5\6" * 4 + b"\5\2" * 12, b"\1\2\3\4\5\6", 5)])
def test_a_transparent_color_of_any_depth_is_white(depth, kind, row, hidden, seen, tmp_path):
    png(tmp_path / "a.png", depth, kind, row, hidden)
    image = image_data.read_image(tmp_path / "a.png", 8)
    assert (image[:, :4] == 255).all() and (image[:, 4:] == seen).all()


@pytest.mark.parametrize("bits, white_is, content, seen", [
    (8, 1, b"\x30", 0x30), (8, 0, b"\x30", 0xcf), (16, 1, b"\x12\x30", 0x30), (16, 0, b"\x12\x30", 0xcf),
    (12, 1, b"\xff\xff\xff", 255), (12, 1, b"\x30\x03\x00", 0x30),
    (32, 0, struct.pack("<f", 1), 0), (32, 0, struct.pack("<f", 0.2), 204)])
def test_gray_of_tiff(bits, white_is, content, seen, tmp_path):
    """Also where 0 is white, as in scans, and where the values have 12 bits."""
    content *= 64 * bits // 8 // len(content)
    entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, white_is),
               (273, 4, 1, 200), (277, 3, 1, 1), (278, 3, 1, 8), (279, 4, 1, len(content)),
               (339, 3, 1, 3 if bits == 32 else 1)]
    header = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    header += b"".join(struct.pack("<HHII", *entry) for entry in entries)
    (tmp_path / "a.tif").write_bytes(header.ljust(200, b"\0") + content)
    assert image_data.read_image(tmp_path / "a.tif", 8)[0, 0].tolist() == [seen] * 3


def jpeg_with_exif(path, image, *entries):
    """Saves a JPEG with these entries (tag, type, count, value) as its EXIF data."""
    content = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + content + bytes(4)
    Image.fromarray(image).save(path, exif=exif, quality=95)


@pytest.mark.parametrize("other", [[], [(0x0100, 5, 1, 38)], [(0x0111, 5, 1, 26)], [(0x011B, 10, 1, 38)],
                                   [(0x0132, 2, 4_000_000_000, 38)]])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_whatever_else_exif_says(orientation, other, tmp_path):
    """Width or strips as fractions, or a negative resolution, cannot be written again, but need not be."""
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8, :8], image[:8, 8:] = 240, 120  # bright above left, gray above right
    jpeg_with_exif(tmp_path / "a.jpg", image, (0x0112, 3, 1, orientation), *other)
    upright = {1: image, 2: image[:, ::-1], 3: image[::-1, ::-1], 4: image[::-1], 5: image.swapaxes(0, 1),
               6: np.rot90(image, -1), 7: np.rot90(image, 2).swapaxes(0, 1), 8: np.rot90(image)}[orientation]
    assert np.abs(image_data.read_image(tmp_path / "a.jpg", 16).astype(int) - upright).max() < 30


@pytest.mark.parametrize("error", [
    RuntimeError("of AVIF"), NotImplementedError("of DDS"), TypeError("of TIFF"), struct.error("of EXIF"),
    Image.DecompressionBombError("of a bomb"), AssertionError(), KeyError(1), OSError("a\nb")])
def test_an_image_may_fail_in_any_way(error, photos, tmp_path, monkeypatch, capsys):
    read = image_data.read_image

    def sometimes(path, size):
        if path.name == "3.png":
            raise error
        return read(path, size)

    monkeypatch.setattr(image_data, "read_image", sometimes)
    images, labels, classes, unreadable = image_data.read_images(photos, 4)
    assert len(images) == len(labels) == 25 and unreadable == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if "3.png" in line]
    kind = "too many pixels" if isinstance(error, Image.DecompressionBombError) else type(error).__name__
    assert len(lines) == 2 and all(kind in line for line in lines)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_an_image_ends_the_preparation(error, photos, monkeypatch):
    def stop(path, size):
        raise error

    monkeypatch.setattr(image_data, "read_image", stop)
    with pytest.raises(error):
        image_data.read_images(photos, 4)


# ------------------------------------------------------------------------------------------- ImageNet


@pytest.fixture
def vqgan(monkeypatch):
    """A file of MaskGIT's VQGAN with random weights, its encoder's too; a quarter as wide, to be fast."""
    monkeypatch.setattr(image_data, "MaskGITDecoder", functools.partial(image_data.MaskGITDecoder, width=32))
    torch.manual_seed(0)
    weights = {**image_data.MaskGITDecoder().state_dict(), "encoder.conv_in.weight": torch.zeros(32, 3, 3, 3)}
    file = io.BytesIO()
    torch.save(weights, file)
    return file.getvalue()


def imagenet_lines(n=40):
    rng = np.random.default_rng(0)
    records = [dict(class_id=i * 1000 // n, tokens=rng.integers(0, 1024, 256).tolist()) for i in range(n)]
    return [json.dumps(record).encode() for record in records]


def serve_imagenet(server, monkeypatch, lines, vqgan):
    server.files = {"codes.jsonl": b"\n".join(lines) + b"\n", "vqgan.bin": vqgan}
    monkeypatch.setattr(prepare_data, "IMAGENET_CODES", server.url + "codes.jsonl")
    monkeypatch.setattr(prepare_data, "MASKGIT_VQGAN", server.url + "vqgan.bin")


def test_imagenet_from_the_download_to_decoded_images(server, tmp_path, monkeypatch, vqgan):
    lines = imagenet_lines()
    serve_imagenet(server, monkeypatch, lines, vqgan)
    server.trouble["codes.jsonl"] = ["cut"]
    prepare_data.main(["imagenet", "--data_dir", str(tmp_path)])
    folder = tmp_path / "imagenet"
    meta = prepare_data.load_dataset(folder).meta
    train, val = records_of(folder)
    assert meta["vocab_size"] == 1024 + 1001 and len(val) == 4
    expected = sorted([1024 + r["class_id"], *r["tokens"]] for r in map(json.loads, lines))
    assert sorted(np.concatenate([train, val]).tolist()) == expected
    with Image.open(folder / "contact_sheet.png") as page:
        assert page.size[1] > 8 * 256
    assert prepare_data.decoder_files(meta) == ["decoder.pt"]
    images = decoded(folder, val[:1])
    assert images.shape == (1, 256, 256, 3) and images.dtype == np.uint8 and images.std() > 1


def record(label, codes):
    return b'{"class_id": %s, "tokens": %s}' % (label, json.dumps(codes).encode())


@pytest.mark.parametrize("line, name", [
    (record(b"1", [1, 2, 3]), r"\(3,\)"), (record(b"1", [0.5] * 256), "float64"),
    (record(b"1000", [5] * 256), "1000"), (record(b'"dog"', [5] * 256), "dog"),
    (record(b"true", [5] * 256), "True"), (record(b"1", [5] * 255 + [1024]), "1024"),
    (record(b"1", [5] * 255 + [-1]), "-1"), (record(b"1", [5] * 255 + [10 ** 30]), "object"),
    (record(b"1", [[1], 2]), ""), (b'{"class_id": 1}', ""), (b"", ""), (b'{"class_id": 1, "tok', ""),
    (b"[1]", ""), (b"[" * 100_000, ""), (b"\xff", "")])
def test_bad_lines_of_imagenet(line, name, tmp_path, vqgan):
    lines = imagenet_lines()
    lines[7] = line
    (tmp_path / "codes.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "vqgan.bin").write_bytes(vqgan)

    def create(**meta):
        return prepare_data.new_dataset(tmp_path / "data" / "imagenet", **meta)

    with pytest.raises(ValueError, match=f"codes.jsonl line 8: .*{name}"):
        image_data.write_imagenet(create, tmp_path / "codes.jsonl", tmp_path / "vqgan.bin", "here")
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("change, name", [
    (lambda w: w.pop("decoder.conv_in.bias"), "decoder.conv_in.bias"),
    (lambda w: w.update({"decoder.extra": torch.zeros(1)}), "decoder.extra"),
    (lambda w: w.update({"decoder.conv_in.bias": "x"}), "vqgan.bin"),
    (lambda w: w.update({"quantize.embedding.weight": torch.zeros(8, 256)}), r"quantize.*\(8, 256\)")])
def test_a_decoder_with_other_weights(change, name, tmp_path, vqgan):
    weights = torch.load(io.BytesIO(vqgan), weights_only=True)
    change(weights)
    torch.save(weights, tmp_path / "vqgan.bin")
    with pytest.raises(ValueError, match=name):
        image_data.load_maskgit(tmp_path / "vqgan.bin", "vqgan.bin")


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04", b"\x80\x02.", "half", "a list"])
def test_a_decoder_that_is_none(content, tmp_path, vqgan):
    file = io.BytesIO()
    torch.save([1], file)
    content = {"half": vqgan[:len(vqgan) // 2], "a list": file.getvalue()}.get(content, content)
    with pytest.raises(ValueError, match="vqgan.bin") as error:
        image_data.load_maskgit(io.BytesIO(content), "vqgan.bin")
    assert "\n" not in str(error.value)


def llamagen_files(folder, n=20, crops=3):
    """What LlamaGen's extraction writes, n images of so many crops → the records that they make."""
    rng, records = np.random.default_rng(0), []
    for kind in ("codes", "labels"):
        (folder / f"imagenet256_{kind}").mkdir(parents=True)
    for i in range(n):
        codes = rng.integers(0, 16384, (1, crops, 256))
        np.save(folder / "imagenet256_codes" / f"{i}.npy", codes)
        np.save(folder / "imagenet256_labels" / f"{i}.npy", np.array([i * 50]))
        records += [[16384 + i * 50, *crop] for crop in codes[0].tolist()]
    return records


def test_codes_of_llamagen(tmp_path):
    records = llamagen_files(tmp_path / "extracted")
    (tmp_path / "extracted" / "imagenet256_codes" / "._0.npy").write_bytes(b"of another system")
    prepare_data.main(["--codes", str(tmp_path / "extracted"), "--name", "llamagen", "--data_dir",
                       str(tmp_path)])
    meta = prepare_data.load_dataset(tmp_path / "llamagen").meta
    train, val = records_of(tmp_path / "llamagen")
    assert meta["vocab_size"] == 16384 + 1001 and len(val) == 6
    assert sorted(train.tolist() + val.tolist()) == sorted(records)
    assert not set(train[:, 0]) & set(val[:, 0])  # in this set a class is an image: its crops stay together
    assert prepare_data.decoder_files(meta) == []
    assert image_data.load_decoder(tmp_path / "llamagen", meta) is None


def archive_of(array):
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


HUGE = b"\x93NUMPY\x01\0\x76\0{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999,), }"


@pytest.mark.parametrize("kind, array, name", [
    ("codes", np.zeros((1, 2, 255), np.int64), r"\(1, 2, 255\)"),
    ("codes", np.full((1, 2, 256), 16384), "16384"), ("codes", np.full((1, 2, 256), -1), "-1"),
    ("codes", np.zeros((1, 2, 256)), "float64"), ("codes", np.zeros((1, 0, 256), np.int64), r"\(1, 0, 256\)"),
    ("codes", np.int64(3), ""), ("codes", np.zeros(256, [("a", "i4")]), ""), ("codes", np.array([{}]), ""),
    ("codes", archive_of(np.zeros(256, np.int64)), ""), ("codes", HUGE, ""), ("codes", b"", ""),
    ("codes", "pipe", ""), ("labels", np.array([1000]), "1000"), ("labels", np.array([1, 2]), "None"),
    ("labels", np.array([0.5]), "None"), ("labels", None, ""), ("labels", b"\x93NUMPY", "")])
def test_bad_codes_of_llamagen(kind, array, name, tmp_path):
    llamagen_files(tmp_path / "extracted")
    path = tmp_path / "extracted" / f"imagenet256_{kind}" / "7.npy"
    path.unlink()
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif isinstance(array, str):
        os.mkfifo(path)
    elif array is not None:
        np.save(path, array)
    flags = ["--codes", tmp_path / "extracted", "--data_dir", tmp_path / "data"]
    fails(prepare_data, flags, f"7.npy.*{name}")
    assert not list((tmp_path / "data").iterdir())
    fails(prepare_data, ["--codes", tmp_path / "nowhere", "--data_dir", tmp_path / "data"], "nowhere")


# ------------------------------------------------------------------- decoders and damaged data sets


def test_a_decoder_works_in_any_folder(digits_dir, tmp_path):
    data = prepare_data.load_dataset(digits_dir / "digits")
    assert prepare_data.decoder_files(data.meta) == ["codebook.npy"]
    shutil.copy(digits_dir / "digits" / "codebook.npy", tmp_path)
    codes = data.val.reshape(-1, 17)[:, 1:]
    images = image_data.load_decoder(tmp_path, data.meta)(codes, "cpu")
    assert (images == decoded(digits_dir / "digits", data.val.reshape(-1, 17))).all()
    content = bytearray((tmp_path / "codebook.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "codebook.npy").write_bytes(content)
    with pytest.raises(ValueError, match="codebook.npy"):
        image_data.load_decoder(tmp_path, data.meta)


def test_a_pipe_instead_of_a_decoder(digits_dir, tmp_path):
    os.mkfifo(tmp_path / "codebook.npy")
    with pytest.raises(ValueError, match="codebook.npy"):
        image_data.load_decoder(tmp_path, prepare_data.load_dataset(digits_dir / "digits").meta)


@pytest.mark.parametrize("array", [
    np.zeros((256, 11), np.uint8), np.zeros((256, 12)), np.zeros((9, 12), np.uint8), np.uint8(0), b"x"])
def test_codebooks_that_are_none(array, digits_dir, tmp_path):
    file = io.BytesIO()
    file.write(array) if isinstance(array, bytes) else np.save(file, array)
    (tmp_path / "codebook.npy").write_bytes(file.getvalue())
    meta = prepare_data.load_dataset(digits_dir / "digits").meta
    published = dict(size=len(file.getvalue()), sha256=prepare_data.hash_of(tmp_path / "codebook.npy"))
    with pytest.raises(ValueError, match="codebook.npy"):
        image_data.load_decoder(tmp_path, {**meta, "files": {"codebook.npy": published}})


@pytest.mark.parametrize("changes, name", [
    (dict(n_codes=262, classes=list("abcd")), "n_codes"), (dict(grid=[4, 5]), "grid"),
    (dict(grid=[4]), "grid"),
    (dict(n_codes=262), "vocab_size"), (dict(grid=[0, 4]), "grid"), (dict(classes=[]), "classes"),
    (dict(classes=[1] * 10), "classes"), (dict(decoder="other"), "decoder"),
    (dict(decoder="maskgit"), "decoder.pt")])
def test_damaged_data_sets_of_images(changes, name, digits_dir, tmp_path):
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")
    prepare_data.load_dataset(tmp_path / "digits")  # so that it was found good before
    meta = json.loads((tmp_path / "digits" / "meta.json").read_text())
    (tmp_path / "digits" / "meta.json").write_text(json.dumps({**meta, **changes}))
    with pytest.raises(UserError, match=f"meta.json.*{name}"):
        prepare_data.load_dataset(tmp_path / "digits")


def test_what_codes_and_classes_mean_is_part_of_the_identity(digits_dir):
    data = prepare_data.load_dataset(digits_dir / "digits")
    identity = data.identity()
    for change in (dict(n_codes=255), dict(grid=[2, 8]), dict(classes=list("jihgfedcba")),
                   dict(decoder=None)):
        other = prepare_data.Dataset(data.folder, {**data.meta, **change}, data.train, data.val).identity()
        assert [key for key in identity if identity[key] != other[key]] == list(change)


def test_a_contact_sheet_has_a_row_for_each_label(digits_dir):
    images = decoded(digits_dir / "digits", np.arange(6 * 17).reshape(6, 17))
    page = np.asarray(image_data.contact_sheet([images[:2], images[2:4], images[4:]], ["a", "bb", "ccc"]))
    tiles = [page[2 + 34 * i:34 + 34 * i, 30 + 34 * j:62 + 34 * j] for i in range(3) for j in range(2)]
    assert all((tile[::4, ::4] == image).all() for tile, image in zip(tiles, images, strict=True))
    # A name that the font has no letters for is not a row of boxes.
    one, other = (np.asarray(image_data.contact_sheet([images[:2]], [label])) for label in ("日本", "中国"))
    assert one.shape == other.shape and (one != other).any()


# ------------------------------------------------------------------------ training and generation


TINY = "--device cpu --micro_batch 32 --log_every 10".split()
KINDS = list(itertools.product(["mha", "mla"], ["none", "lave", "move"]))
all_kinds = pytest.mark.parametrize("attention, memory", KINDS)


def command(data_dir, out_dir, *flags, dataset="digits"):
    return ["--dataset", dataset, "--data_dir", str(data_dir), "--out_dir", str(out_dir), *TINY,
            *map(str, flags)]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than these runs; test_training.py looks at the curves."""
    monkeypatch.setattr(train_gpt, "update_curves", lambda folder: None)


def test_a_tenth_of_the_records_have_the_null_class():
    rows = np.column_stack((np.arange(700, 1000), np.arange(300 * 4).reshape(300, 4) % 600))
    tokens = rows.astype(np.uint16).ravel()
    records = train_image.ImageRecords(tokens, 4, null_class=1000)
    idx, targets = records[np.arange(300)]
    assert idx.shape == targets.shape == (300, 4)
    assert (idx[:, 1:] == targets[:, :-1]).all() and (targets.numpy() == rows[:, 1:]).all()
    for n in (300, 233, 10946):  # Fibonacci numbers, too: their multiples of the ratio are nearly whole
        many = train_image.ImageRecords(np.zeros(5 * n, np.uint16), 4, null_class=1000)
        null = np.stack([(many[np.arange(n * e, n * (e + 1))][0][:, 0] == 1000).numpy() for e in range(60)])
        assert (null.reshape(6, 10, n).sum(1) == 1).all()  # of each record once in ten epochs
        assert np.abs(null.mean(1) - 0.1).max() < 0.02
        for crops in (2, 10):  # and in each epoch of a tenth of those that are the first crop of their image
            assert np.abs(null[:, ::crops].mean(1) - 0.1).max() < 0.05
    named = (idx[:, 0] != 1000).numpy()
    assert (idx[named, 0].numpy() == rows[named, 0]).all()
    without = train_image.ImageRecords(tokens, 4)
    assert (without[np.arange(300)][0][:, 0].numpy() == rows[:, 0]).all()


def test_positions_of_an_image():
    assert train_image.grid_positions((2, 3)).tolist() == [[0, 0], [1, 1], [1, 2], [1, 3], [2, 1], [2, 2]]
    assert train_image.grid_positions((1, 1)).tolist() == [[0, 0]]


@pytest.fixture(scope="session")
def finished(digits_dir, tmp_path_factory):
    """A quarter of the default run."""
    out_dir = tmp_path_factory.mktemp("out") / "digits"
    train_image.main(command(digits_dir, out_dir, "--move_scale", 2, "--max_steps", 100, "--eval_every", 50,
                             "--save_every", 50))
    return out_dir


def trained(out_dir):
    """(model, meta of its data set) of a run."""
    saved = run_folder.read_checkpoint(out_dir)
    args = argparse.Namespace(**saved["flags"])
    return train_gpt.load_model(saved, out_dir, args, "cpu"), saved["meta"]


def test_digits_are_learned(finished, digits_dir, tmp_path, capsys):
    bits = log_of(finished, "val_bits_per_image_token")
    assert list(bits) == [0, 50, 100] and bits[0] == pytest.approx(math.log2(320), abs=0.05)
    assert bits[100] < 4.2
    assert {path.name for path in finished.iterdir()} >= {
        "samples_50.png", "samples_100.png", "log.jsonl", "checkpoint.pt", "codebook.npy"}
    shutil.copytree(finished, tmp_path / "run")
    train_image.main(["--out_dir", str(tmp_path / "run"), "--save_npz", "205"])
    with np.load(tmp_path / "run" / "samples_100.npz") as samples:
        images, classes = samples["arr_0"], samples["arr_1"]
    assert images.shape == (205, 8, 8, 3) and images.dtype == np.uint8
    assert sorted(np.bincount(classes)) == [20] * 5 + [21] * 5
    benchmarks.digits(tmp_path / "run" / "samples_100.npz", steps=250)
    lines = capsys.readouterr().out.splitlines()[-3:]
    real, generated = (float(re.search(r": ([\d.]+)%", line)[1]) for line in lines[:2])
    assert real > 95 and generated > 60  # of a quarter of the run; the whole one is in the README
    new, held_out = map(int, re.findall(r"by (\d+)", lines[2]))
    assert 0.7 * held_out < new < 2.5 * held_out  # neither copies nor noise
    (train, labels), _ = prepare_data.split_images(*prepare_data.load_digits())
    np.savez(tmp_path / "copies.npz", train[:100], (labels[:100] + 1) % 10)  # copies, each of another class
    benchmarks.digits(tmp_path / "copies.npz", steps=250)
    assert re.search(r"digits: 0\.0%(.|\n)*differ by 0 gray", capsys.readouterr().out)


def test_samples_of_a_run_from_another_device(finished):
    """Where a run is only sampled, no micro-batch is known but the one that was given."""
    model, meta = trained(finished)
    args = argparse.Namespace(micro_batch=None, cfg_scale=1.5, temperature=1.0, top_k=None, top_p=None,
                              seed=0, asked=dict(micro_batch=None))
    assert train_image.codes_of_classes(model, meta, np.arange(3), args).shape == (3, 16)


def test_bits_per_image_token_of_probabilities(finished, digits_dir):
    data, (model, _) = prepare_data.load_dataset(digits_dir / "digits"), trained(finished)
    rows, bits = torch.from_numpy(data.val.reshape(-1, 17).astype(np.int64)), []
    for row in rows:
        p = model(row[None, :-1])[0].double().softmax(-1)
        bits += [-math.log2(p[i, code].item()) for i, code in enumerate(row[1:])]
    assert log_of(finished, "val_bits_per_image_token")[100] == pytest.approx(np.mean(bits), rel=1e-4)


def test_guidance_is_its_formula_with_and_without_the_cache(finished):
    model, meta = trained(finished)
    classes = 256 + torch.tensor([3, 1, 4, 1, 5, 9])

    def generate(cfg_scale):
        generator = torch.Generator().manual_seed(0)
        return train_image.generate_codes(model, classes, 256, 266, cfg_scale, generator=generator)

    for scale in (0.0, 0.5, 2.0):
        generator, codes = torch.Generator().manual_seed(0), torch.empty(6, 0, dtype=torch.long)
        with torch.inference_mode():
            for _ in range(16):
                cond, uncond = (model(torch.cat((first.unsqueeze(1), codes), 1))[:, -1, :256]
                                for first in (classes, torch.full_like(classes, 266)))
                p = (uncond + scale * (cond - uncond)).softmax(-1)
                codes = torch.cat((codes, torch.multinomial(p, 1, generator=generator)), 1)
        assert torch.equal(generate(scale), codes)
    assert torch.equal(generate(1.0), generate(1.0 + 1e-6))  # guided by next to nothing
    assert not torch.equal(generate(1.0), generate(3.0))


def test_a_resumed_run_is_the_run_that_never_stopped(digits_dir, tmp_path):
    flags = ["--depth", 1, "--eval_every", 10, "--save_every", 10, "--log_every", 5, "--batch_tokens", 512,
             "--max_steps", 20]
    train_image.main(command(digits_dir, tmp_path / "whole", *flags))

    def killed(step, *args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_image, "save_samples", killed)  # right after the checkpoint of step 10
        train_image.main(command(digits_dir, tmp_path / "cut", *flags))
    train_image.main(["--out_dir", str(tmp_path / "cut"), "--resume"])
    for key in ("loss", "val_bits_per_image_token"):
        assert log_of(tmp_path / "whole", key) == log_of(tmp_path / "cut", key)
    whole, cut = ((tmp_path / name / "samples_20.png").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


@all_kinds
def test_every_setting_trains_and_generates(attention, memory, digits_dir, tmp_path):
    flags = ["--attention", attention, "--memory", memory, "--max_steps", 2, "--batch_tokens", 512,
             *["--no-gate_value"] * (memory == "move")]
    train_image.main(command(digits_dir, tmp_path / "run", *flags))
    with Image.open(tmp_path / "run" / "samples_2.png") as page:
        assert page.size[0] > 300


def test_the_same_seed_makes_the_same_page_with_the_runs_folder_only(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "out" / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "load_dataset", None)
    page = tmp_path / "out" / "moved" / "samples_100.png"
    before = page.read_bytes()
    page.unlink()
    train_image.main(["--sample"])  # the newest run
    assert page.read_bytes() == before
    fails(train_gpt, ["--prompt", "x"], "text")
    fails(train_gpt, ["--prompt", "x", "--out_dir", "out/moved"], "image")
    (tmp_path / "out" / "moved" / "codebook.npy").write_bytes(b"x")
    fails(train_image, ["--sample"], "codebook.npy")


def test_the_page_does_not_depend_on_a_micro_batch_that_was_chosen(digits_dir, tmp_path):
    run = ["--data_dir", str(digits_dir), "--out_dir", str(tmp_path / "run")]
    train_image.main([*run, *"--device cpu --depth 2 --max_steps 2 --batch_tokens 64".split()])
    page = tmp_path / "run" / "samples_2.png"
    before = page.read_bytes()
    train_image.main([*run[2:], "--sample"])
    assert page.read_bytes() == before


def test_sizes_of_llamagen():
    for size, (layers, dim, heads) in train_image.SIZES.items():
        assert dim % heads == 0 and dim // heads == 64, (size, layers)
    assert train_image.SIZES["B"] == (12, 768, 12) and train_image.SIZES["L"] == (24, 1024, 16)


def test_bad_flags_and_files(finished, digits_dir, tmp_path):
    for flags, name in [
            (["--cfg_scale", -1], "cfg_scale"), (["--cfg_scale", "nan"], "cfg_scale"),
            (["--size", "B", "--depth", 2], "size.*depth"), (["--size", "Q"], "'Q'"),
            (["--save_npz", 0], "none|save_npz"), (["--top_p", 2], "top_p"), (["--sample"], "none"),
            (["--save_npz", 10], "none"), (["--batch_tokens", 100], "batch_tokens 100.*512"),
            (["--dataset", "wikipedia"], "wikipedia"), (["--seq_len", 3], "seq_len")]:
        fails(train_image, [*command(digits_dir, tmp_path / "none"), *flags], name)
        assert not (tmp_path / "none").exists()
    fails(train_image, ["--out_dir", finished, "--save_npz", 0], "save_npz")
    fails(train_gpt, ["--dataset", "digits", "--data_dir", digits_dir, "--out_dir", tmp_path / "none"],
          "image.*text")
    fails(train_image, [*command(digits_dir, finished), "--max_steps", 100, "--resume", "--move_scale", 3],
          "move_scale 3.* 2")
    for content in (b"", b"PK\x03\x04"):
        (tmp_path / "samples.npz").write_bytes(content)
        fails(experiments, ["digits", tmp_path / "samples.npz"], "samples.npz")
    np.savez(tmp_path / "samples.npz", np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2))
    fails(experiments, ["digits", tmp_path / "samples.npz"], r"\(2, 4, 4, 3\).*\(N, 8, 8, 3\)")
    for n, classes in ((0, np.zeros(0)), (2, np.zeros(1)), (2, np.array(["a", "b"])), (2, np.array([9, 10]))):
        np.savez(tmp_path / "samples.npz", np.zeros((n, 8, 8, 3), np.uint8), classes)
        fails(experiments, ["digits", tmp_path / "samples.npz"], "samples.npz")


def test_images_of_one_code(tmp_path):
    """Two by two pixels: they train, go on and are sampled."""
    rng = np.random.default_rng(0)
    for name in ("bright", "dark"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 128, (2, 2, 3)) + 127 * (name == "bright")
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pictures" / name / f"{i}.png")
    prepare_data.main(["--images", str(tmp_path / "pictures"), "--name", "pixels", "--image_size", "2",
                       "--codebook_size", "4", "--data_dir", str(tmp_path)])
    flags = ["--out_dir", str(tmp_path / "run"), "--device", "cpu"]
    train_image.main(["--dataset", "pixels", "--data_dir", str(tmp_path), *flags, "--depth", "1",
                      "--max_steps", "1", "--batch_tokens", "8"])
    train_image.main(["--resume", "--max_steps", "2", *flags])
    train_image.main(["--sample", *flags])
    assert (tmp_path / "run" / "samples_2.png").exists()


def test_out_of_memory_says_what_to_lower(digits_dir, tmp_path, monkeypatch):
    def forward(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(GPT, "forward", forward)
    fails(train_image, command(digits_dir, tmp_path / "run"), "memory.*--micro_batch 32")
    for error in (RuntimeError("std::bad_alloc"), MemoryError()):
        with pytest.raises(UserError, match="memory.*--save_npz 7"), memory_advice(
                lambda: command_line.how_to_save_memory(argparse.Namespace(save_npz=7, device="cpu"))):
            raise error


def test_images_of_imagenet_are_generated(server, tmp_path, monkeypatch, vqgan):
    serve_imagenet(server, monkeypatch, imagenet_lines(), vqgan)
    prepare_data.main(["imagenet", "--data_dir", str(tmp_path)])
    monkeypatch.setattr(train_image, "MAX_ROWS", 2)
    monkeypatch.setattr(train_image, "MAX_COLUMNS", 1)
    out = tmp_path / "out"
    flags = "--depth 1 --max_steps 1 --batch_tokens 1024 --micro_batch 4 --eval_tokens 1024".split()
    train_image.main(command(tmp_path, out, *flags, dataset="imagenet"))
    with Image.open(out / "samples_1.png") as page:
        assert page.size[1] == 2 * 258 + 2 and np.asarray(page)[5:250, 60:300].std() > 1
    shutil.rmtree(tmp_path / "imagenet")  # the run has a copy of the decoder
    train_image.main(["--out_dir", str(out), "--save_npz", "2"])
    with np.load(out / "samples_1.npz") as samples:
        assert samples["arr_0"].shape == (2, 256, 256, 3) and samples["arr_0"].dtype == np.uint8


def test_codes_of_llamagen_are_generated(tmp_path, monkeypatch):
    monkeypatch.setattr(train_image, "MAX_COLUMNS", 1)
    llamagen_files(tmp_path / "extracted")
    prepare_data.main(["--codes", str(tmp_path / "extracted"), "--name", "llamagen", "--data_dir",
                       str(tmp_path)])
    out = tmp_path / "out"
    flags = "--depth 1 --max_steps 1 --batch_tokens 1024 --micro_batch 4 --eval_tokens 1024".split()
    train_image.main(command(tmp_path, out, *flags, dataset="llamagen"))
    train_image.main(["--out_dir", str(out), "--save_npz", "3"])
    codes = np.load(out / "samples_1_codes.npy")
    assert np.load(out / "samples_1_classes.npy").tolist() == [0, 1, 2]
    assert codes.shape == (3, 256) and codes.dtype == np.int64 and 0 <= codes.min() and codes.max() < 16384
