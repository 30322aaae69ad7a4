"""What the tables decide: places, collapse, ranks, rows; and how they are written."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys

import pytest

from povid.fault import Fault
from povid.report import paper, render
from povid.report.command import write_tables
from povid.report.runs import find_runs
from povid.report.tables import row_of, table


def lines(made, kind="ours"):
    return {line.name: line for block in made.blocks for line in block.lines if line.kind == kind}


def places(made, score, kind="ours"):
    return {name: line.cells[score].place for name, line in lines(made, kind).items()}


@pytest.fixture
def sweep(write, outputs):
    for row in ("none", "text", "noise", "both", "preferred_only"):
        for seed in range(2):
            write(row, seed, shift=float(seed))
    return outputs


def test_best_and_second_best_are_as_the_paper_prints_them(write, outputs):
    """Bold and underlined as printed (Table 2's second half by its numbers)."""
    write("none", 0, model="llava_1_5_7b", data="povid_17k", benchmarks={"llava_bench": {"overall": 60.0}})
    qwen, feedback = "qwen_vl_chat", "vlfeedback"
    for number, keys, best, second in (
        (1, paper.EIGHT, ["povid"] * 8, ["rlhf_v"] * 3 + [feedback, "rlhf_v", feedback, feedback, "rlhf_v"]),
        (
            2,
            paper.EIGHT,
            ["povid", "povid", qwen, qwen, "povid", qwen, "povid", "povid"],
            ["instructblip", "instructblip", "povid", "povid", qwen, "mplug_owl2", "mplug_owl2", qwen],
        ),
        (3, paper.EIGHT, ["both"] * 8, ["text"] * 5 + ["none"] + ["text"] * 2),
        (4, paper.BREAKDOWN, ["povid"] * 4, ["rlhf_v", "rlhf_v", "human_preference", "rlhf_v"]),
    ):
        printed = lines(table(number, find_runs(outputs)), "paper")
        for place, expected in ((1, best), (2, second)):
            found = [next(name for name, line in printed.items() if line.cells[key].place == place) for key in keys]
            assert found == expected, f"Table {number}, place {place}"


def test_best_and_second_best_of_ours(sweep):
    """CHAIR_S means 72.5, (text 50.5), 60.5, 48.5: text's coverage is 14 points lower, so noise is second. POPE means
    81.5, 80.5, 79.5, 82.5."""
    made = table(3, find_runs(sweep))
    assert places(made, "chair.CHAIR_S") == {"none": 0, "text": 0, "noise": 2, "both": 1}
    assert places(made, "pope.f1") == {"none": 2, "text": 0, "noise": 0, "both": 1}
    assert places(made, "chair.coverage") == dict.fromkeys(("none", "text", "noise", "both"), 0)
    assert lines(made, "control")["preferred_only"].cells["chair.CHAIR_S"].place == 0


def test_ties_share_a_place_as_shown(write, outputs):
    """49.96 and 50.04 both print 50.0 and are both best; 60.0 is second, 72.0 unmarked."""
    write("none", 0)
    for row, chair_s in (("text", 49.96), ("noise", 60.0), ("both", 50.04)):
        write(row, 0, benchmarks={"chair": {"CHAIR_S": chair_s}})
    assert places(table(3, find_runs(outputs)), "chair.CHAIR_S") == {"none": 0, "text": 1, "noise": 2, "both": 1}


def test_a_single_value_is_not_best_and_the_last_of_two_not_second(write, outputs):
    write("none", 0)
    assert places(table(3, find_runs(outputs)), "chair.CHAIR_S") == {"none": 0}
    write("both", 0)
    assert places(table(3, find_runs(outputs)), "chair.CHAIR_S") == {"none": 0, "both": 1}


def test_only_a_fall_of_more_than_ten_points_is_marked(write, outputs):
    write("none", 0)  # coverage 65
    for coverage, marked in ((55.0, False), (54.9, True)):
        for row in ("both", "swaps_only"):
            write(row, 0, benchmarks={"chair": {"CHAIR_S": 13.0, "CHAIR_I": 13.0, "coverage": coverage}})
        made = table(3, find_runs(outputs))
        both, control = lines(made)["both"], lines(made, "control")["swaps_only"]
        assert bool(both.says_less) == bool(control.says_less) == marked
    assert both.says_less.startswith("both says less: coverage fell by 10.1 points (from 65.0 to 54.9)")
    text = render.markdown(made)
    assert "both, n = 1 † |" in text and "- † both says less: coverage fell by 10.1 points" in text
    assert both.cells["chair.CHAIR_S"].place == 0


def test_a_base_of_another_model_is_not_compared(write, outputs):
    write("none", 0, model="llava_debug")
    write("text", 0)
    made = table(3, find_runs(outputs))
    assert not lines(made)["text"].says_less
    assert any("No base row" in text for block in made.blocks for text in block.warnings)


def test_difference_from_the_base_with_its_error(sweep):
    """CHAIR_S of noise 60, 61, of none 72, 73: gap -12; both have sd 0.7071, se 0.5, so the error is sqrt(0.5) =
    0.70710678 and 12 is more than two of it. Text earns no mark in CHAIR, because it says less."""
    made = table(3, find_runs(sweep))
    from_base = next(block for block in made.blocks if block.title.startswith("difference from none"))
    found = {line.name: line.cells["chair.CHAIR_S"] for line in from_base.lines}
    assert found["noise"].summary.mean == -12.0
    assert found["noise"].summary.se == pytest.approx(0.70710678)
    assert found["noise"].text(1) == "−12.0 ± 0.7"
    assert {name: cell.place for name, cell in found.items()} == {"text": 0, "noise": 1, "both": 1, "preferred_only": 1}
    assert any(block.title.startswith("difference from preferred_only") for block in made.blocks)


def test_each_row_is_compared_with_the_base_evaluated_in_the_same_way(write, outputs):
    """Base coverage is 65 with 300 captions and 40 with 30; one with 30 captions and coverage 42 does not say less."""
    for row, size, coverage in (("none", 300, 65.0), ("none", 30, 40.0), ("text", 30, 42.0)):
        folder = write(row, 0, folder=f"{row}{size}", benchmarks={"chair": {"CHAIR_S": 50.0, "coverage": coverage}})
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "overrides.yaml").write_text(f"- data.prepare.evaluation={size}\n")
    made = table(3, find_runs(outputs))
    assert not lines(made)["text"].says_less
    assert lines(made, "difference")["text"].lead[-1] == "text − none (data.prepare.evaluation=30)"


def test_a_single_run_is_never_better_than_its_error(write, outputs):
    write("none", 0)
    write("both", 0)
    assert lines(table(3, find_runs(outputs)), "difference")["both"].cells["chair.CHAIR_S"].place == 0


def test_each_row_stands_above_the_papers_with_its_check_marks(sweep):
    block = table(3, find_runs(sweep)).blocks[0]
    assert [(line.name, line.kind) for line in block.lines] == [
        (name, kind) for name in ("none", "text", "noise", "both") for kind in ("ours", "paper")
    ]
    assert [line.lead[:2] for line in block.lines[::2]] == [("✗", "✗"), ("✓", "✗"), ("✗", "✓"), ("✓", "✓")]
    assert block.lines[1].lead[2] == "paper, Table 3"


def test_a_table_of_the_embedded_world_says_so(sweep, write):
    made = table(3, find_runs(sweep))
    assert "come from the embedded world (data=scenes, model=scenes_tiny)" in made.blocks[0].warnings[0]
    assert made.blocks[0].notes[0].endswith("ours none > noise > text † > both; paper none > noise > text > both.")
    write("both", 0, folder="real", model="llava_1_5_7b", data="povid_17k")
    write("none", 0, folder="base", model="llava_1_5_7b", data="povid_17k")
    real = next(block for block in table(3, find_runs(sweep)).blocks if "llava_1_5_7b" in block.title)
    assert not real.warnings
    named = {"settings": {"data.prepare._target_": "povid.scenes.world.prepare"}, "places": {}}
    for data, names, start in (
        ("rlhf_v", {"settings": {}, "places": {}}, "The paper's rows are LLaVA-1.5-7B"),
        ("my_scenes", named, "These numbers come from the embedded world (data=my_scenes, model=tiny)"),
    ):
        write("both", 0, folder=data, model="tiny", data=data, stages={}, identity={"row": {}, "named": names})
        found = table(3, [run for run in find_runs(sweep) if run.folder.name == data])
        assert found.blocks[0].warnings[0].startswith(start)


def test_base_models_and_other_preference_data_are_omitted_from_table_3(write, outputs):
    real = {"model": "llava_1_5_7b", "data": "povid_17k"}
    write("text", 0, folder="a", **real)
    write("none", 0, folder="b", model="qwen_vl_chat", data="povid_17k")
    write("text", 0, folder="c", model="llava_1_5_7b", data="rlhf_v")
    made = table(3, find_runs(outputs))
    assert {block.title for block in made.blocks} == {"model llava_1_5_7b, data povid_17k"}
    assert made.notes[-1] == (
        "omitted (model, data): llava_1_5_7b, rlhf_v; qwen_vl_chat, povid_17k; see Tables 1 and 2"
    )
    assert [block.title for block in table(1, find_runs(outputs)).blocks] == ["model llava_1_5_7b"]


def test_a_partial_run_is_not_a_row_of_the_ablation(write, outputs):
    write("both", 0, stage=1)
    made = table(3, find_runs(outputs))
    assert not lines(made) and lines(made, "control")["both"].lead[-1] == "both (stage 1 only), n = 1"


def test_table_1_sorts_runs_by_preference_data(write, outputs):
    real = {"model": "llava_1_5_7b"}
    write("none", 0, data="povid_17k", **real)
    write("none", 1, data="rlhf_v", folder="base2", **real)
    write("both", 0, data="povid_17k", **real)
    write("text", 0, data="povid_17k", **real)  # an ablation of POVID, not POVID
    write("text", 0, data="rlhf_v", folder="r", **real)
    write("both", 0, folder="scenes")
    made = table(1, find_runs(outputs))
    assert [(line.name, line.kind, line.lead[0]) for line in made.blocks[0].lines] == [
        ("none", "ours", "LLaVA-1.5"),
        ("none", "paper", "LLaVA-1.5"),
        ("vlfeedback", "paper", "+ Vlfeedback"),
        ("human_preference", "paper", "+ Human-Preference"),
        ("text", "ours", "+ RLHF-V"),
        ("rlhf_v", "paper", "+ RLHF-V"),
        ("both", "ours", "POVID"),
        ("povid", "paper", "POVID"),
    ]
    assert made.blocks[0].lines[0].lead[1] == "none, n = 2"


EIGHT = {
    "chair": {"CHAIR_S": 0.0, "CHAIR_I": 0.0},
    "pope": {"f1": 0.0},
    "mmhal": {"score": 0.0},
    "science_qa": {"img_accuracy": 0.0},
    "mm_vet": {"total": 0.0},
    "mmbench": {"accuracy": 0.0},
    "llava_bench": {"overall": 0.0},
}


def test_average_ranks_are_computed_and_printed_ones_marked(write, outputs):
    """Paper's scores: hallucination 3.00, 2.00, 3.50, 1.50 (printed 3.00, 2.50, 4.00, 1.50); comprehensive 3.75, 2.00,
    2.75, 1.50 (printed 4.00, 2.25, 3.00, and one that is lost). Ours: POPE 80, 80, 70 with all else equal: POPE places
    1.5, 1.5, 3, the other three 2 each, so (1.5 + 6) / 4 = 1.875 and (3 + 6) / 4 = 2.25."""
    for model, f1 in (("instructblip_7b", 80.0), ("served/Qwen-VL-Chat", 80.0), ("qwen2_5_vl", 70.0)):
        write("none", 0, folder=model, model=model, data="none", benchmarks=EIGHT | {"pope": {"f1": f1}})
    write("none", 0, folder="partial", model="llava_next", benchmarks={"pope": {"f1": 90.0}}, data="none")
    made = table(2, find_runs(outputs))
    printed = lines(made, "paper")
    for score, ranks in (("rank.hallucination", [3.0, 2.0, 3.5, 1.5]), ("rank.comprehensive", [3.75, 2.0, 2.75, 1.5])):
        assert [line.cells[score].summary.mean for line in printed.values()] == ranks
    assert printed["qwen_vl_chat"].cells["rank.hallucination"].notes == [
        "paper, Table 2 prints 2.50 for Qwen-VL-Chat; its own scores give 2.00"
    ]
    assert not printed["povid"].cells["rank.hallucination"].notes
    ours = {line.lead[0]: line.cells["rank.hallucination"] for line in made.blocks[0].lines if line.kind == "ours"}
    assert {name: cell.summary.mean for name, cell in ours.items()} == {
        "InstructBLIP": 1.875,
        "Qwen-VL-Chat": 1.875,
        "qwen2_5_vl": 2.25,
        "llava_next": None,
    }
    assert "only rows with all four scores" in ours["llava_next"].notes[0]


def test_a_row_that_says_less_is_marked_in_every_table(write, outputs):
    real = {"model": "llava_1_5_7b", "data": "povid_17k"}
    scores = {"CHAIR_S": 10.0, "CHAIR_I": 5.0}
    for row, coverage in (("none", 70.0), ("both", 50.0)):
        write(row, 0, **real, benchmarks={"chair": scores | {"coverage": coverage}, "llava_bench": {"overall": 60.0}})
    for number in (1, 2, 3, 4):
        assert "† both says less: coverage fell by 20.0 points" in render.markdown(table(number, find_runs(outputs)))


def test_table_4_is_the_breakdown(write, outputs):
    write(
        "both",
        0,
        model="llava_1_5_7b",
        data="povid_17k",
        benchmarks={"llava_bench": {"conv": 55.0, "detail": 60.0, "complex": 81.0, "overall": 68.0}},
    )
    cells = lines(table(4, find_runs(outputs)))["both"].cells
    assert [cells[key].summary.mean for key in paper.BREAKDOWN] == [55.0, 60.0, 81.0, 68.0]


def test_the_corrected_score_is_a_note_on_the_official_one(write, outputs):
    write("none", 0, benchmarks={"pope": {"f1": 80.0, "corrected": {"f1": 81.5}}})
    assert lines(table(3, find_runs(outputs)))["none"].cells["pope.f1"].notes == [
        "pope: official rule; corrected 81.50"
    ]


def test_invalid_answers_and_repeats_are_notes_where_they_explain_a_score(write, outputs):
    """Both are means over the seeds; up to one percent, and where older results hold neither, nothing is said."""

    def benchmarks(invalid: float, distinct: float) -> dict:
        return {
            "pope": {"f1": 80.0, "yes_ratio": 50.0, "invalid": invalid, "f1_valid": 85.0},
            "chair": {"CHAIR_S": 50.0, "CHAIR_I": 20.0, "CHAIR_I_distinct": distinct, "repeat_rate": 30.0},
        }

    for seed, invalid in enumerate((2.0, 4.0)):
        write("both", seed, benchmarks=benchmarks(invalid, 24.0))
        write("text", seed, benchmarks=benchmarks(0.9, 20.9))
        write("none", seed)
    made = lines(table(3, find_runs(outputs)))
    both, text, none = made["both"], made["text"], made["none"]
    assert both.cells["pope.f1"].notes == [
        "pope: 3.0 % of the answers say neither yes nor no; f1 of the others is 85.00"
    ]
    assert both.cells["chair.CHAIR_I"].notes == [
        "chair: 30.0 % of the mentions repeat an object of their caption; CHAIR_I over distinct objects is 24.0"
    ]
    assert not both.cells["chair.CHAIR_S"].notes
    for line in (text, none):
        assert not line.cells["pope.f1"].notes and not line.cells["chair.CHAIR_I"].notes


def test_a_run_without_a_correction_counts_with_its_official_score(write, outputs):
    """Official 80 and 60, corrected 82 in the first run only: the corrected mean is (82 + 60) / 2 = 71."""
    write("none", 0, benchmarks={"pope": {"f1": 80.0, "corrected": {"f1": 82.0, "what": "a parser"}}})
    write("none", 1, benchmarks={"pope": {"f1": 60.0}})
    assert lines(table(3, find_runs(outputs)))["none"].cells["pope.f1"].notes == [
        "pope: official rule; corrected 71.00"
    ]


def test_an_adapter_evaluated_without_training_is_not_a_base(write, outputs):
    write(
        "none",
        0,
        folder="evaluated",
        adapters=["somewhere/stage_2/adapter"],
        benchmarks={"chair": {"CHAIR_S": 10.0, "coverage": 20.0}},
    )
    write("none", 0)
    write("both", 0)
    made = table(3, find_runs(outputs))
    assert lines(made)["none"].cells["chair.CHAIR_S"].summary.mean == 72.0
    evaluated = lines(made, "control")["none"]
    assert "adapters=" in evaluated.lead[-1] and "fell by 45.0 points" in evaluated.says_less
    assert not lines(made)["both"].says_less


def test_unexpected_values_in_results_are_tolerated(write, outputs):
    write("none", 0)
    for odd in (
        {"stages": [1]},
        {"noise": "sigmoid"},
        {"versions": "x"},
        {"started": None},
        {"model": {"name": "m"}},
        {"benchmarks": {"chair": 5, "pope": None}},
        {"stage": None},
        {"data": None},
        {"decoding": ["greedy"]},
        {"columns": []},
    ):
        write("both", 0, **odd)
        assert len(write_tables(outputs, pictures=False)) >= 4, odd


def test_markdown_dashes_have_reasons_and_marks(sweep):
    text = render.markdown(table(3, find_runs(sweep)))
    row = next(line for line in text.splitlines() if "| both, n = 2" in line)
    assert row.startswith("| ✓ | ✓ | both, n = 2 | **48.5 ± 0.7** | **25.5 ± 0.7** | **82.50 ± 0.71** | –<sup>a</sup>")
    assert "- <sup>a</sup> mmhal: no judge is set; export POVID\\_JUDGE\\_MODEL=..." in text
    widths = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {15}


def test_csv_holds_what_was_measured(sweep):
    rows = list(csv.DictReader(io.StringIO(render.comma_separated(table(3, find_runs(sweep))))))
    text = next(row for row in rows if row["name"] == "text" and row["kind"] == "ours")
    assert (text["chair.CHAIR_S"], text["chair.CHAIR_S.sd"], text["chair.CHAIR_S.se"]) == ("50.5", "0.707107", "0.5")
    assert text["chair.CHAIR_S.n"] == "2" and text["Text disprefer"] == "yes" and text["mmhal.score"] == ""
    assert "coverage fell by 14.0" in text["says_less"] and "no judge is set" in text["notes"]
    printed = next(row for row in rows if row["name"] == "both" and row["kind"] == "paper")
    assert printed["pope.f1"] == "86.9" and printed["pope.f1.n"] == ""


def test_columns_of_any_benchmark_follow_the_papers(write, outputs):
    """Means of mine.score: text 2, both 3, so both is best. The columns that the paper has are not repeated."""
    columns = [
        {"key": "pope.f1", "title": "POPE", "better": "high", "decimals": 2, "subscript": ""},
        {"key": "mine.score", "title": "Mine", "better": "high", "decimals": 3, "subscript": "X"},
        {"key": "llava_bench.conv", "title": "Convo", "better": "high", "decimals": 1, "subscript": ""},
    ]
    real = {"model": "llava_1_5_7b", "data": "povid_17k"}
    write("none", 0, **real)
    for row, score in (("text", 2.0), ("both", 3.0)):
        write(row, 0, **real, columns=columns, benchmarks={"mine": {"score": score}, "pope": {"f1": 80.0}})
    for number in (1, 3):
        made = table(number, find_runs(outputs))
        assert [column.heading for column in made.columns[10:]] == ["yes %", "Mine_X ↑"]
        assert lines(made)["none"].cells["mine.score"].notes == ["mine was not selected; add it to benchmarks="]
    assert places(made, "mine.score") == {"none": 0, "text": 0, "both": 1}
    assert "| Mine<sub>X</sub> ↑ |" in render.markdown(made) and "**3.000**" in render.markdown(made)
    assert "mine.score.sd" in render.comma_separated(made) and r"Mine$_{X}$~$\uparrow$" in render.latex(made)
    assert not any(column.key == "mine.score" for column in table(2, find_runs(outputs)).columns)


def test_footnote_marks_continue_after_z(write, outputs):
    for number in range(30):
        benchmarks = {"chair": {"missing": f"reason {number}"}}
        write("text", 0, folder=f"t{number}", benchmarks=benchmarks, decoding={"chair": {"temperature": number}})
    text = render.markdown(table(3, find_runs(outputs)))
    for mark in ("a", "z", "aa", "ab"):
        assert f"- <sup>{mark}</sup> " in text


def test_equal_values_are_not_ranked(write, outputs):
    for row in ("none", "text", "noise"):
        write(row, 0, benchmarks={"chair": {"CHAIR_S": 50.0}})
    assert set(places(table(3, find_runs(outputs)), "chair.CHAIR_S").values()) == {0}


def test_latex_escapes_everything(write, outputs):
    write(
        "preferred_only", 0, model="a_b", data="50%&#x", benchmarks={"mmhal": {"missing": "costs $5 {x} ~^\\ a|b <c>"}}
    )
    text = render.latex(table(3, find_runs(outputs)))
    assert r"preferred\_only, n = 1" in text and r"model a\_b, data 50\%\&\#x" in text
    assert r"mmhal: costs \$5 \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{} a$|$b $<$c$>$" in text
    assert r"CHAIR$_{S}$~$\downarrow$" in text and r"\textbf{31.8}" in text and r"\underline{39.6}" in text
    bare = re.sub(r"\\[\\{}$&%#_]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    assert not re.search(r"[^\x00-\x7f]", text)
    body = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.replace(r"\&", "").count("&") for line in body} == {13}


def test_names_from_other_files_stay_text(write, outputs):
    """No formula in a spreadsheet, no picture that a viewer loads, no command in LaTeX or in a terminal."""
    hostile = ("=HYPERLINK(1)", "![x](http://elsewhere/x.png)", "\x1b]0;title\x07", "[8pt] *row", "<b>&amp;", "@SUM(1)")
    columns = [{"key": "mine.x", "title": "![t](u)", "better": "high", "decimals": 1, "subscript": "}$x[y](z)"}]
    for number, name in enumerate(hostile):
        place = write("text", 0, folder=f"r{number}", model=name, columns=columns, benchmarks={"mine": {"x": 1.0}})
        file = place / "results.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "row": name}))
        write("none", 0, folder=f"n{number}", model=name, benchmarks={"mine": {"missing": name}})
    made = table(3, find_runs(outputs))
    for row in csv.reader(io.StringIO(render.comma_separated(made))):
        assert not any(cell.lstrip().startswith(("=", "@", "+")) for cell in row), row
    markdown = render.markdown(made)
    assert "HYPERLINK" in markdown and r"!\[x\](http" in markdown
    assert not re.search(r"(?<!\\)\]\(|<b>|&amp;(?!amp;)", markdown)
    text = render.latex(made)
    assert "}$x[" not in text and not re.search(r"^\s*[\[*]", text, re.MULTILINE)
    assert "\x1b" not in render.plain(made) and "title" in render.plain(made)


def test_write_tables_writes_what_belongs_and_pictures_open(sweep):
    from PIL import Image

    files = write_tables(sweep)
    assert {file.name for file in files} == {
        "table3.md",
        "table3.txt",
        "table3.csv",
        "table3.tex",
        "table3.png",
        "ablations.png",
        "chair_against_coverage.png",
    }
    assert {path.name for path in (sweep / "tables").iterdir()} == {file.name for file in files}  # no drafts
    for file in files:
        if file.suffix == ".png":
            with Image.open(file) as picture:
                low, high = picture.convert("L").getextrema()
                assert picture.width > 800 and low < 60 and high == 255


def test_plain_text_is_aligned_and_omits_empty_columns(sweep):
    text = render.plain(table(3, find_runs(sweep)))
    assert "CHAIR_S" in text and "MMHal" not in text
    head, *rows = [line for line in text.split("\n\n")[1].splitlines() if line.startswith(("Text", "✗", "✓"))]
    end = head.index("CHAIR_S ↓") + len("CHAIR_S ↓")  # marks of best and second best stand in this place
    assert len(rows) == 8 and {row[end] for row in rows} == {" "} and {row[end - 1] for row in rows} <= set(" *_")


def test_a_table_without_runs(sweep):
    with pytest.raises(Fault, match="no run for Table 2; it needs"):
        write_tables(sweep, only=(2,), pictures=False)


def test_a_folder_that_cannot_be_written(sweep, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(Fault, match="taken cannot be written"):
        write_tables(sweep, tmp_path / "taken", pictures=False)


def test_command_prints_the_table_and_imports_no_torch(sweep, tmp_path):
    code = (
        "import sys; from povid.report.__main__ import main; "
        f"code = main([{str(sweep)!r}, '--table', '3', '--out', {str(tmp_path / 'out')!r}]); "
        "assert not {'torch', 'lightning', 'transformers', 'wandb', 'pandas'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Table 3. Ablation" in done.stdout and "CHAIR_S" in done.stdout and "table3.png" in done.stdout


def test_command_reports_an_error_in_one_line(tmp_path, capsys):
    from povid.report.__main__ import main

    assert main([str(tmp_path / "none")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1


def test_a_judged_score_names_its_judge_and_the_wording(write, outputs):
    judge = {"model": "gpt-4o", "official_model": "gpt-4-0314", "wording": "povid-1", "prompt": "0" * 16}
    official = judge | {"wording": "official", "model": "open", "revision": "c0ffee", "prompt": "1" * 16}
    write("both", 0, benchmarks={"mmhal": {"score": 2.5, "judge": judge}})
    write("none", 0, benchmarks={"mmhal": {"score": 2.5, "judge": official}})
    found = render.markdown(table(3, find_runs(outputs)))
    assert "mmhal: judged by gpt-4o (officially gpt-4-0314), the prompt in our own wording (povid-1)" in found
    assert "mmhal: judged by open at revision c0ffee (officially gpt-4-0314), the official prompt" in found
    assert "| 2.50‡<sup>" in found and "| 2.50<sup>" in found  # ours is marked at the score itself
    text = render.plain(table(3, find_runs(outputs)))
    assert text.count("2.50‡") == 1 and "‡ the judge was asked in our wording of the prompt" in text
    assert r"2.50$\ddagger$" in render.latex(table(3, find_runs(outputs)))
    write("both", 1, benchmarks={"mmhal": {"score": 2.5, "judge": official}})
    assert "runs differ in judge" in render.markdown(table(3, find_runs(outputs)))


def test_rows_of_a_quick_look_stand_apart_and_say_so_everywhere(write, outputs):
    """One seed was asked about 20 pictures: it is averaged with nobody, ranked in a block of its own, and marked."""
    for row in ("none", "both"):
        for seed in range(2):
            write(row, seed)
        limited = {
            "chair": {"CHAIR_S": 5.0, "CHAIR_I": 3.0, "coverage": 60.0, "limit": {"limit": 20, "asked": 20, "of": 500}},
            "pope": {"f1": 99.0, "limit": {"limit": 20, "asked": 360, "of": 9000}},
        }
        write(row, 2, folder=f"quick/{row}", benchmarks=limited)
    runs = find_runs(outputs)
    made = table(3, runs)
    ours = [line for block in made.blocks for line in block.lines if line.kind == "ours"]
    whole, quick = ([line for line in ours if line.lead[-1].endswith("=20") is limited] for limited in (False, True))
    assert [line.lead[-1] for line in whole] == ["none, n = 2", "both, n = 2"]
    assert [line.lead[-1] for line in quick] == ["none, n = 1, benchmarks.limit=20", "both, n = 1, benchmarks.limit=20"]
    assert whole[1].cells["chair.CHAIR_S"].place == 1, "the quick look's 5.0 is no rival"
    assert all(
        ("benchmarks.limit=20" in block.title) == any(line in quick for line in block.lines)
        for block in made.blocks[:2]
    )
    for text in (render.markdown, render.plain, render.comma_separated, render.latex):
        assert "questions asked are chair 20 of 500, pope 360 of 9000, so" in text(made)
    assert [(column.key, cell.text(1)) for column, cell in row_of(runs[0])][:2] == [
        ("chair.CHAIR_S", "5.0"),
        ("chair.CHAIR_I", "3.0"),
    ]
    only = table(3, [run for run in runs if not run.limit])
    assert "limit" not in "".join(text(only) for text in (render.markdown, render.plain, render.latex))
