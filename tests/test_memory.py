"What `bench memory` predicts is what `fit` takes; a run that cannot fit is refused with settings that do; recompute changes no digit."
import json

import pytest
from mini import PRETRAIN, here, numbers, one_message, run

BASE = "--device cpu --threads 1 --eval_every 0 --save_every 0".split()
MID = "--n_layer 6 --n_head 6 --n_embd 384 --vocab_size 4096 --position learned --seq_len 256 --micro_batch 4 --batch_tokens 1024".split()
WIDE = "--shape gpt2 --tokenizer gpt2 --n_layer 2 --seq_len 128 --micro_batch 2 --batch_tokens 512".split()
GPT2 = "--shape gpt2 --tokenizer gpt2 --seq_len 512 --micro_batch 4 --batch_tokens 2048".split()
EAGER, BF16 = ("--no_compile", "--dtype", "float32"), ("--no_compile", "--dtype", "bfloat16")

def bench(*words):
    "The row of `bench memory`: prediction, and where asked for two real steps in a process of their own."
    return json.loads(run("bench", "memory", *BASE, *words, "--json").stdout)

def has_bf16():
    from nanogpt.core import pick_device
    return pick_device("cpu").dtype=="bfloat16"

CASES = {"tiny": (*EAGER, "--kernel", "fused"),
         "tiny, written, Muon": (*EAGER, "--kernel", "written", "--optimizer", "muon"),
         "12m": (*MID, *EAGER, "--kernel", "fused"),
         "12m, recompute": (*MID, *EAGER, "--kernel", "fused", "--recompute"),
         "GPT-2's width, two passes": (*WIDE, *EAGER, "--kernel", "fused")}
LONG = {"12m, written, Muon": (*MID, *EAGER, "--kernel", "written", "--optimizer", "muon"),
        "12m, bf16": (*MID, *BF16, "--kernel", "fused"),
        "12m, bf16, written, recompute": (*MID, *BF16, "--kernel", "written", "--recompute"),
        "12m, compiled": (*MID, "--dtype", "float32", "--kernel", "written"),
        "GPT-2's width, recompute": (*WIDE, *EAGER, "--kernel", "fused", "--recompute"),
        "GPT-2 124M": (*GPT2, *EAGER, "--kernel", "fused")}

def near(words):
    if "bfloat16" in words and not has_bf16(): pytest.skip("this CPU has no fast bf16")
    row = bench(*words, "--measure")
    assert sum(row["causes"].values())==row["predicted_bytes"] and row["ratio"]==row["predicted_bytes"]/row["measured_bytes"]
    assert abs(row["ratio"]-1)<.15, row
    return row

@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_predicted_is_measured(words):
    "The peak of two real steps of `fit` lies within 15 % of the prediction."
    row = near(words)
    if words is CASES["12m"]: # the control: without what the blocks keep, the same prediction would be refuted
        assert (row["predicted_bytes"]-row["causes"]["activations"]-row["causes"]["holes"])/row["measured_bytes"]<.85

@pytest.mark.long
@pytest.mark.parametrize("words", LONG.values(), ids=LONG)
def test_predicted_is_measured_for_more(words):
    "The same for bf16, the compiler, both kernels and the whole GPT-2."
    near(words)

# ---- a run that cannot fit -------------------------------------------------------------------------------------------

def small_machine(size): return f"import nanogpt.memory as m; m.machine_memory = lambda device='cpu': {size}"

def pretrain(shards, out, *more):
    shape = "--n_layer 2 --n_head 2 --n_embd 64 --seq_len 128 --micro_batch 16 --batch_tokens 2048 --steps 2 --kernel fused".split()
    return ("pretrain", "--data", shards, "--out", out, *shape, *EAGER, *BASE, *more)

def test_refused_before_the_first_step(shards, tmp_path):
    "A run that cannot fit names both numbers and settings that fit, and leaves no folder; with these settings it trains the same batch."
    refused = lambda size: run(*pretrain(shards, tmp_path/"a"), code=2, before=small_machine(size)).stderr
    said = one_message(refused(10**8), "cpu has 100 MB (100,000,000 bytes)")
    room = int(said.split(" (")[1].split(" bytes")[0].replace(",", ""))-10**7
    said = one_message(refused(room), "try --micro_batch ", f"{room:,} bytes")
    assert not (tmp_path/"a").exists()
    flags = said.split("try ")[1].split()
    run(*pretrain(shards, tmp_path/"b", *flags), before=small_machine(room))
    run(*pretrain(shards, tmp_path/"c"))
    seen = [[(o[4], o[5]) for o in numbers(tmp_path/k)[0]] for k in "bc"] # tokens and the sum over all rows of a step
    assert seen[0]==seen[1]

def test_no_false_refusal_and_a_word_when_it_is_tight(shards, tmp_path):
    "With room for all of it nothing is refused; with little room left it says so once."
    assert "memory" not in run(*pretrain(shards, tmp_path/"a")).stderr
    err = run(*pretrain(shards, tmp_path/"b"), before="import nanogpt.memory as m; m.machine_memory = lambda device='cpu': "
              "int(1.1*(m.resident_bytes()+60_000_000))").stderr
    assert err.count("memory will be tight")==1

def test_a_preset_is_asked_about():
    "`bench memory --preset gpt2` answers for what `pretrain --preset gpt2` would run; exit code 3 where it does not fit."
    code, text = here("bench", "memory", "--preset", "gpt2", "--device", "cpu", "--dtype", "float32", "--json")
    row = json.loads(text)
    assert (row["micro_batch"], row["seq_len"], row["parameters"])==(32, 1024, 124_475_904) and code==(0 if row["fits"] else 3)
    assert row["causes"]["weights"]==4*row["parameters"] and ("try" in row)!=row["fits"]

# ---- recompute -------------------------------------------------------------------------------------------------------

def test_recompute_changes_no_digit(whole, shards, tmp_path):
    "With --recompute, dropout, accumulation and evaluation as before, every number of the run is the same, bit for bit."
    run(*PRETRAIN, "--data", shards, "--out", tmp_path/"a", "--recompute")
    for got, want in zip(numbers(tmp_path/"a"), numbers(whole), strict=True): assert got==want

@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_recompute_in_two_processes(parallel, shards, tmp_path):
    "The same in two processes, each with a whole model or with a part of it."
    both = ("launch", "--nproc", "2", "--", *PRETRAIN, "--steps", "4", "--data", shards, "--parallel", parallel)
    words = lambda out, *more: (*both, "--out", out, *more)
    run(*words(tmp_path/"a"))
    run(*words(tmp_path/"b", "--recompute"))
    for got, want in zip(numbers(tmp_path/"a"), numbers(tmp_path/"b"), strict=True): assert got==want
