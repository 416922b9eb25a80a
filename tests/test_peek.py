"What is looked up afterwards, for models that a lesson would need minutes for: rounded to whole numbers, in 16 bits, and GPT-2's letters."
import pytest
import torch
from torch.testing import assert_close

from nanogpt.clean import dangers
from nanogpt.knobs import SampleConfig
from nanogpt.model import GPT, GPTConfig
from nanogpt.peek import alternatives_html, attention_html, attention_weights, hindsight, spell, tokens_html
from nanogpt.quant import quantize
from nanogpt.ready import narrow
from nanogpt.sample import Completion, complete
from nanogpt.tokenizer import Tokenizer

def small(**more):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50304, block_size=128, n_layer=2, n_head=4, n_embd=64, init_std=.1, **more)).eval()

def worn(kind):
    model = small(position="rotary", norm="rms", mlp="swiglu", n_kv_head=2, bias=False)
    return narrow(model, torch.bfloat16) if kind=="bfloat16" else quantize(model, kind)

@pytest.mark.parametrize("kind", ["int8", "int4", "int8-dynamic", "bfloat16"])
def test_weights_of_a_model_that_was_made_small(kind):
    "Each row adds up to one, nobody sees the future, and the model says what it said before."
    model = worn(kind)
    ids = torch.randint(50257, (1,20))
    with torch.no_grad(): before = model(ids)
    w = attention_weights(model, ids[0].tolist())
    assert w.shape==(2,4,20,20) and not w.triu(1).any()
    assert_close(w.sum(-1), torch.ones(2,4,20), rtol=0, atol=1e-3)
    with torch.no_grad(): assert_close(model(ids), before, rtol=0, atol=0)

def test_hindsight_is_what_the_sampler_reported():
    "Token by token, for GPT-2's vocabulary with its padding, at a temperature that the report must not know."
    tok, model = Tokenizer.gpt2(), small()
    prompt = tok.encode("你好, ")
    [out] = complete(model, tok, [prompt], SampleConfig(max_tokens=30, temperature=2., top_k=50, logprobs=4))
    for (a, x), (b, y) in zip(hindsight(model, tok, prompt, out.ids, 4), out.logprobs, strict=True):
        assert abs(a-b)<1e-3 and [i for i, _ in x]==[i for i, _ in y]

def test_no_letter_acts(root):
    "Hostile texts as tokens of an answer, as its rivals, and as what was looked at."
    from hostile import HOSTILE
    tok, model = Tokenizer.gpt2(), small()
    for text in HOSTILE.values():
        ids = tok.encode(text.encode("utf-8", "replace").decode()[:200])[:60]
        out = Completion(text, tuple(ids), "length", hindsight(model, tok, [tok.eot], ids, 3))
        w = attention_weights(model, [tok.eot, *ids][:-1], rows=len(ids))
        for html in (tokens_html(tok, out), alternatives_html(tok, out, len(ids)-1), attention_html(tok, [tok.eot, *ids], w, 0)):
            assert dangers(html)==[], (text, html[:200])
    assert spell(tok, tok.encode("你好")[1]).startswith("⟨")
