"The numbers people read in the README are those of the records in results/, to the letter."
import json

import pytest
from conftest import ROOT

ALL = sorted((ROOT/"results").glob("*.json"))
RACE, DATA, SEEDS, EXPERIMENT = (ROOT/f"results/{name}.json" for name in ("race", "bench-data", "demo-seeds", "experiment"))
RECORDS = [p for p in ALL if p not in (RACE, DATA, SEEDS, EXPERIMENT)] # cards of a speedrun
README = (ROOT/"README.md").read_text(encoding="utf-8").splitlines()

def load(path): return json.loads(path.read_text(encoding="utf-8"))

@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_readme_shows_the_record(path):
    "The table in the README is what `card_text` makes of the record."
    from nanogpt.speedrun import card_text
    table = card_text(load(path))
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    missing = [line for line in table.splitlines() if line.rstrip() not in {o.rstrip() for o in text.splitlines()}]
    assert not missing, missing

@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_record_is_complete(path):
    "A record says how it was made, and every metric has n and an interval around its value."
    card = load(path)
    assert card["record"]["command"].startswith("nanogpt speedrun") and card["record"]["commit"] and card["record"]["versions"]["torch"]
    assert card["before"].keys() == card["after"].keys()
    for side in ("before", "after"):
        for m in card[side].values(): assert m["n"] > 0 and m["low"] <= m["value"] <= m["high"]

def test_readme_shows_the_race():
    "The table in the README is what the recorded command printed, and nanoGPT was beaten by what is promised, at both shapes."
    from nanogpt.race import race_text
    record = load(RACE)
    assert all(line in README for line in race_text(record["rows"]).splitlines())
    assert all(f"`{o}`" in " ".join(README) for o in record["commands"])
    assert [r["shape"] for r in record["rows"]]==["12m", "gpt2"]
    for r in record["rows"]:
        assert r["dtype"]=="bfloat16" and r["compile"] and r["ratio"]["compiled"]>=1.25
        # 3.5 times its float32 is promised where bf16 multiplies four times as fast as float32; elsewhere in proportion
        assert r["ratio"]["documented"]>=3.5/4*min(4, r["peak_ratio"])
    assert record["rows"][0]["peak_share"]>=.70

def test_readme_shows_the_making_of_data():
    "The line in the README is what the recorded command printed: nine tenths of what tiktoken does in one thread, times the cores."
    from nanogpt.bench import bench_text
    record = load(DATA)
    assert bench_text(record["rows"][0]) in README and f"`{record['command']}`" in "\n".join(README)
    assert record["rows"][0]["ratio"]>=.90

def test_readme_shows_the_seeds():
    "How much is luck: the demo's numbers for several seeds stand in the README, and with each of them it kept its promise."
    text, rows = (ROOT/"README.md").read_text(encoding="utf-8"), load(SEEDS)
    assert len({r["record"]["command"] for r in rows})==len(rows)>=3 and len({r["record"]["commit"] for r in rows})==1
    for r in rows:
        show = [f"{100*r['after'][k]['value']:.1f} %" for k in ("closed_qa", "endings", "creative_writing")]
        assert f"| {r['record']['command'].split()[-1]} | {' | '.join(show)} |" in text
        assert r["before"]["closed_qa"]["value"]<.05 and r["after"]["closed_qa"]["value"]>=.90 and r["after"]["endings"]["value"]>=.80

def test_there_are_records():
    assert {"demo"} <= {p.stem for p in RECORDS} and EXPERIMENT in ALL
