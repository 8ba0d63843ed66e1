"""The claims of README.md about pictures, executed."""
import io
import itertools
import json
import math
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import experiments
import pictures
import prepare_data
import train_gpt
import train_image
from test_move import HERE, all_kinds, fails, log_of, server  # noqa: F401 (a fixture)

TINY = "--device cpu --micro_batch 32 --log_every 10".split()


def command(data_dir, out_dir, *flags, dataset="digits"):
    return ["--dataset", dataset, "--data_dir", str(data_dir), "--out_dir", str(out_dir), *TINY, *map(str, flags)]


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------- pictures and codes


@pytest.mark.parametrize("h, w", [(2, 2), (4, 6), (8, 2)])
def test_codes_in_plain_loops(h, w):
    images, codebook = random_images(3, h, w), random_images(20, 4).reshape(20, 12)
    codes = pictures.encode(images, codebook)
    assert codes.shape == (3, h * w // 4) and codes.dtype == np.uint16
    decoded = pictures.decode(codes, codebook, (h // 2, w // 2))
    assert decoded.shape == images.shape and decoded.dtype == np.uint8
    for n, row, column in itertools.product(range(3), range(h // 2), range(w // 2)):
        patch = images[n, 2 * row:2 * row + 2, 2 * column:2 * column + 2].reshape(12).astype(int)
        distances = [((patch - code.astype(int)) ** 2).sum() for code in codebook]
        code = codes[n, row * (w // 2) + column]
        assert distances[code] == min(distances)
        assert (decoded[n, 2 * row:2 * row + 2, 2 * column:2 * column + 2].reshape(12) == codebook[code]).all()


def test_as_many_codes_as_patches_lose_nothing():
    images = np.repeat(random_images(5, 4, 4), 4, axis=0)  # 20 different patches
    codebook = pictures.fit_codebook(images, 20)
    assert (pictures.decode(pictures.encode(images, codebook), codebook, (2, 2)) == images).all()
    assert pictures.psnr(images, images) == math.inf
    with pytest.raises(ValueError, match="20 different patches, fewer than 21 codes"):
        pictures.fit_codebook(images, 21)


def test_k_means_finds_clusters_and_is_the_same_every_time():
    rng = np.random.default_rng(0)
    centers = rng.permutation(np.linspace(20, 235, 8)).repeat(12).reshape(8, 12)
    patches = centers[rng.integers(8, size=4000)] + rng.normal(0, 2, (4000, 12))
    images = patches.round().astype(np.uint8).reshape(4000, 2, 2, 3)
    codebook = pictures.fit_codebook(images, 8)
    assert (codebook == pictures.fit_codebook(images, 8)).all()
    codes = pictures.encode(images, codebook)[:, 0]
    for code in range(8):  # each code is about the mean of what is nearest to it, and none is idle
        assert np.abs(images[codes == code].reshape(-1, 12).mean(0) - codebook[code]).max() <= 2

    def error(codebook):
        return np.square(images.astype(float) - pictures.decode(pictures.encode(images, codebook), codebook, (1, 1))).mean()

    assert error(codebook) < 0.6 * min(error(rng.permutation(images)[:8].reshape(8, 12)) for _ in range(5))


def test_psnr_is_its_definition():
    a, b = random_images(2, 4, 4), random_images(2, 4, 4, seed=1)
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    assert pictures.psnr(a, b) == pytest.approx(10 * math.log10(255 ** 2 / error), abs=1e-5)


def maskgit_by_hand(w, codes, grid):
    """The decoder of MaskGIT's VQGAN, from its description: a function of the weights by name."""
    def conv(x, name, padding=1):
        return torch.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), padding=padding)

    def norm(x, name):
        groups = x.reshape(len(x), 32, -1)
        x = ((groups - groups.mean(-1, True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()).view_as(x)
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
    decoder = pictures.MaskGITDecoder(n_codes=10, code_dim=8, width=32).double()
    for p in decoder.parameters():
        torch.nn.init.normal_(p, std=0.1)
    codes = torch.randint(10, (2, 6))
    with torch.inference_mode():
        x = decoder(codes, (2, 3))
        assert x.shape == (2, 3, 32, 48)
        assert torch.allclose(x, maskgit_by_hand(decoder.state_dict(), codes, (2, 3)), atol=1e-9)
    images = decoder.float().to_images(codes.numpy().astype(np.uint16), (2, 3), batch=1)
    assert images.dtype == np.uint8 and np.abs(images - x.clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).max() < 0.6


# --------------------------------------------------------------------------------------- the data sets


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    prepare_data.main(["digits", "--data_dir", str(folder)])
    return folder


def test_digits(data_dir, tmp_path):
    data = prepare_data.load_dataset(data_dir / "digits")
    assert (HERE / "digits.npz").stat().st_size < 60_000
    assert data.meta["vocab_size"] == 256 + 10 + 1 and data.meta["grid"] == [4, 4] and data.meta["psnr"] > 24
    (train, labels), (held_out, held_out_labels) = prepare_data.split_pictures(*prepare_data.load_digits())
    assert len(train) + len(held_out) == 1797 and len(held_out) == 176
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in held_out}
    records = data.train.reshape(-1, 17)
    assert len(records) == 16 * len(train) and (records[:len(train), 0] - 256 == labels).all()
    assert pictures.psnr(data.to_images(records[:len(train), 1:]), train) > 24  # the first of 16 ways are the scans themselves
    assert pictures.psnr(data.to_images(records[-len(train):, 1:]), train) > 12  # the others are much like them
    val = data.val.reshape(-1, 17)
    assert sorted(val[:, 0] - 256) == sorted(held_out_labels) and (np.diff(val[:, 0].astype(int)) < 0).any()  # mixed
    with Image.open(data_dir / "digits" / "contact_sheet.png") as page:
        assert page.size[0] > 300 and page.size[1] > 300
    prepare_data.main(["digits", "--data_dir", str(tmp_path)])
    assert prepare_data.load_dataset(tmp_path / "digits").meta == data.meta  # the same again, hashes too


def test_a_scan_is_varied_a_little():
    images = np.zeros((50, 8, 8, 3), np.uint8)
    images[:, 2:6, 2:6] = 200
    varied = prepare_data.varied(images, seed=0)
    assert len(np.unique(varied.reshape(50, -1), axis=0)) == 50 and (varied == prepare_data.varied(images, seed=0)).all()
    mass = varied.astype(float).sum((1, 2, 3)) / images[0].sum()
    assert 0.75 < mass.min() and mass.max() < 1.3
    centers = [(np.arange(8) * image[..., 0].astype(float).sum(axis)).sum() / image[..., 0].sum() - 3.5 for image in varied for axis in (0, 1)]
    assert 0.2 < np.abs(centers).max() < 0.75


def cifar10_archive(path, n=100, drop=None, extra=0, truncate=None, labels=None):
    """The archive's true form, n pictures a file: bright ones of class 0, dark ones of class 9."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), {}
    with tarfile.open(path, "w:gz") as archive:
        for name in ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch", "readme"]:
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


def test_cifar10_from_a_file_that_lies_there(tmp_path, monkeypatch):
    monkeypatch.setitem(prepare_data.CIFAR10, "batch", 100)
    rows = cifar10_archive(tmp_path / "cifar-10-binary.tar.gz")
    prepare_data.main(["cifar10", "--data_dir", str(tmp_path), "--codebook_size", "64"])
    data = prepare_data.load_dataset(tmp_path / "cifar10")
    assert data.meta["grid"] == [16, 16] and data.meta["vocab_size"] == 64 + 11 and data.meta["psnr"] > 28
    records = data.train.reshape(-1, 257)
    assert len(records) == 1000 and len(data.val) == 100 * 257  # each picture, and its mirror image
    original = rows["data_batch_1"][7, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
    decoded = data.to_images(records[[7, 507], 1:])
    assert records[7, 0] == records[507, 0] == 64 + 7
    assert data.meta["codes_used"] == len(np.unique(records[:, 1:])) / 64 > 0.5
    assert pictures.psnr(decoded[:1], original[None]) > 28 and pictures.psnr(decoded[1:], original[None, :, ::-1]) > 28


@pytest.mark.parametrize("damage, message", [
    (dict(truncate=5000), "is no whole archive .*remove it and run again"), (dict(drop="data_batch_3"), "has 5 of the 6 files"),
    (dict(extra=7), r"test_batch.bin has \d+ bytes, expected"), (dict(labels=3), "does not have 50 training pictures of each class"),
    (dict(labels=200), "does not have 50 training pictures of each class")])
def test_bad_cifar10_archives(damage, message, tmp_path, monkeypatch):
    monkeypatch.setitem(prepare_data.CIFAR10, "batch", 100)
    cifar10_archive(tmp_path / "downloads" / "cifar-10-binary.tar.gz", **damage)
    fails(prepare_data, ["cifar10", "--data_dir", tmp_path], message)
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]


def test_cifar10_from_a_server_has_the_published_md5(server, tmp_path, monkeypatch):  # noqa: F811
    cifar10_archive(tmp_path / "there.tar.gz")
    server.files["cifar-10-binary.tar.gz"], server.trouble["cifar-10-binary.tar.gz"] = (tmp_path / "there.tar.gz").read_bytes(), ["cut"]
    monkeypatch.setitem(prepare_data.CIFAR10, "url", server.url + "cifar-10-binary.tar.gz")
    assert re.fullmatch("[0-9a-f]{32}", prepare_data.CIFAR10["md5"])
    fails(prepare_data, ["cifar10", "--data_dir", tmp_path / "data"], "another md5 than published; it was removed")
    monkeypatch.setitem(prepare_data.CIFAR10, "md5", prepare_data.hash_of(tmp_path / "there.tar.gz", "md5"))
    monkeypatch.setitem(prepare_data.CIFAR10, "batch", 100)
    prepare_data.main(["cifar10", "--data_dir", str(tmp_path / "data"), "--codebook_size", "16"])
    assert prepare_data.load_dataset(tmp_path / "data" / "cifar10").meta["train"]["records"] == 1000


@pytest.fixture
def photos(tmp_path):
    """Two classes of pictures in many forms, and files that are none."""
    folder = tmp_path / "photos"
    for name, color in [("night", 20), ("noon", 220)]:
        (folder / name / "more").mkdir(parents=True)
        for i in range(12):
            noise = np.random.default_rng(i).integers(0, 30, (20 + i, 40, 3), dtype=np.uint8)
            Image.fromarray(noise + np.uint8(color)).save(folder / name / f"{i}.{['png', 'jpg', 'bmp'][i % 3]}")
    Image.new("RGBA", (9, 30), (20, 20, 20, 128)).save(folder / "night" / "more" / "alpha.png")
    Image.new("L", (1, 1), 220).save(folder / "noon" / "gray.png")
    Image.new("P", (16, 16)).save(folder / "night" / "palette.gif")
    (folder / ".hidden").mkdir()
    (folder / "noon" / ".DS_Store").write_bytes(b"x")
    return folder


def test_pictures_of_ones_own(photos, tmp_path, capsys):
    (photos / "noon" / "broken.jpg").write_bytes((photos / "noon" / "1.jpg").read_bytes()[:400])
    (photos / "noon" / "notes.txt").write_text("no picture")
    prepare_data.main(["--images", str(photos), "--image_size", "8", "--codebook_size", "40", "--data_dir", str(tmp_path / "data")])
    output = capsys.readouterr().out
    assert "skipped 2 file(s)" in output and "broken.jpg" in output and "notes.txt" in output
    data = prepare_data.load_dataset(tmp_path / "data" / "images")
    assert data.meta["classes"] == ["night", "noon"] and data.meta["grid"] == [4, 4]
    assert len(data.train) + len(data.val) == (14 + 13) * 17 and len(data.val) == 2 * 17
    for records in (data.train.reshape(-1, 17), data.val.reshape(-1, 17)):
        brightness = data.to_images(records[:, 1:]).mean((1, 2, 3))
        assert ((brightness > 128) == (records[:, 0] == 41)).all()


def test_the_middle_square_is_taken(tmp_path):
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            image[5, 15] = 100 * i
            Image.fromarray(image if name == "a" else 255 - image).save(tmp_path / "photos" / name / f"{i}.png")
    fails(prepare_data, ["--images", tmp_path / "photos", "--data_dir", tmp_path / "data"], "different patches, fewer than 4096 codes; lower --codebook_size")
    prepare_data.main(["--images", str(tmp_path / "photos"), "--codebook_size", "2", "--data_dir", str(tmp_path / "data"), "--image_size", "10"])
    data = prepare_data.load_dataset(tmp_path / "data" / "images")
    assert np.abs(data.to_images(data.train.reshape(-1, 26)[:, 1:]).mean((1, 2, 3)) - [255, 0]).max() < 5


def test_bad_folders_of_pictures(photos, tmp_path):
    data = ["--data_dir", tmp_path / "data", "--codebook_size", 40]
    fails(prepare_data, ["--images", photos, "--image_size", 7, *data], "--image_size must be an even number")
    fails(prepare_data, ["--images", tmp_path / "nowhere", *data], "there is no folder .*nowhere")
    (tmp_path / "empty").mkdir()
    fails(prepare_data, ["--images", tmp_path / "empty", *data], "has no folders of pictures")
    for name in "ab":
        (tmp_path / "one" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "one" / name / "a.png")
    fails(prepare_data, ["--images", tmp_path / "one", *data], "no class with two different pictures")
    (photos / "zebra").mkdir()
    (photos / "zebra" / "a.png").write_bytes(b"")
    fails(prepare_data, ["--images", photos, *data], "zebra has no readable picture")
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


# ------------------------------------------------------------------------------------------- ImageNet


@pytest.fixture(scope="session")
def vqgan():
    """A file of MaskGIT's VQGAN with random weights, its encoder's too."""
    torch.manual_seed(0)
    weights = {**pictures.MaskGITDecoder().state_dict(), "encoder.conv_in.weight": torch.zeros(128, 3, 3, 3)}
    file = io.BytesIO()
    torch.save(weights, file)
    return file.getvalue()


def imagenet_lines(n=40):
    rng = np.random.default_rng(0)
    return [json.dumps(dict(class_id=int(i * 1000 // n), tokens=rng.integers(0, 1024, 256).tolist())).encode() for i in range(n)]


def serve_imagenet(server, monkeypatch, lines, vqgan):  # noqa: F811
    server.files = {"codes.jsonl": b"\n".join(lines) + b"\n", "vqgan.bin": vqgan}
    monkeypatch.setattr(prepare_data, "IMAGENET_CODES", server.url + "codes.jsonl")
    monkeypatch.setattr(prepare_data, "MASKGIT_VQGAN", server.url + "vqgan.bin")


def test_imagenet_from_the_download_to_decoded_pictures(server, tmp_path, monkeypatch, vqgan):  # noqa: F811
    lines = imagenet_lines()
    serve_imagenet(server, monkeypatch, lines, vqgan)
    server.trouble["codes.jsonl"] = ["cut"]
    prepare_data.main(["imagenet", "--data_dir", str(tmp_path)])
    data = prepare_data.load_dataset(tmp_path / "imagenet")
    assert data.meta["vocab_size"] == 1024 + 1001 and data.meta["val"]["records"] == 4
    expected = sorted([1024 + r["class_id"], *r["tokens"]] for r in map(json.loads, lines))
    assert sorted(np.concatenate([data.train, data.val]).reshape(-1, 257).tolist()) == expected
    with Image.open(tmp_path / "imagenet" / "contact_sheet.png") as page:
        assert page.size[1] > 8 * 256
    monkeypatch.setattr(train_image, "MAX_ROWS", 2)
    monkeypatch.setattr(train_image, "MAX_COLUMNS", 1)
    out = tmp_path / "out"
    train_image.main(command(tmp_path, out, "--depth", 2, "--max_steps", 1, "--batch_tokens", 8192, dataset="imagenet"))
    with Image.open(out / "samples_1.png") as page:
        assert page.size[1] == 2 * 258 + 2 and np.asarray(page)[5:250, 60:300].std() > 1
    train_image.main(command(tmp_path, out, "--depth", 2, "--save_npz", 2, dataset="imagenet"))
    with np.load(out / "samples_1.npz") as samples:
        assert samples["arr_0"].shape == (2, 256, 256, 3) and samples["arr_0"].dtype == np.uint8


@pytest.mark.parametrize("line, message", [
    (b'{"class_id": 1, "tokens": [1, 2, 3]}', r"line 8: has codes of shape \(3,\)"),
    (b'{"class_id": 1, "tokens": %s}' % str([0.5] * 256).encode(), "line 8: has codes of .* type float64"),
    (b'{"class_id": 1000, "tokens": %s}' % str([5] * 256).encode(), "line 8: has class 1000, expected 0 to 999"),
    (b'{"class_id": "dog", "tokens": %s}' % str([5] * 256).encode(), "line 8: has class 'dog'"),
    (b'{"class_id": 1, "tokens": %s}' % str([5] * 255 + [1024]).encode(), "line 8: has code 1024, expected 0 to 1023"),
    (b'{"class_id": 1, "tokens": %s}' % str([5] * 255 + [-1]).encode(), "line 8: has code -1"),
    (b'{"class_id": 1}', "line 8: is not a record"), (b"", "line 8: is not a record"), (b'{"class_id": 1, "tok', "line 8: is not a record"),
    (b"[1]", "line 8: is not a record"), (b'{"class_id": 1, "tokens": [[1], 2]}', "line 8: is not a record")])
def test_bad_lines_of_imagenet(line, message, server, tmp_path, monkeypatch, vqgan):  # noqa: F811
    lines = imagenet_lines()
    lines[7] = line
    serve_imagenet(server, monkeypatch, lines, vqgan)
    fails(prepare_data, ["imagenet", "--data_dir", tmp_path], message)
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("decoder.conv_in.bias"), "it has no decoder.conv_in.bias"),
    (lambda w: w.update({"decoder.extra": torch.zeros(1)}), "its decoder.extra is not of this decoder"),
    (lambda w: w.update({"quantize.embedding.weight": torch.zeros(8, 256)}), r"quantize.embedding.weight has shape \(8, 256\), expected \(1024, 256\)")])
def test_a_decoder_with_other_weights(change, message, tmp_path, vqgan):
    weights = torch.load(io.BytesIO(vqgan), weights_only=True)
    change(weights)
    torch.save(weights, tmp_path / "vqgan.bin")
    with pytest.raises(prepare_data.UserError, match=message):
        prepare_data.load_maskgit(tmp_path / "vqgan.bin")
    for content in (b"", b"<html>", vqgan[:1000]):
        (tmp_path / "vqgan.bin").write_bytes(content)
        with pytest.raises(prepare_data.UserError, match="is not the decoder of MaskGIT's VQGAN"):
            prepare_data.load_maskgit(tmp_path / "vqgan.bin")


def llamagen_files(folder, n=20, crops=3):
    rng, records = np.random.default_rng(0), []
    for kind in ("codes", "labels"):
        (folder / f"imagenet256_{kind}").mkdir(parents=True)
    for i in range(n):
        codes = rng.integers(0, 16384, (1, crops, 256))
        np.save(folder / "imagenet256_codes" / f"{i}.npy", codes)
        np.save(folder / "imagenet256_labels" / f"{i}.npy", np.array([i * 50]))
        records += [[16384 + i * 50, *crop] for crop in codes[0].tolist()]
    return records


def test_codes_of_llamagen(tmp_path, monkeypatch):
    monkeypatch.setattr(train_image, "MAX_COLUMNS", 1)
    records = llamagen_files(tmp_path / "extracted")
    prepare_data.main(["--codes", str(tmp_path / "extracted"), "--data_dir", str(tmp_path), "--name", "llamagen"])
    data = prepare_data.load_dataset(tmp_path / "llamagen")
    assert data.meta["vocab_size"] == 16384 + 1001 and data.meta["val"]["records"] == 6
    train, val = data.train.reshape(-1, 257), data.val.reshape(-1, 257)
    assert sorted(train.tolist() + val.tolist()) == sorted(records)
    assert not set(train[:, 0]) & set(val[:, 0])  # in this set a class is a picture: its crops stay together
    out = tmp_path / "out"
    train_image.main(command(tmp_path, out, "--depth", 2, "--max_steps", 1, "--batch_tokens", 8192, dataset="llamagen"))
    train_image.main(command(tmp_path, out, "--depth", 2, "--save_npz", 3, dataset="llamagen"))
    codes = np.load(out / "samples_1_codes.npy")
    assert np.load(out / "samples_1_classes.npy").tolist() == [0, 1, 2]
    assert codes.shape == (3, 256) and codes.dtype == np.int64 and 0 <= codes.min() and codes.max() < 16384


@pytest.mark.parametrize("kind, array, message", [
    ("codes", np.zeros((1, 2, 255), np.int64), r"codes.7.npy: has codes of shape \(1, 2, 255\)"),
    ("codes", np.full((1, 2, 256), 16384), "codes.7.npy: has code 16384"), ("codes", np.full((1, 2, 256), -1), "7.npy: has code -1"),
    ("codes", np.zeros((1, 2, 256)), "7.npy: has codes of .*float64"), ("labels", np.array([1000]), "7.npy: has class 1000"),
    ("labels", np.array([1, 2]), "7.npy: has class None"), ("labels", np.array([0.5]), "7.npy: has class None"),
    ("labels", None, "labels.7.npy is missing"), ("codes", b"", "codes.7.npy is damaged"), ("labels", b"\x93NUMPY", "labels.7.npy is damaged"),
    ("codes", np.array([{}]), "codes.7.npy is damaged")])
def test_bad_codes_of_llamagen(kind, array, message, tmp_path):
    llamagen_files(tmp_path / "extracted")
    path = tmp_path / "extracted" / f"imagenet256_{kind}" / "7.npy"
    path.unlink()
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array)
    fails(prepare_data, ["--codes", tmp_path / "extracted", "--data_dir", tmp_path / "data"], message)
    assert not list((tmp_path / "data").iterdir())
    fails(prepare_data, ["--codes", tmp_path / "nowhere", "--data_dir", tmp_path / "data"], "has no .npy files")


@pytest.mark.parametrize("damage, message", [
    (lambda f, meta: meta.update(n_codes=262), "has records that are not a class and 16 codes"),
    (lambda f, meta: meta.update(grid=[4, 5]), "has records that are not a class and 20 codes"),
    (lambda f, meta: meta["files"].pop("codebook.npy"), "it has no hash of codebook.npy"),
    (lambda f, meta: meta.update(decoder="other"), "meta.json is damaged"),
    (lambda f, meta: (f / "codebook.npy").write_bytes(b""), "codebook.npy has 0 bytes")])
def test_damaged_data_sets_of_pictures(damage, message, data_dir, tmp_path):
    shutil.copytree(data_dir / "digits", tmp_path / "digits")
    meta = json.loads((tmp_path / "digits" / "meta.json").read_text())
    damage(tmp_path / "digits", meta)
    (tmp_path / "digits" / "meta.json").write_text(json.dumps(meta))
    fails(train_image, command(tmp_path, tmp_path / "out"), message)


# -------------------------------------------------------------------------------- records and training


def test_a_tenth_of_the_visits_have_the_empty_class():
    tokens = np.column_stack((np.arange(700, 1000), np.arange(300 * 4).reshape(300, 4) % 600)).astype(np.uint16).ravel()
    records = train_image.ImageRecords(tokens, 4, empty=1000)
    idx, targets = records[np.arange(300)]
    assert idx.shape == targets.shape == (300, 4)
    assert (idx[:, 1:] == targets[:, :-1]).all() and (targets.numpy() == tokens.reshape(300, 5)[:, 1:]).all()
    for n in (300, 233, 10946):  # also Fibonacci numbers, whose multiples of the golden ratio are nearly whole
        many = train_image.ImageRecords(np.zeros(5 * n, np.uint16), 4, empty=1000)
        empty = np.stack([(many[np.arange(n * e, n * (e + 1))][0][:, 0] == 1000).numpy() for e in range(60)])
        assert (empty.reshape(6, 10, n).sum(1) == 1).all()  # of each record once in ten epochs
        assert np.abs(empty.mean(1) - 0.1).max() < 0.02
        for crops in (2, 10):  # and in each epoch of a tenth of those that are the first crop of their picture
            assert np.abs(empty[:, ::crops].mean(1) - 0.1).max() < 0.05
    empty = (idx[:, 0] == 1000).numpy()
    named = ~empty
    assert (idx[named, 0].numpy() == np.arange(700, 1000)[named]).all()
    assert (train_image.ImageRecords(tokens, 4)[np.arange(300)][0][:, 0].numpy() == np.arange(700, 1000)).all()


@pytest.fixture(scope="session")
def finished(data_dir, tmp_path_factory):
    """A quarter of the default run."""
    out_dir = tmp_path_factory.mktemp("out") / "digits"
    train_image.main(command(data_dir, out_dir, "--move_scale", 2, "--max_steps", 100, "--eval_every", 50, "--save_every", 50))
    return out_dir


def test_digits_are_learned(finished, data_dir, capsys):
    bits = log_of(finished, "val_bits_per_image_token")
    assert list(bits) == [0, 50, 100] and bits[0] == pytest.approx(math.log2(320), abs=0.05) and bits[100] < 4.2
    assert {path.name for path in finished.iterdir()} >= {"samples_50.png", "samples_100.png", "log.jsonl", "checkpoint.pt"}
    train_image.main(command(data_dir, finished, "--save_npz", 205))
    with np.load(finished / "samples_100.npz") as samples:
        images, classes = samples["arr_0"], samples["arr_1"]
    assert images.shape == (205, 8, 8, 3) and images.dtype == np.uint8
    assert sorted(np.bincount(classes)) == [20] * 5 + [21] * 5
    experiments.main(["digits", str(finished / "samples_100.npz")])
    lines = capsys.readouterr().out.splitlines()[-3:]
    real, generated = (float(re.search(r": ([\d.]+)%", line)[1]) for line in lines[:2])
    assert real > 95 and generated > 60  # of a quarter of the run; the whole one is in the README
    new, held_out = map(int, re.findall(r"by (\d+)", lines[2]))
    assert 0.7 * held_out < new < 2.5 * held_out  # neither copies nor noise
    (train, labels), _ = prepare_data.split_pictures(*prepare_data.load_digits())
    np.savez(finished / "copies.npz", train[:100], (labels[:100] + 1) % 10)  # copies, and each of another class
    experiments.main(["digits", str(finished / "copies.npz")])
    assert re.search(r"digits: 0\.0%(.|\n)*differ by 0 gray", capsys.readouterr().out)


def test_bits_per_image_token_of_probabilities(finished, data_dir):
    data = prepare_data.load_dataset(data_dir / "digits")
    args = train_image_args(data_dir, finished)
    model, _ = train_gpt.load_model(finished / "checkpoint.pt", {}, args, train_gpt.Machine(torch.device("cpu")))
    rows, bits = torch.from_numpy(data.val.reshape(-1, 17).astype(np.int64)), []
    for row in rows:
        p = model(row[None, :-1])[0].double().softmax(-1)
        bits += [-math.log2(p[i, code].item()) for i, code in enumerate(row[1:])]
    assert log_of(finished, "val_bits_per_image_token")[100] == pytest.approx(np.mean(bits), rel=1e-4)


def train_image_args(data_dir, out_dir, **changes):
    args = dict(micro_batch=7, seed=0, temperature=1.0, top_k=None, top_p=None, cfg_scale=2.0, dtype="float32",
                bank_dtype="float32", mix="auto", out_dir=out_dir)
    return type("Args", (), {**args, **changes})


def test_drawing_through_the_cache_is_drawing_without_it(finished, data_dir):
    data, machine = prepare_data.load_dataset(data_dir / "digits"), train_gpt.Machine(torch.device("cpu"))
    args = train_image_args(data_dir, finished, micro_batch=6)
    model, _ = train_gpt.load_model(finished / "checkpoint.pt", {}, args, machine)
    classes = np.array([3, 1, 4, 1, 5, 9])
    codes = train_image.draw_codes(model, data, classes, args, machine)
    generator = torch.Generator().manual_seed(0)
    rows = torch.from_numpy(256 + classes).unsqueeze(1)
    empty = torch.full_like(rows, 266)
    drawn = torch.empty(6, 0, dtype=torch.long)
    with torch.inference_mode():
        for _ in range(16):
            a, b = (model(torch.cat((first, drawn), 1))[:, -1, :256] for first in (rows, empty))
            drawn = torch.cat((drawn, torch.multinomial((b + 2 * (a - b)).softmax(-1), 1, generator=generator)), 1)
    assert (codes == drawn.numpy()).all()
    one, none = (train_image.draw_codes(model, data, classes, train_image_args(data_dir, finished, cfg_scale=scale), machine)
                 for scale in (1.0, 1.0 + 1e-6))  # guided by next to nothing, through all of the formula
    assert (one == none).all()


def test_a_resumed_run_is_the_run_that_never_stopped(data_dir, tmp_path):
    flags = ["--depth", 1, "--eval_every", 10, "--save_every", 10, "--log_every", 5, "--batch_tokens", 512]
    train_image.main(command(data_dir, tmp_path / "whole", *flags, "--max_steps", 20))

    def killed(step, *args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_image, "save_samples", killed)  # right behind the checkpoint of step 10
        train_image.main(command(data_dir, tmp_path / "cut", *flags, "--max_steps", 20))
    train_image.main(command(data_dir, tmp_path / "cut", *flags, "--max_steps", 20, "--resume"))
    for key in ("loss", "val_bits_per_image_token"):
        assert log_of(tmp_path / "whole", key) == log_of(tmp_path / "cut", key)
    assert (tmp_path / "whole" / "samples_20.png").read_bytes() == (tmp_path / "cut" / "samples_20.png").read_bytes()


@all_kinds
def test_every_setting_trains_and_draws(attention, memory, data_dir, tmp_path):
    flags = ["--attention", attention, "--memory", memory, "--depth", 2, "--max_steps", 2, "--batch_tokens", 512]
    train_image.main(command(data_dir, tmp_path / "run", *flags, *["--no-gate_value"] * (memory == "move")))
    with Image.open(tmp_path / "run" / "samples_2.png") as page:
        assert page.size[0] > 300


def test_the_sheet_has_a_row_a_class(finished, data_dir):
    before = (finished / "samples_100.png").read_bytes()
    train_image.main(command(data_dir, finished, "--sample"))
    assert (finished / "samples_100.png").read_bytes() == before  # the same seed and guidance
    codes, data = np.arange(6 * 16).reshape(6, 16), prepare_data.load_dataset(data_dir / "digits")
    images = data.to_images(codes)
    page = np.asarray(pictures.sheet([images[:2], images[2:4], images[4:]], ["a", "bb", "ccc"]))
    tiles = [page[2 + 34 * i:34 + 34 * i, 30 + 34 * j:62 + 34 * j] for i in range(3) for j in range(2)]
    assert all((tile[::4, ::4] == image).all() for tile, image in zip(tiles, images))


def test_sizes_of_llamagen():
    for size, (layers, dim, heads) in train_image.SIZES.items():
        assert dim % heads == 0 and dim // heads == 64, (size, layers)
    assert train_image.SIZES["B"] == (12, 768, 12) and train_image.SIZES["L"] == (24, 1024, 16)


def test_bad_flags_and_files(finished, data_dir, tmp_path):
    for flags, message in [
            (["--cfg_scale", -1], "--cfg_scale must be from 0"), (["--cfg_scale", "nan"], "--cfg_scale must be"),
            (["--size", "B", "--depth", 2], "--size or --depth, not both"), (["--size", "Q"], "invalid choice: 'Q'"),
            (["--save_npz", 0], "--save_npz must be at least 1"), (["--top_p", 2], "--top_p must be"),
            (["--sample"], "there is no checkpoint"), (["--save_npz", 10], "there is no checkpoint"),
            (["--batch_tokens", 100], "--batch_tokens 100 is not a multiple of micro_batch · seq_len"),
            (["--dataset", "wikipedia"], "there is no data set .*wikipedia"), (["--seq_len", 3], "unrecognized arguments")]:
        fails(train_image, [*command(data_dir, tmp_path / "none"), *flags], message)
        assert not (tmp_path / "none").exists()
    fails(train_gpt, ["--dataset", "digits", "--data_dir", data_dir, "--out_dir", tmp_path / "none"], "digits is of kind image, this script needs text")
    fails(train_image, [*command(data_dir, finished), "--max_steps", 100, "--resume", "--move_scale", 3], "made with n_slots = 2, now it is 3")
    for content in (b"", b"PK\x03\x04"):
        (tmp_path / "samples.npz").write_bytes(content)
        fails(experiments, ["digits", tmp_path / "samples.npz"], "samples.npz is no file of train_image.py --save_npz")
    np.savez(tmp_path / "samples.npz", np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2))
    fails(experiments, ["digits", tmp_path / "samples.npz"], r"pictures of shape \(4, 4, 3\), expected digits of \(8, 8, 3\)")


def test_a_damaged_file_of_digits(tmp_path, monkeypatch):
    (tmp_path / "digits.npz").write_bytes(b"x")
    monkeypatch.setattr(prepare_data, "DIGITS", tmp_path / "digits.npz")
    fails(prepare_data, ["digits", "--data_dir", tmp_path / "data"], "digits.npz is missing or damaged")
