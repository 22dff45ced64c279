"""The graphics cards that a plan knows: what fits on them, how fast a step is and what it costs.

Memory is what `torch.cuda.mem_get_info` and an out-of-memory message call the total: less than the size on the box, less
than `nvidia-smi` shows, and by some hundred MiB a matter of the driver; where reports differ, a low one of recent drivers.
16-bit TFLOP/s are the maker's, dense and with sums in fp32, and so half of what a GeForce card is often said to reach.

How much of that the matrix products of a training reach is an assumption, nowhere fitted to a run of vlmtune: the reason
stands beside each card. Prices are a snapshot of 2026, of one card in US dollars without taxes and disks: on demand at a
cloud that rents it singly, GeForce cards in RunPod's community cloud. They change; where none was found there is none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf

from vlmtune.errors import RecipeError
from vlmtune.plan.forecast import FITS_BELOW, Speed, Verdict, Work
from vlmtune.plugins import did_you_mean

LAUNCH_SECONDS = 6e-6  # to start a kernel: a step is never faster than that for each of its kernels
SOLD_GB = (8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141)  # sizes on the box


@dataclass(frozen=True)
class Card:
    """A card, or only a size such as "24GB", of which no speed is known."""

    name: str
    visible_gib: float  # torch.cuda.mem_get_info()[1], GiB
    tflops: float | None = None  # nominal, 10¹² FLOP/s: dense tensor cores, 16-bit, sums in fp32
    gb_per_second: float | None = None  # nominal memory bandwidth, 10⁹ B/s
    matmul_efficiency: float | None = None  # share of `tflops` that matrix products of a training reach; assumed
    bandwidth_efficiency: float = 0.85  # share of `gb_per_second` that elementwise kernels reach; assumed
    bf16: bool = True  # computes in bfloat16; without, fp16 is as fast
    dollars_per_hour: float | None = None


# Each card's sources: its memory; its speeds; why this efficiency; its price.
CARDS: tuple[Card, ...] = (
    # 11.76 GiB in users' messages; 2 × 12.7 as for all GA10x, https://www.techpowerup.com/gpu-specs/geforce-rtx-3060.c3682;
    # as the 3090; none found
    Card("RTX3060", visible_gib=11.7, tflops=25.5, gb_per_second=360, matmul_efficiency=0.80),
    # 14.57 to 14.76, https://github.com/Morizeyao/GPT2-Chinese/issues/215; https://www.nvidia.com/en-us/data-center/tesla-t4/;
    # 70 W, as the L4; g4dn.xlarge, https://github.com/gpuaudit/cli (first quarter of 2026)
    Card("T4", visible_gib=14.57, tflops=65, gb_per_second=320, matmul_efficiency=0.45, bf16=False, dollars_per_hour=0.526),
    # 15.70 in users' messages on Linux; https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf;
    # as the 4090; none found
    Card("RTX4080", visible_gib=15.6, tflops=97.5, gb_per_second=717, matmul_efficiency=0.75),
    # 15.77, https://github.com/nomic-ai/gpt4all/issues/544; https://www.nvidia.com/en-us/data-center/v100/;
    # 95 of 125 measured, https://github.com/fanghostt/transformers-benchmarks; p3.2xlarge, https://github.com/gpuaudit/cli
    Card(
        "V100-16", visible_gib=15.77, tflops=125, gb_per_second=900, matmul_efficiency=0.75, bf16=False, dollars_per_hour=3.06
    ),
    # 22.03 to 22.05, https://github.com/instructlab/instructlab/issues/2666; https://www.nvidia.com/en-us/data-center/l4/;
    # 72 W do not keep the clock up; g6.xlarge, https://github.com/tsaol/aws-gpu (August 2026)
    Card("L4", visible_gib=22.03, tflops=121, gb_per_second=300, matmul_efficiency=0.45, dollars_per_hour=0.8048),
    # 22.06 to 22.30, https://github.com/huggingface/local-gemma/issues/20;
    # 70, not the A10's 125: https://www.baseten.co/blog/nvidia-a10-vs-a10g-for-ml-model-inference/; 300 W are enough for 70;
    # g5.xlarge, https://www.factualminds.com/blog/amazon-ec2-on-demand-pricing-instance-families-2026/ (June 2026)
    Card("A10G", visible_gib=22.06, tflops=70, gb_per_second=600, matmul_efficiency=0.75, dollars_per_hour=1.006),
    # 23.56 in users' messages, 24576 MiB in nvidia-smi, https://github.com/noonghunna/club-3090/issues/1127;
    # https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.1.pdf; 350 W are enough for 71;
    # https://deploybase.ai/articles/runpod-gpu-pricing (March 2026)
    Card("RTX3090", visible_gib=23.56, tflops=71, gb_per_second=936, matmul_efficiency=0.80, dollars_per_hour=0.22),
    # 23.55 to 23.65, https://github.com/huggingface/lora-fast/issues/1; Ada white paper as above; close to the 3090, at 450 W;
    # https://github.com/tgarg01/silybench-data (September 2026)
    Card("RTX4090", visible_gib=23.55, tflops=165.2, gb_per_second=1008, matmul_efficiency=0.75, dollars_per_hour=0.34),
    # 31.36 in users' messages; https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf;
    # as the 4090; https://deploybase.ai/articles/runpod-gpu-pricing (March 2026)
    Card("RTX5090", visible_gib=31.36, tflops=209.5, gb_per_second=1792, matmul_efficiency=0.75, dollars_per_hour=0.69),
    # 31.74, https://github.com/liucongg/ChatGLM-Finetuning/issues/73; as V100-16; as V100-16; none found for one
    Card("V100-32", visible_gib=31.74, tflops=125, gb_per_second=900, matmul_efficiency=0.75, bf16=False),
    # 39.50, https://github.com/TianheWu/CoSeR/issues/10; https://www.nvidia.com/en-us/data-center/a100/; 230 of 312 measured,
    # https://github.com/fanghostt/transformers-benchmarks, 271 at best, https://github.com/stas00/ml-engineering;
    # Lambda, https://github.com/tgarg01/silybench-data (September 2026)
    Card("A100-40", visible_gib=39.5, tflops=312, gb_per_second=1555, matmul_efficiency=0.70, dollars_per_hour=1.99),
    # 44.42, https://github.com/stepfun-ai/Step-Video-T2V/issues/8; https://www.nvidia.com/en-us/data-center/l40s/;
    # the 4090's chip at 350 W, with twice the nominal speed; g6e.xlarge, https://github.com/gpuaudit/cli (early 2026)
    Card("L40S", visible_gib=44.4, tflops=362, gb_per_second=864, matmul_efficiency=0.50, dollars_per_hour=1.86),
    # 47.41 in users' messages; Ampere white paper as above; 95 of 150 measured, https://github.com/fanghostt/transformers-benchmarks;
    # Lambda, https://github.com/api-evangelist/lambda-labs (September 2026)
    Card("A6000", visible_gib=47.4, tflops=154.8, gb_per_second=768, matmul_efficiency=0.60, dollars_per_hour=1.09),
    # 79.14, https://github.com/lianqi1008/Control-GIC/issues/6; as A100-40, SXM; as A100-40;
    # RunPod community, https://github.com/datareceipts/data-receipts (November 2026)
    Card("A100-80", visible_gib=79.14, tflops=312, gb_per_second=2039, matmul_efficiency=0.70, dollars_per_hour=1.39),
    # 79.1 in users' messages; https://www.nvidia.com/en-us/data-center/h100/; 794 of 989 at best,
    # https://github.com/stas00/ml-engineering, and LoRA's products are small for it; price as A100-80
    Card("H100-PCIe", visible_gib=79.1, tflops=756, gb_per_second=2000, matmul_efficiency=0.55, dollars_per_hour=1.99),
    Card("H100", visible_gib=79.1, tflops=989, gb_per_second=3350, matmul_efficiency=0.55, dollars_per_hour=2.69),  # SXM
)
CARDS_24GB = ("L4", "A10G", "RTX3090", "RTX4090")


def find_card(name: str) -> Card:
    """The card that is meant: by its name, by what `torch.cuda.get_device_name` says, or only by its size.

    Capitals, spaces, "-", "_", "NVIDIA", "GeForce", "Tesla" and "RTX" make no difference. A size is a card with the memory
    of the smallest known one that is sold by it, for 24 GB an L4's, and without speeds; where none is sold by it, of 97.5 %.

    Raises:
        RecipeError: no such card is known.

    Example:
        "NVIDIA GeForce RTX 4090" → RTX4090, "a100 80gb" → A100-80, "24 GB" → `Card("24GB", visible_gib=22.03)`

    """
    if size := re.fullmatch(r"\s*([1-9]\d*)\s*gi?b\s*", name, re.IGNORECASE):
        gigabytes = int(size[1])
        sold = [card.visible_gib for card in CARDS if _sold_gb(card) == gigabytes]
        return Card(f"{gigabytes}GB", visible_gib=min(sold, default=round(gigabytes * 0.975, 2)))
    known = {key: card for card in CARDS for key in (_key(card.name), f"{_key(card.name)}{_sold_gb(card)}")}
    if (key := _key(name)) in known:
        return known[key]
    names = [card.name for card in CARDS]
    nearest = did_you_mean(re.sub("NVIDIA|GEFORCE|TESLA", "", name.upper()).strip(), names)
    raise RecipeError(f"no card is known as {name!r}, there is {', '.join(names)}, or a size such as 24GB.{nearest}")


def smallest_card(needed_gib: float) -> Card | None:
    """The card with the least memory on which so much fits, the cheaper of two; None where it fits on none."""
    fits = [card for card in CARDS if verdict(needed_gib, card) == "fits"]
    return min(fits, key=lambda card: (card.visible_gib, card.dollars_per_hour or inf), default=None)


def verdict(needed_gib: float, card: Card) -> Verdict:
    """Whether it fits with room to spare, is tight, or does not fit."""
    if needed_gib <= FITS_BELOW * card.visible_gib:
        return "fits"
    return "tight" if needed_gib <= card.visible_gib else "no"


def seconds(work: Work, card: Card) -> float:
    """What a step's work takes: FLOPs / (nominal · efficiency) + bytes / (bandwidth · efficiency), at least 6 µs a kernel.

    An estimate from assumed efficiencies: the one run with a known card, the tutorial's on an L4, took 1:31:58 where this
    says 66 to 76 minutes, 18 to 28 % less. Loading data, evaluation and checkpoints come on top.

    Raises:
        ValueError: the card is only a size.

    """
    if card.tflops is None or card.gb_per_second is None or card.matmul_efficiency is None:
        raise ValueError(f"{card.name} is a size: how fast such a card computes is not known")
    flops = work.matmul_flops + work.attention_flops
    moved = work.elementwise_bytes + work.dequantized_bytes
    computing = flops / (card.tflops * 1e12 * card.matmul_efficiency)
    moving = moved / (card.gb_per_second * 1e9 * card.bandwidth_efficiency)
    return max(computing + moving, work.kernels * LAUNCH_SECONDS)


def speed(
    card: Card,
    *,
    needed_gib: float,
    work: Work,
    rows_per_step: float,
    tokens_per_step: float,
    steps_per_epoch: float,
    epochs: float,
    slower: float = 1,
) -> Speed:
    """A step, an epoch and the whole run on a card: whether it fits, how long it takes and what it costs.

    Args:
        card: one card that does the work alone.
        needed_gib: of the largest step.
        work: of a typical optimiser step.
        rows_per_step, tokens_per_step: of a typical optimiser step.
        steps_per_epoch: optimiser steps.
        epochs: of the run, which need not be whole.
        slower: how many times as long as estimated steps took on such a card.

    """
    step = None if card.tflops is None else slower * seconds(work, card)
    run = None if step is None else step * steps_per_epoch * epochs
    return Speed(
        card=card.name,
        visible_gib=card.visible_gib,
        verdict=verdict(needed_gib, card),
        spare_gib=card.visible_gib - needed_gib,
        step_seconds=step,
        samples_per_second=rows_per_step / step if step else None,
        tokens_per_second=tokens_per_step / step if step else None,
        epoch_seconds=None if step is None else step * steps_per_epoch,
        run_seconds=run,
        run_price=None if run is None or card.dollars_per_hour is None else run / 3600 * card.dollars_per_hour,
    )


def _key(name: str) -> str:
    """What two spellings of a card have in common: "NVIDIA A100-SXM4-40GB" and "a100 40" are both "a10040"."""
    key = re.sub(r"nvidia|geforce|tesla|rtx|sxm\d?|hbm\d\w?|gi?b|[\s_-]", "", name.casefold())
    return key if key.startswith("h100") else key.replace("pcie", "")  # only an H100 is a slower chip with it


def _sold_gb(card: Card) -> int:
    return next(size for size in SOLD_GB if size >= card.visible_gib)
