"Nothing that a person reads in the dashboard is without its Chinese, no line is left over, and no hole is lost."
import json
import re

import pytest
from conftest import ROOT
from hostile import HOSTILE

from nanogpt.dialogue import CONTROLS, LABELS
from nanogpt.phrases import LANGUAGES, Phrases, asked_for, gaps, holes, lines

def wanted():
    "Every sentence that the package may ask for."
    return {s for p in (ROOT/"nanogpt").glob("*.py") for s in asked_for(p.read_text(encoding="utf-8"))}

@pytest.mark.parametrize("lang", [k for k in LANGUAGES if k!="en"])
def test_all_is_translated(lang):
    "What the code asks for is there, what is there is asked for, and holes are the same."
    assert gaps(wanted(), lines(lang))==dict(missing=[], unused=[], holes=[])

def test_tables_are_marked():
    "Names and explanations of the knobs, and of the prompts to start from, are marked where they stand: so the search sees them."
    assert {s for c in CONTROLS.values() for s in (c.label, c.explain)} | set(LABELS.values()) <= wanted()

def test_control():
    "A sentence that nobody translated, a line that nobody asks for and a hole that was lost are found."
    known = dict(lines("zh"), **{"Nobody asks for this.": "没有人问", "{n} lost": "丢了"})
    found = gaps(wanted() | {"Not translated {n}", "{n} lost"}, known)
    assert found==dict(missing=["Not translated {n}"], unused=["Nobody asks for this."], holes=["{n} lost"])

def test_the_file_is_tidy():
    "UTF-8 as it is read, sorted, no key twice; a line of Chinese is Chinese, and ends as the English one does."
    path = ROOT/"nanogpt"/"phrases.zh.json"
    pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    assert [k for k, _ in pairs]==sorted({k for k, _ in pairs})
    assert path.read_text(encoding="utf-8")==json.dumps(dict(pairs), ensure_ascii=False, indent=1)+"\n"
    ends = {".": "。", "?": "？", "!": "！", "…": "…", ":": "："}
    for english, chinese in pairs:
        assert re.search("[\u4e00-\u9fff]", re.sub(r"\{\w+\}", "", chinese)), english
        if english[-1] in ends: assert chinese[-1]==ends[english[-1]], (english, chinese)
        assert not re.search("[\u4e00-\u9fff] ?[,;!?]", chinese), chinese # commas and such are Chinese too

def test_a_value_is_never_read_again():
    "Names of models and files are put in as they are, in either language."
    sentence = "{name} and {n} in a sentence that nobody translates"
    for lang in LANGUAGES:
        for text in HOSTILE.values(): assert Phrases(lang).t(sentence, name=text, n=1)==sentence.replace("{n}", "1").replace("{name}", text)

def test_every_language_has_its_file():
    "A language that one can choose has a file that travels with the package, and holes that are its own."
    assert [p.name for p in sorted((ROOT/"nanogpt").glob("phrases.*.json"))]==sorted(f"phrases.{k}.json" for k in LANGUAGES if k!="en")
    assert any(holes(k) for k in lines("zh"))
