"""What a plan says, as data: the memory that a step needs, where it goes, and what a step takes and costs on each card."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Verdict = Literal["fits", "tight", "no"]
FILLING = "filling the vision cache"  # a batch's name
FITS_BELOW = 0.9  # of the card's visible memory: what a simulation cannot see has room in the rest


class Data(BaseModel):
    """Frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Batch(Data):
    """A micro-batch that was run."""

    name: str  # "worst", "95th percentile", "typical"
    rows: int
    tokens: int  # rows × longest where it is padded
    pictures: int
    example: str  # which rows: "row 17 and row 3 of train.jsonl", or "stated sizes"


class Setting(Data):
    """What may be chosen to make a recipe fit or faster."""

    micro_batch: int  # rows, `train.per_device_train_batch_size`
    accumulation: int  # `train.gradient_accumulation_steps`: rows of a step stay the same
    pack_length: int | None  # tokens, `packing.length`; None: not packed, or as many as the micro-batch has at most
    packed: bool
    checkpointing: int  # of every how many layers; 0 of none
    attention: str | None  # `model.attention`
    max_pixels: int | None
    cached: bool  # features of the pictures are read, not computed
    group_by_image: bool = False  # rows share pictures, by which they take less than is predicted


class Memory(Data):
    """GiB at the peak of a step, on the device for which it was run."""

    peak_gib: float  # torch.cuda.max_memory_allocated
    reserved_gib: float  # torch.cuda.max_memory_reserved, by the caching allocator's rules
    needed_gib: float  # reserved, CUDA's context and the allowance for what cannot be seen
    breakdown: dict[str, float]  # GiB by kind, in order of drawing; they sum up to needed_gib
    peak_at: str  # "backward of layer 27, aten::mm"
    timeline: list[tuple[str, float]]  # (phase, GiB allocated), about 200 points through the step


class Work(Data):
    """What a whole optimiser step computes, on one device."""

    matmul_flops: float
    attention_flops: float
    elementwise_bytes: float
    dequantized_bytes: float
    kernels: int  # started


class Speed(Data):
    """A step on a card."""

    card: str
    visible_gib: float
    verdict: Verdict
    spare_gib: float  # visible - needed; negative where it does not fit
    step_seconds: float | None  # None for a card that is only a size, such as "24GB"
    samples_per_second: float | None
    tokens_per_second: float | None
    epoch_seconds: float | None
    run_seconds: float | None
    run_price: float | None  # US dollars


class Forecast(Data):
    """One setting, simulated."""

    setting: Setting
    memory: Memory  # of the worst batch
    batches: list[Batch]
    peaks: dict[str, float]  # batch's name → needed GiB
    work: Work  # of a typical step
    cards: list[Speed]  # the asked one first
    confidence: Literal["high", "medium", "low"]
    notes: list[str]  # what lowers the confidence, stand-ins by name, assumptions


class Plan(Data):
    """A recipe's forecast on a card, and with `fit` the settings that were compared.

    Its flat fields are the ones that scripts ask for; `forecast` has everything.
    """

    model: str
    family: str
    card: str
    visible_gib: float
    verdict: Verdict
    fits: bool  # the verdict is "fits": at most 90 % of the card's visible memory
    peak_gib: float
    reserved_gib: float
    needed_gib: float
    step_seconds: float | None
    samples_per_second: float | None
    tokens_per_second: float | None
    epoch_seconds: float | None
    run_price: float | None
    confidence: Literal["high", "medium", "low"]
    breakdown: dict[str, float]
    advice: str  # the smallest change, or the smallest card, that would make it fit; empty where it fits
    rows: int | None  # None: sizes are stated, and how many rows there are is not
    steps: int | None  # of the whole run
    forecast: Forecast
    overrides: dict[str, Any]  # dotted keys that make the recipe the chosen one; empty without `fit`
    frontier: list[Forecast]  # what `fit` compared, by needed memory; empty without
    measured: list[dict[str, Any]]  # of real runs on such a card with this model: predicted beside measured
    versions: dict[str, str]
