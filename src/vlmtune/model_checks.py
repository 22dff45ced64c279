"""Adapter, pictures and loss: what the model itself does with a row or two."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn

from vlmtune.checks import Check, Finding, Patient, Row, failure, gib, named, ok, warning
from vlmtune.collator import pictures
from vlmtune.errors import DatasetError
from vlmtune.evaluation import blanked, redrawn
from vlmtune.images import load_image
from vlmtune.model import evaluating, on_device, part_of

SAME = 1e-4  # of a loss: what rounding explains in float32
UNSEEN = 1e-6  # of a loss: the least that another picture changes for a model that looks
ROUNDED = 2e-2  # the same in 16 bit
GUESSING = 1.5  # times ln(vocabulary): a loss beyond that is worse than guessing
LOUDER = 1024  # the loss is multiplied by it: small gradients stay above zero in float16
STEP = 1e-2
STATES = 3  # an adapter's weights and Adam's two moments


def stop_in_config(patient: Patient) -> Finding:
    stop = patient.stop
    own = patient.model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    if stop in listed:
        return ok("generation_config ends at the trained stop token")
    token = patient.tokenizer.convert_ids_to_tokens(stop)
    others = ", ".join(str(patient.tokenizer.convert_ids_to_tokens(each)) for each in listed if each is not None) or "nothing"
    return warning(
        f"generation_config ends at {others} and not at {token}, the stop token that is trained",
        "serve the model with the generation_config.json that is saved beside the adapter, which has both",
    )


def modules(patient: Patient) -> Finding:
    """Where the adapter sits."""
    family, scope = patient.collator.family, patient.recipe.lora.scope
    counts = Counter(part_of(f"{name}.", family) for name in _adapters(patient.model))
    if not counts:
        return failure("no module has an adapter", "name modules of this model in `lora.targets`, or say all-linear")
    said = ", ".join(f"{count} in the {part}" for part, count in sorted(counts.items()))
    wanted = {"language": {"language model"}, "vision": {"vision tower and projector"}}.get(scope, set(counts))
    if outside := sorted(set(counts) - wanted):
        return warning(
            f"adapters: {said}; `lora.scope` is {scope}, and those in the {outside[0]} are outside of it",
            "let vlmtune choose the modules: a list of names of one's own reaches into every part that has them",
        )
    return ok(f"adapters: {said}")


def frozen_base(patient: Patient) -> Finding:
    """Nothing but the adapter is to learn: only that is saved."""
    loose = [name for name, weight in patient.model.named_parameters() if weight.requires_grad and "lora_" not in name]
    if loose:
        return failure(
            f"{len(loose)} parameters of the base are trained: {named(loose)}",
            "freeze the base (`requires_grad_(False)`) before the adapter is added",
        )
    return ok("all of it is frozen")


def gradients(patient: Patient) -> Finding:
    """B of every LoRA module gets a gradient in the first step; A only afterwards, for B begins at zero."""
    adapters = _adapters(patient.model)
    frozen = [name for name, module in adapters.items() if not all(b.weight.requires_grad for b in module.lora_B.values())]
    if frozen:
        return failure(
            f"B of {len(frozen)} LoRA modules is frozen, and so nothing is learnt there: {named(frozen)}",
            "leave the adapter's weights trainable",
        )
    row = _example(patient)
    found = _gradients(patient, row)
    still = [name for name, module in adapters.items() if not any(_moves(found, b.weight) for b in module.lora_B.values())]
    if len(still) == len(adapters):
        return failure(
            f"{row['name']}: no LoRA module gets a gradient",
            "look at what detaches the loss from the adapter: labels, checkpointing, a forward without gradients",
        )
    if still:
        return warning(
            f"{row['name']}: {len(still)} of {len(adapters)} LoRA modules get no gradient: {named(still)}",
            "leave them out of `lora.targets`, or look at why the loss does not depend on them",
        )
    return ok(f"B of all {len(adapters)} LoRA modules gets a gradient")


def step(patient: Patient) -> Finding:
    """One step on the adapter changes the answer and nothing else, and lets A learn; it is taken back."""
    model, row = patient.model, _example(patient)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    frozen = _some_frozen(model)
    sums = [_checksum(weight) for weight in frozen]
    found = _gradients(patient, row)
    try:
        with torch.no_grad():
            for weight in weights:
                if id(weight) in found:
                    weight -= STEP * found[id(weight)].sign()
        after = _gradients(patient, row)
        tuned, base = _loss(patient, row), _loss(patient, row, adapter=False)
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
    if [_checksum(weight) for weight in frozen] != sums:
        return failure("a step on the adapter changed weights of the base", "freeze the base before the adapter is added")
    if tuned == base:
        return failure(
            f"{row['name']}: after a step the loss is {tuned:.4f} with the adapter and without: it changes nothing",
            "look at whether the adapter is active: `model.active_adapters`, merged or disabled layers",
        )
    adapters = _adapters(model)
    still = [name for name, module in adapters.items() if not any(_moves(after, a.weight) for a in module.lora_A.values())]
    if len(still) == len(adapters):
        return failure(f"{row['name']}: A of no LoRA module gets a gradient after a step", "leave A of the adapter trainable")
    return ok(
        f"{len(frozen)} weights of the base stay, the loss moves, and A of {len(adapters) - len(still)} modules learns next"
    )


def picture_features(patient: Patient) -> Finding:
    """As many tokens stand for a picture as the tower makes features of it."""
    rows = patient.seeing_rows[: patient.few]
    if not rows:
        return ok("no row that is looked at has a picture")
    collator, core = patient.collator, _core(patient.model)
    for row in rows:
        source = pictures(row)[0]
        with evaluating(patient.model):
            features = collator.family.encode(core, on_device(collator.pictures([source]), patient.model))
        if features[0].ndim != 2:  # [tiles, patches, hidden]
            return ok("pictures are read through cross-attention: one token stands for each")
        tokens, made = collator.picture_tokens(source), sum(map(len, features))  # [tokens, hidden] each
        if tokens != made:
            size = "×".join(map(str, collator.album.size(source)))
            return failure(
                f"{row['name']}: {tokens} tokens stand for a picture of {size}, and the tower makes {made} features of it",
                "use the processor that comes with these weights: patch and merge sizes differ",
            )
    return ok(f"tokens and features agree for {len(rows)} pictures")


def looks(patient: Patient, *, trained: bool = False) -> Finding:
    """The loss with the true picture, with a blank one and with another row's, all of one size."""
    rows = patient.seeing_rows[: patient.few]
    if not rows:
        return ok("no row that is looked at has a picture")
    true = [_true_loss(patient, row) for row in rows]
    blank = [_loss(patient, blanked(row)) for row in rows]
    swapped = [_loss(patient, _with_pictures_of(row, _another(patient, row))) for row in rows]
    told = (
        f"loss {_mean(true):.3f} with the true picture, {_mean(blank):.3f} with a blank one, {_mean(swapped):.3f} with "
        "another row's"
    )
    apart = max(abs(a - b) / max(abs(a), 1e-9) for a, b in zip(true + true, blank + swapped, strict=True))
    if apart <= UNSEEN or (apart <= SAME and abs(true[0] - _loss(patient, rows[0])) >= apart * true[0]):  # the second: noise
        judge = failure if trained else warning
        return judge(
            f"{told}: the model does not look ({named([str(row['name']) for row in rows])})",
            "look at whether pixels reach the model, and whether its gates or projector pass them on",
        )
    if trained and _mean(true) >= min(_mean(blank), _mean(swapped)):
        return warning(f"{told}: the true picture helps no more than others", "train on rows whose answer needs the picture")
    return ok(told)


def looks_when_trained(patient: Patient) -> Finding:
    """As `looks`; after training, a model that does not look is a failure."""
    return looks(patient, trained=True)


def first_loss(patient: Patient) -> Finding:
    """Worse than guessing is a sign of another tokenizer, template or damaged weights."""
    rows = _trained_rows(patient)[: patient.few]
    losses = {str(row["name"]): _true_loss(patient, row) for row in rows}
    if not losses:
        return ok("no row that is looked at is trained")
    broken = [name for name, loss in losses.items() if not math.isfinite(loss)]
    if broken:
        return failure(
            f"{named(broken)}: the loss is not a number", "set `model.dtype: bfloat16` or float32, or look at the weights"
        )
    loss, guess = _mean([*losses.values()]), math.log(patient.model.config.get_text_config().vocab_size)
    if loss > GUESSING * guess:
        return warning(
            f"{named([*losses])}: the first loss is {loss:.2f}, and a guess among all tokens has {guess:.2f}",
            "look at whether tokenizer, template and weights are of one checkpoint",
        )
    return ok(f"{loss:.2f}, where a guess among all tokens has {guess:.2f}")


def same_as_base(patient: Patient) -> Finding:
    row = _short(patient)
    tuned, base = _true_loss(patient, row), _loss(patient, row, adapter=False)
    rounding = (SAME if patient.model.dtype == torch.float32 else ROUNDED) * max(abs(tuned), abs(base))
    if abs(tuned - base) > rounding:
        return failure(
            f"{row['name']}: before the first step the loss is {tuned:.4f} with the adapter and {base:.4f} without",
            "begin with B at zero, as PEFT does, or name the adapter that is to be trained further",
        )
    return ok(f"{base:.4f} with and without the adapter, as it should be before the first step")


def disk(patient: Patient) -> Finding:
    recipe, model, kept = patient.recipe, patient.model, patient.checkpoints
    adapter = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
    merged = 2 * model.num_parameters() if recipe.merge else 0
    need, free = adapter * (1 + STATES * kept) + merged, patient.machine.free_disk
    parts = f"the adapter, {kept} checkpoint{'s' * (kept != 1)}{', a merged model' if merged else ''}"
    if need > free:
        return failure(
            f"{recipe.output_dir}: {parts} take {gib(need)}, and {gib(free)} are free",
            "make room, write elsewhere (`train.output_dir`), or keep fewer checkpoints (`train.save_total_limit`)",
        )
    return ok(f"{parts} take {gib(need)}, and {gib(free)} are free")


MODEL: dict[str, Check] = {
    "adapter: modules": modules,
    "stop: in generation_config": stop_in_config,
    "images: tokens and features": picture_features,
    "adapter: base is frozen": frozen_base,
    "adapter: gradients": gradients,
    "adapter: a step": step,
    "looks: at pictures": looks,
    "loss: first": first_loss,
    "loss: same as the base's": same_as_base,
    "environment: disk": disk,
}


def _core(model: PeftModel) -> Any:
    base: Any = model.get_base_model()
    return base.base_model


def _adapters(model: nn.Module) -> dict[str, Any]:
    """Name → module, of every module with a LoRA adapter."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if len(getattr(module, "lora_B", ())) > 0
    }


def _trained_rows(patient: Patient) -> list[Row]:
    """The rows with an answer, those of the fewest tokens first."""
    return [each.row for each in sorted(patient.encoded, key=lambda each: len(each.ids)) if bool(each.trained.any())]


def _short(patient: Patient) -> Row:
    """A short row, with a picture where there are any."""
    rows = _trained_rows(patient)
    if not rows:
        raise DatasetError("no row that is looked at has a trained token, so that nothing can be learnt from it")
    return next((row for row in rows if pictures(row)), rows[0])


def _example(patient: Patient) -> Row:
    """A short row, its pictures shaded, because attention learns nothing from patches of one colour."""
    return redrawn(_short(patient), lambda size: Image.radial_gradient("L").resize(size).convert("RGB"))


def _another(patient: Patient, row: Row) -> Row:
    """A row with other pictures, or the row itself where there is none."""
    seen = [patient.collator.album.fingerprint(source) for source in pictures(row)]
    others = (other for other in patient.seeing_rows if patient.collator.album.fingerprint(pictures(other)[0]) not in seen)
    return next(others, row)


def _inputs(patient: Patient, row: Row) -> dict[str, Any]:
    return patient.collator.family.model_inputs(on_device(patient.batch([row]), patient.model))


def _true_loss(patient: Patient, row: Row) -> float:
    """Of a row as it is, with the adapter as it is: several checks ask, and a pass takes time."""
    name = str(row["name"])
    if name not in patient.losses:
        patient.losses[name] = _loss(patient, row)
    return patient.losses[name]


def _loss(patient: Patient, row: Row, *, adapter: bool = True) -> float:
    off: AbstractContextManager[None] = nullcontext() if adapter else patient.model.disable_adapter()
    with off, evaluating(patient.model):
        return float(patient.model(**_inputs(patient, row), use_cache=False).loss)


def _gradients(patient: Patient, row: Row) -> dict[int, Tensor]:
    """By its id, each trainable weight's gradient, without dropout; the model is left as it was."""
    weights = [weight for weight in patient.model.parameters() if weight.requires_grad]
    with evaluating(patient.model), torch.enable_grad():
        loss = patient.model(**_inputs(patient, row), use_cache=False).loss
        if not loss.requires_grad:
            return {}
        found = torch.autograd.grad(loss * LOUDER, weights, allow_unused=True)
    return {id(weight): gradient for weight, gradient in zip(weights, found, strict=True) if gradient is not None}  # pyright: ignore[reportUnnecessaryComparison]  (allow_unused)


def _moves(found: Mapping[int, Tensor], weight: Tensor) -> bool:
    return id(weight) in found and bool(found[id(weight)].any())


def _some_frozen(model: nn.Module) -> Sequence[Tensor]:
    """A few weights of the base, from the first layer to the last."""
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    return frozen[:: max(1, len(frozen) // 8)]


def _checksum(weight: Tensor) -> float:
    return float(weight.detach().sum(dtype=torch.float64))


def _with_pictures_of(row: Row, other: Row) -> dict[str, Any]:
    """The row with the other's pictures, each resized to the one in whose place it comes: as many tokens stand for it."""
    sources = cycle(pictures(other))
    return redrawn(row, lambda size: load_image(next(sources)).resize(size))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
