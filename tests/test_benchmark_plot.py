"""Tests the pictures of the results, one per op and mode and one of memory: they must show the rows' values."""

import json

import pytest

pytest.importorskip("matplotlib")

from PIL import Image

from benchmarks import plot

MEASURED = ("median_ms", "p20_ms", "p80_ms", "peak_mib")


def row(case, provider, median, mode="fwd", shape=None, **changes):
    found = {"op": case.split("/")[0], "case": case, "mode": mode, "provider": provider, "shape": shape or {"N": 4}}
    found |= dict(zip(MEASURED, (median, 0.9 * median, 1.2 * median, 10 * median), strict=True))
    found |= {"limit_ms": 2.0, "verified": True, "dtype": "float32", "device": "cpu", "device_name": "CPU"}
    return found | {"malloc": "tuned", "torch": "2.13.0", "date": "2026-11-20"} | changes


@pytest.fixture
def write(tmp_path):
    def rows_to(file, rows):
        path = tmp_path / file
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return rows_to


def test_one_picture_an_op_and_mode_and_one_of_memory(write, tmp_path, capsys):
    rows = [row("a/one", name, ms, mode) for name, ms in (("fastcss", 4), ("peer", 9)) for mode in ("fwd", "bwd")]
    rows += [
        row("b/one", "fastcss", 4),
        row("b/one", "fastcss+graph", 3),
        row("b/one", "openvino", 5, peak_mib=None),
        row("c/one", "fastcss", 4) | dict.fromkeys(MEASURED) | {"verified": False},
    ]
    file = write("cpu.jsonl", rows)
    out = tmp_path / "pictures"
    assert plot.main([str(file), "--out", str(out)]) == 0
    names = {"cpu-a-fwd.png", "cpu-a-bwd.png", "cpu-b-fwd.png", "cpu-b-fwd-graph.png", "cpu-memory.png"}
    assert {path.name for path in out.iterdir()} == names
    assert set(capsys.readouterr().out.split()) == {str(out / name) for name in names}
    for path in out.iterdir():
        with Image.open(path) as image:
            assert image.width >= 1000
        assert path.stat().st_size < 150_000


def test_bars_show_the_values():
    cases = {
        "a/small": {"fastcss": row("a/small", "fastcss", 4.0), "peer": row("a/small", "peer", 0.5)},
        "a/large": {"fastcss": row("a/large", "fastcss", 200.0, limit_ms=100.0)},
    }
    times, shares, peaks = plot._bars(cases).axes
    names = [label.get_text() for label in times.get_yticklabels()]
    assert names == ["small  float32", "peer", "fastcss", "large  float32", "fastcss"]
    assert [text.get_text() for text in times.texts] == ["0.5 ms (0.12×)", "4 ms (1.00×)", "200 ms (1.00×)"]
    assert [bar.get_width() for bar in shares.patches] == pytest.approx([400, 50, 50])
    assert [bar.get_width() for bar in peaks.patches] == pytest.approx([5, 40, 2000])
    assert [bar.get_y() + bar.get_height() / 2 for bar in peaks.patches] == pytest.approx([1, 2, 4])


def test_many_cases_are_curves_over_the_size_with_most_values():
    cases = {}
    for form in ("shared", "diverged"):
        for rank in (8, 32):
            for size in (4096, 1, 64):
                case, shape = f"a/{form}-{size}-{rank}", {"form": form, "M": size, "r": rank, "N": 7}
                cases[case] = {"fastcss": row(case, "fastcss", size + rank, shape=shape)}
    cases["a/diverged-1-8"]["peer"] = row("a/diverged-1-8", "peer", 3.0)
    figure = plot._curves(cases)
    titles = [panel.get_title() for panel in figure.axes]
    assert titles[:4] == ["diverged r=8", "diverged r=32", "shared r=8", "shared r=32"]
    panel = figure.axes[0]
    curves = {line.get_color(): line.get_xydata().tolist() for line in panel.get_lines()}
    assert curves.pop(plot.OUR_COLOR) == [[1, 9], [64, 72], [4096, 4104]]
    assert list(curves.values()) == [[[1, 3]]]
    shares = figure.axes[4].get_lines()[-1].get_ydata()
    assert list(shares) == pytest.approx([200 / 9, 200 / 72, 200 / 4104])


def test_memory_shows_the_case_where_most_is_saved():
    small = {name: row("a/small", name, ms) for name, ms in (("fastcss", 1.0), ("peer", 2.0))}
    large = {name: row("a/large", name, ms) for name, ms in (("fastcss", 3.0), ("peer", 50.0), ("other", 4.0))}
    alone = {"fastcss": row("b/alone", "fastcss", 1.0)}
    found = plot._most_memory([{"a/small": small, "a/large": large}, {"b/alone": alone}])
    assert found == {"a/large, forward": large}
    (panel,) = plot._memory(found).axes
    assert [text.get_text() for text in panel.texts] == ["fastcss 30, peer 500"]


def test_a_title_says_what_where_and_when(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(plot.plt.Figure, "suptitle", lambda figure, text, **_: titles.append(text))
    rows = [row("a/one", "fastcss", 1.0), row("a/two", "fastcss", 1.0, date="2026-11-21")]
    plot.draw(rows, tmp_path / "cpu")
    assert titles == ["a, forward · CPU · torch 2.13.0 · 2026-11-20 to 2026-11-21"]


def test_a_wrong_file_is_named_and_nothing_is_drawn(write, tmp_path, capsys):
    good, bad = write("good.jsonl", [row("a/one", "fastcss", 1.0)]), write("bad.jsonl", [{"op": "a"}])
    with pytest.raises(SystemExit) as stopped:
        plot.main([str(good), str(bad), "--out", str(tmp_path / "pictures")])
    assert stopped.value.code == 2
    assert "bad.jsonl, line 1 is no row of a benchmark: it lacks case" in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()
