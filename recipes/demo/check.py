"""Measure what the demo promises without vlmtune: plain transformers, peft and bitsandbytes on the shipped files.

python recipes/demo/check.py                     # tunes on train.jsonl, reports on test.jsonl
python recipes/demo/check.py --eval valid        # for choosing settings
"""

import json
import random
import time
from pathlib import Path

import torch
import typer
from peft import LoraConfig, get_peft_model
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

HERE = Path(__file__).parent
PROMPT = "Create a short product description for the shop.\nCategory: {title}"
PADDED = {"padding": True, "return_tensors": "pt"}
SKIP = [r".*(visual|vision_model|vision_tower|multi_modal_projector)", "lm_head"]
PROJECTIONS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def table(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").open()]


def picture(row: dict, blank: bool = False) -> Image.Image:
    return Image.new("RGB", (96, 96), "white") if blank else Image.open(HERE / row["image"])


def messages(row: dict, blank: bool = False, answer: bool = False) -> list[dict]:
    parts = [{"type": "image", "image": picture(row, blank)}, {"type": "text", "text": PROMPT.format(**row)}]
    reply = {"role": "assistant", "content": [{"type": "text", "text": row["description"]}]}
    return [{"role": "user", "content": parts}] + [reply] * answer


def answers(model, processor, rows: list[dict], blank: bool = False, max_new_tokens: int = 32) -> list[str]:
    processor.tokenizer.padding_side = "left"
    found = []
    for start in range(0, len(rows), 36):
        chats = [messages(row, blank) for row in rows[start : start + 36]]
        inputs = processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, processor_kwargs=PADDED, add_generation_prompt=True
        ).to(dtype=model.dtype)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        found += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def exact(found: list[str], rows: list[dict]) -> float:
    return sum(text == row["description"] for text, row in zip(found, rows, strict=True)) / len(rows)


def batch(processor, rows: list[dict], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A padded batch whose labels are the answer and its stop token."""
    processor.tokenizer.padding_side = "right"
    chats = [messages(row, answer=True) for row in rows]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, processor_kwargs=PADDED)
    labels = inputs["input_ids"].clone()
    newline, start = processor.tokenizer.convert_tokens_to_ids(["Ċ", "<|im_start|>"])
    for ids, label, mask in zip(inputs["input_ids"], labels, inputs["attention_mask"], strict=True):
        begin = (ids == start).nonzero()[-1].item()
        begin += (ids[begin:] == newline).nonzero()[0].item() + 1  # past "<|im_start|>assistant\n"
        label[:begin] = -100
        label[mask.sum() - 1 :] = -100  # the newline after <|im_end|>, and the padding
    return {**inputs.to(dtype=dtype), "labels": labels}


def load(folder: Path, dtype: torch.dtype, quantize: bool = True):
    how = {"quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=SKIP,
    )} if quantize else {}  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **how)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' inference-only layout breaks training
            module.support_avx512bf16_for_cpu = False
    return model


def main(
    folder: Path = HERE / "base", eval: str = "test",
    steps: int = 120, size: int = 16, rate: float = 5e-3, r: int = 16, alpha: int = 32,
    dtype: str = "float32", seed: int = 0, threads: int = 1, show: int = 8, base: bool = True,
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    random.seed(seed)
    kind = getattr(torch, dtype)
    began = time.time()
    processor = AutoProcessor.from_pretrained(folder)
    model, rows, held_out = load(folder, kind), table("train"), table(eval)
    print(f"loaded {time.time() - began:.0f} s")
    if base:
        found = answers(model, processor, held_out)
        print(f"base {exact(found, held_out):.1%}, for example {found[:4]}")
    lora = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.05, target_modules=PROJECTIONS)
    model = get_peft_model(model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    began, order = time.time(), []
    for step in (bar := tqdm(range(steps), desc="tune")):
        order = order if len(order) >= size else random.sample(rows, len(rows))
        chosen, order = order[:size], order[size:]
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 10, 1 - step / steps)
        loss = model(**batch(processor, chosen, kind), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    print(f"tuned {time.time() - began:.0f} s")
    model.eval()
    began, found = time.time(), answers(model, processor, held_out)
    print(f"tuned {exact(found, held_out):.1%} of {len(held_out)} ({time.time() - began:.0f} s)")
    for row, text in [(row, text) for row, text in zip(held_out, found, strict=True) if text != row["description"]][:show]:
        print(f"  {row['image']}: {text}")
    print(f"blank {exact(answers(model, processor, held_out, blank=True), held_out):.1%}")
    plain = load(folder, kind, quantize=False)
    model.save_pretrained("/tmp/demo-adapter")
    from peft import PeftModel

    merged = PeftModel.from_pretrained(plain, "/tmp/demo-adapter").merge_and_unload()
    print(f"merged {exact(answers(merged, processor, held_out), held_out):.1%}")


if __name__ == "__main__":
    typer.run(main)
