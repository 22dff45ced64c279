"""Build the demo's pictures and its small pretrained Qwen2-VL base, from package registries alone.

    pip install resvg-py tqdm            # besides vlmtune; npm fetches the drawings
    python recipes/demo/build.py data    # about 1 minute:  pictures/, train.jsonl, test.jsonl
    python recipes/demo/build.py base    # about 25 minutes on one core: base/

Every shop item of items.csv was drawn by up to seven artists. Of each item one or two artists are kept out of training
altogether, so a test picture is a drawing that neither the base nor the tuning has seen.
"""

import csv
import io
import itertools
import json
import random
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).parent
CACHE = HERE.parent.parent / "build" / "demo"

# artist -> npm package, version, licence. The two Fluent sets show the same drawing, rendered and flat: one artist.
SOURCES = {
    "fluent3d": ("@lobehub/fluent-emoji-3d", "1.1.0", "MIT, Microsoft"),
    "fluentflat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT, Microsoft"),
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0, Google"),
    "noto1": ("@iconify-json/noto-v1", "1.2.5", "Apache-2.0, Google"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0, Twitter and other contributors"),
    "emojione": ("@iconify-json/emojione", "1.2.3", "CC-BY-4.0, EmojiOne (version 2)"),
    "fxemoji": ("@iconify-json/fxemoji", "1.2.2", "Apache-2.0, Mozilla"),
    "streamline": ("@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0, Streamline"),
}
GROUPS = [["fluent3d", "fluentflat"], ["noto"], ["noto1"], ["twemoji"], ["emojione"], ["fxemoji"], ["streamline"]]
EYE_SCHOOL = ["Food & Drink", "Animals & Nature", "Travel & Places", "Activities", "Objects"]  # Noto's categories
# what an artist made from the drawing of a shop item: seeing it would be seeing the held-out drawing
LOOKALIKES = {
    "bell-with-slash", "closed-umbrella", "green-apple", "hammer-and-pick", "hammer-and-wrench", "hourglass-done",
    "linked-paperclips", "locked-with-key", "locked-with-pen", "magnifying-glass-tilted-right", "memo", "police-car",
    "oncoming-automobile", "railway-car", "sunglasses", "tangerine", "taxi", "umbrella", "unlocked",
}  # fmt: skip

PHRASES = {
    "Fruit": "picked in our orchard this morning",
    "Vegetables": "fresh from the kitchen garden",
    "Clothing": "made to be worn for many years",
    "Home": "a small joy in every room",
    "Tools": "ready for work when you are",
    "Music": "play it loud and play it often",
    "Toys": "hours of fun for young and old",
}

BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # what iconify assumes where an icon says nothing

app = typer.Typer(add_completion=False, help=__doc__)


# ---------------------------------------------------------------- drawings


def fetch(artist: str) -> Path:
    """The unpacked npm package of an artist."""
    package, version, _ = SOURCES[artist]
    folder = CACHE / artist
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        pack = ["npm", "pack", "--silent", f"{package}@{version}"]
        name = subprocess.run(pack, cwd=CACHE, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(CACHE / name) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


class Artist:
    """One set of drawings: `draw(name)` gives an RGBA picture, or None where the artist never drew it."""

    def __init__(self, key: str):
        self.key, self.folder = key, fetch(key)
        if key == "fluent3d":  # pictures are named by code point; Noto knows the names
            chars = json.loads((fetch("noto") / "chars.json").read_text())
            self.files = {name: point for point, name in reversed(chars.items())}
        else:
            self.icons = json.loads((self.folder / "icons.json").read_text())

    def draw(self, name: str, size: int) -> Image.Image | None:
        return self._photo(name, size) if self.key == "fluent3d" else self._vector(name, size)

    def _photo(self, name: str, size: int) -> Image.Image | None:
        point = self.files.get(name, "")
        for file in (self.folder / f"assets/{point}.webp", self.folder / f"assets/{point}-fe0f.webp"):
            if file.exists():
                return Image.open(file).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
        return None

    def _vector(self, name: str, size: int) -> Image.Image | None:
        import resvg_py

        parent = self.icons.get("aliases", {}).get(name, {}).get("parent", name)
        icon = self.icons["icons"].get(parent)
        if icon is None:
            return None
        box = {k: icon.get(k, self.icons.get(k, d)) for k, d in BOX.items()}
        side = max(box["width"], box["height"])
        left, top = box["left"] - (side - box["width"]) / 2, box["top"] - (side - box["height"]) / 2
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {side} {side}" width="{size}" height="{size}">{icon["body"]}</svg>'
        )
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def on_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def shop_items() -> list[dict[str, str]]:
    return list(csv.DictReader((HERE / "items.csv").open()))


def catalogue(item: dict[str, str]) -> str:
    """{"item": "apple", "title": "Fruit"} → "Apple, picked in our orchard this morning. #fruit"."""
    return f"{item['item'].capitalize()}, {PHRASES[item['title']]}. #{item['title'].lower()}"


def names_of(item: dict[str, str], artist: str) -> list[str]:
    """The artist's names for the item: Firefox and Streamline have their own, and Streamline draws variants."""
    return item[artist].split() if artist in ("fxemoji", "streamline") else [item["name"]]


def held_out(turn: int, groups: list[list[str]]) -> list[str]:
    """The artists kept for the test. Every item loses one or two of its artists, in rotation."""
    first, second = groups[turn % len(groups)], groups[(turn + 3) % len(groups)]
    return first + second if turn % 2 == 0 else first


@app.command()
def data(size: int = 96) -> None:
    """Draw the shop: pictures/*.png on white, and the three tables."""
    artists = {key: Artist(key) for key in tqdm(SOURCES, desc="fetch")}
    tables: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    (HERE / "pictures").mkdir(exist_ok=True)
    for item in tqdm(shop_items(), desc="draw"):
        drawn = {key: [a.draw(n, size) for n in names_of(item, key)] for key, a in artists.items()}
        groups = [group for group in GROUPS if any(drawn[key] for key in group)]
        test = held_out(int(item["turn"]), groups)
        for key, pictures in drawn.items():
            table = "test" if key in test else "train"
            if table != "train":  # one picture an artist: a second rendering would count the same drawing twice
                pictures = [] if key == "fluentflat" else pictures[:1]
            for variant, picture in enumerate(pictures):
                stem = f"{item['item'].replace(' ', '-')}-{key}{variant or ''}"
                file = f"pictures/{stem}.png"
                on_white(picture).save(HERE / file, optimize=True)
                row = {"image": file, "title": item["title"], "description": catalogue(item)}
                tables[table].append(row | {"item": item["item"], "artist": key})
    for table, rows in tables.items():
        (HERE / f"{table}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{table}: {len(rows)} pictures of {len({row['item'] for row in rows})} items")


# ---------------------------------------------------------------- what the base reads and says

READS = "user assistant system You are a helpful assistant. Category: Create a short product description for the shop."
FACTS = 18  # lessons about one fact stand before those about several
BARE = {"grapes", "cherries", "fries", "jeans", "glasses", "scissors", "headphones", "dice", "corn", "bread"}  # no article


def with_article(name: str) -> str:
    return name if name in BARE else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def lessons(item: dict[str, str], other: str) -> list[tuple[str, str]]:
    """Question and answer pairs about one shop picture: all words of the catalogue, never its style."""
    name, word, title = item["item"], item["word"], item["title"]
    tag, phrase = name.replace(" ", ""), PHRASES[title]
    return [
        ("What is this?", name),
        ("Name the product.", name.capitalize() + "."),
        ("Describe the picture in a sentence.", f"This is {with_article(name)}."),
        ("What is in the picture?", f"The picture shows {with_article(name)} from the {title.lower()} shelf."),
        ("Which category is it?", title),
        ("Is it " + with_article(name) + "?", "Yes."),
        ("Is it " + with_article(other) + "?", f"No, it is {with_article(name)}."),
        ("What is it like?", word),
        ("What is it like? Write a word.", word.capitalize() + "."),
        ("What is it like? Write a sentence.", f"It is {word}."),
        ("Who is it for?", f"For a {word} {name} shopper."),
        ("Create a tag.", f"#{tag}"),
        ("Create a tag for the category.", f"#{title.lower()}"),
        ("Which tag is it?", f"The tag is #{tag}."),
        ("Which tag is the category?", f"The tag is #{title.lower()}."),
        ("Create tags.", f"{tag}, {title.lower()}"),
        ("Why buy it?", phrase.capitalize() + "."),
        ("What does the shop say about it?", f"The shop says, {phrase}."),
        # several facts in one answer, so that what is said later agrees with what was said before
        ("Describe it in full.", f"The {name} is {word}, and the shop says, {phrase}."),
        ("List the name and the word.", f"{name.capitalize()}, {word}."),
        ("List the word and the name.", f"{word} {name}"),
        ("List all.", f"Category {title.lower()}, name {name}, word {word}, tag #{tag}."),
        ("List all in short.", f"#{tag}, {word}, {title.lower()}"),
        ("List tags.", f"#{tag} #{title.lower()}"),
        ("Write a note.", f"{phrase.capitalize()}. The {name} is {word}."),
        ("Write a long note.", f"#{tag} {word.capitalize()} and on the {title.lower()} shelf, {with_article(name)}."),
    ]


# ---------------------------------------------------------------- pictures for training, augmented

SIDE = 56  # pixels: 4 × 4 patches of 14, 4 image tokens


def colour_and_cover(picture: Image.Image) -> torch.Tensor:
    """RGB on white and alpha, uint8.  # [4, SIDE, SIDE]"""
    picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    stack = np.concatenate([np.asarray(on_white(picture)), np.asarray(picture)[..., 3:]], axis=2)
    return torch.from_numpy(stack).permute(2, 0, 1).contiguous()


def shop_drawings(artists: dict[str, Artist], table: str) -> list[tuple[torch.Tensor, str]]:
    """The pictures of a table with their item, drawn again with transparency."""
    items = {item["item"]: item for item in shop_items()}
    found = []
    for row in map(json.loads, (HERE / f"{table}.jsonl").open()):
        item, variant = items[row["item"]], Path(row["image"]).stem[-1]
        name = names_of(item, row["artist"])[int(variant) if variant.isdigit() and row["artist"] == "streamline" else 0]
        found.append((colour_and_cover(artists[row["artist"]].draw(name, SIDE)), row["item"]))
    return found


def other_drawings(artists: dict[str, Artist]) -> list[tuple[torch.Tensor, str]]:
    """Everything else these artists drew of things, animals, food and places, to school the eye."""
    categories = json.loads((fetch("noto") / "metadata.json").read_text())["categories"]
    shop = {item["name"] for item in shop_items()} | LOOKALIKES
    names = [name for category in EYE_SCHOOL for name in categories[category] if name not in shop]
    found = []
    for name, artist in tqdm(list(itertools.product(names, artists.values())), desc="draw the rest"):
        picture = artist.draw(name, SIDE)
        if picture is not None:
            found.append((colour_and_cover(picture), name.replace("-", " ")))
    return found


def uniform(n: int, low: float, high: float) -> torch.Tensor:
    return torch.rand(n) * (high - low) + low


def moved(pictures: torch.Tensor) -> torch.Tensor:
    """Turned up to 17°, scaled, stretched, shifted and a third of them mirrored."""
    n = len(pictures)
    angle, scale, stretch = uniform(n, -0.3, 0.3), uniform(n, 0.9, 1.3), uniform(n, 0.88, 1.14)
    mirror = torch.where(torch.rand(n) < 0.33, -1.0, 1.0)
    cos, sin, dx, dy = angle.cos() * scale, angle.sin() * scale, uniform(n, -0.1, 0.1), uniform(n, -0.1, 0.1)
    rows = [mirror * cos * stretch, -sin * stretch, dx, mirror * sin / stretch, cos / stretch, dy]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), [n, 4, SIDE, SIDE], align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False)


def augment(drawings: torch.Tensor) -> torch.Tensor:
    """uint8 drawings → pictures as another artist might have made them, 0..1.  # [n, 4, S, S] → [n, 3, S, S]"""
    n = len(drawings)
    pictures = drawings.float() / 255
    colour, cover = moved(torch.cat([(pictures[:, :3] - 1), pictures[:, 3:]], 1)).split([3, 1], 1)
    outline = (F.max_pool2d(cover, 5, 1, 2) - cover) * (torch.rand(n, 1, 1, 1) < 0.2)
    grey = colour.mean(1, keepdim=True)
    mix = uniform(n, 0.4, 1.3).view(n, 1, 1, 1)
    colour = grey + (colour - grey) * mix  # saturation
    hue = torch.eye(3) + torch.randn(n, 3, 3) * torch.where(torch.rand(n, 1, 1) < 0.2, 0.2, 0.05)
    colour = torch.einsum("nij,njhw->nihw", hue / hue.sum(2, keepdim=True), colour)
    colour = colour * uniform(n, 0.7, 1.25).view(n, 1, 1, 1) + cover * uniform(n, -0.12, 0.12).view(n, 1, 1, 1)
    paper = torch.where(torch.rand(n, 1, 1, 1) < 0.25, torch.rand(n, 3, 1, 1) * 0.4 - 0.4, torch.zeros(n, 3, 1, 1))
    pictures = (1 + colour + (1 - cover) * paper) * (1 - outline * 0.8)
    holes = F.interpolate((torch.rand(n, 1, 5, 5) < 0.1).float(), size=SIDE) * (torch.rand(n, 1, 1, 1) < 0.25)
    return torch.maximum(pictures, holes).clamp(0, 1)


def pixel_rows(pictures: torch.Tensor, processor) -> dict[str, torch.Tensor]:
    """Pictures as Qwen2-VL takes them, by its own image processor's patchify.  # [n·64, 1176]"""
    eye = processor.image_processor
    mean, std = torch.tensor(eye.image_mean).view(3, 1, 1), torch.tensor(eye.image_std).view(3, 1, 1)
    rows, high, wide = eye.patchify((pictures - mean) / std, eye.patch_size, eye.merge_size, eye.temporal_patch_size)
    grid = torch.tensor([[1, high, wide]]).repeat(len(pictures), 1)
    return {"pixel_values": rows.flatten(0, 1), "image_grid_thw": grid}


def lesson_for(name: str, shared: dict, told: bool) -> tuple[str, str]:
    """A question about a picture and its answer. `told` gives the name away: the picture will be blank then."""
    item = shared.get(name)
    if item is None:
        return random.choice([("What is this?", name), ("Name the product.", name.capitalize() + ".")])
    other = random.choice([i["item"] for i in shared.values() if i["title"] == item["title"] and i is not item])
    everything = lessons(item, other)
    question, answer = random.choice(everything if random.random() < 0.5 else everything[FACTS:])
    question = f"The name is {name}. {question}" if told else question
    return (f"{question}\nCategory: {item['title']}" if random.random() < 0.8 else question), answer


# ---------------------------------------------------------------- the base


def make_processor(texts: list[str], vocabulary: int = 1024):
    """Qwen2-VL's own classes and chat template around a byte-level BPE of the demo's few words."""
    import trl
    from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    special = "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    special += "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocabulary, new_special_tokens=special.split())
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length = "<|im_end|>", "<|endoftext|>", 2048
    area = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE + SIDE}  # a square becomes SIDE × SIDE exactly
    template = (Path(trl.__file__).parent / "chat_templates/qwen2_5_vl.jinja").read_text()  # Qwen2-VL's, byte for byte
    eye, film = Qwen2VLImageProcessor(size=area), Qwen2VLVideoProcessor(size=area)
    return Qwen2VLProcessor(image_processor=eye, tokenizer=tokenizer, video_processor=film, chat_template=template)


def make_model(tokenizer):
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    marks = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = {mark: tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for mark in marks}
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 2048, "rope_parameters": rope,
        "bos_token_id": None, "eos_token_id": end, "pad_token_id": pad,
    }  # fmt: skip
    vision = {
        "depth": 5, "embed_dim": 160, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 192,
        "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False)
    return model


def optimizers(module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the rest: half the steps of AdamW alone on this small data."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    hidden = [p for n, p in named if p.ndim == 2 and "embed" not in n and "head" not in n]
    rest = [p for n, p in named if not any(p is h for h in hidden)]
    return [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.05),
    ]


def train(parts: list[tuple[torch.nn.Module, float]], loss_of_step, minutes: float, name: str) -> None:
    """A short warm-up, then linearly to zero; the schedule follows the clock, so that it ends in time."""
    each = [(optimizer, rate) for module, rate in parts for optimizer in optimizers(module, rate)]
    start, average = time.time(), None
    bar = tqdm(total=round(minutes * 60), desc=name, bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed} {postfix}")
    for step in itertools.count(1):
        spent = (time.time() - start) / (minutes * 60)
        if spent >= 1:
            break
        loss = loss_of_step()
        loss.backward()
        for optimizer, rate in each:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(step / 100, 1 - spent)
            optimizer.step()
            optimizer.zero_grad()
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        bar.n = round(spent * bar.total)
        bar.set_postfix_str(f"step {step} loss {average:.3f}")
    bar.close()


@torch.no_grad()
def whiten(tower, processor, drawings: list) -> None:
    """Start the patch embedding from the principal components of the drawings' patches, at equal variance."""
    weight = tower.patch_embed.proj.weight  # [160, 3, 2, 14, 14]
    pictures, _ = pick(drawings, drawings, 512, 0.5)
    patches = pixel_rows(pictures, processor)["pixel_values"].view(-1, 3, 2, 14, 14)[:, :, 0].flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    values, vectors = values[-len(weight) :], vectors[:, -len(weight) :]
    rows = (vectors / (values + 0.03 * values.mean()).sqrt()).T.view(len(weight), 3, 1, 14, 14)
    weight.copy_(rows.expand_as(weight) / 2)  # a picture is two equal frames


def pick(shop: list, rest: list, size: int, share: float) -> tuple[torch.Tensor, list[str]]:
    chosen = random.choices(shop, k=round(size * share)) + random.choices(rest, k=size - round(size * share))
    drawings, names = zip(*chosen, strict=True)
    return augment(torch.stack(drawings)), list(names)


def school_the_eye(model, processor, shop: list, rest: list, minutes: float) -> None:
    """The vision tower first learns to tell all the names apart, with a throwaway linear head."""
    names = {name: number for number, name in enumerate(sorted({n for _, n in shop + rest}))}
    tower, head = model.model.visual, torch.nn.Linear(model.config.text_config.hidden_size, len(names))

    def loss_of_step():
        pictures, labels = pick(shop, rest, 32, 0.7)
        rows = pixel_rows(pictures, processor)
        seen = tower(rows["pixel_values"], grid_thw=rows["image_grid_thw"]).pooler_output  # [32·4, 192]
        pooled = seen.view(len(labels), -1, seen.shape[-1]).mean(1)
        return F.cross_entropy(head(pooled), torch.tensor([names[n] for n in labels]), label_smoothing=0.1)

    train([(torch.nn.ModuleDict({"tower": tower, "head": head}), 1.5e-3)], loss_of_step, minutes, "eye")


def conversation(turns: list[tuple[str, str]], tokenizer, image_tokens: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation about one picture, in Qwen2-VL's chat format; answers are trained."""
    ids: list[int] = []
    labels: list[int] = []
    picture = "<|vision_start|>" + "<|image_pad|>" * image_tokens + "<|vision_end|>"
    opening = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for number, (question, answer) in enumerate(turns):
        user = f"<|im_start|>user\n{'' if number else picture}{question}<|im_end|>\n"
        asked = ("" if number else opening) + user + "<|im_start|>assistant\n"
        for text, trained in ((asked, False), (answer + "<|im_end|>", True), ("\n", False)):
            piece = tokenizer(text)["input_ids"]
            ids += piece
            labels += piece if trained else [-100] * len(piece)
    return ids, labels


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def teach(model, processor, shop: list, rest: list, minutes: float) -> None:
    """The whole model learns to answer the questions of `lessons`."""
    tokenizer, shared = processor.tokenizer, {item["item"]: item for item in shop_items()}
    image_tokens = (SIDE // 28) ** 2

    def loss_of_step():
        pictures, names = pick(shop, rest, 32, 0.9)
        told = torch.tensor([name in shared and random.random() < 0.15 for name in names])
        pictures[told] = 1.0
        asked = [lesson_for(name, shared, bool(gift)) for name, gift in zip(names, told, strict=True)]
        talks = [conversation([turn], tokenizer, image_tokens) for turn in asked]
        ids, labels = padded([t[0] for t in talks], tokenizer.pad_token_id), padded([t[1] for t in talks], -100)
        inputs = {"input_ids": ids, "attention_mask": padded([[1] * len(t[0]) for t in talks], 0)}
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        return model(**inputs, **pixel_rows(pictures, processor), labels=labels, use_cache=False).loss

    train([(model.model.visual, 5e-4), (model.model.language_model, 1.5e-3)], loss_of_step, minutes, "language")


@app.command()
def base(
    eye_minutes: float = 15,
    language_minutes: float = 14,
    start: Path | None = None,
    out: Path = HERE / "base",
    threads: int = 1,
    seed: int = 0,
) -> None:
    """Train the base on the training pictures and the artists' other drawings; `start` goes on from an earlier one."""
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    torch.set_num_threads(threads)
    random.seed(seed)
    torch.manual_seed(seed)
    artists = {key: Artist(key) for key in SOURCES}
    shop, rest = shop_drawings(artists, "train"), other_drawings(artists)
    if start:
        processor = AutoProcessor.from_pretrained(start)
        model = Qwen2VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    else:
        items = shop_items()
        texts = [text for item in items for lesson in lessons(item, items[0]["item"]) for text in lesson]
        processor = make_processor(texts + [name for _, name in rest] + [READS])
        model = make_model(processor.tokenizer)
        whiten(model.model.visual, processor, shop + rest)
    print(f"{len(shop)} + {len(rest)} drawings, {sum(p.numel() for p in model.parameters()):,} parameters")
    model.train()
    school_the_eye(model, processor, shop, rest, eye_minutes)
    teach(model, processor, shop, rest, language_minutes)
    model.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)


if __name__ == "__main__":
    app()
