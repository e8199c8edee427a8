"""Faults in modules, models, data sets, commands and benchmarks."""

from __future__ import annotations

from .fault import Fault

NN = [
    Fault(
        "nn-labels-are-sampled-by-the-other-axis",
        "fastcss/nn/caa.py",
        "zip(output.logits.shape[2:], labels.shape[1:], strict=True)\n        )\n        small",
        "zip(output.logits.shape[2:], labels.shape[:0:-1], strict=True)\n        )\n        small",
        "tests/nn/test_caa.py",
    ),
    Fault(
        "nn-no-pixel-that-counts-is-nan",
        "fastcss/nn/lsmseg.py",
        "(counted.sum() * logits.shape[1]).clamp(min=1)",
        "(counted.sum() * logits.shape[1])",
        "tests/nn/test_lsmseg.py",
    ),
    Fault(
        "nn-both-blocks-are-shifted",
        "fastcss/nn/cost_refinement.py",
        "for shifted in (False, True)",
        "for shifted in (True, True)",
        "tests/nn/test_lsmseg.py",
    ),
]

MODELS = [
    Fault(
        "models-ignored-pixels-are-in-the-dice-loss",
        "fastcss/models/decouplecss_loss.py",
        "(_wide(logits).sigmoid() * valid)",
        "(_wide(logits).sigmoid())",
        "tests/models/test_decouplecss_loss.py",
    ),
    Fault(
        "models-thresholds-separate-equal-scores",
        "fastcss/models/decouplecss_calibration.py",
        "(score <= below) | (score <= 0)",
        "(score <= 0)",
        "tests/models/test_decouplecss_calibration.py",
    ),
    Fault(
        "models-packed-generators-are-stale",
        "fastcss/models/all_tasks.py",
        "        self._stale = True",
        "        self._stale = False",
        "tests/models/test_decouplecss_state.py",
    ),
    Fault(
        "models-a-new-task-begins-from-nothing",
        "fastcss/models/continual.py",
        'if self.plan.method == "naive" and t > 0:',
        'if self.plan.method == "naive" and t > 1:',
        "tests/models/test_continual.py",
    ),
    Fault(
        "models-the-picture-is-cut-and-not-rounded",
        "fastcss/models/preprocessing.py",
        "int(side * scale + 0.5)",
        "int(side * scale)",
        "tests/models/test_preprocessing.py",
    ),
    Fault(
        "models-labels-under-the-corner-of-a-pixel",
        "fastcss/models/task_pictures.py",
        "dtype=torch.float64) + 0.5)",
        "dtype=torch.float64) + 0.0)",
        "tests/models/test_task_pictures.py",
    ),
]

DATA = [
    Fault(
        "data-forgetting-leaves-out-the-first-task",
        "fastcss/data/metrics.py",
        "for k in range(count - 1)),  # eq. 12",
        "for k in range(1, count)),  # eq. 12",
        "tests/data/test_continual_metrics.py",
    ),
    Fault(
        "data-old-classes-are-shown-to-a-new-task",
        "fastcss/data/protocol.py",
        "self._becomes[kept] = kept",
        "self._becomes[: int(kept[:-1].max()) + 1] = torch.arange(int(kept[:-1].max()) + 1)\n"
        "        self._becomes[kept] = kept",
        "tests/data/test_protocol.py",
    ),
    Fault(
        "data-what-is-shown-is-kept-after-a-change",
        "fastcss/data/_labelled.py",
        'if kept["stamp"] == stamp and',
        "if",
        "tests/data/test_index_of_classes.py tests/data/test_ade.py",
    ),
]

COMMANDS = [
    Fault(
        "commands-a-picture-is-overwritten",
        "fastcss/commands/segment.py",
        "if path.resolve() in inputs:",
        "if path in inputs:",
        "tests/commands/test_segment_refusals.py",
    ),
    Fault(
        "commands-colours-of-the-legend-are-one-off",
        "fastcss/commands/_overlay.py",
        "palette()[shown[i].index % 255 + 1]",
        "palette()[shown[i].index % 255]",
        "tests/test_overlay.py",
    ),
    Fault(
        "commands-the-labels-of-tasks-not-learned",
        "fastcss/commands/evaluate.py",
        "learned = [0, *(label for labels in tasks for label in labels)]",
        "learned = [*(label for labels in tasks for label in labels)]",
        "tests/commands/test_evaluate.py",
    ),
]

BENCHMARKS = [
    Fault(
        "benchmarks-wrong-cases-of-a-kernel-do-not-count",
        "benchmarks/choose_on_gpu.py",
        'row["median_ms"] if row["verified"] else math.inf',
        'row["median_ms"]',
        "tests/test_benchmark_choose_on_gpu.py",
    ),
    Fault(
        "benchmarks-noise-of-the-old-file-alone",
        "benchmarks/compare.py",
        "for rows in (new, old)\n",
        "for rows in (old, old)\n",
        "tests/test_benchmark_compare.py",
    ),
    Fault(
        "benchmarks-older-rows-stay-beside-newer-ones",
        "benchmarks/report.py",
        'POINT = ("case", "mode", "dtype", *MACHINE)',
        'POINT = ("case", "mode", "dtype", "provider", *MACHINE)',
        "tests/test_benchmarks.py tests/test_benchmark_compare.py",
    ),
]
