"""Table 6's prompts, the choice between them, the parser and the gates."""

from __future__ import annotations

import pytest
from shared import shared

from povid.dispreference.gates import Gates, foreign, judge
from povid.dispreference.parse import Parsed, Unusable, parse
from povid.dispreference.prompts import CAPTIONING, REASONING, kind_of, prompt
from povid.dispreference.rows import Row


def test_the_prompts_are_table_6_word_for_word():
    paper = shared("paper/povid_paper.txt").read_text()
    for text in (CAPTIONING, REASONING):
        assert " ".join(text.split()) in " ".join(paper.split())


QUESTIONS = [
    ("Describe this image in detail.", "captioning"),
    ("Can you elaborate on the elements of the picture provided?", "captioning"),
    ("What do you see happening in this image?", "captioning"),
    ("Write a detailed description of the given image.", "captioning"),
    ("Analyze the image in a comprehensive and detailed manner.", "captioning"),
    ("What are the key elements in this picture?", "captioning"),
    ("What is the color of the bus?", "reasoning"),
    ("Why might the man be smiling?", "reasoning"),
    ("What could happen next in this situation?", "reasoning"),
]


def test_which_prompt_a_question_gets():
    for question, kind in QUESTIONS:
        assert kind_of(question) == kind, question


def test_braces_in_the_data_stay():
    assert "Q: {answer} {0}\n\nA: {question} %s\n" in prompt("captioning", "{answer} {0}", "{question} %s")


FORMS = [
    ("captioning", "Answer: A blue bus.", ("A blue bus.", None)),
    ("captioning", 'Sure, here it is.\n\n**Answer:** "A blue bus."', ("A blue bus.", None)),
    ("captioning", "A blue bus.", ("A blue bus.", None)),
    ("captioning", "answer: First.\nAnswer: A blue bus\nwith a man.", ("A blue bus\nwith a man.", None)),
    ("captioning", '```json\n{"Answer": "A blue bus."}\n```', ("A blue bus.", None)),
    ("captioning", "Q: What?\nA: x\nAnswer: “A blue bus.” (Answer 1)", ("A blue bus.", None)),
    ("reasoning", "Answer: Four.", ("Four.", None)),
    (
        "reasoning",
        "Answer: Answer 1: Reason: a, Result: b.\nAnswer 2: Reason: c, Result: d.",
        ("Reason: a, Result: b.", "Reason: c, Result: d."),
    ),
    (
        "reasoning",
        "Answer 1:\nReason: a, Result: b.\n\nAnswer 2:\nReason: c, Result: d.",
        ("Reason: a, Result: b.", "Reason: c, Result: d."),
    ),
    ("reasoning", "**Answer 1**: Four dogs.\n**Answer 2**: Two dogs.", ("Four dogs.", "Two dogs.")),
    (
        "reasoning",
        '"Reason: a, Result: b." (Answer 1)\n"Reason: c, Result: d." (Answer 2)',
        ("Reason: a, Result: b.", "Reason: c, Result: d."),
    ),
    (
        "reasoning",
        "Answer: Reason: a, Result: b.\nReason: c, Result: d.",
        ("Reason: a, Result: b.", "Reason: c, Result: d."),
    ),
    (
        "reasoning",
        '{"Answer 1": "Reason: a, Result: b.", "Answer 2": "Reason: c, Result: d."}',
        ("Reason: a, Result: b.", "Reason: c, Result: d."),
    ),
    ("reasoning", "Reasoning: a b c.\nAnswer: No.", ("Reasoning: a b c.\nAnswer: No.", None)),
]


def test_the_parser_reads_every_form():
    for kind, reply, expected in FORMS:
        assert parse(kind, reply) == Parsed(*expected), reply


WITHOUT_PAIR = [
    ("captioning", "Answer:", "empty"),
    ("captioning", 'Answer: ""', "empty"),
    ("captioning", '{"Answer": "A b', "broken JSON"),
    ("captioning", "[" * 9000, "broken JSON"),
    ("captioning", '{"reply": "x"}', "broken JSON"),
    ("reasoning", "Answer 2: Reason: a, Result: b.", "one answer of two"),
    ("reasoning", "Answer 1:\nAnswer 2: Two.", "empty"),
]


def test_replies_without_a_pair():
    for kind, reply, expected in WITHOUT_PAIR:
        with pytest.raises(Unusable, match=f"^{expected}$"):
            parse(kind, reply)


CAPTION = "A man in a red shirt holds a silver phone in front of his face, and behind him there are a field and trees."
GOOD = "A man in a blue shirt holds a silver phone in front of his face, and behind him there are a dog and trees."


def row(answer: str = CAPTION, kind: str = "captioning") -> Row:
    return Row("a", b"x", "Describe this image.", answer, kind)


def reason(reply: str, answer: str = CAPTION, kind: str = "captioning", finish: str = "stop") -> str | None:
    try:
        judge(row(answer, kind), reply, finish, Gates())
    except Unusable as unusable:
        return str(unusable)
    return None


CAPTION_REPLIES = [
    (f"Answer: {GOOD}", None),
    ("   ", "empty"),
    ("I'm sorry, but I can't assist with that.", "refusal"),
    ("Answer: I cannot create misleading text.", "refusal"),
    ("As an AI, I must decline.", "refusal"),
    (f"Answer: {CAPTION}", "identical"),
    (f"Answer: {CAPTION.upper()}", "identical"),
    (
        "Answer: Nothing of what anybody would ever expect to find can be seen anywhere around here today, sadly.",
        "changed everything",
    ),
    ("Answer: A man.", "length"),
    (f"Answer: {GOOD * 4}", "length"),
    (f"Answer: {GOOD} This is the wrong caption.", "leaked instruction"),
    (f"Answer: Here is a confusing response: {GOOD}", "leaked instruction"),
    (f"Answer: {CAPTION.replace('and behind him', 'also behind him')}", "no hallucination"),
    (f"Answer: Surely {CAPTION}", "no hallucination"),
    (f"Answer: {CAPTION.replace('and trees', 'with fishing gear')}", None),
    (
        "Answer: Ein Mann in einem roten Hemd hält ein silbernes Telefon vor sein Gesicht, hinter ihm ist Wald.",
        "wrong language",
    ),
    (
        "Answer: Un homme en chemise rouge tient un téléphone argenté devant son visage, et derrière lui un champ.",
        "wrong language",
    ),
    ("Answer: 一个穿红衬衫的男人拿着银色的手机。", "wrong language"),
]


def test_the_gates_for_a_caption():
    for reply, expected in CAPTION_REPLIES:
        assert reason(reply) == expected, reply


def test_a_reply_that_was_cut_or_filtered():
    assert reason(f"Answer: {GOOD}", finish="length") == "cut off"
    assert reason(f"Answer: {GOOD}", finish="content_filter") == "refusal"


SHORT_REPLIES = [
    ("Two.", "Answer: Three.", None),
    ("Red", "Answer: Blue", None),
    ("Zither", "Answer: Lute", None),
    ("It is there.", "Answer: It is here.", "no hallucination"),
    ("Yes, it is.", "Answer: No, it is not.", None),
    ("Two.", "Answer: 两个。", "wrong language"),
    ("Two.", "Answer: " + "Three dogs run over the long bridge " * 4, "length"),
    (
        "The floor is wet, so people may slip and fall on it.",
        "Reason: the floor is dry, Result: people may slip and fall. (Answer 1) "
        "Reason: the floor is wet, Result: people may slip and fall. (Answer 2)",
        None,
    ),
    (
        "The floor is wet, so people may slip and fall on it.",
        "Answer: Reason: the floor is dry, Result: people may slip and fall on it.",
        "one answer of two",
    ),
    (
        "The floor is wet, so people may slip and fall on it.",
        "Answer 1: Reason: a cat sleeps, Result: it dreams of two birds.\n"
        "Answer 2: Reason: a dog sleeps, Result: it dreams of two birds.",
        "preferred strays",
    ),
]


def test_the_gates_for_short_answers_and_reasons():
    for answer, reply, expected in SHORT_REPLIES:
        assert reason(reply, answer, "reasoning") == expected, reply


def test_reorganised_answers_become_the_pair():
    found = judge(
        row("The floor is wet, so people may slip.", "reasoning"),
        "Answer 1: Reason: the floor is dry, Result: people may slip.\n"
        "Answer 2: Reason: the floor is wet, Result: people may slip.",
        "stop",
        Gates(),
    )
    assert found == Parsed(
        "Reason: the floor is dry, Result: people may slip.", "Reason: the floor is wet, Result: people may slip."
    )


def test_a_foreign_word_or_sign_is_no_foreign_language():
    assert not foreign(CAPTION, GOOD.replace("phone", "phone that says 寿司"))
    assert not foreign("猫が二匹います。", "犬が二匹います。")
    assert not foreign(
        "Deux chats dorment sur un canapé rouge dans le salon.",
        "Trois chats dorment sur un canapé bleu dans le jardin.",
    )
