//! Where each of our parameters stands in the files of each family, and how its values lie there.

use crate::DecoderConfig;

/// A kind of model that the format has a class for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`
    Llama,
    /// `MistralForCausalLM`, with full attention
    Mistral,
    /// `Qwen2ForCausalLM`: biases on queries, keys and values
    Qwen2,
    /// `Qwen3ForCausalLM`: norms of queries and keys
    Qwen3,
    /// `GPTNeoXForCausalLM`: Pythia
    GptNeox,
    /// `MotifForCausalLM`: grouped differential attention; written only
    Motif,
    /// Decoupled heads under LLaMA's names, the maps in config.json; known to no other software
    DecoupledHead,
}

/// How the values of a parameter lie in the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// As ours.
    Same,
    /// `[out, in]` where ours are `[in, out]`.
    Transposed,
    /// `[n_heads, 3, head_dim]` rows, of which ours are one third: queries, keys or values; of weights, also transposed.
    Third(usize),
}

/// A place in the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub name: String,
    pub layout: Layout,
}

impl Family {
    /// The families that can be read.
    pub(super) const READ: [Self; 6] =
        [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::GptNeox, Self::DecoupledHead];

    /// The name of the class, as in `architectures` of config.json.
    pub fn class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::GptNeox => "GPTNeoXForCausalLM",
            Self::Motif => "MotifForCausalLM",
            Self::DecoupledHead => "DecoupledHeadForCausalLM",
        }
    }

    /// `model_type` of config.json.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::GptNeox => "gpt_neox",
            Self::Motif => "motif",
            Self::DecoupledHead => "decoupled_head",
        }
    }

    /// Where our parameter stands.
    pub(super) fn place(self, ours: &str) -> Place {
        match self {
            Self::GptNeox => neox(ours),
            _ => llama(ours),
        }
    }

    /// Whether a tensor of the files holds nothing that was learned: buffers that old versions saved, and the copy of tied
    /// embeddings.
    pub(super) fn is_left_over(name: &str, config: &DecoderConfig) -> bool {
        let buffers = ["rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"];
        let tied = config.tie_embeddings && ["lm_head.weight", "embed_out.weight"].contains(&name);
        tied || buffers.iter().any(|buffer| name.ends_with(buffer))
    }
}

fn layout_of(ours: &str) -> Layout {
    match ours.ends_with("_proj.weight") || ours == "head.weight" {
        true => Layout::Transposed,
        false => Layout::Same,
    }
}

/// LLaMA's names, which Mistral, Qwen and Motif took over.
fn llama(ours: &str) -> Place {
    let name = match ours {
        "embedding.weight" => "model.embed_tokens.weight".into(),
        "head.weight" => "lm_head.weight".into(),
        inner => format!("model.{inner}")
            .replace(".attention_norm.", ".input_layernorm.")
            .replace(".mlp_norm.", ".post_attention_layernorm.")
            .replace(".attention.", ".self_attn."),
    };
    Place { name, layout: layout_of(ours) }
}

fn neox(ours: &str) -> Place {
    let thirds = [".q_proj.", ".k_proj.", ".v_proj."];
    let third = thirds.iter().position(|part| ours.contains(part));
    let name = match ours {
        "embedding.weight" => "gpt_neox.embed_in.weight".into(),
        "head.weight" => "embed_out.weight".into(),
        inner => {
            let inner = thirds.iter().fold(inner.to_owned(), |name, part| name.replace(part, ".query_key_value."));
            let inner = match inner.strip_prefix("norm.") {
                Some(rest) => format!("final_layer_norm.{rest}"),
                None => inner,
            };
            format!("gpt_neox.{inner}")
                .replace(".attention_norm.", ".input_layernorm.")
                .replace(".mlp_norm.", ".post_attention_layernorm.")
                .replace(".o_proj.", ".dense.")
                .replace(".up_proj.", ".dense_h_to_4h.")
                .replace(".down_proj.", ".dense_4h_to_h.")
        }
    };
    Place { name, layout: third.map_or_else(|| layout_of(ours), Layout::Third) }
}
