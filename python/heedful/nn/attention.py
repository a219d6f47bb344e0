"""heedful.nn.MultiheadAttention: the parameters of torch.nn.MultiheadAttention, computed by heedful."""

from __future__ import annotations

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import attention
from ..masks import Causal


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with heedful's attention inside.

        MultiHead(Q, K, V) = Concat(head_1, .., head_H) W_o,   head_h = attention(Q W_q^h, K W_k^h, V W_v^h)

    Constructor, initialisation and state_dict are inherited, so checkpoints, optimizers and `isinstance` checks do
    not see a difference. q, k and v reach the kernel as views of the projections, boolean masks stay boolean
    (`key_padding_mask` stays [N, 1, 1, S]), and float masks are read in place as a bias, with its gradient.

    What differs from torch:
    - A query that may attend to nothing gets an attention output of 0 and weights of 0, and no gradient flows
      through it. (torch gives NaN where weights are asked for, and in its native fast path.)
    - `is_causal=True` with `need_weights=False` is taken at its word: a top-left causal mask replaces `attn_mask`,
      which is not read, and `key_padding_mask` is applied beside it. With `add_bias_kv` or `add_zero_attn`
      `attn_mask` is read instead, as the appended keys are visible to every query. (torch hides them under the hint.)
    - `is_causal=True` without `attn_mask` raises in every mode. (torch's native fast path ignores the hint there.)
    - A boolean mask beside a float mask is no cause for a warning.
    - Dropout in training follows torch.manual_seed, but drops other weights than torch does. (As in torch, the weights
      that `need_weights=True` returns are those after dropout.)
    - Nested tensors raise.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `query` over `key` and `value`; the arguments are those of torch.nn.MultiheadAttention.

        Shapes (batch first; [L, N, E] otherwise; N absent for unbatched input): query [N, L, E], key [N, S, kdim],
        value [N, S, vdim]; key_padding_mask [N, S] and attn_mask [L, S] or [N * heads, L, S], boolean (True = may not
        attend) or floating (added to the scores).

        Returns the output [N, L, E] and None, or with `need_weights` the dense weights, differentiable: their mean over
        the heads [N, L, S], or [N, heads, L, S] where `average_attn_weights` is False.

        Errors: those of torch (AssertionError for shapes and dtypes, RuntimeError for the sizes of `attn_mask`).
        """
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        dropout = self.dropout if self.training else 0.0

        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        # From here on [N, S, heads, D].

        appended = (self.bias_k is not None) + self.add_zero_attn
        causal = is_causal and not need_weights and not appended
        mask, bias = self._masks(q, k, None if causal else attn_mask, key_padding_mask, appended)
        if causal:
            mask = Causal() if mask is None else Causal() & mask
        if self.bias_k is not None:
            k = torch.cat([k, self._heads(self.bias_k).expand(k.shape[0], -1, -1, -1)], dim=1)
            v = torch.cat([v, self._heads(self.bias_v).expand(v.shape[0], -1, -1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))

        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        weights = _weights(q, k, mask, bias) if need_weights else None
        if weights is not None and dropout > 0.0:  # the weights that are returned are those that are used
            weights = F.dropout(weights, dropout)
            out = weights @ v
        else:
            out = attention(q, k, v, mask=mask, bias=bias, align="top-left", dropout_p=dropout)
        out = out.transpose(1, 2).flatten(2)  # [N, L, E]: a view, for the kernel's output has q's layout.

        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            out = out.squeeze(0)
            weights = None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1).contiguous()  # One copy, as torch makes, is quicker than a GEMM of strided rows.
        return F.linear(out, self.out_proj.weight, self.out_proj.bias), weights

    def merge_masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor
    ) -> tuple[Tensor | None, int | None]:
        """Raises: torch calls this only to bypass `forward` by a native kernel of its own, unseen."""
        raise RuntimeError(
            "heedful.nn.MultiheadAttention: the native fast path of the layer around this module would bypass it. "
            "heedful.swap(model) turns that fast path off."
        )

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """What torch checks, with the exceptions that torch raises; sizes of masks are checked where they are read."""
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
        if query.is_nested or key.is_nested or value.is_nested:
            raise AssertionError(
                "heedful.nn.MultiheadAttention does not support nested tensors. Where torch.nn.TransformerEncoder "
                "makes them, heedful.swap(encoder) turns that off."
            )
        F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        if self.in_proj_weight is not None:
            if key.shape != value.shape:
                raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        else:
            if key.shape[:-1] != value.shape[:-1]:
                raise AssertionError(
                    f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}"
                )
            for name, x, dim in (("key", key, self.kdim), ("value", value, self.vdim)):
                if x.shape[-1] != dim:
                    raise AssertionError(f"expecting {name} embedding dimension of {dim}, but got {x.shape[-1]}")

    def _heads(self, x: Tensor) -> Tensor:
        """[.., E] -> [.., heads, D]."""
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[.., E] each -> [.., heads, D] each: one GEMM for arguments that are the same tensor, no copy after it."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value and weight is not None:
            parts = F.linear(query, weight, bias).chunk(3, dim=-1)
        elif key is value and weight is not None:
            sizes = [self.embed_dim, 2 * self.embed_dim]
            (w_q, w_kv), (b_q, b_kv) = weight.split(sizes), (None, None) if bias is None else bias.split(sizes)
            parts = F.linear(query, w_q, b_q), *F.linear(key, w_kv, b_kv).chunk(2, dim=-1)
        else:
            weights = (
                (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.chunk(3)
            )
            biases = (None, None, None) if bias is None else bias.chunk(3)
            parts = map(F.linear, (query, key, value), weights, biases)
        q, k, v = map(self._heads, parts)
        return q, k, v

    def _masks(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, appended: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """torch's masks -> (boolean mask, True = attend; bias), each broadcastable to [N, heads, L, S + appended]."""
        (n, queries, heads, _), keys = q.shape, k.shape[1]
        masks = []
        if attn_mask is not None:
            dims = attn_mask.dim()
            expected = (queries, keys) if dims == 2 else (n * heads, queries, keys)
            if attn_mask.shape != expected:
                raise RuntimeError(
                    f"The shape of the {dims}D attn_mask is {attn_mask.shape}, but should be {expected}."
                )
            masks.append(attn_mask[None, None] if dims == 2 else attn_mask.view(n, heads, queries, keys))
        if key_padding_mask is not None:
            if key_padding_mask.shape != (n, keys):
                raise AssertionError(
                    f"Expected key_padding_mask.shape to be {(n, keys)}, but got {key_padding_mask.shape}"
                )
            masks.append(key_padding_mask[:, None, None])
        masks = [F.pad(m, (0, appended)) for m in masks] if appended else masks  # Nothing hides an appended key.
        allowed = [~m for m in masks if m.dtype == torch.bool]
        biases = [m for m in masks if m.dtype != torch.bool]
        return (
            functools.reduce(operator.and_, allowed) if allowed else None,
            functools.reduce(operator.add, biases) if biases else None,
        )


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) where mask allows, [N, heads, L, S]; 0 in a row with nothing to attend to."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = (scores + bias).masked_fill(bias == -torch.inf, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if bias is None and mask is None:
        return scores.softmax(dim=-1).to(q.dtype)
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0).to(q.dtype)
