"""The parameters of UniAD's transformer as `training_function` takes them: cast together, and stacked where one product
reads several; and the way back, from the gradients of stacks to those of parameters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.linear import product

Parameters = Sequence[Tensor]
"""Weight and bias of each of so many modules, one module after the other."""

_ALIGNED = 64  # elements between the beginnings of two tensors in one allocation


class EncoderWeights(NamedTuple):
    """Of an encoder layer, all but the input projection's bias, which is in the table. Norms are in float32."""

    in_weight: Tensor
    out: Parameters
    ffn: Parameters
    norm1: Parameters
    last_norm: Parameters


class DecoderWeights(NamedTuple):
    """Of a decoder layer, all but what is read from stacks."""

    later_in_weight: Tensor
    out: Parameters
    second_out: Parameters
    ffn: Parameters
    norm1: Parameters
    norm2: Parameters
    last_norm: Parameters


# How many parameters a layer has; see `training_pass` for their order.
_ENCODER, _DECODER = 12, 19


class Rows:
    """Where the rows of all input projections lie in their stack: of the encoder's layers all three, then queries of
    the decoder's first attentions, of its second ones, keys and values of the encoder's output, and those of the second
    attentions of the layers after the first.
    """

    def __init__(self, width: int, counts: tuple[int, int]) -> None:
        encoder, decoder = counts
        self.width, self.counts = width, counts
        self._second = 3 * encoder + decoder
        self._memory = self._second + decoder
        self._later = self._memory + 2 * (decoder + 1)
        self.memory = self._slice(self._memory, 2 * (decoder + 1))
        self.queries = self._slice(3 * encoder, 2 * decoder)
        self.firsts = self._slice(3 * encoder, decoder)
        self.keys_and_values = self._slice(self._memory, 4 * decoder)
        self.total = (self._later + 2 * (decoder - 1)) * width

    def _slice(self, place: int, count: int) -> slice:
        return slice(place * self.width, (place + count) * self.width)

    def encoder(self, layer: int) -> slice:
        return self._slice(3 * layer, 3)

    def first(self, layer: int) -> slice:
        return self._slice(3 * self.counts[0] + layer, 1)

    def second(self, layer: int) -> slice:
        return self._slice(self._second + layer, 1)

    def first_memory(self, layer: int) -> slice:
        """Of the first attention's key and value."""
        return self._slice(self._memory + 2 * layer, 2)

    def later(self, layer: int) -> slice:
        """Of the second attention's key and value; the first layer's are of the encoder's output."""
        return self._slice(self._memory + 2 * (self.counts[1] + layer), 2)


class Stacked:
    """Parameters in the dtype that is computed in.

    tensors: the stacks. position_weight [M, C]: the rows of `Rows`, those of values zero, for a position is added to
    queries and keys alone; bias [M]; memory_weight: keys and values of the encoder's output; embeds: the learned
    queries [layers, N, C]; then every parameter that is read by itself.
    """

    def __init__(self, parameters: Sequence[Tensor], counts: tuple[int, int], tensors: Sequence[Tensor]) -> None:
        self.parameters, self.counts, self.tensors = parameters, counts, tensors
        self.position_weight, self.bias, self.memory_weight, self.embeds, *own = tensors
        self.rows = Rows(self.position_weight.shape[1], counts)
        encoder, decoder = _by_layer(own, counts)
        self.encoder = [EncoderWeights(w[0], w[2:4], w[4:8], w[8:10], w[10:12]) for w in encoder]
        self.decoder = [
            DecoderWeights(w[5], w[3:5], w[7:9], w[9:13], w[13:15], w[15:17], w[17:19]) for w in decoder
        ]  # fmt: skip

    @classmethod
    def of(cls, parameters: Sequence[Tensor], counts: tuple[int, int], dtype: torch.dtype) -> "Stacked":
        parameters = [parameter.detach() for parameter in parameters]
        first = parameters[0]
        width = first.shape[-1]
        rows, (encoder, decoder) = Rows(width, counts), _by_layer(parameters, counts)
        embeds = first.new_empty(counts[1], *decoder[0][0].shape, dtype=dtype)
        position_weight = first.new_zeros(rows.total, width, dtype=dtype)
        bias = first.new_empty(rows.total, dtype=dtype)
        memory_weight = first.new_empty(2 * (counts[1] + 1) * width, width, dtype=dtype)
        pairs: list[tuple[Tensor, Tensor]] = []
        for i, w in enumerate(encoder):
            pairs += [(position_weight[rows.encoder(i)][: 2 * width], w[0][: 2 * width]), (bias[rows.encoder(i)], w[1])]
        for i, w in enumerate(decoder):
            pairs.append((embeds[i], w[0]))
            for weight, in_bias, query, others in (
                (w[1], w[2], rows.first(i), rows.first_memory(i)),
                (w[5], w[6], rows.second(i), rows.later(i)),
            ):
                pairs += [(position_weight[query], weight[:width]), (bias[query], in_bias[:width])]
                pairs += [(position_weight[others][:width], weight[width : 2 * width]), (bias[others], in_bias[width:])]
            pairs.append((memory_weight[2 * width * i : 2 * width * (i + 1)], w[1][width:]))
        pairs.append((memory_weight[2 * width * counts[1] :], decoder[0][5][width:]))
        own = _cast(parameters, counts, dtype, pairs)
        into, out_of = zip(*pairs, strict=True)
        torch._foreach_copy_(list(into), list(out_of))
        return cls(parameters, counts, [position_weight, bias, memory_weight, embeds, *own])

    @classmethod
    def from_saved(cls, saved: Sequence[Tensor], counts: tuple[int, int]) -> tuple["Stacked", list[Tensor | None]]:
        """(what `of` made, what is saved after it), of saved parameters, tensors and others."""
        number = _ENCODER * counts[0] + _DECODER * counts[1]
        end = 2 * number + 4
        return cls(saved[:number], counts, saved[number:end]), list(saved[end:])

    def project_position(self, position: Tensor) -> Tensor:
        """position [N, C] -> the table [N, M]; the decoder's first queries are in it, their learned part too."""
        table = torch.addmm(self.bias, position, self.position_weight.t())
        first = _layers(table[:, self.rows.firsts], self.counts[1])
        first.baddbmm_(self.embeds, self._first_weight().transpose(1, 2))
        return table

    def second_query(self, layer: int) -> Tensor:
        return self.position_weight[self.rows.second(layer)]

    def later_weight(self, layer: int) -> Tensor:
        return self.decoder[layer].later_in_weight[self.rows.width :]

    def begin_backward(self, tokens: int) -> None:
        self.table_gradient = self.bias.new_empty(tokens, self.rows.total)
        self.weight_gradient = torch.empty_like(self.position_weight)

    def end_backward(self, position: Tensor, queries: list[Tensor], embeds: list[Tensor]) -> Tensor:
        """The position's gradient; completes those of stacks.

        queries, embeds: gradients of the first attentions' queries [N, heads, head_dim], and of the learned ones as
        residuals [N, C].
        """
        table, rows, width = self.table_gradient, self.rows, self.rows.width
        encoder, decoder = self.counts
        torch.stack(queries, 1, out=table[:, rows.firsts].unflatten(1, (decoder, *queries[0].shape[1:])))
        first = _layers(table[:, rows.firsts], decoder)
        self.embed_gradient = torch.stack(embeds).baddbmm_(first, self._first_weight())
        torch.bmm(first.mT, self.embeds, out=self.weight_gradient[rows.firsts].view(decoder, width, width))
        # Of queries and keys, to which the position was added.
        self.weight_gradient[rows.queries].addmm_(table[:, rows.queries].t(), position)
        for part, count, whole, added in (
            (slice(0, 3 * encoder * width), encoder, 3, 2),
            (rows.keys_and_values, 2 * decoder, 2, 1),
        ):
            if count:
                weights = self.weight_gradient[part].view(count, whole * width, width)[:, : added * width]
                columns = _layers(table[:, part], count)[..., : added * width]
                weights.baddbmm_(columns.mT, position.expand(count, -1, -1))
        self.bias_gradient = table.sum(0, dtype=torch.float32)
        return product(table, self.position_weight.t(), None)

    def _first_weight(self) -> Tensor:
        return self.position_weight[self.rows.firsts].view(self.counts[1], self.rows.width, self.rows.width)


def gradients_of_parameters(
    stacked: Stacked, encoder: Sequence[Parameters], decoder: Sequence[Parameters]
) -> list[Tensor]:
    """In the parameters' order, each in its dtype.

    encoder, decoder: of each layer, the gradients of output projections, FFN and norms.
    """
    rows, weights, biases = stacked.rows, stacked.weight_gradient, stacked.bias_gradient
    found: list[list[Tensor]] = []  # of each parameter, the parts that its gradient has one after the other
    for i, g in enumerate(encoder):
        found += [[weights[rows.encoder(i)]], [biases[rows.encoder(i)]], *([t] for t in g)]
    for i, g in enumerate(decoder):
        first, second = (rows.first(i), rows.first_memory(i)), (rows.second(i), rows.later(i))
        found += [[stacked.embed_gradient[i]], [weights[r] for r in first], [biases[r] for r in first]]
        found += [[t] for t in g[:2]]
        found += [[weights[r] for r in second], [biases[r] for r in second], *([t] for t in g[2:])]
    return _assembled(stacked.parameters, found)


def _assembled(parameters: Sequence[Tensor], found: list[list[Tensor]]) -> list[Tensor]:
    """The parts of each gradient in one tensor of its parameter's dtype, all copies of one dtype together."""
    gradients: list[Tensor] = []
    copies: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for parameter, parts in zip(parameters, found, strict=True):
        if len(parts) == 1 and parts[0].dtype == parameter.dtype:
            gradients.append(parts[0])
            continue
        gradients.append(torch.empty_like(parameter, memory_format=torch.contiguous_format))
        into, out_of = copies.setdefault(parts[0].dtype, ([], []))
        into += gradients[-1].split([len(part) for part in parts])
        out_of += parts
    for into, out_of in copies.values():
        torch._foreach_copy_(into, out_of)
    return gradients


def _cast(
    parameters: Sequence[Tensor], counts: tuple[int, int], dtype: torch.dtype, pairs: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Every parameter in `dtype`, norms as they are; appends to `pairs` what is still to be copied, (into, out of)."""
    stacked = _stacked_alone(counts)
    to_cast = [i for i, p in enumerate(parameters) if i not in stacked and p.dtype != dtype]
    sizes = [-(-parameters[i].numel() // _ALIGNED) * _ALIGNED for i in to_cast]
    own = list(parameters)
    for i, memory in zip(to_cast, parameters[0].new_empty(sum(sizes), dtype=dtype).split(sizes), strict=True):
        own[i] = memory[: parameters[i].numel()].view(parameters[i].shape)
        pairs.append((own[i], parameters[i]))
    return own


def _stacked_alone(counts: tuple[int, int]) -> set[int]:
    """Numbers of the parameters that are read from stacks alone, or, of norms, in their own dtype."""
    encoder, decoder = counts
    begin = _ENCODER * encoder
    alone = {_ENCODER * i + k for i in range(encoder) for k in (1, 8, 9, 10, 11)}
    alone |= {begin + _DECODER * i + k for i in range(decoder) for k in (0, 1, 2, 6, *range(13, 19))}
    return alone | {begin + 5}


def _by_layer(
    parameters: Sequence[Tensor], counts: tuple[int, int]
) -> tuple[list[Sequence[Tensor]], list[Sequence[Tensor]]]:
    """Those of each layer of the encoder, and of the decoder."""
    begin, end = _ENCODER * counts[0], len(parameters)
    encoder = [parameters[place : place + _ENCODER] for place in range(0, begin, _ENCODER)]
    return encoder, [parameters[place : place + _DECODER] for place in range(begin, end, _DECODER)]


def _layers(columns: Tensor, count: int) -> Tensor:
    """Columns [N, count * k] -> a view [count, N, k]."""
    return columns.unflatten(1, (count, -1)).transpose(0, 1)
