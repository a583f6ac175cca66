"""ML-Decoder: a classification head that asks the map, group of classes by group of classes (Ridnik et al. 2021, arXiv
2111.12933, sections 2.2 and 2.3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

HEADS = 8
"""Of the attention."""
MOST_GROUPS = 100
"""Queries where nothing else is said, and fewer where there are fewer classes."""
DROPOUT = 0.1


class MLDecoder(nn.Module):
    """A map (N, C, h, w) to logits (N, num_classes).

    One layer of a transformer's decoder without self-attention: fixed queries, one for each group of classes, attend to
    the map's places; each answers for all classes of its group by a layer of its own.

    Args:
        in_chs: C.
        num_classes: of which each group takes as many as the others; the last may have fewer.
        width: of tokens and queries, a multiple of 8; the hidden layer is 8 / 3 as wide.
        groups: of classes; 0: 100, or one for each class where there are fewer.
    """

    queries: Tensor

    def __init__(self, in_chs: int, num_classes: int, *, width: int = 768, groups: int = 0) -> None:
        super().__init__()
        self.num_classes, self.width = num_classes, width
        self.groups = min(groups or MOST_GROUPS, num_classes)
        per_group = -(-num_classes // self.groups)
        hidden = 8 * width // 3
        self.embed = nn.Linear(in_chs, width)
        self.register_buffer("queries", torch.empty(self.groups, width))
        self.norm_query = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_attention = nn.LayerNorm(width)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm_output = nn.LayerNorm(width)
        self.group_weight = nn.Parameter(torch.empty(self.groups, width, per_group))
        self.bias = nn.Parameter(torch.empty(num_classes))
        self.dropout = nn.Dropout(DROPOUT)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights and queries from torch's global generator; nothing to do on the meta device."""
        if self.queries.is_meta:
            return
        with torch.no_grad():
            self.queries.normal_()
        for layer in (self.embed, self.expand, self.contract):
            layer.reset_parameters()
        for layer in (self.query, self.key, self.value, self.out):
            # As one matrix of three, each (width, 3 width): what torch's attention starts from.
            nn.init.xavier_uniform_(layer.weight, gain=1.0 if layer is self.out else math.sqrt(0.5))
            nn.init.zeros_(layer.bias)
        for norm in (self.norm_query, self.norm_attention, self.norm_output):
            norm.reset_parameters()
        for weight in self.group_weight:
            nn.init.xavier_normal_(weight)
        nn.init.zeros_(self.bias)

    def decode(self, x: Tensor) -> Tensor:
        """A map (N, C, h, w) -> what each query found (N, groups, width)."""
        tokens = torch.relu(self.embed(x.flatten(2).transpose(1, 2)))  # (N, h w, width)
        queries = self.norm_query(self.queries + self.dropout(self.queries))  # (groups, width)
        attended = self.dropout(self._attend(queries, tokens))
        queries = self.norm_attention(queries + attended)  # (N, groups, width)
        hidden = self.contract(self.dropout(torch.relu(self.expand(queries))))
        return self.norm_output(queries + self.dropout(hidden))

    def _attend(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Attention of queries (groups, width) to tokens (N, T, width) -> (N, groups, width)."""
        split = (HEADS, self.width // HEADS)
        q = self.query(queries).unflatten(-1, split).transpose(0, 1)  # (heads, groups, d)
        k = self.key(tokens).unflatten(-1, split).permute(0, 2, 3, 1)  # (N, heads, d, T)
        v = self.value(tokens).unflatten(-1, split).transpose(1, 2)  # (N, heads, T, d)
        weights = self.dropout(torch.softmax(torch.matmul(q / math.sqrt(split[1]), k), dim=-1))
        return self.out(torch.matmul(weights, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        found = self.decode(x).transpose(0, 1)  # (groups, N, width)
        logits = torch.matmul(found, self.group_weight)  # (groups, N, classes of a group)
        return logits.permute(1, 0, 2).flatten(1)[:, : self.num_classes] + self.bias
