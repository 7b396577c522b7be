"""Settings of a Polyhead decoder in transformers: those of a recipe's `[model.decoder]`, under LLaMA's names where LLaMA has them.

`attention` is a mechanism's table by its name, {"mixture_of_head": {"n_heads": 8, ...}}, or a list with one per layer.
"""

from transformers import PretrainedConfig


class PolyheadConfig(PretrainedConfig):
    model_type = "polyhead"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size=None,
        hidden_size=None,
        intermediate_size=None,  # default: 8/3 hidden_size, rounded up to a multiple of 16
        num_hidden_layers=None,
        attention=None,
        max_position_embeddings=None,
        rope=True,
        rope_theta=10000.0,
        rope_layout="rotate_half",  # or "interleaved"
        partial_rotary_factor=1.0,
        rope_scaling=None,  # as transformers 4 calls it
        rope_parameters=None,  # as transformers 5 calls it
        learned_positions=None,  # a vector for each of so many positions
        norm="rms",  # or "layer"
        rms_norm_eps=1e-5,
        mlp="swiglu",  # or "gelu", or "identity": none
        parallel_residual=False,
        attention_gate=None,
        head_bias=False,
        masked_diffusion=False,  # tokens that are masked are predicted, from both sides
        mask_token_id=None,
        tie_word_embeddings=True,
        use_cache=True,
        initializer_range=0.02,
        **kwargs,
    ):
        if attention is None:
            attention = published_attention(num_hidden_layers, kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.attention = attention
        self.max_position_embeddings = max_position_embeddings
        self.rope = rope
        self.rope_theta = rope_theta
        self.rope_layout = rope_layout
        self.partial_rotary_factor = partial_rotary_factor
        self.rope_parameters = rope_parameters or rope_scaling
        self.learned_positions = learned_positions
        self.norm = norm
        self.rms_norm_eps = rms_norm_eps
        self.mlp = mlp
        self.parallel_residual = parallel_residual
        self.attention_gate = attention_gate
        self.head_bias = head_bias
        self.masked_diffusion = masked_diffusion
        self.mask_token_id = mask_token_id
        self.use_cache = use_cache
        self.initializer_range = initializer_range
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def mechanism(self, layer):
        """The name of a layer's mechanism, and its settings."""
        table = self.attention[layer] if isinstance(self.attention, list) else self.attention
        [(name, settings)] = table.items()
        return name, settings


def published_attention(n_layers, keys):
    """`attention` of the two formats of Polyhead's exports that have keys of their own; takes these keys out."""
    take = keys.pop
    if "num_noise_heads" in keys:  # grouped differential attention, in Motif's form
        attention = {
            "n_heads": take("num_attention_heads"),
            "n_noise_heads": take("num_noise_heads"),
            "n_kv_heads": take("num_key_value_heads", None),
            "head_dim": take("head_dim", None),
            "lambda_init": {"each": take("lambda_init")} if "lambda_init" in keys else "motif",
            "subln_init": take("subln_init", 0.1),
        }
        attention = {"grouped_differential": {key: value for key, value in attention.items() if value is not None}}
    elif "dha_key_map" in keys:  # decoupled heads
        bias = take("attention_bias", False)
        same = {"n_heads": take("num_attention_heads"), "qkv_bias": bias, "o_bias": take("dha_output_bias", bias)}
        if "head_dim" in keys:
            same["head_dim"] = take("head_dim")
        maps = zip(take("dha_key_map"), take("dha_value_map"))
        attention = [{"decoupled_head": {**same, "key_map": key, "value_map": value}} for key, value in maps]
    else:
        return None
    for known in ("architectures", "model_type", "hidden_act", "attn_rms_norm_eps"):
        take(known, None)
    return attention
