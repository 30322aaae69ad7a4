"""The two prompts of Table 6, word for word, and the rule that chooses between them."""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["captioning", "reasoning"]
KINDS: tuple[Kind, ...] = ("captioning", "reasoning")

# Table 6, "Prompts for hallucinating image captioning tasks".
CAPTIONING = """Help me generate one highly confusing response based on the image and the standard caption in the \
Question-Answer Pair.

Question-answer Pair:

Q: {question}

A: {answer}

Requirements:

(1) The generated caption is generally similar to the given A, with the same main meaning; (2) You can refer to the \
following errors to generate the wrong caption (1. The wrong caption can contain some co-occurring objects, which are \
prone to appear in such scenarios but do not appear in the image; 2. The wrong caption can be an error in the number \
of entities or the logical relationships between entities; 3. The attributes of entities in the caption can also be \
modified, such as color, appearance, etc.) (3) Compared to the original caption A, the caption you modified is \
incorrect based on the provided image.

Output Format:

Answer: your answer"""

# Table 6, "Prompts for hallucinating reasoning tasks".
REASONING = """Now, please help me generate new answers with hallucination errors based on the image, question, and \
answer provided. There are two cases now:

1. If the given question and answer are short and do not require logical reasoning, then modify the answer to a \
hallucination error answer, such as some quantity errors or entity and property errors.

2. If the entire question requires logical reasoning, then help me reorganize the answers based on the given image, \
questions, and answers into the format "Reason: xxx, Result: xxx" (Answer 1). Modify the reasons by introducing errors \
related to logical relationships, entity information, entity attributes, etc. If the error in the reason would lead to \
a new result, modify the result accordingly. If the error does not lead to a new result, keep the original result. \
Similarly, organize it in the format "Reason: xxx, Result: xxx" (Answer 2).

Question-answer Pair:

Q: {question}

A: {answer}

Requirements:

(1) The generated wrong answer and reasoning process should be combined with the image and be misleading..

Output Format:

Answer: your answer"""

_PROMPTS: dict[str, str] = {"captioning": CAPTIONING, "reasoning": REASONING}

_DESCRIBES = re.compile(
    r"\b(describ\w*|descripti\w*|caption\w*|elaborate|depict\w*|portray\w*|illustrat\w*|characteri[sz]e|narrate|"
    r"in (great )?detail|(detailed|comprehensive) (manner|way|look|overview|account|analysis|explanation|rundown)|"
    r"key elements|visual content|summari[sz]e (the|this) (image|picture|photo|scene)|"
    r"what('s| is| do you (see|think is))? ?(happening|going on) in (this|the) (image|picture|photo\w*|scene)|"
    r"what do you see)\b",
    re.IGNORECASE,
)


def kind_of(question: str) -> Kind:
    """``captioning`` for questions that ask for a description of the picture, ``reasoning`` for all others.

    The paper does not say which prompt a record gets; LLaVA-Instruct's detail questions all ask for a description.
    """
    return "captioning" if _DESCRIBES.search(question) else "reasoning"


def prompt(kind: Kind, question: str, answer: str) -> str:
    """Table 6's prompt of ``kind`` for one question and its correct answer."""
    before, _, rest = _PROMPTS[kind].partition("{question}")
    between, _, after = rest.partition("{answer}")  # no str.format: braces in the data must stay what they are
    return f"{before}{question}{between}{answer}{after}"
