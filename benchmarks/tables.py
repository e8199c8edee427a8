"""``python -m benchmarks.tables``: writes the measured parts of README.md and docs/measurements.md from two CPUs' rows.

It makes what stands between ``<!-- measured: NAME -->``, or ``<!-- measured: NAME on AVX2 -->``, and ``<!-- end -->``.
A number without a unit is a provider's median ÷ fastcss's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fastcss._files import whole_file

from . import op_tables, report
from .cases import OURS
from .table_cells import Point, finer, ratio, table

ROOT = Path(__file__).parent.parent
#: Maps a CPU's widest instructions, which are part of its name in the rows, to the stem of its file and its name on a
#: page.
CPUS = {
    "AVX512": ("amd-epyc-avx512-2-threads", "AMD EPYC (Zen 5, AVX-512)"),
    "AVX2": ("amd-epyc-avx2-2-threads", "AMD EPYC (Zen 3, AVX2)"),
}
PAGES = (ROOT / "README.md", ROOT / "docs" / "measurements.md")

# --- the parts of the pages ------------------------------------------------------------------------------------------

#: Column → provider.
ONE_PASS = {
    "PEFT loop": "peft-loop",
    "PEFT mixed batch": "peft-mixed",
    "loop over merged models": "merged",
    "`torch.vmap`, stacked adapters": "vmap",
    "`torch.vmap`, merged": "vmap-merged",
    "ONNX Runtime, merged": "onnxruntime",
    "OpenVINO, merged": "openvino",
    "`one_pass(fuse=False)`": "fastcss-unfused",
}


def stamp(rows: Sequence[dict]) -> str:
    """Say on which machine, with which torch and when the rows were measured."""
    _, instructions, threads = rows[0]["device_name"].split(", ")
    torches = {row["torch"].split("+")[0] for row in rows}
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{CPUS[instructions][1]}, {threads}, torch {'/'.join(sorted(torches))}, {when}."


def _one_pass(rows: Sequence[dict]) -> dict[str, Point]:
    """Map the adapters' sites to the case with adapters there."""
    names = {"Swin and fusion": "t6", "fusion only": "t6-fusion"}
    return {sites: Point(rows, f"one_pass/grounding-dino-480x640-{name}") for sites, name in names.items()}


def six_tasks(rows: Sequence[dict]) -> str:
    lines = [
        [sites, *(finer(point.times(name)) for name in ONE_PASS.values())] for sites, point in _one_pass(rows).items()
    ]
    return table(["adapters on", *ONE_PASS], lines)


def six_tasks_memory(rows: Sequence[dict]) -> str:
    names = {"`one_pass`": OURS} | ONE_PASS
    lines = [[sites, *(point.peak(name) for name in names.values())] for sites, point in _one_pass(rows).items()]
    return table(["adapters on", *names], lines)


def six_tasks_memory_in_words(rows: Sequence[dict]) -> str:
    both, fusion = _one_pass(rows).values()
    return (
        f"Beyond weights and inputs the pass holds {both.peak(OURS)} MiB (Swin and fusion) or {fusion.peak(OURS)} "
        f"(fusion only) at a time, PEFT's loop {both.peak('peft-loop')}."
    )


#: What PEFT's users adapt → its case.
RECIPES = {
    "ViT-B, 224², queries and values, 6 adapters": "one_pass/vit-b-qv-t6",
    "… in the last third of the layers": "one_pass/vit-b-last-third-t6",
    "SegFormer-B0, 512², queries, values and the head, 6 adapters": "one_pass/segformer-b0-heads-t6",
    "Mask2Former (Swin-T), 384², the decoder and its classes, 4 adapters": "one_pass/mask2former-t4",
}
#: The same of a batch of 64 samples over 1,000 adapters of rank 16.
THOUSAND = {
    f"{tokens} of width 768 a sample": f"multi_lora/routed-t1000-m{rows}"
    for rows, tokens in ((1, "one row"), (4, "4 rows"), (16, "16 rows"), (197, "197 rows"))
}


def recipes(rows: Sequence[dict]) -> str:
    names = ("PEFT loop", "PEFT mixed batch", "`torch.vmap`, stacked adapters", "ONNX Runtime, merged")
    return _times_of(rows, RECIPES, {name: ONE_PASS[name] for name in names}, "model, and where its adapters are")


def thousand(rows: Sequence[dict]) -> str:
    columns = {"PEFT mixed batch": "peft-mixed", "gathered adapters, `bmm`": "gathered-bmm"}
    columns["one adapter for all"] = "one-adapter"
    return _times_of(rows, THOUSAND, columns, "64 samples, 1,000 adapters of rank 16")


def pool(rows: Sequence[dict]) -> str:
    point = Point(rows, "pool/1000-adapters")
    return (
        "A pool of 1,000 adapters with room for 100, batches of 16 drawn after Zipf's law: "
        f"{finer(1 / point.times('all-in-memory'))} of the time with all of them in memory."
    )


def _times_of(rows: Sequence[dict], cases: Mapping[str, str], columns: Mapping[str, str], head: str) -> str:
    """Make a table of how often a case's providers take the time of ours."""
    points = {label: Point(rows, name) for label, name in cases.items()}
    lines = [[label, *(finer(point.times(name)) for name in columns.values())] for label, point in points.items()]
    return table([head, *columns], lines)


def decouplecss(rows: Sequence[dict]) -> str:
    full = Point(rows, "decouplecss/swin-t-vit-b-t6")
    return (
        "With Swin-T and SAM ViT-B (480×640, six tasks of three classes, random weights; `python -m "
        f"benchmarks --case decouplecss/swin-t`) a picture takes {ratio(full.times('shared'))} times as long with "
        f"adapters switched and {ratio(full.times('literal'))} times with everything once a task; the process holds "
        "5.5 GiB."
    )


PARTS: dict[str, Callable[[Sequence[dict]], str]] = {
    "stamp": stamp,
    "six tasks": six_tasks,
    "six tasks, memory": six_tasks_memory,
    "six tasks, memory in words": six_tasks_memory_in_words,
    "recipes": recipes,
    "a thousand adapters": thousand,
    "pool": pool,
    "ops": op_tables.ops,
    "multi_lora": op_tables.multi_lora,
    "affinity": op_tables.affinity,
    "selection": op_tables.selection,
    "detector": op_tables.detector,
    "decouplecss": decouplecss,
    "single rows": op_tables.single_rows,
}
MARKED = re.compile(r"<!-- measured: (.+?) -->\n.*?<!-- end -->", re.DOTALL)


def read_rows() -> dict[str, list[dict]]:
    """Read the rows of each of ``CPUS``."""
    results = ROOT / "benchmarks" / "results"
    return {instructions: report.read(results / f"{stem}.jsonl") for instructions, (stem, _) in CPUS.items()}


def filled(page: str, rows: Mapping[str, Sequence[dict]]) -> str:
    """Return ``page`` with its parts made anew from the rows of each of ``CPUS``.

    Raises:
        ValueError: there is no such part, or a row that it needs is missing.
    """

    def made(match: re.Match) -> str:
        name, _, instructions = match.group(1).partition(" on ")
        if name not in PARTS:
            raise ValueError(f"nothing is called {name!r}; there are: {', '.join(PARTS)}")
        return f"<!-- measured: {match.group(1)} -->\n{PARTS[name](rows[instructions or 'AVX512'])}\n<!-- end -->"

    return MARKED.sub(made, page)


def main() -> int:
    rows = read_rows()
    for page in PAGES:
        text = filled(page.read_text(), rows)
        if text != page.read_text():
            with whole_file(page) as file:
                file.write(text)
            print(f"{page.relative_to(ROOT)} is new")
    return 0


if __name__ == "__main__":
    sys.exit(main())
