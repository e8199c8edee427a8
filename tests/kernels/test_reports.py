"""The kept reports are those of the kernels that are here, and no test replaces them."""

from __future__ import annotations

import json

from compile_only import FAMILIES
from reports import FOLDER, ROOT, Reports, digest


def test_made_anew_for_other_sources_and_another_compiler(tmp_path):
    kept, made = tmp_path / "kept", tmp_path / "made"
    kept.mkdir(), made.mkdir()
    source, count = tmp_path / "kernel.cu", []

    def rows(reports: Reports, compiler: str) -> list[dict]:
        return reports.rows("name", [source], compiler, lambda: count.append(compiler) or [{"registers": len(count)}])

    source.write_text("a")
    assert rows(Reports(kept, kept), "old") == rows(Reports(kept, made), "old") == [{"registers": 1}]
    assert rows(Reports(kept, made), "new") == rows(Reports(kept, made), "new") == [{"registers": 2}]
    source.write_text("b")
    assert rows(Reports(kept, made), "new") == [{"registers": 3}]
    assert count == ["old", "new", "new"]
    assert json.loads((kept / "name.json").read_text())["rows"] == [{"registers": 1}]
    assert rows(Reports(kept, kept), "new") == [{"registers": 4}]
    assert json.loads((kept / "name.json").read_text())["rows"] == [{"registers": 4}]


def test_prose_is_nothing_to_the_compiler(tmp_path):
    path, seen = tmp_path / "kernel.py", {}
    texts = ['"""One."""\nx = "a"  # why\n', '"""Two."""\n# of it\nx = "a"\n', 'x = "b"\n', "if x:\n    x = 1\nx = 2\n"]
    for text in [*texts, "if x:\n    x = 1\n    x = 2\n"]:
        path.write_text(text)
        seen.setdefault(digest([path]), []).append(text)
    assert [len(alike) for alike in seen.values()] == [2, 1, 1, 1]


def test_comments_are_nothing_to_nvcc(tmp_path):
    path, seen = tmp_path / "kernel.cuh", {}
    alike = ['f("//");  // why\n', '// Says\n// why.\nf("//");\n', 'f("//"); /* why\n */\n']
    others = ['f("/");  // why\n', 'f("//"); }\n', "f('//');\n", '// f("//");\n']
    for text in alike + others:
        path.write_text(text)
        seen.setdefault(digest([path]), []).append(text)
    assert list(seen.values()) == [alike, *([other] for other in others)]


def test_there_is_none_of_what_is_gone():
    cuda = {f"cuda_{path.stem}" for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert {path.stem for path in FOLDER.glob("*.json")} <= {*FAMILIES, *cuda}
