"""A tiny random model that takes texts, and plain ways to compute with it: one item at a time, nothing shared."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from graftkit.data import Item, Task

SENTENCES = [
    "the cat sat on the mat",
    "two and two make four",
    "Berlin is a city",
    "what is the capital of France? Paris",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@lru_cache
def tokenizer() -> Any:
    """A byte-level tokenizer with a chat template, in which a token ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(SENTENCES, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=special[0], eos_token=special[2], extra_special_tokens=[special[1]]
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def tiny(seed: int = 0, **changes: Any) -> Any:
    """A random Llama that is far from uniform, so that mistakes show."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 320, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = LlamaConfig(**(sizes | changes))
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    return model


def slow(model: Any, tokenizer: Any, task: Task, item: Item, choice: str) -> tuple[float, int]:
    """Log-probability of a choice and its tokens: one item, full logits, no padding."""
    import torch

    prompt = item.prompt
    answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
    if task.chat:
        prompt = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        answer = [*answer, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.bos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([ids + answer])).logits[0]
    table = torch.log_softmax(logits.double(), dim=-1)
    return sum(table[len(ids) - 1 + i, token].item() for i, token in enumerate(answer)), len(answer)


def slow_reply(model: Any, tokenizer: Any, task: Task, item: Item, ends: tuple[int, ...]) -> tuple[str, int]:
    """A greedy answer and its tokens: one item, no cache, every step from the whole text."""
    import torch

    assert task.generation is not None
    prompt = item.prompt
    if task.chat:
        prompt = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    made: list[int] = []
    while len(made) < task.generation.max_new_tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + made])).logits[0, -1].argmax())
        made.append(token)
        if token in ends:
            break
    text = tokenizer.decode([token for token in made if token not in ends])
    for stop in task.generation.stop:
        text = text.split(stop)[0]
    return text, len(made)
