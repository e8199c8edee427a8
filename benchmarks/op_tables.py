"""Makes the tables of ops: each line tells of one case what fastcss takes and how many times as long its peers do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .cases import OURS
from .table_cells import NONE, Point, finer, ratio, table


def multi_lora(rows: Sequence[dict]) -> str:
    columns = {
        "PEFT loop": "peft-loop",
        "`baddbmm`": "baddbmm",
        "best torch composition": "torch-best",
        "`torch.compile` of it": "compiled",
        "packed by oneDNN": "onednn-packed",
        "merged weights": "merged",
    }
    lines = []
    for kind in ("shared", "diverged"):
        for mode, words in (("fwd", "forward"), ("bwd", "forward and backward")):
            point = Point(rows, f"multi_lora/{kind}-m1024-k768-n768-t6-r32", mode)
            ratios = [finer(point.times(name)) for name in columns.values()]
            lines.append([f"{kind}, {words}", point.limit(), *ratios])
    return table(["mode", "of the limit", *columns], lines)


BACKWARD = "… forward and backward"
#: Each line has a label, a case, and a mode unless that is fwd.
Lines = Sequence[tuple[str, str] | tuple[str, str, str]]
Cell = Callable[[Point], str]
LIMIT: dict[str, Cell] = {"of the limit": Point.limit}
TIME = {"ms": Point.ms} | LIMIT


def _ops(rows: Sequence[dict], lines: Lines, columns: dict[str, Cell], head: str = "op") -> str:
    cells = [[label, *(cell(Point(rows, *which)) for cell in columns.values())] for label, *which in lines]
    return table([head, *columns], cells)


def _times(*providers: str) -> Cell:
    return lambda point: ratio(point.times(*providers))


def _peaks(*providers: str) -> Cell:
    return lambda point: f"{point.peak(OURS)}, {point.peak(*providers)}"


def _caa(rows: Sequence[dict], what: str, *mode: str) -> tuple[str, ...]:
    """Make the line of the head; older rows have it only with OCR's bottleneck, and then the line says so."""
    if any(row["case"] == "caa/head-64x64" for row in rows):
        return f"CAA head, {what}", "caa/head-64x64", *mode
    return f"CAA head with OCR's bottleneck, {what}", "caa/ocr-head-64x64", *mode


def affinity(rows: Sequence[dict]) -> str:
    columns = TIME | {
        "literal equations": _times("literal"),
        "whole map, rearranged or compiled": _times("reassociated", "one-product", "compiled"),
        "best row-chunked form": _times("chunked", "chunked-compiled", "composed"),
        "peak MiB: ours, literal": _peaks("literal"),
    }
    lines = [
        ("`class_affinity`, 150 classes, forward", "class_affinity/n4096-k64-d512-c150"),
        (BACKWARD, "class_affinity/n4096-k64-d512-c150", "bwd"),
        ("… forward, bfloat16", "class_affinity/n4096-k64-d512-c150-bf16"),
        ("`class_affinity`, 21 classes, forward", "class_affinity/n4096-k64-d512-c21"),
        (BACKWARD, "class_affinity/n4096-k64-d512-c21", "bwd"),
        ("`affinity_attention`, forward", "affinity_attention/n4096-k64-d512"),
        (BACKWARD, "affinity_attention/n4096-k64-d512", "bwd"),
        ("`affinity_loss`, forward", "affinity_loss/n4096-k64"),
        (BACKWARD, "affinity_loss/n4096-k64", "bwd"),
        _caa(rows, "inference"),
        _caa(rows, "training step", "bwd"),
    ]
    return _ops(rows, lines, columns)


#: Every case has one of these providers.
LITERAL = ("literal", "eager", "index_select", "topk", "peft-loop")
#: Readers know these providers by another name.
NAMED = {"index_select": " (`index_select`, `bmm`)", "topk": " (`torch.topk`)", "peft-loop": " (PEFT loop)"}


def _literal(point: Point) -> str:
    name = next(name for name in LITERAL if name in point.rows)
    return ratio(point.times(name)) + NAMED.get(name, "")


def _best_other(point: Point) -> str:
    name = point.fastest_besides(*LITERAL, "sort")
    return f"{ratio(point.times(name))} ({name})" if name else NONE


BESIDE_LITERAL = LIMIT | {
    "literal": _literal,
    "best other": _best_other,
    "peak MiB: ours, literal": _peaks(*LITERAL),
}


def selection(rows: Sequence[dict]) -> str:
    lines = [
        ("`cost_filter`, 5 images of 24×24, 847 classes, D=512, k=32", "cost_filter/t847-p1"),
        (BACKWARD, "cost_filter/t847-p1", "bwd"),
        ("`cost_filter`, one image, 150 classes of 80 prompts", "cost_filter/t150-p80"),
        (BACKWARD, "cost_filter/t150-p80", "bwd"),
        ("`top_classes`, 64 rows of 16,384, k=32", "cost_filter/topk-64x16384-k32"),
        ("… k=512", "cost_filter/topk-64x16384-k512"),
        ("`phrase_pool`, 20 classes of 31 phrases", "phrase_pool/c20-m31"),
        (BACKWARD, "phrase_pool/c20-m31", "bwd"),
        ("`select_tokens`, 17,821 tokens, 20 classes", "select_tokens/n17821-c20"),
        (BACKWARD, "select_tokens/n17821-c20", "bwd"),
        ("`prompt_mlp`, 20 of 150 classes, 512→1024→1536", "prompt_mlp/20of150"),
        ("… 20 of 20, forward and backward", "prompt_mlp/20of20", "bwd"),
        ("`merge_masks`, 20 masks to 1024²", "merge_masks/k20-1024"),
        ("… 150 masks", "merge_masks/k150-1024"),
        ("… 20 masks of white noise", "merge_masks/k20-1024-noise"),
        ("`topk_queries`, 8,400 tokens, 150 classes, k=100", "topk_queries/n8400-c150"),
        ("`top_margin`, 150×512², labels", "top_margin/c150-512"),
        (BACKWARD, "top_margin/c150-512", "bwd"),
    ]
    return _ops(rows, lines, TIME | BESIDE_LITERAL)


def ops(rows: Sequence[dict]) -> str:
    """Make the table of the README."""
    lines = [
        ("`multi_lora`, M=1024, K=N=768, 6 adapters of rank 32, one input", "multi_lora/shared-m1024-k768-n768-t6-r32"),
        ("… an input an adapter", "multi_lora/diverged-m1024-k768-n768-t6-r32"),
        ("`class_affinity`, 64×64 pixels, 150 classes", "class_affinity/n4096-k64-d512-c150"),
        ("`affinity_loss`, 64×64 pixels, forward and backward", "affinity_loss/n4096-k64", "bwd"),
        _caa(rows, "training step", "bwd"),
        ("`cost_filter`, 5 images of 24×24, 847 classes, k=32", "cost_filter/t847-p1"),
        ("`select_tokens`, 17,821 tokens, 20 classes", "select_tokens/n17821-c20"),
        ("`prompt_mlp`, 20 of 150 classes", "prompt_mlp/20of150"),
        ("`merge_masks`, 20 masks to 1024²", "merge_masks/k20-1024"),
        ("`topk_queries`, 8,400 tokens, 150 classes, k=100", "topk_queries/n8400-c150"),
        ("`top_margin`, 150×512², labels", "top_margin/c150-512"),
        ("`deformable_attention`, 17,821 queries of 4 levels", "deformable_attention/n17821"),
        ("`bi_attention`, 17,821 tokens, 20 words", "bi_attention/n17821-l20"),
        ("`window_attention`, all 12 layers of Swin-T", "window_attention/swin-t-800x1066"),
        ("Grounding DINO encoder, `fuse` on against off", "fuse/grounding-dino-480x640"),
        *_measured(
            rows,
            ("`relative_attention`, SAM's map of 64×64, 12 heads", "relative_attention/global-64x64"),
            ("SAM's image encoder, ViT-B, 1024², `fuse` on against off", "fuse/sam-vit-b-1024"),
        ),
    ]
    return _ops(rows, lines, BESIDE_LITERAL)


def _measured(rows: Sequence[dict], *lines: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Leave out the lines of cases that older rows do not have."""
    return [line for line in lines if any(row["case"] == line[1] for row in rows)]


def detector(rows: Sequence[dict]) -> str:
    columns = TIME | {
        "eager": _times("eager", "literal"),
        "SDPA, or level by level": _times("sdpa", "by level"),
        "`torch.compile`": _times("compiled"),
        "ONNX Runtime": _times("onnxruntime"),
        "OpenVINO": _times("openvino"),
        "peak MiB: ours, eager": _peaks("eager", "literal"),
    }
    lines = [
        ("`deformable_attention`, 17,821 queries of 4 levels, 8 heads", "deformable_attention/n17821"),
        (BACKWARD, "deformable_attention/n17821", "bwd"),
        ("`bi_attention`, 17,821 tokens, 20 words, 4 heads of 256", "bi_attention/n17821-l20"),
        (BACKWARD, "bi_attention/n17821-l20", "bwd"),
        ("… 256 words", "bi_attention/n17821-l256"),
        (BACKWARD, "bi_attention/n17821-l256", "bwd"),
        ("`window_attention`, all 12 layers of Swin-T", "window_attention/swin-t-800x1066"),
        (BACKWARD, "window_attention/swin-t-800x1066", "bwd"),
        ("… with their projections, `fuse`", "window_attention/swin-t-800x1066-layer"),
        ("Grounding DINO encoder, `fuse`", "fuse/grounding-dino-480x640"),
    ]
    last = Point(rows, *lines[-1][1:])
    lines[-1:-1] = _measured(
        rows,
        ("`relative_attention`, SAM's map of 64×64, 12 heads of 64", "relative_attention/global-64x64"),
        (BACKWARD, "relative_attention/global-64x64", "bwd"),
        ("… in windows of 14", "relative_attention/windows-14"),
        (BACKWARD, "relative_attention/windows-14", "bwd"),
        ("SAM's image encoder, ViT-B, 1024×1024, `fuse`", "fuse/sam-vit-b-1024"),
    )
    whole, alone = ratio(last.times("eager")), ratio(last.times("eager") / last.times("attention only"))
    return (
        f"{_ops(rows, lines, columns, head='')}\n\n(Of the last line's {whole}, the attention ops alone are {alone}; "
        "the rest are the linear layers on the package's own GEMM.)"
    )


def single_rows(rows: Sequence[dict]) -> str:
    """Say by how much the best peer is faster than multi_lora for a single row, where multi_lora is not the fastest."""
    peers = ("baddbmm", "torch-best", "peft-loop", "peft-mixed", "compiled", "onednn-packed")
    names = sorted({row["case"] for row in rows if "-m1-" in row["case"]})
    ranges = []
    for mode in ("fwd", "bwd"):
        found = [Point(rows, name, mode).times(*peers) for name in names]
        ranges.append(f"{min(found):.1f} to {max(found):.1f}")
    return (
        "A single row (M=1), where reading the weights is all the work: the best unmerged peer takes "
        f"{ranges[0]} of fastcss's time forward, {ranges[1]} with backward."
    )
