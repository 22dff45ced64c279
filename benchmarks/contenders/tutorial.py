"""The tutorial's script on today's TRL: https://www.philschmid.de/fine-tune-multimodal-llms-with-trl

Its collator and its SFTConfig; changed is only what today's versions demand and what all contenders share (no quantisation,
LoRA without dropout on the language model, batch, order of the rows, CPU).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from model import lora_config
from probe import Probe, read_job
from qwen_vl_utils import process_vision_info
from rows import IMAGE_TOKENS, as_dataset, read_rows, with_pictures
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

job = read_job()
probe = Probe(job)
probe.start()
dataset = as_dataset([with_pictures(row) for row in read_rows(job.rows)])
model = AutoModelForImageTextToText.from_pretrained(job.checkpoint, dtype=torch.bfloat16)
processor = AutoProcessor.from_pretrained(job.checkpoint)

args = SFTConfig(
    **{
        **job.train_arguments(),
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataset_text_field": "",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "train_sampling_strategy": "sequential",
        **job.settings,
    }
)
args.remove_unused_columns = False


def collate_fn(examples: list[dict[str, Any]]) -> Any:
    texts = [processor.apply_chat_template(example["messages"], tokenize=False) for example in examples]
    if job.family == "qwen2_vl":
        image_inputs = [process_vision_info(example["messages"])[0] for example in examples]
    else:  # it resizes to multiples of 28 pixels
        parts = [[part for message in example["messages"] for part in message["content"]] for example in examples]
        image_inputs = [[part["image"] for part in row if part["type"] == "image"] for row in parts]
    batch = processor(text=texts, images=image_inputs, return_tensors="pt", padding=True)
    labels = batch["input_ids"].clone()
    labels[labels == processor.tokenizer.pad_token_id] = -100
    for image_token in IMAGE_TOKENS[job.family]:
        labels[labels == processor.tokenizer.convert_tokens_to_ids(image_token)] = -100
    batch["labels"] = labels
    return batch


trainer = SFTTrainer(
    model=model,
    args=args,
    train_dataset=dataset,
    data_collator=collate_fn,
    peft_config=lora_config(),
    processing_class=processor.tokenizer,
)
trainer.train()
