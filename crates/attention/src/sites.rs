//! Sites: the places of a layer where a forward can be read (a tap) and changed (an [`Edit`]).
//!
//! A mechanism hands what it computes to the [`Sites`] of its call, which give it back: as it is where nothing is asked for,
//! at no cost. Queries and keys go through [`Sites::query`] and [`Sites::key`], values through [`Sites::at`], the softmax is
//! [`Sites::attend`], and the output projection [`Sites::out`]. Additions to scores go to the kernel as a bias; scores and
//! weights exist as matrices only where they are read or changed otherwise.

mod edit;
mod names;

use std::cell::RefCell;

use burn::nn::Linear;
use burn::tensor::{Bool, Tensor};
use polyhead_kernels::{Attention, AttentionOptions, MapAccess, attention, in_type};

pub use edit::{Amount, At, Change, Edit, Function, Place, Positions};
pub use names::{KvHead, KvSite, QueryHead, QuerySite, Site, StreamSite, Wiring};

use crate::projection::{join_heads, split_heads};
use crate::rope::rotate;
use crate::sparse::Sparse;
use crate::{Adapters, Rope};

/// What is read and changed in one layer during one call.
#[derive(Debug, Default)]
pub struct LayerSites {
    /// The position of the call's first token.
    pub start: usize,
    /// The changes, in the order in which those of one site are made.
    pub edits: Vec<Edit>,
    /// The sites to read, each after its changes.
    pub taps: Vec<Site>,
    read: RefCell<Vec<(Site, Tensor<4>)>>,
}

impl LayerSites {
    /// Sites of a call whose first token is at `start`.
    pub fn new(start: usize, edits: Vec<Edit>, taps: Vec<Site>) -> Self {
        Self { start, edits, taps, read: RefCell::default() }
    }

    /// What was read, in the order in which the layer passes its sites.
    pub fn into_read(self) -> Vec<(Site, Tensor<4>)> {
        self.read.into_inner()
    }

    fn change(&self, site: Site, x: Tensor<4>, place: Place) -> Tensor<4> {
        self.edits.iter().filter(|edit| edit.at.site() == site).fold(x, |x, edit| edit.apply(x, place))
    }

    fn record(&self, site: Site, x: &Tensor<4>) {
        if self.taps.contains(&site) {
            let mut read = self.read.borrow_mut();
            // What is computed a second time, for a statistic, is the same.
            read.retain(|(other, _)| *other != site);
            read.push((site, x.clone()));
        }
    }
}

/// The sites of a layer in one call; by default none are read or changed, and queries read all that the mask leaves them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sites<'a> {
    /// What is read and changed.
    pub own: Option<&'a LayerSites>,
    /// Which keys queries read, where it is not all of them.
    pub sparse: Option<&'a Sparse>,
}

impl Sites<'_> {
    /// Whether one of these sites is changed.
    pub(crate) fn edit(self, sites: &[Site]) -> bool {
        self.own.is_some_and(|own| own.edits.iter().any(|edit| sites.contains(&edit.at.site())))
    }

    /// Whether one of these sites is read or changed.
    pub fn touch(self, sites: &[Site]) -> bool {
        self.edit(sites) || self.own.is_some_and(|own| own.taps.iter().any(|tap| sites.contains(tap)))
    }

    /// `[batch, heads, seq, width]`: `x`, the numbers of `site`, as the layer goes on with them.
    pub(crate) fn at(self, site: impl Into<Site>, x: Tensor<4>) -> Tensor<4> {
        let start = self.own.map_or(0, |own| own.start);
        self.at_from(site, start, x)
    }

    /// The same where the first row is at `start` of the text.
    pub(crate) fn at_from(self, site: impl Into<Site>, start: usize, x: Tensor<4>) -> Tensor<4> {
        let Some(own) = self.own else { return x };
        let site = site.into();
        let x = own.change(site, x, Place { first: start, first_key: None });
        own.record(site, &x);
        x
    }

    /// `[batch, seq, heads, width]`: the same of numbers that are laid out otherwise.
    pub(crate) fn at_tokens(self, site: impl Into<Site>, x: Tensor<4>) -> Tensor<4> {
        let site = site.into();
        match self.touch(&[site]) {
            true => self.at(site, x.swap_dims(1, 2)).swap_dims(1, 2),
            false => x,
        }
    }

    /// `[batch, seq, width]`: the same of the residual stream.
    pub fn stream(self, site: StreamSite, x: Tensor<3>) -> Tensor<3> {
        match self.touch(&[site.into()]) {
            true => self.at(site, x.unsqueeze_dim::<4>(1)).squeeze_dim::<3>(1),
            false => x,
        }
    }

    /// `[batch, n_heads, seq, width]`: query heads, rotated.
    pub(crate) fn query(self, rope: Option<&Rope>, x: Tensor<4>) -> Tensor<4> {
        self.at(QuerySite::RotQ, rotate(rope, self.at(QuerySite::Q, x)))
    }

    /// `[batch, n_kv_heads, seq, width]`: key heads, rotated.
    pub(crate) fn key(self, rope: Option<&Rope>, x: Tensor<4>) -> Tensor<4> {
        self.at(KvSite::RotK, rotate(rope, self.at(KvSite::K, x)))
    }

    /// [`attention`] whose last keys are those of the call's own tokens, in the order of positions.
    pub(crate) fn attend(self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: AttentionOptions<'_>) -> Attention {
        let attended = self.weigh(q, k, v, options);
        Attention { hidden: self.at(QuerySite::Attended, attended.hidden), ..attended }
    }

    /// The same where something else makes of the result what a head attended to.
    pub(crate) fn weigh(self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: AttentionOptions<'_>) -> Attention {
        let attention = |q, k, v, options: AttentionOptions<'_>| match self.sparse {
            Some(sparse) => sparse.attend([q, k, v], &options),
            None => attention(q, k, v, &options),
        };
        let Some(own) = self.own else { return attention(q, k, v, options) };
        let ([batch, heads, queries, _], keys) = (q.dims(), k.dims()[2]);
        let place = Place { first: own.start, first_key: Some((own.start + queries).saturating_sub(keys)) };
        let access = Access { own, place };
        let scores = || own.edits.iter().filter(|edit| edit.at.site() == QuerySite::Scores.into());
        let biases: Option<Vec<Option<Tensor<4>>>> =
            scores().map(|edit| edit.bias(&q, [batch, heads, queries, keys], place)).collect();
        let weights = [QuerySite::Scores, QuerySite::Weights].map(Site::from);
        let read = own.taps.iter().any(|tap| weights.contains(tap)) || self.edit(&weights[1..]);
        let options = match biases.filter(|_| !read) {
            Some(biases) => {
                let bias = options.bias.into_iter().chain(biases.into_iter().flatten()).reduce(|a, b| a + b);
                AttentionOptions { bias, ..options }
            }
            None => AttentionOptions { map: Some(&access), ..options },
        };
        attention(q, k, v, options)
    }

    /// `[batch, seq, n_heads * width]`: head outputs as the output projection reads them.
    pub(crate) fn z(self, heads: Tensor<3>, n_heads: usize) -> Tensor<3> {
        match self.touch(&[QuerySite::Z.into()]) {
            true => join_heads(self.at(QuerySite::Z, split_heads(heads, n_heads))),
            false => heads,
        }
    }

    /// `[batch, seq, d_model]`: head outputs, `[batch, seq, n_heads * width]`, through the output projection `o_proj`.
    pub(crate) fn out(self, adapters: Adapters<'_>, o_proj: &Linear, heads: Tensor<3>, n_heads: usize) -> Tensor<3> {
        self.gated_out(adapters, o_proj, heads, n_heads, None)
    }

    /// The same times a gate, `[batch, seq, d_model]`.
    pub(crate) fn gated_out(
        self,
        adapters: Adapters<'_>,
        o_proj: &Linear,
        heads: Tensor<3>,
        n_heads: usize,
        gate: Option<Tensor<3>>,
    ) -> Tensor<3> {
        let heads = self.z(heads, n_heads);
        let site = QuerySite::Result.into();
        let gated = |written: Tensor<3>| match &gate {
            Some(gate) => written * gate.clone(),
            None => written,
        };
        if !self.touch(&[site]) {
            return gated(adapters.project("o_proj", o_proj, heads));
        }
        let weight = in_type(adapters.weight("o_proj", o_proj), heads.dtype());
        let [channels, d_model] = weight.dims();
        let of_heads = weight.reshape([1, n_heads, channels / n_heads, d_model]);
        let results = split_heads(heads.clone(), n_heads).matmul(of_heads);
        let results = match &gate {
            Some(gate) => results * gate.clone().unsqueeze_dim::<4>(1),
            None => results,
        };
        let results = self.at(site, results);
        if !self.edit(&[site]) {
            return gated(adapters.project("o_proj", o_proj, heads));
        }
        let written = results.sum_dim(1).squeeze_dim::<3>(1);
        match &o_proj.bias {
            Some(bias) => {
                let bias = in_type(bias.val(), heads.dtype()).unsqueeze::<3>().expand(written.dims());
                written + gated(bias)
            }
            None => written,
        }
    }
}

/// The sites of a map, inside the kernel.
#[derive(Debug)]
struct Access<'a> {
    own: &'a LayerSites,
    place: Place,
}

impl MapAccess for Access<'_> {
    fn scores(&self, scores: Tensor<4>, hidden: Option<&Tensor<4, Bool>>) -> Tensor<4> {
        let site = QuerySite::Scores.into();
        let scores = self.own.change(site, scores, self.place);
        self.record(site, &scores, hidden, f64::NEG_INFINITY);
        scores
    }

    fn weights(&self, weights: Tensor<4>, hidden: Option<&Tensor<4, Bool>>) -> Tensor<4> {
        let site = QuerySite::Weights.into();
        let visible = |weights: Tensor<4>| filled(weights, hidden, 0.0);
        // One change after the other, each of what is visible: what a row sums to does not depend on what it cannot see.
        let edits = self.own.edits.iter().filter(|edit| edit.at.site() == site);
        let weights = edits.fold(weights, |weights, edit| visible(edit.apply(weights, self.place)));
        self.record(site, &weights, hidden, 0.0);
        weights
    }
}

impl Access<'_> {
    fn record(&self, site: Site, x: &Tensor<4>, hidden: Option<&Tensor<4, Bool>>, value: f64) {
        if self.own.taps.contains(&site) {
            self.own.record(site, &filled(x.clone(), hidden, value));
        }
    }
}

/// A map with `value` where keys are hidden.
fn filled(map: Tensor<4>, hidden: Option<&Tensor<4, Bool>>, value: f64) -> Tensor<4> {
    let full = map.dims();
    match hidden {
        Some(hidden) => map.mask_fill(hidden.clone().expand(full), value),
        None => map,
    }
}
