"""The DeepSeek family in numpy and float64: slow, short, and independent of what it checks.

Written from the papers (DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437; YaRN,
arXiv 2309.00071; LongRoPE, arXiv 2402.13753) and from the configs of the published checkpoints.
Weights keep their checkpoint names, `[out, in]`. Letters as in the package: B batch, T queries,
S keys, D model, N heads, P no-position, R rotary, H value, C latent, E experts, A active experts.
"""

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
INNER_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says


def read_safetensors(path):
    """Every tensor of one file in float64, FP8 blocks already multiplied out."""
    data = Path(path).read_bytes()
    (header_size,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + header_size]).items():
        if name == "__metadata__":
            continue
        start, end = (8 + header_size + offset for offset in entry["data_offsets"])
        flat = np.frombuffer(data[start:end], DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"]).astype(np.float64)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scale = np.kron(tensors.pop(name), np.ones((128, 128)))
        weight = tensors[name.removesuffix("_scale_inv")]
        weight *= scale[: weight.shape[0], : weight.shape[1]]
    return tensors


def read_folder(folder):
    """A checkpoint of one file: its weights and its config as a plain dict."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    return read_safetensors(folder / "model.safetensors"), config


def is_moe_layer(config, layer):
    if config["model_type"] in ("youtu", "minicpm3"):
        return False
    if config["model_type"] == "glm4_moe_lite" and config.get("mlp_layer_types"):
        return config["mlp_layer_types"][layer] == "sparse"
    return layer >= config["first_k_dense_replace"]


def rope_fields(config):
    """Old spelling (rope_theta and rope_scaling side by side) and new one (rope_parameters)."""
    fields = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    fields["type"] = fields.get("rope_type") or fields.get("type") or "default"
    fields.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return fields


def yarn_mscale(factor, mscale):
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(config):
    """Angle per position of each of the R/2 pairs, and the factor on cosine and sine."""
    rope, size = rope_fields(config), config["qk_rope_head_dim"]
    theta, pair = rope["rope_theta"], np.arange(size // 2)
    frequency = theta ** (-2.0 * pair / size)
    if rope["type"] == "default":
        return frequency, 1.0
    original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    if rope["type"] == "longrope":
        stretch = rope.get("factor") or config["max_position_embeddings"] / original
        amplitude = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        return frequency / np.array(rope["short_factor"]), amplitude
    if rope["type"] != "yarn":
        raise NotImplementedError(f"rope type {rope['type']!r}")

    def pair_that_turns(rotations):
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_that_turns(rope.get("beta_slow") or 1)), size - 1)
    slow = np.clip((pair - low) / (high - low if high > low else 0.001), 0, 1)
    factor = rope["factor"]
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    amplitude = yarn_mscale(factor, 1.0)
    if mscale and mscale_all_dim:
        amplitude = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return frequency * (1 - slow) + frequency / factor * slow, amplitude


def rotate(config, x, positions):
    """Rotary embedding of `x` [B T ... R]; the pairs come out as halves in either layout."""
    frequency, amplitude = rope_frequencies(config)
    angle = positions[..., None] * frequency
    angle = angle.reshape(angle.shape[:2] + (1,) * (x.ndim - 3) + angle.shape[2:])
    cos, sin = amplitude * np.cos(angle), amplitude * np.sin(angle)
    is_half = config["model_type"] == "minicpm3" or not config.get("rope_interleave", True)
    first, second = np.split(x, 2, -1) if is_half else (x[..., 0::2], x[..., 1::2])
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def keep_best(scores, count):
    """True at the `count` largest of each row."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order, True, -1)
    return mask


def route(config, logits, bias):
    """Active experts of each token in ascending order, [M A], and their weights."""
    active, groups = config["num_experts_per_tok"], config.get("n_group") or 1
    scores = softmax(logits) if bias is None else sigmoid(logits)
    choice = scores if bias is None else scores + bias
    if bias is not None or config["topk_method"] == "group_limited_greedy":
        grouped = choice.reshape(len(choice), groups, -1)
        best = np.sort(grouped, -1)
        group_scores = best[..., -1] if bias is None else best[..., -2:].sum(-1)
        kept = keep_best(group_scores, config.get("topk_group") or 1)
        excluded = 0.0 if bias is None else -np.inf
        choice = np.where(kept[..., None], grouped, excluded).reshape(choice.shape)
    expert_index = np.nonzero(keep_best(choice, active))[1].reshape(-1, active)
    expert_weight = np.take_along_axis(scores, expert_index, -1)
    if bias is not None and config["norm_topk_prob"]:
        expert_weight = expert_weight / (expert_weight.sum(-1, keepdims=True) + 1e-20)
    return expert_index, expert_weight * config["routed_scaling_factor"]


@dataclass
class Model:
    """One checkpoint. `form` is "expanded" or "absorbed": the two ways to attend to latents."""

    weights: dict
    config: dict
    form: str = "expanded"
    cache: dict = field(default_factory=dict)  # layer -> latent and rotary key of the past
    routed: dict = field(default_factory=dict)  # layer -> (expert_index, expert_weight)

    def linear(self, x, name):
        out = x @ self.weights[f"{name}.weight"].T
        return out + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, x, name, eps):
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + eps)
        return x / scale * self.weights[f"{name}.weight"]

    def swiglu(self, x, name):
        gate = self.linear(x, f"{name}.gate_proj")
        up = self.linear(x, f"{name}.up_proj")
        return self.linear(gate * sigmoid(gate) * up, f"{name}.down_proj")

    def attention(self, x, layer, positions, visible):
        """`visible` [B T S] says which keys a query may see, the cached ones first."""
        config, name = self.config, f"model.layers.{layer}.self_attn"
        B, T, _ = x.shape
        N, C, P = (config[k] for k in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim"))
        if config.get("q_lora_rank") is None:
            q = self.linear(x, f"{name}.q_proj")
        else:
            q = self.linear(x, f"{name}.q_a_proj")
            q = self.norm(q, f"{name}.q_a_layernorm", INNER_EPS)
            q = self.linear(q, f"{name}.q_b_proj")
        q = q.reshape(B, T, N, -1)
        q_nope, q_pe = q[..., :P], rotate(config, q[..., P:], positions)

        kv = self.linear(x, f"{name}.kv_a_proj_with_mqa")
        kv_c = self.norm(kv[..., :C], f"{name}.kv_a_layernorm", INNER_EPS)
        k_pe = rotate(config, kv[..., C:], positions)
        if layer in self.cache:
            past_c, past_pe = self.cache[layer]
            kv_c = np.concatenate([past_c, kv_c], 1)
            k_pe = np.concatenate([past_pe, k_pe], 1)
        self.cache[layer] = kv_c, k_pe

        kv_b = self.weights[f"{name}.kv_b_proj.weight"].reshape(N, -1, C)
        w_uk, w_uv = kv_b[:, :P], kv_b[:, P:]
        scores = np.einsum("BTNR,BSR->BNTS", q_pe, k_pe)
        if self.form == "absorbed":
            q_c = np.einsum("BTNP,NPC->BTNC", q_nope, w_uk)
            scores += np.einsum("BTNC,BSC->BNTS", q_c, kv_c)
        else:
            scores += np.einsum("BTNP,BSNP->BNTS", q_nope, np.einsum("BSC,NPC->BSNP", kv_c, w_uk))
        scores = np.where(visible[:, None], scores * self.attention_scale(), -np.inf)
        probability = softmax(scores)
        if self.form == "absorbed":
            out_c = np.einsum("BNTS,BSC->BTNC", probability, kv_c)
            out = np.einsum("BTNC,NHC->BTNH", out_c, w_uv)
        else:
            out = np.einsum("BNTS,BSNH->BTNH", probability, np.einsum("BSC,NHC->BSNH", kv_c, w_uv))
        return self.linear(out.reshape(B, T, -1), f"{name}.o_proj")

    def attention_scale(self):
        rope = rope_fields(self.config)
        scale = (self.config["qk_nope_head_dim"] + self.config["qk_rope_head_dim"]) ** -0.5
        if rope["type"] != "default" and rope.get("mscale_all_dim"):
            scale *= yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
        return scale

    def moe(self, x, layer):
        name = f"model.layers.{layer}.mlp"
        rows = x.reshape(-1, x.shape[-1])
        bias = self.weights.get(f"{name}.gate.e_score_correction_bias")
        logits = rows @ self.weights[f"{name}.gate.weight"].T
        self.routed[layer] = expert_index, expert_weight = route(self.config, logits, bias)
        out = self.swiglu(rows, f"{name}.shared_experts")
        for row, (experts, weights) in enumerate(zip(expert_index, expert_weight, strict=True)):
            for expert, weight in zip(experts, weights, strict=True):
                out[row] += weight * self.swiglu(rows[row], f"{name}.experts.{expert}")
        return out.reshape(x.shape)

    def __call__(self, ids, mask=None):
        """Logits [B T V] and the hidden states: embedding, after each block but the last, final.

        A second call continues from the cache of the first. `mask` [B T] marks padding on the
        left with 0, in a first call only.
        """
        config = self.config
        B, T = ids.shape
        past = self.cache[0][0].shape[1] if self.cache else 0
        mask = np.ones((B, past + T), bool) if mask is None else mask.astype(bool)
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)[:, past:]
        causal = np.arange(past + T) <= past + np.arange(T)[:, None]
        # A padding query sees itself, so that its softmax is defined; its output means nothing.
        visible = causal & mask[:, None] | np.eye(T, past + T, past, dtype=bool)
        embedding, eps = self.weights["model.embed_tokens.weight"], config["rms_norm_eps"]
        depth = config["num_hidden_layers"]
        branch_scale = (config.get("scale_depth") or math.sqrt(depth)) / math.sqrt(depth)
        x = embedding[ids] * config.get("scale_emb", 1)
        hidden_states = [x]
        for layer in range(depth):
            name = f"model.layers.{layer}"
            h = self.norm(x, f"{name}.input_layernorm", eps)
            x = x + branch_scale * self.attention(h, layer, positions, visible)
            h = self.norm(x, f"{name}.post_attention_layernorm", eps)
            h = self.moe(h, layer) if is_moe_layer(config, layer) else self.swiglu(h, f"{name}.mlp")
            x = x + branch_scale * h
            hidden_states.append(x)
        hidden_states[-1] = x = self.norm(x, "model.norm", eps)
        is_tied = config.get("tie_word_embeddings", config["model_type"] in ("youtu", "minicpm3"))
        head = embedding if is_tied else self.weights["lm_head.weight"]
        x = x * (config.get("dim_model_base") or config["hidden_size"]) / config["hidden_size"]
        return x @ head.T, np.stack(hidden_states)


def load(folder, form="expanded"):
    weights, config = read_folder(folder)
    config.setdefault("v_head_dim", config["hidden_size"] // config["num_attention_heads"])
    return Model(weights, config, form)
