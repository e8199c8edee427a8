"""Faults in the C++ kernels, the Triton kernels and the CUDA kernels."""

from __future__ import annotations

from .fault import Fault

#: Each of these costs the compilation of one object.
CPU = [
    Fault(
        "cpu-nan-is-the-lowest-score",
        "csrc/cpu/partial_select.cpp",
        "if (x != x) return 0xffffffff;",
        "if (x != x) return 0;",
        "tests/ops/test_top_classes.py -k cpu",
    ),
    Fault(
        "cpu-slope-of-softmax-without-its-mean",
        "csrc/cpu/phrase_pool.cpp",
        "own.weight[m] * (slope[m] - mean)",
        "own.weight[m] * slope[m]",
        "tests/ops/test_phrase_pool.py -k cpu",
    ),
    Fault(
        "cpu-last-class-is-left-out",
        "csrc/cpu/top_margin.cpp",
        "for (; c < C; ++c)",
        "for (; c < C - 1; ++c)",
        "tests/ops/test_top_margin.py -k cpu",
    ),
    Fault(
        "cpu-corner-beyond-the-last-column",
        "csrc/cpu/deformable_points.cpp",
        "right = x + 1 < level.width",
        "right = x + 1 <= level.width",
        "tests/ops/test_deformable_attention.py -k cpu",
    ),
    Fault(
        "cpu-shifted-windows-mask-one-column-less",
        "csrc/cpu/windows.cpp",
        "token % window >= window - shift",
        "token % window > window - shift",
        "tests/ops/test_window_attention.py -k cpu",
    ),
    Fault(
        "cpu-weights-of-before-keep-their-size",
        "csrc/cpu/relative_tiles.cpp",
        "load<V>(out + d * kCols + v * kWide) * factor[v]",
        "load<V>(out + d * kCols + v * kWide)",
        "tests/ops/test_relative_attention.py -k 'cpu and grow'",
    ),
    Fault(
        "cpu-a-zero-times-nan-of-another-query",
        "csrc/cpu/relative_attention_backward.cpp",
        "if (!table.finite || !is_finite(p.rows, kCols * width_))",
        "if (false)",
        "tests/ops/test_relative_attention.py -k 'cpu and finite'",
    ),
    Fault(
        "cpu-a-block-partly-above-counts-as-whole",
        "csrc/cpu/merge_masks.cpp",
        "(count == std::min<int64_t>(kLanes, w_ - x * kLanes) ? kAll : 0)",
        "(count > 0 ? kAll : 0)",
        "tests/ops/test_merge_masks.py -k cpu",
    ),
    Fault(
        "cpu-index-may-be-one-too-large",
        "csrc/cpu/multi_lora.cpp",
        "t >= -1 && t < count,",
        "t >= -1 && t <= count,",
        "tests/ops/test_multi_lora_inputs.py -k out_of_range",
    ),
    Fault(
        "cpu-gradient-of-queries-for-that-of-keys",
        "csrc/cpu/affinity_loss.cpp",
        "counted.scatter(dk_rows.data(), image(dk",
        "counted.scatter(dq_rows.data(), image(dk",
        "tests/ops/test_affinity_loss.py -k cpu",
    ),
    Fault(
        "cpu-text-gradient-of-the-last-image-only",
        "csrc/cpu/cost_filter_backward.cpp",
        "add_scaled(total + row_of(r) * D, 1.f, row, D);",
        "std::copy_n(row, D, total + row_of(r) * D);",
        "tests/ops/test_cost_filter.py -k cpu",
    ),
    Fault(
        "cpu-fingerprint-leaves-out-the-last-bytes",
        "csrc/cpu/fingerprint.cpp",
        "if (bytes % kBlock != 0) {",
        "if (bytes % kBlock > 8) {",
        "tests/ops/test_fingerprint.py",
    ),
    Fault(
        "cpu-gelu-of-what-is-below-zero",
        "csrc/cpu/mlp.cpp",
        "v < 0.f ? below : 1.f - below",
        "1.f - below",
        "tests/fuse/test_fused_mlp.py",
    ),
]

TRITON = [
    Fault(
        "triton-zeros-of-two-signs-are-no-tie",
        "kernels/top_classes.py",
        "tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)",
        "x.to(tl.int32, bitcast=True)",
        "tests/ops/test_top_classes.py -k triton",
    ),
    Fault(
        "triton-a-slope-along-a-row-is-added",
        "kernels/phrase_pool_backward.py",
        "return (products - unit * along[:, None])",
        "return (products + unit * along[:, None])",
        "tests/ops/test_phrase_pool.py -k triton",
    ),
    Fault(
        "triton-sign-in-the-slope-of-the-curvature",
        "kernels/top_margin.py",
        "dk * (1.0 + 2.0 * difference)",
        "dk * (1.0 - 2.0 * difference)",
        "tests/ops/test_top_margin.py -k triton",
    ),
    Fault(
        "triton-of-equal-cosines-the-upper-class-wins",
        "kernels/select_tokens.py",
        "better = value > highest",
        "better = value >= highest",
        "tests/ops/test_select_tokens.py -k triton",
    ),
    Fault(
        "triton-tokens-beyond-the-first-512-blocks",
        "kernels/select_tokens.py",
        "        before += tl.sum(counts, 0)\n",
        "",
        "tests/ops/test_select_tokens.py -k triton",
    ),
    Fault(
        "triton-corner-beyond-the-last-column",
        "kernels/deformable_attention.py",
        "(column < width)",
        "(column <= width)",
        "tests/ops/test_deformable_attention.py -k triton",
    ),
    Fault(
        "triton-rows-beyond-the-last-in-a-gradient",
        "kernels/multi_lora_backward.py",
        "min(first + CHUNK, M)",
        "first + CHUNK",
        "tests/ops/test_multi_lora.py -k triton",
    ),
    Fault(
        "triton-classes-that-are-not-there-have-logits",
        "kernels/topk_queries.py",
        'largest(tl.where((classes < C)[None, :], acc, float("-inf")), 1)',
        "largest(acc, 1)",
        "tests/ops/test_topk_queries.py -k triton",
    ),
    Fault(
        "triton-no-relu-in-the-backward-pass",
        "kernels/prompt_mlp_backward.py",
        "dh, gate=hidden)",
        "dh)",
        "tests/ops/test_prompt_mlp.py -k triton",
    ),
    Fault(
        "triton-a-crop-of-the-same-height-is-no-crop",
        "kernels/merge_masks.py",
        "SAME_SIZE=(height, width) == (crop_height, crop_width)",
        "SAME_SIZE=height == crop_height",
        "tests/ops/test_merge_masks.py -k triton",
    ),
    Fault(
        "triton-ignored-rows-have-a-gradient",
        "kernels/affinity_loss.py",
        "acc = tl.where((x_labels != ignore_index)[:, None], acc, 0.0)",
        "acc = acc * 1.0",
        "tests/ops/test_affinity_loss.py -k triton",
    ),
    Fault(
        "triton-sums-over-columns-of-the-last-tile-alone",
        "kernels/relative_attention_backward.py",
        "mask=numbers < tl.where(column > 0, Sh, 0)",
        "mask=numbers < 0",
        "tests/ops/test_relative_attention.py -k triton",
    ),
    Fault(
        "triton-a-row-of-a-table-meets-queries-that-are-not-its-own",
        "kernels/relative_attention_tables.py",
        "rows = line % size + size - 1 - tl.minimum(keys, size - 1)",
        "rows = size + size - 2 - tl.minimum(keys, size - 1)",
        "tests/ops/test_relative_attention.py -k triton",
    ),
    Fault(
        "triton-masks-of-windows-in-the-last-row-alone",
        "kernels/window_attention_device.py",
        " | (window[2] + WINDOW > sizes[3] * WINDOW)",
        "",
        "tests/ops/test_window_attention.py -k triton",
    ),
    Fault(
        "triton-splits-with-nothing-to-read-are-read",
        "kernels/bi_attention_device.py",
        "mask = (weight != 0)[:, None] &",
        "mask = (weight == weight)[:, None] &",
        "tests/ops/test_bi_attention.py -k triton",
    ),
    Fault(
        "triton-text-gradient-of-the-first-image-only",
        "kernels/cost_filter_backward.py",
        "for image in range(batch * images, batch * images + images):",
        "for image in range(batch * images, batch * images + 1):",
        "tests/ops/test_cost_filter.py -k triton",
    ),
    Fault(
        "triton-a-tile-measured-for-true-serves-for-1",
        "kernels/tuned.py",
        "isinstance(size, int) and not isinstance(size, bool)",
        "isinstance(size, int)",
        "tests/kernels/test_tuned.py",
    ),
]

CUDA = [
    Fault(
        "cuda-the-lower-half-of-ties-is-turned-round",
        "csrc/cuda/top_classes.cuh",
        "static_cast<unsigned>(~index);",
        "static_cast<unsigned>(index);",
        "tests/native/test_cuda_values.py -k top_classes",
    ),
    Fault(
        "cuda-tokens-of-a-warp-before-are-not-counted",
        "csrc/cuda/select_tokens_scan.cuh",
        "if (w < warp) found.before",
        "if (w + 1 < warp) found.before",
        "tests/native/test_cuda_values.py -k select",
    ),
]
