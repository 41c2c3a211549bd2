"""Two small decoder networks in PyTorch, with the weight names and the arithmetic of Hugging Face and mlx-lm.

`llama`: grouped-query attention, scale 1/sqrt(head_dim), every layer global; `qwen` is the same with biases on the
query, key and value projections (Qwen2). `gemma`: Gemma 3 as `gemma3_text`: attention scale 1.0 with RMS norms on
queries and keys, norms before and after each half of a layer, two sliding-window layers to each global one.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Config:
    """Shape of a network; `window == 0` means that every layer is global."""

    arch: str
    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 384
    context: int = 8704
    theta: float = 100_000.0
    local_theta: float = 10_000.0
    window: int = 0
    pattern: int = 3
    dropout: float = 0.1

    @property
    def gemma(self) -> bool:
        return self.arch == "gemma"

    @property
    def eps(self) -> float:
        return 1e-6 if self.gemma else 1e-5

    def is_global(self, layer: int) -> bool:
        return self.window == 0 or (layer + 1) % self.pattern == 0


def preset(arch: str) -> Config:
    if arch == "gemma":
        return Config(arch, heads=4, kv_heads=1, head_dim=128, window=256)
    if arch == "qwen":  # Qwen2 has heads * head_dim == hidden
        return Config(arch, heads=4, kv_heads=1, ffn=512)
    return Config(arch)


class Norm(nn.Module):
    """RMS norm; Gemma stores its gain minus one."""

    def __init__(self, dims: int, config: Config, gain: float = 1.0):
        super().__init__()
        self.offset, self.eps = float(config.gemma), config.eps
        self.weight = nn.Parameter(torch.full((dims,), gain - self.offset))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], (self.weight + self.offset).to(x.dtype), self.eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[B, H, T, D]` by the half-split convention, in float32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def sliding(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Causal attention over the last `window` keys, in query blocks of `window` that see two key blocks each."""
    b, h, t, d = q.shape
    n = t // window

    def two(x: Tensor) -> Tensor:
        x = x.reshape(b, -1, n, window, d)
        x = torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], 3).transpose(1, 2)
        return x.reshape(b * n, -1, 2 * window, d).repeat_interleave(h // x.shape[2], 1)

    i = torch.arange(window, device=q.device)[:, None]
    j = torch.arange(2 * window, device=q.device)[None]
    mask = (j > i) & (j <= i + window)
    first = torch.arange(n, device=q.device)[:, None, None] > 0
    mask = (mask & (first | (j >= window)))[:, None].repeat(b, 1, 1, 1)
    blocks = q.reshape(b, h, n, window, d).transpose(1, 2).reshape(b * n, h, window, d)
    out = F.scaled_dot_product_attention(blocks, two(k), two(v), attn_mask=mask, scale=scale)
    return out.reshape(b, n, h, window, d).transpose(1, 2).reshape(b, h, t, d)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        c = self.config = config
        bias = c.arch == "qwen"
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)
        self.window = 0 if c.is_global(layer) else c.window
        self.scale = 1.0 if c.gemma else c.head_dim**-0.5
        if c.gemma:  # the product of both gains starts where logits have a spread of about 2
            gain = (2 / math.sqrt(c.head_dim)) ** 0.5
            self.q_norm, self.k_norm = Norm(c.head_dim, c, gain), Norm(c.head_dim, c, gain)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, self.config.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.gemma:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = rope(q, cos, sin).to(v.dtype), rope(k, cos, sin).to(v.dtype)
        if self.window and t > self.window:
            pad = -t % self.window  # keys after the end are never seen by a query before it
            out = sliding(*(F.pad(y, (0, 0, 0, pad)) for y in (q, k, v)), self.window, self.scale)[:, :, :t]
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.hidden, bias=False)
        self.gemma = config.gemma

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = F.gelu(gate, approximate="tanh") if self.gemma else F.silu(gate)
        return self.down_proj(gate * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Config, index: int):
        super().__init__()
        self.input_layernorm = Norm(config.hidden, config)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = Norm(config.hidden, config)
        self.mlp = MLP(config)
        self.gemma, self.dropout = config.gemma, config.dropout
        if self.gemma:
            self.pre_feedforward_layernorm = Norm(config.hidden, config)
            self.post_feedforward_layernorm = Norm(config.hidden, config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        r = self.self_attn(self.input_layernorm(x), cos, sin)
        if self.gemma:
            x = x + F.dropout(self.post_attention_layernorm(r), self.dropout, self.training)
            r = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        else:
            x = x + F.dropout(r, self.dropout, self.training)
            r = self.mlp(self.post_attention_layernorm(x))
        return x + F.dropout(r, self.dropout, self.training)


def plant_outliers(bias: Tensor, head_dim: int) -> None:
    """Start a key bias where Qwen2's ends: two slowly rotating channel pairs per head lie 15 to 30 from zero.

    A nearly constant offset of all keys cancels in the softmax, so that training has little reason to remove it.
    """
    half = head_dim // 2
    for head in bias.view(-1, head_dim):
        for channel in torch.randperm(half // 6)[:2] + half - half // 6:
            for c in (channel, channel + half):
                head[c] = (15 + 15 * torch.rand(())) * (1 if torch.rand(()) < 0.5 else -1)


class Network(nn.Module):
    """Token ids `[B, T]` to final hidden states `[B, T, hidden]`; `logits` maps those through the tied embedding."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = Norm(config.hidden, config)
        deep = 1.0 if config.gemma else 1 / math.sqrt(2 * config.layers)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=(0.04 if "embed" in name else 0.03) * (deep if last else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(p)
                if name.endswith("k_proj.bias"):
                    plant_outliers(p.data, config.head_dim)

    def angles(self, length: int, theta: float) -> tuple[Tensor, Tensor]:
        device, d = self.embed_tokens.weight.device, self.config.head_dim
        inverse = theta ** (-torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
        a = torch.arange(length, device=device, dtype=torch.float32)[:, None] * inverse
        return a.cos(), a.sin()

    def forward(self, ids: Tensor) -> Tensor:
        c = self.config
        x = self.embed_tokens(ids) * (math.sqrt(c.hidden) if c.gemma else 1.0)
        tables = {g: self.angles(ids.shape[1], c.theta if g else c.local_theta) for g in (True, False)}
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            for i, layer in enumerate(self.layers):
                x = layer(x, *tables[c.is_global(i)])
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)

    def loss(self, ids: Tensor, targets: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the text and of the answers (`answer` is 1 where a target is part of one)."""
        return split_loss(self(ids), self.embed_tokens.weight, targets, answer)


@torch.compile(disable=not torch.cuda.is_available())
def split_loss(hidden: Tensor, table: Tensor, targets: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, table).float().flatten(0, 1)
    ce = F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
    text = (ce * (1 - answer)).sum() / (1 - answer).sum()
    return text, (ce * answer).sum() / answer.sum().clamp(min=1)


def hf_config(c: Config, bos: int, eos: int) -> dict:
    """`config.json` as Hugging Face and mlx-lm read it."""
    out = {
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.eps,
        "rope_theta": c.theta,
        "max_position_embeddings": c.context,
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "dtype": "float16",
    }
    if c.gemma:
        kinds = ["full_attention" if c.is_global(i) else "sliding_attention" for i in range(c.layers)]
        return out | {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 1,
            "rope_local_base_freq": c.local_theta,
            "sliding_window": c.window,
            "sliding_window_pattern": c.pattern,
            "layer_types": kinds,
            "attention_bias": False,
        }
    kind = "Qwen2" if c.arch == "qwen" else "Llama"
    out |= {"architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower(), "hidden_act": "silu"}
    return out if c.arch == "qwen" else out | {"attention_bias": False, "mlp_bias": False}
