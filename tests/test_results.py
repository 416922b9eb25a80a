"The numbers people read in the README are those of the records in results/, to the letter."
import json

import pytest
from conftest import ROOT

ALL = sorted((ROOT/"results").glob("*.json"))
BENCHES = [p for p in ALL if p.stem.startswith("bench-")]
SEEDS = ROOT/"results/demo-seeds.json"
RECORDS = [p for p in ALL if p not in (*BENCHES, SEEDS)] # cards of a speedrun

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

@pytest.mark.parametrize("path", BENCHES, ids=lambda p: p.stem)
def test_readme_shows_the_speed(path):
    "The line in the README is what the recorded command printed, and the rival was really beaten by what is promised."
    from nanogpt.bench import bench_text
    row = load(path)
    assert bench_text(row) in (ROOT/"README.md").read_text(encoding="utf-8").splitlines()
    assert row["ratio"] >= 1.15 and row["compile"] and row["dtype"] == "bfloat16"
    ratios = [row["ratio"], *row["other_ratios"]] # the same command on other days, better and worse
    assert f"other runs gave from {min(ratios):.2f} to {max(ratios):.2f} times" in (ROOT/"README.md").read_text(encoding="utf-8")
    assert sum(ratios)/len(ratios) >= 1.15

def test_readme_shows_the_seeds():
    "How much is luck: the demo's numbers for several seeds stand in the README, and with each of them it kept its promise."
    text, rows = (ROOT/"README.md").read_text(encoding="utf-8"), load(SEEDS)
    assert len({r["record"]["command"] for r in rows})==len(rows)>=3 and len({r["record"]["commit"] for r in rows})==1
    for r in rows:
        show = [f"{100*r['after'][k]['value']:.1f} %" for k in ("closed_qa", "endings", "creative_writing")]
        assert f"| {r['record']['command'].split()[-1]} | {' | '.join(show)} |" in text
        assert r["before"]["closed_qa"]["value"]<.05 and r["after"]["closed_qa"]["value"]>=.90 and r["after"]["endings"]["value"]>=.80

def test_there_are_records():
    "Both recipes have been run, and one race."
    assert {"demo", "real-small"} <= {p.stem for p in RECORDS} and BENCHES
