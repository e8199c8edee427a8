"""Tests PASCAL VOC's lists of images as others wrote them: other names, forms and encodings."""

import shutil

import pytest

pytest.importorskip("PIL")

from fastcss.data import VOC, voc


def listed(voc_root, split: str, text: str | bytes) -> VOC:
    content = text if isinstance(text, bytes) else text.encode()
    (voc_root / "ImageSets" / "Segmentation" / f"{split}.txt").write_bytes(content)
    return VOC(voc_root, "train_aug" if split == "trainaug" else split)


def stems(data: VOC) -> list[str]:
    assert [path.stem for path in data.images] == [path.stem for path in data.masks]
    return [path.stem for path in data.images]


@pytest.fixture
def odd_names(voc_root):
    """Writes files of such names, and of what is left of them before a dot or a space."""
    names = ["frame.1", "frame.2", "frame", "a  photo of mine", "a", "x.jpg y"]
    for name in names:
        shutil.copy(voc_root / "JPEGImages" / "2007_000001.jpg", voc_root / "JPEGImages" / f"{name}.jpg")
        shutil.copy(voc_root / "SegmentationClass" / "2007_000001.png", voc_root / "SegmentationClass" / f"{name}.png")
    return names


@pytest.mark.parametrize(
    "form", ["{}", "{}.jpg", "JPEGImages/{}.jpg", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png"]
)
def test_names_with_dots_and_spaces_are_the_files_listed(voc_root, odd_names, form):
    text = "\r\n".join(form.format(name) for name in odd_names) + "\r\n"
    assert stems(listed(voc_root, "train", text)) == odd_names


def test_a_picture_listed_twice_is_named(voc_root):
    with pytest.raises(ValueError, match=r"train\.txt lists 1 of its pictures more than once, .* 2007_000002$"):
        listed(voc_root, "train", "2007_000002\n2007_000001\nJPEGImages/2007_000002.jpg\n")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with a mark", "utf-16-be with a mark"])
def test_lists_of_other_editors_are_read(voc_root, encoding):
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        shutil.copy(voc_root / folder / f"2007_000001.{suffix}", voc_root / folder / f"Bär.{suffix}")
    encoding, _, mark = encoding.partition(" ")
    text = "\n".join(["2007_000001", "Bär"])
    assert stems(listed(voc_root, "train", (("\ufeff" if mark else "") + text).encode(encoding))) == [
        "2007_000001",
        "Bär",
    ]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_a_list_that_is_no_text_is_named(voc_root, encoding):
    with pytest.raises(ValueError, match=r"train\.txt is no text in UTF-8, save it as such: "):
        listed(voc_root, "train", "2007_000001\nBär".encode(encoding))


def test_the_augmented_list_may_have_either_name(voc_root):
    (voc_root / "SegmentationClass").rename(voc_root / "SegmentationClassAug")
    assert stems(listed(voc_root, "trainaug", "2007_000003")) == ["2007_000003"]
    assert voc.lists(voc_root) == ["train", "val", "trainval", "train_aug"]
    assert stems(listed(voc_root, "train_aug", "2007_000002")) == ["2007_000002"]
