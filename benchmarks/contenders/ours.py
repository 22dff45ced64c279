"""vlmtune: one recipe, `finetune`."""

from __future__ import annotations

from probe import Probe, read_job

import vlmtune.training
from vlmtune.recipe import Recipe

# what a recipe may set for speed; a version that does not know a key yet goes without
SPEED = {"packing": "auto", "vision_cache": "memory"}

job = read_job()
recipe = {
    "model": {"name": job.checkpoint, "quantization": "none"},
    "data": {"source": job.rows, "check_images": False},  # no other contender decodes every picture first
    "lora": {"r": 8, "alpha": 16, "dropout": 0.0, "targets": ["q_proj", "v_proj"]},
    "train_on_inputs": job.labels == "all",
    **{key: value for key, value in SPEED.items() if key in Recipe.model_fields},
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
