"""Tests mIoU after every task, and Last-, Avg- and FF-IoU, against the equations written out."""

import json
import math
import sys

import pytest
import torch

from fastcss.data import ContinualMetrics, class_iou


def literal_iou(predicted, labels, count):
    """Compute the IoU one label at a time, by its definition."""
    counted = labels != 255
    values = []
    for label in range(count):
        a, b = (predicted == label) & counted, (labels == label) & counted
        union = (a | b).sum().item()
        values.append((a & b).sum().item() / union if union else math.nan)
    return values


def literal_equations(iou, images):
    """Compute eq. 8 to 12 from a table iou[k][t] of all k and t, with j from the first task on, as printed."""
    n = len(images)
    average = [sum(images[k] * iou[k][t] for k in range(t + 1)) / sum(images[: t + 1]) for t in range(n)]
    forgotten = [max(iou[k][j] - iou[k][n - 1] for j in range(n - 1)) for k in range(n - 1)]
    return {"last_iou": average[-1], "avg_iou": sum(average) / n, "ff_iou": sum(forgotten) / (n - 1)}


def test_iou_is_that_of_the_definition_over_all_batches():
    pytest.importorskip("torchmetrics")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (6, 17, 13), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    predicted = torch.randint(0, 6, labels.shape, generator=generator)  # 5 is predicted and never right
    metric = class_iou(7)  # 6 does not occur
    for batch in range(0, 6, 2):
        metric.update(predicted[batch : batch + 2], labels[batch : batch + 2])
    expected = literal_iou(predicted, labels, 7)
    assert expected[5] == 0
    assert math.isnan(expected[6])
    torch.testing.assert_close(metric.compute(), torch.tensor(expected), equal_nan=True)


def test_all_right_is_one_and_255_does_not_count():
    pytest.importorskip("torchmetrics")
    metric = class_iou(3)
    metric.update(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 255]]))
    torch.testing.assert_close(metric.compute(), torch.tensor([1.0, 1.0, math.nan]), equal_nan=True)


def test_any_integers_are_counted_alike():
    predicted, labels = torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0, 1, 1, 255]])
    metric = class_iou(3)
    for dtype in (torch.int64, torch.uint8, torch.int16):
        metric.update(predicted.to(dtype), labels.to(dtype))
    assert metric.compute().tolist() == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        ([255, 1], [0, 1], "predicted must be 0 to 2, got 255"),
        ([3, 1], [0, 1], "predicted must be 0 to 2, got 3"),
        ([-1, 1], [0, 1], "predicted must be 0 to 2, got -1"),
        ([0, 1], [0, 3], "labels must be 0 to 2, or 255, got 3"),
        ([0, 1], [0, -100], "labels must be 0 to 2, or 255, got -100"),
        ([0.0, 1.0], [0, 1], "predicted must be integers, got torch.float32"),
        ([0, 1], [0], r"predicted and labels must be of one shape, got \[2\] and \[1\]"),
    ],
)
def test_what_is_no_label_is_named_and_not_counted(predicted, labels, message):
    metric = class_iou(3)
    metric.update(torch.tensor([0, 255, 1]), torch.tensor([0, 255, 1]))  # an ignored pixel may be predicted as anything
    with pytest.raises(ValueError, match=f"class_iou: {message}"):
        metric.update(torch.tensor(predicted), torch.tensor(labels))
    assert metric.compute()[:2].tolist() == [1, 1]


def test_torchmetrics_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    monkeypatch.delitem(sys.modules, "fastcss.data._class_iou", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"is not installed: pip install 'fastcss\[data\]'"):
        class_iou(3)


def test_rows_have_old_new_and_all():
    metrics = ContinualMetrics([(1, 2), (3,), (4,)], images=(1, 1, 1))
    # Labels that are not learned yet do not count, whatever their values are.
    first = metrics.add([0.9, 0.8, 0.7, 0.1, math.nan])
    assert first["iou"] == [0.9, 0.8, 0.7, None, None]
    assert (first["task"], first["old"], first["new"]) == (1, None, pytest.approx(0.75))
    assert first["all"] == pytest.approx(0.8)
    second = metrics.add(torch.tensor([0.8, 0.6, 0.7, 0.3, 0.0], dtype=torch.float64))
    assert second["old"] == pytest.approx(0.7)
    assert second["new"] == 0.3
    assert second["all"] == pytest.approx(0.6)
    third = metrics.add([0.8, 0.6, 0.7, None, 0.4])  # label 3 occurs no more: out of every mean
    assert third["old"] == pytest.approx(0.7)
    assert third["all"] == pytest.approx(0.625)
    summary = metrics.summary()
    assert summary["first"] == pytest.approx(0.7)
    assert summary["later"] == pytest.approx(0.4)
    assert summary["all"] == third["all"]


def test_last_avg_and_ff_are_the_equations():
    generator = torch.Generator().manual_seed(1)
    tasks, images = [(1, 2, 3), (4, 5), (6,), (7, 8)], [50, 20, 5, 11]
    for _ in range(20):
        metrics = ContinualMetrics(tasks, images)
        table = [[0.0] * 4 for _ in tasks]  # 0 before a task is learned
        for t in range(4):
            iou = torch.rand(9, generator=generator, dtype=torch.float64)
            metrics.add(iou)
            for k in range(t + 1):
                table[k][t] = iou[list(tasks[k])].mean().item()
        expected = literal_equations(table, images)
        assert {name: metrics.summary()[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_a_forgetting_learner_in_numbers():
    metrics = ContinualMetrics([(1,), (2,), (3,)], images=(100, 50, 50))
    for iou in ([1, 0.8, 0, 0], [1, 0.6, 0.7, 0], [1, 0.2, 0.9, 0.6]):
        metrics.add(iou)
    summary = metrics.summary()
    assert summary["last_iou"] == pytest.approx((100 * 0.2 + 50 * 0.9 + 50 * 0.6) / 200)
    assert summary["avg_iou"] == pytest.approx((0.8 + (100 * 0.6 + 50 * 0.7) / 150 + 0.475) / 3)
    assert summary["ff_iou"] == pytest.approx(((0.8 - 0.2) + (0.7 - 0.9)) / 2)  # the second task gained


def test_a_single_task_forgets_nothing_that_could_be_measured():
    metrics = ContinualMetrics([(1, 2)], images=(3,))
    assert set(metrics.summary().values()) == {None}
    metrics.add([0.9, 0.5, 0.7])
    summary = metrics.summary()
    assert summary["last_iou"] == summary["avg_iou"] == pytest.approx(0.6)
    assert summary["ff_iou"] is None
    assert summary["later"] is None


def test_a_task_that_no_test_image_shows_is_left_out():
    metrics = ContinualMetrics([(1,), (2,), (3,)], images=(4, 0, 6))
    for iou in ([1, 0.5, None, None], [1, 0.5, None, None], [1, 0.4, None, 0.6]):
        metrics.add(iou)
    summary = metrics.summary()
    assert summary["last_iou"] == pytest.approx(0.4 * 0.4 + 0.6 * 0.6)
    assert summary["ff_iou"] == pytest.approx(0.1)
    nothing = ContinualMetrics([(1,)], images=(0,))
    nothing.add([0.9, None])
    assert nothing.summary()["last_iou"] is None


def test_rows_survive_json_and_resume():
    tasks, images = [(1,), (2,)], (1, 2)
    metrics = ContinualMetrics(tasks, images)
    for iou in (torch.tensor([0.7, 0.1, math.nan]), torch.tensor([0.8, 0.2, 0.3])):
        metrics.add(iou)
    resumed = ContinualMetrics(tasks, images)
    for line in [json.dumps(row, allow_nan=False) for row in metrics.rows]:
        resumed.add(json.loads(line)["iou"])
    assert resumed.rows == metrics.rows
    assert json.loads(json.dumps(resumed.summary(), allow_nan=False)) == metrics.summary()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="images must be one number for each task, got 1 for 2 tasks"):
        ContinualMetrics([(1,), (2,)], (3,))
    with pytest.raises(ValueError, match="got 0 for 0 tasks"):
        ContinualMetrics([], ())
    metrics = ContinualMetrics([(1,), (2,)], (3, 4))
    with pytest.raises(ValueError, match="iou must have one value for each of 3 labels, got 2"):
        metrics.add([0.5, 0.5])
    assert metrics.rows == []
    metrics.add([0, 0, 0])
    metrics.add([0, 0, 0])
    with pytest.raises(ValueError, match="all 2 tasks have been added"):
        metrics.add([0, 0, 0])
