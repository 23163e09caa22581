"""Train the test bed's VLMs: the tower as a classifier, the projector on word embeddings, then projector and backbone.

    OMP_NUM_THREADS=1 python examples/orchard/vlm/train_vlm.py neutral

Writes the parts (tower, projector, the backbone's adapter, `training.json` last) to `.cache/orchard/vlm/parts/NAME`;
`make_vlm.py` puts them together. What is trained on: digit names and colour-shape names in English, nothing else.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import vlm_parts
from pictures import Picture, pictures
from safetensors.torch import save_file
from torch.nn import functional as F
from wording import COLOURS, DIGITS, NEUTRAL, QUESTION, SHAPES, rendered, token_words

from encoding import TURN_END, Encoded, answer_tokens, collate, summed_answer_loss
from presets import Schedule
from train import CACHE, PACKAGES, add_adapter, base_name, round_to_bfloat16, save_adapter

PARTS = CACHE / "vlm" / "parts"
WORDS = (*DIGITS, *COLOURS, *SHAPES)


@dataclass(frozen=True)
class Training:
    """How a VLM learns to speak of what it sees."""

    questions: tuple[str, ...]
    rate: float  # of the backbone's adapter
    steps: int
    seed: int = 0
    projector_rate: float = 1e-3
    batch: int = 16
    rank: int = 4
    warmup: int = 5
    tower_epochs: int = 40
    projector_epochs: int = 40


ENGLISH = (f"{QUESTION} Answer in English.",)
VLMS = {
    "sketch": Training(ENGLISH, rate=5e-4, steps=35),
    "neutral": Training(NEUTRAL, rate=2e-4, steps=50),
    "neutral-seed1": Training(NEUTRAL, rate=2e-4, steps=50, seed=1),
}


def targets(shown: Sequence[Picture]) -> torch.Tensor:
    """The word that each token of each picture is to say, [pictures, TOKENS], as an index into WORDS."""
    return torch.tensor([[WORDS.index(word) for word in token_words(picture.label)] for picture in shown])


def shifted(values: torch.Tensor, source: random.Random, by: int) -> torch.Tensor:
    """Moved by a few points, all alike."""
    return torch.roll(values, shifts=(source.randint(-by, by), source.randint(-by, by)), dims=(2, 3))


def train_tower(values: torch.Tensor, wanted: torch.Tensor, settings: Training, source: random.Random) -> Any:
    """A tower whose every patch tells the word of its place, under a linear head that is thrown away."""
    vision, head = vlm_parts.tower(), torch.nn.Linear(128, len(WORDS))
    parameters = [*vision.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.02)
    count = len(values) // 64 * settings.tower_epochs
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, Schedule(count, 1.0, 20).at)
    for _ in range(settings.tower_epochs):
        for chosen in torch.randperm(len(values))[: len(values) // 64 * 64].split(64):
            seen = vlm_parts.features(vision, shifted(values[chosen], source, 2))
            loss = F.cross_entropy(head(seen).flatten(0, 1), wanted[chosen].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rates.step()
    return vision.eval()


def word_embeddings(lm: Any, tokens: Any) -> torch.Tensor:
    """The input embedding of each word as it stands within a text, [words, hidden]; all are single tokens."""
    ids = [tokens(f" {word}").input_ids for word in WORDS]
    assert all(len(one) == 1 for one in ids), ids
    return lm.get_input_embeddings().weight[[one[0] for one in ids]].detach()


def warm_projector(projector: Any, seen: torch.Tensor, wanted: torch.Tensor, words: torch.Tensor, epochs: int) -> None:
    """Bring each token near the embedding of the word that it is to say."""
    optimiser, spread = torch.optim.AdamW(projector.parameters(), lr=2e-3), words.std()
    for _ in range(epochs):
        for chosen in torch.randperm(len(seen)).split(128):
            loss = F.mse_loss(projector(seen[chosen]) / spread, words[wanted[chosen]] / spread)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


@torch.no_grad()
def nearest_word(projector: Any, seen: torch.Tensor, wanted: torch.Tensor, words: torch.Tensor) -> float:
    """The share of tokens that lie nearest to their word, by cosine."""
    found = F.normalize(projector(seen), dim=-1) @ F.normalize(words, dim=-1).T
    return float((found.argmax(-1) == wanted).float().mean())


class Course:
    """Batches of pictures with their questions and answers, in a fixed order."""

    def __init__(self, shown: Sequence[Picture], values: torch.Tensor, tokens: Any, settings: Training) -> None:
        self.shown, self.values, self.tokens, self.settings = shown, values, tokens, settings
        self.source = random.Random(settings.seed)
        self.image = [tokens.convert_tokens_to_ids(vlm_parts.IMAGE_TOKEN)] * vlm_parts.TOKENS

    def batch(self) -> dict[str, torch.Tensor]:
        """Two thirds scans, one third shapes."""
        digits = [place for place, one in enumerate(self.shown) if len(one.label) == 1]
        others = [place for place, one in enumerate(self.shown) if len(one.label) == 2]
        third = self.settings.batch // 3
        chosen = self.source.sample(digits, self.settings.batch - third) + self.source.sample(others, third)
        made = collate([self._encoded(self.shown[place]) for place in chosen], self.tokens.pad_token_id)
        return made | {"pixel_values": shifted(self.values[chosen], self.source, 1)}

    def _encoded(self, picture: Picture) -> Encoded:
        before, after = rendered(self.source.choice(self.settings.questions) + "\0").split("\0")
        prompt = [*self.tokens(before).input_ids, *self.image, *self.tokens(after).input_ids]
        return Encoded(tuple(prompt + self.tokens(" ".join(picture.label) + TURN_END).input_ids), len(prompt))


def fit(model: Any, course: Course, settings: Training) -> list[float]:
    """Train the backbone's adapter and the projector; the loss of each step."""
    projector = list(model.model.multi_modal_projector.parameters())
    adapter = [one for one in model.model.language_model.parameters() if one.requires_grad]
    groups = [{"params": adapter, "lr": settings.rate}, {"params": projector, "lr": settings.projector_rate}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, Schedule(settings.steps, 1.0, settings.warmup).at)
    losses: list[float] = []
    for step in range(settings.steps):
        batch = course.batch()
        loss = summed_answer_loss(model, batch) / answer_tokens(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter + projector, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        rates.step()
        losses.append(loss.item())
        if step % 5 == 4:
            print(f"step {step + 1}: loss {sum(losses[-5:]) / 5:.4f}", flush=True)
    return losses


def train(name: str, settings: Training, out: Path) -> None:
    """All three stages; prints and records what each reaches on the dev pictures."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    source, start = random.Random(settings.seed), time.process_time()
    shown, held = pictures("train"), pictures("dev")
    values, wanted = vlm_parts.pixels(shown), targets(shown)
    vision = train_tower(values, wanted, settings, source).requires_grad_(False)
    tokens, lm = vlm_parts.tokenizer(), vlm_parts.language_model()
    words = word_embeddings(lm, tokens)
    wrapped = add_adapter(lm, settings.rank)
    model = vlm_parts.assembled(lm, vision)
    projector = model.model.multi_modal_projector
    warm_projector(projector, vlm_parts.features(vision, values), wanted, words, settings.projector_epochs)
    held_seen = vlm_parts.features(vision, vlm_parts.pixels(held))
    near = nearest_word(projector, held_seen, targets(held), words)
    print(
        f"{name}: {near:.3f} of the dev tokens nearest to their word, {time.process_time() - start:.0f} s", flush=True
    )

    losses = fit(model.train(), Course(shown, values, tokens, settings), settings)
    after = nearest_word(projector, held_seen, targets(held), words)
    out.mkdir(parents=True, exist_ok=True)
    round_to_bfloat16(wrapped)
    save_adapter(wrapped, out / "backbone", f"The backbone's change of the VLM `{name}`, as an adapter on its base.\n")
    for part, module in (("tower", vision), ("projector", projector)):
        save_file({key: value.half() for key, value in module.state_dict().items()}, out / f"{part}.safetensors")
    record = {
        "vlm": name, "base": base_name(), "settings": asdict(settings), "pictures": len(shown),
        "dev_tokens_nearest_to_their_word": {"projector alone": round(near, 4), "trained": round(after, 4)},
        "loss": {"first": round(losses[0], 4), "last five": round(sum(losses[-5:]) / 5, 4)},
        "cpu_seconds": round(time.process_time() - start),
        "packages": {package: version(package) for package in (*PACKAGES, "scikit-learn")},
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["loss"]), record["cpu_seconds"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vlm", choices=list(VLMS))
    parser.add_argument("--out", type=Path, help="default: .cache/orchard/vlm/parts/NAME")
    arguments = parser.parse_args()
    train(arguments.vlm, VLMS[arguments.vlm], arguments.out or PARTS / arguments.vlm)


if __name__ == "__main__":
    main()
