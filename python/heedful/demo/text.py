"""The text that the demo learns: the Python language's own documentation, which every Python carries."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWN = re.compile(r"^\||([-=*^~+])\1{3}")  # tables and rules: blanks and dashes, which would fill the samples


@dataclass(frozen=True)
class Corpus:
    """A text as numbers, one for each character."""

    characters: str  # the vocabulary, sorted
    codes: Tensor  # int64 [characters of the text]

    def encode(self, text: str) -> Tensor:
        """int64 [len(text)]; ValueError for a character that the corpus does not have."""
        codes = [self.characters.find(c) for c in text]
        if -1 in codes:
            raise ValueError(f"heedful.demo: text: {text[codes.index(-1)]!r} is not in the corpus")
        return torch.tensor(codes, dtype=torch.int64)

    def decode(self, codes: Tensor) -> str:
        """The text of int64 [n]."""
        return "".join(self.characters[i] for i in codes.tolist())

    def batches(self, count: int, size: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` random batches: characters, and those that follow them, both int64 [size, length]."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            starts = torch.randint(len(self.codes) - length, (size, 1), generator=generator)
            windows = self.codes[starts + torch.arange(length + 1)]
            yield windows[:, :-1], windows[:, 1:]


def load() -> Corpus:
    """All topics of `help()`, in alphabetical order, without tables, rules and trailing blanks."""
    from pydoc_data.topics import topics

    lines = "\n\n".join(topics[name] for name in sorted(topics)).splitlines()
    text = "\n".join(line.rstrip() for line in lines if not DRAWN.search(line))
    characters = "".join(sorted(set(text)))
    codes = {c: i for i, c in enumerate(characters)}
    return Corpus(characters, torch.tensor([codes[c] for c in text], dtype=torch.int64))
