"""What is computed: pixels and tokens → log-probs of answers, in one forward.

    encode → project → scatter into the token embeddings → LLM → answer rows only
           → fp32 log-softmax → gather

Every gradient that reaches the encoder flows back through exactly these lines. How it is *run*
is in pivot/: distributed.py (processes, sharding), checkpoints.py, encoders.py (which encoder and
layer), published.py and model_io.py (how models are opened and saved).

The pair layout (shared prefix, one image, one sequence a pair; the prompt has P tokens, `p` is the
last of them):

      tokens     <image>×N  question   p   c1  c2  c3    p   r1  r2      (padding)
      branch        0  …        0      1   1   1   1     2   2   2         -1
      position      0  …       P-2    P-1  P  P+1 P+2   P-1  P  P+1         …

    A token sees what stands before it in its own branch and in branch 0, nothing else. Because `p`
    opens both branches, each first answer token is predicted from its own copy of it, and the
    ordinary label shift is right everywhere. (Without the copy r1 would be predicted from c3: off
    by 0.1 in a toy's log-prob. If the positions of r1 r2 ran on from c3's, the error would be 2e-3,
    small enough to miss.) Any number of answers fit behind one prompt: GRPO's group has branches
    1 … G.
"""
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

IGNORE = -100                                    # label of a token that is not predicted
SHARED, CHOSEN, REJECTED, PADDING = 0, 1, 2, -1  # branch of a token in the pair layout
MAX_LENGTH = 2048               # of prompt + answer with the image's tokens; longer is left out
MAX_LOGITS = 1024 * 151_936     # at once through lm_head: 1,024 rows of Qwen, 0.6 GB of fp32


class Projector(nn.Module):
    """Linear – GELU – Linear with bias: (B, N, d_vision) → (B, N, d_llm)."""

    def __init__(self, d_vision, d_llm):
        super().__init__()
        self.linear_1 = nn.Linear(d_vision, d_llm)
        self.linear_2 = nn.Linear(d_llm, d_llm)

    def forward(self, features):
        return self.linear_2(F.gelu(self.linear_1(features)))


def visible(branch):
    """Who sees whom in the pair layout, as FlexAttention asks it: (b, head, q, k) → visible?

                     keys:  x1 x2 p  c1 c2  p  r1        (x1 x2: the prompt before p)
        query c2  (chosen)  +  +  +  +  +   .  .
        query r1 (rejected) +  +  .  .  .   +  +

    Every query sees at least itself, padding included, so that no row of the softmax is empty (an
    empty one is NaN).
    """
    def sees(b, head, q, k):
        return (q >= k) & ((branch[b, q] == branch[b, k]) | (branch[b, k] == SHARED))
    return sees


def pair_mask(branch):
    """The same for every query and key at once: branch (B, T) int → bool (B, 1, T, T)."""
    B, T = branch.shape
    b = torch.arange(B, device=branch.device).view(B, 1, 1, 1)
    t = torch.arange(T, device=branch.device)
    return visible(branch)(b, None, t.view(T, 1), t)


def can_hold_pairs(llm):
    """Does every layer heed our mask? A recurrent one would let the rejected answer read the chosen
    one, and a sliding one may not reach the prompt: such an LLM takes layout "rows"."""
    config, mixers = llm.config, ("self_attn", "attention", "attn", "self_attention")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) or MAX_LENGTH
    return kinds == {"full_attention"} and window >= MAX_LENGTH and all(
        any(hasattr(layer, mixer) for mixer in mixers) for layer in llm.base_model.layers)


def attention_mask(branch, kernel, dtype):
    """The mask in the form the attention kernel takes: FlexAttention's blocks, or floats."""
    (B, T), device = branch.shape, branch.device
    if kernel == "flex_attention":     # blocks of 128 × 128 that are empty are never computed
        return create_block_mask(visible(branch), B, None, T, T, device=device)
    # SDPA would copy, in every layer, a mask of booleans or one whose rows do not begin at
    # multiples of 8 (CUDA's memory-efficient kernel). Hence floats in padded rows, padded also
    # where T is such a multiple, so that --compile sees one case.
    rows = torch.zeros(B, 1, T, (T // 8 + 1) * 8, dtype=dtype, device=device)
    return rows[..., :T].masked_fill_(~pair_mask(branch), -torch.inf)


class LogProb(torch.autograd.Function):
    """log softmax(logits)[target] of each row: (R, V) fp32 or fp64, (R,) → (R,). Overwrites logits.

    d log p_t / d logits = onehot(t) − p. The logits become p in the forward pass and the gradient
    in the backward pass: one table of R × V, where log_softmax and its gradient would be three. The
    input is overwritten: safe, because neither a matrix product nor a product with a number, which
    made it, saves its output.
    """
    @staticmethod
    def forward(ctx, logits, targets):
        highest = logits.amax(-1, keepdim=True)
        picked = logits.gather(-1, targets[:, None]) - highest
        p = logits.sub_(highest).exp_()
        total = p.sum(-1, keepdim=True)
        ctx.save_for_backward(p.div_(total), targets)
        return (picked - total.log())[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        p, targets = ctx.saved_tensors
        grad = grad[:, None]
        return p.mul_(-grad).scatter_add_(-1, targets[:, None], grad), None


def logits_of(llm, hidden):
    """The logits that the LLM's own class gives: (R, D) → (R, V), in fp32 at least: in bf16 a sum
    of log-probs over 200 tokens is off by 1.2 nats.

    Some classes scale or cap what lm_head gives. (published.refuse_llm compares a row with theirs.)
    """
    logits, config = llm.get_output_embeddings()(hidden), llm.config
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))        # fp64 stays (tests)
    if not scales_logits(config):
        return logits
    logits = logits * (getattr(config, "logit_scale", None) or 1)          # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1)       # Granite
    if cap := getattr(config, "final_logit_softcapping", None):            # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits


def scales_logits(config):
    """Does this LLM's class scale or cap what its lm_head gives?"""
    return (getattr(config, "logit_scale", None) or 1) != 1 or \
        (getattr(config, "logits_scaling", None) or 1) != 1 or \
        bool(getattr(config, "final_logit_softcapping", None))


def token_logps(hidden, llm, targets):
    """log p(target) of each row. hidden (R, D), targets (R,) → (R,) fp32.

    Rows go through in chunks, recomputed in the backward pass, so that the peak is MAX_LOGITS
    however long the answers are.
    """
    def chunk(h, t):
        return LogProb.apply(logits_of(llm, h), t)
    rows = max(1, MAX_LOGITS // llm.get_output_embeddings().out_features)
    if len(hidden) <= rows:
        return chunk(hidden, targets)
    return torch.cat([checkpoint(chunk, h, t, use_reentrant=False)
                      for h, t in zip(hidden.split(rows), targets.split(rows))])


def placed(values, rows, shape):
    """What row t says of token t + 1, at that token; 0 elsewhere: (R,) and the indices (b, t) of
    the rows, each (R,) → (B, T), the shape."""
    out = values.new_zeros(shape)
    out[:, 1:].index_put_(rows, values)
    return out


def drawn_token(logits, generators):
    """A draw from the softmax of each row: the highest after Gumbel noise. (R, V) → (R,).

    generators: R, on the CPU: the same draws on every device. They are asked for V numbers a row.
    """
    gumbel = -torch.stack([torch.empty(logits.shape[1]).exponential_(generator=g).log()
                           for g in generators])
    return (logits + gumbel.to(logits.device)).argmax(-1)


def token_at(uniforms, logits):
    """A draw from the softmax of each row by one number: the tokens divide [0, 1) among them, each
    as much as it is probable, and the number falls to one. (R,) fp64 in [0, 1), (R, V) → (R,).

    With 150,000 tokens the noise of `drawn_token` costs 5 ms a row on the CPU, while a GPU waits.
    """
    ends = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(ends, (uniforms * ends[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=logits.shape[1] - 1)


class MLLM(nn.Module):
    """Encoder + projector + LLM as one module.

    encoder: encoders.Encoder; llm: a causal LM of transformers with a ChatML tokenizer;
    image_token_id: the id that stands for one patch in input_ids.
    """

    def __init__(self, encoder, llm, image_token_id):
        super().__init__()
        self.encoder, self.llm, self.image_token_id = encoder, llm, image_token_id
        self.projector = Projector(encoder.hidden_size, llm.config.hidden_size)
        self.value = None                             # a ValueHead, where PPO trains

    @property
    def blocks(self):
        """The transformer blocks of both: what is sharded, compiled, counted one by one."""
        return [*self.encoder.blocks, *self.llm.base_model.layers]

    def set_requires_gradient_sync(self, whether):
        """Nothing to do for a lone process; under `fully_shard` FSDP's own method takes over."""

    def all_processes(self, done):
        """Is it done in every process? Alone, simply `done`; `distributed.shard` replaces this by a
        reduction."""
        return done

    def embed(self, pixel_values, input_ids):
        """Token embeddings with the projected patches in place of `<image>`: (B, T, d_llm)."""
        embeds = self.llm.get_input_embeddings()(input_ids)
        # A frozen encoder keeps no activations. Under sharding every process runs it at every step,
        # also for a batch of text alone, or the others would wait for its all-gather for ever.
        learns = any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            features = self.encoder(pixel_values)                      # (B, N, d_vision)
        features = self.projector(features)                            # (B, N, d_llm)
        # Layout "rows": the rows of all chosen answers, then those of all rejected ones.
        features = features.repeat(max(1, len(input_ids) // len(features)), 1, 1)
        is_image = input_ids == self.image_token_id                    # (B, T)
        counts = is_image.sum(1).tolist()                              # waits for the device, once
        with_image = [b for b, count in enumerate(counts) if count]
        if sum(counts) != len(with_image) * features.shape[1]:
            raise ValueError(f"{sum(counts)} image tokens for "
                             f"{len(with_image)} × {features.shape[1]} image features")
        if len(with_image) < len(counts):                              # text-only rows have none
            features = features[with_image]
        return embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))

    def forward(self, pixel_values, input_ids, labels, branch=None, position_ids=None,
                with_values=False):
        """Log-prob of every supervised token, 0 elsewhere: (B, T) fp32.

        pixel_values uint8 (B, 3, S, S); input_ids, labels int64 (B, T), right-padded, labels
        IGNORE where nothing is predicted; branch, position_ids int64 (B, T) for the pair layout.
        In layout "rows" a picture has two rows: input_ids, labels and the result are (2B, T).
        out[b, t] = log p(labels[b, t] | image, what token t - 1 sees); an answer's log-prob is
        their sum. with_values: → log-probs, and the value head's value of what token t - 1 sees,
        (B, T) fp32, 0 where nothing is predicted.
        """
        embeds = self.embed(pixel_values, input_ids)
        if branch is not None and not can_hold_pairs(self.llm):
            raise ValueError(f"a {self.llm.config.model_type} cannot hold two answers in one row")
        # Without branches: right padding under a causal mask needs neither mask nor positions.
        mask = None if branch is None else attention_mask(
            branch, self.llm.config._attn_implementation, embeds.dtype)               # (B, 1, T, T)
        hidden = self.llm.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False,
                                     position_ids=position_ids).last_hidden_state
        targets = labels[:, 1:]                       # row t predicts token t + 1: the one shift
        # Which they are, as indices, once: a mask lets the host wait for the device at each use.
        rows = (targets != IGNORE).nonzero(as_tuple=True)
        picked = hidden[rows]                                                          # (R, D)
        logps = placed(token_logps(picked, self.llm, targets[rows]), rows, labels.shape)
        return (logps, placed(self.value(picked), rows, labels.shape)) if with_values else logps

    @torch.no_grad()            # not inference_mode: FSDP gathers into tensors that train again
    def generate(self, pixel_values, input_ids, attention_mask, max_new_tokens, stop_ids,
                 temperature=0.0, seeds=(), keep_stop=False, group=1, uniforms=None,
                 with_logps=False):
        """Continuation, batched and KV-cached: a list of B × group lists of token ids, a prompt's
        one after the other. Greedy, or drawn from softmax(logits / temperature).

        pixel_values (B, 3, S, S); input_ids int64 (B, T), *left*-padded; attention_mask int64
        (B, T), 0 on padding; group: continuations of each prompt, which goes through encoder and
        LLM once for all of them; keep_stop: a stop token that was given ends its list. What is
        drawn is a function of its own seed, not of what it is batched with: seeds: B × group ints;
        or uniforms: fp64 (B × group, max_new_tokens) in [0, 1), for which see `token_at`.
        with_logps: → also fp32 (B × group, N), log π of what was drawn, at temperature 1; behind an
        answer's end it means nothing.
        """
        stop = torch.tensor(sorted(stop_ids), device=input_ids.device)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        inputs, cache = {"inputs_embeds": self.embed(pixel_values, input_ids)}, None
        answers, logps = [[] for _ in range(len(input_ids) * group)], []
        done = torch.zeros(len(answers), dtype=torch.bool, device=input_ids.device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if uniforms is not None:
            uniforms = uniforms.to(input_ids.device, non_blocking=True)
        for step in range(max_new_tokens):
            out = self.llm.base_model(**inputs, attention_mask=attention_mask, use_cache=True,
                                      position_ids=positions, past_key_values=cache)
            hidden = out.last_hidden_state[:, -1]
            if cache is None and group > 1:                        # from here on a row an answer
                out.past_key_values.batch_repeat_interleave(group)
                hidden, attention_mask, positions = (
                    x.repeat_interleave(group, 0) for x in (hidden, attention_mask, positions))
            logits = logits_of(self.llm, hidden)                                  # (B × group, V)
            total = logits.logsumexp(-1) if with_logps else None
            logits[:, self.image_token_id] = -torch.inf          # no picture would stand behind it
            if uniforms is not None:
                token = token_at(uniforms[:, step], logits / temperature)
            elif temperature:
                token = drawn_token(logits / temperature, generators)
            else:
                token = logits.argmax(-1)
            if with_logps:
                logps.append(logits.gather(1, token[:, None])[:, 0] - total)
            before, done = done, done | torch.isin(token, stop)
            said, over, over_now = torch.stack([token, before, done]).tolist()     # waits, once
            for answer, word, silent in zip(answers, said, over if keep_stop else over_now):
                if not silent:
                    answer.append(word)
            if self.all_processes(all(over_now)):          # sharded, all must run as many steps
                break
            inputs, cache = {"input_ids": token[:, None]}, out.past_key_values
            positions = positions[:, -1:] + 1
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
        return (answers, torch.stack(logps, 1)) if with_logps else answers


def answer_logps(logps, branch=None):
    """Token log-probs → log π(y_c), log π(y_r), each (B,): *sums* over the answer.

    Layout "pair": logps, branch (B, T). Layout "rows", which has no branches: logps (2B, T), the
    rows of all chosen answers first.
    """
    if branch is None:
        return logps.sum(1).chunk(2)
    return [(logps * (branch == b)).sum(1) for b in (CHOSEN, REJECTED)]


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """Eq. 2 of the paper, per pair:
    −log σ(β[(log π(y_c) − log π_ref(y_c)) − (log π(y_r) − log π_ref(y_r))]).

    All inputs (B,) fp32: *sums* of token log-probs (a mean would rescale beta by length).
    → losses, chosen_rewards, rejected_rewards, each (B,); the rewards are detached.
    """
    chosen_logratio = chosen_logps - ref_chosen_logps
    rejected_logratio = rejected_logps - ref_rejected_logps
    losses = -F.logsigmoid(beta * (chosen_logratio - rejected_logratio))
    return losses, beta * chosen_logratio.detach(), beta * rejected_logratio.detach()


def mpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, delta,
             chosen_tokens):
    """MPO (arXiv 2411.10442), per pair: its three terms, which the caller weights. With
    r = β (log π(y) − log π_ref(y)):

        preference  −log σ(r_c − r_r)                     DPO: which of the two is better
        quality     −log σ(r_c − δ) − log σ(−(r_r − δ))   BCO: is each of them good by itself
        generation  −log π(y_c) / |y_c|                   SFT: the right one, a mean over its tokens

    Log-probs (B,) fp32: *sums* over an answer's tokens, as for dpo_loss; delta: δ, a float, one for
    all pairs of a step; chosen_tokens (B,) int: |y_c|, the end token included.
    → preference, quality, generation, chosen_rewards, rejected_rewards, each (B,); the rewards are
    detached.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    preference = -F.logsigmoid(chosen_rewards - rejected_rewards)
    quality = -F.logsigmoid(chosen_rewards - delta) - F.logsigmoid(-(rejected_rewards - delta))
    generation = -chosen_logps / chosen_tokens
    return preference, quality, generation, chosen_rewards.detach(), rejected_rewards.detach()


# -------------------------------------------------------------------------------- groups of answers

def group_advantages(rewards, scaled=True):
    """GRPO (arXiv 2402.03300): what an answer's reward is above the mean of its group, in standard
    deviations of the group (over G − 1). (B, G) → (B, G).

    A group whose answers are all worth the same gets 0. Dividing makes a question that is nearly
    always, or nearly never, answered rightly count more; scaled=False leaves it out, as Dr. GRPO
    does (arXiv 2503.20783).
    """
    above = rewards - rewards.mean(1, keepdim=True)
    return above / (rewards.std(1, keepdim=True) + 1e-4) if scaled else above


def of_tokens(values, branch, drawn_at):
    """A value of every answer → of each of its tokens: (B, G), (B, T) → (R,), in the order of
    logps[drawn_at]."""
    return values.gather(1, (branch - 1).clamp(min=0))[drawn_at]


def clipped_loss(logps, old_logps, advantages, clip_low, clip_high):
    """PPO's and GRPO's, per token: −min(ρ A, clip(ρ, 1 − low, 1 + high) A), ρ = π / π_old.

    All of one shape, one entry a token. → losses; clipped (bool): where no gradient is left, for ρ
    has already gone as far as A wanted it to.
    """
    ratio = (logps - old_logps).exp()
    whole, bounded = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(whole, bounded), bounded < whole


class ValueHead(nn.Linear):
    """PPO's critic: the reward that is still to come, read off the LLM's last hidden state. (R, D)
    → (R,) fp32, of a product in the model's dtype. Zero at the start.

    detached: what it gets wrong moves itself alone, neither LLM nor projector nor encoder.
    """

    def __init__(self, d_llm, detached=True):
        super().__init__(d_llm, 1)
        self.detached = detached
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden):
        values = super().forward(hidden.detach() if self.detached else hidden)[:, 0]
        return values.to(torch.promote_types(values.dtype, torch.float32))


def token_rewards(rewards, kl, lengths):
    """PPO's reward of a token: −kl, and at an answer's last one also what the answer is worth.

    rewards, lengths (B, G): of the answers; kl (R,): weighted, an entry a token, answer after
    answer. → (R,).
    """
    last = lengths.flatten().cumsum(0) - 1
    return (-kl).index_add(0, last, rewards.flatten().to(kl.dtype))


def gae(rewards, values, lengths, gamma, lam):
    """Generalised advantage estimation (arXiv 1506.02438), per token: how much more came after it
    than was expected before it.

        δ_t = r_t + γ V_{t+1} − V_t        A_t = δ_t + γλ A_{t+1}

    After an answer's last token V and A are 0, also where it was cut off. rewards, values (R,): an
    entry a token, answer after answer; V_t is what is expected before token t; lengths (B, G): of
    the answers. → (R,).
    """
    lengths = lengths.flatten()
    taken = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]   # (B G, T)
    rewards, values = (x.new_zeros(taken.shape).masked_scatter(taken, x)
                       for x in (rewards, values))
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(taken.shape[1])):              # padding is 0 throughout, and stays so
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_value, next_advantage = values[:, t], delta + gamma * lam * next_advantage
        advantages[:, t] = next_advantage
    return advantages[taken]


def value_loss(values, old_values, returns, clip):
    """PPO's, per token: ½ max((V − R)², (V_c − R)²), V_c = V, but at most `clip` away from V_old.

    All of one shape, one entry a token. → losses; clipped (bool): where no gradient is left, for V
    has already gone as far towards R as it may.
    """
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    whole, bounded = (values - returns).square(), (bounded - returns).square()
    return torch.maximum(whole, bounded) / 2, bounded > whole


def kl_k3(logps, ref_logps):
    """e^d − d − 1, d = log π_ref − log π: per token, ≥ 0, and in the mean over drawn tokens the KL
    divergence from the reference. DeepSeekMath's and TRL's; its gradient is that of the divergence
    only while d is small, to first order (arXiv 2510.01555)."""
    d = ref_logps - logps
    return d.exp() - d - 1


def kl_k2(logps, ref_logps):
    """d² / 2: as a value biased, but on drawn answers its gradient is in the mean that of the KL
    divergence (arXiv 2510.01555)."""
    return (ref_logps - logps).square() / 2


# How much each token of an answer counts. lengths (B, G): tokens of the answers held here; answers,
# tokens: how many there are in the *global* batch. → (B, G).

def normalise_dapo(lengths, answers, tokens, max_new_tokens):
    """All tokens alike: a long answer counts more than a short one (arXiv 2503.14476)."""
    return torch.ones_like(lengths) / tokens


def normalise_grpo(lengths, answers, tokens, max_new_tokens):
    """All answers alike: a mean over the tokens of each, then over answers. A long wrong answer is
    punished less for each of its tokens than a short one."""
    return 1 / (lengths * answers)


def normalise_dr_grpo(lengths, answers, tokens, max_new_tokens):
    """A sum over tokens, by a constant: no length is favoured (arXiv 2503.20783)."""
    return torch.ones_like(lengths) / (answers * max_new_tokens)
