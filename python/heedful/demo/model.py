"""A character-level GPT made of torch's own layers; nothing in it knows of heedful."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CharacterGPT(nn.Module):
    """Characters, int64 [B, S] -> logits of the next character, [B, S, vocabulary].

    Each input is a sum of what is learned for the character, for the two before it and for the position. (Those before
    save some hundred steps, in which attention would learn to look one character back.)
    """

    def __init__(self, vocabulary: int, length: int = 256, width: int = 128, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.length = length
        self.characters = nn.ModuleList(nn.Embedding(vocabulary, width) for _ in range(3))
        self.positions = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        for embedding in (*self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        length = codes.shape[1]
        x = self.positions.weight[:length]
        for back, embedding in enumerate(self.characters):
            x = x + embedding(F.pad(codes, (back, 0))[:, :length])
        return self.head(self.layers(x, mask=self.mask[:length, :length], is_causal=True))


@torch.no_grad()
def generate(model: CharacterGPT, codes: Tensor, count: int, temperature: float = 0.6, seed: int = 0) -> Tensor:
    """Draws `count` characters after the prompt `codes`, int64 [n]; returns prompt and sample, int64 [n + count]."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = model(codes[None, -model.length :])[0, -1]
        drawn = torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator)
        codes = torch.cat([codes, drawn])
    return codes


@torch.no_grad()
def attention_maps(model: CharacterGPT, codes: Tensor) -> Tensor:
    """What the attention modules give as their weights for one text, int64 [S] -> [layers, heads, S, S]."""
    model.eval()
    maps: list[Tensor] = []
    with _weights_into(maps, [layer.self_attn for layer in model.layers.layers]):
        model(codes[None])
    return torch.cat(maps)


@contextmanager
def _weights_into(maps: list[Tensor], modules: list[nn.Module]) -> Iterator[None]:
    """Within it, the attention modules are asked for the weights of each head, and these are collected, in order."""

    def ask(module: nn.Module, arguments: tuple, options: dict) -> tuple[tuple, dict]:
        return arguments, options | {"need_weights": True, "average_attn_weights": False}

    def collect(module: nn.Module, arguments: tuple, result: tuple[Tensor, Tensor]) -> None:
        maps.append(result[1])

    hooks = [m.register_forward_pre_hook(ask, with_kwargs=True) for m in modules]
    hooks += [m.register_forward_hook(collect) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
