"""Tests pictures from files: they must be upright, in colours of 0…1, whatever the kind of file."""

import struct
import sys
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from fastcss.data import read_image
from fastcss.data._pictures import read_labels, read_size


def save(tmp_path, pixels, mode=None, **options):
    path = tmp_path / "picture.png"
    picture = Image.fromarray(np.array(pixels)) if mode is None else Image.fromarray(np.array(pixels)).convert(mode)
    picture.save(path, **options)
    return path


def test_grey_and_palette_pictures_become_coloured(tmp_path):
    expected = torch.tensor([[0.0, 51, 255]]).expand(3, 1, 3) / 255
    assert torch.equal(read_image(save(tmp_path, np.uint8([[0, 51, 255]]))), expected)
    colours = np.uint8([[[255, 0, 0], [0, 0, 255]]])
    assert read_image(save(tmp_path, colours, "P")).tolist() == [[[1, 0]], [[0, 0]], [[0, 1]]]
    assert read_image(save(tmp_path, np.uint8([[0, 255]]), "1")).tolist() == [[[0, 1]]] * 3


def test_16_bit_grey_keeps_its_scale(tmp_path):
    image = read_image(save(tmp_path, np.uint16([[0, 32768, 65535]])))
    torch.testing.assert_close(image, torch.tensor([[0, 32768 / 65535, 1]]).expand(3, 1, 3))
    assert image.is_contiguous()


def test_what_is_transparent_is_laid_on_white(tmp_path):
    image = read_image(save(tmp_path, np.uint8([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]])))
    torch.testing.assert_close(image, torch.tensor([[[1, 1, 0.8]], [[0, 1, 0.8]], [[0, 1, 0.8]]]))
    grey = tmp_path / "grey.png"
    Image.merge("LA", [Image.fromarray(np.uint8([row])) for row in ([0, 0], [0, 255])]).save(grey)
    assert read_image(grey).tolist() == [[[1, 0]]] * 3
    palette = Image.fromarray(np.uint8([[0, 1]]))
    palette.putpalette([0, 0, 255, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert read_image(tmp_path / "palette.png").tolist() == [[[1, 0]], [[1, 1]], [[1, 0]]]


def test_one_pixel_is_a_picture(tmp_path):
    assert read_image(save(tmp_path, np.uint8([[[1, 2, 3]]]))).shape == (3, 1, 1)


def test_files_that_are_no_pictures_are_named(tmp_path):
    whole = save(tmp_path, np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).read_bytes()
    for i, content in enumerate((b"", b"no picture", whole[: len(whole) // 2])):
        path = tmp_path / f"broken{i}.png"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"broken{i}.png: no picture that can be read"):
            read_image(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: no picture that can be read"):
        read_image(tmp_path)


def test_pixels_of_no_known_range_are_an_error(tmp_path):
    Image.fromarray(np.float32([[0, 3e5]])).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match=r"float.tiff: pixels of mode F have no known range"):
        read_image(tmp_path / "float.tiff")


def test_pillow_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"PIL is not installed: pip install 'fastcss\[data\]'"):
        read_image(tmp_path / "any.png")


#: Turns a picture [2, 3] upright, for each EXIF orientation.
UPRIGHT = {
    None: lambda x: x, 1: lambda x: x, 2: lambda x: x.flip(1), 3: lambda x: x.flip(0, 1), 4: lambda x: x.flip(0),
    5: lambda x: x.T, 6: lambda x: x.rot90(-1), 7: lambda x: x.flip(0, 1).T, 8: lambda x: x.rot90(1), 9: lambda x: x,
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_turned_upright(tmp_path, suffix, orientation):
    stored = torch.tensor([[0, 50, 100], [150, 200, 250]], dtype=torch.uint8)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    blocks = stored.repeat_interleave(16, 0).repeat_interleave(16, 1)  # JPEG's, each of one grey
    options = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(blocks.numpy()).convert("RGB").save(path := tmp_path / f"picture.{suffix}", exif=exif, **options)
    expected = UPRIGHT[orientation](stored)
    image = read_image(path)
    assert image.shape[1:] == (16 * expected.shape[0], 16 * expected.shape[1])
    torch.testing.assert_close(image[:, 8::16, 8::16] * 255, expected.float().expand(3, -1, -1), atol=2, rtol=0)
    assert read_size(path) == (image.shape[1:], orientation in (5, 6, 7, 8) and suffix != "tiff")


def test_16_bit_grey_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = read_image(save(tmp_path, np.uint16([[1000, 2000, 3000]]), exif=exif))
    torch.testing.assert_close(image[0] * 65535, torch.tensor([[1000.0], [2000], [3000]]))


def png(width: int, bits: int, kind: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Make a file of one row, in kinds that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)
    parts = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    packed = (struct.pack(">I", len(x)) + tag + x + struct.pack(">I", zlib.crc32(tag + x)) for tag, x in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(width: int, bits: int, meaning: int, row: bytes) -> bytes:
    """Make a file of one row of grey; ``meaning`` is 0 if white is zero, else 1."""
    fields = {
        256: width,
        257: 1,
        258: bits,
        259: 1,
        262: meaning,
        273: 8 + 2 + 12 * 9 + 4,
        277: 1,
        278: 1,
        279: len(row),
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + struct.pack("<I", 0) + row


DEEP = {
    "16 bits of colour": (png(2, 16, 2, struct.pack(">6H", 0, 0, 0, 65535, 32768, 0)), [[0, 1], [0, 0.5], [0, 0]]),
    "16 bits with alpha": (png(2, 16, 4, struct.pack(">4H", 0, 65535, 0, 0)), [[0, 1]] * 3),
    "a transparent grey": (png(2, 16, 0, struct.pack(">2H", 700, 32768), (b"tRNS", b"\x02\xbc")), [[1, 0.5]] * 3),
    "16 bits": (tiff(2, 16, 1, struct.pack("<2H", 0, 49151)), [[0, 0.75]] * 3),
    "16 bits, white is zero": (tiff(2, 16, 0, struct.pack("<2H", 0, 49151)), [[1, 0.25]] * 3),
    "12 bits": (tiff(2, 12, 1, b"\x00\x0f\xff"), [[0, 1]] * 3),
    "16 bits of Netpbm": (b"P5\n2 1\n65535\n" + struct.pack(">2H", 0, 32768), [[0, 0.5]] * 3),
    "12 bits of Netpbm": (b"P5\n2 1\n4095\n" + struct.pack(">2H", 0, 4095), [[0, 1]] * 3),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_pictures_keep_their_scale(tmp_path, kind):
    content, expected = DEEP[kind]
    (tmp_path / "deep").write_bytes(content)
    torch.testing.assert_close(
        read_image(tmp_path / "deep")[:, 0], torch.tensor(expected).float(), atol=1 / 255, rtol=0
    )


RESCALED = {  # labels 1, 2 of a file that Pillow reads as others
    "4 bits": png(2, 4, 0, b"\x12"),
    "2 bits": png(2, 2, 0, b"\x60"),
    "4 bits of TIFF": tiff(2, 4, 1, b"\x12"),
    "white is zero": tiff(2, 8, 0, b"\x01\x02"),
    "another maximum": b"P5\n2 1\n150\n\x01\x02",
}


@pytest.mark.parametrize("kind", RESCALED)
def test_labels_that_pillow_would_rescale_are_refused(tmp_path, kind):
    (tmp_path / "labels").write_bytes(RESCALED[kind])
    with pytest.raises(ValueError, match="labels: labels must be palette indices or 8-bit grey; this grey has fewer"):
        read_labels(tmp_path / "labels", 254)


def test_labels_of_few_palette_indices_are_read(tmp_path):
    (tmp_path / "labels").write_bytes(png(2, 4, 3, b"\x12", (b"PLTE", bytes(9))))
    assert read_labels(tmp_path / "labels", 2).tolist() == [[1, 2]]


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "LA", "PA"])
def test_other_kinds_of_colour_are_what_pillow_makes_of_them(tmp_path, mode):
    colours = Image.fromarray(np.uint8([[[255, 0, 0], [0, 204, 102]]]))
    picture = colours if mode == "LAB" else colours.convert("P" if mode == "PA" else mode).convert(mode)
    if mode == "LAB":
        from PIL import ImageCms

        spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        picture = ImageCms.applyTransform(colours, ImageCms.buildTransform(*spaces, "RGB", "LAB"))
    picture.save(tmp_path / "picture.tiff")
    expected = torch.from_numpy(np.asarray(colours.convert("L").convert("RGB") if mode == "LA" else colours) / 255)
    image = read_image(tmp_path / "picture.tiff").permute(1, 2, 0)
    torch.testing.assert_close(image.double(), expected, atol=0.1, rtol=0)
