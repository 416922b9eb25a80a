"The numbers people read in the README are those of the records in results/, to the letter."
import json

import pytest
from conftest import ROOT

ALL = sorted((ROOT/"results").glob("*.json"))
OTHERS = RACE, DATA, SEEDS, EXPERIMENT, TALK, QUANT, DASHBOARD, GPU = [ROOT/f"results/{name}.json" for name in
    ("race", "bench-data", "demo-seeds", "experiment", "talk", "quant", "dashboard", "gpu")]
RECORDS = [p for p in ALL if p not in OTHERS] # cards of a speedrun
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

def reached(rows):
    "The ratios that were promised, from the rows of one text and of eight."
    pick = lambda b, p, *kinds: [r for r in rows if (r["batch"], r["player"])==(b, p) and r["kind"] in kinds]
    best = lambda b, p, *kinds, of="tokens_per_second": max(r[of] for r in pick(b, p, *kinds))
    int8 = {r["kind"] for r in rows if r["kind"].startswith("int8")}
    return {"16 bits ÷ llama.cpp f16": best(1, "ours", "bfloat16", "float16")/best(1, "llamacpp", "f16"),
            "int8 ÷ llama.cpp q8_0": best(1, "ours", *int8)/best(1, "llamacpp", "q8_0"),
            "float32 ÷ transformers float32": best(1, "ours", "float32")/best(1, "transformers", "float32"),
            "bfloat16 ÷ transformers bfloat16": best(1, "ours", "bfloat16")/best(1, "transformers", "bfloat16"),
            "int8: share of the memory's speed": best(1, "ours", *int8, of="bandwidth_share"),
            "prompt, bfloat16 ÷ transformers bfloat16": best(1, "ours", "bfloat16", of="prefill_tokens_per_second")
                                                        /best(1, "transformers", "bfloat16", of="prefill_tokens_per_second"),
            "batch 8 ÷ batch 1, float32": best(8, "ours", "float32")/best(1, "ours", "float32"),
            "batch 8 ÷ batch 1, bfloat16": best(8, "ours", "bfloat16")/best(1, "ours", "bfloat16")}

def test_record_of_the_talk():
    "Beside whom, how fast, and what of the promises was reached, kept or not: every number follows from the rows."
    from nanogpt.talk import talk_text
    record = load(TALK)
    assert record["commit"] and record["date"] and record["machine"]
    assert all(o.startswith("nanogpt bench generate") for o in record["commands"])
    for b in (1, 8):
        rows = [r for r in record["rows"] if r["batch"]==b]
        assert {r["player"] for r in rows}=={"ours", "transformers", "llamacpp"}
        assert len(talk_text(rows).splitlines())==2+len(rows) and talk_text(rows) in "\n".join(README)
        best = {who: max(r["tokens_per_second"] for r in rows if r["player"]==who) for who in ("ours", "llamacpp")}
        assert (best["ours"]>best["llamacpp"])==(b==8)                             # as the README says
        if b==8: assert best["llamacpp"]<next(r["tokens_per_second"] for r in rows if (r["player"], r["kind"])==("ours", "float32"))
        assert len({(r["prompt"], r["tokens"], r["threads"], r["bandwidth"]) for r in rows})==1   # the same task, the same minutes
        same = {f"{r['player']} {r['kind']}": r["same"] for r in rows}
        assert same["transformers float32"]==same["llamacpp f16"]==1              # they run the same model
    assert record["promises"].keys()==(now := reached(record["rows"])).keys()
    for name, (_, had) in record["promises"].items(): assert round(now[name], 2)==had, name
    kept = {name for name, (wanted, had) in record["promises"].items() if had>=wanted}
    assert {"prompt, bfloat16 ÷ transformers bfloat16", "batch 8 ÷ batch 1, float32", "batch 8 ÷ batch 1, bfloat16"} <= kept
    assert max(v for v in record["ready"].values() if not isinstance(v, str))<1.5
    assert f"Measured on {record['date']} at {record['commit']} on an {record['machine']}." in README

def test_lesson_tells_the_floor():
    "What 39d says of products alone, of reading and of llama.cpp's step is what was recorded."
    record, text = load(TALK), " ".join(lesson("39d_talk"))
    half, single = record["floor"]["bfloat16"], record["floor"]["float32"]
    low, high = half["products"]
    llama = next(1e3*r["seconds"]/r["tokens"] for r in record["rows"] if r["batch"]==1 and r["kind"]=="f16")
    for words in (f"in 16 bits took {half['step']} ms. Its products alone took {low} ms at one time and {high} ms at another",
                  f"just reading their bytes {half['reading']} ms", f"The whole step of llama.cpp takes {llama:.1f} ms there",
                  f"products took {single['products_whole']} ms, where reading takes {single['reading']} ms; by parts",
                  f"has it, {single['products']} ms", f"takes {single['step']} ms instead of {single['step_whole']} ms"):
        assert words in text
    assert .9*low<llama<1.1*high and high<half["step"] and single["step"]<.7*single["step_whole"]

def lesson(name):
    "The prose of a notebook."
    return ["".join(c["source"]) for c in load(ROOT/f"nbs/{name}.ipynb")["cells"] if c["cell_type"]=="markdown"]

def test_lesson_shows_the_quantised():
    "The tables in 39e are what the recorded commands printed, changes follow from the answers, and what is said of them holds."
    from nanogpt.report import change
    from nanogpt.shrink import ALL, shrink_text
    record, text = load(QUANT), "\n".join(lesson("39e_shrink"))
    assert record["commit"] and all(str(record[k]) in text for k in ("date", "machine"))
    for name, rows in record["models"].items():
        assert shrink_text(rows) in text and f"`{record['commands'][name]}`" in text and [r["kind"] for r in rows]==list(ALL)
        for r in rows:
            for k, told in r["changes"].items(): assert told==pytest.approx(change(rows[0]["metrics"][k], r["metrics"][k]))
            assert r["loss"]-rows[0]["loss"]==pytest.approx(r["loss_change"][0], abs=1e-9)
            assert (abs(r["loss_change"][0])<.001)==(r["kind"]!="int4")
        assert all(r["loss_change"][1]>0 for r in rows[2:])                            # seen, because the rows are the same
        moved = [sum(a!=b for a, b in zip(rows[0]["metrics"][k]["hits"], r["metrics"][k]["hits"], strict=True))
                 for r in rows for k in r["changes"] if k.split()[-1] in ("endings", "acc_norm")]
        assert max(moved)<=.03*400
    one, two = record["models"]["demo"][-1], record["models"]["dolly"][-1]
    assert two["loss_change"][1]>one["loss_change"][2]                                # the model that knows more loses more

def test_there_are_records():
    assert {"demo"} <= {p.stem for p in RECORDS} and EXPERIMENT in ALL

def test_the_dashboard_keeps_its_promises():
    "The record of a browser: seconds to the first widget, to the first words and to a stop, bytes and memory."
    o = load(DASHBOARD)
    assert o["command"].startswith("python tests/time_dashboard.py") and o["commit"] and o["date"] and o["machine"]
    assert o["preheated"]["typing"]<3 and o["cold"]["typing"]<6 and o["first_words"]<.5 and o["stop"]<.3
    assert o["bytes_of_1000_tokens"]<400_000 and o["kernel_bytes"]<450*2**20

def waits(o):
    "What the README shows of that record."
    told = [("page opened, a box to type in", f"{o['cold']['typing']:.1f} s", "6 s"),
            ("the same with `--preheat 1`", f"{o['preheated']['typing']:.1f} s", "3 s"),
            ("question sent, first words", f"{o['first_words']:.2f} s", "0.5 s"),
            ("*Stop* clicked, answer ended", f"{o['stop']:.2f} s", "0.3 s"),
            ("sent to the page for 1,000 tokens", f"{o['bytes_of_1000_tokens']/1000:.0f} kB", "400 kB"),
            ("memory of a kernel after a conversation", f"{o['kernel_bytes']/2**20:.0f} MiB", "450 MiB")]
    return ["| | measured | to stay below |", "|:--|--:|--:|", *(f"| {' | '.join(row)} |" for row in told)]

def test_readme_shows_the_dashboard():
    at = README.index("<!-- dashboard -->")
    assert README[at+1:README.index("<!-- /dashboard -->")]==waits(load(DASHBOARD))

def on_a_gpu(o):
    "What the README shows of the runs on one GPU."
    from nanogpt.model import PRESETS, flops
    whole, tuned, race, asked = (o[k] for k in ("pretrain", "sft", "race", "eval"))
    speed, peak = whole["median_tokens_per_second"], o["datasheet_flops"]
    share = flops(PRESETS["gpt2"](), whole["seq_len"])*speed/peak
    gb = lambda o: f"{o['peak_memory_bytes']/1e9:.1f} GB"
    told = [("`pretrain --preset gpt2`, a step in the middle",
             f"{speed:,.0f} tokens/s, {share:.0%} of {peak/1e12:.0f} TFLOP/s; {gb(whole)}"),
            ("so ten billion tokens take", f"{1e10/speed/3600:.1f} hours"),
            ("a step in turns with nanoGPT's, both compiled",
             f"{race['tokens_per_second']:,.0f} to {race['rival']['compiled']:,.0f} tokens/s: {race['ratio']['compiled']:.2f} ×"),
            ("`sft --preset dolly`, 15,000 conversations, three epochs",
             f"{tuned['median_tokens_per_second']:,.0f} tokens/s, {tuned['seconds']:.0f} s; {gb(tuned)}"),
            ("HellaSwag, all 10,042 items in float32", f"{o['hellaswag_seconds'][0]:.0f} s"),
            ("choices beside the script that asks one at a time", f"{asked['ratio']:.1f} ×")]
    return ["| on one H100 | measured |", "|:--|--:|", *(f"| {' | '.join(row)} |" for row in told)]

def test_readme_shows_the_gpu():
    "The table, and what is said around it: the chain ran, in small, and its model knows as little as so few tokens teach."
    o, text = load(GPU), " ".join(README)
    at = README.index("<!-- gpu -->")
    assert README[at+1:README.index("<!-- /gpu -->")]==on_a_gpu(o) and o["machine"]
    run, learnt = o["pretrain"], [o[side]["dolly.val_loss"]["value"] for side in ("before", "after")]
    for told in (f"`{o['commands']['race']}`", o["date"], f"{run['steps']} steps, {run['tokens']/1e6:.0f} million tokens",
                 f"{run['first_loss']:.2f} to {run['val_losses'][-1][1]:.2f}", f"from {learnt[0]:.2f} to {learnt[1]:.2f}"):
        assert told in text, told
    from nanogpt.model import PRESETS, flops
    share = flops(PRESETS["gpt2"](), run["seq_len"])*run["median_tokens_per_second"]/o["datasheet_flops"]
    assert f"Our own loop reached {share:.0%} on one H100".replace("%", " %") in " ".join(lesson("12a_plan"))
    for m in (o[side]["hellaswag.acc_norm"] for side in ("before", "after")): assert m["low"]<m["chance"]+.005 and m["n"]==10_042 # guessing

def test_memory_foretells_the_gpu(monkeypatch):
    "The prediction is within five per cent of what both runs took on the GPU; what a block keeps is rehearsed for this machine's device."
    from nanogpt import memory
    from nanogpt.core import Device
    from nanogpt.model import PRESETS
    o, kept = load(GPU), memory.kept
    monkeypatch.setattr(memory, "kept", lambda cfg, B, T, device, *more: kept(cfg, B, T, Device("cpu", device.dtype, True), *more))
    for run, packed in ((o["pretrain"], 0.), (o["sft"], .5)):
        assert (run["dtype"], run["kernel"], run["compile"])==("bfloat16", "fused", True)
        passes = run["batch_tokens"]//run["micro_batch"]//run["seq_len"]
        shape = PRESETS["gpt2"](), run["micro_batch"], run["seq_len"], Device("cuda", "bfloat16", True)
        sizes = memory.predict_memory(*shape, compiled=True, accum=passes, packed=packed)
        assert abs(sum(sizes.values())/run["peak_memory_bytes"]-1)<.05
