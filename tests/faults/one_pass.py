"""Faults in one pass, in fused modules, and in what both are built on."""

from __future__ import annotations

from .fault import Fault

ONE_PASS = [
    Fault(
        "one-pass-a-new-scale-is-not-seen",
        "fastcss/_one_pass/changes.py",
        "if any(float(scale) != before for scale, before in self._scales):",
        "if any(float(scale) == before + 1 for scale, before in self._scales):",
        "tests/one_pass/test_changes.py",
    ),
    Fault(
        "one-pass-adapters-do-not-follow-eval",
        "fastcss/_one_pass/changes.py",
        "        _follow_mode(self._adapted)\n        return not",
        "        return not",
        "tests/one_pass/test_changes.py tests/one_pass/test_training.py tests/one_pass/test_folders.py "
        "tests/one_pass/test_hooks.py",
    ),
    Fault(
        "one-pass-what-was-written-in-place-stays-shared",
        "fastcss/_one_pass/shared_work.py",
        "return entry is not None and not is_mapped(tensor) and entry[1] == version(tensor)",
        "return entry is not None and not is_mapped(tensor)",
        "tests/one_pass/test_replay.py",
    ),
    Fault(
        "one-pass-a-result-of-no-grad-serves-training",
        "fastcss/_one_pass/shared_work.py",
        "        torch.is_grad_enabled(),\n",
        "",
        "tests/one_pass/test_replay.py",
    ),
    Fault(
        "one-pass-random-numbers-are-drawn-once",
        "fastcss/_one_pass/draw_detection.py",
        "drew = watch.drew or moved",
        "drew = False",
        "tests/one_pass/test_replay.py",
    ),
    Fault(
        "one-pass-checkpoints-of-the-last-adapter",
        "fastcss/_one_pass/checkpointing.py",
        "                again = True\n",
        "",
        "tests/one_pass/test_checkpoints.py",
    ),
    Fault(
        "one-pass-plain-values-of-the-first-adapter",
        "fastcss/_one_pass/inputs_outputs.py",
        "        _check_plain(first.leaves, output.leaves)\n",
        "        pass\n",
        "tests/one_pass/test_corners.py tests/one_pass/test_replay.py tests/one_pass/test_engines.py "
        "tests/one_pass/test_surroundings.py",
    ),
    Fault(
        "one-pass-groups-of-one-task-less",
        "fastcss/_one_pass/group_size.py",
        "return -(-tasks // groups)",
        "return max(1, tasks // groups)",
        "tests/one_pass/test_engines.py -k groups",
    ),
    Fault(
        "one-pass-written-tensors-are-not-put-back",
        "fastcss/_one_pass/undo.py",
        "                    tensor.copy_(self._values[id(tensor)])",
        "                    pass",
        "tests/one_pass/test_undo.py",
    ),
    Fault(
        "one-pass-a-stale-pack-of-adapters",
        "fastcss/_one_pass/adapted_layer.py",
        "        self._packs: dict[tuple[int, ...], tuple[object, int]] = {}",
        "        self._packs: dict[tuple[int, ...], tuple[object, int]] = getattr(self, '_kept_packs', {})\n"
        "        self._kept_packs = self._packs",
        "tests/one_pass/test_changes.py tests/one_pass/test_packs.py",
    ),
    Fault(
        "one-pass-dropout-of-the-layers-mode",
        "fastcss/_one_pass/adapted_layer.py",
        "if (weights.drops or self).training else 0.0",
        "if self.training else 0.0",
        "tests/one_pass/test_training.py tests/one_pass/test_replay.py tests/one_pass/test_changes.py "
        "tests/one_pass/test_lora_configs.py tests/one_pass/test_held_state.py",
    ),
    Fault(
        "one-pass-a-route-may-be-below-minus-1",
        "fastcss/_one_pass/call_arguments.py",
        "not -1 <= route.min() <=",
        "not route.min() <=",
        "tests/one_pass/test_routes.py tests/one_pass/test_refusals.py",
    ),
    Fault(
        "one-pass-merged-adapters-are-added-twice",
        "fastcss/_one_pass/read_adapters.py",
        "        if layer.merged_adapters:\n",
        "        if not layer:\n",
        "tests/one_pass/test_refusals.py",
    ),
    Fault(
        "one-pass-rslora-is-scaled-by-its-rank",
        "fastcss/_one_pass/fit_layers.py",
        'math.sqrt(rank) if config.get("use_rslora") else rank',
        "rank",
        "tests/one_pass/test_folders.py",
    ),
    Fault(
        "one-pass-a-graph-outlives-its-weights",
        "fastcss/_one_pass/cuda_graphs.py",
        "if captured.stamp != _stamp(copy, bool(fixed)):",
        "if captured.stamp is None:",
        "tests/one_pass/test_capture.py",
    ),
    Fault(
        "one-pass-one-row-a-sample",
        "fastcss/_one_pass/samples.py",
        "rows = len(value) // size if top else 1",
        "rows = 1",
        "tests/one_pass/test_routes.py",
    ),
    Fault(
        "one-pass-a-target-is-any-end-of-a-name",
        "fastcss/_one_pass/target_modules.py",
        'name.endswith(f".{entry}")',
        "name.endswith(entry)",
        "tests/one_pass/test_target_modules.py",
    ),
    Fault(
        "one-pass-pissa-is-added-in-place-of-taken-out",
        "fastcss/_one_pass/pissa_olora.py",
        "-b.to(weights.b)",
        "b.to(weights.b)",
        "tests/one_pass/test_lora_configs.py tests/one_pass/test_folders.py",
    ),
    Fault(
        "one-pass-inputs-that-differ-are-of-the-first-tasks",
        "fastcss/_one_pass/inputs_outputs.py",
        "each={name: tensor[tasks] for",
        "each={name: tensor[: tasks.stop - tasks.start] for",
        "tests/one_pass/test_per_adapter.py tests/one_pass/test_engines.py",
    ),
    Fault(
        "fingerprint-says-nothing-of-the-dtype",
        "fastcss/_ops/fingerprint.py",
        "hash((tuple(tensor.shape), str(tensor.dtype)))",
        "hash(tuple(tensor.shape))",
        "tests/ops/test_fingerprint.py",
    ),
]

FUSE = [
    Fault(
        "fuse-padding-is-zeros-of-the-projection",
        "fastcss/_fuse/swin.py",
        'zip(("pad_key", "pad_value"), projections[1:], strict=True)',
        'zip(("pad_key", "pad_value"), projections[:2], strict=True)',
        "tests/fuse/test_fused_swin.py",
    ),
    Fault(
        "fuse-a-model-asked-for-weights-gives-none",
        "fastcss/_fuse/attention_weights.py",
        '        wanted = getattr(model.config, "output_attentions", False)',
        "        wanted = False",
        "tests/fuse",
    ),
    Fault(
        "fuse-the-mask-is-of-the-other-side",
        "fastcss/_fuse/bi_attention.py",
        "            text_attention_mask,\n            vision_attention_mask,\n            scale",
        "            text_attention_mask,\n            None,\n            scale",
        "tests/fuse/test_fused_bi_attention.py tests/fuse/test_fused_grounding_dino.py",
    ),
    Fault(
        "fuse-padding-only-where-both-sides-need-it",
        "fastcss/_fuse/sam.py",
        "if window and (height % window or width % window):",
        "if window and (height % window and width % window):",
        "tests/fuse/test_fused_sam.py",
    ),
    Fault(
        "fuse-a-hook-put-on-since-is-passed-over",
        "fastcss/_fuse/fused_module.py",
        "return any(_has_hooks(self.get_submodule(name)) for name in self.bypassed)",
        "return False",
        "tests/fuse/test_fused_sam.py tests/fuse/test_fuse_refusals.py",
    ),
    Fault(
        "fuse-an-adapter-in-the-mlp-is-left-out",
        "fastcss/_fuse/mlp.py",
        "all(isinstance(layer, Linear) and layer.made_of == (Linear, nn.Linear) for layer in layers)",
        "True",
        "tests/fuse/test_fused_mlp.py",
    ),
    Fault(
        "fuse-dropout-is-left-out-of-training",
        "fastcss/_fuse/swin.py",
        "            or (attention.training and attention.attention_dropout > 0)\n",
        "",
        "tests/fuse/test_fused_swin.py tests/fuse/test_fuse.py tests/fuse/test_fuse_refusals.py",
    ),
]
