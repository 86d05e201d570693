"""Write tiny random checkpoints and what the torch reference computes with them.

    python make_golden.py [name ...]         # default: every set in SETS

Needs torch, transformers and safetensors; the tests need none of them. Each set is written as
`config.json` (spelled as the model it imitates is published), `model.safetensors` and
`golden.npz`; README.md says what is inside and which versions were used.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
PROMPT, NEW = 24, 12
ROUTER_MARGIN, ARGMAX_MARGIN = 5e-4, 4e-3  # far above float32 rounding, about 1e-6 here

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=20,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    attention_bias=False,
    bos_token_id=0,
    eos_token_id=1,
)
EXPERTS = dict(
    moe_intermediate_size=12,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    moe_layer_freq=1,
)
SIGMOID = dict(EXPERTS, scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True)
LONGROPE = [1.06, 1.26, 2.09, 4.94]
MINICPM3_LONGROPE = dict(
    SIZES,
    model_type="minicpm3",
    num_hidden_layers=2,
    rms_norm_eps=1e-5,
    scale_emb=12,
    scale_depth=1.4,
    dim_model_base=16,
)
SETS = {
    "youtu": dict(
        SIZES,
        model_type="youtu",
        tie_word_embeddings=True,
        rope_interleave=True,
        rope_parameters=dict(rope_type="default", rope_theta=1600000),
        dtype="bfloat16",
    ),
    "minicpm3": dict(
        {k: v for k, v in SIZES.items() if k != "v_head_dim"},  # then v_head_dim = hidden / heads
        model_type="minicpm3",
        rms_norm_eps=1e-5,
        scale_emb=3.5,
        scale_depth=1.7,
        dim_model_base=20,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
    ),
    "minicpm3_longrope": dict(
        MINICPM3_LONGROPE,
        rope_theta=10000.0,
        rope_scaling=dict(
            type="longrope",
            long_factor=LONGROPE,
            short_factor=LONGROPE,
            original_max_position_embeddings=256,
        ),
        torch_dtype="bfloat16",
    ),
    "minicpm3_longrope_factor": dict(
        MINICPM3_LONGROPE,
        max_position_embeddings=64,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=1000.0,
            factor=4.0,
            long_factor=[3.1, 4.2, 5.5, 6.4],
            short_factor=LONGROPE,
            original_max_position_embeddings=64,
        ),
        dtype="bfloat16",
    ),
    "glm4_moe_lite": dict(
        SIZES | SIGMOID,
        model_type="glm4_moe_lite",
        num_hidden_layers=2,
        v_head_dim=20,  # wider than a whole query head's no-position part, as published
        rms_norm_eps=1e-5,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.8,
        rope_theta=1000000,
        rope_scaling=None,
        partial_rotary_factor=1.0,
        num_nextn_predict_layers=1,
        tie_word_embeddings=False,
        eos_token_id=[1, 3, 5],
        dtype="bfloat16",
    ),
    "kimi_k2": dict(
        SIZES | SIGMOID,
        model_type="kimi_k2",
        num_hidden_layers=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
        rope_theta=50000.0,
        rope_scaling=dict(
            type="yarn",
            factor=32.0,
            original_max_position_embeddings=16,
            beta_fast=1.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
        num_nextn_predict_layers=0,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
    ),
    "v3_yarn_mscale": dict(
        SIZES | SIGMOID,
        model_type="deepseek_v3",
        first_k_dense_replace=0,
        num_hidden_layers=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        rms_norm_eps=1e-3,
        rope_interleave=True,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=100.0,  # so that the ramp has a middle even with four frequencies
            factor=6.0,
            original_max_position_embeddings=64,
            beta_fast=2,
            beta_slow=1,
            mscale=1.3,
            mscale_all_dim=0.6,
        ),
        num_nextn_predict_layers=0,
        tie_word_embeddings=True,
        dtype="float32",
    ),
    "v2_yarn": dict(
        SIZES | EXPERTS,
        model_type="deepseek_v2",
        num_hidden_layers=2,
        q_lora_rank=None,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        rope_theta=10000,
        rope_scaling=dict(
            type="yarn",
            factor=40,
            original_max_position_embeddings=16,
            beta_fast=32,
            beta_slow=1,
            mscale=0.707,
            mscale_all_dim=0.707,
        ),
        aux_loss_alpha=0.001,
        seq_aux=True,
        pretraining_tp=1,
        tie_word_embeddings=False,
        torch_dtype="float32",
    ),
}
GRADIENTS = (
    "embed_tokens.weight",
    "layers.1.self_attn.kv_a_proj_with_mqa.weight",
    "layers.1.self_attn.kv_a_layernorm.weight",
    "layers.1.self_attn.kv_b_proj.weight",
    "layers.1.self_attn.q_a_layernorm.weight",
    "layers.1.self_attn.q_proj.weight",
    "layers.1.mlp.gate.weight",
    "layers.1.mlp.shared_experts.down_proj.weight",
    "layers.1.mlp.down_proj.weight",
)


def read_config(raw):
    """The reference's config; transformers knows kimi_k2 only under the name it derives from."""
    fields = dict(raw)
    model_type = fields.pop("model_type").replace("kimi_k2", "deepseek_v3")
    return AutoConfig.for_model(model_type, **fields)


def write_checkpoint(folder, raw, seed):
    """Random weights, norms and biases included, in the dtype that the config names."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(read_config(raw), dtype=torch.float32)
    routed = dict(model.named_buffers())
    for name, weight in itertools.chain(model.named_parameters(), routed.items()):
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            weight.data.copy_(0.1 * noise)  # both signs
        elif "norm" in name:
            weight.data.copy_(1 + 0.2 * noise)
        elif name in routed:
            continue  # rotary frequencies and other constants
        elif "q_a_proj" in name or "kv_a_proj" in name:
            weight.data.copy_(0.05 * noise)  # small latents, so that their norm's eps is felt
            if "kv_a_proj" in name:
                weight.data[raw["kv_lora_rank"] :] *= 8  # but not the rotary key, which has no norm
        else:
            weight.data.copy_(0.2 * noise)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        tensors = load_file(Path(temporary) / "model.safetensors")
    dtype = getattr(torch, raw.get("dtype") or raw["torch_dtype"])
    tensors = {k: v if k.endswith("correction_bias") else v.to(dtype) for k, v in tensors.items()}
    if raw["model_type"] == "kimi_k2":  # published with this leftover in every layer
        for layer in range(raw["num_hidden_layers"]):
            name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            tensors[name] = torch.full((raw["qk_rope_head_dim"] // 2,), torch.nan, dtype=dtype)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n")


def top_gap(values, k):
    """Smallest distance between the k-th and the next largest value of any row."""
    if k >= values.shape[-1]:
        return torch.inf
    best = values.detach().sort(-1, descending=True).values
    return float((best[:, k - 1] - best[:, k]).min())


def router_gap(router, router_logits):
    """Distance of the closest call among groups and among experts."""
    if not hasattr(router, "e_score_correction_bias"):
        return top_gap(router_logits.softmax(-1), router.top_k)
    choice = router_logits.sigmoid() + router.e_score_correction_bias
    groups = choice.unflatten(-1, (router.num_group, -1))
    group_scores = groups.topk(2).values.sum(-1)
    kept = group_scores.topk(router.topk_group).indices
    masked = torch.full_like(groups, -torch.inf)
    masked.scatter_(1, kept[..., None].expand(-1, -1, groups.shape[-1]), 0.0)
    return min(
        top_gap(group_scores, router.topk_group),
        top_gap((masked + groups).flatten(1), router.top_k),
    )


def run_reference(folder, raw, seed):
    """What golden.npz holds, and the smallest router and argmax margins met on the way."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=read_config(raw), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.randint(2, raw["vocab_size"], (2, PROMPT), generator=torch.manual_seed(seed))
    out, gaps = {"input_ids": ids}, []

    def record(router, layer):
        def hook(_module, _inputs, output):
            logits, weights, experts = output
            gaps.append(router_gap(router, logits))
            order = experts.argsort(-1)
            out.setdefault(f"router_idx_{layer}", experts.gather(1, order))
            out.setdefault(f"router_w_{layer}", weights.gather(1, order))

        router.register_forward_hook(hook)

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            record(module, name.split(".")[2])

    full = model(ids, use_cache=False, output_hidden_states=True, labels=ids)
    out["logits"], out["loss"] = full.logits, full.loss
    out["hidden_states"] = torch.stack(full.hidden_states)
    full.loss.backward()
    for name, weight in model.named_parameters():
        if name.endswith(GRADIENTS):
            out[f"grad_{name}"] = weight.grad
    with torch.no_grad():
        cached = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            eos_token_id=raw["vocab_size"],  # never met
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        out["gen_ids"], out["step_logits"] = cached.sequences, torch.stack(cached.logits, 1)
        again = model(cached.sequences[:, :-1], use_cache=False).logits[:, PROMPT - 1 :]
        assert (again - out["step_logits"]).abs().max() < 5e-5, "cached and full passes disagree"
        padded, mask = ids.clone(), torch.ones_like(ids)
        padded[1, :5] = mask[1, :5] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out["pad_ids"], out["pad_mask"] = padded, mask
        out["pad_logits"] = model(padded, attention_mask=mask, position_ids=positions).logits
    argmax = top_gap(out["step_logits"].flatten(0, 1), 1)
    return {k: v.detach().numpy() for k, v in out.items()}, min(gaps, default=torch.inf), argmax


def make(name):
    """Tries seeds until no decision is a near tie, so that rounding cannot change one."""
    folder, raw = HERE / name, SETS[name]
    for seed in range(100):
        write_checkpoint(folder, raw, seed)
        golden, router, argmax = run_reference(folder, raw, 1000 + seed)
        if router > ROUTER_MARGIN and argmax > ARGMAX_MARGIN:
            break
    else:
        raise RuntimeError(f"{name}: no seed without a near tie")
    np.savez_compressed(folder / "golden.npz", **golden)
    size = sum(file.stat().st_size for file in folder.iterdir())
    largest = np.abs(golden["logits"]).max()
    print(f"{name}: seed {seed}, margins {router:.1e} {argmax:.1e}, ", end="")
    print(f"largest logit {largest:.1f}, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or SETS:
        make(chosen)
