//! The type in which weights are kept that nobody trains.

use burn::tensor::TensorData;
use half::bf16;
use safetensors::tensor::Dtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::NonFinite;

/// The type in which frozen weights are kept, as far as only products read them: projections, embedding and head. Products
/// compute in f32 whatever it is; those of bf16 take half of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FrozenDtype {
    /// bf16 where the file has bf16, which changes no number; else f32.
    #[default]
    File,
    /// f32
    F32,
    /// bf16, the nearest one, whatever the file has.
    Bf16,
}

impl FrozenDtype {
    /// The values of the parameter `name`, which a file has as `in_file`, as they are kept.
    pub(crate) fn keep(self, name: &str, in_file: Option<Dtype>, values: Vec<f32>, shape: &[usize]) -> TensorData {
        let of_products = name.ends_with("_proj.weight") || ["embedding.weight", "head.weight"].contains(&name);
        let narrow = match self {
            Self::File => in_file == Some(Dtype::BF16),
            Self::F32 => false,
            Self::Bf16 => true,
        };
        match of_products && narrow {
            // Into memory of their own: converted where they are, they would go on taking that of f32.
            true => TensorData::new(values.iter().map(|&value| bf16::from_f32(value)).collect(), shape),
            false => TensorData::new(values, shape),
        }
    }
}

/// How weights are read.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    /// What is done about numbers that are not finite.
    pub nonfinite: NonFinite,
    /// The type in which they are kept.
    pub frozen: FrozenDtype,
}

/// In f32, which can be trained.
impl From<NonFinite> for Reading {
    fn from(nonfinite: NonFinite) -> Self {
        Self { nonfinite, frozen: FrozenDtype::F32 }
    }
}
