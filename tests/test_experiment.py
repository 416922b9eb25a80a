"The report in docs/ says what its record says, in both languages, and its commands are the README's."
import importlib.util
import json
import re
import sys

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("experiment", ROOT/"docs/experiment.py")
experiment = importlib.util.module_from_spec(spec)
sys.modules["experiment"] = experiment
spec.loader.exec_module(experiment)
RECORD = json.loads((ROOT/"results/experiment.json").read_text(encoding="utf-8"))
TEMPLATES = sorted((ROOT/"docs/templates").glob("*.md"))

@pytest.mark.parametrize("template", TEMPLATES, ids=lambda p: p.stem)
def test_written_from_the_record(template):
    "Writing the page again gives the same page."
    text = (ROOT/"docs"/template.name).read_text(encoding="utf-8")
    assert experiment.rendered(template.read_text(encoding="utf-8"), RECORD)==text and "{{" not in text

NAMES = r"`[^`]*`|\[\d+\]|GPT-2|Dolly-15k|ROUGE-L|T0|\(\d\)" # names of things, and the numbers of references

def figures(text):
    "Digits of the prose that are no name: everything before the references, without code and without what is looked up."
    prose = re.sub(r"```.*?```|\{\{.*?\}\}", "", text.split("\n## References")[0].split("\n## 参考文献")[0], flags=re.S)
    return [line for line in re.sub(r"\]\([^)]*\)|"+NAMES, "", prose).splitlines() if re.search(r"\d", line)]

@pytest.mark.parametrize("template", TEMPLATES, ids=lambda p: p.stem)
def test_no_figure_is_typed(template):
    assert figures(template.read_text(encoding="utf-8"))==[]
    assert figures("The loss is 4.2 now.")==["The loss is 4.2 now."]                   # the control

def test_two_languages_say_the_same():
    "The translation looks up the same places, in the same order of sections."
    one, two = (re.findall(r"\{\{(.+?)\}\}", t.read_text(encoding="utf-8")) for t in TEMPLATES)
    assert sorted(set(one))==sorted(set(two)) and len(TEMPLATES)==2
    heads = [re.findall(r"^#+ ", t.read_text(encoding="utf-8"), re.M) for t in TEMPLATES]
    assert heads[0]==heads[1]

def test_pictures():
    for name, svg in experiment.pictures(RECORD): assert (ROOT/"docs/img"/name).read_text(encoding="utf-8")==svg

def test_recipe_is_documented():
    "Each command of the recipe stands in the README, in this order, and it kept to its hour on two cores."
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    places = [text.find(line) for line in experiment.RECIPE]
    assert -1 not in places and places==sorted(places)
    assert list(experiment.RECIPE+experiment.MORE)==RECORD["record"]["commands"] and RECORD["record"]["cores"]==2
    assert RECORD["recipe_seconds"]==pytest.approx(sum(RECORD["seconds"][o] for o in experiment.RECIPE)) and RECORD["recipe_seconds"]<3600

def test_readme_shows_the_table():
    rows = list(experiment.rows(RECORD, experiment.README))
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in text and len(rows)==7

def test_record_is_whole():
    "Every metric has items and intervals around its values; HellaSwag was asked whole; verdicts are those of the intervals."
    assert {k.split(".")[0] for k in RECORD["metrics"]}>={"hellaswag", "arc_easy", "arc_challenge", "lambada", "dolly", "quality", "tales"}
    for name, m in RECORD["metrics"].items():
        for side in (m["before"], m["after"]): assert side["n"]>0 and side["low"]<=side["value"]<=side["high"], name
        if m["verdict"]=="unclear": assert m["change"]["low"]<=0<=m["change"]["high"]
    assert all(m["after"]["n"]==10042 for k, m in RECORD["metrics"].items() if k.startswith("hellaswag."))
