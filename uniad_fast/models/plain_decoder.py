"""The plain Transformer's decoder, without the paper's layer-wise queries: what its query ablation compares with."""

from torch import Tensor, nn

from .layers import TwoAttentions
from .submodules import call_attention, whole_table


class PlainDecoder(nn.Module):
    """The plain Transformer's decoder: at most one learned query, which goes into the first layer."""

    def __init__(self, layers: list["PlainDecoderLayer"], norm: nn.Module, learned_embed: nn.Embedding | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.learned_embed = learned_embed

    def forward(self, memory: Tensor, position: Tensor) -> Tensor:
        out = memory
        if self.learned_embed is not None:
            table = whole_table(self.learned_embed, memory.shape[1], memory.device)
            out = table.to(memory.dtype).expand_as(memory)
        for layer in self.layers:
            out = layer(out, memory, position)
        return self.norm(out)


class PlainDecoderLayer(TwoAttentions):
    """What comes in -> itself -> encoder output -> FFN, each with its residual and norm."""

    def forward(self, out: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """out, memory [B, N, C], position [N, C] -> [B, N, C]."""

        def attend_itself(x: Tensor) -> Tensor:
            query_key = x + position
            return call_attention(self.self_attn, query_key, query_key, x)

        def attend_memory(x: Tensor) -> Tensor:
            return call_attention(self.multihead_attn, x + position, memory + position, memory)

        out = self.residual(self.norm1, out, attend_itself)
        out = self.residual(self.norm2, out, attend_memory)
        return self.residual(self.norm3, out, self.feed_forward)
