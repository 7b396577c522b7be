"""Decoders of Polyhead in PyTorch, for transformers: one class per attention mechanism, and the layers around them.

Made to be read: every mechanism computes all of its heads in plain tensor operations. The numbers are Polyhead's; its faster ways
to them (fused kernels, heads that are skipped where they are not selected) are not here.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput

from .configuration_polyhead import PolyheadConfig

# The name of the cache among inputs and outputs: transformers changed it in the course of version 5.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class PolyheadCache(Cache):
    """What each layer keeps of earlier tokens: a tuple of tensors that begin with the batch, whatever the mechanism."""

    def __init__(self, n_layers):
        super().__init__(layers=[])
        self.states = [None] * n_layers
        self.length = 0

    def __len__(self):
        return len(self.states)

    def get_seq_length(self, layer_idx=0):
        return self.length

    def get_max_length(self, layer_idx=None):
        return -1

    get_max_cache_shape = get_max_length

    @property
    def is_initialized(self):
        return self.length > 0

    def reset(self):
        self.states, self.length = [None] * len(self.states), 0

    def each(self, change):
        self.states = [state and tuple(change(tensor) for tensor in state) for state in self.states]

    def reorder_cache(self, beam_idx):
        self.each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self.each(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def crop(self, max_length):
        raise NotImplementedError("windows and recurrent states have dropped what earlier tokens need")


class Call:
    """What the layers share in one call of the model: positions, padding, and the cache."""

    def __init__(self, config, position_ids, attention_mask, cache):
        self.config, self.positions, self.cache = config, position_ids, cache
        self.past = 0 if cache is None else cache.get_seq_length()
        seq = position_ids.shape[-1]
        if attention_mask is not None and attention_mask.shape[1:] != (self.past + seq,):
            raise ValueError(
                f"attention_mask has the shape {list(attention_mask.shape)}: it must be [batch, {self.past + seq}], 1 for "
                "tokens and 0 for padding, those in the cache included"
            )
        self.real = None if attention_mask is None else attention_mask.bool()
        self.tables, self.masks = {}, {}

    def rotate(self, x):
        """Rotary positions: pairs of channels turn with the position. [batch, heads, seq, head_dim]"""
        if not self.config.rope:
            return x
        width = int(x.shape[-1] * self.config.partial_rotary_factor)
        if width not in self.tables:
            self.tables[width] = rotary_tables(self.config, self.positions, width)
        cos, sin = (table.to(x.device) for table in self.tables[width])
        turning, still = x[..., :width].float(), x[..., width:]
        if self.config.rope_layout == "interleaved":
            a, b = turning[..., 0::2], turning[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = turning.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((turned.to(x.dtype), still), -1)

    def extend(self, layer, keys, values, window=None):
        """Keys and values behind those in the cache, [batch, heads, tokens, width], and the mask of who sees what."""
        seq = keys.shape[2]
        if self.cache is not None:
            if self.cache.states[layer] is not None:
                keys, values = (torch.cat(pair, 2) for pair in zip(self.cache.states[layer], (keys, values)))
            # Of a window, the next token sees all but the oldest.
            first = 0 if window is None else max(keys.shape[2] - window + 1, 0)
            self.cache.states[layer] = (keys[:, :, first:], values[:, :, first:])
        return keys, values, self.mask(keys, seq, window)

    def mask(self, keys, seq, window):
        """[batch or 1, 1, queries, keys]: true where a query sees a key."""
        count, device = keys.shape[2], keys.device
        if (count, window) not in self.masks:
            query = torch.arange(count - seq, count, device=device)[:, None]
            key = torch.arange(count, device=device)
            visible = torch.ones_like(key <= query) if self.config.masked_diffusion else key <= query
            if window is not None:
                visible = visible & ((key - query).abs() < window)
            visible = visible[None, None]
            if self.real is not None:
                # Padding sees itself, so that no softmax is over nothing.
                visible = visible & self.real[:, None, None, -count:].to(device) | (key == query)
            self.masks[count, window] = visible
        return self.masks[count, window].to(device)


def rotary_tables(config, positions, width):
    """Cosines and sines, [batch or 1, 1, seq, width / 2]: pair i turns by theta^(-2i / width) a position."""
    frequencies = [config.rope_theta ** (-2 * i / width) for i in range(width // 2)]
    scaling = config.rope_parameters or {}
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        frequencies = [frequency / scaling["factor"] for frequency in frequencies]
    elif kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]

        def stretched(frequency):  # rotations within the original context decide: slow pairs are stretched, fast ones kept
            rotations = scaling["original_max_position_embeddings"] * frequency / math.tau
            kept = min(max((rotations - low) / (high - low), 0.0), 1.0)
            return (1 - kept) * frequency / scaling["factor"] + kept * frequency

        frequencies = [stretched(frequency) for frequency in frequencies]
    elif kind != "default":
        raise ValueError(f"rope_type {kind!r}: linear and llama3 are supported")
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    angles = positions[:, None, :, None].to(dtype) * torch.tensor(frequencies, dtype=dtype, device=positions.device)
    return angles.cos().float(), angles.sin().float()


def attend(q, k, v, mask, scale=None, softcap=None, sinks=None):
    """softmax(q kᵀ · scale) v, [batch, heads, seq, width]: query heads share the key and value heads in equal groups."""
    k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], 1) for heads in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q @ k.mT).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:  # one more logit per head, which takes part in the softmax and has no value
        sinks = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return weights.to(v.dtype) @ v


def split(x, n_heads):
    """[batch, seq, n_heads * width] to [batch, n_heads, seq, width]"""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def join(x):
    """[batch, n_heads, seq, width] to [batch, seq, n_heads * width]"""
    return x.transpose(1, 2).flatten(2)


def of_layer(setting, layer):
    """A setting that is one number for all layers, or a list with one per layer."""
    return setting[layer] if isinstance(setting, list) else setting


def window_of(window, layer):
    """The keys that a query of a layer sees, itself included; none for all (0 in a list)."""
    return (of_layer(window, layer) if window is not None else None) or None


class RmsNorm(nn.Module):
    def __init__(self, width, eps, init=1.0):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((width,), float(init))), eps

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Map(nn.Module):
    """A linear map that computes in f32 and whose weight is [inputs, outputs], as routers have it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.02)

    def forward(self, x):
        return x.float() @ self.weight.float()


class Softmax(nn.Module):
    """Multi-head, grouped-query or multi-query attention; with a window, a cap of the scores, norms of queries and keys."""

    def __init__(
        self, config, layer, n_heads, n_kv_heads=None, head_dim=None, qkv_bias=False, o_bias=False, qk_norm=False,
        window=None, softcap=None, scale=None,
    ):  # fmt: skip
        super().__init__()
        self.layer, self.n_heads, self.n_kv_heads = layer, n_heads, n_kv_heads or n_heads
        self.head_dim = head_dim or config.hidden_size // n_heads
        self.window, self.softcap, self.scale = window_of(window, layer), softcap, scale
        self.q_proj = nn.Linear(config.hidden_size, n_heads * self.head_dim, qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, self.n_kv_heads * self.head_dim, qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, self.n_kv_heads * self.head_dim, qkv_bias)
        self.o_proj = nn.Linear(n_heads * self.head_dim, config.hidden_size, o_bias)
        self.q_norm = RmsNorm(self.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RmsNorm(self.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()

    def mix(self, q, k, v, call, sinks=None):
        """From projections to what goes into the output projection, [batch, seq, n_heads * head_dim]."""
        q = call.rotate(self.q_norm(split(q, self.n_heads)))
        k = call.rotate(self.k_norm(split(k, self.n_kv_heads)))
        k, v, mask = call.extend(self.layer, k, split(v, self.n_kv_heads), self.window)
        return join(attend(q, k, v, mask, self.scale, self.softcap, sinks))

    def forward(self, x, call, sinks=None):
        return self.o_proj(self.mix(self.q_proj(x), self.k_proj(x), self.v_proj(x), call, sinks))


class Sink(nn.Module):
    """Softmax attention in which every query head has a logit to attend to nothing, as in GPT-OSS (arXiv 2508.10925)."""

    def __init__(self, config, layer, n_heads, sink_init=0.0, **softmax):
        super().__init__()
        self.softmax = Softmax(config, layer, n_heads, **softmax)
        self.sinks = nn.Parameter(torch.full((n_heads,), float(sink_init)))

    def forward(self, x, call):
        return self.softmax(x, call, self.sinks)


class GatedAttention(nn.Module):
    """Softmax attention with a sigmoid gate, computed from the layer's input, at one of five places (arXiv 2505.06708)."""

    def __init__(self, config, layer, n_heads, gated="heads", granularity="elementwise", qkv_bias=False, **softmax):
        super().__init__()
        self.softmax = Softmax(config, layer, n_heads, qkv_bias=qkv_bias, **softmax)
        self.gated = gated
        per_head = self.softmax.head_dim
        self.n_gates, width = {
            "heads": (n_heads, per_head),
            "queries": (n_heads, per_head),
            "keys": (self.softmax.n_kv_heads, per_head),
            "values": (self.softmax.n_kv_heads, per_head),
            "output": (1, config.hidden_size),
        }[gated]
        width = 1 if granularity == "headwise" else width
        self.g_proj = nn.Linear(config.hidden_size, self.n_gates * width, qkv_bias)

    def forward(self, x, call):
        gate = torch.sigmoid(self.g_proj(x)).unflatten(-1, (self.n_gates, -1))  # [batch, seq, heads, head_dim or 1]

        def gated(place, y):
            return (y.unflatten(-1, (self.n_gates, -1)) * gate).flatten(2) if place == self.gated else y

        softmax = self.softmax
        q = gated("queries", softmax.q_proj(x))
        k = gated("keys", softmax.k_proj(x))
        v = gated("values", softmax.v_proj(x))
        heads = gated("heads", softmax.mix(q, k, v, call))
        return gated("output", softmax.o_proj(heads))


class GroupedDifferential(nn.Module):
    """Grouped Differential Attention (arXiv 2510.06949): what a noise head reads is subtracted from its group's signal heads.

    With one signal head per noise head it is the Differential Transformer (arXiv 2410.05258).
    """

    def __init__(
        self, config, layer, n_heads, n_noise_heads, n_kv_heads=None, head_dim=None, lambda_init="paper", subln=True,
        subln_init=0.1, window=None,
    ):  # fmt: skip
        super().__init__()
        self.layer, self.n_heads, self.n_noise = layer, n_heads, n_noise_heads
        self.n_pairs = (n_kv_heads or 2 * n_noise_heads) // 2  # a pair of key heads shares one value of twice the width
        self.window = window_of(window, layer)
        width = head_dim or config.hidden_size // n_heads
        if isinstance(lambda_init, dict):
            [(kind, numbers)] = lambda_init.items()
            self.lambda_init = numbers if kind == "constant" else numbers[layer]
        else:
            self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * {"paper": layer, "motif": layer - 1}[lambda_init])
        self.q_proj = nn.Linear(config.hidden_size, n_heads * width, False)
        self.k_proj = nn.Linear(config.hidden_size, 2 * self.n_pairs * width, False)
        self.v_proj = nn.Linear(config.hidden_size, 2 * self.n_pairs * width, False)
        self.o_proj = nn.Linear((n_heads - n_noise_heads) * 2 * width, config.hidden_size, False)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(self, name, nn.Parameter(torch.randn(width) * 0.1))
        self.subln = RmsNorm(2 * width, 1e-5, subln_init) if subln else None

    def forward(self, x, call):
        q = call.rotate(split(self.q_proj(x), self.n_heads))
        k = call.rotate(split(self.k_proj(x), 2 * self.n_pairs))
        v = split(self.v_proj(x), self.n_pairs)
        k, v, mask = call.extend(self.layer, k, v, self.window)
        # Query heads are striped: the signal heads of a group, then its noise head. Even keys are for signals, odd for noises.
        stripe, groups_of_pair = self.n_heads // self.n_noise, self.n_noise // self.n_pairs
        pair = [head // stripe // groups_of_pair for head in range(self.n_heads)]
        key = [2 * pair[head] + (head % stripe == stripe - 1) for head in range(self.n_heads)]
        heads = attend(q, k[:, key], v[:, pair], mask).unflatten(1, (self.n_noise, stripe))
        signal, noise = heads[:, :, :-1], heads[:, :, -1:]
        first = (self.lambda_q1.float() * self.lambda_k1.float()).sum().exp()
        second = (self.lambda_q2.float() * self.lambda_k2.float()).sum().exp()
        difference = (signal - (first - second + self.lambda_init) * noise).to(x.dtype).flatten(1, 2)
        if self.subln is not None:
            difference = self.subln(difference) * (1 - self.lambda_init)
        return self.o_proj(join(difference))


class DiffV2(nn.Module):
    """Differential Transformer V2: the second of two neighbouring heads is subtracted, by a λ that each position computes."""

    def __init__(self, config, layer, n_heads, n_kv_heads=None, head_dim=None, window=None):
        super().__init__()
        self.layer, self.n_heads, self.n_kv_heads = layer, n_heads, n_kv_heads or n_heads
        self.window = window_of(window, layer)
        width = head_dim or config.hidden_size // n_heads
        self.q_proj = nn.Linear(config.hidden_size, 2 * n_heads * width, False)
        self.k_proj = nn.Linear(config.hidden_size, self.n_kv_heads * width, False)
        self.v_proj = nn.Linear(config.hidden_size, self.n_kv_heads * width, False)
        self.lambda_proj = nn.Linear(config.hidden_size, n_heads, False)
        self.o_proj = nn.Linear(n_heads * width, config.hidden_size, False)

    def forward(self, x, call):
        q = call.rotate(split(self.q_proj(x), 2 * self.n_heads))
        k = call.rotate(split(self.k_proj(x), self.n_kv_heads))
        k, v, mask = call.extend(self.layer, k, split(self.v_proj(x), self.n_kv_heads), self.window)
        heads = attend(q, k, v, mask)
        weight = torch.sigmoid(self.lambda_proj(x)).transpose(1, 2)[..., None]  # λ: [batch, n_heads, seq, 1]
        return self.o_proj(join(heads[:, 0::2] - weight * heads[:, 1::2]))


class MixtureOfHead(nn.Module):
    """Mixture-of-Head attention (arXiv 2410.11842): the first heads take part always, of the others a router selects top_k.

    The load-balance penalty of training is not part of the loss here.
    """

    def __init__(
        self, config, layer, n_heads, shared_heads, top_k, n_kv_heads=None, head_dim=None, qkv_bias=False, o_bias=False,
        qk_norm=False, router=None, penalty_norm="code", window=None,
    ):  # fmt: skip
        super().__init__()
        self.layer, self.n_heads, self.n_kv_heads = layer, n_heads, n_kv_heads or n_heads
        self.shared, self.top_k = of_layer(shared_heads, layer), of_layer(top_k, layer)
        self.window = window_of(window, layer)
        width = head_dim or config.hidden_size // n_heads
        self.q_proj = nn.Linear(config.hidden_size, n_heads * width, qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, self.n_kv_heads * width, qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, self.n_kv_heads * width, qkv_bias)
        self.o_proj = nn.Linear(n_heads * width, config.hidden_size, o_bias)
        self.q_norm = RmsNorm(width, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RmsNorm(width, config.rms_norm_eps) if qk_norm else nn.Identity()
        [(kind, settings)] = (router or {"learned": {}}).items()
        split_of_heads = (self.shared, n_heads - self.shared, self.top_k)
        if kind == "learned":
            self.router = LearnedRouter(config.hidden_size, *split_of_heads, **settings)
        else:
            self.router = QueryNormRouter(*split_of_heads, **settings)

    def forward(self, x, call):
        q = split(self.q_proj(x), self.n_heads)
        gates = self.router(x, q).to(x.dtype)  # [batch, seq, n_heads]: 0 for heads that are not selected
        k = call.rotate(self.k_norm(split(self.k_proj(x), self.n_kv_heads)))
        k, v, mask = call.extend(self.layer, k, split(self.v_proj(x), self.n_kv_heads), self.window)
        heads = attend(call.rotate(self.q_norm(q)), k, v, mask)
        return self.o_proj(join(heads * gates.transpose(1, 2)[..., None]))


def selected(probabilities, top_k):
    """1 for the top_k most probable heads of each position, else 0; of equals, the first."""
    chosen = probabilities.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)


class LearnedRouter(nn.Module):
    """Gates from linear maps of the layer's input, in two stages: among heads of a kind, and between the two kinds."""

    def __init__(self, d_model, shared, routed, top_k, gate_norm="code", two_stage=True):
        super().__init__()
        self.n_shared, self.n_routed, self.top_k, self.code = shared, routed, top_k, gate_norm == "code"
        self.routed = Map(d_model, routed) if routed > 0 else None
        self.kinds = Map(d_model, 2) if two_stage and routed > 0 and shared > 0 else None
        self.shared = Map(d_model, shared) if shared > 1 else None

    def forward(self, x, q):
        ones = x.new_ones(*x.shape[:2], 1, dtype=torch.float32)
        kinds = self.kinds(x).softmax(-1) * (2 if self.code else 1) if self.kinds else ones.expand(-1, -1, 2)
        gates = []
        if self.n_shared > 0:
            among = self.shared(x).softmax(-1) * (self.n_shared if self.code else 1) if self.shared else ones
            gates.append(among * kinds[..., :1])
        if self.routed:
            among = self.routed(x).softmax(-1)
            among = among * selected(among, self.top_k)
            if self.code:
                among = among / among.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps) * self.top_k
            gates.append(among * kinds[..., 1:])
        return torch.cat(gates, -1)


class QueryNormRouter(nn.Module):
    """Gates of 1 or 0 by the norms of the queries, without parameters."""

    def __init__(self, shared, routed, top_k, straight_through="chosen"):
        super().__init__()
        self.shared, self.routed, self.top_k, self.straight_through = shared, routed, top_k, straight_through

    def forward(self, x, q):
        ones = x.new_ones(*x.shape[:2], self.shared, dtype=torch.float32)
        if self.routed == 0:
            return ones
        norms = q[:, self.shared :].float().norm(dim=-1).transpose(1, 2)  # [batch, seq, routed]
        probabilities = (norms / norms.std(-1, keepdim=True).clamp_min(1e-12)).softmax(-1)
        gates = selected(probabilities, self.top_k)
        through = probabilities - probabilities.detach()  # zero, with the gradient of the probabilities
        gates = gates + {"nobody": 0.0, "chosen": gates, "all": 1.0}[self.straight_through] * through
        return torch.cat((ones, gates), -1)


class DecoupledHead(nn.Module):
    """Decoupled-Head Attention (arXiv 2406.06567): query heads share key heads and value heads by two maps of their own."""

    def __init__(
        self, config, layer, n_heads, key_map, value_map, head_dim=None, qkv_bias=False, o_bias=False, qk_norm=False,
        window=None, fusing=False, n_kv_heads=None,
    ):  # fmt: skip
        super().__init__()
        self.layer, self.n_heads, self.fusing = layer, n_heads, fusing
        self.window, self.key_map, self.value_map = window_of(window, layer), key_map, value_map
        shared = n_kv_heads or n_heads  # the heads before fusion
        self.n_keys, self.n_values = (shared, shared) if fusing else (max(key_map) + 1, max(value_map) + 1)
        width = head_dim or config.hidden_size // n_heads
        self.q_proj = nn.Linear(config.hidden_size, n_heads * width, qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, self.n_keys * width, qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, self.n_values * width, qkv_bias)
        self.o_proj = nn.Linear(n_heads * width, config.hidden_size, o_bias)
        self.q_norm = RmsNorm(width, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RmsNorm(width, config.rms_norm_eps) if qk_norm else nn.Identity()
        if fusing:
            self.fusion = Fusion(key_map[:: n_heads // shared], value_map[:: n_heads // shared])

    def forward(self, x, call):
        q = call.rotate(self.q_norm(split(self.q_proj(x), self.n_heads)))
        k, v = split(self.k_proj(x), self.n_keys), split(self.v_proj(x), self.n_values)
        if self.fusing:  # the heads of the parent are all there still, each mixed with those of its group
            k, v = self.fusion(k, v)
        k = call.rotate(self.k_norm(k))
        k, v, mask = call.extend(self.layer, k, v, self.window)  # the cache keeps the heads that there are
        if not self.fusing:
            k, v = k[:, self.key_map], v[:, self.value_map]
        return self.o_proj(join(attend(q, k, v, mask)))


class Fusion(nn.Module):
    """The operators that mix the heads of a group while they are fused; `anneal` pulls them to the group's average."""

    def __init__(self, key_map, value_map):
        super().__init__()
        self.maps = (key_map, value_map)
        for name in ("key_operator", "value_operator"):
            setattr(self, name, nn.Parameter(torch.eye(len(key_map)).flatten()))
        self.register_buffer("anneal", torch.zeros(1))  # set while they are trained, not learned
        self.register_buffer("energy", torch.ones(2))

    def forward(self, *heads):
        mixed = []
        for head, operator, groups in zip(heads, (self.key_operator, self.value_operator), self.maps):
            groups = torch.tensor(groups, device=head.device)
            same = (groups[:, None] == groups).to(operator.dtype)
            operator = operator.view_as(same) * same
            averaged = same / same.sum(-1, keepdim=True) @ operator
            operator = operator + (averaged - operator) * self.anneal
            mixed.append(torch.einsum("ij,bjsw->bisw", operator.to(head.dtype), head))
        return mixed


class KeyDriven(nn.Module):
    """Key-driven grouped-query attention (arXiv 2408.08454): groups of query heads of unequal sizes, frozen in a decoder."""

    def __init__(
        self, config, layer, n_heads, n_kv_heads, allocation, head_dim=None, qkv_bias=False, o_bias=False, perturb=False
    ):
        super().__init__()
        self.layer, self.n_heads, self.n_kv_heads = layer, n_heads, n_kv_heads
        [(kind, settings)] = allocation.items()
        if perturb or kind not in ("even", "fixed"):
            raise ValueError(f"key_driven: allocation {kind!r} reads later positions, which a decoder must not")
        sizes = settings["query_heads"] if kind == "fixed" else [n_heads // n_kv_heads] * n_kv_heads
        self.map = [head for head, size in enumerate(sizes) for _ in range(size)]  # the key head of each query head
        width = head_dim or config.hidden_size // n_heads
        self.q_proj = nn.Linear(config.hidden_size, n_heads * width, qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, n_kv_heads * width, qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, n_kv_heads * width, qkv_bias)
        self.o_proj = nn.Linear(n_heads * width, config.hidden_size, o_bias)

    def forward(self, x, call):
        q = call.rotate(split(self.q_proj(x), self.n_heads))
        k = call.rotate(split(self.k_proj(x), self.n_kv_heads))
        k, v, mask = call.extend(self.layer, k, split(self.v_proj(x), self.n_kv_heads))
        return self.o_proj(join(attend(q, k[:, self.map], v[:, self.map], mask)))


class Mla(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache keeps one latent per token for all heads.

    Keys and values are projections of the latent c; rotary positions are on extra channels, whose key all heads share.
    """

    def __init__(
        self, config, layer, n_heads, kv_lora_rank, q_lora_rank=None, qk_nope_head_dim=None, qk_rope_head_dim=None,
        v_head_dim=None, attention_bias=False,
    ):  # fmt: skip
        super().__init__()
        self.layer, self.n_heads, self.latent = layer, n_heads, kv_lora_rank
        self.nope = qk_nope_head_dim or config.hidden_size // n_heads
        half = -(-self.nope // 2)
        self.rope = qk_rope_head_dim or half + half % 2
        self.value = v_head_dim or self.nope
        d_model = config.hidden_size
        if q_lora_rank is not None:
            self.q_a_proj, self.q_a_norm = nn.Linear(d_model, q_lora_rank, attention_bias), RmsNorm(q_lora_rank, 1e-6)
        self.q_proj = nn.Linear(q_lora_rank or d_model, n_heads * (self.nope + self.rope), False)
        self.kv_a_proj = nn.Linear(d_model, kv_lora_rank + self.rope, attention_bias)
        self.kv_a_norm = RmsNorm(kv_lora_rank, 1e-6)
        self.kv_b_proj = nn.Linear(kv_lora_rank, n_heads * (self.nope + self.value), False)
        self.o_proj = nn.Linear(n_heads * self.value, d_model, attention_bias)

    def forward(self, x, call):
        q = self.q_proj(self.q_a_norm(self.q_a_proj(x)) if hasattr(self, "q_a_proj") else x)
        q, q_rope = split(q, self.n_heads).split((self.nope, self.rope), -1)
        q_rope = call.rotate(q_rope)
        c, k_rope = self.kv_a_proj(x)[:, None].split((self.latent, self.rope), -1)  # [batch, 1, seq, ..]
        c, k_rope, mask = call.extend(self.layer, self.kv_a_norm(c), call.rotate(k_rope))
        scale = (self.nope + self.rope) ** -0.5
        if call.past == 0:  # keys and values of every head
            k, v = split(self.kv_b_proj(c[:, 0]), self.n_heads).split((self.nope, self.value), -1)
            k = torch.cat((k, k_rope.expand(-1, self.n_heads, -1, -1)), -1)
            heads = attend(torch.cat((q, q_rope), -1), k, v, mask, scale)
        else:  # the same numbers: queries are compared with the latents themselves, and values made of what they read
            weight = self.kv_b_proj.weight.unflatten(0, (self.n_heads, -1))  # [n_heads, nope + value, latent]
            to_key, to_value = weight.split((self.nope, self.value), 1)
            q = torch.cat((q @ to_key, q_rope), -1)
            heads = attend(q, torch.cat((c, k_rope), -1), c, mask, scale) @ to_value.mT
        return self.o_proj(join(heads))


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet (arXiv 2412.06464) in Qwen3-Next's form: a recurrent state per head, decayed and corrected by each token.

    S = e^g S + k ⊗ β (v - (e^g S)ᵀ k), read by o = Sᵀ q. The cache has the same size after ten tokens and ten thousand.
    """

    def __init__(
        self, config, layer, n_heads, n_key_heads=None, head_k_dim=None, head_v_dim=None, conv_kernel=4
    ):
        super().__init__()
        self.layer, self.n_heads, self.kernel = layer, n_heads, conv_kernel
        self.key_heads = n_key_heads or n_heads
        self.share = n_heads // self.key_heads  # value heads of a key head
        self.k_dim = head_k_dim or config.hidden_size // n_heads
        self.v_dim = head_v_dim or self.k_dim
        self.channels = (self.key_heads * self.k_dim, self.key_heads * self.k_dim, n_heads * self.v_dim)
        mixed = sum(self.channels)
        self.qkvz_proj = nn.Linear(config.hidden_size, mixed + n_heads * self.v_dim, False)
        self.ba_proj = nn.Linear(config.hidden_size, 2 * n_heads, False)
        self.conv = nn.Conv1d(mixed, mixed, conv_kernel, groups=mixed, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(n_heads))
        self.a_log = nn.Parameter(torch.empty(n_heads).uniform_(1e-3, 16.0).log())
        self.norm = RmsNorm(self.v_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(n_heads * self.v_dim, config.hidden_size, False)

    def forward(self, x, call):
        batch, seq, _ = x.shape
        qkvz = self.qkvz_proj(x).float().unflatten(-1, (self.key_heads, -1))
        sizes = (self.k_dim, self.k_dim, self.share * self.v_dim, self.share * self.v_dim)
        *qkv, z = qkvz.split(sizes, -1)
        qkv = torch.cat([part.flatten(2) for part in qkv], -1).mT  # [batch, channels, seq]
        if call.real is not None:  # padding leaves no trace in convolution and state
            qkv = qkv * call.real[:, None, -seq:].to(x.device)
        b, a = self.ba_proj(x).float().unflatten(-1, (self.key_heads, -1)).split(self.share, -1)
        beta = torch.sigmoid(b.flatten(2))  # [batch, seq, n_heads]
        decay = (-self.a_log.float().exp() * F.softplus(a.flatten(2) + self.dt_bias.float())).exp()

        state = call.cache.states[self.layer] if call.cache is not None else None
        if state is None:
            zeros = qkv.new_zeros
            state = (zeros(batch, self.n_heads, self.k_dim, self.v_dim), zeros(batch, qkv.shape[1], self.kernel - 1))
        state, past = state
        qkv = torch.cat((past, qkv), -1)
        past = qkv[..., seq:]
        qkv = F.silu(F.conv1d(qkv, self.conv.weight.float(), groups=qkv.shape[1])).mT
        q, k, v = qkv.split(self.channels, -1)

        def unit(heads):  # of length 1, each for all value heads that it serves
            heads = heads.unflatten(-1, (self.key_heads, -1))
            heads = heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + 1e-6)
            return heads.repeat_interleave(self.share, 2)

        q, k, v = unit(q) * self.k_dim**-0.5, unit(k), v.unflatten(-1, (self.n_heads, -1))
        read = []
        for t in range(seq):
            state = state * decay[:, t, :, None, None]
            correction = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
            state = state + k[:, t, :, :, None] * correction[:, :, None]
            read.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        if call.cache is not None:
            call.cache.states[self.layer] = (state, past)
        read = self.norm(torch.stack(read, 1)) * F.silu(z.reshape(batch, seq, self.n_heads, self.v_dim))
        return self.o_proj(read.flatten(2).to(x.dtype))


MECHANISMS = {
    "softmax": Softmax,
    "grouped_differential": GroupedDifferential,
    "mixture_of_head": MixtureOfHead,
    "decoupled_head": DecoupledHead,
    "key_driven": KeyDriven,
    "diff_v2": DiffV2,
    "gated_attention": GatedAttention,
    "sink": Sink,
    "mla": Mla,
    "gated_delta_net": GatedDeltaNet,
}


class GaussianGates(nn.Module):
    """Gaussian adaptive gates (arXiv 2401.11143) along the channels: what is near the shifted mean of its chunk passes."""

    def __init__(self, d_model, gates, residual=False):
        super().__init__()
        self.residual = residual
        self.gates = nn.ModuleList(GaussianGate(*item) for gate in gates for item in gate.items())

    def forward(self, x):
        for gate in self.gates:
            x = x + gate(x) if self.residual else gate(x)
        return x


class GaussianGate(nn.Module):
    """One gate, a product or a mixture of Gaussians per head; a head is a chunk of the channels, the last takes the rest."""

    def __init__(self, kind, settings):
        super().__init__()
        if kind not in ("product", "mixture"):
            raise ValueError(f"attention_gate: {kind!r} runs along the tokens, which a decoder must not")
        shape = (settings["n_heads"], settings.get("n_gaussians", 1))
        self.eps, self.padding = settings.get("eps", 1e-8), settings.get("compat_padding_value")
        self.mean_offset, self.c = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(shape))
        self.weights = nn.Parameter(torch.ones(shape)) if kind == "mixture" else None

    def forward(self, x):
        wide, n_heads = x.float(), self.c.shape[0]
        chunk = x.shape[-1] // n_heads
        sizes = [chunk] * (n_heads - 1) + [x.shape[-1] - (n_heads - 1) * chunk]
        gated = torch.cat([self.gated(head, part) for head, part in enumerate(wide.split(sizes, -1))], -1)
        return gated.to(x.dtype)

    def gated(self, head, x):
        counted = x if self.padding is None else x.masked_fill(x == self.padding, 0.0)
        variance, mean = torch.var_mean(counted, -1, keepdim=True)
        offset, c2 = self.mean_offset[head].float(), self.c[head].float().square()
        squares = (x[..., None] - mean[..., None] - offset).square() / (variance[..., None] + self.eps)
        if self.weights is None:
            log_weights = -0.5 * (squares / c2 + (2 * math.pi * c2).log()).sum(-1)
        else:
            log_weights = (self.weights[head].float().log_softmax(-1) - squares / (2 * c2)).logsumexp(-1)
        total = log_weights.logsumexp(-1, keepdim=True).clamp_min(math.log(self.eps))
        gated = x * (log_weights - total).exp()
        return gated if self.padding is None else torch.where(x == self.padding, x, gated)


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        gelu = config.mlp == "gelu"
        d_model, d_ff = config.hidden_size, config.intermediate_size or -(-8 * config.hidden_size // 3 // 16) * 16
        self.gate_proj = None if gelu else nn.Linear(d_model, d_ff, False)
        self.up_proj = nn.Linear(d_model, d_ff, gelu)
        self.down_proj = nn.Linear(d_ff, d_model, gelu)

    def forward(self, x):
        up = self.up_proj(x)
        return self.down_proj(F.gelu(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up)


def norm(config):
    layer = config.norm == "layer"
    return (nn.LayerNorm if layer else RmsNorm)(config.hidden_size, eps=config.rms_norm_eps)


class PolyheadLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer):
        super().__init__()
        name, settings = config.mechanism(layer)
        self.self_attn = MECHANISMS[name](config, layer, **settings)
        self.attention_gate = GaussianGates(config.hidden_size, **config.attention_gate) if config.attention_gate else None
        self.mlp = nn.Identity() if config.mlp == "identity" else Mlp(config)
        self.input_layernorm, self.post_attention_layernorm = norm(config), norm(config)
        self.parallel_residual = config.parallel_residual

    def forward(self, x, call):
        written = self.self_attn(self.input_layernorm(x), call)
        if self.attention_gate is not None:
            written = self.attention_gate(written)
        mixed = x + written
        return mixed + self.mlp(self.post_attention_layernorm(x if self.parallel_residual else mixed))


class PolyheadPreTrainedModel(PreTrainedModel):
    config_class = PolyheadConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PolyheadLayer"]
    _supports_sdpa = True
    # The cache is made by the model: what windows and recurrent states dropped cannot be rolled back.
    _is_stateful = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class PolyheadModel(PolyheadPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.learned_positions
        self.embed_positions = None if learned is None else nn.Embedding(learned, config.hidden_size)
        self.layers = nn.ModuleList(PolyheadLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, cache=None,
        inputs_embeds=None, use_cache=None, output_hidden_states=None, output_attentions=None, **kwargs,
    ):  # fmt: skip
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions: maps of attention are not kept here; `polyhead inspect` shows them")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.config.masked_diffusion or self.gradient_checkpointing and self.training:
            use_cache = False
        if not use_cache:
            cache = None if cache is None or cache.get_seq_length() == 0 else cache
        elif not isinstance(cache, PolyheadCache):
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(f"{type(cache).__name__} was filled by another model: leave the cache out")
            cache = PolyheadCache(len(self.layers))
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
            if attention_mask is not None:  # counted from the first token behind the padding
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:].to(x.device)
        if self.embed_positions is not None:
            if position_ids.max() >= self.config.learned_positions:
                raise ValueError(f"the model has learned {self.config.learned_positions} positions: give it no longer texts")
            x = x + self.embed_positions(position_ids)
        call = Call(self.config, position_ids, attention_mask, cache)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = ()
        for layer in self.layers:
            hidden_states += (x,) if keep else ()
            x = layer(x, call)
        x = self.norm(x)
        if cache is not None:
            cache.length += x.shape[1]
        hidden_states = hidden_states + (x,) if keep else None
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden_states, **{CACHE: cache})


class PolyheadWithHead(PolyheadPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = PolyheadModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()


class PolyheadForMaskedLM(PolyheadWithHead):
    """A masked diffusion language model in the form of LLaDA (arXiv 2502.09992): masked tokens are predicted from both sides."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None,
        output_hidden_states=None, output_attentions=None, return_dict=None, **kwargs,
    ):  # fmt: skip
        """Logits of every token; with labels (-100 where nothing is masked), their mean cross-entropy.

        LLaDA's loss divides each row's sum by its share of masked tokens, which who masks them knows.
        """
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.float().flatten(0, 1), labels.flatten().to(logits.device))
        outputs = MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
        return outputs.to_tuple() if return_dict is False else outputs

    @torch.no_grad()
    def diffuse(self, input_ids, max_new_tokens, steps=None, block_length=None, temperature=0.0):
        """Prompts of one length, [batch, seq], with new tokens behind them: a block of masks after another, of which each step
        fills in those that the model is surest of. By default a step for each token, and one block."""
        mask, block = self.config.mask_token_id, min(block_length or max_new_tokens, max_new_tokens)
        blocks = -(-max_new_tokens // block)
        steps = min(max(steps or max_new_tokens, blocks), max_new_tokens)
        text = F.pad(input_ids, (0, max_new_tokens), value=mask)
        for at in range(blocks):
            part = text[:, input_ids.shape[1] + at * block :][:, :block]
            own = steps // blocks + (at < steps % blocks)
            for step in range(own):
                masked = part == mask
                left = int(masked[0].sum())
                if left == 0:
                    break
                logits = self(text).logits[:, input_ids.shape[1] + at * block :][:, :block, :mask].double()
                noise = (-torch.rand_like(logits).log()).log() * temperature if temperature > 0 else 0.0
                tokens = (logits - noise).argmax(-1)
                sure = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0].masked_fill(~masked, -1.0)
                chosen = sure.topk(-(-left // (own - step))).indices
                part.scatter_(1, chosen, tokens.gather(1, chosen))
        return text


class PolyheadForCausalLM(PolyheadWithHead, GenerationMixin):
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, cache=None,
        inputs_embeds=None, labels=None, use_cache=None, output_hidden_states=None, output_attentions=None,
        logits_to_keep=0, return_dict=None, **kwargs,
    ):  # fmt: skip
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, cache=cache, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        outputs = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
        )
        return outputs.to_tuple() if return_dict is False else outputs
