//! What the frozen model pays attention to in a text: its maps and its important tokens, computed once for each text. They are kept in
//! memory as far as that is allowed, and in a file without a name behind that, which the system removes with the process.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use burn::tensor::{DType, Tensor};
use polyhead_attention::{Mask, QuerySite};
use polyhead_kernels::in_type;
use polyhead_models::sites::SitePlan;
use polyhead_models::{Decoder, Pass};

use super::importance::{entropies, masked_entropies, most_important};
use super::shift::weights;
use super::{AttentionShiftingConfig, Importance};
use crate::TrainError;

/// What the frozen model does with a text.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Known {
    /// Whether each token is important.
    pub important: Vec<bool>,
    /// The weights of all layers, `[heads, tokens, tokens]` each, one behind the other.
    pub maps: Vec<f32>,
}

/// Where maps are.
#[derive(Debug)]
enum Place {
    Memory(Vec<f32>),
    /// From this byte on, so many numbers.
    Disk(u64, usize),
}

/// The texts that have been looked at.
#[derive(Debug)]
pub(super) struct Reference {
    config: AttentionShiftingConfig,
    known: HashMap<Vec<u32>, (Vec<bool>, Place)>,
    /// Numbers that may still be kept in memory.
    room: usize,
    file: Option<File>,
}

impl Reference {
    pub(super) fn new(config: AttentionShiftingConfig) -> Self {
        let room = config.memory_mib.saturating_mul((1 << 20) / size_of::<f32>());
        Self { config, known: HashMap::new(), room, file: None }
    }

    /// What the frozen model does with a text. Alone in its batch, so that it is the same whatever comes beside it.
    pub(super) fn of(&mut self, frozen: &Decoder, tokens: &[u32]) -> Result<Known, TrainError> {
        if let Some((important, place)) = self.known.get(tokens) {
            let maps = match place {
                Place::Memory(maps) => maps.clone(),
                Place::Disk(from, count) => self.read(*from, *count).map_err(disk)?,
            };
            return Ok(Known { important: important.clone(), maps });
        }
        let known = Known { important: self.important(frozen, tokens), maps: maps(frozen, tokens)? };
        let place = if known.maps.len() <= self.room {
            self.room -= known.maps.len();
            Place::Memory(known.maps.clone())
        } else {
            Place::Disk(self.write(&known.maps).map_err(disk)?, known.maps.len())
        };
        self.known.insert(tokens.to_vec(), (known.important.clone(), place));
        Ok(known)
    }

    fn important(&self, frozen: &Decoder, tokens: &[u32]) -> Vec<bool> {
        let AttentionShiftingConfig { fraction, mask_id, ids, importance, .. } = &self.config;
        match importance {
            Importance::Ids => tokens.iter().map(|id| ids.contains(id)).collect(),
            Importance::Entropy(masking) => {
                let masked = masked_entropies(frozen, tokens, *masking, *mask_id);
                most_important(&entropies(frozen, tokens), &masked, *fraction)
            }
        }
    }

    fn write(&mut self, maps: &[f32]) -> std::io::Result<u64> {
        let file = match self.file.take() {
            Some(file) => file,
            None => tempfile::tempfile()?,
        };
        let file = self.file.insert(file);
        let from = file.seek(SeekFrom::End(0))?;
        file.write_all(&maps.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())?;
        Ok(from)
    }

    fn read(&self, from: u64, count: usize) -> std::io::Result<Vec<f32>> {
        let mut bytes = vec![0; count * size_of::<f32>()];
        let mut file = self.file.as_ref().ok_or(std::io::ErrorKind::NotFound)?;
        file.seek(SeekFrom::Start(from))?;
        file.read_exact(&mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|&four| f32::from_le_bytes(four)).collect())
    }
}

fn disk(error: std::io::Error) -> TrainError {
    TrainError::Procedure(format!(
        "procedure.attention_shifting: the frozen model's maps cannot be kept in {}: {error}; a larger memory_mib keeps more of them in \
         memory, TMPDIR names another folder",
        std::env::temp_dir().display()
    ))
}

/// The weights of all layers.
fn maps(frozen: &Decoder, tokens: &[u32]) -> Result<Vec<f32>, TrainError> {
    let scores = scores(frozen, &[tokens.to_vec()], &Mask::causal())?;
    Ok(scores.into_iter().flat_map(|scores| weights(scores).into_data().iter::<f32>().collect::<Vec<f32>>()).collect())
}

/// `[texts, heads, tokens, tokens]` of each layer: scores before the softmax, negative infinity where keys are hidden.
pub(super) fn scores(model: &Decoder, rows: &[Vec<u32>], mask: &Mask) -> Result<Vec<Tensor<4>>, TrainError> {
    let batch = polyhead_models::Batch {
        batch: rows.len(),
        seq: rows.first().map_or(0, Vec::len),
        tokens: rows.concat(),
        ..Default::default()
    };
    let sites = SitePlan::tap_all(model.layers.len(), QuerySite::Scores);
    let taps = model.pass(model.tokens(&batch), Pass { sites, ..Pass::new(mask) }).taps;
    if taps.len() != model.layers.len() {
        return Err(TrainError::Setting(
            "procedure.attention_shifting: a layer of the model has no map of scores to shift: it takes mechanisms with one softmax \
             over the keys, such as softmax and gated_attention"
                .into(),
        ));
    }
    Ok(taps.into_iter().map(|tap| in_type(tap.values, DType::F32)).collect())
}
