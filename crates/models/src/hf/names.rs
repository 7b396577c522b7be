//! The name that each of our parameters has in the files of each family, and its layout there.

use polyhead_attention::{AttentionConfig, Family, Form, Projection};

use crate::DecoderConfig;

/// Models that no published family has: their own settings in config.json, LLaMA's names around the mechanisms' own.
pub(super) static POLYHEAD: Family = Family::remote("PolyheadForCausalLM", "polyhead");

/// The same, of models that predict masked tokens.
pub(super) static MASKED: Family = Family::remote("PolyheadForMaskedLM", "polyhead");

/// Every family that can be read.
pub(super) fn families() -> impl Iterator<Item = &'static Family> {
    AttentionConfig::families().chain([&POLYHEAD, &MASKED])
}

/// The layout of a parameter's values in the files.
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

/// The names of a form.
struct Names {
    embedding: &'static str,
    head: &'static str,
    /// What all others begin with.
    body: &'static str,
    /// The norm behind the last layer.
    norm: &'static str,
    /// Parts of names, ours and theirs.
    parts: &'static [[&'static str; 2]],
}

/// LLaMA's, which Mistral, Qwen and Motif took over.
const LLAMA: Names = Names {
    embedding: "model.embed_tokens.weight",
    head: "lm_head.weight",
    body: "model",
    norm: "norm",
    parts: &[
        [".attention_norm.", ".input_layernorm."],
        [".mlp_norm.", ".post_attention_layernorm."],
        [".attention.", ".self_attn."],
        [".positions.", ".embed_positions."],
    ],
};

const GPT_NEOX: Names = Names {
    embedding: "gpt_neox.embed_in.weight",
    head: "embed_out.weight",
    body: "gpt_neox",
    norm: "final_layer_norm",
    parts: &[
        [".attention_norm.", ".input_layernorm."],
        [".mlp_norm.", ".post_attention_layernorm."],
        [".up_proj.", ".dense_h_to_4h."],
        [".down_proj.", ".dense_4h_to_h."],
    ],
};

/// The place of one of our parameters in a family's files.
pub(super) fn place(family: &Family, ours: &str) -> Place {
    let names = match family.form {
        Form::Llama => LLAMA,
        Form::GptNeox => GPT_NEOX,
    };
    let mut layout = match ours.ends_with("_proj.weight") || ours == "head.weight" {
        true => Layout::Transposed,
        false => Layout::Same,
    };
    let name = match ours {
        "embedding.weight" => names.embedding.into(),
        "head.weight" => names.head.into(),
        "head.bias" => names.head.replace(".weight", ".bias"),
        inner => {
            let inner = match inner.strip_prefix("norm.") {
                Some(rest) => format!("{}.{rest}", names.norm),
                None => inner.to_owned(),
            };
            let mut name = format!("{}.{inner}", names.body);
            for [ours, theirs] in names.parts {
                name = name.replace(ours, theirs);
            }
            for (projection, theirs) in family.projections {
                let part = format!(".{projection}.");
                let theirs = match theirs {
                    Projection::Third(theirs, third) => {
                        layout = if name.contains(&part) { Layout::Third(*third) } else { layout };
                        theirs
                    }
                    Projection::Named(theirs) => theirs,
                };
                name = name.replace(&part, &format!(".{theirs}."));
            }
            name
        }
    };
    Place { name, layout }
}

/// Whether a tensor of the files holds nothing that was learned: buffers that old versions saved, and the copy of tied
/// embeddings.
pub(super) fn is_left_over(name: &str, config: &DecoderConfig) -> bool {
    let buffers = ["rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"];
    let tied = config.tie_embeddings && [LLAMA.head, GPT_NEOX.head].contains(&name);
    tied || buffers.iter().any(|buffer| name.ends_with(buffer))
}
