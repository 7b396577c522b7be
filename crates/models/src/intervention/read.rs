//! Edits in one model: their layers and heads checked, their tensors read.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use polyhead_attention::{Amount, At, Change, ConfigError, KvHead, Mask, QueryHead, Site, require};

use super::soft_pag::to_identity;
use super::span_boost::boost;
use super::{AmountConfig, ChangeConfig, EditConfig, InterventionConfig, Per, Span, TrainedConfig};
use crate::sites::SitePlan;
use crate::weights::Named;
use crate::{Decoder, Pass};

/// An edit in one model.
#[derive(Debug, Clone)]
pub(super) struct ModelEdit {
    pub(super) config: EditConfig,
    pub(super) at: At,
    /// The layers, and of each the amounts of the change, in the order of [`ChangeConfig::amounts`].
    pub(super) layers: Vec<(usize, Vec<Source>)>,
}

/// Where an amount comes from.
#[derive(Debug, Clone)]
pub(super) enum Source {
    Fixed(Box<Amount>),
    /// The trained tensor of this place.
    Trained(usize),
}

/// A tensor that is trained.
#[derive(Debug, Clone)]
pub(super) struct TrainedTensor {
    pub(super) name: String,
    /// `[layers, heads, width or 1]`
    pub(super) shape: [usize; 3],
    pub(super) sigmoid: bool,
    /// Before the first step.
    pub(super) initial: Vec<f32>,
}

/// What edits are read from.
pub(super) struct Reader<'a> {
    pub(super) config: &'a InterventionConfig,
    pub(super) tensors: &'a BTreeMap<String, Named>,
    pub(super) model: &'a Decoder,
    /// Whether ids can be turned into text.
    pub(super) decodes: bool,
}

impl Reader<'_> {
    /// An edit, its layers and heads checked.
    pub(super) fn edit(&self, edit: &EditConfig) -> Result<ModelEdit, ConfigError> {
        let (named, site) = edit.place().expect("validate: a known site");
        let count = self.model.layers.len();
        let layers = self.layers(edit);
        let field = if named.is_some() { "site" } else { "layers" };
        if let Some(layer) = layers.iter().find(|&&layer| layer >= count) {
            let problem = format!("{field} names layer {layer}, and the model has {count}, from 0");
            return Err(ConfigError::new(field, problem));
        }
        let searches = |span: &Span| span.parts().iter().any(|part| matches!(part, Span::Text(_)));
        if let Some((field, _)) = edit.spans().into_iter().find(|(_, span)| searches(span) && !self.decodes) {
            let problem = format!("{field}.text looks for text, and the model has no tokenizer: give a range");
            return Err(ConfigError::new(field, problem));
        }
        let at = match site {
            Site::Stream(site) => At::Stream(site),
            Site::Query(site) => At::Query(site, heads(&edit.heads, QueryHead)),
            Site::Kv(site) => At::Kv(site, heads(&edit.kv_heads, KvHead)),
        };
        let of_layer = |layer: usize| {
            let mechanism = self.model.config().mechanism(layer);
            if let Some(reason) = mechanism.absent(site).filter(|_| !matches!(site, Site::Stream(_))) {
                let problem = format!("{} in layer {layer} has no site {site}: {reason}", mechanism.name());
                return Err(ConfigError::new("site", problem));
            }
            let sizes = sizes(self.model, layer, site);
            for (field, listed) in [("heads", &edit.heads), ("kv_heads", &edit.kv_heads)] {
                if let Some(head) = listed.iter().flatten().find(|&&head| head >= sizes[0]) {
                    let problem =
                        format!("{field} names head {head}, and {site} of layer {layer} has {}, from 0", sizes[0]);
                    return Err(ConfigError::new(field, problem));
                }
            }
            Ok((layer, self.amounts(&edit.change, layer, (site, sizes))?))
        };
        let layers = layers.into_iter().map(of_layer).collect::<Result<_, _>>()?;
        Ok(ModelEdit { config: edit.clone(), at, layers })
    }

    fn layers(&self, edit: &EditConfig) -> Vec<usize> {
        let named = edit.place().and_then(|(named, _)| named).map(|layer| vec![layer]);
        named.or_else(|| edit.layers.clone()).unwrap_or_else(|| (0..self.model.layers.len()).collect())
    }

    /// A tensor that is trained, as large as the sites of its edits.
    pub(super) fn trained(&self, name: &str, trained: &TrainedConfig) -> Result<TrainedTensor, ConfigError> {
        let uses = self.config.tensor_names().filter(|(.., used)| *used == name).map(|(at, ..)| &self.config.edits[at]);
        let mut all = Vec::new();
        for edit in uses {
            let (_, site) = edit.place().expect("validate: a known site");
            require(trained.per == Per::Head || !site.is_map(), "per", || {
                format!("per = \"channel\" needs channels, and {site} has keys: leave it out")
            })?;
            let width = |width: usize| if trained.per == Per::Head { 1 } else { width };
            all.extend(self.layers(edit).into_iter().map(|layer| {
                let [heads, own] = sizes(self.model, layer, site);
                [heads, width(own)]
            }));
        }
        let [heads, width] = all.first().copied().unwrap_or_default();
        require(all.iter().all(|&other| other == [heads, width]), "", || {
            format!("\"{name}\" is of sites with different sizes, {all:?} (heads, width): train a tensor for each kind")
        })?;
        let shape = [self.model.layers.len(), heads, width];
        let stated: &[usize] = if trained.per == Per::Head { &shape[..2] } else { &shape };
        let initial = match trained.initial {
            Some(initial) => vec![initial as f32; shape.iter().product()],
            None => {
                let read = tensor(self.tensors, name).map_err(|problem| ConfigError::new("", problem))?;
                require(read.shape == stated, "", || {
                    format!("the tensor \"{name}\" is {:?}, and what is trained is {stated:?}", read.shape)
                })?;
                read.values.clone()
            }
        };
        Ok(TrainedTensor { name: name.to_owned(), shape, sigmoid: trained.sigmoid, initial })
    }

    /// The amounts of a change in one layer.
    fn amounts(
        &self,
        change: &ChangeConfig,
        layer: usize,
        place: (Site, [usize; 2]),
    ) -> Result<Vec<Source>, ConfigError> {
        let (site, [_, width]) = place;
        if let ChangeConfig::Clamp { direction, .. } = change {
            let field = "change.clamp.direction";
            let named = tensor(self.tensors, direction).map_err(|problem| ConfigError::new(field, problem))?;
            require(named.shape == [width], field, || {
                let shape = &named.shape;
                format!("the tensor \"{direction}\" is {shape:?}, and {site} of layer {layer} has {width} channels")
            })?;
            let values = TensorData::new(named.values.clone(), [1, 1, 1, width]);
            let values = Tensor::<4>::from_data(values, &self.model.device());
            let length = values.clone().square().sum().sqrt().clamp_min(1e-30).reshape([1, 1, 1, 1]);
            return Ok(vec![Source::Fixed(Box::new(Amount::Each(values / length)))]);
        }
        let read = |(key, amount): (&str, &AmountConfig)| match amount {
            AmountConfig::Number(number) => Ok(Source::Fixed(Box::new(Amount::Number(*number)))),
            AmountConfig::Tensor(name) => match self.config.train.keys().position(|trained| trained == name) {
                Some(place) => Ok(Source::Trained(place)),
                None => of_layer(self.tensors, name, self.model, layer, place)
                    .map(|part| Source::Fixed(Box::new(Amount::Each(part))))
                    .map_err(|problem| ConfigError::new(format!("change.{key}"), problem)),
            },
        };
        change.amounts().into_iter().map(read).collect()
    }
}

impl ChangeConfig {
    /// The change with these amounts, which are in the order of [`amounts`](Self::amounts).
    pub(super) fn of(&self, amounts: Vec<Amount>) -> Change {
        let mut amounts = amounts.into_iter();
        let mut next = || amounts.next().expect("an amount for each");
        match self {
            Self::Scale(_) => Change::Affine { gate: next(), value: Amount::Number(0.0) },
            Self::Add(_) => Change::add(next()),
            Self::Replace(_) => Change::Affine { gate: Amount::Number(0.0), value: next() },
            Self::Mix { .. } => Change::Affine { gate: next(), value: next() },
            Self::Blend { .. } => Change::blend(next(), next()),
            Self::ToIdentity(share) => to_identity(*share),
            Self::Reweight(_) => Change::Reweight(next()),
            Self::Boost(gain) => boost(*gain),
            Self::Recent(how) => how.change(),
            Self::Gaze(_) | Self::Redistribute(_) => unreachable!("made of spans, not of amounts"),
            Self::Clamp { to, .. } => match next() {
                Amount::Each(direction) => Change::Clamp { direction: direction.flatten(0, 3), to: *to },
                Amount::Number(_) => unreachable!("a direction is a tensor"),
            },
        }
    }
}

fn heads<T>(listed: &Option<Vec<usize>>, head: fn(usize) -> T) -> Vec<T> {
    listed.iter().flatten().map(|&at| head(at)).collect()
}

/// Heads and width of a site (of a map, the width is that of one key), by what a pass over one token has there.
pub(super) fn sizes(model: &Decoder, layer: usize, site: Site) -> [usize; 2] {
    let hidden = Tensor::zeros([1, 1, model.config().d_model], &model.device());
    let sites = SitePlan { edits: Vec::new(), taps: vec![(layer, site)] };
    let plain = model.clone().intervened(None);
    let taps = plain.run_layers(layer..layer + 1, hidden, Pass { sites, ..Pass::new(&Mask::causal()) }).taps;
    taps.first().map_or([0; 2], |tap| [tap.values.dims()[1], tap.values.dims()[3]])
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
