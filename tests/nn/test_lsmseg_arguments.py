"""Tests what LSMSegHead refuses: sizes, inputs and labels, each named in the message."""

import pytest
import torch
from literal_lsmseg import head, inputs, plain

from fastcss.nn import LSMSegHead
from fastcss.ops import FilteredCost


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"sam_channels": 0}, "sam_channels must be at least 1, got 0"),
        ({"guidance_channels": (3, 0)}, r"guidance_channels\[1\] must be at least 1, got 0"),
        (
            {"guidance_channels": (3,)},
            r"guidance_channels must be 2, one for each upsampling stage, or none, got \(3,\)",
        ),
        ({"upsample_channels": (64, 3)}, r"upsample_channels must each be at least 4, got \(64, 3\)"),
        ({"hidden": 10}, "hidden must be a multiple of heads = 4 and at least 4, got 10"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"heads": -1}, "heads must be at least 1, got -1"),
        ({"prompts": 0}, "prompts must be at least 1, got 0"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"impl": "fast"}, "impl must be 'auto' or one of reference, .*, got 'fast'"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LSMSegHead(**{"channels": 16} | arguments)


def test_bad_inputs_are_named():
    module, (image, text, sam, guidance) = head(), inputs()

    def refuses(error, match, **changed):
        arguments = {"image": image, "text": text, "sam": sam, "guidance": guidance} | changed
        with pytest.raises(error, match=match):
            module(**arguments)

    refuses(ValueError, r"image must be \[B, D, H, W\], got \[12, 6, 9\]", image=image[0])
    refuses(
        ValueError, r"image must be \[B, 12, H, W\] with at least one pixel, got \[2, 11, 6, 9\]", image=image[:, 1:]
    )
    refuses(ValueError, r"image must be .* at least one pixel, got \[2, 12, 0, 9\]", image=image[:, :, :0])
    refuses(TypeError, "image must be a floating-point tensor, got torch.int64", image=image.long())
    refuses(TypeError, "text must be a tensor or from pack_text, got list", text=text.tolist())
    for wrong in (text[:, :1], text[:, :, :11], text[:0], text[0], text.expand(3, -1, -1, -1)):
        refuses(ValueError, r"text must be \[T, 2, 12\] or \[2, T, 2, 12\] with at least one class, got", text=wrong)
    refuses(TypeError, "text must have the dtype of image, torch.float32, got torch.float64", text=text.double())
    refuses(ValueError, "sam must be given: sam_channels", sam=None)
    refuses(ValueError, r"sam must be \[B, 5, h, w\] with at least one pixel, got \[2, 4, 11, 7\]", sam=sam[:, 1:])
    refuses(ValueError, r"sam must be \[B, C, h, w\] with B = 2, got \[1, 5, 11, 7\]", sam=sam[:1])
    refuses(ValueError, "guidance must be given: guidance_channels", guidance=())
    refuses(ValueError, "guidance must be 2 tensors, got 1", guidance=guidance[:1])
    refuses(ValueError, r"guidance\[0\] must be \[B, 6, h, w\]", guidance=guidance[::-1])
    with pytest.raises(ValueError, match="sam must not be given"):
        plain()[0](image, text, sam)
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run"):
        plain(impl="cpu")[0].double()(image.double(), text.double())


def test_bad_labels_are_named():
    module, arguments = plain()
    filtered = module.filtered(*arguments)
    labels = torch.zeros(2, 24, 36, dtype=torch.long)
    for wrong in (labels[:1], labels[0]):
        with pytest.raises(ValueError, match=r"labels must be \[B, H, W\] with B = 2"):
            module.loss(filtered, wrong)
    for wrong in (labels.float(), labels.bool()):
        with pytest.raises(TypeError, match=r"labels must be a tensor of integers, got torch\.(float32|bool)"):
            module.loss(filtered, wrong)
    with pytest.raises(IndexError, match="labels must be at least 0, or ignore_index = 255, got -1"):
        module.loss(filtered, labels - 1)
    with pytest.raises(ValueError, match=r"filtered.cost must be \[B, k, h, w\]"):
        module.loss(FilteredCost(filtered.cost[:, :, None], *filtered[1:]), labels)
