"The whole line through the real command: stopped in either half and started again it tells the same, and the demo keeps its promise."
import json
import signal
import subprocess

import pytest
from conftest import ROOT
from mini import command, end, environment, log, numbers, reason, run, start, steps_done, wait

# A miniature takes the demo's place, so that everything else is the real code path.
MINI = """
from pathlib import Path
import nanogpt.speedrun as s
from nanogpt.pretrain import TrainConfig
from nanogpt.sft import SFTConfig
loop = dict(device="cpu", dtype="float32", compile=False, kernel="fused", eval_every=5, eval_batches=2, save_every=10, lr=1e-2)
base = TrainConfig(corpus="tales", steps=24, seq_len=32, micro_batch=2, batch_tokens=128, dropout=.1, n_layer=1, n_head=2, n_embd=16,
                   vocab_size=400, tokenizer_bytes=60_000, corpus_tokens=8_000, **loop)
tuned = SFTConfig(init=Path("."), rows=40, val_rows=12, steps=24, seq_len=128, micro_batch=2, batch_tokens=256, **loop)
s.RECIPES["demo"] = lambda: s.Recipe(base, tuned, ("tales",), 2)
"""

def speedrun(out, *more): return ("speedrun", "--out", out, "--threads", 1, *more)

@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "A miniature speedrun that nobody stopped, and what it printed."
    out = tmp_path_factory.mktemp("speedrun")/"demo"
    return out, run(*speedrun(out), before=MINI)

def test_the_card(unbroken):
    "The folder holds two runs and a card with the same metrics before and after, and the table shows the card."
    out, done = unbroken
    card = json.loads((out/"card.json").read_text(encoding="utf-8"))
    assert {"seconds", "tokens", "peak_memory_bytes", "tokens_per_second", "before", "after", "samples"} <= set(card)
    assert set(card["before"])==set(card["after"]) and {"val_loss", "closed_qa", "endings"} <= set(card["before"])
    for side in ("before", "after"):
        for name, o in card[side].items(): assert {"value", "n", "low", "high", "version"} <= set(o) and name in done.stdout
    assert card["tokens"]==24*128+24*256 and card["seconds"]>0 and card["peak_memory_bytes"]>1e7
    assert len(card["samples"])==8 and all({"category", "prompt", "reference", "before", "after"} <= set(o) for o in card["samples"])
    assert reason(out/"base")==reason(out/"tuned")=="done" and (out/"base/model").is_dir() and (out/"tuned/model").is_dir()
    assert f"next: nanogpt chat --model {out}/tuned" in done.stdout and "1/3" in done.stderr and "1/3" not in done.stdout
    recipe = (ROOT/"Makefile").read_text(encoding="utf-8").split("\ndemo:")[1].split("\n\n")[0]
    assert done.stdout.count("next: ")==1 and "speedrun" in recipe and "chat" not in recipe # what to do next is said once

def test_stopped_in_both_halves(unbroken, tmp_path):
    "SIGTERM in the base and in the tuning, started again by the same command: the same numbers, the same words."
    out = tmp_path/"demo"
    for part, n in (("base", 7), ("tuned", 8)):
        p = start(*speedrun(out), before=MINI)
        assert wait(p, lambda part=part, n=n: steps_done(out/part)>=n)
        p.send_signal(signal.SIGTERM)
        stdout, stderr = end(p)
        assert "the same command goes on from there" in stderr and stdout==""
        assert reason(out/part)=="preempted" and not (out/"card.json").exists()
    done = run(*speedrun(out, "--json"), before=MINI)
    got, want = json.loads(done.stdout), json.loads((unbroken[0]/"card.json").read_text(encoding="utf-8"))
    assert got==json.loads((out/"card.json").read_text(encoding="utf-8"))
    for key in ("before", "after", "samples", "tokens"): assert got[key]==want[key], key
    for part in ("base", "tuned"): assert numbers(out/part)==numbers(unbroken[0]/part)
    assert got["seconds"]>=got["training_seconds"]

LAUNCH = """
import sys
from pathlib import Path
from nanogpt.dist import LaunchConfig, launch
program = sys.argv[1]+"\\nimport sys\\nfrom nanogpt.cli import main\\nsys.exit(main(sys.argv[1:]))"
sys.exit(launch(LaunchConfig(nproc=2, command=tuple(sys.argv[2:]), out=Path(sys.argv[4])), before=("-c", program)))
"""

def test_two_processes(unbroken, tmp_path):
    "`launch -- speedrun`, stopped while tuning and typed again: it reads what one process reads, and one card is written, said by one."
    one, out = unbroken[0], tmp_path/"two"
    words = [*command()[:1], "-c", LAUNCH, MINI, *map(str, speedrun(out, "--json"))]
    p = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment())
    assert wait(p, lambda: steps_done(out/"tuned")>=4)
    p.send_signal(signal.SIGTERM)
    stdout, stderr = end(p)
    assert stdout=="" and not (out/"card.json").exists() and stderr.count("1/3 pretraining")==1
    assert stderr.count("the same command goes on from there")==1 and "SIGTERM came: preempted after step" in stderr, stderr
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", env=environment(), timeout=200)
    card = json.loads(done.stdout)
    assert card==json.loads((out/"card.json").read_text(encoding="utf-8")) and done.stderr.count("3/3 the same questions")==1
    assert card["record"]["world"]==2 and card["tokens"]==24*128+24*256 and len(card["samples"])==8
    for part in ("base", "tuned"):
        assert reason(out/part)=="done" and [o["ids_sha"] for o in log(out/part, "step")]==[o["ids_sha"] for o in log(one/part, "step")]
        assert [o["n"] for o in log(out/part, "eval")]==[o["n"] for o in log(one/part, "eval")]

def test_a_full_line_of_models_answers(unbroken):
    "What the speedrun leaves can be asked at once, with the words it prints."
    done = run("chat", "--terminal", "--model", unbroken[0]/"tuned", "--max_tokens", 5, "--threads", 1, input="Write a story.\n")
    assert done.stdout.strip() and "tuned run" not in done.stderr

@pytest.mark.long
@pytest.mark.timeout(3600)
def test_demo_reaches_its_promise(tmp_path):
    "The real thing, with the default recipe: it cannot answer before, it answers nine of ten after, within 3 GB."
    done = subprocess.run(command("speedrun", "--out", tmp_path/"demo"), capture_output=True, text=True, encoding="utf-8",
                          env=environment(OMP_NUM_THREADS="2")) # no time limit of its own
    assert done.returncode==0, done.stderr
    card = json.loads((tmp_path/"demo/card.json").read_text(encoding="utf-8"))
    before, after = card["before"], card["after"]
    assert before["closed_qa"]["value"]<.05 and after["closed_qa"]["value"]>=.90 and after["endings"]["value"]>=.80
    assert before["endings"]["low"]<.25<before["endings"]["high"] # at chance: the base model has not learned to read
    assert after["closed_qa"]["n"]>=100 and after["endings"]["n"]>=100 and after["val_loss"]["value"]<before["val_loss"]["value"]
    assert card["peak_memory_bytes"]<3e9
    for name in ("closed_qa", "endings"):
        row = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert f"{100*before[name]['value']:.1f} %" in row and f"{100*after[name]['value']:.1f} %" in row
    assert f"{card['peak_memory_bytes']/1e9:.2f} GB" in done.stdout and f"{card['tokens']:,} tokens" in done.stdout
