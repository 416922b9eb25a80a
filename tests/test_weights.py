"Other people's models: the same logits as transformers for every family, both ways; a real story model; the hub, pretended."
import json
from dataclasses import replace

import pytest
import torch
from mini import one_message, run
from torch.testing import assert_close

from nanogpt import hub
from nanogpt.cache import KVCache
from nanogpt.core import CheckpointError, ConfigError, DataError, NetworkError
from nanogpt.model import GPT, PRESETS, count
from nanogpt.tokenizer import Tokenizer, get_tokenizer
from nanogpt.vocab import Scored, from_hub, merge_by_score, read_scored
from nanogpt.weights import read_config, write_config

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev]'")
V, T = 96, 24

def make(name, **more):
    "A small model of transformers with random weights: biases and norms too, so that none of them can be forgotten unseen."
    common = dict(vocab_size=V, max_position_embeddings=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    kinds = dict(gpt2=("GPT2", dict(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)),
                 llama=("Llama", common), mistral=("Mistral", common | dict(sliding_window=None)), glm=("Glm", common | dict(head_dim=8)))
    kind, shape = kinds[name]
    torch.manual_seed(0)
    cls = getattr(transformers, "GPT2LMHeadModel" if name=="gpt2" else f"{kind}ForCausalLM")
    model = cls(getattr(transformers, f"{kind}Config")(**shape | more)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(std=.15)
    return model

CASES = {"gpt2": ("gpt2", {}), "gpt2 narrow": ("gpt2", dict(n_inner=50)), "gpt2 untied": ("gpt2", dict(tie_word_embeddings=False)),
         "llama": ("llama", {}), "llama tied": ("llama", dict(tie_word_embeddings=True)),
         "llama all heads": ("llama", dict(num_key_value_heads=4)),
         "llama one head": ("llama", dict(num_key_value_heads=1)), "llama biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
         "llama theta": ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=500_000.), rms_norm_eps=1e-3)),
         "mistral": ("mistral", {}), "glm": ("glm", {}), "glm no bias": ("glm", dict(attention_bias=False)),
         "glm all turned": ("glm", dict(rope_parameters=dict(rope_type="default", rope_theta=10_000., partial_rotary_factor=1.)))}

@pytest.fixture(params=CASES, ids=lambda k: k.replace(" ", "-"))
def pair(request, tmp_path):
    "A model of transformers, its folder, the family, and ours read from the folder."
    name, more = CASES[request.param]
    theirs = make(name, **more)
    theirs.save_pretrained(tmp_path/"theirs")
    family, ours = hub.load_hub(tmp_path/"theirs")
    return theirs, tmp_path, family, ours.eval()

@pytest.fixture
def idx():
    torch.manual_seed(1)
    return torch.randint(3, V, (2, T))

@torch.no_grad()
def test_same_logits_both_ways(pair, idx):
    "Their folder gives their logits here; ours, exported, gives our logits there; in and out again is bit-equal."
    theirs, folder, family, ours = pair
    assert family==theirs.config.model_type
    want, got = theirs(idx).logits, ours(idx)
    assert want.std()>.05                                        # not all alike, or everything would agree
    assert_close(got, want, rtol=0, atol=1e-5)                   # float32: a few last bits
    assert count(ours.cfg)==theirs.num_parameters()
    assert hub.save_hub(folder/"ours", ours, family=family)==family
    before, after = hub.read_tensors(folder/"theirs"), hub.read_tensors(folder/"ours")
    assert set(before)==set(after) or set(before) ^ set(after)=={"lm_head.weight"} and ours.cfg.tied
    for k in set(before) & set(after): assert torch.equal(before[k], after[k]), k
    back, info = type(theirs).from_pretrained(folder/"ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(back.eval()(idx).logits, got, rtol=0, atol=1e-5)

@torch.no_grad()
def test_cached_is_whole(pair, idx):
    "Chunk by chunk and one by one, for every family; rows of other lengths too; the cache keeps shared heads once."
    ours = pair[3]
    whole, cache = ours(idx), KVCache(ours.cfg, 2)
    parts = [ours(idx[:, :9], cache), ours(idx[:, 9:13], cache), *(ours(idx[:, t:t+1], cache) for t in range(13, T))]
    assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    assert cache.k.size(2)==ours.cfg.kv_heads
    ragged = KVCache(ours.cfg, 2)
    ours(idx[:, :9], ragged)
    ragged.set_lengths([9, 5])
    step = ours(torch.stack([idx[0, 9:10], idx[1, 5:6]]), ragged)
    assert_close(step[1, 0], whole[1, 5], rtol=0, atol=1e-5)
    assert_close(step[0, 0], whole[0, 9], rtol=0, atol=1e-5)

@torch.no_grad()
def test_shards_and_openais_names(tmp_path, idx):
    "A model in several files with an index is one; GPT-2 as OpenAI published it has no `transformer.` and carries its masks along."
    theirs = make("llama")
    theirs.save_pretrained(tmp_path/"parts", max_shard_size="20KB")
    assert len(list((tmp_path/"parts").glob("model-*.safetensors")))>1 and hub.foreign(tmp_path/"parts")
    assert_close(hub.load_hub(tmp_path/"parts")[1].eval()(idx), theirs(idx).logits, rtol=0, atol=1e-5)
    next((tmp_path/"parts").glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="missing or damaged"): hub.load_hub(tmp_path/"parts")
    gpt = make("gpt2")
    gpt.save_pretrained(tmp_path/"gpt2")
    tensors = {k.removeprefix("transformer."): v for k, v in hub.read_tensors(tmp_path/"gpt2").items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    hub.save_file(tensors, tmp_path/"gpt2/model.safetensors")
    assert_close(hub.load_hub(tmp_path/"gpt2")[1].eval()(idx), gpt(idx).logits, rtol=0, atol=1e-5)

def test_half_precision_files(tmp_path, idx):
    "Weights in bfloat16 are read exactly, into float32."
    theirs = make("llama").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = hub.load_hub(tmp_path)[1]
    assert ours.lm_head.weight.dtype==torch.float32
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight.float())

LLAMA = replace(PRESETS["gpt2"](), norm="rms", mlp="swiglu", position="rotary", bias=False)
REFUSED = {"qk_norm=True": PRESETS["tiny"](), "bias=False": replace(PRESETS["gpt2"](), bias=False), "mlp=gelu": replace(LLAMA, mlp="gelu"),
           "n_kv_head=4": replace(PRESETS["gpt2"](), n_kv_head=4), "qkv_bias=False": replace(LLAMA, bias=True, qkv_bias=False)}

@pytest.mark.parametrize("name", REFUSED)
def test_what_no_family_can_say(name):
    with pytest.raises(ConfigError, match=f"has no way to say .*{name}"): write_config(REFUSED[name])

def test_configs_of_published_models():
    "GPT-2 in its four sizes, from the settings that stand on the hub."
    for name, n in (("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)):
        data = write_config(replace(PRESETS[name](), vocab_size=50257))
        assert transformers.GPT2Config.from_dict(data).n_head==data["n_head"] and count(read_config(data)[1])==n
    data = dict(model_type="glm", vocab_size=151552, hidden_size=4096, intermediate_size=13696, num_hidden_layers=40,
                num_attention_heads=32, num_key_value_heads=2, head_dim=128, attention_bias=True, max_position_embeddings=131072,
                rms_norm_eps=1.5625e-7, partial_rotary_factor=0.5, rope_theta=10000.0)
    assert count(read_config(data)[1])==9_399_951_360                # GLM-4 9B, as the hub counts it

# ---- vocabularies ------------------------------------------------------------------------------------------------------

TEXTS = ["The cat sat.", "  two  spaces\n\nand lines ", "naïve 猫 🐈", "it's 2026, isn't it?", "", "<|endoftext|>"]

def test_hub_vocabulary_gives_the_same_ids(tmp_path):
    "A byte-level BPE trained by the tokenizers library: same ids, and it survives a file of ours."
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Theirs
    for pre in (pre_tokenizers.ByteLevel(add_prefix_space=False),
                pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
                                         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])):
        t = Theirs(models.BPE())
        t.pre_tokenizer, t.decoder = pre, decoders.ByteLevel()
        t.train_from_iterator(TEXTS*20, trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        t.add_special_tokens(["<|end_of_text|>"])
        ours = from_hub(json.loads(t.to_str()), 320)
        for text in TEXTS: assert ours.encode(text)==t.encode(text).ids and ours.decode(ours.encode(text))==text
        assert ours.eot==t.token_to_id("<|end_of_text|>")
        ours.save(tmp_path/"tokenizer.json")
        assert get_tokenizer(tmp_path).fingerprint==ours.fingerprint

def test_sentencepiece_like_files_are_refused(tmp_path):
    data = dict(model=dict(type="BPE", byte_fallback=True, vocab={}, merges=[]))
    with pytest.raises(DataError, match="byte fallback"): from_hub(data)

# ---- the story model ---------------------------------------------------------------------------------------------------

@pytest.fixture
def stories(data_home):
    if not (folder := data_home/"models/stories260K").is_dir(): pytest.skip(f"{folder} is not there")
    return folder

def test_stories_tell_their_story(stories, monkeypatch):
    "The real 260k Llama, found by its name, tells greedily what the C program tells."
    from nanogpt.checkpoint import load_model
    from nanogpt.knobs import SampleConfig
    from nanogpt.sample import generate
    monkeypatch.setenv("NANOGPT_DATA", str(stories.parents[1]))
    model, tok = load_model("stories260K")
    assert isinstance(tok, Scored) and count(hub.read_llama2c(stories/"stories260K.bin").cfg)==260_032
    text = generate(model, tok, [[tok.eot]], SampleConfig(temperature=0, max_tokens=60))[0]
    assert text.startswith(" Once upon a time, there was a little girl named Lily. She loved to play outside in the park.")

def test_stories_vocabulary(stories):
    tok = read_scored(stories/"tok512.bin")
    text = "Once upon a time, there was a naïve little cat."
    assert tok.decode([tok.eot, *tok.encode(text)], skip_specials=False)=="<|endoftext|>"+text
    assert [tok.decode([i]) for i in tok.encode("Once upon a time")]==[" Once", " upon", " a", " time"]
    row = [tok.find[c.encode()] if c.encode() in tok.find else None for c in " "+text.replace("ï", "i")]
    assert merge_by_score(row, tok.pieces, tok.find, tok.scores)==tok.encode(text.replace("ï", "i")) # word by word = all at once

@torch.no_grad()
def test_stories_in_transformers(stories, tmp_path):
    "Exported as a Llama, the story model gives its logits in transformers: the neighbours have become halves."
    model = hub.read_llama2c(stories/"stories260K.bin").eval()
    assert hub.save_hub(tmp_path, model)=="llama"
    idx = torch.tensor([[1, 403, 407, 261, 378, 432, 383, 286, 261, 376]])
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(other(idx).logits, model(idx), rtol=1e-5, atol=1e-5)

# ---- the hub -------------------------------------------------------------------------------------------------------------

def test_no_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("NANOGPT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    def away(*a): raise OSError("no network")
    monkeypatch.setattr("socket.getaddrinfo", away)
    with pytest.raises(NetworkError, match="the hub is out of reach") as e: hub.fetch("nobody/no-such-model-of-ours")
    assert "NANOGPT_DATA" in e.value.fix

def test_fetching_takes_tensors_and_json_alone(monkeypatch, tmp_path, capsys):
    "A pretended hub: what is fetched is said, code and pickles are left there, a name nobody has is told apart from no network."
    from types import SimpleNamespace as O

    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError
    monkeypatch.delenv("NANOGPT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.getaddrinfo", lambda *a: [])
    def none(*a, **k): raise LocalEntryNotFoundError("not yet")
    class Api:
        def model_info(self, place, files_metadata):
            if place=="no/body": raise type("RepositoryNotFoundError", (Exception,), {})("404")
            names = ["config.json", "model.safetensors", "pytorch_model.bin", "modeling.py", "onnx/config.json", "README.md"]
            return O(siblings=[O(rfilename=n, size=500_000) for n in names])
    asked = []
    def take(place, name):
        asked.append((place, name))
        return str(tmp_path/"store"/name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", none)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", take)
    assert hub.fetch("gpt2")==tmp_path/"store"
    assert asked==[("openai-community/gpt2", "config.json"), ("openai-community/gpt2", "model.safetensors")]
    assert "fetching openai-community/gpt2 from the Hugging Face hub: 2 files, 1 MB" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="no model no/body on the hub"): hub.fetch("no/body")

def test_gpt2_itself():
    "OpenAI's weights, where the hub can be reached: the published number of parameters and the published logit."
    try: folder = hub.fetch("gpt2")
    except NetworkError as e: pytest.skip(f"GPT-2's weights must come from the hub: {e.what}")
    model, tok = hub.load_hub(folder)[1].eval(), hub.foreign_tokenizer(folder)
    assert count(model.cfg)==124_439_808 and tok.name=="gpt2"
    with torch.no_grad(): logits = model(torch.tensor([tok.encode("Hello, I'm a language model,")]))[0, -1]
    assert logits[tok.encode(" not")[0]].item()==pytest.approx(-94.687, abs=2e-3) and logits.argmax().item()==tok.encode(" not")[0]

# ---- the commands ----------------------------------------------------------------------------------------------------------

SMALL = [*"--threads 1 --device cpu --dtype float32 --no_compile --kernel fused".split(),
         *"--steps 2 --eval_every 2 --eval_batches 1 --save_every 2".split()]
ROWS = "--rows 20 --val_rows 6 --seq_len 64 --micro_batch 2 --batch_tokens 128".split()

def test_a_foreign_model_goes_through_every_verb(tmp_path, idx):
    "From a folder of transformers: generate, go on pretraining, tune, talk, export, and transformers reads the end of it."
    tok = Tokenizer.train(["One day, the cat said hello to the red bird. "]*9, 300)
    theirs = make("llama", vocab_size=tok.n_vocab-4)               # as if its vocabulary knew nothing of a chat
    theirs.save_pretrained(tmp_path/"theirs")
    tok.save(tmp_path/"theirs"/hub.OURS)
    said = json.loads(run("generate", "--model", tmp_path/"theirs", "--prompt", "One day", "--max_tokens", 4, "--json").stdout)
    assert said["tokens"]<=4 and not said["chat"]
    shape = ["--seq_len", 32, "--micro_batch", 2, "--batch_tokens", 64]
    text = ["--corpus", "tales", "--corpus_tokens", 3000]
    done = run("pretrain", "--init", tmp_path/"theirs", *text, *shape, *SMALL, "--out", tmp_path/"base")
    assert "4 rows added to the vocabulary of" in done.stderr and "a llama with" in done.stderr
    run("sft", "--init", tmp_path/"base", *ROWS, *SMALL, "--out", tmp_path/"tuned")
    assert json.loads(run("generate", "--model", tmp_path/"tuned", "--prompt", "Hi", "--max_tokens", 2, "--json").stdout)["chat"]
    out = json.loads(run("export", "--model", tmp_path/"tuned", "--out", tmp_path/"given", "--json").stdout)
    assert out["family"]=="llama"
    from nanogpt.checkpoint import load_model
    model = load_model(tmp_path/"tuned")[0]
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path/"given").eval()
    with torch.no_grad(): assert_close(back(idx).logits, model(idx), rtol=0, atol=1e-5)

def test_sft_straight_from_a_foreign_model(tmp_path):
    tok = Tokenizer.train(["One day, the cat said hello to the red bird. "]*9, 300)
    make("gpt2", vocab_size=tok.n_vocab, n_positions=64).save_pretrained(tmp_path/"theirs")
    tok.save(tmp_path/"theirs"/hub.OURS)
    run("sft", "--init", tmp_path/"theirs", *ROWS, *SMALL, "--out", tmp_path/"tuned")
    assert (tmp_path/"tuned/model/model.safetensors").exists()

def test_export_refuses(whole, tmp_path):
    "The demo's shape is nobody's: one message that names its settings, and nothing is written."
    err = run("export", "--model", whole, "--out", tmp_path/"x", code=2).stderr
    one_message(err, "no family of the hub fits: ", ", which comes nearest, has no way to say", "qk_norm=True")
    assert not (tmp_path/"x").exists()
    one_message(run("export", "--model", whole, "--out", tmp_path/"x", "--family", "llama", code=2).stderr, "llama", "norm=layer")
    (tmp_path/"full").mkdir()
    (tmp_path/"full/a").write_text("mine")
    one_message(run("export", "--model", whole, "--out", tmp_path/"full", code=2).stderr, "is not empty")

def test_a_name_that_is_nowhere(tmp_path):
    err = run("generate", "--model", "nobody/nothing", "--prompt", "x", code=2, cwd=tmp_path).stderr
    one_message(err, "there is no folder nobody/nothing")

# ---- what was there before ---------------------------------------------------------------------------------------------------

def test_a_folder_from_before_these_settings(whole, tmp_path):
    "A config.json that knows nothing of norms, gates and shared heads is read as what it was."
    from nanogpt.checkpoint import load_model, save_folder
    new = ("norm", "norm_eps", "mlp", "mlp_width", "n_kv_head", "qkv_bias", "tied")
    def older(tmp):
        for f in (whole/"model").iterdir():
            if f.name!="MANIFEST.json": (tmp/f.name).write_bytes(f.read_bytes())
        data = json.loads((tmp/"config.json").read_text())
        assert set(new)<=set(data)
        (tmp/"config.json").write_text(json.dumps({k: v for k, v in data.items() if k not in new}))
    save_folder(tmp_path/"old/model", older)
    a, b = load_model(whole)[0], load_model(tmp_path/"old")[0]
    idx = torch.randint(300, (2, 9))
    assert a.cfg==b.cfg and torch.equal(a(idx), b(idx))

def test_a_llama_compiles_whole(idx):
    "No break in the graph: what trains GPT-2 compiled trains a Llama compiled."
    cfg = replace(LLAMA, vocab_size=V, block_size=32, n_layer=1, n_head=4, n_embd=32, n_kv_head=2, mlp_width=40, tied=False)
    model = GPT(cfg)
    fast = torch.compile(model.loss, fullgraph=True, backend="aot_eager") # the whole graph, without the minute a C++ compiler takes
    a, b = fast(idx[:, :-1], idx[:, 1:]), model.loss(idx[:, :-1], idx[:, 1:])
    assert_close(a[0], b[0], rtol=1e-5, atol=1e-3)
    a[0].backward()
    assert all(p.grad is not None for p in model.parameters())
