"""``python -m benchmarks.tune [CASE…] --out tiles.jsonl``: finds the fastest tiles of the Triton kernels here.

It tries the neighbours of each tile that a case's host code chooses: one size half as large or twice, fewer or more
warps or stages. They are verified, and timed in turn as CUDA graphs of the whole op; then the neighbours of the best
one are tried in the same way. Several cases may be tuned at a time: they compile beside each other, and take turns on
the GPU. Each result is a row of the file, from which kernels/tuned_tiles.py is written anew.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from fastcss._dispatch import backends
from fastcss._files import whole_file

from . import harness, measure, registry
from .cases import Case

TABLE = harness.ROOT / "kernels" / "tuned_tiles.py"
ROUNDS = 2
#: Another tile is taken only if it gains at least this share of the time: less is noise.
GAIN = 0.03
SECONDS = 0.05  # spent on timing each candidate


class Asked(dict):
    """Is a table of tiles that notes what it was asked for, and what the host code would choose without it."""

    def __init__(self, tiles: dict[str, dict]):
        super().__init__(tiles)
        self.chosen: dict[str, dict] = {}

    def get(self, sizes: str, chosen: dict) -> dict:
        self.chosen[sizes] = chosen
        return super().get(sizes, chosen)


def neighbours(tile: dict, free: tuple[str, ...]) -> list[dict]:
    found = []
    for name in free:
        size = tile.get(name)
        if size is None:
            continue
        others = (size - 1, size + 1) if name == "num_stages" else (size // 2, size * 2)
        least = 16 if name.startswith("BLOCK") and size >= 16 else 1  # of a product of tiles
        found += [tile | {name: other} for other in others if other >= least]
    return [tile for tile in found if tile["num_warps"] <= 16]


@contextlib.contextmanager
def compiling_only() -> Iterator[None]:
    """Make Triton's launches compile their kernels and launch nothing."""
    import triton

    launch = triton.runtime.JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    with mock.patch.object(triton.runtime.JITFunction, "run", compile_instead):
        yield


@contextlib.contextmanager
def alone_on_the_gpu(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.synchronize()


class Tuner:
    """Tunes one case, in its last mode ("bwd" is forward and backward)."""

    def __init__(self, case: Case, lock: Path):
        from fastcss.kernels.tuned_tiles import TILES

        torch.manual_seed(0)
        self.case, self.mode, self.lock = case, case.modes[-1], lock
        self.problem = case.build("cuda", self.mode)
        major, minor = torch.cuda.get_device_capability()
        self.arch = 10 * major + minor
        self.table = TILES[self.arch] = Asked(TILES.get(self.arch, {}))
        with alone_on_the_gpu(lock):
            self.expected = self.problem.expected()
            self.step = self.problem.providers["triton"]()
            self.step()

    def tune(self, sizes: str) -> dict:
        """Find the best tile for these sizes, and return its row."""
        from fastcss.kernels.tuned import FREE

        chosen = self.table.chosen[sizes]
        best, first_ms, best_ms, tried = self.table.get(sizes, chosen), None, None, []
        for _ in range(ROUNDS):
            candidates = [best, *(tile for tile in neighbours(best, FREE[sizes.split()[0]]) if tile not in tried)]
            tried += candidates
            times = self.times_ms(sizes, candidates)
            first_ms, best_ms = first_ms or times[0], times[0]
            fastest = min(times, key=times.get)
            if times[fastest] > (1 - GAIN) * times[0]:
                break
            best, best_ms = candidates[fastest], times[fastest]
        self.table[sizes] = best
        row = {"arch": self.arch, "sizes": sizes, "chosen": chosen, "tile": best, "chosen_ms": first_ms}
        row |= {"ms": best_ms, "tried": len(tried), "case": self.case.name, "mode": self.mode}
        return row | {"device_name": torch.cuda.get_device_name(), "torch": torch.__version__}

    def times_ms(self, sizes: str, candidates: list[dict]) -> dict[int, float]:
        """Time those candidates that run and are right, by their number; the first one must be among them."""
        graphs = {}
        for number, tile in enumerate(candidates):
            self.table[sizes] = tile
            try:
                with compiling_only():
                    self.step()
                with alone_on_the_gpu(self.lock):
                    error = self.problem.error(self.step(), self.expected)
                    if not error <= self.problem.tolerance:
                        raise ValueError(f"its error is {error:.2g}, allowed are {self.problem.tolerance:.2g}")
                    graphs[number] = self.problem.capture("triton", self.step)
            except Exception as failure:  # more shared memory than there is, a product that no instruction does
                if number == 0:
                    raise
                print(f"{sizes}: {tile}: {type(failure).__name__}: {str(failure).splitlines()[:1]}")
        with alone_on_the_gpu(self.lock):
            samples = measure.times_ms(graphs, "cuda", SECONDS)
        return {number: statistics.median(times) for number, times in samples.items()}


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table_of(rows: list[dict]) -> dict[int, dict[str, dict]]:
    """Make the table of tiles that are better than the chosen ones.

    If several cases ask for one tile, the case that takes longest decides.
    """
    tiles: dict[int, dict[str, dict]] = {}
    for row in sorted(rows, key=lambda row: row["chosen_ms"]):
        tiles.setdefault(row["arch"], {})[row["sizes"]] = row["tile"] if row["tile"] != row["chosen"] else {}
    better = {arch: {sizes: tile for sizes, tile in sorted(tiles[arch].items()) if tile} for arch in sorted(tiles)}
    return {arch: of_arch for arch, of_arch in better.items() if of_arch}


def source_of(tiles: dict[int, dict[str, dict]]) -> str:
    """Write the source of kernels/tuned_tiles.py with these tiles."""
    head = TABLE.read_text().split("TILES")[0]
    lines = []
    for arch, of_arch in tiles.items():
        lines.append(f"    {arch}: {{")
        for sizes, tile in of_arch.items():
            lines += [f'        "{sizes}": {{', *(f'            "{k}": {v},' for k, v in tile.items()), "        },"]
        lines.append("    },")
    body = "\n".join(["{", *lines, "}"]) if lines else "{}"
    return f"{head}TILES: dict[int, dict[str, dict[str, int | None]]] = {body}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="*", help="cases whose names start so (default: none, the table is written only)")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file of rows, which the next call goes on from")
    options = parser.parse_args(arguments)
    if options.case and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device")
    lock = options.out.with_name(f".{options.out.name}.lock")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = read(options.out)
    cases = registry.select(registry.all_cases("cuda"), names=options.case) if options.case else []
    for case in cases:
        if case.op not in backends.KERNELS["triton"]:
            print(f"{case.name}: no kernel of its own")
            continue
        tuner = Tuner(case, lock)
        for sizes in list(tuner.table.chosen):
            if any((row["sizes"], row["case"]) == (sizes, case.name) for row in done):
                continue
            row = tuner.tune(sizes)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{sizes}: {row['chosen_ms']:.4f} → {row['ms']:.4f} ms with {row['tile']}", flush=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with whole_file(TABLE) as table:
            table.write(source_of(table_of(read(options.out))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
