"""CHAIR against the official code's results on real captions, and its quirks one by one, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import shared

from povid.benchmarks import chair, coco
from povid.benchmarks.chair import CHAIR
from povid.benchmarks.chair_words import (
    DOUBLE_WORDS,
    mended_singular,
    objects,
    official_singular,
    read_synonyms,
    tokens,
)
from povid.fault import Fault
from povid.model.question import Score

DIFFICULT = Path(__file__).resolve().parents[1] / "golden" / "chair_adversarial.json"
ANY = CHAIR(data="data")  # what reads no official file

SYNONYMS = """\
person, girl, boy, man, woman, child, baby, adult, passenger, people, rider
motorcycle, scooter,  motor bike, motor cycle, motorbike
bus, minibus, trolley
airplane, plane, air plane, jet, airbus
train, locomotive
traffic light, street light
cat, kitten
dog, puppy, collie, doggie
elephant
cow, cattle, ox, bison\x20
tie, bow, bow tie
skis, ski
wine glass
cup
knife
cake,  cheesecake
chair, seat, stool
couch, sofa, chesterfield\x20
dining table, table
toilet
laptop, computer, laptop computer
mouse
cell phone, phone, iPhone
oven, stove, stove top oven
hot dog
scissors
teddy bear, teddybear
"""


@pytest.fixture
def synonyms(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    return read_synonyms(tmp_path / "synonyms.txt")


def test_objects_of_200_real_captions_are_the_official_ones() -> None:
    known = read_synonyms(shared("golden/chair_synonyms.txt"))
    records = json.loads(shared("golden/chair_llava_captions_200.json").read_text())
    assert len(records) == 200
    for record in records:
        assert objects(record["caption"], known) == record["objects"], record["image_id"]


def test_objects_of_611_difficult_captions_are_the_official_ones() -> None:
    known = read_synonyms(shared("golden/chair_synonyms.txt"))
    records = json.loads(DIFFICULT.read_text())
    assert len(records) == 611
    wrong = [record["caption"] for record in records if objects(record["caption"], known) != record["objects"]]
    assert wrong == []


@pytest.mark.parametrize("shift", [0, 1])
def test_both_end_to_end_results_come_out_exactly(tmp_path: Path, shift: int) -> None:
    """Each caption with its own image, then with the next one's; the official script's fractions, times 100."""
    case = json.loads(shared("golden/chair_end_to_end_30.json").read_text())
    (tmp_path / "synonyms.txt").write_text(shared("golden/chair_synonyms.txt").read_text())
    (tmp_path / "objects.json").write_text(json.dumps(case["ground_truth"]))
    captions = case["captions"]
    rows = [
        {"image_id": captions[(i + shift) % 30]["image_id"], "caption": row["caption"]}
        for i, row in enumerate(captions)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = CHAIR(data=tmp_path).for_answers(tmp_path / "answers.jsonl").questions()
    score = ANY.score(questions, ANY.read_answers(tmp_path / "answers.jsonl", questions))
    expected = case["expected_when_each_caption_is_scored_against_the_next_image" if shift else "expected"]
    assert score.scores["CHAIR_S"] == pytest.approx(100 * expected["CHAIR_S"], abs=1e-12)
    assert score.scores["CHAIR_I"] == pytest.approx(100 * expected["CHAIR_I"], abs=1e-12)
    assert score.scores["hallucinated_mentions"] == expected["hallucinated_mentions"]
    assert score.scores["captions"] == 30
    if not shift:
        for record, row in zip(score.records, captions):
            assert {key: record[key] for key in ("image_id", "objects", "hallucinated")} == {
                key: row[key] for key in ("image_id", "objects", "hallucinated")
            }


def test_quirks(synonyms: dict[str, str]) -> None:
    for caption, expected in [
        ("A man, a MAN and two men.", ["person", "person", "person"]),  # lower-cased, repeats kept
        ("A baby elephant near a baby.", ["elephant", "person"]),  # "baby elephant" is no person
        ("An adult cat. A passenger jet.", ["cat", "airplane"]),
        ("Passenger trains pass a passenger.", ["train", "person"]),  # singular before double words
        ("The seat of the toilet is up; a chair stands by.", ["toilet", "chair"]),  # no "seat" beside a toilet
        ("Toilet seats, and a seat.", ["toilet"]),  # merged, then "seat" dropped
        ("A seat.", ["chair"]),
        ("A motor bike and a motor cycle.", ["motorcycle"]),  # " motor bike" is a dead synonym
        ("A motorbike.", ["motorcycle"]),
        ("Two wine glasses and a wine glass, glasses.", ["wine glass", "wine glass"]),
        ("A bus, a minibus, two buses, airbuses.", ["bus", "airplane"]),  # bus → bu, minibus → minibu
        ("Ties, bow ties, a tie and a bow.", ["tie", "tie", "tie"]),  # ties → ty, so that "bow" is left
        ("Collies, doggies, a collie.", ["dog"]),
        ("An iPhone and a cheesecake.", []),
        ("A stove top oven.", ["oven", "oven"]),  # three words never merge
        ("Home plate and train tracks.", []),  # merged so as not to count
        ("People with skis and scissors, mice, knives.", ["person", "skis", "scissors", "mouse", "knife"]),
        ("Hot dogs.", ["hot dog"]),
        ("A hot, dog.", ["dog"]),  # the comma is a word between
        ("", []),
        ("...", []),
        ("An ox, a bison, a chesterfield.", ["cow", "cow", "couch"]),  # spaces at a line's end vanish
    ]:
        assert objects(caption, synonyms) == expected


def test_words_are_split_as_nltk_does() -> None:
    for caption, expected in [
        # Inside a sentence a full stop stays on its word; punkt decides where sentences end.
        ("Mr. cat. a dog", ["mr.", "cat", ".", "a", "dog"]),
        ("A (small) dog.", ["a", "(", "small", ")", "dog", "."]),
        ("a cat... a dog", ["a", "cat", "...", "a", "dog"]),
        ("The man's cat can't see.", ["the", "man", "'s", "cat", "ca", "n't", "see", "."]),
        ('A "dog", a cat', ["a", "``", "dog", "''", ",", "a", "cat"]),
        ("A cat\n\nA dog.", ["a", "cat", "a", "dog", "."]),
        ("a t-shirt/cat", ["a", "t-shirt/cat"]),
        ("at 5 p.m. in the u.s. dogs", ["at", "5", "p.m.", "in", "the", "u.s.", "dogs"]),
        ("cat.dog", ["cat.dog"]),
        # What NLTK 3.9.3 and 3.10.1 changed: dashes, opening single quotes, curly quotes at the end of a sentence.
        ("a dog—a beagle–sits", ["a", "dog—a", "beagle–sits"]),
        ("a 'dog' and 'tis", ["a", "'dog", "'", "and", "'t", "is"]),
        ("a cat.” a dog", ["a", "cat.", "”", "a", "dog"]),
    ]:
        assert tokens(caption) == expected


def test_singulars(synonyms: dict[str, str]) -> None:
    for word, official, mended in [
        ("bus", "bu", "bus"),
        ("buses", "bus", "bus"),
        ("ties", "ty", "tie"),
        ("airbuses", "airbus", "airbus"),
        ("mini-buses", "mini-bus", "mini-bus"),
        ("collies", "collies", "collie"),
        ("doggies", "doggies", "doggie"),
        ("glass", "glas", "glass"),
        ("men", "man", "man"),
        ("skis", "ski", "skis"),
        ("skies", "sky", "sky"),
        ("scissors", "scissors", "scissors"),
        ("people", "person", "people"),
        ("knives", "knife", "knife"),
    ]:
        assert official_singular(word) == official
        assert mended_singular({key.strip().lower() for key in synonyms})(word) == mended


def slow_objects(caption: str, synonyms: dict[str, str]) -> list[str]:
    """The rules again, one at a time and without a shortcut."""
    words = [official_singular(word) for word in tokens(caption)]
    out: list[str] = []
    skip = False
    for first, second in zip(words, [*words[1:], None]):
        if skip:
            skip = False
        elif second is not None and f"{first} {second}" in DOUBLE_WORDS:
            out.append(DOUBLE_WORDS[f"{first} {second}"])
            skip = True
        else:
            out.append(first)
    if out.count("toilet") and out.count("seat"):
        out = list(filter(lambda word: word != "seat", out))
    return [synonyms[word] for word in out if word in synonyms]


WORDS = [
    *"baby adult elephant cat bow tie ties toilet seat seats wine glass glasses motor bike hot dogs dog".split(),
    *"passenger jet train track teddy bear stop . ,".split(),
]


@given(st.lists(st.sampled_from(WORDS), max_size=12))
def test_merging_agrees_with_a_slow_reading(words: list[str]) -> None:
    table = {word: word for word in WORDS + list(DOUBLE_WORDS.values())}
    assert objects(" ".join(words), table) == slow_objects(" ".join(words), table)


def data_folder(folder: Path, truth: dict[str, list[str]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "synonyms.txt").write_text(SYNONYMS)
    (folder / "objects.json").write_text(json.dumps(truth))
    return folder


def scored(folder: Path, rows: list[dict]) -> Score:
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = CHAIR(data=folder).for_answers(folder / "answers.jsonl").questions()
    return ANY.score(questions, ANY.read_answers(folder / "answers.jsonl", questions))


def test_score_by_hand(tmp_path: Path) -> None:
    """Image 1 has a cat and a bus, image 2 a dog and a person, image 3 is not captioned.

    "A cat and a dog, a dog." → cat, dog, dog, of which dog, dog hallucinated; "A man on a bus." → person alone, for
    bus is read as "bu". CHAIR_S 1/2, CHAIR_I 2/4, coverage (cat + person) of 4 = 50, words (7 + 5) / 2.
    Corrected: the second caption also names a bus that is not there: CHAIR_S 2/2, CHAIR_I 3/5.
    Distinct: cat, dog; person: CHAIR_I 1/3; one of the four mentions is a repeat.
    """
    folder = data_folder(tmp_path, {"1": ["cat", "bus"], "2": ["puppy", "person"], "3": ["cup"]})
    score = scored(
        folder, [{"image_id": 2, "caption": "A man on a bus."}, {"image_id": 1, "caption": "A cat and a dog, a dog."}]
    )
    scores = score.scores
    assert (scores["CHAIR_S"], scores["CHAIR_I"], scores["coverage"], scores["words"]) == (50.0, 50.0, 50.0, 6.0)
    assert (scores["captions"], scores["empty"], scores["without_caption"]) == (2, 0, 1)
    assert (scores["corrected"]["CHAIR_S"], scores["corrected"]["CHAIR_I"]) == (100.0, 60.0)
    assert (scores["CHAIR_I_distinct"], scores["repeat_rate"]) == pytest.approx((100 / 3, 25))
    paired = [record.pop("paired") for record in score.records]
    assert score.records == [
        {"image_id": 2, "objects": ["person"], "hallucinated": [], "counted": True},
        {"image_id": 1, "objects": ["cat", "dog", "dog"], "hallucinated": ["dog", "dog"], "counted": True},
    ]
    assert [(one["picture"], one["mentions"]) for one in paired] == [(2, "n"), (1, "nhh")]
    for key in ("CHAIR_S", "CHAIR_I", "CHAIR_I_distinct", "coverage", "repeat_rate"):
        above, below = (sum(one["sums"][key][i] for one in paired) for i in (0, 1))
        assert 100 * above / below == pytest.approx(scores[key]), key


def test_empty_captions_leave_the_denominator_and_are_counted(tmp_path: Path) -> None:
    """One of two counted captions hallucinates: 50 %, where counting the empty one would give 33 %."""
    folder = data_folder(tmp_path, {"1": ["cat"], "2": ["cat"], "3": ["cat"]})
    score = scored(
        folder,
        [{"image_id": 1, "caption": "A dog."}, {"image_id": 2, "caption": ""}, {"image_id": 3, "caption": "A cat."}],
    )
    assert (score.scores["CHAIR_S"], score.scores["captions"], score.scores["empty"]) == (50.0, 2, 1)
    assert [record["counted"] for record in score.records] == [True, False, True]


def test_empty_captions_count_where_the_official_script_sees_them(tmp_path: Path) -> None:
    """One hallucinates of two captions, or of three with the empty one. to_chair.py drops it from POVID's layout."""
    folder = data_folder(tmp_path, {"1": ["cat"], "2": ["cat"], "3": ["cat"]})
    texts = {1: "A dog.", 2: " ", 3: "A cat."}
    for rows, headline, beside in [
        ([{"image_id": i, "caption": text} for i, text in texts.items()], 100 / 3, ("without_empty", 50.0)),
        ([{"id": f"{i}.jpg", "answer": text} for i, text in texts.items()], 50.0, ("with_empty", 100 / 3)),
        (
            [{"overall": {}, "imgToEval": {i: {"image_id": i, "caption": text} for i, text in texts.items()}}],
            100 / 3,
            ("without_empty", 50.0),
        ),
    ]:
        file = tmp_path / "captions.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        benchmark = CHAIR(data=folder).for_answers(file)
        score = benchmark.score_file(file, benchmark.questions())
        assert score.scores["CHAIR_S"] == headline and score.scores["empty"] == 1
        assert score.scores[beside[0]]["CHAIR_S"] == beside[1]
    questions = CHAIR(data=folder).questions()
    written = ANY.write_official(questions, list(texts.values()), tmp_path / "official")
    assert ANY.score_file(written, questions).scores == ANY.score(questions, list(texts.values())).scores


def test_no_mention_at_all_is_no_division_by_zero(tmp_path: Path) -> None:
    score = scored(data_folder(tmp_path, {"1": []}), [{"image_id": 1, "caption": "Nothing here."}])
    assert (score.scores["CHAIR_S"], score.scores["CHAIR_I"], score.scores["coverage"]) == (0.0, 0.0, 0.0)
    assert score.scores["mentions"] == 0


def test_every_layout_of_captions_is_read(tmp_path: Path) -> None:
    for content in [
        '{"image_id": 7, "caption": "A cat."}\n{"image_id": 8, "caption": "A dog."}\n',
        '[{"image_id": 7, "caption": "A cat."}, {"image_id": 8, "caption": "A dog."}]',
        '{"id": "COCO_val2014_000000000007.jpg", "question": "q", "answer": "A cat.", "model": "m"}\n'
        '{"id": "COCO_val2014_000000000008.jpg", "question": "q", "answer": "A dog.", "model": "m"}',
        '{"overall": {}, "imgToEval": {"0": {"image_id": 7, "caption": "A cat."},'
        ' "1": {"image_id": 8, "caption": "A dog."}}}',
        '{\n "image_id": 7,\n "text": "A cat."\n}\n{\n "image_id": 8,\n "text": "A dog."\n}',
        '\ufeff{"image_id": 7, "caption": "A cat."}\r\n{"image_id": 8, "caption": "A dog."}',
    ]:
        (tmp_path / "a.json").write_text(content, encoding="utf-8")
        assert [(image, caption) for _, image, caption in chair.captions(tmp_path / "a.json")] == [
            (7, "A cat."),
            (8, "A dog."),
        ]


def test_image_ids_keep_the_form_of_the_answers(tmp_path: Path) -> None:
    folder = data_folder(tmp_path, {"000000000007": ["cat"], "kitchen_3": ["cup"]})
    score = scored(
        folder,
        [
            {"image_id": "COCO_val2014_000000000007.jpg", "caption": "A cat."},
            {"image_id": "kitchen_3.png", "caption": "A cup."},
        ],
    )
    assert [record["image_id"] for record in score.records] == ["COCO_val2014_000000000007.jpg", "kitchen_3.png"]
    assert score.scores["CHAIR_I"] == 0.0


def test_bad_answer_files_are_told_in_one_sentence(tmp_path: Path) -> None:
    for content, sentence in [
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 1, "caption": "b"}', "line 2 describes image 1 again, after"),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 9, "caption": "b"}', "Image 9 (1 of 2 images) is not in"),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 2, "cap', "a.jsonl line 2 is not JSON"),
        ('{"image_id": 1}', "line 1 (image 1) has no caption"),
        ('{"image_id": 1, "caption": null}', "line 1 (image 1) has no caption"),
        ('{"caption": "a"}', "line 1 has no image"),
        ('{"image_id": true, "caption": "a"}', "line 1 has no image"),
        ('"A cat."', "line 1 is 'A cat.', not an object"),
        ("", "holds no caption"),
        ('{"image_id": 1, "caption": " "}', "CHAIR has nothing to score: every caption (1) is empty"),
    ]:
        folder = data_folder(tmp_path / "data", {"1": ["cat"], "2": ["dog"]})
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(Fault, match=".") as caught:
            questions = CHAIR(data=folder).for_answers(tmp_path / "a.jsonl").questions()
            ANY.score(questions, ANY.read_answers(tmp_path / "a.jsonl", questions))
        assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_answers_must_fit_the_questions_asked(tmp_path: Path) -> None:
    folder = data_folder(tmp_path, {"1": ["cat"], "2": ["dog"]})
    questions = CHAIR(data=folder).questions()
    (folder / "a.jsonl").write_text('{"image_id": 1, "caption": "a"}')
    with pytest.raises(Fault, match="has no caption for 1 of 2 images, the first is '2'"):
        ANY.read_answers(folder / "a.jsonl", questions)
    (folder / "a.jsonl").write_text("".join(json.dumps({"image_id": i, "caption": "a"}) + "\n" for i in (1, 2, 3)))
    with pytest.raises(Fault, match="line 3 describes image 3, which is not one of the 2 images; remove it"):
        ANY.read_answers(folder / "a.jsonl", questions)


def test_bad_objects_json_is_told_in_one_sentence(tmp_path: Path) -> None:
    for truth, sentence in [
        ('{"1": ["catt"]}', "image '1' names 'catt', which is not in synonyms.txt; did you mean 'cat'?"),
        ('{"1": ["cat"], "001": ["dog"]}', "lists '1' and '001', which are the same image"),
        ('{"1": "cat"}', "image '1' has 'cat' where a list of objects was expected"),
        ("[1]", "is not a single JSON object"),
        ('{"1": [', "objects.json line 1 is not JSON"),
    ]:
        data_folder(tmp_path, {})
        (tmp_path / "objects.json").write_text(truth)
        with pytest.raises(Fault) as caught:
            CHAIR(data=tmp_path).questions()
        assert sentence in str(caught.value)


def test_missing_synonyms_and_ground_truth_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"synonyms.txt cannot be read .* fetch chair"):
        CHAIR(data=tmp_path).questions()
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    with pytest.raises(Fault, match=r"captions_val2014.json cannot be read .* or an objects.json for other images"):
        CHAIR(data=tmp_path).questions()


def coco_folder(folder: Path) -> Path:
    """val: images 1 (a cat; one caption tells of a bus and a dog), 2 (nothing), 3; train: image 4 (a tie)."""
    folder.mkdir()
    (folder / "synonyms.txt").write_text(SYNONYMS)
    categories = [{"id": 17, "name": "cat"}, {"id": 32, "name": "tie"}]
    for split, images, instances, told in (
        ("val", [1, 2, 3], [(1, 17), (1, 17), (3, 32)], [(1, "A dog by the bus."), (1, "A cat."), (2, "Grass, 20.")]),
        ("train", [4], [(4, 32)], [(4, "A man.")]),
    ):
        listing = [{"id": i, "file_name": f"COCO_{split}2014_{i:012d}.jpg"} for i in images]
        (folder / f"instances_{split}2014.json").write_text(
            json.dumps(
                {
                    "info": {"year": 2014},
                    "images": listing,
                    "licenses": [],
                    "annotations": [
                        {"image_id": i, "category_id": c, "segmentation": [[1.5, 2]]} for i, c in instances
                    ],
                    "categories": categories,
                }
            )
        )
        (folder / f"captions_{split}2014.json").write_text(
            json.dumps({"images": listing, "annotations": [{"image_id": i, "caption": caption} for i, caption in told]})
        )
    return folder


def test_coco_truth_is_the_union_of_instances_and_human_captions(tmp_path: Path) -> None:
    """Officially the human "bus" is lost as the model's is; corrected both are read."""
    folder = coco_folder(tmp_path / "coco")
    one, two, four = CHAIR(data=folder, ids=[1, 2, 4]).questions()
    assert one.meta["objects"] == {"cat", "dog"} and one.meta["objects_corrected"] == {"cat", "dog", "bus"}
    assert two.meta["objects"] == frozenset()
    assert four.meta["objects"] == {"tie", "person"}
    with pytest.raises(Fault, match=r"Image 9 \(1 of 1 images\) is not in COCO's 2014 annotation files"):
        CHAIR(data=folder, ids=[9]).questions()


def test_coco_files_without_what_they_have_are_named(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "coco")
    (folder / "captions_val2014.json").write_text('{"annotations": [{"image_id": 1}]}')
    with pytest.raises(Fault, match="captions_val2014.json has an entry without 'caption'"):
        CHAIR(data=folder, ids=[1]).questions()
    folder = coco_folder(tmp_path / "other")
    (folder / "synonyms.txt").write_text("dog\n")
    with pytest.raises(Fault, match="COCO's category 'cat' is not a word of synonyms.txt"):
        CHAIR(data=folder, ids=[1]).questions()


def test_train_files_are_needed_only_for_train_images(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "coco")
    (folder / "instances_train2014.json").unlink()
    assert len(CHAIR(data=folder, ids=[1, 3]).questions()) == 2
    with pytest.raises(Fault, match="instances_train2014.json cannot be read"):
        CHAIR(data=folder, ids=[1, 4]).questions()


def test_images_are_drawn_by_seed_or_listed(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "coco")
    draws = {
        tuple(question.id for question in CHAIR(data=folder, number=2, seed=seed).questions()) for seed in range(20)
    }
    assert len(draws) > 1 and all(len(set(draw)) == 2 and set(draw) <= {1, 2, 3} for draw in draws)
    assert CHAIR(data=folder, number=2, seed=5).questions() == CHAIR(data=folder, number=2, seed=5).questions()
    assert len(CHAIR(data=folder).questions()) == 3
    (tmp_path / "ids.txt").write_text("3\nCOCO_val2014_000000000001.jpg\n")
    listed = CHAIR(data=folder, ids=tmp_path / "ids.txt").questions()
    assert [question.id for question in listed] == [3, "COCO_val2014_000000000001.jpg"]
    (tmp_path / "ids.json").write_text("[2, 3]")
    assert [question.id for question in CHAIR(data=folder, ids=tmp_path / "ids.json").questions()] == [2, 3]


@pytest.mark.parametrize(
    "name", ["COCO_val2014_000000000007.jpg", "000000000007.jpg", "7.png", "val2014/000000000007.jpg"]
)
def test_pictures_are_found_under_any_usual_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert coco.picture(tmp_path, 7) == tmp_path / name
    assert coco.picture(tmp_path, "COCO_val2014_000000000007.jpg") == tmp_path / name or name == "7.png"


def test_streaming_reads_what_json_reads(tmp_path: Path) -> None:
    for block in [1, 2, 3, 7, 64, 10_000]:
        content = {
            "a": [{"x": [1, 2e3, '}]\\"']}, {}],
            "n": 12345,
            "empty": [],
            "s": "é,",
            "b": [1, 23],
            "o": {"k": [1]},
        }
        (tmp_path / "f.json").write_text(json.dumps(content, indent=1, ensure_ascii=False))
        expected = [
            (key, item) for key, value in content.items() for item in (value if isinstance(value, list) else [value])
        ]
        assert list(coco.entries(tmp_path / "f.json", block)) == expected


def test_broken_annotation_files_are_refused(tmp_path: Path) -> None:
    for content in ['{"images": [{"id": 1}, {"id"', '{"images": [{"id": 1}', "", "[1]", '{"a" 1}']:
        (tmp_path / "f.json").write_text(content)
        with pytest.raises(Fault, match="download the file again"):
            list(coco.entries(tmp_path / "f.json", 4))


def test_official_files_can_be_read_again(tmp_path: Path) -> None:
    folder = data_folder(tmp_path, {"7": ["cat"], "8": ["dog"]})
    questions = CHAIR(data=folder).questions()
    file = ANY.write_official(questions, ["A cat.", "A cat\u2028and a dog."], tmp_path / "official")
    assert ANY.read_answers(file, questions) == ["A cat.", "A cat\u2028and a dog."]
    assert chair.captions(tmp_path / "official" / "chair.json")[1][1:] == (8, "A cat\u2028and a dog.")
