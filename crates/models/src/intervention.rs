//! Interventions: changes that are made to a forward on its way, described by names of sites and spans of tokens.
//!
//! An [`InterventionConfig`] is what is written, an [`Intervention`] what it means in a model: its tensors read, its layers and
//! heads checked. What it means of the tokens of one pass is a [`SitePlan`]. Tensors that are trained are parameters of the
//! model, [`Decoder::intervention_tensors`].

pub mod answer_score;
mod attention_swap;
mod config;
pub mod gift;
pub mod head_search;
pub mod locore;
mod presence;
mod read;
pub mod sink_search;
pub mod soft_injection;
pub mod soft_pag;
pub mod span_boost;
mod spans;
pub mod steering;
pub mod vhr;
pub mod visual_sinks;
mod zero_tuning;

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::sparse::Sparse;
pub use polyhead_attention::sparse::SparseConfig;
use polyhead_attention::{Amount, ConfigError, Edit, Positions, require};

pub use attention_swap::attention_swap;
pub use config::{AmountConfig, ChangeConfig, EditConfig, GuidanceConfig, InterventionConfig, Per, TrainedConfig};
pub use presence::Presence;
pub use soft_injection::{random_embedding, task_embedding};
pub use spans::{OutsideSpan, Phase, RangeConfig, Span, SpanName, TextSpan};
pub use zero_tuning::zero_tuning;

use crate::sites::SitePlan;
use crate::weights::Named;
use crate::{Batch, Decoder, Role};
use read::{ModelEdit, Reader, Source, TrainedTensor};
use visual_sinks::Marks;

/// Turns ids into the text that they stand for.
pub type Decode = Arc<dyn Fn(&[u32]) -> String + Send + Sync>;

/// An intervention in one model.
#[derive(Clone)]
pub struct Intervention {
    edits: Vec<ModelEdit>,
    trained: Vec<TrainedTensor>,
    sparse: Option<Sparse>,
    guidance: Option<GuidanceConfig>,
    decode: Option<Decode>,
}

impl std::fmt::Debug for Intervention {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { edits, sparse, .. } = self;
        f.debug_struct("Intervention").field("edits", edits).field("sparse", sparse).finish_non_exhaustive()
    }
}

/// What is known of the tokens of a pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct Context<'a> {
    /// Rows of the batch.
    pub rows: usize,
    /// `[rows, prompt]`: the ids of the prompt (of a text that is evaluated: of the whole text); empty where they are unknown.
    pub tokens: &'a [u32],
    /// `[rows, prompt]`: whose each of them is; empty where nobody says so.
    pub roles: &'a [Role],
    /// `[rows, prompt]`: which text of its row each of them belongs to; empty where each row is one.
    pub documents: &'a [u32],
    /// Tokens of each row that are not generated.
    pub prompt: usize,
}

impl<'a> Context<'a> {
    /// Of a batch, of which nothing is generated.
    pub fn of(batch: &'a Batch) -> Self {
        let roles = batch.roles.as_deref().unwrap_or_default();
        let documents = batch.documents.as_deref().unwrap_or_default();
        Self { rows: batch.batch, tokens: &batch.tokens, roles, documents, prompt: batch.seq }
    }
}

impl Intervention {
    /// What `config`, which is valid, means in `model`, with the tensors of its file; `decode` is needed where a text is searched.
    ///
    /// # Errors
    /// Names the edit, the field, its value, the rule and the way out.
    pub fn new(
        config: &InterventionConfig,
        tensors: &BTreeMap<String, Named>,
        model: &Decoder,
        decode: Option<Decode>,
    ) -> Result<Self, ConfigError> {
        let reader = Reader { config, tensors, model, decodes: decode.is_some() };
        let edit = |(at, edit)| reader.edit(edit).map_err(|error| error.within(&format!("edits.{at}")));
        let edits = config.edits.iter().enumerate().map(edit).collect::<Result<_, _>>()?;
        let tensor = |(name, trained): (&String, _)| {
            reader.trained(name, trained).map_err(|error| error.within(&format!("train.{name}")))
        };
        let trained = config.train.iter().map(tensor).collect::<Result<_, _>>()?;
        if let Some(sparse) = &config.sparse {
            let diffuses = model.is_masked_diffusion();
            let fits = diffuses == matches!(sparse, SparseConfig::Sparsed(_));
            require(fits, &format!("sparse.{}", sparse.name()), || {
                match diffuses {
                true => "a masked diffusion model takes sparse.sparsed: the other forms are for models that read from left to right".into(),
                false => "sparsed is for masked diffusion models, which generate in steps".into(),
            }
            })?;
            (0..model.layers.len()).try_for_each(|layer| {
                let checked = sparse.check_layer(model.config().mechanism(layer), model.boundaries.is_some());
                checked.map_err(|error| error.within("sparse"))
            })?;
        }
        // Nothing is trained through it but the predictor itself, which does not go through here.
        let predictor = model.boundaries.as_ref().map(|predictor| Arc::new(predictor.valid()));
        let sparse = config.sparse.clone().map(|sparse| Sparse::Config(sparse, predictor));
        Ok(Self { edits, trained, sparse, guidance: config.guidance, decode })
    }

    /// How far predictions are steered away from those under its edits, where they are.
    pub fn guidance(&self) -> Option<GuidanceConfig> {
        self.guidance
    }

    /// The same without its guidance, and without the edits that are for it; `None` where there is none.
    pub(crate) fn unguided(&self) -> Option<Self> {
        self.guidance.map(|_| Self { edits: Vec::new(), trained: Vec::new(), guidance: None, ..self.clone() })
    }

    /// Which keys queries read, where it is not all of them.
    pub fn sparse(&self) -> Option<&Sparse> {
        self.sparse.as_ref()
    }

    /// The settings of that.
    pub fn sparse_config(&self) -> Option<&SparseConfig> {
        match &self.sparse {
            Some(Sparse::Config(config, _)) => Some(config),
            _ => None,
        }
    }

    /// The first span that depends on whose tokens are whose, where there is one: its place in the file, and its name.
    pub fn needs_roles(&self) -> Option<(String, SpanName)> {
        self.spans().find_map(|(field, span)| match span {
            Span::Named(name) if name.needs_roles() => Some((field, *name)),
            _ => None,
        })
    }

    /// The edits that are for generated tokens alone: of each, where its phase is in the file.
    pub fn decode_edits(&self) -> Vec<String> {
        let decodes = |(_, edit): &(usize, &ModelEdit)| edit.config.phase == Phase::Decode;
        self.edits.iter().enumerate().filter(decodes).map(|(at, _)| format!("edits.{at}.phase")).collect()
    }

    /// Whether it changes nothing as long as no token is generated.
    pub fn only_decodes(&self) -> bool {
        self.sparse.is_none() && self.edits.iter().all(|edit| edit.config.phase == Phase::Decode)
    }

    /// Every span with its place in the file.
    fn spans(&self) -> impl Iterator<Item = (String, &Span)> {
        self.whole_spans().flat_map(|(field, span)| span.parts().into_iter().map(move |part| (field.clone(), part)))
    }

    /// The spans that text must have: of those that an edit is outside of, texts and ranges.
    fn counted_spans(&self) -> impl Iterator<Item = (String, &Span)> {
        self.whole_spans().flat_map(|(field, span)| {
            let outside = matches!(span, Span::Outside(_));
            let parts = span.parts().into_iter().filter(move |part| !(outside && matches!(part, Span::Named(_))));
            parts.map(move |part| (field.clone(), part))
        })
    }

    /// The spans as edits have them, each with its place in the file.
    fn whole_spans(&self) -> impl Iterator<Item = (String, &Span)> {
        self.edits.iter().enumerate().flat_map(|(at, edit)| {
            edit.config.spans().into_iter().map(move |(key, span)| (format!("edits.{at}.{key}"), span))
        })
    }

    /// What it means of the tokens of a pass, with the tensors that are trained.
    pub fn plan(&self, context: &Context<'_>, trained: &[Param<Tensor<1>>]) -> SitePlan {
        let trained: Vec<Tensor<3>> = self.trained_values(trained).collect();
        let amount = |source: &Source, layer: usize| match source {
            Source::Fixed(amount) => (**amount).clone(),
            Source::Trained(place) => {
                let [_, heads, width] = trained[*place].dims();
                Amount::Each(trained[*place].clone().narrow(0, layer, 1).reshape([1, heads, 1, width]))
            }
        };
        let mut plan = SitePlan::default();
        for ModelEdit { config, at, layers } in &self.edits {
            let positions = |span, phase| spans::positions(span, phase, context, self.decode.as_ref());
            let (positions, mut keys) = (positions(&config.tokens, config.phase), positions(&config.keys, Phase::Both));
            // These change more keys than those that they are about.
            let of_keys = match (&config.change, &config.keys) {
                (ChangeConfig::Redistribute(how), span) => Some(how.change(self.marks(&how.sinks, span, context))),
                (ChangeConfig::Gaze(how), Span::Range(RangeConfig { from, .. })) => Some(how.change(*from)),
                _ => None,
            };
            if of_keys.is_some() {
                keys = Positions::All;
            }
            for (layer, sources) in layers {
                let amounts = || config.change.of(sources.iter().map(|source| amount(source, *layer)).collect());
                let change = of_keys.clone().unwrap_or_else(amounts);
                let (at, positions, keys) = (at.clone(), positions.clone(), keys.clone());
                plan.edits.push((*layer, Edit { at, change, positions, keys }));
            }
        }
        plan
    }

    /// Which tokens of each row are sinks, and which are of a span.
    fn marks(&self, sinks: &[Span], span: &Span, context: &Context<'_>) -> Vec<Marks> {
        let decode = self.decode.as_ref();
        let sinks = spans::rows_of_any(sinks, context, decode);
        let rows = sinks.into_iter().zip(spans::rows_of(span, context, decode)).enumerate();
        let texts = |row: usize| context.documents.get(row * context.prompt..(row + 1) * context.prompt);
        let marks = |(row, (sinks, span))| Marks { sinks, span, documents: texts(row).unwrap_or_default().to_vec() };
        rows.map(marks).collect()
    }

    /// Its tensors that are trained, flattened, with their initial numbers.
    pub(crate) fn parameters(&self, device: &Device) -> Vec<Param<Tensor<1>>> {
        let parameter = |TrainedTensor { initial, .. }: &TrainedTensor| {
            Param::from_tensor(Tensor::from_data(TensorData::new(initial.clone(), [initial.len()]), device))
        };
        self.trained.iter().map(parameter).collect()
    }

    /// `[layers, heads, width or 1]` each: the tensors that are trained, as edits read them.
    fn trained_values(&self, parameters: &[Param<Tensor<1>>]) -> impl Iterator<Item = Tensor<3>> {
        self.trained.iter().zip(parameters).map(|(trained, parameter)| {
            let value = parameter.val().reshape(trained.shape);
            if trained.sigmoid { sigmoid(value) } else { value }
        })
    }
}

/// Whether a parameter of a decoder is a tensor of its intervention.
pub fn is_intervention_tensor(parameter: &str) -> bool {
    parameter.starts_with("intervention_tensors.")
}

impl Decoder {
    /// The tensors of its intervention that were trained, as a file of tensors has them.
    pub fn trained_tensors(&self) -> Vec<Named> {
        let Some(own) = self.intervention() else { return Vec::new() };
        let of = |(trained, values): (&TrainedTensor, Tensor<3>)| {
            let [layers, heads, width] = trained.shape;
            let shape = if width == 1 { vec![layers, heads] } else { vec![layers, heads, width] };
            Named { name: trained.name.clone(), shape, values: values.into_data().iter::<f32>().collect() }
        };
        own.trained.iter().zip(own.trained_values(&self.intervention_tensors)).map(of).collect()
    }
}

#[cfg(test)]
mod laws;
#[cfg(test)]
mod tests;
