"""Small models in the shape of the codebases that have this attention: how they build masks and call it."""

import torch
from torch import nn


def neighbor_mask(height, width, size_row, size_col):
    """As the public code: a loop over queries, 0 and -inf."""
    mask = torch.ones(height, width, height, width)
    for row in range(height):
        for col in range(width):
            rows = slice(max(row - size_row // 2, 0), min(row + size_row // 2 + 1, height))
            cols = slice(max(col - size_col // 2, 0), min(col + size_col // 2 + 1, width))
            mask[row, col, rows, cols] = 0
    mask = mask.view(height * width, height * width)
    return mask.masked_fill(mask == 0, float("-inf")).masked_fill(mask == 1, 0.0)


class GeneratesMasks(nn.Module):
    def __init__(self, feature_size, neighbor_size):
        super().__init__()
        self.feature_size, self.neighbor_size, self.built = feature_size, neighbor_size, 0

    def generate_mask(self, feature_size, neighbor_size):
        self.built += 1
        return neighbor_mask(*feature_size, *neighbor_size).cuda()


class Layer(nn.Module):
    def __init__(self, width, heads, dropout, decoder):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout=dropout) if decoder else None
        self.query = nn.Embedding(35, width) if decoder else None
        self.norm = nn.LayerNorm(width)

    def forward(self, out, memory, position, masks):
        if self.query is None:
            q = k = out + position
            return self.norm(out + self.self_attn(q, k, value=out, attn_mask=masks[0])[0])
        query = self.query.weight[:, None].repeat(1, memory.shape[1], 1)
        query = query + self.self_attn(query + position, memory + position, value=memory, attn_mask=masks[1])[0]
        attended = self.multihead_attn(query=query + position, key=out + position, value=out, attn_mask=masks[2])[0]
        return self.norm(query + attended)


class EncoderDecoder(GeneratesMasks):
    """Sequence first, three flags, a mask built in each forward and sent to a GPU whether there is one or not."""

    def __init__(self, flags=(True, True, True), dropout=0.1, width=32, heads=4):
        super().__init__((5, 7), (3, 4))
        self.flags = flags
        self.encoder = nn.ModuleList(Layer(width, heads, dropout, decoder=False) for _ in range(2))
        self.decoder = nn.ModuleList(Layer(width, heads, dropout, decoder=True) for _ in range(2))
        self.position = nn.Parameter(torch.randn(35, 1, width))

    def forward(self, tokens):
        mask = self.generate_mask(self.feature_size, self.neighbor_size)
        masks = [mask if flag else None for flag in self.flags]
        for layer in self.encoder:
            tokens = layer(tokens, None, self.position, masks)
        out = tokens
        for layer in self.decoder:
            out = layer(out, tokens, self.position, masks)
        return out


class Wrapped(nn.Module):
    """As a distributed wrapper: the model is at `.module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


class SharedAttention(GeneratesMasks):
    """One module object that all layers use."""

    def __init__(self, dropout=0.1):
        super().__init__((5, 7), (3, 3))
        shared = nn.MultiheadAttention(32, 4, dropout=dropout)
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": shared, "norm": nn.LayerNorm(32)}) for _ in range(3))

    def forward(self, tokens):
        mask = self.generate_mask(self.feature_size, self.neighbor_size)
        for layer in self.layers:
            tokens = layer["norm"](tokens + layer["attn"](tokens, tokens, tokens, attn_mask=mask)[0])
        return tokens


class BoolMasks(nn.Module):
    """True where blocked, built once, 4 heads of 64; passed as a view that is made anew in each call."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.register_buffer("mask", torch.isinf(neighbor_mask(5, 7, 3, 5))[None])
        self.self_attn = nn.MultiheadAttention(256, 4, dropout=dropout)
        self.cross_attn = nn.MultiheadAttention(256, 4, dropout=dropout, bias=False)

    def forward(self, tokens):
        tokens = tokens + self.self_attn(tokens, tokens, tokens, attn_mask=self.mask[0])[0]
        return tokens + self.cross_attn(tokens, tokens.flip(1), tokens.flip(1), attn_mask=self.mask[0])[0]


class BatchFirst(nn.Module):
    """Batch first; `mca` sees only its neighbourhood, which is another operation."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.nsa = nn.MultiheadAttention(32, 4, dropout=dropout, batch_first=True)
        self.mca = nn.MultiheadAttention(32, 4, dropout=dropout, batch_first=True)

    def forward(self, tokens):
        mask = neighbor_mask(5, 7, 3, 3)
        keep = torch.where(mask == 0, float("-inf"), 0.0)
        tokens = tokens + self.nsa(tokens, tokens, tokens, attn_mask=mask, need_weights=False)[0]
        return tokens + self.mca(tokens, tokens, tokens, attn_mask=keep)[0]


class ThreeHeads(GeneratesMasks):
    """A larger grid, 3 heads of 32."""

    def __init__(self, dropout=0.1, feature_size=(20, 20)):
        super().__init__(feature_size, (9, 9))
        self.attn = nn.MultiheadAttention(96, 3, dropout=dropout)

    def forward(self, tokens):
        mask = self.generate_mask(self.feature_size, self.neighbor_size)
        return self.attn(tokens, tokens, tokens, attn_mask=mask)[0]


class Prompts(GeneratesMasks):
    """A prompt and an image attend to each other; the last attention has no mask, and another length of keys."""

    def __init__(self, dropout=0.1):
        super().__init__((5, 7), (3, 3))
        self.prompt_to_image = nn.MultiheadAttention(32, 4, dropout=dropout)
        self.image_to_prompt = nn.MultiheadAttention(32, 4, dropout=dropout)
        self.final = nn.MultiheadAttention(32, 4, dropout=dropout)
        self.tokens = nn.Parameter(torch.randn(3, 1, 32))

    def forward(self, image):
        mask, prompt = self.generate_mask(self.feature_size, self.neighbor_size), image.flip(0)
        prompt = prompt + self.prompt_to_image(prompt, image, image, attn_mask=mask)[0]
        image = image + self.image_to_prompt(image, prompt, prompt, attn_mask=mask)[0]
        tokens = self.tokens.repeat(1, image.shape[1], 1)
        return image + self.final(image, tokens, tokens)[0]
