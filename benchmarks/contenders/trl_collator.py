"""TRL's own way: `messages` and `images` columns, its vision collator, at the best settings for this machine.

`labels: all` takes three lines more. TRL 1.16 masks padding alone, so that image tokens stay in the loss; Mllama's has no row
in the head, so that TRL's fused head scores a bogus target for it. `labels: answers` is TRL's `assistant_only_loss`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from model import lora_config
from probe import Probe, read_job
from rows import IMAGE_TOKENS, as_dataset, read_rows
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling


class WithoutImageTokens(DataCollatorForVisionLanguageModeling):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        output = super().torch_call(examples)
        ids = self.processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[job.family])
        output["labels"][torch.isin(output["labels"], torch.tensor(ids))] = -100
        return output


job = read_job()
probe = Probe(job)
probe.start()
dataset = as_dataset(read_rows(job.rows))
model = AutoModelForImageTextToText.from_pretrained(job.checkpoint, dtype=torch.bfloat16)
processor = AutoProcessor.from_pretrained(job.checkpoint)
only_answers = job.labels == "answers"
multiple = job.settings.get("pad_to_multiple_of")
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        **{
            **job.train_arguments(),
            "gradient_checkpointing": False,
            "max_length": None,
            "train_sampling_strategy": "sequential",
            "assistant_only_loss": only_answers,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "remove_unused_columns": False,
            **job.settings,
        }
    ),
    train_dataset=dataset,
    data_collator=None if only_answers else WithoutImageTokens(processor, pad_to_multiple_of=multiple),
    peft_config=lora_config(),
    processing_class=processor,
)
trainer.train()
