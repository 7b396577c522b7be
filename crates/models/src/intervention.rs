//! Interventions: changes that are made to a forward on its way, described by names of sites and spans of tokens.
//!
//! An [`InterventionConfig`] is what is written, an [`Intervention`] what it means in a model: its tensors read, its layers and
//! heads checked. What it means of the tokens of one pass is a [`SitePlan`].

mod attention_swap;
mod config;
pub mod gift;
pub mod locore;
pub mod soft_injection;
pub mod soft_pag;
pub mod span_boost;
pub mod steering;
pub mod vhr;
pub mod visual_sinks;
mod zero_tuning;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use polyhead_attention::sparse::{Sparse, SparseConfig};
use polyhead_attention::{Amount, At, Change, ConfigError, Edit, KvHead, Mask, Positions, QueryHead, Site, require};

pub use config::{
    AmountConfig, ChangeConfig, EditConfig, InterventionConfig, Phase, RangeConfig, Span, SpanName, TextSpan,
};

pub use attention_swap::attention_swap;
pub use zero_tuning::zero_tuning;

use crate::sites::SitePlan;
use crate::weights::Named;
use crate::{Batch, Decoder, Pass, Role};

/// Turns ids into the text that they stand for.
pub type Decode = Arc<dyn Fn(&[u32]) -> String + Send + Sync>;

/// An intervention in one model.
#[derive(Clone)]
pub struct Intervention {
    edits: Vec<(Vec<usize>, EditConfig, Template)>,
    sparse: Option<Sparse>,
    decode: Option<Decode>,
}

/// An edit of each layer, without its tokens.
#[derive(Debug, Clone)]
struct Template {
    at: At,
    /// One for each of the layers.
    changes: Vec<Change>,
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
    /// Tokens of each row that are not generated.
    pub prompt: usize,
}

impl<'a> Context<'a> {
    /// Of a batch, of which nothing is generated.
    pub fn of(batch: &'a Batch) -> Self {
        let roles = batch.roles.as_deref().unwrap_or_default();
        Self { rows: batch.batch, tokens: &batch.tokens, roles, prompt: batch.seq }
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
        let mut edits = Vec::new();
        for (at, edit) in config.edits.iter().enumerate() {
            let template = edit.template(tensors, model, decode.is_some());
            let (layers, template) = template.map_err(|error| error.within(&format!("edits.{at}")))?;
            edits.push((layers, edit.clone(), template));
        }
        if let Some(sparse) = &config.sparse {
            (0..model.layers.len()).try_for_each(|layer| {
                let checked = sparse.check_layer(model.config().mechanism(layer), model.boundaries.is_some());
                checked.map_err(|error| error.within("sparse"))
            })?;
        }
        // Nothing is trained through it but the predictor itself, which does not go through here.
        let predictor = model.boundaries.as_ref().map(|predictor| Arc::new(predictor.valid()));
        let sparse = config.sparse.clone().map(|sparse| Sparse::Config(sparse, predictor));
        Ok(Self { edits, sparse, decode })
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

    /// The first span that depends on whose tokens are whose, where there is one.
    pub fn needs_roles(&self) -> Option<SpanName> {
        let spans = self.edits.iter().flat_map(|(_, edit, _)| [&edit.tokens, &edit.keys]);
        let named = spans.filter_map(|span| if let Span::Named(name) = span { Some(*name) } else { None });
        named.into_iter().find(|name| name.needs_roles())
    }

    /// Refuses tokens in which a text that is searched is nowhere.
    ///
    /// # Errors
    /// Names the text.
    pub fn check_tokens(&self, context: &Context<'_>) -> Result<(), ConfigError> {
        for (at, (_, edit, _)) in self.edits.iter().enumerate() {
            for (field, span) in [("tokens", &edit.tokens), ("keys", &edit.keys)] {
                let Span::Text(TextSpan { text }) = span else { continue };
                let found = self.rows_of(span, context);
                if let Some(row) = found.iter().position(|row| !row.contains(&true)) {
                    let place = if context.rows > 1 { format!("row {row} of ") } else { String::new() };
                    return Err(ConfigError::new(
                        format!("edits.{at}.{field}"),
                        format!("{field}.text ({text:?}) is nowhere in {place}the text: it is searched to the letter"),
                    ));
                }
            }
        }
        Ok(())
    }

    /// What it means of the tokens of a pass.
    pub fn plan(&self, context: &Context<'_>) -> SitePlan {
        let mut plan = SitePlan::default();
        for (layers, config, template) in &self.edits {
            let positions = self.positions(&config.tokens, config.phase, context);
            let keys = self.positions(&config.keys, Phase::Both, context);
            for (&layer, change) in layers.iter().zip(&template.changes) {
                let (at, change) = (template.at.clone(), change.clone());
                plan.edits.push((layer, Edit { at, change, positions: positions.clone(), keys: keys.clone() }));
            }
        }
        plan
    }

    fn positions(&self, span: &Span, phase: Phase, context: &Context<'_>) -> Positions {
        let within = |range: Range<usize>| match phase {
            Phase::Prefill => Positions::Range(range.start..range.end.min(context.prompt)),
            Phase::Decode => Positions::Range(range.start.max(context.prompt)..range.end),
            Phase::Both => Positions::Range(range),
        };
        match (span, phase) {
            (Span::Named(SpanName::All), Phase::Both) => Positions::All,
            (Span::Named(SpanName::All), _) => within(0..usize::MAX),
            (Span::Named(SpanName::Prompt), _) => within(0..context.prompt),
            (Span::Named(SpanName::First), _) => within(0..1),
            (Span::Range(RangeConfig { from, to }), _) => within(*from..*to),
            _ => {
                let mut rows = self.rows_of(span, context);
                if phase == Phase::Decode {
                    rows.iter_mut().for_each(|row| row.fill(false));
                }
                let beyond = *span == Span::Named(SpanName::Response) && phase != Phase::Prefill;
                Positions::Rows { rows: rows.into(), beyond }
            }
        }
    }

    /// Of each row of the prompt, whether a token belongs to a span that differs between rows.
    fn rows_of(&self, span: &Span, context: &Context<'_>) -> Vec<Vec<bool>> {
        let Context { rows, tokens, roles, prompt } = *context;
        let roles = |row: usize| roles.get(row * prompt..(row + 1) * prompt);
        let tokens = |row: usize| tokens.get(row * prompt..(row + 1) * prompt);
        (0..rows.max(1))
            .map(|row| match span {
                Span::Text(TextSpan { text }) => match (tokens(row), &self.decode) {
                    (Some(tokens), Some(decode)) => found(text, tokens, decode),
                    _ => vec![false; prompt],
                },
                Span::Named(SpanName::LastPromptToken) => {
                    let answer = roles(row).and_then(|roles| roles.iter().position(|&role| role == Role::Assistant));
                    let last = answer.unwrap_or(prompt).saturating_sub(1);
                    (0..prompt).map(|position| position == last).collect()
                }
                Span::Named(name) => roles(row).map_or_else(|| vec![false; prompt], |roles| of_role(*name, roles)),
                Span::Range(_) => vec![false; prompt],
            })
            .collect()
    }
}

/// Which tokens of a conversation belong to a span.
fn of_role(name: SpanName, roles: &[Role]) -> Vec<bool> {
    // The last turn of the user: a run of tokens, in which a template may write.
    let last = roles.iter().rposition(|&role| role == Role::User).map_or(0, |last| last + 1);
    let other = |&role: &Role| matches!(role, Role::System | Role::Assistant | Role::Tool | Role::Padding);
    let first = roles[..last].iter().rposition(other).map_or(0, |other| other + 1);
    let question = |at: usize| (first..last).contains(&at) && roles[at] == Role::User;
    let belongs = |at: usize| match name {
        SpanName::System => roles[at] == Role::System,
        SpanName::Question => question(at),
        SpanName::Context => roles[at] == Role::Tool || (roles[at] == Role::User && !question(at)),
        SpanName::Response => roles[at] == Role::Assistant,
        SpanName::All | SpanName::Prompt | SpanName::First | SpanName::LastPromptToken => false,
    };
    (0..roles.len()).map(belongs).collect()
}

/// The tokens of every place where `text` is.
fn found(text: &str, tokens: &[u32], decode: &Decode) -> Vec<bool> {
    // What a token stands for may depend on those before it: ends are measured in the text so far.
    let ends: Vec<usize> = (1..=tokens.len()).map(|count| decode(&tokens[..count]).len()).collect();
    let whole = decode(tokens);
    let mut chosen = vec![false; tokens.len()];
    for (start, _) in whole.match_indices(text) {
        let end = start + text.len();
        for (at, chosen) in chosen.iter_mut().enumerate() {
            let from = if at == 0 { 0 } else { ends[at - 1] };
            *chosen |= from < end && ends[at] > start;
        }
    }
    chosen
}

impl EditConfig {
    /// The layers, and the edit of each without its tokens.
    fn template(
        &self,
        tensors: &BTreeMap<String, Named>,
        model: &Decoder,
        decodes: bool,
    ) -> Result<(Vec<usize>, Template), ConfigError> {
        let (named, site) = self.place().expect("validate: a known site");
        let count = model.layers.len();
        let layers = named.map(|layer| vec![layer]).or_else(|| self.layers.clone());
        let field = if named.is_some() { "site" } else { "layers" };
        let layers = layers.unwrap_or_else(|| (0..count).collect());
        if let Some(layer) = layers.iter().find(|&&layer| layer >= count) {
            let problem = format!("{field} names layer {layer}, and the model has {count}, from 0");
            return Err(ConfigError::new(field, problem));
        }
        let searched = [("tokens", &self.tokens), ("keys", &self.keys)];
        let text = searched.into_iter().find(|(_, span)| matches!(span, Span::Text(_)));
        if let Some((field, _)) = text.filter(|_| !decodes) {
            let problem = format!("{field}.text looks for text, and the model has no tokenizer: give a range");
            return Err(ConfigError::new(field, problem));
        }
        let at = match site {
            Site::Stream(site) => At::Stream(site),
            Site::Query(site) => At::Query(site, heads(&self.heads, QueryHead)),
            Site::Kv(site) => At::Kv(site, heads(&self.kv_heads, KvHead)),
        };
        let mut changes = Vec::new();
        for &layer in &layers {
            let mechanism = model.config().mechanism(layer);
            if let Some(reason) = mechanism.absent(site).filter(|_| !matches!(site, Site::Stream(_))) {
                let problem = format!("{} in layer {layer} has no site {site}: {reason}", mechanism.name());
                return Err(ConfigError::new("site", problem));
            }
            let sizes = sizes(model, layer, site);
            for (field, listed) in [("heads", &self.heads), ("kv_heads", &self.kv_heads)] {
                if let Some(head) = listed.iter().flatten().find(|&&head| head >= sizes[0]) {
                    let problem =
                        format!("{field} names head {head}, and {site} of layer {layer} has {}, from 0", sizes[0]);
                    return Err(ConfigError::new(field, problem));
                }
            }
            changes.push(self.change.read(tensors, model, layer, (site, sizes))?);
        }
        Ok((layers, Template { at, changes }))
    }
}

fn heads<T>(listed: &Option<Vec<usize>>, head: fn(usize) -> T) -> Vec<T> {
    listed.iter().flatten().map(|&at| head(at)).collect()
}

/// Heads and width of a site (of a map, the width is that of one key), by what a pass over one token has there.
fn sizes(model: &Decoder, layer: usize, site: Site) -> [usize; 2] {
    let hidden = Tensor::zeros([1, 1, model.config().d_model], &model.device());
    let sites = SitePlan { edits: Vec::new(), taps: vec![(layer, site)] };
    let plain = model.clone().intervened(None);
    let taps = plain.run_layers(layer..layer + 1, hidden, Pass { sites, ..Pass::new(&Mask::causal()) }).taps;
    taps.first().map_or([0; 2], |tap| [tap.values.dims()[1], tap.values.dims()[3]])
}

impl ChangeConfig {
    fn read(
        &self,
        tensors: &BTreeMap<String, Named>,
        model: &Decoder,
        layer: usize,
        place: (Site, [usize; 2]),
    ) -> Result<Change, ConfigError> {
        let amount = |key: &str, amount: &AmountConfig| match amount {
            AmountConfig::Number(number) => Ok(Amount::Number(*number)),
            AmountConfig::Tensor(name) => of_layer(tensors, name, model, layer, place)
                .map(Amount::Each)
                .map_err(|problem| ConfigError::new(format!("change.{key}"), problem)),
        };
        Ok(match self {
            Self::Scale(factor) => Change::Affine { gate: amount("scale", factor)?, value: Amount::Number(0.0) },
            Self::Add(value) => Change::add(amount("add", value)?),
            Self::Replace(value) => Change::Affine { gate: Amount::Number(0.0), value: amount("replace", value)? },
            Self::Mix { gate, value } => {
                Change::Affine { gate: amount("mix.gate", gate)?, value: amount("mix.value", value)? }
            }
            Self::Reweight(factor) => Change::Reweight(amount("reweight", factor)?),
            Self::Clamp { direction, to } => {
                let (site, [_, width]) = place;
                let field = "change.clamp.direction";
                let named = tensor(tensors, direction).map_err(|problem| ConfigError::new(field, problem))?;
                require(named.shape == [width], field, || {
                    format!(
                        "the tensor \"{direction}\" is {:?}, and {site} of layer {layer} has {width} channels",
                        named.shape
                    )
                })?;
                let values = Tensor::<1>::from_data(TensorData::new(named.values.clone(), [width]), &model.device());
                let length = values.clone().square().sum().sqrt();
                Change::Clamp { direction: values / length.clamp_min(1e-30), to: *to }
            }
        })
    }
}

/// A tensor of the file.
fn tensor<'a>(tensors: &'a BTreeMap<String, Named>, name: &str) -> Result<&'a Named, String> {
    tensors.get(name).ok_or_else(|| {
        let there: Vec<&str> = tensors.keys().map(String::as_str).collect();
        format!("the file of tensors has no \"{name}\"; it has {}", there.join(", "))
    })
}

/// `[batch or 1, heads or 1, positions or 1, width or keys or 1]`: the part of one layer.
fn of_layer(
    tensors: &BTreeMap<String, Named>,
    name: &str,
    model: &Decoder,
    layer: usize,
    (site, [heads, width]): (Site, [usize; 2]),
) -> Result<Tensor<4>, String> {
    let Named { shape, values, .. } = tensor(tensors, name)?;
    let layers = model.layers.len();
    let part = match shape[..] {
        [all, heads] if all == layers => [1, heads, 1, 1],
        [all, heads, width] if all == layers => [1, heads, 1, width],
        [all, batch, heads, positions, width] if all == layers => [batch, heads, positions, width],
        _ => {
            return Err(format!(
                "the tensor \"{name}\" is {shape:?}: it must be [layers, heads], [layers, heads, width] or [layers, batch or 1, heads \
                 or 1, positions or 1, width or 1], for {layers} layers"
            ));
        }
    };
    let fits = (part[1] == 1 || part[1] == heads) && (part[3] == 1 || part[3] == width || site.is_map());
    if !fits {
        return Err(format!(
            "the tensor \"{name}\" is {shape:?}, and {site} of layer {layer} has {heads} heads of width {width}"
        ));
    }
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        return Err(format!("the tensor \"{name}\" contains {value}: every number must be finite"));
    }
    let size = part.iter().product::<usize>();
    let own = values[layer * size..(layer + 1) * size].to_vec();
    Ok(Tensor::from_data(TensorData::new(own, part), &model.device()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::ops::ControlFlow;

    use burn::tensor::Device;
    use polyhead_kernels::seed_random;

    use super::*;
    use crate::{DecoderConfig, Past, Sampling};

    fn model() -> Decoder {
        let config = r#"{"d_model": 16, "n_layers": 2, "attention": {"softmax": {"n_heads": 4, "n_kv_heads": 2}}}"#;
        seed_random(5);
        serde_json::from_str::<DecoderConfig>(config).unwrap().init(11, &Device::flex())
    }

    fn words() -> Decode {
        Arc::new(|ids| ids.iter().map(|id| format!(" w{id}")).collect())
    }

    fn open(edit: serde_json::Value) -> Result<Intervention, String> {
        let told = |error: ConfigError| error.to_string();
        let config: InterventionConfig =
            serde_json::from_value(serde_json::json!({ "edits": [edit] })).map_err(|error| error.to_string())?;
        config.validate(&|_, names| names.first().map(|name| (*name).to_owned())).map_err(told)?;
        Intervention::new(&config, &BTreeMap::new(), &model(), Some(words())).map_err(told)
    }

    #[test]
    fn mistakes_are_named_with_the_way_out() {
        let edit = |more: serde_json::Value| {
            let mut edit = serde_json::json!({ "site": "z", "change": { "scale": 0.0 } });
            edit.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            open(edit).err().unwrap_or_default()
        };
        use serde_json::json;
        assert_eq!(edit(json!({})), "");
        for (more, words) in [
            (json!({ "site": "zz" }), vec!["edits.0.site", "no site \"zz\"", "did you mean", "Sites are"]),
            (json!({ "site": "blocks.1.hook_zz" }), vec!["did you mean \"blocks.1."]),
            (json!({ "site": "attn_scale" }), vec!["can be read, not changed"]),
            (json!({ "site": "layers.2.z" }), vec!["edits.0.site", "layer 2", "has 2"]),
            (json!({ "layers": [2] }), vec!["edits.0.layers", "layer 2", "has 2"]),
            (json!({ "site": "layers.1.z", "layers": [0] }), vec!["both name layers"]),
            (json!({ "layers": [] }), vec!["layers is empty"]),
            (json!({ "heads": [4] }), vec!["edits.0.heads", "head 4", "has 4, from 0"]),
            (json!({ "kv_heads": [0] }), vec!["edits.0.kv_heads", "query heads, heads"]),
            (json!({ "site": "v", "heads": [0] }), vec!["edits.0.heads", "key/value heads, kv_heads"]),
            (json!({ "site": "v", "kv_heads": [2] }), vec!["head 2", "has 2"]),
            (json!({ "site": "resid_mid", "heads": [0] }), vec!["it has no heads"]),
            (json!({ "keys": "first" }), vec!["keys are of scores and weights"]),
            (json!({ "tokens": { "from": 3, "to": 3 } }), vec!["edits.0.tokens", "from 3 to 3"]),
            (json!({ "tokens": { "text": "" } }), vec!["text is empty"]),
            (json!({ "tokens": "contexts" }), vec!["last_prompt_token", "{ text = "]),
            (json!({ "change": { "reweight": 2.0 } }), vec!["reweight is for weights"]),
            (json!({ "change": { "scale": "gamma" } }), vec!["\"gamma\"", "tensors names no file"]),
        ] {
            let told = edit(more.clone());
            assert!(words.iter().all(|word| told.contains(word)), "{more}: {told}");
        }
    }

    #[test]
    fn tensors_must_fit_the_model() {
        let config: InterventionConfig = serde_json::from_value(serde_json::json!({
            "tensors": "file", "edits": [{ "site": "z", "change": { "scale": "gamma" } }] }))
        .unwrap();
        let told = |shape: Vec<usize>, value: f32| {
            let values = vec![value; shape.iter().product()];
            let named = Named { name: "gamma".into(), shape, values };
            let tensors = BTreeMap::from([("gamma".to_owned(), named)]);
            Intervention::new(&config, &tensors, &model(), None)
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default()
        };
        assert_eq!(told(vec![2, 4], 1.0), "");
        assert_eq!(told(vec![2, 4, 4], 1.0), "");
        assert_eq!(told(vec![2, 1, 4, 3, 1], 1.0), "");
        assert!(told(vec![3, 4], 1.0).contains("for 2 layers"));
        assert!(told(vec![2, 3], 1.0).contains("has 4 heads of width 4"));
        assert!(told(vec![2, 4], f32::NAN).contains("NaN"));
        let other = Intervention::new(&config, &BTreeMap::new(), &model(), None).unwrap_err().to_string();
        assert!(other.contains("has no \"gamma\""), "{other}");
    }

    #[test]
    fn spans_are_found_by_role_name_and_text() {
        use Role::{Assistant, System, Template, Tool, User};
        let roles = [System, User, Assistant, Tool, Template, User, User, Template, Assistant, Assistant];
        let tokens: Vec<u32> = (0..10).collect();
        let context = Context { rows: 1, tokens: &tokens, roles: &roles, prompt: 10 };
        let intervention = open(serde_json::json!({ "site": "z", "change": { "scale": 0 } })).unwrap();
        let of = |span: &str| -> Vec<usize> {
            let span: Span = serde_json::from_str(span).unwrap();
            let rows = intervention.rows_of(&span, &context);
            (0..10).filter(|&at| rows[0][at]).collect()
        };
        assert_eq!(of(r#""system""#), [0]);
        assert_eq!(of(r#""context""#), [1, 3]);
        assert_eq!(of(r#""question""#), [5, 6]);
        assert_eq!(of(r#""response""#), [2, 8, 9]);
        assert_eq!(of(r#""last_prompt_token""#), [1]);
        assert_eq!(of(r#"{"text": "w3 w4"}"#), [3, 4]);
        assert_eq!(of(r#"{"text": "3 w"}"#), [3, 4]);
        assert_eq!(of(r#"{"text": "w77"}"#), [] as [usize; 0]);
        let searching =
            open(serde_json::json!({ "site": "scores", "keys": { "text": "w77" }, "change": { "add": 1 } }));
        let told = searching.unwrap().check_tokens(&context).unwrap_err().to_string();
        assert!(told.contains("edits.0.keys") && told.contains("\"w77\""), "{told}");
    }

    /// Decoding token by token under an intervention is what full passes say, and phases are kept apart.
    #[test]
    fn generation_obeys_phases() {
        let prompt = [1, 2, 3, 4];
        let greedy = Sampling { max_new_tokens: 5, temperature: 0.0, ..Sampling::default() };
        let generate =
            |model: &Decoder| Past::new(model).generate(model, &prompt, &greedy, &[], |_| ControlFlow::Continue(())).0;
        // A large number in one channel of the stream decides the token.
        let edit = |phase: &str, tokens: &str| {
            let change = serde_json::json!({ "scale": -30.0 });
            open(serde_json::json!({ "site": "resid_post", "layers": [1], "phase": phase, "tokens": tokens, "change": change }))
                .unwrap()
        };
        let plain = generate(&model());
        let of = |phase: &str, tokens: &str| generate(&model().intervened(Some(edit(phase, tokens))));
        let (both, prefill, decode) = (of("both", "all"), of("prefill", "all"), of("decode", "all"));
        assert_ne!(both[0], plain[0]);
        // The first token comes from the prompt, the others from what is generated.
        assert_eq!((prefill[0], decode[0]), (both[0], plain[0]));
        assert_eq!(of("both", "last_prompt_token")[0], both[0]);
        assert_eq!(of("decode", "last_prompt_token"), plain);
        assert_eq!(of("prefill", "response"), plain);
        assert_eq!(of("both", "response")[0], plain[0]);
        assert_ne!(of("both", "response")[1..], plain[1..]);
    }
}
