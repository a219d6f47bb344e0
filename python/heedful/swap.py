"""Putting heedful into models that exist: swap() for modules, patched() for calls of scaled_dot_product_attention."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .nn import MultiheadAttention
from .sdpa import scaled_dot_product_attention


@dataclass(frozen=True, repr=False)
class Swapped:
    """What `swap` did, by module name ("" is the model itself). Its repr says it in words."""

    replaced: tuple[str, ...]  # now heedful.nn.MultiheadAttention
    left: dict[str, str]  # torch.nn.MultiheadAttention still, and why
    fast_paths: tuple[str, ...]  # torch's layers whose native fast path, which bypasses their modules, is now off

    def __repr__(self) -> str:
        def say(name: str, note: str = "") -> str:
            return f"  {name or '(the model itself)'}{note}"

        lines = [f"heedful.swap: {len(self.replaced)} torch.nn.MultiheadAttention replaced"]
        lines += [say(name) for name in self.replaced]
        if self.left:
            lines.append(f"{len(self.left)} left as they are")
            lines += [say(name, f": {reason}") for name, reason in self.left.items()]
        if self.fast_paths:
            lines.append(f"{len(self.fast_paths)} native fast paths turned off")
            lines += [say(name) for name in self.fast_paths]
        return "\n".join(lines)


def swap(model: torch.nn.Module) -> Swapped:
    """Turns every torch.nn.MultiheadAttention in `model`, itself included, into heedful's, in place.

    Each module stays the very object it was and only its class changes. So parameters, buffers, hooks, training flag,
    device and dtype are untouched, an optimizer made before goes on working, and a module used in two places stays
    shared. Not touched, and listed with the reason: subclasses (parametrized and quantizable ones are such) and modules
    whose `forward` was replaced on the instance.

    torch.nn.TransformerEncoderLayer and torch.nn.TransformerEncoder have native fast paths that bypass the modules
    inside them (in eval, without grad): these are turned off. Padded positions of the encoder's output then
    hold values, as they do in training, where that fast path writes zeros.

    Returns what was replaced, what was not, and why; print it. A second call finds nothing left to replace.

    Raises TypeError where `model` is not a torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"heedful.swap: model: expected a torch.nn.Module, got {type(model).__name__}")
    replaced, left = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.MultiheadAttention) or isinstance(module, MultiheadAttention):
            continue
        if type(module) is not torch.nn.MultiheadAttention:
            left[name] = f"{type(module).__name__} is a subclass of torch.nn.MultiheadAttention"
        elif "forward" in vars(module):
            left[name] = "its forward was replaced on the instance"
        else:
            module.__class__ = MultiheadAttention
            replaced.append(name)
    return Swapped(
        replaced=tuple(replaced),
        left=left,
        fast_paths=tuple(name for name, module in model.named_modules() if _turn_off_fast_path(module)),
    )


def _turn_off_fast_path(module: torch.nn.Module) -> bool:
    """Turns off the native fast path of a layer, or stack of layers, around heedful's attention; was it on?"""
    if isinstance(module, torch.nn.TransformerEncoderLayer) and isinstance(
        getattr(module, "self_attn", None), MultiheadAttention
    ):
        # The layer reads this only to choose the fast path; what it computes with is `activation`.
        was_on, module.activation_relu_or_gelu = bool(module.activation_relu_or_gelu), 0
        return was_on
    if isinstance(module, torch.nn.TransformerEncoder) and any(
        isinstance(m, MultiheadAttention) for m in module.modules()
    ):
        # Set, it packs a padded batch into a nested tensor before the first layer.
        was_on, module.use_nested_tensor = getattr(module, "use_nested_tensor", False), False
        return was_on
    return False


def _with_globals(function: types.FunctionType, **names: object) -> types.FunctionType:
    """A copy of a function that sees `names`, and itself under its own name, in place of its module's globals.

    A torch function mode is off while it handles a call. F.multi_head_attention_forward, which torch's
    MultiheadAttention calls, is handled as a whole, so the attention inside it would pass unseen.
    """
    copy = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__
    )
    copy.__globals__[function.__name__] = copy
    return copy


_ROUTES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: _with_globals(
        F.multi_head_attention_forward, scaled_dot_product_attention=scaled_dot_product_attention
    ),
}


class _Routed(TorchFunctionMode):
    """Sends torch's attention to heedful's, and every other call where it was going."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _ROUTES.get(func, func)(*args, **(kwargs or {}))


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Within it, torch.nn.functional.scaled_dot_product_attention is heedful's. Also a decorator.

    However the function was imported, calls made by this thread are routed: they pass a torch function mode. torch's
    own MultiheadAttention is included, where it needs no weights; its native fast paths are off within. Calls from C++
    and from other threads are not. What heedful does not support raises, and is not sent back to torch.

    torch.compile sees it, around a compiled function (which is compiled once more for use within) and inside one.
    Every call of a torch function within pays some Python, a microsecond or two: `swap` has no such cost.
    """
    with _Routed():
        yield
