"""Packed sequences against the pure meaning of a mask: every position sees its own conversation up to itself."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from povid.model.packing import DISPREFERRED, PADDING, Encoded, additive, pack, shared_length


@st.composite
def conversations(draw, count):
    """Pairs that share a beginning; three words, so that they often share more by chance."""
    pairs = []
    for _ in range(count):
        start = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
        sides = []
        for _ in range(2):
            ids = start + draw(st.lists(st.integers(0, 2), min_size=1, max_size=draw(st.sampled_from([1, 4, 12]))))
            marks = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
            sides.append(Encoded(ids, [*marks[:-1], True]))
        pairs.append(sides)
    return [w for w, _ in pairs], [l for _, l in pairs]


def check(packed, preferred, dispreferred):
    mask_BTT = packed.attention()[:, 0]
    for b, row in enumerate(mask_BTT.tolist()):
        ids, positions = packed.input_ids_BT[b].tolist(), packed.position_ids_BT[b].tolist()
        for column, segment in enumerate(packed.segment_BT[b].tolist()):
            visible = [place for place, sees in enumerate(row[column]) if sees]
            if segment == PADDING:
                assert visible == [column]
                continue
            own = dispreferred[b] if segment == DISPREFERRED else preferred[b]
            upto = positions[column] + 1
            assert [ids[place] for place in visible] == own.input_ids[:upto]
            assert [positions[place] for place in visible] == list(range(upto))
    for side, originals in ((packed.preferred, preferred), (packed.dispreferred, dispreferred)):
        if side is None:
            continue
        found = []
        for example, place, token in zip(*(values.tolist() for values in side[:3])):
            assert packed.example_U[place] == example
            column = packed.column_U[place]
            assert packed.columns_BU[example, packed.slot_U[place]] == column
            before = [
                packed.input_ids_BT[example, i].item() for i in range(mask_BTT.shape[1]) if mask_BTT[example, column, i]
            ]
            assert before == originals[example].input_ids[: len(before)]
            found.append((example, len(before), token))
        assert sorted(found) == [
            (example, i, original.input_ids[i])
            for example, original in enumerate(originals)
            for i in range(1, len(original.input_ids))
            if original.response[i]
        ]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4).flatmap(conversations))
def test_every_token_is_predicted_from_its_own_conversation(sides):
    preferred, dispreferred = sides
    packed = pack(preferred, dispreferred, padding_id=9)
    check(packed, preferred, dispreferred)
    assert not packed.causal
    assert packed.examples == len(preferred)
    shared = [shared_length(w.input_ids, l.input_ids) for w, l in zip(preferred, dispreferred)]
    lengths = (packed.segment_BT != PADDING).sum(1).tolist()
    assert lengths == [len(w.input_ids) + len(l.input_ids) - n for w, l, n in zip(preferred, dispreferred, shared)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4).flatmap(conversations))
def test_one_side_alone(sides):
    packed = pack(sides[0], None, padding_id=9)
    check(packed, sides[0], None)
    assert packed.causal == (len({len(w.input_ids) for w in sides[0]}) == 1)


def test_additive_mask_says_the_same():
    w, l = Encoded([5, 6, 7], [False, False, True]), Encoded([5, 8], [False, True])
    packed = pack([w], [l])
    # columns: 5 (shared), 6 7 (preferred), 8 (dispreferred, which does not see 6 and 7)
    assert packed.input_ids_BT.tolist() == [[5, 6, 7, 8]]
    assert packed.position_ids_BT.tolist() == [[0, 1, 2, 1]]
    assert packed.attention()[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    assert packed.columns_BU.tolist() == [[0, 1]] and packed.preferred.token_N.tolist() == [7]
    added = additive(packed.attention(), torch.bfloat16)
    assert added.dtype == torch.bfloat16 and torch.equal(added == 0, packed.attention())
