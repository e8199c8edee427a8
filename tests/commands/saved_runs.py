"""Runs in folders, of models that nobody trained."""

from __future__ import annotations

from pathlib import Path

from fastcss.models.continual_plan import Plan
from fastcss.models.decouplecss import DecoupleCSS
from fastcss.models.decouplecss_folder import save_base, save_task

SIDES = {"shortest": 64, "longest": 96}
PLAN = Plan("digits", "2-2", train_scenes=1, test_scenes=1, **SIDES)


def save_run(model: DecoupleCSS, folder: Path, plan: Plan | None = None) -> Path:
    save_base(model, folder, training=plan and plan.to_json())
    for t in range(len(model.tasks)):
        save_task(model, t, folder)
    return folder
