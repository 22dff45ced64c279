"""vlmtune: one recipe, `finetune`."""

from __future__ import annotations

from probe import Probe, read_job

import vlmtune.training

PACKS = {"qwen2_vl": {"length": 2800}, "mllama": {"length": 2200}}  # about eight rows; Pixtral's rows are long by themselves

job = read_job()
recipe = {
    "model": {"name": job.checkpoint, "quantization": "none"},
    "data": {"source": job.rows, "check_images": False},  # no other contender decodes every picture first
    "lora": {"r": 8, "alpha": 16, "dropout": 0.0, "targets": ["q_proj", "v_proj"]},
    "train_on_inputs": job.labels == "all",
    "packing": PACKS.get(job.family, {}),
    "vision_cache": "memory",
    "train": {
        **job.train_arguments(),
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
    },
}
probe = Probe(job)
probe.start()
vlmtune.training.load_model = probe.call_apart("model", vlmtune.training.load_model)
vlmtune.training.finetune(recipe, overwrite=True, **job.settings)
