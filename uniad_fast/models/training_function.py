"""Forward and backward pass of UniAD's transformer as one function of autograd's, written for few launches.

Layer by layer, autograd adds gradients up, cuts them out of larger zeros and casts every parameter by itself: more
kernels than the layers have. Here parameters are cast and stacked together, a product reads several of them in a row,
sums go into what is there already, and a position is projected once for all layers: (x + p) W^T + b = x W^T + T, where
the table T = p W^T + b does not know the batch.

B batch, N tokens, C width, R = B * N rows. Parameters come in the order of modules that `training_pass` reads.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.dispatch import launchers
from ..ops.geometry import Window
from ..ops.linear import add_product, product
from ..ops.noise import draw_seeds
from .stacked_parameters import Parameters, Stacked, gradients_of_parameters


class AttentionPlan(NamedTuple):
    window: Window
    dropout_p: float


class LayerPlan(NamedTuple):
    """attentions: one in the encoder, two in the decoder. eps: of the norms, one more than attentions."""

    attentions: tuple[AttentionPlan, ...]
    dropout_p: float
    eps: tuple[float, ...]


class Plan(NamedTuple):
    """What modules say besides their parameters."""

    encoder: tuple[LayerPlan, ...]
    decoder: tuple[LayerPlan, ...]
    heads: int
    impl: str

    def noise_rows(self, tokens: int) -> list[int]:
        """Planes or rows of an image in every noise that is drawn, in the order of layers and what they call."""
        rows = []
        for layer in (*self.encoder, *self.decoder):
            for attention in layer.attentions:
                rows += [self.heads] * (attention.dropout_p > 0) + [tokens] * (layer.dropout_p > 0)
            rows += [tokens, tokens] * (layer.dropout_p > 0)
        return rows


class TransformerFunction(torch.autograd.Function):
    """(tokens [B, N, C], position [N, C], plan, parameters) -> the decoder's output before its norm, [B, N, C]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, position: Tensor, plan: Plan, *parameters: Tensor) -> Tensor:
        ctx.plan, ctx.shape = plan, tokens.shape
        with torch.autocast(tokens.device.type, enabled=False):
            stacked = Stacked.of(parameters, (len(plan.encoder), len(plan.decoder)), tokens.dtype)
            walk = _Walk(plan, tokens.shape, stacked, [])
            out = walk.forward(tokens.reshape(-1, tokens.shape[-1]), position)
        ctx.save_for_backward(position, *parameters, *stacked.tensors, *walk.kept)
        return out.view(tokens.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        position, *saved = ctx.saved_tensors
        counts = len(ctx.plan.encoder), len(ctx.plan.decoder)
        stacked, kept = Stacked.from_saved(saved, counts)
        with torch.autocast(position.device.type, enabled=False):
            walk = _Walk(ctx.plan, ctx.shape, stacked, kept)
            gradient = walk.backward(out_gradient.reshape(-1, out_gradient.shape[-1]), position)
            parameters = gradients_of_parameters(stacked, walk.encoder_gradients, walk.decoder_gradients)
        wanted = ctx.needs_input_grad[3:]
        return (
            gradient.view(ctx.shape),
            walk.position_gradient if ctx.needs_input_grad[1] else None,
            None,
            *(g if want else None for g, want in zip(parameters, wanted, strict=True)),
        )


class _Walk:
    """One way through the layers; `kept` is what the way forward leaves for the way back, last first."""

    def __init__(self, plan: Plan, shape: Sequence[int], stacked: Stacked, kept: list[Tensor | None]) -> None:
        self.plan, self.stacked, self.kept = plan, stacked, kept
        self.batch, self.tokens, self.width = shape
        self.kernels = launchers(plan.impl)
        self.scale = 1 / math.sqrt(self.width // plan.heads)
        self.seeds: Iterator[Tensor] = iter(())
        self.encoder_gradients: list[Parameters] = []
        self.decoder_gradients: list[Parameters] = []
        self.position_gradient: Tensor | None = None

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Rows [R, C] -> rows [R, C]."""
        self.seeds = iter(draw_seeds(x.device, self.plan.noise_rows(self.tokens)))
        stacked = self.stacked
        table = stacked.project_position(position)
        for i, (plan, w) in enumerate(zip(self.plan.encoder, stacked.encoder, strict=True)):
            heads = self._heads(self._project(x, w.in_weight, table[:, stacked.rows.encoder(i)]))
            x = self._end(self._attend(heads, w.out, plan.attentions[0]), x, w.norm1, plan, 0)
            x = self._feed_forward(x, w.ffn, w.last_norm, plan)
        # All attentions to the encoder's output: every layer's first, and the first layer's second.
        memory = self._heads(self._project(x, stacked.memory_weight, table[:, stacked.rows.memory]))
        for i, (plan, v) in enumerate(zip(self.plan.decoder, stacked.decoder, strict=True)):
            query = table[:, stacked.rows.first(i)].unflatten(1, (self.plan.heads, -1)).transpose(0, 1)[None]
            out = self._attend((query, *memory[2 * i : 2 * i + 2]), v.out, plan.attentions[0])
            before, x = x, self._end(out, stacked.embeds[i], v.norm1, plan, 0)
            query = self._heads(self._project(x, stacked.second_query(i), table[:, stacked.rows.second(i)]))[0]
            heads = memory[-2:]
            if i > 0:
                heads = self._heads(self._project(before, stacked.later_weight(i), table[:, stacked.rows.later(i)]))
            x = self._end(self._attend((query, *heads), v.second_out, plan.attentions[1]), x, v.norm2, plan, 1)
            x = self._feed_forward(x, v.ffn, v.last_norm, plan)
        return x

    def backward(self, gradient: Tensor, position: Tensor) -> Tensor:
        """Gradient of the rows that came out -> of those that went in; fills the other gradients."""
        stacked, width = self.stacked, self.width
        stacked.begin_backward(self.tokens)
        memory = gradient.new_empty(len(gradient), stacked.memory_weight.shape[0])
        memory_heads = self._heads(memory)
        queries, embeds = [], []
        for i in reversed(range(len(self.plan.decoder))):
            plan, v = self.plan.decoder[i], stacked.decoder[i]
            gradient, *ffn = self._feed_forward_backward(gradient, v.ffn, plan)
            out, gradient, *norm2 = self._end_backward(gradient, plan)
            query = gradient.new_empty(len(gradient), width)
            other = gradient.new_empty(len(gradient), 2 * width) if i > 0 else None
            heads = memory_heads[-2:] if other is None else self._heads(other)
            own = (*self._heads(query), *heads)
            _, *second = self._attend_backward(out, v.second_out[0], plan.attentions[1], own)
            before = None
            if other is not None:
                before = self._unproject(other, stacked.later_weight(i), stacked.rows.later(i))
            gradient = self._unproject(query, stacked.second_query(i), stacked.rows.second(i), gradient)
            out, embed, *norm1 = self._end_backward(gradient, plan)
            into = (None, *memory_heads[2 * i : 2 * i + 2])
            of_query, *first = self._attend_backward(out, v.out[0], plan.attentions[0], into)
            queries.append(of_query[0].transpose(0, 1))
            embeds.append(embed)
            self.decoder_gradients.insert(0, [*first, *second, *ffn[:4], *norm1, *norm2, *ffn[4:]])
            if before is not None:
                gradient = before
        gradient = self._unproject(memory, stacked.memory_weight, stacked.rows.memory)
        for i in reversed(range(len(self.plan.encoder))):
            plan, w = self.plan.encoder[i], stacked.encoder[i]
            gradient, *ffn = self._feed_forward_backward(gradient, w.ffn, plan)
            out, gradient, *norm1 = self._end_backward(gradient, plan)
            together = gradient.new_empty(len(gradient), 3 * width)
            _, *attention = self._attend_backward(out, w.out[0], plan.attentions[0], self._heads(together))
            gradient = self._unproject(together, w.in_weight, stacked.rows.encoder(i), gradient)
            self.encoder_gradients.insert(0, [*attention, *ffn[:4], *norm1, *ffn[4:]])
        self.position_gradient = stacked.end_backward(position, queries[::-1], embeds[::-1])
        return gradient

    def _project(self, x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
        """x [R, C] times weight [O, C], plus table [N, O] for every element of the batch: [R, O]."""
        self.kept.append(x)
        out = product(x, weight, None)
        out.view(self.batch, self.tokens, -1).add_(table)
        return out

    def _unproject(self, gradient: Tensor, weight: Tensor, rows: slice, total: Tensor | None = None) -> Tensor:
        """Backward of `_project`: the gradient of x, added to `total` where there is one."""
        (x,) = self._take(1)
        table, weights = self.stacked.table_gradient, self.stacked.weight_gradient
        torch.sum(gradient.view(self.batch, self.tokens, -1), 0, out=table[:, rows])
        product(gradient.t(), x.t(), None, out=weights[rows])
        return product(gradient, weight.t(), None) if total is None else add_product(total, gradient, weight.t())

    def _heads(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows [R, k * C] -> k views [B, heads, N, head_dim]."""
        parts = rows.view(self.batch, self.tokens, -1, self.plan.heads, self.width // self.plan.heads)
        return parts.permute(2, 0, 3, 1, 4).unbind()

    def _attend(self, heads: tuple[Tensor, ...], out_proj: Parameters, plan: AttentionPlan) -> Tensor:
        """Query, key and value in heads -> output projection, rows [R, C]."""
        seed = next(self.seeds) if plan.dropout_p > 0 else None
        out, stats = self.kernels.attention_forward(*heads, plan.window, plan.dropout_p, self.scale, seed)
        self.kept += [*heads, out, stats, seed]
        return product(self._merged(out), *out_proj)

    def _attend_backward(
        self, gradient: Tensor, weight: Tensor, plan: AttentionPlan, into: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the query and of the output projection's parameters; query, key and value's go `into` views."""
        *heads, out, stats, seed = self._take(6)
        merged = product(gradient, weight.t(), None).view(self.batch, self.tokens, self.plan.heads, -1).transpose(1, 2)
        arguments = (merged, *heads, out, stats, plan.window, plan.dropout_p, self.scale, seed)
        query, *_ = self.kernels.attention_backward_into(*arguments, into)
        weight_gradient = product(gradient.t(), self._merged(out).t(), None)
        return query, weight_gradient, gradient.sum(0, dtype=torch.float32)

    def _merged(self, out: Tensor) -> Tensor:
        return out.transpose(1, 2).reshape(-1, self.width)

    def _feed_forward(self, x: Tensor, ffn: Parameters, norm: Parameters, plan: LayerPlan) -> Tensor:
        hidden = product(x, *ffn[:2])
        seed = next(self.seeds) if plan.dropout_p > 0 else None
        hidden = self.kernels.dropout_forward(hidden, plan.dropout_p, True, seed)
        self.kept += [x, hidden, seed]
        return self._end(product(hidden, *ffn[2:]), x, norm, plan, -1)

    def _feed_forward_backward(self, gradient: Tensor, ffn: Parameters, plan: LayerPlan) -> tuple[Tensor, ...]:
        """Gradients of x, weight1, bias1, weight2, bias2, and of the norm's weight and bias."""
        out, gradient, *norm = self._end_backward(gradient, plan)
        x, hidden, seed = self._take(3)
        weight2, bias2 = product(out.t(), hidden.t(), None), out.sum(0, dtype=torch.float32)
        out = product(out, ffn[2].t(), None)
        out = self.kernels.dropout_backward(out, hidden, plan.dropout_p, True, seed)
        weight1, bias1 = product(out.t(), x.t(), None), out.sum(0, dtype=torch.float32)
        return add_product(gradient, out, ffn[0].t()), weight1, bias1, weight2, bias2, *norm

    def _end(self, out: Tensor, residual: Tensor, norm: Parameters, plan: LayerPlan, number: int) -> Tensor:
        """LayerNorm(residual + dropout(out)), by the layer's norm of this number."""
        seed = next(self.seeds) if plan.dropout_p > 0 else None
        arguments = (out, residual, *norm, plan.dropout_p, plan.eps[number], seed)
        normed, stats = self.kernels.norm_forward(*arguments)
        self.kept += [out, residual, norm[0], stats, seed]
        return normed

    def _end_backward(self, gradient: Tensor, plan: LayerPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of out, of the residual, and of the norm's weight and bias."""
        *tensors, seed = self._take(5)
        return self.kernels.norm_backward(gradient, *tensors, plan.dropout_p, seed)

    def _take(self, count: int) -> list[Any]:
        taken = self.kept[-count:]
        del self.kept[-count:]
        return taken
