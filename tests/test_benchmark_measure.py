"""Tests how the benchmarks measure time and memory: in turn, no oftener than needed, and of one call alone."""

import ctypes
import functools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")

from benchmarks import harness, limits, measure
from benchmarks.cases import Case, Problem


def test_peak_memory_counts_temporaries_and_the_result():
    mib = 2**18  # float32 values
    assert measure.peak_mib(lambda: torch.ones(mib), "cpu") == pytest.approx(1, abs=0.01)
    assert measure.peak_mib(lambda: torch.ones(3 * mib).sum(), "cpu") == pytest.approx(3, abs=0.01)
    kept = torch.ones(mib)
    assert measure.peak_mib(lambda: kept.add_(1), "cpu") == pytest.approx(0, abs=0.01)


def test_peak_memory_leaves_out_what_ends_where_an_earlier_call_had_some():
    """The profiler takes such a block for that of the earlier call, whose end it did not see."""

    def blocks(size=2**14):
        return [torch.empty(size) for _ in range(64)]

    seen = []
    measure.peak_mib(lambda: seen.extend(blocks()), "cpu")
    addresses = {block.data_ptr() for block in seen}
    del seen[::2]  # holes, between blocks that stay
    kept = blocks(2**14 - 64)
    if not any(block.data_ptr() in addresses for block in kept):
        pytest.skip("the C library gives no address again")

    def step():
        kept.clear()
        return blocks()

    assert measure.peak_mib(step, "cpu") == pytest.approx(4, abs=0.01)


@pytest.fixture
def called(monkeypatch):
    """Makes steps that note their names and take some milliseconds of a clock that only they move."""
    order, now = [], [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def step(name, ms):
        order.append(name)
        now[0] += ms / 1e3

    def steps(**milliseconds):
        return {name: functools.partial(step, name, ms) for name, ms in milliseconds.items()}

    return order, steps


def test_providers_are_timed_in_turn(called):
    order, steps = called
    samples = measure.times_ms(steps(fast=0, slow=2), "cpu", seconds=0.0)
    assert order == ["fast", "slow"] * (1 + 5)  # the first untimed
    assert [len(times) for times in samples.values()] == [5, 5]
    assert samples["slow"] == pytest.approx([2] * 5)
    assert samples["fast"] == [0] * 5


def test_rounds_go_on_until_the_time_is_over(called):
    order, steps = called
    samples = measure.times_ms(steps(one=31.25, two=31.25), "cpu", seconds=0.5)
    assert len(samples["one"]) == 16
    assert order == ["one", "two"] * (1 + 16)


def test_a_provider_that_takes_long_sits_out(called, monkeypatch):
    monkeypatch.setattr(measure, "PATIENCE_MS", 300)
    order, steps = called
    samples = measure.times_ms(steps(fast=0, slow=200, slowest=400), "cpu", seconds=0.0)
    assert order[3:] == ["fast", "slow", "slowest", "fast", "slow", "fast", "fast", "fast"]
    assert [len(times) for times in samples.values()] == [5, 2, 1]


def test_our_long_calls_have_a_spread(called, monkeypatch):
    monkeypatch.setattr(measure, "PATIENCE_MS", 100)
    _, steps = called
    samples = measure.times_ms(steps(fastcss=110, slow=110), "cpu", seconds=0.0, thrice={"fastcss"})
    assert [len(times) for times in samples.values()] == [3, 1]


def test_a_slow_moment_is_not_all_there_is_of_a_long_call(called, monkeypatch):
    monkeypatch.setattr(measure, "PATIENCE_MS", 100)
    _, steps = called
    samples = measure.times_ms(steps(met=110, steady=110), "cpu", seconds=0.0, before={"met": 20.0, "steady": 110.0})
    assert [len(times) for times in samples.values()] == [3, 1]


def test_a_warm_provider_is_timed_at_once(called):
    order, steps = called
    samples = measure.times_ms(steps(fast=0, slow=0), "cpu", seconds=0.0, before={"slow": 0.0})
    assert order == ["fast", *["fast", "slow"] * 5]
    assert [len(times) for times in samples.values()] == [5, 5]


def test_a_long_call_is_made_no_oftener_than_it_must_be(called, monkeypatch):
    """The oracle's call and a peer's are long here: once for result and memory, and once to be timed."""
    monkeypatch.setattr(limits, "measured_limits", lambda device, dtype: limits.Limits(gemm=1e9, copy=1e9))
    monkeypatch.setattr(measure, "PATIENCE_MS", 100)
    order, steps = called
    names = ("oracle", "peer", "fastcss")
    notes = steps(oracle=110, peer=110, fastcss=1)
    step = {name: lambda name=name: (notes[name](), torch.ones(2**18))[1:] for name in names}
    case = Case(
        "toy", "toy/long", {}, torch.float32, sources=(),
        build=lambda device, mode: Problem(
            {name: lambda name=name: step[name] for name in names}, step["oracle"], 1e-6, flops=1, bytes=1,
        ),
    )  # fmt: skip
    *slow, ours = harness.run(case, "fwd", "cpu", malloc="default", seconds=0.0).rows
    assert order == ["oracle", "peer", *["fastcss"] * (1 + 1 + 1), "oracle", "peer", *["fastcss"] * 5]
    for row in slow:
        assert (row["calls"], row["peak_mib"], row["error"]) == (1, pytest.approx(1.0, abs=0.01), 0)
        assert row["p20_ms"] == row["median_ms"] == row["p80_ms"] == pytest.approx(110)
    assert (ours["calls"], ours["peak_mib"]) == (5, pytest.approx(1.0, abs=0.01))


def test_freed_memory_is_given_back():
    """A process in which the C library was told to keep memory must give it back."""
    program = """
import os, torch, fastcss
from benchmarks import measure

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

assert fastcss.tune_malloc()
tensors = [torch.ones(16 << 20) for _ in range(4)]
del tensors[::2], tensors[0]
kept = resident()
measure.give_memory_back()  # that little is kept
least = kept - resident()
measure.give_memory_back(above=0)
print(least, kept - resident())
"""
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("the C library is not glibc")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=harness.ROOT)
    least, given = map(int, done.stdout.split())
    assert least < 20 < 120 < given
