"""AMBER against the official script's figures, its files, and what is said where its language data are missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from povid.benchmarks import amber, suite
from povid.benchmarks.amber import AMBER
from povid.fault import Fault

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "amber.json").read_text())
NAMES = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1": "f1"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "query").mkdir(parents=True)
    for name in ("annotations", "relation"):
        (folder / f"{name}.json").write_text(json.dumps(GOLDEN[name]))
    (folder / "safe_words.txt").write_text("\n".join(GOLDEN["safe_words"]))
    rows = [
        {"id": row["id"], "image": f"AMBER_{row['id'] % 7}.jpg", "query": "Is the sky blue?"}
        for row in GOLDEN["annotations"]
    ]
    (folder / "query" / "query_all.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def language(monkeypatch: pytest.MonkeyPatch) -> None:
    """What NLTK's tagger and spaCy's vectors said when the golden figures were made."""
    texts = {row["id"]: row["response"] for row in GOLDEN["responses"]}
    found = {texts[number]: words for number, words in GOLDEN["nouns"]}
    pairs = {tuple(pair) for pair in GOLDEN["similar"]}
    monkeypatch.setattr(amber, "nouns", found.__getitem__)
    monkeypatch.setattr(amber, "similarity", lambda one, other: float(one == other or (one, other) in pairs))
    monkeypatch.setattr(amber, "_check_language", lambda: None)


def test_every_official_figure_of_the_golden_answers(data: Path, tmp_path: Path, language: None) -> None:
    file = tmp_path / "responses.json"
    file.write_text(json.dumps(GOLDEN["responses"][::-1]))
    benchmark = AMBER(data=data).for_answers(file)
    questions = benchmark.questions()
    score = benchmark.score_file(file, questions)
    scores, expected = score.scores, GOLDEN["expected"]
    figures = {name: scores[name.lower()] for name in ("State", "Number", "Action", "Relation", "Attribute")}
    figures |= {"Exsitence": scores["existence"], "Descriminative Task": scores}  # official spellings
    for name, found in figures.items():
        assert {key: found[ours] for key, ours in NAMES.items()} == expected[name], name
    keys = {"CHAIR": "CHAIR", "Cover": "cover", "Hal": "hal", "Cog": "cog"}
    assert {name: scores[key] for name, key in keys.items()} == expected["Generative Task"]
    assert scores["score"] == pytest.approx((100 - scores["CHAIR"] + scores["f1"]) / 2)
    assert scores["CHAIR_distinct"] != scores["CHAIR"] and scores["repeat_rate"] > 0
    assert scores["invalid"] > 1 and scores["corrected"]["accuracy"] > scores["accuracy"]
    assert len(benchmark.notes(score)) == 2
    sums = [record["paired"]["sums"] for record in score.records]
    for key in ("CHAIR", "cover", "hal", "cog", "accuracy", "f1"):
        above, below = (sum(one[key][i] for one in sums if key in one) for i in (0, 1))
        assert 100 * above / below == pytest.approx(scores[key], abs=0.11), key
    official = benchmark.write_official(questions, [row["response"] for row in GOLDEN["responses"]], tmp_path)
    assert benchmark.score_file(official, questions).scores == scores


def test_halves_and_tasks_can_be_asked_alone(data: Path, tmp_path: Path) -> None:
    """Without descriptions nothing but the official files is needed."""
    benchmark = AMBER(data=data, tasks=["existence", "relation"])
    questions = benchmark.questions()
    assert {q.meta["task"] for q in questions} == {"existence", "relation"}
    assert questions[0].text == "Is the sky blue?" + amber.SHORT_ANSWER
    score = benchmark.score(questions, ["Yes"] * len(questions))
    assert score.scores["relation"]["recall"] == 0 and "f1" not in score.scores and "CHAIR" not in score.scores
    file = tmp_path / "a.jsonl"
    rows = [{"question_id": q.id, "text": "No"} for q in questions if q.meta["task"] == "relation"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert benchmark.for_answers(file).tasks == ("relation",)
    with pytest.raises(Fault, match="answer all questions before scoring"):
        benchmark.read_answers(file, questions)


def test_what_scores_descriptions_and_is_missing_is_named_with_its_cure(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    def found(name: str) -> None:
        if name not in there:
            raise LookupError

    there: set[str] = set()
    monkeypatch.setattr(nltk.data, "find", found)
    spacy = SimpleNamespace(is_package=lambda name: "vectors" in there)
    monkeypatch.setitem(sys.modules, "spacy.util", spacy)
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(util=spacy))
    monkeypatch.setattr(amber.importlib.util, "find_spec", lambda name: "spacy" in there or None)
    for step, missing in [
        ("", "spaCy, which is not installed"),
        ("spacy", "en_core_web_lg, which is not installed"),
        ("vectors", "averaged_perceptron_tagger_eng, which is missing"),
        ("taggers/averaged_perceptron_tagger_eng.zip", "wordnet, which is missing"),
    ]:
        there.add(step)
        reason = suite.check({"amber": AMBER(data=data)})["amber"]["missing"]
        assert missing in reason and "python -m spacy download en_core_web_lg" in reason
    there.add("corpora/wordnet")
    assert "images are missing" in suite.check({"amber": AMBER(data=data)})["amber"]["missing"]


def test_nouns_and_similarity_are_what_nltk_and_spacy_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """All words are tagged at once, capitals kept; spaCy's model is loaded once, and each pair compared once."""
    import nltk

    seen: list[Any] = []
    tags = {"Dogs": "NNPS", "dogs": "NNS", "run": "VBP"}

    def pos_tag(words: list[str]) -> list[tuple[str, str]]:
        seen.append(words)
        return [(word, tags.get(word, ".")) for word in words]

    def load(name: str) -> SimpleNamespace:
        seen.append(name)
        return SimpleNamespace(make_doc=lambda word: SimpleNamespace(similarity=lambda other: seen.append(word) or 0.9))

    monkeypatch.setattr(nltk, "pos_tag", pos_tag)
    lemmatizer = SimpleNamespace(lemmatize=lambda word: word.removesuffix("s"))
    monkeypatch.setattr(nltk.stem, "WordNetLemmatizer", lambda: lemmatizer)
    assert amber.nouns("Dogs run. Two dogs!") == ["Dog", "dog"]
    assert seen == [["Dogs", "run", ".", "Two", "dogs", "!"]]
    seen.clear()
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    try:
        assert [amber.similarity(word, "dog") for word in ("puppy", "cat", "puppy")] == [0.9] * 3
    finally:
        amber.similarity.cache_clear()
        amber._vectors.cache_clear()
    assert seen == ["en_core_web_lg", "puppy", "cat"]


def test_broken_files_are_told_in_one_sentence(data: Path, language: None) -> None:
    def broken(name: str, content: Any, sentence: str) -> None:
        before = (data / name).read_text()
        (data / name).write_text(json.dumps(content))
        with pytest.raises(Fault, match=sentence):
            AMBER(data=data).questions()
        (data / name).write_text(before)

    broken("annotations.json", GOLDEN["annotations"][1:], "asks question 1, which annotations.json does not have")
    broken("annotations.json", [{"id": 1, "type": "other", "truth": "yes"}], "is of type 'other'")
    broken("relation.json", {}, "which relation.json lacks")
    (data / "relation.json").unlink()
    with pytest.raises(Fault, match="fetch amber --data"):
        AMBER(data=data).questions()
