"""A batch's token sequences, packed so that the prefix shared by preferred and dispreferred is computed once.

Shape suffixes: B = examples, T = packed length, U = positions that predict a response token, N = response tokens of
one side over the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SHARED, PREFERRED, DISPREFERRED, PADDING = 0, 1, 2, -1


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as tokens; ``response[i]`` says whether token i belongs to an assistant's response."""

    input_ids: list[int]
    response: list[bool]


class Side(NamedTuple):
    """The response tokens of one side of the pairs.

    ``example_N`` is the example's index in the batch, ``position_N`` the index among the U predicting positions, and
    ``token_N`` the token that is predicted there. ``weight_N``: weights, for an objective that weights tokens.
    """

    example_N: Tensor
    position_N: Tensor
    token_N: Tensor
    weight_N: Tensor | None = None


class Packed(NamedTuple):
    """Sequences ``[shared | rest of y_w | rest of y_l]``, or without a dispreferred side just the preferred ones.

    The shared part is the longest common prefix: image, prompt, and the first tokens that both responses have in
    common. The positions of both rests continue from it.

    ``example_U`` and ``column_U`` are the positions that predict response tokens; ``columns_BU`` holds the same columns
    by example (padded with column 0) and ``slot_U`` the index of each in its row. ``causal``: the mask is plain causal
    attention.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    segment_BT: Tensor
    example_U: Tensor
    column_U: Tensor
    columns_BU: Tensor
    slot_U: Tensor
    preferred: Side
    dispreferred: Side | None
    causal: bool

    @property
    def examples(self) -> int:
        return self.input_ids_BT.shape[0]

    def attention(self) -> Tensor:
        """[B, 1, T, T] bool: causal, and y_l does not see y_w. Padding sees itself (softmax of an empty row is NaN)."""
        length = self.segment_BT.shape[1]
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=self.segment_BT.device).tril()
        query, key = self.segment_BT[:, :, None], self.segment_BT[:, None, :]
        visible = ((key == SHARED) | (key == query)) & (query != PADDING) & (key != PADDING) & causal_TT
        itself = torch.eye(length, dtype=torch.bool, device=self.segment_BT.device)
        return (visible | itself)[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as a term of the attention scores: 0 where visible, elsewhere the dtype's lowest number."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def shared_length(preferred: Sequence[int], dispreferred: Sequence[int]) -> int:
    """Length of the longest common prefix, at most one less than the shorter sequence."""
    limit = min(len(preferred), len(dispreferred)) - 1
    for i in range(limit):
        if preferred[i] != dispreferred[i]:
            return i
    return limit


def pack(preferred: Sequence[Encoded], dispreferred: Sequence[Encoded] | None, *, padding_id: int = 0) -> Packed:
    """Pack a batch of conversations, padded on the right. ``dispreferred=None`` packs the preferred side alone.

    A response token is predicted at the position before it. The first token of either rest is predicted at the shared
    part's last position.
    """
    rows: list[tuple[list[int], list[int], list[int]]] = []
    columns: list[list[int]] = []
    sides: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]] = ([], [])  # (example, column, token)
    for example, w in enumerate(preferred):
        length = len(w.input_ids)
        tokens, positions, segments = list(w.input_ids), list(range(length)), [SHARED] * length
        predicted = {(i - 1, w.input_ids[i]) for i in range(1, length) if w.response[i]}
        sides[0].extend((example, column, token) for column, token in sorted(predicted))
        used = {column for column, _ in predicted}
        if dispreferred is not None:
            l = dispreferred[example]
            shared = shared_length(w.input_ids, l.input_ids)
            segments[shared:] = [PREFERRED] * (length - shared)
            tokens += l.input_ids[shared:]
            positions += range(shared, len(l.input_ids))
            segments += [DISPREFERRED] * (len(l.input_ids) - shared)
            for i in range(1, len(l.input_ids)):
                if l.response[i]:
                    column = i - 1 if i - 1 < shared else length + i - 1 - shared
                    sides[1].append((example, column, l.input_ids[i]))
                    used.add(column)
        rows.append((tokens, positions, segments))
        columns.append(sorted(used))

    longest = max(len(tokens) for tokens, _, _ in rows)
    most = max(1, *map(len, columns))  # attention cannot do with no row, even where no example has a response

    def padded(values: list[int], filler: int, length: int = longest) -> list[int]:
        return values + [filler] * (length - len(values))

    place = {}
    for example, used_columns in enumerate(columns):
        for column in used_columns:
            place[example, column] = len(place)

    def side(entries: list[tuple[int, int, int]]) -> Side:
        return Side(
            torch.tensor([example for example, _, _ in entries], dtype=torch.long),
            torch.tensor([place[example, column] for example, column, _ in entries], dtype=torch.long),
            torch.tensor([token for _, _, token in entries], dtype=torch.long),
        )

    return Packed(
        torch.tensor([padded(tokens, padding_id) for tokens, _, _ in rows]),
        torch.tensor([padded(positions, 0) for _, positions, _ in rows]),
        torch.tensor([padded(segments, PADDING) for _, _, segments in rows]),
        torch.tensor([example for example, _ in place], dtype=torch.long),
        torch.tensor([column for _, column in place], dtype=torch.long),
        torch.tensor([padded(used, 0, most) for used in columns], dtype=torch.long),
        torch.tensor([slot for used in columns for slot in range(len(used))], dtype=torch.long),
        side(sides[0]),
        None if dispreferred is None else side(sides[1]),
        dispreferred is None and all(len(tokens) == longest for tokens, _, _ in rows),
    )


def stack(images: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the image tensors of several examples; examples with fewer tiles are padded with zeros.

    An example without a picture has no tensors and adds none.
    """
    joined = {}
    images = [entry for entry in images if entry]
    for key in images[0] if images else ():
        tensors = [entry[key] for entry in images]
        if len({tensor.shape[1:] for tensor in tensors}) > 1:
            most = max(tensor.shape[1] for tensor in tensors)
            tensors = [torch.cat([t, t.new_zeros(t.shape[0], most - t.shape[1], *t.shape[2:])], 1) for t in tensors]
        joined[key] = torch.cat(tensors)
    return joined
