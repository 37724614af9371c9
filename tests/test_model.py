"""The forward against independent definitions: transformers' own LLaVA, one token at a time."""
import copy
import math
import shutil

import numpy as np
import pytest
import torch

import data
from pivot import distributed, encoders, model_io, published, records, rollout
import model as m
from conftest import TEXT, run, tiny_model

IMAGE = 63


def random_pairs(model, count=3, seed=0):
    """Ragged pairs as data.py stores them: [(ids, roles), …] with the image already expanded."""
    g, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        prompt = [1] + [IMAGE] * model.encoder.num_tokens
        prompt += list(g.integers(2, 60, g.integers(2, 7)))
        chosen, rejected = (list(g.integers(2, 60, g.integers(1, 8))) for _ in range(2))
        pairs.append((np.array(prompt + chosen + rejected),
                      np.repeat([records.PROMPT, records.ANSWER, records.OTHER],
                                [len(prompt), len(chosen), len(rejected)])))
    pixels = g.integers(0, 256, (count, 3, 32, 32)).astype(np.uint8)
    return pairs, pixels


def batch_of(pairs, pixels, layout):
    batch = data.collate([{"ids": i, "roles": r, "pixels": p, "index": n}
                          for n, ((i, r), p) in enumerate(zip(pairs, pixels))], layout)
    assert ("index" in batch) == (layout != "answers")
    batch.pop("index", None)
    return batch


def llava_twin(model):
    """transformers' LlavaForConditionalGeneration with the same weights: another implementation."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    config = LlavaConfig(**{k: v for k, v in model_io.llava_config(model).items()
                            if k not in ("model_type", "architectures", "transformers_version")})
    twin = LlavaForConditionalGeneration(config).to(next(model.parameters()).dtype)
    rename = {"language_model.model.": "model.language_model.",
              "language_model.lm_head.": "lm_head.", "vision_tower.": "model.vision_tower.",
              "multi_modal_projector.": "model.multi_modal_projector."}

    def theirs(name):
        name = model_io.file_name_of(name)
        head = next(k for k in rename if name.startswith(k))
        return rename[head] + name.removeprefix(head)
    twin.load_state_dict({theirs(k): v for k, v in model.state_dict().items()}, strict=True)
    return twin.train(), theirs


def slow_logps(twin, model, pairs, pixels):
    """The definition: each answer after its prompt as a sequence of its own, token by token."""
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1)
                 for x in (model.encoder.mean, model.encoder.std))
    out = []
    for (ids, roles), image in zip(pairs, pixels):
        values = ((torch.from_numpy(image).double() / 255 - mean) / std)[None]
        for role in (records.ANSWER, records.OTHER):
            prompt, answer = ids[roles == records.PROMPT], ids[roles == role]
            sequence = torch.from_numpy(np.concatenate([prompt, answer]))[None]
            logits = twin(input_ids=sequence,
                          pixel_values=values.to(next(twin.parameters()).dtype)).logits[0]
            total = 0
            for k, token in enumerate(answer):
                total = total + logits[len(prompt) + k - 1].double().log_softmax(-1)[token]
            out.append(total)
    return torch.stack(out).view(-1, 2)


def plain_norm(monkeypatch):
    """RMSNorm in its input's dtype: transformers' cast to fp32 alone moves gradients by 1e-7."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    for norm in (LlamaRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(norm, "forward", lambda self, x: self.weight * x * torch.rsqrt(
            x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.mark.parametrize("llm,vision,tie", [("qwen2", "siglip", True), ("llama", "clip", False)])
@pytest.mark.parametrize("patched", [True, False])
def test_fast_path_is_the_definition(monkeypatch, llm, vision, tie, patched):
    """Invariant 3, fp64: shared prefix and one image = two sequences of transformers' LLaVA."""
    if patched:
        plain_norm(monkeypatch)
    model = tiny_model(vision, llm, tie, dtype=torch.float64)
    twin, theirs = llava_twin(model)
    pairs, pixels = random_pairs(model)
    batch = batch_of(pairs, pixels, "pair")
    ref = torch.randn(3, 2, dtype=torch.float64)

    logps = model(**batch)
    fast = torch.stack([(logps * (batch["branch"] == b)).sum(1) for b in (m.CHOSEN, m.REJECTED)], 1)
    slow = slow_logps(twin, model, pairs, pixels)
    losses = [m.dpo_loss(*x.unbind(1), *ref.unbind(1), 0.1)[0].sum() for x in (fast, slow)]
    assert abs(losses[0] - losses[1]) < 1e-9
    for loss in losses:
        loss.backward()
    want = {k: p.grad for k, p in twin.named_parameters()}
    scale = max(g.abs().max() for g in want.values() if g is not None)
    bound = (1e-9 if patched else 1e-6) * scale
    checked = 0
    for name, p in model.named_parameters():
        g = want[theirs(name)]
        if p.grad is not None and g is not None:
            assert (p.grad - g).abs().max() < bound, name
            checked += 1
    assert checked > 40


@pytest.mark.parametrize("vision", ["siglip", "clip"])
def test_two_rows_are_the_definition_too(monkeypatch, vision):
    """Layout "rows" in fp64: the pair layout's losses and gradients, without its mask."""
    plain_norm(monkeypatch)
    model, losses, grads = tiny_model(vision, dtype=torch.float64), [], []
    pairs, pixels = random_pairs(model, 4)
    ref = torch.randn(4, 2, dtype=torch.float64)
    slow = slow_logps(llava_twin(model)[0], model, pairs, pixels)
    for layout in ("pair", "rows"):
        batch = batch_of(pairs, pixels, layout)
        logps = m.answer_logps(model(**batch), batch.get("branch"))
        assert (torch.stack(list(logps), 1) - slow).abs().max() < 1e-9
        loss = m.dpo_loss(*logps, *ref.unbind(1), 0.1)[0].sum()
        model.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert batch["input_ids"].shape[0] == 8 and len(batch["pixel_values"]) == 4
    assert abs(losses[0] - losses[1]) < 1e-9 and grads[0].keys() == grads[1].keys()
    largest = max(g.abs().max() for g in grads[0].values())
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).abs().max() < 1e-9 * largest, name


def test_mask_by_brute_force():
    """Every (query, key) of the drawing, by the words of its definition."""
    branch = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3], [0, 1, 1, 2, 2, 2, 3, 3]])
    mask = m.pair_mask(branch)
    for b in range(2):
        for q in range(8):
            for k in range(8):
                visible = k <= q and (branch[b, k] == 0 or branch[b, k] == branch[b, q])
                assert mask[b, 0, q, k] == visible
    assert mask.any(-1).all(), "an empty row is NaN after the softmax"


def test_flex_attention_is_the_same_mask(monkeypatch):
    """The kernel for CUDA, run here uncompiled and forward alone: equal log-probs, in both layouts.
    (Compiled, and backward, it was not run.)"""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as theirs
    used = []

    def plain(query, key, value, training, return_lse=False, return_aux=None, **more):
        used.append(more["block_mask"])
        return flex_attention(query, key, value, **more)
    monkeypatch.setattr(theirs, "compile_friendly_flex_attention", plain)
    model = tiny_model()
    pairs, pixels = random_pairs(model, 4)
    for layout in ("pair", "answers"):
        batch = batch_of(pairs, pixels, layout)
        with torch.no_grad():
            model.llm.set_attn_implementation("sdpa")
            want = model(**batch)
            model.llm.set_attn_implementation("flex_attention")
            used.clear()
            assert torch.allclose(model(**batch), want, atol=1e-5) and len(used) == 2, layout
    assert used[0] is not None


def test_padding_and_company_change_nothing():
    """A pair alone and the same pair beside longer ones: equal log-probs."""
    model = tiny_model()
    pairs, pixels = random_pairs(model, 4)
    together = model(**batch_of(pairs, pixels, "pair")).sum(1)
    alone = torch.cat([model(**batch_of(pairs[i:i + 1], pixels[i:i + 1], "pair")).sum(1)
                       for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_sft_layout_is_the_chosen_half():
    """The same answer through the plain causal row and through the pair layout."""
    model = tiny_model()
    pairs, pixels = random_pairs(model)
    pair, row = batch_of(pairs, pixels, "pair"), batch_of(pairs, pixels, "answers")
    chosen = (model(**pair) * (pair["branch"] == m.CHOSEN)).sum(1)
    assert torch.allclose(model(**row).sum(1), chosen, atol=1e-5)


def test_log_probs_in_place_are_those_of_log_softmax():
    """Value and gradient, also where a sum of exponentials would overflow or a row is certain."""
    torch.manual_seed(0)
    logits = torch.randn(7, 50, dtype=torch.float64) * torch.tensor(
        [[1e-3], [1], [10], [1e2], [1e3], [1e4], [1]], dtype=torch.float64)
    targets, weight = torch.randint(50, (7,)), torch.randn(7, dtype=torch.float64)
    values, grads = [], []
    for logps in (lambda x: m.LogProb.apply(x.clone(), targets),
                  lambda x: x.log_softmax(-1).gather(-1, targets[:, None])[:, 0]):
        leaf = logits.clone().requires_grad_()
        values.append(logps(leaf))
        grads += torch.autograd.grad((values[-1] * weight).sum(), leaf)
    for a, b in (values, grads):
        assert torch.isfinite(a).all() and (a - b).abs().max() < 1e-12 * b.abs().max()


@pytest.mark.parametrize("tie", [True, False])
def test_gradient_of_the_words_is_dense_and_whole(monkeypatch, tie):
    """A tied table sums what lm_head and the lookup send it, the latter sparsely (distributed.shard)."""
    model = tiny_model("siglip", "qwen2", tie)
    pairs, pixels = random_pairs(model, 2)
    words, found = model.llm.get_input_embeddings(), []
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)
    distributed.shard(model, torch.device("cpu"))
    assert words.sparse == tie
    for words.sparse in (tie, False):
        words.weight.grad = None
        for _ in range(2):                                       # as micro-steps accumulate
            model(**batch_of(pairs, pixels, "pair")).sum().backward()
        found.append(words.weight.grad)
    assert found[0].layout == torch.strided
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_chunked_rows_equal_whole_rows(monkeypatch):
    model = tiny_model()
    pairs, pixels = random_pairs(model)
    grads = []
    for rows in (1024, 2):
        monkeypatch.setattr(m, "MAX_LOGITS", rows * 64)
        model.zero_grad()
        model(**batch_of(pairs, pixels, "pair")).sum().backward()
        grads.append(model.llm.model.embed_tokens.weight.grad.clone())
    assert torch.allclose(*grads, atol=1e-5)


def test_text_only_batch_keeps_the_eye_in_the_graph():
    """A batch without an image gives the encoder a zero gradient, not none: no process may hang."""
    model = tiny_model()
    batch = {"pixel_values": torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
             "input_ids": torch.randint(2, 60, (2, 9)), "labels": torch.randint(2, 60, (2, 9))}
    model(**batch).sum().backward()
    grad = model.encoder.vision.embeddings.patch_embedding.weight.grad
    assert grad is not None and not grad.any()
    batch["labels"].fill_(m.IGNORE)
    assert model(**batch).sum().requires_grad


def test_count_of_image_tokens_is_checked():
    model = tiny_model()
    with pytest.raises(ValueError, match="15 image tokens for 1 × 16"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.tensor([[IMAGE] * 15 + [1]]),
              torch.full((1, 16), 5))


def test_dpo_loss_by_hand():
    """Eq. 2 with plain floats; at the reference itself it is ln 2 and rewards are 0."""
    c, r, rc, rr, beta = -3.0, -5.0, -3.5, -4.0, 0.1
    want = -math.log(1 / (1 + math.exp(-beta * ((c - rc) - (r - rr)))))
    loss, chosen, rejected = m.dpo_loss(*(torch.tensor([x]) for x in (c, r, rc, rr)), beta)
    assert loss.item() == pytest.approx(want, rel=1e-6)
    assert (chosen.item(), rejected.item()) == (pytest.approx(0.05), pytest.approx(-0.1))
    x = torch.randn(4)
    loss, chosen, rejected = m.dpo_loss(x, x + 1, x, x + 1, beta)
    assert torch.allclose(loss, torch.full((4,), math.log(2)))
    assert not chosen.any() and not rejected.any()


@pytest.mark.parametrize("vision", ["siglip", "clip", "dinov2", "vit"])
def test_feature_is_the_layer_the_paper_names(vision):
    """SigLIP/CLIP: the input of the original's last block. DINOv2/ViT: after the final norm."""
    model = tiny_model(vision)
    encoder, pixels = model.encoder, torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (encoder.mean, encoder.std))
    out = encoder.vision((pixels.float() / 255 - mean) / std, output_hidden_states=True)
    want = out.last_hidden_state if vision in ("dinov2", "vit") else out.hidden_states[-1]
    assert torch.equal(encoder(pixels), want[:, want.shape[1] - 16:])
    assert len(encoder.blocks) == (3 if vision in ("dinov2", "vit") else 2)


def test_truncation_keeps_the_published_feature():
    """Features after deleting the last block = hidden_states[-2] of the published model."""
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from conftest import VISION
    torch.manual_seed(0)
    vision = SiglipVisionModel(SiglipVisionConfig(**VISION))
    x = torch.randn(1, 3, 32, 32)
    want = vision(x, output_hidden_states=True).hidden_states[-2]
    got = encoders.truncate(vision)(x, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(got, want) and not hasattr(vision, "head")
    assert len(encoders.truncate(vision).encoder.layers) == 2, "a second cut must not happen"


def test_every_gradient_path_is_visible():
    """Invariant 1: one DPO step gives every trainable parameter a gradient, frozen ones none."""
    for vision, frozen in (("siglip", {"post_layernorm.weight", "post_layernorm.bias"}),
                           ("clip", {"post_layernorm.weight", "post_layernorm.bias"}),
                           ("dinov2", {"embeddings.mask_token"}), ("vit", set())):
        model = tiny_model(vision, dtype=torch.float64)
        pairs, pixels = random_pairs(model)
        batch = batch_of(pairs, pixels, "pair")
        logps = model(**batch)
        (logps * (batch["branch"] == m.CHOSEN)).sum().sub(
            (logps * (batch["branch"] == m.REJECTED)).sum()).backward()
        silent = set()
        top = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
        for name, p in model.named_parameters():
            if p.grad is None:
                silent.add(name.removeprefix("encoder.vision."))
            elif "encoder" in name and ("k_proj.bias" in name or "key.bias" in name):
                assert p.grad.abs().max() < 1e-6 * top    # zero by mathematics: softmax shift
            else:
                assert p.grad.abs().max() > 0, name
        assert silent == frozen


def other_llm(name):
    import transformers as t
    torch.manual_seed(0)
    facts = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return {
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT, head_dim=8)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**TEXT)),
        "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**TEXT)),
        "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(hidden_size=32, num_hidden_layers=2,
                                                          vocab_size=64)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=2,
                                                       vocab_size=64)),
        "gemma3_text": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(
            **facts, num_key_value_heads=2, head_dim=8)),
    }[name]()


@pytest.mark.parametrize("name", ["qwen3", "mistral", "olmo2"])
def test_other_llms_keep_the_two_answers_apart(name):
    """Any causal LM of full attention: the rejected answer does not see the chosen one."""
    llm = other_llm(name)
    published.refuse_llm(llm, name)
    model = m.MLLM(tiny_model().encoder, llm, IMAGE).eval()
    pairs, pixels = random_pairs(model, 1)
    batch = batch_of(pairs, pixels, "pair")
    before = model(**batch)
    chosen = batch["labels"].gt(0) & (batch["branch"] == m.CHOSEN)
    for key in ("input_ids", "labels"):
        batch[key][chosen] = (batch[key][chosen] + 11) % 50 + 2
    after = model(**batch)
    rejected = batch["branch"] == m.REJECTED
    assert torch.equal(before[rejected], after[rejected])
    assert not torch.equal(before[~rejected], after[~rejected])
    plain, twice = batch_of(pairs, pixels, "answers"), (before * (batch["branch"] == m.CHOSEN)).sum(1)
    assert torch.allclose(model(**plain).sum(1), twice, atol=1e-4)


@pytest.mark.parametrize("name", ["mamba", "gpt2"])
def test_an_llm_that_others_would_not_open_is_refused(name):
    with pytest.raises(SystemExit, match=f"x is a {name}: only causal LMs with their blocks"):
        published.refuse_llm(other_llm(name), "x")


def test_an_llm_that_cannot_hold_two_answers_takes_rows():
    """Sliding attention: no row of two answers, neither for the stage nor for whoever forks it."""
    llm = other_llm("gemma3_text")
    published.refuse_llm(llm, "x")
    published.refuse_layout(llm, "rows")
    with pytest.raises(SystemExit, match="not every layer of a gemma3_text heeds; use --layout ro"):
        published.refuse_layout(llm, "pair")
    model = m.MLLM(tiny_model().encoder, llm, IMAGE).eval()
    pairs, pixels = random_pairs(model)
    with pytest.raises(ValueError, match="cannot hold two answers in one row"):
        model(**batch_of(pairs, pixels, "pair"))
    chosen, rejected = m.answer_logps(model(**batch_of(pairs, pixels, "rows")))
    alone = [model(**batch_of(pairs[i:i + 1], pixels[i:i + 1], "answers")).sum() for i in range(3)]
    assert torch.allclose(chosen, torch.stack(alone), atol=1e-4) and len(rejected) == 3


@pytest.mark.parametrize("width,drawn", [(1, False), (3, False), (3, True)])
def test_generation_is_argmax_one_token_at_a_time(width, drawn):
    """Batched, cached, left-padded = a fresh full forward for every token. Drawn: the place of the
    step's own number in the shares of the tokens."""
    model = tiny_model().eval()
    g = torch.Generator().manual_seed(0)
    prompts = [[1] + [IMAGE] * 16 + torch.randint(2, 60, (n,), generator=g).tolist()
               for n in (2, 5, 9)[:width]]
    pixels = torch.randint(0, 256, (width, 3, 32, 32), dtype=torch.uint8, generator=g)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    numbers = torch.rand(width, 6, dtype=torch.float64, generator=g)
    how = {"temperature": 1.0, "uniforms": numbers} if drawn else {}
    got = model.generate(pixels, ids, mask, 6, stop_ids={7}, **how)
    for b, prompt in enumerate(prompts):
        sequence, want = list(prompt), []
        for step in range(6):
            hidden = model.llm.model(inputs_embeds=model.embed(
                pixels[b:b + 1], torch.tensor([sequence]))).last_hidden_state
            logits = model.llm.lm_head(hidden[0, -1]).detach().double()
            logits[IMAGE] = -torch.inf
            token = int(logits.argmax())
            if drawn:
                token = int((logits.softmax(-1).cumsum(-1) <= numbers[b, step]).sum())
            if token == 7:
                break
            want.append(token)
            sequence.append(token)
        assert got[b] == want


@pytest.mark.parametrize("by", ["seeds", "uniforms"])
def test_drawn_answers_follow_the_softmax_and_their_own_seed(by):
    """All but `<image>`, which no picture would stand behind, however probable it is."""
    def drawn_by(seeds):
        return {"seeds": seeds} if by == "seeds" else {"uniforms": torch.stack(
            [rollout.uniforms_of(seed, 6) for seed in seeds])}
    model, n, t = tiny_model().eval(), 3000, 0.5
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    ids = torch.tensor([[1] + [IMAGE] * 16 + [9, 4]])
    hidden = model.llm.model(inputs_embeds=model.embed(pixels, ids)).last_hidden_state[0, -1]
    model.llm.lm_head.weight.data[IMAGE] = 9 * hidden / hidden.square().sum()
    logits = model.llm.lm_head(hidden).detach().double()
    assert logits.argmax() == IMAGE
    logits[IMAGE] = -torch.inf
    want = (logits / t).softmax(-1)
    got = model.generate(pixels, ids, torch.ones_like(ids), 1, {-1}, t, **drawn_by(range(n)),
                         group=n)
    seen = torch.bincount(torch.tensor(got)[:, 0], minlength=len(want)) / n
    assert ((seen - want).abs() < 4.5 * (want * (1 - want) / n).sqrt() + 1 / n).all()
    assert want.max() > 2 * want.median() and len({a[0] for a in got}) > 3

    three = [torch.cat([x] * 3) for x in (pixels, ids, torch.ones_like(ids))]
    together = model.generate(*three, 6, {-1}, t, **drawn_by([5, 6, 7]))
    alone = model.generate(pixels, ids, torch.ones_like(ids), 6, {-1}, t, **drawn_by([6]))
    assert together[1] == alone[0] and together[0] != together[1]


def test_a_number_falls_to_the_token_that_owns_its_place():
    """Shares 1/2, 0, 1/4, 1/4: borders belong to the token behind them, 0 to nobody."""
    logits = torch.tensor([0.5, 0, 0.25, 0.25]).log().expand(6, -1)
    numbers = torch.tensor([0, 0.49, 0.5, 0.74, 0.75, 1 - 2 ** -53], dtype=torch.float64)
    assert m.token_at(numbers, logits).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")
def test_every_block_is_compiled(monkeypatch):
    """Same log-probs and gradients; a few graphs, for what is alike shares one (the limit is 8)."""
    from torch._dynamo.utils import counters
    monkeypatch.setitem(TEXT, "num_hidden_layers", 9)
    model = tiny_model()
    pairs, pixels = random_pairs(model, 2)
    whole = copy.deepcopy(model)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)
    distributed.shard(model, torch.device("cpu"), compiled=True)
    counters.clear()
    out = [x(**batch_of(pairs, pixels, "pair")) for x in (model, whole)]
    torch.testing.assert_close(*out)
    assert 2 <= counters["stats"]["unique_graphs"] <= 4
    lengths, graphs = set(), set()
    for more in (1, 2, 3, 4, 5, 6, 7, 8):                      # tokens appended to rejected answers
        batch = batch_of([(np.append(ids, [5] * more), np.append(roles, [records.OTHER] * more))
                          for ids, roles in pairs], pixels, "pair")
        torch.testing.assert_close(model(**batch), whole(**batch))
        lengths.add(batch["input_ids"].shape[1] % 8)
        graphs.add(counters["stats"]["unique_graphs"])
    assert len(lengths) == 8 and len(graphs) == 1       # a length that is a multiple of 8 included
    for x in out:
        x.sum().backward()
    a, b = (torch.cat([p.grad.flatten() for p in x.parameters() if p.grad is not None])
            for x in (model, whole))
    assert (a - b).norm() < 1e-5 * b.norm()


def test_a_step_of_1e_6_moves_fp32_masters():
    """bf16 storage would round every AdamW step of 1e-6 on a weight of 0.02 away."""
    for dtype, moves in ((torch.float32, True), (torch.bfloat16, False)):
        p = torch.nn.Parameter(torch.full((8,), 0.02, dtype=dtype))
        optimizer, before = torch.optim.AdamW([p], lr=1e-6, weight_decay=0.0), p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert bool((p != before).all()) == moves


def test_cudnns_attention_is_off(tmp_path):
    """On an H100 its gradients are reported NaN under masks like ours (pytorch#196678)."""
    script = tmp_path / "script.py"
    script.write_text("import torch\nfrom pivot import distributed\nbefore = torch.backends.cuda.cudnn_sdp_enabled()\n"
                      "distributed.start()\nprint(before, torch.backends.cuda.cudnn_sdp_enabled())\n"
                      "distributed.stop()\n")
    assert run(script).stdout.split()[-2:] == ["True", "False"]


def test_where_it_runs_is_said_and_a_gpu_left_unused_too(monkeypatch, capsys):
    """A driver too old for this torch would otherwise be a run of days on the CPU, in silence."""
    exists = distributed.os.path.exists
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: False)
    for there, hidden in ((False, None), (True, None), (True, "")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if hidden is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        monkeypatch.setattr(distributed.os.path, "exists",
                            lambda p: there if p == "/dev/nvidiactl" else exists(p))
        distributed.start()
        distributed.dist.destroy_process_group()
        said = capsys.readouterr().out
        assert f"  1 process on the CPU, torch {torch.__version__}" in said
        assert ("HAS AN NVIDIA GPU" in said) is (there and hidden is None)


def test_an_error_of_nccl_keeps_its_reason(monkeypatch, capsys):
    """Its first line names a source file alone."""
    monkeypatch.setattr(distributed.os, "_exit", lambda code: None)

    def main():
        raise distributed.dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:93, unhandled cuda error, NCCL version 2.27\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
            "Cuda failure 2 'out of memory'")
    distributed.launch(main)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Last error: Cuda failure 2 'out of memory'" in said


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sharded_model_answers_as_the_whole_one(stage1, processes):
    """Token for token, also where processes need other numbers of steps; then it trains on."""
    done = run("tests/sharded_generate.py", stage1 / "pretrain/final", processes=processes)
    assert "answers are the same" in done.stdout
