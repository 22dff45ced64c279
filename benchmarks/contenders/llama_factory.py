"""LLaMA-Factory, through its own `run_exp`; `settings` are its arguments by their names.

Its `train_on_prompt` leaves image tokens in the loss (`data/processor/supervised.py`: labels are the prompt's ids), so that
under `labels: all` its losses are of other positions and do not compare.
"""

from __future__ import annotations

import json
from pathlib import Path

from llamafactory.train.tuner import run_exp
from probe import Probe, read_job

job = read_job()
data = Path(job.rows).parent
info = {
    "file_name": Path(job.rows).name,
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}
(data / "dataset_info.json").write_text(json.dumps({"rows": info}), encoding="utf-8")
arguments = {
    "stage": "sft",
    "do_train": True,
    "model_name_or_path": job.checkpoint,
    "dataset": "rows",
    "dataset_dir": str(data),
    "media_dir": str(data),
    "template": "qwen2_vl",
    "cutoff_len": 2048,
    "overwrite_cache": True,
    "train_on_prompt": job.labels == "all",
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "lora_target": "q_proj,v_proj",
    "flash_attn": "sdpa",
    "disable_gradient_checkpointing": True,
    "disable_shuffling": True,
    "plot_loss": False,
    **job.train_arguments(),
    **job.settings,
}
probe = Probe(job)
probe.start()
run_exp(arguments)
