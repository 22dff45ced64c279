"""What a recipe's steps need and take on a card, by simulating them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from vlmtune.batching import Row, micro_batches, passes, steps_per_epoch
from vlmtune.errors import ModelError
from vlmtune.model import positions_model
from vlmtune.plan import cards
from vlmtune.plan.cards import Card, find_card
from vlmtune.plan.forecast import FILLING, Batch, Forecast, Memory, Setting, Speed, Work
from vlmtune.planner.kernels import CUDA, CUDA_BEFORE_AMPERE
from vlmtune.planner.ledger import Outline, Where
from vlmtune.planner.material import Material, pictures_of
from vlmtune.planner.simulation import Outcome, Simulation, outline, simulation
from vlmtune.recipe import Recipe, load_recipe
from vlmtune.trainer import checkpoint_every, plain_config

GIB = 2**30
CONTEXT_GIB = 0.55  # of CUDA, cuBLAS and bitsandbytes' kernels: 0.5 to 0.6 GiB, and on no two drivers the same
ALLOWANCE_GIB = 0.3  # what a simulation cannot see: kernels' private workspace, other programs on the card
KNOWN = ("aten", "bitsandbytes", "torch_attn", "prims", "profiler")  # namespaces of operators whose kernels are known
PARTS = {"forward": "text activations", "loss": "logits and loss", "again": "recomputation", "backward": "backward pass"}
OF_HEAD = "ChunkedLogProbFunctionBackward"  # TRL's node in the graph
NOT_COUNTED = ("torch_compile", "neftune_noise_alpha", "use_liger_kernel")  # fields of `train`
READ_TO_LOG = "aten::_local_scalar_dense"  # a loss, a norm: nothing is decided by it


class Forecaster:
    """Simulates the steps of one recipe.

    Args:
        recipe: which setting.
        material: what it trains on.
        card: whose kernels run and whose memory counts.
        extra_gib: what real runs on such a card needed beyond what was predicted.
        slower: how many times as long as predicted they took.

    """

    def __init__(self, recipe: Recipe, material: Material, card: Card, *, extra_gib: float = 0, slower: float = 1) -> None:
        self.material, self.card = material, card
        self._recipe, self._family = recipe, material.family
        self._extra, self._slower = extra_gib, slower
        self._config = plain_config(self._recipe)
        self._every = checkpoint_every(self._recipe, on_gpu=True)
        self._packed, self._padded_because = self._recipe.packing.mode != "off", ""

    def forecast(self) -> Forecast:
        """What the worst micro-batch needs, and what a typical step takes."""
        self._simulation = self._built()
        together = self.material.by_pictures if self._recipe.packing.group_by_image else None
        lengths = self.material.lengths
        self._plan = micro_batches(self._recipe, self._config, lengths, packed=self._packed, together=together)
        chosen = self._chosen()
        outcomes = self._outcomes(chosen)
        batches = [self._describe(name, group) for name, group in chosen.items()]
        if self._cached:
            outcomes[FILLING] = self._filling()
            count = self._family.pictures_at_once
            batches.append(Batch(name=FILLING, rows=0, tokens=0, pictures=count, example="the largest picture, over again"))
        worst = max(outcomes.values(), key=lambda outcome: outcome.reserved)
        memory = self._memory(worst)
        work = work_of(outcomes["typical"], times=self._tokens_per_step / self._tokens(chosen["typical"]))
        return Forecast(
            setting=self._setting(),
            memory=memory,
            batches=batches,
            peaks={name: self._needed(outcome) for name, outcome in outcomes.items()},
            work=work,
            cards=[self._speed(card, memory.needed_gib, work) for card in self._cards()],
            confidence=self._confidence(worst),
            notes=self._notes(worst),
        )

    # -------------------------------------------------------------------------------------------------- micro-batches

    def _chosen(self) -> dict[str, list[int]]:
        """Micro-batches of the first epoch, by what they stand for."""
        groups = sorted((slot[0] for step in self._plan.steps(0) for slot in step), key=self._tokens)
        last = len(groups) - 1
        chosen = {"worst": groups[last], "95th percentile": groups[round(0.95 * last)], "typical": groups[last // 2]}
        if self.material.pictures_vary:
            chosen["most pictures"] = max(groups, key=lambda group: sum(self.material.pictures[row] for row in group))
        return chosen

    def _outcomes(self, chosen: Mapping[str, Sequence[int]]) -> dict[str, Outcome]:
        """Each is simulated once; stated rows are all the same, so that only their number counts."""

        def key(group: Sequence[int]) -> tuple[int, ...]:
            return (len(group),) if self.material.stated else tuple(group)

        known: dict[tuple[int, ...], Outcome] = {}
        for group in chosen.values():
            if key(group) not in known:
                # the other micro-batches of the step wait beside the card (`Trainer.get_train_dataloader`)
                known[key(group)] = self._simulation.step(self._batch(group), accumulates=self._plan.micro_batches > 1)
        return {name: known[key(group)] for name, group in chosen.items()}

    def _batch(self, group: Sequence[int]) -> dict[str, Any]:
        """The micro-batch as training makes it; features have no values."""
        batch: dict[str, Any] = self.material.collator([self.material.rows[position] for position in group])
        if self._cached and any(name.startswith("pixel_") for name in batch):
            _, features = self._simulation.encode(batch)
            with Outline():
                batch["image_features"] = self._family.join_features(batch, features)
            batch = {name: values for name, values in batch.items() if not name.startswith("pixel_")}
        batch = self._family.flatten(batch, self._positions) if self._packed else batch
        return self.material.collator.filled(batch, int(self._config.pad_to_multiple_of or 1))

    @cached_property
    def _positions(self) -> Any:
        return positions_model(self._simulation.model)

    def _filling(self) -> Outcome:
        """The tower with as many of the largest pictures as go through it at once."""
        source = self.material.largest_picture
        return self._simulation.encode(self.material.collator.pictures([source] * self._family.pictures_at_once))[0]

    @cached_property
    def _cached(self) -> bool:
        """Whether features of the pictures are read, as `vision_cache` decides where there is room for them."""
        mode = self._recipe.vision_cache.mode
        if mode == "off" or self._recipe.lora.scope != "language" or self.material.largest_picture is None:
            return False
        return mode != "auto" or passes(self._config, len(self.material.lengths)) > 1

    def _tokens(self, group: Sequence[int]) -> int:
        lengths = [self.material.lengths[row] for row in group]
        return sum(lengths) if self._packed else len(lengths) * max(lengths)

    def _describe(self, name: str, group: Sequence[int]) -> Batch:
        rows: list[Row] = [self.material.rows[position] for position in group]
        names = list(dict.fromkeys(str(row["name"]) for row in rows))
        example = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return Batch(name=name, rows=len(rows), tokens=self._tokens(group), pictures=len(pictures_of(rows)), example=example)

    # ------------------------------------------------------------------------------------------------------- the model

    def _built(self) -> Simulation:
        recipe = self._simulated_recipe()

        def build() -> Simulation:
            model = outline(recipe, self._family, self.material.config)
            return simulation(
                recipe,
                model,
                self.material.collator.processor,
                self._family,
                device=CUDA if self.card.bf16 else CUDA_BEFORE_AMPERE,
                checkpointing=self._every,
                packed=self._packed,
            )

        try:
            return build()
        except ModelError as error:
            if not self._packed or recipe.packing.length or recipe.packing.group_by_image:
                raise
            self._packed, self._padded_because = False, str(error)
            return build()

    def _simulated_recipe(self) -> Recipe:
        """Attention from packages that are not installed is counted as torch's own, whose memory is the same."""
        own = self._recipe.model.attention in (None, "sdpa", "eager")
        return self._recipe if own else load_recipe(self._recipe, **{"model.attention": None})

    def _setting(self) -> Setting:
        return Setting(
            micro_batch=self._config.per_device_train_batch_size,
            accumulation=self._config.gradient_accumulation_steps,
            pack_length=self._recipe.packing.length if self._packed else None,
            packed=self._packed,
            checkpointing=self._every,
            attention=self._recipe.model.attention,
            max_pixels=self._recipe.images.max_pixels,
            cached=self._cached,
            group_by_image=self._recipe.packing.group_by_image,
        )

    # ---------------------------------------------------------------------------------------------- memory and speed

    def _needed(self, outcome: Outcome) -> float:
        return needed_gib(outcome) + self._extra

    def _memory(self, outcome: Outcome) -> Memory:
        live, last = outcome.at_peak()
        kinds: Counter[str] = Counter()
        for event in live:
            kinds[_kind(event.where)] += event.size
        return Memory(
            peak_gib=outcome.peak / GIB,
            reserved_gib=outcome.reserved / GIB,
            needed_gib=self._needed(outcome),
            breakdown={
                **{name: size / GIB for name, size in kinds.most_common()},
                "rounding and fragmentation": (outcome.reserved - kinds.total()) / GIB,
                "CUDA context": CONTEXT_GIB,
                "allowance for what is not seen": ALLOWANCE_GIB + self._extra,
            },
            peak_at=_place(last.where),
            timeline=[(phase, size / GIB) for phase, size in outcome.timeline()],
        )

    @cached_property
    def _tokens_per_step(self) -> float:
        steps = self._plan.steps(0)
        return sum(self._tokens(slot[0]) for step in steps for slot in step) / len(steps)

    def _speed(self, card: Card, needed: float, work: Work) -> Speed:
        rows = len(self.material.lengths)
        steps = steps_per_epoch(self._config, rows)
        found = cards.speed(
            card,
            needed_gib=needed,
            work=work,
            rows_per_step=rows / steps,
            tokens_per_step=self._tokens_per_step,
            steps_per_epoch=steps,
            epochs=passes(self._config, rows),
            slower=self._slower if card == self.card else 1,
        )
        if self.material.total is None:  # how many rows there are is not known
            return found.model_copy(update={"epoch_seconds": None, "run_seconds": None, "run_price": None})
        return found

    def _cards(self) -> list[Card]:
        """The one that is asked about, and the others of that mission."""
        return [self.card, *(find_card(name) for name in cards.CARDS_24GB if name != self.card.name)]

    # --------------------------------------------------------------------------------------------------- confidence

    def _confidence(self, outcome: Outcome) -> Literal["high", "medium", "low"]:
        if _strange(outcome):
            return "low"
        return "medium" if self._family.name == "generic" or self._doubts(outcome) else "high"

    def _doubts(self, outcome: Outcome) -> list[str]:
        doubts = list(self._simulation.stand_ins)
        if self._recipe.model.quantization == "int8":
            doubts.append("columns of outliers, which int8 multiplies in 16 bit, are left out of account")
        attention = self._recipe.model.attention
        known = {
            f"{self.card.name} computes in float16 with adapters in 32 bit, which is counted as bfloat16": not self.card.bf16,
            f"{self.card.name} refuses train.bf16 and train.tf32: leave them out": not self.card.bf16
            and any(map(self._recipe.train.get, ("bf16", "tf32"))),
            f"{attention} is counted as torch's own attention": attention not in (None, "sdpa", "eager"),
            **{f"train.{name} is left out of account": self._recipe.train.get(name) for name in NOT_COUNTED},
        }
        doubts += [doubt for doubt, holds in known.items() if holds]
        if chosen := sorted(outcome.assumed - {READ_TO_LOG}):
            doubts.append(f"{', '.join(chosen)} chooses by values, and all are taken as chosen")
        return doubts

    def _notes(self, outcome: Outcome) -> list[str]:
        notes = {
            f"rows are padded: {self._padded_because}": bool(self._padded_because),
            f"{', '.join(_strange(outcome))}: what these operators' kernels take for themselves is not known": _strange(
                outcome
            ),
            "room for the pictures' features, in memory or on the disk, is taken for granted": self._cached,
            "packing is tried out on the model only before it is trained": self._family.name == "generic" and self._packed,
            "evaluations and answers to held-out rows are left out": self._config.eval_strategy != "no",
            "times are without encoding the pictures for the cache, once": self._cached,
            "the tokenizer is not at hand: the text's tokens are as stated": self.material.stated,
        }
        return [*self._doubts(outcome), *(note for note, holds in notes.items() if holds)]


def needed_gib(outcome: Outcome) -> float:
    """What a card has to show: all that is reserved, CUDA's context and the allowance."""
    return outcome.reserved / GIB + CONTEXT_GIB + ALLOWANCE_GIB


def work_of(outcome: Outcome, *, times: float) -> Work:
    """What so many micro-batches like this one compute."""
    return Work(
        matmul_flops=times * outcome.flops.get("matmul", 0),
        attention_flops=times * outcome.flops.get("attention", 0),
        elementwise_bytes=times * outcome.bytes.get("elementwise", 0),
        dequantized_bytes=times * outcome.bytes.get("dequantized", 0),
        kernels=round(times * outcome.kernels),
    )


def _strange(outcome: Outcome) -> list[str]:
    """Operators of packages that are not known."""
    return sorted(name for name in outcome.operators if name.partition("::")[0] not in KNOWN)


def _kind(where: Where | None) -> str:
    """What memory is counted under in a breakdown."""
    if where is None or where.what == "scratch":
        return "kernels' scratch"
    if where.what == "forward" and where.module.startswith("vision "):
        return "vision activations"
    if where.what == "backward" and where.module == OF_HEAD:
        return PARTS["loss"]
    return PARTS.get(where.what, where.what)


def _place(where: Where | None) -> str:
    """Where in the step, in words."""
    if where is None:
        return "before the step"
    when = {"again": "recomputation", "scratch": "scratch of a kernel"}.get(where.what, where.what)
    module = f" of {where.module}" if where.module else ""
    return f"{when}{module}, {where.operator}" if where.operator else when
