"The report in docs/ says what its record says, in both languages, and its commands are the README's."
import gzip
import importlib.util
import json
import re
import shlex
import sys
from itertools import islice

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

SMALL = dict(pretrain="--steps 4 --n_layer 1 --n_head 2 --n_embd 16 --vocab_size 400 --tokenizer_bytes 40000 --corpus_tokens 6000",
             sft="--epochs 1 --steps 4 --eval_every 2", eval="--limit 4")

def test_the_recipe_in_small(tmp_path, monkeypatch, capsys):
    "The recipe's own commands, in order, with fewer steps: on texts of our own that lie where the real ones would."
    from nanogpt import cli, corpus
    names = corpus.REGISTRY
    for name in ("fineweb-edu", "enwiki", "austen", "dolly"):
        path = tmp_path/"data"/names[name][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        talks, texts = islice(corpus.rows("tales", seed=3), 150), islice(corpus.documents("tales", seed=len(name)), 40)
        lines = [json.dumps(r) for r in (talks if name=="dolly" else ({"text": t} for t in texts))]
        if name=="austen": path.mkdir(); path = path/"novel.jsonl"
        if path.suffix==".gz": path.write_bytes(gzip.compress("\n".join(lines).encode()))
        elif path.suffix==".txt": path.write_text("\n\n".join(islice(corpus.documents("tales", seed=9), 40)))
        else: path.write_text("\n".join(lines))
    monkeypatch.setenv("NANOGPT_DATA", str(tmp_path/"data"))
    monkeypatch.chdir(tmp_path)
    for line in experiment.RECIPE:
        words = shlex.split(line)[1:]
        assert not cli.main([*words, *shlex.split(SMALL.get(words[0], ""))]), line
    held = {t["messages"][0]["content"] for t in corpus.records(tmp_path/"runs/talks/held-out.jsonl")}
    asked = json.loads((tmp_path/"runs/report/report.json").read_text())["samples"]
    assert asked and {o["prompt"] for o in asked} <= held
    page = (tmp_path/"runs/report/report.html").read_text(encoding="utf-8")
    assert "dolly val_loss" in page and "not the same items" not in page               # base and tuned were asked the same

def test_record_is_whole():
    "Every metric has items and intervals around its values; HellaSwag was asked whole; verdicts are those of the intervals."
    assert {k.split(".")[0] for k in RECORD["metrics"]}>={"hellaswag", "arc_easy", "arc_challenge", "lambada", "dolly", "quality", "tales"}
    for name, m in RECORD["metrics"].items():
        for side in (m["before"], m["after"]): assert side["n"]>0 and side["low"]<=side["value"]<=side["high"], name
        if m["verdict"]=="unclear": assert m["change"]["low"]<=0<=m["change"]["high"]
    assert all(m["after"]["n"]==10042 for k, m in RECORD["metrics"].items() if k.startswith("hellaswag."))
