"""ms-swift, through its own `sft_main`; `settings` are its arguments by their names.

Its Qwen2-VL template knows the image token by the id that it has in the published vocabulary (`template/templates/qwen.py`).
With any other it finds no place for a picture, says nothing, and trains on half the tokens; so it is told the id here.
"""

from __future__ import annotations

import json
from pathlib import Path

from probe import Probe, read_job
from swift import SftArguments, sft_main
from swift.template.templates.qwen import Qwen2VLTemplate
from transformers import AutoConfig

job = read_job()
Qwen2VLTemplate.image_token_id = AutoConfig.from_pretrained(job.checkpoint).image_token_id
lines = [json.loads(line) for line in Path(job.rows).read_text(encoding="utf-8").splitlines()]
rows = Path(job.work) / "rows.jsonl"  # it takes the pictures' paths from the working directory
with rows.open("w", encoding="utf-8") as file:
    for line in lines:
        images = [str(Path(job.rows).parent / image) for image in line["images"]]
        file.write(json.dumps({**line, "images": images}) + "\n")
train = job.train_arguments()
train["report_to"] = ["none"]
arguments = SftArguments(
    **{
        "model": job.checkpoint,
        "model_type": "qwen2_vl",
        "template": "qwen2_vl",
        "dataset": [str(rows)],
        "split_dataset_ratio": 0.0,
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "torch_dtype": "bfloat16",
        "tuner_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "loss_scale": "all" if job.labels == "all" else "default",
        "attn_impl": "sdpa",
        "gradient_checkpointing": False,
        "add_version": False,
        "warmup_ratio": 0.0,
        **train,
        **job.settings,
    }
)
probe = Probe(job)
probe.start()
sft_main(arguments)
